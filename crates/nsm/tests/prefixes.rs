//! The prefixes of a cluster are found at a real API server, with the rights that `nsm install` gives the registry.
#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, process::Command};

use nsm_cluster::{ApiServer, api_server};
use nsm_k8s::{
    objects::Objects,
    prefixes::{ADDED, Collector, FOUND},
};
use serde_json::json;

const ROLE: &str = "kind: ClusterRole\n";

struct Ring {
    server: ApiServer,
    account: PathBuf,
    rights: Vec<String>,
}

impl Ring {
    fn start(test: &str) -> Option<Self> {
        let server = api_server(test)?;
        server.apply("{apiVersion: v1, kind: Namespace, metadata: {name: nsm-system}}");
        let printed = Command::new(env!("CARGO_BIN_EXE_nsm")).arg("install").output().unwrap();
        let printed = String::from_utf8(printed.stdout).unwrap();
        let rights = printed.split("---\n").filter(|object| object.contains("component: registry\n"));
        let rights: Vec<_> = rights.filter(|object| object.contains("Role")).map(str::to_owned).collect();
        server.apply(&rights.join("---\n"));
        let account = server.kubeconfig_of("nsm-system", "nsm-registry");
        Some(Self { server, account, rights })
    }

    async fn collector(&self) -> Collector {
        Collector::new(Objects::of(&self.account).await.unwrap(), "nsm-system")
    }

    fn config(&self, namespace: &str, name: &str, key: &str, text: &str) {
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": name, "namespace": namespace }, "data": { key: text },
        });
        self.server.apply(&object.to_string());
    }

    fn found(&self) -> String {
        let path = format!("--output=jsonpath={{.data.{}}}", FOUND.1.replace('.', "\\."));
        self.server.kubectl(&["get", "configmap", FOUND.0, "--namespace=nsm-system", &path])
    }

    /// What a manager reads of it.
    fn prefixes(&self) -> Vec<String> {
        let found = self.found();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &found).unwrap();
        let _understood = nsm_manager::ExcludedPrefixes::open(vec![], file.path()).unwrap();
        found.lines().filter_map(|line| line.strip_prefix("- ")).map(str::to_owned).collect()
    }
}

#[tokio::test]
async fn what_the_cluster_uses_itself_is_found_and_written_down_for_the_nodes() {
    let test = "what_the_cluster_uses_itself_is_found_and_written_down_for_the_nodes";
    let Some(ring) = Ring::start(test) else { return };
    let mut collector = ring.collector().await;
    collector.pass().await.unwrap();
    let services =
        ring.server.kubectl(&["get", "servicecidrs", "--output=jsonpath={.items[*].spec.cidrs[0]}"]);
    assert_eq!(ring.prefixes(), [services.as_str()]);

    for (node, prefix) in [("node1", "10.244.1.0/24"), ("node2", "10.250.2.0/24")] {
        ring.server.apply(
            &json!({
                "apiVersion": "v1", "kind": "Node", "metadata": { "name": node },
                "spec": { "podCIDR": prefix, "podCIDRs": [prefix] },
            })
            .to_string(),
        );
    }
    let kubeadm = format!(
        "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\nnetworking:\n  dnsDomain: cluster.local\n  podSubnet: \
         10.244.0.0/16,fd00:10::/56\n  serviceSubnet: {services}\n"
    );
    ring.config("kube-system", "kubeadm-config", "ClusterConfiguration", &kubeadm);
    ring.config("kube-system", "cilium-config", "cluster-pool-ipv4-cidr", "10.240.0.0/16 10.241.0.0/16");
    ring.config("nsm-system", ADDED.0, ADDED.1, "prefixes: [192.168.7.9/24]\n");
    collector.pass().await.unwrap();
    // What is within another is not said, and neighbours are one.
    let all = [
        services.as_str(),
        "10.240.0.0/15",
        "10.244.0.0/16",
        "10.250.2.0/24",
        "192.168.7.0/24",
        "fd00:10::/56",
    ];
    let mut found = ring.prefixes();
    found.sort();
    let mut wanted = all.map(str::to_owned).to_vec();
    wanted.sort();
    assert_eq!(found, wanted);

    // What cannot be understood changes nothing, and what others write is put right.
    ring.config("nsm-system", ADDED.0, ADDED.1, "prefixes: [nonsense]\n");
    ring.config("nsm-system", FOUND.0, FOUND.1, "prefixes: []\n");
    collector.pass().await.unwrap();
    assert_eq!(ring.prefixes().len(), all.len());
    ring.config("nsm-system", ADDED.0, ADDED.1, "prefixes: []\n");
    let _said = ring.server.kubectl(&["delete", "node", "node2"]);
    collector.pass().await.unwrap();
    let left = ring.prefixes();
    assert!(
        !left.iter().any(|prefix| prefix.starts_with("192.168.") || prefix.starts_with("10.250.")),
        "{left:?}"
    );

    // Without the right to see nodes, what was seen of them stays, and a new process does without.
    for object in ring.rights.iter().filter(|object| object.contains(ROLE)) {
        ring.server.apply(&object.replace("- nodes\n", "- nothing\n"));
    }
    let before = ring.prefixes();
    collector.pass().await.unwrap();
    assert_eq!(ring.prefixes(), before);
}
