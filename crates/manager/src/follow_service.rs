//! Follows the network services of live connections: one that its service does not lead to its endpoint any more goes
//! to another endpoint (spec/control-plane.md 8.5).
//!
//! Its client is told to ask for it (10.2) while it stands, so that it carries packets until another endpoint has
//! answered. Upstream's manager closes it at once; here it is closed when nothing has come of that. Of many, which one
//! change leads away, each is told at a moment of its own, or all of their requests would come at once.
//!
//! All connections of a service share one watch of it and one of its endpoints. [`Service`] decides, purely; the tasks
//! around it carry news in and verdicts out.

use std::{
    collections::HashMap,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::StreamExt as _;
use nsm_api::{
    matching::{Labels, Policy},
    path,
    pb::{
        connection::{Connection, State},
        networkservice::NetworkServiceRequest,
        registry::{NetworkService, NetworkServiceEndpoint},
    },
};
use nsm_mesh::{
    Connections, Context, Element, Lease, Next, Reason, Release, Result, Scope, monitor::Hub, refresh,
};
use nsm_registry::ManagerRegistry;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};

/// How long a connection that is led away stands for its client to go elsewhere.
const GRACE: Duration = Duration::from_secs(1);
/// Within how long after each other connections are told to go, on average.
const APART: Duration = Duration::from_millis(1);
/// How long a client that was led away may take to ask again: then its tokens have expired anyway.
const REMEMBERED: Duration = Duration::from_secs(600);

/// The element, and what it shares with the task beside it.
#[derive(Debug, Clone)]
pub struct FollowService(Arc<Followed>);

/// What there is to do beside requests; for [`FollowService::look_after`].
#[derive(Debug)]
pub struct News(mpsc::UnboundedReceiver<New>);

#[derive(Debug)]
enum New {
    /// A service has its first connection; it has no more when the receiver ends.
    Service(String, oneshot::Receiver<()>),
    /// A service does not lead to this connection's endpoint; it is one of so many.
    Unmatched { service: String, id: String, of: usize },
}

struct Followed {
    services: Mutex<HashMap<String, Service>>,
    led_away: Mutex<HashMap<String, LedAway>>,
    tell: mpsc::UnboundedSender<New>,
}

/// A connection that has to leave this endpoint because its service led away from it.
struct LedAway {
    endpoint: String,
    at: Instant,
    /// Its client knows nothing but that it fell.
    closed: bool,
}

/// What is known of one service: its matches, its endpoints, and the connections that go by them.
#[derive(Debug, Default)]
struct Service {
    policy: Option<Policy>,
    endpoints: HashMap<String, NetworkServiceEndpoint>,
    live: HashMap<String, Live>,
    /// Dropped with the service: its watches end.
    _watched: Option<oneshot::Sender<()>>,
}

/// One connection.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Live {
    endpoint: String,
    labels: Labels,
    /// Whether the matches led here, now or earlier. A client that names an endpoint which they do not lead to means it;
    /// not so one whose wire stood before we were restarted: the name is what it was told.
    led: bool,
}

impl Service {
    /// Whether the matches lead the connection to its endpoint; `None`: one of the two is not known (yet). Judged as if
    /// there were no other endpoint, as upstream does: a better one that appears is no reason to close.
    fn leads(&self, live: &Live) -> Option<bool> {
        let endpoint = self.endpoints.get(&live.endpoint)?;
        let selection = self.policy.as_ref()?.endpoints(&live.labels, std::slice::from_ref(endpoint));
        Some(!selection.candidates.is_empty())
    }

    /// Whether this connection has to be closed.
    fn is_unmatched(&self, id: &str) -> bool {
        self.live.get(id).is_some_and(|live| live.led && self.leads(live) == Some(false))
    }

    /// Looks at all connections to this endpoint (`None`: at all) after something has changed: those to be closed.
    fn judge(&mut self, endpoint: Option<&str>) -> Vec<String> {
        let concerned = |live: &&Live| endpoint.is_none_or(|name| live.endpoint == name);
        let led: Vec<String> = self
            .live
            .iter()
            .filter(|(_, live)| concerned(live) && self.leads(live) == Some(true))
            .map(|(id, _)| id.clone())
            .collect();
        for id in led {
            if let Some(live) = self.live.get_mut(&id) {
                live.led = true;
            }
        }
        let ids = self.live.iter().filter(|(_, live)| concerned(live)).map(|(id, _)| id);
        let mut unmatched: Vec<String> = ids.filter(|id| self.is_unmatched(id)).cloned().collect();
        unmatched.sort();
        unmatched
    }

    fn changed(&mut self, service: &NetworkService) -> Vec<String> {
        self.policy = Some(Policy::lenient(service));
        self.judge(None)
    }

    /// An endpoint is new, changed, or gone: that of a connection may be back soon, and its death has its own news.
    fn endpoint(&mut self, name: String, now: Option<NetworkServiceEndpoint>) -> Vec<String> {
        match now {
            Some(nse) => {
                self.endpoints.insert(name.clone(), nse);
                self.judge(Some(&name))
            }
            None => {
                self.endpoints.remove(&name);
                Vec::new()
            }
        }
    }

    /// The registry is lost: what it will tell next is all there is.
    fn forget(&mut self) {
        self.policy = None;
        self.endpoints.clear();
    }
}

impl FollowService {
    /// The element, and the work for [`FollowService::look_after`].
    #[must_use]
    pub fn new() -> (Self, News) {
        let (tell, news) = mpsc::unbounded_channel();
        let followed = Followed { services: Mutex::default(), led_away: Mutex::default(), tell };
        (Self(Arc::new(followed)), News(news))
    }

    /// Watches the services that the element meets, and ends what they lead away; `hub` tells clients. Does not end.
    pub async fn look_after(
        self,
        mut news: News,
        registry: ManagerRegistry,
        connections: Arc<Connections>,
        hub: Arc<Hub>,
    ) {
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                Some(new) = news.0.recv() => match new {
                    New::Service(name, unwatched) => {
                        let (this, registry) = (Arc::clone(&self.0), registry.clone());
                        tasks.spawn(async move {
                            tokio::select! {
                                _ = unwatched => {}
                                () = this.watch(&name, &registry) => {}
                            }
                        });
                    }
                    New::Unmatched { service, id, of } => {
                        let (this, connections) = (Arc::clone(&self.0), Arc::clone(&connections));
                        let hub = Arc::clone(&hub);
                        // Closing may take as long as a neighbour lets it.
                        tasks.spawn(async move {
                            tokio::time::sleep(spread(of, rand::random())).await;
                            if this.tell(&service, &id, &hub) {
                                tokio::time::sleep(GRACE).await;
                                this.close(&service, &id, &connections).await;
                            }
                        });
                    }
                },
                Some(_) = tasks.join_next() => {}
            }
        }
    }
}

impl Followed {
    /// A connection stands; it goes by this service.
    fn follow(&self, service: &str, id: &str, live: Live) {
        let mut services = self.services.lock();
        let entry = services.entry(service.to_owned()).or_insert_with(|| {
            let (watched, unwatched) = oneshot::channel();
            // Without anybody who looks after us nothing is watched.
            let _ = self.tell.send(New::Service(service.to_owned(), unwatched));
            Service { _watched: Some(watched), ..Service::default() }
        });
        let endpoint = live.endpoint.clone();
        let led = live.led || entry.live.get(id).is_some_and(|old| old.led && old.endpoint == endpoint);
        entry.live.insert(id.to_owned(), Live { led, ..live });
        // The service may have changed since the endpoint was chosen.
        if entry.leads(&entry.live[id]) == Some(true) {
            entry.live.entry(id.to_owned()).and_modify(|live| live.led = true);
        } else if entry.is_unmatched(id) {
            let _ = self.tell.send(New::Unmatched { service: service.to_owned(), id: id.to_owned(), of: 1 });
        }
    }

    /// Follows, and leases what ends it. A connection goes by one service: a client may ask again with another.
    fn hold(self: &Arc<Self>, scope: &mut Scope, service: String, id: String, live: Live) {
        match scope.get_mut::<Follows>() {
            Some(held) if held.service != service => {
                self.unfollow(&held.service, &id);
                held.service.clone_from(&service);
            }
            Some(_) => {}
            None => {
                scope.lease(Follows { followed: Arc::clone(self), service: service.clone(), id: id.clone() });
            }
        }
        self.follow(&service, &id, live);
    }

    fn unfollow(&self, service: &str, id: &str) {
        let mut services = self.services.lock();
        if let Some(entry) = services.get_mut(service) {
            entry.live.remove(id);
            if entry.live.is_empty() {
                services.remove(service);
            }
        }
    }

    /// Tells this of a service that is followed still, and has closed what it leads away.
    fn news(&self, service: &str, tell: impl FnOnce(&mut Service) -> Vec<String>) {
        let unmatched = self.services.lock().get_mut(service).map(tell).unwrap_or_default();
        let of = unmatched.len();
        for id in unmatched {
            let _ = self.tell.send(New::Unmatched { service: service.to_owned(), id, of });
        }
    }

    async fn watch(&self, service: &str, registry: &ManagerRegistry) {
        let mut attempt = 0;
        loop {
            let watches =
                tokio::try_join!(registry.watch_service(service), registry.watch_endpoints(service));
            let error = match watches {
                Ok((mut services, mut endpoints)) => loop {
                    tokio::select! {
                        event = services.next() => match event {
                            // A service that is gone leads nowhere; its wires stay until they are refreshed.
                            Some(Ok(now)) => {
                                attempt = 0;
                                now.iter().for_each(|now| self.news(service, |s| s.changed(now)));
                            }
                            Some(Err(error)) => break Some(error),
                            None => break None,
                        },
                        event = endpoints.next() => match event {
                            Some(Ok((name, now))) => self.news(service, |s| s.endpoint(name, now)),
                            Some(Err(error)) => break Some(error),
                            None => break None,
                        },
                    }
                },
                Err(error) => Some(error),
            };
            tracing::debug!(service, ?error, "the watch of a network service ended; it begins anew");
            self.news(service, |s| {
                s.forget();
                Vec::new()
            });
            tokio::time::sleep(refresh::backoff(attempt, rand::random())).await;
            attempt = attempt.saturating_add(1);
        }
    }

    /// The endpoint that this connection has to leave; a refresh may have led it elsewhere meanwhile.
    fn leaves(&self, service: &str, id: &str) -> Option<String> {
        let services = self.services.lock();
        let entry = services.get(service).filter(|entry| entry.is_unmatched(id))?;
        Some(entry.live[id].endpoint.clone())
    }

    /// Has the client of a connection that its service leads away ask for it; `false`: there is no such connection.
    fn tell(&self, service: &str, id: &str, hub: &Hub) -> bool {
        let Some(endpoint) = self.leaves(service, id) else { return false };
        tracing::info!(
            connection = id,
            service,
            endpoint,
            "the network service does not lead to this endpoint any more; the client is told to go elsewhere"
        );
        let mut led_away = self.led_away.lock();
        led_away.retain(|_, away| away.at.elapsed() < REMEMBERED);
        led_away.insert(id.to_owned(), LedAway { endpoint, at: Instant::now(), closed: false });
        drop(led_away);
        hub.ask_again(id);
        true
    }

    /// Closes a connection that has not left meanwhile.
    async fn close(&self, service: &str, id: &str, connections: &Arc<Connections>) {
        let Some(endpoint) = self.leaves(service, id) else { return };
        tracing::info!(
            connection = id,
            service,
            endpoint,
            "the connection has not left the endpoint; it is closed"
        );
        let away = LedAway { endpoint, at: Instant::now(), closed: true };
        self.led_away.lock().insert(id.to_owned(), away);
        connections.drop_connection(id, Reason::Unmatched).await;
    }

    /// Whether this connection has to leave that endpoint, and whether it is closed already.
    fn led_away(&self, id: &str, endpoint: &str) -> Option<bool> {
        let led_away = self.led_away.lock();
        led_away.get(id).filter(|away| away.endpoint == endpoint).map(|away| away.closed)
    }
}

/// Other hops name the endpoint that their node has chosen.
fn of_a_workload(cx: &Context<'_>) -> bool {
    cx.caller.as_ref().is_some_and(|caller| caller.peer.unix().is_some())
}

/// Whether the caller knows who is behind us: somebody has answered it.
fn stood_before(conn: &Connection) -> bool {
    path::segments(conn).len() > path::index(conn) + 1
}

/// How long one of so many connections waits until its client is told.
fn spread(of: usize, jitter: f64) -> Duration {
    let others = u32::try_from(of.saturating_sub(1)).unwrap_or(u32::MAX);
    APART.saturating_mul(others).min(GRACE).mul_f64(jitter)
}

impl fmt::Debug for Followed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Followed").field("services", &self.services.lock().len()).finish_non_exhaustive()
    }
}

/// A connection goes by a service.
#[derive(Debug)]
struct Follows {
    followed: Arc<Followed>,
    service: String,
    id: String,
}

#[async_trait]
impl Lease for Follows {
    fn name(&self) -> &'static str {
        "follow-service"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        self.followed.unfollow(&self.service, &self.id);
        Ok(())
    }
}

#[async_trait]
impl Element for FollowService {
    fn name(&self) -> &'static str {
        "follow-service"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        let (id, service) = (conn.id.clone(), conn.network_service.clone());
        if let Some(closed) = self.0.led_away(&id, &conn.network_service_endpoint_name) {
            // Its client asks for it as it was: it knows only that it is asked to, or that the wire fell.
            conn.network_service_endpoint_name.clear();
            if closed {
                conn.set_state(State::ReselectRequested);
            }
        }
        let led = conn.network_service_endpoint_name.is_empty()
            || (cx.scope.get::<Follows>().is_none() && of_a_workload(cx) && stood_before(conn));
        let labels = conn.labels.clone();
        let answer = next.request(cx, request).await?;
        self.0.led_away.lock().remove(&id);
        let live = Live { endpoint: answer.network_service_endpoint_name.clone(), labels, led };
        self.0.hold(cx.scope, service, id, live);
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::registry::NetworkServiceLabels;

    use super::*;

    fn labels(of: &[(&str, &str)]) -> Labels {
        of.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn service(destination: &[(&str, &str)]) -> NetworkService {
        let route = nsm_api::pb::registry::Destination {
            destination_selector: labels(destination),
            ..Default::default()
        };
        let matches = vec![nsm_api::pb::registry::Match { routes: vec![route], ..Default::default() }];
        NetworkService { name: "s".into(), matches, ..NetworkService::default() }
    }

    fn endpoint(name: &str, of: &[(&str, &str)]) -> NetworkServiceEndpoint {
        NetworkServiceEndpoint {
            name: name.into(),
            network_service_names: vec!["s".into()],
            network_service_labels: [(
                "s".to_owned(),
                NetworkServiceLabels { unknown: None, labels: labels(of) },
            )]
            .into(),
            ..NetworkServiceEndpoint::default()
        }
    }

    fn live(endpoint: &str, led: bool) -> Live {
        Live { endpoint: endpoint.into(), labels: Labels::new(), led }
    }

    #[test]
    fn a_connection_is_closed_when_its_service_leads_away() {
        let mut s = Service::default();
        s.live.insert("u1".into(), live("x", true));
        s.live.insert("u2".into(), live("y", true));
        assert!(s.changed(&service(&[("app", "a")])).is_empty(), "no endpoint is known yet");
        assert!(s.endpoint("x".into(), Some(endpoint("x", &[("app", "a")]))).is_empty());
        assert!(s.endpoint("z".into(), Some(endpoint("z", &[("app", "b")]))).is_empty());
        assert_eq!(s.endpoint("y".into(), Some(endpoint("y", &[("app", "b")]))), ["u2"]);
        assert_eq!(s.changed(&service(&[("app", "b")])), ["u1"], "the matches change");
        assert!(s.changed(&service(&[])).is_empty(), "an empty selector fits all");
        assert!(s.endpoint("x".into(), None).is_empty(), "a dead endpoint is not a matter of matches");
        assert!(s.changed(&service(&[("app", "b")])).is_empty());
        assert_eq!(s.endpoint("x".into(), Some(endpoint("x", &[("app", "c")]))), ["u1"], "its labels change");
        s.forget();
        assert!(s.judge(None).is_empty());
    }

    #[test]
    fn an_endpoint_that_the_client_named_itself_is_left_alone_until_it_has_matched() {
        let mut s = Service::default();
        s.live.insert("u1".into(), live("x", false));
        s.endpoint("x".into(), Some(endpoint("x", &[("app", "a")])));
        assert!(s.changed(&service(&[("app", "b")])).is_empty());
        assert!(s.changed(&service(&[("app", "a")])).is_empty());
        assert_eq!(s.changed(&service(&[("app", "b")])), ["u1"]);
    }

    #[test]
    fn many_are_not_told_at_once_and_one_is() {
        assert_eq!(spread(1, 1.0), Duration::ZERO);
        assert_eq!(spread(101, 0.5), Duration::from_millis(50));
        assert_eq!(spread(usize::MAX, 1.0), GRACE);
    }

    #[tokio::test]
    async fn connections_of_a_service_share_a_watch_that_ends_with_the_last() {
        let (element, mut news) = FollowService::new();
        let followed = element.0;
        followed.follow("s", "u1", live("x", true));
        followed.follow("s", "u2", live("y", true));
        followed.follow("s", "u1", live("x", true));
        let Some(New::Service(name, mut unwatched)) = news.0.recv().await else { panic!("watched") };
        assert_eq!(name, "s");
        assert!(news.0.try_recv().is_err(), "one watch for all");
        followed.unfollow("s", "u1");
        assert!(unwatched.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        // One that appears after the service has led away.
        followed.news("s", |s| s.changed(&service(&[("app", "a")])));
        followed.news("s", |s| s.endpoint("z".into(), Some(endpoint("z", &[]))));
        followed.follow("s", "u3", live("z", true));
        let Some(New::Unmatched { id, .. }) = news.0.recv().await else { panic!("unmatched") };
        assert_eq!(id, "u3");
        for id in ["u2", "u3"] {
            followed.unfollow("s", id);
        }
        assert!(unwatched.try_recv() == Err(oneshot::error::TryRecvError::Closed));
        assert!(followed.services.lock().is_empty());
    }

    #[tokio::test]
    async fn a_connection_that_changes_its_service_leaves_no_watch_behind() {
        let (element, _news) = FollowService::new();
        let (followed, mut scope) = (element.0, Scope::default());
        for service in ["a", "b", "c", "c", "a"] {
            followed.hold(&mut scope, service.into(), "u1".into(), live("x", true));
            let watched: Vec<_> = followed.services.lock().keys().cloned().collect();
            assert_eq!(watched, [service]);
        }
        assert!(scope.unwind(&Release::now(Reason::Closed)).await.is_empty());
        assert!(followed.services.lock().is_empty(), "release ends the service that is followed now");
    }
}
