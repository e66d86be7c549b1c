//! Who wants to know how connections fare: the `MonitorConnection` service and those who follow it
//! (spec/control-plane.md section 9).
//!
//! [`Hub`] holds what this hop knows and tells its watchers; [`follow`] translates what the next hop tells into
//! events of this one. Matching and translation are pure.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};

use async_trait::async_trait;
use nsm_api::{
    path,
    pb::{
        connection::{Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, State},
        networkservice::NetworkServiceRequest,
    },
};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::{
    chain::{Context, Element, Next},
    error::{Error, Result},
    scope::{Lease, Release},
};

/// Events that a watcher may lag behind before it is cut off: it is not buffered for without end.
const LAG: usize = 1024;
/// Watchers of one process.
const MAX_WATCHERS: usize = 4096;

/// Whether a connection is in a selector's scope (section 9.1).
#[must_use]
pub fn matches(selector: &MonitorScopeSelector, conn: &Connection) -> bool {
    let services = &selector.network_services;
    if !services.is_empty() && !services.contains(&conn.network_service) {
        return false;
    }
    let wanted = &selector.path_segments;
    let agrees = |want: &str, is: &str| want.is_empty() || want == is;
    wanted.is_empty()
        || path::segments(conn).windows(wanted.len()).any(|window| {
            window.iter().zip(wanted).all(|(is, want)| {
                agrees(&want.name, &is.name) && agrees(&want.id, &is.id) && agrees(&want.token, &is.token)
            })
        })
}

/// What an event of the next hop means for our connection `mine` (section 9.3); `None`: nothing new.
#[must_use]
pub fn follow(mine: &Connection, theirs: &Connection, kind: ConnectionEventType) -> Option<Connection> {
    let i = path::index(mine);
    let their_segments = path::segments(theirs);
    if their_segments.len() <= i || their_segments[i].id != mine.id {
        return None;
    }
    let their_index = path::index(theirs);
    if their_index != i && their_index != i + 1 {
        return None;
    }
    if kind == ConnectionEventType::InitialStateTransfer && theirs.state == mine.state {
        return None;
    }
    let mut event = Connection {
        path: theirs.path.clone(),
        context: theirs.context.clone(),
        state: theirs.state,
        ..mine.clone()
    };
    if let Some(path) = &mut event.path {
        path.index = i as u32;
    }
    if kind == ConnectionEventType::Delete {
        event.set_state(State::Down);
    }
    (event != *mine).then_some(event)
}

/// What this hop knows of its connections, and who watches.
#[derive(Default)]
pub struct Hub {
    state: Mutex<HubState>,
}

#[derive(Default)]
struct HubState {
    connections: HashMap<String, Connection>,
    watchers: Vec<Watcher>,
}

struct Watcher {
    selector: MonitorScopeSelector,
    events: mpsc::Sender<ConnectionEvent>,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("Hub")
            .field("connections", &state.connections.len())
            .field("watchers", &state.watchers.len())
            .finish()
    }
}

impl Hub {
    /// Watches what the selector names. The first event is the initial transfer, always, even when empty:
    /// upstream's clients wait for it.
    ///
    /// # Errors
    /// Too many watchers.
    pub fn watch(&self, selector: MonitorScopeSelector) -> Result<mpsc::Receiver<ConnectionEvent>> {
        let (events, receiver) = mpsc::channel(LAG);
        let mut state = self.state.lock();
        state.watchers.retain(|w| !w.events.is_closed());
        if state.watchers.len() >= MAX_WATCHERS {
            return Err(Error::new(
                tonic::Code::ResourceExhausted,
                format!("{MAX_WATCHERS} streams watch this process already"),
            ));
        }
        let connections = state
            .connections
            .iter()
            .filter(|(_, conn)| matches(&selector, conn))
            .map(|(id, conn)| (id.clone(), conn.clone()))
            .collect();
        let initial =
            ConnectionEvent { r#type: ConnectionEventType::InitialStateTransfer.into(), connections };
        // The channel is new and empty.
        let _ = events.try_send(initial);
        state.watchers.push(Watcher { selector, events });
        Ok(receiver)
    }

    /// Ends all streams: for a shutdown that does not wait for those who watch.
    pub fn end_watches(&self) {
        self.state.lock().watchers.clear();
    }

    /// What is known of a connection.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<Connection> {
        self.state.lock().connections.get(id).cloned()
    }

    /// All connections, as watchers see them.
    #[must_use]
    pub fn connections(&self) -> Vec<Connection> {
        self.state.lock().connections.values().cloned().collect()
    }

    /// A connection is new or has changed.
    pub fn update(&self, conn: Connection) {
        let mut state = self.state.lock();
        state.connections.insert(conn.id.clone(), conn.clone());
        state.tell(ConnectionEventType::Update, conn);
    }

    /// A connection is gone.
    pub fn delete(&self, id: &str) {
        let mut state = self.state.lock();
        if let Some(conn) = state.connections.remove(id) {
            state.tell(ConnectionEventType::Delete, conn);
        }
    }

    /// A next hop told something.
    pub fn followed(&self, event: &ConnectionEvent) {
        let mut state = self.state.lock();
        for theirs in event.connections.values() {
            // Ours is the segment that the event is at, or the one left of it.
            let index = path::index(theirs);
            for i in [Some(index), index.checked_sub(1)].into_iter().flatten() {
                let Some(segment) = path::segments(theirs).get(i) else { continue };
                let Some(mine) = state.connections.get(&segment.id) else { continue };
                if let Some(news) = follow(mine, theirs, event.r#type()) {
                    state.connections.insert(news.id.clone(), news.clone());
                    state.tell(ConnectionEventType::Update, news);
                }
            }
        }
    }

    /// The next hop of these connections is lost: DOWN travels hop by hop towards the clients.
    pub fn lost<'a>(&self, ids: impl IntoIterator<Item = &'a String>) {
        let mut state = self.state.lock();
        for id in ids {
            let Some(mine) = state.connections.get_mut(id) else { continue };
            if mine.state() != State::Down {
                mine.set_state(State::Down);
                let news = mine.clone();
                state.tell(ConnectionEventType::Update, news);
            }
        }
    }
}

impl HubState {
    fn tell(&mut self, kind: ConnectionEventType, conn: Connection) {
        self.watchers.retain(|watcher| {
            if !matches(&watcher.selector, &conn) {
                return true;
            }
            let event = ConnectionEvent {
                r#type: kind.into(),
                connections: BTreeMap::from([(conn.id.clone(), conn.clone())]),
            };
            // Full: the watcher reads too slowly and is cut off; it comes back and gets the state anew.
            watcher.events.try_send(event).is_ok()
        });
    }
}

/// Publishes what becomes of each connection at this hop, and cuts the path of a terminating hop behind itself
/// (section 4.3).
#[derive(Debug)]
pub struct Monitor {
    /// Where it is published.
    pub hub: Arc<Hub>,
    /// Whether the chain ends here (an endpoint): stale hops behind it are cut.
    pub terminates: bool,
}

#[derive(Debug)]
struct Published {
    hub: Arc<Hub>,
    id: String,
}

#[async_trait]
impl Lease for Published {
    fn name(&self) -> &'static str {
        "monitor"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        self.hub.delete(&self.id);
        Ok(())
    }
}

#[async_trait]
impl Element for Monitor {
    fn name(&self) -> &'static str {
        "monitor"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let known = cx.scope.get::<Published>().is_some();
        let asked = request.connection.clone().unwrap_or_default();
        if !known {
            // Leased before what follows: it is told last, when the wire is gone.
            cx.scope.lease(Published { hub: Arc::clone(&self.hub), id: asked.id.clone() });
        }
        match next.request(cx, request).await {
            Ok(mut conn) => {
                if self.terminates {
                    path::trim(&mut conn);
                }
                conn.set_state(State::Up);
                self.hub.update(conn.clone());
                Ok(conn)
            }
            Err(error) => {
                if known {
                    self.hub.update(Connection { state: State::Down.into(), ..asked });
                }
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connection::{Path, PathSegment};

    use super::*;

    fn conn(index: u32, segments: &[(&str, &str)]) -> Connection {
        Connection {
            id: segments[index as usize].1.into(),
            network_service: "svc".into(),
            path: Some(Path {
                index,
                path_segments: segments
                    .iter()
                    .map(|(name, id)| PathSegment {
                        name: (*name).into(),
                        id: (*id).into(),
                        ..PathSegment::default()
                    })
                    .collect(),
            }),
            ..Connection::default()
        }
    }

    fn selector(segments: &[(&str, &str)], services: &[&str]) -> MonitorScopeSelector {
        MonitorScopeSelector {
            path_segments: conn_segments(segments),
            network_services: services.iter().map(|s| (*s).into()).collect(),
        }
    }

    fn conn_segments(segments: &[(&str, &str)]) -> Vec<PathSegment> {
        segments
            .iter()
            .map(|(name, id)| PathSegment {
                name: (*name).into(),
                id: (*id).into(),
                ..PathSegment::default()
            })
            .collect()
    }

    const PATH: &[(&str, &str)] = &[("nsc", "nsc-0"), ("mgr", "u1"), ("fwd", "u2")];

    #[test]
    fn selectors_match_contiguous_segments_with_wildcards() {
        let c = conn(1, PATH);
        assert!(matches(&selector(&[], &[]), &c));
        assert!(matches(&selector(&[("nsc", "nsc-0")], &["svc"]), &c));
        assert!(matches(&selector(&[("", "nsc-0"), ("mgr", "")], &[]), &c));
        assert!(!matches(&selector(&[("nsc", ""), ("fwd", "")], &[]), &c));
        assert!(!matches(&selector(&[], &["other"]), &c));
        assert!(!matches(&selector(&[("", ""); 4], &[]), &c));
    }

    #[tokio::test]
    async fn watchers_get_the_state_first_and_then_what_changes() {
        let hub = Hub::default();
        let mut empty = hub.watch(selector(&[("nsc", "")], &[])).unwrap();
        assert!(empty.recv().await.unwrap().connections.is_empty());
        hub.update(conn(1, PATH));
        let event = empty.recv().await.unwrap();
        assert_eq!((event.r#type(), event.connections.len()), (ConnectionEventType::Update, 1));
        let mut late = hub.watch(selector(&[], &[])).unwrap();
        assert_eq!(late.recv().await.unwrap().connections.keys().collect::<Vec<_>>(), ["u1"]);
        hub.delete("u1");
        assert_eq!(late.recv().await.unwrap().r#type(), ConnectionEventType::Delete);
        hub.delete("u1");
        drop(hub);
        assert!(late.recv().await.is_none(), "a deletion is told once");
    }

    #[tokio::test]
    async fn a_slow_watcher_is_cut_off() {
        let hub = Hub::default();
        let mut slow = hub.watch(selector(&[], &[])).unwrap();
        for _ in 0..=LAG {
            hub.update(conn(1, PATH));
        }
        let mut seen = 0;
        while slow.recv().await.is_some() {
            seen += 1;
        }
        assert_eq!(seen, LAG, "what was buffered, then the end");
    }

    #[test]
    fn what_the_next_hop_says_is_translated() {
        let mine = conn(1, PATH);
        let mut theirs = conn(2, PATH);
        theirs.set_state(State::Down);
        let news = follow(&mine, &theirs, ConnectionEventType::Update).unwrap();
        assert_eq!((news.id.as_str(), path::index(&news), news.state()), ("u1", 1, State::Down));
        assert_eq!(follow(&mine, &conn(2, PATH), ConnectionEventType::InitialStateTransfer), None);
        assert_eq!(follow(&mine, &conn(2, PATH), ConnectionEventType::Delete).unwrap().state(), State::Down);
        assert_eq!(
            follow(
                &mine,
                &conn(2, &[("nsc", "nsc-0"), ("mgr", "u9"), ("fwd", "u2")]),
                ConnectionEventType::Delete
            ),
            None
        );
        let far = conn(3, &[("nsc", "nsc-0"), ("mgr", "u1"), ("fwd", "u2"), ("nse", "u3")]);
        assert_eq!(
            follow(&mine, &far, ConnectionEventType::Delete),
            None,
            "only from the own or the next hop"
        );
    }

    #[tokio::test]
    async fn a_lost_neighbour_is_down_once() {
        let hub = Hub::default();
        hub.update(conn(1, PATH));
        let mut watcher = hub.watch(selector(&[], &[])).unwrap();
        watcher.recv().await;
        hub.lost(&["u1".into(), "unknown".into()]);
        hub.lost(&["u1".into()]);
        assert_eq!(watcher.recv().await.unwrap().connections["u1"].state(), State::Down);
        assert!(watcher.try_recv().is_err());
    }
}
