//! Hears of links and namespaces that go.
//!
//! One socket in the node's namespace listens to every namespace that has a number there (`NETLINK_LISTEN_ALL_NSID`),
//! that is: to the pods that have wires. It holds none of them. When the last holder of a pod's namespace is gone, the
//! kernel takes its number back and says so; the links in it go without a word of their own, but the far end of a
//! veth pair is reported by the namespace that it was in.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::nsid::NsidAttribute;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::netlink::split_message;
use crate::netns::Namespace;
use crate::rt::Nsid;
use crate::sys;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A namespace is gone, and everything in it. Its number may soon stand for another one.
    NamespaceGone {
        /// The number it had.
        nsid: Nsid,
    },
    /// An interface is gone from a namespace, deleted or moved away.
    LinkGone {
        /// The number of the namespace.
        nsid: Nsid,
        /// Its index there.
        ifindex: u32,
        /// Its name.
        ifname: String,
    },
    /// More happened than the socket could hold: events are lost, so look at everything again.
    Lost,
}

/// The listening socket. It becomes readable when there are events, so it may be polled by whatever loop there is.
#[derive(Debug)]
pub struct Watch {
    socket: netlink_sys::Socket,
    buffer: Vec<u8>,
}

/// `RTNLGRP_LINK`.
const LINKS: u32 = 1;
/// `RTNLGRP_NSID`.
const NAMESPACES: u32 = 28;
/// Room for a burst: a pod with hundreds of interfaces that goes.
const RECEIVE_BUFFER: u32 = 1 << 20;
/// Larger than any message of one event.
const DATAGRAM: usize = 32 * 1024;

impl Watch {
    /// Starts listening, from the node's namespace. Events from now on are not missed.
    pub fn open(node: &Namespace) -> Result<Self> {
        let socket = || {
            let mut socket = netlink_sys::Socket::new(NETLINK_ROUTE)?;
            socket.set_non_blocking(true)?;
            socket.set_rx_buf_sz(RECEIVE_BUFFER)?;
            socket.set_listen_all_namespaces(true)?;
            socket.bind_auto()?;
            socket.add_membership(LINKS)?;
            socket.add_membership(NAMESPACES)?;
            Ok(socket)
        };
        let socket =
            node.run(socket)?.map_err(|source| Error::Socket { what: "listen to all namespaces", source })?;
        Ok(Self { socket, buffer: vec![0; DATAGRAM] })
    }

    /// Waits for events, at most that long (`None`: as long as it takes). Nothing may have happened: then it is empty.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Vec<Event>> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => self.read(),
            Err(e) => Err(Error::Socket { what: "wait for events", source: e.into() }),
        }
    }

    /// The events that are there now.
    pub fn read(&mut self) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        loop {
            match sys::receive_with_nsid(self.socket.as_fd(), &mut self.buffer) {
                Ok((length, _)) if length > self.buffer.len() => events.push(Event::Lost),
                Ok((length, nsid)) => collect(&self.buffer[..length], nsid, &mut events),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(events),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => events.push(Event::Lost),
                Err(source) => return Err(Error::Socket { what: "read events", source }),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What of a datagram matters to wires.
fn collect(mut datagram: &[u8], nsid: Option<i32>, events: &mut Vec<Event>) {
    const RTM_DELLINK: u16 = 17;
    const RTM_DELNSID: u16 = 89;
    while let Some((raw, rest)) = split_message(datagram) {
        datagram = rest;
        if !matches!(raw.kind, RTM_DELLINK | RTM_DELNSID) {
            continue;
        }
        match raw.message() {
            Ok(Some(Message::DelNsId(message))) => {
                events.extend(message.attributes.into_iter().find_map(|attribute| match attribute {
                    NsidAttribute::Id(id) => Some(Event::NamespaceGone { nsid: Nsid(id) }),
                    _ => None,
                }));
            }
            // A port that leaves a bridge is announced in the same words, but of the bridge's family.
            Ok(Some(Message::DelLink(link))) if link.header.interface_family == AddressFamily::Unspec => {
                let Some(nsid) = nsid.map(Nsid) else { continue };
                let name = link.attributes.into_iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                });
                let ifname = name.unwrap_or_default();
                events.push(Event::LinkGone { nsid, ifindex: link.header.index, ifname });
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "skipped an event");
                events.push(Event::Lost);
            }
        }
    }
}
