//! What can go wrong, in words for the person at the keyboard.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a lab does not stand, or could not be looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A file or directory could not be made, written or removed.
    #[error("cannot {what} {}; is there room, and is it writable?", path.display())]
    Files {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The scenario file says something that cannot be.
    #[error("{}:{line}: {message}", path.display())]
    Scenario {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1; 0 if unknown.
        line: u64,
        /// Field and expectation.
        message: String,
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
    /// The kernel part refused.
    #[error("cannot {what}")]
    Kernel {
        /// What it was for.
        what: String,
        /// The reason.
        #[source]
        source: nsm_kernel::Error,
    },
    /// A second lab of the same name.
    #[error("lab {lab} already runs (process {pid}); `nsm lab down {lab}` ends it")]
    Running {
        /// Its name.
        lab: String,
        /// Its holder; 0 while it only just starts.
        pid: u32,
    },
    /// Something was asked for that is not there, or not uniquely.
    #[error("{0}")]
    NotThere(String),
    /// A pod or namespace that the lab does not have.
    #[error("lab {lab} has no {name}; it has {}", known.join(", "))]
    NoSuchPod {
        /// The lab.
        lab: String,
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// A process ended although it should run.
    #[error("{process} {how}; the end of its log:\n{log}")]
    Died {
        /// Its name in the plan.
        process: String,
        /// `ended with exit status 1 after 12 ms`.
        how: String,
        /// Last lines of what it wrote.
        log: String,
    },
    /// A process did not become ready in time.
    #[error("{process} is not ready after {waited:?}{status}; the end of its log:\n{log}")]
    NotReady {
        /// Its name in the plan.
        process: String,
        /// The bound.
        waited: Duration,
        /// What it said last about itself.
        status: String,
        /// Last lines of what it wrote.
        log: String,
    },
    /// A signal, or the end of the program that asked for the lab.
    #[error("interrupted: {0}")]
    Interrupted(String),
    /// Neither root nor user namespaces.
    #[error(
        "a lab needs CAP_SYS_ADMIN and CAP_NET_ADMIN, and this kernel does not give them to user namespaces either; \
         run it as root, or allow them (sysctl kernel.unprivileged_userns_clone=1, \
         kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces)"
    )]
    NoPrivileges(#[source] io::Error),
    /// The holder process broke the conversation.
    #[error("the lab's holder process ended without a word{0}")]
    HolderGone(String),
    /// What the holder reported as its failure, causes included.
    #[error("{0}")]
    Reported(String),
}

impl Error {
    /// The error with all its causes, on one line each.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }

    pub(crate) fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { what: what.into(), source: source.into() }
    }

    pub(crate) fn files(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Files { what, path, source }
    }

    pub(crate) fn kernel(what: impl Into<String>) -> impl FnOnce(nsm_kernel::Error) -> Self {
        let what = what.into();
        move |source| Self::Kernel { what, source }
    }
}
