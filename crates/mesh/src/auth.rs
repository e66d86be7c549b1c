//! Who speaks: the tokens of the path, and the checks before anything is made
//! (spec/control-plane.md sections 5.2 and 13).

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use nsm_api::{
    mechanism::InodeUrl,
    path,
    pb::{connection::Connection, networkservice::NetworkServiceRequest},
};
use nsm_identity::{SpiffeId, policy, token};
use nsm_transport::Peer;

use crate::{
    chain::{Caller, Context, Element, Next},
    error::{Error, Result},
    scope::{Lease, Release},
};

/// Writes the caller's token into its segment and our own, addressed to the caller, into ours; then makes the
/// four checks of a server on everything left of here, and sees to it that a connection stays that of the one who
/// established it: ids stand in the path, which others see. Requests of this process itself pass: there is no caller
/// to check.
#[derive(Debug, Clone)]
pub struct Authorize {
    /// How long our tokens live (`NSM_MAX_TOKEN_LIFETIME`).
    pub max_token_lifetime: Duration,
}

impl Authorize {
    fn check(&self, cx: &Context<'_>, conn: &mut Connection) -> Result<()> {
        let Some(Caller { peer, token }) = &cx.caller else { return Ok(()) };
        let now = SystemTime::now();
        if let (Some(token), Some(previous)) = (token, path::previous_mut(conn)) {
            token.jwt().clone_into(&mut previous.token);
            previous.expires = Some(path::to_timestamp(token.expires()));
        }
        let own = peer
            .token(self.max_token_lifetime, now)
            .map_err(|e| Error::internal(format!("no token can be made: {e}")))?;
        if let Some(segment) = path::current_mut(conn) {
            own.jwt().clone_into(&mut segment.token);
            segment.expires = Some(path::to_timestamp(own.expires()));
        }
        let tokens: Vec<&str> = path::segments(conn).iter().map(|s| s.token.as_str()).collect();
        policy::check_server(&tokens, path::index(conn), peer.leaf(), now)
            .map_err(|denial| Error::denied(format!("no sufficient privileges: {denial}")))
    }
}

/// Whose a connection is: it stays that of the one who established it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Owner {
    /// Where this hop stands in the path.
    index: usize,
    /// Who hands the connection to this hop.
    caller: SpiffeId,
    /// The client at the path's beginning: name, id and the subject of its token.
    client: (String, String, String),
}

impl Owner {
    fn of(caller: &Peer, conn: &Connection) -> Self {
        let first = path::segments(conn).first().cloned().unwrap_or_default();
        let subject = token::claims(&first.token).map(|claims| claims.subject).unwrap_or_default();
        Self {
            index: path::index(conn),
            caller: caller.id().clone(),
            client: (first.name, first.id, subject),
        }
    }

    /// Whether a request that names the same connection may be the same client's. Between hops the caller may change:
    /// a reselection sends the client's request through another forwarder. A path can be copied, so the place in it
    /// and the client have to be the same then.
    fn admits(&self, other: &Self) -> bool {
        self.index == other.index
            && self.client == other.client
            && (self.caller == other.caller || self.index > 1)
    }
}

#[async_trait]
impl Lease for Owner {
    fn name(&self) -> &'static str {
        "owner"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Element for Authorize {
    fn name(&self) -> &'static str {
        "authorize"
    }

    async fn admit(&self, cx: &mut Context<'_>, conn: &mut Connection) -> Result<()> {
        self.check(cx, conn)?;
        let (Some(caller), Some(owner)) = (&cx.caller, cx.scope.get::<Owner>()) else { return Ok(()) };
        if owner.admits(&Owner::of(&caller.peer, conn)) {
            return Ok(());
        }
        Err(Error::denied(format!(
            "no sufficient privileges: connection {:?} is {}'s, asked for by {}",
            conn.id,
            owner.client.2,
            caller.peer.id()
        )))
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        if let (Some(caller), Some(conn), None) = (&cx.caller, &request.connection, cx.scope.get::<Owner>()) {
            let owner = Owner::of(&caller.peer, conn);
            cx.scope.lease(owner);
        }
        next.request(cx, request).await
    }
}

/// Makes an answer hold before our caller's eyes while certificates rotate. The next hop has put the token that came
/// with our call into our segment: signed by what we presented to *it*. Our caller checks it against what we presented
/// to *him*, which is another certificate when one of the two connections is older than the last rotation.
///
/// # Errors
/// What we presented to the caller has expired.
pub(crate) fn sign_for_caller(answer: &mut Connection, caller: &Peer, next: &Peer) -> Result<()> {
    if Arc::ptr_eq(caller.identity(), next.identity()) {
        return Ok(());
    }
    let now = SystemTime::now();
    let Some(own) = path::current_mut(answer) else { return Ok(()) };
    let expires = own.expires.as_ref().map_or(now, path::from_timestamp);
    let left = expires.duration_since(now).unwrap_or_default();
    let svid = caller.identity().svid();
    let token = token::mint(svid, Some(next.id()), Some(next.leaf().not_after()), left, now)
        .map_err(|e| Error::internal(format!("no token can be made: {e}")))?;
    token.jwt().clone_into(&mut own.token);
    own.expires = Some(path::to_timestamp(token.expires()));
    Ok(())
}

/// What an edge client checks of an answer: every token on the path is in date and addressed to the next hop's,
/// and the next hop's is its own (section 13.3).
///
/// # Errors
/// The first check that fails.
pub fn check_answer(conn: &Connection, peer: &Peer, now: SystemTime) -> Result<()> {
    let tokens: Vec<&str> = path::segments(conn).iter().map(|s| s.token.as_str()).collect();
    policy::check_client(&tokens, path::index(conn), peer.leaf(), now)
        .map_err(|denial| Error::denied(format!("the answer of {} is refused: {denial}", peer.id())))
}

/// Accepts a namespace from a workload only if it is the workload's own: the descriptor that came must be the
/// network namespace of the process at the other end of the Unix socket. Identities on the list may hand over
/// other namespaces (a side-car for a VM, a CNI plugin).
#[derive(Debug, Clone, Default)]
pub struct OwnNamespace {
    /// Who may speak for namespaces that are not its own.
    pub allowed: Arc<BTreeSet<SpiffeId>>,
}

impl OwnNamespace {
    /// Checks what `peer` handed over.
    ///
    /// # Errors
    /// A namespace that is not the peer's, or a peer that is gone.
    pub fn check(&self, peer: &Peer, fds: &crate::fds::Fds) -> Result<()> {
        if fds.is_empty() || self.allowed.contains(peer.id()) {
            return Ok(());
        }
        let Some(unix) = peer.unix() else { return Ok(()) };
        let own = unix.netns_id().map_err(|e| {
            Error::denied(format!(
                "the network namespace of {} (pid {}) cannot be read: {e}",
                peer.id(),
                unix.pid()
            ))
        })?;
        let own = InodeUrl { dev: own.dev, ino: own.ino };
        match fds.urls().find(|url| *url != own) {
            None => Ok(()),
            Some(other) => Err(Error::denied(format!(
                "{other} is not the network namespace of {} (pid {}), which is {own}",
                peer.id(),
                unix.pid()
            ))
            .hint("a workload may only ask for wires into its own namespace; list its SPIFFE ID in NSM_NAMESPACE_DELEGATES if it speaks for others")),
        }
    }
}

#[async_trait]
impl Element for OwnNamespace {
    fn name(&self) -> &'static str {
        "own-namespace"
    }

    async fn admit(&self, cx: &mut Context<'_>, _: &mut Connection) -> Result<()> {
        match &cx.caller {
            Some(caller) => self.check(&caller.peer, &cx.fds),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(index: usize, caller: &str, client: &str) -> Owner {
        Owner {
            index,
            caller: caller.parse().unwrap(),
            client: ("nsc".into(), "nsc-0".into(), client.into()),
        }
    }

    #[test]
    fn a_connection_stays_its_clients() {
        let (a, b) = ("spiffe://t/a", "spiffe://t/b");
        assert!(owner(1, a, a).admits(&owner(1, a, a)), "a refresh");
        assert!(!owner(1, a, a).admits(&owner(1, b, b)), "another workload that knows the ids");
        assert!(!owner(1, a, a).admits(&owner(1, b, a)), "… with a copied token in front of its own path");
        assert!(!owner(1, a, a).admits(&owner(2, b, a)), "… with the whole path copied and itself appended");
        assert!(owner(3, "spiffe://t/fwd-1", a).admits(&owner(3, "spiffe://t/fwd-2", a)), "a reselection");
        assert!(!owner(3, "spiffe://t/fwd-1", a).admits(&owner(3, "spiffe://t/fwd-1", b)), "another client");
    }
}
