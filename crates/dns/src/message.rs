//! Messages: what is accepted from clients and servers, what is sent to them. Everything read here is from others.

use std::time::Duration;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata::CNAME},
};

/// Bytes of a question that are read.
pub const MAX_QUERY: usize = 4096;
/// Bytes of an answer that a server may send by UDP, and that we send to whoever takes more than 512 (RFC 9715).
const UDP_ANSWER: u16 = 1232;
/// Bytes that a client may ask us to send by UDP: it is in our own pod.
const MAX_UDP_REPLY: u16 = 4096;
/// What every client takes by UDP (RFC 1035 section 4.2.1).
const MIN_UDP_REPLY: u16 = 512;
const HEADER: usize = 12;
/// A question has at least so many bytes, a record so many.
const MIN_QUESTION: usize = 5;
const MIN_RECORD: usize = 11;

/// What is asked, in the form in which two questions are the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// Lower case.
    pub name: Name,
    /// `A`, `AAAA`, …
    pub kind: RecordType,
    /// Whether the server shall ask others.
    pub recursion: bool,
    /// Whether signatures are wanted, and whether they shall be left unchecked.
    pub dnssec: (bool, bool),
}

/// A question, and how its answer has to look.
#[derive(Debug, Clone)]
pub struct Question {
    /// What is asked.
    pub key: Key,
    id: u16,
    /// With the letters as they came.
    query: Query,
    edns: bool,
    max_udp: u16,
}

/// What to do with what a client sent.
#[derive(Debug)]
pub enum Asked {
    /// A question.
    Question(Box<Question>),
    /// Say this.
    Refuse(Vec<u8>),
    /// Say nothing: an answer that nobody asked for, or less than a header.
    Ignore,
}

/// What a server sent.
#[derive(Debug)]
pub enum Told {
    /// Not the answer to what it was asked.
    Other,
    /// The answer is longer than a datagram.
    Truncated,
    /// The answer.
    Answer(Box<Message>),
}

/// Reads what a client sent.
#[must_use]
pub fn asked(packet: &[u8]) -> Asked {
    let [i0, i1, flags, ..] = *packet else { return Asked::Ignore };
    if packet.len() < HEADER || flags & 0x80 != 0 {
        return Asked::Ignore;
    }
    let id = u16::from_be_bytes([i0, i1]);
    let refuse = |op: OpCode, code: ResponseCode, query: Option<&Query>| {
        let mut message = Message::error_msg(id, op, code);
        message.queries.extend(query.cloned());
        message.metadata.recursion_desired = flags & 1 != 0;
        message.to_vec().map_or(Asked::Ignore, Asked::Refuse)
    };
    let op = OpCode::from_u8(flags >> 3 & 0xf);
    if op != OpCode::Query {
        return refuse(op, ResponseCode::NotImp, None);
    }
    if packet.len() > MAX_QUERY || !plausible(packet) || packet.get(4..6) != Some(&[0, 1]) {
        return refuse(op, ResponseCode::FormErr, None);
    }
    let Ok(message) = Message::from_vec(packet) else { return refuse(op, ResponseCode::FormErr, None) };
    let Some(query) = message.queries.first() else { return refuse(op, ResponseCode::FormErr, None) };
    if message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return refuse(op, ResponseCode::FormErr, Some(query));
    }
    let transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
    if transfer || query.query_class() != DNSClass::IN {
        return refuse(op, ResponseCode::NotImp, Some(query));
    }
    let wants_signatures = message.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
    let key = Key {
        name: query.name().to_lowercase(),
        kind: query.query_type(),
        recursion: message.metadata.recursion_desired,
        dnssec: (wants_signatures, message.metadata.checking_disabled),
    };
    let max_udp = message.edns.as_ref().map_or(MIN_UDP_REPLY, Edns::max_payload);
    Asked::Question(Box::new(Question {
        key,
        id,
        query: query.clone(),
        edns: message.edns.is_some(),
        max_udp: max_udp.clamp(MIN_UDP_REPLY, MAX_UDP_REPLY),
    }))
}

/// The packet that asks a server for a name.
#[must_use]
pub fn ask(id: u16, name: &Name, key: &Key) -> Option<Vec<u8>> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = key.recursion;
    message.metadata.checking_disabled = key.dnssec.1;
    message.add_query(Query::query(name.clone(), key.kind));
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_ANSWER).set_dnssec_ok(key.dnssec.0);
    message.set_edns(edns);
    message.to_vec().ok()
}

/// Reads what a server sent. Only the answer to exactly what it was asked counts: anybody can send us packets.
#[must_use]
pub fn told(packet: &[u8], id: u16, name: &Name, key: &Key) -> Told {
    if packet.len() < HEADER || !plausible(packet) {
        return Told::Other;
    }
    let Ok(message) = Message::from_vec(packet) else {
        return Told::Other;
    };
    let [query] = &message.queries[..] else { return Told::Other };
    let fits = message.metadata.message_type == MessageType::Response
        && message.metadata.op_code == OpCode::Query
        && message.metadata.id == id
        && query.name() == name
        && query.query_type() == key.kind
        && query.query_class() == DNSClass::IN;
    match (fits, message.metadata.truncation) {
        (false, _) => Told::Other,
        (true, true) => Told::Truncated,
        (true, false) => Told::Answer(Box::new(message)),
    }
}

/// The reply to a question. `answer` may be about another name: the one with a search domain appended, of which the
/// question's is said to be an alias, because resolvers do not take records of a name that they did not ask for.
#[must_use]
pub fn reply(question: &Question, answer: Option<(&Name, &Message)>, udp: bool) -> Option<Vec<u8>> {
    let mut message = Message::response(question.id, OpCode::Query);
    message.add_query(question.query.clone());
    message.metadata.recursion_desired = question.key.recursion;
    message.metadata.recursion_available = true;
    message.metadata.checking_disabled = question.key.dnssec.1;
    message.metadata.response_code = ResponseCode::ServFail;
    if let Some((name, answer)) = answer {
        message.metadata.response_code = answer.metadata.response_code;
        if *name != question.key.name {
            let ttl = ttl(answer).map_or(0, |ttl| u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX));
            let alias = RData::CNAME(CNAME(name.clone()));
            message.answers.push(Record::from_rdata(question.query.name().clone(), ttl, alias));
        }
        message.answers.extend(answer.answers.iter().cloned());
        message.authorities.extend(answer.authorities.iter().cloned());
        message.additionals.extend(answer.additionals.iter().cloned());
    }
    if question.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_ANSWER).set_dnssec_ok(question.key.dnssec.0);
        message.set_edns(edns);
    }
    let max = if udp { usize::from(question.max_udp) } else { usize::from(u16::MAX) };
    let packet = message.to_vec().ok();
    match packet {
        Some(packet) if packet.len() <= max => Some(packet),
        _ => message.truncate().to_vec().ok().filter(|packet| packet.len() <= max),
    }
}

/// How long an answer may be used: until its first record is too old.
#[must_use]
pub fn ttl(answer: &Message) -> Option<Duration> {
    answer.answers.iter().map(|record| record.ttl).min().map(|ttl| Duration::from_secs(ttl.into()))
}

/// Whether the header's counts can be true: a decoder makes room for what they say.
fn plausible(packet: &[u8]) -> bool {
    let count = |at: usize| {
        let bytes = packet.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map(u16::from_be_bytes);
        usize::from(bytes.unwrap_or_default())
    };
    let least = count(4) * MIN_QUESTION + (count(6) + count(8) + count(10)) * MIN_RECORD;
    least <= packet.len().saturating_sub(HEADER)
}
