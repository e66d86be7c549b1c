//! Finds the endpoint: by its name, or by what the service's matches say of the client's labels
//! (spec/control-plane.md 8.2, 8.3).

use std::{collections::HashMap, future::Future, sync::Arc};

use async_trait::async_trait;
use nsm_api::{
    matching::Policy,
    pb::{
        connection::Connection,
        networkservice::NetworkServiceRequest,
        registry::{NetworkService, NetworkServiceEndpoint},
    },
};
use nsm_identity::clock;
use nsm_mesh::{
    Context, Element, Error, Next, NextHop, Result, Verdict,
    dial::{Silent, dialed},
    error::explain,
};
use nsm_registry::{Endpoint, LookUp};
use parking_lot::Mutex;
use tonic::Code;

/// Services whose turn is remembered.
const MAX_TURNS: usize = 4096;

/// The element. Candidates are tried in turn, starting with the next one for every new wire of a service, or with those
/// that the weights of its routes prefer.
#[derive(Debug)]
pub struct Discover {
    directory: Arc<dyn LookUp>,
    silent: Silent,
    turns: Mutex<HashMap<String, usize>>,
}

impl Discover {
    /// Asks this directory, the manager's; candidates that are silent are tried after the others.
    #[must_use]
    pub fn new(directory: Arc<dyn LookUp>, silent: Silent) -> Self {
        Self { directory, silent, turns: Mutex::default() }
    }

    async fn service(&self, cx: &Context<'_>, name: &str, payload: &str) -> Result<NetworkService> {
        in_time(cx, self.directory.service(name, payload)).await?.ok_or_else(|| {
            Error::not_found(format!("network service {name:?} is not found"))
                .hint("apply a NetworkService of that name, or start an endpoint that registers it")
        })
    }

    async fn named(&self, cx: &Context<'_>, name: &str) -> Result<Endpoint> {
        let query = NetworkServiceEndpoint { name: name.into(), ..NetworkServiceEndpoint::default() };
        let found = in_time(cx, self.directory.endpoints(query)).await?;
        found.into_iter().find(|endpoint| endpoint.nse.name == name).ok_or_else(|| {
            Error::not_found(format!("network service endpoint {name:?} not found"))
                .hint("it has not registered, or its registration has expired")
        })
    }

    /// Whoever cannot be reached may have come back elsewhere.
    fn doubt(&self, name: &str, error: &Error) {
        if error.code == Code::Unavailable {
            self.directory.doubt(name);
        }
    }

    fn turn(&self, service: &str) -> usize {
        let mut turns = self.turns.lock();
        // Services come and go; to begin anew harms no turn.
        if turns.len() >= MAX_TURNS && !turns.contains_key(service) {
            turns.clear();
        }
        let turn = turns.entry(service.to_owned()).or_default();
        std::mem::replace(turn, turn.wrapping_add(1))
    }

    async fn select(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        let service = self.service(cx, &conn.network_service, &conn.payload).await?;
        let query = NetworkServiceEndpoint {
            network_service_names: vec![service.name.clone()],
            ..NetworkServiceEndpoint::default()
        };
        service.payload.clone_into(&mut conn.payload);
        let labels = conn.labels.clone();
        let policy = Policy::lenient(&service);
        let alive = |mut endpoints: Vec<Endpoint>| {
            let now = clock::now();
            endpoints.retain(|endpoint| !endpoint.is_expired(now));
            endpoints
        };
        let mut endpoints = alive(in_time(cx, self.directory.endpoints(query.clone())).await?);
        if policy.endpoints(&labels, &endpoints).candidates.is_empty() {
            // Somebody may have come a moment ago.
            endpoints = alive(in_time(cx, self.directory.endpoints_now(query)).await?);
        }
        let selection = policy.endpoints(&labels, &endpoints);
        for endpoint in &endpoints {
            let (fits, why) = selection.reason(endpoint);
            let verdict = if fits { Verdict::Spare } else { Verdict::Refused };
            cx.trail.note(self.name(), &endpoint.nse.name, verdict, why);
        }
        if selection.candidates.is_empty() {
            return Err(Error::not_found(format!(
                "network service endpoint candidates not found: {selection}"
            ))
            .hint("start an endpoint with these labels, or change the matches of the network service"));
        }
        let mut candidates = selection.order(self.turn(&service.name));
        if !self.silent.is_empty() {
            candidates.sort_by_key(|candidate| self.silent.is_silent(&candidate.dial.clone().into()));
        }
        let mut failures: Vec<(String, Error)> = Vec::new();
        let deadline = cx.deadline;
        for (i, candidate) in candidates.iter().enumerate() {
            let last = i + 1 == candidates.len();
            let mut attempt = if last { std::mem::take(&mut request) } else { request.clone() };
            attempt
                .connection
                .get_or_insert_default()
                .network_service_endpoint_name
                .clone_from(&candidate.nse.name);
            cx.next_hop = Some(NextHop::from(candidate.dial.clone()).called(&candidate.nse.name));
            cx.deadline = cx.share(candidates.len() - i);
            let answer = next.request(cx, attempt).await;
            cx.deadline = deadline;
            match answer {
                Ok(conn) => {
                    cx.trail.note(self.name(), &candidate.nse.name, Verdict::Taken, "");
                    return Ok(conn);
                }
                Err(error) => {
                    self.doubt(&candidate.nse.name, &error);
                    cx.trail.note(self.name(), &candidate.nse.name, Verdict::Failed, error.to_string());
                    failures.push((candidate.nse.name.clone(), error));
                }
            }
            if tokio::time::Instant::now() >= cx.deadline {
                break;
            }
        }
        Err(Error::all_failed("candidates", failures))
    }
}

#[async_trait]
impl Element for Discover {
    fn name(&self) -> &'static str {
        "discover"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        if conn.network_service_endpoint_name.is_empty() {
            return self.select(cx, request, next).await;
        }
        let name = conn.network_service_endpoint_name.clone();
        if conn.payload.is_empty() {
            conn.payload = self.service(cx, &conn.network_service, "").await?.payload;
        }
        cx.next_hop = match self.named(cx, &name).await {
            Ok(endpoint) => Some(NextHop::from(endpoint.dial).called(&name)),
            // A directory that is away takes no wire away: where the endpoint was it is asked again.
            Err(error) if matches!(error.code, Code::Unavailable | Code::DeadlineExceeded) => {
                Some(dialed(cx.scope).filter(|hop| hop.is_called(&name)).cloned().ok_or(error)?)
            }
            Err(error) => return Err(error),
        };
        next.request(cx, request).await.inspect_err(|error| self.doubt(&name, error))
    }

    async fn close_forgotten(&self, cx: &mut Context<'_>, conn: Connection, next: Next<'_>) -> Result<()> {
        let name = &conn.network_service_endpoint_name;
        // Without a name it has not got as far as an endpoint.
        if !name.is_empty() {
            match self.named(cx, name).await {
                Ok(endpoint) => cx.next_hop = Some(endpoint.dial.into()),
                // What is here is cleared all the same.
                Err(error) => tracing::debug!(%error, "the endpoint of a closed connection is not known"),
            }
        }
        next.close_forgotten(cx, conn).await
    }
}

/// A look-up within the request's deadline.
async fn in_time<T>(
    cx: &Context<'_>,
    ask: impl Future<Output = Result<T, nsm_registry::Error>>,
) -> Result<T> {
    match tokio::time::timeout_at(cx.deadline, ask).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => {
            Err(Error::unavailable(format!("the registry could not be asked: {}", explain(&error))))
        }
        Err(_) => Err(Error::new(Code::DeadlineExceeded, "the registry did not answer in time")),
    }
}
