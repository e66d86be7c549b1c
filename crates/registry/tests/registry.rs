//! Real servers and clients over real sockets, with certificates of a real authority.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::{FutureExt, Stream, StreamExt, TryStreamExt, future::BoxFuture};
use hyper_util::rt::TokioIo;
use nsm_api::pb::registry::{
    Destination, Match, NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
    NetworkServiceEndpointResponse, NetworkServiceLabels,
    network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
    network_service_endpoint_registry_server::{
        NetworkServiceEndpointRegistry, NetworkServiceEndpointRegistryServer,
    },
    network_service_registry_client::NetworkServiceRegistryClient,
};
use nsm_identity::{Identity, Source, ca::Authority, token};
use nsm_registry::{
    Client, ClientConfig, Config, Endpoint, EndpointEvent, Error, Following, LookUp, ManagerConfig,
    ManagerRegistry, Registry, SERVICES, WatchLimit,
};
use nsm_transport::{Connection, DialTarget, DialUrl, FileId, ListenUrl, Peer, Pool, PoolConfig, Server};
use rustls_pki_types::ServerName;
use tempfile::TempDir;
use tokio::{
    net::UnixStream,
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tonic::{Code, Request, Response, Status, service::Routes};

const PATIENCE: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_secs(3600);

/// An authority and a directory for sockets; what it starts ends with it.
struct Lab {
    dir: TempDir,
    authority: Authority,
}

/// Something that serves.
struct Running {
    urls: Vec<DialUrl>,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<()>,
}

impl Running {
    fn start(
        urls: &[ListenUrl],
        serve: impl FnOnce(BoxFuture<'static, ()>) -> BoxFuture<'static, ()>,
    ) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(serve(stopped.map(drop).boxed()));
        let urls = urls.iter().map(|url| url.to_string().parse().unwrap()).collect();
        Self { urls, stop: Some(stop), served }
    }

    fn url(&self) -> DialUrl {
        self.urls[0].clone()
    }

    async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        timeout(PATIENCE, self.served).await.unwrap().unwrap();
    }
}

/// A node: its manager's registry, on a Unix socket and on TCP.
struct Node {
    registry: ManagerRegistry,
    running: Running,
}

impl Lab {
    fn new() -> Self {
        let authority = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
        Self { dir: TempDir::new().unwrap(), authority }
    }

    fn identity(&self, name: &str) -> Identity {
        let id = format!("spiffe://test.lab/{name}").parse().unwrap();
        self.authority.identity(&id, HOUR, SystemTime::now()).unwrap()
    }

    fn source(&self, name: &str) -> Source {
        Source::fixed(self.identity(name))
    }

    fn pool(&self, name: &str) -> Pool {
        Pool::new(self.source(name), PoolConfig::default())
    }

    fn client(&self, name: &str, url: &DialUrl) -> Client {
        Client::new(self.pool(name), url.clone(), config())
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn registry(&self) -> Running {
        self.registry_with(Config::default()).await
    }

    /// On a socket whose path outlives the registry.
    async fn registry_with(&self, config: Config) -> Running {
        let listen_on = vec![ListenUrl::Unix(self.socket("registry.sock"))];
        let registry = Registry::bind(Config { listen_on, ..config }, self.source("registry")).await.unwrap();
        let urls = registry.urls();
        Running::start(&urls, |shutdown| registry.serve(shutdown).boxed())
    }

    async fn node(&self, name: &str, registry: Option<&Running>) -> Node {
        self.node_with(name, registry, |_| {}).await
    }

    async fn node_with(
        &self,
        name: &str,
        registry: Option<&Running>,
        change: impl FnOnce(&mut ManagerConfig),
    ) -> Node {
        let id = format!("manager-{name}");
        let listen =
            [ListenUrl::Unix(self.socket(&format!("{name}.sock"))), "tcp://127.0.0.1:0".parse().unwrap()];
        let server = Server::bind(self.source(&id), &listen).await.unwrap();
        let urls = server.urls();
        let mut config = ManagerConfig::new(registry.map(Running::url), urls[1].to_string());
        config.labels = vec![("nodeName".to_owned(), name.to_owned())];
        change(&mut config);
        self.serve_node(ManagerRegistry::new(config, self.pool(&id)), server)
    }

    fn serve_node(&self, registry: ManagerRegistry, server: Server) -> Node {
        let urls = server.urls();
        let routes = registry.add_to(Routes::default());
        let closing = registry.clone();
        let running = Running::start(&urls, |shutdown| {
            async move {
                let shutdown = async move {
                    shutdown.await;
                    closing.end_watches();
                };
                server.serve(routes, &SERVICES, shutdown).await;
            }
            .boxed()
        });
        Node { registry, running }
    }

    /// A program that listens on a socket of its own and answers health checks.
    async fn program(&self, name: &str) -> Running {
        let listen = [ListenUrl::Unix(self.socket(&format!("{name}.sock")))];
        let server = Server::bind(self.source(name), &listen).await.unwrap();
        let urls = server.urls();
        Running::start(&urls, |shutdown| {
            async move { server.serve(Routes::default(), &[], shutdown).await }.boxed()
        })
    }

    async fn raw(&self, name: &str, url: &DialUrl) -> Raw {
        Raw { connection: self.pool(name).get(url, PATIENCE).await.unwrap() }
    }
}

/// The generated client, with a path that nobody has touched yet: what upstream's clients send.
struct Raw {
    connection: Connection,
}

impl Raw {
    async fn register(
        &self,
        nse: NetworkServiceEndpoint,
    ) -> Result<Response<NetworkServiceEndpoint>, Status> {
        NetworkServiceEndpointRegistryClient::new(self.connection.clone()).register(with_path(nse)).await
    }

    async fn unregister(&self, name: &str) -> Result<Response<()>, Status> {
        let request = with_path(NetworkServiceEndpoint { name: name.into(), ..Default::default() });
        NetworkServiceEndpointRegistryClient::new(self.connection.clone()).unregister(request).await
    }

    async fn register_service(&self, service: NetworkService) -> Result<NetworkService, Status> {
        let mut client = NetworkServiceRegistryClient::new(self.connection.clone());
        Ok(client.register(with_path(service)).await?.into_inner())
    }
}

fn with_path<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("path", EMPTY_PATH.parse().unwrap());
    request.set_timeout(PATIENCE);
    request
}

const EMPTY_PATH: &str = r#"{"Index":0,"PathSegments":null}"#;

fn config() -> ClientConfig {
    ClientConfig { labels: vec![], ..ClientConfig::default() }
}

fn nse(name: &str, service: &str, url: impl ToString) -> NetworkServiceEndpoint {
    let labels = NetworkServiceLabels { unknown: None, labels: [("app".to_owned(), name.to_owned())].into() };
    NetworkServiceEndpoint {
        name: name.into(),
        network_service_names: vec![service.into()],
        network_service_labels: [(service.to_owned(), labels)].into(),
        url: url.to_string(),
        ..Default::default()
    }
}

fn named(name: &str) -> NetworkServiceEndpoint {
    NetworkServiceEndpoint { name: name.into(), ..Default::default() }
}

fn of_service(service: &str) -> NetworkServiceEndpoint {
    NetworkServiceEndpoint { network_service_names: vec![service.into()], ..Default::default() }
}

fn service(name: &str) -> NetworkService {
    NetworkService { name: name.into(), ..Default::default() }
}

fn ids(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| format!("spiffe://test.lab/{name}")).collect()
}

/// Asks again until the answer is right; what is waited for happens by itself.
async fn eventually<R>(what: &str, mut look: impl AsyncFnMut() -> Option<R>) -> R {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not happen");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn next<T>(events: &mut (impl Stream<Item = Result<T, Error>> + Unpin)) -> Result<T, Error> {
    timeout(PATIENCE, events.next()).await.unwrap().expect("the stream goes on")
}

fn names(endpoints: &[Endpoint]) -> Vec<&str> {
    endpoints.iter().map(|endpoint| endpoint.nse.name.as_str()).collect()
}

#[tokio::test]
async fn a_registration_is_answered_found_and_ended() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let client = lab.client("gw", &registry.url());
    let before = SystemTime::now();
    let registration =
        client.register_endpoint(nse("gw-1", "web", "tcp://10.0.0.1:5001"), PATIENCE).await.unwrap();
    let item = registration.item();
    assert_eq!(item.path_ids, ids(&["gw", "registry"]));
    assert!(item.initial_registration_time.is_some());
    let end = nsm_registry::expiry::time_of(item.expiration_time.as_ref().unwrap());
    assert!(end > before && end <= SystemTime::now() + Duration::from_secs(60));

    client.register_service(service("web"), PATIENCE).await.unwrap();
    let found = client.find_services(service("web")).await.unwrap();
    assert_eq!((found.len(), found[0].payload.as_str()), (1, "IP"));
    assert!(client.find_services(service("we")).await.unwrap().is_empty());

    let other = lab.client("anybody", &registry.url());
    let found = other.find_endpoints(of_service("web")).await.unwrap();
    assert!(matches!(&found[..], [one] if one.nse == *item && !one.is_expired(SystemTime::now())));
    assert!(matches!(&found[0].dial, DialTarget::Url(DialUrl::Tcp(at)) if at == "10.0.0.1:5001"));
    registration.unregister().await.unwrap();
    assert!(other.find_endpoints(of_service("web")).await.unwrap().is_empty());
    registry.stop().await;
}

#[tokio::test]
async fn a_watch_tells_of_what_is_there_and_of_every_change() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let raw = lab.raw("gw", &registry.url()).await;
    let client = lab.client("watcher", &registry.url());
    raw.register(nse("a", "web", "tcp://1:1")).await.unwrap();
    let mut watch = client.watch_endpoints(of_service("web")).await.unwrap();
    raw.register(nse("b", "other", "tcp://1:1")).await.unwrap();
    raw.register(nse("c", "web", "tcp://2:2")).await.unwrap();
    raw.register(nse("a", "web", "tcp://3:3")).await.unwrap();
    raw.unregister("c").await.unwrap();
    raw.unregister("nobody").await.unwrap();
    let mut seen = vec![];
    for _ in 0..4 {
        seen.push(match next(&mut watch).await.unwrap() {
            EndpointEvent::Present(e) => format!("{} {}", e.nse.name, e.nse.url),
            EndpointEvent::Gone(nse) => format!("{} {} gone", nse.name, nse.url),
        });
    }
    assert_eq!(seen, ["a tcp://1:1", "c tcp://2:2", "a tcp://3:3", "c tcp://2:2 gone"]);
    // A watch has no end of its own, and a shutdown does not wait for its reader.
    registry.stop().await;
    let end = next(&mut watch).await.unwrap_err();
    assert!(matches!(end, Error::Refused(_)), "{end}");
    assert!(watch.next().await.is_none());
}

#[tokio::test]
async fn watches_under_concurrent_changes_end_up_with_the_content() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let url = registry.url();
    let writers = (0..3).map(|w| {
        let (lab, url) = (&lab, &url);
        async move {
            let raw = lab.raw(&format!("writer-{w}"), url).await;
            for i in 0..60 {
                let name = format!("w{w}-{}", i * 7 % 5);
                match i % 3 {
                    0 => drop(raw.unregister(&name).await.unwrap()),
                    _ => drop(
                        raw.register(nse(&name, ["s", "t"][i % 2], format!("tcp://h:{}", i + 1)))
                            .await
                            .unwrap(),
                    ),
                }
            }
            raw.register(nse(&format!("last-{w}"), "s", "tcp://last:1")).await.unwrap();
        }
    });
    let watchers = (0..4_u64).map(|w| {
        let (lab, url) = (&lab, &url);
        async move {
            sleep(Duration::from_millis(w * 7)).await;
            let client = lab.client(&format!("watcher-{w}"), url);
            let mut watch = client.watch_endpoints(of_service("s")).await.unwrap();
            let mut view = BTreeMap::new();
            while !(0..3).all(|w| view.contains_key(&format!("last-{w}"))) {
                match next(&mut watch).await.unwrap() {
                    EndpointEvent::Present(e) => view.insert(e.nse.name.clone(), e.nse),
                    EndpointEvent::Gone(nse) => view.remove(&nse.name),
                };
            }
            view
        }
    });
    let (_, views) = tokio::join!(futures::future::join_all(writers), futures::future::join_all(watchers));
    let found = lab.client("reader", &url).find_endpoints(of_service("s")).await.unwrap();
    let content: BTreeMap<_, _> = found.into_iter().map(|e| (e.nse.name.clone(), e.nse)).collect();
    assert!(content.len() > 3);
    for view in views {
        assert_eq!(view, content);
    }
    registry.stop().await;
}

#[tokio::test]
async fn what_is_not_refreshed_expires_and_its_name_is_free() {
    let lab = Lab::new();
    let registry = lab.registry_with(Config { lifetime: Duration::from_secs(2), ..Config::default() }).await;
    let raw = lab.raw("owner", &registry.url()).await;
    let client = lab.client("kept", &registry.url());
    let kept = client.register_endpoint(nse("kept", "web", "tcp://1:1"), PATIENCE).await.unwrap();
    let first = raw.register(nse("gone", "web", "tcp://1:1")).await.unwrap().into_inner();
    let mut watch = client.watch_endpoints(named("gone")).await.unwrap();
    assert!(matches!(next(&mut watch).await.unwrap(), EndpointEvent::Present(_)));
    let EndpointEvent::Gone(last) = next(&mut watch).await.unwrap() else { panic!("it must go") };
    assert_eq!(last, first, "a deletion carries the last known object");
    // Not before its time, by the registry's clock.
    let end = nsm_registry::expiry::time_of(last.expiration_time.as_ref().unwrap());
    assert!(SystemTime::now() >= end);
    // The name of what has expired belongs to nobody.
    lab.raw("heir", &registry.url()).await.register(nse("gone", "web", "tcp://2:2")).await.unwrap();
    // The other one was refreshed, more than once by now.
    let mut renewals = client.watch_endpoints(named("kept")).await.unwrap();
    for _ in 0..3 {
        let EndpointEvent::Present(now) = next(&mut renewals).await.unwrap() else { panic!("it must stay") };
        assert_eq!(now.nse.initial_registration_time, kept.item().initial_registration_time);
    }
    assert_eq!(kept.state().borrow().problem, None);
    registry.stop().await;
}

#[tokio::test]
async fn a_registrants_own_time_is_never_raised() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let raw = lab.raw("gw", &registry.url()).await;
    let soon = nsm_registry::expiry::timestamp_of(SystemTime::now() + Duration::from_secs(20));
    let asked = NetworkServiceEndpoint { expiration_time: Some(soon), ..nse("a", "s", "tcp://1:1") };
    assert_eq!(raw.register(asked).await.unwrap().into_inner().expiration_time, Some(soon));
    let past = nsm_registry::expiry::timestamp_of(SystemTime::now() - Duration::from_secs(1));
    let asked = NetworkServiceEndpoint { expiration_time: Some(past), ..nse("b", "s", "tcp://1:1") };
    let error = raw.register(asked).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("clocks"), "{error}");
    registry.stop().await;
}

#[tokio::test]
async fn a_registration_outlives_its_registry() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let url = registry.url();
    let client = lab.client("gw", &url);
    let endpoint =
        client.register_endpoint(nse("gw-1", "web", "tcp://10.0.0.1:5001"), PATIENCE).await.unwrap();
    let web = client.register_service(service("web"), PATIENCE).await.unwrap();
    let first = endpoint.item();
    registry.stop().await;
    let mut state = endpoint.state();
    timeout(PATIENCE, state.wait_for(|state| state.problem.is_some())).await.unwrap().unwrap();

    // A registry that knows nothing.
    let registry = lab.registry().await;
    let other = lab.client("anybody", &url);
    let found = eventually("the registration", async || {
        let found = other.find_endpoints(named("gw-1")).await.ok()?;
        let services = other.find_services(service("web")).await.ok()?;
        (found.len() == 1 && services.len() == 1).then_some(found)
    })
    .await;
    assert_eq!(found[0].nse.initial_registration_time, first.initial_registration_time);
    timeout(PATIENCE, state.wait_for(|state| state.problem.is_none())).await.unwrap().unwrap();
    drop(web);
    registry.stop().await;
}

#[tokio::test]
async fn what_the_registry_drops_is_registered_anew() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let client = lab.client("gw", &registry.url());
    let kept = client.register_endpoint(nse("gw-1", "web", "tcp://1:1"), PATIENCE).await.unwrap();
    let mut watch = client.watch_endpoints(named("gw-1")).await.unwrap();
    assert!(matches!(next(&mut watch).await.unwrap(), EndpointEvent::Present(_)));
    // The same identity, behind its back.
    lab.raw("gw", &registry.url()).await.unregister("gw-1").await.unwrap();
    assert!(matches!(next(&mut watch).await.unwrap(), EndpointEvent::Gone(_)));
    assert!(matches!(next(&mut watch).await.unwrap(), EndpointEvent::Present(_)));
    drop(kept);
    registry.stop().await;
}

#[tokio::test]
async fn a_name_belongs_to_who_registered_it() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let owner = lab.raw("owner", &registry.url()).await;
    let thief = lab.raw("thief", &registry.url()).await;
    owner.register(nse("a", "s", "tcp://1:1")).await.unwrap();
    for result in [
        thief.register(nse("a", "s", "tcp://2:2")).await.map(drop),
        thief.unregister("a").await.map(drop),
        // with somebody else's name in the object
        thief
            .register(NetworkServiceEndpoint { path_ids: ids(&["owner"]), ..nse("a", "s", "tcp://2:2") })
            .await
            .map(drop),
    ] {
        let error = result.unwrap_err();
        assert_eq!(error.code(), Code::PermissionDenied);
        assert!(error.message().contains("belongs to \"spiffe://test.lab/owner\""), "{error}");
    }
    // The owner may change everything about it, and give it up.
    owner.register(nse("a", "t", "tcp://3:3")).await.unwrap();
    owner.unregister("a").await.unwrap();
    thief.register(nse("a", "s", "tcp://2:2")).await.unwrap();
    // A client does not try again what is refused.
    let error =
        lab.client("owner", &registry.url()).register_endpoint(nse("a", "s", "tcp://1:1"), PATIENCE).await;
    assert!(matches!(error.unwrap_err(), Error::Refused(status) if status.code() == Code::PermissionDenied));
    registry.stop().await;
}

#[tokio::test]
async fn services_are_shared_by_those_who_agree_and_the_operators_stay() {
    let lab = Lab::new();
    let route = |app: &str| Match {
        routes: vec![Destination {
            unknown: None,
            destination_selector: [("app".into(), app.into())].into(),
            weight: 0,
        }],
        ..Default::default()
    };
    let operators = NetworkService { matches: vec![route("fw")], ..service("chain") };
    let registry = lab.registry_with(Config { services: vec![operators.clone()], ..Config::default() }).await;
    let (one, two) = (lab.raw("one", &registry.url()).await, lab.raw("two", &registry.url()).await);
    let expected = NetworkService { payload: "IP".into(), ..operators };
    // An endpoint that registers its service by name does not wipe its matches.
    assert_eq!(one.register_service(service("chain")).await.unwrap(), expected);
    let rewritten =
        NetworkService { matches: vec![route("me")], payload: "ETHERNET".into(), ..service("chain") };
    assert_eq!(one.register_service(rewritten).await.unwrap(), expected);
    let mut client = NetworkServiceRegistryClient::new(one.connection.clone());
    client.unregister(with_path(service("chain"))).await.unwrap();
    assert_eq!(lab.client("x", &registry.url()).find_services(service("chain")).await.unwrap(), [expected]);

    // Two endpoints of one service, each with an identity of its own.
    let first = NetworkService { matches: vec![route("a")], ..service("web") };
    let first = one.register_service(first).await.unwrap();
    assert_eq!(first.path_ids, ids(&["one", "registry"]));
    assert_eq!(two.register_service(service("web")).await.unwrap(), first);
    let different = NetworkService { matches: vec![route("b")], ..service("web") };
    assert_eq!(two.register_service(different.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(one.register_service(different).await.unwrap().matches, [route("b")]);
    registry.stop().await;
}

#[tokio::test]
async fn what_the_operator_changes_is_told_and_what_is_a_workloads_stays() {
    let lab = Lab::new();
    let leads_to = |name: &str, app: &str| {
        let destination_selector = [("app".into(), app.into())].into();
        let routes = vec![Destination { destination_selector, ..Default::default() }];
        let matches = vec![Match { routes, ..Default::default() }];
        NetworkService { matches, payload: "IP".into(), ..service(name) }
    };
    let before = [leads_to("chain", "a"), leads_to("gone", "a")];
    let listen_on = vec![ListenUrl::Unix(lab.socket("registry.sock"))];
    let config = Config { services: before.to_vec(), listen_on, ..Config::default() };
    let registry = Registry::bind(config, lab.source("registry")).await.unwrap();
    let (known, urls) = (registry.directories(), registry.urls());
    let registry = Running::start(&urls, |shutdown| registry.serve(shutdown).boxed());
    let workload = lab.raw("one", &registry.url()).await;
    let own = workload.register_service(leads_to("own", "a")).await.unwrap();
    let client = lab.client("x", &registry.url());
    let mut watch = client.watch_services(service("chain")).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap(), (before[0].clone(), false));

    let now = [leads_to("chain", "b"), leads_to("new", "a")];
    known.change_operators(&before, &now).await;
    assert_eq!(watch.next().await.unwrap().unwrap(), (now[0].clone(), false));
    let mut all = known.services().await;
    all.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(all, [now[0].clone(), now[1].clone(), own.clone()]);
    // What a workload has made of a name that the operator gave up is not the operator's to end.
    known.change_operators(&[leads_to("own", "a")], &[]).await;
    assert!(known.services().await.contains(&own));
    // And the operator may take a name.
    known.change_operators(&[], &[leads_to("own", "c")]).await;
    assert!(known.services().await.contains(&leads_to("own", "c")));
    registry.stop().await;
}

#[tokio::test]
async fn nonsense_is_refused_and_says_what_is_wrong() {
    let lab = Lab::new();
    let registry = lab.registry_with(Config { watches: WatchLimit(2), ..Config::default() }).await;
    let raw = lab.raw("gw", &registry.url()).await;
    let mut many = nse("a", "s", "tcp://1:1");
    let entry = many.network_service_labels.get_mut("s").unwrap();
    entry.labels = (0..100_000).map(|i| (i.to_string(), String::new())).collect();
    let endless = NetworkServiceEndpoint { url: "x".repeat(10_000), ..nse("a", "s", "") };
    let crowd =
        NetworkServiceEndpoint { network_service_names: vec!["s".into(); 65], ..nse("a", "s", "tcp://1:1") };
    for (wrong, code, text) in [
        (nse("", "s", "tcp://1:1"), Code::InvalidArgument, "no name"),
        (nse(&"n".repeat(254), "s", "tcp://1:1"), Code::InvalidArgument, "254 bytes"),
        (nse("a@other", "s", "tcp://1:1"), Code::Unimplemented, "another domain"),
        (nse("a", "s@other", "tcp://1:1"), Code::Unimplemented, "another domain"),
        (many, Code::InvalidArgument, "100000 entries"),
        (endless, Code::InvalidArgument, "10000 bytes"),
        (crowd, Code::InvalidArgument, "65 entries"),
    ] {
        let error = raw.register(wrong).await.unwrap_err();
        assert_eq!(error.code(), code);
        assert!(error.message().contains(text), "{error}");
    }
    // Look-ups too.
    let client = lab.client("gw", &registry.url());
    let error = client.find_endpoints(named("a@other")).await.unwrap_err();
    assert!(matches!(error, Error::Refused(status) if status.code() == Code::Unimplemented));
    // A query without an object asks for everything.
    let mut stub = NetworkServiceEndpointRegistryClient::new(raw.connection.clone());
    raw.register(nse("a", "s", "tcp://1:1")).await.unwrap();
    let query = NetworkServiceEndpointQuery { network_service_endpoint: None, watch: false };
    let found: Vec<_> = stub.find(query).await.unwrap().into_inner().try_collect().await.unwrap();
    assert_eq!(found.len(), 1);
    // No more watches than an identity may have; closed ones do not count.
    let first = client.watch_endpoints(named("x")).await.unwrap();
    let _second = client.watch_endpoints(named("x")).await.unwrap();
    let error = client.watch_endpoints(named("x")).await.map(drop).unwrap_err();
    assert!(matches!(&error, Error::Refused(status) if status.code() == Code::ResourceExhausted), "{error}");
    let _another = lab.client("other", &registry.url()).watch_endpoints(named("x")).await.unwrap();
    drop(first);
    eventually("room for a watch", async || client.watch_endpoints(named("x")).await.ok().map(drop)).await;
    registry.stop().await;
}

/// TLS without our client's headers: whatever the test says is sent.
async fn forger(
    lab: &Lab,
    name: &str,
    url: &DialUrl,
) -> NetworkServiceEndpointRegistryClient<tonic::transport::Channel> {
    let config = lab.identity(name).client_config().clone();
    let path = url.unix_path().unwrap().to_owned();
    let connector = tower::service_fn(move |_| {
        let (config, path) = (config.clone(), path.clone());
        async move {
            let socket = UnixStream::connect(path).await?;
            let server = ServerName::try_from("localhost").unwrap();
            let stream = tokio_rustls::TlsConnector::from(config).connect(server, socket).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://localhost");
    NetworkServiceEndpointRegistryClient::new(endpoint.connect_with_connector(connector).await.unwrap())
}

#[tokio::test]
async fn forged_expired_and_missing_tokens_and_paths_are_refused() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let mut stub = forger(&lab, "gw", &registry.url()).await;
    let now = SystemTime::now();
    let mint = |signer: &Identity, audience: &str, at: SystemTime| {
        let audience = format!("spiffe://test.lab/{audience}").parse().unwrap();
        token::mint(signer.svid(), Some(&audience), None, Duration::from_secs(600), at).unwrap()
    };
    // The certificate differs from the connection's, the name does not.
    let (gw, twin, other) = (lab.identity("gw"), lab.identity("gw"), lab.identity("other"));
    let _ = gw;
    let twin_token = mint(&twin, "registry", now);
    let other_token = mint(&other, "registry", now);
    let empty = Some(EMPTY_PATH.to_owned());
    let segments = |index: usize, tokens: &[&str]| {
        let tokens: Vec<_> = tokens.iter().map(|token| format!(r#"{{"token":"{token}"}}"#)).collect();
        Some(format!(r#"{{"Index":{index},"PathSegments":[{}]}}"#, tokens.join(",")))
    };
    // (path, token, how often it is sent, code, text)
    let cases = [
        (None, twin_token.jwt(), 1, Code::PermissionDenied, "without a usable path"),
        (empty.clone(), twin_token.jwt(), 1, Code::PermissionDenied, "not signed by the connection's peer"),
        (empty.clone(), other_token.jwt(), 1, Code::PermissionDenied, "not signed by the connection's peer"),
        (empty.clone(), "not.a.token", 1, Code::PermissionDenied, "no JWT"),
        (empty.clone(), "", 0, Code::PermissionDenied, "no JWT"),
        (empty.clone(), twin_token.jwt(), 2, Code::PermissionDenied, "no JWT"),
        (segments(2, &["a", "b"]), twin_token.jwt(), 1, Code::InvalidArgument, "should be less or equal"),
        (Some("{".into()), twin_token.jwt(), 1, Code::InvalidArgument, "not JSON"),
        (
            Some(r#"{"Index":1,"PathSegments":[null,null]}"#.into()),
            twin_token.jwt(),
            1,
            Code::PermissionDenied,
            "no JWT",
        ),
    ];
    for (path, token, times, code, text) in cases {
        let mut request = Request::new(nse("a", "s", "tcp://1:1"));
        if let Some(path) = &path {
            request.metadata_mut().insert("path", path.parse().unwrap());
        }
        for _ in 0..times {
            request.metadata_mut().append("nsm-client-token", token.parse().unwrap());
            let expires = twin_token.expires_rfc3339().parse().unwrap();
            request.metadata_mut().append("nsm-client-token-expires", expires);
        }
        let error = stub.register(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{path:?}: {error}");
        assert!(error.message().contains(text), "{path:?}: {error}");
        assert!(token.is_empty() || !error.message().contains(token), "a token shows: {error}");
    }
    // Nothing of it was kept.
    assert!(lab.client("x", &registry.url()).find_endpoints(named("")).await.unwrap().is_empty());
    registry.stop().await;
}

#[tokio::test]
async fn tokens_of_earlier_hops_must_be_valid_chained_and_fresh() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    // A manager in good standing that passes on what its client sent.
    let manager = lab.raw("manager", &registry.url()).await;
    let now = SystemTime::now();
    let client = lab.identity("client");
    let mint = |audience: &str, at: SystemTime, lifetime: u64| {
        let audience = format!("spiffe://test.lab/{audience}").parse().unwrap();
        let token = token::mint(client.svid(), Some(&audience), None, Duration::from_secs(lifetime), at);
        token.unwrap().jwt().to_owned()
    };
    let send = async |first: String| {
        let mut request = with_path(nse("a", "s", "tcp://1:1"));
        let path = format!(r#"{{"Index":1,"PathSegments":[{{"token":"{first}"}},{{"token":"replaced"}}]}}"#);
        request.metadata_mut().insert("path", path.parse().unwrap());
        NetworkServiceEndpointRegistryClient::new(manager.connection.clone()).register(request).await
    };
    let answer = send(mint("manager", now, 600)).await.unwrap();
    let path = answer.metadata().get("path").unwrap().to_str().unwrap().to_owned();
    let path = nsm_registry::path::RegistrationPath::decode(&path).unwrap();
    assert_eq!((path.index, path.tokens.len()), (1, 3), "the index is put back");
    assert_eq!(answer.get_ref().path_ids, ids(&["client", "manager", "registry"]));
    for (first, text) in [
        (mint("somebody-else", now, 600), "addressed to"),
        (mint("manager", now - Duration::from_secs(700), 600), "expired"),
        ("junk".to_owned(), "no JWT"),
    ] {
        let error = send(first).await.unwrap_err();
        assert_eq!(error.code(), Code::PermissionDenied);
        assert!(error.message().contains(text), "{error}");
    }
    registry.stop().await;
}

/// A registry that answers as it should not.
struct Careless {
    unregistered: std::sync::atomic::AtomicUsize,
}

#[tonic::async_trait]
impl NetworkServiceEndpointRegistry for Careless {
    type FindStream = futures::stream::BoxStream<'static, Result<NetworkServiceEndpointResponse, Status>>;

    async fn register(
        &self,
        request: Request<NetworkServiceEndpoint>,
    ) -> Result<Response<NetworkServiceEndpoint>, Status> {
        let peer = Peer::of(&request)?.clone();
        let caller = nsm_transport::client_token(request.metadata()).unwrap();
        let own = peer.token(HOUR, SystemTime::now()).unwrap();
        let nse = request.into_inner();
        let tokens = match nse.name.as_str() {
            "no-path" => vec![],
            "own-token-missing" => vec![caller.jwt()],
            "echo" => vec![caller.jwt(), caller.jwt()],
            _ => vec![caller.jwt(), own.jwt()],
        };
        let tokens = tokens.into_iter().map(str::to_owned).collect();
        let path = nsm_registry::path::RegistrationPath { index: 0, tokens };
        let mut response = Response::new(nse);
        if !path.tokens.is_empty() {
            response.metadata_mut().insert("path", path.encode().parse().unwrap());
        }
        Ok(response)
    }

    async fn find(
        &self,
        request: Request<NetworkServiceEndpointQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        let name = request.into_inner().network_service_endpoint.unwrap_or_default().name;
        Ok(Response::new(match name.as_str() {
            "forgotten" => futures::stream::pending().boxed(),
            _ => futures::stream::empty().boxed(),
        }))
    }

    async fn unregister(&self, _: Request<NetworkServiceEndpoint>) -> Result<Response<()>, Status> {
        self.unregistered.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Ok(Response::new(()))
    }
}

#[tokio::test]
async fn a_client_checks_who_answers_it() {
    let lab = Lab::new();
    let careless = Arc::new(Careless { unregistered: Default::default() });
    let server =
        Server::bind(lab.source("registry"), &[ListenUrl::Unix(lab.socket("r.sock"))]).await.unwrap();
    let routes = Routes::new(NetworkServiceEndpointRegistryServer::from_arc(careless.clone()));
    let urls = server.urls();
    let running =
        Running::start(&urls, |shutdown| async move { server.serve(routes, &[], shutdown).await }.boxed());
    let client = lab.client("gw", &running.url());
    for (name, text) in [
        ("no-path", "no segment 1"),
        ("own-token-missing", "no segment 1"),
        ("echo", "next segment's was made by"),
    ] {
        let error = client.register_endpoint(nse(name, "s", "tcp://1:1"), PATIENCE).await.unwrap_err();
        assert!(matches!(error, Error::Denied(_)) && error.to_string().contains(text), "{name}: {error}");
    }
    // What is not accepted is taken back.
    assert_eq!(careless.unregistered.load(std::sync::atomic::Ordering::SeqCst), 3);
    // A watch that ends at once is no reason to spin: the registration is only made anew after a pause. And one that
    // does not tell of what was registered tells nothing of its end either: it was dropped before the watch began.
    for name in ["good", "forgotten"] {
        let kept = client.register_endpoint(nse(name, "s", "tcp://1:1"), PATIENCE).await.unwrap();
        let mut state = kept.state();
        timeout(PATIENCE, state.wait_for(|state| state.problem.is_some())).await.unwrap().unwrap();
        timeout(PATIENCE, state.wait_for(|state| state.problem.is_none())).await.unwrap().unwrap();
        drop(kept);
    }
    running.stop().await;
}

#[tokio::test]
async fn a_socket_is_registered_by_descriptor_found_and_connected_to() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let node = lab.node("node1", Some(&registry)).await;
    let manager = node.running.url();
    let program = lab.program("gw").await;
    let public = node.running.urls[1].to_string();

    let client = lab.client("gw", &manager);
    let endpoint = client.register_endpoint(nse("gw-1", "web", program.url()), PATIENCE).await.unwrap();
    let item = endpoint.item();
    assert_eq!(item.url, program.url().to_string(), "the registrant gets its own URL back");
    assert_eq!(item.path_ids, ids(&["gw", "manager-node1", "registry"]));
    assert_eq!(item.network_service_labels["web"].labels["nodeName"], "node1");

    // The cluster sees the manager.
    let cluster = lab.client("anybody", &registry.url()).find_endpoints(of_service("web")).await.unwrap();
    assert_eq!((names(&cluster), cluster[0].nse.url.as_str()), (vec!["gw-1"], public.as_str()));
    // A peer on TCP too: it cannot be handed a descriptor.
    let remote = lab.client("remote", &node.running.urls[1]).find_endpoints(of_service("web")).await.unwrap();
    assert_eq!(remote[0].nse.url, public);

    // A forwarder on the node gets the socket itself, by look-up and by watch, and can connect to it.
    let forwarder = lab.client("forwarder", &manager);
    let found = forwarder.find_endpoints(named("gw-1")).await.unwrap();
    let mut watch = forwarder.watch_endpoints(of_service("web")).await.unwrap();
    let EndpointEvent::Present(watched) = next(&mut watch).await.unwrap() else { panic!("it is there") };
    let file = FileId::of_path(lab.socket("gw.sock")).unwrap();
    let pool = lab.pool("forwarder");
    for endpoint in [&found[0], &watched] {
        let DialTarget::Socket(socket) = &endpoint.dial else { panic!("a descriptor: {:?}", endpoint.dial) };
        assert_eq!(FileId::of(socket.as_fd()).unwrap(), file);
        assert_eq!(endpoint.nse.url, format!("inode://{}/{}", file.dev, file.ino));
        let connection = pool.get(endpoint.dial.clone(), PATIENCE).await.unwrap();
        assert_eq!(connection.peer().id().as_str(), "spiffe://test.lab/gw");
    }
    // So does the manager itself.
    let local = node.registry.local_endpoint("gw-1").unwrap();
    assert_eq!(pool.get(local.dial(), PATIENCE).await.unwrap().peer().id().path(), "/gw");
    assert!(matches!(
        node.registry.find_endpoint("gw-1").await.unwrap().unwrap().dial,
        DialTarget::Socket(_)
    ));
    assert_eq!(names(&node.registry.find_endpoints(of_service("web")).await.unwrap()), ["gw-1"]);

    // Refreshes do not lose it, and its end reaches everybody.
    endpoint.unregister().await.unwrap();
    loop {
        if let EndpointEvent::Gone(gone) = next(&mut watch).await.unwrap() {
            assert_eq!(gone.name, "gw-1");
            break;
        }
    }
    assert!(node.registry.local_endpoint("gw-1").is_none());
    assert!(node.registry.find_endpoint("gw-1").await.unwrap().is_none());
    for running in [program, node.running, registry] {
        running.stop().await;
    }
}

#[tokio::test]
async fn what_a_forwarder_follows_is_what_its_manager_knows() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let node = lab.node("a", Some(&registry)).await;
    let follower = Following::new(lab.client("forwarder", &node.running.url()));
    let descriptors = async |query: NetworkServiceEndpoint| -> BTreeMap<String, i32> {
        let found = follower.endpoints(query).await.unwrap();
        let socket = |endpoint: Endpoint| match endpoint.dial {
            DialTarget::Socket(socket) => (endpoint.nse.name, socket.as_fd().as_raw_fd()),
            other => panic!("{other:?}"),
        };
        found.into_iter().map(socket).collect()
    };
    assert_eq!(follower.service("s", "").await.unwrap(), None);
    assert!(descriptors(of_service("s")).await.is_empty());

    let (first, second) = (lab.program("first").await, lab.program("second").await);
    let client = lab.client("first", &node.running.url());
    let kept = client.register_endpoint(nse("first", "s", first.url()), PATIENCE).await.unwrap();
    client.register_service(service("s"), PATIENCE).await.unwrap();
    // As a forwarder does that is asked from another node: it never asks for the service.
    assert_eq!(descriptors(named("first")).await.len(), 1);
    // Each look-up at the manager brings a descriptor of its own; what is followed has one.
    let known = eventually("it is followed", async || {
        let (one, other) =
            (follower.endpoints(of_service("s")).await, follower.endpoints(named("first")).await);
        let fds = |found: &[Endpoint]| match &found[0].dial {
            DialTarget::Socket(socket) => socket.as_fd().as_raw_fd(),
            other => panic!("{other:?}"),
        };
        let (one, other) = (one.unwrap(), other.unwrap());
        (fds(&one) == fds(&other)).then(|| fds(&one))
    })
    .await;
    assert_eq!(descriptors(of_service("s")).await, [("first".to_owned(), known)].into());
    assert_eq!(follower.service("s", "ETHERNET").await.unwrap(), None, "of another payload");

    // Who comes is found, who goes is not, whatever is changed counts.
    let client = lab.client("second", &node.running.url());
    let another = client.register_endpoint(nse("second", "s", second.url()), PATIENCE).await.unwrap();
    eventually("both are known", async || (descriptors(of_service("s")).await.len() == 2).then_some(()))
        .await;
    kept.unregister().await.unwrap();
    eventually("one has gone", async || {
        let left = descriptors(of_service("s")).await;
        (left.keys().collect::<Vec<_>>() == ["second"] && descriptors(named("first")).await.is_empty())
            .then_some(())
    })
    .await;
    // It comes back on another socket: that is told, and whoever was not where it was said to be is asked for again.
    drop(another);
    let elsewhere = lab.program("elsewhere").await;
    let client = lab.client("second", &node.running.url());
    let another = client.register_endpoint(nse("second", "s", elsewhere.url()), PATIENCE).await.unwrap();
    let file = FileId::of(
        rustix::fs::open(lab.socket("elsewhere.sock"), rustix::fs::OFlags::PATH, rustix::fs::Mode::empty())
            .unwrap(),
    )
    .unwrap();
    let is_there = async |query: NetworkServiceEndpoint| {
        let found = follower.endpoints(query).await.unwrap();
        let files = found.iter().map(|endpoint| match &endpoint.dial {
            DialTarget::Socket(socket) => FileId::of(socket).unwrap(),
            other => panic!("{other:?}"),
        });
        files.eq([file])
    };
    eventually("it is elsewhere", async || is_there(of_service("s")).await.then_some(())).await;
    let fd = descriptors(named("second")).await;
    assert_eq!(descriptors(named("second")).await, fd);
    follower.doubt("second");
    assert!(is_there(named("second")).await);
    follower.doubt("second");
    assert!(is_there(of_service("s")).await);
    let raw = lab.raw("first", &node.running.url()).await;
    raw.register_service(NetworkService { payload: "ETHERNET".into(), ..service("s") }).await.unwrap();
    eventually("the service has changed", async || {
        (follower.service("s", "").await.unwrap()?.payload == "ETHERNET").then_some(())
    })
    .await;

    // Where the manager is away nothing is made up.
    drop(another);
    node.running.stop().await;
    eventually("the manager is missed", async || follower.service("s", "").await.err()).await;
    registry.stop().await;
}

#[tokio::test]
async fn a_manager_knows_the_forwarders_of_its_node_without_the_registry() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let (one, two) = (lab.node("node1", Some(&registry)).await, lab.node("node2", Some(&registry)).await);
    let program = lab.program("fwd").await;
    let mut changed = one.registry.locals_changed();
    let kept = lab.client("fwd", &one.running.url());
    let kept = kept.register_endpoint(nse("fwd-1", "forwarder", program.url()), PATIENCE).await.unwrap();
    timeout(PATIENCE, changed.changed()).await.unwrap().unwrap();
    let other = lab.client("gw", &two.running.url());
    let _gw = other.register_endpoint(nse("gw-2", "web", "tcp://127.0.0.1:7"), PATIENCE).await.unwrap();
    assert_eq!(names(&one.registry.forwarders()), ["fwd-1"]);
    assert!(two.registry.forwarders().is_empty());

    // An endpoint of another node is reached by that node's manager; its own manager dials it.
    let found = one.registry.find_endpoint("gw-2").await.unwrap().unwrap();
    assert_eq!(found.nse.url, two.running.urls[1].to_string());
    assert!(matches!(&found.dial, DialTarget::Url(url) if *url == two.running.urls[1]));
    let local = two.registry.find_endpoint("gw-2").await.unwrap().unwrap();
    assert!(matches!(&local.dial, DialTarget::Url(DialUrl::Tcp(at)) if at == "127.0.0.1:7"));

    // Services, as the manager asks for them.
    let services = lab.client("gw", &one.running.url());
    let _web = services.register_service(service("web"), PATIENCE).await.unwrap();
    assert_eq!(
        two.registry.find_service("web", "IP").await.unwrap().unwrap().path_ids,
        ids(&["gw", "manager-node1", "registry"])
    );
    assert!(two.registry.find_service("web", "").await.unwrap().is_some());
    assert!(two.registry.find_service("web", "ETHERNET").await.unwrap().is_none());
    assert!(two.registry.find_service("we", "").await.unwrap().is_none());
    let mut watch = two.registry.watch_service("web").await.unwrap();
    assert!(next(&mut watch).await.unwrap().is_some());
    _web.unregister().await.unwrap();
    assert!(next(&mut watch).await.unwrap().is_none());

    registry.stop().await;
    // Without the registry, the node's own are still known.
    assert_eq!(names(&one.registry.forwarders()), ["fwd-1"]);
    assert!(next(&mut watch).await.is_err());
    assert!(one.registry.find_service("web", "").await.is_err());
    drop(kept);
    for running in [program, one.running, two.running] {
        running.stop().await;
    }
}

/// The manager's registry is made in a network namespace of its own, so that this process is a pod to it.
#[tokio::test]
async fn a_workload_cannot_become_the_forwarder_of_its_node() {
    let lab = Lab::new();
    let listen = [ListenUrl::Unix(lab.socket("apart.sock")), "tcp://127.0.0.1:0".parse().unwrap()];
    let server = Server::bind(lab.source("manager"), &listen).await.unwrap();
    let mut config = ManagerConfig::new(None, server.urls()[1].to_string());
    config.forwarder_ids = ["spiffe://test.lab/trusted".parse().unwrap()].into();
    let (pool, runtime) = (lab.pool("manager"), tokio::runtime::Handle::current());
    let apart = std::thread::spawn(move || {
        #[allow(deprecated)] // Only this thread's network namespace changes.
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).ok()?;
        let _entered = runtime.enter();
        Some(ManagerRegistry::new(config, pool))
    });
    let Some(registry) = apart.join().unwrap() else {
        println!("SKIPPED a_workload_cannot_become_the_forwarder_of_its_node: needs root");
        return;
    };
    let node = lab.serve_node(registry, server);
    for url in &node.running.urls {
        let pod = lab.client("pod", url);
        let forwarder = nse("evil", "forwarder", "tcp://127.0.0.1:9");
        let error = tonic::Status::from(pod.register_endpoint(forwarder, PATIENCE).await.unwrap_err());
        assert_eq!(error.code(), Code::PermissionDenied, "{error}");
        for said in ["spiffe://test.lab/pod", "net:[", "NSM_FORWARDER_IDS"] {
            assert!(error.message().contains(said), "{said}: {error}");
        }
        // Nor beside another service, nor in the name of an endpoint that it has already.
        let kept = pod.register_endpoint(nse("gw", "web", "tcp://127.0.0.1:9"), PATIENCE).await.unwrap();
        let raw = lab.raw("pod", url).await;
        let mut both = nse("gw", "web", "tcp://127.0.0.1:9");
        both.network_service_names.push("forwarder".into());
        assert_eq!(raw.register(both).await.unwrap_err().code(), Code::PermissionDenied);
        kept.unregister().await.unwrap();
    }
    assert!(node.registry.forwarders().is_empty());
    for url in &node.running.urls {
        let trusted = lab.client("trusted", url);
        let forwarder = nse("fwd", "forwarder", "tcp://127.0.0.1:9");
        let kept = trusted.register_endpoint(forwarder, PATIENCE).await.unwrap();
        assert_eq!(names(&node.registry.forwarders()), ["fwd"], "who is on the list may");
        kept.unregister().await.unwrap();
    }
    node.running.stop().await;
}

#[tokio::test]
async fn a_manager_alone_is_its_own_registry() {
    let lab = Lab::new();
    let node = lab.node("node1", None).await;
    let program = lab.program("gw").await;
    let client = lab.client("gw", &node.running.url());
    let _web = client.register_service(service("web"), PATIENCE).await.unwrap();
    let kept = client.register_endpoint(nse("gw-1", "web", program.url()), PATIENCE).await.unwrap();
    assert_eq!(kept.item().path_ids, ids(&["gw", "manager-node1"]));
    let found = lab.client("fwd", &node.running.url()).find_endpoints(of_service("web")).await.unwrap();
    assert!(matches!(found[0].dial, DialTarget::Socket(_)));
    assert_eq!(node.registry.find_service("web", "").await.unwrap().unwrap().payload, "IP");
    kept.unregister().await.unwrap();
    assert!(node.registry.locals().is_empty());
    program.stop().await;
    node.running.stop().await;
}

#[tokio::test]
async fn registrations_survive_restarts_of_the_manager_and_of_the_registry_behind_it() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let node = lab.node("node1", Some(&registry)).await;
    let program = lab.program("gw").await;
    let client = lab.client("gw", &node.running.url());
    let _kept = client.register_endpoint(nse("gw-1", "web", program.url()), PATIENCE).await.unwrap();
    // From now on the descriptor is enough.
    std::fs::remove_file(lab.socket("gw.sock")).unwrap();

    registry.stop().await;
    let registry = lab.registry().await;
    let anybody = lab.client("anybody", &registry.url());
    eventually("registration at the new registry", async || {
        anybody.find_endpoints(named("gw-1")).await.ok().filter(|found| found.len() == 1)
    })
    .await;

    // The same address: the registry's entry has this manager's URL, and the manager does not know it.
    let address = node.running.urls[1].to_string();
    node.running.stop().await;
    drop(node.registry);
    let node = lab.node_with("node1", Some(&registry), |config| config.public_url.clone_from(&address)).await;
    let forwarder = lab.client("forwarder", &node.running.url());
    eventually("registration at the new manager", async || {
        let found = forwarder.find_endpoints(named("gw-1")).await.unwrap();
        // Nobody is ever sent to a manager that does not know the endpoint.
        assert!(found.iter().all(|endpoint| matches!(endpoint.dial, DialTarget::Socket(_))));
        (found.len() == 1).then_some(())
    })
    .await;
    let local = node.registry.local_endpoint("gw-1").unwrap();
    let reached = lab.pool("forwarder").get(local.dial(), PATIENCE).await.unwrap();
    assert_eq!(reached.peer().id().path(), "/gw");
    for running in [program, node.running, registry] {
        running.stop().await;
    }
}

#[tokio::test]
async fn a_manager_ends_what_nobody_refreshes_and_passes_on_what_it_does_not_know() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let short = |config: &mut ManagerConfig| config.lifetime = Duration::from_secs(2);
    let node = lab.node_with("node1", Some(&registry), short).await;
    let program = lab.program("gw").await;
    let raw = lab.raw("gw", &node.running.url()).await;
    raw.register(nse("tcp", "web", "tcp://127.0.0.1:9")).await.unwrap();
    let cluster = lab.client("anybody", &registry.url());
    assert_eq!(names(&cluster.find_endpoints(of_service("web")).await.unwrap()), ["tcp"]);
    eventually("expiry", async || node.registry.locals().is_empty().then_some(())).await;
    eventually("expiry at the registry", async || {
        cluster.find_endpoints(of_service("web")).await.unwrap().is_empty().then_some(())
    })
    .await;

    // Registered through a manager that has forgotten it: its end must still reach the registry.
    raw.register(nse("tcp", "web", "tcp://127.0.0.1:9")).await.unwrap();
    let other = lab.node("node2", Some(&registry)).await;
    lab.raw("gw", &other.running.url()).await.unregister("tcp").await.unwrap();
    assert!(cluster.find_endpoints(of_service("web")).await.unwrap().is_empty());
    // But only for its owner.
    raw.register(nse("tcp", "web", "tcp://127.0.0.1:9")).await.unwrap();
    let error = lab.raw("thief", &other.running.url()).await.unregister("tcp").await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    for running in [program, node.running, other.running, registry] {
        running.stop().await;
    }
}

#[tokio::test]
async fn what_has_moved_to_another_node_is_not_ended_by_the_one_before() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let short = |config: &mut ManagerConfig| config.lifetime = Duration::from_secs(1);
    let before = lab.node_with("node1", Some(&registry), short).await;
    let now = lab.node("node2", Some(&registry)).await;
    for node in [&before, &now] {
        let endpoint = lab.raw("gw", &node.running.url()).await;
        endpoint.register(nse("gw-1", "web", "tcp://127.0.0.1:9")).await.unwrap();
    }
    eventually("expiry", async || before.registry.locals().is_empty().then_some(())).await;
    // Long enough for the registry to be told.
    sleep(Duration::from_millis(300)).await;
    let found = lab.client("anybody", &registry.url()).find_endpoints(named("gw-1")).await.unwrap();
    assert!(matches!(&found[..], [one] if one.nse.url == now.running.urls[1].to_string()), "{found:?}");
    for running in [before.running, now.running, registry] {
        running.stop().await;
    }
}

#[tokio::test]
async fn sockets_that_cannot_be_used_are_refused() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let node = lab.node("node1", Some(&registry)).await;
    let program = lab.program("gw").await;
    // A socket over TCP cannot go along.
    let by_tcp = lab.client("gw", &node.running.urls[1]);
    let error = by_tcp.register_endpoint(nse("gw-1", "web", program.url()), PATIENCE).await.unwrap_err();
    assert!(matches!(&error, Error::NotLocal { .. }), "{error}");
    let raw_tcp = lab.raw("gw", &node.running.urls[1]).await;
    let error = raw_tcp.register(nse("gw-1", "web", "inode://1/2")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    // One that does not exist, one that is announced and never sent, no URL, a bad URL.
    let client = lab.client("gw", &node.running.url());
    let error =
        client.register_endpoint(nse("gw-1", "web", "unix:///nowhere/x.sock"), PATIENCE).await.unwrap_err();
    assert!(matches!(&error, Error::Socket { .. }), "{error}");
    let raw = lab.raw("gw", &node.running.url()).await;
    let mut request = with_path(nse("gw-1", "web", "inode://1/2"));
    request.set_timeout(Duration::from_millis(300));
    let mut stub = NetworkServiceEndpointRegistryClient::new(raw.connection.clone());
    assert_eq!(stub.register(request).await.unwrap_err().code(), Code::DeadlineExceeded);
    assert_eq!(raw.register(nse("gw-1", "web", "")).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(raw.register(nse("gw-1", "web", "ftp://x")).await.unwrap_err().code(), Code::InvalidArgument);
    // A descriptor of something else.
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::open(lab.dir.path(), flags, rustix::fs::Mode::empty()).unwrap();
    let id = FileId::of(&file).unwrap();
    assert!(raw.connection.send_fd(file));
    let error = raw.register(nse("gw-1", "web", format!("inode://{}/{}", id.dev, id.ino))).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(node.registry.locals().is_empty());
    assert!(lab.client("x", &registry.url()).find_endpoints(named("")).await.unwrap().is_empty());
    for running in [program, node.running, registry] {
        running.stop().await;
    }
}

#[tokio::test]
async fn a_name_of_this_node_cannot_be_taken_over_while_it_lives() {
    let lab = Lab::new();
    let registry = lab.registry().await;
    let node = lab.node("node1", Some(&registry)).await;
    let owner = lab.raw("owner", &node.running.url()).await;
    owner.register(nse("a", "s", "tcp://127.0.0.1:9")).await.unwrap();
    // The registry forgets who owns the name; the manager does not.
    registry.stop().await;
    let registry = lab.registry().await;
    let thief = lab.raw("thief", &node.running.url()).await;
    let error = thief.register(nse("a", "s", "tcp://127.0.0.1:10")).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    // What the registry refuses leaves no trace at the manager either.
    let direct = lab.raw("elsewhere", &registry.url()).await;
    direct.register(nse("b", "s", "tcp://127.0.0.1:11")).await.unwrap();
    let error = thief.register(nse("b", "s", "tcp://127.0.0.1:12")).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    assert!(node.registry.local_endpoint("b").is_none());
    assert_eq!(node.registry.find_endpoint("b").await.unwrap().unwrap().nse.url, "tcp://127.0.0.1:11");
    for running in [node.running, registry] {
        running.stop().await;
    }
}
