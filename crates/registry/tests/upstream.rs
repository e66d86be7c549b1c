//! Upstream's programs as peers in every position of a registration.
#![allow(clippy::unwrap_used)]

use std::{
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nsm_api::pb::registry::{NetworkService, NetworkServiceEndpoint, NetworkServiceLabels};
use nsm_identity::Source;
use nsm_registry::{Client, ClientConfig, Config, ManagerConfig, ManagerRegistry, Registry, SERVICES};
use nsm_transport::{DialTarget, DialUrl, Pool, PoolConfig, Server};
use tempfile::TempDir;
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::service::Routes;

const PATIENCE: Duration = Duration::from_secs(60);

/// A directory, a Workload API for all, and the processes that were started.
struct Lab {
    children: Vec<Child>,
    dir: TempDir,
    peer: PathBuf,
    source: Option<Source>,
    stops: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Lab {
    async fn start(test: &str) -> Option<Self> {
        let peer = nsm_upstream::program(test)?;
        let dir = TempDir::new().unwrap();
        let mut lab = Self { children: vec![], dir, peer, source: None, stops: vec![] };
        let config = lab.dir.path().join("identity.json");
        let entry = |name: &str, exe: &std::path::Path| serde_json::json!({"spiffeId": format!("spiffe://test.nsm/{name}"), "selectors": {"exe": exe}});
        let text = serde_json::json!({
            "trustDomain": "test.nsm",
            "sockets": [{"path": lab.path("agent")}],
            "entries": [entry("theirs", &lab.peer), entry("ours", &std::env::current_exe().unwrap())],
        });
        std::fs::write(&config, text.to_string()).unwrap();
        lab.run(&["identity", "--config", &config.display().to_string()]);
        lab.source = Some(timeout(PATIENCE, Source::open(&lab.url("agent"))).await.unwrap().unwrap());
        Some(lab)
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(format!("{name}.sock")).display().to_string()
    }

    fn url(&self, name: &str) -> String {
        format!("unix://{}", self.path(name))
    }

    fn run(&mut self, arguments: &[&str]) {
        let mut command = Command::new(&self.peer);
        command.args(arguments).env("SPIFFE_ENDPOINT_SOCKET", self.url("agent")).stdout(Stdio::null());
        self.children.push(command.spawn().unwrap());
    }

    fn source(&self) -> Source {
        self.source.clone().unwrap()
    }

    fn pool(&self) -> Pool {
        Pool::new(self.source(), PoolConfig::default())
    }

    fn client(&self, name: &str) -> Client {
        let url: DialUrl = self.url(name).parse().unwrap();
        Client::new(self.pool(), url, ClientConfig::default())
    }

    async fn our_registry(&mut self) {
        let config = Config { listen_on: vec![self.url("registry").parse().unwrap()], ..Config::default() };
        let registry = Registry::bind(config, self.source()).await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(registry.serve(async { drop(stopped.await) }));
        self.stops.push((stop, served));
    }

    async fn our_manager(&mut self) -> ManagerRegistry {
        let listen = [self.url("manager").parse().unwrap(), "tcp://127.0.0.1:0".parse().unwrap()];
        let server = Server::bind(self.source(), &listen).await.unwrap();
        let public = server.urls()[1].to_string();
        let registry = self.url("registry").parse().unwrap();
        let manager = ManagerRegistry::new(ManagerConfig::new(Some(registry), public), self.pool());
        let (stop, stopped) = oneshot::channel::<()>();
        let (routes, closing) = (manager.add_to(Routes::default()), manager.clone());
        let served = tokio::spawn(async move {
            let shutdown = async move {
                drop(stopped.await);
                closing.end_watches();
            };
            server.serve(routes, &SERVICES, shutdown).await;
        });
        self.stops.push((stop, served));
        manager
    }

    /// Something that listens, to be registered.
    async fn program(&mut self, name: &str) {
        let server = Server::bind(self.source(), &[self.url(name).parse().unwrap()]).await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(async move {
            server.serve(Routes::default(), &[], async { drop(stopped.await) }).await;
        });
        self.stops.push((stop, served));
    }

    fn their_registry(&mut self) {
        let url = self.url("registry");
        self.run(&["registry", "--listen-on", &url]);
    }

    fn their_manager(&mut self) {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let listen = format!("{},tcp://127.0.0.1:{port}", self.url("manager"));
        let registry = self.url("registry");
        self.run(&["manager", "--name", "manager", "--listen-on", &listen, "--registry-url", &registry]);
    }

    fn their_endpoint(&mut self) {
        let (manager, own) = (self.url("manager"), self.url("their-nse"));
        self.run(&[
            "endpoint",
            "--name",
            "their-nse",
            "--connect-to",
            &manager,
            "--listen-on",
            &own,
            "--service-names",
            "svc",
            "--payload",
            "IP",
        ]);
    }

    fn their_forwarder(&mut self) {
        let (manager, own) = (self.url("manager"), self.url("their-fwd"));
        self.run(&["forwarder", "--name", "their-fwd", "--connect-to", &manager, "--listen-on", &own]);
    }

    /// Upstream's client makes three connections through whatever there is.
    async fn their_client_connects(&mut self) {
        let mut command = tokio::process::Command::new(&self.peer);
        let manager = self.url("manager");
        let wanted = ["--network-services", "kernel://svc/nsm0", "--count", "3"];
        command.args(["client", "--name", "nsc", "--connect-to", &manager]).args(wanted);
        command.env("SPIFFE_ENDPOINT_SOCKET", self.url("agent")).kill_on_drop(true);
        let output = timeout(PATIENCE, command.output()).await.unwrap().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("measured"), "{text}");
    }

    async fn stop(mut self) {
        for (stop, served) in std::mem::take(&mut self.stops) {
            let _ = stop.send(());
            timeout(PATIENCE, served).await.unwrap().unwrap();
        }
    }
}

fn nse(name: &str, url: String) -> NetworkServiceEndpoint {
    let labels = NetworkServiceLabels { unknown: None, labels: [("app".to_owned(), "gw".to_owned())].into() };
    NetworkServiceEndpoint {
        name: name.into(),
        network_service_names: vec!["our-svc".into()],
        network_service_labels: [("our-svc".to_owned(), labels)].into(),
        url,
        ..Default::default()
    }
}

fn named(name: &str) -> NetworkServiceEndpoint {
    NetworkServiceEndpoint { name: name.into(), ..Default::default() }
}

async fn eventually<R>(what: &str, mut look: impl AsyncFnMut() -> Option<R>) -> R {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "{what} did not happen");
        sleep(Duration::from_millis(50)).await;
    }
}

/// Registers, finds by descriptor, connects, refreshes the watch and unregisters, at whatever manager
/// and registry there are.
async fn our_endpoint_is_served(lab: &mut Lab) {
    lab.program("gw").await;
    let client = lab.client("manager");
    // A name of its own: upstream lets nobody else register a service that an identity has registered.
    let service = NetworkService { name: "our-svc".into(), payload: "IP".into(), ..Default::default() };
    let service = client.register_service(service, PATIENCE).await.unwrap();
    assert_eq!(service.item().payload, "IP");
    let kept = client.register_endpoint(nse("gw-1", lab.url("gw")), PATIENCE).await.unwrap();
    let item = kept.item();
    assert_eq!(item.url, lab.url("gw"));
    assert_eq!(item.path_ids.len(), 3, "{:?}", item.path_ids);
    assert!(item.expiration_time.is_some() && item.initial_registration_time.is_some());
    let found = client.find_endpoints(named("gw-1")).await.unwrap();
    assert!(matches!(found[0].dial, DialTarget::Socket(_)), "{:?}", found[0]);
    lab.pool().get(found[0].dial.clone(), PATIENCE).await.unwrap();
    let direct = lab.client("registry").find_endpoints(named("gw-1")).await.unwrap();
    assert!(direct[0].nse.url.starts_with("tcp://127.0.0.1:"), "{:?}", direct[0]);
    assert_eq!(kept.state().borrow().problem, None);
    kept.unregister().await.unwrap();
    assert!(client.find_endpoints(named("gw-1")).await.unwrap().is_empty());
    assert!(lab.client("registry").find_endpoints(named("gw-1")).await.unwrap().is_empty());
}

#[tokio::test]
async fn our_client_with_their_manager_and_their_registry() {
    let Some(mut lab) = Lab::start("our_client_with_their_manager_and_their_registry").await else { return };
    lab.their_registry();
    lab.their_manager();
    our_endpoint_is_served(&mut lab).await;
    lab.stop().await;
}

#[tokio::test]
async fn our_manager_with_their_registry() {
    let Some(mut lab) = Lab::start("our_manager_with_their_registry").await else { return };
    lab.their_registry();
    let manager = lab.our_manager().await;
    our_endpoint_is_served(&mut lab).await;
    // Their endpoint and forwarder, by their own sockets' descriptors.
    lab.their_endpoint();
    lab.their_forwarder();
    for name in ["their-nse", "their-fwd"] {
        let local = eventually("their registration", async || manager.local_endpoint(name)).await;
        assert!(matches!(local.dial(), DialTarget::Socket(_)));
        lab.pool().get(local.dial(), PATIENCE).await.unwrap();
    }
    let forwarders = manager.forwarders();
    assert_eq!(forwarders.len(), 1);
    assert_eq!(forwarders[0].nse.network_service_labels["forwarder"].labels["p2p"], "true");
    assert!(manager.find_service("svc", "IP").await.unwrap().is_some());
    lab.stop().await;
}

#[tokio::test]
async fn our_registry_with_their_manager_endpoint_forwarder_and_client() {
    let test = "our_registry_with_their_manager_endpoint_forwarder_and_client";
    let Some(mut lab) = Lab::start(test).await else { return };
    lab.our_registry().await;
    lab.their_manager();
    lab.their_forwarder();
    lab.their_endpoint();
    let client = lab.client("registry");
    eventually("their registrations", async || {
        let found = client.find_endpoints(named("")).await.ok()?;
        (found.len() == 2).then_some(())
    })
    .await;
    lab.their_client_connects().await;
    our_endpoint_is_served(&mut lab).await;
    lab.stop().await;
}

#[tokio::test]
async fn their_registrations_heal_when_our_registry_restarts() {
    let Some(mut lab) = Lab::start("their_registrations_heal_when_our_registry_restarts").await else {
        return;
    };
    lab.our_registry().await;
    lab.their_manager();
    lab.their_endpoint();
    let client = lab.client("registry");
    let there = async || {
        let found = client.find_endpoints(named("their-nse")).await.ok()?;
        (found.len() == 1).then(|| found[0].nse.clone())
    };
    let before = eventually("their registration", there).await;
    let (stop, served) = lab.stops.pop().unwrap();
    stop.send(()).unwrap();
    served.await.unwrap();
    lab.our_registry().await;
    let after = eventually("their registration at the new registry", there).await;
    assert_eq!(after.path_ids, before.path_ids);
    lab.stop().await;
}
