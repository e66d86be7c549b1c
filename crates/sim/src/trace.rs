//! What happened, in order: equal for two runs of a seed.

use std::{fmt, io::Write as _, sync::Arc};

use parking_lot::Mutex;

use crate::ambient;

/// The events so far, as a hash; as lines, where somebody wants to read them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trace(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    hash: u64,
    events: u64,
    violations: Vec<Violation>,
    shown: bool,
    line: String,
}

/// A promise that did not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which invariant, in a word.
    pub invariant: &'static str,
    /// What was seen.
    pub what: String,
    /// When, in virtual milliseconds.
    pub at: u128,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}.{:03} s: {}", self.invariant, self.at / 1000, self.at % 1000, self.what)
    }
}

impl Trace {
    pub(crate) fn new(shown: bool) -> Self {
        Self(Arc::new(Mutex::new(Inner { hash: 0xcbf2_9ce4_8422_2325, shown, ..Inner::default() })))
    }

    /// Notes an event.
    pub(crate) fn note(&self, event: fmt::Arguments<'_>) {
        use fmt::Write as _;
        let mut inner = self.0.lock();
        let inner = &mut *inner;
        inner.line.clear();
        let _ = writeln!(inner.line, "{:>12} {event}", ambient::elapsed().as_micros());
        // FNV-1a.
        for byte in inner.line.bytes() {
            inner.hash = (inner.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        inner.events += 1;
        if inner.shown {
            let _ = std::io::stderr().write_all(inner.line.as_bytes());
        }
    }

    /// Notes that an invariant does not hold; the first of each kind counts.
    pub(crate) fn violated(&self, invariant: &'static str, what: String) {
        let known = self.0.lock().violations.iter().any(|known| known.invariant == invariant);
        if !known {
            self.note(format_args!("VIOLATION {invariant}: {what}"));
            let at = ambient::elapsed().as_millis();
            self.0.lock().violations.push(Violation { invariant, what, at });
        }
    }

    pub(crate) fn is_violated(&self) -> bool {
        !self.0.lock().violations.is_empty()
    }

    /// Hash, number of events, and what did not hold.
    pub(crate) fn end(&self) -> (u64, u64, Vec<Violation>) {
        let inner = self.0.lock();
        (inner.hash, inner.events, inner.violations.clone())
    }
}
