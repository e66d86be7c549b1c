//! By which addresses other clusters reach the nodes of this one: a file for whoever stands between them, in the form of
//! upstream's `cmd-map-ip-k8s` (spec/kubernetes.md 3.13, spec/registry.md 7.2): a flat map of texts, YAML.

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    net::{IpAddr, UdpSocket},
    path::{Path, PathBuf},
};

use serde_json::Value;
use tracing::{info, warn};

use crate::{
    follow::{Follower, Heard},
    objects::{Objects, escaped},
};

/// From inside to outside.
type Map = BTreeMap<String, String>;

/// Where the addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The cluster's nodes; the pod of this process is on the one of this name.
    Nodes(String),
    /// A ConfigMap, by namespace and name: each of its keys is a map.
    ConfigMap(String, String),
}

/// Keeps the file as it should be.
#[derive(Debug)]
pub struct Mapper {
    api: Objects,
    source: Source,
    file: PathBuf,
    /// The address of this pod.
    own: Option<IpAddr>,
    /// What each object says, by its name.
    parts: BTreeMap<String, Map>,
    /// What stands in the file.
    written: Option<Map>,
}

impl Mapper {
    /// Writes `file`, whose directory is made where it is not there.
    #[must_use]
    pub fn new(api: Objects, source: Source, file: impl Into<PathBuf>) -> Self {
        Self { api, source, file: file.into(), own: own_address(), parts: BTreeMap::new(), written: None }
    }

    /// Follows the source; does not end.
    pub async fn run(mut self) {
        let (what, path, query) = match &self.source {
            Source::Nodes(_) => ("nodes", "/api/v1/nodes".to_owned(), String::new()),
            Source::ConfigMap(namespace, name) => {
                let path = format!("/api/v1/namespaces/{}/configmaps", escaped(namespace));
                ("a ConfigMap", path, format!("fieldSelector={}", escaped(&format!("metadata.name={name}"))))
            }
        };
        let follower = Follower::new(self.api.clone(), what, &path, &query);
        follower.run(move |heard| self.hear(heard)).await;
    }

    fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::All(all) => {
                let names: Vec<_> = all.iter().map(name).collect();
                self.parts.retain(|part, _| names.contains(part));
                all.iter().for_each(|object| self.is(object));
            }
            Heard::Is(object) => self.is(&object),
            Heard::Gone(object) => {
                self.parts.remove(&name(&object));
            }
        }
        let map: Map = self.parts.values().flatten().map(|(from, to)| (from.clone(), to.clone())).collect();
        if self.written.as_ref() == Some(&map) {
            return;
        }
        match write(&self.file, &map) {
            Ok(()) => {
                info!(file = %self.file.display(), entries = map.len(), "addresses written");
                self.written = Some(map);
            }
            // With the next change, or with the next node that says that it is there, which each does every five minutes.
            Err(error) => warn!(file = %self.file.display(), %error, "addresses cannot be written"),
        }
    }

    fn is(&mut self, object: &Value) {
        let said = match &self.source {
            Source::Nodes(own) => {
                let address = self.own.filter(|_| name(object) == *own);
                Ok(of_node(&object["status"]["addresses"], address))
            }
            Source::ConfigMap(..) => of_config_map(&object["data"]),
        };
        match said {
            Ok(map) => {
                self.parts.insert(name(object), map);
            }
            Err(problem) => warn!(object = name(object), problem, "what it said before holds"),
        }
    }
}

fn name(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

/// What a node's addresses mean: inside it is reached by one, outside by the other. `own`: of a pod on it.
#[doc(hidden)]
pub fn of_node(addresses: &Value, own: Option<IpAddr>) -> Map {
    let of_type = |wanted: &str| -> Vec<String> {
        let all = addresses.as_array().into_iter().flatten().filter(|address| address["type"] == wanted);
        all.filter_map(|address| address["address"].as_str().map(str::to_owned)).collect()
    };
    let (inside, outside) = (of_type("InternalIP"), of_type("ExternalIP"));
    let first = outside.first();
    let mut map: Map = inside.iter().map(|ip| (ip.clone(), first.unwrap_or(ip).clone())).collect();
    map.extend(outside.iter().map(|ip| (ip.clone(), ip.clone())));
    // The last one listed wins, as upstream has it.
    if let (Some(own), Some(node)) = (own, outside.last().or(inside.last())) {
        map.insert(own.to_string(), node.clone());
    }
    map
}

/// What users say: every key holds a map.
#[doc(hidden)]
pub fn of_config_map(data: &Value) -> Result<Map, String> {
    let mut map = Map::new();
    for (key, text) in data.as_object().into_iter().flatten() {
        let text = text.as_str().unwrap_or_default();
        let part: Option<Map> = serde_saphyr::from_str(text)
            .map_err(|e| format!("key {key}: {e}; expected YAML, ADDRESS: ADDRESS"))?;
        map.extend(part.unwrap_or_default());
    }
    Ok(map)
}

/// Whole, or not at all: whoever reads it sees no half of it.
fn write(file: &Path, map: &Map) -> io::Result<()> {
    let text = serde_saphyr::to_string(map).map_err(io::Error::other)?;
    let directory = file.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let new = directory.join(format!(".{name}.{}", std::process::id()));
    let written = std::fs::File::create(&new).and_then(|mut new| new.write_all(text.as_bytes()));
    let done = written.and_then(|()| std::fs::rename(&new, file));
    if done.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    done
}

/// The address that this pod would go out by: only the route is looked up, nothing is sent.
fn own_address() -> Option<IpAddr> {
    // TEST-NET-3 (RFC 5737), and the documentation's prefix of IPv6 (RFC 3849).
    let ways = [("0.0.0.0:0", "203.0.113.1:9"), ("[::]:0", "[2001:db8::1]:9")];
    ways.into_iter().find_map(|(from, to)| {
        let socket = UdpSocket::bind(from).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(of: &[(&str, &str)]) -> Map {
        of.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned())).collect()
    }

    #[test]
    fn a_node_is_reached_from_outside_by_its_first_external_address_or_as_from_inside() {
        let node = |of: &[(&str, &str)]| {
            let all = of.iter().map(|(kind, ip)| json!({ "type": kind, "address": ip }));
            json!(all.chain([json!({ "type": "Hostname", "address": "node1" })]).collect::<Vec<_>>())
        };
        let own = Some(IpAddr::from([10, 244, 1, 7]));
        let plain = node(&[("InternalIP", "172.30.0.11"), ("InternalIP", "fd00::11")]);
        assert_eq!(of_node(&plain, None), map(&[("172.30.0.11", "172.30.0.11"), ("fd00::11", "fd00::11")]));
        assert_eq!(of_node(&plain, own)["10.244.1.7"], "fd00::11");
        let open =
            node(&[("ExternalIP", "192.0.2.1"), ("InternalIP", "172.30.0.11"), ("ExternalIP", "192.0.2.2")]);
        let both = [("172.30.0.11", "192.0.2.1"), ("192.0.2.1", "192.0.2.1"), ("192.0.2.2", "192.0.2.2")];
        assert_eq!(of_node(&open, None), map(&both));
        assert_eq!(of_node(&open, own)["10.244.1.7"], "192.0.2.2");
        assert_eq!(of_node(&Value::Null, own), Map::new());
    }

    #[test]
    fn users_say_maps_and_a_mistake_is_named() {
        let said = json!({ "a": "10.0.0.1: 192.0.2.1\n", "b": "fd00::1: 2001:db8::1\n", "c": "" });
        assert_eq!(of_config_map(&said), Ok(map(&[("10.0.0.1", "192.0.2.1"), ("fd00::1", "2001:db8::1")])));
        let wrong = of_config_map(&json!({ "a": "[10.0.0.1]" })).unwrap_err();
        assert!(wrong.starts_with("key a: ") && wrong.contains("expected YAML"), "{wrong}");
    }

    #[test]
    fn what_is_written_is_read_as_it_was_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("mapip/config.yaml");
        for of in [&[("10.0.0.1", "192.0.2.1"), ("fd00::1", "2001:db8::1")][..], &[]] {
            write(&file, &map(of)).unwrap();
            let read: Map = serde_saphyr::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
            assert_eq!(read, map(of));
        }
        assert_eq!(std::fs::read_dir(directory.path().join("mapip")).unwrap().count(), 1);
        let nowhere = directory.path().join("mapip/config.yaml/below");
        assert!(write(&nowhere, &Map::new()).is_err());
    }
}
