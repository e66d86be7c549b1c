//! A gRPC server over mTLS, on Unix sockets and TCP.

use std::{
    collections::VecDeque,
    convert::Infallible,
    fmt,
    future::Future,
    io,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use futures::FutureExt;
use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nsm_identity::{Identity, Seldom, Source, UnixSocket, explain};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::{Code, Status, body::Body, service::Routes};
use tower::Service;
use tracing::{Instrument as _, debug, error, info, warn};

use crate::{
    Error,
    cork::Corked,
    deadline::{Deadline, DeadlineBody, exceeded},
    delivery::DeliveredBody,
    guard::{self, Census, Counted, Guard, Metered, Refusals},
    peer::{Peer, Wire},
    reflection::Reflection,
    trace,
    url::ListenUrl,
};

/// Bounds on what peers may use of a server.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Authenticated connections at a time on each socket; one more is closed at once.
    pub connections: usize,
    /// Connections of one identity at a time, on all sockets together. Upstream's programs hold one for each wire.
    pub connections_of_one: usize,
    /// Handshakes at a time on each socket; one more ends the oldest.
    pub handshakes: usize,
    /// How long a handshake may take.
    pub handshake: Duration,
    /// Calls at a time on one connection, streams included; more wait at the peer. A manager may hold one stream per
    /// wire to another.
    pub calls: u32,
    /// Bytes of requests that a connection may have begun and not ended.
    pub in_flight: usize,
    /// Streams that one identity may have open to watch what happens here.
    pub watches_of_one: usize,
    /// How long calls in flight may take to end at a shutdown.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8192,
            connections_of_one: 4096,
            handshakes: 256,
            handshake: Duration::from_secs(10),
            calls: 10_000,
            in_flight: 16 * 1024 * 1024,
            watches_of_one: 16_384,
            drain: Duration::from_secs(5),
        }
    }
}

/// A server whose sockets are bound; callers can connect from now on.
pub struct Server {
    source: Source,
    listeners: Vec<Listener>,
    limits: Limits,
    refusals: Refusals,
}

enum Listener {
    Unix(UnixListener, UnixSocket),
    Tcp(TcpListener, SocketAddr),
    /// Of a simulated process: the file of a Unix socket is real, as its descriptor is what is handed on.
    #[cfg(feature = "sim")]
    Simulated(ListenUrl, Option<UnixSocket>),
}

impl Server {
    /// Binds `urls`: makes the directories of Unix sockets, replaces files of dead daemons, refuses live ones.
    ///
    /// # Errors
    /// One of them cannot be bound; nothing stays bound then.
    pub async fn bind(source: Source, urls: &[ListenUrl]) -> Result<Self, Error> {
        let mut listeners = Vec::with_capacity(urls.len());
        for url in urls {
            let failed = |source| Error::Listen { url: url.to_string(), source };
            #[cfg(feature = "sim")]
            if crate::sim::here().is_some() {
                let socket = match url {
                    ListenUrl::Unix(path) => Some(UnixSocket::bind(path)?),
                    ListenUrl::Tcp(_) => None,
                };
                listeners.push(Listener::Simulated(url.clone(), socket));
                continue;
            }
            listeners.push(match url {
                ListenUrl::Unix(path) => {
                    let socket = UnixSocket::bind(path)?;
                    Listener::Unix(socket.listener().map_err(failed)?, socket)
                }
                ListenUrl::Tcp(host_port) => {
                    // An empty host means all addresses; the IPv6 one takes IPv4 along, where there is IPv6.
                    let listener = match host_port.strip_prefix(':') {
                        Some(port) => match TcpListener::bind(format!("[::]:{port}")).await {
                            Err(e) if e.kind() == io::ErrorKind::AddrInUse => Err(e),
                            Err(_) => TcpListener::bind(format!("0.0.0.0:{port}")).await,
                            bound => bound,
                        },
                        None => TcpListener::bind(host_port).await,
                    };
                    let listener = listener.map_err(failed)?;
                    let address = listener.local_addr().map_err(failed)?;
                    Listener::Tcp(listener, address)
                }
            });
        }
        Ok(Self { source, listeners, limits: Limits::default(), refusals: Refusals::default() })
    }

    /// Other bounds than the default ones.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Bounds and counters of a role.
    #[must_use]
    pub fn guarded(mut self, guard: &Guard) -> Self {
        self.limits = guard.limits;
        self.refusals = guard.refusals.clone();
        self
    }

    /// The URLs as they were bound, in the order given: port 0 is replaced by the real one.
    pub fn urls(&self) -> Vec<ListenUrl> {
        self.listeners
            .iter()
            .map(|listener| match listener {
                Listener::Unix(_, socket) => ListenUrl::Unix(socket.path().into()),
                Listener::Tcp(_, address) => ListenUrl::Tcp(address.to_string()),
                #[cfg(feature = "sim")]
                Listener::Simulated(url, _) => url.clone(),
            })
            .collect()
    }

    /// Serves `routes`, and grpc.health.v1 with SERVING for "" and `services`, and reflection, until `shutdown` is done; then calls in
    /// flight get a bounded time to end, and socket files are removed.
    ///
    /// Handlers find a [`Peer`] and, if the caller set one, a [`Deadline`] in the request's extensions.
    pub async fn serve(self, routes: Routes, services: &[&str], shutdown: impl Future<Output = ()> + Send) {
        let (reporter, health) = tonic_health::server::health_reporter();
        for service in services {
            reporter.set_service_status(service, tonic_health::ServingStatus::Serving).await;
        }
        let routes = routes.add_service(health).add_service(Reflection::of(services)).prepare();
        let (limits, census, told) = (self.limits, Census::default(), Arc::<Seldom>::default());
        let (stop, stopped) = watch::channel(());
        let mut accepting = JoinSet::new();
        let mut files = Vec::new();
        #[cfg(feature = "sim")]
        let mut simulated = Vec::new();
        for listener in self.listeners {
            let acceptor = Acceptor {
                source: self.source.clone(),
                routes: routes.clone(),
                limits,
                census: census.clone(),
                refusals: self.refusals.clone(),
                told: told.clone(),
                stopped: stopped.clone(),
                handshakes: JoinSet::new(),
                oldest: VecDeque::new(),
                connections: JoinSet::new(),
            };
            match listener {
                Listener::Unix(listener, socket) => {
                    info!(url = %ListenUrl::Unix(socket.path().into()), "listening");
                    files.push(socket);
                    accepting.spawn(acceptor.run(Socket::Unix(listener)));
                }
                Listener::Tcp(listener, address) => {
                    info!(url = %ListenUrl::Tcp(address.to_string()), "listening");
                    accepting.spawn(acceptor.run(Socket::Tcp(listener)));
                }
                #[cfg(feature = "sim")]
                Listener::Simulated(url, socket) => {
                    let served = crate::sim::Served {
                        routes: routes.clone(),
                        source: self.source.clone(),
                        refusals: self.refusals.clone(),
                    };
                    simulated.extend(crate::sim::here().map(|here| here.listen(&url, Arc::new(served))));
                    files.extend(socket);
                }
            }
        }
        drop(stopped);
        shutdown.await;
        // New callers find nobody from here on.
        drop(files);
        #[cfg(feature = "sim")]
        drop(simulated);
        drop(stop);
        while let Some(ended) = accepting.join_next().await {
            if let Err(reason) = ended {
                error!(%reason, "a listener broke");
            }
        }
    }
}

enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Socket {
    /// The next connection; `None` for a peer that has left already, of which nothing can be known.
    async fn accept(&self) -> io::Result<Option<(Wire, String)>> {
        let (wire, address) = match self {
            Self::Unix(listener) => (Wire::unix(listener.accept().await?.0), String::new()),
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                (Wire::tcp(stream), address.to_string())
            }
        };
        Ok(match wire {
            Ok(Wire::Unix(stream, peer)) => {
                let pid = peer.pid().map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
                let address = format!("unix:pid={pid}");
                Some((Wire::Unix(stream, peer), address))
            }
            Ok(wire) => Some((wire, address)),
            Err(reason) => {
                debug!(%reason, "a peer left at once");
                None
            }
        })
    }
}

/// Accepts on one socket: handshakes run beside each other, and none of them can hold up the next.
struct Acceptor {
    source: Source,
    routes: Routes,
    limits: Limits,
    census: Census,
    refusals: Refusals,
    told: Arc<Seldom>,
    stopped: watch::Receiver<()>,
    handshakes: JoinSet<Option<(TlsStream<Corked<Wire>>, Peer)>>,
    oldest: VecDeque<AbortHandle>,
    connections: JoinSet<()>,
}

impl Acceptor {
    async fn run(mut self, socket: Socket) {
        let mut stopped = self.stopped.clone();
        loop {
            tokio::select! {
                accepted = socket.accept() => match accepted {
                    Ok(Some((wire, address))) => self.shake_hands(wire, address),
                    Ok(None) => {}
                    // Out of descriptors, most likely: must neither end nor spin the loop.
                    Err(reason) => {
                        warn!(%reason, "cannot accept a connection");
                        sleep(Duration::from_millis(20)).await;
                    }
                },
                Some(done) = self.handshakes.join_next() => {
                    if let Ok(Some((stream, peer))) = done {
                        self.serve(stream, peer);
                    }
                }
                Some(_) = self.connections.join_next() => {}
                _ = stopped.changed() => break,
            }
        }
        drop(socket);
        self.handshakes.abort_all();
        let drained = async { while self.connections.join_next().await.is_some() {} };
        if timeout(self.limits.drain, drained).await.is_err() {
            info!(connections = self.connections.len(), "calls in flight did not end in time");
        }
        // Dropping the set ends what is left.
    }

    fn shake_hands(&mut self, wire: Wire, address: String) {
        self.oldest.retain(|handshake| !handshake.is_finished());
        if self.oldest.len() >= self.limits.handshakes
            && let Some(oldest) = self.oldest.pop_front()
        {
            debug!("too many handshakes: the oldest is ended");
            oldest.abort();
        }
        let identity = self.source.current();
        let (limit, refusals, told) = (self.limits.handshake, self.refusals.clone(), self.told.clone());
        let handshake = async move {
            let reason = match timeout(limit, handshake(wire, identity, &address)).await {
                Ok(Ok(connection)) => return Some(connection),
                Ok(Err(reason)) => reason,
                Err(_) => "no handshake in time".into(),
            };
            refusals.count(Code::Unauthenticated, "handshake");
            // Anybody can cause this, as often as he likes.
            match told.turn(Instant::now()) {
                Some(untold) => info!(address, reason, untold, "a connection was refused"),
                None => debug!(address, reason, "a connection was refused"),
            }
            None
        };
        self.oldest.push_back(self.handshakes.spawn(handshake));
    }

    fn serve(&mut self, stream: TlsStream<Corked<Wire>>, peer: Peer) {
        if self.connections.len() >= self.limits.connections {
            self.refusals.count(Code::ResourceExhausted, "connections");
            warn!(id = %peer.id(), address = peer.address(), "too many connections: one is closed");
            return;
        }
        let most = self.limits.connections_of_one;
        let Some(counted) = self.census.enter(peer.id(), most) else {
            self.refusals.count(Code::ResourceExhausted, "connections_of_one");
            warn!(%peer, most, "too many connections of one identity: one is closed");
            return;
        };
        debug!(id = %peer.id(), address = peer.address(), "connected");
        let (routes, refusals) = (self.routes.clone(), self.refusals.clone());
        let connection =
            connection(stream, peer, routes, self.limits, refusals, counted, self.stopped.clone());
        self.connections.spawn(connection);
    }
}

async fn handshake(
    wire: Wire,
    identity: Arc<Identity>,
    address: &str,
) -> Result<(TlsStream<Corked<Wire>>, Peer), String> {
    let acceptor = TlsAcceptor::from(identity.server_config().clone());
    let mut stream = acceptor.accept(Corked::new(wire)).await.map_err(|e| explain(&e))?;
    stream.get_mut().0.cork();
    let (wire, connection) = stream.get_ref();
    let peer =
        Peer::new(connection, wire.get_ref(), identity, address.to_owned()).map_err(|e| e.to_string())?;
    Ok((stream, peer))
}

async fn connection(
    stream: TlsStream<Corked<Wire>>,
    peer: Peer,
    routes: Routes,
    limits: Limits,
    refusals: Refusals,
    _counted: Counted,
    mut stopped: watch::Receiver<()>,
) {
    let handler = peer.clone();
    let in_flight = Arc::<AtomicUsize>::default();
    let service = service_fn(move |request: Request<Incoming>| {
        let (peer, refusals) = (handler.clone(), refusals.clone());
        let request = request.map(|body| Metered::new(body, in_flight.clone(), limits.in_flight));
        let mut request = request;
        refusals.call(request.uri().path());
        // For what is refused after an answer has begun.
        request.extensions_mut().insert(refusals.clone());
        let answer = call(routes.clone(), peer.clone(), request);
        async move {
            let answer = answer.await?;
            tell_refusal(&answer, &peer, &refusals);
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.calls)
        .max_header_list_size(crate::MAX_HEADER_LIST)
        // Many callers that give up at the same moment are no attack.
        .max_pending_accept_reset_streams(512)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    match result {
        Ok(()) => debug!(id = %peer.id(), address = peer.address(), "disconnected"),
        Err(reason) => {
            debug!(id = %peer.id(), address = peer.address(), reason = explain(&reason), "connection broke")
        }
    }
}

/// Counts what is refused, and says to whom: a peer that means harm is found by it, and one that is only broken too.
pub(crate) fn tell_refusal(answer: &Response<Body>, peer: &Peer, refusals: &Refusals) {
    let Some(code) = answer.headers().get(Status::GRPC_STATUS) else { return };
    let code = Code::from_bytes(code.as_bytes());
    if code == Code::Ok {
        return;
    }
    let status = answer.extensions().get::<Status>();
    let reason = status.map_or("other", guard::reason);
    refusals.count(code, reason);
    let text = status.map(Status::message).unwrap_or_default();
    debug!(%peer, ?code, reason, text, "a call was refused");
}

/// One call: its peer and deadline, its handler, and what becomes of a panic.
pub(crate) async fn call<B>(
    mut routes: Routes,
    peer: Peer,
    mut request: Request<B>,
) -> Result<Response<Body>, Infallible>
where
    B: http_body::Body<Data = bytes::Bytes, Error = Status> + Send + 'static,
{
    let deadline = Deadline::from_headers(request.headers());
    request.extensions_mut().insert(peer);
    if let Some(deadline) = deadline {
        request.extensions_mut().insert(deadline);
    }
    let method = request.uri().path().to_owned();
    let span = trace::of_service(&method, request.headers());
    let answer = AssertUnwindSafe(async move { routes.call(request).await }.instrument(span)).catch_unwind();
    let answer = match deadline {
        None => answer.await,
        Some(Deadline(at)) => match tokio::time::timeout_at(at, answer).await {
            Ok(answer) => answer,
            Err(_) => return Ok(exceeded("server").into_http()),
        },
    };
    match answer {
        Ok(Ok(mut response)) => {
            let on_delivery = response.extensions_mut().remove();
            let response = match deadline {
                Some(deadline) => response.map(|body| Body::new(DeadlineBody::new(body, deadline))),
                None => response,
            };
            Ok(match on_delivery {
                Some(told) => response.map(|body| Body::new(DeliveredBody::new(body, told))),
                None => response,
            })
        }
        Err(_) => {
            error!(method, "a handler panicked; the call fails, the server goes on");
            Ok(Status::internal("the handler of this call panicked; see the server's log").into_http())
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("urls", &self.urls())
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}
