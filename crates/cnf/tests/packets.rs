//! Functions in a real kernel, with real packets from real sockets in the client's and the endpoint's namespaces.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

#[path = "../../kernel/tests/common/mod.rs"]
mod common;
#[path = "../../kernel/tests/common/frames.rs"]
mod frames;

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Node, far_wire, near_wire, node, output, reaches};
use frames::{Frames, arp, frame};
use nsm_cnf::filter::Unfiltered;
use nsm_cnf::rules::Rules;
use nsm_cnf::works::{Role, Works};
use nsm_kernel::join::{Join, Layer};
use nsm_kernel::joiner::State;
use nsm_kernel::netns::Namespace;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, sockopt};

const CLIENT: [&str; 2] = ["172.16.1.3", "2001:db8::3"];
const ENDPOINT: [&str; 2] = ["172.16.1.2", "2001:db8::2"];

/// Longer than anything takes that shall happen.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long something is waited for that shall not happen.
const BRIEFLY: Duration = Duration::from_millis(300);

const EXAMPLE: &str = r#"
aclRules:
  "Allow ICMP": "action=reflect,icmptype=8"
  "Allow TCP 80": "action=reflect,tcplowport=80,tcpupport=80"
"#;

fn firewall(rules: &str) -> Role {
    Role::Firewall { rules: Rules::parse(rules).unwrap(), unfiltered: Unfiltered::default() }
}

/// A client, a function and an endpoint, wired up.
struct Chain {
    node: Node,
    function: Namespace,
}

fn layers() -> [Layer; 2] {
    let of = |texts: [&str; 2]| texts.map(|text| text.parse::<IpAddr>().unwrap()).to_vec();
    [Layer::Ethernet { filtered: false }, Layer::Ip { near: of(CLIENT), far: of(ENDPOINT) }]
}

impl Chain {
    fn new(test: &str) -> Option<Self> {
        let node = node(test)?;
        let function = Namespace::unnamed().unwrap();
        near_wire(&node, &function, "nsm0", "in");
        far_wire(&node, &function, "out", "nse");
        // Own addresses are reached by it.
        for ns in [&node.client, &node.endpoint] {
            output(ns, "ip link set lo up");
        }
        Some(Self { node, function })
    }

    fn start(&self, role: Role) -> Arc<Works> {
        self.function.run(|| Works::start(role)).unwrap().unwrap()
    }

    /// A chain whose function has this role, joined at this layer.
    fn joined(test: &str, role: Role, layer: &Layer) -> Option<(Self, Arc<Works>)> {
        let chain = Self::new(test)?;
        let works = chain.start(role);
        join(&works, "in", "out", layer);
        Some((chain, works))
    }

    fn client(&self) -> &Namespace {
        &self.node.client
    }

    fn endpoint(&self) -> &Namespace {
        &self.node.endpoint
    }

    fn ruleset(&self) -> String {
        output(&self.function, "nft -a list ruleset")
    }
}

fn join(works: &Works, near: &str, far: &str, layer: &Layer) {
    works.join(Join { near: near.into(), far: far.into(), layer: layer.clone() }).unwrap();
    let start = Instant::now();
    while works.state(near) != Some(State::Joined) {
        assert!(start.elapsed() < PATIENCE, "{:?}", works.state(near));
        std::thread::yield_now();
    }
}

fn stop(works: Arc<Works>) {
    Arc::into_inner(works).unwrap().stop().unwrap();
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Whether a connection comes about and carries something there and back.
fn tcp(from: &Namespace, to: &Namespace, address: &str, port: u16, wait: Duration) -> bool {
    use std::io::{Read as _, Write as _};
    let server = to.run(|| TcpListener::bind(at(address, port))).unwrap().unwrap();
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut question = [0; 4];
        // The one that ends the wait says nothing.
        if stream.read_exact(&mut question).is_ok() {
            stream.write_all(b"pong").unwrap();
        }
    });
    let client = from.run(|| TcpStream::connect_timeout(&at(address, port), wait)).unwrap();
    let passed = client.is_ok_and(|mut stream| {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"ping").unwrap();
        stream.read_exact(&mut [0; 4]).is_ok()
    });
    if !passed {
        drop(to.run(|| TcpStream::connect(at(address, port))).unwrap());
    }
    serving.join().unwrap();
    passed
}

/// Whether an echo request is answered.
fn ping(from: &Namespace, address: &str, wait: Duration) -> bool {
    from.set_sysctl("net/ipv4/ping_group_range", "0 2147483647").unwrap();
    let to = at(address, 0);
    let (family, protocol, kind) = match to {
        SocketAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, 8),
        SocketAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, 128),
    };
    let socket =
        from.run(|| rustix::net::socket(family, SocketType::DGRAM, Some(protocol))).unwrap().unwrap();
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(wait)).unwrap();
    rustix::net::sendto(&socket, &[kind, 0, 0, 0, 0, 1, 0, 1], SendFlags::empty(), &to).unwrap();
    rustix::net::recv(&socket, &mut [0u8; 64][..], RecvFlags::empty()).is_ok()
}

/// A UDP socket that waits briefly, until it is told otherwise.
fn udp(ns: &Namespace, address: SocketAddr) -> UdpSocket {
    let socket = ns.run(|| UdpSocket::bind(address)).unwrap().unwrap();
    socket.set_read_timeout(Some(BRIEFLY)).unwrap();
    socket
}

/// Whether a datagram from one socket gets to the other.
fn passes(from: &UdpSocket, to: &UdpSocket, wait: Duration) -> bool {
    to.set_read_timeout(Some(wait)).unwrap();
    from.send_to(b"hello", to.local_addr().unwrap()).unwrap();
    to.recv(&mut [0; 8]).is_ok()
}

#[test]
fn a_passthrough_lets_everything_pass_in_both_directions() {
    let test = "a_passthrough_lets_everything_pass_in_both_directions";
    for layer in layers() {
        let Some((chain, works)) = Chain::joined(test, Role::Passthrough, &layer) else { return };
        for (client, endpoint) in CLIENT.into_iter().zip(ENDPOINT) {
            assert!(ping(chain.client(), endpoint, PATIENCE) && ping(chain.endpoint(), client, PATIENCE));
            assert!(tcp(chain.client(), chain.endpoint(), endpoint, 8080, PATIENCE));
            assert!(tcp(chain.endpoint(), chain.client(), client, 22, PATIENCE));
            assert!(reaches(chain.client(), chain.endpoint(), endpoint));
        }
        stop(works);
    }
}

#[test]
fn the_example_lets_ping_and_80_pass_and_nothing_else() {
    let test = "the_example_lets_ping_and_80_pass_and_nothing_else";
    for layer in layers() {
        let Some((chain, works)) = Chain::joined(test, firewall(EXAMPLE), &layer) else { return };
        for (client, endpoint) in CLIENT.into_iter().zip(ENDPOINT) {
            assert!(ping(chain.client(), endpoint, PATIENCE), "{layer:?} {endpoint}\n{}", chain.ruleset());
            assert!(tcp(chain.client(), chain.endpoint(), endpoint, 80, PATIENCE), "{layer:?} {endpoint}");
            assert!(!tcp(chain.client(), chain.endpoint(), endpoint, 8080, BRIEFLY), "{layer:?} {endpoint}");
            assert!(!reaches(chain.client(), chain.endpoint(), endpoint), "{layer:?} {endpoint}");
            // Nothing begins at the far side.
            assert!(!ping(chain.endpoint(), client, BRIEFLY), "{layer:?} {client}");
            assert!(!tcp(chain.endpoint(), chain.client(), client, 80, BRIEFLY), "{layer:?} {client}");
        }
        stop(works);
    }
}

#[test]
fn upstream_s_sample_permits_without_state() {
    let rules = "
allow icmp: {proto: 1, srcportoricmptypelast: 65535, dstportoricmpcodelast: 65535, ispermit: 1}
allow tcp8080: {proto: 6, srcportoricmptypelast: 65535, dstportoricmpcodefirst: 8080, dstportoricmpcodelast: 8080, ispermit: 1}
forbid tcp80: {proto: 6, srcportoricmptypelast: 65535, dstportoricmpcodefirst: 80, dstportoricmpcodelast: 80}
";
    for layer in layers() {
        let Some((chain, works)) =
            Chain::joined("upstream_s_sample_permits_without_state", firewall(rules), &layer)
        else {
            return;
        };
        for (client, endpoint) in CLIENT.into_iter().zip(ENDPOINT) {
            assert!(ping(chain.client(), endpoint, PATIENCE) && ping(chain.endpoint(), client, PATIENCE));
            assert!(tcp(chain.client(), chain.endpoint(), endpoint, 8080, PATIENCE));
            assert!(!tcp(chain.client(), chain.endpoint(), endpoint, 80, BRIEFLY));
        }
        stop(works);
    }
}

#[test]
fn a_reflected_flow_is_answered_and_a_permitted_one_need_not_be_asked() {
    let test = "a_reflected_flow_is_answered_and_a_permitted_one_need_not_be_asked";
    for layer in layers() {
        for (action, unasked) in [("reflect", false), ("permit", true)] {
            let rules = format!("aclRules: {{dns: \"action={action},udplowport=53,udpupport=53\"}}");
            let Some((chain, works)) = Chain::joined(test, firewall(&rules), &layer) else { return };
            for (client, endpoint) in CLIENT.into_iter().zip(ENDPOINT) {
                let client = udp(chain.client(), at(client, 4000));
                let dns = udp(chain.endpoint(), at(endpoint, 53));
                let other = udp(chain.endpoint(), at(endpoint, 54));
                let wait = if unasked { PATIENCE } else { BRIEFLY };
                assert_eq!(passes(&dns, &client, wait), unasked, "{action} {layer:?}");
                assert!(passes(&client, &dns, PATIENCE), "{action} {layer:?}");
                assert!(passes(&dns, &client, PATIENCE), "{action} {layer:?}");
                assert!(
                    !passes(&other, &client, BRIEFLY) && !passes(&client, &other, BRIEFLY),
                    "{action} {layer:?}"
                );
            }
            stop(works);
        }
    }
}

#[test]
fn the_first_rule_that_matches_decides_and_prefixes_count() {
    let rules = "
no telnet: {proto: 6, dstportoricmpcodefirst: 23, dstportoricmpcodelast: 23}
v4 only: {ispermit: 2, proto: 6, dstprefix: 172.16.1.0/29, dstportoricmpcodefirst: 20, dstportoricmpcodelast: 25}
v6 only: {ispermit: 2, proto: 6, srcprefix: 2001:db8::3, dstportoricmpcodefirst: 30, dstportoricmpcodelast: 30}
elsewhere: {ispermit: 2, srcprefix: 10.0.0.0/8}
";
    for layer in layers() {
        let test = "the_first_rule_that_matches_decides_and_prefixes_count";
        let Some((chain, works)) = Chain::joined(test, firewall(rules), &layer) else { return };
        for (port, wanted) in
            [(22, [true, false]), (23, [false, false]), (25, [true, false]), (30, [false, true])]
        {
            for (endpoint, wanted) in ENDPOINT.into_iter().zip(wanted) {
                let wait = if wanted { PATIENCE } else { BRIEFLY };
                let passed = tcp(chain.client(), chain.endpoint(), endpoint, port, wait);
                assert_eq!(passed, wanted, "{port} {layer:?}");
            }
        }
        assert!(!ping(chain.client(), ENDPOINT[0], BRIEFLY));
        stop(works);
    }
}

#[test]
fn frames_that_rules_cannot_judge_are_dropped_unless_configured() {
    let test = "frames_that_rules_cannot_judge_are_dropped_unless_configured";
    let rules = "aclRules: {all: \"action=permit\"}";
    for (tagged, unknown) in [(false, false), (true, false), (false, true)] {
        let unfiltered = Unfiltered { tagged, unknown };
        let role = Role::Firewall { rules: Rules::parse(rules).unwrap(), unfiltered };
        let Some((chain, works)) = Chain::joined(test, role, &layers()[0]) else { return };
        let (client, endpoint) =
            (Frames::open(chain.client(), "nsm0"), Frames::open(chain.endpoint(), "nse"));
        let all = [0xff; 6];
        for (name, frame, passes) in [
            ("a tagged frame", frame(all, &[frames::VLAN, frames::IPV4], "a tagged frame"), tagged),
            ("a v6 frame in a tag", frame(all, &[frames::VLAN, frames::IPV6], "a v6 frame in a tag"), tagged),
            (
                "a tag in a tag",
                frame(all, &[frames::QINQ, frames::VLAN, frames::IPV4], "a tag in a tag"),
                tagged,
            ),
            ("an ARP in a tag", frame(all, &[frames::VLAN, frames::ARP], "an ARP in a tag"), tagged),
            ("PPPoE", frame(all, &[frames::PPPOE], "PPPoE"), unknown),
            ("MPLS", frame(all, &[frames::MPLS], "MPLS"), unknown),
            ("LLDP", frame([0x01, 0x80, 0xc2, 0, 0, 0x0e], &[frames::LLDP], "LLDP"), unknown),
            ("experimental", frame(all, &[0x88b5], "experimental"), unknown),
            ("no ethertype", frame(all, &[40], "no ethertype"), unknown),
        ] {
            for (from, to) in [(&client, &endpoint), (&endpoint, &client)] {
                from.send(&frame);
                from.send(&arp("the last one")); // ARP passes
                let seen = to.seen_before(name.as_bytes(), b"the last one");
                assert_eq!(seen, passes, "{name} with {unfiltered:?}\n{}", chain.ruleset());
            }
        }
        stop(works);
    }
}

#[test]
fn the_function_itself_is_neither_reached_nor_heard() {
    let test = "the_function_itself_is_neither_reached_nor_heard";
    for layer in layers() {
        for role in [Role::Passthrough, firewall("aclRules: {all: \"action=permit\"}")] {
            let Some((chain, works)) = Chain::joined(test, role, &layer) else { return };
            output(&chain.function, "ip link set lo up");
            output(&chain.function, "ip addr add 10.9.0.1/32 dev lo");
            output(&chain.function, "ip -6 addr add 2001:db8:9::1/128 dev lo");
            let route = |ip: &str, via: &str| {
                output(chain.client(), &format!("ip route add {ip} via {via} dev nsm0 onlink"));
            };
            route("10.9.0.1", ENDPOINT[0]);
            route("2001:db8:9::1", ENDPOINT[1]);
            for (own, endpoint, client) in
                [("10.9.0.1", ENDPOINT[0], CLIENT[0]), ("2001:db8:9::1", ENDPOINT[1], CLIENT[1])]
            {
                let inside = udp(&chain.function, at(own, 7));
                assert!(!passes(&udp(chain.client(), at(client, 0)), &inside, BRIEFLY), "{layer:?}");
                assert!(ping(chain.client(), endpoint, PATIENCE));
            }
            if !layer.is_ethernet() {
                // It has an address after all, that of the link.
                let near = output(&chain.function, "ip -6 -br addr show dev in");
                let own: std::net::Ipv6Addr =
                    near.split_whitespace().nth(2).unwrap().split('/').next().unwrap().parse().unwrap();
                let inside = udp(&chain.function, at("::", 9));
                let link = output(chain.client(), "ip -o link show dev nsm0");
                let index = link.split(':').next().unwrap().parse().unwrap();
                let to = SocketAddr::V6(std::net::SocketAddrV6::new(own, 9, 0, index));
                udp(chain.client(), at("::", 0)).send_to(b"hello", to).unwrap();
                assert!(inside.recv(&mut [0; 8]).is_err());
                continue;
            }
            // By the hardware address that it would be reached by, too.
            let links = output(&chain.function, "ip -br link");
            let bridge = links.lines().find(|line| line.starts_with("nsm-")).unwrap();
            let mac = bridge.split_whitespace().nth(2).unwrap();
            output(chain.client(), &format!("ip neigh replace {} lladdr {mac} dev nsm0", ENDPOINT[0]));
            let inside = udp(&chain.function, at("10.9.0.1", 8));
            assert!(!passes(&udp(chain.client(), at(CLIENT[0], 0)), &inside, BRIEFLY));
            stop(works);
        }
    }
}

#[test]
fn joins_with_the_same_addresses_share_no_connections() {
    let test = "joins_with_the_same_addresses_share_no_connections";
    let rules = "aclRules: {web: \"action=reflect,udplowport=53,udpupport=53\"}";
    for layer in layers() {
        let (Some(one), Some(two)) = (Chain::new(test), node(test)) else { return };
        near_wire(&two, &one.function, "nsm0", "in2");
        far_wire(&two, &one.function, "out2", "nse");
        let works = one.start(firewall(rules));
        join(&works, "in", "out", &layer);
        join(&works, "in2", "out2", &layer);
        for (client, endpoint) in CLIENT.into_iter().zip(ENDPOINT) {
            let clients = [one.client(), &two.client].map(|ns| udp(ns, at(client, 4000)));
            let servers = [one.endpoint(), &two.endpoint].map(|ns| udp(ns, at(endpoint, 53)));
            assert!(
                passes(&clients[0], &servers[0], PATIENCE) && passes(&servers[0], &clients[0], PATIENCE),
                "{layer:?}"
            );
            assert!(servers[1].recv(&mut [0; 8]).is_err());
            // The very same flow, but nobody asked for it on this wire.
            assert!(!passes(&servers[1], &clients[1], BRIEFLY), "{layer:?}\n{}", one.ruleset());
            assert!(
                passes(&clients[1], &servers[1], PATIENCE) && passes(&servers[1], &clients[1], PATIENCE),
                "{layer:?}"
            );
            clients[0].set_read_timeout(Some(BRIEFLY)).unwrap();
            assert!(clients[0].recv(&mut [0; 8]).is_err());
        }
        stop(works);
    }
}

/// Without the count of what no rule allows: interfaces send multicast of their own at any time, which is that.
fn but_for_drops(ruleset: &str) -> String {
    let uncounted = |line: &&str| !line.contains("no rule allows it");
    ruleset.lines().filter(uncounted).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_restart_finds_equal_rules_and_writes_nothing() {
    let test = "a_restart_finds_equal_rules_and_writes_nothing";
    for layer in layers() {
        let Some((chain, works)) = Chain::joined(test, firewall(EXAMPLE), &layer) else { return };
        assert!(ping(chain.client(), ENDPOINT[0], PATIENCE));
        let before = chain.ruleset();
        assert!(before.contains("counter packets 1 "), "{before}");
        // As a crash: nothing is cleaned up.
        drop(works);
        assert!(ping(chain.client(), ENDPOINT[0], PATIENCE));
        let counted = but_for_drops(&chain.ruleset());
        let works = chain.start(firewall(EXAMPLE));
        // Handles and counters are what they were.
        assert_eq!(but_for_drops(&chain.ruleset()), counted);
        join(&works, "in", "out", &layer);
        assert_eq!(but_for_drops(&chain.ruleset()), counted);
        assert!(ping(chain.client(), ENDPOINT[0], PATIENCE));
        assert!(!tcp(chain.client(), chain.endpoint(), ENDPOINT[0], 8080, BRIEFLY));
        stop(works);
        assert_eq!(chain.ruleset(), "");
        assert!(!output(&chain.function, "ip -br link").contains("nsm-"));
        assert!(!ping(chain.client(), ENDPOINT[0], BRIEFLY));
    }
}

#[test]
fn old_connections_have_to_pass_new_rules() {
    let test = "old_connections_have_to_pass_new_rules";
    let rules = |port: u16| format!("aclRules: {{r: \"action=reflect,udplowport={port},udpupport={port}\"}}");
    for layer in layers() {
        let Some((chain, works)) = Chain::joined(test, firewall(&rules(53)), &layer) else { return };
        let (client, server) =
            (udp(chain.client(), at(CLIENT[0], 4000)), udp(chain.endpoint(), at(ENDPOINT[0], 53)));
        assert!(passes(&client, &server, PATIENCE) && passes(&server, &client, PATIENCE));
        drop(works);
        let works = chain.start(firewall(&rules(54)));
        assert!(
            !passes(&server, &client, BRIEFLY) && !passes(&client, &server, BRIEFLY),
            "{}",
            chain.ruleset()
        );
        drop(works);
        let works = chain.start(firewall(&rules(53)));
        assert!(passes(&client, &server, PATIENCE) && passes(&server, &client, PATIENCE));
        stop(works);
    }
}

#[test]
fn nothing_passes_before_the_filter_or_after_the_join() {
    let test = "nothing_passes_before_the_filter_or_after_the_join";
    for layer in layers() {
        let Some((chain, works)) =
            Chain::joined(test, firewall("aclRules: {all: \"action=permit\"}"), &layer)
        else {
            return;
        };
        assert!(ping(chain.client(), ENDPOINT[0], PATIENCE));
        works.part("in").unwrap();
        assert!(!ping(chain.client(), ENDPOINT[0], BRIEFLY));
        assert!(!chain.ruleset().contains("\"in\""), "{}", chain.ruleset());
        // The same interfaces by another hand, without a filter of their own: the firewall's namespace forwards nothing.
        output(&chain.function, "ip link add br0 type bridge nf_call_iptables 1 nf_call_ip6tables 1");
        output(&chain.function, "ip link set br0 up");
        for port in ["in", "out"] {
            output(&chain.function, &format!("ip link set {port} master br0"));
        }
        assert!(!ping(chain.client(), ENDPOINT[0], BRIEFLY));
        stop(works);
    }
}

#[test]
fn ethernet_is_refused_where_bridges_cannot_be_filtered() {
    let test = "ethernet_is_refused_where_bridges_cannot_be_filtered";
    let Some(chain) = Chain::new(test) else { return };
    // A kernel without br_netfilter has no such directory; here an empty one hides it.
    common::with_private_run(|| {
        use rustix::mount::{MountFlags, mount};
        mount("tmpfs", "/proc/sys/net/bridge", "tmpfs", MountFlags::empty(), None).unwrap();
        let works = chain.start(firewall(EXAMPLE));
        let join =
            |layer: &Layer| works.join(Join { near: "in".into(), far: "out".into(), layer: layer.clone() });
        let [ethernet, ip] = layers();
        let error = join(&ethernet).unwrap_err().to_string();
        assert!(error.contains("modprobe br_netfilter"), "{error}");
        assert_eq!(works.state("in"), None);
        join(&ip).unwrap();
        stop(works);
    });
}
