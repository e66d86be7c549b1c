//! When registrations end: deadlines by name, without a clock or a timer.
//!
//! The time is an argument, of any type that is ordered: the registry uses the monotonic clock, so
//! that setting the wall clock ends nobody's registration, and tests use numbers. An endpoint
//! expires exactly at its `expiration_time` (upstream's registries already expire it when the time
//! that the RPC deadline left is reached: spec/registry.md 2.7).

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use prost_types::Timestamp;
use tokio::{sync::Notify, time::Instant};

/// How long an endpoint lives without a refresh if nothing shorter is asked for.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// Deadlines by name.
#[derive(Debug, Clone)]
pub struct Expiry<I> {
    by_name: HashMap<String, I>,
    by_time: BTreeSet<(I, String)>,
}

impl<I> Default for Expiry<I> {
    fn default() -> Self {
        Self { by_name: HashMap::new(), by_time: BTreeSet::new() }
    }
}

impl<I: Ord + Copy> Expiry<I> {
    /// Sets the deadline of a name, in place of its earlier one.
    pub fn set(&mut self, name: &str, at: I) {
        if let Some(before) = self.by_name.insert(name.to_owned(), at) {
            self.by_time.remove(&(before, name.to_owned()));
        }
        self.by_time.insert((at, name.to_owned()));
    }

    /// Forgets a name.
    pub fn clear(&mut self, name: &str) {
        if let Some(before) = self.by_name.remove(name) {
            self.by_time.remove(&(before, name.to_owned()));
        }
    }

    /// The earliest deadline.
    #[must_use]
    pub fn next(&self) -> Option<I> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes out the names whose deadlines are reached at `now`, earliest first.
    pub fn pop_due(&mut self, now: I) -> Vec<String> {
        std::iter::from_fn(|| self.pop_first_due(now)).collect()
    }

    /// Takes out the name whose deadline was reached first.
    pub fn pop_first_due(&mut self, now: I) -> Option<String> {
        self.next().filter(|at| *at <= now)?;
        let (_, name) = self.by_time.pop_first()?;
        self.by_name.remove(&name);
        Some(name)
    }

    /// The deadline of a name.
    #[must_use]
    pub fn deadline(&self, name: &str) -> Option<I> {
        self.by_name.get(name).copied()
    }

    /// How many names have a deadline.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether no name has a deadline.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}

/// An [`Expiry`] that runs on tokio's clock. What a deadline stands for changes under the same lock
/// as the deadline, so that nothing expires in the middle of its refresh.
#[derive(Debug, Default)]
pub struct Timers {
    expiry: Mutex<Expiry<Instant>>,
    earlier: Notify,
}

impl Timers {
    /// Sets the deadline of a name and does what belongs to it.
    pub fn set(&self, name: &str, at: Instant, change: impl FnOnce()) {
        let mut expiry = self.expiry.lock();
        let first = expiry.next().is_none_or(|next| at < next);
        expiry.set(name, at);
        change();
        drop(expiry);
        if first {
            self.earlier.notify_one();
        }
    }

    /// Brings the deadline of a name forward, if it is later and `still` so.
    pub fn bring_forward(&self, name: &str, at: Instant, still: impl FnOnce() -> bool) {
        let mut expiry = self.expiry.lock();
        if expiry.deadline(name).is_some_and(|deadline| deadline > at) && still() {
            expiry.set(name, at);
            drop(expiry);
            self.earlier.notify_one();
        }
    }

    /// Forgets the deadline of a name and does what belongs to it.
    pub fn clear(&self, name: &str, change: impl FnOnce()) {
        let mut expiry = self.expiry.lock();
        expiry.clear(name);
        change();
    }

    /// The deadline of a name.
    #[must_use]
    pub fn deadline(&self, name: &str) -> Option<Instant> {
        self.expiry.lock().deadline(name)
    }

    /// Calls `expired` for each name whose deadline is reached, under the lock; for ever.
    pub async fn run(&self, mut expired: impl FnMut(&str)) {
        loop {
            let next = {
                let mut expiry = self.expiry.lock();
                let due = expiry.pop_due(Instant::now());
                let stay = nsm_api::planted::is("registrations do not expire");
                due.iter().filter(|_| !stay).for_each(|name| expired(name));
                expiry.next()
            };
            tokio::select! {
                () = self.earlier.notified() => {}
                () = async {
                    match next {
                        Some(at) => tokio::time::sleep_until(at).await,
                        None => std::future::pending().await,
                    }
                } => {}
            }
        }
    }
}

/// When a registration ends: the earliest of what the registrant asks for, the ends of the tokens
/// that vouch for it, and the default lifetime. It is never raised (spec/registry.md 2.7).
#[must_use]
pub fn expiration_time(
    now: SystemTime,
    requested: Option<SystemTime>,
    tokens: impl IntoIterator<Item = SystemTime>,
    lifetime: Duration,
) -> SystemTime {
    let limit = now.checked_add(lifetime).unwrap_or(now);
    requested.into_iter().chain(tokens).fold(limit, SystemTime::min)
}

/// A protobuf timestamp as a time; before 1970 and beyond what the clock can say become its ends.
#[must_use]
pub fn time_of(timestamp: &Timestamp) -> SystemTime {
    let nanos = u32::try_from(timestamp.nanos).unwrap_or(0).min(999_999_999);
    let since = Duration::new(u64::try_from(timestamp.seconds).unwrap_or(0), nanos);
    // Half of the range leaves room for arithmetic.
    UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH + Duration::from_secs(u64::MAX >> 4))
}

/// A time as a protobuf timestamp.
#[must_use]
pub fn timestamp_of(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_identity::clock;
    use proptest::prelude::*;

    #[test]
    fn a_refresh_moves_the_deadline() {
        let mut expiry = Expiry::default();
        expiry.set("a", 60);
        expiry.set("b", 50);
        expiry.set("c", 60);
        assert_eq!((expiry.next(), expiry.pop_due(49)), (Some(50), vec![]));
        expiry.set("b", 90);
        assert_eq!((expiry.next(), expiry.deadline("b")), (Some(60), Some(90)));
        assert_eq!(expiry.pop_due(60), ["a", "c"]);
        assert_eq!((expiry.deadline("a"), expiry.len()), (None, 1));
        expiry.clear("b");
        expiry.clear("b");
        assert!(expiry.is_empty() && expiry.pop_due(u64::MAX).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn timers_fire_exactly_and_a_refresh_postpones_them() {
        let timers = std::sync::Arc::new(Timers::default());
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let (sender, mut fired) = tokio::sync::mpsc::unbounded_channel();
        let running = tokio::spawn({
            let timers = timers.clone();
            async move { timers.run(|name| drop(sender.send((name.to_owned(), start.elapsed().as_secs())))).await }
        });
        tokio::task::yield_now().await;
        timers.set("late", at(60), || {});
        timers.set("early", at(20), || {});
        timers.set("refreshed", at(30), || {});
        timers.set("gone", at(10), || {});
        timers.clear("gone", || {});
        tokio::time::sleep(Duration::from_secs(25)).await;
        timers.set("refreshed", at(55), || {});
        let mut all = vec![];
        for _ in 0..3 {
            all.push(fired.recv().await.expect("fires"));
        }
        let expected = [("early", 20), ("refreshed", 55), ("late", 60)];
        assert_eq!(all, expected.map(|(name, at)| (name.to_owned(), at)));
        running.abort();
    }

    #[test]
    fn the_earliest_limit_counts() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        let at = |s| UNIX_EPOCH + Duration::from_secs(s);
        let minute = Duration::from_secs(60);
        assert_eq!(expiration_time(now, None, [], minute), at(1060));
        assert_eq!(expiration_time(now, Some(at(1030)), [at(1040)], minute), at(1030));
        assert_eq!(expiration_time(now, Some(at(2000)), [at(1040), at(1050)], minute), at(1040));
        assert_eq!(expiration_time(now, Some(at(5)), [], minute), at(5), "already over");
        assert_eq!(expiration_time(now, None, [], Duration::MAX), now);
    }

    #[test]
    fn strange_timestamps_do_not_panic() {
        for (seconds, nanos) in [(i64::MIN, i32::MIN), (i64::MAX, i32::MAX), (-1, 5), (7, -5)] {
            let time = time_of(&Timestamp { seconds, nanos });
            let _ = timestamp_of(time);
            let _ = expiration_time(clock::now(), Some(time), [], DEFAULT_LIFETIME);
        }
        let whole = Timestamp { seconds: 1_760_000_060, nanos: 120_000_000 };
        assert_eq!(timestamp_of(time_of(&whole)), whole);
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_plain_map(steps in proptest::collection::vec((0..5_u8, proptest::option::of(0..40_u32), 0..40_u32), 0..60)) {
            let mut expiry = Expiry::default();
            let mut model: std::collections::BTreeMap<String, u32> = Default::default();
            for (name, at, now) in steps {
                let name = name.to_string();
                match at {
                    Some(at) => { expiry.set(&name, at); model.insert(name.clone(), at); }
                    None => { expiry.clear(&name); model.remove(&name); }
                }
                prop_assert_eq!(expiry.deadline(&name), model.get(&name).copied());
                let mut due: Vec<_> = model.iter().filter(|(_, at)| **at <= now).map(|(n, at)| (*at, n.clone())).collect();
                due.sort();
                model.retain(|_, at| *at > now);
                prop_assert_eq!(expiry.pop_due(now), due.into_iter().map(|(_, n)| n).collect::<Vec<_>>());
                prop_assert_eq!(expiry.next(), model.values().min().copied());
            }
        }
    }
}
