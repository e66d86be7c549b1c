//! Loom's primitives under the names and with the forms of `parking_lot`, and what tests need with them.

use std::cell::Cell;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use loom::sync::atomic::{AtomicBool, Ordering};

/// How often a thread is interrupted in one order, at most. Bugs are known to need few interruptions.
const INTERRUPTIONS: usize = 4;

/// Runs a test in every order of what its threads do; fails also where they wait for each other for ever.
#[allow(clippy::print_stdout)] // a test's
pub(crate) fn every_order(test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(INTERRUPTIONS);
    let orders = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&orders);
    builder.check(move || {
        REFUSED.set(0);
        count.fetch_add(1, Ordering::Relaxed);
        test();
    });
    println!("{} orders", orders.load(Ordering::Relaxed));
}

thread_local! {
    /// Of the thread that all threads of a model run on.
    static REFUSED: Cell<u32> = const { Cell::new(0) };
}

/// The next threads cannot be started.
pub(crate) fn refuse(threads: u32) {
    REFUSED.set(threads);
}

pub(crate) fn spawn(name: &str, life: impl FnOnce() + Send + 'static) -> io::Result<()> {
    match REFUSED.get() {
        0 => loom::thread::Builder::new().name(name.into()).spawn(life).map(drop),
        left => {
            REFUSED.set(left - 1);
            Err(io::ErrorKind::OutOfMemory.into())
        }
    }
}

/// Nothing else happens, and no time passes.
#[derive(Debug)]
pub(crate) struct Bell(Mutex<bool>, Condvar);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Mutex::new(false), Condvar::new()))
    }

    pub(crate) fn ring(&self) {
        *self.0.lock() = true;
        self.1.notify_all();
    }

    pub(crate) fn quiet(&self) {
        *self.0.lock() = false;
    }

    /// It rings on.
    pub(crate) fn wait(&self, _: &[BorrowedFd<'_>], _: Option<Duration>) -> io::Result<()> {
        self.1.wait_while(&mut self.0.lock(), |rings| !*rings);
        Ok(())
    }
}

#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

/// Empty only while it is unlocked or waited with.
pub(crate) struct MutexGuard<'a, T>(&'a Mutex<T>, Option<loom::sync::MutexGuard<'a, T>>);

#[derive(Debug)]
pub(crate) struct Condvar {
    inner: loom::sync::Condvar,
    /// Time has passed for whoever waited.
    late: AtomicBool,
}

pub(crate) struct Waited(bool);

impl Waited {
    pub(crate) fn timed_out(&self) -> bool {
        self.0
    }
}

impl<T> Mutex<T> {
    pub(crate) fn new(data: T) -> Self {
        Self(loom::sync::Mutex::new(data))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(self, self.0.lock().ok())
    }
}

impl<T> MutexGuard<'_, T> {
    pub(crate) fn unlocked<U>(guard: &mut Self, work: impl FnOnce() -> U) -> U {
        guard.1 = None;
        let done = work();
        guard.1 = guard.0.0.lock().ok();
        done
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.1.as_ref().expect("locked")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.1.as_mut().expect("locked")
    }
}

impl Condvar {
    pub(crate) fn new() -> Self {
        Self { inner: loom::sync::Condvar::new(), late: AtomicBool::new(false) }
    }

    pub(crate) fn notify_one(&self) {
        self.inner.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.inner.notify_all();
    }

    /// Whoever waits for no more than some time has waited that long.
    pub(crate) fn time_passes(&self) {
        self.late.store(true, Ordering::SeqCst);
        self.notify_all();
    }

    pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _: Duration) -> Waited {
        guard.1 = guard.1.take().and_then(|locked| self.inner.wait(locked).ok());
        Waited(self.late.load(Ordering::SeqCst))
    }

    pub(crate) fn wait_while<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        mut condition: impl FnMut(&mut T) -> bool,
    ) {
        while condition(guard) {
            guard.1 = guard.1.take().and_then(|locked| self.inner.wait(locked).ok());
        }
    }

    pub(crate) fn wait_while_for<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        mut condition: impl FnMut(&mut T) -> bool,
        patience: Duration,
    ) -> Waited {
        while condition(guard) {
            if self.wait_for(guard, patience).timed_out() {
                return Waited(condition(guard));
            }
        }
        Waited(false)
    }
}
