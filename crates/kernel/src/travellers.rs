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
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::crew::Crew;
use crate::netns::Namespace;

/// They mostly wait: for the one lock of the kernel, or until an older wire of the same name is gone.
const MOST: usize = 64;
/// How long one waits for work.
const IDLE: Duration = Duration::from_secs(10);

/// A few threads, started when there is work for them; those that wait end with this.
pub struct Travellers(Crew);

thread_local! {
    /// Of a traveller.
    static HOME: RefCell<Option<Arc<Namespace>>> = const { RefCell::new(None) };
    /// It is in another namespace, or could not leave one.
    static ABROAD: Cell<bool> = const { Cell::new(false) };
}

// === impl Travellers ===

impl Travellers {
    /// They wait in that namespace.
    #[must_use]
    pub fn new(home: Namespace) -> Self {
        let home = Arc::new(home);
        Self(Crew::new("traveller", MOST, IDLE, move || is_at_home(&home)))
    }

    /// Has one of them do that as soon as one is free. What it returns is dropped, and so is a panic.
    pub fn send<T>(&self, work: impl FnOnce() -> T + Send + 'static) {
        self.0.send(move || drop(work()));
    }
}

impl fmt::Debug for Travellers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Travellers").field("threads", &self.0.threads()).finish_non_exhaustive()
    }
}

/// Whether this thread, which is a traveller from now on, is.
fn is_at_home(home: &Arc<Namespace>) -> bool {
    if HOME.with_borrow(Option::is_none) {
        HOME.set(Some(Arc::clone(home)));
        // Whoever started us may have been somewhere else.
        go_home();
    }
    !ABROAD.get()
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
    let arrived = HOME.with_borrow(|home| home.as_ref().map(|home| home.enter()));
    match arrived {
        Some(Ok(())) => ABROAD.set(false),
        Some(Err(error)) => {
            ABROAD.set(true);
            tracing::error!(%error, "a thread cannot come home from a pod's network namespace and ends");
        }
        None => {}
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use std::sync::mpsc;
    use std::thread;

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
        assert!(travellers.0.threads() <= MOST);
    }
}
