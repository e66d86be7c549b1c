//! A firewall's rules as nftables: pure functions from rules and joins to tables.
//!
//! ```text
//!              client ──▶ in ─────────── function ─────────── out ──▶ endpoint
//!
//!  bridge table (layer 2)   prerouting: IP gets a mark that says by which side it came, ARP passes,
//!                                       the rest is dropped unless it is allowed
//!                           input, output: the function itself is neither reached nor heard
//!  inet table               prerouting: a conntrack zone for each join, so that joins do not mix
//!                           forward:    from-client or to-client, by interfaces (layer 3) or bridge and mark
//!                                       (layer 2, where IP sees the bridge as both interfaces); all else is dropped
//!                           input:      the function itself is not reached (layer 3)
//! ```
//!
//! A `reflect` rule marks the connection of what it lets pass, and only marked connections have their answers let
//! back; the mark is a hash of the rules, so that after a restart with other rules old connections have to pass the
//! new ones. A `permit` rule keeps no state: its mirror image is a rule of `to-client`.
//!
//! The chain for forwarded packets ends with *drop*, for everything in the namespace: a function has its own.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use nsm_kernel::join::{Join, Layer};
use nsm_kernel::nft::{
    Base, Chain, Family, Hook, Policy, Rule as NftRule, Table, Term, Verdict, Version, ct,
};

use crate::rules::{ANY, ANY_PORT, Action, Ports, Rule, Rules, Traffic};

/// The name of our tables.
pub const TABLE: &str = "nsm-function";

/// What a firewall does with frames that are neither IP nor ARP. They are dropped by default: nothing looks into them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unfiltered {
    /// Frames with VLAN tags (802.1Q, 802.1ad) pass, whatever is in them.
    pub tagged: bool,
    /// Frames of other types pass (PPPoE, MPLS, LLDP, …), whatever is in them.
    pub unknown: bool,
}

/// The tables of a firewall with these joins.
pub fn firewall(rules: &Rules, unfiltered: Unfiltered, joins: &[Join]) -> Vec<Table> {
    let inet = Table {
        family: Family::Inet,
        name: TABLE.into(),
        chains: vec![
            zones(joins),
            from_client(rules),
            to_client(rules),
            Chain::base("forward", FORWARD, dispatch(joins)),
            Chain::base("input", INPUT, own_input(joins)),
        ],
    };
    let mut guard = guard(joins);
    guard.chains.push(Chain::base("prerouting", BEFORE_ALL, frames(unfiltered, joins)));
    vec![inet, guard]
}

/// The tables of a function that lets everything pass: only that the function itself is neither reached nor heard.
pub fn passthrough(joins: &[Join]) -> Vec<Table> {
    let chains = vec![Chain::base("input", INPUT, own_input(joins))];
    vec![Table { family: Family::Inet, name: TABLE.into(), chains }, guard(joins)]
}

const BEFORE_ALL: Base = Base { hook: Hook::Prerouting, priority: -300, policy: Policy::Accept };
const FORWARD: Base = Base { hook: Hook::Forward, priority: 0, policy: Policy::Drop };
const INPUT: Base = Base { hook: Hook::Input, priority: 0, policy: Policy::Accept };
const OUTPUT: Base = Base { hook: Hook::Output, priority: 0, policy: Policy::Accept };

/// Marks of packets that came to a bridge by the client's side, or by the endpoint's.
const NEAR: u32 = 0x6e73_6d01;
const FAR: u32 = 0x6e73_6d02;

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const TAGS: [u16; 2] = [0x8100, 0x88a8];

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;

// === chains ===

/// The ports of layer 2 joins, with the marks of their sides.
fn ports(joins: &[Join]) -> impl Iterator<Item = (&str, u32)> {
    joins
        .iter()
        .filter(|join| join.layer.is_ethernet())
        .flat_map(|join| [(join.near.as_str(), NEAR), (join.far.as_str(), FAR)])
}

/// The ends of layer 3 joins.
fn ends(joins: &[Join]) -> impl Iterator<Item = &str> {
    joins
        .iter()
        .filter(|join| !join.layer.is_ethernet())
        .flat_map(|join| [join.near.as_str(), join.far.as_str()])
}

fn guard(joins: &[Join]) -> Table {
    let input = ports(joins).map(|(port, _)| NftRule::new([in_if(port)], Verdict::Drop)).collect();
    let output = ports(joins).map(|(port, _)| NftRule::new([out_if(port)], Verdict::Drop)).collect();
    let chains = vec![Chain::base("input", INPUT, input), Chain::base("output", OUTPUT, output)];
    Table { family: Family::Bridge, name: TABLE.into(), chains }
}

/// Which frames get as far as IP's rules, or pass them by.
fn frames(unfiltered: Unfiltered, joins: &[Join]) -> Vec<NftRule> {
    let mut rules = Vec::new();
    for (port, mark) in ports(joins) {
        for kind in [IPV4, IPV6] {
            let terms = [in_if(port), Term::EtherType(kind), Term::SetMark(mark)];
            rules.push(NftRule::new(terms, Verdict::Accept));
        }
        rules.push(NftRule::new([in_if(port), Term::EtherType(ARP)], Verdict::Accept));
        let decide = |pass| if pass { Verdict::Accept } else { Verdict::Drop };
        for tag in TAGS {
            let terms = [in_if(port), Term::EtherType(tag), Term::Count];
            rules.push(NftRule::new(terms, decide(unfiltered.tagged)).comment("tagged"));
        }
        let rest = NftRule::new([in_if(port), Term::Count], decide(unfiltered.unknown));
        rules.push(rest.comment("neither IP nor ARP"));
    }
    rules
}

fn zones(joins: &[Join]) -> Chain {
    let mut rules = Vec::new();
    for (join, zone) in joins.iter().zip(zone_numbers(joins)) {
        let links = match join.layer {
            Layer::Ethernet { .. } => vec![join.bridge()],
            Layer::Ip { .. } => vec![join.near.clone(), join.far.clone()],
        };
        for link in links {
            rules.push(NftRule::new([Term::InIf(link), Term::SetCtZone(zone)], Verdict::Continue));
        }
    }
    Chain::base("zones", BEFORE_ALL, rules)
}

/// A zone for each join: a hash of its name, so that it is the same after a restart, or the next free one. Zone 0 is
/// that of everybody else.
fn zone_numbers(joins: &[Join]) -> Vec<u16> {
    let mut taken = BTreeSet::from([0]);
    let mut next = |join: &Join| {
        let hash = fnv(join.near.as_bytes());
        let mut zone = (hash ^ (hash >> 16)) as u16;
        // Joins are fewer than zones: each has interfaces, and a namespace has not that many.
        while !taken.insert(zone) {
            zone = zone.wrapping_add(1);
        }
        zone
    };
    joins.iter().map(&mut next).collect()
}

fn dispatch(joins: &[Join]) -> Vec<NftRule> {
    let mut rules = Vec::new();
    let (from_client, to_client) = (Verdict::Jump("from-client".into()), Verdict::Jump("to-client".into()));
    for join in joins {
        match &join.layer {
            Layer::Ethernet { .. } => {
                let bridge = join.bridge();
                for (mark, verdict) in [(NEAR, &from_client), (FAR, &to_client)] {
                    let terms = [in_if(&bridge), out_if(&bridge), Term::Mark(mark)];
                    rules.push(NftRule::new(terms, verdict.clone()));
                }
            }
            Layer::Ip { .. } => {
                rules.push(NftRule::new([in_if(&join.near), out_if(&join.far)], from_client.clone()));
                rules.push(NftRule::new([in_if(&join.far), out_if(&join.near)], to_client.clone()));
            }
        }
    }
    rules.push(NftRule::new([Term::Count], Verdict::Drop).comment("no rule allows it"));
    rules
}

/// What comes to the function itself: neighbour discovery only.
fn own_input(joins: &[Join]) -> Vec<NftRule> {
    ends(joins)
        .flat_map(|end| {
            let mut discovery = vec![in_if(end)];
            discovery.extend(discovery_terms());
            [NftRule::new(discovery, Verdict::Accept), NftRule::new([in_if(end)], Verdict::Drop)]
        })
        .collect()
}

fn from_client(rules: &Rules) -> Chain {
    let generation = generation(rules);
    let mut chain = common(generation);
    for rule in rules.iter() {
        let (extra, verdict) = match rule.action {
            Action::Deny => (Vec::new(), Verdict::Drop),
            Action::Permit => (Vec::new(), Verdict::Accept),
            Action::Reflect => {
                // What belongs to no connection, like a packet outside of any window, has no answers either.
                let state = Term::CtState(ct::NEW | ct::ESTABLISHED | ct::RELATED);
                (vec![state, Term::SetCtMark(generation)], Verdict::Accept)
            }
        };
        for mut terms in matches(rule) {
            terms.extend(extra.iter().cloned());
            terms.push(Term::Count);
            chain.push(NftRule::new(terms, verdict.clone()).comment(rule.name.clone()));
        }
    }
    Chain::new("from-client", chain)
}

fn to_client(rules: &Rules) -> Chain {
    let mut mirrored: Vec<Rule> =
        rules.iter().filter(|rule| rule.action != Action::Reflect).flat_map(mirror).collect();
    // What follows is dropped anyway.
    while mirrored.pop_if(|rule| rule.action == Action::Deny).is_some() {}
    let mut chain = common(generation(rules));
    for rule in mirrored {
        let verdict = if rule.action == Action::Permit { Verdict::Accept } else { Verdict::Drop };
        for mut terms in matches(&rule) {
            terms.push(Term::Count);
            chain.push(NftRule::new(terms, verdict.clone()).comment(format!("{}, way back", rule.name)));
        }
    }
    Chain::new("to-client", chain)
}

/// How both directions begin: what belongs to a connection that a rule has let pass, and neighbour discovery.
fn common(generation: u32) -> Vec<NftRule> {
    let known = [Term::CtMark(generation), Term::CtState(ct::ESTABLISHED | ct::RELATED), Term::Count];
    vec![
        NftRule::new(known, Verdict::Accept).comment("connections that a rule has let pass"),
        NftRule::new(discovery_terms(), Verdict::Accept).comment("neighbour discovery"),
    ]
}

/// Neighbour solicitation and advertisement that no router has passed on (RFC 4861, 7.1).
fn discovery_terms() -> [Term; 4] {
    [
        Term::Version(Version::V6),
        Term::Protocol(ICMP6),
        Term::IcmpType(Version::V6, 135..=136),
        Term::HopLimit(255),
    ]
}

// === rules ===

/// The mark of connections that these rules have let pass; never 0, which is no mark.
fn generation(rules: &Rules) -> u32 {
    let hash = fnv(rules.to_string().as_bytes());
    ((hash ^ (hash >> 32)) as u32).max(1)
}

/// A rule as matches of nftables; it takes several where IPv4 and IPv6 differ.
fn matches(rule: &Rule) -> Vec<Vec<Term>> {
    let net = rule.source.or(rule.destination);
    let versions: &[Version] = match net.as_ref().map(Version::of) {
        None => &[Version::V4, Version::V6],
        Some(Version::V4) => &[Version::V4],
        Some(Version::V6) => &[Version::V6],
    };
    let mut addresses = Vec::new();
    addresses.extend(rule.source.map(Term::Source));
    addresses.extend(rule.destination.map(Term::Destination));
    let with = |terms: Vec<Term>| addresses.iter().cloned().chain(terms).collect::<Vec<_>>();
    let ported = |protocol, source: &Ports, destination: &Ports| {
        let mut terms = vec![Term::Protocol(protocol)];
        if *source != ANY_PORT {
            terms.push(Term::SourcePort(source.clone()));
        }
        if *destination != ANY_PORT {
            terms.push(Term::DestinationPort(destination.clone()));
        }
        terms
    };
    let icmp = |version, types: RangeInclusive<u8>, codes: &RangeInclusive<u8>| {
        let protocol = if version == Version::V4 { ICMP } else { ICMP6 };
        let mut terms = vec![Term::Protocol(protocol)];
        if addresses.is_empty() {
            terms.insert(0, Term::Version(version));
        }
        if types != ANY {
            terms.push(Term::IcmpType(version, types));
        }
        if *codes != ANY {
            terms.push(Term::IcmpCode(version, codes.clone()));
        }
        with(terms)
    };
    match &rule.traffic {
        Traffic::Any => vec![with(Vec::new())],
        Traffic::Protocol(number) => vec![with(vec![Term::Protocol(*number)])],
        Traffic::Udp { source, destination } => vec![with(ported(UDP, source, destination))],
        Traffic::Tcp { source, destination, flags } => {
            let mut terms = ported(TCP, source, destination);
            terms.extend(flags.map(|(mask, value)| Term::TcpFlags { mask, value }));
            vec![with(terms)]
        }
        Traffic::Icmp { types, codes } => versions
            .iter()
            .flat_map(|version| match version {
                Version::V4 => vec![icmp(Version::V4, types.clone(), codes)],
                Version::V6 => {
                    in_icmp6(types, codes).into_iter().map(|types| icmp(Version::V6, types, codes)).collect()
                }
            })
            .collect(),
        Traffic::Icmp6 { types, codes } => vec![icmp(Version::V6, types.clone(), codes)],
    }
}

/// ICMP types as those of ICMPv6 that mean the same (RFC 792, RFC 4443).
fn in_icmp6(types: &RangeInclusive<u8>, codes: &RangeInclusive<u8>) -> Vec<RangeInclusive<u8>> {
    if *types == ANY {
        return vec![ANY];
    }
    let same: &[(u8, &[u8])] = &[
        (0, &[129]),  // echo reply
        (3, &[1, 2]), // unreachable; in IPv6 "packet too big" is a type, not a code of it
        (8, &[128]),  // echo request
        (11, &[3]),   // time exceeded
        (12, &[4]),   // parameter problem
    ];
    // Only echo has the same codes.
    let same = same.iter().filter(|(v4, _)| types.contains(v4) && (*codes == ANY || matches!(v4, 0 | 8)));
    ranges(same.flat_map(|(_, v6)| v6.iter().copied()).collect())
}

/// The same rule for the way back: what the counterpart of a packet looks like.
fn mirror(rule: &Rule) -> Vec<Rule> {
    let traffic = match rule.traffic.clone() {
        Traffic::Tcp { source, destination, flags } => {
            vec![Traffic::Tcp { source: destination, destination: source, flags }]
        }
        Traffic::Udp { source, destination } => {
            vec![Traffic::Udp { source: destination, destination: source }]
        }
        Traffic::Icmp { types, codes } => {
            counterparts(&types, &[(0, 8), (9, 10), (13, 14), (15, 16), (17, 18)])
                .into_iter()
                .map(|types| Traffic::Icmp { types, codes: codes.clone() })
                .collect()
        }
        Traffic::Icmp6 { types, codes } => counterparts(&types, &[(128, 129), (133, 134), (135, 136)])
            .into_iter()
            .map(|types| Traffic::Icmp6 { types, codes: codes.clone() })
            .collect(),
        other => vec![other],
    };
    let turned =
        |traffic| Rule { source: rule.destination, destination: rule.source, traffic, ..rule.clone() };
    traffic.into_iter().map(turned).collect()
}

/// Answers for requests and requests for answers; what is neither stays what it is.
fn counterparts(types: &RangeInclusive<u8>, pairs: &[(u8, u8)]) -> Vec<RangeInclusive<u8>> {
    let turn = |number: u8| {
        let pair = pairs.iter().find(|(a, b)| number == *a || number == *b);
        pair.map_or(number, |(a, b)| if number == *a { *b } else { *a })
    };
    ranges(types.clone().map(turn).collect())
}

fn ranges(numbers: BTreeSet<u8>) -> Vec<RangeInclusive<u8>> {
    let mut ranges: Vec<RangeInclusive<u8>> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some(last) if last.end().checked_add(1) == Some(number) => *last = *last.start()..=number,
            _ => ranges.push(number..=number),
        }
    }
    ranges
}

fn in_if(name: &str) -> Term {
    Term::InIf(name.to_owned())
}

fn out_if(name: &str) -> Term {
    Term::OutIf(name.to_owned())
}

/// FNV-1a, 64 bits.
pub(crate) fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(near: &str, far: &str, layer: Layer) -> Join {
        Join { near: near.into(), far: far.into(), layer }
    }

    fn layer_2() -> Layer {
        Layer::Ethernet { filtered: true }
    }

    fn layer_3() -> Layer {
        Layer::Ip { near: Vec::new(), far: Vec::new() }
    }

    fn rules(text: &str) -> Rules {
        Rules::parse(text).unwrap()
    }

    /// The lines of a chain's rules.
    fn lines(tables: &[Table], chain: &str) -> Vec<String> {
        let chains = tables.iter().flat_map(|table| &table.chains);
        let found = chains.filter(|found| found.name == chain).flat_map(|chain| &chain.rules);
        found.map(ToString::to_string).collect()
    }

    const OLD: &str = "aclRules:
  Allow ICMP: action=reflect,icmptype=8
  Allow TCP 80: action=reflect,tcplowport=80,tcpupport=80
";

    #[test]
    fn the_example_of_the_old_syntax() {
        let tables = firewall(&rules(OLD), Unfiltered::default(), &[join("in", "out", layer_3())]);
        let mark = generation(&rules(OLD));
        let known = format!(
            "ct mark {mark:#x} ct state established,related counter accept comment \"connections that a rule has let pass\""
        );
        let discovery = "meta nfproto ipv6 meta l4proto 58 icmpv6 type 135-136 ip6 hoplimit 255 accept comment \"neighbour discovery\"";
        let reflect = format!("ct state established,related,new ct mark set {mark:#x} counter accept");
        assert_eq!(
            lines(&tables, "from-client"),
            [
                known.clone(),
                discovery.into(),
                format!("meta nfproto ipv4 meta l4proto 1 icmp type 8 {reflect} comment \"Allow ICMP\""),
                format!("meta nfproto ipv6 meta l4proto 58 icmpv6 type 128 {reflect} comment \"Allow ICMP\""),
                format!("meta l4proto 6 th dport 80 {reflect} comment \"Allow TCP 80\""),
            ]
        );
        assert_eq!(lines(&tables, "to-client"), [known, discovery.into()]);
        assert_eq!(
            lines(&tables, "forward"),
            [
                "iifname \"in\" oifname \"out\" jump from-client",
                "iifname \"out\" oifname \"in\" jump to-client",
                "counter drop comment \"no rule allows it\"",
            ]
        );
    }

    #[test]
    fn a_permit_rule_is_mirrored_and_a_deny_rule_where_it_matters() {
        let text = "
no ssh: {proto: 6, dstprefix: 10.0.0.0/8, dstportoricmpcodefirst: 22, dstportoricmpcodelast: 22}
tcp: {ispermit: 1, proto: 6, srcprefix: 192.0.2.0/24}
ping: {ispermit: 1, proto: 1, srcportoricmptypefirst: 8, srcportoricmptypelast: 8, dstprefix: 0.0.0.0/0}
answers: {ispermit: 2, proto: 17}
rest: {}
";
        let tables = firewall(&rules(text), Unfiltered::default(), &[]);
        assert_eq!(
            lines(&tables, "to-client")[2..],
            [
                "ip saddr 10.0.0.0/8 meta l4proto 6 th sport 22 counter drop comment \"no ssh, way back\"",
                "ip daddr 192.0.2.0/24 meta l4proto 6 counter accept comment \"tcp, way back\"",
                "meta nfproto ipv4 meta l4proto 1 icmp type 0 counter accept comment \"ping, way back\"",
            ]
        );
    }

    #[test]
    fn frames_that_nothing_looks_into_are_dropped_unless_allowed() {
        let decisions = |unfiltered| {
            let tables = firewall(&rules(OLD), unfiltered, &[join("in", "out", layer_2())]);
            let lines = lines(&tables, "prerouting");
            assert_eq!(lines.len(), 12);
            [3, 4, 5, 9, 10, 11].map(|at| lines[at].contains("accept"))
        };
        assert_eq!(decisions(Unfiltered::default()), [false; 6]);
        let tagged = Unfiltered { tagged: true, unknown: false };
        assert_eq!(decisions(tagged), [true, true, false, true, true, false]);
        let unknown = Unfiltered { tagged: false, unknown: true };
        assert_eq!(decisions(unknown), [false, false, true, false, false, true]);
    }

    #[test]
    fn every_join_has_a_zone_of_its_own() {
        let joins: Vec<_> =
            (0..2000).map(|i| join(&format!("in{i}"), &format!("out{i}"), layer_2())).collect();
        let zones = zone_numbers(&joins);
        assert!(!zones.contains(&0));
        assert_eq!(zones.iter().collect::<BTreeSet<_>>().len(), joins.len());
        assert_eq!(zone_numbers(&joins[..1]), zones[..1]);
    }

    #[test]
    fn other_rules_are_another_generation() {
        assert_ne!(generation(&rules(OLD)), generation(&rules(&OLD.replace("80", "81"))));
        assert_eq!(generation(&rules(OLD)), generation(&rules(OLD)));
    }

    #[test]
    fn icmp_ranges() {
        assert_eq!(in_icmp6(&(0..=8), &ANY), [1..=2, 128..=129]);
        assert_eq!(in_icmp6(&(0..=8), &(0..=0)), [128..=129]);
        assert_eq!(in_icmp6(&(13..=13), &ANY), []);
        assert_eq!(in_icmp6(&ANY, &ANY), [ANY]);
        assert_eq!(counterparts(&(8..=8), &[(0, 8)]), [0..=0]);
        assert_eq!(counterparts(&ANY, &[(0, 8)]), [ANY]);
    }

    #[test]
    fn a_passthrough_filters_nothing() {
        let tables = passthrough(&[join("in", "out", layer_3())]);
        assert!(tables.iter().flat_map(|table| &table.chains).all(|chain| chain.name != "forward"));
        assert_eq!(lines(&tables, "input").len(), 4);
        let tables = passthrough(&[join("in", "out", Layer::Ethernet { filtered: false })]);
        assert_eq!(lines(&tables, "input"), ["iifname \"in\" drop", "iifname \"out\" drop"]);
        assert_eq!(lines(&tables, "output"), ["oifname \"in\" drop", "oifname \"out\" drop"]);
    }
}
