//! What is known of wires, and what of it has to be said when. No calls, no clock of its own.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use nsm_identity::clock;
use serde_json::Value;
use tokio::time::Instant;

use super::{
    Name, Trouble, Wish,
    object::{Seen, Shape},
};

/// Wires of a node, and of one of its pods: pods choose what they call their connections.
const MOST: usize = 16_384;
const MOST_OF_POD: usize = 64;
/// How long a wire is as it is before that is said: most are made at once, and most that fall are back at once.
const SETTLES: Duration = Duration::from_secs(1);
/// A client that parts with an endpoint closes its wire and asks for it again.
const PARTS: Duration = Duration::from_secs(5);
/// How long somebody may be silent who asked in vain, before he is thought to have given up.
const GAVE_UP: Duration = Duration::from_secs(600);
/// How often what does not change is said again: API servers forget events after an hour.
const AGAIN: Duration = Duration::from_secs(600);
/// What is said of one wire in a row before there are pauses, and the longest of those.
const FREE: u32 = 4;
const LONGEST: Duration = Duration::from_secs(60);

/// How a wire is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing was answered yet.
    Asking,
    Up,
    /// It was up.
    Down,
    /// It never was.
    NotUp,
    /// Nobody wants it any more.
    Ended,
}

impl State {
    const ALL: [Self; 5] = [Self::Asking, Self::Up, Self::Down, Self::NotUp, Self::Ended];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Asking => "Asking",
            Self::Up => "Up",
            Self::Down => "Down",
            Self::NotUp => "NotUp",
            Self::Ended => "Ended",
        }
    }

    /// What stands in a wire's status.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    fn settles(self) -> Duration {
        match self {
            Self::Up => Duration::ZERO,
            Self::Asking | Self::Down | Self::NotUp => SETTLES,
            Self::Ended => PARTS,
        }
    }
}

/// What the pod was told last.
#[derive(Debug, Clone)]
pub(crate) struct Said {
    pub(crate) state: State,
    pub(crate) endpoint: String,
    pub(crate) trouble: String,
    /// The event by which it was, and how often; not by this process: none.
    pub(crate) event: Option<(String, u32)>,
    pub(crate) at: Instant,
}

impl Said {
    /// Whether it is time to repeat it.
    pub(crate) fn is_old(&self, now: Instant) -> bool {
        matches!(self.state, State::Down | State::NotUp) && now >= self.at + AGAIN
    }
}

/// Whether a pod waits for its wires.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Gate {
    /// Nobody has looked.
    #[default]
    Unknown,
    /// It does not.
    Open,
    /// It does, and this was said to it: what is missing.
    Waits(Option<Option<String>>),
}

/// What became of an edit.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    /// What it was to be.
    pub(crate) wish: Wish,
    pub(crate) generation: i64,
    /// Why it is not so.
    pub(crate) trouble: Option<Trouble>,
    pub(crate) at: SystemTime,
}

/// What the API server has of a wire.
#[derive(Debug, Clone, Default)]
pub(crate) struct Told {
    /// There is an object, with this status.
    pub(crate) object: Option<Value>,
    pub(crate) said: Option<Said>,
}

#[derive(Debug)]
struct Entry {
    wish: Wish,
    uid: String,
    state: State,
    since: SystemTime,
    shape: Option<Shape>,
    /// Here, or as an earlier process knew it.
    was_up: bool,
    trouble: Option<(Trouble, SystemTime)>,
    outcome: Option<Outcome>,
    asked: Instant,
    /// When it is to be said how it is.
    due: Option<Instant>,
    /// Counts changes: what is said meanwhile is not what is by now.
    version: u64,
    told: Told,
    spoke: Option<Instant>,
    spoken: u32,
}

impl Entry {
    fn new(wish: Wish, now: Instant) -> Self {
        Self {
            wish,
            uid: String::new(),
            state: State::Asking,
            since: clock::now(),
            shape: None,
            was_up: false,
            trouble: None,
            outcome: None,
            asked: now,
            due: Some(now + State::Asking.settles()),
            version: 0,
            told: Told::default(),
            spoke: None,
            spoken: 0,
        }
    }

    fn turn(&mut self, state: State, now: Instant, clock: SystemTime) {
        if self.state != state {
            (self.state, self.since) = (state, clock);
            self.due = None;
        }
        self.changed(now);
    }

    /// Whoever changes all the time is said less often, and is said in the end.
    fn changed(&mut self, now: Instant) {
        self.version += 1;
        let quiet = match (self.spoke, self.spoken.checked_sub(FREE)) {
            (Some(spoke), Some(over)) => {
                let pause = Duration::from_secs(1).saturating_mul(2_u32.saturating_pow(over));
                spoke + pause.min(LONGEST)
            }
            _ => now,
        };
        let at = (now + self.state.settles()).max(quiet);
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

/// What a wire is to, as it was asked for or edited.
pub(crate) fn service<'w>(wish: &'w Wish, outcome: Option<&'w Outcome>) -> &'w str {
    let applied = outcome.filter(|outcome| outcome.trouble.is_none());
    applied.map_or(&wish.service, |outcome| &outcome.wish.service)
}

/// What is to be said next.
#[derive(Debug)]
pub(crate) enum Next {
    Job(Box<Job>),
    /// Nothing until then, if nothing happens.
    At(Instant),
    Nothing,
}

/// How a wire is, what of it was said, and how the pod's others are.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) seen: Seen,
    pub(crate) told: Told,
    pub(crate) gate: Gate,
    /// What is missing of the pod's wires.
    pub(crate) missing: Option<String>,
    pub(crate) was_up: bool,
    version: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    wires: BTreeMap<Name, Entry>,
    /// By namespace and name.
    gates: BTreeMap<(String, String), Gate>,
}

impl Table {
    pub(crate) fn len(&self) -> usize {
        self.wires.len()
    }

    pub(crate) fn asked(&mut self, name: &Name, wish: Wish, now: Instant) {
        if !self.wires.contains_key(name)
            && (self.wires.len() >= MOST || self.of_pod(name).count() >= MOST_OF_POD)
        {
            tracing::debug!(?name, "one wire too many: nothing is said of it");
            return;
        }
        let entry = self.wires.entry(name.clone()).or_insert_with(|| Entry::new(wish.clone(), now));
        entry.asked = now;
        entry.wish = wish;
        if entry.state == State::Ended {
            entry.turn(State::Asking, now, clock::now());
        }
    }

    pub(crate) fn is_of(&mut self, name: &Name, uid: &str, now: Instant) {
        let Some(entry) = self.wires.get_mut(name).filter(|entry| entry.uid != uid) else { return };
        // A namesake of the pod that was.
        let new = !entry.uid.is_empty();
        uid.clone_into(&mut entry.uid);
        if new {
            (entry.told, entry.shape, entry.trouble) = (Told::default(), None, None);
            entry.outcome = None;
            entry.was_up = false;
            entry.turn(State::Asking, now, clock::now());
            self.gates.remove(&(name.namespace.clone(), name.pod.clone()));
        }
    }

    pub(crate) fn is(
        &mut self,
        name: &Name,
        state: State,
        shape: Option<Shape>,
        trouble: Option<Trouble>,
        now: Instant,
        clock: SystemTime,
    ) {
        let Some(entry) = self.wires.get_mut(name) else { return };
        let trouble = trouble.filter(|trouble| Some(trouble) != entry.trouble.as_ref().map(|(old, _)| old));
        let same = entry.state == state && trouble.is_none();
        if same && shape.as_ref().is_none_or(|shape| Some(shape) == entry.shape.as_ref()) {
            return;
        }
        entry.shape = shape.or(entry.shape.take());
        entry.was_up |= state == State::Up;
        entry.trouble = trouble.map(|trouble| (trouble, clock)).or(entry.trouble.take());
        entry.turn(state, now, clock);
    }

    /// The pod, where that is known.
    pub(crate) fn uid(&self, name: &Name) -> String {
        self.wires.get(name).map(|entry| entry.uid.clone()).unwrap_or_default()
    }

    /// What became of an edit; `None`: there is none any more.
    pub(crate) fn applied(&mut self, name: &Name, outcome: Option<Outcome>, now: Instant) {
        let Some(entry) = self.wires.get_mut(name) else { return };
        let said = |of: &Option<Outcome>| of.as_ref().map(|of| (of.generation, of.trouble.clone()));
        if said(&entry.outcome) != said(&outcome) {
            entry.outcome = outcome;
            entry.changed(now);
        }
    }

    pub(crate) fn failed(&mut self, name: &Name, trouble: Trouble, now: Instant, clock: SystemTime) {
        let Some(entry) = self.wires.get_mut(name) else { return };
        entry.asked = now;
        let state = if entry.was_up { State::Down } else { State::NotUp };
        if entry.told.said.as_ref().is_some_and(|said| said.is_old(now)) {
            entry.changed(now);
        }
        self.is(name, state, None, Some(trouble), now, clock);
    }

    fn of_pod<'a>(&'a self, name: &'a Name) -> impl Iterator<Item = (&'a Name, &'a Entry)> {
        let first = Name { connection: String::new(), ..name.clone() };
        self.wires
            .range(first..)
            .take_while(|(other, _)| (&other.namespace, &other.pod) == (&name.namespace, &name.pod))
    }

    /// What of the pod's wires is missing.
    fn missing(&self, name: &Name) -> Option<String> {
        let mut some = false;
        let mut missing = Vec::new();
        for (_, entry) in self.of_pod(name) {
            match entry.state {
                State::Up => some = true,
                State::Ended => {}
                state => {
                    let why = entry.trouble.as_ref().map(|(trouble, _)| format!(": {}", trouble.message));
                    let service = service(&entry.wish, entry.outcome.as_ref());
                    missing.push(format!("{service} is {}{}", state.name(), why.unwrap_or_default()));
                }
            }
        }
        match (some, missing.is_empty()) {
            (true, true) => None,
            (false, true) => Some("no wire is asked for".to_owned()),
            (_, false) => Some(missing.join("; ")),
        }
    }

    /// What is due.
    pub(crate) fn next(&mut self, now: Instant) -> Next {
        for entry in self.wires.values_mut() {
            // Who has the wire has a lease, which tells its end.
            if matches!(entry.state, State::Asking | State::NotUp) && now >= entry.asked + GAVE_UP {
                entry.state = State::Ended;
                (entry.trouble, entry.due) = (None, Some(now));
                entry.version += 1;
            }
        }
        let known = self.wires.iter().filter(|(_, entry)| !entry.uid.is_empty());
        let first = known.filter_map(|(name, entry)| Some((entry.due?, name))).min();
        match first {
            Some((due, name)) if due <= now => {
                let name = name.clone();
                let Some(job) = self.job(&name) else { return Next::Nothing };
                Next::Job(Box::new(job))
            }
            Some((due, _)) => Next::At(due.min(now + LONGEST)),
            None if self.wires.is_empty() => Next::Nothing,
            None => Next::At(now + LONGEST),
        }
    }

    fn job(&self, name: &Name) -> Option<Job> {
        let entry = self.wires.get(name)?;
        let seen = Seen {
            name: name.clone(),
            uid: entry.uid.clone(),
            wish: entry.wish.clone(),
            state: entry.state,
            since: entry.since,
            shape: entry.shape.clone(),
            trouble: entry.trouble.clone(),
            outcome: entry.outcome.clone(),
        };
        let gate = self.gates.get(&(name.namespace.clone(), name.pod.clone())).cloned().unwrap_or_default();
        let missing = self.missing(name);
        let (told, was_up, version) = (entry.told.clone(), entry.was_up, entry.version);
        Some(Job { seen, told, gate, missing, was_up, version })
    }

    /// A job is for later, unless something changes.
    pub(crate) fn put_off(&mut self, job: &Job, until: Instant) {
        if let Some(entry) = self.wires.get_mut(&job.seen.name).filter(|entry| entry.version == job.version) {
            entry.due = Some(until);
        }
    }

    /// A job is done, or as much of it as could be; `again`: what is left is to be tried then.
    pub(crate) fn done(&mut self, job: &Job, again: Option<Instant>, now: Instant) {
        let name = &job.seen.name;
        let Some(entry) = self.wires.get_mut(name).filter(|entry| entry.uid == job.seen.uid) else { return };
        entry.told = job.told.clone();
        entry.was_up |= job.was_up;
        if entry.was_up && entry.state == State::NotUp {
            entry.state = State::Down;
        }
        let recently = entry.spoke.is_some_and(|spoke| now < spoke + 3 * LONGEST);
        entry.spoken = if recently { entry.spoken.saturating_add(1) } else { 1 };
        entry.spoke = Some(now);
        if entry.version == job.version {
            entry.due = again;
        }
        let gate = (name.namespace.clone(), name.pod.clone());
        if entry.version == job.version && entry.state == State::Ended && again.is_none() {
            self.wires.remove(name);
        }
        if self.of_pod(name).next().is_some() {
            self.gates.insert(gate, job.gate.clone());
        } else {
            self.gates.remove(&gate);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(pod: &str, connection: &str) -> Name {
        Name { namespace: "a".into(), pod: pod.into(), connection: connection.into() }
    }

    fn wish() -> Wish {
        Wish { service: "finance".into(), ..Wish::default() }
    }

    fn trouble(text: &str) -> Trouble {
        Trouble { message: text.into(), hint: String::new() }
    }

    fn shape(endpoint: &str) -> Shape {
        Shape { endpoint: endpoint.into(), ..Shape::default() }
    }

    /// All that is said by then, as it would be by a server that takes everything.
    fn all_said(table: &mut Table, now: Instant) -> Vec<(String, State)> {
        let mut said = Vec::new();
        while let Next::Job(mut job) = table.next(now) {
            let Job { seen, told, .. } = &mut *job;
            said.push((seen.name.connection.clone(), seen.state));
            told.said = Some(Said {
                state: seen.state,
                endpoint: String::new(),
                trouble: seen.trouble_text().to_owned(),
                event: None,
                at: now,
            });
            table.done(&job, None, now);
        }
        said
    }

    #[test]
    fn what_is_up_is_said_at_once_and_what_falls_when_it_stays_down() {
        let (mut table, now, clock) = (Table::default(), Instant::now(), clock::now());
        let wire = name("web", "web-0");
        table.asked(&wire, wish(), now);
        table.is(&wire, State::Up, Some(shape("gw-1")), None, now, clock);
        assert!(matches!(table.next(now), Next::At(_)), "whose it is is not known");
        table.is_of(&wire, "uid-1", now);
        let said = |table: &mut Table, after: Duration| all_said(table, now + after);
        assert_eq!(said(&mut table, Duration::ZERO), [("web-0".to_owned(), State::Up)]);
        assert_eq!(said(&mut table, Duration::ZERO), []);
        // A refresh is no news.
        table.asked(&wire, wish(), now);
        table.is(&wire, State::Up, Some(shape("gw-1")), None, now, clock);
        assert_eq!(said(&mut table, LONGEST), []);
        // It falls and is back.
        table.is(&wire, State::Down, None, None, now, clock);
        assert_eq!(said(&mut table, SETTLES / 2), []);
        table.is(&wire, State::Up, Some(shape("gw-1")), None, now + SETTLES / 2, clock);
        assert_eq!(said(&mut table, SETTLES), [("web-0".to_owned(), State::Up)]);
        // It stays down.
        table.is(&wire, State::Down, None, None, now, clock);
        assert_eq!(said(&mut table, SETTLES), [("web-0".to_owned(), State::Down)]);
        // It is closed, and asked for again, as a client does that heals; and then closed.
        table.is(&wire, State::Ended, None, None, now, clock);
        table.asked(&wire, wish(), now);
        assert_eq!(said(&mut table, PARTS), [("web-0".to_owned(), State::Asking)]);
        table.is(&wire, State::Ended, None, None, now, clock);
        assert_eq!(said(&mut table, 2 * LONGEST), [("web-0".to_owned(), State::Ended)]);
        assert_eq!((table.len(), table.gates.len()), (0, 0));
        assert!(matches!(table.next(now), Next::Nothing));
    }

    #[test]
    fn who_asks_in_vain_all_the_time_is_said_ever_less_often_and_who_gives_up_is_forgotten() {
        let (mut table, begin, clock) = (Table::default(), Instant::now(), clock::now());
        let wire = name("web", "web-0");
        table.asked(&wire, wish(), begin);
        table.is_of(&wire, "uid-1", begin);
        let mut said = 0;
        for n in 0..3000_u32 {
            let now = begin + Duration::from_millis(200) * n;
            table.asked(&wire, wish(), now);
            table.failed(&wire, trouble(&format!("reason {n}")), now, clock);
            said += all_said(&mut table, now).len();
        }
        assert!((10..=20).contains(&said), "{said} in ten minutes");
        let end = begin + Duration::from_secs(600);
        // The same all the time: said again, seldom.
        let mut said = 0;
        for n in 0..6000_u32 {
            let now = end + Duration::from_millis(200) * n;
            table.failed(&wire, trouble("the same"), now, clock);
            said += all_said(&mut table, now).len();
        }
        assert!((2..=4).contains(&said), "{said} in twenty minutes");
        let silent = end + Duration::from_secs(1200) + GAVE_UP;
        assert_eq!(all_said(&mut table, silent), [("web-0".to_owned(), State::Ended)]);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_pod_waits_for_all_of_its_wires_and_its_namesake_begins_anew() {
        let (mut table, now, clock) = (Table::default(), Instant::now(), clock::now());
        let (one, two, other) = (name("web", "web-0"), name("web", "web-1"), name("web-1", "web-0"));
        for wire in [&one, &two, &other] {
            table.asked(wire, wish(), now);
            table.is_of(wire, "uid-1", now);
        }
        let missing = |table: &Table| table.missing(&one).unwrap_or_default();
        assert_eq!(missing(&table), "finance is Asking; finance is Asking");
        table.is(&one, State::Up, Some(shape("gw")), None, now, clock);
        table.failed(&two, trouble("no endpoint"), now, clock);
        assert_eq!(missing(&table), "finance is NotUp: no endpoint");
        table.is(&two, State::Up, Some(shape("gw")), None, now, clock);
        assert_eq!(table.missing(&one), None);
        assert_eq!(all_said(&mut table, now).len(), 2);
        table.is(&two, State::Ended, None, None, now, clock);
        assert_eq!(table.missing(&one), None, "who wants one wire less has all");
        table.is(&one, State::Ended, None, None, now, clock);
        assert_eq!(missing(&table), "no wire is asked for");

        table.asked(&one, wish(), now);
        table.is_of(&one, "uid-2", now);
        let Next::Job(job) = table.next(now + SETTLES) else { panic!("nothing is due") };
        assert_eq!(
            (job.seen.uid.as_str(), job.told.said.is_some(), job.gate),
            ("uid-2", false, Gate::Unknown)
        );
    }

    #[test]
    fn what_became_of_an_edit_is_said_once_and_goes_with_it() {
        let (mut table, now, clock) = (Table::default(), Instant::now(), clock::now());
        let wire = name("web", "web-0");
        table.asked(&wire, wish(), now);
        table.is_of(&wire, "uid-1", now);
        table.is(&wire, State::Up, Some(shape("gw-1")), None, now, clock);
        assert_eq!(all_said(&mut table, now).len(), 1);
        let outcome = |generation, why: Option<&str>| {
            let wish = Wish { service: "audit".into(), ..Wish::default() };
            Some(Outcome { wish, generation, trouble: why.map(trouble), at: clock })
        };
        let mut becomes = |of: Option<Outcome>| {
            table.applied(&wire, of, now);
            let Next::Job(job) = table.next(now + LONGEST) else { return None };
            table.done(&job, None, now);
            Some(service(&job.seen.wish, job.seen.outcome.as_ref()).to_owned())
        };
        assert_eq!(
            becomes(outcome(2, Some("no endpoint"))).as_deref(),
            Some("finance"),
            "it stays as it was"
        );
        assert_eq!(becomes(outcome(2, Some("no endpoint"))), None);
        assert_eq!(becomes(outcome(2, None)).as_deref(), Some("audit"));
        assert_eq!(becomes(outcome(2, None)), None, "a refresh is no news");
        assert_eq!(becomes(outcome(3, None)).as_deref(), Some("audit"));
        assert_eq!(becomes(None).as_deref(), Some("finance"));
        assert_eq!(becomes(None), None);
    }

    #[test]
    fn there_are_bounds() {
        let (mut table, now) = (Table::default(), Instant::now());
        for n in 0..2 * MOST_OF_POD {
            table.asked(&name("web", &n.to_string()), wish(), now);
        }
        assert_eq!(table.len(), MOST_OF_POD);
        for n in 0..MOST {
            table.asked(&name(&format!("pod-{n}"), "0"), wish(), now);
        }
        assert_eq!(table.len(), MOST);
        table.failed(&name("unknown", "0"), trouble("x"), now, clock::now());
        assert_eq!(table.len(), MOST);
    }

    #[test]
    fn what_could_not_be_said_is_tried_again_as_it_is_then() {
        let (mut table, now, clock) = (Table::default(), Instant::now(), clock::now());
        let wire = name("web", "web-0");
        table.asked(&wire, wish(), now);
        table.is_of(&wire, "uid-1", now);
        table.is(&wire, State::Up, Some(shape("gw-1")), None, now, clock);
        let Next::Job(job) = table.next(now) else { panic!("nothing is due") };
        let later = now + Duration::from_secs(30);
        table.done(&job, Some(later), now);
        assert!(matches!(table.next(now), Next::At(at) if at == later));
        let Next::Job(job) = table.next(later) else { panic!("nothing is due") };
        // It changes while that is said.
        table.is(&wire, State::Up, Some(shape("gw-2")), None, later, clock);
        table.done(&job, None, later);
        assert!(matches!(table.next(later), Next::Job(_)));
    }
}
