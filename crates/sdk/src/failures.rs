//! What to tell a person whose wire does not come up: which service, what was tried, the last causes, what to do.

use std::{
    fmt,
    time::{Duration, Instant},
};

use nsm_mesh::Error;
use tonic::Code;

/// Different causes that are remembered.
const CAUSES: usize = 3;
/// Characters of one cause that are shown.
const SHOWN: usize = 1000;

/// The tries for one wire that have failed so far.
#[derive(Debug, Clone)]
pub struct Failures {
    wanted: String,
    service: String,
    begun: Instant,
    tries: u32,
    /// Different causes, the last one last, and how often each was met.
    causes: Vec<(Error, u32)>,
}

impl Failures {
    /// None yet, for this service, which was asked for by this URL.
    #[must_use]
    pub fn new(service: &str, wanted: String, now: Instant) -> Self {
        Self { wanted, service: service.into(), begun: now, tries: 0, causes: Vec::new() }
    }

    /// One more.
    pub fn add(&mut self, error: Error) {
        self.tries = self.tries.saturating_add(1);
        let before = self.causes.iter().position(|(cause, _)| *cause == error);
        let times = before.map_or(0, |at| self.causes.remove(at).1);
        if self.causes.len() == CAUSES {
            self.causes.remove(0);
        }
        self.causes.push((error, times.saturating_add(1)));
    }

    /// How many.
    #[must_use]
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// The last cause; `None`: nothing has failed.
    #[must_use]
    pub fn last(&self) -> Option<&Error> {
        self.causes.last().map(|(error, _)| error)
    }

    /// All of it in one line; `now` tells for how long.
    #[must_use]
    pub fn tell(&self, now: Instant) -> String {
        let Some((last, before)) = self.causes.split_last() else {
            return format!("no wire to {} ({}) yet: the first try is under way", self.service, self.wanted);
        };
        let short = |error: &Error| error.to_string().chars().take(SHOWN).collect::<String>();
        let mut text = format!("no wire to {}", self.service);
        if self.tries > 1 {
            let took = Duration::from_secs(now.saturating_duration_since(self.begun).as_secs());
            text += &format!(" ({}) after {} tries in {took:?}", self.wanted, self.tries);
        }
        text += &format!(": {}", short(&last.0));
        for (error, times) in before.iter().rev() {
            text += &format!("; before that, {times} times: {}", short(error));
        }
        // Who knows the cause says what to do; for the rest there is where to look.
        if !text.contains("hint: ") {
            text += &format!(" (hint: {})", hint(&last.0));
        }
        text
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.tell(Instant::now()))
    }
}

fn hint(error: &Error) -> &'static str {
    // A neighbour's words name the hop that failed; what fails here is the way to the manager.
    let elsewhere = error.hop.as_deref() == Some("");
    match error.code {
        Code::Unavailable if elsewhere => {
            "start what cannot be reached there; the logs of both hops tell more"
        }
        Code::Unavailable => "does the manager of this node run, and is NSM_CONNECT_TO its address?",
        Code::DeadlineExceeded => {
            "a hop does not answer: look at the forwarder and the endpoint, or raise NSM_REQUEST_TIMEOUT"
        }
        Code::NotFound => "is an endpoint of the service registered, and do its labels match?",
        Code::PermissionDenied | Code::Unauthenticated => {
            "the policies of the hop that refused, and the identity of this process, decide that"
        }
        Code::InvalidArgument => "what NSM_NETWORK_SERVICES asks for cannot be served as it stands",
        _ => "the log of the hop that failed tells more",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_learns_the_service_what_was_tried_the_causes_and_what_to_do() {
        let begin = Instant::now();
        let mut failures = Failures::new("web", "kernel://web/nsm0".into(), begin);
        assert_eq!(
            failures.tell(begin),
            "no wire to web (kernel://web/nsm0) yet: the first try is under way"
        );
        failures.add(Error::unavailable("nobody listens").at("manager"));
        assert_eq!(
            failures.tell(begin),
            "no wire to web: manager: nobody listens (hint: does the manager of this node run, and is NSM_CONNECT_TO its address?)"
        );
        for _ in 0..3 {
            failures.add(Error::not_found("no endpoint").hint("start one"));
        }
        failures.add(Error::internal("the disk is full"));
        let told: Error = tonic::Status::unavailable("forwarder: no endpoint answers").into();
        assert!(hint(&told).starts_with("start what cannot be reached there"), "not the manager");
        assert_eq!((failures.tries(), failures.last().unwrap().code), (5, Code::Internal));
        assert_eq!(
            failures.tell(begin + Duration::from_millis(31_400)),
            "no wire to web (kernel://web/nsm0) after 5 tries in 31s: the disk is full; before that, 3 times: no endpoint (hint: start one); before that, 1 times: manager: nobody listens"
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut failures = Failures::new("web", String::new(), Instant::now());
        for i in 0..10_000 {
            failures.add(Error::internal(format!("{i} {}", "x".repeat(5000))));
        }
        assert_eq!(failures.causes.len(), CAUSES);
        assert!(failures.to_string().len() < 4 * SHOWN);
        for code in 0..17 {
            assert!(!hint(&Error::new(Code::from_i32(code), "")).is_empty());
        }
    }
}
