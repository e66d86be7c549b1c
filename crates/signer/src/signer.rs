//! The signer: has the key of the trust domain, and signs for pods that run on the node of the agent that asks.

use std::{
    collections::HashMap,
    future::Future,
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use aws_lc_rs::digest;
use axum::{
    Router,
    body::to_bytes,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use nsm_identity::clock;
use nsm_identity::{
    InvalidId, SpiffeId, TrustDomain,
    ca::rotation::{Authorities, AuthorityError},
};
use nsm_k8s::{
    authorities::{self, KeptError},
    objects::{ApiError, Objects, escaped},
};
use nsm_transport::https::{self, Shown};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    pod::PodUid,
    protocol::{AUDIENCE, Ask, Der, MAX_BODY, PATH, ROOTS, Signed},
};

/// How often Secret and ConfigMap are looked at.
const LOOK: Duration = Duration::from_secs(10);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a question may take to come.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a token that was reviewed is believed, and how many are remembered.
const REVIEWED: (Duration, usize) = (Duration::from_secs(60), 8192);
/// Where tokens say which node and which pod they are bound to, since Kubernetes 1.30.
const NODE: &str = "authentication.kubernetes.io/node-name";
const POD: &str = "authentication.kubernetes.io/pod-uid";

/// What a signer is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// Every identity is `spiffe://TRUST_DOMAIN/ns/NAMESPACE/pod/NAME`.
    pub trust_domain: TrustDomain,
    /// How long an SVID is good for; agents ask for the next after half of it.
    pub svid_lifetime: Duration,
    /// The namespace that the signer lives in.
    pub namespace: String,
    /// The Secret there with the authorities' keys.
    pub secret: String,
    /// The ConfigMap there with their certificates: whom to trust.
    pub roots: String,
    /// The service account there that agents have.
    pub agents: String,
    /// What agents call the signer: names and addresses of its certificate.
    pub names: Vec<String>,
}

/// Why nothing is signed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Not the question.
    #[error("the question cannot be read: {0}; expected {{\"pod\": UID, \"request\": PKCS#10 in base64}}")]
    Unreadable(String),
    /// Nobody says who asks.
    #[error(
        "the token of the agent is not accepted: {0}; expected a bound token for the audience nsm-identity, mounted \
         into the agent's pod as a projected volume (serviceAccountToken)"
    )]
    Stranger(String),
    /// Somebody else.
    #[error("{who} may not ask for identities; only agents may, which have the service account {agents}")]
    NoAgent {
        /// Who.
        who: String,
        /// The service account of agents.
        agents: String,
    },
    /// The token names no node.
    #[error(
        "the token of the agent is not bound to a node, so it is not known for which pods it may ask; Kubernetes 1.30 \
         or newer binds tokens of pods to nodes"
    )]
    NoNode,
    /// Not a pod of its node.
    #[error("no pod with the UID {pod} runs on node {node}, where the agent that asks for it does")]
    NotThere {
        /// The pod.
        pod: PodUid,
        /// The agent's node.
        node: String,
    },
    /// The pod has a name that is no part of an identity.
    #[error("the pod cannot have an identity: {0}")]
    Name(#[from] InvalidId),
    /// Not signed.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The API server does not say.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// It has just started.
    #[error("there are no authorities yet; the signer's log says what they wait for")]
    NotReady,
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::Unreadable(_) | Self::Authority(_) => StatusCode::BAD_REQUEST,
            Self::Stranger(_) => StatusCode::UNAUTHORIZED,
            Self::NoAgent { .. } | Self::NoNode | Self::NotThere { .. } | Self::Name(_) => {
                StatusCode::FORBIDDEN
            }
            Self::Api(_) | Self::NotReady => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// What keeps a signer from signing at all.
#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error(transparent)]
    Kept(#[from] KeptError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// A signer before an API server. Several may stand side by side: they share what they keep there.
#[derive(Debug)]
pub struct Signer {
    config: Config,
    api: Objects,
    authorities: ArcSwapOption<Authorities>,
    shown: Arc<Shown>,
    reviewed: Mutex<HashMap<Vec<u8>, (Bound, Instant)>>,
}

/// What the token of an agent is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bound {
    node: String,
    /// The agent's own pod.
    pod: String,
}

impl Signer {
    /// One that has nothing yet.
    #[must_use]
    pub fn new(config: Config, api: Objects) -> Arc<Self> {
        Arc::new(Self {
            config,
            api,
            authorities: ArcSwapOption::empty(),
            shown: Arc::new(Shown::own()),
            reviewed: Mutex::default(),
        })
    }

    /// Serves, and keeps authorities and what is known of them, until `shutdown` is done. `ready` is called when the
    /// first question can be answered.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        ready: impl FnOnce(),
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        let routes = Router::new()
            .route(PATH, post(sign))
            .route("/ready", get(is_ready))
            .with_state(Arc::clone(&self));
        let shown = Arc::clone(&self.shown);
        tokio::select! {
            served = https::serve(listener, &shown, routes, shutdown) => served.map_err(io::Error::other),
            () = self.keep(ready) => Ok(()),
        }
    }

    /// Keeps what has to be; does not end.
    async fn keep(&self, ready: impl FnOnce()) {
        let (mut failed, mut renew, mut known) = (String::new(), SystemTime::UNIX_EPOCH, String::new());
        let mut ready = Some(ready);
        loop {
            match self.pass(&mut renew, &mut known).await {
                Ok(()) => {
                    if let Some(ready) = ready.take() {
                        ready();
                    }
                    if !std::mem::take(&mut failed).is_empty() {
                        info!("authorities are as they should be again");
                    }
                    sleep(LOOK).await;
                }
                Err(error) => {
                    let error = error.to_string();
                    if error != failed {
                        warn!(error, "authorities are not as they should be; trying on");
                        failed = error;
                    }
                    sleep(AGAIN).await;
                }
            }
        }
    }

    async fn pass(&self, renew: &mut SystemTime, known: &mut String) -> Result<(), KeepError> {
        let (config, now) = (&self.config, clock::now());
        let domain = Some(&config.trust_domain);
        let authorities =
            authorities::keep(&self.api, &config.namespace, &config.secret, domain, now).await?;
        // Whom to trust is said before anything is signed.
        let bundle = authorities.bundle();
        self.publish(&bundle).await?;
        if now >= *renew || bundle != *known {
            let certificate = authorities.sign(&config.names, now)?;
            *renew = certificate.renew;
            self.shown.put(certificate.key);
            *known = bundle;
        }
        self.authorities.store(Some(Arc::new(authorities)));
        Ok(())
    }

    async fn publish(&self, bundle: &str) -> Result<(), ApiError> {
        let Config { namespace, roots, .. } = &self.config;
        let what = format!("the ConfigMap {namespace}/{roots}");
        let collection = format!("/api/v1/namespaces/{namespace}/configmaps");
        let wanted = |found: Option<Value>| {
            if found.as_ref().is_some_and(|found| found["data"][ROOTS] == bundle) {
                return Ok(((), None));
            }
            let mut object = found.unwrap_or_else(|| {
                json!({
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": { "name": roots, "namespace": namespace },
                })
            });
            object["data"] = json!({ ROOTS: bundle });
            Ok(((), Some(object)))
        };
        self.api.keep(&what, &collection, roots, wanted).await
    }

    /// Answers an agent.
    async fn answer(&self, headers: &HeaderMap, body: &[u8]) -> Result<(SpiffeId, Signed), Refusal> {
        let authorities = self.authorities.load_full().ok_or(Refusal::NotReady)?;
        let bound = self.bound(headers).await?;
        let ask: Ask = serde_json::from_slice(body).map_err(|e| Refusal::Unreadable(e.to_string()))?;
        let (namespace, name) = self.pod(&bound.node, &ask.pod).await?;
        // What makes wires on a node is that node's, whichever pod it is in: those who follow each other there go on with
        // each other's connections.
        let who = match ask.pod.as_str() == bound.pod {
            true => format!("node/{}", bound.node),
            false => format!("pod/{name}"),
        };
        let id: SpiffeId = format!("{}/ns/{namespace}/{who}", self.config.trust_domain.id()).parse()?;
        let lifetime = self.config.svid_lifetime;
        let leaf = authorities.issue(&id, &ask.request.0, lifetime, clock::now())?;
        let roots = authorities.roots().iter().map(|root| Der(root.to_vec())).collect();
        Ok((id, Signed { chain: vec![Der(leaf.to_vec())], roots }))
    }

    /// What the asking agent's token is bound to.
    async fn bound(&self, headers: &HeaderMap) -> Result<Bound, Refusal> {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = given.and_then(|given| given.strip_prefix("Bearer "));
        let token = token.ok_or_else(|| Refusal::Stranger("there is none".into()))?;
        let key = digest::digest(&digest::SHA256, token.as_bytes()).as_ref().to_vec();
        let now = Instant::now();
        if let Some((bound, _)) = self.reviewed.lock().get(&key).filter(|(_, until)| *until > now) {
            return Ok(bound.clone());
        }
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": { "token": token, "audiences": [AUDIENCE] },
        });
        let path = "/apis/authentication.k8s.io/v1/tokenreviews";
        let review = self.api.create("a review of an agent's token", path, &review).await?;
        let bound = bound(&review["status"], &self.config)?;
        let mut reviewed = self.reviewed.lock();
        if reviewed.len() >= REVIEWED.1 {
            reviewed.retain(|_, (_, until)| *until > now);
        }
        if reviewed.len() < REVIEWED.1 {
            reviewed.insert(key, (bound.clone(), now + REVIEWED.0));
        }
        Ok(bound)
    }

    /// Namespace and name of a pod on a node.
    async fn pod(&self, node: &str, pod: &PodUid) -> Result<(String, String), Refusal> {
        let path = format!("/api/v1/pods?fieldSelector={}", escaped(&format!("spec.nodeName={node}")));
        // From the API server's memory first, which may be a moment late; then what is so.
        for path in [&format!("{path}&resourceVersion=0"), &path] {
            let pods = self.api.metadata("the pods of a node", path).await?;
            let found = pods.iter().find(|object| object["metadata"]["uid"] == pod.as_str());
            let text = |value: &Value| value.as_str().map(str::to_owned);
            if let Some(found) = found.map(|found| &found["metadata"])
                && let (Some(namespace), Some(name)) = (text(&found["namespace"]), text(&found["name"]))
            {
                return Ok((namespace, name));
            }
        }
        Err(Refusal::NotThere { pod: pod.clone(), node: node.to_owned() })
    }
}

/// What a reviewed token is bound to, where it is an agent's.
fn bound(status: &Value, config: &Config) -> Result<Bound, Refusal> {
    let ours = status["audiences"].as_array().is_some_and(|all| all.iter().any(|one| one == AUDIENCE));
    if status["authenticated"] != true || !ours {
        let said = status["error"]
            .as_str()
            .unwrap_or("the API server does not know it, or it is for another audience");
        return Err(Refusal::Stranger(said.to_owned()));
    }
    let who = status["user"]["username"].as_str().unwrap_or_default();
    let agents = format!("{}:{}", config.namespace, config.agents);
    if who.strip_prefix("system:serviceaccount:") != Some(&agents) {
        return Err(Refusal::NoAgent { who: who.to_owned(), agents: agents.replace(':', "/") });
    }
    let only = |key: &str| match status["user"]["extra"][key].as_array().map(Vec::as_slice) {
        Some([Value::String(text)]) if !text.is_empty() => Ok(text.clone()),
        _ => Err(Refusal::NoNode),
    };
    Ok(Bound { node: only(NODE)?, pod: only(POD)? })
}

async fn sign(State(signer): State<Arc<Signer>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = match timeout(PATIENCE, to_bytes(body, MAX_BODY)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            return (StatusCode::PAYLOAD_TOO_LARGE, format!("more than {MAX_BODY} bytes\n")).into_response();
        }
        Err(_) => {
            return (StatusCode::REQUEST_TIMEOUT, "the question did not come in time\n").into_response();
        }
    };
    let began = Instant::now();
    match signer.answer(&parts.headers, &body).await {
        Ok((id, signed)) => match serde_json::to_string(&signed) {
            Ok(text) => {
                info!(%id, took = ?began.elapsed(), "signed");
                ([(header::CONTENT_TYPE, "application/json")], text).into_response()
            }
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
        },
        Err(refusal) => {
            warn!(%refusal, "not signed");
            (refusal.status(), refusal.to_string()).into_response()
        }
    }
}

async fn is_ready(State(signer): State<Arc<Signer>>) -> Response {
    match signer.authorities.load().is_some() {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, Refusal::NotReady.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_agents_whose_tokens_are_bound_to_a_node_may_ask() {
        let config = Config {
            trust_domain: "k8s.nsm".parse().unwrap(),
            svid_lifetime: Duration::from_secs(3600),
            namespace: "nsm-system".into(),
            secret: "keys".into(),
            roots: "roots".into(),
            agents: "nsm-node".into(),
            names: vec![],
        };
        let status = |account: &str, audience: &str, extra: Value| {
            json!({
                "authenticated": true,
                "audiences": [audience],
                "user": { "username": format!("system:serviceaccount:{account}"), "extra": extra },
            })
        };
        let node = json!({ NODE: ["node1"], POD: ["uid"] });
        let good = bound(&status("nsm-system:nsm-node", AUDIENCE, node.clone()), &config).unwrap();
        assert_eq!(good, Bound { node: "node1".into(), pod: "uid".into() });
        let mut unknown = status("nsm-system:nsm-node", AUDIENCE, node.clone());
        unknown["authenticated"] = json!(false);
        unknown["error"] = json!("token has expired");
        for (status, says) in [
            (unknown, "token has expired"),
            (json!({}), "does not know it"),
            (
                status("nsm-system:nsm-node", "https://kubernetes.default.svc", node.clone()),
                "another audience",
            ),
            (
                status("default:nsm-node", AUDIENCE, node.clone()),
                "default:nsm-node may not ask for identities; only agents may, which have the service account nsm-system/nsm-node",
            ),
            (status("nsm-system:nsm-node", AUDIENCE, json!({})), "not bound to a node"),
            (
                status("nsm-system:nsm-node", AUDIENCE, json!({ NODE: ["a", "b"], POD: ["uid"] })),
                "Kubernetes 1.30",
            ),
        ] {
            let error = bound(&status, &config).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
