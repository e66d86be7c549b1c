//! The prefixes that a cluster itself uses, which no endpoint shall hand out: those of its pods and of its services, as
//! far as anybody says them, and those that its users add.
//!
//! One process looks and writes a ConfigMap, which the nodes mount: no node asks for any of it. Its names and its form
//! are those of upstream's `cmd-exclude-prefixes-k8s` (spec/kubernetes.md 3.9).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::objects::{ApiError, Objects, escaped};

/// The ConfigMap with what was found, and its key.
pub const FOUND: (&str, &str) = ("nsm-config", "excluded_prefixes_output.yaml");
/// The ConfigMap in which users add some, and its key.
pub const ADDED: (&str, &str) = ("excluded-prefixes-config", "excluded_prefixes_input.yaml");
/// How often it is looked: nodes come and go, networks hardly do.
const LOOK: Duration = Duration::from_secs(30);
/// Nodes that are read in one pass: each is large.
const NODES: usize = 100;

/// Why a source says nothing.
#[derive(Debug, thiserror::Error)]
enum NoPrefixes {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("{place}: {problem}; what it said before holds")]
    Malformed { place: String, problem: String },
}

/// Looks for prefixes and writes them down.
#[derive(Debug)]
pub struct Collector {
    api: Objects,
    namespace: String,
    /// What each source said last.
    said: BTreeMap<&'static str, Vec<IpNet>>,
    /// The prefixes of nodes, which never change: by their UIDs.
    nodes: BTreeMap<String, Vec<IpNet>>,
    /// What is wrong, by its source: said once.
    wrong: BTreeMap<&'static str, String>,
}

impl Collector {
    /// Writes into a namespace, and reads there what users add.
    #[must_use]
    pub fn new(api: Objects, namespace: impl Into<String>) -> Self {
        let (said, nodes, wrong) = <(_, BTreeMap<_, _>, _)>::default();
        Self { api, namespace: namespace.into(), said, nodes, wrong }
    }

    /// Keeps it up to date; does not end.
    pub async fn run(mut self) {
        let mut failed = String::new();
        loop {
            match self.pass().await {
                Ok(()) => failed.clear(),
                Err(error) => {
                    let error = error.to_string();
                    if error != failed {
                        warn!(error, "the prefixes of the cluster cannot be written down; trying on");
                        failed = error;
                    }
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Looks once, and writes where something is different.
    ///
    /// # Errors
    /// It cannot be written.
    pub async fn pass(&mut self) -> Result<(), ApiError> {
        let nodes = self.of_nodes().await;
        self.hear("nodes", nodes);
        let services = self.of_services().await;
        self.hear("services", services);
        let kubeadm = self.of_kubeadm().await;
        self.hear("kubeadm", kubeadm);
        let cni = self.of_cni().await;
        self.hear("CNI", cni);
        let users = self.of_users().await;
        self.hear("users", users);

        // The fewest that cover them, IPv4 first.
        let all = IpNet::aggregate(&self.said.values().flatten().copied().collect());
        let lines: String = all.iter().map(|prefix| format!("- {prefix}\n")).collect();
        let text = if all.is_empty() { "prefixes: []\n".into() } else { format!("prefixes:\n{lines}") };
        let wanted = |found: Option<Value>| {
            let mut object = match found {
                Some(found) if found["data"][FOUND.1] == text.as_str() => return Ok(((), None)),
                Some(found) => found,
                None => json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": FOUND.0 } }),
            };
            object["data"][FOUND.1] = json!(text);
            info!(prefixes = ?all, "prefixes that endpoints must not hand out");
            Ok::<_, ApiError>(((), Some(object)))
        };
        let collection = format!("/api/v1/namespaces/{}/configmaps", escaped(&self.namespace));
        self.api.keep("the prefixes of the cluster", &collection, FOUND.0, wanted).await
    }

    /// A source that says nothing any more, or cannot be understood, has said what it said.
    fn hear(&mut self, source: &'static str, heard: Result<Vec<IpNet>, NoPrefixes>) {
        match heard {
            Ok(prefixes) => {
                self.said.insert(source, prefixes);
                self.wrong.remove(source);
            }
            Err(error) => {
                let error = error.to_string();
                if self.wrong.get(source) != Some(&error) {
                    warn!(
                        source,
                        error, "prefixes of the cluster that are not known, or not as they are by now"
                    );
                    self.wrong.insert(source, error);
                }
            }
        }
    }

    async fn of_nodes(&mut self) -> Result<Vec<IpNet>, NoPrefixes> {
        let all = self.api.metadata("nodes", "/api/v1/nodes?resourceVersion=0").await?;
        let text = |node: &Value, key: &str| node["metadata"][key].as_str().unwrap_or_default().to_owned();
        let uids: BTreeSet<_> = all.iter().map(|node| text(node, "uid")).collect();
        self.nodes.retain(|uid, _| uids.contains(uid));
        let new = all.iter().filter(|node| !self.nodes.contains_key(&text(node, "uid")));
        let new: Vec<_> = new.take(NODES).map(|node| (text(node, "uid"), text(node, "name"))).collect();
        for (uid, name) in new {
            let path = format!("/api/v1/nodes/{}", escaped(&name));
            let Some(node) = self.api.find("a node", &path).await? else { continue };
            let prefixes = prefixes(&node["spec"]["podCIDRs"]);
            // One that was not given any yet may be.
            if !prefixes.is_empty() {
                self.nodes.insert(uid, prefixes);
            }
        }
        Ok(self.nodes.values().flatten().copied().collect())
    }

    /// What services get their addresses from (Kubernetes 1.33), or else these addresses.
    async fn of_services(&self) -> Result<Vec<IpNet>, NoPrefixes> {
        let items = |list: Value| list["items"].as_array().cloned().unwrap_or_default();
        let ranges = self.api.find("service networks", "/apis/networking.k8s.io/v1/servicecidrs").await?;
        if let Some(ranges) = ranges {
            return Ok(items(ranges).iter().flat_map(|range| prefixes(&range["spec"]["cidrs"])).collect());
        }
        let services = self.api.get("services", "/api/v1/services?resourceVersion=0").await?;
        Ok(items(services).iter().flat_map(|service| prefixes(&service["spec"]["clusterIPs"])).collect())
    }

    async fn config(&self, namespace: &str, name: &str) -> Result<Option<Value>, ApiError> {
        let path = format!("/api/v1/namespaces/{}/configmaps/{name}", escaped(namespace));
        self.api.find(&format!("the ConfigMap {namespace}/{name}"), &path).await
    }

    /// What kubeadm was told when it made the cluster.
    async fn of_kubeadm(&self) -> Result<Vec<IpNet>, NoPrefixes> {
        let Some(config) = self.config("kube-system", "kubeadm-config").await? else { return Ok(vec![]) };
        let text = config["data"]["ClusterConfiguration"].as_str().unwrap_or_default();
        let bad =
            |problem: String| NoPrefixes::Malformed { place: "kube-system/kubeadm-config".into(), problem };
        made(text).map_err(bad)
    }

    /// What CNI plugins hand out, where they do not take it from nodes: Calico's pools, Cilium's.
    async fn of_cni(&self) -> Result<Vec<IpNet>, NoPrefixes> {
        let pools = self.api.find("Calico's pools", "/apis/crd.projectcalico.org/v1/ippools").await?;
        let pools = pools.and_then(|pools| pools["items"].as_array().cloned()).unwrap_or_default();
        let mut found: Vec<_> =
            pools.iter().flat_map(|pool| prefixes(&json!([pool["spec"]["cidr"]]))).collect();
        if let Some(cilium) = self.config("kube-system", "cilium-config").await? {
            for key in ["cluster-pool-ipv4-cidr", "cluster-pool-ipv6-cidr"] {
                let text = cilium["data"][key].as_str().unwrap_or_default();
                let bad = |problem| NoPrefixes::Malformed {
                    place: format!("kube-system/cilium-config, {key}"),
                    problem,
                };
                found.extend(listed(text.split([' ', ','])).map_err(bad)?);
            }
        }
        Ok(found)
    }

    /// What users add.
    async fn of_users(&self) -> Result<Vec<IpNet>, NoPrefixes> {
        let (name, key) = ADDED;
        let Some(config) = self.config(&self.namespace, name).await? else { return Ok(vec![]) };
        let place = format!("{}/{name}, {key}", self.namespace);
        let bad = |problem| NoPrefixes::Malformed { place: place.clone(), problem };
        let text = config["data"][key].as_str().ok_or_else(|| bad("the key is not there".into()))?;
        added(text).map_err(bad)
    }
}

#[derive(Debug, Default, Deserialize)]
struct Kubeadm {
    #[serde(default)]
    networking: Networking,
}

#[derive(Debug, Default, Deserialize)]
struct Networking {
    #[serde(default, rename = "podSubnet")]
    pods: String,
    #[serde(default, rename = "serviceSubnet")]
    services: String,
}

#[derive(Debug, Default, Deserialize)]
struct Added {
    #[serde(default, alias = "Prefixes")]
    prefixes: Vec<String>,
}

/// What a cluster was made with, as kubeadm keeps it.
#[doc(hidden)]
pub fn made(text: &str) -> Result<Vec<IpNet>, String> {
    let made: Option<Kubeadm> = serde_saphyr::from_str(text).map_err(|e| e.to_string())?;
    let Networking { pods, services } = made.unwrap_or_default().networking;
    listed(format!("{pods},{services}").split(','))
}

/// What users add.
#[doc(hidden)]
pub fn added(text: &str) -> Result<Vec<IpNet>, String> {
    let added: Option<Added> = serde_saphyr::from_str(text)
        .map_err(|e| format!("{e}; expected YAML such as `prefixes: [10.96.0.0/12]`"))?;
    listed(added.unwrap_or_default().prefixes.iter().map(String::as_str))
}

/// What people write: a mistake is told.
fn listed<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<IpNet>, String> {
    let texts = texts.map(str::trim).filter(|text| !text.is_empty());
    texts.map(|text| prefix(text).ok_or_else(|| format!("{text:?} is not a prefix"))).collect()
}

/// What the API server has checked: addresses and prefixes; what is none (a Service without an address) is left out.
#[doc(hidden)]
pub fn prefixes(list: &Value) -> Vec<IpNet> {
    list.as_array().into_iter().flatten().filter_map(|text| prefix(text.as_str()?)).collect()
}

fn prefix(text: &str) -> Option<IpNet> {
    let net: Option<IpNet> = text.parse().ok();
    net.or_else(|| Some(IpNet::from(text.parse::<std::net::IpAddr>().ok()?))).map(|net| net.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_read_as_they_are_written() {
        let nets = |list: &[&str]| list.iter().map(|p| p.parse().unwrap()).collect::<Vec<IpNet>>();
        assert_eq!(
            listed(" 10.244.0.1/16,,2001:db8::/64 ".split(',')),
            Ok(nets(&["10.244.0.0/16", "2001:db8::/64"]))
        );
        assert_eq!(listed("10.0.0.0/33".split(',')), Err("\"10.0.0.0/33\" is not a prefix".to_owned()));
        assert_eq!(prefixes(&json!(["10.96.0.1", "None", ""])), nets(&["10.96.0.1/32"]));
        assert_eq!(prefixes(&Value::Null), []);
    }
}
