//! Where a request goes next.

use std::{fmt, sync::Arc};

use nsm_api::{path, pb::connection::Connection};
use nsm_transport::{DialTarget, DialUrl, FileId};

use crate::inside::Inside;

/// A neighbour: how to reach it, and what tells it from others.
#[derive(Debug, Clone)]
pub struct NextHop {
    way: Way,
    /// What tells it from others.
    name: Arc<str>,
    /// What people call it.
    called: Option<Arc<str>>,
    /// Who has its place, if what it keeps outlives its process.
    holders: Option<Arc<dyn Holders>>,
}

/// Knows who has the place of a hop at present.
pub trait Holders: Send + Sync + fmt::Debug {
    /// Where the hop of this name is; `None`: nowhere at this moment.
    fn now(&self, called: &str) -> Option<DialTarget>;
}

/// A hop by its place in the mesh: for one that outlives its process, whichever process has it.
#[derive(Debug, Clone)]
pub(crate) struct Place(pub NextHop);

/// How a neighbour is reached.
#[derive(Debug, Clone)]
pub(crate) enum Way {
    /// It is dialled.
    Dial(DialTarget),
    /// It is in this process.
    Inside(Arc<Inside>),
}

impl NextHop {
    /// A hop of this process.
    #[must_use]
    pub fn inside(hop: Arc<Inside>) -> Self {
        let name = format!("{} in this process", hop.name());
        Self { way: Way::Inside(hop), name: name.into(), called: None, holders: None }
    }

    /// How to reach it.
    pub(crate) fn way(&self) -> &Way {
        &self.way
    }

    /// Tells people who is meant: an address alone seldom does.
    #[must_use]
    pub fn called(mut self, name: &str) -> Self {
        self.called = Some(name.into());
        self
    }

    /// What it keeps outlives its process: whoever has the place of this name at present has it. So a forwarder finds the
    /// wires of the process before it.
    #[must_use]
    pub fn lasting(self, name: &str, holders: Arc<dyn Holders>) -> Self {
        Self { holders: Some(holders), ..self.called(name) }
    }

    /// Who has its place now; itself, where nobody has, or nobody can take it.
    pub(crate) fn now(&self) -> Self {
        let Some(target) = self.held().and_then(|(name, holders)| holders.now(name)) else {
            return self.clone();
        };
        let Self { way, name, .. } = Self::from(target);
        Self { way, name, ..self.clone() }
    }

    /// Whether what it keeps outlives its process.
    pub(crate) fn lasts(&self) -> bool {
        self.held().is_some()
    }

    fn held(&self) -> Option<(&str, &dyn Holders)> {
        Some((self.called.as_deref()?, &**self.holders.as_ref()?))
    }

    /// Whether both have the same place.
    pub(crate) fn is_at(&self, other: &Self) -> bool {
        match (self.held(), other.held()) {
            (Some((name, _)), Some((others, _))) => name == others,
            _ => self == other,
        }
    }

    /// Whether it may be where this connection went before: a hop behind us, or the endpoint, is called as it is.
    pub(crate) fn may_know(&self, conn: &Connection) -> bool {
        let behind = path::segments(conn).iter().skip(path::index(conn) + 1);
        path::goes_on(conn)
            && self.called.as_deref().is_none_or(|called| behind.clone().any(|hop| hop.name == called))
    }

    /// Whether somebody may be there later where nobody is now: a socket file is its process's.
    pub(crate) fn may_come_back(&self) -> bool {
        self.lasts() || matches!(self.way, Way::Dial(DialTarget::Url(_)))
    }

    /// Whether people call it that.
    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        self.called.as_deref() == Some(name)
    }

    /// Whether both may be the same endpoint: several may be reached over one neighbour.
    pub(crate) fn may_be(&self, other: &Self) -> bool {
        self.is_at(other) && (self.called == other.called || self.called.is_none() || other.called.is_none())
    }

    /// Whether it is on this node: descriptors can be handed over, and wires need no tunnel.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match &self.way {
            Way::Dial(target) => matches!(target, DialTarget::Socket(_) | DialTarget::Url(DialUrl::Unix(_))),
            Way::Inside(_) => true,
        }
    }
}

impl<T: Into<DialTarget>> From<T> for NextHop {
    fn from(target: T) -> Self {
        let target = target.into();
        let name = match &target {
            DialTarget::Url(url) => url.to_string(),
            // A socket file is known by what it is: names below /proc/PID/fd are reused.
            DialTarget::Socket(fd) => FileId::of(fd).map_or_else(
                |error| format!("a socket that cannot be examined ({error})"),
                |id| format!("socket inode://{}/{}", id.dev, id.ino),
            ),
        };
        Self { way: Way::Dial(target), name: name.into(), called: None, holders: None }
    }
}

impl PartialEq for NextHop {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for NextHop {}

impl std::hash::Hash for NextHop {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        self.0.is_at(&other.0)
    }
}

impl Eq for Place {}

impl std::hash::Hash for Place {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        match self.0.held() {
            Some((name, _)) => name.hash(state),
            None => self.0.hash(state),
        }
    }
}

impl fmt::Display for NextHop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.called {
            Some(called) => write!(f, "{called} ({})", self.name),
            None => f.write_str(&self.name),
        }
    }
}
