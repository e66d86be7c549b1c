//! The mesh on a real cluster of two nodes, as somebody installs it: one manifest, one annotation.
#![allow(clippy::unwrap_used, clippy::print_stderr, clippy::print_stdout, reason = "a test")]

#[path = "cluster/examples.rs"]
mod examples;
#[path = "common/plugin.rs"]
mod plugin;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use nsm_cluster::{Cluster, cluster};
use nsm_image::{Contents, libraries};
use plugin::Plugin;

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

/// What asks for a wire: one line.
const ANNOTATION: &str = "annotations: {networkservicemesh.io: kernel://finance/nsm-1}";

/// What a mesh is made of.
const PARTS: [&str; 4] =
    ["deployment/nsm-identity", "deployment/nsm-registry", "deployment/nsm-webhook", "daemonset/nsm-node"];

/// A workload, with something in its metadata.
fn client(name: &str, node: &str, metadata: &str) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  {metadata}
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
        remember_what_fails();
        let cluster = cluster(test)?;
        let directory = tempfile::tempdir().unwrap();
        cluster.load(&image(directory.path(), "dev"));
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

    /// Installs it, and tells how long it took until all of it was ready.
    fn install(&self) -> Duration {
        let began = Instant::now();
        self.nsm_to_kubectl(&["install", "--pull-policy", "Never"], &["apply", "--filename=-"]);
        for part in PARTS {
            self.rolled_out(part, "nsm-system");
        }
        began.elapsed()
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

    /// The address at the other end of a client's wire.
    fn far_end(&self, client: &str) -> Option<String> {
        let routes = self.exec(client, "app", &["ip", "-oneline", "route", "show", "dev", "nsm-1"])?;
        Some(routes.split_whitespace().next()?.split('/').next()?.to_owned())
    }

    fn reaches(&self, client: &str) -> bool {
        let Some(endpoint) = self.far_end(client) else { return false };
        self.exec(client, "app", &["ping", "-c", "1", "-W", "5", "-I", "nsm-1", &endpoint]).is_some()
    }

    /// Ends pings, prints what came of them meanwhile, and waits until each client reaches its endpoint.
    fn got_over<'c>(&self, what: &str, pings: impl Iterator<Item = (&'c str, std::process::Child)>) {
        for (client, pings) in pings {
            let stopped = self.exec(client, "app", &["killall", "-INT", "ping"]);
            let said = pings.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&said.stdout).into_owned();
            let summary = said.lines().find(|line| line.contains("packets transmitted"));
            // Where the machine is so slow that a wire was made anew, its interface went from under them.
            let summary = summary.filter(|_| stopped.is_some()).unwrap_or("the wire was made anew");
            println!("{client}, while {what}: {summary}");
            until(&format!("{client} reaches its endpoint"), || self.reaches(client));
        }
    }

    /// Pings its endpoint ten times a second, until it is told to end.
    fn pings(&self, client: &str) -> std::process::Child {
        let endpoint = self.far_end(client).unwrap();
        let mut exec = self.cluster.kubectl_command();
        exec.args(["exec", &format!("deployment/{client}"), "--container", "app", "--"]);
        exec.args(["ping", "-i", "0.1", "-I", "nsm-1", &endpoint]);
        exec.stdout(Stdio::piped()).spawn().unwrap()
    }

    fn in_node(&self, node: u32, program: &[&str]) -> String {
        let said = self.cluster.in_node(node, program[0]).args(&program[1..]).output().unwrap();
        assert!(said.status.success(), "{program:?}: {}", String::from_utf8_lossy(&said.stderr));
        String::from_utf8_lossy(&said.stdout).into_owned()
    }

    /// What is of ours in the kernels of both nodes: links in every network namespace there that bear our mark or
    /// upstream's, and what is to be had of wires in files.
    fn wires(&self) -> Vec<String> {
        self.wires_on(1..=self.cluster.nodes())
    }

    fn wires_on(&self, nodes: impl IntoIterator<Item = u32>) -> Vec<String> {
        let mut found = Vec::new();
        for node in nodes {
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
                found.extend(ours.map(|line| {
                    let kind = if line.contains("vxlan") { "vxlan" } else { "veth" };
                    format!("node {node}: {kind} {}", line.split_whitespace().nth(1).unwrap_or_default())
                }));
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

    fn no_wires(&self) {
        self.as_many_wires(&[]);
    }

    /// Waits until there is as much of wires as there was; names change where one was made anew.
    fn as_many_wires(&self, before: &[String]) {
        let end = Instant::now() + Duration::from_secs(300);
        let mut now = self.wires();
        while now.len() != before.len() {
            assert!(Instant::now() < end, "of {before:#?} there is: {now:#?}");
            sleep(Duration::from_millis(200));
            now = self.wires();
        }
    }

    /// Kills all that runs in pods, as nobody can prevent, and forgets the pods.
    fn kill_pods(&self, label: &str) {
        let args = ["get", "pods", "--selector", label, "--output=jsonpath={.items[*].metadata.uid}"];
        let uids = self.cluster.kubectl(&args);
        for node in 1..=self.cluster.nodes() {
            let groups = uids.split_whitespace().map(|uid| format!("--regexp=pod{uid}")).collect::<Vec<_>>();
            // Groups have no processes where a pod is on the other node.
            let mut find = self.cluster.in_node(node, "sh");
            let script = "grep --files-with-matches --no-messages \"$@\" /proc/[0-9]*/cgroup | cut -d/ -f3 | xargs -r kill -9 2>&1";
            let _some_had_gone = find.args(["-c", script, "sh"]).args(groups).output().unwrap();
        }
        let args = ["delete", "pods", "--selector", label, "--force", "--grace-period=0", "--wait=false"];
        let _said = self.cluster.kubectl(&args);
    }

    fn names(&self, kinds: &str) -> BTreeSet<String> {
        let names = self.cluster.kubectl(&["get", kinds, "--all-namespaces", "--output=name"]);
        names.lines().map(str::to_owned).collect()
    }
}

impl Drop for Mesh {
    /// What was wrong is in the cluster, which goes. Little is said, and what matters most last: of long outputs people are
    /// shown the end.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let tell = |args: &[&str], most: usize, tells: &dyn Fn(&str) -> bool| {
            let said = self.cluster.kubectl_command().args(args).output();
            let said = said.map(|said| [said.stdout, said.stderr].concat()).unwrap_or_default();
            let said = String::from_utf8_lossy(&said).into_owned();
            let lines: Vec<_> = said.lines().filter(|line| tells(line)).collect();
            eprintln!("---- kubectl {}", args.join(" "));
            lines.iter().skip(lines.len().saturating_sub(most)).for_each(|line| eprintln!("{line}"));
        };
        let all = |_: &str| true;
        let wrong = |line: &str| [" WARN ", " ERROR ", "panicked"].iter().any(|word| line.contains(word));
        tell(&["get", "events", "--all-namespaces", "--field-selector=type=Warning"], 8, &all);
        for part in ["identity", "registry", "webhook", "node"] {
            let part = format!("app.kubernetes.io/component={part}");
            let logs =
                ["logs", "--namespace=nsm-system", "--selector", &part, "--all-containers", "--prefix"];
            tell(&logs, 6, &wrong);
        }
        for app in ["gateway", "near", "far"] {
            let app = format!("app={app}");
            tell(&["logs", "--selector", &app, "--all-containers", "--prefix", "--tail=5"], 5, &all);
        }
        tell(&["get", "pods", "--all-namespaces"], 16, &all);
        eprintln!("---- what failed: {}", FAILED.take());
    }
}

thread_local! {
    /// What this thread has panicked with.
    static FAILED: std::cell::RefCell<String> = const { std::cell::RefCell::new(String::new()) };
}

/// Has it remembered what a test panics with.
fn remember_what_fails() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            FAILED.set(panic.to_string());
            tell(panic);
        }));
    });
}

/// An archive of images of this program. It is no static one, so what it is linked with is in the images, too.
fn image(directory: &Path, tag: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_nsm"));
    let stripped = directory.join("nsm");
    let done = Command::new("strip").arg("-o").arg(&stripped).arg(program).status().unwrap();
    assert!(done.success(), "strip: {done}");
    let contents = Contents {
        program: fs::read(&stripped).unwrap(),
        libraries: libraries(program).unwrap(),
        sbom: "{}".into(),
    };
    nsm_image::write(directory, &contents, tag).unwrap();
    directory.join("nsm.tar")
}

/// When pods were created and ready, as somebody sees it who watches.
struct Watch {
    kubectl: std::process::Child,
    seen: std::sync::mpsc::Receiver<(String, bool, Instant)>,
    pods: BTreeMap<String, (Instant, Option<Instant>)>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.kubectl.kill();
        let _ = self.kubectl.wait();
    }
}

impl Watch {
    fn new(mesh: &Mesh) -> Self {
        let mut kubectl = mesh.cluster.kubectl_command();
        let columns =
            r#"--output=custom-columns=:metadata.name,:status.conditions[?(@.type=="Ready")].status"#;
        kubectl.args(["get", "pods", "--watch", "--no-headers", columns]);
        let mut kubectl = kubectl.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let lines = BufReader::new(kubectl.stdout.take().unwrap()).lines().map_while(Result::ok);
        let (sender, seen) = std::sync::mpsc::channel();
        let _ends_with_kubectl = std::thread::spawn(move || {
            for line in lines {
                let mut words = line.split_whitespace();
                if let Some(name) = words.next() {
                    let _ = sender.send((name.to_owned(), words.next() == Some("True"), Instant::now()));
                }
            }
        });
        Self { kubectl, seen, pods: BTreeMap::new() }
    }

    /// How long after the first of these pods was created the last one was ready.
    fn ready(&mut self, names: &[String]) -> Duration {
        let end = Instant::now() + Duration::from_secs(300);
        while !names.iter().all(|name| self.pods.get(name).is_some_and(|(_, ready)| ready.is_some())) {
            let left = end.saturating_duration_since(Instant::now());
            let (name, ready, at) = self.seen.recv_timeout(left).expect("the pods get ready");
            let pod = self.pods.entry(name).or_insert((at, None));
            pod.1 = pod.1.or(ready.then_some(at));
        }
        let pods: Vec<_> = names.iter().map(|name| self.pods[name]).collect();
        let first = pods.iter().map(|(created, _)| *created).min().unwrap();
        pods.iter().filter_map(|(_, ready)| *ready).max().unwrap() - first
    }
}

/// Pods that differ in what is before their program: nothing, a program that does nothing, a client and its wire.
fn pod(kind: &str, name: &str) -> String {
    let (metadata, init) = match kind {
        "annotated" => (", annotations: {networkservicemesh.io: 'kernel://finance/nsm-1'}", ""),
        "init" => (
            "",
            "initContainers: [{name: init, image: 'testbed.local/busybox:1', imagePullPolicy: Never, command: ['true']}], ",
        ),
        _ => ("", ""),
    };
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{kind: {kind}}}{metadata}}}, spec: {{{init}\
         terminationGracePeriodSeconds: 1, containers: [{{name: app, image: 'testbed.local/busybox:1', imagePullPolicy: \
         Never, command: [sleep, '1000000']}}]}}}}\n---\n"
    )
}

/// What somebody sees who looks at a pod: why it has no wire, that it has one, and that it was all taken back.
#[test]
fn whoever_looks_at_a_pod_sees_what_becomes_of_its_wire() {
    let name = "whoever_looks_at_a_pod_sees_what_becomes_of_its_wire";
    let Some(mesh) = Mesh::start(name) else { return };
    mesh.install();
    let get = |args: &[&str]| mesh.cluster.kubectl(&[&["get"], args].concat());
    let described = || mesh.cluster.kubectl(&["describe", "pods", "--selector=app=near"]);
    let gated = "annotations: {networkservicemesh.io: kernel://finance/nsm-1, networkservicemesh.io/readiness-gate: 'true'}";
    mesh.applied(&client("near", "node1", gated));
    // The client was before the endpoint.
    until("the pod says why it has no wire", || described().contains("there is no wire to finance yet"));
    let wire =
        get(&["wires", "--output=jsonpath={.items[*].status.state} {.items[*].status.lastError.message}"]);
    assert!(wire.starts_with("NotUp ") && wire.contains("finance"), "{wire}");
    mesh.applied(ENDPOINT);
    mesh.rolled_out("deployment/near", "default");
    until("the pod says that it has it", || {
        described().contains("nsm-1 to finance is up: endpoint gateway-")
    });
    let describes = described();
    let line =
        |of: &str| describes.lines().find(|line| line.contains(of)).unwrap_or_default().trim().to_owned();
    println!("{}\n{}\n{}", line("WireNotUp"), line("WireUp"), line("networkservicemesh.io/wires "));
    println!("{}", get(&["wires", "--output=wide"]));
    let condition =
        r#"--output=jsonpath={.items[*].status.conditions[?(@.type=="networkservicemesh.io/wires")].status}"#;
    assert_eq!(get(&["pods", "--selector=app=near", condition]), "True");
    let columns = "--output=jsonpath={.items[*].status.state} {.items[*].status.interface} {.items[*].spec.node} {.items[*].status.endpoint}";
    let wire = get(&["wires", columns]);
    assert!(wire.starts_with("Up nsm-1 node1 gateway-"), "{wire}");

    // Whoever makes wires is another one now, and says nothing that was said.
    let ups = || get(&["events", "--field-selector=reason=WireUp", "--output=name"]).lines().count();
    let before = ups();
    let _said = mesh.cluster.kubectl(&["rollout", "restart", "daemonset/nsm-node", "--namespace=nsm-system"]);
    mesh.rolled_out("daemonset/nsm-node", "nsm-system");
    until("the wire stands", || mesh.reaches("near"));

    // Its endpoint goes for good.
    let _said = mesh.cluster.kubectl(&["delete", "deployment", "gateway"]);
    until("the pod says that its wire is down", || described().contains("the wire to finance is down"));
    until("and is not ready", || get(&["pods", "--selector=app=near", condition]) == "False");
    // Unless the machine is so slow that the endpoint was away for long, which is said then.
    let downs = described().matches("WireDown").count();
    assert!(ups() == before || downs > 1, "{}", described());
    let _said = mesh.cluster.kubectl(&["delete", "deployment", "near"]);
    until("nothing is said of a wire that nobody has", || get(&["wires", "--output=name"]).is_empty());
    mesh.no_wires();
}

/// Another service, another size, and a service that is not there: what the wire becomes at once, and what it stays.
#[test]
fn a_wire_that_is_edited_is_another_one_at_once() {
    let Some(mesh) = Mesh::start("a_wire_that_is_edited_is_another_one_at_once") else { return };
    mesh.install();
    let auditor =
        ENDPOINT.replace("gateway", "auditor").replace("finance", "audit").replace("172.16.1", "172.16.2");
    mesh.applied(&format!("{ENDPOINT}---{auditor}"));
    mesh.applied(&client("near", "node1", ANNOTATION));
    for deployment in ["gateway", "auditor", "near"] {
        mesh.rolled_out(&format!("deployment/{deployment}"), "default");
    }
    let kubectl = |args: &[&str]| mesh.cluster.kubectl(args);
    let wire = kubectl(&["get", "wires", "--output=name"]).trim().to_owned();
    let edit = |spec: &str| {
        let _said = kubectl(&["patch", &wire, "--type=merge", "--patch", &format!(r#"{{"spec":{spec}}}"#)]);
    };
    let applied = |columns: &str| {
        let of = format!(
            "--output=jsonpath={{.metadata.generation}}{{.status.conditions[?(@.type==\"Applied\")].{columns}}}"
        );
        kubectl(&["get", &wire, &of])
    };
    let is = |generation: u32, status: &str| {
        until(&format!("edit {generation} is {status}"), || {
            applied("observedGeneration") == format!("{generation}{generation}")
                && applied("status") == format!("{generation}{status}")
        });
    };
    let leads = |to: &str| {
        mesh.far_end("near").is_some_and(|address| address.starts_with(to)) && mesh.reaches("near")
    };
    assert!(leads("172.16.1."));

    let pings = mesh.pings("near");
    edit(r#"{"mtu":1300}"#);
    is(2, "True");
    let link = mesh.exec("near", "app", &["ip", "-oneline", "link", "show", "dev", "nsm-1"]).unwrap();
    assert!(link.contains(" mtu 1300 "), "{link}");
    assert_eq!(kubectl(&["get", &wire, "--output=jsonpath={.status.mtu}"]), "1300");
    edit(r#"{"mtu":null}"#);
    is(3, "True");
    let stopped = mesh.exec("near", "app", &["killall", "-INT", "ping"]);
    assert!(stopped.is_some(), "it has pinged all the time");
    let said = pings.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    println!("while the MTU was changed: {}", said.lines().rev().nth(1).unwrap_or_default());
    let link = mesh.exec("near", "app", &["ip", "-oneline", "link", "show", "dev", "nsm-1"]).unwrap();
    assert!(!link.contains(" mtu 1300 "), "{link}");

    let began = Instant::now();
    edit(r#"{"service":"audit"}"#);
    until("the wire leads to the other service", || leads("172.16.2."));
    println!("another service, edited to pinged: {:.1?}", began.elapsed());
    is(4, "True");
    let endpoint = kubectl(&["get", &wire, "--output=jsonpath={.status.endpoint}"]);
    assert!(endpoint.starts_with("auditor-"), "{endpoint}");

    edit(r#"{"service":"nothing"}"#);
    is(5, "False");
    let why = applied("message");
    assert!(why.contains("nothing"), "{why}");
    println!("not applied: {}", why.trim_start_matches(char::is_numeric));
    assert!(leads("172.16.2."), "it stays as it was");
    edit(r#"{"service":"audit"}"#);
    is(6, "True");

    // Who makes wires is another one now, and makes them as they were edited.
    let _said = kubectl(&["rollout", "restart", "daemonset/nsm-node", "--namespace=nsm-system"]);
    mesh.rolled_out("daemonset/nsm-node", "nsm-system");
    until("the wire stands", || leads("172.16.2."));
    edit(r#"{"service":"finance"}"#);
    until("the wire leads to the first service", || leads("172.16.1."));
    let _said = kubectl(&["delete", "deployment", "near", "gateway", "auditor"]);
    mesh.no_wires();
}

/// Nobody says good-bye: what was registered there, what is said of its pods and what leads there goes all the same.
#[test]
fn a_node_that_is_deleted_without_drain_leaves_nothing_and_comes_back_by_its_name() {
    let name = "a_node_that_is_deleted_without_drain_leaves_nothing_and_comes_back_by_its_name";
    let Some(mesh) = Mesh::start(name) else { return };
    let kubectl = |args: &[&str]| mesh.cluster.kubectl(args);
    mesh.install();
    mesh.applied(&ENDPOINT.replace("node1", "node2"));
    mesh.rolled_out("deployment/gateway", "default");
    for (client_name, node) in [("near", "node1"), ("far", "node2")] {
        mesh.applied(&client(client_name, node, ANNOTATION));
        mesh.rolled_out(&format!("deployment/{client_name}"), "default");
    }
    assert!(mesh.reaches("near") && mesh.reaches("far"));
    mesh.applied(&ENDPOINT.replace("gateway", "spare"));
    mesh.rolled_out("deployment/spare", "default");
    // Pods that nobody makes again on a node that is not there.
    let _said = kubectl(&["delete", "deployment", "gateway", "far", "--cascade=orphan"]);
    let _said = kubectl(&["delete", "replicaset", "--selector=app in (gateway, far)", "--cascade=orphan"]);
    let registered = || kubectl(&["get", "nses", "--all-namespaces", "--output=name"]);
    assert!(registered().contains("gateway-") && registered().contains("spare-"), "{}", registered());
    let told = || kubectl(&["get", "wires", "--output=jsonpath={.items[*].spec.node}"]);
    assert_eq!(told().split_whitespace().count(), 2, "{}", told());

    let gone = Instant::now();
    mesh.cluster.cut(2);
    let _said = kubectl(&["delete", "node", "node2", "--wait=false"]);
    until("the wire leads to the endpoint that is left", || {
        kubectl(&["get", "wires", "--output=jsonpath={.items[*].status.endpoint}"]).contains("spare-")
            && mesh.reaches("near")
    });
    println!("a node is gone, its client elsewhere has another endpoint: {:.1?}", gone.elapsed());
    until("its endpoints are not registered", || !registered().contains("gateway-"));
    println!("what it had registered is gone: {:.1?}", gone.elapsed());
    until("nothing is said of its pods", || told() == "node1");
    println!("what was said of its pods is gone: {:.1?}", gone.elapsed());
    until("no tunnel leads there", || !mesh.wires_on([1]).iter().any(|wire| wire.contains("vxlan")));

    let back = Instant::now();
    mesh.cluster.boot(2);
    println!("it is booted: {:.1?}", back.elapsed());
    until("it is a node again", || {
        let ready = r#"--output=jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
        let node = mesh.cluster.kubectl_command().args(["get", "node", "node2", ready]).output().unwrap();
        node.stdout == b"True"
    });
    println!("it is a node again: {:.1?}", back.elapsed());
    until("it has a part of the mesh", || {
        kubectl(&[
            "get",
            "daemonset",
            "nsm-node",
            "--namespace=nsm-system",
            "--output=jsonpath={.status.numberReady}",
        ]) == "2"
    });
    println!("it has its part of the mesh: {:.1?}", back.elapsed());
    mesh.applied(&client("far", "node2", ANNOTATION));
    mesh.rolled_out("deployment/far", "default");
    until("a pod there has its wire", || mesh.reaches("far"));
    println!("a pod there has its wire: {:.1?}", back.elapsed());
    assert!(mesh.reaches("near"));
    let _said = kubectl(&["delete", "deployment", "near", "far", "spare"]);
    mesh.no_wires();
}

/// All parts at once, with images of another tag, under pings.
#[test]
fn a_mesh_is_upgraded_under_its_wires() {
    let Some(mesh) = Mesh::start("a_mesh_is_upgraded_under_its_wires") else { return };
    mesh.install();
    mesh.applied(ENDPOINT);
    mesh.rolled_out("deployment/gateway", "default");
    for (name, node) in [("near", "node1"), ("far", "node2")] {
        mesh.applied(&client(name, node, ANNOTATION));
        mesh.rolled_out(&format!("deployment/{name}"), "default");
    }
    let wires = mesh.wires();
    let directory = tempfile::tempdir().unwrap();
    mesh.cluster.load(&image(directory.path(), "next"));
    let pings = ["near", "far"].map(|client| mesh.pings(client));
    let plugin = Plugin::new((*mesh.cluster).clone());
    let upgrade = plugin.run(&["upgrade", "--tag", "next"]);
    assert!(upgrade.status.success(), "{}", String::from_utf8_lossy(&upgrade.stderr));
    mesh.cluster.apply(&String::from_utf8(upgrade.stdout).unwrap());
    for part in PARTS {
        mesh.rolled_out(part, "nsm-system");
    }
    // Those that were are going still.
    let running = "--output=jsonpath={.items[*].spec.containers[*].image}";
    until("every part runs the new image", || {
        let images = mesh.cluster.kubectl(&["get", "pods", "--namespace=nsm-system", running]);
        !images.contains(":dev") && images.contains("nsm:next")
    });
    mesh.got_over("the mesh was upgraded", ["near", "far"].into_iter().zip(pings));
    mesh.as_many_wires(&wires);
    let _said = mesh.cluster.kubectl(&["delete", "deployment", "near", "far", "gateway"]);
    mesh.no_wires();
}

/// From a machine that has kubectl and nothing else of the cluster.
#[test]
fn whoever_has_kubectl_looks_at_the_mesh_from_outside() {
    let Some(mesh) = Mesh::start("whoever_has_kubectl_looks_at_the_mesh_from_outside") else { return };
    mesh.install();
    mesh.applied(ENDPOINT);
    mesh.rolled_out("deployment/gateway", "default");
    mesh.applied(&client("far", "node2", ANNOTATION));
    mesh.rolled_out("deployment/far", "default");
    let plugin = Plugin::new((*mesh.cluster).clone());
    let says = |args: &[&str]| {
        let output = plugin.run(args);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{args:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    };
    let processes = says(&["get", "processes"]);
    println!("{processes}");
    for process in ["nsm-node-node1", "nsm-node-node2", "nsm-registry-"] {
        assert!(processes.contains(process), "{process} is not there: {processes}");
    }
    assert_eq!(processes.matches("registry ").count(), 2, "{processes}");
    assert!(says(&["get", "services"]).contains("finance"));
    let pod = mesh.cluster.kubectl(&["get", "pods", "--selector=app=far", "--output=name"]);
    let pod = pod.trim();
    let connections = says(&["get", "connections", "-o", "wide"]);
    assert!(connections.contains(pod.trim_start_matches("pod/")), "{connections}");
    // Of both nodes: the tunnel has an end on each.
    let explained = says(&["explain", pod]);
    println!("{explained}");
    for (hop, tells) in [
        ("nsm-node-node2", "asked by spiffe://k8s.nsm/ns/default/pod/far-"),
        ("forwarder-nsm-node-node2", "wire vxlan"),
        ("nsm-node-node1", "asked by spiffe://k8s.nsm/ns/nsm-system/node/node2"),
        ("forwarder-nsm-node-node1", "wire vxlan"),
    ] {
        let told = explained.lines().skip_while(|line| !line.contains(&format!(" {hop} "))).nth(1);
        assert!(told.is_some_and(|line| line.contains(tells)), "{hop}: {explained}");
    }
    assert!(explained.contains("not asked: only the mesh's own pods are"), "{explained}");
    let checked = says(&["check"]);
    println!("{checked}");
    for fit in ["node1 is fit", "node2 is fit", "wires are as planned", "connections"] {
        assert!(checked.contains(fit), "{fit}: {checked}");
    }
    let logs = says(&["log", "debug", "--process", "nsm-node-node1"]);
    assert_eq!(logs.trim(), "nsm-node-node1: debug");
    let levels = says(&["get", "processes", "-o", "json"]);
    let levels: serde_json::Value = serde_json::from_str(&levels).unwrap();
    let level = |name: &str| {
        let found = levels.as_array().unwrap().iter().find(|process| process["name"] == name);
        found.unwrap_or_else(|| panic!("{name}: {levels}"))["logLevel"].as_str().unwrap().to_owned()
    };
    assert_eq!((level("nsm-node-node1").as_str(), level("nsm-node-node2").as_str()), ("debug", "info"));

    let _said = mesh.cluster.kubectl(&["delete", "deployment", "far", "gateway"]);
    mesh.no_wires();
}

/// Figures are printed, and nothing depends on them; that all wires come up and nothing is left does.
#[test]
fn ten_pods_at_once_get_their_wires_and_killed_ones_leave_nothing() {
    let name = "ten_pods_at_once_get_their_wires_and_killed_ones_leave_nothing";
    let Some(mesh) = Mesh::start(name) else { return };
    mesh.install();
    mesh.applied(ENDPOINT);
    mesh.rolled_out("deployment/gateway", "default");
    let mut watch = Watch::new(&mesh);

    let kinds = ["plain", "init", "annotated"];
    let mut took: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    let mut requests = Vec::new();
    for round in 0..5 {
        for kind in kinds {
            let name = format!("{kind}-{round}");
            mesh.applied(&pod(kind, &name));
            took.entry(kind).or_default().push(watch.ready(std::slice::from_ref(&name)));
            if kind == "annotated" {
                let log = mesh.cluster.kubectl(&["logs", &name, "--container=cmd-nsc-init"]);
                let request = log.split("took=").nth(1).and_then(|rest| rest.split_whitespace().next());
                requests.extend(request.map(str::to_owned));
            }
            let _said = mesh.cluster.kubectl(&["delete", "pod", &name, "--wait=false"]);
        }
    }
    for kind in kinds {
        let all = took.get_mut(kind).unwrap();
        all.sort();
        println!("{kind} pod, created to ready: p50 {:.2?} of {all:.2?}", all[all.len() / 2]);
    }
    println!("the requests themselves, the first without an identity: {requests:?}");

    let ten: Vec<_> = (0..10).map(|i| format!("ten-{i}")).collect();
    mesh.applied(&ten.iter().map(|name| pod("annotated", name)).collect::<String>());
    println!("ten annotated pods at once, all ready: {:.1?}", watch.ready(&ten));
    let wires = mesh.wires();
    assert_eq!(wires.iter().filter(|wire| wire.contains(" nsm-1@")).count(), 10, "{wires:#?}");

    let killed = Instant::now();
    mesh.kill_pods("kind=annotated");
    mesh.no_wires();
    println!("ten pods killed, nothing left: {:.1?}", killed.elapsed());
    until("the pods are gone", || !mesh.names("pods").iter().any(|name| name.contains("ten-")));
}

#[test]
fn one_manifest_and_one_annotation_make_a_wire_and_nothing_is_left() {
    let name = "one_manifest_and_one_annotation_make_a_wire_and_nothing_is_left";
    let Some(mesh) = Mesh::start(name) else { return };
    let kinds = "namespaces,priorityclasses,clusterroles,clusterrolebindings,mutatingwebhookconfigurations,validatingadmissionpolicies,validatingadmissionpolicybindings,crds";
    let before = mesh.names(kinds);
    println!("one manifest, applied to all ready: {:.1?}", mesh.install());

    // Only pods are told who they are, not what else runs on a node.
    let program = env!("CARGO_BIN_EXE_nsm");
    let mut stranger = mesh.cluster.in_node(1, program);
    stranger.args(["probe", "--addr", "unix:///var/lib/networkservicemesh/nsm.io.sock"]);
    let stranger =
        stranger.env("SPIFFE_ENDPOINT_SOCKET", "unix:///run/spire/sockets/agent.sock").output().unwrap();
    assert!(!stranger.status.success(), "{stranger:?}");
    let agents = [
        "logs",
        "--namespace=nsm-system",
        "--selector=app.kubernetes.io/component=node",
        "--container=identity",
    ];
    until("the agent says why", || mesh.cluster.kubectl(&agents).contains("belongs to no pod"));

    mesh.applied(ENDPOINT);
    mesh.applied(&client("near", "node1", ANNOTATION));
    // One that is there already, and is annotated as the README says.
    mesh.applied(&client("far", "node2", "labels: {}"));
    mesh.rolled_out("deployment/far", "default");
    assert!(mesh.exec("far", "app", &["ip", "link", "show", "dev", "nsm-1"]).is_none());
    let patch = r#"{"spec":{"template":{"metadata":{"annotations":{"networkservicemesh.io":"kernel://finance/nsm-1"}}}}}"#;
    let _said = mesh.cluster.kubectl(&["patch", "deployment", "far", "--patch", patch]);
    for deployment in ["gateway", "near", "far"] {
        mesh.rolled_out(&format!("deployment/{deployment}"), "default");
    }
    until("the pod without the annotation is gone", || {
        mesh.names("pods").iter().filter(|name| name.starts_with("pod/far-")).count() == 1
    });
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
        until(&format!("{client} reaches the endpoint"), || mesh.reaches(client));
        until(&format!("the endpoint reaches {client}"), || {
            mesh.exec("gateway", "look", &["ping", "-c", "1", "-W", "5", address]).is_some()
        });
    }
    let wires = mesh.wires();
    println!("two wires: {wires:#?}");
    assert!(wires.iter().any(|wire| wire.contains("vxlan")), "one wire is between nodes: {wires:#?}");

    // All of it is replaced, one part after the other, and nobody whose wire stands sees anything of it.
    let pings = ["near", "far"].map(|client| mesh.pings(client));
    for part in PARTS {
        let _said = mesh.cluster.kubectl(&["rollout", "restart", part, "--namespace=nsm-system"]);
        mesh.rolled_out(part, "nsm-system");
    }
    mesh.got_over("every part was restarted", ["near", "far"].into_iter().zip(pings));
    mesh.as_many_wires(&wires);

    let _said = mesh.cluster.kubectl(&["delete", "deployment", "near", "far"]);
    mesh.no_wires();
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
