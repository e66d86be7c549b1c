//! What an operator asks: get, explain, check, log, traces. Everything that can be wrong is made wrong.

use std::{
    collections::BTreeSet,
    os::unix::process::CommandExt as _,
    process::{Command, Output, Stdio},
};

use nsm_kernel::{
    Kernel,
    netns::Namespace,
    plan::{EndPlan, Side, WirePlan},
};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    common,
    harness::{Mesh, NSM, eventually, may_not},
};

/// Somebody who gets what he wants, and one whom nobody serves.
const PODS: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: vpn, node: node1, endpoint: {services: [plain, picky], labels: {app: vpn}, cidrPrefix: [172.16.1.0/24]}}
- {name: web, node: node1, endpoint: {services: [picky], labels: {app: web}, cidrPrefix: [172.16.2.0/24]}}
";

impl Mesh {
    /// Runs a command of the operator on this lab.
    fn nsm(&self, args: &[&str]) -> Output {
        let mut command = Command::new(NSM);
        command.args(args).args(["--lab", &self.lab.plan.lab]).stdin(Stdio::null()).env_remove("NO_COLOR");
        command.output().expect("start nsm")
    }

    /// What it prints; it must succeed.
    pub(crate) fn told(&self, args: &[&str]) -> String {
        let output = self.nsm(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        let told = String::from_utf8(output.stdout).expect("UTF-8");
        // The first bytes of every JWT, and of every PEM.
        assert!(
            !told.contains("eyJ") && !told.contains("-----BEGIN"),
            "{args:?} shows a token or a key: {told}"
        );
        assert!(!told.contains('\x1b'), "{args:?}: no colours where no terminal is: {told}");
        told
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let told = self.told(args);
        serde_json::from_str(&told).unwrap_or_else(|e| panic!("{args:?}: {e}: {told}"))
    }

    /// The findings of `nsm check` on the mesh that are not good, and whether its status says so.
    fn findings(&self) -> Vec<(String, String, String, String)> {
        let output = self.nsm(&["check", "--mesh", "--json"]);
        let found: Vec<Value> =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output)));
        let field = |f: &Value, key: &str| f[key].as_str().unwrap_or_default().to_owned();
        let found: Vec<_> = found
            .iter()
            .map(|f| (field(f, "level"), field(f, "check"), field(f, "what"), field(f, "hint")))
            .filter(|(level, ..)| level != "ok")
            .collect();
        let fails = found.iter().any(|(level, ..)| level == "fail");
        assert_eq!(output.status.code(), Some(i32::from(fails)), "{found:?}");
        found
    }

    /// What fails; a try too early is only a warning.
    fn failing(&self) -> Vec<String> {
        self.findings()
            .into_iter()
            .filter(|(level, ..)| level == "fail")
            .map(|(_, _, what, _)| what)
            .collect()
    }

    /// Waits for a line of `nsm check`; each says what to do.
    fn finds(&self, level: &str, check: &str, what: &str) {
        eventually(&format!("check finds {check}: {what}"), || {
            let found = self.findings();
            let of =
                |f: &&(String, String, String, String)| f.0 == level && f.1 == check && f.2.contains(what);
            match found.iter().find(of) {
                Some((.., hint)) if !hint.is_empty() => Ok(()),
                _ => Err(format!("{found:#?}")),
            }
        });
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_wire_says_why_it_is_as_it_is() {
    let Some(mesh) = Mesh::up("a_wire_says_why_it_is_as_it_is", PODS) else { return };
    mesh.client("c", "a", "kernel://picky/nsm0?color=red", &["--max-token-lifetime", "5m"]);
    mesh.ready(&["c"]);
    mesh.pings("a", "172.16.1.0");

    let connections = mesh.json(&["get", "connections", "-o", "json"]);
    let c = &connections[0];
    let shown = [&c["connection"], &c["client"], &c["service"], &c["endpoint"], &c["state"], &c["mechanism"]];
    assert_eq!(shown, ["c-0", "c", "picky", "vpn", "UP", "LOCAL KERNEL"]);
    assert_eq!(c["path"], serde_json::json!(["c", "manager-node1", "forwarder-node1", "vpn"]));
    assert_eq!(connections.as_array().map(Vec::len), Some(1), "{connections}");
    let table = mesh.told(&["get", "connections"]);
    let columns: Vec<_> = table.lines().next().unwrap_or_default().split_whitespace().collect();
    assert_eq!(
        columns,
        ["CONNECTION", "CLIENT", "SERVICE", "ENDPOINT", "STATE", "MECHANISM", "ADDRESS", "AGE", "EXPIRES"]
    );
    let wide = mesh.told(&["get", "connections", "-o", "wide", "c"]);
    assert!(
        wide.contains("c > manager-node1 > forwarder-node1 > vpn") && wide.contains("color=red"),
        "{wide}"
    );
    let yaml = mesh.told(&["get", "connections", "-o", "yaml"]);
    assert!(yaml.contains("client: c\n") && yaml.contains("service: picky\n"), "{yaml}");
    let names = |kind: &str| -> Vec<String> {
        let all = mesh.json(&["get", kind, "-o", "json"]);
        all.as_array().into_iter().flatten().filter_map(|v| v["name"].as_str().map(str::to_owned)).collect()
    };
    assert!(["picky", "plain"].iter().all(|name| names("services").iter().any(|n| n == name)));
    assert_eq!(names("endpoints"), ["forwarder-node1", "vpn", "web"]);
    let processes: BTreeSet<_> = names("processes").into_iter().collect();
    let all = ["c", "forwarder-node1", "identity", "manager-node1", "registry", "vpn", "web"];
    assert_eq!(processes, all.map(str::to_owned).into(), "every role tells of itself");
    let wires = mesh.json(&["get", "wires", "-o", "json"]);
    assert_eq!((&wires[0]["state"], &wires[0]["kind"]), (&"up".into(), &"veth".into()), "{wires}");

    for what in ["c", "c-0", "picky"] {
        let told = mesh.told(&["explain", what]);
        for line in [
            "connection c-0 of c: UP to service picky by vpn",
            "hop 0 c client (c-0): token of spiffe://",
            "hop 2 forwarder-node1 forwarder",
            "taken forwarder-node1: match 1: labels fit {p2p=true} (discover-forwarder)",
            "taken vpn: match 1: labels fit {app=vpn} (discover)",
            "refused web: match 1: label app is \"web\", not \"vpn\" (discover)",
            "mechanism LOCAL KERNEL",
            "MTU 9000: both ends are on this node",
            "client's end nsm0 in net:[",
        ] {
            assert!(told.contains(line), "{line:?} is not in\n{told}");
        }
        assert!(!told.contains("not asked"), "{told}");
    }
    let json = mesh.json(&["explain", "c", "--json"]);
    let near = &json["connections"][0]["hops"][2]["wire"]["near"];
    assert!(near["rxPackets"].as_u64() > Some(0) && near["txPackets"].as_u64() > Some(0), "{json}");
    assert_eq!(mesh.failing(), [""; 0], "all is well");

    let output = mesh.nsm(&["explain", "nonsense"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("nobody knows of \"nonsense\"") && text(&output).contains("picky"));
    assert_eq!(mesh.nsm(&["get", "wires", "nonsense"]).status.code(), Some(1));
    mesh.end("c", Signal::TERM);
}

#[test]
fn a_request_that_failed_is_explained_at_every_hop() {
    let Some(mesh) = Mesh::up("a_request_that_failed_is_explained_at_every_hop", PODS) else { return };
    mesh.end("vpn", Signal::TERM);
    mesh.client("c", "a", "kernel://picky/nsm0", &[]);
    eventually("it is tried twice", || {
        let failures = mesh.json(&["get", "failures", "-o", "json"]);
        let all = failures.as_array().cloned().unwrap_or_default();
        let hops: BTreeSet<_> = all.iter().filter_map(|f| f["hop"].as_str()).collect();
        let again = all.iter().all(|f| f["count"].as_u64() > Some(1));
        match !all.is_empty() && hops == BTreeSet::from(["c", "manager-node1", "forwarder-node1"]) && again {
            true => Ok(()),
            false => Err(format!("{failures:#}")),
        }
    });
    let told = mesh.told(&["explain", "c"]);
    for line in [
        "process c, client: no wire to picky",
        "at forwarder-node1: NotFound of c for picky: network service endpoint candidates not found",
        "refused web: match 1: label app is \"web\", not \"vpn\" (discover)",
        "hint: start an endpoint with these labels",
    ] {
        assert!(told.contains(line), "{line:?} is not in\n{told}");
    }
    let failures = mesh.json(&["get", "failures", "-o", "json"]);
    assert_eq!(failures.as_array().map(Vec::len), Some(3), "equal ones are one: {failures:#}");
    mesh.finds("fail", "process", "c (client) is not ready");
    mesh.finds("warn", "requests", "c for picky failed");
    mesh.end("c", Signal::TERM);
}

#[test]
fn every_failing_line_of_check_has_its_reason() {
    let Some(mesh) = Mesh::up_with("every_failing_line_of_check_has_its_reason", PODS, |plan| {
        plan.svid_ttl = Some("12s".into());
    }) else {
        return;
    };
    mesh.client("c", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["c"]);
    assert_eq!(mesh.failing(), [""; 0]);

    // A wire that somebody has changed, and a link that nobody knows.
    let pod = mesh.lab.namespace("a").expect("a");
    let ip = |args: &str| {
        let run = || Command::new("ip").args(args.split(' ')).status();
        assert!(pod.run(run).expect("enter").expect("ip").success(), "ip {args}");
    };
    ip("address flush dev nsm0");
    mesh.finds("fail", "wires", "add address");
    ip("link set nsm0 down");
    mesh.finds("fail", "wires", "the wire of c-0 is not as planned");
    let node = mesh.lab.namespace("node1").expect("node1").try_clone().expect("copy");
    let kernel = Kernel::new(node).expect("kernel");
    let other = Namespace::unnamed().expect("namespace");
    let end = |side, ns: &Namespace| EndPlan::new(side, ns.id(), "lost0", "lost-0");
    let lost = WirePlan::veth("lost", end(Side::Near, &pod), end(Side::Far, &other));
    kernel.apply(&lost, &[&pod, &other]).expect("apply");
    mesh.finds("fail", "orphans", "lost0");
    drop(other);

    mesh.signal("web", Signal::STOP);
    mesh.finds("fail", "process", "it does not answer within");
    mesh.signal("web", Signal::CONT);

    mesh.end("node1/forwarder", Signal::KILL);
    mesh.finds("warn", "process", "its process is gone");
    mesh.end("registry", Signal::KILL);
    mesh.finds("fail", "neighbour", "manager-node1 (manager) does not reach its registry");
    mesh.end("node1/manager", Signal::KILL);
    mesh.finds("fail", "neighbour", "vpn (endpoint) does not reach its manager");
    mesh.finds("fail", "connections", "c-0 to plain is down");

    mesh.end("identity", Signal::KILL);
    mesh.endpoint("late", "b", &[]);
    mesh.finds("fail", "process", "late (endpoint) waits for an identity");
    mesh.finds("fail", "identity", "is not renewed");
}

#[test]
fn a_manager_without_a_forwarder_is_found() {
    let Some(mesh) = Mesh::up("a_manager_without_a_forwarder_is_found", PODS) else { return };
    mesh.end("node1/forwarder", Signal::TERM);
    mesh.finds("fail", "forwarder", "manager-node1 has no forwarder");
}

#[test]
fn a_node_that_is_not_fit_is_told_so() {
    let test = "a_node_that_is_not_fit_is_told_so";
    if may_not(test) {
        return;
    }
    let findings = |command: &mut Command| -> Vec<Value> {
        let output =
            command.args(["check", "--node", "--json"]).stdin(Stdio::null()).output().expect("start");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output)))
    };
    let level = |found: &[Value], check: &str| {
        found.iter().find(|f| f["check"] == check).map(|f| f["level"].clone()).unwrap_or_default()
    };
    // A node whose uplink is too small for IPv6 over VXLAN.
    let ns = Namespace::unnamed().expect("namespace");
    let small = ns
        .run(|| {
            for args in [
                "link add up0 mtu 1300 type veth peer name other",
                "address add 198.51.100.1/24 dev up0",
                "link set up0 up",
            ] {
                assert!(Command::new("ip").args(args.split(' ')).status().expect("ip").success(), "{args}");
            }
            findings(Command::new(NSM).env("NSM_TUNNEL_IP", "198.51.100.1"))
        })
        .expect("enter");
    assert_eq!(level(&small, "uplink"), "fail", "{small:#?}");
    assert_eq!((level(&small, "veth"), level(&small, "vxlan")), ("ok".into(), "ok".into()), "{small:#?}");
    let without = ns.run(|| findings(&mut Command::new(NSM))).expect("enter");
    assert_eq!(level(&without, "uplink"), "warn", "{without:#?}");
    let absent = ns.run(|| findings(Command::new(NSM).env("SPIFFE_ENDPOINT_SOCKET", "unix:///absent.sock")));
    assert_eq!(level(&absent.expect("enter"), "workload-api"), "fail");
    // Somebody who may do nothing.
    let directory = tempfile::tempdir().expect("directory");
    let program = common::program_for_everybody(directory.path());
    let nobody = findings(Command::new(program).uid(65534).gid(65534));
    assert_eq!(level(&nobody, "capabilities"), "fail", "{nobody:#?}");
    assert_eq!(level(&nobody, "/run/nsm"), "fail", "{nobody:#?}");
}

#[test]
fn only_the_owner_looks_at_a_process() {
    let Some(mesh) = Mesh::up("only_the_owner_looks_at_a_process", PODS) else { return };
    let directory = tempfile::tempdir().expect("directory");
    let program = common::program_for_everybody(directory.path());
    let socket = mesh.lab.plan.paths().introspect().join("registry-registry.sock");
    let url = format!("unix://{}", socket.display());
    let ask = |command: &mut Command| {
        command.args(["get", "processes", "--at", &url]).stdin(Stdio::null()).output().expect("start nsm")
    };
    let root = ask(&mut Command::new(&program));
    assert!(root.status.success(), "{}", text(&root));
    let nobody = ask(Command::new(&program).uid(65534).gid(65534));
    assert_eq!(nobody.status.code(), Some(1), "{}", text(&nobody));
    assert!(text(&nobody).contains("no process of nsm answers"), "{}", text(&nobody));
}

#[test]
fn what_is_logged_changes_while_it_runs_and_is_quiet_when_all_is_well() {
    let test = "what_is_logged_changes_while_it_runs_and_is_quiet_when_all_is_well";
    let Some(mesh) = Mesh::up_with(test, PODS, |plan| {
        for process in &mut plan.processes {
            process.env.insert("NSM_LOG_FORMAT".into(), "json".into());
            process.env.insert("NSM_LOG_LEVEL".into(), "info".into());
        }
        plan.svid_ttl = Some("4s".into());
    }) else {
        return;
    };
    let quick = ["--max-token-lifetime", "3s", "--log-format", "json"];
    mesh.client("c", "a", "kernel://plain/nsm0", &quick);
    mesh.ready(&["c"]);
    let answers = || mesh.json(&["get", "connections", "-o", "json"])[0]["answers"].as_u64().unwrap_or(0);
    let lines = |name: &str| mesh.log(name).lines().count();
    let everybody = ["c", "vpn", "web", "node1/manager", "node1/forwarder", "registry", "identity"];
    eventually("it is refreshed", || if answers() > 2 { Ok(()) } else { Err(answers().to_string()) });
    let before: Vec<_> = everybody.map(|name| (name, lines(name))).into();
    let seen = answers();
    eventually("it is refreshed ten times", || {
        if answers() > seen + 10 { Ok(()) } else { Err(answers().to_string()) }
    });
    let after: Vec<_> = everybody.map(|name| (name, lines(name))).into();
    assert_eq!(before, after, "{:?}", everybody.map(|name| mesh.log(name)));
    for name in everybody {
        for line in mesh.log(name).lines() {
            let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{name}: {e}: {line}"));
            assert!(line["level"].is_string() && line["timestamp"].is_string(), "{line}");
        }
    }

    let manager = "node1/manager";
    let debug = |name: &str| mesh.log(name).contains("\"level\":\"DEBUG\"");
    assert_eq!(
        mesh.told(&["log", "info,nsm_mesh=debug", "--process", "manager"]),
        "manager-node1: nsm_mesh=debug,info\n"
    );
    eventually("the manager logs more", || if debug(manager) { Ok(()) } else { Err(mesh.log(manager)) });
    assert!(!debug("node1/forwarder"), "only who was meant");
    let levels = || {
        let all = mesh.json(&["get", "processes", "manager-node1", "-o", "json"]);
        all[0]["logLevel"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(levels(), "nsm_mesh=debug,info");
    mesh.told(&["log", "reset", "--process", "manager-node1"]);
    assert_eq!(levels(), "info");
    mesh.signal(manager, Signal::USR1);
    eventually("USR1 logs everything", || if levels() == "trace" { Ok(()) } else { Err(levels()) });
    mesh.signal(manager, Signal::USR2);
    eventually("USR2 takes it back", || if levels() == "info" { Ok(()) } else { Err(levels()) });
    let bad = mesh.nsm(&["log", "loud"]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(text(&bad).contains("log level \"loud\": expected off, error, warn"), "{}", text(&bad));
    let nobody = mesh.nsm(&["log", "debug", "--process", "nonsense"]);
    assert!(text(&nobody).contains("no process is called nonsense") && !nobody.status.success());
    mesh.end("c", Signal::TERM);
}

#[test]
fn what_a_watch_shows_changes_with_the_mesh() {
    use std::io::{BufRead as _, BufReader};
    let Some(mesh) = Mesh::up("what_a_watch_shows_changes_with_the_mesh", PODS) else { return };
    let mut watch = Command::new(NSM)
        .args(["get", "connections", "-o", "json", "--watch", "--lab", &mesh.lab.plan.lab])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start nsm");
    let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
    assert_eq!(lines.next().and_then(Result::ok).as_deref(), Some("[]"));
    mesh.client("c", "a", "kernel://plain/nsm0", &[]);
    let seen = lines.by_ref().map_while(Result::ok).any(|line| line.contains("\"client\": \"c\""));
    assert!(seen);
    watch.kill().expect("it runs");
    watch.wait().expect("it ended");
    mesh.ready(&["c"]);
    mesh.end("c", Signal::TERM);
}

#[test]
fn upstreams_counters_are_served_and_written_into_the_path() {
    let test = "upstreams_counters_are_served_and_written_into_the_path";
    let Some(mesh) = Mesh::up_with(test, PODS, |plan| {
        let forwarder = plan.processes.iter_mut().find(|p| p.name == "node1/forwarder").expect("planned");
        forwarder.env.insert("PROMETHEUS".into(), "true".into());
    }) else {
        return;
    };
    mesh.client("c", "a", "kernel://plain/nsm0", &["--max-token-lifetime", "3s"]);
    mesh.ready(&["c"]);
    mesh.pings("a", "172.16.1.0");
    let page = mesh.lab.namespace("node1").expect("node1").run(|| {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect("127.0.0.1:8081").expect("upstream's port");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("ask");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("read");
        page
    });
    let page = page.expect("enter");
    for side in ["server", "client"] {
        for counter in ["rx_bytes", "tx_bytes", "rx_packets", "tx_packets", "drops"] {
            let name = format!(
                "\n{side}_{counter}_total{{connection_id=\"c-0\",network_service=\"plain\",nsc=\"c\",nsc_interface=\"nsm0\","
            );
            assert!(page.contains(&name), "{name} is not in\n{page}");
        }
    }
    assert!(page.contains("\nnsm_request_seconds"), "{page}");
    eventually("the path has the counters", || {
        let seen = mesh.json(&["get", "connections", "-o", "json"]);
        let counted =
            seen[0]["hops"][2]["metrics"]["server_rx_packets"].as_str().and_then(|n| n.parse::<u64>().ok());
        if counted > Some(0) { Ok(()) } else { Err(format!("{seen:#}")) }
    });
    mesh.end("c", Signal::TERM);
}

#[test]
fn completions_know_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let output = Command::new(NSM).args(["completions", shell]).output().expect("start nsm");
        let script = String::from_utf8(output.stdout).expect("UTF-8");
        for word in
            ["manager", "get", "explain", "check", "log", "failures", "--introspect-dir", "introspect-dir"]
        {
            assert!(script.contains(word) || word.starts_with("--"), "{shell} lacks {word}");
        }
    }
}
