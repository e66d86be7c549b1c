//! Objects at an API server, followed: read, and then told of whatever happens to them.

use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use kube::core::WatchEvent;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

use crate::objects::{ApiError, Objects, escaped};

/// Pauses while the API server is away, or does not let us.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long a watch lasts; then the next goes on where it was. The API server ends it.
const WATCH: Duration = Duration::from_secs(290);
/// How much later than it should end a watch is taken for dead.
const LATE: Duration = Duration::from_secs(30);

/// What is heard of objects.
#[derive(Debug)]
pub(crate) enum Heard {
    /// These are all there are.
    All(Vec<Value>),
    /// It is like this by now.
    Is(Value),
    /// It was like this, and is gone.
    Gone(Value),
}

/// The object that a line of a watch tells of, if it tells of one.
#[doc(hidden)]
pub fn object_of(line: &[u8]) -> Option<Value> {
    match serde_json::from_slice(line).ok()? {
        WatchEvent::Added(object) | WatchEvent::Modified(object) | WatchEvent::Deleted(object) => {
            Some(object)
        }
        WatchEvent::Bookmark(_) | WatchEvent::Error(_) => None,
    }
}

/// Follows the objects at a path.
#[derive(Debug)]
pub(crate) struct Follower {
    api: Objects,
    what: &'static str,
    /// With a query, of which more may be said.
    path: String,
    /// Where to go on.
    version: Option<String>,
}

impl Follower {
    /// `path` is that of a collection; `query` narrows it, and may be empty. `what` is for errors.
    pub(crate) fn new(api: Objects, what: &'static str, path: &str, query: &str) -> Self {
        Self { api, what, path: format!("{path}?{query}"), version: None }
    }

    /// Reads them all.
    ///
    /// # Errors
    /// They are not told.
    pub(crate) async fn read(&mut self) -> Result<Heard, ApiError> {
        let mut list = self.api.get(self.what, &self.path).await?;
        self.version = list["metadata"]["resourceVersion"].as_str().map(str::to_owned);
        Ok(Heard::All(list["items"].as_array_mut().map(std::mem::take).unwrap_or_default()))
    }

    /// Follows them from where it is, and reads them first where it is nowhere; does not end.
    pub(crate) async fn run(mut self, mut hear: impl FnMut(Heard)) {
        let (mut pause, mut said) = (PAUSES.0, false);
        loop {
            let began = Instant::now();
            let Err(error) = self.follow(&mut hear).await else {
                (pause, said) = (PAUSES.0, false);
                // One that ends again at once would be asked for without end.
                if began.elapsed() < PAUSES.0 {
                    sleep(PAUSES.0).await;
                }
                continue;
            };
            if error.code() == Some(410) {
                self.version = None;
            } else if !std::mem::replace(&mut said, true) {
                warn!(%error, "what happens to {} is not known as long as that is so", self.what);
            }
            debug!(%error, "the watch of {} ended", self.what);
            if began.elapsed() > PAUSES.1 {
                (pause, said) = (PAUSES.0, false);
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn follow(&mut self, hear: &mut impl FnMut(Heard)) -> Result<(), ApiError> {
        if self.version.is_none() {
            hear(self.read().await?);
        }
        let path = format!(
            "{}&watch=true&allowWatchBookmarks=true&timeoutSeconds={}&resourceVersion={}",
            self.path,
            WATCH.as_secs(),
            escaped(self.version.as_deref().unwrap_or_default())
        );
        let mut events = self.api.watch(self.what, &path).await?.boxed();
        let end = Instant::now() + WATCH + LATE;
        while let Ok(event) = timeout(end - Instant::now(), events.try_next()).await {
            let Some(event) = event? else { break };
            let (object, gone) = match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => (object, false),
                WatchEvent::Deleted(object) => (object, true),
                WatchEvent::Bookmark(mark) => {
                    self.version = Some(mark.metadata.resource_version);
                    continue;
                }
                // Most often: that it does not remember so much.
                WatchEvent::Error(_) => {
                    self.version = None;
                    break;
                }
            };
            self.version = object["metadata"]["resourceVersion"].as_str().map(str::to_owned);
            hear(if gone { Heard::Gone(object) } else { Heard::Is(object) });
        }
        Ok(())
    }
}
