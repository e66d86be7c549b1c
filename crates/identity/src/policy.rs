//! Upstream's default policies as plain functions (`control-plane.md` 13.2, 13.3; `registry.md` 2.9.4).
//!
//! Tokens are those of the path's segments, in order; an empty text stands for a segment without a token. A denial
//! says which segment failed and what was expected, and never contains a token.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::{
    id::SpiffeId,
    svid::Leaf,
    token::{self, Claims, Malformed},
};

/// Why a policy says no.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Denial {
    /// A segment that must be there is not.
    #[error("the path has no segment {segment} (it has {count}); the request came without a usable path")]
    Missing {
        /// Index of the segment.
        segment: usize,
        /// How many there are.
        count: usize,
    },
    /// `tokens_valid`
    #[error("path segment {segment} holds no JWT: {reason}")]
    Malformed {
        /// Index of the segment.
        segment: usize,
        /// What is wrong with it.
        reason: Malformed,
    },
    /// `tokens_expired`
    #[error("the token of {subject:?} in path segment {segment} expired {}s ago; refresh, or compare the clocks", ago.as_secs())]
    Expired {
        /// Index of the segment.
        segment: usize,
        /// Who claims to have signed it.
        subject: String,
        /// How long ago.
        ago: Duration,
    },
    /// `tokens_expired`
    #[error("the token of {subject:?} in path segment {segment} has no expiry (claim exp)")]
    NoExpiry {
        /// Index of the segment.
        segment: usize,
        /// Who claims to have signed it.
        subject: String,
    },
    /// `tokens_chained`
    #[error(
        "the token in path segment {segment} is addressed to {audience:?}, but the next segment's was made by {next:?}"
    )]
    Unchained {
        /// Index of the earlier segment.
        segment: usize,
        /// Its audience.
        audience: Vec<String>,
        /// The subject of the following segment.
        next: String,
    },
    /// `prev_token_signed`, `next_token_signed`
    #[error(
        "the token of {subject:?} in path segment {segment} was not signed by the connection's peer, {peer}"
    )]
    Unsigned {
        /// Index of the segment.
        segment: usize,
        /// Who claims to have signed it.
        subject: String,
        /// Whose certificate the connection has.
        peer: SpiffeId,
    },
    /// The peer signed, but in another's name.
    #[error("{peer} signed the token in path segment {segment} in the name of {subject:?}")]
    Impersonation {
        /// Index of the segment.
        segment: usize,
        /// The name it used.
        subject: String,
        /// Who it is.
        peer: SpiffeId,
    },
    /// `client_allowed`
    #[error("{name:?} belongs to {owner:?}; {caller:?} may not change it")]
    NotOwner {
        /// The resource.
        name: String,
        /// Who registered it first.
        owner: String,
        /// Who asked.
        caller: String,
    },
}

impl From<Denial> for tonic::Status {
    fn from(denial: Denial) -> Self {
        // The beginning is upstream's text (`control-plane.md` 13.1).
        tonic::Status::permission_denied(format!("no sufficient privileges: {denial}"))
    }
}

/// The checks of a server on Request, Close and Register, after the token update: `tokens_valid`,
/// `tokens_expired`, `tokens_chained` over segments 0..=`index`, and `prev_token_signed`. Beyond upstream, the
/// previous token must be in its signer's own name (`control-plane.md` 17, rule 4).
pub fn check_server<T: AsRef<str>>(
    tokens: &[T],
    index: usize,
    peer: &Leaf,
    now: SystemTime,
) -> Result<(), Denial> {
    let missing = |segment| Denial::Missing { segment, count: tokens.len() };
    let left = tokens.get(..=index).ok_or_else(|| missing(index))?;
    let previous = index.checked_sub(1).ok_or(Denial::Missing { segment: 0, count: 0 })?;
    let claims = tokens_valid(left)?;
    expired(&claims, now)?;
    chained(&claims)?;
    signed(tokens, &claims, previous, peer)?;
    own_name(&claims[previous], previous, peer)
}

/// The checks of a client on the response: the three common ones over the whole path and `next_token_signed`.
pub fn check_client<T: AsRef<str>>(
    tokens: &[T],
    index: usize,
    peer: &Leaf,
    now: SystemTime,
) -> Result<(), Denial> {
    let claims = tokens_valid(tokens)?;
    expired(&claims, now)?;
    chained(&claims)?;
    let next = index.saturating_add(1);
    signed(tokens, &claims, next, peer)?;
    own_name(&claims[next], next, peer)
}

/// Every token parses as a JWT; returns their claims, unverified.
pub fn tokens_valid<T: AsRef<str>>(tokens: &[T]) -> Result<Vec<Claims>, Denial> {
    let parse = |(segment, jwt): (usize, &T)| {
        token::claims(jwt.as_ref()).map_err(|reason| Denial::Malformed { segment, reason })
    };
    tokens.iter().enumerate().map(parse).collect()
}

/// Every token's `exp` is later than `now`.
pub fn tokens_expired<T: AsRef<str>>(tokens: &[T], now: SystemTime) -> Result<(), Denial> {
    expired(&tokens_valid(tokens)?, now)
}

/// Each token's audience contains the subject of the next.
pub fn tokens_chained<T: AsRef<str>>(tokens: &[T]) -> Result<(), Denial> {
    chained(&tokens_valid(tokens)?)
}

/// The token before `index` is there and was signed by the peer's key.
pub fn prev_token_signed<T: AsRef<str>>(tokens: &[T], index: usize, peer: &Leaf) -> Result<(), Denial> {
    let previous = index.checked_sub(1).ok_or(Denial::Missing { segment: 0, count: tokens.len() })?;
    signed(tokens, &tokens_valid(tokens)?, previous, peer)
}

/// The token after `index` is there and was signed by the peer's key.
pub fn next_token_signed<T: AsRef<str>>(tokens: &[T], index: usize, peer: &Leaf) -> Result<(), Denial> {
    signed(tokens, &tokens_valid(tokens)?, index.saturating_add(1), peer)
}

/// Registry: nobody owns `name` yet (`owner_path_ids` is `None`), or its first path id is the caller's, `caller`
/// being the subject of the token in segment 0.
pub fn client_allowed(name: &str, owner_path_ids: Option<&[String]>, caller: &str) -> Result<(), Denial> {
    let Some(ids) = owner_path_ids else { return Ok(()) };
    let owner = ids.first().map_or("", String::as_str);
    if owner == caller {
        return Ok(());
    }
    Err(Denial::NotOwner { name: brief(name), owner: brief(owner), caller: brief(caller) })
}

fn expired(claims: &[Claims], now: SystemTime) -> Result<(), Denial> {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    for (segment, claims) in claims.iter().enumerate() {
        let subject = || brief(&claims.subject);
        let exp = claims.expires.ok_or_else(|| Denial::NoExpiry { segment, subject: subject() })?;
        // Negative, huge and odd numbers are data of the peer: they saturate.
        let exp = Duration::try_from_secs_f64(exp).unwrap_or(if exp > 0.0 {
            Duration::MAX
        } else {
            Duration::ZERO
        });
        if exp <= now {
            return Err(Denial::Expired { segment, subject: subject(), ago: now.saturating_sub(exp) });
        }
    }
    Ok(())
}

fn chained(claims: &[Claims]) -> Result<(), Denial> {
    for (segment, pair) in claims.windows(2).enumerate() {
        if !pair[0].audience.contains(&pair[1].subject) {
            return Err(Denial::Unchained {
                segment,
                audience: pair[0].audience.iter().take(4).map(|text| brief(text)).collect(),
                next: brief(&pair[1].subject),
            });
        }
    }
    Ok(())
}

fn signed<T: AsRef<str>>(tokens: &[T], claims: &[Claims], segment: usize, peer: &Leaf) -> Result<(), Denial> {
    let (Some(jwt), Some(claims)) = (tokens.get(segment), claims.get(segment)) else {
        return Err(Denial::Missing { segment, count: tokens.len() });
    };
    match token::is_signed_by(jwt.as_ref(), peer) {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(Denial::Unsigned { segment, subject: brief(&claims.subject), peer: peer.id().clone() })
        }
        Err(reason) => Err(Denial::Malformed { segment, reason }),
    }
}

fn own_name(claims: &Claims, segment: usize, peer: &Leaf) -> Result<(), Denial> {
    if claims.subject == peer.id().as_str() {
        return Ok(());
    }
    Err(Denial::Impersonation { segment, subject: brief(&claims.subject), peer: peer.id().clone() })
}

/// Peers choose these texts: a denial stays short whatever they send.
fn brief(text: &str) -> String {
    text.chars().take(128).collect()
}
