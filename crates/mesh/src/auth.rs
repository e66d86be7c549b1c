//! Who speaks: the tokens of the path, and the checks before anything is made
//! (spec/control-plane.md sections 5.2 and 13).

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use nsm_api::{
    mechanism::InodeUrl,
    path,
    pb::connection::{Connection, PathSegment},
};
use nsm_identity::clock;
use nsm_identity::{
    SpiffeId,
    chains::Chain,
    policy::{Check, Evidence, Policies},
    token,
};
use nsm_transport::{DialUrl, Peer, Pool};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    chain::{Caller, Context, Element},
    error::{Error, Result},
    signers,
};

/// Writes the caller's token into its segment and our own, addressed to the caller, into ours; then makes the
/// checks of a server on everything left of here. Requests of this process itself pass: there is no caller to
/// check.
#[derive(Debug, Clone)]
pub struct Authorize {
    /// How long our tokens live (`NSM_MAX_TOKEN_LIFETIME`).
    pub max_token_lifetime: Duration,
    /// What is checked.
    pub policies: Arc<Policies>,
}

impl Authorize {
    fn check(&self, cx: &Context<'_>, conn: &mut Connection) -> Result<()> {
        let Some(Caller { peer, token }) = &cx.caller else { return Ok(()) };
        let now = clock::now();
        signers::learn(conn, peer.identity(), self.policies.makes(Check::HopsSigned), now)?;
        signers::called_by(peer, conn);
        if let Some(previous) = path::previous_mut(conn) {
            // Upstream's callers always send exactly one; without it the connection would have no end.
            let token = token.as_ref().ok_or_else(|| {
                Error::denied("no sufficient privileges: the call has no nsm-client-token with its expiry")
                    .counted("no_token")
            })?;
            token.jwt().clone_into(&mut previous.token);
            // What the caller says of its token's end is bounded by what its token, in whole seconds, and its
            // certificate say.
            let exp = token::claims(token.jwt()).ok().and_then(|claims| claims.expires);
            let exp = exp
                .and_then(|secs| Duration::try_from_secs_f64(secs + 1.0).ok())
                .and_then(|d| UNIX_EPOCH.checked_add(d));
            let end = token.expires().min(peer.leaf().not_after()).min(exp.unwrap_or(now));
            previous.expires = Some(path::to_timestamp(end));
        }
        let own = peer
            .token(self.max_token_lifetime, now)
            .map_err(|e| Error::internal(format!("no token can be made: {e}")))?;
        if let Some(segment) = path::current_mut(conn) {
            own.jwt().clone_into(&mut segment.token);
            segment.expires = Some(path::to_timestamp(own.expires()));
            signers::sign(segment, peer.identity());
        }
        let tokens: Vec<&str> = path::segments(conn).iter().map(|s| s.token.as_str()).collect();
        let signers = signers::known(conn, peer.identity(), now);
        self.policies.check_server(&tokens, evidence(conn, peer, &signers, now), || document(conn, peer))?;
        Ok(())
    }
}

#[async_trait]
impl Element for Authorize {
    fn name(&self) -> &'static str {
        "authorize"
    }

    async fn admit(&self, cx: &mut Context<'_>, conn: &mut Connection) -> Result<()> {
        self.check(cx, conn)
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
    let now = clock::now();
    let Some(own) = path::current_mut(answer) else { return Ok(()) };
    let expires = own.expires.as_ref().map_or(now, path::from_timestamp);
    let svid = caller.identity().svid();
    let token = token::mint_until(svid, Some(next.id()), Some(next.leaf().not_after()), expires, now)
        .map_err(|e| Error::internal(format!("no token can be made: {e}")))?;
    token.jwt().clone_into(&mut own.token);
    own.expires = Some(path::to_timestamp(token.expires()));
    signers::sign(own, caller.identity());
    Ok(())
}

/// What an edge client checks of an answer: every token on the path is in date and addressed to the next hop's,
/// and the next hop's is its own (section 13.3).
///
/// # Errors
/// The first check that fails.
pub fn check_answer(conn: &Connection, policies: &Policies, peer: &Peer, now: SystemTime) -> Result<()> {
    let tokens: Vec<&str> = path::segments(conn).iter().map(|s| s.token.as_str()).collect();
    let signers = signers::known(conn, peer.identity(), now);
    policies
        .check_client(&tokens, evidence(conn, peer, &signers, now), || document(conn, peer))
        .map_err(|denial| Error::denied(format!("the answer of {} is refused: {denial}", peer.id())))
}

fn evidence<'a>(
    conn: &Connection,
    peer: &'a Peer,
    signers: &'a [Option<Arc<Chain>>],
    now: SystemTime,
) -> Evidence<'a> {
    let index = path::index(conn);
    Evidence { index, peer: peer.leaf(), trusted: peer.identity().bundles(), signers: Some(signers), now }
}

/// What an operator's policies see of a connection: upstream's document, the path up to here as Go writes it
/// (section 13.1). A client sees the whole path of the answer.
fn document(conn: &Connection, peer: &Peer) -> Value {
    let segment = |segment: &PathSegment| {
        let mut value = json!({
            "name": segment.name, "id": segment.id, "token": segment.token, "metrics": segment.metrics,
        });
        if let Some(expires) = &segment.expires {
            value["expires"] = json!({"seconds": expires.seconds, "nanos": expires.nanos});
        }
        // Go leaves out what is empty.
        if let Value::Object(fields) = &mut value {
            fields.retain(|_, value| *value != json!("") && *value != json!({}));
        }
        value
    };
    let mut document = json!({
        "path_segments": path::segments(conn).iter().map(segment).collect::<Vec<_>>(),
        "auth_info": {"certificate": peer.leaf().pem()},
    });
    let index = path::index(conn);
    if index > 0 {
        document["index"] = json!(index);
    }
    document
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
    /// Checks what `peer` handed over or named.
    ///
    /// # Errors
    /// A namespace that is not the peer's, or a peer that is gone.
    pub fn check(&self, peer: &Peer, urls: impl IntoIterator<Item = InodeUrl>) -> Result<()> {
        let mut urls = urls.into_iter().peekable();
        if urls.peek().is_none() || self.allowed.contains(peer.id()) {
            return Ok(());
        }
        let Some(unix) = peer.unix() else { return Ok(()) };
        let own = unix.netns_id().map_err(|e| {
            Error::denied(format!("the network namespace of {} ({unix}) cannot be read: {e}", peer.id()))
                .hint("list its SPIFFE ID in NSM_NAMESPACE_DELEGATES to trust what it says")
        })?;
        let own = InodeUrl { dev: own.dev, ino: own.ino };
        match urls.find(|url| *url != own) {
            None => Ok(()),
            Some(other) => Err(Error::denied(format!(
                "{other} is not the network namespace of {} ({unix}), which is {own}",
                peer.id()
            ))
            .hint("a workload gets wires only into its own namespace; list its SPIFFE ID in NSM_NAMESPACE_DELEGATES if it speaks for others")),
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
            Some(caller) => self.check(&caller.peer, cx.fds.urls()),
            None => Ok(()),
        }
    }
}

/// Takes calls from one neighbour only: a forwarder builds what its manager asks for, because it is the manager that
/// looks at workloads.
#[derive(Debug)]
pub enum OnlyFrom {
    /// Whoever listens there; the pool knows who that is at present.
    Peer(Pool, DialUrl),
    /// This process: nobody else has a way to this hop.
    Inside,
}

#[async_trait]
impl Element for OnlyFrom {
    fn name(&self) -> &'static str {
        "only-from"
    }

    async fn admit(&self, cx: &mut Context<'_>, _: &mut Connection) -> Result<()> {
        let (Some(Caller { peer, .. }), Self::Peer(pool, url)) = (&cx.caller, self) else { return Ok(()) };
        let left = cx.deadline.saturating_duration_since(Instant::now());
        let neighbour = pool.get(url, left).await.map_err(|e| {
            Error::unavailable(format!("whether {} may ask cannot be told: {url} is away: {e}", peer.id(),))
        })?;
        if neighbour.peer().id() == peer.id() {
            return Ok(());
        }
        Err(Error::denied(format!(
            "no sufficient privileges: {} is not {}, which this hop serves",
            peer.id(),
            neighbour.peer().id()
        ))
        .hint("ask the manager of the node"))
    }
}
