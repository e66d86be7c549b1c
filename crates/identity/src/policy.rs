//! Upstream's default policies as plain functions (`control-plane.md` 13.2, 13.3; `registry.md` 2.9.4).
//!
//! Tokens are those of the path's segments, in order; an empty text stands for a segment without a token. A denial
//! says which segment failed and what was expected, and never contains a token.
//!
//! [`Policies`] is what a role checks: all of [`Check`] but those that its operator leaves out, and the files that he
//! adds.

use std::{
    collections::BTreeSet,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;

use crate::{
    chains::Chain,
    id::SpiffeId,
    svid::{Bundles, CertificateError, Leaf},
    token::{self, Claims, Malformed},
};

/// One check, which can be left out where a mesh has peers that fail it for honest reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Check {
    /// Upstream's `tokens_valid`.
    TokensValid,
    /// Upstream's `tokens_expired`.
    TokensExpired,
    /// Upstream's `tokens_chained`.
    TokensChained,
    /// Upstream's `prev_token_signed` of servers and `next_token_signed` of clients.
    PeerSigned,
    /// Upstream's `client_allowed`.
    ClientAllowed,
    /// The token that the peer signed is in its own name.
    OwnName,
    /// Every token is addressed to one hop, and to no other.
    OneAudience,
    /// Every hop is of a trust domain that we have roots for.
    TrustDomain,
    /// The tokens of hops that are no neighbours are signed by the certificates that were handed on for them.
    HopsSigned,
    /// A manager serves workloads on its Unix socket only, where the kernel says who they are.
    OnNode,
}

/// A policy of the operator's.
pub trait Judge: fmt::Debug + Send + Sync {
    /// Where it is from: a file's name.
    fn name(&self) -> &str;

    /// Says whether what the document tells is allowed.
    ///
    /// # Errors
    /// Why it cannot say so, without anything of the document.
    fn judge(&self, document: &Value) -> Result<bool, String>;
}

/// What a role checks of paths.
#[derive(Debug, Clone, Default)]
pub struct Policies {
    /// What is left out of [`Check::ALL`].
    pub without: BTreeSet<Check>,
    /// Whether a hop whose certificate nobody has handed on is refused. Only where every hop is ours.
    pub all_hops_signed: bool,
    /// What the operator adds; each must allow.
    pub files: Vec<Arc<dyn Judge>>,
}

/// What is known of a path when it is judged.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// Our index in the path.
    pub index: usize,
    /// Who is at the other end of the connection.
    pub peer: &'a Leaf,
    /// The trust domains that we have roots for.
    pub trusted: &'a Bundles,
    /// The certificates that were handed on for each segment, as far as they were, verified; `None`: in this protocol
    /// there is no place for them.
    pub signers: Option<&'a [Option<Arc<Chain>>]>,
    /// When.
    pub now: SystemTime,
}

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
    /// See [`Check::HopsSigned`].
    #[error(
        "the token in path segment {segment} claims to be of {subject:?}, but the certificate that was handed on for it \
         has not signed it"
    )]
    NotSigned {
        /// Index of the segment.
        segment: usize,
        /// Who claims to have signed it.
        subject: String,
    },
    /// See [`Policies::all_hops_signed`].
    #[error("nobody has handed on the certificate of {subject:?}, whose token is in path segment {segment}")]
    NoSigner {
        /// Index of the segment.
        segment: usize,
        /// Who claims to have signed it.
        subject: String,
    },
    /// A certificate that was handed on is nobody's.
    #[error("the certificate that was handed on for path segment {segment} is not accepted: {reason}")]
    Certificate {
        /// Index of the segment.
        segment: usize,
        /// What is wrong with it.
        reason: CertificateError,
    },
    /// See [`Check::TrustDomain`].
    #[error(
        "{subject:?} made the token in path segment {segment}, and this process has no roots for its trust domain; \
         it trusts {trusted}"
    )]
    ForeignDomain {
        /// Index of the segment.
        segment: usize,
        /// Who claims to have signed it.
        subject: String,
        /// The domains that there are roots for.
        trusted: String,
    },
    /// See [`Check::OneAudience`].
    #[error(
        "the token of {subject:?} in path segment {segment} is addressed to {count} hops; expected was one"
    )]
    Audiences {
        /// Index of the segment.
        segment: usize,
        /// Who claims to have signed it.
        subject: String,
        /// How many.
        count: usize,
    },
    /// A policy of the operator's says no.
    #[error("the policy {file} does not allow it")]
    Policy {
        /// Its file.
        file: String,
    },
    /// A policy of the operator's cannot say.
    #[error("the policy {file} cannot be evaluated: {reason}")]
    Broken {
        /// Its file.
        file: String,
        /// Why.
        reason: String,
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

impl Denial {
    /// `PermissionDenied`; of a policy that cannot be evaluated `Internal` (`control-plane.md` 7.5).
    #[must_use]
    pub fn code(&self) -> tonic::Code {
        match self {
            Self::Broken { .. } => tonic::Code::Internal,
            _ => tonic::Code::PermissionDenied,
        }
    }

    /// The word for what has expired: by another clock it may be valid, and by this one later.
    pub const EXPIRED: &str = "tokens_expired";

    /// A word for what was wrong, for counters and callers: the check that failed.
    #[must_use]
    pub fn check(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "path_cut",
            Self::Malformed { .. } => "tokens_valid",
            Self::Expired { .. } | Self::NoExpiry { .. } => Self::EXPIRED,
            Self::Unchained { .. } => "tokens_chained",
            Self::Unsigned { .. } => "peer_signed",
            Self::Impersonation { .. } => "own_name",
            Self::NotSigned { .. } | Self::NoSigner { .. } | Self::Certificate { .. } => "hops_signed",
            Self::ForeignDomain { .. } => "trust_domain",
            Self::Audiences { .. } => "one_audience",
            Self::Policy { .. } | Self::Broken { .. } => "policy_file",
            Self::NotOwner { .. } => "client_allowed",
        }
    }
}

impl From<Denial> for tonic::Status {
    fn from(denial: Denial) -> Self {
        // The beginning is upstream's text (`control-plane.md` 13.1).
        tonic::Status::new(denial.code(), format!("no sufficient privileges: {denial}"))
    }
}

impl Check {
    /// All, in the order in which they are made.
    pub const ALL: [Self; 10] = [
        Self::TokensValid,
        Self::TokensExpired,
        Self::TokensChained,
        Self::OneAudience,
        Self::TrustDomain,
        Self::PeerSigned,
        Self::OwnName,
        Self::HopsSigned,
        Self::ClientAllowed,
        Self::OnNode,
    ];

    /// Its name for operators.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TokensValid => "tokens_valid",
            Self::TokensExpired => "tokens_expired",
            Self::TokensChained => "tokens_chained",
            Self::PeerSigned => "peer_signed",
            Self::ClientAllowed => "client_allowed",
            Self::OwnName => "own_name",
            Self::OneAudience => "one_audience",
            Self::TrustDomain => "trust_domain",
            Self::HopsSigned => "hops_signed",
            Self::OnNode => "on_node",
        }
    }

    /// What a mesh gives up that does without it.
    #[must_use]
    pub const fn gives_up(self) -> &'static str {
        match self {
            Self::TokensValid => "anything counts as a token: nothing is known of the hops before the last",
            Self::TokensExpired => "a token that leaked, or whose hop has ended, works for ever",
            Self::TokensChained => {
                "a token made for one hop works at another: any hop can join paths that never met"
            }
            Self::PeerSigned => {
                "the caller need not have the key of any hop: whoever has seen a token can use it"
            }
            Self::ClientAllowed => "any workload can replace or remove another's registration",
            Self::OwnName => "a hop can speak in the name of another",
            Self::OneAudience => "a token addressed to many hops can be used again by each of them",
            Self::TrustDomain => "a path may name hops of domains that nobody here vouches for",
            Self::HopsSigned => {
                "a hop in the middle can invent those before it, also where their certificates are known"
            }
            Self::OnNode => {
                "a workload may ask a manager by TCP, from any node: where it runs, and whether the namespace is its \
                 own, is not looked at"
            }
        }
    }
}

impl Policies {
    /// Is it made?
    #[must_use]
    pub fn makes(&self, check: Check) -> bool {
        !self.without.contains(&check)
    }

    /// The checks of a server on Request, Close and Register, after the token update, over segments 0..=`index`:
    /// upstream's `tokens_valid`, `tokens_expired`, `tokens_chained` and `prev_token_signed`, and beyond upstream
    /// that each hop is of a domain we trust, that each token is for one hop, and that the peer signed in its own
    /// name (`control-plane.md` 17, rule 4). `document` is made only where the operator has policies of his own.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn check_server<T: AsRef<str>>(
        &self,
        tokens: &[T],
        evidence: Evidence<'_>,
        document: impl FnOnce() -> Value,
    ) -> Result<(), Denial> {
        let index = evidence.index;
        let missing = |segment| Denial::Missing { segment, count: tokens.len() };
        let left = tokens.get(..=index).ok_or_else(|| missing(index))?;
        let previous = index.checked_sub(1).ok_or(Denial::Missing { segment: 0, count: 0 })?;
        self.check(left, previous, evidence, document)
    }

    /// The checks of a client on the response: the same over the whole path, and `next_token_signed`.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn check_client<T: AsRef<str>>(
        &self,
        tokens: &[T],
        evidence: Evidence<'_>,
        document: impl FnOnce() -> Value,
    ) -> Result<(), Denial> {
        self.check(tokens, evidence.index.saturating_add(1), evidence, document)
    }

    /// Everything about a path whose segment `neighbour` is the peer's.
    fn check<T: AsRef<str>>(
        &self,
        tokens: &[T],
        neighbour: usize,
        evidence: Evidence<'_>,
        document: impl FnOnce() -> Value,
    ) -> Result<(), Denial> {
        use Check::*;
        let Evidence { peer, trusted, now, .. } = evidence;
        let of_tokens = [
            TokensValid,
            TokensExpired,
            TokensChained,
            OneAudience,
            TrustDomain,
            PeerSigned,
            OwnName,
            HopsSigned,
        ];
        if of_tokens.into_iter().any(|check| self.makes(check)) {
            let claims = tokens_valid(tokens)?;
            let made = |check, verdict: &dyn Fn() -> Result<(), Denial>| {
                if self.makes(check) { verdict() } else { Ok(()) }
            };
            made(TokensExpired, &|| expired(&claims, now))?;
            made(TokensChained, &|| chained(&claims))?;
            made(PeerSigned, &|| signed(tokens, neighbour, peer))?;
            made(OwnName, &|| own_name(&claims, neighbour, peer))?;
            made(OneAudience, &|| one_audience(&claims))?;
            made(TrustDomain, &|| of_trusted_domains(&claims, trusted))?;
            made(HopsSigned, &|| self.hops_signed(tokens, &claims, neighbour, evidence))?;
        }
        self.ask(document)
    }

    /// Of the hops that are neither we nor our neighbour, the token of each whose certificate was handed on. One in
    /// another's name says nothing of this hop: a hop of upstream's that took another's place keeps what it does not know.
    fn hops_signed<T: AsRef<str>>(
        &self,
        tokens: &[T],
        claims: &[Claims],
        neighbour: usize,
        Evidence { index, signers, .. }: Evidence<'_>,
    ) -> Result<(), Denial> {
        let Some(signers) = signers else { return Ok(()) };
        for (segment, (jwt, claims)) in tokens.iter().zip(claims).enumerate() {
            if segment == index || segment == neighbour {
                continue;
            }
            let subject = || brief(&claims.subject);
            let signer = signers.get(segment).and_then(Option::as_ref).map(|chain| chain.leaf());
            match signer.filter(|leaf| leaf.id().as_str() == claims.subject) {
                Some(leaf) if token::is_signed_by(jwt.as_ref(), leaf) != Ok(true) => {
                    return Err(Denial::NotSigned { segment, subject: subject() });
                }
                None if self.all_hops_signed => return Err(Denial::NoSigner { segment, subject: subject() }),
                _ => {}
            }
        }
        Ok(())
    }

    /// Asks the operator's policies only.
    ///
    /// # Errors
    /// The first that does not allow, or cannot say.
    pub fn ask(&self, document: impl FnOnce() -> Value) -> Result<(), Denial> {
        if self.files.is_empty() {
            return Ok(());
        }
        let document = document();
        self.files.iter().try_for_each(|policy| {
            let file = || policy.name().to_owned();
            match policy.judge(&document) {
                Ok(true) => Ok(()),
                Ok(false) => Err(Denial::Policy { file: file() }),
                Err(reason) => Err(Denial::Broken { file: file(), reason }),
            }
        })
    }
}

/// [`Policies::check_server`] with upstream's checks and [`Check::OwnName`], without roots and files.
pub fn check_server<T: AsRef<str>>(
    tokens: &[T],
    index: usize,
    peer: &Leaf,
    now: SystemTime,
) -> Result<(), Denial> {
    without_roots().check_server(
        tokens,
        Evidence { index, peer, trusted: &Bundles::default(), signers: None, now },
        || Value::Null,
    )
}

/// [`Policies::check_client`] with upstream's checks and [`Check::OwnName`], without roots and files.
pub fn check_client<T: AsRef<str>>(
    tokens: &[T],
    index: usize,
    peer: &Leaf,
    now: SystemTime,
) -> Result<(), Denial> {
    without_roots().check_client(
        tokens,
        Evidence { index, peer, trusted: &Bundles::default(), signers: None, now },
        || Value::Null,
    )
}

fn without_roots() -> Policies {
    Policies { without: BTreeSet::from([Check::TrustDomain]), ..Policies::default() }
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
    // A lone token has nobody to be addressed to.
    if tokens.len() < 2 {
        return Ok(());
    }
    chained(&tokens_valid(tokens)?)
}

/// The token before `index` is there and was signed by the peer's key.
pub fn prev_token_signed<T: AsRef<str>>(tokens: &[T], index: usize, peer: &Leaf) -> Result<(), Denial> {
    let previous = index.checked_sub(1).ok_or(Denial::Missing { segment: 0, count: tokens.len() })?;
    signed(tokens, previous, peer)
}

/// The token after `index` is there and was signed by the peer's key.
pub fn next_token_signed<T: AsRef<str>>(tokens: &[T], index: usize, peer: &Leaf) -> Result<(), Denial> {
    signed(tokens, index.saturating_add(1), peer)
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
        // An empty subject is a missing one, and nobody's.
        if pair[1].subject.is_empty() || !pair[0].audience.contains(&pair[1].subject) {
            return Err(Denial::Unchained {
                segment,
                audience: pair[0].audience.iter().take(4).map(|text| brief(text)).collect(),
                next: brief(&pair[1].subject),
            });
        }
    }
    Ok(())
}

fn signed<T: AsRef<str>>(tokens: &[T], segment: usize, peer: &Leaf) -> Result<(), Denial> {
    let Some(jwt) = tokens.get(segment).map(AsRef::as_ref) else {
        return Err(Denial::Missing { segment, count: tokens.len() });
    };
    match token::is_signed_by(jwt, peer) {
        Ok(true) => Ok(()),
        Ok(false) => {
            let subject = token::claims(jwt).map(|claims| brief(&claims.subject)).unwrap_or_default();
            Err(Denial::Unsigned { segment, subject, peer: peer.id().clone() })
        }
        Err(reason) => Err(Denial::Malformed { segment, reason }),
    }
}

fn one_audience(claims: &[Claims]) -> Result<(), Denial> {
    match claims.iter().enumerate().find(|(_, claims)| claims.audience.len() > 1) {
        None => Ok(()),
        Some((segment, claims)) => {
            Err(Denial::Audiences { segment, subject: brief(&claims.subject), count: claims.audience.len() })
        }
    }
}

fn of_trusted_domains(claims: &[Claims], trusted: &Bundles) -> Result<(), Denial> {
    let is_trusted = |subject: &str| {
        let id = subject.parse::<SpiffeId>();
        id.is_ok_and(|id| trusted.domains().any(|domain| *domain == id.trust_domain()))
    };
    match claims.iter().enumerate().find(|(_, claims)| !is_trusted(&claims.subject)) {
        None => Ok(()),
        Some((segment, claims)) => Err(Denial::ForeignDomain {
            segment,
            subject: brief(&claims.subject),
            trusted: trusted.domains().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        }),
    }
}

fn own_name(claims: &[Claims], segment: usize, peer: &Leaf) -> Result<(), Denial> {
    let Some(claims) = claims.get(segment) else {
        return Err(Denial::Missing { segment, count: claims.len() });
    };
    if claims.subject == peer.id().as_str() {
        return Ok(());
    }
    Err(Denial::Impersonation { segment, subject: brief(&claims.subject), peer: peer.id().clone() })
}

/// Peers choose these texts: a denial stays short whatever they send.
fn brief(text: &str) -> String {
    text.chars().take(128).collect()
}
