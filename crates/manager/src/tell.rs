//! What a directory tells of the services and endpoints that it knows.

use async_trait::async_trait;
use nsm_api::{
    path,
    pb::{
        introspect::{Endpoint, Kind, Query, Service, item::What},
        registry::{Match, NetworkService, NetworkServiceEndpoint},
    },
};
use nsm_mesh::inspect::{self, Gone, Look, Teller};
use nsm_registry::{Directories, ManagerRegistry};

/// The cluster's registry, for whoever asks it.
#[derive(Debug)]
pub struct ToldOfRegistry(pub Directories);

/// A manager's view: what the registry tells it, and which of its node's endpoints are forwarders.
#[derive(Debug)]
pub struct ToldOfManager(pub ManagerRegistry);

#[async_trait]
impl Look for ToldOfRegistry {
    async fn look(&self, query: &Query, to: &Teller) -> Result<(), Gone> {
        if inspect::wants(query, Kind::Service) {
            for service in self.0.services().await {
                to.tell(What::Service(told(service))).await?;
            }
        }
        if inspect::wants(query, Kind::Endpoint) {
            for endpoint in self.0.endpoints().await {
                to.tell(What::Endpoint(endpoint_told(endpoint, false))).await?;
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Look for ToldOfManager {
    async fn look(&self, query: &Query, to: &Teller) -> Result<(), Gone> {
        // A registry that does not answer is said of the process; what is known here is told all the same.
        if inspect::wants(query, Kind::Service) {
            for service in self.0.services().await.unwrap_or_default() {
                to.tell(What::Service(told(service))).await?;
            }
        }
        if inspect::wants(query, Kind::Endpoint) {
            let forwarders: Vec<_> = self.0.forwarders().into_iter().map(|f| f.nse.name).collect();
            let found = self.0.find_endpoints(NetworkServiceEndpoint::default()).await.unwrap_or_default();
            let here = self.0.locals().into_iter().map(|local| (*local.nse).clone());
            let mut all: Vec<_> = found.into_iter().map(|endpoint| endpoint.nse).collect();
            all.extend(
                here.filter(|nse| !all.iter().any(|known| known.name == nse.name)).collect::<Vec<_>>(),
            );
            for nse in all {
                let forwards = forwarders.contains(&nse.name);
                to.tell(What::Endpoint(endpoint_told(nse, forwards))).await?;
            }
        }
        Ok(())
    }
}

fn told(service: NetworkService) -> Service {
    Service {
        matches: service.matches.iter().map(match_told).collect(),
        name: service.name,
        payload: service.payload,
        owners: service.path_ids,
    }
}

fn match_told(m: &Match) -> String {
    let routes: Vec<_> = m.routes.iter().map(|route| pairs(&route.destination_selector)).collect();
    let routes = if routes.is_empty() { "nobody".to_owned() } else { routes.join(" or ") };
    let on = m.metadata.as_ref().map(|meta| format!(", by a forwarder with {}", pairs(&meta.labels)));
    let falls = if m.fallthrough { ", else the next" } else { "" };
    format!("{} -> {routes}{}{falls}", pairs(&m.source_selector), on.unwrap_or_default())
}

fn pairs(labels: &std::collections::BTreeMap<String, String>) -> String {
    match labels.is_empty() {
        true => "any".to_owned(),
        false => labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(","),
    }
}

fn endpoint_told(nse: NetworkServiceEndpoint, forwarder: bool) -> Endpoint {
    let labels = nse.network_service_labels.iter();
    Endpoint {
        labels: labels
            .filter(|(_, entry)| !entry.labels.is_empty())
            .map(|(service, entry)| format!("{service}: {}", pairs(&entry.labels)))
            .collect(),
        name: nse.name,
        services: nse.network_service_names,
        url: nse.url,
        expires: nse.expiration_time.as_ref().map_or(0, |at| inspect::millis(path::from_timestamp(at))),
        owners: nse.path_ids,
        forwarder,
    }
}
