//! Where a registry keeps what is registered, and the directories before it.
//!
//! A registry's rules are the same whatever keeps its objects: payloads, lifetimes and look-ups are here. A keeper is
//! memory, or a place that other registries and people write to as well.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use nsm_api::{
    payload,
    pb::registry::{NetworkService, NetworkServiceEndpoint},
};
use nsm_identity::clock;
use nsm_transport::Peer;

use crate::{
    Error,
    expiry::{expiration_time, time_of, timestamp_of},
    memory::Expiring,
    server::{Context, Directory, Events},
    store::{Item, Store},
};

/// What keeps objects. Those without a path are the operator's; whoever asks it has checked what may be done to them.
#[async_trait]
pub trait Keeper<T: Item>: fmt::Debug + Send + Sync + 'static {
    /// What is kept, as far as this process knows; it follows every change. Look-ups are answered from it.
    fn table(&self) -> &Store<T>;

    /// Keeps an object, in place of the one of its name, and returns it as it is kept. The table has it then.
    ///
    /// # Errors
    /// [`Error::Changed`] if the name does not stand for what the table said, which knows better now: whether this may
    /// be done is to be asked again.
    async fn put(&self, item: T) -> Result<T, Error>;

    /// Forgets the object of this name, also if the table does not have it.
    ///
    /// # Errors
    /// As [`Keeper::put`].
    async fn remove(&self, name: &str) -> Result<(), Error>;

    /// Whether it chooses a name for what has none.
    fn names(&self) -> bool {
        false
    }
}

/// A table is a keeper by itself.
#[async_trait]
impl<T: Item + fmt::Debug> Keeper<T> for Store<T> {
    fn table(&self) -> &Store<T> {
        self
    }

    async fn put(&self, item: T) -> Result<T, Error> {
        Store::put(self, item.clone());
        Ok(item)
    }

    async fn remove(&self, name: &str) -> Result<(), Error> {
        Store::remove(self, name);
        Ok(())
    }
}

/// The keepers of a registry.
#[derive(Debug, Clone)]
pub struct Keepers {
    /// Of services.
    pub services: Arc<dyn Keeper<NetworkService>>,
    /// Of endpoints, each until its expiration time.
    pub endpoints: Arc<dyn Keeper<NetworkServiceEndpoint>>,
}

impl Keepers {
    /// Memory, which begins with these services of the operator. Needs a runtime: a task of it ends what expires.
    #[must_use]
    pub fn memory(operators: impl IntoIterator<Item = NetworkService>) -> Self {
        let services = Store::default();
        for service in operators {
            services.put(with_payload(NetworkService { path_ids: Vec::new(), ..service }));
        }
        Self { services: Arc::new(services), endpoints: Arc::new(Expiring::new()) }
    }
}

/// Services before their keeper.
#[derive(Debug)]
pub(crate) struct Services(pub(crate) Arc<dyn Keeper<NetworkService>>);

/// Endpoints before their keeper.
#[derive(Debug)]
pub(crate) struct Endpoints {
    pub(crate) keeper: Arc<dyn Keeper<NetworkServiceEndpoint>>,
    /// How long one lives without a refresh, at most.
    pub(crate) lifetime: Duration,
}

/// spec/registry.md 2.5: an empty payload means IP.
fn with_payload(mut service: NetworkService) -> NetworkService {
    if service.payload.is_empty() {
        payload::IP.clone_into(&mut service.payload);
    }
    service
}

#[async_trait]
impl Directory<NetworkService> for Services {
    fn known(&self, name: &str) -> Option<Arc<NetworkService>> {
        self.0.table().get(name)
    }

    fn names(&self) -> bool {
        self.0.names()
    }

    async fn register(&self, _: &mut Context, service: NetworkService) -> Result<NetworkService, Error> {
        self.0.put(with_payload(service)).await
    }

    async fn unregister(&self, _: &mut Context, service: NetworkService) -> Result<(), Error> {
        self.0.remove(&service.name).await
    }

    async fn find(
        &self,
        query: NetworkService,
        watch: bool,
        _: Option<&Peer>,
    ) -> Result<Events<NetworkService>, Error> {
        Ok(events(self.0.table(), query, watch))
    }
}

#[async_trait]
impl Directory<NetworkServiceEndpoint> for Endpoints {
    fn known(&self, name: &str) -> Option<Arc<NetworkServiceEndpoint>> {
        self.keeper.table().get(name)
    }

    async fn register(
        &self,
        cx: &mut Context,
        mut endpoint: NetworkServiceEndpoint,
    ) -> Result<NetworkServiceEndpoint, Error> {
        let now = clock::now();
        cx.limit_expiration_time(&mut endpoint, self.lifetime, now)?;
        let known = self.known(&endpoint.name);
        endpoint.initial_registration_time = known
            .and_then(|known| known.initial_registration_time)
            .or(endpoint.initial_registration_time)
            .or_else(|| Some(timestamp_of(now)));
        self.keeper.put(endpoint).await
    }

    async fn unregister(&self, _: &mut Context, endpoint: NetworkServiceEndpoint) -> Result<(), Error> {
        self.keeper.remove(&endpoint.name).await
    }

    async fn find(
        &self,
        query: NetworkServiceEndpoint,
        watch: bool,
        _: Option<&Peer>,
    ) -> Result<Events<NetworkServiceEndpoint>, Error> {
        Ok(events(self.keeper.table(), query, watch))
    }
}

impl Context {
    /// Limits an endpoint's expiration time (spec/registry.md 2.7).
    pub(crate) fn limit_expiration_time(
        &self,
        endpoint: &mut NetworkServiceEndpoint,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<(), Error> {
        let requested = endpoint.expiration_time.as_ref().map(time_of);
        let end = expiration_time(now, requested, self.token_ends.iter().copied(), lifetime);
        endpoint.expiration_time = Some(timestamp_of(end));
        if end > now { Ok(()) } else { Err(Error::AlreadyOver { name: endpoint.name.clone() }) }
    }
}

fn events<T: Item>(table: &Store<T>, query: T, watch: bool) -> Events<T> {
    if watch {
        // A watch of a table only ends when its reader was too slow.
        let end = stream::iter([Err(Error::TooSlow)]);
        return table.watch(query).map(|event| Ok(((*event.item).clone(), event.deleted))).chain(end).boxed();
    }
    stream::iter(table.find(&query)).map(|item| Ok(((*item).clone(), false))).boxed()
}
