//! The programs of `examples/`, as their authors would run them: in pods of a mesh, told by their environment.

use std::path::PathBuf;

use rustix::process::Signal;

use crate::harness::{Mesh, eventually};

const PODS: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: x, node: node1}
- {name: y, node: node2}
";

/// Starts an example in a pod, under the name of the pod.
fn start(mesh: &Mesh, pod: &str, example: &str, args: &[&str]) {
    // Cargo builds the examples of a package beside its tests.
    let own = std::env::current_exe().expect("own name");
    let built: PathBuf = own.ancestors().nth(2).expect("a target directory").join("examples").join(example);
    assert!(built.exists(), "{} is not built", built.display());
    let (name, manager) =
        (format!("NSM_NAME={pod}"), format!("NSM_CONNECT_TO={}", mesh.url_for(pod, "nsm.io.sock")));
    let built = built.to_string_lossy();
    mesh.start_program(pod, pod, "env", &[&[&*name, &manager, &built], args].concat());
}

fn served(mesh: &Mesh, endpoints: &[&str], client: &str, more: &[&str]) {
    // An endpoint says nothing when it is ready: clients ask until it is there.
    mesh.client(client, client, more[0], &more[1..]);
    mesh.ready(&[client]);
    for pod in endpoints {
        assert_eq!(mesh.links(pod).len(), 1, "{pod}");
    }
}

#[test]
fn an_endpoint_and_a_client_find_each_other() {
    let Some(mesh) = Mesh::up("an_endpoint_and_a_client_find_each_other", PODS) else { return };
    start(&mesh, "y", "endpoint", &["plain", "172.16.9.0/24"]);
    served(&mesh, &["y"], "b", &["kernel://plain/nsm0"]);
    start(&mesh, "a", "client", &["kernel://plain/nsm0"]);
    mesh.says("a", "up: Some(IpContext");
    mesh.pings("a", "172.16.9.2");
    mesh.says("y", "request 2: ");
    for pod in ["a", "b", "y"] {
        mesh.end(pod, Signal::TERM);
    }
    mesh.nothing_is_left(&["a", "b", "y"]);
}

#[test]
fn an_ipam_of_ones_own_gives_each_what_it_asks_for_once() {
    let Some(mesh) = Mesh::up("an_ipam_of_ones_own_gives_each_what_it_asks_for_once", PODS) else { return };
    start(&mesh, "x", "ipam", &["plain"]);
    served(&mesh, &["x"], "a", &["kernel://plain/nsm0?seat=7"]);
    mesh.pings("a", "10.50.0.254");
    for (seat, error) in [("7", "seat 7 is taken"), ("400", "label seat is \"400\"; expected 1 to 250")] {
        mesh.client("refused", "b", &format!("kernel://plain/nsm0?seat={seat}"), &["--once"]);
        let (how, said) = mesh.ended("refused");
        assert_eq!(how, "exit status 1", "{said}");
        assert!(said.contains(error), "{error:?} is not in {said}");
    }
    mesh.end("a", Signal::TERM);
    served(&mesh, &["x"], "b", &["kernel://plain/nsm0?seat=7"]);
    for pod in ["b", "x"] {
        mesh.end(pod, Signal::TERM);
    }
    mesh.nothing_is_left(&["a", "b", "x"]);
}

#[test]
fn a_composed_function_stands_in_the_chain_and_keeps_its_bound() {
    let Some(mesh) = Mesh::up("a_composed_function_stands_in_the_chain_and_keeps_its_bound", PODS) else {
        return;
    };
    let gateway = ["--service-names", "packets", "--labels", "app:gw", "--cidr-prefix", "172.16.1.0/24"];
    mesh.endpoint("y", "y", &gateway);
    mesh.ready(&["y"]);
    start(&mesh, "x", "function", &["packets", "app:middle", "1"]);
    mesh.client("a", "a", "kernel://packets/nsm0", &[]);
    mesh.ready(&["a"]);
    mesh.pings("a", "172.16.1.0");
    assert_eq!(mesh.links("x").len(), 2, "one towards the client, one towards the gateway");
    mesh.client("refused", "b", "kernel://packets/nsm0", &["--once"]);
    let (how, said) = mesh.ended("refused");
    assert_eq!(how, "exit status 1", "{said}");
    assert!(said.contains("all 1 places are taken"), "{said}");
    // What ends a wire gives its place back.
    mesh.end("a", Signal::TERM);
    eventually("the function has no wire", || {
        let links = mesh.links("x");
        if links.is_empty() { Ok(()) } else { Err(format!("{links:?}")) }
    });
    mesh.client("b", "b", "kernel://packets/nsm0", &[]);
    mesh.ready(&["b"]);
    for pod in ["b", "x", "y"] {
        mesh.end(pod, Signal::TERM);
    }
    mesh.nothing_is_left(&["a", "b", "x", "y"]);
}
