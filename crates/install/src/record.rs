//! What an installation says of itself, so that the next one can be like it: a ConfigMap beside it, with its settings and
//! the names of its objects.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{InstallError, Settings, objects, removal_order, yaml};

/// The ConfigMap.
pub const RECORD: &str = "nsm-installation";
/// Its keys.
const SETTINGS: &str = "settings.yaml";
const OBJECTS: &str = "objects";

/// An installation, as it says itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// How it is.
    pub settings: Settings,
    /// What it is made of, and what installations before were: version, kind, namespace (or `-`) and name.
    objects: BTreeSet<String>,
}

impl Record {
    /// Of an installation with these settings, in the place of another.
    #[must_use]
    pub fn new(settings: Settings, before: Option<&Self>) -> Self {
        let mut objects: BTreeSet<_> = objects::objects(&settings).iter().map(line).collect();
        objects.extend(before.iter().flat_map(|before| before.objects.iter().cloned()));
        Self { settings, objects }
    }

    /// Reads the ConfigMap.
    ///
    /// # Errors
    /// It is none that an installation has written.
    pub fn read(config_map: &Value) -> Result<Self, InstallError> {
        let text = |key: &str| config_map["data"][key].as_str().unwrap_or_default();
        let settings = serde_saphyr::from_str(text(SETTINGS))
            .map_err(|e| InstallError::Record(format!("{SETTINGS}: {e}")))?;
        Ok(Self { settings, objects: text(OBJECTS).lines().map(str::to_owned).collect() })
    }

    /// The ConfigMap.
    ///
    /// # Errors
    /// It cannot be written as YAML.
    pub fn object(&self) -> Result<Value, InstallError> {
        let settings = serde_json::to_value(&self.settings).map_err(|e| InstallError::Yaml(e.to_string()))?;
        let objects: String = self.objects.iter().map(|line| format!("{line}\n")).collect();
        Ok(json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": RECORD,
                "namespace": self.settings.namespace,
                "labels": { "app.kubernetes.io/name": "nsm" },
            },
            "data": { SETTINGS: yaml(&settings)?, OBJECTS: objects },
        }))
    }

    /// What was made once, and is not of the installation any more: for `kubectl delete`.
    ///
    /// # Errors
    /// It cannot be written as YAML.
    pub fn leftovers(&self) -> Result<String, InstallError> {
        let of_it: BTreeSet<_> = objects::objects(&self.settings).iter().map(line).collect();
        let mut gone: Vec<_> = self.objects.difference(&of_it).filter_map(|line| named(line)).collect();
        removal_order(&mut gone);
        let gone = gone.iter().map(yaml).collect::<Result<Vec<_>, _>>()?;
        Ok(gone.join("---\n"))
    }
}

/// An object, by its name.
fn line(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let metadata = &object["metadata"];
    let parts = [&object["apiVersion"], &object["kind"], &metadata["namespace"], &metadata["name"]];
    parts.map(text).join(" ")
}

/// The name of an object, as an object.
fn named(line: &str) -> Option<Value> {
    let mut parts = line.split(' ');
    let (version, kind, namespace, name) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let mut metadata = json!({ "name": name });
    if namespace != "-" {
        metadata["namespace"] = json!(namespace);
    }
    Some(json!({ "apiVersion": version, "kind": kind, "metadata": metadata }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Identity;

    #[test]
    fn an_installation_is_read_as_it_was_written_and_knows_what_it_has_no_more() {
        let settings = Settings {
            tag: "v1".into(),
            identity: Identity::Spire,
            identity_socket: ("/run/other".into(), "api.sock".into()),
            crds: false,
            ..Settings::default()
        };
        let first = Record::new(settings.clone(), None);
        let object = first.object().unwrap();
        assert_eq!(Record::read(&object).unwrap(), first);
        assert!(object["data"][SETTINGS].as_str().unwrap().contains("identitySocket: /run/other/api.sock"));
        assert_eq!(first.leftovers().unwrap(), "");

        let next = Record::new(Settings { webhook: false, tag: "v2".into(), ..settings }, Some(&first));
        let left = next.leftovers().unwrap();
        assert!(
            left.starts_with("apiVersion: admissionregistration.k8s.io/v1\nkind: Mutating"),
            "pods first: {left}"
        );
        assert!(
            left.contains("kind: Deployment\nmetadata:\n  name: nsm-webhook\n  namespace: nsm-system\n"),
            "{left}"
        );
        assert!(!left.contains("nsm-node") && !left.contains("kind: Namespace"), "{left}");
        // It is remembered until it is back.
        let again = Record::new(Settings { webhook: true, ..next.settings.clone() }, Some(&next));
        assert_eq!(again.leftovers().unwrap(), "");
        let none = Record::read(&json!({ "data": { SETTINGS: "tag: [1]" } })).unwrap_err().to_string();
        assert!(none.contains("settings.yaml"), "{none}");
    }
}
