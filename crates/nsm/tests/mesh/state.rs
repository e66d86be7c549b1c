//! What outlives processes, and what must not: wires under killed daemons, and wires of dead clients.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nsm_kernel::{
    EndFacts, Kernel, Nsids,
    store::{Record, Store},
};
use nsm_lab::{network::Seen, plan::Paths};
use rustix::process::Signal;

use crate::harness::{Mesh, eventually};

const PODS: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: gw, node: node1, endpoint: {services: [plain], cidrPrefix: [172.16.1.0/24]}}
";
/// Tokens that live so long are refreshed after a second, and over while a test waits.
const SHORT: &[&str] = &["--max-token-lifetime", "6s"];

/// The one record of the forwarder of `node1`.
fn record(mesh: &Mesh) -> Record {
    record_of(mesh, "node1")
}

/// The one record of a node's forwarder.
pub(crate) fn record_of(mesh: &Mesh, node: &str) -> Record {
    let mut records = Store::look(mesh.state_dir(node)).expect("read").records;
    assert_eq!(records.len(), 1, "{records:?}");
    records.remove(0)
}

/// Both ends of a wire, as the kernel shows them to the node.
fn ends(mesh: &Mesh, id: &str, nsids: Nsids) -> [EndFacts; 2] {
    let node = mesh.lab.namespace("node1").expect("a node").try_clone().expect("clone");
    let (near, far) = Kernel::new(node).expect("netlink").facts(id, nsids).expect("look");
    [near.expect("the client's end"), far.expect("the endpoint's end")]
}

/// What may not change of an end.
fn identity(ends: &[EndFacts; 2]) -> [(u32, String); 2] {
    let of = |end: &EndFacts| (end.ifindex, format!("{:?}", end.mac));
    [of(&ends[0]), of(&ends[1])]
}

/// Where the trace of a node's forwarder goes.
pub(crate) fn trace_of(lab: &Paths, node: &str) -> PathBuf {
    lab.root.join(format!("trace-{node}"))
}

/// Starts a node's forwarder again below strace, and waits for it; returns where the trace goes, and `None` where
/// there is no strace, which is said.
pub(crate) fn restart_traced(mesh: &Mesh, test: &str, node: &str) -> Option<PathBuf> {
    let name = format!("{node}/forwarder");
    if std::process::Command::new("strace").arg("-V").output().is_err() {
        println!("SKIPPED part of {test}: strace is not installed, so writes are not counted");
        mesh.restart(&name);
        return None;
    }
    let trace = trace_of(&mesh.lab.plan.paths(), node);
    let plan = &mesh.lab.plan;
    let forwarder = plan.processes.iter().find(|p| p.name == name).expect("planned");
    let path = trace.to_string_lossy().into_owned();
    // -D: the traced program keeps the pid of what was started, by which identity knows it.
    let strace = ["-D", "-f", "-qq", "-e", "trace=sendto,sendmsg", "-o", &path, crate::harness::NSM];
    let args: Vec<_> = strace.into_iter().chain(forwarder.args.iter().map(String::as_str)).collect();
    mesh.start_program(&name, node, "strace", &args);
    mesh.lab.write_identity_config().expect("write");
    mesh.ready(&[&name]);
    Some(trace)
}

/// The changes of the kernel's network configuration in a trace, by what they do.
pub(crate) fn written_in(trace: &str) -> Vec<String> {
    let kind = |text: &str| {
        let text = text.split([',', ' ', '}']).next().unwrap_or_default();
        // Sockets of other namespaces strace does not know: it shows the numbers of what they send. Those of each
        // object are in a row: new, gone, asked for, set.
        let numbered = |number: usize| {
            let object = ["LINK", "ADDR", "ROUTE", "NEIGH", "RULE", "OTHER"][(number / 4 - 4).min(5)];
            format!("RTM_{}{object}", ["NEW", "DEL", "GET", "SET"][number % 4])
        };
        match text.strip_prefix("0x") {
            Some(hex) => {
                usize::from_str_radix(hex, 16).ok().filter(|n| (0x10..0x80).contains(n)).map(numbered)
            }
            None => Some(text.to_owned()),
        }
    };
    let kinds = trace.split("nlmsg_type=").skip(1).filter_map(kind);
    // RTM_NEWNSID only numbers a namespace for ourselves; there is no other way to ask for the number of one.
    let changes = |kind: &String| {
        ["RTM_NEW", "RTM_DEL", "RTM_SET"].iter().any(|change| kind.starts_with(change))
            && kind != "RTM_NEWNSID"
    };
    kinds.filter(changes).collect()
}

/// No change of the kernel's network configuration may be in a trace.
pub(crate) fn wrote_nothing(trace: &Path) {
    let trace = fs::read_to_string(trace).expect("a trace");
    assert!(trace.contains("RTM_GETLINK"), "netlink is seen in the trace");
    assert_eq!(written_in(&trace), [""; 0], "{trace}");
}

#[test]
fn what_is_written_is_seen_in_a_trace_whoever_writes_it() {
    let trace = "\
1 sendto(16, [{nlmsg_len=48, nlmsg_type=RTM_GETLINK, nlmsg_flags=0}, {nlmsg_len=28, nlmsg_type=RTM_NEWNSID, nlmsg_flags=0}]
1 sendto(16, {nlmsg_len=48, nlmsg_type=RTM_DELLINK, nlmsg_flags=0}
1 sendto(44, [{nlmsg_len=24, nlmsg_type=0x16 /* NLMSG_??? */, nlmsg_flags=0}, {nlmsg_len=40, nlmsg_type=0x13 /* NLMSG_??? */}]
1 sendto(44, [{nlmsg_len=24, nlmsg_type=0x15 /* NLMSG_??? */}, {nlmsg_len=24, nlmsg_type=0x20 /* NLMSG_??? */}]
1 sendto(45, [{nlmsg_len=24, nlmsg_type=0xa00 /* NLMSG_??? */}, {nlmsg_len=24, nlmsg_type=NLMSG_DONE}]
";
    assert_eq!(written_in(trace), ["RTM_DELLINK", "RTM_SETLINK", "RTM_DELADDR", "RTM_NEWRULE"]);
}

#[test]
fn a_killed_forwarder_comes_back_and_adopts_its_wires_without_a_write() {
    let test = "a_killed_forwarder_comes_back_and_adopts_its_wires_without_a_write";
    let Some(mesh) = Mesh::up(test, PODS) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", SHORT);
    mesh.ready(&["client"]);
    let before = record(&mesh);
    let was = ends(&mesh, &before.plan.id, before.nsids);
    mesh.end("node1/forwarder", Signal::KILL);
    assert_eq!(
        identity(&ends(&mesh, &before.plan.id, before.nsids)),
        identity(&was),
        "wires need no process"
    );

    let trace = restart_traced(&mesh, test, "node1");
    mesh.says("node1/forwarder", "found wires of an earlier process wires=1");
    // A refresh carries a later expiry, which goes into the record: the connection is claimed again.
    let bytes = |record: &Record| record.data.to_string();
    eventually("the wire is refreshed", || {
        let now = record(&mesh);
        if bytes(&now) == bytes(&before) { Err(bytes(&now)) } else { Ok(()) }
    });
    let now = record(&mesh);
    assert_eq!(now.plan, before.plan, "{:#?}", now.plan);
    let is = ends(&mesh, &before.plan.id, before.nsids);
    assert_eq!(identity(&is), identity(&was));
    assert!(is[0].counters.rx_bytes >= was[0].counters.rx_bytes, "counters go on: {is:?} {was:?}");
    if let Some(trace) = trace {
        wrote_nothing(&trace);
    }
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn a_killed_manager_comes_back_and_wires_stay() {
    let Some(mesh) = Mesh::up("a_killed_manager_comes_back_and_wires_stay", PODS) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", SHORT);
    mesh.ready(&["client"]);
    let before = record(&mesh);
    let was = ends(&mesh, &before.plan.id, before.nsids);
    mesh.end("node1/manager", Signal::KILL);
    mesh.restart("node1/manager");
    eventually("the wire is refreshed", || {
        let now = record(&mesh);
        if now.data == before.data { Err(now.data.to_string()) } else { Ok(()) }
    });
    assert_eq!(identity(&ends(&mesh, &before.plan.id, before.nsids)), identity(&was));
    // What is new finds everybody again.
    mesh.client("second", "b", "kernel://plain/nsm0", &[]);
    mesh.ready(&["second"]);
    for client in ["client", "second"] {
        mesh.end(client, Signal::TERM);
    }
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

/// The process that comes back remembers nobody: its client tells it what it has.
#[test]
fn a_killed_endpoint_comes_back_and_its_wire_stays_what_it_was() {
    let test = "a_killed_endpoint_comes_back_and_its_wire_stays_what_it_was";
    let Some(mesh) = Mesh::up(test, PODS) else { return };
    // The first addresses are free again, so whoever begins anew gives those.
    mesh.client("earlier", "b", "kernel://plain/nsm0", &[]);
    mesh.ready(&["earlier"]);
    mesh.client("client", "a", "kernel://plain/nsm0", &["--max-token-lifetime", "12s"]);
    mesh.ready(&["client"]);
    mesh.end("earlier", Signal::TERM);
    eventually("one wire is left", || {
        let records = crate::harness::records(&mesh.lab.plan.lab);
        if records.len() == 1 { Ok(()) } else { Err(format!("{records:?}")) }
    });
    let seen = || {
        ["a", "gw"].map(|pod| {
            let mut addresses = Seen::of(&mesh.lab.namespace(pod).expect("a pod")).expect("read").addresses;
            addresses.retain(|seen| seen.interface != "lo" && seen.address.addr().is_ipv4());
            (mesh.links(pod), addresses)
        })
    };
    let (was, plan, asked) = (seen(), record(&mesh).plan, mesh.asked("node1/forwarder", "gw"));
    assert!(was.iter().all(|(links, addresses)| (links.len(), addresses.len()) == (1, 1)), "{was:?}");
    let pinging = mesh.flood("a", "172.16.1.2");
    mesh.end("gw", Signal::KILL);
    mesh.restart("gw");
    mesh.has_asked("node1/forwarder", "gw", asked + 1);
    let known = record(&mesh);
    eventually("the new process has the wire", || {
        let now = record(&mesh);
        if now.data == known.data { Err(mesh.log("client")) } else { Ok(()) }
    });
    let row = pinging.end().expect("enter");
    assert!(row.sent > 0 && row.lost() == 0, "{row:?}\n{}", mesh.log("client"));
    assert_eq!(record(&mesh).plan, plan);
    assert_eq!(seen(), was, "interfaces, numbers, hardware addresses and addresses");
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn a_connection_closes_after_both_were_killed() {
    let Some(mesh) = Mesh::up("a_connection_closes_after_both_were_killed", PODS) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    for daemon in ["node1/manager", "node1/forwarder"] {
        mesh.end(daemon, Signal::KILL);
    }
    for daemon in ["node1/manager", "node1/forwarder"] {
        mesh.restart(daemon);
    }
    // No refresh is due for minutes: the daemons know of the connection only what their predecessors left.
    assert_eq!(mesh.links("a").len(), 1);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn a_killed_client_loses_its_wire_when_its_token_expires() {
    let Some(mesh) = Mesh::up("a_killed_client_loses_its_wire_when_its_token_expires", PODS) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", &["--max-token-lifetime", "3s"]);
    mesh.client("patient", "b", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client", "patient"]);
    mesh.end("client", Signal::KILL);
    mesh.lost("a", "nsm0");
    eventually("its record is gone, the other's is not", || {
        let records = crate::harness::records(&mesh.lab.plan.lab);
        if records.len() == 1 { Ok(()) } else { Err(format!("{records:?}")) }
    });
    mesh.has("b", "nsm0");
    mesh.end("patient", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn a_killed_client_that_comes_back_goes_on_with_its_wire() {
    let test = "a_killed_client_that_comes_back_goes_on_with_its_wire";
    // One pair of addresses: what a second wire would not get.
    let Some(mesh) = Mesh::up(test, &PODS.replace("172.16.1.0/24", "172.16.1.2/31")) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    let before = record(&mesh);
    let was = ends(&mesh, &before.plan.id, before.nsids);
    mesh.end("client", Signal::KILL);
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    mesh.says("client", "going on with the wire of an earlier process");
    assert_eq!(record(&mesh).plan, before.plan);
    assert_eq!(identity(&ends(&mesh, &before.plan.id, before.nsids)), identity(&was));
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn a_pod_that_is_gone_loses_its_wire_at_once() {
    let Some(mesh) = Mesh::up("a_pod_that_is_gone_loses_its_wire_at_once", PODS) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.client("other", "b", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client", "other"]);
    assert_eq!(mesh.links("gw").len(), 2);
    mesh.end("client", Signal::KILL);
    // The lab holds a descriptor of the namespace too; only the kernel object's last reference ends it.
    mesh.lab.remove_namespace("a").expect("delete");
    eventually("the endpoint's end is gone", || {
        let links = mesh.links("gw");
        if links.len() == 1 { Ok(()) } else { Err(format!("{links:?}\n{}", mesh.log("node1/forwarder"))) }
    });
    mesh.says("node1/forwarder", "the network namespace of its pod is gone");
    eventually("its record is gone", || {
        let records = crate::harness::records(&mesh.lab.plan.lab);
        if records.len() == 1 { Ok(()) } else { Err(format!("{records:?}")) }
    });
    mesh.end("other", Signal::TERM);
    mesh.no_wire_is_left(&["b", "gw"]);
    mesh.inside("b", "idle wires");
}

#[test]
fn a_wire_that_nobody_claims_after_a_restart_goes_and_is_counted() {
    let Some(mesh) = Mesh::up("a_wire_that_nobody_claims_after_a_restart_goes_and_is_counted", PODS) else {
        return;
    };
    mesh.client("client", "a", "kernel://plain/nsm0", &["--max-token-lifetime", "4s"]);
    mesh.ready(&["client"]);
    mesh.end("node1/forwarder", Signal::KILL);
    mesh.end("client", Signal::KILL);
    mesh.restart("node1/forwarder");
    mesh.says("node1/forwarder", "found wires of an earlier process wires=1");
    mesh.lost("a", "nsm0");
    let id = "removing a wire that nobody wants";
    mesh.says("node1/forwarder", id);
    mesh.says("node1/forwarder", "its client's token has expired");
    mesh.says("node1/forwarder", "orphans=1");
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

/// Renewals are no news unless one asks for them.
const RENEWALS: &str = "info,nsm_identity=debug";

#[test]
fn wires_live_on_while_certificates_rotate() {
    let Some(mesh) = Mesh::up_with("wires_live_on_while_certificates_rotate", PODS, |plan| {
        plan.svid_ttl = Some("4s".into());
        for process in &mut plan.processes {
            process.env.insert("NSM_LOG_LEVEL".into(), RENEWALS.into());
        }
    }) else {
        return;
    };
    mesh.client("client", "a", "kernel://plain/nsm0", &[SHORT, &["--log-level", RENEWALS]].concat());
    mesh.ready(&["client"]);
    let first = record(&mesh);
    let was = ends(&mesh, &first.plan.id, first.nsids);
    let names = ["client", "gw", "node1/manager", "node1/forwarder"];
    // Twice, so that the last token was signed by, and for, certificates that nobody had at the beginning.
    eventually("everybody's certificate was renewed twice", || {
        let renewed = |name: &str| mesh.log(name).matches("identity renewed").count();
        match names.iter().find(|name| renewed(name) < 2) {
            None => Ok(()),
            Some(name) => Err(format!("{name}: {}", mesh.log(name))),
        }
    });
    let middle = record(&mesh);
    eventually("the wire is refreshed once more", || {
        let now = record(&mesh);
        if now.data == middle.data { Err(now.data.to_string()) } else { Ok(()) }
    });
    assert_eq!(identity(&ends(&mesh, &first.plan.id, first.nsids)), identity(&was));
    let log = mesh.log("client");
    assert!(!log.contains("cannot be refreshed"), "{log}");
    mesh.end("client", Signal::TERM);
    let log = mesh.log("client");
    assert!(!log.contains("not closed in good order"), "{log}");
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn without_room_for_its_plan_no_wire_is_made() {
    let Some(mesh) = Mesh::up("without_room_for_its_plan_no_wire_is_made", PODS) else { return };
    mesh.end("node1/forwarder", Signal::TERM);
    let forwarder = mesh.lab.plan.processes.iter().find(|p| p.name == "node1/forwarder").expect("planned");
    let state = mesh.state_dir("node1");
    // A file system of four pages in a mount namespace of its own: nobody else sees it, and it ends with the process.
    let script = format!("mount -t tmpfs -o size=16k nsm-test {} && exec \"$@\"", state.display());
    let wrap = ["-m", "--propagation", "private", "sh", "-c", &script, "sh", crate::harness::NSM];
    let args: Vec<_> = wrap.into_iter().chain(forwarder.args.iter().map(String::as_str)).collect();
    mesh.start_program("node1/forwarder", "node1", "unshare", &args);
    mesh.lab.write_identity_config().expect("write");
    mesh.ready(&["node1/forwarder"]);
    let inside = PathBuf::from(format!("/proc/{}/root", mesh.pid("node1/forwarder").as_raw_pid()));
    let inside = inside.join(state.strip_prefix("/").expect("absolute"));
    let filler = inside.join("filler");
    assert!(fs::write(&filler, vec![0; 1 << 20]).is_err(), "it is small");
    mesh.client("unlucky", "a", "kernel://plain/nsm0", &["--once"]);
    let (how, said) = mesh.ended("unlucky");
    assert_eq!(how, "exit status 1", "{said}");
    for text in [
        "nsm: no wire to plain: forwarder-node1: ",
        "No space left on device",
        "hint: a wire is only made when its plan can be kept; free space in NSM_STATE_DIR",
    ] {
        assert!(said.contains(text), "{text:?} is not in {said:?}");
    }
    mesh.nothing_is_left(&["a", "b", "gw"]);
    let kept: Vec<_> =
        fs::read_dir(&inside).expect("list").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(kept, ["filler"], "nothing half-written");

    // A client that is patient gets its wire when there is room again.
    mesh.client("lucky", "a", "kernel://plain/nsm0", &[]);
    mesh.says("lucky", "no wire yet");
    fs::remove_file(&filler).expect("remove");
    mesh.ready(&["lucky"]);
    mesh.end("lucky", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

/// Two hours ahead everything has expired, two hours behind nothing is valid yet: what stands goes on, what is new waits.
#[test]
fn wires_outlive_clocks_that_jump_and_new_ones_come_when_they_are_right_again() {
    let test = "wires_outlive_clocks_that_jump_and_new_ones_come_when_they_are_right_again";
    let Some(mesh) = Mesh::up(test, PODS) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", &["--max-token-lifetime", "30s"]);
    mesh.ready(&["client"]);
    let before = record(&mesh);
    let was = identity(&ends(&mesh, &before.plan.id, before.nsids));
    for (of, seconds) in [("node1", 7200), ("node1", -7200), ("identity", 7200), ("identity", -7200)] {
        let clock = mesh.lab.plan.paths().clock(of);
        fs::write(&clock, seconds.to_string()).expect("write");
        let late = format!("late-{of}{seconds}");
        mesh.client(&late, "b", "kernel://plain/nsm0", &[]);
        mesh.says(&late, "no wire yet");
        fs::remove_file(&clock).expect("remove");
        mesh.ready(&[&late]);
        mesh.end(&late, Signal::TERM);
        assert_eq!(identity(&ends(&mesh, &before.plan.id, before.nsids)), was, "{of} {seconds}");
    }
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

/// Refreshes need nothing of the registry: whoever serves the wire is known to every hop.
#[test]
fn wires_outlive_a_registry_that_stays_away() {
    let test = "wires_outlive_a_registry_that_stays_away";
    let pods = "\
- {name: a, node: node1}
- {name: gw, node: node2, endpoint: {services: [plain], cidrPrefix: [172.16.1.2/31]}}
";
    let Some(mesh) = Mesh::up(test, pods) else { return };
    // Its tokens live for 6 s: it refreshes about every second.
    mesh.client("client", "a", "kernel://plain/nsm0", SHORT);
    mesh.ready(&["client"]);
    let before = mesh.has("a", "nsm0");
    mesh.end("registry", Signal::KILL);
    // Longer than tokens live, and than a client asks for a wire as it was.
    std::thread::sleep(std::time::Duration::from_secs(9));
    assert_eq!(mesh.has("a", "nsm0"), before, "{}", mesh.log("client"));
    mesh.pings("a", "172.16.1.2");
    assert!(!mesh.log("client").contains("cannot be refreshed"), "{}", mesh.log("client"));
    mesh.restart("registry");
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "gw"]);
}
