//! Who is at the other end of a connection.

use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use nsm_identity::{
    CertificateError, Identity, Leaf, SpiffeId, Token, UnixPeer,
    token::{self, Minter},
};
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tonic::{Status, metadata::MetadataMap};

use crate::{
    fd::{FdStream, FdTable},
    told::Told,
};

/// Metadata key of the caller's token (`control-plane.md` 5.2).
pub(crate) const TOKEN_KEY: &str = "nsm-client-token";
/// Metadata key of its expiry, RFC 3339.
pub(crate) const EXPIRES_KEY: &str = "nsm-client-token-expires";

/// The authenticated other end of one connection. Handlers find it in the request's extensions ([`Peer::of`]), callers
/// at their [`crate::Connection`]. Cheap to clone.
#[derive(Clone)]
pub struct Peer(Arc<Inner>);

struct Inner {
    leaf: Leaf,
    /// What it presented, leaf first.
    chain: Vec<CertificateDer<'static>>,
    identity: Arc<Identity>,
    address: String,
    unix: Option<(UnixPeer, FdTable)>,
    minter: Minter,
    told: Told,
}

impl Peer {
    /// The peer of the connection that a request came over.
    ///
    /// # Errors
    /// INTERNAL if the request did not come through a [`crate::Server`].
    pub fn of<T>(request: &tonic::Request<T>) -> Result<&Self, Status> {
        request.extensions().get().ok_or_else(|| Status::internal("a request without a connection"))
    }

    /// Who it is.
    pub fn id(&self) -> &SpiffeId {
        self.0.leaf.id()
    }

    /// Its certificate: for policies, [`nsm_identity::policy`].
    pub fn leaf(&self) -> &Leaf {
        &self.0.leaf
    }

    /// The certificates that it presented, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.0.chain
    }

    /// What it was told on this connection.
    pub fn told(&self) -> &Told {
        &self.0.told
    }

    /// What *we* presented on this connection. Tokens for this peer are signed with it, also after a rotation.
    pub fn identity(&self) -> &Arc<Identity> {
        &self.0.identity
    }

    /// Where it is, for people: an IP address and port, or a socket's path.
    pub fn address(&self) -> &str {
        &self.0.address
    }

    /// Its process, on a Unix socket.
    pub fn unix(&self) -> Option<&UnixPeer> {
        self.0.unix.as_ref().map(|(unix, _)| unix)
    }

    /// Descriptors sent to and received from it, on a Unix socket.
    pub fn fds(&self) -> Option<&FdTable> {
        self.0.unix.as_ref().map(|(_, fds)| fds)
    }

    /// A token of ours for this peer.
    ///
    /// # Errors
    /// What we presented on this connection has expired.
    pub fn token(&self, max_lifetime: Duration, now: SystemTime) -> Result<Token, nsm_identity::Error> {
        self.0.minter.mint(self.0.identity.svid(), &self.0.leaf, max_lifetime, now)
    }

    /// This process as its own peer, for roles that share one: what is said between them travels over no connection.
    #[must_use]
    pub fn this_process(identity: Arc<Identity>) -> Self {
        let (leaf, chain) = (identity.svid().leaf().clone(), identity.svid().chain().to_vec());
        let address = "this process".to_owned();
        Self(Arc::new(Inner {
            leaf,
            chain,
            identity,
            address,
            unix: None,
            minter: Minter::default(),
            told: Told::default(),
        }))
    }

    /// Who presented this, where no TLS says so.
    #[cfg(feature = "sim")]
    pub(crate) fn simulated(
        presented: &nsm_identity::Svid,
        identity: Arc<Identity>,
        address: String,
        unix: Option<(UnixPeer, FdTable)>,
    ) -> Self {
        let (leaf, chain) = (presented.leaf().clone(), presented.chain().to_vec());
        let (minter, told) = (Minter::default(), Told::default());
        Self(Arc::new(Inner { leaf, chain, identity, address, unix, minter, told }))
    }

    /// Reads the peer of an established TLS connection.
    pub(crate) fn new(
        connection: &rustls::CommonState,
        wire: &Wire,
        identity: Arc<Identity>,
        address: String,
    ) -> Result<Self, PeerError> {
        if connection.alpn_protocol() != Some(b"h2") {
            return Err(PeerError::Protocol);
        }
        let certificates = connection.peer_certificates().unwrap_or_default();
        let leaf = Leaf::parse(certificates.first().ok_or(PeerError::Anonymous)?.clone())?;
        let unix = match wire {
            Wire::Unix(stream, peer) => {
                stream.fds().trust();
                Some((peer.clone(), stream.fds().clone()))
            }
            Wire::Tcp(_) => None,
        };
        let chain = certificates.iter().map(|der| der.clone().into_owned()).collect();
        Ok(Self(Arc::new(Inner {
            leaf,
            chain,
            identity,
            address,
            unix,
            minter: Minter::default(),
            told: Told::default(),
        })))
    }
}

/// Why a TLS connection is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// ALPN did not settle on HTTP/2.
    #[error("the peer does not speak HTTP/2 (ALPN h2)")]
    Protocol,
    /// No certificate.
    #[error("the peer presented no certificate")]
    Anonymous,
    /// A certificate of nobody.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

/// The caller's token and its expiry from a request's metadata: exactly one of each, as upstream demands. The token is
/// as the peer sent it: unverified.
pub fn client_token(metadata: &MetadataMap) -> Option<Token> {
    let only = |key| {
        let mut values = metadata.get_all(key).iter();
        let value = values.next()?.to_str().ok()?;
        values.next().is_none().then_some(value)
    };
    let expires = token::parse_rfc3339(only(EXPIRES_KEY)?)?;
    Some(Token::received(only(TOKEN_KEY)?.to_owned(), expires))
}

/// What TLS runs over.
pub(crate) enum Wire {
    Unix(FdStream, UnixPeer),
    Tcp(TcpStream),
}

impl Wire {
    pub(crate) fn unix(socket: tokio::net::UnixStream) -> io::Result<Self> {
        let peer = UnixPeer::of(&socket)?;
        Ok(Self::Unix(FdStream::new(socket), peer))
    }

    /// No delay, and a dead peer is noticed without HTTP/2 pings, which grpc-go punishes (`control-plane.md` 14.2).
    pub(crate) fn tcp(socket: TcpStream) -> io::Result<Self> {
        use rustix::net::sockopt;
        socket.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&socket, true)?;
        sockopt::set_tcp_keepidle(&socket, Duration::from_secs(10))?;
        sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(5))?;
        sockopt::set_tcp_keepcnt(&socket, 4)?;
        // The same patience for bytes that were sent and not acknowledged.
        sockopt::set_tcp_user_timeout(&socket, 30_000)?;
        Ok(Self::Tcp(socket))
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream, _) => Pin::new(stream).poll_read(cx, buf),
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream, _) => Pin::new(stream).poll_write(cx, buf),
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream, _) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream, _) => Pin::new(stream).poll_flush(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// For logs: its identity and where it is; on a Unix socket that is its process.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.id(), self.0.address)
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer")
            .field("id", self.id())
            .field("address", &self.0.address)
            .field("unix", &self.unix())
            .finish_non_exhaustive()
    }
}
