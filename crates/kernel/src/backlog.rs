//! Work that a few threads do, which live only while there is some. Each piece has a name: whoever needs all of a name
//! to be over does himself what still waits, and awaits what a thread is at.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::sync::{self, Condvar, Mutex, MutexGuard};

/// It is worked off before it is dropped.
pub(crate) struct Backlog<J: Job>(Arc<Shared<J>>);

/// A piece of work.
pub(crate) trait Job: Send + 'static {
    /// Several may have the same.
    fn name(&self) -> &str;

    /// Does it.
    fn run(self);
}

struct Shared<J> {
    name: &'static str,
    most: usize,
    queue: Mutex<Queue<J>>,
    /// Signalled when a piece of work is over.
    progress: Condvar,
}

struct Queue<J> {
    waiting: VecDeque<J>,
    /// The names of what somebody does now.
    under_way: Vec<String>,
    threads: usize,
    queued: u64,
    ended: u64,
}

// === impl Backlog ===

impl<J: Job> Backlog<J> {
    /// With at most so many threads.
    pub(crate) fn new(name: &'static str, most: usize) -> Self {
        let queue =
            Queue { waiting: VecDeque::new(), under_way: Vec::new(), threads: 0, queued: 0, ended: 0 };
        Self(Arc::new(Shared { name, most, queue: Mutex::new(queue), progress: Condvar::new() }))
    }

    /// Has it done soon.
    pub(crate) fn push(&self, job: J) {
        let mut queue = self.0.queue.lock();
        queue.push(job);
        if queue.threads == self.0.most {
            return;
        }
        queue.threads += 1;
        let others = queue.threads > 1;
        drop(queue);
        let shared = Arc::clone(&self.0);
        if let Err(error) = sync::spawn(self.0.name, move || shared.work()) {
            tracing::warn!(%error, others, name = self.0.name, "cannot start a thread");
            // It has to be done, and if nobody else does it, here and now.
            self.0.work();
        }
    }

    /// Does it, with all of its name, here and now. False: see [`Backlog::settle`].
    pub(crate) fn run(&self, job: J, patience: Duration) -> bool {
        let name = job.name().to_owned();
        self.0.queue.lock().push(job);
        self.settle(&name, patience)
    }

    /// Waits until nothing of that name waits or is under way, and for nothing else. False: that takes longer than
    /// `patience`.
    pub(crate) fn settle(&self, name: &str, patience: Duration) -> bool {
        let mut queue = self.0.queue.lock();
        while let Some(at) = queue.waiting.iter().position(|job| job.name() == name)
            && let Some(job) = queue.waiting.remove(at)
        {
            self.0.carry_out(&mut queue, job);
        }
        let is_under_way = |queue: &mut Queue<J>| queue.under_way.iter().any(|other| other == name);
        !self.0.progress.wait_while_for(&mut queue, is_under_way, patience).timed_out()
    }

    /// How much was ever asked for.
    pub(crate) fn queued(&self) -> u64 {
        self.0.queue.lock().queued
    }

    /// How much of it is over.
    pub(crate) fn ended(&self) -> u64 {
        self.0.queue.lock().ended
    }

    /// Waits until more than that is over, or nothing is left.
    pub(crate) fn wait_beyond(&self, ended: u64) {
        let mut queue = self.0.queue.lock();
        self.0.progress.wait_while(&mut queue, |queue| queue.ended <= ended && queue.ended < queue.queued);
    }
}

impl<J: Job> Drop for Backlog<J> {
    fn drop(&mut self) {
        self.wait_beyond(u64::MAX);
    }
}

impl<J: Job> fmt::Debug for Backlog<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queue = self.0.queue.lock();
        f.debug_struct("Backlog").field("queued", &queue.queued).field("ended", &queue.ended).finish()
    }
}

impl<J> Queue<J> {
    fn push(&mut self, job: J) {
        self.waiting.push_back(job);
        self.queued += 1;
    }
}

impl<J: Job> Shared<J> {
    /// What a thread does, until there is nothing left.
    fn work(&self) {
        let mut queue = self.queue.lock();
        while let Some(job) = queue.waiting.pop_front() {
            self.carry_out(&mut queue, job);
        }
        queue.threads -= 1;
    }

    /// Does what was taken out of the queue, which is free for others meanwhile.
    fn carry_out(&self, queue: &mut MutexGuard<'_, Queue<J>>, job: J) {
        let name = job.name().to_owned();
        queue.under_way.push(name.clone());
        // A panic is told, and ends no more than this: others wait for the end of it, and for this thread.
        let _ = MutexGuard::unlocked(queue, || catch_unwind(AssertUnwindSafe(|| job.run())));
        if let Some(at) = queue.under_way.iter().position(|other| *other == name) {
            queue.under_way.swap_remove(at);
        }
        queue.ended += 1;
        self.progress.notify_all();
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;

    struct Slip;

    impl Job for Slip {
        fn name(&self) -> &str {
            "slip"
        }

        fn run(self) {
            panic!("a test panics in the backlog");
        }
    }

    #[test]
    fn a_panic_keeps_nobody_waiting() {
        let backlog = Backlog::new("clerk", 1);
        (0..3).for_each(|_| backlog.push(Slip));
        assert!(backlog.run(Slip, Duration::from_secs(20)));
        backlog.wait_beyond(u64::MAX);
        assert_eq!((backlog.queued(), backlog.ended()), (4, 4));
    }
}

/// `cargo xtask loom`. That all threads have ended in the end, loom sees to itself.
#[cfg(all(test, feature = "loom"))]
mod orders {
    use loom::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::sync::{every_order, refuse};

    /// What of one name is over.
    type Over = Arc<AtomicUsize>;

    struct Chore(&'static str, Over);

    impl Job for Chore {
        fn name(&self) -> &str {
            self.0
        }

        fn run(self) {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn backlog(most: usize) -> (Arc<Backlog<Chore>>, Over, Over) {
        (Arc::new(Backlog::new("clerk", most)), Over::default(), Over::default())
    }

    fn is(over: &Over) -> usize {
        over.load(Ordering::SeqCst)
    }

    #[test]
    fn what_is_settled_is_over_whoever_does_it() {
        for most in [1, 2] {
            every_order(move || {
                let (backlog, a, b) = backlog(most);
                backlog.push(Chore("b", b));
                backlog.push(Chore("a", a.clone()));
                assert!(backlog.settle("a", Duration::ZERO));
                assert_eq!(is(&a), 1);
            });
        }
    }

    #[test]
    fn two_that_settle_the_same_both_wait_for_it() {
        every_order(|| {
            let (backlog, a, _) = backlog(1);
            backlog.push(Chore("a", a.clone()));
            let (same, over) = (backlog.clone(), a.clone());
            let other = loom::thread::spawn(move || {
                assert!(same.settle("a", Duration::ZERO));
                assert_eq!(is(&over), 1);
            });
            assert!(backlog.settle("a", Duration::ZERO));
            assert_eq!(is(&a), 1);
            other.join().expect("as much");
        });
    }

    #[test]
    fn two_that_do_the_same_at_once_both_see_it_over() {
        every_order(|| {
            let (backlog, a, _) = backlog(1);
            let (same, over) = (backlog.clone(), a.clone());
            let other = loom::thread::spawn(move || {
                assert!(same.run(Chore("a", over.clone()), Duration::ZERO));
                assert!(is(&over) >= 1);
            });
            assert!(backlog.run(Chore("a", a.clone()), Duration::ZERO));
            assert!(is(&a) >= 1);
            other.join().expect("as much");
            assert_eq!((is(&a), backlog.ended()), (2, 2));
        });
    }

    #[test]
    fn who_waits_for_the_next_end_or_for_all_is_woken() {
        every_order(|| {
            let (backlog, a, b) = backlog(2);
            backlog.push(Chore("a", a.clone()));
            backlog.push(Chore("b", b.clone()));
            let seen = backlog.ended();
            backlog.wait_beyond(seen);
            assert!(is(&a) + is(&b) > seen as usize || seen == 2);
            drop(backlog);
            assert_eq!((is(&a), is(&b)), (1, 1));
        });
    }

    #[test]
    fn what_comes_as_the_last_thread_ends_is_done() {
        for most in [1, 2] {
            every_order(move || {
                let (backlog, a, b) = backlog(most);
                backlog.push(Chore("a", a.clone()));
                backlog.push(Chore("b", b.clone()));
                drop(backlog);
                assert_eq!((is(&a), is(&b)), (1, 1));
            });
        }
    }

    #[test]
    fn what_no_thread_can_be_started_for_is_done_by_who_asks() {
        every_order(|| {
            let (backlog, a, b) = backlog(1);
            refuse(1);
            backlog.push(Chore("a", a.clone()));
            assert_eq!(is(&a), 1);
            backlog.push(Chore("b", b.clone()));
            drop(backlog);
            assert_eq!(is(&b), 1);
        });
    }

    #[test]
    fn what_no_second_thread_can_be_started_for_is_done() {
        every_order(|| {
            let (backlog, a, b) = backlog(2);
            backlog.push(Chore("a", a.clone()));
            refuse(1);
            backlog.push(Chore("b", b.clone()));
            drop(backlog);
            assert_eq!((is(&a), is(&b)), (1, 1));
        });
    }
}
