//! What went wrong with a request: a code for programs, the hop and the cause for people, and what to do.

use std::fmt;

use nsm_api::{limits::Malformed, path::PathError};
use nsm_identity::Denial;
pub use nsm_identity::explain;
use nsm_transport::{Refusal, Unanswered};
use tonic::{Code, Status};

/// The result of everything that a chain does.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error on its way back to the client. Its text says which hop failed, why, and what to do: it is written
/// once, where the cause is known, and passed on unchanged by every hop in between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The gRPC code (spec/control-plane.md 7.5). Upstream's callers only look at `Canceled`.
    pub code: Code,
    /// What happened.
    pub text: String,
    /// What to do about it, where we know.
    pub hint: Option<String>,
    /// The hop that failed; `None` until the chain runner fills it; empty if the text already names it.
    pub hop: Option<String>,
    /// A word for counters, where this is a refusal of ours.
    pub refusal: Option<&'static str>,
}

impl Error {
    /// An error with this code.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), hint: None, hop: None, refusal: None }
    }

    /// The request cannot be served as it stands.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, text)
    }

    /// Somebody or something that is needed is not there (now).
    pub fn not_found(text: impl Into<String>) -> Self {
        Self::new(Code::NotFound, text)
    }

    /// The caller may not do this.
    pub fn denied(text: impl Into<String>) -> Self {
        Self::new(Code::PermissionDenied, text)
    }

    /// A neighbour cannot be reached.
    pub fn unavailable(text: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, text)
    }

    /// Something of ours failed.
    pub fn internal(text: impl Into<String>) -> Self {
        Self::new(Code::Internal, text)
    }

    /// What to say when every one of several was tried in vain: of one its own error, of several each is named.
    #[must_use]
    pub fn all_failed(what: &str, mut failures: Vec<(String, Self)>) -> Self {
        if failures.len() == 1
            && let Some((_, error)) = failures.pop()
        {
            return error;
        }
        let code = failures.first().map_or(Code::Unknown, |(_, e)| e.code);
        let texts: Vec<_> = failures.iter().map(|(name, error)| format!("{name}: {error}")).collect();
        Self::new(code, format!("all {what} have failed: {}", texts.join("; ")))
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the word by which it is counted.
    #[must_use]
    pub fn counted(mut self, refusal: &'static str) -> Self {
        self.refusal = Some(refusal);
        self
    }

    /// Names the hop, unless one is named already: the innermost knows best.
    #[must_use]
    pub fn at(mut self, hop: &str) -> Self {
        self.hop.get_or_insert_with(|| hop.into());
        self
    }

    /// Whether it happened at this hop: what came from a neighbour says so at the beginning of its text, if it does.
    #[must_use]
    pub fn is_of(&self, hop: &str) -> bool {
        match self.hop.as_deref() {
            Some("") => self.text.strip_prefix(hop).is_some_and(|rest| rest.starts_with(": ")),
            Some(own) => own == hop,
            None => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(hop) = self.hop.as_deref().filter(|hop| !hop.is_empty()) {
            write!(f, "{hop}: ")?;
        }
        f.write_str(&self.text)?;
        if let Some(hint) = &self.hint {
            write!(f, " (hint: {hint})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<Error> for Status {
    fn from(e: Error) -> Self {
        // A text beyond what fits into HTTP/2 headers would turn the error into a broken stream.
        let text: String = e.to_string().chars().take(2000).collect();
        let status = Self::new(e.code, text);
        e.refusal.map_or(status.clone(), |word| Refusal(word).mark(status))
    }
}

impl From<Denial> for Error {
    fn from(denial: Denial) -> Self {
        // The beginning is upstream's text (spec/control-plane.md 13.1).
        Self::new(denial.code(), format!("no sufficient privileges: {denial}")).counted(denial.check())
    }
}

impl From<Status> for Error {
    /// A neighbour's error, passed on as it is: its text names the hop that failed, if that is one of ours. Where no
    /// neighbour has answered it is this hop's.
    fn from(status: Status) -> Self {
        let hop = (!Unanswered::is_why(&status)).then(String::new);
        // A neighbour's words go into logs and onto terminals.
        let text: String = status.message().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        Self { hop, ..Self::new(status.code(), text) }
    }
}

impl From<PathError> for Error {
    fn from(e: PathError) -> Self {
        // Upstream reports a path that contradicts itself as Unknown (spec/control-plane.md 4.2).
        Self::new(Code::Unknown, e.to_string()).counted("malformed")
    }
}

impl From<Malformed> for Error {
    fn from(e: Malformed) -> Self {
        Self::invalid(e.to_string()).counted("malformed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_failure_speaks_for_itself() {
        let one = Error::all_failed("candidates", vec![("a".into(), Error::denied("no"))]);
        assert_eq!((one.code, one.to_string().as_str()), (Code::PermissionDenied, "no"));
        let two = vec![("a".into(), Error::denied("no")), ("b".into(), Error::internal("x"))];
        assert_eq!(
            Error::all_failed("candidates", two).to_string(),
            "all candidates have failed: a: no; b: x"
        );
    }

    #[test]
    fn the_innermost_hop_and_the_hint_reach_the_client() {
        let e =
            Error::not_found("no endpoint of service \"x\" matches").hint("start one").at("fwd").at("mgr");
        assert_eq!(e.to_string(), "fwd: no endpoint of service \"x\" matches (hint: start one)");
        let across: Error = Status::from(e.clone()).into();
        for error in [&e, &across] {
            assert!(error.is_of("fwd") && !error.is_of("fw") && !error.is_of("mgr"), "{error:?}");
        }
        assert_eq!(
            (across.code, across.at("mgr").to_string().as_str()),
            (Code::NotFound, "fwd: no endpoint of service \"x\" matches (hint: start one)")
        );
    }
}
