//! The short way into the mesh: a program that is what its environment says.
//!
//! Every program of the mesh is told the same by its environment: `NSM_NAME`, its name in paths, unique in the mesh;
//! `NSM_CONNECT_TO`, the manager of its node; `SPIFFE_ENDPOINT_SOCKET`, where its identity comes from. A client:
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use nsm_sdk::Program;
//!
//! let client = Program::from_env().await?.client()?;
//! let wire = client.request(0, &"kernel://web/nsm0".parse()?).await?;
//! println!("{:?}", wire.connection().context);
//! Program::until_signal().await?;
//! wire.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! An endpoint is a chain that ends here; what it does beside giving addresses is an element of its own:
//!
//! ```no_run
//! use nsm_sdk::{Context, Element, Next, Program, Result, chain, ipam::Ipam};
//! use nsm_sdk::pb::{connection::Connection, networkservice::NetworkServiceRequest};
//!
//! /// Says who has come.
//! #[derive(Debug)]
//! struct Greet;
//!
//! #[async_trait::async_trait]
//! impl Element for Greet {
//!     fn name(&self) -> &'static str {
//!         "greet"
//!     }
//!
//!     async fn request(&self, cx: &mut Context<'_>, request: NetworkServiceRequest, next: Next<'_>) -> Result<Connection> {
//!         let conn = next.request(cx, request).await?;
//!         println!("welcome, {}", conn.id);
//!         Ok(conn)
//!     }
//! }
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let serving = Program::from_env().await?.serving("web")?;
//! let chain = chain![
//!     serving.authorize(),                                             // who asks
//!     serving.monitor(),                                               // what becomes of each wire
//!     Ipam::new(&"172.16.1.0/24".parse()?, Default::default()),        // addresses
//!     Greet,
//!     serving.end(),                                                   // where our end appears
//! ];
//! serving.run(chain).await?;
//! # Ok(())
//! # }
//! ```

use std::{collections::BTreeMap, env, sync::Arc, time::Duration};

use nsm_identity::{Source, token::DEFAULT_MAX_LIFETIME};
use nsm_mesh::{
    Chain, Error, NextHop, Result,
    auth::Authorize,
    dial::Dial,
    error::explain,
    monitor::{Hub, Monitor},
};
use nsm_transport::{DialUrl, Pool, PoolConfig};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    client::{Client, ClientConfig},
    endpoint::{EndpointConfig, serve},
    liveness::Liveness,
    own_end::{OwnNamespace, ServerEnd},
};

/// Where a node's manager listens, unless `NSM_CONNECT_TO` says something else.
pub const MANAGER: &str = "unix:///var/lib/networkservicemesh/nsm.io.sock";
/// How long connecting to the manager may take.
const DIAL: Duration = Duration::from_secs(5);
/// How long one try of a request may take.
const REQUEST: Duration = Duration::from_secs(15);

/// A program of the mesh, with what its environment says.
#[derive(Debug, Clone)]
pub struct Program {
    /// Its name in paths, unique in the mesh.
    pub name: String,
    /// The manager of its node.
    pub manager: DialUrl,
    /// Its identity, renewed as long as it runs.
    pub source: Source,
}

/// An endpoint or a network function that is being put together.
#[derive(Debug)]
pub struct Serving {
    /// What it is and where it registers, to be changed at will.
    pub config: EndpointConfig,
    namespace: OwnNamespace,
    hub: Arc<Hub>,
    source: Source,
    pool: Pool,
}

impl Program {
    /// As the environment says. Waits until there is an identity.
    ///
    /// # Errors
    /// A variable that is missing or makes no sense: the error names it.
    pub async fn from_env() -> Result<Self> {
        let name = env::var("NSM_NAME").ok().filter(|name| !name.is_empty()).ok_or_else(|| {
            Error::invalid("NSM_NAME is not set")
                .hint("set it to a name that no other program of the mesh has")
        })?;
        let manager = env::var("NSM_CONNECT_TO").unwrap_or_else(|_| MANAGER.to_owned());
        let manager = manager.parse().map_err(|e| {
            Error::invalid(format!("NSM_CONNECT_TO is {manager:?}: {e}"))
                .hint(format!("set it to the URL of the node's manager, for example {MANAGER}"))
        })?;
        let source = Source::from_env().await.map_err(|e| {
            Error::invalid(format!("no identity: {}", explain(&e)))
                .hint("SPIFFE_ENDPOINT_SOCKET names the socket of the SPIFFE Workload API, for example that of `nsm identity`")
        })?;
        Ok(Self { name, manager, source })
    }

    /// A client whose wires end in the network namespace of the calling thread, and are probed there.
    ///
    /// # Errors
    /// The namespace cannot be opened.
    pub fn client(&self) -> Result<Arc<Client>> {
        let config = ClientConfig {
            name: self.name.clone(),
            connect_to: (&self.manager).into(),
            dial_timeout: DIAL,
            request_timeout: REQUEST,
            labels: BTreeMap::new(),
            awareness_groups: Default::default(),
            takes_over: true,
            refreshes_together: false,
            liveness: Some(Liveness::default()),
            names: None,
        };
        let pool = Pool::new(self.source.clone(), PoolConfig::default());
        Ok(Client::new(config, pool, own_namespace()?))
    }

    /// An endpoint or a function that provides `service`, with wires into the network namespace of the calling thread.
    ///
    /// # Errors
    /// The namespace cannot be opened.
    pub fn serving(&self, service: impl Into<String>) -> Result<Serving> {
        let config = EndpointConfig {
            name: self.name.clone(),
            connect_to: self.manager.clone(),
            listen_on: None,
            services: vec![service.into()],
            labels: BTreeMap::new(),
            register_payload: None,
            idle_timeout: None,
            dial_timeout: DIAL,
            max_token_lifetime: DEFAULT_MAX_LIFETIME,
            guard: Default::default(),
            registry_answers: Default::default(),
            metrics: Default::default(),
        };
        let hub = Arc::new(Hub::guarded(&config.guard));
        let pool = config.pool(self.source.clone());
        Ok(Serving { config, namespace: own_namespace()?, hub, source: self.source.clone(), pool })
    }

    /// Returns when INT or TERM has come.
    ///
    /// # Errors
    /// Signals cannot be caught.
    pub async fn until_signal() -> Result<()> {
        let caught =
            |kind| signal(kind).map_err(|e| Error::internal(format!("signals cannot be caught: {e}")));
        let (mut interrupt, mut terminate) =
            (caught(SignalKind::interrupt())?, caught(SignalKind::terminate())?);
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Ok(())
    }
}

impl Serving {
    /// With a label that services choose endpoints by.
    #[must_use]
    pub fn labelled(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.config.labels.insert(key.into(), value.into());
        self
    }

    /// First of a chain: checks who asks.
    #[must_use]
    pub fn authorize(&self) -> Authorize {
        self.config.authorize()
    }

    /// Second of an endpoint's chain: tells what becomes of each wire.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        Monitor { hub: Arc::clone(&self.hub), terminates: true }
    }

    /// Second of a function's chain, which goes on elsewhere.
    #[must_use]
    pub fn passing_monitor(&self) -> Monitor {
        Monitor { terminates: false, ..self.monitor() }
    }

    /// Last of an endpoint's chain: our end of each wire appears in our namespace, with addresses and routes.
    #[must_use]
    pub fn end(&self) -> ServerEnd {
        ServerEnd { namespace: self.namespace.clone(), unnumbered: false }
    }

    /// As [`Serving::end`] without addresses: for a function, which owns none.
    #[must_use]
    pub fn unnumbered_end(&self) -> ServerEnd {
        ServerEnd { unnumbered: true, ..self.end() }
    }

    /// Our network namespace, for the wires of a function towards the endpoint.
    #[must_use]
    pub fn namespace(&self) -> OwnNamespace {
        self.namespace.clone()
    }

    /// The manager of our node, which finds the next element of a chain of functions.
    #[must_use]
    pub fn manager(&self) -> NextHop {
        NextHop::from(self.config.connect_to.clone())
    }

    /// Last of a function's chain: asks the next hop.
    #[must_use]
    pub fn dial(&self) -> Dial {
        Dial::new(self.pool.clone(), &self.config.name, Arc::clone(&self.hub), self.config.dial_timeout)
    }

    /// Serves the chain until INT or TERM comes, then closes all wires.
    ///
    /// # Errors
    /// A socket that cannot be bound, or a manager that refuses the registration.
    pub async fn run(self, chain: Chain) -> Result<()> {
        let signalled = async {
            if let Err(error) = Program::until_signal().await {
                tracing::error!(%error, "stops at once");
            }
        };
        let Self { config, hub, source, pool, .. } = self;
        serve(config, chain, hub, source, pool, || tracing::info!("ready"), signalled).await
    }
}

fn own_namespace() -> Result<OwnNamespace> {
    OwnNamespace::open()
        .map_err(|e| Error::internal(format!("our own network namespace cannot be opened: {e}")))
}
