//! The mesh on a real cluster of two nodes, as somebody installs it: one manifest, one annotation.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use nsm_cluster::{Cluster, cluster};
use nsm_image::{Contents, libraries};

/// Where both nodes have what is of ours.
const OURS: [&str; 3] = ["/run/nsm", "/run/spire", "/var/lib/networkservicemesh"];

/// A service with an endpoint on node 1: its containers are ours and one to look around in.
const ENDPOINT: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: gateway}
spec:
  selector: {matchLabels: {app: gateway}}
  template:
    metadata: {labels: {app: gateway, spiffe.io/spiffe-id: 'true'}}
    spec:
      nodeName: node1
      terminationGracePeriodSeconds: 5
      containers:
      - name: nse
        image: cmd-nse-icmp-responder:dev
        imagePullPolicy: Never
        env:
        - {name: SPIFFE_ENDPOINT_SOCKET, value: 'unix:///run/spire/sockets/agent.sock'}
        - {name: NSM_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: NSM_SERVICE_NAMES, value: finance}
        - {name: NSM_CIDR_PREFIX, value: 172.16.1.0/24}
        volumeMounts:
        - {name: spire-agent-socket, mountPath: /run/spire/sockets, readOnly: true}
        - {name: nsm-socket, mountPath: /var/lib/networkservicemesh, readOnly: true}
      - name: look
        image: testbed.local/busybox:1
        imagePullPolicy: Never
        command: [sleep, '1000000']
      volumes:
      - {name: spire-agent-socket, hostPath: {path: /run/spire/sockets, type: Directory}}
      - {name: nsm-socket, hostPath: {path: /var/lib/networkservicemesh, type: Directory}}
";

/// A workload that asks for a wire by one line.
fn client(name: &str, node: &str) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  annotations: {{networkservicemesh.io: kernel://finance/nsm-1}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      nodeName: {node}
      terminationGracePeriodSeconds: 5
      containers:
      - {{name: app, image: 'testbed.local/busybox:1', imagePullPolicy: Never, command: [sleep, '1000000']}}
"
    )
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(300);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        sleep(Duration::from_millis(200));
    }
}

/// A cluster with the images of this very program on both nodes.
struct Mesh {
    cluster: Cluster,
}

impl Mesh {
    fn start(test: &str) -> Option<Self> {
        let cluster = cluster(test)?;
        let directory = tempfile::tempdir().unwrap();
        cluster.load(&image(directory.path()));
        Some(Self { cluster })
    }

    /// What `nsm` prints, given to kubectl, as a person does it.
    fn nsm_to_kubectl(&self, nsm: &[&str], kubectl: &[&str]) {
        let printed = Command::new(env!("CARGO_BIN_EXE_nsm")).args(nsm).output().unwrap();
        assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
        let mut command = self.cluster.kubectl_command();
        command.args(kubectl).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut command = command.spawn().unwrap();
        command.stdin.take().unwrap().write_all(&printed.stdout).unwrap();
        let done = command.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    fn install(&self) {
        self.nsm_to_kubectl(&["install", "--pull-policy", "Never"], &["apply", "--filename=-"]);
        for what in [
            "deployment/nsm-identity",
            "deployment/nsm-registry",
            "deployment/nsm-webhook",
            "daemonset/nsm-node",
        ] {
            self.rolled_out(what, "nsm-system");
        }
    }

    fn rolled_out(&self, what: &str, namespace: &str) {
        let said =
            self.cluster.kubectl(&["rollout", "status", what, "--namespace", namespace, "--timeout=300s"]);
        assert!(said.contains("successfully rolled out"), "{said}");
    }

    /// Applies a manifest; an annotated one again where the API server does not know the webhook's certificate yet.
    fn applied(&self, manifest: &str) {
        until("an annotated workload is taken", || {
            let mut apply = self.cluster.kubectl_command();
            apply.args(["apply", "--filename=-"]).stdin(Stdio::piped()).stdout(Stdio::null());
            let mut apply = apply.spawn().unwrap();
            apply.stdin.take().unwrap().write_all(manifest.as_bytes()).unwrap();
            apply.wait().unwrap().success()
        });
    }

    /// What a program in a pod of a Deployment prints, where it ends well.
    fn exec(&self, deployment: &str, container: &str, program: &[&str]) -> Option<String> {
        let mut exec = self.cluster.kubectl_command();
        exec.args(["exec", &format!("deployment/{deployment}"), "--container", container, "--"])
            .args(program);
        let said = exec.output().unwrap();
        said.status.success().then(|| String::from_utf8_lossy(&said.stdout).into_owned())
    }

    fn in_node(&self, node: u32, program: &[&str]) -> String {
        let said = self.cluster.in_node(node, program[0]).args(&program[1..]).output().unwrap();
        assert!(said.status.success(), "{program:?}: {}", String::from_utf8_lossy(&said.stderr));
        String::from_utf8_lossy(&said.stdout).into_owned()
    }

    /// What is of ours in the kernels of both nodes: links in every network namespace there that bear our mark or
    /// upstream's, and what is to be had of wires in files.
    fn wires(&self) -> Vec<String> {
        let mut found = Vec::new();
        for node in 1..=self.cluster.nodes() {
            // One process of each network namespace is enough.
            let mut namespaces = BTreeMap::new();
            for pid in self
                .in_node(node, &["ls", "/proc"])
                .split_whitespace()
                .filter(|pid| pid.parse::<u32>().is_ok())
            {
                let link = self
                    .cluster
                    .in_node(node, "readlink")
                    .arg(format!("/proc/{pid}/ns/net"))
                    .output()
                    .unwrap();
                if link.status.success() {
                    namespaces.entry(link.stdout).or_insert_with(|| pid.to_owned());
                }
            }
            for pid in namespaces.values() {
                let args = ["--target", pid, "--net", "ip", "-oneline", "-details", "link"];
                let links = self.cluster.in_node(node, "nsenter").args(args).output().unwrap();
                let links = String::from_utf8_lossy(&links.stdout).into_owned();
                let ours =
                    links.lines().filter(|line| line.contains("altname nsm-") || line.contains("vxlan"));
                found.extend(ours.map(|line| format!("node {node}: {line}")));
            }
            let plans = self.in_node(node, &["find", "/run/nsm/forwarder", "-type", "f"]);
            found.extend(
                plans
                    .lines()
                    .filter(|file| !file.ends_with("lock"))
                    .map(|file| format!("node {node}: {file}")),
            );
        }
        found
    }

    fn names(&self, kinds: &str) -> BTreeSet<String> {
        let names = self.cluster.kubectl(&["get", kinds, "--all-namespaces", "--output=name"]);
        names.lines().map(str::to_owned).collect()
    }
}

impl Drop for Mesh {
    /// What was wrong is in the cluster, which goes.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let tell = |args: &[&str]| {
            let said = self.cluster.kubectl_command().args(args).output();
            let said = said.map(|said| [said.stdout, said.stderr].concat()).unwrap_or_default();
            eprintln!("---- kubectl {}\n{}", args.join(" "), String::from_utf8_lossy(&said));
        };
        tell(&["get", "pods", "--all-namespaces", "--output=wide"]);
        tell(&["get", "events", "--all-namespaces", "--field-selector=type=Warning"]);
        for part in ["identity", "registry", "webhook", "node"] {
            let part = format!("app.kubernetes.io/component={part}");
            tell(&[
                "logs",
                "--namespace=nsm-system",
                "--selector",
                &part,
                "--all-containers",
                "--prefix",
                "--tail=40",
            ]);
        }
        for app in ["gateway", "near", "far"] {
            tell(&["logs", "--selector", &format!("app={app}"), "--all-containers", "--prefix", "--tail=20"]);
        }
    }
}

/// An archive of images of this program. It is no static one, so what it is linked with is in the images, too.
fn image(directory: &Path) -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_nsm"));
    let stripped = directory.join("nsm");
    let done = Command::new("strip").arg("-o").arg(&stripped).arg(program).status().unwrap();
    assert!(done.success(), "strip: {done}");
    let contents = Contents {
        program: fs::read(&stripped).unwrap(),
        libraries: libraries(program).unwrap(),
        sbom: "{}".into(),
    };
    nsm_image::write(directory, &contents, "dev").unwrap();
    directory.join("nsm.tar")
}

#[test]
fn one_manifest_and_one_annotation_make_a_wire_and_nothing_is_left() {
    let name = "one_manifest_and_one_annotation_make_a_wire_and_nothing_is_left";
    let Some(mesh) = Mesh::start(name) else { return };
    let kinds =
        "namespaces,priorityclasses,clusterroles,clusterrolebindings,mutatingwebhookconfigurations,crds";
    let before = mesh.names(kinds);
    mesh.install();

    mesh.applied(ENDPOINT);
    mesh.applied(&client("near", "node1"));
    mesh.applied(&client("far", "node2"));
    for deployment in ["gateway", "near", "far"] {
        mesh.rolled_out(&format!("deployment/{deployment}"), "default");
    }
    for client in ["near", "far"] {
        // Ready: so its wire is there.
        let links = mesh.exec(client, "app", &["ip", "-oneline", "-4", "address", "show", "dev", "nsm-1"]);
        let links = links.unwrap_or_else(|| panic!("{client} has no interface nsm-1"));
        let address = links.split_whitespace().find(|word| word.starts_with("172.16.1."));
        let address = address.unwrap_or_else(|| panic!("{client}: {links}")).split('/').next().unwrap();
        let last: u8 = address.rsplit('.').next().unwrap().parse().unwrap();
        // Of each pair the endpoint has the lower one.
        let endpoint = format!("172.16.1.{}", last - 1);
        let theirs = mesh.exec("gateway", "look", &["ip", "-oneline", "-4", "address"]).unwrap();
        assert!(theirs.contains(&format!("{endpoint}/")), "{theirs}");
        until(&format!("{client} reaches the endpoint"), || {
            mesh.exec(client, "app", &["ping", "-c", "1", "-W", "5", "-I", "nsm-1", &endpoint]).is_some()
        });
        until(&format!("the endpoint reaches {client}"), || {
            mesh.exec("gateway", "look", &["ping", "-c", "1", "-W", "5", address]).is_some()
        });
    }
    let wires = mesh.wires();
    assert!(wires.iter().any(|wire| wire.contains("vxlan")), "one wire is between nodes: {wires:#?}");

    let _said = mesh.cluster.kubectl(&["delete", "deployment", "near", "far", "--wait=true"]);
    let mut left = Vec::new();
    until("nothing is left of the wires", || {
        let gone = mesh.wires();
        if gone != left {
            eprintln!("{} left: {gone:#?}", gone.len());
            left = gone;
        }
        left.is_empty()
    });
    let _said = mesh.cluster.kubectl(&["delete", "deployment", "gateway"]);

    mesh.nsm_to_kubectl(&["uninstall", "--crds", "true"], &["delete", "--filename=-", "--timeout=300s"]);
    until("nothing is left in the cluster", || mesh.names(kinds) == before);
    for node in 1..=mesh.cluster.nodes() {
        until(&format!("nothing is left on node {node}"), || {
            let files = OURS.iter().map(|directory| {
                let args = [directory, "-type", "f", "-o", "-type", "s"];
                let found = mesh.cluster.in_node(node, "find").args(args).output().unwrap();
                String::from_utf8_lossy(&found.stdout).into_owned()
            });
            let files = files.collect::<String>();
            if !files.is_empty() {
                eprintln!("node {node}: {files}");
            }
            files.is_empty()
        });
    }
}
