//! gRPC reflection that costs nothing until somebody asks: its index of descriptors takes half a megabyte.

use std::{
    convert::Infallible,
    fmt,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use http::{Request, Response};
use tonic::{
    body::Body,
    server::NamedService,
    service::{Routes, RoutesBuilder},
};
use tower::Service;
use tracing::error;

/// The service: tells of some services of ours, and of health.
#[derive(Clone)]
pub struct Reflection {
    services: Arc<[String]>,
    built: Arc<OnceLock<Routes>>,
}

impl Reflection {
    /// Tells of these services.
    #[must_use]
    pub fn of(services: &[&str]) -> Self {
        Self { services: services.iter().map(|&name| name.into()).collect(), built: Arc::default() }
    }

    fn build(&self) -> Routes {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(nsm_api::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.health.v1.Health");
        let builder = self.services.iter().fold(builder, |builder, name| builder.with_service_name(&**name));
        let mut routes = RoutesBuilder::default();
        match builder.build_v1() {
            Ok(server) => _ = routes.add_service(server),
            // Our own descriptors are broken, which a test would have found: callers hear that nobody serves this.
            Err(reason) => error!(%reason, "no reflection"),
        }
        routes.routes().prepare()
    }
}

impl fmt::Debug for Reflection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reflection").field("services", &self.services).finish_non_exhaustive()
    }
}

impl NamedService for Reflection {
    const NAME: &'static str = "grpc.reflection.v1.ServerReflection";
}

impl Service<Request<Body>> for Reflection {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = <Routes as Service<Request<Body>>>::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.built.get_or_init(|| self.build()).clone().call(request)
    }
}
