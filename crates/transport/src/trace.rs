//! Traces across processes. This crate knows no tracing system: whoever exports spans says here how a call continues
//! the trace of its caller. Without that, nothing is looked at and nothing costs anything.

use std::sync::OnceLock;

use http::HeaderMap;
use tracing::Span;

/// How traces travel in the metadata of calls.
#[derive(Debug, Clone, Copy)]
pub struct Propagation {
    /// The span of a call to a peer; it writes where it belongs into the headers.
    pub call: fn(method: &str, headers: &mut HeaderMap) -> Span,
    /// The span of a call that is served; the headers say where it belongs.
    pub serve: fn(method: &str, headers: &HeaderMap) -> Span,
}

static PROPAGATION: OnceLock<Propagation> = OnceLock::new();

/// Makes all calls of this process carry their trace; the first word counts.
pub fn propagate(propagation: Propagation) {
    let _ = PROPAGATION.set(propagation);
}

/// Whether traces are exported.
#[must_use]
pub fn is_traced() -> bool {
    PROPAGATION.get().is_some()
}

pub(crate) fn of_call(method: &str, headers: &mut HeaderMap) -> Span {
    PROPAGATION.get().map_or_else(Span::none, |trace| (trace.call)(method, headers))
}

pub(crate) fn of_service(method: &str, headers: &HeaderMap) -> Span {
    PROPAGATION.get().map_or_else(Span::none, |trace| (trace.serve)(method, headers))
}
