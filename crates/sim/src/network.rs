//! The network between the processes of a simulation: messages that take time, come late, twice or not at all, and
//! connections that break.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    pin::Pin,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt as _;
use nsm_api::{
    path,
    pb::{
        connection::Connection,
        networkservice::NetworkServiceRequest,
        registry::{NetworkServiceEndpointQuery, NetworkServiceQuery},
    },
};
use nsm_identity::{FileId, Identity, UnixPeer, clock};
use nsm_mesh::inspect::Follow;
use nsm_transport::{
    DialTarget, DialUrl, ListenUrl, Peer,
    sim::{self, Connected, Link, Process, Refused, Served},
};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::AbortHandle,
    time::{Instant, sleep},
};
use tonic::{Status, body::Body};

use crate::{chance::Chance, trace::Trace};

/// How long the kernel of a host sends again to another that does not answer, or asks whether it is there.
pub(crate) const USER_TIMEOUT: Duration = Duration::from_secs(30);

/// A compression flag and a length, before each message of gRPC.
const GRPC_PREFIX: usize = 5;

/// What the network does to messages, besides taking its time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Weather {
    /// How likely a call's request, or its answer, is lost with its connection.
    pub(crate) breaks: f64,
    /// How likely one of them is held up until nobody waits for it any more.
    pub(crate) stalls: f64,
    /// How likely a request arrives twice.
    pub(crate) twice: f64,
    /// How likely a message is slow.
    pub(crate) slow: f64,
    /// How late events are at most. They come over another connection than answers, so they may be overtaken by them.
    pub(crate) late: Duration,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) trace: Trace,
    state: Mutex<State>,
    changed: Notify,
    numbers: AtomicU64,
    /// Closes whose callers wait.
    closing: Mutex<BTreeMap<CloseOf, usize>>,
    turns: Mutex<Option<Turns>>,
    /// Calls whose callers wait.
    waiting: Mutex<BTreeMap<u64, Waits>>,
}

/// A call that is to be answered, or given up, by then.
#[derive(Debug)]
struct Waits {
    by: Instant,
    caller: Arc<Proc>,
    what: String,
}

/// How long a call may take whose caller says nothing of a deadline.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much later than its deadline a call may end.
const SLACK: Duration = Duration::from_secs(1);

/// While nobody may ask out of turn: since when, and when the clients, by process, were answered what they asked since.
#[derive(Debug)]
struct Turns {
    begun: Instant,
    answered: BTreeMap<u32, Instant>,
}

/// Who was answered has no reason to ask again for that long: less than the pause between two refreshes, more than
/// events are late.
pub(crate) const TURN: Duration = Duration::from_secs(1);

/// Who closes where which connection, as he calls it.
type CloseOf = (u32, u32, String);

#[derive(Debug)]
struct State {
    chance: Chance,
    weather: Weather,
    listeners: BTreeMap<Key, Listener>,
    connections: Vec<Weak<Conn>>,
    /// Nodes that do not reach each other.
    cut: BTreeSet<(usize, usize)>,
    /// Names of hosts, for those who dial one that does not answer.
    hosts: BTreeMap<String, usize>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Tcp(String),
    Unix(FileId),
}

#[derive(Debug, Clone)]
struct Listener {
    process: Arc<Proc>,
    served: Arc<Served>,
    number: u64,
}

/// A process.
#[derive(Debug)]
pub(crate) struct Proc {
    this: Weak<Self>,
    net: Arc<Net>,
    pub(crate) name: String,
    pub(crate) node: usize,
    pid: u32,
    netns: Arc<OwnedFd>,
    dead: AtomicBool,
    frozen: AtomicBool,
    /// The connections that it holds as a hop, as it last answered them.
    held: Mutex<BTreeMap<String, Connection>>,
}

impl Net {
    pub(crate) fn new(trace: Trace, chance: Chance) -> Arc<Self> {
        let state = State {
            chance,
            weather: Weather::default(),
            listeners: BTreeMap::new(),
            connections: Vec::new(),
            cut: BTreeSet::new(),
            hosts: BTreeMap::new(),
        };
        Arc::new(Self {
            trace,
            state: Mutex::new(state),
            changed: Notify::new(),
            numbers: AtomicU64::new(1),
            closing: Mutex::default(),
            turns: Mutex::default(),
            waiting: Mutex::default(),
        })
    }

    /// Calls of those who live that should have been over by now.
    pub(crate) fn overdue(&self) -> Vec<String> {
        let now = Instant::now();
        let waiting = self.waiting.lock();
        let overdue = waiting.values().filter(|call| !call.caller.is_dead() && now > call.by + SLACK);
        overdue.map(|call| format!("{}, {:?} too late", call.what, now - call.by)).collect()
    }

    /// From now on, or no longer, a client that is answered does not ask again for a [`TURN`].
    pub(crate) fn in_turn(&self, only: bool) {
        *self.turns.lock() = only.then(|| Turns { begun: Instant::now(), answered: BTreeMap::new() });
    }

    /// A process of that name on a node, in the network namespace that the file stands for.
    pub(crate) fn process(self: &Arc<Self>, name: &str, node: usize, netns: Arc<OwnedFd>) -> Arc<Proc> {
        let pid = self.number() as u32;
        Arc::new_cyclic(|this| Proc {
            this: this.clone(),
            net: Arc::clone(self),
            name: name.to_owned(),
            node,
            pid,
            netns,
            dead: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            held: Mutex::default(),
        })
    }

    pub(crate) fn host(&self, name: String, node: usize) {
        self.state.lock().hosts.insert(name, node);
    }

    pub(crate) fn set_weather(&self, weather: Weather) {
        self.state.lock().weather = weather;
    }

    /// Two nodes do not reach each other any more. What they say to each other waits; after a while each gives the
    /// other up.
    pub(crate) fn cut(self: &Arc<Self>, a: usize, b: usize) {
        self.state.lock().cut.insert((a.min(b), a.max(b)));
        let this = Arc::clone(self);
        tokio::spawn(async move {
            sleep(USER_TIMEOUT).await;
            if this.is_cut(a, b) {
                let across = |conn: &Conn| {
                    let ends = (conn.from.node, conn.to.node);
                    ends == (a, b) || ends == (b, a)
                };
                this.connections().iter().filter(|conn| across(conn)).for_each(|conn| conn.end("timed out"));
            }
        });
    }

    pub(crate) fn heal(&self, a: usize, b: usize) {
        self.state.lock().cut.remove(&(a.min(b), a.max(b)));
        self.changed.notify_waiters();
    }

    fn is_cut(&self, a: usize, b: usize) -> bool {
        self.state.lock().cut.contains(&(a.min(b), a.max(b)))
    }

    fn connections(&self) -> Vec<Arc<Conn>> {
        let mut state = self.state.lock();
        state.connections.retain(|conn| conn.strong_count() > 0);
        state.connections.iter().filter_map(Weak::upgrade).collect()
    }

    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// How long a message is under way.
    fn latency(&self, local: bool) -> Duration {
        let mut state = self.state.lock();
        let slow = state.weather.slow;
        let micros = Duration::from_micros;
        if state.chance.happens(slow) {
            return state.chance.duration(micros(1_000)..micros(if local { 200_000 } else { 3_000_000 }));
        }
        state.chance.duration(if local { micros(20)..micros(200) } else { micros(150)..micros(1_500) })
    }

    /// How much later than it would an event comes.
    fn lateness(&self) -> Duration {
        let mut state = self.state.lock();
        let late = state.weather.late;
        if late.is_zero() { late } else { state.chance.duration(Duration::ZERO..late) }
    }

    /// What becomes of a call.
    fn fate(&self) -> Fate {
        let mut state = self.state.lock();
        let weather = state.weather;
        let mut fate = Fate::default();
        if state.chance.happens(weather.breaks) {
            fate.lost = Some((state.chance.happens(0.6), true));
        } else if state.chance.happens(weather.stalls) {
            fate.lost = Some((state.chance.happens(0.6), false));
        }
        fate.twice = state.chance.happens(weather.twice);
        fate
    }
}

#[derive(Debug, Default)]
struct Fate {
    /// Whether it is the answer that is lost, not the request; and whether the connection breaks over it.
    lost: Option<(bool, bool)>,
    twice: bool,
}

impl Proc {
    /// The process ends here and now: nothing of it reaches anybody any more.
    pub(crate) fn kill(&self) {
        self.dead.store(true, Ordering::Relaxed);
        self.net.state.lock().listeners.retain(|_, listener| listener.process.pid != self.pid);
        for conn in self.net.connections() {
            if conn.from.pid != self.pid && conn.to.pid != self.pid {
                continue;
            }
            if conn.from.node == conn.to.node {
                conn.end("connection reset by peer");
                continue;
            }
            // The kernel of its host says so, if it gets through.
            conn.silence();
            tokio::spawn(async move {
                if conn.cross().await.is_ok() {
                    conn.end("connection reset by peer");
                }
            });
        }
        self.held.lock().clear();
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// It does not run until it is thawed.
    pub(crate) fn freeze(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::Relaxed);
        self.net.changed.notify_waiters();
    }

    fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Relaxed)
    }

    /// The connections that it holds as a hop.
    pub(crate) fn held(&self) -> BTreeMap<String, Connection> {
        self.held.lock().clone()
    }

    /// Who it is on a Unix socket.
    fn unix(&self) -> UnixPeer {
        UnixPeer::simulated(self.pid, Arc::clone(&self.netns))
    }
}

/// Sees every answer of the process, and every end.
#[derive(Debug)]
pub(crate) struct Seen(pub(crate) Weak<Proc>);

impl Follow for Seen {
    fn answered(&self, conn: &Connection) {
        if let Some(process) = self.0.upgrade().filter(|process| !process.is_dead()) {
            process.held.lock().insert(conn.id.clone(), conn.clone());
        }
    }

    fn ended(&self, id: &str) {
        if let Some(process) = self.0.upgrade() {
            process.held.lock().remove(id);
        }
    }
}

impl Process for Proc {
    fn connect(&self, target: &DialTarget, identity: Arc<Identity>) -> BoxFuture<'static, Connected> {
        let key = match target {
            DialTarget::Url(DialUrl::Tcp(host_port)) => Some(Key::Tcp(host_port.clone())),
            DialTarget::Url(DialUrl::Unix(path)) => FileId::of_path(path).ok().map(Key::Unix),
            DialTarget::Socket(fd) => FileId::of(fd).ok().map(Key::Unix),
        };
        let (Some(this), Some(key)) = (self.this.upgrade(), key) else {
            return async { Err(Refused::Nobody) }.boxed();
        };
        let address = match target {
            DialTarget::Url(url) => url.to_string(),
            DialTarget::Socket(_) => "a socket".to_owned(),
        };
        async move {
            let net = Arc::clone(&this.net);
            if this.is_dead() {
                // Its system calls never return.
                std::future::pending::<()>().await;
            }
            let local = matches!(key, Key::Unix(_));
            let host = match &key {
                Key::Tcp(host) => net.state.lock().hosts.get(host).copied(),
                Key::Unix(_) => Some(this.node),
            };
            sleep(net.latency(local)).await;
            while host.is_some_and(|host| net.is_cut(this.node, host)) {
                net.changed.notified().await;
            }
            let listener = net.state.lock().listeners.get(&key).cloned().ok_or(Refused::Nobody)?;
            sleep(net.latency(local)).await;
            // Its kernel accepts, but nobody shakes hands.
            while listener.process.is_frozen() {
                net.changed.notified().await;
            }
            let unix = local.then(|| (this.unix(), listener.process.unix()));
            let (caller, server) = (&identity, &listener.served.identity());
            let addresses = (address, format!("{} on node {}", this.name, this.node));
            let shaken = sim::shake_hands(caller, server, addresses, unix);
            let (caller, server) = shaken.map_err(Refused::Untrusted)?;
            if this.is_dead() || listener.process.is_dead() {
                return Err(Refused::Nobody);
            }
            let until = caller.leaf().not_after().min(server.leaf().not_after());
            let left = until.duration_since(clock::now()).unwrap_or_default();
            let conn = Arc::new(Conn {
                net: Arc::clone(&net),
                number: net.number(),
                from: Arc::clone(&this),
                to: Arc::clone(&listener.process),
                served: listener.served,
                caller,
                server,
                local,
                silent: AtomicBool::new(false),
                vouched: (Instant::now() + left, until),
                end: OnceLock::new(),
                ended: Notify::new(),
            });
            net.trace.note(format_args!("connect {} {} -> {}", conn.number, this.name, conn.to.name));
            net.state.lock().connections.push(Arc::downgrade(&conn));
            let peer = conn.caller.clone();
            Ok((peer, Arc::new(Dialled(conn)) as Arc<dyn Link>))
        }
        .boxed()
    }

    fn listen(&self, url: &ListenUrl, served: Arc<Served>) -> Box<dyn Send> {
        let key = match url {
            ListenUrl::Tcp(host_port) => Some(Key::Tcp(host_port.clone())),
            ListenUrl::Unix(path) => FileId::of_path(path).ok().map(Key::Unix),
        };
        let (Some(key), Some(process)) = (key, self.this.upgrade()) else { return Box::new(()) };
        let (net, number) = (Arc::clone(&self.net), self.net.number());
        if !self.is_dead() {
            net.state.lock().listeners.insert(key.clone(), Listener { process, served, number });
        }
        Box::new(Listening { net, key, number })
    }
}

/// While somebody listens.
struct Listening {
    net: Arc<Net>,
    key: Key,
    number: u64,
}

impl Drop for Listening {
    fn drop(&mut self) {
        let mut state = self.net.state.lock();
        if state.listeners.get(&self.key).is_some_and(|there| there.number == self.number) {
            state.listeners.remove(&self.key);
        }
    }
}

/// A connection.
#[derive(Debug)]
struct Conn {
    net: Arc<Net>,
    number: u64,
    from: Arc<Proc>,
    to: Arc<Proc>,
    served: Arc<Served>,
    /// The server, as the caller knows it.
    caller: Peer,
    /// The caller, as the server knows it.
    server: Peer,
    local: bool,
    /// One of its ends has died: what comes is not read.
    silent: AtomicBool,
    /// When the certificates that its ends have shown are over: for whom the clock goes on as it did, and as it tells.
    vouched: (Instant, SystemTime),
    end: OnceLock<String>,
    ended: Notify,
}

impl Conn {
    /// Nobody is called over a connection whose certificates are over.
    fn is_vouched_for(&self) {
        let (passed, told) = self.vouched;
        if Instant::now() > passed && clock::now() > told {
            let what = format!("{} calls {} {:?} after that", self.from.name, self.to.name, passed.elapsed());
            self.net.trace.violated("no call with a certificate that has expired", what);
        }
    }

    fn end(&self, why: &str) {
        if self.end.set(why.to_owned()).is_ok() {
            sim::close_descriptors(&self.caller);
            sim::close_descriptors(&self.server);
            self.ended.notify_waiters();
        }
    }

    fn silence(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }

    /// Returns when it has ended, and why.
    async fn over(&self) -> String {
        loop {
            let ended = self.ended.notified();
            if let Some(why) = self.end.get() {
                return why.clone();
            }
            ended.await;
        }
    }

    /// The time that a message needs from one end to the other; nothing comes through a connection that has ended.
    async fn cross(&self) -> Result<(), ()> {
        sleep(self.net.latency(self.local)).await;
        loop {
            let changed = self.net.changed.notified();
            if self.end.get().is_some() {
                return Err(());
            }
            let blocked =
                self.net.is_cut(self.from.node, self.to.node) || self.from.is_frozen() || self.to.is_frozen();
            if !blocked {
                return Ok(());
            }
            tokio::select! {
                biased;
                _ = self.over() => return Err(()),
                () = changed => {}
            }
        }
    }

    /// As [`Conn::cross`], for what a process says: one that has died says nothing, and hears nothing.
    async fn carry(&self) -> Result<(), ()> {
        self.cross().await?;
        if self.silent.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

/// What the caller has.
#[derive(Debug)]
struct Dialled(Arc<Conn>);

impl Drop for Dialled {
    fn drop(&mut self) {
        self.0.end("closed");
    }
}

impl Link for Dialled {
    fn call(&self, request: Request<Body>) -> BoxFuture<'static, Result<Response<Body>, String>> {
        let conn = Arc::clone(&self.0);
        async move {
            if let Some(why) = conn.end.get() {
                return Err(why.clone());
            }
            conn.is_vouched_for();
            let (request, asking) = in_order(&conn, request).await;
            let (request, waiting) = waiting(&conn, request).await;
            let (tell, told) = oneshot::channel();
            let call = tokio::spawn(call(Arc::clone(&conn), request, tell));
            let caller = Caller(Arc::clone(&conn), call.abort_handle());
            tokio::select! {
                biased;
                why = conn.over() => Err(why),
                answer = told => match answer {
                    Ok(answer) => {
                        asking.answered(&conn, code(answer.headers()));
                        Ok(answer.map(|frames| Body::new(Frames { frames, caller, waiting, ended: false })))
                    }
                    Err(_) => Err(conn.over().await),
                },
            }
        }
        .boxed()
    }

    fn end(&self) -> Option<String> {
        self.0.end.get().cloned()
    }
}

/// While the caller waits. When it has left, the server hears of that in its time.
struct Caller(Arc<Conn>, AbortHandle);

impl Drop for Caller {
    fn drop(&mut self) {
        if self.1.is_finished() {
            return;
        }
        let (conn, call) = (Arc::clone(&self.0), self.1.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if conn.cross().await.is_ok() {
                    call.abort();
                }
            });
        }
    }
}

/// What is known of a call while its caller waits.
enum Asking {
    /// A Close, of a connection that nobody asks for there meanwhile.
    Close {
        _closing: Closing,
    },
    /// What a client asks for, since then.
    Client(Instant),
    Other,
}

impl Asking {
    fn answered(&self, conn: &Conn, code: &str) {
        if let (Self::Client(asked), "0", Some(turns)) = (self, code, &mut *conn.net.turns.lock())
            && *asked >= turns.begun
        {
            turns.answered.insert(conn.from.pid, Instant::now());
        }
    }
}

/// A hop never asks for a connection where it still closes it: the Close could come later, and end what was just made.
/// A client that was answered does not ask again because of what is told late of what stood before.
async fn in_order(conn: &Conn, request: Request<Body>) -> (Request<Body>, Asking) {
    let method = request.uri().path().rsplit('/').next().unwrap_or_default();
    let (closes, asks) = (method == "Close", method == "Request");
    if !closes && !asks {
        return (request, Asking::Other);
    }
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let message = body.get(GRPC_PREFIX..).unwrap_or_default();
    let of = match closes {
        true => Connection::decode(message).ok(),
        false => NetworkServiceRequest::decode(message).ok().and_then(|request| request.connection),
    };
    let asking = of.and_then(|of| {
        let key = (conn.from.pid, conn.to.pid, path::current(&of)?.id.clone());
        let (net, closing) = (&conn.net, &mut *conn.net.closing.lock());
        if closes {
            *closing.entry(key.clone()).or_default() += 1;
            return Some(Asking::Close { _closing: Closing { net: Arc::clone(net), key } });
        }
        let (from, to, id) = (&conn.from.name, &conn.to.name, &key.2);
        if closing.contains_key(&key) {
            net.trace.violated(
                "nobody asks where it still closes",
                format!("{from} asks {to} for {id}, which it is closing there"),
            );
        }
        if path::index(&of) > 0 {
            return None;
        }
        if let Some(turns) = &*net.turns.lock()
            && let Some(answered) = turns.answered.get(&conn.from.pid)
            && answered.elapsed() < TURN
        {
            let ago = answered.elapsed().as_millis();
            net.trace.violated(
                "nobody asks out of turn",
                format!("{from} asks {to} for {id}, which it was answered {ago} ms ago"),
            );
        }
        Some(Asking::Client(Instant::now()))
    });
    let request = Request::from_parts(head, Body::new(http_body_util::Full::new(body)));
    (request, asking.unwrap_or(Asking::Other))
}

/// A call that is answered once, and by when.
async fn waiting(conn: &Conn, request: Request<Body>) -> (Request<Body>, Option<Waiting>) {
    let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
    if method == "MonitorConnections" {
        return (request, None);
    }
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let message = body.get(GRPC_PREFIX..).unwrap_or_default();
    let watches = method == "Find"
        && (NetworkServiceEndpointQuery::decode(message).is_ok_and(|query| query.watch)
            || NetworkServiceQuery::decode(message).is_ok_and(|query| query.watch));
    let waiting = (!watches).then(|| {
        let net = Arc::clone(&conn.net);
        let patience = timeout(&head.headers).unwrap_or(PATIENCE);
        let number = net.number();
        let what = format!("{method} of {} at {}", conn.from.name, conn.to.name);
        let waits = Waits { by: Instant::now() + patience, caller: Arc::clone(&conn.from), what };
        net.waiting.lock().insert(number, waits);
        Waiting { net, number }
    });
    (Request::from_parts(head, Body::new(http_body_util::Full::new(body))), waiting)
}

/// The deadline that a caller tells, as tonic writes it.
fn timeout(headers: &http::HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let nanos = match unit {
        "S" => 1_000_000_000,
        "m" => 1_000_000,
        "u" => 1_000,
        "n" => 1,
        _ => return None,
    };
    Some(Duration::from_nanos(digits.parse::<u64>().ok()? * nanos))
}

/// While a caller waits for all of an answer.
struct Waiting {
    net: Arc<Net>,
    number: u64,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.net.waiting.lock().remove(&self.number);
    }
}

/// While a caller waits for a Close.
struct Closing {
    net: Arc<Net>,
    key: CloseOf,
}

impl Drop for Closing {
    fn drop(&mut self) {
        let mut closing = self.net.closing.lock();
        let left = closing.get_mut(&self.key).map(|closes| {
            *closes -= 1;
            *closes
        });
        if left == Some(0) {
            closing.remove(&self.key);
        }
    }
}

type Frames_ = mpsc::UnboundedReceiver<Result<Frame<Bytes>, Status>>;

/// An answer as it comes.
struct Frames {
    frames: Frames_,
    caller: Caller,
    /// Until it has come in full.
    waiting: Option<Waiting>,
    ended: bool,
}

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = std::task::ready!(self.frames.poll_recv(cx));
        let broke = frame.is_none() && !self.ended;
        self.ended |= frame.as_ref().is_none_or(|frame| frame.as_ref().is_ok_and(Frame::is_trailers));
        if self.ended {
            self.waiting = None;
        }
        let why = broke.then(|| self.caller.0.end.get().cloned().unwrap_or_default());
        Poll::Ready(frame.or_else(|| why.map(|why| Err(Status::unavailable(why)))))
    }
}

/// One call, from its caller's message to the last of its answers.
async fn call(conn: Arc<Conn>, request: Request<Body>, tell: oneshot::Sender<Response<Frames_>>) {
    let serving = serve(&conn, request, tell);
    tokio::select! {
        biased;
        // With the connection the server's handlers go.
        _ = conn.over() => {}
        () = serving => {}
    }
}

async fn serve(conn: &Arc<Conn>, request: Request<Body>, tell: oneshot::Sender<Response<Frames_>>) {
    let number = conn.net.number();
    let trace = &conn.net.trace;
    let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
    let fate = conn.net.fate();
    trace.note(format_args!("call {number} {} -> {} {method}", conn.from.name, conn.to.name));
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await else { return };
    let body = body.to_bytes();
    sim::carry_descriptors(&conn.caller, &conn.server);
    if conn.carry().await.is_err() {
        return;
    }
    if let Some((false, breaks)) = fate.lost {
        trace.note(format_args!("lost {number} request"));
        return lost(conn, breaks).await;
    }
    let once = || conn.served.call(conn.server.clone(), Request::from_parts(head.clone(), body.clone()));
    if fate.twice && !is_watch(&method) {
        trace.note(format_args!("twice {number}"));
        let (again, conn) = (head.clone(), Arc::clone(conn));
        let body = body.clone();
        tokio::spawn(async move {
            let second = async {
                if conn.carry().await.is_ok() {
                    let answer =
                        conn.served.call(conn.server.clone(), Request::from_parts(again, body)).await;
                    drop(answer.into_body().collect().await);
                }
            };
            tokio::select! {
                biased;
                _ = conn.over() => {}
                () = second => {}
            }
        });
    }
    let answer = once().await;
    trace.note(format_args!("done {number} {}", code(answer.headers())));
    if let Some((true, breaks)) = fate.lost {
        // The server has given it to its kernel.
        let (_, mut body) = answer.into_parts();
        while let Some(Some(Ok(_))) = body.frame().now_or_never() {}
        trace.note(format_args!("lost {number} answer"));
        return lost(conn, breaks).await;
    }
    sim::carry_descriptors(&conn.server, &conn.caller);
    if conn.carry().await.is_err() {
        return;
    }
    let (frames, coming) = mpsc::unbounded_channel();
    let (head, mut body) = answer.into_parts();
    trace.note(format_args!("answer {number}"));
    if tell.send(Response::from_parts(head, coming)).is_err() {
        return;
    }
    if body.is_end_stream() {
        return;
    }
    loop {
        let next = match body.frame().now_or_never() {
            Some(next) => {
                // What it refers to came into being with it.
                sim::carry_descriptors(&conn.server, &conn.caller);
                next
            }
            None => {
                let ending = conn.over();
                let next = tokio::select! {
                    biased;
                    why = ending => Some(Err(Status::unavailable(why))),
                    next = body.frame() => next,
                };
                sim::carry_descriptors(&conn.server, &conn.caller);
                if next.as_ref().is_some_and(Result::is_ok) {
                    if is_watch(&method) {
                        sleep(conn.net.lateness()).await;
                    }
                    if conn.carry().await.is_err() {
                        return;
                    }
                }
                trace.note(format_args!("frame {number}"));
                next
            }
        };
        let Some(frame) = next else { return };
        if frames.send(frame).is_err() {
            return;
        }
    }
}

/// A message is lost: with its connection, or as if it had never been, until its caller gives up.
async fn lost(conn: &Conn, breaks: bool) {
    if breaks {
        conn.end("connection reset by peer");
    }
    std::future::pending().await
}

/// Watches are streams: nobody sends them twice.
fn is_watch(method: &str) -> bool {
    matches!(method, "MonitorConnections" | "Find")
}

fn code(headers: &http::HeaderMap) -> &str {
    headers.get("grpc-status").and_then(|code| code.to_str().ok()).unwrap_or("0")
}
