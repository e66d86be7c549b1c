//! Whom a client gets, and what it is told when there is nobody.

use rustix::process::Signal;

use crate::harness::{Mesh, eventually};

/// One that matches nobody's selector, one of a single pair of addresses.
const GATEWAY: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: gw, node: node1, endpoint: {services: [plain, picky], labels: {app: web}, cidrPrefix: [172.16.1.2/31]}}
";
/// Pods without programs: tests start their own.
const BARE: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: x, node: node1}
- {name: y, node: node1}
";

/// The client says this and ends with status 1, and nothing is left.
fn refuses(mesh: &Mesh, name: &str, services: &str, more: &[&str], texts: &[&str]) {
    mesh.client(name, "a", services, &[&["--once"], more].concat());
    let (how, said) = mesh.ended(name);
    assert_eq!(how, "exit status 1", "{said}");
    let line = said.lines().find(|line| line.starts_with("nsm: ")).unwrap_or_else(|| panic!("{said}"));
    for text in texts {
        assert!(line.contains(text), "{text:?} is not in {line:?}");
    }
    assert_eq!(mesh.links("a"), []);
}

#[test]
fn who_finds_nobody_is_told_what_was_asked_and_who_was_there() {
    let Some(mesh) = Mesh::up("who_finds_nobody_is_told_what_was_asked_and_who_was_there", GATEWAY) else {
        return;
    };
    refuses(
        &mesh,
        "choosy",
        "kernel://picky/nsm0?color=red",
        &[],
        &[
            "no wire to picky",
            "forwarder-node1: ",
            "\"picky\"",
            "app=vpn",
            "color=red",
            "gw",
            "app=web",
            "hint: start an endpoint with these labels",
        ],
    );
    refuses(
        &mesh,
        "lost",
        "kernel://nowhere/nsm0",
        &[],
        &[
            "no wire to nowhere",
            "manager-node1: network service \"nowhere\" is not found",
            "hint: apply a NetworkService of that name, or start an endpoint that registers it",
        ],
    );
    mesh.end("gw", Signal::TERM);
    refuses(
        &mesh,
        "alone",
        "kernel://plain/nsm0",
        &[],
        &["no wire to plain", "forwarder-node1: ", "\"plain\"", "hint: start an endpoint"],
    );
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn an_endpoint_without_a_free_address_says_so_and_keeps_whom_it_has() {
    let Some(mesh) = Mesh::up("an_endpoint_without_a_free_address_says_so_and_keeps_whom_it_has", GATEWAY)
    else {
        return;
    };
    mesh.client("first", "b", "kernel://plain/nsm0", &[]);
    mesh.ready(&["first"]);
    let (wire, end) = (mesh.links("b"), mesh.links("gw"));
    refuses(
        &mesh,
        "second",
        "kernel://plain/nsm0",
        &[],
        &[
            "gw: ",
            "no address is free in",
            "hint: give the endpoint a larger NSM_CIDR_PREFIX, or start another endpoint of the service",
        ],
    );
    assert_eq!((mesh.links("b"), mesh.links("gw")), (wire, end), "the first wire is as it was");
    // What the refused one left would be in the way of the next.
    mesh.end("first", Signal::TERM);
    mesh.client("third", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["third"]);
    mesh.end("third", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn an_endpoint_that_dies_in_the_middle_is_reported() {
    let Some(mesh) = Mesh::up("an_endpoint_that_dies_in_the_middle_is_reported", GATEWAY) else { return };
    mesh.warm(&["a"]);
    mesh.hang("gw", "hanging", "a", &["--once"]);
    mesh.end("gw", Signal::KILL);
    let (how, said) = mesh.ended("hanging");
    assert_eq!(how, "exit status 1", "{said}");
    for text in ["no wire to plain", "broke"] {
        assert!(said.contains(text), "{text:?} is not in {said}");
    }
    mesh.nothing_is_left(&["a", "b", "gw"]);
    // It comes back, and everything goes on.
    mesh.restart("gw");
    mesh.client("next", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["next"]);
    mesh.end("next", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn an_endpoint_that_does_not_answer_is_given_up_at_the_deadline() {
    let Some(mesh) = Mesh::up("an_endpoint_that_does_not_answer_is_given_up_at_the_deadline", GATEWAY) else {
        return;
    };
    mesh.signal("gw", Signal::STOP);
    let service = "kernel://plain/nsm0";
    // Not even a handshake, within the forwarder's time for connecting.
    refuses(
        &mesh,
        "cold",
        service,
        &[],
        &[
            "no wire to plain: forwarder-node1: the next hop gw (socket inode://",
            "cannot be reached",
            "does its server answer?",
        ],
    );
    mesh.signal("gw", Signal::CONT);
    mesh.warm(&["a"]);
    mesh.signal("gw", Signal::STOP);
    refuses(
        &mesh,
        "warm",
        service,
        &["--request-timeout", "3s"],
        &["no wire to plain: forwarder-node1: gw (socket inode://", "/pod/gw) did not answer in time"],
    );
    // It wakes up and finds a request that nobody waits for any more, and a Close.
    mesh.signal("gw", Signal::CONT);
    mesh.nothing_is_left(&["a", "b", "gw"]);
    mesh.client("next", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["next"]);
    mesh.end("next", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn another_endpoint_takes_over_from_one_that_dies_in_the_middle() {
    let Some(mesh) = Mesh::up("another_endpoint_takes_over_from_one_that_dies_in_the_middle", BARE) else {
        return;
    };
    for (name, prefix) in [("x", "172.16.1.0/24"), ("y", "172.16.2.0/24")] {
        mesh.endpoint(name, name, &["--service-names", "plain", "--cidr-prefix", prefix]);
    }
    mesh.ready(&["x", "y"]);
    mesh.warm(&["a", "b"]);
    mesh.signal("x", Signal::STOP);
    // Endpoints take turns: one of the two is sent to the frozen one first.
    mesh.client("one", "a", "kernel://plain/nsm1", &[]);
    mesh.client("two", "b", "kernel://plain/nsm1", &[]);
    let wired = || [mesh.is_ready("one"), mesh.is_ready("two")];
    eventually("one of them has its wire", || {
        if wired().contains(&true) { Ok(()) } else { Err(mesh.log("one") + &mesh.log("two")) }
    });
    assert!(wired().contains(&false), "the other waits for the frozen one");
    mesh.end("x", Signal::KILL);
    mesh.ready(&["one", "two"]);
    assert_eq!(mesh.links("x"), []);
    assert_eq!(mesh.links("y").len(), 2);
    for client in ["one", "two"] {
        mesh.end(client, Signal::TERM);
    }
    mesh.nothing_is_left(&["a", "b", "x", "y"]);
}

#[test]
fn a_frozen_endpoint_leaves_time_for_the_others() {
    let Some(mesh) = Mesh::up("a_frozen_endpoint_leaves_time_for_the_others", BARE) else { return };
    for (name, prefix) in [("x", "172.16.1.0/24"), ("y", "172.16.2.0/24")] {
        mesh.endpoint(name, name, &["--service-names", "plain", "--cidr-prefix", prefix]);
    }
    mesh.ready(&["x", "y"]);
    mesh.warm(&["a", "b"]);
    mesh.signal("x", Signal::STOP);
    // Endpoints take turns: one of the two is sent to the frozen one first. Neither asks twice.
    for (client, pod) in [("one", "a"), ("two", "b")] {
        mesh.client(client, pod, "kernel://plain/nsm1", &["--once", "--request-timeout", "6s"]);
    }
    mesh.ready(&["one", "two"]);
    assert_eq!((mesh.links("x").len(), mesh.links("y").len()), (0, 2));
    // It wakes up and finds a request that nobody waits for any more, and a Close.
    mesh.signal("x", Signal::CONT);
    for client in ["one", "two"] {
        mesh.end(client, Signal::TERM);
    }
    mesh.nothing_is_left(&["a", "b", "x", "y"]);
}

#[test]
fn a_client_that_disappears_in_the_middle_leaves_nothing() {
    let Some(mesh) = Mesh::up("a_client_that_disappears_in_the_middle_leaves_nothing", GATEWAY) else {
        return;
    };
    mesh.warm(&["a"]);
    for signal in [Signal::KILL, Signal::TERM] {
        mesh.hang("gw", "hanging", "a", &[]);
        mesh.end("hanging", signal);
        mesh.signal("gw", Signal::CONT);
        mesh.nothing_is_left(&["a", "b", "gw"]);
        // The only pair of addresses is free again.
        mesh.client("next", "b", "kernel://plain/nsm0", &[]);
        mesh.ready(&["next"]);
        mesh.end("next", Signal::TERM);
        mesh.nothing_is_left(&["a", "b", "gw"]);
    }
}
