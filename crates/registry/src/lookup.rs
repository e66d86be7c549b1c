//! Look-ups as a forwarder makes them: at its manager over a connection, or in the process that both share.

use std::fmt;

use async_trait::async_trait;
use nsm_api::pb::registry::{NetworkService, NetworkServiceEndpoint};

use crate::{Client, Endpoint, Error, ManagerRegistry};

/// Who knows services and endpoints.
#[async_trait]
pub trait LookUp: fmt::Debug + Send + Sync {
    /// The network service of exactly this name; an empty `payload` fits any (spec/control-plane.md 8.1).
    ///
    /// # Errors
    /// The registry does not answer.
    async fn service(&self, name: &str, payload: &str) -> Result<Option<NetworkService>, Error>;

    /// The endpoints that answer a query (spec/registry.md 2.2).
    ///
    /// # Errors
    /// The registry does not answer.
    async fn endpoints(&self, query: NetworkServiceEndpoint) -> Result<Vec<Endpoint>, Error>;

    /// The same, asked anew where [`LookUp::endpoints`] answers from what was asked before: for whoever finds nobody among
    /// those.
    ///
    /// # Errors
    /// The registry does not answer.
    async fn endpoints_now(&self, query: NetworkServiceEndpoint) -> Result<Vec<Endpoint>, Error> {
        self.endpoints(query).await
    }

    /// The endpoint of this name was not where a look-up said: the next one asks again.
    fn doubt(&self, _name: &str) {}
}

#[async_trait]
impl LookUp for Client {
    async fn service(&self, name: &str, payload: &str) -> Result<Option<NetworkService>, Error> {
        let query =
            NetworkService { name: name.into(), payload: payload.into(), ..NetworkService::default() };
        Ok(self.find_services(query).await?.into_iter().find(|service| service.name == name))
    }

    async fn endpoints(&self, query: NetworkServiceEndpoint) -> Result<Vec<Endpoint>, Error> {
        self.find_endpoints(query).await
    }
}

#[async_trait]
impl LookUp for ManagerRegistry {
    async fn service(&self, name: &str, payload: &str) -> Result<Option<NetworkService>, Error> {
        self.find_service(name, payload).await
    }

    async fn endpoints(&self, query: NetworkServiceEndpoint) -> Result<Vec<Endpoint>, Error> {
        self.find_endpoints(query).await
    }
}
