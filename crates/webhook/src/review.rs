//! What the API server asks, and what it is answered (`AdmissionReview` of `admission.k8s.io/v1`).

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::inject::{Namespace, Plan, Verdict, subject};
use crate::settings::Settings;

/// The only version that API servers send since Kubernetes 1.22.
const VERSION: &str = "admission.k8s.io/v1";

/// Why a body is no question.
#[derive(Debug, thiserror::Error)]
pub enum BadReview {
    /// Not JSON, or its parts have other types.
    #[error("the body is no AdmissionReview: {0}")]
    Json(#[from] serde_json::Error),
    /// Something else than a review.
    #[error("the body is {api_version:?} {kind:?}; expected \"admission.k8s.io/v1\" \"AdmissionReview\"")]
    Other {
        /// Its `apiVersion`.
        api_version: String,
        /// Its `kind`.
        kind: String,
    },
    /// A review that asks nothing, an answer for example.
    #[error("the AdmissionReview has no request with a uid: it is for API servers to ask")]
    NoRequest,
}

/// What the API server wants to know.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// Which question it is; the answer repeats it.
    #[serde(default)]
    pub uid: String,
    /// Of what the object is.
    pub kind: Kind,
    /// CREATE, UPDATE, DELETE or CONNECT.
    pub operation: String,
    /// Where the object will be.
    #[serde(default)]
    pub namespace: String,
    /// The object's name, where it has one already.
    #[serde(default)]
    pub name: String,
    /// Nothing will come of it: nobody is to be told.
    #[serde(default)]
    pub dry_run: Option<bool>,
    /// The object.
    #[serde(default)]
    pub object: Value,
}

/// A kind of objects.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Kind {
    /// API group; empty: core.
    #[serde(default)]
    pub group: String,
    /// `Pod`.
    pub kind: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    request: Option<Request>,
}

/// Reads a question.
///
/// # Errors
/// The body is none.
pub fn decode(body: &[u8]) -> Result<Request, BadReview> {
    let Review { api_version, kind, request } = serde_json::from_slice(body)?;
    if api_version != VERSION || kind != "AdmissionReview" {
        let shown = |text: String| text.chars().take(60).collect();
        return Err(BadReview::Other { api_version: shown(api_version), kind: shown(kind) });
    }
    request.filter(|request| !request.uid.is_empty()).ok_or(BadReview::NoRequest)
}

/// The answer that carries out a plan.
#[must_use]
pub fn answer(request: &Request, plan: &Plan) -> Value {
    let mut response = json!({ "uid": request.uid, "allowed": true });
    match &plan.verdict {
        Verdict::Unchanged(_) => {}
        Verdict::Patched(patch) => {
            response["patchType"] = json!("JSONPatch");
            response["patch"] = json!(BASE64_STANDARD.encode(json!(patch).to_string()));
        }
        Verdict::Refused(why) => {
            response["allowed"] = json!(false);
            response["status"] = json!({ "code": 422, "reason": "Invalid", "message": why });
        }
    }
    if !plan.warnings.is_empty() {
        response["warnings"] = json!(plan.warnings);
    }
    json!({ "apiVersion": VERSION, "kind": "AdmissionReview", "response": response })
}

/// All of it: what is answered to a body by a webhook that finds such a namespace.
///
/// # Errors
/// The body is no question.
pub fn review(
    settings: &Settings,
    body: &[u8],
    namespace: &Namespace,
    unique: &str,
) -> Result<Value, BadReview> {
    let request = decode(body)?;
    let plan = match subject(settings, &request) {
        Ok(subject) => subject.plan(settings, namespace, unique),
        Err(why) => Plan::unchanged(why),
    };
    Ok(answer(&request, &plan))
}
