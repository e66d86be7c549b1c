//! The gRPC front of a registry, and the registry that is served directly.
//!
//! A change goes through the same steps in every registry (spec/registry.md 3.1): bounds, path with
//! tokens, policies, one change at a time for each name, ownership, and then a [`Directory`]. It runs
//! in a task of its own, because the server drops a handler when its caller goes away, and half a
//! registration is worse than none.

use std::{
    collections::HashMap,
    fmt,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures::{Stream, StreamExt, stream::BoxStream};
use nsm_api::pb::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceQuery,
    network_service_endpoint_registry_server::{
        NetworkServiceEndpointRegistry, NetworkServiceEndpointRegistryServer,
    },
    network_service_registry_server::{NetworkServiceRegistry, NetworkServiceRegistryServer},
};
use nsm_identity::clock;
use nsm_identity::{
    Identity, Source, SpiffeId,
    policy::{self, Check, Evidence, Policies},
    token,
};
use nsm_transport::{Deadline, Guard, Limits, ListenUrl, MAX_MESSAGE, Peer, Refusals, Server, client_token};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{sync::watch, time::Instant};
use tonic::{Code, Request, Response, Status, metadata::MetadataValue, service::Routes};
use tracing::{debug, info, warn};

use crate::{
    Error, expiry,
    keeper::{Endpoints, Keepers, Services},
    lanes::Lanes,
    path::{self, RegistrationPath},
    store::Item,
};

/// The names of the gRPC services, for health.
pub const SERVICES: [&str; 2] =
    ["registry.NetworkServiceRegistry", "registry.NetworkServiceEndpointRegistry"];

/// Watches that one identity may have open at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchLimit(pub usize);

impl Default for WatchLimit {
    /// A manager holds one for each of its endpoints and clients.
    fn default() -> Self {
        Self(16_384)
    }
}

/// How a registry is served.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen.
    pub listen_on: Vec<ListenUrl>,
    /// Services of the operator: they are there from the start, and no workload changes them.
    pub services: Vec<NetworkService>,
    /// How long an endpoint lives without a refresh, at most.
    pub lifetime: Duration,
    /// Longest lifetime of tokens made here (`NSM_MAX_TOKEN_LIFETIME`).
    pub max_token_lifetime: Duration,
    /// Watches of one identity.
    pub watches: WatchLimit,
    /// What is checked of registrations (`NSM_REGISTRY_SERVER_POLICIES`), and what peers may use.
    pub guard: Guard,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen_on: Vec::new(),
            services: Vec::new(),
            lifetime: expiry::DEFAULT_LIFETIME,
            max_token_lifetime: token::DEFAULT_MAX_LIFETIME,
            watches: WatchLimit::default(),
            guard: Guard::default(),
        }
    }
}

/// A registry in memory whose sockets are bound: peers can connect from now on.
#[derive(Debug)]
pub struct Registry {
    server: Server,
    directories: Directories,
    services: Front<NetworkService>,
    endpoints: Front<NetworkServiceEndpoint>,
}

/// What a registry knows, for a manager in the same process and for whoever may ask.
#[derive(Clone)]
pub struct Directories {
    pub(crate) services: Arc<dyn Directory<NetworkService>>,
    pub(crate) endpoints: Arc<dyn Directory<NetworkServiceEndpoint>>,
    /// Changes of a name wait for each other, whichever front they come through.
    pub(crate) service_lanes: Lanes,
    pub(crate) endpoint_lanes: Lanes,
}

impl fmt::Debug for Directories {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Directories").finish_non_exhaustive()
    }
}

impl Directories {
    /// Of what these keep; endpoints live for `lifetime` at most.
    pub(crate) fn of(keepers: Keepers, lifetime: Duration) -> Self {
        Self {
            services: Arc::new(Services(keepers.services)),
            endpoints: Arc::new(Endpoints { keeper: keepers.endpoints, lifetime }),
            service_lanes: Lanes::default(),
            endpoint_lanes: Lanes::default(),
        }
    }

    /// Makes the services of the operator those of `now` that were those of `before`: what is new or has changed is theirs
    /// from here on, and what is gone goes, unless it is a workload's by now.
    pub async fn change_operators(&self, before: &[NetworkService], now: &[NetworkService]) {
        let gone = before.iter().filter(|old| now.iter().all(|new| new.name != old.name));
        let changed = now.iter().filter(|new| !before.contains(new));
        for (service, stays) in gone.map(|old| (old, false)).chain(changed.map(|new| (new, true))) {
            let operators = NetworkService { path_ids: Vec::new(), ..service.clone() };
            let name = operators.name.clone();
            // Without a deadline nothing stops us from having our turn.
            let Ok(_lane) = self.service_lanes.enter(&name, None).await else { continue };
            let cx = &mut Context::own(RegistrationPath::default());
            let done = match self.services.known(&name) {
                Some(known) if !stays && known.path_ids.is_empty() => {
                    self.services.unregister(cx, operators).await
                }
                _ if stays => self.services.register(cx, operators).await.map(drop),
                _ => Ok(()),
            };
            match done {
                Ok(()) => info!(name, stays, "the operator has changed a network service"),
                Err(reason) => {
                    warn!(name, %reason, "what the operator says of a network service is not kept")
                }
            }
        }
    }

    /// All services.
    pub async fn services(&self) -> Vec<NetworkService> {
        all(&*self.services, NetworkService::default()).await
    }

    /// All endpoints.
    pub async fn endpoints(&self) -> Vec<NetworkServiceEndpoint> {
        all(&*self.endpoints, NetworkServiceEndpoint::default()).await
    }
}

/// What answers a query now; what cannot be told is left out.
async fn all<T: Item>(directory: &dyn Directory<T>, query: T) -> Vec<T> {
    match directory.find(query, false, None).await {
        Ok(found) => found.filter_map(async |event| event.ok().map(|(item, _)| item)).collect().await,
        Err(reason) => {
            debug!(%reason, "the directory does not tell");
            Vec::new()
        }
    }
}

impl Registry {
    /// Binds the sockets of a registry that keeps everything in memory. Needs a tokio runtime.
    ///
    /// # Errors
    /// One of the URLs cannot be bound.
    pub async fn bind(mut config: Config, source: Source) -> Result<Self, Error> {
        let keepers = Keepers::memory(std::mem::take(&mut config.services));
        Self::bind_before(keepers, config, source).await
    }

    /// Binds the sockets of a registry before keepers of their own; `services` of the configuration are theirs to know.
    ///
    /// # Errors
    /// One of the URLs cannot be bound.
    pub async fn bind_before(keepers: Keepers, config: Config, source: Source) -> Result<Self, Error> {
        let server = Server::bind(source, &config.listen_on).await?;
        // A manager's watches all share one connection.
        let limits = Limits { calls: config.guard.limits.calls.max(65_536), ..config.guard.limits };
        let server = server.guarded(&config.guard).with_limits(limits);
        let directories = Directories::of(keepers, config.lifetime);
        let (watches, policies, lifetime) =
            (&config.watches, &config.guard.policies, config.max_token_lifetime);
        Ok(Self {
            services: Front::new(
                directories.services.clone(),
                watches,
                policies,
                lifetime,
                directories.service_lanes.clone(),
            ),
            endpoints: Front::new(
                directories.endpoints.clone(),
                watches,
                policies,
                lifetime,
                directories.endpoint_lanes.clone(),
            ),
            server,
            directories,
        })
    }

    /// What it knows, for a manager in the same process: [`crate::Cluster::Inside`].
    #[must_use]
    pub fn directories(&self) -> Directories {
        self.directories.clone()
    }

    /// The URLs as they were bound.
    #[must_use]
    pub fn urls(&self) -> Vec<ListenUrl> {
        self.server.urls()
    }

    /// Serves until `shutdown` is done.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) {
        self.serve_beside(Routes::default(), &[], shutdown).await;
    }

    /// Serves until `shutdown` is done, and `routes`, whose services are called `names`, as well.
    pub async fn serve_beside(
        self,
        routes: Routes,
        names: &[&str],
        shutdown: impl Future<Output = ()> + Send,
    ) {
        let (services, endpoints) = (self.services.clone(), self.endpoints.clone());
        let routes = routes
            .add_service(
                NetworkServiceRegistryServer::new(self.services).max_decoding_message_size(MAX_MESSAGE),
            )
            .add_service(
                NetworkServiceEndpointRegistryServer::new(self.endpoints)
                    .max_decoding_message_size(MAX_MESSAGE),
            );
        let shutdown = async move {
            shutdown.await;
            // A watch has no end of its own: without this, every shutdown would wait for the watchers.
            services.end_watches();
            endpoints.end_watches();
        };
        self.server.serve(routes, &[&SERVICES, names].concat(), shutdown).await;
    }
}

/// What stands behind a front.
#[async_trait]
pub(crate) trait Directory<T: Item>: Send + Sync + 'static {
    /// The registration of a name that is accepted here, with its owner.
    fn known(&self, name: &str) -> Option<Arc<T>>;
    /// Whether it chooses a name for what has none.
    fn names(&self) -> bool {
        false
    }
    /// Registers an object in place of the one of its name. [`Error::Changed`] says that what is known was not what is.
    async fn register(&self, cx: &mut Context, item: T) -> Result<T, Error>;
    /// Removes the object of this name, also if it is not known here.
    async fn unregister(&self, cx: &mut Context, item: T) -> Result<(), Error>;
    /// What answers a query. `peer` is the one who asks, if it is not this process itself.
    async fn find(&self, query: T, watch: bool, peer: Option<&Peer>) -> Result<Events<T>, Error>;
}

/// Objects that answer a query, or that are gone (`true`).
pub(crate) type Events<T> = BoxStream<'static, Result<(T, bool), Error>>;

/// What is known of a change besides the object.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// The path, with this process as its current segment.
    pub(crate) path: RegistrationPath,
    /// Who asked; nobody, when this process ends something itself.
    pub(crate) peer: Option<Peer>,
    /// When the one who asked gives up.
    pub(crate) deadline: Option<Instant>,
    /// When the caller's token and our own end.
    pub(crate) token_ends: Vec<SystemTime>,
    /// The name is registered here already.
    pub(crate) known: bool,
    /// Who we were towards the next registry, if there was one.
    pub(crate) spoke_as: Option<Arc<Identity>>,
}

impl Context {
    /// For what this process does by itself.
    pub(crate) fn own(path: RegistrationPath) -> Self {
        Self { path, peer: None, deadline: None, token_ends: Vec::new(), known: true, spoke_as: None }
    }

    /// The path for the answer.
    ///
    /// The next registry has put our token for it into our segment, signed by what we presented
    /// *there*. The caller checks it with what we presented to *him*, which differs while an SVID is
    /// renewed: then it is signed again.
    fn answer_path(&self, asker: usize, max_lifetime: Duration) -> RegistrationPath {
        let mut path = RegistrationPath { index: asker, tokens: self.path.tokens.clone() };
        let (Some(spoke_as), Some(peer)) = (&self.spoke_as, &self.peer) else { return path };
        if Arc::ptr_eq(spoke_as, peer.identity()) {
            return path;
        }
        let next = path.tokens.get(asker + 2).and_then(|jwt| token::claims(jwt).ok());
        let next = next.and_then(|claims| claims.subject.parse::<SpiffeId>().ok());
        let own = token::mint(peer.identity().svid(), next.as_ref(), None, max_lifetime, clock::now());
        match (own, path.tokens.get_mut(asker + 1)) {
            (Ok(own), Some(segment)) => own.jwt().clone_into(segment),
            (Err(reason), _) => debug!(%reason, "our token cannot be signed again"),
            _ => {}
        }
        path
    }
}

/// The front of a directory, for one kind of object. Clones share it.
pub(crate) struct Front<T: Item>(Arc<Shared<T>>);

struct Shared<T: Item> {
    directory: Arc<dyn Directory<T>>,
    lanes: Lanes,
    max_token_lifetime: Duration,
    watch_limit: usize,
    policies: Arc<Policies>,
    watches: Arc<Mutex<HashMap<SpiffeId, usize>>>,
    end_watches: watch::Sender<bool>,
}

impl<T: Item> Clone for Front<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Item> std::fmt::Debug for Front<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Front").field("kind", &T::KIND).finish_non_exhaustive()
    }
}

/// How often a change is tried again because others changed the same name: each of theirs succeeded.
const TRIES: usize = 16;

/// A change that the policies let pass.
struct Admitted {
    cx: Context,
    /// The index to put back into the answer's path.
    asker: usize,
    /// The subjects of the path's tokens.
    path_ids: Vec<String>,
}

impl<T: Item> Front<T> {
    /// `lanes` are the turns that changes of a name take: those of everybody who changes this directory.
    pub(crate) fn new(
        directory: Arc<dyn Directory<T>>,
        watches: &WatchLimit,
        policies: &Arc<Policies>,
        max_token_lifetime: Duration,
        lanes: Lanes,
    ) -> Self {
        Self(Arc::new(Shared {
            directory,
            lanes,
            max_token_lifetime,
            watch_limit: watches.0,
            policies: policies.clone(),
            watches: Arc::default(),
            end_watches: watch::Sender::new(false),
        }))
    }

    /// Ends all watches, those that are opened later included.
    pub(crate) fn end_watches(&self) {
        self.0.end_watches.send_replace(true);
    }

    async fn register(&self, request: Request<T>) -> Result<Response<T>, Status> {
        let Admitted { mut cx, asker, path_ids } = self.admit(&request, self.0.directory.names())?;
        let item = request.into_inner();
        let shared = self.0.clone();
        run(async move {
            let _lane = shared.lanes.enter(item.name(), cx.deadline).await?;
            let anybody = !shared.policies.makes(Check::ClientAllowed);
            let mut tries = TRIES;
            let answer = loop {
                let known = shared.directory.known(item.name());
                cx.known = known.is_some();
                match standing(known.as_deref(), &item, &path_ids) {
                    Ok(true) => {}
                    Err(_) if anybody => {}
                    // Whoever registers a service that exists as it is gets what it wants.
                    Ok(false) => break known.map_or(item, |known| (*known).clone()),
                    Err(denial) => return Err(denial.into()),
                }
                let mut item = item.clone();
                item.set_path_ids(path_ids.clone());
                match shared.directory.register(&mut cx, item).await {
                    Err(Error::Changed { .. }) if tries > 0 => tries -= 1,
                    answer => break answer?,
                }
            };
            Ok(respond(answer, &cx.answer_path(asker, shared.max_token_lifetime)))
        })
        .await
    }

    async fn unregister(&self, request: Request<T>) -> Result<Response<()>, Status> {
        let Admitted { mut cx, asker, path_ids } = self.admit(&request, false)?;
        let item = request.into_inner();
        let shared = self.0.clone();
        run(async move {
            let _lane = shared.lanes.enter(item.name(), cx.deadline).await?;
            let anybody = !shared.policies.makes(Check::ClientAllowed);
            let mut tries = TRIES;
            loop {
                let known = shared.directory.known(item.name());
                cx.known = known.is_some();
                // As registered: callers may send the name only.
                let mut item = known.as_deref().unwrap_or(&item).clone();
                if let Some(known) = known {
                    if known.path_ids().is_empty() {
                        info!(kind = T::KIND, name = known.name(), "it stays: it is the operator's");
                        break;
                    }
                    owned(&*known, &path_ids).or_else(|denial| if anybody { Ok(()) } else { Err(denial) })?;
                }
                item.set_path_ids(path_ids.clone());
                match shared.directory.unregister(&mut cx, item).await {
                    Err(Error::Changed { .. }) if tries > 0 => tries -= 1,
                    done => break done?,
                }
            }
            Ok(respond((), &cx.answer_path(asker, shared.max_token_lifetime)))
        })
        .await
    }

    async fn find(&self, request: Request<T::Query>) -> Result<Response<Found<T>>, Status> {
        let peer = Peer::of(&request)?.clone();
        let refusals = request.extensions().get::<Refusals>().cloned().unwrap_or_default();
        let (query, watch) = T::query(request.into_inner());
        check(&query)?;
        let open = watch.then(|| self.count_watch(peer.id())).transpose()?;
        let events = self.0.directory.find(query, watch, Some(&peer)).await?;
        let mut end = self.0.end_watches.subscribe();
        let end = async move {
            // The sender is as old as the front, and the front outlives its streams.
            let _ = end.wait_for(|end| *end).await;
        };
        let found = events.map(move |event| {
            let _counted = &open;
            if matches!(event, Err(Error::TooSlow)) {
                refusals.count(Code::Aborted, "slow_reader");
            }
            event.map(|(item, deleted)| item.to_response(deleted)).map_err(Status::from)
        });
        Ok(Response::new(if watch { Box::pin(found.take_until(end)) } else { Box::pin(found) }))
    }

    /// Everything that is checked before a change waits for its turn.
    fn admit(&self, request: &Request<T>, unnamed: bool) -> Result<Admitted, Error> {
        let peer = Peer::of(request)?.clone();
        let item = request.get_ref();
        if item.name().is_empty() && !unnamed {
            return Err(Error::NoName { kind: T::KIND });
        }
        check(item)?;
        let now = clock::now();
        let caller = client_token(request.metadata());
        let own = peer.token(self.0.max_token_lifetime, now);
        let own = own.map_err(|e| Error::NoToken { peer: peer.id().to_string(), source: Arc::new(e) })?;
        let mut path = RegistrationPath::default();
        let mut asker = 0;
        // If several values arrive the last one counts. Without a usable one nothing is handled, and
        // the policies refuse what nobody signed for.
        match request.metadata().get_all(path::HEADER).iter().next_back().map(|value| value.to_str()) {
            Some(Ok(header)) => {
                path = RegistrationPath::decode(header)?;
                asker = path.step(caller.as_ref().map_or("", |token| token.jwt()), own.jwt())?;
            }
            header => debug!(peer = %peer.id(), missing = header.is_none(), "a registration without a path"),
        }
        let denied = |denial| {
            warn!(%peer, kind = T::KIND, name = item.name(), %denial, "a registration is refused");
            Error::Denied(denial)
        };
        let evidence = Evidence {
            index: path.index,
            peer: peer.leaf(),
            trusted: peer.identity().bundles(),
            signers: None,
            now,
        };
        let known = || self.0.directory.known(item.name());
        self.0
            .policies
            .check_server(&path.tokens, evidence, || {
                let known = known();
                let owner = known.as_ref().map(|known| known.path_ids());
                document(&path.tokens, path.index, &peer, (item.name(), owner))
            })
            .map_err(denied)?;
        let subject = |jwt: &String| token::claims(jwt).map(|claims| claims.subject).unwrap_or_default();
        let path_ids = path.tokens.iter().map(subject).collect();
        Ok(Admitted {
            asker,
            path_ids,
            cx: Context {
                path,
                deadline: Deadline::of(request).map(|deadline| deadline.0),
                token_ends: caller.iter().chain([&own]).map(|token| token.expires()).collect(),
                peer: Some(peer),
                known: false,
                spoke_as: None,
            },
        })
    }

    fn count_watch(&self, id: &SpiffeId) -> Result<OpenWatch, Error> {
        let limit = self.0.watch_limit;
        let mut watches = self.0.watches.lock();
        let open = watches.entry(id.clone()).or_default();
        if *open >= limit {
            return Err(Error::TooManyWatches { id: id.to_string(), limit });
        }
        *open += 1;
        Ok(OpenWatch { id: id.clone(), watches: self.0.watches.clone() })
    }
}

/// What an operator's policies see of a registration: upstream's document (spec/registry.md 2.9.3). Of the owners of
/// names it holds the one that is asked for, with the path ids of who registered it.
pub(crate) fn document(
    tokens: &[String],
    index: usize,
    peer: &Peer,
    (name, owner): (&str, Option<&[String]>),
) -> Value {
    let subject = tokens.first().and_then(|jwt| token::claims(jwt).ok()).map(|claims| claims.subject);
    let owners: serde_json::Map<_, _> = owner.map(|ids| (name.to_owned(), json!(ids))).into_iter().collect();
    json!({
        "resource_id": subject.unwrap_or_default(),
        "resource_name": name,
        "resource_path_ids_map": owners,
        "path_segments": tokens.iter().map(|jwt| json!({"token": jwt})).collect::<Vec<_>>(),
        "index": index,
        "auth_info": {"certificate": peer.leaf().pem()},
    })
}

/// Counts a watch for as long as it lives.
struct OpenWatch {
    id: SpiffeId,
    watches: Arc<Mutex<HashMap<SpiffeId, usize>>>,
}

impl Drop for OpenWatch {
    fn drop(&mut self) {
        let mut watches = self.watches.lock();
        if let Some(open) = watches.get_mut(&self.id) {
            *open -= 1;
            if *open == 0 {
                watches.remove(&self.id);
            }
        }
    }
}

fn check<T: Item>(item: &T) -> Result<(), Error> {
    item.check()?;
    let names = [item.name()].into_iter().chain(item.services().iter().map(String::as_str));
    match names.into_iter().find(|name| name.contains('@')) {
        Some(name) => Err(Error::Interdomain { name: name.to_owned() }),
        None => Ok(()),
    }
}

/// May the caller put `item` in place of what is known? `Ok(false)`: it need not, what is there is
/// the operator's or does all that it asks for.
fn standing<T: Item>(known: Option<&T>, item: &T, path_ids: &[String]) -> Result<bool, policy::Denial> {
    match known {
        Some(known) if known.path_ids().is_empty() => {
            if !item.is_served_by(known) {
                warn!(
                    kind = T::KIND,
                    name = item.name(),
                    by = path_ids.first(),
                    "the operator's definition stands"
                );
            }
            Ok(false)
        }
        Some(known) => match owned(known, path_ids) {
            Ok(()) => Ok(true),
            Err(_) if item.is_served_by(known) => Ok(false),
            Err(denial) => Err(denial),
        },
        None => Ok(true),
    }
}

fn owned<T: Item>(known: &T, path_ids: &[String]) -> Result<(), policy::Denial> {
    let caller = path_ids.first().map_or("", String::as_str);
    policy::client_allowed(known.name(), Some(known.path_ids()), caller)
}

/// Runs a change to its end, whoever still waits for it.
async fn run<R: Send + 'static>(
    change: impl Future<Output = Result<R, Error>> + Send + 'static,
) -> Result<R, Status> {
    match tokio::spawn(change).await {
        Ok(result) => result.map_err(Status::from),
        Err(_) => Err(Error::Panicked.into()),
    }
}

/// An answer with the path in its initial metadata.
fn respond<R>(answer: R, path: &RegistrationPath) -> Response<R> {
    let mut response = Response::new(answer);
    match MetadataValue::try_from(path.encode()) {
        Ok(mut header) => {
            header.set_sensitive(true);
            response.metadata_mut().insert(path::HEADER, header);
        }
        Err(_) => debug!("a path is no header"),
    }
    response
}

type Found<T> = Pin<Box<dyn Stream<Item = Result<<T as Item>::Response, Status>> + Send>>;

#[tonic::async_trait]
impl NetworkServiceRegistry for Front<NetworkService> {
    type FindStream = Found<NetworkService>;

    async fn register(&self, request: Request<NetworkService>) -> Result<Response<NetworkService>, Status> {
        Front::register(self, request).await
    }

    async fn find(
        &self,
        request: Request<NetworkServiceQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        Front::find(self, request).await
    }

    async fn unregister(&self, request: Request<NetworkService>) -> Result<Response<()>, Status> {
        Front::unregister(self, request).await
    }
}

#[tonic::async_trait]
impl NetworkServiceEndpointRegistry for Front<NetworkServiceEndpoint> {
    type FindStream = Found<NetworkServiceEndpoint>;

    async fn register(
        &self,
        request: Request<NetworkServiceEndpoint>,
    ) -> Result<Response<NetworkServiceEndpoint>, Status> {
        Front::register(self, request).await
    }

    async fn find(
        &self,
        request: Request<NetworkServiceEndpointQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        Front::find(self, request).await
    }

    async fn unregister(&self, request: Request<NetworkServiceEndpoint>) -> Result<Response<()>, Status> {
        Front::unregister(self, request).await
    }
}
