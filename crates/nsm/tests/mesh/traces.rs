//! Traces and metrics reach a collector, and a request is one trace over all hops.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::Span,
};
use rustix::process::Signal;
use tonic::{Request, Response, Status};

use crate::harness::{Mesh, eventually};

const PODS: &str = "\
- {name: a, node: node1}
- {name: vpn, node: node1, endpoint: {services: [plain], cidrPrefix: [172.16.1.0/24]}}
";

#[derive(Clone, Default)]
struct Collector {
    /// Spans with the `service.name` that sent them.
    spans: Arc<Mutex<Vec<(String, Span)>>>,
    /// Names of metrics, with their senders.
    metrics: Arc<Mutex<BTreeSet<(String, String)>>>,
}

fn text<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    let value = attributes.iter().find(|a| a.key == key)?.value.as_ref()?.value.as_ref()?;
    match value {
        Value::StringValue(text) => Some(text),
        _ => None,
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let name = text(&attributes, "service.name").unwrap_or_default().to_owned();
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.spans.lock().expect("no panic").extend(spans.map(|span| (name.clone(), span)));
        }
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        for resource in request.into_inner().resource_metrics {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let name = text(&attributes, "service.name").unwrap_or_default().to_owned();
            let metrics = resource.scope_metrics.into_iter().flat_map(|scope| scope.metrics);
            let names = metrics.map(|metric| (name.clone(), metric.name));
            self.metrics.lock().expect("no panic").extend(names);
        }
        Ok(Response::new(Default::default()))
    }
}

impl Collector {
    /// Serves at a socket that every namespace can reach, until the runtime ends.
    fn serve(&self, socket: &Path) -> tokio::runtime::Runtime {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let inside = runtime.enter();
        let listener = tokio::net::UnixListener::bind(socket).expect("bind");
        drop(inside);
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(self.clone()))
            .add_service(MetricsServiceServer::new(self.clone()));
        let callers = tokio_stream::wrappers::UnixListenerStream::new(listener);
        runtime.spawn(server.serve_with_incoming(callers));
        runtime
    }
}

#[test]
fn a_request_is_one_trace_over_all_hops() {
    let collector = Collector::default();
    let directory = tempfile::tempdir().expect("directory");
    let socket = directory.path().join("collector.sock");
    let url = format!("unix://{}", socket.display());
    let telemetry = [
        ("TELEMETRY", "true"),
        ("NSM_OPEN_TELEMETRY_ENDPOINT", url.as_str()),
        ("NSM_METRICS_EXPORT_INTERVAL", "500ms"),
    ];
    let Some(mesh) = Mesh::up_with("a_request_is_one_trace_over_all_hops", PODS, |plan| {
        for process in &mut plan.processes {
            process.env.extend(telemetry.map(|(key, value)| (key.to_owned(), value.to_owned())));
        }
    }) else {
        return;
    };
    // Late: nobody waits for a collector.
    let runtime = collector.serve(&socket);
    let more = ["--telemetry", "true", "--open-telemetry-endpoint", &url, "--max-token-lifetime", "5s"];
    mesh.client("c", "a", "kernel://plain/nsm0", &more);
    mesh.ready(&["c"]);

    let hops = ["c", "manager-node1", "forwarder-node1", "vpn"];
    eventually("one trace has spans of all hops", || {
        let spans = collector.spans.lock().expect("no panic");
        let mut traces = BTreeMap::<&[u8], BTreeSet<&str>>::new();
        for (name, span) in spans.iter() {
            if text(&span.attributes, "type") == Some("networkService") {
                traces.entry(&span.trace_id).or_default().insert(name);
            }
        }
        match traces.values().any(|names| hops.iter().all(|hop| names.contains(hop))) {
            true => Ok(()),
            false => Err(format!("{traces:?}")),
        }
    });
    {
        let spans = collector.spans.lock().expect("no panic");
        let root = spans.iter().find(|(name, span)| {
            name == "c"
                && span.name == "[id: c-0] [type: networkService] [method: Request]"
                && span.parent_span_id.is_empty()
        });
        let root = &root.unwrap_or_else(|| panic!("{spans:#?}")).1;
        let of_trace: Vec<_> = spans.iter().filter(|(_, span)| span.trace_id == root.trace_id).collect();
        let ids: BTreeSet<_> = of_trace.iter().map(|(_, span)| &span.span_id).collect();
        for (name, span) in &of_trace {
            let parent = &span.parent_span_id;
            assert!(
                parent.is_empty() || ids.contains(parent),
                "{name} {}: its parent is not there",
                span.name
            );
            assert!(
                span.span_id == root.span_id || !parent.is_empty(),
                "a second root: {name} {}",
                span.name
            );
        }
        let rpc = |kind| {
            of_trace
                .iter()
                .filter(|(_, s)| s.name == "networkservice.NetworkService/Request" && s.kind == kind)
                .count()
        };
        // SPAN_KIND_SERVER and SPAN_KIND_CLIENT: three hops are called.
        assert_eq!((rpc(2), rpc(3)), (3, 3), "{of_trace:#?}");
        let all = format!("{spans:?}");
        assert!(!all.contains("eyJ"), "a token is in a trace");
    }
    eventually("the manager exports the forwarder's counters", || {
        let metrics = collector.metrics.lock().expect("no panic").clone();
        match metrics.contains(&("manager-node1".into(), "forwarder-node1_server_rx_bytes".into())) {
            true => Ok(()),
            false => Err(format!("{metrics:?}")),
        }
    });
    mesh.end("c", Signal::TERM);
    drop(mesh);
    runtime.shutdown_background();
}
