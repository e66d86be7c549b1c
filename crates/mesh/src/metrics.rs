//! What a role counts: requests, their elements, panics, ends.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

use crate::{inspect::Inspector, scope::Reason};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ElementLabels {
    element: &'static str,
    ok: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    ok: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    reason: String,
}

/// The metrics of one role, in Prometheus' text form on demand.
pub struct Metrics {
    registry: Mutex<Registry>,
    /// What upstream has too, under its names.
    upstream: Mutex<Registry>,
    requests: Family<Outcome, Histogram>,
    elements: Family<ElementLabels, Histogram>,
    panics: Counter,
    ends: Family<Why, Counter>,
    inspector: Arc<Inspector>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("panics", &self.panics.get()).finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::of(Arc::default())
    }
}

impl Metrics {
    /// The metrics of a process that tells of itself by this inspector: whoever counts can also be asked.
    #[must_use]
    pub fn of(inspector: Arc<Inspector>) -> Self {
        // From 100 µs to 26 s: a request within the node up to one that waits for its deadline.
        fn seconds() -> Histogram {
            Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(0.0001, 4.0, 10))
        }
        let requests = Family::<Outcome, Histogram>::new_with_constructor(seconds);
        let elements = Family::<ElementLabels, Histogram>::new_with_constructor(seconds);
        let (panics, ends) = (Counter::default(), Family::<Why, Counter>::default());
        let prefix = std::env::var("PROMETHEUS_METRICS_PREFIX").unwrap_or_default();
        let upstream =
            Mutex::new(if prefix.is_empty() { Registry::default() } else { Registry::with_prefix(prefix) });
        let mut registry = Registry::with_prefix("nsm");
        registry.register("request_seconds", "Requests, refreshes included", requests.clone());
        registry.register("element_seconds", "Time in an element and those below it", elements.clone());
        registry.register("panics", "Panics that the chain runner contained", panics.clone());
        registry.register("connections_ended", "Connections that ended, by reason", ends.clone());
        Self { registry: Mutex::new(registry), upstream, requests, elements, panics, ends, inspector }
    }

    /// What the process tells of itself.
    #[must_use]
    pub fn inspector(&self) -> &Arc<Inspector> {
        &self.inspector
    }

    /// Adds a role's own metrics.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock());
    }

    /// Adds metrics that upstream's programs have, under upstream's names: `PROMETHEUS_METRICS_PREFIX` is put before
    /// them.
    pub fn register_upstreams(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.upstream.lock());
    }

    /// Everything, in Prometheus' text form. What is collected may look into the kernel: not for the runtime's threads.
    #[must_use]
    pub fn text(&self) -> String {
        use prometheus_client::encoding::text::{encode_eof, encode_registry};
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode_registry(&mut text, &self.registry.lock());
        let _ = encode_registry(&mut text, &self.upstream.lock());
        let _ = encode_eof(&mut text);
        text
    }

    /// How many panics were contained.
    #[must_use]
    pub fn panics(&self) -> u64 {
        self.panics.get()
    }

    pub(crate) fn request(&self, took: Duration, ok: bool) {
        self.requests.get_or_create(&Outcome { ok: flag(ok) }).observe(took.as_secs_f64());
    }

    pub(crate) fn element(&self, element: &'static str, took: Duration, ok: bool) {
        self.elements.get_or_create(&ElementLabels { element, ok: flag(ok) }).observe(took.as_secs_f64());
    }

    pub(crate) fn panicked(&self) {
        self.panics.inc();
    }

    pub(crate) fn ended(&self, reason: Reason) {
        self.ends.get_or_create(&Why { reason: format!("{reason:?}").to_lowercase() }).inc();
    }
}

fn flag(ok: bool) -> &'static str {
    if ok { "true" } else { "false" }
}
