//! When an edge client asks again (spec/control-plane.md section 5.4). Pure: time and chance are arguments.

use std::time::{Duration, SystemTime};

use nsm_api::{path, pb::connection::Connection};

/// How long to wait before the next refresh, given the last answer. `None`: the answer carries no usable
/// expiry, and asking again at once would only load the mesh (upstream loops there).
#[must_use]
pub fn wait(answer: &Connection, now: SystemTime) -> Option<Duration> {
    let left = path::earliest_expiry(answer)?.duration_since(now).ok().filter(|left| !left.is_zero())?;
    let count = path::segments(answer).len();
    let scale = match count {
        1 => 1.0 / 3.0,
        _ => 0.2 + 0.2 * path::index(answer) as f64 / count as f64,
    };
    Some(left.mul_f64(scale))
}

/// The pause before try number `attempt` (from 0): 50 ms doubling up to 5 s, of which `jitter` in 0..1 takes
/// up to a half away, so that a thousand clients do not come back at once.
#[must_use]
pub fn backoff(attempt: u32, jitter: f64) -> Duration {
    let full = Duration::from_millis(50).saturating_mul(1 << attempt.min(10)).min(Duration::from_secs(5));
    full.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connection::{Path, PathSegment};

    use super::*;
    use nsm_identity::clock;

    fn answer(expiries: &[Option<u64>], index: u32, now: SystemTime) -> Connection {
        let segment = |left: &Option<u64>| PathSegment {
            expires: left.map(|secs| path::to_timestamp(now + Duration::from_secs(secs))),
            ..PathSegment::default()
        };
        Connection {
            path: Some(Path { unknown: None, index, path_segments: expiries.iter().map(segment).collect() }),
            ..Connection::default()
        }
    }

    #[test]
    fn a_fifth_of_the_shortest_life() {
        let now = clock::now();
        let four = answer(&[Some(600), Some(300), Some(600), Some(600)], 0, now);
        assert_eq!(wait(&four, now).unwrap().as_secs_f64().round() as u64, 60);
        let inner = answer(&[Some(600), Some(600), Some(600), Some(600)], 2, now);
        assert_eq!(wait(&inner, now).unwrap().as_secs(), 180);
        assert_eq!(wait(&answer(&[Some(300)], 0, now), now).unwrap().as_secs(), 100);
    }

    #[test]
    fn no_tight_loop_without_an_expiry() {
        let now = clock::now();
        assert_eq!(wait(&answer(&[Some(600), None], 0, now), now), None);
        assert_eq!(wait(&Connection::default(), now), None);
    }

    proptest::proptest! {
        #[test]
        fn pauses_are_bounded(attempt: u32, jitter in -1.0..2.0f64) {
            let pause = backoff(attempt, jitter);
            assert!(pause >= Duration::from_millis(25) && pause <= Duration::from_secs(5));
        }
    }
}
