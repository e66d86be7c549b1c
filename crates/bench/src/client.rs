//! The program in the client's pod, which asks for wires and pings through them, and the handle that orders it to.
//!
//! It is a process of its own because a workload is one: it has the pod's namespace and identity, and talks to the
//! node's manager. Orders and answers are lines of JSON on its stdin and stdout; it ends with its stdin.

use std::io::{self, BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nsm_api::nsurl::NsUrl;
use nsm_identity::Source;
use nsm_lab::Lab;
use nsm_lab::probe::Echo;
use nsm_sdk::client::{Client, ClientConfig, Wire};
use nsm_sdk::liveness::Liveness;
use nsm_sdk::own_end::OwnNamespace;
use nsm_transport::{DialUrl, Pool, PoolConfig};
use serde::{Deserialize, Serialize};

use crate::{Error, SERVICE};

/// How long one wire may take to answer a ping after its request was answered.
const PATIENCE: Duration = Duration::from_secs(5);
/// A ping that is not answered within this time is followed by the next.
const PING: Duration = Duration::from_millis(2);

/// What the program in the pod is told on its command line.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// The manager of the node.
    pub connect_to: DialUrl,
    /// Whether wires are probed, as clients do it unless they are told otherwise.
    pub probes: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Order {
    /// Make so many wires, so many at a time; the first has that number.
    Open { first: usize, wires: usize, concurrency: usize },
    /// Ask every hop of each again, one after the other.
    Refresh,
    /// Wait until all have left this endpoint.
    Leave { endpoint: String },
    /// Close them all, one after the other.
    Close,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Answer {
    Ready,
    Opened(Opened),
    Refreshed(Vec<Duration>),
    Left(Left),
    Closed(Closed),
}

/// Wires that were asked for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Opened {
    pub(crate) made: Vec<Made>,
    /// The errors of those that did not come up.
    pub(crate) failed: Vec<String>,
    /// From the first request to the last ping.
    pub(crate) wall: Duration,
}

/// A wire that answered a ping.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Made {
    /// From the call of Request to its answer.
    pub(crate) request: Duration,
    /// From the call of Request to the first answered ping.
    pub(crate) ping: Duration,
    /// Its name in the pod.
    pub(crate) interface: String,
    /// Our address.
    pub(crate) near: IpAddr,
    /// The endpoint's.
    pub(crate) far: IpAddr,
}

/// Wires that have another endpoint.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Left {
    /// When each was answered by another, by [`monotonic`].
    pub(crate) at: Vec<Duration>,
    /// Those through which no ping came back afterwards.
    pub(crate) failed: Vec<String>,
}

/// The clock that all processes of a machine share, and nobody sets.
pub(crate) fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.cast_unsigned(), u32::try_from(now.tv_nsec).unwrap_or_default())
}

/// Wires that were closed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Closed {
    pub(crate) times: Vec<Duration>,
    pub(crate) failed: Vec<String>,
}

/// The program, as seen from outside; it ends with this.
#[derive(Debug)]
pub(crate) struct Worker {
    pod: String,
    child: Child,
    orders: Option<ChildStdin>,
    answers: Receiver<Answer>,
    opened: usize,
}

/// One in each of the clients' pods; wires are asked for in turns.
#[derive(Debug)]
pub(crate) struct Workers(Vec<Worker>);

/// The name of the clients' pods, from 0 on.
pub(crate) fn pod(number: usize) -> String {
    if number == 0 { "client".into() } else { format!("client-{}", number + 1) }
}

// === impl Workers ===

impl Workers {
    /// Starts as many, in as many pods.
    pub(crate) fn start(lab: &Lab, exe: &Path, clients: usize, probes: bool) -> Result<Self, Error> {
        (0..clients.max(1))
            .map(|number| Worker::start(lab, exe, &pod(number), probes))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The only one, or the first.
    pub(crate) fn first(&mut self) -> &mut Worker {
        &mut self.0[0]
    }

    /// Has wires made, with so many requests at a time; all of them come up or it is an error.
    pub(crate) fn open(&mut self, lab: &Lab, wires: usize, concurrency: usize) -> Result<Opened, Error> {
        if let [only] = &mut self.0[..] {
            return only.open(lab, wires, concurrency);
        }
        let mut all = Opened::default();
        for (turn, first) in (0..wires).step_by(concurrency.max(1)).enumerate() {
            let clients = self.0.len();
            let some = concurrency.max(1).min(wires - first);
            let opened = self.0[turn % clients].open(lab, some, concurrency)?;
            all.made.extend(opened.made);
            all.wall += opened.wall;
        }
        Ok(all)
    }

    /// Has every hop of each wire asked again.
    pub(crate) fn refresh(&mut self, lab: &Lab) -> Result<Vec<Duration>, Error> {
        let times: Vec<_> = self.0.iter_mut().map(|worker| worker.refresh(lab)).collect::<Result<_, _>>()?;
        Ok(times.concat())
    }

    /// Takes an endpoint away and waits until all wires have another: when it went, and when each of them had.
    pub(crate) fn leave(
        &mut self,
        lab: &Lab,
        endpoint: &str,
        take: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(Duration, Left), Error> {
        for worker in &mut self.0 {
            worker.order(Order::Leave { endpoint: endpoint.to_owned() })?;
        }
        let began = monotonic();
        take()?;
        let mut all = Left::default();
        for worker in &mut self.0 {
            match worker.hear(lab, Duration::from_secs(60) + Duration::from_secs(worker.opened as u64))? {
                Answer::Left(left) => {
                    all.at.extend(left.at);
                    all.failed.extend(left.failed);
                }
                other => return Err(unexpected(&other)),
            }
        }
        Ok((began, all))
    }

    /// Has all wires closed.
    pub(crate) fn close(&mut self, lab: &Lab) -> Result<Closed, Error> {
        let mut all = Closed::default();
        for worker in &mut self.0 {
            let closed = worker.close(lab)?;
            all.times.extend(closed.times);
            all.failed.extend(closed.failed);
        }
        Ok(all)
    }

    pub(crate) fn pids(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(Worker::pid)
    }
}

// === impl Worker ===

impl Worker {
    /// Starts it in that pod of node1.
    pub(crate) fn start(lab: &Lab, exe: &Path, pod: &str, probes: bool) -> Result<Self, Error> {
        let at = lab.plan.paths();
        let node = at.node("node1");
        let socket = |name: &str| format!("unix://{}", node.join(name).display());
        let log = at.log(pod);
        let log = std::fs::File::create(&log).map_err(Error::system(format!("write {}", log.display())))?;
        let mut command = Command::new(exe);
        command
            .arg0("nsm")
            .args(["bench", "client", "--connect-to", &socket("nsm.io.sock")])
            .args(probes.then_some("--probes"))
            .env("SPIFFE_ENDPOINT_SOCKET", socket("identity.sock"))
            .env("NSM_LOG_LEVEL", crate::LOG_LEVEL)
            .env("NSM_INTROSPECT_DIR", "")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // Ctrl-C is for us; it ends with its stdin.
            .process_group(0);
        let mut child = lab
            .namespace(pod)?
            .run(|| command.spawn())
            .map_err(Error::kernel("enter the client's pod"))?
            .map_err(Error::system("start the measuring client"))?;
        let (sender, answers) = mpsc::channel();
        let stdout = child.stdout.take();
        let orders = child.stdin.take();
        let mut worker = Self { pod: pod.into(), child, orders, answers, opened: 0 };
        let listen = move || {
            for line in stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines()) {
                let Some(answer) = line.ok().and_then(|line| serde_json::from_str(&line).ok()) else {
                    return;
                };
                if sender.send(answer).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("answers".into())
            .spawn(listen)
            .map_err(Error::system("start a thread"))?;
        match worker.hear(lab, Duration::from_secs(20))? {
            Answer::Ready => Ok(worker),
            other => Err(unexpected(&other)),
        }
    }

    /// Has wires made; all of them come up or it is an error.
    pub(crate) fn open(&mut self, lab: &Lab, wires: usize, concurrency: usize) -> Result<Opened, Error> {
        let first = self.opened;
        self.opened += wires;
        self.order(Order::Open { first, wires, concurrency })?;
        // A wire that does not come up is reported after the client's own patience.
        match self.hear(lab, Duration::from_secs(60) + Duration::from_secs(wires as u64))? {
            Answer::Opened(opened) => match opened.failed.first() {
                Some(first) => {
                    Err(Error::Wires { failed: opened.failed.len(), wanted: wires, first: first.clone() })
                }
                None => Ok(opened),
            },
            other => Err(unexpected(&other)),
        }
    }

    /// Has every hop of each wire asked again.
    fn refresh(&mut self, lab: &Lab) -> Result<Vec<Duration>, Error> {
        self.order(Order::Refresh)?;
        match self.hear(lab, Duration::from_secs(60) + Duration::from_secs(self.opened as u64))? {
            Answer::Refreshed(times) => Ok(times),
            other => Err(unexpected(&other)),
        }
    }

    /// Has all wires closed.
    pub(crate) fn close(&mut self, lab: &Lab) -> Result<Closed, Error> {
        self.order(Order::Close)?;
        match self.hear(lab, Duration::from_secs(60) + Duration::from_secs(self.opened as u64))? {
            Answer::Closed(closed) => Ok(closed),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn order(&mut self, order: Order) -> Result<(), Error> {
        let mut line = serde_json::to_vec(&order).unwrap_or_default();
        line.push(b'\n');
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let written = self.orders.as_mut().ok_or_else(gone).and_then(|orders| orders.write_all(&line));
        written.map_err(Error::system("tell the measuring client what to do"))
    }

    /// Its next answer; a signal or the death of a daemon is heard meanwhile.
    fn hear(&mut self, lab: &Lab, within: Duration) -> Result<Answer, Error> {
        let end = Instant::now() + within;
        loop {
            lab.supervisor.check()?;
            match self.answers.recv_timeout(Duration::from_millis(50)) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::Client(format!("is silent since {within:?}")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let log = nsm_lab::process::tail(&lab.plan.paths().log(&self.pod));
                    return Err(Error::Client(format!("ended; the end of its log:\n{log}")));
                }
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.orders.take());
        // What it still holds goes with the lab.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unexpected(answer: &Answer) -> Error {
    Error::Client(format!("gave an answer to another order: {answer:?}"))
}

// === the program in the pod ===

/// Serves orders until stdin ends.
///
/// # Errors
///
/// Without `/proc`, or when nobody listens any more.
pub async fn client(options: ClientOptions, source: Source) -> Result<(), Error> {
    let namespace = OwnNamespace::open().map_err(Error::system("open our own network namespace"))?;
    let config = ClientConfig {
        name: "bench".into(),
        connect_to: (&options.connect_to).into(),
        dial_timeout: Duration::from_secs(5),
        request_timeout: Duration::from_secs(15),
        labels: std::collections::BTreeMap::new(),
        awareness_groups: nsm_sdk::prefixes::AwarenessGroups::default(),
        // Nobody was here before.
        takes_over: false,
        refreshes_together: false,
        liveness: options.probes.then(Liveness::default),
        names: None,
    };
    let client = Client::new(config, Pool::new(source, PoolConfig::default()), namespace);
    let mut orders = orders()?;
    tell(&Answer::Ready)?;
    let mut wires: Vec<Wire> = Vec::new();
    while let Some(order) = orders.recv().await {
        match order {
            Order::Open { first, wires: count, concurrency } => {
                let (opened, mut new) = open(&client, first, count, concurrency).await;
                wires.append(&mut new);
                tell(&Answer::Opened(opened))?;
            }
            Order::Refresh => {
                let mut times = Vec::new();
                for wire in &wires {
                    let began = Instant::now();
                    wire.refresh().await;
                    times.push(began.elapsed());
                }
                tell(&Answer::Refreshed(times))?;
            }
            Order::Leave { endpoint } => tell(&Answer::Left(leave(&wires, &endpoint).await))?,
            Order::Close => tell(&Answer::Closed(close(std::mem::take(&mut wires)).await))?,
        }
    }
    Ok(())
}

/// Stdin as a stream of orders; reading it blocks, so a thread does that.
fn orders() -> Result<tokio::sync::mpsc::UnboundedReceiver<Order>, Error> {
    let (sender, orders) = tokio::sync::mpsc::unbounded_channel();
    let listen = move || {
        for line in io::stdin().lock().lines() {
            let Some(order) = line.ok().and_then(|line| serde_json::from_str(&line).ok()) else { return };
            if sender.send(order).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("orders".into()).spawn(listen).map_err(Error::system("start a thread"))?;
    Ok(orders)
}

fn tell(answer: &Answer) -> Result<(), Error> {
    let mut line = serde_json::to_vec(answer).unwrap_or_default();
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).map_err(Error::system("answer"))
}

async fn open(client: &Arc<Client>, first: usize, count: usize, concurrency: usize) -> (Opened, Vec<Wire>) {
    let began = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let askers: Vec<_> = (0..concurrency.clamp(1, count.max(1)))
        .map(|_| {
            let (client, next) = (Arc::clone(client), Arc::clone(&next));
            tokio::spawn(async move {
                let mut done = Vec::new();
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return done;
                    }
                    done.push(open_one(&client, first + index).await);
                }
            })
        })
        .collect();
    let (mut opened, mut wires) = (Opened::default(), Vec::new());
    for asker in askers {
        match asker.await {
            Ok(done) => {
                for one in done {
                    match one {
                        Ok((made, wire)) => {
                            opened.made.push(made);
                            wires.push(wire);
                        }
                        Err(error) => opened.failed.push(error),
                    }
                }
            }
            Err(error) => opened.failed.push(error.to_string()),
        }
    }
    opened.wall = began.elapsed();
    (opened, wires)
}

/// From the call of Request to the first ping that comes back.
async fn open_one(client: &Arc<Client>, index: usize) -> Result<(Made, Wire), String> {
    let interface = format!("w{index}");
    let url: NsUrl = format!("kernel://{SERVICE}/{interface}").parse().map_err(|e| format!("{e}"))?;
    let began = Instant::now();
    let wire = client.request(index, &url).await.map_err(|error| error.to_string())?;
    let request = began.elapsed();
    let context = wire.connection().context.and_then(|context| context.ip_context).unwrap_or_default();
    let address = |list: &[String]| list.first()?.parse::<IpNet>().ok().map(|net| net.addr());
    let (Some(near), Some(far)) = (address(&context.src_ip_addrs), address(&context.dst_ip_addrs)) else {
        return Err(format!("{interface} has no addresses: {context:?}"));
    };
    let pinged =
        tokio::task::spawn_blocking(move || first_ping(far)).await.map_err(|error| error.to_string())?;
    pinged.map_err(|error| format!("{interface}: {error}"))?;
    Ok((Made { request, ping: began.elapsed(), interface, near, far }, wire))
}

/// Waits until all wires have left this endpoint, and pings the others.
async fn leave(wires: &[Wire], endpoint: &str) -> Left {
    let gone = wires.iter().map(async |wire| {
        wire.until(|conn| conn.network_service_endpoint_name != endpoint).await;
        monotonic()
    });
    let mut left = Left { at: futures::future::join_all(gone).await, ..Left::default() };
    for wire in wires {
        let context = wire.connection().context.and_then(|context| context.ip_context).unwrap_or_default();
        let far = context.dst_ip_addrs.first().and_then(|text| text.parse::<IpNet>().ok());
        let pinged = match far {
            Some(far) => {
                tokio::task::spawn_blocking(move || first_ping(far.addr())).await.map_err(io::Error::from)
            }
            None => Err(io::Error::from(io::ErrorKind::AddrNotAvailable)),
        };
        left.failed
            .extend(pinged.and_then(|pinged| pinged).err().map(|error| format!("{}: {error}", wire.id())));
    }
    left
}

/// Pings until an answer comes. The address belongs to one wire alone, so that is the wire the answer came through.
pub(crate) fn first_ping(to: IpAddr) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let answered = Echo::open(to).and_then(|echo| echo.row(1, Instant::now() + PING));
        match answered {
            Ok(row) if row.answered > 0 => return Ok(()),
            Err(error) if Instant::now() >= end => return Err(error),
            Ok(_) if Instant::now() >= end => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{to} does not answer pings")));
            }
            _ => {}
        }
    }
}

async fn close(wires: Vec<Wire>) -> Closed {
    let mut closed = Closed::default();
    for wire in wires {
        let began = Instant::now();
        match wire.close().await {
            Ok(()) => closed.times.push(began.elapsed()),
            Err(error) => closed.failed.push(error.to_string()),
        }
    }
    closed
}
