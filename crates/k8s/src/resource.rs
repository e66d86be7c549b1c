//! `NetworkService` and `NetworkServiceEndpoint` of `networkservicemesh.io/v1`.
//!
//! `spec` is the protobuf message under the protobuf's field names, not the protobuf-JSON mapping: snake_case, zero
//! values omitted, timestamps as `{seconds, nanos}` (spec/registry.md 4.2). It is kept as it was read until somebody
//! asks what it means, so that one object that means nothing does not hide all the others.

use std::{borrow::Cow, collections::BTreeMap, fmt, marker::PhantomData, time::SystemTime};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use nsm_api::pb::registry::{
    Destination, Match, Metadata, NetworkService, NetworkServiceEndpoint, NetworkServiceLabels,
};
use nsm_registry::{expiry::time_of, store::Item};
use prost_types::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::verdict;

/// The group of both.
pub const GROUP: &str = "networkservicemesh.io";
/// The version of both.
pub const VERSION: &str = "v1";
/// Both.
pub const API_VERSION: &str = "networkservicemesh.io/v1";

/// What is kept as a custom resource.
pub trait Kind: Item + fmt::Debug {
    /// The kind of the resource.
    const KIND: &'static str;
    /// Its name in URLs and in RBAC rules.
    const PLURAL: &'static str;
    /// What the names begin with of those that are registered without one, if they may be.
    const GENERATED: Option<&'static str> = None;
    /// The message as it stands in `spec`.
    type Spec: From<Self> + Into<Self> + Serialize + DeserializeOwned;

    /// Gives it a name.
    fn set_name(&mut self, name: String);

    /// When it ends by itself.
    fn expires(&self) -> Option<SystemTime> {
        None
    }

    /// What of a `spec` that people wrote means nothing.
    #[must_use]
    fn doubts(_spec: &Value) -> Vec<String> {
        Vec::new()
    }
}

impl Kind for NetworkService {
    const KIND: &'static str = "NetworkService";
    const PLURAL: &'static str = "networkservices";
    const GENERATED: Option<&'static str> = Some("netsvc-");
    type Spec = ServiceSpec;

    fn doubts(spec: &Value) -> Vec<String> {
        verdict::doubts_of_service(spec)
    }

    fn set_name(&mut self, name: String) {
        self.name = name;
    }
}

impl Kind for NetworkServiceEndpoint {
    const KIND: &'static str = "NetworkServiceEndpoint";
    const PLURAL: &'static str = "networkserviceendpoints";
    type Spec = EndpointSpec;

    fn set_name(&mut self, name: String) {
        self.name = name;
    }

    fn expires(&self) -> Option<SystemTime> {
        self.expiration_time.as_ref().map(time_of)
    }
}

/// A custom resource that holds a `T`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", bound = "")]
pub struct Object<T: Kind> {
    /// `networkservicemesh.io/v1`.
    #[serde(default)]
    pub api_version: String,
    /// `T`'s.
    #[serde(default)]
    pub kind: String,
    /// The name, the namespace, the version of this state of it.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// As it was written.
    #[serde(default)]
    pub spec: Value,
    /// What the registry says of it.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub status: Value,
    #[serde(skip)]
    of: PhantomData<T>,
}

impl<T: Kind> Object<T> {
    /// The object that holds `item`.
    pub fn new(metadata: ObjectMeta, item: T) -> Self {
        let (api_version, kind) = (API_VERSION.to_owned(), <T as Kind>::KIND.to_owned());
        // Text keys and plain values: nothing that JSON has no form for.
        let spec = serde_json::to_value(T::Spec::from(item)).unwrap_or_default();
        Self { api_version, kind, metadata, spec, status: Value::Null, of: PhantomData }
    }

    /// What it means: an empty `spec.name` is that of the object (spec/registry.md 4.4).
    ///
    /// # Errors
    /// A value of another type, or one beyond the bounds of registrations.
    pub fn item(&self) -> Result<T, NotUnderstood> {
        let wrong = |what: String| NotUnderstood { kind: <T as Kind>::KIND, object: self.place(), what };
        let spec = match &self.spec {
            Value::Null => Value::Object(Map::new()),
            spec => spec.clone(),
        };
        let spec: T::Spec = serde_json::from_value(spec).map_err(|error| wrong(error.to_string()))?;
        let mut item: T = spec.into();
        if item.name().is_empty() {
            item.set_name(self.metadata.name.clone().unwrap_or_default());
        }
        item.check().map_err(|error| wrong(error.to_string()))?;
        Ok(item)
    }

    /// Its namespace and name, as people write them.
    pub fn place(&self) -> String {
        let part = |part: &Option<String>| part.clone().unwrap_or_default();
        format!("{}/{}", part(&self.metadata.namespace), part(&self.metadata.name))
    }
}

/// An object whose `spec` is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {object}: spec: {what}")]
pub struct NotUnderstood {
    /// Which kind of object.
    pub kind: &'static str,
    /// Which object.
    pub object: String,
    /// What is wrong.
    pub what: String,
}

impl<T: Kind> Resource for Object<T> {
    type DynamicType = ();
    type Scope = k8s_openapi::NamespaceResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        <T as Kind>::KIND.into()
    }

    fn group(_: &()) -> Cow<'_, str> {
        GROUP.into()
    }

    fn version(_: &()) -> Cow<'_, str> {
        VERSION.into()
    }

    fn plural(_: &()) -> Cow<'_, str> {
        T::PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// [`NetworkService`] as it stands in `spec`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the protobuf's fields")]
pub struct ServiceSpec {
    #[serde(deserialize_with = "even_null", skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(deserialize_with = "even_null", skip_serializing_if = "String::is_empty")]
    pub payload: String,
    #[serde(deserialize_with = "even_nulls", skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<MatchSpec>,
    #[serde(deserialize_with = "even_nulls", skip_serializing_if = "Vec::is_empty")]
    pub path_ids: Vec<String>,
}

/// [`Match`] as it stands in `spec`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the protobuf's fields")]
pub struct MatchSpec {
    #[serde(deserialize_with = "even_null_values", skip_serializing_if = "BTreeMap::is_empty")]
    pub source_selector: BTreeMap<String, String>,
    #[serde(deserialize_with = "even_nulls", skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<RouteSpec>,
    #[serde(deserialize_with = "even_null", skip_serializing_if = "std::ops::Not::not")]
    pub fallthrough: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<LabelsSpec>,
}

/// [`Destination`] as it stands in `spec`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the protobuf's fields")]
pub struct RouteSpec {
    #[serde(deserialize_with = "even_null_values", skip_serializing_if = "BTreeMap::is_empty")]
    pub destination_selector: BTreeMap<String, String>,
    #[serde(deserialize_with = "even_null", skip_serializing_if = "is_zero")]
    pub weight: u32,
}

/// [`Metadata`] and [`NetworkServiceLabels`] as they stand in `spec`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the protobuf's fields")]
pub struct LabelsSpec {
    #[serde(deserialize_with = "even_null_values", skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// [`NetworkServiceEndpoint`] as it stands in `spec`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the protobuf's fields")]
pub struct EndpointSpec {
    #[serde(deserialize_with = "even_null", skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(deserialize_with = "even_nulls", skip_serializing_if = "Vec::is_empty")]
    pub network_service_names: Vec<String>,
    #[serde(deserialize_with = "even_null_values", skip_serializing_if = "BTreeMap::is_empty")]
    pub network_service_labels: BTreeMap<String, LabelsSpec>,
    #[serde(deserialize_with = "even_null", skip_serializing_if = "String::is_empty")]
    pub url: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expiration_time: Option<TimeSpec>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_registration_time: Option<TimeSpec>,
    #[serde(deserialize_with = "even_nulls", skip_serializing_if = "Vec::is_empty")]
    pub path_ids: Vec<String>,
}

/// [`Timestamp`] as it stands in `spec`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the protobuf's fields")]
pub struct TimeSpec {
    #[serde(deserialize_with = "even_null", skip_serializing_if = "is_zero")]
    pub seconds: i64,
    #[serde(deserialize_with = "even_null", skip_serializing_if = "is_zero")]
    pub nanos: i32,
}

// Upstream's decoder takes null for "nothing is said", in lists and maps too.

fn even_null<'de, D: Deserializer<'de>, V: Deserialize<'de> + Default>(from: D) -> Result<V, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn even_nulls<'de, D: Deserializer<'de>, V: Deserialize<'de> + Default>(from: D) -> Result<Vec<V>, D::Error> {
    let items: Vec<Option<V>> = even_null(from)?;
    Ok(items.into_iter().map(Option::unwrap_or_default).collect())
}

fn even_null_values<'de, D: Deserializer<'de>, V: Deserialize<'de> + Default>(
    from: D,
) -> Result<BTreeMap<String, V>, D::Error> {
    let items: BTreeMap<String, Option<V>> = even_null(from)?;
    Ok(items.into_iter().map(|(key, value)| (key, value.unwrap_or_default())).collect())
}

fn is_zero<N: Default + PartialEq>(number: &N) -> bool {
    *number == N::default()
}

impl From<NetworkService> for ServiceSpec {
    fn from(service: NetworkService) -> Self {
        let NetworkService { name, payload, matches, path_ids, .. } = service;
        Self { name, payload, matches: matches.into_iter().map(Into::into).collect(), path_ids }
    }
}

impl From<ServiceSpec> for NetworkService {
    fn from(spec: ServiceSpec) -> Self {
        let ServiceSpec { name, payload, matches, path_ids } = spec;
        let matches = matches.into_iter().map(Into::into).collect();
        Self { name, payload, matches, path_ids, ..Self::default() }
    }
}

impl From<Match> for MatchSpec {
    fn from(m: Match) -> Self {
        let metadata = m.metadata.map(|metadata| LabelsSpec { labels: metadata.labels });
        let routes = m.routes.into_iter().map(|route| RouteSpec {
            destination_selector: route.destination_selector,
            weight: route.weight,
        });
        Self {
            source_selector: m.source_selector,
            routes: routes.collect(),
            fallthrough: m.fallthrough,
            metadata,
        }
    }
}

impl From<MatchSpec> for Match {
    fn from(spec: MatchSpec) -> Self {
        let metadata = spec.metadata.map(|metadata| Metadata { unknown: None, labels: metadata.labels });
        let routes = spec.routes.into_iter().map(|route| Destination {
            unknown: None,
            destination_selector: route.destination_selector,
            weight: route.weight,
        });
        Self {
            unknown: None,
            source_selector: spec.source_selector,
            routes: routes.collect(),
            fallthrough: spec.fallthrough,
            metadata,
        }
    }
}

impl From<NetworkServiceEndpoint> for EndpointSpec {
    fn from(endpoint: NetworkServiceEndpoint) -> Self {
        let labels = endpoint.network_service_labels.into_iter();
        Self {
            name: endpoint.name,
            network_service_names: endpoint.network_service_names,
            network_service_labels: labels
                .map(|(service, of)| (service, LabelsSpec { labels: of.labels }))
                .collect(),
            url: endpoint.url,
            expiration_time: endpoint.expiration_time.map(Into::into),
            initial_registration_time: endpoint.initial_registration_time.map(Into::into),
            path_ids: endpoint.path_ids,
        }
    }
}

impl From<EndpointSpec> for NetworkServiceEndpoint {
    fn from(spec: EndpointSpec) -> Self {
        let labels = spec.network_service_labels.into_iter();
        Self {
            name: spec.name,
            network_service_names: spec.network_service_names,
            network_service_labels: labels
                .map(|(service, of)| (service, NetworkServiceLabels { unknown: None, labels: of.labels }))
                .collect(),
            url: spec.url,
            expiration_time: spec.expiration_time.map(Into::into),
            initial_registration_time: spec.initial_registration_time.map(Into::into),
            path_ids: spec.path_ids,
            ..Self::default()
        }
    }
}

impl From<Timestamp> for TimeSpec {
    fn from(Timestamp { seconds, nanos }: Timestamp) -> Self {
        Self { seconds, nanos }
    }
}

impl From<TimeSpec> for Timestamp {
    fn from(TimeSpec { seconds, nanos }: TimeSpec) -> Self {
        Self { seconds, nanos }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read<T: Kind>(object: Value) -> Result<T, NotUnderstood> {
        serde_json::from_value::<Object<T>>(object).expect("an object").item()
    }

    #[test]
    fn what_upstream_writes_is_read_and_written_alike() {
        let spec = json!({
            "name": "gw-7c9f-abcde",
            "network_service_names": ["web-access"],
            "network_service_labels": {"web-access": {"labels": {"app": "gateway", "nodeName": "worker-2"}}},
            "url": "tcp://10.244.2.11:5001",
            "expiration_time": {"seconds": 1_760_000_060, "nanos": 120_000_000},
            "initial_registration_time": {"seconds": 1_760_000_000},
            "path_ids": ["spiffe://k8s.nsm/ns/apps/pod/gw-7c9f-abcde"],
        });
        let metadata = json!({"name": "gw-7c9f-abcde", "namespace": "nsm-system", "resourceVersion": "7"});
        let endpoint: NetworkServiceEndpoint =
            read(json!({"metadata": metadata, "spec": spec})).expect("understood");
        assert_eq!(endpoint.network_service_labels["web-access"].labels["app"], "gateway");
        assert_eq!(endpoint.expiration_time, Some(Timestamp { seconds: 1_760_000_060, nanos: 120_000_000 }));
        let written = Object::new(ObjectMeta::default(), endpoint);
        assert_eq!((written.spec, written.kind.as_str()), (spec, "NetworkServiceEndpoint"));

        let spec = json!({
            "name": "web-access",
            "payload": "ETHERNET",
            "matches": [
                {"source_selector": {"role": "filter"}, "routes": [{"destination_selector": {"role": "gateway"}, "weight": 2}]},
                {"fallthrough": true, "routes": [{"destination_selector": {"nodeName": "{{.nodeName}}"}}]},
                {"metadata": {"labels": {"app": "x"}}},
                {"routes": [{}]},
            ],
        });
        let service: NetworkService =
            read(json!({"metadata": {"name": "web-access"}, "spec": spec})).expect("understood");
        assert_eq!(service.matches.len(), 4);
        assert!(service.matches[1].fallthrough && service.matches[3].routes.len() == 1);
        assert_eq!(Object::new(ObjectMeta::default(), service).spec, spec);
    }

    #[test]
    fn what_people_write_is_read_as_upstream_reads_it() {
        let service: NetworkService = read(json!({
            "metadata": {"name": "web", "namespace": "team-a"},
            "spec": {
                "payload": null,
                "sourceSelector": {"of": "nobody"},
                "matches": [{"match": null, "source_selector": {"app": null}, "routes": [null]}, null],
            },
        }))
        .expect("understood");
        assert_eq!((service.name.as_str(), service.payload.as_str()), ("web", ""));
        assert_eq!(service.matches[0].source_selector, BTreeMap::from([("app".to_owned(), String::new())]));
        assert_eq!((service.matches[0].routes.len(), &service.matches[1]), (1, &Match::default()));

        let named: NetworkService =
            read(json!({"metadata": {"name": "a"}, "spec": {"name": "b"}})).expect("understood");
        assert_eq!(named.name, "b");
        for nothing in [json!({"metadata": {"name": "a"}}), json!({"metadata": {"name": "a"}, "spec": null})]
        {
            assert_eq!(read::<NetworkService>(nothing).expect("understood").name, "a");
        }
    }

    #[test]
    fn what_means_nothing_is_named() {
        let object = |spec: Value| json!({"metadata": {"name": "web", "namespace": "team-a"}, "spec": spec});
        let bad = [
            (json!({"matches": {"routes": []}}), "expected a sequence"),
            (json!({"payload": 7}), "expected a string"),
            (json!({"name": "a\u{1b}[2J"}), "control characters"),
            (json!("IP"), "expected struct ServiceSpec"),
        ];
        for (spec, word) in bad {
            let error = read::<NetworkService>(object(spec)).expect_err("no service").to_string();
            assert!(
                error.starts_with("NetworkService team-a/web: spec: ") && error.contains(word),
                "{error}"
            );
        }
    }
}
