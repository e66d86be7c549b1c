//! The rules of a firewall, in both ways that people write them (data-plane 5.4).
//!
//! The old one, of which a top-level `aclRules` is the sign:
//! ```yaml
//! aclRules:
//!   "Allow ICMP": "action=reflect,icmptype=8"
//!   "Allow TCP 80": "action=reflect,tcplowport=80,tcpupport=80"
//! ```
//! and the present one, where the tables of names are as upstream's data plane has them:
//! ```yaml
//! allow tcp 8080:
//!   ispermit: 1
//!   proto: 6
//!   srcportoricmptypelast: 65535
//!   dstportoricmpcodefirst: 8080
//!   dstportoricmpcodelast: 8080
//! ```
//! Both become the same [`Rules`]. Rules describe traffic *from the client*, the first that matches decides, and what
//! none matches is dropped. They keep the order of the file (upstream shuffles them).
//!
//! Where upstream's reading would surprise, this one does what is written there:
//!
//! * A rule without prefixes is for IPv4 and IPv6; `0.0.0.0/0` is for IPv4, `::/0` for IPv6.
//! * An ICMP rule without an IPv6 prefix has ICMPv4's numbers. Where it is for IPv6 too, it stands for the ICMPv6
//!   messages of the same meaning: echo request (8) and reply (0), unreachable (3), time exceeded (11), parameter
//!   problem (12). `proto: 58` has ICMPv6's own numbers.
//! * A range that is not given is any port, type or code. Half a range is an error, as are ports without a protocol
//!   that has them: such rules allow or deny something else than their author thinks.

use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// The rules of a firewall in order; there is at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules(Vec<Rule>);

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// What its author calls it.
    pub name: String,
    /// What happens to traffic that it matches.
    pub action: Action,
    /// Where the traffic comes from; `None`: anywhere.
    pub source: Option<IpNet>,
    /// Where it goes; `None`: anywhere. Both prefixes are of one family.
    pub destination: Option<IpNet>,
    /// What kind it is.
    pub traffic: Traffic,
}

/// What happens to traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It is dropped.
    Deny,
    /// It passes, and so does what mirrors it on the way back, asked for or not.
    Permit,
    /// It passes, and the answers to it do.
    Reflect,
}

/// A kind of traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Traffic {
    /// All of it.
    Any,
    /// Everything of one IP protocol.
    Protocol(u8),
    /// TCP.
    Tcp {
        /// Source ports.
        source: Ports,
        /// Destination ports.
        destination: Ports,
        /// Flags that count, and what they have to be.
        flags: Option<(u8, u8)>,
    },
    /// UDP.
    Udp {
        /// Source ports.
        source: Ports,
        /// Destination ports.
        destination: Ports,
    },
    /// ICMP in the numbers of IPv4; also what means the same in IPv6.
    Icmp {
        /// Types.
        types: RangeInclusive<u8>,
        /// Codes.
        codes: RangeInclusive<u8>,
    },
    /// ICMPv6.
    Icmp6 {
        /// Types.
        types: RangeInclusive<u8>,
        /// Codes.
        codes: RangeInclusive<u8>,
    },
}

/// Ports, first and last included.
pub type Ports = RangeInclusive<u16>;

/// All ports.
pub const ANY_PORT: Ports = 0..=u16::MAX;
/// All ICMP types or codes.
pub const ANY: RangeInclusive<u8> = 0..=u8::MAX;

/// Why there are no rules. A firewall without rules does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error(
        "cannot read the firewall's rules from {}: it does not start without rules; name a readable file with \
         --acl-config-path (NSM_ACL_CONFIG_PATH)",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file does not hold rules.
    #[error("firewall rules {}: {problem}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: Box<Problem>,
    },
}

/// What is wrong in a file of rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// It is not YAML, or a name is given twice.
    #[error("line {line}: {text}")]
    Syntax {
        /// Line, from 1; 0 if it is not known.
        line: u64,
        /// In the parser's words.
        text: String,
    },
    /// It holds no rule.
    #[error(
        "there is no rule in it: it does not start without rules; to let everything pass write \
         'aclRules: {{\"everything\": \"action=permit\"}}'"
    )]
    Empty,
    /// A rule that cannot be read as one.
    #[error("line {line}, rule {rule:?}{}: {found}; expected {expected}", at(key))]
    Rule {
        /// Line, from 1.
        line: u64,
        /// The rule's name.
        rule: String,
        /// The key in it, if it is about one.
        key: String,
        /// What is there.
        found: String,
        /// What belongs there, or what to do.
        expected: String,
    },
}

// === impl Rules ===

impl Rules {
    /// Reads the file.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text =
            fs::read_to_string(path).map_err(|source| Error::Unreadable { path: path.into(), source })?;
        Self::parse(&text).map_err(|problem| Error::Wrong { path: path.into(), problem: Box::new(problem) })
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let root: Option<Spanned<Node>> = serde_saphyr::from_str(text).map_err(|e| Problem::Syntax {
            line: e.location().map_or(0, |location| location.line()),
            text: e.to_string(),
        })?;
        let entries = match root.map(|root| root.value) {
            Some(Node::Map(entries)) => entries,
            None | Some(Node::Null) => return Err(Problem::Empty),
            Some(other) => {
                let text = format!("the file is {}, not rules by their names", other.what());
                return Err(Problem::Syntax { line: 1, text });
            }
        };
        let old = entries.iter().find(|(name, _)| name == "aclRules");
        let rules: Result<Vec<_>, _> = match old {
            Some((_, rules)) => {
                if let Some((name, value)) = entries.iter().find(|(name, _)| name != "aclRules") {
                    let found = "it stands beside aclRules".to_owned();
                    let expected = "it below aclRules, or no aclRules: a file is written in one of both ways";
                    return Err(Reading { rule: name, line: line(value) }.wrong("", found, expected));
                }
                match &rules.value {
                    Node::Map(rules) => rules.iter().map(|(name, value)| old_rule(name, value)).collect(),
                    Node::Null => return Err(Problem::Empty),
                    other => {
                        let text = format!("aclRules is {}, not rules by their names", other.what());
                        return Err(Problem::Syntax { line: line(rules), text });
                    }
                }
            }
            None => entries.iter().map(|(name, value)| present_rule(name, value)).collect(),
        };
        let rules = rules?;
        if rules.is_empty() { Err(Problem::Empty) } else { Ok(Self(rules)) }
    }

    /// The rules in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Rule> {
        self.0.iter()
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().try_for_each(|rule| writeln!(f, "{rule}"))?;
        f.write_str("deny everything else")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.action, self.traffic)?;
        if let Some(net) = self.source {
            write!(f, " from {net}")?;
        }
        if let Some(net) = self.destination {
            write!(f, " to {net}")?;
        }
        write!(f, " ({})", self.name.escape_debug())
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deny => "deny",
            Self::Permit => "permit",
            Self::Reflect => "reflect",
        })
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = |f: &mut fmt::Formatter<'_>, source: &Ports, destination: &Ports| {
            if *source != ANY_PORT {
                write!(f, " from port {}", range(source))?;
            }
            if *destination != ANY_PORT {
                write!(f, " to port {}", range(destination))?;
            }
            Ok(())
        };
        let icmp = |f: &mut fmt::Formatter<'_>, types: &RangeInclusive<u8>, codes: &RangeInclusive<u8>| {
            if *types != ANY {
                write!(f, " type {}", range(types))?;
            }
            if *codes != ANY {
                write!(f, " code {}", range(codes))?;
            }
            Ok(())
        };
        match self {
            Self::Any => f.write_str("everything"),
            Self::Protocol(number) => write!(f, "protocol {number}"),
            Self::Tcp { source, destination, flags } => {
                f.write_str("tcp")?;
                ports(f, source, destination)?;
                match flags {
                    Some((mask, value)) => write!(f, " flags {value:#x}/{mask:#x}"),
                    None => Ok(()),
                }
            }
            Self::Udp { source, destination } => {
                f.write_str("udp")?;
                ports(f, source, destination)
            }
            Self::Icmp { types, codes } => {
                f.write_str("icmp")?;
                icmp(f, types, codes)
            }
            Self::Icmp6 { types, codes } => {
                f.write_str("icmpv6")?;
                icmp(f, types, codes)
            }
        }
    }
}

// === reading ===

/// What YAML says, with everything that is not a list or a map as the text it is, and maps in their order.
#[derive(Debug)]
enum Node {
    Null,
    Text(String),
    Map(Vec<(String, Spanned<Node>)>),
    List,
}

impl Node {
    fn what(&self) -> &'static str {
        match self {
            Self::Null => "empty",
            Self::Text(_) => "a text",
            Self::Map(_) => "a map",
            Self::List => "a list",
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("rules")
            }

            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }

            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
                Node::deserialize(deserializer)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
                Ok(Node::Text(value.to_string()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
                Ok(Node::Text(value.to_string()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
                Ok(Node::Text(value.to_string()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
                Ok(Node::Text(value.to_string()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Node, E> {
                Ok(Node::Text(value.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
                while seq.next_element::<Node>()?.is_some() {}
                Ok(Node::List)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut entries: Vec<(String, Spanned<Node>)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Spanned<Node>>()? {
                    if entries.iter().any(|(other, _)| *other == name) {
                        return Err(serde::de::Error::custom(format!("{name:?} is given twice; keep one")));
                    }
                    entries.push((name, value));
                }
                Ok(Node::Map(entries))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// A rule being read, for its errors.
#[derive(Clone, Copy)]
struct Reading<'a> {
    rule: &'a str,
    line: u64,
}

impl Reading<'_> {
    fn wrong(&self, key: &str, found: String, expected: impl Into<String>) -> Problem {
        let (rule, expected) = (self.rule.to_owned(), expected.into());
        Problem::Rule { line: self.line, rule, key: key.to_owned(), found, expected }
    }

    fn number<T: std::str::FromStr>(&self, key: &str, text: &str, expected: &str) -> Result<T, Problem> {
        text.parse().map_err(|_| self.wrong(key, format!("{text:?}"), expected))
    }

    fn prefix(&self, key: &str, text: &str) -> Result<IpNet, Problem> {
        let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.map(|net| net.trunc())
            .map_err(|_| self.wrong(key, format!("{text:?}"), "a prefix like 10.0.0.0/8 or 2001:db8::/32"))
    }

    /// Puts a rule together, and looks whether its parts fit.
    fn rule(
        &self,
        action: Action,
        source: Option<IpNet>,
        destination: Option<IpNet>,
        traffic: Traffic,
    ) -> Result<Rule, Problem> {
        let v6 = |net: Option<IpNet>| net.map(|net| net.addr().is_ipv6());
        if let (Some(a), Some(b)) = (source, destination)
            && v6(source) != v6(destination)
        {
            let found = format!("source {a} and destination {b} are of different IP versions");
            return Err(self.wrong("", found, "two rules, one for each"));
        }
        if matches!(traffic, Traffic::Icmp6 { .. }) && v6(source.or(destination)) == Some(false) {
            return Err(self.wrong("", "ICMPv6 with an IPv4 prefix".into(), "proto: 1, or an IPv6 prefix"));
        }
        Ok(Rule { name: self.rule.to_owned(), action, source, destination, traffic })
    }
}

/// `"Allow TCP 80": "action=reflect,tcplowport=80,tcpupport=80"`
fn old_rule(name: &str, value: &Spanned<Node>) -> Result<Rule, Problem> {
    const KEYS: &str =
        "action, srcnet, dstnet, icmptype, tcplowport with tcpupport, udplowport with udpupport";
    let reading = Reading { rule: name, line: line(value) };
    let Node::Text(text) = &value.value else {
        let expected = "a text like \"action=reflect,tcplowport=80,tcpupport=80\"";
        return Err(reading.wrong("", format!("it is {}", value.value.what()), expected));
    };
    let mut given: Vec<(&str, &str)> = Vec::new();
    for part in text.split(',') {
        let Some((key, value)) = part.split_once('=').map(|(key, value)| (key.trim(), value.trim())) else {
            return Err(reading.wrong(
                "",
                format!("{:?}", part.trim()),
                "key=value pairs with commas between",
            ));
        };
        if given.iter().any(|(other, _)| *other == key) {
            return Err(reading.wrong(key, "it is given twice".into(), "it once"));
        }
        given.push((key, value));
    }
    let mut take = |wanted: &str| {
        let at = given.iter().position(|(key, _)| *key == wanted)?;
        Some(given.remove(at).1)
    };
    let action = match take("action") {
        Some("deny") => Action::Deny,
        Some("permit") => Action::Permit,
        Some("reflect") => Action::Reflect,
        Some(other) => return Err(reading.wrong("action", format!("{other:?}"), "deny, permit or reflect")),
        None => return Err(reading.wrong("action", "it is missing".into(), "deny, permit or reflect")),
    };
    let source = take("srcnet").map(|text| reading.prefix("srcnet", text)).transpose()?;
    let destination = take("dstnet").map(|text| reading.prefix("dstnet", text)).transpose()?;
    let mut kinds = Vec::new();
    if let Some(text) = take("icmptype") {
        let number = reading.number("icmptype", text, "an ICMP type, 0 to 255")?;
        kinds.push(Traffic::Icmp { types: number..=number, codes: ANY });
    }
    for (low, up) in [("tcplowport", "tcpupport"), ("udplowport", "udpupport")] {
        // With only one of both the old firewall took neither, and the rule was for everything.
        let destination = match (take(low), take(up)) {
            (None, None) => continue,
            (Some(first), Some(last)) => {
                let port = |key, text| reading.number(key, text, "a port, 0 to 65535");
                let (first, last) = (port(low, first)?, port(up, last)?);
                ports(&reading, up, first, last)?
            }
            (Some(_), None) => {
                return Err(reading.wrong(up, "it is missing".into(), format!("it beside {low}")));
            }
            (None, Some(_)) => {
                return Err(reading.wrong(low, "it is missing".into(), format!("it beside {up}")));
            }
        };
        kinds.push(match low {
            "tcplowport" => Traffic::Tcp { source: ANY_PORT, destination, flags: None },
            _ => Traffic::Udp { source: ANY_PORT, destination },
        });
    }
    if let Some((key, _)) = given.first() {
        return Err(reading.wrong(key, "there is no such key".into(), KEYS));
    }
    match kinds.len() {
        0 => reading.rule(action, source, destination, Traffic::Any),
        1 => reading.rule(action, source, destination, kinds.remove(0)),
        _ => Err(reading.wrong("", "it is for several protocols".into(), "a rule for each")),
    }
}

/// The present way: a map with upstream's keys.
fn present_rule(name: &str, value: &Spanned<Node>) -> Result<Rule, Problem> {
    const KEYS: &str = "ispermit, proto, srcprefix, dstprefix, srcportoricmptypefirst, srcportoricmptypelast, \
                        dstportoricmpcodefirst, dstportoricmpcodelast, tcpflagsmask, tcpflagsvalue";
    let reading = Reading { rule: name, line: line(value) };
    let Node::Map(entries) = &value.value else {
        let expected =
            format!("a map with the keys {KEYS}; or all rules below aclRules, if they are of the old form");
        return Err(reading.wrong("", format!("it is {}", value.value.what()), expected));
    };
    let mut given: Vec<(&str, Reading<'_>, &str)> = Vec::new();
    for (key, value) in entries {
        let reading = Reading { line: line(value), ..reading };
        match &value.value {
            Node::Text(text) => given.push((key, reading, text)),
            other => return Err(reading.wrong(key, format!("it is {}", other.what()), "a value")),
        }
    }
    let mut take = |wanted: &str| {
        let at = given.iter().position(|(key, ..)| *key == wanted)?;
        let (_, reading, text) = given.remove(at);
        Some((reading, text))
    };
    let mut number = |key: &'static str, most: u16, expected: &str| match take(key) {
        None => Ok(None),
        Some((reading, text)) => match text.parse::<u16>() {
            Ok(number) if number <= most => Ok(Some(number)),
            _ => Err(reading.wrong(key, format!("{text:?}"), expected)),
        },
    };
    let byte = "a number, 0 to 255";
    let action = match number("ispermit", 2, "0 (deny), 1 (permit) or 2 (permit and reflect)")?.unwrap_or(0) {
        0 => Action::Deny,
        1 => Action::Permit,
        _ => Action::Reflect,
    };
    let protocol = number("proto", 255, "an IP protocol number, 0 (any) to 255")?.unwrap_or(0) as u8;
    let port = "a number, 0 to 65535";
    let mut pair = |first_key: &'static str, last_key: &'static str| {
        let (first, last) = (number(first_key, u16::MAX, port)?, number(last_key, u16::MAX, port)?);
        match (first, last) {
            (None, None) => Ok(ANY_PORT),
            (Some(_), None) => {
                let expected = format!("the end of the range that {first_key} begins");
                Err(reading.wrong(last_key, "it is missing".into(), expected))
            }
            // A missing first is 0, as everywhere in this form.
            (first, Some(last)) => ports(&reading, last_key, first.unwrap_or(0), last),
        }
    };
    let source_range = pair("srcportoricmptypefirst", "srcportoricmptypelast")?;
    let destination_range = pair("dstportoricmpcodefirst", "dstportoricmpcodelast")?;
    let mask = number("tcpflagsmask", 255, byte)?.unwrap_or(0) as u8;
    let flags = number("tcpflagsvalue", 255, byte)?.unwrap_or(0) as u8;
    let mut prefix = |key| take(key).map(|(reading, text)| reading.prefix(key, text)).transpose();
    let (source, destination) = (prefix("srcprefix")?, prefix("dstprefix")?);
    if let Some((key, reading, _)) = given.first() {
        return Err(reading.wrong(key, "there is no such key".into(), KEYS));
    }
    if (mask, flags) != (0, 0) && protocol != TCP {
        return Err(reading.wrong("tcpflagsmask", format!("it is given with proto: {protocol}"), "proto: 6"));
    }
    if flags & !mask != 0 {
        let found = format!("{flags:#x} has flags that are not in tcpflagsmask, so it never matches");
        return Err(reading.wrong("tcpflagsvalue", found, "flags of the mask only"));
    }
    let traffic = match protocol {
        TCP => Traffic::Tcp {
            source: source_range,
            destination: destination_range,
            flags: (mask != 0).then_some((mask, flags)),
        },
        UDP => Traffic::Udp { source: source_range, destination: destination_range },
        ICMP | ICMP6 => {
            let byte_range = |key, range: &Ports| {
                let first = u8::try_from(*range.start());
                let first = first
                    .map_err(|_| reading.wrong(key, format!("{} begins above 255", range.start()), byte))?;
                Ok(first..=u8::try_from(*range.end()).unwrap_or(u8::MAX))
            };
            let types = byte_range("srcportoricmptypefirst", &source_range)?;
            let codes = byte_range("dstportoricmpcodefirst", &destination_range)?;
            if protocol == ICMP { Traffic::Icmp { types, codes } } else { Traffic::Icmp6 { types, codes } }
        }
        _ => {
            for (key, range) in
                [("srcportoricmptypelast", source_range), ("dstportoricmpcodelast", destination_range)]
            {
                if range != ANY_PORT {
                    let found = format!("a range of ports with proto: {protocol}, which has none");
                    return Err(reading.wrong(key, found, "proto: 6 (TCP) or 17 (UDP), or no range"));
                }
            }
            if protocol == 0 { Traffic::Any } else { Traffic::Protocol(protocol) }
        }
    };
    reading.rule(action, source, destination, traffic)
}

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;

// === private helpers ===

fn ports(reading: &Reading<'_>, key: &str, first: u16, last: u16) -> Result<Ports, Problem> {
    if first > last {
        return Err(reading.wrong(key, format!("{last} is less than {first}"), "the first before the last"));
    }
    Ok(first..=last)
}

fn line(value: &Spanned<Node>) -> u64 {
    value.referenced.line()
}

fn at(key: &str) -> String {
    if key.is_empty() { String::new() } else { format!(", {key}") }
}

fn range<T: fmt::Display + PartialEq>(range: &RangeInclusive<T>) -> String {
    if range.start() == range.end() {
        range.start().to_string()
    } else {
        format!("{}-{}", range.start(), range.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = r#"
aclRules:
  "Allow ICMP": "action=reflect,icmptype=8"
  "Allow TCP 80": "action=reflect,tcplowport=80,tcpupport=80"
"#;

    /// The sample of upstream's nse-composition.
    const PRESENT: &str = "
allow icmp:
  proto: 1
  srcportoricmptypelast: 65535
  dstportoricmpcodelast: 65535
  ispermit: 1
allow tcp8080:
  proto: 6
  srcportoricmptypelast: 65535
  dstportoricmpcodefirst: 8080
  dstportoricmpcodelast: 8080
  ispermit: 1
forbid tcp80:
  proto: 6
  srcportoricmptypelast: 65535
  dstportoricmpcodefirst: 80
  dstportoricmpcodelast: 80
";

    #[test]
    fn the_old_form() {
        let rules = Rules::parse(OLD).unwrap();
        assert_eq!(
            rules.to_string(),
            "reflect icmp type 8 (Allow ICMP)\nreflect tcp to port 80 (Allow TCP 80)\ndeny everything else"
        );
        let more = r#"{"aclRules": {"b": " action = permit , srcnet=10.1.2.3/8, udplowport=53,udpupport=54", a: "action=deny,dstnet=2001:db8::1"}}"#;
        assert_eq!(
            Rules::parse(more).unwrap().to_string(),
            "permit udp to port 53-54 from 10.0.0.0/8 (b)\ndeny everything to 2001:db8::1/128 (a)\ndeny everything else"
        );
    }

    #[test]
    fn the_present_form() {
        assert_eq!(
            Rules::parse(PRESENT).unwrap().to_string(),
            "permit icmp (allow icmp)\npermit tcp to port 8080 (allow tcp8080)\ndeny tcp to port 80 (forbid tcp80)\n\
             deny everything else"
        );
        let more = "
syn: {ispermit: 2, proto: 6, srcprefix: 192.0.2.0/24, dstprefix: 198.51.100.7/32, tcpflagsmask: 18, tcpflagsvalue: 2}
v6: {ispermit: 2, proto: 58, srcportoricmptypefirst: 128, srcportoricmptypelast: 129}
esp: {ispermit: 1, proto: 50}
all: {ispermit: 2}
";
        assert_eq!(
            Rules::parse(more).unwrap().to_string(),
            "reflect tcp flags 0x2/0x12 from 192.0.2.0/24 to 198.51.100.7/32 (syn)\n\
             reflect icmpv6 type 128-129 (v6)\npermit protocol 50 (esp)\nreflect everything (all)\ndeny everything else"
        );
    }

    #[test]
    fn the_order_is_the_file_s() {
        let text: String = (0..300).map(|i| format!("rule {}: {{ispermit: 1}}\n", i * 7919 % 1000)).collect();
        let names: Vec<_> = Rules::parse(&text).unwrap().0.into_iter().map(|rule| rule.name).collect();
        let wanted: Vec<_> = (0..300).map(|i| format!("rule {}", i * 7919 % 1000)).collect();
        assert_eq!(names, wanted);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let old = |rule: &str| format!("aclRules:\n  ok: \"action=deny\"\n  r: \"{rule}\"");
        let present = |rule: &str| format!("ok: {{ispermit: 1}}\nr:\n  {rule}");
        for (text, parts) in [
            (String::new(), &["there is no rule in it", "does not start"][..]),
            ("# nothing\n".into(), &["there is no rule in it"]),
            ("aclRules:\n".into(), &["there is no rule in it"]),
            ("aclRules: {}".into(), &["there is no rule in it"]),
            ("{}".into(), &["there is no rule in it"]),
            ("[1, 2]".into(), &["a list"]),
            ("aclRules: 3".into(), &["aclRules is a text"]),
            ("a: b: c".into(), &["line 1"]),
            ("aclRules: {a: \"action=deny\"}\nb: {}".into(), &["line 2", "\"b\"", "beside aclRules"]),
            ("a: {ispermit: 1}\na: {ispermit: 0}".into(), &["line 2", "a"]),
            ("a: {ispermit: 1, ispermit: 0}".into(), &["line 1", "ispermit"]),
            ("r: \"action=deny\"".into(), &["rule \"r\"", "a text", "below aclRules"]),
            (
                old("icmptype=8"),
                &["line 3", "rule \"r\"", "action: it is missing", "deny, permit or reflect"],
            ),
            (old("action=allow"), &["action: \"allow\"", "deny, permit or reflect"]),
            (old("action=deny,action=permit"), &["action: it is given twice"]),
            (old("action=deny,tcplowport=80"), &["tcpupport: it is missing", "beside tcplowport"]),
            (old("action=deny,udpupport=80"), &["udplowport: it is missing"]),
            (old("action=deny,tcplowport=90,tcpupport=80"), &["80 is less than 90"]),
            (old("action=deny,tcplowport=x,tcpupport=80"), &["tcplowport: \"x\"", "0 to 65535"]),
            (old("action=deny,tcplowport=1,tcpupport=65536"), &["tcpupport: \"65536\""]),
            (old("action=deny,icmptype=256"), &["icmptype: \"256\"", "0 to 255"]),
            (old("action=deny,icmptype=8,tcplowport=1,tcpupport=2"), &["several protocols"]),
            (old("action=deny,dstnet=10.0.0.0/33"), &["dstnet: \"10.0.0.0/33\"", "a prefix like"]),
            (old("action=deny,srcnet=10.0.0.0/8,dstnet=::/0"), &["different IP versions", "two rules"]),
            (old("action=deny,port=80"), &["port: there is no such key", "tcplowport"]),
            (old("deny"), &["\"deny\"", "key=value"]),
            (old(""), &["key=value"]),
            (present("permit: 1"), &["line 3", "permit: there is no such key", "ispermit"]),
            (present("ispermit: 3"), &["ispermit: \"3\"", "0 (deny)"]),
            (present("ispermit: true"), &["ispermit: \"true\""]),
            (present("proto: tcp"), &["proto: \"tcp\"", "protocol number"]),
            (present("proto: -6"), &["proto: \"-6\""]),
            (present("{proto: 6, dstportoricmpcodefirst: 80}"), &["dstportoricmpcodelast: it is missing"]),
            (
                present("{proto: 6, dstportoricmpcodefirst: 80, dstportoricmpcodelast: 79}"),
                &["79 is less than 80"],
            ),
            (
                present("{dstportoricmpcodefirst: 80, dstportoricmpcodelast: 80}"),
                &["proto: 0", "proto: 6 (TCP)"],
            ),
            (present("{proto: 17, tcpflagsmask: 2}"), &["tcpflagsmask", "proto: 6"]),
            (present("{proto: 6, tcpflagsmask: 2, tcpflagsvalue: 3}"), &["never matches"]),
            (present("{proto: 1, srcportoricmptypefirst: 300, srcportoricmptypelast: 301}"), &["above 255"]),
            (present("{proto: 58, srcprefix: 10.0.0.0/8}"), &["ICMPv6 with an IPv4 prefix"]),
            (present("srcprefix: [10.0.0.0/8]"), &["srcprefix: it is a list"]),
        ] {
            let error = Rules::parse(&text).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "{part:?} is not in {error:?} about\n{text}");
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = Rules::load(Path::new("/nonexistent/rules.yaml")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/rules.yaml") && error.contains("--acl-config-path"), "{error}");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rules.yaml");
        fs::write(&path, "r: {ispermit: 9}").unwrap();
        let error = Rules::load(&path).unwrap_err().to_string();
        assert!(error.contains("rules.yaml: line 1, rule \"r\", ispermit"), "{error}");
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(matches!(Rules::load(&path), Err(Error::Unreadable { .. })));
    }
}
