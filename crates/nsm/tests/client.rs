//! `nsm client`, the real program, before a manager that the test plays: what is up is closed on every way out.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use nsm_api::pb::{connection::Connection, networkservice::NetworkServiceRequest};
use nsm_identity::{Source, ca::Ca};
use nsm_mesh::{
    Connections, Context, Element, Error, Next, Result,
    auth::Authorize,
    chain,
    metrics::Metrics,
    monitor::{Hub, Monitor},
};
use nsm_transport::{ListenUrl, Server};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{task::JoinHandle, time::Instant};
use tonic::service::RoutesBuilder;

const PATIENCE: Duration = Duration::from_secs(60);

/// Has wires to every service but `nothing`.
#[derive(Debug, Default)]
struct Answers {
    refused: Arc<AtomicUsize>,
    labels: Arc<Mutex<BTreeMap<String, String>>>,
}

#[async_trait]
impl Element for Answers {
    fn name(&self) -> &'static str {
        "answers"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        conn.labels.clone_into(&mut self.labels.lock().unwrap());
        if conn.network_service == "nothing" {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Err(Error::not_found("there is nothing"));
        }
        conn.mechanism = request.mechanism_preferences.first().cloned();
        next.request(cx, request).await
    }
}

/// An authority, and a manager that has identities and wires.
struct Mesh {
    directory: tempfile::TempDir,
    connections: Arc<Connections>,
    refused: Arc<AtomicUsize>,
    /// Of the last request.
    labels: Arc<Mutex<BTreeMap<String, String>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Mesh {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (identity, socket) = (directory.path().join("identity.sock"), directory.path().join("nsm.sock"));
        let config = format!(
            "trustDomain: test.lab\nsockets:\n- {{path: {}, node: node1}}\nentries:\n\
             - {{spiffeId: 'spiffe://test.lab/any', selectors: {{uid: {}}}}}\n",
            identity.display(),
            rustix::process::geteuid().as_raw(),
        );
        std::fs::write(directory.path().join("ca.yaml"), config).unwrap();
        let ca = Ca::start(&directory.path().join("ca.yaml")).unwrap();
        let issuing = tokio::spawn(async move { ca.serve(std::future::pending()).await.unwrap() });
        let source = Source::open(&format!("unix://{}", identity.display())).await.unwrap();
        let server = Server::bind(source, &[ListenUrl::Unix(socket)]).await.unwrap();
        let (hub, answers) = (Arc::new(Hub::default()), Answers::default());
        let (refused, labels) = (Arc::clone(&answers.refused), Arc::clone(&answers.labels));
        let chain = chain![
            Authorize { max_token_lifetime: Duration::from_secs(600), policies: Arc::default() },
            Monitor { hub: Arc::clone(&hub), terminates: true },
            answers,
        ];
        let connections = Connections::serving("manager", chain, Arc::new(Metrics::default()));
        let mut routes = RoutesBuilder::default();
        nsm_mesh::server::add(&mut routes, Arc::clone(&connections), hub, Arc::default());
        let serving = tokio::spawn(server.serve(routes.routes(), &[], std::future::pending()));
        Self { directory, connections, refused, labels, tasks: vec![issuing, serving] }
    }

    /// Asks for a wire that there is, and then for one that there is not.
    fn client(&self, more: &[&str]) -> Client {
        self.client_of("kernel://there/nsm0,kernel://nothing/nsm1", more)
    }

    fn client_of(&self, services: &str, more: &[&str]) -> Client {
        let at = |name: &str| format!("unix://{}", self.directory.path().join(name).display());
        let mut client = Command::new(env!("CARGO_BIN_EXE_nsm"));
        client.args(["client", "--name", "c", "--connect-to", &at("nsm.sock")]).args(more);
        client.args(["--network-services", services]);
        client
            .env("SPIFFE_ENDPOINT_SOCKET", at("identity.sock"))
            .env("NSM_INTROSPECT_DIR", "")
            .envs([("NODE_NAME", "node1"), ("POD_NAME", "pod1"), ("CLUSTER_NAME", "cluster1")])
            .stdin(Stdio::null());
        client.stderr(std::fs::File::create(self.log()).unwrap());
        Client(client.spawn().unwrap())
    }

    fn log(&self) -> std::path::PathBuf {
        self.directory.path().join("client.log")
    }

    async fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < end, "{what} did not happen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A child that does not outlive its test.
struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_while_a_later_wire_is_pending_closes_the_earlier_ones() {
    let mesh = Mesh::start().await;
    let mut client = mesh.client(&[]);
    mesh.until("one wire and a refusal", || {
        mesh.connections.len() == 1 && mesh.refused.load(Ordering::SeqCst) > 0
    })
    .await;
    kill_process(Pid::from_child(&client.0), Signal::TERM).unwrap();
    mesh.until("the client's end", || client.0.try_wait().unwrap().is_some()).await;
    assert!(client.0.wait().unwrap().success());
    assert_eq!(mesh.connections.ids(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_says_where_it_runs_unless_it_is_told_what_to_say() {
    let mesh = Mesh::start().await;
    let _client = mesh.client_of("kernel://there/nsm0?podName=url", &["--labels", "clusterName:flag"]);
    // A connection is there before its request has come through.
    mesh.until("a request", || !mesh.labels.lock().unwrap().is_empty()).await;
    let labels = mesh.labels.lock().unwrap().clone();
    let said = ["nodeName", "podName", "clusterName"].map(|key| labels[key].clone());
    assert_eq!(said, ["node1", "url", "flag"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_try_that_fails_closes_what_it_got() {
    let mesh = Mesh::start().await;
    let mut client = mesh.client(&["--once"]);
    mesh.until("the client's end", || client.0.try_wait().unwrap().is_some()).await;
    assert!(!client.0.wait().unwrap().success());
    assert_eq!((mesh.refused.load(Ordering::SeqCst), mesh.connections.len()), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_init_client_leaves_its_wires_to_the_next_of_its_name() {
    let mesh = Mesh::start().await;
    let there = "kernel://there/nsm0,kernel://there/nsm1";
    let mut init = mesh.client_of(there, &["--init"]);
    mesh.until("the client's end", || init.0.try_wait().unwrap().is_some()).await;
    assert!(init.0.wait().unwrap().success());
    let mut left = mesh.connections.ids();
    left.sort();
    assert_eq!(left.len(), 2, "it closes nothing");
    let mut next = mesh.client_of(there, &[]);
    mesh.until("both are taken over", || {
        let log = std::fs::read_to_string(mesh.log()).unwrap();
        log.matches("going on with the wire of an earlier process").count() == 2
            && log.matches("wire up").count() == 2
    })
    .await;
    let mut now = mesh.connections.ids();
    now.sort();
    assert_eq!(now, left, "the same connections at the manager");
    kill_process(Pid::from_child(&next.0), Signal::TERM).unwrap();
    mesh.until("the client's end", || next.0.try_wait().unwrap().is_some()).await;
    assert_eq!(mesh.connections.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_init_client_that_is_interrupted_fails_says_why_and_closes_what_it_got() {
    let mesh = Mesh::start().await;
    let mut init = mesh.client(&["--init"]);
    mesh.until("some refusals", || mesh.refused.load(Ordering::SeqCst) > 1).await;
    mesh.until("they are told", || std::fs::read_to_string(mesh.log()).unwrap().contains("after 2 tries"))
        .await;
    kill_process(Pid::from_child(&init.0), Signal::TERM).unwrap();
    mesh.until("the client's end", || init.0.try_wait().unwrap().is_some()).await;
    assert!(!init.0.wait().unwrap().success());
    assert_eq!(mesh.connections.len(), 0);
    let said = std::fs::read_to_string(mesh.log()).unwrap();
    for text in [
        "nsm: interrupted before all wires were up; those that were are closed: no wire to nothing (kernel://nothing/nsm1) after ",
        " tries in ",
        ": manager: there is nothing (hint: is an endpoint of the service registered, and do its labels match?)",
    ] {
        assert!(said.contains(text), "{text:?} is not in {said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tries_are_one_at_a_time_with_growing_pauses() {
    let mesh = Mesh::start().await;
    let client = mesh.client_of("kernel://nothing/nsm0", &[]);
    mesh.until("some refusals", || mesh.refused.load(Ordering::SeqCst) > 4).await;
    // Five tries take at least the pauses between them, half of 50 + 100 + 200 + 400 ms: a tight loop would have made
    // thousands meanwhile.
    assert!(mesh.refused.load(Ordering::SeqCst) < 20);
    drop(client);
}
