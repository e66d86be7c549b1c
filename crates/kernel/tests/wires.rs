//! Wires in a real kernel: made, found again, changed, removed; collisions and failures.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod common;

use std::{
    net::IpAddr,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::Duration,
};

use common::{Pod, net, node, nsids, output, reaches, succeeds, tunnel};
use nsm_kernel::netns::Namespace;
use nsm_kernel::plan::{
    Construction, ContextPolicy, ContextRoute, EndPlan, IpContext, Neighbour, Policy, Route, Selector, Side,
    Vxlan, WirePlan,
};
use nsm_kernel::{Error, Kernel, difference};
use rustix::net::{self as sockets, AddressFamily, RecvFlags, SendFlags, SocketType, ipproto};

#[test]
fn a_veth_wire_carries_packets_and_is_found_as_planned() {
    let Some(node) = node("a_veth_wire_carries_packets_and_is_found_as_planned") else { return };
    let plan = node.veth("wire-1", "nsm0");
    let made = node.kernel.apply(&plan, &node.known()).unwrap();
    assert!(made.created);
    for address in ["172.16.1.2", "2001:db8::2"] {
        assert!(reaches(&node.client, &node.endpoint, address), "{}", output(&node.client, "ip a"));
    }
    let seen = node.kernel.snapshot(&plan, &node.known()).unwrap();
    assert_eq!(difference(&plan, &seen), []);
    assert!(seen.near.unwrap().counters.rx_packets >= 2);

    let again = node.kernel.apply(&plan, &node.known()).unwrap();
    assert_eq!((again.created, again.writes), (false, 0));
    assert_eq!((again.near, again.far), (made.near, made.far));
    node.kernel.remove(&plan, nsids(&made), &[]).unwrap();
    assert_eq!(output(&node.client, "ip -br link").lines().count(), 1, "only lo is left");
    node.kernel.remove(&plan, nsids(&made), &[]).unwrap();
}

#[test]
fn a_vxlan_wire_is_made_in_the_pod_with_its_socket_in_the_node() {
    let Some(node) = node("a_vxlan_wire_is_made_in_the_pod_with_its_socket_in_the_node") else { return };
    output(&node.ns, "ip link set lo up");
    output(&node.ns, "ip addr add 192.0.2.1/24 dev lo");
    let plan = node.vxlan("wire-1", "nsm0", 77);
    let made = node.kernel.apply(&plan, &node.known()).unwrap();
    assert!(made.created);
    let link = output(&node.client, "ip -d link show nsm0");
    for part in [
        "vxlan id 77 remote 192.0.2.2 local 192.0.2.1",
        "dstport 4789",
        "nolearning",
        "mtu 9000",
        "noudpcsum",
    ] {
        assert!(link.contains(part), "{part} in {link}");
    }
    assert!(output(&node.ns, "ss -Huln").contains(":4789"));
    assert!(!output(&node.client, "ss -Huln").contains(":4789"));
    assert_eq!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), []);
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);

    let _pod = Pod::start(&node.client);
    let restarted = Kernel::new(node.ns.try_clone().unwrap()).unwrap();
    let again = restarted.apply(&plan, &[]).unwrap();
    assert_eq!((again.created, again.writes, again.near), (false, 0, made.near));
    restarted.remove(&plan, nsids(&made), &[]).unwrap();
    assert!(!succeeds(&node.client, "ip link show nsm0"));
}

#[test]
fn a_refresh_changes_what_differs_and_nothing_else() {
    let Some(node) = node("a_refresh_changes_what_differs_and_nothing_else") else { return };
    let mut plan = node.veth("wire-1", "nsm0");
    let made = node.kernel.apply(&plan, &node.known()).unwrap();

    // What others have hung on the interface is theirs.
    output(&node.client, "ip addr add 10.99.0.1/24 dev nsm0");
    output(&node.client, "ip route add 10.98.0.0/16 dev nsm0");
    output(&node.client, "ip neigh add 10.99.0.7 lladdr 02:00:00:00:00:07 dev nsm0");
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);

    let near = plan.near.as_mut().unwrap();
    near.addresses = vec![net("172.16.1.9/24"), net("2001:db8::9/64")];
    near.routes = vec![
        Route::via(net("10.0.0.0/8"), "172.16.1.2".parse().unwrap()),
        Route::on_device(net("10.97.0.0/16")),
    ];
    near.neighbours = vec![neighbour("172.16.1.2", "02:00:00:00:00:02", false)];
    near.mtu = Some(1446);
    near.alias = "server-other".into();
    let changed = node.kernel.apply(&plan, &node.known()).unwrap();
    assert_eq!((changed.created, changed.near, changed.far), (false, made.near, made.far));
    assert_eq!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), []);
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);
    let routes = output(&node.client, "ip route show dev nsm0");
    for line in
        ["10.0.0.0/8 via 172.16.1.2 proto 78 onlink", "10.97.0.0/16 proto 78", "10.98.0.0/16 scope link"]
    {
        assert!(routes.contains(line), "{line} in {routes}");
    }
    assert!(!routes.contains("172.16.1.2 proto 78 scope link"), "{routes}");
    let addresses = output(&node.client, "ip addr show dev nsm0");
    assert!(addresses.contains("10.99.0.1/24") && !addresses.contains("172.16.1.3/32"), "{addresses}");
    assert!(output(&node.client, "ip neigh show dev nsm0").contains("10.99.0.7"));

    // Everything of ours away again; the others' stays.
    let near = plan.near.as_mut().unwrap();
    (near.addresses, near.routes, near.neighbours) = (Vec::new(), Vec::new(), Vec::new());
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().near, made.near);
    let left = output(&node.client, "ip -o addr show dev nsm0 scope global");
    assert_eq!((left.lines().count(), left.contains("10.99.0.1/24")), (1, true), "{left}");
    assert!(!output(&node.client, "ip route").contains("proto 78"));
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);
}

/// Without membership of the group, the first question of a neighbour is dropped, and the next one comes a second later.
#[test]
fn a_wire_that_is_made_hears_who_looks_for_its_ipv6_addresses() {
    let Some(node) = node("a_wire_that_is_made_hears_who_looks_for_its_ipv6_addresses") else { return };
    let groups = |pod: &Namespace| {
        pod.run(|| std::fs::read_to_string("/proc/thread-self/net/igmp6")).unwrap().unwrap()
    };
    for round in 0..100 {
        let plan = node.veth(&format!("wire-{round}"), "nsm0");
        let made = node.kernel.apply(&plan, &node.known()).unwrap();
        // Solicited-node group: ff02::1:ff00:0/104 with the last three bytes of the address (RFC 4291 section 2.7.1).
        for (pod, group) in [(&node.client, "1ff000003"), (&node.endpoint, "1ff000002")] {
            let groups = groups(pod);
            assert!(groups.contains(group), "round {round}: no {group} in\n{groups}");
        }
        node.kernel.remove(&plan, nsids(&made), &[]).unwrap();
    }
}

fn neighbour(ip: &str, mac: &str, permanent: bool) -> Neighbour {
    Neighbour { ip: ip.parse().unwrap(), mac: mac.parse().unwrap(), permanent }
}

/// A wire that carries IP asks for nobody: both ends know where the other's addresses are, from the first packet on.
#[test]
fn the_ends_of_an_ip_wire_know_each_other() {
    let Some(node) = node("the_ends_of_an_ip_wire_know_each_other") else { return };
    let plan = node.veth("wire-1", "nsm0");
    let ips = |ends: [&str; 2]| ends.map(|ip| ip.parse().unwrap());
    let (src, dst) = (ips(["172.16.1.3", "2001:db8::3"]), ips(["172.16.1.2", "2001:db8::2"]));
    let plan = plan.introduced(&src, &dst);
    let made = node.kernel.apply(&plan, &node.known()).unwrap();
    assert_eq!(
        (made.near.unwrap().mac, made.far.unwrap().mac),
        (plan.near.as_ref().unwrap().mac.unwrap(), plan.far.as_ref().unwrap().mac.unwrap())
    );
    for (pod, address) in
        [(&node.client, "172.16.1.2"), (&node.client, "2001:db8::2"), (&node.endpoint, "172.16.1.3")]
    {
        let entry = output(pod, &format!("ip neigh show {address}"));
        assert!(entry.contains("PERMANENT"), "{entry}");
    }
    // Nobody asks: a filter that drops every question and answer changes nothing.
    for pod in [&node.client, &node.endpoint] {
        for line in [
            "nft add table netdev t",
            "nft add chain netdev t c { type filter hook ingress device nsm0 priority 0 ; }",
            "nft add rule netdev t c ether type arp drop",
            "nft add rule netdev t c icmpv6 type { nd-neighbor-solicit , nd-neighbor-advert } drop",
        ] {
            output(pod, line);
        }
    }
    for address in ["172.16.1.2", "2001:db8::2"] {
        assert!(reaches(&node.client, &node.endpoint, address), "{}", output(&node.client, "ip neigh"));
    }
    // Found as planned, without a write; and what others know stays theirs.
    assert_eq!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), []);
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);
    // An entry of the context wins over what we would say.
    let mut told = node.veth("wire-2", "nsm1");
    told.near.as_mut().unwrap().neighbours = vec![neighbour("172.16.1.2", "02:00:00:00:00:02", false)];
    let told = told.introduced(&src, &dst);
    assert_eq!(told.near.unwrap().neighbours[0], neighbour("172.16.1.2", "02:00:00:00:00:02", false));
}

#[test]
fn an_address_goes_although_others_of_its_subnet_stay() {
    let Some(node) = node("an_address_goes_although_others_of_its_subnet_stay") else { return };
    let mut plan = node.veth("wire-1", "nsm0");
    plan.near.as_mut().unwrap().addresses = ["10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24"].map(net).to_vec();
    node.kernel.apply(&plan, &node.known()).unwrap();
    // The kernel deletes the secondary addresses with the primary one.
    for left in [vec!["10.0.0.2/24", "10.0.0.3/24"], vec!["10.0.0.4/24"], vec!["10.0.0.4/32"]] {
        plan.near.as_mut().unwrap().addresses = left.into_iter().map(net).collect();
        node.kernel.apply(&plan, &node.known()).unwrap();
        assert_eq!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), []);
        assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);
    }
}

#[test]
fn damage_by_others_is_repaired() {
    let Some(node) = node("damage_by_others_is_repaired") else { return };
    let plan = node.veth("wire-1", "nsm0");
    let made = node.kernel.apply(&plan, &node.known()).unwrap();
    for damage in [
        "ip link set nsm0 down",
        "ip addr flush dev nsm0",
        "ip route flush dev nsm0",
        "ip link set nsm0 mtu 1500",
        "ip link set nsm0 alias nobody",
    ] {
        output(&node.client, damage);
        assert_ne!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), [], "{damage}");
        let repaired = node.kernel.apply(&plan, &node.known()).unwrap();
        assert_eq!((repaired.created, repaired.near), (false, made.near), "{damage}");
        assert_eq!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), [], "{damage}");
        assert!(reaches(&node.client, &node.endpoint, "172.16.1.2"), "{damage}");
    }
    // Without its mark, its name, or its existence it is another link: our wire is made anew.
    for damage in ["ip link set nsm0 down name other", "ip link del nsm0"] {
        output(&node.client, damage);
        let repaired = node.kernel.apply(&plan, &node.known()).unwrap();
        assert!(repaired.created, "{damage}");
        assert!(reaches(&node.client, &node.endpoint, "172.16.1.2"), "{damage}");
        assert_eq!(output(&node.client, "ip -br link").lines().count(), 2, "{damage}");
    }
    output(&node.client, &format!("ip link property del dev nsm0 altname {}", plan.mark(Side::Near)));
    let repaired = node.kernel.apply(&plan, &node.known()).unwrap();
    assert_eq!((repaired.created, repaired.writes), (false, 1), "known by its alias");
}

#[test]
fn a_name_that_is_taken_is_told_and_left_alone() {
    let Some(node) = node("a_name_that_is_taken_is_told_and_left_alone") else { return };
    let plan = node.veth("wire-1", "nsm0");
    let taken_by = |plan: &WirePlan| match node.kernel.apply(plan, &node.known()) {
        Err(Error::NameTaken { name, ns, by }) => (name, ns, by),
        other => panic!("{other:?}"),
    };
    output(&node.endpoint, "ip link add nsm0 type bridge");
    assert_eq!(taken_by(&plan), ("nsm0".into(), node.endpoint.id(), "the unmarked link nsm0".into()));
    output(&node.endpoint, "ip link set nsm0 alias hers");
    assert_eq!(taken_by(&plan).2, "hers");
    assert_eq!(output(&node.client, "ip -br link").lines().count(), 1, "nothing half made");
    output(&node.endpoint, "ip link set nsm0 name br0");
    output(&node.endpoint, "ip link property add dev br0 altname nsm0");
    assert_eq!(taken_by(&plan).2, "hers");
    output(&node.endpoint, "ip link del br0");

    // By another connection, and one that is just being deleted.
    let other = node.veth("wire-2", "nsm0");
    let made = node.kernel.apply(&other, &node.known()).unwrap();
    assert_eq!(taken_by(&plan).2, other.mark(Side::Near));
    node.kernel.remove_later(&other, nsids(&made), &[], drop);
    assert!(node.kernel.apply(&plan, &node.known()).unwrap().created);
    node.kernel.flush();
    assert!(reaches(&node.client, &node.endpoint, "172.16.1.2"));
}

#[test]
fn a_vni_that_is_taken_is_told_and_nothing_is_left() {
    let Some(node) = node("a_vni_that_is_taken_is_told_and_nothing_is_left") else { return };
    let first = node.vxlan("wire-1", "nsm0", 77);
    let made = node.kernel.apply(&first, &node.known()).unwrap();
    let second = node.vxlan("wire-2", "nsm1", 77);
    match node.kernel.apply(&second, &node.known()) {
        Err(Error::VniTaken { vni: 77, port: 4789 }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(output(&node.client, "ip -br link").lines().count(), 2);
    node.kernel.remove_later(&first, nsids(&made), &[], drop);
    assert!(node.kernel.apply(&second, &node.known()).unwrap().created);
    // Other parameters: the device cannot be changed, so it is replaced.
    let third = node.vxlan("wire-2", "nsm1", 78);
    assert!(node.kernel.apply(&third, &node.known()).unwrap().created);
    assert_eq!(difference(&third, &node.kernel.snapshot(&third, &node.known()).unwrap()), []);
}

#[test]
fn peers_with_another_port_are_sent_to_that_port() {
    let Some(node) = node("peers_with_another_port_are_sent_to_that_port") else { return };
    let mut plan = node.vxlan("wire-1", "nsm0", 77);
    plan.construction = Construction::Vxlan(Vxlan { port: 4789, remote_port: 8472, ..tunnel(77) });
    let made = node.kernel.apply(&plan, &node.known()).unwrap();
    assert!(output(&node.client, "bridge fdb show dev nsm0").contains("dst 192.0.2.2 port 8472"));
    assert_eq!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), []);
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);
    plan.construction = Construction::Vxlan(Vxlan { port: 4789, remote_port: 8473, ..tunnel(77) });
    assert_ne!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), []);
    let again = node.kernel.apply(&plan, &node.known()).unwrap();
    assert_eq!(again.near.map(|end| end.mac), made.near.map(|end| end.mac));
    assert_eq!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), []);
}

#[test]
fn two_nodes_talk_through_a_tunnel() {
    let Some(node) = node("two_nodes_talk_through_a_tunnel") else { return };
    let other = common::node("two_nodes_talk_through_a_tunnel").unwrap();
    for (v6, own, peer) in [(false, "192.0.2.1", "192.0.2.2"), (true, "2001:db8:1::1", "2001:db8:1::2")] {
        // The underlay between the nodes is a wire, too.
        let mut underlay = WirePlan::veth(
            format!("underlay-{v6}"),
            EndPlan::new(Side::Near, node.ns.id(), "eth0", "u"),
            EndPlan::new(Side::Far, other.ns.id(), "eth0", "u"),
        );
        let bits = if v6 { 64 } else { 24 };
        underlay.near.as_mut().unwrap().addresses = vec![net(&format!("{own}/{bits}"))];
        underlay.far.as_mut().unwrap().addresses = vec![net(&format!("{peer}/{bits}"))];
        let under = node.kernel.apply(&underlay, &[&node.ns, &other.ns]).unwrap();
        let uplink = node.kernel.uplink(own.parse::<IpAddr>().unwrap()).unwrap().unwrap();
        assert_eq!(
            (uplink.ifname.as_str(), uplink.mtu, uplink.ifindex),
            ("eth0", 1500, under.near.unwrap().ifindex)
        );
        // By where it is, as all nodes of a cluster can be told the same.
        let within = net(&format!("{own}/{bits}"));
        assert_eq!(node.kernel.uplink(within).unwrap(), Some(uplink.clone()));
        assert_eq!(uplink.ip, own.parse::<IpAddr>().unwrap());
        for nowhere in ["192.0.2.77/32", "198.51.100.0/24"] {
            assert_eq!(node.kernel.uplink(net(nowhere)).unwrap(), None);
        }

        let (local, remote) = (own.parse().unwrap(), peer.parse().unwrap());
        let here = Vxlan { vni: 5, local, remote, port: 4789, remote_port: 4790 };
        let there = Vxlan { vni: 5, local: remote, remote: local, port: 4790, remote_port: 4789 };
        let mut context = common::context();
        context.mtu = uplink.mtu - here.overhead();
        let near = EndPlan::new(Side::Near, node.client.id(), "nsm0", "w")
            .with_context(Side::Near, &context)
            .unwrap();
        let far = EndPlan::new(Side::Far, other.endpoint.id(), "nse0", "w")
            .with_context(Side::Far, &context)
            .unwrap();
        let near = WirePlan::vxlan("w", here, Side::Near, near);
        let far = WirePlan::vxlan("w", there, Side::Far, far);
        let made = [
            node.kernel.apply(&near, &node.known()).unwrap(),
            other.kernel.apply(&far, &other.known()).unwrap(),
        ];
        for address in ["172.16.1.2", "2001:db8::2"] {
            assert!(reaches(&node.client, &other.endpoint, address), "{address} over IPv6: {v6}");
        }
        assert_eq!(difference(&near, &node.kernel.snapshot(&near, &node.known()).unwrap()), []);
        node.kernel.remove(&near, nsids(&made[0]), &[]).unwrap();
        other.kernel.remove(&far, nsids(&made[1]), &[]).unwrap();
        node.kernel.remove(&underlay, nsids(&under), &[]).unwrap();
    }
}

#[test]
fn what_the_kernel_refuses_leaves_nothing() {
    let Some(node) = node("what_the_kernel_refuses_leaves_nothing") else { return };
    let good = node.veth("wire-1", "nsm0");
    let spoilt = |spoil: &dyn Fn(&mut EndPlan)| {
        let mut plan = good.clone();
        spoil(plan.far.as_mut().unwrap());
        node.kernel.apply(&plan, &node.known()).unwrap_err()
    };
    // Refused late, at the far end, when all the rest is done.
    let error =
        spoilt(&|far| far.routes.push(Route::via(net("2001:db8:7::/48"), "2001:db8::2".parse().unwrap())));
    assert!(
        error.to_string().contains("set route 2001:db8:7::/48 via 2001:db8::2 onlink (nsm0 in"),
        "{error}"
    );
    let error = spoilt(&|far| far.mtu = Some(1000));
    assert!(matches!(error, Error::Refused { .. }), "IPv6 needs 1280: {error:?}");
    for namespace in node.known() {
        assert_eq!(output(namespace, "ip -br link").lines().count(), 1);
    }
    let error = node.kernel.apply(&good, &[&node.client]).unwrap_err();
    assert!(matches!(error, Error::NamespaceGone(id) if id == node.endpoint.id()), "{error:?}");
    assert!(node.kernel.apply(&good, &node.known()).unwrap().created);
}

/// Makes a wire look as it does between its creation and its first batch.
fn unfinish(node: &common::Node, plan: &WirePlan) {
    for (namespace, side) in [(&node.client, Side::Near), (&node.endpoint, Side::Far)] {
        output(namespace, &format!("ip link property del dev nsm0 altname {}", plan.mark(side)));
        output(namespace, "ip link set nsm0 down group 7238509");
        let no_alias = || Command::new("ip").args(["link", "set", "nsm0", "alias", ""]).status();
        assert!(namespace.run(no_alias).unwrap().unwrap().success());
    }
}

#[test]
fn a_wire_that_was_never_finished_is_replaced_or_swept() {
    let Some(node) = node("a_wire_that_was_never_finished_is_replaced_or_swept") else { return };
    let plan = node.veth("wire-1", "nsm0");
    node.kernel.apply(&plan, &node.known()).unwrap();
    unfinish(&node, &plan);
    assert!(node.kernel.apply(&plan, &node.known()).unwrap().created);
    assert!(output(&node.client, "ip -d link show nsm0").contains("group default"));

    unfinish(&node, &plan);
    output(&node.client, "ip rule add from 10.0.0.0/8 table 7 protocol 78");
    output(&node.client, "ip rule add from 10.0.0.0/8 table 8");
    assert_eq!(node.kernel.sweep(&node.client).unwrap(), 2);
    assert_eq!(node.kernel.sweep(&node.client).unwrap(), 0);
    for namespace in node.known() {
        assert_eq!(output(namespace, "ip -br link").lines().count(), 1);
    }
    assert!(output(&node.client, "ip rule").contains("lookup 8"), "another's");
}

#[test]
fn a_wire_of_the_same_client_from_an_older_life_is_replaced() {
    let Some(node) = node("a_wire_of_the_same_client_from_an_older_life_is_replaced") else { return };
    let mut old = node.veth("forwarder-id-1", "nsm0");
    let mut new = node.veth("forwarder-id-2", "nsm0");
    for end in [&mut old.near, &mut new.near] {
        end.as_mut().unwrap().alias = "server-nsc-0".into();
    }
    for end in [&mut old.far, &mut new.far] {
        end.as_mut().unwrap().alias = "client-nsc-0".into();
    }
    let was = node.kernel.apply(&old, &node.known()).unwrap();
    let made = node.kernel.apply(&new, &node.known()).unwrap();
    assert!(made.created);
    node.kernel.remove(&old, nsids(&was), &[]).unwrap();
    assert_eq!(node.kernel.apply(&new, &node.known()).unwrap().writes, 0, "closing the old one does no harm");
    // And of another endpoint, after a reselect.
    let third = Namespace::unnamed().unwrap();
    new.far.as_mut().unwrap().ns = third.id();
    assert!(node.kernel.apply(&new, &[&node.client, &third]).unwrap().created);
    assert!(reaches(&node.client, &third, "172.16.1.2"));
    node.kernel.flush();
    assert_eq!(output(&node.endpoint, "ip -br link").lines().count(), 1);
    assert_eq!(node.kernel.numbered().unwrap().len(), 3);
}

/// Whether an address answers an echo request; the kernel does that itself, at once.
fn answers(to: &str) -> bool {
    let to = std::net::SocketAddr::new(to.parse().unwrap(), 0);
    let socket = sockets::socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP)).unwrap();
    let wait = Some(Duration::from_millis(200));
    sockets::sockopt::set_socket_timeout(&socket, sockets::sockopt::Timeout::Recv, wait).unwrap();
    let mut packet = [0; 64];
    sockets::connect(&socket, &to).is_ok()
        && sockets::send(&socket, b"\x08\0\0\0\0\0\0\x01", SendFlags::empty()).is_ok()
        && sockets::recv(&socket, &mut packet[..], RecvFlags::empty()).is_ok()
}

#[test]
fn a_client_that_goes_on_with_another_endpoint_hears_from_one_of_them_all_the_time() {
    let test = "a_client_that_goes_on_with_another_endpoint_hears_from_one_of_them_all_the_time";
    let Some(node) = node(test) else { return };
    let third = Namespace::unnamed().unwrap();
    let towards = |far: &Namespace, own: &str, theirs: &str| {
        let lists = |address: &str| vec![format!("{address}/32")];
        let context =
            IpContext { src_addrs: lists(own), dst_addrs: lists(theirs), mtu: 1500, ..IpContext::default() };
        let end =
            |side, ns: &Namespace| EndPlan::new(side, ns.id(), "nsm0", "nsc-0").with_context(side, &context);
        let (near, far) = (end(Side::Near, &node.client), end(Side::Far, far));
        WirePlan::veth("w", near.unwrap(), far.unwrap())
    };
    for (own, theirs) in [("10.0.0.3", "10.0.0.2"), ("10.0.0.1", "10.0.0.0")] {
        let (before, after) = (towards(&node.endpoint, "10.0.0.1", "10.0.0.0"), towards(&third, own, theirs));
        node.kernel.apply(&before, &node.known()).unwrap();
        let (enough, asked) = (AtomicBool::new(false), AtomicU32::new(0));
        let lost = std::thread::scope(|scope| {
            let pings = scope.spawn(|| {
                let ping = || {
                    let mut lost = 0;
                    while !enough.load(Ordering::Relaxed) && asked.load(Ordering::Relaxed) < 100_000 {
                        // A packet may be on its way when its link goes, and the next one takes the other.
                        lost += u32::from(!["10.0.0.0", theirs, theirs].into_iter().any(answers));
                        asked.fetch_add(1, Ordering::Relaxed);
                    }
                    lost
                };
                node.client.run(ping).unwrap()
            });
            let wait = || {
                let until = asked.load(Ordering::Relaxed) + 20;
                while asked.load(Ordering::Relaxed) < until {
                    std::thread::yield_now();
                }
            };
            wait();
            let made = node.kernel.apply(&after, &[&node.client, &third]).unwrap();
            assert!(made.created);
            wait();
            enough.store(true, Ordering::Relaxed);
            let lost = pings.join().unwrap();
            node.kernel.flush();
            assert_eq!(output(&node.endpoint, "ip -br link").lines().count(), 1);
            assert_eq!(output(&node.client, "ip -br link").lines().count(), 2, "nothing is left aside");
            assert_eq!(node.kernel.apply(&after, &[&node.client, &third]).unwrap().writes, 0);
            node.kernel.remove(&after, nsids(&made), &[]).unwrap();
            lost
        });
        // With one address for both there is one route, which is never there twice.
        assert!(lost == 0 || theirs == "10.0.0.0", "{lost} lost");
    }
}

#[test]
fn both_ends_may_be_in_one_namespace() {
    let Some(node) = node("both_ends_may_be_in_one_namespace") else { return };
    let near = EndPlan::new(Side::Near, node.client.id(), "a0", "w");
    let far = EndPlan::new(Side::Far, node.client.id(), "b0", "w");
    let plan = WirePlan::veth("w", near, far);
    let made = node.kernel.apply(&plan, &node.known()).unwrap();
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);
    assert_eq!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), []);
    assert_eq!(node.kernel.owned(made.near.unwrap().nsid).unwrap().len(), 2);
    node.kernel.remove(&plan, nsids(&made), &[]).unwrap();
    assert_eq!(node.kernel.owned(made.near.unwrap().nsid).unwrap(), []);
}

#[test]
fn a_hardware_address_is_given_when_asked_for() {
    let Some(node) = node("a_hardware_address_is_given_when_asked_for") else { return };
    let mut plan = node.veth("wire-1", "nsm0");
    let mac = "02:11:22:33:44:55".parse().unwrap();
    plan.near.as_mut().unwrap().mac = Some(mac);
    let made = node.kernel.apply(&plan, &node.known()).unwrap();
    assert_eq!(made.near.unwrap().mac, mac);
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);
    // No longer asked for: it stays as it is.
    plan.near.as_mut().unwrap().mac = None;
    let again = node.kernel.apply(&plan, &node.known()).unwrap();
    assert_eq!((again.writes, again.near), (0, made.near));
}

#[test]
fn hostile_names_stay_names() {
    let Some(node) = node("hostile_names_stay_names") else { return };
    for (count, id) in
        ["../../x", "a b", "%s%n", "-rf", "\u{7f}\u{1}", "nsm-near-a", "ünï"].into_iter().enumerate()
    {
        let plan = node.veth(id, &format!("nsm{count}"));
        let made = node.kernel.apply(&plan, &node.known()).unwrap();
        assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0, "{id:?}");
        let owned = node.kernel.owned(made.near.unwrap().nsid).unwrap();
        assert!(owned.iter().any(|link| link.id == id && link.side == Side::Near), "{owned:?}");
    }
    for name in
        ["", ".", "..", "a/b", "a b", "a\tb", "a\nb", "nsm%d", "eth0:1", &"x".repeat(16), &"x".repeat(40)]
    {
        let error = node.kernel.apply(&node.veth("wire-x", name), &node.known()).unwrap_err();
        assert!(matches!(error, Error::Plan(_)), "{name:?}: {error:?}");
    }
    // A name of an interface that is a setting's directory too.
    let plan = node.veth("wire-all", "all");
    assert!(matches!(node.kernel.apply(&plan, &node.known()), Err(Error::Refused { .. } | Error::Plan(_))));
}

#[test]
fn ipv6_is_switched_on_where_a_wire_needs_it() {
    let Some(node) = node("ipv6_is_switched_on_where_a_wire_needs_it") else { return };
    for ns in node.known() {
        ns.set_sysctl("net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    }
    let plan = node.veth("wire-1", "nsm.0");
    node.kernel.apply(&plan, &node.known()).unwrap();
    assert!(reaches(&node.client, &node.endpoint, "2001:db8::2"));
    assert_eq!(node.client.sysctl("net/ipv6/conf/nsm.0/disable_ipv6").unwrap().as_deref(), Some("0"));
    // A user namespace may not have that many groups; then it is left alone.
    let everybody = "0 2147483647";
    if Namespace::unnamed().unwrap().set_sysctl("net/ipv4/ping_group_range", everybody).is_ok() {
        assert!(!node.endpoint.set_sysctl("net/ipv4/ping_group_range", everybody).unwrap(), "is set already");
    }
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);
    assert!(!node.client.set_sysctl("net/ipv6/conf/nsm.0/disable_ipv6", "0").unwrap());
    assert_eq!(node.client.sysctl("net/ipv4/no_such").unwrap(), None);
    assert!(node.client.set_sysctl("net/ipv4/no_such", "1").is_err());
    assert!(node.client.sysctl("net/../../self/status").is_err());
}

#[test]
fn policies_lead_to_tables_of_their_own() {
    let Some(node) = node("policies_lead_to_tables_of_their_own") else { return };
    let context = IpContext {
        src_addrs: ["172.16.1.101/32", "172.16.2.201/24", "2004::3/120"].map(String::from).to_vec(),
        dst_addrs: vec!["172.16.1.100/32".into()],
        policies: vec![
            policy("172.16.2.201/24", "6", "", "6666", &[("172.16.3.0/24", "172.16.2.200")]),
            policy("172.16.2.201/24", "6", "5555", "", &[("172.16.3.0/24", "")]),
            policy("", "17", "", "6666", &[("172.16.4.0/24", "172.16.1.100")]),
            policy("", "17", "", "6668-6669", &[]),
            policy("2004::3/120", "17", "", "5555", &[("2004::5/120", "2004::6")]),
            policy("2004::3/120", "17", "", "5556", &[]),
        ],
        ..IpContext::default()
    };
    let near =
        EndPlan::new(Side::Near, node.client.id(), "nsm0", "w").with_context(Side::Near, &context).unwrap();
    let far =
        EndPlan::new(Side::Far, node.endpoint.id(), "nse0", "w").with_context(Side::Far, &context).unwrap();
    let mut plan = WirePlan::veth("w", near, far);
    // A table that is in use by somebody else.
    output(&node.client, "ip link set lo up");
    output(&node.client, "ip route add 10.1.0.0/16 dev lo table 3");
    node.kernel.apply(&plan, &node.known()).unwrap();
    assert_eq!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), []);
    assert_eq!(node.kernel.apply(&plan, &node.known()).unwrap().writes, 0);
    // The upstream sample (data-plane 5.2), with table 3 left out.
    for (question, answer) in [
        (
            "ip route get 172.16.3.1 from 172.16.2.201 ipproto tcp dport 6666",
            "via 172.16.2.200 dev nsm0 table 1",
        ),
        ("ip route get 172.16.3.1 from 172.16.2.201 ipproto tcp sport 5555", "dev nsm0 table 2"),
        ("ip route get 172.16.4.1 ipproto udp dport 6666", "via 172.16.1.100 dev nsm0 table 4"),
        ("ip route get 172.16.4.1 ipproto udp dport 6668", "dev nsm0 table 5"),
        ("ip route get 2004::5 from 2004::3 ipproto udp dport 5555", "via 2004::6 dev nsm0 table 6"),
        ("ip route get 2005::5 from 2004::3 ipproto udp dport 5556", "dev nsm0 table 7"),
    ] {
        let got = output(&node.client, question);
        assert!(got.contains(answer), "{question}: {got}");
    }

    // Only the routes of one change: upstream misses that.
    let near = plan.near.as_mut().unwrap();
    near.policies[0].routes[0].via = Some("172.16.2.199".parse().unwrap());
    near.policies.remove(1);
    node.kernel.apply(&plan, &node.known()).unwrap();
    assert_eq!(difference(&plan, &node.kernel.snapshot(&plan, &node.known()).unwrap()), []);
    let got = output(&node.client, "ip route get 172.16.3.1 from 172.16.2.201 ipproto tcp dport 6666");
    assert!(got.contains("via 172.16.2.199"), "{got}");

    // A link that was deleted by somebody leaves its rules; the wire that is made anew does not add to them.
    output(&node.client, "ip link del nsm0");
    let made = node.kernel.apply(&plan, &node.known()).unwrap();
    let rules = |family| output(&node.client, &format!("ip {family} rule")).matches("proto 78").count();
    assert_eq!((rules("-4"), rules("-6")), (3, 2), "{}", output(&node.client, "ip rule"));
    node.kernel.remove(&plan, nsids(&made), &node.known()).unwrap();
    assert_eq!((rules("-4"), rules("-6")), (0, 0));
}

fn policy(from: &str, proto: &str, src_port: &str, dst_port: &str, routes: &[(&str, &str)]) -> ContextPolicy {
    let route = |(prefix, next_hop): &(&str, &str)| ContextRoute {
        prefix: (*prefix).into(),
        next_hop: (*next_hop).into(),
    };
    ContextPolicy {
        from: from.into(),
        proto: proto.into(),
        src_port: src_port.into(),
        dst_port: dst_port.into(),
        routes: routes.iter().map(route).collect(),
    }
}

#[test]
fn many_wires_of_one_pod_at_once() {
    let Some(node) = node("many_wires_of_one_pod_at_once") else { return };
    let plans: Vec<_> = (0..16u8)
        .map(|n| {
            let mut plan = node.veth(&format!("wire-{n}"), &format!("nsm{n}"));
            let near = plan.near.as_mut().unwrap();
            near.addresses = vec![net(&format!("10.{n}.0.1/32"))];
            near.routes = vec![Route::to_peer(net(&format!("10.{n}.0.2/32")))];
            let when = Selector { from: Some(net(&format!("10.{n}.0.1/32"))), ..Selector::default() };
            near.policies = vec![Policy { when, routes: Vec::new() }];
            let far = plan.far.as_mut().unwrap();
            far.addresses = vec![net(&format!("10.{n}.0.2/32"))];
            far.routes = vec![Route::to_peer(net(&format!("10.{n}.0.1/32")))];
            plan
        })
        .collect();
    let made = std::thread::scope(|scope| {
        let threads: Vec<_> = plans
            .iter()
            .map(|plan| scope.spawn(|| node.kernel.apply(plan, &node.known()).unwrap()))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    for (n, plan) in plans.iter().enumerate() {
        assert_eq!(difference(plan, &node.kernel.snapshot(plan, &node.known()).unwrap()), []);
        assert!(reaches(&node.client, &node.endpoint, &format!("10.{n}.0.2")), "{n}");
    }
    for (plan, made) in plans.iter().zip(&made) {
        node.kernel.remove_later(plan, nsids(made), &node.known(), drop);
    }
    node.kernel.flush();
    assert_eq!(output(&node.client, "ip -br link").lines().count(), 1);
    assert_eq!(output(&node.client, "ip rule").matches("proto 78").count(), 0);
}

#[test]
fn a_wire_that_is_made_again_while_it_is_being_deleted_stays() {
    let Some(node) = node("a_wire_that_is_made_again_while_it_is_being_deleted_stays") else { return };
    let plan = |n: u8, far: &str| {
        let mut plan = node.veth(&format!("wire-{n}"), &format!("nsm{n}"));
        plan.far.as_mut().unwrap().ifname = format!("{far}{n}");
        plan
    };
    // As planned before, so it could be adopted while it is doomed; and with a new far end under the same mark.
    for far in ["same", "other"] {
        let made: Vec<_> =
            (0..60).map(|n| (n, node.kernel.apply(&plan(n, "same"), &node.known()).unwrap())).collect();
        for (n, made) in &made {
            node.kernel.remove_later(&plan(*n, "same"), nsids(made), &[], drop);
        }
        let again: Vec<_> =
            (0..60).map(|n| (n, node.kernel.apply(&plan(n, far), &node.known()).unwrap())).collect();
        node.kernel.flush();
        let whole = again.iter().filter(|(n, made)| {
            let facts = node.kernel.facts(&format!("wire-{n}"), nsids(made));
            made.created && matches!(facts, Ok((Some(near), Some(far))) if near.up && far.up)
        });
        assert_eq!(whole.count(), 60, "{far}");
        for (n, made) in &again {
            node.kernel.remove(&plan(*n, far), nsids(made), &[]).unwrap();
        }
    }
}
