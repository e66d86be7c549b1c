//! gRPC over Unix sockets with descriptor passing below TLS, and over TCP.
//!
//! ```text
//!   UnixStream -- FdStream --.                 .-- hyper HTTP/2 -- tonic routes       (Server)
//!                             >-- rustls mTLS -<
//!   TcpStream ---------------'                 '-- hyper HTTP/2 -- Connection         (Pool)
//! ```
//!
//! Each connection knows its [`Peer`]: who it is, its process, its descriptors, and the identity that *we* presented
//! on it, with which tokens for this peer are signed. HTTP/2 keepalive pings are never sent: grpc-go punishes them.
//!
//! ```
//! # use std::time::{Duration, SystemTime};
//! # use nsm_identity::{Source, ca::Authority};
//! use nsm_transport::{DialUrl, ListenUrl, Pool, PoolConfig, Server};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let now = SystemTime::now();
//! # let root = Authority::new("example.org".parse()?, now)?;
//! # let source = |id: &str| -> Result<Source, Box<dyn std::error::Error>> {
//! #     Ok(Source::fixed(root.identity(&id.parse()?, Duration::from_secs(60), now)?))
//! # };
//! // Programs have Source::from_env().await?
//! let (manager, client) = (source("spiffe://example.org/manager")?, source("spiffe://example.org/client")?);
//! let listen: ListenUrl = "tcp://127.0.0.1:0".parse()?;
//! let server = Server::bind(manager, &[listen]).await?;
//! let url: DialUrl = server.urls()[0].to_string().parse()?;
//! tokio::spawn(server.serve(tonic::service::Routes::default(), &[], std::future::pending()));
//!
//! let pool = Pool::new(client, PoolConfig::default());
//! let connection = pool.get(&url, Duration::from_secs(5)).await?; // a tonic client's transport
//! assert_eq!(connection.peer().id().path(), "/manager");
//! # Ok(())
//! # }
//! ```

// The clock is `nsm_identity::clock::now()`.
#![warn(clippy::disallowed_methods)]

mod cork;
mod deadline;
mod delivery;
mod fd;
mod guard;
pub mod https;
mod peer;
mod pool;
mod reflection;
mod server;
#[cfg(feature = "sim")]
pub mod sim;
mod told;
mod trace;
mod url;

use std::io;

pub use deadline::Deadline;
pub use delivery::OnDelivery;
pub use fd::{FdError, FdStream, FdTable, GRACE, MAX_FDS_PER_WRITE, MAX_KEPT};
pub use guard::{Census, Counted, Guard, Refusal, Refusals, Unanswered};
pub use nsm_identity::{FileId, UnixPeer};
pub use peer::{Peer, PeerError, client_token};
pub use pool::{Connection, DialError, Pool, PoolConfig, ResponseBody};
pub use reflection::Reflection;
pub use server::{Limits, Server};
pub use told::Told;
pub use trace::{Propagation, is_traced, propagate};
pub use url::{DialTarget, DialUrl, ListenUrl, UrlError};

/// Registry calls carry paths of six tokens in one header; 64 KiB is the least (`registry.md` 2.9.2).
const MAX_HEADER_LIST: u32 = 256 * 1024;

/// The longest message that services take, bytes: a request with a path of 128 hops has a tenth of it.
pub const MAX_MESSAGE: usize = 2 * 1024 * 1024;

/// What goes wrong with listening.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A Unix socket.
    #[error(transparent)]
    Socket(#[from] nsm_identity::Error),
    /// A TCP socket.
    #[error("cannot listen on {url}; is the address this machine's, and the port free?")]
    Listen {
        /// Where.
        url: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// Raises this process's limit of open files to what the system allows, and returns it: every wire of a mesh needs
/// descriptors, and the usual soft limit of 1024 is meant for programs that use `select`.
///
/// # Errors
/// The kernel refuses.
pub fn raise_descriptor_limit() -> io::Result<Option<u64>> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    Ok(limit.current)
}
