//! The gRPC face of a hop: `NetworkService` and `MonitorConnection`.

use std::{collections::BTreeSet, sync::Arc};

use nsm_api::{
    limits, path,
    pb::{
        connection::{
            Connection, ConnectionEvent, MonitorScopeSelector, PathSegment,
            monitor_connection_server::{MonitorConnection, MonitorConnectionServer},
        },
        introspect::{self, Kind, Process, Query, item::What},
        networkservice::{
            NetworkServiceRequest,
            network_service_server::{NetworkService, NetworkServiceServer},
        },
    },
};
use nsm_identity::SpiffeId;
use nsm_transport::{Deadline, MAX_MESSAGE, OnDelivery, Peer, client_token};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::{
    chain::{Call, Caller, Connections, DEFAULT_DEADLINE, Note},
    error::Error,
    fds::{self, Fds},
    inspect::{self, Gone, Look, Teller},
    monitor::{Hub, UNASKED, Viewer},
    signers,
};

/// The names of both services, for gRPC health.
pub const SERVICES: [&str; 3] =
    ["networkservice.NetworkService", "connection.MonitorConnection", crate::inspect::SERVICE];

/// Descriptors travel with the call or, where a Go peer's scheduler is slow, with one of its next bytes.
const DESCRIPTORS: std::time::Duration = std::time::Duration::from_secs(5);

/// No caller keeps a request waiting for longer than this, whatever it says.
const LONGEST_DEADLINE: std::time::Duration = std::time::Duration::from_secs(300);

/// Adds both services of a hop to a server's routes. `readers` may watch every connection, others those that they
/// asked for.
pub fn add(
    routes: &mut tonic::service::RoutesBuilder,
    connections: Arc<Connections>,
    hub: Arc<Hub>,
    readers: Arc<BTreeSet<SpiffeId>>,
) {
    routes
        .add_service(
            NetworkServiceServer::new(Hop { connections: Arc::clone(&connections) })
                .max_decoding_message_size(MAX_MESSAGE),
        )
        .add_service(
            MonitorConnectionServer::new(Events { hub: Arc::clone(&hub), readers })
                .max_decoding_message_size(MAX_MESSAGE),
        )
        .add_service(connections.metrics().inspector().over_mtls());
    tell(&connections, hub);
}

/// Lets a process be asked about these connections.
pub fn tell(connections: &Arc<Connections>, hub: Arc<Hub>) {
    let inspector = connections.metrics().inspector();
    inspector.add(Arc::new(Told { connections: Arc::clone(connections), hub }));
}

/// The connections of a hop, for whoever asks.
#[derive(Debug)]
struct Told {
    connections: Arc<Connections>,
    hub: Arc<Hub>,
}

#[tonic::async_trait]
impl Look for Told {
    async fn look(&self, query: &Query, to: &Teller) -> Result<(), Gone> {
        if !inspect::wants(query, Kind::Connection) {
            return Ok(());
        }
        for id in self.hub.ids() {
            let (Some((conn, owner)), note) = (self.hub.get(&id), self.connections.note(&id)) else {
                continue;
            };
            to.tell(What::Connection(told(conn, owner, note))).await?;
        }
        Ok(())
    }

    async fn add_to(&self, _: &Query, process: &mut Process) {
        process.panics += self.connections.metrics().panics();
        process.connections += self.connections.len() as u64;
    }
}

/// A connection as it is told: everything but the tokens.
fn told(conn: Connection, caller: Option<SpiffeId>, note: Note) -> introspect::Connection {
    let hop = |segment: &PathSegment| introspect::Hop {
        name: segment.name.clone(),
        id: segment.id.clone(),
        signer: nsm_identity::token::claims(&segment.token).map(|claims| claims.subject).unwrap_or_default(),
        token_expires: segment.expires.as_ref().map_or(0, |at| inspect::millis(path::from_timestamp(at))),
        metrics: segment.metrics.clone(),
    };
    let (hops, index) = (path::segments(&conn).iter().map(hop).collect(), path::index(&conn) as u32);
    let state = conn.state().as_str_name().to_owned();
    let context = conn.context.unwrap_or_default();
    let ip = context.ip_context.unwrap_or_default();
    let mechanism = conn.mechanism.unwrap_or_default();
    let routes = ip.src_routes.into_iter().map(|route| match route.next_hop.as_str() {
        "" => route.prefix,
        via => format!("{} via {via}", route.prefix),
    });
    introspect::Connection {
        id: conn.id,
        service: conn.network_service,
        endpoint: conn.network_service_endpoint_name,
        payload: conn.payload,
        state,
        mechanism: format!("{} {}", mechanism.cls, mechanism.r#type).trim().to_owned(),
        parameters: mechanism.parameters,
        labels: conn.labels,
        mtu: context.mtu,
        client_addresses: ip.src_ip_addrs,
        endpoint_addresses: ip.dst_ip_addrs,
        client_routes: routes.collect(),
        hops,
        index,
        caller: caller.map(|id| id.to_string()).unwrap_or_default(),
        since: inspect::millis(note.since),
        refreshed: inspect::millis(note.refreshed),
        answers: note.answers,
        decisions: note.decisions.into_vec(),
    }
}

#[derive(Debug)]
struct Hop {
    connections: Arc<Connections>,
}

#[tonic::async_trait]
impl NetworkService for Hop {
    async fn request(&self, request: Request<NetworkServiceRequest>) -> Result<Response<Connection>, Status> {
        let (caller, deadline) = facts(&request)?;
        let peer = caller.peer.clone();
        let request = request.into_inner();
        let refused = |error: &Error| tracing::info!(%peer, %error, "request refused");
        // Before anything is waited for.
        limits::check_request(&request)
            .map_err(|e| Error::from(e).at(self.connections.me()))
            .inspect_err(refused)?;
        let mut received = Fds::default();
        received
            .receive(&peer, fds::mechanisms(&request), deadline.min(Instant::now() + DESCRIPTORS))
            .await
            .map_err(|e| e.at(self.connections.me()))
            .inspect_err(refused)?;
        let call = Call { caller: Some(caller), deadline: Some(deadline), fds: received.clone() };
        let (mut answer, receipt) = self.connections.answer(call, request).await.inspect_err(refused)?;
        signers::to_caller(&mut answer.connection, &peer);
        // What the caller itself sent it need not get back (section 17 rule 14).
        if let Some(mechanism) = &answer.connection.mechanism
            && let Ok(Some(url)) = mechanism.inode()
            && received.get(url).is_none()
        {
            answer.fds.send(&peer, mechanism);
        }
        let mut response = Response::new(answer.connection);
        if let Some(receipt) = receipt {
            response.extensions_mut().insert(OnDelivery::new(move || receipt.sign()));
        }
        Ok(response)
    }

    async fn close(&self, request: Request<Connection>) -> Result<Response<()>, Status> {
        let (caller, deadline) = facts(&request)?;
        let peer = caller.peer.clone();
        let call = Call { caller: Some(caller), deadline: Some(deadline), fds: Fds::default() };
        self.connections.close(call, request.into_inner()).await.inspect_err(|error| {
            tracing::info!(%peer, %error, "close incomplete");
        })?;
        Ok(Response::new(()))
    }
}

fn facts<T>(request: &Request<T>) -> Result<(Caller, Instant), Status> {
    let caller = Caller { peer: Peer::of(request)?.clone(), token: client_token(request.metadata()) };
    let longest = Instant::now() + LONGEST_DEADLINE;
    let deadline =
        Deadline::of(request).map_or_else(|| Instant::now() + DEFAULT_DEADLINE, |d| d.0.min(longest));
    Ok((caller, deadline))
}

#[derive(Debug)]
struct Events {
    hub: Arc<Hub>,
    readers: Arc<BTreeSet<SpiffeId>>,
}

#[tonic::async_trait]
impl MonitorConnection for Events {
    type MonitorConnectionsStream = futures::stream::Map<
        ReceiverStream<Arc<ConnectionEvent>>,
        fn(Arc<ConnectionEvent>) -> Result<ConnectionEvent, Status>,
    >;

    async fn monitor_connections(
        &self,
        request: Request<MonitorScopeSelector>,
    ) -> Result<Response<Self::MonitorConnectionsStream>, Status> {
        use futures::StreamExt as _;
        let peer = Peer::of(&request)?.id().clone();
        let viewer = match peer {
            peer if self.readers.contains(&peer) => Viewer::All,
            peer if request.metadata().contains_key(UNASKED) => Viewer::Asker(peer),
            peer => Viewer::Peer(peer),
        };
        let selector = request.into_inner();
        if selector.path_segments.len() > nsm_api::path::MAX_SEGMENTS
            || selector.network_services.len() > nsm_api::limits::MAX_ENTRIES
        {
            return Err(Error::invalid("the selector is larger than any path").counted("malformed").into());
        }
        let events = self.hub.watch(selector, viewer)?;
        Ok(Response::new(ReceiverStream::new(events).map(own as fn(_) -> _)))
    }
}

/// One event goes to many watchers; the last of them gets it without a copy.
fn own(event: Arc<ConnectionEvent>) -> Result<ConnectionEvent, Status> {
    Ok(Arc::unwrap_or_clone(event))
}
