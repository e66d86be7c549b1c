//! Finds the endpoint: by its name, or by what the service's matches say of the client's labels
//! (spec/control-plane.md 8.2, 8.3).

use std::{collections::HashMap, future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use nsm_api::{
    matching::Policy,
    path,
    pb::{
        connection::Connection,
        networkservice::NetworkServiceRequest,
        registry::{NetworkService, NetworkServiceEndpoint},
    },
};
use nsm_identity::clock;
use nsm_mesh::{
    Context, Element, Error, Next, NextHop, Result, Verdict,
    dial::{Dial, Farewells, Silent, dialed},
    error::explain,
};
use nsm_registry::{Endpoint, LookUp};
use parking_lot::Mutex;
use tokio::time::timeout;
use tonic::Code;

/// How long it may take to find whom a connection had before.
const FIND: Duration = Duration::from_millis(150);
/// Services whose turn is remembered.
const MAX_TURNS: usize = 4096;

/// The element. Candidates are tried in turn, starting with the next one for every new wire of a service, or with those
/// that the weights of its routes prefer.
#[derive(Debug)]
pub struct Discover {
    directory: Arc<dyn LookUp>,
    silent: Silent,
    farewells: Farewells,
    turns: Mutex<HashMap<String, usize>>,
}

impl Discover {
    /// Asks this directory, the manager's, and goes on by `dial`: candidates that are silent there are tried after the others.
    #[must_use]
    pub fn new(directory: Arc<dyn LookUp>, dial: &Dial) -> Self {
        let (silent, farewells) = (dial.silent(), dial.farewells());
        Self { directory, silent, farewells, turns: Mutex::default() }
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

    /// Tells the endpoint that a connection had at the process before us that it has another one: it would keep its address
    /// for as long as the tokens live.
    async fn leave(&self, cx: &Context<'_>, mut before: Connection, now: &NextHop) {
        let behind = path::segments(&before).iter().skip(path::index(&before) + 1);
        let behind: Vec<_> = behind.map(|hop| hop.name.clone()).collect();
        if behind.iter().any(|name| now.is_called(name)) {
            return;
        }
        // The next hop on this node; else behind a manager and a forwarder.
        for name in behind.into_iter().step_by(2).take(2) {
            let Ok(Ok(endpoint)) = timeout(FIND, self.named(cx, &name)).await else { continue };
            let hop = NextHop::from(endpoint.dial).called(&name);
            if hop != *now {
                tracing::debug!(
                    connection = before.id,
                    endpoint = name,
                    "the endpoint of the process before us is told that it is left"
                );
                before.network_service_endpoint_name = name;
                self.farewells.say(hop, before);
            }
            return;
        }
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
        let id = conn.id.clone();
        let before = (!cx.known && path::goes_on(conn)).then(|| conn.clone());
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
        if !(self.silent.is_empty() && self.farewells.is_empty()) {
            // Who does not answer may be gone, and who was left last is the one that is not wanted any more; another may
            // only not have been told yet.
            candidates.sort_by_cached_key(|candidate| {
                let hop = NextHop::from(candidate.dial.clone()).called(&candidate.nse.name);
                (self.silent.is_silent(&hop), self.farewells.left_since(&hop, &id))
            });
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
            let hop = NextHop::from(candidate.dial.clone()).called(&candidate.nse.name);
            cx.next_hop = Some(hop.clone());
            cx.deadline = cx.share(candidates.len() - i);
            let answer = next.request(cx, attempt).await;
            cx.deadline = deadline;
            match answer {
                Ok(conn) => {
                    cx.trail.note(self.name(), &candidate.nse.name, Verdict::Taken, "");
                    if let Some(before) = before {
                        self.leave(cx, before, &hop).await;
                    }
                    return Ok(conn);
                }
                Err(error) => {
                    self.doubt(&candidate.nse.name, &error);
                    cx.trail.note(self.name(), &candidate.nse.name, Verdict::Failed, error.to_string());
                    failures.push((candidate.nse.name.clone(), error));
                }
            }
            if tokio::time::Instant::now() >= cx.deadline || cx.asker.is_over() {
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
        let mut unknown = None;
        // Without a name it has not got as far as an endpoint.
        if !name.is_empty() {
            match self.named(cx, name).await {
                Ok(endpoint) => cx.next_hop = Some(endpoint.dial.into()),
                Err(error) => {
                    tracing::debug!(%error, "the endpoint of a closed connection is not known");
                    // The directory is away: whoever closes tries again.
                    unknown =
                        (error.code != Code::NotFound).then_some(Error { code: Code::Aborted, ..error });
                }
            }
        }
        // What is here is cleared all the same.
        next.close_forgotten(cx, conn).await?;
        unknown.map_or(Ok(()), Err)
    }
}

/// A look-up within the request's deadline, and while somebody waits for it.
async fn in_time<T>(
    cx: &Context<'_>,
    ask: impl Future<Output = Result<T, nsm_registry::Error>>,
) -> Result<T> {
    let answer = async {
        match tokio::time::timeout_at(cx.deadline, ask).await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => {
                Err(Error::unavailable(format!("the registry could not be asked: {}", explain(&error))))
            }
            Err(_) => Err(Error::new(Code::DeadlineExceeded, "the registry did not answer in time")),
        }
    };
    cx.asker.on(answer).await
}
