//! Real sockets, real mTLS, real gRPC: what a handler and a caller see of each other.
#![allow(clippy::unwrap_used)]

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::{AsRawFd, OwnedFd},
    os::unix::net::UnixStream,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use nsm_api::pb::{
    connection::{
        Connection as Wire, ConnectionEvent, MonitorScopeSelector, Path, PathSegment,
        monitor_connection_client::MonitorConnectionClient,
        monitor_connection_server::{MonitorConnection, MonitorConnectionServer},
    },
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
    dropped: AtomicUsize,
    release: tokio::sync::Semaphore,
}

/// Counts what is dropped before its end.
struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[tonic::async_trait]
impl MonitorConnection for Handler {
    type MonitorConnectionsStream =
        Pin<Box<dyn tokio_stream::Stream<Item = Result<ConnectionEvent, Status>> + Send>>;

    /// One event at once, then none.
    async fn monitor_connections(
        &self,
        _: Request<MonitorScopeSelector>,
    ) -> Result<Response<Self::MonitorConnectionsStream>, Status> {
        use tokio_stream::StreamExt;
        let first = tokio_stream::once(Ok(ConnectionEvent::default()));
        Ok(Response::new(Box::pin(first.chain(tokio_stream::pending()))))
    }
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
                    connection.labels.insert("pid".into(), unix.pid().unwrap().to_string());
                    let id = unix.netns_id().unwrap();
                    connection.labels.insert("netns".into(), format!("{}/{}", id.dev, id.ino));
                }
                let segment = |token: &token::Token| PathSegment {
                    token: token.jwt().into(),
                    expires: Some(token.expires().into()),
                    ..Default::default()
                };
                connection.path = Some(Path {
                    unknown: None,
                    index: 0,
                    path_segments: vec![segment(&caller), segment(&own)],
                });
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
            "wait" => self.release.acquire().await.unwrap().forget(),
            "dropped" => {
                let _counted = Counted(&self.dropped);
                std::future::pending::<()>().await;
            }
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
        let handler = Arc::new(Handler {
            started: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            release: tokio::sync::Semaphore::new(0),
        });
        let routes = Routes::new(NetworkServiceServer::from_arc(handler.clone()))
            .add_service(MonitorConnectionServer::from_arc(handler.clone()));
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
    let file: OwnedFd = File::open("/proc/self/ns/net").unwrap().into();
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

#[tokio::test]
async fn a_stream_ends_with_its_deadline() {
    let lab = Lab::start().await;
    let connection = lab.pool("client").get(lab.unix(), PATIENCE).await.unwrap();
    let mut request = Request::new(MonitorScopeSelector::default());
    request.set_timeout(Duration::from_millis(200));
    let mut monitor = MonitorConnectionClient::new(connection.clone());
    let mut events = monitor.monitor_connections(request).await.unwrap().into_inner();
    events.message().await.unwrap().unwrap();
    let status = timeout(PATIENCE, events.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    lab.stop().await;
}

/// The codes of a call that only the server watches: our client would notice the deadline first.
async fn code_from_server(lab: &Lab, path: &'static str, message: impl prost::Message) -> (u32, bool) {
    let stream = tokio::net::UnixStream::connect(lab.unix().unix_path().unwrap()).await.unwrap();
    let config = identity(&lab.authority, "raw", HOUR).client_config().clone();
    let name = rustls_pki_types::ServerName::try_from("x").unwrap();
    let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap();
    let (mut sender, driver) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    )
    .await
    .unwrap();
    let driver = tokio::spawn(driver);
    let mut body = vec![0];
    body.extend(u32::try_from(message.encoded_len()).unwrap().to_be_bytes());
    message.encode(&mut body).unwrap();
    let request = http::Request::post(format!("https://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "200m")
        .body(http_body_util::Full::new(bytes::Bytes::from(body)))
        .unwrap();
    let response = timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap();
    let code = |headers: &http::HeaderMap| {
        headers.get("grpc-status").map(|code| code.to_str().unwrap().parse::<u32>().unwrap())
    };
    let first = code(response.headers());
    let body = http_body_util::BodyExt::collect(response.into_body());
    let body = timeout(PATIENCE, body).await.unwrap().unwrap();
    let last = body.trailers().and_then(code);
    driver.abort();
    (first.or(last).unwrap(), first.is_none())
}

#[tokio::test]
async fn the_server_itself_answers_an_expired_deadline() {
    let lab = Lab::start().await;
    let deadline_exceeded = Code::DeadlineExceeded as u32;
    let message = NetworkServiceRequest {
        connection: Some(Wire { network_service: "dropped".into(), ..Default::default() }),
        ..Default::default()
    };
    let answer = code_from_server(&lab, "/networkservice.NetworkService/Request", message).await;
    assert_eq!(answer, (deadline_exceeded, false));
    assert_eq!(lab.handler.dropped.load(Ordering::SeqCst), 1, "its handler ends");
    let path = "/connection.MonitorConnection/MonitorConnections";
    let answer = code_from_server(&lab, path, MonitorScopeSelector::default()).await;
    assert_eq!(answer, (deadline_exceeded, true), "a stream ends with trailers");
    lab.stop().await;
}

#[tokio::test]
async fn a_caller_that_leaves_ends_its_handler() {
    let lab = Lab::start().await;
    let connection = lab.pool("client").get(lab.unix(), PATIENCE).await.unwrap();
    let mut calls = client(&connection);
    let call = tokio::spawn(async move { calls.request(ask("dropped")).await });
    until(|| lab.handler.started.load(Ordering::SeqCst) == 1).await;
    call.abort();
    until(|| lab.handler.dropped.load(Ordering::SeqCst) == 1).await;
    lab.stop().await;
}

async fn until(condition: impl Fn() -> bool) {
    let holds = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, holds).await.unwrap();
}

#[tokio::test]
async fn headers_may_be_large_and_health_is_answered() {
    let lab = Lab::start().await;
    let connection = lab.pool("client").get(lab.unix(), PATIENCE).await.unwrap();
    let mut request = ask("whoami");
    request.metadata_mut().insert("path", "x".repeat(64 * 1024).parse().unwrap());
    client(&connection).request(request).await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(connection);
    for (service, known) in [("", true), ("networkservice.NetworkService", true), ("other", false)] {
        let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
        let answer = health.check(request).await;
        assert_eq!(answer.is_ok_and(|a| a.into_inner().status == 1), known, "{service:?}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn one_handshake_however_many_wait_and_one_error_for_all() {
    let lab = Lab::start().await;
    let pool = lab.pool("client");
    let gets: Vec<_> = (0..100)
        .map(|_| {
            let (pool, url) = (pool.clone(), lab.tcp().clone());
            tokio::spawn(async move { pool.get(url, PATIENCE).await.map(drop) })
        })
        .collect();
    for get in gets {
        get.await.unwrap().unwrap();
    }
    assert_eq!((pool.handshakes(), pool.len()), (1, 1));

    let nobody: DialUrl = "tcp://127.0.0.1:1".parse().unwrap();
    let error = pool.get(&nobody, PATIENCE).await.unwrap_err();
    assert!(error.is_transient());
    assert!(error.to_string().contains("tcp://127.0.0.1:1"), "{error}");
    let status = Status::from(error);
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("refused"), "{status}");
    let nowhere = DialUrl::Unix(lab.dir.path().join("nowhere.sock"));
    let status = Status::from(pool.get(&nowhere, PATIENCE).await.unwrap_err());
    assert!(status.message().contains("No such file"), "{status}");
    assert_eq!(pool.len(), 1, "what failed is not kept");
    lab.stop().await;
}

#[tokio::test]
async fn a_broken_connection_is_replaced_and_a_late_server_waited_for() {
    let lab = Lab::start().await;
    let pool = lab.pool("client");
    let url = lab.unix().clone();
    let connection = pool.get(&url, PATIENCE).await.unwrap();
    client(&connection).request(ask("whoami")).await.unwrap();
    let (authority, path) = (identity(&lab.authority, "second", HOUR), url.unix_path().unwrap().to_owned());
    let dir = lab.stop().await;
    until(|| connection.is_closed()).await;
    let status = client(&connection).request(ask("whoami")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(nsm_transport::Unanswered::is_why(&status), "nobody has said so");
    pool.get(&url, PATIENCE).await.unwrap_err();

    let waiting = tokio::spawn({
        let (pool, url) = (pool.clone(), url.clone());
        async move { pool.wait(&url, PATIENCE).await.unwrap() }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let server = Server::bind(Source::fixed(authority), &[ListenUrl::Unix(path)]).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let served = tokio::spawn(server.serve(Routes::default(), &[], async {
        let _ = stopped.await;
    }));
    let connection = timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert_eq!(connection.peer().id().path(), "/second");
    drop(stop);
    served.await.unwrap();
    drop(dir);
}

#[tokio::test]
async fn unused_connections_are_closed() {
    let lab = Lab::start().await;
    let config = PoolConfig { idle: Duration::from_millis(100), ..Default::default() };
    let pool = Pool::new(Source::fixed(identity(&lab.authority, "client", HOUR)), config);
    let connection = pool.get(lab.unix(), PATIENCE).await.unwrap();
    let call = tokio::spawn({
        let mut calls = client(&connection);
        async move { calls.request(ask("wait")).await }
    });
    until(|| lab.handler.started.load(Ordering::SeqCst) == 1).await;
    drop(connection);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(pool.len(), 1, "a call in flight keeps its connection");
    lab.handler.release.add_permits(1);
    call.await.unwrap().unwrap();
    until(|| pool.is_empty()).await;
    lab.stop().await;
}

/// Upstream's servers keep what they received until the connection ends.
#[tokio::test]
async fn a_connection_that_has_carried_descriptors_ends_and_no_call_fails() {
    let lab = Lab::start().await;
    let config = PoolConfig { descriptors: 3, ..Default::default() };
    let pool = Pool::new(Source::fixed(identity(&lab.authority, "client", HOUR)), config);
    // A stream that lasts as long as the mesh.
    let streams = pool.streams(lab.unix(), PATIENCE).await.unwrap();
    let selector = MonitorScopeSelector::default();
    let mut events = MonitorConnectionClient::new(streams).monitor_connections(selector).await.unwrap();
    events.get_mut().message().await.unwrap().unwrap();
    let first = pool.get(lab.unix(), PATIENCE).await.unwrap();
    let in_flight = tokio::spawn({
        let mut calls = client(&first);
        async move { calls.request(ask("wait")).await }
    });
    until(|| lab.handler.started.load(Ordering::SeqCst) == 1).await;
    let (mut sent, mut all) = (0, vec![first]);
    while sent < 10 {
        let connection = pool.get(lab.unix(), PATIENCE).await.unwrap();
        let file = File::open("/proc/self/ns/net").unwrap();
        let id = FileId::of(&file).unwrap();
        assert!(connection.send_fd(OwnedFd::from(file)));
        client(&connection).request(ask_fd("fd", Some(id))).await.unwrap();
        sent += 1;
        all.push(connection);
    }
    assert_eq!(pool.handshakes(), 1 + 4, "10 descriptors, 3 for each connection, and the streams'");
    lab.handler.release.add_permits(1);
    in_flight.await.unwrap().unwrap();
    drop(all);
    // What is left is the newest, and the streams'; the server has let go of the others.
    assert_eq!(pool.len(), 2);
    until(|| server_sockets(&lab) == 2).await;
    lab.stop().await;
}

/// How many connections to the lab's Unix socket the kernel knows.
fn server_sockets(lab: &Lab) -> usize {
    let path = lab.unix().to_string().replace("unix://", "");
    let table = std::fs::read_to_string("/proc/net/unix").unwrap();
    // State 03 is connected; a listening socket has 01.
    table.lines().filter(|line| line.ends_with(&path) && line.contains(" 0001 03 ")).count()
}

#[tokio::test]
async fn a_connection_that_has_carried_descriptors_is_not_kept_for_long() {
    let lab = Lab::start().await;
    let config = PoolConfig { idle_with_descriptors: Duration::from_millis(50), ..Default::default() };
    let pool = Pool::new(Source::fixed(identity(&lab.authority, "client", HOUR)), config);
    let connection = pool.get(lab.unix(), PATIENCE).await.unwrap();
    let without = pool.get(lab.tcp(), PATIENCE).await.unwrap();
    let file = File::open("/proc/self/ns/net").unwrap();
    let id = FileId::of(&file).unwrap();
    connection.send_fd(OwnedFd::from(file));
    client(&connection).request(ask_fd("fd", Some(id))).await.unwrap();
    drop((connection, without));
    until(|| pool.len() == 1).await;
    pool.get(lab.tcp(), PATIENCE).await.unwrap();
    assert_eq!(pool.handshakes(), 2, "the one without descriptors is the same");
    lab.stop().await;
}

#[tokio::test]
async fn rotation_moves_new_calls_and_lets_old_ones_finish() {
    let lab = Lab::start().await;
    let (sender, receiver) = watch::channel(Arc::new(identity(&lab.authority, "client", HOUR)));
    let pool = Pool::new(Source::from_watch(receiver), PoolConfig::default());
    let old = pool.get(lab.unix(), PATIENCE).await.unwrap();
    let call = tokio::spawn({
        let mut calls = client(&old);
        async move { calls.request(ask("wait")).await }
    });
    until(|| lab.handler.started.load(Ordering::SeqCst) == 1).await;

    // Both sides get new identities; the server's need no restart.
    sender.send_replace(Arc::new(identity(&lab.authority, "client", HOUR)));
    lab.identity.send_replace(Arc::new(identity(&lab.authority, "server", HOUR)));
    let new = pool.get(lab.unix(), PATIENCE).await.unwrap();
    assert_eq!(pool.handshakes(), 2);
    assert_ne!(new.peer().leaf(), old.peer().leaf(), "the server presents its new certificate");
    assert!(!Arc::ptr_eq(new.peer().identity(), old.peer().identity()));
    // Tokens verify against the certificates of the connection that they travel on, on both.
    for connection in [&new, &old] {
        let answer = client(connection).request(ask("whoami")).await.unwrap().into_inner();
        let tokens: Vec<_> = answer.path.unwrap().path_segments.into_iter().map(|s| s.token).collect();
        policy::check_client(&tokens, 0, connection.peer().leaf(), SystemTime::now()).unwrap();
    }
    lab.handler.release.add_permits(1);
    call.await.unwrap().unwrap();
    assert_eq!(pool.len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn a_connection_is_left_before_the_peers_certificate_ends() {
    let lab = Lab::start().await;
    lab.identity.send_replace(Arc::new(identity(&lab.authority, "server", Duration::from_secs(2))));
    let pool = lab.pool("client");
    let first = pool.get(lab.unix(), PATIENCE).await.unwrap();
    lab.identity.send_replace(Arc::new(identity(&lab.authority, "server", HOUR)));
    let connection = loop {
        let connection = pool.get(lab.unix(), PATIENCE).await.unwrap();
        if connection.peer().leaf() != first.peer().leaf() {
            break connection;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    client(&connection).request(ask("whoami")).await.unwrap();
    assert_eq!(pool.handshakes(), 2);
    lab.stop().await;
}

#[tokio::test]
async fn sockets_are_dialled_by_descriptor() {
    let lab = Lab::start().await;
    let pool = lab.pool("client");
    let path = lab.unix().unix_path().unwrap();
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let open = || rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
    let by_fd = pool.get(open(), PATIENCE).await.unwrap();
    client(&by_fd).request(ask("whoami")).await.unwrap();
    assert!(by_fd.peer().address().starts_with("inode://"));
    let fd = open();
    let url: DialUrl = format!("unix:///proc/{}/fd/{}", std::process::id(), fd.as_raw_fd()).parse().unwrap();
    pool.get(&url, PATIENCE).await.unwrap();
    pool.get(lab.unix(), PATIENCE).await.unwrap();
    assert_eq!(pool.handshakes(), 1, "three names of one socket are one peer");
    let file: OwnedFd = File::open("/proc/self/stat").unwrap().into();
    let status = Status::from(pool.get(file, PATIENCE).await.unwrap_err());
    assert!(status.message().contains("refused"), "{status}");
    lab.stop().await;
}

#[tokio::test]
async fn strangers_are_refused_with_a_reason() {
    let lab = Lab::start().await;
    let other = Authority::new("other.lab".parse().unwrap(), SystemTime::now()).unwrap();
    let stranger = other.identity(&"spiffe://other.lab/x".parse().unwrap(), HOUR, SystemTime::now()).unwrap();
    let pool = Pool::new(Source::fixed(stranger), PoolConfig::default());
    let error = pool.get(lab.unix(), PATIENCE).await.unwrap_err();
    assert!(error.is_transient(), "roots may come with the next bundle");
    let status = Status::from(error);
    assert!(status.message().contains("no roots for trust domain test.lab"), "{status}");

    // It trusts the server, the server does not trust it.
    let mut bundles = nsm_identity::Bundles::default();
    bundles.insert("test.lab".parse().unwrap(), &[lab.authority.certificate().clone()]).unwrap();
    let svid = other.issue(&"spiffe://other.lab/x".parse().unwrap(), HOUR, SystemTime::now()).unwrap();
    let pool = Pool::new(Source::fixed(Identity::new(svid, bundles).unwrap()), PoolConfig::default());
    for url in [lab.unix(), lab.tcp()] {
        let status = Status::from(pool.get(url, PATIENCE).await.unwrap_err());
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert!(status.message().contains("refused the connection after the handshake"), "{status}");
        assert!(status.message().contains("fatal alert: CertificateUnknown"), "{status}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn garbage_plaintext_and_silence_harm_nobody() {
    let limits = Limits { handshakes: 4, handshake: Duration::from_secs(3600), ..Default::default() };
    let lab = Lab::with_limits(limits).await;
    let path = lab.unix().unix_path().unwrap().to_owned();
    // More silent ones than there is room for handshakes; they stay.
    let silent: Vec<_> = (0..50).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let noisy = tokio::task::spawn_blocking(move || {
        let random: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let hello = [&[0x16, 3, 1, 0xff, 0xff][..], &random].concat();
        let texts: [&[u8]; 5] = [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
            b"GET / HTTP/1.1\r\n\r\n",
            &random,
            &hello,
            b"\0",
        ];
        for _ in 0..10 {
            for text in texts {
                let mut stream = UnixStream::connect(&path).unwrap();
                let _ = stream.write_all(text);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            }
        }
    });
    timeout(PATIENCE, noisy).await.unwrap().unwrap();
    let connection = lab.pool("client").get(lab.unix(), PATIENCE).await.unwrap();
    client(&connection).request(ask("whoami")).await.unwrap();
    drop(silent);
    lab.stop().await;
}

#[tokio::test]
async fn handshakes_are_bounded_in_time() {
    let limits = Limits { handshake: Duration::from_millis(50), ..Default::default() };
    let lab = Lab::with_limits(limits).await;
    let mut silent = UnixStream::connect(lab.unix().unix_path().unwrap()).unwrap();
    let closed = tokio::task::spawn_blocking(move || silent.read_to_end(&mut Vec::new()).map(drop));
    // Closed by the server; how is the kernel's choice.
    let _ = timeout(PATIENCE, closed).await.unwrap().unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn connections_are_bounded() {
    let lab = Lab::with_limits(Limits { connections: 2, ..Default::default() }).await;
    let pools = [lab.pool("a"), lab.pool("b"), lab.pool("c")];
    let mut kept = Vec::new();
    for pool in &pools[..2] {
        let connection = pool.get(lab.unix(), PATIENCE).await.unwrap();
        client(&connection).request(ask("whoami")).await.unwrap();
        kept.push(connection);
    }
    let error = pools[2].get(lab.unix(), PATIENCE).await.unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");
    // The other two go on.
    for connection in &kept {
        client(connection).request(ask("whoami")).await.unwrap();
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_second_server_is_refused() {
    let lab = Lab::start().await;
    let source = || Source::fixed(identity(&lab.authority, "second", HOUR));
    let listen = |url: &DialUrl| url.to_string().parse::<ListenUrl>().unwrap();
    let error = Server::bind(source(), &[listen(lab.unix())]).await.unwrap_err();
    assert!(error.to_string().contains("second daemon"), "{error}");
    let error = Server::bind(source(), &[listen(lab.tcp())]).await.unwrap_err();
    assert!(error.to_string().contains("cannot listen on tcp://127.0.0.1"), "{error}");
    // What was bound before the failure is given back.
    let other = ListenUrl::Unix(lab.dir.path().join("other.sock"));
    Server::bind(source(), &[other, listen(lab.tcp())]).await.unwrap_err();
    assert!(!lab.dir.path().join("other.sock").exists());
    let connection = lab.pool("client").get(lab.unix(), PATIENCE).await.unwrap();
    client(&connection).request(ask("whoami")).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn a_server_that_stops_lets_calls_finish_for_a_while() {
    let lab = Lab::with_limits(Limits { drain: Duration::from_millis(300), ..Default::default() }).await;
    let connection = lab.pool("client").get(lab.unix(), PATIENCE).await.unwrap();
    let spawn = |what: &'static str| {
        let mut calls = client(&connection);
        tokio::spawn(async move { calls.request(ask(what)).await })
    };
    let (short, long) = (spawn("wait"), spawn("dropped"));
    let handler = lab.handler.clone();
    until(|| handler.started.load(Ordering::SeqCst) == 2).await;
    let stopping = tokio::spawn(lab.stop());
    tokio::time::sleep(Duration::from_millis(50)).await;
    handler.release.add_permits(1);
    short.await.unwrap().unwrap();
    let status = long.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    stopping.await.unwrap();
    until(|| handler.dropped.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn no_call_fails_while_a_real_ca_renews_both_sides() {
    let dir = TempDir::new().unwrap();
    let text = format!(
        "trustDomain: test.lab\nsvidTtl: 2s\nsockets: [{{path: {dir}/api.sock, node: n}}]\n\
         entries: [{{spiffeId: 'spiffe://test.lab/me', selectors: {{pid: {pid}}}}}]\n",
        dir = dir.path().display(),
        pid = std::process::id(),
    );
    std::fs::write(dir.path().join("ca.yaml"), text).unwrap();
    let ca = nsm_identity::ca::Ca::start(&dir.path().join("ca.yaml")).unwrap();
    let (stop, stopped) = watch::channel(());
    let until_stopped =
        |mut stopped: watch::Receiver<()>| async move { while stopped.changed().await.is_ok() {} };
    let ca = tokio::spawn(ca.serve(until_stopped(stopped.clone())));
    let endpoint = format!("unix://{}/api.sock", dir.path().display());
    let source = timeout(PATIENCE, Source::open(&endpoint)).await.unwrap().unwrap();
    let url = dir.path().join("s.sock");
    let server = Server::bind(source.clone(), &[ListenUrl::Unix(url.clone())]).await.unwrap();
    let handler = Handler {
        started: AtomicUsize::new(0),
        dropped: AtomicUsize::new(0),
        release: tokio::sync::Semaphore::new(0),
    };
    let routes = Routes::new(NetworkServiceServer::new(handler));
    let served = tokio::spawn(server.serve(routes, &[], until_stopped(stopped)));

    // The client's renewals come at other moments than the server's.
    let mine = timeout(PATIENCE, Source::open(&endpoint)).await.unwrap().unwrap();
    let pool = Pool::new(mine, PoolConfig::default());
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (pool, url) = (pool.clone(), DialUrl::Unix(url.clone()));
            tokio::spawn(async move {
                let mut calls = 0;
                while pool.handshakes() < 5 {
                    let connection = pool.get(&url, PATIENCE).await.unwrap();
                    let answer = client(&connection).request(ask("whoami")).await.unwrap().into_inner();
                    let tokens: Vec<_> =
                        answer.path.unwrap().path_segments.into_iter().map(|s| s.token).collect();
                    policy::check_client(&tokens, 0, connection.peer().leaf(), SystemTime::now()).unwrap();
                    calls += 1;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                calls
            })
        })
        .collect();
    let mut calls = 0;
    for caller in callers {
        calls += timeout(PATIENCE, caller).await.unwrap().unwrap();
    }
    println!("{calls} calls over {} connections", pool.handshakes());
    drop((stop, pool));
    timeout(PATIENCE, served).await.unwrap().unwrap();
    timeout(PATIENCE, ca).await.unwrap().unwrap().unwrap();
}
