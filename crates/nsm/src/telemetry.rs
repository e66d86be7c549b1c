//! Traces and metrics by OTLP/gRPC, where upstream's environment asks for them (spec/kubernetes.md 2 and 7.3). Otherwise
//! nothing of this is set up.

use std::{collections::HashMap, fmt, time::Duration};

use anyhow::{Context as _, Result};
use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue};
use nsm_api::{path, pb::connection::Connection};
use nsm_mesh::{Inspector, inspect::Follow};
use nsm_transport::Propagation;
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Meter, MeterProvider as _},
    propagation::{Extractor, Injector, TextMapPropagator as _},
    trace::TracerProvider as _,
};
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::{
    Resource,
    metrics::{PeriodicReader, SdkMeterProvider},
    propagation::TraceContextPropagator,
    trace::SdkTracerProvider,
};
use parking_lot::Mutex;
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{Layer, filter::filter_fn, registry::LookupSpan};

use crate::common::duration;

/// The counters that forwarders write into the path (spec/data-plane.md 2.19).
const COUNTERS: [&str; 10] = [
    "server_rx_bytes",
    "server_tx_bytes",
    "server_rx_packets",
    "server_tx_packets",
    "server_drops",
    "client_rx_bytes",
    "client_tx_bytes",
    "client_rx_packets",
    "client_tx_packets",
    "client_drops",
];
/// Counters exported by one process: those of a hundred forwarders. Their names are those of hops, and stay for ever.
const MAX_COUNTERS: usize = 1000;

/// Where traces and metrics go.
#[derive(Debug, Clone, Args)]
pub(crate) struct Telemetry {
    /// Export traces and metrics by OTLP; anything but `true` means no
    #[arg(
        long = "telemetry",
        env = "TELEMETRY",
        default_value = "false",
        value_name = "true|false",
        hide_env_values = true
    )]
    enabled: String,
    /// The collector, OTLP/gRPC without TLS. It need not be there: what it misses is lost, nothing waits for it
    #[arg(
        long,
        env = "NSM_OPEN_TELEMETRY_ENDPOINT",
        default_value = "otel-collector.observability.svc.cluster.local:4317",
        value_name = "HOST:PORT",
        hide_env_values = true
    )]
    open_telemetry_endpoint: String,
    /// How often metrics are exported
    #[arg(long, env = "NSM_METRICS_EXPORT_INTERVAL", default_value = "10s", value_parser = duration, hide_env_values = true)]
    metrics_export_interval: Duration,
}

/// What exports.
pub(crate) struct Exported {
    traces: SdkTracerProvider,
    metrics: SdkMeterProvider,
}

impl fmt::Debug for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Exported")
    }
}

impl Telemetry {
    /// Starts exporting, as `service.name` = `name`, where that is wanted. Needs a runtime.
    pub(crate) fn start(&self, name: &str) -> Result<Option<Exported>> {
        if !matches!(self.enabled.to_ascii_lowercase().as_str(), "true" | "1" | "t") {
            return Ok(None);
        }
        let endpoint = match self.open_telemetry_endpoint.split_once("://") {
            Some(_) => self.open_telemetry_endpoint.clone(),
            None => format!("http://{}", self.open_telemetry_endpoint),
        };
        let bad = || {
            let endpoint = &self.open_telemetry_endpoint;
            format!("NSM_OPEN_TELEMETRY_ENDPOINT {endpoint:?} is no collector's address; expected HOST:PORT")
        };
        let resource = Resource::builder_empty().with_service_name(name.to_owned()).build();
        let spans = opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(endpoint.clone());
        let traces = SdkTracerProvider::builder()
            .with_batch_exporter(spans.build().with_context(bad)?)
            .with_resource(resource.clone())
            .build();
        let points = opentelemetry_otlp::MetricExporter::builder().with_tonic().with_endpoint(endpoint);
        let reader = PeriodicReader::builder(points.build().with_context(bad)?)
            .with_interval(self.metrics_export_interval)
            .build();
        let metrics = SdkMeterProvider::builder().with_reader(reader).with_resource(resource).build();
        nsm_transport::propagate(Propagation { call, serve });
        Ok(Some(Exported { traces, metrics }))
    }
}

impl Exported {
    /// Turns our spans into exported ones. Not those of libraries: the exporter uses them itself.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + Send + Sync + use<S>
    where
        S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.traces.tracer("nsm"))
            .with_location(false)
            .with_threads(false)
            .with_filter(filter_fn(|meta| meta.target().starts_with("nsm")))
    }

    /// Exports the counters that forwarders write into the path, as upstream's managers do: of every segment
    /// `<segment name>_<metric>`, with the attribute `connection`.
    pub(crate) fn count_segments(&self, inspector: &Inspector) {
        let meter = self.metrics.meter("nsm");
        inspector.follow(Box::new(Segments { meter, state: Mutex::default() }));
    }

    /// Sends what was not sent yet.
    pub(crate) fn flush(self) {
        let patience = Duration::from_secs(2);
        // A collector that is not there misses the rest.
        let _ = self.traces.shutdown_with_timeout(patience);
        let _ = self.metrics.shutdown_with_timeout(patience);
    }
}

struct Segments {
    meter: Meter,
    state: Mutex<Counted>,
}

#[derive(Default)]
struct Counted {
    counters: HashMap<String, Counter<u64>>,
    /// By our connection and by the counter's name: what was counted already.
    last: HashMap<String, HashMap<String, u64>>,
}

/// Upstream's counters that the hops behind us report, each under upstream's name. What a caller writes left of us
/// is not counted.
fn counts(conn: &Connection) -> impl Iterator<Item = (String, u64)> + '_ {
    path::segments(conn).iter().skip(path::index(conn) + 1).flat_map(|segment| {
        COUNTERS.iter().filter_map(|key| {
            let value = segment.metrics.get(*key)?.parse().ok()?;
            Some((format!("{}_{key}", segment.name), value))
        })
    })
}

impl Follow for Segments {
    fn answered(&self, conn: &Connection) {
        let id = path::current(conn).map_or(&conn.id, |own| &own.id);
        let mut state = self.state.lock();
        let Counted { counters, last } = &mut *state;
        let last = last.entry(id.clone()).or_default();
        let mut now = HashMap::new();
        for (name, value) in counts(conn) {
            let before = last.get(&name).copied().unwrap_or(0);
            if counters.contains_key(&name) || counters.len() < MAX_COUNTERS {
                let counter = counters
                    .entry(name.clone())
                    .or_insert_with_key(|name| self.meter.u64_counter(name.clone()).build());
                let connection = KeyValue::new("connection", path::client_id(conn).to_owned());
                // A wire that was made anew counts from 0.
                counter.add(value.checked_sub(before).unwrap_or(value), &[connection]);
            }
            now.insert(name, value);
        }
        *last = now;
    }

    fn ended(&self, id: &str) {
        self.state.lock().last.remove(id);
    }
}

/// The names of gRPC's own instrumentation: `package.Service/Method`, kind, `rpc.*`.
macro_rules! rpc_span {
    ($kind:literal, $method:expr) => {{
        let name = $method.trim_start_matches('/');
        let (service, method) = name.rsplit_once('/').unwrap_or((name, ""));
        tracing::info_span!(
            "rpc",
            otel.name = name,
            otel.kind = $kind,
            rpc.system = "grpc",
            rpc.service = service,
            rpc.method = method,
        )
    }};
}

fn call(method: &str, headers: &mut HeaderMap) -> Span {
    let span = rpc_span!("client", method);
    TraceContextPropagator::new().inject_context(&span.context(), &mut Headers(headers));
    span
}

fn serve(method: &str, headers: &HeaderMap) -> Span {
    let span = rpc_span!("server", method);
    // Without a filter that lets it pass there is no span, and nothing to belong to.
    let _ = span.set_parent(TraceContextPropagator::new().extract(&Read(headers)));
    span
}

struct Headers<'h>(&'h mut HeaderMap);

impl Injector for Headers<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) = (key.parse::<HeaderName>(), HeaderValue::from_str(&value)) {
            self.0.insert(key, value);
        }
    }
}

struct Read<'h>(&'h HeaderMap);

impl Extractor for Read<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connection::{Path, PathSegment};

    use super::*;

    fn answer(index: u32, segments: &[(&str, &str, &str)]) -> Connection {
        let segment = |(name, key, value): &(&str, &str, &str)| PathSegment {
            name: (*name).to_owned(),
            id: format!("{name}-id"),
            metrics: [((*key).to_owned(), (*value).to_owned())].into(),
            ..PathSegment::default()
        };
        let path_segments = segments.iter().map(segment).collect();
        Connection { path: Some(Path { unknown: None, index, path_segments }), ..Connection::default() }
    }

    #[test]
    fn only_upstreams_counters_of_hops_behind_us_are_counted() {
        let conn = answer(
            1,
            &[
                ("client", "server_rx_bytes", "1"),
                ("manager", "server_rx_bytes", "2"),
                ("forwarder", "server_rx_bytes", "3"),
                ("other", "made_up", "4"),
                ("endpoint", "client_drops", "many"),
            ],
        );
        assert_eq!(counts(&conn).collect::<Vec<_>>(), [("forwarder_server_rx_bytes".to_owned(), 3)]);
    }

    #[test]
    fn names_without_number_make_no_counters_without_number() {
        let meter = SdkMeterProvider::builder().build().meter("test");
        let segments = Segments { meter, state: Mutex::default() };
        for i in 0..2 * MAX_COUNTERS {
            let name = format!("hop-{i}");
            segments.answered(&answer(0, &[("us", "x", "1"), (&name, "client_drops", "1")]));
        }
        let state = segments.state.lock();
        assert_eq!(state.counters.len(), MAX_COUNTERS);
        assert_eq!(state.last.values().map(HashMap::len).collect::<Vec<_>>(), [1]);
    }
}
