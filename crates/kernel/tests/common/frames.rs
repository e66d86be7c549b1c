//! Frames as they are on the wire, sent and seen by a packet socket on one interface (man 7 packet).
#![allow(unsafe_code, reason = "no safe wrapper knows the addresses of packet sockets")]
#![allow(dead_code, reason = "each test program uses a part")]

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nsm_kernel::netns::Namespace;

/// A packet socket on one interface. It sees what the interface receives, before anything else does.
pub(crate) struct Frames(OwnedFd);

/// Ethernet types.
pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const ARP: u16 = 0x0806;
pub(crate) const IPV6: u16 = 0x86dd;
pub(crate) const VLAN: u16 = 0x8100;
pub(crate) const QINQ: u16 = 0x88a8;
pub(crate) const PPPOE: u16 = 0x8864;
pub(crate) const MPLS: u16 = 0x8847;
pub(crate) const LLDP: u16 = 0x88cc;

/// How long a frame that shall come may take.
const PATIENCE: Duration = Duration::from_secs(5);

impl Frames {
    pub(crate) fn open(ns: &Namespace, ifname: &str) -> Self {
        ns.run(|| {
            let protocol = (libc::ETH_P_ALL as u16).to_be();
            // SAFETY: no memory is involved.
            let fd = unsafe {
                libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol))
            };
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            // SAFETY: the descriptor was just made and is nobody else's.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            // SAFETY: a C structure of integers, for which zeroes are a value.
            let mut address: libc::sockaddr_ll = unsafe { zeroed() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            let name = std::ffi::CString::new(ifname).unwrap();
            // SAFETY: a string with its terminator, alive during the call.
            address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
            assert!(address.sll_ifindex > 0, "no interface {ifname}");
            let length = size_of::<libc::sockaddr_ll>() as u32;
            // SAFETY: the address is alive and as long as it is said to be.
            let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
            assert!(bound == 0, "{}", io::Error::last_os_error());
            Self(fd)
        })
        .unwrap()
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        rustix::net::send(&self.0, frame, rustix::net::SendFlags::empty()).unwrap();
    }

    /// Waits for the frame that carries `last`; whether one that carries `other` came before it.
    pub(crate) fn seen_before(&self, other: &[u8], last: &[u8]) -> bool {
        let carries = |frame: &[u8], what: &[u8]| frame.windows(what.len()).any(|part| part == what);
        let (mut seen, start) = (false, Instant::now());
        let mut buffer = [0; 2048];
        while start.elapsed() < PATIENCE {
            let mut wait = [rustix::event::PollFd::new(&self.0, rustix::event::PollFlags::IN)];
            let timeout = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
            if rustix::event::poll(&mut wait, Some(&timeout)).unwrap() == 0 {
                continue;
            }
            let (_, length) =
                rustix::net::recv(&self.0, &mut buffer[..], rustix::net::RecvFlags::empty()).unwrap();
            seen |= carries(&buffer[..length], other);
            if carries(&buffer[..length], last) {
                return seen;
            }
        }
        panic!("the last frame never came");
    }
}

/// A broadcast frame with these types behind each other (tags count two bytes in between) and a text.
pub(crate) fn frame(to: [u8; 6], types: &[u16], text: &str) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([0x02, 0, 0, 0, 0, 0x77]);
    for (index, kind) in types.iter().enumerate() {
        frame.extend(kind.to_be_bytes());
        if index + 1 < types.len() {
            frame.extend([0, 42]); // the tag itself
        }
    }
    frame.extend(text.bytes());
    frame.resize(frame.len().max(60), 0);
    frame
}

/// An ARP request that nobody answers, with a text in its padding: passes wherever anything does.
pub(crate) fn arp(text: &str) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 0x77];
    body.extend([192, 0, 2, 77, 0, 0, 0, 0, 0, 0, 192, 0, 2, 78]);
    let mut frame = frame([0xff; 6], &[ARP], "");
    frame.truncate(14);
    frame.extend(body);
    frame.extend(text.bytes());
    frame
}
