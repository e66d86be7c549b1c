//! The small DNS server that a pod's `dns: {web.lab: [172.16.1.2]}` asks for, and the probe that resolves a name the way
//! programs do: with what `resolv.conf` says.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use nsm_kernel::netns::Namespace;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use crate::Error;

const PORT: u16 = 53;
/// How long answers may be kept.
const TTL: u32 = 30;

/// Serves in one namespace until this is dropped.
#[derive(Debug)]
pub(crate) struct DnsServer {
    udp: UdpSocket,
    tcp: TcpListener,
}

// === impl DnsServer ===

impl DnsServer {
    /// Listens on port 53 of all addresses in `namespace`.
    pub(crate) fn start(
        namespace: &Namespace,
        name: &str,
        names: BTreeMap<String, Vec<IpAddr>>,
    ) -> Result<Self, Error> {
        let any: [SocketAddr; 2] =
            [(Ipv6Addr::UNSPECIFIED, PORT).into(), (Ipv4Addr::UNSPECIFIED, PORT).into()];
        let bound =
            namespace.run(|| io::Result::Ok((UdpSocket::bind(&any[..])?, TcpListener::bind(&any[..])?)));
        let (udp, tcp) = bound
            .map_err(Error::kernel(format!("enter the namespace of {name}")))?
            .map_err(|source| Error::system(format!("listen on port {PORT} in {name}"), source))?;
        let names = Arc::new(names);
        let copied = |e| Error::system("copy a socket", e);
        let (socket, known) = (udp.try_clone().map_err(copied)?, Arc::clone(&names));
        let datagrams = move || {
            let mut packet = [0; 4096];
            // Ends when the socket is shut down, which wakes it with nothing; not by std, which expects an address then.
            while let Ok((_, length @ 1.., Some(client))) =
                rustix::net::recvfrom(&socket, &mut packet, RecvFlags::empty())
            {
                if let Some(reply) = answer(&known, &packet[..length]) {
                    let _ = rustix::net::sendto(&socket, &reply, SendFlags::empty(), &client);
                }
            }
        };
        let listener = tcp.try_clone().map_err(copied)?;
        let streams = move || {
            while let Ok((stream, _)) = listener.accept() {
                let known = Arc::clone(&names);
                let _ = thread::Builder::new().name("dns".into()).spawn(move || serve(&known, stream));
            }
        };
        for work in [Box::new(datagrams) as Box<dyn FnOnce() + Send>, Box::new(streams)] {
            let thread = thread::Builder::new().name("dns".into());
            thread.spawn(work).map_err(|e| Error::system("start a thread", e))?;
        }
        Ok(Self { udp, tcp })
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        // Wakes the threads, which hold the other descriptors of the sockets. A socket without a peer says that it is
        // not connected, and is shut down all the same.
        let _ = rustix::net::shutdown(&self.udp, Shutdown::Both);
        let _ = rustix::net::shutdown(&self.tcp, Shutdown::Both);
    }
}

/// The addresses of a name, empty if there is no such name, asked of the servers in `resolv.conf` in the calling thread's
/// namespace. As in resolv.conf(5): the name with each search domain, then as it is.
pub(crate) fn resolve(
    resolv_conf: &Path,
    name: &str,
    v6: bool,
    tcp: bool,
    within: Duration,
) -> Result<Vec<IpAddr>, String> {
    let text = std::fs::read_to_string(resolv_conf)
        .map_err(|error| format!("{} cannot be read: {error}", resolv_conf.display()))?;
    let values = |keyword: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(keyword));
        lines.flat_map(str::split_whitespace).map(str::to_owned).collect()
    };
    let server = values("nameserver ").first().and_then(|server| server.parse::<IpAddr>().ok());
    let server = server.ok_or_else(|| format!("{} names no server", resolv_conf.display()))?;
    let mut names: Vec<_> = values("search ").iter().map(|domain| format!("{name}.{domain}.")).collect();
    if name.ends_with('.') {
        names.clear();
    }
    names.push(format!("{}.", name.trim_end_matches('.')));
    for name in names {
        let found = ask((server, PORT).into(), &name, v6, tcp, within)?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

// === private helpers ===

fn ask(server: SocketAddr, name: &str, v6: bool, tcp: bool, within: Duration) -> Result<Vec<IpAddr>, String> {
    let kind = if v6 { RecordType::AAAA } else { RecordType::A };
    let mut message =
        Message::new(u16::from(std::process::id() as u8) + 1, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).map_err(|e| format!("{name:?}: {e}"))?, kind));
    let packet = message.to_vec().map_err(|e| e.to_string())?;
    let within = within.clamp(Duration::from_millis(1), Duration::from_secs(6));
    let reply = exchange(server, &packet, tcp, within).map_err(|error| format!("{server}: {error}"))?;
    let reply = Message::from_vec(&reply).map_err(|error| format!("{server} does not speak DNS: {error}"))?;
    let address = |record: &Record| match record.data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    };
    match reply.metadata.response_code {
        ResponseCode::NoError => Ok(reply.answers.iter().filter_map(address).collect()),
        ResponseCode::NXDomain => Ok(Vec::new()),
        other => Err(format!("{server} says {other} of {name}")),
    }
}

fn exchange(server: SocketAddr, packet: &[u8], tcp: bool, within: Duration) -> io::Result<Vec<u8>> {
    if tcp {
        let mut stream = TcpStream::connect_timeout(&server, within)?;
        stream.set_read_timeout(Some(within))?;
        write_framed(&mut stream, packet)?;
        return read_framed(&mut stream);
    }
    let any: IpAddr =
        if server.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(within))?;
    socket.connect(server)?;
    socket.send(packet)?;
    let mut reply = vec![0; 4096];
    let length = socket.recv(&mut reply)?;
    reply.truncate(length);
    Ok(reply)
}

fn answer(names: &BTreeMap<String, Vec<IpAddr>>, packet: &[u8]) -> Option<Vec<u8>> {
    let asked = Message::from_vec(packet).ok()?;
    let query = asked.queries.first()?.clone();
    let mut reply = Message::response(asked.metadata.id, OpCode::Query);
    reply.metadata.authoritative = true;
    reply.metadata.recursion_desired = asked.metadata.recursion_desired;
    let wanted = query.name().to_lowercase().to_string();
    match names.iter().find(|(name, _)| name.trim_end_matches('.') == wanted.trim_end_matches('.')) {
        None => reply.metadata.response_code = ResponseCode::NXDomain,
        Some((_, addresses)) => {
            let data = addresses.iter().filter_map(|address| match (address, query.query_type()) {
                (IpAddr::V4(ip), RecordType::A) => Some(RData::A((*ip).into())),
                (IpAddr::V6(ip), RecordType::AAAA) => Some(RData::AAAA((*ip).into())),
                _ => None,
            });
            reply.add_answers(data.map(|data| Record::from_rdata(query.name().clone(), TTL, data)));
        }
    }
    reply.add_query(query);
    reply.to_vec().ok()
}

fn serve(names: &BTreeMap<String, Vec<IpAddr>>, mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    loop {
        let packet = read_framed(&mut stream)?;
        let Some(reply) = answer(names, &packet) else { return Ok(()) };
        write_framed(&mut stream, &reply)?;
    }
}

fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut packet = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut packet)?;
    Ok(packet)
}

fn write_framed(stream: &mut TcpStream, packet: &[u8]) -> io::Result<()> {
    let length = u16::try_from(packet.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], packet].concat())
}
