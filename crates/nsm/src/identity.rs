//! `nsm identity`: flags and environment of who tells processes who they are.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use clap::{Args, Subcommand};
use nsm_identity::{TrustDomain, UnixSocket, ca::workload};
use nsm_k8s::objects::Objects;
use nsm_signer::{
    agent::{self, Agent},
    pod::PodUid,
    signer::{self, Signer},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

use crate::common::{Common, Shutdown, positive_duration};

/// Where agents serve the Workload API: where SPIRE's do, so that workloads need not know whose it is.
const SOCKET: &str = "/run/spire/sockets/agent.sock";

/// A small certificate authority: tells every process who it is (SPIFFE Workload API)
///
/// Callers are attested by what the kernel says of them: network namespace, user, executable, cgroup, process. The
/// configuration maps that to SPIFFE IDs; it is read again when it changes.
///
/// On Kubernetes `nsm identity signer` runs some times in the cluster and has the key, and `nsm identity agent` runs on
/// each node and tells pods who they are: spiffe://DOMAIN/ns/NAMESPACE/pod/NAME.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_long_help = "Example configuration:

  trustDomain: example.org
  sockets:
  - {path: /run/nsm/identity.sock, node: node1}
  entries:
  - spiffeId: spiffe://example.org/client
    selectors: {netns: client, uid: 1000}"
)]
pub(crate) struct Identity {
    #[command(subcommand)]
    kubernetes: Option<Kubernetes>,
    #[command(flatten)]
    file: OfFile,
}

#[derive(Debug, Subcommand)]
enum Kubernetes {
    Signer(OfSigner),
    Agent(OfAgent),
}

#[derive(Debug, Args)]
struct OfFile {
    /// YAML: trustDomain, svidTtl, stateDir, sockets (path, node), entries (spiffeId, node, selectors)
    #[arg(long, env = "NSM_IDENTITY_CONFIG", value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

/// On Kubernetes: has the key of the trust domain, and signs for pods of the node of the agent that asks
///
/// The key is in a Secret of its namespace, made by the first of several signers and renewed long before it ends; whom to
/// trust is in a ConfigMap. It may read metadata of pods and have tokens reviewed, and nothing else.
///
/// Example: nsm identity signer --trust-domain k8s.nsm --namespace nsm-system
#[derive(Debug, Args)]
struct OfSigner {
    /// Every identity is spiffe://TRUST_DOMAIN/ns/NAMESPACE/pod/NAME
    #[arg(long, env = "NSM_TRUST_DOMAIN", default_value = "k8s.nsm")]
    trust_domain: TrustDomain,
    /// How long identities are good for; they are renewed after half of it
    #[arg(long, env = "NSM_SVID_TTL", default_value = "1h", value_parser = positive_duration)]
    svid_ttl: Duration,
    /// Where to listen
    #[arg(long, env = "NSM_LISTEN_ON", default_value = ":8443", value_name = "HOST:PORT")]
    listen_on: String,
    /// The namespace that it lives in
    #[arg(long, env = "NSM_NAMESPACE", default_value = "default")]
    namespace: String,
    /// The Service in front of it
    #[arg(long, env = "NSM_SERVICE_NAME", default_value = "nsm-identity")]
    service_name: String,
    /// The Secret of its namespace that keeps the keys
    #[arg(
        long,
        env = "NSM_IDENTITY_SECRET",
        default_value = "nsm-identity-authorities",
        value_name = "NAME"
    )]
    secret: String,
    /// The ConfigMap of its namespace that says whom to trust
    #[arg(long, env = "NSM_IDENTITY_ROOTS", default_value = "nsm-identity-roots", value_name = "NAME")]
    roots: String,
    /// The service account of its namespace that agents have
    #[arg(long, env = "NSM_IDENTITY_AGENTS", default_value = "nsm-node", value_name = "NAME")]
    agents: String,
    /// What else agents call it, for its certificate: names or addresses, separated by commas
    #[arg(long, env = "NSM_NAMES", value_delimiter = ',', value_name = "NAME")]
    names: Vec<String>,
    #[command(flatten)]
    common: Common,
}

/// On Kubernetes: tells the pods of its node who they are, on a socket of the node
///
/// A caller's pod is told by the control groups of its process; that takes the node's PID namespace (hostPID: true). The
/// signer believes the agent for pods of this node only.
///
/// Example: nsm identity agent --signer nsm-identity.nsm-system.svc:443 --namespace nsm-system
#[derive(Debug, Args)]
struct OfAgent {
    /// Where the signer answers
    #[arg(
        long,
        env = "NSM_IDENTITY_SIGNER",
        default_value = "nsm-identity.nsm-system.svc:443",
        value_name = "HOST:PORT"
    )]
    signer: String,
    /// The token that says who the agent is: a projected one for the audience nsm-identity
    #[arg(
        long,
        env = "NSM_IDENTITY_TOKEN",
        default_value = "/run/secrets/nsm-identity/token",
        value_name = "FILE"
    )]
    token: PathBuf,
    /// The namespace of the ConfigMap that says whom to trust
    #[arg(long, env = "NSM_NAMESPACE", default_value = "nsm-system")]
    namespace: String,
    /// That ConfigMap
    #[arg(long, env = "NSM_IDENTITY_ROOTS", default_value = "nsm-identity-roots", value_name = "NAME")]
    roots: String,
    /// Where to serve
    #[arg(long, env = "NSM_IDENTITY_SOCKET", default_value = SOCKET, value_name = "FILE")]
    socket: PathBuf,
    /// The UID of the agent's own pod
    #[arg(long, env = "POD_UID", value_parser = pod_uid)]
    pod_uid: Option<PodUid>,
    #[command(flatten)]
    common: Common,
}

fn pod_uid(text: &str) -> Result<PodUid, nsm_signer::pod::NoUid> {
    PodUid::try_from(text.to_owned())
}

impl Identity {
    pub(crate) fn common(&self) -> &Common {
        match &self.kubernetes {
            Some(Kubernetes::Signer(signer)) => &signer.common,
            Some(Kubernetes::Agent(agent)) => &agent.common,
            None => &self.file.common,
        }
    }

    pub(crate) fn name(&self) -> String {
        match &self.kubernetes {
            Some(Kubernetes::Signer(_)) => "signer",
            Some(Kubernetes::Agent(_)) => "agent",
            None => "identity",
        }
        .into()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        match self.kubernetes {
            Some(Kubernetes::Signer(signer)) => signer.serve().await,
            Some(Kubernetes::Agent(agent)) => agent.serve().await,
            None => self.file.serve().await,
        }
    }
}

/// Nothing of these roles is lost by an end at once.
fn shutdown() -> Result<Shutdown> {
    Shutdown::on([SignalKind::interrupt(), SignalKind::terminate(), SignalKind::quit()])
}

impl OfFile {
    async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), shutdown()?);
        let config = self.config.ok_or_else(|| anyhow!("--config FILE is missing"))?;
        let mut hangups = signal(SignalKind::hangup()).context("signals cannot be caught")?;
        let ca = nsm_identity::ca::Ca::start(&config)?;
        let reloader = ca.reloader();
        tokio::spawn(async move {
            while hangups.recv().await.is_some() {
                reloader.reload();
            }
        });
        process.ready();
        ca.serve(shutdown.wait()).await?;
        Ok(())
    }
}

impl OfSigner {
    async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), shutdown()?);
        let every = self.listen_on.starts_with(':').then(|| format!("[::]{}", self.listen_on));
        let listen_on = every.as_deref().unwrap_or(&self.listen_on);
        let listener = TcpListener::bind(listen_on).await;
        let listener = listener.with_context(|| format!("cannot listen on {listen_on:?} (NSM_LISTEN_ON)"))?;
        let address: SocketAddr = listener.local_addr()?;
        let service = [".svc", ".svc.cluster.local", ""]
            .map(|rest| format!("{}.{}{rest}", self.service_name, self.namespace));
        let config = signer::Config {
            trust_domain: self.trust_domain,
            svid_lifetime: self.svid_ttl,
            names: service.into_iter().chain(self.names).collect(),
            namespace: self.namespace,
            secret: self.secret,
            roots: self.roots,
            agents: self.agents,
        };
        tracing::info!(%address, domain = %config.trust_domain, "identities of pods are signed");
        process.waits("waiting for the API server");
        let signer = Signer::new(config, Objects::infer().await?);
        signer.serve(listener, || process.ready(), shutdown.wait()).await.context("nothing is served")
    }
}

impl OfAgent {
    async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), shutdown()?);
        let config = agent::Config {
            signer: self.signer,
            token: self.token,
            roots: (self.namespace, self.roots),
            own: self.pod_uid,
        };
        let agent = Agent::new(config, Objects::infer().await?).context("/proc/self/cgroup")?;
        let socket = UnixSocket::bind(&self.socket).context(
            "identities cannot be served; where that is SPIRE, `nsm install --identity spire` uses it instead",
        )?;
        let listener = socket.listener().with_context(|| self.socket.display().to_string())?;
        tracing::info!(path = %self.socket.display(), "serving the Workload API to the pods of this node");
        process.ready();
        workload::serve(listener, Arc::new(agent), shutdown.wait()).await.context("nothing is served")
    }
}
