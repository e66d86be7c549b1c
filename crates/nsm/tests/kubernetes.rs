//! `nsm registry --store kubernetes`, two of the real program at a time, before a real API server.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use futures::{StreamExt as _, future::join_all};
use nsm_api::pb::registry::{NetworkService, NetworkServiceEndpoint, NetworkServiceLabels};
use nsm_cluster::{ApiServer, api_server};
use nsm_identity::{Source, ca::Ca};
use nsm_k8s::crd::{NETWORK_SERVICE_ENDPOINTS, NETWORK_SERVICES};
use nsm_registry::{Client, ClientConfig, EndpointEvent, Error, expiry::timestamp_of};
use nsm_transport::{Pool, PoolConfig};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// An API server, an authority, and a directory. `alice` and `bob` are registrants.
struct Mesh {
    server: ApiServer,
    /// The registry's.
    kubeconfig: PathBuf,
    directory: tempfile::TempDir,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Mesh {
    async fn start(test: &str) -> Option<Self> {
        let mut mesh = Self::bare(test).await?;
        mesh.server.install(&[NETWORK_SERVICES, NETWORK_SERVICE_ENDPOINTS]);
        // The registry has the rights that `nsm install` gives it, and no others.
        let mut install = Command::new(env!("CARGO_BIN_EXE_nsm"));
        let printed = install.args(["install", "--store", "kubernetes"]).output().unwrap();
        let printed = String::from_utf8(printed.stdout).unwrap();
        let rights = printed.split("\n---\n").filter(|object| {
            object.contains("kind: ClusterRole") && object.contains("component: registry\n")
        });
        mesh.server.apply(&rights.collect::<Vec<_>>().join("\n---\n"));
        mesh.kubeconfig = mesh.server.kubeconfig_of("nsm-system", "nsm-registry");
        Some(mesh)
    }

    /// Without our resources.
    async fn bare(test: &str) -> Option<Self> {
        let server = api_server(test)?;
        server.apply("{apiVersion: v1, kind: Namespace, metadata: {name: nsm-system}}");
        let directory = tempfile::tempdir().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        let mut config = "trustDomain: test.lab\n".to_owned();
        let who = ["alice", "bob", "registry"];
        config += "sockets:\n";
        for name in who {
            config += &format!("- {{path: {}/{name}.id, node: {name}}}\n", directory.path().display());
        }
        config += "entries:\n";
        for name in who {
            config += &format!(
                "- {{spiffeId: 'spiffe://test.lab/{name}', node: {name}, selectors: {{uid: {uid}}}}}\n"
            );
        }
        fs::write(directory.path().join("ca.yaml"), config).unwrap();
        let ca = Ca::start(&directory.path().join("ca.yaml")).unwrap();
        let issuing = tokio::spawn(async move { ca.serve(std::future::pending()).await.unwrap() });
        let kubeconfig = server.kubeconfig();
        Some(Self { server, kubeconfig, directory, tasks: vec![issuing] })
    }

    fn url(&self, file: &str) -> String {
        format!("unix://{}", self.directory.path().join(file).display())
    }

    /// A registry that reaches the API server as this kubeconfig says.
    fn registry_as(&self, name: &str, kubeconfig: &std::path::Path, more: &[&str]) -> Registry {
        let log = self.directory.path().join(format!("{name}.log"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_nsm"));
        command.args(["registry", "--name", name, "--store", "kubernetes"]);
        command.args(["--listen-on", &self.url(&format!("{name}.sock"))]).args(more);
        command
            .env("SPIFFE_ENDPOINT_SOCKET", self.url("registry.id"))
            .env("KUBECONFIG", kubeconfig)
            .env("NSM_NAMESPACE", "nsm-system")
            .env("NSM_INTROSPECT_DIR", "")
            .env_remove("KUBERNETES_SERVICE_HOST")
            .stdin(Stdio::null())
            .stderr(fs::File::options().create(true).append(true).open(&log).unwrap());
        Registry { process: command.spawn().unwrap(), log, name: name.to_owned() }
    }

    async fn registry(&self, name: &str, more: &[&str]) -> Registry {
        let registry = self.registry_as(name, &self.kubeconfig, more);
        self.serves(&registry).await;
        registry
    }

    async fn serves(&self, registry: &Registry) {
        let client = self.client("alice", registry).await;
        eventually(&format!("{} serves", registry.name), async || {
            client.find_services(NetworkService::default()).await.ok()
        })
        .await;
    }

    async fn client(&self, who: &str, registry: &Registry) -> Client {
        let source = timeout(PATIENCE, Source::open(&self.url(&format!("{who}.id")))).await.unwrap().unwrap();
        let pool = Pool::new(source, PoolConfig::default());
        let url = self.url(&format!("{}.sock", registry.name)).parse().unwrap();
        Client::new(pool, url, ClientConfig { labels: vec![], ..ClientConfig::default() })
    }

    /// Writes an object as people do.
    fn write(&self, kind: &str, namespace: &str, name: &str, spec: &Value) {
        let api = "networkservicemesh.io/v1";
        let object = json!({"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec});
        self.server.apply(&object.to_string());
    }

    fn read(&self, plural: &str, name: &str) -> Option<Value> {
        let get = ["get", plural, name, "--namespace=nsm-system", "--output=json", "--ignore-not-found"];
        let got = self.server.kubectl(&get);
        (!got.is_empty()).then(|| serde_json::from_str(&got).unwrap())
    }

    fn delete(&self, plural: &str, namespace: &str, name: &str) {
        let _said = self.server.kubectl(&["delete", plural, name, "--namespace", namespace]);
    }
}

/// One that runs.
struct Registry {
    process: Child,
    log: PathBuf,
    name: String,
}

impl Registry {
    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    async fn says(&self, words: &[&str]) {
        eventually(&format!("{} says {words:?}", self.name), async || {
            let said = self.said();
            words.iter().all(|word| said.contains(word)).then_some(())
        })
        .await;
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("== {}\n{}", self.name, self.said());
        }
    }
}

/// Between a registry and the API server: what it is cut from.
struct Relay {
    kubeconfig: PathBuf,
    open: watch::Sender<bool>,
    relaying: JoinHandle<()>,
}

impl Relay {
    async fn start(mesh: &Mesh) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (server, own) = (mesh.server.address(), listener.local_addr().unwrap());
        let config = fs::read_to_string(&mesh.kubeconfig).unwrap();
        assert!(config.contains(&server.to_string()));
        let kubeconfig = mesh.directory.path().join("relayed.conf");
        fs::write(&kubeconfig, config.replace(&server.to_string(), &own.to_string())).unwrap();
        let (open, is_open) = watch::channel(true);
        let relaying = tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let mut is_open = is_open.clone();
                tokio::spawn(async move {
                    if !*is_open.borrow() {
                        return;
                    }
                    let Ok(mut to) = TcpStream::connect(server).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut to) => {}
                        _ = is_open.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Self { kubeconfig, open, relaying }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.relaying.abort();
    }
}

async fn eventually<R>(what: &str, mut look: impl AsyncFnMut() -> Option<R>) -> R {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < end, "{what}: did not happen");
        sleep(Duration::from_millis(20)).await;
    }
}

fn nse(name: &str) -> NetworkServiceEndpoint {
    let labels = NetworkServiceLabels { unknown: None, labels: [("app".to_owned(), "gw".to_owned())].into() };
    NetworkServiceEndpoint {
        name: name.into(),
        network_service_names: vec!["web".into()],
        network_service_labels: [("web".to_owned(), labels)].into(),
        url: "tcp://127.0.0.1:5001".into(),
        ..Default::default()
    }
}

fn service(name: &str) -> NetworkService {
    NetworkService { name: name.into(), payload: "ETHERNET".into(), ..Default::default() }
}

fn named(name: &str) -> NetworkServiceEndpoint {
    NetworkServiceEndpoint { name: name.into(), ..Default::default() }
}

fn service_named(name: &str) -> NetworkService {
    NetworkService { name: name.into(), ..Default::default() }
}

async fn found(client: &Client, name: &str) -> Option<NetworkServiceEndpoint> {
    client.find_endpoints(named(name)).await.unwrap().into_iter().next().map(|endpoint| endpoint.nse)
}

async fn found_service(client: &Client, name: &str) -> Option<NetworkService> {
    client.find_services(service_named(name)).await.unwrap().into_iter().next()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_registry_is_told_all_know_and_it_stands_where_upstream_looks_for_it() {
    let test = "what_one_registry_is_told_all_know_and_it_stands_where_upstream_looks_for_it";
    let Some(mesh) = Mesh::start(test).await else { return };
    let (one, two) = (mesh.registry("one", &[]).await, mesh.registry("two", &[]).await);
    let (at_one, at_two) = (mesh.client("alice", &one).await, mesh.client("alice", &two).await);
    let mut seen = at_two.watch_endpoints(named("")).await.unwrap();

    let kept_service = at_one.register_service(service("web"), PATIENCE).await.unwrap();
    let kept = at_one.register_endpoint(nse("gw-1"), PATIENCE).await.unwrap();
    let item = kept.item();
    let at_once = found(&at_one, "gw-1").await;
    assert_eq!(at_once.as_ref(), Some(&*item), "who registered finds it at once");
    let other = eventually("the other knows", async || found(&at_two, "gw-1").await).await;
    assert_eq!(other, *item);
    let told = timeout(PATIENCE, seen.next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(told, EndpointEvent::Present(endpoint) if endpoint.nse == *item));
    assert_eq!(found_service(&at_two, "web").await.unwrap().payload, "ETHERNET");

    let object = mesh.read("networkserviceendpoints", "gw-1").unwrap();
    let time = item.expiration_time.unwrap();
    let began = item.initial_registration_time.unwrap();
    let of = |time: prost_types::Timestamp| json!({"seconds": time.seconds, "nanos": time.nanos});
    assert_eq!(
        object["spec"],
        json!({
            "name": "gw-1",
            "network_service_names": ["web"],
            "network_service_labels": {"web": {"labels": {"app": "gw"}}},
            "url": "tcp://127.0.0.1:5001",
            "expiration_time": of(time),
            "initial_registration_time": of(began),
            "path_ids": ["spiffe://test.lab/alice", "spiffe://test.lab/registry"],
        })
    );
    let object = mesh.read("networkservices", "web").unwrap();
    let ids = json!(["spiffe://test.lab/alice", "spiffe://test.lab/registry"]);
    assert_eq!(object["spec"], json!({"name": "web", "payload": "ETHERNET", "path_ids": ids}));

    // Counted by the API server: a registration of what is known is one call.
    let calls = || {
        let metrics = mesh.server.kubectl(&["get", "--raw=/metrics"]);
        let ours = metrics.lines().filter(|line| {
            line.starts_with("apiserver_request_total{")
                && line.contains("resource=\"networkserviceendpoints\"")
                && !line.contains("verb=\"WATCH\"")
        });
        ours.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u32>().unwrap()).sum::<u32>()
    };
    let before = calls();
    for _ in 0..10 {
        drop(at_one.register_endpoint(nse("gw-1"), PATIENCE).await.unwrap());
    }
    assert_eq!(calls() - before, 10);

    // With the other one it is refreshed, and ended; its registrant would bring it back.
    drop(kept);
    let again = at_two.register_endpoint(nse("gw-1"), PATIENCE).await.unwrap();
    assert_eq!(again.item().initial_registration_time, item.initial_registration_time);
    again.unregister().await.unwrap();
    assert!(mesh.read("networkserviceendpoints", "gw-1").is_none());
    assert_eq!(found(&at_two, "gw-1").await, None);
    eventually("the first knows", async || found(&at_one, "gw-1").await.is_none().then_some(())).await;
    kept_service.unregister().await.unwrap();
    assert!(mesh.read("networkservices", "web").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_its_owners_whichever_registry_is_asked_and_whoever_is_faster() {
    let test = "a_name_is_its_owners_whichever_registry_is_asked_and_whoever_is_faster";
    let Some(mesh) = Mesh::start(test).await else { return };
    let (one, two) = (mesh.registry("one", &[]).await, mesh.registry("two", &[]).await);
    let alice = mesh.client("alice", &one).await;
    let bob = mesh.client("bob", &two).await;

    // Both at once, at different registries: one has it, the other is told whose it is.
    for round in 0..20 {
        let name = format!("e-{round}");
        let (hers, his) = tokio::join!(
            alice.register_endpoint(nse(&name), PATIENCE),
            bob.register_endpoint(nse(&name), PATIENCE)
        );
        let (winner, loser) = match (hers, his) {
            (Ok(hers), Err(error)) => (hers, error),
            (Err(error), Ok(his)) => (his, error),
            both => panic!("{name} has two owners or none: {both:?}"),
        };
        assert!(loser.to_string().contains("no sufficient privileges"), "{loser}");
        let owner = &winner.item().path_ids[0];
        let spec = &mesh.read("networkserviceendpoints", &name).unwrap()["spec"];
        assert_eq!(spec["path_ids"][0], json!(owner));
    }

    // Nobody ends what is another's, known to this registry or not yet.
    let kept = alice.register_endpoint(nse("mine"), PATIENCE).await.unwrap();
    let raw = bob.register_endpoint(nse("mine"), PATIENCE).await.unwrap_err();
    assert!(raw.to_string().contains("no sufficient privileges"), "{raw}");

    // The same owner refreshes with both, many times at once: all are served.
    let alice_too = mesh.client("alice", &two).await;
    let refreshes = (0..40).map(|i| {
        let client = if i % 2 == 0 { &alice } else { &alice_too };
        client.register_endpoint(nse("mine"), PATIENCE)
    });
    for refreshed in join_all(refreshes).await {
        let refreshed = refreshed.unwrap();
        assert_eq!(refreshed.item().initial_registration_time, kept.item().initial_registration_time);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_people_write_is_served_at_once_and_stays_theirs() {
    let Some(mesh) = Mesh::start("what_people_write_is_served_at_once_and_stays_theirs").await else {
        return;
    };
    let one = mesh.registry("one", &[]).await;
    let client = mesh.client("alice", &one).await;
    let mut seen = client.watch_services(service_named("web")).await.unwrap();

    // In any namespace; the name is the object's, or the one that it says.
    let rule = |app: &str| json!([{"routes": [{"destination_selector": {"app": app}}]}]);
    mesh.write("NetworkService", "default", "web", &json!({"matches": rule("a")}));
    mesh.write("NetworkService", "default", "object", &json!({"name": "said", "payload": "IP"}));
    let (web, gone) = timeout(PATIENCE, seen.next()).await.unwrap().unwrap().unwrap();
    assert!(!gone && web.payload.is_empty() && web.path_ids.is_empty());
    assert_eq!(web.matches[0].routes[0].destination_selector["app"], "a");
    eventually("the other", async || found_service(&client, "said").await).await;
    assert_eq!(found_service(&client, "object").await, None);

    // Who registers it gets it as it is, and nothing is written.
    let kept = client.register_service(service_named("web"), PATIENCE).await.unwrap();
    assert_eq!(kept.item().matches, web.matches);
    kept.unregister().await.unwrap();
    assert!(mesh.read("networkservices", "web").is_none(), "none beside it in the registry's namespace");
    let _there = mesh.server.kubectl(&["get", "netsvc", "web"]);

    mesh.write("NetworkService", "default", "web", &json!({"matches": rule("b")}));
    let (web, _) = timeout(PATIENCE, seen.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(web.matches[0].routes[0].destination_selector["app"], "b");

    // Of two with one name the first counts, and the second when that is gone.
    mesh.write("NetworkService", "nsm-system", "zweb", &json!({"name": "web", "matches": rule("c")}));
    let of = async |app: &str| {
        let matches = |web: NetworkService| web.matches[0].routes[0].destination_selector["app"] == app;
        found_service(&client, "web").await.is_some_and(matches).then_some(())
    };
    eventually("the registry's own namespace is first", async || of("c").await).await;
    mesh.delete("networkservices", "nsm-system", "zweb");
    eventually("the other counts again", async || of("b").await).await;

    // One that the operator writes over what workloads registered counts too.
    let kept = client.register_service(service("late"), PATIENCE).await.unwrap();
    mesh.write("NetworkService", "default", "late", &json!({"payload": "IP"}));
    eventually("the operator's", async || {
        found_service(&client, "late").await.filter(|late| late.payload == "IP")
    })
    .await;
    drop(kept);

    // What of it means nothing is said on it, and taken back.
    let condition = |status: &str| {
        let wait = format!("--for=condition=Understood={status}");
        let _met = mesh.server.kubectl(&["wait", &wait, "netsvc/odd", "--timeout=60s"]);
        mesh.server.kubectl(&["get", "netsvc", "odd", "--output=jsonpath={.status.conditions[0].message}"])
    };
    mesh.write("NetworkService", "default", "odd", &json!({"matches": [{"sourceSelector": {"app": "a"}}]}));
    let said = condition("False");
    assert!(said.starts_with("spec.matches[0].sourceSelector is no field of it and means nothing"), "{said}");
    mesh.write("NetworkService", "default", "odd", &json!({"matches": [{"source_selector": {"app": "a"}}]}));
    assert_eq!(condition("True"), "");

    mesh.delete("networkservices", "default", "web");
    let mut last = (web, false);
    while !last.1 {
        last = timeout(PATIENCE, seen.next()).await.unwrap().unwrap().unwrap();
    }
    assert_eq!(found_service(&client, "web").await, None);

    // Names that Kubernetes does not take, and one for which another object stands.
    let bad = client.register_service(service("My_Web"), PATIENCE).await.unwrap_err().to_string();
    assert!(bad.contains("\"My_Web\" cannot be registered: it is no name of a Kubernetes object"), "{bad}");
    mesh.write("NetworkService", "nsm-system", "taken", &json!({"name": "by-other"}));
    eventually("it is known", async || found_service(&client, "by-other").await).await;
    let bad = client.register_service(service("taken"), PATIENCE).await.unwrap_err().to_string();
    assert!(bad.contains("the NetworkService nsm-system/taken stands for \"by-other\""), "{bad}");
    // A service without a name gets one, and is told it.
    let generated = client.register_service(service(""), PATIENCE).await.unwrap();
    let name = generated.item().name.clone();
    assert!(name.starts_with("netsvc-") && name.len() > 7, "{name}");
    assert_eq!(mesh.read("networkservices", &name).unwrap()["spec"]["payload"], "ETHERNET");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_refreshed_expires_whichever_registry_is_left() {
    let Some(mesh) = Mesh::start("what_is_not_refreshed_expires_whichever_registry_is_left").await else {
        return;
    };
    // What was left by registries that are gone: upstream's wrote it, nobody refreshes it.
    let past = timestamp_of(SystemTime::now() - Duration::from_secs(600)).seconds;
    let spec = |seconds: i64| json!({"url": "tcp://127.0.0.1:1", "network_service_names": ["web"], "path_ids": ["spiffe://test.lab/alice"], "expiration_time": {"seconds": seconds}});
    mesh.write("NetworkServiceEndpoint", "nsm-system", "leftover", &spec(past));
    mesh.write("NetworkServiceEndpoint", "default", "leftover-elsewhere", &spec(past));
    mesh.write("NetworkServiceEndpoint", "default", "for-ever", &json!({"url": "tcp://127.0.0.1:1"}));
    // A refresh may be two seconds late.
    let short = ["--expire-period", "6s"];
    let (one, two) = (mesh.registry("one", &short).await, mesh.registry("two", &short).await);
    let (at_one, at_two) = (mesh.client("alice", &one).await, mesh.client("alice", &two).await);
    let names = async |client: &Client| {
        let found = client.find_endpoints(named("")).await.unwrap();
        found.into_iter().map(|endpoint| endpoint.nse.name).collect::<Vec<_>>()
    };
    assert_eq!(names(&at_one).await, ["for-ever"], "what has expired is not shown");
    let objects = || {
        let get = ["get", "nse", "--all-namespaces", "--output=jsonpath={.items[*].metadata.name}"];
        mesh.server.kubectl(&get)
    };
    eventually("leftovers go", async || (objects() == "for-ever").then_some(())).await;

    // Nobody refreshes it: it is gone everywhere.
    drop(at_one.register_endpoint(nse("short"), PATIENCE).await.unwrap());
    eventually("the other knows", async || found(&at_two, "short").await).await;
    eventually("it expires", async || found(&at_one, "short").await.is_none().then_some(())).await;
    assert!(mesh.read("networkserviceendpoints", "short").is_none(), "it is gone for all when it is for one");
    eventually("for all", async || found(&at_two, "short").await.is_none().then_some(())).await;

    // What is refreshed with another registry stays, whatever the first one's clock says.
    drop(at_one.register_endpoint(nse("moved"), PATIENCE).await.unwrap());
    let moved = at_two.register_endpoint(nse("moved"), PATIENCE).await.unwrap();
    let until = Instant::now() + Duration::from_secs(13);
    while Instant::now() < until {
        assert!(found(&at_one, "moved").await.is_some() && found(&at_two, "moved").await.is_some());
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(moved.state().borrow().problem, None);

    // Its registry is killed before it ends: the other one ends it.
    drop(moved);
    drop(at_one.register_endpoint(nse("orphan"), PATIENCE).await.unwrap());
    eventually("the other knows", async || found(&at_two, "orphan").await).await;
    one.kill();
    eventually("it expires", async || found(&at_two, "orphan").await.is_none().then_some(())).await;
    eventually("all do", async || (objects() == "for-ever").then_some(())).await;
    assert!(!two.said().contains("ERROR") && !two.said().contains("stays"), "{}", two.said());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_api_server_what_is_known_is_served_and_nothing_expires() {
    let test = "without_the_api_server_what_is_known_is_served_and_nothing_expires";
    let Some(mut mesh) = Mesh::start(test).await else { return };
    let relay = Relay::start(&mesh).await;
    let one = mesh.registry_as("one", &relay.kubeconfig, &["--expire-period", "4s"]);
    mesh.serves(&one).await;
    let client = mesh.client("alice", &one).await;
    mesh.write("NetworkService", "default", "web", &json!({"payload": "IP"}));
    mesh.write("NetworkService", "default", "going", &json!({"payload": "IP"}));
    let kept = client.register_endpoint(nse("stays"), PATIENCE).await.unwrap();
    let leaving = client.register_endpoint(nse("leaves"), PATIENCE).await.unwrap();
    eventually("services", async || found_service(&client, "going").await).await;
    let mut seen = client.watch_services(service_named("going")).await.unwrap();
    assert!(!timeout(PATIENCE, seen.next()).await.unwrap().unwrap().unwrap().1);

    relay.open.send_replace(false);
    one.says(&["changes are not heard of; what is known is served", "the API server https://127.0.0.1:"])
        .await;
    // Longer than anything lives: all of it is served, and who wants something new is told what is missing.
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        assert!(found(&client, "stays").await.is_some());
        assert!(found_service(&client, "web").await.is_some());
        sleep(Duration::from_millis(100)).await;
    }
    let error = client.register_endpoint(nse("new"), Duration::from_secs(2)).await.unwrap_err();
    assert!(
        matches!(&error, Error::Refused(status) if status.code() == tonic::Code::Unavailable),
        "{error:?}"
    );
    let said = error.to_string();
    assert!(said.contains("the registration cannot be kept") && said.contains("does not answer"), "{said}");
    assert!(kept.state().borrow().problem.is_some(), "its refreshes fail, and it is told so");
    // Who leaves is not kept waiting.
    leaving.unregister().await.unwrap();
    assert_eq!(found(&client, "leaves").await, None);

    // Meanwhile things happen, and the API server forgets how.
    mesh.delete("networkservices", "default", "going");
    mesh.write("NetworkService", "default", "came", &json!({"payload": "IP"}));
    mesh.server.kill();
    mesh.server.go_on().unwrap();
    relay.open.send_replace(true);
    one.says(&["the API server is back"]).await;
    one.says(&["too much has happened since; everything is read again"]).await;
    eventually("what came", async || found_service(&client, "came").await).await;
    assert_eq!(found_service(&client, "going").await, None);
    let (_, gone) = timeout(PATIENCE, seen.next()).await.unwrap().unwrap().unwrap();
    assert!(gone, "a deletion that nobody heard of is told");
    assert!(found(&client, "stays").await.is_some(), "who could not refresh has time to");
    let mut state = kept.state();
    timeout(PATIENCE, state.wait_for(|state| state.problem.is_none())).await.unwrap().unwrap();
    let gone = async || mesh.read("networkserviceendpoints", "leaves").is_none().then_some(());
    eventually("who left is deleted", gone).await;
    assert!(mesh.read("networkserviceendpoints", "stays").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_api_server_lacks_is_named_and_waited_for() {
    let Some(mesh) = Mesh::bare("what_the_api_server_lacks_is_named_and_waited_for").await else { return };
    let kubeconfig = mesh.server.kubeconfig_of("nsm-system", "registry");
    let mut one = mesh.registry_as("one", &kubeconfig, &[]);
    let wrong = "does not let us list networkservices: ";
    let rule = "{apiGroups: [networkservicemesh.io], resources: [networkservices], verbs: [list]}";
    one.says(&["nothing is served yet", wrong, "system:serviceaccount:nsm-system:registry", rule]).await;
    mesh.server.apply(
        "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: registry}
rules:
- {apiGroups: [networkservicemesh.io], resources: [networkservices, networkserviceendpoints], verbs: [list, watch, get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: registry}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: registry}
subjects: [{kind: ServiceAccount, name: registry, namespace: nsm-system}]
",
    );
    one.says(&[
        "does not know networkservice",
        "it has nothing of networkservicemesh.io",
        "install the custom resource",
    ])
    .await;
    // Those of the first generation are not those of today.
    let old = |manifest: &str| manifest.replace("name: v1\n", "name: v1alpha1\n");
    mesh.server.install(&[&old(NETWORK_SERVICES), &old(NETWORK_SERVICE_ENDPOINTS)]);
    one.says(&["it has networkservicemesh.io/v1alpha1"]).await;
    assert!(one.process.try_wait().unwrap().is_none(), "it waits");
    let both = |manifest: &str| {
        let (head, version) = manifest.split_once("    - name: v1\n").unwrap();
        let kept = version.replace("storage: true", "storage: false");
        format!("{head}    - name: v1alpha1\n{version}    - name: v1\n{kept}")
    };
    mesh.server.install(&[&both(NETWORK_SERVICES), &both(NETWORK_SERVICE_ENDPOINTS)]);
    mesh.serves(&one).await;

    // It may read and not write.
    let client = mesh.client("alice", &one).await;
    let said = client.register_endpoint(nse("e"), Duration::from_secs(2)).await.unwrap_err().to_string();
    let rule = "{apiGroups: [networkservicemesh.io], resources: [networkserviceendpoints], verbs: [create]}";
    assert!(said.contains("does not let us create networkserviceendpoints") && said.contains(rule), "{said}");

    // It ends when it is told to, also while it waits.
    let none = mesh.directory.path().join("none.conf");
    let config = fs::read_to_string(&kubeconfig).unwrap();
    fs::write(&none, config.replace(&mesh.server.address().to_string(), "127.0.0.1:1")).unwrap();
    let mut waiting = mesh.registry_as("waiting", &none, &[]);
    waiting.says(&["nothing is served yet", "the API server https://127.0.0.1:1 does not answer"]).await;
    kill_process(Pid::from_child(&waiting.process), Signal::TERM).unwrap();
    assert!(waiting.process.wait().unwrap().success());
    let mut lost = mesh.registry_as("lost", &mesh.directory.path().join("nowhere.conf"), &[]);
    assert!(!lost.process.wait().unwrap().success());
    lost.says(&["no Kubernetes: this is no pod", "nowhere.conf", "set KUBECONFIG"]).await;
    one.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_object_that_means_nothing_hides_no_other() {
    let Some(mesh) = Mesh::bare("one_object_that_means_nothing_hides_no_other").await else { return };
    // Upstream's definitions check nothing.
    let loose = |manifest: &str| {
        let (head, _) = manifest.split_once("      subresources:").unwrap();
        format!(
            "{head}      schema: {{openAPIV3Schema: {{type: object, properties: {{spec: {{x-kubernetes-preserve-unknown-fields: true}}}}}}}}\n"
        )
    };
    mesh.server.install(&[&loose(NETWORK_SERVICES), &loose(NETWORK_SERVICE_ENDPOINTS)]);
    mesh.write("NetworkService", "default", "bad", &json!({"payload": 7}));
    mesh.write("NetworkService", "default", "worse", &json!("text"));
    mesh.write("NetworkService", "default", "good", &json!({"payload": "IP"}));
    let one = mesh.registry("one", &[]).await;
    let client = mesh.client("alice", &one).await;
    let found = client.find_services(service_named("")).await.unwrap();
    assert_eq!(found.into_iter().map(|service| service.name).collect::<Vec<_>>(), ["good"]);
    one.says(&[
        "NetworkService default/bad: spec: invalid type: integer `7`",
        "default/worse: spec: invalid type: string",
    ])
    .await;
    mesh.write("NetworkService", "default", "bad", &json!({"payload": "IP"}));
    eventually("it is mended", async || found_service(&client, "bad").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_the_first_generation_are_converted_and_applied() {
    let Some(mesh) = Mesh::start("files_of_the_first_generation_are_converted_and_applied").await else {
        return;
    };
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/tests/fixtures");
    let [chain, nat] =
        ["secure-intranet-siblings", "cnf-nat-example"].map(|name| format!("{fixtures}/{name}.yaml"));
    let convert = |files: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_nsm"))
            .arg("convert")
            .args(files)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let converted = convert(&[&chain, &nat]);
    assert!(converted.status.success() && converted.stderr.is_empty(), "{converted:?}");
    mesh.server.apply(&String::from_utf8(converted.stdout).unwrap());
    let one = mesh.registry("one", &[]).await;
    let client = mesh.client("alice", &one).await;
    for file in [&chain, &nat] {
        let meant = nsm_api::resource::parse(&fs::read_to_string(file).unwrap()).unwrap().services.remove(0);
        let served = found_service(&client, &meant.name).await.unwrap();
        assert_eq!(served, meant);
    }

    let wrong = convert(&[&chain, "/nowhere.yaml"]);
    let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert!(!wrong.status.success() && wrong.stdout.is_empty(), "{wrong:?}");
    assert!(said.contains("/nowhere.yaml cannot be read"), "{said}");
}

#[tokio::test]
async fn what_was_registered_at_a_node_ends_with_the_node() {
    let name = "what_was_registered_at_a_node_ends_with_the_node";
    let Some(mesh) = Mesh::start(name).await else { return };
    let node = |name: &str, address: &str| {
        mesh.server.apply(&format!("{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}}}"));
        let status =
            json!({"status": {"addresses": [{"type": "InternalIP", "address": address}]}}).to_string();
        let args = ["patch", "node", name, "--subresource=status", "--type=merge", "--patch", &status];
        let _said = mesh.server.kubectl(&args);
    };
    let addresses = [("one", "10.0.0.1"), ("two", "fd00::2"), ("three", "10.0.0.3")];
    addresses.iter().for_each(|(name, address)| node(name, address));
    // Two, and nothing expires while this runs.
    let more = ["--follow-nodes", "--expire-period", "1h"];
    let (a, b) = (mesh.registry("a", &more).await, mesh.registry("b", &more).await);
    let alice = mesh.client("alice", &a).await;
    for (name, url) in [
        ("at-one", "tcp://10.0.0.1:5001"),
        ("at-two", "tcp://[fd00::2]:5001"),
        ("at-three", "tcp://10.0.0.3:5001"),
    ] {
        let end = timestamp_of(SystemTime::now() + Duration::from_secs(3600));
        let nse = NetworkServiceEndpoint {
            name: name.into(),
            url: url.into(),
            network_service_names: vec!["finance".into()],
            expiration_time: Some(end),
            ..NetworkServiceEndpoint::default()
        };
        // Nobody says good-bye.
        drop(alice.register_endpoint(nse, PATIENCE).await.unwrap());
    }
    // What people write does not expire, and does not end either.
    let spec = json!({"name": "written", "url": "tcp://10.0.0.1:5001", "network_service_names": ["finance"]});
    mesh.write("NetworkServiceEndpoint", "nsm-system", "written", &spec);
    let there = |name: &str| mesh.read("networkserviceendpoints", name).is_some();
    assert!(["at-one", "at-two", "at-three", "written"].into_iter().all(there));
    for gone in ["one", "two", "three"] {
        let _said = mesh.server.kubectl(&["delete", "node", gone]);
    }
    // A node that is made anew by its kubelet.
    node("three", "10.0.0.3");
    eventually("what was registered there is gone", async || {
        (!there("at-one") && !there("at-two")).then_some(())
    })
    .await;
    let found = mesh.client("bob", &b).await.find_endpoints(named("")).await.unwrap();
    let mut found: Vec<_> = found.into_iter().map(|found| found.nse.name).collect();
    found.sort();
    assert_eq!(found, ["at-three", "written"]);
    sleep(Duration::from_secs(2)).await;
    assert!(there("at-three") && there("written"));
}
