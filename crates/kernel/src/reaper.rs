//! Deletes wires where nobody waits for it.
//!
//! The kernel lets the deletion of a link take about 20 ms, most of it waiting until no CPU looks at the link any more,
//! and without its big lock. One message after the other waits as often as there are messages, in one `send` or in
//! many; side by side they wait together (64 veth pairs, measured: one thread 1240 ms, four 505 ms, sixteen 116 ms).
//! So there are a few threads, which live only while there is something to delete.
//!
//! Links are deleted by their mark, and a wire that is made again carries the same. So whoever makes a wire first
//! settles what is left of its namesake: what still waits in the queue he does himself, what a thread is at he awaits.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::io::Errno;

use crate::apply::{Kernel, Nsids, Sockets, delete, ends, find_missing};
use crate::backlog::{Backlog, Job};
use crate::error::{Error, Result};
use crate::netlink::Request;
use crate::netns::Namespace;
use crate::plan::{Construction, Side, WirePlan};
use crate::rt::{self, Link, Nsid, Which};

/// The queue, by connection; its threads work it off before it is dropped.
#[derive(Debug)]
pub(crate) struct Reaper {
    sockets: Arc<Sockets>,
    pub(crate) backlog: Backlog<Doomed>,
}

/// A wire to delete.
pub(crate) struct Doomed {
    sockets: Arc<Sockets>,
    plan: WirePlan,
    nsids: Nsids,
    /// Links that carry no mark any more.
    aside: Vec<(Link, Nsid)>,
    /// Only for policies, which are deleted from inside of a namespace.
    known: Vec<Namespace>,
    then: Box<dyn FnOnce(Result<()>) + Send>,
}

/// They wait more than they work.
const THREADS: usize = 8;
/// How long a wire may wait for the end of its namesake; a thousand times what the kernel takes.
const PATIENCE: Duration = Duration::from_secs(20);

// === impl Kernel ===

impl Kernel {
    /// Deletes a wire and waits until it is gone. Absence is no error, nor is a namespace that is gone with its links.
    pub fn remove(&self, plan: &WirePlan, nsids: Nsids, known: &[&Namespace]) -> Result<()> {
        let (tell, told) = mpsc::channel();
        let doomed = self.reaper.doomed(plan, nsids, known, move |result| {
            let _ = tell.send(result);
        });
        over(&plan.id, self.reaper.backlog.run(doomed, PATIENCE))?;
        told.recv().unwrap_or(Ok(()))
    }

    /// Queues a wire for deletion and returns at once; what becomes of it is told to `then`, on some other thread, and
    /// logged if it failed. [`Kernel::apply`] of the same connection waits for it and for `then`, that of another
    /// wire that wants the same interface name or VNI waits for it, and [`Kernel::flush`] waits for all.
    ///
    /// `then` must not wait for wires itself.
    pub fn remove_later(
        &self,
        plan: &WirePlan,
        nsids: Nsids,
        known: &[&Namespace],
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        self.reaper.backlog.push(self.reaper.doomed(plan, nsids, known, then));
    }

    /// Waits until no deletion of that connection's wire is queued or under way, and for nothing else.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the kernel does not come to an end with it.
    pub fn settle(&self, id: &str) -> Result<()> {
        self.reaper.settle(id)
    }

    /// Removes from a namespace what a killed life of ours could not finish or finish removing, and no plan can know:
    /// links without a mark yet, and rules that lead to nowhere. To be called at the start, before anything is applied
    /// there. How many things there were.
    pub fn sweep(&self, ns: &Namespace) -> Result<usize> {
        let mut node = self.sockets.get()?;
        let nsid = node.assign_nsids(&[ns])?.first().copied();
        let links = node.dump(rt::list_links(nsid)).map_err(|e| e.during("list interfaces"))?;
        let unfinished: Vec<_> = links
            .into_iter()
            .filter_map(Link::of)
            .filter(Link::is_unfinished)
            .zip(nsid.into_iter().cycle())
            .collect();
        // Of a pair only one has to go; the other is gone with it then.
        delete(&mut node, unfinished.iter().map(|(link, nsid)| (link, *nsid)))?;
        self.sockets.give_back(node);
        Ok(unfinished.len() + self.clear_rules(ns)?)
    }

    /// Waits until all that was queued is deleted, or could not be.
    pub fn flush(&self) {
        self.reaper.backlog.wait_beyond(u64::MAX);
    }
}

// === impl Reaper ===

impl Reaper {
    pub(crate) fn new(sockets: Arc<Sockets>) -> Self {
        Self { sockets, backlog: Backlog::new("reaper", THREADS) }
    }

    /// Deletes what a wire's new links have taken the place of. Neither that wire nor the next of its connection waits for it.
    pub(crate) fn end_aside(&self, wire: &str, aside: Vec<(Link, Nsid)>) {
        if aside.is_empty() {
            return;
        }
        let id = format!("{wire}, set aside");
        let plan = WirePlan { id, construction: Construction::Veth, near: None, far: None };
        self.backlog.push(Doomed { aside, ..self.doomed(&plan, Nsids::default(), &[], |_| {}) });
    }

    pub(crate) fn settle(&self, id: &str) -> Result<()> {
        over(id, self.backlog.settle(id, PATIENCE))
    }

    fn doomed(
        &self,
        plan: &WirePlan,
        nsids: Nsids,
        known: &[&Namespace],
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Doomed {
        let with_policies = || plan.ends().filter(|(_, end)| !end.policies.is_empty());
        let needed = known.iter().filter(|ns| with_policies().any(|(_, end)| end.ns == ns.id()));
        // One that cannot be held is looked for.
        let known = needed.filter_map(|ns| ns.try_clone().ok()).collect();
        let sockets = Arc::clone(&self.sockets);
        Doomed { sockets, plan: plan.clone(), nsids, aside: Vec::new(), known, then: Box::new(then) }
    }
}

fn over(id: &str, over: bool) -> Result<()> {
    let late = || Error::Protocol(format!("the wire of {id} is still being deleted; try again"));
    over.then_some(()).ok_or_else(late)
}

// === impl Doomed ===

impl Job for Doomed {
    fn name(&self) -> &str {
        &self.plan.id
    }

    fn run(self) {
        // Rules stay when their interface goes, so they are deleted while its routes still say which they are.
        // Whatever becomes of them, the links go.
        let mut errors: Vec<Error> = self.remove_policies().err().into_iter().collect();
        match self.remove_links() {
            Ok(refused) => errors.extend(refused),
            Err(error) => errors.push(error),
        }
        for error in &errors {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            tracing::warn!(wire = self.plan.id, %error, cause, "cannot delete a wire");
        }
        (self.then)(Error::join(errors));
    }
}

impl Doomed {
    fn remove_policies(&self) -> Result<()> {
        if self.plan.ends().all(|(_, end)| end.policies.is_empty()) {
            return Ok(());
        }
        let known: Vec<_> = self.known.iter().collect();
        let mut plan = self.plan.clone();
        plan.near.take_if(|end| end.policies.is_empty());
        plan.far.take_if(|end| end.policies.is_empty());
        let found = match find_missing(&plan, &known) {
            Err(Error::NamespaceGone(_)) => return Ok(()),
            other => other?,
        };
        let mut node = self.sockets.get()?;
        for end in ends(&mut node, &plan, &known, &found)? {
            let link = node
                .links(vec![rt::get_link(Which::Name(&end.mark), Some(end.nsid), false)])?
                .pop()
                .flatten();
            self.sockets.clear_policies(&end, link.as_ref())?;
        }
        self.sockets.give_back(node);
        Ok(())
    }

    /// By their marks; one end of a veth pair takes the other along. What the kernel refused.
    fn remove_links(&self) -> Result<Vec<Error>> {
        let ends = [(Side::Near, self.nsids.near), (Side::Far, self.nsids.far)];
        let links: Vec<_> =
            ends.into_iter().filter_map(|(side, nsid)| Some((self.plan.mark(side), nsid?))).collect();
        let deletion =
            |(mark, nsid): &(String, _)| Request::new(rt::delete_link(Which::Name(mark), Some(*nsid)));
        let mut socket = self.sockets.get()?;
        delete(&mut socket, self.aside.iter().map(|(link, nsid)| (link, *nsid)))?;
        let refused = socket.commit(links.iter().map(deletion).collect())?;
        self.sockets.give_back(socket);
        // No such link, or the number stands for no namespace any more.
        let refused =
            refused.into_iter().filter(|at| !matches!(at.refusal.errno, Errno::NODEV | Errno::INVAL));
        let what = |index| links.get(index).map_or_else(String::new, |(mark, _)| format!("delete {mark}"));
        Ok(refused.map(|at| Error::Refused { what: what(at.index), source: at.refusal }).collect())
    }
}
