//! Keeps what has to be: authorities in a Secret, the configuration at the API server, a certificate at hand.
//!
//! Several webhooks keep the same: whoever reads an old Secret is refused by the API server when he writes, and reads
//! again. Nothing here hurries: reviews need no authority and no configuration, only the certificate.

use std::{
    collections::BTreeSet,
    fs, io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use nsm_identity::ca::rotation::{Authorities, AuthorityError};
use nsm_identity::clock;
use nsm_k8s::{
    authorities::{self, KeptError},
    objects::ApiError,
};
use nsm_transport::https::Shown;
use parking_lot::Mutex;
use rustls::{crypto::aws_lc_rs, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::Value;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{cluster::Cluster, configuration::Configuration};

/// How often all of it is looked at.
const LOOK: Duration = Duration::from_secs(10);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(1);
const CONFIGURATIONS: &str = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations";

/// Why something is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The API server.
    #[error(transparent)]
    Cluster(#[from] ApiError),
    /// The authorities.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// A file that the operator named.
    #[error("{} cannot be read: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It holds something else.
    #[error("{}: {problem}; expected {expected} in PEM", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What should be in it.
        expected: &'static str,
    },
    /// The Secret.
    #[error(transparent)]
    Kept(#[from] KeptError),
}

/// Where certificates come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Authorities of our own, in a Secret.
    Secret {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Files of the operator, read again when they change.
    Files {
        /// Chain.
        certificate: PathBuf,
        /// Its key.
        key: PathBuf,
        /// What API servers shall trust.
        bundle: Option<PathBuf>,
    },
}

/// Keeps a webhook reachable.
#[derive(Debug)]
pub struct Keeper {
    /// The API server, where there is something to be written there.
    pub cluster: Option<Cluster>,
    /// What it shall be told; `None` where others tell it.
    pub configuration: Option<Configuration>,
    /// The namespace that the webhook lives in, if it does in one: what is written for it goes when that goes.
    pub home: Option<String>,
    /// For what certificates are.
    pub names: Vec<String>,
    /// Where certificates come from.
    pub origin: Origin,
    /// Namespaces that reviews found annotated.
    pub found: Arc<Found>,
    /// Where the certificate is put.
    pub shown: Arc<Shown>,
}

/// Namespaces that were found annotated, for whoever has to know at once.
#[derive(Debug, Default)]
pub struct Found {
    known: Mutex<BTreeSet<String>>,
    news: Notify,
}

impl Found {
    /// A review has seen that this one is annotated.
    pub(crate) fn annotated(&self, namespace: &str) {
        if !self.known.lock().contains(namespace) {
            self.news.notify_one();
        }
    }

    fn know(&self, all: BTreeSet<String>) {
        *self.known.lock() = all;
    }
}

impl Keeper {
    /// Keeps on, until it is dropped.
    pub async fn run(mut self) {
        let mut failed = String::new();
        let mut renew = SystemTime::UNIX_EPOCH;
        let mut bundle = String::new();
        loop {
            match self.pass(&mut renew, &mut bundle).await {
                Ok(()) => {
                    if !std::mem::take(&mut failed).is_empty() {
                        info!("what the webhook needs is as it should be again");
                    }
                    // Early where a review has found something new, or failed to be written.
                    let _ = timeout(LOOK, self.found.news.notified()).await;
                }
                Err(error) => {
                    let error = error.to_string();
                    if error != failed {
                        warn!(error, "what the webhook needs is not as it should be; trying on");
                        failed = error;
                    }
                    sleep(AGAIN).await;
                }
            }
        }
    }

    /// Makes everything as it should be.
    async fn pass(&mut self, renew: &mut SystemTime, known: &mut String) -> Result<(), KeepError> {
        let now = clock::now();
        self.find_owner().await?;
        match &self.origin {
            Origin::Secret { namespace, name } => {
                let authorities = match &self.cluster {
                    Some(cluster) => authorities::keep(&cluster.0, namespace, name, None, now).await?,
                    None => Authorities::new(now)?,
                };
                let bundle = authorities.bundle();
                self.register(&bundle).await?;
                if now >= *renew || bundle != *known {
                    let certificate = authorities.sign(&self.names, now)?;
                    *renew = certificate.renew;
                    *known = bundle;
                    self.shown.put(certificate.key);
                    info!(names = ?self.names, "a certificate was made");
                }
            }
            Origin::Files { certificate, key, bundle } => {
                let text = bundle.as_ref().map(read).transpose()?.unwrap_or_default();
                let shown = (read(certificate)?, read(key)?);
                self.register(&text).await?;
                let told = format!("{}{}", shown.0, shown.1);
                if told != *known {
                    self.shown.put(pair(certificate, &shown.0, key, &shown.1)?);
                    *known = told;
                    info!(file = %certificate.display(), "a certificate was read");
                }
            }
        }
        Ok(())
    }

    /// Whoever removes the namespace removes the configuration: nothing is left that would keep pods out.
    async fn find_owner(&mut self) -> Result<(), KeepError> {
        let (Some(cluster), Some(configuration), Some(home)) =
            (&self.cluster, &mut self.configuration, &self.home)
        else {
            return Ok(());
        };
        if configuration.owner.is_none() {
            let namespace = cluster.0.find("its namespace", &format!("/api/v1/namespaces/{home}")).await?;
            let uid =
                namespace.and_then(|namespace| namespace["metadata"]["uid"].as_str().map(str::to_owned));
            configuration.owner = uid.map(|uid| (home.clone(), uid));
        }
        Ok(())
    }

    /// Tells the API server when to ask the webhook.
    async fn register(&self, bundle: &str) -> Result<(), KeepError> {
        let (Some(cluster), Some(configuration)) = (&self.cluster, &self.configuration) else {
            return Ok(());
        };
        let annotated = cluster.annotated_namespaces(&configuration.annotation).await?;
        let wanted =
            Configuration { bundle: bundle.into(), annotated: annotated.clone(), ..configuration.clone() };
        let what = format!("the MutatingWebhookConfiguration {}", wanted.name);
        let keep = |found: Option<Value>| {
            let next = found.map_or_else(|| Some(wanted.object()), |found| wanted.instead_of(&found));
            Ok::<_, ApiError>(((), next))
        };
        cluster.0.keep(&what, CONFIGURATIONS, &wanted.name, keep).await?;
        self.found.know(annotated);
        Ok(())
    }
}

fn read(path: &PathBuf) -> Result<String, KeepError> {
    fs::read_to_string(path).map_err(|source| KeepError::File { path: path.clone(), source })
}

fn pair(certificate: &PathBuf, chain: &str, key: &PathBuf, key_pem: &str) -> Result<CertifiedKey, KeepError> {
    let bad =
        |path: &PathBuf, expected, problem: String| KeepError::Pem { path: path.clone(), problem, expected };
    let certificates = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>();
    let certificates =
        certificates.map_err(|e| bad(certificate, "a chain of certificates", e.to_string()))?;
    if certificates.is_empty() {
        return Err(bad(certificate, "a chain of certificates", "it holds no certificate".into()));
    }
    let private = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|e| bad(key, "the certificate's private key", e.to_string()))?;
    CertifiedKey::from_der(certificates, private, &aws_lc_rs::default_provider())
        .map_err(|e| bad(key, "the certificate's private key", e.to_string()))
}
