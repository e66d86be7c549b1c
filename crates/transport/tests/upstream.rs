//! Upstream's Go programs as peers: TLS, tokens, policies and descriptors in both directions.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use nsm_api::pb::{
    connection::{Connection as Wire, Mechanism, Path as WirePath, PathSegment},
    networkservice::{
        NetworkServiceRequest,
        network_service_client::NetworkServiceClient,
        network_service_server::{NetworkService, NetworkServiceServer},
    },
};
use nsm_identity::{Source, ca::Ca, policy};
use nsm_transport::{Deadline, DialUrl, FileId, ListenUrl, Peer, Pool, PoolConfig, Server, client_token};
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};
use tonic::{Request, Response, Status, service::Routes};

const PATIENCE: Duration = Duration::from_secs(60);

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Our CA, which all of them get their identities from.
struct Lab {
    peer: PathBuf,
    // Processes end before their directory goes.
    processes: Vec<Process>,
    dir: TempDir,
    _stop: oneshot::Sender<()>,
}

impl Lab {
    fn start(peer: PathBuf) -> Self {
        let dir = TempDir::new().unwrap();
        let text = format!(
            "trustDomain: test.nsm\nsvidTtl: 1h\nsockets: [{{path: {dir}/api.sock, node: n}}]\nentries:\n\
             - {{spiffeId: 'spiffe://test.nsm/ours', selectors: {{pid: {pid}}}}}\n\
             - {{spiffeId: 'spiffe://test.nsm/upstream', selectors: {{exe: '{peer}'}}}}\n",
            dir = dir.path().display(),
            pid = std::process::id(),
            peer = peer.canonicalize().unwrap().display(),
        );
        std::fs::write(dir.path().join("ca.yaml"), text).unwrap();
        let ca = Ca::start(&dir.path().join("ca.yaml")).unwrap();
        let (_stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(async move {
            ca.serve(async {
                let _ = stopped.await;
            })
            .await
            .unwrap();
        });
        Self { peer, dir, processes: Vec::new(), _stop }
    }

    fn api(&self) -> String {
        format!("unix://{}/api.sock", self.dir.path().display())
    }

    fn socket(&self, name: &str) -> String {
        format!("unix://{}/{name}.sock", self.dir.path().display())
    }

    fn run(&mut self, role: &str, arguments: &[&str]) {
        let log = File::create(self.dir.path().join(format!("{role}.log"))).unwrap();
        let child = Command::new(&self.peer)
            .arg(role)
            .args(arguments)
            .env("SPIFFE_ENDPOINT_SOCKET", self.api())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.processes.push(Process(child));
    }

    async fn log_says(&mut self, role: &str, text: &str) {
        let path = self.dir.path().join(format!("{role}.log"));
        let said = async {
            while !std::fs::read_to_string(&path).unwrap_or_default().contains(text) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if timeout(PATIENCE, said).await.is_err() {
            panic!("{role} does not say {text:?}: {}", std::fs::read_to_string(&path).unwrap());
        }
    }

    /// Starts a registry, a manager, a forwarder and an endpoint of upstream's; tells the manager's URL.
    async fn chain(&mut self) -> String {
        let (manager, registry) = (self.socket("manager"), self.socket("registry"));
        self.run("registry", &["--listen-on", &registry]);
        self.log_says("registry", "ready").await;
        self.run("manager", &["--name", "mgr", "--listen-on", &manager, "--registry-url", &registry]);
        self.log_says("manager", "ready").await;
        let (forwarder, endpoint) = (self.socket("forwarder"), self.socket("endpoint"));
        for (role, socket) in [("forwarder", &forwarder), ("endpoint", &endpoint)] {
            let arguments = ["--name", role, "--connect-to", &manager, "--listen-on", socket];
            self.run(role, &[&arguments[..], &["--service-names", "svc"]].concat());
        }
        self.log_says("forwarder", "ready").await;
        self.log_says("endpoint", "ready").await;
        manager
    }

    async fn source(&self) -> Source {
        timeout(PATIENCE, Source::open(&self.api())).await.unwrap().unwrap()
    }
}

fn inode_url(url: &str) -> Option<FileId> {
    let (dev, ino) = url.strip_prefix("inode://")?.split_once('/')?;
    Some(FileId { dev: dev.parse().ok()?, ino: ino.parse().ok()? })
}

/// A manager that is also the endpoint: enough for upstream's client.
struct Manager {
    seen: mpsc::UnboundedSender<FileId>,
}

#[tonic::async_trait]
impl NetworkService for Manager {
    async fn request(&self, request: Request<NetworkServiceRequest>) -> Result<Response<Wire>, Status> {
        let peer = Peer::of(&request)?.clone();
        let now = SystemTime::now();
        let deadline = Deadline::of(&request).ok_or_else(|| Status::invalid_argument("no deadline"))?;
        let theirs = client_token(request.metadata()).ok_or_else(|| Status::unauthenticated("no token"))?;
        let message = request.into_inner();
        let mut connection = message.connection.unwrap();
        let mechanism = message.mechanism_preferences.into_iter().next().unwrap();
        let id =
            inode_url(&mechanism.parameters["inodeURL"]).ok_or_else(|| Status::internal("no inode URL"))?;
        let fds = peer.fds().unwrap();
        let file = fds.take(id, deadline.0).await.map_err(|e| Status::deadline_exceeded(e.to_string()))?;
        assert_eq!(peer.unix().unwrap().netns_id().unwrap(), id, "it sends its own namespace");
        fds.send(file);
        let own = peer.token(Duration::from_secs(600), now).unwrap();
        let path = connection.path.as_mut().unwrap();
        let first = &mut path.path_segments[0];
        first.token = theirs.jwt().into();
        first.expires = Some(theirs.expires().into());
        path.path_segments.truncate(1);
        path.path_segments.push(PathSegment {
            name: "ours".into(),
            id: "ours-1".into(),
            token: own.jwt().into(),
            expires: Some(own.expires().into()),
            ..Default::default()
        });
        let tokens: Vec<_> = path.path_segments.iter().map(|segment| segment.token.as_str()).collect();
        policy::check_server(&tokens, 1, peer.leaf(), now)?;
        connection.mechanism = Some(mechanism);
        let context = connection.context.get_or_insert_default();
        context.ip_context.get_or_insert_default();
        context.dns_context.get_or_insert_default();
        self.seen.send(id).unwrap();
        Ok(Response::new(connection))
    }

    async fn close(&self, _: Request<Wire>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }
}

#[tokio::test]
async fn upstreams_client_is_served() {
    let Some(peer) = nsm_upstream::program("upstreams_client_is_served") else { return };
    let mut lab = Lab::start(peer);
    let url: ListenUrl = lab.socket("manager").parse().unwrap();
    let server = Server::bind(lab.source().await, &[url]).await.unwrap();
    let (seen, mut requests) = mpsc::unbounded_channel();
    let routes = Routes::new(NetworkServiceServer::new(Manager { seen }));
    let (_stop, stopped) = oneshot::channel::<()>();
    let served = tokio::spawn(server.serve(routes, &["networkservice.NetworkService"], async {
        let _ = stopped.await;
    }));
    let connect = lab.socket("manager");
    let wanted = ["--network-services", "kernel://svc/nsm0", "--count", "20", "--heal=false"];
    lab.run("client", &[&["--connect-to", &connect, "--name", "nsc"], &wanted[..]].concat());
    lab.log_says("client", "measured").await;
    let log = std::fs::read_to_string(lab.dir.path().join("client.log")).unwrap();
    for call in ["called NetworkService/Request ", "called NetworkService/Close "] {
        let good = |line: &&str| line.contains(call) && line.contains(" code=OK ");
        assert_eq!(log.lines().filter(good).count(), 20, "{log}");
    }
    for _ in 0..20 {
        requests.recv().await.unwrap();
    }
    drop(_stop);
    timeout(PATIENCE, served).await.unwrap().unwrap();
}

fn request(netns: FileId, name: &str) -> Request<NetworkServiceRequest> {
    let segment = PathSegment { name: "ours".into(), id: format!("ours-{name}"), ..Default::default() };
    let parameters = [
        ("name".to_owned(), name.to_owned()),
        ("inodeURL".to_owned(), format!("inode://{}/{}", netns.dev, netns.ino)),
    ];
    let mut request = Request::new(NetworkServiceRequest {
        connection: Some(Wire {
            id: format!("ours-{name}"),
            network_service: "svc".into(),
            path: Some(WirePath { unknown: None, index: 0, path_segments: vec![segment] }),
            ..Default::default()
        }),
        mechanism_preferences: vec![Mechanism {
            cls: "LOCAL".into(),
            r#type: "KERNEL".into(),
            parameters: parameters.into(),
            ..Mechanism::default()
        }],
        ..NetworkServiceRequest::default()
    });
    request.set_timeout(Duration::from_secs(15));
    request
}

#[tokio::test]
async fn upstreams_chain_is_asked() {
    let Some(peer) = nsm_upstream::program("upstreams_chain_is_asked") else { return };
    let mut lab = Lab::start(peer);
    let manager = lab.chain().await;
    let pool = Pool::new(lab.source().await, PoolConfig::default());
    let url: DialUrl = manager.parse().unwrap();
    let connection = pool.get(&url, PATIENCE).await.unwrap();
    assert_eq!(connection.peer().id().path(), "/upstream");
    let netns = Path::new("/proc/self/ns/net");
    let id = FileId::of_path(netns).unwrap();
    let fds = connection.fds().unwrap();
    for i in 0..20 {
        let file: OwnedFd = File::open(netns).unwrap().into();
        connection.send_fd(file);
        let mut client = NetworkServiceClient::new(connection.clone());
        let answer = client.request(request(id, &format!("nsm{i}"))).await.unwrap().into_inner();
        let tokens: Vec<_> = answer.path.unwrap().path_segments.into_iter().map(|s| s.token).collect();
        assert_eq!(tokens.len(), 4);
        policy::check_client(&tokens, 0, connection.peer().leaf(), SystemTime::now()).unwrap();
        let mechanism = answer.mechanism.unwrap();
        assert_eq!(inode_url(&mechanism.parameters["inodeURL"]), Some(id));
        drop(fds.take(id, Instant::now() + PATIENCE).await.unwrap());
    }
    assert_eq!(pool.handshakes(), 1);
}

/// Upstream's manager keeps what it received until the connection ends: with one connection for ever it would run out of
/// descriptors, with one that is left after some it does not.
#[tokio::test]
async fn upstreams_manager_lets_go_of_descriptors_when_connections_end() {
    const WIRES: usize = 40;
    const LIMIT: usize = 8;
    let test = "upstreams_manager_lets_go_of_descriptors_when_connections_end";
    let Some(peer) = nsm_upstream::program(test) else { return };
    let mut lab = Lab::start(peer);
    let manager = lab.chain().await;
    let pid = lab.processes[1].0.id();
    let kept = || {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let paths = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        paths.filter(|path| path.to_string_lossy().contains("/pod-")).count()
    };
    let url: DialUrl = manager.parse().unwrap();
    let mut counts = Vec::new();
    for descriptors in [usize::MAX, LIMIT] {
        let pool = Pool::new(lab.source().await, PoolConfig { descriptors, ..PoolConfig::default() });
        for i in 0..WIRES {
            // A file for each, as each pod has a namespace of its own.
            let path = lab.dir.path().join(format!("pod-{descriptors}-{i}"));
            std::fs::write(&path, "").unwrap();
            let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
            let file = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
            let id = FileId::of(&file).unwrap();
            let connection = pool.get(&url, PATIENCE).await.unwrap();
            connection.send_fd(file);
            let mut client = NetworkServiceClient::new(connection);
            let answer = client.request(request(id, &format!("c{i}"))).await.unwrap().into_inner();
            let mut close = Request::new(answer);
            close.set_timeout(Duration::from_secs(15));
            client.close(close).await.unwrap();
        }
        counts.push(kept());
    }
    println!("descriptors kept after {WIRES} wires: {counts:?}");
    assert!(counts[0] >= WIRES, "it does not keep them any more: then connections need not end, {counts:?}");
    // The first pool is gone, and with it its connection.
    assert!(counts[1] <= 2 * LIMIT, "{counts:?}");
}
