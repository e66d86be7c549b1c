//! Memory as a keeper of endpoints: a table and what ends what is in it.

use std::sync::Arc;

use async_trait::async_trait;
use nsm_api::pb::registry::NetworkServiceEndpoint;
use nsm_identity::clock;
use tokio::{task::JoinHandle, time::Instant};
use tracing::info;

use crate::{
    Error,
    expiry::{Timers, time_of},
    keeper::Keeper,
    store::Store,
};

/// Endpoints, each until its expiration time.
#[derive(Debug)]
pub(crate) struct Expiring {
    table: Store<NetworkServiceEndpoint>,
    timers: Arc<Timers>,
    expiring: JoinHandle<()>,
}

impl Expiring {
    /// Needs a runtime: a task of it ends what expires.
    pub(crate) fn new() -> Self {
        let table = Store::<NetworkServiceEndpoint>::default();
        let timers = Arc::new(Timers::default());
        let expiring = tokio::spawn({
            let (table, timers) = (table.clone(), timers.clone());
            async move {
                timers
                    .run(|name| {
                        // The name is free for anybody from here on.
                        table.remove(name);
                        info!(name, "an endpoint was not refreshed and has expired");
                    })
                    .await;
            }
        });
        Self { table, timers, expiring }
    }
}

impl Drop for Expiring {
    fn drop(&mut self) {
        self.expiring.abort();
    }
}

#[async_trait]
impl Keeper<NetworkServiceEndpoint> for Expiring {
    fn table(&self) -> &Store<NetworkServiceEndpoint> {
        &self.table
    }

    async fn put(&self, endpoint: NetworkServiceEndpoint) -> Result<NetworkServiceEndpoint, Error> {
        let change = || {
            self.table.put(endpoint.clone());
        };
        // The monotonic clock from here on: setting the other ends nobody's registration.
        match endpoint.expiration_time.as_ref().map(time_of) {
            Some(end) => {
                let left = end.duration_since(clock::now()).unwrap_or_default();
                self.timers.set(&endpoint.name, Instant::now() + left, change);
            }
            None => self.timers.clear(&endpoint.name, change),
        }
        Ok(endpoint)
    }

    async fn remove(&self, name: &str) -> Result<(), Error> {
        self.timers.clear(name, || {
            self.table.remove(name);
        });
        Ok(())
    }
}
