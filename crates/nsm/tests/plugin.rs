//! `kubectl nsm …` before a real API server, through kubectl itself. That pods answer is shown where there are pods
//! (`cluster.rs`); here nobody does, and what is said then has to help.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "common/plugin.rs"]
mod plugin;

use std::{
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
};

use nsm_cluster::api_server;
use plugin::Plugin;
use serde_json::json;

#[test]
fn what_keeps_a_person_from_a_cluster_is_said_with_what_to_do() {
    let Some(server) = api_server("what_keeps_a_person_from_a_cluster_is_said_with_what_to_do") else {
        return;
    };
    let plugin = Plugin::new((*server).clone());
    let fails = |args: &[&str], expected: &str| {
        let output = plugin.run(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(expected), "{args:?}: {said}");
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        said
    };
    for what in [&["get", "connections"][..], &["explain", "web"], &["check"], &["log", "debug"]] {
        fails(
            what,
            "there is no mesh in namespace nsm-system of this cluster (hint: `nsm install | kubectl apply",
        );
    }
    fails(&["get", "services", "--context", "nowhere"], "context \"nowhere\" does not exist");
    fails(&["get", "services", "--kubeconfig", "/nowhere"], "/nowhere");

    // Pods of a mesh that nobody runs: here is no kubelet.
    server.apply("{apiVersion: v1, kind: Namespace, metadata: {name: mesh}}");
    server.apply("{apiVersion: v1, kind: ServiceAccount, metadata: {name: default, namespace: mesh}}");
    for (name, part) in [("waits", "node"), ("runs", "registry")] {
        let labels = json!({ "app.kubernetes.io/name": "nsm", "app.kubernetes.io/component": part });
        let spec = json!({ "nodeName": "node1", "containers": [{ "name": part, "image": "nsm" }] });
        let metadata = json!({ "name": name, "namespace": "mesh", "labels": labels });
        let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec });
        server.apply(&pod.to_string());
    }
    let status = |pod: &str, status: &serde_json::Value| {
        let patch = json!({ "status": status }).to_string();
        let args =
            ["patch", "pod", pod, "--namespace=mesh", "--subresource=status", "--type=merge", "--patch"];
        let _said = server.kubectl(&[&args[..], &[&patch]].concat());
    };
    let waits = json!({ "waiting": { "reason": "ErrImagePull", "message": "no such image" } });
    let container = |name: &str, state: serde_json::Value| json!([{ "name": name, "state": state, "image": "nsm", "imageID": "", "ready": false, "restartCount": 0 }]);
    status("waits", &json!({ "phase": "Pending", "containerStatuses": container("node", waits) }));
    let running = json!({ "running": { "startedAt": "2026-01-01T00:00:00Z" } });
    status("runs", &json!({ "phase": "Running", "containerStatuses": container("registry", running) }));
    let said = fails(
        &["get", "services", "-n", "mesh"],
        "pod/waits on node1: not ready, Pending: ErrImagePull: no such image",
    );
    assert!(said.contains("pod/runs on node1: "), "{said}");
    let checks = plugin.run(&["check", "--namespace", "mesh", "--mesh"]);
    let found = String::from_utf8_lossy(&checks.stdout).into_owned();
    assert!(
        found.contains("FAILED") && found.contains("ErrImagePull") && !checks.status.success(),
        "{found}"
    );

    // Somebody who may not look.
    let stranger = server.kubeconfig_of("mesh", "stranger");
    let stranger = stranger.to_str().unwrap();
    let forbidden =
        fails(&["get", "services", "-n", "mesh", "--kubeconfig", stranger], "resources: [pods/exec]");
    assert!(forbidden.contains("is forbidden"), "{forbidden}");
    // … and somebody who may list, but not look into pods.
    let role = ["create", "role", "lister", "--namespace=mesh", "--verb=list,get", "--resource=pods"];
    let _said = server.kubectl(&role);
    let binding = [
        "create",
        "rolebinding",
        "lister",
        "--namespace=mesh",
        "--role=lister",
        "--serviceaccount=mesh:stranger",
    ];
    let _said = server.kubectl(&binding);
    fails(&["get", "services", "-n", "mesh", "--kubeconfig", stranger], "resources: [pods/exec]");
}

#[test]
fn the_plugin_offers_what_is_of_use_on_a_laptop_and_needs_kubectl() {
    let help = |program: &str, args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nsm"));
        command.arg0(program).args(args).env("PATH", "/nowhere").stdin(Stdio::null());
        let output = command.output().unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let own = help("kubectl-nsm", &["--help"]);
    assert!(own.contains("Usage: kubectl nsm <COMMAND>") && own.contains("  explain "), "{own}");
    assert!(!own.contains("  forwarder ") && !own.contains("  tell "), "{own}");
    assert!(help("nsm", &["--help"]).contains("  forwarder "));
    let without = help("kubectl-nsm", &["get", "services"]);
    assert!(without.contains("there is no kubectl in PATH"), "{without}");
    let both = help("kubectl-nsm", &["get", "services", "--lab", "x"]);
    assert!(both.contains("cannot be used with '--lab"), "{both}");
    let alone = help("nsm", &["get", "services", "--context", "x"]);
    assert!(alone.contains("--cluster"), "{alone}");
}
