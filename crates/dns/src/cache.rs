//! Answers, for as long as their records live. Time is an argument.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use hickory_proto::{op::Message, rr::Name};

use crate::message::{self, Key};

/// Answers that are kept; of more, those go first that would not live long anyway.
pub const MAX_ENTRIES: usize = 1024;
/// Bytes of an answer that is kept.
pub const MAX_BYTES: usize = 4096;
/// No answer is kept for longer, whatever it says.
pub const MAX_TTL: Duration = Duration::from_secs(3600);

/// Answers by question.
#[derive(Debug, Default)]
pub struct Cache(HashMap<Key, Entry>);

#[derive(Debug)]
struct Entry {
    name: Name,
    answer: Message,
    from: Instant,
    until: Instant,
}

impl Cache {
    /// Keeps an answer that has records and is no error, if it is of a size to keep.
    pub fn put(&mut self, key: &Key, name: &Name, answer: &Message, bytes: usize, now: Instant) {
        let Some(ttl) = message::ttl(answer).filter(|ttl| !ttl.is_zero()) else { return };
        if bytes > MAX_BYTES {
            return;
        }
        if self.0.len() >= MAX_ENTRIES && !self.0.contains_key(key) {
            self.0.retain(|_, entry| entry.until > now);
        }
        if self.0.len() >= MAX_ENTRIES
            && !self.0.contains_key(key)
            && let Some(first) =
                self.0.iter().min_by_key(|(_, entry)| entry.until).map(|(key, _)| key.clone())
        {
            self.0.remove(&first);
        }
        let entry =
            Entry { name: name.clone(), answer: answer.clone(), from: now, until: now + ttl.min(MAX_TTL) };
        self.0.insert(key.clone(), entry);
    }

    /// An answer that still lives, its records as much older as time has passed.
    pub fn get(&mut self, key: &Key, now: Instant) -> Option<(Name, Message)> {
        let entry = self.0.get(key)?;
        if entry.until <= now {
            self.0.remove(key);
            return None;
        }
        let age = now.saturating_duration_since(entry.from).as_secs();
        let mut answer = entry.answer.clone();
        let sections = [&mut answer.answers, &mut answer.authorities, &mut answer.additionals];
        for record in sections.into_iter().flatten() {
            record.ttl = record.ttl.saturating_sub(u32::try_from(age).unwrap_or(u32::MAX));
        }
        Some((entry.name.clone(), answer))
    }

    /// Forgets all: whom to ask has changed.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
