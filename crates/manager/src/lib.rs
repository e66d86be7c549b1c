//! The manager: one per node, between workloads, forwarders and other managers. Its chain is the list in [`chain`].

mod discover_forwarder;
mod edits;
mod elements;
mod excluded_prefixes;
mod follow_service;
pub mod tell;
mod workloads;

use std::{collections::BTreeSet, future::Future, sync::Arc, time::Duration};

use nsm_identity::{Source, SpiffeId, policy::Policies};
use nsm_mesh::{
    Chain, Connections, Error, Result,
    auth::{Authorize, OwnNamespace},
    dial::Dial,
    error::explain,
    inspect::Neighbour,
    metrics::Metrics,
    monitor::{Hub, Monitor},
};
use nsm_registry::{Cluster, ManagerConfig, ManagerRegistry, WatchLimit, node_labels};
use nsm_transport::{Guard, ListenUrl, Pool, PoolConfig, Server};

pub use discover_forwarder::{Candidate, DiscoverForwarder};
pub use edits::{Edit, Edits, Wanted};
pub use elements::{ClientInfo, LocalMechanisms, OnNode};
pub use excluded_prefixes::ExcludedPrefixes;
#[doc(hidden)]
pub use excluded_prefixes::parse as parse_excluded_prefixes;
pub use follow_service::{FollowService, News};
pub use workloads::{TellWorkloads, WireOf, Workloads};

/// What a manager is told from outside.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name in paths.
    pub name: String,
    /// Where to listen; the first TCP one is what others reach us by.
    pub listen_on: Vec<ListenUrl>,
    /// The cluster's registry.
    pub registry: Cluster,
    /// How long connecting to anybody may take.
    pub dial_timeout: Duration,
    /// The service that forwarders register under.
    pub forwarder_service: String,
    /// Who may register forwarders from elsewhere than this process's network namespace.
    pub forwarder_ids: BTreeSet<SpiffeId>,
    /// Who may hand over namespaces that are not its own.
    pub namespace_delegates: BTreeSet<SpiffeId>,
    /// Who may watch every connection, not only those that it asked for.
    pub monitor_readers: BTreeSet<SpiffeId>,
    /// Prefixes that endpoints must not hand out on this node.
    pub excluded_prefixes: ExcludedPrefixes,
    /// How long our tokens live.
    pub max_token_lifetime: Duration,
    /// What is checked of callers, and what they may use.
    pub guard: Guard,
    /// What is checked of registrations.
    pub registrations: Arc<Policies>,
    /// What is checked of a registry's answers.
    pub registry_answers: Arc<Policies>,
    /// Who tells workloads what becomes of their wires, if somebody does.
    pub workloads: Option<Arc<dyn Workloads>>,
    /// Where we count.
    pub metrics: Arc<Metrics>,
}

/// The chain of `nsm manager`.
#[must_use]
pub fn chain(
    config: &Config,
    registry: ManagerRegistry,
    edits: Edits,
    follow_service: FollowService,
    own: Option<Candidate>,
    hub: Arc<Hub>,
    pool: Pool,
) -> Chain {
    nsm_mesh::chain![
        Authorize { max_token_lifetime: config.max_token_lifetime, policies: config.guard.policies.clone() }, // who asks, before anything is done
        OnNode { policies: config.guard.policies.clone() }, // … a workload on our own socket
        Monitor { hub: Arc::clone(&hub), terminates: false }, // what becomes of each connection
        TellWorkloads(config.workloads.clone()),            // … and whoever tells the workload
        OwnNamespace { allowed: Arc::new(config.namespace_delegates.clone()) }, // a workload speaks for itself
        LocalMechanisms,                                                        // … and does not aim tunnels
        where_clients_run(),                                                    // where the client runs
        edits,                                                   // what others have made of its wish
        config.excluded_prefixes.clone(),                        // what is taken in this cluster
        follow_service,                        // where its service leads away, it goes elsewhere
        DiscoverForwarder::new(registry, own), // who builds the wire
        Dial::new(pool, &config.name, hub, config.dial_timeout), // the forwarder
    ]
}

/// What every wish is given that does not say it.
fn where_clients_run() -> ClientInfo {
    ClientInfo(node_labels().into_iter().collect())
}

/// Wishes as `workloads` say that they were edited.
#[must_use]
pub fn edits(config: &Config) -> Edits {
    Edits::new(config.workloads.clone(), where_clients_run())
}

/// A manager that listens, and takes no requests yet.
#[derive(Debug)]
pub struct Manager {
    config: Config,
    server: Server,
    pool: Pool,
    registry: ManagerRegistry,
}

impl Manager {
    /// Listens.
    ///
    /// # Errors
    /// A socket that cannot be bound.
    pub async fn bind(config: Config, source: Source) -> Result<Self> {
        let pool_config = PoolConfig {
            max_token_lifetime: config.max_token_lifetime,
            policies: config.registry_answers.clone(),
            ..PoolConfig::default()
        };
        let pool = Pool::new(source.clone(), pool_config);
        let server =
            Server::bind(source, &config.listen_on).await.map_err(|e| Error::unavailable(explain(&e)))?;
        let server = server.guarded(&config.guard);
        config.metrics.register(|registry| config.guard.refusals.register(registry));
        let urls = server.urls();
        let public = urls.iter().find(|url| matches!(url, ListenUrl::Tcp(_))).or(urls.first());
        let public = public.map(ToString::to_string).unwrap_or_default();
        tracing::info!(name = %config.name, url = %public, "managing this node");
        let registry = ManagerRegistry::new(
            ManagerConfig {
                forwarder_service: config.forwarder_service.clone(),
                forwarder_ids: config.forwarder_ids.clone(),
                max_token_lifetime: config.max_token_lifetime,
                watches: WatchLimit(config.guard.limits.watches_of_one),
                policies: config.registrations.clone(),
                dial_timeout: config.dial_timeout,
                ..ManagerConfig::new(config.registry.clone(), public)
            },
            pool.clone(),
        );
        Ok(Self { config, server, pool, registry })
    }

    /// What it knows of services and endpoints.
    #[must_use]
    pub fn registry(&self) -> &ManagerRegistry {
        &self.registry
    }

    /// Its connections to others.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Serves until `shutdown` is done; `own` is the forwarder of this process, if there is one.
    pub async fn serve(
        self,
        own: Option<Candidate>,
        ready: impl FnOnce(),
        shutdown: impl Future<Output = ()> + Send,
    ) {
        let Self { config, server, pool, registry } = self;
        let inspector = config.metrics.inspector();
        inspector.add(Arc::new(tell::ToldOfManager(registry.clone())));
        if let Cluster::At(url) = config.registry.clone() {
            inspector.add(Arc::new(Neighbour { pool: pool.clone(), role: "registry", url }));
        }
        let hub = Arc::new(Hub::guarded(&config.guard));
        let (follow_service, news) = FollowService::new();
        let edits = edits(&config);
        let chain = chain(
            &config,
            registry.clone(),
            edits.clone(),
            follow_service.clone(),
            own,
            Arc::clone(&hub),
            pool,
        );
        let connections = Connections::serving(&config.name, chain, Arc::clone(&config.metrics));
        let told = workloads::follow(Arc::clone(&hub), config.workloads.clone());
        let edited = edits.look_after(Arc::clone(&hub));
        let beside =
            follow_service.look_after(news, registry.clone(), Arc::clone(&connections), Arc::clone(&hub));
        let mut routes = tonic::service::RoutesBuilder::default();
        let readers = Arc::new(config.monitor_readers.clone());
        nsm_mesh::server::add(&mut routes, connections, Arc::clone(&hub), readers);
        let routes = registry.add_to(routes.routes());
        ready();
        let services = [&nsm_mesh::server::SERVICES[..], &nsm_registry::SERVICES].concat();
        let shutdown = async {
            shutdown.await;
            registry.end_watches();
            hub.end_watches();
        };
        tokio::select! {
            () = server.serve(routes, &services, shutdown) => {}
            () = beside => {}
            () = told => {}
            () = edited => {}
        }
    }
}
