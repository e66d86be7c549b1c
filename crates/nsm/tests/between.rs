//! What is told to whoever stands between clusters: the programs before a real API server, with the rights that upstream's
//! manifests give them.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use nsm_cluster::{ApiServer, api_server};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

/// A program under upstream's name, with upstream's variables.
struct Program(Child);

impl Program {
    fn start(name: &str, kubeconfig: &Path, env: &[(&str, &str)], log: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nsm"));
        command.arg0(name).env("KUBECONFIG", kubeconfig).env("NSM_INTROSPECT_DIR", "");
        command.envs(env.iter().copied()).stdin(Stdio::null());
        Self(command.stderr(fs::File::create(log).unwrap()).spawn().unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An account that may do what these rules say.
fn account(server: &ApiServer, name: &str, rules: &str) -> std::path::PathBuf {
    let kubeconfig = server.kubeconfig_of("mesh", name);
    let rbac = "rbac.authorization.k8s.io";
    server.apply(&format!(
        "{{apiVersion: {rbac}/v1, kind: ClusterRole, metadata: {{name: {name}}}, rules: [{rules}]}}\n---\n{{apiVersion: \
         {rbac}/v1, kind: ClusterRoleBinding, metadata: {{name: {name}}}, roleRef: {{apiGroup: {rbac}, kind: ClusterRole, \
         name: {name}}}, subjects: [{{kind: ServiceAccount, name: {name}, namespace: mesh}}]}}\n"
    ));
    kubeconfig
}

fn ring(test: &str) -> Option<ApiServer> {
    let server = api_server(test)?;
    server.apply("{apiVersion: v1, kind: Namespace, metadata: {name: mesh}}");
    Some(server)
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        sleep(Duration::from_millis(100));
    }
}

fn node(server: &ApiServer, name: &str, addresses: &[(&str, &str)]) {
    server.apply(&format!("{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}}}"));
    let addresses: Vec<_> =
        addresses.iter().map(|(kind, ip)| json!({ "type": kind, "address": ip })).collect();
    let status = json!({ "status": { "addresses": addresses } }).to_string();
    let args = ["patch", "node", name, "--subresource=status", "--type=merge", "--patch", &status];
    let _said = server.kubectl(&args);
}

fn config(server: &ApiServer, name: &str, key: &str, text: &str) {
    let metadata = json!({ "name": name, "namespace": "mesh" });
    let object =
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": { key: text } });
    server.apply(&object.to_string());
}

/// As upstream's consumer reads it.
fn read(file: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(": "));
    let plain = |text: &str| text.trim_matches(['"', '\'']).to_owned();
    lines.map(|(from, to)| (plain(from), plain(to))).collect()
}

fn map(of: &[(&str, &str)]) -> BTreeMap<String, String> {
    of.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned())).collect()
}

#[test]
fn addresses_of_nodes_are_kept_in_a_file() {
    let Some(server) = ring("addresses_of_nodes_are_kept_in_a_file") else { return };
    let directory = tempfile::tempdir().unwrap();
    let (file, log) = (directory.path().join("mapip/config.yaml"), directory.path().join("log"));
    let rules = "{apiGroups: [''], resources: [nodes], verbs: [get, watch, list]}";
    let proxy = account(&server, "nsmgr-proxy", rules);
    node(
        &server,
        "node1",
        &[("InternalIP", "172.30.0.11"), ("ExternalIP", "192.0.2.11"), ("Hostname", "node1")],
    );
    let output = file.to_str().unwrap();
    let env = [("NSM_OUTPUT_PATH", output), ("NSM_NODE_NAME", "node2")];
    let mut program = Program::start("cmd-map-ip-k8s", &proxy, &env, &log);
    let of_node1 = [("172.30.0.11", "192.0.2.11"), ("192.0.2.11", "192.0.2.11")];
    until("the nodes that there are", || read(&file) == map(&of_node1));

    node(&server, "node2", &[("InternalIP", "172.30.0.12")]);
    until("a new one, and the pod on it", || read(&file).len() == 4);
    let own: Vec<_> =
        read(&file).into_iter().filter(|(_, to)| to == "172.30.0.12").map(|(from, _)| from).collect();
    assert_eq!(own.len(), 2, "{:?}", read(&file));
    assert!(
        own.iter().all(|from| from.parse::<std::net::IpAddr>().is_ok_and(|ip| !ip.is_loopback())),
        "{own:?}"
    );
    node(&server, "node2", &[("InternalIP", "172.30.0.12"), ("ExternalIP", "192.0.2.12")]);
    until("its new address", || read(&file).get("172.30.0.12").is_some_and(|to| to == "192.0.2.12"));
    let _said = server.kubectl(&["delete", "node", "node2"]);
    until("that it is gone", || read(&file) == map(&of_node1));
    assert!(program.0.try_wait().unwrap().is_none(), "{}", fs::read_to_string(&log).unwrap());
    drop(program);

    // A map of users, which is followed, and a mistake in it.
    let rules = "{apiGroups: [''], resources: [configmaps], verbs: [get, watch, list]}";
    let users = account(&server, "users", rules);
    config(&server, "addresses", "a.yaml", "10.0.0.1: 192.0.2.1\n");
    config(&server, "other", "a.yaml", "10.0.0.9: 192.0.2.9\n");
    let env = [("NSM_OUTPUT_PATH", output), ("NSM_FROM_CONFIG_MAP", "addresses"), ("NSM_NAMESPACE", "mesh")];
    let _program = Program::start("cmd-map-ip-k8s", &users, &env, &log);
    until("what users say", || read(&file) == map(&[("10.0.0.1", "192.0.2.1")]));
    config(&server, "addresses", "a.yaml", "10.0.0.1: 192.0.2.2\n");
    until("what they say by now", || read(&file) == map(&[("10.0.0.1", "192.0.2.2")]));
    config(&server, "addresses", "a.yaml", "nonsense");
    until("a mistake is named", || fs::read_to_string(&log).unwrap().contains("key a.yaml: "));
    assert_eq!(read(&file), map(&[("10.0.0.1", "192.0.2.2")]), "what it said before holds");
    let _said = server.kubectl(&["delete", "configmap", "addresses", "--namespace=mesh"]);
    until("nothing is said any more", || read(&file).is_empty());
}

const PROPERTIES: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: clusterproperties.about.k8s.io
  annotations: {api-approved.kubernetes.io: 'https://github.com/kubernetes/enhancements/pull/2149'}
spec:
  group: about.k8s.io
  scope: Cluster
  names: {kind: ClusterProperty, listKind: ClusterPropertyList, plural: clusterproperties, singular: clusterproperty}
  versions:
  - name: v1alpha1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties: {spec: {type: object, properties: {value: {type: string}}}}
";

#[test]
fn what_a_cluster_says_of_itself_is_kept_in_a_config_map() {
    let Some(server) = ring("what_a_cluster_says_of_itself_is_kept_in_a_config_map") else { return };
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let rules = "{apiGroups: [about.k8s.io], resources: [clusterproperties], verbs: [get, list, watch]}, {apiGroups: \
                 [''], resources: [configmaps], verbs: [get, create, update]}";
    let account = account(&server, "cluster-info", rules);
    let _program = Program::start("cmd-cluster-info-k8s", &account, &[("NSM_NAMESPACE", "mesh")], &log);
    // Before the resource is there.
    until("it is said what is missing", || {
        fs::read_to_string(&log).unwrap().contains("the API server did not tell of clusterproperties")
    });
    server.install(&[PROPERTIES]);
    let property = |name: &str, value: &str| {
        let kind = "apiVersion: about.k8s.io/v1alpha1, kind: ClusterProperty";
        server.apply(&format!("{{{kind}, metadata: {{name: {name}}}, spec: {{value: {value}}}}}"));
    };
    let says = || {
        let path = r"--output=jsonpath={.data.config\.yaml}";
        let mut get = server.kubectl_command();
        let said = get.args(["get", "configmap", "cluster-info", "--namespace=mesh", path]).output().unwrap();
        fs::write(directory.path().join("config.yaml"), said.stdout).unwrap();
        read(&directory.path().join("config.yaml"))
    };
    property("id.k8s.io", "cluster-1");
    property("zone.example", "north");
    until("all of it, by its names there", || {
        says() == map(&[("clusterName", "cluster-1"), ("zone.example", "north")])
    });
    // What others write stays, what we have said is put right, and nothing is taken back.
    config(&server, "cluster-info", "config.yaml", "mine: 1\nclusterName: wrong\n");
    property("id.k8s.io", "cluster-2");
    let _said = server.kubectl(&["delete", "clusterproperty", "zone.example"]);
    until("the change", || says().get("clusterName").is_some_and(|name| name == "cluster-2"));
    assert_eq!(says().get("mine").map(String::as_str), Some("1"));
    config(&server, "cluster-info", "config.yaml", "[nonsense]");
    property("id.k8s.io", "cluster-3");
    until("a mistake is named", || fs::read_to_string(&log).unwrap().contains("is no map of texts"));
    assert_eq!(says(), BTreeMap::new(), "and not overwritten");
    config(&server, "cluster-info", "config.yaml", "");
    until("when it is corrected", || says().get("clusterName").is_some_and(|name| name == "cluster-3"));
}
