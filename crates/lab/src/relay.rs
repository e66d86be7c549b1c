//! A bad cable: between a node's port and the bridge of the underlay a relay of ours that loses and delays packets, as
//! many kernels have no `netem`.
//!
//! ```text
//!   node1 eth0 ┄┄ port1   socket ─ thread ─ socket   relay-port1 ┄┄ plug-port1 ── br0
//! ```
//!
//! Frames are taken and given with what the kernel knows about them (`virtio_net_hdr`): checksums that nobody has filled
//! in yet, and packets that nobody has cut yet.
//!
//! Everything `unsafe` of it is here: the kernel's structure for packet sockets, which rustix does not know.
#![allow(unsafe_code)]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nsm_kernel::netns::Namespace;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

use crate::Error;
use crate::chance::Chance;

/// A frame with what the kernel says of it: one that is still to be cut has 64 KiB and its headers.
const FRAME: usize = 66_000;
/// Frames under way, at most; more are lost, as in any queue.
const QUEUE: usize = 10_000;
/// How soon the relay ends when it is told to.
const LOOK: Duration = Duration::from_millis(20);

/// A relay that runs until it is dropped.
#[derive(Debug)]
pub(crate) struct Relay {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What it does to frames.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Harm {
    /// So many of a hundred are lost.
    pub(crate) loss: u8,
    /// Each is late by half of this up to all of it.
    pub(crate) delay: Duration,
}

/// By the time at which it is due, then in the order of arrival.
type Late = Reverse<(Instant, u64, usize, Vec<u8>)>;

// === impl Relay ===

impl Relay {
    /// Begins to carry frames between two interfaces of a namespace.
    pub(crate) fn start(namespace: &Namespace, ends: [&str; 2], harm: Harm) -> Result<Self, Error> {
        let failed =
            |error: io::Error| Error::system(format!("relay between {} and {}", ends[0], ends[1]), error);
        let open = || ends.map(packets).into_iter().collect::<io::Result<Vec<_>>>();
        let sockets = namespace.run(open).map_err(Error::kernel("enter the underlay"))?.map_err(failed)?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = thread::Builder::new().name("relay".into()).spawn(move || carry(&sockets, harm, &told));
        Ok(Self { stop, thread: Some(thread.map_err(failed)?) })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // One that panicked is not worth a second panic.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

// === private helpers ===

fn carry(sockets: &[OwnedFd], harm: Harm, stop: &AtomicBool) {
    // The same losses each time would be the wish, but frames come as they come.
    let mut chance = Chance::new(0);
    let mut late: BinaryHeap<Late> = BinaryHeap::new();
    let mut arrived = 0;
    let mut buffer = vec![0; FRAME];
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        while let Some(Reverse((due, ..))) = late.peek()
            && *due <= now
            && let Some(Reverse((_, _, to, frame))) = late.pop()
        {
            // A queue that is full loses it, as everywhere.
            let _ = send(&sockets[to], &frame, SendFlags::DONTWAIT);
        }
        let next =
            late.peek().map_or(LOOK, |Reverse((due, ..))| due.saturating_duration_since(now).min(LOOK));
        let mut polled: Vec<_> = sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        let next = Timespec::try_from(next).unwrap_or_default();
        if poll(&mut polled, Some(&next)).is_err() {
            continue;
        }
        for (from, socket) in sockets.iter().enumerate() {
            while let Ok((length, _)) = recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                if chance.below(100) < u64::from(harm.loss) || late.len() >= QUEUE {
                    continue;
                }
                let half = harm.delay.as_micros() as u64 / 2;
                let delay = Duration::from_micros(half + chance.below(half + 1));
                arrived += 1;
                let frame = buffer[..length.min(FRAME)].to_vec();
                late.push(Reverse((Instant::now() + delay, arrived, 1 - from, frame)));
            }
        }
    }
}

/// A socket that takes each frame which comes in by an interface of the calling thread's namespace, and sends there.
fn packets(interface: &str) -> io::Result<OwnedFd> {
    // Bound to an interface before it is told a protocol: nothing comes from another one.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    for option in [libc::PACKET_VNET_HDR, libc::PACKET_IGNORE_OUTGOING] {
        let on: c_int = 1;
        // SAFETY: the value is a live `int`, and its length is that of one.
        let set = unsafe {
            let value = (&raw const on).cast::<c_void>();
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, value, size_of::<c_int>() as _)
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let index = rustix::net::netdevice::name_to_index(&socket, interface)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: index as c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is a live `sockaddr_ll`, and its length is that of one.
    let bound = unsafe {
        let address = (&raw const address).cast::<libc::sockaddr>();
        libc::bind(socket.as_raw_fd(), address, size_of::<libc::sockaddr_ll>() as _)
    };
    if bound != 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}
