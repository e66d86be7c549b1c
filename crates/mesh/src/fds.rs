//! The open files behind `inode://` references (spec/control-plane.md section 12).
//!
//! Inside a process a message keeps its `inode://` URLs; the descriptors travel beside it in a [`Fds`], and
//! only as long as the request: an open descriptor of a pod's namespace would keep a dead pod's namespace
//! alive.

use std::{collections::BTreeMap, os::fd::OwnedFd, sync::Arc};

use nsm_api::{
    mechanism::InodeUrl,
    pb::{connection::Mechanism, networkservice::NetworkServiceRequest},
};
use nsm_transport::{FdError, FileId, Peer};
use tokio::time::Instant;

use crate::error::{Error, Result};

/// Descriptors by what they refer to.
#[derive(Debug, Clone, Default)]
pub struct Fds(BTreeMap<InodeUrl, Arc<OwnedFd>>);

impl Fds {
    /// The file that this URL refers to, if it came with the request.
    #[must_use]
    pub fn get(&self, url: InodeUrl) -> Option<&Arc<OwnedFd>> {
        self.0.get(&url)
    }

    /// Adds a file.
    pub fn insert(&mut self, url: InodeUrl, fd: Arc<OwnedFd>) {
        self.0.insert(url, fd);
    }

    /// All references.
    pub fn urls(&self) -> impl Iterator<Item = InodeUrl> {
        self.0.keys().copied()
    }

    /// Adds all of another.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Fetches the files that a message from `peer` refers to. Over TCP nothing can come, and nothing is waited
    /// for: the references of a remote mechanism mean nothing here.
    ///
    /// # Errors
    /// A reference of another form, or a descriptor that did not come within the deadline.
    pub async fn receive(
        &mut self,
        peer: &Peer,
        mechanisms: impl IntoIterator<Item = &Mechanism>,
        deadline: Instant,
    ) -> Result<()> {
        let Some(table) = peer.fds() else { return Ok(()) };
        for mechanism in mechanisms {
            // Other forms are left alone, as upstream does (section 12.5).
            let Ok(Some(url)) = mechanism.inode() else { continue };
            if self.0.contains_key(&url) {
                continue;
            }
            let file = FileId { dev: url.dev, ino: url.ino };
            let fd = table.take(file, deadline).await.map_err(|e| {
                let code = match e {
                    FdError::Late(_) => tonic::Code::DeadlineExceeded,
                    FdError::Unfit(_) => tonic::Code::InvalidArgument,
                    FdError::Closed(_) => tonic::Code::Unavailable,
                };
                Error::new(code, format!("a file announced by {}: {e}", peer.id()))
            })?;
            self.0.insert(url, Arc::new(fd));
        }
        Ok(())
    }

    /// Queues the file that a mechanism refers to, so that it travels no later than the next message to `peer`.
    pub fn send(&self, peer: &Peer, mechanism: &Mechanism) {
        let (Some(table), Ok(Some(url))) = (peer.fds(), mechanism.inode()) else { return };
        if let Some(fd) = self.0.get(&url) {
            table.send(Arc::clone(fd));
        }
    }
}

/// The mechanisms of a request: what is chosen and what is preferred.
pub fn mechanisms(request: &NetworkServiceRequest) -> impl Iterator<Item = &Mechanism> {
    let chosen = request.connection.as_ref().and_then(|c| c.mechanism.as_ref());
    request.mechanism_preferences.iter().chain(chosen)
}
