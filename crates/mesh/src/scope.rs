//! What one connection holds at this hop: leases, each of which knows its release.

use std::{any::Any, fmt, time::Duration};

use async_trait::async_trait;
use nsm_api::pb::connection::Connection;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{chain::Afterwards, error::Error};

/// Something that was acquired for a connection and has to be given back.
#[async_trait]
pub trait Lease: Any + Send + Sync + fmt::Debug {
    /// Short and stable, for logs.
    fn name(&self) -> &'static str;

    /// Gives it back. Called once, newest lease first.
    ///
    /// # Errors
    /// What could not be given back; the release of the others goes on.
    async fn release(self: Box<Self>, cx: &Release) -> Result<(), Error>;
}

/// Why and until when leases are released.
#[derive(Debug)]
pub struct Release {
    /// Why.
    pub reason: Reason,
    /// How long a release may talk to others.
    pub deadline: Instant,
    /// The Close message, if one came: its path has fresh tokens.
    pub close: Option<Connection>,
    /// What is begun when the request is over that asks for the connection anew, if there is one.
    pub anew: Option<Mutex<Afterwards>>,
}

impl Release {
    /// How long a release may talk to neighbours when no caller's deadline bounds it.
    pub const TIME: Duration = Duration::from_secs(5);

    /// A release from the inside, without a Close message.
    #[must_use]
    pub fn now(reason: Reason) -> Self {
        Self { reason, deadline: Instant::now() + Self::TIME, close: None, anew: None }
    }
}

/// Why a connection, or what a failed request had acquired, ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The request that acquired it failed.
    Failed,
    /// The client closed the connection.
    Closed,
    /// The client's token expired: nobody on the path may speak for it any more, each hop clears for itself.
    Expired,
    /// The client wants another endpoint.
    Reselect,
    /// A namespace or neighbour of the connection is gone.
    Gone,
    /// The network service does not lead to the connection's endpoint any more.
    Unmatched,
    /// This process ends.
    Shutdown,
}

/// Everything one connection holds, in the order it was acquired.
#[derive(Debug, Default)]
pub struct Scope {
    leases: Vec<(Mark, Box<dyn Lease>)>,
    next: u64,
}

/// A point in the life of a scope: what was leased since can be given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

impl Scope {
    /// Keeps a lease until the connection ends, or until the request that acquired it fails.
    pub fn lease(&mut self, lease: impl Lease) {
        self.leases.push((Mark(self.next), Box::new(lease)));
        self.next += 1;
    }

    /// What an earlier request of this connection leased, if it did.
    #[must_use]
    pub fn get<T: Lease>(&self) -> Option<&T> {
        self.leases.iter().rev().find_map(|(_, lease)| (&**lease as &dyn Any).downcast_ref())
    }

    /// The same, to be brought up to date.
    pub fn get_mut<T: Lease>(&mut self) -> Option<&mut T> {
        self.leases.iter_mut().rev().find_map(|(_, lease)| (&mut **lease as &mut dyn Any).downcast_mut())
    }

    /// Takes a lease out, to be released or replaced by the caller.
    pub fn take<T: Lease>(&mut self) -> Option<Box<T>> {
        let at = self.leases.iter().rposition(|(_, lease)| (&**lease as &dyn Any).is::<T>())?;
        (self.leases.remove(at).1 as Box<dyn Any>).downcast().ok()
    }

    /// Now: everything leased later can be given back by [`Scope::unwind_to`].
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(self.next)
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Gives everything back, newest first.
    pub async fn unwind(&mut self, cx: &Release) -> Vec<Error> {
        self.unwind_to(Mark(0), cx).await
    }

    /// Gives back, newest first, everything leased since `mark`. What fails is collected, not lost, and stops nobody.
    pub async fn unwind_to(&mut self, mark: Mark, cx: &Release) -> Vec<Error> {
        let mut errors = Vec::new();
        while let Some((_, lease)) = self.leases.pop_if(|(leased, _)| *leased >= mark) {
            let name = lease.name();
            if let Err(error) = lease.release(cx).await {
                tracing::warn!(lease = name, reason = ?cx.reason, %error, "could not be released");
                errors.push(error);
            }
        }
        errors
    }
}
