//! An endpoint: a chain that ends here, served on a Unix socket and registered with the node's manager.

use std::{collections::BTreeMap, future::Future, path::PathBuf, sync::Arc, time::Duration};

use ipnet::IpNet;
use nsm_api::pb::registry::{NetworkService, NetworkServiceEndpoint, NetworkServiceLabels};
use nsm_identity::{Source, policy::Policies};
use nsm_mesh::{
    Chain, Connections, Error, Reason, Result,
    auth::Authorize,
    chain,
    error::explain,
    inspect::Neighbour,
    metrics::Metrics,
    monitor::{Hub, Monitor},
};
use nsm_registry::{Client, ClientConfig, Listed};
use nsm_transport::{DialUrl, Guard, ListenUrl, Pool, PoolConfig, Server};
use tokio::time::Instant;

use crate::{
    ipam::{Ipam, IpamPolicy, PrefixGroups},
    own_end::{OwnNamespace, ServerEnd},
    provides::{DnsConfigs, PolicyRoutes, RoutesBehind},
};

/// What `nsm endpoint` gives its clients.
#[derive(Debug, Clone)]
pub struct Provides {
    /// Where their addresses come from.
    pub prefixes: PrefixGroups,
    /// What becomes of addresses and routes that they bring.
    pub policy: IpamPolicy,
    /// Prefixes that they get routes to.
    pub behind: Vec<IpNet>,
    /// Policy routes.
    pub policy_routes: PolicyRoutes,
    /// DNS servers.
    pub dns: DnsConfigs,
}

/// The chain of `nsm endpoint`.
#[must_use]
pub fn endpoint(authorize: Authorize, hub: Arc<Hub>, provides: Provides, namespace: OwnNamespace) -> Chain {
    chain![
        authorize,                                      // who asks, before anything is taken
        Monitor { hub, terminates: true },              // what becomes of each wire
        Ipam::new(&provides.prefixes, provides.policy), // addresses for both ends
        RoutesBehind(provides.behind),                  // what else is reached through us
        provides.policy_routes,                         // which packets take other routes
        provides.dns,                                   // who resolves names
        ServerEnd { namespace, unnumbered: false },     // where our end appears
    ]
}

/// How long to wait for the manager at start.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest pause between looks for the manager of the node: a part of what clients wait for an endpoint that is not
/// found, before they want another.
const LOOK_FOR_MANAGER: Duration = Duration::from_millis(200);

/// What an endpoint is told from outside.
#[derive(Debug, Clone)]
pub struct EndpointConfig {
    /// Name in paths and in the registry; unique in the mesh.
    pub name: String,
    /// The manager of this node.
    pub connect_to: DialUrl,
    /// Where to listen; `None`: a socket in a fresh temporary directory, which is gone as soon as it listens.
    pub listen_on: Option<ListenUrl>,
    /// The services provided.
    pub services: Vec<String>,
    /// What services choose endpoints by.
    pub labels: BTreeMap<String, String>,
    /// Register the services too, with this payload.
    pub register_payload: Option<String>,
    /// After how long without a connection it ends.
    pub idle_timeout: Option<Duration>,
    /// How long connecting to the manager may take.
    pub dial_timeout: Duration,
    /// How long our tokens live.
    pub max_token_lifetime: Duration,
    /// What is checked of callers, and what they may use.
    pub guard: Guard,
    /// What is checked of the manager's answers to registrations.
    pub registry_answers: Arc<Policies>,
    /// Where we count.
    pub metrics: Arc<Metrics>,
}

impl EndpointConfig {
    /// The element that knows how long our tokens live.
    #[must_use]
    pub fn authorize(&self) -> Authorize {
        Authorize { max_token_lifetime: self.max_token_lifetime, policies: self.guard.policies.clone() }
    }

    /// Connections to others, with our identity.
    #[must_use]
    pub fn pool(&self, source: Source) -> Pool {
        let config = PoolConfig {
            max_token_lifetime: self.max_token_lifetime,
            policies: self.registry_answers.clone(),
            ..PoolConfig::default()
        };
        Pool::new(source, config)
    }
}

/// Serves wires with addresses: `nsm endpoint`.
///
/// # Errors
/// As [`serve`].
pub async fn serve_addresses(
    config: EndpointConfig,
    provides: Provides,
    source: Source,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()> + Send,
) -> Result<()> {
    let namespace = OwnNamespace::open()
        .map_err(|e| Error::internal(format!("our own network namespace cannot be opened: {e}")))?;
    let hub = Arc::new(Hub::guarded(&config.guard));
    let chain = endpoint(config.authorize(), Arc::clone(&hub), provides, namespace);
    let pool = config.pool(source.clone());
    serve(config, chain, hub, source, pool, ready, shutdown).await
}

/// Serves a chain as an endpoint: binds its socket, registers it, and ends its connections at the end.
///
/// # Errors
/// A socket that cannot be bound, or a manager that refuses the registration.
pub async fn serve(
    config: EndpointConfig,
    chain: Chain,
    hub: Arc<Hub>,
    source: Source,
    pool: Pool,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()> + Send,
) -> Result<()> {
    let connections = Connections::serving(&config.name, chain, Arc::clone(&config.metrics));
    let (to_manager, url) = (pool.clone(), config.connect_to.clone());
    config.metrics.inspector().add(Arc::new(Neighbour { pool: to_manager, role: "manager", url }));
    let (server, listed) = listen(&config, source).await?;
    let mut routes = tonic::service::RoutesBuilder::default();
    nsm_mesh::server::add(&mut routes, Arc::clone(&connections), Arc::clone(&hub), Arc::default());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = server.serve(routes.routes(), &nsm_mesh::server::SERVICES, async {
        let _ = stopped.await;
    });
    let mut client_config = ClientConfig { dial_timeout: config.dial_timeout, ..ClientConfig::default() };
    // To look for the manager of this node costs nothing, and until it knows us again nobody's wire can be refreshed.
    if matches!(config.connect_to, DialUrl::Unix(_)) {
        client_config.longest_pause = LOOK_FOR_MANAGER;
    }
    let manager = Client::new(pool, config.connect_to.clone(), client_config);
    let beside = async {
        let refused = |e: nsm_registry::Error| {
            Error::unavailable(format!("the manager did not take us: {}", explain(&e)))
        };
        let mut services = Vec::new();
        for name in config.services.iter().filter(|_| config.register_payload.is_some()) {
            let payload = config.register_payload.clone().unwrap_or_default();
            let service = NetworkService { name: name.clone(), payload, ..NetworkService::default() };
            services.push(manager.register_service(service, PATIENCE).await.map_err(refused)?);
        }
        let registration = manager.register_listed(listed, PATIENCE).await.map_err(refused)?;
        ready();
        tokio::select! {
            () = shutdown => {}
            () = idle(&connections, config.idle_timeout) => tracing::info!("nobody has a wire; this endpoint ends"),
        }
        if let Err(error) = registration.unregister().await {
            tracing::warn!(error = %explain(&error), "not unregistered; the registration expires");
        }
        for id in connections.ids() {
            connections.drop_connection(&id, Reason::Shutdown).await;
        }
        hub.end_watches();
        drop(stop);
        Ok(())
    };
    let ((), result) = tokio::join!(serving, beside);
    result
}

/// Returns when there has been no connection for so long.
async fn idle(connections: &Connections, most: Option<Duration>) {
    let Some(most) = most else { return std::future::pending().await };
    let mut since = Instant::now();
    while since.elapsed() < most {
        tokio::time::sleep((most / 10).min(Duration::from_secs(1))).await;
        if !connections.is_empty() {
            since = Instant::now();
        }
    }
}

/// Binds the endpoint's socket. Where its path is ours to choose it is gone again when this returns, whatever becomes
/// of this process: what is registered is the file itself.
async fn listen(config: &EndpointConfig, source: Source) -> Result<(Server, Listed)> {
    let (listen_on, _directory) = match &config.listen_on {
        Some(url) => (url.clone(), None),
        None => {
            let directory = TemporaryDirectory::create(&config.name)
                .map_err(|e| Error::internal(format!("no temporary directory for our socket: {e}")))?;
            (ListenUrl::Unix(directory.0.join("listen.on")), Some(directory))
        }
    };
    let server = Server::bind(source, std::slice::from_ref(&listen_on))
        .await
        .map_err(|e| Error::unavailable(explain(&e)))?
        .guarded(&config.guard);
    config.metrics.register(|registry| config.guard.refusals.register(registry));
    let listed =
        Listed::open(registration(config, &listen_on)).map_err(|e| Error::unavailable(explain(&e)))?;
    Ok((server, listed))
}

fn registration(config: &EndpointConfig, listen_on: &ListenUrl) -> NetworkServiceEndpoint {
    let labels = |service: &String| {
        (service.clone(), NetworkServiceLabels { unknown: None, labels: config.labels.clone() })
    };
    NetworkServiceEndpoint {
        name: config.name.clone(),
        network_service_names: config.services.clone(),
        network_service_labels: config.services.iter().map(labels).collect(),
        url: listen_on.to_string(),
        ..NetworkServiceEndpoint::default()
    }
}

/// Holds our socket until its file is held.
struct TemporaryDirectory(PathBuf);

impl TemporaryDirectory {
    fn create(name: &str) -> std::io::Result<Self> {
        // A socket's path has at most 107 bytes, and a name may hold what a path must not.
        let short: String = name.chars().filter(char::is_ascii_alphanumeric).take(32).collect();
        let path = std::env::temp_dir().join(format!("nsm-{short}-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryDirectory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "not removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::{connection::Connection, networkservice::NetworkServiceRequest};
    use nsm_mesh::{Call, chain};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_ends_when_nobody_has_had_a_wire_for_so_long() {
        let connections = Connections::serving("nse", chain![], Arc::default());
        let (most, begin) = (Duration::from_secs(100), Instant::now());
        idle(&connections, Some(most)).await;
        assert!(begin.elapsed() >= most, "from the start too");
        let connection = Connection { id: "c".into(), network_service: "s".into(), ..Connection::default() };
        let request =
            NetworkServiceRequest { connection: Some(connection), ..NetworkServiceRequest::default() };
        let answer = connections.request(Call::default(), request).await.unwrap();
        let waits = tokio::time::timeout(most * 10, idle(&connections, Some(most)));
        waits.await.expect_err("somebody has one");
        connections.close(Call::default(), answer.connection).await.unwrap();
        idle(&connections, Some(most)).await;
        tokio::time::timeout(most * 10, idle(&connections, None)).await.expect_err("not asked for");
    }
}
