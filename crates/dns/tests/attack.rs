//! The forwarder with real sockets, on loopback, under attack: what others send does not stop it.
#![allow(clippy::unwrap_used)]

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use nsm_dns::{
    Config,
    serve::{MAX_STREAMS, Server},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    time::timeout,
};

/// How long anything may take that has to happen.
const PATIENCE: Duration = Duration::from_secs(20);
const LOCAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A DNS server that knows `web.lab` by UDP, `big.lab` only by TCP, and lies first.
async fn upstream() -> SocketAddr {
    let tcp = TcpListener::bind(LOCAL).await.unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = Arc::new(UdpSocket::bind(address).await.unwrap());
    tokio::spawn(async move {
        let mut packet = [0; 4096];
        loop {
            let (length, from) = udp.recv_from(&mut packet).await.unwrap();
            let asked = Message::from_vec(&packet[..length]).unwrap();
            let lie = |message: &Message| answer(message, [6, 6, 6, 6]);
            // From another port, though everything else is right: the kernel drops it.
            let stranger = UdpSocket::bind(LOCAL).await.unwrap();
            stranger.send_to(&lie(&asked), from).await.unwrap();
            // From the right port: garbage, another id, another question.
            udp.send_to(b"garbage", from).await.unwrap();
            let mut other = asked.clone();
            other.metadata.id ^= 1;
            udp.send_to(&lie(&other), from).await.unwrap();
            let mut other = asked.clone();
            other.queries[0] = Query::query(Name::from_ascii("evil.lab.").unwrap(), RecordType::A);
            udp.send_to(&lie(&other), from).await.unwrap();
            udp.send_to(&truth(&asked, true), from).await.unwrap();
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let length = stream.read_u16().await.unwrap();
            let mut packet = vec![0; length.into()];
            stream.read_exact(&mut packet).await.unwrap();
            let reply = truth(&Message::from_vec(&packet).unwrap(), false);
            stream.write_u16(reply.len().try_into().unwrap()).await.unwrap();
            stream.write_all(&reply).await.unwrap();
        }
    });
    address
}

fn answer(to: &Message, [a, b, c, d]: [u8; 4]) -> Vec<u8> {
    let mut message = Message::response(to.metadata.id, OpCode::Query);
    let query = to.queries[0].clone();
    message.add_answer(Record::from_rdata(query.name().clone(), 0, RData::A(A::new(a, b, c, d))));
    message.add_query(query);
    message.to_vec().unwrap()
}

fn truth(asked: &Message, udp: bool) -> Vec<u8> {
    let name = asked.queries[0].name().to_string();
    if name == "web.lab." || (name == "big.lab." && !udp) {
        return answer(asked, [172, 16, 1, 2]);
    }
    let mut message = Message::response(asked.metadata.id, OpCode::Query);
    message.metadata.truncation = name == "big.lab.";
    if name != "big.lab." {
        message.metadata.response_code = ResponseCode::NXDomain;
    }
    message.add_query(asked.queries[0].clone());
    message.to_vec().unwrap()
}

fn question(of: &str) -> Vec<u8> {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(of).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

async fn start() -> Server {
    let server = Server::bind(LOCAL).await.unwrap();
    let (config, bad) = Config::read(&[upstream().await.to_string()], &["lab".to_owned()]);
    assert_eq!(bad, [""; 0]);
    server.set("nsc-0", vec![config]);
    server
}

/// The addresses of an answer, or its error.
fn addresses(packet: &[u8]) -> Result<Vec<String>, ResponseCode> {
    let message = Message::from_vec(packet).unwrap();
    assert_eq!(message.metadata.id, 4711);
    let of_kind = message.answers.iter().filter(|record| record.record_type() == RecordType::A);
    match message.metadata.response_code {
        ResponseCode::NoError => Ok(of_kind.map(|record| record.data.to_string()).collect()),
        other => Err(other),
    }
}

async fn by_udp(server: &Server, of: &str) -> Result<Vec<String>, ResponseCode> {
    let socket = UdpSocket::bind(LOCAL).await.unwrap();
    socket.send_to(&question(of), server.address()).await.unwrap();
    let mut packet = [0; 4096];
    let length = timeout(PATIENCE, socket.recv(&mut packet)).await.expect("an answer").unwrap();
    addresses(&packet[..length])
}

async fn by_tcp(stream: &mut TcpStream, of: &str) -> Result<Vec<String>, ResponseCode> {
    let packet = question(of);
    stream.write_u16(packet.len().try_into().unwrap()).await.unwrap();
    stream.write_all(&packet).await.unwrap();
    let length = timeout(PATIENCE, stream.read_u16()).await.expect("an answer").unwrap();
    let mut reply = vec![0; length.into()];
    stream.read_exact(&mut reply).await.unwrap();
    addresses(&reply)
}

#[tokio::test]
async fn lies_are_not_believed_and_names_are_found() {
    let server = start().await;
    let found = Ok(vec!["172.16.1.2".to_owned()]);
    // One stream for all, as resolvers keep it.
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    for of in ["web.lab.", "web.", "big.lab.", "big."] {
        assert_eq!(by_udp(&server, of).await, found, "{of} by UDP");
        assert_eq!(by_tcp(&mut stream, of).await, found, "{of} by TCP");
    }
    assert_eq!(by_udp(&server, "nobody.").await, Err(ResponseCode::NXDomain));
    assert_eq!(by_tcp(&mut stream, "nobody.").await, Err(ResponseCode::NXDomain));
    assert_eq!(server.load(), (0, 0));
}

#[tokio::test]
async fn garbage_and_slow_clients_do_not_stop_it() {
    let server = start().await;
    let socket = UdpSocket::bind(LOCAL).await.unwrap();
    let good = question("web.");
    for i in 0..2000u32 {
        let mut packet = good.clone();
        let at = i as usize % packet.len();
        packet[at] = packet[at].wrapping_add((1 + i / 7) as u8);
        packet.truncate(good.len() - (i as usize % 5));
        socket.send_to(&packet, server.address()).await.unwrap();
    }
    socket.send_to(&vec![0x41; 60_000], server.address()).await.unwrap();
    // More streams than there is room for, all of which say half a word and wait.
    let mut slow = Vec::new();
    for _ in 0..MAX_STREAMS + 20 {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let _ = stream.write_all(b"\x00\x20half").await;
        slow.push(stream);
    }
    assert_eq!(by_udp(&server, "web.").await, Ok(vec!["172.16.1.2".to_owned()]), "UDP goes on");
    // They are closed by themselves, and there is room again.
    for stream in &mut slow {
        let mut rest = Vec::new();
        let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("it is closed");
        assert!(rest.is_empty());
    }
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    assert_eq!(by_tcp(&mut stream, "web.").await, Ok(vec!["172.16.1.2".to_owned()]));
    // A length that nobody may ask for ends a stream at once.
    stream.write_u16(65_535).await.unwrap();
    assert_eq!(timeout(PATIENCE, stream.read(&mut [0; 8])).await.expect("closed").unwrap_or(0), 0);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_an_answer_too() {
    let server = Server::bind(LOCAL).await.unwrap();
    assert_eq!(by_udp(&server, "web.").await, Err(ResponseCode::ServFail), "nobody to ask");
    // A port where nobody listens: taken and let go of.
    let nobody = TcpListener::bind(LOCAL).await.unwrap().local_addr().unwrap();
    server.set("nsc-0", vec![Config::read(&[nobody.to_string()], &[]).0]);
    assert_eq!(by_udp(&server, "web.").await, Err(ResponseCode::ServFail));
    assert_eq!(server.load(), (0, 0));
    let taken = Server::bind(server.address()).await.unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
}
