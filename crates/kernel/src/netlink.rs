//! A small synchronous netlink socket: one buffer, sequence numbers, request → answer, no background task.
//!
//! The kernel handles a netlink message inside the `send` that carries it, so all its answers are queued when `send`
//! returns. The socket therefore never blocks: an answer that is not there will not come, and is an error.
//!
//! Several messages go in one `send`. The kernel handles each, also behind one that it refuses. It answers a refused
//! message always and an accepted one only if asked to; [`Socket::commit`] asks for the last one of a batch.
//!
//! A socket belongs to the namespace it was opened in (and keeps it alive!), and may be used from any thread.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{SocketAddr, protocols};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::error::{Error, Refusal, Result};
use crate::netns::Namespace;

/// One netlink protocol and its messages.
pub trait Family: fmt::Debug + Send {
    /// `NETLINK_…` of `linux/netlink.h`.
    const PROTOCOL: isize;
    /// What travels.
    type Message: NetlinkSerializable + NetlinkDeserializable + fmt::Debug + Send;

    /// Whether the library that knows these messages can be given one of this type with what follows its `nlmsghdr`. It
    /// is asked where the library trusts a length that it should look at, and panics if that lies.
    #[must_use]
    fn is_decodable(_kind: u16, _body: &[u8]) -> bool {
        true
    }
}

/// Links, addresses, routes, neighbours, rules, namespace ids (man 7 rtnetlink).
#[derive(Debug, Clone, Copy)]
pub enum Route {}

/// A netlink socket.
#[derive(Debug)]
pub struct Socket<F: Family> {
    inner: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
    writes: u64,
    family: PhantomData<F>,
}

/// One message to the kernel with its flags (`NLM_F_…`; `REQUEST` is implied).
#[derive(Debug)]
pub struct Request<M> {
    /// What is asked for.
    pub message: M,
    /// `NLM_F_CREATE`, `NLM_F_REPLACE` and the like.
    pub flags: u16,
}

/// A refused message of a batch.
#[derive(Debug)]
pub struct RefusedAt {
    /// Its position in the batch.
    pub index: usize,
    /// The kernel's answer.
    pub refusal: Refusal,
}

/// More than the kernel puts into one datagram of a dump (32 KiB); one huge message may still be larger, then the
/// buffer grows.
const BUFFER: usize = 32 * 1024;
/// Answers wait in a receive buffer of 208 KiB (about 1 KiB each, by the kernel's way of counting), so a longer batch
/// is sent in parts.
const MESSAGES_PER_SEND: usize = 64;
/// What fits a socket's send buffer as the kernel makes it (208 KiB, half of it for its own books).
const SEND_BUFFER: usize = 96 * 1024;
/// How often a dump is repeated that the kernel says is inconsistent because something changed meanwhile.
const DUMP_ATTEMPTS: u32 = 8;

impl Family for Route {
    const PROTOCOL: isize = protocols::NETLINK_ROUTE;
    type Message = RouteNetlinkMessage;
}

// === impl Request ===

impl<M> Request<M> {
    /// A message without further flags.
    pub fn new(message: M) -> Self {
        Self { message, flags: 0 }
    }

    /// A message with these flags.
    pub fn with(message: M, flags: u16) -> Self {
        Self { message, flags }
    }
}

// === impl Socket ===

impl<F: Family> Socket<F> {
    /// A socket in the namespace of the calling thread.
    pub fn open() -> Result<Self> {
        let socket = || {
            let mut socket = netlink_sys::Socket::new(F::PROTOCOL)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            socket.set_ext_ack(true)?;
            socket.set_cap_ack(true)?;
            // Filters of dumps are honoured, and wrong requests refused, only with this.
            socket.set_netlink_get_strict_chk(true)?;
            Ok(socket)
        };
        let inner = socket().map_err(|source| Error::Socket { what: "open it", source })?;
        Ok(Self { inner, sequence: 0, buffer: vec![0; BUFFER], writes: 0, family: PhantomData })
    }

    /// A socket in that namespace.
    pub fn open_in(ns: &Namespace) -> Result<Self> {
        ns.run(Self::open)?
    }

    /// How many messages that change something were sent so far.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Changes one thing.
    pub fn request(&mut self, request: Request<F::Message>) -> Result<(), Attempt> {
        match self.commit(vec![request])?.pop() {
            Some(at) => Err(Attempt::Refused(at.refusal)),
            None => Ok(()),
        }
    }

    /// Changes several things with as few system calls as possible. Every message is handled, also behind a refused
    /// one; what the kernel refused is returned.
    pub fn commit(&mut self, requests: Vec<Request<F::Message>>) -> Result<Vec<RefusedAt>> {
        let mut refused = Vec::new();
        let mut requests = requests.into_iter();
        let mut done = 0;
        loop {
            let mut part: Vec<_> = requests.by_ref().take(MESSAGES_PER_SEND).collect();
            let Some(last) = part.last_mut() else { return Ok(refused) };
            last.flags |= NLM_F_ACK;
            let count = part.len();
            let part = self.exchange(part, count - 1)?;
            refused.extend(part.into_iter().map(|at| RefusedAt { index: done + at.index, ..at }));
            done += count;
        }
    }

    /// Changes several things as one, for protocols that know transactions: all messages go in one datagram, with the
    /// flags that they have. The answer to number `awaited`, which has to ask for one (`NLM_F_ACK`), is waited for;
    /// what the kernel refused is returned.
    pub fn transact(&mut self, requests: Vec<Request<F::Message>>, awaited: usize) -> Result<Vec<RefusedAt>> {
        self.exchange(requests, awaited)
    }

    fn exchange(&mut self, part: Vec<Request<F::Message>>, awaited: usize) -> Result<Vec<RefusedAt>> {
        let count = part.len();
        self.writes += count as u64;
        let first = self.send(part)?;
        let (mut refused, mut complete) = (Vec::new(), false);
        self.receive(first, count, |index, _, answer| {
            if let Answer::Status(status) = answer {
                complete |= index == awaited;
                refused.extend(status.err().map(|refusal| RefusedAt { index, refusal }));
            }
            Ok(complete)
        })?;
        // A transaction that is refused as a whole answers for its first message only.
        if !complete && refused.is_empty() {
            return Err(Error::Protocol("a batch was not acknowledged".into()));
        }
        Ok(refused)
    }

    /// Asks for several single things at once; each has its own answer, in order.
    pub fn ask(&mut self, questions: Vec<F::Message>) -> Result<Vec<Result<F::Message, Refusal>>> {
        let mut answers = Vec::new();
        let mut questions = questions.into_iter();
        loop {
            let part: Vec<_> = questions.by_ref().take(MESSAGES_PER_SEND).map(Request::new).collect();
            if part.is_empty() {
                break;
            }
            let count = part.len();
            let mut got: Vec<Option<Result<F::Message, Refusal>>> = (0..count).map(|_| None).collect();
            let first = self.send(part)?;
            self.receive(first, count, |index, _, answer| {
                got[index] = match answer {
                    Answer::Message(message) => Some(Ok(message)),
                    Answer::Status(Err(refusal)) => Some(Err(refusal)),
                    Answer::Status(Ok(())) | Answer::Done => return Ok(false),
                };
                Ok(got.iter().all(Option::is_some))
            })?;
            let complete: Option<Vec<_>> = got.into_iter().collect();
            answers.extend(complete.ok_or_else(|| Error::Protocol("a question was not answered".into()))?);
        }
        Ok(answers)
    }

    /// Everything that matches the question. Repeated while the kernel says that it changed meanwhile.
    pub fn dump(&mut self, question: F::Message) -> Result<Vec<F::Message>, Attempt>
    where
        F::Message: Clone,
    {
        for _ in 0..DUMP_ATTEMPTS {
            let mut found = Vec::new();
            let (mut done, mut torn, mut refused) = (false, false, None);
            let first = self.send(vec![Request::with(question.clone(), NLM_F_DUMP)])?;
            self.receive(first, 1, |_, flags, answer| {
                torn |= flags & NLM_F_DUMP_INTR != 0;
                match answer {
                    Answer::Message(message) => found.push(message),
                    Answer::Done => done = true,
                    Answer::Status(status) => {
                        done = true;
                        refused = status.err();
                    }
                }
                Ok(done)
            })?;
            match refused {
                Some(refusal) => return Err(Attempt::Refused(refusal)),
                None if !done => return Err(Error::Protocol("a dump has no end".into()).into()),
                None if torn => {}
                None => return Ok(found),
            }
        }
        Err(Error::Protocol("a dump never was consistent: the namespace changes too fast".into()).into())
    }

    /// Sends messages as one datagram, and returns the sequence number of the first; the others follow.
    fn send(&mut self, requests: Vec<Request<F::Message>>) -> Result<u32> {
        let first = self.sequence.wrapping_add(1);
        let mut datagram = Vec::with_capacity(1024);
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            let mut header = NetlinkHeader::default();
            header.flags = NLM_F_REQUEST | request.flags;
            header.sequence_number = self.sequence;
            let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request.message));
            message.finalize();
            let (start, length) = (datagram.len(), message.buffer_len());
            // Messages are aligned to four bytes (NLMSG_ALIGN).
            datagram.resize((start + length).next_multiple_of(4), 0);
            message.serialize(&mut datagram[start..start + length]);
        }
        let failed = |e: Errno| Error::Socket { what: "send", source: e.into() };
        if datagram.len() > SEND_BUFFER {
            rustix::net::sockopt::set_socket_send_buffer_size_force(&self.inner, datagram.len())
                .map_err(failed)?;
        }
        rustix::net::send(&self.inner, &datagram, SendFlags::empty()).map_err(failed)?;
        Ok(first)
    }

    /// Hands every answer to the `count` messages from `first` on to `take`, until that says `true` or there are no
    /// more answers.
    fn receive(
        &mut self,
        first: u32,
        count: usize,
        mut take: impl FnMut(usize, u16, Answer<F::Message>) -> Result<bool>,
    ) -> Result<()> {
        let mut finished = false;
        while !finished {
            let length = match rustix::net::recv(&self.inner, self.buffer.as_mut_slice(), RecvFlags::TRUNC) {
                Ok((_, length)) => length,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(()),
                Err(e) => return Err(Error::Socket { what: "receive", source: e.into() }),
            };
            if length > self.buffer.len() {
                self.buffer.resize(length.next_multiple_of(BUFFER), 0);
                return Err(Error::Protocol(format!(
                    "an answer of {length} bytes did not fit, the next will"
                )));
            }
            let mut rest = &self.buffer[..length];
            while let Some((raw, next)) = split_message(rest) {
                rest = next;
                // An answer to something older, which its asker did not want to wait for.
                let index = raw.sequence.wrapping_sub(first) as usize;
                if index >= count {
                    continue;
                }
                match raw.decode::<F>() {
                    Ok(Some(answer)) => finished |= take(index, raw.flags, answer)?,
                    Ok(None) => {}
                    // Somebody's exotic device must not keep us from seeing our own.
                    Err(error) => tracing::debug!(%error, "skipped a netlink message"),
                }
            }
        }
        Ok(())
    }
}

impl<F: Family> AsFd for Socket<F> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// A request that the kernel refused, or that never got an answer.
#[derive(Debug)]
pub enum Attempt {
    /// The kernel said no.
    Refused(Refusal),
    /// The socket or the protocol failed.
    Failed(Error),
}

impl Attempt {
    /// The error for a person: what was tried, in words that follow "the kernel refused to".
    pub fn during(self, what: impl Into<String>) -> Error {
        match self {
            Self::Refused(source) => Error::Refused { what: what.into(), source },
            Self::Failed(e) => e,
        }
    }
}

impl From<Error> for Attempt {
    fn from(e: Error) -> Self {
        Self::Failed(e)
    }
}

// === private helpers ===

/// What the kernel says to one message.
enum Answer<M> {
    Message(M),
    Status(Result<(), Refusal>),
    Done,
}

/// One message of a datagram, not decoded yet.
pub(crate) struct Raw<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    bytes: &'a [u8],
}

/// Reads a datagram as everything here reads those of the kernel, and says how many of its messages mean something: for
/// tests that make up what no kernel sends.
#[must_use]
pub fn understood(mut bytes: &[u8]) -> usize {
    let mut count = 0;
    while let Some((raw, rest)) = split_message(bytes) {
        bytes = rest;
        count += usize::from(matches!(raw.decode::<Route>(), Ok(Some(_))));
        if let Ok(Some(message)) = raw.message() {
            count += usize::from(crate::rt::means_something(message));
        }
        count += usize::from(matches!(raw.decode::<crate::nft::Netfilter>(), Ok(Some(_))));
    }
    count
}

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// Text of an extended ack (`NLMSGERR_ATTR_MSG`).
const ERROR_TEXT: u16 = 1;

/// Splits the first message off a datagram; `None` at its end, and at garbage.
pub(crate) fn split_message(bytes: &[u8]) -> Option<(Raw<'_>, &[u8])> {
    let header = bytes.first_chunk::<HEADER>()?;
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    let length = word(0) as usize;
    if length < HEADER || length > bytes.len() {
        return None;
    }
    let raw = Raw { kind: half(4), flags: half(6), sequence: word(8), bytes: &bytes[..length] };
    Some((raw, &bytes[length.next_multiple_of(4).min(bytes.len())..]))
}

impl Raw<'_> {
    /// The message of the family, if it is one.
    pub(crate) fn message<M: NetlinkDeserializable + fmt::Debug>(&self) -> Result<Option<M>> {
        let message = NetlinkMessage::<M>::deserialize(self.bytes)
            .map_err(|e| Error::Protocol(format!("message of type {} is not understood: {e}", self.kind)))?;
        Ok(match message.payload {
            NetlinkPayload::InnerMessage(message) => Some(message),
            _ => None,
        })
    }

    fn decode<F: Family>(&self) -> Result<Option<Answer<F::Message>>> {
        Ok(match self.kind {
            NLMSG_NOOP => None,
            NLMSG_OVERRUN => return Err(Error::Protocol("the kernel reports lost data".into())),
            NLMSG_ERROR => Some(Answer::Status(self.status()?)),
            // A dump may fail at its end: then the number behind the header is negative.
            NLMSG_DONE => match self.number().unwrap_or(0) {
                0.. => Some(Answer::Done),
                code => {
                    Some(Answer::Status(Err(Refusal { errno: errno(code), text: self.text(HEADER + 4) })))
                }
            },
            kind if !F::is_decodable(kind, &self.bytes[HEADER..]) => {
                return Err(Error::Protocol(format!(
                    "a message of type {kind} was not asked for, or is garbled"
                )));
            }
            _ => self.message()?.map(Answer::Message),
        })
    }

    fn number(&self) -> Option<i32> {
        self.bytes[HEADER..].first_chunk().map(|bytes| i32::from_ne_bytes(*bytes))
    }

    /// `struct nlmsgerr`: the error, then the message it is about (its header only where capped), then attributes.
    fn status(&self) -> Result<Result<(), Refusal>> {
        let code = self.number().ok_or_else(|| Error::Protocol("an acknowledgement is too short".into()))?;
        if code == 0 {
            return Ok(Ok(()));
        }
        let about = HEADER + 4;
        let quoted = match self.bytes.get(about..).and_then(|rest| rest.first_chunk()) {
            Some(length) if self.flags & NLM_F_CAPPED == 0 => u32::from_ne_bytes(*length) as usize,
            _ => HEADER,
        };
        let text = if self.flags & NLM_F_ACK_TLVS != 0 {
            self.text(about + quoted.next_multiple_of(4))
        } else {
            None
        };
        Ok(Err(Refusal { errno: errno(code), text }))
    }

    /// The text among the attributes from `start` on.
    fn text(&self, start: usize) -> Option<String> {
        let mut rest = self.bytes.get(start..)?;
        while let Some(head) = rest.first_chunk::<4>() {
            let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
            let value = rest.get(4..length)?;
            if u16::from_ne_bytes([head[2], head[3]]) == ERROR_TEXT {
                return Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
            }
            rest = rest.get(length.next_multiple_of(4)..)?;
        }
        None
    }
}

fn errno(code: i32) -> Errno {
    Errno::from_io_error(&io::Error::from_raw_os_error(code.saturating_neg())).unwrap_or(Errno::IO)
}
