//! Processes that do not see each other: pods have PID namespaces of their own, and the kernel shows who is in another
//! one as process 0.

use std::{
    os::unix::fs::MetadataExt as _,
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;

use tonic::Code;

use crate::{
    harness::{Mesh, NSM},
    raw::{Raw, file, good, in_runtime},
};

const PODS: &str = "\
- {name: a, node: node1}
- {name: x, node: node1}
- {name: gw, node: node1}
";

/// Starts `nsm` in a PID namespace of its own, with its own `/proc`, as a container has it.
fn start_contained(mesh: &Mesh, name: &str, pod: &str, args: &[&str]) {
    let unshare = ["--pid", "--fork", "--kill-child=TERM", "--mount-proc", NSM];
    mesh.start_program(name, pod, "unshare", &[&unshare, args].concat());
}

/// Dialling: what listens there is outside and not seen. Serving: the forwarder, outside, dials.
#[test]
fn a_client_and_an_endpoint_with_pid_namespaces_get_a_wire() {
    let Some(mesh) = Mesh::up("a_client_and_an_endpoint_with_pid_namespaces_get_a_wire", PODS) else {
        return;
    };
    let manager = mesh.url_for("gw", "nsm.io.sock");
    let own = mesh.url_for("gw", "gw.sock");
    let args = ["endpoint", "--name", "gw", "--connect-to", &manager, "--listen-on", &own];
    let more = ["--register-service", "false", "--service-names", "plain", "--cidr-prefix", "172.16.1.2/31"];
    start_contained(&mesh, "gw", "gw", &[&args[..], &more].concat());
    mesh.ready(&["gw"]);
    let services = ["--network-services", "kernel://plain/nsm0"];
    let args = ["client", "--name", "c", "--connect-to", &manager];
    start_contained(&mesh, "c", "a", &[&args[..], &services].concat());
    mesh.ready(&["c"]);
    mesh.pings("a", "172.16.1.2");
    mesh.end("c", Signal::KILL);
    mesh.nothing_is_left(&["a", "gw"]);
    mesh.end("gw", Signal::KILL);
}

/// A daemon that sees none of its callers: it tells their network namespaces all the same, and nobody gets a wire
/// into another's.
#[test]
fn a_manager_with_a_pid_namespace_serves_callers_outside_and_knows_their_namespaces() {
    let test = "a_manager_with_a_pid_namespace_serves_callers_outside_and_knows_their_namespaces";
    let Some(mesh) = Mesh::up(test, PODS) else { return };
    // A control plane of its own in pod x, beside the lab's.
    mesh.start(
        "registry-x",
        "x",
        &["registry", "--name", "registry-x", "--listen-on", "tcp://127.0.0.1:5002"],
    );
    mesh.ready(&["registry-x"]);
    let url = mesh.url_for("x", "x.sock");
    let listen = format!("{url},tcp://127.0.0.1:5001");
    let args = ["manager", "--name", "manager-x", "--listen-on", &listen];
    start_contained(
        &mesh,
        "manager-x",
        "x",
        &[&args[..], &["--registry-url", "tcp://127.0.0.1:5002"]].concat(),
    );
    // In the manager's network namespace, so it may be its forwarder.
    let state = mesh.lab.plan.paths().node("node1").join("forwarder-x");
    let state = state.to_string_lossy();
    let own = mesh.url_for("x", "forwarder-x.sock");
    let forwarder = ["forwarder", "--name", "forwarder-x", "--connect-to", &url, "--listen-on", &own];
    mesh.start(
        "forwarder-x",
        "x",
        &[&forwarder[..], &["--tunnel-ip", "127.0.0.1", "--state-dir", &state]].concat(),
    );
    mesh.ready(&["manager-x", "forwarder-x"]);
    // In another one, so it may not.
    let own = mesh.url_for("a", "thief.sock");
    let thief = ["forwarder", "--name", "thief", "--connect-to", &url, "--listen-on", &own];
    let state = format!("{state}-thief");
    mesh.start("thief", "a", &[&thief[..], &["--tunnel-ip", "127.0.0.1", "--state-dir", &state]].concat());
    mesh.says("thief", "a process in another PID namespace, in network namespace net:[");
    mesh.end("thief", Signal::KILL);

    let own = mesh.url_for("gw", "gw.sock");
    let args = ["endpoint", "--name", "gw", "--connect-to", &url, "--listen-on", &own];
    let more = ["--service-names", "plain", "--cidr-prefix", "172.16.1.2/31"];
    mesh.start("gw", "gw", &[&args[..], &more].concat());
    mesh.ready(&["gw"]);
    let args = ["client", "--name", "c", "--connect-to", &url, "--network-services", "kernel://plain/nsm0"];
    mesh.start("c", "a", &args);
    mesh.ready(&["c"]);
    mesh.pings("a", "172.16.1.2");
    mesh.end("c", Signal::TERM);
    mesh.no_wire_is_left(&["a", "gw"]);
    mesh.inside("a", "foreign namespace");
    for name in ["gw", "forwarder-x", "manager-x", "registry-x"] {
        mesh.end(name, if name == "manager-x" { Signal::KILL } else { Signal::TERM });
    }
}

/// Root of a container that has the directory of the sockets mounted is no root of the node.
#[test]
fn only_its_own_container_and_the_node_look_at_a_process() {
    let Some(mesh) = Mesh::up("only_its_own_container_and_the_node_look_at_a_process", PODS) else { return };
    let registry = ["registry", "--listen-on", "tcp://127.0.0.1:0", "--name"];
    start_contained(&mesh, "inside", "a", &[&registry[..], &["inside"]].concat());
    mesh.start("outside", "a", &[&registry[..], &["outside"]].concat());
    let open = ["open", "--introspect-containers", "true"];
    mesh.start("open", "a", &[&registry[..], &open].concat());
    mesh.ready(&["inside", "outside", "open"]);
    let ask = |name: &str, before: &[&str]| {
        let socket = mesh.lab.plan.paths().introspect().join(format!("registry-{name}.sock"));
        let url = format!("unix://{}", socket.display());
        let words = [before, &[NSM, "get", "processes", "--at", &url]].concat();
        let asked = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output().expect("start");
        asked.status.success()
    };
    let container = ["unshare", "--pid", "--fork", "--mount-proc"];
    assert_eq!(["inside", "outside", "open"].map(|name| ask(name, &container)), [false, false, true]);
    assert!(ask("outside", &[]));
    mesh.says("outside", "in another container; NSM_INTROSPECT_CONTAINERS=true lets it");
    if std::fs::metadata("/proc/self/ns/pid").expect("stat").ino() == 0xEFFF_FFFC {
        assert!(ask("inside", &[]), "from the node");
    } else {
        println!(
            "SKIPPED only_its_own_container_and_the_node_look_at_a_process: from the node, of which this is not"
        );
    }
    for name in ["outside", "open"] {
        mesh.end(name, Signal::TERM);
    }
    mesh.end("inside", Signal::KILL);
}

/// Pod a asks for a wire into pod gw.
pub(crate) fn foreign_namespace(lab: &str) {
    in_runtime(async {
        let raw = Raw::connect(lab, "x.sock").await;
        let (url, fd) = file(&format!("/run/netns/{lab}.gw"));
        raw.fds.send(fd);
        let request = raw.request(good("raw-0", "nsm0", url), Some(raw.token()), Duration::from_secs(10));
        let status = request.await.expect_err("another's namespace");
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        let (own, _) = file("/proc/self/ns/net");
        let text = format!(
            "{url} is not the network namespace of {} (a process in another PID namespace), which is {own}",
            raw.identity.id()
        );
        assert!(status.message().contains(&text), "{status}");
    });
}
