//! Wires in a real kernel: made, found again, changed, removed; collisions and failures.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod common;

use common::{Pod, node, nsids, output, reaches, succeeds};
use nsm_kernel::{Kernel, difference};

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
