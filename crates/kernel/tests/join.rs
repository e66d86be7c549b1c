//! Joined interfaces in a real kernel: frames and packets pass as they should, and joins follow their interfaces.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod common;
#[path = "common/frames.rs"]
mod frames;

use std::net::IpAddr;
use std::time::Duration;

use common::{Node, bare, far_wire, made, near_wire, node, nsids, output, reaches};
use frames::{Frames, arp, frame};
use nsm_kernel::join::{self, Join, Layer};
use nsm_kernel::joiner::{Joiner, State};
use nsm_kernel::netlink::{Route, Socket};
use nsm_kernel::netns::Namespace;
use nsm_kernel::plan::{Side, WirePlan};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(10);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn layer_2() -> Layer {
    Layer::Ethernet { filtered: false }
}

fn layer_3() -> Layer {
    let of = |texts: [&str; 2]| texts.map(ip).to_vec();
    Layer::Ip { near: of(["172.16.1.3", "2001:db8::3"]), far: of(["172.16.1.2", "2001:db8::2"]) }
}

fn join(near: &str, far: &str, layer: Layer) -> Join {
    Join { near: near.into(), far: far.into(), layer }
}

fn start(ns: &Namespace) -> Joiner {
    ns.run(Joiner::start).unwrap().unwrap()
}

fn both_families(node: &Node) {
    for address in ["172.16.1.2", "2001:db8::2"] {
        assert!(reaches(&node.client, &node.endpoint, address), "{address} is not reached");
    }
    for address in ["172.16.1.3", "2001:db8::3"] {
        assert!(reaches(&node.endpoint, &node.client, address), "{address} is not reached");
    }
}

#[test]
fn a_join_comes_about_in_either_order_and_goes_with_an_interface() {
    let test = "a_join_comes_about_in_either_order_and_goes_with_an_interface";
    for layer in [layer_2(), layer_3()] {
        for near_first in [true, false] {
            let Some(node) = node(test) else { return };
            let function = Namespace::unnamed().unwrap();
            let before = output(&function, "ip rule") + &output(&function, "ip -6 rule");
            let joiner = start(&function);
            let join = join("in", "out", layer.clone());
            if near_first {
                near_wire(&node, &function, "nsm0", "in");
                joiner.want(join.clone());
                assert!(joiner.wait("in", Some(&State::Waiting), PATIENCE));
                far_wire(&node, &function, "out", "nse");
            } else {
                joiner.want(join.clone());
                far_wire(&node, &function, "out", "nse");
                assert!(joiner.wait("in", Some(&State::Waiting), PATIENCE));
                near_wire(&node, &function, "nsm0", "in");
            }
            assert!(joiner.wait("in", Some(&State::Joined), PATIENCE), "{:?}", joiner.state("in"));
            both_families(&node);

            // Asked for again it changes nothing.
            joiner.want(join);
            assert!(joiner.wait("in", Some(&State::Joined), PATIENCE));

            let wire = node.client.run(|| "nsm0".to_owned()).unwrap();
            output(&node.client, &format!("ip link del {wire}"));
            assert!(joiner.wait("in", Some(&State::Waiting), PATIENCE));
            let links = output(&function, "ip -br link");
            assert!(!links.contains("nsm-") && links.contains("out"), "{links}");

            // It comes back by itself.
            near_wire(&node, &function, "nsm0", "in");
            assert!(joiner.wait("in", Some(&State::Joined), PATIENCE));
            both_families(&node);

            joiner.stop();
            let links = output(&function, "ip -br link");
            assert!(!links.contains("nsm-") && links.contains("out"), "{links}");
            assert_eq!(output(&function, "ip rule") + &output(&function, "ip -6 rule"), before);
            let routes = output(&function, "ip route show table all proto 79");
            assert_eq!(routes + &output(&function, "ip -6 route show table all proto 79"), "");
            assert_eq!(output(&function, "ip -6 neigh show proxy"), "");
        }
    }
}

#[test]
fn frames_pass_layer_2_untouched_and_nobody_else_is_heard_or_reached() {
    let Some(node) = node("frames_pass_layer_2_untouched_and_nobody_else_is_heard_or_reached") else {
        return;
    };
    let function = Namespace::unnamed().unwrap();
    near_wire(&node, &function, "nsm0", "in");
    far_wire(&node, &function, "out", "nse");
    output(&function, "ip addr add 192.0.2.99/32 dev lo");
    output(&function, "ip link set lo up");
    let joiner = start(&function);
    joiner.want(join("in", "out", layer_2()));
    assert!(joiner.wait("in", Some(&State::Joined), PATIENCE), "{:?}", joiner.state("in"));
    let (client, endpoint) = (Frames::open(&node.client, "nsm0"), Frames::open(&node.endpoint, "nse"));
    let group = |last| [0x01, 0x80, 0xc2, 0, 0, last];
    let cases = [
        ("tagged", frame([0xff; 6], &[frames::VLAN, frames::IPV4], "tagged")),
        ("twice", frame([0xff; 6], &[frames::QINQ, frames::VLAN, frames::IPV4], "twice")),
        ("pppoe", frame([2, 0, 0, 0, 0, 9], &[frames::PPPOE], "pppoe")),
        ("mpls", frame([2, 0, 0, 0, 0, 9], &[frames::MPLS], "mpls")),
        ("lldp", frame(group(0x0e), &[frames::LLDP], "lldp")),
        ("lacp", frame(group(0x02), &[0x8809], "lacp")),
        ("spanning-tree", frame(group(0x00), &[39], "spanning-tree")),
        ("garbage-in-ip", frame([0xff; 6], &[frames::IPV4], "garbage-in-ip")),
    ];
    for (name, frame) in &cases {
        for (from, to) in [(&client, &endpoint), (&endpoint, &client)] {
            from.send(frame);
            from.send(&arp("the last one"));
            assert!(to.seen_before(name.as_bytes(), b"the last one"), "{name}");
        }
    }
    // An address of the function's own is not answered for.
    let mut question = arp("");
    question.truncate(38);
    question.extend([192, 0, 2, 99]);
    client.send(&question);
    endpoint.send(&arp("after the answer"));
    let answer = [192, 0, 2, 99, 2, 0, 0, 0, 0, 0x77];
    assert!(!client.seen_before(&answer, b"after the answer"));
    joiner.stop();
}

#[test]
fn functions_stand_in_a_row_at_layer_3() {
    let Some(node) = node("functions_stand_in_a_row_at_layer_3") else { return };
    let (first, second) = (Namespace::unnamed().unwrap(), Namespace::unnamed().unwrap());
    let (joiner, other) = (start(&first), start(&second));
    joiner.want(join("in", "out", layer_3()));
    other.want(join("a", "b", layer_3()));
    near_wire(&node, &first, "nsm0", "in");
    far_wire(&node, &second, "b", "nse");
    made(
        &node,
        WirePlan::veth("mid", bare(Side::Near, &first, "out"), bare(Side::Far, &second, "a")),
        &[&first, &second],
    );
    assert!(joiner.wait("in", Some(&State::Joined), PATIENCE), "{:?}", joiner.state("in"));
    assert!(other.wait("a", Some(&State::Joined), PATIENCE), "{:?}", other.state("a"));
    // Strict return paths and own addresses in the pods change nothing.
    for ns in [&first, &second] {
        ns.set_sysctl("net/ipv4/conf/all/rp_filter", "1").unwrap();
        output(ns, "ip link set lo up");
        output(ns, "ip addr add 10.9.0.1/32 dev lo");
    }
    both_families(&node);
    // What is behind the endpoint is reached through it, although both pods have the same address themselves.
    output(&node.endpoint, "ip link set lo up");
    output(&node.endpoint, "ip addr add 10.9.0.1/32 dev lo");
    output(&node.client, "ip route add 10.9.0.0/24 via 172.16.1.2 dev nsm0 onlink");
    assert!(reaches(&node.client, &node.endpoint, "10.9.0.1"));
    // A client that announces itself is not contradicted.
    assert!(!output(&first, "ip neigh show proxy").contains("172.16.1.3"));
}

#[test]
fn two_joins_in_one_function_do_not_mix() {
    let test = "two_joins_in_one_function_do_not_mix";
    for layer in [layer_2(), layer_3()] {
        // Two clients and two endpoints with the very same addresses.
        let (Some(one), Some(two)) = (node(test), node(test)) else { return };
        let function = Namespace::unnamed().unwrap();
        let joiner = start(&function);
        for (node, near, far) in [(&one, "in1", "out1"), (&two, "in2", "out2")] {
            near_wire(node, &function, "nsm0", near);
            far_wire(node, &function, far, "nse");
            joiner.want(join(near, far, layer.clone()));
            assert!(joiner.wait(near, Some(&State::Joined), PATIENCE), "{:?}", joiner.state(near));
        }
        both_families(&one);
        both_families(&two);
        joiner.forget("in1");
        assert!(joiner.wait("in1", None, PATIENCE));
        both_families(&two);
        assert_eq!(joiner.state("in2"), Some(State::Joined));
        // With the first endpoint unplugged nobody answers the first client, least of all the second endpoint.
        let server = two.endpoint.run(|| std::net::UdpSocket::bind("172.16.1.2:7")).unwrap().unwrap();
        server.set_nonblocking(true).unwrap();
        let client = one.client.run(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        let _ = client.send_to(b"hello", "172.16.1.2:7");
        both_families(&two);
        assert!(server.recv(&mut [0; 8]).is_err());
    }
}

#[test]
fn a_restart_adopts_what_is_joined_and_writes_nothing() {
    let test = "a_restart_adopts_what_is_joined_and_writes_nothing";
    for layer in [Layer::Ethernet { filtered: true }, layer_3()] {
        let Some(node) = node(test) else { return };
        let function = Namespace::unnamed().unwrap();
        let (plan, applied) = near_wire(&node, &function, "nsm0", "in");
        far_wire(&node, &function, "out", "nse");
        let wanted = join("in", "out", layer);
        let joiner = start(&function);
        joiner.want(wanted.clone());
        assert!(joiner.wait("in", Some(&State::Joined), PATIENCE), "{:?}", joiner.state("in"));
        drop(joiner);
        both_families(&node);

        // What it would change: nothing.
        function
            .run(|| {
                let mut socket = Socket::<Route>::open().unwrap();
                let seen = join::snapshot(&mut socket, [&wanted]).unwrap();
                let facts = join::wanted([&wanted], &seen.links).remove(0).1;
                assert_eq!(join::changes(&facts, &seen.facts), []);
            })
            .unwrap();
        let joiner = start(&function);
        assert!(joiner.wait("in", Some(&State::Joined), PATIENCE));
        assert_eq!(joiner.joins(), [wanted]);
        both_families(&node);
        // Nobody asked for it; it ends with the wire.
        node.kernel.remove(&plan, nsids(&applied), &[]).unwrap();
        assert!(joiner.wait("in", None, PATIENCE));
        assert!(!output(&function, "ip -br link").contains("nsm-"));
        assert!(output(&function, "ip rule").starts_with("0:"));
    }
}

#[test]
fn addresses_that_others_put_on_joined_interfaces_are_flushed() {
    let Some(node) = node("addresses_that_others_put_on_joined_interfaces_are_flushed") else { return };
    for layer in [layer_2(), layer_3()] {
        let function = Namespace::unnamed().unwrap();
        // As another forwarder would: it does not know that the ends of a function want none.
        output(&function, "ip link add in type veth peer out");
        output(&function, "ip link set in up");
        output(&function, "ip addr add 172.16.1.2/32 dev in");
        output(&function, "ip addr add 2001:db8::2/128 dev in nodad");
        let joiner = start(&function);
        joiner.want(join("in", "out", layer));
        assert!(joiner.wait("in", Some(&State::Joined), PATIENCE), "{:?}", joiner.state("in"));
        let addresses =
            || output(&function, "ip -o addr show dev in") + &output(&function, "ip -o addr show dev out");
        assert!(!addresses().contains("172.16.1.2"), "{}", addresses());
        assert!(!addresses().contains("2001:db8::2"), "{}", addresses());
        // Also those that come later, as at a refresh.
        output(&function, "ip addr add 172.16.1.3/32 dev out");
        let start = std::time::Instant::now();
        while addresses().contains("172.16.1.3") && start.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        assert!(!addresses().contains("172.16.1.3"), "{}", addresses());
        joiner.stop();
    }
    drop(node);
}
