//! What the API server holds, as far as this process has heard, and what of it is shown. No clock and no calls.
//!
//! Objects have a version that grows with every change, so that it does not matter whether a change is heard first as
//! the answer to a write or as an event. A name is looked up by `spec.name`, which several objects may have; the first
//! counts: the operator's before those that were registered, those of our namespace before others, then in order.
//!
//! Clocks of nodes differ, so that nobody but who wrote it believes an expiration time alone: an endpoint of another
//! registry ends here when that is past *and* nothing was heard of it for a lifetime, which is how Kubernetes' own
//! leases end. After the API server was away, everything is as if it had just been heard of: nobody could refresh it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::ObjectMeta, jiff::Timestamp};
use nsm_registry::{expiry::Expiry, store::Store};
use serde_json::Value;
use tokio::time::Instant;
use tracing::warn;

use crate::{
    resource::{Kind, Object},
    verdict,
};

/// Namespace and name.
pub(crate) type Key = (String, String);

/// Who wrote what is heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// This process, just now.
    Us,
    /// Somebody, just now.
    Others,
    /// Somebody, before this process looked for the first time.
    Before,
}

/// When something is heard of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heard {
    pub(crate) now: Instant,
    /// The same by the clock that expiration times mean.
    pub(crate) clock: SystemTime,
    /// By how much what others wrote ends later here than elsewhere, lest all registries delete it at once.
    pub(crate) later: Duration,
}

#[derive(Debug)]
pub(crate) struct Table<T: Kind> {
    namespace: String,
    lifetime: Duration,
    objects: BTreeMap<Key, Held<T>>,
    names: HashMap<String, BTreeSet<Rank>>,
    ends: Expiry<Instant>,
    /// What happens is not heard of: nobody may be able to refresh anything, so nothing ends.
    away: bool,
    /// Deleted by us; what was said of them before that may still be under way.
    deleted: HashSet<String>,
    /// Conditions that objects should have, in the state that this was thought of.
    to_say: BTreeMap<Key, (ObjectMeta, Value)>,
    shown: Store<T>,
}

/// An object.
#[derive(Debug, Clone)]
pub(crate) struct Held<T> {
    pub(crate) meta: ObjectMeta,
    version: u64,
    /// Nothing, if it is not understood.
    pub(crate) item: Option<Arc<T>>,
    /// It has ended, or was expired when it was first seen.
    hidden: bool,
    /// When it expires, if that were believed.
    expires: Option<Instant>,
}

type Rank = (bool, bool, Key);

impl<T: Kind> Table<T> {
    pub(crate) fn new(namespace: &str, lifetime: Duration) -> Self {
        Self {
            namespace: namespace.to_owned(),
            lifetime,
            objects: BTreeMap::new(),
            names: HashMap::new(),
            ends: Expiry::default(),
            away: false,
            deleted: HashSet::new(),
            to_say: BTreeMap::new(),
            shown: Store::default(),
        }
    }

    /// What look-ups see.
    pub(crate) fn shown(&self) -> &Store<T> {
        &self.shown
    }

    /// The object with this name in our namespace.
    pub(crate) fn own(&self, name: &str) -> Option<&Held<T>> {
        self.objects.get(&(self.namespace.clone(), name.to_owned()))
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Held<T>> {
        self.objects.get(key)
    }

    /// An object is there, in this state.
    pub(crate) fn is(&mut self, object: Object<T>, by: By, heard: Heard) {
        let key = key_of(&object.metadata);
        let version = version_of(&object.metadata);
        if object.metadata.uid.as_ref().is_some_and(|uid| self.deleted.contains(uid)) {
            return;
        }
        if let Some(known) = self.objects.get(&key).filter(|known| version != 0 && known.version >= version) {
            // The event was faster than the answer.
            let end = known.expires.filter(|_| by == By::Us && known.version == version);
            end.into_iter().for_each(|end| self.set_end(&key, Some(end)));
            return;
        }
        let item = object.item().inspect_err(|error| warn!(%error, "a resource is not understood"));
        match verdict::conditions(&object, item.as_ref(), &Timestamp::now().to_string()) {
            Some(conditions) => self.to_say.insert(key.clone(), (object.metadata.clone(), conditions)),
            None => self.to_say.remove(&key),
        };
        let item = item.ok().map(Arc::new);
        let end = item.as_deref().and_then(Kind::expires);
        let left = end.map(|end| end.duration_since(heard.clock).unwrap_or_default());
        // A registry that starts shows nobody who is gone for long.
        let hidden = by == By::Before && left.is_some_and(|left| left.is_zero());
        let expires = left.map(|left| heard.now + left);
        let end = expires.map(|expires| match by {
            By::Us => expires,
            By::Others | By::Before => expires.max(heard.now + self.lifetime) + heard.later,
        });
        self.set_end(&key, end);
        let meta = ObjectMeta { managed_fields: None, ..object.metadata };
        let before = self.objects.insert(key.clone(), Held { meta, version, item, hidden, expires });
        let before = before.and_then(|held| held.item);
        let after = self.objects.get(&key).and_then(|held| held.item.clone());
        if let Some(item) = &before {
            self.unname(item, &key);
        }
        if let Some(item) = &after {
            let rank = self.rank(item, &key);
            self.names.entry(item.name().to_owned()).or_default().insert(rank);
        }
        let names: BTreeSet<&str> = before.iter().chain(&after).map(|item| item.name()).collect();
        names.into_iter().for_each(|name| self.show(name));
    }

    /// An object is gone, if it is still this one.
    pub(crate) fn is_gone(&mut self, key: &Key, uid: Option<&String>) {
        if self.objects.get(key).is_none_or(|held| uid.is_some() && held.meta.uid.as_ref() != uid) {
            return;
        }
        self.ends.clear(&flat(key));
        self.to_say.remove(key);
        if let Some(item) = self.objects.remove(key).and_then(|held| held.item) {
            self.unname(&item, key);
            self.show(item.name());
        }
    }

    /// We have deleted it.
    pub(crate) fn deleted(&mut self, key: &Key, uid: Option<&String>) {
        self.deleted.extend(uid.cloned());
        self.is_gone(key, uid);
    }

    /// The API server says that it is deleted.
    pub(crate) fn said_deleted(&mut self, meta: &ObjectMeta) {
        if let Some(uid) = &meta.uid {
            self.deleted.remove(uid);
        }
        self.is_gone(&key_of(meta), meta.uid.as_ref());
    }

    /// What there is, all of it, as of a version.
    pub(crate) fn is_all(
        &mut self,
        objects: Vec<Object<T>>,
        version: &str,
        by: By,
        heard: impl Fn() -> Heard,
    ) {
        let version = version.parse().unwrap_or(u64::MAX);
        let there: BTreeSet<Key> = objects.iter().map(|object| key_of(&object.metadata)).collect();
        let gone = self.objects.iter().filter(|(key, held)| !there.contains(key) && held.version <= version);
        // What was written meanwhile is newer than the list.
        let gone: Vec<Key> = gone.map(|(key, _)| key.clone()).collect();
        gone.iter().for_each(|key| self.is_gone(key, None));
        for object in objects {
            self.is(object, by, heard());
        }
        self.deleted.clear();
    }

    /// What happens is not heard of from now on.
    pub(crate) fn is_away(&mut self) {
        self.away = true;
    }

    /// Nobody could reach the API server until now, and nobody could refresh anything.
    pub(crate) fn is_back(&mut self, heard: impl Fn() -> Heard) {
        self.away = false;
        let held = self.objects.iter().filter_map(|(key, held)| Some((key, held.expires?)));
        for (key, expires) in held {
            let Heard { now, later, .. } = heard();
            self.ends.set(&flat(key), expires.max(now + self.lifetime) + later);
        }
    }

    /// What ends, at `now` or next.
    pub(crate) fn next_end(&self) -> Option<Instant> {
        self.ends.next().filter(|_| !self.away)
    }

    /// Takes out one that has ended. It is shown until its deletion is answered.
    pub(crate) fn take_ended(&mut self, now: Instant) -> Option<Key> {
        if self.away {
            return None;
        }
        self.ends.pop_first_due(now).map(|flat| key(&flat))
    }

    /// It ends at another time, if it is still in this state.
    pub(crate) fn ends_at(&mut self, key: &Key, version: Option<&String>, at: Instant) {
        if self.objects.get(key).is_some_and(|held| held.meta.resource_version.as_ref() == version) {
            self.set_end(key, Some(at));
        }
    }

    /// What expires ends now, where this is so of it.
    pub(crate) fn end_now(&mut self, now: Instant, of: impl Fn(&T) -> bool) {
        let expires = |held: &&Held<T>| held.expires.is_some() && held.item.as_deref().is_some_and(&of);
        let ends: Vec<_> =
            self.objects.iter().filter(|(_, held)| expires(held)).map(|(key, _)| key.clone()).collect();
        ends.iter().for_each(|key| self.set_end(key, Some(now)));
    }

    /// It is not shown any more, if it is still in this state.
    pub(crate) fn hide(&mut self, key: &Key, version: Option<&String>) {
        let held = self.objects.get_mut(key);
        if let Some(held) = held.filter(|held| held.meta.resource_version.as_ref() == version) {
            held.hidden = true;
            if let Some(item) = held.item.clone() {
                self.show(item.name());
            }
        }
    }

    /// Takes out what is to be said on objects.
    pub(crate) fn take_to_say(&mut self) -> BTreeMap<Key, (ObjectMeta, Value)> {
        std::mem::take(&mut self.to_say)
    }

    /// Whether something is to be said.
    pub(crate) fn has_to_say(&self) -> bool {
        !self.to_say.is_empty()
    }

    fn set_end(&mut self, key: &Key, end: Option<Instant>) {
        match end {
            Some(end) => self.ends.set(&flat(key), end),
            None => self.ends.clear(&flat(key)),
        }
    }

    fn rank(&self, item: &T, key: &Key) -> Rank {
        (!item.path_ids().is_empty(), key.0 != self.namespace, key.clone())
    }

    fn unname(&mut self, item: &T, key: &Key) {
        let rank = self.rank(item, key);
        if let Some(ranks) = self.names.get_mut(item.name()) {
            ranks.remove(&rank);
            if ranks.is_empty() {
                self.names.remove(item.name());
            }
        }
    }

    /// Shows what a name stands for now.
    fn show(&self, name: &str) {
        let held = self.names.get(name).into_iter().flatten().filter_map(|(.., key)| self.objects.get(key));
        match held.filter(|held| !held.hidden).find_map(|held| held.item.clone()) {
            Some(item) => {
                self.shown.put(item);
            }
            None => {
                self.shown.remove(name);
            }
        }
    }
}

pub(crate) fn key_of(meta: &ObjectMeta) -> Key {
    (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

/// Since Kubernetes 1.35 versions may be compared, and before they could be: etcd counts. 0: this one cannot.
fn version_of(meta: &ObjectMeta) -> u64 {
    meta.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

// Neither namespaces nor names have a slash.
fn flat(key: &Key) -> String {
    format!("{}/{}", key.0, key.1)
}

fn key(flat: &str) -> Key {
    let (namespace, name) = flat.split_once('/').unwrap_or_default();
    (namespace.to_owned(), name.to_owned())
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::registry::NetworkServiceEndpoint;
    use nsm_registry::expiry::timestamp_of;

    use super::*;
    use nsm_identity::clock;

    const SECOND: Duration = Duration::from_secs(1);
    const LIFETIME: Duration = Duration::from_secs(60);

    type Endpoints = Table<NetworkServiceEndpoint>;

    /// Time as the test wants it.
    #[derive(Clone, Copy)]
    struct Clock(Instant, SystemTime);

    impl Clock {
        fn at(self, seconds: u32) -> Heard {
            let since = SECOND * seconds;
            Heard { now: self.0 + since, clock: self.1 + since, later: Duration::ZERO }
        }
    }

    fn setup() -> (Endpoints, Clock) {
        (Table::new("nsm-system", LIFETIME), Clock(Instant::now(), clock::now()))
    }

    /// `namespace/object`, in its state `version`, which is registered by `owner`, if anybody, until `end`.
    fn object(
        place: &str,
        version: u32,
        owner: &str,
        end: Option<SystemTime>,
    ) -> Object<NetworkServiceEndpoint> {
        let (namespace, name) = key(place);
        let meta = ObjectMeta {
            uid: Some(format!("uid of {place}")),
            namespace: Some(namespace),
            name: Some(name),
            resource_version: Some(version.to_string()),
            ..ObjectMeta::default()
        };
        let item = NetworkServiceEndpoint {
            name: "e".into(),
            url: format!("{place}:{version}"),
            expiration_time: end.map(timestamp_of),
            path_ids: Some(owner).filter(|owner| !owner.is_empty()).map(str::to_owned).into_iter().collect(),
            ..NetworkServiceEndpoint::default()
        };
        Object::new(meta, item)
    }

    fn shown(table: &Endpoints) -> Option<String> {
        table.shown().get("e").map(|endpoint| endpoint.url.clone())
    }

    #[test]
    fn the_newest_state_counts_whatever_is_heard_first() {
        let (mut table, clock) = setup();
        let state = |version| object("nsm-system/e", version, "alice", None);
        table.is(state(7), By::Us, clock.at(0));
        table.is(state(5), By::Others, clock.at(1));
        assert_eq!(shown(&table).as_deref(), Some("nsm-system/e:7"));
        table.is(state(10), By::Others, clock.at(1));
        assert_eq!(shown(&table).as_deref(), Some("nsm-system/e:10"), "numbers, not text");

        // What is said of what we have deleted comes late.
        table.deleted(&key("nsm-system/e"), Some(&"uid of nsm-system/e".to_owned()));
        table.is(state(11), By::Others, clock.at(2));
        assert_eq!(shown(&table), None);
        table.said_deleted(&state(12).metadata);
        table.is(state(13), By::Others, clock.at(3));
        assert_eq!(shown(&table).as_deref(), Some("nsm-system/e:13"));

        // A list is older than what was written while it was made.
        table.is_all(vec![], "12", By::Others, || clock.at(4));
        assert_eq!(shown(&table).as_deref(), Some("nsm-system/e:13"));
        table.is_all(vec![], "14", By::Others, || clock.at(4));
        assert_eq!(shown(&table), None);
        assert!(table.names.is_empty() && table.objects.is_empty());
    }

    #[test]
    fn of_several_of_one_name_the_first_counts() {
        let (mut table, clock) = setup();
        let mut expected = vec![];
        for (place, owner) in [
            ("z/registered", "bob"),
            ("a/registered", "bob"),
            ("nsm-system/registered", "bob"),
            ("z/own", ""),
            ("a/own", ""),
        ] {
            table.is(object(place, 1, owner, None), By::Others, clock.at(0));
            expected.push(format!("{place}:1"));
            assert_eq!(shown(&table).as_ref(), expected.last());
        }
        while let Some(first) = expected.pop() {
            assert_eq!(shown(&table), Some(first.clone()));
            table.is_gone(&key(first.trim_end_matches(":1")), None);
        }
        assert_eq!(shown(&table), None);
    }

    #[test]
    fn who_wrote_it_believes_its_end_and_others_wait_for_news() {
        let (mut table, clock) = setup();
        let until = |seconds: u32| Some(clock.1 + SECOND * seconds);
        let place = key("nsm-system/e");
        table.is(object("nsm-system/e", 1, "alice", until(20)), By::Us, clock.at(0));
        assert_eq!(table.next_end(), Some(clock.at(20).now));
        // Somebody whose clock is an hour late refreshes it.
        let late = Some(clock.1 - SECOND * 3600);
        table.is(object("nsm-system/e", 2, "alice", late), By::Others, clock.at(10));
        assert!(shown(&table).is_some());
        assert_eq!(table.next_end(), Some(clock.at(70).now), "a lifetime after it was heard of");
        table.is(object("nsm-system/e", 3, "alice", until(200)), By::Others, clock.at(10));
        assert_eq!(table.next_end(), Some(clock.at(200).now));
        // The event of our own write may be faster than its answer.
        table.is(object("nsm-system/e", 4, "alice", until(50)), By::Others, clock.at(20));
        table.is(object("nsm-system/e", 4, "alice", until(50)), By::Us, clock.at(20));
        assert_eq!(table.next_end(), Some(clock.at(50).now));

        // Nothing was heard for long: nobody could refresh it.
        table.is_away();
        assert_eq!(table.next_end(), None);
        assert_eq!(table.take_ended(clock.at(1000).now), None);
        table.is_back(|| clock.at(1000));
        assert_eq!(table.next_end(), Some(clock.at(1060).now));
        assert_eq!(table.take_ended(clock.at(1059).now), None);
        assert_eq!(table.take_ended(clock.at(1060).now), Some(key("nsm-system/e")));
        assert!(shown(&table).is_some(), "until its deletion is answered");
        let old = Some("3".to_owned());
        table.hide(&place, old.as_ref());
        assert!(shown(&table).is_some(), "that was another state");
        table.hide(&place, Some(&"4".to_owned()));
        assert_eq!(shown(&table), None);
        table.is(object("nsm-system/e", 5, "alice", until(2000)), By::Others, clock.at(1061));
        assert!(shown(&table).is_some());
    }

    #[test]
    fn a_registry_that_starts_shows_nobody_who_is_gone() {
        let (mut table, clock) = setup();
        let objects = vec![
            object("a/e", 1, "alice", Some(clock.1 - SECOND)),
            object("b/e", 2, "alice", Some(clock.1 + SECOND)),
        ];
        table.is_all(objects, "9", By::Before, || clock.at(0));
        assert_eq!(shown(&table).as_deref(), Some("b/e:2"));
        assert_eq!(table.take_ended(clock.at(60).now), Some(key("a/e")));
        assert_eq!(table.take_ended(clock.at(60).now), Some(key("b/e")));
        // Unless somebody refreshes it.
        table.is(object("a/e", 10, "alice", Some(clock.1 + SECOND)), By::Others, clock.at(61));
        assert_eq!(shown(&table).as_deref(), Some("a/e:10"));
    }
}
