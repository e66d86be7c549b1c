//! The wires of this node: what is planned, on disk and in the kernel, for this process and the one after it.
//!
//! The kernel's calls block for tenths of milliseconds, so they run on the runtime's blocking threads. A wire
//! is written to the store before it is made: a crash in between leaves a record without a wire, which is
//! harmless, and never a wire without a record.

use std::{
    collections::HashMap,
    os::fd::AsFd as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use nsm_api::{
    mechanism::InodeUrl,
    path,
    pb::connection::{Connection, Mechanism},
};
use nsm_kernel::{
    Kernel, Nsid, Nsids,
    netns::Namespace,
    plan::{Construction, Side, WirePlan},
    store::{self, Store},
};
use nsm_mesh::{Error, Result, error::chain_text, fds::Fds};
use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tonic::Code;

use crate::tunnel::Vnis;

/// How long a wire that was found at start may wait for its connection when its record tells no expiry.
const GRACE: Duration = Duration::from_secs(600);

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
}

/// What goes onto the disk beside the plan.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kept {
    far_class: String,
    far_type: String,
    far_parameters: std::collections::BTreeMap<String, String>,
    expires_unix: u64,
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
    kernel: Arc<Kernel>,
    store: Store,
    records: Mutex<HashMap<String, Held>>,
    vnis: Mutex<Vnis>,
    orphans: AtomicU64,
}

impl Record {
    /// The record of a connection as it was answered.
    #[must_use]
    pub fn new(plan: WirePlan, far: Mechanism, conn: &Connection) -> Self {
        let expires = path::expiry_before_us(conn).unwrap_or_else(|| SystemTime::now() + GRACE);
        Self { plan, far, expires }
    }

    fn vni(&self) -> Option<u32> {
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
            expires_unix: self.expires.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        }
    }

    fn from_kept(plan: WirePlan, kept: Kept) -> Self {
        let far = Mechanism { cls: kept.far_class, r#type: kept.far_type, parameters: kept.far_parameters };
        Self { plan, far, expires: SystemTime::UNIX_EPOCH + Duration::from_secs(kept.expires_unix) }
    }
}

impl Wires {
    /// The wires that a process before us has left, ready to be claimed by their connections.
    ///
    /// # Errors
    /// A kernel that refuses us, or a state directory that cannot be used.
    pub fn open(node: Namespace, state_dir: &Path) -> Result<Self> {
        let kernel = Kernel::new(node).map_err(|e| internal(&e))?;
        let store = Store::open(state_dir).map_err(|e| internal(&e))?;
        let found = store.load().map_err(|e| internal(&e))?;
        let mut records = HashMap::new();
        let mut vnis = Vnis::default();
        for saved in found.records {
            let kept: Kept = match serde_json::from_value(saved.data) {
                Ok(kept) => kept,
                Err(error) => {
                    tracing::warn!(wire = %saved.plan.id, %error, "its record is of another version; it is left alone until it is asked for");
                    continue;
                }
            };
            let record = Record::from_kept(saved.plan, kept);
            if let Some(vni) = record.vni() {
                vnis.claim(vni, &record.plan.id);
            }
            records.insert(record.plan.id.clone(), Held { record, nsids: saved.nsids });
        }
        if !records.is_empty() {
            tracing::info!(wires = records.len(), "found wires of an earlier process");
        }
        Ok(Self {
            kernel: Arc::new(kernel),
            store,
            records: Mutex::new(records),
            vnis: Mutex::new(vnis),
            orphans: AtomicU64::new(0),
        })
    }

    /// The kernel they are in.
    #[must_use]
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The VNIs of this node.
    pub fn vnis(&self) -> MutexGuard<'_, Vnis> {
        self.vnis.lock()
    }

    /// What is known of a connection's wire.
    #[must_use]
    pub fn record(&self, id: &str) -> Option<Record> {
        self.records.lock().get(id).map(|held| held.record.clone())
    }

    /// How many wires nobody wanted any more and were removed.
    #[must_use]
    pub fn orphans(&self) -> u64 {
        self.orphans.load(Ordering::Relaxed)
    }

    /// Makes the kernel equal to the record's plan: makes the wire, adopts it, or changes what differs.
    ///
    /// # Errors
    /// [`Taken`]; a wire that did not exist before does not exist then.
    pub async fn apply(self: &Arc<Self>, record: Record, fds: &Fds) -> std::result::Result<(), Taken> {
        let this = Arc::clone(self);
        let fds = fds.clone();
        let work = spawn_blocking(move || this.apply_now(record, &fds));
        work.await.unwrap_or_else(|_| Err(Taken::Other(Error::internal("making the wire panicked"))))
    }

    fn apply_now(&self, record: Record, fds: &Fds) -> std::result::Result<(), Taken> {
        let id = record.plan.id.clone();
        let before = self.records.lock().get(&id).cloned();
        let mut namespaces = Vec::new();
        for (_, end) in record.plan.ends() {
            // One that did not come with the request is looked for by the kernel crate.
            let Some(fd) = fds.get(InodeUrl { dev: end.ns.dev, ino: end.ns.ino }) else { continue };
            let copy =
                fd.as_fd().try_clone_to_owned().map_err(|e| Taken::Other(Error::internal(e.to_string())))?;
            namespaces.push(Namespace::from_fd(copy).map_err(|e| Taken::Other(refused(&e)))?);
        }
        let known: Vec<&Namespace> = namespaces.iter().collect();
        let nsids = self.nsids(&record.plan, &known).map_err(Taken::Other)?;
        let held = Held { record, nsids };
        let plan = &held.record.plan;
        if before.as_ref().is_none_or(|before| before.record != held.record) {
            self.save(&held).map_err(Taken::Other)?;
        }
        if let Some(before) = before.as_ref().filter(|before| moved(&before.record.plan, plan)) {
            // An endpoint that came back in another pod: the old ends are where the new plan does not look.
            self.kernel
                .remove(&before.record.plan, before.nsids, &known)
                .map_err(|e| Taken::Other(refused(&e)))?;
        }
        match self.kernel.apply(plan, &known) {
            Ok(applied) => {
                tracing::debug!(wire = %id, created = applied.created, writes = applied.writes, "applied");
                self.records.lock().insert(id, held);
                Ok(())
            }
            Err(error) => {
                let restored = match &before {
                    Some(before) => self.save(before),
                    None => self.store.remove(&id).map(drop).map_err(|e| internal(&e)),
                };
                if restored.is_err() {
                    tracing::warn!(wire = %id, "its record could not be taken back");
                }
                Err(taken(error, plan))
            }
        }
    }

    fn nsids(&self, plan: &WirePlan, known: &[&Namespace]) -> Result<Nsids> {
        let mut nsids = Nsids::default();
        for (side, end) in plan.ends() {
            let of = |ns: &Namespace| self.kernel.nsid(ns);
            let number = match known.iter().find(|ns| ns.id() == end.ns) {
                Some(ns) => of(ns),
                None => Namespace::find(end.ns)
                    .and_then(|ns| ns.ok_or(nsm_kernel::Error::NamespaceGone(end.ns)))
                    .and_then(|ns| of(&ns)),
            };
            let number = Some(number.map_err(|e| refused(&e))?);
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
            Error::new(Code::ResourceExhausted, chain_text(&e))
                .hint("a wire is only made when its plan can be kept; free space in NSM_STATE_DIR")
        })
    }

    /// Removes a connection's wire. The kernel takes its time; nobody waits for that.
    ///
    /// # Errors
    /// What the kernel or the store refuse; the wire is forgotten all the same.
    pub async fn remove(self: &Arc<Self>, id: &str) -> Result<()> {
        let Some(Held { record, nsids }) = self.records.lock().remove(id) else { return Ok(()) };
        let (this, id) = (Arc::clone(self), id.to_owned());
        let work = spawn_blocking(move || {
            let removed = this.kernel.remove_later(&record.plan, nsids, &[]).map_err(|e| refused(&e));
            if let Some(vni) = record.vni() {
                this.vnis.lock().release(vni, &id);
            }
            this.store.remove(&id).map_err(|e| internal(&e))?;
            removed
        });
        work.await.unwrap_or_else(|_| Err(Error::internal("removing the wire panicked")))
    }

    /// Removes the wires of an earlier process whose time has come and which no connection has claimed.
    /// `live` tells whether a connection holds the wire.
    pub async fn sweep(self: &Arc<Self>, now: SystemTime, live: impl Fn(&str) -> bool) {
        let due: Vec<String> = {
            let records = self.records.lock();
            records
                .iter()
                .filter(|(id, held)| held.record.expires <= now && !live(id))
                .map(|(id, _)| id.clone())
                .collect()
        };
        for id in due {
            self.orphan(&id, "its client's token has expired").await;
        }
    }

    /// Removes a wire that no connection holds, and counts it.
    pub async fn orphan(self: &Arc<Self>, id: &str, why: &str) {
        let orphans = self.orphans.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::info!(wire = id, why, orphans, "removing a wire that nobody wants");
        if let Err(error) = self.remove(id).await {
            tracing::warn!(wire = id, %error, "not removed in full");
        }
    }

    /// The connections that have an end in the namespace that the node numbers so.
    #[must_use]
    pub fn in_namespace(&self, nsid: Nsid) -> Vec<String> {
        let records = self.records.lock();
        let has = |held: &Held| held.nsids.near == Some(nsid) || held.nsids.far == Some(nsid);
        records.iter().filter(|(_, held)| has(held)).map(|(id, _)| id.clone()).collect()
    }

    /// All connections that have a wire here.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        self.records.lock().keys().cloned().collect()
    }

    /// Whether the ends of a wire are still in the kernel.
    #[must_use]
    pub fn is_whole(&self, id: &str) -> bool {
        let Some(held) = self.records.lock().get(id).cloned() else { return false };
        self.kernel.facts(id, held.nsids).is_ok_and(|(near, far)| {
            near.is_some() == held.nsids.near.is_some() && far.is_some() == held.nsids.far.is_some()
        })
    }

    /// Waits until everything that is being removed is gone.
    pub async fn flush(&self) {
        let kernel = Arc::clone(&self.kernel);
        if let Ok(Err(error)) = spawn_blocking(move || kernel.flush()).await {
            tracing::warn!(error = %chain_text(&error), "some links could not be removed");
        }
    }
}

/// Whether a wire has an end in another namespace than before, or is of another kind.
fn moved(before: &WirePlan, now: &WirePlan) -> bool {
    let places = |plan: &WirePlan| plan.ends().map(|(side, end)| (side, end.ns)).collect::<Vec<_>>();
    places(before) != places(now)
        || std::mem::discriminant(&before.construction) != std::mem::discriminant(&now.construction)
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
    Error::internal(chain_text(error))
}

fn refused(error: &nsm_kernel::Error) -> Error {
    let code = match error {
        nsm_kernel::Error::Plan(_) | nsm_kernel::Error::NotANamespace(_) => Code::InvalidArgument,
        nsm_kernel::Error::NamespaceGone(_) => Code::FailedPrecondition,
        _ => Code::Internal,
    };
    Error::new(code, chain_text(error))
}
