//! What becomes of a workload's wish that somebody edits: the element in a chain of its own, on a real socket.
#![allow(clippy::unwrap_used)]

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use nsm_api::pb::{
    connection::{Connection, ConnectionEvent, MonitorScopeSelector, Path, PathSegment, State},
    connectioncontext::{ConnectionContext, DnsConfig, IpContext},
    networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
};
use nsm_identity::{Source, UnixPeer, ca::Authority};
use nsm_manager::{ClientInfo, Edit, Edits, Wanted, WireOf, Workloads};
use nsm_mesh::{
    Connections, Context, Element, Error, Next, Reason,
    metrics::Metrics,
    monitor::{Hub, Monitor, Viewer},
};
use nsm_transport::{DialUrl, ListenUrl, Pool, PoolConfig, Server};
use tokio::sync::{Notify, mpsc};
use tonic::{Status, service::RoutesBuilder};

const PATIENCE: Duration = Duration::from_secs(30);

/// What somebody has made of the wish, and what came of it.
#[derive(Debug, Default)]
struct People {
    edit: Mutex<Option<Edit>>,
    news: Notify,
    heard: Mutex<Vec<String>>,
}

#[async_trait]
impl Workloads for People {
    fn asked(&self, _: &WireOf, _: &Connection, _: Option<&UnixPeer>) {}
    fn failed(&self, _: &WireOf, _: &Error) {}
    fn is(&self, _: &WireOf, _: &Connection) {}
    fn ended(&self, _: &WireOf, _: Reason) {}

    fn edit(&self, wire: &WireOf) -> Option<Edit> {
        self.edit.lock().unwrap().clone().filter(|_| wire.connection == "pod-0")
    }

    fn applied(&self, _: &WireOf, edit: &Edit) {
        self.heard.lock().unwrap().push(format!("{} applied", edit.generation));
        *self.edit.lock().unwrap() = Some(Edit { stands: true, ..edit.clone() });
    }

    fn refused(&self, _: &WireOf, edit: &Edit, error: &Error) {
        self.heard.lock().unwrap().push(format!("{} refused: {error}", edit.generation));
    }

    async fn edited(&self) {
        self.news.notified().await;
    }
}

/// The rest of a mesh: what it is asked for, and what it answers. Nobody serves `nothing`.
#[derive(Debug, Clone, Default)]
struct Mesh(Arc<Mutex<Vec<Connection>>>);

#[async_trait]
impl Element for Mesh {
    fn name(&self) -> &'static str {
        "mesh"
    }

    async fn request(
        &self,
        _: &mut Context<'_>,
        request: NetworkServiceRequest,
        _: Next<'_>,
    ) -> nsm_mesh::Result<Connection> {
        let mut conn = request.connection.unwrap();
        self.0.lock().unwrap().push(conn.clone());
        if conn.network_service == "nothing" {
            return Err(Error::not_found("network service \"nothing\" is not found").hint("apply it"));
        }
        let own = format!("{}-gw", conn.network_service);
        if conn.network_service_endpoint_name.is_empty() {
            conn.network_service_endpoint_name = own;
        }
        if conn.payload.is_empty() {
            conn.payload = if conn.network_service == "audit" { "ETHERNET" } else { "IP" }.into();
        }
        let context = conn.context.get_or_insert_default();
        context.mtu = if context.mtu == 0 { 1500 } else { context.mtu.min(1500) };
        let dns = context.dns_context.get_or_insert_default();
        if dns.configs.is_empty() {
            dns.configs.push(DnsConfig::default());
        }
        let ip = context.ip_context.get_or_insert_default();
        if ip.src_ip_addrs.is_empty() {
            ip.src_ip_addrs.push(format!("192.0.2.{}/32", conn.network_service.len()));
        }
        Ok(conn)
    }
}

struct Node {
    people: Arc<People>,
    mesh: Mesh,
    hub: Arc<Hub>,
    client: NetworkServiceClient<nsm_transport::Connection>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl Node {
    async fn start() -> Self {
        let authority = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
        let source = |name: &str| {
            let id = format!("spiffe://test.lab/{name}").parse().unwrap();
            let life = Duration::from_secs(3600);
            Source::fixed(authority.identity(&id, life, SystemTime::now()).unwrap())
        };
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nsm.sock");
        let server = Server::bind(source("manager"), &[ListenUrl::Unix(socket.clone())]).await.unwrap();
        let (people, mesh, hub) = (Arc::new(People::default()), Mesh::default(), Arc::new(Hub::default()));
        let info = ClientInfo([("nodeName".to_owned(), "node1".to_owned())].into());
        let edits = Edits::new(Some(Arc::clone(&people) as Arc<dyn Workloads>), info.clone());
        let monitor = Monitor { hub: Arc::clone(&hub), terminates: false };
        let chain = nsm_mesh::chain![monitor, info, edits.clone(), mesh.clone()];
        let connections = Connections::serving("manager", chain, Arc::new(Metrics::default()));
        let mut routes = RoutesBuilder::default();
        nsm_mesh::server::add(&mut routes, connections, Arc::clone(&hub), Arc::default());
        let tasks = vec![
            tokio::spawn(server.serve(routes.routes(), &[], std::future::pending())),
            tokio::spawn(edits.look_after(Arc::clone(&hub))),
        ];
        let pool = Pool::new(source("pod"), PoolConfig::default());
        let channel = pool.get(&DialUrl::Unix(socket), PATIENCE).await.unwrap();
        let client = NetworkServiceClient::new(channel);
        Self { people, mesh, hub, client, tasks, _directory: directory }
    }

    /// Asks as a client does: as it was answered the last time.
    async fn ask(&self, conn: &Connection) -> Result<Connection, Status> {
        let request = NetworkServiceRequest { connection: Some(conn.clone()), ..Default::default() };
        self.client.clone().request(request).await.map(tonic::Response::into_inner)
    }

    fn edit(&self, generation: i64, service: &str, labels: &[(&str, &str)], mtu: Option<u32>) {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let wanted = Wanted { service: service.into(), labels, mtu };
        *self.people.edit.lock().unwrap() = Some(Edit { wanted, generation, stands: false });
    }

    /// What the rest of the mesh was asked since it was asked for this last.
    fn asked(&self) -> Vec<Connection> {
        std::mem::take(&mut *self.mesh.0.lock().unwrap())
    }

    fn heard(&self) -> Vec<String> {
        std::mem::take(&mut *self.people.heard.lock().unwrap())
    }
}

/// As a client asks for the first time.
fn first() -> Connection {
    let segment = PathSegment { name: "pod".into(), id: "pod-0".into(), ..PathSegment::default() };
    let ip = IpContext { excluded_prefixes: vec!["10.0.0.0/8".into()], ..IpContext::default() };
    Connection {
        id: "pod-0".into(),
        network_service: "finance".into(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        path: Some(Path { path_segments: vec![segment], ..Path::default() }),
        context: Some(ConnectionContext { ip_context: Some(ip), ..ConnectionContext::default() }),
        ..Connection::default()
    }
}

fn mtu(conn: &Connection) -> u32 {
    conn.context.as_ref().unwrap().mtu
}

async fn until_asked_again(events: &mut mpsc::Receiver<Arc<ConnectionEvent>>) {
    let again = async {
        while let Some(event) = events.recv().await {
            if event.connections.values().any(|conn| conn.state() == State::RefreshRequested) {
                return;
            }
        }
        panic!("the events end");
    };
    tokio::time::timeout(PATIENCE, again).await.expect("the client is told to ask again");
}

#[tokio::test]
async fn a_wire_is_asked_for_as_it_is_edited_and_its_client_does_not_learn_of_it() {
    let node = Node::start().await;
    let mut events = node.hub.watch(MonitorScopeSelector::default(), Viewer::All).unwrap();
    let mut conn = node.ask(&first()).await.unwrap();
    assert_eq!((conn.network_service_endpoint_name.as_str(), conn.payload.as_str()), ("finance-gw", "IP"));
    assert_eq!(node.asked().len(), 1);

    // Another service: its endpoint, its payload, its addresses, its names.
    node.edit(2, "audit", &[("app", "spy")], None);
    node.people.news.notify_one();
    until_asked_again(&mut events).await;
    conn = node.ask(&conn).await.unwrap();
    let asked = node.asked().remove(0);
    assert_eq!(asked.network_service, "audit");
    assert_eq!(asked.labels["app"], "spy");
    assert_eq!(asked.labels["nodeName"], "node1", "as every wish");
    assert_eq!((asked.network_service_endpoint_name.as_str(), asked.payload.as_str()), ("", ""));
    let context = asked.context.unwrap();
    let ip = context.ip_context.unwrap();
    assert_eq!((ip.src_ip_addrs.len(), ip.excluded_prefixes.as_slice()), (0, &["10.0.0.0/8".to_owned()][..]));
    assert!(context.dns_context.unwrap().configs.is_empty());
    assert_eq!((conn.network_service.as_str(), conn.labels["app"].as_str()), ("finance", "web"));
    assert_eq!(
        (conn.network_service_endpoint_name.as_str(), conn.payload.as_str()),
        ("audit-gw", "ETHERNET")
    );
    assert_eq!(node.heard(), ["2 applied"]);

    // A refresh changes nothing.
    let told = conn.clone();
    conn = node.ask(&conn).await.unwrap();
    let asked = node.asked().remove(0);
    assert_eq!(
        (asked.network_service.as_str(), &*asked.network_service_endpoint_name),
        ("audit", "audit-gw")
    );
    assert_eq!(conn.context, told.context);

    // The largest packet, there and back: the endpoint stays.
    for (generation, wanted, is) in
        [(3, Some(1400), 1400), (4, Some(9000), 1500), (5, Some(1300), 1300), (6, None, 1500)]
    {
        node.edit(generation, "audit", &[("app", "spy")], wanted);
        conn = node.ask(&conn).await.unwrap();
        assert_eq!((mtu(&conn), conn.network_service_endpoint_name.as_str()), (is, "audit-gw"), "{wanted:?}");
    }
    let _asked = (node.asked(), node.heard());

    // Taken back: it is asked for as its workload wants it.
    *node.people.edit.lock().unwrap() = None;
    node.people.news.notify_one();
    until_asked_again(&mut events).await;
    conn = node.ask(&conn).await.unwrap();
    let asked = node.asked().remove(0);
    assert_eq!(
        (asked.network_service.as_str(), asked.network_service_endpoint_name.as_str()),
        ("finance", "")
    );
    assert_eq!((conn.network_service_endpoint_name.as_str(), conn.payload.as_str()), ("finance-gw", "IP"));
    assert_eq!(node.heard(), Vec::<String>::new());
}

#[tokio::test]
async fn a_wire_stays_as_it_was_where_it_cannot_be_as_it_is_edited() {
    let node = Node::start().await;
    node.edit(2, "audit", &[("app", "web")], None);
    let mut conn = node.ask(&first()).await.unwrap();
    assert_eq!(conn.network_service_endpoint_name, "audit-gw", "from the first request on");
    let _asked = (node.asked(), node.heard());

    node.edit(3, "nothing", &[("app", "web")], Some(1300));
    conn = node.ask(&conn).await.unwrap();
    let asked = node.asked();
    let services: Vec<_> = asked.iter().map(|conn| conn.network_service.as_str()).collect();
    assert_eq!(services, ["nothing", "audit"]);
    assert_eq!((asked[1].network_service_endpoint_name.as_str(), mtu(&conn)), ("audit-gw", 1500));
    assert_eq!((conn.network_service.as_str(), conn.state()), ("finance", State::Up));
    assert_eq!(
        node.heard(),
        ["3 refused: manager: network service \"nothing\" is not found (hint: apply it)"]
    );
    // Not with every refresh.
    conn = node.ask(&conn).await.unwrap();
    assert_eq!((node.asked().len(), node.heard().len()), (1, 0));
    // The next edit is another one.
    node.edit(4, "nothing", &[("app", "web")], None);
    let _answered = node.ask(&conn).await.unwrap();
    assert_eq!((node.asked().len(), node.heard().len()), (2, 1));
}

#[tokio::test]
async fn what_an_earlier_process_has_applied_is_not_asked_for_anew() {
    let node = Node::start().await;
    node.edit(2, "audit", &[("app", "web")], None);
    node.people.edit.lock().unwrap().as_mut().unwrap().stands = true;
    let before = Connection {
        network_service_endpoint_name: "audit-gw-2".into(),
        payload: "ETHERNET".into(),
        ..first()
    };
    let conn = node.ask(&before).await.unwrap();
    assert_eq!(conn.network_service_endpoint_name, "audit-gw-2");
    assert_eq!(node.asked()[0].network_service, "audit");
    // Another wire of the same workload is nobody's business.
    let mut other = first();
    other.id = "pod-1".into();
    other.path.as_mut().unwrap().path_segments[0].id = "pod-1".into();
    assert_eq!(node.ask(&other).await.unwrap().network_service_endpoint_name, "finance-gw");
}
