//! The wires of this node: what is planned, on disk and in the kernel, for this process and the one after it.
//!
//! The kernel's calls block for tenths of milliseconds, so they run on threads beside the runtime's. A wire
//! is written to the store before it is made, and its file is removed after its links: a crash in between leaves a
//! record without a wire, which is harmless, and never a wire without a record.
//!
//! A wire that was found at start has no connection until one claims it. Only those without are swept.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use nsm_api::{
    path,
    pb::connection::{Connection, Mechanism},
    planted,
};
use nsm_identity::clock;
use nsm_kernel::{
    EndFacts, Nsid, Nsids,
    netns::NsId,
    plan::{Construction, EndPlan, Side, WirePlan},
    store::{self, Store},
};
use nsm_mesh::{Error, Result, error::explain, fds::Fds};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tonic::Code;

use crate::{
    machine::{Machine, on},
    tell::Traffic,
    tunnel::Vnis,
};

/// How long a wire that was found at start may wait for its connection when its record tells no expiry.
const GRACE: Duration = Duration::from_secs(600);
/// How long a wire waits for another endpoint's to take its place.
const LEFT: Duration = Duration::from_secs(1);
/// How long after a wire was seen whole it is enough, when nothing about it changes, that its ends are there and up. To
/// see it whole takes listing the addresses, routes and neighbours of both pods, which takes the longer the more wires
/// they have.
const SEEN_WHOLE: Duration = Duration::from_secs(10);
/// How long after a wire was made it is mended: whoever deletes its interface again and again keeps nobody busy.
const MENDS: Duration = Duration::from_secs(1);

/// What is kept of a wire.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// What shall be in the kernel.
    pub plan: WirePlan,
    /// What the next hop agreed to: it is asked for the same again.
    pub far: Mechanism,
    /// When the client's token expires: a wire that nobody claims by then is removed.
    pub expires: SystemTime,
}

/// A record, and where its ends are by the node's own numbers: no descriptor of a pod's namespace is kept.
#[derive(Debug, Clone)]
struct Held {
    record: Record,
    nsids: Nsids,
    /// Whether a connection of this process has it, or is about to: then only that ends it.
    claimed: bool,
    /// When the kernel was last found, or made, as planned.
    whole: Option<Instant>,
    /// How long it may wait for a connection, if it was found.
    until: Option<Instant>,
}

/// What goes onto the disk beside the plan.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kept {
    far_class: String,
    far_type: String,
    far_parameters: std::collections::BTreeMap<String, String>,
    expires_unix: u64,
    /// When this was written; old records do not tell.
    #[serde(default)]
    written_unix: Option<u64>,
}

/// Why a wire was not made.
#[derive(Debug)]
pub enum Taken {
    /// The interface name is somebody else's.
    Name {
        /// In the client's namespace, else the endpoint's.
        near: bool,
        /// The name.
        name: String,
        /// Who has it.
        by: String,
    },
    /// The VNI is in use on this node.
    Vni,
    /// Anything else.
    Other(Error),
}

/// See the module.
#[derive(Debug)]
pub struct Wires {
    machine: Arc<dyn Machine>,
    store: Store,
    records: Mutex<HashMap<String, Held>>,
    /// Locked after the records.
    vnis: Mutex<Vnis>,
    /// What could not be removed in full, until it is tried again.
    unremoved: Arc<Mutex<Vec<(WirePlan, Nsids)>>>,
    /// Those that are being mended, or about to be.
    mending: Mutex<HashSet<String>>,
    orphans: AtomicU64,
}

/// A VNI that a request has taken for a wire that does not stand yet. When the request is over it is free again,
/// unless the record of its connection has it by then: a VNI in use belongs to a record.
#[derive(Debug)]
pub struct Claim {
    wires: Arc<Wires>,
    vni: u32,
    id: String,
}

impl Claim {
    /// The number.
    #[must_use]
    pub fn vni(&self) -> u32 {
        self.vni
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let records = self.wires.records.lock();
        if records.get(&self.id).and_then(|held| held.record.vni()) != Some(self.vni) {
            self.wires.vnis.lock().release(self.vni, &self.id);
        }
    }
}

impl Record {
    /// The record of a connection as it was answered.
    #[must_use]
    pub fn new(plan: WirePlan, far: Mechanism, conn: &Connection) -> Self {
        let expires = path::expiry_before_us(conn).unwrap_or_else(|| clock::now() + GRACE);
        Self { plan, far, expires }
    }

    /// Keeps the expiry that is on the disk where the new one is little later: by then a client has refreshed that is
    /// still there, and the file need not be written at each refresh.
    fn round_expiry(&mut self, on_disk: SystemTime, now: SystemTime) {
        let left = self.expires.duration_since(now).unwrap_or_default();
        let later = self.expires.duration_since(on_disk);
        if later.is_ok_and(|later| later < left / 4) {
            self.expires = on_disk;
        }
    }

    /// Of a tunnel.
    #[must_use]
    pub fn vni(&self) -> Option<u32> {
        match &self.plan.construction {
            Construction::Vxlan(tunnel) => Some(tunnel.vni),
            Construction::Veth => None,
        }
    }

    fn kept(&self) -> Kept {
        Kept {
            far_class: self.far.cls.clone(),
            far_type: self.far.r#type.clone(),
            far_parameters: self.far.parameters.clone(),
            expires_unix: unix(self.expires),
            written_unix: Some(unix(clock::now())),
        }
    }

    fn from_kept(plan: WirePlan, kept: Kept) -> Self {
        let far = Mechanism {
            cls: kept.far_class,
            r#type: kept.far_type,
            parameters: kept.far_parameters,
            ..Mechanism::default()
        };
        Self { plan, far, expires: SystemTime::UNIX_EPOCH + Duration::from_secs(kept.expires_unix) }
    }
}

impl Kept {
    /// How long a wire that was found may wait for its connection: until its client's token expires, and no longer than
    /// that was to live when this was written. The clock may have gone back since, by hours.
    fn patience(&self, now: SystemTime) -> Duration {
        let left = self.expires_unix.saturating_sub(unix(now));
        let lived = self.written_unix.map_or(GRACE.as_secs(), |at| self.expires_unix.saturating_sub(at));
        Duration::from_secs(left.min(lived))
    }
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |passed| passed.as_secs())
}

impl Wires {
    /// The wires that a process before us has left, ready to be claimed by their connections.
    ///
    /// # Errors
    /// A state directory that cannot be used.
    pub fn open(machine: Arc<dyn Machine>, state_dir: &Path) -> Result<Self> {
        let store = Store::open(state_dir).map_err(|e| internal(&e))?;
        let found = store.load().map_err(|e| internal(&e))?;
        let mut records = HashMap::new();
        let mut vnis = Vnis::default();
        for saved in found.records.into_iter().filter(|_| !planted::is("plans are forgotten")) {
            let kept: Kept = match serde_json::from_value(saved.data) {
                Ok(kept) => kept,
                Err(error) => {
                    tracing::warn!(wire = %saved.plan.id, %error, "its record is of another version; it is left alone until it is asked for");
                    continue;
                }
            };
            let until = Some(Instant::now() + kept.patience(clock::now()));
            let record = Record::from_kept(saved.plan, kept);
            if let Some(vni) = record.vni() {
                vnis.claim(vni, &record.plan.id);
            }
            records.insert(
                record.plan.id.clone(),
                Held { record, nsids: saved.nsids, claimed: false, whole: None, until },
            );
        }
        if !records.is_empty() {
            tracing::info!(wires = records.len(), "found wires of an earlier process");
        }
        clear_leftovers(&*machine, records.values());
        Ok(Self {
            machine,
            store,
            records: Mutex::new(records),
            vnis: Mutex::new(vnis),
            unremoved: Arc::default(),
            mending: Mutex::default(),
            orphans: AtomicU64::new(0),
        })
    }

    /// The machine they are on.
    #[must_use]
    pub fn machine(&self) -> &dyn Machine {
        &*self.machine
    }

    /// Takes a VNI that is already agreed on; `None`: another connection of this node has it.
    pub fn claim(self: &Arc<Self>, vni: u32, id: &str) -> Option<Claim> {
        self.vnis.lock().claim(vni, id).then(|| Claim { wires: Arc::clone(self), vni, id: id.to_owned() })
    }

    /// Takes a free VNI that suits the mechanism; `None`: there is none.
    pub fn draw(self: &Arc<Self>, m: &Mechanism, id: &str) -> Option<Claim> {
        let vni = self.vnis.lock().draw(m, id, rand::random)?;
        Some(Claim { wires: Arc::clone(self), vni, id: id.to_owned() })
    }

    /// What is known of a connection's wire.
    #[must_use]
    pub fn record(&self, id: &str) -> Option<Record> {
        self.records.lock().get(id).map(|held| held.record.clone())
    }

    /// The connections that have a wire here.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        self.records.lock().keys().cloned().collect()
    }

    /// The record of a wire, where its ends are, and whether a connection of this process has it.
    pub(crate) fn held(&self, id: &str) -> Option<(Record, Nsids, bool)> {
        self.records.lock().get(id).map(|held| (held.record.clone(), held.nsids, held.claimed))
    }

    /// What a wire has carried, as the kernel says now; blocks.
    pub(crate) fn traffic_now(&self, id: &str) -> Option<Traffic> {
        let held = self.records.lock().get(id).cloned()?;
        self.traffic(&held)
    }

    /// The VNIs that wires of this node have, or requests that are under way.
    #[must_use]
    pub fn vnis(&self) -> Vec<u32> {
        self.vnis.lock().iter().collect()
    }

    /// How many wires nobody wanted any more and were removed.
    #[must_use]
    pub fn orphans(&self) -> u64 {
        self.orphans.load(Ordering::Relaxed)
    }

    /// Makes the kernel equal to the record's plan: makes the wire, adopts it, or changes what differs. What a wire that
    /// stood before has carried so far.
    ///
    /// # Errors
    /// [`Taken`]; a wire that did not exist before does not exist then.
    pub(crate) async fn apply(
        self: &Arc<Self>,
        record: Record,
        fds: &Fds,
    ) -> std::result::Result<Option<Traffic>, Taken> {
        let this = Arc::clone(self);
        let fds = fds.clone();
        let made = on(|work| self.machine.travel(work), move || this.apply_now(record, &fds)).await;
        made.unwrap_or_else(|| Err(Taken::Other(Error::internal("making the wire panicked"))))
    }

    fn apply_now(&self, record: Record, fds: &Fds) -> std::result::Result<Option<Traffic>, Taken> {
        let id = record.plan.id.clone();
        let before = self.records.lock().get_mut(&id).map(|held| {
            let before = held.clone();
            held.claimed = true;
            before
        });
        if before.is_none() {
            self.take_over(&record.plan);
        }
        let made = self.make(record, before.as_ref(), fds);
        let mut records = self.records.lock();
        match made {
            Ok((held, traffic)) => {
                let mut vnis = self.vnis.lock();
                if let Some(old) = before.and_then(|before| before.record.vni()) {
                    vnis.release(old, &id);
                }
                if let Some(vni) = held.record.vni() {
                    vnis.claim(vni, &id);
                }
                records.insert(id, held);
                Ok(traffic)
            }
            Err(taken) => {
                if let Some((held, before)) = records.get_mut(&id).zip(before) {
                    held.claimed = before.claimed;
                    // One of its ends may have been changed already.
                    held.whole = None;
                }
                Err(taken)
            }
        }
    }

    /// A pair of addresses that the endpoint has given to another connection than the one that was found with it: that one
    /// is over, and its wire would take the packets of this one.
    fn take_over(&self, plan: &WirePlan) {
        let own: Vec<_> = pairs(plan).collect();
        if own.is_empty() {
            return;
        }
        let same = |held: &Held| pairs(&held.record.plan).any(|pair| own.contains(&pair));
        let orphans = self.take(|_, held| !held.claimed && same(held));
        self.count(&orphans, "its addresses are another connection's now");
    }

    fn make(
        &self,
        record: Record,
        before: Option<&Held>,
        fds: &Fds,
    ) -> std::result::Result<(Held, Option<Traffic>), Taken> {
        let nsids = self.nsids(&record.plan, fds).map_err(Taken::Other)?;
        let mut held = Held { record, nsids, claimed: true, whole: None, until: None };
        if let Some(before) = before {
            held.record.round_expiry(before.record.expires, clock::now());
        }
        if let Some(before) = before
            && let Some(traffic) = self.stands(before, &held)
        {
            held.whole = before.whole;
            if before.record != held.record {
                self.save(&held).map_err(Taken::Other)?;
            }
            return Ok((held, Some(traffic)));
        }
        let plan = &held.record.plan;
        // What still removes an older wire of this connection would take the new file along.
        self.machine.settle(&plan.id).map_err(|e| Taken::Other(refused(&e)))?;
        if let Some(before) = before
            && moved(&before.record.plan, plan)
            && !goes_with_its_end(&before.record.plan, plan)
        {
            // An endpoint that came back in another pod: the old ends are where the new plan does not look, so they
            // go before the record that knows where they are.
            self.machine
                .remove(&before.record.plan, before.nsids, fds)
                .map_err(|e| Taken::Other(refused(&e)))?;
        }
        if before.is_none_or(|before| before.record != held.record) {
            self.save(&held).map_err(Taken::Other)?;
        }
        match self.machine.apply(plan, fds) {
            Ok(applied) => {
                tracing::debug!(wire = %plan.id, created = applied.created, writes = applied.writes, "applied");
                let traffic = before.and_then(|_| self.traffic(&held));
                held.whole = Some(Instant::now());
                Ok((held, traffic))
            }
            Err(error) => {
                let restored = match before {
                    Some(before) => self.save(before),
                    None => self.store.remove(&plan.id).map(drop).map_err(|e| internal(&e)),
                };
                if restored.is_err() {
                    tracing::warn!(wire = %plan.id, "its record could not be taken back");
                }
                Err(taken(error, plan))
            }
        }
    }

    /// What a wire has carried that is as it was wanted a moment ago, and still wanted so.
    fn stands(&self, before: &Held, now: &Held) -> Option<Traffic> {
        let lately = before.whole.is_some_and(|at| at.elapsed() < SEEN_WHOLE);
        let same = before.claimed && (&before.record.plan, before.nsids) == (&now.record.plan, now.nsids);
        let (near, far) =
            (lately && same).then(|| self.machine.facts(&now.record.plan.id, now.nsids).ok())??;
        let up = |facts: Option<EndFacts>| facts.is_some_and(|facts| facts.up);
        let all = now.record.plan.ends().all(|(side, _)| match side {
            Side::Near => up(near),
            Side::Far => up(far),
        });
        all.then(|| Traffic::of(near, far))?
    }

    fn traffic(&self, held: &Held) -> Option<Traffic> {
        let (near, far) = self.machine.facts(&held.record.plan.id, held.nsids).ok()?;
        Traffic::of(near, far)
    }

    fn nsids(&self, plan: &WirePlan, fds: &Fds) -> Result<Nsids> {
        let mut nsids = Nsids::default();
        for (side, end) in plan.ends() {
            let number = Some(self.machine.nsid(end.ns, fds).map_err(|e| refused(&e))?);
            match side {
                Side::Near => nsids.near = number,
                Side::Far => nsids.far = number,
            }
        }
        Ok(nsids)
    }

    fn save(&self, held: &Held) -> Result<()> {
        let data = serde_json::to_value(held.record.kept()).map_err(|e| Error::internal(e.to_string()))?;
        let record = store::Record { plan: held.record.plan.clone(), nsids: held.nsids, data };
        self.store.put(&record).map_err(|e| {
            Error::new(Code::ResourceExhausted, explain(&e))
                .hint("a wire is only made when its plan can be kept; free space in NSM_STATE_DIR")
        })
    }

    /// A connection is about to be asked for with another endpoint: the client's end stays for a moment, for the new wire
    /// to take its place. An end for the endpoint alone is of no use to anybody.
    pub fn leave(self: &Arc<Self>, id: &str) {
        let until = Instant::now() + LEFT;
        let waits = self.records.lock().get_mut(id).is_some_and(|held| {
            (held.claimed, held.until) = (false, Some(until));
            held.record.plan.near.is_some()
        });
        if !waits {
            return self.remove(id);
        }
        let (this, id) = (Arc::clone(self), id.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep_until(until).await;
            this.take(|other, held| other == id && !held.claimed && held.until == Some(until));
        });
    }

    /// Removes a connection's wire. The kernel takes its time; nobody waits for that.
    pub fn remove(&self, id: &str) {
        self.take(|other, _| other == id);
    }

    /// Removes the wires of an earlier process whose time has come and which no connection has claimed, and again what
    /// could not be removed.
    pub fn sweep(&self) {
        let again = std::mem::take(&mut *self.unremoved.lock());
        {
            let records = self.records.lock();
            // One that is back has the marks of the one that was to go.
            let again = again.into_iter().filter(|(plan, _)| !records.contains_key(&plan.id));
            again.for_each(|(plan, nsids)| self.remove_later(plan, nsids, true));
        }
        let now = Instant::now();
        let over = |held: &Held| held.until.is_none_or(|until| until <= now);
        let orphans = self.take(|_, held| !held.claimed && over(held) && !planted::is("orphans stay"));
        self.count(&orphans, "its client's token has expired");
    }

    /// Removes a wire that no connection has claimed, and counts it.
    pub fn orphan(&self, id: &str, why: &str) {
        let orphans = self.take(|other, held| other == id && !held.claimed);
        self.count(&orphans, why);
    }

    /// The same of a wire whose connection there is not, whatever was claimed.
    pub(crate) fn nobodys(&self, id: &str, why: &str) {
        let orphans = self.take(|other, _| other == id);
        self.count(&orphans, why);
    }

    fn count(&self, orphans: &[String], why: &str) {
        for id in orphans {
            let orphans = self.orphans.fetch_add(1, Ordering::Relaxed) + 1;
            tracing::info!(wire = id, why, orphans, "removing a wire that nobody wants");
        }
    }

    /// Forgets these wires and queues them for deletion, in one step: whoever makes one of them again does so before
    /// or after both.
    fn take(&self, chosen: impl Fn(&str, &Held) -> bool) -> Vec<String> {
        let mut records = self.records.lock();
        let taken = records.extract_if(|id, held| chosen(id, held));
        taken
            .map(|(id, Held { record, nsids, .. })| {
                if let Some(vni) = record.vni()
                    && !planted::is("VNIs are not given back")
                {
                    self.vnis.lock().release(vni, &id);
                }
                self.remove_later(record.plan, nsids, false);
                id
            })
            .collect()
    }

    fn remove_later(&self, plan: WirePlan, nsids: Nsids, again: bool) {
        let (store, unremoved, gone) = (self.store.clone(), Arc::clone(&self.unremoved), plan.clone());
        let then = move |removed: nsm_kernel::Result<()>| {
            // If not by this process then by the next.
            if let Err(error) = removed.and_then(|()| store.remove(&gone.id)) {
                if !again {
                    tracing::warn!(wire = gone.id, error = %explain(&error), "not removed in full; it is tried again");
                }
                unremoved.lock().push((gone, nsids));
            }
        };
        self.machine.remove_later(&plan, nsids, Box::new(then));
    }

    /// The connections whose wire is not in the kernel any more, of all or of those with an end in the namespace that
    /// the node numbers so.
    pub async fn broken(self: &Arc<Self>, nsid: Option<Nsid>) -> Vec<String> {
        let this = Arc::clone(self);
        let look = move || {
            let has = |held: &Held| nsid.is_none() || held.nsids.near == nsid || held.nsids.far == nsid;
            let held: Vec<_> = this
                .records
                .lock()
                .iter()
                .filter(|(_, held)| has(held))
                .map(|(id, held)| (id.clone(), held.nsids))
                .collect();
            let broken = held.into_iter().filter(|(id, nsids)| match this.machine.facts(id, *nsids) {
                Ok((near, far)) => {
                    near.is_some() != nsids.near.is_some() || far.is_some() != nsids.far.is_some()
                }
                Err(error) => {
                    tracing::warn!(wire = id, error = %explain(&error), "cannot be looked at");
                    false
                }
            });
            broken.map(|(id, _)| id).collect()
        };
        on(|work| self.machine.wait(work), look).await.unwrap_or_default()
    }

    /// The wires that have one of these interfaces, told by the number of its namespace and its name, which may be gone from
    /// there: as [`Wires::mendable`].
    pub(crate) async fn cut(self: &Arc<Self>, links: &HashSet<(Nsid, String)>) -> Vec<Mending> {
        if links.is_empty() {
            return Vec::new();
        }
        let is_among = |end: Option<&EndPlan>, at: Option<Nsid>| {
            end.zip(at).is_some_and(|(end, at)| links.contains(&(at, end.ifname.clone())))
        };
        let cut = |held: &Held| {
            let (plan, at) = (&held.record.plan, held.nsids);
            is_among(plan.near.as_ref(), at.near) || is_among(plan.far.as_ref(), at.far)
        };
        let cut = {
            let records = self.records.lock();
            records.iter().filter(|(_, held)| cut(held)).map(|(id, _)| id.clone()).collect()
        };
        self.mendable(cut).await
    }

    /// Those of these wires that a connection has and nobody mends already. The pods of all their ends are there: the others
    /// are beyond mending.
    pub(crate) async fn mendable(self: &Arc<Self>, ids: Vec<String>) -> Vec<Mending> {
        let wires: Vec<_> = {
            let (records, mut mending) = (self.records.lock(), self.mending.lock());
            let ids = ids.into_iter().filter_map(|id| {
                let held = records.get(&id).filter(|held| held.claimed)?;
                mending.insert(id.clone()).then(|| (Mending { wires: Arc::clone(self), id }, held.nsids))
            });
            ids.collect()
        };
        if wires.is_empty() {
            return Vec::new();
        }
        let machine = Arc::clone(&self.machine);
        let look = move || machine.numbered();
        let numbered =
            on(|work| self.machine.wait(work), look).await.and_then(Result::ok).unwrap_or_default();
        let is_there =
            |nsids: &Nsids| [nsids.near, nsids.far].iter().flatten().all(|at| numbered.contains(at));
        wires.into_iter().filter(|(_, nsids)| is_there(nsids)).map(|(mending, _)| mending).collect()
    }

    /// Whether somebody mends this wire, or is about to.
    pub(crate) fn is_mended(&self, id: &str) -> bool {
        self.mending.lock().contains(id)
    }

    /// Whether a connection's wire was found, or made, as planned after that.
    pub(crate) fn is_whole_since(&self, id: &str, then: Instant) -> bool {
        let records = self.records.lock();
        records.get(id).and_then(|held| held.whole).is_some_and(|at| at > then)
    }

    /// Waits until everything that is being removed is gone.
    pub async fn flush(&self) {
        let machine = Arc::clone(&self.machine);
        if on(|work| self.machine.wait(work), move || machine.flush()).await.is_none() {
            tracing::warn!("waiting for the last deletions panicked");
        }
    }
}

/// A wire of which an interface was deleted, perhaps.
#[derive(Debug)]
pub(crate) struct Mending {
    wires: Arc<Wires>,
    id: String,
}

impl Mending {
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// When it may be mended.
    pub(crate) fn at(&self) -> Instant {
        let made = self.wires.records.lock().get(&self.id).and_then(|held| held.whole);
        made.map_or_else(Instant::now, |made| made + MENDS)
    }

    /// Makes it again as it was, in the namespaces that are found without their descriptors. No request of its connection
    /// is under way. Whether anything had to be made.
    ///
    /// # Errors
    /// As [`Wires::apply`].
    pub(crate) async fn mend(&self) -> std::result::Result<bool, Taken> {
        let held = self.wires.records.lock().get(&self.id).filter(|held| held.claimed).cloned();
        let Some(held) = held else { return Ok(false) };
        let (id, nsids, machine) = (self.id.clone(), held.nsids, Arc::clone(&self.wires.machine));
        let look = move || machine.facts(&id, nsids);
        let Some(Ok((near, far))) = on(|work| self.wires.machine.wait(work), look).await else {
            return Ok(false);
        };
        if (near.is_some(), far.is_some()) == (nsids.near.is_some(), nsids.far.is_some()) {
            return Ok(false);
        }
        self.wires.apply(held.record, &Fds::default()).await.map(|_| true)
    }

    /// Removes it, as there is no connection that has it.
    pub(crate) fn nobodys(&self) {
        self.wires.nobodys(&self.id, "its connection is over");
    }
}

impl Drop for Mending {
    fn drop(&mut self) {
        self.wires.mending.lock().remove(&self.id);
    }
}

/// Removes links that the process before us was killed over before they became wires: their records tell where.
fn clear_leftovers<'h>(machine: &dyn Machine, records: impl Iterator<Item = &'h Held>) {
    let namespaces: BTreeSet<NsId> =
        records.flat_map(|held| held.record.plan.ends().map(|(_, end)| end.ns).collect::<Vec<_>>()).collect();
    for id in namespaces {
        match machine.sweep(id) {
            Ok(0) => {}
            Ok(things) => tracing::info!(namespace = %id, things, "removed what was never finished"),
            Err(error) => {
                tracing::warn!(namespace = %id, error = %explain(&error), "cannot look for leftovers");
            }
        }
    }
}

/// What each end is called and what it reaches: namespace, own address, address of the other end.
fn pairs(plan: &WirePlan) -> impl Iterator<Item = (NsId, IpNet, IpNet)> {
    plan.ends().flat_map(|(_, end)| {
        let hosts = end.routes.iter().map(|route| route.dst);
        let hosts = hosts.filter(|dst| dst.prefix_len() == dst.max_prefix_len());
        hosts.flat_map(move |host| end.addresses.iter().map(move |own| (end.ns, *own, host)))
    })
}

/// Whether a wire has an end in another namespace than before, or is of another kind.
fn moved(before: &WirePlan, now: &WirePlan) -> bool {
    let places = |plan: &WirePlan| plan.ends().map(|(side, end)| (side, end.ns)).collect::<Vec<_>>();
    places(before) != places(now)
        || std::mem::discriminant(&before.construction) != std::mem::discriminant(&now.construction)
}

/// Whether an old wire is found by the client's end, where the new one is made: that is left until the new one carries
/// packets, and takes the other end along. Rules do not go with the interface, so they are removed before.
fn goes_with_its_end(before: &WirePlan, now: &WirePlan) -> bool {
    let place = |plan: &WirePlan| plan.near.as_ref().map(|end| (end.ns, end.ifname.clone()));
    place(before).is_some()
        && place(before) == place(now)
        && before.ends().all(|(_, end)| end.policies.is_empty())
}

fn taken(error: nsm_kernel::Error, plan: &WirePlan) -> Taken {
    match error {
        nsm_kernel::Error::NameTaken { name, ns, by } => {
            let near =
                plan.ends().any(|(side, end)| side == Side::Near && end.ns == ns && end.ifname == name);
            Taken::Name { near, name, by }
        }
        nsm_kernel::Error::VniTaken { .. } => Taken::Vni,
        other => Taken::Other(refused(&other)),
    }
}

fn internal(error: &nsm_kernel::Error) -> Error {
    Error::internal(explain(error))
}

fn refused(error: &nsm_kernel::Error) -> Error {
    let code = match error {
        nsm_kernel::Error::Plan(_) | nsm_kernel::Error::NotANamespace(_) => Code::InvalidArgument,
        nsm_kernel::Error::NamespaceGone(_) => Code::FailedPrecondition,
        _ => Code::Internal,
    };
    Error::new(code, explain(error))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]
mod tests {
    use std::process::{Child, Command};

    use nsm_kernel::{
        netns::Namespace,
        plan::{EndPlan, Route, Vxlan},
    };

    use crate::machine;

    use super::*;

    /// A process that lives in a namespace of its own, so that it is found without a descriptor.
    struct Pod {
        process: Child,
        ns: Namespace,
    }

    impl Pod {
        fn start() -> Self {
            let ns = Namespace::unnamed().unwrap();
            let process = ns.run(|| Command::new("sleep").arg("600").spawn()).unwrap().unwrap();
            Self { process, ns }
        }

        fn output(&self, command: &str) -> String {
            let mut words = command.split_whitespace();
            let run = || Command::new(words.next().unwrap()).args(words).output();
            let output = self.ns.run(run).unwrap().unwrap();
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        }
    }

    impl Drop for Pod {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }

    struct Node {
        ns: Namespace,
        client: Pod,
        endpoint: Pod,
        state: tempfile::TempDir,
    }

    impl Node {
        fn new(test: &str) -> Option<Self> {
            let Ok(ns) = Namespace::unnamed() else {
                println!("SKIPPED {test}: network namespaces need root");
                return None;
            };
            let state = tempfile::tempdir().unwrap();
            Some(Self { ns, client: Pod::start(), endpoint: Pod::start(), state })
        }

        /// What a process that starts now knows.
        fn wires(&self) -> Arc<Wires> {
            let node = machine::Node::new(self.ns.try_clone().unwrap()).unwrap();
            Arc::new(Wires::open(Arc::new(node), self.state.path()).unwrap())
        }

        fn veth(&self, id: &str) -> Record {
            let end = |side, pod: &Pod| EndPlan::new(side, pod.ns.id(), format!("nsm-{id}"), id);
            record(WirePlan::veth(id, end(Side::Near, &self.client), end(Side::Far, &self.endpoint)))
        }

        fn vxlan(&self, id: &str, vni: u32) -> Record {
            let local = "192.0.2.1".parse().unwrap();
            let tunnel =
                Vxlan { vni, local, remote: "192.0.2.2".parse().unwrap(), port: 4789, remote_port: 4789 };
            let end = EndPlan::new(Side::Near, self.client.ns.id(), format!("nsm-{id}"), id);
            record(WirePlan::vxlan(id, tunnel, Side::Near, end))
        }

        fn files(&self) -> usize {
            std::fs::read_dir(self.state.path()).unwrap().count()
        }
    }

    fn record(plan: WirePlan) -> Record {
        Record { plan, far: Mechanism::default(), expires: SystemTime::UNIX_EPOCH }
    }

    async fn made(wires: &Arc<Wires>, record: &Record) {
        wires.apply(record.clone(), &Fds::default()).await.unwrap();
    }

    #[tokio::test]
    async fn a_wire_that_is_asked_for_while_it_goes_stays_with_its_record() {
        let Some(node) = Node::new("a_wire_that_is_asked_for_while_it_goes_stays_with_its_record") else {
            return;
        };
        let wires = node.wires();
        let records: Vec<_> = (0..16).map(|n| node.veth(&n.to_string())).collect();
        for record in &records {
            made(&wires, record).await;
        }
        for record in &records {
            wires.remove(&record.plan.id);
        }
        for record in &records {
            made(&wires, record).await;
        }
        wires.flush().await;
        assert_eq!(wires.broken(None).await, Vec::<String>::new());
        assert_eq!(node.files(), 16);
        for record in &records {
            wires.remove(&record.plan.id);
        }
        wires.flush().await;
        assert_eq!(node.files(), 0);
        assert_eq!(node.client.output("ip -br link").lines().count(), 1);
    }

    #[tokio::test]
    async fn a_refresh_that_changes_nothing_looks_whether_the_ends_are_up_and_now_and_then_at_everything() {
        let Some(node) = Node::new(
            "a_refresh_that_changes_nothing_looks_whether_the_ends_are_up_and_now_and_then_at_everything",
        ) else {
            return;
        };
        let wires = node.wires();
        let mut record = node.veth("w");
        record.plan.near.as_mut().unwrap().addresses = vec!["10.0.0.1/32".parse().unwrap()];
        assert!(wires.apply(record.clone(), &Fds::default()).await.unwrap().is_none(), "it is new");
        let addresses = || node.client.output("ip -br addr show dev nsm-w").contains("10.0.0.1/32");
        assert!(addresses());
        node.client.output("ip addr flush dev nsm-w");
        let traffic = wires.apply(record.clone(), &Fds::default()).await.unwrap();
        assert!(traffic.is_some() && !addresses(), "nobody has listed the addresses");
        // An end that is down, a change of the plan, and time: each makes it look.
        node.endpoint.output("ip link set nsm-w down");
        made(&wires, &record).await;
        assert!(addresses() && node.endpoint.output("ip link show nsm-w").contains(",UP"));
        node.client.output("ip addr flush dev nsm-w");
        record.plan.far.as_mut().unwrap().addresses = vec!["10.0.0.2/32".parse().unwrap()];
        made(&wires, &record).await;
        assert!(addresses());
        node.client.output("ip addr flush dev nsm-w");
        let long_ago = Instant::now().checked_sub(SEEN_WHOLE);
        wires.records.lock().get_mut("w").unwrap().whole = long_ago;
        made(&wires, &record).await;
        assert!(addresses());
        // Who restarts knows nothing of what was seen.
        node.client.output("ip addr flush dev nsm-w");
        made(&node.wires(), &record).await;
        assert!(addresses());
    }

    #[tokio::test]
    async fn a_little_later_expiry_is_not_written_and_any_other_change_is() {
        let Some(node) = Node::new("a_little_later_expiry_is_not_written_and_any_other_change_is") else {
            return;
        };
        let wires = node.wires();
        let mut record = node.veth("w");
        let mut expires = clock::now() + Duration::from_secs(600);
        record.expires = expires;
        made(&wires, &record).await;
        for (later, written) in [(1, false), (100, false), (250, true), (-30, true), (29, false)] {
            let before = expires;
            let step = Duration::from_secs(i64::unsigned_abs(later));
            record.expires = if later < 0 { before - step } else { before + step };
            expires = if written { record.expires } else { before };
            made(&wires, &record).await;
            assert_eq!(wires.record("w").unwrap().expires, expires, "{later}");
            let on_disk = node.wires().record("w").unwrap().expires;
            assert!(expires.duration_since(on_disk).unwrap() < Duration::from_secs(1), "whole seconds");
        }
        record.far.set("name", "other");
        made(&wires, &record).await;
        assert_eq!(node.wires().record("w").unwrap().far, record.far);
    }

    #[tokio::test]
    async fn only_what_no_connection_has_claimed_is_swept() {
        let Some(node) = Node::new("only_what_no_connection_has_claimed_is_swept") else { return };
        let (left, claimed) = (node.veth("left"), node.veth("claimed"));
        let first = node.wires();
        made(&first, &left).await;
        made(&first, &claimed).await;
        first.sweep();
        first.orphan("left", "a test");
        assert_eq!(first.orphans(), 0, "they are claimed, by this process");
        drop(first);

        let second = node.wires();
        made(&second, &claimed).await;
        second.sweep();
        second.flush().await;
        assert_eq!(second.orphans(), 1);
        assert!(second.record("left").is_none());
        assert_eq!(second.record("claimed"), Some(claimed));
        assert_eq!((second.broken(None).await, node.files()), (Vec::new(), 1));
    }

    #[tokio::test]
    async fn what_cannot_be_removed_is_tried_again_unless_it_is_back() {
        let Some(node) = Node::new("what_cannot_be_removed_is_tried_again_unless_it_is_back") else { return };
        let wires = node.wires();
        let file = |id: &str| {
            let mut files = std::fs::read_dir(node.state.path()).unwrap();
            files.find_map(|file| file.ok().filter(|file| file.file_name().to_string_lossy().contains(id)))
        };
        for comes_back in [false, true] {
            let record = node.veth("w");
            made(&wires, &record).await;
            // What is no file cannot be unlinked.
            let path = file("w").unwrap().path();
            std::fs::remove_file(&path).unwrap();
            std::fs::create_dir(&path).unwrap();
            wires.remove("w");
            wires.flush().await;
            assert!(path.exists());
            std::fs::remove_dir(&path).unwrap();
            if comes_back {
                made(&wires, &record).await;
            } else {
                std::fs::write(&path, "").unwrap();
            }
            wires.sweep();
            wires.flush().await;
            assert_eq!((path.exists(), wires.broken(None).await), (comes_back, Vec::new()));
        }
    }

    #[tokio::test]
    async fn a_wire_that_was_broken_and_leads_elsewhere_now_is_whole() {
        let Some(mut node) = Node::new("a_wire_that_was_broken_and_leads_elsewhere_now_is_whole") else {
            return;
        };
        let wires = node.wires();
        made(&wires, &node.veth("w")).await;
        let looked = Instant::now();
        node.endpoint = Pod::start();
        while wires.broken(None).await.is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(!wires.is_whole_since("w", looked));
        made(&wires, &node.veth("w")).await;
        assert!(wires.is_whole_since("w", looked));
        wires.remove("w");
        wires.flush().await;
        assert!(!wires.is_whole_since("w", looked), "it is no more");
    }

    #[tokio::test]
    async fn a_wire_is_mended_by_one_once_a_second_and_not_where_a_pod_is_gone() {
        let Some(node) = Node::new("a_wire_is_mended_by_one_once_a_second_and_not_where_a_pod_is_gone")
        else {
            return;
        };
        let wires = node.wires();
        made(&wires, &node.veth("w")).await;
        let (_, nsids, _) = wires.held("w").unwrap();
        let links = HashSet::from([(nsids.near.unwrap(), "nsm-w".to_owned())]);
        node.client.output("ip link del nsm-w");
        let mut cut = wires.cut(&links).await;
        assert!(wires.cut(&links).await.is_empty(), "somebody mends it");
        let mending = cut.pop().unwrap();
        let left = mending.at().saturating_duration_since(Instant::now());
        assert!(!left.is_zero() && left <= MENDS, "{left:?}");
        assert!(mending.mend().await.unwrap(), "it is made again");
        drop(mending);
        assert!(node.client.output("ip -br link").contains("nsm-w") && wires.broken(None).await.is_empty());
        assert!(!wires.cut(&links).await.pop().unwrap().mend().await.unwrap(), "it is there");
        let others = [(nsids.near.unwrap(), "nsm-x".to_owned()), (nsids.far.unwrap(), String::new())];
        assert!(wires.cut(&others.into()).await.is_empty());

        let Node { ns, client, endpoint, state } = node;
        drop(endpoint);
        // The kernel takes a namespace down on a thread of its own: first its number, then its links and what is paired.
        while wires.machine.facts("w", nsids).unwrap().0.is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(wires.cut(&links).await.is_empty(), "beyond mending");
        drop((ns, client, state));
    }

    /// Events of the kernel may be lost, or come before what they are about is known.
    #[tokio::test]
    async fn what_no_event_has_told_of_is_mended_ended_or_removed_when_all_is_looked_at() {
        let test = "what_no_event_has_told_of_is_mended_ended_or_removed_when_all_is_looked_at";
        let Some(node) = Node::new(test) else { return };
        let (wires, hub) = (node.wires(), Arc::default());
        let connections = nsm_mesh::Connections::serving("fwd", nsm_mesh::chain![], Arc::default());
        let mut conn = Connection { id: "c".into(), network_service: "svc".into(), ..Connection::default() };
        path::step(&mut conn, "client", || "c".into()).unwrap();
        let request = nsm_api::pb::networkservice::NetworkServiceRequest {
            connection: Some(conn),
            ..Default::default()
        };
        connections.request(nsm_mesh::Call::default(), request).await.unwrap();
        let id = connections.ids().remove(0);
        let end = |side, pod: &Pod| EndPlan::new(side, pod.ns.id(), "nsm-had", &id);
        let (near, far) = (end(Side::Near, &node.client), end(Side::Far, &node.endpoint));
        made(&wires, &record(WirePlan::veth(&id, near, far))).await;
        made(&wires, &node.veth("nobodys")).await;
        node.client.output("ip link del nsm-had");
        node.client.output("ip link del nsm-nobodys");
        let settled = async |is_so: &dyn Fn() -> bool| {
            crate::serve::look_at_all(&wires, &connections, &hub).await;
            while !is_so() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            wires.flush().await;
        };
        settled(&|| wires.ids() == [id.clone()] && !wires.is_mended(&id)).await;
        assert!(node.client.output("ip -br link").contains("nsm-had") && wires.broken(None).await.is_empty());
        assert_eq!((connections.len(), node.files(), wires.orphans()), (1, 1, 1));

        made(&wires, &node.veth("nobodys")).await;
        let (number, endpoint) = (wires.held(&id).unwrap().1, node.endpoint);
        drop(endpoint);
        while wires.machine.facts(&id, number).unwrap().0.is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // Both are beyond mending.
        settled(&|| connections.is_empty() && wires.ids().is_empty()).await;
    }

    #[test]
    fn a_wire_waits_for_its_connection_no_longer_than_its_token_was_to_live() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let mut kept = record(WirePlan::veth("w", end_of("a"), end_of("b"))).kept();
        (kept.written_unix, kept.expires_unix) = (Some(10_000), 10_060);
        let patience = |kept: &Kept, now| kept.patience(at(now)).as_secs();
        assert_eq!((patience(&kept, 10_020), patience(&kept, 20_000)), (40, 0));
        assert_eq!(patience(&kept, 2_800), 60, "the clock has gone back two hours");
        kept.written_unix = None;
        assert_eq!((patience(&kept, 10_020), patience(&kept, 2_800)), (40, 600), "an old record");
    }

    fn end_of(name: &str) -> EndPlan {
        EndPlan::new(Side::Near, NsId { dev: 1, ino: 1 }, name, name)
    }

    /// Its client and its endpoint were killed with the process before us, and the endpoint has come back.
    #[tokio::test]
    async fn a_wire_that_nobody_has_claimed_goes_when_its_address_is_given_to_another() {
        let Some(node) =
            Node::new("a_wire_that_nobody_has_claimed_goes_when_its_address_is_given_to_another")
        else {
            return;
        };
        let towards = |id: &str, client: &str| {
            let mut record = node.veth(id);
            record.expires = clock::now() + Duration::from_secs(600);
            let far = record.plan.far.as_mut().unwrap();
            far.addresses = vec!["10.0.0.1/32".parse().unwrap()];
            far.routes = vec![Route::to_peer(client.parse().unwrap())];
            record
        };
        let first = node.wires();
        made(&first, &towards("old", "10.0.0.2/32")).await;
        made(&first, &towards("other", "10.0.0.4/32")).await;
        drop(first);

        let second = node.wires();
        made(&second, &towards("new", "10.0.0.2/32")).await;
        second.flush().await;
        assert!(
            second.record("old").is_none() && second.record("other").is_some(),
            "only what is in the way"
        );
        assert_eq!((second.orphans(), node.files()), (1, 2));
        assert!(node.endpoint.output("ip route get 10.0.0.2").contains("nsm-new"));
    }

    #[tokio::test]
    async fn a_start_removes_what_was_never_finished_and_sees_what_is_gone() {
        let Some(node) = Node::new("a_start_removes_what_was_never_finished_and_sees_what_is_gone") else {
            return;
        };
        let (whole, cut) = (node.veth("whole"), node.veth("cut"));
        let first = node.wires();
        made(&first, &whole).await;
        made(&first, &cut).await;
        drop(first);
        node.endpoint.output("ip link del nsm-cut");
        // As a link is born: down, without an alias, in the group of the unfinished.
        node.client.output("ip link add half group 7238509 type veth peer name other group 7238509");

        let second = node.wires();
        assert!(!node.client.output("ip -br link").contains("half"));
        assert_eq!(second.broken(None).await, ["cut"]);
        second.orphan("cut", "a test");
        second.flush().await;
        assert_eq!((second.orphans(), node.files()), (1, 1));
        let Node { ns, client, endpoint, state } = node;
        let number = second.machine.nsid(endpoint.ns.id(), &Fds::default()).unwrap();
        drop(endpoint);
        // The kernel takes a namespace down on a thread of its own.
        for _ in 0..500 {
            if !second.broken(Some(number)).await.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(second.broken(Some(number)).await, ["whole"]);
        drop((ns, client, state));
    }

    #[tokio::test]
    async fn a_wire_that_moves_leaves_nothing_and_waits_for_no_other() {
        let Some(node) = Node::new("a_wire_that_moves_leaves_nothing_and_waits_for_no_other") else { return };
        let wires = node.wires();
        let before = node.veth("moving");
        made(&wires, &before).await;
        let third = Pod::start();
        let mut after = before.clone();
        after.plan.far = Some(EndPlan::new(Side::Far, third.ns.id(), "nsm-moving", "moving"));
        made(&wires, &after).await;
        wires.flush().await;
        assert_eq!(wires.record("moving"), Some(after));
        assert_eq!(node.endpoint.output("ip -br link").lines().count(), 1);
        assert_eq!((wires.broken(None).await, node.files()), (Vec::new(), 1));
    }

    #[tokio::test]
    async fn a_vni_is_its_records_and_a_claim_ends_with_its_request() {
        let Some(node) = Node::new("a_vni_is_its_records_and_a_claim_ends_with_its_request") else { return };
        let alien = "link add alien type vxlan id 72 local 192.0.2.1 remote 192.0.2.9 dstport 4789";
        let add = || Command::new("ip").args(alien.split(' ')).status();
        assert!(node.ns.run(add).unwrap().unwrap().success());
        let wires = node.wires();
        let free = |wires: &Arc<Wires>, vni| wires.claim(vni, "other").is_some();

        let claim = wires.claim(70, "a").unwrap();
        assert!(!free(&wires, 70));
        drop(claim);
        assert!(free(&wires, 70), "nothing came of it");
        let claim = wires.claim(70, "a").unwrap();
        made(&wires, &node.vxlan("a", 70)).await;
        drop(claim);
        assert!(!free(&wires, 70));

        // A refresh that fails keeps the old one and gives the new one back.
        let claim = wires.claim(72, "a").unwrap();
        let refused = wires.apply(node.vxlan("a", 72), &Fds::default()).await;
        assert!(matches!(refused, Err(Taken::Vni)), "{refused:?}");
        drop(claim);
        assert_eq!((free(&wires, 70), free(&wires, 72)), (false, true));

        let claim = wires.claim(74, "a").unwrap();
        made(&wires, &node.vxlan("a", 74)).await;
        drop(claim);
        assert_eq!((free(&wires, 70), free(&wires, 74)), (true, false));

        let next = node.wires();
        assert!(!free(&next, 74), "found with its record");
        next.remove("a");
        assert!(free(&next, 74));
        next.flush().await;
        assert_eq!(node.files(), 0);
    }
}
