//! Calls to a registry: the path out and in, and the client's policies on what comes back.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use nsm_api::pb::registry::{
    NetworkService, NetworkServiceEndpoint,
    network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
    network_service_registry_client::NetworkServiceRegistryClient,
};
use nsm_identity::clock;
use nsm_identity::policy::Evidence;
use nsm_transport::{Connection, DialUrl, Peer, Pool};
use tokio::time::Instant;
use tonic::{
    Request, Response, Status, Streaming,
    metadata::{MetadataMap, MetadataValue},
};
use tracing::debug;

use crate::{
    Error,
    path::{self, RegistrationPath},
    server::{Context, Directory, Events, document},
    store::Item,
};

/// How long a change may take when nobody sets a deadline: upstream's per-try deadline.
pub(crate) const CALL: Duration = Duration::from_secs(15);

/// An object whose registry can be called.
#[async_trait]
pub(crate) trait Remote: Item {
    async fn call_register(connection: Connection, request: Request<Self>) -> Result<Response<Self>, Status>;
    async fn call_unregister(connection: Connection, request: Request<Self>) -> Result<Response<()>, Status>;
    async fn call_find(
        connection: Connection,
        request: Request<Self::Query>,
    ) -> Result<Response<Streaming<Self::Response>>, Status>;
}

#[async_trait]
impl Remote for NetworkService {
    async fn call_register(connection: Connection, request: Request<Self>) -> Result<Response<Self>, Status> {
        NetworkServiceRegistryClient::new(connection).register(request).await
    }

    async fn call_unregister(connection: Connection, request: Request<Self>) -> Result<Response<()>, Status> {
        NetworkServiceRegistryClient::new(connection).unregister(request).await
    }

    async fn call_find(
        connection: Connection,
        request: Request<Self::Query>,
    ) -> Result<Response<Streaming<Self::Response>>, Status> {
        NetworkServiceRegistryClient::new(connection).find(request).await
    }
}

#[async_trait]
impl Remote for NetworkServiceEndpoint {
    async fn call_register(connection: Connection, request: Request<Self>) -> Result<Response<Self>, Status> {
        NetworkServiceEndpointRegistryClient::new(connection).register(request).await
    }

    async fn call_unregister(connection: Connection, request: Request<Self>) -> Result<Response<()>, Status> {
        NetworkServiceEndpointRegistryClient::new(connection).unregister(request).await
    }

    async fn call_find(
        connection: Connection,
        request: Request<Self::Query>,
    ) -> Result<Response<Streaming<Self::Response>>, Status> {
        NetworkServiceEndpointRegistryClient::new(connection).find(request).await
    }
}

/// Registers over a connection. `path` is sent and replaced by the answer's. `known`: the name was
/// registered before; if not, and the answer is refused here, it is taken back.
pub(crate) async fn register<T: Remote>(
    connection: &Connection,
    path: &mut RegistrationPath,
    item: T,
    deadline: Instant,
    known: bool,
) -> Result<T, Error> {
    let back = (!known).then(|| item.clone());
    let response = T::call_register(connection.clone(), request(item, path, deadline)?).await?;
    let asked = path.clone();
    match adopt(path, response.metadata(), connection) {
        Ok(()) => Ok(response.into_inner()),
        Err(error) => {
            if let Some(item) = back
                && let Err(reason) =
                    T::call_unregister(connection.clone(), request(item, &asked, deadline)?).await
            {
                debug!(%reason, "a registration that is refused here cannot be taken back");
            }
            Err(error)
        }
    }
}

/// Unregisters over a connection.
pub(crate) async fn unregister<T: Remote>(
    connection: &Connection,
    path: &mut RegistrationPath,
    item: T,
    deadline: Instant,
) -> Result<(), Error> {
    let response = T::call_unregister(connection.clone(), request(item, path, deadline)?).await?;
    adopt(path, response.metadata(), connection)
}

/// Looks up over a connection; a watch has no deadline and only ends when something breaks.
pub(crate) async fn find<T: Remote>(
    connection: Connection,
    query: T,
    watch: bool,
    deadline: Option<Instant>,
) -> Result<Events<T>, Error> {
    let mut request = Request::new(query.to_query(watch));
    if let Some(at) = deadline {
        request.set_timeout(at.saturating_duration_since(Instant::now()));
    }
    let messages = T::call_find(connection, request).await?.into_inner();
    let end =
        stream::iter(watch.then(|| Err(Error::from(Status::unavailable("the registry ended the watch")))));
    // One message beyond an error would be a defect of the peer: the stream ends at the first.
    let events = messages
        .filter_map(async |message| match message {
            Ok(message) => T::response(message).map(Ok),
            Err(status) => Some(Err(Error::from(status))),
        })
        .chain(end)
        .scan(false, |failed, event| {
            let next = (!*failed).then_some(event);
            *failed |= matches!(next, Some(Err(_)));
            std::future::ready(next)
        });
    Ok(events.boxed())
}

fn request<R>(message: R, path: &RegistrationPath, deadline: Instant) -> Result<Request<R>, Error> {
    let mut request = Request::new(message);
    let mut header = MetadataValue::try_from(path.encode())
        .map_err(|_| Error::from(Status::internal("the registration path is no header")))?;
    header.set_sensitive(true);
    request.metadata_mut().insert(path::HEADER, header);
    request.set_timeout(deadline.saturating_duration_since(Instant::now()));
    Ok(request)
}

/// Takes over the answer's path if the client's policies let it pass (spec/registry.md 2.9.4).
fn adopt(path: &mut RegistrationPath, answer: &MetadataMap, connection: &Connection) -> Result<(), Error> {
    let header = answer.get_all(path::HEADER).iter().next_back().and_then(|value| value.to_str().ok());
    let answered = header.map(RegistrationPath::decode).transpose()?.unwrap_or_default();
    // The index is our own business; what the answer says of it does not count.
    let peer = connection.peer();
    let trusted = peer.identity().bundles();
    let evidence =
        Evidence { index: path.index, peer: peer.leaf(), trusted, signers: None, now: clock::now() };
    connection.policies().check_client(&answered.tokens, evidence, || {
        document(&answered.tokens, path.index, peer, ("", None))
    })?;
    path.tokens = answered.tokens;
    Ok(())
}

/// A directory that asks another registry.
#[derive(Debug, Clone)]
pub(crate) struct Upstream {
    pub(crate) pool: Pool,
    pub(crate) url: DialUrl,
    /// How long connecting may take (`NSM_DIAL_TIMEOUT`).
    pub(crate) dial: Duration,
}

impl Upstream {
    pub(crate) async fn connect(&self) -> Result<Connection, Error> {
        Ok(self.pool.get(&self.url, self.dial).await?)
    }

    /// A connection for what lasts.
    pub(crate) async fn streams(&self) -> Result<Connection, Error> {
        Ok(self.pool.streams(&self.url, self.dial).await?)
    }
}

#[async_trait]
impl<T: Remote> Directory<T> for Upstream {
    /// The registry knows; what it says counts.
    fn known(&self, _: &str) -> Option<Arc<T>> {
        None
    }

    async fn register(&self, cx: &mut Context, item: T) -> Result<T, Error> {
        let deadline = cx.deadline.unwrap_or_else(|| Instant::now() + CALL);
        let connection = self.connect().await?;
        cx.spoke_as = Some(connection.peer().identity().clone());
        register(&connection, &mut cx.path, item, deadline, cx.known).await
    }

    async fn unregister(&self, cx: &mut Context, item: T) -> Result<(), Error> {
        let deadline = cx.deadline.unwrap_or_else(|| Instant::now() + CALL);
        let connection = self.connect().await?;
        cx.spoke_as = Some(connection.peer().identity().clone());
        unregister(&connection, &mut cx.path, item, deadline).await
    }

    async fn find(&self, query: T, watch: bool, _: Option<&Peer>) -> Result<Events<T>, Error> {
        if watch {
            return find(self.streams().await?, query, watch, None).await;
        }
        find(self.connect().await?, query, watch, Some(Instant::now() + CALL)).await
    }
}
