//! Sockets for a [`Forwarder`]: UDP and TCP towards clients, one socket for each packet towards servers.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Notify, Semaphore, oneshot},
    task::AbortHandle,
    time::timeout,
};

use crate::{
    config::Config,
    forwarder::{Action, BUDGET, ExchangeId, Forwarder, Transport},
    message::MAX_QUERY,
};

/// Streams of clients that are open at a time; more are closed at once.
pub const MAX_STREAMS: usize = 64;
/// How long a client's stream may be silent, or take to send one question or to take one answer.
pub const STREAM_PATIENCE: Duration = Duration::from_secs(5);

/// How the forwarder knows a client.
#[derive(Debug)]
enum Client {
    Udp(SocketAddr),
    Tcp(oneshot::Sender<Vec<u8>>),
}

/// A forwarder that serves; dropped, it ends.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    tasks: Vec<AbortHandle>,
    address: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    forwarder: Mutex<Forwarder<Client>>,
    exchanges: Mutex<HashMap<ExchangeId, AbortHandle>>,
    udp: UdpSocket,
    /// The forwarder's deadline may have changed.
    changed: Notify,
}

impl Server {
    /// Listens, for UDP and TCP, in the network namespace of this process.
    ///
    /// # Errors
    /// An address that is taken, or that this process may not have.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let (udp, tcp) = listen(address).await?;
        let address = tcp.local_addr()?;
        let shared = Arc::new(Shared {
            forwarder: Mutex::new(Forwarder::new(address)),
            exchanges: Mutex::default(),
            udp,
            changed: Notify::new(),
        });
        let tasks = vec![
            tokio::spawn(datagrams(Arc::clone(&shared))).abort_handle(),
            tokio::spawn(streams(Arc::clone(&shared), tcp)).abort_handle(),
            tokio::spawn(timer(Arc::clone(&shared))).abort_handle(),
        ];
        Ok(Self { shared, tasks, address })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What a connection brought, instead of what it brought before.
    pub fn set(&self, id: &str, configs: Vec<Config>) {
        self.shared.forwarder.lock().set(id, configs);
    }

    /// How many questions are worked on, and how many packets are under way.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        self.shared.forwarder.lock().load()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
        self.shared.exchanges.lock().drain().for_each(|(_, task)| task.abort());
    }
}

/// Both sockets at one port. Where that is for the system to choose, it chooses for one of them.
async fn listen(address: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let mut tries = 0;
    loop {
        let tcp = TcpListener::bind(address).await?;
        match UdpSocket::bind(tcp.local_addr()?).await {
            Err(error) if address.port() == 0 && error.kind() == io::ErrorKind::AddrInUse && tries < 8 => {
                tries += 1;
            }
            udp => return Ok((udp?, tcp)),
        }
    }
}

fn random() -> u16 {
    rand::random()
}

impl Shared {
    fn step(self: &Arc<Self>, work: impl FnOnce(&mut Forwarder<Client>, Instant) -> Vec<Action<Client>>) {
        let actions = work(&mut self.forwarder.lock(), Instant::now());
        for action in actions {
            match action {
                Action::Ask { exchange, server, transport, packet } => {
                    let shared = Arc::clone(self);
                    // Held while it starts, so that it cannot end before it is in the table.
                    let mut exchanges = self.exchanges.lock();
                    let task =
                        tokio::spawn(
                            async move { shared.exchange(exchange, server, transport, packet).await },
                        );
                    exchanges.insert(exchange, task.abort_handle());
                }
                Action::Forget(exchange) => {
                    if let Some(task) = self.exchanges.lock().remove(&exchange) {
                        task.abort();
                    }
                }
                Action::Reply(Client::Udp(client), packet) => {
                    // A client whose socket is full, or gone, asks again.
                    if let Err(error) = self.udp.try_send_to(&packet, client) {
                        tracing::debug!(%client, %error, "an answer was not sent");
                    }
                }
                Action::Reply(Client::Tcp(reply), packet) => {
                    // A client that has left hears nothing.
                    let _ = reply.send(packet);
                }
            }
        }
        self.changed.notify_one();
    }

    async fn exchange(
        self: Arc<Self>,
        id: ExchangeId,
        server: SocketAddr,
        transport: Transport,
        packet: Vec<u8>,
    ) {
        let done = match transport {
            Transport::Udp => self.by_udp(id, server, &packet).await,
            Transport::Tcp => self.by_tcp(id, server, &packet).await,
        };
        if let Err(error) = done {
            tracing::debug!(%server, %error, "a DNS server was not reached");
        }
        self.step(|forwarder, now| forwarder.failed(now, id, &mut random));
    }

    async fn by_udp(self: &Arc<Self>, id: ExchangeId, server: SocketAddr, packet: &[u8]) -> io::Result<()> {
        let any = match server.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        // A port of its own that nobody can know, and connected: the kernel drops what others send.
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(server).await?;
        socket.send(packet).await?;
        let mut answer = vec![0; MAX_QUERY];
        loop {
            let length = socket.recv(&mut answer).await?;
            let heard = answer.get(..length).unwrap_or_default();
            // What is not the answer does not end it; what is aborts this task.
            self.step(|forwarder, now| forwarder.answer(now, id, heard, &mut random));
        }
    }

    async fn by_tcp(self: &Arc<Self>, id: ExchangeId, server: SocketAddr, packet: &[u8]) -> io::Result<()> {
        let mut stream = timeout(BUDGET, TcpStream::connect(server)).await.map_err(io::Error::from)??;
        stream.write_all(&framed(packet)).await?;
        let length = stream.read_u16().await?;
        let mut answer = vec![0; length.into()];
        stream.read_exact(&mut answer).await?;
        self.step(|forwarder, now| forwarder.answer(now, id, &answer, &mut random));
        Ok(())
    }
}

fn framed(packet: &[u8]) -> Vec<u8> {
    let length = u16::try_from(packet.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], packet].concat()
}

async fn datagrams(shared: Arc<Shared>) {
    // One byte more than is taken: what is longer is seen to be.
    let mut packet = vec![0; MAX_QUERY + 1];
    loop {
        match shared.udp.recv_from(&mut packet).await {
            Ok((length, client)) => shared.step(|forwarder, now| {
                let packet = packet.get(..length).unwrap_or_default();
                forwarder.question(now, Client::Udp(client), Transport::Udp, packet, &mut random)
            }),
            // Of an earlier answer to a client that is gone; should it be another, it does not become a tight loop.
            Err(error) => {
                tracing::debug!(%error, "the DNS socket");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

async fn streams(shared: Arc<Shared>, listener: TcpListener) {
    let room = Arc::new(Semaphore::new(MAX_STREAMS));
    loop {
        match listener.accept().await {
            Ok((stream, client)) => {
                let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
                    tracing::debug!(%client, "no room for another DNS stream");
                    continue;
                };
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    if let Err(error) = serve_stream(&shared, stream).await {
                        tracing::debug!(%client, %error, "a DNS stream has ended");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "the DNS listener");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// One question after the other; a client that sends half of one is not waited for.
async fn serve_stream(shared: &Arc<Shared>, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let question = timeout(STREAM_PATIENCE, async {
            let length = usize::from(stream.read_u16().await?);
            if length > MAX_QUERY {
                return Err(io::Error::other(format!(
                    "a question of {length} bytes; at most {MAX_QUERY} are read"
                )));
            }
            let mut packet = vec![0; length];
            stream.read_exact(&mut packet).await?;
            Ok(packet)
        })
        .await??;
        let (reply, answer) = oneshot::channel();
        shared.step(|forwarder, now| {
            forwarder.question(now, Client::Tcp(reply), Transport::Tcp, &question, &mut random)
        });
        // No answer at all: it was no question.
        let answer = answer.await.map_err(io::Error::other)?;
        timeout(STREAM_PATIENCE, stream.write_all(&framed(&answer))).await??;
    }
}

async fn timer(shared: Arc<Shared>) {
    loop {
        let deadline = shared.forwarder.lock().deadline();
        match deadline {
            None => shared.changed.notified().await,
            Some(at) => {
                // Not at each change: a deadline that was put off is looked at when it comes.
                let _ = tokio::time::timeout_at(at.into(), shared.changed.notified()).await;
                if Instant::now() >= at {
                    shared.step(|forwarder, now| forwarder.tick(now, &mut random));
                }
            }
        }
    }
}
