//! What endpoints, forwarders and managers use of a registry.
//!
//! A [`Registration`] is kept: refreshed at two thirds of its lifetime, tried again with growing and
//! jittered pauses when that fails, and made anew at once when the registry or anything on the way
//! to it is lost. That is seen by a watch of the own name, whose end is the only sign that every
//! registry gives (spec/registry.md 1.6, 2.10).
//!
//! An endpoint on a Unix socket is registered with a descriptor of the socket's file, and found with
//! one (2.12): nobody needs to share a file system.

use std::{
    borrow::Borrow,
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::{FutureExt as _, Stream, StreamExt, TryStreamExt, future::ready};
use nsm_api::{
    mechanism::InodeUrl,
    pb::registry::{NetworkService, NetworkServiceEndpoint},
};
use nsm_identity::{Source, clock};
use nsm_transport::{Connection, DialTarget, DialUrl, FdTable, FileId, Pool};
use rustix::fs::{Mode, OFlags};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    Error,
    expiry::time_of,
    manager::node_labels,
    path::RegistrationPath,
    rpc::{self, CALL, Remote, Upstream},
};

/// How long a descriptor may come after the message that names it.
const DESCRIPTOR: Duration = Duration::from_secs(2);
/// So many are waited for at once, in order: one that does not come holds up nobody for longer than itself.
const AT_ONCE: usize = 64;
/// How long a registry may take to tell a watch of what it has; longer than a manager lets news wait for a registration.
const TOLD: Duration = Duration::from_secs(5);

/// How a [`Client`] behaves.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// How long connecting may take.
    pub dial_timeout: Duration,
    /// The pause after a first failure; each further one doubles it. The real pause is between half
    /// of it and all of it.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
    /// Labels that registered endpoints get where they do not have them.
    pub labels: Vec<(String, String)>,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            dial_timeout: Duration::from_secs(2),
            first_pause: Duration::from_millis(20),
            longest_pause: Duration::from_secs(5),
            labels: node_labels(),
        }
    }
}

/// A client of one registry: the cluster's, or a node's manager. Clones share it.
#[derive(Debug, Clone)]
pub struct Client {
    upstream: Upstream,
    config: Arc<ClientConfig>,
}

/// An endpoint to be registered, and the file of its socket, if it listens on one.
#[derive(Debug)]
pub struct Listed {
    endpoint: NetworkServiceEndpoint,
    socket: Option<Arc<OwnedFd>>,
}

/// An endpoint that was found, and how to reach it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// As the registry tells of it.
    pub nse: NetworkServiceEndpoint,
    /// Whom to dial: the endpoint itself, or the manager of its node.
    pub dial: DialTarget,
}

/// What a watch of endpoints tells.
#[derive(Debug, Clone)]
pub enum EndpointEvent {
    /// It is there, new or changed.
    Present(Endpoint),
    /// It is gone.
    Gone(NetworkServiceEndpoint),
}

/// How a registration stands.
#[derive(Debug, Clone, PartialEq)]
pub struct State<T> {
    /// As the registry last answered it, with the URL that was asked for.
    pub item: Arc<T>,
    /// Why it is not registered at the moment, if it is not.
    pub problem: Option<String>,
}

/// Something that is kept registered until this is dropped or [`Registration::unregister`]ed. After a
/// drop the registry lets an endpoint expire.
#[derive(Debug)]
pub struct Registration<T> {
    state: watch::Receiver<State<T>>,
    end: Option<oneshot::Sender<oneshot::Sender<Result<(), Error>>>>,
    keeper: JoinHandle<()>,
}

impl Client {
    /// A client of the registry at `url`.
    #[must_use]
    pub fn new(pool: Pool, url: DialUrl, config: ClientConfig) -> Self {
        Self { upstream: Upstream { pool, url, dial: config.dial_timeout }, config: Arc::new(config) }
    }

    /// Registers a service and keeps it. Waits up to `patience` for a registry that is not there yet.
    ///
    /// # Errors
    /// The registry refuses, or is not there in time.
    pub async fn register_service(
        &self,
        service: NetworkService,
        patience: Duration,
    ) -> Result<Registration<NetworkService>, Error> {
        self.keep(service, None, patience).await
    }

    /// Registers an endpoint and keeps it, as [`Listed::open`] and [`Client::register_listed`] do.
    ///
    /// # Errors
    /// Theirs.
    pub async fn register_endpoint(
        &self,
        endpoint: NetworkServiceEndpoint,
        patience: Duration,
    ) -> Result<Registration<NetworkServiceEndpoint>, Error> {
        self.register_listed(Listed::open(endpoint)?, patience).await
    }

    /// Registers an endpoint and keeps it. Waits up to `patience` for a registry that is not there yet.
    ///
    /// # Errors
    /// The registry refuses, or is not there in time.
    pub async fn register_listed(
        &self,
        Listed { mut endpoint, socket }: Listed,
        patience: Duration,
    ) -> Result<Registration<NetworkServiceEndpoint>, Error> {
        for entry in endpoint.network_service_labels.values_mut() {
            for (label, value) in &self.config.labels {
                entry.labels.entry(label.clone()).or_insert_with(|| value.clone());
            }
        }
        self.keep(endpoint, socket, patience).await
    }

    /// The services that answer a query (spec/registry.md 2.2).
    ///
    /// # Errors
    /// The registry does not answer.
    pub async fn find_services(&self, query: NetworkService) -> Result<Vec<NetworkService>, Error> {
        let connection = self.upstream.connect().await?;
        let found = rpc::find(connection, query, false, Some(Instant::now() + CALL)).await?;
        found.map_ok(|(service, _)| service).try_collect().await
    }

    /// The services that answer a query, and every change: `true` when one is gone. The stream ends
    /// with an error when the registry is lost.
    ///
    /// # Errors
    /// The registry does not answer.
    pub async fn watch_services(
        &self,
        query: NetworkService,
    ) -> Result<impl Stream<Item = Result<(NetworkService, bool), Error>> + Send + Unpin + use<>, Error> {
        rpc::find(self.upstream.streams().await?, query, true, None).await
    }

    /// The endpoints that answer a query. One that cannot be reached in any way is left out, and
    /// said in the log.
    ///
    /// # Errors
    /// The registry does not answer.
    pub async fn find_endpoints(&self, query: NetworkServiceEndpoint) -> Result<Vec<Endpoint>, Error> {
        let connection = self.upstream.connect().await?;
        let fds = connection.fds().cloned();
        let found = rpc::find(connection, query, false, Some(Instant::now() + CALL)).await?;
        let endpoints = found.map_ok(|(nse, _)| Endpoint::found(nse, fds.clone()).map(Ok));
        endpoints.try_buffered(AT_ONCE).try_filter_map(|endpoint| ready(Ok(endpoint))).try_collect().await
    }

    /// The endpoints that answer a query, and every change. The stream ends with an error when the
    /// registry is lost.
    ///
    /// # Errors
    /// The registry does not answer.
    pub async fn watch_endpoints(
        &self,
        query: NetworkServiceEndpoint,
    ) -> Result<impl Stream<Item = Result<EndpointEvent, Error>> + Send + Unpin + use<>, Error> {
        let connection = self.upstream.streams().await?;
        let fds = connection.fds().cloned();
        let found = rpc::find(connection, query, true, None).await?;
        let events = found.map_ok(move |(nse, deleted)| {
            let fds = fds.clone();
            async move {
                Ok(match deleted {
                    true => Some(EndpointEvent::Gone(nse)),
                    false => Endpoint::found(nse, fds).await.map(EndpointEvent::Present),
                })
            }
        });
        Ok(events.try_buffered(AT_ONCE).try_filter_map(|event| ready(Ok(event))).boxed())
    }

    async fn keep<T: Kept>(
        &self,
        item: T,
        socket: Option<Arc<OwnedFd>>,
        patience: Duration,
    ) -> Result<Registration<T>, Error> {
        let mut keeper = Keeper {
            client: self.clone(),
            wanted: item,
            socket,
            pauses: Pauses::new(self.config.first_pause, self.config.longest_pause),
            known: false,
        };
        let deadline = Instant::now() + patience;
        let held = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let error = match timeout(left.min(CALL), keeper.register()).await {
                Ok(Ok(held)) => break held,
                Ok(Err(error)) => error,
                Err(_) => Error::Deadline { name: keeper.wanted.name().to_owned() },
            };
            let pause = keeper.pauses.next(rand::random());
            if !error.is_transient() || Instant::now() + pause >= deadline {
                return Err(error);
            }
            debug!(kind = T::KIND, name = keeper.wanted.name(), %error, "not registered yet");
            sleep(pause).await;
        };
        keeper.pauses.reset();
        let (sender, state) = watch::channel(State { item: held.item.clone(), problem: None });
        let (end, ended) = oneshot::channel();
        let keeper = tokio::spawn(keeper.run(held, sender, ended));
        Ok(Registration { state, end: Some(end), keeper })
    }
}

impl Listed {
    /// Takes an endpoint whose URL is `tcp://host:port`, or the `unix:///path` of a socket that listens already, if the
    /// registry is reached over a Unix socket. The socket's file is held from now on: its path is not needed again.
    ///
    /// # Errors
    /// The socket cannot be opened.
    pub fn open(endpoint: NetworkServiceEndpoint) -> Result<Self, Error> {
        let socket = match endpoint.url.parse() {
            Ok(DialUrl::Unix(path)) => {
                let opened =
                    rustix::fs::open(Path::new(&path), OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
                let failed = |source: rustix::io::Errno| Error::Socket {
                    path: path.clone(),
                    source: Arc::new(source.into()),
                };
                Some(Arc::new(opened.map_err(failed)?))
            }
            _ => None,
        };
        Ok(Self { endpoint, socket })
    }
}

impl<T> Registration<T> {
    /// As the registry last answered it.
    #[must_use]
    pub fn item(&self) -> Arc<T> {
        self.state.borrow().item.clone()
    }

    /// Follows how the registration stands.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State<T>> {
        self.state.clone()
    }

    /// Ends the registration.
    ///
    /// # Errors
    /// The registry was not told; it lets an endpoint expire.
    pub async fn unregister(mut self) -> Result<(), Error> {
        let (sender, done) = oneshot::channel();
        let sent = self.end.take().is_some_and(|end| end.send(sender).is_ok());
        match done.await {
            Ok(result) if sent => result,
            _ => Err(Error::Panicked),
        }
    }
}

impl<T> Drop for Registration<T> {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Endpoint {
    /// Has its expiration time passed? Discovery by service drops such endpoints
    /// (spec/control-plane.md 8.2).
    #[must_use]
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.nse.expiration_time.as_ref().is_some_and(|end| time_of(end) <= now)
    }

    /// An endpoint that is reached by its URL; `None`, and a line in the log, if nobody can dial it.
    pub(crate) fn dialed_by_url(nse: NetworkServiceEndpoint) -> Option<Self> {
        match nse.url.parse::<DialUrl>() {
            Ok(url) => Some(Self { nse, dial: url.into() }),
            Err(reason) => {
                warn!(name = nse.name, %reason, "an endpoint is left out: it cannot be dialed");
                None
            }
        }
    }

    async fn found(nse: NetworkServiceEndpoint, fds: Option<FdTable>) -> Option<Self> {
        let (Ok(inode), Some(fds)) = (nse.url.parse::<InodeUrl>(), fds) else {
            return Self::dialed_by_url(nse);
        };
        let file = FileId { dev: inode.dev, ino: inode.ino };
        match fds.take(file, Instant::now() + DESCRIPTOR).await {
            Ok(socket) => Some(Self { nse, dial: socket.into() }),
            Err(reason) => {
                warn!(name = nse.name, %reason, "an endpoint is left out: it cannot be dialed");
                None
            }
        }
    }
}

impl Borrow<NetworkServiceEndpoint> for Endpoint {
    fn borrow(&self) -> &NetworkServiceEndpoint {
        &self.nse
    }
}

/// What a [`Keeper`] must know of a kind of object.
trait Kept: Remote {
    /// When it ends unless it is refreshed.
    fn expires(&self) -> Option<SystemTime>;
    /// An example that only this object answers.
    fn example(name: &str) -> Self;
    /// Prepares it for a connection: what the registry cannot reach by name, a socket, goes along as a descriptor.
    fn prepare(&mut self, connection: &Connection, socket: Option<&Arc<OwnedFd>>) -> Result<(), Error>;
    /// Takes from an answer what a later registration should repeat.
    fn learn(&mut self, answer: &Self);
    /// Puts back into an answer what [`Kept::prepare`] changed.
    fn restore(&mut self, wanted: &Self);
}

impl Kept for NetworkService {
    fn expires(&self) -> Option<SystemTime> {
        None
    }

    fn example(name: &str) -> Self {
        Self { name: name.to_owned(), ..Default::default() }
    }

    fn prepare(&mut self, _: &Connection, _: Option<&Arc<OwnedFd>>) -> Result<(), Error> {
        Ok(())
    }

    fn learn(&mut self, _: &Self) {}

    fn restore(&mut self, _: &Self) {}
}

impl Kept for NetworkServiceEndpoint {
    fn expires(&self) -> Option<SystemTime> {
        self.expiration_time.as_ref().map(time_of)
    }

    fn example(name: &str) -> Self {
        Self { name: name.to_owned(), ..Default::default() }
    }

    fn prepare(&mut self, connection: &Connection, socket: Option<&Arc<OwnedFd>>) -> Result<(), Error> {
        let Some(socket) = socket else { return Ok(()) };
        let stat = rustix::fs::fstat(socket).map_err(|source| Error::Socket {
            path: self.url.clone().into(),
            source: Arc::new(source.into()),
        })?;
        if !connection.send_fd(Arc::clone(socket)) {
            return Err(Error::NotLocal { url: self.url.clone() });
        }
        self.url = InodeUrl { dev: stat.st_dev, ino: stat.st_ino }.to_string();
        Ok(())
    }

    fn learn(&mut self, answer: &Self) {
        // A registry that forgot everything learns it again from its registrants.
        self.initial_registration_time = answer.initial_registration_time;
    }

    fn restore(&mut self, wanted: &Self) {
        self.url.clone_from(&wanted.url);
    }
}

/// Keeps one object registered.
struct Keeper<T> {
    client: Client,
    wanted: T,
    /// The socket's file.
    socket: Option<Arc<OwnedFd>>,
    pauses: Pauses,
    known: bool,
}

/// A registration as it was answered, and the connection it was made over.
struct Held<T> {
    item: Arc<T>,
    connection: Connection,
}

/// Why a registration is made anew.
enum Cause {
    Refresh,
    Lost(String),
}

impl<T: Kept> Keeper<T> {
    async fn register(&mut self) -> Result<Held<T>, Error> {
        let connection = self.client.upstream.connect().await?;
        let mut item = self.wanted.clone();
        item.prepare(&connection, self.socket.as_ref())?;
        let mut path = RegistrationPath::default();
        let deadline = Instant::now() + CALL;
        let mut answer = rpc::register(&connection, &mut path, item, deadline, self.known).await?;
        self.known = true;
        self.wanted.learn(&answer);
        answer.restore(&self.wanted);
        Ok(Held { item: Arc::new(answer), connection })
    }

    async fn run(
        mut self,
        mut held: Held<T>,
        state: watch::Sender<State<T>>,
        mut end: oneshot::Receiver<oneshot::Sender<Result<(), Error>>>,
    ) {
        loop {
            let since = Instant::now();
            let name = self.wanted.name().to_owned();
            let cause = tokio::select! {
                done = &mut end => return self.finish(done.ok()).await,
                cause = lost::<T>(held.connection.clone(), &name) => cause,
                () = due(held.item.expires(), self.client.upstream.pool.source(), clock::now) => Cause::Refresh,
            };
            // One that is lost as soon as it is made must not spin.
            if since.elapsed() > self.client.config.longest_pause {
                self.pauses.reset();
            }
            let mut pause = match cause {
                Cause::Refresh => Duration::ZERO,
                Cause::Lost(reason) => {
                    info!(kind = T::KIND, name, reason, "the registration is lost and made anew");
                    state.send_modify(|state| state.problem = Some(reason));
                    self.pauses.next(rand::random())
                }
            };
            let mut told = String::new();
            held = loop {
                let attempt = async {
                    sleep(pause).await;
                    match timeout(CALL, self.register()).await {
                        Ok(result) => result,
                        Err(_) => Err(Error::Deadline { name: name.clone() }),
                    }
                };
                let result = tokio::select! {
                    done = &mut end => return self.finish(done.ok()).await,
                    result = attempt => result,
                };
                match result {
                    Ok(held) => break held,
                    Err(error) => {
                        let reason = tonic::Status::from(error).message().to_owned();
                        match std::mem::replace(&mut told, reason.clone()) == reason {
                            true => debug!(kind = T::KIND, name, reason, "still not registered"),
                            false => warn!(kind = T::KIND, name, reason, "not registered; it is tried again"),
                        }
                        state.send_modify(|state| state.problem = Some(reason));
                    }
                }
                pause = self.pauses.next(rand::random());
            };
            state.send_replace(State { item: held.item.clone(), problem: None });
        }
    }

    /// Unregisters if somebody asked for it, and not merely dropped the registration.
    async fn finish(self, done: Option<oneshot::Sender<Result<(), Error>>>) {
        let Some(done) = done else { return };
        let unregister = async {
            let connection = self.client.upstream.connect().await?;
            let item = T::example(self.wanted.name());
            rpc::unregister(&connection, &mut RegistrationPath::default(), item, Instant::now() + CALL).await
        };
        // Nobody may be waiting any more.
        let _ = done.send(unregister.await);
    }
}

/// Waits until the registry, or anything on the way to it, is lost or loses this registration.
async fn lost<T: Kept>(connection: Connection, name: &str) -> Cause {
    let mut events = match rpc::find(connection, T::example(name), true, None).await {
        Ok(events) => events,
        Err(error) => return Cause::Lost(tonic::Status::from(error).message().to_owned()),
    };
    // What was dropped before the watch began is not told to have gone: it is not told of at all.
    let told = sleep(TOLD);
    tokio::pin!(told);
    let mut is_there = false;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = &mut told, if !is_there => return Cause::Lost("the registry does not have it".to_owned()),
        };
        match event {
            Some(Ok((item, true))) if item.name() == name => {
                return Cause::Lost("the registry dropped it".to_owned());
            }
            Some(Ok((item, false))) => is_there |= item.name() == name,
            Some(Ok(_)) => {}
            Some(Err(error)) => return Cause::Lost(tonic::Status::from(error).message().to_owned()),
            None => return Cause::Lost("the registry ended its watch".to_owned()),
        }
    }
}

/// Returns when a registration is to be refreshed. With a new identity it is looked at the clock again: if that has jumped
/// ahead, whoever compares it with what was registered takes it for over.
async fn due(end: Option<SystemTime>, source: &Source, now: impl Fn() -> SystemTime) {
    let Some(end) = end else { return std::future::pending().await };
    let mut identity = source.current();
    let mut at = Instant::now() + refresh_in(now(), end);
    loop {
        tokio::select! {
            () = sleep_until(at) => return,
            renewed = source.changed(&identity) => identity = renewed,
        }
        at = at.min(Instant::now() + refresh_in(now(), end));
    }
}

/// Two thirds of the time that is left (spec/registry.md 2.7). A second at least: clocks that differ
/// must not make a storm.
fn refresh_in(now: SystemTime, end: SystemTime) -> Duration {
    (end.duration_since(now).unwrap_or_default() * 2 / 3).max(Duration::from_secs(1))
}

/// Growing pauses.
#[derive(Debug, Clone)]
struct Pauses {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Pauses {
    fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    fn reset(&mut self) {
        self.next = self.first;
    }

    /// The next pause; `jitter` is from 0 to 1 and keeps those who failed together apart.
    fn next(&mut self, jitter: f64) -> Duration {
        let pause = self.next;
        self.next = (self.next * 2).min(self.longest);
        pause / 2 + (pause / 2).mul_f64(jitter.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use nsm_identity::ca::Authority;

    use super::*;

    #[test]
    fn refreshes_come_at_two_thirds() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let at = |s| SystemTime::UNIX_EPOCH + Duration::from_secs(s);
        assert_eq!(refresh_in(now, at(1060)), Duration::from_secs(40));
        assert_eq!(refresh_in(now, at(1001)), Duration::from_secs(1));
        assert_eq!(refresh_in(now, at(5)), Duration::from_secs(1), "a clock that is behind");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_registered_is_looked_at_anew_when_a_clock_has_jumped() {
        let authority = Authority::new("test".parse().expect("a domain"), clock::now()).expect("a CA");
        let identity = || {
            let id = "spiffe://test/a".parse().expect("an id");
            Arc::new(authority.identity(&id, Duration::from_secs(3600), clock::now()).expect("issued"))
        };
        let (renew, current) = watch::channel(identity());
        let source = Source::from_watch(current);
        let (begin, jumped) = (Instant::now(), Cell::new(0));
        let now = || SystemTime::UNIX_EPOCH + begin.elapsed() + Duration::from_secs(jumped.get());
        let end = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(60));
        let after = |jump: u64| {
            jumped.set(0);
            let (renew, identity, jumped) = (&renew, &identity, &jumped);
            async move {
                sleep(Duration::from_secs(5)).await;
                jumped.set(jump);
                renew.send_replace(identity());
                std::future::pending::<()>().await;
            }
        };
        for (jump, expected) in [(0, 40), (30, 5 + 25 * 2 / 3), (7200, 6)] {
            let began = Instant::now();
            let end = end.map(|end| end + begin.elapsed());
            tokio::select! {
                () = due(end, &source, now) => {}
                () = after(jump) => {}
            }
            assert_eq!(began.elapsed().as_secs(), expected, "a jump of {jump} s");
        }
    }

    #[test]
    fn pauses_grow_to_a_bound_and_start_over() {
        let ms = Duration::from_millis;
        let mut pauses = Pauses::new(ms(200), ms(1000));
        let all: Vec<_> = (0..5).map(|_| pauses.next(1.0)).collect();
        assert_eq!(all, [ms(200), ms(400), ms(800), ms(1000), ms(1000)]);
        pauses.reset();
        assert_eq!((pauses.next(0.0), pauses.next(0.5)), (ms(100), ms(300)));
    }
}
