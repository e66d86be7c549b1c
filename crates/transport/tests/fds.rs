//! Descriptors under load and under attack: none is lost, none is left open.
//!
//! These tests count this process's descriptors, so they run one after the other.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs::File,
    io::{IoSlice, Write as _},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, SystemTime},
};

use nsm_api::pb::{
    connection::Connection as Wire,
    networkservice::{
        NetworkServiceRequest,
        network_service_client::NetworkServiceClient,
        network_service_server::{NetworkService, NetworkServiceServer},
    },
};
use nsm_identity::{Source, ca::Authority};
use nsm_transport::{
    Deadline, DialUrl, FdError, FdStream, FileId, ListenUrl, MAX_FDS_PER_WRITE, MAX_KEPT, Peer, Pool,
    PoolConfig, Server,
};
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::oneshot,
    time::{Instant, timeout},
};
use tonic::{Request, Response, Status, service::Routes};

const PATIENCE: Duration = Duration::from_secs(60);

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Runs a test alone in this process, and checks that it leaves no descriptor open.
fn alone<T>(test: impl Future<Output = T>) -> T {
    run_alone(tokio::runtime::Builder::new_current_thread(), test)
}

fn run_alone<T>(mut runtime: tokio::runtime::Builder, test: impl Future<Output = T>) -> T {
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    // A test that failed says nothing about the others.
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    nsm_transport::raise_descriptor_limit().unwrap();
    // The first runtime of a process opens what the process keeps.
    drop(runtime.enable_all().build().unwrap());
    let before = open_files();
    let runtime = runtime.enable_all().build().unwrap();
    let result = runtime.block_on(test);
    drop(runtime);
    // What may take its time is closed by a thread of its own.
    let end = std::time::Instant::now() + PATIENCE;
    while open_files() != before && std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(open_files(), before, "descriptors are left open");
    result
}

fn open_path(path: impl AsRef<std::path::Path>) -> OwnedFd {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path.as_ref(), flags, rustix::fs::Mode::empty()).unwrap()
}

fn files(dir: &TempDir, count: usize) -> Vec<(FileId, Arc<OwnedFd>)> {
    (0..count)
        .map(|i| {
            let path = dir.path().join(format!("file{i}"));
            File::create(&path).unwrap();
            let file = open_path(&path);
            (FileId::of(&file).unwrap(), Arc::new(file))
        })
        .collect()
}

fn later() -> Instant {
    Instant::now() + PATIENCE
}

/// Takes the descriptors that a request names and sends them back.
struct Mirror;

#[tonic::async_trait]
impl NetworkService for Mirror {
    async fn request(&self, request: Request<NetworkServiceRequest>) -> Result<Response<Wire>, Status> {
        let peer = Peer::of(&request)?.clone();
        let deadline = Deadline::of(&request).unwrap();
        let connection = request.into_inner().connection.unwrap();
        let fds = peer.fds().unwrap();
        for (dev, ino) in &connection.labels {
            let id =
                FileId { dev: dev.split('-').next().unwrap().parse().unwrap(), ino: ino.parse().unwrap() };
            let fd = fds.take(id, deadline.0).await.map_err(|e| Status::deadline_exceeded(e.to_string()))?;
            assert_eq!(FileId::of(&fd).unwrap(), id);
            // As a real handler: its work takes a while, others run.
            tokio::task::yield_now().await;
            fds.send(fd);
        }
        Ok(Response::new(connection))
    }

    async fn close(&self, _: Request<Wire>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }
}

#[test]
fn a_thousand_calls_at_once_with_the_same_and_different_descriptors() {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2);
    run_alone(runtime, async {
        const CALLS: usize = 1000;
        let dir = TempDir::new().unwrap();
        let authority = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
        let source = |name: &str| {
            let id = format!("spiffe://test.lab/{name}").parse().unwrap();
            Source::fixed(authority.identity(&id, Duration::from_secs(3600), SystemTime::now()).unwrap())
        };
        let url: ListenUrl = format!("unix://{}/s.sock", dir.path().display()).parse().unwrap();
        let server = Server::bind(source("server"), std::slice::from_ref(&url)).await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(server.serve(Routes::new(NetworkServiceServer::new(Mirror)), &[], async {
            let _ = stopped.await;
        }));
        // All on one connection.
        let config = PoolConfig { descriptors: usize::MAX, ..PoolConfig::default() };
        let pool = Pool::new(source("client"), config);
        let url: DialUrl = url.to_string().parse().unwrap();
        // 250 files of their own, and one that every call sends.
        let files = files(&dir, 251);
        let started = std::time::Instant::now();
        let calls: Vec<_> = (0..CALLS)
            .map(|i| {
                let (pool, url) = (pool.clone(), url.clone());
                let (own, shared) = (files[1 + i % 250].clone(), files[0].clone());
                tokio::spawn(async move {
                    let connection = pool.get(&url, PATIENCE).await.unwrap();
                    let labels: BTreeMap<_, _> = [&own, &shared]
                        .iter()
                        .enumerate()
                        .map(|(n, (id, _))| (format!("{}-{n}", id.dev), id.ino.to_string()))
                        .collect();
                    connection.send_fd(own.1);
                    connection.send_fd(shared.1);
                    let mut request = Request::new(NetworkServiceRequest {
                        connection: Some(Wire { labels, ..Default::default() }),
                        ..Default::default()
                    });
                    request.set_timeout(PATIENCE);
                    NetworkServiceClient::new(connection.clone()).request(request).await.unwrap();
                    let fds = connection.fds().unwrap();
                    for id in [own.0, shared.0] {
                        let back = fds.take(id, later()).await.unwrap();
                        assert_eq!(FileId::of(&back).unwrap(), id);
                    }
                })
            })
            .collect();
        for call in calls {
            call.await.unwrap();
        }
        println!("{CALLS} calls, {} descriptors each way, {:?}", 2 * CALLS, started.elapsed());
        assert_eq!(pool.handshakes(), 1);
        let connection = pool.get(&url, PATIENCE).await.unwrap();
        assert_eq!(connection.fds().unwrap().kept(), 0, "every descriptor was taken");
        drop((connection, pool));
        stop.send(()).unwrap();
        timeout(PATIENCE, served).await.unwrap().unwrap();
    });
}

fn pair() -> (FdStream, FdStream) {
    let (a, b) = UnixStream::pair().unwrap();
    (trusted(a), trusted(b))
}

fn trusted(socket: UnixStream) -> FdStream {
    let stream = FdStream::new(socket);
    stream.fds().trust();
    stream
}

#[test]
fn more_descriptors_than_one_message_carries_travel_with_one_write() {
    alone(async {
        let dir = TempDir::new().unwrap();
        let (mut a, mut b) = pair();
        let count = 3 * MAX_FDS_PER_WRITE + 5;
        let files = files(&dir, count);
        files.iter().for_each(|(_, fd)| a.fds().send(fd.clone()));
        a.write_all(b"one small message").await.unwrap();
        let mut text = [0; 17];
        b.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"one small message", "the bytes are not changed");
        assert_eq!(b.fds().kept(), count);
        for (id, _) in &files {
            b.fds().take(*id, later()).await.unwrap();
        }
    });
}

#[test]
fn a_descriptor_may_come_after_its_message() {
    alone(async {
        let dir = TempDir::new().unwrap();
        let files = files(&dir, 1);
        let (id, file) = files[0].clone();
        let (mut a, mut b) = pair();
        a.write_all(b"its message").await.unwrap();
        b.read_exact(&mut [0; 11]).await.unwrap();
        let fds = b.fds().clone();
        let taker = tokio::spawn(async move { fds.take(id, later()).await });
        tokio::task::yield_now().await;
        a.fds().send(file);
        a.write_all(b"another").await.unwrap();
        b.read_exact(&mut [0; 7]).await.unwrap();
        assert_eq!(FileId::of(taker.await.unwrap().unwrap()).unwrap(), id);
    });
}

#[test]
fn each_arrival_is_taken_once_and_takers_that_gave_up_lose_nothing() {
    alone(async {
        let dir = TempDir::new().unwrap();
        let files = files(&dir, 1);
        let (id, file) = files[0].clone();
        let (mut a, mut b) = pair();
        let short = Instant::now() + Duration::from_millis(10);
        assert_eq!(b.fds().take(id, short).await.unwrap_err(), FdError::Late(id));
        for _ in 0..2 {
            a.fds().send(file.clone());
        }
        a.write_all(b"x").await.unwrap();
        b.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!(b.fds().kept(), 2, "the same file twice is kept twice");
        b.fds().take(id, later()).await.unwrap();
        b.fds().take(id, later()).await.unwrap();
        let short = Instant::now() + Duration::from_millis(10);
        assert_eq!(b.fds().take(id, short).await.unwrap_err(), FdError::Late(id));

        // The end of the connection ends the wait.
        let fds = b.fds().clone();
        let taker = tokio::spawn(async move { fds.take(id, later()).await });
        tokio::task::yield_now().await;
        drop(a);
        assert_eq!(b.read(&mut [0; 1]).await.unwrap(), 0);
        assert_eq!(taker.await.unwrap().unwrap_err(), FdError::Closed(id));
        let fds = b.fds().clone();
        drop(b);
        assert_eq!(fds.take(id, later()).await.unwrap_err(), FdError::Closed(id));
        fds.send(file);
    });
}

#[test]
fn what_nobody_takes_is_closed_soon() {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.start_paused(true);
    run_alone(runtime, async {
        let dir = TempDir::new().unwrap();
        let before = open_files();
        let (mut a, mut b) = pair();
        for (_, file) in files(&dir, 10) {
            a.fds().send(file);
        }
        a.write_all(b"x").await.unwrap();
        b.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!(open_files(), before + 2 + 10);
        tokio::time::sleep(nsm_transport::GRACE + Duration::from_millis(1)).await;
        assert_eq!(b.fds().kept(), 0);
        assert_eq!(open_files(), before + 2);
        // Again: the sweeper that has ended starts anew.
        for (_, file) in files(&dir, 1) {
            a.fds().send(file);
        }
        a.write_all(b"x").await.unwrap();
        b.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!(b.fds().kept(), 1);
        tokio::time::sleep(nsm_transport::GRACE + Duration::from_millis(1)).await;
        assert_eq!(b.fds().kept(), 0);
    });
}

#[test]
fn a_flood_of_descriptors_is_bounded() {
    alone(async {
        let dir = TempDir::new().unwrap();
        let files = files(&dir, 1);
        let (a, mut b) = pair();
        let sender = tokio::spawn(async move {
            let mut a = a;
            for _ in 0..2 * MAX_KEPT / MAX_FDS_PER_WRITE {
                for _ in 0..MAX_FDS_PER_WRITE {
                    a.fds().send(files[0].1.clone());
                }
                a.write_all(b"x").await.unwrap();
            }
            a
        });
        let mut bytes = vec![0; 2 * MAX_KEPT / MAX_FDS_PER_WRITE];
        b.read_exact(&mut bytes).await.unwrap();
        assert_eq!(b.fds().kept(), MAX_KEPT);
        drop(sender.await.unwrap());
    });
}

#[test]
fn a_stranger_gets_the_room_of_one_message() {
    alone(async {
        let dir = TempDir::new().unwrap();
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (FdStream::new(a), FdStream::new(b));
        files(&dir, 200).into_iter().for_each(|(_, fd)| a.fds().send(fd));
        a.write_all(b"x").await.unwrap();
        a.write_all(b"yz").await.unwrap();
        a.write_all(b"yz").await.unwrap();
        a.write_all(b"yz").await.unwrap();
        b.read_exact(&mut [0; 7]).await.unwrap();
        assert_eq!(b.fds().kept(), MAX_FDS_PER_WRITE);
    });
}

#[test]
fn only_what_closes_at_once_is_taken_from_peers() {
    alone(async {
        let (mut a, mut b) = pair();
        let dir = TempDir::new().unwrap();
        let file = File::create(dir.path().join("file")).unwrap();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let unfit: Vec<OwnedFd> = vec![file.into(), socket.into()];
        let ids: Vec<_> = unfit.iter().map(|fd| FileId::of(fd).unwrap()).collect();
        // One is asked for before it comes, the other after.
        let (fds, first) = (b.fds().clone(), ids[0]);
        let early = tokio::spawn(async move { fds.take(first, later()).await });
        tokio::task::yield_now().await;
        for fd in unfit {
            a.fds().send(fd);
        }
        let namespace: OwnedFd = File::open("/proc/self/ns/net").unwrap().into();
        let id = FileId::of(&namespace).unwrap();
        assert_eq!(id, FileId::of_path("/proc/self/ns/net").unwrap());
        a.fds().send(namespace);
        a.write_all(b"x").await.unwrap();
        b.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!(early.await.unwrap().unwrap_err(), FdError::Unfit(ids[0]));
        assert_eq!(b.fds().take(ids[1], later()).await.unwrap_err(), FdError::Unfit(ids[1]));
        b.fds().take(id, later()).await.unwrap();
        assert_eq!(b.fds().kept(), 0);
    });
}

#[test]
fn who_sends_many_that_do_not_close_at_once_is_cut_off() {
    alone(async {
        let (mut a, mut b) = pair();
        let dir = TempDir::new().unwrap();
        let file: Arc<OwnedFd> = Arc::new(OwnedFd::from(File::create(dir.path().join("file")).unwrap()));
        for _ in 0..64 {
            a.fds().send(file.clone());
        }
        a.write_all(b"x").await.unwrap();
        b.read_exact(&mut [0; 1]).await.unwrap();
        a.fds().send(file);
        a.write_all(b"x").await.unwrap();
        let error = b.read_exact(&mut [0; 1]).await.unwrap_err();
        assert!(error.to_string().contains("neither namespaces nor opened O_PATH"), "{error}");
    });
}

/// Sends one raw message the way a peer might: any number of bytes and descriptors.
fn send_raw(socket: &std::os::unix::net::UnixStream, bytes: &[u8], fds: &[&OwnedFd]) {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    }
    let flags = rustix::net::SendFlags::NOSIGNAL;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags).unwrap();
}

/// What a peer may do: messages of some bytes with some descriptors, read in pieces of some size.
fn messages() -> impl Strategy<Value = (Vec<(usize, usize)>, usize)> {
    (prop::collection::vec((1usize..200, 0usize..65), 1..20), 1usize..300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_grouping_bytes_and_descriptors_arrive((messages, piece) in messages()) {
        alone(async {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let mut stream = trusted(UnixStream::from_std(ours).unwrap());
            let file = open_path("/proc/self/stat");
            let mut sent = Vec::new();
            let mut count = 0;
            for (n, (bytes, fds)) in messages.into_iter().enumerate() {
                let data: Vec<u8> = (0..bytes).map(|i| (n * 31 + i) as u8).collect();
                send_raw(&theirs, &data, &vec![&file; fds]);
                sent.extend(data);
                count += fds;
            }
            drop(theirs);
            let mut received: Vec<u8> = Vec::new();
            let mut buffer = vec![0; piece];
            loop {
                match stream.read(&mut buffer).await.unwrap() {
                    0 => break,
                    read => received.extend(&buffer[..read]),
                }
            }
            assert_eq!(received, sent);
            assert_eq!(stream.fds().kept(), count);
        });
    }

    #[test]
    fn as_many_descriptors_as_the_kernel_carries_arrive(fds in 65usize..=253, bytes in 1usize..100) {
        alone(async {
            let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let mut stream = trusted(UnixStream::from_std(ours).unwrap());
            let file = open_path("/proc/self/stat");
            send_raw(&theirs, &vec![7; bytes], &vec![&file; fds]);
            theirs.write_all(b"more").unwrap();
            let mut received = vec![0; bytes + 4];
            stream.read_exact(&mut received).await.unwrap();
            assert_eq!(&received[bytes..], b"more");
            assert_eq!(stream.fds().kept(), fds);
        });
    }
}
