//! `nsm node`: what holds for daemons of their own holds for those that share a process.

use std::time::{Duration, SystemTime};

use nsm_api::path;
use nsm_identity::token;
use rustix::process::Signal;

use crate::{
    harness::{self, Mesh, eventually},
    raw::{Raw, file, good, in_runtime},
};

const PODS: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: x, node: node1}
- {name: y, node: node2}
- {name: gw, node: node1, endpoint: {services: [plain], cidrPrefix: [172.16.1.2/31]}}
";

#[test]
fn a_path_through_one_process_shows_every_hop() {
    let Some(mesh) = Mesh::up_together("a_path_through_one_process_shows_every_hop", PODS) else { return };
    mesh.inside("a", "whole path");
    mesh.nothing_is_left(&["a", "gw"]);
}

/// Names, ids and tokens of a wire's path, and the events of its life.
pub(crate) fn whole_path(lab: &str) {
    in_runtime(async {
        let raw = Raw::connect(lab, "nsm.io.sock").await;
        let (url, namespace) = file("/proc/self/ns/net");
        raw.fds.send(namespace);
        let answer = raw.request(good("raw-0", "nsm0", url), Some(raw.token()), Duration::from_secs(10));
        let conn = answer.await.expect("a wire");
        let segments = path::segments(&conn);
        let names: Vec<_> = segments.iter().map(|segment| segment.name.as_str()).collect();
        assert_eq!(names, ["raw", "manager-node1", "forwarder-node1", "gw"]);
        let ids: std::collections::BTreeSet<_> = segments.iter().map(|segment| &segment.id).collect();
        assert_eq!(ids.len(), 4, "each hop has an id of its own");
        let claims: Vec<_> =
            segments.iter().map(|segment| token::claims(&segment.token).expect("a token")).collect();
        let spiffe = |name: &str| format!("spiffe://{lab}.lab/{name}");
        let subjects: Vec<_> = claims.iter().map(|claims| claims.subject.clone()).collect();
        assert_eq!(subjects, [spiffe("pod/a"), spiffe("node1/node"), spiffe("node1/node"), spiffe("pod/gw")]);
        let audiences: Vec<_> = claims[..3].iter().map(|claims| claims.audience.clone()).collect();
        assert_eq!(audiences, [[spiffe("node1/node")], [spiffe("node1/node")], [spiffe("pod/gw")]]);
        for segment in segments {
            let expires = segment.expires.as_ref().map(path::from_timestamp).expect("an end");
            assert!(expires > SystemTime::now(), "{}", segment.name);
        }
        assert_eq!(harness::links(lab, "a").len(), 1);
        raw.close(conn).await.expect("closed");
    });
}

#[test]
fn one_process_refuses_what_two_refuse() {
    let Some(mesh) = Mesh::up_together("one_process_refuses_what_two_refuse", PODS) else { return };
    for job in ["bad requests", "bad tokens", "bad namespaces"] {
        mesh.inside("a", job);
    }
    mesh.nothing_is_left(&["a", "gw"]);
}

/// What tells of an endpoint's death is passed on without a stream between manager and forwarder.
#[test]
fn a_client_of_one_process_moves_when_its_endpoint_dies() {
    let test = "a_client_of_one_process_moves_when_its_endpoint_dies";
    let Some(mesh) = Mesh::up_together(test, PODS) else { return };
    mesh.end("gw", Signal::TERM);
    let serve = |name: &str, prefix: &str| {
        mesh.endpoint(name, name, &["--service-names", "plain", "--cidr-prefix", prefix]);
        mesh.ready(&[name]);
    };
    serve("x", "172.16.2.0/31");
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    assert_eq!(mesh.links("x").len(), 1);
    serve("y", "172.16.3.0/31");
    mesh.end("x", Signal::KILL);
    eventually("the wire leads to y, on the other node", || {
        let links = mesh.links("y");
        if links.len() == 1 && mesh.links("a").len() == 1 { Ok(()) } else { Err(format!("{links:?}")) }
    });
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "y"]);
}

/// Beside a registry of the same process the manager guards names of other nodes too.
#[test]
fn a_workload_cannot_take_the_name_of_an_endpoint_of_another_node() {
    let test = "a_workload_cannot_take_the_name_of_an_endpoint_of_another_node";
    let Some(mesh) = Mesh::up_together(test, PODS) else { return };
    mesh.endpoint(
        "far",
        "y",
        &["--service-names", "picky", "--labels", "app:vpn", "--cidr-prefix", "172.16.5.0/31"],
    );
    mesh.ready(&["far"]);
    // The same name, on the registry's node, with another identity.
    let own = mesh.url_for("x", "thief.sock");
    let manager = mesh.url_for("x", "nsm.io.sock");
    let args = ["endpoint", "--name", "far", "--connect-to", &manager, "--listen-on", &own];
    let more = [
        "--register-service",
        "false",
        "--service-names",
        "picky",
        "--labels",
        "app:vpn",
        "--cidr-prefix",
        "172.16.6.0/31",
    ];
    mesh.start("thief", "x", &[&args[..], &more].concat());
    let (how, said) = mesh.ended("thief");
    assert_eq!(how, "exit status 1", "{said}");
    assert!(said.contains("far"), "{said}");
    mesh.client("client", "a", "kernel://picky/nsm0", &[]);
    mesh.ready(&["client"]);
    assert_eq!((mesh.links("y").len(), mesh.links("x").len()), (1, 0));
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "x", "y"]);
}
