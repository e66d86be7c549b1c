//! The forwarder's core: packets and time in, actions out.
#![allow(clippy::unwrap_used)]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use nsm_dns::{
    Config,
    cache::MAX_ENTRIES,
    config::OWN,
    forwarder::{
        Action, BUDGET, ExchangeId, Forwarder, GRACE, MAX_EXCHANGES, MAX_JOBS, MAX_WAITING, Transport,
        UDP_PATIENCE,
    },
};

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn config(servers: &[&str], search: &[&str]) -> Config {
    let texts = |list: &[&str]| list.iter().map(|&s| s.to_owned()).collect::<Vec<_>>();
    Config::read(&texts(servers), &texts(search)).0
}

fn question(id: u16, of: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(of), kind));
    message.to_vec().unwrap()
}

/// The answer to a packet that was sent to a server.
fn answer(to: &[u8], code: ResponseCode, addresses: &[[u8; 4]], ttl: u32) -> Vec<u8> {
    let asked = Message::from_vec(to).unwrap();
    let mut message = Message::response(asked.metadata.id, OpCode::Query);
    message.metadata.response_code = code;
    let query = asked.queries[0].clone();
    for [a, b, c, d] in addresses {
        message.add_answer(Record::from_rdata(query.name().clone(), ttl, RData::A(A::new(*a, *b, *c, *d))));
    }
    message.add_query(query);
    message.to_vec().unwrap()
}

/// A packet to a server.
#[derive(Debug, Clone)]
struct Sent {
    exchange: ExchangeId,
    server: SocketAddr,
    transport: Transport,
    packet: Vec<u8>,
}

impl Sent {
    /// Whom it asks for what.
    fn text(&self) -> String {
        let message = Message::from_vec(&self.packet).unwrap();
        format!("{} {}", self.server.ip(), message.queries[0].name())
    }
}

/// A forwarder with its own time.
struct Bench {
    forwarder: Forwarder<u32>,
    now: Instant,
    id: u16,
    sent: Vec<Sent>,
    replies: Vec<(u32, Message)>,
    forgotten: Vec<ExchangeId>,
}

impl Bench {
    fn new(configs: Vec<Config>) -> Self {
        let mut forwarder = Forwarder::new("127.0.0.1:53".parse().unwrap());
        forwarder.set("nsc-0", configs);
        Self { forwarder, now: Instant::now(), id: 0x1000, sent: vec![], replies: vec![], forgotten: vec![] }
    }

    fn work(
        &mut self,
        work: impl FnOnce(&mut Forwarder<u32>, Instant, &mut dyn FnMut() -> u16) -> Vec<Action<u32>>,
    ) -> usize {
        let id = &mut self.id;
        let actions = work(&mut self.forwarder, self.now, &mut || {
            *id = id.wrapping_add(1);
            *id
        });
        let count = actions.len();
        for action in actions {
            match action {
                Action::Ask { exchange, server, transport, packet } => {
                    self.sent.push(Sent { exchange, server, transport, packet });
                }
                Action::Forget(exchange) => self.forgotten.push(exchange),
                Action::Reply(client, packet) => {
                    self.replies.push((client, Message::from_vec(&packet).unwrap()));
                }
            }
        }
        count
    }

    fn asks(&mut self, client: u32, packet: &[u8]) -> Vec<Sent> {
        let before = self.sent.len();
        self.work(|f, now, random| f.question(now, client, Transport::Udp, packet, random));
        self.sent[before..].to_vec()
    }

    fn hears(&mut self, exchange: ExchangeId, packet: &[u8]) -> Vec<Sent> {
        let before = self.sent.len();
        self.work(|f, now, random| f.answer(now, exchange, packet, random));
        self.sent[before..].to_vec()
    }

    fn passes(&mut self, time: Duration) -> Vec<Sent> {
        let before = self.sent.len();
        self.now += time;
        self.work(|f, now, random| f.tick(now, random));
        self.sent[before..].to_vec()
    }

    fn last_reply(&self) -> &Message {
        &self.replies.last().unwrap().1
    }
}

#[test]
fn golden_bytes() {
    let mut bench = Bench::new(vec![config(&["172.16.1.2"], &[])]);
    let ask = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03WeB\x03lab\x00\x00\x01\x00\x01";
    let sent = bench.asks(7, ask);
    assert_eq!((sent.len(), sent[0].transport), (1, Transport::Udp));
    assert_eq!(sent[0].server, "172.16.1.2:53".parse().unwrap());
    // Our own id, lower case, and an OPT record: 1232 bytes.
    let expected = b"\x10\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01\x03web\x03lab\x00\x00\x01\x00\x01\
        \x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00";
    assert_eq!(sent[0].packet, expected);
    let told = b"\x10\x01\x85\x80\x00\x01\x00\x01\x00\x00\x00\x00\x03web\x03lab\x00\x00\x01\x00\x01\
        \xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\xac\x10\x01\x02";
    let actions = bench.forwarder.answer(bench.now, sent[0].exchange, told, &mut || 0);
    let [Action::Forget(_), Action::Reply(7, reply)] = &actions[..] else { panic!("{actions:?}") };
    let expected = b"\x12\x34\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00\x03WeB\x03lab\x00\x00\x01\x00\x01";
    assert_eq!(reply[..expected.len()], expected[..], "the client's id, and its question letter by letter");
    assert_eq!(reply[reply.len() - 10..], told[told.len() - 10..], "TTL 60, four bytes, the address");
}

#[test]
fn a_name_is_searched_and_the_alias_is_told() {
    let mut bench =
        Bench::new(vec![config(&["10.0.0.1"], &["cluster.local"]), config(&["172.16.1.2"], &["corp"])]);
    let no = |sent: &Sent| answer(&sent.packet, ResponseCode::NXDomain, &[], 0);
    let first = bench.asks(1, &question(9, "web.", RecordType::A));
    assert_eq!(first.len(), 2, "as it is, everywhere");
    assert!(bench.hears(first[0].exchange, &no(&first[0])).is_empty());
    let second = bench.hears(first[1].exchange, &no(&first[1]));
    assert_eq!((second.len(), second[0].text().as_str()), (1, "10.0.0.1 web.cluster.local."));
    let third = bench.hears(second[0].exchange, &no(&second[0]));
    assert_eq!((third.len(), third[0].text().as_str()), (1, "172.16.1.2 web.corp."));
    bench.hears(third[0].exchange, &answer(&third[0].packet, ResponseCode::NoError, &[[172, 16, 1, 9]], 60));
    let reply = bench.last_reply().clone();
    assert_eq!(reply.queries[0].name(), &name("web."));
    let texts: Vec<_> = reply.answers.iter().map(|r| format!("{} {}", r.name, r.data)).collect();
    assert_eq!(texts, ["web. web.corp.", "web.corp. 172.16.1.9"]);
    // Once more, from the cache, older.
    bench.now += Duration::from_secs(20);
    assert!(bench.asks(2, &question(10, "WEB.", RecordType::A)).is_empty());
    assert_eq!(bench.last_reply().answers[1].ttl, 40);
    bench.now += Duration::from_secs(41);
    assert_eq!(bench.asks(3, &question(11, "web.", RecordType::A)).len(), 2, "it has become too old");
}

#[test]
fn the_first_answer_with_records_wins_and_silence_is_not_waited_for() {
    let mut bench = Bench::new(vec![config(&["10.0.0.1", "10.0.0.2", "10.0.0.3"], &[])]);
    let sent = bench.asks(1, &question(1, "web.", RecordType::A));
    assert_eq!(sent.len(), 3);
    // Nothing of that kind, says one; it may be the wrong one.
    bench.hears(sent[0].exchange, &answer(&sent[0].packet, ResponseCode::NoError, &[], 0));
    assert!(bench.replies.is_empty());
    bench.hears(sent[1].exchange, &answer(&sent[1].packet, ResponseCode::NoError, &[[1, 2, 3, 4]], 0));
    assert_eq!(bench.last_reply().answers.len(), 1);
    assert!(bench.forgotten.contains(&sent[2].exchange), "the others are let go");
    assert_eq!(bench.forwarder.load(), (0, 0));
    // A TTL of zero is for one use.
    let sent = bench.asks(2, &question(2, "web.", RecordType::A));
    assert_eq!(sent.len(), 3);
    bench.hears(sent[0].exchange, &answer(&sent[0].packet, ResponseCode::NXDomain, &[], 0));
    bench.passes(GRACE - Duration::from_millis(1));
    assert_eq!(bench.replies.len(), 1);
    bench.passes(Duration::from_millis(1));
    assert_eq!((bench.replies.len(), bench.last_reply().metadata.response_code), (2, ResponseCode::NXDomain));
}

/// Wires know nothing of each other: that one has nothing says little of what the next has.
#[test]
fn what_one_wire_does_not_have_another_may_have_later() {
    for code in [ResponseCode::NoError, ResponseCode::NXDomain] {
        let mut bench = Bench::new(vec![config(&["10.0.0.1"], &[]), config(&["10.0.0.2"], &[])]);
        let sent = bench.asks(1, &question(1, "web.", RecordType::A));
        bench.hears(sent[0].exchange, &answer(&sent[0].packet, code, &[], 0));
        bench.passes(GRACE * 2);
        assert!(bench.replies.is_empty(), "{code}");
        bench.hears(sent[1].exchange, &answer(&sent[1].packet, ResponseCode::NoError, &[[1, 2, 3, 4]], 0));
        assert_eq!(bench.last_reply().answers.len(), 1);
        // Who says nothing at all is not waited for longer than for a datagram.
        let sent = bench.asks(2, &question(2, "web.", RecordType::A));
        bench.hears(sent[0].exchange, &answer(&sent[0].packet, code, &[], 0));
        bench.passes(UDP_PATIENCE);
        assert_eq!((bench.replies.len(), bench.last_reply().metadata.response_code), (2, code));
    }
}

#[test]
fn the_pods_own_servers_are_asked_first_for_what_is_no_wires() {
    let mut bench = Bench::new(vec![config(&["172.16.1.2"], &["corp"])]);
    bench.forwarder.set(OWN, vec![config(&["10.96.0.10"], &["cluster.local"])]);
    let texts = |sent: &[Sent]| sent.iter().map(Sent::text).collect::<Vec<_>>();
    let sent = bench.asks(1, &question(1, "web.example.", RecordType::A));
    assert_eq!(texts(&sent), ["10.96.0.10 web.example."]);
    bench.hears(sent[0].exchange, &answer(&sent[0].packet, ResponseCode::NoError, &[[1, 2, 3, 4]], 0));
    assert_eq!(bench.replies.len(), 1, "no wire has heard of it");
    let sent = bench.asks(2, &question(2, "web.example.", RecordType::A));
    let sent = bench.hears(sent[0].exchange, &answer(&sent[0].packet, ResponseCode::NXDomain, &[], 0));
    assert_eq!(texts(&sent), ["172.16.1.2 web.example."]);
    // The word of who is first asked counts, whatever the others do not know.
    let sent = bench.hears(sent[0].exchange, &answer(&sent[0].packet, ResponseCode::Refused, &[], 0));
    assert_eq!(texts(&sent), ["10.96.0.10 web.example.cluster.local."]);
    let sent = bench.hears(sent[0].exchange, &answer(&sent[0].packet, ResponseCode::NXDomain, &[], 0));
    assert_eq!(texts(&sent), ["172.16.1.2 web.example.corp."]);
    bench.hears(sent[0].exchange, &answer(&sent[0].packet, ResponseCode::NXDomain, &[], 0));
    assert_eq!(bench.last_reply().metadata.response_code, ResponseCode::NXDomain);
    let sent = bench.asks(3, &question(3, "web.corp.", RecordType::A));
    assert_eq!(texts(&sent), ["172.16.1.2 web.corp."]);
    let sent = bench.hears(sent[0].exchange, &answer(&sent[0].packet, ResponseCode::NXDomain, &[], 0));
    assert_eq!(texts(&sent), ["10.96.0.10 web.corp."]);
}

#[test]
fn who_is_silent_by_udp_is_asked_by_tcp_and_who_is_silent_at_all_is_given_up() {
    let mut bench = Bench::new(vec![config(&["10.0.0.1"], &["corp"])]);
    let sent = bench.asks(1, &question(1, "web.", RecordType::A));
    let again = bench.passes(UDP_PATIENCE);
    assert_eq!((again.len(), again[0].transport, again[0].server), (1, Transport::Tcp, sent[0].server));
    assert_ne!(again[0].packet[..2], sent[0].packet[..2], "another id");
    let next = bench.passes(BUDGET / 2 - UDP_PATIENCE);
    assert_eq!(next[0].text(), "10.0.0.1 web.corp.", "a silent server leaves time for the search domains");
    bench.passes(BUDGET);
    assert_eq!(bench.last_reply().metadata.response_code, ResponseCode::ServFail);
    assert_eq!(bench.forwarder.load(), (0, 0));
    assert_eq!(bench.forwarder.deadline(), None);
}

#[test]
fn what_does_not_fit_goes_by_tcp_on_both_sides() {
    let mut bench = Bench::new(vec![config(&["10.0.0.1"], &[])]);
    let sent = bench.asks(1, &question(1, "web.", RecordType::A));
    let mut short = Message::from_vec(&answer(&sent[0].packet, ResponseCode::NoError, &[], 0)).unwrap();
    short.metadata.truncation = true;
    let again = bench.hears(sent[0].exchange, &short.to_vec().unwrap());
    assert_eq!((again.len(), again[0].transport), (1, Transport::Tcp));
    let many: Vec<_> = (0..100).map(|i| [10, 0, 0, i]).collect();
    bench.hears(again[0].exchange, &answer(&again[0].packet, ResponseCode::NoError, &many, 60));
    assert!(bench.last_reply().metadata.truncation && bench.last_reply().answers.is_empty());
    // The client asks again by TCP, or has said that it takes more.
    let packet = question(2, "web.", RecordType::A);
    bench.work(|f, now, random| f.question(now, 2, Transport::Tcp, &packet, random));
    assert_eq!(bench.last_reply().answers.len(), 100);
    let mut more = Message::from_vec(&packet).unwrap();
    let mut edns = Edns::new();
    edns.set_max_payload(65_535);
    more.set_edns(edns);
    bench.asks(3, &more.to_vec().unwrap());
    assert_eq!(bench.last_reply().answers.len(), 100);
    assert!(bench.last_reply().edns.is_some());
}

#[test]
fn what_nobody_asked_for_is_ignored() {
    let mut bench = Bench::new(vec![config(&["10.0.0.1"], &[])]);
    let sent = bench.asks(1, &question(1, "web.", RecordType::A)).remove(0);
    let good = answer(&sent.packet, ResponseCode::NoError, &[[6, 6, 6, 6]], 60);
    let changed = |change: &dyn Fn(&mut Message)| {
        let mut message = Message::from_vec(&good).unwrap();
        change(&mut message);
        message.to_vec().unwrap()
    };
    for (what, packet) in [
        ("another id", changed(&|m| m.metadata.id ^= 1)),
        ("another name", changed(&|m| m.queries[0] = Query::query(name("evil."), RecordType::A))),
        ("another kind", changed(&|m| m.queries[0] = Query::query(name("web."), RecordType::AAAA))),
        ("no question", changed(&|m| m.queries.clear())),
        ("two questions", changed(&|m| m.queries.push(m.queries[0].clone()))),
        ("a question", changed(&|m| m.metadata.message_type = MessageType::Query)),
        ("another operation", changed(&|m| m.metadata.op_code = OpCode::Status)),
        ("half of it", good[..good.len() / 2].to_vec()),
        ("nothing", vec![]),
    ] {
        let did = bench.work(|f, now, random| f.answer(now, sent.exchange, &packet, random));
        assert_eq!(did, 0, "{what}");
    }
    assert!(bench.replies.is_empty());
    bench.hears(sent.exchange, &good);
    assert_eq!(bench.last_reply().answers.len(), 1, "the true one still counts");
    let did = bench.work(|f, now, random| f.answer(now, sent.exchange, &good, random));
    assert_eq!(did, 0, "once");
}

#[test]
fn bad_questions_are_refused_in_the_right_words() {
    let mut bench = Bench::new(vec![config(&["10.0.0.1"], &[])]);
    let good = question(0x1234, "web.", RecordType::A);
    let with = |at: usize, byte: u8| {
        let mut packet = good.clone();
        packet[at] = byte;
        packet
    };
    let looped = [&good[..12], b"\xc0\x0c\x00\x01\x00\x01"].concat();
    let forward = [&good[..12], b"\xc0\x20\x00\x01\x00\x01"].concat();
    let mut huge = good.clone();
    huge.resize(5000, 0);
    for (what, packet, code) in [
        ("no question", with(5, 0), ResponseCode::FormErr),
        ("two questions", with(5, 2), ResponseCode::FormErr),
        ("65281 questions", with(4, 255), ResponseCode::FormErr),
        ("65280 answers", with(6, 255), ResponseCode::FormErr),
        ("an update", with(2, 5 << 3), ResponseCode::NotImp),
        ("a name that points to itself", looped, ResponseCode::FormErr),
        ("a name that points beyond", forward, ResponseCode::FormErr),
        ("half a question", good[..14].to_vec(), ResponseCode::FormErr),
        ("too long", huge, ResponseCode::FormErr),
        ("a transfer", question(0x1234, "web.", RecordType::AXFR), ResponseCode::NotImp),
        ("chaos", with(good.len() - 1, 3), ResponseCode::NotImp),
    ] {
        assert!(bench.asks(1, &packet).is_empty(), "{what}");
        let reply = bench.replies.pop().unwrap_or_else(|| panic!("{what}: silence")).1;
        assert_eq!((reply.metadata.response_code, reply.metadata.id), (code, 0x1234), "{what}");
        assert_eq!(reply.metadata.message_type, MessageType::Response);
    }
    for (what, packet) in
        [("a header's part", good[..11].to_vec()), ("an answer", with(2, 0x81)), ("nothing", vec![])]
    {
        bench.asks(1, &packet);
        assert!(bench.replies.is_empty() && bench.sent.is_empty(), "{what}");
    }
}

#[test]
fn work_is_bounded() {
    let servers: Vec<_> = (1..9).map(|i| format!("10.0.0.{i}")).collect();
    let servers: Vec<_> = servers.iter().map(String::as_str).collect();
    let mut bench = Bench::new(vec![config(&servers, &[])]);
    // The same question from many: one job.
    for client in 0..1000 {
        bench.asks(client, &question(1, "same.", RecordType::A));
    }
    assert_eq!(bench.forwarder.load(), (1, 8));
    assert_eq!(bench.replies.len(), 1000 - MAX_WAITING, "whoever comes late is told so");
    // Many questions.
    for i in 0..2000 {
        bench.asks(i, &question(1, &format!("n{i}."), RecordType::A));
        let (jobs, exchanges) = bench.forwarder.load();
        assert!(jobs <= MAX_JOBS && exchanges <= MAX_EXCHANGES);
    }
    bench.passes(BUDGET);
    assert_eq!(bench.forwarder.load(), (0, 0), "all of them end");
    assert_eq!(bench.replies.len(), 3000, "everybody was answered");
    // The cache too.
    for i in 0..(MAX_ENTRIES + 500) {
        bench.now += Duration::from_millis(1);
        let sent = bench.asks(1, &question(1, &format!("c{i}."), RecordType::A)).remove(0);
        bench.hears(sent.exchange, &answer(&sent.packet, ResponseCode::NoError, &[[1, 1, 1, 1]], 60));
    }
    assert!(bench.asks(1, &question(1, &format!("c{}.", MAX_ENTRIES + 499), RecordType::A)).is_empty());
    assert!(!bench.asks(1, &question(1, "c0.", RecordType::A)).is_empty(), "the oldest made room");
}

#[test]
fn it_does_not_ask_itself_and_without_servers_says_so() {
    let mut bench = Bench::new(vec![config(&["127.0.0.1"], &["corp"])]);
    assert!(bench.asks(1, &question(1, "web.", RecordType::A)).is_empty());
    assert_eq!(bench.last_reply().metadata.response_code, ResponseCode::ServFail);
}

#[test]
fn a_change_of_servers_empties_the_cache() {
    let mut bench = Bench::new(vec![config(&["10.0.0.1"], &[])]);
    let sent = bench.asks(1, &question(1, "web.", RecordType::A)).remove(0);
    bench.hears(sent.exchange, &answer(&sent.packet, ResponseCode::NoError, &[[1, 1, 1, 1]], 60));
    bench.forwarder.set("nsc-0", vec![config(&["10.0.0.1"], &[])]);
    assert!(bench.asks(1, &question(1, "web.", RecordType::A)).is_empty(), "the same is no change");
    bench.forwarder.set("nsc-1", vec![config(&["10.0.0.2"], &[])]);
    assert_eq!(bench.asks(1, &question(1, "web.", RecordType::A)).len(), 2);
}

proptest::proptest! {
    #[test]
    fn no_packet_panics_and_every_question_ends(
        packets in proptest::collection::vec(
            (
                proptest::bool::ANY,
                proptest::collection::vec(proptest::num::u8::ANY, 0..80),
                0usize..60,
                0u64..900,
            ),
            1..40,
        ),
    ) {
        let mut bench = Bench::new(vec![config(&["10.0.0.1", "10.0.0.2"], &["corp", "example.org"])]);
        let valid = question(1, "web.example.", RecordType::A);
        for (from_server, garbage, at, millis) in packets {
            // Garbage by itself, and written into something valid.
            let spoil = |good: &[u8]| {
                let mut packet = good.to_vec();
                for (i, byte) in garbage.iter().enumerate().take(8) {
                    let place = (at + i * 3) % packet.len();
                    packet[place] ^= byte;
                }
                packet
            };
            if let Some(sent) = bench.sent.last().cloned().filter(|_| from_server) {
                bench.hears(sent.exchange, &garbage);
                let good = answer(&sent.packet, ResponseCode::NoError, &[[1, 2, 3, 4]], 5);
                bench.hears(sent.exchange, &spoil(&good));
            } else {
                bench.asks(1, &garbage);
                bench.asks(2, &spoil(&valid));
            }
            bench.passes(Duration::from_millis(millis));
        }
        bench.passes(BUDGET);
        bench.passes(BUDGET);
        proptest::prop_assert_eq!(bench.forwarder.load(), (0, 0));
    }
}
