//! What an earlier process of our name left at the manager: the wires of an init container, or of a client that was
//! killed. Whoever goes on with them changes nothing in the kernel (spec/control-plane.md 10.3).

use std::{collections::BTreeMap, time::Duration};

use futures::FutureExt as _;
use nsm_api::{
    mechanism::{InodeUrl, key},
    nsurl::NsUrl,
    path,
    pb::connection::{
        Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, PathSegment, State,
        monitor_connection_client::MonitorConnectionClient,
    },
};
use nsm_mesh::{Error, Result, error::explain};
use nsm_transport::{DialTarget, Pool};

/// Connections that a manager may tell of one id; more are not remembered.
const MAX_FOUND: usize = 64;

/// What the manager knows of the connections of one id, kept current as long as this lives.
#[derive(Debug)]
pub(crate) struct Predecessor {
    found: Found,
    events: tonic::Streaming<ConnectionEvent>,
}

impl Predecessor {
    /// Asks the manager; it answers at once, also when there is nothing.
    pub(crate) async fn ask(pool: &Pool, manager: &DialTarget, id: &str, dial: Duration) -> Result<Self> {
        let channel = pool.get(manager.clone(), dial).await.map_err(|e| Error::unavailable(explain(&e)))?;
        // The id alone: the name of its segment is the earlier process' own affair.
        let own = PathSegment { id: id.into(), ..PathSegment::default() };
        let selector = MonitorScopeSelector { path_segments: vec![own], ..MonitorScopeSelector::default() };
        let mut events =
            MonitorConnectionClient::new(channel).monitor_connections(selector).await?.into_inner();
        let mut found = Found::default();
        if let Some(event) = events.message().await? {
            found.hear(event);
        }
        Ok(Self { found, events })
    }

    /// The connection to go on with, as the manager sees it now.
    pub(crate) fn connection(&mut self, id: &str, url: &NsUrl, here: InodeUrl) -> Option<Connection> {
        // What has arrived, without waiting; a broken stream leaves what is known.
        while let Some(Ok(Some(event))) = self.events.message().now_or_never() {
            self.found.hear(event);
        }
        self.found.connection(id, url, here)
    }
}

#[derive(Debug, Default)]
struct Found(BTreeMap<String, Connection>);

impl Found {
    fn hear(&mut self, event: ConnectionEvent) {
        let gone = event.r#type() == ConnectionEventType::Delete;
        for (id, mut conn) in event.connections {
            if gone {
                conn.set_state(State::Down);
            }
            if self.0.len() < MAX_FOUND || self.0.contains_key(&id) {
                self.0.insert(id, conn);
            }
        }
    }

    /// One that we, as the hop before the manager, would have asked for: of our id, with the mechanism that is wanted.
    /// Beyond upstream it has to be the wanted service, and to end here: a pod that was made anew under its old name has
    /// another namespace.
    fn connection(&self, id: &str, url: &NsUrl, here: InodeUrl) -> Option<Connection> {
        let ours = |conn: &&Connection| {
            path::index(conn) == 1
                && path::client_id(conn) == id
                && conn.network_service == url.service
                && conn.mechanism.as_ref().is_some_and(|m| {
                    m.r#type == url.mechanism
                        && m.inode() == Ok(Some(here))
                        && url.interface.as_deref().is_none_or(|name| m.get(key::NAME) == Some(name))
                })
        };
        // One that is up beats one that is not.
        let mut all: Vec<_> = self.0.values().filter(ours).collect();
        all.sort_by_key(|conn| conn.state() == State::Down);
        let mut conn = (*all.first()?).clone();
        id.clone_into(&mut conn.id);
        conn.path.as_mut()?.index = 0;
        Some(conn)
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connection::{Mechanism, Path};

    use super::*;

    const HERE: InodeUrl = InodeUrl { dev: 4, ino: 4_026_532_621 };

    /// As a manager tells it: seen from its own hop.
    fn left(id: &str, state: State) -> Connection {
        let segment = |name: &str, id: &str| PathSegment {
            name: name.into(),
            id: id.into(),
            token: "token".into(),
            ..PathSegment::default()
        };
        let mut mechanism = Mechanism::kernel("nsm0", None);
        mechanism.set(key::INODE_URL, HERE.to_string());
        let mut conn = Connection {
            id: "at-the-manager".into(),
            network_service: "web".into(),
            network_service_endpoint_name: "gw".into(),
            labels: BTreeMap::from([("app".into(), "init".into())]),
            mechanism: Some(mechanism),
            path: Some(Path {
                unknown: None,
                index: 1,
                path_segments: vec![
                    segment("pod", id),
                    segment("manager", "at-the-manager"),
                    segment("fwd", "f"),
                ],
            }),
            ..Connection::default()
        };
        conn.set_state(state);
        conn
    }

    fn event(kind: ConnectionEventType, conn: &Connection) -> ConnectionEvent {
        ConnectionEvent {
            r#type: kind.into(),
            connections: BTreeMap::from([(conn.id.clone(), conn.clone())]),
        }
    }

    fn url(text: &str) -> NsUrl {
        text.parse().unwrap()
    }

    #[test]
    fn the_connection_is_taken_over_as_it_is_seen_from_our_place() {
        let mut found = Found::default();
        let conn = left("pod-0", State::Up);
        found.hear(event(ConnectionEventType::InitialStateTransfer, &conn));
        let mine = found.connection("pod-0", &url("kernel://web/nsm0?app=other"), HERE).unwrap();
        let mut expected = conn.clone();
        expected.id = "pod-0".into();
        expected.path.as_mut().unwrap().index = 0;
        assert_eq!(mine, expected, "all else stays: labels, endpoint, mechanism, every segment and token");
        assert!(found.connection("pod-0", &url("kernel://web"), HERE).is_some(), "any interface");
        for (what, id, text, here) in [
            ("another id", "pod-1", "kernel://web/nsm0", HERE),
            ("another mechanism", "pod-0", "memif://web/nsm0", HERE),
            ("another service", "pod-0", "kernel://db/nsm0", HERE),
            ("another interface", "pod-0", "kernel://web/nsm1", HERE),
            ("another namespace", "pod-0", "kernel://web/nsm0", InodeUrl { dev: 4, ino: 1 }),
        ] {
            assert_eq!(found.connection(id, &url(text), here), None, "{what}");
        }
        let mut elsewhere = conn;
        elsewhere.path.as_mut().unwrap().index = 2;
        let mut found = Found::default();
        found.hear(event(ConnectionEventType::Update, &elsewhere));
        assert_eq!(found.connection("pod-0", &url("kernel://web/nsm0"), HERE), None, "told by another hop");
    }

    #[test]
    fn what_happens_meanwhile_is_followed() {
        let mut found = Found::default();
        let conn = left("pod-0", State::Up);
        let state = |found: &Found| found.connection("pod-0", &url("kernel://web"), HERE).map(|c| c.state());
        assert_eq!(state(&found), None);
        found.hear(event(ConnectionEventType::Update, &conn));
        assert_eq!(state(&found), Some(State::Up));
        found.hear(event(ConnectionEventType::Delete, &conn));
        assert_eq!(state(&found), Some(State::Down), "gone is down");
        let mut second = conn;
        second.id = "made-anew".into();
        found.hear(event(ConnectionEventType::Update, &second));
        assert_eq!(state(&found), Some(State::Up), "one that is up beats one that is not");
        for i in 0..1000 {
            second.id = format!("{i}");
            found.hear(event(ConnectionEventType::Update, &second));
        }
        assert_eq!(found.0.len(), MAX_FOUND);
    }
}
