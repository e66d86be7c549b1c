//! What is registered: an in-memory table of named objects with revisions, indexes and watches.
//!
//! A store is a plain value behind one short lock: no task, no timer, no RPC. A watch is a snapshot
//! and everything after it, taken under that lock, so that a change is seen exactly once. Replaying
//! a watch gives what the store holds for its query, at any time. Nobody waits for a watcher: one
//! that does not read is cut off, its stream ends and it may watch anew (upstream's store blocks all
//! watchers on the slowest one: spec/registry.md 2.4).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque, btree_map},
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
};

use futures::Stream;
use nsm_api::{
    limits::Malformed,
    matching,
    pb::registry::{
        NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceEndpointResponse,
        NetworkServiceQuery, NetworkServiceResponse,
    },
};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::limits;

/// Events that a watcher may be behind before it is cut off.
pub const WATCH_BUFFER: usize = 1024;

/// An object that registries hold: a network service or an endpoint.
pub trait Item: Clone + PartialEq + Default + Send + Sync + 'static {
    /// What it is called in messages.
    const KIND: &'static str;
    /// The Find request for this kind.
    type Query: Send + 'static;
    /// What Find streams for this kind.
    type Response: Send + 'static;

    /// The key.
    fn name(&self) -> &str;
    /// Names of services under which it is looked up besides its own.
    fn services(&self) -> &[String];
    /// Who registered it, and through whom; the first is its owner.
    fn path_ids(&self) -> &[String];
    /// Replaces [`Item::path_ids`].
    fn set_path_ids(&mut self, ids: Vec<String>);
    /// Whether its fields keep their bounds.
    ///
    /// # Errors
    /// The first that does not.
    fn check(&self) -> Result<(), Malformed>;
    /// Whether somebody who would register this gets all of it from `known`, which is another's.
    fn is_served_by(&self, known: &Self) -> bool;
    /// Whether it answers `query`, whose empty fields match everything (spec/registry.md 2.2).
    fn answers(&self, query: &Self) -> bool;
    /// Takes a Find request apart: the example to match, and whether to go on watching. A missing
    /// example is an empty one.
    fn query(query: Self::Query) -> (Self, bool);
    /// Makes a Find request.
    fn to_query(self, watch: bool) -> Self::Query;
    /// Makes a message of a Find stream.
    fn to_response(self, deleted: bool) -> Self::Response;
    /// Takes a message of a Find stream apart; one without an object says nothing.
    fn response(response: Self::Response) -> Option<(Self, bool)>;
}

/// Something that happened to an object.
#[derive(Debug, Clone, PartialEq)]
pub struct Event<T> {
    /// The object; the last known one if it is gone.
    pub item: Arc<T>,
    /// It is gone, or no longer answers the query of this watch.
    pub deleted: bool,
    /// The store's revision that this event made; 0 for what was there before the watch.
    pub revision: u64,
}

/// The table. Clones share it.
#[derive(Debug)]
pub struct Store<T: Item>(Arc<Mutex<State<T>>>);

impl<T: Item> Clone for Store<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Item> Default for Store<T> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            revision: 0,
            items: BTreeMap::new(),
            by_service: HashMap::new(),
            watchers: BTreeMap::new(),
            interested: HashMap::new(),
            next_watcher: 0,
        })))
    }
}

impl<T: Item> Store<T> {
    /// Puts an object in place of the one of its name, and tells the watchers if that changes it.
    /// Returns the store's revision.
    pub fn put(&self, item: impl Into<Arc<T>>) -> u64 {
        self.0.lock().put(item.into())
    }

    /// Removes and returns an object.
    pub fn remove(&self, name: &str) -> Option<Arc<T>> {
        self.0.lock().remove(name)
    }

    /// The object of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<T>> {
        self.0.lock().items.get(name).cloned()
    }

    /// What answers a query, ordered by name.
    #[must_use]
    pub fn find(&self, query: &T) -> Vec<Arc<T>> {
        self.0.lock().find(query)
    }

    /// What answers a query now, and then every change of it.
    #[must_use]
    pub fn watch(&self, query: T) -> Watch<T> {
        self.watch_with_buffer(query, WATCH_BUFFER)
    }

    /// As [`Store::watch`], for a watcher that may be `buffer` events behind.
    #[must_use]
    pub fn watch_with_buffer(&self, query: T, buffer: usize) -> Watch<T> {
        let (events, receiver) = mpsc::channel(buffer.max(1));
        let mut state = self.0.lock();
        let snapshot = state.find(&query).into();
        let id = state.next_watcher;
        state.next_watcher += 1;
        let interest = Interest::of(&query);
        state.interested.entry(interest.clone()).or_default().insert(id);
        state.watchers.insert(id, Watcher { query, interest, events });
        Watch { snapshot, receiver, id, store: Arc::downgrade(&self.0) }
    }

    /// How many objects there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.lock().items.len()
    }

    /// Whether there is no object.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many watches are open.
    #[must_use]
    pub fn watchers(&self) -> usize {
        self.0.lock().watchers.len()
    }
}

/// An open watch: a stream of events that ends when its reader was too slow. Dropping it closes it.
#[derive(Debug)]
pub struct Watch<T: Item> {
    snapshot: VecDeque<Arc<T>>,
    receiver: mpsc::Receiver<Event<T>>,
    id: u64,
    store: Weak<Mutex<State<T>>>,
}

impl<T: Item> Watch<T> {
    /// The next event, if one is there already.
    pub fn try_next(&mut self) -> Option<Event<T>> {
        match self.snapshot.pop_front() {
            Some(item) => Some(Event { item, deleted: false, revision: 0 }),
            None => self.receiver.try_recv().ok(),
        }
    }
}

impl<T: Item> Stream for Watch<T> {
    type Item = Event<T>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event<T>>> {
        if let Some(item) = self.snapshot.pop_front() {
            return Poll::Ready(Some(Event { item, deleted: false, revision: 0 }));
        }
        Poll::Ready(ready!(self.receiver.poll_recv(cx)))
    }
}

impl<T: Item> Unpin for Watch<T> {}

impl<T: Item> Drop for Watch<T> {
    fn drop(&mut self) {
        if let Some(state) = self.store.upgrade() {
            let watcher = state.lock().forget_watcher(self.id);
            // Its events, if they are the last to hold objects, go outside of the lock.
            drop(watcher);
        }
    }
}

#[derive(Debug)]
struct State<T> {
    /// Counts changes.
    revision: u64,
    items: BTreeMap<String, Arc<T>>,
    by_service: HashMap<String, BTreeSet<String>>,
    watchers: BTreeMap<u64, Watcher<T>>,
    /// Which watchers an object can concern at all: a refresh must not cost a look at each of them.
    interested: HashMap<Interest, BTreeSet<u64>>,
    next_watcher: u64,
}

#[derive(Debug)]
struct Watcher<T> {
    query: T,
    interest: Interest,
    events: mpsc::Sender<Event<T>>,
}

/// The narrowest thing that a query says about whom it can match.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Interest {
    Name(String),
    Service(String),
    All,
}

impl Interest {
    fn of<T: Item>(query: &T) -> Self {
        match (query.name(), query.services()) {
            ("", []) => Self::All,
            ("", [service, ..]) => Self::Service(service.clone()),
            (name, _) => Self::Name(name.to_owned()),
        }
    }
}

impl<T: Item> State<T> {
    fn find(&self, query: &T) -> Vec<Arc<T>> {
        let answers = |item: &&Arc<T>| item.answers(query);
        match Interest::of(query) {
            Interest::Name(name) => self.items.get(&name).filter(answers).cloned().into_iter().collect(),
            Interest::Service(service) => {
                let names = self.by_service.get(&service).into_iter().flatten();
                names.filter_map(|name| self.items.get(name)).filter(answers).cloned().collect()
            }
            Interest::All => self.items.values().filter(answers).cloned().collect(),
        }
    }

    fn put(&mut self, item: Arc<T>) -> u64 {
        let before = match self.items.entry(item.name().to_owned()) {
            btree_map::Entry::Occupied(entry) if *entry.get() == item => return self.revision,
            btree_map::Entry::Occupied(mut entry) => Some(entry.insert(item.clone())),
            btree_map::Entry::Vacant(entry) => {
                entry.insert(item.clone());
                None
            }
        };
        let services_before = before.iter().flat_map(|item| item.services());
        for service in services_before.filter(|service| !item.services().contains(service)) {
            forget(&mut self.by_service, service, item.name());
        }
        for service in item.services() {
            self.by_service.entry(service.clone()).or_default().insert(item.name().to_owned());
        }
        self.tell(before.as_ref(), Some(&item));
        self.revision
    }

    fn remove(&mut self, name: &str) -> Option<Arc<T>> {
        let item = self.items.remove(name)?;
        for service in item.services() {
            forget(&mut self.by_service, service, name);
        }
        self.tell(Some(&item), None);
        Some(item)
    }

    /// Tells each watcher what a change means for its query.
    fn tell(&mut self, before: Option<&Arc<T>>, after: Option<&Arc<T>>) {
        self.revision += 1;
        let Some(name) = after.or(before).map(|item| item.name()) else { return };
        let services = before.into_iter().chain(after).flat_map(|item| item.services());
        let interests = services
            .map(|service| Interest::Service(service.clone()))
            .chain([Interest::Name(name.to_owned()), Interest::All]);
        let concerned: BTreeSet<u64> =
            interests.filter_map(|interest| self.interested.get(&interest)).flatten().copied().collect();
        for id in concerned {
            let Some(watcher) = self.watchers.get(&id) else { continue };
            let known = before.filter(|item| item.answers(&watcher.query));
            let event = match after.filter(|item| item.answers(&watcher.query)) {
                Some(item) => Event { item: item.clone(), deleted: false, revision: self.revision },
                None => {
                    let Some(item) = known else { continue };
                    Event { item: item.clone(), deleted: true, revision: self.revision }
                }
            };
            if watcher.events.try_send(event).is_err() {
                // Full: its stream ends behind what it has not read.
                self.forget_watcher(id);
            }
        }
    }

    fn forget_watcher(&mut self, id: u64) -> Option<Watcher<T>> {
        let watcher = self.watchers.remove(&id)?;
        if let Some(ids) = self.interested.get_mut(&watcher.interest) {
            ids.remove(&id);
            if ids.is_empty() {
                self.interested.remove(&watcher.interest);
            }
        }
        Some(watcher)
    }
}

fn forget(index: &mut HashMap<String, BTreeSet<String>>, service: &str, name: &str) {
    if let Some(names) = index.get_mut(service) {
        names.remove(name);
        if names.is_empty() {
            index.remove(service);
        }
    }
}

impl Item for NetworkService {
    const KIND: &'static str = "network service";
    type Query = NetworkServiceQuery;
    type Response = NetworkServiceResponse;

    fn name(&self) -> &str {
        &self.name
    }

    fn services(&self) -> &[String] {
        &[]
    }

    fn path_ids(&self) -> &[String] {
        &self.path_ids
    }

    fn set_path_ids(&mut self, ids: Vec<String>) {
        self.path_ids = ids;
    }

    fn check(&self) -> Result<(), Malformed> {
        limits::check_service(self)
    }

    /// Many endpoints of a service register it, each as it knows it: mostly just by name.
    fn is_served_by(&self, known: &Self) -> bool {
        (self.payload.is_empty() || self.payload == known.payload)
            && (self.matches.is_empty() || self.matches == known.matches)
    }

    fn answers(&self, query: &Self) -> bool {
        matching::service_answers(query, self)
    }

    fn query(query: NetworkServiceQuery) -> (Self, bool) {
        (query.network_service.unwrap_or_default(), query.watch)
    }

    fn to_query(self, watch: bool) -> NetworkServiceQuery {
        NetworkServiceQuery { network_service: Some(self), watch }
    }

    fn to_response(self, deleted: bool) -> NetworkServiceResponse {
        NetworkServiceResponse { network_service: Some(self), deleted }
    }

    fn response(response: NetworkServiceResponse) -> Option<(Self, bool)> {
        response.network_service.map(|item| (item, response.deleted))
    }
}

impl Item for NetworkServiceEndpoint {
    const KIND: &'static str = "endpoint";
    type Query = NetworkServiceEndpointQuery;
    type Response = NetworkServiceEndpointResponse;

    fn name(&self) -> &str {
        &self.name
    }

    fn services(&self) -> &[String] {
        &self.network_service_names
    }

    fn path_ids(&self) -> &[String] {
        &self.path_ids
    }

    fn set_path_ids(&mut self, ids: Vec<String>) {
        self.path_ids = ids;
    }

    fn check(&self) -> Result<(), Malformed> {
        limits::check_endpoint(self)
    }

    fn is_served_by(&self, _: &Self) -> bool {
        false
    }

    fn answers(&self, query: &Self) -> bool {
        matching::endpoint_answers(query, self)
    }

    fn query(query: NetworkServiceEndpointQuery) -> (Self, bool) {
        (query.network_service_endpoint.unwrap_or_default(), query.watch)
    }

    fn to_query(self, watch: bool) -> NetworkServiceEndpointQuery {
        NetworkServiceEndpointQuery { network_service_endpoint: Some(self), watch }
    }

    fn to_response(self, deleted: bool) -> NetworkServiceEndpointResponse {
        NetworkServiceEndpointResponse { network_service_endpoint: Some(self), deleted }
    }

    fn response(response: NetworkServiceEndpointResponse) -> Option<(Self, bool)> {
        response.network_service_endpoint.map(|item| (item, response.deleted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use proptest::prelude::*;

    fn nse(name: &str, services: &[&str], url: &str) -> NetworkServiceEndpoint {
        NetworkServiceEndpoint {
            name: name.into(),
            network_service_names: services.iter().map(|s| (*s).to_owned()).collect(),
            url: url.into(),
            ..Default::default()
        }
    }

    fn replay(
        view: &mut BTreeMap<String, Arc<NetworkServiceEndpoint>>,
        event: Event<NetworkServiceEndpoint>,
    ) {
        match event.deleted {
            true => view.remove(&event.item.name),
            false => view.insert(event.item.name.clone(), event.item),
        };
    }

    fn content(
        store: &Store<NetworkServiceEndpoint>,
        query: &NetworkServiceEndpoint,
    ) -> BTreeMap<String, Arc<NetworkServiceEndpoint>> {
        store.find(query).into_iter().map(|item| (item.name.clone(), item)).collect()
    }

    #[test]
    fn events_tell_of_change_and_of_what_stops_matching() {
        let store = Store::default();
        let first = store.put(nse("a", &["s"], "tcp://1"));
        let mut watch = store.watch(nse("", &["s"], ""));
        assert_eq!(store.put(nse("a", &["s"], "tcp://1")), first, "the same again is no change");
        store.put(nse("a", &["s", "t"], "tcp://2"));
        store.put(nse("b", &["t"], "tcp://3"));
        store.put(nse("a", &["t"], "tcp://2"));
        store.put(nse("a", &["s"], "tcp://2"));
        store.remove("a");
        assert!(store.remove("a").is_none());
        let seen: Vec<_> = std::iter::from_fn(|| watch.try_next())
            .map(|e| (e.item.url.clone(), e.deleted, e.revision))
            .collect();
        let url = |n: u8| format!("tcp://{n}");
        assert_eq!(
            seen,
            [
                (url(1), false, 0),
                (url(2), false, 2),
                (url(2), true, 4),
                (url(2), false, 5),
                (url(2), true, 6)
            ]
        );
    }

    #[tokio::test]
    async fn a_slow_watcher_is_cut_off_and_holds_nobody_up() {
        let store = Store::default();
        let mut slow = store.watch_with_buffer(nse("", &[], ""), 3);
        let mut quick = store.watch(nse("", &[], ""));
        for i in 0..10 {
            store.put(nse(&i.to_string(), &[], ""));
        }
        assert_eq!(store.watchers(), 1);
        assert_eq!((&mut slow).count().await, 3, "what it had not read, then the end");
        assert_eq!(std::iter::from_fn(|| quick.try_next()).count(), 10);
        drop(slow);
        drop(quick);
        assert_eq!(store.watchers(), 0);
        assert!(store.0.lock().interested.is_empty());
    }

    #[test]
    fn indexes_do_not_outlive_objects() {
        let store = Store::default();
        for i in 0..100 {
            store.put(nse(&i.to_string(), &["s", &format!("t{i}")], ""));
        }
        store.put(nse("5", &["u"], ""));
        assert_eq!(store.find(&nse("", &["s"], "")).len(), 99);
        for i in 0..100 {
            store.remove(&i.to_string());
        }
        assert!(store.is_empty() && store.0.lock().by_service.is_empty());
    }

    #[test]
    fn watches_opened_during_changes_miss_nothing() {
        let store: Store<NetworkServiceEndpoint> = Store::default();
        let writers: Vec<_> = (0..3)
            .map(|w| {
                let store = store.clone();
                std::thread::spawn(move || {
                    for i in 0..400_u32 {
                        let name = format!("{w}-{}", i * 7 % 13);
                        match i % 3 {
                            0 => drop(store.remove(&name)),
                            _ => drop(store.put(nse(&name, &[["s", "t"][(i % 2) as usize]], &i.to_string()))),
                        }
                    }
                })
            })
            .collect();
        let queries = [nse("", &[], ""), nse("", &["s"], ""), nse("1-3", &[], ""), nse("", &["t"], "1")];
        let mut watches: Vec<_> = (0..60)
            .map(|i| {
                let query = queries[i % queries.len()].clone();
                (query.clone(), store.watch_with_buffer(query, 10_000))
            })
            .collect();
        writers.into_iter().for_each(|w| w.join().expect("writer"));
        for (query, watch) in &mut watches {
            let mut view = BTreeMap::new();
            while let Some(event) = watch.try_next() {
                replay(&mut view, event);
            }
            assert_eq!(view, content(&store, query));
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put(u8, u8, u8),
        Remove(u8),
        Watch(u8, u8, u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0..6_u8, 0..8_u8, 0..3_u8).prop_map(|(n, s, u)| Step::Put(n, s, u)),
            1 => (0..6_u8).prop_map(Step::Remove),
            1 => (0..7_u8, 0..8_u8, 0..4_u8).prop_map(|(n, s, u)| Step::Watch(n, s, u)),
        ];
        proptest::collection::vec(step, 0..60)
    }

    /// Three services as bits; name 6 and URL 3 stand for "any".
    fn example(name: u8, services: u8, url: u8) -> NetworkServiceEndpoint {
        let services: Vec<_> =
            (0..3).filter(|bit| services >> bit & 1 == 1).map(|b| ["s", "t", "u"][b]).collect();
        let name = if name == 6 { String::new() } else { format!("n{name}") };
        nse(
            &name,
            &services,
            if url == 3 { "" } else { ["tcp://a", "tcp://b", "tcp://ab"][usize::from(url)] },
        )
    }

    proptest! {
        #[test]
        fn replaying_a_watch_gives_the_content_of_the_store(steps in steps()) {
            let store: Store<NetworkServiceEndpoint> = Store::default();
            let mut model: BTreeMap<String, NetworkServiceEndpoint> = BTreeMap::new();
            let mut watches = vec![];
            for step in steps {
                match step {
                    Step::Put(n, s, u) => {
                        store.put(example(n, s, u));
                        model.insert(format!("n{n}"), example(n, s, u));
                    }
                    Step::Remove(n) => {
                        let name = format!("n{n}");
                        prop_assert_eq!(store.remove(&name).is_some(), model.remove(&name).is_some());
                    }
                    Step::Watch(n, s, u) => {
                        let query = example(n, s, u);
                        watches.push((query.clone(), store.watch(query), BTreeMap::new()));
                    }
                }
                for (query, watch, view) in &mut watches {
                    while let Some(event) = watch.try_next() {
                        replay(view, event);
                    }
                    // The index finds what a look at each object finds.
                    let scanned: BTreeMap<_, _> = model
                        .iter()
                        .filter(|(_, item)| matching::endpoint_answers(query, item))
                        .map(|(name, item)| (name.clone(), Arc::new(item.clone())))
                        .collect();
                    prop_assert_eq!(&*view, &scanned);
                    prop_assert_eq!(&content(&store, query), &scanned);
                }
            }
        }
    }
}
