//! What threads share data and wait with. `cargo xtask loom` takes loom's in its place, which tries every order of what
//! they do: of the code that is here, not of a model of it.

#[cfg(all(test, feature = "loom"))]
mod tried;

#[cfg(not(all(test, feature = "loom")))]
mod real {
    use std::io;
    use std::thread;

    pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};

    /// Starts a thread that nobody joins.
    pub(crate) fn spawn(name: &str, life: impl FnOnce() + Send + 'static) -> io::Result<()> {
        thread::Builder::new().name(name.into()).spawn(life).map(drop)
    }
}

#[cfg(not(all(test, feature = "loom")))]
pub(crate) use real::*;
#[cfg(all(test, feature = "loom"))]
pub(crate) use tried::*;
