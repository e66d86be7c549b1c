//! Reads the kernel back into plans.
//!
//! Part of a wire is what we made (it carries our protocol number) and what the plan wants and is there, whoever made
//! it. What others have hung on the interface is theirs: it does not show here, and is never removed.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::apply::{End, Kernel, Nsids, ends, find_missing};
use crate::error::{Error, Result};
use crate::netlink::{Attempt, Route as Rt, Socket};
use crate::netns::{self, Namespace};
use crate::plan::{
    Change, Construction, EndPlan, Mac, Policy, PortRange, Selector, Side, Vxlan, WirePlan, mark, parse_mark,
};
use crate::rt::{self, Address, Counters, Kind, Link, MAIN_TABLE, Nsid, Which};

/// A wire as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The wire in the words of a plan; an end that is not there is `None`. Comparable with the plan it was asked for:
    /// what that leaves open (`None`) is open here.
    pub plan: WirePlan,
    /// The near end, where it is there.
    pub near: Option<EndFacts>,
    /// The far end, where it is there.
    pub far: Option<EndFacts>,
}

/// What a plan does not say of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndFacts {
    /// How the node numbers the namespace.
    pub nsid: Nsid,
    /// Index of the interface in it.
    pub ifindex: u32,
    /// Its hardware address.
    pub mac: Mac,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is set up.
    pub up: bool,
    /// Its traffic so far.
    pub counters: Counters,
}

/// A link that carries our mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owned {
    /// The connection it belongs to.
    pub id: String,
    /// Which end of the wire it is.
    pub side: Side,
    /// Its name.
    pub ifname: String,
    /// Its index.
    pub ifindex: u32,
}

/// The device of the node that has a certain address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// The address.
    pub ip: IpAddr,
    /// Its name.
    pub ifname: String,
    /// Its index in the node's namespace.
    pub ifindex: u32,
    /// Its MTU. A tunnel's is less by [`vxlan_overhead`](crate::plan::vxlan_overhead).
    pub mtu: u32,
}

/// One end as it is, beside the plan it is compared with.
pub(crate) struct Seen {
    pub(crate) link: Link,
    pub(crate) plan: EndPlan,
    /// The routing tables of the policies.
    pub(crate) tables: Vec<(u32, Policy)>,
}

/// Stands for the selector of a table of ours that no rule leads to. No plan can have it: there is no port 0.
const NO_RULE: Selector =
    Selector { from: None, proto: None, src_ports: None, dst_ports: Some(PortRange { first: 0, last: 0 }) };

// === impl Kernel ===

impl Kernel {
    /// The wire of that plan as it is now. `difference(plan, snapshot)` is empty after `apply(plan)`.
    ///
    /// # Errors
    /// [`Error::NamespaceGone`] if the namespace of an end is neither known nor found.
    pub fn snapshot(&self, plan: &WirePlan, known: &[&Namespace]) -> Result<Snapshot> {
        let found = find_missing(plan, known)?;
        let mut node = self.sockets.get()?;
        let ends = ends(&mut node, plan, known, &found)?;
        let questions = ends.iter().map(|end| rt::get_link(Which::Name(&end.mark), Some(end.nsid), true));
        let links = node.links(questions.collect())?;
        self.sockets.give_back(node);

        let mut seen =
            WirePlan { id: plan.id.clone(), construction: plan.construction.clone(), near: None, far: None };
        let (mut near, mut far) = (None, None);
        let there = ends.iter().zip(links).filter_map(|(end, link)| Some((end.ns, (end, link?))));
        for (end, facts, end_seen, tunnel) in netns::visit(there, |(end, link)| look(end, link))? {
            if let Some(tunnel) = tunnel {
                seen.construction = Construction::Vxlan(tunnel);
            }
            match end.side {
                Side::Near => (seen.near, near) = (Some(end_seen), facts),
                Side::Far => (seen.far, far) = (Some(end_seen), facts),
            }
        }
        Ok(Snapshot { plan: seen, near, far })
    }

    /// Only whether the links are there and their traffic, by the numbers in the wire's record: needs no namespace to
    /// be open or found.
    pub fn facts(&self, id: &str, nsids: Nsids) -> Result<(Option<EndFacts>, Option<EndFacts>)> {
        let marks =
            [(Side::Near, nsids.near), (Side::Far, nsids.far)].map(|(side, nsid)| (mark(side, id), nsid));
        let mut node = self.sockets.get()?;
        let questions = marks
            .iter()
            .filter_map(|(mark, nsid)| nsid.map(|nsid| rt::get_link(Which::Name(mark), Some(nsid), true)));
        let mut links = node.links(questions.collect())?.into_iter();
        self.sockets.give_back(node);
        let mut next = |nsid: Option<Nsid>| nsid.and_then(|nsid| facts(&links.next()??, nsid));
        Ok((next(nsids.near), next(nsids.far)))
    }

    /// Which device of the node owns that address, or the first one in that prefix; `None` if none does, so no tunnel can
    /// start there.
    pub fn uplink(&self, within: impl Into<IpNet>) -> Result<Option<Uplink>> {
        let within = within.into();
        let mut node = self.sockets.get()?;
        let addresses = node.dump(rt::list_addresses(0, None)).map_err(|e| e.during("list addresses"))?;
        let mut addresses = addresses.into_iter().filter_map(Address::of);
        let owner = addresses.find(|address| within.contains(&address.net.addr()));
        let found = match owner {
            Some(address) => {
                let asked = vec![rt::get_link(Which::Index(address.ifindex), None, false)];
                node.links(asked)?.pop().flatten().map(|link| (address.net.addr(), link))
            }
            None => None,
        };
        self.sockets.give_back(node);
        Ok(found.map(|(ip, link)| Uplink { ip, ifname: link.name, ifindex: link.index, mtu: link.mtu }))
    }

    /// Every namespace that has a number in the node's, so every pod that ever had a wire and still lives.
    pub fn numbered(&self) -> Result<Vec<Nsid>> {
        let mut node = self.sockets.get()?;
        let answers = node.dump(rt::list_nsids()).map_err(|e| e.during("list numbers of namespaces"))?;
        self.sockets.give_back(node);
        Ok(answers.iter().filter_map(rt::nsid_of).collect())
    }

    /// Every link in a namespace that carries a mark of ours, whoever we were then.
    pub fn owned(&self, nsid: Nsid) -> Result<Vec<Owned>> {
        let mut node = self.sockets.get()?;
        let links = node.dump(rt::list_links(Some(nsid))).map_err(|e| e.during("list interfaces"))?;
        self.sockets.give_back(node);
        Ok(links
            .into_iter()
            .filter_map(Link::of)
            .filter_map(|link| {
                let (side, id) = link.altnames.iter().find_map(|name| parse_mark(name))?;
                Some(Owned { id, side, ifname: link.name, ifindex: link.index })
            })
            .collect())
    }
}

/// What is left to do so that the kernel is as planned: for each end the changes, or `None` if it is missing.
pub fn difference(plan: &WirePlan, seen: &Snapshot) -> Vec<(Side, Option<Vec<Change>>)> {
    let mut left = Vec::new();
    for (side, end) in plan.ends() {
        let (have, facts) = match side {
            Side::Near => (&seen.plan.near, seen.near),
            Side::Far => (&seen.plan.far, seen.far),
        };
        let Some(have) = have.as_ref().filter(|have| {
            (have.ns, &have.ifname) == (end.ns, &end.ifname) && seen.plan.construction == plan.construction
        }) else {
            left.push((side, None));
            continue;
        };
        let mut changes = end.difference(have);
        if facts.is_none_or(|facts| !facts.up) {
            changes.insert(0, Change::Up);
        }
        if !changes.is_empty() {
            left.push((side, Some(changes)));
        }
    }
    left
}

// === impl Seen ===

impl Seen {
    /// A link that was made a moment ago: nothing hangs on it.
    pub(crate) fn newborn(plan: &EndPlan, link: &Link) -> Self {
        let bare = EndPlan {
            ns: plan.ns,
            ifname: link.name.clone(),
            alias: link.alias.clone().unwrap_or_default(),
            mtu: plan.mtu.map(|_| link.mtu),
            mac: plan.mac.and(link.mac),
            addresses: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
            policies: Vec::new(),
        };
        Self { link: link.clone(), plan: bare, tables: Vec::new() }
    }
}

/// One end with all that hangs on it. The socket is one of the end's namespace.
pub(crate) fn observe(socket: &mut Socket<Rt>, plan: &EndPlan, link: &Link) -> Result<Seen> {
    let mut seen = Seen::newborn(plan, link);
    let index = link.index;

    let addresses = socket.dump(rt::list_addresses(index, None)).map_err(|e| e.during("list addresses"))?;
    for address in addresses.into_iter().filter_map(Address::of) {
        let wanted = address.settled && plan.addresses.contains(&address.net);
        if address.ifindex == index && (address.ours || wanted) {
            seen.plan.addresses.push(address.net);
        }
    }

    let mut tables: BTreeMap<u32, Policy> = BTreeMap::new();
    for v6 in [false, true] {
        let routes = match socket.dump(rt::list_routes(v6, index)) {
            Ok(routes) => routes,
            // No IPv6 here, or not on this interface.
            Err(Attempt::Refused(_)) if v6 => continue,
            Err(e) => return Err(e.during("list routes")),
        };
        for (table, route) in routes.iter().filter_map(rt::route_of) {
            if table == MAIN_TABLE {
                seen.plan.routes.push(route);
            } else {
                tables
                    .entry(table)
                    .or_insert(Policy { when: NO_RULE, routes: Vec::new() })
                    .routes
                    .push(route);
            }
        }
    }
    if !tables.is_empty() {
        let rules = socket.dump(rt::list_rules()).map_err(|e| e.during("list routing rules"))?;
        for rule in rules.iter().filter_map(rt::rule_of).filter(|rule| rule.ours) {
            if let Some(policy) = tables.get_mut(&rule.table) {
                policy.when = rule.when;
            }
        }
    }
    for (table, mut policy) in tables {
        policy.routes.sort();
        seen.tables.push((table, policy.clone()));
        seen.plan.policies.push(policy);
    }

    let neighbours = socket.dump(rt::list_neighbours(index)).map_err(|e| e.during("list neighbours"))?;
    for (neighbour, ours) in neighbours.iter().filter_map(rt::neighbour_of) {
        if ours || plan.neighbours.contains(&neighbour) {
            seen.plan.neighbours.push(neighbour);
        }
    }
    Ok(seen)
}

// === private helpers ===

/// In the end's namespace: the end, and the tunnel behind it if there is one.
fn look<'e, 'p>(
    end: &'e End<'p>,
    link: Link,
) -> Result<(&'e End<'p>, Option<EndFacts>, EndPlan, Option<Vxlan>)> {
    let mut socket = Socket::open()?;
    let seen = observe(&mut socket, end.plan, &link)?;
    let tunnel = tunnel(&mut socket, &link)?;
    Ok((end, facts(&link, end.nsid), seen.plan, tunnel))
}

fn tunnel(socket: &mut Socket<Rt>, link: &Link) -> Result<Option<Vxlan>> {
    let Kind::Vxlan(facts) = &link.kind else { return Ok(None) };
    let mut remote = facts.remote.map(|ip| (ip, None));
    if remote.is_none() {
        let entries =
            socket.dump(rt::list_vxlan_peers(link.index)).map_err(|e| e.during("list tunnel peers"))?;
        remote = entries.iter().find_map(rt::vxlan_peer_of);
    }
    let tunnel = facts.local.zip(remote).map(|(local, (remote, port))| Vxlan {
        vni: facts.vni,
        local,
        remote,
        port: facts.port,
        remote_port: port.unwrap_or(facts.port),
    });
    tunnel.ok_or_else(|| Error::Protocol(format!("{} is no tunnel to one peer", link.name))).map(Some)
}

fn facts(link: &Link, nsid: Nsid) -> Option<EndFacts> {
    Some(EndFacts {
        nsid,
        ifindex: link.index,
        mac: link.mac?,
        mtu: link.mtu,
        up: link.up,
        counters: link.counters,
    })
}
