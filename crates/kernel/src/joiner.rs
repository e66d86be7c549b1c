//! Keeps interfaces joined while they come and go: the reconciler of a network function.
//!
//! A thread compares what is wanted with what is there ([`crate::join`]) whenever either changes. It hears of
//! interfaces and addresses by netlink and sleeps otherwise; when notifications were lost it looks at everything,
//! which is all that it ever does. It lives in the namespace of the thread that starts it.
//!
//! Joins that are found at the start were made by a function that was killed. They are kept as long as their
//! interfaces live, for the connections behind them do: whoever asks for one takes it over without a packet lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use netlink_sys::protocols::NETLINK_ROUTE;
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::error::{Error, Result};
use crate::join::{self, Join};
use crate::netlink::{Route as Rt, Socket};

/// Keeps interfaces joined until it is stopped. Dropped without that it leaves them joined, as a crash does.
#[derive(Debug)]
pub struct Joiner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// How far a join is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Interfaces are missing.
    Waiting,
    /// Packets pass.
    Joined,
    /// The kernel does not want to. It is tried again.
    Failed(String),
}

#[derive(Debug)]
struct Shared {
    desk: Mutex<Desk>,
    changed: Condvar,
    /// Wakes the thread.
    bell: OwnedFd,
}

#[derive(Debug, Default)]
struct Desk {
    /// By the near interface.
    joins: BTreeMap<String, Wanted>,
    /// What the thread has brought about so far; equal to `orders` when it has nothing to do.
    done: u64,
    /// How often something was asked for.
    orders: u64,
    stop: bool,
}

#[derive(Debug)]
struct Wanted {
    join: Join,
    state: State,
    /// Found, not asked for.
    found: bool,
}

/// Groups of notifications: interfaces, and addresses, which others may put where none belong.
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
/// When to look again although nothing was heard: something failed, or the other end of a wire is about to come up,
/// which the kernel may announce a second late.
const FIRST_RETRY: Duration = Duration::from_millis(2);
const LAST_RETRY: Duration = Duration::from_secs(1);
/// How often to look at what changes have led to before sleeping over it.
const PASSES: usize = 3;

// === impl Joiner ===

impl Joiner {
    /// Starts it in the namespace of the calling thread.
    pub fn start() -> Result<Self> {
        let listen = || {
            let mut socket = netlink_sys::Socket::new(NETLINK_ROUTE)?;
            socket.set_non_blocking(true)?;
            socket.bind_auto()?;
            for group in [RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR] {
                socket.add_membership(group)?;
            }
            Ok(socket)
        };
        let ear = listen().map_err(|source| Error::Socket { what: "listen to interfaces", source })?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::Socket { what: "make a wake-up call", source: e.into() })?;
        let mut socket = Socket::open()?;
        let found = join::joins(&join::snapshot(&mut socket, [])?);
        let mut desk = Desk::default();
        for join in found {
            tracing::info!(%join, "found a join");
            let wanted = Wanted { join, state: State::Waiting, found: true };
            desk.joins.insert(wanted.join.near.clone(), wanted);
        }
        let shared = Arc::new(Shared { desk: Mutex::new(desk), changed: Condvar::new(), bell });
        let worker = Worker { shared: Arc::clone(&shared), socket, ear };
        let thread = thread::Builder::new()
            .name("joiner".into())
            .spawn(move || worker.run())
            .map_err(|source| Error::Socket { what: "start its thread", source })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Asks for a join, or for another form of the one that this near interface is in. It comes about when both
    /// interfaces are there.
    pub fn want(&self, join: Join) {
        self.shared.order(|desk| match desk.joins.get_mut(&join.near) {
            Some(wanted) if wanted.join == join => {
                wanted.found = false;
                false
            }
            _ => {
                let wanted = Wanted { join, state: State::Waiting, found: false };
                desk.joins.insert(wanted.join.near.clone(), wanted);
                true
            }
        });
    }

    /// Undoes the join of this near interface.
    pub fn forget(&self, near: &str) {
        self.shared.order(|desk| desk.joins.remove(near).is_some());
    }

    /// The joins that there are or shall be, found ones included.
    pub fn joins(&self) -> Vec<Join> {
        self.shared.desk.lock().joins.values().map(|wanted| wanted.join.clone()).collect()
    }

    /// How far the join of this near interface is; `None`: nobody wants it.
    pub fn state(&self, near: &str) -> Option<State> {
        self.shared.desk.lock().joins.get(near).map(|wanted| wanted.state.clone())
    }

    /// Waits until the join of this near interface is in that state (`None`: forgotten, and gone from the kernel).
    /// Whether it came to that.
    pub fn wait(&self, near: &str, state: Option<&State>, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut desk = self.shared.desk.lock();
        loop {
            let now = desk.joins.get(near).map(|wanted| &wanted.state);
            if now == state && desk.done == desk.orders {
                return true;
            }
            if self.shared.changed.wait_until(&mut desk, deadline).timed_out() {
                return false;
            }
        }
    }

    /// Undoes all joins and ends.
    pub fn stop(mut self) {
        self.shared.order(|desk| {
            desk.joins.clear();
            true
        });
        self.end();
    }

    fn end(&mut self) {
        self.shared.order(|desk| {
            desk.stop = true;
            true
        });
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the joiner had panicked");
        }
    }
}

impl Drop for Joiner {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end();
        }
    }
}

impl Shared {
    fn order(&self, change: impl FnOnce(&mut Desk) -> bool) {
        let mut desk = self.desk.lock();
        if change(&mut desk) {
            desk.orders += 1;
            // It can only fail by being full, and then it rings already.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting => f.write_str("waits for its interfaces"),
            Self::Joined => f.write_str("joined"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}

// === the thread ===

struct Worker {
    shared: Arc<Shared>,
    socket: Socket<Rt>,
    ear: netlink_sys::Socket,
}

impl Worker {
    fn run(mut self) {
        let mut pause = None;
        loop {
            // What happens from here on rings again, so nothing is missed between looking and sleeping.
            self.drain();
            let (orders, stop) = {
                let desk = self.shared.desk.lock();
                (desk.orders, desk.stop)
            };
            let settled = self.settle().unwrap_or_else(|error| {
                tracing::warn!(error = chain(&error), "cannot look at the interfaces");
                false
            });
            self.shared.desk.lock().done = orders;
            self.shared.changed.notify_all();
            if stop {
                return;
            }
            pause = match pause {
                _ if settled => None,
                None => Some(FIRST_RETRY),
                Some(pause) => Some((2 * pause).min(LAST_RETRY)),
            };
            self.sleep(pause);
        }
    }

    /// Compares and changes until there is nothing left to change; whether it came to that.
    fn settle(&mut self) -> Result<bool> {
        for _ in 0..PASSES {
            if self.pass()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// One comparison of what is wanted with what is there, and what follows from it. Whether nothing did.
    fn pass(&mut self) -> Result<bool> {
        let joins: Vec<Join> =
            self.shared.desk.lock().joins.values().map(|wanted| wanted.join.clone()).collect();
        let seen = join::snapshot(&mut self.socket, &joins)?;
        let wanted = join::wanted(&joins, &seen.links);
        let all: BTreeSet<_> = wanted.iter().flat_map(|(_, facts)| facts).cloned().collect();
        let mut changes = Vec::new();
        for change in join::changes(&all, &seen.facts) {
            let error = match join::apply(&mut self.socket, &seen.links, &change) {
                Ok(()) => {
                    tracing::debug!(%change, "joins");
                    None
                }
                Err(error) => {
                    tracing::debug!(%change, error = chain(&error), "joins");
                    Some(chain(&error))
                }
            };
            changes.push((change, error));
        }
        let mut desk = self.shared.desk.lock();
        for (join, facts) in wanted {
            let Some(entry) = desk.joins.get_mut(&join.near).filter(|entry| entry.join == *join) else {
                continue;
            };
            let mut missing = changes
                .iter()
                .filter(|(change, _)| matches!(change, join::Change::Add(fact) if facts.contains(fact)))
                .peekable();
            let state = match (join.is_ready(&seen.links), missing.peek().is_some()) {
                (false, _) => State::Waiting,
                (true, false) => State::Joined,
                (true, true) => match missing.find_map(|(_, error)| error.clone()) {
                    Some(error) => State::Failed(error),
                    // The next pass tells.
                    None => continue,
                },
            };
            if entry.state != state {
                match state {
                    State::Failed(_) => tracing::warn!(%join, %state, "join"),
                    _ => tracing::info!(%join, %state, "join"),
                }
                entry.state = state;
            }
        }
        // A found join whose interfaces are gone was nobody's after all.
        let before = desk.joins.len();
        desk.joins.retain(|_, wanted| !wanted.found || wanted.join.is_ready(&seen.links));
        Ok(changes.is_empty() && desk.joins.len() == before)
    }

    fn sleep(&self, timeout: Option<Duration>) {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut wait = [PollFd::new(&self.ear, PollFlags::IN), PollFd::new(&self.shared.bell, PollFlags::IN)];
        // An interruption only makes it look once more.
        if let Err(e) = poll(&mut wait, timeout.as_ref())
            && e != Errno::INTR
        {
            tracing::error!(error = %io::Error::from(e), "cannot sleep");
            thread::sleep(LAST_RETRY);
        }
    }

    /// Takes all notifications off; what they say is looked up anyway. Lost ones (ENOBUFS) are as good.
    fn drain(&self) {
        let mut buffer = [0u8; 8192];
        while let Ok(_) | Err(Errno::NOBUFS | Errno::INTR) =
            rustix::net::recv(&self.ear, &mut buffer, RecvFlags::TRUNC)
        {}
        let _ = rustix::io::read(&self.shared.bell, &mut buffer[..8]);
    }
}

/// An error with its causes.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
