//! Directories that hold what they are told: the registry's own, and a manager's without a registry.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use nsm_api::{
    payload,
    pb::registry::{NetworkService, NetworkServiceEndpoint},
};
use nsm_transport::Peer;
use tokio::{task::JoinHandle, time::Instant};
use tracing::info;

use crate::{
    Error,
    expiry::{Timers, expiration_time, time_of, timestamp_of},
    server::{Context, Directory, Events},
    store::{Item, Store},
};

/// Services. Those that came without a path are the operator's; the front protects them.
#[derive(Debug, Default)]
pub(crate) struct Services {
    store: Store<NetworkService>,
}

/// Endpoints, each until its expiration time.
#[derive(Debug)]
pub(crate) struct Endpoints {
    store: Store<NetworkServiceEndpoint>,
    timers: Arc<Timers>,
    lifetime: Duration,
    expiring: JoinHandle<()>,
}

impl Services {
    pub(crate) fn new(operators: impl IntoIterator<Item = NetworkService>) -> Self {
        let services = Self::default();
        for service in operators {
            services.store.put(with_payload(NetworkService { path_ids: Vec::new(), ..service }));
        }
        services
    }
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
        self.store.get(name)
    }

    async fn register(&self, _: &mut Context, service: NetworkService) -> Result<NetworkService, Error> {
        let service = with_payload(service);
        self.store.put(service.clone());
        Ok(service)
    }

    async fn unregister(&self, _: &mut Context, service: NetworkService) -> Result<(), Error> {
        self.store.remove(&service.name);
        Ok(())
    }

    async fn find(
        &self,
        query: NetworkService,
        watch: bool,
        _: Option<&Peer>,
    ) -> Result<Events<NetworkService>, Error> {
        Ok(events(&self.store, query, watch))
    }
}

impl Endpoints {
    /// Needs a runtime: a task of it ends what expires.
    pub(crate) fn new(lifetime: Duration) -> Self {
        let store = Store::<NetworkServiceEndpoint>::default();
        let timers = Arc::new(Timers::default());
        let expiring = tokio::spawn({
            let (store, timers) = (store.clone(), timers.clone());
            async move {
                timers
                    .run(|name| {
                        // The name is free for anybody from here on.
                        store.remove(name);
                        info!(name, "an endpoint was not refreshed and has expired");
                    })
                    .await;
            }
        });
        Self { store, timers, lifetime, expiring }
    }
}

impl Drop for Endpoints {
    fn drop(&mut self) {
        self.expiring.abort();
    }
}

#[async_trait]
impl Directory<NetworkServiceEndpoint> for Endpoints {
    fn known(&self, name: &str) -> Option<Arc<NetworkServiceEndpoint>> {
        self.store.get(name)
    }

    async fn register(
        &self,
        cx: &mut Context,
        mut endpoint: NetworkServiceEndpoint,
    ) -> Result<NetworkServiceEndpoint, Error> {
        let now = SystemTime::now();
        let left = cx.time_to_live(&mut endpoint, self.lifetime, now)?;
        let known = self.store.get(&endpoint.name);
        endpoint.initial_registration_time = known
            .and_then(|known| known.initial_registration_time)
            .or(endpoint.initial_registration_time)
            .or_else(|| Some(timestamp_of(now)));
        self.timers.set(&endpoint.name, Instant::now() + left, || {
            self.store.put(endpoint.clone());
        });
        Ok(endpoint)
    }

    async fn unregister(&self, _: &mut Context, endpoint: NetworkServiceEndpoint) -> Result<(), Error> {
        self.timers.clear(&endpoint.name, || {
            self.store.remove(&endpoint.name);
        });
        Ok(())
    }

    async fn find(
        &self,
        query: NetworkServiceEndpoint,
        watch: bool,
        _: Option<&Peer>,
    ) -> Result<Events<NetworkServiceEndpoint>, Error> {
        Ok(events(&self.store, query, watch))
    }
}

impl Context {
    /// Limits an endpoint's expiration time (spec/registry.md 2.7) and returns how long it lives.
    pub(crate) fn time_to_live(
        &self,
        endpoint: &mut NetworkServiceEndpoint,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Duration, Error> {
        let requested = endpoint.expiration_time.as_ref().map(time_of);
        let end = expiration_time(now, requested, self.token_ends.iter().copied(), lifetime);
        endpoint.expiration_time = Some(timestamp_of(end));
        let left = end.duration_since(now).ok().filter(|left| !left.is_zero());
        left.ok_or_else(|| Error::AlreadyOver { name: endpoint.name.clone() })
    }
}

fn events<T: Item>(store: &Store<T>, query: T, watch: bool) -> Events<T> {
    if watch {
        // A watch of a store only ends when its reader was too slow.
        let end = stream::iter([Err(Error::TooSlow)]);
        return store.watch(query).map(|event| Ok(((*event.item).clone(), event.deleted))).chain(end).boxed();
    }
    stream::iter(store.find(&query)).map(|item| Ok(((*item).clone(), false))).boxed()
}
