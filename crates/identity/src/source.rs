//! Where an identity comes from: the SPIFFE Workload API, followed for as long as the source lives.
//!
//! The client is generated from our own `workload.proto` because the built-in CA serves the same file; it is two
//! methods, and it lets us wait, log and refuse keys the way a mesh daemon needs.

use std::{
    env,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls_pki_types::PrivatePkcs8KeyDer;
use tokio::sync::watch;
use tonic::{Code, Status, transport::Endpoint};
use tracing::{debug, info, warn};

use crate::{
    Error,
    pb::{self, spiffe_workload_api_client::SpiffeWorkloadApiClient},
    svid::{Bundles, Identity, Svid, split_certificates},
};

/// The environment variable that names the Workload API's socket.
pub const ENDPOINT_VARIABLE: &str = "SPIFFE_ENDPOINT_SOCKET";

/// Metadata that the Workload API demands, against requests forged through a proxy.
pub(crate) const SECURITY_HEADER: &str = "workload.spiffe.io";

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// While waiting for the first SVID, the reason is repeated this often.
const REMIND: Duration = Duration::from_secs(10);

/// Follows an identity. Cheap to clone; the Workload API is followed until the last clone is gone.
#[derive(Debug, Clone)]
pub struct Source {
    current: watch::Receiver<Arc<Identity>>,
}

impl Source {
    /// Follows the Workload API that `SPIFFE_ENDPOINT_SOCKET` names; waits for the first SVID, however long that
    /// takes (drop the future to give up), and logs what it waits for.
    ///
    /// # Errors
    /// The variable is not set or names no Unix socket.
    pub async fn from_env() -> Result<Self, Error> {
        let value = env::var(ENDPOINT_VARIABLE).map_err(|_| Error::Endpoint {
            value: String::new(),
            reason: "SPIFFE_ENDPOINT_SOCKET is not set",
        })?;
        Self::open(&value).await
    }

    /// As [`Source::from_env`], for the address `endpoint` (`unix:///path`).
    ///
    /// # Errors
    /// The address names no Unix socket.
    pub async fn open(endpoint: &str) -> Result<Self, Error> {
        let mut follower = Follower::new(endpoint)?;
        let mut stream = None;
        let first = follower.next(&mut stream).await;
        info!(id = %first.id(), expires = %humantime::format_rfc3339_seconds(first.svid().not_after()), "identity");
        let (sender, current) = watch::channel(Arc::new(first));
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = sender.closed() => return,
                    identity = follower.next(&mut stream) => {
                        // At every half life of an SVID: no news when all is well.
                        debug!(
                            id = %identity.id(),
                            expires = %humantime::format_rfc3339_seconds(identity.svid().not_after()),
                            "identity renewed"
                        );
                        let identity = identity.after(&sender.borrow());
                        sender.send_replace(Arc::new(identity));
                    }
                }
            }
        });
        Ok(Self { current })
    }

    /// Asks the Workload API at `endpoint` once, without waiting for anything but its answer: for diagnosis.
    ///
    /// # Errors
    /// As [`Source::open`], and [`Error::WorkloadApi`] with what the server says.
    pub async fn fetch_once(endpoint: &str) -> Result<Identity, Error> {
        let mut follower = Follower::new(endpoint)?;
        let reason = match follower.try_next(&mut None).await {
            Ok(identity) => return Ok(identity),
            Err(reason) => reason,
        };
        Err(Error::WorkloadApi { path: follower.path, reason })
    }

    /// A source that somebody else renews: for a process that is its own CA.
    pub fn from_watch(current: watch::Receiver<Arc<Identity>>) -> Self {
        Self { current }
    }

    /// An identity that never changes.
    pub fn fixed(identity: Identity) -> Self {
        Self { current: watch::channel(Arc::new(identity)).1 }
    }

    /// The newest snapshot.
    pub fn current(&self) -> Arc<Identity> {
        self.current.borrow().clone()
    }

    /// Waits until the newest snapshot is another one than `seen`, and returns it. Never returns if the identity
    /// cannot change any more.
    pub async fn changed(&self, seen: &Arc<Identity>) -> Arc<Identity> {
        let mut current = self.current.clone();
        if current.wait_for(|identity| !Arc::ptr_eq(identity, seen)).await.is_err() {
            std::future::pending::<()>().await;
        }
        self.current()
    }
}

type Client = SpiffeWorkloadApiClient<tonic::transport::Channel>;
type Responses = tonic::Streaming<pb::X509svidResponse>;

/// Reads identities one after the other, reconnecting with bounded back-off.
struct Follower {
    path: String,
    client: Client,
    pause: Duration,
    reminded: Option<Instant>,
}

impl Follower {
    fn new(endpoint: &str) -> Result<Self, Error> {
        let invalid = |reason| Error::Endpoint { value: endpoint.into(), reason };
        let path = endpoint.strip_prefix("unix://").or_else(|| endpoint.strip_prefix("unix:"));
        let path = path.ok_or_else(|| invalid("only unix: sockets can attest their callers"))?;
        if !path.starts_with('/') {
            return Err(invalid("the path must be absolute"));
        }
        let channel =
            Endpoint::from_shared(format!("unix://{path}")).map_err(|_| invalid("not a URL"))?.connect_lazy();
        let client = SpiffeWorkloadApiClient::new(channel);
        Ok(Self { path: path.into(), client, pause: FIRST_PAUSE, reminded: None })
    }

    /// The next identity. `stream` is kept outside so that this future may be dropped.
    async fn next(&mut self, stream: &mut Option<Responses>) -> Identity {
        loop {
            match self.try_next(stream).await {
                Ok(identity) => {
                    self.pause = FIRST_PAUSE;
                    self.reminded = None;
                    return identity;
                }
                Err(reason) => {
                    *stream = None;
                    if self.reminded.is_none_or(|at| at.elapsed() >= REMIND) {
                        self.reminded = Some(Instant::now());
                        warn!(socket = self.path, reason, "waiting for an identity from the Workload API");
                    } else {
                        debug!(socket = self.path, reason, "no identity yet");
                    }
                    tokio::time::sleep(self.pause).await;
                    self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn try_next(&mut self, stream: &mut Option<Responses>) -> Result<Identity, String> {
        let explain = |status: Status| match status.code() {
            Code::PermissionDenied => format!("no entry for this process: {}", status.message()),
            Code::Unavailable => format!("nobody serves the socket: {}", crate::explain(&status)),
            code => format!("{code:?}: {}", status.message()),
        };
        let responses = match stream {
            Some(responses) => responses,
            None => {
                let mut request = tonic::Request::new(pb::X509svidRequest {});
                request
                    .metadata_mut()
                    .insert(SECURITY_HEADER, tonic::metadata::MetadataValue::from_static("true"));
                let response = self.client.fetch_x509svid(request).await.map_err(explain)?;
                stream.insert(response.into_inner())
            }
        };
        match responses.message().await {
            Ok(Some(response)) => identity(response).map_err(|e| crate::explain(&e)),
            Ok(None) => Err("the server ended the stream".into()),
            Err(status) => Err(explain(status)),
        }
    }
}

/// The first SVID of an answer is the one to use (SPIFFE Workload API, section 5.2.1).
pub fn identity(response: pb::X509svidResponse) -> Result<Identity, Error> {
    let svid = response.svids.into_iter().next().ok_or(Error::EmptyChain)?;
    let mut bundles = Bundles::default();
    for (domain, roots) in &response.federated_bundles {
        match domain.parse() {
            Ok(domain) => bundles.insert(domain, &split_certificates(roots)?)?,
            // One bad federation must not take the whole identity away.
            Err(reason) => warn!(%reason, "a federated bundle is ignored"),
        }
    }
    let chain = split_certificates(&svid.x509_svid)?;
    let roots = split_certificates(&svid.bundle)?;
    let svid = Svid::new(chain, PrivatePkcs8KeyDer::from(svid.x509_svid_key))?;
    bundles.insert(svid.id().trust_domain(), &roots)?;
    Identity::new(svid, bundles)
}
