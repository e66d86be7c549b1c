//! The forwarder without sockets: questions, answers, time and chance go in, [`Action`]s come out.
//!
//! A question becomes a job. A job goes through its steps, one after the other: the name as it is, then the name with
//! each search domain, each of them where it is at home and then, if there is no such name, elsewhere. A step asks all its
//! servers at once, by UDP, and by TCP where the answer does not fit or none comes. The first answer with records ends
//! the job. A step in which somebody has said that there is nothing waits a moment for the others and ends: a short one
//! for those that came with him, and the time of a datagram for those that did not.
//!
//! Everything is bounded: jobs, questions that wait for the same job, packets under way, and the time of each.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
    vec,
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::Name,
};

use crate::{
    cache::Cache,
    config::{Config, Configs, Step},
    message::{self, Asked, Key, Question, Told},
};

/// Questions that are worked on at a time.
pub const MAX_JOBS: usize = 512;
/// Clients that wait for the same answer. Two forwarders that ask each other end here, or at the end of the budget.
pub const MAX_WAITING: usize = 64;
/// Packets that are under way to servers.
pub const MAX_EXCHANGES: usize = 1024;
/// How long a question may take: upstream's.
pub const BUDGET: Duration = Duration::from_secs(5);
/// How long the other servers of a step have once one that came with them has said that there is nothing.
pub const GRACE: Duration = Duration::from_millis(250);
/// How long a server has by UDP before it is asked by TCP.
pub const UDP_PATIENCE: Duration = Duration::from_secs(1);

/// A packet under way to a server: each has a socket of its own, connected to that server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExchangeId(u64);

/// How a packet travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// In a stream, after its length.
    Tcp,
}

/// What has to be done.
#[derive(Debug)]
pub enum Action<C> {
    /// Send a packet to a server from a new socket; what comes back there goes to [`Forwarder::answer`].
    Ask {
        /// Its number.
        exchange: ExchangeId,
        /// Whom.
        server: SocketAddr,
        /// How.
        transport: Transport,
        /// What.
        packet: Vec<u8>,
    },
    /// Nobody waits for this one any more: close its socket.
    Forget(ExchangeId),
    /// Send a packet to a client.
    Reply(C, Vec<u8>),
}

/// Answers clients by asking servers. `C` is how the caller knows a client.
#[derive(Debug)]
pub struct Forwarder<C> {
    configs: Configs,
    /// Ourselves: never asked.
    own: Option<SocketAddr>,
    cache: Cache,
    jobs: HashMap<Key, Job<C>>,
    exchanges: HashMap<ExchangeId, Exchange>,
    next: u64,
}

#[derive(Debug)]
struct Job<C> {
    waiting: Vec<(C, Transport, Question)>,
    steps: vec::IntoIter<Step>,
    name: Name,
    end: Instant,
    step_end: Instant,
    /// Until then the others of this step are waited for once one has said that there is nothing, if they may know more.
    patience: Instant,
    alike: bool,
    retry: Option<Instant>,
    /// Answers of this step without records: that there are none, or that there is no such name.
    empty: Option<Message>,
    missing: Option<Message>,
    /// What was said of the name as it was asked for.
    denied: Option<Message>,
}

#[derive(Debug)]
struct Exchange {
    key: Key,
    id: u16,
    server: SocketAddr,
    transport: Transport,
}

impl<C> Job<C> {
    /// Somebody has said that there is nothing: the others have little time left, or, where they came from elsewhere and
    /// may well have it, the time of a datagram.
    fn hurry(&mut self, now: Instant) {
        let until = if self.alike { now + GRACE } else { self.patience.max(now + GRACE) };
        self.step_end = self.step_end.min(until);
    }
}

impl<C> Default for Forwarder<C> {
    fn default() -> Self {
        Self {
            configs: Configs::default(),
            own: None,
            cache: Cache::default(),
            jobs: HashMap::new(),
            exchanges: HashMap::new(),
            next: 0,
        }
    }
}

impl<C> Forwarder<C> {
    /// One that does not ask itself.
    #[must_use]
    pub fn new(own: SocketAddr) -> Self {
        Self { own: Some(own), ..Self::default() }
    }

    /// What a connection brought, instead of what it brought before. What is under way goes on as it was begun.
    pub fn set(&mut self, id: &str, mut configs: Vec<Config>) {
        for config in &mut configs {
            config.servers.retain(|server| Some(*server) != self.own);
        }
        if self.configs.set(id, configs) {
            self.cache.clear();
        }
    }

    /// How many questions are worked on, and how many packets are under way.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        (self.jobs.len(), self.exchanges.len())
    }

    /// A client has sent this.
    pub fn question(
        &mut self,
        now: Instant,
        client: C,
        transport: Transport,
        packet: &[u8],
        random: &mut dyn FnMut() -> u16,
    ) -> Vec<Action<C>> {
        let question = match message::asked(packet) {
            Asked::Question(question) => *question,
            Asked::Refuse(packet) => return vec![Action::Reply(client, packet)],
            Asked::Ignore => return Vec::new(),
        };
        let key = question.key.clone();
        if let Some((name, answer)) = self.cache.get(&key, now) {
            return replies([(client, transport, question)], Some((&name, &answer)));
        }
        if let Some(job) = self.jobs.get_mut(&key) {
            if job.waiting.len() < MAX_WAITING {
                job.waiting.push((client, transport, question));
                return Vec::new();
            }
            return replies([(client, transport, question)], None);
        }
        let steps = self.configs.steps(&key.name);
        if steps.is_empty() || self.jobs.len() >= MAX_JOBS {
            return replies([(client, transport, question)], None);
        }
        let job = Job {
            waiting: vec![(client, transport, question)],
            steps: steps.into_iter(),
            name: key.name.clone(),
            end: now + BUDGET,
            step_end: now,
            patience: now,
            alike: true,
            retry: None,
            empty: None,
            missing: None,
            denied: None,
        };
        self.jobs.insert(key.clone(), job);
        let mut actions = Vec::new();
        self.next_step(now, &key, random, &mut actions);
        actions
    }

    /// This has come for an exchange. Without an action it was not what was asked for, and the exchange goes on.
    pub fn answer(
        &mut self,
        now: Instant,
        exchange: ExchangeId,
        packet: &[u8],
        random: &mut dyn FnMut() -> u16,
    ) -> Vec<Action<C>> {
        let mut actions = Vec::new();
        let Some(asked) = self.exchanges.get(&exchange) else { return actions };
        let Some(job) = self.jobs.get_mut(&asked.key) else { return actions };
        let told = message::told(packet, asked.id, &job.name, &asked.key);
        if matches!(told, Told::Other) {
            return actions;
        }
        let Some(asked) = self.exchanges.remove(&exchange) else { return actions };
        actions.push(Action::Forget(exchange));
        match told {
            Told::Truncated if asked.transport == Transport::Udp => {
                self.ask(&asked.key, asked.server, Transport::Tcp, random, &mut actions);
            }
            Told::Answer(answer) if answer.metadata.response_code == ResponseCode::NoError => {
                if answer.answers.is_empty() {
                    job.empty.get_or_insert(*answer);
                    job.hurry(now);
                } else {
                    self.finish(now, &asked.key, Some((*answer, packet.len())), &mut actions);
                    return actions;
                }
            }
            Told::Answer(answer) if answer.metadata.response_code == ResponseCode::NXDomain => {
                job.missing.get_or_insert(*answer);
                job.hurry(now);
            }
            // It cannot or does not want to: the others may.
            _ => {}
        }
        self.end_step_if_over(now, &asked.key, random, &mut actions);
        actions
    }

    /// Nothing can come for an exchange any more.
    pub fn failed(
        &mut self,
        now: Instant,
        exchange: ExchangeId,
        random: &mut dyn FnMut() -> u16,
    ) -> Vec<Action<C>> {
        let mut actions = Vec::new();
        let Some(asked) = self.exchanges.remove(&exchange) else { return actions };
        actions.push(Action::Forget(exchange));
        if asked.transport == Transport::Udp {
            self.ask(&asked.key, asked.server, Transport::Tcp, random, &mut actions);
        }
        self.end_step_if_over(now, &asked.key, random, &mut actions);
        actions
    }

    /// When [`Forwarder::tick`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let of = |job: &Job<C>| job.retry.map_or(job.step_end, |retry| retry.min(job.step_end));
        self.jobs.values().map(of).min()
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant, random: &mut dyn FnMut() -> u16) -> Vec<Action<C>> {
        let mut actions = Vec::new();
        let due: Vec<_> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.step_end <= now || job.retry.is_some_and(|retry| retry <= now))
            .map(|(key, _)| key.clone())
            .collect();
        for key in due {
            if let Some(job) = self.jobs.get_mut(&key)
                && job.step_end > now
            {
                job.retry = None;
                for id in self.of(&key) {
                    if self.exchanges.get(&id).is_some_and(|exchange| exchange.transport == Transport::Udp)
                        && let Some(silent) = self.exchanges.remove(&id)
                    {
                        actions.push(Action::Forget(id));
                        self.ask(&key, silent.server, Transport::Tcp, random, &mut actions);
                    }
                }
            }
            self.end_step_if_over(now, &key, random, &mut actions);
        }
        actions
    }

    fn of(&self, key: &Key) -> Vec<ExchangeId> {
        let mut ids: Vec<_> =
            self.exchanges.iter().filter(|(_, exchange)| exchange.key == *key).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    fn ask(
        &mut self,
        key: &Key,
        server: SocketAddr,
        transport: Transport,
        random: &mut dyn FnMut() -> u16,
        actions: &mut Vec<Action<C>>,
    ) {
        let Some(job) = self.jobs.get(key) else { return };
        if self.exchanges.len() >= MAX_EXCHANGES {
            return;
        }
        let id = random();
        let Some(packet) = message::ask(id, &job.name, key) else { return };
        let exchange = ExchangeId(self.next);
        self.next += 1;
        self.exchanges.insert(exchange, Exchange { key: key.clone(), id, server, transport });
        actions.push(Action::Ask { exchange, server, transport, packet });
    }

    fn end_step_if_over(
        &mut self,
        now: Instant,
        key: &Key,
        random: &mut dyn FnMut() -> u16,
        actions: &mut Vec<Action<C>>,
    ) {
        let Some(job) = self.jobs.get_mut(key) else { return };
        let over = job.step_end <= now || !self.exchanges.values().any(|exchange| exchange.key == *key);
        if !over {
            return;
        }
        // The name is there, only without records of that kind: no search domain makes it another.
        if let Some(answer) = job.empty.take() {
            self.finish(now, key, Some((answer, 0)), actions);
            return;
        }
        let missing = job.missing.take();
        if job.name == key.name {
            job.denied = job.denied.take().or(missing);
        }
        self.forget_exchanges(key, actions);
        self.next_step(now, key, random, actions);
    }

    /// Goes on with the next step of a job, or ends it.
    fn next_step(
        &mut self,
        now: Instant,
        key: &Key,
        random: &mut dyn FnMut() -> u16,
        actions: &mut Vec<Action<C>>,
    ) {
        loop {
            let Some(job) = self.jobs.get_mut(key) else { return };
            let left = u32::try_from(job.steps.len()).unwrap_or(u32::MAX);
            let time = job.end.saturating_duration_since(now);
            let step = if time.is_zero() { None } else { job.steps.next() };
            let Some(step) = step else {
                let denied = job.denied.take().map(|answer| (answer, 0));
                job.name = key.name.clone();
                self.finish(now, key, denied, actions);
                return;
            };
            // What is left of the time is shared: servers that are silent do not eat up that of the search domains.
            let time = time / left.max(1);
            job.name = step.name;
            job.step_end = now + time;
            job.patience = now + UDP_PATIENCE.min(time / 2);
            job.retry = Some(job.patience);
            job.alike = step.alike;
            for server in step.servers {
                self.ask(key, server, Transport::Udp, random, actions);
            }
            if self.exchanges.values().any(|exchange| exchange.key == *key) {
                return;
            }
        }
    }

    /// Ends a job. An answer comes with the length of its packet, if it is worth keeping.
    fn finish(
        &mut self,
        now: Instant,
        key: &Key,
        answer: Option<(Message, usize)>,
        actions: &mut Vec<Action<C>>,
    ) {
        self.forget_exchanges(key, actions);
        let Some(job) = self.jobs.remove(key) else { return };
        if let Some((answer, bytes)) = &answer
            && *bytes > 0
        {
            self.cache.put(key, &job.name, answer, *bytes, now);
        }
        actions.extend(replies(job.waiting, answer.as_ref().map(|(answer, _)| (&job.name, answer))));
    }

    fn forget_exchanges(&mut self, key: &Key, actions: &mut Vec<Action<C>>) {
        for id in self.of(key) {
            self.exchanges.remove(&id);
            actions.push(Action::Forget(id));
        }
    }
}

fn replies<C>(
    waiting: impl IntoIterator<Item = (C, Transport, Question)>,
    answer: Option<(&Name, &Message)>,
) -> Vec<Action<C>> {
    let reply = |(client, transport, question): (C, Transport, Question)| {
        message::reply(&question, answer, transport == Transport::Udp)
            .map(|packet| Action::Reply(client, packet))
    };
    waiting.into_iter().filter_map(reply).collect()
}
