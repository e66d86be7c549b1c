//! Bounds of what a peer may send: far above what meshes use, far below what hurts.

use crate::{
    mechanism::{BadInodeUrl, kind},
    nsurl::check_interface_name,
    pb::{
        connection::{Connection, Mechanism},
        networkservice::NetworkServiceRequest,
    },
    unknown::Unknown,
};

/// Labels, parameters and similar maps: entries.
pub const MAX_ENTRIES: usize = 256;
/// One string: bytes. Tokens and certificates are the longest that occur.
pub const MAX_TEXT: usize = 16 * 1024;
/// A metric's key or value in the path: bytes. They are counters and names of interfaces.
pub const MAX_METRIC: usize = 1024;
/// What names a certificate: bytes.
pub const MAX_SIGNER: usize = 64;
/// Certificates of a chain, and bytes of one: those of SPIFFE have some 500.
pub const MAX_CHAIN: usize = 8;
/// As above.
pub const MAX_CERTIFICATE: usize = 4096;
/// Addresses, routes, prefixes and similar lists: items.
pub const MAX_ITEMS: usize = 4096;

/// What is wrong with a request, said to the one who sent it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The request carries nothing.
    #[error("the request has no connection")]
    NoConnection,
    /// No service, so nobody can be found.
    #[error("the request names no network service")]
    NoService,
    /// A segment of the path that says nothing: neither policies nor wires could be told whose it is.
    #[error("path segment {segment} has no {what}; every hop writes its name and its id for the connection")]
    Segment {
        /// its index
        segment: usize,
        /// what it lacks
        what: &'static str,
    },
    /// A map or list beyond its bound.
    #[error("{what} has {got} entries; at most {max} are accepted")]
    TooMany {
        /// the field
        what: &'static str,
        /// how many came
        got: usize,
        /// the bound
        max: usize,
    },
    /// A string beyond its bound.
    #[error("{what} has {got} bytes; at most {max} are accepted")]
    TooLong {
        /// the field
        what: &'static str,
        /// its length
        got: usize,
        /// the bound
        max: usize,
    },
    /// A name or id that would spoil a log line or a terminal.
    #[error("{0} holds control characters; send it without them")]
    Control(&'static str),
    /// An interface name that Linux does not take.
    #[error("{0}")]
    InterfaceName(String),
    /// A file reference of another form than `inode://`.
    #[error("{0}")]
    Inode(#[from] BadInodeUrl),
    /// An address that is not one.
    #[error("{what} holds {value:?}, which is not {expected}")]
    Address {
        /// the field
        what: &'static str,
        /// what it holds
        value: String,
        /// what it should hold
        expected: &'static str,
    },
}

/// Checks a whole request before anything is done for it.
///
/// # Errors
/// The first thing that is wrong.
pub fn check_request(request: &NetworkServiceRequest) -> Result<(), Malformed> {
    let conn = request.connection.as_ref().ok_or(Malformed::NoConnection)?;
    if conn.network_service.is_empty() {
        return Err(Malformed::NoService);
    }
    unknown(&request.unknown)?;
    few("mechanism_preferences", request.mechanism_preferences.len(), 64)?;
    request.mechanism_preferences.iter().try_for_each(check_mechanism)?;
    check_connection(conn)
}

/// Checks a connection, as it stands in a Request, a Close or an answer.
///
/// # Errors
/// The first thing that is wrong.
pub fn check_connection(conn: &Connection) -> Result<(), Malformed> {
    unknown(&conn.unknown)?;
    name("connection.id", &conn.id, 253)?;
    name("connection.network_service", &conn.network_service, 512)?;
    name("connection.network_service_endpoint_name", &conn.network_service_endpoint_name, 512)?;
    name("connection.payload", &conn.payload, 253)?;
    few("connection.labels", conn.labels.len(), MAX_ENTRIES)?;
    plain_texts("connection.labels", &conn.labels, MAX_TEXT)?;
    unknown(conn.path.iter().flat_map(|path| &path.unknown))?;
    few("the path", crate::path::segments(conn).len(), crate::path::MAX_SEGMENTS)?;
    for (index, segment) in crate::path::segments(conn).iter().enumerate() {
        for (what, text) in [("name", &segment.name), ("id", &segment.id)] {
            if text.is_empty() {
                return Err(Malformed::Segment { segment: index, what });
            }
        }
        unknown(&segment.unknown)?;
        few("path segment signer", segment.signer.len(), MAX_SIGNER)?;
        few("path segment chain", segment.chain.len(), MAX_CHAIN)?;
        segment.chain.iter().try_for_each(|der| few("path segment chain", der.len(), MAX_CERTIFICATE))?;
        name("path segment name", &segment.name, 253)?;
        name("path segment id", &segment.id, 253)?;
        short("path segment token", &segment.token, MAX_TEXT)?;
        few("path segment metrics", segment.metrics.len(), MAX_ENTRIES)?;
        plain_texts("path segment metrics", &segment.metrics, MAX_METRIC)?;
    }
    if let Some(m) = &conn.mechanism {
        check_mechanism(m)?;
    }
    let Some(context) = &conn.context else { return Ok(()) };
    unknown(&context.unknown)?;
    if let Some(dns) = &context.dns_context {
        unknown(&dns.unknown)?;
        unknown(dns.configs.iter().flat_map(|config| &config.unknown))?;
    }
    unknown(context.ethernet_context.iter().flat_map(|ethernet| &ethernet.unknown))?;
    few("context.extra_context", context.extra_context.len(), MAX_ENTRIES)?;
    let Some(ip) = &context.ip_context else { return Ok(()) };
    unknown(&ip.unknown)?;
    for (what, list) in [("src_ip_addrs", &ip.src_ip_addrs), ("dst_ip_addrs", &ip.dst_ip_addrs)] {
        few(what, list.len(), MAX_ITEMS)?;
        list.iter().try_for_each(|a| cidr(what, a))?;
    }
    for (what, list) in [("src_routes", &ip.src_routes), ("dst_routes", &ip.dst_routes)] {
        few(what, list.len(), MAX_ITEMS)?;
        unknown(list.iter().flat_map(|route| &route.unknown))?;
        for route in list {
            cidr(what, &route.prefix)?;
            if !route.next_hop.is_empty() {
                address(what, &route.next_hop)?;
            }
        }
    }
    few("excluded_prefixes", ip.excluded_prefixes.len(), MAX_ITEMS)?;
    few("ip_neighbors", ip.ip_neighbors.len(), MAX_ITEMS)?;
    unknown(ip.ip_neighbors.iter().flat_map(|neighbour| &neighbour.unknown))?;
    ip.ip_neighbors.iter().try_for_each(|n| address("ip_neighbors", &n.ip))?;
    few("extra_prefix_request", ip.extra_prefix_request.len(), MAX_ENTRIES)?;
    unknown(ip.extra_prefix_request.iter().flat_map(|asked| &asked.unknown))?;
    few("policies", ip.policies.len(), MAX_ENTRIES)?;
    unknown(ip.policies.iter().flat_map(|policy| &policy.unknown))?;
    unknown(ip.policies.iter().flat_map(|policy| &policy.routes).flat_map(|route| &route.unknown))
}

fn check_mechanism(m: &Mechanism) -> Result<(), Malformed> {
    unknown(&m.unknown)?;
    few("mechanism.parameters", m.parameters.len(), MAX_ENTRIES)?;
    texts("mechanism.parameters", &m.parameters)?;
    if m.r#type == kind::KERNEL {
        if let Some(name) = m.get(crate::mechanism::key::NAME) {
            check_interface_name(name).map_err(Malformed::InterfaceName)?;
        }
        m.inode()?;
    }
    Ok(())
}

fn few(what: &'static str, got: usize, max: usize) -> Result<(), Malformed> {
    if got > max { Err(Malformed::TooMany { what, got, max }) } else { Ok(()) }
}

/// Checks the fields that we only pass on, of one message or of all in a list together.
///
/// # Errors
/// They are longer than any text may be.
pub fn unknown<'a>(kept: impl IntoIterator<Item = &'a Unknown>) -> Result<(), Malformed> {
    let got = kept.into_iter().map(Unknown::encoded_len).sum();
    if got > MAX_TEXT {
        Err(Malformed::TooLong { what: "what is unknown in a message", got, max: MAX_TEXT })
    } else {
        Ok(())
    }
}

fn short(what: &'static str, text: &str, max: usize) -> Result<(), Malformed> {
    if text.len() > max { Err(Malformed::TooLong { what, got: text.len(), max }) } else { Ok(()) }
}

fn name(what: &'static str, text: &str, max: usize) -> Result<(), Malformed> {
    if text.chars().any(char::is_control) { Err(Malformed::Control(what)) } else { short(what, text, max) }
}

fn texts(what: &'static str, map: &std::collections::BTreeMap<String, String>) -> Result<(), Malformed> {
    map.iter().try_for_each(|(k, v)| short(what, k, MAX_TEXT).and_then(|()| short(what, v, MAX_TEXT)))
}

/// Texts that people are shown.
fn plain_texts(
    what: &'static str,
    map: &std::collections::BTreeMap<String, String>,
    max: usize,
) -> Result<(), Malformed> {
    map.iter().try_for_each(|(k, v)| name(what, k, max).and_then(|()| name(what, v, max)))
}

fn cidr(what: &'static str, value: &str) -> Result<(), Malformed> {
    // Upstream carries bare addresses too, and skips what has no mask (spec/data-plane.md 0.4).
    match value.parse::<ipnet::IpNet>() {
        Ok(_) => Ok(()),
        Err(_) => address(what, value),
    }
}

fn address(what: &'static str, value: &str) -> Result<(), Malformed> {
    value.parse::<std::net::IpAddr>().map(|_| ()).map_err(|_| Malformed::Address {
        what,
        value: value.chars().take(60).collect(),
        expected: "an address or ADDRESS/LENGTH",
    })
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::pb::{
        connection::{Path, PathSegment},
        connectioncontext::{ConnectionContext, IpContext, Route},
    };

    fn good() -> NetworkServiceRequest {
        NetworkServiceRequest {
            connection: Some(Connection { network_service: "s".into(), ..Connection::default() }),
            mechanism_preferences: vec![Mechanism::kernel("nsm0", None)],
            ..NetworkServiceRequest::default()
        }
    }

    #[test]
    fn good_requests_pass() {
        assert_eq!(check_request(&good()), Ok(()));
    }

    #[test]
    fn each_kind_of_nonsense_is_named() {
        let mut request = good();
        request.connection.as_mut().unwrap().labels =
            (0..100_000).map(|i| (i.to_string(), String::new())).collect();
        assert_eq!(
            check_request(&request).unwrap_err().to_string(),
            "connection.labels has 100000 entries; at most 256 are accepted"
        );

        for name in ["x".repeat(40), "a/b".into()] {
            let mut request = good();
            request.mechanism_preferences = vec![Mechanism::kernel(&name, None)];
            assert!(matches!(check_request(&request), Err(Malformed::InterfaceName(_))), "{name}");
        }

        let mut request = good();
        request.connection.as_mut().unwrap().context = Some(ConnectionContext {
            ip_context: Some(IpContext { src_ip_addrs: vec!["500.1.1.1/32".into()], ..IpContext::default() }),
            ..ConnectionContext::default()
        });
        assert!(check_request(&request).unwrap_err().to_string().contains("500.1.1.1/32"));

        let mut request = good();
        request.connection.as_mut().unwrap().id = "a\nroot logged in".into();
        assert_eq!(check_request(&request), Err(Malformed::Control("connection.id")));

        let mut request = good();
        let labels = [("app".to_owned(), "\x1b[2J".to_owned())];
        request.connection.as_mut().unwrap().labels = labels.into();
        assert_eq!(check_request(&request), Err(Malformed::Control("connection.labels")));

        let metrics = [
            (
                "k".repeat(MAX_METRIC + 1),
                Malformed::TooLong { what: "path segment metrics", got: MAX_METRIC + 1, max: MAX_METRIC },
            ),
            ("rx\n".into(), Malformed::Control("path segment metrics")),
        ];
        for (key, error) in metrics {
            let mut request = good();
            let segment = PathSegment {
                name: "a".into(),
                id: "1".into(),
                metrics: [(key, "1".to_owned())].into(),
                ..PathSegment::default()
            };
            request.connection.as_mut().unwrap().path =
                Some(Path { unknown: None, index: 0, path_segments: vec![segment] });
            assert_eq!(check_request(&request), Err(error));
        }

        let mut request = good();
        let nobody = PathSegment { name: "somebody".into(), ..PathSegment::default() };
        request.connection.as_mut().unwrap().path =
            Some(Path { unknown: None, index: 0, path_segments: vec![nobody] });
        assert_eq!(check_request(&request), Err(Malformed::Segment { segment: 0, what: "id" }));

        let mut request = good();
        let long = prost::bytes::Bytes::from([&b"\x62\x80\x80\x02"[..], &[0; 0x8000]].concat());
        request.mechanism_preferences[0].merge(long).unwrap();
        assert!(
            check_request(&request)
                .unwrap_err()
                .to_string()
                .starts_with("what is unknown in a message has 32772 bytes")
        );

        // What each may hold, all of a list together may hold.
        let half = prost::bytes::Bytes::from([&b"\x62\x80\x60"[..], &[0; 0x3000]].concat());
        for (routes, good_so_far) in [(1, true), (2, false)] {
            let mut route = Route { prefix: "10.0.0.0/8".into(), ..Route::default() };
            route.merge(half.clone()).unwrap();
            let ip = IpContext { src_routes: vec![route; routes], ..IpContext::default() };
            let mut request = good();
            request.connection.as_mut().unwrap().context =
                Some(ConnectionContext { ip_context: Some(ip), ..ConnectionContext::default() });
            assert_eq!(check_request(&request).is_ok(), good_so_far, "{routes}");
        }

        let mut request = good();
        request.mechanism_preferences[0].set("inodeURL", "file:///proc/1/ns/net");
        assert!(matches!(check_request(&request), Err(Malformed::Inode(_))));
        assert_eq!(check_request(&NetworkServiceRequest::default()), Err(Malformed::NoConnection));
    }
}
