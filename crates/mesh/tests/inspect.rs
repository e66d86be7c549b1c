//! Who may look at a process over mTLS, and that every server has health and reflection.
#![allow(clippy::unwrap_used, reason = "a test program")]

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use nsm_api::pb::introspect::{LogLevel, Query, introspect_client::IntrospectClient, item::What};
use nsm_identity::{Source, ca::Authority};
use nsm_mesh::{Inspector, inspect};
use nsm_transport::{Connection, DialUrl, ListenUrl, Pool, PoolConfig, Server};
use tonic::Code;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

struct Peers {
    authority: Authority,
    url: DialUrl,
}

impl Peers {
    /// A server that tells `readers` of itself.
    async fn with_readers(readers: &[&str]) -> Self {
        let now = SystemTime::now();
        let authority = Authority::new("example.org".parse().unwrap(), now).unwrap();
        let inspector = Arc::new(Inspector::default());
        inspector.name("manager", "m");
        inspector.readers(readers.iter().map(|id| id.parse().unwrap()));
        let source = source(&authority, "spiffe://example.org/manager");
        let listen: ListenUrl = "tcp://127.0.0.1:0".parse().unwrap();
        let server = Server::bind(source, &[listen]).await.unwrap();
        let url = server.urls()[0].to_string().parse().unwrap();
        let routes = tonic::service::Routes::new(inspector.over_mtls());
        tokio::spawn(server.serve(routes, &[inspect::SERVICE], std::future::pending()));
        Self { authority, url }
    }

    async fn connection(&self, id: &str) -> Connection {
        let pool = Pool::new(source(&self.authority, id), PoolConfig::default());
        pool.get(&self.url, Duration::from_secs(5)).await.unwrap()
    }
}

fn source(authority: &Authority, id: &str) -> Source {
    let identity = authority.identity(&id.parse().unwrap(), Duration::from_secs(60), SystemTime::now());
    Source::fixed(identity.unwrap())
}

#[tokio::test]
async fn nobody_looks_at_a_process_unless_the_operator_says_so() {
    let reader = "spiffe://example.org/operator";
    for (readers, who, may) in [
        (&[][..], reader, false),
        (&[reader][..], "spiffe://example.org/workload", false),
        (&[reader][..], reader, true),
    ] {
        let peers = Peers::with_readers(readers).await;
        let mut client = IntrospectClient::new(peers.connection(who).await);
        match client.look(Query::default()).await {
            Ok(mut told) => {
                let item = told.get_mut().message().await.unwrap().unwrap();
                assert!(matches!(item.what, Some(What::Process(p)) if p.name == "m" && p.role == "manager"));
                assert!(may);
            }
            Err(status) => {
                assert!(!may);
                assert_eq!(status.code(), Code::PermissionDenied);
                assert!(status.message().contains("NSM_INTROSPECT_READERS"), "{status:?}");
            }
        }
        // Reading is one thing, changing another.
        let denied = client.set_log_level(LogLevel { filter: "trace".into() }).await.unwrap_err();
        assert_eq!(denied.code(), Code::PermissionDenied);
    }
}

#[tokio::test]
async fn every_server_has_health_and_reflection() {
    let peers = Peers::with_readers(&[]).await;
    let connection = peers.connection("spiffe://example.org/anybody").await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(connection.clone());
    for service in ["", inspect::SERVICE] {
        let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), tonic_health::pb::health_check_response::ServingStatus::Serving);
    }
    let ask = |message_request| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(message_request),
    };
    let questions = [
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol(inspect::SERVICE.into())),
    ];
    let mut client = ServerReflectionClient::new(connection);
    let mut answers =
        client.server_reflection_info(tokio_stream::iter(questions)).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list")
    };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"grpc.health.v1.Health") && names.contains(&inspect::SERVICE), "{names:?}");
    let answer = answers.message().await.unwrap().unwrap().message_response;
    assert!(
        matches!(answer, Some(MessageResponse::FileDescriptorResponse(file)) if !file.file_descriptor_proto.is_empty())
    );
}
