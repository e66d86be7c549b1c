//! A registry's objects as custom resources (spec/registry.md 4).
//!
//! ```text
//!  register ── create, or replace what is known ──►  API server  ◄── other registries, people
//!      │                                                │
//!      └──────── the answer ────►  Table  ◄── list, watch
//!                                    │
//!                  look-ups, watches ┴ what has ended ── delete, if unchanged ──► API server
//! ```
//!
//! A registration of what is known is one call. Nothing is decided from what may be old: a write and a deletion name
//! the state that they mean, and where that is not there any more they decide again. Look-ups need no call, so that
//! they are answered while the API server is away; and since nobody can refresh anything then, nothing expires.

use std::{collections::BTreeSet, fmt, future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::TryStreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions, WatchEvent, WatchParams},
};
use nsm_api::pb::registry::{NetworkService, NetworkServiceEndpoint};
use nsm_identity::clock;
use nsm_registry::{Keeper, Keepers, store::Store};
use parking_lot::Mutex;
use rand::RngExt;
use serde_json::json;
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tracing::{info, warn};

use crate::{
    cluster::{Cluster, Error},
    nodes,
    resource::{Kind, Object},
    table::{By, Heard, Held, Key, Table},
};

/// Objects of one answer to a list.
const PAGE: u32 = 500;

/// How long a watch lasts; then the next goes on where it was. The API server ends it.
const WATCH: Duration = Duration::from_secs(60);

/// How much later than it should end a watch is taken for dead.
const SILENCE: Duration = Duration::from_secs(10);

/// How long it may take at most that something is said on an object.
const SAY: Duration = Duration::from_secs(1);

/// Pauses between tries while the API server is away.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// How a registry keeps things.
#[derive(Debug, Clone)]
pub struct KeeperConfig {
    /// Where its objects are written (`NSM_NAMESPACE`); those of all namespaces are read.
    pub namespace: String,
    /// How long an endpoint of another registry is believed to live that nothing is heard of (`NSM_EXPIRE_PERIOD`).
    pub lifetime: Duration,
    /// Whether what was registered at a node ends with the node, which takes the right to see nodes.
    pub follow_nodes: bool,
}

/// Opens the directories of a registry: returns when everything that is there is known.
///
/// # Errors
/// It cannot be read.
pub async fn open(cluster: &Cluster, config: &KeeperConfig) -> Result<Keepers, Error> {
    // One after the other: then what is missing is always the same.
    let services = Resources::<NetworkService>::open(cluster, config).await?;
    let mut endpoints = Resources::<NetworkServiceEndpoint>::open(cluster, config).await?;
    if config.follow_nodes {
        let (api, inner) = (cluster.client().into(), endpoints.inner.clone());
        endpoints.tasks.spawn(nodes::follow(api, move |gone| inner.end_at(gone)));
    }
    Ok(Keepers { services: Arc::new(services), endpoints: Arc::new(endpoints) })
}

/// As [`open`], for as long as it takes; `waits` is told what for whenever that changes.
pub async fn open_in_time(cluster: &Cluster, config: &KeeperConfig, waits: impl Fn(&Error)) -> Keepers {
    let (mut pauses, mut said) = (Pauses::new(), String::new());
    loop {
        match open(cluster, config).await {
            Ok(keepers) => return keepers,
            Err(error) if said != error.to_string() => {
                waits(&error);
                said = error.to_string();
            }
            Err(_) => {}
        }
        pauses.pause().await;
    }
}

/// The objects of one kind.
struct Resources<T: Kind> {
    inner: Arc<Inner<T>>,
    /// Follows what others do, and ends what is not refreshed, for as long as this lives.
    tasks: JoinSet<()>,
}

struct Inner<T: Kind> {
    cluster: Cluster,
    /// Of all namespaces, to read.
    all: Api<Object<T>>,
    namespace: String,
    lifetime: Duration,
    table: Mutex<Table<T>>,
    shown: Store<T>,
    /// Something may end earlier than was known.
    earlier: Notify,
    /// Something may be to be said on an object.
    said: Notify,
    /// A change was not answered: is the watch still alive?
    doubt: Notify,
}

impl<T: Kind> fmt::Debug for Resources<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resources").field("of", &T::PLURAL).field("in", &self.inner.cluster).finish()
    }
}

impl<T: Kind> Resources<T> {
    async fn open(cluster: &Cluster, config: &KeeperConfig) -> Result<Self, Error> {
        let table = Table::new(&config.namespace, config.lifetime);
        let inner = Arc::new(Inner {
            cluster: cluster.clone(),
            all: Api::all(cluster.client()),
            namespace: config.namespace.clone(),
            lifetime: config.lifetime,
            shown: table.shown().clone(),
            table: Mutex::new(table),
            earlier: Notify::new(),
            said: Notify::new(),
            doubt: Notify::new(),
        });
        let version = inner.list(By::Before).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(follow(inner.clone(), version));
        tasks.spawn(end(inner.clone()));
        tasks.spawn(say(inner.clone()));
        Ok(Self { inner, tasks })
    }
}

impl Inner<NetworkServiceEndpoint> {
    /// Nobody is at these addresses any more: what was registered there ends, unless it is refreshed meanwhile.
    fn end_at(&self, gone: &BTreeSet<String>) {
        let is_there = |nse: &NetworkServiceEndpoint| {
            let url: Option<http::Uri> = nse.url.parse().ok();
            let host = url.as_ref().and_then(http::Uri::host).map(|host| host.trim_matches(['[', ']']));
            host.is_some_and(|host| gone.contains(host))
        };
        self.table.lock().end_now(Instant::now(), is_there);
        self.earlier.notify_one();
    }
}

impl<T: Kind> Inner<T> {
    /// Objects of a namespace.
    fn of(&self, namespace: &str) -> Api<Object<T>> {
        Api::namespaced(self.cluster.client(), namespace)
    }

    fn place(&self, name: &str) -> String {
        format!("{}/{name}", self.namespace)
    }

    fn heard(&self) -> Heard {
        let spread = self.lifetime / 10;
        Heard {
            now: Instant::now(),
            clock: clock::now(),
            later: rand::rng().random_range(Duration::ZERO..=spread),
        }
    }

    /// An object is there; what it is called.
    fn is(&self, object: Object<T>, by: By) {
        let heard = self.heard();
        self.table.lock().is(object, by, heard);
        self.earlier.notify_one();
        self.said.notify_one();
    }

    async fn call<R>(
        &self,
        verb: &'static str,
        name: &str,
        call: impl Future<Output = kube::Result<R>>,
    ) -> Result<R, Error> {
        let answer = self.cluster.call::<T, R>(verb, &self.place(name), call).await;
        if matches!(answer, Err(Error::Away { .. })) && !matches!(verb, "list" | "watch") {
            self.doubt.notify_one();
        }
        answer
    }

    /// Reads everything, and returns the version of that.
    async fn list(&self, by: By) -> Result<String, Error> {
        let mut objects = Vec::new();
        let mut page = ListParams::default().limit(PAGE);
        loop {
            let list = self.call("list", "", self.all.list(&page)).await?;
            objects.extend(list.items);
            match list.metadata.continue_.filter(|next| !next.is_empty()) {
                Some(next) => page = ListParams::default().limit(PAGE).continue_token(&next),
                None => {
                    let version = list.metadata.resource_version.unwrap_or_default();
                    self.table.lock().is_all(objects, &version, by, || self.heard());
                    self.earlier.notify_one();
                    self.said.notify_one();
                    return Ok(version);
                }
            }
        }
    }

    /// Hears what happens after a version, until the watch ends. `version` is where to go on.
    async fn watch(&self, version: &mut String, reached: impl FnOnce()) -> Result<(), Error> {
        let seconds = u32::try_from(WATCH.as_secs()).unwrap_or(u32::MAX);
        let params = WatchParams::default().timeout(seconds);
        let end = Instant::now() + WATCH + SILENCE;
        let events = self.call("watch", "", self.all.watch(&params, version)).await?;
        let mut events = std::pin::pin!(events);
        reached();
        loop {
            let event = tokio::select! {
                event = events.try_next() => event,
                () = self.doubt.notified() => return Err(self.cluster.away("a change was not answered")),
                () = sleep_until(end) => return Err(self.cluster.away("its watch is silent")),
            };
            let event = match event {
                Ok(Some(event)) => event,
                Ok(None) => return Ok(()),
                Err(error) => return Err(self.cluster.explain::<T>("watch", "", &error).await),
            };
            let meta = match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    let next = object.metadata.resource_version.clone();
                    self.is(object, By::Others);
                    next
                }
                WatchEvent::Deleted(object) => {
                    self.table.lock().said_deleted(&object.metadata);
                    object.metadata.resource_version
                }
                WatchEvent::Bookmark(mark) => Some(mark.metadata.resource_version),
                WatchEvent::Error(status) => {
                    return Err(self.cluster.status::<T>("watch", version, &status));
                }
            };
            if let Some(next) = meta {
                *version = next;
            }
        }
    }

    /// What is there under this name in our namespace is not what was known: now it is known.
    async fn look(&self, name: &str) -> Result<(), Error> {
        match self.call("get", name, self.of(&self.namespace).get(name)).await {
            Ok(object) => {
                self.is(object, By::Others);
                Ok(())
            }
            Err(Error::NotFound { .. }) => {
                self.table.lock().is_gone(&(self.namespace.clone(), name.to_owned()), None);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Deletes an object in the state that it is known in.
    async fn delete(&self, key: &Key, meta: &ObjectMeta, state: bool) -> Result<(), Error> {
        let preconditions = Preconditions {
            uid: meta.uid.clone(),
            resource_version: meta.resource_version.clone().filter(|_| state),
        };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match self.call("delete", &key.1, self.of(&key.0).delete(&key.1, &params)).await {
            Ok(_) | Err(Error::NotFound { .. }) => {
                self.table.lock().deleted(key, meta.uid.as_ref());
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl<T: Kind> Keeper<T> for Resources<T> {
    fn table(&self) -> &Store<T> {
        &self.inner.shown
    }

    fn names(&self) -> bool {
        T::GENERATED.is_some()
    }

    async fn put(&self, mut item: T) -> Result<T, nsm_registry::Error> {
        let (inner, name) = (&self.inner, item.name().to_owned());
        check_name(&name)?;
        let changed = || nsm_registry::Error::Changed { name: name.clone() };
        let known = inner.table.lock().own(&name).cloned();
        let other = known.as_ref().and_then(|known| known.item.as_ref()).filter(|known| known.name() != name);
        if let Some(other) = other {
            return Err(nsm_registry::Error::BadName {
                why: format!(
                    "the {} {} stands for {:?} (spec.name); give one of them another name",
                    <T as Kind>::KIND,
                    inner.place(&name),
                    other.name()
                ),
                name,
            });
        }
        let api = inner.of(&inner.namespace);
        let params = PostParams::default();
        let written = match known {
            Some(known) => {
                let object = Object::new(known.meta, item.clone());
                inner.call("update", &name, api.replace(&name, &params, &object)).await
            }
            None => {
                let meta = ObjectMeta {
                    name: Some(name.clone()).filter(|name| !name.is_empty()),
                    generate_name: T::GENERATED.filter(|_| name.is_empty()).map(str::to_owned),
                    ..ObjectMeta::default()
                };
                let object = Object::new(meta, item.clone());
                inner.call("create", &name, api.create(&params, &object)).await
            }
        };
        match written {
            Ok(object) => {
                if name.is_empty() {
                    item.set_name(object.metadata.name.clone().unwrap_or_default());
                }
                inner.is(object, By::Us);
                Ok(item)
            }
            // Somebody was faster, or it is gone: what is there now decides.
            Err(Error::Conflict { .. } | Error::NotFound { .. }) => {
                inner.look(&name).await.map_err(kept)?;
                Err(changed())
            }
            Err(error) => Err(kept(error)),
        }
    }

    async fn remove(&self, name: &str) -> Result<(), nsm_registry::Error> {
        let inner = &self.inner;
        check_name(name)?;
        let known = inner.table.lock().own(name).cloned();
        let Some(Held { meta, item, .. }) = known else {
            // It may have been registered with another registry a moment ago: by whom?
            inner.look(name).await.map_err(kept)?;
            let found = inner.table.lock().own(name).is_some();
            let changed = || nsm_registry::Error::Changed { name: name.to_owned() };
            return if found { Err(changed()) } else { Ok(()) };
        };
        let key = (inner.namespace.clone(), name.to_owned());
        match inner.delete(&key, &meta, false).await {
            Ok(()) => Ok(()),
            Err(Error::Conflict { .. }) => {
                inner.look(name).await.map_err(kept)?;
                Err(nsm_registry::Error::Changed { name: name.to_owned() })
            }
            // What ends by itself is ended when the API server is back: who leaves need not wait for that.
            Err(Error::Away { server, why }) if item.is_some_and(|item| item.expires().is_some()) => {
                warn!(name, %server, why, "an endpoint has left; it is deleted when the API server is back");
                let mut table = inner.table.lock();
                table.hide(&key, meta.resource_version.as_ref());
                table.ends_at(&key, meta.resource_version.as_ref(), Instant::now());
                drop(table);
                inner.earlier.notify_one();
                Ok(())
            }
            Err(error) => Err(kept(error)),
        }
    }
}

fn kept(error: Error) -> nsm_registry::Error {
    nsm_registry::Error::NotKept(Arc::new(error))
}

/// Kubernetes' names of objects: DNS-1123 subdomains.
fn check_name(name: &str) -> Result<(), nsm_registry::Error> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let good = |label: &str| {
        let bytes = label.as_bytes();
        let ends = bytes.first().zip(bytes.last());
        ends.is_some_and(|(first, last)| plain(*first) && plain(*last))
            && bytes.iter().all(|b| plain(*b) || *b == b'-')
    };
    if name.is_empty() || name.len() <= 253 && name.split('.').all(good) {
        return Ok(());
    }
    let why = "it is no name of a Kubernetes object; expected lower-case letters, digits, '-' and '.', beginning and \
               ending with one of the former, at most 253";
    Err(nsm_registry::Error::BadName { name: name.to_owned(), why: why.to_owned() })
}

/// Pauses that grow, with some chance so that registries do not go in step.
struct Pauses(Duration);

impl Pauses {
    fn new() -> Self {
        Self(PAUSES.0)
    }

    async fn pause(&mut self) {
        let pause = rand::rng().random_range(self.0 / 2..=self.0);
        sleep(pause).await;
        self.0 = (self.0 * 2).min(PAUSES.1);
    }
}

/// Follows what happens to the objects, as long as somebody wants to know.
async fn follow<T: Kind>(inner: Arc<Inner<T>>, mut version: String) {
    let mut lost: Option<Instant> = None;
    let mut pauses = Pauses::new();
    loop {
        let began = Instant::now();
        let again = |lost: &mut Option<Instant>| {
            if let Some(since) = lost.take() {
                info!(
                    resource = T::PLURAL,
                    server = inner.cluster.server(),
                    away_s = since.elapsed().as_secs(),
                    "the API server is back"
                );
                inner.table.lock().is_back(|| inner.heard());
                inner.earlier.notify_one();
            }
        };
        let ended = if version.is_empty() {
            inner.list(By::Others).await.map(|listed| {
                version = listed;
                again(&mut lost);
            })
        } else {
            inner.watch(&mut version, || again(&mut lost)).await
        };
        match ended {
            // One that ends at once, again and again, is no good sign either.
            Ok(()) if began.elapsed() > PAUSES.1 => pauses = Pauses::new(),
            Ok(()) => pauses.pause().await,
            Err(Error::Gone { .. }) => {
                info!(resource = T::PLURAL, "too much has happened since; everything is read again");
                version.clear();
            }
            Err(error) => {
                if lost.is_none() {
                    warn!(resource = T::PLURAL, %error, "changes are not heard of; what is known is served");
                    inner.table.lock().is_away();
                    lost = Some(Instant::now());
                    pauses = Pauses::new();
                }
                pauses.pause().await;
            }
        }
    }
}

/// Says on objects what is to be said of them. All registries think the same: the first one says it.
async fn say<T: Kind>(inner: Arc<Inner<T>>) {
    loop {
        inner.said.notified().await;
        if !inner.table.lock().has_to_say() {
            continue;
        }
        let pause = rand::rng().random_range(Duration::ZERO..=SAY);
        sleep(pause).await;
        let to_say = inner.table.lock().take_to_say();
        for (key, (meta, conditions)) in to_say {
            let patch = Patch::Merge(json!({
                "metadata": {"resourceVersion": meta.resource_version},
                "status": {"conditions": conditions},
            }));
            let (api, params) = (inner.of(&key.0), PatchParams::default());
            match inner.call("patch", &key.1, api.patch_status(&key.1, &params, &patch)).await {
                Ok(object) => inner.is(object, By::Others),
                // It has changed, which is heard of; or upstream's definition has no status.
                Err(Error::Conflict { .. } | Error::NotFound { .. }) => {}
                Err(error) => warn!(%error, "what was not understood of a resource is not said on it"),
            }
        }
    }
}

/// Deletes what has ended, one after the other.
async fn end<T: Kind>(inner: Arc<Inner<T>>) {
    loop {
        let (ended, next) = {
            let mut table = inner.table.lock();
            (table.take_ended(Instant::now()), table.next_end())
        };
        if let Some(key) = ended {
            let held = inner.table.lock().get(&key).map(|held| held.meta.clone());
            let Some(meta) = held else { continue };
            let state = meta.resource_version.as_ref();
            let later = |after| inner.table.lock().ends_at(&key, state, Instant::now() + after);
            match inner.delete(&key, &meta, true).await {
                Ok(()) => {
                    info!(name = key.1, namespace = key.0, "an endpoint was not refreshed and has expired")
                }
                // It was refreshed with another registry: the watch tells.
                Err(Error::Conflict { .. }) => later(inner.lifetime),
                // Then nobody can refresh it either.
                Err(Error::Away { .. }) => later(PAUSES.1),
                Err(error) => {
                    warn!(%error, name = key.1, "an endpoint has expired, but its resource stays");
                    inner.table.lock().hide(&key, state);
                    later(inner.lifetime);
                }
            }
            continue;
        }
        tokio::select! {
            () = inner.earlier.notified() => {}
            () = async {
                match next {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_kubernetes() {
        for good in ["a", "gw-7c9f.x-1", "0", &"a".repeat(253)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["A", "a_b", "-a", "a-", "a..b", ".", "ä", "a b", &"a".repeat(254)] {
            let said = check_name(bad).expect_err(bad).to_string();
            assert!(said.contains("expected lower-case letters"), "{said}");
        }
    }
}
