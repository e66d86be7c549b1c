//! Real sockets, real mTLS, real gRPC: what a handler and a caller see of each other.
#![allow(clippy::unwrap_used)]

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use nsm_api::pb::{
    connection::{Connection as Wire, Path, PathSegment},
    networkservice::{
        NetworkServiceRequest,
        network_service_client::NetworkServiceClient,
        network_service_server::{NetworkService, NetworkServiceServer},
    },
};
use nsm_identity::{Identity, Source, ca::Authority, policy, token};
use nsm_transport::{
    Connection, Deadline, DialUrl, FileId, Limits, ListenUrl, Peer, Pool, PoolConfig, Server, client_token,
};
use tempfile::TempDir;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tonic::{Code, Request, Response, Status, service::Routes};

const PATIENCE: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_secs(3600);

/// Answers as the request's `network_service` says.
struct Handler {
    started: AtomicUsize,
    release: tokio::sync::Semaphore,
}

fn file_id(labels: &std::collections::BTreeMap<String, String>) -> FileId {
    FileId { dev: labels["dev"].parse().unwrap(), ino: labels["ino"].parse().unwrap() }
}

#[tonic::async_trait]
impl NetworkService for Handler {
    async fn request(&self, request: Request<NetworkServiceRequest>) -> Result<Response<Wire>, Status> {
        let peer = Peer::of(&request)?.clone();
        let deadline = Deadline::of(&request);
        let caller = client_token(request.metadata());
        let mut connection = request.into_inner().connection.unwrap();
        self.started.fetch_add(1, Ordering::SeqCst);
        match connection.network_service.as_str() {
            // Tells what it knows of its caller, and signs a token for it.
            "whoami" => {
                let now = SystemTime::now();
                let caller = caller.ok_or_else(|| Status::unauthenticated("no token"))?;
                let own = peer.token(HOUR, now).unwrap();
                policy::check_server(&[caller.jwt(), own.jwt()], 1, peer.leaf(), now)?;
                connection.labels.insert("peer".into(), peer.id().to_string());
                connection.labels.insert("address".into(), peer.address().into());
                if let Some(unix) = peer.unix() {
                    connection.labels.insert("pid".into(), unix.pid().to_string());
                    let id = unix.netns_id().unwrap();
                    connection.labels.insert("netns".into(), format!("{}/{}", id.dev, id.ino));
                }
                let segment = |token: &token::Token| PathSegment {
                    token: token.jwt().into(),
                    expires: Some(token.expires().into()),
                    ..Default::default()
                };
                connection.path =
                    Some(Path { index: 0, path_segments: vec![segment(&caller), segment(&own)] });
            }
            // Takes the named descriptor and sends it back.
            "fd" => {
                let fds = peer.fds().ok_or_else(|| Status::failed_precondition("no descriptors here"))?;
                let id = file_id(&connection.labels);
                let fd = fds
                    .take(id, deadline.unwrap().0)
                    .await
                    .map_err(|e| Status::deadline_exceeded(e.to_string()))?;
                assert_eq!(FileId::of(&fd).unwrap(), id);
                fds.send(fd);
            }
            "wait" => drop(self.release.acquire().await.unwrap()),
            "panic" => panic!("as the test wants it"),
            other => return Err(Status::not_found(other)),
        }
        Ok(Response::new(connection))
    }

    async fn close(&self, _: Request<Wire>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }
}

/// A server with its own authority, and what is needed to dial it.
struct Lab {
    dir: TempDir,
    authority: Authority,
    handler: Arc<Handler>,
    urls: Vec<DialUrl>,
    identity: watch::Sender<Arc<Identity>>,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<()>,
}

fn identity(authority: &Authority, name: &str, lifetime: Duration) -> Identity {
    let id = format!("spiffe://test.lab/{name}").parse().unwrap();
    authority.identity(&id, lifetime, SystemTime::now()).unwrap()
}

impl Lab {
    async fn start() -> Self {
        Self::with_limits(Limits::default()).await
    }

    async fn with_limits(limits: Limits) -> Self {
        let dir = TempDir::new().unwrap();
        let authority = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
        let (identity, source) = watch::channel(Arc::new(identity(&authority, "server", HOUR)));
        let listen = [
            ListenUrl::Unix(dir.path().join("sub/s.sock")),
            "tcp://127.0.0.1:0".parse::<ListenUrl>().unwrap(),
        ];
        let server = Server::bind(Source::from_watch(source), &listen).await.unwrap().with_limits(limits);
        let urls = server.urls().iter().map(|url| url.to_string().parse().unwrap()).collect();
        let handler =
            Arc::new(Handler { started: AtomicUsize::new(0), release: tokio::sync::Semaphore::new(0) });
        let routes = Routes::new(NetworkServiceServer::from_arc(handler.clone()));
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(server.serve(routes, &["networkservice.NetworkService"], async {
            let _ = stopped.await;
        }));
        Self { dir, authority, handler, urls, identity, stop: Some(stop), served }
    }

    fn pool(&self, name: &str) -> Pool {
        Pool::new(Source::fixed(identity(&self.authority, name, HOUR)), PoolConfig::default())
    }

    fn unix(&self) -> &DialUrl {
        &self.urls[0]
    }

    fn tcp(&self) -> &DialUrl {
        &self.urls[1]
    }

    async fn stop(mut self) -> TempDir {
        self.stop.take().unwrap().send(()).unwrap();
        timeout(PATIENCE, self.served).await.unwrap().unwrap();
        self.dir
    }
}

fn ask(what: &str) -> Request<NetworkServiceRequest> {
    ask_fd(what, None)
}

fn ask_fd(what: &str, file: Option<FileId>) -> Request<NetworkServiceRequest> {
    let mut connection = Wire { network_service: what.into(), ..Default::default() };
    if let Some(file) = file {
        connection.labels.insert("dev".into(), file.dev.to_string());
        connection.labels.insert("ino".into(), file.ino.to_string());
    }
    let mut request =
        Request::new(NetworkServiceRequest { connection: Some(connection), ..Default::default() });
    request.set_timeout(PATIENCE);
    request
}

fn client(connection: &Connection) -> NetworkServiceClient<Connection> {
    NetworkServiceClient::new(connection.clone())
}

#[tokio::test]
async fn both_sides_know_each_other_over_unix_and_tcp() {
    let lab = Lab::start().await;
    let pool = lab.pool("client");
    for url in [lab.unix(), lab.tcp()] {
        let connection = pool.get(url, PATIENCE).await.unwrap();
        let answer = client(&connection).request(ask("whoami")).await.unwrap().into_inner();
        assert_eq!(answer.labels["peer"], "spiffe://test.lab/client");
        assert_eq!(connection.peer().id().as_str(), "spiffe://test.lab/server");
        let is_unix = url == lab.unix();
        assert_eq!(connection.peer().unix().is_some(), is_unix);
        assert_eq!(connection.fds().is_some(), is_unix);
        if is_unix {
            let netns = FileId::of_path("/proc/self/ns/net").unwrap();
            assert_eq!(answer.labels["pid"], std::process::id().to_string());
            assert_eq!(answer.labels["netns"], format!("{}/{}", netns.dev, netns.ino));
            assert_eq!(connection.peer().unix().unwrap().netns_id().unwrap(), netns);
        }
        let tokens: Vec<_> = answer.path.unwrap().path_segments.into_iter().map(|s| s.token).collect();
        policy::check_client(&tokens, 0, connection.peer().leaf(), SystemTime::now()).unwrap();
        let claims = token::claims(&tokens[0]).unwrap();
        assert_eq!(claims.audience, ["spiffe://test.lab/server"]);
    }
    assert_eq!(pool.handshakes(), 2);
    let dir = lab.stop().await;
    assert!(!dir.path().join("sub/s.sock").exists(), "the socket file goes with its server");
}

#[tokio::test]
async fn a_descriptor_goes_there_and_back() {
    let lab = Lab::start().await;
    let connection = lab.pool("client").get(lab.unix(), PATIENCE).await.unwrap();
    let file: OwnedFd = File::create(lab.dir.path().join("a file")).unwrap().into();
    let id = FileId::of(&file).unwrap();
    assert!(connection.send_fd(file));
    client(&connection).request(ask_fd("fd", Some(id))).await.unwrap();
    let back = connection.fds().unwrap().take(id, Instant::now() + PATIENCE).await.unwrap();
    assert_eq!(FileId::of(&back).unwrap(), id);
    lab.stop().await;
}

#[tokio::test]
async fn an_expired_deadline_and_a_panic_have_the_codes_that_callers_expect() {
    let lab = Lab::start().await;
    let connection = lab.pool("client").get(lab.unix(), PATIENCE).await.unwrap();
    let mut late = ask("wait");
    late.set_timeout(Duration::from_millis(50));
    let status = client(&connection).request(late).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    let status = client(&connection).request(ask("panic")).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status}");
    // The connection and the server go on.
    client(&connection).request(ask("whoami")).await.unwrap();
    lab.stop().await;
}
