//! The built-in CA: `nsm identity`.
//!
//! It serves the SPIFFE Workload API, one Unix socket per node, and attests callers by what the kernel says of their
//! processes: who connected (`SO_PEERCRED`, pinned by pidfd), its executable, control group and network namespace.
//! [`Entry`]s map these to SPIFFE IDs. A caller that no entry fits waits for one, for a bounded time, because its
//! entry and its process are often made at the same moment. SVIDs are renewed at half their lifetime, on the same
//! stream; a caller that stops fitting loses the stream.

mod attest;
mod authority;
pub mod rotation;
pub mod workload;

use std::{
    collections::BTreeSet,
    fs,
    future::Future,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::clock;
use serde::{Deserialize, Deserializer, de};
use serde_saphyr::Spanned;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tonic::Status;
use tracing::{debug, info, warn};

pub use attest::{Entry, Selectors};
pub use authority::Authority;
use workload::{Issued, Issuer, Renewal, unattested};

use crate::{Error, FileWatch, SpiffeId, Svid, TrustDomain, UnixPeer, UnixSocket};

/// How often a waiting caller is looked at again: what an entry names may appear without a change of the file.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const SHORTEST_TTL: Duration = Duration::from_secs(2);

/// The configuration file, YAML.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Every SVID is `spiffe://trust-domain/…`.
    pub trust_domain: TrustDomain,
    /// Lifetime of SVIDs; they are renewed after half of it.
    #[serde(default = "default_ttl", deserialize_with = "duration")]
    pub svid_ttl: Duration,
    /// How long a caller that no entry fits is kept waiting for one.
    #[serde(default = "default_wait", deserialize_with = "duration")]
    pub entry_wait: Duration,
    /// Where the root is kept; without it a restart makes a new one, which nobody trusts yet.
    #[serde(default)]
    pub state_dir: Option<PathBuf>,
    /// One socket per node.
    pub sockets: Vec<Spanned<Socket>>,
    /// Who gets which ID.
    #[serde(default)]
    pub entries: Vec<Spanned<Entry>>,
}

/// A Workload API socket and the node that it stands for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Socket {
    /// Where to listen.
    pub path: PathBuf,
    /// The node's name.
    pub node: String,
}

/// What is wrong with the CA's configuration, state or work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    /// The configuration file cannot be read.
    #[error("cannot read the identity configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The configuration file says something wrong.
    #[error("{}:{line}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong, naming the field.
        reason: String,
    },
    /// The root cannot be kept.
    #[error("cannot {what} the CA's state {path}; check stateDir")]
    State {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// Others can read the root's key.
    #[error(
        "the CA's key {0} is readable by others; it may be known: remove it, or restore mode 0600 if you trust it"
    )]
    Exposed(PathBuf),
    /// The root cannot be parsed.
    #[error("the CA's state {path} is damaged: {reason}; restore it, or remove it to start with a new root")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// The root in the state directory is another's.
    #[error(
        "the CA's state {path} is of trust domain {found}, the configuration says {wanted}; use another stateDir"
    )]
    OtherDomain {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: TrustDomain,
        /// What was configured.
        wanted: TrustDomain,
    },
    /// An ID that this root does not speak for.
    #[error("{id} is no workload in trust domain {domain}")]
    NotOurs {
        /// The ID.
        id: SpiffeId,
        /// The root's domain.
        domain: TrustDomain,
    },
    /// A key or certificate cannot be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// A server panicked: a defect. All end, so that whoever supervises them starts all anew.
    #[error("a Workload API server broke down; please report this")]
    Broken(#[source] tokio::task::JoinError),
    /// The server broke.
    #[error("the Workload API server of node {node} ended")]
    Serve {
        /// Whose socket.
        node: String,
        /// Why.
        source: tonic::transport::Error,
    },
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`CaError::Read`] and [`CaError::Config`].
    pub fn load(path: &Path) -> Result<Self, CaError> {
        let text = fs::read_to_string(path).map_err(|source| CaError::Read { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Parses the text of a configuration file; `path` is for messages.
    ///
    /// # Errors
    /// [`CaError::Config`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, CaError> {
        let wrong = |line, reason| CaError::Config { path: path.into(), line, reason };
        let config: Self = serde_saphyr::from_str(text).map_err(|e| {
            let e = e.without_snippet();
            wrong(e.location().map_or(1, |at| at.line()), e.to_string())
        })?;
        if config.svid_ttl < SHORTEST_TTL {
            return Err(wrong(1, format!("svidTtl: at least {}", humantime::format_duration(SHORTEST_TTL))));
        }
        if config.sockets.is_empty() {
            return Err(wrong(1, "sockets: at least one, or nobody can ask".into()));
        }
        let (mut paths, mut nodes) = (BTreeSet::new(), BTreeSet::new());
        for (i, socket) in config.sockets.iter().enumerate() {
            let wrong = |field: &str, reason: &str| {
                wrong(socket.referenced.line(), format!("sockets[{i}].{field}: {reason}"))
            };
            if !socket.value.path.is_absolute() {
                return Err(wrong("path", "must be absolute"));
            }
            if !paths.insert(&socket.value.path) {
                return Err(wrong("path", "a second socket at this path"));
            }
            if socket.value.node.is_empty() || !nodes.insert(&socket.value.node) {
                return Err(wrong("node", "must be a name of its own"));
            }
        }
        for (i, entry) in config.entries.iter().enumerate() {
            let wrong = |field: &str, reason: String| {
                wrong(entry.referenced.line(), format!("entries[{i}].{field}: {reason}"))
            };
            let Entry { spiffe_id, node, selectors } = &entry.value;
            if !spiffe_id.is_member_of(&config.trust_domain) || spiffe_id.path().is_empty() {
                let reason = format!("{spiffe_id} is no workload in trust domain {}", config.trust_domain);
                return Err(wrong("spiffeId", reason));
            }
            if let Some(node) = node.as_ref().filter(|node| !nodes.contains(node)) {
                return Err(wrong("node", format!("no socket is node {node}'s")));
            }
            if selectors.count() == 0 {
                return Err(wrong("selectors", "none: every process would get this identity".into()));
            }
            if selectors.pid_start.is_some() && selectors.pid.is_none() {
                return Err(wrong("selectors.pidStart", "means nothing without pid".into()));
            }
        }
        Ok(config)
    }
}

/// A CA whose sockets are bound.
#[derive(Debug)]
pub struct Ca {
    file: PathBuf,
    /// Of the file before it was read: what is written to it since then is seen as a change.
    stamp: Stamp,
    sockets: Vec<(String, UnixSocket)>,
    shared: Arc<Shared>,
    config: watch::Sender<Arc<Config>>,
    reload: mpsc::Receiver<()>,
    reloader: Reloader,
}

/// Asks a running CA to read its file again, as SIGHUP does.
#[derive(Debug, Clone)]
pub struct Reloader(mpsc::Sender<()>);

impl Reloader {
    /// Asks; the file is read soon.
    pub fn reload(&self) {
        // A full queue means that it is about to be read anyway.
        let _ = self.0.try_send(());
    }
}

/// Serves the CA that `config` describes until `shutdown` is done.
///
/// # Errors
/// The configuration is wrong, its state cannot be used, a socket is in use.
pub async fn serve(config: &Path, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
    Ca::start(config)?.serve(shutdown).await
}

impl Ca {
    /// Reads the configuration, opens or makes the root, binds the sockets: callers can connect from now on.
    ///
    /// # Errors
    /// As [`serve`].
    pub fn start(file: &Path) -> Result<Self, Error> {
        let stamp = Stamp::of(file);
        let config = Config::load(file)?;
        let now = clock::now();
        let authority = match &config.state_dir {
            Some(dir) => Authority::open(dir, config.trust_domain.clone(), now)?,
            None => Authority::new(config.trust_domain.clone(), now)?,
        };
        let bind =
            |socket: &Spanned<Socket>| Ok((socket.value.node.clone(), UnixSocket::bind(&socket.value.path)?));
        let sockets = config.sockets.iter().map(bind).collect::<Result<Vec<_>, Error>>()?;
        let (sender, receiver) = watch::channel(Arc::new(config));
        let (reloader, reload) = mpsc::channel(1);
        let shared = Arc::new(Shared { authority, config: receiver });
        Ok(Self {
            file: file.into(),
            stamp,
            sockets,
            shared,
            config: sender,
            reload,
            reloader: Reloader(reloader),
        })
    }

    /// A handle that makes it read its file again.
    pub fn reloader(&self) -> Reloader {
        self.reloader.clone()
    }

    /// Serves until `shutdown` is done; then streams end and the socket files go.
    ///
    /// # Errors
    /// A server broke.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
        let Self { file, mut stamp, sockets, shared, config, mut reload, reloader: _reloader } = self;
        let (stop, stopped) = watch::channel(());
        let mut servers = JoinSet::new();
        for (node, socket) in &sockets {
            let listener = socket.listener().map_err(|source| Error::Socket {
                path: socket.path().into(),
                what: "serve",
                source,
            })?;
            info!(node, path = %socket.path().display(), "serving the Workload API");
            let issuer = Arc::new(Entries { node: node.clone(), shared: shared.clone() });
            let (node, served) = (node.clone(), workload::serve(listener, issuer, ended(stopped.clone())));
            servers.spawn(async move { served.await.map_err(|source| CaError::Serve { node, source }) });
        }
        drop(stopped);
        let watch = FileWatch::new(&file);
        let mut look = || {
            let new = Stamp::of(&file);
            if new != stamp {
                stamp = new;
                read_again(&file, &config);
            }
        };
        // What was written since the file was read and before the watch began makes no event.
        look();
        tokio::pin!(shutdown);
        let result = loop {
            tokio::select! {
                () = &mut shutdown => break Ok(()),
                ended = servers.join_next() => break match ended {
                    Some(Ok(result)) => result,
                    Some(Err(source)) => Err(CaError::Broken(source)),
                    None => Ok(()),
                },
                Some(()) = reload.recv() => read_again(&file, &config),
                () = watch.maybe_changed() => look(),
            }
        };
        drop(stop);
        while servers.join_next().await.is_some() {}
        result.map_err(Into::into)
    }
}

/// Until the other end is dropped.
async fn ended(mut stopped: watch::Receiver<()>) {
    while stopped.changed().await.is_ok() {}
}

/// Enough of a file's metadata to see that it was written or replaced.
#[derive(Debug, PartialEq)]
struct Stamp(Option<(u64, u64, i64, i64)>);

impl Stamp {
    fn of(file: &Path) -> Self {
        Self(fs::metadata(file).ok().map(|m| (m.ino(), m.size(), m.mtime(), m.mtime_nsec())))
    }
}

/// Entries and times follow the file; what is bound or signed does not. A wrong file changes nothing.
fn read_again(file: &Path, current: &watch::Sender<Arc<Config>>) {
    match Config::load(file) {
        Ok(new) => {
            let old = current.borrow().clone();
            if (&new.trust_domain, &new.state_dir) != (&old.trust_domain, &old.state_dir)
                || !new.sockets.iter().map(|s| &s.value).eq(old.sockets.iter().map(|s| &s.value))
            {
                warn!(file = %file.display(), "trustDomain, stateDir and sockets change only with a restart");
            }
            debug!(entries = new.entries.len(), "read the configuration again");
            current.send_replace(Arc::new(Config {
                trust_domain: old.trust_domain.clone(),
                state_dir: old.state_dir.clone(),
                sockets: old.sockets.clone(),
                ..new
            }));
        }
        Err(error) => {
            warn!(error = crate::explain(&error), "the configuration is not changed");
        }
    }
}

/// What the entries of the file give callers on a node's socket.
#[derive(Debug)]
struct Entries {
    node: String,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    authority: Authority,
    config: watch::Receiver<Arc<Config>>,
}

impl Entries {
    /// Waits until an entry fits the caller, for as long as the configuration says.
    async fn attest(&self, peer: &UnixPeer) -> Result<(), Status> {
        let mut config = self.shared.config.clone();
        let wait = config.borrow().entry_wait;
        let fits = async {
            loop {
                let now = config.borrow_and_update().clone();
                if !self.identities(peer, &now)?.is_empty() {
                    return Ok(());
                }
                let _ = timeout(LOOK_AGAIN, config.changed()).await;
            }
        };
        match timeout(wait, fits).await {
            Ok(result) => result,
            Err(_) => Err(self.denied(peer)),
        }
    }

    fn identities(&self, peer: &UnixPeer, config: &Config) -> Result<Vec<SpiffeId>, Status> {
        let facts = attest::Facts::of(peer, &self.node).map_err(|reason| unattested(peer, &reason))?;
        Ok(facts.identities(config.entries.iter().map(|entry| &entry.value)))
    }

    /// What a caller is told that no entry fits, or none any more.
    fn denied(&self, peer: &UnixPeer) -> Status {
        match attest::Facts::of(peer, &self.node) {
            Ok(facts) => {
                info!(%facts, "no entry fits a caller");
                Status::permission_denied(format!("no identity issued: no entry fits {facts}"))
            }
            Err(reason) => unattested(peer, &reason),
        }
    }

    fn issue(&self, ids: &[SpiffeId], ttl: Duration) -> Result<Issued, Error> {
        let authority = &self.shared.authority;
        let issue = |id| authority.issue(id, ttl, clock::now());
        Ok(Issued {
            svids: ids.iter().map(issue).collect::<Result<_, _>>()?,
            domain: authority.domain().clone(),
            roots: vec![authority.certificate().clone()],
            renew: Renewal::after(ttl / 2),
        })
    }
}

#[tonic::async_trait]
impl Issuer for Entries {
    async fn next(&self, peer: &UnixPeer, given: Option<&Issued>) -> Result<Issued, Status> {
        if given.is_none() {
            self.attest(peer).await?;
        }
        let mut config = self.shared.config.clone();
        loop {
            let now = config.borrow_and_update().clone();
            let ids = self.identities(peer, &now)?;
            if ids.is_empty() {
                return Err(self.denied(peer));
            }
            let due =
                given.is_none_or(|given| given.renew.is_due() || !given.svids.iter().map(Svid::id).eq(&ids));
            if due {
                return self.issue(&ids, now.svid_ttl).map_err(|e| {
                    let reason = crate::explain(&e);
                    warn!(reason, "cannot issue");
                    Status::internal(reason)
                });
            }
            let Some(given) = given else { continue };
            tokio::select! {
                () = given.renew.due() => {}
                changed = config.changed() => if changed.is_err() {
                    return Err(Status::unavailable("the authority ends"));
                },
            }
        }
    }
}

fn default_ttl() -> Duration {
    Duration::from_secs(3600)
}

fn default_wait() -> Duration {
    Duration::from_secs(5)
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text)
        .map_err(|e| de::Error::custom(format!("{text:?} is no duration ({e}); for example 1h")))
}
