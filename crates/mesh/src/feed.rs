//! What one watcher is told: each event in order as long as he keeps up, and from then on, until he has caught up, the
//! last of each connection. Nobody is cut off because much happens at once: he would take everything to be lost.

use std::{collections::BTreeMap, sync::Arc};

use nsm_api::pb::connection::ConnectionEvent;
use parking_lot::Mutex;
use tokio::sync::mpsc::{self, error::TrySendError};

/// Events that wait in order.
pub(crate) const LAG: usize = 256;
/// Connections that have come and gone while a watcher did not read, before he is cut off.
pub(crate) const BEHIND: usize = 4096;
/// Connections in one event: a few hundred kilobytes, below what a gRPC message may hold (4 MiB).
pub(crate) const TOGETHER: usize = 128;

type Event = Arc<ConnectionEvent>;

/// The sending half.
pub(crate) struct Feed {
    events: mpsc::Sender<Event>,
    behind: Arc<Mutex<Behind>>,
}

/// What could not be sent yet.
#[derive(Default)]
struct Behind {
    /// The last event of each connection.
    last: BTreeMap<String, Event>,
    cut: bool,
}

/// Why nothing more is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    Gone,
    TooSlow,
}

impl Feed {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(LAG);
        (Self { events, behind: Arc::default() }, receiver)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Tells, now or later. A watcher who is behind with more than so many connections is cut off.
    pub(crate) fn tell(&self, event: Event, most: usize) -> Result<(), Ended> {
        let mut behind = self.behind.lock();
        if behind.last.is_empty() {
            match self.events.try_send(event) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Closed(_)) => return Err(Ended::Gone),
                Err(TrySendError::Full(event)) => behind.add(&event),
            }
            tokio::spawn(catch_up(self.events.clone(), Arc::clone(&self.behind)));
        } else if self.is_closed() {
            return Err(Ended::Gone);
        } else {
            behind.add(&event);
        }
        if behind.last.len() <= most {
            return Ok(());
        }
        *behind = Behind { cut: true, ..Behind::default() };
        Err(Ended::TooSlow)
    }
}

impl Behind {
    fn add(&mut self, event: &Event) {
        self.last.extend(event.connections.keys().map(|id| (id.clone(), Arc::clone(event))));
    }

    /// Some of what waits, in one event of its kind.
    fn some(&mut self) -> Option<Event> {
        let kind = self.last.first_key_value()?.1.r#type;
        let alike = self.last.iter().filter(|(_, event)| event.r#type == kind).take(TOGETHER);
        let ids: Vec<String> = alike.map(|(id, _)| id.clone()).collect();
        let connections = ids.into_iter().filter_map(|id| {
            let event = self.last.remove(&id)?;
            Some((id.clone(), event.connections.get(&id)?.clone()))
        });
        Some(Arc::new(ConnectionEvent { r#type: kind, connections: connections.collect() }))
    }
}

/// Sends what waits whenever there is room, until nothing does.
async fn catch_up(events: mpsc::Sender<Event>, behind: Arc<Mutex<Behind>>) {
    while let Ok(room) = events.reserve().await {
        let mut behind = behind.lock();
        match behind.some() {
            Some(event) if !behind.cut => room.send(event),
            _ => return,
        }
        // Under the lock: whatever is told from now on finds nothing that waits, and goes behind what was sent.
        if behind.last.is_empty() {
            return;
        }
    }
}
