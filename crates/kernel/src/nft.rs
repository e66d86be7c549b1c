//! nftables over netlink: tables as data, compared with the kernel's and replaced in one transaction.
//!
//! A [`Table`] is pure and prints in the language of the `nft` program. [`apply`] reads back what the kernel holds and
//! writes only the chains that differ, all of them or none: packets never meet half a table, and an equal table is not
//! touched. The kernel gives a rule back in the very words in which it was told, so rules are compared as they are on
//! the wire.
//!
//! ```
//! use nsm_kernel::nft::{Base, Chain, Family, Hook, Policy, Rule, Table, Term, Verdict};
//!
//! let web = Rule::new([Term::Protocol(6), Term::DestinationPort(80..=80)], Verdict::Accept).comment("web");
//! let forward = Chain::base("forward", Base { hook: Hook::Forward, priority: 0, policy: Policy::Drop }, vec![web]);
//! let table = Table { family: Family::Inet, name: "example".into(), chains: vec![forward] };
//! assert!(table.to_string().contains(r#"meta l4proto 6 th dport 80 accept comment "web""#));
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use netlink_packet_core::{
    DefaultNla, NLA_HEADER_SIZE, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NlaBuffer, NlasIterator,
};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions,
    Hook as HookAttribute, HookNumber, Immediate, ListAttribute, Meta, MetaKey, NfTablesMessage, Operator,
    Payload, Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage, Verdict as VerdictCode,
    VerdictAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::netlink::{self, Request, Socket};

/// nftables and the rest of netfilter.
#[derive(Debug, Clone, Copy)]
pub enum Netfilter {}

/// A table: what belongs together, and is replaced or removed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Where its packets come from.
    pub family: Family,
    /// Its name, unique in its family and namespace.
    pub name: String,
    /// Its chains; their names are unique.
    pub chains: Vec<Chain>,
}

/// Where the packets of a table come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// Frames that pass a bridge.
    Bridge,
}

/// A list of rules, the first that decides wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Where packets enter it; `None`: only where a rule leads to it.
    pub base: Option<Base>,
    /// Its rules in order.
    pub rules: Vec<Rule>,
}

/// Where packets enter a chain, and what happens to those that no rule decides about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    /// On their way through the kernel.
    pub hook: Hook,
    /// Order among the chains of that place, lowest first; connections are tracked at -200.
    pub priority: i32,
    /// What happens at the end.
    pub policy: Policy,
}

/// Places on a packet's way (`NF_INET_…`, `NF_BR_…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the kernel's own words")]
pub enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// What happens to what no rule decides about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the kernel's own words")]
pub enum Policy {
    Drop = 0,
    Accept = 1,
}

/// What has to hold, what is done on the way, and what happens then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// From left to right; the first that does not hold ends the rule.
    pub terms: Vec<Term>,
    /// What happens to a packet for which all held.
    pub verdict: Verdict,
    /// For people; at most [`MAX_COMMENT`] bytes of it are kept.
    pub comment: String,
}

/// Something that must hold for a packet, or is done to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Term {
    /// It came in by this interface.
    InIf(String),
    /// It goes out by this interface.
    OutIf(String),
    /// The frame's type, as it stands behind the addresses: of a tagged frame it is the tag's.
    EtherType(u16),
    /// IP version 4 or 6.
    Version(Version),
    /// The protocol in IP; for IPv6 that behind the extension headers.
    Protocol(u8),
    /// Source address; also matches the IP version.
    Source(IpNet),
    /// Destination address; also matches the IP version.
    Destination(IpNet),
    /// Source port; the protocol has to be matched before.
    SourcePort(RangeInclusive<u16>),
    /// Destination port; the protocol has to be matched before.
    DestinationPort(RangeInclusive<u16>),
    /// Type of an ICMP message; the protocol has to be matched before.
    IcmpType(Version, RangeInclusive<u8>),
    /// Code of an ICMP message; the protocol has to be matched before.
    IcmpCode(Version, RangeInclusive<u8>),
    /// The TCP flags under `mask` are `value`; the protocol has to be matched before.
    TcpFlags {
        /// The flags that count.
        mask: u8,
        /// What they have to be.
        value: u8,
    },
    /// Hop limit of IPv6; the version has to be matched before.
    HopLimit(u8),
    /// The packet's mark.
    Mark(u32),
    /// The mark of the connection that it belongs to.
    CtMark(u32),
    /// One of these states, see [`ct`].
    CtState(u32),
    /// Gives the packet a mark.
    SetMark(u32),
    /// Gives the connection that it belongs to a mark.
    SetCtMark(u32),
    /// Tracks its connection among those of this zone only.
    SetCtZone(u16),
    /// Counts it.
    Count,
}

/// An IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "they are their names")]
pub enum Version {
    V4,
    V6,
}

/// What happens to a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It passes this hook's chain.
    Accept,
    /// It is gone.
    Drop,
    /// The rules of that chain decide, then those behind this one.
    Jump(String),
    /// The rules behind this one decide.
    Continue,
}

/// States of a connection, to be or'ed (`linux/netfilter/nf_conntrack_common.h`).
pub mod ct {
    /// No packet that belongs anywhere.
    pub const INVALID: u32 = 1;
    /// Seen in both directions.
    pub const ESTABLISHED: u32 = 1 << 1;
    /// About, or expected by, an established one.
    pub const RELATED: u32 = 1 << 2;
    /// The first in its direction.
    pub const NEW: u32 = 1 << 3;
}

/// One thing that has to change so that the kernel is as wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// There is no such table.
    Create(Table),
    /// Its chains are others.
    Replace(Table),
    /// The rules of one chain are others.
    Rewrite(Family, String, Chain),
    /// The table goes.
    Remove(Family, String),
}

/// Bytes of a comment that the kernel keeps for `nft` to show.
pub const MAX_COMMENT: usize = 127;

// === impl Table, Chain, Rule ===

impl Chain {
    /// A chain where packets enter.
    pub fn base(name: impl Into<String>, base: Base, rules: Vec<Rule>) -> Self {
        Self { name: name.into(), base: Some(base), rules }
    }

    /// A chain to which rules lead.
    pub fn new(name: impl Into<String>, rules: Vec<Rule>) -> Self {
        Self { name: name.into(), base: None, rules }
    }
}

impl Rule {
    /// A rule without a comment.
    pub fn new(terms: impl IntoIterator<Item = Term>, verdict: Verdict) -> Self {
        Self { terms: terms.into_iter().collect(), verdict, comment: String::new() }
    }

    /// Says what it is for.
    #[must_use]
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = comment.into();
        self
    }

    /// The comment as `nft` can show it: cut at a character, without quotes and control characters.
    fn kept_comment(&self) -> String {
        let mut kept = String::new();
        for c in self.comment.chars() {
            let c = if c == '"' {
                '\''
            } else if c.is_control() {
                ' '
            } else {
                c
            };
            if kept.len() + c.len_utf8() > MAX_COMMENT {
                break;
            }
            kept.push(c);
        }
        kept
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {} {} {{", self.family, self.name)?;
        // Chains are declared before anything leads to them, as `nft -f` wants them.
        for chain in self.chains.iter().filter(|chain| chain.base.is_none()) {
            write!(f, "{chain}")?;
        }
        for chain in self.chains.iter().filter(|chain| chain.base.is_some()) {
            write!(f, "{chain}")?;
        }
        f.write_str("}\n")
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
        })
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\tchain {} {{", self.name)?;
        if let Some(Base { hook, priority, policy }) = self.base {
            let hook = format!("{hook:?}").to_lowercase();
            let policy = format!("{policy:?}").to_lowercase();
            writeln!(f, "\t\ttype filter hook {hook} priority {priority}; policy {policy};")?;
        }
        self.rules.iter().try_for_each(|rule| writeln!(f, "\t\t{rule}"))?;
        writeln!(f, "\t}}")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words: Vec<String> = self.terms.iter().map(Term::to_string).collect();
        match &self.verdict {
            Verdict::Accept => words.push("accept".into()),
            Verdict::Drop => words.push("drop".into()),
            Verdict::Jump(chain) => words.push(format!("jump {chain}")),
            Verdict::Continue => {}
        }
        let comment = self.kept_comment();
        if !comment.is_empty() {
            words.push(format!("comment \"{comment}\""));
        }
        f.write_str(&words.join(" "))
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InIf(name) => write!(f, "iifname \"{name}\""),
            Self::OutIf(name) => write!(f, "oifname \"{name}\""),
            Self::EtherType(kind) => write!(f, "ether type {kind:#06x}"),
            Self::Version(version) => write!(f, "meta nfproto {version}"),
            Self::Protocol(number) => write!(f, "meta l4proto {number}"),
            Self::Source(net) | Self::Destination(net) if net.prefix_len() == 0 => {
                write!(f, "meta nfproto {}", Version::of(net))
            }
            Self::Source(net) => write!(f, "{} saddr {net}", ip(net)),
            Self::Destination(net) => write!(f, "{} daddr {net}", ip(net)),
            Self::SourcePort(ports) => write!(f, "th sport {}", range(ports)),
            Self::DestinationPort(ports) => write!(f, "th dport {}", range(ports)),
            Self::IcmpType(version, types) => write!(f, "{} type {}", icmp(*version), range(types)),
            Self::IcmpCode(version, codes) => write!(f, "{} code {}", icmp(*version), range(codes)),
            Self::TcpFlags { mask, value } => write!(f, "tcp flags & {mask:#x} == {value:#x}"),
            Self::HopLimit(limit) => write!(f, "ip6 hoplimit {limit}"),
            Self::Mark(mark) => write!(f, "meta mark {mark:#x}"),
            Self::CtMark(mark) => write!(f, "ct mark {mark:#x}"),
            Self::CtState(states) => {
                let names = [
                    (ct::INVALID, "invalid"),
                    (ct::ESTABLISHED, "established"),
                    (ct::RELATED, "related"),
                    (ct::NEW, "new"),
                ];
                let names = names.into_iter().filter(|(bit, _)| states & bit != 0).map(|(_, name)| name);
                write!(f, "ct state {}", names.collect::<Vec<_>>().join(","))
            }
            Self::SetMark(mark) => write!(f, "meta mark set {mark:#x}"),
            Self::SetCtMark(mark) => write!(f, "ct mark set {mark:#x}"),
            Self::SetCtZone(zone) => write!(f, "ct zone set {zone}"),
            Self::Count => f.write_str("counter"),
        }
    }
}

impl Version {
    /// The version of a prefix.
    pub fn of(net: &IpNet) -> Self {
        if net.addr().is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        })
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create(table) => write!(f, "create {table}"),
            Self::Replace(table) => write!(f, "replace {table}"),
            Self::Rewrite(family, table, chain) => write!(f, "rewrite in table {family} {table} {chain}"),
            Self::Remove(family, table) => write!(f, "remove table {family} {table}"),
        }
    }
}

impl netlink::Family for Netfilter {
    const PROTOCOL: isize = protocols::NETLINK_NETFILTER;
    type Message = NetfilterMessage;

    /// Tables, chains and rules are what is asked for. Data in a rule's expression is an attribute in an attribute,
    /// whose length the library does not look at.
    fn is_decodable(kind: u16, body: &[u8]) -> bool {
        match kind {
            NEW_TABLE | NEW_CHAIN => true,
            NEW_RULE => attributes(body.get(NFGENMSG..).unwrap_or_default())
                .filter(|(kind, _)| *kind == NFTA_RULE_EXPRESSIONS)
                .flat_map(|(_, list)| attributes(list))
                .all(|(_, expression)| is_sound(expression)),
            _ => false,
        }
    }
}

// === what is asked of the kernel ===

/// What has to change so that these tables are in the socket's namespace as they are here. Others do not count.
pub fn plan(socket: &mut Socket<Netfilter>, wanted: &[Table]) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    for table in wanted {
        let Some(seen) = look(socket, table.family, &table.name)? else {
            changes.push(Change::Create(table.clone()));
            continue;
        };
        let shape = |chain: &Chain| (chain.name.clone(), chain.base.map(BaseWords::of));
        if table.chains.iter().map(shape).collect::<BTreeMap<_, _>>()
            != seen.iter().map(|(name, chain)| (name.clone(), chain.base.clone())).collect()
        {
            changes.push(Change::Replace(table.clone()));
            continue;
        }
        for chain in &table.chains {
            let words: Vec<_> = chain.rules.iter().map(RuleWords::of).collect();
            if seen.get(&chain.name).is_some_and(|seen| seen.rules != words) {
                changes.push(Change::Rewrite(table.family, table.name.clone(), chain.clone()));
            }
        }
    }
    Ok(changes)
}

/// Makes all changes, or none.
pub fn commit(socket: &mut Socket<Netfilter>, changes: &[Change]) -> Result<()> {
    let mut batch = Batch::default();
    changes.iter().for_each(|change| batch.change(change));
    batch.send(socket)
}

/// Makes the tables of the socket's namespace as these; what was changed to get there.
pub fn apply(socket: &mut Socket<Netfilter>, wanted: &[Table]) -> Result<Vec<Change>> {
    let changes = plan(socket, wanted)?;
    if !changes.is_empty() {
        commit(socket, &changes)?;
    }
    Ok(changes)
}

/// Removes a table. That there is none is no error: the answer is `false`.
pub fn remove(socket: &mut Socket<Netfilter>, family: Family, name: &str) -> Result<bool> {
    match commit(socket, &[Change::Remove(family, name.into())]) {
        Ok(()) => Ok(true),
        Err(e) if e.errno() == Some(Errno::NOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// A chain as the kernel holds it.
#[derive(Debug, Default)]
struct Seen {
    base: Option<BaseWords>,
    rules: Vec<RuleWords>,
}

/// A base chain in the kernel's words.
#[derive(Debug, Clone, PartialEq, Eq)]
struct BaseWords {
    hook: u32,
    priority: i32,
    policy: u32,
}

/// A rule in the kernel's words.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RuleWords {
    expressions: Vec<ListAttribute<ExpressionAttribute>>,
    comment: Vec<u8>,
}

impl BaseWords {
    fn of(base: Base) -> Self {
        Self { hook: base.hook as u32, priority: base.priority, policy: base.policy as u32 }
    }
}

impl RuleWords {
    fn of(rule: &Rule) -> Self {
        let mut expressions = Vec::new();
        rule.terms.iter().for_each(|term| encode(term, &mut expressions));
        match &rule.verdict {
            Verdict::Accept => expressions.push(verdict(VerdictCode::Other(NF_ACCEPT), None)),
            Verdict::Drop => expressions.push(verdict(VerdictCode::Other(NF_DROP), None)),
            Verdict::Jump(chain) => expressions.push(verdict(VerdictCode::Jump, Some(chain))),
            Verdict::Continue => {}
        }
        let mut comment = rule.kept_comment().into_bytes();
        if !comment.is_empty() {
            comment.push(0);
            // Type (NFTNL_UDATA_RULE_COMMENT), length, value, as `nft` writes and reads it.
            comment.splice(0..0, [0, comment.len() as u8]);
        }
        Self { expressions: expressions.into_iter().map(Into::into).collect(), comment }
    }
}

fn look(
    socket: &mut Socket<Netfilter>,
    family: Family,
    name: &str,
) -> Result<Option<BTreeMap<String, Seen>>> {
    let mut ask = |message| {
        let question = NetfilterMessage::new(header(family), message);
        socket.dump(question).map_err(|e| e.during("list nftables; is the kernel module nf_tables there?"))
    };
    let tables = ask(NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() }))?;
    let ours = |message: &NetfilterMessage| match &message.inner {
        NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(table)) => {
            table.attributes.iter().any(|a| matches!(a, TableAttribute::Name(found) if found == name))
        }
        _ => false,
    };
    if !tables.iter().any(ours) {
        return Ok(None);
    }
    let mut seen: BTreeMap<String, Seen> = BTreeMap::new();
    for message in ask(NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() }))? {
        let NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)) = message.inner else {
            continue;
        };
        let (mut table, mut found, mut policy) = (String::new(), String::new(), 0);
        let mut hook: Option<(u32, i32)> = None;
        for attribute in chain.attributes {
            match attribute {
                ChainAttribute::Table(name) => table = name,
                ChainAttribute::Name(name) => found = name,
                ChainAttribute::Policy(number) => policy = number,
                ChainAttribute::Hook(parts) => {
                    let hook = hook.get_or_insert_default();
                    for part in parts {
                        match part {
                            HookAttribute::Number(number) => hook.0 = number.into(),
                            HookAttribute::Priority(priority) => hook.1 = priority.cast_signed(),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if table == name {
            let base = hook.map(|(hook, priority)| BaseWords { hook, priority, policy });
            seen.insert(found, Seen { base, rules: Vec::new() });
        }
    }
    let filter = RuleMessage { attributes: vec![RuleAttribute::Table(name.into())] };
    for message in ask(NfTablesMessage::GetRule(filter))? {
        let NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)) = message.inner else { continue };
        let (mut table, mut chain) = (String::new(), String::new());
        let mut words = RuleWords { expressions: Vec::new(), comment: Vec::new() };
        for attribute in rule.attributes {
            match attribute {
                RuleAttribute::Table(name) => table = name,
                RuleAttribute::Chain(name) => chain = name,
                RuleAttribute::Expressions(expressions) => words.expressions = expressions,
                RuleAttribute::UserData(data) => words.comment = data,
                _ => {}
            }
        }
        words.expressions.iter_mut().for_each(forget_counts);
        if table == name
            && let Some(seen) = seen.get_mut(&chain)
        {
            seen.rules.push(words);
        }
    }
    Ok(Some(seen))
}

/// A transaction (`NFNL_MSG_BATCH_BEGIN` … `END`), with what each message is about.
#[derive(Debug, Default)]
struct Batch {
    messages: Vec<(Family, NfTablesMessage, u16, String)>,
}

impl Batch {
    fn change(&mut self, change: &Change) {
        match change {
            Change::Create(table) => self.create(table),
            Change::Replace(table) => {
                self.remove(table.family, &table.name);
                self.create(table);
            }
            Change::Rewrite(family, table, chain) => {
                let about = format!("empty chain {} of table {family} {table}", chain.name);
                let attributes =
                    vec![RuleAttribute::Table(table.clone()), RuleAttribute::Chain(chain.name.clone())];
                let message = NfTablesMessage::DeleteRule(RuleMessage { attributes });
                self.messages.push((*family, message, 0, about));
                self.rules(*family, table, chain);
            }
            Change::Remove(family, table) => self.remove(*family, table),
        }
    }

    fn remove(&mut self, family: Family, name: &str) {
        let attributes = vec![TableAttribute::Name(name.into())];
        let message = NfTablesMessage::DeleteTable(TableMessage { attributes });
        self.messages.push((family, message, 0, format!("remove table {family} {name}")));
    }

    fn create(&mut self, table: &Table) {
        let (family, name) = (table.family, &table.name);
        let attributes = vec![TableAttribute::Name(name.clone())];
        let message = NfTablesMessage::NewTable(TableMessage { attributes });
        self.messages.push((family, message, NLM_F_CREATE, format!("make table {family} {name}")));
        for chain in &table.chains {
            let mut attributes =
                vec![ChainAttribute::Table(name.clone()), ChainAttribute::Name(chain.name.clone())];
            if let Some(base) = chain.base.map(BaseWords::of) {
                attributes.push(ChainAttribute::Hook(vec![
                    HookAttribute::Number(HookNumber::Other(base.hook)),
                    HookAttribute::Priority(base.priority.cast_unsigned()),
                ]));
                attributes.push(ChainAttribute::Policy(base.policy));
                attributes.push(ChainAttribute::Type("filter".into()));
            }
            let message = NfTablesMessage::NewChain(ChainMessage { attributes });
            let about = format!("make chain {} of table {family} {name}", chain.name);
            self.messages.push((family, message, NLM_F_CREATE, about));
        }
        for chain in &table.chains {
            self.rules(family, name, chain);
        }
    }

    fn rules(&mut self, family: Family, table: &str, chain: &Chain) {
        for rule in &chain.rules {
            let words = RuleWords::of(rule);
            let mut attributes = vec![
                RuleAttribute::Table(table.into()),
                RuleAttribute::Chain(chain.name.clone()),
                RuleAttribute::Expressions(words.expressions),
            ];
            if !words.comment.is_empty() {
                attributes.push(RuleAttribute::UserData(words.comment));
            }
            let message = NfTablesMessage::NewRule(RuleMessage { attributes });
            let about =
                format!("take the rule \"{rule}\" into chain {} of table {family} {table}", chain.name);
            self.messages.push((family, message, NLM_F_CREATE | NLM_F_APPEND, about));
        }
    }

    fn send(self, socket: &mut Socket<Netfilter>) -> Result<()> {
        let frame = |message| {
            let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFNL_SUBSYS_NFTABLES);
            Request::new(NetfilterMessage::new(header, message))
        };
        let awaited = self.messages.len();
        let mut requests = vec![frame(ControlMessage::BatchBegin)];
        let mut about = Vec::with_capacity(awaited);
        for (family, message, flags, text) in self.messages {
            requests.push(Request::with(NetfilterMessage::new(header(family), message), flags));
            about.push(text);
        }
        // Kernels differ in whether they acknowledge the end of a batch; the last real message they all do.
        if let Some(last) = requests.last_mut() {
            last.flags |= NLM_F_ACK;
        }
        requests.push(frame(ControlMessage::BatchEnd));
        match socket.transact(requests, awaited)?.into_iter().next() {
            None => Ok(()),
            Some(at) => {
                let what = at.index.checked_sub(1).and_then(|index| about.get(index).cloned());
                let what =
                    what.unwrap_or_else(|| "change nftables; is the kernel module nf_tables there?".into());
                Err(Error::Refused { what, source: at.refusal })
            }
        }
    }
}

// === the kernel's words ===
//
// Attributes stand in the order in which the kernel lists them.

/// `NFNL_SUBSYS_NFTABLES`.
const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// `enum nf_tables_msg_types`, as message types of netlink.
const NEW_TABLE: u16 = NFNL_SUBSYS_NFTABLES << 8;
const NEW_CHAIN: u16 = NEW_TABLE + 3;
const NEW_RULE: u16 = NEW_TABLE + 6;
/// The length of `struct nfgenmsg`, which is before the attributes.
const NFGENMSG: usize = 4;
/// `enum nft_rule_attributes`.
const NFTA_RULE_EXPRESSIONS: u16 = 4;
/// `enum nft_expr_attributes`.
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
/// `IFNAMSIZ`: interface names are compared with all their padding, or `eth1` would match `eth10`.
const IFNAMSIZ: usize = 16;
/// Where a payload's offset counts from (`enum nft_payload_bases`).
const LINK_HEADER: u32 = 0;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// `enum nft_ct_keys`.
const NFT_CT_STATE: u32 = 0;
const NFT_CT_MARK: u32 = 3;
const NFT_CT_ZONE: u32 = 17;
/// `enum nft_ct_attributes`.
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFTA_CT_SREG: u16 = 4;

/// The one register that values pass through.
const REGISTER: Register = Register::Reg1;

fn encode(term: &Term, out: &mut Vec<Expressions>) {
    match term {
        Term::InIf(name) => meta_is(MetaKey::Iifname, &padded(name), out),
        Term::OutIf(name) => meta_is(MetaKey::Oifname, &padded(name), out),
        Term::Version(Version::V4) => meta_is(MetaKey::Nfproto, &[NFPROTO_IPV4], out),
        Term::Version(Version::V6) => meta_is(MetaKey::Nfproto, &[NFPROTO_IPV6], out),
        Term::Protocol(number) => meta_is(MetaKey::L4Proto, &[*number], out),
        Term::Mark(mark) => meta_is(MetaKey::Mark, &mark.to_ne_bytes(), out),
        Term::EtherType(kind) => {
            out.push(payload(LINK_HEADER, 12, 2));
            out.push(compare(Operator::Equal, &kind.to_be_bytes()));
        }
        Term::Source(net) => address_in(net, 12, 8, out),
        Term::Destination(net) => address_in(net, 16, 24, out),
        Term::SourcePort(ports) => {
            out.push(payload(TRANSPORT_HEADER, 0, 2));
            in_range(ports.start().to_be_bytes(), ports.end().to_be_bytes(), out);
        }
        Term::DestinationPort(ports) => {
            out.push(payload(TRANSPORT_HEADER, 2, 2));
            in_range(ports.start().to_be_bytes(), ports.end().to_be_bytes(), out);
        }
        Term::IcmpType(_, types) => {
            out.push(payload(TRANSPORT_HEADER, 0, 1));
            in_range([*types.start()], [*types.end()], out);
        }
        Term::IcmpCode(_, codes) => {
            out.push(payload(TRANSPORT_HEADER, 1, 1));
            in_range([*codes.start()], [*codes.end()], out);
        }
        Term::TcpFlags { mask, value } => {
            out.push(payload(TRANSPORT_HEADER, 13, 1));
            out.push(masked(&[*mask]));
            out.push(compare(Operator::Equal, &[*value]));
        }
        Term::HopLimit(limit) => {
            out.push(payload(NETWORK_HEADER, 7, 1));
            out.push(compare(Operator::Equal, &[*limit]));
        }
        Term::CtMark(mark) => {
            out.push(ct_get(NFT_CT_MARK));
            out.push(compare(Operator::Equal, &mark.to_ne_bytes()));
        }
        Term::CtState(states) => {
            out.push(ct_get(NFT_CT_STATE));
            out.push(masked(&states.to_ne_bytes()));
            out.push(compare(Operator::NotEqual, &[0; 4]));
        }
        Term::SetMark(mark) => {
            out.push(value(&mark.to_ne_bytes()));
            out.push(Expressions::Meta(vec![Meta::Key(MetaKey::Mark), Meta::SourceRegister(REGISTER)]));
        }
        Term::SetCtMark(mark) => {
            out.push(value(&mark.to_ne_bytes()));
            out.push(ct_set(NFT_CT_MARK));
        }
        Term::SetCtZone(zone) => {
            out.push(value(&zone.to_ne_bytes()));
            out.push(ct_set(NFT_CT_ZONE));
        }
        Term::Count => out.push(other("counter", Vec::new())),
    }
}

fn meta_is(key: MetaKey, data: &[u8], out: &mut Vec<Expressions>) {
    out.push(Expressions::Meta(vec![Meta::Key(key), Meta::DestinationRegister(REGISTER)]));
    out.push(compare(Operator::Equal, data));
}

/// The version, then the address at its offset in that version's header.
fn address_in(net: &IpNet, v4: u32, v6: u32, out: &mut Vec<Expressions>) {
    let (version, offset, network, mask) = match net.trunc() {
        IpNet::V4(net) => (Version::V4, v4, net.network().octets().to_vec(), net.netmask().octets().to_vec()),
        IpNet::V6(net) => (Version::V6, v6, net.network().octets().to_vec(), net.netmask().octets().to_vec()),
    };
    encode(&Term::Version(version), out);
    if net.prefix_len() == 0 {
        return;
    }
    out.push(payload(NETWORK_HEADER, offset, network.len() as u32));
    if net.prefix_len() < net.max_prefix_len() {
        out.push(masked(&mask));
    }
    out.push(compare(Operator::Equal, &network));
}

fn in_range<const N: usize>(first: [u8; N], last: [u8; N], out: &mut Vec<Expressions>) {
    if first == last {
        out.push(compare(Operator::Equal, &first));
    } else {
        out.push(compare(Operator::GreatherThanEqual, &first));
        out.push(compare(Operator::LessThanEqual, &last));
    }
}

fn payload(base: u32, offset: u32, length: u32) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(REGISTER),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
}

fn compare(operator: Operator, data: &[u8]) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(REGISTER),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(data.to_vec())),
    ])
}

fn masked(mask: &[u8]) -> Expressions {
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(REGISTER),
        Bitwise::DestinationRegister(REGISTER),
        Bitwise::Length(mask.len() as u32),
        Bitwise::Op(0), // mask and xor
        Bitwise::Mask(DataAttribute::Value(mask.to_vec())),
        Bitwise::Xor(DataAttribute::Value(vec![0; mask.len()])),
    ])
}

fn value(data: &[u8]) -> Expressions {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(REGISTER),
        Immediate::Data(DataAttribute::Value(data.to_vec())),
    ])
}

fn verdict(code: VerdictCode, chain: Option<&str>) -> Expressions {
    let mut attributes = vec![VerdictAttribute::Code(code)];
    attributes.extend(chain.map(|chain| VerdictAttribute::Chain(chain.into())));
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(attributes)),
    ])
}

fn ct_get(key: u32) -> Expressions {
    other("ct", vec![word(NFTA_CT_DREG, u32::from(REGISTER)), word(NFTA_CT_KEY, key)])
}

fn ct_set(key: u32) -> Expressions {
    other("ct", vec![word(NFTA_CT_SREG, u32::from(REGISTER)), word(NFTA_CT_KEY, key)])
}

/// The attributes up to the first that is garbled.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let whole = NlasIterator::new(bytes).map_while(Result::ok);
    whole.map(|attribute| {
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        (kind, &attribute.into_inner()[NLA_HEADER_SIZE..length])
    })
}

/// Whether the data nested in an expression is as long as it says.
fn is_sound(expression: &[u8]) -> bool {
    let mut name: &[u8] = &[];
    attributes(expression).all(|(kind, value)| {
        if kind == NFTA_EXPR_NAME {
            name = value.strip_suffix(&[0]).unwrap_or(value);
        }
        let nested: &[u16] = match name {
            // `NFTA_BITWISE_MASK`, `_XOR` and `_DATA`; `NFTA_CMP_DATA`; `NFTA_IMMEDIATE_DATA`.
            b"bitwise" => &[4, 5, 7],
            b"cmp" => &[3],
            b"immediate" => &[2],
            _ => &[],
        };
        kind != NFTA_EXPR_DATA
            || attributes(value)
                .filter(|(kind, _)| nested.contains(kind))
                .all(|(_, data)| NlaBuffer::new_checked(data).is_ok())
    })
}

fn word(kind: u16, number: u32) -> DefaultNla {
    DefaultNla::new(kind, number.to_be_bytes().to_vec())
}

fn other(name: &str, attributes: Vec<DefaultNla>) -> Expressions {
    Expressions::Other { expression_type: name.into(), attributes }
}

/// What a counter has counted makes it no other counter.
fn forget_counts(element: &mut ListAttribute<ExpressionAttribute>) {
    let ListAttribute::Element(parts) = element else { return };
    for part in parts {
        if let ExpressionAttribute::Data(Expressions::Other { expression_type, attributes }) = part
            && expression_type == "counter"
        {
            attributes.clear();
        }
    }
}

fn header(family: Family) -> NetfilterHeader {
    let family = match family {
        Family::Inet => NetfilterProtoFamily::Inet,
        Family::Bridge => NetfilterProtoFamily::Bridge,
    };
    NetfilterHeader::new(family, 0, 0)
}

fn padded(name: &str) -> [u8; IFNAMSIZ] {
    let mut bytes = [0; IFNAMSIZ];
    // A longer name is no interface's; cut, it still ends with a zero and matches none of those that it begins like.
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(IFNAMSIZ - 1)) {
        *to = from;
    }
    bytes
}

fn ip(net: &IpNet) -> &'static str {
    match Version::of(net) {
        Version::V4 => "ip",
        Version::V6 => "ip6",
    }
}

fn icmp(version: Version) -> &'static str {
    match version {
        Version::V4 => "icmp",
        Version::V6 => "icmpv6",
    }
}

fn range<T: fmt::Display + PartialEq>(range: &RangeInclusive<T>) -> String {
    if range.start() == range.end() {
        range.start().to_string()
    } else {
        format!("{}-{}", range.start(), range.end())
    }
}
