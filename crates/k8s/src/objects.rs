//! An API server, asked for objects as they are: JSON. For whoever needs few fields of them and shall keep the rest.

use std::time::Duration;

use http::{Method, Request};
use kube::Client;
use serde_json::Value;
use tokio::time::timeout;

/// How long one question may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the API server did not do.
#[derive(Debug, thiserror::Error)]
#[error("the API server did not {what}: {source}")]
pub struct ApiError {
    what: String,
    source: Failed,
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    // The message of a refusal names the verb, the resource and the account that lacks them.
    #[error("{0}")]
    Api(#[from] Box<kube::Error>),
    #[error("no answer in {} s", PATIENCE.as_secs())]
    Late,
}

impl ApiError {
    /// The status that the API server answered with.
    #[must_use]
    pub fn code(&self) -> Option<u16> {
        match &self.source {
            Failed::Api(error) => match &**error {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            Failed::Late => None,
        }
    }

    /// Somebody else was faster: what was read is not what is there any more, or what is to be made is there.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }
}

/// No way to an API server is configured.
#[derive(Debug, thiserror::Error)]
#[error(
    "there is no way to an API server: neither KUBECONFIG nor a service account's files can be used: {0}"
)]
pub struct NoCluster(String);

/// An API server.
#[derive(Clone)]
pub struct Objects(Client);

impl std::fmt::Debug for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Objects")
    }
}

impl Objects {
    /// The one of `KUBECONFIG`, or of the pod's service account. Needs a runtime; nothing is asked yet.
    ///
    /// # Errors
    /// There is neither.
    pub async fn infer() -> Result<Self, NoCluster> {
        let config = kube::Config::infer().await.map_err(|e| NoCluster(e.to_string()))?;
        Client::try_from(config).map(Self).map_err(|e| NoCluster(e.to_string()))
    }

    /// What stands at a path. `what` is for errors: "the API server did not tell of …".
    ///
    /// # Errors
    /// It is not there, or not told.
    pub async fn get(&self, what: &str, path: &str) -> Result<Value, ApiError> {
        self.ask(format!("tell of {what}"), Method::GET, path, None).await
    }

    /// What stands at a path, if something does.
    ///
    /// # Errors
    /// It is not told.
    pub async fn find(&self, what: &str, path: &str) -> Result<Option<Value>, ApiError> {
        match self.get(what, path).await {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.code() == Some(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes an object in the collection at a path.
    ///
    /// # Errors
    /// It is refused, or there is one ([`ApiError::is_conflict`]).
    pub async fn create(&self, what: &str, path: &str, object: &Value) -> Result<Value, ApiError> {
        self.ask(format!("create {what}"), Method::POST, path, Some(object)).await
    }

    /// Puts an object in the place of the one that was read.
    ///
    /// # Errors
    /// It is refused, or was changed since ([`ApiError::is_conflict`]).
    pub async fn replace(&self, what: &str, path: &str, object: &Value) -> Result<Value, ApiError> {
        self.ask(format!("change {what}"), Method::PUT, path, Some(object)).await
    }

    async fn ask(
        &self,
        what: String,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, ApiError> {
        let failed = |source| ApiError { what, source };
        let mut request = Request::builder().method(method).uri(path);
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let request = match request.body(body) {
            Ok(request) => request,
            Err(error) => return Err(failed(Box::new(kube::Error::HttpError(error)).into())),
        };
        match timeout(PATIENCE, self.0.request::<Value>(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(failed(Box::new(error).into())),
            Err(_) => Err(failed(Failed::Late)),
        }
    }
}

/// A name as it stands in a path or a query.
#[must_use]
pub fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names_in_paths() {
        assert_eq!(escaped("a/../b?c=d e"), "a%2F..%2Fb%3Fc%3Dd%20e");
    }
}
