//! The server: what API servers ask, bounded in everything.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{HttpBody as _, to_bytes},
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use nsm_transport::https::{self, Shown};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    time::{sleep, timeout},
};
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
/// How long a request may take to come.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the namespace may take to be told; upstream's bound.
const NAMESPACE: Duration = Duration::from_secs(1);
/// When pods are looked for that a review has marked: they exist a moment after it.
const LOOKS: [Duration; 3] = [Duration::from_millis(300), Duration::from_secs(2), Duration::from_secs(10)];

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
    let shown = Arc::clone(&hook.shown);
    let routes = Router::new().route("/mutate", post(mutate)).route("/ready", get(ready)).with_state(hook);
    if let Err(error) = https::serve(listener, &shown, routes, shutdown).await {
        warn!(%error, "nothing is served");
    }
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
