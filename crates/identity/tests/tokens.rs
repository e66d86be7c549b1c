//! Tokens and policies as tables, and against hostile texts.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, SystemTime};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Validation};
use nsm_identity::{
    Denial, Error, SpiffeId, Svid,
    ca::Authority,
    policy::{
        check_client, check_server, client_allowed, next_token_signed, prev_token_signed, tokens_chained,
        tokens_expired, tokens_valid,
    },
    token::{Malformed, Minter, claims, is_signed_by, mint, mint_until, parse_rfc3339},
};
use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);

/// A fixed time with a fraction: `exp` must be cut, not rounded.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_750)
}

fn id(name: &str) -> SpiffeId {
    format!("spiffe://test.lab/{name}").parse().unwrap()
}

struct Cast {
    client: Svid,
    manager: Svid,
    forwarder: Svid,
    /// The manager's key, to forge with.
    key: KeyPair,
}

impl Cast {
    fn new() -> Self {
        let authority = Authority::new("test.lab".parse().unwrap(), now()).unwrap();
        let issue = |name| authority.issue(&id(name), Duration::from_secs(3600), now()).unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id("manager").as_str().try_into().unwrap())];
        params.not_after = (now() + 60 * MINUTE).into();
        let certificate = params.self_signed(&key).unwrap().der().clone();
        let manager = Svid::new(vec![certificate], key.serialize_der().into()).unwrap();
        Self { client: issue("client"), manager, forwarder: issue("forwarder"), key }
    }

    /// The path that the forwarder sees in a good request: client → manager → forwarder, and its own answer back.
    fn path(&self) -> Vec<String> {
        vec![
            token(&self.client, Some("manager")),
            token(&self.manager, Some("forwarder")),
            token(&self.forwarder, Some("manager")),
        ]
    }
}

fn token(svid: &Svid, audience: Option<&str>) -> String {
    mint(svid, audience.map(id).as_ref(), None, 10 * MINUTE, now()).unwrap().jwt().to_owned()
}

fn payload(jwt: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(jwt.split('.').nth(1).unwrap()).unwrap()).unwrap()
}

/// A JWT with any header and claims and the given signature text.
fn forge(header: Value, claims: Value, signature: &str) -> String {
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.{signature}", part(header), part(claims))
}

#[test]
fn a_token_is_what_upstream_makes() {
    let cast = Cast::new();
    let token = mint(&cast.client, Some(&id("manager")), None, 10 * MINUTE, now()).unwrap();
    let header = token.jwt().split('.').next().unwrap();
    assert_eq!(URL_SAFE_NO_PAD.decode(header).unwrap(), br#"{"alg":"ES256","typ":"JWT"}"#);
    let expected = json!({"sub": "spiffe://test.lab/client", "aud": ["spiffe://test.lab/manager"], "exp": 1_800_000_600});
    assert_eq!(payload(token.jwt()), expected);
    assert_eq!(token.expires(), now() + 10 * MINUTE, "the expiry beside it is not cut");
    assert_eq!(token.expires_rfc3339(), "2027-01-15T08:10:00.750000000Z");
    assert!(is_signed_by(token.jwt(), cast.client.leaf()).unwrap());
    assert!(!is_signed_by(token.jwt(), cast.manager.leaf()).unwrap());
    // Another implementation verifies it, with the key as it is in the certificate.
    let (_, certificate) = x509_parser::parse_x509_certificate(cast.client.leaf().der()).unwrap();
    let key = DecodingKey::from_ec_der(&certificate.public_key().subject_public_key.data);
    let mut rules = Validation::new(Algorithm::ES256);
    rules.set_audience(&["spiffe://test.lab/manager"]);
    rules.validate_exp = false;
    jsonwebtoken::decode::<Value>(token.jwt(), &key, &rules).unwrap();
    // Without a peer there is no audience.
    assert_eq!(payload(&crate::token(&cast.client, None)).get("aud"), None);
}

#[test]
fn a_lifetime_ends_with_the_certificates() {
    let cast = Cast::new();
    let end = cast.client.not_after();
    // A thousandth before, of what is left: of an hour.
    let bound = end - end.duration_since(now()).unwrap() / 1000;
    let day = 24 * 60 * MINUTE;
    let own = mint(&cast.client, None, None, day, now()).unwrap();
    assert_eq!(own.expires(), bound);
    assert_eq!(claims(own.jwt()).unwrap().expires, Some(1_800_003_600.0));
    // The peer's end limits the expiry beside it, not `exp`.
    let peer = now() + MINUTE;
    let limited = mint(&cast.client, Some(&id("manager")), Some(peer), 10 * MINUTE, now()).unwrap();
    assert_eq!(limited.expires(), peer - MINUTE / 1000);
    assert_eq!(claims(limited.jwt()).unwrap().expires, Some(1_800_000_600.0));
    let late = mint(&cast.client, None, None, day, end).unwrap_err();
    assert!(matches!(late, Error::SvidExpired(_)), "{late}");
    assert_eq!(mint(&cast.client, None, None, Duration::MAX, now()).unwrap().expires(), bound);
}

/// By its end it is told which of two requests a token is of.
#[test]
fn what_is_made_later_ends_later_also_where_a_certificate_ends_it() {
    let cast = Cast::new();
    let (step, end) = (Duration::from_millis(1), cast.client.not_after());
    for peer in [None, Some(end - MINUTE)] {
        for from in [now(), end - 2 * MINUTE] {
            let at = |n| mint(&cast.client, None, peer, 60 * MINUTE, from + n * step).unwrap().expires();
            let ends: Vec<_> = (0..50).map(at).collect();
            assert!(ends.is_sorted_by(|earlier, later| earlier < later), "{ends:?}");
            assert!(ends.iter().all(|at| *at < peer.unwrap_or(end)));
        }
    }
}

/// Certificates of some seconds end soon, and a thousandth before a whole second.
#[test]
fn a_token_in_place_of_another_is_in_date_as_long_as_that() {
    let cast = Cast::new();
    let end = cast.client.not_after();
    let again = |expires, now| mint_until(&cast.client, Some(&id("manager")), None, expires, now);
    for left in [1, 10, 900, 1100, 3_000_000].map(Duration::from_millis) {
        let now = end - left;
        let first = mint(&cast.client, None, None, 60 * MINUTE, now).unwrap();
        for later in [Duration::ZERO, left / 2, left - left / 1000 - Duration::from_micros(1)] {
            let second = again(first.expires(), now + later).unwrap();
            assert!(second.expires() <= first.expires() && second.expires() > now + later, "{left:?}");
            let exp = SystemTime::UNIX_EPOCH
                + Duration::from_secs_f64(claims(second.jwt()).unwrap().expires.unwrap());
            assert!(exp >= second.expires() && exp <= end, "{left:?} {later:?}: {exp:?}");
        }
        again(first.expires(), first.expires()).unwrap_err();
    }
}

#[test]
fn tokens_of_one_second_are_signed_once() {
    let cast = Cast::new();
    let minter = Minter::default();
    let mint = |max, now| minter.mint(&cast.client, cast.manager.leaf(), max, now).unwrap();
    let first = mint(10 * MINUTE, now());
    let plain =
        nsm_identity::token::mint(&cast.client, Some(&id("manager")), None, 10 * MINUTE, now()).unwrap();
    assert_eq!(payload(first.jwt()), payload(plain.jwt()));
    assert!(is_signed_by(first.jwt(), cast.client.leaf()).unwrap());
    let same = mint(10 * MINUTE, now() + Duration::from_millis(249));
    assert_eq!(same.jwt(), first.jwt());
    assert_eq!(
        same.expires(),
        first.expires() + Duration::from_millis(249),
        "the expiry beside it is its own"
    );
    let next = mint(10 * MINUTE, now() + Duration::from_millis(250));
    assert_eq!(claims(next.jwt()).unwrap().expires, Some(1_800_000_601.0));
    let shorter = mint(MINUTE, now());
    assert_eq!(claims(shorter.jwt()).unwrap().expires, Some(1_800_000_060.0));
    // An SVID that has ended signs nothing, whatever was signed before.
    mint(60 * MINUTE, now());
    minter.mint(&cast.client, cast.manager.leaf(), MINUTE, cast.client.not_after()).unwrap_err();
}

#[test]
fn what_was_verified_once_says_nothing_about_others() {
    let cast = Cast::new();
    let leaf = cast.manager.leaf();
    let good = token(&cast.manager, Some("client"));
    let (signed, _) = good.rsplit_once('.').unwrap();
    let (_, other) = cast.path()[0].rsplit_once('.').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    for _ in 0..2 {
        assert!(is_signed_by(&good, leaf).unwrap());
        assert!(!is_signed_by(&format!("{signed}.{other}"), leaf).unwrap());
        assert!(!is_signed_by(&good, cast.client.leaf()).unwrap(), "nor to another key");
        assert_ne!(is_signed_by(&good[..good.len() - 1], leaf), Ok(true));
    }
}

#[test]
fn a_token_shows_in_no_debug_output() {
    let cast = Cast::new();
    let token = mint(&cast.client, None, None, MINUTE, now()).unwrap();
    let shown = format!("{token:?} {:?}", cast.client);
    for part in token.jwt().split('.') {
        assert!(!shown.contains(part));
    }
}

#[test]
fn good_paths_pass() {
    let cast = Cast::new();
    let path = cast.path();
    check_server(&path, 2, cast.manager.leaf(), now()).unwrap();
    check_server(&path[..2], 1, cast.client.leaf(), now()).unwrap();
    // What comes after the own segment belongs to an earlier request and is not looked at.
    let mut longer = path.clone();
    longer.push("rubbish".into());
    check_server(&longer, 2, cast.manager.leaf(), now()).unwrap();
    check_client(&path, 0, cast.manager.leaf(), now()).unwrap();
    // Upstream: no segments are fine for the common ones, one needs no chain.
    tokens_valid::<&str>(&[]).unwrap();
    tokens_expired::<&str>(&[], now()).unwrap();
    tokens_chained(&path[..1]).unwrap();
}

/// Every path of up to three tokens, of each of three signers, for each of them or nobody, valid or, where there are no
/// more than two, expired; at every place, before every peer. What passes is what may.
#[test]
fn of_all_paths_pass_those_whose_tokens_lead_from_hop_to_hop_and_are_the_peers() {
    struct Made {
        jwt: String,
        signer: usize,
        audience: Option<usize>,
        expired: bool,
    }
    let cast = cast();
    let hops = [&cast.client, &cast.manager, &cast.forwarder];
    let mut made = Vec::new();
    for (expired, signer, audience) in [false, true].into_iter().flat_map(|expired| {
        (0..3).flat_map(move |signer| [None, Some(0), Some(1), Some(2)].map(|to| (expired, signer, to)))
    }) {
        let at = if expired { now() - 20 * MINUTE } else { now() };
        let to = audience.map(|hop| id(["client", "manager", "forwarder"][hop]));
        let jwt = mint(hops[signer], to.as_ref(), None, 10 * MINUTE, at).unwrap().jwt().to_owned();
        made.push(Made { jwt, signer, audience, expired });
    }
    let mut paths = vec![Vec::new()];
    paths.extend(made.iter().map(|one| vec![one]));
    paths.extend(made.iter().flat_map(|first| made.iter().map(move |second| vec![first, second])));
    let valid: Vec<_> = made.iter().filter(|token| !token.expired).collect();
    for first in &valid {
        paths.extend(valid.iter().flat_map(|second| valid.iter().map(|third| vec![*first, *second, *third])));
    }
    let leads = |path: &[&Made]| {
        path.iter().all(|token| !token.expired)
            && path.windows(2).all(|hops| hops[0].audience == Some(hops[1].signer))
    };
    let mut passed = [0, 0];
    for path in &paths {
        let tokens: Vec<_> = path.iter().map(|token| token.jwt.as_str()).collect();
        for (peer, index) in (0..3).flat_map(|peer| (0..=3).map(move |index| (peer, index))) {
            let is_peers =
                |at: Option<usize>| at.and_then(|at| path.get(at)).is_some_and(|t| t.signer == peer);
            let said = path.iter().map(|t| (t.signer, t.audience, t.expired)).collect::<Vec<_>>();
            let server = path.get(..=index).is_some_and(leads) && is_peers(index.checked_sub(1));
            let verdict = check_server(&tokens, index, hops[peer].leaf(), now());
            assert_eq!(verdict.is_ok(), server, "server {said:?} at {index} of {peer}: {verdict:?}");
            let client = leads(path) && is_peers(Some(index + 1));
            let verdict = check_client(&tokens, index, hops[peer].leaf(), now());
            assert_eq!(verdict.is_ok(), client, "client {said:?} at {index} of {peer}: {verdict:?}");
            passed = [passed[0] + u32::from(server), passed[1] + u32::from(client)];
        }
    }
    assert!(passed.iter().all(|count| *count > 100), "{passed:?}");
}

#[test]
fn each_policy_denies_what_it_must() {
    let cast = Cast::new();
    let good = cast.path();
    let with = |segment: usize, jwt: String| {
        let mut path = good.clone();
        path[segment] = jwt;
        path
    };
    let es256 = || json!({"alg": "ES256", "typ": "JWT"});
    let manager_claims = || json!({"sub": id("manager"), "aud": [id("forwarder")], "exp": 1_900_000_000u64});
    let signature = good[1].rsplit_once('.').unwrap().1.to_owned();
    let old = mint(&cast.manager, Some(&id("forwarder")), None, 10 * MINUTE, now() - 20 * MINUTE).unwrap();
    // The manager signs in the client's name: its signature is right, the name is not its own.
    let posing = {
        let claims = json!({"sub": id("client"), "aud": [id("forwarder")], "exp": 1_900_000_000u64});
        sign(&cast.key, es256(), claims)
    };
    let posing_path = {
        let mut path = with(1, posing);
        path[0] = token(&cast.client, Some("client"));
        path
    };

    let table: Vec<(&str, Vec<String>, usize, &str)> = vec![
        ("no path", vec![], 0, "no segment 0"),
        ("index 0: nobody came before", good.clone(), 0, "no segment 0"),
        ("index past the end", good.clone(), 3, "no segment 3"),
        ("index far past the end", good.clone(), usize::MAX, "no segment"),
        ("empty token", with(1, String::new()), 2, "segment 1 holds no JWT"),
        ("opaque token", with(0, "opaque".into()), 2, "segment 0 holds no JWT"),
        ("four parts", with(0, format!("{}.x", good[0])), 2, "three parts"),
        ("payload is no object", with(0, format!("{}.{}.AA", "eyJ9", "W10")), 2, "segment 0 holds no JWT"),
        ("expired", with(1, old.jwt().into()), 2, "expired 600s ago"),
        ("no expiry", with(1, forge(es256(), json!({"sub": id("manager")}), &signature)), 2, "no expiry"),
        (
            "expiry is a text",
            with(1, forge(es256(), json!({"sub": id("manager"), "exp": "1900000000"}), &signature)),
            2,
            "no expiry",
        ),
        (
            "expiry is absurd",
            with(1, forge(es256(), json!({"sub": id("manager"), "exp": -1e300}), &signature)),
            2,
            "expired",
        ),
        (
            "addressed to another",
            with(0, token(&cast.client, Some("forwarder"))),
            2,
            "segment 0 is addressed to",
        ),
        ("addressed to nobody", with(0, token(&cast.client, None)), 2, "segment 0 is addressed to []"),
        (
            "audience is no list",
            with(
                0,
                forge(
                    es256(),
                    json!({"sub": id("client"), "aud": id("manager"), "exp": 1_900_000_000u64}),
                    &signature,
                ),
            ),
            2,
            "segment 0 is addressed to []",
        ),
        ("another's signature", with(1, forge(es256(), manager_claims(), &signature)), 2, "not signed by"),
        ("no signature", with(1, forge(es256(), manager_claims(), "")), 2, "not signed by"),
        ("algorithm none", with(1, forge(json!({"alg": "none"}), manager_claims(), "")), 2, "not signed by"),
        ("algorithm confusion", with(1, hmac_like(&cast.manager, manager_claims())), 2, "not signed by"),
        ("in another's name", posing_path, 2, "in the name of"),
    ];
    for (what, path, index, text) in table {
        let denial = check_server(&path, index, cast.manager.leaf(), now()).unwrap_err();
        let shown = format!("{denial} {denial:?}");
        assert!(shown.contains(text), "{what}: {shown}");
        for part in path.iter().flat_map(|jwt| jwt.split('.')).filter(|part| part.len() > 20) {
            assert!(!shown.contains(part), "{what}: a denial shows a token");
        }
        let status = tonic::Status::from(denial);
        assert_eq!(status.code(), tonic::Code::PermissionDenied);
        assert!(status.message().starts_with("no sufficient privileges"));
    }
    // The peer of the connection is somebody else than the one who signed.
    let denial = check_server(&good, 2, cast.client.leaf(), now()).unwrap_err();
    assert!(matches!(denial, Denial::Unsigned { segment: 1, .. }), "{denial}");

    // Clients: all segments, and the next one's signature.
    let denial = check_client(&good, 2, cast.manager.leaf(), now()).unwrap_err();
    assert!(matches!(denial, Denial::Missing { segment: 3, count: 3 }), "{denial}");
    let denial = check_client(&good, usize::MAX, cast.manager.leaf(), now()).unwrap_err();
    assert!(matches!(denial, Denial::Missing { .. }), "{denial}");
    let denial = check_client(&good, 0, cast.forwarder.leaf(), now()).unwrap_err();
    assert!(matches!(denial, Denial::Unsigned { segment: 1, .. }), "{denial}");
    let denial = check_client(&with(2, old.jwt().into()), 0, cast.manager.leaf(), now()).unwrap_err();
    assert!(matches!(denial, Denial::Expired { segment: 2, .. }), "{denial}");

    prev_token_signed(&good, 2, cast.manager.leaf()).unwrap();
    prev_token_signed(&good, 0, cast.manager.leaf()).unwrap_err();
    next_token_signed(&good, 1, cast.forwarder.leaf()).unwrap();
    next_token_signed(&good, 1, cast.client.leaf()).unwrap_err();
}

#[test]
fn only_the_first_registrant_may_change_a_name() {
    let ids = |list: &[&str]| list.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    client_allowed("nse", None, "spiffe://a/x").unwrap();
    client_allowed("nse", Some(&ids(&["spiffe://a/x", "spiffe://a/m"])), "spiffe://a/x").unwrap();
    let denial = client_allowed("nse", Some(&ids(&["spiffe://a/x"])), "spiffe://a/y").unwrap_err();
    assert_eq!(denial.to_string(), r#""nse" belongs to "spiffe://a/x"; "spiffe://a/y" may not change it"#);
    client_allowed("nse", Some(&[]), "spiffe://a/y").unwrap_err();
}

#[test]
fn times_as_go_writes_them() {
    let at = |secs, nanos| SystemTime::UNIX_EPOCH + Duration::new(secs, nanos);
    for (text, time) in [
        ("2027-01-15T08:00:00Z", at(1_800_000_000, 0)),
        ("2027-01-15T08:00:00.75Z", at(1_800_000_000, 750_000_000)),
        ("2027-01-15T08:00:00.123456789Z", at(1_800_000_000, 123_456_789)),
        ("2027-01-15T10:00:00+02:00", at(1_800_000_000, 0)),
        ("2027-01-15T02:30:00.5-05:30", at(1_800_000_000, 500_000_000)),
    ] {
        assert_eq!(parse_rfc3339(text), Some(time), "{text}");
    }
    for text in [
        "",
        "Z",
        "now",
        "1800000000",
        "2027-01-15",
        "2027-01-15T08:00:00",
        "2027-13-15T08:00:00Z",
        "2027-01-15T08:00:00+2:00",
        "2027-01-15T08:00:00+02:60",
        "2027-01-15T08:00:00+é:00",
        "+99:99",
        "é+00:00",
    ] {
        assert_eq!(parse_rfc3339(text), None, "{text}");
    }
}

#[test]
fn malformed_tokens_are_told_apart() {
    for (jwt, reason) in [
        ("", Malformed::Parts),
        ("a.b", Malformed::Parts),
        ("a.b.c.d", Malformed::Parts),
        ("!.e30.AA", Malformed::Base64("header")),
        ("e30=.e30.AA", Malformed::Base64("header")),
        ("e30.e30.!", Malformed::Base64("signature")),
        ("W10.e30.AA", Malformed::Json("header")),
        ("e30.W10.AA", Malformed::Json("payload")),
    ] {
        assert_eq!(claims(jwt), Err(reason), "{jwt}");
    }
}

/// Signs any header and claims with a real key, as a thief of it would.
fn sign(key: &KeyPair, header: Value, claims: Value) -> String {
    let unsigned = forge(header, claims, "");
    let unsigned = unsigned.trim_end_matches('.');
    let key = EncodingKey::from_ec_der(key.serialized_der());
    format!("{unsigned}.{}", jsonwebtoken::crypto::sign(unsigned.as_bytes(), &key, Algorithm::ES256).unwrap())
}

/// "HS256" with the public certificate as the secret: what a confused verifier would accept.
fn hmac_like(svid: &Svid, claims: Value) -> String {
    let key = jsonwebtoken::EncodingKey::from_secret(svid.leaf().der());
    jsonwebtoken::encode(&jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256), &claims, &key).unwrap()
}

proptest! {
    #[test]
    fn hostile_tokens_never_panic(texts in prop::collection::vec("[A-Za-z0-9_.=é-]{0,60}", 0..4), index in 0usize..5) {
        let cast = cast();
        let _ = check_server(&texts, index, cast.client.leaf(), now());
        let _ = check_client(&texts, index, cast.client.leaf(), now());
    }

    #[test]
    fn hostile_claims_never_panic_and_never_pass(
        sub in any::<String>(), aud in prop::collection::vec(any::<String>(), 0..3), exp in any::<f64>(), sig in "[A-Za-z0-9_-]{0,90}",
    ) {
        let cast = cast();
        let jwt = forge(json!({"alg": "ES256"}), json!({"sub": sub, "aud": aud, "exp": exp}), &sig);
        prop_assert!(check_server(&[jwt.as_str(), jwt.as_str()], 1, cast.client.leaf(), now()).is_err());
    }

    #[test]
    fn a_changed_token_never_passes(at in 0usize..400, to in 0u8..64) {
        let cast = cast();
        let path = cast.path();
        let mut jwt = path[1].clone().into_bytes();
        let at = at % jwt.len();
        let new = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[usize::from(to)];
        prop_assume!(jwt[at] != new && jwt[at] != b'.');
        jwt[at] = new;
        let jwt = String::from_utf8(jwt).unwrap();
        let changed = [path[0].as_str(), &jwt, path[2].as_str()];
        prop_assert!(check_server(&changed, 2, cast.manager.leaf(), now()).is_err());
    }

    #[test]
    fn hostile_times_never_panic(text in "[0-9TZz:.+é-]{0,40}") {
        let _ = parse_rfc3339(&text);
    }
}

/// One cast for all cases: making keys is not what is tested.
fn cast() -> &'static Cast {
    static CAST: std::sync::LazyLock<Cast> = std::sync::LazyLock::new(Cast::new);
    &CAST
}
