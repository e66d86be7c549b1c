//! The lab's own cables, and a plain reading of what a namespace holds.
//!
//! The wires of the mesh are the forwarder's business; here are only the underlay and the cables of a scenario.
//! A veth pair is made straight into both namespaces, nothing is moved, and no namespace but the lab's own is touched.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, Prop,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nsm_kernel::netlink::{Request, Route, Socket};
use nsm_kernel::netns::Namespace;
use serde::Serialize;

use crate::Error;
use crate::plan::{Cable, End};
use crate::scenario::{Lookup, Transport};

/// What one namespace holds, in an order that does not depend on chance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// Interfaces.
    pub links: Vec<SeenLink>,
    /// Addresses.
    pub addresses: Vec<SeenAddress>,
    /// Routes, without those of the kernel's own `local` table.
    pub routes: Vec<SeenRoute>,
    /// Policy rules, one line each.
    pub rules: Vec<String>,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct SeenLink {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// `veth`, `bridge`, `vxlan`; empty for real devices and loopback.
    pub kind: String,
    /// Whether it is up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// Its hardware address.
    pub mac: Vec<u8>,
    /// Its alias, if it has one.
    pub alias: String,
    /// Its alternative names.
    pub altnames: Vec<String>,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct SeenAddress {
    /// On which interface.
    pub interface: String,
    /// With its prefix length.
    pub address: IpNet,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct SeenRoute {
    /// Destination.
    pub to: IpNet,
    /// Gateway.
    pub via: Option<IpAddr>,
    /// Interface.
    pub interface: String,
    /// Table; 254 is the main one.
    pub table: u32,
    /// `Unicast`, `BlackHole` and the like.
    pub kind: String,
}

// === impl Seen ===

impl Seen {
    /// Reads a namespace.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn of(namespace: &Namespace) -> Result<Self, Error> {
        let read = || "read a namespace".to_owned();
        let mut socket = Socket::<Route>::open_in(namespace).map_err(Error::kernel(read()))?;
        let mut dump = |question: RouteNetlinkMessage| {
            socket
                .dump(question)
                .map_err(|attempt| Error::kernel(read())(attempt.during("list what it holds")))
        };
        let mut seen = Self::default();
        for message in dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))? {
            if let RouteNetlinkMessage::NewLink(link) = message {
                seen.links.push(seen_link(&link));
            }
        }
        let names: BTreeMap<u32, String> =
            seen.links.iter().map(|link| (link.index, link.name.clone())).collect();
        let name = |index: &u32| names.get(index).cloned().unwrap_or_else(|| format!("if{index}"));
        for message in dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
            if let RouteNetlinkMessage::NewAddress(address) = message {
                // With a peer, `Address` is the peer's and `Local` ours (man 7 rtnetlink).
                let own = address.attributes.iter().find_map(|a| match a {
                    AddressAttribute::Local(ip) => Some(*ip),
                    _ => None,
                });
                let any = address.attributes.iter().find_map(|a| match a {
                    AddressAttribute::Address(ip) => Some(*ip),
                    _ => None,
                });
                if let Some(ip) = own.or(any)
                    && let Ok(address_net) = IpNet::new(ip, address.header.prefix_len)
                {
                    let interface = name(&address.header.index);
                    seen.addresses.push(SeenAddress { interface, address: address_net });
                }
            }
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut question = RouteMessage::default();
            question.header.address_family = family;
            for message in dump(RouteNetlinkMessage::GetRoute(question))? {
                if let RouteNetlinkMessage::NewRoute(route) = message {
                    seen.routes.extend(seen_route(&route, &name));
                }
            }
            let mut question = RuleMessage::default();
            question.header.family = family;
            for message in dump(RouteNetlinkMessage::GetRule(question))? {
                if let RouteNetlinkMessage::NewRule(rule) = message {
                    seen.rules.push(rule_line(&rule));
                }
            }
        }
        seen.links.sort();
        seen.addresses.sort();
        seen.routes.sort();
        seen.rules.sort();
        Ok(seen)
    }
}

/// The route that the kernel would take for such a packet of this namespace.
pub(crate) fn lookup(namespace: &Namespace, lookup: &Lookup) -> Result<SeenRoute, Error> {
    let what = || format!("look up the route to {}", lookup.to);
    let mut socket = Socket::<Route>::open_in(namespace).map_err(Error::kernel(what()))?;
    let length = if lookup.to.is_ipv4() { 32 } else { 128 };
    let mut question = RouteMessage::default();
    question.header.address_family = family(lookup.to);
    if lookup.to.is_ipv4() {
        // Which table said so: IPv6 says it always, and refuses the question.
        question.header.flags = RouteFlags::LookupTable;
    }
    question.header.destination_prefix_length = length;
    question.attributes.push(RouteAttribute::Destination(lookup.to.into()));
    if let Some(from) = lookup.from {
        question.header.source_prefix_length = length;
        question.attributes.push(RouteAttribute::Source(from.into()));
    }
    let protocol = match lookup.protocol {
        Transport::Tcp => libc::IPPROTO_TCP,
        Transport::Udp => libc::IPPROTO_UDP,
    };
    question.attributes.push(RouteAttribute::IpProto(protocol as u8));
    question.attributes.extend(lookup.source_port.map(RouteAttribute::Sport));
    question.attributes.extend(lookup.port.map(RouteAttribute::Dport));
    let answers = socket.ask(vec![RouteNetlinkMessage::GetRoute(question)]).map_err(Error::kernel(what()))?;
    let route = match answers.into_iter().next() {
        Some(Ok(RouteNetlinkMessage::NewRoute(route))) => route,
        Some(Err(source)) => {
            let refused = nsm_kernel::Error::Refused { what: what(), source };
            return Err(Error::kernel(what())(refused));
        }
        _ => return Err(Error::NotThere(format!("{}: the kernel did not answer", what()))),
    };
    let links = Seen::of(namespace)?.links;
    let name = |index: &u32| {
        let link = links.iter().find(|link| link.index == *index);
        link.map_or_else(|| format!("if{index}"), |link| link.name.clone())
    };
    seen_route(&route, &name).ok_or_else(|| Error::NotThere(format!("{}: it is an address here", what())))
}

// === making cables ===

/// Makes the bridge and all cables, and sets loopback up in every namespace.
pub(crate) fn connect(
    namespaces: &BTreeMap<String, Arc<Namespace>>,
    bridge: &str,
    cables: &[Cable],
) -> Result<(), Error> {
    let find = |name: &str| {
        namespaces.get(name).ok_or_else(|| Error::NotThere(format!("the plan has no namespace {name}")))
    };
    // One socket and one batch per namespace, and one pass for the links of all: a pair needs both namespaces.
    let mut batches = BTreeMap::new();
    for (name, namespace) in namespaces {
        let socket = Socket::<Route>::open_in(namespace).map_err(Error::kernel(format!("enter {name}")))?;
        let mut loopback = LinkMessage::default();
        loopback.header.index = 1;
        loopback.header.flags = LinkFlags::Up;
        loopback.header.change_mask = LinkFlags::Up;
        batches.insert(name.as_str(), (socket, vec![Request::new(RouteNetlinkMessage::SetLink(loopback))]));
    }
    let mut bridge_index = 0;
    if let Some((socket, batch)) = batches.get_mut("underlay") {
        let mut message = named(bridge);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
        batch.push(create(RouteNetlinkMessage::NewLink(message)));
        commit(socket, std::mem::take(batch), "underlay")?;
        bridge_index = index_of(socket, bridge)?;
    }
    for cable in cables {
        let (a, b) = (find(&cable.a.namespace)?, find(&cable.b.namespace)?);
        let mut peer = named(&cable.b.interface);
        peer.attributes.push(LinkAttribute::NetNsFd(b.as_fd().as_raw_fd()));
        let mut message = named(&cable.a.interface);
        let info = vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer)))];
        message.attributes.push(LinkAttribute::LinkInfo(info));
        message.attributes.push(LinkAttribute::NetNsFd(a.as_fd().as_raw_fd()));
        if let Some((_, batch)) = batches.get_mut(cable.a.namespace.as_str()) {
            batch.push(create(RouteNetlinkMessage::NewLink(message)));
        }
    }
    for (name, (socket, batch)) in &mut batches {
        commit(socket, std::mem::take(batch), name)?;
    }
    for end in cables.iter().flat_map(|cable| [&cable.a, &cable.b]) {
        if let Some((socket, batch)) = batches.get_mut(end.namespace.as_str()) {
            let index = index_of(socket, &end.interface)?;
            batch.extend(configure(end, index, bridge_index));
        }
    }
    for (name, (socket, batch)) in &mut batches {
        commit(socket, std::mem::take(batch), name)?;
    }
    for end in cables.iter().flat_map(|cable| [&cable.a, &cable.b]) {
        if let Some((socket, _)) = batches.get_mut(end.namespace.as_str()) {
            // The kernel may take a second to notice that the other end is up, and sends nothing before. To be
            // asked for the link makes it notice (linkwatch_sync_dev).
            index_of(socket, &end.interface)?;
        }
    }
    Ok(())
}

/// What becomes of a link.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LinkChange<'a> {
    /// Set down.
    Down,
    /// No port of any bridge any more: nothing passes, and nobody is told.
    Unplugged,
    /// A port of this bridge.
    Plugged(&'a str),
    /// Removed, and its other end with it.
    Gone,
}

/// Changes a link.
pub(crate) fn change(namespace: &Namespace, interface: &str, change: LinkChange<'_>) -> Result<(), Error> {
    let what = || Error::kernel(format!("change {interface}"));
    let mut socket = Socket::<Route>::open_in(namespace).map_err(what())?;
    let mut link = LinkMessage::default();
    link.header.index = index_of(&mut socket, interface)?;
    match change {
        LinkChange::Down => link.header.change_mask = LinkFlags::Up,
        LinkChange::Unplugged => link.attributes.push(LinkAttribute::Controller(0)),
        LinkChange::Plugged(bridge) => {
            link.attributes.push(LinkAttribute::Controller(index_of(&mut socket, bridge)?));
        }
        LinkChange::Gone => {
            return commit(&mut socket, vec![Request::new(RouteNetlinkMessage::DelLink(link))], interface);
        }
    }
    commit(&mut socket, vec![Request::new(RouteNetlinkMessage::SetLink(link))], interface)
}

/// Makes a veth pair in one namespace, both ends up: the second is a port of the bridge.
pub(crate) fn plug(namespace: &Namespace, ends: [&str; 2], bridge: &str) -> Result<(), Error> {
    let what = || Error::kernel(format!("make {}", ends[0]));
    let mut socket = Socket::<Route>::open_in(namespace).map_err(what())?;
    let peer = InfoData::Veth(InfoVeth::Peer(named(ends[1])));
    let mut pair = named(ends[0]);
    pair.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(peer)]));
    commit(&mut socket, vec![create(RouteNetlinkMessage::NewLink(pair))], ends[0])?;
    let bridge = index_of(&mut socket, bridge)?;
    for (interface, bridged) in ends.into_iter().zip([false, true]) {
        let index = index_of(&mut socket, interface)?;
        let end = End {
            namespace: String::new(),
            interface: interface.to_owned(),
            addresses: Vec::new(),
            routes: Vec::new(),
            bridged,
        };
        commit(&mut socket, configure(&end, index, bridge), interface)?;
    }
    // To be asked for a link makes the kernel notice that the other end is up.
    ends.iter().try_for_each(|interface| index_of(&mut socket, interface).map(drop))
}

// === private helpers ===

fn named(name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message
}

fn create(message: RouteNetlinkMessage) -> Request<RouteNetlinkMessage> {
    Request::with(message, NLM_F_CREATE | NLM_F_EXCL)
}

/// State, addresses and routes of one end.
fn configure(end: &End, index: u32, bridge_index: u32) -> Vec<Request<RouteNetlinkMessage>> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    // Not when the pair is made: the first end has no peer yet then and cannot be up (ENOTCONN of veth_open).
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    if end.bridged {
        link.attributes.push(LinkAttribute::Controller(bridge_index));
    }
    let mut batch = vec![Request::new(RouteNetlinkMessage::SetLink(link))];
    for address in &end.addresses {
        let mut message = AddressMessage::default();
        message.header.family = family(address.addr());
        message.header.prefix_len = address.prefix_len();
        message.header.index = index;
        // A cable is ours alone: nobody else can have the address, so it need not be tentative for a second.
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Local(address.addr()));
        message.attributes.push(AddressAttribute::Address(address.addr()));
        batch.push(create(RouteNetlinkMessage::NewAddress(message)));
    }
    for (to, via) in &end.routes {
        let mut message = RouteMessage::default();
        message.header.address_family = family(to.addr());
        message.header.destination_prefix_length = to.prefix_len();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = if via.is_some() { RouteScope::Universe } else { RouteScope::Link };
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Destination(to.network().into()));
        message.attributes.push(RouteAttribute::Oif(index));
        message.attributes.extend(via.iter().map(|via| RouteAttribute::Gateway((*via).into())));
        batch.push(create(RouteNetlinkMessage::NewRoute(message)));
    }
    batch
}

fn commit(
    socket: &mut Socket<Route>,
    batch: Vec<Request<RouteNetlinkMessage>>,
    namespace: &str,
) -> Result<(), Error> {
    let failed = || Error::kernel(format!("lay the cables of {namespace}"));
    let refused = socket.commit(batch).map_err(failed())?.into_iter().next();
    refused.map_or(Ok(()), |at| {
        Err(failed()(nsm_kernel::Error::Refused { what: "make or set up a link".into(), source: at.refusal }))
    })
}

fn index_of(socket: &mut Socket<Route>, name: &str) -> Result<u32, Error> {
    let failed = || Error::kernel(format!("find interface {name}"));
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let answers = socket.ask(vec![RouteNetlinkMessage::GetLink(message)]).map_err(failed())?;
    match answers.into_iter().next() {
        Some(Ok(RouteNetlinkMessage::NewLink(link))) => Ok(link.header.index),
        Some(Err(refusal)) => {
            Err(failed()(nsm_kernel::Error::Refused { what: format!("show link {name}"), source: refusal }))
        }
        _ => Err(failed()(nsm_kernel::Error::Protocol("a question about a link was not answered".into()))),
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn seen_link(link: &LinkMessage) -> SeenLink {
    let mut seen = SeenLink {
        name: String::new(),
        index: link.header.index,
        kind: String::new(),
        up: link.header.flags.contains(LinkFlags::Up),
        mtu: 0,
        mac: Vec::new(),
        alias: String::new(),
        altnames: Vec::new(),
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => seen.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => seen.alias.clone_from(alias),
            LinkAttribute::Mtu(mtu) => seen.mtu = *mtu,
            LinkAttribute::Address(mac) => seen.mac.clone_from(mac),
            LinkAttribute::LinkInfo(infos) => {
                let kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
                seen.kind = kind.unwrap_or_default();
            }
            LinkAttribute::PropList(props) => {
                seen.altnames.extend(props.iter().filter_map(|prop| match prop {
                    Prop::AltIfName(name) => Some(name.clone()),
                    _ => None,
                }));
            }
            _ => {}
        }
    }
    seen.altnames.sort();
    seen
}

fn seen_route(route: &RouteMessage, name: &impl Fn(&u32) -> String) -> Option<SeenRoute> {
    /// `RT_TABLE_LOCAL` of `linux/rtnetlink.h`: what follows from addresses.
    const LOCAL: u32 = 255;
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    };
    let unspecified = match route.header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        _ => IpAddr::from([0; 16]),
    };
    let (mut to, mut via, mut interface, mut table) =
        (unspecified, None, String::new(), u32::from(route.header.table));
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => to = ip(address)?,
            RouteAttribute::Gateway(address) => via = ip(address),
            RouteAttribute::Oif(index) => interface = name(index),
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    let to = IpNet::new(to, route.header.destination_prefix_length).ok()?;
    (table != LOCAL).then(|| SeenRoute {
        to,
        via,
        interface,
        table,
        kind: format!("{:?}", route.header.kind),
    })
}

fn rule_line(rule: &RuleMessage) -> String {
    let family = rule.header.family;
    let mut parts: Vec<_> = rule.attributes.iter().map(|attribute| format!("{attribute:?}")).collect();
    let priority = |part: &String| !part.starts_with("Priority");
    parts.sort_by_key(priority);
    // The kernel leaves priority 0 out.
    let has_table = rule.attributes.iter().any(|a| matches!(a, RuleAttribute::Table(_)));
    let table = if has_table { String::new() } else { format!(" table {}", rule.header.table) };
    format!("{family:?} {:?}{table} {}", rule.header.action, parts.join(" "))
}
