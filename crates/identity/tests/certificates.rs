//! Which certificates stand for somebody, and which TLS peers are let in.
#![allow(clippy::unwrap_used)]

use std::{
    io::{Read, Write},
    sync::Arc,
    time::{Duration, SystemTime},
};

use nsm_identity::{Bundles, CertificateError, Error, Leaf, Svid, ca::Authority};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SanType, SignatureAlgorithm,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

const HOUR: Duration = Duration::from_secs(3600);

/// A root whose certificates may be as wrong as a test wants them.
struct Root {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl Root {
    fn new() -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> (CertificateDer<'static>, KeyPair) {
        self.issue_for(&PKCS_ECDSA_P256_SHA256, change)
    }

    fn issue_for(
        &self,
        algorithm: &'static SignatureAlgorithm,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (CertificateDer<'static>, KeyPair) {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![uri("spiffe://test.lab/x")];
        params.not_before = (SystemTime::now() - HOUR).into();
        params.not_after = (SystemTime::now() + HOUR).into();
        change(&mut params);
        (params.signed_by(&key, &self.issuer).unwrap().der().clone(), key)
    }

    fn bundles(&self, domain: &str) -> Bundles {
        let mut bundles = Bundles::default();
        bundles.insert(domain.parse().unwrap(), std::slice::from_ref(&self.certificate)).unwrap();
        bundles
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

#[test]
fn leaves_follow_the_rules_of_spiffe() {
    type Change = fn(&mut CertificateParams);
    let root = Root::new();
    let bundles = root.bundles("test.lab");
    let verify = |der: &CertificateDer<'_>| bundles.verify(der, &[], UnixTime::now());

    // Fine: also without extended key usage, with an odd one, and with a DNS name beside the ID.
    for change in [
        (|_| {}) as Change,
        |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::TimeStamping],
        |p| p.subject_alt_names.push(SanType::DnsName("x".try_into().unwrap())),
        |p| p.is_ca = IsCa::ExplicitNoCa,
        |p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature],
    ] {
        let (der, _) = root.issue(change);
        assert_eq!(verify(&der).unwrap().id().as_str(), "spiffe://test.lab/x");
    }

    let table: [(&str, Change, &str); 11] = [
        ("no URI", |p| p.subject_alt_names.clear(), "has 0"),
        ("two URIs", |p| p.subject_alt_names.push(uri("spiffe://test.lab/y")), "has 2"),
        ("a URL", |p| p.subject_alt_names = vec![uri("https://test.lab/x")], "no SPIFFE ID"),
        ("a bad ID", |p| p.subject_alt_names = vec![uri("spiffe://test.lab/x/../y")], "no SPIFFE ID"),
        ("a CA", |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained), "may sign"),
        ("certSign", |p| p.key_usages = vec![KeyUsagePurpose::KeyCertSign], "may sign"),
        ("crlSign", |p| p.key_usages = vec![KeyUsagePurpose::CrlSign], "may sign"),
        ("another domain", |p| p.subject_alt_names = vec![uri("spiffe://other.lab/x")], "no roots"),
        ("over", |p| p.not_after = (SystemTime::now() - HOUR / 2).into(), "vouched"),
        ("not yet", |p| p.not_before = (SystemTime::now() + HOUR / 2).into(), "vouched"),
        (
            "an unknown critical extension",
            |p| {
                let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
                extension.set_criticality(true);
                p.custom_extensions = vec![extension];
            },
            "vouched",
        ),
    ];
    for (what, change, text) in table {
        let (der, _) = root.issue(change);
        let error = verify(&der).unwrap_err().to_string();
        assert!(error.contains(text), "{what}: {error}");
    }

    // Of the right domain, by the wrong root.
    let (der, _) = Root::new().issue(|_| {});
    assert!(matches!(verify(&der), Err(CertificateError::Chain { .. })));
    assert!(matches!(verify(&CertificateDer::from(vec![0x30])), Err(CertificateError::Malformed)));
    let mut long = root.issue(|_| {}).0.to_vec();
    long.push(0);
    assert!(matches!(Leaf::parse(long.into()), Err(CertificateError::Malformed)));
}

#[test]
fn a_root_vouches_for_its_own_domain_only() {
    let (root, foreign) = (Root::new(), Root::new());
    let mut bundles = root.bundles("test.lab");
    bundles.insert("other.lab".parse().unwrap(), std::slice::from_ref(&foreign.certificate)).unwrap();
    let (ours, _) = root.issue(|_| {});
    bundles.verify(&ours, &[], UnixTime::now()).unwrap();
    // The federated root signs a certificate in our domain's name.
    let (posing, _) = foreign.issue(|_| {});
    assert!(matches!(bundles.verify(&posing, &[], UnixTime::now()), Err(CertificateError::Chain { .. })));
    let (federated, _) = foreign.issue(|p| p.subject_alt_names = vec![uri("spiffe://other.lab/x")]);
    bundles.verify(&federated, &[], UnixTime::now()).unwrap();
}

#[test]
fn intermediates_are_followed() {
    let root = Root::new();
    let (intermediate, key) = root.issue(|p| {
        p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        p.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        p.subject_alt_names = vec![uri("spiffe://test.lab")];
    });
    let issuer = Issuer::from_ca_cert_der(&intermediate, key).unwrap();
    let between = Root { issuer, certificate: intermediate.clone() };
    let (leaf, _) = between.issue(|_| {});
    let bundles = root.bundles("test.lab");
    bundles.verify(&leaf, &[intermediate], UnixTime::now()).unwrap();
    bundles.verify(&leaf, &[], UnixTime::now()).unwrap_err();
}

#[test]
fn only_p256_keys_can_sign_tokens() {
    let root = Root::new();
    let (der, key) = root.issue_for(&PKCS_ECDSA_P384_SHA384, |_| {});
    let error = Svid::new(vec![der], key.serialize_der().into()).unwrap_err();
    assert!(matches!(error, Error::NotP256(_)), "{error}");
    assert!(error.to_string().contains("P-256"));
    assert!(matches!(Svid::new(vec![], key.serialize_der().into()), Err(Error::EmptyChain)));
}

#[test]
fn key_and_certificate_must_belong_together() {
    let root = Root::new();
    let (der, _) = root.issue(|_| {});
    let (_, other) = root.issue(|_| {});
    let error = Svid::new(vec![der], other.serialize_der().into()).unwrap_err();
    assert!(matches!(error, Error::KeyMismatch(_)), "{error}");
}

/// A TLS handshake in memory; both sides' results.
fn handshake(
    client: &Arc<rustls::ClientConfig>,
    server: &Arc<rustls::ServerConfig>,
) -> (Result<rustls::ClientConnection, String>, Result<rustls::ServerConnection, String>) {
    let name = ServerName::try_from("whatever.example").unwrap();
    let mut client = rustls::ClientConnection::new(client.clone(), name).unwrap();
    let mut server = rustls::ServerConnection::new(server.clone()).unwrap();
    let (mut client_error, mut server_error) = (None, None);
    for _ in 0..10 {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() && server_error.is_none() {
            server.read_tls(&mut rest).unwrap();
            server_error = server.process_new_packets().err().map(|e| nsm_identity::explain(&e));
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() && client_error.is_none() {
            client.read_tls(&mut rest).unwrap();
            client_error = client.process_new_packets().err().map(|e| nsm_identity::explain(&e));
        }
    }
    (client_error.map_or(Ok(client), Err), server_error.map_or(Ok(server), Err))
}

#[test]
fn tls_is_mutual_speaks_h2_and_is_not_resumed() {
    let authority = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
    let identity = |name: &str| {
        authority
            .identity(&format!("spiffe://test.lab/{name}").parse().unwrap(), HOUR, SystemTime::now())
            .unwrap()
    };
    let (a, b) = (identity("a"), identity("b"));
    for _ in 0..2 {
        let (client, server) = handshake(a.client_config(), b.server_config());
        let (mut client, mut server) = (client.unwrap(), server.unwrap());
        assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(client.alpn_protocol(), Some(&b"h2"[..]));
        assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        let seen = Leaf::parse(server.peer_certificates().unwrap()[0].clone()).unwrap();
        assert_eq!(seen.id(), a.id());
        client.writer().write_all(b"x").unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut &bytes[..]).unwrap();
        server.process_new_packets().unwrap();
        assert_eq!(server.reader().read(&mut [0; 8]).unwrap(), 1);
    }

    // Nobody, strangers, and servers of another root.
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.certificate().clone()).unwrap();
    let mut anonymous = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    anonymous.alpn_protocols = vec![b"h2".to_vec()];
    let (_, server) = handshake(&Arc::new(anonymous), b.server_config());
    assert!(server.is_err(), "a client without certificate must be refused");
    let other = Authority::new("test.lab".parse().unwrap(), SystemTime::now()).unwrap();
    let stranger = other.identity(a.id(), HOUR, SystemTime::now()).unwrap();
    let (client, _) = handshake(stranger.client_config(), b.server_config());
    assert!(client.unwrap_err().contains("not vouched for"));
    let (client, _) = handshake(a.client_config(), stranger.server_config());
    assert!(client.unwrap_err().contains("not vouched for"));

    // HTTP/1 only.
    let mut old = (**a.client_config()).clone();
    old.alpn_protocols = vec![b"http/1.1".to_vec()];
    let (_, server) = handshake(&Arc::new(old), b.server_config());
    assert!(server.is_err());
}
