//! Look-ups of a forwarder answered from watches at its manager: the first look-up of a service asks, and from then on
//! no request waits for the manager to be asked the same again.
//!
//! As in a manager's own replicas (`cache`) "nobody" is never answered from what is known, nor is anything overdue; and
//! a socket is sent once, not with each look-up.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures::{FutureExt, StreamExt};
use nsm_api::{
    matching,
    pb::registry::{NetworkService, NetworkServiceEndpoint},
};
use nsm_identity::clock;
use parking_lot::Mutex;
use tokio::time::{Instant, interval, sleep};
use tracing::debug;

use crate::{Client, Endpoint, EndpointEvent, Error, LookUp, cache::IDLE};

/// How long a manager that cannot be followed is left alone.
const PAUSE: Duration = Duration::from_secs(1);
/// Services that are followed at a time; for others the manager is asked.
const MOST: usize = 1024;

/// What a [`Client`] looks up, with what it has seen followed from then on. Clones share it.
#[derive(Debug, Clone)]
pub struct Following(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    client: Client,
    topics: Mutex<HashMap<String, Arc<Topic>>>,
}

#[derive(Debug)]
struct Topic {
    known: Mutex<Known>,
    used: Mutex<Instant>,
}

/// What the watches of a service have told.
#[derive(Debug, Default)]
struct Known {
    /// Whether that is all there is: a watch does not say where its first part ends.
    complete: bool,
    service: Option<NetworkService>,
    endpoints: BTreeMap<String, Endpoint>,
    /// Those that were not where they were said to be.
    doubted: HashSet<String>,
}

impl Known {
    fn put(&mut self, endpoint: Endpoint) {
        self.doubted.remove(&endpoint.nse.name);
        self.endpoints.insert(endpoint.nse.name.clone(), endpoint);
    }

    fn remove(&mut self, name: &str) {
        self.doubted.remove(name);
        self.endpoints.remove(name);
    }

    fn holds(&self, endpoint: &Endpoint, now: SystemTime) -> bool {
        !endpoint.is_expired(now) && !self.doubted.contains(&endpoint.nse.name)
    }
}

impl Following {
    /// Follows what is looked up through this client.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self(Arc::new(Shared { client, topics: Mutex::default() }))
    }

    /// What all that is known of a service says; `None` if not all is.
    fn known<T>(&self, service: &str, look: impl FnOnce(&Known) -> Option<T>) -> Option<T> {
        let topic = self.0.topics.lock().get(service).cloned()?;
        *topic.used.lock() = Instant::now();
        let known = topic.known.lock();
        known.complete.then(|| look(&known))?
    }

    /// Of whatever service it is.
    fn named(&self, query: &NetworkServiceEndpoint) -> Option<Endpoint> {
        let now = clock::now();
        let topics: Vec<_> = self.0.topics.lock().values().cloned().collect();
        topics.iter().find_map(|topic| {
            let known = topic.known.lock();
            let endpoint = known.endpoints.get(&query.name).filter(|_| known.complete)?;
            let fits = matching::endpoint_answers(query, &endpoint.nse) && known.holds(endpoint, now);
            fits.then(|| {
                *topic.used.lock() = Instant::now();
                endpoint.clone()
            })
        })
    }

    fn follow(&self, service: &str) {
        let mut topics = self.0.topics.lock();
        if topics.contains_key(service) || topics.len() >= MOST {
            return;
        }
        let topic = Arc::new(Topic { known: Mutex::default(), used: Mutex::new(Instant::now()) });
        topics.insert(service.to_owned(), Arc::clone(&topic));
        drop(topics);
        let (shared, service) = (Arc::downgrade(&self.0), service.to_owned());
        let client = self.0.client.clone();
        tokio::spawn(async move {
            let end = keep(&client, &shared, &service, &topic).await;
            let lost = end.is_err();
            debug!(service, end = end.err().map(|e| e.to_string()), "no longer followed");
            *topic.known.lock() = Known::default();
            if lost {
                sleep(PAUSE).await;
            }
            if let Some(shared) = shared.upgrade() {
                shared.topics.lock().remove(&service);
            }
        });
    }
}

/// Follows a service until the manager is lost (an error) or nobody asks for it.
async fn keep(client: &Client, shared: &Weak<Shared>, service: &str, topic: &Topic) -> Result<(), Error> {
    let (of_service, of_endpoints) = (of(service), endpoints_of(service));
    let mut services = client.watch_services(of_service.clone()).await?;
    let mut endpoints = client.watch_endpoints(of_endpoints.clone()).await?;
    // What look-ups find that begin after the watches, and the watches have not mentioned by then, belongs to what is
    // known; of everything else the watches know more.
    let listing =
        async { tokio::try_join!(client.find_services(of_service), client.find_endpoints(of_endpoints)) };
    let mut listing = std::pin::pin!(listing.fuse());
    let mut mentioned = HashSet::new();
    let mut clock = interval(IDLE / 4);
    loop {
        tokio::select! {
            biased;
            listed = &mut listing => {
                let (services, endpoints) = listed?;
                let mut known = topic.known.lock();
                if known.service.is_none() && !mentioned.contains(service) {
                    known.service = services.into_iter().find(|listed| listed.name == service);
                }
                for endpoint in endpoints {
                    if !mentioned.contains(&endpoint.nse.name) {
                        known.put(endpoint);
                    }
                }
                known.complete = true;
            }
            event = services.next() => {
                let Some((told, gone)) = event.transpose()? else { return Ok(()) };
                if told.name == service {
                    mentioned.insert(told.name.clone());
                    topic.known.lock().service = (!gone).then_some(told);
                }
            }
            event = endpoints.next() => {
                match event.transpose()? {
                    Some(EndpointEvent::Present(endpoint)) => {
                        mentioned.insert(endpoint.nse.name.clone());
                        topic.known.lock().put(endpoint);
                    }
                    Some(EndpointEvent::Gone(nse)) => {
                        topic.known.lock().remove(&nse.name);
                        mentioned.insert(nse.name);
                    }
                    None => return Ok(()),
                }
            }
            _ = clock.tick() => {
                if topic.known.lock().complete {
                    mentioned.clear();
                }
                if shared.strong_count() == 0 || topic.used.lock().elapsed() > IDLE {
                    return Ok(());
                }
            }
        }
    }
}

fn of(service: &str) -> NetworkService {
    NetworkService { name: service.to_owned(), ..NetworkService::default() }
}

fn endpoints_of(service: &str) -> NetworkServiceEndpoint {
    let network_service_names = vec![service.to_owned()];
    NetworkServiceEndpoint { network_service_names, ..NetworkServiceEndpoint::default() }
}

#[async_trait]
impl LookUp for Following {
    async fn service(&self, name: &str, payload: &str) -> Result<Option<NetworkService>, Error> {
        let fits = |service: &&NetworkService| payload.is_empty() || service.payload == payload;
        if let Some(known) = self.known(name, |known| known.service.as_ref().filter(fits).cloned()) {
            return Ok(Some(known));
        }
        let found = self.0.client.service(name, payload).await?;
        if found.is_some() {
            // Names that nobody serves are not followed.
            self.follow(name);
        }
        Ok(found)
    }

    async fn endpoints(&self, query: NetworkServiceEndpoint) -> Result<Vec<Endpoint>, Error> {
        let known = match &query.network_service_names[..] {
            [] if !query.name.is_empty() => self.named(&query).map(|endpoint| vec![endpoint]),
            [service, ..] => self.known(service, |known| {
                let now = clock::now();
                let found = known.endpoints.values();
                let found: Vec<_> = found.filter(|e| matching::endpoint_answers(&query, &e.nse)).collect();
                let holds = !found.is_empty() && found.iter().all(|endpoint| known.holds(endpoint, now));
                holds.then(|| found.into_iter().cloned().collect())
            }),
            [] => None,
        };
        if let Some(known) = known {
            return Ok(known);
        }
        let named = !query.name.is_empty();
        let found = self.endpoints_now(query).await?;
        // Requests that come from other nodes name their endpoint, and nobody asks for its service here.
        if named && let Some(service) = found.iter().find_map(|e| e.nse.network_service_names.first()) {
            self.follow(service);
        }
        Ok(found)
    }

    async fn endpoints_now(&self, query: NetworkServiceEndpoint) -> Result<Vec<Endpoint>, Error> {
        let found = self.0.client.endpoints(query).await?;
        let topics: Vec<_> = self.0.topics.lock().values().cloned().collect();
        for topic in topics {
            let mut known = topic.known.lock();
            for endpoint in &found {
                if known.doubted.contains(&endpoint.nse.name) {
                    known.put(endpoint.clone());
                }
            }
        }
        Ok(found)
    }

    fn doubt(&self, name: &str) {
        for topic in self.0.topics.lock().values() {
            let mut known = topic.known.lock();
            if known.endpoints.contains_key(name) {
                known.doubted.insert(name.to_owned());
            }
        }
    }
}
