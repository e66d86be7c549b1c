//! Authorities that several processes share, in a Secret.

use std::time::SystemTime;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nsm_identity::{
    TrustDomain,
    ca::rotation::{Authorities, AuthorityError},
};
use serde_json::{Value, json};
use tracing::warn;

use crate::objects::{ApiError, Objects};

/// The Secret's only key.
const KEY: &str = "authorities.pem";

/// Why there are no authorities.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The API server.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// They cannot be made.
    #[error(transparent)]
    Make(#[from] AuthorityError),
    /// What is in the Secret cannot be used, and all identities hang on it.
    #[error(
        "{secret}: {source}; restore it, or delete it to begin with new authorities, which ends all certificates of \
         the old ones"
    )]
    Damaged {
        /// Which.
        secret: String,
        /// What is wrong.
        source: AuthorityError,
    },
    /// It is another's.
    #[error(
        "{secret} holds authorities of {found}, and the trust domain here is {wanted}; expected one trust domain for \
         one Secret: give that one, or delete the Secret, which ends all certificates of the old domain"
    )]
    OtherDomain {
        /// Which.
        secret: String,
        /// Whose authorities it holds.
        found: String,
        /// Whose they should be.
        wanted: String,
    },
}

/// The authorities of a Secret, made and renewed where that is due: those of a trust domain, or without one those of
/// servers, which nobody misses when they are damaged and replaced.
///
/// # Errors
/// The Secret cannot be read or written, or it holds what must not be replaced.
pub async fn keep(
    api: &Objects,
    namespace: &str,
    name: &str,
    domain: Option<&TrustDomain>,
    now: SystemTime,
) -> Result<Authorities, KeptError> {
    let secret = format!("the Secret {namespace}/{name}");
    let collection = format!("/api/v1/namespaces/{namespace}/secrets");
    let made = || match domain {
        Some(domain) => Authorities::of_domain(domain.clone(), now),
        None => Authorities::new(now),
    };
    api.keep(&secret, &collection, name, |found| {
        let kept = found.as_ref().and_then(|secret| text(&secret["data"][KEY]));
        let authorities = match kept.as_deref().map(Authorities::parse) {
            Some(Ok(kept)) if domain.is_some_and(|wanted| kept.domain() != Some(wanted)) => {
                let found = kept.domain().map_or_else(|| "no trust domain".into(), ToString::to_string);
                let wanted = domain.map_or_else(String::new, ToString::to_string);
                return Err(KeptError::OtherDomain { secret: secret.clone(), found, wanted });
            }
            Some(Ok(kept)) => match kept.renewed(now)? {
                None => return Ok((kept, None)),
                Some(next) => next,
            },
            Some(Err(source)) if domain.is_some() => {
                return Err(KeptError::Damaged { secret: secret.clone(), source });
            }
            Some(Err(error)) => {
                warn!(%error, secret, "it is replaced");
                made()?
            }
            None => made()?,
        };
        let mut object = found.unwrap_or_else(|| {
            json!({
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": { "name": name, "namespace": namespace },
                "type": "Opaque",
            })
        });
        object["data"] = json!({ KEY: BASE64_STANDARD.encode(authorities.pem()) });
        Ok((authorities, Some(object)))
    })
    .await
}

fn text(value: &Value) -> Option<String> {
    String::from_utf8(BASE64_STANDARD.decode(value.as_str()?).ok()?).ok()
}
