//! A mesh: its nodes, the programs on them, and how each is started, stopped and killed.

use std::{
    collections::BTreeMap,
    fs::File,
    future::Future,
    os::fd::OwnedFd,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow};
use futures::FutureExt as _;
use nsm_api::{
    nsurl::NsUrl,
    pb::registry::{NetworkService, NetworkServiceEndpoint},
};
use nsm_forwarder::wires::Wires;
use nsm_identity::{
    Identity, Source, SpiffeId,
    ca::{Authority, workload::Renewal},
};
use nsm_kernel::{Uplink, netns::NsId};
use nsm_manager::ExcludedPrefixes;
use nsm_mesh::{inspect::Inspector, metrics::Metrics, monitor::Hub};
use nsm_registry::Cluster;
use nsm_sdk::{
    client::{Client, ClientConfig, Wire},
    endpoint::{self, EndpointConfig, Provides},
    ipam::IpamPolicy,
    own_end::OwnNamespace,
};
use nsm_transport::{ListenUrl, Pool, PoolConfig, sim};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout_at},
};

use crate::{
    chance::Chance,
    kernel::Kernels,
    network::{Net, Proc, Seen},
    trace::Trace,
};

/// Where everybody's identity is from.
const DOMAIN: &str = "sim.test";
const REGISTRY: &str = "registry:5002";
/// The service that every endpoint provides.
pub(crate) const SERVICE: &str = "web";
/// How long one try of a request may take.
pub(crate) const REQUEST: Duration = Duration::from_secs(15);
/// How many pairs of addresses an endpoint has.
pub(crate) const CAPACITY: usize = 8;
/// Namespaces that there are for pods, those that take a lost one's place included.
const NAMESPACES: usize = 96;

/// The life of certificates that expire when they are not renewed for a while.
pub(crate) const SHORT: Duration = Duration::from_secs(40);

/// How large a mesh is, and how long things live in it.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) nodes: usize,
    pub(crate) endpoints: usize,
    pub(crate) clients: usize,
    /// Of tokens.
    pub(crate) lifetime: Duration,
    /// Of certificates.
    pub(crate) certificates: Duration,
}

impl Shape {
    pub(crate) fn draw(chance: &mut Chance) -> Self {
        let secs = Duration::from_secs;
        Self {
            nodes: 1 + chance.below(3),
            endpoints: 1 + chance.below(3),
            clients: 1 + chance.below(5),
            lifetime: [secs(30), secs(60), secs(120)][chance.below(3)],
            certificates: [SHORT, secs(120), secs(300), secs(3600)][chance.below(4)],
        }
    }
}

/// What a program is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum What {
    Registry,
    Manager,
    Forwarder,
    Endpoint {
        /// The third byte of its addresses.
        subnet: u8,
    },
    Client {
        /// Whether it asks until it has a wire, or one request after the other.
        patient: bool,
        service: String,
    },
}

/// A program, running or not.
pub(crate) struct Slot {
    pub(crate) what: What,
    pub(crate) name: String,
    pub(crate) node: usize,
    pub(crate) ns: NsId,
    netns: Arc<OwnedFd>,
    /// How often it was started.
    lives: u32,
    /// Whether it shall run.
    pub(crate) wanted: bool,
    pub(crate) running: Option<Running>,
    /// The wire of a client.
    pub(crate) wire: Arc<Mutex<Option<Wire>>>,
    /// Where a forwarder keeps its plans.
    state: PathBuf,
    /// What a forwarder that runs has made.
    made: Arc<Mutex<Weak<Wires>>>,
}

/// What a running program is to the simulation.
pub(crate) struct Running {
    pub(crate) process: Arc<Proc>,
    pub(crate) metrics: Arc<Metrics>,
    task: JoinHandle<()>,
    stop: Option<oneshot::Sender<()>>,
    renewing: JoinHandle<()>,
}

pub(crate) struct World {
    pub(crate) shape: Shape,
    pub(crate) trace: Trace,
    pub(crate) net: Arc<Net>,
    pub(crate) kernels: Arc<Kernels>,
    pub(crate) slots: Vec<Slot>,
    authority: Arc<Authority>,
    /// Whether identities are given out.
    pub(crate) issuing: watch::Sender<bool>,
    /// How many certificates have expired because no other was given out in their place.
    pub(crate) certificates_expired: Arc<AtomicU64>,
    dir: TempDir,
    /// Files that stand for network namespaces.
    namespaces: Vec<(NsId, PathBuf)>,
}

impl World {
    pub(crate) fn new(shape: Shape, seed: u64, trace: Trace) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("nsm-sim-").tempdir().context("a directory")?;
        let mut namespaces = Vec::new();
        for number in 0..NAMESPACES {
            let path = dir.path().join(format!("netns{number}"));
            let file = File::create(&path).context("a file")?.metadata().context("a file")?;
            namespaces.push((NsId { dev: file.dev(), ino: file.ino() }, path));
        }
        // Numbers differ from run to run; their order shall not. The last is taken first.
        namespaces.sort_by(|a, b| b.cmp(a));
        let authority = Authority::new(DOMAIN.parse().map_err(|_| anyhow!("{DOMAIN}"))?, SystemTime::now())?;
        let net = Net::new(trace.clone(), Chance::new(seed, 2));
        net.host(REGISTRY.to_owned(), 0);
        let kernels = Kernels::new(trace.clone(), Chance::new(seed, 3));
        let mut world = Self {
            trace,
            net,
            kernels,
            slots: Vec::new(),
            authority: Arc::new(authority),
            issuing: watch::Sender::new(true),
            certificates_expired: Arc::default(),
            dir,
            namespaces,
            shape,
        };
        let Shape { nodes, endpoints, clients, .. } = world.shape;
        world.add(What::Registry, "registry".into(), 0)?;
        for node in 0..nodes {
            world.net.host(format!("node{node}:5001"), node);
            world.add(What::Manager, format!("manager{node}"), node)?;
            world.add(What::Forwarder, format!("forwarder{node}"), node)?;
        }
        let mut chance = Chance::new(seed, 4);
        for number in 0..endpoints {
            let what = What::Endpoint { subnet: number as u8 + 1 };
            world.add(what, format!("endpoint{number}"), chance.below(nodes))?;
        }
        for number in 0..clients {
            let what = What::Client { patient: chance.happens(0.5), service: SERVICE.to_owned() };
            world.add(what, format!("client{number}"), chance.below(nodes))?;
        }
        Ok(world)
    }

    /// A program that is not started yet.
    pub(crate) fn add(&mut self, what: What, name: String, node: usize) -> Result<usize> {
        let (ns, netns) = self.namespace(node)?;
        let state = self.dir.path().join(format!("{name}-0"));
        let slot = Slot {
            what,
            name,
            node,
            ns,
            netns,
            lives: 0,
            wanted: true,
            running: None,
            wire: Arc::default(),
            state,
            made: Arc::default(),
        };
        self.slots.push(slot);
        Ok(self.slots.len() - 1)
    }

    fn namespace(&mut self, node: usize) -> Result<(NsId, Arc<OwnedFd>)> {
        use rustix::fs::{Mode, OFlags, open};
        let (id, path) = self.namespaces.pop().context("no namespace is left")?;
        self.kernels.add_namespace(id, node);
        let fd = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).context("a namespace")?;
        Ok((id, Arc::new(fd)))
    }

    pub(crate) fn is_running(&self, slot: usize) -> bool {
        self.slots[slot].running.is_some()
    }

    /// How many connections of a program have expired since it was started.
    pub(crate) fn expired(&self, slot: usize) -> u64 {
        let Some(running) = &self.slots[slot].running else { return 0 };
        let text = running.metrics.text();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("nsm_connections_ended_total{reason=\"expired\"} "));
        line.and_then(|count| count.parse().ok()).unwrap_or_default()
    }

    /// The slots that hold a kind of program.
    pub(crate) fn all(&self, kind: impl Fn(&What) -> bool) -> Vec<usize> {
        (0..self.slots.len()).filter(|slot| kind(&self.slots[*slot].what)).collect()
    }

    /// Starts the programs that shall run and do not: what a node's own supervisor does.
    pub(crate) fn supervise(&mut self) -> Result<()> {
        for slot in 0..self.slots.len() {
            let ended = self.slots[slot].running.as_ref().is_some_and(|running| running.task.is_finished());
            if ended {
                self.trace.note(format_args!("{} has ended by itself", self.slots[slot].name));
                self.kill(slot);
            }
            if self.slots[slot].wanted && self.slots[slot].running.is_none() {
                self.start(slot)?;
            }
        }
        Ok(())
    }

    /// The program ends without a word.
    pub(crate) fn kill(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        let Some(running) = slot.running.take() else { return };
        self.trace.note(format_args!("kill {}", slot.name));
        running.process.kill();
        running.task.abort();
        running.renewing.abort();
        drop(slot.wire.lock().take());
    }

    /// The program is asked to end, and does so in its time.
    pub(crate) fn stop(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        slot.wanted = false;
        if let Some(stop) = slot.running.as_mut().and_then(|running| running.stop.take()) {
            self.trace.note(format_args!("stop {}", slot.name));
            let _ = stop.send(());
        }
    }

    /// Its pod is gone, and another one takes its place.
    pub(crate) fn replace(&mut self, slot: usize) -> Result<()> {
        self.kill(slot);
        self.trace.note(format_args!("pod of {} is gone", self.slots[slot].name));
        self.kernels.end_namespace(self.slots[slot].ns);
        let (ns, netns) = self.namespace(self.slots[slot].node)?;
        (self.slots[slot].ns, self.slots[slot].netns) = (ns, netns);
        Ok(())
    }

    /// Starts a program.
    pub(crate) fn start(&mut self, number: usize) -> Result<()> {
        let manager = self.dir.path().join(format!("manager{}.sock", self.slots[number].node));
        let id: SpiffeId = format!("spiffe://{DOMAIN}/{}", self.slots[number].name).parse()?;
        let (source, renewing) = identity(self, id);
        let slot = &mut self.slots[number];
        slot.lives += 1;
        let process = self.net.process(&slot.name, slot.node, Arc::clone(&slot.netns));
        let inspector = Arc::<Inspector>::default();
        inspector.follow(Box::new(Seen(Arc::downgrade(&process))));
        let metrics = Arc::new(Metrics::of(inspector));
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            let _ = stopped.await;
        };
        let stopped = stopped.shared();
        let waits = stopped.clone();
        self.trace.note(format_args!("start {} on node {}", slot.name, slot.node));
        let here = Arc::clone(&process) as Arc<dyn sim::Process>;
        let lifetime = self.shape.lifetime;
        let unix = |path: PathBuf| ListenUrl::Unix(path);
        let own = self.dir.path().join(format!("{}.{}.sock", slot.name, slot.lives));
        let connect_to = ListenUrl::Unix(manager.clone()).to_string().parse()?;
        let task = match slot.what.clone() {
            What::Registry => {
                let names = (0..self.shape.endpoints).map(|number| only(&format!("endpoint{number}")));
                let service = |name| NetworkService { name, payload: "IP".to_owned(), ..Default::default() };
                let services = names.chain([SERVICE.to_owned()]).map(service).collect();
                let config = nsm_registry::Config {
                    listen_on: vec![format!("tcp://{REGISTRY}").parse()?],
                    services,
                    max_token_lifetime: lifetime,
                    ..nsm_registry::Config::default()
                };
                spawn(here, source, waits, move |source| async move {
                    let registry = nsm_registry::Registry::bind(config, source).await?;
                    registry.serve(stopped).await;
                    Ok(())
                })
            }
            What::Manager => {
                let forwarder = format!("spiffe://{DOMAIN}/forwarder{}", slot.node).parse()?;
                let config = nsm_manager::Config {
                    workloads: None,
                    name: slot.name.clone(),
                    listen_on: vec![unix(manager), format!("tcp://node{}:5001", slot.node).parse()?],
                    registry: Cluster::At(format!("tcp://{REGISTRY}").parse()?),
                    dial_timeout: Duration::from_millis(750),
                    forwarder_service: "forwarder".to_owned(),
                    forwarder_ids: [forwarder].into(),
                    namespace_delegates: Default::default(),
                    monitor_readers: Default::default(),
                    excluded_prefixes: ExcludedPrefixes::default(),
                    max_token_lifetime: lifetime,
                    guard: Default::default(),
                    registrations: Default::default(),
                    registry_answers: Default::default(),
                    metrics: Arc::clone(&metrics),
                };
                spawn(here, source, waits, move |source| async move {
                    let manager = nsm_manager::Manager::bind(config, source).await?;
                    manager.serve(None, || {}, stopped).await;
                    Ok(())
                })
            }
            What::Forwarder => {
                // What the process before is still writing shall not appear here.
                let state = self.dir.path().join(format!("{}-{}", slot.name, slot.lives));
                copy(&slot.state, &state)?;
                slot.state.clone_from(&state);
                let (kernels, process) = (Arc::clone(&self.kernels), Arc::clone(&process));
                let ip = std::net::IpAddr::from([10, 0, 0, slot.node as u8 + 1]);
                let uplink = Uplink { ip, ifname: "eth0".to_owned(), ifindex: 2, mtu: 1500 };
                let config = nsm_forwarder::Config {
                    name: slot.name.clone(),
                    tunnel_ip: None,
                    vxlan_port: 0,
                    state_dir: state,
                    labels: BTreeMap::from([("p2p".to_owned(), "true".to_owned())]),
                    service: "forwarder".to_owned(),
                    namespace_delegates: Default::default(),
                    mechanism_priority: Vec::new(),
                    dial_timeout: Duration::from_millis(750),
                    max_token_lifetime: lifetime,
                    guard: Default::default(),
                    registry_answers: Default::default(),
                    metrics: Arc::clone(&metrics),
                };
                let made = Arc::clone(&slot.made);
                spawn(here, source, waits, move |source| async move {
                    let (machine, events) = kernels.machine(&process);
                    let forwarder = nsm_forwarder::Forwarder::on(config, machine, &uplink, events)?;
                    *made.lock() = Arc::downgrade(forwarder.wires());
                    forwarder.serve(connect_to, unix(own), source, || {}, stopped).await?;
                    Ok(())
                })
            }
            What::Endpoint { subnet } => {
                let config = EndpointConfig {
                    name: slot.name.clone(),
                    connect_to,
                    listen_on: Some(unix(own)),
                    services: vec![SERVICE.to_owned(), only(&slot.name)],
                    labels: BTreeMap::new(),
                    register_payload: None,
                    idle_timeout: None,
                    dial_timeout: Duration::from_secs(5),
                    max_token_lifetime: lifetime,
                    guard: Default::default(),
                    registry_answers: Default::default(),
                    metrics: Arc::clone(&metrics),
                };
                let provides = Provides {
                    prefixes: format!("172.16.{subnet}.0/28").parse()?,
                    policy: IpamPolicy::default(),
                    behind: Vec::new(),
                    policy_routes: Default::default(),
                    dns: Default::default(),
                };
                let namespace = own_namespace(&slot.netns)?;
                spawn(here, source, waits, move |source| async move {
                    let hub = Arc::new(Hub::guarded(&config.guard));
                    let chain = endpoint::endpoint(config.authorize(), Arc::clone(&hub), provides, namespace);
                    let pool = config.pool(source.clone());
                    endpoint::serve(config, chain, hub, source, pool, || {}, stopped).await?;
                    Ok(())
                })
            }
            What::Client { patient, service } => {
                let config = ClientConfig {
                    name: slot.name.clone(),
                    connect_to: connect_to.into(),
                    dial_timeout: Duration::from_secs(5),
                    request_timeout: REQUEST,
                    labels: BTreeMap::new(),
                    awareness_groups: Default::default(),
                    takes_over: true,
                    // There are no packets to probe with.
                    liveness: None,
                    refreshes_together: false,
                    names: None,
                };
                let url: NsUrl = format!("kernel://{service}").parse().map_err(|e| anyhow!("{e:?}"))?;
                let pool = PoolConfig { max_token_lifetime: lifetime, ..PoolConfig::default() };
                let namespace = own_namespace(&slot.netns)?;
                let (wire, metrics) = (Arc::clone(&slot.wire), Arc::clone(&metrics));
                let (trace, name) = (self.trace.clone(), slot.name.clone());
                spawn(here, source, waits, move |source| async move {
                    let client = Client::measured(config, Pool::new(source, pool), namespace, metrics);
                    let asking = ask(&client, &url, patient, &trace, &name);
                    let mut stopped = std::pin::pin!(stopped);
                    tokio::select! {
                        biased;
                        () = &mut stopped => return Ok(()),
                        found = asking => {
                            let endpoint = found.connection().network_service_endpoint_name;
                            trace.note(format_args!("{name} has a wire to {endpoint}"));
                            *wire.lock() = Some(found);
                        }
                    }
                    stopped.await;
                    let taken = wire.lock().take();
                    if let Some(wire) = taken
                        && let Err(error) = wire.close().await
                    {
                        trace.note(format_args!("{name} closes in part: {}", error.code));
                    }
                    Ok(())
                })
            }
        };
        let stop = Some(stop);
        slot.running = Some(Running { process, metrics, task, stop, renewing });
        Ok(())
    }

    /// The VNIs that forwarders have not given back.
    pub(crate) fn vnis(&self) -> Vec<String> {
        let mut left = Vec::new();
        for slot in self.slots.iter().filter(|slot| slot.what == What::Forwarder) {
            let vnis = slot.made.lock().upgrade().map(|wires| wires.vnis()).unwrap_or_default();
            left.extend(vnis.into_iter().map(|vni| format!("{vni} at {}", slot.name)));
        }
        left
    }

    /// Asks the registry which endpoints there are, as a program of node 0 does.
    pub(crate) async fn registered(&self) -> Result<Vec<String>> {
        let slot = self.slots.iter().find(|slot| slot.what == What::Registry).context("no registry")?;
        let process = self.net.process("asker", slot.node, Arc::clone(&slot.netns));
        let id: SpiffeId = format!("spiffe://{DOMAIN}/asker").parse()?;
        let (source, renewing) = identity(self, id);
        let source = source.await?;
        let url = format!("tcp://{REGISTRY}").parse()?;
        let asked = tokio::spawn(sim::HERE.scope(process as Arc<dyn sim::Process>, async move {
            let pool = Pool::new(source, PoolConfig::default());
            let client = nsm_registry::Client::new(pool, url, nsm_registry::ClientConfig::default());
            client.find_endpoints(NetworkServiceEndpoint::default()).await
        }));
        let found = asked.await?;
        renewing.abort();
        Ok(found?.into_iter().map(|endpoint| endpoint.nse.name).collect())
    }

    /// What is left in the state directories of forwarders.
    pub(crate) fn plans(&self) -> Vec<String> {
        let mut plans = Vec::new();
        for slot in self.slots.iter().filter(|slot| slot.what == What::Forwarder) {
            let files = std::fs::read_dir(&slot.state).into_iter().flatten().flatten();
            plans.extend(files.map(|file| format!("{} at {}", file.file_name().display(), slot.name)));
        }
        plans
    }
}

/// The service that only this endpoint provides.
pub(crate) fn only(endpoint: &str) -> String {
    format!("only-{endpoint}")
}

/// Asks until there is a wire.
async fn ask(client: &Arc<Client>, url: &NsUrl, patient: bool, trace: &Trace, name: &str) -> Wire {
    if patient {
        return client.wire(0, url, |_| {}).await;
    }
    loop {
        let begin = Instant::now();
        let answer = client.request(0, url).await;
        // What an earlier process has left is asked for first, with as much patience.
        if begin.elapsed() > REQUEST * 2 + Duration::from_secs(1) {
            trace.violated("answered in time", format!("{name} waited {:?}", begin.elapsed()));
        }
        match answer {
            Ok(wire) => return wire,
            Err(error) => {
                trace.note(format_args!("{name} gets no wire: {}", error.code));
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Starts a program that has its identity first, however long that takes.
fn spawn<F: Future<Output = Result<()>> + Send>(
    here: Arc<dyn sim::Process>,
    identity: oneshot::Receiver<Source>,
    stopped: impl Future<Output = ()> + Send + 'static,
    work: impl FnOnce(Source) -> F + Send + 'static,
) -> JoinHandle<()> {
    tokio::spawn(sim::HERE.scope(here, async move {
        let source = tokio::select! {
            biased;
            source = identity => source,
            () = stopped => return,
        };
        let Ok(source) = source else { return };
        if let Err(error) = work(source).await {
            tracing::warn!("a program ended: {error:#}");
        }
    }))
}

fn own_namespace(netns: &Arc<OwnedFd>) -> Result<OwnNamespace> {
    Ok(OwnNamespace::of(File::from(netns.try_clone()?))?)
}

fn copy(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for file in std::fs::read_dir(from).into_iter().flatten().flatten() {
        std::fs::copy(file.path(), to.join(file.file_name()))?;
    }
    Ok(())
}

/// An identity that is renewed at the half of its life, as the Workload API does, while identities are given out. Who
/// starts while none are waits for his first.
fn identity(world: &World, id: SpiffeId) -> (oneshot::Receiver<Source>, JoinHandle<()>) {
    let (authority, ttl) = (Arc::clone(&world.authority), world.shape.certificates);
    let (mut issuing, expired) = (world.issuing.subscribe(), Arc::clone(&world.certificates_expired));
    let trace = world.trace.clone();
    let (tell, told) = oneshot::channel();
    let renewing = tokio::spawn(async move {
        if issuing.wait_for(|issuing| *issuing).await.is_err() {
            return;
        }
        let Ok(first) = authority.identity(&id, ttl, SystemTime::now()) else { return };
        let (mut renewal, mut over) = (Renewal::after(ttl / 2), Instant::now() + ttl);
        let (current, source) = watch::channel(Arc::new(first));
        let _ = tell.send(Source::from_watch(source));
        loop {
            renewal.due().await;
            let given = async |issuing: &mut watch::Receiver<bool>| issuing.wait_for(|is| *is).await.is_ok();
            let goes_on = match timeout_at(over, given(&mut issuing)).await {
                Ok(goes_on) => goes_on,
                Err(_) => {
                    trace.note(format_args!("the certificate of {} expires", id.path()));
                    expired.fetch_add(1, Ordering::Relaxed);
                    given(&mut issuing).await
                }
            };
            if !goes_on {
                return;
            }
            (renewal, over) = (Renewal::after(ttl / 2), Instant::now() + ttl);
            let renewed: Option<Identity> = authority.identity(&id, ttl, SystemTime::now()).ok();
            if let Some(renewed) = renewed {
                let renewed = renewed.after(&current.borrow());
                current.send_replace(Arc::new(renewed));
            }
        }
    });
    (told, renewing)
}
