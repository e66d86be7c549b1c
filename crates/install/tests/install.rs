//! What is printed for a cluster is taken by one, says what its flags say, and is the same in every form.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use nsm_cluster::api_server;
use nsm_install::{Identity, InstallError, Settings, Store, chart, manifest, objects::objects, removal};
use serde_json::Value;

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(300);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        sleep(Duration::from_millis(100));
    }
}

fn every_choice() -> Vec<Settings> {
    let mut all = Vec::new();
    for store in [Store::Memory, Store::Kubernetes] {
        for identity in [Identity::Spire, Identity::Builtin] {
            for (webhook, network_policies) in [(false, false), (false, true), (true, false), (true, true)] {
                all.push(Settings { store, identity, webhook, network_policies, ..Settings::default() });
            }
        }
    }
    all
}

/// The objects of a manifest, by kind and name.
fn read(manifest: &str) -> BTreeMap<String, Value> {
    let documents = manifest.split("\n---\n").map(|text| text.trim_start_matches("---\n"));
    let objects = documents
        .filter(|text| text.lines().any(|line| !line.is_empty() && !line.starts_with('#')))
        .map(|text| serde_saphyr::from_str::<Value>(text).unwrap_or_else(|e| panic!("{e}:\n{text}")));
    objects.map(|object| (key(&object), object)).collect()
}

fn key(object: &Value) -> String {
    format!("{} {}", object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap())
}

fn by_key(settings: &Settings) -> BTreeMap<String, Value> {
    objects(settings).into_iter().map(|object| (key(&object), object)).collect()
}

#[test]
fn each_flag_does_what_it_says() {
    let all = by_key(&Settings::default());
    let has = |objects: &BTreeMap<String, Value>, key: &str| objects.contains_key(key);
    for key in [
        "Namespace nsm-system",
        "PriorityClass nsm-system",
        "DaemonSet nsm-node",
        "Deployment nsm-identity",
        "Deployment nsm-registry",
        "Deployment nsm-webhook",
        "MutatingWebhookConfiguration nsm-mutating-webhook",
        "Service registry",
        "Service admission-webhook-svc",
        "PodDisruptionBudget nsm-registry",
        "NetworkPolicy nsm-webhook",
    ] {
        assert!(has(&all, key), "{key}");
    }
    let without = |change: fn(&mut Settings)| {
        let mut settings = Settings::default();
        change(&mut settings);
        by_key(&settings)
    };
    assert!(!without(|s| s.webhook = false).keys().any(|key| key.contains("webhook")));
    assert!(!without(|s| s.network_policies = false).keys().any(|key| key.contains("NetworkPolicy")));
    let spire = without(|s| s.identity = Identity::Spire);
    assert!(!spire.keys().any(|key| key.contains("identity")) && !has(&spire, "Role nsm-node"));
    assert_eq!(
        spire["DaemonSet nsm-node"]["spec"]["template"]["spec"]["containers"].as_array().unwrap().len(),
        1
    );
    let memory = without(|s| s.store = Store::Memory);
    assert_eq!(memory["Deployment nsm-registry"]["spec"]["replicas"], 1);
    assert!(!has(&memory, "ClusterRole nsm-system-registry"), "it talks to no API server");
    assert_eq!(all["Deployment nsm-registry"]["spec"]["replicas"], 2);

    let told = manifest(&Settings {
        namespace: "mesh".into(),
        images: "registry.example/a/".into(),
        tag: "v1".into(),
        pull_policy: "Never".into(),
        log_level: "debug".into(),
        trust_domain: "mesh.example".into(),
        identity_socket: ("/run/other".into(), "api.sock".into()),
        ..Settings::default()
    })
    .unwrap();
    assert!(
        !told.contains("nsm-system") && !told.contains(":dev") && !told.contains("IfNotPresent"),
        "{told}"
    );
    assert_eq!(told.matches("image: registry.example/a/nsm:v1").count(), 5);
    assert!(
        told.contains("registry.example/a/cmd-nsc-init:v1") && told.contains("tcp://registry.mesh.svc:5002")
    );
    assert_eq!(told.matches("value: debug").count(), 5);
    assert!(told.contains("value: mesh.example") && told.contains("nsm-identity.mesh.svc:443"));
    // On the node it is elsewhere, in pods where it always is.
    assert_eq!(told.matches("path: /run/other\n").count(), 2);
    assert!(
        told.contains("unix:///run/spire/sockets/api.sock") && told.contains("value: /run/other/api.sock")
    );
    let tunnels = |underlay: &str| {
        let all = by_key(&Settings { underlay: underlay.into(), ..Settings::default() });
        let env = all["DaemonSet nsm-node"]["spec"]["template"]["spec"]["containers"][0]["env"].clone();
        env.as_array().unwrap().iter().find(|v| v["name"] == "NSM_TUNNEL_IP").unwrap()["value"].clone()
    };
    assert_eq!((tunnels(""), tunnels("10.9.0.0/24")), ("$(NODE_IP)".into(), "10.9.0.0/24".into()));
    let crds = |crds: bool| manifest(&Settings { crds, ..Settings::default() }).unwrap();
    assert_eq!(crds(true).matches("kind: CustomResourceDefinition").count(), 3);
    assert_eq!(crds(false).matches("kind: CustomResourceDefinition").count(), 0);
}

#[test]
fn what_no_cluster_takes_is_refused() {
    type Change = fn(&mut Settings);
    let cases: [(Change, &str); 9] = [
        (|s| s.trust_domain = "K8s".into(), "a trust domain has only lower-case letters"),
        (|s| s.identity_socket.0 = "run".into(), "\"run/agent.sock\" is no path of a socket"),
        (|s| s.underlay = "eth0".into(), "\"eth0\" is no prefix; expected ADDRESS/LENGTH"),
        (|s| s.namespace = "Mesh".into(), "\"Mesh\" is no namespace; expected at most 63 lower-case"),
        (|s| s.namespace = String::new(), "\"\" is no namespace"),
        (|s| s.namespace = "a: b".into(), "\"a: b\" is no namespace"),
        (|s| s.images = "registry.example".into(), "expected REGISTRY/PATH/"),
        (|s| s.images = "a b/".into(), "\"a b/\" cannot stand before an image's name"),
        (|s| s.tag = "a:b".into(), "\"a:b\" is no tag of an image"),
    ];
    for (change, says) in cases {
        let mut settings = Settings::default();
        change(&mut settings);
        let refused: [Result<_, InstallError>; 2] = [manifest(&settings), removal(&settings)];
        for error in refused.map(Result::unwrap_err) {
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}

/// What one object names, another is.
#[test]
fn nothing_refers_to_what_is_not_there() {
    for settings in every_choice() {
        let all = by_key(&settings);
        for (key, object) in &all {
            let pod = &object["spec"]["template"];
            if pod.is_null() {
                continue;
            }
            let named = |kind: &str, name: &Value| format!("{kind} {}", name.as_str().unwrap());
            assert!(all.contains_key(&named("ServiceAccount", &pod["spec"]["serviceAccountName"])), "{key}");
            assert!(all.contains_key(&named("PriorityClass", &pod["spec"]["priorityClassName"])), "{key}");
            let volumes = pod["spec"]["volumes"].as_array().unwrap();
            let containers = pod["spec"]["containers"].as_array().unwrap();
            assert!(!containers[0]["readinessProbe"].is_null(), "{key}");
            for container in containers {
                assert!(!container["resources"]["requests"]["memory"].is_null(), "{key}");
                for mount in container["volumeMounts"].as_array().into_iter().flatten() {
                    assert!(volumes.iter().any(|volume| volume["name"] == mount["name"]), "{key} {mount}");
                }
                // Only what enters other pods may more than talk.
                let security = &container["securityContext"];
                let makes_wires = key == "DaemonSet nsm-node" && container["name"] == "node";
                assert_eq!(security["privileged"] == true, makes_wires);
                assert_eq!(security["capabilities"]["drop"][0] == "ALL", !makes_wires);
                assert_eq!(security["readOnlyRootFilesystem"], true);
            }
        }
        for (key, object) in &all {
            let selector = match object["kind"].as_str().unwrap() {
                "Service" => &object["spec"]["selector"],
                "Deployment" | "DaemonSet" | "PodDisruptionBudget" => {
                    &object["spec"]["selector"]["matchLabels"]
                }
                "NetworkPolicy" => &object["spec"]["podSelector"]["matchLabels"],
                _ => continue,
            };
            let selected = all.values().filter(|other| {
                let labels = &other["spec"]["template"]["metadata"]["labels"];
                selector.as_object().unwrap().iter().all(|(name, value)| labels[name] == *value)
            });
            assert_eq!(selected.count(), 1, "{key} selects one workload");
        }
        for role in all.values().filter(|object| object["kind"].as_str().unwrap().ends_with("Role")) {
            for rule in role["rules"].as_array().unwrap() {
                let text = rule.to_string();
                assert!(!text.contains('*'), "least privilege: {text}");
            }
        }
    }
}

/// A renderer of the little of Helm's language that the chart uses.
fn render(template: &str, values: &BTreeMap<&str, String>) -> String {
    let holds = |condition: &str| {
        let one = |condition: &str| {
            let (negated, rest) = match condition.strip_prefix("not ") {
                Some(rest) => (true, rest),
                None => (false, condition),
            };
            let words: Vec<_> = rest.split(' ').collect();
            let value = |word: &str| values[word.strip_prefix(".Values.").unwrap()].clone();
            let holds = match words[..] {
                ["eq", name, text] => value(name) == text.trim_matches('"'),
                ["ne", name, text] => value(name) != text.trim_matches('"'),
                [name] => value(name) == "true",
                _ => panic!("{condition}"),
            };
            holds != negated
        };
        match condition.strip_prefix("and ") {
            Some(all) => all.trim_matches(['(', ')']).split(") (").all(one),
            None => one(condition),
        }
    };
    let mut out = String::new();
    let mut shown = true;
    for line in template.lines() {
        if let Some(condition) = line.strip_prefix("{{- if ") {
            shown = holds(condition.strip_suffix(" }}").unwrap());
        } else if line == "{{- end }}" {
            shown = true;
        } else if shown {
            let underlay =
                Some(values["underlay"].as_str()).filter(|text| !text.is_empty()).unwrap_or("$(NODE_IP)");
            let (directory, file) = values["identitySocket"].rsplit_once('/').unwrap();
            let line = line.replace("{{ .Values.underlay | default `$(NODE_IP)` }}", underlay);
            let line = line.replace("{{ dir .Values.identitySocket }}", directory);
            let line = line.replace("{{ base .Values.identitySocket }}", file);
            let replaced = values
                .iter()
                .fold(line, |line, (name, value)| line.replace(&format!("{{{{ .Values.{name} }}}}"), value));
            assert!(!replaced.contains("{{"), "{replaced}");
            out += &(replaced + "\n");
        }
    }
    out
}

#[test]
fn chart_and_base_are_the_manifest() {
    let chart = chart::helm(&Settings::default(), "0.1.0").unwrap();
    for settings in every_choice() {
        let settings =
            Settings { tag: "v7".into(), namespace: "mesh".into(), images: "r/x/".into(), ..settings };
        let store = if settings.store == Store::Memory { "memory" } else { "kubernetes" };
        let values = BTreeMap::from([
            ("namespace", settings.namespace.clone()),
            ("images", settings.images.clone()),
            ("tag", settings.tag.clone()),
            ("pullPolicy", settings.pull_policy.clone()),
            ("trustDomain", settings.trust_domain.clone()),
            ("identity", if settings.identity == Identity::Spire { "spire" } else { "builtin" }.to_owned()),
            ("identitySocket", format!("{}/{}", settings.identity_socket.0, settings.identity_socket.1)),
            ("logLevel", settings.log_level.clone()),
            ("underlay", settings.underlay.clone()),
            ("store", store.to_owned()),
            ("webhook", settings.webhook.to_string()),
            ("networkPolicies", settings.network_policies.to_string()),
        ]);
        let rendered = render(&chart["templates/nsm.yaml"], &values);
        assert_eq!(read(&rendered), by_key(&settings));
        let base = chart::kustomize(&settings).unwrap();
        let whole = format!("{}---\n{}", base["crds.yaml"], base["nsm.yaml"]);
        assert_eq!(read(&whole), read(&manifest(&settings).unwrap()));
    }
    // The values that it comes with are the settings that it was made of.
    let values: Value = serde_saphyr::from_str(&chart["values.yaml"]).unwrap();
    assert_eq!((&values["namespace"], &values["tag"]), (&"nsm-system".into(), &"dev".into()));
    assert_eq!((&values["identity"], &values["trustDomain"]), (&"builtin".into(), &"k8s.nsm".into()));
    assert_eq!((&values["store"], &values["webhook"]), (&"kubernetes".into(), &true.into()));
}

#[test]
fn what_is_in_the_tree_is_what_is_made() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
    let version = env!("CARGO_PKG_VERSION");
    for (directory, files) in [
        ("kustomize", chart::kustomize(&Settings::default()).unwrap()),
        ("helm/nsm", chart::helm(&Settings::default(), version).unwrap()),
    ] {
        for (path, text) in files {
            let path = deploy.join(directory).join(path);
            let found = fs::read_to_string(&path).unwrap_or_default();
            assert!(found == text, "{} is stale: run `cargo xtask deploy`", path.display());
        }
    }
}

#[test]
fn an_api_server_takes_all_of_it_and_gives_it_back() {
    let Some(server) = api_server("an_api_server_takes_all_of_it_and_gives_it_back") else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("nsm.yaml");
    let name = file.to_str().unwrap();
    let choices = every_choice();
    for (i, settings) in choices.iter().enumerate() {
        // As a person does it; what the server does not know is an error.
        let text = manifest(settings).unwrap();
        fs::write(&file, &text).unwrap();
        let names = |said: &str| said.lines().filter(|line| !line.is_empty()).count();
        let made = server.kubectl(&["apply", "--validate=strict", "--output=name", "--filename", name]);
        assert_eq!(names(&made), read(&text).len(), "{made}");
        // Again: the same, and what a server adds is no difference.
        let again = server.kubectl(&["diff", "--filename", name]);
        assert_eq!(again, "");
        let server_side =
            ["apply", "--server-side", "--dry-run=server", "--force-conflicts", "--filename", name];
        let _said = server.kubectl(&server_side);

        // The definitions only at the end: they take long to go.
        let crds = i + 1 == choices.len();
        let removal = removal(&Settings { crds, ..settings.clone() }).unwrap();
        assert!(removal.starts_with("apiVersion: admissionregistration") || !settings.webhook, "pods first");
        fs::write(&file, &removal).unwrap();
        // Nobody finishes namespaces here, so they are not waited for.
        let _said = server.kubectl(&["delete", "--wait=false", "--filename", name]);
        for kind in [
            "clusterroles",
            "clusterrolebindings",
            "priorityclasses",
            "mutatingwebhookconfigurations",
            "validatingadmissionpolicies",
            "validatingadmissionpolicybindings",
            "crds",
        ] {
            until(&format!("{kind} are gone"), || {
                let left = server.kubectl(&["get", kind, "--output=name"]);
                let stays = kind == "crds" && !crds;
                !left.contains("nsm-") && left.contains("networkservice") == stays
            });
        }
        for namespaced in ["deployments", "daemonsets", "services", "roles", "serviceaccounts"] {
            let left = server.kubectl(&["get", namespaced, "--namespace=nsm-system", "--output=name"]);
            assert!(!left.contains("nsm"), "{left}");
        }
        let finalize = "/api/v1/namespaces/nsm-system/finalize";
        let gone = directory.path().join("gone.json");
        fs::write(&gone, r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"nsm-system"},"spec":{"finalizers":[]}}"#).unwrap();
        let _said = server.kubectl(&["replace", "--raw", finalize, "--filename", gone.to_str().unwrap()]);
    }
    // kubectl makes the same of the base.
    let base = directory.path().join("base");
    fs::create_dir(&base).unwrap();
    for (path, text) in chart::kustomize(&Settings::default()).unwrap() {
        fs::write(base.join(path), text).unwrap();
    }
    let built = server.kubectl(&["kustomize", base.to_str().unwrap()]);
    assert_eq!(read(&built), read(&manifest(&Settings::default()).unwrap()));
}
