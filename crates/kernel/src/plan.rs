//! Wires as data: what shall be in the kernel, said in full, without touching anything.
//!
//! A [`WirePlan`] is pure: it can be stored, printed, compared. `apply` makes the kernel equal to it, `snapshot` reads
//! the kernel back into the same types, and [`EndPlan::difference`] of the two is the work that is left.
//!
//! ```
//! use nsm_kernel::netns::NsId;
//! use nsm_kernel::plan::{EndPlan, IpContext, Side, WirePlan};
//!
//! let context = IpContext {
//!     src_addrs: vec!["172.16.1.3/32".into()],
//!     dst_addrs: vec!["172.16.1.2/32".into()],
//!     ..IpContext::default()
//! };
//! let (client, endpoint) = (NsId { dev: 4, ino: 1 }, NsId { dev: 4, ino: 2 });
//! let near = EndPlan::new(Side::Near, client, "nsm0", "nsc-0").with_context(Side::Near, &context)?;
//! let far = EndPlan::new(Side::Far, endpoint, "icmp-1", "nsc-0").with_context(Side::Far, &context)?;
//! let wire = WirePlan::veth("5b0e", near, far);
//! wire.validate()?;
//! assert!(wire.to_string().contains("route 172.16.1.2/32 scope link"));
//! # Ok::<(), nsm_kernel::plan::Invalid>(())
//! ```

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::netns::NsId;

/// The wire of one connection, as far as this node makes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WirePlan {
    /// The forwarder's own id of the connection; it names the wire for its whole life.
    pub id: String,
    /// What joins the ends.
    pub construction: Construction,
    /// The end in the client's namespace.
    pub near: Option<EndPlan>,
    /// The end in the endpoint's namespace.
    pub far: Option<EndPlan>,
}

/// What joins the ends of a wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Construction {
    /// A veth pair, made straight into both namespaces. Both ends are ours.
    Veth,
    /// A VXLAN device, made straight into the pod's namespace, its UDP socket in the node's. One end is ours.
    Vxlan(Vxlan),
}

/// The tunnel behind a VXLAN end (data-plane 4.1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vxlan {
    /// Network identifier, 1..2²⁴.
    pub vni: u32,
    /// Our tunnel address, in the node's namespace.
    pub local: IpAddr,
    /// The peer's tunnel address, of the same family.
    pub remote: IpAddr,
    /// The UDP port we listen on.
    pub port: u16,
    /// The UDP port we send to: what the peer listens on.
    pub remote_port: u16,
}

/// One of the two ends, told apart as the connection sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Towards the client (NSC); upstream calls it the server side of the forwarder.
    Near,
    /// Towards the endpoint (NSE).
    Far,
}

/// One end of a wire: an interface and all that hangs on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndPlan {
    /// The namespace it is in.
    pub ns: NsId,
    /// Its name there, at most 15 bytes.
    pub ifname: String,
    /// What upstream's forwarders know each other's interfaces by (data-plane 2.5).
    pub alias: String,
    /// Bytes of payload; `None`: as the kernel makes it.
    pub mtu: Option<u32>,
    /// Hardware address; `None`: as the kernel made it, for the life of the link.
    pub mac: Option<Mac>,
    /// Addresses with their prefix length; the first of a family is the preferred source.
    pub addresses: Vec<IpNet>,
    /// Routes of the main table.
    pub routes: Vec<Route>,
    /// Neighbours that need no resolution.
    pub neighbours: Vec<Neighbour>,
    /// Rules that lead to a table of their own.
    pub policies: Vec<Policy>,
}

/// A route out of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Route {
    /// Destination; host bits do not count.
    pub dst: IpNet,
    /// The next hop, taken to be on the link. `None`: the destination itself is.
    pub via: Option<IpAddr>,
    /// `scope link` (routes to the peer) rather than `scope global`. IPv6 knows no difference.
    pub link_scope: bool,
}

/// A neighbour with its hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Neighbour {
    /// Protocol address.
    pub ip: IpAddr,
    /// Hardware address.
    pub mac: Mac,
    /// Nobody asks whether it is still there, and the kernel never forgets it, nor counts it among the at most 1024
    /// neighbours that all namespaces together may have (`gc_thresh3`). Without it, it is asked after a while.
    #[serde(default)]
    pub permanent: bool,
}

/// A policy route: packets that match take the routes of a table of their own (data-plane 2.11).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Policy {
    /// What has to match. It is also the identity of the policy.
    pub when: Selector,
    /// The table. An empty list stands for a default route out of the interface.
    pub routes: Vec<Route>,
}

/// What a policy matches; a field that is absent matches everything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Selector {
    /// Source prefix.
    pub from: Option<IpNet>,
    /// IP protocol number.
    pub proto: Option<u8>,
    /// Source ports.
    pub src_ports: Option<PortRange>,
    /// Destination ports.
    pub dst_ports: Option<PortRange>,
}

/// Ports, first and last included. Written `n` or `n-m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRange {
    /// First port, at least 1.
    pub first: u16,
    /// Last port, not below the first. The rules of the kernel end at 65534, so a range to 65535 means to there.
    pub last: u16,
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// The IP context of a connection as its strings, whatever API they came by (data-plane 0.4). `src` is the client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IpContext {
    /// `src_ip_addrs`: prefixes with host part.
    pub src_addrs: Vec<String>,
    /// `dst_ip_addrs`.
    pub dst_addrs: Vec<String>,
    /// `src_routes`: routes of the client.
    pub src_routes: Vec<ContextRoute>,
    /// `dst_routes`: routes of the endpoint.
    pub dst_routes: Vec<ContextRoute>,
    /// `policies`; they apply to the client only.
    pub policies: Vec<ContextPolicy>,
    /// `ip_neighbors`: address and hardware address.
    pub neighbours: Vec<(String, String)>,
    /// `MTU`; 0 is none.
    pub mtu: u32,
}

/// A route of an IP context.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContextRoute {
    /// Destination prefix.
    pub prefix: String,
    /// Next hop; empty is none.
    pub next_hop: String,
}

/// A policy of an IP context; empty fields match everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContextPolicy {
    /// Source prefix.
    pub from: String,
    /// Decimal protocol number.
    pub proto: String,
    /// `n` or `n-m`.
    pub src_port: String,
    /// `n` or `n-m`.
    pub dst_port: String,
    /// Routes of the table.
    pub routes: Vec<ContextRoute>,
}

/// What is wrong with a plan or with the context it was to be made from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Invalid {
    /// Connection ids become file names and ownership marks.
    #[error(
        "connection id of {length} bytes: it needs 1 to {MAX_ID} (bytes outside A-Z a-z 0-9 - _ count three)"
    )]
    Id {
        /// Length when encoded.
        length: usize,
    },
    /// The kernel takes no such interface name.
    #[error("interface name {name:?} {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// MTU out of range.
    #[error("MTU {0} is out of range: {MIN_MTU} to {MAX_MTU}")]
    Mtu(u32),
    /// VNI out of range.
    #[error("VNI {0} is out of range: 1 to 16777215")]
    Vni(u32),
    /// Tunnel parameters that do not fit together.
    #[error("tunnel from {local} to {remote}: {why}")]
    Tunnel {
        /// Our address.
        local: IpAddr,
        /// Theirs.
        remote: IpAddr,
        /// What is wrong.
        why: &'static str,
    },
    /// The ends do not fit the construction.
    #[error("{0}")]
    Ends(&'static str),
    /// A text of the context that is not what it should be.
    #[error("{text:?} is not {what}")]
    Text {
        /// What was given.
        text: String,
        /// What was expected.
        what: &'static str,
    },
    /// An address that no interface may have.
    #[error("{0} cannot be the address of an interface")]
    Address(IpNet),
    /// An IPv6 address twice with different prefix lengths; the kernel keeps one.
    #[error("IPv6 address {0} is given twice with different prefix lengths")]
    Duplicate(IpAddr),
    /// Next hop and destination of different families.
    #[error("route to {dst} via {via}: different address families, or a next hop that is no host")]
    Route {
        /// Destination.
        dst: IpNet,
        /// Next hop.
        via: IpAddr,
    },
    /// Two policies that match the same.
    #[error("two policies match the same packets: {0}")]
    Policies(String),
    /// A hardware address of no single host.
    #[error("hardware address {0} is not one of a single host")]
    Mac(Mac),
}

/// One thing that has to change at one end so that the kernel is as planned.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each variant is its sentence in Display")]
pub enum Change {
    Mark(String),
    Alias(String),
    Mac(Mac),
    Mtu(u32),
    Up,
    AddAddress(IpNet),
    RemoveAddress(IpNet),
    RemoveRoute(Route),
    AddRoute(Route),
    AddNeighbour(Neighbour),
    RemoveNeighbour(Neighbour),
    RemovePolicy(Policy),
    AddPolicy(Policy),
}

/// Longest connection id, encoded: with a side in front it has to fit an alternative interface name (127 bytes).
pub const MAX_ID: usize = 110;
/// What IPv4 needs at least (RFC 791); below 1280 the kernel takes IPv6 off the interface.
pub const MIN_MTU: u32 = 68;
/// The most the kernel takes for veth and VXLAN (`ETH_MAX_MTU`).
pub const MAX_MTU: u32 = 65_535;
/// The last port that a rule can match (`fib_rule_port_range_valid`).
const MAX_PORT: u16 = 65_534;
/// `IFALIASZ` (256) less two terminators: ours on the wire and the kernel's.
const MAX_ALIAS: usize = 254;

// === impl WirePlan ===

impl WirePlan {
    /// A wire between two pods of this node.
    pub fn veth(id: impl Into<String>, near: EndPlan, far: EndPlan) -> Self {
        Self { id: id.into(), construction: Construction::Veth, near: Some(near), far: Some(far) }
    }

    /// Tells each end of a veth pair that carries nothing but IP where the other's addresses are: at the only other
    /// interface there is (data-plane 2.10). Neither asks then, not for the first packet either. `src` are the addresses
    /// behind the near end, `dst` those behind the far one; hardware addresses that are open are chosen, the same for
    /// the same wire.
    #[must_use]
    pub fn introduced(mut self, src: &[IpAddr], dst: &[IpAddr]) -> Self {
        if let (Construction::Veth, Some(near), Some(far)) =
            (&self.construction, &mut self.near, &mut self.far)
        {
            let near_mac = *near.mac.get_or_insert_with(|| Mac::of(&self.id, Side::Near));
            let far_mac = *far.mac.get_or_insert_with(|| Mac::of(&self.id, Side::Far));
            near.knows(dst, far_mac);
            far.knows(src, near_mac);
        }
        self
    }

    /// The part of a wire between nodes that is on this one. A hardware address that is open is the same whenever the
    /// wire is made: the other node remembers it, and would send to the old one for half a minute.
    pub fn vxlan(id: impl Into<String>, tunnel: Vxlan, side: Side, mut end: EndPlan) -> Self {
        let id = id.into();
        end.mac.get_or_insert_with(|| Mac::of(&id, side));
        let (near, far) = match side {
            Side::Near => (Some(end), None),
            Side::Far => (None, Some(end)),
        };
        Self { id, construction: Construction::Vxlan(tunnel), near, far }
    }

    /// Tells the end of a tunnel that carries nothing but IP where the addresses behind the other are, as
    /// [`Self::introduced`] does.
    #[must_use]
    pub fn introduced_to(mut self, others: &[IpAddr], mac: Mac) -> Self {
        for end in [&mut self.near, &mut self.far].into_iter().flatten() {
            end.knows(others, mac);
        }
        self
    }

    /// The ends that exist, near first.
    pub fn ends(&self) -> impl Iterator<Item = (Side, &EndPlan)> {
        let near = self.near.as_ref().map(|end| (Side::Near, end));
        let far = self.far.as_ref().map(|end| (Side::Far, end));
        near.into_iter().chain(far)
    }

    /// The alternative name by which that end is known to be ours and to be this wire's, whoever asks and however
    /// often we were restarted.
    pub fn mark(&self, side: Side) -> String {
        mark(side, &self.id)
    }

    /// Whether the kernel can be made to look like this.
    pub fn validate(&self) -> Result<(), Invalid> {
        let length = encode_id(&self.id).len();
        if !(1..=MAX_ID).contains(&length) {
            return Err(Invalid::Id { length });
        }
        match (&self.construction, &self.near, &self.far) {
            (Construction::Veth, Some(near), Some(far))
                if (near.ns, &near.ifname) == (far.ns, &far.ifname) =>
            {
                return Err(Invalid::Ends("both ends are the same interface"));
            }
            (Construction::Veth, Some(_), Some(_)) => {}
            (Construction::Veth, ..) => return Err(Invalid::Ends("a veth pair needs a near and a far end")),
            (Construction::Vxlan(tunnel), Some(_), None) | (Construction::Vxlan(tunnel), None, Some(_)) => {
                tunnel.validate()?;
            }
            (Construction::Vxlan(_), ..) => {
                return Err(Invalid::Ends("a VXLAN tunnel has one end on this node"));
            }
        }
        self.ends().try_for_each(|(_, end)| end.validate())
    }
}

impl fmt::Display for WirePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wire {}: ", self.id.escape_debug())?;
        match &self.construction {
            Construction::Veth => f.write_str("veth")?,
            Construction::Vxlan(tunnel) => tunnel.fmt(f)?,
        }
        for (side, end) in self.ends() {
            write!(f, "\n  {side}: {end}")?;
        }
        Ok(())
    }
}

/// The ownership mark of one end of the wire with that id.
#[doc(hidden)]
pub fn mark(side: Side, id: &str) -> String {
    format!("nsm-{side}-{}", encode_id(id))
}

/// The side and the connection id in an ownership mark; `None` if it is not one.
pub fn parse_mark(altname: &str) -> Option<(Side, String)> {
    let rest = altname.strip_prefix("nsm-")?;
    let (side, rest) = match rest.split_once('-')? {
        ("near", rest) => (Side::Near, rest),
        ("far", rest) => (Side::Far, rest),
        _ => return None,
    };
    let id = decode_id(rest)?;
    (mark(side, &id) == altname).then_some((side, id))
}

/// An id in characters that are harmless in file names and interface names; different ids stay different.
#[doc(hidden)]
pub fn encode_id(id: &str) -> String {
    let mut text = String::with_capacity(id.len());
    for byte in id.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => text.push(char::from(byte)),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

/// The inverse of [`encode_id`].
#[doc(hidden)]
pub fn decode_id(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first == b'%' {
            let (code, tail) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok()?);
            rest = tail;
        } else {
            bytes.push(first);
        }
    }
    String::from_utf8(bytes).ok()
}

// === impl Vxlan ===

impl Vxlan {
    fn validate(&self) -> Result<(), Invalid> {
        let wrong = |why| Err(Invalid::Tunnel { local: self.local, remote: self.remote, why });
        if !(1..1 << 24).contains(&self.vni) {
            return Err(Invalid::Vni(self.vni));
        }
        if self.local.is_ipv4() != self.remote.is_ipv4() {
            return wrong("different address families");
        }
        if [self.local, self.remote].iter().any(|ip| ip.is_unspecified() || ip.is_multicast()) {
            return wrong("both have to be addresses of one host");
        }
        if self.port == 0 || self.remote_port == 0 {
            return wrong("UDP port 0");
        }
        Ok(())
    }

    /// Bytes that the tunnel adds to a payload, the inner Ethernet header and one VLAN tag included (data-plane 2.6).
    pub fn overhead(&self) -> u32 {
        vxlan_overhead(self.local)
    }
}

/// Bytes that a VXLAN tunnel over that address family adds (data-plane 2.6): IP 20/40 + UDP 8 + VXLAN 8 + Ethernet 14
/// + one 802.1Q tag 4. The MTU of a wire is that of the uplink less this.
pub fn vxlan_overhead(local: IpAddr) -> u32 {
    if local.is_ipv4() { 54 } else { 74 }
}

impl fmt::Display for Vxlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vni, local, remote, port, remote_port } = self;
        write!(f, "vxlan vni {vni} local {local} port {port} remote {remote} port {remote_port}")
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Near => "near",
            Self::Far => "far",
        })
    }
}

// === impl EndPlan ===

impl EndPlan {
    /// An interface with nothing on it. `first_segment` is the id of the connection's first path segment.
    pub fn new(side: Side, ns: NsId, ifname: impl Into<String>, first_segment: &str) -> Self {
        let mut alias = match side {
            Side::Near => format!("server-{first_segment}"),
            Side::Far => format!("client-{first_segment}"),
        };
        // The kernel takes no more. It is for other programs to see, ownership does not hang on it.
        alias.truncate(alias.floor_char_boundary(MAX_ALIAS));
        Self {
            ns,
            ifname: ifname.into(),
            alias,
            mtu: None,
            mac: None,
            addresses: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
            policies: Vec::new(),
        }
    }

    /// Adds what the IP context says about that side (data-plane 0.4, 2.6–2.11).
    ///
    /// An address or prefix without a mask is skipped, as upstream does; one that is no address at all is an error.
    pub fn with_context(mut self, side: Side, context: &IpContext) -> Result<Self, Invalid> {
        let (src, dst) = (prefixes(&context.src_addrs)?, prefixes(&context.dst_addrs)?);
        let (own, peer, routes) = match side {
            Side::Near => (src, dst, &context.src_routes),
            Side::Far => (dst, src, &context.dst_routes),
        };
        let inside = |ip: IpAddr, nets: &[IpNet]| nets.iter().any(|net| net.contains(&ip));

        // The peer itself is on the link, unless an own prefix says so already.
        for net in peer.iter().filter(|net| !inside(net.addr(), &own)) {
            self.routes.push(Route::to_peer(*net));
        }
        for route in routes {
            let Some(dst) = prefix(&route.prefix)? else { continue };
            let mut via = address(&route.next_hop)?;
            if via.is_none() && !inside(dst.addr(), &peer) {
                via = peer.iter().map(IpNet::addr).find(|ip| ip.is_ipv4() == dst.addr().is_ipv4());
            }
            self.routes.push(Route { dst: dst.trunc(), via, link_scope: false });
        }
        self.routes = last_of_each_destination(self.routes);
        if side == Side::Near {
            for policy in &context.policies {
                self.policies.push(Policy::from_context(policy)?);
            }
        }
        for (ip, mac) in &context.neighbours {
            let what = "the IP address of a neighbour";
            let ip = ip.parse().map_err(|_| Invalid::Text { text: ip.clone(), what })?;
            self.neighbours.push(Neighbour { ip, mac: mac.parse()?, permanent: false });
        }
        self.addresses = own;
        self.mtu = Some(context.mtu).filter(|mtu| *mtu != 0);
        Ok(self)
    }

    fn validate(&self) -> Result<(), Invalid> {
        validate_ifname(&self.ifname)?;
        if self.alias.len() > MAX_ALIAS || self.alias.is_empty() || self.alias.contains('\0') {
            return Err(Invalid::Ends("an alias has 1 to 254 bytes"));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !(MIN_MTU..=MAX_MTU).contains(mtu)) {
            return Err(Invalid::Mtu(mtu));
        }
        for mac in self.mac.iter().chain(self.neighbours.iter().map(|n| &n.mac)) {
            if mac.0 == [0; 6] || mac.0[0] & 1 != 0 {
                return Err(Invalid::Mac(*mac));
            }
        }
        let mut v6 = std::collections::BTreeMap::new();
        for net in &self.addresses {
            let ip = net.addr();
            let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
            if ip.is_unspecified() || ip.is_multicast() || broadcast {
                return Err(Invalid::Address(*net));
            }
            if ip.is_ipv6() && v6.insert(ip, net.prefix_len()).is_some_and(|other| other != net.prefix_len())
            {
                return Err(Invalid::Duplicate(ip));
            }
        }
        self.routes.iter().try_for_each(Route::validate)?;
        let mut selectors = BTreeSet::new();
        for policy in &self.policies {
            policy.routes.iter().try_for_each(Route::validate)?;
            policy.when.validate()?;
            if !selectors.insert(policy.when.canonical()) {
                return Err(Invalid::Policies(policy.when.to_string()));
            }
        }
        for neighbour in &self.neighbours {
            if neighbour.ip.is_unspecified() || neighbour.ip.is_multicast() {
                return Err(Invalid::Address(neighbour.ip.into()));
            }
        }
        Ok(())
    }

    /// The same end in the one form that compares: no order, no repetition, no host bits in destinations.
    pub fn canonical(&self) -> Self {
        let mut end = self.clone();
        end.addresses = sorted(self.addresses.iter().copied());
        end.routes = sorted(last_of_each_destination(self.routes.clone()).into_iter());
        end.neighbours = sorted(self.neighbours.iter().copied());
        end.policies = sorted(self.policies.iter().map(|policy| self.canonical_policy(policy)));
        end
    }

    /// What has to change in `seen` so that it is as planned here, in an order in which the kernel takes it.
    /// Names and namespaces are not looked at: an interface under another name is another interface.
    pub fn difference(&self, seen: &Self) -> Vec<Change> {
        let (want, have) = (self.canonical(), seen.canonical());
        let mut changes = Vec::new();
        if want.alias != have.alias {
            changes.push(Change::Alias(want.alias));
        }
        changes.extend(want.mac.filter(|mac| have.mac != Some(*mac)).map(Change::Mac));
        changes.extend(want.mtu.filter(|mtu| have.mtu != Some(*mtu)).map(Change::Mtu));
        // Add before removing: with its last IPv4 address an interface loses its routes. In the plan's order,
        // because the first address is the preferred source.
        let mut missing: Vec<_> = self.addresses.iter().filter(|net| !have.addresses.contains(net)).collect();
        missing.dedup();
        changes.extend(missing.into_iter().copied().map(Change::AddAddress));
        changes.extend(less(&have.addresses, &want.addresses).map(Change::RemoveAddress));
        // A changed route replaces the one to its destination.
        changes.extend(less(&have.routes, &want.routes).filter_map(|route| {
            (!want.routes.iter().any(|other| other.dst == route.dst)).then_some(Change::RemoveRoute(route))
        }));
        changes.extend(less(&want.routes, &have.routes).map(Change::AddRoute));
        changes.extend(less(&have.neighbours, &want.neighbours).filter_map(|neighbour| {
            let kept = want.neighbours.iter().any(|other| other.ip == neighbour.ip);
            (!kept).then_some(Change::RemoveNeighbour(neighbour))
        }));
        changes.extend(less(&want.neighbours, &have.neighbours).map(Change::AddNeighbour));
        changes.extend(less(&have.policies, &want.policies).map(Change::RemovePolicy));
        // In the plan's order, which is the order of the tables.
        for policy in &self.policies {
            let policy = self.canonical_policy(policy);
            if !have.policies.contains(&policy) {
                changes.push(Change::AddPolicy(policy));
            }
        }
        changes
    }

    /// A policy with the routes that its table really gets, and so with the families of its rules.
    ///
    /// Upstream gives every policy without routes an IPv4 default route, also the IPv6 ones; here it is a default
    /// route of the policy's family: that of `from`, or else those of the addresses of this end.
    fn canonical_policy(&self, policy: &Policy) -> Policy {
        let when = policy.when.canonical();
        let mut routes = policy.routes.clone();
        if routes.is_empty() {
            let v6 = match when.from {
                Some(from) => from.addr().is_ipv6(),
                None => !self.addresses.is_empty() && self.addresses.iter().all(|net| net.addr().is_ipv6()),
            };
            let any: IpAddr = if v6 { [0u8; 16].into() } else { [0u8; 4].into() };
            routes.extend(IpNet::new(any, 0).ok().map(Route::on_device));
        }
        Policy { when, routes: sorted(last_of_each_destination(routes).into_iter()) }
    }

    /// All of these are at that hardware address, but those of which something else is known.
    fn knows(&mut self, others: &[IpAddr], mac: Mac) {
        for &ip in others {
            if !self.neighbours.iter().any(|known| known.ip == ip) {
                self.neighbours.push(Neighbour { ip, mac, permanent: true });
            }
        }
    }
}

impl fmt::Display for EndPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {} alias {}", self.ifname.escape_debug(), self.ns, self.alias.escape_debug())?;
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        if let Some(mac) = self.mac {
            write!(f, " mac {mac}")?;
        }
        self.addresses.iter().try_for_each(|net| write!(f, "\n    address {net}"))?;
        self.routes.iter().try_for_each(|route| write!(f, "\n    route {route}"))?;
        self.neighbours.iter().try_for_each(|neighbour| write!(f, "\n    neighbour {neighbour}"))?;
        self.policies.iter().try_for_each(|policy| write!(f, "\n    policy {policy}"))
    }
}

// === impl Route ===

impl Route {
    /// A route to the peer: on the link, `scope link`.
    pub fn to_peer(dst: IpNet) -> Self {
        Self { dst: dst.trunc(), via: None, link_scope: true }
    }

    /// A route whose destinations are on the link.
    pub fn on_device(dst: IpNet) -> Self {
        Self { dst: dst.trunc(), via: None, link_scope: false }
    }

    /// A route by a next hop.
    pub fn via(dst: IpNet, via: IpAddr) -> Self {
        Self { dst: dst.trunc(), via: Some(via), link_scope: false }
    }

    fn validate(&self) -> Result<(), Invalid> {
        match self.via {
            Some(via)
                if via.is_ipv4() != self.dst.addr().is_ipv4()
                    || via.is_unspecified()
                    || via.is_multicast() =>
            {
                Err(Invalid::Route { dst: self.dst, via })
            }
            _ => Ok(()),
        }
    }

    fn canonical(self) -> Self {
        let link_scope = self.link_scope && self.via.is_none() && self.dst.addr().is_ipv4();
        Self { dst: self.dst.trunc(), via: self.via, link_scope }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dst)?;
        if let Some(via) = self.via {
            write!(f, " via {via} onlink")?;
        }
        if self.link_scope { f.write_str(" scope link") } else { Ok(()) }
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}{}", self.ip, self.mac, if self.permanent { " permanent" } else { "" })
    }
}

// === impl Policy ===

impl Policy {
    fn from_context(policy: &ContextPolicy) -> Result<Self, Invalid> {
        let optional = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let proto =
            |text: String| text.parse().map_err(|_| Invalid::Text { text, what: "an IP protocol number" });
        let from = |text: String| match prefix(&text)? {
            Some(net) => Ok(net.trunc()),
            None => Err(Invalid::Text { text, what: "a source prefix" }),
        };
        let when = Selector {
            from: optional(&policy.from).map(from).transpose()?,
            proto: optional(&policy.proto).map(proto).transpose()?,
            src_ports: optional(&policy.src_port).map(|text| text.parse()).transpose()?,
            dst_ports: optional(&policy.dst_port).map(|text| text.parse()).transpose()?,
        };
        let mut routes = Vec::new();
        for route in &policy.routes {
            if let Some(dst) = prefix(&route.prefix)? {
                routes.push(Route { dst: dst.trunc(), via: address(&route.next_hop)?, link_scope: false });
            }
        }
        Ok(Self { when, routes })
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.when)?;
        self.routes.iter().try_for_each(|route| write!(f, " [{route}]"))
    }
}

impl Selector {
    fn canonical(self) -> Self {
        let ports = |range: Option<PortRange>| {
            range.map(|PortRange { first, last }| PortRange { first, last: last.min(MAX_PORT) })
        };
        Self {
            from: self.from.map(|net| net.trunc()),
            proto: self.proto,
            src_ports: ports(self.src_ports),
            dst_ports: ports(self.dst_ports),
        }
    }

    fn validate(&self) -> Result<(), Invalid> {
        let wrong = |ports: &PortRange| ports.first == 0 || ports.first > ports.last.min(MAX_PORT);
        match self.src_ports.iter().chain(&self.dst_ports).find(|ports| wrong(ports)) {
            Some(ports) => Err(Invalid::Text {
                text: ports.to_string(),
                what: "ports that a rule can match: 1 to 65534",
            }),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.from {
            Some(from) => write!(f, "from {from}")?,
            None => f.write_str("from all")?,
        }
        if let Some(proto) = self.proto {
            write!(f, " proto {proto}")?;
        }
        if let Some(ports) = self.src_ports {
            write!(f, " sport {ports}")?;
        }
        match self.dst_ports {
            Some(ports) => write!(f, " dport {ports}"),
            None => Ok(()),
        }
    }
}

impl FromStr for PortRange {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if 0 < first && first <= last => Ok(Self { first, last }),
            _ => Err(Invalid::Text { text: text.into(), what: "a port or a range of ports like 7000-7010" }),
        }
    }
}

impl TryFrom<String> for PortRange {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<PortRange> for String {
    fn from(ports: PortRange) -> Self {
        ports.to_string()
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

// === impl Mac ===

impl FromStr for Mac {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let bytes: Option<Vec<u8>> = text
            .split([':', '-'])
            .map(|part| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten())
            .collect();
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(|| Invalid::Text {
            text: text.into(),
            what: "a hardware address like 02:00:00:00:00:01",
        })
    }
}

impl Mac {
    /// The address of an end of a wire whose plan leaves it open: local, of one interface (IEEE 802), from a hash of the
    /// wire's id (FNV-1a).
    #[must_use]
    pub fn of(id: &str, side: Side) -> Self {
        let side = match side {
            Side::Near => 0,
            Side::Far => 1,
        };
        let hash = id.bytes().chain([side]).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [mut first, b, c, d, e, f, ..] = hash.to_be_bytes();
        first = first & 0xfc | 0x02;
        Self([first, b, c, d, e, f])
    }
}

impl TryFrom<String> for Mac {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

// === impl Change ===

impl Change {
    /// Whether it is a property of the link, rather than something that hangs on it.
    pub(crate) fn is_of_link(&self) -> bool {
        matches!(self, Self::Alias(_) | Self::Mac(_) | Self::Mtu(_) | Self::Up)
    }

    /// Whether it takes something away.
    pub(crate) fn removes(&self) -> bool {
        matches!(
            self,
            Self::RemoveAddress(_) | Self::RemoveRoute(_) | Self::RemoveNeighbour(_) | Self::RemovePolicy(_)
        )
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mark(mark) => write!(f, "mark it {mark}"),
            Self::Alias(alias) => write!(f, "set alias {}", alias.escape_debug()),
            Self::Mac(mac) => write!(f, "set hardware address {mac}"),
            Self::Mtu(mtu) => write!(f, "set mtu {mtu}"),
            Self::Up => f.write_str("set it up"),
            Self::AddAddress(net) => write!(f, "add address {net}"),
            Self::RemoveAddress(net) => write!(f, "remove address {net}"),
            Self::AddRoute(route) => write!(f, "set route {route}"),
            Self::RemoveRoute(route) => write!(f, "remove route {route}"),
            Self::AddNeighbour(neighbour) => write!(f, "set neighbour {neighbour}"),
            Self::RemoveNeighbour(neighbour) => write!(f, "remove neighbour {neighbour}"),
            Self::AddPolicy(policy) => write!(f, "add policy {policy}"),
            Self::RemovePolicy(policy) => write!(f, "remove policy {policy}"),
        }
    }
}

/// Whether the kernel (`dev_valid_name`) and the tools take that interface name.
pub fn validate_ifname(name: &str) -> Result<(), Invalid> {
    let why = match name {
        "" => "is empty",
        "." | ".." => "is a directory",
        _ if name.len() > 15 => "has more than 15 bytes",
        _ if name.contains('/') => "contains a slash",
        _ if name.contains(':') => "contains a colon, which stands for labels",
        // The kernel would take it for a pattern and number it.
        _ if name.contains('%') => "contains a percent sign",
        _ if name.chars().any(|c| c.is_whitespace() || c.is_control()) => {
            "contains white space or control characters"
        }
        _ => return Ok(()),
    };
    Err(Invalid::Name { name: name.into(), why })
}

// === private helpers ===

/// A prefix with its host part; `None` for an address without mask, which upstream skips.
fn prefix(text: &str) -> Result<Option<IpNet>, Invalid> {
    match text.parse() {
        Ok(net) => Ok(Some(net)),
        Err(_) if text.parse::<IpAddr>().is_ok() => Ok(None),
        Err(_) => Err(Invalid::Text { text: text.into(), what: "an IP prefix like 10.0.0.1/24" }),
    }
}

fn prefixes(texts: &[String]) -> Result<Vec<IpNet>, Invalid> {
    texts.iter().filter_map(|text| prefix(text).transpose()).collect()
}

fn address(text: &str) -> Result<Option<IpAddr>, Invalid> {
    match text {
        "" => Ok(None),
        _ => text.parse().map(Some).map_err(|_| Invalid::Text { text: text.into(), what: "an IP address" }),
    }
}

/// All routes are set with *replace*, so of several to one destination the last one stays.
fn last_of_each_destination(routes: Vec<Route>) -> Vec<Route> {
    let mut kept: Vec<Route> = Vec::with_capacity(routes.len());
    for route in routes.into_iter().map(Route::canonical) {
        match kept.iter_mut().find(|other| other.dst == route.dst) {
            Some(other) => *other = route,
            None => kept.push(route),
        }
    }
    kept
}

fn sorted<T: Ord>(items: impl Iterator<Item = T>) -> Vec<T> {
    items.collect::<BTreeSet<_>>().into_iter().collect()
}

/// What is in `all` but not in `other`.
fn less<T: PartialEq + Clone>(all: &[T], other: &[T]) -> impl Iterator<Item = T> {
    all.iter().filter(|item| !other.contains(item)).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NS: NsId = NsId { dev: 4, ino: 1 };

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn routes(side: Side, context: &IpContext) -> Vec<String> {
        let end = EndPlan::new(side, NS, "nsm0", "id").with_context(side, context).unwrap();
        end.routes.iter().map(ToString::to_string).collect()
    }

    fn context_route(prefix: &str, next_hop: &str) -> ContextRoute {
        ContextRoute { prefix: prefix.into(), next_hop: next_hop.into() }
    }

    #[test]
    fn a_point_to_point_pair_reaches_each_other() {
        // What the point-to-point IPAM returns: host addresses, and each other's as routes.
        let context = IpContext {
            src_addrs: strings(&["172.16.1.3/32", "2001:db8::1/128"]),
            dst_addrs: strings(&["172.16.1.2/32", "2001:db8::/128"]),
            src_routes: vec![context_route("172.16.1.2/32", ""), context_route("2001:db8::/128", "")],
            dst_routes: vec![context_route("172.16.1.3/32", "")],
            ..IpContext::default()
        };
        // Upstream sets the link route, then replaces it by the route of the context.
        assert_eq!(routes(Side::Near, &context), ["172.16.1.2/32", "2001:db8::/128"]);
        assert_eq!(routes(Side::Far, &context), ["172.16.1.3/32", "2001:db8::1/128"]);
    }

    #[test]
    fn a_missing_next_hop_is_the_first_peer_of_the_family() {
        let context = IpContext {
            src_addrs: strings(&["10.0.0.5/24"]),
            dst_addrs: strings(&["2001:db8::1/64", "10.0.0.1/24", "10.0.1.1/24"]),
            src_routes: vec![
                context_route("192.168.0.0/16", ""),
                context_route("10.0.1.77/32", ""), // inside a prefix of the peer: on the link
                context_route("192.168.7.9/24", "10.0.0.254"),
                context_route("2001:db8:7::/48", ""),
                context_route("172.16.0.1", ""), // no mask: skipped
            ],
            dst_routes: vec![context_route("192.0.2.0/24", ""), context_route("2001:db8:9::/48", "")],
            ..IpContext::default()
        };
        assert_eq!(
            routes(Side::Near, &context),
            [
                // 10.0.0.1 is inside our own prefix and needs no route.
                "2001:db8::/64",
                "10.0.1.0/24 scope link",
                "192.168.0.0/16 via 10.0.0.1 onlink",
                "10.0.1.77/32",
                "192.168.7.0/24 via 10.0.0.254 onlink",
                "2001:db8:7::/48 via 2001:db8::1 onlink",
            ]
        );
        // The client has no IPv6 address that could be the next hop.
        assert_eq!(routes(Side::Far, &context), ["192.0.2.0/24 via 10.0.0.5 onlink", "2001:db8:9::/48"]);
    }

    #[test]
    fn policies_and_mtu_and_neighbours_come_along() {
        let context = IpContext {
            policies: vec![ContextPolicy {
                from: "10.7.2.5/24".into(),
                proto: "6".into(),
                dst_port: "6666".into(),
                routes: vec![context_route("10.7.3.0/24", "10.7.2.1")],
                ..ContextPolicy::default()
            }],
            neighbours: vec![("10.0.0.1".into(), "02:00:00:00:00:01".into())],
            mtu: 1446,
            ..IpContext::default()
        };
        let near = EndPlan::new(Side::Near, NS, "nsm0", "id").with_context(Side::Near, &context).unwrap();
        assert_eq!(near.mtu, Some(1446));
        insta::assert_snapshot!(near, @r"
        nsm0 in 4/1 alias server-id mtu 1446
            neighbour 10.0.0.1 at 02:00:00:00:00:01
            policy from 10.7.2.0/24 proto 6 dport 6666: [10.7.3.0/24 via 10.7.2.1 onlink]
        ");
        let far = EndPlan::new(Side::Far, NS, "nsm0", "id").with_context(Side::Far, &context).unwrap();
        assert_eq!((far.policies.len(), far.neighbours.len(), far.alias.as_str()), (0, 1, "client-id"));
    }

    #[test]
    fn what_is_no_address_is_an_error() {
        let near = |context: &IpContext| {
            EndPlan::new(Side::Near, NS, "nsm0", "id").with_context(Side::Near, context)
        };
        for text in ["", "nonsense", "10.0.0.1/33", "10.0.0/8", "10.0.0.1/24/24", "::g/64", " 10.0.0.1/24"] {
            let context = IpContext { src_addrs: strings(&[text]), ..IpContext::default() };
            assert!(near(&context).unwrap_err().to_string().contains("is not an IP prefix"), "{text:?}");
            let context = IpContext { src_routes: vec![context_route(text, "")], ..IpContext::default() };
            assert!(near(&context).is_err(), "{text:?}");
        }
        let context =
            IpContext { src_routes: vec![context_route("10.0.0.0/8", "there")], ..IpContext::default() };
        assert!(near(&context).is_err());
        for (proto, port) in
            [("tcp", "80"), ("256", "80"), ("6", "0"), ("6", "80-79"), ("6", "65536"), ("6", "-")]
        {
            let policy =
                ContextPolicy { proto: proto.into(), dst_port: port.into(), ..ContextPolicy::default() };
            let context = IpContext { policies: vec![policy], ..IpContext::default() };
            assert!(near(&context).is_err(), "{proto} {port}");
        }
    }

    #[test]
    fn what_the_kernel_could_not_hold_is_invalid() {
        let end = |ifname: &str| EndPlan::new(Side::Near, NS, ifname, "id");
        let tunnel = Vxlan {
            vni: 1,
            local: [192, 0, 2, 1].into(),
            remote: [192, 0, 2, 2].into(),
            port: 4789,
            remote_port: 4789,
        };
        let with = |tunnel: Vxlan| WirePlan::vxlan("id", tunnel, Side::Near, end("nsm0")).validate();
        assert_eq!(with(tunnel.clone()), Ok(()));
        assert_eq!(with(Vxlan { vni: (1 << 24) - 1, ..tunnel.clone() }), Ok(()));
        for vni in [0, 1 << 24, u32::MAX] {
            assert_eq!(with(Vxlan { vni, ..tunnel.clone() }), Err(Invalid::Vni(vni)));
        }
        for remote in ["2001:db8::1", "0.0.0.0", "239.0.0.1"] {
            assert!(with(Vxlan { remote: remote.parse().unwrap(), ..tunnel.clone() }).is_err(), "{remote}");
        }
        assert!(with(Vxlan { remote_port: 0, ..tunnel.clone() }).is_err());

        let of = |change: &dyn Fn(&mut EndPlan)| {
            let mut end = end("nsm0");
            change(&mut end);
            WirePlan::vxlan("id", tunnel.clone(), Side::Near, end).validate()
        };
        for mtu in [0, 67, 65_536, u32::MAX] {
            assert_eq!(of(&|end| end.mtu = Some(mtu)), Err(Invalid::Mtu(mtu)));
        }
        for address in ["0.0.0.0/0", "255.255.255.255/32", "224.0.0.1/4", "::/128", "ff02::1/16"] {
            assert!(of(&|end| end.addresses.push(address.parse().unwrap())).is_err(), "{address}");
        }
        let twice: [IpNet; 2] = ["2001:db8::1/64", "2001:db8::1/128"].map(|net| net.parse().unwrap());
        assert!(of(&|end| end.addresses.extend(twice)).is_err());
        for mac in ["00:00:00:00:00:00", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff"] {
            assert!(of(&|end| end.mac = Some(mac.parse().unwrap())).is_err(), "{mac}");
        }
        let mixed = Route::via("10.0.0.0/8".parse().unwrap(), "2001:db8::1".parse().unwrap());
        assert!(of(&|end| end.routes.push(mixed)).is_err());
        let policy = Policy { when: Selector::default(), routes: Vec::new() };
        assert!(of(&|end| end.policies.extend([policy.clone(), policy.clone()])).is_err());

        for (ports, valid) in [("1-65535", true), ("65534", true), ("65535", false)] {
            let when = Selector { dst_ports: Some(ports.parse().unwrap()), ..Selector::default() };
            let policy = Policy { when, routes: Vec::new() };
            assert_eq!(of(&|end| end.policies.push(policy.clone())).is_ok(), valid, "{ports}");
        }

        let mut plan = WirePlan::veth("id", end("nsm0"), end("nsm0"));
        assert!(plan.validate().is_err(), "one interface twice");
        plan.far = None;
        assert!(plan.validate().is_err(), "half a pair");
        let id = "x".repeat(MAX_ID + 1);
        assert!(matches!(
            WirePlan::veth(id, end("a"), end("b")).validate(),
            Err(Invalid::Id { length: 111 })
        ));
        // As long as the kernel's, and cut between two characters.
        let alias = EndPlan::new(Side::Near, NS, "nsm0", &"é".repeat(200)).alias;
        assert_eq!(alias.len(), 253);
    }
}
