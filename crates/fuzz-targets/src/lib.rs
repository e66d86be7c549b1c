//! For tests: every decoder of what others send, as a function of bytes. None may panic, and what it takes it must be
//! able to say again.
//!
//! `fuzz/` feeds them what libFuzzer makes up; the test of this crate feeds them the corpora that are in the tree.

use std::fmt::Debug;

use nsm_api::{
    limits,
    nsurl::NsUrl,
    path,
    pb::{
        connection::{Connection, ConnectionEvent, MonitorScopeSelector},
        networkservice::NetworkServiceRequest,
        registry::{
            NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceQuery,
        },
    },
};
use nsm_registry::path::RegistrationPath;
use prost::Message;

/// A decoder.
pub type Target = fn(&[u8]);

/// All of them, by the names of their corpora.
pub const TARGETS: [(&str, Target); 8] = [
    ("messages", messages),
    ("path", connection_path),
    ("nsurl", nsurl),
    ("registration_path", registration_path),
    ("token", token),
    ("netlink", netlink),
    ("resource", resource),
    ("rules", rules),
];

/// Every message that peers send, and the checks that it goes through first.
pub fn messages(bytes: &[u8]) {
    if let Some(request) = again::<NetworkServiceRequest>(bytes) {
        let _ = limits::check_request(&request);
        for mechanism in &request.mechanism_preferences {
            let _ = (mechanism.inode(), mechanism.vni());
        }
    }
    if let Some(conn) = again::<Connection>(bytes) {
        let _ = limits::check_connection(&conn);
    }
    again::<ConnectionEvent>(bytes);
    again::<MonitorScopeSelector>(bytes);
    if let Some(service) = again::<NetworkService>(bytes) {
        let _ = nsm_registry::limits::check_service(&service);
    }
    if let Some(endpoint) = again::<NetworkServiceEndpoint>(bytes) {
        let _ = nsm_registry::limits::check_endpoint(&endpoint);
    }
    again::<NetworkServiceQuery>(bytes);
    again::<NetworkServiceEndpointQuery>(bytes);
}

/// The path of a connection, through a hop and back.
pub fn connection_path(bytes: &[u8]) {
    let Ok(mut conn) = Connection::decode(bytes) else { return };
    let before = conn.clone();
    let _ = (path::earliest_expiry(&conn), path::expiry_before_us(&conn), path::client_id(&conn).len());
    let Ok(asker) = path::step(&mut conn, "me", || "fresh".into()) else { return };
    assert_eq!(path::current(&conn).map(|segment| segment.name.as_str()), Some("me"));
    let _ = path::graft(&mut before.clone(), &conn);
    path::begin_anew(&mut conn, "anew".into());
    path::restore(&mut conn, asker).expect("the asker is left of us");
}

/// The list of services that a client is told.
pub fn nsurl(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for url in NsUrl::parse_list(text).into_iter().flatten() {
        let _ = url.preference();
    }
    let _ = text.parse::<nsm_transport::DialUrl>();
    let _ = text.parse::<nsm_transport::ListenUrl>();
}

/// The `path` header of registrations.
pub fn registration_path(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(mut path) = RegistrationPath::decode(text) else { return };
    let same = RegistrationPath::decode(&path.encode()).expect("what we write we read");
    assert!(same == path, "the path has changed by writing and reading it");
    let _ = path.step("caller", "own");
}

/// A token, a time beside it, and the names in it.
pub fn token(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let claims = nsm_identity::token::claims(text);
    assert_eq!(claims.is_ok(), nsm_identity::token::decode_parts(text).is_ok(), "two readers disagree");
    let _ = nsm_identity::token::parse_rfc3339(text);
    if let Ok(id) = text.parse::<nsm_identity::SpiffeId>() {
        assert_eq!(id.as_str(), text);
    }
}

/// What comes from a netlink socket: only the kernel writes there, but it has more versions than we have seen.
pub fn netlink(bytes: &[u8]) {
    let _ = nsm_kernel::netlink::understood(bytes);
}

/// YAML resources of an operator.
pub fn resource(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = nsm_api::resource::parse(text);
    }
}

/// Rules of a firewall.
pub fn rules(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(rules) = nsm_cnf::rules::Rules::parse(text)
    {
        let _ = rules.to_string();
    }
}

fn again<M: Message + Default + PartialEq + Debug>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    let written = message.encode_to_vec();
    let same = M::decode(&written[..]).expect("what we write we read");
    assert_eq!(same.encode_to_vec(), written, "written twice, it is not the same");
    let _ = format!("{message:?}");
    Some(message)
}
