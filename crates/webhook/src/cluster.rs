//! What the webhook asks of the API server besides what it keeps there.

use std::collections::BTreeSet;

use nsm_identity::clock;
use nsm_k8s::objects::{ApiError, NoCluster, Objects, escaped};
use serde_json::{Value, json};

use crate::{annotation::Wanted, settings::Annotation};

/// Kubernetes has native side-cars since this minor version of 1.
const NATIVE_SIDECARS: u32 = 29;

/// An API server.
#[derive(Debug, Clone)]
pub struct Cluster(pub(crate) Objects);

impl Cluster {
    /// The one of `KUBECONFIG`, or of the pod's service account. Needs a runtime; nothing is asked yet.
    ///
    /// # Errors
    /// There is neither.
    pub async fn infer() -> Result<Self, NoCluster> {
        Objects::infer().await.map(Self)
    }

    /// Whether it knows init containers that stay.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn has_native_sidecars(&self) -> Result<bool, ApiError> {
        let version = self.0.get("its version", "/version").await?;
        let number = |key: &str| {
            let digits: String =
                version[key].as_str().unwrap_or_default().chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<u32>().unwrap_or_default()
        };
        Ok((number("major"), number("minor")) >= (1, NATIVE_SIDECARS))
    }

    /// A namespace.
    ///
    /// # Errors
    /// It is not there, or not told.
    pub async fn namespace(&self, name: &str) -> Result<Value, ApiError> {
        self.0.get(&format!("the namespace {name:?}"), &format!("/api/v1/namespaces/{}", escaped(name))).await
    }

    /// The names of all namespaces that are annotated.
    ///
    /// # Errors
    /// They are not told.
    pub async fn annotated_namespaces(&self, key: &Annotation) -> Result<BTreeSet<String>, ApiError> {
        // From the API server's memory: a moment late is no harm here.
        let all = self.0.get("namespaces", "/api/v1/namespaces?resourceVersion=0").await?;
        let items = all["items"].as_array().into_iter().flatten();
        let annotated = items.filter(|namespace| {
            let value = namespace["metadata"]["annotations"][key.key()].as_str();
            value.is_some_and(|value| !value.trim().is_empty())
        });
        Ok(annotated
            .filter_map(|namespace| namespace["metadata"]["name"].as_str().map(str::to_owned))
            .collect())
    }

    /// Says on every marked pod of a namespace (empty: of all) what could not be understood of its annotation. Said
    /// once: the event's name is that of the pod and of what is said. Answers with how many were told anew.
    ///
    /// # Errors
    /// Pods are not told, or events not taken.
    pub async fn tell_pods(&self, namespace: &str, key: &Annotation) -> Result<usize, ApiError> {
        let within =
            if namespace.is_empty() { String::new() } else { format!("namespaces/{}/", escaped(namespace)) };
        let selector = escaped(&format!("{}=annotation", key.beside("problem")));
        let path = format!("/api/v1/{within}pods?labelSelector={selector}");
        let pods = self.0.get("pods", &path).await?;
        let mut told = 0;
        for pod in pods["items"].as_array().into_iter().flatten() {
            let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
            let own =
                pod["metadata"]["annotations"][key.key()].as_str().filter(|value| !value.trim().is_empty());
            let inherited = match own {
                Some(_) => None,
                None => {
                    let namespace = self.namespace(namespace).await?;
                    namespace["metadata"]["annotations"][key.key()].as_str().map(str::to_owned)
                }
            };
            let Some(value) = own.or(inherited.as_deref()) else { continue };
            let problems: Vec<_> = Wanted::read(value).problems().cloned().collect();
            if problems.is_empty() {
                continue;
            }
            let event = event(pod, &format!("annotation {key}: {}", problems.join("; ")));
            let path = format!("/api/v1/namespaces/{}/events", escaped(namespace));
            match self.0.create("an event", &path, &event).await {
                Ok(_) => told += 1,
                // It was told, or the namespace is on its way out.
                Err(error) if matches!(error.code(), Some(409 | 404)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(told)
    }
}

/// A warning on a pod. Events have at most 1024 bytes of message.
fn event(pod: &Value, message: &str) -> Value {
    let metadata = &pod["metadata"];
    let name = metadata["name"].as_str().unwrap_or_default();
    let uid = metadata["uid"].as_str().unwrap_or_default();
    let end = message.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= 1024).last();
    let now = humantime::format_rfc3339_seconds(clock::now()).to_string();
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": { "name": format!("{}.{uid}.annotation", name.chars().take(200).collect::<String>()) },
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": name,
            "namespace": metadata["namespace"],
            "uid": uid,
        },
        "type": "Warning",
        "reason": "NetworkServiceNotUnderstood",
        "message": &message[..end.unwrap_or_default()],
        "source": { "component": "nsm-webhook" },
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_bounded_and_names_its_pod() {
        let pod = json!({ "metadata": { "name": "web", "namespace": "a", "uid": "17" } });
        let event = event(&pod, &"ä".repeat(1000));
        assert_eq!(event["message"].as_str().unwrap().len(), 1024);
        assert_eq!(event["involvedObject"]["uid"], "17");
        assert_eq!(event["metadata"]["name"], "web.17.annotation");
        assert_eq!(event["type"], "Warning");
    }
}
