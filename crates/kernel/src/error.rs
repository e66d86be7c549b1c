//! What can go wrong, in words for the person who operates the node.

use std::fmt;
use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::netns::NsId;
use crate::plan::Invalid;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something was not done to the kernel or to the plan store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The plan itself is not one.
    #[error("the plan is not valid")]
    Plan(#[from] Invalid),
    /// A namespace could not be opened, entered, made or removed.
    #[error("cannot {what}; needs CAP_SYS_ADMIN over that namespace")]
    Namespace {
        /// What was tried, with the namespace.
        what: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The descriptor or path is something else than a network namespace.
    #[error("{0} is not a network namespace")]
    NotANamespace(String),
    /// No process, mount or caller holds that namespace any more.
    #[error("network namespace {0} is gone, or hidden: nothing under /proc and no mount refers to it")]
    NamespaceGone(NsId),
    /// The netlink socket itself failed.
    #[error("netlink socket: cannot {what}")]
    Socket {
        /// The operation on the socket.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel's answer could not be understood or did not come.
    #[error("netlink: {0}")]
    Protocol(String),
    /// The kernel refused a request.
    #[error("the kernel refused to {what}")]
    Refused {
        /// The request in words.
        what: String,
        /// The kernel's reason.
        #[source]
        source: Refusal,
    },
    /// The wanted interface name is held by a link that is not ours.
    #[error(
        "interface name {name} is taken in namespace {ns} by {by}; choose another name or remove that link"
    )]
    NameTaken {
        /// The wanted name.
        name: String,
        /// Where.
        ns: NsId,
        /// Alias, ownership mark or name of the holder.
        by: String,
    },
    /// Another VXLAN device of the node has the same VNI and port; the peers have to agree on another VNI.
    #[error("VNI {vni} on UDP port {port} is in use on this node; the other side has to accept another VNI")]
    VniTaken {
        /// The VXLAN network identifier.
        vni: u32,
        /// Our UDP port.
        port: u16,
    },
    /// Bridged packets cannot be filtered here.
    #[error(
        "this kernel does not show bridged packets to its packet filter: load the module (modprobe br_netfilter)"
    )]
    NoBridgeFilter,
    /// A kernel setting could not be read or written.
    #[error("cannot access kernel setting {key}; is /proc/sys writable here?")]
    Sysctl {
        /// Dotted or slashed key below `/proc/sys`.
        key: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The plan store failed.
    #[error("plan store: cannot {what} {path}; is the state directory writable and not full?")]
    Store {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Several things failed; as much as possible was cleaned up.
    #[error("{} failures while cleaning up: {}", .0.len(), list(.0))]
    Several(Vec<Error>),
}

/// A negative answer of netlink: the error number and, where the kernel gives one, its text (extended ack).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The error number.
    pub errno: Errno,
    /// The kernel's own words.
    pub text: Option<String>,
}

impl Error {
    /// The error number of the kernel behind this error, where there is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { source, .. } => Some(source.errno),
            Self::Namespace { source, .. }
            | Self::Socket { source, .. }
            | Self::Sysctl { source, .. }
            | Self::Store { source, .. } => Errno::from_io_error(source),
            _ => None,
        }
    }

    /// One error of many: the error itself if there is one only, nothing if there is none.
    pub(crate) fn join(mut errors: Vec<Self>) -> Result<()> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.text {
            Some(text) => write!(f, "{text} ({})", io::Error::from(self.errno)),
            None => io::Error::from(self.errno).fmt(f),
        }
    }
}

impl std::error::Error for Refusal {}

/// The errors of a list with their causes, which nothing else would print.
fn list(errors: &[Error]) -> String {
    let mut text = Vec::new();
    for error in errors {
        let mut line = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(c) = cause {
            line = format!("{line}: {c}");
            cause = c.source();
        }
        text.push(line);
    }
    text.join("; ")
}
