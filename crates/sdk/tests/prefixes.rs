//! The prefix server and its client, over real mTLS.
#![allow(clippy::unwrap_used, reason = "a test program")]

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use nsm_api::pb::ipam::{PrefixRequest, Type, ipam_client::IpamClient};
use nsm_identity::{Source, ca::Authority};
use nsm_sdk::{
    prefix_client::LeasedPrefix,
    prefix_server::{PrefixServer, PrefixServerConfig},
};
use nsm_transport::{DialTarget, DialUrl, Guard, Limits, ListenUrl, Pool, PoolConfig};
use tokio::{sync::oneshot, task::JoinHandle};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::Code;

const PATIENCE: Duration = Duration::from_secs(30);

struct Mesh {
    authority: Authority,
    directory: tempfile::TempDir,
}

impl Mesh {
    fn new() -> Self {
        let authority = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
        Self { authority, directory: tempfile::tempdir().unwrap() }
    }

    fn source(&self, name: &str) -> Source {
        let id = format!("spiffe://test.lab/{name}").parse().unwrap();
        Source::fixed(self.authority.identity(&id, Duration::from_secs(3600), SystemTime::now()).unwrap())
    }

    fn config(&self) -> PrefixServerConfig {
        PrefixServerConfig {
            listen_on: vec![ListenUrl::Unix(self.directory.path().join("ipam.sock"))],
            prefix: p("172.16.0.0/22"),
            client_prefix_length: 24,
            state_file: Some(self.state_file()),
            guard: Guard { limits: Limits { watches_of_one: 3, ..Limits::default() }, ..Guard::default() },
        }
    }

    fn state_file(&self) -> PathBuf {
        self.directory.path().join("leases")
    }

    async fn serve(&self) -> (oneshot::Sender<()>, JoinHandle<()>) {
        let server = PrefixServer::bind(self.config(), self.source("ipam")).await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        (stop, tokio::spawn(server.serve(async { drop(stopped.await) })))
    }

    fn target(&self) -> DialTarget {
        let url: DialUrl =
            format!("unix://{}", self.directory.path().join("ipam.sock").display()).parse().unwrap();
        (&url).into()
    }

    fn client(&self, name: &str, excluded: &[&str]) -> LeasedPrefix {
        let pool = Pool::new(self.source(name), PoolConfig::default());
        let excluded = excluded.iter().map(|text| p(text)).collect();
        LeasedPrefix::keep(pool, self.target(), PATIENCE, excluded)
    }
}

fn p(text: &str) -> IpNet {
    text.parse().unwrap()
}

#[tokio::test]
async fn a_holder_keeps_its_prefix_over_a_restart_of_the_server() {
    let mesh = Mesh::new();
    let (stop, served) = mesh.serve().await;
    let first = mesh.client("a", &[]);
    assert_eq!(first.get().await, p("172.16.0.0/24"));
    let second = mesh.client("b", &["172.16.0.0/23"]);
    assert_eq!(second.get().await, p("172.16.2.0/24"));
    stop.send(()).unwrap();
    served.await.unwrap();
    assert_eq!(std::fs::read_to_string(mesh.state_file()).unwrap(), "172.16.0.0/24\n172.16.2.0/24\n");
    // Whoever comes before the holders are back gets neither of theirs.
    let (stop, served) = mesh.serve().await;
    let third = mesh.client("c", &[]);
    assert_eq!(third.get().await, p("172.16.1.0/24"));
    assert_eq!((first.get().await, second.get().await), (p("172.16.0.0/24"), p("172.16.2.0/24")));
    // They have come back once nothing is free but the fourth, whoever asks.
    let fourth = mesh.client("d", &[]);
    assert_eq!(fourth.get().await, p("172.16.3.0/24"));
    stop.send(()).unwrap();
    served.await.unwrap();
}

#[tokio::test]
async fn a_stream_allocates_gives_back_and_is_told_what_is_wrong() {
    let mesh = Mesh::new();
    let (stop, served) = mesh.serve().await;
    let pool = Pool::new(mesh.source("raw"), PoolConfig::default());
    let channel = pool.get(mesh.target(), PATIENCE).await.unwrap();
    let (ask, requests) = tokio::sync::mpsc::channel(8);
    let mut client = IpamClient::new(channel.clone());
    let send = async |kind: Type, prefix: &str| {
        let exclude_prefixes = vec!["not one".into(), "172.16.1.0/24".into()];
        let request = PrefixRequest { r#type: kind.into(), prefix: prefix.into(), exclude_prefixes };
        ask.send(request).await.unwrap();
    };
    send(Type::Allocate, "").await;
    let mut answers = client.manage_prefixes(ReceiverStream::new(requests)).await.unwrap().into_inner();
    let first = answers.next().await.unwrap().unwrap();
    assert_eq!((first.prefix.as_str(), first.exclude_prefixes.len()), ("172.16.0.0/24", 2));
    // What is given back has no answer: the next answer is that to the next question.
    send(Type::Delete, "172.16.0.0/24").await;
    send(Type::Delete, "nonsense").await;
    send(Type::Allocate, "").await;
    assert_eq!(answers.next().await.unwrap().unwrap().prefix, "172.16.0.0/24");
    for expected in ["172.16.2.0/24", "172.16.3.0/24"] {
        send(Type::Allocate, "").await;
        assert_eq!(answers.next().await.unwrap().unwrap().prefix, expected);
    }
    send(Type::Allocate, "").await;
    let error = answers.next().await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert!(error.message().contains("no /24 is free in 172.16.0.0/22"), "{error:?}");
    for kind in [Type::Undefined as i32, 77] {
        let (ask, requests) = tokio::sync::mpsc::channel(1);
        ask.send(PrefixRequest { r#type: kind, ..PrefixRequest::default() }).await.unwrap();
        let mut answers = client.manage_prefixes(ReceiverStream::new(requests)).await.unwrap().into_inner();
        let error = answers.next().await.unwrap().unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains("expected 1 (ALLOCATE) or 2 (DELETE)"), "{error:?}");
    }
    stop.send(()).unwrap();
    served.await.unwrap();
}

#[tokio::test]
async fn an_identity_has_so_many_streams_and_messages_are_bounded() {
    let mesh = Mesh::new();
    let (stop, served) = mesh.serve().await;
    let open = async |name: &str, request: PrefixRequest| {
        let pool = Pool::new(mesh.source(name), PoolConfig::default());
        let mut client = IpamClient::new(pool.get(mesh.target(), PATIENCE).await.unwrap());
        let requests = tokio_stream::once(request).chain(tokio_stream::pending());
        Ok::<_, tonic::Status>(client.manage_prefixes(requests).await?.into_inner())
    };
    let nothing = || PrefixRequest { r#type: Type::Delete.into(), ..PrefixRequest::default() };
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(open("greedy", nothing()).await.unwrap());
    }
    let refused = open("greedy", nothing()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("spiffe://test.lab/greedy has 3 streams open"), "{refused}");
    let large = PrefixRequest { prefix: "x".repeat(3 << 20), ..nothing() };
    let mut answers = open("another", large).await.unwrap();
    assert!(answers.next().await.is_none(), "a message that is too long ends its stream");
    drop(streams);
    stop.send(()).unwrap();
    served.await.unwrap();
}

#[tokio::test]
async fn a_state_file_that_is_none_is_named() {
    let mesh = Mesh::new();
    std::fs::write(mesh.state_file(), "172.16.0.0/24\nrubbish\n").unwrap();
    let error = PrefixServer::bind(mesh.config(), mesh.source("ipam")).await.unwrap_err().to_string();
    assert!(error.contains("leases") && error.contains("one prefix a line"), "{error}");
    let wrong = PrefixServerConfig { client_prefix_length: 8, state_file: None, ..mesh.config() };
    let error = wrong.check().unwrap_err().to_string();
    assert!(error.contains("has no /8 in it"), "{error}");
}
