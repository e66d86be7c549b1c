//! The kernels of the simulated nodes: namespaces and the interfaces in them, as far as wires can tell.
//!
//! Honest where it matters: a name is in use or not, a VNI is one device's on each node, a pair goes with either of its
//! ends, a namespace takes everything in it along, work takes its time and deletion longer, and what a process that has
//! died still wants has no effect.

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use nsm_forwarder::machine::{Machine, Then, Work};
use nsm_kernel::{
    Applied, Counters, EndFacts, EndState, Error, Nsid, Nsids, Owned, Result, Snapshot,
    netns::NsId,
    plan::{Construction, EndPlan, Mac, Side, WirePlan},
    watch::Event,
};
use nsm_mesh::fds::Fds;
use parking_lot::Mutex;
use tokio::{sync::mpsc, time::sleep};

use crate::{chance::Chance, network::Proc, trace::Trace};

/// All of them.
#[derive(Debug)]
pub(crate) struct Kernels {
    trace: Trace,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    chance: Chance,
    namespaces: BTreeMap<NsId, Ns>,
    listening: BTreeMap<usize, mpsc::Sender<Event>>,
    indices: u32,
    /// How likely a change is refused.
    refuses: f64,
}

#[derive(Debug)]
struct Ns {
    node: usize,
    nsid: Nsid,
    links: BTreeMap<String, Device>,
}

/// An interface.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Device {
    /// The connection whose wire it is an end of.
    pub(crate) wire: String,
    /// Which end.
    pub(crate) side: Side,
    /// As it is.
    pub(crate) plan: EndPlan,
    /// What it is.
    pub(crate) construction: Construction,
    /// Where its other end is, of a pair.
    pub(crate) peer: Option<(NsId, String)>,
    /// Of no other interface, ever.
    pub(crate) index: u32,
    /// Whether somebody has set it down.
    pub(crate) is_down: bool,
}

impl Kernels {
    pub(crate) fn new(trace: Trace, chance: Chance) -> Arc<Self> {
        let inner = Inner {
            chance,
            namespaces: BTreeMap::new(),
            listening: BTreeMap::new(),
            indices: 1,
            refuses: 0.0,
        };
        Arc::new(Self { trace, inner: Mutex::new(inner) })
    }

    pub(crate) fn add_namespace(&self, ns: NsId, node: usize) {
        let mut inner = self.inner.lock();
        inner.indices += 1;
        let nsid = Nsid(inner.indices as i32);
        inner.namespaces.insert(ns, Ns { node, nsid, links: BTreeMap::new() });
    }

    /// The last process in it is gone.
    pub(crate) fn end_namespace(&self, ns: NsId) {
        let mut inner = self.inner.lock();
        let Some(gone) = inner.namespaces.remove(&ns) else { return };
        for device in gone.links.values() {
            if let Some((ns, name)) = &device.peer {
                inner.unlink(*ns, name, None);
            }
        }
        inner.tell(gone.node, Event::NamespaceGone { nsid: gone.nsid });
    }

    /// Somebody deletes an interface, and with it the other end of a pair. Says which it was.
    pub(crate) fn cut(&self, index: u32) -> Option<Device> {
        let mut inner = self.inner.lock();
        let (ns, name) = inner.place(index)?;
        let device = inner.unlink(ns, &name, None)?;
        if let Some((ns, name)) = &device.peer {
            inner.unlink(*ns, name, Some(&device.wire));
        }
        self.trace.note(format_args!("somebody deletes {name} of {}", device.wire));
        Some(device)
    }

    /// Somebody sets an interface down. Nobody is told.
    pub(crate) fn set_down(&self, index: u32) {
        let mut inner = self.inner.lock();
        let Some((ns, name)) = inner.place(index) else { return };
        if let Some(device) = inner.namespaces.get_mut(&ns).and_then(|ns| ns.links.get_mut(&name)) {
            device.is_down = true;
            self.trace.note(format_args!("somebody sets {name} of {} down", device.wire));
        }
    }

    pub(crate) fn set_refusals(&self, likely: f64) {
        self.inner.lock().refuses = likely;
    }

    /// The interfaces in a namespace; `None`: it is gone.
    pub(crate) fn devices(&self, ns: NsId) -> Option<Vec<Device>> {
        self.inner.lock().namespaces.get(&ns).map(|ns| ns.links.values().cloned().collect())
    }

    /// Every interface there is, with its node.
    pub(crate) fn all(&self) -> Vec<(usize, NsId, Device)> {
        let inner = self.inner.lock();
        let of = |(id, ns): (&NsId, &Ns)| {
            let (id, node) = (*id, ns.node);
            ns.links.values().map(move |device| (node, id, device.clone())).collect::<Vec<_>>()
        };
        inner.namespaces.iter().flat_map(of).collect()
    }

    /// A machine for a forwarder, and what it hears of its kernel.
    pub(crate) fn machine(self: &Arc<Self>, process: &Arc<Proc>) -> (Arc<Host>, mpsc::Receiver<Event>) {
        let (tell, events) = mpsc::channel(1024);
        self.inner.lock().listening.insert(process.node, tell);
        let kernels = Arc::clone(self);
        let process = Arc::clone(process);
        let host =
            Arc::new_cyclic(|this| Host { this: this.clone(), kernels, process, going: Mutex::default() });
        (host, events)
    }
}

impl Inner {
    fn delete(&mut self, wire: &str, node: usize) {
        let mut doomed = Vec::new();
        for (id, ns) in self.namespaces.iter().filter(|(_, ns)| ns.node == node) {
            for (name, device) in ns.links.iter().filter(|(_, device)| device.wire == wire) {
                doomed.push((*id, name.clone()));
                doomed.extend(device.peer.clone());
            }
        }
        for (ns, name) in doomed {
            self.unlink(ns, &name, Some(wire));
        }
    }

    /// Where an interface is.
    fn place(&self, index: u32) -> Option<(NsId, String)> {
        self.namespaces.iter().find_map(|(id, ns)| {
            let (name, _) = ns.links.iter().find(|(_, device)| device.index == index)?;
            Some((*id, name.clone()))
        })
    }

    /// Removes an interface, of this wire if one is named, and says so to whoever listens.
    fn unlink(&mut self, id: NsId, name: &str, of: Option<&str>) -> Option<Device> {
        let ns = self.namespaces.get_mut(&id)?;
        if of.is_some_and(|of| ns.links.get(name).is_none_or(|device| device.wire != of)) {
            return None;
        }
        let device = ns.links.remove(name)?;
        let (node, nsid) = (ns.node, ns.nsid);
        self.tell(node, Event::LinkGone { nsid, ifindex: device.index, ifname: name.to_owned() });
        Some(device)
    }

    fn tell(&self, node: usize, event: Event) {
        if let Some(events) = self.listening.get(&node) {
            let _ = events.try_send(event);
        }
    }

    fn end(&self, wire: &str, side: Side, nsid: Option<Nsid>) -> Option<EndFacts> {
        let ns = self.namespaces.values().find(|ns| Some(ns.nsid) == nsid)?;
        let device = ns.links.values().find(|device| device.wire == wire && device.side == side)?;
        Some(EndFacts {
            nsid: ns.nsid,
            ifindex: device.index,
            mac: mac(device.index),
            mtu: device.plan.mtu.unwrap_or(1500),
            up: !device.is_down,
            counters: Counters::default(),
        })
    }
}

fn mac(index: u32) -> Mac {
    let [a, b, c, d] = index.to_be_bytes();
    Mac([2, 0, a, b, c, d])
}

/// The machine of one forwarder.
pub(crate) struct Host {
    this: Weak<Self>,
    kernels: Arc<Kernels>,
    process: Arc<Proc>,
    /// What is to be deleted.
    going: Mutex<Vec<(String, Then)>>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("process", &self.process.name).finish_non_exhaustive()
    }
}

impl Host {
    fn alive(&self) -> Result<()> {
        match self.process.is_dead() {
            false => Ok(()),
            true => Err(Error::Protocol("the process is gone".into())),
        }
    }

    fn refused(inner: &mut Inner) -> Result<()> {
        let refuses = inner.refuses;
        match inner.chance.happens(refuses) {
            false => Ok(()),
            true => Err(Error::Protocol("out of memory".into())),
        }
    }

    /// Deletes what is to be deleted, of one wire or of all.
    fn reap(&self, wire: Option<&str>) {
        if self.process.is_dead() {
            return;
        }
        let mut doomed = Vec::new();
        {
            let mut going = self.going.lock();
            let all = std::mem::take(&mut *going);
            for (id, then) in all {
                match wire.is_none_or(|wire| wire == id) {
                    true => doomed.push((id, then)),
                    false => going.push((id, then)),
                }
            }
        }
        for (id, then) in doomed {
            self.kernels.inner.lock().delete(&id, self.process.node);
            self.kernels.trace.note(format_args!("kernel {} deleted {id}", self.process.name));
            then(Ok(()));
        }
    }

    fn later(&self, between: std::ops::Range<Duration>, work: impl FnOnce() + Send + 'static) {
        let pause = self.kernels.inner.lock().chance.duration(between);
        let process = Arc::clone(&self.process);
        tokio::spawn(async move {
            sleep(pause).await;
            if process.is_dead() {
                // Its threads are gone with what they were about to do.
                std::mem::forget(work);
                return;
            }
            work();
        });
    }

    fn make(&self, plan: &WirePlan) -> Result<Applied> {
        let node = self.process.node;
        let mut inner = self.kernels.inner.lock();
        let inner = &mut *inner;
        Self::refused(inner)?;
        for (_, end) in plan.ends() {
            if inner.namespaces.get(&end.ns).is_none_or(|ns| ns.node != node) {
                return Err(Error::NamespaceGone(end.ns));
            }
        }
        let there = |inner: &Inner, side, end: &EndPlan| {
            let device = inner.namespaces.get(&end.ns)?.links.get(&end.ifname)?;
            Some((device.wire == plan.id && device.side == side, device.clone()))
        };
        let mut adopted = 0;
        for (side, end) in plan.ends() {
            match there(inner, side, end) {
                None => {}
                Some((true, device)) => adopted += usize::from(device.construction == plan.construction),
                Some((false, device)) => {
                    let (name, ns) = (end.ifname.clone(), end.ns);
                    return Err(Error::NameTaken { name, ns, by: format!("the wire of {}", device.wire) });
                }
            }
        }
        if let Construction::Vxlan(tunnel) = &plan.construction {
            let same = |device: &Device| match &device.construction {
                Construction::Vxlan(other) => (other.vni, other.port) == (tunnel.vni, tunnel.port),
                Construction::Veth => false,
            };
            let mut devices =
                inner.namespaces.values().filter(|ns| ns.node == node).flat_map(|ns| ns.links.values());
            if devices.any(|device| device.wire != plan.id && same(device)) {
                return Err(Error::VniTaken { vni: tunnel.vni, port: tunnel.port });
            }
        }
        let created = adopted != plan.ends().count();
        if created {
            inner.delete(&plan.id, node);
        }
        let places: Vec<_> = plan.ends().map(|(side, end)| (side, end.ns, end.ifname.clone())).collect();
        let mut states = BTreeMap::new();
        for (side, end) in plan.ends() {
            let peer =
                places.iter().find(|(other, ..)| *other != side).map(|(_, ns, name)| (*ns, name.clone()));
            inner.indices += u32::from(created);
            let fresh = inner.indices;
            let Some(ns) = inner.namespaces.get_mut(&end.ns) else { continue };
            let index = ns.links.get(&end.ifname).map_or(fresh, |device| device.index);
            let device = Device {
                wire: plan.id.clone(),
                side,
                plan: end.clone(),
                construction: plan.construction.clone(),
                peer,
                index,
                is_down: false,
            };
            ns.links.insert(end.ifname.clone(), device);
            let state = EndState { nsid: ns.nsid, ifindex: index, mac: mac(index) };
            states.insert(side == Side::Near, state);
        }
        let kind = match &plan.construction {
            Construction::Veth => "veth".to_owned(),
            Construction::Vxlan(tunnel) => format!("vxlan {}", tunnel.vni),
        };
        let what = if created { "made" } else { "kept" };
        self.kernels.trace.note(format_args!("kernel {} {what} {} {kind}", self.process.name, plan.id));
        let (near, far) = (states.get(&true).copied(), states.get(&false).copied());
        Ok(Applied { created, writes: u64::from(created), near, far })
    }
}

impl Machine for Host {
    fn apply(&self, plan: &WirePlan, _: &Fds) -> Result<Applied> {
        self.alive()?;
        plan.validate()?;
        self.reap(Some(&plan.id));
        match self.make(plan) {
            Err(Error::NameTaken { .. } | Error::VniTaken { .. }) if !self.going.lock().is_empty() => {
                // What is in the way may be going.
                self.reap(None);
                self.make(plan)
            }
            made => made,
        }
    }

    fn remove(&self, plan: &WirePlan, _: Nsids, _: &Fds) -> Result<()> {
        self.alive()?;
        self.reap(Some(&plan.id));
        self.kernels.inner.lock().delete(&plan.id, self.process.node);
        Ok(())
    }

    fn remove_later(&self, plan: &WirePlan, _: Nsids, then: Then) {
        let id = plan.id.clone();
        self.going.lock().push((id.clone(), then));
        let this = self.this.clone();
        self.later(Duration::from_millis(5)..Duration::from_millis(100), move || {
            if let Some(this) = this.upgrade() {
                this.reap(Some(&id));
            }
        });
    }

    fn settle(&self, id: &str) -> Result<()> {
        self.alive()?;
        self.reap(Some(id));
        Ok(())
    }

    fn sweep(&self, _: NsId) -> Result<usize> {
        // Wires are made in one step here: nothing is left half-made.
        Ok(0)
    }

    fn flush(&self) {
        self.reap(None);
    }

    fn nsid(&self, ns: NsId, _: &Fds) -> Result<Nsid> {
        self.alive()?;
        let inner = self.kernels.inner.lock();
        let ns_of_node = inner.namespaces.get(&ns).filter(|ns| ns.node == self.process.node);
        ns_of_node.map(|ns| ns.nsid).ok_or(Error::NamespaceGone(ns))
    }

    fn facts(&self, id: &str, nsids: Nsids) -> Result<(Option<EndFacts>, Option<EndFacts>)> {
        self.alive()?;
        let inner = self.kernels.inner.lock();
        Ok((inner.end(id, Side::Near, nsids.near), inner.end(id, Side::Far, nsids.far)))
    }

    fn snapshot(&self, _: &WirePlan) -> Result<Snapshot> {
        Err(Error::Protocol("a simulated kernel is not looked at in full".into()))
    }

    fn numbered(&self) -> Result<Vec<Nsid>> {
        let inner = self.kernels.inner.lock();
        let own = inner.namespaces.values().filter(|ns| ns.node == self.process.node);
        Ok(own.map(|ns| ns.nsid).collect())
    }

    fn owned(&self, _: Nsid) -> Result<Vec<Owned>> {
        Ok(Vec::new())
    }

    fn travel(&self, work: Work) {
        self.later(Duration::from_micros(200)..Duration::from_millis(5), work);
    }

    fn wait(&self, work: Work) {
        self.later(Duration::from_micros(50)..Duration::from_micros(500), work);
    }
}

/// The addresses of an interface.
pub(crate) fn addresses(device: &Device) -> Vec<IpAddr> {
    device.plan.addresses.iter().map(ipnet::IpNet::addr).collect()
}
