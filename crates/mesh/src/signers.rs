//! By which certificates the tokens of a path are signed: what hops tell each other of it (docs/authorisation.md).
//!
//! Each hop names the certificate that it signs with in its own segment, by hash, and sends the chain along to whoever
//! has not got it on this connection. A hop of upstream's passes both on without knowing what they are. What is
//! remembered of a path has the hashes only.

use std::{sync::Arc, time::SystemTime};

use nsm_api::{
    path,
    pb::connection::{Connection, PathSegment},
};
use nsm_identity::clock;
use nsm_identity::{CertificateError, Denial, Identity, chains::Chain};
use nsm_transport::Peer;

/// Chains of one message that nobody vouches for, after which the rest is not looked at: each costs its signatures.
const MOST_UNKNOWN: usize = 2;

/// Takes the chains that came with a message out of it, into what this process knows.
///
/// # Errors
/// One that nobody vouches for, if that is to be refused; otherwise it counts as absent. So does one of a domain that we
/// have no roots for: whether such hops are taken is another check.
pub(crate) fn learn(
    conn: &mut Connection,
    identity: &Identity,
    refuse: bool,
    now: SystemTime,
) -> Result<(), Denial> {
    let Some(path) = &mut conn.path else { return Ok(()) };
    let mut unknown = 0;
    for (segment, hop) in path.path_segments.iter_mut().enumerate().filter(|(_, hop)| !hop.chain.is_empty()) {
        let chain = std::mem::take(&mut hop.chain);
        hop.signer = Vec::new();
        if unknown == MOST_UNKNOWN {
            continue;
        }
        match identity.chains().learn(&chain, identity.bundles(), now) {
            Ok(fingerprint) => hop.signer = fingerprint.to_vec(),
            Err(CertificateError::UnknownDomain { .. }) => {}
            Err(reason) if refuse => return Err(Denial::Certificate { segment, reason }),
            Err(_) => unknown += 1,
        }
    }
    Ok(())
}

/// The verified certificates of a path's hops, as far as they are known.
pub(crate) fn known(conn: &Connection, identity: &Identity, now: SystemTime) -> Vec<Option<Arc<Chain>>> {
    let find = |hop: &PathSegment| identity.chains().find(&hop.signer, identity.bundles(), now);
    path::segments(conn).iter().map(find).collect()
}

/// Says that we sign our segment's token with what this snapshot presents.
pub(crate) fn sign(own: &mut PathSegment, identity: &Identity) {
    let svid = identity.svid();
    identity.chains().met(svid.leaf(), svid.chain(), identity.bundles());
    svid.leaf().fingerprint().as_slice().clone_into(&mut own.signer);
}

/// Of who calls: it knows what it names. What it named itself by is what its handshake has shown, whoever wrote that
/// there: a hop of upstream's in the place of ours keeps ours.
pub(crate) fn called_by(peer: &Peer, conn: &mut Connection) {
    let Some(previous) = path::previous_mut(conn).filter(|previous| !previous.signer.is_empty()) else {
        return;
    };
    peer.leaf().fingerprint().as_slice().clone_into(&mut previous.signer);
    let identity = peer.identity();
    identity.chains().met(peer.leaf(), peer.chain(), identity.bundles());
    peer.told().add(path::segments(conn).iter().map(|hop| hop.signer.as_slice()));
}

/// Makes a Request or Close fit to go to the next hop: our segment is signed with what we present there, and the chains
/// go along that it has not got. To a hop of which we do not know that it understands them nothing is said of the hops
/// behind it: who takes another's place there would seem to be signed by that.
pub(crate) fn to_next(conn: &mut Connection, peer: &Peer) {
    if let Some(own) = path::current_mut(conn) {
        sign(own, peer.identity());
    }
    let index = path::index(conn);
    let Some(path) = &mut conn.path else { return };
    for (segment, hop) in path.path_segments.iter_mut().enumerate() {
        if segment <= index {
            attach(hop, peer);
        } else if peer.told().is_empty() {
            hop.signer.clear();
        }
    }
}

/// Of what the next hop has answered to what we sent: if it names itself, it has understood.
pub(crate) fn answered_by(peer: &Peer, answer: &Connection) {
    let segments = path::segments(answer);
    let next = segments.get(path::index(answer) + 1);
    if next.is_some_and(|next| next.signer == peer.leaf().fingerprint()) {
        peer.told().add(segments.iter().map(|hop| hop.signer.as_slice()));
    }
}

/// Sends the chains of the hops behind the caller along with its answer, as far as it has not got them.
pub(crate) fn to_caller(answer: &mut Connection, peer: &Peer) {
    let index = path::index(answer);
    let Some(path) = &mut answer.path else { return };
    path.path_segments.iter_mut().skip(index + 1).for_each(|hop| attach(hop, peer));
}

fn attach(hop: &mut PathSegment, peer: &Peer) {
    if hop.signer.is_empty() || peer.told().has(&hop.signer) {
        return;
    }
    let identity = peer.identity();
    if let Some(chain) = identity.chains().find(&hop.signer, identity.bundles(), clock::now()) {
        hop.chain = chain.certificates().iter().map(|der| der.to_vec()).collect();
    }
}
