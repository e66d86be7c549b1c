//! Bad input over the wire, to a real manager: each is refused with an error that says what was wrong with it, and
//! nothing is made for it.

use std::time::{Duration, SystemTime};

use nsm_api::{
    mechanism::{InodeUrl, key},
    pb::{
        connection::{Connection, PathSegment},
        connectioncontext::{ConnectionContext, IpContext},
        networkservice::NetworkServiceRequest,
    },
};
use nsm_identity::ca::Authority;
use tonic::Code;

use crate::{
    harness::{self, Mesh},
    raw::{Raw, file, good, in_runtime, set_inode},
};

const PODS: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: gw, node: node1, endpoint: {services: [plain], cidrPrefix: [172.16.1.2/31]}}
";
/// Long enough for whatever a hop does with a request.
const LONG: Duration = Duration::from_secs(10);

#[test]
fn a_request_that_makes_no_sense_is_refused_and_leaves_nothing() {
    let Some(mesh) = Mesh::up("a_request_that_makes_no_sense_is_refused_and_leaves_nothing", PODS) else {
        return;
    };
    mesh.inside("a", "bad requests");
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn a_token_that_proves_nothing_is_refused_and_leaves_nothing() {
    let Some(mesh) = Mesh::up("a_token_that_proves_nothing_is_refused_and_leaves_nothing", PODS) else {
        return;
    };
    mesh.inside("a", "bad tokens");
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn a_namespace_that_is_not_the_callers_is_refused_and_leaves_nothing() {
    let Some(mesh) = Mesh::up("a_namespace_that_is_not_the_callers_is_refused_and_leaves_nothing", PODS)
    else {
        return;
    };
    mesh.inside("a", "bad namespaces");
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

#[test]
fn a_caller_that_leaves_at_any_moment_leaves_nothing() {
    let test = "a_caller_that_leaves_at_any_moment_leaves_nothing";
    let Some(mesh) = Mesh::up(test, &PODS.replace("172.16.1.2/31", "172.16.1.0/24")) else { return };
    mesh.inside("a", "leaving");
    mesh.nothing_is_left(&["a", "b", "gw"]);
}

/// Asks, and gives up after ever longer times: before anything is done, in the middle, and just as the answer comes.
pub(crate) fn leaving(lab: &str) {
    in_runtime(async {
        let raw = Raw::connect(lab, "nsm.io.sock").await;
        let (url, _) = file("/proc/self/ns/net");
        for half_milliseconds in 0..160 {
            raw.fds.send(file("/proc/self/ns/net").1);
            let request = good(&format!("raw-{half_milliseconds}"), "nsm0", url);
            let patience = Duration::from_micros(500 * half_milliseconds);
            let asked = raw.request(request.clone(), Some(raw.token()), LONG);
            match tokio::time::timeout(patience, asked).await {
                Ok(Ok(answer)) => raw.close(answer).await.expect("closed"),
                // The name may still be that of the one before.
                Ok(Err(_)) => {}
                // As our clients do: the answer may be on its way, and with it an id that is not known yet.
                Err(_) => raw.close(request.connection.expect("good")).await.expect("closed"),
            }
        }
    });
}

/// Everything that the message itself shows to be wrong.
pub(crate) fn bad_requests(lab: &str) {
    in_runtime(async {
        let raw = Raw::connect(lab, "nsm.io.sock").await;
        let (url, _) = file("/proc/self/ns/net");
        let conn = |change: &dyn Fn(&mut Connection)| {
            let mut request = good("raw-0", "nsm0", url);
            change(request.connection.as_mut().expect("good"));
            request
        };
        let ip = |change: &dyn Fn(&mut IpContext)| {
            let mut ip = IpContext::default();
            change(&mut ip);
            let context = ConnectionContext { ip_context: Some(ip), ..ConnectionContext::default() };
            conn(&|conn| conn.context = Some(context.clone()))
        };
        let labels: std::collections::BTreeMap<_, _> =
            (0..100_000).map(|i| (format!("k{i}"), "v".to_owned())).collect();
        let long = "x".repeat(40);
        let inode = |text: &str| {
            let mut request = good("raw-0", "nsm0", url);
            set_inode(&mut request, text);
            request
        };
        let parameters = |change: &dyn Fn(&mut nsm_api::pb::connection::Mechanism)| {
            let mut request = good("raw-0", "nsm0", url);
            change(&mut request.mechanism_preferences[0]);
            request
        };
        let cases: Vec<(&str, NetworkServiceRequest, Code, &str)> = vec![
            (
                "nothing",
                NetworkServiceRequest::default(),
                Code::InvalidArgument,
                "the request has no connection",
            ),
            (
                "no service",
                conn(&|c| c.network_service.clear()),
                Code::InvalidArgument,
                "the request names no network service",
            ),
            (
                "no path",
                conn(&|c| c.path = None),
                Code::PermissionDenied,
                "the path has no segment 0 (it has 0); the request came without a usable path",
            ),
            (
                "an empty path",
                conn(&|c| c.path = Some(nsm_api::pb::connection::Path::default())),
                Code::PermissionDenied,
                "the request came without a usable path",
            ),
            (
                "an empty segment",
                conn(&|c| {
                    c.id.clear();
                    c.path.as_mut().expect("good").path_segments[0] = PathSegment::default();
                }),
                Code::InvalidArgument,
                "path segment 0 has no name; every hop writes its name and its id for the connection",
            ),
            (
                "a segment without an id",
                conn(&|c| {
                    c.id.clear();
                    c.path.as_mut().expect("good").path_segments[0].id.clear();
                }),
                Code::InvalidArgument,
                "path segment 0 has no id; every hop writes its name and its id for the connection",
            ),
            (
                "an index past the end",
                conn(&|c| c.path.as_mut().expect("good").index = 7),
                Code::Unknown,
                "Path.Index+1==8 should be less or equal len(Path.PathSegments)==1",
            ),
            (
                "the largest index",
                conn(&|c| c.path.as_mut().expect("good").index = u32::MAX),
                Code::Unknown,
                "Path.Index+1==4294967296 should be less or equal len(Path.PathSegments)==1",
            ),
            (
                "another's id",
                conn(&|c| c.id = "raw-1".into()),
                Code::Unknown,
                "Current PathSegment.Id==\"raw-0\" should be equal Connection.Id==\"raw-1\"",
            ),
            (
                "1000 segments",
                conn(&|c| {
                    let path = c.path.as_mut().expect("good");
                    path.path_segments = vec![path.path_segments[0].clone(); 1000];
                }),
                Code::InvalidArgument,
                "the path has 1000 entries; at most 128 are accepted",
            ),
            (
                "a long interface name",
                parameters(&|m| m.set(key::NAME, &long)),
                Code::InvalidArgument,
                "40 bytes",
            ),
            (
                "an interface name with a slash",
                parameters(&|m| m.set(key::NAME, "a/b")),
                Code::InvalidArgument,
                "\"a/b\"",
            ),
            (
                "an address that is not one",
                ip(&|ip| ip.src_ip_addrs = vec!["500.1.2.3/32".into()]),
                Code::InvalidArgument,
                "src_ip_addrs holds \"500.1.2.3/32\", which is not an address or ADDRESS/LENGTH",
            ),
            (
                "a route that is not one",
                ip(&|ip| {
                    ip.src_routes = vec![nsm_api::pb::connectioncontext::Route {
                        unknown: None,
                        prefix: "10.0.0.0/8".into(),
                        next_hop: "nowhere".into(),
                    }];
                }),
                Code::InvalidArgument,
                "src_routes holds \"nowhere\", which is not an address",
            ),
            (
                "100,000 labels",
                conn(&|c| c.labels.clone_from(&labels)),
                Code::InvalidArgument,
                "connection.labels has 100000 entries; at most 256 are accepted",
            ),
            (
                "a namespace by path",
                inode("file:///proc/1/ns/net"),
                Code::InvalidArgument,
                "\"file:///proc/1/ns/net\"",
            ),
            ("a namespace by words", inode("inode://4/four"), Code::InvalidArgument, "\"inode://4/four\""),
            (
                "no namespace",
                parameters(&|m| {
                    m.parameters.remove(key::INODE_URL);
                }),
                Code::InvalidArgument,
                "the KERNEL mechanism names no network namespace (parameter inodeURL)",
            ),
            (
                "no mechanism",
                NetworkServiceRequest { mechanism_preferences: Vec::new(), ..conn(&|_| {}) },
                Code::InvalidArgument,
                "this forwarder builds LOCAL KERNEL and REMOTE VXLAN",
            ),
            (
                "an unknown mechanism",
                parameters(&|m| "CARRIER-PIGEON".clone_into(&mut m.r#type)),
                Code::InvalidArgument,
                "LOCAL CARRIER-PIGEON",
            ),
        ];
        for (what, request, code, text) in cases {
            // What the request names is sent along, so that nothing else is wrong with it.
            raw.fds.send(file("/proc/self/ns/net").1);
            refused(&raw, lab, what, request, code, &[text], LONG).await;
        }
        works(&raw, lab).await;
    });
}

/// Tokens in other hands than their signer's, out of date, or for somebody else.
pub(crate) fn bad_tokens(lab: &str) {
    in_runtime(async {
        let raw = Raw::connect(lab, "nsm.io.sock").await;
        let now = SystemTime::now();
        let (me, manager) = (raw.identity.id().clone(), raw.peer.clone());
        // A CA of the same name with other keys, and another SVID of this mesh's CA with our name but another key.
        let forger = Authority::new(me.trust_domain(), now).expect("a CA");
        let forged = forger.identity(&me, Duration::from_secs(600), now).expect("an identity");
        let other: nsm_identity::SpiffeId =
            format!("{}/pod/b", me.trust_domain().id()).parse().expect("an ID");
        let impostor = forger.identity(&other, Duration::from_secs(600), now).expect("an identity");
        let own = raw.identity.svid();
        let cases = [
            (
                "a forged token",
                Some(raw.token_of(forged.svid(), &manager, now)),
                format!(
                    "the token of \"{me}\" in path segment 0 was not signed by the connection's peer, {me}"
                ),
            ),
            (
                "a token in another's name",
                Some(raw.token_of(impostor.svid(), &manager, now)),
                format!(
                    "the token of \"{other}\" in path segment 0 was not signed by the connection's peer, {me}"
                ),
            ),
            (
                "an expired token",
                Some(raw.token_of(own, &manager, now - Duration::from_secs(3660))),
                format!("the token of \"{me}\" in path segment 0 expired 36"),
            ),
            (
                "a token for another audience",
                Some(raw.token_of(own, &other, now)),
                format!(
                    "the token in path segment 0 is addressed to [\"{other}\"], but the next segment's was made by \"{manager}\""
                ),
            ),
            ("no token", None, "the call has no nsm-client-token with its expiry".into()),
            (
                "nonsense",
                Some(nsm_identity::Token::received("a.b.c".into(), now + LONG)),
                "path segment 0 holds no JWT".into(),
            ),
        ];
        let (url, _) = file("/proc/self/ns/net");
        for (what, token, text) in cases {
            raw.fds.send(file("/proc/self/ns/net").1);
            let request = good("raw-0", "nsm0", url);
            let status = raw.request(request, token, LONG).await.expect_err(what);
            expect(lab, what, &status, Code::PermissionDenied, &["no sufficient privileges", &text]);
        }
        // A hop before us whose token is out of date is no excuse either.
        let mut request = good("raw-0", "nsm0", url);
        let path = request.connection.as_mut().expect("good").path.as_mut().expect("good");
        let old = raw.token_of(impostor.svid(), &me, now - Duration::from_secs(3660));
        path.path_segments.insert(
            0,
            PathSegment {
                name: "before".into(),
                id: "before-0".into(),
                token: old.jwt().into(),
                ..PathSegment::default()
            },
        );
        path.index = 1;
        raw.fds.send(file("/proc/self/ns/net").1);
        let status = raw.request(request, Some(raw.token()), LONG).await.expect_err("stale");
        let text = format!("the token of \"{other}\" in path segment 0 expired 36");
        expect(
            lab,
            "a stale token before ours",
            &status,
            Code::PermissionDenied,
            &[&text, "refresh, or compare the clocks"],
        );
        works(&raw, lab).await;
    });
}

/// Namespaces that are another's, are none, or never come.
pub(crate) fn bad_namespaces(lab: &str) {
    in_runtime(async {
        let raw = Raw::connect(lab, "nsm.io.sock").await;
        let me = raw.identity.id().clone();
        let (own, _) = file("/proc/self/ns/net");

        let (url, fd) = file(&format!("/run/netns/{lab}.b"));
        raw.fds.send(fd);
        let text = format!(
            "{url} is not the network namespace of {me} (process {}), which is {own}",
            std::process::id()
        );
        let request = good("raw-0", "nsm0", url);
        let hint = "a workload gets wires only into its own namespace; list its SPIFFE ID in NSM_NAMESPACE_DELEGATES";
        refused(&raw, lab, "pod b's namespace", request, Code::PermissionDenied, &[&text, hint], LONG).await;

        // Our own as a second preference does not make up for it.
        for path in [format!("/run/netns/{lab}.b"), "/proc/self/ns/net".to_owned()] {
            raw.fds.send(file(&path).1);
        }
        let mut request = good("raw-0", "nsm0", own);
        request.mechanism_preferences.push(nsm_api::pb::connection::Mechanism::kernel("nsm1", Some(url)));
        refused(&raw, lab, "pod b's beside ours", request, Code::PermissionDenied, &[&text], LONG).await;

        let (url, fd) = file("/proc/self/ns/mnt");
        raw.fds.send(fd);
        let text = format!("{url} is not the network namespace of {me}");
        let request = good("raw-0", "nsm0", url);
        refused(&raw, lab, "a mount namespace", request, Code::PermissionDenied, &[&text], LONG).await;

        let (url, fd) = file("/proc/self/exe");
        raw.fds.send(fd);
        let text = format!("descriptor {url} is neither a namespace nor opened O_PATH");
        let request = good("raw-0", "nsm0", url);
        let me_too = me.to_string();
        refused(&raw, lab, "an ordinary file", request, Code::InvalidArgument, &[&text, &me_too], LONG).await;

        let never = InodeUrl { dev: 4, ino: 4_000_000_001 };
        let request = good("raw-0", "nsm0", never);
        let text = format!("descriptor {never} did not arrive in time");
        let short = Duration::from_millis(300);
        refused(&raw, lab, "none at all", request, Code::DeadlineExceeded, &[&text, &me_too], short).await;
        works(&raw, lab).await;
    });
}

/// Sends it with an honest token; it must fail so, and leave nothing.
async fn refused(
    raw: &Raw,
    lab: &str,
    what: &str,
    request: NetworkServiceRequest,
    code: Code,
    texts: &[&str],
    deadline: Duration,
) {
    let status = raw.request(request, Some(raw.token()), deadline).await.expect_err(what);
    expect(lab, what, &status, code, texts);
}

fn expect(lab: &str, what: &str, status: &tonic::Status, code: Code, texts: &[&str]) {
    let said = status.message();
    assert_eq!(status.code(), code, "{what}: {said}");
    for text in texts {
        assert!(said.contains(text), "{what}: {text:?} is not in {said:?}");
    }
    assert!(
        ["manager-node1: ", "forwarder-node1: "].iter().any(|hop| said.starts_with(hop)),
        "{what}: who says it? {said:?}"
    );
    for pod in ["a", "b", "gw"] {
        assert_eq!(harness::links(lab, pod), [], "{what} left a link in {pod}");
    }
    assert_eq!(harness::records(lab), [""; 0].map(std::path::PathBuf::from), "{what} left a record");
}

/// The same connection, asked for honestly, comes up and goes: nothing of the refused ones is in its way.
async fn works(raw: &Raw, lab: &str) {
    let (url, fd) = file("/proc/self/ns/net");
    raw.fds.send(fd);
    let answer = raw.request(good("raw-0", "nsm0", url), Some(raw.token()), LONG).await.expect("a wire");
    assert!(harness::links(lab, "a").iter().any(|link| link.name == "nsm0"), "{answer:?}");
    raw.close(answer).await.expect("closed");
}
