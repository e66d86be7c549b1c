//! What a client does for its wires: takes them over from an init container, and notices when packets do not pass.

use std::{process::Command, time::Duration};

use nsm_lab::probe::Echo;
use rustix::process::Signal;

use crate::harness::{Mesh, eventually};

const GATEWAY: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: gw, node: node1, endpoint: {services: [plain], cidrPrefix: [172.16.1.2/31]}}
";
/// Pods without programs: tests start their own.
const BARE: &str = "\
- {name: a, node: node1}
- {name: x, node: node1}
- {name: y, node: node1}
";
/// A dead wire is noticed soon, and a busy machine does not make a living one look dead.
const PROBED: &[&str] = &["--liveness-check-interval", "50ms", "--liveness-check-timeout", "1s"];

/// Runs a program of the system in a pod.
pub(crate) fn run_in(mesh: &Mesh, pod: &str, program: &str, args: &[&str]) {
    let namespace = mesh.lab.namespace(pod).expect("a pod");
    let output = namespace.run(|| Command::new(program).args(args).output()).expect("enter").expect("start");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn has_program(test: &str, program: &str) -> bool {
    let there = Command::new(program).arg("--help").output().is_ok();
    if !there {
        println!("SKIPPED {test}: {program} is not installed");
    }
    there
}

#[test]
fn a_sidecar_takes_over_from_the_init_client_and_no_packet_is_lost() {
    let test = "a_sidecar_takes_over_from_the_init_client_and_no_packet_is_lost";
    let Some(mesh) = Mesh::up(test, GATEWAY) else { return };
    let manager = mesh.url("nsm.io.sock");
    let args =
        ["client", "--name", "pod", "--connect-to", &manager, "--network-services", "kernel://plain/nsm0"];
    mesh.start("init", "a", &[&args[..], &["--init"]].concat());
    let (how, said) = mesh.ended("init");
    assert_eq!(how, "exit status 0", "{said}");
    let wire = mesh.links("a");
    let far = mesh.links("gw");
    assert_eq!((wire.len(), far.len()), (1, 1), "the wire outlives the init client");

    let flood = mesh.flood("a", "172.16.1.2");
    // Its tokens live so long that a refresh follows within a second: the wire is the sidecar's own now.
    mesh.start("sidecar", "a", &[&args[..], &["--max-token-lifetime", "6s"]].concat());
    mesh.ready(&["sidecar"]);
    mesh.says("sidecar", "going on with the wire of an earlier process");
    let claimed = crate::harness::records(&mesh.lab.plan.lab);
    let content = || claimed.iter().map(|path| std::fs::read(path).unwrap_or_default()).collect::<Vec<_>>();
    let before = content();
    eventually("the sidecar refreshes it", || {
        if content() == before { Err("the same record") } else { Ok(()) }.map_err(String::from)
    });
    let row = flood.end().expect("enter");
    assert_eq!(row.answered, row.sent, "{row:?}");
    assert!(row.sent > 0);
    assert_eq!(mesh.links("a"), wire, "the same interface: index, name, MAC address");
    assert_eq!(mesh.links("gw"), far);

    mesh.end("sidecar", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn a_wire_whose_packets_are_dropped_is_noticed_and_another_endpoint_takes_over() {
    let test = "a_wire_whose_packets_are_dropped_is_noticed_and_another_endpoint_takes_over";
    if !has_program(test, "nft") {
        return;
    }
    let Some(mesh) = Mesh::up(test, BARE) else { return };
    for (name, prefix) in [("x", "172.16.1.0/24"), ("y", "172.16.2.0/24")] {
        mesh.endpoint(name, name, &["--service-names", "plain", "--cidr-prefix", prefix]);
    }
    mesh.ready(&["x", "y"]);
    mesh.client("client", "a", "kernel://plain/nsm0", PROBED);
    mesh.ready(&["client"]);
    let (deaf, other) = if mesh.links("x").is_empty() { ("y", "x") } else { ("x", "y") };
    assert_eq!((mesh.links(deaf).len(), mesh.links(other).len()), (1, 0));
    // Nothing of the control plane changes: processes, interfaces, registrations.
    run_in(
        &mesh,
        deaf,
        "nft",
        &["add table inet deaf; add chain inet deaf in { type filter hook input priority 0; policy drop; }"],
    );
    eventually("the other endpoint has the wire", || {
        let links = (mesh.links(deaf), mesh.links(other));
        if links.0.is_empty() && links.1.len() == 1 {
            Ok(())
        } else {
            Err(format!("{links:?}\n{}", mesh.log("client")))
        }
    });
    mesh.says("client", "packets do not pass; asking for another endpoint");
    mesh.says("client", "the wire is up again");
    mesh.has("a", "nsm0");
    // It answers, so it stays.
    let to = if other == "x" { "172.16.1.0" } else { "172.16.2.0" };
    eventually("packets pass", || {
        let row = mesh.lab.namespace("a").expect("a pod").run(|| {
            Echo::open(to.parse().expect("an address"))?
                .row(5, std::time::Instant::now() + Duration::from_secs(1))
        });
        match row.expect("enter") {
            Ok(row) if row.answered == 5 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "x", "y"]);
}

#[test]
fn a_wire_whose_interface_goes_silently_is_made_again() {
    let test = "a_wire_whose_interface_goes_silently_is_made_again";
    if !has_program(test, "ip") {
        return;
    }
    let Some(mesh) = Mesh::up(test, GATEWAY) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", PROBED);
    mesh.ready(&["client"]);
    let (before, far) = (mesh.has("a", "nsm0"), mesh.links("gw"));
    // Down, not deleted: the client's end is still there.
    run_in(&mesh, "gw", "ip", &["link", "set", &far[0].name, "down"]);
    eventually("the wire is another", || {
        let links = mesh.links("a");
        match &links[..] {
            [link] if link.name == "nsm0" && link.index != before.index => Ok(()),
            _ => Err(format!("{links:?}\n{}", mesh.log("client"))),
        }
    });
    mesh.says("client", "the wire is up again");
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn an_unprobed_wire_stays_whatever_becomes_of_its_packets() {
    let test = "an_unprobed_wire_stays_whatever_becomes_of_its_packets";
    if !has_program(test, "ip") {
        return;
    }
    let Some(mesh) = Mesh::up(test, GATEWAY) else { return };
    // It is refreshed every second, which is how long it takes to know that nothing else happens.
    let more = ["--liveness-check-enabled", "false", "--max-token-lifetime", "6s"];
    mesh.client("client", "a", "kernel://plain/nsm0", &more);
    mesh.ready(&["client"]);
    let before = mesh.has("a", "nsm0");
    let far = mesh.links("gw");
    run_in(&mesh, "gw", "ip", &["link", "set", &far[0].name, "down"]);
    std::thread::sleep(Duration::from_millis(1500));
    let log = mesh.log("client");
    assert!(!log.contains("packets do not pass"), "{log}");
    // The refresh repairs what is not as planned, without a new wire.
    assert_eq!(mesh.has("a", "nsm0").index, before.index);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

/// An endpoint with a DNS server beside it, of which its clients are told.
const NAMED: &str = "\
- {name: a, node: node1}
- name: gw
  node: node1
  endpoint:
    services: [plain]
    cidrPrefix: [172.16.1.2/31]
    dnsConfigs: [{dns_server_ips: [172.16.1.2], search_domains: [my.coredns.service]}]
  dns: {my.app.my.coredns.service: [172.16.1.2]}
";

#[test]
fn programs_resolve_names_of_wires_and_resolv_conf_is_restored_whatever_ends_the_client() {
    let test = "programs_resolve_names_of_wires_and_resolv_conf_is_restored_whatever_ends_the_client";
    let Some(mesh) = Mesh::up(test, NAMED) else { return };
    let original = "# a person's comment\nnameserver\t10.96.0.10\noptions ndots:5\n";
    let path = mesh.lab.plan.paths().root.join("a.conf");
    std::fs::write(&path, original).expect("write");
    let file = path.to_string_lossy().into_owned();
    let now = || std::fs::read_to_string(&path).expect("read");
    mesh.client("client", "a", "kernel://plain/nsm0", &["--resolv-conf", &file]);
    mesh.ready(&["client"]);
    assert!(now().ends_with("\noptions ndots:5\nnameserver 127.0.0.1\n"), "{}", now());
    // The system's own resolver, which sees the file where a pod has it: mounted over /etc/resolv.conf.
    if Command::new("getent").arg("--version").output().is_ok() {
        for name in ["my.app", "my.app.my.coredns.service"] {
            let script = format!("mount --bind {file} /etc/resolv.conf && getent ahostsv4 {name}");
            let args = ["-m", "--propagation", "private", "sh", "-c", &script];
            let namespace = mesh.lab.namespace("a").expect("a pod");
            let output = namespace.run(|| Command::new("unshare").args(args).output());
            let output = output.expect("enter").expect("start");
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(said.starts_with("172.16.1.2 "), "{name}: {said:?} {output:?}");
        }
    } else {
        println!("SKIPPED part of {test}: getent is not installed, so the system's resolver is not asked");
    }
    // Killed, it leaves the file as it is; whoever comes next puts it back before anything else.
    mesh.end("client", Signal::KILL);
    assert_ne!(now(), original);
    mesh.client("waiting", "a", "kernel://nobody/nsm0", &["--resolv-conf", &file]);
    eventually("it is put back", || if now() == original { Ok(()) } else { Err(now()) });
    mesh.end("waiting", Signal::TERM);
    mesh.client("client", "a", "kernel://plain/nsm0", &["--resolv-conf", &file]);
    mesh.ready(&["client"]);
    assert_ne!(now(), original);
    mesh.end("client", Signal::TERM);
    assert_eq!(now(), original);

    // The node's own file is not touched by a process of a pod that shares the node's mounts.
    let node = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    mesh.client("careful", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["careful"]);
    let says = "/etc/resolv.conf is no mount of its own, so it may be the node's";
    let mounted = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if mounted.lines().any(|line| line.split(' ').nth(4) == Some("/etc/resolv.conf")) {
        println!("SKIPPED part of {test}: /etc/resolv.conf is a mount of its own here");
    } else {
        mesh.says("careful", says);
        assert_eq!(std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(), node);
    }
    mesh.end("careful", Signal::TERM);
    mesh.nothing_is_left(&["a", "gw"]);
}
