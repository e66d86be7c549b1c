//! What agents ask of signers: JSON by HTTPS. The token that says who asks is in the header `Authorization`.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};

use crate::pod::PodUid;

/// Where a signer answers.
pub const PATH: &str = "/v1/sign";
/// Whom the tokens of agents are for.
pub const AUDIENCE: &str = "nsm-identity";
/// The most that either of them says, bytes.
pub const MAX_BODY: usize = 64 * 1024;
/// The key of the ConfigMap with the certificates to trust.
pub const ROOTS: &str = "roots.pem";

/// Asks for an X.509-SVID of a pod of the asking agent's node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ask {
    /// The pod.
    pub pod: PodUid,
    /// PKCS#10: the key that shall be the pod's.
    pub request: Der,
}

/// What was signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Signed {
    /// The certificates, leaf first.
    pub chain: Vec<Der>,
    /// Whom the trust domain trusts now.
    pub roots: Vec<Der>,
}

/// Something in DER; base64 on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Der(pub Vec<u8>);

impl TryFrom<String> for Der {
    type Error = base64::DecodeError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        BASE64_STANDARD.decode(text).map(Self)
    }
}

impl From<Der> for String {
    fn from(der: Der) -> Self {
        BASE64_STANDARD.encode(der.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_understood_and_nothing_else() {
        let text = r#"{"pod":"0e2b6c1e-3f1a-4c52-9d4f-0123456789ab","request":"AAEC"}"#;
        let ask: Ask = serde_json::from_str(text).unwrap();
        assert_eq!(ask.request, Der(vec![0, 1, 2]));
        assert_eq!(serde_json::to_string(&ask).unwrap(), text);
        for bad in [
            r#"{"pod":"../../x","request":"AAEC"}"#,
            r#"{"pod":"0e2b6c1e-3f1a-4c52-9d4f-0123456789ab","request":"!"}"#,
            r#"{"pod":"0e2b6c1e-3f1a-4c52-9d4f-0123456789ab","request":"AAEC","id":"spiffe://a/b"}"#,
        ] {
            assert!(serde_json::from_str::<Ask>(bad).is_err(), "{bad}");
        }
    }
}
