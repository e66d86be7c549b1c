//! What became of the wires of a node's pods, said where people look: a resource `Wire` beside each pod, events on the
//! pod, and the condition `networkservicemesh.io/wires` where the pod waits for it (`spec.readinessGates`).
//!
//! Whoever makes wires notes what happens in [`Wires`], which costs it nothing but a lock; [`Writer`] says it, one call
//! after the other, of each wire only how it is by then. While the API server is away nothing piles up. The other way round,
//! [`Reader`] follows what people write into those resources: [`Wires::edit`].

mod edits;
mod object;
mod table;
mod writer;

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use nsm_api::pb::connection::Connection;
use nsm_identity::clock;
use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

#[doc(hidden)]
pub use self::edits::read;
use self::{
    edits::Known,
    object::Shape,
    table::{Outcome, State, Table},
};
pub use self::{
    edits::{Edit, Reader},
    object::CONDITION,
    writer::Writer,
};

/// A wire, as its pod calls it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod.
    pub pod: String,
    /// What the pod calls the connection.
    pub connection: String,
}

/// What a pod asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wish {
    /// The service.
    pub service: String,
    /// What the service chooses an endpoint by.
    pub labels: BTreeMap<String, String>,
}

/// What is wrong with a wire, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What is wrong.
    pub message: String,
    /// What to do, where that is known.
    pub hint: String,
}

impl Trouble {
    /// Reads what hops say: the hint stands at the end, in brackets.
    #[must_use]
    pub fn said(text: &str) -> Self {
        let (message, hint) = text
            .strip_suffix(')')
            .and_then(|text| text.rsplit_once(" (hint: "))
            .unwrap_or((text.strip_suffix(' ').unwrap_or(text), ""));
        Self { message: object::bounded(message).to_owned(), hint: object::bounded(hint).to_owned() }
    }
}

/// The wires of a node's pods, as they are now.
#[derive(Debug, Clone, Default)]
pub struct Wires(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    table: Mutex<Table>,
    /// There is something to say.
    news: Notify,
    edits: Mutex<Known>,
    /// There is something else to ask for.
    edited: Notify,
}

impl Wires {
    /// A pod asks for a wire, for the first time or again.
    pub fn asked(&self, name: &Name, wish: Wish) {
        self.note(|table, now, _| table.asked(name, wish, now));
    }

    /// The pod that it is; until that is known nothing is said of its wires.
    pub fn is_of(&self, name: &Name, uid: &str) {
        self.note(|table, now, _| table.is_of(name, uid, now));
    }

    /// The wire is there.
    pub fn up(&self, name: &Name, connection: &Connection) {
        let shape = Shape::of(connection);
        self.note(|table, now, clock| table.is(name, State::Up, Some(shape), None, now, clock));
    }

    /// It was there.
    pub fn down(&self, name: &Name, trouble: Option<Trouble>) {
        self.note(|table, now, clock| table.is(name, State::Down, None, trouble, now, clock));
    }

    /// It was asked for in vain.
    pub fn failed(&self, name: &Name, trouble: Trouble) {
        self.note(|table, now, clock| table.failed(name, trouble, now, clock));
    }

    /// Nobody wants it any more.
    pub fn ended(&self, name: &Name, trouble: Option<Trouble>) {
        self.note(|table, now, clock| table.is(name, State::Ended, None, trouble, now, clock));
    }

    /// What somebody has made of a pod's wish.
    #[must_use]
    pub fn edit(&self, name: &Name) -> Option<Edit> {
        let edits = self.0.edits.lock();
        // Most are edited by nobody.
        edits.of(name, "")?;
        let uid = self.0.table.lock().uid(name);
        edits.of(name, &uid).cloned()
    }

    /// The wire is as it was edited; with trouble: it cannot be, and stays as it was. An edit that is out of date by now
    /// is nobody's any more.
    pub fn applied(&self, name: &Name, generation: i64, trouble: Option<Trouble>) {
        let mut edits = self.0.edits.lock();
        let Some(edit) = edits.of(name, "").filter(|edit| edit.generation == generation) else { return };
        let wish = edit.wish.clone();
        if trouble.is_none() {
            edits.stands(name, generation);
        }
        drop(edits);
        self.note(|table, now, at| {
            table.applied(name, Some(Outcome { wish, generation, trouble, at }), now);
        });
    }

    /// Nobody's edit is of it any more.
    fn taken_back(&self, name: &Name) {
        self.note(|table, now, _| table.applied(name, None, now));
    }

    /// Waits until somebody edits a wire, or takes an edit back.
    pub async fn edited(&self) {
        self.0.edited.notified().await;
    }

    /// How many are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.table.lock().len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn note(&self, change: impl FnOnce(&mut Table, Instant, SystemTime)) {
        change(&mut self.0.table.lock(), Instant::now(), clock::now());
        self.0.news.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_told_apart_from_what_is_wrong() {
        let said = |text| {
            let Trouble { message, hint } = Trouble::said(text);
            (message, hint)
        };
        let pair = |message: &str, hint: &str| (message.to_owned(), hint.to_owned());
        assert_eq!(
            said("fwd: no endpoint of service \"x\" (hint: start one (or two))"),
            pair("fwd: no endpoint of service \"x\"", "start one (or two)")
        );
        assert_eq!(said("no (way)"), pair("no (way)", ""));
        assert_eq!(said(""), pair("", ""));
        let long = said(&"ä".repeat(5000)).0;
        assert!(long.len() <= 900 && long.len() > 800, "{}", long.len());
    }
}
