//! What a client asks for, in one line: `kernel://service/interface?label=value`
//! (the grammar of spec/kubernetes.md section 1), and lists of such lines.
//!
//! Texts mean here what they mean to upstream, whose rules are those of Go's URL parser. Beyond it blanks around an item
//! are taken, and what can never become a wire is an error here instead of a request that is retried for ever.

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::{
    mechanism::{LOCAL, key, kind},
    pb::connection::Mechanism,
};

/// Linux' limit for interface names, without the terminating zero (`IFNAMSIZ` of linux/if.h).
pub const MAX_INTERFACE_NAME: usize = 15;
/// How much of a text an error repeats.
const SHOWN: usize = 200;

/// One wanted wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NsUrl {
    /// Mechanism type, upper case: `KERNEL`.
    pub mechanism: String,
    /// Network service, `name` or `name@domain`.
    pub service: String,
    /// Interface name, where the user chose one.
    pub interface: Option<String>,
    /// Labels of the request.
    pub labels: BTreeMap<String, String>,
    /// Pieces of the query that are no labels, because they hold a semicolon or cannot be decoded. Upstream drops them
    /// without a word; whoever parses says so.
    pub ignored: Vec<String>,
}

/// What is wrong with a network-service URL, where, and what it should look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadNsUrl {
    /// The item as given.
    pub url: String,
    /// Which item of how many, from 1, if it stood in a list.
    pub item: Option<(usize, usize)>,
    /// At which byte of the item, from 0, where that can be told.
    pub at: Option<usize>,
    /// What about it cannot be used, and what to do.
    pub problem: String,
}

impl fmt::Display for BadNsUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "network service {:?}", self.url.chars().take(SHOWN).collect::<String>())?;
        if let Some((number, count)) = self.item.filter(|(_, count)| *count > 1) {
            write!(f, " (item {number} of {count})")?;
        }
        if let Some(at) = self.at {
            let column = self.url.get(..at).map_or(at, |before| before.chars().count()) + 1;
            write!(f, " at character {column}")?;
        }
        write!(
            f,
            ": {}; expected MECHANISM://SERVICE[@DOMAIN][/INTERFACE][?LABEL=VALUE&…], for example kernel://my-service/nsm0?app=web",
            self.problem
        )
    }
}

impl std::error::Error for BadNsUrl {}

impl NsUrl {
    /// A comma-separated list, as in the annotation `networkservicemesh.io` and in `NSM_NETWORK_SERVICES`. A comma always
    /// separates: a label's value with one is written as a repeated label, `?a=1&a=2`.
    ///
    /// # Errors
    /// The first item that is not a network-service URL, or that wants the interface of an earlier one.
    pub fn parse_list(list: &str) -> Result<Vec<Self>, BadNsUrl> {
        if list.trim().is_empty() {
            return Ok(Vec::new());
        }
        let items: Vec<_> = list.split(',').collect();
        let mut urls = Vec::<Self>::with_capacity(items.len());
        for (i, text) in items.iter().enumerate() {
            let place = |e: BadNsUrl| BadNsUrl { item: Some((i + 1, items.len())), ..e };
            let url: Self = text.parse().map_err(place)?;
            if let Some(taken) = urls.iter().position(|before| before.same_interface(&url)) {
                let name = url.interface.unwrap_or_default();
                let problem = format!(
                    "item {} wants the interface {name:?} too, and a pod has one of each name: give one of them another name",
                    taken + 1
                );
                return Err(place(bad(text, None, problem)));
            }
            urls.push(url);
        }
        Ok(urls)
    }

    /// The preference that a client puts into its request.
    #[must_use]
    pub fn preference(&self) -> Mechanism {
        let mut m = Mechanism::new(LOCAL, &self.mechanism);
        if let Some(name) = &self.interface {
            m.set(key::NAME, name);
        }
        m
    }

    fn same_interface(&self, other: &Self) -> bool {
        let named = |url: &Self| url.interface.clone().filter(|_| url.mechanism == kind::KERNEL);
        named(self).is_some() && named(self) == named(other)
    }
}

impl fmt::Display for NsUrl {
    /// As a person would write it; labels sorted.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.mechanism.to_lowercase(), self.service)?;
        self.interface.iter().try_for_each(|name| write!(f, "/{name}"))?;
        for (i, (key, value)) in self.labels.iter().enumerate() {
            write!(f, "{}{key}={value}", if i == 0 { '?' } else { '&' })?;
        }
        Ok(())
    }
}

impl FromStr for NsUrl {
    type Err = BadNsUrl;

    fn from_str(text: &str) -> Result<Self, BadNsUrl> {
        let item = text.trim_matches(' ');
        // Positions are told in the text as it was given.
        let begin = text.len() - text.trim_start_matches(' ').len();
        let bad = |at: Option<usize>, problem: String| bad(text, at.map(|at| begin + at), problem);
        if item.is_empty() {
            return Err(bad(None, "it is empty (a trailing or doubled comma?)".into()));
        }
        if let Some((at, c)) = item.char_indices().find(|(_, c)| c.is_ascii_control()) {
            return Err(bad(Some(at), format!("it holds the control character {c:?}: remove it")));
        }
        let url = item.split('#').next().unwrap_or_default();
        let (url, query) = url.split_once('?').unwrap_or((url, ""));
        let (scheme, rest) = url
            .split_once("://")
            .ok_or_else(|| bad(None, "it has no MECHANISM:// (write kernel:// before the service)".into()))?;
        if let Some(problem) = bad_scheme(scheme) {
            return Err(bad(Some(0), problem));
        }
        let slash = rest.find('/').unwrap_or(rest.len());
        let (authority, path) = rest.split_at(slash);
        let authority_at = scheme.len() + 3;
        let service = service(authority).map_err(|(at, what)| bad(Some(authority_at + at), what))?;
        let path = unescape(path, false).map_err(|(at, what)| bad(Some(authority_at + slash + at), what))?;
        let mechanism = scheme.to_ascii_uppercase();
        let interface = path.rsplit('/').next().filter(|name| !name.is_empty()).map(str::to_owned);
        if mechanism == kind::KERNEL
            && let Some(name) = &interface
        {
            let at = item.find('?').unwrap_or(url.len()).min(url.len());
            let at = url[..at].rfind('/').map(|slash| slash + 1);
            check_interface_name(name).map_err(|problem| bad(at, problem))?;
        }
        let (labels, ignored) = labels(query);
        Ok(Self { mechanism, service, interface, labels, ignored })
    }
}

fn bad(url: &str, at: Option<usize>, problem: String) -> BadNsUrl {
    BadNsUrl { url: url.into(), item: None, at, problem }
}

/// What is wrong with a scheme (RFC 3986 section 3.1).
fn bad_scheme(scheme: &str) -> Option<String> {
    if scheme.is_empty() {
        return Some("it has no MECHANISM before ://".into());
    }
    let good = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    (!good).then(|| {
        format!("{scheme:?} is no mechanism: a letter, then letters, digits, plus, hyphen or dot (kernel, memif, vfio)")
    })
}

/// The service that an authority names: `[user[:password]@]host[:port]`, of which password and port are dropped.
fn service(authority: &str) -> Result<String, (usize, String)> {
    let (user, host_at) = match authority.rfind('@') {
        Some(at) => (Some(&authority[..at]), at + 1),
        None => (None, 0),
    };
    let host = host(&authority[host_at..]).map_err(|(at, what)| (host_at + at, what))?;
    let Some(user) = user else { return Ok(host) };
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._:~!$&'()*+,;=%@".contains(c);
    if let Some((at, c)) = user.char_indices().find(|(_, c)| !allowed(*c)) {
        return Err((at, format!("invalid character {c:?} before the @: write it as %XX")));
    }
    let name = unescape(user.split(':').next().unwrap_or_default(), false)?;
    if name.is_empty() {
        return Err((0, "there is no service before the @ (SERVICE@DOMAIN)".into()));
    }
    Ok(format!("{name}@{host}"))
}

fn host(text: &str) -> Result<String, (usize, String)> {
    let (name, name_at, port) = match text.strip_prefix('[') {
        Some(inner) => {
            let end = inner.find(']').ok_or_else(|| (0, "the [ has no ]".to_owned()))?;
            (&inner[..end], 1, &inner[end + 1..])
        }
        // As Go has it: what follows the last colon has to be a port, what stands before it is taken as it is.
        None => match text.rfind(':') {
            Some(colon) => (&text[..colon], 0, &text[colon..]),
            None => (text, 0, ""),
        },
    };
    let port_at = text.len() - port.len();
    if !port.is_empty() && !port.strip_prefix(':').is_some_and(|p| p.bytes().all(|b| b.is_ascii_digit())) {
        let what = format!("invalid port {port:?}: a service has none, remove it from the colon on");
        return Err((port_at, what));
    }
    let allowed =
        |c: char| !c.is_ascii() || c.is_ascii_alphanumeric() || "-._~!$&'()*+,;=:[]<>\"%".contains(c);
    if let Some((at, c)) = name.char_indices().find(|(_, c)| !allowed(*c)) {
        return Err((name_at + at, format!("invalid character {c:?} in the name of the service: remove it")));
    }
    if name.is_empty() {
        return Err((0, "it names no service".into()));
    }
    unescape(name, true).map_err(|(at, what)| (name_at + at, what))
}

/// Decodes %XX. In a host Go takes only what is not ASCII in that form.
fn unescape(text: &str, host: bool) -> Result<String, (usize, String)> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if byte != b'%' {
            out.push(byte);
            at += 1;
            continue;
        }
        let digit = |i: usize| bytes.get(i).and_then(|b| char::from(*b).to_digit(16));
        let value = digit(at + 1).zip(digit(at + 2)).and_then(|(h, l)| u8::try_from(h * 16 + l).ok());
        match value.filter(|value| !host || !value.is_ascii()) {
            Some(value) => out.push(value),
            None => {
                let escape: String = text.get(at..).unwrap_or_default().chars().take(3).collect();
                let write = if host { "write the character itself" } else { "write %25 for a percent sign" };
                return Err((at, format!("invalid escape {escape:?}: {write}")));
            }
        }
        at += 3;
    }
    String::from_utf8(out).map_err(|e| (e.utf8_error().valid_up_to(), "it is not UTF-8 when decoded".into()))
}

/// Labels of a query, and the pieces of it that are none.
fn labels(query: &str) -> (BTreeMap<String, String>, Vec<String>) {
    let (mut labels, mut ignored) = (BTreeMap::<String, String>::new(), Vec::new());
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let decode = |text: &str| unescape(&text.replace('+', " "), false).ok();
        let (Some(key), Some(value), false) = (decode(key), decode(value), pair.contains(';')) else {
            ignored.push(pair.to_owned());
            continue;
        };
        // Repeated keys are joined, which is how a value with a comma is written.
        labels.entry(key).and_modify(|v| *v = format!("{v},{value}")).or_insert(value);
    }
    (labels, ignored)
}

/// What the kernel takes as an interface name (`dev_valid_name` of net/core/dev.c).
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn check_interface_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("the interface name is empty".into());
    }
    if name.len() > MAX_INTERFACE_NAME {
        return Err(format!(
            "the interface name {:?} has {} bytes; Linux takes at most {MAX_INTERFACE_NAME}",
            name.chars().take(60).collect::<String>(),
            name.len()
        ));
    }
    if name == "."
        || name == ".."
        || name.contains(|c: char| "/:%".contains(c) || c.is_whitespace() || c.is_control())
    {
        return Err(format!(
            "the interface name {name:?} holds what Linux does not take in one (a slash, a colon, a percent sign, white space, or it is a dot)"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(s: &str) -> NsUrl {
        s.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn the_grammar() {
        let plain = one("kernel://secure-intranet-connectivity/nsm0");
        assert_eq!(
            (plain.mechanism.as_str(), plain.service.as_str(), plain.interface.as_deref()),
            ("KERNEL", "secure-intranet-connectivity", Some("nsm0"))
        );
        assert_eq!(one("Kernel://s").mechanism, "KERNEL");
        assert_eq!(one("kernel://Some.Service").service, "Some.Service", "case and dots stay");
        assert_eq!(one("kernel://finance@my.cluster2/nsm-1").service, "finance@my.cluster2");
        assert_eq!(one("kernel://user:pw@host/x").service, "user@host", "a password is dropped");
        assert_eq!(one("kernel://a@b@host").service, "a@b@host", "the last @ ends the user");
        assert_eq!(one("kernel://my%20s@host").service, "my s@host");
        assert_eq!(one("kernel://s:8080/b").service, "s", "a port is dropped");
        assert_eq!(one("kernel://s:/b").service, "s");
        assert_eq!(one("kernel://[2001:db8::1]:80/b").service, "2001:db8::1");
        assert_eq!(one("kernel://[2001:db8::1]").service, "2001:db8::1");
        assert_eq!(one("kernel://s").interface, None);
        assert_eq!(one("kernel://s/").interface, None);
        assert_eq!(one("kernel://s/a/b").interface.as_deref(), Some("b"));
        assert_eq!(one("kernel://s/a/b/").interface, None, "empty after the last slash: generated");
        assert_eq!(one("kernel://s/n%2Db").interface.as_deref(), Some("n-b"));
        assert_eq!(one("memif://s/a-name-longer-than-linux-has").interface.unwrap().len(), 28);
        assert_eq!(
            one("carrier-pigeon://s").mechanism,
            "CARRIER-PIGEON",
            "the mesh says what it does not have"
        );
    }

    #[test]
    fn labels_are_decoded_and_joined_and_what_is_none_is_told() {
        let labels = |s: &str| one(s).labels.into_iter().collect::<Vec<_>>();
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        assert_eq!(labels("memif://s?a=1&a=2&b=x%20y#z=1"), [pair("a", "1,2"), pair("b", "x y")]);
        assert_eq!(labels("kernel://s/x?a&b=&&c=d=e+f"), [pair("a", ""), pair("b", ""), pair("c", "d=e f")]);
        assert_eq!(labels("kernel://s/x?sriovToken=a.b/10G"), [pair("sriovToken", "a.b/10G")]);
        let odd = one("kernel://s/x?a=1;b=2&c=%zz&d=4");
        assert_eq!(odd.labels, [pair("d", "4")].into());
        assert_eq!(odd.ignored, ["a=1;b=2", "c=%zz"]);
        assert_eq!(one("kernel://s/x?b=2&a=1").to_string(), "kernel://s/x?a=1&b=2");
    }

    #[test]
    fn lists() {
        assert_eq!(NsUrl::parse_list("kernel://a/x,kernel://b/y").unwrap().len(), 2);
        assert_eq!(
            NsUrl::parse_list(" kernel://a/x , kernel://b/y ").unwrap()[1].interface.as_deref(),
            Some("y")
        );
        assert_eq!(NsUrl::parse_list(""), Ok(vec![]));
        assert_eq!(NsUrl::parse_list("  "), Ok(vec![]));
        assert_eq!(NsUrl::parse_list("kernel://a,kernel://a").unwrap().len(), 2, "two wires to one service");
        assert_eq!(
            NsUrl::parse_list("kernel://a/x,memif://a/x").unwrap().len(),
            2,
            "only one is an interface"
        );
    }

    /// What is wrong, where, and what to do.
    #[test]
    fn what_cannot_work_is_refused_at_once() {
        for (bad, says) in [
            (
                "kernel://a/x,",
                "network service \"\" (item 2 of 2): it is empty (a trailing or doubled comma?)",
            ),
            ("kernel://a/x,,kernel://b", "(item 2 of 3): it is empty"),
            ("kernel://a/x, b", "network service \" b\" (item 2 of 2): it has no MECHANISM://"),
            ("service/if", "it has no MECHANISM:// (write kernel:// before the service)"),
            ("kernel:a", "it has no MECHANISM://"),
            ("://a/b", "at character 1: it has no MECHANISM before ://"),
            ("4you://a/b", "at character 1: \"4you\" is no mechanism: a letter, then"),
            ("ker nel://a", "at character 1: \"ker nel\" is no mechanism"),
            ("kernel:///nsm0", "at character 10: it names no service"),
            ("kernel://:80/nsm0", "it names no service"),
            ("kernel://[]/nsm0", "it names no service"),
            ("kernel://@b/x", "at character 10: there is no service before the @ (SERVICE@DOMAIN)"),
            ("kernel://a@/x", "at character 12: it names no service"),
            (
                "kernel://a b/x",
                "at character 11: invalid character ' ' in the name of the service: remove it",
            ),
            ("kernel://a|b/x", "invalid character '|'"),
            ("kernel://a^c@b/x", "at character 11: invalid character '^' before the @: write it as %XX"),
            ("kernel://a%41/x", "at character 11: invalid escape \"%41\": write the character itself"),
            ("kernel://a%zz@b/x", "invalid escape \"%zz\": write %25 for a percent sign"),
            ("kernel://a/%4", "at character 12: invalid escape \"%4\": write %25 for a percent sign"),
            ("kernel://a/%ff", "it is not UTF-8 when decoded"),
            ("kernel://[::1/x", "at character 10: the [ has no ]"),
            ("kernel://[::1]x/x", "at character 15: invalid port \"x\""),
            ("kernel://a:x/y", "at character 11: invalid port \":x\": a service has none, remove it"),
            ("kernel://a/x\n", "at character 13: it holds the control character '\\n': remove it"),
            (
                "kernel://a/0123456789012345",
                "at character 12: the interface name \"0123456789012345\" has 16 bytes; Linux takes at most 15",
            ),
            ("kernel://a/..", "holds what Linux does not take in one"),
            ("kernel://a/b%20c", "holds what Linux does not take in one"),
            ("kernel://a/b%25d", "holds what Linux does not take in one"),
            (
                "kernel://a/x,kernel://b/x",
                "network service \"kernel://b/x\" (item 2 of 2): item 1 wants the interface \"x\" too, and a pod has one of each name: give one of them another name",
            ),
        ] {
            let error = NsUrl::parse_list(bad).expect_err(bad).to_string();
            assert!(error.contains(says), "{bad}: {error}");
            assert!(error.contains("expected MECHANISM://SERVICE[@DOMAIN][/INTERFACE]"), "{error}");
        }
        let long = format!("kernel://{}", "a b".repeat(1000));
        assert!(
            long.parse::<NsUrl>().unwrap_err().to_string().len() < 600,
            "an error is no copy of the input"
        );
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics_and_what_is_read_names_a_service(text: String, list in "[kernl:/@?&=%;,\\[\\]#. a-f0-9]{0,60}") {
            let _ = NsUrl::parse_list(&text);
            for url in NsUrl::parse_list(&list).into_iter().flatten() {
                proptest::prop_assert!(!url.service.is_empty() && !url.mechanism.is_empty());
            }
        }

        #[test]
        fn what_is_printed_is_read_again(
            service in "[a-z][a-z0-9.-]{0,20}(@[a-z.]{1,9})?",
            interface in proptest::option::of("[a-z][a-z0-9-]{0,14}"),
            labels in proptest::collection::btree_map("[a-zA-Z]{1,8}", "[a-z0-9./-]{0,8}", 0..4),
        ) {
            let url = NsUrl { mechanism: "KERNEL".into(), service, interface, labels, ignored: vec![] };
            proptest::prop_assert_eq!(url.to_string().parse::<NsUrl>().unwrap(), url);
        }
    }
}
