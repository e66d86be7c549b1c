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
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::desk::Desk;
use crate::error::{Error, Result};
use crate::join::{self, Join};
use crate::netlink::{Route as Rt, Socket};
use crate::sync::Bell;

/// Keeps interfaces joined until it is stopped. Dropped without that it leaves them joined, as a crash does.
#[derive(Debug)]
pub struct Joiner {
    desk: Arc<Desk<Joins>>,
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

/// By the near interface.
type Joins = BTreeMap<String, Wanted>;

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
        let bell = Bell::new().map_err(|source| Error::Socket { what: "make a wake-up call", source })?;
        let mut socket = Socket::open()?;
        let found = join::joins(&join::snapshot(&mut socket, [])?);
        let mut joins = Joins::default();
        for join in found {
            tracing::info!(%join, "found a join");
            let wanted = Wanted { join, state: State::Waiting, found: true };
            joins.insert(wanted.join.near.clone(), wanted);
        }
        let desk = Arc::new(Desk::new(joins, bell));
        let worker = Worker { desk: Arc::clone(&desk), socket, ear };
        let thread = thread::Builder::new()
            .name("joiner".into())
            .spawn(move || worker.run())
            .map_err(|source| Error::Socket { what: "start its thread", source })?;
        Ok(Self { desk, thread: Some(thread) })
    }

    /// Asks for a join, or for another form of the one that this near interface is in. It comes about when both
    /// interfaces are there.
    pub fn want(&self, join: Join) {
        self.desk.order(|joins| match joins.get_mut(&join.near) {
            Some(wanted) if wanted.join == join => {
                wanted.found = false;
                false
            }
            _ => {
                let wanted = Wanted { join, state: State::Waiting, found: false };
                joins.insert(wanted.join.near.clone(), wanted);
                true
            }
        });
    }

    /// Undoes the join of this near interface.
    pub fn forget(&self, near: &str) {
        self.desk.order(|joins| joins.remove(near).is_some());
    }

    /// The joins that there are or shall be, found ones included.
    pub fn joins(&self) -> Vec<Join> {
        self.desk.look(|joins| joins.values().map(|wanted| wanted.join.clone()).collect())
    }

    /// How far the join of this near interface is; `None`: nobody wants it.
    pub fn state(&self, near: &str) -> Option<State> {
        self.desk.look(|joins| joins.get(near).map(|wanted| wanted.state.clone()))
    }

    /// Waits until the join of this near interface is in that state (`None`: forgotten, and gone from the kernel).
    /// Whether it came to that.
    pub fn wait(&self, near: &str, state: Option<&State>, timeout: Duration) -> bool {
        self.desk.wait(|joins| joins.get(near).map(|wanted| &wanted.state) == state, timeout)
    }

    /// Undoes all joins and ends.
    pub fn stop(mut self) {
        self.desk.order(|joins| {
            joins.clear();
            true
        });
        self.end();
    }

    fn end(&mut self) {
        self.desk.stop();
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
    desk: Arc<Desk<Joins>>,
    socket: Socket<Rt>,
    ear: netlink_sys::Socket,
}

impl Worker {
    fn run(mut self) {
        let mut pause = None;
        loop {
            // As of orders, nothing is missed between looking and sleeping.
            self.drain();
            let errand = self.desk.begin();
            let settled = self.settle().unwrap_or_else(|error| {
                tracing::warn!(error = chain(&error), "cannot look at the interfaces");
                false
            });
            self.desk.done(errand);
            if errand.stop {
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
            self.desk.look(|joins| joins.values().map(|wanted| wanted.join.clone()).collect());
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
        self.desk.look(|there| {
            for (join, facts) in wanted {
                let Some(entry) = there.get_mut(&join.near).filter(|entry| entry.join == *join) else {
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
            let before = there.len();
            there.retain(|_, wanted| !wanted.found || wanted.join.is_ready(&seen.links));
            Ok(changes.is_empty() && there.len() == before)
        })
    }

    fn sleep(&self, timeout: Option<Duration>) {
        if let Err(error) = self.desk.bell().wait(&[self.ear.as_fd()], timeout) {
            tracing::error!(%error, "cannot sleep");
            thread::sleep(LAST_RETRY);
        }
    }

    /// Takes all notifications off; what they say is looked up anyway. Lost ones (ENOBUFS) are as good.
    fn drain(&self) {
        let mut buffer = [0u8; 8192];
        while let Ok(_) | Err(Errno::NOBUFS | Errno::INTR) =
            rustix::net::recv(&self.ear, &mut buffer, RecvFlags::TRUNC)
        {}
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
