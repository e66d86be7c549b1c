//! What a process tells of itself: the `nsm.introspect.v1` service, and the memory behind it.
//!
//! Whoever holds state that people ask about is a [`Look`] and tells it on demand; nothing is copied before somebody
//! asks. Two things are remembered that would be gone otherwise, both bounded: the [`Trail`] of each connection (which
//! candidates there were, and why each was taken or not) and the requests that failed ([`Failures`]).
//!
//! It is served twice. On a Unix socket of its own, without TLS, for root and for the user that the process runs as,
//! attested by the kernel: it works when identities are what is broken, and a workload has no right to it. And beside
//! the role's own services over mTLS, for the SPIFFE IDs that the operator lists, by default none. It never holds a
//! token: segments are told without theirs.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    path::Path,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context as Poller, Poll},
    time::SystemTime,
};

use async_trait::async_trait;
use nsm_api::pb::{
    connection::Connection,
    introspect::{
        Decision, Failure, Item, Kind, LogLevel, Process, Query,
        introspect_server::{Introspect, IntrospectServer},
        item::What,
    },
};
use nsm_identity::clock;
use nsm_identity::{Source, SpiffeId, UnixPeer, UnixSocket};
use nsm_transport::{DialUrl, Peer, Pool};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, transport::server::Connected};

use crate::error::Error;

/// The name of the service, for gRPC health.
pub const SERVICE: &str = "nsm.introspect.v1.Introspect";

/// Decisions kept of one request.
const MAX_DECISIONS: usize = 16;
/// Characters kept of one text: peers choose names and labels.
const MAX_TEXT: usize = 200;
/// Characters kept of an error.
const MAX_ERROR: usize = 1000;
/// Failures kept of one client and service.
const MAX_OF_ONE: usize = 4;
/// Failures kept of one caller: it chooses ids and names of clients as it likes.
const MAX_OF_CALLER: usize = 32;
/// Failures kept in all.
const MAX_FAILURES: usize = 256;

/// What became of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It serves the connection.
    Taken,
    /// It would do, but another was first.
    Spare,
    /// It does not fit.
    Refused,
    /// It was asked and answered with an error.
    Failed,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Taken => "taken",
            Self::Spare => "spare",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// What elements decided on the way of one request, for [`crate::Context::trail`]. Bounded, whatever peers send.
#[derive(Debug, Default, Clone)]
pub struct Trail(Vec<Decision>);

impl Trail {
    /// Notes what became of a candidate; a later word on the same one replaces the earlier.
    pub fn note(&mut self, element: &'static str, candidate: &str, verdict: Verdict, why: impl AsRef<str>) {
        let decision = Decision {
            element: element.into(),
            candidate: brief(candidate, MAX_TEXT),
            verdict: verdict.name().into(),
            why: brief(why.as_ref(), MAX_TEXT),
        };
        let same = |d: &&mut Decision| d.element == element && d.candidate == decision.candidate;
        let full = self.0.len() >= MAX_DECISIONS;
        match self.0.iter_mut().find(same) {
            Some(known) => {
                // Why it was a candidate stays of interest when it is the one.
                let why = if verdict == Verdict::Taken && decision.why.is_empty() {
                    known.why.clone()
                } else {
                    decision.why
                };
                *known = Decision { verdict: decision.verdict, why, ..known.clone() };
            }
            None if !full => self.0.push(decision),
            // Who serves is said in any case.
            None if verdict == Verdict::Taken => {
                self.0.pop();
                self.0.push(decision);
            }
            None => {}
        }
    }

    /// Whether nothing was decided: a refresh keeps what was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn decisions(&self) -> Vec<Decision> {
        self.0.clone()
    }

    pub(crate) fn kept(&self) -> Box<[Decision]> {
        self.0.clone().into()
    }
}

/// The requests that failed lately, the newest last. Equal ones of a client in a row are one with a count. One
/// caller cannot push out the others' with fresh names and ids, and callers without number push out the loudest first.
#[derive(Debug, Default)]
pub struct Failures(Mutex<VecDeque<Failure>>);

/// What is known of a failed request besides its error.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// This hop.
    pub hop: String,
    /// Name of the path's first segment.
    pub client: String,
    /// Id of the path's first segment.
    pub connection: String,
    /// The service asked for.
    pub service: String,
    /// The SPIFFE ID that asked.
    pub caller: String,
}

impl Failures {
    /// Remembers one.
    pub fn note(&self, asked: Asked, error: &Error, trail: &Trail, now: SystemTime) {
        let now = millis(now);
        let failure = Failure {
            hop: brief(&asked.hop, MAX_TEXT),
            client: brief(&asked.client, MAX_TEXT),
            connection: brief(&asked.connection, MAX_TEXT),
            service: brief(&asked.service, MAX_TEXT),
            caller: brief(&asked.caller, MAX_TEXT),
            code: format!("{:?}", error.code),
            text: brief(&error.text, MAX_ERROR),
            hint: brief(error.hint.as_deref().unwrap_or_default(), MAX_ERROR),
            first: now,
            last: now,
            count: 1,
            decisions: trail.decisions(),
        };
        let mut ring = self.0.lock();
        let same = |f: &Failure| {
            (&f.client, &f.service, &f.connection, &f.caller)
                == (&failure.client, &failure.service, &failure.connection, &failure.caller)
        };
        let mut of_one = (0..ring.len()).filter(|&at| same(&ring[at]));
        let (oldest, count) = (of_one.next(), of_one.clone().count() + 1);
        let newest = of_one.next_back().or(oldest);
        if let Some(at) = newest
            && ring[at].text == failure.text
            && let Some(known) = ring.remove(at)
        {
            let first = known.first;
            let count = known.count.saturating_add(1);
            ring.push_back(Failure { first, count, ..failure });
            return;
        }
        if let Some(at) = oldest.filter(|_| count >= MAX_OF_ONE) {
            ring.remove(at);
        } else {
            let of_caller = ring.iter().filter(|f| f.caller == failure.caller).count();
            let leaves = if of_caller >= MAX_OF_CALLER {
                Some(failure.caller.clone())
            } else if ring.len() >= MAX_FAILURES {
                loudest(&ring)
            } else {
                None
            };
            if let Some(at) = leaves.and_then(|caller| ring.iter().position(|f| f.caller == caller)) {
                ring.remove(at);
            }
        }
        ring.push_back(failure);
    }

    /// All, the oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Failure> {
        self.0.lock().iter().cloned().collect()
    }
}

/// The caller with the most failures; among equals, the one with the oldest.
fn loudest(ring: &VecDeque<Failure>) -> Option<String> {
    let mut of = BTreeMap::<&str, (usize, Reverse<usize>)>::new();
    for (at, failure) in ring.iter().enumerate() {
        of.entry(&failure.caller).or_insert((0, Reverse(at))).0 += 1;
    }
    of.into_iter().max_by_key(|(_, rank)| *rank).map(|(caller, _)| caller.to_owned())
}

/// Whoever asked has left.
#[derive(Debug)]
pub struct Gone;

/// Where items are told to: a reader that is slow is waited for, nothing is buffered.
#[derive(Debug, Clone)]
pub struct Teller(mpsc::Sender<Result<Item, Status>>);

impl Teller {
    /// Tells one item.
    ///
    /// # Errors
    /// Nobody listens any more.
    pub async fn tell(&self, what: What) -> Result<(), Gone> {
        self.0.send(Ok(Item { what: Some(what) })).await.map_err(|_| Gone)
    }
}

/// Somebody who holds state that people ask about.
#[async_trait]
pub trait Look: Send + Sync + fmt::Debug {
    /// Tells what the query asks for.
    ///
    /// # Errors
    /// Nobody listens any more.
    async fn look(&self, query: &Query, to: &Teller) -> Result<(), Gone>;

    /// Adds to what the process says of itself.
    async fn add_to(&self, _query: &Query, _process: &mut Process) {}
}

/// Somebody whom this process cannot do without: asked whether he answers, when somebody verifies.
#[derive(Debug)]
pub struct Neighbour {
    /// Connections to him.
    pub pool: Pool,
    /// What he is to us: `registry`, `manager`.
    pub role: &'static str,
    /// Where he is.
    pub url: DialUrl,
}

impl Neighbour {
    /// How long he may take to answer.
    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);

    /// Asks him whether he serves.
    ///
    /// # Errors
    /// Why that is not so.
    pub async fn ask(&self) -> Result<(), String> {
        let channel =
            self.pool.get(&self.url, Self::PATIENCE).await.map_err(|e| nsm_identity::explain(&e))?;
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
        let asked = tokio::time::timeout(
            Self::PATIENCE,
            health.check(tonic_health::pb::HealthCheckRequest::default()),
        );
        match asked.await {
            Ok(Ok(answer))
                if answer.get_ref().status()
                    == tonic_health::pb::health_check_response::ServingStatus::Serving =>
            {
                Ok(())
            }
            Ok(Ok(answer)) => Err(format!("it says {}", answer.get_ref().status().as_str_name())),
            // It answers, and that is what was asked.
            Ok(Err(status)) if status.code() == Code::Unimplemented => Ok(()),
            Ok(Err(status)) => Err(format!("{:?}: {}", status.code(), status.message())),
            Err(_) => Err(format!("it takes connections and does not answer within {:?}", Self::PATIENCE)),
        }
    }
}

#[async_trait]
impl Look for Neighbour {
    async fn look(&self, _: &Query, _: &Teller) -> Result<(), Gone> {
        Ok(())
    }

    async fn add_to(&self, query: &Query, process: &mut Process) {
        if query.verify {
            let problem = self.ask().await.err().unwrap_or_default();
            let (role, url) = (self.role.to_owned(), self.url.to_string());
            process.neighbours.push(nsm_api::pb::introspect::Neighbour { role, url, problem });
        }
    }
}

/// Whether a query asks for this kind.
#[must_use]
pub fn wants(query: &Query, kind: Kind) -> bool {
    query.kinds.is_empty() || query.kinds().any(|k| k == kind)
}

/// Changes what is logged; answers with what it is then, or says what is wrong with the filter.
pub type SetLog = dyn Fn(&str) -> Result<String, String> + Send + Sync;

/// Whoever wants to see every answer that a process gives, and every end: an exporter of metrics.
pub trait Follow: Send + Sync {
    /// A request was answered with this.
    fn answered(&self, conn: &Connection);
    /// The connection with this id is gone.
    fn ended(&self, id: &str);
}

/// What one process tells of itself. One for each process, shared by all that have something to tell.
pub struct Inspector {
    process: Mutex<Process>,
    source: OnceLock<Source>,
    parts: Mutex<Vec<Arc<dyn Look>>>,
    failures: Failures,
    readers: OnceLock<BTreeSet<SpiffeId>>,
    log: OnceLock<Box<SetLog>>,
    follower: OnceLock<Box<dyn Follow>>,
    /// Whether anything asks already: no memory is spent on who it is before.
    named: AtomicBool,
}

impl fmt::Debug for Inspector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let process = self.process.lock();
        f.debug_struct("Inspector")
            .field("role", &process.role)
            .field("name", &process.name)
            .finish_non_exhaustive()
    }
}

impl Default for Inspector {
    fn default() -> Self {
        let process = Process {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            since: millis(clock::now()),
            status: "starting".into(),
            ..Process::default()
        };
        Self {
            process: Mutex::new(process),
            source: OnceLock::new(),
            parts: Mutex::default(),
            failures: Failures::default(),
            readers: OnceLock::new(),
            log: OnceLock::new(),
            follower: OnceLock::new(),
            named: AtomicBool::new(false),
        }
    }
}

impl Inspector {
    /// Says who this is; the first word counts.
    pub fn name(&self, role: &str, name: &str) {
        if !self.named.swap(true, Ordering::Relaxed) {
            let mut process = self.process.lock();
            (process.role, process.name) = (role.into(), name.into());
        }
    }

    /// Says what it waits for; empty: it is ready.
    pub fn status(&self, status: &str) {
        let mut process = self.process.lock();
        process.ready = status.is_empty();
        process.status = status.into();
    }

    /// Says where its identity comes from.
    pub fn identity(&self, source: &Source) {
        let _ = self.source.set(source.clone());
    }

    /// Says who may ask over mTLS; the first word counts.
    pub fn readers(&self, ids: impl IntoIterator<Item = SpiffeId>) {
        let _ = self.readers.set(ids.into_iter().collect());
    }

    /// Says how the log is changed.
    pub fn log(&self, set: Box<SetLog>) {
        let _ = self.log.set(set);
    }

    /// Says who sees every answer; the first word counts.
    pub fn follow(&self, follower: Box<dyn Follow>) {
        let _ = self.follower.set(follower);
    }

    pub(crate) fn answered(&self, conn: &Connection) {
        if let Some(follower) = self.follower.get() {
            follower.answered(conn);
        }
    }

    pub(crate) fn ended(&self, id: &str) {
        if let Some(follower) = self.follower.get() {
            follower.ended(id);
        }
    }

    /// Says what is logged.
    pub fn log_level(&self, filter: &str) {
        filter.clone_into(&mut self.process.lock().log_level);
    }

    /// Adds somebody who holds state.
    pub fn add(&self, part: Arc<dyn Look>) {
        self.parts.lock().push(part);
    }

    /// The requests that failed.
    #[must_use]
    pub fn failures(&self) -> &Failures {
        &self.failures
    }

    fn set_log(&self, filter: &str) -> Result<String, Status> {
        let set =
            self.log.get().ok_or_else(|| Status::unimplemented("this process has a fixed log level"))?;
        // A filter is as long as a message may be, and an error has to fit into the headers of HTTP/2.
        let now = set(filter).map_err(|error| Status::invalid_argument(brief(&error, MAX_ERROR)))?;
        Ok(now)
    }

    async fn look(&self, query: &Query, to: &Teller) -> Result<(), Gone> {
        let parts = self.parts.lock().clone();
        let mut process = self.process.lock().clone();
        if let Some(source) = self.source.get() {
            let identity = source.current();
            process.spiffe_id = identity.id().to_string();
            process.svid_expires = millis(identity.svid().not_after());
        }
        process.tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks() as u64;
        for part in &parts {
            part.add_to(query, &mut process).await;
        }
        to.tell(What::Process(process)).await?;
        for part in &parts {
            part.look(query, to).await?;
        }
        if wants(query, Kind::Failure) {
            for failure in self.failures.all() {
                to.tell(What::Failure(failure)).await?;
            }
        }
        Ok(())
    }

    /// The service for callers over mTLS: it only tells, and only those who may know.
    #[must_use]
    pub fn over_mtls(self: &Arc<Self>) -> IntrospectServer<impl Introspect + use<>> {
        IntrospectServer::new(Face { inspector: Arc::clone(self), owner: false })
            .max_decoding_message_size(nsm_transport::MAX_MESSAGE)
    }

    /// Serves root and the user that this process runs as, on a socket at `path`, until the answer is dropped; those of
    /// other containers, who may have the directory mounted, only with `containers`.
    ///
    /// # Errors
    /// The socket cannot be bound.
    pub fn serve_owner(
        self: &Arc<Self>,
        path: &Path,
        containers: bool,
    ) -> Result<Served, nsm_identity::Error> {
        // What anybody else would be refused, he need not even try.
        let socket = UnixSocket::bind_private(path)?;
        let failed = |source| nsm_identity::Error::Socket { path: path.into(), what: "listen at", source };
        let listener = socket.listener().map_err(failed)?;
        let face = IntrospectServer::new(Face { inspector: Arc::clone(self), owner: true })
            .max_decoding_message_size(nsm_transport::MAX_MESSAGE);
        let own = rustix::process::geteuid().as_raw();
        let callers = futures::stream::unfold(listener, move |listener| async move {
            loop {
                let stream = match listener.accept().await {
                    Ok((stream, _)) => stream,
                    Err(reason) => {
                        tracing::debug!(%reason, "a caller is not accepted");
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                        continue;
                    }
                };
                match UnixPeer::of(&stream).map(|peer| (is_owner(&peer, own, containers), peer)) {
                    Ok((Ok(()), _)) => return Some((Ok::<_, std::io::Error>(Owner(stream)), listener)),
                    Ok((Err(reason), peer)) => {
                        tracing::info!(uid = peer.uid(), %peer, reason, "may not look at this process");
                    }
                    Err(reason) => tracing::debug!(%reason, "a caller left at once"),
                }
            }
        });
        let serving = tokio::spawn(async move {
            let (reporter, health) = tonic_health::server::health_reporter();
            reporter.set_service_status(SERVICE, tonic_health::ServingStatus::Serving).await;
            let mut routes = tonic::service::RoutesBuilder::default();
            routes.add_service(face).add_service(health);
            routes.add_service(nsm_transport::Reflection::of(&[SERVICE]));
            let server =
                tonic::transport::Server::builder().max_concurrent_streams(64).add_routes(routes.routes());
            if let Err(error) = server.serve_with_incoming(callers).await {
                tracing::warn!(error = %crate::error::explain(&error), "this process cannot be looked at any more");
            }
        });
        Ok(Served { _socket: socket, serving: serving.abort_handle() })
    }
}

/// Whether a caller may know everything. Root of a container without a user namespace of its own is root to the kernel.
fn is_owner(peer: &UnixPeer, own: u32, containers: bool) -> Result<(), String> {
    if peer.uid() != 0 && peer.uid() != own {
        return Err("neither root nor the user that this process runs as".into());
    }
    let switch = "NSM_INTROSPECT_CONTAINERS=true lets it";
    match peer.is_contained() {
        _ if containers => Ok(()),
        Ok(false) => Ok(()),
        Ok(true) => Err(format!("in another container; {switch}")),
        Err(reason) => Err(format!("whether it is in another container cannot be told ({reason}); {switch}")),
    }
}

/// A socket that is served; it is gone when this is dropped.
#[derive(Debug)]
pub struct Served {
    _socket: UnixSocket,
    serving: tokio::task::AbortHandle,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

#[derive(Debug)]
struct Face {
    inspector: Arc<Inspector>,
    /// Whether the callers are those of the owner's socket.
    owner: bool,
}

impl Face {
    fn admit<T>(&self, request: &Request<T>) -> Result<(), Status> {
        if self.owner {
            return Ok(());
        }
        let peer = Peer::of(request)?.id().clone();
        if self.inspector.readers.get().is_some_and(|readers| readers.contains(&peer)) {
            return Ok(());
        }
        tracing::info!(%peer, "may not look at this process");
        Err(Error::new(Code::PermissionDenied, format!("{peer} may not look at this process"))
            .hint("list its SPIFFE ID in NSM_INTROSPECT_READERS of this process, or ask on its own socket as root")
            .into())
    }
}

#[tonic::async_trait]
impl Introspect for Face {
    type LookStream = ReceiverStream<Result<Item, Status>>;

    async fn look(&self, request: Request<Query>) -> Result<Response<Self::LookStream>, Status> {
        self.admit(&request)?;
        let query = request.into_inner();
        let (tell, items) = mpsc::channel(32);
        let inspector = Arc::clone(&self.inspector);
        tokio::spawn(async move {
            // An end of the stream says that all was told.
            let _ = inspector.look(&query, &Teller(tell)).await;
        });
        Ok(Response::new(ReceiverStream::new(items)))
    }

    async fn set_log_level(&self, request: Request<LogLevel>) -> Result<Response<LogLevel>, Status> {
        if !self.owner {
            return Err(Error::denied("the log is changed on the process's own socket only").into());
        }
        let filter = self.inspector.set_log(&request.into_inner().filter)?;
        Ok(Response::new(LogLevel { filter }))
    }
}

/// A caller that may know everything.
struct Owner(UnixStream);

impl Connected for Owner {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Owner {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Poller<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Owner {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Poller<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn millis(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn brief(text: &str, most: usize) -> String {
    text.chars().take(most).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(failures: &Failures, client: &str, text: &str, at: u64) {
        let asked = Asked { client: client.into(), service: "svc".into(), ..Asked::default() };
        let now = SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(at);
        failures.note(asked, &Error::not_found(text).hint("do"), &Trail::default(), now);
    }

    #[test]
    fn what_is_wrong_with_a_filter_is_told_in_few_words_however_long_it_is() {
        let inspector = Inspector::default();
        inspector.log(Box::new(|filter| Err(format!("log level {filter:?}: expected off"))));
        let refused = inspector.set_log(&"x".repeat(64 * 1024)).unwrap_err();
        assert_eq!((refused.code(), refused.message().len()), (Code::InvalidArgument, MAX_ERROR));
        assert!(refused.message().starts_with("log level \"xxx"));
    }

    #[test]
    fn equal_failures_are_one_and_nobody_pushes_out_the_others() {
        let failures = Failures::default();
        failed(&failures, "quiet", "once", 1);
        for at in 2..1000 {
            failed(&failures, "noisy", "again", at);
        }
        let all = failures.all();
        assert_eq!(
            all.iter().map(|f| (f.client.as_str(), f.count)).collect::<Vec<_>>(),
            [("quiet", 1), ("noisy", 998)]
        );
        assert_eq!((all[1].first, all[1].last, all[1].hint.as_str()), (2, 999, "do"));
        for at in 0..1000 {
            failed(&failures, "noisy", &format!("different {at}"), at);
        }
        let of = |client: &str| failures.all().iter().filter(|f| f.client == client).count();
        assert_eq!((of("quiet"), of("noisy")), (1, MAX_OF_ONE));
    }

    #[test]
    fn fresh_ids_of_one_caller_push_out_its_own_failures_only() {
        let failures = Failures::default();
        let fail = |caller: &str, id: usize| {
            let asked = Asked { caller: caller.into(), connection: id.to_string(), ..Asked::default() };
            let error = Error::not_found("x".repeat(10_000));
            failures.note(asked, &error, &Trail::default(), SystemTime::UNIX_EPOCH);
        };
        let of = |caller: &str| failures.all().iter().filter(|f| f.caller == caller).count();
        (0..2).for_each(|id| fail("quiet", id));
        (0..1000).for_each(|id| fail("noisy", id));
        assert_eq!((of("quiet"), of("noisy")), (2, MAX_OF_CALLER));
        let newest = failures.all().pop().unwrap().connection;
        assert_eq!(newest, "999", "its own oldest go first");
        // Many loud callers together: the loudest give way, and in the end all have as many.
        for caller in 0..20 {
            (0..100).for_each(|id| fail(&format!("noisy-{caller}"), id));
        }
        assert_eq!((failures.all().len(), of("quiet")), (MAX_FAILURES, 2));
        assert!(failures.all().iter().all(|f| f.text.len() <= MAX_ERROR));
        for caller in 0..10_000 {
            fail(&format!("one-{caller}"), 0);
        }
        assert_eq!(failures.all().len(), MAX_FAILURES);
    }

    #[test]
    fn a_trail_is_bounded_and_says_who_serves() {
        let mut trail = Trail::default();
        for i in 0..1000 {
            trail.note("discover", &format!("nse-{i}"), Verdict::Refused, "x".repeat(10_000));
        }
        trail.note("discover", "nse-7", Verdict::Failed, "no answer");
        trail.note("discover", "last", Verdict::Taken, "");
        let decisions = trail.decisions();
        assert_eq!(decisions.len(), MAX_DECISIONS);
        assert_eq!((decisions[7].verdict.as_str(), decisions[7].why.as_str()), ("failed", "no answer"));
        assert_eq!(decisions[MAX_DECISIONS - 1].candidate, "last");
        let mut kept = Trail::default();
        kept.note("discover", "a", Verdict::Spare, "labels fit");
        kept.note("discover", "a", Verdict::Taken, "");
        assert_eq!(kept.decisions()[0].why, "labels fit");
    }
}
