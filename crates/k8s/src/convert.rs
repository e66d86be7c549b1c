//! Files of the first generation, in the words of today: `networkservicemesh.io/v1alpha1` to `v1`.
//!
//! A file is taken document by document. Services are written anew, in the one spelling of `v1`, so that they mean what
//! they meant (`fallthrough` says it where it has to be said); whatever is no service of ours stays as it is, to the
//! letter.

use std::fmt::Write as _;

use nsm_api::resource::{self, Warning};
use serde_json::{Map, Value, json};

use crate::resource::{API_VERSION, GROUP, ServiceSpec};

/// A file, converted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Converted {
    /// What it is now.
    pub text: String,
    /// How many documents were written anew.
    pub written: usize,
    /// What its author should know.
    pub warnings: Vec<Warning>,
}

/// Of `metadata`, what a cluster has put there.
const NOT_WRITTEN: [&str; 9] = [
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "selfLink",
    "ownerReferences",
];

/// Converts a file.
///
/// # Errors
/// A service in it that cannot be read, with its place.
pub fn convert(text: &str) -> Result<Converted, resource::Error> {
    let mut converted = Converted::default();
    let mut lines_before = 0;
    for (index, document) in documents(text).into_iter().enumerate() {
        let lines = document.matches('\n').count();
        let (marker, body) = match document.starts_with("---") {
            true => document.split_at(document.find('\n').map_or(document.len(), |end| end + 1)),
            false => ("", document),
        };
        let value: Value = serde_saphyr::from_str(body).unwrap_or_default();
        let version = value["apiVersion"].as_str().unwrap_or_default();
        let ours = version.strip_prefix(GROUP).is_some_and(|rest| rest.starts_with('/'));
        if ours && value["kind"] == "NetworkService" {
            // Its lines are those of the file.
            let padded = "\n".repeat(lines_before + marker.matches('\n').count()) + body;
            let of_file = |place: &mut resource::Place| place.document = index + 1;
            let mut file = resource::parse(&padded).map_err(|mut error| {
                of_file(&mut error.place);
                error
            })?;
            let old = version != API_VERSION;
            for mut service in file.services {
                if old {
                    resource::keep_old_choices(&mut service);
                }
                converted.text.push_str(marker);
                converted.text.push_str(&written(&value, service));
                converted.written += 1;
            }
            file.warnings.iter_mut().for_each(|warning| of_file(&mut warning.place));
            // What v1alpha1 meant is said now.
            let warnings = file.warnings.into_iter().filter(|warning| !(old && warning.of_old_rules));
            converted.warnings.extend(warnings);
        } else {
            if ours && version != API_VERSION {
                let kind = value["kind"].as_str().unwrap_or("this");
                let text = format!(
                    "{kind} is written by programs, not by people, and has no form in v1: it stays as it is"
                );
                let line = u64::try_from(lines_before + 1).unwrap_or(u64::MAX);
                let place = resource::Place { document: index + 1, line, field: String::new() };
                converted.warnings.push(Warning { place, text, of_old_rules: false });
            }
            converted.text.push_str(document);
        }
        lines_before += lines;
    }
    Ok(converted)
}

/// The documents of a file, with the markers before them.
fn documents(text: &str) -> Vec<&str> {
    let starts = text.match_indices("---").map(|(at, _)| at);
    let starts = starts.filter(|at| {
        let line_begins = *at == 0 || text.as_bytes()[at - 1] == b'\n';
        line_begins && text[at + 3..].chars().next().is_none_or(char::is_whitespace)
    });
    let mut cuts: Vec<usize> = std::iter::once(0).chain(starts).chain([text.len()]).collect();
    cuts.dedup();
    cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect()
}

/// A service as v1 writes it, with what people said of the object.
fn written(before: &Value, service: nsm_api::pb::registry::NetworkService) -> String {
    let mut metadata: Map<_, _> = before["metadata"].as_object().cloned().unwrap_or_default();
    metadata.retain(|key, value| !NOT_WRITTEN.contains(&key.as_str()) && !value.is_null());
    let named_by_object = metadata.get("name") == Some(&json!(service.name));
    let mut spec = ServiceSpec::from(service);
    if named_by_object {
        spec.name.clear();
    }
    let yaml = |value: &Value| serde_saphyr::to_string(value).unwrap_or_default();
    let indented = |value: &Value| {
        yaml(value).lines().fold(String::new(), |mut text, line| {
            let _ = writeln!(text, "  {line}");
            text
        })
    };
    let mut text =
        format!("apiVersion: {API_VERSION}\nkind: NetworkService\nmetadata:\n{}", indented(&json!(metadata)));
    let spec = serde_json::to_value(spec).unwrap_or_default();
    if spec.as_object().is_some_and(|spec| !spec.is_empty()) {
        let _ = write!(text, "spec:\n{}", indented(&spec));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "\
# the chain
apiVersion: v1
kind: ConfigMap # to the letter
metadata: {name: rules}
data:
  text: |
    ---not a marker
---
apiVersion: networkservicemesh.io/v1alpha1
kind: NetworkService
metadata:
  name: secure-intranet-connectivity
  namespace: team-a
  resourceVersion: \"7\"
spec:
  payload: IP
  matches:
  - match:
    sourceSelector: {app: firewall}
    route:
    - destination:
      destinationSelector: {app: vpn-gateway}
      weight: 2
  - match:
    sourceSelector: {app: firewall, zone: 'yes'}
    route:
    - destination:
      destinationSelector: {app: spare}
  - match:
    route:
    - destination:
      destinationSelector: {app: firewall}
--- # the last
apiVersion: networkservicemesh.io/v1alpha1
kind: NetworkServiceManager
metadata: {name: node1}
";

    const NEW: &str = "\
---
apiVersion: networkservicemesh.io/v1
kind: NetworkService
metadata:
  name: secure-intranet-connectivity
  namespace: team-a
spec:
  payload: IP
  matches:
  - source_selector: {app: firewall}
    fallthrough: true
    routes:
    - destination_selector: {app: vpn-gateway}
      weight: 2
  - source_selector: {app: firewall, zone: 'yes'}
    routes:
    - destination_selector: {app: spare}
  - routes:
    - destination_selector: {app: firewall}
";

    #[test]
    fn services_say_in_todays_words_what_they_said_and_the_rest_stays() {
        let converted = convert(OLD).expect("converts");
        assert_eq!(converted.written, 1);
        let (head, rest) = OLD.split_at(OLD.find("---\n").expect("a marker"));
        let last = rest.find("--- # the last").map(|at| &rest[at..]).expect("the last");
        assert!(converted.text.starts_with(head) && converted.text.ends_with(last), "{}", converted.text);
        let service = &converted.text[head.len()..converted.text.len() - last.len()];
        let value = |text: &str| serde_saphyr::from_str::<Value>(text).expect("YAML");
        assert_eq!(value(service.trim_start_matches("---\n")), value(NEW.trim_start_matches("---\n")));
        assert_eq!(resource::parse(service).expect("v1"), resource::parse(NEW).expect("v1"));
        let warnings: Vec<_> = converted.warnings.iter().map(ToString::to_string).collect();
        let expected = "document 3, line 33: NetworkServiceManager is written by programs, not by people, and has no \
                        form in v1: it stays as it is";
        assert_eq!(warnings, [expected]);
    }

    #[test]
    fn what_is_converted_already_stays_what_it_is() {
        let once = convert(NEW).expect("converts");
        let twice = convert(&once.text).expect("converts");
        assert_eq!(once.text, twice.text);
        assert_eq!(resource::parse(&once.text), resource::parse(NEW));
        let named = "apiVersion: networkservicemesh.io/v1\nkind: NetworkService\nmetadata: {name: a}\nspec: {name: b}\n";
        assert!(convert(named).expect("converts").text.ends_with("spec:\n  name: b\n"));
    }

    #[test]
    fn a_mistake_is_named_with_its_place_in_the_file() {
        let wrong = OLD.replace("destinationSelector: {app: spare}", "destination_selector: {app: spare}");
        let error = convert(&wrong).expect_err("a mistake").to_string();
        assert!(
            error.starts_with("document 2, line 28, spec.matches[1].route[0].destination_selector: "),
            "{error}"
        );
    }
}
