//! The server: HTTPS as API servers speak it, bounded in everything.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use axum::{
    Router,
    body::{HttpBody as _, to_bytes},
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nsm_identity::Source;
use parking_lot::Mutex;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};
use uuid::Uuid;

use crate::{
    cluster::Cluster,
    inject::{Namespace, Plan, subject},
    keeper::Found,
    review::{self, BadReview},
    settings::Settings,
};

/// An object has at most 3 MiB at an API server; a review holds it once or twice.
const MAX_BODY: usize = 8 * 1024 * 1024;
/// How long a request may take to come, a handshake, and a connection to say something.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an idle connection stays: API servers keep theirs.
const IDLE: Duration = Duration::from_secs(90);
/// How long the namespace may take to be told; upstream's bound.
const NAMESPACE: Duration = Duration::from_secs(1);
/// Connections at a time, and those from one address.
const CONNECTIONS: (usize, usize) = (1024, 128);
/// How long connections have to end.
const DRAIN: Duration = Duration::from_secs(5);
/// When pods are looked for that a review has marked: they exist a moment after it.
const LOOKS: [Duration; 3] = [Duration::from_millis(300), Duration::from_secs(2), Duration::from_secs(10)];

/// The certificate that the server shows, whatever it is by then.
#[derive(Debug)]
pub struct Shown {
    own: ArcSwapOption<CertifiedKey>,
    svid: Option<Source>,
}

impl Shown {
    /// One that is put.
    #[must_use]
    pub fn own() -> Self {
        Self { own: ArcSwapOption::empty(), svid: None }
    }

    /// The X.509-SVID of the moment.
    #[must_use]
    pub fn svid(source: Source) -> Self {
        Self { own: ArcSwapOption::empty(), svid: Some(source) }
    }

    pub(crate) fn put(&self, key: CertifiedKey) {
        self.own.store(Some(Arc::new(key)));
    }

    /// There is one.
    pub fn is_there(&self) -> bool {
        self.svid.is_some() || self.own.load().is_some()
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match &self.svid {
            Some(source) => source.current().server_config().cert_resolver.resolve(hello),
            None => self.own.load_full(),
        }
    }
}

/// What answers.
#[derive(Debug)]
pub struct Hook {
    settings: Settings,
    cluster: Option<Cluster>,
    shown: Arc<Shown>,
    found: Arc<Found>,
    marked: mpsc::Sender<String>,
    reviews: AtomicU64,
}

impl Hook {
    /// A webhook of these settings. Without an API server no namespace says anything, and no pod is told.
    #[must_use]
    pub fn new(
        settings: Settings,
        cluster: Option<Cluster>,
        shown: Arc<Shown>,
        found: Arc<Found>,
    ) -> Arc<Self> {
        // More at a time than that are told when the next one is.
        let (marked, news) = mpsc::channel(64);
        if let Some(cluster) = cluster.clone() {
            tokio::spawn(tell(cluster, settings.annotation.clone(), news));
        }
        Arc::new(Self { settings, cluster, shown, found, marked, reviews: AtomicU64::new(0) })
    }

    /// How many questions were answered.
    pub fn reviews(&self) -> u64 {
        self.reviews.load(Ordering::Relaxed)
    }

    async fn review(&self, body: &[u8]) -> Result<String, BadReview> {
        let began = Instant::now();
        let request = review::decode(body)?;
        let plan = match subject(&self.settings, &request) {
            Err(why) => Plan::unchanged(why),
            Ok(subject) => {
                let namespace = self.namespace(&request.namespace).await;
                let plan = subject.plan(&self.settings, &namespace, &Uuid::new_v4().to_string());
                if namespace.annotation.is_some() {
                    self.found.annotated(&request.namespace);
                }
                // Also of pods whose template was patched and marked.
                let mark = self.settings.annotation.beside("problem");
                let marked = !request.object["metadata"]["labels"][&mark].is_null();
                if (marked || !plan.warnings.is_empty()) && request.dry_run != Some(true) {
                    let _ = self.marked.try_send(request.namespace.clone());
                }
                plan
            }
        };
        self.reviews.fetch_add(1, Ordering::Relaxed);
        let generated = request.object["metadata"]["generateName"].as_str().unwrap_or_default();
        let name = if request.name.is_empty() { generated } else { &request.name };
        let took = began.elapsed();
        info!(kind = request.kind.kind, namespace = request.namespace, name, ?took, %plan, "reviewed");
        for warning in &plan.warnings {
            info!(kind = request.kind.kind, namespace = request.namespace, name, warning, "told");
        }
        Ok(review::answer(&request, &plan).to_string())
    }

    /// What the namespace says; nothing, where that cannot be known.
    async fn namespace(&self, name: &str) -> Namespace {
        let Some(cluster) = self.cluster.as_ref().filter(|_| !name.is_empty()) else {
            return Namespace::default();
        };
        match timeout(NAMESPACE, cluster.namespace(name)).await {
            Ok(Ok(object)) => Namespace::of(&self.settings, &object),
            Ok(Err(error)) => {
                warn!(%error, "the namespace's annotation and security level are not known");
                Namespace::default()
            }
            Err(_) => {
                warn!(
                    namespace = name,
                    "no namespace in {NAMESPACE:?}: its annotation and level are not known"
                );
                Namespace::default()
            }
        }
    }
}

/// Tells pods that were marked, when they are there.
async fn tell(cluster: Cluster, key: crate::settings::Annotation, mut news: mpsc::Receiver<String>) {
    // Those of an earlier process first.
    let mut namespaces = vec![String::new()];
    loop {
        for wait in LOOKS {
            sleep(wait).await;
            for namespace in &namespaces {
                if let Err(error) = cluster.tell_pods(namespace, &key).await {
                    warn!(%error, namespace, "pods are not told what could not be understood");
                }
            }
            while let Ok(more) = news.try_recv() {
                namespaces.push(more);
            }
        }
        let Some(next) = news.recv().await else { return };
        namespaces = vec![next];
    }
}

/// Serves until `shutdown` is done; then what was begun may end.
pub async fn serve(listener: TcpListener, hook: Arc<Hook>, shutdown: impl Future<Output = ()> + Send) {
    let tls = match tls(&hook.shown) {
        Ok(tls) => tls,
        Err(error) => return warn!(%error, "nothing is served"),
    };
    let routes = Router::new()
        .route("/mutate", post(mutate))
        .route("/ready", get(ready))
        .with_state(Arc::clone(&hook));
    let (stop, stopped) = watch::channel(());
    let (mut connections, census) = (JoinSet::new(), Census::default());
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => {
                    let Some(counted) = census.enter(address.ip(), connections.len()) else {
                        debug!(%address, "too many connections: one is closed");
                        continue;
                    };
                    let connection = connection(stream, tls.clone(), routes.clone(), stopped.clone());
                    connections.spawn(async move {
                        let _counted = counted;
                        if let Err(reason) = connection.await {
                            debug!(%address, reason, "a connection ended");
                        }
                    });
                }
                // Out of descriptors, most likely: must neither end nor spin the loop.
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(20)).await;
                }
            },
        }
    }
    drop((listener, stop));
    let drained = async { while connections.join_next().await.is_some() {} };
    if timeout(DRAIN, drained).await.is_err() {
        info!(connections = connections.len(), "reviews did not end in time");
    }
}

fn tls(shown: &Arc<Shown>) -> Result<TlsAcceptor, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::clone(shown) as Arc<dyn ResolvesServerCert>);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A resumed session would show an old certificate.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn connection(
    stream: TcpStream,
    tls: TlsAcceptor,
    routes: Router,
    mut stopped: watch::Receiver<()>,
) -> Result<(), String> {
    // Answers are small and waited for.
    let _ = stream.set_nodelay(true);
    let stream = timeout(PATIENCE, tls.accept(stream)).await.map_err(|_| "no handshake in time")?;
    let stream = TokioIo::new(stream.map_err(|e| e.to_string())?);
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(64 * 1024);
    let connection = http.serve_connection(stream, TowerToHyperService::new(routes));
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended.map_err(|e| e.to_string()),
        _ = stopped.changed() => connection.as_mut().graceful_shutdown(),
    }
    connection.await.map_err(|e| e.to_string())
}

async fn mutate(State(hook): State<Arc<Hook>>, request: Request) -> Response {
    let too_large = || {
        let text = format!("the body is larger than an object can be: at most {MAX_BODY} bytes are taken\n");
        (StatusCode::PAYLOAD_TOO_LARGE, text).into_response()
    };
    let body = request.into_body();
    if body.size_hint().lower() > MAX_BODY as u64 {
        return too_large();
    }
    let body = match timeout(PATIENCE, to_bytes(body, MAX_BODY)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => return too_large(),
        Err(_) => return (StatusCode::REQUEST_TIMEOUT, "the body did not come in time\n").into_response(),
    };
    match hook.review(&body).await {
        Ok(answer) => ([(header::CONTENT_TYPE, "application/json")], answer).into_response(),
        Err(error) => {
            debug!(%error, "not a question");
            (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response()
        }
    }
}

async fn ready(State(hook): State<Arc<Hook>>) -> Response {
    match hook.shown.is_there() {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "no certificate yet\n").into_response(),
    }
}

/// How many connections each address has.
#[derive(Debug, Clone, Default)]
struct Census(Arc<Mutex<HashMap<IpAddr, usize>>>);

#[derive(Debug)]
struct Counted(Census, IpAddr);

impl Census {
    fn enter(&self, address: IpAddr, all: usize) -> Option<Counted> {
        let mut census = self.0.lock();
        let count = census.get(&address).copied().unwrap_or_default();
        if all >= CONNECTIONS.0 || count >= CONNECTIONS.1 {
            return None;
        }
        census.insert(address, count + 1);
        Some(Counted(self.clone(), address))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut census = self.0.0.lock();
        if let Some(count) = census.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                census.remove(&self.1);
            }
        }
    }
}
