//! What keeps peers within bounds, and what is counted when they are not.

use std::{
    collections::HashMap,
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame};
use nsm_identity::{SpiffeId, policy::Policies};
use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tonic::{Code, Status, metadata::MetadataValue};

use crate::server::Limits;

/// What a role checks of its callers, what it lets them use, and where it counts what it refuses. Clones count
/// together.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    /// The checks of paths.
    pub policies: Arc<Policies>,
    /// Bounds of what peers may use.
    pub limits: Limits,
    /// The counters.
    pub refusals: Refusals,
}

/// Counts what a server is asked, by method, and what it refuses, by status code and reason.
#[derive(Clone, Default)]
pub struct Refusals {
    refused: Family<Labels, Counter>,
    calls: Family<Method, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    code: String,
    reason: &'static str,
}

/// Why a call is refused, in a word for counters and for callers: the source of a [`Status`] that a handler answers with,
/// and its metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub &'static str);

/// Where callers find the word.
const WORD: &str = "nsm-refusal";

impl Refusal {
    /// Adds the word to a status.
    #[must_use]
    pub fn mark(self, mut status: Status) -> Status {
        status.set_source(Arc::new(self));
        status.metadata_mut().insert(WORD, MetadataValue::from_static(self.0));
        status
    }

    /// The word in a status, of ours or of a peer's.
    #[must_use]
    pub fn of(status: &Status) -> Option<&str> {
        status.metadata().get(WORD)?.to_str().ok()
    }
}

/// The source of a [`Status`] that no peer has sent: the way to it broke, and whether it has done anything is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nobody has answered")]
pub struct Unanswered;

impl Unanswered {
    /// Adds it to a status.
    #[must_use]
    pub fn mark(self, mut status: Status) -> Status {
        status.set_source(Arc::new(self));
        status
    }

    /// Whether it is the source of a status.
    #[must_use]
    pub fn is_why(status: &Status) -> bool {
        std::error::Error::source(status).is_some_and(|source| source.is::<Self>())
    }
}

impl Refusals {
    /// Shows the counters with a role's own.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "refusals",
            "Calls and connections that were refused, by code and reason",
            self.refused.clone(),
        );
        registry.register(
            "calls",
            "Calls that came, by method, those that were refused included",
            self.calls.clone(),
        );
    }

    /// How often something was refused for this reason.
    #[must_use]
    pub fn of(&self, reason: &str) -> u64 {
        let codes = (0..=16).map(Code::from);
        let labels = codes.map(|code| Labels { code: format!("{code:?}"), reason: word(reason) });
        labels.filter_map(|labels| self.refused.get(&labels).map(|counter| counter.get())).sum()
    }

    /// Counts one.
    pub fn count(&self, code: Code, reason: &'static str) {
        self.refused.get_or_create(&Labels { code: format!("{code:?}"), reason }).inc();
    }

    /// Counts a call of this path, which anybody may have made up.
    pub(crate) fn call(&self, path: &str) {
        const METHODS: [&str; 6] =
            ["Request", "Close", "MonitorConnections", "Register", "Unregister", "Find"];
        let called = path.rsplit('/').next().unwrap_or_default();
        let method = METHODS.into_iter().find(|method| *method == called).unwrap_or("other");
        self.calls.get_or_create(&Method { method }).inc();
    }
}

/// The words are few, and looked for in tests only.
fn word(reason: &str) -> &'static str {
    const WORDS: [&str; 20] = [
        "path_cut",
        "tokens_valid",
        "tokens_expired",
        "tokens_chained",
        "peer_signed",
        "own_name",
        "trust_domain",
        "one_audience",
        "policy_file",
        "client_allowed",
        "on_node",
        "no_token",
        "malformed",
        "handshake",
        "connections",
        "connections_of_one",
        "in_flight",
        "watches",
        "slow_reader",
        "other",
    ];
    WORDS.into_iter().find(|word| *word == reason).unwrap_or("other")
}

/// The word for a refusal that no handler gave one.
pub(crate) fn reason(status: &Status) -> &'static str {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if let Some(Refusal(reason)) = error.downcast_ref() {
            return reason;
        }
        source = error.source();
    }
    "other"
}

/// How many of something each identity has: connections on all sockets of a server, or streams of a service.
#[derive(Debug, Clone, Default)]
pub struct Census(Arc<Mutex<HashMap<SpiffeId, usize>>>);

impl Census {
    /// Counts one for as long as what is returned lives; `None` beyond the bound.
    #[must_use]
    pub fn enter(&self, id: &SpiffeId, most: usize) -> Option<Counted> {
        let mut open = self.0.lock();
        let of_one = open.entry(id.clone()).or_default();
        if *of_one >= most {
            return None;
        }
        *of_one += 1;
        Some(Counted { census: self.clone(), id: id.clone() })
    }
}

/// One of what a [`Census`] counts.
#[derive(Debug)]
pub struct Counted {
    census: Census,
    id: SpiffeId,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut open = self.census.0.lock();
        if let Some(of_one) = open.get_mut(&self.id) {
            *of_one -= 1;
            if *of_one == 0 {
                open.remove(&self.id);
            }
        }
    }
}

/// A request's body whose bytes count against what its connection may have in flight: a peer that begins ten thousand
/// messages and ends none would otherwise fill the memory within every bound on messages.
///
/// The messages of a stream count until the next one begins: its handler has taken them by then. That of a call with
/// one counts as long as the call.
pub(crate) struct Metered<B> {
    inner: B,
    in_flight: Arc<AtomicUsize>,
    most: usize,
    taken: usize,
    begun: Begun,
}

/// Where in gRPC's frames a body is: a byte of flags, the length, the message.
#[derive(Debug, Default)]
struct Begun {
    header: [u8; 5],
    of_header: usize,
    left: usize,
    /// Bytes of the message that has begun and not ended.
    bytes: usize,
}

impl Begun {
    fn advance(&mut self, mut data: &[u8]) {
        while let Some(&first) = data.first() {
            let taken = if self.of_header < self.header.len() {
                self.header[self.of_header] = first;
                self.of_header += 1;
                let [_, a, b, c, d] = self.header;
                self.left = u32::from_be_bytes([a, b, c, d]) as usize;
                1
            } else {
                let taken = self.left.min(data.len());
                self.left -= taken;
                taken
            };
            self.bytes += taken;
            if self.of_header == self.header.len() && self.left == 0 {
                *self = Self::default();
            }
            data = data.get(taken..).unwrap_or_default();
        }
    }
}

impl<B> Metered<B> {
    pub(crate) fn new(inner: B, in_flight: Arc<AtomicUsize>, most: usize) -> Self {
        Self { inner, in_flight, most, taken: 0, begun: Begun::default() }
    }
}

impl<B> Drop for Metered<B> {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(self.taken, Ordering::Relaxed);
    }
}

impl<B: Body<Data = Bytes, Error = hyper::Error> + Unpin> Body for Metered<B> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let frame = match std::task::ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
            None => return Poll::Ready(None),
            Some(Err(error)) => {
                return Poll::Ready(Some(Err(Status::cancelled(format!("the call ended early: {error}")))));
            }
            Some(Ok(frame)) => frame,
        };
        let data: &[u8] = frame.data_ref().map_or(&[], |data| data);
        if !data.is_empty() {
            // A decoder asks for more when it has nothing whole left.
            let ended = this.taken - this.begun.bytes;
            this.taken -= ended;
            this.in_flight.fetch_sub(ended, Ordering::Relaxed);
        }
        this.begun.advance(data);
        this.taken += data.len();
        let all = this.in_flight.fetch_add(data.len(), Ordering::Relaxed) + data.len();
        if all > this.most {
            let text = format!(
                "the calls in flight on this connection hold {all} bytes; at most {} are accepted",
                this.most
            );
            return Poll::Ready(Some(Err(Refusal("in_flight").mark(Status::resource_exhausted(text)))));
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}

impl fmt::Debug for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refusals").finish_non_exhaustive()
    }
}
