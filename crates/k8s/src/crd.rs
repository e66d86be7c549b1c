//! The custom resource definitions, as they are installed.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;

/// `networkservices.networkservicemesh.io`, a manifest.
pub const NETWORK_SERVICES: &str = include_str!("../crds/networkservices.yaml");

/// `networkserviceendpoints.networkservicemesh.io`, a manifest.
pub const NETWORK_SERVICE_ENDPOINTS: &str = include_str!("../crds/networkserviceendpoints.yaml");

/// `wires.networkservicemesh.io`, a manifest.
pub const WIRES: &str = include_str!("../crds/wires.yaml");

/// All, by the names of their resources.
pub const ALL: [(&str, &str); 3] = [
    ("networkservices", NETWORK_SERVICES),
    ("networkserviceendpoints", NETWORK_SERVICE_ENDPOINTS),
    ("wires", WIRES),
];

/// All, as objects.
///
/// # Panics
/// Never: a test reads them.
#[must_use]
#[allow(clippy::expect_used, reason = "they are part of the program")]
pub fn all() -> [CustomResourceDefinition; 3] {
    ALL.map(|(_, manifest)| serde_saphyr::from_str(manifest).expect("a custom resource definition"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_have_the_names_that_upstreams_have() {
        let names = all().map(|crd| {
            let names = crd.spec.names;
            let versions: Vec<_> = crd.spec.versions.into_iter().map(|version| version.name).collect();
            (crd.metadata.name, names.kind, names.plural, names.short_names, crd.spec.scope, versions)
        });
        let expected = |kind: &str, plural: &str, short: &[&str]| {
            (
                Some(format!("{plural}.networkservicemesh.io")),
                kind.to_owned(),
                plural.to_owned(),
                (!short.is_empty()).then(|| short.iter().map(ToString::to_string).collect()),
                "Namespaced".to_owned(),
                vec!["v1".to_owned()],
            )
        };
        assert_eq!(names[0], expected("NetworkService", "networkservices", &["netsvc", "netsvcs"]));
        assert_eq!(names[1], expected("NetworkServiceEndpoint", "networkserviceendpoints", &["nse", "nses"]));
        assert_eq!(names[2], expected("Wire", "wires", &[]), "of ours alone");
    }
}
