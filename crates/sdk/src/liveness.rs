//! Whether packets pass through a wire: an echo request from each of its own addresses to each address of the far end
//! (spec/control-plane.md 10.1). The control plane does not notice an interface that is gone or a filter that drops.
//!
//! The sockets are ICMP datagram sockets, which need no privilege: the forwarder opens `net.ipv4.ping_group_range` in
//! the namespaces of its wires. They are of the namespace of this process, which is that of the wires, and of the wire's
//! interface: what is answered over another says nothing.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use nsm_api::{
    mechanism::{key, kind},
    pb::connection::Connection,
};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with},
};
use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

/// Echo requests of one check, spread evenly over its time.
const REQUESTS: u8 = 4;
/// Pairs of addresses that a check asks for: a far end with more of them is bounded work too.
const MAX_PAIRS: usize = 64;
/// What an echo request carries: its answer is told from others by it.
const PAYLOAD: [u8; 8] = *b"nsm-live";

/// When and how long a wire is probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Liveness {
    /// Between the end of a check and the next.
    pub interval: Duration,
    /// How long the far end has for its answer.
    pub timeout: Duration,
}

impl Default for Liveness {
    /// As `nsm client` probes: a check every 200 ms, answered within half a second. Upstream waits for a second; with half
    /// of that a node that is cut off is noticed, and another found, within one.
    fn default() -> Self {
        Self { interval: Duration::from_millis(200), timeout: Duration::from_millis(500) }
    }
}

/// What answers once is expected to answer again within so many times of that.
const HURRY: u32 = 10;
/// But has at least so long: a busy machine answers late.
const LEAST: Duration = Duration::from_millis(20);

/// What a check has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Every pair of addresses has answered, or there is nothing to ask.
    Alive,
    /// No packet comes back; why.
    Dead(String),
    /// There is no way that packets could go: an address or a route is gone; which.
    Gone(String),
    /// It cannot be known here; why. It counts as alive.
    Unknown(String),
}

/// How long an answer took at most, after one more: a slow one counts less with each that follows, or one moment of a busy
/// machine would make finding out slow for ever.
pub(crate) fn slowest(so_far: Option<Duration>, took: Duration) -> Duration {
    so_far.map_or(took, |so_far| took.max(so_far / 8 * 7))
}

impl Liveness {
    /// For a wire that is said to be down: time to find out counts then. `slowest` is how long an answer took so far.
    #[must_use]
    pub fn hurried(self, slowest: Option<Duration>) -> Self {
        let enough = slowest.map_or(self.timeout, |slowest| (slowest * HURRY).max(LEAST));
        Self { timeout: self.timeout.min(enough), ..self }
    }

    /// Asks once. Dropping the future ends the check.
    pub async fn check(&self, conn: &Connection) -> Verdict {
        let wire = conn.mechanism.as_ref().and_then(|mechanism| mechanism.get(key::NAME));
        let asked = pairs(conn).into_iter().map(|(from, to)| self.echo(wire, from, to));
        let mut unknown = None;
        for verdict in futures::future::join_all(asked).await {
            match verdict {
                Verdict::Alive => {}
                Verdict::Dead(_) | Verdict::Gone(_) => return verdict,
                Verdict::Unknown(why) => unknown = Some(why),
            }
        }
        unknown.map_or(Verdict::Alive, Verdict::Unknown)
    }

    async fn echo(&self, wire: Option<&str>, from: IpAddr, to: IpAddr) -> Verdict {
        let socket = match open(from, to) {
            Ok(socket) => socket,
            Err(verdict) => return verdict,
        };
        // Whoever else has the address, or is on the way to one who has, does not answer for the wire. A kernel before 5.7
        // does not let us say so, and then the addresses have to do.
        if let Some(wire) = wire
            && socket
                .bind_device(Some(wire.as_bytes()))
                .is_err_and(|e| e.raw_os_error() == Some(Errno::NODEV.raw_os_error()))
        {
            return Verdict::Gone(format!("our interface {wire} is gone"));
        }
        let step = self.timeout / u32::from(REQUESTS);
        let mut why = "no answer".to_owned();
        for number in 1..=REQUESTS {
            // Counted from the request on: a process that got no time to run has not waited.
            let end = Instant::now() + step;
            if let Ok(Err(error)) = timeout_at(end, socket.send(&request(to, number))).await {
                // The neighbour does not answer, or a rule of this namespace says no: lost, like a lost packet.
                why = error.to_string();
            }
            let mut packet = [0; 64];
            while let Ok(received) = timeout_at(end, socket.recv(&mut packet)).await {
                match received {
                    Ok(length) if is_answer(to, packet.get(..length).unwrap_or_default()) => {
                        return Verdict::Alive;
                    }
                    Ok(_) => {}
                    // An ICMP error that came for a request: it is lost, the socket is well.
                    Err(error) => why = error.to_string(),
                }
            }
        }
        Verdict::Dead(format!("{to} does not answer {from} within {:?} ({why})", self.timeout))
    }
}

/// Which addresses ask which: every own address every far one of its family. Empty where the mechanism has no such
/// probe, or the wire no addresses.
#[must_use]
pub fn pairs(conn: &Connection) -> Vec<(IpAddr, IpAddr)> {
    if conn.mechanism.as_ref().is_none_or(|m| m.r#type != kind::KERNEL) {
        return Vec::new();
    }
    let context = conn.context.as_ref().and_then(|context| context.ip_context.as_ref());
    let Some(context) = context else { return Vec::new() };
    let addresses = |list: &[String]| -> Vec<IpAddr> {
        let parse = |text: &String| {
            let net = text.parse::<IpNet>().map(|net| net.addr());
            net.or_else(|_| text.parse()).ok()
        };
        // A link-local address means nothing without its interface.
        let usable = |ip: &IpAddr| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        list.iter().filter_map(parse).filter(usable).collect()
    };
    let (own, far) = (addresses(&context.src_ip_addrs), addresses(&context.dst_ip_addrs));
    let all = own.iter().flat_map(|from| far.iter().map(move |to| (*from, *to)));
    all.filter(|(from, to)| from.is_ipv4() == to.is_ipv4()).take(MAX_PAIRS).collect()
}

/// A socket between the two addresses, or what its absence means.
fn open(from: IpAddr, to: IpAddr) -> Result<UdpSocket, Verdict> {
    let unknown = |what: &str, error: io::Error| Verdict::Unknown(format!("{what}: {error}"));
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::DGRAM, flags, Some(protocol)).map_err(|error| {
        unknown("no ICMP socket (does net.ipv4.ping_group_range include our group?)", error.into())
    })?;
    bind(&socket, &SocketAddr::new(from, 0)).map_err(|error| match error {
        Errno::ADDRNOTAVAIL => Verdict::Gone(format!("our address {from} is gone")),
        error => unknown("the ICMP socket cannot be bound", error.into()),
    })?;
    connect(&socket, &SocketAddr::new(to, 0)).map_err(|error| match error {
        Errno::NETUNREACH | Errno::HOSTUNREACH => Verdict::Gone(format!("there is no route to {to}")),
        error => unknown("the ICMP socket cannot be connected", error.into()),
    })?;
    // To the library a datagram socket is like any other: sent on and received from when it is connected.
    UdpSocket::from_std(socket.into()).map_err(|error| unknown("the ICMP socket cannot be waited for", error))
}

/// An echo request. The kernel fills in identifier and checksum of a datagram socket.
fn request(to: IpAddr, number: u8) -> [u8; 16] {
    let mut packet = [0; 16];
    packet[0] = if to.is_ipv6() { 128 } else { 8 };
    packet[7] = number;
    packet[8..].copy_from_slice(&PAYLOAD);
    packet
}

/// The kernel hands over only what carries this socket's identifier.
fn is_answer(to: IpAddr, packet: &[u8]) -> bool {
    let answer = if to.is_ipv6() { 129 } else { 0 };
    packet.first() == Some(&answer) && packet.get(8..) == Some(&PAYLOAD)
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::{
        connection::Mechanism,
        connectioncontext::{ConnectionContext, IpContext},
    };

    use super::*;

    fn conn(own: &[&str], far: &[&str]) -> Connection {
        let list = |items: &[&str]| items.iter().map(|&s| s.to_owned()).collect();
        let ip = IpContext { src_ip_addrs: list(own), dst_ip_addrs: list(far), ..IpContext::default() };
        Connection {
            mechanism: Some(Mechanism::kernel("nsm0", None)),
            context: Some(ConnectionContext { ip_context: Some(ip), ..ConnectionContext::default() }),
            ..Connection::default()
        }
    }

    #[test]
    fn a_wire_that_is_said_to_be_down_is_found_out_about_as_fast_as_it_has_answered() {
        let liveness = Liveness::default();
        let within = |slowest: Option<u64>| liveness.hurried(slowest.map(Duration::from_micros)).timeout;
        assert_eq!(within(None), liveness.timeout, "it has never answered");
        assert_eq!(within(Some(80)), LEAST);
        assert_eq!(within(Some(20_000)), Duration::from_millis(200));
        assert_eq!(within(Some(400_000)), liveness.timeout, "never longer than otherwise");
        let after =
            (0..10).fold(Duration::from_millis(30), |so_far, _| slowest(Some(so_far), Duration::ZERO));
        assert!(after < Duration::from_millis(8), "{after:?}: it was slow once");
        assert_eq!(slowest(None, after), after);
    }

    #[test]
    fn every_own_address_asks_every_far_one_of_its_family() {
        let both =
            conn(&["172.16.1.1/32", "2001:db8::1/128"], &["172.16.1.0/32", "2001:db8::/128", "10.0.0.1"]);
        let texts: Vec<_> = pairs(&both).iter().map(|(a, b)| format!("{a} {b}")).collect();
        assert_eq!(texts, ["172.16.1.1 172.16.1.0", "172.16.1.1 10.0.0.1", "2001:db8::1 2001:db8::"]);
        assert_eq!(pairs(&conn(&["172.16.1.1/32"], &["2001:db8::/128"])), []);
        assert_eq!(pairs(&conn(&["fe80::1/64"], &["fe80::2/64"])), []);
        assert_eq!(pairs(&conn(&["nonsense"], &["172.16.1.0/32"])), []);
        let many: Vec<_> = (0..255).map(|i| format!("10.0.0.{i}/32")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert_eq!(pairs(&conn(&many, &many)).len(), MAX_PAIRS);
        let mut memif = both;
        memif.mechanism.as_mut().unwrap().r#type = kind::MEMIF.into();
        assert_eq!(pairs(&memif), [], "no probe of that mechanism");
        assert_eq!(pairs(&Connection::default()), []);
    }

    #[test]
    fn an_answer_is_one_to_this_check() {
        let v4: IpAddr = "10.0.0.1".parse().unwrap();
        let v6: IpAddr = "2001:db8::1".parse().unwrap();
        let mut packet = request(v4, 3);
        assert_eq!(packet, *b"\x08\0\0\0\0\0\0\x03nsm-live");
        assert!(!is_answer(v4, &packet), "our own request is none");
        packet[0] = 0;
        assert!(is_answer(v4, &packet) && !is_answer(v6, &packet));
        assert!(!is_answer(v4, &packet[..12]) && !is_answer(v4, &[]));
        packet[0] = 129;
        assert!(is_answer(v6, &packet) && request(v6, 1)[0] == 128);
    }

    #[tokio::test]
    async fn nothing_to_ask_is_alive_and_an_address_that_is_gone_is_not() {
        let liveness = Liveness { interval: Duration::ZERO, timeout: Duration::from_millis(40) };
        assert_eq!(liveness.check(&Connection::default()).await, Verdict::Alive);
        match liveness.check(&conn(&["192.0.2.77/32"], &["127.0.0.1/32"])).await {
            Verdict::Gone(why) => assert_eq!(why, "our address 192.0.2.77 is gone"),
            // Whoever may not ping cannot know.
            Verdict::Unknown(why) => assert!(why.contains("ping_group_range"), "{why}"),
            verdict => panic!("nobody has that address: {verdict:?}"),
        }
    }
}
