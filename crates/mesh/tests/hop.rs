//! A hop between a caller and a next hop that say what they like, over real mTLS on real sockets: what upstream's
//! programs rely on, and what they may do wrong without harming us (spec/control-plane.md sections 17 and 18).
#![allow(clippy::unwrap_used, reason = "a test program")]

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use nsm_api::{
    mechanism::{LOCAL, REMOTE, key},
    path,
    pb::{
        connection::{
            Connection, ConnectionEvent, ConnectionEventType, Mechanism, MonitorScopeSelector, Path,
            PathSegment, State,
            monitor_connection_client::MonitorConnectionClient,
            monitor_connection_server::{MonitorConnection, MonitorConnectionServer},
        },
        connectioncontext::{
            ConnectionContext, DnsConfig, DnsContext, EthernetContext, ExtraPrefixRequest, IpContext,
            IpFamily, IpNeighbor, PolicyRoute, Route,
        },
        networkservice::{
            NetworkServiceRequest,
            network_service_client::NetworkServiceClient,
            network_service_server::{NetworkService, NetworkServiceServer},
        },
    },
};
use nsm_identity::{
    Identity, Source,
    ca::Authority,
    policy::{Check, Policies},
    token,
};
use nsm_mesh::{
    Connections, Context, Element, Error, Holders, Next, NextHop, Result,
    auth::Authorize,
    chain,
    dial::Dial,
    metrics::Metrics,
    monitor::{Hub, Monitor},
    server,
};
use nsm_transport::{DialTarget, DialUrl, ListenUrl, Pool, PoolConfig, Server};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _, wrappers::UnboundedReceiverStream};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap, service::RoutesBuilder};

const PATIENCE: Duration = Duration::from_secs(30);

type Answer = std::result::Result<Connection, Status>;
type Spoil = Box<dyn Fn(&mut Connection) + Send>;
type Event = std::result::Result<ConnectionEvent, Status>;

/// The next hop: what it was asked, and what it answers.
#[derive(Clone)]
struct Peer {
    asked: Arc<Mutex<Vec<NetworkServiceRequest>>>,
    closed: Arc<Mutex<Vec<Connection>>>,
    /// How many of each key came with each call.
    tokens: Arc<Mutex<Vec<(usize, usize)>>>,
    spoil: Arc<Mutex<Spoil>>,
    /// It answers nobody while somebody else has this.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The same of Closes.
    closing: Arc<tokio::sync::Mutex<()>>,
    /// It cannot be told to close now.
    deaf: Arc<AtomicBool>,
    /// What it was asked for, in order.
    calls: Arc<Mutex<Vec<&'static str>>>,
    streams: Arc<Mutex<Vec<mpsc::UnboundedSender<Event>>>>,
}

impl Peer {
    fn new() -> Self {
        Self {
            asked: Arc::default(),
            closed: Arc::default(),
            tokens: Arc::default(),
            spoil: Arc::new(Mutex::new(Box::new(|_| {}))),
            turn: Arc::default(),
            closing: Arc::default(),
            deaf: Arc::default(),
            calls: Arc::default(),
            streams: Arc::default(),
        }
    }

    fn note(&self, metadata: &MetadataMap) {
        let count = |key| metadata.get_all(key).iter().count();
        self.tokens.lock().push((count("nsm-client-token"), count("nsm-client-token-expires")));
    }

    fn answers(&self, spoil: impl Fn(&mut Connection) + Send + 'static) {
        *self.spoil.lock() = Box::new(spoil);
    }

    /// Sends this on every stream that is open; `None` ends them.
    fn tell(&self, event: Option<Event>) {
        match event {
            Some(event) => self.streams.lock().iter().for_each(|stream| drop(stream.send(event.clone()))),
            None => self.streams.lock().clear(),
        }
    }
}

#[tonic::async_trait]
impl NetworkService for Peer {
    async fn request(
        &self,
        request: Request<NetworkServiceRequest>,
    ) -> std::result::Result<Response<Connection>, Status> {
        self.note(request.metadata());
        let token = nsm_transport::client_token(request.metadata()).unwrap();
        let request = request.into_inner();
        self.asked.lock().push(request.clone());
        self.calls.lock().push("request");
        let _turn = self.turn.lock().await;
        // As an endpoint of upstream does it.
        let mut conn = request.connection.unwrap();
        let asker = path::step(&mut conn, "nse", nsm_mesh::chain::new_id).unwrap();
        token.jwt().clone_into(&mut path::previous_mut(&mut conn).unwrap().token);
        let own = path::current_mut(&mut conn).unwrap();
        own.token = "nse's".into();
        own.expires = Some(path::to_timestamp(SystemTime::now() + Duration::from_secs(600)));
        if conn.mechanism.is_none() {
            conn.mechanism = request.mechanism_preferences.into_iter().next();
        }
        path::restore(&mut conn, asker).unwrap();
        (self.spoil.lock())(&mut conn);
        Ok(Response::new(conn))
    }

    async fn close(&self, request: Request<Connection>) -> std::result::Result<Response<()>, Status> {
        self.note(request.metadata());
        self.calls.lock().push("close");
        if self.deaf.load(Ordering::Relaxed) {
            return Err(Status::aborted("not now"));
        }
        let _closing = self.closing.lock().await;
        self.calls.lock().push("closed");
        self.closed.lock().push(request.into_inner());
        Ok(Response::new(()))
    }
}

#[tonic::async_trait]
impl MonitorConnection for Peer {
    type MonitorConnectionsStream = Pin<Box<dyn Stream<Item = Event> + Send>>;

    async fn monitor_connections(
        &self,
        request: Request<MonitorScopeSelector>,
    ) -> std::result::Result<Response<Self::MonitorConnectionsStream>, Status> {
        self.note(request.metadata());
        let (tell, events) = mpsc::unbounded_channel();
        tell.send(Ok(ConnectionEvent::default())).unwrap();
        self.streams.lock().push(tell);
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(events))))
    }
}

/// Where every request goes at present; then makes the way there, while nobody else has the turn, and if it can.
#[derive(Debug)]
struct To(Arc<Mutex<NextHop>>, Arc<tokio::sync::Mutex<()>>, Arc<AtomicBool>);

#[async_trait]
impl Element for To {
    fn name(&self) -> &'static str {
        "to"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        cx.next_hop = Some(self.0.lock().clone());
        let answer = next.request(cx, request).await;
        drop(self.1.lock().await);
        if self.2.load(Ordering::Relaxed) { Err(Error::internal("there is no way")) } else { answer }
    }
}

/// A hop of ours in the middle.
struct Mesh {
    authority: Authority,
    _directory: tempfile::TempDir,
    url: DialUrl,
    to: Arc<Mutex<NextHop>>,
    /// The way there is made by whoever has this.
    making: Arc<tokio::sync::Mutex<()>>,
    /// No way can be made.
    stuck: Arc<AtomicBool>,
    next: Peer,
    /// Another, to which requests go when `to` says so.
    other: (NextHop, Peer),
    other_at: DialUrl,
    nse: Arc<Identity>,
    hub: Arc<Hub>,
    served: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.served.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl Mesh {
    async fn start() -> Self {
        Self::with(Policies::default()).await
    }

    /// A hop that checks this.
    async fn with(policies: Policies) -> Self {
        let authority = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let source = |name: &str| {
            let id = format!("spiffe://test.lab/{name}").parse().unwrap();
            Source::fixed(authority.identity(&id, Duration::from_secs(3600), SystemTime::now()).unwrap())
        };
        let listen = |name: &str| ListenUrl::Unix(directory.path().join(name));
        let dial = |name: &str| -> DialUrl {
            format!("unix://{}", directory.path().join(name).display()).parse().unwrap()
        };
        let next = Peer::new();
        let nse = source("nse");
        let server = Server::bind(nse.clone(), &[listen("nse.sock")]).await.unwrap();
        let mut routes = RoutesBuilder::default();
        routes
            .add_service(NetworkServiceServer::new(next.clone()))
            .add_service(MonitorConnectionServer::new(next.clone()));
        let mut served = vec![tokio::spawn(server.serve(routes.routes(), &[], std::future::pending()))];
        let other = Peer::new();
        let server = Server::bind(source("other"), &[listen("other.sock")]).await.unwrap();
        let mut routes = RoutesBuilder::default();
        routes
            .add_service(NetworkServiceServer::new(other.clone()))
            .add_service(MonitorConnectionServer::new(other.clone()));
        served.push(tokio::spawn(server.serve(routes.routes(), &[], std::future::pending())));
        let to = Arc::new(Mutex::new(NextHop::from(dial("nse.sock"))));
        let (making, stuck) = (Arc::default(), Arc::default());

        let hub = Arc::new(Hub::default());
        let own = source("mgr");
        let pool = Pool::new(own.clone(), PoolConfig::default());
        let chain = chain![
            Authorize { max_token_lifetime: Duration::from_secs(600), policies: Arc::new(policies) },
            Monitor { hub: Arc::clone(&hub), terminates: false },
            To(Arc::clone(&to), Arc::clone(&making), Arc::clone(&stuck)),
            Dial::new(pool, "mgr", Arc::clone(&hub), PATIENCE),
        ];
        let connections = Connections::serving("mgr", chain, Arc::new(Metrics::default()));
        let server = Server::bind(own, &[listen("mgr.sock")]).await.unwrap();
        let mut routes = RoutesBuilder::default();
        server::add(&mut routes, connections, Arc::clone(&hub), Arc::default());
        served.push(tokio::spawn(server.serve(routes.routes(), &[], std::future::pending())));
        let url = dial("mgr.sock");
        let other_at = dial("other.sock");
        let other = (other_at.clone().into(), other);
        Self {
            authority,
            _directory: directory,
            url,
            to,
            making,
            stuck,
            next,
            other,
            other_at,
            nse: nse.current(),
            hub,
            served,
        }
    }

    fn identity(&self, name: &str) -> Identity {
        identity(&self.authority, name)
    }

    async fn channel(&self) -> nsm_transport::Connection {
        self.channel_of("nsc").await
    }

    async fn channel_of(&self, name: &str) -> nsm_transport::Connection {
        let source = Source::fixed(self.identity(name));
        Pool::new(source, PoolConfig::default()).get(&self.url, PATIENCE).await.unwrap()
    }

    async fn ask(&self, request: NetworkServiceRequest) -> Answer {
        NetworkServiceClient::new(self.channel().await).request(request).await.map(Response::into_inner)
    }

    async fn watch(&self) -> tonic::Streaming<ConnectionEvent> {
        let own = PathSegment { name: "nsc".into(), id: "nsc-0".into(), ..PathSegment::default() };
        let selector = MonitorScopeSelector { path_segments: vec![own], ..MonitorScopeSelector::default() };
        let client = MonitorConnectionClient::new(self.channel().await).monitor_connections(selector).await;
        client.unwrap().into_inner()
    }
}

fn identity(authority: &Authority, name: &str) -> Identity {
    let id = format!("spiffe://test.lab/{name}").parse().unwrap();
    authority.identity(&id, Duration::from_secs(3600), SystemTime::now()).unwrap()
}

fn request() -> NetworkServiceRequest {
    let segment = PathSegment { name: "nsc".into(), id: "nsc-0".into(), ..PathSegment::default() };
    NetworkServiceRequest {
        connection: Some(Connection {
            id: "nsc-0".into(),
            network_service: "svc".into(),
            path: Some(Path { unknown: None, index: 0, path_segments: vec![segment] }),
            ..Connection::default()
        }),
        mechanism_preferences: vec![Mechanism::kernel("nsm0", None)],
        ..NetworkServiceRequest::default()
    }
}

fn again(answer: &Connection) -> NetworkServiceRequest {
    NetworkServiceRequest { connection: Some(answer.clone()), ..request() }
}

fn map(of: &[(&str, &str)]) -> BTreeMap<String, String> {
    of.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// Mechanisms of sections 3.2, 3.7, 3.8, 6.5 and 6.6, and of nobody.
fn strange_mechanisms() -> Vec<Mechanism> {
    let m = |cls: &str, kind: &str, parameters: &[(&str, &str)]| Mechanism {
        cls: cls.into(),
        r#type: kind.into(),
        parameters: map(parameters),
        ..Mechanism::default()
    };
    vec![
        m(
            LOCAL,
            "VFIO",
            &[("cgroupDir", "/x"), ("iommuGroup", "7"), ("tokenID", "sriov-1"), ("vfioMajor", "10")],
        ),
        m(
            LOCAL,
            "KERNEL",
            &[
                ("tokenID", "sriov-2"),
                ("pciAddress", "0000:01:00.0"),
                ("supportsVlan", "true"),
                ("vlan", "0012"),
                ("routeLocalNet", "T"),
                ("IPTables4NatTemplate", "-A {{ .NsmInterfaceName }};-B"),
            ],
        ),
        m(LOCAL, "MEMIF", &[("socketfile", "@/tmp/memif/1/memif.socket"), ("inodeURL", "")]),
        m(REMOTE, "NOOP", &[]),
        m(
            REMOTE,
            "WIREGUARD",
            &[("src_public_key", "AAAA="), ("src_port", "not a port"), (key::ORIG_SRC_IP, "")],
        ),
        m(REMOTE, "SRV6", &[("src_bsid", "fd00::1"), ("src_hw_addr", "02:00:00:00:00:01")]),
        m(REMOTE, "VLAN", &[("vlan-id", "4095")]),
        m("NEITHER", "CARRIER-PIGEON", &[("", "no name"), ("wings", "2"), ("ключ", "значение")]),
    ]
}

fn strange_context() -> ConnectionContext {
    let route =
        |prefix: &str, hop: &str| Route { unknown: None, prefix: prefix.into(), next_hop: hop.into() };
    ConnectionContext {
        ip_context: Some(IpContext {
            src_ip_addrs: vec!["10.0.0.2/24".into(), "fd00::2/64".into()],
            dst_ip_addrs: vec!["10.0.0.1/24".into()],
            src_ip_required: true,
            dst_ip_required: true,
            src_routes: vec![route("10.9.0.0/16", "10.0.0.1")],
            dst_routes: vec![route("10.8.0.0/16", "")],
            excluded_prefixes: vec!["10.96.0.0/12".into(), "10.96.0.0/12".into()],
            ip_neighbors: vec![IpNeighbor {
                unknown: None,
                ip: "10.0.0.9".into(),
                hardware_address: "02::9".into(),
            }],
            extra_prefix_request: vec![ExtraPrefixRequest {
                unknown: None,
                addr_family: Some(IpFamily { family: 1 }),
                prefix_len: 200,
                required_number: 0,
                requested_number: 7,
            }],
            extra_prefixes: vec!["172.31.0.0/24".into(), "anything".into()],
            policies: vec![PolicyRoute { proto: "17".into(), ..PolicyRoute::default() }],
            ..IpContext::default()
        }),
        dns_context: Some(DnsContext {
            configs: vec![DnsConfig {
                unknown: None,
                dns_server_ips: vec!["10.0.0.53".into()],
                search_domains: vec!["a.b".into(), String::new()],
            }],
            ..DnsContext::default()
        }),
        ethernet_context: Some(EthernetContext {
            src_mac: "02:00:00:00:00:01".into(),
            dst_mac: String::new(),
            vlan_tag: -5,
            ..EthernetContext::default()
        }),
        extra_context: map(&[("vl3", "x"), ("", "")]),
        mtu: 1234,
        ..ConnectionContext::default()
    }
}

/// The message as a later version of the protocol has it: with a field that nobody here knows.
fn newer<M: Message + Default>(message: M) -> M {
    let mut bytes = message.encode_to_vec();
    prost::encoding::string::encode(77, &"a field of the future".into(), &mut bytes);
    M::decode(&bytes[..]).unwrap()
}

#[tokio::test]
async fn what_this_mesh_does_not_know_passes_through_unharmed() {
    let mesh = Mesh::start().await;
    let mut request = newer(request());
    request.mechanism_preferences = strange_mechanisms().into_iter().map(newer).collect();
    let conn = request.connection.as_mut().unwrap();
    *conn = newer(conn.clone());
    let context = strange_context();
    conn.context = Some(newer(ConnectionContext {
        ip_context: context.ip_context.map(newer),
        dns_context: context.dns_context.map(newer),
        ethernet_context: context.ethernet_context.map(newer),
        ..context
    }));
    conn.labels =
        map(&[("sriovToken", "worker.domain/10G"), ("serviceDomain", "d"), ("via", "gw"), ("x", "{{.y}}")]);
    conn.payload = "MPLS".into();
    conn.path.as_mut().unwrap().path_segments[0].metrics =
        map(&[("client_interface", "KERNEL/nsm0"), ("client_drops", "-1")]);
    // What the next hop adds comes back as it is, too.
    let added = || Mechanism {
        parameters: map(&[("deviceMajor", "1"), ("new in v9", "yes")]),
        ..newer(strange_mechanisms()[0].clone())
    };
    mesh.next.answers(move |conn| {
        conn.mechanism = Some(added());
        conn.context.as_mut().unwrap().extra_context.insert("added".into(), "there".into());
        conn.path.as_mut().unwrap().path_segments[2].metrics =
            map(&[("server_interface", "VFIO/x"), ("new", "1")]);
        let theirs = &mut conn.path.as_mut().unwrap().path_segments[2];
        *theirs = newer(theirs.clone());
    });
    let answer = mesh.ask(request.clone()).await.unwrap();

    let asked = mesh.next.asked.lock()[0].clone();
    assert_eq!(asked.mechanism_preferences, request.mechanism_preferences, "all of them, in order");
    assert!(request.unknown.is_some() && asked.unknown == request.unknown);
    let (sent, got) = (request.connection.unwrap(), asked.connection.unwrap());
    let known = |conn: &Connection| Connection { id: String::new(), path: None, ..conn.clone() };
    assert_eq!(known(&got), known(&sent));
    assert_eq!(path::segments(&got)[0].metrics, path::segments(&sent)[0].metrics);
    let mut expected = known(&sent);
    expected.mechanism = Some(added());
    expected.context.as_mut().unwrap().extra_context.insert("added".into(), "there".into());
    assert_eq!(known(&answer), expected);
    assert_eq!(path::segments(&answer)[2].metrics, map(&[("server_interface", "VFIO/x"), ("new", "1")]));
    assert_eq!(path::segments(&answer)[2].unknown, request.unknown, "the same field, in a segment");
    // A chosen mechanism goes on beside the preferences, which keep their order.
    mesh.ask(NetworkServiceRequest {
        connection: Some(answer),
        mechanism_preferences: strange_mechanisms(),
        ..NetworkServiceRequest::default()
    })
    .await
    .unwrap();
    let asked = mesh.next.asked.lock()[1].clone();
    assert_eq!(asked.connection.unwrap().mechanism, Some(added()));
    assert_eq!(asked.mechanism_preferences, strange_mechanisms());
}

#[tokio::test]
async fn an_answer_is_the_askers_complete_signed_and_up() {
    let mesh = Mesh::start().await;
    // Whatever the next hop makes of them.
    mesh.next.answers(|conn| {
        conn.set_state(State::Down);
        conn.id = "somebody".into();
        conn.path.as_mut().unwrap().index = 2;
    });
    let answer = mesh.ask(request()).await.unwrap();
    assert_eq!((answer.id.as_str(), path::index(&answer), answer.state()), ("nsc-0", 0, State::Up));
    let names: Vec<_> = path::segments(&answer).iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["nsc", "mgr", "nse"]);
    for segment in &path::segments(&answer)[..2] {
        assert!(segment.expires.is_some(), "{}", segment.name);
        let claims = token::claims(&segment.token).unwrap();
        assert_eq!(claims.subject, format!("spiffe://test.lab/{}", segment.name));
        assert!(claims.expires.is_some());
    }
    // The token is an array's, as the policies of upstream iterate over it.
    let chained = [("nsc", "mgr"), ("mgr", "nse")];
    for (segment, (_, audience)) in path::segments(&answer).iter().zip(chained) {
        let claims = token::claims(&segment.token).unwrap();
        assert_eq!(claims.audience, [format!("spiffe://test.lab/{audience}")]);
    }
    // A refresh keeps the ids; a new one is a UUID.
    let refreshed = mesh.ask(again(&answer)).await.unwrap();
    let ids = |conn: &Connection| path::segments(conn).iter().map(|s| s.id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&refreshed), ids(&answer));
    assert!(uuid::Uuid::parse_str(&ids(&answer)[1]).is_ok(), "{:?}", ids(&answer));
    NetworkServiceClient::new(mesh.channel().await).close(refreshed).await.unwrap();
    let closed = mesh.next.closed.lock()[0].clone();
    assert_eq!((path::index(&closed), closed.id.as_str()), (1, ids(&answer)[1].as_str()));
    assert!(!mesh.next.tokens.lock().is_empty());
    assert!(mesh.next.tokens.lock().iter().all(|counts| *counts == (1, 1)), "one token with every call");
}

/// A way in which an answer may be wrong, how, and the error (`None`: it is good enough).
type Defect = (&'static str, fn(&mut Connection), Option<&'static str>);

#[tokio::test]
async fn what_peers_do_wrong_is_survived() {
    let mesh = Mesh::start().await;
    let cases: Vec<Defect> = vec![
        ("no path", |c| c.path = None, Some("is of no use")),
        ("a path without us", |c| c.path.as_mut().unwrap().path_segments.truncate(1), Some("is of no use")),
        ("its own segment missing", |c| c.path.as_mut().unwrap().path_segments.truncate(2), None),
        ("no expiry", |c| c.path.as_mut().unwrap().path_segments[2].expires = None, None),
        (
            "an expiry at the beginning of time",
            |c| c.path.as_mut().unwrap().path_segments[2].expires = Some(Default::default()),
            None,
        ),
        ("no token", |c| c.path.as_mut().unwrap().path_segments[2].token.clear(), None),
        ("an index past the end", |c| c.path.as_mut().unwrap().index = 77, None),
        ("another's id", |c| c.id = "u9".into(), None),
        ("a state that nobody knows", |c| c.state = 99, None),
        (
            "a route that is none (defect 13)",
            |c| {
                let routes = vec![Route { unknown: None, prefix: "nowhere".into(), next_hop: String::new() }];
                let ip = IpContext { src_routes: routes, ..IpContext::default() };
                c.context = Some(ConnectionContext { ip_context: Some(ip), ..ConnectionContext::default() });
            },
            Some("\"nowhere\""),
        ),
        (
            "empty tunnel addresses (defect 15) and VNI 0 (defect 16)",
            |c| {
                c.mechanism = Some(Mechanism {
                    cls: REMOTE.into(),
                    r#type: "VXLAN".into(),
                    parameters: map(&[(key::ORIG_SRC_IP, ""), (key::SRC_IP, ""), (key::VNI, "0")]),
                    ..Mechanism::default()
                });
            },
            None,
        ),
        ("no payload (defect 20)", |c| c.payload.clear(), None),
        ("no mechanism", |c| c.mechanism = None, None),
    ];
    for (what, spoil, error) in cases {
        mesh.next.answers(spoil);
        let answer = mesh.ask(request()).await;
        match (answer, error) {
            (Ok(answer), None) => {
                assert_eq!(
                    (answer.id.as_str(), path::index(&answer), answer.state()),
                    ("nsc-0", 0, State::Up),
                    "{what}"
                );
                assert!(path::segments(&answer)[1].expires.is_some(), "{what}");
                NetworkServiceClient::new(mesh.channel().await).close(answer).await.unwrap();
            }
            (Err(status), Some(text)) => {
                assert_eq!(status.code(), Code::Unknown, "{what}: {status:?}");
                assert!(status.message().contains(text), "{what}: {status:?}");
            }
            (answer, _) => panic!("{what}: {answer:?}"),
        }
    }
}

#[tokio::test]
async fn a_connection_whose_next_hop_falls_silent_is_down() {
    for end in
        [None, Some(Err(Status::cancelled("as if nothing were"))), Some(Err(Status::unavailable("gone")))]
    {
        let mesh = Mesh::start().await;
        let mut events = mesh.watch().await;
        let first = events.next().await.unwrap().unwrap();
        assert_eq!(first.r#type(), ConnectionEventType::InitialStateTransfer);
        assert!(first.connections.is_empty(), "at once, even when there is nothing");
        let answer = mesh.ask(request()).await.unwrap();
        let up = events.next().await.unwrap().unwrap();
        // Key, id and index are the hop's own.
        let own = path::segments(&answer)[1].id.clone();
        let seen = &up.connections[&own];
        assert_eq!((seen.id.as_str(), path::index(seen), seen.state()), (own.as_str(), 1, State::Up));
        while mesh.next.streams.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        // A state that nobody knows is passed on like any other.
        let mut theirs = seen.clone();
        theirs.state = 99;
        theirs.path.as_mut().unwrap().index = 2;
        let event = |kind: ConnectionEventType, conn: &Connection| ConnectionEvent {
            r#type: kind.into(),
            connections: [("any".to_owned(), conn.clone())].into(),
        };
        mesh.next.tell(Some(Ok(event(ConnectionEventType::Update, &theirs))));
        assert_eq!(events.next().await.unwrap().unwrap().connections[&own].state, 99);
        theirs.set_state(State::RefreshRequested);
        mesh.next.tell(Some(Ok(event(ConnectionEventType::Update, &theirs))));
        assert_eq!(events.next().await.unwrap().unwrap().connections[&own].state(), State::RefreshRequested);
        // It is followed on beyond a DOWN (upstream stops there, section 18, 22).
        for state in [State::Down, State::Up] {
            theirs.set_state(state);
            mesh.next.tell(Some(Ok(event(ConnectionEventType::Update, &theirs))));
            assert_eq!(events.next().await.unwrap().unwrap().connections[&own].state(), state);
        }
        // However its stream ends: upstream's heal would sleep through a `Canceled`.
        mesh.next.tell(end);
        mesh.next.tell(None);
        assert_eq!(events.next().await.unwrap().unwrap().connections[&own].state(), State::Down);
        // The next request follows it again, and another end is told again.
        let answer = mesh.ask(again(&answer)).await.unwrap();
        assert_eq!(events.next().await.unwrap().unwrap().connections[&own].state(), State::Up);
        NetworkServiceClient::new(mesh.channel().await).close(answer).await.unwrap();
        assert_eq!(events.next().await.unwrap().unwrap().r#type(), ConnectionEventType::Delete);
        // A hop that ends its streams does not say `Canceled`.
        mesh.hub.end_watches();
        assert!(
            events.next().await.is_none_or(|end| end.is_err_and(|status| status.code() != Code::Cancelled))
        );
    }
}

/// An event about what the next hop was asked for with the nth request.
fn told_of(mesh: &Mesh, nth: usize, kind: ConnectionEventType, state: State) -> ConnectionEvent {
    let mut theirs = mesh.next.asked.lock()[nth].connection.clone().unwrap();
    path::step(&mut theirs, "nse", nsm_mesh::chain::new_id).unwrap();
    theirs.set_state(state);
    ConnectionEvent { r#type: kind.into(), connections: [("any".to_owned(), theirs)].into() }
}

#[tokio::test]
async fn events_that_repeat_or_come_from_the_past_bring_nothing_down() {
    let mesh = Mesh::start().await;
    let mut events = mesh.watch().await;
    events.next().await.unwrap().unwrap();
    let first = mesh.ask(request()).await.unwrap();
    let own = path::segments(&first)[1].id.clone();
    while mesh.next.streams.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    let mut state = async || events.next().await.unwrap().unwrap().connections[&own].state();
    assert_eq!(state().await, State::Up);
    mesh.ask(again(&first)).await.unwrap();
    assert_eq!(state().await, State::Up);
    // Of what it was asked for before, told late: neither its fall nor its end is one of what stands.
    mesh.next.tell(Some(Ok(told_of(&mesh, 0, ConnectionEventType::Update, State::Down))));
    mesh.next.tell(Some(Ok(told_of(&mesh, 0, ConnectionEventType::Delete, State::Up))));
    // The same over and over is news once.
    for _ in 0..1_000 {
        mesh.next.tell(Some(Ok(told_of(&mesh, 1, ConnectionEventType::Update, State::RefreshRequested))));
    }
    assert_eq!(state().await, State::RefreshRequested);
    for _ in 0..1_000 {
        mesh.next.tell(Some(Ok(told_of(&mesh, 1, ConnectionEventType::Update, State::Down))));
    }
    assert_eq!(state().await, State::Down, "nothing in between");
    mesh.next.tell(Some(Ok(told_of(&mesh, 1, ConnectionEventType::Update, State::Up))));
    assert_eq!(state().await, State::Up, "nothing in between");
}

#[tokio::test]
async fn an_answer_after_the_deadline_is_none_and_what_it_was_for_is_closed() {
    let mesh = Mesh::start().await;
    let turn = mesh.next.turn.lock().await;
    let mut late = Request::new(request());
    late.set_timeout(Duration::from_millis(300));
    let status = NetworkServiceClient::new(mesh.channel().await).request(late).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    while *mesh.next.calls.lock() != ["request", "close", "closed"] {
        tokio::task::yield_now().await;
    }
    // It says all the same that it has it.
    let of = mesh.next.closed.lock()[0].id.clone();
    mesh.next.tell(Some(Ok(told_of(&mesh, 0, ConnectionEventType::Update, State::Up))));
    drop(turn);
    let answer = mesh.ask(request()).await.unwrap();
    assert_ne!(path::segments(&answer)[1].id, of, "what was given up is not gone on with");
    assert!(mesh.hub.get(&of).is_none(), "nothing is left");
}

/// Answers each request with a connection, then with another, and so on without end.
#[derive(Clone)]
struct Babbles;

impl tonic::server::NamedService for Babbles {
    const NAME: &'static str = "networkservice.NetworkService";
}

impl tonic::server::ServerStreamingService<NetworkServiceRequest> for Babbles {
    type Response = Connection;
    type ResponseStream = Pin<Box<dyn Stream<Item = Answer> + Send>>;
    type Future = tonic::codegen::BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<NetworkServiceRequest>) -> Self::Future {
        let token = nsm_transport::client_token(request.metadata()).unwrap();
        let mut conn = request.into_inner().connection.unwrap();
        let asker = path::step(&mut conn, "nse", nsm_mesh::chain::new_id).unwrap();
        token.jwt().clone_into(&mut path::previous_mut(&mut conn).unwrap().token);
        path::restore(&mut conn, asker).unwrap();
        let answers = (0..).map(move |nth| {
            let labels = map(&[("nth", &u32::to_string(&nth))]);
            Ok(Connection { labels, ..conn.clone() })
        });
        Box::pin(async { Ok(Response::new(Box::pin(tokio_stream::iter(answers)) as Self::ResponseStream)) })
    }
}

impl tonic::codegen::Service<tonic::codegen::http::Request<tonic::body::Body>> for Babbles {
    type Response = tonic::codegen::http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = tonic::codegen::BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::result::Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: tonic::codegen::http::Request<tonic::body::Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let codec = tonic_prost::ProstCodec::default();
            Ok(tonic::server::Grpc::new(codec).server_streaming(this, request).await)
        })
    }
}

#[tokio::test]
async fn a_peer_that_answers_more_than_once_has_answered_not_at_all() {
    let mesh = Mesh::start().await;
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("babbles.sock");
    let server =
        Server::bind(Source::fixed(mesh.identity("nse")), &[ListenUrl::Unix(socket.clone())]).await.unwrap();
    let mut routes = RoutesBuilder::default();
    routes.add_service(Babbles);
    let served = tokio::spawn(server.serve(routes.routes(), &[], std::future::pending()));
    let url: DialUrl = format!("unix://{}", socket.display()).parse().unwrap();
    *mesh.to.lock() = url.into();
    let mut babbled = Request::new(request());
    babbled.set_timeout(Duration::from_secs(1));
    let status = NetworkServiceClient::new(mesh.channel().await).request(babbled).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(mesh.hub.ids().is_empty(), "nothing is left");
    served.abort();
}

#[tokio::test]
async fn a_connection_that_comes_back_is_not_ended_by_the_close_of_when_it_left() {
    for closes in [true, false] {
        let mesh = Mesh::start().await;
        let answer = mesh.ask(request()).await.unwrap();
        let mut closing = Some(mesh.next.closing.lock().await);
        let home = std::mem::replace(&mut *mesh.to.lock(), mesh.other.0.clone());
        let answer = mesh.ask(again(&answer)).await.unwrap();
        while *mesh.next.calls.lock() != ["request", "close"] {
            tokio::task::yield_now().await;
        }
        *mesh.to.lock() = home;
        let (answer, ()) = tokio::join!(mesh.ask(again(&answer)), async {
            // Long enough for a request that does not wait.
            tokio::time::sleep(Duration::from_millis(200)).await;
            let turn = mesh.next.turn.lock().await;
            closing.take_if(|_| closes);
            // The end of what it was before is told over another connection than the answer, and may come later.
            while mesh.next.asked.lock().len() < 2 {
                tokio::task::yield_now().await;
            }
            let mut theirs = mesh.next.asked.lock()[0].connection.clone().unwrap();
            path::step(&mut theirs, "nse", nsm_mesh::chain::new_id).unwrap();
            mesh.next.tell(Some(Ok(ConnectionEvent {
                r#type: ConnectionEventType::Delete.into(),
                connections: [("any".to_owned(), theirs)].into(),
            })));
            drop(turn);
        });
        let own = path::segments(&answer.unwrap())[1].id.clone();
        assert_eq!(mesh.hub.get(&own).unwrap().0.state(), State::Up);
        let expected: &[&str] = match closes {
            true => &["request", "close", "closed", "request"],
            // It is not waited for without end, and taken back.
            false => &["request", "close", "request"],
        };
        assert_eq!(*mesh.next.calls.lock(), expected);
    }
}

/// Packets go the old way until then.
#[tokio::test]
async fn the_hop_before_is_told_to_close_when_the_way_to_the_new_one_is_made() {
    let mesh = Mesh::start().await;
    let answer = mesh.ask(request()).await.unwrap();
    let making = mesh.making.lock().await;
    let home = std::mem::replace(&mut *mesh.to.lock(), mesh.other.0.clone());
    let asked = async {
        while *mesh.other.1.calls.lock() != ["request"] {
            tokio::task::yield_now().await;
        }
        // Long enough for a Close that does not wait.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(*mesh.next.calls.lock(), ["request"]);
        drop(making);
    };
    let (answer, ()) = tokio::join!(mesh.ask(again(&answer)), asked);
    while mesh.next.closed.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    *mesh.to.lock() = home;
    mesh.ask(again(&answer.unwrap())).await.unwrap();
    assert_eq!(*mesh.next.calls.lock(), ["request", "close", "closed", "request"]);
}

/// Its wire leads there still.
#[tokio::test]
async fn a_connection_that_cannot_move_to_another_hop_stays_at_the_one_before() {
    let mesh = Mesh::start().await;
    let answer = mesh.ask(request()).await.unwrap();
    mesh.stuck.store(true, Ordering::Relaxed);
    *mesh.to.lock() = mesh.other.0.clone();
    mesh.ask(again(&answer)).await.unwrap_err();
    while mesh.other.1.closed.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    // As long as it takes another Close to come.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(*mesh.next.calls.lock(), ["request"]);
    NetworkServiceClient::new(mesh.channel().await).close(answer).await.unwrap();
    assert_eq!(*mesh.next.calls.lock(), ["request", "close", "closed"]);
    assert_eq!(*mesh.other.1.calls.lock(), ["request", "close", "closed"]);
}

/// Both are on one node, behind its manager; the one that the connection has left is dead, perhaps.
#[tokio::test]
async fn of_two_endpoints_behind_one_hop_only_the_one_before_is_left() {
    let mesh = Mesh::start().await;
    let answer = mesh.ask(request()).await.unwrap();
    let _closing = mesh.next.closing.lock().await;
    let source = Source::fixed(mesh.identity("mgr"));
    let dial = Dial::new(Pool::new(source, PoolConfig::default()), "mgr", Arc::default(), PATIENCE);
    let (farewells, hop) = (dial.farewells(), mesh.to.lock().clone());
    farewells.say(hop.clone().called("nse-1"), answer.clone());
    let is_left = |hop: &NextHop, id: &str| farewells.left_since(hop, id).is_some();
    assert!(is_left(&hop.clone().called("nse-1"), &answer.id) && is_left(&hop, &answer.id));
    assert!(!is_left(&hop.clone().called("nse-2"), &answer.id));
    assert!(!is_left(&hop.clone().called("nse-1"), "another's"));
    // Who is asked for an endpoint asks the one that was left last after all others.
    farewells.say(mesh.other.0.clone(), answer.clone());
    let since = [&hop.called("nse-2"), &mesh.to.lock().clone(), &mesh.other.0]
        .map(|hop| farewells.left_since(hop, &answer.id));
    assert!(since.is_sorted_by(|before, after| before < after), "{since:?}");
}

/// He left a moment before: his packets had stopped, because they were on their way to the new one already.
#[tokio::test]
async fn a_hop_is_asked_under_the_id_that_it_has_though_who_asks_has_not_heard_it() {
    for state in [State::Up, State::ReselectRequested] {
        let mesh = Mesh::start().await;
        let mut before = mesh.ask(request()).await.unwrap();
        *mesh.to.lock() = mesh.other.0.clone();
        mesh.other.1.answers(|conn| conn.path.as_mut().unwrap().path_segments[2].id = "other's".into());
        let unheard = mesh.ask(again(&before)).await.unwrap();
        before.set_state(state);
        assert_eq!(mesh.ask(again(&before)).await.unwrap().path.unwrap().path_segments.len(), 3);
        let asked = mesh.other.1.asked.lock().pop().unwrap().connection.unwrap();
        assert_eq!(path::segments(&asked)[2], path::segments(&unheard)[2], "{state:?}");
    }
}

/// A node that was cut off comes back, and its endpoint has kept the connection's address, which nobody else gets.
#[tokio::test]
async fn a_hop_that_cannot_be_told_to_close_is_told_again_until_the_connection_is_back() {
    for comes_back in [false, true] {
        let mesh = Mesh::start().await;
        let first = mesh.ask(request()).await.unwrap();
        mesh.next.deaf.store(true, Ordering::Relaxed);
        let home = std::mem::replace(&mut *mesh.to.lock(), mesh.other.0.clone());
        mesh.other.1.answers(|conn| conn.path.as_mut().unwrap().path_segments[2].id = "other's".into());
        let answer = mesh.ask(again(&first)).await.unwrap();
        while mesh.next.calls.lock().len() < 3 {
            tokio::task::yield_now().await;
        }
        if comes_back {
            *mesh.to.lock() = home;
            mesh.ask(again(&answer)).await.unwrap();
            let asked = mesh.next.calls.lock().len();
            // Longer than until the next two would have come.
            tokio::time::sleep(Duration::from_secs(3)).await;
            let calls = mesh.next.calls.lock();
            assert_eq!((calls.len(), calls.last()), (asked, Some(&"request")), "{calls:?}");
            let asked = mesh.next.asked.lock().pop().unwrap().connection.unwrap();
            assert_eq!(path::segments(&asked)[2].id, path::segments(&first)[2].id, "it still has that");
        } else {
            mesh.next.deaf.store(false, Ordering::Relaxed);
            while mesh.next.closed.lock().is_empty() {
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Who has the place of the forwarder.
#[derive(Debug)]
struct Now(Arc<Mutex<Option<DialTarget>>>);

impl Holders for Now {
    fn now(&self, called: &str) -> Option<DialTarget> {
        assert_eq!(called, "forwarder");
        self.0.lock().clone()
    }
}

/// A forwarder that comes back has the wires of the process before it.
#[tokio::test]
async fn who_has_the_place_of_a_hop_that_is_gone_is_told_to_close_in_its_stead() {
    for asked_again in [false, true] {
        let mesh = Mesh::start().await;
        let now = Arc::new(Mutex::new(None));
        let lasts = |hop: NextHop| hop.lasting("forwarder", Arc::new(Now(Arc::clone(&now))));
        let home = mesh.to.lock().clone();
        *mesh.to.lock() = lasts(home);
        let answer = mesh.ask(request()).await.unwrap();
        mesh.next.deaf.store(true, Ordering::Relaxed);
        if asked_again {
            *mesh.to.lock() = lasts(mesh.other.0.clone());
            *now.lock() = Some(mesh.other_at.clone().into());
            mesh.ask(again(&answer)).await.unwrap();
            // As long as it takes a Close to come.
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert!(mesh.other.1.closed.lock().is_empty() && mesh.next.closed.lock().is_empty());
        }
        NetworkServiceClient::new(mesh.channel().await).close(answer).await.unwrap();
        *now.lock() = Some(mesh.other_at.clone().into());
        while mesh.other.1.closed.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(mesh.next.closed.lock().is_empty());
    }
}

/// A hop that was restarted remembers nothing, and its neighbour has the wire, through which packets pass.
#[tokio::test]
async fn what_stood_before_a_request_that_failed_is_not_closed_by_who_has_forgotten_it() {
    for (state, expected) in [
        (State::Down, ["request", "request"].as_slice()),
        (State::ReselectRequested, ["request", "close", "closed", "request"].as_slice()),
    ] {
        let mesh = Mesh::start().await;
        let mut before = mesh.ask(request()).await.unwrap();
        NetworkServiceClient::new(mesh.channel().await).close(before.clone()).await.unwrap();
        while mesh.next.closed.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        mesh.next.calls.lock().clear();
        mesh.next.answers(|conn| conn.path = None);
        before.set_state(state);
        mesh.ask(again(&before)).await.unwrap_err();
        mesh.next.answers(|_| {});
        mesh.ask(again(&before)).await.unwrap();
        assert_eq!(*mesh.next.calls.lock(), expected);
    }
}

/// The Request itself ends what was, at every hop that remembers it: one that has answered since its events broke off last.
#[tokio::test]
async fn a_hop_is_told_to_close_before_another_endpoint_is_asked_for_only_if_it_may_have_forgotten() {
    for (forgets, tried) in [(false, false), (true, false), (true, true)] {
        let mesh = Mesh::start().await;
        let mut before = mesh.ask(request()).await.unwrap();
        let own = path::segments(&before)[1].id.clone();
        while mesh.next.streams.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        if forgets {
            mesh.next.tell(None);
            let fell = || mesh.hub.get(&own).is_some_and(|(conn, _)| conn.state() == State::Down);
            while !fell() {
                tokio::task::yield_now().await;
            }
        }
        if tried {
            // As it was, in vain.
            mesh.next.answers(|conn| conn.path = None);
            mesh.ask(again(&before)).await.unwrap_err();
            mesh.next.answers(|_| {});
            mesh.next.calls.lock().pop();
        }
        before.set_state(State::ReselectRequested);
        mesh.ask(again(&before)).await.unwrap();
        let close: &[_] = if forgets { &["close", "closed"] } else { &[] };
        assert_eq!(*mesh.next.calls.lock(), [&["request"], close, &["request"]].concat(), "tried: {tried}");
        let last = mesh.next.asked.lock().pop().unwrap().connection.unwrap();
        assert_eq!(last.state(), State::ReselectRequested, "by which it hears of it");
    }
}

#[tokio::test]
async fn a_hop_that_a_reselection_leaves_is_told_to_close_when_the_request_is_over() {
    for answers in [true, false] {
        let mesh = Mesh::start().await;
        let mut before = mesh.ask(request()).await.unwrap();
        before.set_state(State::ReselectRequested);
        *mesh.to.lock() = mesh.other.0.clone();
        if !answers {
            mesh.other.1.answers(|conn| conn.path = None);
        }
        let making = mesh.making.lock().await;
        let (answer, ()) = tokio::join!(mesh.ask(again(&before)), async {
            while mesh.other.1.calls.lock().is_empty() {
                tokio::task::yield_now().await;
            }
            // As long as it takes a Close to come.
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(*mesh.next.calls.lock(), ["request"], "the new way is being made");
            drop(making);
        });
        assert_eq!(answer.is_ok(), answers);
        while *mesh.next.calls.lock() != ["request", "close", "closed"] {
            tokio::task::yield_now().await;
        }
        assert_eq!(mesh.next.closed.lock()[0].state(), State::ReselectRequested);
    }
}

/// Who wants another endpoint because a node is gone would otherwise wait for that node first.
#[tokio::test]
async fn nobody_waits_for_a_hop_that_is_slow_to_close_and_it_is_told_all_the_same() {
    let mesh = Mesh::start().await;
    let answer = mesh.ask(request()).await.unwrap();
    let closing = mesh.next.closing.lock().await;
    NetworkServiceClient::new(mesh.channel().await).close(answer).await.unwrap();
    assert_eq!(*mesh.next.calls.lock(), ["request", "close"]);
    drop(closing);
    while *mesh.next.calls.lock() != ["request", "close", "closed"] {
        tokio::task::yield_now().await;
    }
}

/// His client has found out that packets do not pass, and asks for another endpoint.
#[tokio::test]
async fn a_hop_that_does_not_answer_is_not_waited_for_when_the_caller_has_left() {
    let mesh = Mesh::start().await;
    let answer = mesh.ask(request()).await.unwrap();
    let _turn = mesh.next.turn.lock().await;
    let (channel, refresh) = (mesh.channel().await, again(&answer));
    let caller = tokio::spawn(async move { NetworkServiceClient::new(channel).request(refresh).await });
    while mesh.next.asked.lock().len() < 2 {
        tokio::task::yield_now().await;
    }
    caller.abort();
    *mesh.to.lock() = mesh.other.0.clone();
    mesh.ask(again(&answer)).await.unwrap();
    assert_eq!(*mesh.other.1.calls.lock(), ["request"]);
}

#[tokio::test]
async fn what_falls_before_its_answer_is_there_is_down() {
    let mesh = Mesh::start().await;
    let first = mesh.ask(request()).await.unwrap();
    let first = path::segments(&first)[1].id.clone();
    while mesh.next.streams.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    let turn = mesh.next.turn.lock().await;
    let mut another = request();
    let conn = another.connection.as_mut().unwrap();
    conn.id = "nsc-1".into();
    path::current_mut(conn).unwrap().id = "nsc-1".into();
    let (answer, ()) = tokio::join!(mesh.ask(another), async {
        while mesh.next.asked.lock().len() < 2 {
            tokio::task::yield_now().await;
        }
        // One after the other on one stream: when the first connection has fallen, the second's fall has been read too.
        let fell = |mut theirs: Connection| {
            path::step(&mut theirs, "nse", nsm_mesh::chain::new_id).unwrap();
            mesh.next.tell(Some(Ok(ConnectionEvent {
                r#type: ConnectionEventType::Delete.into(),
                connections: [("any".to_owned(), theirs)].into(),
            })));
        };
        fell(mesh.next.asked.lock()[1].connection.clone().unwrap());
        fell(mesh.next.asked.lock()[0].connection.clone().unwrap());
        while mesh.hub.get(&first).unwrap().0.state() != State::Down {
            tokio::task::yield_now().await;
        }
        drop(turn);
    });
    let second = &path::segments(&answer.unwrap())[1].id.clone();
    assert_eq!(mesh.hub.get(second).unwrap().0.state(), State::Down);
}

/// A request that a client has made to `near`, and `near` makes to the hop: the client's token is what `signer` made of
/// it, and comes with this certificate.
fn handed_on(signer: &Identity, chain: Option<&Identity>) -> NetworkServiceRequest {
    let near = "spiffe://test.lab/near".parse().unwrap();
    let lifetime = Duration::from_secs(600);
    let token = token::mint(signer.svid(), Some(&near), None, lifetime, SystemTime::now()).unwrap();
    let mut request = request();
    let conn = request.connection.as_mut().unwrap();
    path::step(conn, "near", nsm_mesh::chain::new_id).unwrap();
    let client = &mut conn.path.as_mut().unwrap().path_segments[0];
    token.jwt().clone_into(&mut client.token);
    client.expires = Some(path::to_timestamp(token.expires()));
    client.chain =
        chain.into_iter().flat_map(|c| c.svid().chain()).map(|der| der.as_ref().to_vec()).collect();
    request
}

#[tokio::test]
async fn what_a_hop_behind_our_neighbour_did_not_sign_is_refused() {
    let mesh = Mesh::start().await;
    let near = mesh.channel_of("near").await;
    let ask = async |channel: &nsm_transport::Connection, request| {
        NetworkServiceClient::new(channel.clone()).request(request).await.map(Response::into_inner)
    };
    let forger = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
    let (client, forged) = (mesh.identity("nsc"), identity(&forger, "nsc"));
    let bad = [
        ("another CA's client", handed_on(&forged, Some(&forged)), "not accepted"),
        ("another key", handed_on(&forged, Some(&client)), "has not signed it"),
        ("another key, the client being known", handed_on(&forged, Some(&client)), "has not signed it"),
    ];
    for (what, request, why) in bad.clone() {
        let status = ask(&near, request).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{what}: {status}");
        assert!(status.message().contains(why), "{what}: {status}");
    }
    assert!(mesh.next.asked.lock().is_empty(), "nobody was asked");
    // Its own key, with its certificate; then by the hash alone; and with nothing, as from upstream's hops.
    let mut by_hash = handed_on(&client, None);
    client
        .svid()
        .leaf()
        .fingerprint()
        .as_slice()
        .clone_into(&mut by_hash.connection.as_mut().unwrap().path.as_mut().unwrap().path_segments[0].signer);
    let mut forged_by_hash = by_hash.clone();
    let segment =
        |request: &NetworkServiceRequest| path::segments(request.connection.as_ref().unwrap())[0].clone();
    segment(&handed_on(&forged, None)).token.clone_into(
        &mut forged_by_hash.connection.as_mut().unwrap().path.as_mut().unwrap().path_segments[0].token,
    );
    ask(&near, handed_on(&client, Some(&client))).await.unwrap();
    ask(&near, by_hash).await.unwrap();
    ask(&near, handed_on(&forged, None)).await.unwrap();
    assert!(ask(&near, forged_by_hash).await.unwrap_err().message().contains("has not signed it"));
    // What is handed on of somebody else says nothing of who is named: a hop of upstream's keeps what it does not know.
    ask(&near, handed_on(&mesh.identity("other"), Some(&client))).await.unwrap();

    // Where the check is left out all pass, and where every hop has to be known the unknown are refused.
    let without = Mesh::with(Policies { without: [Check::HopsSigned].into(), ..Policies::default() }).await;
    let channel = without.channel_of("near").await;
    for (what, request, _) in bad {
        ask(&channel, request).await.unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    let all = Mesh::with(Policies { all_hops_signed: true, ..Policies::default() }).await;
    let (channel, client) = (all.channel_of("near").await, all.identity("nsc"));
    let status = ask(&channel, handed_on(&client, None)).await.unwrap_err();
    assert!(status.message().contains("nobody has handed on the certificate"), "{status}");
    ask(&channel, handed_on(&client, Some(&client))).await.unwrap();
    // Who asks himself needs no certificate beside that of his connection.
    all.ask(request()).await.unwrap();
}

#[tokio::test]
async fn certificates_are_handed_on_until_they_are_known() {
    let mesh = Mesh::start().await;
    let near = mesh.channel_of("near").await;
    let client = mesh.identity("nsc");
    let hash = |identity: &Identity| identity.svid().leaf().fingerprint().to_vec();
    let handed = |nth: usize| {
        let asked = mesh.next.asked.lock()[nth].clone();
        let segments = path::segments(asked.connection.as_ref().unwrap()).to_vec();
        let signers: Vec<_> = segments.iter().map(|segment| segment.signer.clone()).collect();
        (segments.iter().map(|segment| segment.chain.len()).collect::<Vec<_>>(), signers)
    };
    let ask = async || {
        let request = handed_on(&client, Some(&client));
        NetworkServiceClient::new(near.clone()).request(request).await.unwrap().into_inner()
    };
    // To a hop that does not understand them, as upstream's, always: others may be behind it.
    for nth in 0..2 {
        let answer = ask().await;
        let (chains, signers) = handed(nth);
        assert_eq!((chains, &signers[0]), (vec![1, 0, 1], &hash(&client)), "the client's and the hop's own");
        assert_eq!(path::segments(&answer)[3].signer, Vec::<u8>::new());
    }
    // A hop that names itself has understood them.
    let signed = hash(&mesh.nse);
    mesh.next.answers(move |conn| {
        let mut own = conn.path.as_ref().unwrap().path_segments.last().unwrap().clone();
        signed.clone_into(&mut own.signer);
        *conn.path.as_mut().unwrap().path_segments.last_mut().unwrap() = own;
    });
    ask().await;
    assert_eq!(handed(2).0, [1, 0, 1], "not known yet");
    ask().await;
    let (chains, signers) = handed(3);
    assert_eq!(chains, [0, 0, 0], "it has them");
    assert_eq!((&signers[0], signers[2].len()), (&hash(&client), 32), "by hash");
}

/// An edge client checks everybody's signature on the answer, as far as certificates came.
#[tokio::test]
async fn what_a_hop_behind_our_neighbour_did_not_sign_is_no_answer() {
    let mesh = Mesh::start().await;
    let pool = Pool::new(Source::fixed(mesh.identity("nsc")), PoolConfig::default());
    let edge = chain![
        To(Arc::new(Mutex::new(mesh.url.clone().into())), Arc::default(), Arc::default()),
        Dial::new(pool, "nsc", Arc::default(), PATIENCE).checking_answers(),
    ];
    let edge = Connections::asking("nsc", edge, Arc::new(Metrics::default()));
    let forger = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
    let nse = identity(&mesh.authority, "nse");
    let cases = [(nse.clone(), None), (identity(&forger, "nse"), Some("has not signed it"))];
    for (signer, error) in cases {
        let manager = "spiffe://test.lab/mgr".parse().unwrap();
        let lifetime = Duration::from_secs(600);
        let token = token::mint(signer.svid(), Some(&manager), None, lifetime, SystemTime::now()).unwrap();
        let chain: Vec<_> = nse.svid().chain().iter().map(|der| der.as_ref().to_vec()).collect();
        mesh.next.answers(move |conn| {
            let own = conn.path.as_mut().unwrap().path_segments.last_mut().unwrap();
            token.jwt().clone_into(&mut own.token);
            own.chain.clone_from(&chain);
        });
        let answer = edge.request(nsm_mesh::Call::default(), request()).await;
        match (answer, error) {
            (Ok(answer), None) => {
                let segments = path::segments(&answer.connection);
                assert!(segments.iter().all(|s| s.signer.len() == 32 && s.chain.is_empty()), "{segments:?}");
            }
            (Err(error), Some(why)) => assert!(error.to_string().contains(why), "{error}"),
            (answer, error) => panic!("{answer:?} {error:?}"),
        }
    }
}

#[tokio::test]
async fn who_does_not_read_is_told_the_last_and_not_buffered_for() {
    const EVENTS: usize = 5_000;
    let mesh = Mesh::start().await;
    let mut events = mesh.watch().await;
    events.next().await.unwrap().unwrap();
    let mut conn = mesh.ask(request()).await.unwrap();
    let own = path::segments(&conn)[1].id.clone();
    conn.id.clone_from(&own);
    conn.path.as_mut().unwrap().index = 1;
    conn.labels = map(&[("large", &"x".repeat(4000))]);
    let caller: nsm_identity::SpiffeId = "spiffe://test.lab/nsc".parse().unwrap();
    for i in 0..EVENTS {
        conn.labels.insert("i".into(), i.to_string());
        mesh.hub.update(conn.clone(), Some(caller.clone()));
        if i % 64 == 0 {
            // Whoever reads would have the time.
            tokio::task::yield_now().await;
        }
    }
    let mut seen = 0;
    loop {
        let event = events.next().await.unwrap().unwrap();
        seen += 1;
        if event.connections[&own].labels.get("i") == Some(&(EVENTS - 1).to_string()) {
            break;
        }
    }
    assert!(seen < EVENTS / 2, "{seen} events were kept for somebody who did not read");
}
