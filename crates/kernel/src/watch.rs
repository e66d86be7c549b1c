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
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};

use crate::error::{Error, Result};
use crate::netlink::{Route, Socket, split_message};
use crate::netns::Namespace;
use crate::rt::{Nsid, nsid_of};
use crate::sys;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A namespace is gone, and everything in it. Its number may stand for another one already: ask
    /// [`Kernel::facts`](crate::Kernel::facts) which wires are still there.
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
    node: Namespace,
    socket: netlink_sys::Socket,
    /// For questions.
    asking: Socket<Route>,
    buffer: Vec<u8>,
}

/// `RTNLGRP_LINK`.
const LINKS: u32 = 1;
/// `RTNLGRP_NSID`.
const NAMESPACES: u32 = 28;
/// `linux/rtnetlink.h`.
const RTM_DELLINK: u16 = 17;
/// `linux/rtnetlink.h`.
const RTM_DELNSID: u16 = 89;
/// Room for a burst: pods with a thousand interfaces that go.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Larger than any message of one event.
const DATAGRAM: usize = 32 * 1024;

impl Watch {
    /// Starts listening, from the node's namespace. Events from now on are not missed.
    pub fn open(node: &Namespace) -> Result<Self> {
        Self::with_buffer(node, RECEIVE_BUFFER)
    }

    fn with_buffer(node: &Namespace, bytes: usize) -> Result<Self> {
        let socket = || {
            let mut socket = netlink_sys::Socket::new(NETLINK_ROUTE)?;
            // Creations and changes, the most of what happens, are of no interest.
            sys::only_messages(socket.as_fd(), [RTM_DELLINK, RTM_DELNSID])?;
            socket.set_non_blocking(true)?;
            // Beyond the system's limit where we may, up to it where not.
            set_socket_recv_buffer_size_force(&socket, bytes)
                .or_else(|_| set_socket_recv_buffer_size(&socket, bytes))?;
            socket.set_listen_all_namespaces(true)?;
            socket.bind_auto()?;
            socket.add_membership(LINKS)?;
            socket.add_membership(NAMESPACES)?;
            Ok(socket)
        };
        let socket =
            node.run(socket)?.map_err(|source| Error::Socket { what: "listen to all namespaces", source })?;
        Ok(Self {
            socket,
            asking: Socket::open_in(node)?,
            node: node.try_clone()?,
            buffer: vec![0; DATAGRAM],
        })
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
                Ok((length, nsid)) => self.collect(length, nsid, &mut events)?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(events),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => events.push(Event::Lost),
                Err(source) => return Err(Error::Socket { what: "read events", source }),
            }
        }
    }

    /// What of a datagram matters to wires; it comes from the namespace with that number, or from the node's.
    fn collect(&mut self, length: usize, from: Option<i32>, events: &mut Vec<Event>) -> Result<()> {
        let mut datagram = &self.buffer[..length];
        while let Some((raw, rest)) = split_message(datagram) {
            datagram = rest;
            match raw.message() {
                // Pods number each other as well, and each one's numbers are its own: only the node's count. The node
                // itself has a number if a wire ends in it.
                Ok(Some(message @ Message::DelNsId(_))) => {
                    let ours = match from {
                        None => true,
                        Some(from) => self.asking.nsids_of(&[&self.node])?.contains(&Some(Nsid(from))),
                    };
                    events
                        .extend(nsid_of(&message).filter(|_| ours).map(|nsid| Event::NamespaceGone { nsid }));
                }
                // A port that leaves a bridge is announced in the same words, but of the bridge's family.
                Ok(Some(Message::DelLink(link))) if link.header.interface_family == AddressFamily::Unspec => {
                    let Some(nsid) = from.map(Nsid) else { continue };
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
        Ok(())
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{EndPlan, Side, WirePlan};
    use crate::{Kernel, Nsids};

    #[test]
    fn a_burst_that_is_too_large_is_reported_as_lost() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED a_burst_that_is_too_large_is_reported_as_lost: network namespaces need root");
            return;
        }
        let node = Namespace::unnamed().unwrap();
        let (near, far) = (Namespace::unnamed().unwrap(), Namespace::unnamed().unwrap());
        let kernel = Kernel::new(node.try_clone().unwrap()).unwrap();
        let mut small = Watch::with_buffer(&node, 1).unwrap();
        let mut watch = Watch::open(&node).unwrap();
        let mut made = Vec::new();
        for n in 0..16 {
            let id = format!("wire-{n}");
            let end = |side, ns: &Namespace| EndPlan::new(side, ns.id(), format!("nsm{n}"), &id);
            let plan = WirePlan::veth(&id, end(Side::Near, &near), end(Side::Far, &far));
            let applied = kernel.apply(&plan, &[&near, &far]).unwrap();
            made.push((
                plan,
                Nsids { near: applied.near.map(|end| end.nsid), far: applied.far.map(|end| end.nsid) },
            ));
        }
        assert_eq!(watch.read().unwrap(), [], "creations are not events");
        for (plan, nsids) in &made {
            kernel.remove_later(plan, *nsids, &[], drop);
        }
        kernel.flush();
        let events = watch.read().unwrap();
        assert_eq!(events.len(), 32, "{events:?}");
        for (plan, nsids) in &made {
            let name = &plan.near.as_ref().unwrap().ifname;
            for wanted in [nsids.near.unwrap(), nsids.far.unwrap()] {
                assert!(events.iter().any(
                    |event| matches!(event, Event::LinkGone { nsid, ifname, .. } if *nsid == wanted && ifname == name)
                ));
            }
        }
        let events = small.read().unwrap();
        assert!(events.contains(&Event::Lost) && events.len() < 32, "{events:?}");
        // And it goes on.
        assert_eq!(small.read().unwrap(), []);
        drop(near);
        let events = small.wait(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(
            events,
            [Event::NamespaceGone { nsid: made[0].1.near.unwrap() }],
            "in the node's numbers only"
        );
    }
}
