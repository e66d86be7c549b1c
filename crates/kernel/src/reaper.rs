//! Deletes wires where nobody waits for it.
//!
//! The kernel lets one deletion of a link take about 20 ms (it waits until no CPU looks at the link any more). So
//! links are queued, and a thread deletes what has gathered with several messages in one `send`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use rustix::io::Errno;

use crate::apply::{Kernel, Nsids, find_missing};
use crate::error::{Error, Result};
use crate::netlink::{Request, Route as Rt, Socket};
use crate::netns::Namespace;
use crate::plan::{Side, WirePlan, mark};
use crate::rt::{self, Nsid, Which};

/// The queue and its thread, which works off the queue before it ends.
#[derive(Debug)]
pub(crate) struct Reaper {
    queue: Option<Sender<Job>>,
    waiting: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Job {
    Delete { mark: String, nsid: Nsid },
    Report(SyncSender<Vec<Error>>),
}

/// What goes into one `send`. Others of the kernel wait for its lock meanwhile, so not too many.
const AT_ONCE: usize = 16;
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
        for (side, nsid) in [(Side::Near, nsids.near), (Side::Far, nsids.far)] {
            if let Some(nsid) = nsid {
                self.reaper.push(Job::Delete { mark: mark(side, id), nsid });
            }
        }
    }

    /// Waits until all that was queued is deleted.
    ///
    /// # Errors
    /// What could not be deleted since the last call, at most one error per link.
    pub fn flush(&self) -> Result<()> {
        let (reply, report) = sync_channel(1);
        self.reaper.push(Job::Report(reply));
        let errors = report.recv().map_err(|_| Error::Protocol("the deleting thread has ended".into()))?;
        Error::join(errors)
    }

    fn remove_policies(&self, plan: &WirePlan, known: &[&Namespace]) -> Result<()> {
        let found = match find_missing(plan, known) {
            Err(Error::NamespaceGone(_)) => return Ok(()),
            other => other?,
        };
        let mut node = self.socket()?;
        let ends = self.ends(&mut node, plan, known, &found)?;
        for end in ends.iter().filter(|end| !end.plan.policies.is_empty()) {
            let link = node
                .links(vec![rt::get_link(Which::Name(&end.mark), Some(end.nsid), false)])?
                .pop()
                .flatten();
            self.clear_policies(end, link.as_ref())?;
        }
        self.give_back(node);
        Ok(())
    }
}

// === impl Reaper ===

impl Reaper {
    /// Starts the thread; the socket is one of the node's namespace.
    pub(crate) fn start(socket: Socket<Rt>) -> Result<Self> {
        let (queue, jobs) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&waiting);
        let thread =
            thread::Builder::new().name("reaper".into()).spawn(move || work(socket, &jobs, &count)).map_err(
                |source| Error::Namespace { what: "start the thread that deletes wires".into(), source },
            )?;
        Ok(Self { queue: Some(queue), waiting, thread: Some(thread) })
    }

    /// Whether something is queued or being deleted.
    pub(crate) fn pending(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    fn push(&self, job: Job) {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        // The thread ends only when the queue is dropped, so it takes the job.
        if self.queue.as_ref().is_none_or(|queue| queue.send(job).is_err()) {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

// === private helpers ===

fn work(mut socket: Socket<Rt>, jobs: &Receiver<Job>, waiting: &AtomicUsize) {
    let mut errors = Vec::new();
    while let Ok(first) = jobs.recv() {
        let mut doomed = Vec::new();
        let mut reply = None;
        let mut taken = 0;
        for job in std::iter::once(first).chain(jobs.try_iter()) {
            taken += 1;
            match job {
                Job::Delete { mark, nsid } => doomed.push((mark, nsid)),
                Job::Report(sender) => reply = Some(sender),
            }
            if doomed.len() == AT_ONCE || reply.is_some() {
                break;
            }
        }
        errors.extend(delete(&mut socket, doomed));
        errors.truncate(KEPT_ERRORS);
        waiting.fetch_sub(taken, Ordering::AcqRel);
        if let Some(reply) = reply {
            // Who asked may have gone.
            let _ = reply.send(std::mem::take(&mut errors));
        }
    }
}

/// Deletes links by mark in one `send`.
fn delete(socket: &mut Socket<Rt>, doomed: Vec<(String, Nsid)>) -> Vec<Error> {
    let requests = doomed
        .iter()
        .map(|(mark, nsid)| Request::new(rt::delete_link(Which::Name(mark), Some(*nsid))))
        .collect();
    let refused = match socket.commit(requests) {
        Ok(refused) => refused,
        Err(error) => return vec![error],
    };
    refused
        .into_iter()
        // No such link, or the number stands for no namespace any more.
        .filter(|at| !matches!(at.refusal.errno, Errno::NODEV | Errno::INVAL))
        .map(|at| {
            let mark = doomed.get(at.index).map_or("a link", |(mark, _)| mark);
            tracing::warn!(mark, error = %at.refusal, "cannot delete a wire");
            Error::Refused { what: format!("delete {mark}"), source: at.refusal }
        })
        .collect()
}
