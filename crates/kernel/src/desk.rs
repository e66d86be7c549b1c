//! Orders, and the thread that carries them out: it is woken by each, and whoever gave one can wait until it is done.

use std::time::Duration;

use crate::sync::{Bell, Condvar, Mutex, MutexGuard};

/// What is wanted, and how far it is.
#[derive(Debug)]
pub(crate) struct Desk<T> {
    slips: Mutex<Slips<T>>,
    changed: Condvar,
    /// Wakes the thread.
    bell: Bell,
}

#[derive(Debug)]
struct Slips<T> {
    on_it: T,
    /// What the thread has brought about so far; equal to `orders` when it has nothing to do.
    done: u64,
    /// How often something was asked for.
    orders: u64,
    stop: bool,
}

/// The orders that there are when their thread begins to carry them out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Errand {
    orders: u64,
    /// The last one: the thread ends after it.
    pub stop: bool,
}

// === impl Desk: for everybody ===

impl<T> Desk<T> {
    pub(crate) fn new(on_it: T, bell: Bell) -> Self {
        let slips = Slips { on_it, done: 0, orders: 0, stop: false };
        Self { slips: Mutex::new(slips), changed: Condvar::new(), bell }
    }

    /// Changes what is wanted; `change` says whether there is something to do for it.
    pub(crate) fn order(&self, change: impl FnOnce(&mut T) -> bool) {
        let mut slips = self.slips.lock();
        if change(&mut slips.on_it) {
            self.ring(&mut slips);
        }
    }

    /// The thread does what is ordered, and ends.
    pub(crate) fn stop(&self) {
        let mut slips = self.slips.lock();
        slips.stop = true;
        self.ring(&mut slips);
    }

    fn ring(&self, slips: &mut MutexGuard<'_, Slips<T>>) {
        slips.orders += 1;
        self.bell.ring();
    }

    /// Looks at what lies there, or notes how far it is.
    pub(crate) fn look<U>(&self, look: impl FnOnce(&mut T) -> U) -> U {
        look(&mut self.slips.lock().on_it)
    }

    /// Waits until everything that was ordered is carried out, and it is like this. Whether it came to that.
    pub(crate) fn wait(&self, like: impl Fn(&T) -> bool, patience: Duration) -> bool {
        let mut slips = self.slips.lock();
        let open = |slips: &mut Slips<T>| slips.done != slips.orders || !like(&slips.on_it);
        !self.changed.wait_while_for(&mut slips, open, patience).timed_out()
    }
}

// === impl Desk: for its thread ===

impl<T> Desk<T> {
    /// What wakes it.
    pub(crate) fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Begins with all orders that there are. What is ordered from here on rings again, so nothing is missed between looking
    /// and sleeping.
    pub(crate) fn begin(&self) -> Errand {
        self.bell.quiet();
        let slips = self.slips.lock();
        Errand { orders: slips.orders, stop: slips.stop }
    }

    /// They are carried out.
    pub(crate) fn done(&self, errand: Errand) {
        self.slips.lock().done = errand.orders;
        self.changed.notify_all();
    }
}

/// `cargo xtask loom`.
#[cfg(all(test, feature = "loom"))]
mod orders {
    use std::sync::Arc;

    use super::*;
    use crate::sync::every_order;

    /// What is wanted, and what there is.
    type Number = (u32, u32);

    fn works(desk: &Desk<Number>) {
        loop {
            let errand = desk.begin();
            let wanted = desk.look(|number| number.0);
            desk.look(|number| number.1 = wanted);
            desk.done(errand);
            if errand.stop {
                return;
            }
            desk.bell().wait(&[], None).expect("it rings");
        }
    }

    fn desk() -> (Arc<Desk<Number>>, loom::thread::JoinHandle<()>) {
        let desk = Arc::new(Desk::new((0, 0), Bell::new().expect("a bell")));
        let at = Arc::clone(&desk);
        (desk, loom::thread::spawn(move || works(&at)))
    }

    fn one_more(desk: &Desk<Number>) {
        desk.order(|at| {
            at.0 += 1;
            true
        });
    }

    fn wants(desk: &Desk<Number>, number: u32) {
        desk.order(|at| std::mem::replace(&mut at.0, number) != number);
    }

    #[test]
    fn whoever_waits_for_an_order_sees_it_carried_out() {
        every_order(|| {
            let (desk, worker) = desk();
            for number in [1, 2] {
                wants(&desk, number);
                assert!(desk.wait(|at| at.1 == number, Duration::MAX));
            }
            desk.stop();
            worker.join().expect("it ends");
        });
    }

    #[test]
    fn of_two_who_order_at_once_nobody_is_missed() {
        every_order(|| {
            let (desk, worker) = desk();
            let other = Arc::clone(&desk);
            let other = loom::thread::spawn(move || one_more(&other));
            one_more(&desk);
            other.join().expect("ordered");
            assert!(desk.wait(|at| at.1 == 2, Duration::MAX));
            desk.stop();
            worker.join().expect("it ends");
        });
    }

    #[test]
    fn what_is_ordered_before_the_end_is_carried_out() {
        every_order(|| {
            let (desk, worker) = desk();
            wants(&desk, 1);
            desk.stop();
            worker.join().expect("it ends");
            assert_eq!(desk.look(|at| at.1), 1);
        });
    }
}
