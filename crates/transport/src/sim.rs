//! In place of sockets, where a whole mesh is simulated in one process (feature `sim`, tests only).
//!
//! A call goes from [`crate::Connection`] to the handlers of a [`crate::Server`] as a message: tonic's encoding, tokens,
//! deadlines, descriptors and what becomes of an answer are real; TLS, HTTP/2 and the kernel's sockets are not there, and
//! what a handshake decides is decided by [`shake_hands`]. How long a message takes and whether it arrives is for the
//! [`Process`] to say.

use std::{convert::Infallible, fmt, sync::Arc, time::UNIX_EPOCH};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use nsm_identity::clock;
use nsm_identity::{CertificateError, Identity, Source, UnixPeer};
use rustls_pki_types::UnixTime;
use tonic::{Status, body::Body, service::Routes};

use crate::{
    fd::FdTable,
    guard::Refusals,
    peer::Peer,
    server,
    url::{DialTarget, ListenUrl},
};

tokio::task_local! {
    /// The simulated process that pools and servers which are made now belong to.
    pub static HERE: Arc<dyn Process>;
}

/// What a simulated process has instead of sockets.
pub trait Process: Send + Sync {
    /// Connects and shakes hands; the URL is the target's, for errors.
    fn connect(&self, target: &DialTarget, identity: Arc<Identity>) -> BoxFuture<'static, Connected>;

    /// Lets others call these routes at this URL until what is returned is dropped.
    fn listen(&self, url: &ListenUrl, served: Arc<Served>) -> Box<dyn Send>;
}

/// Who is at the other end, and the connection.
pub type Connected = Result<(Peer, Arc<dyn Link>), Refused>;

/// Why there is no connection.
#[derive(Debug)]
pub enum Refused {
    /// Nobody listens there.
    Nobody,
    /// One of the two does not trust the other.
    Untrusted(CertificateError),
}

/// A connection, as its caller has it.
pub trait Link: Send + Sync {
    /// One call; dropped, the caller has left. The error says how the connection broke.
    fn call(&self, request: Request<Body>) -> BoxFuture<'static, Result<Response<Body>, String>>;

    /// Why the connection has ended, if it has.
    fn end(&self) -> Option<String>;
}

/// What a server does with calls.
pub struct Served {
    pub(crate) routes: Routes,
    pub(crate) source: Source,
    pub(crate) refusals: Refusals,
}

impl Served {
    /// Whom it presents itself as now.
    #[must_use]
    pub fn identity(&self) -> Arc<Identity> {
        self.source.current()
    }

    /// Serves one call of this peer.
    pub async fn call(&self, peer: Peer, request: Request<Bytes>) -> Response<Body> {
        let request = request.map(|bytes| Body::new(Whole(Some(bytes))));
        let Ok(answer): Result<_, Infallible> =
            server::call(self.routes.clone(), peer.clone(), request).await;
        server::tell_refusal(&answer, &peer, &self.refusals);
        answer
    }
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Served").finish_non_exhaustive()
    }
}

/// Both ends of a connection on which the caller presents `caller` and the server `server`: the server as the caller
/// knows it, and the other way round. On a Unix socket each end has a process and descriptors.
///
/// # Errors
/// What TLS would refuse: a certificate that is out of date, or that the other's roots do not vouch for.
pub fn shake_hands(
    caller: &Arc<Identity>,
    server: &Arc<Identity>,
    address: (String, String),
    unix: Option<(UnixPeer, UnixPeer)>,
) -> Result<(Peer, Peer), CertificateError> {
    let now = UnixTime::since_unix_epoch(clock::now().duration_since(UNIX_EPOCH).unwrap_or_default());
    for (of, by) in [(server, caller), (caller, server)] {
        let (leaf, rest) = of.svid().chain().split_first().ok_or(CertificateError::Malformed)?;
        by.bundles().verify(leaf, rest, now)?;
    }
    let (to_caller, to_server) = unix.unzip();
    let end = |of: &Arc<Identity>, seen_by: &Arc<Identity>, address, unix: Option<UnixPeer>| {
        let unix = unix.map(|peer| (peer, FdTable::simulated()));
        Peer::simulated(of.svid(), Arc::clone(seen_by), address, unix)
    };
    Ok((end(server, caller, address.0, to_server), end(caller, server, address.1, to_caller)))
}

/// Carries the descriptors that were queued for `from`, a peer as one end has it, to the table of `to`, the same
/// connection as the other end has it.
pub fn carry_descriptors(from: &Peer, to: &Peer) {
    if let (Some(from), Some(to)) = (from.fds(), to.fds()) {
        from.carry_to(to);
    }
}

/// The descriptors of a connection end with it.
pub fn close_descriptors(peer: &Peer) {
    if let Some(fds) = peer.fds() {
        fds.close();
    }
}

/// A body that is there.
struct Whole(Option<Bytes>);

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        std::task::Poll::Ready(self.0.take().map(|bytes| Ok(http_body::Frame::data(bytes))))
    }
}

/// The process that the caller is a part of, if it is simulated.
pub(crate) fn here() -> Option<Arc<dyn Process>> {
    HERE.try_with(Arc::clone).ok()
}
