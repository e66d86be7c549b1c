//! What stands in the objects: a wire, an event, a pod's condition.

use std::time::SystemTime;

use aws_lc_rs::digest;
use nsm_api::{mechanism::key, path, pb::connection::Connection};
use serde_json::{Map, Value, json};

use super::{
    Name, Trouble, Wish,
    table::{Outcome, Said, State, service},
};

/// The condition of a wire that somebody has edited.
pub(crate) const APPLIED: &str = "Applied";
/// The condition of a pod that waits for its wires, and the gate by which it says that it does.
pub const CONDITION: &str = "networkservicemesh.io/wires";
/// The label that names the node of a wire.
pub(crate) const NODE: &str = "networkservicemesh.io/node";
/// The label that names its pod.
const POD: &str = "networkservicemesh.io/pod";
/// Who says all this.
const COMPONENT: &str = "nsm-node";
/// Bytes of a text: an event has at most 1024, with what stands around it.
const MAX_TEXT: usize = 900;
/// Labels have no more.
const MAX_LABEL: usize = 63;

/// The beginning of a text that fits.
pub(crate) fn bounded(text: &str) -> &str {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    &text[..ends.take_while(|end| *end <= MAX_TEXT).last().unwrap_or_default()]
}

/// What a wire is like when it is up.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Shape {
    pub(crate) interface: String,
    pub(crate) endpoint: String,
    pub(crate) mechanism: String,
    pub(crate) payload: String,
    pub(crate) mtu: u32,
    pub(crate) addresses: Vec<String>,
    pub(crate) endpoint_addresses: Vec<String>,
    pub(crate) routes: Vec<String>,
    pub(crate) path: Vec<String>,
}

impl Shape {
    pub(crate) fn of(conn: &Connection) -> Self {
        let context = conn.context.clone().unwrap_or_default();
        let ip = context.ip_context.unwrap_or_default();
        let mechanism = conn.mechanism.as_ref();
        let interface = mechanism.and_then(|mechanism| mechanism.parameters.get(key::NAME));
        let routes = ip.src_routes.into_iter().map(|route| match route.next_hop.as_str() {
            "" => route.prefix,
            via => format!("{} via {via}", route.prefix),
        });
        Self {
            interface: interface.cloned().unwrap_or_default(),
            endpoint: conn.network_service_endpoint_name.clone(),
            mechanism: mechanism.map(|mechanism| mechanism.r#type.clone()).unwrap_or_default(),
            payload: conn.payload.clone(),
            mtu: context.mtu,
            addresses: ip.src_ip_addrs,
            endpoint_addresses: ip.dst_ip_addrs,
            routes: routes.collect(),
            path: path::segments(conn).iter().map(|segment| segment.name.clone()).collect(),
        }
    }
}

/// How a wire is, as it is said.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) name: Name,
    pub(crate) uid: String,
    pub(crate) wish: Wish,
    pub(crate) state: State,
    pub(crate) since: SystemTime,
    pub(crate) shape: Option<Shape>,
    pub(crate) trouble: Option<(Trouble, SystemTime)>,
    pub(crate) outcome: Option<Outcome>,
}

/// The name of a wire's object: of the pod with this UID, not of its namesakes.
pub(crate) fn object_name(name: &Name, uid: &str) -> String {
    let hash = digest::digest(&digest::SHA256, format!("{uid}/{}", name.connection).as_bytes());
    let hash: String = hash.as_ref()[..5].iter().map(|byte| format!("{byte:02x}")).collect();
    let pod: String = name.pod.chars().take(240).collect();
    format!("{}-{hash}", pod.trim_end_matches(['.', '-']))
}

impl Seen {
    /// The name of its object.
    pub(crate) fn object_name(&self) -> String {
        object_name(&self.name, &self.uid)
    }

    /// The object, without its status.
    pub(crate) fn object(&self, node: &str) -> Value {
        let Name { namespace, pod, connection } = &self.name;
        let label = |(name, value): (&str, &String)| {
            (value.len() <= MAX_LABEL).then(|| (name.to_owned(), json!(value)))
        };
        let node_name = node.to_owned();
        let labels: Map<_, _> = [(NODE, &node_name), (POD, pod)].into_iter().filter_map(label).collect();
        json!({
            "apiVersion": "networkservicemesh.io/v1",
            "kind": "Wire",
            "metadata": {
                "name": self.object_name(),
                "namespace": namespace,
                "labels": labels,
                // It goes with the pod.
                "ownerReferences": [{ "apiVersion": "v1", "kind": "Pod", "name": pod, "uid": self.uid }],
            },
            "spec": {
                "pod": pod,
                "node": node,
                "connection": connection,
                "service": self.wish.service,
                "labels": self.wish.labels,
            },
        })
    }

    /// Its status; what is null is not there.
    pub(crate) fn status(&self) -> Value {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let list = |list: &[String]| (!list.is_empty()).then(|| list.to_vec());
        let trouble = self.trouble.as_ref().map(|(Trouble { message, hint }, at)| {
            json!({ "message": message, "hint": text(hint), "time": stamp(*at) })
        });
        let up = self.state == State::Up;
        let why = self.trouble.as_ref().filter(|_| !up).map(|(trouble, _)| trouble.message.clone());
        let is_up = json!({
            "type": "Up",
            "status": if up { "True" } else { "False" },
            "reason": self.state.name(),
            "message": why.unwrap_or_default(),
            "lastTransitionTime": stamp(self.since),
        });
        let conditions: Vec<_> = [is_up].into_iter().chain(self.outcome.as_ref().map(applied)).collect();
        let mut status = json!({
            "state": self.state.name(),
            "since": stamp(self.since),
            "lastError": trouble,
            "conditions": conditions,
        });
        // Where it is not known, what was said before stays: that wire may stand.
        if let Some(shape) = &self.shape {
            let known = json!({
                "interface": text(&shape.interface),
                "endpoint": text(&shape.endpoint),
                "mechanism": text(&shape.mechanism),
                "payload": text(&shape.payload),
                "mtu": (shape.mtu > 0).then_some(shape.mtu),
                "addresses": list(&shape.addresses),
                "endpointAddresses": list(&shape.endpoint_addresses),
                "routes": list(&shape.routes),
                "path": list(&shape.path),
            });
            if let (Value::Object(status), Value::Object(known)) = (&mut status, known) {
                status.extend(known);
            }
        }
        status
    }

    /// What has to be said to somebody who was told the other before, or nothing.
    pub(crate) fn news(&self, before: Option<&Said>) -> Option<News> {
        let service = service(&self.wish, self.outcome.as_ref());
        let shape = self.shape.as_ref();
        let at = shape.map(|shape| shape.endpoint.as_str()).unwrap_or_default();
        let normal = |reason, message| Some(News { warns: false, reason, message });
        let trouble = || {
            let Some((Trouble { message, hint }, _)) = &self.trouble else { return String::new() };
            let hint = if hint.is_empty() { String::new() } else { format!(" ({hint})") };
            format!(": {message}{hint}")
        };
        let warning = |reason, message| Some(News { warns: true, reason, message });
        match (self.state, before) {
            (State::Asking, _) => None,
            (State::Up, Some(said)) if said.state == State::Up && said.endpoint == at => None,
            (State::Up, said) => {
                let place = shape.map(|shape| shape.place(service)).unwrap_or_default();
                match said {
                    Some(said) if said.state == State::Up => {
                        normal("WireMoved", format!("{place}; it led to {}", said.endpoint))
                    }
                    _ => normal("WireUp", place),
                }
            }
            (state, Some(said)) if said.state == state && said.trouble == self.trouble_text() => None,
            (State::Down, _) => warning(
                "WireDown",
                format!("the wire to {service} is down, and asked for again{}", trouble()),
            ),
            (State::NotUp, _) => {
                warning("WireNotUp", format!("there is no wire to {service} yet{}", trouble()))
            }
            (State::Ended, _) => {
                self.trouble.as_ref()?;
                warning("WireEnded", format!("the wire to {service} is gone{}", trouble()))
            }
        }
    }

    pub(crate) fn trouble_text(&self) -> &str {
        self.trouble.as_ref().map(|(trouble, _)| trouble.message.as_str()).unwrap_or_default()
    }
}

/// Whether a wire is as it was edited, and why not.
fn applied(outcome: &Outcome) -> Value {
    let (status, reason, message) = match &outcome.trouble {
        None => ("True", "Applied", String::new()),
        Some(Trouble { message, hint }) if hint.is_empty() => ("False", "Refused", message.clone()),
        Some(Trouble { message, hint }) => ("False", "Refused", format!("{message} ({hint})")),
    };
    json!({
        "type": APPLIED,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": stamp(outcome.at),
        "observedGeneration": outcome.generation,
    })
}

impl Shape {
    fn place(&self, service: &str) -> String {
        let some = |label: &str, text: &str| match text {
            "" => String::new(),
            text => format!("{label}{text}"),
        };
        format!(
            "{} to {service} is up{}{}{}{}",
            if self.interface.is_empty() { "a wire" } else { &self.interface },
            some(": endpoint ", &self.endpoint),
            some(", addresses ", &self.addresses.join(" ")),
            some(", theirs ", &self.endpoint_addresses.join(" ")),
            some(", by ", &self.path.join(" > ")),
        )
    }
}

/// What an event says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct News {
    warns: bool,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl News {
    /// The event on the pod.
    pub(crate) fn event(&self, seen: &Seen, node: &str, name: &str, now: SystemTime) -> Value {
        let Name { namespace, pod, .. } = &seen.name;
        json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": { "name": name, "namespace": namespace },
            "involvedObject": {
                "apiVersion": "v1", "kind": "Pod", "name": pod, "namespace": namespace, "uid": seen.uid,
            },
            "type": if self.warns { "Warning" } else { "Normal" },
            "reason": self.reason,
            "message": bounded(&self.message),
            "source": { "component": COMPONENT, "host": node },
            "reportingComponent": COMPONENT,
            "reportingInstance": node,
            "firstTimestamp": stamp(now),
            "lastTimestamp": stamp(now),
            "count": 1,
        })
    }
}

/// The change of a pod that says whether its wires are up; `missing` are the services of those that are not.
pub(crate) fn condition(uid: &str, missing: Option<&str>, now: SystemTime) -> Value {
    let (status, reason) = match missing {
        None => ("True", "WiresUp"),
        Some(_) => ("False", "WiresNotUp"),
    };
    json!({
        "metadata": { "uid": uid },
        "status": { "conditions": [{
            "type": CONDITION,
            "status": status,
            "reason": reason,
            "message": missing.map(bounded).unwrap_or_default(),
            "lastTransitionTime": stamp(now),
        }] },
    })
}

pub(crate) fn stamp(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
