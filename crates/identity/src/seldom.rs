//! For the log of what anybody can cause as often as he likes.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How often something is said.
const INTERVAL: Duration = Duration::from_secs(10);

/// Lets one line through in ten seconds and counts the others.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<(Option<Instant>, u64)>);

impl Seldom {
    /// Whether it may be said now, and if so, how often it was not since it was said last.
    pub fn turn(&self, now: Instant) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, untold) = &mut *said;
        if last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            *untold += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_tells_of_many() {
        let (seldom, now) = (Seldom::default(), Instant::now());
        assert_eq!(seldom.turn(now), Some(0));
        assert!((0..1000).all(|_| seldom.turn(now).is_none()));
        assert_eq!(seldom.turn(now + INTERVAL), Some(1000));
        assert_eq!(seldom.turn(now + INTERVAL), None);
        assert_eq!(seldom.turn(now + INTERVAL * 2), Some(1));
    }
}
