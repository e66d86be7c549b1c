//! For tests: every decoder of what others send, as a function of bytes. None may panic, and what it takes it must be
//! able to say again.
//!
//! `fuzz/` feeds them what libFuzzer makes up; the test of this crate feeds them the corpora that are in the tree.

mod cluster;
mod operators;

use std::fmt::Debug;

use hickory_proto::rr::Name;
use nsm_api::{
    limits,
    nsurl::NsUrl,
    path,
    pb::{
        connection::{Connection, ConnectionEvent, MonitorScopeSelector},
        connectioncontext::{self, ConnectionContext},
        introspect::{Item, LogLevel, Query},
        ipam::{PrefixRequest, PrefixResponse},
        networkservice::NetworkServiceRequest,
        registry::{
            NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
            NetworkServiceEndpointResponse, NetworkServiceQuery, NetworkServiceResponse,
        },
    },
};
use nsm_dns::message::{self, Asked, Told};
use nsm_identity::{Bundles, Leaf, SpiffeId};
use nsm_kernel::{
    netns::NsId,
    plan::{ContextPolicy, ContextRoute, EndPlan, IpContext, Side, WirePlan},
    store::Record,
};
use nsm_registry::path::RegistrationPath;
use nsm_webhook::{inject, review, settings::Settings};
use prost::Message;
use rustls_pki_types::CertificateDer;

pub use cluster::{authorities, kubernetes, signer};
pub use operators::{files, mark, rego, settings};

/// A decoder.
pub type Target = fn(&[u8]);

/// All of them, by the names of their corpora.
pub const TARGETS: [(&str, Target); 19] = [
    ("messages", messages),
    ("path", connection_path),
    ("nsurl", nsurl),
    ("registration_path", registration_path),
    ("token", token),
    ("netlink", netlink),
    ("resource", resource),
    ("rules", rules),
    ("dns", dns),
    ("admission", admission),
    ("certificate", certificate),
    ("record", record),
    ("mark", mark),
    ("settings", settings),
    ("files", files),
    ("rego", rego),
    ("kubernetes", kubernetes),
    ("signer", signer),
    ("authorities", authorities),
];

/// Every message that peers send, asked or as an answer, and the checks that it goes through first.
pub fn messages(bytes: &[u8]) {
    if let Some(request) = again::<NetworkServiceRequest>(bytes) {
        let _ = limits::check_request(&request);
        for mechanism in &request.mechanism_preferences {
            let _ = (mechanism.inode(), mechanism.vni());
        }
    }
    if let Some(conn) = again::<Connection>(bytes) {
        let _ = limits::check_connection(&conn);
        context(conn.context.unwrap_or_default());
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
    again::<NetworkServiceResponse>(bytes);
    again::<NetworkServiceEndpointResponse>(bytes);
    again::<PrefixRequest>(bytes);
    again::<PrefixResponse>(bytes);
    again::<Query>(bytes);
    again::<LogLevel>(bytes);
    if let Some(item) = again::<Item>(bytes) {
        // As one program shows it to another, of another version.
        let shown = serde_json::to_vec(&item).expect("it can be shown");
        assert_eq!(serde_json::from_slice::<Item>(&shown).expect("what we write we read"), item);
    }
    // Their keys are not to be printed, so they cannot be.
    same::<nsm_identity::pb::X509svidResponse>(bytes);
    same::<nsm_identity::pb::X509BundlesResponse>(bytes);
}

/// What a peer wants at an end of the wire, as the forwarder plans it.
fn context(context: ConnectionContext) {
    let ip = context.ip_context.unwrap_or_default();
    let route = |r: &connectioncontext::Route| ContextRoute {
        prefix: r.prefix.clone(),
        next_hop: r.next_hop.clone(),
    };
    let policy = |p: &connectioncontext::PolicyRoute| ContextPolicy {
        from: p.from.clone(),
        proto: p.proto.clone(),
        src_port: p.src_port.clone(),
        dst_port: p.dst_port.clone(),
        routes: p.routes.iter().map(route).collect(),
    };
    let context = IpContext {
        src_addrs: ip.src_ip_addrs.clone(),
        dst_addrs: ip.dst_ip_addrs.clone(),
        src_routes: ip.src_routes.iter().map(route).collect(),
        dst_routes: ip.dst_routes.iter().map(route).collect(),
        policies: ip.policies.iter().map(policy).collect(),
        neighbours: ip.ip_neighbors.iter().map(|n| (n.ip.clone(), n.hardware_address.clone())).collect(),
        mtu: context.mtu,
    };
    let end =
        |side, name| EndPlan::new(side, NsId { dev: 0, ino: 0 }, name, "x").with_context(side, &context);
    if let (Ok(near), Ok(far)) = (end(Side::Near, "near"), end(Side::Far, "far")) {
        let plan = WirePlan::veth("x", near, far);
        let written = serde_json::to_vec(&plan).expect("what was planned can be written");
        let same: WirePlan = serde_json::from_slice(&written).expect("what we write we read");
        assert!(same == plan && !plan.to_string().is_empty(), "it has changed by writing and reading it");
        let _ = plan.validate();
    }
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

/// A packet, as a client's question and as the answer of a server to the same question.
pub fn dns(bytes: &[u8]) {
    let mut packet = bytes.to_vec();
    let Some(flags) = packet.get_mut(2) else { return };
    *flags &= 0x7f;
    let question = match message::asked(&packet) {
        Asked::Question(question) => question,
        Asked::Refuse(refusal) => {
            return assert!(matches!(message::asked(&refusal), Asked::Ignore), "it is no answer");
        }
        Asked::Ignore => return,
    };
    let id = u16::from_be_bytes([bytes[0], bytes[1]]);
    let name = &question.key.name;
    let is_an_answer = |reply: Option<Vec<u8>>, most: usize| {
        let reply = reply.expect("whoever is asked answers");
        assert!(reply.len() <= most, "{} bytes", reply.len());
        assert!(
            !matches!(message::told(&reply, id, name, &question.key), Told::Other),
            "to another question"
        );
    };
    is_an_answer(message::reply(&question, None, true), 4096);
    if let Some(asked) = message::ask(id, name, &question.key) {
        assert!(matches!(message::asked(&asked), Asked::Question(again) if again.key == question.key));
    }
    if let Told::Answer(answer) = message::told(bytes, id, name, &question.key) {
        let _ = message::ttl(&answer);
        is_an_answer(message::reply(&question, Some((name, &answer)), true), 4096);
        is_an_answer(message::reply(&question, Some((&Name::root(), &answer)), false), usize::from(u16::MAX));
    }
}

/// What an API server asks the admission webhook, and anything in the place of the object and of its namespace.
pub fn admission(bytes: &[u8]) {
    let program = |text: &str| text.parse().expect("an image");
    let settings = Settings {
        init_images: vec![program("cmd-nsc-init")],
        images: vec![program("cmd-nsc")],
        ..Settings::default()
    };
    let value = serde_json::from_slice(bytes).unwrap_or(serde_json::Value::Null);
    let namespace = inject::Namespace::of(&settings, &value);
    let _ = review::review(&settings, bytes, &namespace, "unique");
    for (group, kind) in [("", "Pod"), ("apps", "Deployment")] {
        let kind = serde_json::json!({ "group": group, "kind": kind });
        let request = serde_json::json!({ "uid": "1", "kind": kind, "operation": "CREATE", "object": value });
        let review = serde_json::json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request,
        });
        let answer = review::review(&settings, review.to_string().as_bytes(), &namespace, "unique");
        assert_eq!(answer.expect("it is a question")["response"]["uid"], "1");
    }
}

/// A certificate, as it comes in a handshake, in a token's chain or from the Workload API.
pub fn certificate(bytes: &[u8]) {
    let der = CertificateDer::from(bytes.to_vec());
    if let Ok(leaf) = Leaf::parse(der.clone()) {
        assert_eq!(leaf.der(), &der);
        let _ = (leaf.pem(), leaf.not_after(), leaf.id().trust_domain());
    }
    let domain = "spiffe://example.org".parse::<SpiffeId>().expect("an ID").trust_domain();
    let _ = Bundles::default().insert(domain, &[der]);
}

/// The plan of a wire, as an earlier process has left it on the disk.
pub fn record(bytes: &[u8]) {
    let Ok(record) = serde_json::from_slice::<Record>(bytes) else { return };
    if record.plan.validate().is_ok() {
        let written = serde_json::to_vec(&record).expect("what was read can be written");
        let same: Record = serde_json::from_slice(&written).expect("what we write we read");
        // The forwarder's data is any JSON; of its numbers those are not exact that no f64 is.
        assert!(
            same.plan == record.plan && same.nsids == record.nsids,
            "it has changed by writing and reading it"
        );
    }
}

fn again<M: Message + Default + Debug>(bytes: &[u8]) -> Option<M> {
    let message = same::<M>(bytes)?;
    let _ = format!("{message:?}");
    Some(message)
}

fn same<M: Message + Default>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    let written = message.encode_to_vec();
    let same = M::decode(&written[..]).expect("what we write we read");
    assert_eq!(same.encode_to_vec(), written, "written twice, it is not the same");
    Some(message)
}
