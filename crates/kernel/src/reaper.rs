//! Deletes wires where nobody waits for it.
//!
//! The kernel lets the deletion of a link take about 20 ms, most of it waiting until no CPU looks at the link any more,
//! and without its big lock. One message after the other waits as often as there are messages, in one `send` or in
//! many; side by side they wait together (64 veth pairs, measured: one thread 1240 ms, four 505 ms, sixteen 116 ms).
//! So there are a few threads, which live only while there is something to delete.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

use crate::apply::{Kernel, Nsids, Sockets, delete, ends, find_missing};
use crate::error::{Error, Result};
use crate::netlink::Request;
use crate::netns::Namespace;
use crate::plan::{Side, WirePlan, mark};
use crate::rt::{self, Link, Nsid, Which};

/// The queue; its threads work it off before it is dropped.
#[derive(Debug)]
pub(crate) struct Reaper(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sockets: Arc<Sockets>,
    queue: Mutex<Queue>,
    /// Signalled when something is gone, and when the last thread ends because nothing is left.
    progress: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    doomed: VecDeque<Vec<Doomed>>,
    threads: usize,
    queued: u64,
    ended: u64,
    errors: Vec<Error>,
}

/// A link to delete. Both ends of a pair are one entry of the queue: the second is gone with the first.
#[derive(Debug)]
struct Doomed {
    mark: String,
    nsid: Nsid,
}

/// They wait more than they work.
const THREADS: usize = 8;
/// Errors kept for the next [`Kernel::flush`]; all of them are logged.
const KEPT_ERRORS: usize = 100;

// === impl Kernel ===

impl Kernel {
    /// Deletes a wire and waits until it is gone. Absence is no error, nor is a namespace that is gone with its links.
    pub fn remove(&self, plan: &WirePlan, nsids: Nsids, known: &[&Namespace]) -> Result<()> {
        self.remove_later(plan, nsids, known)?;
        self.flush()
    }

    /// Queues a wire for deletion and returns at once. [`Kernel::apply`] of another wire that wants the same interface
    /// name or VNI waits for it; [`Kernel::flush`] waits for all.
    pub fn remove_later(&self, plan: &WirePlan, nsids: Nsids, known: &[&Namespace]) -> Result<()> {
        // Rules stay when their interface goes, so they are deleted while its routes still say which they are.
        if plan.ends().any(|(_, end)| !end.policies.is_empty()) {
            self.remove_policies(plan, known)?;
        }
        self.remove_marked(&plan.id, nsids);
        Ok(())
    }

    /// Queues the links with the marks of that connection for deletion. One end of a veth pair takes the other along.
    pub fn remove_marked(&self, id: &str, nsids: Nsids) {
        let ends = [(Side::Near, nsids.near), (Side::Far, nsids.far)];
        let doomed =
            ends.into_iter().filter_map(|(side, nsid)| Some(Doomed { mark: mark(side, id), nsid: nsid? }));
        self.reaper.push(doomed.collect());
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

    /// Waits until all that was queued is deleted.
    ///
    /// # Errors
    /// What could not be deleted since the last call.
    pub fn flush(&self) -> Result<()> {
        Error::join(self.reaper.wait())
    }

    fn remove_policies(&self, plan: &WirePlan, known: &[&Namespace]) -> Result<()> {
        let found = match find_missing(plan, known) {
            Err(Error::NamespaceGone(_)) => return Ok(()),
            other => other?,
        };
        let mut node = self.sockets.get()?;
        let ends = ends(&mut node, plan, known, &found)?;
        for end in ends.iter().filter(|end| !end.plan.policies.is_empty()) {
            let link = node
                .links(vec![rt::get_link(Which::Name(&end.mark), Some(end.nsid), false)])?
                .pop()
                .flatten();
            self.clear_policies(end, link.as_ref())?;
        }
        self.sockets.give_back(node);
        Ok(())
    }
}

// === impl Reaper ===

impl Reaper {
    pub(crate) fn new(sockets: Arc<Sockets>) -> Self {
        Self(Arc::new(Shared { sockets, queue: Mutex::default(), progress: Condvar::new() }))
    }

    /// How many deletions were ever asked for.
    pub(crate) fn queued(&self) -> u64 {
        self.0.queue.lock().queued
    }

    /// How many of them have ended.
    pub(crate) fn ended(&self) -> u64 {
        self.0.queue.lock().ended
    }

    /// Waits until more deletions have ended than that, or none is left.
    pub(crate) fn wait_beyond(&self, ended: u64) {
        let mut queue = self.0.queue.lock();
        self.0.progress.wait_while(&mut queue, |queue| queue.ended <= ended && queue.threads > 0);
    }

    fn push(&self, doomed: Vec<Doomed>) {
        let mut queue = self.0.queue.lock();
        queue.doomed.push_back(doomed);
        queue.queued += 1;
        if queue.threads == THREADS {
            return;
        }
        queue.threads += 1;
        let others = queue.threads > 1;
        drop(queue);
        let shared = Arc::clone(&self.0);
        let spawned = thread::Builder::new().name("reaper".into()).spawn(move || shared.work());
        if let Err(error) = spawned {
            tracing::warn!(%error, others, "cannot start a thread that deletes wires");
            // It has to be done, and if nobody else does it, here and now.
            self.0.work();
        }
    }

    /// Waits for the end of the queue.
    fn wait(&self) -> Vec<Error> {
        let mut queue = self.0.queue.lock();
        self.0.progress.wait_while(&mut queue, |queue| queue.threads > 0);
        std::mem::take(&mut queue.errors)
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.wait();
    }
}

impl Shared {
    /// What a thread does: it deletes until there is nothing left.
    fn work(&self) {
        let mut queue = self.queue.lock();
        while let Some(doomed) = queue.doomed.pop_front() {
            drop(queue);
            let errors = self.delete(&doomed).unwrap_or_else(|error| vec![error]);
            queue = self.queue.lock();
            queue.ended += 1;
            self.progress.notify_all();
            for error in errors.into_iter().take(KEPT_ERRORS.saturating_sub(queue.errors.len())) {
                queue.errors.push(error);
            }
        }
        queue.threads -= 1;
        self.progress.notify_all();
    }

    fn delete(&self, doomed: &[Doomed]) -> Result<Vec<Error>> {
        let mut socket = self.sockets.get()?;
        let delete = |link: &Doomed| Request::new(rt::delete_link(Which::Name(&link.mark), Some(link.nsid)));
        let refused = socket.commit(doomed.iter().map(delete).collect())?;
        self.sockets.give_back(socket);
        // No such link, or the number stands for no namespace any more.
        let refused =
            refused.into_iter().filter(|at| !matches!(at.refusal.errno, Errno::NODEV | Errno::INVAL));
        Ok(refused
            .map(|at| {
                let mark = doomed.get(at.index).map_or("a link", |link| &link.mark);
                tracing::warn!(mark, error = %at.refusal, "cannot delete a wire");
                Error::Refused { what: format!("delete {mark}"), source: at.refusal }
            })
            .collect())
    }
}
