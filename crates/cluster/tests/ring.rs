//! The cluster ring runs pods on both nodes, and nothing of it is left.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use nsm_cluster::cluster;

/// Set for the process that is killed.
const OWNER: &str = "NSM_CLUSTER_TEST_OWNER";

const PODS: &str = "
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: everywhere}
spec:
  selector: {matchLabels: {app: everywhere}}
  template:
    metadata: {labels: {app: everywhere}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: testbed.local/busybox:1
        imagePullPolicy: Never
        command: [sh, -c, 'hostname; exec sleep 1000000']
";

/// All that there is of a cluster on this machine: its directory, its bridge, cgroups, mounts, and the processes of its
/// nodes' process namespaces.
struct Traces {
    directory: String,
    slot: String,
    namespaces: Vec<PathBuf>,
}

impl Traces {
    fn of(directory: &Path) -> Self {
        let nodes = [1, 2].map(|node| fs::read_to_string(directory.join(format!("node{node}/pid"))).unwrap());
        let namespace = |pid: &String| fs::read_link(format!("/proc/{}/ns/pid", pid.trim())).unwrap();
        let directory = directory.display().to_string();
        let slot = directory.replace("/var/tmp/nsm-kube-", "nsmk");
        Self { directory, slot, namespaces: nodes.iter().map(namespace).collect() }
    }

    fn now(&self) -> Vec<String> {
        let mut found: Vec<_> =
            [&self.directory].into_iter().filter(|path| Path::new(path).exists()).cloned().collect();
        for directory in
            fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path())
        {
            let is_ours =
                directory.file_name().is_some_and(|name| name.to_string_lossy() == self.slot.as_str());
            let below = directory.join(&self.slot);
            found.extend(is_ours.then(|| directory.display().to_string()));
            found.extend(below.exists().then(|| below.display().to_string()));
        }
        let links = fs::read_dir("/sys/class/net").unwrap().flatten().map(|entry| entry.file_name());
        let links = links.map(|name| name.to_string_lossy().into_owned());
        found.extend(links.filter(|name| *name == self.slot || name.starts_with(&format!("{}-", self.slot))));
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        found.extend(mounts.lines().filter(|line| line.contains(&self.directory)).map(str::to_owned));
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let namespace = fs::read_link(process.path().join("ns/pid"));
            if command.contains(&self.directory) || namespace.is_ok_and(|ns| self.namespaces.contains(&ns)) {
                found.push(command);
            }
        }
        found
    }
}

#[test]
fn a_daemon_set_runs_on_both_nodes_and_nothing_is_left() {
    let name = "a_daemon_set_runs_on_both_nodes_and_nothing_is_left";
    if std::env::var_os(OWNER).is_some() {
        let cluster = cluster(name).unwrap();
        cluster.apply(PODS);
        let _rolled_out = cluster.kubectl(&["rollout", "status", "ds/everywhere", "--timeout=120s"]);
        println!("owner of {}", cluster.directory().display());
        sleep(Duration::from_secs(600));
    }
    let Some(one) = cluster(name) else { return };
    one.apply(PODS);
    let _rolled_out = one.kubectl(&["rollout", "status", "ds/everywhere", "--timeout=120s"]);
    let nodes = "--output=jsonpath={.items[*].spec.nodeName}";
    let nodes = one.kubectl(&["get", "pods", "--selector=app=everywhere", "--sort-by=.spec.nodeName", nodes]);
    assert_eq!(nodes, "node1 node2");
    let names = "--output=jsonpath={.items[*].metadata.name}";
    let pods = one.kubectl(&["get", "pods", "--selector=app=everywhere", names]);
    for pod in pods.split_whitespace() {
        assert_eq!(one.kubectl(&["logs", pod]).trim(), pod);
    }
    // A pod reaches one on the other node.
    let addresses = "--output=jsonpath={.items[*].status.podIP}";
    let addresses = one.kubectl(&["get", "pods", "--selector=app=everywhere", addresses]);
    let (pod, address) =
        (pods.split_whitespace().next().unwrap(), addresses.split_whitespace().last().unwrap());
    let _answers = one.kubectl(&["exec", pod, "--", "ping", "-c", "1", "-W", "5", address]);
    // A node is a machine of its own.
    let said = one.in_node(2, "hostname").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), "node2");

    // Its power is cut, and it comes back with its pod.
    one.cut(1);
    one.boot(1);
    let up = [
        "get",
        "pods",
        "--field-selector=spec.nodeName=node1",
        "--output=jsonpath={.items[*].status.containerStatuses[*].restartCount} {.items[*].status.containerStatuses[*].ready}",
    ];
    let end = Instant::now() + Duration::from_secs(120);
    while one.kubectl(&up) != "1 true" {
        assert!(Instant::now() < end, "the pod of node1 is back: {}", one.kubectl(&up));
        sleep(Duration::from_millis(200));
    }

    // Another one beside it, whose owner is killed.
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(OWNER, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines().map_while(Result::ok);
    let told =
        lines.filter_map(|line| line.split_once("owner of ").map(|(_, path)| PathBuf::from(path))).next();
    let theirs = told.unwrap();
    assert_ne!(theirs, one.directory());
    let theirs = Traces::of(&theirs);
    assert!(theirs.now().len() > 10, "{:?}", theirs.now());
    owner.kill().unwrap();
    owner.wait().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while !theirs.now().is_empty() {
        assert!(Instant::now() < end, "{:?}", theirs.now());
        sleep(Duration::from_millis(100));
    }
    let ours = Traces::of(one.directory());
    assert!(ours.now().len() > 10, "{:?}", ours.now());
    drop(one);
    assert_eq!(ours.now(), [""; 0]);
}
