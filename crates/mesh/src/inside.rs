//! A next hop in this very process: no channel, no handshake, no message. All the rest is as between processes: it has
//! its segment in the path, its tokens, its connections, its events and its checks.

use std::{sync::Arc, time::Duration};

use nsm_api::pb::{connection::Connection, networkservice::NetworkServiceRequest};
use nsm_identity::Source;
use nsm_identity::clock;
use nsm_transport::Peer;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    chain::{Answer, Call, Caller, Connections},
    error::{Error, Result},
    fds::Fds,
    monitor::Hub,
};

/// The hop, as the one before it sees it.
#[derive(Debug)]
pub struct Inside {
    connections: Arc<Connections>,
    hub: Arc<Hub>,
    source: Source,
    max_token_lifetime: Duration,
    /// Ourselves as a peer, for as long as the certificate lasts.
    peer: Mutex<Option<Peer>>,
}

impl Inside {
    /// The hop with these connections, whose events `hub` tells. Both hops speak with the identity of the process.
    #[must_use]
    pub fn new(
        connections: Arc<Connections>,
        hub: Arc<Hub>,
        source: Source,
        max_token_lifetime: Duration,
    ) -> Self {
        Self { connections, hub, source, max_token_lifetime, peer: Mutex::default() }
    }

    /// Its name in the path.
    #[must_use]
    pub fn name(&self) -> &str {
        self.connections.me()
    }

    /// Who it is, and who asks it: the process.
    pub(crate) fn peer(&self) -> Peer {
        let identity = self.source.current();
        let mut peer = self.peer.lock();
        match &*peer {
            Some(peer) if Arc::ptr_eq(peer.identity(), &identity) => peer.clone(),
            _ => peer.insert(Peer::this_process(identity)).clone(),
        }
    }

    /// Its events.
    pub(crate) fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Asks it.
    pub(crate) async fn request(
        &self,
        peer: &Peer,
        fds: Fds,
        deadline: Instant,
        request: NetworkServiceRequest,
    ) -> Result<Answer> {
        self.connections.request(self.call(peer, fds, deadline)?, request).await
    }

    /// Closes there.
    pub(crate) async fn close(&self, peer: &Peer, deadline: Instant, conn: Connection) -> Result<()> {
        self.connections.close(self.call(peer, Fds::default(), deadline)?, conn).await
    }

    fn call(&self, peer: &Peer, fds: Fds, deadline: Instant) -> Result<Call> {
        let token = peer
            .token(self.max_token_lifetime, clock::now())
            .map_err(|e| Error::internal(format!("no token can be made: {e}")))?;
        let caller = Some(Caller { peer: peer.clone(), token: Some(token) });
        Ok(Call { caller, deadline: Some(deadline), fds })
    }
}
