//! The manager's registry: what endpoints and forwarders of a node talk to (spec/registry.md 3.4).
//!
//! Services pass through to the cluster's registry. Endpoints are kept here as [`Local`]s too: their
//! sockets come as descriptors and stay here, and the registry learns the manager's URL instead
//! (2.12, 2.13). A look-up from this node gets the descriptor back; anybody else dials the manager.
//! So "the forwarders of this node" is a question that is answered here, without the registry.
//!
//! The manager itself asks in process, see the methods of [`ManagerRegistry`].

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Arc, Weak},
    time::Duration,
};

use async_trait::async_trait;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use nsm_api::{
    mechanism::InodeUrl,
    pb::registry::{
        NetworkService, NetworkServiceEndpoint,
        network_service_endpoint_registry_server::NetworkServiceEndpointRegistryServer,
        network_service_registry_server::NetworkServiceRegistryServer,
    },
};
use nsm_identity::clock;
use nsm_identity::{SpiffeId, policy::Policies, token};
use nsm_transport::{DialTarget, DialUrl, FdTable, FileId, MAX_MESSAGE, Peer, Pool, UnixPeer};
use parking_lot::Mutex;
use rustix::{
    fs::FileType,
    io::Errno,
    net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tonic::service::Routes;
use tracing::{debug, info};

use crate::{
    Error,
    cache::Cached,
    client::Endpoint,
    expiry::{self, Timers, time_of},
    keeper::Keepers,
    lanes::Lanes,
    path::RegistrationPath,
    rpc::{CALL, Upstream},
    server::{Context, Directories, Directory, Events, Front, WatchLimit},
    store::Item,
};

/// Where a manager finds what others of its cluster have registered.
#[derive(Debug, Clone)]
pub enum Cluster {
    /// At a registry.
    At(DialUrl),
    /// At the registry of this process.
    Inside(Directories),
    /// There are no others: this manager keeps everything itself.
    Alone,
}

impl From<Option<DialUrl>> for Cluster {
    fn from(url: Option<DialUrl>) -> Self {
        url.map_or(Self::Alone, Self::At)
    }
}

/// How a manager's registry behaves.
#[derive(Debug, Clone)]
pub struct ManagerConfig {
    /// The cluster's registry.
    pub registry: Cluster,
    /// The URL under which managers of other nodes reach this one; it stands for all endpoints of
    /// this node.
    pub public_url: String,
    /// Labels that endpoints of this node get where they do not have them: [`node_labels`].
    pub labels: Vec<(String, String)>,
    /// The service that forwarders register under (`NSM_FORWARDER_NETWORK_SERVICE_NAME`).
    pub forwarder_service: String,
    /// Who may register a forwarder from another network namespace than this process's, or over TCP
    /// (`NSM_FORWARDER_IDS`): a forwarder sees every client's requests and namespaces.
    pub forwarder_ids: BTreeSet<SpiffeId>,
    /// How long an endpoint lives without a refresh, at most.
    pub lifetime: Duration,
    /// Longest lifetime of tokens made here (`NSM_MAX_TOKEN_LIFETIME`).
    pub max_token_lifetime: Duration,
    /// How long connecting to the registry may take (`NSM_DIAL_TIMEOUT`).
    pub dial_timeout: Duration,
    /// Watches of one identity.
    pub watches: WatchLimit,
    /// What is checked of registrations (`NSM_REGISTRY_SERVER_POLICIES`).
    pub policies: Arc<Policies>,
}

impl ManagerConfig {
    /// Upstream's defaults for everything but the URLs.
    #[must_use]
    pub fn new(registry: impl Into<Cluster>, public_url: impl Into<String>) -> Self {
        Self {
            registry: registry.into(),
            public_url: public_url.into(),
            labels: node_labels(),
            forwarder_service: "forwarder".to_owned(),
            forwarder_ids: BTreeSet::new(),
            lifetime: expiry::DEFAULT_LIFETIME,
            max_token_lifetime: token::DEFAULT_MAX_LIFETIME,
            dial_timeout: Duration::from_millis(750),
            watches: WatchLimit::default(),
            policies: Arc::default(),
        }
    }
}

/// The labels `nodeName`, `podName` and `clusterName` from the environment variables `NODE_NAME`,
/// `POD_NAME` and `CLUSTER_NAME`, where they exist (spec/registry.md 2.14).
#[must_use]
pub fn node_labels() -> Vec<(String, String)> {
    let variables = [("NODE_NAME", "nodeName"), ("POD_NAME", "podName"), ("CLUSTER_NAME", "clusterName")];
    let label = |(variable, label): (&str, &str)| Some((label.to_owned(), env::var(variable).ok()?));
    variables.into_iter().filter_map(label).collect()
}

/// An endpoint of this node.
#[derive(Debug, Clone)]
pub struct Local {
    /// As the registry knows it, but with the URL that the endpoint gave.
    pub nse: Arc<NetworkServiceEndpoint>,
    /// How this process reaches it.
    reach: Reach,
    /// It was admitted as a forwarder of this node.
    forwards: bool,
    /// The path of its registration, to end it when it expires.
    path: RegistrationPath,
    /// Who registered it, while somebody waits for its end.
    process: Option<Arc<Process>>,
}

/// A process of this node that has registered an endpoint.
#[derive(Debug)]
struct Process {
    is: UnixPeer,
    watched: JoinHandle<()>,
}

impl Process {
    fn watches(&self, peer: &UnixPeer) -> bool {
        self.is.pid() == peer.pid() && self.is.is_alive() && !self.watched.is_finished()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.watched.abort();
    }
}

#[derive(Debug, Clone)]
enum Reach {
    Url(DialUrl),
    /// An `O_PATH` descriptor of the socket's file, and its numbers.
    Socket(Arc<OwnedFd>, InodeUrl),
}

impl Local {
    /// How this process reaches it.
    #[must_use]
    pub fn dial(&self) -> DialTarget {
        match &self.reach {
            Reach::Url(url) => url.into(),
            Reach::Socket(socket, _) => socket.clone().into(),
        }
    }

    /// Gives an answer the URL by which its reader reaches this endpoint, and the reader the
    /// descriptor that goes with it. Who cannot receive one dials this manager.
    fn show(&self, nse: &mut NetworkServiceEndpoint, fds: Option<&FdTable>) {
        match (&self.reach, fds) {
            (Reach::Url(url), _) => nse.url = url.to_string(),
            (Reach::Socket(socket, inode), Some(fds)) => {
                nse.url = inode.to_string();
                fds.send(socket.clone());
            }
            (Reach::Socket(..), None) => {}
        }
    }
}

impl Reach {
    /// Whether somebody listens there, as far as this node can tell.
    fn is_served(&self) -> bool {
        let Self::Socket(socket, _) = self else { return true };
        // A connection that is dropped at once; it waits for nobody.
        let connect = || {
            let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
            let address = SocketAddrUnix::new(path)?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let ours = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            net::connect(&ours, &address)
        };
        connect() != Err(Errno::CONNREFUSED)
    }
}

impl From<Local> for Endpoint {
    fn from(local: Local) -> Self {
        Self { dial: local.dial(), nse: (*local.nse).clone() }
    }
}

/// A manager's registry: gRPC services for peers, look-ups for the manager. Clones share it.
#[derive(Debug, Clone)]
pub struct ManagerRegistry {
    services: Front<NetworkService>,
    endpoints: Front<NetworkServiceEndpoint>,
    inner: Arc<Inner>,
}

struct Inner {
    config: ManagerConfig,
    /// The network namespace of this process; `None` without `/proc`, and nobody is in it then.
    netns: Option<FileId>,
    services: Arc<dyn Directory<NetworkService>>,
    endpoints: Arc<dyn Directory<NetworkServiceEndpoint>>,
    locals: Mutex<BTreeMap<String, Local>>,
    /// Counts changes of `locals`.
    changed: watch::Sender<u64>,
    timers: Arc<Timers>,
    lanes: Lanes,
    expiring: Mutex<Option<JoinHandle<()>>>,
}

impl ManagerRegistry {
    /// Sets up the services; `pool` makes the connections to the cluster's registry. Needs a tokio
    /// runtime. The network namespace of the calling thread is the one that forwarders register from.
    #[must_use]
    pub fn new(config: ManagerConfig, pool: Pool) -> Self {
        let Directories { services, endpoints, service_lanes, endpoint_lanes } = match config.registry.clone()
        {
            Cluster::At(url) => {
                let upstream = Arc::new(Upstream { pool, url, dial: config.dial_timeout });
                Directories {
                    services: Arc::new(Cached::new(upstream.clone())),
                    endpoints: Arc::new(Cached::new(upstream)),
                    service_lanes: Lanes::default(),
                    endpoint_lanes: Lanes::default(),
                }
            }
            Cluster::Inside(directories) => directories,
            Cluster::Alone => Directories::of(Keepers::memory([]), config.lifetime),
        };
        let inner = Arc::new(Inner {
            services,
            endpoints,
            locals: Mutex::default(),
            changed: watch::Sender::new(0),
            timers: Arc::default(),
            lanes: endpoint_lanes,
            expiring: Mutex::default(),
            netns: FileId::of_path("/proc/thread-self/ns/net").ok(),
            config,
        });
        *inner.expiring.lock() = Some(tokio::spawn(expire(inner.timers.clone(), Arc::downgrade(&inner))));
        let config = &inner.config;
        Self {
            services: Front::new(
                inner.services.clone(),
                &config.watches,
                &config.policies,
                config.max_token_lifetime,
                service_lanes,
            ),
            endpoints: Front::new(
                Arc::new(LocalEndpoints(inner.clone())),
                &config.watches,
                &config.policies,
                config.max_token_lifetime,
                inner.lanes.clone(),
            ),
            inner,
        }
    }

    /// Adds the two gRPC services to those of the manager; their names for health are
    /// [`crate::SERVICES`].
    #[must_use]
    pub fn add_to(&self, routes: Routes) -> Routes {
        routes
            .add_service(
                NetworkServiceRegistryServer::new(self.services.clone())
                    .max_decoding_message_size(MAX_MESSAGE),
            )
            .add_service(
                NetworkServiceEndpointRegistryServer::new(self.endpoints.clone())
                    .max_decoding_message_size(MAX_MESSAGE),
            )
    }

    /// Ends the watches of peers: for a shutdown that does not wait for them.
    pub fn end_watches(&self) {
        self.services.end_watches();
        self.endpoints.end_watches();
    }

    /// The network service of exactly this name; an empty `payload` fits any
    /// (spec/control-plane.md 8.1).
    ///
    /// # Errors
    /// The registry does not answer.
    pub async fn find_service(&self, name: &str, payload: &str) -> Result<Option<NetworkService>, Error> {
        let query =
            NetworkService { name: name.to_owned(), payload: payload.to_owned(), ..Default::default() };
        let found = self.inner.services.find(query, false, None).await?;
        let found: Vec<_> = found.try_collect().await?;
        Ok(found.into_iter().map(|(service, _)| service).find(|service| service.name == name))
    }

    /// All network services.
    ///
    /// # Errors
    /// The registry does not answer.
    pub async fn services(&self) -> Result<Vec<NetworkService>, Error> {
        let found = self.inner.services.find(NetworkService::default(), false, None).await?;
        found.map_ok(|(service, _)| service).try_collect().await
    }

    /// A network service and its changes: `None` when it is gone. The stream ends with an error when
    /// the registry is lost: watch anew after a pause.
    ///
    /// # Errors
    /// The registry does not answer.
    pub async fn watch_service(
        &self,
        name: &str,
    ) -> Result<impl Stream<Item = Result<Option<NetworkService>, Error>> + Send + Unpin + use<>, Error> {
        let query = NetworkService { name: name.to_owned(), ..Default::default() };
        let events = self.inner.services.find(query, true, None).await?;
        Ok(events.map_ok(|(service, deleted)| (!deleted).then_some(service)))
    }

    /// The endpoints of a network service and their changes, as the registry tells of them: `None` beside the name of
    /// one that is gone. The stream ends with an error when the registry is lost: watch anew after a pause.
    ///
    /// # Errors
    /// The registry does not answer.
    pub async fn watch_endpoints(
        &self,
        service: &str,
    ) -> Result<
        impl Stream<Item = Result<(String, Option<NetworkServiceEndpoint>), Error>> + Send + Unpin + use<>,
        Error,
    > {
        let query = NetworkServiceEndpoint {
            network_service_names: vec![service.to_owned()],
            ..NetworkServiceEndpoint::default()
        };
        let events = self.inner.endpoints.find(query, true, None).await?;
        Ok(events.map_ok(|(nse, deleted)| (nse.name.clone(), (!deleted).then_some(nse))))
    }

    /// The endpoint of exactly this name: of this node with its socket, of another with the URL of
    /// its manager.
    ///
    /// # Errors
    /// The registry does not answer.
    pub async fn find_endpoint(&self, name: &str) -> Result<Option<Endpoint>, Error> {
        if let Some(local) = self.local_endpoint(name) {
            return Ok(Some(local.into()));
        }
        let query = NetworkServiceEndpoint { name: name.to_owned(), ..Default::default() };
        Ok(self.find_endpoints(query).await?.into_iter().find(|endpoint| endpoint.nse.name == name))
    }

    /// The endpoints that answer a query (spec/registry.md 2.2), here and elsewhere.
    ///
    /// # Errors
    /// The registry does not answer.
    pub async fn find_endpoints(&self, query: NetworkServiceEndpoint) -> Result<Vec<Endpoint>, Error> {
        let found = self.inner.endpoints.find(query, false, None).await?;
        let found: Vec<_> = found.try_collect().await?;
        let mut endpoints = Vec::with_capacity(found.len());
        for (nse, _) in found {
            match self.inner.place(&nse, false).await {
                Place::Here(local) => endpoints.push(local.into()),
                Place::Elsewhere => endpoints.extend(Endpoint::dialed_by_url(nse)),
                Place::Nowhere => {}
            }
        }
        Ok(endpoints)
    }

    /// An endpoint of this node.
    #[must_use]
    pub fn local_endpoint(&self, name: &str) -> Option<Local> {
        self.inner.local(name)
    }

    /// All endpoints of this node, forwarders included, ordered by name.
    #[must_use]
    pub fn locals(&self) -> Vec<Local> {
        self.inner.locals.lock().values().cloned().collect()
    }

    /// The forwarders of this node, ordered by name: candidates for
    /// [`nsm_api::matching::Policy::forwarders`].
    #[must_use]
    pub fn forwarders(&self) -> Vec<Endpoint> {
        // A node may have many endpoints, and every request asks.
        let locals = self.inner.locals.lock();
        locals.values().filter(|local| local.forwards).cloned().map(Endpoint::from).collect()
    }

    /// The forwarder of this node that has this name.
    #[must_use]
    pub fn forwarder(&self, name: &str) -> Option<Local> {
        self.inner.local(name).filter(|local| local.forwards)
    }

    /// The service that forwarders register under.
    #[must_use]
    pub fn forwarder_service(&self) -> &str {
        &self.inner.config.forwarder_service
    }

    /// Changes whenever an endpoint of this node appears, changes or goes: for those who wait for
    /// one.
    #[must_use]
    pub fn locals_changed(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }
}

/// How long a registration outlives its process, which may be started again at once: a container takes a second or two.
const AFTER_DEATH: Duration = Duration::from_secs(5);

/// How long the news of an endpoint wait for its registration to end here.
const SETTLE: Duration = Duration::from_secs(2);

/// Where an endpoint is that the registry names.
enum Place {
    Here(Local),
    Elsewhere,
    /// It has this manager's URL but this manager does not know it: a registration from before a
    /// restart, which its endpoint will renew.
    Nowhere,
}

impl Inner {
    fn local(&self, name: &str) -> Option<Local> {
        self.locals.lock().get(name).cloned()
    }

    async fn place(&self, nse: &NetworkServiceEndpoint, deleted: bool) -> Place {
        if let Some(local) = self.local(&nse.name) {
            return Place::Here(local);
        }
        if nse.url != self.config.public_url || deleted {
            return Place::Elsewhere;
        }
        self.settled(&nse.name).await;
        self.local(&nse.name).map_or(Place::Nowhere, Place::Here)
    }

    /// The registry may tell of a registration before its answer is dealt with here: by then it is. Until then this node
    /// knows nothing of the endpoint, or the socket that it had before.
    async fn settled(&self, name: &str) {
        let soon = Some(Instant::now() + SETTLE);
        drop(self.lanes.enter(name, soon).await);
    }

    /// The process that registers an endpoint, watched. Forwarders are expected back, whenever that is.
    fn process(self: &Arc<Self>, name: &str, peer: &UnixPeer) -> Option<Arc<Process>> {
        let known = self.local(name).and_then(|local| local.process);
        if let Some(known) = known.filter(|known| known.watches(peer)) {
            return Some(known);
        }
        // Without a pid nothing tells a refresh of the same process from another's, and each would be watched anew.
        peer.pid()?;
        let (is, name, inner) = (peer.clone(), name.to_owned(), Arc::downgrade(self));
        let watched = tokio::spawn(async move {
            if is.ended().await.is_ok()
                && let Some(inner) = inner.upgrade()
            {
                inner.ended(&name);
            }
        });
        Some(Arc::new(Process { is: peer.clone(), watched }))
    }

    /// The process that registered this endpoint has ended, if it has.
    fn ended(&self, name: &str) {
        // Whoever took over its socket serves on, and will register.
        let is_dead = |local: &Local| {
            let ended = local.process.as_ref().is_some_and(|process| !process.is.is_alive());
            ended && !local.reach.is_served()
        };
        self.timers.bring_forward(name, Instant::now() + AFTER_DEATH, || {
            self.local(name).as_ref().is_some_and(is_dead)
        });
    }

    /// Tells the registry that an endpoint of this node has ended, unless it has moved to another node meanwhile.
    async fn tell_end(&self, name: &str, local: &Local) -> Result<(), Error> {
        let query = NetworkServiceEndpoint { name: name.to_owned(), ..Default::default() };
        let registered: Vec<_> = self.endpoints.find(query, false, None).await?.try_collect().await?;
        let elsewhere = |nse: &NetworkServiceEndpoint| nse.name == name && nse.url != self.config.public_url;
        if registered.iter().any(|(nse, _)| elsewhere(nse)) {
            return Ok(());
        }
        let nse = NetworkServiceEndpoint { url: self.config.public_url.clone(), ..(*local.nse).clone() };
        self.endpoints.unregister(&mut Context::own(local.path.clone()), nse).await
    }

    fn changed(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Whether this is a forwarder, and who registers it may: forwarders are dialed with the requests of
    /// all clients of this node, so a workload must not become one by registering for their service.
    fn forwards(&self, cx: &Context, endpoint: &NetworkServiceEndpoint) -> Result<bool, Error> {
        let service = &self.config.forwarder_service;
        if !endpoint.network_service_names.contains(service) {
            return Ok(false);
        }
        let Some(peer) = &cx.peer else { return Ok(true) };
        if self.config.forwarder_ids.contains(peer.id()) {
            return Ok(true);
        }
        let own = self.netns.map_or_else(|| "unknown".to_owned(), |id| format!("net:[{}]", id.ino));
        let found = match peer.unix().map(|unix| (unix, unix.netns_id())) {
            Some((_, Ok(netns))) if Some(netns) == self.netns => return Ok(true),
            Some((unix, Ok(netns))) => format!("{unix}, in network namespace net:[{}]", netns.ino),
            Some((unix, Err(reason))) => {
                format!("{unix}, whose network namespace cannot be read ({reason})")
            }
            None => format!("a peer on TCP, {}", peer.address()),
        };
        Err(Error::NotAForwarder { service: service.clone(), id: peer.id().to_string(), found, own })
    }

    /// How this process reaches an endpoint that gives this URL.
    async fn reach(&self, cx: &Context, endpoint: &NetworkServiceEndpoint) -> Result<Reach, Error> {
        if endpoint.url.is_empty() {
            return Err(Error::NoUrl { name: endpoint.name.clone() });
        }
        let Ok(inode) = endpoint.url.parse::<InodeUrl>() else {
            return Ok(Reach::Url(endpoint.url.parse()?));
        };
        match self.local(&endpoint.name).map(|local| local.reach) {
            Some(Reach::Socket(socket, known)) if known == inode => return Ok(Reach::Socket(socket, known)),
            _ => {}
        }
        let fds = cx.peer.as_ref().and_then(Peer::fds);
        let fds = fds.ok_or_else(|| Error::NotLocal { url: endpoint.url.clone() })?;
        let file = FileId { dev: inode.dev, ino: inode.ino };
        let socket = fds.take(file, cx.deadline.unwrap_or_else(|| Instant::now() + CALL)).await?;
        let is_socket = |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket;
        if !rustix::fs::fstat(&socket).is_ok_and(is_socket) {
            return Err(Error::NoUrl { name: endpoint.name.clone() });
        }
        Ok(Reach::Socket(Arc::new(socket), inode))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(expiring) = self.expiring.lock().take() {
            expiring.abort();
        }
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManagerRegistry")
            .field("config", &self.config)
            .field("locals", &self.locals.lock().len())
            .finish_non_exhaustive()
    }
}

/// Ends the registrations that nobody refreshed.
async fn expire(timers: Arc<Timers>, inner: Weak<Inner>) {
    timers
        .run(|name| {
            let Some(inner) = inner.upgrade() else { return };
            let name = name.to_owned();
            tokio::spawn(async move {
                let Ok(_lane) = inner.lanes.enter(&name, None).await else { return };
                if inner.timers.deadline(&name).is_some() {
                    // A refresh was before us.
                    return;
                }
                let Some(local) = inner.locals.lock().remove(&name) else { return };
                inner.changed();
                match local.process.as_ref().is_some_and(|process| !process.is.is_alive()) {
                    true => info!(name, "the process of an endpoint of this node has ended"),
                    false => info!(name, "an endpoint of this node was not refreshed and has expired"),
                }
                if let Err(reason) = inner.tell_end(&name, &local).await {
                    debug!(name, %reason, "the registry was not told of an endpoint that has ended");
                    let end = local.nse.expiration_time.as_ref().map(time_of);
                    let left = end.and_then(|end| end.duration_since(clock::now()).ok()).unwrap_or_default();
                    // What has expired the registry ends at the same time by itself.
                    if left > AFTER_DEATH {
                        inner.timers.set(&name, Instant::now() + AFTER_DEATH, || {
                            inner.locals.lock().insert(name.clone(), local);
                        });
                    }
                }
            });
        })
        .await;
}

/// The endpoints of this node before those of the registry.
struct LocalEndpoints(Arc<Inner>);

#[async_trait]
impl Directory<NetworkServiceEndpoint> for LocalEndpoints {
    fn known(&self, name: &str) -> Option<Arc<NetworkServiceEndpoint>> {
        // Beside a registry of this process there is no other front that guards the names of other nodes.
        self.0.local(name).map(|local| local.nse).or_else(|| self.0.endpoints.known(name))
    }

    async fn register(
        &self,
        cx: &mut Context,
        mut endpoint: NetworkServiceEndpoint,
    ) -> Result<NetworkServiceEndpoint, Error> {
        let inner = &self.0;
        let forwards = inner.forwards(cx, &endpoint)?;
        for entry in endpoint.network_service_labels.values_mut() {
            for (label, value) in &inner.config.labels {
                entry.labels.entry(label.clone()).or_insert_with(|| value.clone());
            }
        }
        cx.limit_expiration_time(&mut endpoint, inner.config.lifetime, clock::now())?;
        let reach = inner.reach(cx, &endpoint).await?;
        // Peers know an endpoint by the name that they sent.
        let name = endpoint.name.clone();
        let url = std::mem::replace(&mut endpoint.url, inner.config.public_url.clone());

        let mut answer = inner.endpoints.register(cx, endpoint).await?;
        answer.url = url;
        let now = clock::now();
        let end = answer.expiration_time.as_ref().map(time_of);
        let left = end.map_or(inner.config.lifetime, |end| end.duration_since(now).unwrap_or_default());
        let peer = cx.peer.as_ref().and_then(Peer::unix).filter(|_| !forwards);
        let process = peer.and_then(|peer| inner.process(&name, peer));
        let local = Local { nse: Arc::new(answer.clone()), reach, forwards, path: cx.path.clone(), process };
        inner.timers.set(&name, Instant::now() + left, || {
            inner.locals.lock().insert(name.clone(), local);
        });
        inner.changed();
        // Perhaps while it was registered.
        inner.ended(&name);
        Ok(answer)
    }

    async fn unregister(&self, cx: &mut Context, mut endpoint: NetworkServiceEndpoint) -> Result<(), Error> {
        let inner = &self.0;
        inner.config.public_url.clone_into(&mut endpoint.url);
        let name = endpoint.name.clone();
        inner.endpoints.unregister(cx, endpoint).await?;
        inner.timers.clear(&name, || {
            inner.locals.lock().remove(&name);
        });
        inner.changed();
        Ok(())
    }

    async fn find(
        &self,
        query: NetworkServiceEndpoint,
        watch: bool,
        peer: Option<&Peer>,
    ) -> Result<Events<NetworkServiceEndpoint>, Error> {
        let inner = self.0.clone();
        let fds = peer.and_then(Peer::fds).cloned();
        if let Some(local) = inner.local(&query.name).filter(|_| !watch) {
            // Of a name of this node the registry knows nothing more.
            let mut nse =
                NetworkServiceEndpoint { url: inner.config.public_url.clone(), ..(*local.nse).clone() };
            let answers = nse.answers(&query);
            local.show(&mut nse, fds.as_ref().filter(|_| answers));
            return Ok(stream::iter(answers.then_some(Ok((nse, false)))).boxed());
        }
        let events = inner.endpoints.find(query, watch, None).await?;
        let events = events.try_filter_map(move |(mut nse, deleted)| {
            let (inner, fds) = (inner.clone(), fds.clone());
            async move {
                if watch && !deleted && nse.url == inner.config.public_url {
                    inner.settled(&nse.name).await;
                }
                match inner.place(&nse, deleted).await {
                    Place::Here(local) => local.show(&mut nse, fds.as_ref().filter(|_| !deleted)),
                    Place::Elsewhere => {}
                    Place::Nowhere => {
                        debug!(name = nse.name, "a registration of before, which this node does not know");
                        return Ok(None);
                    }
                }
                Ok(Some((nse, deleted)))
            }
        });
        Ok(events.boxed())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use rustix::fs::{CWD, Mode, OFlags};

    use super::*;

    #[test]
    fn a_socket_is_served_as_long_as_somebody_listens() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("endpoint.sock");
        let first = UnixListener::bind(&path).unwrap();
        let socket = rustix::fs::openat(CWD, &path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let inode = InodeUrl { dev: 0, ino: 0 };
        let reach = Reach::Socket(Arc::new(socket), inode);
        assert!(reach.is_served());
        // As a supervisor hands it on.
        let heir = first.try_clone().unwrap();
        drop(first);
        assert!(reach.is_served());
        drop(heir);
        assert!(!reach.is_served());
    }
}
