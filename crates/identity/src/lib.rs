//! Who is who: SPIFFE identities, the built-in CA, tokens, policies.
//!
//! * [`Source`] follows the SPIFFE Workload API at `SPIFFE_ENDPOINT_SOCKET`: SPIRE, or our own [`ca`].
//! * [`Identity`] is one snapshot of it, with TLS both ways.
//! * [`token`] makes the JWTs that name who asks whom, [`policy`] checks them.
//! * [`clock`] says what time it is, for all of them.
//! * [`unix`] says who is at the other end of a Unix socket.
//!
//! There is no insecure mode: everything that speaks, speaks mTLS with an [`Identity`].

#![forbid(clippy::unwrap_used)]
// The clock is `clock::now()`.
#![warn(clippy::disallowed_methods)]

pub mod ca;
pub mod chains;
pub mod clock;
mod id;
pub mod policy;
mod readable;
mod seldom;
mod source;
mod svid;
pub mod token;
pub mod unix;
mod watch_file;

use std::{io, path::PathBuf, sync::Arc};

pub use id::{InvalidId, SpiffeId, TrustDomain};
pub use policy::Denial;
pub use seldom::Seldom;
#[doc(hidden)]
pub use source::identity as identity_of;
pub use source::{ENDPOINT_VARIABLE, Source};
#[doc(hidden)]
pub use svid::split_certificates;
pub use svid::{Bundles, CertificateError, Identity, Leaf, Svid};
pub use token::{Claims, Token};
pub use unix::{FileId, UnixPeer, UnixSocket};
pub use watch_file::FileWatch;

/// The Workload API on the wire.
#[doc(hidden)]
#[allow(missing_docs, missing_debug_implementations, unreachable_pub, clippy::all)]
pub mod pb {
    tonic::include_proto!("_");
}

/// What goes wrong with identities.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The Workload API sent an SVID without certificates.
    #[error("the X.509-SVID has no certificate")]
    EmptyChain,
    /// A certificate that cannot stand for anybody.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// Tokens are ES256.
    #[error(
        "the key of {0} is not ECDSA P-256, and tokens cannot be signed with another; configure the issuer for ec-p256 keys"
    )]
    NotP256(SpiffeId),
    /// Key and certificate are of two SVIDs.
    #[error("key and certificate of {0} do not belong together; the issuer mixed them up")]
    KeyMismatch(SpiffeId),
    /// A root that is no certificate.
    #[error("a root of trust domain {domain} cannot be used")]
    Root {
        /// Whose root.
        domain: TrustDomain,
        /// What the verifier says.
        source: webpki::Error,
    },
    /// TLS refuses key or certificate.
    #[error("the X.509-SVID of {id} cannot be used for TLS")]
    Tls {
        /// Whose SVID.
        id: SpiffeId,
        /// What TLS says.
        source: rustls::Error,
    },
    /// Nothing can be signed with an expired SVID.
    #[error("the X.509-SVID of {0} has expired and was not renewed; is the Workload API served?")]
    SvidExpired(SpiffeId),
    /// The key does not sign.
    #[error("no token can be signed with the key of {0}")]
    Sign(SpiffeId),
    /// The address of the Workload API.
    #[error(
        "{value:?} is no address of a Workload API ({reason}); set SPIFFE_ENDPOINT_SOCKET=unix:///path/to/socket"
    )]
    Endpoint {
        /// What was given.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The Workload API gave no identity.
    #[error("the Workload API at {path} gives this process no identity: {reason}")]
    WorkloadApi {
        /// Its socket.
        path: String,
        /// What it says.
        reason: String,
    },
    /// A second daemon.
    #[error(
        "somebody listens at {0} already: a second daemon on the same socket? Stop it, or configure another path"
    )]
    SocketInUse(PathBuf),
    /// A socket that cannot be bound.
    #[error("cannot {what} socket {path}")]
    Socket {
        /// The socket file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The CA's configuration or state.
    #[error(transparent)]
    Ca(#[from] ca::CaError),
}

/// An error with its causes in one line, for logs and for the status of a call, which is all that its caller sees.
///
/// rustls shows the reason of a custom verifier in `Debug` form only; here it is the verifier's own text.
pub fn explain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(mut error) = next {
        // An `io::Error` shows what it was made of, and names only that one's source as its own.
        while let Some(inner) = made_of(error) {
            error = inner;
        }
        let this = match error.downcast_ref() {
            Some(rustls::Error::InvalidCertificate(rustls::CertificateError::Other(verifier))) => {
                verifier.0.to_string()
            }
            _ => error.to_string(),
        };
        // Many wrappers repeat what they wrap.
        if text.is_empty() {
            text = this;
        } else if !text.ends_with(&this) {
            text.push_str(": ");
            text.push_str(&this);
        }
        next = error.source();
    }
    text
}

fn made_of<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a (dyn std::error::Error + 'static)> {
    let shared = error.downcast_ref::<Arc<io::Error>>().map(|shared| &**shared);
    let inner = shared.or_else(|| error.downcast_ref())?.get_ref()?;
    Some(inner)
}
