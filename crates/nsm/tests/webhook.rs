//! The admission webhook beside a real API server: what it is asked, what comes of it, and what happens without it.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{
    fs::{self, File},
    io::Write as _,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nsm_cluster::{ApiServer, api_server};
use nsm_identity::ca::rotation::Authorities;
use serde_json::{Value, json};
use tempfile::TempDir;

/// What `nsm install` prints: the webhook has the rights of that, and no more.
fn manifest() -> String {
    let said = Command::new(env!("CARGO_BIN_EXE_nsm")).arg("install").output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8(said.stdout).unwrap()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        sleep(Duration::from_millis(50));
    }
}

/// An API server, and a webhook that it asks.
struct Ring {
    server: ApiServer,
    webhook: Option<Child>,
    account: PathBuf,
    port: u16,
    directory: TempDir,
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Ring {
    /// Without a webhook as yet.
    fn new(test: &str) -> Option<Self> {
        let server = api_server(test)?;
        server.apply(&manifest());
        let account = server.kubeconfig_of("nsm-system", "nsm-webhook");
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ring = Self { server, webhook: None, account, port, directory: tempfile::tempdir().unwrap() };
        for namespace in ["default", "kube-system"] {
            ring.with_account(namespace);
        }
        Some(ring)
    }

    /// No controller makes it here, and no pod is without one.
    fn with_account(&self, namespace: &str) {
        self.server.apply(&format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: default, namespace: {namespace}}}\n"
        ));
    }

    fn start(&mut self) {
        let log = File::options().create(true).append(true).open(self.directory.path().join("log")).unwrap();
        let url = format!("https://127.0.0.1:{}/mutate", self.port);
        let webhook = Command::new(env!("CARGO_BIN_EXE_nsm"))
            .args(["webhook", "--webhook-mode", "SelfRegister", "--webhook-url", &url])
            .args(["--listen-on", &format!("127.0.0.1:{}", self.port)])
            .env("KUBECONFIG", &self.account)
            .env("NSM_NAME", "nsm-mutating-webhook")
            .env("NSM_NAMESPACE", "nsm-system")
            .env("NSM_INIT_CONTAINER_IMAGES", "registry/cmd-nsc-init:1")
            .env("NSM_CONTAINER_IMAGES", "registry/cmd-nsc:1")
            .env("NSM_LABELS", "spiffe.io/spiffe-id:true")
            .env("NSM_ENVS", "NSM_LOG_LEVEL=INFO")
            .env("NSM_INTROSPECT_DIR", "")
            .stderr(log)
            .stdout(Stdio::null())
            .spawn();
        self.webhook = Some(webhook.unwrap());
    }

    fn started(test: &str) -> Option<Self> {
        let mut ring = Self::new(test)?;
        ring.start();
        until("the API server asks the webhook", || ring.is_patched("default"));
        Some(ring)
    }

    /// As a crash ends it.
    fn kill(&mut self) {
        if let Some(mut webhook) = self.webhook.take() {
            let _ = webhook.kill();
            let _ = webhook.wait();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn create(&self, object: &Value, args: &[&str]) -> Output {
        let mut kubectl = self.server.kubectl_command();
        kubectl.args(["create", "--filename=-", "--output=json"]).args(args);
        let mut kubectl =
            kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        kubectl.stdin.take().unwrap().write_all(object.to_string().as_bytes()).unwrap();
        kubectl.wait_with_output().unwrap()
    }

    /// What was created, and what kubectl said beside it.
    fn created(&self, object: &Value) -> (Value, String) {
        let output = self.create(object, &[]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}\n{}", self.log());
        (serde_json::from_slice(&output.stdout).unwrap(), said)
    }

    /// Why it was not created.
    fn refused(&self, object: &Value) -> String {
        let output = self.create(object, &[]);
        assert!(!output.status.success(), "it was created: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Whether an annotated pod would be patched now; without making it.
    fn is_patched(&self, namespace: &str) -> bool {
        let output = self.create(&pod(namespace, "probe-", Some("kernel://a/x")), &["--dry-run=server"]);
        let pod: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        output.status.success() && containers(&pod) == ["app", "cmd-nsc-init", "cmd-nsc"]
    }

    fn configuration(&self) -> Value {
        let name = "mutatingwebhookconfiguration/nsm-mutating-webhook";
        let found = self.server.kubectl(&["get", name, "--output=json", "--ignore-not-found"]);
        serde_json::from_str(&found).unwrap_or_default()
    }
}

fn pod(namespace: &str, name: &str, annotation: Option<&str>) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "generateName": name, "namespace": namespace },
        "spec": { "containers": [{ "name": "app", "image": "registry/app:1" }] },
    });
    if let Some(value) = annotation {
        pod["metadata"]["annotations"] = json!({ "networkservicemesh.io": value });
    }
    pod
}

/// The names of a pod's containers, init containers last.
fn containers(pod: &Value) -> Vec<&str> {
    let lists = ["containers", "initContainers"].map(|list| pod["spec"][list].as_array());
    lists.into_iter().flatten().flatten().filter_map(|container| container["name"].as_str()).collect()
}

#[test]
fn what_is_created_through_a_real_api_server_is_patched() {
    let test = "what_is_created_through_a_real_api_server_is_patched";
    let Some(ring) = Ring::started(test) else { return };

    // A pod; native side-cars, as this API server knows them, with upstream's variables.
    let (created, said) = ring.created(&pod("default", "web-", Some("kernel://finance/nsm-1, memif://b")));
    assert_eq!(said, "");
    assert_eq!(containers(&created), ["app", "cmd-nsc-init", "cmd-nsc"]);
    let side = &created["spec"]["initContainers"][1];
    assert_eq!(side["restartPolicy"], "Always");
    assert_eq!(side["env"][3]["value"], "kernel://finance/nsm-1,memif://b");
    assert_eq!(side["env"][4], json!({ "name": "NSM_NAME", "value": "$(POD_NAME)" }));
    assert_eq!(created["metadata"]["labels"]["spiffe.io/spiffe-id"], "true");
    let hosts: Vec<_> =
        created["spec"]["volumes"].as_array().unwrap().iter().map(|v| &v["hostPath"]["path"]).collect();
    assert!(
        hosts.contains(&&json!("/run/spire/sockets"))
            && hosts.contains(&&json!("/var/lib/networkservicemesh"))
    );

    // A Deployment, by its own annotation.
    let template = json!({
        "metadata": { "labels": { "app": "web" } },
        "spec": { "containers": [{ "name": "app", "image": "registry/app:1" }] },
    });
    let mut workload = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": "web", "namespace": "default", "annotations": { "networkservicemesh.io": "kernel://a/x" },
        },
        "spec": { "selector": { "matchLabels": { "app": "web" } }, "template": template },
    });
    let (created, _) = ring.created(&workload);
    assert_eq!(containers(&created["spec"]["template"]), ["app", "cmd-nsc-init", "cmd-nsc"]);
    // By its template's, which has to be right.
    workload["metadata"] = json!({ "name": "other", "namespace": "default" });
    workload["spec"]["template"]["metadata"]["annotations"] = json!({ "networkservicemesh.io": "a/x" });
    let (created, said) = ring.created(&workload);
    assert_eq!(containers(&created["spec"]["template"]), ["app"]);
    assert!(
        said.contains("Warning: networkservicemesh.io: network service \"a/x\": it has no MECHANISM://"),
        "{said}"
    );

    // A namespace, its pods, and one that wants nothing.
    let annotation = r#"annotations: {networkservicemesh.io: "kernel://n/x"}"#;
    ring.server.apply(&format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: wired, {annotation}, labels: {{pod-security.kubernetes.io/enforce: baseline}}}}\n"
    ));
    ring.with_account("wired");
    let (created, _) = ring.created(&pod("wired", "web-", None));
    assert_eq!(containers(&created), ["app", "cmd-nsc-init", "cmd-nsc"], "{}", ring.log());
    let volumes = created["spec"]["volumes"].as_array().unwrap();
    assert!(
        volumes.iter().any(|volume| volume["csi"]["driver"] == "csi.networkservicemesh.io"),
        "{volumes:?}"
    );
    let mut out = pod("wired", "web-", None);
    out["metadata"]["annotations"] = json!({ "networkservicemesh.io/inject": "false" });
    assert_eq!(containers(&ring.created(&out).0), ["app"]);

    // Pods without an annotation, pods of namespaces that are spared, a restricted namespace.
    assert_eq!(containers(&ring.created(&pod("default", "web-", None)).0), ["app"]);
    for spared in ["kube-system", "nsm-system"] {
        ring.with_account(spared);
        assert_eq!(containers(&ring.created(&pod(spared, "web-", Some("kernel://a/x"))).0), ["app"]);
    }
    ring.server.apply(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: strict, labels: {pod-security.kubernetes.io/enforce: restricted}}\n",
    );
    ring.with_account("strict");
    let mut own = pod("strict", "web-", Some("kernel://a/x"));
    own["spec"]["containers"][0]["securityContext"] = json!({
        "allowPrivilegeEscalation": false,
        "runAsNonRoot": true,
        "capabilities": { "drop": ["ALL"] },
        "seccompProfile": { "type": "RuntimeDefault" },
    });
    assert_eq!(containers(&ring.created(&own).0), ["app", "cmd-nsc-init", "cmd-nsc"]);
}

#[test]
fn a_pod_is_told_by_a_warning_and_by_an_event_what_could_not_be_understood() {
    let test = "a_pod_is_told_by_a_warning_and_by_an_event_what_could_not_be_understood";
    let Some(mut ring) = Ring::started(test) else { return };
    let (created, said) = ring.created(&pod("default", "web-", Some("kernel://a b/x")));
    let problem = "network service \"kernel://a b/x\" at character 11: invalid character ' '";
    assert!(said.contains(&format!("Warning: networkservicemesh.io: {problem}")), "{said}");
    assert_eq!(containers(&created), ["app", "cmd-nsc-init", "cmd-nsc"], "as upstream admits it");
    let name = created["metadata"]["name"].as_str().unwrap();
    let events = |ring: &Ring| {
        let field = format!("--field-selector=involvedObject.name={name},reason=NetworkServiceNotUnderstood");
        let events = ring.server.kubectl(&["get", "events", "--output=json", &field]);
        serde_json::from_str::<Value>(&events).unwrap()["items"].as_array().unwrap().clone()
    };
    until("the pod has an event", || events(&ring).len() == 1);
    let told = events(&ring)[0].clone();
    assert!(told["message"].as_str().unwrap().contains(problem), "{told}");
    assert_eq!(told["involvedObject"]["uid"], created["metadata"]["uid"]);
    assert!(ring.server.kubectl(&["describe", "pod", name]).contains("NetworkServiceNotUnderstood"));

    // The next process tells what this one did not come to, and nothing twice.
    ring.kill();
    let _said = ring.server.kubectl(&["delete", "events", "--all"]);
    ring.start();
    until("the next process tells it", || events(&ring).len() == 1);
}

#[test]
fn who_asks_for_no_wire_is_created_while_the_webhook_is_down() {
    let test = "who_asks_for_no_wire_is_created_while_the_webhook_is_down";
    let Some(mut ring) = Ring::started(test) else { return };
    ring.server.apply(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: wired, annotations: {networkservicemesh.io: \"kernel://n/x\"}}\n",
    );
    ring.with_account("wired");
    // The first pod of it makes it known.
    assert_eq!(containers(&ring.created(&pod("wired", "web-", None)).0), ["app", "cmd-nsc-init", "cmd-nsc"]);
    until("the namespace is known to be annotated", || {
        ring.configuration()["webhooks"].as_array().is_some_and(|webhooks| webhooks.len() == 3)
    });
    let configuration = ring.configuration();
    assert_eq!(configuration["metadata"]["ownerReferences"][0]["name"], "nsm-system");

    ring.kill();
    let refused = ring.refused(&pod("default", "web-", Some("kernel://a/x")));
    assert!(refused.contains("nsm-mutating-webhook.networkservicemesh.io"), "{refused}");
    until("the API server knows of the namespace too", || {
        let output = ring.create(&pod("wired", "web-", None), &["--dry-run=server"]);
        !output.status.success()
    });
    assert_eq!(containers(&ring.created(&pod("default", "web-", None)).0), ["app"]);
    assert_eq!(containers(&ring.created(&pod("kube-system", "web-", None)).0), ["app"]);

    // A restart: the authorities are kept, so that nothing has to be told to the API server.
    ring.start();
    until("it is asked again", || ring.is_patched("default"));
    assert_eq!(
        ring.configuration()["metadata"]["resourceVersion"],
        configuration["metadata"]["resourceVersion"]
    );

    // The API server's own.
    ring.server.kill();
    ring.server.go_on().unwrap();
    until("the API server's restart is survived", || ring.is_patched("default"));
    assert_eq!(containers(&ring.created(&pod("wired", "web-", None)).0), ["app", "cmd-nsc-init", "cmd-nsc"]);

    // What somebody removes or changes comes back.
    let _said = ring.server.kubectl(&["delete", "mutatingwebhookconfiguration", "nsm-mutating-webhook"]);
    until("the configuration is written again", || ring.is_patched("default"));
}

#[test]
fn an_expired_authority_is_replaced() {
    let Some(mut ring) = Ring::new("an_expired_authority_is_replaced") else { return };
    let years_ago = SystemTime::now() - Duration::from_secs(3 * 365 * 24 * 3600);
    let expired = Authorities::new(years_ago).unwrap();
    let secret = |pem: &str| {
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: nsm-webhook-authorities, namespace: nsm-system}}\ndata: {{authorities.pem: {}}}\n",
            BASE64_STANDARD.encode(pem)
        )
    };
    ring.server.apply(&secret(&expired.pem()));
    ring.start();
    until("a new authority signs", || ring.is_patched("default"));
    let kept = |ring: &Ring| {
        let path = "--output=jsonpath={.data.authorities\\.pem}";
        let kept =
            ring.server.kubectl(&["get", "secret", "-n", "nsm-system", "nsm-webhook-authorities", path]);
        String::from_utf8(BASE64_STANDARD.decode(kept.trim()).unwrap()).unwrap()
    };
    let renewed = kept(&ring);
    assert!(!renewed.contains(&expired.bundle()), "what has ended is not trusted any more");
    assert!(ring.log().contains("the Secret nsm-system/nsm-webhook-authorities"), "{}", ring.log());

    // What is damaged too, while it runs.
    ring.server.apply(&secret("nonsense"));
    until("it is replaced", || kept(&ring).contains("BEGIN CERTIFICATE"));
    until("the API server trusts the new one", || ring.is_patched("default"));
    assert!(ring.log().contains("the kept authorities cannot be used"), "{}", ring.log());
}

#[test]
fn what_rbac_does_not_allow_is_named() {
    let Some(mut ring) = Ring::new("what_rbac_does_not_allow_is_named") else { return };
    let _said = ring.server.kubectl(&["delete", "clusterrolebinding", "nsm-system-webhook"]);
    ring.start();
    let says = "cannot list resource \\\"namespaces\\\" in API group \\\"\\\" at the cluster scope";
    let or = "cannot get resource \\\"namespaces\\\"";
    until("the log names what is missing", || {
        let log = ring.log();
        log.contains("the API server did not tell of") && (log.contains(says) || log.contains(or))
    });
    ring.server.apply(&manifest());
    until("it goes on when it may", || ring.is_patched("default"));
}

/// Many at once, and what a review takes: printed, not asserted.
#[test]
fn five_hundred_pods_are_reviewed() {
    let Some(ring) = Ring::started("five_hundred_pods_are_reviewed") else { return };
    let pods: Vec<_> = (0..500).map(|_| pod("default", "many-", Some("kernel://a/x"))).collect();
    let began = Instant::now();
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": pods });
    let output = ring.create(&list, &[]);
    let took = began.elapsed();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let created: Value =
        serde_json::from_str(&ring.server.kubectl(&["get", "pods", "--output=json"])).unwrap();
    let items = created["items"].as_array().unwrap();
    assert_eq!(items.len(), 500);
    assert!(items.iter().all(|pod| containers(pod) == ["app", "cmd-nsc-init", "cmd-nsc"]));
    let log = ring.log();
    let mut reviews: Vec<f64> =
        log.lines().filter(|line| line.contains("many-")).filter_map(milliseconds).collect();
    assert_eq!(reviews.len(), 500, "each is asked about once");
    reviews.sort_by(f64::total_cmp);
    println!(
        "500 pods in {took:.1?}; a review takes {:.2} ms p50, {:.2} ms p99, one GET of the namespace included",
        reviews[250], reviews[495]
    );
}

/// How long a review took, by its log line.
fn milliseconds(line: &str) -> Option<f64> {
    let took = line.split("took=").nth(1)?.split_whitespace().next()?;
    let number =
        |suffix: &str, factor: f64| took.strip_suffix(suffix)?.parse::<f64>().ok().map(|n| n * factor);
    number("ms", 1.0).or_else(|| number("µs", 0.001)).or_else(|| number("s", 1000.0))
}
