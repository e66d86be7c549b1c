//! Threads that enter namespaces of pods and come home again.
//!
//! To start a thread for each visit of a pod, and to wake the one that waits for it, takes a good part of what the visit
//! itself takes. A traveller does a whole piece of work with all its visits, on one thread, and waits for the next piece
//! at home: nothing of it is in a pod between two. One that cannot come home ends.
//!
//! ```no_run
//! # fn main() -> nsm_kernel::Result<()> {
//! use nsm_kernel::{netns::Namespace, travellers::Travellers};
//! let travellers = Travellers::new(Namespace::current()?);
//! travellers.send(|| {
//!     let pod = Namespace::named("secure-intranet.client")?;
//!     let forwarding = pod.run(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward"))?;
//!     println!("{forwarding:?}");
//!     Ok::<_, nsm_kernel::Error>(())
//! });
//! # Ok(()) }
//! ```

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::netns::Namespace;

/// They mostly wait: for the one lock of the kernel, or until an older wire of the same name is gone.
const MOST: usize = 64;
/// How long one waits for work.
const IDLE: Duration = Duration::from_secs(10);

type Work = Box<dyn FnOnce() + Send>;

/// A few threads, started when there is work for them; those that wait end with this.
pub struct Travellers(Arc<Shared>);

struct Shared {
    home: Namespace,
    queue: Mutex<Queue>,
    news: Condvar,
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    threads: usize,
    waiting: usize,
    closed: bool,
}

thread_local! {
    /// Of a traveller.
    static HOME: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
    /// It is in another namespace, or could not leave one.
    static ABROAD: Cell<bool> = const { Cell::new(false) };
}

// === impl Travellers ===

impl Travellers {
    /// They wait in that namespace.
    #[must_use]
    pub fn new(home: Namespace) -> Self {
        Self(Arc::new(Shared { home, queue: Mutex::default(), news: Condvar::new() }))
    }

    /// Has one of them do that as soon as one is free. What it returns is dropped, and so is a panic.
    pub fn send<T>(&self, work: impl FnOnce() -> T + Send + 'static) {
        let mut queue = self.0.queue.lock();
        queue.work.push_back(Box::new(move || drop(work())));
        if queue.waiting >= queue.work.len() {
            self.0.news.notify_one();
            return;
        }
        if queue.threads == MOST {
            return;
        }
        queue.threads += 1;
        let shared = Arc::clone(&self.0);
        drop(queue);
        if let Err(error) = thread::Builder::new().name("traveller".into()).spawn(move || shared.live()) {
            tracing::warn!(%error, "cannot start a thread that enters network namespaces");
            let mut queue = self.0.queue.lock();
            queue.threads -= 1;
            let undone = queue.threads == 0;
            drop(queue);
            if undone {
                self.0.give_up();
            }
        }
    }
}

impl Drop for Travellers {
    fn drop(&mut self) {
        self.0.queue.lock().closed = true;
        self.0.news.notify_all();
    }
}

impl fmt::Debug for Travellers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Travellers").field("threads", &self.0.queue.lock().threads).finish_non_exhaustive()
    }
}

impl Shared {
    /// The life of one thread.
    fn live(self: Arc<Self>) {
        HOME.set(Some(Arc::clone(&self)));
        // Whoever started us may have been somewhere else.
        go_home();
        // Then the next one would not get home either.
        let lost = ABROAD.get();
        while !ABROAD.get()
            && let Some(work) = self.next()
        {
            // The panic is told, and whoever waits for the work sees that it was dropped.
            let _ = catch_unwind(AssertUnwindSafe(work));
        }
        self.leave(lost);
    }

    fn next(&self) -> Option<Work> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(work) = queue.work.pop_front() {
                return Some(work);
            }
            if queue.closed {
                return None;
            }
            queue.waiting += 1;
            let late = self.news.wait_for(&mut queue, IDLE).timed_out();
            queue.waiting -= 1;
            if late && queue.work.is_empty() {
                return None;
            }
        }
    }

    fn leave(self: Arc<Self>, lost: bool) {
        let mut queue = self.queue.lock();
        queue.threads -= 1;
        // Work that came in the moment that we gave up waiting has no thread yet; nor has what a lost one left.
        let again = !queue.work.is_empty() && queue.threads == 0;
        queue.threads += usize::from(again && !lost);
        drop(queue);
        if again && lost {
            self.give_up();
        } else if again {
            let next = Arc::clone(&self);
            if thread::Builder::new().name("traveller".into()).spawn(move || next.live()).is_err() {
                self.queue.lock().threads -= 1;
                self.give_up();
            }
        }
    }

    /// There is nobody to do what waits: whoever waits for it hears that it was dropped.
    fn give_up(&self) {
        let undone = std::mem::take(&mut self.queue.lock().work);
        // Not under the lock: the last holder of these threads may be among it.
        drop(undone);
    }
}

/// A visit of the calling thread, which ends at home, whatever ends it.
pub(crate) struct Visit(());

impl Visit {
    /// If this thread is a traveller, and at home.
    pub(crate) fn begin() -> Option<Self> {
        // Not `then_some`: a visit that is not one must not end either.
        (HOME.with_borrow(Option::is_some) && !ABROAD.replace(true)).then(|| Self(()))
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        go_home();
    }
}

fn go_home() {
    let arrived = HOME.with_borrow(|shared| shared.as_ref().map(|shared| shared.home.enter()));
    match arrived {
        Some(Ok(())) => ABROAD.set(false),
        Some(Err(error)) => {
            ABROAD.set(true);
            tracing::error!(%error, "a thread cannot come home from a pod's network namespace and ends");
        }
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn here() -> crate::netns::NsId {
        Namespace::current().expect("readable").id()
    }

    #[test]
    fn visits_are_on_the_same_thread_and_end_at_home() {
        let Ok(pod) = Namespace::unnamed() else {
            println!("SKIPPED visits_are_on_the_same_thread_and_end_at_home: network namespaces need root");
            return;
        };
        let home = here();
        let (other, abroad) = (Namespace::unnamed().expect("root"), pod.id());
        let elsewhere = other.id();
        let travellers = Travellers::new(Namespace::current().expect("readable"));
        let (tell, told) = mpsc::channel();
        travellers.send(move || {
            let me = thread::current().id();
            let visit = pod.run(|| {
                // Within a visit another one is somebody else's: this thread stays where it is.
                let nested = other.run(|| (thread::current().id() == me, here()));
                (thread::current().id() == me, here(), nested.expect("entered"), here())
            });
            tell.send((visit.expect("entered"), here())).expect("somebody listens");
        });
        let wanted = ((true, abroad, (false, elsewhere), abroad), home);
        assert_eq!(told.recv().expect("done"), wanted);
        assert_eq!(here(), home);
    }

    #[test]
    fn a_panic_ends_at_home_and_takes_no_thread_along() {
        let Ok(pod) = Namespace::unnamed() else {
            println!("SKIPPED a_panic_ends_at_home_and_takes_no_thread_along: network namespaces need root");
            return;
        };
        let home = here();
        let travellers = Travellers::new(Namespace::current().expect("readable"));
        let (tell, told) = mpsc::channel::<()>();
        for _ in 0..3 * MOST {
            let (pod, tell) = (pod.try_clone().expect("a descriptor"), tell.clone());
            travellers.send(move || {
                let _promise = tell;
                pod.run(|| panic!("a test panics in a pod")).expect("entered");
            });
        }
        drop(tell);
        assert!(told.recv().is_err(), "all were dropped");
        let (tell, told) = mpsc::channel();
        for _ in 0..3 * MOST {
            let tell = tell.clone();
            travellers.send(move || tell.send(here()));
        }
        drop(tell);
        let seen: Vec<_> = told.iter().collect();
        assert_eq!(seen, vec![home; 3 * MOST]);
        assert!(travellers.0.queue.lock().threads <= MOST);
    }

    #[test]
    fn those_that_wait_end_with_it() {
        let travellers = Travellers::new(Namespace::current().expect("readable"));
        let (tell, told) = mpsc::channel();
        travellers.send(move || tell.send(()));
        told.recv().expect("done");
        let shared = Arc::downgrade(&travellers.0);
        drop(travellers);
        while shared.strong_count() > 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
