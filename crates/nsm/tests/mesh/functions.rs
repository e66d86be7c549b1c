//! A function in the middle, when others meddle with its wires and when it dies.

use std::{
    net::{SocketAddr, TcpListener},
    process::Command,
    time::Duration,
};

use nsm_kernel::store::Store;
use nsm_lab::{
    network::Seen,
    probe::{Connected, connect},
};
use rustix::process::Signal;

use crate::harness::{Mesh, eventually};

/// The service carries frames or packets, so the firewall joins its wires on layer 2 or 3.
const PODS: &str = "\
- {name: a, node: node1}
- name: fw
  node: node1
  firewall:
    service: SERVICE
    labels: {app: middle}
    aclConfig: |
      aclRules:
        ping: action=reflect,icmptype=8
        web: action=reflect,tcplowport=80,tcpupport=80
- {name: gw, node: node1, endpoint: {services: [SERVICE], labels: {app: gw}, cidrPrefix: [172.16.1.2/31]}}
";
const GATEWAY: &str = "172.16.1.2";
/// Long for one machine; a filter is silent for ever.
const SILENCE: Duration = Duration::from_millis(300);

/// What passes is what the rules allow.
fn filters(mesh: &Mesh) {
    mesh.pings("a", GATEWAY);
    let (client, gateway) = (mesh.lab.namespace("a").expect("a"), mesh.lab.namespace("gw").expect("gw"));
    for (port, open) in [(80, true), (8080, false)] {
        let to = SocketAddr::new(GATEWAY.parse().expect("an address"), port);
        let _listener = gateway.run(|| TcpListener::bind(to)).expect("enter").expect("listen");
        let connected = client.run(|| connect(to, SILENCE)).expect("enter");
        assert_eq!(matches!(connected, Connected::Yes(_)), open, "port {port}: {connected:?}");
        assert_eq!(matches!(connected, Connected::Silence), !open, "port {port}: {connected:?}");
    }
}

/// Does what a forwarder does that does not know that the ends of a function want no addresses: gives each those of
/// that end of the wire, and routes to the other.
fn number(mesh: &Mesh) {
    let namespace = mesh.lab.namespace("fw").expect("fw");
    for (own, other, link) in ends(mesh).into_iter().enumerate().map(|(i, link)| (2 + i, 3 - i, link)) {
        for command in [
            format!("addr add 172.16.1.{own}/32 dev {link}"),
            format!("addr add 2001:db8::{own}/128 dev {link} nodad"),
            format!("route add 172.16.1.{other}/32 dev {link} metric 7"),
        ] {
            let run = || Command::new("ip").args(command.split(' ')).output();
            let done = namespace.run(run).expect("enter").expect("start ip");
            assert!(done.status.success(), "{command}: {}", String::from_utf8_lossy(&done.stderr));
        }
    }
}

/// The firewall's ends of its two wires.
fn ends(mesh: &Mesh) -> [String; 2] {
    let links = mesh.links("fw").into_iter().filter(|link| link.kind == "veth");
    let links: Vec<_> = links.map(|link| link.name).collect();
    links.try_into().unwrap_or_else(|links| panic!("two wires: {links:?}"))
}

fn unnumbered(mesh: &Mesh) {
    let namespace = mesh.lab.namespace("fw").expect("fw");
    eventually("nobody has an address in the firewall", || {
        let mut addresses = Seen::of(&namespace).expect("read").addresses;
        // The kernel's own; of loopback, and of links that have IPv6.
        addresses.retain(|a| a.interface != "lo" && !a.address.to_string().starts_with("fe80:"));
        if addresses.is_empty() { Ok(()) } else { Err(format!("{addresses:?}")) }
    });
}

fn meddled(test: &str, service: &str) {
    let Some(mesh) = Mesh::up(test, &PODS.replace("SERVICE", service)) else { return };
    mesh.client("client", "a", &format!("kernel://{service}/nsm0"), &["--max-token-lifetime", "6s"]);
    mesh.ready(&["client"]);
    filters(&mesh);
    unnumbered(&mesh);
    number(&mesh);
    unnumbered(&mesh);
    filters(&mesh);

    // Nobody is there to flush: who comes back does.
    let before = mesh.links("fw");
    mesh.end("fw", Signal::KILL);
    number_again(&mesh);
    mesh.restart("fw");
    unnumbered(&mesh);
    let records = |mesh: &Mesh| {
        let records = Store::look(mesh.state_dir("node1")).expect("read").records;
        records.into_iter().map(|r| (r.plan.id, r.data.to_string())).collect::<Vec<_>>()
    };
    let were = records(&mesh);
    eventually("both wires are refreshed", || {
        let are = records(&mesh);
        if are.len() == 2 && are.iter().all(|now| !were.contains(now)) {
            Ok(())
        } else {
            Err(format!("{are:?}"))
        }
    });
    assert_eq!(mesh.links("fw"), before, "adopted");
    filters(&mesh);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "fw", "gw"]);
}

/// As [`number`], where the routes are there still.
fn number_again(mesh: &Mesh) {
    let namespace = mesh.lab.namespace("fw").expect("fw");
    for link in ends(mesh) {
        let add = ["addr", "add", "172.16.1.2/32", "dev", &link];
        let done = namespace.run(|| Command::new("ip").args(add).output()).expect("enter").expect("start ip");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
}

#[test]
fn on_layer_2_a_firewall_sheds_foreign_addresses_and_is_adopted() {
    meddled("on_layer_2_a_firewall_sheds_foreign_addresses_and_is_adopted", "frames");
}

#[test]
fn on_layer_3_a_firewall_sheds_foreign_addresses_and_is_adopted() {
    meddled("on_layer_3_a_firewall_sheds_foreign_addresses_and_is_adopted", "packets");
}
