//! The webhook's own certificates: authorities that follow each other, and what they sign.
//!
//! API servers trust what stands in the `caBundle` of the webhook's configuration, and learn of a change a moment late.
//! So an authority stands in the bundle for a while before it signs, and until it ends:
//!
//! ```text
//! first     |=========signs=========|--trusted--|
//! second                     |-trusted-|=========signs=========|--trusted--|
//! ```
//!
//! All of it follows from the certificates and the time: whoever reads the same authorities does the same.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::{crypto::aws_lc_rs, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use x509_parser::prelude::{FromDer as _, X509Certificate};

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
}

/// The authorities of a webhook, oldest first; never none.
#[derive(Debug)]
pub struct Authorities(Vec<Authority>);

#[derive(Debug)]
struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
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
    /// A first one.
    ///
    /// # Errors
    /// There is no randomness.
    pub fn new(now: SystemTime) -> Result<Self, AuthorityError> {
        Ok(Self(vec![Authority::new(now)?]))
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

    /// The certificates: what API servers shall trust.
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
            pem += &Authority::new(now)?.pem;
        }
        Self::parse(&pem).map(Some)
    }

    /// A certificate for a server of these names and addresses, signed by the newest that API servers know by now.
    ///
    /// # Errors
    /// A name that cannot stand in a certificate.
    pub fn sign(&self, names: &[String], now: SystemTime) -> Result<Certificate, AuthorityError> {
        let settled = |authority: &&Authority| authority.not_before + BACKDATE + SETTLING <= now;
        let live = || self.0.iter().filter(|authority| authority.not_after > now);
        let signer = live().rfind(settled).or(live().next()).or(self.0.last());
        let signer = signer.ok_or_else(|| AuthorityError::Damaged("there is none".into()))?;
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
    fn new(now: SystemTime) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named("nsm webhook authority");
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
        let key = KeyPair::try_from(key).map_err(|e| damaged(&e))?;
        if key.public_key_raw() != parsed.public_key().subject_public_key.data.as_ref() {
            return Err(AuthorityError::Damaged("a key is not that of its certificate".into()));
        }
        let pem = format!("{}{}", pem("CERTIFICATE", &certificate), key.serialize_pem());
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|e| damaged(&e))?;
        Ok(Self { certificate, issuer, pem, not_before, not_after })
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
        let now = SystemTime::now();
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
        let now = SystemTime::now();
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
    fn what_is_damaged_is_told() {
        let good = Authorities::new(SystemTime::now()).unwrap().pem();
        let other = Authorities::new(SystemTime::now()).unwrap().pem();
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
        let error = Authorities::parse(&good).unwrap().sign(&["ä".into()], SystemTime::now()).unwrap_err();
        assert!(error.to_string().contains("a certificate cannot be made"), "{error}");
    }
}
