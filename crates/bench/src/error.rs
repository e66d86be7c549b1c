//! What can go wrong while measuring.

use std::io;

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The lab could not be built, something in it died, or a signal came.
    #[error(transparent)]
    Lab(#[from] nsm_lab::Error),
    /// The kernel part refused.
    #[error("cannot {what}")]
    Kernel {
        /// What it was for.
        what: String,
        /// The reason.
        #[source]
        source: nsm_kernel::Error,
    },
    /// A system call that has no better place.
    #[error("cannot {what}")]
    System {
        /// The operation.
        what: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The program in the client's pod did not do what it should.
    #[error("the measuring client {0}")]
    Client(String),
    /// Wires that did not come up: there is nothing to measure on them.
    #[error("{failed} of {wanted} wires did not come up; the first error: {first}")]
    Wires {
        /// How many.
        failed: usize,
        /// Of how many.
        wanted: usize,
        /// Why.
        first: String,
    },
}

impl Error {
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }

    pub(crate) fn kernel(what: impl Into<String>) -> impl FnOnce(nsm_kernel::Error) -> Self {
        let what = what.into();
        move |source| Self::Kernel { what, source }
    }
}
