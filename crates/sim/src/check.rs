//! What must hold, while things go wrong and after.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use nsm_api::{
    mechanism::key,
    path,
    pb::connection::{Connection, State},
};
use nsm_kernel::plan::Construction;
use tokio::time::Instant;

use crate::{
    kernel::{Device, addresses},
    world::{CAPACITY, What, World},
};

/// How long after everything is well again, or after its endpoint is gone, a client may be without a wire that works.
const HEALED: Duration = Duration::from_secs(45);
/// How long beyond the life of a token something may be there that nobody has any more.
const GRACE: Duration = Duration::from_secs(20);

/// Remembers since when something is as it should not be.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    /// Clients without a wire that works, and why.
    unwell: BTreeMap<String, (Instant, String)>,
    /// What nobody has any more.
    left: BTreeMap<String, Instant>,
    /// Addresses that are there twice.
    twice: BTreeMap<String, Instant>,
    /// Interfaces that are down.
    down: BTreeMap<String, Instant>,
    /// Connections of a hop that have one interface.
    namesakes: BTreeMap<String, Instant>,
    /// When no endpoint had an address left, the last time.
    full: Option<Instant>,
    panics: u64,
}

/// A wire as its client has it, and whether both ends agree on it.
struct Wired {
    conn: Connection,
    agreed: Result<(), String>,
}

impl Checker {
    /// Looks at everything. `calm`: since when nothing is being done to the mesh; `None`: something is.
    pub(crate) fn look(&mut self, world: &World, calm: Option<Instant>) {
        let now = Instant::now();
        self.panics(world);
        addresses_are_unique(world);
        numbers_are_unique(world);
        for call in world.net.overdue() {
            world.trace.violated("every call is answered or given up", call);
        }
        self.twice(world, now);
        self.down(world, now);
        self.namesakes(world, now);
        let clients = world.all(|what| matches!(what, What::Client { .. }));
        let mut wanted = BTreeSet::new();
        let mut unwell = BTreeMap::new();
        for slot in clients {
            let client = &world.slots[slot];
            if client.running.is_none() || !client.wanted {
                continue;
            }
            let wired = wire(world, slot);
            let problem = match &wired {
                None => Err("it has no wire".to_owned()),
                Some(wired) => {
                    wanted.extend(path::segments(&wired.conn).iter().map(|hop| hop.id.clone()));
                    wired.agreed.clone()
                }
            };
            if let Err(why) = problem {
                let since = self.unwell.get(&client.name).map_or(now, |(since, _)| *since);
                unwell.insert(client.name.clone(), (since, why));
            }
        }
        self.unwell = unwell;
        self.leftovers(world, &wanted, now);
        let Some(calm) = calm else { return };
        if all_full(world) {
            self.full = Some(now);
        }
        for (client, (since, why)) in &self.unwell {
            let begun = (*since).max(calm);
            // Clients that were killed over and over have left their addresses to their tokens.
            let free = self.full.map_or(begun, |full| full.max(begun));
            if now - free > HEALED || now - begun > world.shape.lifetime + GRACE + HEALED {
                world.trace.violated("every client has a wire", format!("{client}: {why}"));
            }
        }
        for (things, invariant) in [
            (&self.left, "nothing is left behind"),
            (&self.twice, "one address, one interface"),
            (&self.down, "an interface that was set down is up again"),
            (&self.namesakes, "one name, one connection"),
        ] {
            for (thing, since) in things {
                if now - (*since).max(calm) > world.shape.lifetime + GRACE {
                    world.trace.violated(invariant, thing.clone());
                }
            }
        }
    }

    /// Whether every client that wants a wire has one, and nothing else is there.
    pub(crate) fn is_well(&self) -> bool {
        self.unwell.is_empty() && self.left.is_empty()
    }

    /// Whether every client that wants a wire has one.
    pub(crate) fn all_served(&self) -> bool {
        self.unwell.is_empty()
    }

    /// What is wrong at present.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let unwell = self.unwell.iter().map(|(client, (_, why))| format!("{client}: {why}"));
        unwell.chain(self.left.keys().cloned()).collect()
    }

    fn panics(&mut self, world: &World) {
        let running = world.slots.iter().filter_map(|slot| slot.running.as_ref());
        let panics = running.map(|running| running.metrics.panics()).sum();
        if panics > self.panics {
            world.trace.violated("nothing panics", format!("{panics} panics were contained"));
        }
        self.panics = panics;
    }

    /// Addresses that two interfaces of a pod have: an endpoint that has forgotten a client that is dead gives its address
    /// to another, and the wire of the dead one stays for as long as its token.
    fn twice(&mut self, world: &World, now: Instant) {
        let (mut seen, mut twice) = (BTreeMap::new(), BTreeMap::new());
        for (node, ns, device) in world.kernels.all() {
            for address in addresses(&device) {
                if let Some(other) = seen.insert((ns, address), device.wire.clone())
                    && other != device.wire
                {
                    let what = format!("{address} is on {other} and {} of one pod, node {node}", device.wire);
                    let since = self.twice.get(&what).copied().unwrap_or(now);
                    twice.insert(what, since);
                }
            }
        }
        self.twice = twice;
    }

    /// Interfaces that somebody has set down: whoever looks whether a wire is as planned, sets them up.
    fn down(&mut self, world: &World, now: Instant) {
        let all = world.kernels.all().into_iter().filter(|(_, _, device)| device.is_down);
        let of = |(node, _, device): (usize, _, Device)| {
            format!("{} of wire {} on node {node}", device.plan.ifname, device.wire)
        };
        let since = |what: String| {
            let since = self.down.get(&what).copied().unwrap_or(now);
            (what, since)
        };
        self.down = all.map(of).map(since).collect();
    }

    /// Connections of one hop that have one interface, as their mechanisms name it: a client's first request that arrives
    /// twice is two, of which the client knows one.
    fn namesakes(&mut self, world: &World, now: Instant) {
        let mut namesakes = BTreeMap::new();
        for slot in &world.slots {
            let Some(running) = &slot.running else { continue };
            let mut owners = BTreeMap::new();
            for (id, conn) in running.process.held() {
                let Some(mechanism) = &conn.mechanism else { continue };
                let (Ok(Some(ns)), Some(name)) = (mechanism.inode(), mechanism.get(key::NAME)) else {
                    continue;
                };
                if let Some(other) = owners.insert((ns.dev, ns.ino, name.to_owned()), id.clone()) {
                    let what = format!("{} holds {other} and {id} for {name} of one namespace", slot.name);
                    let since = self.namesakes.get(&what).copied().unwrap_or(now);
                    namesakes.insert(what, since);
                }
            }
        }
        self.namesakes = namesakes;
    }

    /// Whether every interface is up.
    pub(crate) fn all_up(&self) -> bool {
        self.down.is_empty()
    }

    /// What hops and kernels hold that is no client's wire.
    fn leftovers(&mut self, world: &World, wanted: &BTreeSet<String>, now: Instant) {
        let mut left = BTreeMap::new();
        let mut held_by_forwarders = BTreeSet::new();
        let mut note = |thing: String, known: &BTreeMap<String, Instant>| {
            let since = known.get(&thing).copied().unwrap_or(now);
            left.insert(thing, since);
        };
        for slot in &world.slots {
            let Some(running) = &slot.running else { continue };
            if matches!(slot.what, What::Client { .. }) {
                continue;
            }
            for (id, conn) in running.process.held() {
                if slot.what == What::Forwarder {
                    held_by_forwarders.insert(id.clone());
                }
                let client = path::client_id(&conn);
                if !wanted.contains(&id) {
                    note(format!("connection {id} of {client} at {}", slot.name), &self.left);
                }
            }
        }
        for (node, _, device) in world.kernels.all() {
            if !held_by_forwarders.contains(&device.wire) {
                note(
                    format!("interface {} of wire {} on node {node}", device.plan.ifname, device.wire),
                    &self.left,
                );
            }
        }
        self.left = left;
    }
}

/// Whether endpoints run, and none of them has an address left.
fn all_full(world: &World) -> bool {
    let endpoints = world.all(|what| matches!(what, What::Endpoint { .. }));
    let running = endpoints.iter().filter_map(|slot| world.slots[*slot].running.as_ref());
    let full: Vec<bool> = running.map(|running| running.process.held().len() >= CAPACITY).collect();
    !full.is_empty() && full.into_iter().all(|full| full)
}

/// Two connections of an endpoint never have the same address.
fn addresses_are_unique(world: &World) {
    for slot in world.all(|what| matches!(what, What::Endpoint { .. })) {
        let Some(running) = &world.slots[slot].running else { continue };
        let mut owners: BTreeMap<String, String> = BTreeMap::new();
        for (id, conn) in running.process.held() {
            for address in source_addresses(&conn) {
                if let Some(other) = owners.insert(address.clone(), id.clone()) {
                    let what = format!("{} gives {address} to {other} and {id}", world.slots[slot].name);
                    world.trace.violated("one address, one connection", what);
                }
            }
        }
    }
}

/// Two wires of a node never have the same VNI.
fn numbers_are_unique(world: &World) {
    let mut numbers = BTreeMap::new();
    for (node, _, device) in world.kernels.all() {
        if let Construction::Vxlan(tunnel) = &device.construction
            && let Some(other) = numbers.insert((node, tunnel.vni, tunnel.port), device.wire.clone())
        {
            let what = format!("VNI {} of node {node} is that of {other} and {}", tunnel.vni, device.wire);
            world.trace.violated("one VNI, one wire", what);
        }
    }
}

fn source_addresses(conn: &Connection) -> Vec<String> {
    let context = conn.context.as_ref().and_then(|context| context.ip_context.as_ref());
    context.map(|ip| ip.src_ip_addrs.clone()).unwrap_or_default()
}

fn ips(texts: &[String]) -> BTreeSet<IpAddr> {
    texts.iter().filter_map(|text| text.split('/').next()?.parse().ok()).collect()
}

/// The wire of a client, and what is wrong with it.
fn wire(world: &World, slot: usize) -> Option<Wired> {
    let conn = world.slots[slot].wire.lock().as_ref()?.connection();
    let agreed = agreed(world, slot, &conn);
    Some(Wired { conn, agreed })
}

fn agreed(world: &World, slot: usize, conn: &Connection) -> Result<(), String> {
    if conn.state() != State::Up {
        return Err(format!("it is {}", conn.state().as_str_name()));
    }
    let name = &conn.network_service_endpoint_name;
    let endpoint = world.slots.iter().find(|slot| slot.name == *name);
    let endpoint = endpoint.ok_or_else(|| format!("its endpoint {name:?} has never been there"))?;
    let running = endpoint.running.as_ref().ok_or_else(|| format!("its endpoint {name} is dead"))?;
    let held = running.process.held();
    let last = path::segments(conn).last().map(|hop| &hop.id);
    let theirs = last.and_then(|id| held.get(id));
    let theirs = theirs.ok_or_else(|| format!("its endpoint {name} does not know it"))?;
    let (ours, given) = (source_addresses(conn), source_addresses(theirs));
    if ours != given {
        return Err(format!("it has {ours:?}, and {name} gave {given:?}"));
    }
    let ip = conn.context.clone().and_then(|context| context.ip_context).unwrap_or_default();
    let (near, far) = (ips(&ip.src_ip_addrs), ips(&ip.dst_ip_addrs));
    // What is left of an earlier wire may have the same addresses for a while.
    let clients = devices(world, world.slots[slot].ns, &near);
    let servers = devices(world, endpoint.ns, &far);
    let meet = |a: &Device, b: &Device| match (&a.construction, &b.construction) {
        (Construction::Veth, Construction::Veth) => a.wire == b.wire,
        (Construction::Vxlan(a), Construction::Vxlan(b)) => {
            (a.vni, a.local, a.remote) == (b.vni, b.remote, b.local)
        }
        _ => false,
    };
    match clients.iter().any(|client| servers.iter().any(|server| meet(client, server))) {
        true => Ok(()),
        false => Err(format!("its ends do not meet: {clients:?} and {servers:?}")),
    }
}

/// The interfaces with these addresses.
fn devices(world: &World, ns: nsm_kernel::netns::NsId, wanted: &BTreeSet<IpAddr>) -> Vec<Device> {
    let mut devices = world.kernels.devices(ns).unwrap_or_default();
    devices.retain(|device| addresses(device).into_iter().collect::<BTreeSet<_>>() == *wanted);
    devices
}
