//! An API server, asked for objects as they are: JSON. For whoever needs few fields of them and shall keep the rest.

use std::{path::Path, time::Duration};

use futures::{Stream, StreamExt as _};
use http::{Method, Request};
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
    core::WatchEvent,
};
use serde_json::Value;
use tokio::time::timeout;
use tracing::info;

/// How long one question may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the API server did not do.
#[derive(Debug, thiserror::Error)]
#[error("the API server did not {what}: {source}{}", self.rule())]
pub struct ApiError {
    what: String,
    /// Of RBAC, that lets us.
    rule: String,
    source: Failed,
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    // The message of a refusal names the verb, the resource and the account that lacks them.
    #[error("{0}")]
    Api(#[from] Box<kube::Error>),
    #[error("no answer in {} s", PATIENCE.as_secs())]
    Late,
    #[error("others changed it each time it was to be written")]
    Contended,
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
            Failed::Late | Failed::Contended => None,
        }
    }

    /// What was written about is gone, or going: a pod, its namespace, or another pod has its name by now.
    #[must_use]
    pub fn is_about_the_end(&self) -> bool {
        let Failed::Api(error) = &self.source else { return false };
        let kube::Error::Api(status) = &**error else { return false };
        let details = status.details.as_ref();
        match status.code {
            404 => details.is_some_and(|details| matches!(&*details.kind, "pods" | "namespaces")),
            403 => details.is_some_and(|details| {
                details.causes.iter().any(|cause| cause.reason == "NamespaceTerminating")
            }),
            409 => status.message.contains("Precondition failed: UID"),
            _ => false,
        }
    }

    /// What was refused, without the name of what it was about: to say it once.
    #[must_use]
    pub fn refusal(&self) -> String {
        format!("{} {:?}", self.rule, self.code())
    }

    fn rule(&self) -> String {
        match self.code() {
            Some(403) => format!("; its role needs the rule {}", self.rule),
            _ => String::new(),
        }
    }

    /// Somebody else was faster: what was read is not what is there any more, or what is to be made is there.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }
}

/// How a change is merged into what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patch {
    /// RFC 7396: maps are merged, everything else is replaced, null removes.
    Merge,
    /// Kubernetes' own, for its own resources: lists of named things are merged too.
    Strategic,
}

impl Patch {
    fn media(self) -> &'static str {
        match self {
            Self::Merge => "application/merge-patch+json",
            Self::Strategic => "application/strategic-merge-patch+json",
        }
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

impl From<Client> for Objects {
    fn from(client: Client) -> Self {
        Self(client)
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

    /// The one of this kubeconfig.
    ///
    /// # Errors
    /// It cannot be used.
    pub async fn of(kubeconfig: &Path) -> Result<Self, NoCluster> {
        let config = async {
            let read = Kubeconfig::read_from(kubeconfig).map_err(|e| NoCluster(e.to_string()))?;
            let config = kube::Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
            config.map_err(|e| NoCluster(e.to_string()))
        };
        Client::try_from(config.await?).map(Self).map_err(|e| NoCluster(e.to_string()))
    }

    /// What stands at a path. `what` is for errors: "the API server did not tell of …".
    ///
    /// # Errors
    /// It is not there, or not told.
    pub async fn get(&self, what: &str, path: &str) -> Result<Value, ApiError> {
        self.ask(format!("tell of {what}"), Method::GET, path, None).await
    }

    /// The metadata of the objects at a path, without the rest of them.
    ///
    /// # Errors
    /// They are not told.
    pub async fn metadata(&self, what: &str, path: &str) -> Result<Vec<Value>, ApiError> {
        let accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
        let request = Request::builder().method(Method::GET).uri(path).header("accept", accept);
        let mut list = self.send(format!("tell of {what}"), request, Vec::new()).await?;
        Ok(list["items"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// What happens in the collection at a path, which says from which version on, until the API server ends it.
    ///
    /// # Errors
    /// It is not told, or not any more.
    pub async fn watch(
        &self,
        what: &str,
        path: &str,
    ) -> Result<impl Stream<Item = Result<WatchEvent<Value>, ApiError>> + use<>, ApiError> {
        let failed = {
            let (what, plural) = (format!("tell of what happens to {what}"), path.split('?').next());
            let rule = rule(&Method::GET, plural.unwrap_or_default()).replace("[list]", "[watch]");
            move |source| ApiError { what: what.clone(), rule: rule.clone(), source }
        };
        let request = Request::builder().method(Method::GET).uri(path).body(Vec::new());
        let request = request.map_err(|error| failed(Box::new(kube::Error::HttpError(error)).into()))?;
        match timeout(PATIENCE, self.0.request_events(request)).await {
            Ok(Ok(events)) => {
                let failed = move |error| failed(Failed::from(Box::new(error)));
                Ok(events.map(move |event| event.map_err(&failed)))
            }
            Ok(Err(error)) => Err(failed(Box::new(error).into())),
            Err(_) => Err(failed(Failed::Late)),
        }
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

    /// Changes fields of the object at a path, or of its status; the answer is the whole object.
    ///
    /// # Errors
    /// It is refused, or not there.
    pub async fn patch(
        &self,
        what: &str,
        path: &str,
        kind: Patch,
        change: &Value,
    ) -> Result<Value, ApiError> {
        let request = Request::builder().method(Method::PATCH).uri(path).header("content-type", kind.media());
        self.send(format!("change {what}"), request, change.to_string().into_bytes()).await
    }

    /// Removes the object at a path; that there is none is as good.
    ///
    /// # Errors
    /// It is refused.
    pub async fn delete(&self, what: &str, path: &str) -> Result<(), ApiError> {
        match self.ask(format!("delete {what}"), Method::DELETE, path, None).await {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some(404) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Sees to it that the object of this name in the collection at a path is as it should be. `wanted` says what shall
    /// stand in the place of what is there (`None`: what is there is as it should be), and is asked again where somebody
    /// else was faster: of several who keep the same, none undoes what another did.
    ///
    /// # Errors
    /// The API server does not let us, or others write all the time; what `wanted` says.
    pub async fn keep<T, E: From<ApiError>>(
        &self,
        what: &str,
        collection: &str,
        name: &str,
        mut wanted: impl FnMut(Option<Value>) -> Result<(T, Option<Value>), E>,
    ) -> Result<T, E> {
        let path = format!("{collection}/{name}");
        for _ in 0..5 {
            let found = self.find(what, &path).await?;
            let there = found.is_some();
            let (kept, object) = wanted(found)?;
            let Some(object) = object else { return Ok(kept) };
            let wrote = match there {
                true => self.replace(what, &path, &object).await,
                false => self.create(what, collection, &object).await,
            };
            match wrote {
                Ok(_) => {
                    info!(what, "written");
                    return Ok(kept);
                }
                Err(error) if error.is_conflict() => {}
                Err(error) => return Err(error.into()),
            }
        }
        let what = format!("keep {what}");
        Err(ApiError { what, rule: String::new(), source: Failed::Contended }.into())
    }

    async fn ask(
        &self,
        what: String,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, ApiError> {
        let mut request = Request::builder().method(method).uri(path);
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        self.send(what, request, body).await
    }

    async fn send(
        &self,
        what: String,
        request: http::request::Builder,
        body: Vec<u8>,
    ) -> Result<Value, ApiError> {
        let rule = match (request.method_ref(), request.uri_ref()) {
            (Some(method), Some(uri)) => rule(method, uri.path()),
            _ => String::new(),
        };
        let failed = |source| ApiError { what, rule, source };
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

/// The rule of RBAC that allows a call.
fn rule(method: &Method, path: &str) -> String {
    let mut parts = path.trim_matches('/').split('/');
    let group = match parts.next() {
        Some("apis") => parts.next().unwrap_or_default(),
        _ => "",
    };
    let mut parts = parts.skip(1).peekable();
    // What is below a namespace; the namespace itself is a resource, too.
    let (resource, named) = match (parts.next().unwrap_or_default(), parts.next()) {
        ("namespaces", Some(_)) if parts.peek().is_some() => {
            (parts.next().unwrap_or_default(), parts.next().is_some())
        }
        (resource, name) => (resource, name.is_some()),
    };
    let resource = parts.next().map_or(resource.to_owned(), |part| format!("{resource}/{part}"));
    let verb = match (method.as_str(), named) {
        ("GET", true) => "get",
        ("GET", false) => "list",
        ("POST", _) => "create",
        ("PATCH", _) => "patch",
        ("DELETE", _) => "delete",
        _ => "update",
    };
    format!("{{apiGroups: [{group:?}], resources: [{resource}], verbs: [{verb}]}}")
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
    fn the_rule_that_allows_a_call_is_known() {
        for (method, path, says) in [
            (
                Method::GET,
                "/api/v1/namespaces/a/secrets/b",
                r#"{apiGroups: [""], resources: [secrets], verbs: [get]}"#,
            ),
            (
                Method::POST,
                "/api/v1/namespaces/a/secrets",
                r#"{apiGroups: [""], resources: [secrets], verbs: [create]}"#,
            ),
            (Method::GET, "/api/v1/pods", r#"{apiGroups: [""], resources: [pods], verbs: [list]}"#),
            (
                Method::GET,
                "/api/v1/namespaces/a",
                r#"{apiGroups: [""], resources: [namespaces], verbs: [get]}"#,
            ),
            (
                Method::PUT,
                "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/x",
                r#"{apiGroups: ["admissionregistration.k8s.io"], resources: [mutatingwebhookconfigurations], verbs: [update]}"#,
            ),
            (
                Method::PATCH,
                "/api/v1/namespaces/a/pods/b/status",
                r#"{apiGroups: [""], resources: [pods/status], verbs: [patch]}"#,
            ),
            (
                Method::DELETE,
                "/apis/networkservicemesh.io/v1/namespaces/a/wires/b",
                r#"{apiGroups: ["networkservicemesh.io"], resources: [wires], verbs: [delete]}"#,
            ),
            (
                Method::POST,
                "/apis/authentication.k8s.io/v1/tokenreviews",
                r#"{apiGroups: ["authentication.k8s.io"], resources: [tokenreviews], verbs: [create]}"#,
            ),
        ] {
            assert_eq!(rule(&method, path), says);
        }
    }

    #[test]
    fn names_are_names_in_paths() {
        assert_eq!(escaped("a/../b?c=d e"), "a%2F..%2Fb%3Fc%3Dd%20e");
    }
}
