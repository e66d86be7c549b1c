//! Every role of ours beside every upstream neighbour that it can have, in real namespaces over real mTLS.
//!
//! A mesh of the lab has some of its programs swapped for upstream's (`interop/`), which take the same arguments. A case
//! counts for a pair of neighbours only if the log of upstream's program shows the call. What was found is printed, and
//! kept in `docs/interop.md`: `NSM_INTEROP_WRITE=1` writes it anew, without it the test compares.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use nsm_lab::{plan::PodEntry, scenario::Daemons};
use rustix::process::Signal;
use tonic::Code;

use crate::{
    harness::{self, Mesh},
    raw::{Raw, file, good, in_runtime},
};

/// Long enough for a busy machine that runs four Go programs beside ours.
const PATIENCE: Duration = Duration::from_secs(40);
/// Certificates last longer than the test, tokens of the client not: a third of this later it refreshes.
const TOKENS: &str = "9s";

const SERVICES: &str = "\
networkServices:
- apiVersion: networkservicemesh.io/v1
  kind: NetworkService
  metadata: {name: plain}
  spec: {payload: ETHERNET}
- apiVersion: networkservicemesh.io/v1
  kind: NetworkService
  metadata: {name: picky}
  spec:
    payload: ETHERNET
    matches:
    - source_selector: {tier: gold}
      fallthrough: true
      routes: [{destination_selector: {tier: gold}}]
    - source_selector: {pick: template}
      metadata: {labels: {p2p: \"true\"}}
      routes: [{destination_selector: {color: \"{{ .color }}\"}}]
    - metadata: {labels: {p2p: \"true\"}}
      routes: [{destination_selector: {color: blue}}]
";

/// Who is upstream's in a mesh.
struct Swap {
    name: &'static str,
    /// Programs that are upstream's, by the ends of their names in the lab.
    theirs: &'static [&'static str],
    /// The endpoints are on a node of their own.
    remote: bool,
}

const MESHES: &[Swap] = &[
    Swap { name: "their client", theirs: &["client"], remote: false },
    Swap { name: "their endpoint", theirs: &["gw-a", "gw-b"], remote: false },
    Swap { name: "their manager", theirs: &["node1/manager"], remote: false },
    Swap { name: "their forwarder", theirs: &["node1/forwarder"], remote: false },
    Swap { name: "their registry", theirs: &["registry"], remote: false },
    Swap {
        name: "our client",
        theirs: &["gw-a", "gw-b", "node1/manager", "node1/forwarder", "registry"],
        remote: false,
    },
    Swap {
        name: "our endpoint",
        theirs: &["client", "node1/manager", "node1/forwarder", "registry"],
        remote: false,
    },
    Swap {
        name: "our manager",
        theirs: &["client", "gw-a", "gw-b", "node1/forwarder", "registry"],
        remote: false,
    },
    Swap {
        name: "our forwarder",
        theirs: &["client", "gw-a", "gw-b", "node1/manager", "registry"],
        remote: false,
    },
    Swap {
        name: "our registry",
        theirs: &["client", "gw-a", "gw-b", "node1/manager", "node1/forwarder"],
        remote: false,
    },
    Swap {
        name: "their far node",
        theirs: &["gw-a", "gw-b", "node2/manager", "node2/forwarder"],
        remote: true,
    },
    Swap { name: "their near node", theirs: &["client", "node1/manager", "node1/forwarder"], remote: true },
];

/// Watchers of upstream's on one node: their names, in whose name (that pod's) they watch, and whom.
const WATCHERS: [(&str, &str, &str); 3] = [
    ("at-manager", "client", "nsm.io.sock"),
    ("at-forwarder", "m", "forwarder.sock"),
    ("at-endpoint", "f", "gw-b.sock"),
];

/// The cases, in the order of the table's columns.
const CASES: &[(&str, &str)] = &[
    ("register", "a registration is taken"),
    ("find", "the directory is asked, and a watch hears of what comes and goes"),
    ("request", "a wire is asked for and answered"),
    ("descriptors", "the namespaces of client and endpoint arrive at the forwarder"),
    ("selection", "templates, fall-through and metadata choose the endpoint"),
    ("refresh", "the same connection, asked for again before its tokens expire"),
    (
        "events",
        "INITIAL_STATE_TRANSFER, UPDATE and, on one node, where a watcher of upstream's stays to the end, DELETE, in this \
         order",
    ),
    ("heal", "the endpoint is killed, the connection goes on with another one"),
    ("unknown", "fields, labels, contexts and mechanisms that nobody has heard of harm nothing and pass"),
    ("refused", "forged, expired and misdirected tokens are refused by whoever is asked"),
    ("close", "all the way, and nothing is left"),
    (
        "tunnel",
        "VXLAN parameters are negotiated; that packets pass is **unproved**, upstream's data plane is not here",
    ),
];

/// A program of ours and one of upstream's that talk to each other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    ours: &'static str,
    theirs: &'static str,
    /// The names of upstream's programs in the lab.
    names: Vec<String>,
    /// Upstream's program is asked by ours (and asks ours otherwise).
    served: bool,
    /// Who ours is.
    peer: String,
    /// Requests for wires pass here, not only registrations.
    wires: bool,
}

impl Pair {
    fn verb(&self) -> &'static str {
        if self.served { "served" } else { "called" }
    }
}

/// What was seen: for each pair of roles and each mesh, the cases.
type Matrix = BTreeMap<(String, String, String), BTreeSet<&'static str>>;

/// One mesh while it is looked at.
struct Run<'s> {
    swap: &'s Swap,
    mesh: Mesh,
    upstream: String,
    pairs: Vec<Pair>,
    seen: Matrix,
}

impl Drop for Run<'_> {
    /// `NSM_INTEROP_LOGS` names a directory for the logs of what failed: the lab's own go with it.
    fn drop(&mut self) {
        let Some(kept) = std::env::var_os("NSM_INTEROP_LOGS").filter(|_| std::thread::panicking()) else {
            return;
        };
        let kept = Path::new(&kept).join(self.swap.name.replace(' ', "-"));
        let _ = fs::create_dir_all(&kept);
        let logs = fs::read_dir(self.mesh.lab.plan.paths().root.join("logs"));
        for log in logs.into_iter().flatten().flatten() {
            let _ = fs::copy(log.path(), kept.join(log.file_name()));
        }
    }
}

#[test]
fn ours_and_upstreams_programs_work_together_in_every_position() {
    let test = "ours_and_upstreams_programs_work_together_in_every_position";
    if harness::may_not(test) {
        return;
    }
    let Some(upstream) = nsm_upstream::program(test) else { return };
    let only = std::env::var("NSM_INTEROP_ONLY").ok();
    let wanted = MESHES.iter().filter(|swap| only.as_deref().is_none_or(|only| only == swap.name));
    let todo = Mutex::new(wanted.collect::<Vec<_>>());
    let (matrix, failures) = (Mutex::new(Matrix::new()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let Some(swap) = todo.lock().expect("no panic").pop() else { break };
                    let began = Instant::now();
                    match catch_unwind(AssertUnwindSafe(|| run(swap, &upstream))) {
                        Ok(seen) => matrix.lock().expect("no panic").extend(seen),
                        Err(_) => failures.lock().expect("no panic").push(swap.name),
                    }
                    println!("{}: {:.1} s", swap.name, began.elapsed().as_secs_f64());
                }
            });
        }
    });
    let page = page(&matrix.into_inner().expect("no panic"));
    println!("{page}");
    let failures = failures.into_inner().expect("no panic");
    assert!(failures.is_empty(), "not good: {failures:?}");
    if only.is_none() {
        compare(&page);
    }
}

/// Writes the page, or sees that it is the one in the repository.
fn compare(page: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/interop.md");
    if std::env::var_os("NSM_INTEROP_WRITE").is_some() {
        fs::write(&path, page).expect("write");
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(kept, page, "docs/interop.md is out of date; NSM_INTEROP_WRITE=1 writes it anew");
}

fn page(matrix: &Matrix) -> String {
    let mut text = String::from(
        "# Interoperability with upstream\n\n\
         What the test `ours_and_upstreams_programs_work_together_in_every_position` saw; it writes this page\n\
         (`NSM_INTEROP_WRITE=1`) and fails when it sees something else. Upstream's programs are built by `interop/` from\n\
         upstream's published modules, at the versions in `interop/go.mod`. A case counts only if the log of upstream's\n\
         program shows the call. Every message of theirs carries a field that nobody knows.\n\n\
         One role of ours is swapped into a mesh of upstream's (*our …*), and one of upstream's into a mesh of ours\n\
         (*their …*); with two nodes, one whole node. Where our forwarder is, wires are real and their addresses are read\n\
         from the kernel; upstream's forwarder negotiates and makes none.\n\n",
    );
    for (case, what) in CASES {
        text += &format!("* `{case}`: {what}\n");
    }
    let heads: Vec<_> = CASES.iter().map(|(case, _)| *case).collect();
    text += &format!("\n| ours | upstream's | mesh | {} |\n", heads.join(" | "));
    text += &format!("|---|---|---|{}\n", ":-:|".repeat(heads.len()));
    for ((ours, theirs, mesh), seen) in matrix {
        let marks: Vec<_> = heads.iter().map(|case| if seen.contains(case) { "✓" } else { "" }).collect();
        text += &format!("| {ours} | {theirs} | {mesh} | {} |\n", marks.join(" | "));
    }
    text += "\nAn empty field: the case does not exist between these two.\n";
    text
}

fn run(swap: &Swap, upstream: &Path) -> Matrix {
    let mut run = Run::start(swap, upstream);
    run.requests();
    run.registrations();
    run.selection();
    run.unknown();
    run.watch();
    run.refresh();
    run.refusals();
    run.heal();
    run.close();
    run.events();
    std::mem::take(&mut run.seen)
}

impl<'s> Run<'s> {
    fn start(swap: &'s Swap, upstream: &Path) -> Self {
        let (nodes, far) = if swap.remote { ("node1, node2", "node2") } else { ("node1", "node1") };
        let pods = |name: &str, color: &str, prefix: &str| {
            format!(
                "- {{name: {name}, node: {far}, endpoint: {{services: [plain, picky], labels: {{color: {color}}}, \
                 cidrPrefix: [{prefix}]}}}}\n"
            )
        };
        let scenario = format!(
            "{SERVICES}nodes: [{nodes}]\npods:\n- {{name: client, node: node1}}\n- {{name: m, node: node1}}\n\
             - {{name: f, node: node1}}\n{}{}",
            pods("gw-a", "red", "172.16.1.0/24"),
            pods("gw-b", "blue", "172.16.2.0/24"),
        );
        let test = format!("io_{}", swap.name.replace(' ', "-"));
        let mesh = Mesh::up_scenario(&test, Daemons::Separate, &scenario, |plan| {
            let at = plan.paths();
            for process in &mut plan.processes {
                if swap.theirs.contains(&process.name.as_str()) {
                    process.exe = Some(upstream.to_owned());
                }
                // Pods do not reach it by TCP, and one that lies to it has to.
                if process.name == "registry" {
                    let own = format!(",unix://{}", at.node("node1").join("registry.sock").display());
                    let after = process.args.iter().position(|arg| arg == "--listen-on").expect("it listens");
                    process.args[after + 1] += &own;
                }
            }
            plan.processes.retain(|process| {
                process.name != "identity" || {
                    // It takes no tokens' lifetime.
                    true
                }
            });
            if let Some(identity) = plan.processes.iter_mut().find(|process| process.name == "identity") {
                identity.args.truncate(3);
            }
            // Whoever watches a hop sees what is his only: these are who asks it.
            for (pod, who) in [("m", "manager"), ("f", "forwarder")] {
                let spiffe_id = format!("spiffe://{}.lab/node1/{who}", plan.lab);
                plan.pods.retain(|entry| entry.pod != pod);
                plan.pods.push(PodEntry { pod: pod.into(), node: "node1".into(), spiffe_id });
            }
            // It comes later, and watches hear of it.
            plan.processes.retain(|process| process.name != "gw-b");
        })
        .expect("root, as was checked");
        let upstream = upstream.display().to_string();
        let pairs = pairs(swap, &mesh.lab.plan.lab);
        Self { swap, mesh, upstream, pairs, seen: Matrix::new() }
    }

    fn is_theirs(&self, name: &str) -> bool {
        self.swap.theirs.contains(&name)
    }

    fn socket(&self, name: &str) -> String {
        let node = if self.swap.remote && name.starts_with("gw") { "node2" } else { "node1" };
        let directory = self.mesh.lab.plan.paths().node(node);
        format!("unix://{}", directory.join(name).display())
    }

    /// The case was seen between these two.
    fn saw(&mut self, pair: &Pair, case: &'static str) {
        let key = (pair.ours.into(), pair.theirs.into(), self.swap.name.into());
        self.seen.entry(key).or_default().insert(case);
    }

    /// Waits until one of these logs has a line with all of the words; tells which line.
    fn line(&self, names: &[String], words: &[&str]) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let logs: Vec<_> = names.iter().map(|name| self.mesh.log(name)).collect();
            let mut lines = logs.iter().flat_map(|log| log.lines());
            if let Some(line) = lines.find(|line| words.iter().all(|word| line.contains(word))) {
                return line.to_owned();
            }
            assert!(
                Instant::now() < end,
                "{}: no line of {names:?} has all of {words:?}:\n{}",
                self.swap.name,
                logs.join("\n")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sees a case between all pairs through which wires are asked for.
    fn wires(&mut self, case: &'static str, words: &[&str]) {
        for pair in self.pairs.clone().iter().filter(|pair| pair.wires) {
            let call = format!("{} NetworkService/Request peer={}", pair.verb(), pair.peer);
            self.line(&pair.names, &[&[&*call, " code=OK "], words].concat());
            self.saw(pair, case);
        }
    }

    /// Starts a client, ours or theirs as the mesh wants it.
    fn client(&self, name: &str, services: &str, more: &[&str]) {
        let manager = self.mesh.url("nsm.io.sock");
        let args = ["client", "--name", name, "--connect-to", &manager, "--network-services", services];
        let args = [&args[..], more].concat();
        match self.is_theirs("client") {
            true => self.mesh.start_program(name, "client", &self.upstream, &args),
            false => self.mesh.start(name, "client", &args),
        }
    }

    fn ready(&self, names: &[&str]) {
        let ready = self.mesh.lab.supervisor.wait_ready(names, PATIENCE);
        let logs = || names.iter().map(|name| self.mesh.log(name)).collect::<String>();
        ready.unwrap_or_else(|e| panic!("{}: {}\n{}", self.swap.name, e.chain(), logs()));
    }

    /// Everybody has registered; a watch hears of an endpoint that comes.
    fn registrations(&mut self) {
        let asked = if self.is_theirs("node1/manager") { "registry.sock" } else { "nsm.io.sock" };
        let args = ["find", "--service-name", "plain", "--connect-to", &self.socket(asked)];
        self.mesh.start_program("find", "client", &self.upstream, &args);
        // What a program of theirs registers or passes on has a field that nobody knows.
        let future = if self.is_theirs("gw-a") { "future=true" } else { "nse=gw-a " };
        self.line(&["find".into()], &["got NetworkServiceEndpointRegistry/Find", "nse=gw-a ", future]);
        let node = if self.swap.remote { "node2" } else { "node1" };
        let paths = self.mesh.lab.plan.paths();
        let manager = format!("unix://{}", paths.node(node).join("nsm.io.sock").display());
        let own = format!("unix://{}", paths.node(node).join("gw-b.sock").display());
        let args = ["endpoint", "--name", "gw-b", "--connect-to", &manager, "--listen-on", &own];
        let more =
            ["--service-names", "plain,picky", "--labels", "color:blue", "--register-service", "false"];
        let args = [&args[..], &more, &["--cidr-prefix", "172.16.2.0/24"]].concat();
        let exe = if self.is_theirs("gw-b") { self.upstream.as_str() } else { harness::NSM };
        self.mesh.start_program("gw-b", "gw-b", exe, &args);
        self.ready(&["gw-b"]);
        self.line(&["find".into()], &["got NetworkServiceEndpointRegistry/Find", "deleted=false nse=gw-b "]);
        for pair in self.pairs.clone() {
            let registers =
                format!("{} NetworkServiceEndpointRegistry/Register peer={}", pair.verb(), pair.peer);
            match (pair.ours, pair.theirs) {
                ("endpoint" | "forwarder", "manager")
                | ("manager", "endpoint" | "forwarder")
                | ("registry", "manager")
                | ("manager", "registry") => {
                    // Who is registered asks, in the direction against that of requests.
                    let registers = match (pair.ours, pair.theirs) {
                        ("forwarder", "manager") => registers.replace("called", "served"),
                        ("manager", "forwarder") => registers.replace("served", "called"),
                        _ => registers,
                    };
                    self.line(&pair.names, &[&registers, " code=OK "]);
                    self.saw(&pair, "register");
                }
                _ => {}
            }
        }
    }

    fn requests(&mut self) {
        self.client(
            "nsc",
            "kernel://plain/nsm0",
            &["--max-token-lifetime", TOKENS, "--request-timeout", "4s"],
        );
        self.ready(&["nsc"]);
        self.wires("request", &["conn=nsc-0 "]);
        self.descriptors();
        self.tunnel();
        for pair in self.pairs.clone() {
            let finds =
                |verb: &str| format!("{verb} NetworkServiceEndpointRegistry/Find peer={} ", pair.peer);
            match (pair.ours, pair.theirs) {
                ("forwarder", "manager") => drop(self.line(&pair.names, &[&finds("serving")])),
                ("manager", "forwarder") => drop(self.line(&pair.names, &[&finds("got"), "nse=gw-"])),
                ("manager", "registry") => {
                    drop(self.line(&pair.names, &[&finds("serving"), "watch=true"]));
                }
                ("registry", "manager") => drop(self.line(&pair.names, &[&finds("got"), "nse=gw-"])),
                // The watch that hears of gw-b is a workload of upstream's.
                ("manager", "client") => {}
                _ => continue,
            }
            self.saw(&pair, "find");
        }
    }

    /// What both ends agree on for the tunnel. Whoever has the lower address draws an even VNI, the other an odd one
    /// (spec/data-plane.md, VXLAN).
    fn tunnel(&mut self) {
        let remote = |pair: &&Pair| pair.ours.contains("remote") || pair.theirs.contains("remote");
        for pair in self.pairs.clone().iter().filter(remote) {
            let call = format!("{} NetworkService/Request peer={}", pair.verb(), pair.peer);
            let ends = ["src_ip:10.255.0.1;", "src_port:4789;", "dst_ip:10.255.0.2;", "dst_port:4789;"];
            let words =
                [&[&*call, " code=OK ", "conn=nsc-0 ", "mechanism=REMOTE/VXLAN "], &ends[..]].concat();
            let line = self.line(&pair.names, &words);
            let answered = line.split("answered=").last().unwrap_or_default();
            let vni =
                answered.split("vni:").nth(1).and_then(|rest| rest.split(';').next()?.parse::<u32>().ok());
            assert!(vni.is_some_and(|vni| vni > 0 && vni < 1 << 24 && vni % 2 == 0), "{line}");
            self.saw(pair, "tunnel");
        }
    }

    /// Where our forwarder is, the kernel shows it; where theirs is, its open files do.
    fn descriptors(&mut self) {
        let lab = &self.mesh.lab.plan.lab;
        let mut forwarders = vec![("node1/forwarder", "client")];
        forwarders.push((if self.swap.remote { "node2/forwarder" } else { "node1/forwarder" }, "gw"));
        for (forwarder, pod) in forwarders {
            let gateways = if pod == "gw" { vec!["gw-a", "gw-b"] } else { vec![pod] };
            let found = |pod: &str| match self.is_theirs(forwarder) {
                true => {
                    let inode = fs::metadata(format!("/run/netns/{lab}.{pod}")).expect("a namespace");
                    let wanted = format!("net:[{}]", std::os::unix::fs::MetadataExt::ino(&inode));
                    let pid = self.mesh.pid(forwarder).as_raw_nonzero();
                    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
                    files
                        .filter_map(|file| fs::read_link(file.path()).ok())
                        .any(|to| to.as_os_str() == &*wanted)
                }
                false => !harness::links(lab, pod).is_empty(),
            };
            harness::eventually(&format!("{}: {forwarder} got what is of {pod}", self.swap.name), || {
                if gateways.iter().any(|pod| found(pod)) { Ok(()) } else { Err(forwarder.to_owned()) }
            });
        }
        for pair in self.pairs.clone().iter().filter(|pair| pair.wires && !pair.theirs.contains("remote")) {
            self.saw(pair, "descriptors");
        }
    }

    fn selection(&mut self) {
        let wanted = "kernel://picky/pick0?pick=template&color=red,kernel://picky/pick1?tier=gold&color=red";
        self.client("pick", wanted, &["--once"]);
        self.ready(&["pick"]);
        for (conn, nse) in [("conn=pick-0 ", "nse=gw-a "), ("conn=pick-1 ", "nse=gw-b ")] {
            self.wires("selection", &[conn, nse]);
        }
        for pair in self.pairs.clone() {
            if (pair.ours, pair.theirs) == ("registry", "manager") {
                self.line(
                    &pair.names,
                    &["got NetworkServiceRegistry/Find", &pair.peer, "ns=picky", "matches=3"],
                );
                self.saw(&pair, "selection");
            }
        }
        self.mesh.end("pick", Signal::TERM);
    }

    /// A client of upstream's prefers a mechanism of the future, and says things that nobody understands.
    fn unknown(&mut self) {
        let manager = self.mesh.url("nsm.io.sock");
        let args = ["client", "--name", "odd", "--connect-to", &manager, "--unknown-mechanism"];
        let args = [&args[..], &["--network-services", "kernel://plain/odd0?fashion=strange"]].concat();
        self.mesh.start_program("odd", "client", &self.upstream, &args);
        self.ready(&["odd"]);
        let survived = "extra=map[future:bright] future=true ";
        let answer = self.line(&["odd".into()], &["wire up=", "mechanism=LOCAL/KERNEL", survived]);
        assert!(answer.contains("fashion:strange"), "{answer}");
        self.wires("unknown", &["conn=odd-0 ", survived, "fashion:strange"]);
        for pair in self.pairs.clone().iter().filter(|pair| !pair.wires) {
            // Every message of theirs has a field of the future; the registration above was one.
            self.saw(pair, "unknown");
        }
        self.mesh.end("odd", Signal::TERM);
    }

    /// Watchers of upstream's at each hop of the first node, in the name of whoever asks it.
    fn watch(&self) {
        for (watcher, pod, socket) in self.watchers() {
            let args = ["monitor", "--name", watcher, "--connect-to", &self.socket(socket)];
            self.mesh.start_program(watcher, pod, &self.upstream, &args);
        }
        self.ready(&self.watchers().map(|(watcher, ..)| watcher).collect::<Vec<_>>());
    }

    fn watchers(&self) -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
        let some = !self.swap.remote && self.pairs.iter().any(|pair| pair.wires);
        WATCHERS.into_iter().filter(move |_| some)
    }

    fn refresh(&mut self) {
        for pair in self.pairs.clone().iter().filter(|pair| pair.wires) {
            let call = format!("{} NetworkService/Request peer={}", pair.verb(), pair.peer);
            harness::eventually_within(PATIENCE, &format!("{}: {pair:?} refreshes", self.swap.name), || {
                let logs: String = pair.names.iter().map(|name| self.mesh.log(name)).collect();
                let of_it =
                    |line: &&str| line.contains(&call) && line.contains(" code=OK asked=(conn=nsc-0 ");
                let asked = logs.lines().filter(of_it).count();
                if asked >= 2 { Ok(()) } else { Err(logs) }
            });
            self.saw(pair, "refresh");
        }
    }

    /// Liars in the client's pod ask whoever is ours; and whoever is upstream's is asked by a liar of ours.
    fn refusals(&mut self) {
        let lies = ["forged", "expired", "misdirected"];
        for pair in self.pairs.clone() {
            match (pair.ours, pair.theirs) {
                ("manager", "client") | ("forwarder", "manager") | ("endpoint", "forwarder") => {
                    let socket = match pair.ours {
                        "manager" => self.socket("nsm.io.sock"),
                        "forwarder" => self.socket("forwarder.sock"),
                        _ => self.socket("gw-a.sock"),
                    };
                    for lie in lies {
                        let name = format!("{lie}-{}", pair.ours);
                        let args =
                            ["client", "--once", "--token", lie, "--name", &name, "--connect-to", &socket];
                        let args = [&args[..], &["--network-services", "kernel://plain/lie0"]].concat();
                        self.mesh.start_program(&name, "client", &self.upstream, &args);
                    }
                    for lie in lies {
                        let name = format!("{lie}-{}", pair.ours);
                        let (how, said) = self.mesh.ended(&name);
                        assert_eq!(how, "exit status 1", "{said}");
                        let call = format!("called NetworkService/Request peer={}", pair.peer);
                        self.line(&[name], &[&call, "code=PermissionDenied"]);
                    }
                }
                ("registry", "manager") => {
                    for lie in lies {
                        let name = format!("{lie}-registry");
                        let own = self.socket(&format!("{name}.sock"));
                        let args = ["endpoint", "--token", lie, "--name", &name, "--listen-on", &own];
                        let at =
                            ["--connect-to", &self.socket("registry.sock"), "--register-service", "false"];
                        let args = [&args[..], &at, &["--service-names", "plain"]].concat();
                        self.mesh.start_program(&name, "client", &self.upstream, &args);
                        let call = "called NetworkServiceEndpointRegistry/Register";
                        let names = [name];
                        self.line(&names, &[call, &pair.peer, "code=PermissionDenied"]);
                        // It would try for ever.
                        self.mesh.end(&names[0], Signal::KILL);
                    }
                }
                ("client", "manager") | ("manager", "forwarder") | ("forwarder", "endpoint") => {
                    let socket = match pair.theirs {
                        "manager" => "nsm.io.sock",
                        "forwarder" => "forwarder.sock",
                        _ if self.swap.remote => continue,
                        _ => "gw-a.sock",
                    };
                    self.mesh.inside("client", &format!("lies {socket}"));
                    for lie in lies {
                        let words = [
                            "served NetworkService/Request",
                            "code=PermissionDenied",
                            &*format!("lie-{lie} "),
                        ];
                        self.line(&pair.names, &words);
                    }
                }
                _ => continue,
            }
            self.saw(&pair, "refused");
        }
    }

    /// The endpoint of the first wire is killed; the wire goes on with the other one.
    fn heal(&mut self) {
        self.mesh.end("gw-a", Signal::KILL);
        self.wires("heal", &["conn=nsc-0 ", "nse=gw-b "]);
    }

    fn close(&mut self) {
        self.mesh.end("nsc", Signal::TERM);
        for pair in self.pairs.clone().iter().filter(|pair| pair.wires) {
            let call = format!("{} NetworkService/Close peer={}", pair.verb(), pair.peer);
            self.line(&pair.names, &[&call, " code=OK ", "conn=nsc-0 "]);
            self.saw(pair, "close");
        }
        let pods: &[&str] = if self.is_theirs("node1/forwarder") { &[] } else { &["client"] };
        self.mesh.no_wire_is_left(pods);
        for (watcher, ..) in self.watchers() {
            let end = ["got MonitorConnection/MonitorConnections", "type=DELETE", "conn=nsc-0 "];
            self.line(&[watcher.to_owned()], &end);
            self.mesh.end(watcher, Signal::TERM);
        }
        self.mesh.end("gw-b", Signal::TERM);
        // A manager of upstream's unregisters in its own name, which no registry takes: it has to expire.
        if !self.swap.theirs.iter().any(|name| name.starts_with("gw-") || name.ends_with("manager")) {
            let gone = ["got NetworkServiceEndpointRegistry/Find", "deleted=true nse=gw-b "];
            self.line(&["find".into()], &gone);
        }
    }

    /// What upstream's program heard of the connection, or told, in the order of its log.
    fn events(&mut self) {
        for pair in self.pairs.clone().iter().filter(|pair| pair.wires) {
            let verb = if pair.served { "sent" } else { "got" };
            let event = format!("{verb} MonitorConnection/MonitorConnections peer={}", pair.peer);
            let logs: String = pair.names.iter().map(|name| self.mesh.log(name)).collect();
            let of_it: Vec<_> = logs.lines().filter(|line| line.contains(&event)).collect();
            let first = of_it.iter().position(|line| line.contains("type=INITIAL_STATE_TRANSFER"));
            let update = of_it.iter().rposition(|l| l.contains("type=UPDATE") && l.contains("conn=nsc-0 "));
            // Behind an endpoint nothing changes by itself, and upstream's forwarder watches anew after each request.
            let update = if pair.ours == "endpoint" { Some(usize::MAX) } else { update };
            assert!(
                first.is_some() && first < update,
                "{}: {pair:?} events {first:?} {update:?}: {logs}",
                self.swap.name
            );
            if !self.swap.remote {
                self.watched_to_the_end(pair);
            }
            self.saw(pair, "events");
        }
    }
}

impl Run<'_> {
    /// A watcher of upstream's at the hop of these two that is asked has seen the wire begin, change and end.
    fn watched_to_the_end(&self, pair: &Pair) {
        let asked = if pair.served { pair.theirs } else { pair.ours };
        let watcher = format!("at-{asked}");
        let log = self.mesh.log(&watcher);
        let events: Vec<_> = log.lines().filter(|line| line.contains("got MonitorConnection/")).collect();
        assert!(events[0].contains("type=INITIAL_STATE_TRANSFER"), "{}: {pair:?}: {log}", self.swap.name);
        let of_it: Vec<_> = events.iter().filter(|line| line.contains("conn=nsc-0 ")).collect();
        let last = |kind: &str| of_it.iter().rposition(|line| line.contains(kind));
        let (update, delete) = (last("type=UPDATE"), last("type=DELETE"));
        assert!(
            update.is_some() && update < delete && delete == of_it.len().checked_sub(1),
            "{}: {pair:?}: {log}",
            self.swap.name
        );
    }
}

/// Who talks to whom in this mesh, as far as one is ours and the other upstream's.
fn pairs(swap: &Swap, lab: &str) -> Vec<Pair> {
    let far = if swap.remote { "node2" } else { "node1" };
    let (near_manager, far_manager) = ("node1/manager".to_owned(), format!("{far}/manager"));
    let (near_forwarder, far_forwarder) = ("node1/forwarder".to_owned(), format!("{far}/forwarder"));
    let gateways = || vec!["gw-a".to_owned(), "gw-b".to_owned()];
    let is_theirs = |names: &[String]| swap.theirs.contains(&names[0].as_str());
    let id = |role: &str, name: &str| match role {
        "client" => format!("spiffe://{lab}.lab/pod/client"),
        // One of them is enough, and requests go to either.
        "endpoint" => format!("spiffe://{lab}.lab/pod/gw-"),
        _ => format!("spiffe://{lab}.lab/{name}"),
    };
    let mut found = Vec::new();
    // In the direction of calls: the first asks the second.
    let mut edge =
        |(role, names): (&'static str, Vec<String>), (other, others): (&'static str, Vec<String>), wires| {
            if is_theirs(&names) == is_theirs(&others) {
                return;
            }
            let served = is_theirs(&others);
            let (ours, own, theirs, names) =
                if served { (role, names, other, others) } else { (other, others, role, names) };
            // A client of upstream's may have any name.
            let names = match theirs {
                "client" => ["nsc", "pick", "odd"].map(String::from).to_vec(),
                _ => names,
            };
            found.push(Pair { ours, theirs, peer: id(ours, &own[0]), names, served, wires });
        };
    let one = |role: &'static str, name: &str| (role, vec![name.to_owned()]);
    edge(one("client", "client"), one("manager", &near_manager), true);
    edge(one("manager", &near_manager), one("forwarder", &near_forwarder), true);
    if swap.remote {
        edge(one("forwarder", &near_forwarder), one("remote manager", &far_manager), true);
        edge(one("manager", &far_manager), one("forwarder", &far_forwarder), true);
    }
    edge(one("forwarder", &far_forwarder), ("endpoint", gateways()), true);
    edge(("endpoint", gateways()), one("manager", &far_manager), false);
    edge(one("manager", &near_manager), one("registry", "registry"), false);
    if swap.remote {
        edge(one("manager", &far_manager), one("registry", "registry"), false);
    }
    found
}

/// Lies to a hop of upstream's, as a process in the client's pod.
pub(crate) fn lies(lab: &str, socket: &str) {
    in_runtime(async {
        let raw = Raw::connect(lab, socket).await;
        let now = std::time::SystemTime::now();
        let (own, me) = (raw.identity.svid(), raw.identity.id().clone());
        let forger = nsm_identity::ca::Authority::new(me.trust_domain(), now).expect("a CA");
        let forged = forger.identity(&me, Duration::from_secs(600), now).expect("an identity");
        let lies = [
            ("forged", raw.token_of(forged.svid(), &raw.peer, now)),
            ("expired", raw.token_of(own, &raw.peer, now - Duration::from_secs(3660))),
            ("misdirected", raw.token_of(own, &me, now)),
        ];
        for (what, token) in lies {
            let (url, fd) = file("/proc/self/ns/net");
            raw.fds.send(fd);
            let request = good(&format!("lie-{what}"), "lie0", url);
            let status = raw.request(request, Some(token), Duration::from_secs(10)).await.expect_err(what);
            assert_eq!(status.code(), Code::PermissionDenied, "{what}: {status}");
        }
    });
}

/// Who is behind a hop of upstream's is verified all the same: that hop passes on certificates that it does not know.
#[test]
fn certificates_of_hops_survive_upstreams_manager_and_forwarder() {
    let test = "certificates_of_hops_survive_upstreams_manager_and_forwarder";
    if harness::may_not(test) {
        return;
    }
    let Some(upstream) = nsm_upstream::program(test) else { return };
    for (theirs, strict) in [("node1/manager", "node1/forwarder"), ("node1/forwarder", "gw")] {
        let mesh = Mesh::up_with(&format!("certs_{}", theirs.replace('/', "_")), PODS, |plan| {
            for process in &mut plan.processes {
                if process.name == theirs {
                    process.exe = Some(upstream.clone());
                }
                if process.name == strict {
                    process.env.insert("NSM_ALL_HOPS_SIGNED".into(), "true".into());
                }
            }
        });
        let Some(mesh) = mesh else { return };
        mesh.client("nsc", "a", "kernel://plain/nsm0", &["--max-token-lifetime", TOKENS]);
        mesh.ready(&["nsc"]);
        let served = || mesh.log(theirs).matches("served NetworkService/Request").count();
        let first = served();
        assert!(first > 0, "{theirs} was not asked");
        harness::eventually_within(PATIENCE, "refreshes", || match served() {
            count if count > first + 1 => Ok(()),
            count => Err(count.to_string()),
        });
        // A client of upstream's hands nothing on, and is told why it gets nothing here.
        let manager = mesh.url("nsm.io.sock");
        let args = ["client", "--once", "--name", "odd", "--connect-to", &manager];
        let args = [&args[..], &["--network-services", "kernel://plain/odd0"]].concat();
        mesh.start_program("odd", "b", &upstream.display().to_string(), &args);
        let (how, said) = mesh.ended("odd");
        assert_eq!(how, "exit status 1", "{said}");
        mesh.says(strict, "nobody has handed on the certificate");
        mesh.end("nsc", Signal::TERM);
        mesh.no_wire_is_left(if theirs == "node1/forwarder" { &[] } else { &["a"] });
    }
}

/// A client and its endpoint on one node, as other tests of the mesh have them.
const PODS: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: gw, node: node1, endpoint: {services: [plain], cidrPrefix: [172.16.0.0/16]}}
";

#[test]
#[ignore = "takes minutes; cargo xtask test --all runs it"]
fn five_thousand_wires_leave_no_descriptors_at_upstreams_programs() {
    churn("five_thousand_wires_leave_no_descriptors_at_upstreams_programs", 5000, 1024);
}

/// Makes and closes wires through upstream's manager to upstream's endpoint, the client and the forwarder being ours.
/// Upstream's programs keep the descriptor of each namespace until the connection ends that it came on; with as many
/// namespaces as wires that is tested in `nsm-transport`.
fn churn(test: &str, wires: usize, limit: usize) {
    if harness::may_not(test) {
        return;
    }
    let Some(upstream) = nsm_upstream::program(test) else { return };
    let mesh = Mesh::up_with(test, PODS, |plan| {
        for process in plan.processes.iter_mut().filter(|p| ["node1/manager", "gw"].contains(&&*p.name)) {
            process.exe = Some(upstream.clone());
        }
    });
    let Some(mesh) = mesh else { return };
    let lab = &mesh.lab.plan.lab;
    let watched = [("node1/manager", "a"), ("gw", "gw")].map(|(name, pod)| {
        let inode = fs::metadata(format!("/run/netns/{lab}.{pod}")).expect("a namespace");
        let inode = std::os::unix::fs::MetadataExt::ino(&inode);
        (name, format!("/proc/{}/fd", mesh.pid(name).as_raw_nonzero()), format!("net:[{inode}]"))
    });
    let count = |directory: &str, wanted: &str| {
        let files: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().collect();
        let of_it =
            |file: &&fs::DirEntry| fs::read_link(file.path()).is_ok_and(|to| to.as_os_str() == wanted);
        (files.iter().filter(of_it).count(), files.len())
    };
    let before = watched.each_ref().map(|(_, directory, wanted)| count(directory, wanted));
    let done = std::sync::atomic::AtomicBool::new(false);
    let began = Instant::now();
    let peaks = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut peaks = [(0, 0); 2];
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                for (peak, (_, directory, wanted)) in peaks.iter_mut().zip(&watched) {
                    let (of_it, all) = count(directory, wanted);
                    *peak = (peak.0.max(of_it), peak.1.max(all));
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            peaks
        });
        let worked = catch_unwind(AssertUnwindSafe(|| mesh.inside("a", &format!("churn {wires} {limit}"))));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        let peaks = watcher.join().expect("no panic");
        assert!(worked.is_ok(), "some wires did not come up");
        peaks
    });
    println!(
        "{wires} wires in {:.1} s, at most {limit} descriptors a connection",
        began.elapsed().as_secs_f64()
    );
    for ((name, ..), (peak, before)) in watched.iter().zip(peaks.iter().zip(&before)) {
        println!(
            "  {name}: {} descriptors of the namespace at most ({} before), {} open files ({} before)",
            peak.0, before.0, peak.1, before.1
        );
    }
    // Two connections may overlap, and the manager holds a second descriptor while a wire is being made.
    assert!(peaks[0].0 <= 2 * limit + 50, "{peaks:?}");
    assert!(peaks[0].0 < wires, "it piled up: {peaks:?}");
    // The forwarder's limit is the default one.
    assert!(peaks[1].0 <= 2 * 1024 + 50, "{peaks:?}");
    let calls = mesh.log("node1/manager").matches("served NetworkService/Request").count();
    assert!(calls >= wires, "{calls} requests in the manager's log");
    mesh.no_wire_is_left(&["a"]);
}

/// The client of [`churn`], as a process in its pod.
pub(crate) fn make_and_close(lab: &str, amounts: &str) {
    use nsm_sdk::{
        client::{Client, ClientConfig},
        own_end::OwnNamespace,
        prefixes::AwarenessGroups,
    };
    use nsm_transport::{DialUrl, Pool, PoolConfig};
    let (wires, limit) = amounts.split_once(' ').expect("two numbers");
    let (wires, limit): (usize, usize) = (wires.parse().expect("a number"), limit.parse().expect("a number"));
    in_runtime(async {
        let source = nsm_identity::Source::from_env().await.expect("an identity");
        let manager: DialUrl = harness::url(lab, "nsm.io.sock").parse().expect("a URL");
        let config = ClientConfig {
            name: "churn".into(),
            connect_to: (&manager).into(),
            dial_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(15),
            labels: BTreeMap::new(),
            awareness_groups: AwarenessGroups::default(),
            takes_over: false,
            refreshes_together: false,
            liveness: None,
            names: None,
        };
        let pool = Pool::new(source, PoolConfig { descriptors: limit, ..PoolConfig::default() });
        let client = Client::new(config, pool.clone(), OwnNamespace::open().expect("a namespace"));
        // One after the other: of several at once for one namespace on one connection, upstream's manager now and then
        // closes the file of one while it passes on that of another. Of thousands it sometimes loses one all the same.
        let (mut lost, mut unclosed) = (0, 0);
        for index in 0..wires {
            let url = format!("kernel://plain/c{index}").parse().expect("a URL");
            let wire = loop {
                match client.request(index, &url).await {
                    Ok(wire) => break wire,
                    Err(error) if lost < wires / 100 => {
                        println!("wire {index} is asked for again: {error}");
                        lost += 1;
                    }
                    Err(error) => panic!("{index}: {error}"),
                }
            };
            if let Err(error) = wire.close().await {
                println!("wire {index} is not closed in good order: {error}");
                unclosed += 1;
            }
        }
        println!("{lost} wires were asked for again, {unclosed} not closed in good order");
        assert!(unclosed <= wires / 100, "{unclosed} of {wires}");
        assert!(pool.handshakes() as usize >= wires / limit, "{} handshakes", pool.handshakes());
    });
}

/// Another Workload API than ours: it refuses whom it does not know yet, has CAs that change, one for each of two trust
/// domains, and forgets everything when it is killed.
#[test]
fn wires_live_on_another_workload_api_through_rotation_and_restart() {
    let test = "wires_live_on_another_workload_api_through_rotation_and_restart";
    if harness::may_not(test) {
        return;
    }
    let Some(upstream) = nsm_upstream::program(test) else { return };
    let mesh = Mesh::up_with(test, PODS, |plan| {
        for process in plan.processes.iter_mut().filter(|process| process.name == "identity") {
            process.exe = Some(upstream.clone());
        }
        // It is entered later.
        plan.pods.retain(|pod| pod.pod != "b");
    });
    let Some(mut mesh) = mesh else { return };
    mesh.lab.plan.pods.push(nsm_lab::plan::PodEntry {
        pod: "b".into(),
        node: "node1".into(),
        spiffe_id: "spiffe://elsewhere.lab/pod/b".into(),
    });
    mesh.client("stranger", "b", "kernel://plain/nsm0", &[]);
    harness::eventually("who is not entered is refused", || {
        let log = mesh.log("identity");
        if log.contains("refused FetchX509SVID") { Ok(()) } else { Err(log) }
    });
    mesh.lab.write_identity_config().unwrap_or_else(|e| panic!("{}", e.chain()));
    let mesh = mesh;
    let log = || mesh.log("identity");
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    let was = mesh.has("a", "nsm0").index;
    let names = ["pod/a", "pod/gw", "node1/manager", "node1/forwarder", "registry"];
    let told = |times: usize| {
        harness::eventually(&format!("everybody has {times} certificates"), || {
            let of = |name: &&&str| log().matches(&format!("{name} federated=")).count() < times;
            names.iter().find(of).map_or(Ok(()), |name| Err(format!("{name}: {}", log())))
        });
    };
    let works = |name: &str| {
        mesh.client(name, "a", &format!("kernel://plain/{name}"), &[]);
        mesh.ready(&[name]);
        mesh.end(name, Signal::TERM);
        assert_eq!(mesh.has("a", "nsm0").index, was, "the first wire is as it was");
    };
    for times in 2..4 {
        mesh.signal("identity", Signal::HUP);
        told(times);
        works(&format!("turn{times}"));
    }
    // Whoever is of another trust domain, whose roots came along with the rotation, is served as anybody else.
    mesh.ready(&["stranger"]);
    mesh.end("stranger", Signal::TERM);
    // Killed, it comes back with other CAs than anybody has.
    let before = log().matches("sent FetchX509SVID").count();
    mesh.end("identity", Signal::KILL);
    mesh.restart("identity");
    harness::eventually("everybody asks again", || {
        let now = log().matches("sent FetchX509SVID").count();
        if now >= before + names.len() { Ok(()) } else { Err(log()) }
    });
    works("again");
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}
