//! What a client asks for, in one line: `kernel://service/interface?label=value`
//! (the grammar of spec/kubernetes.md section 1).

use std::{collections::BTreeMap, str::FromStr};

use crate::pb::connection::Mechanism;

/// Linux' limit for interface names, without the terminating zero (`IFNAMSIZ` of linux/if.h).
pub const MAX_INTERFACE_NAME: usize = 15;

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
}

/// What is wrong with a network-service URL, and what it should look like.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "network service {url:?}: {problem}; expected MECHANISM://SERVICE[@DOMAIN][/INTERFACE][?LABEL=VALUE&…], for example kernel://my-service/nsm0?app=web"
)]
pub struct BadNsUrl {
    /// The text as given.
    pub url: String,
    /// What about it cannot be used.
    pub problem: String,
}

impl NsUrl {
    /// A comma-separated list, as in the annotation `networkservicemesh.io` and in `NSM_NETWORK_SERVICES`.
    ///
    /// # Errors
    /// The first item that is not a network-service URL; an item that is empty or starts with a blank.
    pub fn parse_list(list: &str) -> Result<Vec<Self>, BadNsUrl> {
        if list.is_empty() {
            return Ok(Vec::new());
        }
        list.split(',').map(str::parse).collect()
    }

    /// The preference that a client puts into its request.
    #[must_use]
    pub fn preference(&self) -> Mechanism {
        let mut m = Mechanism::new(crate::mechanism::LOCAL, &self.mechanism);
        if let Some(name) = &self.interface {
            m.set(crate::mechanism::key::NAME, name);
        }
        m
    }
}

impl FromStr for NsUrl {
    type Err = BadNsUrl;

    fn from_str(text: &str) -> Result<Self, BadNsUrl> {
        let bad = |problem: &str| BadNsUrl { url: text.chars().take(200).collect(), problem: problem.into() };
        if text.is_empty() {
            return Err(bad("it is empty (a trailing or doubled comma?)"));
        }
        if text.trim() != text {
            return Err(bad("blanks around an item are not allowed"));
        }
        let url = url::Url::parse(text).map_err(|e| match e {
            url::ParseError::RelativeUrlWithoutBase => bad("it has no MECHANISM://"),
            other => bad(&other.to_string()),
        })?;
        if !text[url.scheme().len()..].starts_with("://") {
            return Err(bad("it has no MECHANISM://"));
        }
        let host = url.host_str().map(|h| h.trim_matches(['[', ']'])).filter(|h| !h.is_empty());
        let host = host.ok_or_else(|| bad("it names no service"))?;
        let service =
            if url.username().is_empty() { host.to_owned() } else { format!("{}@{host}", url.username()) };
        let interface = url.path().rsplit('/').next().filter(|name| !name.is_empty()).map(str::to_owned);
        if let Some(name) = &interface {
            check_interface_name(name).map_err(|problem| bad(&problem))?;
        }
        let mut labels = BTreeMap::<String, String>::new();
        for (key, value) in url.query_pairs() {
            // Repeated keys are joined, which is how a value with a comma is written.
            labels
                .entry(key.into_owned())
                .and_modify(|v| *v = format!("{v},{value}"))
                .or_insert_with(|| value.into_owned());
        }
        Ok(Self { mechanism: url.scheme().to_uppercase(), service, interface, labels })
    }
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
        || name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
    {
        return Err(format!(
            "the interface name {name:?} holds what Linux does not take in one (a slash, a colon, white space, or it is a dot)"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar() {
        let one = |s: &str| s.parse::<NsUrl>().unwrap();
        let plain = one("kernel://secure-intranet-connectivity/nsm0");
        assert_eq!(
            (plain.mechanism.as_str(), plain.service.as_str(), plain.interface.as_deref()),
            ("KERNEL", "secure-intranet-connectivity", Some("nsm0"))
        );
        assert_eq!(one("kernel://finance@my.cluster2/nsm-1").service, "finance@my.cluster2");
        assert_eq!(one("kernel://s").interface, None);
        assert_eq!(one("kernel://s/").interface, None);
        assert_eq!(one("kernel://s/a/b").interface.as_deref(), Some("b"));
        assert_eq!(one("kernel://s:8080/b").service, "s");
        assert_eq!(
            one("memif://s?a=1&a=2&b=x%20y#z").labels,
            [("a".into(), "1,2".into()), ("b".into(), "x y".into())].into()
        );
        assert_eq!(NsUrl::parse_list("kernel://a/x,kernel://b/y").unwrap().len(), 2);
        assert_eq!(NsUrl::parse_list(""), Ok(vec![]));
    }

    #[test]
    fn what_cannot_work_is_refused_at_once() {
        for (bad, says) in [
            ("kernel://a/x, kernel://b/y", "blanks"),
            ("kernel://a/x,", "empty"),
            ("service/if", "no MECHANISM"),
            ("kernel:///nsm0", "service"),
            ("kernel:a", "MECHANISM://"),
            ("kernel://a/0123456789012345", "16 bytes"),
            ("kernel://a b/x", "invalid"),
            ("kernel://a:x/y", "port"),
        ] {
            let error = NsUrl::parse_list(bad).unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }
}
