//! The directory of services and endpoints: who serves what, where.
//!
//! ```text
//!  endpoints, forwarders          managers                         registry
//!  Client --------- unix ------> ManagerRegistry ------ tcp -----> Registry
//!   keeps what it registers       local sockets by descriptor,      Store, expiry
//!   registered, finds others      the node's labels and URL         preloaded services
//! ```
//!
//! Both servers are the same front (path, policies, ownership, one change at a time for each name)
//! before different directories; what a directory keeps is kept in memory or by another [`Keeper`]. The pure parts — [`store`], [`expiry`], [`path`] — know no RPC.
//! Facts: spec/registry.md sections 1 to 3; its defects (section 11) are not reproduced.

// The clock is `nsm_identity::clock::now()`.
#![warn(clippy::disallowed_methods)]

mod cache;
mod client;
pub mod expiry;
mod following;
mod keeper;
mod lanes;
pub mod limits;
mod lookup;
mod manager;
mod memory;
pub mod path;
mod rpc;
mod server;
pub mod store;

use nsm_api::limits::Malformed;
use nsm_identity::Denial;
use nsm_transport::{DialError, FdError, Refusal, UrlError};
use tonic::{Code, Status};

pub use client::{Client, ClientConfig, Endpoint, EndpointEvent, Listed, Registration, State};
pub use following::Following;
pub use keeper::{Keeper, Keepers};
pub use lookup::LookUp;
pub use manager::{Cluster, Local, ManagerConfig, ManagerRegistry, node_labels};
pub use server::{Config, Directories, Registry, SERVICES, WatchLimit};

/// Why a registration or a look-up fails.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field beyond its bound.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// Nothing can be kept without a name.
    #[error("the {kind} has no name; names are chosen by whoever registers")]
    NoName {
        /// What was to be registered.
        kind: &'static str,
    },
    /// An endpoint that nobody could dial.
    #[error("endpoint {name:?} has no usable url; expected tcp://host:port, or a Unix socket of this node")]
    NoUrl {
        /// The endpoint.
        name: String,
    },
    /// A name of another domain.
    #[error(
        "{name:?} is a name of another domain (it has an @); interdomain look-ups are not served here yet"
    )]
    Interdomain {
        /// The name.
        name: String,
    },
    /// A registration path that contradicts itself.
    #[error(transparent)]
    Path(#[from] path::PathError),
    /// A policy says no.
    #[error("no sufficient privileges: {0}")]
    Denied(Denial),
    /// A workload that would be dialed with everybody's requests.
    #[error(
        "{id} may not serve {service:?}, the forwarders of this node: it is {found}; expected was a process in the \
         manager's network namespace, {own}; run it there, or list its SPIFFE ID in NSM_FORWARDER_IDS of the manager"
    )]
    NotAForwarder {
        /// The service of forwarders.
        service: String,
        /// Who registered.
        id: String,
        /// What it is.
        found: String,
        /// The manager's network namespace.
        own: String,
    },
    /// The registrant's clock or tokens leave no time.
    #[error("{name:?} would already have expired when it is registered; compare the clocks of the nodes")]
    AlreadyOver {
        /// The endpoint.
        name: String,
    },
    /// Earlier changes of the same name took too long.
    #[error("the deadline passed while earlier changes of {name:?} were carried out")]
    Deadline {
        /// The name.
        name: String,
    },
    /// A bound on open watches.
    #[error("{id} has {limit} watches open, the most that one identity may have")]
    TooManyWatches {
        /// Who.
        id: String,
        /// The bound.
        limit: usize,
    },
    /// The watcher did not read.
    #[error("the watch was closed because its reader fell behind; watch again")]
    TooSlow,
    /// A socket was named that did not come along.
    #[error(transparent)]
    Descriptor(#[from] FdError),
    /// A socket was named over a connection that carries no descriptors.
    #[error(
        "{url} names a file of the sender's node, which only a Unix socket can carry; register over the manager's \
         Unix socket, or with a tcp:// url"
    )]
    NotLocal {
        /// The URL as given.
        url: String,
    },
    /// A URL that nobody can dial.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// The socket file of an endpoint cannot be opened.
    #[error("cannot open the endpoint's socket {path}; does it listen before it registers?")]
    Socket {
        /// The socket file.
        path: std::path::PathBuf,
        /// The system's answer.
        source: std::sync::Arc<std::io::Error>,
    },
    /// The next registry is not there.
    #[error("the registry cannot be reached")]
    Unreachable(#[from] DialError),
    /// The next registry said no.
    #[error("{} (from the registry, {:?})", .0.message(), .0.code())]
    Refused(Box<Status>),
    /// No token can be signed.
    #[error("no token can be made for {peer}")]
    NoToken {
        /// For whom.
        peer: String,
        /// Why.
        source: std::sync::Arc<nsm_identity::Error>,
    },
    /// A listener.
    #[error(transparent)]
    Listen(std::sync::Arc<nsm_transport::Error>),
    /// Others changed what a name stands for, again and again.
    #[error("{name:?} is changed by others faster than it can be changed here; try again")]
    Changed {
        /// The name.
        name: String,
    },
    /// Where registrations are kept cannot be changed now.
    #[error("the registration cannot be kept")]
    NotKept(#[source] std::sync::Arc<dyn std::error::Error + Send + Sync>),
    /// A name under which nothing can be kept.
    #[error("{name:?} cannot be registered: {why}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it, and what was expected.
        why: String,
    },
    /// A defect of this program.
    #[error("the handler of this call panicked; see the server's log")]
    Panicked,
}

impl Error {
    /// May the same call succeed later without anybody changing anything? A refusal is not tried
    /// again by those who wait for a first registration.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable(error) => error.is_transient(),
            Self::Refused(status) => match status.code() {
                Code::InvalidArgument | Code::Unimplemented | Code::FailedPrecondition => false,
                // A clock that is wrong may be right again.
                Code::PermissionDenied => Refusal::of(status) == Some(Denial::EXPIRED),
                _ => true,
            },
            Self::Deadline { .. }
            | Self::Descriptor(_)
            | Self::TooSlow
            | Self::Changed { .. }
            | Self::NotKept(_)
            | Self::NoToken { .. }
            | Self::Panicked => true,
            Self::Denied(denial) => matches!(denial, Denial::Expired { .. }),
            _ => false,
        }
    }
}

impl From<Denial> for Error {
    fn from(denial: Denial) -> Self {
        Self::Denied(denial)
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

impl From<nsm_transport::Error> for Error {
    fn from(error: nsm_transport::Error) -> Self {
        Self::Listen(std::sync::Arc::new(error))
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Refused(status) => return (**status).clone(),
            Error::Unreachable(dial) => return dial.clone().into(),
            Error::Denied(denial) => denial.code(),
            Error::NotAForwarder { .. } => Code::PermissionDenied,
            Error::Malformed(_)
            | Error::NoName { .. }
            | Error::NoUrl { .. }
            | Error::BadName { .. }
            | Error::Path(_)
            | Error::Url(_) => Code::InvalidArgument,
            Error::Interdomain { .. } => Code::Unimplemented,
            Error::AlreadyOver { .. } | Error::NotLocal { .. } => Code::FailedPrecondition,
            Error::Deadline { .. } | Error::Descriptor(_) => Code::DeadlineExceeded,
            Error::TooManyWatches { .. } => Code::ResourceExhausted,
            Error::TooSlow | Error::Changed { .. } => Code::Aborted,
            Error::NoToken { .. } | Error::NotKept(_) => Code::Unavailable,
            Error::Socket { .. } | Error::Listen(_) | Error::Panicked => Code::Internal,
        };
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        let word = match &error {
            Error::Denied(denial) => Some(denial.check()),
            Error::Malformed(_)
            | Error::NoName { .. }
            | Error::NoUrl { .. }
            | Error::BadName { .. }
            | Error::Path(_)
            | Error::Url(_) => Some("malformed"),
            Error::TooManyWatches { .. } => Some("watches"),
            Error::TooSlow => Some("slow_reader"),
            _ => None,
        };
        let status = Status::new(code, text);
        word.map_or(status.clone(), |word| Refusal(word).mark(status))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// As whoever asked sees it: a status with its metadata.
    fn told(denial: Denial) -> Error {
        Status::from(Error::Denied(denial)).into()
    }

    #[test]
    fn what_has_expired_by_a_clock_may_be_valid_again_and_other_refusals_are_final() {
        let ago = Duration::from_secs(2839);
        let expired = told(Denial::Expired { segment: 2, subject: "registry".into(), ago });
        assert!(matches!(&expired, Error::Refused(status) if status.code() == Code::PermissionDenied));
        assert!(expired.is_transient());
        assert!(!told(Denial::Missing { segment: 1, count: 1 }).is_transient());
    }
}
