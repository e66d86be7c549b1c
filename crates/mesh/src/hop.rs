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
}

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
        Self { way: Way::Inside(hop), name: name.into(), called: None }
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

    /// Whether it may be where this connection went before: a hop behind us, or the endpoint, is called as it is.
    pub(crate) fn may_know(&self, conn: &Connection) -> bool {
        let behind = path::segments(conn).iter().skip(path::index(conn) + 1);
        path::goes_on(conn)
            && self.called.as_deref().is_none_or(|called| behind.clone().any(|hop| hop.name == called))
    }

    /// Whether somebody may be there later where nobody is now: a socket file is its process's.
    pub(crate) fn may_come_back(&self) -> bool {
        matches!(self.way, Way::Dial(DialTarget::Url(_)))
    }

    /// Whether people call it that.
    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        self.called.as_deref() == Some(name)
    }

    /// Whether both may be the same endpoint: several may be reached over one neighbour.
    pub(crate) fn may_be(&self, other: &Self) -> bool {
        self == other && (self.called == other.called || self.called.is_none() || other.called.is_none())
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
        Self { way: Way::Dial(target), name: name.into(), called: None }
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

impl fmt::Display for NextHop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.called {
            Some(called) => write!(f, "{called} ({})", self.name),
            None => f.write_str(&self.name),
        }
    }
}
