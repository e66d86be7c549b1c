//! What API servers are told to ask the webhook about: its `MutatingWebhookConfiguration`.
//!
//! Pods that ask for no wire shall never wait for a webhook that is not there. What is asked for stands in the pod or in
//! its namespace, and only the pod can be looked at by an API server, so there are up to three entries:
//!
//! | entry | about | if the webhook is not there |
//! |---|---|---|
//! | the first | what is annotated itself | it is not created, and says why |
//! | `namespaces.` | other pods, in namespaces that are known to be annotated | the same |
//! | `others.` | other pods, in other namespaces, which might have been annotated a moment ago | they are created |

use std::collections::BTreeSet;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::settings::Annotation;

/// Everything that a configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// The object's name.
    pub name: String,
    /// Key of the annotation.
    pub annotation: Annotation,
    /// Where API servers reach the webhook.
    pub reach: Reach,
    /// The authorities that its certificates are of, as PEM.
    pub bundle: String,
    /// Namespaces whose pods are never looked at.
    pub spared: BTreeSet<String>,
    /// Namespaces that are annotated.
    pub annotated: BTreeSet<String>,
    /// Name and uid of the namespace that the webhook lives in: the configuration goes when it does.
    pub owner: Option<(String, String)>,
}

/// Where API servers reach a webhook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// By a Service.
    Service {
        /// Its name.
        name: String,
        /// Its namespace.
        namespace: String,
    },
    /// At an address.
    Url(String),
}

impl Reach {
    /// What the webhook's certificate has to be for.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        match self {
            Self::Service { name, namespace } => {
                vec![format!("{name}.{namespace}.svc"), format!("{name}.{namespace}")]
            }
            Self::Url(url) => {
                let rest = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
                let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
                let host = match authority.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
                    Some((host, _)) => host,
                    None => authority.split(':').next().unwrap_or_default(),
                };
                vec![host.into()]
            }
        }
    }
}

impl Configuration {
    /// The object.
    #[must_use]
    pub fn object(&self) -> Value {
        let key = self.annotation.key();
        let suffix = format!("{}.{}", self.name, key.replace('/', "."));
        let inject = self.annotation.beside("inject");
        let says = |of: &str, key: &str, what: &str| {
            format!(
                "has({of}.annotations) && '{key}' in {of}.annotations && {of}.annotations['{key}'] {what}"
            )
        };
        let annotated = says("object.metadata", key, "!= ''");
        let template = format!(
            "has(object.spec) && has(object.spec.template) && has(object.spec.template.metadata) && {}",
            says("object.spec.template.metadata", key, "!= ''")
        );
        let not_opted_out = json!({
            "name": "not-opted-out",
            "expression": format!("!({})", says("object.metadata", &inject, "== 'false'")),
        });
        let asks = json!({ "name": "annotated", "expression": format!("({annotated}) || ({template})") });
        let silent = json!({ "name": "not-annotated", "expression": format!("!({annotated})") });

        let reach = match &self.reach {
            Reach::Service { name, namespace } => {
                json!({ "service": { "name": name, "namespace": namespace, "path": "/mutate", "port": 443 } })
            }
            Reach::Url(url) => json!({ "url": url }),
        };
        let mut client = reach;
        if !self.bundle.is_empty() {
            client["caBundle"] = json!(BASE64_STANDARD.encode(&self.bundle));
        }
        let rule = |group: &str, resources: &[&str]| {
            json!({
                "apiGroups": [group],
                "apiVersions": ["v1"],
                "operations": ["CREATE"],
                "resources": resources,
                "scope": "Namespaced",
            })
        };
        let pods = rule("", &["pods"]);
        let workloads = rule("apps", &["deployments", "statefulsets", "daemonsets", "replicasets"]);
        let names = |operator: &str, names: &BTreeSet<String>| {
            let expression =
                json!({ "key": "kubernetes.io/metadata.name", "operator": operator, "values": names });
            let expressions = if names.is_empty() { vec![] } else { vec![expression] };
            json!({ "matchExpressions": expressions })
        };
        let entry = |prefix: &str, rules: &[&Value], condition: &Value, namespaces: Value, must: bool| {
            json!({
                "name": format!("{prefix}{suffix}"),
                "admissionReviewVersions": ["v1"],
                "clientConfig": client,
                "rules": rules,
                "matchConditions": [condition, not_opted_out],
                "matchPolicy": "Equivalent",
                "namespaceSelector": namespaces,
                "objectSelector": {},
                "reinvocationPolicy": "Never",
                "sideEffects": "NoneOnDryRun",
                "failurePolicy": if must { "Fail" } else { "Ignore" },
                "timeoutSeconds": if must { 10 } else { 2 },
            })
        };
        let known: BTreeSet<_> = self.annotated.difference(&self.spared).cloned().collect();
        let elsewhere: BTreeSet<_> = self.annotated.union(&self.spared).cloned().collect();
        let mut webhooks = vec![entry("", &[&pods, &workloads], &asks, names("NotIn", &self.spared), true)];
        if !known.is_empty() {
            webhooks.push(entry("namespaces.", &[&pods], &silent, names("In", &known), true));
        }
        webhooks.push(entry("others.", &[&pods], &silent, names("NotIn", &elsewhere), false));

        let mut metadata = json!({ "name": self.name });
        if let Some((name, uid)) = &self.owner {
            let owner = json!({ "apiVersion": "v1", "kind": "Namespace", "name": name, "uid": uid });
            metadata["ownerReferences"] = json!([owner]);
        }
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": metadata,
            "webhooks": webhooks,
        })
    }

    /// The object that stands in the place of `found`, if `found` does not say the same. What others wrote beside it
    /// stays.
    #[must_use]
    pub fn instead_of(&self, found: &Value) -> Option<Value> {
        let wanted = self.object();
        let mut next = found.clone();
        next["webhooks"] = wanted["webhooks"].clone();
        if let Some(owners) = wanted["metadata"].get("ownerReferences") {
            next["metadata"]["ownerReferences"] = owners.clone();
        }
        (next != *found).then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration() -> Configuration {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Configuration {
            name: "nsm-mutating-webhook".into(),
            annotation: Annotation::default(),
            reach: Reach::Service { name: "admission-webhook-svc".into(), namespace: "nsm-system".into() },
            bundle: "PEM".into(),
            spared: set(&["kube-system", "nsm-system"]),
            annotated: set(&[]),
            owner: Some(("nsm-system".into(), "17".into())),
        }
    }

    #[test]
    fn only_who_asks_for_a_wire_depends_on_the_webhook() {
        let object = configuration().object();
        assert_eq!(object["metadata"]["ownerReferences"][0]["kind"], "Namespace");
        let told = |object: &Value| {
            let webhooks = object["webhooks"].as_array().unwrap().iter();
            let told = webhooks.map(|webhook| {
                let names = &webhook["namespaceSelector"]["matchExpressions"][0];
                format!(
                    "{} {} {}s {} {}",
                    webhook["name"].as_str().unwrap(),
                    webhook["failurePolicy"].as_str().unwrap(),
                    webhook["timeoutSeconds"],
                    names["operator"].as_str().unwrap_or("any"),
                    names["values"]
                )
            });
            told.collect::<Vec<_>>()
        };
        assert_eq!(
            told(&object),
            [
                "nsm-mutating-webhook.networkservicemesh.io Fail 10s NotIn [\"kube-system\",\"nsm-system\"]",
                "others.nsm-mutating-webhook.networkservicemesh.io Ignore 2s NotIn [\"kube-system\",\"nsm-system\"]",
            ]
        );
        let annotated = ["web".to_owned(), "kube-system".into()].into();
        assert_eq!(
            told(
                &Configuration { annotated, spared: ["kube-system".to_owned()].into(), ..configuration() }
                    .object()
            )[1..],
            [
                "namespaces.nsm-mutating-webhook.networkservicemesh.io Fail 10s In [\"web\"]",
                "others.nsm-mutating-webhook.networkservicemesh.io Ignore 2s NotIn [\"kube-system\",\"web\"]",
            ]
        );
        let none = Configuration { spared: BTreeSet::new(), ..configuration() };
        assert!(told(&none.object())[0].ends_with("any null"));
    }

    #[test]
    fn what_others_wrote_beside_it_stays() {
        let configuration = configuration();
        let mut found = configuration.object();
        assert_eq!(configuration.instead_of(&found), None);
        found["metadata"]["labels"] = json!({ "team": "network" });
        found["metadata"]["resourceVersion"] = json!("7");
        found["webhooks"][0]["failurePolicy"] = json!("Ignore");
        let next = configuration.instead_of(&found).expect("a change");
        assert_eq!(next["webhooks"], configuration.object()["webhooks"]);
        assert_eq!(next["metadata"]["resourceVersion"], "7");
        assert_eq!(next["metadata"]["labels"]["team"], "network");
    }

    #[test]
    fn a_certificate_is_for_where_it_is_reached() {
        let names = |url: &str| Reach::Url(url.into()).names();
        assert_eq!(names("https://127.0.0.1:8443/mutate"), ["127.0.0.1"]);
        assert_eq!(names("https://[::1]:8443/mutate"), ["::1"]);
        assert_eq!(names("https://hook.example/mutate?x"), ["hook.example"]);
        assert_eq!(
            configuration().reach.names(),
            ["admission-webhook-svc.nsm-system.svc", "admission-webhook-svc.nsm-system"]
        );
    }
}
