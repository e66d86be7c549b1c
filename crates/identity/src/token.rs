//! The JWTs that name who asks whom (`control-plane.md` section 5.1).
//!
//! ES256, signed by the key of the X.509-SVID: `sub` is the signer, `aud` an *array* with the peer, `exp` in whole
//! seconds. Upstream's Rego decodes them the same way, see [`crate::policy`].

use std::{
    cell::RefCell,
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::{
    Error,
    id::SpiffeId,
    svid::{Leaf, Svid},
};

/// Upstream's default for `NSM_MAX_TOKEN_LIFETIME`.
pub const DEFAULT_MAX_LIFETIME: Duration = Duration::from_secs(600);

/// Tokens have some 400 bytes; a peer that signs more of them costs time, not memory.
const LONGEST_REMEMBERED: usize = 4096;

/// A signed token and the time that is reported beside it. `Debug` does not show the token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    jwt: Arc<str>,
    expires: SystemTime,
}

/// What a token says, unverified.
#[derive(Debug, Clone, PartialEq)]
pub struct Claims {
    /// The claimed signer; empty if the claim is missing.
    pub subject: String,
    /// The audience if it is an array, which is the only form upstream's chain policy reads.
    pub audience: Vec<String>,
    /// `exp`, seconds since 1970.
    pub expires: Option<f64>,
}

/// Why a text is no JWT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Not `header.payload.signature`.
    #[error("it does not have three parts")]
    Parts,
    /// A part is not unpadded base64url.
    #[error("its {0} is not base64url")]
    Base64(&'static str),
    /// A part is not a JSON object.
    #[error("its {0} is not a JSON object")]
    Json(&'static str),
}

/// Makes a token: `sub` = the SVID's ID, `aud` = \[`audience`\].
///
/// Its lifetime ends at the earlier of `now + max_lifetime` and the SVID's end; `exp` is that in whole seconds. The expiry
/// beside it is also limited by the end of the peer's certificate, and is [`shortly_before`] that of either.
///
/// # Errors
/// The SVID has expired, or its key cannot sign.
pub fn mint(
    svid: &Svid,
    audience: Option<&SpiffeId>,
    peer_not_after: Option<SystemTime>,
    max_lifetime: Duration,
    now: SystemTime,
) -> Result<Token, Error> {
    let (exp, end) = ends(svid, max_lifetime, now)?;
    let jwt = sign(svid, audience, exp)?.into();
    Ok(Token { jwt, expires: peer_not_after.map_or(end, |peer| end.min(shortly_before(peer, now))) })
}

/// Makes a token in place of another one, which ends at `expires`; it ends then, too. `exp` is that in whole seconds, upwards:
/// what ends a moment before a whole second, because a certificate does, would be over up to a second before that.
///
/// # Errors
/// As [`mint`]; or `expires` is over.
pub fn mint_until(
    svid: &Svid,
    audience: Option<&SpiffeId>,
    peer_not_after: Option<SystemTime>,
    expires: SystemTime,
    now: SystemTime,
) -> Result<Token, Error> {
    let since_1970 = expires.duration_since(UNIX_EPOCH).unwrap_or_default();
    let whole =
        UNIX_EPOCH + Duration::from_secs(since_1970.as_secs() + u64::from(since_1970.subsec_nanos() > 0));
    let left = whole.duration_since(now).unwrap_or_default();
    if expires <= now {
        return Err(Error::SvidExpired(svid.id().clone()));
    }
    let token = mint(svid, audience, peer_not_after, left, now)?;
    Ok(Token { expires: token.expires.min(expires), ..token })
}

/// Makes the tokens of one SVID for one peer. Tokens made within the same second say the same, so they are signed
/// once: when many wires are set up, signing would be a good part of the work.
#[derive(Default)]
pub struct Minter(Mutex<Option<(u64, Arc<str>)>>);

impl Minter {
    /// As [`mint`]; `svid` and `peer` must be the same at each call.
    ///
    /// # Errors
    /// As [`mint`].
    pub fn mint(
        &self,
        svid: &Svid,
        peer: &Leaf,
        max_lifetime: Duration,
        now: SystemTime,
    ) -> Result<Token, Error> {
        let (exp, end) = ends(svid, max_lifetime, now)?;
        let expires = end.min(shortly_before(peer.not_after(), now));
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((when, jwt)) = &*last
            && *when == exp
        {
            return Ok(Token { jwt: jwt.clone(), expires });
        }
        // Signed under the lock: who comes at the same moment needs the same token.
        let jwt: Arc<str> = sign(svid, Some(peer.id()), exp)?.into();
        *last = Some((exp, jwt.clone()));
        Ok(Token { jwt, expires })
    }
}

impl fmt::Debug for Minter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Minter").finish_non_exhaustive()
    }
}

/// When the token of an SVID ends, in whole seconds, and what is said beside it.
fn ends(svid: &Svid, max_lifetime: Duration, now: SystemTime) -> Result<(u64, SystemTime), Error> {
    let bound = svid.not_after();
    let lived = now.checked_add(max_lifetime).unwrap_or(bound);
    let end = lived.min(bound);
    if end <= now {
        return Err(Error::SvidExpired(svid.id().clone()));
    }
    let exp = end.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    Ok((exp, lived.min(shortly_before(bound, now))))
}

/// When a token ends that a certificate bounds: a thousandth before that, of what is left. So what is made later ends later,
/// also then: whoever compares two tells which is of the later request.
fn shortly_before(not_after: SystemTime, now: SystemTime) -> SystemTime {
    not_after - not_after.duration_since(now).unwrap_or_default() / 1000
}

fn sign(svid: &Svid, audience: Option<&SpiffeId>, exp: u64) -> Result<String, Error> {
    let claims = match audience {
        Some(peer) => json!({ "sub": svid.id(), "aud": [peer], "exp": exp }),
        None => json!({ "sub": svid.id(), "exp": exp }),
    };
    // The header never changes: {"alg":"ES256","typ":"JWT"}.
    let mut jwt = String::from("eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCJ9.");
    URL_SAFE_NO_PAD.encode_string(claims.to_string(), &mut jwt);
    let signature = svid.sign(jwt.as_bytes()).map_err(|_| Error::Sign(svid.id().clone()))?;
    jwt.push('.');
    URL_SAFE_NO_PAD.encode_string(signature, &mut jwt);
    Ok(jwt)
}

/// Tokens whose claims are remembered: those that the requests of a second or two hold, over and over.
const MOST_READ: usize = 256;

thread_local! {
    static READ: RefCell<HashMap<Box<str>, Claims>> = RefCell::default();
}

/// Reads a token's claims without verifying who signed it.
///
/// # Errors
/// The text is not a JWT; the reason never quotes it.
pub fn claims(jwt: &str) -> Result<Claims, Malformed> {
    if let Some(read) = READ.with_borrow(|read| read.get(jwt).cloned()) {
        return Ok(read);
    }
    let claims = read(jwt)?;
    // One audience is what tokens have; many would take far more memory than their text.
    if jwt.len() <= LONGEST_REMEMBERED && claims.audience.len() <= 1 {
        READ.with_borrow_mut(|read| {
            if read.len() >= MOST_READ {
                read.clear();
            }
            read.insert(jwt.into(), claims.clone());
        });
    }
    Ok(claims)
}

fn read(jwt: &str) -> Result<Claims, Malformed> {
    let (header, payload, signature) = parts(jwt)?;
    object(header, "header")?;
    let payload = object(payload, "payload")?;
    decode(signature, "signature")?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Ok(Claims {
        subject: payload.get("sub").and_then(text).unwrap_or_default(),
        audience: payload
            .get("aud")
            .and_then(Value::as_array)
            .map(|list| list.iter().filter_map(text).collect())
            .unwrap_or_default(),
        expires: payload.get("exp").and_then(Value::as_f64),
    })
}

/// A token's header, payload and signature, unverified: what upstream's policies see of it.
///
/// # Errors
/// The text is not a JWT; the reason never quotes it.
pub fn decode_parts(jwt: &str) -> Result<(Value, Value, Vec<u8>), Malformed> {
    let (header, payload, signature) = parts(jwt)?;
    Ok((
        object(header, "header")?.into(),
        object(payload, "payload")?.into(),
        decode(signature, "signature")?,
    ))
}

/// Does the token's ES256 signature verify with the key of this certificate? A token with another algorithm in its
/// header, and a certificate with another kind of key, do not.
///
/// # Errors
/// The text is not a JWT.
pub fn is_signed_by(jwt: &str, signer: &Leaf) -> Result<bool, Malformed> {
    if signer.remembers(jwt) {
        return Ok(true);
    }
    let (header, payload, signature) = parts(jwt)?;
    let algorithm = object(header, "header")?;
    let signature = decode(signature, "signature")?;
    if algorithm.get("alg").and_then(Value::as_str) != Some("ES256") {
        return Ok(false);
    }
    let signed = &jwt[..header.len() + 1 + payload.len()];
    let is_signed = signer.has_signed(signed.as_bytes(), &signature);
    if is_signed && jwt.len() <= LONGEST_REMEMBERED {
        signer.remember(jwt);
    }
    Ok(is_signed)
}

impl Token {
    /// A token that came from somebody else, with the expiry that came beside it; nothing is verified.
    pub fn received(jwt: String, expires: SystemTime) -> Self {
        Self { jwt: jwt.into(), expires }
    }

    /// The compact form, `header.payload.signature`. A secret: do not log it.
    pub fn jwt(&self) -> &str {
        &self.jwt
    }

    /// The expiry that travels beside the token.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }

    /// The expiry as the metadata value `nsm-client-token-expires`: RFC 3339, UTC, nanoseconds.
    pub fn expires_rfc3339(&self) -> String {
        humantime::format_rfc3339_nanos(self.expires).to_string()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// Parses RFC 3339 with an optional fraction and `Z` or a numeric offset, as Go writes it.
pub fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    let split = text.len().checked_sub(6).filter(|&at| text.is_char_boundary(at));
    let (local, offset) = match split.map(|at| text.split_at(at)) {
        Some((local, zone)) if zone.starts_with(['+', '-']) => {
            let (hours, minutes) = zone[1..].split_once(':')?;
            let digits = |s: &str| (s.len() == 2).then(|| s.parse::<u64>().ok()).flatten();
            let (hours, minutes) = (digits(hours)?, digits(minutes)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            (local, Some((zone.starts_with('+'), Duration::from_secs(hours * 3600 + minutes * 60))))
        }
        _ => (text.strip_suffix(['Z', 'z'])?, None),
    };
    let utc = humantime::parse_rfc3339(&format!("{local}Z")).ok()?;
    match offset {
        None => Some(utc),
        Some((true, east)) => utc.checked_sub(east),
        Some((false, west)) => utc.checked_add(west),
    }
}

fn parts(jwt: &str) -> Result<(&str, &str, &str), Malformed> {
    let mut parts = jwt.split('.');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(header), Some(payload), Some(signature), None) => Ok((header, payload, signature)),
        _ => Err(Malformed::Parts),
    }
}

fn decode(part: &str, name: &'static str) -> Result<Vec<u8>, Malformed> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| Malformed::Base64(name))
}

fn object(part: &str, name: &'static str) -> Result<serde_json::Map<String, Value>, Malformed> {
    serde_json::from_slice(&decode(part, name)?).map_err(|_| Malformed::Json(name))
}
