//! What a killed endpoint leaves in the file system and in the registry: nothing, whenever that happens.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::process::Signal;

use crate::harness::{Mesh, NSM, eventually};

const PODS: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
";

/// Starts an endpoint that chooses its socket's path itself, below a temporary directory of its own.
fn start(mesh: &Mesh, name: &str) -> PathBuf {
    let directory = mesh.lab.plan.paths().root.join(format!("tmp-{name}"));
    fs::create_dir(&directory).expect("create");
    let (tmpdir, manager) = (format!("TMPDIR={}", directory.display()), mesh.url("nsm.io.sock"));
    let endpoint = ["endpoint", "--name", name, "--connect-to", &manager, "--service-names", "plain"];
    let own = ["--register-service", "false", "--cidr-prefix", "172.16.1.0/24"];
    mesh.start_program(name, "b", "env", &[&[&*tmpdir, NSM][..], &endpoint, &own].concat());
    directory
}

/// Waits until it listens, which the kernel tells by the path that its socket once had.
fn listens(mesh: &Mesh, name: &str, directory: &Path) {
    let sockets = format!("/proc/{}/net/unix", mesh.pid(name).as_raw_pid());
    eventually(&format!("{name} listens"), || {
        let sockets = fs::read_to_string(&sockets).expect("it lives");
        if sockets.contains(&*directory.to_string_lossy()) { Ok(()) } else { Err(mesh.log(name)) }
    });
}

fn is_empty(directory: &Path) {
    eventually("nothing is in its temporary directory", || {
        let found: Vec<_> = fs::read_dir(directory).expect("list").flatten().map(|e| e.path()).collect();
        if found.is_empty() { Ok(()) } else { Err(format!("{found:?}")) }
    });
}

#[test]
fn an_endpoint_that_is_killed_leaves_no_directory() {
    let Some(mesh) = Mesh::up("an_endpoint_that_is_killed_leaves_no_directory", PODS) else { return };

    // Registered, and in use.
    let directory = start(&mesh, "used");
    mesh.ready(&["used"]);
    is_empty(&directory);
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    mesh.end("used", Signal::KILL);
    is_empty(&directory);
    mesh.end("client", Signal::TERM);

    // In the middle of its registration, which a frozen manager does not answer.
    mesh.signal("node1/manager", Signal::STOP);
    let directory = start(&mesh, "asking");
    listens(&mesh, "asking", &directory);
    is_empty(&directory);
    assert!(!mesh.is_ready("asking"));
    mesh.end("asking", Signal::KILL);
    is_empty(&directory);
    mesh.signal("node1/manager", Signal::CONT);

    // Before it: there is no manager yet. Then there is one, and the socket without a path is registered and dialled.
    mesh.end("node1/manager", Signal::KILL);
    for name in ["early", "patient"] {
        let directory = start(&mesh, name);
        listens(&mesh, name, &directory);
        is_empty(&directory);
        assert!(!mesh.is_ready(name));
    }
    mesh.end("early", Signal::KILL);
    mesh.restart("node1/manager");
    mesh.ready(&["patient"]);
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b"]);
    mesh.end("patient", Signal::KILL);
    for name in ["early", "patient"] {
        is_empty(&mesh.lab.plan.paths().root.join(format!("tmp-{name}")));
    }
}

/// Long before its registration expires; and not where it is started again at once, as containers are.
#[test]
fn a_registration_ends_with_its_process() {
    let Some(mesh) = Mesh::up("a_registration_ends_with_its_process", PODS) else { return };
    let services = ["--service-names", "plain", "--cidr-prefix", "172.16.1.0/24"];
    for name in ["dies", "returns"] {
        mesh.endpoint(name, "b", &services);
    }
    mesh.ready(&["dies", "returns"]);
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    let registered = || {
        let all = mesh.json(&["get", "endpoints", "-o", "json"]);
        let names = all.as_array().into_iter().flatten().filter_map(|nse| nse["name"].as_str());
        names.map(str::to_owned).filter(|name| !name.starts_with("forwarder")).collect::<Vec<_>>()
    };
    assert_eq!(registered(), ["dies", "returns"]);

    mesh.end("dies", Signal::KILL);
    mesh.end("returns", Signal::KILL);
    mesh.endpoint("returns", "b", &services);
    mesh.ready(&["returns"]);
    eventually("the dead one is not registered any more", || match registered() {
        found if found == ["returns"] => Ok(()),
        found => Err(format!("{found:?}")),
    });
    mesh.says("node1/manager", "the process of an endpoint of this node has ended");
    mesh.has("a", "nsm0");
}
