//! What people write into the resources of wires: followed, and kept for whoever asks for the wires.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tracing::info;

use super::{
    Name, Wires, Wish,
    object::{APPLIED, NODE, object_name},
};
use crate::{
    follow::{Follower, Heard},
    objects::{ApiError, Objects, escaped},
};

/// Wires of a node whose edits are kept.
const MOST: usize = 16_384;

/// What somebody has made of a wish, in the resource of its wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// What it shall be.
    pub wish: Wish,
    /// The largest packet; `None`: the largest that fits.
    pub mtu: Option<u32>,
    /// The resource's generation: each change has a higher one.
    pub generation: i64,
    /// The wire is like this already.
    pub stands: bool,
}

/// Edits of a node's wires.
#[derive(Debug, Default)]
pub(crate) struct Known(BTreeMap<Name, (String, Edit)>);

impl Known {
    /// Of the pod with this UID, where that is known.
    pub(crate) fn of(&self, name: &Name, uid: &str) -> Option<&Edit> {
        let (of, edit) = self.0.get(name)?;
        (uid.is_empty() || uid == of).then_some(edit)
    }

    pub(crate) fn stands(&mut self, name: &Name, generation: i64) {
        if let Some((_, edit)) = self.0.get_mut(name).filter(|(_, edit)| edit.generation == generation) {
            edit.stands = true;
        }
    }

    /// What there is by now of a wire; whether that is news, other than that it stands.
    fn set(&mut self, name: Name, now: Option<(String, Edit)>) -> bool {
        let said = |edit: &(String, Edit)| (edit.0.clone(), Edit { stands: false, ..edit.1.clone() });
        let before = self.0.get(&name).map(said);
        let news = before != now.as_ref().map(said);
        match now {
            // What we have said of it comes back later than we know it.
            Some(_) if !news => {}
            Some(now) if before.is_some() || self.0.len() < MOST => {
                self.0.insert(name, now);
            }
            _ => {
                self.0.remove(&name);
            }
        }
        news
    }
}

/// A wire's resource, read: whose it is, and what somebody has made of it. Until somebody changes it, it says what its pod
/// has asked for first (generation 1), which is no edit.
pub fn read(wire: &Value) -> Option<(Name, Option<(String, Edit)>)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (metadata, spec) = (&wire["metadata"], &wire["spec"]);
    let name = Name {
        namespace: text(&metadata["namespace"]),
        pod: text(&spec["pod"]),
        connection: text(&spec["connection"]),
    };
    let uid = text(&metadata["ownerReferences"][0]["uid"]);
    // Whoever may make resources may call them as he likes; ours are called after pod and connection.
    if metadata["name"] != object_name(&name, &uid) {
        return None;
    }
    let generation = metadata["generation"].as_i64().unwrap_or_default();
    let labels = spec["labels"].as_object().into_iter().flatten();
    let said = wire["status"]["conditions"].as_array().into_iter().flatten();
    let stands = said.into_iter().any(|condition| {
        condition["type"] == APPLIED
            && condition["status"] == "True"
            && condition["observedGeneration"] == generation
    });
    let edit = Edit {
        wish: Wish {
            service: text(&spec["service"]),
            labels: labels.map(|(key, value)| (key.clone(), text(value))).collect(),
        },
        mtu: spec["mtu"].as_u64().and_then(|mtu| u32::try_from(mtu).ok()),
        generation,
        stands,
    };
    Some((name, (generation > 1).then_some((uid, edit))))
}

/// Follows what people make of the wires of a node's pods.
#[derive(Debug)]
pub struct Reader {
    follower: Follower,
    wires: Wires,
}

impl Reader {
    /// For the pods of a node.
    #[must_use]
    pub fn new(api: Objects, wires: Wires, node: &str) -> Self {
        let query = format!("labelSelector={}", escaped(&format!("{NODE}={node}")));
        let path = "/apis/networkservicemesh.io/v1/wires";
        Self { follower: Follower::new(api, "wires", path, &query), wires }
    }

    /// Reads what there is.
    ///
    /// # Errors
    /// The API server does not tell.
    pub async fn read(&mut self) -> Result<(), ApiError> {
        let heard = self.follower.read().await?;
        self.wires.hear(heard);
        Ok(())
    }

    /// Follows it; does not end.
    pub async fn run(self) {
        let wires = self.wires;
        self.follower.run(|heard| wires.hear(heard)).await;
    }
}

impl Wires {
    fn hear(&self, heard: Heard) {
        match heard {
            Heard::All(all) => {
                let found: Vec<_> = all.iter().filter_map(read).collect();
                let there: BTreeSet<_> = found.iter().map(|(name, _)| name).collect();
                let gone: Vec<_> = {
                    let known = self.0.edits.lock();
                    known.0.keys().filter(|name| !there.contains(name)).cloned().collect()
                };
                gone.into_iter().for_each(|name| self.is_edited(name, None));
                found.into_iter().for_each(|(name, edit)| self.is_edited(name, edit));
            }
            Heard::Is(wire) => read(&wire).into_iter().for_each(|(name, edit)| self.is_edited(name, edit)),
            Heard::Gone(wire) => read(&wire).into_iter().for_each(|(name, _)| self.is_edited(name, None)),
        }
    }

    fn is_edited(&self, name: Name, edit: Option<(String, Edit)>) {
        let taken_back = edit.is_none();
        if !self.0.edits.lock().set(name.clone(), edit) {
            return;
        }
        info!(
            pod = %format_args!("{}/{}", name.namespace, name.pod), connection = name.connection, taken_back,
            "somebody has edited a wire"
        );
        if taken_back {
            self.taken_back(&name);
        }
        self.0.edited.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn wire(generation: i64, applied: Option<i64>) -> Value {
        let name = Name { namespace: "apps".into(), pod: "web".into(), connection: "web-0".into() };
        let conditions =
            applied.map(|of| json!([{ "type": APPLIED, "status": "True", "observedGeneration": of }]));
        json!({
            "metadata": {
                "name": object_name(&name, "uid-1"), "namespace": "apps", "generation": generation,
                "ownerReferences": [{ "uid": "uid-1" }],
            },
            "spec": {
                "pod": "web", "connection": "web-0", "service": "audit", "labels": { "app": "web" }, "mtu": 1400,
            },
            "status": { "conditions": conditions },
        })
    }

    #[test]
    fn a_wire_is_edited_from_its_second_generation_on() {
        assert!(read(&wire(1, None)).unwrap().1.is_none(), "as its pod has asked for it");
        let (name, edit) = read(&wire(2, Some(1))).unwrap();
        let (uid, edit) = edit.unwrap();
        assert_eq!((name.pod.as_str(), uid.as_str()), ("web", "uid-1"));
        assert_eq!(edit.wish.service, "audit");
        assert_eq!(edit.wish.labels, [("app".to_owned(), "web".to_owned())].into());
        assert_eq!((edit.mtu, edit.generation, edit.stands), (Some(1400), 2, false));
        assert!(read(&wire(2, Some(2))).unwrap().1.unwrap().1.stands);
        let mut other = wire(2, None);
        other["metadata"]["name"] = json!("web-of-somebody");
        assert!(read(&other).is_none(), "somebody has made it himself");
        let mut other = wire(2, None);
        other["spec"]["connection"] = json!("web-1");
        assert!(read(&other).is_none());
    }

    #[test]
    fn what_we_say_of_an_edit_is_no_news_and_a_namesake_has_none() {
        let mut known = Known::default();
        let mut set = |wire: Value| {
            let (name, edit) = read(&wire).unwrap();
            known.set(name, edit)
        };
        assert!(!set(wire(1, None)) && set(wire(2, None)) && !set(wire(2, Some(2))) && set(wire(3, Some(2))));
        let name = read(&wire(3, None)).unwrap().0;
        assert!(known.of(&name, "").is_some() && known.of(&name, "uid-1").is_some());
        assert!(known.of(&name, "uid-2").is_none(), "another pod of that name");
        known.stands(&name, 2);
        assert!(!known.of(&name, "").unwrap().stands, "that was the one before");
        known.stands(&name, 3);
        // What the API server told of it before.
        assert!(!known.set(name.clone(), read(&wire(3, Some(2))).unwrap().1));
        assert!(known.of(&name, "").unwrap().stands);
        assert!(known.set(name.clone(), None) && !known.set(name.clone(), None));
        assert!(known.of(&name, "").is_none());
    }
}
