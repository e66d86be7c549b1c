//! `nsm client`, the real program, before a manager that the test plays: what is up is closed on every way out.
#![allow(clippy::unwrap_used)]

use std::{
    process::{Child, Command, Stdio},
    sync::{
        Arc,
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
        let refused = Arc::clone(&answers.refused);
        let chain = chain![
            Authorize { max_token_lifetime: Duration::from_secs(600) },
            Monitor { hub: Arc::clone(&hub), terminates: true },
            answers,
        ];
        let connections = Connections::serving("manager", chain, Arc::new(Metrics::default()));
        let mut routes = RoutesBuilder::default();
        nsm_mesh::server::add(&mut routes, Arc::clone(&connections), hub, Arc::default());
        let serving = tokio::spawn(server.serve(routes.routes(), &[], std::future::pending()));
        Self { directory, connections, refused, tasks: vec![issuing, serving] }
    }

    /// Asks for a wire that there is, and then for one that there is not.
    fn client(&self, more: &[&str]) -> Client {
        let at = |name: &str| format!("unix://{}", self.directory.path().join(name).display());
        let mut client = Command::new(env!("CARGO_BIN_EXE_nsm"));
        client.args(["client", "--name", "c", "--connect-to", &at("nsm.sock")]).args(more);
        client.args(["--network-services", "kernel://there/nsm0,kernel://nothing/nsm1"]);
        client.env("SPIFFE_ENDPOINT_SOCKET", at("identity.sock")).stdin(Stdio::null());
        Client(client.spawn().unwrap())
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
async fn a_single_try_that_fails_closes_what_it_got() {
    let mesh = Mesh::start().await;
    let mut client = mesh.client(&["--once"]);
    mesh.until("the client's end", || client.0.try_wait().unwrap().is_some()).await;
    assert!(!client.0.wait().unwrap().success());
    assert_eq!((mesh.refused.load(Ordering::SeqCst), mesh.connections.len()), (1, 0));
}
