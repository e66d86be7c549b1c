//! The API server: how it is found, how often it is asked, and what its answers mean.

use std::{fmt, future::Future, sync::Arc, time::Duration};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
    core::Status,
};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until, timeout};

use crate::resource::{GROUP, Kind, VERSION};

/// How long an answer may take, of everything that is not a watch.
const PATIENCE: Duration = Duration::from_secs(10);

/// Calls in a second that upstream's registry may make (`NSM_KUBELET_QPS`).
pub const DEFAULT_QPS: u32 = 205;

/// A Kubernetes cluster, as somebody in it or with a kubeconfig reaches it. Clones share the bound on calls.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    server: Arc<str>,
    calls: Arc<Mutex<Bucket<Instant>>>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("server", &self.server).finish_non_exhaustive()
    }
}

/// Why something cannot be had of the API server.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody says where it is.
    #[error(
        "no Kubernetes: this is no pod ({pod}), and {kubeconfig}; set KUBECONFIG, or run where a service account's \
         token is mounted"
    )]
    NoConfig {
        /// Why it is no pod.
        pod: String,
        /// What is wrong with the kubeconfig.
        kubeconfig: String,
    },
    /// What says where it is cannot be used.
    #[error("the configuration for the API server {server} cannot be used: {why}")]
    BadConfig {
        /// Its URL.
        server: Arc<str>,
        /// What is wrong.
        why: String,
    },
    /// It does not answer.
    #[error("the API server {server} does not answer: {why}")]
    Away {
        /// Its URL.
        server: Arc<str>,
        /// What happened instead.
        why: String,
    },
    /// It does not know who we are.
    #[error("the API server {server} does not accept our credentials: {said}")]
    Stranger {
        /// Its URL.
        server: Arc<str>,
        /// Its words.
        said: String,
    },
    /// RBAC does not let us.
    #[error(
        "the API server {server} does not let us {verb} {plural}: {said}; the role of this registry needs the rule \
         {{apiGroups: [{GROUP}], resources: [{plural}{}], verbs: [{verb}]}}",
        if *verb == "patch" { "/status" } else { "" }
    )]
    Forbidden {
        /// Its URL.
        server: Arc<str>,
        /// What was to be done.
        verb: &'static str,
        /// To what.
        plural: &'static str,
        /// Its words.
        said: String,
    },
    /// The custom resource is not installed.
    #[error(
        "the API server {server} does not know {plural}.{GROUP}/{VERSION}: {found}; install the custom resource \
         definitions of this mesh or of upstream's"
    )]
    NotInstalled {
        /// Its URL.
        server: Arc<str>,
        /// Which.
        plural: &'static str,
        /// What it does know of it.
        found: String,
    },
    /// The object has changed since it was read.
    #[error("{kind} {object} was changed by somebody else")]
    Conflict {
        /// Which kind.
        kind: &'static str,
        /// Which object.
        object: String,
    },
    /// There is no such object.
    #[error("{kind} {object} does not exist")]
    NotFound {
        /// Which kind.
        kind: &'static str,
        /// Which object.
        object: String,
    },
    /// What happened since is not known any more.
    #[error("the API server {server} does not remember what happened since version {version}")]
    Gone {
        /// Its URL.
        server: Arc<str>,
        /// The version that was asked for.
        version: String,
    },
    /// Another answer.
    #[error("the API server {server} refuses to {verb} {object}: {said}")]
    Refused {
        /// Its URL.
        server: Arc<str>,
        /// What was to be done.
        verb: &'static str,
        /// To what.
        object: String,
        /// Its words.
        said: String,
    },
}

impl Cluster {
    /// The cluster of this pod, or else that of `KUBECONFIG` or `~/.kube/config`; `qps` calls in a second, and twice
    /// as many at once.
    ///
    /// # Errors
    /// There is none, or it cannot be used.
    pub async fn find(qps: u32) -> Result<Self, Error> {
        let config = match Config::incluster() {
            Ok(config) => config,
            Err(pod) => {
                let read = async {
                    Config::from_custom_kubeconfig(Kubeconfig::read()?, &KubeConfigOptions::default()).await
                };
                read.await.map_err(|error| Error::NoConfig { pod: chain(&pod), kubeconfig: chain(&error) })?
            }
        };
        let server: Arc<str> = config.cluster_url.to_string().trim_end_matches('/').into();
        // What fails is tried again by whoever knows what it is for.
        let config = {
            let mut config = config;
            config.default_retry = false;
            config.connect_timeout = Some(PATIENCE);
            config
        };
        let client = Client::try_from(config);
        let client =
            client.map_err(|error| Error::BadConfig { server: server.clone(), why: chain(&error) })?;
        let calls = Arc::new(Mutex::new(Bucket::new(qps, Instant::now())));
        Ok(Self { client, server, calls })
    }

    /// Where it is.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Makes a call when its turn has come, and says what went wrong.
    pub(crate) async fn call<T: Kind, R>(
        &self,
        verb: &'static str,
        object: &str,
        call: impl Future<Output = kube::Result<R>>,
    ) -> Result<R, Error> {
        let turn = self.calls.lock().take(Instant::now());
        if let Some(turn) = turn {
            sleep_until(turn).await;
        }
        match timeout(PATIENCE, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.explain::<T>(verb, object, &error).await),
            Err(_) => Err(self.away(format!("no answer within {} s", PATIENCE.as_secs()))),
        }
    }

    pub(crate) fn away(&self, why: impl Into<String>) -> Error {
        Error::Away { server: self.server.clone(), why: why.into() }
    }

    /// What an answer means.
    pub(crate) async fn explain<T: Kind>(
        &self,
        verb: &'static str,
        object: &str,
        error: &kube::Error,
    ) -> Error {
        let kube::Error::Api(status) = error else { return self.away(chain(error)) };
        match self.status::<T>(verb, object, status) {
            // A list is answered so where there is no such resource.
            Error::NotFound { .. } if matches!(verb, "list" | "watch") => self.not_installed::<T>().await,
            error => error,
        }
    }

    pub(crate) fn status<T: Kind>(&self, verb: &'static str, object: &str, status: &Status) -> Error {
        let (server, said) = (self.server.clone(), status.message.clone());
        let (kind, plural, object) = (<T as Kind>::KIND, T::PLURAL, object.to_owned());
        match status.code {
            401 => Error::Stranger { server, said },
            403 => Error::Forbidden { server, verb, plural, said },
            // For who creates something, it is the namespace that does not exist.
            404 if verb != "create" => Error::NotFound { kind, object },
            409 => Error::Conflict { kind, object },
            410 => Error::Gone { server, version: object },
            // Shutting down, starting, overloaded.
            429 | 500 | 502..=504 => Error::Away { server, why: said },
            _ => Error::Refused { server, verb, object: format!("{kind} {object}"), said },
        }
    }

    /// What is there instead of the resource.
    async fn not_installed<T: Kind>(&self) -> Error {
        let groups = timeout(PATIENCE, self.client.list_api_groups()).await;
        let found = match groups {
            Ok(Ok(groups)) => match groups.groups.into_iter().find(|group| group.name == GROUP) {
                None => format!("it has nothing of {GROUP}"),
                Some(group) => {
                    let versions: Vec<_> =
                        group.versions.iter().map(|version| version.version.as_str()).collect();
                    let missing = if versions.contains(&VERSION) { "other resources of " } else { "" };
                    format!("it has {missing}{GROUP}/{}", versions.join(" and "))
                }
            },
            Ok(Err(error)) => return self.away(chain(&error)),
            Err(_) => return self.away("no answer"),
        };
        Error::NotInstalled { server: self.server.clone(), plural: T::PLURAL, found }
    }
}

/// An error with its causes; those that repeat are said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        source = cause.source();
    }
    text
}

/// Calls that may be made: so many in a second, and twice as many at once.
#[derive(Debug)]
struct Bucket<I> {
    every: Duration,
    /// When the bucket is full again.
    full: I,
    depth: Duration,
}

impl<I: Copy + Ord + std::ops::Add<Duration, Output = I> + std::ops::Sub<I, Output = Duration>> Bucket<I> {
    fn new(qps: u32, now: I) -> Self {
        let every = Duration::from_secs(1) / qps.max(1);
        Self { every, full: now, depth: every * qps.max(1) * 2 }
    }

    /// Takes one; when it may be used, if that is not now.
    fn take(&mut self, now: I) -> Option<I> {
        self.full = self.full.max(now) + self.every;
        let missing = self.full - now;
        missing.checked_sub(self.depth).filter(|wait| !wait.is_zero()).map(|wait| now + wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_have_a_rate_and_a_burst() {
        let start = std::time::Instant::now();
        let mut bucket = Bucket::new(10, start);
        let waits: Vec<_> = (0..22).map(|_| bucket.take(start).map(|at| at - start)).collect();
        assert!(waits[..20].iter().all(Option::is_none), "{waits:?}");
        let ms = Duration::from_millis;
        assert_eq!(waits[20..], [Some(ms(100)), Some(ms(200))]);
        // A second later ten more may be made, of which two were promised.
        let later = start + ms(1000);
        let waits: Vec<_> = (0..9).map(|_| bucket.take(later).map(|at| at - later)).collect();
        assert!(waits[..8].iter().all(Option::is_none) && waits[8] == Some(ms(100)), "{waits:?}");
    }
}
