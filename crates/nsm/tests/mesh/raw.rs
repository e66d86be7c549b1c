//! A peer that says what it likes: gRPC over our mTLS and descriptor passing, with nothing of ours above.

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::{Buf as _, BufMut as _};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nsm_api::{
    mechanism::{InodeUrl, key},
    pb::{
        connection::{
            Connection, Mechanism, MonitorScopeSelector, Path, PathSegment,
            monitor_connection_client::MonitorConnectionClient,
        },
        networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
    },
};
use nsm_identity::{FileId, Identity, Leaf, Source, SpiffeId, Svid, Token, token};
use nsm_transport::{FdStream, FdTable, Pool, PoolConfig};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};
use tonic::{
    Status,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use crate::harness;

/// One connection to a hop.
pub(crate) struct Raw {
    pub(crate) identity: Arc<Identity>,
    /// Who answers.
    pub(crate) peer: SpiffeId,
    pub(crate) fds: FdTable,
    /// Not tonic's channel: that ends a call at its deadline by itself, and the hop's own answer is wanted.
    sender: SendRequest<Body>,
}

impl Raw {
    /// Connects to a socket of the node.
    pub(crate) async fn connect(lab: &str, socket: &str) -> Self {
        let identity = Source::from_env().await.expect("an identity").current();
        Self::connect_as(lab, socket, identity).await.expect("an authenticated connection")
    }

    /// Connects as somebody; `None` if that one is refused.
    pub(crate) async fn connect_as(lab: &str, socket: &str, identity: Arc<Identity>) -> Option<Self> {
        let path = harness::url(lab, socket);
        let path = path.strip_prefix("unix://").expect("a Unix socket");
        let stream = FdStream::new(tokio::net::UnixStream::connect(path).await.expect("it listens"));
        let fds = stream.fds().clone();
        let connector = TlsConnector::from(identity.client_config().clone());
        let name = ServerName::try_from("localhost").expect("a name");
        let tls = connector.connect(name, stream).await.ok()?;
        let certificate = tls.get_ref().1.peer_certificates().expect("mTLS")[0].clone().into_owned();
        let peer = Leaf::parse(certificate).expect("an SVID").id().clone();
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(tls)).await.ok()?;
        tokio::spawn(connection);
        let raw = Self { identity, peer, fds, sender };
        // In TLS 1.3 a client is done before the server has looked at its certificate.
        let healthy = raw.bytes("/grpc.health.v1.Health/Check", Vec::new(), None, None).await;
        healthy.is_ok().then_some(raw)
    }

    /// Sends these bytes as the message of a call, and returns those of the first answer.
    pub(crate) async fn bytes(
        &self,
        method: &str,
        message: Vec<u8>,
        token: Option<Token>,
        path: Option<String>,
    ) -> Result<Vec<u8>, Status> {
        let mut headers: Vec<(&'static str, String)> = vec![("grpc-timeout", "2S".into())];
        if let Some(token) = token {
            headers.push(("nsm-client-token", token.jwt().into()));
            headers.push(("nsm-client-token-expires", token.expires_rfc3339()));
        }
        headers.extend(path.map(|path| ("path", path)));
        exchange(&self.sender, method, message, headers).await
    }

    /// An honest token.
    pub(crate) fn token(&self) -> Token {
        self.token_of(self.identity.svid(), &self.peer, SystemTime::now())
    }

    /// A token signed so, for that audience, made then.
    pub(crate) fn token_of(&self, svid: &Svid, audience: &SpiffeId, now: SystemTime) -> Token {
        token::mint(svid, Some(audience), None, Duration::from_secs(60), now).expect("signed")
    }

    /// Sends a request with this token.
    pub(crate) async fn request(
        &self,
        request: NetworkServiceRequest,
        token: Option<Token>,
        deadline: Duration,
    ) -> Result<Connection, Status> {
        let call = call(request, token, deadline);
        let sender = self.sender.clone();
        let service = tower::service_fn(move |call| sender.clone().send_request(call));
        let answer = NetworkServiceClient::with_origin(service, origin()).request(call).await;
        answer.map(tonic::Response::into_inner)
    }

    /// Sends a Close with an honest token.
    pub(crate) async fn close(&self, conn: Connection) -> Result<(), Status> {
        let call = call(conn, Some(self.token()), Duration::from_secs(10));
        let sender = self.sender.clone();
        let service = tower::service_fn(move |call| sender.clone().send_request(call));
        NetworkServiceClient::with_origin(service, origin()).close(call).await.map(drop)
    }
}

/// A connection without TLS: the Workload API's.
pub(crate) async fn plain(lab: &str, socket: &str) -> SendRequest<Body> {
    let path = harness::url(lab, socket);
    let path = path.strip_prefix("unix://").expect("a Unix socket");
    let stream = tokio::net::UnixStream::connect(path).await.expect("it listens");
    let (sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    tokio::spawn(connection);
    sender
}

/// One call with bytes for a message; of a stream the first message counts, and nothing is an empty one.
pub(crate) async fn exchange(
    sender: &SendRequest<Body>,
    method: &str,
    message: Vec<u8>,
    headers: Vec<(&'static str, String)>,
) -> Result<Vec<u8>, Status> {
    let sender = sender.clone();
    let service = tower::service_fn(move |call| sender.clone().send_request(call));
    let mut client = tonic::client::Grpc::with_origin(service, origin());
    let mut call = tonic::Request::new(message);
    for (key, value) in headers {
        call.metadata_mut().insert(key, value.parse().expect("ASCII"));
    }
    client.ready().await.map_err(|e| Status::unknown(format!("transport error: {e}")))?;
    let path = method.parse().expect("a method");
    let mut answers = client.server_streaming(call, path, Bytewise).await?.into_inner();
    Ok(answers.message().await?.unwrap_or_default())
}

/// Messages as the bytes that they are.
#[derive(Debug, Clone, Copy)]
struct Bytewise;

impl Codec for Bytewise {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Bytewise {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Bytewise {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut item = vec![0; bytes.remaining()];
        bytes.copy_to_slice(&mut item);
        Ok(Some(item))
    }
}

/// A token with any claims, signed by this identity's key.
pub(crate) fn sign(identity: &Identity, claims: &serde_json::Value) -> String {
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let unsigned = format!("{}.{}", part(r#"{"alg":"ES256","typ":"JWT"}"#), part(&claims.to_string()));
    let signature = identity.svid().sign(unsigned.as_bytes()).expect("signed");
    format!("{unsigned}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn origin() -> tonic::transport::Uri {
    tonic::transport::Uri::from_static("https://localhost")
}

fn call<T>(message: T, token: Option<Token>, deadline: Duration) -> tonic::Request<T> {
    let mut call = tonic::Request::new(message);
    let mut put = |key: &'static str, value: &str| {
        call.metadata_mut().insert(key, value.parse().expect("ASCII"));
    };
    put("grpc-timeout", &format!("{}m", deadline.as_millis()));
    if let Some(token) = token {
        put("nsm-client-token", token.jwt());
        put("nsm-client-token-expires", &token.expires_rfc3339());
    }
    call
}

/// A good request of a pod for `plain`, with its own namespace.
pub(crate) fn good(id: &str, interface: &str, namespace: InodeUrl) -> NetworkServiceRequest {
    let segment = PathSegment { name: "raw".into(), id: id.into(), ..PathSegment::default() };
    NetworkServiceRequest {
        connection: Some(Connection {
            id: id.into(),
            network_service: "plain".into(),
            path: Some(Path { unknown: None, index: 0, path_segments: vec![segment] }),
            ..Connection::default()
        }),
        mechanism_preferences: vec![Mechanism::kernel(interface, Some(namespace))],
        ..NetworkServiceRequest::default()
    }
}

/// A file, and what messages call it.
pub(crate) fn file(path: &str) -> (InodeUrl, OwnedFd) {
    let fd = OwnedFd::from(File::open(path).expect("open"));
    let FileId { dev, ino } = FileId::of(&fd).expect("stat");
    (InodeUrl { dev, ino }, fd)
}

/// The mechanism's namespace parameter as any text.
pub(crate) fn set_inode(request: &mut NetworkServiceRequest, text: &str) {
    request.mechanism_preferences[0].set(key::INODE_URL, text);
}

/// Waits until no hop of any node knows a connection, but for those with these sockets.
pub(crate) fn wait_until_idle(lab: &str, except: &[&str]) {
    in_runtime(async {
        let pool = Pool::new(Source::from_env().await.expect("an identity"), PoolConfig::default());
        let directories = harness::NODES.map(|node| nsm_lab::plan::Paths::new(lab).node(node));
        for entry in directories.iter().filter_map(|d| std::fs::read_dir(d).ok()).flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.ends_with(".sock") || name == "identity.sock" || except.contains(&&*name) {
                continue;
            }
            let url = format!("unix://{}", entry.path().display());
            let url = url.parse::<nsm_transport::DialUrl>().expect("a URL");
            // Whoever is dead holds nothing.
            let Ok(channel) = pool.get(&url, Duration::from_secs(5)).await else { continue };
            let end = tokio::time::Instant::now() + harness::PATIENCE;
            loop {
                let selector = MonitorScopeSelector::default();
                let events =
                    MonitorConnectionClient::new(channel.clone()).monitor_connections(selector).await;
                let first = events.expect("monitor").into_inner().message().await;
                let known = first.expect("an event").expect("the initial transfer").connections;
                if known.is_empty() {
                    break;
                }
                assert!(tokio::time::Instant::now() < end, "{name} still knows {known:#?}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    });
}

pub(crate) fn in_runtime<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.expect("a runtime").block_on(work)
}
