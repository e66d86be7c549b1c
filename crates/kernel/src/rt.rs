//! rtnetlink in our nouns: what is asked of links, addresses, routes, neighbours, rules and namespace ids, and how the
//! answers read. Message building only; who asks for what and why is in `apply` and `snapshot`.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkExtentMask,
    LinkFlags, LinkInfo, LinkMessage, Prop,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Refusal, Result};
use crate::netlink::{Request, Route as Rt, Socket};
use crate::netns::Namespace;
use crate::plan::{Construction, EndPlan, Mac, Neighbour, PortRange, Route, Selector, Vxlan};

/// The protocol number on every address, route, neighbour and rule we make (`linux/rtnetlink.h` leaves 128 and up,
/// and many below, to whoever wants one): what carries it is ours, what does not is never removed.
pub const PROTOCOL: u8 = 78;

/// The device group in which a link is born. It leaves it in the same message that gives it its alias, so a link that
/// is still in it was made by us and never finished.
pub(crate) const BIRTH_GROUP: u32 = 0x006e_736d;

/// `RT_TABLE_MAIN`.
pub(crate) const MAIN_TABLE: u32 = 254;

const IFLA_ALT_IFNAME: u16 = 53;
const IFLA_MASTER_GROUP_DEFAULT: u32 = 0;

/// How a namespace numbers another one (`RTM_NEWNSID`). The number is state of the kernel: it holds no reference to
/// the namespace it stands for, survives us, and is given to another namespace some time after its own is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Nsid(pub i32);

/// Which link.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Which<'a> {
    Index(u32),
    /// Its name, or any of its alternative names.
    Name(&'a str),
}

/// What there is to know of a link.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) alias: Option<String>,
    pub(crate) altnames: Vec<String>,
    pub(crate) mtu: u32,
    pub(crate) mac: Option<Mac>,
    pub(crate) up: bool,
    pub(crate) group: u32,
    pub(crate) kind: Kind,
    /// Index of the other end of a veth, in its namespace.
    pub(crate) peer: Option<u32>,
    /// Namespace of that, as the asking socket's namespace numbers it; `None` if it is the same as this link's.
    pub(crate) peer_nsid: Option<Nsid>,
    /// `disable_ipv6` of the interface; `None` where the kernel has no IPv6 or took it off the interface.
    pub(crate) ipv6_disabled: Option<bool>,
    pub(crate) counters: Counters,
}

/// What a link is, as far as we care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Veth,
    Vxlan(VxlanFacts),
    Other(String),
}

/// What a VXLAN device says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct VxlanFacts {
    pub(crate) vni: u32,
    pub(crate) local: Option<IpAddr>,
    pub(crate) remote: Option<IpAddr>,
    pub(crate) port: u16,
    pub(crate) learning: bool,
}

/// Traffic of one end, as its own namespace counts it: what it sends (tx) goes to the other end of the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets dropped in either direction.
    pub drops: u64,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Address {
    pub(crate) ifindex: u32,
    pub(crate) net: IpNet,
    pub(crate) ours: bool,
    /// Permanent and of the whole world: neither the kernel's nor a router's or a lease's.
    pub(crate) settled: bool,
}

/// A rule of ours that leads to a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) v6: bool,
    pub(crate) when: Selector,
    pub(crate) table: u32,
    pub(crate) ours: bool,
}

// === links ===

pub(crate) fn get_link(which: Which<'_>, nsid: Option<Nsid>, counters: bool) -> Message {
    let mut link = LinkMessage::default();
    address_link(&mut link, which, nsid);
    if !counters {
        link.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    }
    Message::GetLink(link)
}

pub(crate) fn list_links(nsid: Option<Nsid>) -> Message {
    let mut link = LinkMessage::default();
    link.attributes.extend(nsid.map(|nsid| LinkAttribute::IfNetnsId(nsid.0)));
    link.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    Message::GetLink(link)
}

pub(crate) fn delete_link(which: Which<'_>, nsid: Option<Nsid>) -> Message {
    let mut link = LinkMessage::default();
    address_link(&mut link, which, nsid);
    Message::DelLink(link)
}

/// A link as it is born: named, in its namespace, with what can be given at birth, down, in the birth group.
fn newborn(end: &EndPlan, ns: &Namespace) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(end.ifname.clone()));
    link.attributes.push(LinkAttribute::NetNsFd(ns.as_fd().as_raw_fd()));
    link.attributes.push(LinkAttribute::Group(BIRTH_GROUP));
    // A veth uses one queue in each direction, unless told otherwise, but allocates one for each possible CPU.
    link.attributes.extend([LinkAttribute::NumTxQueues(1), LinkAttribute::NumRxQueues(1)]);
    link.attributes.extend(end.mtu.map(LinkAttribute::Mtu));
    link.attributes.extend(end.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
    link
}

pub(crate) fn new_veth(near: (&EndPlan, &Namespace), far: (&EndPlan, &Namespace)) -> Request<Message> {
    let mut link = newborn(near.0, near.1);
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(newborn(far.0, far.1)))),
    ]));
    Request::with(Message::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
}

/// To be sent by a socket of the node's namespace: the tunnel's UDP socket stays where the request comes from.
///
/// Outer checksums are as VPP's (data-plane 4.1): none over IPv4, where the kernel's default would be to compute
/// them, and computed over IPv6. Nothing is learned, there is only one peer.
pub(crate) fn new_vxlan(tunnel: &Vxlan, end: &EndPlan, ns: &Namespace) -> Request<Message> {
    let mut link = newborn(end, ns);
    let mut data = vec![
        InfoVxlan::Id(tunnel.vni),
        InfoVxlan::Port(tunnel.port),
        InfoVxlan::Learning(false),
        InfoVxlan::UDPCsum(false),
    ];
    data.push(match tunnel.local {
        IpAddr::V4(ip) => InfoVxlan::Local(ip),
        IpAddr::V6(ip) => InfoVxlan::Local6(ip),
    });
    if tunnel.port == tunnel.remote_port {
        data.push(match tunnel.remote {
            IpAddr::V4(ip) => InfoVxlan::Group(ip),
            IpAddr::V6(ip) => InfoVxlan::Group6(ip),
        });
    }
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Vxlan),
        LinkInfo::Data(InfoData::Vxlan(data)),
    ]));
    Request::with(Message::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
}

/// The peer of a tunnel whose port is not ours: the device knows one port only, so the destination of everything is
/// an entry of its forwarding table, under the address of all zeroes.
pub(crate) fn vxlan_peer(ifindex: u32, ip: IpAddr, port: Option<u16>) -> NeighbourMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    entry.header.ifindex = ifindex;
    entry.header.state = NeighbourState::Permanent;
    entry.header.flags = NeighbourFlags::Own;
    entry.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(vec![0; 6]),
        NeighbourAttribute::Destination(neighbour_address(ip)),
    ];
    entry.attributes.extend(port.map(NeighbourAttribute::Port));
    entry
}

pub(crate) fn list_vxlan_peers(ifindex: u32) -> Message {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    entry.header.ifindex = ifindex;
    Message::GetNeighbour(entry)
}

/// Peer and port of the entry for everything; the port only where it is not the device's.
pub(crate) fn vxlan_peer_of(message: &Message) -> Option<(IpAddr, Option<u16>)> {
    let Message::NewNeighbour(entry) = message else { return None };
    let (mut ip, mut port, mut zero) = (None, None, false);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => zero = mac.iter().all(|byte| *byte == 0),
            // The library knows no addresses of the bridge family.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => ip = ip_of(bytes),
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some((*v4).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some((*v6).into()),
            NeighbourAttribute::Port(number) => port = Some(*number),
            _ => {}
        }
    }
    zero.then_some(ip).flatten().map(|ip| (ip, port))
}

pub(crate) fn set_mark(ifindex: u32, mark: &str) -> Request<Message> {
    let mut link = LinkMessage::default();
    link.header.index = ifindex;
    link.attributes.push(LinkAttribute::PropList(vec![Prop::AltIfName(mark.to_owned())]));
    Request::with(Message::NewLinkProp(link), NLM_F_CREATE | NLM_F_EXCL)
}

pub(crate) fn clear_mark(ifindex: u32, mark: &str) -> Request<Message> {
    let mut link = LinkMessage::default();
    link.header.index = ifindex;
    link.attributes.push(LinkAttribute::PropList(vec![Prop::AltIfName(mark.to_owned())]));
    Request::new(Message::DelLinkProp(link))
}

/// Under another name, and as if it had never been finished: a life of ours after this one removes it.
pub(crate) fn set_aside(ifindex: u32) -> Request<Message> {
    let name = LinkAttribute::IfName(format!("gone{ifindex}"));
    let nobodys = [LinkAttribute::IfAlias(String::new()), LinkAttribute::Group(BIRTH_GROUP)];
    set_link(ifindex, [name].into_iter().chain(nobodys).collect())
}

/// Several attributes of a link at once.
pub(crate) fn set_link(ifindex: u32, attributes: Vec<LinkAttribute>) -> Request<Message> {
    let mut link = LinkMessage::default();
    link.header.index = ifindex;
    link.attributes = attributes;
    Request::new(Message::SetLink(link))
}

pub(crate) fn set_up(ifindex: u32) -> Request<Message> {
    let mut link = LinkMessage::default();
    link.header.index = ifindex;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    Request::new(Message::SetLink(link))
}

/// Out of the birth group.
pub(crate) fn grown_up() -> LinkAttribute {
    LinkAttribute::Group(IFLA_MASTER_GROUP_DEFAULT)
}

/// Whether any of our readers takes it.
pub(crate) fn means_something(message: Message) -> bool {
    route_of(&message).is_some()
        | neighbour_of(&message).is_some()
        | rule_of(&message).is_some()
        | nsid_of(&message).is_some()
        | vxlan_peer_of(&message).is_some()
        | Address::of(message.clone()).is_some()
        | Link::of(message).is_some()
}

impl Link {
    pub(crate) fn of(message: Message) -> Option<Self> {
        let Message::NewLink(message) = message else { return None };
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            alias: None,
            altnames: Vec::new(),
            mtu: 0,
            mac: None,
            up: message.header.flags.contains(LinkFlags::Up),
            group: 0,
            kind: Kind::Other("without a kind".into()),
            peer: None,
            peer_nsid: None,
            ipv6_disabled: None,
            counters: Counters::default(),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(mac) => link.mac = mac.try_into().ok().map(Mac),
                LinkAttribute::Group(group) => link.group = group,
                LinkAttribute::Link(peer) => link.peer = Some(peer),
                LinkAttribute::LinkNetNsId(nsid) => link.peer_nsid = Some(Nsid(nsid)),
                LinkAttribute::PropList(properties) => {
                    link.altnames.extend(properties.into_iter().filter_map(|property| match property {
                        Prop::AltIfName(name) => Some(name),
                        _ => None,
                    }));
                }
                LinkAttribute::LinkInfo(info) => link.kind = Kind::of(&info),
                LinkAttribute::AfSpecUnspec(families) => {
                    for family in families {
                        let AfSpecUnspec::Inet6(properties) = family else { continue };
                        link.ipv6_disabled = properties.into_iter().find_map(|property| match property {
                            AfSpecInet6::DevConf(settings) => Some(settings.disable_ipv6 != 0),
                            _ => None,
                        });
                    }
                }
                LinkAttribute::Stats64(stats) => {
                    link.counters = Counters {
                        rx_bytes: stats.rx_bytes,
                        tx_bytes: stats.tx_bytes,
                        rx_packets: stats.rx_packets,
                        tx_packets: stats.tx_packets,
                        drops: stats.rx_dropped + stats.tx_dropped,
                    };
                }
                _ => {}
            }
        }
        Some(link)
    }

    /// Whether we made it and were killed before we could say so.
    pub(crate) fn is_unfinished(&self) -> bool {
        self.group == BIRTH_GROUP && self.alias.is_none()
    }

    /// Whether this is what the construction makes, as far as one end alone tells.
    pub(crate) fn fits(&self, construction: &Construction) -> bool {
        match (construction, &self.kind) {
            (Construction::Veth, Kind::Veth) => self.peer.is_some(),
            (Construction::Vxlan(tunnel), Kind::Vxlan(seen)) => {
                // With another port at the peer, the peer is in the forwarding table.
                let remote = (tunnel.port == tunnel.remote_port).then_some(tunnel.remote);
                *seen
                    == VxlanFacts {
                        vni: tunnel.vni,
                        local: Some(tunnel.local),
                        remote,
                        port: tunnel.port,
                        learning: false,
                    }
            }
            _ => false,
        }
    }
}

impl Kind {
    fn of(info: &[LinkInfo]) -> Self {
        let kind = info.iter().find_map(|item| match item {
            LinkInfo::Kind(kind) => Some(kind),
            _ => None,
        });
        match kind {
            Some(InfoKind::Veth) => Self::Veth,
            Some(InfoKind::Vxlan) => {
                let mut facts = VxlanFacts::default();
                for item in info {
                    let LinkInfo::Data(InfoData::Vxlan(data)) = item else { continue };
                    for item in data {
                        match item {
                            InfoVxlan::Id(vni) => facts.vni = *vni,
                            InfoVxlan::Port(port) => facts.port = *port,
                            InfoVxlan::Learning(learning) => facts.learning = *learning,
                            InfoVxlan::Local(ip) => facts.local = Some((*ip).into()),
                            InfoVxlan::Local6(ip) => facts.local = Some((*ip).into()),
                            InfoVxlan::Group(ip) => facts.remote = Some((*ip).into()),
                            InfoVxlan::Group6(ip) => facts.remote = Some((*ip).into()),
                            _ => {}
                        }
                    }
                }
                Self::Vxlan(facts)
            }
            Some(other) => Self::Other(other.to_string()),
            None => Self::Other("without a kind".into()),
        }
    }
}

pub(crate) fn address_link(link: &mut LinkMessage, which: Which<'_>, nsid: Option<Nsid>) {
    match which {
        Which::Index(index) => link.header.index = index,
        // This attribute has room for long names, and finds an interface by its first name as well.
        Which::Name(name) => {
            let bytes = name.bytes().chain([0]).collect();
            link.attributes.push(LinkAttribute::Other(DefaultNla::new(IFLA_ALT_IFNAME, bytes)));
        }
    }
    link.attributes.extend(nsid.map(|nsid| LinkAttribute::IfNetnsId(nsid.0)));
}

// === addresses ===

pub(crate) fn list_addresses(ifindex: u32, nsid: Option<Nsid>) -> Message {
    let mut address = AddressMessage::default();
    address.header.index = ifindex;
    address.attributes.extend(nsid.map(|nsid| AddressAttribute::TargetNetNsId(nsid.0)));
    Message::GetAddress(address)
}

pub(crate) fn address(ifindex: u32, net: IpNet) -> AddressMessage {
    let mut address = AddressMessage::default();
    address.header.index = ifindex;
    address.header.family = family(net.addr());
    address.header.prefix_len = net.prefix_len();
    address.attributes = vec![
        AddressAttribute::Local(net.addr()),
        AddressAttribute::Address(net.addr()),
        AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)),
    ];
    if net.addr().is_ipv6() {
        // Both ends of a wire are ours, so there is nobody to find a duplicate with, and the address is usable at once.
        address.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Permanent));
    }
    address
}

impl Address {
    pub(crate) fn of(message: Message) -> Option<Self> {
        let Message::NewAddress(message) = message else { return None };
        let (mut local, mut address, mut flags, mut ours) = (None, None, AddressFlags::empty(), false);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Address(ip) => address = Some(*ip),
                AddressAttribute::Flags(all) => flags = *all,
                AddressAttribute::Protocol(protocol) => ours = u8::from(*protocol) == PROTOCOL,
                _ => {}
            }
        }
        let settled =
            flags.contains(AddressFlags::Permanent) && message.header.scope == AddressScope::Universe;
        let net = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
        Some(Self { ifindex: message.header.index, net, ours, settled })
    }
}

// === routes ===

/// The routes of ours out of that interface, in all tables.
pub(crate) fn list_routes(v6: bool, ifindex: u32) -> Message {
    let mut route = RouteMessage::default();
    route.header.address_family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    route.header.protocol = RouteProtocol::Other(PROTOCOL);
    route.attributes.push(RouteAttribute::Oif(ifindex));
    Message::GetRoute(route)
}

/// Every table that any route of the namespace is in.
pub(crate) fn list_all_routes(v6: bool) -> Message {
    let mut route = RouteMessage::default();
    route.header.address_family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    Message::GetRoute(route)
}

pub(crate) fn route(ifindex: u32, table: u32, route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.dst.addr());
    message.header.destination_prefix_length = route.dst.prefix_len();
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.kind = RouteType::Unicast;
    message.header.scope = if route.link_scope { RouteScope::Link } else { RouteScope::Universe };
    message.attributes = vec![
        RouteAttribute::Destination(route.dst.network().into()),
        RouteAttribute::Oif(ifindex),
        RouteAttribute::Table(table),
    ];
    if let Some(via) = route.via {
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Gateway(via.into()));
    }
    message
}

/// The table and the route in a message, if it is a plain one.
pub(crate) fn route_of(message: &Message) -> Option<(u32, Route)> {
    let Message::NewRoute(message) = message else { return None };
    let v6 = message.header.address_family == AddressFamily::Inet6;
    let any: IpAddr = if v6 { [0u8; 16].into() } else { [0u8; 4].into() };
    let (mut dst, mut via, mut table) = (any, None, u32::from(message.header.table));
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(ip) => dst = route_address(ip)?,
            RouteAttribute::Gateway(ip) => via = Some(route_address(ip)?),
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    let dst = IpNet::new(dst, message.header.destination_prefix_length).ok()?;
    let link_scope = !v6 && via.is_none() && message.header.scope == RouteScope::Link;
    Some((table, Route { dst, via, link_scope }))
}

// === neighbours ===

pub(crate) fn list_neighbours(ifindex: u32) -> Message {
    let mut neighbour = NeighbourMessage::default();
    neighbour.attributes.push(NeighbourAttribute::IfIndex(ifindex));
    Message::GetNeighbour(neighbour)
}

pub(crate) fn neighbour(ifindex: u32, neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.ip);
    message.header.ifindex = ifindex;
    message.header.state =
        if neighbour.permanent { NeighbourState::Permanent } else { NeighbourState::Reachable };
    message.attributes = vec![
        NeighbourAttribute::Destination(neighbour_address(neighbour.ip)),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.0.to_vec()),
        NeighbourAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ];
    message
}

/// A neighbour with whether it is ours.
pub(crate) fn neighbour_of(message: &Message) -> Option<(Neighbour, bool)> {
    let Message::NewNeighbour(message) = message else { return None };
    let (mut ip, mut mac, mut ours) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some(IpAddr::from(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some(IpAddr::from(*v6)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok().map(Mac),
            NeighbourAttribute::Protocol(protocol) => ours = u8::from(*protocol) == PROTOCOL,
            _ => {}
        }
    }
    let permanent = message.header.state == NeighbourState::Permanent;
    Some((Neighbour { ip: ip?, mac: mac?, permanent }, ours))
}

// === rules ===

pub(crate) fn list_rules() -> Message {
    Message::GetRule(RuleMessage::default())
}

pub(crate) fn rule(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if rule.v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = RuleAction::ToTable;
    message.attributes =
        vec![RuleAttribute::Table(rule.table), RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL))];
    if let Some(from) = rule.when.from {
        message.header.src_len = from.prefix_len();
        message.attributes.push(RuleAttribute::Source(from.network()));
    }
    let ports = |ports: PortRange| RulePortRange { start: ports.first, end: ports.last };
    message
        .attributes
        .extend(rule.when.proto.map(|proto| RuleAttribute::IpProtocol(i32::from(proto).into())));
    message.attributes.extend(rule.when.src_ports.map(|range| RuleAttribute::SourcePortRange(ports(range))));
    message
        .attributes
        .extend(rule.when.dst_ports.map(|range| RuleAttribute::DestinationPortRange(ports(range))));
    message
}

/// A rule that leads to a table.
pub(crate) fn rule_of(message: &Message) -> Option<Rule> {
    let Message::NewRule(message) = message else { return None };
    let v6 = message.header.family == AddressFamily::Inet6;
    let mut rule =
        Rule { v6, when: Selector::default(), table: u32::from(message.header.table), ours: false };
    let ports = |range: &RulePortRange| Some(PortRange { first: range.start, last: range.end });
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Protocol(protocol) => rule.ours = u8::from(*protocol) == PROTOCOL,
            RuleAttribute::Source(ip) => rule.when.from = IpNet::new(*ip, message.header.src_len).ok(),
            RuleAttribute::IpProtocol(proto) => rule.when.proto = u8::try_from(i32::from(*proto)).ok(),
            RuleAttribute::SourcePortRange(range) => rule.when.src_ports = ports(range),
            RuleAttribute::DestinationPortRange(range) => rule.when.dst_ports = ports(range),
            _ => {}
        }
    }
    Some(rule)
}

// === namespace ids ===

pub(crate) fn list_nsids() -> Message {
    Message::GetNsId(NsidMessage::default())
}

/// The number in a message; none where the kernel says −1.
pub(crate) fn nsid_of(message: &Message) -> Option<Nsid> {
    let (Message::NewNsId(message) | Message::DelNsId(message)) = message else { return None };
    message.attributes.iter().find_map(|attribute| match attribute {
        NsidAttribute::Id(id) if *id >= 0 => Some(Nsid(*id)),
        _ => None,
    })
}

impl Socket<Rt> {
    /// How the socket's namespace numbers those; who has no number yet is given one now.
    pub(crate) fn assign_nsids(&mut self, namespaces: &[&Namespace]) -> Result<Vec<Nsid>> {
        let numbers = self.nsids_of(namespaces)?;
        if let Some(numbers) = numbers.iter().copied().collect() {
            return Ok(numbers);
        }
        let missing = namespaces.iter().zip(numbers).filter(|(_, number)| number.is_none());
        let requests = missing.map(|(ns, _)| {
            let mut request = nsid_message(ns);
            request.attributes.push(NsidAttribute::Id(-1)); // any
            Request::with(Message::NewNsId(request), NLM_F_CREATE)
        });
        for at in self.commit(requests.collect())? {
            // Somebody else was faster, or it is in the list twice: just as well.
            if at.refusal.errno != Errno::EXIST {
                return Err(Error::Refused { what: "number a namespace".into(), source: at.refusal });
            }
        }
        let numbers: Option<_> = self.nsids_of(namespaces)?.into_iter().collect();
        numbers.ok_or_else(|| Error::Protocol("a namespace has no number although it was given one".into()))
    }

    /// How the socket's namespace numbers those; `None` where it does not.
    pub(crate) fn nsids_of(&mut self, namespaces: &[&Namespace]) -> Result<Vec<Option<Nsid>>> {
        let answers = self.ask(namespaces.iter().map(|ns| Message::GetNsId(nsid_message(ns))).collect())?;
        answers
            .into_iter()
            .map(|answer| match answer {
                Ok(message) => Ok(nsid_of(&message)),
                Err(source) => Err(Error::Refused { what: "read the number of a namespace".into(), source }),
            })
            .collect()
    }

    /// Links that may not exist, in the order asked for.
    pub(crate) fn links(&mut self, questions: Vec<Message>) -> Result<Vec<Option<Link>>> {
        self.ask(questions)?
            .into_iter()
            .map(|answer| match answer {
                Ok(message) => Ok(Link::of(message)),
                // No such device; or the number stands for no namespace any more.
                Err(Refusal { errno: Errno::NODEV | Errno::INVAL, .. }) => Ok(None),
                Err(source) => Err(Error::Refused { what: "look for an interface".into(), source }),
            })
            .collect()
    }
}

// === private helpers ===

fn nsid_message(ns: &Namespace) -> NsidMessage {
    let mut message = NsidMessage::default();
    message.attributes.push(NsidAttribute::Fd(ns.as_fd().as_raw_fd().unsigned_abs()));
    message
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

pub(crate) fn route_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn neighbour_address(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }
}
