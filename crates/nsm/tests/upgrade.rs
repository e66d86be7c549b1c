//! An installed mesh is upgraded as it was installed, before a real API server; that wires stand meanwhile is shown where
//! there are some (`cluster.rs`).
#![allow(clippy::unwrap_used)]

#[path = "common/plugin.rs"]
mod plugin;

use std::fs;

use nsm_cluster::{ApiServer, api_server};
use plugin::Plugin;

struct Ring {
    server: ApiServer,
    plugin: Plugin,
    directory: tempfile::TempDir,
}

impl Ring {
    fn start(test: &str) -> Option<Self> {
        let server = api_server(test)?;
        let plugin = Plugin::new((*server).clone());
        Some(Self { server, plugin, directory: tempfile::tempdir().unwrap() })
    }

    /// What `kubectl nsm …` prints.
    fn prints(&self, args: &[&str]) -> String {
        let output = self.plugin.run(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, args: &[&str]) -> String {
        let output = self.plugin.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// What kubectl says of a manifest.
    fn kubectl(&self, args: &[&str], manifest: &str) -> String {
        let file = self.directory.path().join("manifest.yaml");
        fs::write(&file, manifest).unwrap();
        self.server.kubectl(&[args, &["--filename", file.to_str().unwrap()]].concat())
    }

    fn names(&self) -> String {
        let kinds = "deployments,services,roles,mutatingwebhookconfigurations,networkpolicies,daemonsets";
        self.server.kubectl(&["get", kinds, "--namespace=nsm-system", "--output=name"])
    }
}

#[test]
fn a_mesh_is_upgraded_as_it_was_installed_and_what_it_has_no_more_is_told() {
    let name = "a_mesh_is_upgraded_as_it_was_installed_and_what_it_has_no_more_is_told";
    let Some(ring) = Ring::start(name) else { return };
    let none = ring.fails(&["upgrade", "--tag", "v2"]);
    assert!(none.contains("there is no ConfigMap nsm-installation"), "{none}");

    let flags =
        ["--trust-domain", "mesh.example", "--underlay", "10.9.0.0/24", "--network-policies", "false"];
    let installed = ring.prints(&[&["install", "--tag", "v1"][..], &flags].concat());
    let _said = ring.kubectl(&["apply", "--validate=strict"], &installed);
    // Nothing is said: it is as it is.
    assert_eq!(ring.prints(&["upgrade"]), installed);
    assert_eq!(ring.kubectl(&["diff"], &installed), "");

    // Another version: the images, and nothing else.
    let upgraded = ring.prints(&["upgrade", "--tag", "v2"]);
    assert_eq!(upgraded, ring.prints(&[&["install", "--tag", "v2"][..], &flags].concat()));
    let changed = installed.lines().zip(upgraded.lines()).filter(|(before, after)| before != after);
    for (before, after) in changed {
        assert_eq!(before.replace("v1", "v2"), after);
        assert!(before.contains(":v1") || before.trim() == "tag: v1", "{before}");
    }
    let _said = ring.kubectl(&["apply", "--validate=strict"], &upgraded);
    assert_eq!(ring.prints(&["upgrade", "--leftovers"]), "");

    // Another flag, and what goes with it.
    let without = ring.prints(&["upgrade", "--webhook", "false"]);
    assert!(!without.contains("nsm-webhook:") && without.contains(":v2") && without.contains("mesh.example"));
    let _said = ring.kubectl(&["apply", "--validate=strict"], &without);
    assert!(ring.names().contains("deployment.apps/nsm-webhook"), "kubectl apply removes nothing");
    let left = ring.prints(&["upgrade", "--leftovers"]);
    assert!(left.starts_with("apiVersion: admissionregistration"), "what keeps pods out goes first: {left}");
    let _said = ring.kubectl(&["delete", "--wait=false"], &left);
    let names = ring.names();
    assert!(!names.contains("webhook"), "{names}");
    for stays in ["deployment.apps/nsm-registry", "deployment.apps/nsm-identity", "daemonset.apps/nsm-node"] {
        assert!(names.contains(stays), "{stays}: {names}");
    }
    // And back.
    let with = ring.prints(&["upgrade", "--webhook", "true"]);
    let _said = ring.kubectl(&["apply", "--validate=strict"], &with);
    assert!(ring.names().contains("deployment.apps/nsm-webhook"));
    assert_eq!(ring.prints(&["upgrade", "--leftovers"]), "");

    // What cannot be, and a record that is none.
    let bad = ring.fails(&["upgrade", "--underlay", "eth0"]);
    assert!(bad.contains("\"eth0\" is no prefix"), "{bad}");
    let spire = ring.plugin.run(&["upgrade", "--identity", "spire"]);
    let warned = String::from_utf8(spire.stderr).unwrap();
    assert!(spire.status.success() && warned.contains("wires are made anew"), "{warned}");
    let damage =
        ["patch", "configmap", "nsm-installation", "--namespace=nsm-system", "--type=merge", "--patch"];
    let _said = ring.server.kubectl(&[&damage[..], &[r#"{"data":{"settings.yaml":"tag: [1]"}}"#]].concat());
    let damaged = ring.fails(&["upgrade"]);
    assert!(damaged.contains("does not say how the mesh was installed: settings.yaml: "), "{damaged}");
}
