//! Authorities that follow each other, and what they sign: SVIDs of a trust domain, or certificates of servers.
//!
//! Whoever shall trust them is given a bundle, and learns of a change late: a workload with its next SVID, an API server
//! with the configuration of a webhook. So an authority stands in the bundle for a while before it signs, and until it
//! ends:
//!
//! ```text
//! first     |=========signs=========|--trusted--|
//! second                     |-trusted-|=========signs=========|--trusted--|
//! ```
//!
//! All of it follows from the certificates and the time: whoever reads the same authorities does the same.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::{crypto::aws_lc_rs, sign::CertifiedKey};
use rustls_pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject,
};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
};

use super::authority;
use crate::{SpiffeId, TrustDomain};

/// How long an authority is good for.
const LIFETIME: Duration = Duration::from_secs(365 * DAY);
/// How long what it signs is good for.
const SIGNED: Duration = Duration::from_secs(30 * DAY);
/// How long an authority is trusted before it signs.
const SETTLING: Duration = Duration::from_secs(DAY);
/// Clocks of a cluster differ.
const BACKDATE: Duration = Duration::from_secs(3600);
const DAY: u64 = 24 * 3600;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// What was kept cannot be used.
    #[error("the kept authorities cannot be used: {0}; expected pairs of CERTIFICATE and PRIVATE KEY in PEM")]
    Damaged(String),
    /// There is no randomness, or a name that no certificate can have.
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
    /// TLS refuses it.
    #[error("the certificate cannot be used: {0}")]
    Use(#[from] rustls::Error),
    /// An identity that these authorities do not speak for.
    #[error("{id} is no workload in the trust domain of these authorities ({domain})")]
    NotOurs {
        /// Whose.
        id: SpiffeId,
        /// What they speak for.
        domain: String,
    },
    /// What shall be signed.
    #[error("the request for a certificate cannot be used: {0}; expected PKCS#10 with a key of ECDSA P-256")]
    Request(String),
}

/// Authorities of one owner, oldest first; never none.
#[derive(Debug)]
pub struct Authorities(Vec<Authority>);

#[derive(Debug)]
struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    /// What it speaks for, where that is a trust domain.
    domain: Option<TrustDomain>,
    pem: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// What a server shows.
#[derive(Debug)]
pub struct Certificate {
    /// Chain and key.
    pub key: CertifiedKey,
    /// When another one should be there.
    pub renew: SystemTime,
    /// When nobody believes it any more.
    pub not_after: SystemTime,
}

impl Authorities {
    /// A first one, for servers.
    ///
    /// # Errors
    /// There is no randomness.
    pub fn new(now: SystemTime) -> Result<Self, AuthorityError> {
        Ok(Self(vec![Authority::new(None, now)?]))
    }

    /// A first one of a trust domain.
    ///
    /// # Errors
    /// There is no randomness.
    pub fn of_domain(domain: TrustDomain, now: SystemTime) -> Result<Self, AuthorityError> {
        Ok(Self(vec![Authority::new(Some(domain), now)?]))
    }

    /// The trust domain that the newest speaks for.
    #[must_use]
    pub fn domain(&self) -> Option<&TrustDomain> {
        self.0.last().and_then(|authority| authority.domain.as_ref())
    }

    /// Those that [`Authorities::pem`] wrote.
    ///
    /// # Errors
    /// The text is damaged.
    pub fn parse(pem: &str) -> Result<Self, AuthorityError> {
        let damaged = |e: &dyn std::fmt::Display| AuthorityError::Damaged(e.to_string());
        let certificates = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
        let certificates = certificates.map_err(|e| damaged(&e))?;
        let keys = PrivatePkcs8KeyDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
        let keys = keys.map_err(|e| damaged(&e))?;
        if certificates.is_empty() || certificates.len() != keys.len() {
            let counts = format!("{} certificates and {} keys", certificates.len(), keys.len());
            return Err(AuthorityError::Damaged(counts));
        }
        let pairs = certificates.into_iter().zip(keys);
        pairs.map(|(certificate, key)| Authority::of(certificate, &key)).collect::<Result<_, _>>().map(Self)
    }

    /// Certificates and keys: for a Secret.
    #[must_use]
    pub fn pem(&self) -> String {
        self.0.iter().map(|authority| authority.pem.as_str()).collect()
    }

    /// The certificates: whom others shall trust.
    #[must_use]
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.0.iter().map(|authority| authority.certificate.clone()).collect()
    }

    /// The same in PEM.
    #[must_use]
    pub fn bundle(&self) -> String {
        let end = "-----END CERTIFICATE-----\n";
        let of = |pem: &str| pem.find(end).map(|at| pem[..at + end.len()].to_owned()).unwrap_or_default();
        self.0.iter().map(|authority| of(&authority.pem)).collect()
    }

    /// What they should be now, where that is something else: without those that ended, and with a next one in time.
    ///
    /// # Errors
    /// There is no randomness.
    pub fn renewed(&self, now: SystemTime) -> Result<Option<Self>, AuthorityError> {
        let live: Vec<_> = self.0.iter().filter(|authority| authority.not_after > now).collect();
        let due = live.last().is_none_or(|last| last.left(now) < LIFETIME / 3);
        if !due && live.len() == self.0.len() {
            return Ok(None);
        }
        let mut pem: String = live.into_iter().map(|authority| authority.pem.as_str()).collect();
        if due {
            pem += &Authority::new(self.domain().cloned(), now)?.pem;
        }
        Self::parse(&pem).map(Some)
    }

    /// The newest that others know by now.
    fn signer(&self, now: SystemTime) -> Result<&Authority, AuthorityError> {
        let settled = |authority: &&Authority| authority.not_before + BACKDATE + SETTLING <= now;
        let live = || self.0.iter().filter(|authority| authority.not_after > now);
        let signer = live().rfind(settled).or(live().next()).or(self.0.last());
        signer.ok_or_else(|| AuthorityError::Damaged("there is none".into()))
    }

    /// An X.509-SVID for the key of a request (PKCS#10, DER), whatever else the request asks for.
    ///
    /// # Errors
    /// The identity is of another trust domain, or the request cannot be used.
    pub fn issue(
        &self,
        id: &SpiffeId,
        request: &[u8],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let signer = self.signer(now)?;
        let ours = signer.domain.as_ref().is_some_and(|domain| id.is_member_of(domain));
        if !ours || id.path().is_empty() {
            let domain = signer.domain.as_ref().map_or_else(|| "none".into(), ToString::to_string);
            return Err(AuthorityError::NotOurs { id: id.clone(), domain });
        }
        let bad = |e: &dyn std::fmt::Display| AuthorityError::Request(e.to_string());
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
            .map_err(|e| bad(&e))?;
        if *request.public_key.algorithm() != PKCS_ECDSA_P256_SHA256 {
            return Err(bad(&"its key is of another kind"));
        }
        let mut params = authority::leaf(id, (now - authority::BACKDATE).max(signer.not_before))?;
        params.not_after = now.checked_add(lifetime).unwrap_or(signer.not_after).min(signer.not_after).into();
        let certificate = params.signed_by(&request.public_key, &signer.issuer)?;
        Ok(certificate.der().clone())
    }

    /// A certificate for a server of these names and addresses.
    ///
    /// # Errors
    /// A name that cannot stand in a certificate.
    pub fn sign(&self, names: &[String], now: SystemTime) -> Result<Certificate, AuthorityError> {
        let signer = self.signer(now)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let not_after = (now + SIGNED).min(signer.not_after);
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name = named(names.first().map_or("webhook", String::as_str));
        params.not_before = (now - BACKDATE).max(signer.not_before).into();
        params.not_after = not_after.into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        let certificate = params.signed_by(&key, &signer.issuer)?;
        let chain = vec![certificate.der().clone(), signer.certificate.clone()];
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())?;
        let left = not_after.duration_since(now).unwrap_or_default();
        // A younger authority takes over as soon as it is known.
        let next = self.0.iter().map(|authority| authority.not_before + BACKDATE + SETTLING);
        let renew = next.filter(|at| *at > now).chain([now + left / 2]).min().unwrap_or(now);
        Ok(Certificate { key, renew, not_after })
    }
}

impl Authority {
    fn new(domain: Option<TrustDomain>, now: SystemTime) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named("nsm authority");
        if let Some(domain) = &domain {
            params.subject_alt_names = vec![SanType::URI(domain.id().as_str().try_into()?)];
        }
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + LIFETIME).into();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        Self::of(certificate.der().clone(), &PrivatePkcs8KeyDer::from(key.serialize_der()))
    }

    fn of(
        certificate: CertificateDer<'static>,
        key: &PrivatePkcs8KeyDer<'_>,
    ) -> Result<Self, AuthorityError> {
        let damaged = |e: &dyn std::fmt::Display| AuthorityError::Damaged(e.to_string());
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|e| damaged(&e))?;
        let validity = parsed.validity();
        let time = |seconds: i64| {
            let since = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
            SystemTime::UNIX_EPOCH + since
        };
        let (not_before, not_after) =
            (time(validity.not_before.timestamp()), time(validity.not_after.timestamp()));
        let names = parsed.subject_alternative_name().ok().flatten();
        let domain = names.and_then(|names| {
            names.value.general_names.iter().find_map(|name| match name {
                GeneralName::URI(uri) => uri.parse().ok(),
                _ => None,
            })
        });
        let key = KeyPair::try_from(key).map_err(|e| damaged(&e))?;
        if key.public_key_raw() != parsed.public_key().subject_public_key.data.as_ref() {
            return Err(AuthorityError::Damaged("a key is not that of its certificate".into()));
        }
        let pem = format!("{}{}", pem("CERTIFICATE", &certificate), key.serialize_pem());
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|e| damaged(&e))?;
        Ok(Self { certificate, issuer, domain, pem, not_before, not_after })
    }

    fn left(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    // RFC 5280 allows 64 characters.
    distinguished.push(DnType::CommonName, name.chars().take(64).collect::<String>());
    distinguished
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    let text = BASE64_STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line) + "\n");
    format!("-----BEGIN {label}-----\n{}-----END {label}-----\n", lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use rustls_pki_types::{ServerName, UnixTime};
    use webpki::{EndEntityCert, anchor_from_trusted_cert};

    use super::*;
    use crate::clock;

    const NAME: &str = "admission-webhook-svc.nsm-system.svc";

    fn names() -> Vec<String> {
        vec![NAME.into(), "127.0.0.1".into()]
    }

    /// As an API server does it.
    fn believes(bundle: &str, certificate: &Certificate, name: &str, now: SystemTime) -> bool {
        let roots: Vec<_> =
            CertificateDer::pem_slice_iter(bundle.as_bytes()).map(|root| root.unwrap()).collect();
        let anchors: Vec<_> = roots.iter().map(|root| anchor_from_trusted_cert(root).unwrap()).collect();
        let (leaf, intermediates) = certificate.key.cert.split_first().unwrap();
        let leaf = EndEntityCert::try_from(leaf).unwrap();
        let now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap());
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms.all;
        let usage = webpki::KeyUsage::server_auth();
        leaf.verify_for_usage(algorithms, &anchors, intermediates, now, usage, None, None).is_ok()
            && leaf.verify_is_valid_for_subject_name(&ServerName::try_from(name).unwrap()).is_ok()
    }

    #[test]
    fn servers_are_believed_for_years_by_whoever_knew_the_bundle_a_day_before() {
        let mut now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let begin = now;
        let mut authorities = Authorities::new(now).unwrap();
        let mut certificate = authorities.sign(&names(), now).unwrap();
        let (mut yesterday, mut changes) = (authorities.bundle(), 0);
        while now < begin + LIFETIME * 4 {
            if let Some(next) = authorities.renewed(now).unwrap() {
                (authorities, changes) = (next, changes + 1);
            }
            assert!(authorities.0.len() <= 2);
            if now >= certificate.renew {
                certificate = authorities.sign(&names(), now).unwrap();
            }
            assert!(believes(&yesterday, &certificate, NAME, now), "{changes}");
            assert!(believes(&authorities.bundle(), &certificate, NAME, now), "{changes}");
            (yesterday, now) = (authorities.bundle(), now + SETTLING);
        }
        assert!(changes >= 10, "in four years each of some six begins and ends: {changes}");
    }

    #[test]
    fn what_is_signed_is_for_its_names_and_its_time_only() {
        let now = clock::now();
        let authorities = Authorities::new(now).unwrap();
        let certificate = authorities.sign(&names(), now).unwrap();
        let bundle = authorities.bundle();
        assert!(
            believes(&bundle, &certificate, NAME, now) && believes(&bundle, &certificate, "127.0.0.1", now)
        );
        assert!(!believes(&bundle, &certificate, "other.nsm-system.svc", now));
        assert!(!believes(&bundle, &certificate, NAME, now + SIGNED + BACKDATE));
        assert!(!believes(&Authorities::new(now).unwrap().bundle(), &certificate, NAME, now));
        assert!(certificate.renew < certificate.not_after && certificate.renew > now);
    }

    #[test]
    fn what_was_kept_goes_on_and_what_ended_is_replaced() {
        let now = clock::now();
        let authorities = Authorities::new(now).unwrap();
        let kept = Authorities::parse(&authorities.pem()).unwrap();
        assert_eq!((kept.pem(), kept.bundle()), (authorities.pem(), authorities.bundle()));
        assert!(!kept.bundle().contains("PRIVATE"), "a bundle is for everybody");
        assert!(kept.renewed(now).unwrap().is_none());
        let certificate = kept.sign(&names(), now).unwrap();
        assert!(believes(&authorities.bundle(), &certificate, NAME, now));
        let later = now + LIFETIME * 2;
        let anew = kept.renewed(later).unwrap().expect("the old one has ended");
        assert_eq!(anew.0.len(), 1);
        let certificate = anew.sign(&names(), later).unwrap();
        assert!(believes(&anew.bundle(), &certificate, NAME, later), "it signs at once: there is no other");
    }

    #[test]
    fn svids_are_believed_for_years_by_whoever_got_the_bundle_with_one_of_the_day_before() {
        let id: SpiffeId = "spiffe://k8s.nsm/ns/default/pod/web-1".parse().unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        // Whatever the request says of itself does not count.
        let mut params = CertificateParams::new(vec!["registry.nsm-system.svc".into()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let request = params.serialize_request(&key).unwrap();
        let mut now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let end = now + LIFETIME * 4;
        let mut authorities = Authorities::of_domain("k8s.nsm".parse().unwrap(), now).unwrap();
        let (mut yesterday, mut signers) = (authorities.roots(), std::collections::BTreeSet::new());
        let mut old = None;
        while now < end {
            if let Some(next) = authorities.renewed(now).unwrap() {
                authorities = Authorities::parse(&next.pem()).unwrap();
            }
            let hour = Duration::from_secs(3600);
            let svid = authorities.issue(&id, request.der(), hour, now).unwrap();
            let at = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap());
            for roots in [&yesterday, &authorities.roots()] {
                let mut bundles = crate::Bundles::default();
                bundles.insert("k8s.nsm".parse().unwrap(), roots).unwrap();
                assert_eq!(bundles.verify(&svid, &[], at).unwrap().id(), &id);
                // One that is older is as good as before, until it ends.
                if let Some(old) = &old {
                    bundles.verify(old, &[], at).unwrap();
                }
            }
            let (_, parsed) = X509Certificate::from_der(&svid).unwrap();
            let _new = signers
                .insert(format!("{:?}", parsed.extensions().iter().map(|e| e.value).collect::<Vec<_>>()));
            old = Some(authorities.issue(&id, request.der(), SETTLING * 2, now).unwrap());
            (yesterday, now) = (authorities.roots(), now + SETTLING);
        }
        assert!(signers.len() >= 5, "in four years some six sign: {}", signers.len());
    }

    #[test]
    fn identities_are_of_the_domain_and_keys_of_one_kind() {
        let now = clock::now();
        let authorities = Authorities::of_domain("k8s.nsm".parse().unwrap(), now).unwrap();
        assert_eq!(authorities.domain().unwrap().as_str(), "k8s.nsm");
        let request = |algorithm| {
            let key = KeyPair::generate_for(algorithm).unwrap();
            CertificateParams::default().serialize_request(&key).unwrap().der().to_vec()
        };
        let (good, ed25519) = (request(&PKCS_ECDSA_P256_SHA256), request(&rcgen::PKCS_ED25519));
        let mut forged = good.clone();
        *forged.last_mut().unwrap() ^= 1;
        let (id, other): (SpiffeId, SpiffeId) =
            ("spiffe://k8s.nsm/ns/a/pod/b".parse().unwrap(), "spiffe://other/ns/a/pod/b".parse().unwrap());
        let of_servers = Authorities::new(now).unwrap();
        for (authorities, id, request, says) in [
            (
                &authorities,
                &other,
                &good[..],
                "no workload in the trust domain of these authorities (k8s.nsm)",
            ),
            (&of_servers, &id, &good, "trust domain of these authorities (none)"),
            (&authorities, &"spiffe://k8s.nsm".parse().unwrap(), &good, "no workload in the trust domain"),
            (
                &authorities,
                &id,
                &ed25519,
                "its key is of another kind; expected PKCS#10 with a key of ECDSA P-256",
            ),
            (&authorities, &id, &forged, "cannot be used"),
            (&authorities, &id, b"nonsense", "cannot be used"),
        ] {
            let error = authorities.issue(id, request, SETTLING, now).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(authorities.issue(&id, &good, SETTLING, now).is_ok());
    }

    #[test]
    fn what_is_damaged_is_told() {
        let good = Authorities::new(clock::now()).unwrap().pem();
        let other = Authorities::new(clock::now()).unwrap().pem();
        let key = good.find("-----BEGIN PRIVATE").unwrap();
        let others_key = other.find("-----BEGIN PRIVATE").unwrap();
        for (bad, says) in [
            (String::new(), "0 certificates and 0 keys"),
            (good[..key].to_owned(), "1 certificates and 0 keys"),
            (format!("{}{}", &good[..key], &other[others_key..]), "a key is not that of its certificate"),
            (good.replace("-----END CERTIFICATE-----", ""), "cannot be used"),
        ] {
            let error = Authorities::parse(&bad).expect_err(&bad).to_string();
            assert!(error.contains(says) && error.contains("expected pairs of CERTIFICATE"), "{error}");
        }
        let error = Authorities::parse(&good).unwrap().sign(&["ä".into()], clock::now()).unwrap_err();
        assert!(error.to_string().contains("a certificate cannot be made"), "{error}");
    }
}
