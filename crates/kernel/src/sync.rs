//! What threads share data and wait with. `cargo xtask loom` takes loom's in its place, which tries every order of what
//! they do: of the code that is here, not of a model of it.

#[cfg(all(test, feature = "loom"))]
mod tried;

#[cfg(not(all(test, feature = "loom")))]
mod real {
    use std::io;
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::thread;
    use std::time::Duration;

    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
    use rustix::io::Errno;

    pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};

    /// Starts a thread that nobody joins.
    pub(crate) fn spawn(name: &str, life: impl FnOnce() + Send + 'static) -> io::Result<()> {
        thread::Builder::new().name(name.into()).spawn(life).map(drop)
    }

    /// Wakes a thread that waits for this and for other things.
    #[derive(Debug)]
    pub(crate) struct Bell(OwnedFd);

    impl Bell {
        pub(crate) fn new() -> io::Result<Self> {
            Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
        }

        pub(crate) fn ring(&self) {
            // It can only fail by being full, and then it rings already.
            let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
        }

        pub(crate) fn quiet(&self) {
            // It fails where it does not ring.
            let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
        }

        /// Sleeps until it rings, there is something to be read from one of the `others`, or `patience` is over. An
        /// interruption counts as one of these.
        pub(crate) fn wait(&self, others: &[BorrowedFd<'_>], patience: Option<Duration>) -> io::Result<()> {
            let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
            let all = others.iter().copied().chain([self.0.as_fd()]);
            let mut wait: Vec<_> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            match poll(&mut wait, patience.as_ref()) {
                Ok(_) | Err(Errno::INTR) => Ok(()),
                Err(errno) => Err(errno.into()),
            }
        }
    }
}

#[cfg(not(all(test, feature = "loom")))]
pub(crate) use real::*;
#[cfg(all(test, feature = "loom"))]
pub(crate) use tried::*;
