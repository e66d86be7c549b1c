//! Look-ups answered from watches: one watch at the registry for each service that is asked for.
//!
//! The first look-up of a service goes to the registry; from then on a watch keeps a replica of what
//! it would answer, for as long as somebody asks. Watches of the same service share it. Upstream's
//! manager asks the registry several times for every request and holds a watch for every wire
//! (spec/registry.md 11, cost 1 and 6).
//!
//! A replica may be behind by the time that a message takes. Hence "nobody" is never answered from
//! it, and what is registered through this process is put into it at once.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use nsm_api::pb::registry::{NetworkService, NetworkServiceEndpoint};
use nsm_identity::clock;
use nsm_transport::Peer;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, interval, timeout},
};
use tonic::Status;
use tracing::debug;

use crate::{
    Error,
    expiry::time_of,
    server::{Context, Directory, Events},
    store::{Item, Store},
};

/// A replica that nobody asks for is given up after this time: later than a wire asks again.
pub(crate) const IDLE: Duration = Duration::from_secs(300);
/// Replicas at a time; what is asked for beyond goes to the registry.
const MOST: usize = 1024;
/// How long a watch waits for a replica before it makes a watch of its own.
const PATIENCE: Duration = Duration::from_secs(5);

/// An object that is looked up by service.
pub(crate) trait Topical: Item {
    /// The service that a query asks for, if a replica of that service holds all that answers it.
    fn topic(&self) -> Option<&str>;
    /// A query for everything of a service.
    fn of_topic(topic: &str) -> Self;
    /// The services whose replicas hold this object.
    fn topics(&self) -> Vec<&str>;
    /// Whether it should have been refreshed or ended by now: then the replica is not to be trusted
    /// (upstream's registry stops telling anybody anything when one watcher stalls).
    fn is_overdue(&self, now: SystemTime) -> bool;
}

impl Topical for NetworkService {
    fn topic(&self) -> Option<&str> {
        (!self.name.is_empty()).then_some(&self.name)
    }

    fn of_topic(topic: &str) -> Self {
        Self { name: topic.to_owned(), ..Self::default() }
    }

    fn topics(&self) -> Vec<&str> {
        vec![&self.name]
    }

    fn is_overdue(&self, _: SystemTime) -> bool {
        false
    }
}

impl Topical for NetworkServiceEndpoint {
    /// Those by name are not shared: a watch is its owner's, and a look-up is answered from whatever replica has it.
    fn topic(&self) -> Option<&str> {
        if self.name.is_empty() { self.network_service_names.first().map(String::as_str) } else { None }
    }

    fn of_topic(topic: &str) -> Self {
        Self { network_service_names: vec![topic.to_owned()], ..Self::default() }
    }

    fn topics(&self) -> Vec<&str> {
        self.network_service_names.iter().map(String::as_str).collect()
    }

    fn is_overdue(&self, now: SystemTime) -> bool {
        self.expiration_time.as_ref().is_some_and(|end| time_of(end) <= now)
    }
}

/// A directory before another one whose answers it keeps.
pub(crate) struct Cached<T: Topical>(Arc<Shared<T>>);

struct Shared<T: Topical> {
    registry: Arc<dyn Directory<T>>,
    replicas: Mutex<HashMap<String, Replica<T>>>,
}

struct Replica<T: Topical> {
    store: Store<T>,
    state: watch::Receiver<State>,
    used: Arc<Mutex<Instant>>,
}

impl<T: Topical> Clone for Replica<T> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone(), state: self.state.clone(), used: self.used.clone() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// What was there when the watch began may be missing.
    Filling,
    Complete,
}

impl<T: Topical> Cached<T> {
    pub(crate) fn new(registry: Arc<dyn Directory<T>>) -> Self {
        Self(Arc::new(Shared { registry, replicas: Mutex::default() }))
    }

    fn replica(&self, topic: &str) -> Option<Replica<T>> {
        let replica = self.0.replicas.lock().get(topic).cloned()?;
        *replica.used.lock() = Instant::now();
        Some(replica)
    }

    /// What a query for one name finds in the replicas: a refresh names the endpoint that its wire goes to.
    fn named(&self, query: &T) -> Option<Arc<T>> {
        let now = clock::now();
        let replicas = self.0.replicas.lock();
        let complete = replicas.values().filter(|replica| *replica.state.borrow() == State::Complete);
        let mut found = complete.filter_map(|replica| Some((replica, replica.store.get(query.name())?)));
        let (replica, item) = found.find(|(_, item)| item.answers(query) && !item.is_overdue(now))?;
        *replica.used.lock() = Instant::now();
        Some(item)
    }

    /// The replica of a service, made if there is none; `None` if there are too many.
    fn follow(&self, topic: &str) -> Option<Replica<T>> {
        if let Some(replica) = self.replica(topic) {
            return Some(replica);
        }
        let mut replicas = self.0.replicas.lock();
        if replicas.len() >= MOST {
            return None;
        }
        let (sender, state) = watch::channel(State::Filling);
        let replica = Replica { store: Store::default(), state, used: Arc::new(Mutex::new(Instant::now())) };
        replicas.insert(topic.to_owned(), replica.clone());
        drop(replicas);
        tokio::spawn({
            let (shared, replica, topic) = (Arc::downgrade(&self.0), replica.clone(), topic.to_owned());
            let registry = self.0.registry.clone();
            async move {
                let end = keep(registry, &shared, &topic, &replica, &sender).await;
                debug!(
                    kind = T::KIND,
                    topic,
                    end = end.err().map(|e| e.to_string()),
                    "a replica is given up"
                );
                if let Some(shared) = shared.upgrade() {
                    shared.replicas.lock().remove(&topic);
                }
                // Those who share the watch see its end by the end of the sender.
                drop(sender);
            }
        });
        Some(replica)
    }
}

/// Keeps a replica until the registry is lost (an error) or nobody asks for it.
async fn keep<T: Topical>(
    registry: Arc<dyn Directory<T>>,
    shared: &Weak<Shared<T>>,
    topic: &str,
    replica: &Replica<T>,
    state: &watch::Sender<State>,
) -> Result<(), Error> {
    let mut events = registry.find(T::of_topic(topic), true, None).await?;
    // A watch does not say where its first part ends. A look-up that begins after it does: what the
    // look-up finds and the watch has not mentioned by then belongs into the replica; of everything
    // else the watch knows more.
    let listing =
        async { registry.find(T::of_topic(topic), false, None).await?.try_collect::<Vec<_>>().await };
    let mut listing = std::pin::pin!(listing.fuse());
    let mut mentioned = HashSet::new();
    let mut clock = interval(IDLE / 4);
    loop {
        let filling = *state.borrow() == State::Filling;
        tokio::select! {
            biased;
            listed = &mut listing, if filling => {
                for (item, _) in listed? {
                    if !mentioned.contains(item.name()) {
                        replica.store.put(item);
                    }
                }
                mentioned = HashSet::new();
                state.send_replace(State::Complete);
            }
            event = events.next() => {
                let Some(event) = event else { return Ok(()) };
                let (item, deleted) = event?;
                if filling {
                    mentioned.insert(item.name().to_owned());
                }
                match deleted {
                    true => drop(replica.store.remove(item.name())),
                    false => drop(replica.store.put(item)),
                }
            }
            _ = clock.tick() => {
                let idle = replica.used.lock().elapsed() > IDLE && replica.store.watchers() == 0;
                if idle || shared.strong_count() == 0 {
                    return Ok(());
                }
            }
        }
    }
}

#[async_trait]
impl<T: Topical> Directory<T> for Cached<T> {
    fn known(&self, name: &str) -> Option<Arc<T>> {
        self.0.registry.known(name)
    }

    async fn register(&self, cx: &mut Context, item: T) -> Result<T, Error> {
        let answer = self.0.registry.register(cx, item).await?;
        let replicas = self.0.replicas.lock();
        for replica in answer.topics().iter().filter_map(|topic| replicas.get(*topic)) {
            replica.store.put(answer.clone());
        }
        Ok(answer)
    }

    async fn unregister(&self, cx: &mut Context, item: T) -> Result<(), Error> {
        let name = item.name().to_owned();
        self.0.registry.unregister(cx, item).await?;
        // Whatever the caller says of its services.
        for replica in self.0.replicas.lock().values() {
            replica.store.remove(&name);
        }
        Ok(())
    }

    async fn find(&self, query: T, watch: bool, peer: Option<&Peer>) -> Result<Events<T>, Error> {
        let Some(topic) = query.topic().map(str::to_owned) else {
            return match self.named(&query).filter(|_| !watch) {
                Some(item) => Ok(stream::iter([Ok(((*item).clone(), false))]).boxed()),
                None => self.0.registry.find(query, watch, peer).await,
            };
        };
        if watch {
            let Some(mut replica) = self.follow(&topic) else {
                return self.0.registry.find(query, watch, peer).await;
            };
            let complete =
                replica.state.wait_for(|state| *state == State::Complete).map(|state| state.is_ok());
            if timeout(PATIENCE, complete).await != Ok(true) {
                return self.0.registry.find(query, watch, peer).await;
            }
            return Ok(shared_watch(&replica, query));
        }
        if let Some(replica) = self.replica(&topic)
            && *replica.state.borrow() == State::Complete
        {
            let found = replica.store.find(&query);
            let now = clock::now();
            if !found.is_empty() && !found.iter().any(|item| item.is_overdue(now)) {
                return Ok(stream::iter(found).map(|item| Ok(((*item).clone(), false))).boxed());
            }
        }
        let found: Vec<_> = self.0.registry.find(query, watch, peer).await?.try_collect().await?;
        if !found.is_empty() {
            // Names that nobody serves make no replicas.
            self.follow(&topic);
        }
        Ok(stream::iter(found.into_iter().map(Ok)).boxed())
    }
}

fn shared_watch<T: Topical>(replica: &Replica<T>, query: T) -> Events<T> {
    let mut state = replica.state.clone();
    // The sender is dropped when the registry's watch is lost; until then nothing is ever false.
    let lost = async move { drop(state.wait_for(|_| false).await) };
    let ended = Err(Error::from(Status::unavailable("the watch at the registry was lost; watch again")));
    let events = replica.store.watch(query).map(|event| Ok(((*event.item).clone(), event.deleted)));
    events.take_until(lost).chain(stream::iter([ended])).boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        expiry::timestamp_of,
        keeper::{Keepers, Services},
        path::RegistrationPath,
    };
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A registry, with what it is asked.
    struct Counting<T> {
        directory: Arc<dyn Directory<T>>,
        finds: AtomicUsize,
        watches: AtomicUsize,
        /// Watches end when this changes.
        restart: watch::Sender<u32>,
    }

    impl<T: Item> Counting<T> {
        fn new(directory: impl Directory<T>) -> Arc<Self> {
            let (finds, watches, restart) = Default::default();
            Arc::new(Self { directory: Arc::new(directory), finds, watches, restart })
        }

        fn counts(&self) -> (usize, usize) {
            (self.finds.load(Ordering::SeqCst), self.watches.load(Ordering::SeqCst))
        }
    }

    #[async_trait]
    impl<T: Item> Directory<T> for Counting<T> {
        fn known(&self, name: &str) -> Option<Arc<T>> {
            self.directory.known(name)
        }

        async fn register(&self, cx: &mut Context, item: T) -> Result<T, Error> {
            self.directory.register(cx, item).await
        }

        async fn unregister(&self, cx: &mut Context, item: T) -> Result<(), Error> {
            self.directory.unregister(cx, item).await
        }

        async fn find(&self, query: T, watch: bool, peer: Option<&Peer>) -> Result<Events<T>, Error> {
            if watch { &self.watches } else { &self.finds }.fetch_add(1, Ordering::SeqCst);
            let mut restart = self.restart.subscribe();
            let end = async move { drop(restart.changed().await) };
            Ok(self.directory.find(query, watch, peer).await?.take_until(end).boxed())
        }
    }

    fn service(name: &str, payload: &str) -> NetworkService {
        NetworkService { name: name.into(), payload: payload.into(), ..Default::default() }
    }

    async fn payloads(cached: &Cached<NetworkService>, name: &str) -> Vec<String> {
        let found = cached.find(service(name, ""), false, None).await.expect("found");
        found.map_ok(|(s, _)| s.payload).try_collect().await.expect("no error")
    }

    async fn settle(mut until: impl AsyncFnMut() -> bool) {
        while !until().await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn look_ups_and_watches_share_one_watch() {
        let registry = Counting::new(Services(Keepers::memory([service("a", "IP")]).services));
        let cached = Cached::new(registry.clone() as Arc<dyn Directory<_>>);
        let counts = || registry.counts();
        assert_eq!(payloads(&cached, "a").await, ["IP"]);
        settle(async || cached.replica("a").is_some_and(|r| *r.state.borrow() == State::Complete)).await;
        assert_eq!(counts(), (2, 1), "the first look-up, and what fills the replica");
        for _ in 0..10 {
            assert_eq!(payloads(&cached, "a").await, ["IP"]);
        }
        let mut watches = vec![];
        for _ in 0..10 {
            watches.push(cached.find(service("a", ""), true, None).await.expect("watch"));
        }
        assert_eq!(counts(), (2, 1));

        // A change reaches the look-ups and every watch, once.
        let mut cx = Context::own(RegistrationPath::default());
        registry.register(&mut cx, service("a", "ETHERNET")).await.expect("registered");
        settle(async || payloads(&cached, "a").await == ["ETHERNET"]).await;
        for events in &mut watches {
            for expected in ["IP", "ETHERNET"] {
                assert_eq!(events.next().await.expect("event").expect("no error").0.payload, expected);
            }
        }
        // "Nobody" is always the registry's answer, and makes no replica.
        assert!(payloads(&cached, "b").await.is_empty() && payloads(&cached, "b").await.is_empty());
        assert_eq!(counts(), (4, 1));
        // What is registered through this process shows at once.
        cached.register(&mut cx, service("a", "IP")).await.expect("registered");
        assert_eq!(payloads(&cached, "a").await, ["IP"]);
        cached.unregister(&mut cx, service("a", "")).await.expect("unregistered");
        assert!(payloads(&cached, "a").await.is_empty());

        // The registry is lost: all watches end with an error, the next look-up asks it again.
        cached.register(&mut cx, service("a", "IP")).await.expect("registered");
        registry.restart.send_modify(|count| *count += 1);
        for events in &mut watches {
            let last = events.by_ref().collect::<Vec<_>>().await.pop();
            assert!(matches!(last, Some(Err(_))));
        }
        settle(async || cached.replica("a").is_none()).await;
        let before = counts().0;
        assert_eq!(payloads(&cached, "a").await, ["IP"]);
        assert_eq!(counts().0, before + 1);
        // Nobody asks: given up.
        drop(watches);
        tokio::time::sleep(IDLE * 2).await;
        assert!(cached.0.replicas.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_followed_is_found_by_name_and_nobody_else() {
        let nse = |name: &str, url: &str| NetworkServiceEndpoint {
            name: name.into(),
            url: url.into(),
            network_service_names: vec!["s".into()],
            ..Default::default()
        };
        let registry = Counting::new(Mute(Store::default()));
        let mut cx = Context::own(RegistrationPath::default());
        for (name, url) in [("a", "tcp://1:1"), ("b", "tcp://2:2")] {
            registry.register(&mut cx, nse(name, url)).await.expect("registered");
        }
        let cached = Cached::new(registry.clone() as Arc<dyn Directory<_>>);
        let find = async |query: NetworkServiceEndpoint| {
            let found = cached.find(query, false, None).await.expect("found");
            found.map_ok(|(nse, _)| nse.name).try_collect::<Vec<_>>().await.expect("no error")
        };
        let by_name = |name: &str| NetworkServiceEndpoint { name: name.into(), ..Default::default() };
        assert_eq!((find(by_name("a")).await, registry.counts()), (vec!["a".to_owned()], (1, 0)));
        assert_eq!(find(NetworkServiceEndpoint::of_topic("s")).await, ["a", "b"]);
        settle(async || cached.replica("s").is_some_and(|r| *r.state.borrow() == State::Complete)).await;
        let asked = registry.counts();
        assert_eq!((find(by_name("b")).await, registry.counts()), (vec!["b".to_owned()], asked));
        // Whoever answers other things differently is not who is meant, and "nobody" is the registry's answer.
        let elsewhere = NetworkServiceEndpoint { url: "tcp://9".into(), ..by_name("b") };
        assert!(find(elsewhere).await.is_empty() && find(by_name("c")).await.is_empty());
        assert_eq!(registry.counts().0, asked.0 + 2);
        // A watch by name is its owner's.
        drop(cached.find(by_name("a"), true, None).await.expect("watch"));
        assert_eq!(registry.counts().1, asked.1 + 1);
    }

    /// A registry whose watches say nothing after their beginning.
    struct Mute(crate::store::Store<NetworkServiceEndpoint>);

    #[async_trait]
    impl Directory<NetworkServiceEndpoint> for Mute {
        fn known(&self, _: &str) -> Option<Arc<NetworkServiceEndpoint>> {
            None
        }

        async fn register(
            &self,
            _: &mut Context,
            item: NetworkServiceEndpoint,
        ) -> Result<NetworkServiceEndpoint, Error> {
            self.0.put(item.clone());
            Ok(item)
        }

        async fn unregister(&self, _: &mut Context, _: NetworkServiceEndpoint) -> Result<(), Error> {
            Ok(())
        }

        async fn find(
            &self,
            query: NetworkServiceEndpoint,
            watch: bool,
            _: Option<&Peer>,
        ) -> Result<Events<NetworkServiceEndpoint>, Error> {
            let found = stream::iter(self.0.find(&query)).map(|item| Ok(((*item).clone(), false)));
            Ok(if watch { found.chain(stream::pending()).boxed() } else { found.boxed() })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_with_something_overdue_is_not_trusted() {
        let nse = |end: SystemTime| NetworkServiceEndpoint {
            name: "a".into(),
            network_service_names: vec!["s".into()],
            expiration_time: Some(timestamp_of(end)),
            ..Default::default()
        };
        let registry = Counting::new(Mute(Store::default()));
        let mut cx = Context::own(RegistrationPath::default());
        let soon = clock::now() + Duration::from_millis(50);
        registry.register(&mut cx, nse(soon)).await.expect("registered");
        let cached = Cached::new(registry.clone() as Arc<dyn Directory<_>>);
        let ends = async || {
            let found = cached.find(NetworkServiceEndpoint::of_topic("s"), false, None).await.expect("found");
            found.map_ok(|(nse, _)| nse.expiration_time).try_collect::<Vec<_>>().await.expect("no error")
        };
        assert_eq!(ends().await, [Some(timestamp_of(soon))]);
        settle(async || cached.replica("s").is_some_and(|r| *r.state.borrow() == State::Complete)).await;
        // Refreshed at the registry, whose watch does not tell.
        let later = clock::now() + Duration::from_secs(3600);
        registry.register(&mut cx, nse(later)).await.expect("registered");
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(ends().await, [Some(timestamp_of(later))]);
    }
}
