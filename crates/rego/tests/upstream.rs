//! Upstream's seven policies, in our words as Rego, give the same verdicts as the Rust ones; files that are no
//! policies are refused; masks name what they name upstream.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs,
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use nsm_api::pb::connection::{Connection, MonitorScopeSelector, Path, PathSegment};
use nsm_identity::{
    Svid,
    ca::Authority,
    policy::{self, Check, Judge, Policies},
    token,
};
use nsm_mesh::monitor::{Hub, Viewer};
use nsm_rego::{Error, Policy, Side, load};
use proptest::prelude::*;
use serde_json::{Value, json};

const HOUR: Duration = Duration::from_secs(3600);

struct Cast {
    hops: Vec<Svid>,
}

static CAST: LazyLock<Cast> = LazyLock::new(|| {
    let now = SystemTime::now();
    let authority = Authority::new("test.lab".parse().unwrap(), now).unwrap();
    let issue = |name| {
        let id = format!("spiffe://test.lab/{name}").parse().unwrap();
        authority.issue(&id, HOUR, now).unwrap()
    };
    Cast { hops: ["client", "manager", "forwarder"].map(issue).into() }
});

macro_rules! policies {
    [$($name:ident),*] => {
        $(static $name: LazyLock<Policy> = LazyLock::new(|| {
            let name = stringify!($name).to_lowercase();
            let file = format!("{}/tests/policies/{name}.rego", env!("CARGO_MANIFEST_DIR"));
            Policy::parse(&file, &fs::read_to_string(&file).unwrap()).unwrap()
        });)*
    };
}
policies![
    TOKENS_VALID,
    TOKENS_EXPIRED,
    TOKENS_CHAINED,
    PREV_TOKEN_SIGNED,
    NEXT_TOKEN_SIGNED,
    CLIENT_ALLOWED,
    SERVICE_CONNECTION
];

fn document(tokens: &[String], index: usize, peer: &Svid) -> Value {
    json!({
        "index": index,
        "path_segments": tokens.iter().map(|token| json!({"name": "n", "id": "i", "token": token})).collect::<Vec<_>>(),
        "auth_info": {"certificate": peer.leaf().pem()},
    })
}

/// The policy, and what Rust and Rego say.
type Verdict = (&'static str, bool, Result<bool, String>);

/// Every policy about tokens, Rust beside Rego.
fn verdicts(tokens: &[String], index: usize, peer: &Svid) -> [Verdict; 5] {
    let (now, leaf, document) = (SystemTime::now(), peer.leaf(), document(tokens, index, peer));
    [
        ("valid", policy::tokens_valid(tokens).is_ok(), TOKENS_VALID.judge(&document)),
        ("expired", policy::tokens_expired(tokens, now).is_ok(), TOKENS_EXPIRED.judge(&document)),
        ("chained", policy::tokens_chained(tokens).is_ok(), TOKENS_CHAINED.judge(&document)),
        ("prev", policy::prev_token_signed(tokens, index, leaf).is_ok(), PREV_TOKEN_SIGNED.judge(&document)),
        ("next", policy::next_token_signed(tokens, index, leaf).is_ok(), NEXT_TOKEN_SIGNED.judge(&document)),
    ]
}

fn honest(from: usize, to: usize) -> String {
    let hops = &CAST.hops;
    token::mint(&hops[from], Some(hops[to].id()), None, HOUR, SystemTime::now()).unwrap().jwt().to_owned()
}

fn forged(claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.{}", part(&json!({"alg": "ES256"})), part(claims), "A".repeat(86))
}

#[test]
fn upstreams_policies_say_in_rego_what_ours_say_in_rust() {
    let good = vec![honest(0, 1), honest(1, 2), honest(2, 1)];
    let client = CAST.hops[0].id();
    let future = 4_000_000_000u64;
    let with = |at: usize, token: String| {
        let mut tokens = good.clone();
        tokens[at] = token;
        tokens
    };
    /// What it is, the path, our index, the peer, and the five verdicts.
    type Row = (&'static str, Vec<String>, usize, usize, [bool; 5]);
    let table: Vec<Row> = vec![
        ("a good path at the forwarder", good.clone(), 2, 1, [true, true, true, true, false]),
        ("a good path at the client", good.clone(), 0, 1, [true, true, true, false, true]),
        ("another peer", good.clone(), 2, 0, [true, true, true, false, false]),
        ("nothing", vec![], 0, 1, [true, true, true, false, false]),
        ("one", good[..1].to_vec(), 1, 0, [true, true, true, true, false]),
        ("index behind the end", good.clone(), 9, 1, [true, true, true, false, false]),
        ("an opaque token", with(0, "opaque".into()), 2, 1, [false, false, false, true, false]),
        ("an empty token", with(0, String::new()), 2, 1, [false, false, false, true, false]),
        ("four parts", with(0, format!("{}.x", good[0])), 2, 1, [false, false, false, true, false]),
        ("for another", with(0, honest(0, 2)), 2, 1, [true, true, false, true, false]),
        (
            "aud is a text",
            with(0, forged(&json!({"sub": client, "aud": CAST.hops[1].id(), "exp": future}))),
            2,
            1,
            [true, true, false, true, false],
        ),
        (
            "expired",
            with(0, forged(&json!({"sub": client, "aud": [CAST.hops[1].id()], "exp": 1}))),
            2,
            1,
            [true, false, true, true, false],
        ),
        (
            "no expiry",
            with(0, forged(&json!({"sub": client, "aud": [CAST.hops[1].id()]}))),
            2,
            1,
            [true, false, true, true, false],
        ),
        (
            "exp is a text",
            with(0, forged(&json!({"sub": client, "aud": [CAST.hops[1].id()], "exp": "4000000000"}))),
            2,
            1,
            [true, false, true, true, false],
        ),
        (
            "a forged signature before us",
            with(1, forged(&json!({"sub": CAST.hops[1].id(), "aud": [CAST.hops[2].id()], "exp": future}))),
            2,
            1,
            [true, true, true, false, false],
        ),
    ];
    for (what, tokens, index, peer, expected) in table {
        for ((name, rust, rego), expected) in
            verdicts(&tokens, index, &CAST.hops[peer]).into_iter().zip(expected)
        {
            assert_eq!((rust, rego), (expected, Ok(expected)), "{what}: {name}");
        }
    }
}

#[test]
fn a_name_is_its_first_registrants_in_both() {
    let owners = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    for (owner, caller, expected) in [
        (None, "a", true),
        (Some(owners(&["a", "m"])), "a", true),
        (Some(owners(&["b", "a"])), "a", false),
        (Some(owners(&[])), "a", false),
    ] {
        let map: BTreeMap<_, _> = owner.iter().map(|ids| ("nse", ids)).collect();
        let document = json!({"resource_id": caller, "resource_name": "nse", "resource_path_ids_map": map});
        let rust = policy::client_allowed("nse", owner.as_deref(), caller).is_ok();
        assert_eq!((rust, CLIENT_ALLOWED.judge(&document)), (expected, Ok(expected)), "{owner:?}");
    }
}

#[test]
fn who_watches_sees_his_own_in_both() {
    let hub = Hub::default();
    let (mine, other) = (CAST.hops[0].id(), CAST.hops[1].id());
    for (owner, id) in [(mine, "c-0"), (other, "d-0")] {
        let segment =
            |name: &str, id: &str| PathSegment { name: name.into(), id: id.into(), ..PathSegment::default() };
        let path_segments = vec![segment("nsc", id), segment("mgr", &format!("at-mgr-{id}"))];
        let path = Some(Path { unknown: None, index: 1, path_segments });
        let conn = Connection { id: format!("at-mgr-{id}"), path, ..Connection::default() };
        hub.update(conn, Some(owner.clone()));
    }
    for (watcher, id, expected) in
        [(mine, "c-0", true), (mine, "d-0", false), (other, "d-0", true), (mine, "x", false)]
    {
        let segment = PathSegment { id: id.into(), ..PathSegment::default() };
        let selector = MonitorScopeSelector { path_segments: vec![segment], network_services: vec![] };
        let mut events = hub.watch(selector, Viewer::Peer(watcher.clone())).unwrap();
        let rust = !events.try_recv().unwrap().connections.is_empty();
        let map: BTreeMap<_, _> = [(mine.as_str(), ["c-0"]), (other.as_str(), ["d-0"])].into();
        let document = json!({
            "spiffe_id_connection_map": map, "selector_connection_ids": [id], "service_spiffe_id": watcher,
        });
        assert_eq!((rust, SERVICE_CONNECTION.judge(&document)), (expected, Ok(expected)), "{watcher} {id}");
    }
}

/// A token: honest, for the wrong one, or of any claims.
fn any_token() -> impl Strategy<Value = String> {
    let name = |i: usize| CAST.hops[i].id().to_string();
    let claims =
        (0usize..3, prop::collection::vec(0usize..3, 0..3), 0u8..6).prop_map(move |(sub, aud, odd)| {
            let aud: Vec<_> = aud.into_iter().map(name).collect();
            let mut claims = json!({"sub": name(sub), "aud": aud, "exp": 4_000_000_000u64});
            match odd {
                0 => claims["exp"] = json!(1000),
                1 => claims["exp"] = json!(null),
                2 => claims["aud"] = json!(name(sub)),
                3 => drop(claims.as_object_mut().unwrap().remove("sub")),
                _ => {}
            }
            forged(&claims)
        });
    prop_oneof![
        4 => (0usize..3, 0usize..3).prop_map(|(from, to)| honest(from, to)),
        3 => claims,
        1 => "[A-Za-z0-9_.-]{0,40}",
        1 => any::<String>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn rust_and_rego_agree_on_any_path(
        tokens in prop::collection::vec(any_token(), 0..5), index in 0usize..6, peer in 0usize..3,
    ) {
        for (name, rust, rego) in verdicts(&tokens, index, &CAST.hops[peer]) {
            prop_assert_eq!(rego, Ok(rust), "{}", name);
        }
    }
}

#[test]
fn what_is_no_policy_is_refused_with_file_line_and_reason() {
    let refused = |text: &str| Policy::parse("mine.rego", text).unwrap_err().to_string();
    let syntax = refused("package nsm\n\nvalid {\n  input.x ==\n}\n");
    assert!(syntax.contains("mine.rego") && syntax.contains("mine.rego:3:7"), "{syntax}");
    let unknown = refused("package nsm\nvalid { no.such.builtin(1) }\n");
    assert!(unknown.contains("mine.rego") && unknown.contains("no.such.builtin"), "{unknown}");
    let nothing = refused("package nsm\nallow { true }\n");
    assert!(nothing.contains("no rule `valid`"), "{nothing}");
    assert!(refused("valid { true }").contains("mine.rego"));
    assert!(refused("").contains("mine.rego"));
}

#[test]
fn a_policy_that_loops_is_cut_off_and_says_no_token() {
    let slow = "package nsm\nvalid { count([1 | input.path_segments[_]; input.path_segments[_]; input.path_segments[_]; input.path_segments[_]]) > 1 }";
    let slow = Policy::parse("slow.rego", slow).unwrap();
    let tokens = vec!["eyJhbGciOiJFUzI1NiJ9.secret.token".to_owned(); 128];
    let reason = slow.judge(&document(&tokens, 1, &CAST.hops[0])).unwrap_err();
    assert!(!reason.contains("secret"), "{reason}");
    let no_boolean = Policy::parse("text.rego", "package nsm\nvalid = input.path_segments[0].token").unwrap();
    let reason = no_boolean.judge(&document(&tokens, 1, &CAST.hops[0])).unwrap_err();
    assert!(!reason.contains("secret"), "{reason}");
}

#[test]
fn masks_name_built_in_policies_and_files() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    fs::create_dir(at("more")).unwrap();
    fs::write(at("a.rego"), "package a\nvalid { true }").unwrap();
    fs::write(at("more/b.rego"), "package b\nvalid { false }").unwrap();
    fs::write(at("more/notes.txt"), "no policy").unwrap();
    let strings = |masks: &[&str]| masks.iter().map(|mask| (*mask).to_owned()).collect::<Vec<_>>();

    let defaults = strings(&[
        "etc/nsm/opa/common/.*.rego",
        "etc/nsm/opa/registry/.*.rego",
        "etc/nsm/opa/server/.*.rego",
    ]);
    let loaded = load(&defaults, Side::Server).unwrap();
    assert!(loaded.files.is_empty() && loaded.not_named.is_empty(), "{loaded:?}");
    let loaded = load(&strings(&["etc/nsm/opa/common/tokens_.*.rego"]), Side::Client).unwrap();
    assert_eq!(loaded.not_named.iter().collect::<Vec<_>>(), [&Check::PeerSigned, &Check::ClientAllowed]);

    let loaded = load(&[at(".*.rego"), at("a.rego")], Side::Server).unwrap();
    let names: Vec<_> = loaded.files.iter().map(|file| file.name().to_owned()).collect();
    assert_eq!(names, [at("a.rego"), at("more/b.rego")]);
    let mut policies = Policies::default();
    loaded.join(&mut policies);
    let denial = policies.ask(|| json!({})).unwrap_err();
    assert!(denial.to_string().contains("more/b.rego"), "{denial}");

    assert!(matches!(load(&[at("nothing.*")], Side::Server), Err(Error::Nothing { .. })));
    assert!(matches!(load(&[at("(")], Side::Server), Err(Error::Mask { .. })));
    fs::write(at("bad.rego"), "package a\nvalid {").unwrap();
    let bad = load(&[at("bad.rego")], Side::Server).unwrap_err().to_string();
    assert!(bad.contains("bad.rego"), "{bad}");
}
