//! The keys: a root of one trust domain, and the SVIDs it signs.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::Path,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject};
use tracing::{info, warn};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use super::CaError;
use crate::{
    Error,
    id::{SpiffeId, TrustDomain},
    svid::{Bundles, Identity, Svid},
};

/// Clocks of a mesh differ; a certificate is valid from this long before it was made.
pub(super) const BACKDATE: Duration = Duration::from_secs(5 * 60);
/// How long a root is good for. A persisted one is replaced when its last tenth begins.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Certificate and key in one file, so that one rename replaces both.
const FILE: &str = "ca.pem";

/// The root of a trust domain.
#[derive(Debug)]
pub struct Authority {
    domain: TrustDomain,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    not_after: SystemTime,
}

impl Authority {
    /// A root with a new P-256 key, which lives as long as this value.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn new(domain: TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        Self::generate(domain, now).map(|(authority, _)| authority)
    }

    /// The root kept in `dir`, made there if there is none: directory 0700, file 0600, replaced atomically.
    ///
    /// # Errors
    /// The directory cannot be used, its root is readable by others, unreadable, or of another trust domain.
    pub fn open(dir: &Path, domain: TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        let path = dir.join(FILE);
        let failed = |what| {
            let path = path.clone();
            move |source| CaError::State { path, what, source }
        };
        if !dir.is_dir() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(failed("make the directory of"))?;
        }
        match fs::metadata(&path) {
            Ok(meta) if meta.mode() & 0o077 != 0 => return Err(CaError::Exposed(path)),
            Ok(_) => {
                let pem = fs::read_to_string(&path).map_err(failed("read"))?;
                let authority =
                    Self::parse(&pem).map_err(|reason| CaError::Damaged { path: path.clone(), reason })?;
                if authority.domain != domain {
                    return Err(CaError::OtherDomain { path, found: authority.domain, wanted: domain });
                }
                let left = authority.not_after.duration_since(now).unwrap_or_default();
                if left > ROOT_LIFETIME / 10 {
                    return Ok(authority);
                }
                warn!(path = %path.display(), "the root is near its end and is replaced: restart all peers");
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed("inspect")(e)),
        }
        let (authority, pem) = Self::generate(domain, now)?;
        write_private(&path, &pem).map_err(failed("write"))?;
        info!(path = %path.display(), domain = %authority.domain, "made a root");
        Ok(authority)
    }

    /// Whom this root speaks for.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The root's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Signs an SVID with a new P-256 key, valid from five minutes ago until `lifetime` from now (at most as long as
    /// the root).
    ///
    /// # Errors
    /// The ID is not in the trust domain, or there is no randomness.
    pub fn issue(&self, id: &SpiffeId, lifetime: Duration, now: SystemTime) -> Result<Svid, Error> {
        if !id.is_member_of(&self.domain) || id.path().is_empty() {
            return Err(CaError::NotOurs { id: id.clone(), domain: self.domain.clone() }.into());
        }
        let end = now.checked_add(lifetime).unwrap_or(self.not_after).min(self.not_after);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CaError::from)?;
        let mut params = leaf(id, now - BACKDATE).map_err(CaError::from)?;
        params.not_after = end.into();
        let certificate = params.signed_by(&key, &self.issuer).map_err(CaError::from)?;
        Svid::new(vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()))
    }

    /// An SVID together with this root as the only trusted one.
    ///
    /// # Errors
    /// As [`Authority::issue`].
    pub fn identity(&self, id: &SpiffeId, lifetime: Duration, now: SystemTime) -> Result<Identity, Error> {
        let mut bundles = Bundles::default();
        bundles.insert(self.domain.clone(), std::slice::from_ref(&self.certificate))?;
        Identity::new(self.issue(id, lifetime, now)?, bundles)
    }

    fn generate(domain: TrustDomain, now: SystemTime) -> Result<(Self, String), CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let end = now + ROOT_LIFETIME;
        let mut params = params(domain.id().as_str(), now - BACKDATE)?;
        params.not_after = end.into();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        let pem = format!("{}{}", certificate.pem(), key.serialize_pem());
        let certificate = certificate.der().clone();
        Ok((Self { domain, issuer: Issuer::new(params, key), certificate, not_after: end }, pem))
    }

    #[doc(hidden)]
    pub fn parse(pem: &str) -> Result<Self, &'static str> {
        let certificate =
            CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| "no certificate in it")?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| "no private key in it")?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256)
            .map_err(|_| "its private key is no P-256 key")?;
        let (_, parsed) =
            X509Certificate::from_der(&certificate).map_err(|_| "its certificate is damaged")?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err("its key and certificate do not belong together");
        }
        let names = parsed.subject_alternative_name().ok().flatten();
        let domain = names
            .and_then(|names| {
                names.value.general_names.iter().find_map(|name| match name {
                    GeneralName::URI(uri) => uri.parse::<TrustDomain>().ok(),
                    _ => None,
                })
            })
            .ok_or("its certificate names no trust domain")?;
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
        let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.min(u64::from(u32::MAX) * 4));
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|_| "its certificate is no CA's")?;
        Ok(Self { domain, issuer, certificate, not_after })
    }
}

/// What an X.509-SVID says, but for its end.
pub(super) fn leaf(id: &SpiffeId, begin: SystemTime) -> Result<CertificateParams, rcgen::Error> {
    let mut params = params(id.as_str(), begin)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.is_ca = IsCa::ExplicitNoCa;
    Ok(params)
}

fn params(uri: &str, begin: SystemTime) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "nsm");
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    params.not_before = begin.into();
    Ok(params)
}

/// Writes a file that only its owner may read, so that a reader sees the old one or the whole new one.
fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_extension("new");
    // A leftover of a killed daemon: `create_new` must not meet it.
    let _ = fs::remove_file(&temporary);
    let written = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).and_then(
        |mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        },
    );
    written.and_then(|()| fs::rename(&temporary, path)).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}
