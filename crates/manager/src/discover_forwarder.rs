//! Chooses the forwarder that builds the wire (spec/control-plane.md 8.1).

use std::{borrow::Borrow, sync::Arc};

use async_trait::async_trait;
use nsm_api::{
    matching::Policy,
    path,
    pb::{
        connection::{Connection, State},
        networkservice::NetworkServiceRequest,
        registry::NetworkServiceEndpoint,
    },
};
use nsm_mesh::{
    Context, Element, Error, Holders, Lease, Next, NextHop, Release, Result, Verdict, error::explain,
};
use nsm_registry::{Endpoint, ManagerRegistry};
use nsm_transport::DialTarget;
use tonic::Code;

/// The element: the forwarders of this node that the service's matches admit, tried in turn; the one that serves a
/// connection keeps it.
#[derive(Debug)]
pub struct DiscoverForwarder {
    registered: Arc<Registered>,
    own: Option<Candidate>,
}

/// The forwarders that have registered.
#[derive(Debug)]
struct Registered(ManagerRegistry);

impl Holders for Registered {
    fn now(&self, called: &str) -> Option<DialTarget> {
        self.0.forwarder(called).map(|forwarder| forwarder.dial())
    }
}

/// A forwarder, and how to reach it.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// As services choose it.
    pub nse: NetworkServiceEndpoint,
    /// Whom to ask.
    pub hop: NextHop,
}

impl Borrow<NetworkServiceEndpoint> for Candidate {
    fn borrow(&self) -> &NetworkServiceEndpoint {
        &self.nse
    }
}

/// The forwarder that serves a connection.
#[derive(Debug)]
struct Chosen(String);

#[async_trait]
impl Lease for Chosen {
    fn name(&self) -> &'static str {
        "forwarder"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        Ok(())
    }
}

impl DiscoverForwarder {
    /// Among those who have registered, and the forwarder of this process, if there is one.
    #[must_use]
    pub fn new(registry: ManagerRegistry, own: Option<Candidate>) -> Self {
        Self { registered: Arc::new(Registered(registry)), own }
    }

    /// The forwarders of this node.
    fn all(&self) -> Vec<Candidate> {
        let registered = self.registered.0.forwarders().into_iter().map(|Endpoint { nse, dial }| {
            // Whoever registers by this name after a restart has the wires of who did before.
            let hop = NextHop::from(dial).lasting(&nse.name, Arc::clone(&self.registered) as _);
            Candidate { nse, hop }
        });
        self.own.iter().cloned().chain(registered).collect()
    }

    async fn candidates(&self, cx: &mut Context<'_>, conn: &Connection) -> Result<Vec<Candidate>> {
        let name = &conn.network_service;
        let find = self.registered.0.find_service(name, &conn.payload);
        let service = match tokio::time::timeout_at(cx.deadline, find).await {
            Ok(Ok(service)) => service,
            Ok(Err(error)) => {
                return Err(Error::unavailable(format!(
                    "the registry could not be asked: {}",
                    explain(&error)
                )));
            }
            Err(_) => return Err(Error::new(Code::DeadlineExceeded, "the registry did not answer in time")),
        };
        let service = service.ok_or_else(|| {
            Error::not_found(format!("network service {name:?} is not found"))
                .hint("apply a NetworkService of that name, or start an endpoint that registers it")
        })?;
        let forwarders = self.all();
        if forwarders.is_empty() {
            return Err(Error::unavailable("no forwarder of this node has registered")
                .hint("is the forwarder running, with NSM_CONNECT_TO at this manager?"));
        }
        let policy = Policy::lenient(&service);
        let selection = policy.forwarders(&conn.labels, self.registered.0.forwarder_service(), &forwarders);
        if cx.scope.get::<Chosen>().is_none() {
            for forwarder in &forwarders {
                let (fits, why) = selection.reason(forwarder);
                let verdict = if fits { Verdict::Spare } else { Verdict::Refused };
                cx.trail.note(self.name(), &forwarder.nse.name, verdict, why);
            }
        }
        if selection.candidates.is_empty() {
            return Err(Error::not_found(format!("no candidates found: {selection}")));
        }
        Ok(selection.candidates.into_iter().cloned().collect())
    }
}

#[async_trait]
impl Element for DiscoverForwarder {
    fn name(&self) -> &'static str {
        "discover-forwarder"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        let candidates = match cx.scope.get::<Chosen>() {
            // Nobody else is asked, the registry neither: while it is away wires are refreshed all the same.
            Some(Chosen(chosen)) => {
                vec![self.all().into_iter().find(|c| c.nse.name == *chosen).ok_or_else(|| {
                    Error::unavailable(format!("forwarder {chosen:?} is not available"))
                        .hint("it serves this wire and is expected back; a reselection chooses another")
                })?]
            }
            None => {
                let mut candidates = self.candidates(cx, conn).await?;
                if conn.state() != State::ReselectRequested
                    && let Some(before) = path::segments(conn).get(path::index(conn) + 1)
                {
                    // After our own restart: whoever served the connection has its wire.
                    candidates.sort_by_key(|c| c.nse.name != before.name);
                }
                candidates
            }
        };
        let mut failures = Vec::new();
        let (deadline, mut left) = (cx.deadline, candidates.len());
        for candidate in candidates {
            cx.next_hop = Some(candidate.hop);
            cx.deadline = cx.share(left);
            left -= 1;
            let attempt = if left == 0 { std::mem::take(&mut request) } else { request.clone() };
            let answer = next.request(cx, attempt).await;
            cx.deadline = deadline;
            match answer {
                Ok(conn) => {
                    if cx.scope.get::<Chosen>().is_none() {
                        cx.trail.note(self.name(), &candidate.nse.name, Verdict::Taken, "");
                        cx.scope.lease(Chosen(candidate.nse.name));
                    }
                    return Ok(conn);
                }
                Err(error) => {
                    cx.trail.note(self.name(), &candidate.nse.name, Verdict::Failed, error.to_string());
                    failures.push((candidate.nse.name, error));
                    if cx.asker.is_over() {
                        break;
                    }
                }
            }
        }
        Err(Error::all_failed("forwarders", failures))
    }

    async fn close_forgotten(&self, cx: &mut Context<'_>, conn: Connection, next: Next<'_>) -> Result<()> {
        let served_by =
            path::segments(&conn).get(path::index(&conn) + 1).map(|segment| segment.name.as_str());
        let forwarder = self.all().into_iter().find(|f| Some(f.nse.name.as_str()) == served_by);
        if let Some(name) = served_by.filter(|_| forwarder.is_none()) {
            // It may register in a moment; whoever closes tries again.
            return Err(Error::unavailable(format!(
                "forwarder {name:?}, which served the connection, is not available"
            )));
        }
        cx.next_hop = forwarder.map(|f| f.hop);
        next.close_forgotten(cx, conn).await
    }
}
