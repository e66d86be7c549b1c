//! What a workload may ask of its node's manager: the manager's own chain, on real sockets.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that cannot run says so")]

use std::{
    collections::BTreeSet,
    fs::File,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use nsm_api::{
    mechanism::{InodeUrl, LOCAL, REMOTE, key, kind},
    pb::{
        connection::{Connection, Mechanism, Path, PathSegment},
        networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
    },
};
use nsm_identity::{Source, UnixPeer, ca::Authority, token};
use nsm_manager::{Config, FollowService, WireOf, Workloads};
use nsm_mesh::{Connections, Error, Reason, metrics::Metrics, monitor::Hub};
use nsm_registry::{Cluster, ManagerConfig, ManagerRegistry};
use nsm_transport::{DialUrl, ListenUrl, Pool, PoolConfig, Server};
use tonic::{Code, Status, service::RoutesBuilder};

const PATIENCE: Duration = Duration::from_secs(30);

/// A manager without a registry: what passes its checks ends at the look-up of the service.
struct Node {
    authority: Authority,
    unix: DialUrl,
    tcp: DialUrl,
    heard: Arc<Heard>,
    _directory: tempfile::TempDir,
    served: tokio::task::JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.served.abort();
    }
}

fn source(authority: &Authority, name: &str) -> Source {
    let id = format!("spiffe://test.lab/{name}").parse().unwrap();
    Source::fixed(authority.identity(&id, Duration::from_secs(3600), SystemTime::now()).unwrap())
}

impl Node {
    async fn start() -> Self {
        let authority = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let listen_on =
            vec![ListenUrl::Unix(directory.path().join("nsm.sock")), "tcp://127.0.0.1:0".parse().unwrap()];
        let own = source(&authority, "manager");
        let server = Server::bind(own.clone(), &listen_on).await.unwrap();
        let urls: Vec<DialUrl> = server.urls().iter().map(|url| url.to_string().parse().unwrap()).collect();
        let heard = Arc::new(Heard::default());
        let config = Config {
            name: "manager".into(),
            listen_on,
            registry: Cluster::Alone,
            dial_timeout: PATIENCE,
            forwarder_service: "forwarder".into(),
            forwarder_ids: BTreeSet::new(),
            namespace_delegates: ["spiffe://test.lab/cni".parse().unwrap()].into(),
            excluded_prefixes: nsm_manager::ExcludedPrefixes::default(),
            max_token_lifetime: Duration::from_secs(600),
            guard: Default::default(),
            registrations: Default::default(),
            registry_answers: Default::default(),
            workloads: Some(Arc::clone(&heard) as Arc<dyn Workloads>),
            metrics: Arc::default(),
            monitor_readers: BTreeSet::new(),
        };
        let pool = Pool::new(own, PoolConfig::default());
        let registry = ManagerRegistry::new(ManagerConfig::new(None, urls[1].to_string()), pool.clone());
        let hub = Arc::new(Hub::default());
        let (edits, follow_service) = (nsm_manager::edits(&config), FollowService::new().0);
        let chain =
            nsm_manager::chain(&config, registry, edits, follow_service, None, Arc::clone(&hub), pool);
        let connections = Connections::serving("manager", chain, Arc::new(Metrics::default()));
        let mut routes = RoutesBuilder::default();
        nsm_mesh::server::add(&mut routes, connections, hub, Arc::default());
        let served = tokio::spawn(server.serve(routes.routes(), &[], std::future::pending()));
        let (unix, tcp) = (urls[0].clone(), urls[1].clone());
        Self { authority, unix, tcp, heard, _directory: directory, served }
    }

    /// Asks for a service that does not exist: NOT_FOUND is the answer to whoever may ask.
    async fn ask(
        &self,
        who: &str,
        url: &DialUrl,
        chosen: Option<Mechanism>,
        offered: &[Mechanism],
        hand_over: Option<Arc<OwnedFd>>,
    ) -> Status {
        let pool = Pool::new(source(&self.authority, who), PoolConfig::default());
        let connection = pool.get(url, PATIENCE).await.unwrap();
        if let Some(fd) = hand_over {
            assert!(connection.send_fd(fd));
        }
        let segment =
            |name: &str| PathSegment { name: name.into(), id: format!("{name}-0"), ..PathSegment::default() };
        let mut path = Path { unknown: None, index: 0, path_segments: vec![segment(who)] };
        if who == "forwarder" {
            // It asks for a client of its own node.
            let (client, now) = (source(&self.authority, "client"), SystemTime::now());
            let id = "spiffe://test.lab/forwarder".parse().unwrap();
            let token = token::mint(client.current().svid(), Some(&id), None, PATIENCE, now).unwrap();
            path.path_segments.insert(0, PathSegment { token: token.jwt().into(), ..segment("client") });
            path.index = 1;
        }
        let request = NetworkServiceRequest {
            connection: Some(Connection {
                id: format!("{who}-0"),
                network_service: "nothing".into(),
                mechanism: chosen,
                path: Some(path),
                ..Connection::default()
            }),
            mechanism_preferences: offered.to_vec(),
            ..NetworkServiceRequest::default()
        };
        NetworkServiceClient::new(connection).request(request).await.unwrap_err()
    }
}

/// What would be said on pods.
#[derive(Debug, Default)]
struct Heard(Mutex<Vec<String>>);

impl Workloads for Heard {
    fn asked(&self, wire: &WireOf, conn: &Connection, process: Option<&UnixPeer>) {
        let who = process.and_then(UnixPeer::pid).unwrap_or_default() == std::process::id();
        let WireOf { workload, connection } = wire;
        let service = &conn.network_service;
        self.0
            .lock()
            .unwrap()
            .push(format!("{workload} {connection} asks for {service}, this process: {who}"));
    }

    fn failed(&self, _: &WireOf, error: &Error) {
        self.0.lock().unwrap().push(error.to_string());
    }

    fn is(&self, _: &WireOf, _: &Connection) {}

    fn ended(&self, _: &WireOf, reason: Reason) {
        self.0.lock().unwrap().push(format!("{reason:?}"));
    }
}

#[tokio::test]
async fn what_a_workload_asks_for_and_is_refused_is_told_and_nothing_of_other_nodes() {
    let node = Node::start().await;
    let _refused = node.ask("forwarder", &node.tcp, None, &[vxlan()], None).await;
    assert_eq!(*node.heard.0.lock().unwrap(), Vec::<String>::new());
    let refused = node.ask("pod", &node.unix, None, &[Mechanism::new(LOCAL, kind::KERNEL)], None).await;
    let heard = node.heard.0.lock().unwrap().clone();
    assert_eq!(heard[0], "spiffe://test.lab/pod pod-0 asks for nothing, this process: true");
    // To the letter what the workload is answered.
    assert_eq!(heard[1..], [refused.message()]);
}

fn vxlan() -> Mechanism {
    let mut vxlan = Mechanism::new(REMOTE, kind::VXLAN);
    vxlan.set(key::SRC_IP, "192.0.2.66");
    vxlan
}

#[tokio::test]
async fn a_workload_cannot_aim_tunnels() {
    let node = Node::start().await;
    let (kernel, noop) = (Mechanism::new(LOCAL, kind::KERNEL), Mechanism::new(LOCAL, kind::NOOP));
    for (chosen, offered) in [
        (None, vec![vxlan()]),
        (None, vec![kernel.clone(), vxlan()]),
        (Some(vxlan()), vec![kernel.clone()]),
        (Some(Mechanism::new("", kind::VXLAN)), vec![]),
        (None, vec![Mechanism::new("local", kind::KERNEL)]),
    ] {
        let refused = node.ask("pod", &node.unix, chosen.clone(), &offered, None).await;
        assert_eq!(refused.code(), Code::PermissionDenied, "{chosen:?} {offered:?}: {refused}");
        for said in ["spiffe://test.lab/pod", LOCAL, "TCP"] {
            assert!(refused.message().contains(said), "{said}: {refused}");
        }
    }
    for (chosen, offered) in [
        (None, vec![kernel.clone(), noop]),
        (Some(kernel.clone()), vec![]),
        (Some(Mechanism::default()), vec![kernel]),
    ] {
        let passed = node.ask("pod", &node.unix, chosen, &offered, None).await;
        assert_eq!(passed.code(), Code::NotFound, "{passed}");
    }
    // A forwarder of another node.
    let passed = node.ask("forwarder", &node.tcp, None, &[vxlan()], None).await;
    assert_eq!(passed.code(), Code::NotFound, "{passed}");
}

#[tokio::test]
async fn a_manager_speaks_for_workloads_of_its_node_only() {
    let node = Node::start().await;
    let kernel = [Mechanism::new(LOCAL, kind::KERNEL)];
    let refused = node.ask("pod", &node.tcp, None, &kernel, None).await;
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    for said in ["spiffe://test.lab/pod asks for itself by TCP", "NSM_WITHOUT_CHECKS=on_node"] {
        assert!(refused.message().contains(said), "{said}: {refused}");
    }
    let passed = node.ask("pod", &node.unix, None, &kernel, None).await;
    assert_eq!(passed.code(), Code::NotFound, "{passed}");
}

#[tokio::test]
async fn a_workload_gets_wires_only_into_its_own_namespace() {
    let open = || {
        let file = File::open("/proc/thread-self/ns/net").unwrap();
        let meta = file.metadata().unwrap();
        (InodeUrl { dev: meta.dev(), ino: meta.ino() }, Arc::new(OwnedFd::from(file)))
    };
    let other = std::thread::spawn(move || {
        #[allow(deprecated)] // Only this thread's network namespace changes.
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).ok()?;
        Some(open())
    });
    let Some((other, other_fd)) = other.join().unwrap() else {
        println!("SKIPPED a_workload_gets_wires_only_into_its_own_namespace: needs root");
        return;
    };
    let (own, own_fd) = open();
    let node = Node::start().await;
    let kernel = |url| [Mechanism::kernel("nsm0", Some(url))];
    let refused = node.ask("pod", &node.unix, None, &kernel(other), Some(Arc::clone(&other_fd))).await;
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert!(refused.message().contains(&other.to_string()), "{refused}");
    let passed = node.ask("pod", &node.unix, None, &kernel(own), Some(own_fd)).await;
    assert_eq!(passed.code(), Code::NotFound, "its own: {passed}");
    let passed = node.ask("cni", &node.unix, None, &kernel(other), Some(other_fd)).await;
    assert_eq!(passed.code(), Code::NotFound, "a delegate: {passed}");
}
