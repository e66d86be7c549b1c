//! One change at a time for each name, in the order of arrival; different names side by side.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use tokio::{sync::OwnedMutexGuard, time::Instant};

use crate::Error;

type Turn = Arc<tokio::sync::Mutex<()>>;

/// The queues. Clones share them; a name that nobody waits for costs nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lanes(Arc<Mutex<HashMap<String, Turn>>>);

/// The right to change what a name stands for, until it is dropped.
#[derive(Debug)]
pub(crate) struct Lane {
    lanes: Lanes,
    name: String,
    turn: Turn,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Lanes {
    /// Waits for the turn of a caller that gives up at `deadline`.
    pub(crate) async fn enter(&self, name: &str, deadline: Option<Instant>) -> Result<Lane, Error> {
        let turn = self.0.lock().entry(name.to_owned()).or_default().clone();
        // Made before waiting: a caller that gives up must leave nothing either.
        let mut lane = Lane { lanes: self.clone(), name: name.to_owned(), turn: turn.clone(), guard: None };
        lane.guard = Some(match deadline {
            None => turn.lock_owned().await,
            Some(at) => {
                let locked = tokio::time::timeout_at(at, turn.lock_owned()).await;
                locked.map_err(|_| Error::Deadline { name: name.to_owned() })?
            }
        });
        Ok(lane)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.lock().len()
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.guard = None;
        let mut lanes = self.lanes.0.lock();
        // Ours and the table's: turns are only cloned under this lock, so nobody waits.
        if Arc::strong_count(&self.turn) <= 2 {
            lanes.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test(start_paused = true)]
    async fn one_at_a_time_and_nothing_is_left() {
        let lanes = Lanes::default();
        let inside = Arc::new(AtomicUsize::new(0));
        let order = Arc::new(Mutex::new(vec![]));
        let held = lanes.enter("a", None).await.expect("free");
        let other = lanes.enter("b", None).await.expect("other names do not wait");
        let mut tasks = vec![];
        for i in 0..10 {
            let (lanes, inside, order) = (lanes.clone(), inside.clone(), order.clone());
            tasks.push(tokio::spawn(async move {
                let _lane = lanes.enter("a", None).await.expect("no deadline");
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                tokio::task::yield_now().await;
                inside.fetch_sub(1, Ordering::SeqCst);
                order.lock().push(i);
            }));
            tokio::task::yield_now().await;
        }
        let soon = Some(Instant::now() + std::time::Duration::from_secs(1));
        let late = lanes.enter("a", soon).await;
        assert!(matches!(late, Err(Error::Deadline { .. })));
        drop(held);
        for task in tasks {
            task.await.expect("ran");
        }
        assert_eq!(*order.lock(), (0..10).collect::<Vec<_>>());
        drop(other);
        assert_eq!(lanes.len(), 0);
    }
}
