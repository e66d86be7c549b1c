//! Connections to peers, made once and shared.
//!
//! Upstream dials for every call; a handshake costs more than the call. Here one HTTP/2 connection per peer is kept and
//! carries all calls. Tokens must be signed by what was presented on the connection they travel on, so a connection
//! keeps its identity, and *new* calls get a new connection when our SVID was renewed, or when half of what was left of
//! the peer's certificate is over: the peer has a newer one by then, and tokens it signs on the old connection would
//! soon expire. Calls in flight finish where they are.
//!
//! Upstream's servers keep every descriptor that they receive until the connection ends, which with a connection for
//! each wire is soon. Ours end after they have carried a number of descriptors, or a short time after the last use: new
//! calls get a new one, and the peer lets go. Streams would keep such a connection open for as long as they last, so
//! they have one of their own ([`Pool::streams`]).

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    io,
    os::fd::{AsRawFd, OwnedFd},
    os::unix::fs::MetadataExt,
    pin::Pin,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use http::{HeaderValue, Request, Response, Uri, uri::Authority};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nsm_api::planted;
use nsm_identity::clock;
use nsm_identity::{FileId, Identity, Source, explain, policy::Policies, token::DEFAULT_MAX_LIFETIME};
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    sync::oneshot,
    time::{Instant, Sleep, sleep, sleep_until, timeout, timeout_at},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::Status;
use tower::Service;
use tracing::{Instrument as _, debug};

use crate::{
    cork::Corked,
    deadline::{Deadline, exceeded},
    fd::FdTable,
    guard::Unanswered,
    peer::{EXPIRES_KEY, Peer, PeerError, TOKEN_KEY, Wire},
    trace,
    url::{DialTarget, DialUrl},
};

/// How a [`Pool`] behaves.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Longest lifetime of the tokens that travel with calls (`NSM_MAX_TOKEN_LIFETIME`).
    pub max_token_lifetime: Duration,
    /// A connection that nobody uses is closed after this time.
    pub idle: Duration,
    /// After so many descriptors a connection gets no new calls.
    pub descriptors: usize,
    /// A connection that has carried descriptors and that nobody uses is closed after this time.
    pub idle_with_descriptors: Duration,
    /// How long connecting and the handshake may take, however patient the callers are.
    pub dial: Duration,
    /// What callers check of the paths in answers.
    pub policies: Arc<Policies>,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            max_token_lifetime: DEFAULT_MAX_LIFETIME,
            idle: Duration::from_secs(60),
            // Two a wire, and a handshake costs as much as two calls; Go's programs have the hard limit of open files.
            descriptors: 1024,
            idle_with_descriptors: Duration::from_secs(15),
            dial: Duration::from_secs(15),
            policies: Arc::default(),
        }
    }
}

/// Connections by peer. Cheap to clone; connections end with the last clone and the calls in flight.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    source: Source,
    config: PoolConfig,
    slots: Mutex<HashMap<Key, Slot>>,
    dials: AtomicU64,
    handshakes: AtomicU64,
    #[cfg(feature = "sim")]
    here: Option<Arc<dyn crate::sim::Process>>,
}

/// What makes two targets the same peer. A socket file is known by what it is, not by its name: the names below
/// `/proc/PID/fd` are reused, and one file has many of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Tcp(String),
    Unix { file: FileId, changed: (i64, i64), lane: Lane },
}

/// What a connection is for, where descriptors can travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Lane {
    Calls,
    Streams,
}

enum Slot {
    Dialing { dial: u64, identity: Arc<Identity>, result: Dialing },
    Ready(Connection),
}

type Dialing = Shared<BoxFuture<'static, Result<Connection, DialError>>>;

/// One HTTP/2 connection to a peer: a tonic client's transport. Cheap to clone.
///
/// Each call gets a fresh `nsm-client-token` for this peer, signed by what we presented to it. When the connection is
/// broken calls fail with UNAVAILABLE: get another one from the pool.
#[derive(Clone)]
pub struct Connection(Arc<Link>);

struct Link {
    peer: Peer,
    sender: Sender,
    authority: Authority,
    policies: Arc<Policies>,
    max_token_lifetime: Duration,
    /// New calls go elsewhere from then on.
    retire: SystemTime,
    /// … and after so many descriptors.
    descriptors: usize,
    used: Mutex<Instant>,
    /// Why the connection ended.
    end: Arc<OnceLock<String>>,
}

enum Sender {
    Http2(http2::SendRequest<tonic::body::Body>),
    #[cfg(feature = "sim")]
    Simulated(Arc<dyn crate::sim::Link>),
}

/// Why there is no connection. Cheap to clone: all who waited for one handshake get the same answer.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// Nobody listens there.
    #[error("cannot connect to {url}; is its server running?")]
    Connect {
        /// Whom.
        url: String,
        /// The system's answer.
        source: Arc<io::Error>,
    },
    /// TLS failed.
    #[error("the TLS handshake with {url} failed")]
    Handshake {
        /// Whom.
        url: String,
        /// What TLS says.
        source: Arc<io::Error>,
    },
    /// The peer is nobody we can talk to.
    #[error("the peer at {url} is refused")]
    Peer {
        /// Whom.
        url: String,
        /// Why.
        source: PeerError,
    },
    /// The peer closed the connection before it said anything: it does not trust us, most likely.
    #[error("the peer at {url} refused the connection after the handshake: {reason}")]
    Refused {
        /// Whom.
        url: String,
        /// What was seen.
        reason: String,
    },
    /// It took too long.
    #[error("no connection to {url} in time; does its server answer?")]
    Timeout {
        /// Whom.
        url: String,
    },
}

impl DialError {
    /// May it work when it is tried again soon? Nobody may listen yet, and roots may come with the next bundle.
    pub fn is_transient(&self) -> bool {
        !matches!(self, Self::Peer { .. })
    }
}

impl From<DialError> for Status {
    fn from(error: DialError) -> Self {
        Unanswered.mark(Status::unavailable(explain(&error)))
    }
}

impl Pool {
    /// Where its identities come from.
    #[must_use]
    pub fn source(&self) -> &Source {
        &self.0.source
    }

    /// A pool that dials with the newest identity of `source`. Needs a tokio runtime.
    pub fn new(source: Source, config: PoolConfig) -> Self {
        let tidying = config.clone();
        let pool = Self(Arc::new(Inner {
            source: source.clone(),
            config,
            slots: Mutex::default(),
            dials: AtomicU64::default(),
            handshakes: AtomicU64::default(),
            #[cfg(feature = "sim")]
            here: crate::sim::here(),
        }));
        tokio::spawn(tidy(Arc::downgrade(&pool.0), source, tidying));
        pool
    }

    /// What its user checks of the paths in answers.
    pub fn policies(&self) -> &Policies {
        &self.0.config.policies
    }

    /// A connection to `target`: a kept one, or a new one. Callers that wait for the same peer share one handshake and
    /// its error.
    ///
    /// # Errors
    /// There is none within `patience`.
    pub async fn get(
        &self,
        target: impl Into<DialTarget>,
        patience: Duration,
    ) -> Result<Connection, DialError> {
        self.lane(target.into(), Lane::Calls, patience).await
    }

    /// As [`Pool::get`], a connection for streams that last: those of all callers share it, and no descriptors are to be
    /// sent on it.
    ///
    /// # Errors
    /// There is none within `patience`.
    pub async fn streams(
        &self,
        target: impl Into<DialTarget>,
        patience: Duration,
    ) -> Result<Connection, DialError> {
        self.lane(target.into(), Lane::Streams, patience).await
    }

    async fn lane(
        &self,
        target: DialTarget,
        lane: Lane,
        patience: Duration,
    ) -> Result<Connection, DialError> {
        let key = key(&target, lane)?;
        let result = {
            let identity = self.0.source.current();
            let mut slots = self.0.slots.lock();
            match slots.get(&key) {
                Some(Slot::Ready(connection)) if connection.takes_new_calls(&identity) => {
                    *connection.0.used.lock() = Instant::now();
                    return Ok(connection.clone());
                }
                Some(Slot::Dialing { identity: with, result, .. }) if Arc::ptr_eq(with, &identity) => {
                    result.clone()
                }
                _ => {
                    let dial = self.0.dials.fetch_add(1, Ordering::Relaxed);
                    let result = self.dial(dial, key.clone(), target.clone(), identity.clone());
                    slots.insert(key, Slot::Dialing { dial, identity, result: result.clone() });
                    result
                }
            }
        };
        match timeout(patience, result).await {
            Ok(result) => result,
            Err(_) => Err(DialError::Timeout { url: target.to_string() }),
        }
    }

    /// As [`Pool::get`], but tries again while nobody listens yet: for programs that start at the same time.
    ///
    /// # Errors
    /// The last one, when `patience` is over.
    pub async fn wait(
        &self,
        target: impl Into<DialTarget>,
        patience: Duration,
    ) -> Result<Connection, DialError> {
        let target = target.into();
        let deadline = Instant::now() + patience;
        let mut pause = Duration::from_millis(10);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.get(target.clone(), left).await {
                Err(error) if error.is_transient() && left > pause => {
                    debug!(%target, %error, "waiting for a server");
                    sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(500));
                }
                result => return result,
            }
        }
    }

    /// How many handshakes were made so far.
    pub fn handshakes(&self) -> u64 {
        self.0.handshakes.load(Ordering::Relaxed)
    }

    /// How many connections are kept, those being made included.
    pub fn len(&self) -> usize {
        self.0.slots.lock().len()
    }

    /// Is no connection kept?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Dials in a task of its own: a caller that gives up leaves the others their connection.
    fn dial(&self, dial: u64, key: Key, target: DialTarget, identity: Arc<Identity>) -> Dialing {
        let pool = Arc::downgrade(&self.0);
        let config = self.0.config.clone();
        let url = target.to_string();
        #[cfg(feature = "sim")]
        let here = self.0.here.clone();
        let task = tokio::spawn(async move {
            #[cfg(feature = "sim")]
            let opening = async {
                match &here {
                    Some(here) => open_simulated(&**here, &target, identity, &config).await,
                    None => open(&target, identity, &config).await,
                }
            };
            #[cfg(not(feature = "sim"))]
            let opening = open(&target, identity, &config);
            let result = match timeout(config.dial, opening).await {
                Ok(result) => result,
                Err(_) => Err(DialError::Timeout { url: target.to_string() }),
            };
            if let Some(pool) = pool.upgrade() {
                let mut slots = pool.slots.lock();
                let ours = matches!(slots.get(&key), Some(Slot::Dialing { dial: now, .. }) if *now == dial);
                match &result {
                    Ok(connection) => {
                        pool.handshakes.fetch_add(1, Ordering::Relaxed);
                        if ours {
                            slots.insert(key, Slot::Ready(connection.clone()));
                        }
                    }
                    Err(_) if ours => drop(slots.remove(&key)),
                    Err(_) => {}
                }
            }
            result
        });
        async move {
            match task.await {
                Ok(result) => result,
                // The runtime is shutting down.
                Err(_) => Err(DialError::Timeout { url }),
            }
        }
        .boxed()
        .shared()
    }
}

/// Closes what is idle, broken or outdated.
async fn tidy(pool: Weak<Inner>, source: Source, config: PoolConfig) {
    let mut identity = source.current();
    let shortest = config.idle.min(config.idle_with_descriptors);
    loop {
        tokio::select! {
            renewed = source.changed(&identity) => identity = renewed,
            () = sleep(shortest.clamp(Duration::from_millis(20), Duration::from_secs(2)) / 2) => {}
        }
        let Some(pool) = pool.upgrade() else { return };
        let mut unwanted = Vec::new();
        pool.slots.lock().retain(|_, slot| match slot {
            Slot::Dialing { .. } => true,
            Slot::Ready(connection) => {
                let in_use = Arc::strong_count(&connection.0) > 1;
                let idle = if connection.sent() > 0 { config.idle_with_descriptors } else { config.idle };
                let keep = connection.takes_new_calls(&identity)
                    && (in_use || connection.0.used.lock().elapsed() < idle);
                if !keep {
                    unwanted.push(connection.clone());
                }
                keep
            }
        });
        // Closed outside the lock; those with calls in flight live until these end.
        drop(unwanted);
    }
}

impl Connection {
    fn new(
        peer: Peer,
        sender: Sender,
        authority: &str,
        end: Arc<OnceLock<String>>,
        config: &PoolConfig,
    ) -> Self {
        let now = clock::now();
        let left = peer.leaf().not_after().duration_since(now).unwrap_or_default();
        Self(Arc::new(Link {
            authority: authority.parse().unwrap_or_else(|_| Authority::from_static("localhost")),
            sender,
            max_token_lifetime: config.max_token_lifetime,
            policies: config.policies.clone(),
            retire: now + left / 2,
            descriptors: config.descriptors.max(1),
            used: Mutex::new(Instant::now()),
            end,
            peer,
        }))
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.0.peer
    }

    /// What its user checks of the paths in answers.
    pub fn policies(&self) -> &Policies {
        &self.0.policies
    }

    /// Queues a descriptor for the peer: it travels no later than a call that is made after this.
    ///
    /// Returns whether the connection can carry descriptors at all (Unix sockets can, TCP cannot).
    pub fn send_fd(&self, fd: impl Into<Arc<OwnedFd>>) -> bool {
        self.fds().map(|fds| fds.send(fd)).is_some()
    }

    /// The descriptors of this connection, if it can carry any.
    pub fn fds(&self) -> Option<&FdTable> {
        self.0.peer.fds()
    }

    /// Has the connection ended?
    pub fn is_closed(&self) -> bool {
        let closed = match &self.0.sender {
            Sender::Http2(sender) => sender.is_closed(),
            #[cfg(feature = "sim")]
            Sender::Simulated(link) => link.end().is_some(),
        };
        closed || self.0.end.get().is_some()
    }

    fn takes_new_calls(&self, identity: &Arc<Identity>) -> bool {
        !self.is_closed()
            && (planted::is("an expired certificate is still used")
                || (Arc::ptr_eq(self.0.peer.identity(), identity) && clock::now() < self.0.retire))
            && self.sent() < self.0.descriptors
    }

    /// How many descriptors it has carried.
    fn sent(&self) -> usize {
        self.fds().map_or(0, FdTable::sent)
    }

    fn prepare(&self, request: &mut Request<tonic::body::Body>) -> Result<(), Status> {
        let token = self
            .0
            .peer
            .token(self.0.max_token_lifetime, clock::now())
            .map_err(|e| Unanswered.mark(Status::unavailable(explain(&e))))?;
        let header =
            |text: &str| HeaderValue::from_str(text).map_err(|_| Status::internal("a token is no header"));
        let mut secret = header(token.jwt())?;
        secret.set_sensitive(true);
        request.headers_mut().insert(TOKEN_KEY, secret);
        request.headers_mut().insert(EXPIRES_KEY, header(&token.expires_rfc3339())?);
        let mut uri = std::mem::take(request.uri_mut()).into_parts();
        uri.scheme = Some(http::uri::Scheme::HTTPS);
        uri.authority = Some(self.0.authority.clone());
        *request.uri_mut() = Uri::from_parts(uri).map_err(|e| Status::internal(e.to_string()))?;
        Ok(())
    }

    fn broken(&self, why: &str) -> Status {
        let mut text = format!("the connection to {} broke: {why}", self.0.peer.address());
        if let Some(end) = self.0.end.get() {
            text.push_str(": ");
            text.push_str(end);
        }
        Unanswered.mark(Status::unavailable(text))
    }
}

impl Service<Request<tonic::body::Body>> for Connection {
    type Response = Response<ResponseBody>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<tonic::body::Body>) -> Self::Future {
        let connection = self.clone();
        let deadline = Deadline::from_headers(request.headers());
        if let Err(status) = self.prepare(&mut request) {
            return futures::future::ready(Err(status)).boxed();
        }
        let method = request.uri().path().to_owned();
        let span = trace::of_call(&method, request.headers_mut());
        *self.0.used.lock() = Instant::now();
        let response = self.0.sender.send(request);
        async move {
            let response = match deadline {
                None => response.await,
                // Dropping the call resets its stream, which tells the server.
                Some(Deadline(at)) => timeout_at(at, response).await.map_err(|_| exceeded("client"))?,
            };
            let response = response.map_err(|why| connection.broken(&why))?;
            Ok(response.map(|inner| ResponseBody {
                inner,
                expiry: deadline.map(|Deadline(at)| Box::pin(sleep_until(at))),
                connection,
            }))
        }
        .instrument(span)
        .boxed()
    }
}

impl Sender {
    /// The error says how the connection broke.
    fn send(
        &self,
        request: Request<tonic::body::Body>,
    ) -> impl Future<Output = Result<Response<Answer>, String>> + Send + 'static {
        #[cfg(feature = "sim")]
        let sending = match self {
            Self::Http2(sender) => futures::future::Either::Left(sender.clone().send_request(request)),
            Self::Simulated(link) => futures::future::Either::Right(link.call(request)),
        };
        #[cfg(not(feature = "sim"))]
        let sending = {
            let Self::Http2(sender) = self;
            sender.clone().send_request(request)
        };
        async move {
            #[cfg(feature = "sim")]
            let sending = match sending {
                futures::future::Either::Left(sending) => sending,
                futures::future::Either::Right(call) => {
                    return call.await.map(|answer| answer.map(Answer::Simulated));
                }
            };
            let answer = sending.await.map_err(|e| explain(&e))?;
            Ok(answer.map(Answer::Http2))
        }
    }
}

/// What comes back.
enum Answer {
    Http2(Incoming),
    #[cfg(feature = "sim")]
    Simulated(tonic::body::Body),
}

/// A response: fails with DEADLINE_EXCEEDED when the call's deadline passes, and keeps its connection.
pub struct ResponseBody {
    inner: Answer,
    expiry: Option<Pin<Box<Sleep>>>,
    connection: Connection,
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = match &mut self.inner {
            Answer::Http2(inner) => {
                let frame = Pin::new(inner).poll_frame(cx);
                frame.map(|frame| frame.map(|frame| frame.map_err(|e| self.connection.broken(&explain(&e)))))
            }
            #[cfg(feature = "sim")]
            Answer::Simulated(inner) => {
                let frame = Pin::new(inner).poll_frame(cx);
                frame.map(|frame| frame.map(|frame| frame.map_err(|e| self.connection.broken(e.message()))))
            }
        };
        if frame.is_ready() {
            return frame;
        }
        let Some(expiry) = &mut self.expiry else { return Poll::Pending };
        ready!(expiry.as_mut().poll(cx));
        Poll::Ready(Some(Err(exceeded("client"))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.inner {
            Answer::Http2(inner) => inner.is_end_stream(),
            #[cfg(feature = "sim")]
            Answer::Simulated(inner) => inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.inner {
            Answer::Http2(inner) => inner.size_hint(),
            #[cfg(feature = "sim")]
            Answer::Simulated(inner) => inner.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        *self.connection.0.used.lock() = Instant::now();
    }
}

/// Connects, shakes hands, starts HTTP/2.
async fn open(
    target: &DialTarget,
    identity: Arc<Identity>,
    config: &PoolConfig,
) -> Result<Connection, DialError> {
    let url = target.to_string();
    let connect = |source| DialError::Connect { url: url.clone(), source: Arc::new(source) };
    let (wire, authority) = match target {
        DialTarget::Url(DialUrl::Tcp(host_port)) => {
            let socket = TcpStream::connect(host_port).await.map_err(connect)?;
            (Wire::tcp(socket), host_port.as_str())
        }
        DialTarget::Url(DialUrl::Unix(path)) => {
            (connect_unix(path.as_os_str()).await.and_then(Wire::unix), "localhost")
        }
        DialTarget::Socket(fd) => {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            (connect_unix(path.as_ref()).await.and_then(Wire::unix), "localhost")
        }
    };
    let wire = wire.map_err(connect)?;
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
        // Only a hint for servers with many names; ours and upstream's ignore it.
        .unwrap_or_else(|_| ServerName::from(std::net::Ipv4Addr::LOCALHOST));
    let mut stream = TlsConnector::from(identity.client_config().clone())
        .connect(name, Corked::new(wire))
        .await
        .map_err(|source| DialError::Handshake { url: url.clone(), source: Arc::new(source) })?;
    stream.get_mut().0.cork();
    let (wire, connection) = stream.get_ref();
    let peer = Peer::new(connection, wire.get_ref(), identity, url.clone())
        .map_err(|source| DialError::Peer { url: url.clone(), source })?;
    let refused = |reason| DialError::Refused { url: url.clone(), reason };
    let (greet, greeted) = oneshot::channel();
    let stream = Greeted { stream, greet: Some(greet) };
    let (sender, driver) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_header_list_size(crate::MAX_HEADER_LIST)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| refused(explain(&e)))?;
    let end = Arc::new(OnceLock::new());
    let driver_end = end.clone();
    let driver_url = url.clone();
    let driver = tokio::spawn(async move {
        let reason = match driver.await {
            Ok(()) => "closed".to_owned(),
            Err(e) => explain(&e),
        };
        debug!(url = driver_url, reason, "connection ended");
        let _ = driver_end.set(reason);
    });
    // In TLS 1.3 the client is done before the server has looked at its certificate.
    if greeted.await.is_err() {
        let _ = driver.await;
        return Err(refused(end.get().cloned().unwrap_or_default()));
    }
    debug!(url, peer = %peer.id(), "connected");
    Ok(Connection::new(peer, Sender::Http2(sender), authority, end, config))
}

/// As [`open`], in a simulated process.
#[cfg(feature = "sim")]
async fn open_simulated(
    here: &dyn crate::sim::Process,
    target: &DialTarget,
    identity: Arc<Identity>,
    config: &PoolConfig,
) -> Result<Connection, DialError> {
    use crate::sim::Refused;
    let url = target.to_string();
    let (peer, link) = here.connect(target, identity).await.map_err(|refused| match refused {
        Refused::Nobody => {
            let source = Arc::new(io::ErrorKind::ConnectionRefused.into());
            DialError::Connect { url: url.clone(), source }
        }
        Refused::Untrusted(reason) => DialError::Refused { url: url.clone(), reason: reason.to_string() },
    })?;
    Ok(Connection::new(peer, Sender::Simulated(link), "localhost", Arc::default(), config))
}

/// The client's TLS stream: says when the server has said something, which it does only after it has accepted our
/// certificate, and finds out why it did not.
struct Greeted {
    stream: TlsStream<Corked<Wire>>,
    greet: Option<oneshot::Sender<()>>,
}

impl AsyncRead for Greeted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before
            && let Some(greet) = self.greet.take()
        {
            let _ = greet.send(());
        }
        result
    }
}

impl Greeted {
    /// A write to a peer that has left fails, while the alert that says why is still to be read.
    fn why(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if !matches!(&result, Poll::Ready(Err(_))) {
            return result;
        }
        let mut byte = [0];
        match Pin::new(&mut self.stream).poll_read(cx, &mut ReadBuf::new(&mut byte)) {
            Poll::Ready(Err(alert)) => Poll::Ready(Err(alert)),
            _ => result,
        }
    }
}

impl AsyncWrite for Greeted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.why(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.why(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.why(cx, result.map_ok(|()| 0)).map_ok(|_| ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Connecting to a Unix socket never waits: a full backlog is EAGAIN, and the caller tries again.
async fn connect_unix(path: &std::ffi::OsStr) -> io::Result<UnixStream> {
    let mut pause = Duration::from_millis(1);
    loop {
        match UnixStream::connect(path).await {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => sleep(pause).await,
            result => return result,
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn key(target: &DialTarget, lane: Lane) -> Result<Key, DialError> {
    let unix = |meta: io::Result<std::fs::Metadata>| {
        let meta = meta.map_err(|e| DialError::Connect { url: target.to_string(), source: Arc::new(e) })?;
        let file = FileId { dev: meta.dev(), ino: meta.ino() };
        // File systems reuse inode numbers; not with the same time.
        Ok(Key::Unix { file, changed: (meta.ctime(), meta.ctime_nsec()), lane })
    };
    match target {
        DialTarget::Url(DialUrl::Tcp(host_port)) => Ok(Key::Tcp(host_port.clone())),
        DialTarget::Url(DialUrl::Unix(path)) => unix(std::fs::metadata(path)),
        DialTarget::Socket(fd) => unix(std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd()))),
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("connections", &self.len())
            .field("config", &self.0.config)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.0.peer)
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ResponseBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody").field("connection", &self.connection).finish_non_exhaustive()
    }
}
