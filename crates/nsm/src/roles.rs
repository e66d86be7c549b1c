//! Flags and environment of every role, and the call that starts it.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use ipnet::IpNet;
use nsm_api::{nsurl::NsUrl, pb::registry::NetworkService};
use nsm_cnf::{filter::Unfiltered, rules::Rules, works::Role};
use nsm_dns::{Names, Options};
use nsm_identity::SpiffeId;
use nsm_manager::{Candidate, ExcludedPrefixes, tell::ToldOfRegistry};
use nsm_mesh::{Inside, NextHop, auth::OnlyFrom, from_file::FromFile, inspect::Neighbour, metrics::Metrics};
use nsm_registry::{Cluster, Directories, node_labels};
use nsm_sdk::{
    client::{Client as SdkClient, ClientConfig, Wire},
    endpoint::{EndpointConfig, Provides},
    failures::Failures,
    ipam::{IpamPolicy, PrefixGroups},
    liveness::Liveness,
    own_end::OwnNamespace,
    prefix_server::{PrefixServer, PrefixServerConfig},
    prefixes::AwarenessGroups,
    provides::{DnsConfigs, PolicyRoutes},
};
use nsm_transport::{DialUrl, ListenUrl, Pool, PoolConfig};

use crate::common::{
    Common, Measured, Process, Shutdown, Tokens, address_or_prefix, duration, label, positive_duration,
    prefix,
};
use crate::guard::{Bounds, Checks, Guarding, Registrations};
use crate::wires::Telling;

const MANAGER_SOCKET: &str = "unix:///var/lib/networkservicemesh/nsm.io.sock";

/// The directory: which services there are, and which endpoints provide them
///
/// State is in memory; after a restart managers and endpoints register again by themselves. Services given as files
/// belong to the operator: no workload changes them. With --store kubernetes everything is kept as resources of
/// networkservicemesh.io/v1, as upstream's cmd-registry-k8s does; several may run side by side, and services are written
/// with kubectl.
///
/// Example: nsm registry --listen-on tcp://10.0.0.1:5002 --network-services services.yaml
#[derive(Debug, Args)]
pub(crate) struct Registry {
    /// Name in logs
    #[arg(long, env = "NSM_NAME", default_value = "registry")]
    name: String,
    /// Where to listen: tcp://host:port or unix:///path, several separated by commas
    #[arg(long, env = "NSM_LISTEN_ON", default_value = "tcp://:5002", value_delimiter = ',')]
    listen_on: Vec<ListenUrl>,
    /// What keeps the registrations
    #[arg(long, env = "NSM_STORE", default_value = "memory", value_enum)]
    store: Store,
    /// YAML files with NetworkService resources (networkservicemesh.io/v1 or v1alpha1), read again when they
    /// change; for memory only
    #[arg(long, env = "NSM_NETWORK_SERVICE_FILES", value_delimiter = ',', value_name = "FILE")]
    network_services: Vec<PathBuf>,
    /// The Kubernetes namespace that resources are written into; those of all are read
    #[arg(long, env = "NSM_NAMESPACE", default_value = "default")]
    namespace: String,
    /// Find the prefixes that the cluster itself uses (pods, services, CNI) and those that users add (ConfigMap
    /// excluded-prefixes-config), and keep them in the ConfigMap nsm-config of that namespace, for managers to mount
    #[arg(long, env = "NSM_CLUSTER_PREFIXES")]
    cluster_prefixes: bool,
    /// End what is registered at a node ten seconds after the node was deleted, instead of when it expires; takes the
    /// right to list and watch nodes
    #[arg(long, env = "NSM_FOLLOW_NODES")]
    follow_nodes: bool,
    /// Calls to the Kubernetes API server in a second; twice as many at once
    #[arg(long, env = "NSM_KUBELET_QPS", default_value_t = nsm_k8s::cluster::DEFAULT_QPS, value_name = "CALLS")]
    kubelet_qps: u32,
    /// How long an endpoint stays registered without being registered again
    #[arg(long, env = "NSM_EXPIRE_PERIOD", default_value = "1m", value_parser = duration)]
    expire_period: Duration,
    #[command(flatten)]
    measured: Measured,
    #[command(flatten)]
    tokens: Tokens,
    #[command(flatten)]
    registrations: Registrations,
    #[command(flatten)]
    checks: Checks,
    #[command(flatten)]
    bounds: Bounds,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// What keeps registrations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Store {
    /// This process: one per mesh
    Memory,
    /// Custom resources, at the API server of this pod or of KUBECONFIG
    Kubernetes,
}

impl Registry {
    pub(crate) fn name(&self) -> String {
        self.name.clone()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        let guard = self.bounds.guard(self.registrations.policies(&self.checks)?);
        let metrics = self.measured.start(&process).await?;
        metrics.register(|registry| guard.refusals.register(registry));
        // What is wrong with files and flags is said before anything is waited for.
        let files = ServiceFiles::open(&self.network_services)?;
        let cluster = match self.store {
            Store::Memory => None,
            Store::Kubernetes if !files.0.is_empty() => bail!(
                "--network-services are for --store memory; on Kubernetes apply them: kubectl apply -f {}",
                self.network_services
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect::<Vec<_>>()
                    .join(" -f ")
            ),
            Store::Kubernetes => Some(nsm_k8s::cluster::Cluster::find(self.kubelet_qps).await?),
        };
        let config = nsm_registry::Config {
            watches: nsm_registry::WatchLimit(guard.limits.watches_of_one),
            guard,
            listen_on: self.listen_on,
            services: files.now(),
            lifetime: self.expire_period,
            max_token_lifetime: self.tokens.max_token_lifetime,
        };
        if self.cluster_prefixes {
            let api = nsm_k8s::objects::Objects::infer()
                .await
                .context("--cluster-prefixes (NSM_CLUSTER_PREFIXES)")?;
            tokio::spawn(nsm_k8s::prefixes::Collector::new(api, self.namespace.clone()).run());
        }
        let source = process.identity().await?;
        let registry = match cluster {
            None => nsm_registry::Registry::bind(config, source).await?,
            Some(cluster) => {
                let kept = nsm_k8s::keeper::KeeperConfig {
                    namespace: self.namespace,
                    lifetime: self.expire_period,
                    follow_nodes: self.follow_nodes,
                };
                let waits = |error: &nsm_k8s::cluster::Error| {
                    tracing::warn!(%error, "nothing is served yet");
                    process.waits(&error.to_string());
                };
                let keepers = tokio::select! {
                    keepers = nsm_k8s::keeper::open_in_time(&cluster, &kept, waits) => keepers,
                    () = shutdown.clone().wait() => return Ok(()),
                };
                nsm_registry::Registry::bind_before(keepers, config, source).await?
            }
        };
        tracing::info!(name = %self.name, "the directory is open");
        process.ready();
        let inspector = process.inspector();
        inspector.add(Arc::new(ToldOfRegistry(registry.directories())));
        tokio::spawn(files.follow(registry.directories()));
        let looked_at = tonic::service::Routes::new(inspector.over_mtls());
        registry.serve_beside(looked_at, &[nsm_mesh::inspect::SERVICE], shutdown.wait()).await;
        Ok(())
    }
}

/// Network services of the operator, in files that are followed while the registry runs.
struct ServiceFiles(Vec<FromFile<Vec<NetworkService>>>);

impl ServiceFiles {
    fn open(files: &[PathBuf]) -> Result<Self> {
        let open = |path: &PathBuf| {
            let shown = path.display().to_string();
            FromFile::open(path, move |text| {
                let text = text.ok_or_else(|| "cannot be read: No such file or directory".to_owned())?;
                let file = nsm_api::resource::parse(text).map_err(|error| error.to_string())?;
                for warning in &file.warnings {
                    tracing::warn!(file = shown, "{warning}");
                }
                Ok(file.services)
            })
        };
        Ok(Self(files.iter().map(open).collect::<Result<_, _>>()?))
    }

    fn now(&self) -> Vec<NetworkService> {
        self.0.iter().flat_map(|file| (*file.get()).clone()).collect()
    }

    /// Tells a registry that began with them whenever they change. Does not end.
    async fn follow(mut self, known: Directories) {
        let mut before = self.now();
        while !self.0.is_empty() {
            futures::future::select_all(self.0.iter_mut().map(|file| Box::pin(file.changed()))).await;
            let now = self.now();
            known.change_operators(&before, &now).await;
            before = now;
        }
    }
}

/// One per node: takes requests of workloads and of other nodes, chooses the forwarder
///
/// Workloads reach it by its Unix socket, other nodes by its TCP address. It accepts a network namespace from a
/// workload only if it is the workload's own, and keeps no descriptor of one.
///
/// Example: nsm manager --name node1 --listen-on unix:///run/nsm/nsm.io.sock,tcp://10.0.0.1:5001 --registry-url tcp://10.0.0.1:5002
#[derive(Debug, Args)]
pub(crate) struct Manager {
    /// Name in the path of connections; unique in the mesh
    #[arg(long, env = "NSM_NAME", default_value = "nsmgr")]
    name: String,
    #[command(flatten)]
    managing: Managing,
    #[command(flatten)]
    hop: Hop,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Flags of whatever manages a node.
#[derive(Debug, Args)]
pub(crate) struct Managing {
    #[command(flatten)]
    registrations: Registrations,
    /// Where to listen; the first tcp:// one is what other nodes reach us by
    #[arg(long, env = "NSM_LISTEN_ON", default_value = MANAGER_SOCKET, value_delimiter = ',')]
    listen_on: Vec<ListenUrl>,
    /// The cluster's registry; empty: there is none, this manager keeps everything itself
    #[arg(long, env = "NSM_REGISTRY_URL", default_value = "tcp://localhost:5002")]
    registry_url: String,
    /// The service under which forwarders register
    #[arg(long, env = "NSM_FORWARDER_NETWORK_SERVICE_NAME", default_value = "forwarder")]
    forwarder_network_service_name: String,
    /// SPIFFE IDs that may register forwarders from another network namespace than the manager's, or over TCP
    #[arg(long, env = "NSM_FORWARDER_IDS", value_delimiter = ',', value_name = "SPIFFE_ID")]
    forwarder_ids: Vec<SpiffeId>,
    /// SPIFFE IDs that may watch every connection; others see those that they asked for
    #[arg(long, env = "NSM_MONITOR_READERS", value_delimiter = ',', value_name = "SPIFFE_ID")]
    monitor_readers: Vec<SpiffeId>,
    /// Prefixes that endpoints must not hand out on this node
    #[arg(long, env = "NSM_EXCLUDED_PREFIXES", value_delimiter = ',', value_parser = prefix, value_name = "PREFIX")]
    excluded_prefixes: Vec<IpNet>,
    /// A file with more of them (YAML, `prefixes: [10.96.0.0/12, …]`), read again whenever it changes; empty: none
    #[arg(long, env = "NSM_EXCLUDED_PREFIXES_FILE", default_value = ExcludedPrefixes::FILE, value_name = "FILE")]
    excluded_prefixes_file: PathBuf,
    #[command(flatten)]
    telling: Telling,
}

/// Flags of every hop of a node.
#[derive(Debug, Args)]
pub(crate) struct Hop {
    /// SPIFFE IDs that may name namespaces other than their own, in requests and in answers
    #[arg(long, env = "NSM_NAMESPACE_DELEGATES", value_delimiter = ',', value_name = "SPIFFE_ID")]
    namespace_delegates: Vec<SpiffeId>,
    /// How long connecting to the next hop may take
    #[arg(long, env = "NSM_DIAL_TIMEOUT", default_value = "750ms", value_parser = duration)]
    dial_timeout: Duration,
    #[command(flatten)]
    measured: Measured,
    #[command(flatten)]
    tokens: Tokens,
    #[command(flatten)]
    guarding: Guarding,
}

impl Managing {
    fn cluster(&self) -> Result<Cluster> {
        Ok(match self.registry_url.as_str() {
            "" => Cluster::Alone,
            url => Cluster::At(url.parse().context("NSM_REGISTRY_URL")?),
        })
    }

    async fn config(
        self,
        name: String,
        registry: Cluster,
        hop: &Hop,
        metrics: Arc<Metrics>,
    ) -> Result<nsm_manager::Config> {
        Ok(nsm_manager::Config {
            workloads: self.telling.start(hop.tokens.max_token_lifetime).await?,
            name,
            listen_on: self.listen_on,
            registry,
            dial_timeout: hop.dial_timeout,
            forwarder_service: self.forwarder_network_service_name,
            forwarder_ids: self.forwarder_ids.into_iter().collect(),
            namespace_delegates: hop.namespace_delegates.iter().cloned().collect(),
            excluded_prefixes: ExcludedPrefixes::open(self.excluded_prefixes, self.excluded_prefixes_file)
                .context("NSM_EXCLUDED_PREFIXES_FILE")?,
            monitor_readers: self.monitor_readers.into_iter().collect(),
            max_token_lifetime: hop.tokens.max_token_lifetime,
            guard: hop.guarding.guard()?,
            registry_answers: hop.guarding.registry_answers()?,
            registrations: hop.guarding.of(&self.registrations)?,
            metrics,
        })
    }
}

impl Manager {
    pub(crate) fn name(&self) -> String {
        self.name.clone()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        let cluster = self.managing.cluster()?;
        let metrics = self.hop.measured.start(&process).await?;
        let config = self.managing.config(self.name, cluster, &self.hop, metrics).await?;
        let manager = nsm_manager::Manager::bind(config, process.identity().await?).await?;
        manager.serve(None, || process.ready(), shutdown.wait()).await;
        Ok(())
    }
}

/// One per node: turns connections into wires of the kernel
///
/// On one node a wire is a veth pair, between nodes a VXLAN device; both are made straight in the pods, no device is
/// moved and no program started. Wires outlive this process: after a restart they are found and adopted, and no packet
/// is lost. Needs CAP_NET_ADMIN and CAP_SYS_ADMIN.
///
/// Example: nsm forwarder --connect-to unix:///run/nsm/nsm.io.sock --tunnel-ip 10.0.0.1
#[derive(Debug, Args)]
pub(crate) struct Forwarder {
    /// Name in the path of connections and in the registry; unique in the mesh
    #[arg(long, env = "NSM_NAME", default_value = "forwarder")]
    name: String,
    /// The manager of this node
    #[arg(long, env = "NSM_CONNECT_TO", default_value = MANAGER_SOCKET)]
    connect_to: DialUrl,
    /// Where to listen
    #[arg(long, env = "NSM_LISTEN_ON", default_value = "unix:///run/nsm/forwarder.sock")]
    listen_on: ListenUrl,
    /// The service under which forwarders register
    #[arg(long, env = "NSM_NSNAME", default_value = "forwarder")]
    nsname: String,
    #[command(flatten)]
    forwarding: Forwarding,
    #[command(flatten)]
    hop: Hop,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Flags of whatever makes wires.
#[derive(Debug, Args)]
pub(crate) struct Forwarding {
    /// This node's address for tunnels, or a prefix that it is in; without one: that of the default route's device
    #[arg(long, env = "NSM_TUNNEL_IP", value_parser = address_or_prefix, value_name = "IP|PREFIX")]
    tunnel_ip: Option<IpNet>,
    /// UDP port of VXLAN tunnels; 0 is 4789
    #[arg(long, env = "NSM_VXLAN_PORT", default_value_t = 0)]
    vxlan_port: u16,
    /// Types of mechanisms to offer next hops before others, in any case. This forwarder offers one for each next hop,
    /// KERNEL on its node and VXLAN beyond, so there is nothing to reorder yet
    #[arg(long, env = "NSM_MECHANISM_PRIORITY", value_delimiter = ',', value_name = "TYPE")]
    mechanism_priority: Vec<String>,
    /// Where the plans of wires are kept, so that a restart finds them; no need to survive a reboot
    #[arg(long, env = "NSM_STATE_DIR", default_value = "/run/nsm/forwarder")]
    state_dir: PathBuf,
    /// Capabilities that services choose forwarders by
    #[arg(long, env = "NSM_LABELS", default_value = "p2p:true", value_delimiter = ',', value_parser = label)]
    labels: Vec<(String, String)>,
}

impl Forwarding {
    fn config(
        self,
        name: String,
        service: String,
        hop: &Hop,
        metrics: Arc<Metrics>,
    ) -> Result<nsm_forwarder::Config> {
        Ok(nsm_forwarder::Config {
            name,
            tunnel_ip: self.tunnel_ip,
            vxlan_port: self.vxlan_port,
            mechanism_priority: self.mechanism_priority,
            state_dir: self.state_dir,
            labels: self.labels.into_iter().collect(),
            service,
            namespace_delegates: hop.namespace_delegates.iter().cloned().collect(),
            dial_timeout: hop.dial_timeout,
            max_token_lifetime: hop.tokens.max_token_lifetime,
            guard: hop.guarding.guard()?,
            registry_answers: hop.guarding.registry_answers()?,
            metrics,
        })
    }
}

impl Forwarder {
    pub(crate) fn name(&self) -> String {
        self.name.clone()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        let metrics = self.hop.measured.start(&process).await?;
        let config = self.forwarding.config(self.name, self.nsname, &self.hop, metrics)?;
        // The kernel is asked before anything is waited for: a missing capability is said at once.
        let forwarder = nsm_forwarder::Forwarder::prepare(config)?;
        let source = process.identity().await?;
        forwarder.serve(self.connect_to, self.listen_on, source, || process.ready(), shutdown.wait()).await?;
        Ok(())
    }
}

/// Manager and forwarder of a node in one process, and the registry where asked: what most nodes run
///
/// Requests go from one to the other without a connection, a handshake or a message; paths show both all the same, and
/// forwarders in processes of their own may register beside. Needs CAP_NET_ADMIN and CAP_SYS_ADMIN.
///
/// Example: nsm node --name node1 --listen-on unix:///run/nsm/nsm.io.sock,tcp://10.0.0.1:5001 --registry-listen-on tcp://10.0.0.1:5002
#[derive(Debug, Args)]
pub(crate) struct Node {
    /// Name of the manager in the path of connections; unique in the mesh
    #[arg(long, env = "NSM_NAME", default_value = "nsmgr")]
    name: String,
    /// Name of the forwarder in the path of connections; without one: forwarder-NAME
    #[arg(long, env = "NSM_FORWARDER_NAME")]
    forwarder_name: Option<String>,
    /// Serve the cluster's registry here, in this process, instead of asking the one at --registry-url
    #[arg(long, env = "NSM_REGISTRY_LISTEN_ON", value_delimiter = ',', value_name = "URL")]
    registry_listen_on: Vec<ListenUrl>,
    /// For the registry here: YAML files with NetworkService resources, read again when they change
    #[arg(
        long,
        env = "NSM_NETWORK_SERVICE_FILES",
        value_delimiter = ',',
        value_name = "FILE",
        requires = "registry_listen_on"
    )]
    network_services: Vec<PathBuf>,
    #[command(flatten)]
    managing: Managing,
    #[command(flatten)]
    forwarding: Forwarding,
    #[command(flatten)]
    hop: Hop,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl Node {
    pub(crate) fn name(&self) -> String {
        self.name.clone()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        let files = ServiceFiles::open(&self.network_services)?;
        let metrics = self.hop.measured.start(&process).await?;
        let service = self.managing.forwarder_network_service_name.clone();
        let name = self.forwarder_name.unwrap_or_else(|| format!("forwarder-{}", self.name));
        let config = self.forwarding.config(name, service, &self.hop, Arc::clone(&metrics))?;
        // The kernel is asked before anything is waited for: a missing capability is said at once.
        let forwarder = nsm_forwarder::Forwarder::prepare(config)?;
        let source = process.identity().await?;

        let (registry, cluster) = if self.registry_listen_on.is_empty() {
            (None, self.managing.cluster()?)
        } else {
            let guard = self.hop.guarding.of_registry(&self.managing.registrations)?;
            let config = nsm_registry::Config {
                watches: nsm_registry::WatchLimit(guard.limits.watches_of_one),
                guard,
                listen_on: self.registry_listen_on,
                services: files.now(),
                max_token_lifetime: self.hop.tokens.max_token_lifetime,
                lifetime: nsm_registry::expiry::DEFAULT_LIFETIME,
            };
            let registry = nsm_registry::Registry::bind(config, source.clone()).await?;
            let known = registry.directories();
            process.inspector().add(Arc::new(ToldOfRegistry(known.clone())));
            tokio::spawn(files.follow(known.clone()));
            (Some(registry), Cluster::Inside(known))
        };
        let config = self.managing.config(self.name, cluster, &self.hop, metrics).await?;
        let manager = nsm_manager::Manager::bind(config, source.clone()).await?;

        let registration = forwarder.registration("");
        let directory = Arc::new(manager.registry().clone());
        let forwarder = forwarder.start(OnlyFrom::Inside, directory, manager.pool().clone());
        let (connections, hub) = (Arc::clone(&forwarder.connections), Arc::clone(&forwarder.hub));
        let hop = Inside::new(connections, hub, source, self.hop.tokens.max_token_lifetime);
        let own = Candidate { nse: registration, hop: NextHop::inside(Arc::new(hop)) };

        let open = async {
            if let Some(registry) = registry {
                registry.serve(shutdown.clone().wait()).await;
            }
        };
        let (wires, (), ()) = tokio::join!(
            forwarder.look_after(shutdown.clone().wait()),
            manager.serve(Some(own), || process.ready(), shutdown.clone().wait()),
            open,
        );
        // Deletions under way come to their end; standing wires stay.
        wires.flush().await;
        Ok(())
    }
}

/// Asks for wires and keeps them up; closes them when a signal ends it
///
/// It tries until the wires are there, refreshes them before their tokens expire, and asks again when the mesh says
/// that something behind them is gone, or when packets do not pass any more. NOTIFY_SOCKET (systemd) hears READY=1 when
/// all wires are up.
///
/// Where a pod needs its wires before its programs start, `nsm client --init` makes them and ends; an `nsm client` of the
/// same name beside the programs goes on with them. So does one that starts again after it was killed.
///
/// Example: nsm client --name web --network-services kernel://secure-intranet-connectivity/nsm0
#[derive(Debug, Args)]
pub(crate) struct Client {
    /// Name in the path; unique in the mesh. Connections are called NAME-0, NAME-1, …
    #[arg(long, env = "NSM_NAME", default_value = "nsc")]
    name: String,
    /// The manager of this node
    #[arg(long, env = "NSM_CONNECT_TO", default_value = MANAGER_SOCKET)]
    connect_to: DialUrl,
    /// What to ask for: kernel://SERVICE[@DOMAIN][/INTERFACE][?LABEL=VALUE&…], several separated by commas
    #[arg(long, env = "NSM_NETWORK_SERVICES", default_value = "", value_name = "URLS")]
    network_services: String,
    /// Make the wires, leave them to the mesh and end: for an init container. They stay as long as a token lives unless
    /// a client of the same name goes on with them
    #[arg(long, env = "NSM_INIT", conflicts_with = "once")]
    init: bool,
    /// Labels of every request, beside those of the URL, and nodeName, podName and clusterName from NODE_NAME, POD_NAME
    /// and CLUSTER_NAME
    #[arg(long, env = "NSM_LABELS", value_delimiter = ',', value_parser = label, value_name = "KEY:VALUE")]
    labels: Vec<(String, String)>,
    /// Services whose wires may have overlapping addresses, because their endpoints know of each other: groups of
    /// network-service URLs, `[URL,URL],[URL]`. Other wires are kept from overlapping
    #[arg(
        long,
        env = "NSM_AWARENESS_GROUPS",
        default_value = "",
        hide_default_value = true,
        value_name = "GROUPS"
    )]
    awareness_groups: AwarenessGroups,
    /// How long connecting to the manager may take
    #[arg(long, env = "NSM_DIAL_TIMEOUT", default_value = "5s", value_parser = duration)]
    dial_timeout: Duration,
    /// How long one try of a request may take
    #[arg(long, env = "NSM_REQUEST_TIMEOUT", default_value = "15s", value_parser = duration)]
    request_timeout: Duration,
    /// Probe each wire with pings, and ask for another endpoint when none is answered
    #[arg(long, env = "NSM_LIVENESS_CHECK_ENABLED", default_value_t = true, action = clap::ArgAction::Set)]
    liveness_check_enabled: bool,
    /// Pause between two probes of a wire
    #[arg(long, env = "NSM_LIVENESS_CHECK_INTERVAL", default_value = "200ms", value_parser = positive_duration)]
    liveness_check_interval: Duration,
    /// How long the endpoint has to answer one of the four pings of a probe (upstream: 1s)
    #[arg(long, env = "NSM_LIVENESS_CHECK_TIMEOUT", default_value = "500ms", value_parser = positive_duration)]
    liveness_check_timeout: Duration,
    /// Serve names with the DNS servers and search domains that wires bring. Nothing is listened on and no file is
    /// touched before a wire brings one
    #[arg(long, env = "NSM_LOCAL_DNS_SERVER_ENABLED", default_value_t = true, action = clap::ArgAction::Set)]
    local_dns_server_enabled: bool,
    /// Where names are served; programs only ask port 53
    #[arg(long, env = "NSM_LOCAL_DNS_SERVER_ADDRESS", default_value = "127.0.0.1:53")]
    local_dns_server_address: SocketAddr,
    /// The file that tells programs whom to ask; without this: /etc/resolv.conf if that is a mount of its own, as in
    /// containers. It is restored at the end, or when a client starts after one that was killed
    #[arg(long, env = "NSM_RESOLV_CONF", value_name = "FILE")]
    resolv_conf: Option<PathBuf>,
    /// Give up after the first try instead of trying until the wires are there
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    tokens: Tokens,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl Client {
    pub(crate) fn name(&self) -> String {
        self.name.clone()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        let urls = wanted(&self.network_services)?;
        let source = process.identity().await?;
        // Programs that run before the sidecar ask as if there were no mesh, as with upstream.
        let names = (self.local_dns_server_enabled && !self.init).then(|| {
            let listen_on = self.local_dns_server_address;
            Arc::new(Names::new(Options { listen_on, resolv_conf: self.resolv_conf }))
        });
        let config = ClientConfig {
            names: names.clone(),
            name: self.name,
            connect_to: (&self.connect_to).into(),
            dial_timeout: self.dial_timeout,
            request_timeout: self.request_timeout,
            // Where it runs, as upstream's clients say it; what it is told itself goes before.
            labels: node_labels().into_iter().chain(self.labels).collect(),
            awareness_groups: self.awareness_groups,
            takes_over: true,
            refreshes_together: false,
            liveness: self.liveness_check_enabled.then_some(Liveness {
                interval: self.liveness_check_interval,
                timeout: self.liveness_check_timeout,
            }),
        };
        let namespace = OwnNamespace::open().context("our own network namespace cannot be opened")?;
        let pool_config =
            PoolConfig { max_token_lifetime: self.tokens.max_token_lifetime, ..PoolConfig::default() };
        let pool = Pool::new(source, pool_config);
        let inspector = process.inspector();
        let url = self.connect_to.clone();
        inspector.add(Arc::new(Neighbour { pool: pool.clone(), role: "manager", url }));
        let metrics = Arc::new(Metrics::of(Arc::clone(inspector)));
        let client = SdkClient::measured(config, pool, namespace, metrics);
        // Outside of what a signal cuts off: whatever is up is closed on every way out.
        let (mut wires, mut pending) = (Vec::new(), None);
        let ask = async {
            for (index, url) in urls.iter().enumerate() {
                process.waits(&format!("asking for {}", url.service));
                let begin = std::time::Instant::now();
                let mut failures = Failures::new(&url.service, url.to_string(), begin);
                let wire = if self.once {
                    client.request(index, url).await.map_err(|error| {
                        failures.add(error);
                        anyhow!("{failures}")
                    })?
                } else {
                    let tell = |failures: &Failures| {
                        tell_failure(&process, failures);
                        pending = Some(failures.clone());
                    };
                    client.wire(index, url, tell).await
                };
                pending = None;
                tracing::info!(service = %url.service, connection = wire.id(), took = ?begin.elapsed(), "wire up");
                wires.push(wire);
            }
            process.ready();
            Ok(())
        };
        let asked = tokio::select! {
            asked = ask => Some(asked),
            () = shutdown.clone().wait() => None,
        };
        match asked {
            // They are the next client's, which tells the mesh of the same connections.
            Some(Ok(())) if self.init => return Ok(()),
            Some(Ok(())) => shutdown.wait().await,
            Some(Err(_)) | None => {}
        }
        close_all(wires).await;
        if let Some(names) = names {
            names.stop().await;
        }
        match asked {
            None if self.init => {
                let cause = pending.map_or_else(String::new, |failures| format!(": {failures}"));
                bail!("interrupted before all wires were up; those that were are closed{cause}")
            }
            asked => asked.unwrap_or(Ok(())),
        }
    }
}

/// What to ask for. Nothing would be a client that is ready without a wire (upstream's), which nobody means.
fn wanted(network_services: &str) -> Result<Vec<NsUrl>> {
    let urls = NsUrl::parse_list(network_services)?;
    if urls.is_empty() {
        bail!(
            "there is nothing to ask for: NSM_NETWORK_SERVICES (--network-services) is empty; expected MECHANISM://SERVICE[@DOMAIN][/INTERFACE][?LABEL=VALUE&…], for example kernel://my-service/nsm0?app=web; a pod that wants no wire needs no client"
        );
    }
    for url in &urls {
        for ignored in &url.ignored {
            tracing::warn!(%url, %ignored, "this part of the query is no label and is ignored: a semicolon, or an escape that cannot be decoded");
        }
    }
    Ok(urls)
}

async fn close_all(wires: Vec<Wire>) {
    for wire in wires {
        let id = wire.id().to_owned();
        if let Err(error) = wire.close().await {
            tracing::warn!(connection = %id, %error, "not closed in good order; it ends with its token");
        }
    }
}

/// The first failure is news; later ones only now and then, because the cause is usually the same.
fn tell_failure(process: &Process, failures: &Failures) {
    process.waits(&failures.to_string());
    if failures.tries().is_power_of_two() {
        tracing::warn!(tries = failures.tries(), "no wire yet; trying again: {failures}");
    }
}

/// Flags of everything that serves a network service.
#[derive(Debug, Args)]
pub(crate) struct Serving {
    /// Name in the path and in the registry; unique in the mesh
    #[arg(long, env = "NSM_NAME", default_value = "nse")]
    name: String,
    /// The manager of this node
    #[arg(long, env = "NSM_CONNECT_TO", default_value = MANAGER_SOCKET)]
    connect_to: DialUrl,
    /// Where to listen; without it: a socket in a fresh temporary directory
    #[arg(long, env = "NSM_LISTEN_ON")]
    listen_on: Option<ListenUrl>,
    /// Labels that services choose endpoints by
    #[arg(long, env = "NSM_LABELS", value_delimiter = ',', value_parser = label, value_name = "KEY:VALUE")]
    labels: Vec<(String, String)>,
    /// How long connecting to the manager may take
    #[arg(long, env = "NSM_DIAL_TIMEOUT", default_value = "5s", value_parser = duration)]
    dial_timeout: Duration,
    #[command(flatten)]
    measured: Measured,
    #[command(flatten)]
    tokens: Tokens,
    #[command(flatten)]
    guarding: Guarding,
}

impl Serving {
    async fn config(self, services: Vec<String>, process: &Process) -> Result<EndpointConfig> {
        Ok(EndpointConfig {
            name: self.name,
            connect_to: self.connect_to,
            listen_on: self.listen_on,
            services,
            labels: self.labels.into_iter().collect(),
            register_payload: None,
            idle_timeout: None,
            dial_timeout: self.dial_timeout,
            max_token_lifetime: self.tokens.max_token_lifetime,
            guard: self.guarding.guard()?,
            registry_answers: self.guarding.registry_answers()?,
            metrics: self.measured.start(process).await?,
        })
    }
}

/// Provides a service: addresses for its clients, and answers to their pings
///
/// Of each pair of addresses the endpoint takes the lower one, the client the next. Whatever listens in its network
/// namespace is reached through the wire.
///
/// Example: nsm endpoint --name gw --service-names vpn --cidr-prefix 172.16.1.0/24,2001:db8::/64 --routes 10.10.0.0/16
#[derive(Debug, Args)]
pub(crate) struct Endpoint {
    #[command(flatten)]
    serving: Serving,
    /// The services provided
    #[arg(long, env = "NSM_SERVICE_NAMES", value_delimiter = ',', default_value = "icmp-responder")]
    service_names: Vec<String>,
    /// Prefixes that wires get their addresses from: one pair of each comma-separated group, `[a,b]` is one group
    #[arg(long, env = "NSM_CIDR_PREFIX", default_value = "169.254.0.0/16")]
    cidr_prefix: PrefixGroups,
    /// Addresses and routes that a request brings: strict removes what this endpoint did not hand out; polite keeps
    /// everything, as upstream does, and trusts clients with the routing of this pod
    #[arg(long, env = "NSM_IPAM_POLICY", default_value = "strict", value_name = "strict|polite")]
    ipam_policy: IpamPolicy,
    /// Prefixes behind this endpoint: its clients get routes to them
    #[arg(long, env = "NSM_ROUTES", value_delimiter = ',', value_parser = prefix, value_name = "PREFIX")]
    routes: Vec<IpNet>,
    /// A file with policy routes of the clients (YAML, a list of {from, proto, srcport, dstport, routes}), read again
    /// whenever it changes: packets that match take these routes
    #[arg(long, env = "NSM_PBR_CONFIG_PATH", default_value = PolicyRoutes::FILE, value_name = "FILE")]
    pbr_config_path: PathBuf,
    /// DNS servers that clients shall ask, and for which domains: JSON,
    /// [{"dns_server_ips": ["172.16.1.2"], "search_domains": ["my.domain"]}]
    #[arg(long, env = "NSM_DNS_CONFIGS", default_value = "[]", value_name = "JSON")]
    dns_configs: DnsConfigs,
    /// End after so long without a wire, counted from the start too; 0: never
    #[arg(long, env = "NSM_IDLE_TIMEOUT", default_value = "0s", value_parser = duration)]
    idle_timeout: Duration,
    /// Payload of the services, where they are registered by us: IP or ETHERNET
    #[arg(long, env = "NSM_PAYLOAD", default_value = "ETHERNET", value_parser = ["ETHERNET", "IP"])]
    payload: String,
    /// Register the services too, not only the endpoint. An existing service of that name is replaced
    #[arg(long, env = "NSM_REGISTER_SERVICE", default_value_t = true, action = clap::ArgAction::Set)]
    register_service: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl Endpoint {
    pub(crate) fn name(&self) -> String {
        self.serving.name.clone()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        let mut config = self.serving.config(self.service_names, &process).await?;
        config.register_payload = self.register_service.then_some(self.payload);
        config.idle_timeout = Some(self.idle_timeout).filter(|time| !time.is_zero());
        let provides = Provides {
            prefixes: self.cidr_prefix,
            policy: self.ipam_policy,
            behind: self.routes,
            policy_routes: PolicyRoutes::open(self.pbr_config_path).context("NSM_PBR_CONFIG_PATH")?,
            dns: self.dns_configs,
        };
        let source = process.identity().await?;
        nsm_sdk::endpoint::serve_addresses(config, provides, source, || process.ready(), shutdown.wait())
            .await?;
        Ok(())
    }
}

/// A function in the middle: lets pass what its rules allow, remembers flows, drops the rest
///
/// It asks for the same service with its own labels, and joins both wires: with a bridge where they carry Ethernet
/// frames, with routes where they carry IP. The filter is in place before the wires are joined. It refuses to start without readable rules. They are read in the syntax of upstream's firewall (a map of rules
/// with `ispermit`, `proto`, …) or in the older one (`aclRules:` with `action=reflect,tcplowport=80,…`).
///
/// Example: nsm firewall --name fw --service-name secure-intranet-connectivity --labels app:firewall --acl-config-path rules.yaml
#[derive(Debug, Args)]
pub(crate) struct Firewall {
    #[command(flatten)]
    serving: Serving,
    /// The service provided; the function asks for the same service with its own labels
    #[arg(long, env = "NSM_SERVICE_NAME")]
    service_name: String,
    /// The rules
    #[arg(
        long,
        env = "NSM_ACL_CONFIG_PATH",
        default_value = "/etc/firewall/config.yaml",
        value_name = "FILE"
    )]
    acl_config_path: PathBuf,
    /// Let VLAN-tagged frames pass, whatever is in them (payload ETHERNET); they are dropped otherwise
    #[arg(long, env = "NSM_ALLOW_TAGGED")]
    allow_tagged: bool,
    /// Let frames that are neither IP nor ARP pass (PPPoE, MPLS, …); they are dropped otherwise
    #[arg(long, env = "NSM_ALLOW_UNKNOWN")]
    allow_unknown: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl Firewall {
    pub(crate) fn name(&self) -> String {
        self.serving.name.clone()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        // Without readable rules there is no firewall: said before anything is waited for.
        let rules = Rules::load(&self.acl_config_path)?;
        let unfiltered = Unfiltered { tagged: self.allow_tagged, unknown: self.allow_unknown };
        let config = self.serving.config(vec![self.service_name], &process).await?;
        let source = process.identity().await?;
        let role = Role::Firewall { rules, unfiltered };
        nsm_cnf::function::run(config, role, source, || process.ready(), shutdown.wait()).await?;
        Ok(())
    }
}

/// A function in the middle that lets everything pass
///
/// Example: nsm passthrough --name pass-1 --service-name secure-intranet-connectivity --labels app:passthrough-1
#[derive(Debug, Args)]
pub(crate) struct Passthrough {
    #[command(flatten)]
    serving: Serving,
    /// The service provided; the function asks for the same service with its own labels
    #[arg(long, env = "NSM_SERVICE_NAME")]
    service_name: String,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl Passthrough {
    pub(crate) fn name(&self) -> String {
        self.serving.name.clone()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        let config = self.serving.config(vec![self.service_name], &process).await?;
        nsm_cnf::function::run(
            config,
            Role::Passthrough,
            process.identity().await?,
            || process.ready(),
            shutdown.wait(),
        )
        .await?;
        Ok(())
    }
}

/// Hands out parts of one prefix to endpoints that share a network over several nodes
///
/// The prefix server of upstream's protocol (`ipam.IPAM/ManagePrefixes`), as upstream's cmd-ipam-vl3. A part belongs to
/// the stream that it was allocated on; when that ends it is kept for a minute for whoever names it, and with a state
/// file over a restart of this server, too.
///
/// Example: nsm ipam --listen-on tcp://10.0.0.1:5006 --prefix 172.16.0.0/16 --state-file /run/nsm/ipam.leases
#[derive(Debug, Args)]
pub(crate) struct Ipam {
    /// Where to listen: tcp://host:port or unix:///path, several separated by commas
    #[arg(long, env = "NSM_LISTEN_ON", default_value = "tcp://:5006", value_delimiter = ',')]
    listen_on: Vec<ListenUrl>,
    /// What is handed out in parts
    #[arg(long, env = "NSM_PREFIX", default_value = "169.254.0.0/16", value_parser = prefix)]
    prefix: IpNet,
    /// Mask length of the parts
    #[arg(long, env = "NSM_CLIENT_PREFIX_LEN", default_value_t = 24, value_name = "LENGTH")]
    client_prefix_len: u8,
    /// Where leases are kept for the next process, one prefix a line; without it nowhere
    #[arg(long, env = "NSM_STATE_FILE", value_name = "FILE")]
    state_file: Option<PathBuf>,
    #[command(flatten)]
    bounds: Bounds,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl Ipam {
    #[expect(clippy::unused_self, reason = "as the other roles")]
    pub(crate) fn name(&self) -> String {
        "ipam".into()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        let config = PrefixServerConfig {
            listen_on: self.listen_on,
            prefix: self.prefix,
            client_prefix_length: self.client_prefix_len,
            state_file: self.state_file,
            guard: self.bounds.guard(Arc::default()),
        };
        config.check()?;
        let server = PrefixServer::bind(config, process.identity().await?).await?;
        process.ready();
        server.serve(shutdown.wait()).await;
        Ok(())
    }
}
