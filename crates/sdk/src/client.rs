//! An edge client: asks for wires, keeps them up, closes them.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream, stream::BoxStream};
use nsm_api::{
    mechanism::{InodeUrl, key},
    nsurl::NsUrl,
    pb::{
        connection::{Connection, MonitorScopeSelector, Path, PathSegment, State},
        connectioncontext::{ConnectionContext, DnsContext, IpContext},
        networkservice::NetworkServiceRequest,
    },
    planted,
};
use nsm_dns::Names;
use nsm_identity::clock;
use nsm_mesh::{
    Answer, Call, Connections, Context, Element, Error, Next, NextHop, Result, chain,
    dial::Dial,
    metrics::Metrics,
    monitor::{Hub, Monitor, Viewer},
    refresh, server,
};
use nsm_transport::{DialTarget, Pool};
use tokio::{
    sync::{Notify, watch},
    task::AbortHandle,
    time::Instant,
};

use crate::{
    dns::DnsContexts,
    failures::Failures,
    liveness::{self, Liveness, Verdict},
    own_end::{ClientEnd, OwnNamespace},
    predecessor::Predecessor,
    prefixes::{AwarenessGroups, OwnPrefixes},
};

/// How long a wire that the mesh calls down is asked for as it was, before another endpoint may take its place.
const PATIENCE: Duration = Duration::from_secs(5);
/// As above, when the endpoint is not found. It may be gone, or a registry has just come back and has not heard of it.
const UNFOUND: Duration = Duration::from_secs(1);
/// As above, when the hop beside the endpoint does not reach it: its process is gone, and the time is for a new one.
const UNREACHED: Duration = Duration::from_millis(500);
/// How soon a wire that is said to be down, but carries packets, is probed again.
const SOON: Duration = Duration::from_millis(5);
/// A wire that goes down sooner than this after it was asked for has not come up in truth.
const SETTLED: Duration = Duration::from_secs(1);
/// How long a wire at most waits that the mesh wants asked for again: whoever wants that may close it a second later.
const WHILE_IT_STANDS: Duration = Duration::from_millis(500);

/// What a client is told from outside.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Name in the path, and prefix of connection ids: unique in the mesh.
    pub name: String,
    /// The manager of this node.
    pub connect_to: DialTarget,
    /// How long connecting to the manager may take.
    pub dial_timeout: Duration,
    /// How long one try of a request may take.
    pub request_timeout: Duration,
    /// Labels of every request, beside those of the URL.
    pub labels: BTreeMap<String, String>,
    /// Services whose wires may have overlapping addresses.
    pub awareness_groups: AwarenessGroups,
    /// Whether an earlier process of our name may have left wires at the manager, to go on with: an init container, or
    /// one of us that was killed. Asking costs a call for each wire.
    pub takes_over: bool,
    /// How wires are probed; `None`: they are not. The process has to be in the namespace of its wires.
    pub liveness: Option<Liveness>,
    /// Whether all wires are asked for when the endpoint of one wants that (spec/control-plane.md 10.2): for a process
    /// whose wires are one network, where what changes behind one of them concerns the others.
    pub refreshes_together: bool,
    /// Whom to tell of the DNS servers that wires bring.
    pub names: Option<Arc<Names>>,
}

/// An edge client. Its chain is a list that one can read: see [`Client::new`].
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    connections: Arc<Connections>,
    hub: Arc<Hub>,
    pool: Pool,
    namespace: InodeUrl,
    prefixes: OwnPrefixes,
    /// Of which wire the endpoint has wanted a request last.
    wanted: watch::Sender<String>,
}

/// Sends every request to the same place.
#[derive(Debug)]
pub struct To(pub NextHop);

#[async_trait::async_trait]
impl Element for To {
    fn name(&self) -> &'static str {
        "to"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        cx.next_hop = Some(self.0.clone());
        next.request(cx, request).await
    }

    async fn close_forgotten(&self, cx: &mut Context<'_>, conn: Connection, next: Next<'_>) -> Result<()> {
        cx.next_hop = Some(self.0.clone());
        next.close_forgotten(cx, conn).await
    }
}

impl Client {
    /// A client whose wires end in `namespace`.
    #[must_use]
    pub fn new(config: ClientConfig, pool: Pool, namespace: OwnNamespace) -> Arc<Self> {
        Self::measured(config, pool, namespace, Arc::default())
    }

    /// A client that counts, and tells of its wires, where others of its process do.
    #[must_use]
    pub fn measured(
        config: ClientConfig,
        pool: Pool,
        namespace: OwnNamespace,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        let hub = Arc::new(Hub::default());
        let inode = namespace.url();
        let dial =
            Dial::new(pool.clone(), &config.name, Arc::clone(&hub), config.dial_timeout).checking_answers();
        let prefixes = OwnPrefixes::new(config.awareness_groups.clone());
        let chain = chain![
            Monitor { hub: Arc::clone(&hub), terminates: false }, // what the mesh tells of our wires
            prefixes.clone(),                                     // what our other wires use already
            DnsContexts(config.names.clone()),                    // what names they bring
            ClientEnd(namespace),                                 // where they end
            To(config.connect_to.clone().into()),                 // the manager of this node
            dial,
        ];
        let connections = Connections::asking(&config.name, chain, metrics);
        server::tell(&connections, Arc::clone(&hub));
        let wanted = watch::Sender::new(String::new());
        Arc::new(Self { config, connections, hub, pool, namespace: inode, prefixes, wanted })
    }

    /// Asks for a wire once.
    ///
    /// # Errors
    /// What the mesh says; nothing is left then.
    pub async fn request(self: &Arc<Self>, index: usize, url: &NsUrl) -> Result<Wire> {
        let id = self.id(index);
        let left = self.left_behind(&id, url, &mut None).await;
        self.request_with(&id, url, left).await
    }

    /// Asks until the wire is there, one try at a time, with growing pauses; `failed` hears of every try that failed.
    pub async fn wire(
        self: &Arc<Self>,
        index: usize,
        url: &NsUrl,
        mut failed: impl FnMut(&Failures),
    ) -> Wire {
        let id = self.id(index);
        let mut failures = Failures::new(&url.service, url.to_string(), std::time::Instant::now());
        let mut predecessor = None;
        let mut give_up = GiveUp::default();
        loop {
            // Built afresh each time: what was left may have gone down meanwhile.
            let mut left = self.left_behind(&id, url, &mut predecessor).await;
            if give_up.is_due() {
                left.iter_mut().for_each(reselect);
            }
            match self.request_with(&id, url, left).await {
                Ok(wire) => return wire,
                Err(error) => {
                    give_up.after(&error, &Connection::default());
                    failures.add(error);
                    failed(&failures);
                }
            }
            tokio::time::sleep(refresh::backoff(failures.tries() - 1, rand::random())).await;
        }
    }

    /// The connection id of a wire.
    fn id(&self, index: usize) -> String {
        format!("{}-{index}", self.config.name)
    }

    async fn request_with(self: &Arc<Self>, id: &str, url: &NsUrl, left: Option<Connection>) -> Result<Wire> {
        self.prefixes.asked_for(id, url);
        let mut request = self.first_request(id, url);
        if let Some(left) = left {
            tracing::info!(connection = %id, "going on with the wire of an earlier process");
            // What has a name already does not get another.
            if let Some(mechanism) = &left.mechanism
                && let Some(name) = mechanism.get(key::NAME)
            {
                request.mechanism_preferences.iter_mut().for_each(|m| m.set(key::NAME, name));
            }
            request.connection = Some(left);
        }
        let answer = self.ask(request.clone()).await?;
        Ok(Wire::keep(Arc::clone(self), id.to_owned(), request, answer))
    }

    /// Asks for a wire as it is, for no longer than packets pass. `Err`: they do not, and why.
    async fn ask_meanwhile(
        &self,
        request: NetworkServiceRequest,
        probe: &mut Probe,
    ) -> Result<Result<Answer>, String> {
        tokio::select! {
            biased;
            asked = self.ask(request) => Ok(asked),
            why = probe.falls_silent() => Err(why),
        }
    }

    async fn ask(&self, request: NetworkServiceRequest) -> Result<Answer> {
        let call = Call { deadline: Some(Instant::now() + self.config.request_timeout), ..Call::default() };
        self.connections.request(call, request).await
    }

    /// The connection of this id that an earlier process of our name did not close, if it is what is wanted now: the
    /// path makes every hop recognise it. If it is down and packets do not pass, it is asked for anew
    /// (spec/control-plane.md 10.3).
    async fn left_behind(
        &self,
        id: &str,
        url: &NsUrl,
        predecessor: &mut Option<Predecessor>,
    ) -> Option<Connection> {
        if !self.config.takes_over {
            return None;
        }
        if predecessor.is_none() {
            let asked = Predecessor::ask(&self.pool, &self.config.connect_to, id, self.config.dial_timeout);
            match tokio::time::timeout(self.config.request_timeout, asked).await {
                Ok(Ok(found)) => *predecessor = Some(found),
                // The request itself will tell what is wrong with the manager.
                Ok(Err(error)) => tracing::debug!(%error, "the manager does not tell what is left"),
                Err(_) => tracing::debug!("the manager does not tell in time what is left"),
            }
        }
        let mut conn = predecessor.as_mut()?.connection(id, url, self.namespace)?;
        if conn.state() == State::Down && !self.passes_packets(&conn).await {
            reselect(&mut conn);
        }
        Some(conn)
    }

    /// Whether it is known that packets do not pass through a wire that the mesh calls down; answers took `slowest` at
    /// most so far.
    async fn is_dead(&self, conn: &Connection, slowest: Option<Duration>) -> bool {
        let Some(liveness) = self.config.liveness else { return false };
        let (id, endpoint) = (&conn.id, &conn.network_service_endpoint_name);
        match liveness.hurried(slowest).check(conn).await {
            Verdict::Dead(why) | Verdict::Gone(why) => {
                tracing::info!(connection = id, endpoint, %why, "the mesh says that the wire is down; asking for another endpoint");
                true
            }
            Verdict::Alive | Verdict::Unknown(_) => {
                tracing::info!(
                    connection = id,
                    endpoint,
                    "the mesh says that the wire is down, but packets pass; asking for it as it is"
                );
                false
            }
        }
    }

    /// Whether it is known that packets pass.
    async fn passes_packets(&self, conn: &Connection) -> bool {
        match &self.config.liveness {
            Some(liveness) => liveness.check(conn).await == Verdict::Alive,
            None => false,
        }
    }

    fn first_request(&self, id: &str, url: &NsUrl) -> NetworkServiceRequest {
        let mut labels = url.labels.clone();
        for (key, value) in &self.config.labels {
            labels.entry(key.clone()).or_insert_with(|| value.clone());
        }
        let segment = PathSegment { name: self.config.name.clone(), id: id.into(), ..PathSegment::default() };
        NetworkServiceRequest {
            connection: Some(Connection {
                id: id.into(),
                network_service: url.service.clone(),
                labels,
                // Upstream's endpoints read these without asking whether they are there.
                context: Some(ConnectionContext {
                    ip_context: Some(IpContext::default()),
                    dns_context: Some(DnsContext::default()),
                    ..ConnectionContext::default()
                }),
                path: Some(Path { unknown: None, index: 0, path_segments: vec![segment] }),
                ..Connection::default()
            }),
            mechanism_preferences: vec![url.preference()],
            ..NetworkServiceRequest::default()
        }
    }
}

/// A wire that is kept up: refreshed before its tokens expire, asked for again when the mesh says it is down.
/// Dropping it stops that; [`Wire::close`] also tells the mesh.
pub struct Wire {
    client: Arc<Client>,
    id: String,
    keeper: AbortHandle,
    now: Arc<Notify>,
    connection: watch::Receiver<Connection>,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Wire {
    fn keep(client: Arc<Client>, id: String, first: NetworkServiceRequest, answer: Answer) -> Self {
        let (tell, connection) = watch::channel(answer.connection);
        let now = Arc::new(Notify::new());
        let keeping = keep(Arc::clone(&client), id.clone(), first, tell, Arc::clone(&now));
        let keeper = tokio::spawn(keeping).abort_handle();
        Self { client, id, keeper, now, connection }
    }

    /// The connection id, `<name>-<index>`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The connection as last answered.
    #[must_use]
    pub fn connection(&self) -> Connection {
        self.connection.borrow().clone()
    }

    /// Has every hop asked now, not only when the tokens have lived long enough, and waits until they have answered.
    pub async fn refresh(&self) {
        let mut answered = self.connection.clone();
        answered.mark_unchanged();
        self.now.notify_one();
        // The keeper ends with the wire, and we borrow that.
        let _ = answered.changed().await;
    }

    /// Waits until an answer is so, the last one included.
    pub async fn until(&self, is_so: impl FnMut(&Connection) -> bool) {
        let mut answered = self.connection.clone();
        // The keeper ends with the wire, and we borrow that.
        let _ = answered.wait_for(is_so).await;
    }

    /// Closes it, all the way to the endpoint.
    ///
    /// # Errors
    /// What could not be told; the mesh clears that by itself when the tokens expire.
    pub async fn close(self) -> Result<()> {
        self.keeper.abort();
        let call =
            Call { deadline: Some(Instant::now() + self.client.config.request_timeout), ..Call::default() };
        self.client.connections.close(call, self.connection()).await
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// When to stop asking for a wire as it was. A restarted hop takes it up again as it is, and packets flow meanwhile: only
/// when that does not come about the mesh shall choose another.
#[derive(Debug, Default)]
struct GiveUp(Option<Instant>);

impl GiveUp {
    /// A try for this connection has failed.
    fn after(&mut self, error: &Error, conn: &Connection) {
        // Who does not get as far as the manager has asked nobody, and the wire may be as it was.
        let unasked = error.code == tonic::Code::Unavailable && error.hop.as_deref() != Some("");
        if unasked {
            return;
        }
        let patience = match error.code {
            tonic::Code::NotFound => UNFOUND,
            // The hop before the endpoint is beside it, and does not reach it.
            tonic::Code::Unavailable if beside_endpoint(conn).is_some_and(|hop| error.is_of(hop)) => {
                UNREACHED
            }
            _ => PATIENCE,
        };
        let at = Instant::now() + patience;
        self.0 = Some(self.0.map_or(at, |earlier| at.min(earlier)));
    }

    /// A pause that ends when it is due, if it would be longer.
    fn before(&self, pause: Duration) -> Duration {
        let left =
            self.0.map(|at| at.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero());
        left.map_or(pause, |left| left.min(pause))
    }

    fn is_due(&self) -> bool {
        self.0.is_some_and(|at| Instant::now() >= at)
    }
}

/// Why a wire is asked for again.
enum Woke {
    /// Its tokens have lived long enough.
    Refresh,
    /// The mesh says that it is down, or, while it stands, asks for a request.
    Down { stands: bool },
    /// Packets do not pass.
    Dead(String),
}

async fn keep(
    client: Arc<Client>,
    id: String,
    first: NetworkServiceRequest,
    tell: watch::Sender<Connection>,
    now: Arc<Notify>,
) {
    let own = PathSegment { name: client.config.name.clone(), id: id.clone(), ..PathSegment::default() };
    let selector = MonitorScopeSelector { path_segments: vec![own], ..MonitorScopeSelector::default() };
    let mut events = None;
    let mut attempt = 0;
    let mut give_up = GiveUp::default();
    let mut dead = false;
    let mut fell = false;
    let mut probe = Probe::of(client.config.liveness, &tell.borrow());
    let (mut up_since, mut falls) = (Instant::now(), 0);
    let mut others = client.wanted.subscribe();
    loop {
        if attempt == 0 {
            let conn = tell.borrow().clone();
            let wait = match planted::is("nobody refreshes") {
                true => Duration::MAX,
                false => refresh::wait(&conn, clock::now()).unwrap_or(Duration::from_secs(10)),
            };
            let woke = tokio::select! {
                () = tokio::time::sleep(wait) => Woke::Refresh,
                why = wants_a_request(&client.hub, &selector, &id, &mut events) => {
                    let stands = why == State::RefreshRequested;
                    if stands && client.config.refreshes_together {
                        client.wanted.send_replace(id.clone());
                    }
                    Woke::Down { stands }
                }
                () = another_is_wanted(&mut others, &id) => Woke::Refresh,
                () = now.notified() => Woke::Refresh,
                why = probe.dies() => Woke::Dead(why),
            };
            let pause;
            match woke {
                Woke::Refresh => pause = Duration::ZERO,
                Woke::Down { stands } => {
                    fell = true;
                    let most = if stands { WHILE_IT_STANDS } else { Duration::MAX };
                    (pause, falls) = after_fall(up_since.elapsed(), falls, most, rand::random());
                    dead = client.is_dead(&conn, probe.slowest()).await;
                    // Packets may stop only now: who was killed first, its pod after it.
                    probe = probe.hurried(client.config.liveness, &conn);
                }
                Woke::Dead(why) => {
                    let lasted = if probe.slowest().is_some() { SETTLED } else { Duration::ZERO };
                    (pause, falls) = after_fall(lasted, falls, Duration::MAX, rand::random());
                    dead = true;
                    tracing::warn!(connection = %id, endpoint = conn.network_service_endpoint_name, %why,
                        "packets do not pass; asking for another endpoint (where endpoints do not answer pings: NSM_LIVENESS_CHECK_ENABLED=false)");
                }
            }
            // Not even for nothing: a timer rounds up to the next millisecond.
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
        } else {
            tokio::select! {
                () = tokio::time::sleep(give_up.before(refresh::backoff(attempt - 1, rand::random()))) => {}
                _ = probe.dies(), if !dead => dead = true,
            }
        }
        let mut conn = tell.borrow().clone();
        let mut elsewhere = None;
        if !dead && give_up.is_due() {
            dead = !client.passes_packets(&conn).await;
            // Where nobody has said that the wire is down, whoever cannot be asked has not taken it away. And where it is
            // down, but packets pass, nothing is closed for the sake of an endpoint that may not be there.
            elsewhere = (fell && !dead).then(|| anybodys(conn.clone()));
        }
        let request = |conn| NetworkServiceRequest { connection: Some(conn), ..first.clone() };
        let mut asked = None;
        if !dead {
            let mut meanwhile = client.ask_meanwhile(request(conn.clone()), &mut probe).await;
            if let (Ok(Err(_)), Some(elsewhere)) = (&meanwhile, elsewhere) {
                tracing::info!(connection = %id, "its endpoint does not come back; asking for any");
                // Not probed: the packets of now end when others begin, and another endpoint is what is asked for.
                meanwhile = Ok(client.ask(request(elsewhere)).await);
            }
            match meanwhile {
                Ok(answered) => asked = Some(answered),
                Err(why) => {
                    tracing::info!(connection = %id, %why, "packets have stopped while the wire is asked for; asking for another endpoint");
                    dead = true;
                }
            }
        }
        let asked = match asked {
            Some(asked) => asked,
            None => {
                // Once it is closed hop by hop there is nothing left to go on with.
                reselect(&mut conn);
                client.ask(request(conn)).await
            }
        };
        match asked {
            Ok(answer) => {
                if attempt > 0 || dead {
                    let endpoint = &answer.connection.network_service_endpoint_name;
                    tracing::info!(connection = %id, %endpoint, attempts = attempt + 1, "the wire is up again");
                }
                if dead || fell || !probe.is_of(&answer.connection) {
                    probe = Probe::of(client.config.liveness, &answer.connection);
                }
                attempt = 0;
                give_up = GiveUp::default();
                (dead, fell) = (false, false);
                up_since = Instant::now();
                // What the hub told while we asked is answered by this.
                events = None;
                tell.send_replace(answer.connection);
            }
            Err(error) => {
                if attempt == 0 {
                    tracing::warn!(connection = %id, %error, "the wire cannot be refreshed; trying again");
                }
                attempt = attempt.saturating_add(1);
                give_up.after(&error, &tell.borrow());
            }
        }
    }
}

/// The name of the last hop before the endpoint.
fn beside_endpoint(conn: &Connection) -> Option<&str> {
    nsm_api::path::segments(conn).iter().rev().nth(1).map(|segment| segment.name.as_str())
}

/// Asks for any endpoint, without what the last one gave; what there is stays until another has answered.
fn anybodys(mut conn: Connection) -> Connection {
    conn.mechanism = None;
    conn.network_service_endpoint_name.clear();
    if let Some(dns) = conn.context.as_mut().and_then(|context| context.dns_context.as_mut()) {
        dns.configs.clear();
    }
    conn
}

/// Asks for another endpoint, once this wire is closed.
fn reselect(conn: &mut Connection) {
    if !planted::is("a reselection keeps the endpoint") {
        *conn = anybodys(std::mem::take(conn));
    }
    conn.set_state(State::ReselectRequested);
}

/// Probes a wire for as long as it is as it was answered: while nothing happens and while it is asked for.
struct Probe {
    pairs: Vec<(IpAddr, IpAddr)>,
    checks: BoxStream<'static, (Verdict, Duration)>,
    /// How long the far end took to answer at most, lately.
    slowest: Option<Duration>,
    told: bool,
}

impl Probe {
    fn of(liveness: Option<Liveness>, conn: &Connection) -> Self {
        Self::beginning(liveness, conn, liveness.map_or(Duration::ZERO, |liveness| liveness.interval))
    }

    /// For a wire that is said to be down: as fast as it has answered, soon, and then ever less often.
    fn hurried(self, liveness: Option<Liveness>, conn: &Connection) -> Self {
        let liveness = liveness.map(|liveness| liveness.hurried(self.slowest));
        Self { slowest: self.slowest, told: self.told, ..Self::beginning(liveness, conn, SOON) }
    }

    fn beginning(liveness: Option<Liveness>, conn: &Connection, pause: Duration) -> Self {
        let conn = conn.clone();
        let pairs = liveness::pairs(&conn);
        let checks = match liveness {
            None => stream::pending().boxed(),
            Some(liveness) => stream::unfold((conn, pause), move |(conn, pause)| async move {
                tokio::time::sleep(pause).await;
                let began = Instant::now();
                let verdict = liveness.check(&conn).await;
                Some(((verdict, began.elapsed()), (conn, (pause * 2).min(liveness.interval))))
            })
            .boxed(),
        };
        Self { pairs, checks, slowest: None, told: false }
    }

    /// Whether this connection is probed by the same packets.
    fn is_of(&self, conn: &Connection) -> bool {
        self.pairs == liveness::pairs(conn)
    }

    fn slowest(&self) -> Option<Duration> {
        self.slowest
    }

    async fn next(&mut self) -> Verdict {
        let Some((verdict, took)) = self.checks.next().await else { return std::future::pending().await };
        match &verdict {
            Verdict::Alive => self.slowest = Some(liveness::slowest(self.slowest, took)),
            Verdict::Unknown(why) if !self.told => {
                self.told = true;
                tracing::warn!(%why, "the wire cannot be probed, so it counts as alive");
            }
            _ => {}
        }
        verdict
    }

    /// Returns when packets do not pass any more, and why.
    async fn dies(&mut self) -> String {
        loop {
            if let Verdict::Dead(why) | Verdict::Gone(why) = self.next().await {
                return why;
            }
        }
    }

    /// The same while the wire is asked for: addresses change where another endpoint answers, before that is heard of here.
    async fn falls_silent(&mut self) -> String {
        loop {
            if let Verdict::Dead(why) = self.next().await {
                return why;
            }
        }
    }
}

/// How long to wait before a wire that went down `up_for` after its last answer is asked for, given how many times in a
/// row it fell at once, and that count from now on. A wire that has lasted is asked for without delay; one that every
/// answer brings up and that falls at once is asked for in growing pauses, up to `most`, or it would load the whole mesh.
fn after_fall(up_for: Duration, falls: u32, most: Duration, jitter: f64) -> (Duration, u32) {
    match up_for < SETTLED {
        true => (refresh::backoff(falls, jitter).min(most), falls.saturating_add(1)),
        false => (Duration::ZERO, 0),
    }
}

/// Returns when the endpoint of another wire wants a request, where wires are refreshed together.
async fn another_is_wanted(others: &mut watch::Receiver<String>, id: &str) {
    // The sender is the client's, and lives as long as this wire is kept.
    while others.changed().await.is_ok() {
        if *others.borrow_and_update() != id {
            return;
        }
    }
}

/// Returns when the mesh says that the connection is down, or that its endpoint wants it asked for again
/// (spec/control-plane.md 10.2), with its state. Both are answered alike: the wire is asked for as it is.
async fn wants_a_request(
    hub: &Hub,
    selector: &MonitorScopeSelector,
    id: &str,
    events: &mut Option<tokio::sync::mpsc::Receiver<Arc<nsm_api::pb::connection::ConnectionEvent>>>,
) -> State {
    loop {
        if events.is_none() {
            *events = hub.watch(selector.clone(), Viewer::All).ok();
        }
        let Some(receiver) = events else { return std::future::pending().await };
        match receiver.recv().await {
            Some(event) => {
                let state = event.connections.get(id).map(Connection::state);
                if let Some(state @ (State::Down | State::RefreshRequested)) = state {
                    return state;
                }
            }
            None => *events = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_wire_is_asked_for_when_it_is_down_or_its_endpoint_wants_it() {
        let hub = Hub::default();
        let conn = |state: State| {
            let segment = PathSegment { name: "nsc".into(), id: "nsc-0".into(), ..PathSegment::default() };
            let path = Some(Path { unknown: None, index: 0, path_segments: vec![segment] });
            Connection { id: "nsc-0".into(), path, state: state.into(), ..Connection::default() }
        };
        for state in [State::Down, State::RefreshRequested] {
            let mut events = None;
            hub.update(conn(State::Up), None);
            let selector = MonitorScopeSelector::default();
            let mut wants = Box::pin(wants_a_request(&hub, &selector, "nsc-0", &mut events));
            assert!((&mut wants).now_or_never().is_none(), "it is up");
            hub.update(conn(State::Up), None);
            assert!((&mut wants).now_or_never().is_none(), "and changed");
            hub.update(conn(state), None);
            assert_eq!(wants.await, state);
        }
    }

    #[tokio::test]
    async fn wires_that_are_one_network_are_refreshed_together() {
        let wanted = watch::Sender::new(String::new());
        let (mut own, mut others) = (wanted.subscribe(), wanted.subscribe());
        for _ in 0..2 {
            assert!(
                another_is_wanted(&mut others, "nsc-1").now_or_never().is_none(),
                "nobody wants anything"
            );
            wanted.send_replace("nsc-0".into());
            assert!(another_is_wanted(&mut others, "nsc-1").now_or_never().is_some());
            assert!(another_is_wanted(&mut own, "nsc-0").now_or_never().is_none(), "that is its own request");
        }
    }

    /// A registry that has just come back has not heard of its endpoints, and packets pass meanwhile.
    #[tokio::test(start_paused = true)]
    async fn an_endpoint_that_is_not_found_may_come_back() {
        let segment = |name: &str| PathSegment { name: name.into(), ..PathSegment::default() };
        let path_segments = ["nsc", "manager", "forwarder", "nse"].map(segment).into();
        let path = Some(Path { unknown: None, index: 0, path_segments });
        let conn = Connection { path, ..Connection::default() };
        let mut give_up = GiveUp::default();
        let unreached = Error::unavailable("the endpoint cannot be reached").at("forwarder");
        give_up.after(&tonic::Status::from(unreached).into(), &conn);
        tokio::time::advance(UNREACHED).await;
        assert!(give_up.is_due(), "its process is gone");
        let mut give_up = GiveUp::default();
        give_up.after(&Error::unavailable("the manager cannot be reached"), &conn);
        tokio::time::advance(PATIENCE * 2).await;
        assert!(!give_up.is_due(), "nobody was asked");
        let broke = nsm_transport::Unanswered.mark(tonic::Status::unavailable("the connection broke"));
        give_up.after(&broke.into(), &conn);
        tokio::time::advance(PATIENCE * 2).await;
        assert!(!give_up.is_due(), "nobody has answered");
        give_up.after(&Error::unavailable("a hop behind it cannot be reached").at("manager"), &conn);
        give_up.after(&Error::not_found("the endpoint").at("forwarder"), &conn);
        assert!(!give_up.is_due());
        assert_eq!(give_up.before(PATIENCE), UNFOUND, "nobody sleeps longer");
        tokio::time::advance(UNFOUND).await;
        assert!(give_up.is_due(), "it is gone, and others may serve");
        assert_eq!(give_up.before(PATIENCE), PATIENCE);
    }

    #[test]
    fn a_wire_that_falls_at_once_is_asked_for_in_growing_bounded_pauses() {
        let (mut falls, mut pauses) = (0, Vec::new());
        for _ in 0..12 {
            let pause;
            (pause, falls) = after_fall(Duration::from_millis(3), falls, Duration::MAX, 0.0);
            pauses.push(pause);
        }
        assert!(pauses.is_sorted() && pauses[0] > Duration::ZERO && pauses[1] > pauses[0], "{pauses:?}");
        assert_eq!(pauses.last(), Some(&Duration::from_secs(5)));
        assert!(after_fall(Duration::ZERO, falls, Duration::MAX, 1.0).0 < Duration::from_secs(5), "jittered");
        assert_eq!(
            after_fall(Duration::ZERO, u32::MAX, Duration::MAX, 0.0),
            (Duration::from_secs(5), u32::MAX)
        );
        assert_eq!(
            after_fall(Duration::ZERO, 11, WHILE_IT_STANDS, 0.0),
            (WHILE_IT_STANDS, 12),
            "it is to be asked for before its hop closes it"
        );
        assert_eq!(
            after_fall(SETTLED, falls, Duration::MAX, 0.0),
            (Duration::ZERO, 0),
            "it has lasted: at once, and all is forgotten"
        );
    }
}
