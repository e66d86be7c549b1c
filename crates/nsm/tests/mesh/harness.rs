//! A mesh for one test: built by the lab's own machinery, gone when the test is.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use nsm_kernel::netns::Namespace;
use nsm_lab::{
    Lab, Plan, Scenario,
    network::{Seen, SeenLink},
    plan::Paths,
    probe::{Echo, Flood, Row},
    process::{Condition, Program, Supervisor},
    scenario::Daemons,
};
use rustix::process::{Pid, Signal, kill_process};

/// The real program.
pub(crate) const NSM: &str = env!("CARGO_BIN_EXE_nsm");
/// How long anything may take that has to happen; nobody waits that long unless it does not happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The nodes that a mesh may have.
pub(crate) const NODES: [&str; 2] = ["node1", "node2"];

const JOB: &str = "NSM_TEST_INSIDE";
const LAB: &str = "NSM_TEST_LAB";

/// Five services: `plain` takes any endpoint, `picky` only those labelled `app: vpn`, nobody serves `nobody`, and a
/// function labelled `app: middle` stands before the gateway labelled `app: gw` of `frames` and of `packets`.
const SERVICES: &str = "\
networkServices:
- apiVersion: networkservicemesh.io/v1
  kind: NetworkService
  metadata: {name: plain}
- apiVersion: networkservicemesh.io/v1
  kind: NetworkService
  metadata: {name: picky}
  spec:
    matches:
    - routes:
      - destination_selector: {app: vpn}
- apiVersion: networkservicemesh.io/v1
  kind: NetworkService
  metadata: {name: frames}
  spec:
    payload: ETHERNET
    matches:
    - source_selector: {app: middle}
      routes:
      - destination_selector: {app: gw}
    - routes:
      - destination_selector: {app: middle}
- apiVersion: networkservicemesh.io/v1
  kind: NetworkService
  metadata: {name: packets}
  spec:
    payload: IP
    matches:
    - source_selector: {app: middle}
      routes:
      - destination_selector: {app: gw}
    - routes:
      - destination_selector: {app: middle}
";

/// A mesh that runs: registry, manager and forwarder on `node1`, those two on `node2` where a pod is there, and the
/// pods of the test.
#[derive(Debug)]
pub(crate) struct Mesh {
    pub(crate) lab: Lab,
    /// Programs that the test started beside the plan's.
    started: Mutex<Vec<String>>,
}

impl Mesh {
    /// Builds one with these pods; `None` where this user may not, which is said.
    pub(crate) fn up(test: &str, pods: &str) -> Option<Self> {
        Self::up_with(test, pods, |_| {})
    }

    /// As [`Mesh::up`], with all daemons of a node in one process.
    pub(crate) fn up_together(test: &str, pods: &str) -> Option<Self> {
        Self::up_as(test, Daemons::Together, pods, |_| {})
    }

    /// As [`Mesh::up`], with another plan.
    pub(crate) fn up_with(test: &str, pods: &str, change: impl FnOnce(&mut Plan)) -> Option<Self> {
        Self::up_as(test, Daemons::Separate, pods, change)
    }

    fn up_as(test: &str, daemons: Daemons, pods: &str, change: impl FnOnce(&mut Plan)) -> Option<Self> {
        let nodes = if pods.contains("node: node2") { "node1, node2" } else { "node1" };
        Self::up_scenario(test, daemons, &format!("{SERVICES}nodes: [{nodes}]\npods:\n{pods}"), change)
    }

    /// As [`Mesh::up_with`], with another scenario, which gets its name here.
    pub(crate) fn up_scenario(
        test: &str,
        daemons: Daemons,
        scenario: &str,
        change: impl FnOnce(&mut Plan),
    ) -> Option<Self> {
        if may_not(test) {
            return None;
        }
        let name =
            format!("t{}-{}", std::process::id(), test.split('_').take(4).collect::<Vec<_>>().join("-"));
        let text = format!("name: {name}\n{scenario}");
        let file = PathBuf::from(format!("{test}.yaml"));
        let mut scenario = Scenario::parse(&text, &file).unwrap_or_else(|e| panic!("{e}\n{text}"));
        scenario.daemons = daemons;
        let mut plan = Plan::new(&scenario);
        // Tests that stop somebody in the middle have to know how far a request has come.
        for process in plan.processes.iter_mut().filter(|process| process.name.ends_with("/forwarder")) {
            process.env.insert("NSM_LOG_LEVEL".into(), "info,nsm_mesh=debug".into());
        }
        change(&mut plan);
        let lab = Lab::build(plan, &file, Path::new(NSM), Supervisor::default(), &mut |_| {});
        let lab = lab.unwrap_or_else(|e| panic!("{}", e.chain()));
        Some(Self { lab, started: Mutex::default() })
    }

    /// Starts `nsm` with these arguments in a pod, as `name`, and does not wait for anything.
    pub(crate) fn start(&self, name: &str, pod: &str, args: &[&str]) {
        self.start_program(name, pod, NSM, args);
    }

    /// As [`Mesh::start`], of another program that becomes `nsm`.
    pub(crate) fn start_program(&self, name: &str, pod: &str, exe: &str, args: &[&str]) {
        let at = self.lab.plan.paths();
        let mut env = BTreeMap::from([("SPIFFE_ENDPOINT_SOCKET".into(), self.url_for(pod, "identity.sock"))]);
        env.insert("NSM_INTROSPECT_DIR".into(), at.introspect().to_string_lossy().into_owned());
        env.extend(std::env::var("PATH").map(|path| ("PATH".into(), path)));
        let program = Program {
            name: name.into(),
            exe: exe.into(),
            args: args.iter().map(|&arg| arg.into()).collect(),
            env,
            log: at.log(name),
            notify: at.notify(name),
        };
        let namespace = self.lab.namespace(pod).unwrap_or_else(|e| panic!("{}", e.chain()));
        self.lab.supervisor.start(&program, &namespace).unwrap_or_else(|e| panic!("{}", e.chain()));
        let mut started = self.started.lock().expect("no panic");
        if !started.iter().any(|before| before == name) {
            started.push(name.into());
        }
    }

    /// A ping every millisecond from a pod, until it is counted.
    pub(crate) fn flood(&self, pod: &str, to: &str) -> Flood {
        let namespace = self.lab.namespace(pod).unwrap_or_else(|e| panic!("{}", e.chain()));
        let to = to.parse().expect("an address");
        Flood::start(&namespace, &[to], Duration::from_millis(1)).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Starts a client that wants `services` in a pod, with more arguments.
    pub(crate) fn client(&self, name: &str, pod: &str, services: &str, more: &[&str]) {
        let manager = self.url_for(pod, "nsm.io.sock");
        let args = ["client", "--name", name, "--connect-to", &manager, "--network-services", services];
        self.start(name, pod, &[&args[..], more].concat());
    }

    /// Starts an endpoint in a pod, with more arguments.
    pub(crate) fn endpoint(&self, name: &str, pod: &str, more: &[&str]) {
        let own = self.url_for(pod, &format!("{name}.sock"));
        let manager = self.url_for(pod, "nsm.io.sock");
        let args = ["endpoint", "--name", name, "--connect-to", &manager, "--listen-on", &own];
        let args = [&args[..], &["--register-service", "false"]].concat();
        self.start(name, pod, &[&args[..], more].concat());
    }

    /// Waits until these are ready; nothing may die meanwhile.
    pub(crate) fn ready(&self, names: &[&str]) {
        self.lab.supervisor.wait_ready(names, PATIENCE).unwrap_or_else(|e| panic!("{}", e.chain()));
    }

    /// Whether it has said that it is ready.
    pub(crate) fn is_ready(&self, name: &str) -> bool {
        self.condition(name) == Condition::Ready
    }

    /// Lets a client in each of these pods come and go at the same time: the hops have connections to each other
    /// then, so a hop that is frozen later gets requests and does not answer them.
    pub(crate) fn warm(&self, pods: &[&str]) {
        let names: Vec<_> = pods.iter().map(|pod| format!("warm-{pod}")).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        for (name, pod) in names.iter().zip(pods) {
            self.client(name, pod, "kernel://plain/warm0", &[]);
        }
        self.ready(&names);
        for name in names {
            self.end(name, Signal::TERM);
        }
        eventually("the warm ones are gone", || {
            let records = records(&self.lab.plan.lab);
            if records.is_empty() { Ok(()) } else { Err(format!("{records:?}")) }
        });
    }

    /// Freezes an endpoint that is warm, starts a client, and waits until the endpoint is asked.
    pub(crate) fn hang(&self, endpoint: &str, client: &str, pod: &str, more: &[&str]) {
        self.signal(endpoint, Signal::STOP);
        let before = self.asked("node1/forwarder", endpoint);
        self.client(client, pod, "kernel://plain/nsm0", more);
        self.has_asked("node1/forwarder", endpoint, before + 1);
        assert!(!self.is_ready(client));
    }

    /// How many requests a forwarder has handed on to this endpoint, or to whatever else has that name.
    pub(crate) fn asked(&self, forwarder: &str, next: &str) -> usize {
        let (log, next) = (self.log(forwarder), format!("next={next} "));
        log.lines().filter(|line| line.contains("asking the next hop") && line.contains(&next)).count()
    }

    /// Waits until a forwarder has handed on that many.
    pub(crate) fn has_asked(&self, forwarder: &str, next: &str, requests: usize) {
        eventually(&format!("{forwarder} asks {next}"), || {
            if self.asked(forwarder, next) >= requests { Ok(()) } else { Err(self.log(forwarder)) }
        });
    }

    /// Waits for the end of a program that ends by itself: its exit status and what it said.
    pub(crate) fn ended(&self, name: &str) -> (String, String) {
        let how = eventually(&format!("{name} ends"), || match self.condition(name) {
            Condition::Ended(how) => Ok(how),
            other => Err(format!("{other:?}; it said\n{}", self.log(name))),
        });
        // Its end was expected, so it is no failure for whoever looks next.
        self.end(name, Signal::KILL);
        (how, self.log(name))
    }

    /// Ends a process with a signal, and waits for that.
    pub(crate) fn end(&self, name: &str, signal: Signal) {
        let ended = self.lab.supervisor.end(name, signal, PATIENCE);
        ended.unwrap_or_else(|e| panic!("{}\n{}", e.chain(), self.log(name)));
    }

    /// Sends a signal that does not end.
    pub(crate) fn signal(&self, name: &str, signal: Signal) {
        kill_process(self.pid(name), signal).expect("it lives");
    }

    /// The process of that name.
    pub(crate) fn pid(&self, name: &str) -> Pid {
        let processes = self.lab.supervisor.processes();
        let id = processes.iter().find(|(n, ..)| n == name).map(|(_, id, _)| id.pid);
        id.and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("it was started")
    }

    /// Starts a daemon of the plan again and waits for it.
    pub(crate) fn restart(&self, name: &str) {
        self.lab.start(name).unwrap_or_else(|e| panic!("{}", e.chain()));
        self.ready(&[name]);
    }

    /// All that a process has said.
    pub(crate) fn log(&self, name: &str) -> String {
        fs::read_to_string(self.lab.plan.paths().log(name)).unwrap_or_default()
    }

    /// Waits until a process has said something.
    pub(crate) fn says(&self, name: &str, what: &str) {
        eventually(&format!("{name} says {what:?}"), || {
            let log = self.log(name);
            if log.contains(what) { Ok(()) } else { Err(log) }
        });
    }

    /// The URL of a socket of the node.
    pub(crate) fn url(&self, socket: &str) -> String {
        url(&self.lab.plan.lab, socket)
    }

    /// The URL of a socket of the node where this pod, or this node itself, is.
    pub(crate) fn url_for(&self, pod: &str, socket: &str) -> String {
        let pods = &self.lab.plan.pods;
        let node = pods.iter().find(|entry| entry.pod == pod).map_or(pod, |entry| &entry.node);
        format!("unix://{}", self.lab.plan.paths().node(node).join(socket).display())
    }

    /// The interfaces of a pod, without loopback.
    pub(crate) fn links(&self, pod: &str) -> Vec<SeenLink> {
        links(&self.lab.plan.lab, pod)
    }

    /// Where the forwarder of a node keeps its records.
    pub(crate) fn state_dir(&self, node: &str) -> PathBuf {
        state_dir(&self.lab.plan.lab, node)
    }

    /// Waits until an interface is in a pod.
    pub(crate) fn has(&self, pod: &str, interface: &str) -> SeenLink {
        eventually(&format!("{pod} has {interface}"), || {
            let links = self.links(pod);
            links.iter().find(|link| link.name == interface).cloned().ok_or_else(|| format!("{links:?}"))
        })
    }

    /// Waits until an interface is gone from a pod.
    pub(crate) fn lost(&self, pod: &str, interface: &str) {
        eventually(&format!("{pod} loses {interface}"), || {
            let links = self.links(pod);
            if links.iter().any(|link| link.name == interface) { Err(format!("{links:?}")) } else { Ok(()) }
        });
    }

    /// Waits until every request of a row from a pod is answered.
    pub(crate) fn pings(&self, pod: &str, to: &str) {
        let to: IpAddr = to.parse().expect("an address");
        let namespace = self.lab.namespace(pod).unwrap_or_else(|e| panic!("{}", e.chain()));
        let row = || Echo::open(to).and_then(|echo| echo.row(5, Instant::now() + PATIENCE));
        eventually(&format!("{pod} pings {to}"), || match namespace.run(row).expect("enter") {
            Ok(Row { answered: 5, .. }) => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }

    /// Nothing may be left of any connection: links in these pods, records of wires, connections at any hop that
    /// still runs.
    pub(crate) fn nothing_is_left(&self, pods: &[&str]) {
        self.no_wire_is_left(pods);
        self.inside(pods[0], "idle");
    }

    /// The part of [`Mesh::nothing_is_left`] that the kernel and the files show.
    pub(crate) fn no_wire_is_left(&self, pods: &[&str]) {
        for pod in pods {
            eventually(&format!("nothing is left in {pod}"), || {
                let links = self.links(pod);
                if links.is_empty() { Ok(()) } else { Err(format!("{links:?}")) }
            });
        }
        eventually("no record is left", || {
            let records = records(&self.lab.plan.lab);
            if records.is_empty() { Ok(()) } else { Err(format!("{records:?}")) }
        });
    }

    /// Starts a job of [`crate::inside`] as a process in a pod, with the pod's identity, and does not wait.
    pub(crate) fn start_inside(&self, name: &str, pod: &str, job: &str) {
        let own = std::env::current_exe().expect("own name").to_string_lossy().into_owned();
        let (job, lab) = (format!("{JOB}={job}"), format!("{LAB}={}", self.lab.plan.lab));
        let args = [&job, &lab, &own, "--exact", "inside", "--ignored", "--nocapture"];
        self.start_program(name, pod, "env", &args);
    }

    /// Runs a job of [`crate::inside`] as a process in a pod, with the pod's identity.
    pub(crate) fn inside(&self, pod: &str, job: &str) {
        let mut command = Command::new(std::env::current_exe().expect("own name"));
        command
            .args(["--exact", "inside", "--ignored", "--nocapture"])
            .env(JOB, job)
            .env(LAB, &self.lab.plan.lab)
            .env("SPIFFE_ENDPOINT_SOCKET", self.url_for(pod, "identity.sock"))
            .stdin(Stdio::null());
        let namespace = self.lab.namespace(pod).unwrap_or_else(|e| panic!("{}", e.chain()));
        let output = namespace.run(|| command.output()).expect("enter").expect("start");
        assert!(
            output.status.success(),
            "{job} in {pod}:\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Nothing died that should not, and nothing panicked.
    fn check(&self) {
        self.lab.supervisor.check().unwrap_or_else(|e| panic!("{}", e.chain()));
        for entry in fs::read_dir(self.lab.plan.paths().root.join("logs")).expect("logs").flatten() {
            let log = fs::read_to_string(entry.path()).unwrap_or_default();
            assert!(!log.contains("panicked"), "{}\n{log}", entry.path().display());
        }
    }

    fn condition(&self, name: &str) -> Condition {
        let processes = self.lab.supervisor.processes();
        processes.into_iter().find(|(n, ..)| n == name).map(|(_, _, condition)| condition).expect("started")
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check();
        }
        // Frozen ones hear nothing else.
        for name in self.started.lock().expect("no panic").iter() {
            let _ = self.lab.supervisor.end(name, Signal::KILL, PATIENCE);
        }
        let left = self.lab.down();
        assert!(left.is_empty() || std::thread::panicking(), "{left:?}");
    }
}

/// What this process was started for by [`Mesh::inside`]: job and lab.
pub(crate) fn job() -> Option<(String, String)> {
    Some((std::env::var(JOB).ok()?, std::env::var(LAB).ok()?))
}

/// The URL of a socket of the lab's node.
pub(crate) fn url(lab: &str, socket: &str) -> String {
    format!("unix://{}", Paths::new(lab).node("node1").join(socket).display())
}

/// The interfaces of a pod, without loopback.
pub(crate) fn links(lab: &str, pod: &str) -> Vec<SeenLink> {
    let namespace = Namespace::named(&format!("{lab}.{pod}")).expect("open");
    let mut links = Seen::of(&namespace).expect("read").links;
    links.retain(|link| link.name != "lo");
    links
}

/// Where the forwarder of a node keeps its records.
pub(crate) fn state_dir(lab: &str, node: &str) -> PathBuf {
    Paths::new(lab).node(node).join("forwarder")
}

/// The forwarders' files: records of wires, and what they did not finish.
pub(crate) fn records(lab: &str) -> Vec<PathBuf> {
    let directories = NODES.iter().filter_map(|node| fs::read_dir(state_dir(lab, node)).ok());
    directories.flatten().flatten().map(|entry| entry.path()).collect()
}

/// Waits until something holds; what is in its way is said when it does not.
pub(crate) fn eventually<T>(what: &str, look: impl FnMut() -> Result<T, String>) -> T {
    eventually_within(PATIENCE, what, look)
}

/// As [`eventually`], with another patience.
pub(crate) fn eventually_within<T>(
    patience: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<T, String>,
) -> T {
    let end = Instant::now() + patience;
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) if Instant::now() >= end => panic!("never: {what}: {why}"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Tests that make namespaces need root.
pub(crate) fn may_not(test: &str) -> bool {
    let skip = !rustix::process::geteuid().is_root();
    if skip {
        println!("SKIPPED {test}: needs root to make network namespaces");
    }
    skip
}
