//! Tells when a file may have changed, without looking at it all the time.

use std::{io, os::fd::OwnedFd, path::Path, time::Duration};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::{io::unix::AsyncFd, time::sleep};
use tracing::debug;

use crate::readable::readable;

/// How often the file is looked at where the kernel cannot tell that it changed.
const LOOK: Duration = Duration::from_secs(1);

/// Watches a file's directory by inotify, because editors and operators replace files.
#[derive(Debug)]
pub struct FileWatch(Option<AsyncFd<OwnedFd>>);

impl FileWatch {
    /// Needs a runtime.
    #[must_use]
    pub fn new(file: &Path) -> Self {
        let dir = match file.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        Self(watch(dir).inspect_err(|reason| debug!(%reason, "no inotify: the file is polled")).ok())
    }

    /// Ends when the file may have changed. May be dropped.
    pub async fn maybe_changed(&self) {
        let Some(inotify) = &self.0 else { return sleep(LOOK).await };
        let Ok(mut ready) = inotify.readable().await else { return sleep(LOOK).await };
        // The caller compares the file itself; the events are only drained.
        let mut events = [0; 4096];
        while rustix::io::read(inotify, &mut events).is_ok_and(|read| read > 0) {}
        ready.clear_ready();
    }
}

fn watch(dir: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let gone = WatchFlags::MOVED_FROM | WatchFlags::DELETE;
    inotify::add_watch(&fd, dir, WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO | gone)?;
    readable(fd)
}
