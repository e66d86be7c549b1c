//! The machine that a forwarder works on: its kernel, and threads for what blocks.

use std::{fmt::Debug, os::fd::AsFd as _};

use nsm_api::mechanism::InodeUrl;
use nsm_kernel::{
    Applied, EndFacts, Error, Kernel, Nsid, Nsids, Owned, Result, Snapshot,
    netns::{Namespace, NsId},
    plan::WirePlan,
    travellers::Travellers,
};
use nsm_mesh::fds::Fds;
use tokio::sync::oneshot;

/// Something to do on a thread.
pub type Work = Box<dyn FnOnce() + Send>;
/// What hears of a deletion.
pub type Then = Box<dyn FnOnce(Result<()>) + Send>;

/// What wires need of the machine they are on. [`Node`] is a real one; what its methods promise is said at those of the
/// same names of [`Kernel`]. `fds` are the namespaces that came with a request: one that is not among them is looked for.
pub trait Machine: Debug + Send + Sync {
    /// [`Kernel::apply`].
    ///
    /// # Errors
    /// Its own.
    fn apply(&self, plan: &WirePlan, fds: &Fds) -> Result<Applied>;
    /// [`Kernel::remove`].
    ///
    /// # Errors
    /// Its own.
    fn remove(&self, plan: &WirePlan, nsids: Nsids, fds: &Fds) -> Result<()>;
    /// [`Kernel::remove_later`].
    fn remove_later(&self, plan: &WirePlan, nsids: Nsids, then: Then);
    /// [`Kernel::settle`].
    ///
    /// # Errors
    /// Its own.
    fn settle(&self, id: &str) -> Result<()>;
    /// [`Kernel::sweep`]; a namespace that is gone has nothing left.
    ///
    /// # Errors
    /// Its own.
    fn sweep(&self, ns: NsId) -> Result<usize>;
    /// [`Kernel::flush`].
    fn flush(&self);
    /// [`Kernel::nsid`].
    ///
    /// # Errors
    /// Its own.
    fn nsid(&self, ns: NsId, fds: &Fds) -> Result<Nsid>;
    /// [`Kernel::facts`].
    ///
    /// # Errors
    /// Its own.
    fn facts(&self, id: &str, nsids: Nsids) -> Result<(Option<EndFacts>, Option<EndFacts>)>;
    /// [`Kernel::snapshot`].
    ///
    /// # Errors
    /// Its own.
    fn snapshot(&self, plan: &WirePlan) -> Result<Snapshot>;
    /// [`Kernel::numbered`].
    ///
    /// # Errors
    /// Its own.
    fn numbered(&self) -> Result<Vec<Nsid>>;
    /// [`Kernel::owned`].
    ///
    /// # Errors
    /// Its own.
    fn owned(&self, nsid: Nsid) -> Result<Vec<Owned>>;
    /// Does this on a thread that may enter namespaces.
    fn travel(&self, work: Work);
    /// Does this on a thread that may wait.
    fn wait(&self, work: Work);
}

/// What work on a thread returns; `None`: it panicked.
pub(crate) async fn on<T: Send + 'static>(
    thread: impl FnOnce(Work),
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (tell, told) = oneshot::channel();
    thread(Box::new(move || drop(tell.send(work()))));
    told.await.ok()
}

/// A real machine.
#[derive(Debug)]
pub struct Node {
    kernel: Kernel,
    travellers: Travellers,
}

impl Node {
    /// In whose network namespace the node's tunnels are.
    ///
    /// # Errors
    /// A kernel that refuses us.
    pub fn new(node: Namespace) -> Result<Self> {
        Ok(Self { kernel: Kernel::new(node)?, travellers: Travellers::new(Namespace::current()?) })
    }

    /// Its kernel.
    #[must_use]
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }
}

/// The namespace of an end, if it came along.
fn came(ns: NsId, fds: &Fds) -> Result<Option<Namespace>> {
    let Some(fd) = fds.get(InodeUrl { dev: ns.dev, ino: ns.ino }) else { return Ok(None) };
    let copy = fd
        .as_fd()
        .try_clone_to_owned()
        .map_err(|source| Error::Socket { what: "copy the descriptor of a namespace", source })?;
    Namespace::from_fd(copy).map(Some)
}

fn known(plan: &WirePlan, fds: &Fds) -> Result<Vec<Namespace>> {
    plan.ends().filter_map(|(_, end)| came(end.ns, fds).transpose()).collect()
}

impl Machine for Node {
    fn apply(&self, plan: &WirePlan, fds: &Fds) -> Result<Applied> {
        let known = known(plan, fds)?;
        self.kernel.apply(plan, &known.iter().collect::<Vec<_>>())
    }

    fn remove(&self, plan: &WirePlan, nsids: Nsids, fds: &Fds) -> Result<()> {
        let known = known(plan, fds)?;
        self.kernel.remove(plan, nsids, &known.iter().collect::<Vec<_>>())
    }

    fn remove_later(&self, plan: &WirePlan, nsids: Nsids, then: Then) {
        self.kernel.remove_later(plan, nsids, &[], then);
    }

    fn settle(&self, id: &str) -> Result<()> {
        self.kernel.settle(id)
    }

    fn sweep(&self, ns: NsId) -> Result<usize> {
        Namespace::find(ns)?.map_or(Ok(0), |ns| self.kernel.sweep(&ns))
    }

    fn flush(&self) {
        self.kernel.flush();
    }

    fn nsid(&self, ns: NsId, fds: &Fds) -> Result<Nsid> {
        let found = match came(ns, fds)? {
            Some(came) => came,
            None => Namespace::find(ns)?.ok_or(Error::NamespaceGone(ns))?,
        };
        self.kernel.nsid(&found)
    }

    fn facts(&self, id: &str, nsids: Nsids) -> Result<(Option<EndFacts>, Option<EndFacts>)> {
        self.kernel.facts(id, nsids)
    }

    fn snapshot(&self, plan: &WirePlan) -> Result<Snapshot> {
        self.kernel.snapshot(plan, &[])
    }

    fn numbered(&self) -> Result<Vec<Nsid>> {
        self.kernel.numbered()
    }

    fn owned(&self, nsid: Nsid) -> Result<Vec<Owned>> {
        self.kernel.owned(nsid)
    }

    fn travel(&self, work: Work) {
        self.travellers.send(work);
    }

    fn wait(&self, work: Work) {
        drop(tokio::task::spawn_blocking(work));
    }
}
