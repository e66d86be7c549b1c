//! The agent of a node: serves the Workload API there, tells the pods of its callers, and has their keys signed.
//!
//! All processes of a pod have the same SVID, so that the signer is asked once for a pod and again after half of the
//! SVID's life. While no signer answers, what was signed goes on until it ends.

use std::{collections::HashMap, fs, io, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use nsm_identity::clock;
use nsm_identity::{
    Svid, UnixPeer,
    ca::workload::{Issued, Issuer, Renewal, unattested},
    explain,
};
use nsm_k8s::objects::{ApiError, Objects};
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
use rustls_pki_types::{
    CertificateDer, InvalidDnsNameError, PrivatePkcs8KeyDer, ServerName,
    pem::{self, PemObject as _},
};
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_rustls::TlsConnector;
use tonic::Status;
use tracing::{debug, info, warn};

use crate::{
    pod::{PodUid, Pods},
    protocol::{Ask, Der, MAX_BODY, PATH, ROOTS, Signed},
};

/// How long one question to the signer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pauses between questions of a stream whose SVID shall be renewed.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// What an agent is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// `HOST:PORT` of the signer; the host is what its certificate is for.
    pub signer: String,
    /// The file with the token that says who we are; kubelets renew it.
    pub token: PathBuf,
    /// Where the certificates to trust are: namespace and name of a ConfigMap.
    pub roots: (String, String),
    /// The pod of the agent itself.
    pub own: Option<PodUid>,
}

/// Why there is no SVID.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The signer does not want to.
    #[error("the signer at {signer} refuses: {said}")]
    Refused {
        /// Where.
        signer: String,
        /// Its words.
        said: String,
    },
    /// The signer cannot, for now.
    #[error("the signer at {signer} cannot sign now: {said}")]
    Busy {
        /// Where.
        signer: String,
        /// Its words.
        said: String,
    },
    /// Nobody there.
    #[error("the signer at {signer} does not answer: {why}; is the Deployment nsm-identity up?")]
    Away {
        /// Where.
        signer: String,
        /// What happened instead.
        why: String,
    },
    /// The address.
    #[error(
        "{0:?} is no address of a signer ({1}); expected HOST:PORT, for example nsm-identity.nsm-system.svc:443"
    )]
    Address(String, InvalidDnsNameError),
    /// No token.
    #[error(
        "the agent's token {} cannot be read ({source}); mount one into its pod as a projected volume \
         (serviceAccountToken, audience nsm-identity)",
        path.display()
    )]
    Token {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Whom to trust is not known.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// What is to be trusted cannot be used.
    #[error(
        "whom to trust ({roots}, key roots.pem) cannot be used: {why}; the signer writes it: is the Deployment nsm-identity up?"
    )]
    Roots {
        /// The ConfigMap.
        roots: String,
        /// What is wrong.
        why: String,
    },
    /// What the signer signed cannot be used.
    #[error("what the signer at {signer} signed cannot be used: {why}")]
    Signed {
        /// Where.
        signer: String,
        /// What is wrong.
        why: String,
    },
    /// No randomness.
    #[error("no key can be made: {0}")]
    Key(#[from] rcgen::Error),
}

impl AgentError {
    fn status(&self) -> Status {
        let said = format!("no identity issued: {self}");
        match self {
            Self::Refused { .. } => Status::permission_denied(said),
            _ => Status::unavailable(said),
        }
    }
}

/// What is known of a pod; whoever asks the signer for it holds this.
type Place = Arc<tokio::sync::Mutex<Option<Issued>>>;

/// The agent of a node.
#[derive(Debug)]
pub struct Agent {
    config: Config,
    api: Objects,
    pods: Pods,
    known: Mutex<HashMap<PodUid, Place>>,
    tls: Mutex<Option<Arc<ClientConfig>>>,
}

impl Agent {
    /// An agent that has asked nobody yet.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub fn new(config: Config, api: Objects) -> io::Result<Self> {
        let pods = Pods::new(config.own.clone(), &fs::read_to_string("/proc/self/cgroup")?);
        Ok(Self { config, api, pods, known: Mutex::default(), tls: Mutex::default() })
    }

    fn pod(&self, peer: &UnixPeer) -> Result<PodUid, Status> {
        let groups = peer.control_groups().map_err(|reason| unattested(peer, &reason))?;
        self.pods.of(&groups).map_err(|reason| {
            info!(%peer, uid = peer.uid(), %reason, "a caller that is no pod");
            Status::permission_denied(format!("no identity issued: {peer}: {reason}"))
        })
    }

    /// What a pod has, asked for where it has nothing, or where whoever has it wants the next.
    ///
    /// # Errors
    /// It has nothing that is still good, and the signer refuses or cannot be asked.
    pub async fn issued(&self, pod: &PodUid, renew: bool) -> Result<Issued, AgentError> {
        let place = Arc::clone(self.known.lock().entry(pod.clone()).or_default());
        let mut place = place.lock().await;
        // Who comes late is not kept waiting for a signer that is away: he gets what others have, and renews it.
        let good = |issued: &&Issued| lives(issued) && (!renew || !issued.renew.is_due());
        if let Some(issued) = place.as_ref().filter(good) {
            return Ok(issued.clone());
        }
        let asked = self.ask(pod).await.inspect_err(|error| {
            warn!(%pod, error = explain(error), "no identity, or no new one, for a pod");
        });
        if let Ok(issued) = &asked {
            debug!(%pod, id = ?issued.svids.first().map(Svid::id), "signed");
            *place = Some(issued.clone());
        } else if matches!(asked, Err(AgentError::Refused { .. })) {
            *place = None;
        }
        drop(place);
        self.forget_ended();
        asked
    }

    /// Pods come and go; what ended is nobody's.
    fn forget_ended(&self) {
        self.known.lock().retain(|_, place| match place.try_lock() {
            Ok(issued) => issued.as_ref().is_some_and(lives),
            Err(_) => true,
        });
    }

    /// Has a new key signed for a pod.
    ///
    /// # Errors
    /// The signer refuses, or cannot be asked.
    pub async fn ask(&self, pod: &PodUid) -> Result<Issued, AgentError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let request = CertificateParams::default().serialize_request(&key)?;
        let ask = Ask { pod: pod.clone(), request: Der(request.der().to_vec()) };
        let signed = self.call(&ask).await?;
        self.issue(signed, &key)
            .map_err(|error| AgentError::Signed { signer: self.config.signer.clone(), why: explain(&error) })
    }

    fn issue(&self, signed: Signed, key: &KeyPair) -> Result<Issued, nsm_identity::Error> {
        let certificates =
            |all: Vec<Der>| all.into_iter().map(|der| CertificateDer::from(der.0)).collect::<Vec<_>>();
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        let svid = Svid::new(certificates(signed.chain), key)?;
        let left = svid.not_after().duration_since(clock::now()).unwrap_or_default();
        Ok(Issued {
            domain: svid.id().trust_domain(),
            svids: vec![svid],
            roots: certificates(signed.roots),
            renew: Renewal::after(left / 2),
        })
    }

    /// Asks the signer; a second time with roots that are read anew, where TLS does not believe it.
    async fn call(&self, ask: &Ask) -> Result<Signed, AgentError> {
        let known = self.tls.lock().clone();
        if let Some(tls) = known {
            match self.call_with(tls, ask).await {
                Err(AgentError::Away { .. }) => {}
                answered => return answered,
            }
        }
        let tls = Arc::new(self.roots().await?);
        *self.tls.lock() = Some(Arc::clone(&tls));
        self.call_with(tls, ask).await
    }

    async fn call_with(&self, tls: Arc<ClientConfig>, ask: &Ask) -> Result<Signed, AgentError> {
        let signer = &self.config.signer;
        let away = |why: String| AgentError::Away { signer: signer.clone(), why };
        match timeout(PATIENCE, self.exchange(tls, ask)).await {
            Ok(Ok((StatusCode::OK, body))) => serde_json::from_slice(&body)
                .map_err(|e| AgentError::Signed { signer: signer.clone(), why: e.to_string() }),
            Ok(Ok((status, body))) => {
                let said = String::from_utf8_lossy(&body).trim().to_owned();
                match status.is_server_error() {
                    true => Err(AgentError::Busy { signer: signer.clone(), said }),
                    false => Err(AgentError::Refused { signer: signer.clone(), said }),
                }
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(away(format!("not within {} s", PATIENCE.as_secs()))),
        }
    }

    async fn exchange(&self, tls: Arc<ClientConfig>, ask: &Ask) -> Result<(StatusCode, Bytes), AgentError> {
        let Config { signer, token, .. } = &self.config;
        let away = |error: &(dyn std::error::Error + 'static)| AgentError::Away {
            signer: signer.clone(),
            why: explain(error),
        };
        let host = signer.rsplit_once(':').map_or(signer.as_str(), |(host, _)| host);
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
            .map_err(|e| AgentError::Address(signer.clone(), e))?;
        // Read each time: it is renewed.
        let token =
            fs::read_to_string(token).map_err(|source| AgentError::Token { path: token.clone(), source })?;
        let stream = TcpStream::connect(signer).await.map_err(|e| away(&e))?;
        let _ = stream.set_nodelay(true);
        let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(|e| away(&e))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| away(&e))?;
        let body = serde_json::to_vec(ask).map_err(|e| away(&e))?;
        let request = Request::post(PATH)
            .header(header::HOST, host)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::AUTHORIZATION, format!("Bearer {}", token.trim()))
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| away(&e))?;
        let answered = async {
            let response = sender.send_request(request).await.map_err(|e| away(&e))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
            let body = body.map_err(|e| away(&io::Error::other(e)))?;
            // The connection ends with it.
            drop(sender);
            Ok((status, body.to_bytes()))
        };
        let (answered, _ended) = tokio::join!(answered, connection);
        answered
    }

    /// TLS that trusts whom the signer says.
    async fn roots(&self) -> Result<ClientConfig, AgentError> {
        let (namespace, name) = &self.config.roots;
        let what = format!("the ConfigMap {namespace}/{name}");
        let bad = |why: String| AgentError::Roots { roots: what.clone(), why };
        let found =
            self.api.find(&what, &format!("/api/v1/namespaces/{namespace}/configmaps/{name}")).await?;
        let found = found.ok_or_else(|| bad("it is not there yet".into()))?;
        let pem = found["data"][ROOTS].as_str().ok_or_else(|| bad("the key is not there".into()))?;
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let root = root.map_err(|e: pem::Error| bad(e.to_string()))?;
            roots.add(root).map_err(|e| bad(e.to_string()))?;
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut tls =
            tls.map_err(|e| bad(e.to_string()))?.with_root_certificates(roots).with_no_client_auth();
        tls.resumption = rustls::client::Resumption::disabled();
        Ok(tls)
    }
}

fn lives(issued: &Issued) -> bool {
    issued.svids.iter().all(|svid| svid.not_after() > clock::now())
}

#[tonic::async_trait]
impl Issuer for Agent {
    async fn next(&self, peer: &UnixPeer, given: Option<&Issued>) -> Result<Issued, Status> {
        let mut pause = PAUSES.0;
        if let Some(given) = given {
            given.renew.due().await;
        }
        loop {
            // Asked each time: a process that has ended is nobody any more.
            let pod = self.pod(peer)?;
            match (self.issued(&pod, given.is_some()).await, given) {
                (Ok(issued), _) => return Ok(issued),
                // It can wait.
                (Err(error), Some(given)) if lives(given) && !matches!(error, AgentError::Refused { .. }) => {
                }
                (Err(error), _) => return Err(error.status()),
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }
}
