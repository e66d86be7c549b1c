//! What a cluster says of itself (`ClusterProperty` of `about.k8s.io/v1alpha1`), written into a ConfigMap for whoever
//! stands between clusters, in the form of upstream's `cmd-cluster-info-k8s` (spec/kubernetes.md 3.14): one key, a flat map
//! of texts, YAML. What others write beside it stays.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    follow::{Follower, Heard},
    objects::{ApiError, Objects, escaped},
};

/// How often it is looked whether what was written is still there, and how long after an error it is tried again.
const LOOK: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_secs(5);

/// Where it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The ConfigMap's namespace.
    pub namespace: String,
    /// The ConfigMap.
    pub name: String,
    /// Its key.
    pub key: String,
}

/// Why it cannot be written.
#[derive(Debug, thiserror::Error)]
enum NotWritten {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(
        "{what} is there, and is no map of texts ({why}): it is not overwritten; correct it, or remove the key"
    )]
    Malformed { what: String, why: String },
}

/// Writes a cluster's properties down.
#[derive(Debug)]
pub struct Informer {
    api: Objects,
    place: Place,
    /// What properties are called there, where not as they are.
    called: BTreeMap<String, String>,
    known: Arc<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// By the properties' own names.
    properties: Mutex<BTreeMap<String, String>>,
    news: Notify,
}

impl Informer {
    /// Writes into a place; `called` are other names for properties.
    #[must_use]
    pub fn new(api: Objects, place: Place, called: BTreeMap<String, String>) -> Self {
        Self { api, place, called, known: Arc::default() }
    }

    /// Follows the properties; does not end.
    pub async fn run(self) {
        let path = "/apis/about.k8s.io/v1alpha1/clusterproperties";
        let follower = Follower::new(self.api.clone(), "clusterproperties", path, "");
        let known = Arc::clone(&self.known);
        tokio::join!(follower.run(move |heard| known.hear(heard)), self.write());
    }

    async fn write(&self) {
        let mut failed = String::new();
        loop {
            let _ = timeout(LOOK, self.known.news.notified()).await;
            while let Err(error) = self.pass().await {
                let error = error.to_string();
                if error != failed {
                    warn!(error, "what the cluster says of itself cannot be written down; trying on");
                    failed = error;
                }
                sleep(AGAIN).await;
            }
            failed.clear();
        }
    }

    /// Writes where something is different: adds and changes, and removes nothing.
    async fn pass(&self) -> Result<(), NotWritten> {
        let properties = self.known.properties.lock().clone();
        if properties.is_empty() {
            return Ok(());
        }
        let Place { namespace, name, key } = &self.place;
        let called = |name: String| self.called.get(&name).cloned().unwrap_or(name);
        let said: BTreeMap<_, _> =
            properties.into_iter().map(|(name, value)| (called(name), value)).collect();
        let what = format!("the ConfigMap {namespace}/{name}");
        let collection = format!("/api/v1/namespaces/{}/configmaps", escaped(namespace));
        let wanted = |found: Option<Value>| {
            let mut object = found.unwrap_or_else(
                || json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name } }),
            );
            let there = object["data"][key].as_str().unwrap_or_default();
            let before =
                texts(there).map_err(|why| NotWritten::Malformed { what: format!("{what}, {key}"), why })?;
            let mut all = before.clone();
            all.extend(said.clone());
            if all == before {
                return Ok(((), None));
            }
            info!(?said, "what the cluster says of itself");
            let text = serde_saphyr::to_string(&all)
                .map_err(|error| NotWritten::Malformed { what: "it".into(), why: error.to_string() })?;
            object["data"][key] = json!(text);
            Ok(((), Some(object)))
        };
        self.api.keep(&what, &collection, name, wanted).await
    }
}

impl Known {
    fn hear(&self, heard: Heard) {
        let property = |object: &Value| {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            Some((text(&object["metadata"]["name"])?, text(&object["spec"]["value"])?))
        };
        match heard {
            Heard::All(all) => *self.properties.lock() = all.iter().filter_map(property).collect(),
            Heard::Is(object) => self.properties.lock().extend(property(&object)),
            // Nothing is taken back, as upstream has it.
            Heard::Gone(_) => return,
        }
        self.news.notify_one();
    }
}

/// A flat map of texts; numbers are texts, too.
#[doc(hidden)]
pub fn texts(yaml: &str) -> Result<BTreeMap<String, String>, String> {
    if yaml.trim().is_empty() {
        return Ok(BTreeMap::new());
    }
    let map: BTreeMap<String, Value> = serde_saphyr::from_str(yaml).map_err(|error| error.to_string())?;
    let text = |(key, value): (String, Value)| match value {
        Value::String(text) => Ok((key, text)),
        Value::Number(_) | Value::Bool(_) => Ok((key, value.to_string())),
        Value::Null => Ok((key, String::new())),
        Value::Array(_) | Value::Object(_) => Err(format!("{key} is more than a text")),
    };
    map.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_there_is_read_as_texts() {
        let map = |of: &[(&str, &str)]| {
            of.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(texts(" \n"), Ok(map(&[])));
        assert_eq!(texts("clusterName: c1\nzone: 7\n"), Ok(map(&[("clusterName", "c1"), ("zone", "7")])));
        assert_eq!(texts("a: [b]\n"), Err("a is more than a text".to_owned()));
        assert!(texts("- a\n").is_err());
    }
}
