//! Who wants to know how connections fare: the `MonitorConnection` service and those who follow it
//! (spec/control-plane.md section 9).
//!
//! [`Hub`] holds what this hop knows and tells its watchers; [`follow`] translates what the next hop tells into
//! events of this one. Matching and translation are pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use nsm_api::{
    path,
    pb::{
        connection::{Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, State},
        networkservice::NetworkServiceRequest,
    },
    planted,
};
use nsm_identity::SpiffeId;
use nsm_transport::{Guard, Refusals};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::{
    chain::{Context, Element, Next},
    error::{Error, Result},
    feed::{BEHIND, Ended, Feed, LAG, TOGETHER},
    hop::NextHop,
    scope::{Lease, Reason, Release},
};

/// Watchers of one process.
const MAX_WATCHERS: usize = 65_536;

/// How often watchers that have gone are looked for while there are too many all the same.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

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

/// Whether what a next hop tells is of what it was asked for last, or of later: not of what stood there before, whose end
/// may be told late, as events come over another connection than answers. Each request gives our segment an end of its own.
/// Only an end is judged by that: whatever else is told brings no wire down. What stood before a Close is known by its own
/// end, too: a clock that has gone back since would make it the later one.
fn is_news(known: &Known, theirs: &Connection, kind: ConnectionEventType) -> bool {
    let ours = path::index(&known.conn);
    let ends = kind == ConnectionEventType::Delete || theirs.state() == State::Down;
    let (theirs, mine) = (end(theirs, ours), end(&known.conn, ours));
    let former = known.former.is_some() && known.former == theirs;
    planted::is("events of a former life count") || !ends || (theirs >= mine && !former)
}

/// So many connections that were closed for another endpoint are remembered until they are asked for.
const MOST_CLOSED: usize = 4096;

/// When the token of a segment ends: seconds and nanoseconds since 1970.
type End = (i64, i32);

fn end(conn: &Connection, segment: usize) -> Option<End> {
    let end = path::segments(conn).get(segment)?.expires.as_ref()?;
    Some((end.seconds, end.nanos))
}

/// The ids of the connections of ours that an event of the next hop may be about: of the segment that it is at, and of
/// the one left of it.
pub fn followable(theirs: &Connection) -> impl Iterator<Item = &String> {
    let index = path::index(theirs);
    let places = [Some(index), index.checked_sub(1)].into_iter().flatten();
    places.filter_map(|i| path::segments(theirs).get(i).map(|segment| &segment.id))
}

/// What this hop knows of its connections, and who watches.
pub struct Hub {
    state: Mutex<HubState>,
    /// Watchers of one identity.
    most_of_one: usize,
    /// Where it is counted that one was cut off.
    refusals: Refusals,
}

impl Default for Hub {
    fn default() -> Self {
        Self::guarded(&Guard::default())
    }
}

#[derive(Default)]
struct HubState {
    connections: HashMap<String, Known>,
    /// Those that are being asked for at a next hop.
    asked: HashMap<String, Asked>,
    /// Those that are being asked for with another endpoint, and when our token of what was closed for that ends.
    closed: HashMap<String, End>,
    watchers: Watchers,
}

/// A connection that is being asked for. Its events come over another connection than its answer does: what the next
/// hop tells of it meanwhile may be news to the answer, and then nobody would tell it again.
struct Asked {
    at: NextHop,
    last: Option<Told>,
}

/// What was last heard of a connection.
enum Told {
    /// By the next hop.
    Event(Arc<ConnectionEvent>),
    /// The next hop is lost.
    Lost,
}

/// Those who watch. Most watch one connection, so an event looks only at those whose selector names a segment of its
/// path, and at those who name none.
#[derive(Default)]
struct Watchers {
    by_segment: HashMap<String, Vec<Watcher>>,
    count: usize,
    of_one: HashMap<SpiffeId, usize>,
    /// How many there may be before those who have gone are looked for.
    look_at: usize,
    /// When they were last looked for in vain, because there were too many: whoever is refused must not cost that each
    /// time.
    in_vain: Option<Instant>,
}

/// The key of those who name no segment: no segment's id is empty.
const ANY: &str = "";

/// A connection, and who asked for it.
#[derive(Clone)]
struct Known {
    conn: Connection,
    owner: Option<SpiffeId>,
    /// When our token ends of what was closed last for another endpoint.
    former: Option<End>,
}

impl Watchers {
    fn key(selector: &MonitorScopeSelector) -> &str {
        selector.path_segments.iter().map(|segment| &*segment.id).find(|id| !id.is_empty()).unwrap_or(ANY)
    }

    fn add(&mut self, watcher: Watcher) {
        self.count += 1;
        if let Some(id) = watcher.viewer.peer() {
            *self.of_one.entry(id.clone()).or_default() += 1;
        }
        let key = Self::key(&watcher.selector).to_owned();
        self.by_segment.entry(key).or_default().push(watcher);
        if self.count > self.look_at {
            self.forget_gone();
            self.look_at = (2 * self.count).max(64);
        }
    }

    /// How many of an identity watch; those who have gone are only told apart when there are too many.
    fn of(&self, id: &SpiffeId) -> usize {
        self.of_one.get(id).copied().unwrap_or_default()
    }

    fn forget_gone(&mut self) {
        let keys: Vec<String> = self.by_segment.keys().cloned().collect();
        keys.iter().for_each(|key| self.retain(key, |watcher| !watcher.events.is_closed()));
    }

    /// Keeps of those under a key whom `keep` tells.
    fn retain(&mut self, key: &str, mut keep: impl FnMut(&Watcher) -> bool) {
        let Some(watchers) = self.by_segment.get_mut(key) else { return };
        watchers.retain(|watcher| {
            let stays = keep(watcher);
            if !stays {
                self.count -= 1;
                if let Some(id) = watcher.viewer.peer()
                    && let Some(count) = self.of_one.get_mut(id)
                {
                    *count -= 1;
                    if *count == 0 {
                        self.of_one.remove(id);
                    }
                }
            }
            stays
        });
        if watchers.is_empty() {
            self.by_segment.remove(key);
        }
    }
}

struct Watcher {
    selector: MonitorScopeSelector,
    viewer: Viewer,
    events: Feed,
}

/// Who watches, and what he may see: events carry the path with its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Viewer {
    /// This process, or an identity that may see everything: every connection.
    All,
    /// A peer: the connections that it asked for.
    Peer(SpiffeId),
    /// The same, of a peer that need not be told what it is answered: a request that succeeds is no news to it. It says
    /// so with [`UNASKED`].
    Asker(SpiffeId),
}

/// The metadata by which a hop of ours asks for events that are not about its own requests only; upstream's servers do
/// not know it and tell all.
pub(crate) const UNASKED: &str = "nsm-monitor-unasked";

impl Viewer {
    fn sees(&self, known: &Known) -> bool {
        match self {
            Self::All => true,
            Self::Peer(id) | Self::Asker(id) => known.owner.as_ref() == Some(id),
        }
    }

    fn peer(&self) -> Option<&SpiffeId> {
        match self {
            Self::All => None,
            Self::Peer(id) | Self::Asker(id) => Some(id),
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("Hub")
            .field("connections", &state.connections.len())
            .field("watchers", &state.watchers.count)
            .finish()
    }
}

impl Hub {
    /// A hub that keeps who watches within these bounds.
    #[must_use]
    pub fn guarded(guard: &Guard) -> Self {
        let (most_of_one, refusals) = (guard.limits.watches_of_one, guard.refusals.clone());
        Self { state: Mutex::default(), most_of_one, refusals }
    }

    fn tell(&self, state: &mut HubState, kind: ConnectionEventType, news: &[Known], why: Why) {
        for _ in 0..state.tell(kind, news, why) {
            self.refusals.count(tonic::Code::Aborted, "slow_reader");
        }
    }

    fn tell_news(&self, state: &mut HubState, news: Vec<Known>, why: Why) {
        // Together: what falls at once is few events, and cuts off nobody who reads at all.
        for some in news.chunks(TOGETHER) {
            self.tell(state, ConnectionEventType::Update, some, why);
        }
        state.connections.extend(news.into_iter().map(|known| (known.conn.id.clone(), known)));
    }

    /// Watches what the selector names. The first event is the initial transfer, always, even when empty:
    /// upstream's clients wait for it.
    ///
    /// # Errors
    /// Too many watchers.
    pub fn watch(
        &self,
        selector: MonitorScopeSelector,
        viewer: Viewer,
    ) -> Result<mpsc::Receiver<Arc<ConnectionEvent>>> {
        let (events, receiver) = Feed::new();
        let mut state = self.state.lock();
        let mut full = |of: &dyn Fn(&Watchers) -> bool| {
            if of(&state.watchers) && state.watchers.in_vain.is_none_or(|at| at.elapsed() > LOOK_AGAIN) {
                state.watchers.forget_gone();
                state.watchers.in_vain = of(&state.watchers).then(Instant::now);
            }
            of(&state.watchers)
        };
        if let Some(id) = viewer.peer()
            && full(&|watchers| watchers.of(id) >= self.most_of_one)
        {
            return Err(Error::new(
                tonic::Code::ResourceExhausted,
                format!(
                    "{id} has {} streams open here, the most that one identity may have",
                    self.most_of_one
                ),
            )
            .counted("watches"));
        }
        if full(&|watchers| watchers.count >= MAX_WATCHERS) {
            return Err(Error::new(
                tonic::Code::ResourceExhausted,
                format!("{MAX_WATCHERS} streams watch this process already"),
            )
            .counted("watches"));
        }
        // Whoever names a connection by our id of it means that one.
        let named = state.connections.get(Watchers::key(&selector));
        let candidates = named.into_iter().chain(state.connections.values().take_while(|_| named.is_none()));
        let seen: Vec<&Known> =
            candidates.filter(|known| viewer.sees(known) && matches(&selector, &known.conn)).collect();
        // One event, as upstream has it, but for one that no gRPC message could hold.
        let mut parts: Vec<&[&Known]> = seen.chunks(TOGETHER).collect();
        if parts.is_empty() {
            parts.push(&[]);
        }
        if parts.len() > LAG {
            return Err(Error::new(
                tonic::Code::ResourceExhausted,
                format!(
                    "{} connections are in the selector's scope, more than one stream can tell",
                    seen.len()
                ),
            )
            .hint("name path segments or network services in the selector"));
        }
        for part in parts {
            let connections = part.iter().map(|known| (known.conn.id.clone(), known.conn.clone())).collect();
            let initial =
                ConnectionEvent { r#type: ConnectionEventType::InitialStateTransfer.into(), connections };
            // The channel is new and empty.
            let _ = events.tell(Arc::new(initial), BEHIND);
        }
        state.watchers.add(Watcher { selector, viewer, events });
        Ok(receiver)
    }

    /// The ids of all connections that are known.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        self.state.lock().connections.keys().cloned().collect()
    }

    /// A connection, and who asked for it.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<(Connection, Option<SpiffeId>)> {
        self.state.lock().connections.get(id).map(|known| (known.conn.clone(), known.owner.clone()))
    }

    /// Ends all streams: for a shutdown that does not wait for those who watch.
    pub fn end_watches(&self) {
        self.state.lock().watchers = Watchers::default();
    }

    /// A connection is new or has changed; `owner` asked for it.
    pub fn update(&self, conn: Connection, owner: Option<SpiffeId>) {
        let mut state = self.state.lock();
        let former = state.former(&conn.id);
        self.tell_news(&mut state, vec![Known { conn, owner, former }], Why::Event);
    }

    /// Whoever asked for a connection that is up shall ask for it again (spec/control-plane.md 10.2).
    pub fn ask_again(&self, id: &str) {
        let mut state = self.state.lock();
        let up = state.connections.get(id).filter(|known| known.conn.state() == State::Up);
        if let Some(mut known) = up.cloned() {
            known.conn.set_state(State::RefreshRequested);
            self.tell_news(&mut state, vec![known], Why::Event);
        }
    }

    /// The same, of a connection that `owner` is just answered; then, what its next hop has told of it meanwhile.
    pub fn answered(&self, conn: Connection, owner: Option<SpiffeId>) {
        let mut state = self.state.lock();
        let id = conn.id.clone();
        // That it was down may still be on its way to the owner, and get there after the answer.
        let fell = state.connections.get(&id).is_some_and(|known| known.conn.state() != State::Up);
        let why = if fell { Why::Event } else { Why::Answer };
        let former = state.closed.remove(&id).or_else(|| state.former(&id));
        self.tell_news(&mut state, vec![Known { conn, owner, former }], why);
        match state.asked.remove(&id).and_then(|asked| asked.last) {
            Some(Told::Event(event)) => self.apply(&mut state, &event, &BTreeSet::from([id])),
            Some(Told::Lost) => self.fall(&mut state, [&id]),
            _ => {}
        }
    }

    /// A connection is about to be asked for there: what that hop tells of it until the answer is published counts then.
    pub(crate) fn asks(&self, id: &str, at: &NextHop) {
        self.state.lock().asked.insert(id.to_owned(), Asked { at: at.clone(), last: None });
    }

    /// A request has failed: a connection that was known is down.
    fn failed(&self, id: &str) {
        let mut state = self.state.lock();
        state.asked.remove(id);
        state.closed.remove(id);
        self.fall(&mut state, [&id.to_owned()]);
    }

    /// A connection is gone.
    pub fn delete(&self, id: &str) {
        let mut state = self.state.lock();
        state.closed.remove(id);
        self.forget(&mut state, id);
    }

    /// A connection is closed, to be asked for with another endpoint: what is still told of it is not about that.
    pub fn leave(&self, id: &str) {
        let mut state = self.state.lock();
        let known = state.connections.get(id);
        if let Some(end) = known.and_then(|known| end(&known.conn, path::index(&known.conn))) {
            // Most are asked for elsewhere, and not here again. To forget costs a request more than needed, at most.
            if state.closed.len() >= MOST_CLOSED {
                state.closed.clear();
            }
            state.closed.insert(id.to_owned(), end);
        }
        self.forget(&mut state, id);
    }

    fn forget(&self, state: &mut HubState, id: &str) {
        state.asked.remove(id);
        if let Some(known) = state.connections.remove(id) {
            self.tell(state, ConnectionEventType::Delete, &[known], Why::Event);
        }
    }

    /// A next hop told something; `ours` are those of our connections that it may speak for.
    pub(crate) fn followed(&self, from: &NextHop, event: Arc<ConnectionEvent>, ours: &BTreeSet<String>) {
        let mut state = self.state.lock();
        // Of what it is being asked for its answer decides: until then it has no say, and may have told this before.
        let mut heard = |id: &String| state.heard(id, from, || Told::Event(Arc::clone(&event)));
        let others = ours.iter().filter(|id| !heard(id)).cloned().collect();
        self.apply(&mut state, &event, &others);
    }

    fn apply(&self, state: &mut HubState, event: &ConnectionEvent, ours: &BTreeSet<String>) {
        let mut news = Vec::new();
        for theirs in event.connections.values() {
            for id in followable(theirs).filter(|id| ours.contains(*id)) {
                let Some(known) = state.connections.get(id) else { continue };
                if is_news(known, theirs, event.r#type())
                    && let Some(conn) = follow(&known.conn, theirs, event.r#type())
                {
                    news.push(Known { conn, ..known.clone() });
                }
            }
        }
        self.tell_news(state, news, Why::Event);
    }

    /// The next hop of these connections is lost: DOWN travels hop by hop towards the clients.
    pub(crate) fn lost<'a>(&self, from: &NextHop, ids: impl IntoIterator<Item = &'a String> + Clone) {
        let mut state = self.state.lock();
        for id in ids.clone() {
            state.heard(id, from, || Told::Lost);
        }
        if !planted::is("a broken stream tells nobody") {
            self.fall(&mut state, ids);
        }
    }

    fn fall<'a>(&self, state: &mut HubState, ids: impl IntoIterator<Item = &'a String>) {
        let known = ids.into_iter().filter_map(|id| state.connections.get(id));
        let mut fell: Vec<Known> = known.filter(|known| known.conn.state() != State::Down).cloned().collect();
        fell.iter_mut().for_each(|known| known.conn.set_state(State::Down));
        self.tell_news(state, fell, Why::Event);
    }
}

/// What makes a connection news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// Whoever asked for it is answered with it.
    Answer,
    Event,
}

impl HubState {
    fn former(&self, id: &str) -> Option<End> {
        self.connections.get(id)?.former
    }

    /// Remembers what a hop tells of a connection if it is being asked for that.
    fn heard(&mut self, id: &str, from: &NextHop, what: impl FnOnce() -> Told) -> bool {
        let asked = self.asked.get_mut(id).filter(|asked| asked.at == *from);
        asked.map(|asked| asked.last = Some(what())).is_some()
    }

    /// Tells every watcher what it sees of this; returns how many were cut off.
    fn tell(&mut self, kind: ConnectionEventType, news: &[Known], why: Why) -> usize {
        let mut cut = 0;
        let most = self.connections.len() + BEHIND;
        let event = |connections| Arc::new(ConnectionEvent { r#type: kind.into(), connections });
        let entry = |known: &Known| (known.conn.id.clone(), known.conn.clone());
        // Most see all of it, and share it.
        let mut whole = None;
        let concerned: BTreeSet<&str> = news
            .iter()
            .flat_map(|known| path::segments(&known.conn))
            .map(|segment| &*segment.id)
            .chain([ANY])
            .collect();
        for key in concerned {
            self.watchers.retain(key, |watcher| {
                if why == Why::Answer && matches!(watcher.viewer, Viewer::Asker(_)) {
                    // It sees only what it asked for, and that it is told by the answer.
                    return true;
                }
                let sees =
                    |known: &&Known| watcher.viewer.sees(known) && matches(&watcher.selector, &known.conn);
                let seen: Vec<&Known> = news.iter().filter(sees).collect();
                let event = match seen.len() {
                    0 => return true,
                    all if all == news.len() => {
                        Arc::clone(whole.get_or_insert_with(|| event(news.iter().map(entry).collect())))
                    }
                    _ => event(seen.into_iter().map(entry).collect::<BTreeMap<_, _>>()),
                };
                // Who is cut off comes back and gets the state anew.
                let told = watcher.events.tell(event, most);
                cut += usize::from(told == Err(Ended::TooSlow));
                told.is_ok()
            });
        }
        cut
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

    async fn release(self: Box<Self>, cx: &Release) -> Result<()> {
        match cx.reason {
            Reason::Reselect => self.hub.leave(&self.id),
            _ => self.hub.delete(&self.id),
        }
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
        let owner = cx.caller.as_ref().map(|caller| caller.peer.id().clone());
        let known = cx.scope.get::<Published>().is_some();
        let id = request.connection.as_ref().map(|conn| conn.id.clone()).unwrap_or_default();
        if !known {
            // Leased before what follows: it is told last, when the wire is gone.
            cx.scope.lease(Published { hub: Arc::clone(&self.hub), id: id.clone() });
        }
        match next.request(cx, request).await {
            Ok(mut conn) => {
                if self.terminates {
                    path::trim(&mut conn);
                }
                conn.set_state(State::Up);
                self.hub.answered(conn.clone(), owner);
                Ok(conn)
            }
            Err(error) => {
                self.hub.failed(&id);
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connection::{Path, PathSegment};

    use super::*;
    use nsm_identity::clock;

    fn conn(index: u32, segments: &[(&str, &str)]) -> Connection {
        Connection {
            id: segments[index as usize].1.into(),
            network_service: "svc".into(),
            path: Some(Path {
                unknown: None,
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

    fn hop(url: &str) -> NextHop {
        url.parse::<nsm_transport::DialUrl>().unwrap().into()
    }

    fn next() -> NextHop {
        hop("unix:///next.sock")
    }

    #[test]
    fn what_a_hop_tells_while_it_is_asked_is_news_to_its_answer() {
        let (hub, other) = (Hub::default(), hop("unix:///other.sock"));
        let mut up = conn(1, PATH);
        up.set_state(State::Up);
        let tell = |kind: ConnectionEventType, from: &NextHop| {
            let theirs = conn(2, PATH);
            let event = ConnectionEvent { r#type: kind.into(), connections: [("u2".into(), theirs)].into() };
            hub.followed(from, Arc::new(event), &BTreeSet::from(["u1".to_owned()]));
        };
        let answered = || {
            hub.answered(up.clone(), None);
            hub.get("u1").unwrap().0.state()
        };
        hub.asks("u1", &next());
        tell(ConnectionEventType::Delete, &next());
        assert_eq!(answered(), State::Down, "it is gone again");
        assert_eq!(answered(), State::Up, "what was told before does not count for the next request");
        hub.asks("u1", &next());
        tell(ConnectionEventType::Delete, &next());
        tell(ConnectionEventType::Update, &next());
        assert_eq!(answered(), State::Up, "the last counts");
        hub.asks("u1", &next());
        hub.lost(&next(), [&"u1".to_owned()]);
        assert_eq!(answered(), State::Down);
        hub.asks("u1", &next());
        tell(ConnectionEventType::Delete, &other);
        hub.lost(&other, [&"u1".to_owned()]);
        assert_eq!(answered(), State::Up, "of another hop, from which it moves away");
        // What stood there before has an end of its own.
        let mut again = up.clone();
        path::current_mut(&mut again).unwrap().expires = Some(path::to_timestamp(clock::now()));
        hub.asks("u1", &next());
        tell(ConnectionEventType::Delete, &next());
        hub.answered(again, None);
        assert_eq!(hub.get("u1").unwrap().0.state(), State::Up);
        hub.asks("u1", &next());
        tell(ConnectionEventType::Delete, &next());
        assert_eq!(hub.get("u1").unwrap().0.state(), State::Up, "its answer decides");
        hub.failed("u1");
        assert_eq!(hub.get("u1").unwrap().0.state(), State::Down);
        assert_eq!(answered(), State::Up, "what a candidate said that was not taken is forgotten");
    }

    /// The clock was hours ahead when what was closed had been asked for.
    #[test]
    fn what_was_closed_for_another_endpoint_brings_that_ones_wire_not_down() {
        let hub = Hub::default();
        let at = |seconds: u64| {
            let mut conn = conn(1, PATH);
            let end = clock::now() + Duration::from_secs(seconds);
            path::current_mut(&mut conn).unwrap().expires = Some(path::to_timestamp(end));
            conn.set_state(State::Up);
            conn
        };
        let tell = |of: &Connection| {
            let mut theirs = of.clone();
            theirs.path.as_mut().unwrap().index = 2;
            let connections = [("u2".into(), theirs)].into();
            let event = ConnectionEvent { r#type: ConnectionEventType::Delete.into(), connections };
            hub.followed(&next(), Arc::new(event), &BTreeSet::from(["u1".to_owned()]));
            hub.get("u1").unwrap().0.state()
        };
        let (before, now, refreshed) = (at(7800), at(600), at(660));
        hub.answered(before.clone(), None);
        hub.leave("u1");
        hub.answered(now, None);
        assert_eq!(tell(&before), State::Up);
        hub.answered(refreshed.clone(), None);
        assert_eq!(tell(&before), State::Up, "however late");
        assert_eq!(tell(&refreshed), State::Down);
        hub.delete("u1");
        assert!(hub.state.lock().closed.is_empty());
        for n in 0..=MOST_CLOSED {
            let id = format!("u{n}");
            hub.update(Connection { id: id.clone(), ..before.clone() }, None);
            hub.leave(&id);
        }
        assert!(hub.state.lock().closed.len() <= MOST_CLOSED, "they went elsewhere");
    }

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
        let mut empty = hub.watch(selector(&[("nsc", "")], &[]), Viewer::All).unwrap();
        assert!(empty.recv().await.unwrap().connections.is_empty());
        hub.update(conn(1, PATH), None);
        let event = empty.recv().await.unwrap();
        assert_eq!((event.r#type(), event.connections.len()), (ConnectionEventType::Update, 1));
        let mut late = hub.watch(selector(&[], &[]), Viewer::All).unwrap();
        assert_eq!(late.recv().await.unwrap().connections.keys().collect::<Vec<_>>(), ["u1"]);
        hub.delete("u1");
        assert_eq!(late.recv().await.unwrap().r#type(), ConnectionEventType::Delete);
        hub.delete("u1");
        drop(hub);
        assert!(late.recv().await.is_none(), "a deletion is told once");
    }

    #[tokio::test]
    async fn each_of_many_watchers_hears_of_its_own_and_who_has_gone_does_not_count() {
        let me: SpiffeId = "spiffe://t/me".parse().unwrap();
        let limits = nsm_transport::Limits { watches_of_one: 100, ..Default::default() };
        let hub = Hub::guarded(&Guard { limits, ..Guard::default() });
        let watch = |segments: &[(&str, &str)]| {
            hub.watch(selector(segments, &[]), Viewer::Peer(me.clone())).map(|mut events| {
                events.try_recv().unwrap();
                events
            })
        };
        // The segment that is named need not be the first, and need not be ours.
        let mut watchers: Vec<_> =
            (0..100).map(|n| watch(&[("nsc", ""), ("mgr", &format!("u{n}"))]).unwrap()).collect();
        assert!(watch(&[]).unwrap_err().to_string().contains("100 streams"));
        for n in 0..100 {
            hub.update(
                conn(2, &[("nsc", "x"), ("mgr", &format!("u{n}")), ("fwd", &format!("f{n}"))]),
                Some(me.clone()),
            );
        }
        for (n, events) in watchers.iter_mut().enumerate() {
            let event = events.try_recv().unwrap();
            assert_eq!(event.connections.keys().collect::<Vec<_>>(), [&format!("f{n}")]);
            assert!(events.try_recv().is_err(), "nothing of the others");
        }
        watchers.truncate(50);
        tokio::time::sleep(2 * LOOK_AGAIN).await;
        for _ in 0..1000 {
            drop(watch(&[("", "u7")]).unwrap());
        }
        watchers.extend((50..100).map(|_| watch(&[]).unwrap()));
        assert!(watch(&[]).is_err());
    }

    #[tokio::test]
    async fn who_is_answered_need_not_be_told() {
        let (me, other): (SpiffeId, SpiffeId) =
            ("spiffe://t/me".parse().unwrap(), "spiffe://t/other".parse().unwrap());
        let hub = Hub::default();
        let mut asker = hub.watch(selector(&[], &[]), Viewer::Asker(me.clone())).unwrap();
        let mut peer = hub.watch(selector(&[], &[]), Viewer::Peer(me.clone())).unwrap();
        for events in [&mut asker, &mut peer] {
            assert!(events.recv().await.unwrap().connections.is_empty());
        }
        let mut up = conn(1, PATH);
        up.set_state(State::Up);
        hub.answered(up.clone(), Some(me.clone()));
        assert_eq!(peer.try_recv().unwrap().r#type(), ConnectionEventType::Update);
        assert!(asker.try_recv().is_err());
        hub.lost(&next(), [&"u1".to_owned()]);
        // What it hears of the fall may come after the answer.
        hub.answered(up.clone(), Some(me.clone()));
        hub.answered(up.clone(), Some(me.clone()));
        hub.update(up, Some(me));
        hub.delete("u1");
        let update = ConnectionEventType::Update;
        for wanted in [update, update, update, ConnectionEventType::Delete] {
            assert_eq!(asker.try_recv().unwrap().r#type(), wanted);
        }
        hub.update(conn(1, &[("nsc", "nsc-9"), ("mgr", "u9")]), Some(other));
        assert!(asker.try_recv().is_err(), "what others asked for is not for it");
    }

    #[tokio::test]
    async fn who_reads_slowly_hears_the_last_of_each_connection() {
        let hub = Hub::default();
        let mut slow = hub.watch(selector(&[], &[]), Viewer::All).unwrap();
        let named = |id: usize| conn(1, &[("nsc", "nsc-0"), ("mgr", &format!("u{id}"))]);
        for round in 0..3 {
            for id in 0..2 * LAG {
                let mut conn = named(id);
                conn.network_service = format!("round {round}");
                hub.update(conn, None);
            }
        }
        for id in 0..LAG {
            hub.delete(&format!("u{id}"));
        }
        let mut last = BTreeMap::new();
        while last.len() < 2 * LAG || last.values().any(|now| *now == Some("round 0".to_owned())) {
            let event = slow.recv().await.unwrap();
            assert!(event.connections.len() <= TOGETHER);
            let gone = event.r#type() == ConnectionEventType::Delete;
            let now = event.connections.iter();
            last.extend(now.map(|(id, conn)| (id.clone(), (!gone).then(|| conn.network_service.clone()))));
        }
        for (id, now) in last {
            let gone = id[1..].parse::<usize>().unwrap() < LAG;
            assert_eq!(now, (!gone).then(|| "round 2".to_owned()), "{id}");
        }
        // In order again once he has caught up.
        hub.update(named(7), None);
        assert_eq!(slow.recv().await.unwrap().connections.keys().collect::<Vec<_>>(), ["u7"]);
        assert_eq!(hub.refusals.of("slow_reader"), 0);
    }

    #[tokio::test]
    async fn who_does_not_read_is_cut_off() {
        let hub = Hub::default();
        let mut slow = hub.watch(selector(&[], &[]), Viewer::All).unwrap();
        for id in 0..=LAG + BEHIND {
            hub.update(conn(1, &[("nsc", "nsc-0"), ("mgr", &format!("u{id}"))]), None);
            hub.delete(&format!("u{id}"));
        }
        let mut seen = 0;
        while slow.recv().await.is_some() {
            seen += 1;
        }
        assert_eq!(seen, LAG, "what was in order, then the end");
        assert_eq!(hub.refusals.of("slow_reader"), 1);
        // Who leaves by himself is none.
        drop(hub.watch(selector(&[], &[]), Viewer::All).unwrap());
        hub.update(conn(1, PATH), None);
        assert_eq!(hub.refusals.of("slow_reader"), 1);
    }

    #[tokio::test]
    async fn the_fall_of_many_wires_cuts_off_nobody_and_names_each() {
        let hub = Hub::default();
        let ids: Vec<String> = (0..20 * LAG).map(|i| format!("u{i}")).collect();
        for id in &ids {
            hub.update(conn(1, &[("nsc", "nsc-0"), ("mgr", id)]), None);
        }
        let selector_of_one = selector(&[("mgr", "u7")], &[]);
        let (mut all, mut one) = (
            hub.watch(selector(&[], &[]), Viewer::All).unwrap(),
            hub.watch(selector_of_one, Viewer::All).unwrap(),
        );
        let (mut known, mut fell) = (BTreeSet::new(), BTreeSet::new());
        while known.len() < ids.len() {
            let event = all.recv().await.unwrap();
            assert_eq!(event.r#type(), ConnectionEventType::InitialStateTransfer);
            known.extend(event.connections.keys().cloned());
        }
        hub.lost(&next(), &ids);
        hub.end_watches();
        while let Some(event) = all.recv().await {
            assert!(event.connections.len() <= TOGETHER);
            assert!(event.connections.values().all(|conn| conn.state() == State::Down));
            fell.extend(event.connections.keys().cloned());
        }
        assert_eq!((known.len(), fell.len()), (ids.len(), ids.len()));
        one.recv().await.unwrap();
        assert_eq!(one.recv().await.unwrap().connections.keys().collect::<Vec<_>>(), ["u7"]);
        assert!(one.recv().await.is_none());
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
        hub.update(conn(1, PATH), None);
        let mut watcher = hub.watch(selector(&[], &[]), Viewer::All).unwrap();
        watcher.recv().await;
        hub.lost(&next(), &["u1".into(), "unknown".into()]);
        hub.lost(&next(), &["u1".into()]);
        assert_eq!(watcher.recv().await.unwrap().connections["u1"].state(), State::Down);
        assert!(watcher.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_peer_sees_what_it_asked_for_and_nothing_else() {
        let (a, b): (SpiffeId, SpiffeId) = ("spiffe://t/a".parse().unwrap(), "spiffe://t/b".parse().unwrap());
        let hub = Hub::default();
        hub.update(conn(1, PATH), Some(a.clone()));
        let mut mine = hub.watch(selector(&[], &[]), Viewer::Peer(a)).unwrap();
        let mut other = hub.watch(selector(&[], &[]), Viewer::Peer(b)).unwrap();
        assert_eq!(mine.recv().await.unwrap().connections.len(), 1);
        assert!(other.recv().await.unwrap().connections.is_empty());
        hub.delete("u1");
        assert_eq!(mine.recv().await.unwrap().connections.len(), 1);
        assert!(other.try_recv().is_err());
    }

    #[test]
    fn a_neighbour_speaks_for_its_connections_only() {
        let hub = Hub::default();
        hub.update(conn(1, PATH), None);
        let mut theirs = conn(2, PATH);
        theirs.set_state(State::Down);
        let event = ConnectionEvent {
            r#type: ConnectionEventType::Update.into(),
            connections: BTreeMap::from([("u2".into(), theirs)]),
        };
        let state = || hub.state.lock().connections["u1"].conn.state();
        let event = Arc::new(event);
        hub.followed(&next(), Arc::clone(&event), &BTreeSet::from(["u7".to_owned()]));
        assert_eq!(state(), State::Up);
        hub.followed(&next(), event, &BTreeSet::from(["u1".to_owned()]));
        assert_eq!(state(), State::Down);
    }
}
