//! Threads that wait for work, as many as are needed at once, and no longer than some while.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::sync::{self, Condvar, Mutex};

/// A few threads, started when there is work for them; those that wait end with this.
pub(crate) struct Crew(Arc<Shared>);

type Work = Box<dyn FnOnce() + Send>;

struct Shared {
    name: &'static str,
    most: usize,
    /// How long one waits for work.
    idle: Duration,
    /// Asked on a thread when it begins, and after each piece of work.
    fit: Box<dyn Fn() -> bool + Send + Sync>,
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

// === impl Crew ===

impl Crew {
    /// At most so many, that wait so long. A thread that is not fit, which it is asked at first and after each piece of
    /// work, ends.
    pub(crate) fn new(
        name: &'static str,
        most: usize,
        idle: Duration,
        fit: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Self {
        let (queue, news) = (Mutex::default(), Condvar::new());
        Self(Arc::new(Shared { name, most, idle, fit: Box::new(fit), queue, news }))
    }

    /// Has one of them do that as soon as one is free; what there are no threads for is dropped, and so is a panic.
    pub(crate) fn send(&self, work: impl FnOnce() + Send + 'static) {
        let mut queue = self.0.queue.lock();
        queue.work.push_back(Box::new(work));
        if queue.waiting >= queue.work.len() {
            self.0.news.notify_one();
            return;
        }
        if queue.threads == self.0.most {
            return;
        }
        queue.threads += 1;
        drop(queue);
        if let Err(error) = self.0.start() {
            tracing::warn!(%error, name = self.0.name, "cannot start a thread");
            let mut queue = self.0.queue.lock();
            queue.threads -= 1;
            let undone = queue.threads == 0;
            drop(queue);
            if undone {
                self.0.give_up();
            }
        }
    }

    /// How many there are.
    pub(crate) fn threads(&self) -> usize {
        self.0.queue.lock().threads
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.0.queue.lock().closed = true;
        self.0.news.notify_all();
    }
}

impl Shared {
    /// One that is counted already.
    fn start(self: &Arc<Self>) -> std::io::Result<()> {
        let shared = Arc::clone(self);
        sync::spawn(self.name, move || shared.live())
    }

    /// The life of one thread.
    fn live(self: Arc<Self>) {
        let mut fit = (self.fit)();
        // Then the next one would not be either.
        let lost = !fit;
        while fit && let Some(work) = self.next() {
            // The panic is told, and whoever waits for the work sees that it was dropped.
            let _ = catch_unwind(AssertUnwindSafe(work));
            fit = (self.fit)();
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
            let late = self.news.wait_for(&mut queue, self.idle).timed_out();
            queue.waiting -= 1;
            if late && queue.work.is_empty() {
                return None;
            }
        }
    }

    fn leave(self: &Arc<Self>, lost: bool) {
        let mut queue = self.queue.lock();
        queue.threads -= 1;
        // Work that came in the moment that we gave up waiting has no thread yet; nor has what a lost one left.
        let again = !queue.work.is_empty() && queue.threads == 0;
        queue.threads += usize::from(again && !lost);
        drop(queue);
        if again && lost {
            self.give_up();
        } else if again && self.start().is_err() {
            self.queue.lock().threads -= 1;
            self.give_up();
        }
    }

    /// There is nobody to do what waits: whoever waits for it hears that it was dropped.
    fn give_up(&self) {
        let undone = std::mem::take(&mut self.queue.lock().work);
        // Not under the lock: the last holder of these threads may be among it.
        drop(undone);
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn those_that_wait_end_with_it() {
        let crew = Crew::new("sailor", 2, Duration::from_secs(10), || true);
        let (tell, told) = mpsc::channel();
        crew.send(move || tell.send(()).expect("somebody listens"));
        told.recv().expect("done");
        let shared = Arc::downgrade(&crew.0);
        drop(crew);
        while shared.strong_count() > 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// `cargo xtask loom`. That all threads have ended in the end, loom sees to itself.
#[cfg(all(test, feature = "loom"))]
mod orders {
    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::sync::mpsc::{self, Receiver, Sender};

    use super::*;
    use crate::sync::{every_order, refuse};

    /// Says what became of a piece of work, also if nobody does it.
    struct Promise(Sender<bool>, bool);

    impl Promise {
        fn keep(mut self) {
            self.1 = true;
        }
    }

    impl Drop for Promise {
        fn drop(&mut self) {
            let _ = self.0.send(self.1);
        }
    }

    fn work(tell: &Sender<bool>) -> impl FnOnce() + Send + use<> {
        let promise = Promise(tell.clone(), false);
        move || promise.keep()
    }

    fn crew(most: usize) -> (Crew, Sender<bool>, Receiver<bool>) {
        let (tell, told) = mpsc::channel();
        (Crew::new("sailor", most, Duration::ZERO, || true), tell, told)
    }

    /// How many of so many pieces of work were done; each is heard of.
    fn done(told: &Receiver<bool>, count: usize) -> usize {
        (0..count).filter(|_| told.recv() == Ok(true)).count()
    }

    #[test]
    fn work_that_comes_as_one_tires_of_waiting_is_done() {
        every_order(|| {
            let (crew, tell, told) = crew(1);
            crew.send(work(&tell));
            let shared = Arc::clone(&crew.0);
            loom::thread::spawn(move || shared.news.time_passes());
            crew.send(work(&tell));
            assert_eq!(done(&told, 2), 2);
            assert!(crew.threads() <= 1);
        });
    }

    #[test]
    fn work_of_two_is_done_by_one_and_by_two() {
        for most in [1, 2] {
            every_order(move || {
                let (crew, tell, told) = crew(most);
                let (crew, other, first) = (Arc::new(crew), tell.clone(), work(&tell));
                let same = Arc::clone(&crew);
                loom::thread::spawn(move || {
                    same.send(work(&other));
                });
                crew.send(first);
                assert_eq!(done(&told, 2), 2);
                assert!(crew.threads() <= most);
            });
        }
    }

    #[test]
    fn who_waits_already_takes_what_comes_and_ends_with_it() {
        every_order(|| {
            let (crew, tell, told) = crew(2);
            crew.send(work(&tell));
            assert_eq!(done(&told, 1), 1);
            crew.send(work(&tell));
            crew.send(work(&tell));
            drop(crew);
            assert_eq!(done(&told, 2), 2, "closed, it is worked off first");
        });
    }

    #[test]
    fn work_that_waits_for_other_work_does_not_keep_it_waiting() {
        every_order(|| {
            let (crew, tell, told) = crew(2);
            let (second, first) = mpsc::channel();
            let promise = work(&tell);
            crew.send(move || {
                let _ = first.recv();
                promise();
            });
            crew.send(move || second.send(()).expect("it waits"));
            assert_eq!(done(&told, 1), 1);
        });
    }

    #[test]
    fn work_that_no_thread_can_be_started_for_is_heard_of() {
        every_order(|| {
            let (crew, tell, told) = crew(2);
            refuse(1);
            crew.send(work(&tell));
            assert_eq!((crew.threads(), done(&told, 1)), (0, 0));
            crew.send(work(&tell));
            crew.send(work(&tell));
            assert_eq!(done(&told, 2), 2);
        });
    }

    #[test]
    fn work_that_the_next_thread_cannot_be_started_for_is_heard_of() {
        every_order(|| {
            let (tell, told) = mpsc::channel();
            // The first thread is when it begins, and not after its work.
            let asked = AtomicU32::new(0);
            let fit = move || asked.fetch_add(1, Ordering::SeqCst) != 1;
            let crew = Crew::new("sailor", 1, Duration::ZERO, fit);
            crew.send(work(&tell));
            refuse(1);
            crew.send(work(&tell));
            assert_eq!((done(&told, 2), crew.threads()), (1, 0));
        });
    }

    #[test]
    fn a_refused_second_thread_leaves_its_work_to_the_first() {
        every_order(|| {
            let (crew, tell, told) = crew(2);
            crew.send(work(&tell));
            refuse(1);
            crew.send(work(&tell));
            assert_eq!(done(&told, 2), 2);
        });
    }

    #[test]
    fn who_is_not_fit_any_more_leaves_the_rest_to_another() {
        every_order(|| {
            let asked = AtomicU32::new(0);
            // The first thread is when it begins, and not after its work.
            let fit = move || asked.fetch_add(1, Ordering::SeqCst) != 1;
            let (tell, told) = mpsc::channel();
            let crew = Crew::new("sailor", 1, Duration::ZERO, fit);
            crew.send(work(&tell));
            crew.send(work(&tell));
            assert_eq!(done(&told, 2), 2);
        });
    }

    #[test]
    fn work_that_only_unfit_ones_are_there_for_is_heard_of() {
        every_order(|| {
            let (tell, told) = mpsc::channel();
            let crew = Crew::new("sailor", 2, Duration::ZERO, || false);
            crew.send(work(&tell));
            crew.send(work(&tell));
            assert_eq!(done(&told, 2), 0);
        });
    }
}
