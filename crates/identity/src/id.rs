//! SPIFFE IDs and trust domains, validated once.
//!
//! The grammar is that of the SPIFFE-ID standard, section 2: `spiffe://trust-domain/path`, no port, user,
//! query, fragment or percent encoding; at most 2048 bytes.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

const SCHEME: &str = "spiffe://";
const MAX_ID: usize = 2048;
const MAX_TRUST_DOMAIN: usize = 255;

/// A valid SPIFFE ID, cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    text: Arc<str>,
    /// Where the path starts in `text`.
    path_at: u16,
}

/// The name of a trust domain: the root that vouches for an ID.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrustDomain(Arc<str>);

/// Why a text is no SPIFFE ID or trust domain. The rejected text is quoted, shortened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what:?} is not a SPIFFE ID or trust domain: {reason}")]
pub struct InvalidId {
    what: String,
    reason: &'static str,
}

impl SpiffeId {
    /// The whole ID, `spiffe://…`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain of the ID.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.text[SCHEME.len()..usize::from(self.path_at)].into())
    }

    /// The path with its leading slash, or the empty text for the ID of a trust domain itself.
    pub fn path(&self) -> &str {
        &self.text[usize::from(self.path_at)..]
    }

    /// Is the ID in this trust domain?
    pub fn is_member_of(&self, domain: &TrustDomain) -> bool {
        self.text[SCHEME.len()..usize::from(self.path_at)] == *domain.0
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        if text.len() > MAX_ID {
            return Err(InvalidId::new(text, "longer than 2048 bytes"));
        }
        let rest =
            text.strip_prefix(SCHEME).ok_or_else(|| InvalidId::new(text, "it must start with spiffe://"))?;
        let domain = rest.find('/').map_or(rest, |slash| &rest[..slash]);
        check_trust_domain(text, domain)?;
        let path = &rest[domain.len()..];
        for segment in path.split('/').skip(1) {
            if segment.is_empty() {
                return Err(InvalidId::new(text, "empty path segment"));
            }
            if segment == "." || segment == ".." {
                return Err(InvalidId::new(text, "relative path segment"));
            }
            if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
                return Err(InvalidId::new(
                    text,
                    "a path has only letters, digits, dots, dashes and underscores",
                ));
            }
        }
        // Cannot fail: the trust domain was checked to be at most 255 bytes.
        let path_at =
            u16::try_from(SCHEME.len() + domain.len()).map_err(|_| InvalidId::new(text, "too long"))?;
        Ok(Self { text: text.into(), path_at })
    }
}

impl TrustDomain {
    /// The bare name, without a scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The SPIFFE ID of the trust domain itself, `spiffe://name`.
    pub fn id(&self) -> SpiffeId {
        let text: Arc<str> = format!("{SCHEME}{}", self.0).into();
        SpiffeId { path_at: u16::try_from(text.len()).unwrap_or(u16::MAX), text }
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidId;

    /// Accepts the bare name and any SPIFFE ID in it (Workload API maps are keyed by `spiffe://name`).
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        if text.starts_with(SCHEME) {
            return SpiffeId::from_str(text).map(|id| id.trust_domain());
        }
        check_trust_domain(text, text)?;
        Ok(Self(text.into()))
    }
}

fn check_trust_domain(text: &str, domain: &str) -> Result<(), InvalidId> {
    if domain.is_empty() {
        return Err(InvalidId::new(text, "no trust domain"));
    }
    if domain.len() > MAX_TRUST_DOMAIN {
        return Err(InvalidId::new(text, "trust domain longer than 255 bytes"));
    }
    if !domain
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'))
    {
        return Err(InvalidId::new(
            text,
            "a trust domain has only lower-case letters, digits, dots, dashes and underscores",
        ));
    }
    Ok(())
}

impl InvalidId {
    fn new(what: &str, reason: &'static str) -> Self {
        Self { what: what.chars().take(80).collect(), reason }
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl TryFrom<String> for TrustDomain {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> String {
        id.as_str().into()
    }
}

impl From<TrustDomain> for String {
    fn from(domain: TrustDomain) -> String {
        domain.as_str().into()
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn valid_ids() {
        for (text, domain, path) in [
            ("spiffe://a.b/ns/default/sa/x", "a.b", "/ns/default/sa/x"),
            ("spiffe://example.org", "example.org", ""),
            ("spiffe://d_1-x/A.b-c_D", "d_1-x", "/A.b-c_D"),
        ] {
            let id: SpiffeId = text.parse().unwrap();
            assert_eq!((id.as_str(), id.trust_domain().as_str(), id.path()), (text, domain, path));
            assert!(id.is_member_of(&domain.parse().unwrap()));
        }
        assert_eq!("spiffe://x.y/z".parse::<TrustDomain>().unwrap().id().as_str(), "spiffe://x.y");
    }

    #[test]
    fn invalid_ids() {
        let long = format!("spiffe://a/{}", "x".repeat(2048));
        let long_domain = format!("spiffe://{}/x", "x".repeat(256));
        for text in [
            "",
            "spiffe:/a/b",
            "http://a/b",
            "SPIFFE://a/b",
            "spiffe:///x",
            "spiffe://A/x",
            "spiffe://a:1/x",
            "spiffe://u@a/x",
            "spiffe://a/",
            "spiffe://a//x",
            "spiffe://a/x/",
            "spiffe://a/../x",
            "spiffe://a/./x",
            "spiffe://a/x?y",
            "spiffe://a/x#y",
            "spiffe://a/%41",
            "spiffe://a/é",
            &long,
            &long_domain,
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn parser_never_panics_and_keeps_the_text(text in "(spiffe://)?[a-zA-Z0-9./:%é_-]{0,40}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.as_str(), &text);
                prop_assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
            }
        }
    }
}
