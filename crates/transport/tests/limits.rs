//! Beyond its bounds a peer is refused and counted, and others are served.
#![allow(clippy::unwrap_used)]

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures::StreamExt;
use http_body::Frame;
use http_body_util::StreamBody;
use nsm_identity::{Source, ca::Authority};
use nsm_transport::{Connection, DialUrl, Guard, Limits, ListenUrl, Pool, PoolConfig, Server};
use tonic::{Code, Status, body::Body, service::Routes};
use tower::Service;

const PATIENCE: Duration = Duration::from_secs(10);

struct Served {
    authority: Authority,
    url: DialUrl,
    guard: Guard,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Served {
    async fn with(limits: Limits) -> Self {
        let authority = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
        let guard = Guard { limits, ..Guard::default() };
        let listen: ListenUrl = "tcp://127.0.0.1:0".parse().unwrap();
        let server = Server::bind(source(&authority, "server"), &[listen]).await.unwrap().guarded(&guard);
        let url = server.urls()[0].to_string().parse().unwrap();
        let task = tokio::spawn(server.serve(Routes::default(), &[], std::future::pending()));
        Self { authority, url, guard, task }
    }

    fn pool(&self, who: &str) -> Pool {
        Pool::new(source(&self.authority, who), PoolConfig::default())
    }

    /// Connects and asks after the server's health.
    async fn works(&self, pool: &Pool) -> Result<Connection, Status> {
        let connection = pool.get(&self.url, PATIENCE).await.map_err(Status::from)?;
        check(&connection, stream(vec![vec![0; 5]], true)).await.map(|()| connection)
    }
}

fn source(authority: &Authority, name: &str) -> Source {
    let id = format!("spiffe://test.lab/{name}").parse().unwrap();
    Source::fixed(authority.identity(&id, Duration::from_secs(3600), SystemTime::now()).unwrap())
}

/// A body of these pieces, which then ends or never does.
fn stream(pieces: Vec<Vec<u8>>, ends: bool) -> Body {
    let pieces =
        futures::stream::iter(pieces).map(|piece| Ok::<_, Infallible>(Frame::data(Bytes::from(piece))));
    if ends {
        Body::new(StreamBody::new(pieces))
    } else {
        Body::new(StreamBody::new(pieces.chain(futures::stream::pending())))
    }
}

async fn check(connection: &Connection, body: Body) -> Result<(), Status> {
    let request = http::Request::post("/grpc.health.v1.Health/Check")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap();
    let response = connection.clone().call(request).await?;
    Status::from_header_map(response.headers()).filter(|status| status.code() != Code::Ok).map_or(Ok(()), Err)
}

#[tokio::test]
async fn one_identity_has_so_many_connections_and_others_have_theirs() {
    let served = Served::with(Limits { connections_of_one: 2, ..Limits::default() }).await;
    let pools = [served.pool("greedy"), served.pool("greedy"), served.pool("greedy")];
    let kept = [served.works(&pools[0]).await.unwrap(), served.works(&pools[1]).await.unwrap()];
    let refused = served.works(&pools[2]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(served.guard.refusals.of("connections_of_one") >= 1);
    served.works(&served.pool("modest")).await.unwrap();
    // Who ends one may have another.
    let [one, _two] = kept;
    drop(one);
    let [first, ..] = pools;
    drop(first);
    let end = tokio::time::Instant::now() + PATIENCE;
    while served.works(&served.pool("greedy")).await.is_err() {
        assert!(tokio::time::Instant::now() < end, "an ended connection still counts");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn messages_that_are_begun_and_not_ended_are_bounded() {
    let served = Served::with(Limits { in_flight: 256 * 1024, ..Limits::default() }).await;
    let pool = served.pool("greedy");
    let connection = Arc::new(served.works(&pool).await.unwrap());
    // Each says that it has a megabyte to send, sends a tenth of it, and then nothing.
    let begun = || stream(vec![vec![0, 0, 0x0f, 0, 0], vec![0; 100 * 1024]], false);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let connection = connection.clone();
        let body = begun();
        calls.spawn(async move { check(&connection, body).await });
    }
    let first =
        tokio::time::timeout(PATIENCE, calls.join_next()).await.expect("one is refused").unwrap().unwrap();
    assert_eq!(first.unwrap_err().code(), Code::ResourceExhausted);
    assert!(served.guard.refusals.of("in_flight") >= 1);
    // What ends gives its bytes back.
    calls.shutdown().await;
    let end = tokio::time::Instant::now() + PATIENCE;
    while check(&connection, stream(vec![vec![0; 5]], true)).await.is_err() {
        assert!(tokio::time::Instant::now() < end, "ended calls still count");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A stream that lives long sends more in its life than may be in flight at a moment.
#[tokio::test]
async fn messages_that_have_ended_do_not_count_against_a_stream() {
    let served = Served::with(Limits { in_flight: 64 * 1024, ..Limits::default() }).await;
    let connection = served.works(&served.pool("long")).await.unwrap();
    let ask = || {
        let message = vec![
            // ServerReflectionRequest { list_services: "…" }
            0x3a, 0x80, 0x10,
        ];
        let text = vec![b'x'; 2048];
        let length = u32::try_from(message.len() + text.len()).unwrap().to_be_bytes();
        [&[0][..], &length, &message, &text].concat()
    };
    let all = ask().repeat(100);
    // In pieces that begin and end anywhere.
    let pieces: Vec<Vec<u8>> = all.chunks(777).map(<[u8]>::to_vec).collect();
    let request = http::Request::post("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(stream(pieces, true))
        .unwrap();
    let answer = connection.clone().call(request).await.unwrap();
    let answer = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap();
    let status = Status::from_header_map(answer.trailers().unwrap()).unwrap();
    let mut rest = &answer.to_bytes()[..];
    let mut answers = 0;
    while let [_, a, b, c, d, after @ ..] = rest {
        rest = &after[u32::from_be_bytes([*a, *b, *c, *d]) as usize..];
        answers += 1;
    }
    assert_eq!((status.code(), answers), (Code::Ok, 100), "{status}");
}

#[tokio::test]
async fn who_does_not_speak_tls_is_counted() {
    let served = Served::with(Limits::default()).await;
    let address = served.url.to_string().trim_start_matches("tcp://").to_owned();
    let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stream, b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest).await;
    let end = tokio::time::Instant::now() + PATIENCE;
    while served.guard.refusals.of("handshake") == 0 {
        assert!(tokio::time::Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
