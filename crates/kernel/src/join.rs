//! Joins two interfaces of one namespace so that what comes in by one goes out by the other: the inside of a network
//! function.
//!
//! A [`Join`] says which two, and on which layer. [`wanted`] turns joins into [`Fact`]s about the kernel, [`snapshot`]
//! reads the facts that are there, [`changes`] is the difference and [`apply`] makes it. All but the last are pure, and
//! facts print as sentences. Interfaces come and go as their forwarders like: a join whose interfaces are not both
//! there has no facts. [`crate::joiner`] does this whenever an interface changes.
//!
//! **Layer 2** is a bridge with two ports that learns nothing and floods: what it gets from one port it gives to the
//! other, tags and link-local protocols included (all but MAC pause frames, which Linux never forwards).
//!
//! ```text
//!        in ──[ nsm-1x2y3z ]── out          no address, no ARP, no IPv6 of its own
//! ```
//!
//! **Layer 3** forwards everything by the interface that it came in by, whatever its destination, as upstream's
//! cross-connect does (data-plane 6.2): each interface has a routing table, asked before any other.
//!
//! ```text
//!   50: iif in  → table of in:   client's addresses dev in,   default via endpoint dev out onlink
//!   51: iif out → table of out:  endpoint's addresses dev out, default via client dev in onlink
//!  100: local                    (moved from 0: else the pod's own addresses would catch what passes)
//! ```
//!
//! Neighbours find us by proxy: IPv4 by `proxy_arp`, IPv6 by proxy neighbour entries, both without the kernel's
//! random delay. To find *them* the kernel needs a source address for its ARP request, and the ends have none. A route
//! of type `local` for the client's addresses on `out` (and the endpoint's on `in`) lets it use that of the packet
//! which passes: each link then looks as if client and endpoint were joined directly. No packet is ever delivered by
//! these routes, the tables above catch it before. IPv6 uses link-local addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, BridgePortState, In6AddrGenMode, InfoBridge, InfoBridgePort, InfoData,
    InfoKind, InfoPortData, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::netlink::{Attempt, Request, Route as Rt, Socket};
use crate::rt::{self, Which};
use crate::sysctl;

/// Two interfaces that shall be one wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// The interface towards the client.
    pub near: String,
    /// The interface towards the endpoint.
    pub far: String,
    /// What passes between them.
    pub layer: Layer,
}

/// What passes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layer {
    /// Frames, untouched.
    Ethernet {
        /// IP packets in them pass netfilter's chains for IP on their way, with the bridge for both interfaces.
        filtered: bool,
    },
    /// IP packets.
    Ip {
        /// The client's addresses.
        near: Vec<IpAddr>,
        /// The endpoint's addresses.
        far: Vec<IpAddr>,
    },
}

/// What an interface is called, and what of it a join depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its hardware address, where it has one of Ethernet's kind.
    pub mac: Option<[u8; 6]>,
}

/// The interfaces of a namespace by name.
pub type Links = BTreeMap<String, Link>;

/// One thing about the kernel that a join needs. They are made in this order, and undone in the opposite one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fact {
    /// The interface makes no IPv6 addresses of its own.
    Quiet {
        /// Its name.
        link: String,
    },
    /// IPv6 is not switched off on an interface.
    Ipv6 {
        /// Its name.
        link: String,
    },
    /// An interface is up, and so is what is behind it.
    Up {
        /// Its name.
        link: String,
    },
    /// A bridge for a join.
    Bridge {
        /// Its name.
        name: String,
        /// The join's near interface.
        near: String,
        /// The join's far interface.
        far: String,
        /// Whether IP packets pass netfilter.
        filtered: bool,
    },
    /// An interface is a port of it, forwarding, without learning, open for link-local protocols.
    Port {
        /// Its name.
        link: String,
        /// The bridge's name.
        bridge: String,
    },
    /// An interface has an address. Of a joined one these are wanted only where this crate makes them.
    Address {
        /// Its name.
        link: String,
        /// The address.
        net: IpNet,
        /// Whether the kernel still looks for duplicates.
        tentative: bool,
    },
    /// A route.
    Route {
        /// What happens to packets that match.
        kind: RouteKind,
        /// Its table.
        table: u32,
        /// Destination.
        dst: IpNet,
        /// Next hop, on the link whatever other routes say.
        via: Option<IpAddr>,
        /// Interface.
        link: Option<String>,
    },
    /// An address that is answered for on an interface.
    Proxy {
        /// The interface.
        link: String,
        /// The address.
        ip: IpAddr,
    },
    /// What comes in by an interface is routed by a table of its own.
    Iif {
        /// IPv6 rather than IPv4.
        v6: bool,
        /// Its place among the rules.
        priority: u32,
        /// The interface.
        link: String,
        /// The table.
        table: u32,
    },
    /// The table of local addresses is asked at this place; usually at the first.
    Local {
        /// IPv6 rather than IPv4.
        v6: bool,
        /// Its place among the rules.
        priority: u32,
    },
    /// A kernel setting. Those that let packets pass come last.
    Setting {
        /// Below `/proc/sys`.
        key: String,
        /// What it says.
        value: String,
    },
}

/// What a route does. The kernel takes no next hop that counts as an address of our own, so such routes come last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RouteKind {
    /// Sends out by an interface.
    Unicast,
    /// Goes on with the next rule.
    Throw,
    /// Makes an address count as our own.
    Local,
}

/// One step towards what is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// To be made.
    Add(Fact),
    /// To be undone.
    Remove(Fact),
}

/// What a namespace holds: its interfaces, and the facts that are ours or about interfaces in question.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// All interfaces.
    pub links: Links,
    /// Facts.
    pub facts: BTreeSet<Fact>,
}

/// The protocol number on the routes, rules and proxy neighbours of joins. It is not [`crate::PROTOCOL`]: a forwarder
/// reads back what it has put on an interface, and these are not its own.
pub const PROTOCOL: u8 = 79;

/// Tables are this plus the index of the interface that packets come in by: unique, and the same after a restart.
const TABLES: u32 = 0x4e53_0000;
const LOCAL_TABLE: u32 = 255;
/// Priorities of the rules.
const NEAR: u32 = 50;
const FAR: u32 = 51;
const LOCAL_BEHIND: u32 = 100;
/// Whether the IP packets of all bridges of a namespace pass netfilter; there if the module `br_netfilter` is.
const BRIDGE_FILTER: [&str; 2] =
    ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"];
/// How the alias of a bridge of ours begins; the names of both interfaces follow.
const ALIAS: &str = "nsm-join ";
/// Link-local groups that a port lets through: all but 01 (MAC pause), which the kernel allows nobody.
const ALL_GROUPS: u16 = 0xfffd;

// === impl Join ===

impl Join {
    /// The name of the bridge, where there is one: the same for the same interfaces, now and after a restart.
    pub fn bridge(&self) -> String {
        bridge_name(&self.near, &self.far)
    }

    /// Whether both interfaces are there.
    pub fn is_ready(&self, links: &Links) -> bool {
        links.contains_key(&self.near) && links.contains_key(&self.far)
    }

    /// What has to be true, given the interfaces that are there. One alone is only kept quiet.
    fn facts(&self, links: &Links) -> BTreeSet<Fact> {
        let there = [&self.near, &self.far].into_iter().filter(|link| links.contains_key(*link));
        let mut facts: BTreeSet<_> = there.map(|link| Fact::Quiet { link: link.clone() }).collect();
        let (Some(near), Some(far)) = (links.get(&self.near), links.get(&self.far)) else {
            return facts;
        };
        facts.extend([&self.near, &self.far].map(|link| Fact::Up { link: link.clone() }));
        match &self.layer {
            Layer::Ethernet { filtered } => {
                let bridge = self.bridge();
                facts.insert(Fact::Bridge {
                    name: bridge.clone(),
                    near: self.near.clone(),
                    far: self.far.clone(),
                    filtered: *filtered,
                });
                for link in [&self.near, &self.far] {
                    facts.insert(Fact::Port { link: link.clone(), bridge: bridge.clone() });
                }
                if !filtered {
                    // For all bridges of a namespace this is on by default, and drops what is no proper IP packet.
                    let off = |key: &str| Fact::Setting { key: key.to_owned(), value: "0".to_owned() };
                    facts.extend(BRIDGE_FILTER.map(off));
                }
            }
            Layer::Ip { near: clients, far: endpoints } => {
                let near = Leg { name: &self.near, link: near, addresses: clients, priority: NEAR };
                let far = Leg { name: &self.far, link: far, addresses: endpoints, priority: FAR };
                // Without any address both families pass, as far as neighbours can be found.
                let none = clients.is_empty() && endpoints.is_empty();
                let any = |v6| none || clients.iter().chain(endpoints).any(|ip| ip.is_ipv6() == v6);
                for v6 in [false, true].into_iter().filter(|v6| any(*v6)) {
                    facts.insert(Fact::Local { v6, priority: LOCAL_BEHIND });
                    near.facts(&far, v6, &mut facts);
                    far.facts(&near, v6, &mut facts);
                }
            }
        }
        facts
    }
}

impl Layer {
    /// Whether frames pass, rather than IP packets.
    pub fn is_ethernet(&self) -> bool {
        matches!(self, Self::Ethernet { .. })
    }
}

impl fmt::Display for Join {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with {} ", self.near, self.far)?;
        match &self.layer {
            Layer::Ethernet { filtered: false } => f.write_str("at layer 2"),
            Layer::Ethernet { filtered: true } => f.write_str("at layer 2, filtered"),
            Layer::Ip { near, far } => {
                write!(f, "at layer 3 between {} and {}", list(near), list(far))
            }
        }
    }
}

/// One side of a layer 3 join.
struct Leg<'a> {
    name: &'a str,
    link: &'a Link,
    /// Who is there.
    addresses: &'a [IpAddr],
    priority: u32,
}

impl Leg<'_> {
    fn table(&self) -> u32 {
        TABLES.wrapping_add(self.link.index)
    }

    fn of(&self, v6: bool) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().copied().filter(move |ip| ip.is_ipv6() == v6)
    }

    /// All that concerns what comes in here and leaves by `other`.
    fn facts(&self, other: &Leg<'_>, v6: bool, facts: &mut BTreeSet<Fact>) {
        let name = self.name.to_owned();
        let table = self.table();
        let route = |table, kind, dst, via, link: Option<&str>| Fact::Route {
            table,
            kind,
            dst,
            via,
            link: link.map(str::to_owned),
        };
        facts.insert(Fact::Iif { v6, priority: self.priority, link: name.clone(), table });
        for ip in self.of(v6) {
            // Who is on this link is not answered for on it: not even their own announcements.
            facts.insert(route(table, RouteKind::Unicast, ip.into(), None, Some(self.name)));
        }
        let everything = if v6 { IpNet::from(everything_v6()) } else { IpNet::from(everything_v4()) };
        facts.insert(route(table, RouteKind::Unicast, everything, other.of(v6).next(), Some(other.name)));
        let setting = |key: String, value: &str| Fact::Setting { key, value: value.into() };
        if v6 {
            // Neighbour discovery of the link itself is not for passing.
            for dst in ["ff00::/8", "fe80::/10"].into_iter().filter_map(|net| net.parse().ok()) {
                facts.insert(route(table, RouteKind::Throw, dst, None, None));
            }
            if let Some(mac) = self.link.mac {
                facts.insert(Fact::Address { link: name.clone(), net: link_local(mac), tentative: false });
            }
            facts.extend(other.of(v6).map(|ip| Fact::Proxy { link: name.clone(), ip }));
            facts.insert(Fact::Ipv6 { link: name.clone() });
            facts.insert(setting(format!("net/ipv6/conf/{name}/accept_ra"), "0"));
            facts.insert(setting(format!("net/ipv6/conf/{name}/proxy_ndp"), "1"));
            facts.insert(setting(format!("net/ipv6/neigh/{name}/proxy_delay"), "0"));
            // IPv6 forwards for all interfaces or for none; older kernels also look for proxies by this one only.
            facts.insert(setting("net/ipv6/conf/all/proxy_ndp".into(), "1"));
            facts.insert(setting("net/ipv6/conf/all/forwarding".into(), "1"));
        } else {
            facts.extend(
                other.of(v6).map(|ip| route(LOCAL_TABLE, RouteKind::Local, ip.into(), None, Some(self.name))),
            );
            facts.insert(setting(format!("net/ipv4/conf/{name}/proxy_arp"), "1"));
            facts.insert(setting(format!("net/ipv4/neigh/{name}/proxy_delay"), "0"));
            facts.insert(setting(forwarding(&name), "1"));
        }
    }
}

// === facts ===

/// What all these joins need, each with its facts. Facts that joins share appear with each.
pub fn wanted<'a>(
    joins: impl IntoIterator<Item = &'a Join>,
    links: &Links,
) -> Vec<(&'a Join, BTreeSet<Fact>)> {
    joins.into_iter().map(|join| (join, join.facts(links))).collect()
}

/// What has to change, in order. Facts that are neither wanted nor ours are not in a snapshot, and stay.
pub fn changes(wanted: &BTreeSet<Fact>, seen: &BTreeSet<Fact>) -> Vec<Change> {
    let mut wanted = wanted.clone();
    for v6 in [false, true] {
        let (first, behind) = (Fact::Local { v6, priority: 0 }, Fact::Local { v6, priority: LOCAL_BEHIND });
        // The rule for local addresses goes back where it was. Whoever moved it elsewhere is not corrected.
        if !wanted.contains(&behind) && (seen.contains(&behind) || seen.contains(&first)) {
            wanted.insert(first);
        }
    }
    // Where two joins have the same addresses, the routes that make them our own get out of the way of new next hops.
    let hops: BTreeSet<IpAddr> = wanted
        .difference(seen)
        .filter_map(|fact| match fact {
            Fact::Route { via: Some(via), .. } => Some(*via),
            _ => None,
        })
        .collect();
    let seen: BTreeSet<&Fact> = seen.iter().collect();
    let kept = |fact: &&Fact| match fact {
        Fact::Route { kind: RouteKind::Local, dst, .. } => !hops.contains(&dst.addr()),
        _ => true,
    };
    let local = |fact: &&Fact| matches!(fact, Fact::Local { .. });
    let missing = || wanted.iter().filter(|fact| !(seen.contains(fact) && kept(fact)));
    // There is always one rule for local addresses, so the new one is made before the old one goes.
    let first = missing().filter(local).cloned().map(Change::Add);
    let goes = |fact: &&Fact| match fact {
        // It disappears with its bridge.
        Fact::Port { bridge, .. } => {
            wanted.iter().any(|fact| matches!(fact, Fact::Bridge { name, .. } if *name == *bridge))
        }
        // Whoever made the interface decides what becomes of it.
        Fact::Quiet { .. } | Fact::Ipv6 { .. } | Fact::Up { .. } => false,
        // It is overwritten, or off.
        Fact::Setting { key, value } => {
            value != "0"
                && !wanted
                    .iter()
                    .any(|fact| matches!(fact, Fact::Setting { key: other, .. } if *other == *key))
        }
        _ => true,
    };
    let gone = seen.iter().rev().copied().filter(|fact| !(wanted.contains(*fact) && kept(fact)));
    let gone = gone.filter(goes).cloned().map(Change::Remove);
    let new = missing().filter(|fact| !local(fact)).cloned().map(Change::Add);
    first.chain(gone).chain(new).collect()
}

/// The joins that these facts make up: what a function finds that was restarted.
pub fn joins(seen: &Snapshot) -> Vec<Join> {
    let mut joins = Vec::new();
    for fact in &seen.facts {
        match fact {
            Fact::Bridge { near, far, filtered, .. } => joins.push(Join {
                near: near.clone(),
                far: far.clone(),
                layer: Layer::Ethernet { filtered: *filtered },
            }),
            Fact::Iif { priority: NEAR, link, table, .. } => {
                let Some(far) = default_of(seen, *table).map(|(_, link)| link.to_owned()) else { continue };
                let back = seen.links.get(&far).map(|far| TABLES.wrapping_add(far.index));
                // Who is at one side is in that side's table, and who of them is the next hop in the other's.
                let near_addresses = addresses_of(seen, *table, back);
                let far_addresses =
                    back.map(|back| addresses_of(seen, back, Some(*table))).unwrap_or_default();
                let join = Join {
                    near: link.clone(),
                    far,
                    layer: Layer::Ip { near: near_addresses, far: far_addresses },
                };
                // Once for each family, with the same tables.
                if !joins.contains(&join) {
                    joins.push(join);
                }
            }
            _ => {}
        }
    }
    joins
}

/// The routes of a table that lead out by an interface: destination, next hop, interface.
fn routes_of(seen: &Snapshot, wanted: u32) -> impl Iterator<Item = (&IpNet, Option<IpAddr>, &str)> {
    seen.facts.iter().filter_map(move |fact| match fact {
        Fact::Route { kind: RouteKind::Unicast, table, dst, via, link: Some(link) } if *table == wanted => {
            Some((dst, *via, link.as_str()))
        }
        _ => None,
    })
}

/// A default route of a table: next hop and interface.
fn default_of(seen: &Snapshot, table: u32) -> Option<(Option<IpAddr>, &str)> {
    routes_of(seen, table).find(|(dst, ..)| dst.prefix_len() == 0).map(|(_, via, link)| (via, link))
}

/// The single addresses in a table, those first that are next hops of the table of the way back.
fn addresses_of(seen: &Snapshot, table: u32, back: Option<u32>) -> Vec<IpAddr> {
    let hosts = routes_of(seen, table).filter(|(dst, ..)| dst.prefix_len() == dst.max_prefix_len());
    let mut addresses: Vec<_> = hosts.map(|(dst, ..)| dst.addr()).collect();
    let hops: Vec<_> =
        back.into_iter().flat_map(|back| routes_of(seen, back)).filter_map(|(_, via, _)| via).collect();
    addresses.sort_by_key(|ip| !hops.contains(ip));
    addresses
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = |v6: &bool| if *v6 { "IPv6" } else { "IPv4" };
        match self {
            Self::Quiet { link } => write!(f, "{link} makes no addresses of its own"),
            Self::Ipv6 { link } => write!(f, "{link} takes part in IPv6"),
            Self::Up { link } => write!(f, "{link} is up"),
            Self::Bridge { name, near, far, filtered } => {
                let how = if *filtered { "filtering " } else { "" };
                write!(f, "{how}bridge {name} for {near} and {far}")
            }
            Self::Port { link, bridge } => write!(f, "{link} is a port of {bridge}"),
            Self::Address { link, net, .. } => write!(f, "{link} has address {net}"),
            Self::Route { table, kind, dst, via, link } => {
                let kind = match kind {
                    RouteKind::Unicast => "",
                    RouteKind::Throw => "throw ",
                    RouteKind::Local => "local ",
                };
                write!(f, "route {kind}{dst}")?;
                if let Some(via) = via {
                    write!(f, " via {via} onlink")?;
                }
                if let Some(link) = link {
                    write!(f, " dev {link}")?;
                }
                write!(f, " table {table}")
            }
            Self::Proxy { link, ip } => write!(f, "{ip} is answered for on {link}"),
            Self::Iif { v6, priority, link, table } => {
                write!(f, "{} rule {priority}: iif {link} lookup {table}", family(v6))
            }
            Self::Local { v6, priority } => write!(f, "{} rule {priority}: lookup local", family(v6)),
            Self::Setting { key, value } => write!(f, "{key} = {value}"),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(fact) => write!(f, "add: {fact}"),
            Self::Remove(fact) => write!(f, "remove: {fact}"),
        }
    }
}

// === reading the kernel ===

/// What there is in the socket's namespace, as far as it is ours or about the interfaces in these joins. The calling
/// thread has to be in that namespace, for the settings.
pub fn snapshot<'a>(
    socket: &mut Socket<Rt>,
    joins: impl IntoIterator<Item = &'a Join> + Clone,
) -> Result<Snapshot> {
    let mut seen = Snapshot::default();
    let named: BTreeSet<&str> =
        joins.clone().into_iter().flat_map(|join| [join.near.as_str(), join.far.as_str()]).collect();
    let links = socket.dump(rt::list_links(None)).map_err(|e| e.during("list interfaces"))?;
    let links: Vec<_> = links.into_iter().filter_map(LinkSeen::of).collect();
    seen.links =
        links.iter().map(|link| (link.name.clone(), Link { index: link.index, mac: link.mac })).collect();
    let name_of = |index: u32| links.iter().find(|link| link.index == index).map(|link| link.name.clone());

    for link in &links {
        if let Some((near, far)) = &link.join {
            let (near, far) = (near.clone(), far.clone());
            seen.facts.insert(Fact::Bridge { name: link.name.clone(), near, far, filtered: link.filtered });
        }
        if named.contains(link.name.as_str()) {
            if link.up {
                seen.facts.insert(Fact::Up { link: link.name.clone() });
            }
            if link.quiet {
                seen.facts.insert(Fact::Quiet { link: link.name.clone() });
            }
            if link.port
                && let Some(bridge) = link.master.and_then(name_of)
            {
                seen.facts.insert(Fact::Port { link: link.name.clone(), bridge });
            }
        }
    }
    let addresses = socket.dump(rt::list_addresses(0, None)).map_err(|e| e.during("list addresses"))?;
    for (index, net, tentative) in addresses.iter().filter_map(address_of) {
        if let Some(link) = name_of(index).filter(|name| named.contains(name.as_str())) {
            seen.facts.insert(Fact::Address { link, net, tentative });
        }
    }
    let rules = socket.dump(rt::list_rules()).map_err(|e| e.during("list routing rules"))?;
    seen.facts.extend(rules.iter().filter_map(rule_of));
    // Settings have no owner: those in question are those of interfaces that are joined, or still look like it.
    let mut keys = BTreeSet::new();
    for fact in wanted(joins.clone(), &seen.links).into_iter().flat_map(|(_, facts)| facts) {
        match fact {
            Fact::Setting { key, .. } => {
                keys.insert(key);
            }
            Fact::Ipv6 { link } if sysctl::get(&disable_ipv6(&link))?.as_deref() == Some("0") => {
                seen.facts.insert(Fact::Ipv6 { link });
            }
            _ => {}
        }
    }
    keys.extend(seen.facts.iter().filter_map(|fact| match fact {
        Fact::Iif { link, .. } if seen.links.contains_key(link) => Some(forwarding(link)),
        _ => None,
    }));
    for key in keys {
        // Without its module nothing filters bridges.
        let absent = BRIDGE_FILTER.contains(&key.as_str()).then(|| "0".to_owned());
        if let Some(value) = sysctl::get(&key)?.or(absent) {
            seen.facts.insert(Fact::Setting { key, value });
        }
    }
    // Only a layer 3 join has more than this, and there is a rule as long as there is anything else.
    let layer_3 = seen.facts.iter().any(|fact| matches!(fact, Fact::Iif { .. }))
        || joins.into_iter().any(|join| matches!(join.layer, Layer::Ip { .. }));
    if !layer_3 {
        return Ok(seen);
    }
    for v6 in [false, true] {
        let mut question = RouteMessage::default();
        question.header.address_family = family(v6);
        question.header.protocol = RouteProtocol::Other(PROTOCOL);
        match socket.dump(Message::GetRoute(question)) {
            Ok(routes) => seen.facts.extend(routes.iter().filter_map(|route| route_of(route, &name_of))),
            Err(Attempt::Refused(_)) if v6 => {} // no IPv6 here
            Err(e) => return Err(e.during("list routes")),
        }
    }
    let mut question = NeighbourMessage::default();
    question.header.family = AddressFamily::Inet6;
    question.header.flags = NeighbourFlags::Proxy;
    match socket.dump(Message::GetNeighbour(question)) {
        Ok(proxies) => seen.facts.extend(proxies.iter().filter_map(|proxy| proxy_of(proxy, &name_of))),
        Err(Attempt::Refused(_)) => {}
        Err(e) => return Err(e.during("list proxy neighbours")),
    }
    Ok(seen)
}

/// What of an interface matters here.
#[derive(Debug, Default)]
struct LinkSeen {
    index: u32,
    name: String,
    mac: Option<[u8; 6]>,
    up: bool,
    master: Option<u32>,
    /// As a port it is as we want ports.
    port: bool,
    quiet: bool,
    /// Our bridge for these two.
    join: Option<(String, String)>,
    filtered: bool,
}

impl LinkSeen {
    fn of(message: Message) -> Option<Self> {
        let Message::NewLink(message) = message else { return None };
        let mut link = Self {
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up | LinkFlags::Running),
            quiet: true, // where there is no IPv6
            ..Self::default()
        };
        let ether = message.header.link_layer_type == LinkLayerType::Ether;
        let (mut is_bridge, mut alias) = (false, None);
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(mac) if ether => link.mac = mac.try_into().ok(),
                LinkAttribute::Controller(index) => link.master = Some(index),
                LinkAttribute::IfAlias(text) => alias = Some(text),
                LinkAttribute::AfSpecUnspec(families) => {
                    link.quiet = families.iter().all(|family| match family {
                        AfSpecUnspec::Inet6(properties) => {
                            properties.contains(&AfSpecInet6::AddrGenMode(In6AddrGenMode::None))
                        }
                        _ => true,
                    });
                }
                LinkAttribute::LinkInfo(info) => {
                    for info in info {
                        match info {
                            LinkInfo::Kind(kind) => is_bridge = kind == InfoKind::Bridge,
                            LinkInfo::Data(InfoData::Bridge(data)) => {
                                link.filtered = data.contains(&InfoBridge::NfCallIpTables(true))
                                    && data.contains(&InfoBridge::NfCallIp6Tables(true));
                            }
                            LinkInfo::PortData(InfoPortData::BridgePort(data)) => {
                                link.port = data
                                    .contains(&InfoBridgePort::State(BridgePortState::Forwarding))
                                    && data.contains(&InfoBridgePort::Learning(false))
                                    && data.contains(&InfoBridgePort::GroupFwdMask(ALL_GROUPS));
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        link.join = alias.filter(|_| is_bridge).and_then(|alias| {
            let (near, far) = alias.strip_prefix(ALIAS)?.split_once(' ')?;
            Some((near.to_owned(), far.to_owned()))
        });
        Some(link)
    }
}

fn address_of(message: &Message) -> Option<(u32, IpNet, bool)> {
    let Message::NewAddress(message) = message else { return None };
    let (mut local, mut address, mut tentative) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(flags) => tentative = flags.contains(AddressFlags::Tentative),
            _ => {}
        }
    }
    let net = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
    Some((message.header.index, net, tentative))
}

fn rule_of(message: &Message) -> Option<Fact> {
    let Message::NewRule(message) = message else { return None };
    let v6 = message.header.family == AddressFamily::Inet6;
    let (mut table, mut priority, mut iif, mut ours) = (u32::from(message.header.table), 0, None, false);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Iifname(name) => iif = Some(name.clone()),
            RuleAttribute::Protocol(protocol) => ours = u8::from(*protocol) == PROTOCOL,
            _ => {}
        }
    }
    match iif {
        Some(link) if ours => Some(Fact::Iif { v6, priority, link, table }),
        None if table == LOCAL_TABLE && (priority == 0 || ours) => Some(Fact::Local { v6, priority }),
        _ => None,
    }
}

fn route_of(message: &Message, name_of: &dyn Fn(u32) -> Option<String>) -> Option<Fact> {
    let Message::NewRoute(message) = message else { return None };
    let kind = match message.header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Throw => RouteKind::Throw,
        RouteType::Local => RouteKind::Local,
        _ => return None,
    };
    let (mut dst, mut via, mut oif) = (None, None, None);
    let mut table = u32::from(message.header.table);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(ip) => dst = rt::route_address(ip),
            RouteAttribute::Gateway(ip) => via = rt::route_address(ip),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(index) => oif = Some(*index),
            _ => {}
        }
    }
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    let dst = IpNet::new(dst.unwrap_or(any), message.header.destination_prefix_length).ok()?;
    // IPv6 shows the loopback device for routes that lead nowhere.
    let link = oif.filter(|_| kind != RouteKind::Throw).and_then(name_of);
    Some(Fact::Route { table, kind, dst, via, link })
}

fn proxy_of(message: &Message, name_of: &dyn Fn(u32) -> Option<String>) -> Option<Fact> {
    let Message::NewNeighbour(message) = message else { return None };
    let (mut ip, mut ours) = (None, false);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some(IpAddr::from(*v6)),
            NeighbourAttribute::Protocol(protocol) => ours = u8::from(*protocol) == PROTOCOL,
            _ => {}
        }
    }
    let ours = ours && message.header.flags.contains(NeighbourFlags::Proxy);
    let link = name_of(message.header.ifindex)?;
    ip.filter(|_| ours).map(|ip| Fact::Proxy { link, ip })
}

// === changing the kernel ===

/// Makes one change. The calling thread has to be in the socket's namespace, for the settings.
///
/// What is there already, or gone already, is no error.
pub fn apply(socket: &mut Socket<Rt>, links: &Links, change: &Change) -> Result<()> {
    let (fact, add) = match change {
        Change::Add(fact) => (fact, true),
        Change::Remove(fact) => (fact, false),
    };
    let index = |name: &str| match links.get(name) {
        Some(link) => Ok(link.index),
        None => Err(Error::Protocol(format!("there is no interface {name}"))),
    };
    let one_or_other = |new: fn(RouteMessage) -> Message, old: fn(RouteMessage) -> Message, message| {
        if add { new(message) } else { old(message) }
    };
    let requests = match fact {
        Fact::Quiet { link } if add => {
            vec![rt::set_link(index(link)?, vec![addr_gen_mode(In6AddrGenMode::None)])]
        }
        Fact::Up { link } if add => vec![rt::set_up(index(link)?)],
        Fact::Quiet { .. } | Fact::Up { .. } => return Ok(()),
        Fact::Bridge { name, near, far, filtered } if add => new_bridge(name, near, far, *filtered),
        Fact::Bridge { name, .. } => vec![Request::new(rt::delete_link(Which::Name(name), None))],
        Fact::Port { link, bridge } if add => {
            let bridge = match links.get(bridge) {
                Some(bridge) => bridge.index,
                // Made a moment ago.
                None => index_of(socket, bridge)?,
            };
            new_port(index(link)?, bridge)
        }
        Fact::Port { link, .. } => {
            vec![rt::set_link(index(link)?, vec![LinkAttribute::Controller(0)])]
        }
        Fact::Address { link, net, .. } => {
            let message = address(index(link)?, *net);
            let message = if add { Message::NewAddress(message) } else { Message::DelAddress(message) };
            vec![created(message, add, NLM_F_EXCL)]
        }
        Fact::Route { table, kind, dst, via, link } => {
            let oif = link.as_deref().map(index).transpose()?;
            let message =
                one_or_other(Message::NewRoute, Message::DelRoute, route(*table, *kind, *dst, *via, oif));
            // Two joins may have the same addresses: in the table that they share each has its own route.
            let flags = if *kind == RouteKind::Local { NLM_F_APPEND } else { NLM_F_EXCL };
            vec![created(message, add, flags)]
        }
        Fact::Proxy { link, ip } => {
            let message = proxy(index(link)?, *ip);
            let message = if add { Message::NewNeighbour(message) } else { Message::DelNeighbour(message) };
            vec![created(message, add, 0)]
        }
        Fact::Iif { v6, priority, link, table } => {
            let mut message = rule(*v6, *priority, *table);
            message.attributes.push(RuleAttribute::Iifname(link.clone()));
            message.attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
            let message = if add { Message::NewRule(message) } else { Message::DelRule(message) };
            vec![created(message, add, NLM_F_EXCL)]
        }
        Fact::Local { v6, priority } => {
            let mut message = rule(*v6, *priority, LOCAL_TABLE);
            if *priority == LOCAL_BEHIND {
                message.attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
            } else if add {
                message.attributes.push(RuleAttribute::Protocol(RouteProtocol::Kernel));
            }
            let message = if add { Message::NewRule(message) } else { Message::DelRule(message) };
            vec![created(message, add, NLM_F_EXCL)]
        }
        Fact::Setting { key, value } if add => return sysctl::set(key, value).map(drop),
        // Without our rules other routes would apply to what comes in: it must not be forwarded any more.
        Fact::Setting { key, .. } => return sysctl::set(key, "0").map(drop),
        Fact::Ipv6 { link } if add => return sysctl::set(&disable_ipv6(link), "0").map(drop),
        Fact::Ipv6 { .. } => return Ok(()),
    };
    let refused = socket.commit(requests)?;
    if let Change::Add(Fact::Up { link }) = change {
        // The kernel may take a second to notice that the other end of a veth is up, and sends nothing before. To be
        // asked for the interface makes it notice (linkwatch_sync_dev).
        socket.links(vec![rt::get_link(Which::Name(link), None, false)])?;
    }
    for refused in refused {
        let harmless = match refused.refusal.errno {
            Errno::EXIST => add,
            // No IPv6 to be kept quiet.
            Errno::AFNOSUPPORT => matches!(fact, Fact::Quiet { .. } | Fact::Bridge { .. }),
            Errno::NODEV | Errno::NOENT | Errno::SRCH | Errno::ADDRNOTAVAIL => !add,
            _ => false,
        };
        if !harmless {
            return Err(Error::Refused { what: change.to_string(), source: refused.refusal });
        }
    }
    Ok(())
}

/// Whether this kernel can pass bridged IP packets to netfilter in the namespace of the calling thread.
///
/// # Errors
/// It cannot: the module `br_netfilter` is not loaded.
pub fn check_bridge_filter() -> Result<()> {
    for key in BRIDGE_FILTER {
        if sysctl::get(key)?.is_none() {
            return Err(Error::NoBridgeFilter);
        }
    }
    Ok(())
}

fn new_bridge(name: &str, near: &str, far: &str, filtered: bool) -> Vec<Request<Message>> {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(name.into()));
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Bridge),
        LinkInfo::Data(InfoData::Bridge(vec![
            InfoBridge::MulticastSnooping(false),
            InfoBridge::NfCallIpTables(filtered),
            InfoBridge::NfCallIp6Tables(filtered),
        ])),
    ]));
    // Nothing of the bridge itself is ever heard on the wire, and nobody on the wire reaches it: silent before it is
    // up, and not answering ARP for the addresses of other interfaces.
    let mut silent = LinkMessage::default();
    rt::address_link(&mut silent, Which::Name(name), None);
    silent.attributes.push(LinkAttribute::IfAlias(format!("{ALIAS}{near} {far}")));
    silent.attributes.push(addr_gen_mode(In6AddrGenMode::None));
    let mut up = LinkMessage::default();
    rt::address_link(&mut up, Which::Name(name), None);
    up.header.flags = LinkFlags::Up | LinkFlags::Noarp;
    up.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
    vec![
        // Without NLM_F_EXCL: one that was left half made is finished.
        Request::with(Message::NewLink(link), NLM_F_CREATE),
        Request::new(Message::SetLink(silent)),
        Request::new(Message::SetLink(up)),
    ]
}

fn new_port(index: u32, bridge: u32) -> Vec<Request<Message>> {
    let mut port = LinkMessage::default();
    port.header.index = index;
    port.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(vec![
            InfoBridgePort::Learning(false),
            InfoBridgePort::GroupFwdMask(ALL_GROUPS),
        ])),
    ]));
    vec![rt::set_link(index, vec![LinkAttribute::Controller(bridge)]), Request::new(Message::NewLink(port))]
}

fn index_of(socket: &mut Socket<Rt>, name: &str) -> Result<u32> {
    let found = socket.links(vec![rt::get_link(Which::Name(name), None, false)])?.pop().flatten();
    found.map(|link| link.index).ok_or_else(|| Error::Protocol(format!("there is no interface {name}")))
}

fn addr_gen_mode(mode: In6AddrGenMode) -> LinkAttribute {
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(mode)])])
}

fn address(index: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.family = family(net.addr().is_ipv6());
    message.header.prefix_len = net.prefix_len();
    message.header.scope = AddressScope::Link;
    message.attributes = vec![AddressAttribute::Local(net.addr()), AddressAttribute::Address(net.addr())];
    if net.addr().is_ipv6() {
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Permanent));
    }
    message
}

fn route(table: u32, kind: RouteKind, dst: IpNet, via: Option<IpAddr>, oif: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(dst.addr().is_ipv6());
    message.header.destination_prefix_length = dst.prefix_len();
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    (message.header.kind, message.header.scope) = match kind {
        RouteKind::Unicast if via.is_some() => (RouteType::Unicast, RouteScope::Universe),
        RouteKind::Unicast => (RouteType::Unicast, RouteScope::Link),
        RouteKind::Throw => (RouteType::Throw, RouteScope::Universe),
        RouteKind::Local => (RouteType::Local, RouteScope::Host),
    };
    message.attributes =
        vec![RouteAttribute::Destination(dst.network().into()), RouteAttribute::Table(table)];
    message.attributes.extend(oif.map(RouteAttribute::Oif));
    if let Some(via) = via {
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Gateway(via.into()));
    }
    message
}

fn proxy(index: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip.is_ipv6());
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Proxy;
    let destination = match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(destination),
        NeighbourAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ];
    message
}

fn rule(v6: bool, priority: u32, table: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(v6);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![RuleAttribute::Priority(priority), RuleAttribute::Table(table)];
    message
}

fn created(message: Message, add: bool, flags: u16) -> Request<Message> {
    Request::with(message, if add { NLM_F_CREATE | flags } else { 0 })
}

// === private helpers ===

/// At most 15 bytes: `nsm-` and 11 digits of a hash (FNV-1a, 64 bits) of both names.
fn bridge_name(near: &str, far: &str) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in near.bytes().chain([b' ']).chain(far.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut name = String::from("nsm-");
    for _ in 0..11 {
        name.push(char::from_digit((hash % 36) as u32, 36).unwrap_or('0'));
        hash /= 36;
    }
    name
}

/// The link-local address of a hardware address (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> IpNet {
    let [a, b, c, d, e, f] = mac;
    let ip = Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    IpNet::new_assert(ip.into(), 64)
}

fn forwarding(link: &str) -> String {
    format!("net/ipv4/conf/{link}/forwarding")
}

fn disable_ipv6(link: &str) -> String {
    format!("net/ipv6/conf/{link}/disable_ipv6")
}

fn everything_v4() -> ipnet::Ipv4Net {
    ipnet::Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)
}

fn everything_v6() -> ipnet::Ipv6Net {
    ipnet::Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0)
}

fn family(v6: bool) -> AddressFamily {
    if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

fn list(addresses: &[IpAddr]) -> String {
    match addresses {
        [] => "anybody".into(),
        _ => addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(names: &[&str]) -> Links {
        let link = |(index, name): (usize, &&str)| {
            ((*name).to_owned(), Link { index: index as u32 + 2, mac: Some([2, 0, 0, 0, 0, index as u8]) })
        };
        names.iter().enumerate().map(link).collect()
    }

    fn layer_3() -> Join {
        let layer = Layer::Ip {
            near: vec!["172.16.1.3".parse().unwrap(), "2001:db8::3".parse().unwrap()],
            far: vec!["172.16.1.2".parse().unwrap(), "2001:db8::2".parse().unwrap()],
        };
        Join { near: "in".into(), far: "out".into(), layer }
    }

    #[test]
    fn an_interface_that_waits_for_the_other_is_only_kept_quiet() {
        assert_eq!(layer_3().facts(&links(&["in"])), BTreeSet::from([Fact::Quiet { link: "in".into() }]));
        assert!(layer_3().facts(&links(&["other"])).is_empty());
    }

    #[test]
    fn layer_3_reads_as_it_is_meant() {
        let facts: Vec<_> = layer_3().facts(&links(&["in", "out"])).iter().map(Fact::to_string).collect();
        for fact in [
            "route 172.16.1.3/32 dev in table 1314062338",
            "route 0.0.0.0/0 via 172.16.1.2 onlink dev out table 1314062338",
            "route ::/0 via 2001:db8::3 onlink dev in table 1314062339",
            "route local 172.16.1.3/32 dev out table 255",
            "route throw ff00::/8 table 1314062338",
            "2001:db8::2 is answered for on in",
            "IPv4 rule 50: iif in lookup 1314062338",
            "IPv6 rule 51: iif out lookup 1314062339",
            "IPv4 rule 100: lookup local",
            "in has address fe80::ff:fe00:0/64",
            "net/ipv4/conf/in/forwarding = 1",
        ] {
            assert!(facts.iter().any(|found| found == fact), "{fact} not in {facts:#?}");
        }
    }

    #[test]
    fn a_join_is_recognised_by_its_facts() {
        let links = links(&["in", "out", "a", "b"]);
        let other = Join { near: "a".into(), far: "b".into(), layer: Layer::Ethernet { filtered: true } };
        let mut facts = layer_3().facts(&links);
        facts.extend(other.facts(&links));
        let found = joins(&Snapshot { links, facts });
        assert!(found.len() == 2 && found.contains(&layer_3()) && found.contains(&other), "{found:?}");
    }

    #[test]
    fn a_join_that_is_recognised_needs_nothing() {
        let links = links(&["in", "out"]);
        let of = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
        for (near, far) in [
            (
                &["172.16.1.3", "10.0.0.3", "2001:db8::3"][..],
                &["2001:db8::9", "172.16.1.2", "2001:db8::2", "1.1.1.1"][..],
            ),
            (&[], &["172.16.1.2"]),
            (&["2001:db8::3"], &[]),
            (&[], &[]),
        ] {
            let layer = Layer::Ip { near: of(near), far: of(far) };
            let facts = Join { near: "in".into(), far: "out".into(), layer }.facts(&links);
            let found = joins(&Snapshot { links: links.clone(), facts: facts.clone() });
            assert_eq!(found.len(), 1);
            assert_eq!(changes(&found[0].facts(&links), &facts), [], "{}", found[0]);
        }
    }

    #[test]
    fn the_rule_for_local_addresses_is_never_missing() {
        let links = links(&["in", "out"]);
        let first = BTreeSet::from([Fact::Local { v6: false, priority: 0 }]);
        let wanted = layer_3().facts(&links);
        let there = changes(&wanted, &first);
        let at = |wanted: &str, steps: &[Change]| steps.iter().position(|step| step.to_string() == wanted);
        assert!(
            at("add: IPv4 rule 100: lookup local", &there) < at("remove: IPv4 rule 0: lookup local", &there)
        );
        let back = changes(&BTreeSet::new(), &wanted);
        assert!(
            at("add: IPv4 rule 0: lookup local", &back) < at("remove: IPv4 rule 100: lookup local", &back)
        );
        assert_eq!(changes(&BTreeSet::new(), &first), []);
        assert_eq!(changes(&BTreeSet::new(), &BTreeSet::new()), []);
    }

    #[test]
    fn forwarding_is_the_last_to_come_and_the_first_to_go() {
        let wanted = layer_3().facts(&links(&["in", "out"]));
        let is_setting = |change: &Change| matches!(change, Change::Add(Fact::Setting { .. }));
        let there = changes(&wanted, &BTreeSet::new());
        let first = there.iter().position(is_setting).unwrap();
        assert!(there[first..].iter().all(is_setting));
        let back = changes(&BTreeSet::new(), &wanted);
        let first = back.iter().find(|change| matches!(change, Change::Remove(_)));
        assert!(matches!(first, Some(Change::Remove(Fact::Setting { .. }))), "{back:?}");
    }

    #[test]
    fn bridge_names_differ_and_fit() {
        let name = |near: &str, far: &str| bridge_name(near, far);
        assert_eq!(name("in", "out").len(), 15);
        assert_ne!(name("in", "out"), name("out", "in"));
        assert_ne!(name("a", "bc"), name("ab", "c"));
    }
}
