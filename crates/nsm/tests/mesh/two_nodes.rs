//! Wires between two nodes: what both forwarders have to agree on, and what must outlive either of them.

use std::path::PathBuf;

use nsm_kernel::{EndFacts, Kernel, plan::Construction, store::Record};
use rustix::process::Signal;

use crate::{
    harness::{Mesh, NODES, eventually},
    state::{record_of, restart_traced, wrote_nothing},
};

const PODS: &str = "\
- {name: a, node: node1}
- {name: gw, node: node2, endpoint: {services: [plain], cidrPrefix: [172.16.1.2/31]}}
";
/// The gateway's address on its only wire.
const GATEWAY: &str = "172.16.1.2";
/// Tokens that live so long are refreshed after a second.
const SHORT: &[&str] = &["--max-token-lifetime", "6s"];

/// The VNI of the only wire, as this node's forwarder recorded it.
fn vni(mesh: &Mesh, node: &str) -> u32 {
    match record_of(mesh, node).plan.construction {
        Construction::Vxlan(tunnel) => tunnel.vni,
        Construction::Veth => panic!("not between nodes"),
    }
}

/// Makes a VXLAN device in a node that no forwarder knows of: whoever wants this VNI there cannot have it.
fn occupy(mesh: &Mesh, node: &str, vni: u32) {
    ip(mesh, node, &format!("link add alien type vxlan id {vni} dev eth0 remote 10.255.0.99 dstport 4789"));
}

/// Lets a client ask, and stops time just before the answer arrives at its forwarder: the gateway's side stands by
/// then, with a VNI of its forwarder's choice. The client's forwarder is frozen when this returns.
fn before_the_answer(mesh: &Mesh, more: &[&str]) -> u32 {
    // Everybody has connections to everybody then; the request itself is all that is new.
    mesh.warm(&["a"]);
    mesh.signal("gw", Signal::STOP);
    mesh.client("client", "a", "kernel://plain/nsm0", more);
    mesh.has_asked("node2/forwarder", "gw", 2);
    mesh.signal("node1/forwarder", Signal::STOP);
    mesh.signal("gw", Signal::CONT);
    eventually("the gateway's side stands", || match &mesh.links("gw")[..] {
        [link] if link.up => Ok(()),
        other => Err(format!("{other:?}")),
    });
    vni(mesh, "node2")
}

/// What `ip` prints in a pod.
fn ip(mesh: &Mesh, pod: &str, args: &str) -> String {
    let namespace = mesh.lab.namespace(pod).unwrap_or_else(|e| panic!("{}", e.chain()));
    let run = || std::process::Command::new("ip").args(args.split(' ')).output();
    let output = namespace.run(run).expect("enter").expect("start ip");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_ends_of_a_wire_between_nodes_know_each_other() {
    let Some(mesh) = Mesh::up("the_ends_of_a_wire_between_nodes_know_each_other", PODS) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", SHORT);
    mesh.ready(&["client"]);
    // Before the first packet; and when the forwarders have agreed again, what the processes before them had made too.
    for round in ["made", "refreshed", "taken over"] {
        for (pod, address, other) in [("a", GATEWAY, "gw"), ("gw", "172.16.1.3", "a")] {
            let known = ip(&mesh, pod, &format!("neigh show {address}"));
            let [link] = &mesh.links(other)[..] else { panic!("one wire") };
            let mac = link.mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
            assert!(
                known.contains(&mac) && known.contains("PERMANENT"),
                "{round}, {pod}: {known:?}, not {mac}"
            );
        }
        let before = record_of(&mesh, "node1").data;
        if round == "refreshed" {
            ["node1/forwarder", "node2/forwarder"].iter().for_each(|forwarder| {
                mesh.end(forwarder, Signal::KILL);
                mesh.restart(forwarder);
            });
        }
        eventually("the wire is refreshed", || {
            let now = record_of(&mesh, "node1").data;
            if now == before { Err(now.to_string()) } else { Ok(()) }
        });
    }
    mesh.pings("a", GATEWAY);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "gw"]);
}

#[test]
fn a_vni_that_is_taken_on_our_node_costs_one_more_request() {
    let test = "a_vni_that_is_taken_on_our_node_costs_one_more_request";
    let Some(mesh) = Mesh::up(test, PODS) else { return };
    let taken = before_the_answer(&mesh, &[]);
    occupy(&mesh, "node1", taken);
    mesh.signal("node1/forwarder", Signal::CONT);
    mesh.ready(&["client"]);
    let said = mesh.log("node1/forwarder");
    assert_eq!(said.matches("the peer's VNI is taken on this node").count(), 1, "{said}");
    assert_eq!(mesh.asked("node2/forwarder", "gw"), 3, "one retry");
    let agreed = vni(&mesh, "node1");
    assert_eq!(agreed, vni(&mesh, "node2"));
    assert_ne!(agreed, taken);
    assert_eq!(agreed % 2, 0, "the client's node has the lower address");
    assert!(said.contains(&format!("taken={taken} proposed={agreed}")), "{said}");
    mesh.pings("a", GATEWAY);
    // It is a wire like any other: it is closed, and nothing of the first choice is left either.
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "gw"]);
}

#[test]
fn a_vni_that_neither_side_can_have_is_an_error_and_leaves_nothing() {
    let test = "a_vni_that_neither_side_can_have_is_an_error_and_leaves_nothing";
    let Some(mesh) = Mesh::up(test, PODS) else { return };
    let taken = before_the_answer(&mesh, &["--once"]);
    occupy(&mesh, "node1", taken);
    // What is proposed instead is taken on the other node: that is known while the gateway is asked once more.
    mesh.signal("gw", Signal::STOP);
    mesh.signal("node1/forwarder", Signal::CONT);
    mesh.has_asked("node2/forwarder", "gw", 3);
    let said = mesh.log("node1/forwarder");
    let (_, proposed) = said.split_once("proposed=").unwrap_or_else(|| panic!("{said}"));
    let proposed: u32 = proposed.lines().next().expect("a line").trim().parse().expect("a VNI");
    occupy(&mesh, "node2", proposed);
    mesh.signal("gw", Signal::CONT);
    let (how, said) = mesh.ended("client");
    assert_eq!(how, "exit status 1", "{said}");
    for text in [
        "nsm: no wire to plain: forwarder-node2: ",
        &format!("VNI {proposed} is taken on this node"),
        "another program made a VXLAN device with this VNI on this port; the next try draws another",
    ] {
        assert!(said.contains(text), "{text:?} is not in {said:?}");
    }
    let log = mesh.log("node1/forwarder");
    assert_eq!(log.matches("the peer's VNI is taken on this node").count(), 1, "{log}");
    mesh.nothing_is_left(&["a", "gw"]);
    // And the next try draws another.
    mesh.client("client", "a", "kernel://plain/nsm0", &["--once"]);
    mesh.ready(&["client"]);
    mesh.pings("a", GATEWAY);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "gw"]);
}

#[test]
fn a_wire_whose_vni_was_taken_while_it_was_down_moves_to_another_on_both_nodes() {
    let test = "a_wire_whose_vni_was_taken_while_it_was_down_moves_to_another_on_both_nodes";
    let Some(mesh) = Mesh::up(test, PODS) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", SHORT);
    mesh.ready(&["client"]);
    let taken = vni(&mesh, "node1");
    mesh.end("node1/forwarder", Signal::KILL);
    let delete = || std::process::Command::new("ip").args(["link", "del", "nsm0"]).status();
    let deleted = mesh.lab.namespace("a").expect("a").run(delete).expect("enter").expect("start ip");
    assert!(deleted.success());
    occupy(&mesh, "node1", taken);
    mesh.restart("node1/forwarder");
    mesh.has("a", "nsm0");
    mesh.pings("a", GATEWAY);
    let now = vni(&mesh, "node1");
    assert_eq!(now, vni(&mesh, "node2"));
    assert_ne!(now, taken);
    assert_eq!(mesh.links("gw").len(), 1);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "gw"]);
}

/// The end of the only wire that is on this node.
fn end(mesh: &Mesh, node: &str) -> EndFacts {
    let record = record_of(mesh, node);
    let namespace = mesh.lab.namespace(node).expect("a node").try_clone().expect("clone");
    let (near, far) =
        Kernel::new(namespace).expect("netlink").facts(&record.plan.id, record.nsids).expect("look");
    match (near, far) {
        (Some(end), None) | (None, Some(end)) => end,
        other => panic!("{other:?}"),
    }
}

/// What may not change of an end.
fn identity(end: &EndFacts) -> (u32, String) {
    (end.ifindex, format!("{:?}", end.mac))
}

/// Waits until this node's record tells of a later expiry: the connection went through once more.
fn refreshed(mesh: &Mesh, node: &str, before: &Record) {
    eventually(&format!("the wire is refreshed on {node}"), || {
        let now = record_of(mesh, node);
        if now.data == before.data { Err(now.data.to_string()) } else { Ok(()) }
    });
}

#[test]
fn a_killed_forwarder_of_either_node_adopts_its_end_without_a_write() {
    let test = "a_killed_forwarder_of_either_node_adopts_its_end_without_a_write";
    let Some(mesh) = Mesh::up(test, PODS) else { return };
    // They are refreshed after a few seconds, and outlive a restart on a busy machine: a record whose token has expired
    // is an orphan's.
    mesh.client("client", "a", "kernel://plain/nsm0", &["--max-token-lifetime", "24s"]);
    mesh.ready(&["client"]);
    mesh.pings("a", GATEWAY);
    let plans = NODES.map(|node| record_of(&mesh, node).plan);
    let were = NODES.map(|node| end(&mesh, node));
    let pinging = mesh.flood("a", GATEWAY);
    for node in NODES {
        let forwarder = format!("{node}/forwarder");
        mesh.end(&forwarder, Signal::KILL);
        let before = NODES.map(|node| record_of(&mesh, node));
        let trace = restart_traced(&mesh, test, node);
        mesh.says(&forwarder, "found wires of an earlier process wires=1");
        for (node, before) in NODES.iter().zip(&before) {
            refreshed(&mesh, node, before);
        }
        for ((node, plan), was) in NODES.iter().zip(&plans).zip(&were) {
            assert_eq!(&record_of(&mesh, node).plan, plan, "{node}");
            let is = end(&mesh, node);
            assert_eq!(identity(&is), identity(was), "{node}");
            assert!(is.counters.rx_bytes >= was.counters.rx_bytes, "counters go on: {is:?} {was:?}");
        }
        if let Some(trace) = trace {
            wrote_nothing(&trace);
        }
    }
    let row = pinging.end().expect("enter");
    assert!(row.sent > 0 && row.lost() == 0, "{row:?}");
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "gw"]);
}

/// Certificates reach whoever has to verify, also after a hop has forgotten them.
#[test]
fn where_every_hop_has_to_be_known_wires_come_up_and_outlive_a_hop() {
    let test = "where_every_hop_has_to_be_known_wires_come_up_and_outlive_a_hop";
    let mesh = Mesh::up_with(test, PODS, |plan| {
        for process in &mut plan.processes {
            process.env.insert("NSM_ALL_HOPS_SIGNED".into(), "true".into());
        }
    });
    let Some(mesh) = mesh else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", SHORT);
    mesh.ready(&["client"]);
    mesh.pings("a", GATEWAY);
    for name in ["node2/forwarder", "node1/manager"] {
        let before = NODES.map(|node| record_of(&mesh, node));
        mesh.end(name, Signal::KILL);
        mesh.restart(name);
        for (node, before) in NODES.iter().zip(&before) {
            refreshed(&mesh, node, before);
        }
    }
    mesh.pings("a", GATEWAY);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "gw"]);
}

#[test]
fn an_end_that_was_not_told_of_a_close_is_an_orphan_and_goes() {
    for (here, there) in [("node1", "node2"), ("node2", "node1")] {
        let test = format!("an_end_that_was_not_told_of_a_close_is_an_orphan_and_goes on {here}");
        let Some(mesh) = Mesh::up(&test.replace(' ', "_"), PODS) else { return };
        mesh.client("client", "a", "kernel://plain/nsm0", &["--max-token-lifetime", "4s"]);
        mesh.ready(&["client"]);
        let forwarder = format!("{here}/forwarder");
        mesh.end(&forwarder, Signal::KILL);
        mesh.end("client", Signal::KILL);
        mesh.restart(&forwarder);
        mesh.says(&forwarder, "found wires of an earlier process wires=1");
        mesh.says(&forwarder, "its client's token has expired");
        mesh.says(&forwarder, "orphans=1");
        mesh.nothing_is_left(&["a", "gw"]);
        let log = mesh.log(&format!("{there}/forwarder"));
        assert!(!log.contains("orphans"), "on {there} it ends with its connection: {log}");
    }
}

/// Its manager tells whoever has registered in its stead, long before any token expires.
#[test]
fn a_forwarder_that_was_away_is_told_of_a_close() {
    for here in ["node1", "node2"] {
        let test = format!("a_forwarder_that_was_away_is_told_of_a_close on {here}");
        let Some(mesh) = Mesh::up(&test.replace(' ', "_"), PODS) else { return };
        mesh.client("client", "a", "kernel://plain/nsm0", &[]);
        mesh.ready(&["client"]);
        let forwarder = format!("{here}/forwarder");
        mesh.end(&forwarder, Signal::KILL);
        mesh.end("client", Signal::TERM);
        mesh.restart(&forwarder);
        mesh.nothing_is_left(&["a", "gw"]);
    }
}

#[test]
fn both_ends_go_when_the_token_of_a_killed_client_expires() {
    let Some(mesh) = Mesh::up("both_ends_go_when_the_token_of_a_killed_client_expires", PODS) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", &["--max-token-lifetime", "3s"]);
    mesh.ready(&["client"]);
    mesh.end("client", Signal::KILL);
    mesh.nothing_is_left(&["a", "gw"]);
    // What it had is free again: there is one pair of addresses.
    mesh.client("client", "a", "kernel://plain/nsm0", &["--once"]);
    mesh.ready(&["client"]);
    mesh.pings("a", GATEWAY);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "gw"]);
}

/// Ends a pod with all that runs there: the kernel takes its namespace down.
fn destroy(mesh: &mut Mesh, pod: &str, process: &str) {
    mesh.end(process, Signal::KILL);
    // The lab holds a descriptor of the namespace too; only the kernel object's last reference ends it.
    mesh.lab.remove_namespace(pod).expect("delete");
}

#[test]
fn a_pod_that_is_gone_takes_the_end_on_the_other_node_along() {
    let Some(mut mesh) = Mesh::up("a_pod_that_is_gone_takes_the_end_on_the_other_node_along", PODS) else {
        return;
    };
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    destroy(&mut mesh, "a", "client");
    mesh.says("node1/forwarder", "the network namespace of its pod is gone");
    // No token expires for minutes.
    mesh.no_wire_is_left(&["gw"]);
    mesh.inside("gw", "idle wires");
}

#[test]
fn a_client_of_a_pod_that_is_gone_on_the_other_node_gets_another() {
    let pods = format!("{PODS}- {{name: spare, node: node2}}\n");
    let Some(mut mesh) = Mesh::up("a_client_of_a_pod_that_is_gone_on_the_other_node_gets_another", &pods)
    else {
        return;
    };
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    mesh.endpoint("spare", "spare", &["--service-names", "plain", "--cidr-prefix", "172.16.2.2/31"]);
    mesh.ready(&["spare"]);
    destroy(&mut mesh, "gw", "gw");
    eventually("the client has moved", || match &mesh.links("spare")[..] {
        [_] => Ok(()),
        other => Err(format!("{other:?}\n{}", mesh.log("client"))),
    });
    mesh.pings("a", "172.16.2.2");
    eventually("one wire is left", || {
        let records: Vec<PathBuf> = crate::harness::records(&mesh.lab.plan.lab);
        if records.len() == NODES.len() { Ok(()) } else { Err(format!("{records:?}")) }
    });
    assert_eq!(mesh.links("a").len(), 1);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "spare"]);
}
