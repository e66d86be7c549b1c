//! What a cluster is given to be a mesh: settings in, objects out. Nothing here talks to a cluster.
//!
//! [`objects::objects`] is the one source. [`manifest()`] prints it, [`chart`] makes of it a kustomize base and a Helm chart.
//!
//! ```
//! use nsm_install::{Settings, manifest};
//!
//! let manifest = manifest(&Settings { namespace: "mesh".into(), ..Settings::default() })?;
//! assert!(manifest.contains("kind: DaemonSet") && manifest.contains("namespace: mesh"));
//! # Ok::<(), nsm_install::InstallError>(())
//! ```

pub mod chart;
pub mod objects;
pub mod record;

use nsm_webhook::settings::SocketPath;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use record::{RECORD, Record};

/// What an installation is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Settings {
    /// Where everything lives that lives in a namespace.
    pub namespace: String,
    /// What stands before the names of images: a registry and its path, with the slash at its end; or nothing.
    pub images: String,
    /// What stands behind them.
    pub tag: String,
    /// `Always`, `IfNotPresent` or `Never`.
    pub pull_policy: String,
    /// Identities are `spiffe://TRUST_DOMAIN/…`.
    pub trust_domain: String,
    /// Who says who is who.
    pub identity: Identity,
    /// The directory and the name of the socket on each node where that is said (the SPIFFE Workload API).
    #[serde(with = "path")]
    pub identity_socket: (String, String),
    /// What processes log.
    pub log_level: String,
    /// Where tunnels between nodes end: a prefix that an address of each node is in; empty: the node's own address.
    pub underlay: String,
    /// What keeps registrations.
    pub store: Store,
    /// Whether annotated pods are given their wires.
    pub webhook: bool,
    /// Whether only those ports are open that are meant to be.
    pub network_policies: bool,
    /// Whether the resources of `networkservicemesh.io` are defined too.
    pub crds: bool,
}

/// A directory and a name, as one path.
mod path {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(of: &(String, String), to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{}/{}", of.0, of.1))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<(String, String), D::Error> {
        let path = String::deserialize(from)?;
        let (directory, file) =
            path.rsplit_once('/').ok_or_else(|| D::Error::custom("expected /DIR/FILE"))?;
        Ok((directory.to_owned(), file.to_owned()))
    }
}

/// Who tells processes who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Identity {
    /// An agent of ours on each node, and a signer.
    Builtin,
    /// SPIRE, or whatever else serves the socket: not part of the installation.
    Spire,
}

/// What keeps registrations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Store {
    /// The one registry's memory: managers and endpoints register again after its restart.
    Memory,
    /// Custom resources, by two registries.
    Kubernetes,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            namespace: "nsm-system".into(),
            images: String::new(),
            tag: "dev".into(),
            pull_policy: "IfNotPresent".into(),
            trust_domain: "k8s.nsm".into(),
            identity: Identity::Builtin,
            identity_socket: ("/run/spire/sockets".into(), "agent.sock".into()),
            log_level: "info".into(),
            underlay: String::new(),
            store: Store::Kubernetes,
            webhook: true,
            network_policies: true,
            crds: true,
        }
    }
}

/// What is wrong with settings.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Not a name of Kubernetes.
    #[error(
        "{0:?} is no namespace; expected at most 63 lower-case letters, digits and hyphens, for example nsm-system"
    )]
    Namespace(String),
    /// No image can be named so.
    #[error(
        "{0:?} cannot stand before an image's name; expected REGISTRY/PATH/, for example registry.example/mesh/"
    )]
    Images(String),
    /// Not a tag.
    #[error("{0:?} is no tag of an image; expected at most 128 letters, digits, '_', '.' and '-'")]
    Tag(String),
    /// Not a trust domain.
    #[error(transparent)]
    TrustDomain(#[from] nsm_identity::InvalidId),
    /// No socket can be there.
    #[error(transparent)]
    Socket(#[from] nsm_webhook::settings::BadSetting),
    /// Not a prefix.
    #[error(
        "{0:?} is no prefix; expected ADDRESS/LENGTH that an address of each node is in, for example 10.0.0.0/24"
    )]
    Underlay(String),
    /// Not what an installation has written.
    #[error("the ConfigMap nsm-installation does not say how the mesh was installed: {0}")]
    Record(String),
    /// Printing failed.
    #[error("an object cannot be written as YAML: {0}")]
    Yaml(String),
}

impl Settings {
    /// Whether a cluster would take it.
    ///
    /// # Errors
    /// The first that it would not.
    pub fn check(&self) -> Result<(), InstallError> {
        let end = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let name = &self.namespace;
        let good = name.len() <= 63 && name.starts_with(end) && name.ends_with(end);
        if !good || !name.chars().all(|c| end(c) || c == '-') {
            return Err(InstallError::Namespace(name.clone()));
        }
        let path = |c: char| end(c) || "-._/:".contains(c);
        let images = &self.images;
        let good =
            images.is_empty() || images.ends_with('/') && images.starts_with(end) && images.chars().all(path);
        if !good {
            return Err(InstallError::Images(self.images.clone()));
        }
        let _valid: nsm_identity::TrustDomain = self.trust_domain.parse()?;
        let (directory, file) = &self.identity_socket;
        let _valid: SocketPath = format!("{directory}/{file}").parse()?;
        if !self.underlay.is_empty() && self.underlay.parse::<ipnet::IpNet>().is_err() {
            return Err(InstallError::Underlay(self.underlay.clone()));
        }
        let first = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let good = self.tag.len() <= 128 && self.tag.starts_with(first);
        if !good || !self.tag.chars().all(|c| first(c) || ".-".contains(c)) {
            return Err(InstallError::Tag(self.tag.clone()));
        }
        Ok(())
    }

    /// One of our images.
    #[must_use]
    pub fn image(&self, name: &str) -> String {
        format!("{}{name}:{}", self.images, self.tag)
    }
}

/// Everything, as one manifest.
///
/// # Errors
/// The settings are bad.
pub fn manifest(settings: &Settings) -> Result<String, InstallError> {
    settings.check()?;
    let definitions = if settings.crds { definitions() } else { vec![] };
    let objects = objects::objects(settings).iter().map(yaml).collect::<Result<Vec<_>, _>>()?;
    let all = definitions.iter().map(|text| text.trim_end().to_owned() + "\n").chain(objects);
    Ok(all.collect::<Vec<_>>().join("---\n"))
}

/// The same, and what it says of itself, for the installation after it; `before` is the one that it takes the place of.
///
/// # Errors
/// The settings are bad.
pub fn installation(settings: &Settings, before: Option<&Record>) -> Result<String, InstallError> {
    let record = Record::new(settings.clone(), before).object()?;
    Ok(format!("{}---\n{}", manifest(settings)?, yaml(&record)?))
}

/// What `kubectl delete` is to be given: what keeps pods out first, the namespace last. The definitions stay unless
/// they are asked for, because everything that users wrote goes with them.
///
/// # Errors
/// The settings are bad.
pub fn removal(settings: &Settings) -> Result<String, InstallError> {
    settings.check()?;
    let mut objects = objects::objects(settings);
    objects.reverse();
    removal_order(&mut objects);
    let named = objects.iter().map(|object| {
        let name = &object["metadata"]["name"];
        let mut metadata = serde_json::json!({ "name": name });
        if let Some(namespace) = object["metadata"].get("namespace") {
            metadata["namespace"] = namespace.clone();
        }
        yaml(&serde_json::json!({ "apiVersion": object["apiVersion"], "kind": object["kind"], "metadata": metadata }))
    });
    let mut all = named.collect::<Result<Vec<_>, _>>()?;
    if settings.crds {
        all.extend(definitions().iter().map(|text| text.trim_end().to_owned() + "\n"));
    }
    Ok(all.join("---\n"))
}

/// What keeps pods out goes first. Stable: among equals the last made is the first removed.
pub(crate) fn removal_order(objects: &mut [Value]) {
    objects.sort_by_key(|object| object["kind"] != "MutatingWebhookConfiguration");
}

/// The custom resources.
pub(crate) fn definitions() -> Vec<&'static str> {
    nsm_k8s::crd::ALL.map(|(_, text)| text).to_vec()
}

pub(crate) fn yaml(object: &Value) -> Result<String, InstallError> {
    let text = serde_saphyr::to_string(object).map_err(|e| InstallError::Yaml(e.to_string()))?;
    Ok(text.trim_end().to_owned() + "\n")
}
