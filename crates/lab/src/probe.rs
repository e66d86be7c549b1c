//! Our own ping, TCP connect and HTTP GET: small, without programs of the system, each for the calling thread's
//! network namespace (open them inside [`nsm_kernel::netns::Namespace::run`]; sockets stay where they were opened).

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nsm_kernel::netns::Namespace;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, send, socket_with,
};

/// How long an answer may take before its request counts as lost.
const GRACE: Duration = Duration::from_secs(1);
/// Bytes of an echo request after its header.
const PAYLOAD: usize = 24;

/// A raw ICMP or ICMPv6 socket connected to one address.
///
/// Raw, because datagram ICMP sockets are off in a fresh namespace (`net.ipv4.ping_group_range` is empty).
#[derive(Debug)]
pub struct Echo {
    socket: OwnedFd,
    v6: bool,
    ident: u16,
}

/// The result of a row of echo requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Requests sent.
    pub sent: u64,
    /// Answers that came.
    pub answered: u64,
    /// The fastest answer.
    pub best: Duration,
    /// The slowest answer.
    pub worst: Duration,
    /// The longest time in which no request was answered: between the departures of two that were.
    pub silence: Duration,
}

/// Pings that go on from a pod until they are counted, to whichever of some addresses answers.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<nsm_kernel::Result<Row>>,
}

/// What a TCP connect found.
#[derive(Debug)]
pub enum Connected {
    /// A connection.
    Yes(TcpStream),
    /// Nobody answered within the time.
    Silence,
    /// The kernel or the peer said no at once.
    Refused(io::Error),
}

/// A page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Status code.
    pub status: u16,
    /// Body, as text.
    pub body: String,
}

// === impl Echo ===

impl Echo {
    /// Opens a socket in the calling thread's namespace.
    ///
    /// # Errors
    ///
    /// Without `CAP_NET_RAW` in this namespace, or without a route to `to`.
    pub fn open(to: IpAddr) -> io::Result<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let v6 = to.is_ipv6();
        let (family, protocol) =
            if v6 { (AddressFamily::INET6, ipproto::ICMPV6) } else { (AddressFamily::INET, ipproto::ICMP) };
        let socket = socket_with(
            family,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(protocol),
        )?;
        rustix::net::connect(&socket, &SocketAddr::new(to, 0))?;
        // Raw sockets see each other's answers: the identifier tells them apart.
        let ident = (std::process::id() as u16).wrapping_add(NEXT.fetch_add(257, Ordering::Relaxed));
        Ok(Self { socket, v6, ident })
    }

    /// Sends `count` requests, each after the answer to the last one; stops at the first that stays unanswered.
    ///
    /// # Errors
    ///
    /// What the kernel says when it cannot send.
    pub fn row(&self, count: u32, until: Instant) -> io::Result<Row> {
        let mut row = Row::new();
        for sequence in 0..count {
            let began = Instant::now();
            self.send(sequence as u16)?;
            row.sent += 1;
            let until = until.min(began + GRACE);
            loop {
                match self.receive()? {
                    Some(answer) if answer == sequence as u16 => break,
                    Some(_) => {}
                    None if Instant::now() >= until => return Ok(row),
                    None => wait([self], until),
                }
            }
            let time = began.elapsed();
            row.answered += 1;
            row.best = row.best.min(time);
            row.worst = row.worst.max(time);
        }
        Ok(row)
    }

    fn send(&self, sequence: u16) -> io::Result<()> {
        let mut packet = [0; 8 + PAYLOAD];
        packet[0] = if self.v6 { 128 } else { 8 };
        packet[4..6].copy_from_slice(&self.ident.to_be_bytes());
        packet[6..8].copy_from_slice(&sequence.to_be_bytes());
        if !self.v6 {
            // For ICMPv6 the kernel does it (RFC 3542 section 3.1).
            let sum = checksum(&packet);
            packet[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        send(&self.socket, &packet, SendFlags::empty())?;
        Ok(())
    }

    /// The sequence number of an answer that has arrived, if one has.
    fn receive(&self) -> io::Result<Option<u16>> {
        let mut buffer = [0u8; 256];
        loop {
            let length = match recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((length, _)) => length,
                Err(Errno::AGAIN) => return Ok(None),
                // An ICMP error that came for an earlier request: that request is lost, this socket is well.
                Err(
                    Errno::HOSTUNREACH
                    | Errno::NETUNREACH
                    | Errno::CONNREFUSED
                    | Errno::PROTO
                    | Errno::ACCESS,
                ) => {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let packet = &buffer[..length.min(buffer.len())];
            // A raw IPv4 socket delivers the IP header too (man 7 raw), an IPv6 one does not.
            let icmp = if self.v6 {
                packet
            } else {
                let header = packet.first().map_or(0, |first| usize::from(first & 0x0f) * 4);
                packet.get(header..).unwrap_or_default()
            };
            let answer = if self.v6 { 129 } else { 0 };
            if let [kind, 0, _, _, i0, i1, s0, s1, ..] = *icmp
                && kind == answer
                && u16::from_be_bytes([i0, i1]) == self.ident
            {
                return Ok(Some(u16::from_be_bytes([s0, s1])));
            }
        }
    }
}

// === impl Row ===

impl Row {
    fn new() -> Self {
        let none = Duration::ZERO;
        Self { sent: 0, answered: 0, best: Duration::MAX, worst: none, silence: none }
    }

    /// Requests that nobody answered.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.sent - self.answered
    }
}

// === impl Flood ===

impl Flood {
    /// Begins to send a request every `every` to each of `to`; one that any of them answers counts as answered, so
    /// that a pod is followed that moves from one endpoint to another.
    ///
    /// # Errors
    ///
    /// A namespace that cannot be held.
    pub fn start(namespace: &Namespace, to: &[IpAddr], every: Duration) -> nsm_kernel::Result<Self> {
        let (namespace, to) = (namespace.try_clone()?, to.to_vec());
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = thread::spawn(move || namespace.run(|| flood(&to, every, &until)));
        Ok(Self { stop, thread })
    }

    /// Ends it and counts, after a moment for the last answers.
    ///
    /// # Errors
    ///
    /// The namespace could not be entered.
    pub fn end(self) -> nsm_kernel::Result<Row> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// One attempt to connect, in the calling thread's namespace.
///
/// # Errors
///
/// None: what happens is the measurement.
#[must_use]
pub fn connect(to: SocketAddr, within: Duration) -> Connected {
    match TcpStream::connect_timeout(&to, within.max(Duration::from_millis(1))) {
        Ok(stream) => Connected::Yes(stream),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Connected::Silence,
        Err(error) => Connected::Refused(error),
    }
}

/// `GET path` over a connection, HTTP/1.0: the answer ends with the connection.
///
/// # Errors
///
/// A broken or silent connection, or an answer that is not HTTP.
pub fn get(stream: &mut TcpStream, host: SocketAddr, path: &str, within: Duration) -> io::Result<Page> {
    let within = Some(within.max(Duration::from_millis(1)));
    stream.set_read_timeout(within)?;
    stream.set_write_timeout(within)?;
    stream
        .write_all(format!("GET {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.take(1 << 20).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP");
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(malformed)?;
    let status =
        head.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)).ok_or_else(malformed)?;
    Ok(Page { status: status.parse().map_err(|_| malformed())?, body: body.to_owned() })
}

/// Tries `attempt` until it is satisfied or the time is up; the last answer counts.
pub(crate) fn until<T>(
    within: Duration,
    mut attempt: impl FnMut(Duration) -> Result<T, String>,
) -> Result<T, String> {
    let end = Instant::now() + within;
    let mut pause = Duration::from_millis(2);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match attempt(left) {
            Err(_) if Instant::now() + pause < end => thread::sleep(pause),
            other => return other,
        }
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

// === private helpers ===

/// See [`Flood::start`].
fn flood(to: &[IpAddr], every: Duration, stop: &AtomicBool) -> Row {
    let mut row = Row::new();
    // One that cannot be opened, or cannot send any more, is opened anew: there was no route, or another address of
    // ours fits now.
    let mut echoes: Vec<Option<Echo>> = to.iter().map(|to| Echo::open(*to).ok()).collect();
    // Sequence numbers wrap after 65 s at 1 ms, long after an answer has become too late.
    let mut departures = vec![None; usize::from(u16::MAX) + 1];
    let mut next = Instant::now();
    let (mut heard, mut last) = (next, next);
    let mut last_call = None;
    loop {
        for echo in echoes.iter().flatten() {
            while let Ok(Some(sequence)) = echo.receive() {
                if let Some(sent) = departures[usize::from(sequence)].take() {
                    let time = Instant::now().duration_since(sent);
                    row.answered += 1;
                    row.best = row.best.min(time);
                    row.worst = row.worst.max(time);
                    row.silence = row.silence.max(sent.saturating_duration_since(heard));
                    heard = heard.max(sent);
                }
            }
        }
        let now = Instant::now();
        if let Some(end) = last_call {
            if row.answered == row.sent || now >= end {
                row.silence = row.silence.max(last.saturating_duration_since(heard));
                return row;
            }
            wait(echoes.iter().flatten(), end);
        } else if stop.load(Ordering::Relaxed) {
            last_call = Some(now + GRACE);
        } else if now >= next {
            let sequence = row.sent as u16;
            departures[usize::from(sequence)] = Some(now);
            for (echo, to) in echoes.iter_mut().zip(to) {
                // Refused is lost: the slot stays, no answer will come.
                let open = echo.take().or_else(|| Echo::open(*to).ok());
                *echo = open.filter(|echo| echo.send(sequence).is_ok());
            }
            row.sent += 1;
            last = now;
            next += every;
        } else {
            wait(echoes.iter().flatten(), next);
        }
    }
}

/// Until something arrives at one of them, or that time; whatever happens, the caller looks again.
fn wait<'a>(echoes: impl IntoIterator<Item = &'a Echo>, until: Instant) {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
    let fds = echoes.into_iter().map(|echo| PollFd::new(&echo.socket, PollFlags::IN));
    let _ = poll(&mut fds.collect::<Vec<_>>(), Some(&left));
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let sum = bytes.chunks(2).fold(0u32, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}
