//! The role: its configuration, its chain, its serving, and what it does beside requests.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    future::Future,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;
use nsm_api::{
    mechanism::VXLAN_PORT,
    pb::registry::{NetworkServiceEndpoint, NetworkServiceLabels},
    planted,
};
use nsm_identity::{Source, SpiffeId, policy::Policies};
use nsm_kernel::{
    Nsid, Uplink,
    netns::Namespace,
    watch::{Event, Watch},
};
use nsm_mesh::{
    Chain, Connections, Error, Reason, Result,
    auth::{Authorize, OnlyFrom, OwnNamespace},
    dial::Dial,
    error::explain,
    inspect::Neighbour,
    metrics::Metrics,
    monitor::{Hub, Monitor},
};
use nsm_registry::{Client, ClientConfig, Following, LookUp};
use nsm_transport::{DialUrl, Guard, ListenUrl, Pool, PoolConfig, Server};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    cross_connect::CrossConnect,
    discover::Discover,
    machine::{Machine, Node},
    tell::{Counted, Told},
    tunnel::TunnelEnd,
    wires::{Mending, Wires},
};

/// How long to wait for the manager at start.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often wires that no connection claims are looked at.
const SWEEP: Duration = Duration::from_secs(1);
/// How often all wires are looked at: an event of the kernel may be lost, or come before what it is about is known.
const LOOK: Duration = Duration::from_secs(60);
/// Events of the kernel that wait, and that are looked at together.
const EVENTS: usize = 1024;

/// What a forwarder is told from outside.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name in paths and in the registry.
    pub name: String,
    /// This node's address for tunnels, or a prefix that it is in; `None`: that of the default route's device.
    pub tunnel_ip: Option<IpNet>,
    /// UDP port of tunnels; 0: 4789.
    pub vxlan_port: u16,
    /// Where plans are kept.
    pub state_dir: PathBuf,
    /// What services choose forwarders by.
    pub labels: BTreeMap<String, String>,
    /// The service that forwarders register under.
    pub service: String,
    /// Who may answer with namespaces that are not its own.
    pub namespace_delegates: BTreeSet<SpiffeId>,
    /// Types of mechanisms that next hops are offered before others.
    pub mechanism_priority: Vec<String>,
    /// How long connecting to a next hop may take.
    pub dial_timeout: Duration,
    /// How long our tokens live.
    pub max_token_lifetime: Duration,
    /// What is checked of callers, and what they may use.
    pub guard: Guard,
    /// What is checked of a registry's answers.
    pub registry_answers: Arc<Policies>,
    /// Where we count.
    pub metrics: Arc<Metrics>,
}

/// A forwarder that has looked at its kernel and its state directory, and could serve.
#[derive(Debug)]
pub struct Forwarder {
    config: Config,
    wires: Arc<Wires>,
    tunnel: TunnelEnd,
    events: mpsc::Receiver<Event>,
}

/// The chain of `nsm forwarder`.
#[must_use]
pub fn chain(
    authorize: Authorize,
    only_from: OnlyFrom,
    hub: Arc<Hub>,
    discover: Discover,
    cross_connect: CrossConnect,
    dial: Dial,
) -> Chain {
    nsm_mesh::chain![
        authorize,                          // who asks, before anything is made
        only_from,                          // the manager, which has looked at the workload
        Monitor { hub, terminates: false }, // what becomes of each connection
        discover,                           // the endpoint, or the manager of its node
        cross_connect,                      // on the way back: the wire
        dial,                               // the next hop, on this node or another
    ]
}

impl Forwarder {
    /// Finds the node's uplink and the wires of an earlier process.
    ///
    /// # Errors
    /// A missing capability, an unusable state directory, no address for tunnels.
    pub fn prepare(config: Config) -> Result<Self> {
        let kernel_says = |e: nsm_kernel::Error| {
            Error::internal(explain(&e)).hint("the forwarder needs CAP_NET_ADMIN and CAP_SYS_ADMIN")
        };
        let node = Namespace::current().map_err(kernel_says)?;
        let watch = Watch::open(&node).map_err(kernel_says)?;
        let node = Arc::new(Node::new(node).map_err(kernel_says)?);
        let wires = Wires::open(Arc::clone(&node) as Arc<dyn Machine>, &config.state_dir)?;
        let within = config.tunnel_ip.map_or_else(|| default_address().map(IpNet::from), Ok)?;
        let uplink = node.kernel().uplink(within).map_err(kernel_says)?.ok_or_else(|| {
            Error::invalid(format!("no device of this node has a tunnel address in {within}"))
                .hint("set NSM_TUNNEL_IP to an address of the node's uplink, or to a prefix that it is in")
        })?;
        Ok(Self::with(config, wires, &uplink, watch_events(watch)))
    }

    /// On that machine, with that uplink, which tells its events.
    ///
    /// # Errors
    /// An unusable state directory.
    pub fn on(
        config: Config,
        machine: Arc<dyn Machine>,
        uplink: &Uplink,
        events: mpsc::Receiver<Event>,
    ) -> Result<Self> {
        let wires = Wires::open(machine, &config.state_dir)?;
        Ok(Self::with(config, wires, uplink, events))
    }

    fn with(config: Config, wires: Wires, uplink: &Uplink, events: mpsc::Receiver<Event>) -> Self {
        let port = if config.vxlan_port == 0 { VXLAN_PORT } else { config.vxlan_port };
        let tunnel = TunnelEnd::over(uplink.ip, port, uplink.mtu);
        tracing::info!(%tunnel, device = %uplink.ifname, "tunnels end here");
        Self { config, wires: Arc::new(wires), tunnel, events }
    }

    /// The wires of this node.
    #[must_use]
    pub fn wires(&self) -> &Arc<Wires> {
        &self.wires
    }

    /// Serves until `shutdown` is done, for the manager at `connect_to`. Wires stay: they outlive this process.
    ///
    /// # Errors
    /// A socket that cannot be bound, or a manager that refuses the registration.
    pub async fn serve(
        self,
        connect_to: DialUrl,
        listen_on: ListenUrl,
        source: Source,
        ready: impl FnOnce(),
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<()> {
        let pool_config = PoolConfig {
            max_token_lifetime: self.config.max_token_lifetime,
            policies: self.config.registry_answers.clone(),
            ..PoolConfig::default()
        };
        let guard = self.config.guard.clone();
        self.config.metrics.register(|registry| guard.refusals.register(registry));
        let pool = Pool::new(source.clone(), pool_config);
        let client_config =
            ClientConfig { dial_timeout: self.config.dial_timeout, ..ClientConfig::default() };
        let manager = Client::new(pool.clone(), connect_to.clone(), client_config);
        let registration = self.registration(&listen_on.to_string());
        let wires = Arc::clone(&self.wires);
        let neighbour = Neighbour { pool: pool.clone(), role: "manager", url: connect_to.clone() };
        self.config.metrics.inspector().add(Arc::new(neighbour));
        let directory = Arc::new(Following::new(manager.clone()));
        let running = self.start(OnlyFrom::Peer(pool.clone(), connect_to), directory, pool);

        let server = Server::bind(source, std::slice::from_ref(&listen_on))
            .await
            .map_err(|e| Error::unavailable(explain(&e)))?
            .guarded(&guard);
        let mut routes = tonic::service::RoutesBuilder::default();
        let (connections, hub) = (Arc::clone(&running.connections), Arc::clone(&running.hub));
        nsm_mesh::server::add(&mut routes, connections, Arc::clone(&hub), Arc::default());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = server.serve(routes.routes(), &nsm_mesh::server::SERVICES, async {
            let _ = stopped.await;
        });

        let beside = async {
            let registration = manager
                .register_endpoint(registration, PATIENCE)
                .await
                .map_err(|e| Error::unavailable(format!("the manager did not take us: {}", explain(&e))))?;
            ready();
            running.look_after(shutdown).await;
            if let Err(error) = registration.unregister().await {
                tracing::warn!(error = %explain(&error), "not unregistered; the registration expires");
            }
            hub.end_watches();
            drop(stop);
            Ok(())
        };
        let ((), result) = tokio::join!(serving, beside);
        // Deletions under way come to their end; standing wires stay.
        wires.flush().await;
        result
    }

    /// Starts without listening anywhere: for a manager in the same process.
    pub fn start(self, only_from: OnlyFrom, directory: Arc<dyn LookUp>, pool: Pool) -> Running {
        let Self { config, wires, tunnel, events } = self;
        let hub = Arc::new(Hub::guarded(&config.guard));
        let dial = Dial::new(pool, &config.name, Arc::clone(&hub), config.dial_timeout)
            .guarding_namespaces(OwnNamespace { allowed: Arc::new(config.namespace_delegates) });
        let chain = chain(
            Authorize { max_token_lifetime: config.max_token_lifetime, policies: config.guard.policies },
            only_from,
            Arc::clone(&hub),
            Discover::new(directory, &dial),
            CrossConnect { wires: Arc::clone(&wires), tunnel, priority: config.mechanism_priority },
            dial,
        );
        let counted = Counted { wires: Arc::clone(&wires), hub: Arc::clone(&hub) };
        config.metrics.register_upstreams(|registry| registry.register_collector(Box::new(counted)));
        config.metrics.inspector().add(Arc::new(Told { wires: Arc::clone(&wires), tunnel }));
        let connections = Connections::serving(&config.name, chain, config.metrics);
        Running { connections, hub, wires, events }
    }

    /// What services choose this forwarder by.
    #[must_use]
    pub fn registration(&self, url: &str) -> NetworkServiceEndpoint {
        let Config { name, service, labels, .. } = &self.config;
        NetworkServiceEndpoint {
            name: name.clone(),
            network_service_names: vec![service.clone()],
            network_service_labels: BTreeMap::from([(
                service.clone(),
                NetworkServiceLabels { unknown: None, labels: labels.clone() },
            )]),
            url: url.into(),
            ..NetworkServiceEndpoint::default()
        }
    }
}

/// A forwarder that takes requests.
#[derive(Debug)]
pub struct Running {
    /// Its connections.
    pub connections: Arc<Connections>,
    /// What becomes of them.
    pub hub: Arc<Hub>,
    wires: Arc<Wires>,
    events: mpsc::Receiver<Event>,
}

impl Running {
    /// Removes what nobody wants, until `shutdown` is done: wires whose pod is gone, at once; wires of an earlier
    /// process that no connection has claimed, when their token has expired. Returns the wires, to be
    /// [flushed](Wires::flush) when nobody asks any more.
    pub async fn look_after(self, shutdown: impl Future<Output = ()> + Send) -> Arc<Wires> {
        tokio::select! {
            () = shutdown => {}
            () = look_after(Arc::clone(&self.wires), self.connections, self.hub, self.events) => {}
        }
        self.wires
    }
}

/// The address that the default route leaves from: connecting a UDP socket looks it up and sends nothing.
fn default_address() -> Result<IpAddr> {
    // TEST-NET-3 (RFC 5737): only the route towards it is looked up.
    let look = || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        socket.connect("203.0.113.1:9")?;
        socket.local_addr()
    };
    look().map(|address| address.ip()).map_err(|e| {
        Error::invalid(format!("this node has no default route to take the tunnel address from: {e}"))
            .hint("set NSM_TUNNEL_IP")
    })
}

async fn look_after(
    wires: Arc<Wires>,
    connections: Arc<Connections>,
    hub: Arc<Hub>,
    mut events: mpsc::Receiver<Event>,
) {
    let mut sweep = tokio::time::interval(SWEEP);
    let mut look = tokio::time::interval_at(Instant::now() + LOOK, LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Nobody told of the pods that died while no process of ours was there.
    end_broken(&wires, &connections, None, "it was not in the kernel any more at our start").await;
    let (mut told, mut reads) = (Vec::new(), true);
    loop {
        tokio::select! {
            _ = sweep.tick() => wires.sweep(),
            _ = look.tick() => look_at_all(&wires, &connections, &hub).await,
            more = events.recv_many(&mut told, EVENTS), if reads => {
                // Whoever reads them from the kernel has said why not.
                reads = more > 0;
                // With their namespaces, or removed by us, or by somebody else.
                let mut links = HashSet::new();
                for event in told.drain(..) {
                    match event {
                        Event::NamespaceGone { nsid } => {
                            let why = "the network namespace of its pod is gone";
                            end_broken(&wires, &connections, Some(nsid), why).await;
                        }
                        Event::Lost => look_at_all(&wires, &connections, &hub).await,
                        Event::LinkGone { nsid, ifname, .. } => drop(links.insert((nsid, ifname))),
                    }
                }
                mend(wires.cut(&links).await, &connections, &hub);
            },
        }
    }
}

/// Mends what can be mended of all wires that a connection has, and ends the others.
pub(crate) async fn look_at_all(wires: &Arc<Wires>, connections: &Arc<Connections>, hub: &Arc<Hub>) {
    let looked = Instant::now();
    let broken = wires.broken(None).await;
    mend(wires.mendable(broken.clone()).await, connections, hub);
    let beyond = broken.into_iter().filter(|id| !wires.is_mended(id)).collect();
    end(beyond, wires, connections, looked, "it is not in the kernel any more");
}

/// Ends the connections whose wire cannot be used any more; such a wire without a connection is removed and counted.
async fn end_broken(
    wires: &Arc<Wires>,
    connections: &Arc<Connections>,
    nsid: Option<Nsid>,
    why: &'static str,
) {
    let looked = Instant::now();
    end(wires.broken(nsid).await, wires, connections, looked, why);
}

/// Ends those of these connections that have not been made anew since.
fn end(
    broken: Vec<String>,
    wires: &Arc<Wires>,
    connections: &Arc<Connections>,
    looked: Instant,
    why: &'static str,
) {
    if let [first, others @ ..] = &broken[..] {
        tracing::info!(connection = %first, others = others.len(), why, "wires end");
    }
    for id in broken {
        let (wires, connections) = (Arc::clone(wires), Arc::clone(connections));
        // Closing may take as long as a neighbour lets it; events go on meanwhile.
        tokio::spawn(async move {
            // Its client may have another endpoint by now.
            let is_anew = || wires.is_whole_since(&id, looked);
            connections.drop_connection_unless(&id, Reason::Gone, is_anew).await;
            wires.orphan(&id, why);
            connections.unless_known(&id, || wires.nobodys(&id, why));
        });
    }
}

/// Makes wires again of which somebody has deleted an interface.
fn mend(cut: Vec<Mending>, connections: &Arc<Connections>, hub: &Arc<Hub>) {
    for mending in cut.into_iter().filter(|_| !planted::is("nobody mends a wire")) {
        let (connections, hub) = (Arc::clone(connections), Arc::clone(hub));
        tokio::spawn(async move {
            tokio::time::sleep_until(mending.at()).await;
            let id = mending.id().to_owned();
            match connections.between_requests(&id, mending.mend()).await {
                Some(Ok(true)) => {
                    tracing::info!(connection = %id, "an interface of its wire was deleted; made again");
                }
                Some(Ok(false)) => {}
                Some(Err(why)) => {
                    // A request brings the descriptors of its ends, and whoever asks hears why it cannot be made.
                    tracing::warn!(connection = %id, ?why, "an interface of its wire was deleted, and cannot be made again");
                    hub.ask_again(&id);
                }
                None => connections.unless_known(&id, || mending.nobodys()),
            }
        });
    }
}

/// The kernel's events, read by a thread that does nothing else. It ends with the receiver.
fn watch_events(mut watch: Watch) -> mpsc::Receiver<Event> {
    let (tell, events) = mpsc::channel(EVENTS);
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    let reader = move || {
        while !flag.load(Ordering::Relaxed) && !tell.is_closed() {
            match watch.wait(Some(Duration::from_millis(500))) {
                Ok(seen) => {
                    for event in seen {
                        // A full queue waits: the kernel's own buffer holds more, and tells when it overflows.
                        if tell.blocking_send(event).is_err() {
                            return;
                        }
                    }
                }
                Err(error) => {
                    tracing::error!(error = %explain(&error), "the kernel's events cannot be read any more");
                    return;
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("kernel-events".into()).spawn(reader) {
        tracing::error!(%error, "no thread for the kernel's events");
        ended.store(true, Ordering::Relaxed);
    }
    events
}
