//! What comes with a wire beside the interface: addresses that do not overlap, policy routes, hardware addresses.

use std::{fs, time::Duration};

use nsm_api::pb::connectioncontext::{ConnectionContext, EthernetContext};
use nsm_identity::Source;
use nsm_lab::network::Seen;
use nsm_sdk::prefix_client::LeasedPrefix;
use nsm_transport::{DialUrl, Pool, PoolConfig};
use rustix::process::Signal;
use tonic::Code;

use crate::{
    harness::{self, Mesh, eventually},
    raw::{Raw, file, good, in_runtime},
};

/// Pods without programs: tests start their own.
const BARE: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: x, node: node1}
- {name: y, node: node1}
";
const BOTH: &str = "kernel://plain/nsm1,kernel://picky/nsm2";

fn seen(mesh: &Mesh, pod: &str) -> Seen {
    let namespace = mesh.lab.namespace(pod).unwrap_or_else(|e| panic!("{}", e.chain()));
    Seen::of(&namespace).expect("read")
}

/// The IPv4 addresses of an interface.
fn addresses(mesh: &Mesh, pod: &str, interface: &str) -> Vec<String> {
    let all = seen(mesh, pod).addresses.into_iter();
    let here = all.filter(|a| a.interface == interface && a.address.addr().is_ipv4());
    here.map(|a| a.address.to_string()).collect()
}

#[test]
fn what_one_wire_of_a_client_uses_another_does_not_get() {
    let test = "what_one_wire_of_a_client_uses_another_does_not_get";
    let directory = tempfile::tempdir().expect("a directory");
    let excluded = directory.path().join("excluded_prefixes.yaml");
    fs::write(&excluded, "prefixes: [172.16.1.101/32]\n").expect("written");
    let path = excluded.display().to_string();
    let with_file = |plan: &mut nsm_lab::Plan| {
        let manager = plan.processes.iter_mut().find(|p| p.name == "node1/manager").expect("planned");
        manager.args.extend(["--excluded-prefixes-file".to_owned(), path.clone()]);
    };
    let Some(mesh) = Mesh::up_with(test, BARE, with_file) else { return };
    // Two endpoints that know nothing of each other, with the same prefix.
    for (name, service) in [("x", "plain"), ("y", "picky")] {
        let more = ["--service-names", service, "--labels", "app:vpn", "--cidr-prefix", "172.16.1.96/29"];
        mesh.endpoint(name, name, &more);
    }
    mesh.ready(&["x", "y"]);
    let of = |pod| {
        ["nsm1", "nsm2"]
            .map(|interface| addresses(&mesh, pod, interface).concat())
            .map(|a| a.replace("/32", ""))
    };
    // Their endpoints are said to know of each other: they may hand out the same.
    let group = format!("[{BOTH}]");
    mesh.client("together", "b", BOTH, &["--awareness-groups", &group]);
    mesh.ready(&["together"]);
    assert_eq!(of("b"), ["172.16.1.97", "172.16.1.97"]);
    // Else not: .98 and .99 are in use when y is asked, and .101 is excluded by the manager's file.
    mesh.client("apart", "a", BOTH, &[]);
    mesh.ready(&["apart"]);
    assert_eq!(of("a"), ["172.16.1.99", "172.16.1.102"]);
    mesh.end("together", Signal::TERM);
    // The file is read again: what is left at x is excluded now.
    fs::write(&excluded, "prefixes: [172.16.1.96/31, 172.16.1.100/30]\n").expect("written");
    eventually("the manager has read it", || {
        let log = mesh.log("node1/manager");
        if log.contains("read again") { Ok(()) } else { Err(log) }
    });
    mesh.client("none", "b", "kernel://plain/nsm1", &["--once"]);
    let (how, said) = mesh.ended("none");
    assert_eq!(how, "exit status 1", "{said}");
    assert!(said.contains("no address is free in"), "{said}");
    mesh.end("apart", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "x", "y"]);
}

#[test]
fn policy_routes_come_with_a_wire_change_with_their_file_and_go_with_it() {
    let test = "policy_routes_come_with_a_wire_change_with_their_file_and_go_with_it";
    let Some(mesh) = Mesh::up(test, BARE) else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let policies = directory.path().join("config.yaml");
    let write = |text: &str| fs::write(&policies, text).expect("written");
    write(
        "- {proto: 6, dstport: 6666, from: 172.16.2.201/32, routes: [{prefix: 172.16.3.0/24, nexthop: 172.16.1.0}]}\n",
    );
    let path = policies.display().to_string();
    let more = ["--service-names", "plain", "--cidr-prefix", "172.16.1.0/24", "--pbr-config-path", &path];
    mesh.endpoint("x", "x", &more);
    mesh.ready(&["x"]);
    let before = seen(&mesh, "a");
    mesh.client("routed", "a", "kernel://plain/nsm0", &["--max-token-lifetime", "5s"]);
    mesh.ready(&["routed"]);
    let there = |table: u32, address: &str| {
        let now = seen(&mesh, "a");
        let rules = now.rules.iter().filter(|rule| !before.rules.contains(rule)).count();
        let routes: Vec<_> =
            now.routes.iter().filter(|r| r.table == table).map(|r| r.to.to_string()).collect();
        let has = addresses(&mesh, "a", "nsm0").contains(&address.to_owned());
        if (rules, has) == (1, true) { Ok(routes) } else { Err(format!("{now:?}")) }
    };
    let routes = there(1, "172.16.2.201/32").expect("one policy");
    assert_eq!(routes, ["172.16.3.0/24"]);
    // What changes in the file reaches the client with its next refresh.
    write("- {proto: 17, from: 172.16.2.202/32, routes: [{prefix: 172.16.4.0/24}]}\n");
    eventually("the other policy", || {
        let routes = [1, 2].map(|table| there(table, "172.16.2.202/32").unwrap_or_default()).concat();
        if routes == ["172.16.4.0/24"] { Ok(()) } else { Err(format!("{:?}", seen(&mesh, "a"))) }
    });
    assert!(
        !addresses(&mesh, "a", "nsm0").contains(&"172.16.2.201/32".to_owned()),
        "it went with its policy"
    );
    mesh.end("routed", Signal::TERM);
    eventually("nothing of it is left", || {
        let (now, was) = (seen(&mesh, "a"), &before);
        if (&now.rules, &now.routes) == (&was.rules, &was.routes) { Ok(()) } else { Err(format!("{now:?}")) }
    });
    mesh.nothing_is_left(&["a", "b", "x", "y"]);
}

#[test]
fn a_killed_prefix_server_comes_back_and_keeps_what_was_handed_out() {
    let Some(mesh) = Mesh::up("a_killed_prefix_server_comes_back_and_keeps_what_was_handed_out", BARE) else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let leases = directory.path().join("leases").display().to_string();
    let url = mesh.url("ipam.sock");
    let args = ["ipam", "--listen-on", &url, "--prefix", "172.16.0.0/16", "--state-file", &leases];
    mesh.start("ipam", "x", &args);
    mesh.ready(&["ipam"]);
    mesh.inside("a", "lease 172.16.0.0/24");
    mesh.end("ipam", Signal::KILL);
    mesh.start("ipam", "x", &args);
    mesh.ready(&["ipam"]);
    // Its holder may come back for the first.
    mesh.inside("b", "lease 172.16.1.0/24");
    mesh.end("ipam", Signal::TERM);
    assert_eq!(fs::read_to_string(&leases).expect("kept"), "172.16.0.0/24\n172.16.1.0/24\n");
}

/// Gets a prefix, which shall be this one.
pub(crate) fn lease(lab: &str, expected: &str) {
    in_runtime(async {
        let url: DialUrl = harness::url(lab, "ipam.sock").parse().expect("a URL");
        let pool = Pool::new(Source::from_env().await.expect("an identity"), PoolConfig::default());
        let lease = LeasedPrefix::keep(pool, (&url).into(), Duration::from_secs(5), Vec::new());
        let prefix = tokio::time::timeout(harness::PATIENCE, lease.get()).await.expect("in time");
        assert_eq!(prefix.to_string(), expected);
    });
}

#[test]
fn hardware_addresses_are_set_where_they_are_asked_for() {
    let Some(mesh) = Mesh::up("hardware_addresses_are_set_where_they_are_asked_for", BARE) else { return };
    mesh.endpoint("x", "x", &["--service-names", "plain"]);
    mesh.ready(&["x"]);
    mesh.inside("a", "hardware addresses");
    mesh.nothing_is_left(&["a", "b", "x", "y"]);
}

/// A client says its own; the endpoint's is the endpoint's to say.
pub(crate) fn hardware_addresses(lab: &str) {
    in_runtime(async {
        let raw = Raw::connect(lab, "nsm.io.sock").await;
        let (url, _) = file("/proc/self/ns/net");
        let ask = async |src: &str, dst: &str| {
            raw.fds.send(file("/proc/self/ns/net").1);
            let mut request = good("raw-0", "nsm0", url);
            let ethernet =
                EthernetContext { src_mac: src.into(), dst_mac: dst.into(), ..EthernetContext::default() };
            request.connection.as_mut().expect("good").context =
                Some(ConnectionContext { ethernet_context: Some(ethernet), ..ConnectionContext::default() });
            raw.request(request, Some(raw.token()), Duration::from_secs(10)).await
        };
        let answer = ask("02:00:00:00:00:07", "02:00:00:00:00:08").await.expect("a wire");
        let link =
            std::process::Command::new("ip").args(["-o", "link", "show", "nsm0"]).output().expect("ip");
        let link = String::from_utf8_lossy(&link.stdout).into_owned();
        assert!(link.contains("02:00:00:00:00:07"), "{link}");
        let ethernet = answer.context.clone().and_then(|c| c.ethernet_context).expect("it comes back");
        assert_eq!((ethernet.src_mac.as_str(), ethernet.dst_mac.as_str()), ("02:00:00:00:00:07", ""));
        raw.close(answer).await.expect("closed");
        for bad in ["nonsense", "01:00:00:00:00:01"] {
            let error = ask(bad, "").await.expect_err("refused");
            assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
            assert!(error.message().contains(bad), "{error:?}");
        }
    });
}
