//! Makes the kernel equal to a plan.
//!
//! ```text
//!   node's socket ──► who holds the names?  (by number of namespace, no descriptor needed)
//!        │               all as planned ─► adopt     ours, but different ─► set aside, create     nothing ─► create
//!        ▼
//!   node's socket ──► create: one message makes both ends, named, each in its namespace (or the VXLAN device)
//!        ▼
//!   thread in each end's namespace ──► what differs? ──► one batch: alias, MTU, mark, up, addresses, routes, …
//! ```
//!
//! A link is created down and in a device group of our own; alias and group change in the batch, one call of the kernel,
//! that sets it up. So a link that we made and could not finish, because we were killed, is recognised as ours and
//! replaced. What it is called it is told while it is down: of a link that is up the kernel announces each change, and as
//! long as the other end is down it goes through all IPv6 routes of the namespace each time.
//!
//! The client's end of a wire that is made anew, with another endpoint most of all, is set aside: renamed while it is up, and
//! recognised as unfinished. It carries packets until the new end does; deletion alone takes the kernel 20 ms. Kernels
//! before 6.2 do not rename what is up: there it is deleted first.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::link::LinkAttribute;
use parking_lot::Mutex;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Refusal, Result};
use crate::netlink::{Attempt, Request, Route as Rt, Socket};
use crate::netns::{self, Namespace, NsId};
use crate::plan::{Change, Construction, EndPlan, Mac, Policy, Side, Vxlan, WirePlan, parse_mark};
use crate::reaper::Reaper;
use crate::rt::{self, BIRTH_GROUP, Kind, Link, MAIN_TABLE, Nsid, Rule, Which};
use crate::snapshot::{Seen, observe};
use crate::{solicited, sysctl};

/// The wires of one node, in its kernel.
///
/// All methods block for as long as the kernel takes (tenths of a millisecond; deletion: tens of milliseconds) and may
/// be called from several threads at once. When they return, nothing is open in the namespace of a pod.
#[derive(Debug)]
pub struct Kernel {
    pub(crate) sockets: Arc<Sockets>,
    pub(crate) reaper: Reaper,
}

/// Netlink sockets of the node's namespace, and what those who use them share.
#[derive(Debug)]
pub(crate) struct Sockets {
    node: Namespace,
    idle: Mutex<Vec<Socket<Rt>>>,
    /// Held while table numbers are chosen: two connections of one pod must not choose the same.
    tables: Mutex<()>,
}

/// What [`Kernel::apply`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Whether the wire was made now, rather than found.
    pub created: bool,
    /// How many netlink messages changed something. 0: all was as planned already.
    pub writes: u64,
    /// The near end, where the plan has one.
    pub near: Option<EndState>,
    /// The far end, where the plan has one.
    pub far: Option<EndState>,
}

/// What the kernel chose for one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndState {
    /// How the node numbers the namespace.
    pub nsid: Nsid,
    /// Index of the interface in it.
    pub ifindex: u32,
    /// Its hardware address.
    pub mac: Mac,
}

/// The numbers that the node's namespace has for those of a wire. They stand in the record of a wire, because with
/// them its links are found and deleted when no descriptor of the pod's namespace is left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nsids {
    /// Of the client's namespace.
    pub near: Option<Nsid>,
    /// Of the endpoint's.
    pub far: Option<Nsid>,
}

/// One end while we work on it.
pub(crate) struct End<'a> {
    pub(crate) side: Side,
    pub(crate) plan: &'a EndPlan,
    pub(crate) mark: String,
    pub(crate) ns: &'a Namespace,
    pub(crate) nsid: Nsid,
}

/// How often the rest of a difference is worked off. The kernel takes things away on its own (secondary addresses go
/// with the primary, routes with the last address), so a second look may find more to do.
const ROUNDS: u32 = 3;

// === impl Kernel ===

impl Kernel {
    /// Works from that namespace, the node's: there are the UDP sockets of tunnels, and the numbers of pods.
    pub fn new(node: Namespace) -> Result<Self> {
        let idle = Mutex::new(vec![Socket::open_in(&node)?]);
        let sockets = Arc::new(Sockets { idle, node, tables: Mutex::new(()) });
        Ok(Self { reaper: Reaper::new(Arc::clone(&sockets)), sockets })
    }

    /// Makes the wire as planned, with the fewest changes: none if it is so already. A wire that had to be made is
    /// made completely or not at all. Hardware address and index of an existing wire stay as they are.
    ///
    /// `known` are open namespaces the caller has anyway; one that is not among them is looked for. When an end is to
    /// be in another namespace than before, [`Kernel::remove`] the wire as it was first. What is left of a wire of this
    /// connection in the queue of [`Kernel::remove_later`] is deleted before.
    ///
    /// # Errors
    /// [`Error::Plan`], [`Error::NamespaceGone`], [`Error::NameTaken`], [`Error::VniTaken`], [`Error::Refused`].
    pub fn apply(&self, plan: &WirePlan, known: &[&Namespace]) -> Result<Applied> {
        plan.validate()?;
        let found = find_missing(plan, known)?;
        let mut node = self.sockets.get()?;
        let before = node.writes();
        let ends = ends(&mut node, plan, known, &found)?;

        // A link with our mark that is still to be deleted must neither be adopted, nor outlive its successor.
        self.reaper.settle(&plan.id)?;
        let going = self.reaper.backlog.queued();
        let mut aside = Vec::new();
        let (links, created) = loop {
            let gone = self.reaper.backlog.ended();
            match links(&mut node, plan, &ends, &mut aside) {
                // A link that is going, but not gone, may be in the way.
                Err(Error::NameTaken { .. } | Error::VniTaken { .. }) if gone < going => {
                    self.reaper.backlog.wait_beyond(gone);
                }
                Err(e) => {
                    self.reaper.end_aside(&plan.id, aside);
                    return Err(e);
                }
                Ok(found) => break found,
            }
        };
        let mut jobs: Vec<_> = ends.iter().zip(&links).map(|(end, link)| (end.ns, (end, link))).collect();
        if !aside.is_empty() {
            // Whoever is to answer first, and then the way there.
            jobs.reverse();
        }
        let configured = netns::visit(jobs, |(end, link)| self.configure(plan, end, link, created));
        // Nobody waits for it: a packet on its way to a node that is gone may hold a link for seconds.
        self.reaper.end_aside(&plan.id, aside);
        let writes = match configured {
            Ok(counts) => counts.iter().sum::<u64>() + node.writes() - before,
            Err(e) => {
                if created
                    && let Err(error) = delete(&mut node, links.iter().zip(ends.iter().map(|end| end.nsid)))
                {
                    tracing::warn!(%error, wire = plan.id, "cannot take back a wire that could not be finished");
                }
                return Err(e);
            }
        };
        if writes > 0 {
            // The kernel may take a second to notice that the other end of a veth is up, and sends nothing before,
            // not even ARP. To be asked for the link makes it notice (linkwatch_sync_dev).
            let both = ends.iter().zip(&links);
            let ask = both.map(|(end, link)| rt::get_link(Which::Index(link.index), Some(end.nsid), false));
            node.links(ask.collect())?;
        }
        self.sockets.give_back(node);

        let state = |side| {
            let (end, link) = ends.iter().zip(&links).find(|(end, _)| end.side == side)?;
            Some(EndState { nsid: end.nsid, ifindex: link.index, mac: link.mac? })
        };
        Ok(Applied { created, writes, near: state(Side::Near), far: state(Side::Far) })
    }

    /// How the node's namespace numbers that one; it is given a number now if it has none.
    pub fn nsid(&self, ns: &Namespace) -> Result<Nsid> {
        let mut node = self.sockets.get()?;
        let nsids = node.assign_nsids(&[ns])?;
        self.sockets.give_back(node);
        nsids.first().copied().ok_or(Error::NamespaceGone(ns.id()))
    }

    /// Makes one end as planned, on a thread in its namespace; the link exists. How many messages that took.
    fn configure(&self, plan: &WirePlan, end: &End<'_>, link: &Link, created: bool) -> Result<u64> {
        prepare(end.plan, link, created)?;
        let mut socket = Socket::open()?;
        if let Construction::Vxlan(tunnel) = &plan.construction
            && tunnel.port != tunnel.remote_port
        {
            set_vxlan_peer(&mut socket, link.index, tunnel)?;
        }
        let mut seen =
            if created { Seen::newborn(end.plan, link) } else { observe(&mut socket, end.plan, link)? };
        for _ in 0..ROUNDS {
            let changes = work(end, &seen);
            let removes = changes.iter().any(|change| matches!(change, Change::RemoveAddress(_)));
            self.carry_out(&mut socket, end, &seen, changes)?;
            if !removes {
                break;
            }
            let link =
                socket.links(vec![rt::get_link(Which::Index(link.index), None, false)])?.pop().flatten();
            let link = link.ok_or_else(|| vanished(end))?;
            seen = observe(&mut socket, end.plan, &link)?;
        }
        if socket.writes() > 0 {
            let addresses = end.plan.addresses.iter().filter_map(|net| match net.addr() {
                IpAddr::V4(_) => None,
                IpAddr::V6(address) => Some(address),
            });
            solicited::await_groups(&end.plan.ifname, addresses);
        }
        Ok(socket.writes())
    }

    /// Takes the rules of ours away that lead to an empty table. How many there were.
    pub(crate) fn clear_rules(&self, ns: &Namespace) -> Result<usize> {
        ns.run(|| {
            let mut socket = Socket::open()?;
            let _guard = self.sockets.tables.lock();
            let mut batch = Batch::default();
            batch.orphans(&Tables::read(&mut socket)?);
            let count = batch.requests.len();
            batch.commit(&mut socket, &format!("in {}", ns.id())).map(|()| count)
        })?
    }

    /// Sends the changes as one batch.
    fn carry_out(
        &self,
        socket: &mut Socket<Rt>,
        end: &End<'_>,
        seen: &Seen,
        changes: Vec<Change>,
    ) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let policies = |change: &Change| matches!(change, Change::AddPolicy(_) | Change::RemovePolicy(_));
        let guard = changes.iter().any(policies).then(|| self.sockets.tables.lock());
        let mut tables = match guard {
            Some(_) => Tables::read(socket)?,
            None => Tables::default(),
        };

        let mut batch = Batch::default();
        // What concerns the link itself comes before what hangs on it, and before it is up.
        let (of_link, mut others): (Vec<_>, Vec<_>) = changes.into_iter().partition(Change::is_of_link);
        let attributes = link_attributes(seen, &of_link);
        let first = of_link.iter().find(|change| **change != Change::Up).or(of_link.first());
        if let Some(first) = first.filter(|_| !attributes.is_empty()) {
            batch.push(rt::set_link(seen.link.index, attributes), first);
        }
        for mark in others.extract_if(.., |change| matches!(change, Change::Mark(_))) {
            batch.add(seen, &mark, &mut tables);
        }
        if of_link.contains(&Change::Up) {
            batch.push(rt::set_up(seen.link.index), &Change::Up);
        }
        for change in &others {
            batch.add(seen, change, &mut tables);
        }
        batch.orphans(&tables);
        batch.commit(socket, &format!("{} in {}", end.plan.ifname, end.ns.id()))
    }
}

// === impl Sockets ===

impl Sockets {
    /// A socket. It goes back with [`Sockets::give_back`] when all went well, and is closed when not: then nobody
    /// knows what is still unread in it.
    pub(crate) fn get(&self) -> Result<Socket<Rt>> {
        let idle = self.idle.lock().pop();
        idle.map_or_else(|| Socket::open_in(&self.node), Ok)
    }

    pub(crate) fn give_back(&self, socket: Socket<Rt>) {
        self.idle.lock().push(socket);
    }

    /// Takes the policies of one end away, with rules that lost their interface.
    pub(crate) fn clear_policies(&self, end: &End<'_>, link: Option<&Link>) -> Result<()> {
        end.ns.run(|| {
            let mut socket = Socket::open()?;
            let _guard = self.tables.lock();
            let tables = Tables::read(&mut socket)?;
            let mut batch = Batch::default();
            if let Some(link) = link {
                let seen = observe(&mut socket, end.plan, link)?;
                for (_, policy) in &seen.tables {
                    batch.remove_policy(&seen, policy, &tables);
                }
            }
            batch.orphans(&tables);
            batch.commit(&mut socket, &format!("{} in {}", end.plan.ifname, end.ns.id()))
        })?
    }
}

// === private helpers: which ends and links are ours ===

/// The ends of a plan with their namespaces, which have a number from now on.
pub(crate) fn ends<'a>(
    node: &mut Socket<Rt>,
    plan: &'a WirePlan,
    known: &[&'a Namespace],
    found: &'a [Namespace],
) -> Result<Vec<End<'a>>> {
    let namespaces = plan.ends().map(|(_, end)| {
        let ns = known.iter().copied().chain(found).find(|ns| ns.id() == end.ns);
        ns.ok_or(Error::NamespaceGone(end.ns))
    });
    let namespaces: Vec<_> = namespaces.collect::<Result<_>>()?;
    let nsids = node.assign_nsids(&namespaces)?;
    let ends = plan.ends().zip(namespaces).zip(nsids);
    Ok(ends
        .map(|(((side, plan_end), ns), nsid)| End { side, plan: plan_end, mark: plan.mark(side), ns, nsid })
        .collect())
}

/// The links of the wire: those that are there if they are as planned, or else new ones. Whether they are new. What was
/// there instead is deleted, or goes on `aside`, to be deleted when the new ones are up.
fn links(
    node: &mut Socket<Rt>,
    plan: &WirePlan,
    ends: &[End<'_>],
    aside: &mut Vec<(Link, Nsid)>,
) -> Result<(Vec<Link>, bool)> {
    let questions = ends.iter().flat_map(|end| {
        [end.mark.as_str(), &end.plan.ifname]
            .map(|name| rt::get_link(Which::Name(name), Some(end.nsid), false))
    });
    let mut answers = node.links(questions.collect())?.into_iter();
    let (mut usable, mut leftovers) = (Vec::new(), Vec::new());
    for end in ends {
        let (marked, named) = (answers.next().flatten(), answers.next().flatten());
        let (ours, left) = claim(end, marked, named)?;
        let (fitting, other): (Vec<_>, Vec<_>) =
            ours.into_iter().partition(|link| link.fits(&plan.construction));
        usable.extend(fitting.into_iter().map(|link| (link, end.nsid)));
        leftovers.extend(left.into_iter().chain(other).map(|link| (link, end.nsid)));
    }
    if leftovers.is_empty() && usable.len() == ends.len() && joined(&usable) {
        return Ok((usable.into_iter().map(|(link, _)| link).collect(), false));
    }
    leftovers.append(&mut usable);
    if let ([left], [near, ..]) = (leftovers.as_slice(), ends)
        && may_stay(plan, near, left)
        && netns::visit([(near.ns, left)], |(link, _)| set_aside(link))?.contains(&true)
    {
        aside.append(&mut leftovers);
    }
    delete(node, leftovers.iter().map(|(link, nsid)| (link, *nsid)))?;
    Ok((create(node, plan, ends)?, true))
}

/// Whether what is left of an earlier wire can be there beside the new one: the end of a client that goes on with another
/// endpoint. A tunnel of the same number cannot, and rules of one end would catch the packets of the other.
fn may_stay(plan: &WirePlan, near: &End<'_>, (left, nsid): &(Link, Nsid)) -> bool {
    let same_number = match (&plan.construction, &left.kind) {
        (Construction::Vxlan(tunnel), Kind::Vxlan(seen)) => tunnel.vni == seen.vni,
        _ => false,
    };
    near.side == Side::Near
        && near.nsid == *nsid
        && near.plan.policies.is_empty()
        && left.up
        && !left.is_unfinished()
        && !same_number
}

/// On a thread in the link's namespace: gives its names free, and leaves it as it is else. Whether that went well.
fn set_aside(link: &Link) -> Result<bool> {
    let mut socket = Socket::<Rt>::open()?;
    let marks = link.altnames.iter().filter(|name| parse_mark(name).is_some());
    let unmark = marks.map(|mark| rt::clear_mark(link.index, mark));
    let refused = socket.commit([rt::set_aside(link.index)].into_iter().chain(unmark).collect())?;
    Ok(refused.is_empty())
}

/// Of the link that carries our mark and the one that has the name we want: the one to use, and those to delete.
fn claim(end: &End<'_>, marked: Option<Link>, named: Option<Link>) -> Result<(Option<Link>, Vec<Link>)> {
    let name = &end.plan.ifname;
    // Ours under another name is of no use.
    let Some(named) = named else { return Ok((None, marked.into_iter().collect())) };
    if marked.as_ref().is_some_and(|marked| marked.index == named.index) {
        return Ok(if named.name == *name { (Some(named), Vec::new()) } else { (None, vec![named]) });
    }
    let mark = named.altnames.iter().find(|name| parse_mark(name).is_some());
    // Of the same client's connection, from an older life, as upstream's forwarders know each other's.
    let same_client = named.alias.as_deref() == Some(end.plan.alias.as_str());
    if named.name == *name && same_client && mark.is_none() {
        Ok((Some(named), marked.into_iter().collect()))
    } else if named.name == *name && (same_client || named.is_unfinished()) {
        // It was another wire of ours, which nobody looks after any more, or never became one.
        Ok((None, marked.into_iter().chain([named]).collect()))
    } else {
        let by = mark.or(named.alias.as_ref());
        let by = by.map_or_else(|| format!("the unmarked link {}", named.name), Clone::clone);
        Err(Error::NameTaken { name: name.clone(), ns: end.plan.ns, by })
    }
}

/// Whether two ends are the ends of one pair (a single one is complete).
fn joined(links: &[(Link, Nsid)]) -> bool {
    match links {
        [(near, near_nsid), (far, far_nsid)] => {
            let at = |link: &Link, nsid: Nsid| link.peer_nsid.unwrap_or(nsid);
            near.peer == Some(far.index)
                && far.peer == Some(near.index)
                && at(near, *near_nsid) == *far_nsid
                && at(far, *far_nsid) == *near_nsid
        }
        _ => true,
    }
}

/// Makes the links of a wire, and looks up what the kernel made of them.
fn create(node: &mut Socket<Rt>, plan: &WirePlan, ends: &[End<'_>]) -> Result<Vec<Link>> {
    let request = match (&plan.construction, ends) {
        (Construction::Veth, [near, far]) => rt::new_veth((near.plan, near.ns), (far.plan, far.ns)),
        (Construction::Vxlan(tunnel), [end]) => rt::new_vxlan(tunnel, end.plan, end.ns),
        _ => return Err(Error::Protocol("a validated plan has the ends of its construction".into())),
    };
    let made = node.request(request);
    let questions = ends.iter().map(|end| rt::get_link(Which::Name(&end.plan.ifname), Some(end.nsid), false));
    let links = node.links(questions.collect())?;
    match made {
        Ok(()) => links.into_iter().zip(ends).map(|(link, end)| link.ok_or_else(|| vanished(end))).collect(),
        Err(Attempt::Refused(Refusal { errno: Errno::EXIST, .. })) => {
            // Between our look and now, or the VNI: the kernel has the same number for both.
            for (link, end) in links.into_iter().zip(ends) {
                if link.is_some() {
                    claim(end, None, link)?;
                }
            }
            match &plan.construction {
                Construction::Vxlan(tunnel) => Err(Error::VniTaken { vni: tunnel.vni, port: tunnel.port }),
                Construction::Veth => Err(Error::Refused {
                    what: "make a veth pair".into(),
                    source: Refusal {
                        errno: Errno::EXIST,
                        text: Some("somebody else uses the names, too".into()),
                    },
                }),
            }
        }
        Err(e) => Err(e.during(format!("make {}", first_line(plan)))),
    }
}

/// Deletes links; that one is gone already is fine. Waits for the kernel (about 20 ms for each).
pub(crate) fn delete<'l>(
    node: &mut Socket<Rt>,
    links: impl IntoIterator<Item = (&'l Link, Nsid)>,
) -> Result<()> {
    for (link, nsid) in links {
        match node.request(Request::new(rt::delete_link(Which::Index(link.index), Some(nsid)))) {
            Ok(()) | Err(Attempt::Refused(Refusal { errno: Errno::NODEV | Errno::INVAL, .. })) => {}
            Err(e) => return Err(e.during(format!("delete {}", link.name))),
        }
    }
    Ok(())
}

/// Opens the namespaces of a plan that the caller does not have open.
pub(crate) fn find_missing(plan: &WirePlan, known: &[&Namespace]) -> Result<Vec<Namespace>> {
    let have: BTreeSet<NsId> = known.iter().map(|ns| ns.id()).collect();
    let missing: BTreeSet<NsId> =
        plan.ends().map(|(_, end)| end.ns).filter(|ns| !have.contains(ns)).collect();
    missing.into_iter().map(|ns| Namespace::find(ns)?.ok_or(Error::NamespaceGone(ns))).collect()
}

fn vanished(end: &End<'_>) -> Error {
    Error::Refused {
        what: format!("keep {} in namespace {}", end.plan.ifname, end.plan.ns),
        source: Refusal {
            errno: Errno::NODEV,
            text: Some("somebody removed or renamed it meanwhile".into()),
        },
    }
}

fn first_line(plan: &WirePlan) -> String {
    plan.to_string().lines().next().unwrap_or_default().to_owned()
}

// === private helpers: what differs, and how it is said ===

/// All that is to be done at one end.
fn work(end: &End<'_>, seen: &Seen) -> Vec<Change> {
    let mut changes = end.plan.difference(&seen.plan);
    if !seen.link.altnames.contains(&end.mark) {
        changes.insert(0, Change::Mark(end.mark.clone()));
    }
    if !seen.link.up {
        changes.insert(0, Change::Up);
    }
    changes
}

fn link_attributes(seen: &Seen, changes: &[Change]) -> Vec<LinkAttribute> {
    let attribute = |change: &Change| match change {
        Change::Alias(alias) => Some(LinkAttribute::IfAlias(alias.clone())),
        Change::Mac(mac) => Some(LinkAttribute::Address(mac.0.to_vec())),
        Change::Mtu(mtu) => Some(LinkAttribute::Mtu(*mtu)),
        _ => None,
    };
    let mut attributes: Vec<_> = changes.iter().filter_map(attribute).collect();
    if !changes.is_empty() && seen.link.group == BIRTH_GROUP {
        attributes.push(rt::grown_up());
    }
    attributes
}

/// Settings of the namespace that a wire needs (data-plane 2.12).
fn prepare(plan: &EndPlan, link: &Link, created: bool) -> Result<()> {
    // Once in the life of a wire: the more namespaces there are, the longer the kernel searches for the file.
    // Lets unprivileged processes open echo sockets, for liveness. A user namespace without that many groups, or a
    // read-only /proc/sys, cannot have it, and the wire works without.
    if created && let Err(error) = sysctl::set("net/ipv4/ping_group_range", "0 2147483647") {
        tracing::debug!(%error, ns = %plan.ns, "unprivileged ping stays as it is");
    }
    if link.ipv6_disabled == Some(true) && plan.addresses.iter().any(|net| net.addr().is_ipv6()) {
        sysctl::set(&format!("net/ipv6/conf/{}/disable_ipv6", plan.ifname), "0")?;
    }
    Ok(())
}

fn set_vxlan_peer(socket: &mut Socket<Rt>, ifindex: u32, tunnel: &Vxlan) -> Result<()> {
    let entries = socket.dump(rt::list_vxlan_peers(ifindex)).map_err(|e| e.during("list tunnel peers"))?;
    let wanted = (tunnel.remote, Some(tunnel.remote_port));
    let peers: Vec<_> = entries.iter().filter_map(rt::vxlan_peer_of).collect();
    let others = peers.iter().filter(|peer| **peer != wanted);
    let mut batch: Vec<_> = others
        .map(|(ip, port)| Request::new(Message::DelNeighbour(rt::vxlan_peer(ifindex, *ip, *port))))
        .collect();
    if !peers.contains(&wanted) {
        let peer = rt::vxlan_peer(ifindex, wanted.0, wanted.1);
        // The entry of all zeroes is a list, so a destination is appended.
        batch.push(Request::with(Message::NewNeighbour(peer), NLM_F_CREATE | NLM_F_APPEND));
    }
    let refused = socket.commit(batch)?.into_iter().next();
    refused.map_or(Ok(()), |at| {
        Err(Error::Refused { what: "set the peer of a tunnel".into(), source: at.refusal })
    })
}

/// Requests, each with the change it is part of.
#[derive(Default)]
struct Batch {
    requests: Vec<Request<Message>>,
    changes: Vec<Change>,
}

impl Batch {
    fn push(&mut self, request: Request<Message>, change: &Change) {
        self.requests.push(request);
        self.changes.push(change.clone());
    }

    fn add(&mut self, seen: &Seen, change: &Change, tables: &mut Tables) {
        let index = seen.link.index;
        let replace = NLM_F_CREATE | NLM_F_REPLACE;
        match change {
            Change::Mark(mark) => self.push(rt::set_mark(index, mark), change),
            Change::AddAddress(net) => {
                self.push(Request::with(Message::NewAddress(rt::address(index, *net)), replace), change);
            }
            Change::RemoveAddress(net) => {
                self.push(Request::new(Message::DelAddress(rt::address(index, *net))), change);
            }
            Change::AddRoute(route) => {
                self.push(
                    Request::with(Message::NewRoute(rt::route(index, MAIN_TABLE, route)), replace),
                    change,
                );
            }
            Change::RemoveRoute(route) => {
                self.push(Request::new(Message::DelRoute(rt::route(index, MAIN_TABLE, route))), change);
            }
            Change::AddNeighbour(neighbour) => {
                self.push(
                    Request::with(Message::NewNeighbour(rt::neighbour(index, neighbour)), replace),
                    change,
                );
            }
            Change::RemoveNeighbour(neighbour) => {
                self.push(Request::new(Message::DelNeighbour(rt::neighbour(index, neighbour))), change);
            }
            Change::AddPolicy(policy) => {
                let table = tables.take_free();
                for route in &policy.routes {
                    self.push(
                        Request::with(Message::NewRoute(rt::route(index, table, route)), replace),
                        change,
                    );
                }
                for rule in rules_of(policy, table) {
                    self.push(
                        Request::with(Message::NewRule(rt::rule(&rule)), NLM_F_CREATE | NLM_F_EXCL),
                        change,
                    );
                }
            }
            Change::RemovePolicy(policy) => {
                self.remove_policy(seen, policy, tables);
            }
            // They come before all others.
            Change::Alias(_) | Change::Mac(_) | Change::Mtu(_) | Change::Up => {}
        }
    }

    fn remove_policy(&mut self, seen: &Seen, policy: &Policy, tables: &Tables) {
        let change = Change::RemovePolicy(policy.clone());
        for (table, _) in seen.tables.iter().filter(|(_, other)| other == policy) {
            for rule in tables.rules.iter().filter(|rule| rule.ours && rule.table == *table) {
                self.push(Request::new(Message::DelRule(rt::rule(rule))), &change);
            }
            for route in &policy.routes {
                self.push(
                    Request::new(Message::DelRoute(rt::route(seen.link.index, *table, route))),
                    &change,
                );
            }
        }
    }

    /// Rules of ours whose table is empty, because the interface that its routes went out of is gone.
    fn orphans(&mut self, tables: &Tables) {
        for rule in tables.orphans() {
            let policy = Policy { when: rule.when, routes: Vec::new() };
            self.push(Request::new(Message::DelRule(rt::rule(rule))), &Change::RemovePolicy(policy));
        }
    }

    fn commit(self, socket: &mut Socket<Rt>, whose: &str) -> Result<()> {
        let Self { requests, changes } = self;
        let refused = socket.commit(requests)?.into_iter().map(|at| (changes.get(at.index), at.refusal));
        let gone = [Errno::ADDRNOTAVAIL, Errno::NOENT, Errno::SRCH];
        let errors = refused
            // What was to be removed may be gone already: the kernel, or its maker, took it.
            .filter(|(change, refusal)| {
                !(change.is_some_and(Change::removes) && gone.contains(&refusal.errno))
            })
            .map(|(change, source)| {
                let what = change.map_or_else(String::new, ToString::to_string);
                Error::Refused { what: format!("{what} ({whose})"), source }
            });
        errors.into_iter().next().map_or(Ok(()), Err)
    }
}

/// The rules that lead to the table of a policy: one for each family of its routes (`from` has fixed that already).
fn rules_of(policy: &Policy, table: u32) -> impl Iterator<Item = Rule> {
    let families: BTreeSet<bool> = match policy.when.from {
        Some(from) => [from.addr().is_ipv6()].into(),
        None => policy.routes.iter().map(|route| route.dst.addr().is_ipv6()).collect(),
    };
    let when = policy.when;
    families.into_iter().map(move |v6| Rule { v6, when, table, ours: true })
}

/// Which routing tables of a namespace are in use, and by which rules.
#[derive(Default)]
pub(crate) struct Tables {
    used: BTreeSet<u32>,
    pub(crate) rules: Vec<Rule>,
    filled: BTreeMap<bool, BTreeSet<u32>>,
}

impl Tables {
    pub(crate) fn read(socket: &mut Socket<Rt>) -> Result<Self> {
        let mut tables = Self::default();
        for v6 in [false, true] {
            let routes = match socket.dump(rt::list_all_routes(v6)) {
                Ok(routes) => routes,
                // No IPv6 here.
                Err(Attempt::Refused(_)) if v6 => continue,
                Err(e) => return Err(e.during("list routes")),
            };
            tables
                .filled
                .insert(v6, routes.iter().filter_map(rt::route_of).map(|(table, _)| table).collect());
        }
        let rules = socket.dump(rt::list_rules()).map_err(|e| e.during("list routing rules"))?;
        tables.rules = rules.iter().filter_map(rt::rule_of).collect();
        tables.used = tables.filled.values().flatten().copied().collect();
        tables.used.extend(tables.rules.iter().map(|rule| rule.table));
        tables.used.extend([0, 253, 254, 255]); // unspec, default, main, local
        Ok(tables)
    }

    /// The lowest number that is free (data-plane 2.11).
    fn take_free(&mut self) -> u32 {
        let free = (1..).find(|table| !self.used.contains(table)).unwrap_or(u32::MAX);
        self.used.insert(free);
        free
    }

    pub(crate) fn orphans(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter().filter(|rule| {
            rule.ours && !self.filled.get(&rule.v6).is_some_and(|tables| tables.contains(&rule.table))
        })
    }
}
