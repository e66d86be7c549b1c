//! Bad input of healing: what a mesh is told, or finds, that is not so, while it mends itself; and what changes while a
//! connection lives.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use nsm_api::pb::{
    connection::Connection,
    connectioncontext::{ConnectionContext, IpContext},
    registry::{
        NetworkServiceEndpoint,
        network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
    },
};
use nsm_identity::Source;
use nsm_lab::plan::Paths;
use nsm_registry::{Client, ClientConfig};
use nsm_transport::{DialUrl, Pool, PoolConfig};
use rustix::process::Signal;

use crate::{
    client::{has_program, run_in},
    harness::{self, Mesh, NODES, PATIENCE, eventually, links},
    raw::{Raw, file, good, in_runtime},
    state::{restart_traced, trace_of, written_in},
};

/// Pods without programs: tests start their own.
const BARE: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: x, node: node1}
- {name: y, node: node1}
";
const GATEWAY: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: gw, node: node1, endpoint: {services: [plain], cidrPrefix: [172.16.1.2/31]}}
";
/// A dead wire is noticed soon, and a busy machine does not make a living one look dead.
const PROBED: &[&str] = &["--liveness-check-interval", "50ms", "--liveness-check-timeout", "1s"];
/// Tokens that live so long are refreshed after a second.
const SHORT: &[&str] = &["--max-token-lifetime", "6s"];

/// Endpoints that nobody runs: at one place somebody refuses, at the other nobody is.
const GHOSTS: [(&str, &str); 2] =
    [("a-ghost-that-refuses", "tcp://127.0.0.1:9"), ("a-ghost-that-is-silent", "tcp://10.255.0.99:5001")];

#[test]
fn a_registry_that_invents_endpoints_costs_a_try_each() {
    let Some(mesh) = Mesh::up("a_registry_that_invents_endpoints_costs_a_try_each", BARE) else { return };
    for (name, prefix) in [("x", "172.16.1.2/31"), ("y", "172.16.2.2/31")] {
        mesh.endpoint(name, name, &["--service-names", "plain", "--cidr-prefix", prefix]);
    }
    mesh.ready(&["x", "y"]);
    mesh.inside("b", "ghosts");
    mesh.client("client", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["client"]);
    let (serves, other) = if mesh.links("x").is_empty() { ("y", "x") } else { ("x", "y") };
    // Healing meets the ghosts too.
    mesh.end(serves, Signal::KILL);
    mesh.lab.remove_namespace(serves).expect("delete");
    eventually("the other has the wire", || match &mesh.links(other)[..] {
        [_] => Ok(()),
        _ => Err(mesh.log("client")),
    });
    mesh.pings("a", if other == "x" { "172.16.1.2" } else { "172.16.2.2" });
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", other]);
}

/// Tells the registry of endpoints that there are not.
pub(crate) fn ghosts(lab: &str) {
    in_runtime(async {
        let url: DialUrl = harness::url(lab, "nsm.io.sock").parse().expect("a URL");
        let pool = Pool::new(Source::from_env().await.expect("an identity"), PoolConfig::default());
        let client = Client::new(pool, url, ClientConfig::default());
        for (name, url) in GHOSTS {
            let nse = NetworkServiceEndpoint {
                name: name.into(),
                url: url.into(),
                network_service_names: vec!["plain".into()],
                ..NetworkServiceEndpoint::default()
            };
            // It stays when this process ends.
            std::mem::forget(
                client.register_endpoint(nse, Duration::from_secs(10)).await.expect("registered"),
            );
        }
    });
}

/// It lives, and says again and again that there is no such endpoint; whoever serves the wire has not changed.
#[test]
fn a_registry_that_forgets_takes_no_wire_away_and_is_told_again() {
    let test = "a_registry_that_forgets_takes_no_wire_away_and_is_told_again";
    let pods = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: gw, node: node2, endpoint: {services: [plain], cidrPrefix: [172.16.1.0/24]}}
";
    let Some(mesh) = Mesh::up(test, pods) else { return };
    // Asked for after four seconds, in vain, and then again and again; its tokens outlive that.
    mesh.client("client", "a", "kernel://plain/nsm0", &["--max-token-lifetime", "20s"]);
    mesh.ready(&["client"]);
    let (near, far) = (mesh.links("a"), mesh.links("gw"));
    let pinging = mesh.flood("a", "172.16.1.0");
    mesh.inside("gw", "forget gw");
    mesh.says("client", "the wire cannot be refreshed");
    mesh.says("client", "the wire is up again");
    let row = pinging.end().expect("enter");
    assert!(row.sent > 0 && row.lost() == 0, "{row:?}\n{}", mesh.log("client"));
    assert_eq!((mesh.links("a"), mesh.links("gw")), (near, far), "{}", mesh.log("client"));
    // It knows the endpoint again, so others find it.
    mesh.client("second", "b", "kernel://plain/nsm0", &[]);
    mesh.ready(&["second"]);
    mesh.pings("b", "172.16.1.2");
    for client in ["client", "second"] {
        mesh.end(client, Signal::TERM);
    }
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

/// Ends the registration of an endpoint, in whose name we come, behind its back: through a manager that does not know it.
/// For several refreshes of a wire there is hardly ever a registration; then it is there again.
pub(crate) fn forget(lab: &str, name: &str) {
    in_runtime(async {
        let url: DialUrl = harness::url(lab, "nsm.io.sock").parse().expect("a URL");
        let pool = Pool::new(Source::from_env().await.expect("an identity"), PoolConfig::default());
        let channel = pool.get(&url, PATIENCE).await.expect("the manager is there");
        let client = Client::new(pool, url, ClientConfig::default());
        let nse = NetworkServiceEndpoint { name: name.into(), ..NetworkServiceEndpoint::default() };
        let is_known = async || !client.find_endpoints(nse.clone()).await.expect("it answers").is_empty();
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(5) {
            let mut end = tonic::Request::new(nse.clone());
            let path = r#"{"Index":0,"PathSegments":null}"#.parse().expect("ASCII");
            end.metadata_mut().insert("path", path);
            let mut registry = NetworkServiceEndpointRegistryClient::new(channel.clone());
            registry.unregister(end).await.expect("it is ended");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let ended = Instant::now();
        while !is_known().await {
            assert!(ended.elapsed() < PATIENCE, "it registers again");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
}

#[test]
fn a_probe_that_somebody_else_answers_is_not_answered() {
    let test = "a_probe_that_somebody_else_answers_is_not_answered";
    // The pod has the endpoint's address itself, so that whoever pings it is answered whatever becomes of the wire.
    somebody_else_answers(test, |mesh| {
        run_in(mesh, "a", "ip", &["address", "add", "172.16.1.2/32", "dev", "lo"]);
        mesh.pings("a", "172.16.1.2");
    });
}

#[test]
fn a_probe_that_another_host_answers_is_not_answered() {
    let test = "a_probe_that_another_host_answers_is_not_answered";
    // It is beside the pod, which asks it for the endpoint's address, and it knows the way back.
    somebody_else_answers(test, |mesh| {
        let ip = |pod: &str, args: &str| run_in(mesh, pod, "ip", &args.split(' ').collect::<Vec<_>>());
        let beside = format!("{}.b", mesh.lab.plan.lab);
        ip("a", &format!("link add side type veth peer name side netns {beside}"));
        for (pod, own, far) in [("a", "172.16.9.1/32", "172.16.1.2"), ("b", "172.16.1.2/32", "172.16.9.1")] {
            ip(pod, &format!("address add {own} dev side"));
            ip(pod, "link set side up");
            ip(pod, &format!("route add {far}/32 dev side table 77"));
            ip(pod, "rule add pref 77 lookup 77");
        }
        ip("b", "route add 172.16.1.3/32 dev side table 77");
        mesh.pings("a", "172.16.1.2");
    });
}

/// An endpoint becomes deaf while somebody else answers for its address: its client goes to another one.
fn somebody_else_answers(test: &str, answer: impl FnOnce(&Mesh)) {
    if !has_program(test, "nft") || !has_program(test, "ip") {
        return;
    }
    let Some(mesh) = Mesh::up(test, BARE) else { return };
    mesh.endpoint("x", "x", &["--service-names", "plain", "--cidr-prefix", "172.16.1.2/31"]);
    mesh.ready(&["x"]);
    mesh.client("client", "a", "kernel://plain/nsm0", PROBED);
    mesh.ready(&["client"]);
    mesh.endpoint("y", "y", &["--service-names", "plain", "--cidr-prefix", "172.16.2.2/31"]);
    mesh.ready(&["y"]);
    run_in(
        &mesh,
        "x",
        "nft",
        &["add table inet deaf; add chain inet deaf in { type filter hook input priority 0; policy drop; }"],
    );
    answer(&mesh);
    eventually("the other has the wire", || match (&mesh.links("x")[..], &mesh.links("y")[..]) {
        ([], [_]) => Ok(()),
        _ => Err(mesh.log("client")),
    });
    mesh.says("client", "packets do not pass");
    mesh.end("client", Signal::TERM);
    if mesh.links("b").iter().any(|link| link.name == "side") {
        run_in(&mesh, "b", "ip", &["link", "del", "side"]);
    }
    mesh.nothing_is_left(&["a", "b", "x", "y"]);
}

/// Hops are frozen: their streams of events stay open, and nobody tells that the endpoint behind them has gone.
#[test]
fn streams_that_say_nothing_hide_nothing() {
    let test = "streams_that_say_nothing_hide_nothing";
    if !has_program(test, "ip") {
        return;
    }
    let Some(mesh) = Mesh::up(test, &BARE.replace("x, node: node1", "x, node: node2")) else { return };
    mesh.endpoint("x", "x", &["--service-names", "plain", "--cidr-prefix", "172.16.1.2/31"]);
    mesh.ready(&["x"]);
    mesh.client("client", "a", "kernel://plain/nsm0", PROBED);
    mesh.ready(&["client"]);
    mesh.endpoint("y", "y", &["--service-names", "plain", "--cidr-prefix", "172.16.2.2/31"]);
    mesh.ready(&["y"]);
    let hops = ["node2/manager", "node2/forwarder"];
    hops.iter().for_each(|hop| mesh.signal(hop, Signal::STOP));
    mesh.end("x", Signal::KILL);
    run_in(&mesh, "x", "ip", &["link", "del", &mesh.links("x")[0].name]);
    eventually("the other has the wire", || match &mesh.links("y")[..] {
        [_] => Ok(()),
        _ => Err(mesh.log("client")),
    });
    mesh.pings("a", "172.16.2.2");
    let log = mesh.log("client");
    assert!(log.contains("packets do not pass") && !log.contains("the mesh says that"), "{log}");
    // What they could not be told they hear now.
    hops.iter().for_each(|hop| mesh.signal(hop, Signal::CONT));
    eventually("the one wire is all that is kept", || {
        let records = harness::records(&mesh.lab.plan.lab);
        if records.len() == 1 { Ok(()) } else { Err(format!("{records:?}")) }
    });
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "y"]);
}

#[test]
fn a_heal_that_fails_half_way_leaves_nothing_each_time_and_comes_about_when_it_can() {
    let test = "a_heal_that_fails_half_way_leaves_nothing_each_time_and_comes_about_when_it_can";
    if !has_program(test, "ip") {
        return;
    }
    let Some(mesh) = Mesh::up(test, GATEWAY) else { return };
    mesh.client("client", "a", "kernel://plain/nsm0", PROBED);
    mesh.ready(&["client"]);
    let before = mesh.asked("node1/forwarder", "gw");
    // The endpoint has given its only address and answered when the forwarder finds the name taken.
    run_in(&mesh, "a", "ip", &["link", "del", "nsm0"]);
    run_in(&mesh, "a", "ip", &["link", "add", "nsm0", "type", "veth", "peer", "name", "other"]);
    mesh.has_asked("node1/forwarder", "gw", before + 3);
    std::thread::sleep(Duration::from_secs(3));
    let tries = mesh.asked("node1/forwarder", "gw") - before;
    // Growing pauses from 50 ms on: some seven tries in three seconds, and each may ask twice.
    assert!(tries <= 20, "{tries} tries: {}", mesh.log("client"));
    eventually("nothing is left of a try", || {
        let left = (mesh.links("gw"), harness::records(&mesh.lab.plan.lab));
        if left.0.is_empty() && left.1.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
    run_in(&mesh, "a", "ip", &["link", "del", "nsm0"]);
    eventually("the wire is there", || match &mesh.links("gw")[..] {
        [_] => Ok(()),
        _ => Err(mesh.log("client")),
    });
    mesh.pings("a", "172.16.1.2");
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

/// Nobody probes, and nobody refreshes for minutes: the kernel tells of it.
#[test]
fn an_interface_that_somebody_deletes_is_made_again_without_a_request() {
    let test = "an_interface_that_somebody_deletes_is_made_again_without_a_request";
    if !has_program(test, "ip") {
        return;
    }
    let pods = "\
- {name: a, node: node1}
- {name: gw, node: node1, endpoint: {services: [plain], cidrPrefix: [172.16.1.0/24]}}
- {name: far, node: node2, endpoint: {services: [picky], labels: {app: vpn}, cidrPrefix: [172.16.2.0/24]}}
";
    let Some(mesh) = Mesh::up(test, pods) else { return };
    let unprobed = ["--liveness-check-enabled", "false"];
    mesh.client("near", "a", "kernel://plain/nsm0", &unprobed);
    mesh.client("other", "a", "kernel://picky/nsm1", &unprobed);
    mesh.ready(&["near", "other"]);
    let asked = || [mesh.asked("node1/forwarder", "gw"), mesh.asked("node2/forwarder", "far")];
    let end_of = |pod: &str| mesh.links(pod)[0].name.clone();
    let before = asked();
    for (pod, end, address) in [
        ("a", "nsm0".to_owned(), "172.16.1.0"),
        ("gw", end_of("gw"), "172.16.1.0"),
        ("a", "nsm1".to_owned(), "172.16.2.0"),
        ("far", end_of("far"), "172.16.2.0"),
    ] {
        run_in(&mesh, pod, "ip", &["link", "del", &end]);
        eventually("it is there again", || match mesh.links(pod).iter().any(|link| link.name == end) {
            true => Ok(()),
            false => Err(format!("{end} of {pod}: {:?}", mesh.links(pod))),
        });
        mesh.pings("a", address);
    }
    assert_eq!(asked(), before, "nobody was asked");
    // Somebody else has the name at once: whoever asks for the wire hears of it, and it is there when it can be.
    run_in(&mesh, "a", "ip", &["link", "del", "nsm0"]);
    run_in(&mesh, "a", "ip", &["link", "add", "nsm0", "type", "veth", "peer", "name", "theirs"]);
    mesh.says("node1/forwarder", "cannot be made again");
    run_in(&mesh, "a", "ip", &["link", "del", "nsm0"]);
    eventually("the wire is there", || match mesh.links("gw").len() {
        1 => Ok(()),
        _ => Err(mesh.log("near")),
    });
    mesh.pings("a", "172.16.1.0");
    for client in ["near", "other"] {
        mesh.end(client, Signal::TERM);
    }
    mesh.nothing_is_left(&["a", "gw", "far"]);
}

/// A name is for people: hops know each other by where they are, and connections by their ids.
#[test]
fn two_managers_of_one_name_do_not_mix_up_their_wires() {
    let test = "two_managers_of_one_name_do_not_mix_up_their_wires";
    let pods = "\
- {name: a, node: node1}
- {name: b, node: node2}
- {name: x, node: node1, endpoint: {services: [plain], labels: {app: near}, cidrPrefix: [172.16.1.0/24]}}
- {name: y, node: node2, endpoint: {services: [picky], labels: {app: vpn}, cidrPrefix: [172.16.2.0/24]}}
";
    let mesh = Mesh::up_with(test, pods, |plan| {
        for process in &mut plan.processes {
            process
                .args
                .iter_mut()
                .filter(|arg| *arg == "manager-node2")
                .for_each(|arg| *arg = "manager-node1".into());
        }
    });
    let Some(mesh) = mesh else { return };
    // One wire on each node, and one each way between them.
    let both = "kernel://plain/nsm0,kernel://picky/nsm1";
    for (client, pod) in [("left", "a"), ("right", "b")] {
        mesh.client(client, pod, both, SHORT);
    }
    mesh.ready(&["left", "right"]);
    let stand = || {
        for pod in ["a", "b"] {
            let namespace = mesh.lab.namespace(pod).expect("a pod");
            let routes = nsm_lab::network::Seen::of(&namespace).expect("read").routes;
            let far: Vec<_> = routes.iter().filter(|route| route.to.to_string().ends_with("/32")).collect();
            assert_eq!(far.len(), 2, "{routes:?}");
            far.iter().for_each(|route| mesh.pings(pod, &route.to.addr().to_string()));
        }
    };
    stand();
    let before = ["a", "b"].map(|pod| mesh.links(pod));
    for node in NODES {
        let manager = format!("{node}/manager");
        mesh.end(&manager, Signal::KILL);
        mesh.restart(&manager);
        // Longer than until the next refresh, which has to find its hops again.
        std::thread::sleep(Duration::from_secs(2));
    }
    stand();
    assert_eq!(["a", "b"].map(|pod| mesh.links(pod)), before, "{}", mesh.log("left"));
    for client in ["left", "right"] {
        mesh.end(client, Signal::TERM);
    }
    mesh.nothing_is_left(&["a", "b", "x", "y"]);
}

#[test]
fn a_store_of_yesterday_costs_a_wire_a_moment_and_leaves_nothing() {
    let test = "a_store_of_yesterday_costs_a_wire_a_moment_and_leaves_nothing";
    let Some(mesh) = Mesh::up(test, &GATEWAY.replace("172.16.1.2/31", "172.16.1.0/24")) else { return };
    let store = mesh.state_dir("node1");
    let yesterday = store.with_extension("yesterday");
    mesh.client("gone", "a", "kernel://plain/nsm0", SHORT);
    mesh.ready(&["gone"]);
    fs::create_dir(&yesterday).expect("create");
    copy(&store, &yesterday);
    let gone = crate::state::record_of(&mesh, "node1").plan.id;
    mesh.end("gone", Signal::TERM);
    mesh.no_wire_is_left(&["a", "gw"]);
    mesh.client("client", "b", "kernel://plain/nsm0", SHORT);
    mesh.ready(&["client"]);
    let pinging = mesh.flood("b", "172.16.1.0");
    mesh.end("node1/forwarder", Signal::KILL);
    // The directory itself is a disk of the lab's.
    fs::read_dir(&store)
        .expect("list")
        .flatten()
        .for_each(|entry| fs::remove_file(entry.path()).expect("remove"));
    copy(&yesterday, &store);
    mesh.restart("node1/forwarder");
    // The wire that yesterday knew is gone, and that which it did not know is claimed by a refresh.
    eventually("what is kept is what there is", || {
        let records = nsm_kernel::store::Store::look(&store).expect("read").records;
        let log = mesh.log("node1/forwarder");
        if records.len() == 1 && records[0].plan.id != gone {
            Ok(())
        } else {
            Err(format!("{records:?}\n{log}"))
        }
    });
    // It is made anew, as nothing tells what it was; whoever is refused in between asks again after 50 ms at first.
    let row = pinging.end().expect("enter");
    assert!(row.answered > 0 && row.silence < Duration::from_secs(5), "{row:?}\n{}", mesh.log("client"));
    mesh.has("b", "nsm0");
    mesh.pings("b", "172.16.1.0");
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("list").flatten().filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), to.join(entry.file_name())).expect("copy");
    }
}

#[test]
fn what_changes_while_a_connection_lives_is_all_that_is_written() {
    let test = "what_changes_while_a_connection_lives_is_all_that_is_written";
    let Some(mesh) = Mesh::up(test, &GATEWAY.replace("172.16.1.2/31", "172.16.1.0/24")) else { return };
    mesh.end("node1/forwarder", Signal::TERM);
    restart_traced(&mesh, test, "node1");
    mesh.inside("a", "changes");
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

/// Both forwarders, and the tunnel between them.
#[test]
fn between_nodes_what_changes_while_a_connection_lives_is_all_that_is_written() {
    let test = "between_nodes_what_changes_while_a_connection_lives_is_all_that_is_written";
    let pods =
        GATEWAY.replace("172.16.1.2/31", "172.16.1.0/24").replace("gw, node: node1", "gw, node: node2");
    let Some(mesh) = Mesh::up(test, &pods) else { return };
    for node in NODES {
        mesh.end(&format!("{node}/forwarder"), Signal::TERM);
        restart_traced(&mesh, test, node);
    }
    mesh.inside("a", "changes");
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

/// Asks for a wire, and again with something changed, and compares what is there and what was written.
pub(crate) fn changes(lab: &str) {
    let traces = NODES.map(|node| trace_of(&Paths::new(lab), node));
    // Where there is no strace that has been said, and nothing is known of what was written.
    let counts = traces.iter().any(|trace| trace.exists());
    let mut read = traces.clone().map(|_| 0);
    // Kinds of the changes that the forwarders have made since the last call.
    let mut written = || {
        let mut new = String::new();
        for (trace, read) in traces.iter().zip(&mut read) {
            let text = fs::read_to_string(trace).unwrap_or_default();
            new += text.get(*read..).unwrap_or_default();
            *read = text.len();
        }
        written_in(&new)
    };
    in_runtime(async {
        let raw = Raw::connect(lab, "nsm.io.sock").await;
        let (url, _) = file("/proc/self/ns/net");
        let ask = async |before: Option<&Connection>, change: &dyn Fn(&mut Connection)| {
            raw.fds.send(file("/proc/self/ns/net").1);
            let mut request = good("raw-0", "nsm0", url);
            let conn = request.connection.get_or_insert_default();
            before.into_iter().for_each(|before| conn.clone_from(before));
            change(conn);
            raw.request(request, Some(raw.token()), Duration::from_secs(10)).await.expect("a wire")
        };
        let seen = || {
            let all = [links(lab, "a"), links(lab, "gw")].concat();
            all.into_iter().map(|link| (link.index, link.name.clone(), link.mac)).collect::<Vec<_>>()
        };
        let mtu = || links(lab, "a").iter().chain(&links(lab, "gw")).map(|link| link.mtu).collect::<Vec<_>>();
        let first = ask(None, &|_| {}).await;
        assert_ne!(written().is_empty(), counts, "a wire is not made without being written");
        let (before, large) = (seen(), mtu());
        assert_eq!(before.len(), 2);
        let same = |answer: &Connection, what: &str| {
            let id = |conn: &Connection| {
                conn.path
                    .clone()
                    .unwrap_or_default()
                    .path_segments
                    .iter()
                    .map(|s| s.id.clone())
                    .collect::<Vec<_>>()
            };
            assert_eq!(id(answer), id(&first), "{what}: the connection at every hop");
            assert_eq!(seen(), before, "{what}: interfaces, their numbers and hardware addresses");
        };

        let answer = ask(Some(&first), &|_| {}).await;
        same(&answer, "nothing");
        assert_eq!(written(), [""; 0], "nothing has changed");

        let answer =
            ask(Some(&answer), &|conn| drop(conn.labels.insert("colour".into(), "red".into()))).await;
        same(&answer, "labels");
        assert_eq!(answer.labels["colour"], "red");
        assert_eq!(written(), [""; 0], "labels are nothing of the kernel's");

        let answer = ask(Some(&answer), &|conn| {
            conn.context.get_or_insert_default().mtu = 1400;
        })
        .await;
        same(&answer, "MTU");
        assert_ne!(large, [1400, 1400]);
        assert_eq!(mtu(), [1400, 1400]);
        let kinds = written();
        assert!(kinds.iter().all(|kind| kind.ends_with("LINK")) && kinds.is_empty() != counts, "{kinds:?}");

        let address = |conn: &Connection| {
            let ip = conn.context.clone().and_then(|context| context.ip_context).unwrap_or_default();
            (ip.src_ip_addrs.concat(), ip.dst_ip_addrs.concat())
        };
        let had = address(&answer);
        let answer = ask(Some(&answer), &|conn| {
            let context: &mut ConnectionContext = conn.context.get_or_insert_default();
            let ip: &mut IpContext = context.ip_context.get_or_insert_default();
            ip.excluded_prefixes = vec!["172.16.1.0/31".into()];
        })
        .await;
        same(&answer, "prefixes");
        assert_ne!(address(&answer), had, "another pair, outside of what is excluded");
        let kinds = written();
        assert!(!kinds.iter().any(|kind| kind.ends_with("LINK")) && kinds.is_empty() != counts, "{kinds:?}");
        assert!(
            kinds.iter().filter(|kind| kind.ends_with("ADDR")).count() <= 4,
            "one for one at each end: {kinds:?}"
        );
        raw.close(answer).await.expect("closed");
    });
}
