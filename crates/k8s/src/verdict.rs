//! What is said on an object that people wrote: what of it was not understood.
//!
//! A field that nobody knows and a template that is not evaluated select something else than their author thinks, and
//! nothing fails. The registry says so as the condition `Understood`, where `kubectl describe` shows it; it writes only
//! when there is something to say, or to take back.

use nsm_api::matching::Template;
use serde_json::{Map, Value, json};

use crate::resource::{Kind, NotUnderstood, Object};

/// The condition's type.
const UNDERSTOOD: &str = "Understood";

/// The longest message; that of Kubernetes' schema is 32768.
const LONGEST: usize = 1024;

/// The conditions that an object should have, if they are not those that it has.
pub(crate) fn conditions<T: Kind>(
    object: &Object<T>,
    item: Result<&T, &NotUnderstood>,
    now: &str,
) -> Option<Value> {
    let doubts = match item {
        Err(error) => vec![error.what.clone()],
        // Programs write what they mean.
        Ok(item) if !item.path_ids().is_empty() => Vec::new(),
        Ok(_) => T::doubts(&object.spec),
    };
    let mut said = object.status["conditions"].as_array().cloned().unwrap_or_default();
    let before = said.iter().position(|condition| condition["type"] == UNDERSTOOD).map(|at| said.remove(at));
    let was = |field: &str| before.as_ref().and_then(|before| before[field].as_str());
    let mut message = doubts.join("; ");
    if message.len() > LONGEST {
        message.truncate(message.floor_char_boundary(LONGEST));
        message.push('…');
    }
    let status = if doubts.is_empty() { "True" } else { "False" };
    if was("status").unwrap_or("True") == status && was("message").unwrap_or_default() == message {
        return None;
    }
    let since = was("lastTransitionTime").filter(|_| was("status") == Some(status)).unwrap_or(now);
    said.push(json!({
        "type": UNDERSTOOD,
        "status": status,
        "reason": if doubts.is_empty() { "AsWritten" } else { "NotUnderstood" },
        "message": message,
        "observedGeneration": object.metadata.generation,
        "lastTransitionTime": since,
    }));
    Some(Value::Array(said))
}

/// What of a service's `spec` means nothing, or nothing that is evaluated.
pub(crate) fn doubts_of_service(spec: &Value) -> Vec<String> {
    let mut doubts = Vec::new();
    known("spec", spec, &["name", "payload", "matches", "path_ids"], &mut doubts);
    for (at, item) in list(&spec["matches"]) {
        let place = format!("spec.matches[{at}]");
        known(&place, item, &["source_selector", "routes", "fallthrough", "metadata"], &mut doubts);
        known(&format!("{place}.metadata"), &item["metadata"], &["labels"], &mut doubts);
        selector(&format!("{place}.source_selector"), &item["source_selector"], &mut doubts);
        for (at, route) in list(&item["routes"]) {
            let place = format!("{place}.routes[{at}]");
            known(&place, route, &["destination_selector", "weight"], &mut doubts);
            selector(&format!("{place}.destination_selector"), &route["destination_selector"], &mut doubts);
        }
    }
    doubts
}

fn list(value: &Value) -> impl Iterator<Item = (usize, &Value)> {
    value.as_array().into_iter().flatten().enumerate()
}

/// Fields without a value say nothing, whatever they are called: `match:` of the first generation's files.
fn known(place: &str, value: &Value, names: &[&str], doubts: &mut Vec<String>) {
    let fields = value.as_object().into_iter().flat_map(Map::iter);
    for (name, _) in fields.filter(|(name, value)| !value.is_null() && !names.contains(&name.as_str())) {
        let hint = match name.as_str() {
            "sourceSelector" => "; write source_selector (nsm convert does)",
            "destinationSelector" => "; write destination_selector (nsm convert does)",
            "route" => "; write routes (nsm convert does)",
            _ => "",
        };
        doubts.push(format!("{place}.{name} is no field of it and means nothing{hint}"));
    }
}

fn selector(place: &str, value: &Value, doubts: &mut Vec<String>) {
    for (label, value) in value.as_object().into_iter().flat_map(Map::iter) {
        if let Some(Err(error)) = value.as_str().map(Template::parse) {
            doubts.push(format!("{place}.{label}: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
    use nsm_api::pb::registry::NetworkService;

    use super::*;

    fn said(spec: Value, status: Value) -> Option<Value> {
        let mut object = Object::<NetworkService>::new(ObjectMeta::default(), NetworkService::default());
        (object.spec, object.status) = (spec, status);
        object.metadata.name = Some("web".to_owned());
        let item = object.item();
        conditions(&object, item.as_ref(), "now")
    }

    #[test]
    fn only_what_has_to_be_said_is_said_and_once() {
        let good = json!({"payload": "IP", "matches": [{"match": null, "routes": [{"destination_selector": {"node": "{{.node}}"}}]}]});
        assert_eq!(said(good.clone(), Value::Null), None);
        let bad = json!({"matches": [{"sourceSelector": {"a": "b"}, "routes": [{"destination_selector": {"a": "{{ printf 1 }}"}, "waight": 1}]}]});
        let conditions = said(bad.clone(), Value::Null).expect("something to say");
        let message = conditions[0]["message"].as_str().expect("text").to_owned();
        for part in [
            "spec.matches[0].sourceSelector is no field of it and means nothing; write source_selector (nsm convert does)",
            "spec.matches[0].routes[0].waight is no field of it",
            "spec.matches[0].routes[0].destination_selector.a: ",
        ] {
            assert!(message.contains(part), "{message}");
        }
        assert_eq!(
            (&conditions[0]["status"], &conditions[0]["lastTransitionTime"]),
            (&json!("False"), &json!("now"))
        );

        // It is there, beside others' conditions.
        let mut status = json!({"conditions": conditions});
        status["conditions"]
            .as_array_mut()
            .expect("a list")
            .insert(0, json!({"type": "Others", "status": "True"}));
        assert_eq!(said(bad, status.clone()), None);
        status["conditions"][1]["lastTransitionTime"] = json!("before");
        let other = said(json!({"matches": [{"route": []}]}), status.clone()).expect("another message");
        assert_eq!(
            (&other[0]["type"], &other[1]["lastTransitionTime"]),
            (&json!("Others"), &json!("before"))
        );
        let mended = said(good, status).expect("it is taken back");
        assert_eq!((&mended[1]["status"], &mended[1]["lastTransitionTime"]), (&json!("True"), &json!("now")));
        let nothing = said(json!({"payload": 7}), Value::Null).expect("no service");
        assert!(
            nothing[0]["message"].as_str().is_some_and(|text| text.contains("expected a string")),
            "{nothing}"
        );
    }

    #[test]
    fn programs_are_not_answered_and_long_texts_are_cut() {
        let registered = json!({"path_ids": ["spiffe://test.lab/a"], "later": 1});
        assert_eq!(said(registered, Value::Null), None);
        let long: Map<_, _> = (0..200).map(|i| (format!("ä{i}"), json!(1))).collect();
        let conditions = said(Value::Object(long), Value::Null).expect("something to say");
        assert!(
            conditions[0]["message"]
                .as_str()
                .is_some_and(|text| text.len() < LONGEST + 4 && text.ends_with('…'))
        );
    }
}
