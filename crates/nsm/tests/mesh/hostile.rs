//! Peers that mean harm or are broken, with a valid identity, against every role that serves: each field of each
//! message mangled, and tokens that prove nothing. Whatever comes, a status goes back, the process lives, its memory
//! stays bounded, and nothing is left.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use nsm_api::pb::{
    connection::{Connection, MonitorScopeSelector, PathSegment},
    connectioncontext::{
        ConnectionContext, DnsConfig, DnsContext, EthernetContext, IpContext, IpNeighbor, PolicyRoute, Route,
    },
    introspect::{Item, Kind, LogLevel, Query, item::What},
    ipam::{PrefixRequest, Type},
    networkservice::NetworkServiceRequest,
    registry::{
        Destination, Match, NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
        NetworkServiceLabels, NetworkServiceQuery,
    },
};
use nsm_hostile::{Mangled, Schema};
use nsm_identity::{Token, ca::Authority};
use nsm_lab::{
    Plan,
    plan::{Paths, PodEntry},
};
use prost::Message;
use rand::{SeedableRng as _, rngs::StdRng};
use rustix::process::Signal;
use serde_json::json;
use tonic::{Code, Status};

use crate::{
    harness::{Mesh, eventually},
    raw::{self, Raw, file, good, in_runtime, set_inode},
};

/// Pod `m` has the manager's identity: the forwarder listens to nobody else.
const PODS: &str = "\
- {name: a, node: node1}
- {name: m, node: node1}
- {name: gw, node: node1, endpoint: {services: [plain], cidrPrefix: [172.16.1.0/24]}}
";
const REQUEST: &str = "/networkservice.NetworkService/Request";
const CLOSE: &str = "/networkservice.NetworkService/Close";
const MONITOR: &str = "/connection.MonitorConnection/MonitorConnections";
const PREFIXES: &str = "/ipam.IPAM/ManagePrefixes";
const LOOK: &str = "/nsm.introspect.v1.Introspect/Look";
const SET_LOG_LEVEL: &str = "/nsm.introspect.v1.Introspect/SetLogLevel";
const SVID: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
const BUNDLES: &str = "/SpiffeWorkloadAPI/FetchX509Bundles";
/// Every role has these beside its own; they are tonic's, and so are their `.proto` files. Of reflection's, which has one
/// RPC that looks up names in a table, nothing is mangled.
const HEALTH: [&str; 2] = ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"];
const SERVICES: &str = "/registry.NetworkServiceRegistry/";
const ENDPOINTS: &str = "/registry.NetworkServiceEndpointRegistry/";
/// Roles that serve, where they listen, whom the test has to be, and where they show their metrics.
const ROLES: [(&str, &str, &str, &str, u16); 4] = [
    ("node1/manager", "nsm.io.sock", "a", "node1", 9101),
    ("node1/forwarder", "forwarder.sock", "m", "node1", 9102),
    ("gw", "gw.sock", "a", "gw", 9103),
    ("registry", "registry.socket", "a", "node1", 9104),
];
/// Mangled messages of each kind that each role gets, and as many of the kind where chance decides.
const OF_A_KIND: usize = 160;
const AT_RANDOM: usize = 40;
/// What a process may have more when all is over: buffers that its allocator keeps.
const GROWTH_KIB: u64 = 64 * 1024;

fn up(test: &str) -> Option<Mesh> {
    Mesh::up_with(test, PODS, |plan: &mut Plan| {
        let node = plan.paths().node("node1");
        for process in &mut plan.processes {
            if process.name == "registry" {
                let at = process.args.iter().position(|arg| arg == "--listen-on").expect("it listens") + 1;
                process.args[at] += &format!(",unix://{}", node.join("registry.socket").display());
            }
            if let Some((.., port)) = ROLES.iter().find(|(name, ..)| *name == process.name) {
                let address = format!("127.0.0.1:{port}");
                process.env.insert("NSM_PROMETHEUS_LISTEN_ON".into(), address);
            }
        }
        let manager = format!("spiffe://{}.lab/node1/manager", plan.lab);
        plan.pods.retain(|entry| entry.pod != "m");
        plan.pods.push(PodEntry { pod: "m".into(), node: "node1".into(), spiffe_id: manager });
    })
}

#[test]
fn every_role_survives_every_field_mangled() {
    let Some(mesh) = up("every_role_survives_every_field_mangled") else { return };
    // Pools, allocators and caches are warm before memory is measured.
    mesh.warm(&["a"]);
    mesh.start("ipam", "a", &["ipam", "--listen-on", &mesh.url("ipam.sock"), "--prefix", "172.16.0.0/16"]);
    mesh.ready(&["ipam"]);
    let names = ["identity", "registry", "node1/manager", "node1/forwarder", "gw", "ipam"];
    let before = names.map(|name| (name, mesh.pid(name), rss_kib(&mesh, name)));
    for (name, socket, pod, ..) in ROLES {
        mesh.inside(pod, &format!("mangle {socket}"));
        assert_eq!(
            mesh.pid(name),
            before.iter().find(|(n, ..)| *n == name).expect("a role").1,
            "{name} lives"
        );
    }
    for job in ["mangle ipam.sock", "mangle introspect", "mangle identity.sock"] {
        mesh.inside("a", job);
    }
    for (name, pid, kib) in before {
        assert_eq!(mesh.pid(name), pid, "{name} lives");
        let now = rss_kib(&mesh, name);
        assert!(now < kib + GROWTH_KIB, "{name} had {kib} KiB and has {now} KiB");
    }
    for (name, _, _, namespace, port) in ROLES {
        let metrics = metrics(&mesh, namespace, port);
        assert!(metrics.contains("nsm_refusals_total{"), "{name} has counted nothing: {metrics}");
        assert!(!metrics.contains("nsm_panics_total") || metrics.contains("nsm_panics_total 0"), "{name}");
    }
    mesh.end("ipam", Signal::TERM);
    mesh.nothing_is_left(&["a", "m", "gw"]);
    mesh.warm(&["a"]);
}

/// Whoever adds an RPC adds a good message of it here, or says why not.
#[test]
fn every_rpc_of_the_proto_files_is_mangled() {
    let crates = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut rpcs = BTreeSet::new();
    for entry in fs::read_dir(crates).expect("crates").flatten() {
        let Ok(files) = fs::read_dir(entry.path().join("proto")) else { continue };
        for file in files.flatten() {
            let text = fs::read_to_string(file.path()).expect("a .proto file");
            let (mut package, mut service) = (String::new(), String::new());
            for line in text.lines().map(str::trim_start) {
                let word = line.split([' ', '(', ';', '{']).nth(1).unwrap_or_default();
                match line.split(' ').next() {
                    Some("package") => package = format!("{word}."),
                    Some("service") => word.clone_into(&mut service),
                    Some("rpc") => _ = rpcs.insert(format!("/{package}{service}/{word}")),
                    _ => {}
                }
            }
        }
    }
    let sockets = ROLES.iter().map(|(_, socket, ..)| *socket).chain(["ipam.sock", "introspect"]);
    let methods = sockets.flat_map(messages).map(|(method, ..)| method);
    let mangled = methods.filter(|method| !HEALTH.contains(method)).chain([SVID, BUNDLES]);
    assert_eq!(mangled.map(str::to_owned).collect::<BTreeSet<_>>(), rpcs);
    assert!(rpcs.len() >= 14, "{rpcs:?}");
}

#[test]
fn every_role_refuses_and_counts_tokens_that_prove_nothing() {
    let Some(mesh) = up("every_role_refuses_and_counts_tokens_that_prove_nothing") else { return };
    for (name, socket, pod, namespace, port) in ROLES {
        mesh.inside(pod, &format!("forge {socket}"));
        let page = metrics(&mesh, namespace, port);
        let reasons =
            ["peer_signed", "own_name", "tokens_chained", "tokens_expired", "trust_domain", "one_audience"];
        // Registrations have no place for the certificates of other hops.
        let of_hops = (name != "registry").then_some("hops_signed");
        for reason in reasons.into_iter().chain(of_hops) {
            let count = page.lines().any(|line| {
                line.starts_with("nsm_refusals_total{") && line.contains(&format!("reason=\"{reason}\""))
            });
            assert!(count, "{name} has not counted {reason}: {page}");
        }
        assert!(page.contains("reason=\"handshake\""), "{name} has not counted the stranger: {page}");
        let id = if pod == "m" { "node1/manager" } else { "pod/a" };
        let (log, who) = (mesh.log(name), format!("{id} (unix:pid="));
        assert!(log.contains(&who), "{name} does not say whom it refused ({who}): {log}");
    }
    mesh.nothing_is_left(&["a", "m", "gw"]);
}

/// The programs at their most talkative: no JWT and no key may be in what they say.
#[test]
fn no_log_of_a_mesh_shows_a_token_even_at_trace_level() {
    let test = "no_log_of_a_mesh_shows_a_token_even_at_trace_level";
    let mesh = Mesh::up_with(test, PODS, |plan: &mut Plan| {
        for process in &mut plan.processes {
            process.env.insert("NSM_LOG_LEVEL".into(), "trace".into());
        }
    });
    let Some(mesh) = mesh else { return };
    mesh.client("nsc", "a", "kernel://plain/nsm0", &["--log-level", "trace"]);
    mesh.ready(&["nsc"]);
    mesh.inside("a", "forge nsm.io.sock");
    mesh.end("nsc", Signal::TERM);
    mesh.lost("a", "nsm0");
    let mut traced = 0;
    for entry in fs::read_dir(mesh.lab.plan.paths().root.join("logs")).expect("logs").flatten() {
        let log = fs::read_to_string(entry.path()).unwrap_or_default();
        traced += usize::from(log.contains("TRACE"));
        // The beginning of every JWT (`{"alg"`), of a PKCS#8 key in base64, and of one in PEM.
        for secret in ["eyJhbGci", "MIGHAgEAMBMGByqGSM49", "PRIVATE KEY"] {
            let shown = log.lines().find(|line| line.contains(secret));
            assert_eq!(shown, None, "{} shows a secret", entry.path().display());
        }
    }
    assert!(traced >= 6, "all processes trace: {traced}");
}

fn rss_kib(mesh: &Mesh, name: &str) -> u64 {
    let path = format!("/proc/{}/status", mesh.pid(name).as_raw_nonzero());
    let status = fs::read_to_string(path).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn metrics(mesh: &Mesh, namespace: &str, port: u16) -> String {
    let namespace = mesh.lab.namespace(namespace).unwrap_or_else(|e| panic!("{}", e.chain()));
    eventually("metrics", || {
        let get = || {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).map(|_| answer)
        };
        namespace.run(get).map_err(|e| e.to_string())?.map_err(|e: std::io::Error| e.to_string())
    })
}

/// Sends one role everything that it serves, mangled.
pub(crate) fn mangle(lab: &str, socket: &str) {
    in_runtime(async {
        match socket {
            "identity.sock" => return mangle_identity(lab).await,
            "introspect" => return mangle_introspection(lab).await,
            _ => {}
        }
        let raw = Raw::connect(lab, socket).await;
        let mut sent = 0;
        for (method, mangled) in mangled(socket) {
            let answer = send(&raw, method, mangled.bytes).await;
            sent += 1;
            check(&mangled.what, &answer);
            match answer {
                Ok(bytes) if method == REQUEST => undo(&raw, CLOSE, bytes).await,
                Ok(bytes) if method.ends_with("/Register") => {
                    undo(&raw, &method.replace("/Register", "/Unregister"), bytes).await;
                }
                _ => {}
            }
        }
        println!("{socket}: {sent} mangled messages");
    });
}

/// What a role is sent: evenly over all fields and changes, beginning elsewhere for each role, and some at random.
fn mangled(socket: &str) -> Vec<(&'static str, Mangled)> {
    let schema = Schema::new(nsm_api::DESCRIPTORS).expect("descriptors");
    let mut chance = StdRng::seed_from_u64(4);
    let mut chosen = Vec::new();
    for (method, message, good) in messages(socket) {
        let all: Vec<_> = schema.mangled(message, &good).collect();
        let step = (all.len() / OF_A_KIND).max(1);
        chosen.extend(all.into_iter().skip(socket.len() % step).step_by(step).map(|m| (method, m)));
        chosen.extend((0..AT_RANDOM).map(|_| (method, schema.at_random(message, &good, &mut chance))));
    }
    chosen
}

/// The owner's own sockets are served without TLS, by every process. What each logs is as before in the end, and none has
/// panicked, whatever it was sent there or elsewhere.
async fn mangle_introspection(lab: &str) {
    let mut looked_at = 0;
    for entry in fs::read_dir(Paths::new(lab).introspect()).expect("sockets").flatten() {
        let socket = format!("../introspect/{}", entry.file_name().to_string_lossy());
        let raw = raw::plain(lab, &socket).await;
        let deadline = || vec![("grpc-timeout", "2S".to_owned())];
        for (method, mangled) in mangled("introspect") {
            let answer = raw::exchange(&raw, method, mangled.bytes, deadline()).await;
            check(&format!("{socket}: {}", mangled.what), &answer);
        }
        let of_the_start = LogLevel::default().encode_to_vec();
        raw::exchange(&raw, SET_LOG_LEVEL, of_the_start, deadline()).await.expect("that of the start");
        let query = Query { kinds: vec![Kind::Process.into()], verify: false };
        let item = raw::exchange(&raw, LOOK, query.encode_to_vec(), deadline()).await.expect("an item");
        match Item::decode(&item[..]).expect("an item").what {
            Some(What::Process(process)) => assert_eq!(process.panics, 0, "{socket}"),
            other => panic!("{socket}: {other:?}"),
        }
        looked_at += 1;
    }
    assert!(looked_at >= 6, "{looked_at} processes can be looked at");
}

/// The Workload API is served without TLS, and its requests are empty: what can be wrong is everything around them.
async fn mangle_identity(lab: &str) {
    let empty = vec![
        ("a field that it has not", vec![0x0a, 0x03, b'a', b'b', b'c']),
        ("a length that lies", vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]),
        ("an endless number", vec![0xff; 20]),
        ("half a megabyte", [vec![0x0a, 0x80, 0x80, 0x20], vec![0; 512 * 1024]].concat()),
        ("5 MiB", vec![0; 5 * 1024 * 1024]),
    ];
    for header in [None, Some("true"), Some("false"), Some("")] {
        for (what, bytes) in &empty {
            for method in [SVID, BUNDLES, "/SpiffeWorkloadAPI/FetchJWTSVID"] {
                let raw = raw::plain(lab, "identity.sock").await;
                let headers = header.map(|value| ("workload.spiffe.io", value.to_owned()));
                let answer = raw::exchange(&raw, method, bytes.clone(), headers.into_iter().collect()).await;
                check(what, &answer);
            }
        }
    }
}

/// A status that a caller of gRPC knows, and not the end of the connection.
fn check(what: &str, answer: &Result<Vec<u8>, Status>) {
    let Err(status) = answer else { return };
    let text = status.message();
    assert!(!text.contains("panic"), "{what}: {text}");
    assert!(
        !["transport error", "connection closed", "broken pipe", "h2 protocol"]
            .iter()
            .any(|end| text.contains(end)),
        "{what} ended the connection: {status:?}"
    );
}

/// A good message of each kind that a role takes.
fn messages(socket: &str) -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let health = || {
        // A message of one text, as that of health is.
        let service = LogLevel { filter: "networkservice.NetworkService".into() }.encode_to_vec();
        HEALTH.map(|method| (method, "nsm.introspect.v1.LogLevel", service.clone()))
    };
    let query = Query { kinds: vec![Kind::Process.into(), Kind::Wire.into()], verify: true };
    let level = LogLevel { filter: "info,nsm_mesh=debug".into() };
    let prefix = PrefixRequest {
        r#type: Type::Allocate.into(),
        prefix: "172.16.1.0/24".into(),
        exclude_prefixes: vec!["172.16.2.0/24".into()],
    };
    let mut all = vec![(LOOK, "nsm.introspect.v1.Query", query.encode_to_vec())];
    all.extend(health());
    match socket {
        "introspect" => all.push((SET_LOG_LEVEL, "nsm.introspect.v1.LogLevel", level.encode_to_vec())),
        "ipam.sock" => all.push((PREFIXES, "ipam.PrefixRequest", prefix.encode_to_vec())),
        "registry.socket" => all.extend(registry_messages()),
        _ => all.extend(connection_messages()),
    }
    if socket == "nsm.io.sock" {
        all.extend(registry_messages());
    }
    all
}

fn connection_messages() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let (url, _) = file("/proc/self/ns/net");
    let mut request = good("raw-0", "nsm0", url);
    // A namespace that never comes would be waited for, each time.
    set_inode(&mut request, "");
    let conn = request.connection.as_mut().expect("good");
    conn.labels.insert("app".into(), "x".into());
    let route = || Route { unknown: None, prefix: "10.0.0.0/8".into(), next_hop: "172.16.1.0".into() };
    let ip_context = IpContext {
        src_ip_addrs: vec!["172.16.1.1/32".into()],
        dst_ip_addrs: vec!["172.16.1.0/32".into()],
        src_routes: vec![route()],
        dst_routes: vec![route()],
        excluded_prefixes: vec!["10.96.0.0/12".into()],
        ip_neighbors: vec![IpNeighbor {
            unknown: None,
            ip: "172.16.1.0".into(),
            hardware_address: "02:00:00:00:00:01".into(),
        }],
        policies: vec![PolicyRoute {
            from: "172.16.1.1/32".into(),
            routes: vec![route()],
            ..PolicyRoute::default()
        }],
        ..IpContext::default()
    };
    conn.context = Some(ConnectionContext {
        ip_context: Some(ip_context),
        dns_context: Some(DnsContext {
            configs: vec![DnsConfig {
                unknown: None,
                dns_server_ips: vec!["10.0.0.1".into()],
                search_domains: vec!["x".into()],
            }],
            ..DnsContext::default()
        }),
        ethernet_context: Some(EthernetContext {
            src_mac: "02:00:00:00:00:01".into(),
            ..EthernetContext::default()
        }),
        mtu: 1400,
        ..ConnectionContext::default()
    });
    let close = conn.encode_to_vec();
    let path_segments = conn.path.clone().expect("good").path_segments;
    let selector = MonitorScopeSelector { path_segments, network_services: vec!["plain".into()] };
    vec![
        (REQUEST, "networkservice.NetworkServiceRequest", request.encode_to_vec()),
        (CLOSE, "connection.Connection", close),
        (MONITOR, "connection.MonitorScopeSelector", selector.encode_to_vec()),
    ]
}

fn registry_messages() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let labels = || [("app".to_owned(), "x".to_owned())].into();
    let service = NetworkService {
        name: "mangled".into(),
        payload: "IP".into(),
        matches: vec![Match {
            source_selector: labels(),
            routes: vec![Destination { unknown: None, destination_selector: labels(), weight: 1 }],
            ..Match::default()
        }],
        path_ids: vec!["x".into()],
        ..NetworkService::default()
    };
    let endpoint = NetworkServiceEndpoint {
        name: "mangled-nse".into(),
        network_service_names: vec!["mangled".into()],
        network_service_labels: [(
            "mangled".to_owned(),
            NetworkServiceLabels { unknown: None, labels: labels() },
        )]
        .into(),
        url: "tcp://127.0.0.1:1".into(),
        ..NetworkServiceEndpoint::default()
    };
    let services = NetworkServiceQuery { network_service: Some(service.clone()), watch: false };
    let endpoints =
        NetworkServiceEndpointQuery { network_service_endpoint: Some(endpoint.clone()), watch: false };
    let (of_service, of_endpoint) = ("registry.NetworkService", "registry.NetworkServiceEndpoint");
    vec![
        ("/registry.NetworkServiceRegistry/Register", of_service, service.encode_to_vec()),
        ("/registry.NetworkServiceRegistry/Find", "registry.NetworkServiceQuery", services.encode_to_vec()),
        ("/registry.NetworkServiceRegistry/Unregister", of_service, service.encode_to_vec()),
        ("/registry.NetworkServiceEndpointRegistry/Register", of_endpoint, endpoint.encode_to_vec()),
        (
            "/registry.NetworkServiceEndpointRegistry/Find",
            "registry.NetworkServiceEndpointQuery",
            endpoints.encode_to_vec(),
        ),
        ("/registry.NetworkServiceEndpointRegistry/Unregister", of_endpoint, endpoint.encode_to_vec()),
    ]
}

async fn send(raw: &Raw, method: &str, bytes: Vec<u8>) -> Result<Vec<u8>, Status> {
    let path = json!({"Index": 0, "PathSegments": null}).to_string();
    raw.bytes(method, bytes, Some(raw.token()), Some(path)).await
}

async fn undo(raw: &Raw, method: &str, bytes: Vec<u8>) {
    // What it was may be gone already: a service that the operator owns stays.
    let _ = send(raw, method, bytes).await;
}

/// Sends one role calls whose tokens prove nothing; each is refused.
pub(crate) fn forge(lab: &str, socket: &str) {
    in_runtime(async {
        let now = SystemTime::now();
        let raw = Raw::connect(lab, socket).await;
        let (me, peer, own) = (raw.identity.id().clone(), raw.peer.clone(), raw.identity.svid());
        let forger = Authority::new(me.trust_domain(), now).expect("a CA");
        let hour = Duration::from_secs(3600);
        let forged = forger.identity(&me, hour, now).expect("an identity");
        let other = format!("{}/pod/b", me.trust_domain().id()).parse().expect("an ID");
        let posing = raw::sign(&raw.identity, &json!({"sub": other, "aud": [peer], "exp": 4_000_000_000u64}));
        let many =
            raw::sign(&raw.identity, &json!({"sub": me, "aud": [peer, other], "exp": 4_000_000_000u64}));
        let elsewhere = Authority::new("elsewhere.example".parse().expect("a domain"), now).expect("a CA");
        let foreign_id = "spiffe://elsewhere.example/client".parse().expect("an ID");
        let foreign = elsewhere.identity(&foreign_id, hour, now).expect("an identity");
        let received = |jwt: String| Some(Token::received(jwt, now + hour));
        let before = raw.token_of(foreign.svid(), &me, now).jwt().to_owned();
        let unsigned = raw.token_of(forged.svid(), &me, now).jwt().to_owned();
        let cases: Vec<(&str, Option<Token>, Vec<String>)> = vec![
            ("another key's signature", Some(raw.token_of(forged.svid(), &peer, now)), vec![]),
            ("in another's name", received(posing), vec![]),
            ("for another", Some(raw.token_of(own, &other, now)), vec![]),
            ("for many", received(many), vec![]),
            ("of yesterday", Some(raw.token_of(own, &peer, now - hour - Duration::from_secs(90))), vec![]),
            ("no token", None, vec![]),
            ("nonsense", received("a.b.c".into()), vec![]),
            ("a hop of a strange domain before us", Some(raw.token()), vec![before]),
            ("a cut path", Some(raw.token()), vec!["cut".into()]),
            ("a hop before us that did not sign", Some(raw.token()), vec![unsigned]),
        ];
        for (what, token, before) in cases {
            if socket == "registry.socket" && what == "a hop before us that did not sign" {
                continue;
            }
            let (method, bytes, path) = if socket == "registry.socket" {
                let path = (what != "a cut path").then(|| {
                    let own = before.iter().map(|token| json!({"token": token}));
                    let segments: Vec<_> = own.chain([json!({"token": ""})]).collect();
                    json!({"Index": segments.len() - 1, "PathSegments": segments}).to_string()
                });
                let service = NetworkService { name: "forged".into(), ..NetworkService::default() };
                (format!("{SERVICES}Register"), service.encode_to_vec(), path)
            } else {
                let chain = own.chain().iter().map(|der| der.as_ref().to_vec()).collect();
                (REQUEST.to_owned(), with_path(what, &before, chain).encode_to_vec(), None)
            };
            let status = raw.bytes(&method, bytes, token, path).await.expect_err(what);
            assert_eq!(status.code(), Code::PermissionDenied, "{what}: {}", status.message());
            let text = status.message();
            assert!(text.contains("no sufficient privileges") && !text.contains("eyJ"), "{what}: {text}");
        }
        // Whoever is of another domain does not even come in.
        let stranger = Raw::connect_as(lab, socket, foreign.into()).await;
        assert!(stranger.is_none(), "{socket} let a stranger in");
        let impostor = Raw::connect_as(lab, socket, forged.into()).await;
        assert!(impostor.is_none(), "{socket} let an impostor in");
        let _ = ENDPOINTS;
    });
}

fn with_path(what: &str, before: &[String], chain: Vec<Vec<u8>>) -> NetworkServiceRequest {
    let (url, _) = file("/proc/self/ns/net");
    let mut request = good("raw-0", "nsm0", url);
    set_inode(&mut request, "");
    let conn: &mut Connection = request.connection.as_mut().expect("good");
    if what == "a cut path" {
        conn.path = None;
        return request;
    }
    let path = conn.path.as_mut().expect("good");
    for token in before {
        let segment = PathSegment {
            name: "before".into(),
            id: "before-0".into(),
            token: token.clone(),
            chain: chain.clone(),
            ..PathSegment::default()
        };
        path.path_segments.insert(0, segment);
        path.index += 1;
    }
    request
}
