//! What becomes of wires is said on pods, before a real API server, with the rights that `nsm install` gives a node.
#![allow(clippy::unwrap_used)]

use std::{
    io::Write as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::Duration,
};

use nsm_api::{
    path,
    pb::{
        connection::{Connection, Mechanism, Path, PathSegment},
        connectioncontext::{ConnectionContext, IpContext},
    },
};
use nsm_cluster::{ApiServer, api_server};
use nsm_k8s::{
    objects::{Objects, Patch},
    wires::{CONDITION, Name, Reader, Trouble, Wires, Wish, Writer},
};
use serde_json::{Value, json};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};

const PATIENCE: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(3600);

/// An API server with two nodes that nothing runs on, and pods there.
struct Ring {
    server: ApiServer,
    /// Of what makes wires on node 1.
    node1: PathBuf,
}

fn pod(name: &str, node: &str, gates: &Value) -> String {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": "apps" },
        "spec": { "nodeName": node, "readinessGates": gates, "containers": [{ "name": "web", "image": "web" }] },
    })
    .to_string()
}

impl Ring {
    fn start(test: &str) -> Option<Self> {
        let server = api_server(test)?;
        let printed = Command::new(env!("CARGO_BIN_EXE_nsm")).arg("install").output().unwrap();
        let printed = String::from_utf8(printed.stdout).unwrap();
        server.install(&[nsm_k8s::crd::WIRES]);
        let of_nodes = printed.split("---\n").filter(|object| object.contains("component: node\n"));
        let of_nodes: Vec<_> = of_nodes.filter(|object| !object.contains("kind: DaemonSet")).collect();
        server.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: nsm-system}}}}\n---\n{}",
            of_nodes.join("---\n")
        ));
        for object in [
            "{apiVersion: v1, kind: Namespace, metadata: {name: apps}}",
            "{apiVersion: v1, kind: ServiceAccount, metadata: {name: default, namespace: apps}}",
            "{apiVersion: v1, kind: Node, metadata: {name: node1}}",
            "{apiVersion: v1, kind: Node, metadata: {name: node2}}",
            &pod("web", "node1", &json!([{ "conditionType": CONDITION }])),
            &pod("plain", "node1", &json!([])),
            &pod("other", "node2", &json!([{ "conditionType": CONDITION }])),
        ] {
            server.apply(object);
        }
        let node1 = server.kubeconfig_on("node1", "nsm-system", "nsm-node");
        let ring = Self { server, node1 };
        // Policies are looked at a moment after they are made.
        let probe = ring.wire("probe", "node2");
        let end = std::time::Instant::now() + PATIENCE;
        while ring
            .as_node(&ring.node1, &["create", "--dry-run=server", "--filename=-"], &probe)
            .status
            .success()
        {
            assert!(std::time::Instant::now() < end, "the policies do not come into force");
            std::thread::sleep(Duration::from_millis(100));
        }
        Some(ring)
    }

    fn wire(&self, name: &str, node: &str) -> String {
        json!({
            "apiVersion": "networkservicemesh.io/v1", "kind": "Wire", "metadata": { "name": name, "namespace": "apps" },
            "spec": { "pod": "web", "node": node, "connection": "c", "service": "s" },
        })
        .to_string()
    }

    fn as_node(&self, kubeconfig: &std::path::Path, args: &[&str], input: &str) -> Output {
        let mut kubectl = self.server.kubectl_command();
        kubectl.env("KUBECONFIG", kubeconfig).args(args).args(["--namespace", "apps"]).stdin(Stdio::piped());
        let mut kubectl = kubectl.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // What it does not want to read it does not.
        let _ = kubectl.stdin.take().unwrap().write_all(input.as_bytes());
        kubectl.wait_with_output().unwrap()
    }

    async fn writer(&self, claim: Duration) -> (Wires, JoinHandle<()>) {
        let (api, wires) = (Objects::of(&self.node1).await.unwrap(), Wires::default());
        let writing = tokio::spawn(Writer::new(api, wires.clone(), "node1", claim).run());
        (wires, writing)
    }

    fn get(&self, args: &[&str]) -> Value {
        let said = self.server.kubectl(&[&["get", "--namespace=apps", "--output=json"], args].concat());
        serde_json::from_str(&said).unwrap()
    }

    fn uid(&self, pod: &str) -> String {
        self.get(&["pod", pod])["metadata"]["uid"].as_str().unwrap().to_owned()
    }

    /// The status of a pod's wire.
    fn status(&self, pod: &str) -> Value {
        let wires = self.wires();
        wires.iter().find(|wire| wire["spec"]["pod"] == pod).unwrap()["status"].clone()
    }

    fn wires(&self) -> Vec<Value> {
        self.get(&["wires"])["items"].as_array().unwrap().clone()
    }

    /// Reasons and messages, the oldest first.
    fn events(&self, pod: &str) -> Vec<(String, String)> {
        let events = self.get(&["events", &format!("--field-selector=involvedObject.name={pod}")]);
        let mut events = events["items"].as_array().unwrap().clone();
        events.sort_by_key(|event| event["metadata"]["name"].as_str().unwrap().to_owned());
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        events.iter().map(|event| (text(&event["reason"]), text(&event["message"]))).collect()
    }

    /// The pod's condition, and what it says.
    fn condition(&self, pod: &str) -> Option<(String, String)> {
        let pod = self.get(&["pod", pod]);
        let conditions = pod["status"]["conditions"].as_array()?;
        let found = conditions.iter().find(|condition| condition["type"] == CONDITION)?;
        let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
        Some((text("status"), text("message")))
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        sleep(Duration::from_millis(100)).await;
    }
}

fn name(pod: &str) -> Name {
    Name { namespace: "apps".into(), pod: pod.into(), connection: format!("{pod}-0") }
}

fn wish() -> Wish {
    Wish { service: "finance".into(), labels: [("app".to_owned(), "web".to_owned())].into() }
}

fn connection(endpoint: &str) -> Connection {
    let segment = |name: &str| PathSegment { name: name.into(), ..PathSegment::default() };
    let ip = IpContext {
        src_ip_addrs: vec!["172.16.1.1/32".into()],
        dst_ip_addrs: vec!["172.16.1.0/32".into()],
        ..IpContext::default()
    };
    let hops = ["web-0", "nsm-node-node1", "forwarder-nsm-node-node1", endpoint];
    let mut conn = Connection {
        network_service: "finance".into(),
        network_service_endpoint_name: endpoint.into(),
        payload: "IP".into(),
        mechanism: Some(Mechanism {
            cls: "LOCAL".into(),
            r#type: "KERNEL".into(),
            parameters: [("name".to_owned(), "nsm-1".to_owned())].into(),
            ..Mechanism::default()
        }),
        context: Some(ConnectionContext { ip_context: Some(ip), mtu: 1450, ..ConnectionContext::default() }),
        path: Some(Path { index: 1, path_segments: hops.map(segment).to_vec(), ..Path::default() }),
        ..Connection::default()
    };
    assert!(path::current_mut(&mut conn).is_some());
    conn
}

#[tokio::test]
async fn what_becomes_of_a_wire_is_said_on_its_pod() {
    let Some(ring) = Ring::start("what_becomes_of_a_wire_is_said_on_its_pod") else { return };
    let (wires, writing) = ring.writer(LONG).await;
    let (web, uid) = (name("web"), ring.uid("web"));
    wires.asked(&web, wish());
    wires.is_of(&web, &uid);
    let nobody = "fwd: no endpoint of service \"finance\" (hint: start one, or look at nsm get endpoints)";
    wires.failed(&web, Trouble::said(nobody));
    until("the pod hears why there is no wire", || !ring.events("web").is_empty()).await;
    let (reason, message) = ring.events("web").remove(0);
    assert_eq!(reason, "WireNotUp");
    assert_eq!(
        message,
        "there is no wire to finance yet: fwd: no endpoint of service \"finance\" (start one, or look at nsm get endpoints)"
    );
    let described = ring.server.kubectl(&["describe", "pod", "web", "--namespace=apps"]);
    assert!(described.contains("start one, or look at nsm get endpoints"), "{described}");
    let (status, why) = ring.condition("web").unwrap();
    assert_eq!(status, "False");
    assert!(why.contains("no endpoint of service"), "{why}");
    let wire = ring.wires().remove(0);
    assert_eq!(wire["status"]["state"], "NotUp");
    assert_eq!(wire["status"]["lastError"]["hint"], "start one, or look at nsm get endpoints");
    assert_eq!(wire["metadata"]["ownerReferences"][0]["uid"], uid.as_str());
    assert_eq!(wire["spec"]["labels"]["app"], "web");

    wires.up(&web, &connection("gateway-1"));
    until("the pod is told that it is up", || ring.condition("web").unwrap().0 == "True").await;
    until("and the wire too", || ring.wires()[0]["status"]["state"] == "Up").await;
    let columns = ring.server.kubectl(&["get", "wires", "--namespace=apps", "--no-headers", "--output=wide"]);
    let columns: Vec<_> = columns.split_whitespace().skip(1).collect();
    let path = r#"["web-0","nsm-node-node1","forwarder-nsm-node-node1","gateway-1"]"#;
    let wanted =
        ["web", "nsm-1", "finance", "Up", "gateway-1", r#"["172.16.1.1/32"]"#, "KERNEL", "1450", path];
    assert_eq!(columns[..wanted.len()], wanted);
    let object = format!("wire/{}", ring.wires()[0]["metadata"]["name"].as_str().unwrap());
    let _met =
        ring.server.kubectl(&["wait", "--for=condition=Up", &object, "--namespace=apps", "--timeout=10s"]);
    until("an event says so", || ring.events("web").len() == 2).await;
    let (reason, message) = ring.events("web").remove(1);
    assert_eq!(reason, "WireUp");
    assert_eq!(
        message,
        "nsm-1 to finance is up: endpoint gateway-1, addresses 172.16.1.1/32, theirs 172.16.1.0/32, by web-0 > \
         nsm-node-node1 > forwarder-nsm-node-node1 > gateway-1"
    );
    wires.up(&web, &connection("gateway-2"));
    until("another endpoint is said", || ring.events("web").len() == 3).await;
    assert!(ring.events("web")[2].1.ends_with("it led to gateway-1"), "{:?}", ring.events("web"));

    // A pod that does not wait for its wires is not changed.
    let plain = name("plain");
    wires.asked(&plain, wish());
    wires.is_of(&plain, &ring.uid("plain"));
    wires.up(&plain, &connection("gateway-1"));
    until("the other pod has its wire", || ring.wires().len() == 2).await;
    until("and hears of it", || ring.events("plain").len() == 1).await;
    assert_eq!(ring.condition("plain"), None);

    // The process is another one: what was said is not said again.
    writing.abort();
    let (wires, writing) = ring.writer(LONG).await;
    wires.asked(&web, wish());
    wires.is_of(&web, &uid);
    // Until the mesh is together again it is asked for in vain: that wire stands.
    wires.failed(&web, Trouble::said("no endpoint has registered yet"));
    sleep(Duration::from_secs(3)).await;
    assert_eq!((ring.events("web").len(), ring.status("web")["state"].clone()), (3, json!("Up")));
    until("it is not, for good", || ring.events("web").len() == 4).await;
    assert_eq!(ring.events("web")[3].0, "WireDown", "it was up: {:?}", ring.events("web"));
    assert_eq!(ring.status("web")["endpoint"], "gateway-2", "as far as is known");
    wires.up(&web, &connection("gateway-2"));
    until("it is again", || ring.events("web").len() == 5).await;
    writing.abort();
    let (wires, writing) = ring.writer(Duration::ZERO).await;
    wires.asked(&web, wish());
    wires.is_of(&web, &uid);
    wires.up(&web, &connection("gateway-2"));
    until("what nobody claims is taken back", || ring.wires().len() == 1).await;
    assert_eq!(ring.wires()[0]["spec"]["pod"], "web");
    wires.down(&web, None);
    until("the pod hears that its wire is down", || ring.events("web").len() == 6).await;
    assert_eq!(ring.events("web")[5].0, "WireDown");
    until("and is not ready", || ring.condition("web").unwrap().0 == "False").await;
    wires.ended(&web, None);
    until("what is closed is gone", || ring.wires().is_empty()).await;
    // The API server has it before the writer hears of that.
    until("and forgotten", || wires.is_empty()).await;
    assert_eq!(ring.events("web").len(), 6);
    writing.abort();
}

#[tokio::test]
async fn while_the_api_server_is_away_nothing_piles_up_and_afterwards_it_is_said_how_it_is() {
    let test = "while_the_api_server_is_away_nothing_piles_up_and_afterwards_it_is_said_how_it_is";
    let Some(mut ring) = Ring::start(test) else { return };
    let (wires, writing) = ring.writer(LONG).await;
    let (web, uid) = (name("web"), ring.uid("web"));
    wires.asked(&web, wish());
    wires.is_of(&web, &uid);
    wires.up(&web, &connection("gateway-0"));
    until("the pod is told", || ring.events("web").len() == 1).await;
    ring.server.kill();
    for n in 1..100 {
        wires.down(&web, Some(Trouble::said(&format!("reason {n}"))));
        wires.up(&web, &connection(&format!("gateway-{n}")));
    }
    // It is tried meanwhile, in vain.
    sleep(Duration::from_secs(3)).await;
    assert_eq!(wires.len(), 1);
    ring.server.go_on().unwrap();
    until("the pod is told how it is", || ring.events("web").len() == 2).await;
    assert!(ring.events("web")[1].1.contains("endpoint gateway-99"), "{:?}", ring.events("web"));
    until("the wire says it", || ring.wires()[0]["status"]["endpoint"] == "gateway-99").await;
    writing.abort();
}

#[tokio::test]
async fn a_node_speaks_for_its_own_pods_only() {
    let Some(ring) = Ring::start("a_node_speaks_for_its_own_pods_only") else { return };
    let refused = |args: &[&str], input: &str, why: &str| {
        let done = ring.as_node(&ring.node1, args, input);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success() && said.contains(why), "{args:?} {input}: {said}");
    };
    let create = ["create", "--filename=-"];
    let own = ring.as_node(&ring.node1, &create, &ring.wire("own", "node1"));
    assert!(own.status.success(), "{}", String::from_utf8_lossy(&own.stderr));
    let others = "of the wires of its own node's pods only";
    refused(&create, &ring.wire("others", "node2"), others);
    ring.server.apply(&ring.wire("others", "node2"));
    refused(&["delete", "wire", "others"], "", others);
    // kubectl would read before it writes.
    let api = Objects::of(&ring.node1).await.unwrap();
    let patch = async |path: &str, kind: Patch, change: Value, why: &str| {
        let said = api.patch("it", path, kind, &change).await.unwrap_err().to_string();
        assert!(said.contains(why), "{path} {change}: {said}");
    };
    let wires = "/apis/networkservicemesh.io/v1/namespaces/apps/wires";
    patch(&format!("{wires}/others/status"), Patch::Merge, json!({ "status": { "state": "Up" } }), others)
        .await;
    patch(
        &format!("{wires}/own"),
        Patch::Merge,
        json!({ "spec": { "node": "node2" } }),
        "cannot patch resource",
    )
    .await;
    let ours = json!({ "conditions": [{ "type": CONDITION, "status": "True" }] });
    let ready = json!({ "conditions": [{ "type": "Ready", "status": "True" }] });
    let kept = "by the condition of its own";
    for (pod, change, why) in [
        ("other", json!({ "metadata": {} }), "of the pods of its own node only"),
        ("other", json!({ "status": ours }), "of the pods of its own node only"),
        ("web", json!({ "status": ready }), kept),
        ("web", json!({ "status": { "podIPs": [{ "ip": "10.0.0.1" }], "podIP": "10.0.0.1" } }), kept),
        ("web", json!({ "status": { "phase": "Succeeded" } }), kept),
        ("web", json!({ "metadata": { "labels": { "app": "bank" } } }), kept),
        ("web", json!({ "metadata": { "annotations": { "a": "b" } } }), kept),
    ] {
        patch(&format!("/api/v1/namespaces/apps/pods/{pod}/status"), Patch::Strategic, change, why).await;
    }
    patch(
        "/api/v1/namespaces/apps/pods/web",
        Patch::Merge,
        json!({ "metadata": {} }),
        "cannot patch resource",
    )
    .await;
    refused(&["get", "pods"], "", "cannot list resource \"pods\"");
    refused(&["get", "pod", "web"], "", "cannot get resource \"pods\"");
    let event = |host: &str, kind: &str| {
        json!({
            "apiVersion": "v1", "kind": "Event", "metadata": { "name": format!("e-{host}"), "namespace": "apps" },
            "involvedObject": { "apiVersion": "v1", "kind": kind, "name": "web", "namespace": "apps" },
            "type": "Warning", "reason": "X", "message": "x", "source": { "component": "nsm-node", "host": host },
        })
        .to_string()
    };
    refused(&create, &event("node2", "Pod"), "as itself, of pods only");
    refused(&create, &event("node1", "Service"), "as itself, of pods only");
    let done = ring.as_node(&ring.node1, &create, &event("node1", "Pod"));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // A token that is bound to nothing.
    let unbound = ring.server.kubeconfig_of("nsm-system", "nsm-node");
    let done = ring.as_node(&unbound, &create, &ring.wire("unbound", "node1"));
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("not bound to a node"), "{said}");
}

/// A wire is edited by whoever may, and its status says what became of that.
#[tokio::test]
async fn an_edited_wire_is_told_to_whoever_makes_it_and_says_what_became_of_that() {
    let name_of_test = "an_edited_wire_is_told_to_whoever_makes_it_and_says_what_became_of_that";
    let Some(ring) = Ring::start(name_of_test) else { return };
    let (wires, writing) = ring.writer(LONG).await;
    let reading =
        tokio::spawn(Reader::new(Objects::of(&ring.node1).await.unwrap(), wires.clone(), "node1").run());
    let (web, uid) = (name("web"), ring.uid("web"));
    wires.asked(&web, wish());
    wires.is_of(&web, &uid);
    wires.up(&web, &connection("gw-1"));
    until("the wire is up", || ring.wires().first().is_some_and(|wire| wire["status"]["state"] == "Up"))
        .await;
    assert!(wires.edit(&web).is_none(), "nobody has edited it");
    let wire = ring.wires()[0]["metadata"]["name"].as_str().unwrap().to_owned();

    // Whoever may: not everybody.
    let change = |kubeconfig: &std::path::Path, change: &Value| {
        let change = change.to_string();
        ring.as_node(kubeconfig, &["patch", "wire", &wire, "--type=merge", "--patch", &change], "")
    };
    let editor = ring.server.kubeconfig_of("apps", "editor");
    let edit = json!({ "spec": { "service": "audit", "labels": { "app": "spy" }, "mtu": 1400 } });
    let refused = String::from_utf8(change(&editor, &edit).stderr).unwrap();
    assert!(refused.contains("is forbidden"), "{refused}");
    let role = ["create", "role", "editor", "--namespace=apps", "--verb=get,patch"];
    let _said = ring.server.kubectl(&[&role[..], &["--resource=wires.networkservicemesh.io"]].concat());
    let bound = [
        "create",
        "rolebinding",
        "editor",
        "--namespace=apps",
        "--role=editor",
        "--serviceaccount=apps:editor",
    ];
    let _said = ring.server.kubectl(&bound);
    let edits = |of: &Value| {
        let done = change(&editor, of);
        (done.status.success(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    for (wrong, why) in [
        (json!({ "spec": { "pod": "other" } }), "say whose wire it is"),
        (json!({ "spec": { "node": "node2" } }), "say whose wire it is"),
        (json!({ "spec": { "mtu": 500 } }), "1280"),
        (json!({ "spec": { "service": "" } }), "spec.service"),
    ] {
        let (done, said) = edits(&wrong);
        assert!(!done && said.contains(why), "{wrong}: {said}");
    }
    assert!(edits(&edit).0);
    tokio::time::timeout(PATIENCE, wires.edited()).await.unwrap();
    let told = wires.edit(&web).unwrap();
    assert_eq!((told.wish.service.as_str(), told.mtu, told.stands), ("audit", Some(1400), false));
    assert_eq!(told.wish.labels, [("app".to_owned(), "spy".to_owned())].into());

    // What became of it.
    let applied = || {
        let status = ring.status("web");
        let mut conditions = status["conditions"].as_array()?.iter();
        let found = conditions.find(|condition| condition["type"] == "Applied")?;
        let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
        Some((text("status"), text("message"), found["observedGeneration"].as_i64().unwrap()))
    };
    let nobody = "fwd: network service \"audit\" is not found (hint: apply it)";
    wires.applied(&web, told.generation, Some(Trouble::said(nobody)));
    until("why not", || applied().is_some()).await;
    let why = "fwd: network service \"audit\" is not found (apply it)".to_owned();
    assert_eq!(applied(), Some(("False".to_owned(), why, told.generation)));
    wires.applied(&web, told.generation, None);
    wires.up(&web, &connection("audit-1"));
    until("since when", || applied().is_some_and(|(status, _, _)| status == "True")).await;
    let stands = ["wait", "--for=condition=Applied", "--timeout=60s", &format!("wire/{wire}")];
    assert!(ring.as_node(&editor, &["get", "wires", &wire], "").status.success());
    let _met = ring.server.kubectl(&[&stands[..], &["--namespace=apps"]].concat());
    until("the pod hears of it", || {
        ring.events("web")
            .iter()
            .any(|(reason, said)| reason == "WireMoved" && said.contains("nsm-1 to audit is up"))
    })
    .await;
    assert!(wires.edit(&web).unwrap().stands);

    // Whoever comes after this process knows it from the start.
    let after = Wires::default();
    let mut reader = Reader::new(Objects::of(&ring.node1).await.unwrap(), after.clone(), "node1");
    reader.read().await.unwrap();
    let same = after.edit(&web).unwrap();
    assert_eq!((same.wish.service.as_str(), same.generation, same.stands), ("audit", told.generation, true));
    let others = Wires::default();
    let node2 = ring.server.kubeconfig_on("node2", "nsm-system", "nsm-node");
    Reader::new(Objects::of(&node2).await.unwrap(), others.clone(), "node2").read().await.unwrap();
    assert!(others.edit(&web).is_none(), "of another node");

    // Another edit, and all of it taken back: the wire is made anew, as its pod has asked for it.
    assert!(edits(&json!({ "spec": { "mtu": null } })).0);
    tokio::time::timeout(PATIENCE, wires.edited()).await.unwrap();
    until("the edit is known", || wires.edit(&web).is_some_and(|edit| edit.mtu.is_none() && !edit.stands))
        .await;
    let _said = ring.server.kubectl(&["delete", "wire", &wire, "--namespace=apps"]);
    until("nobody edits it", || wires.edit(&web).is_none()).await;
    wires.up(&web, &connection("gw-1"));
    until("it is said anew", || {
        ring.wires().first().is_some_and(|wire| wire["spec"]["service"] == "finance")
    })
    .await;
    assert_eq!(applied(), None);
    writing.abort();
    reading.abort();
}
