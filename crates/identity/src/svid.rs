//! X.509-SVIDs, trust bundles, and the TLS that follows from them.
//!
//! An [`Identity`] is one immutable snapshot: the SVID a process presents and the roots it trusts. Rotation makes
//! a new snapshot; a connection keeps the one it was made with, because tokens must be signed by the key that was
//! presented on that connection (`control-plane.md` 14.1).

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use aws_lc_rs::{
    digest,
    error::Unspecified,
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, ParsedPublicKey,
    },
};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{self, CryptoProvider, WebPkiSupportedAlgorithms},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, TrustAnchor, UnixTime,
};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY},
    prelude::FromDer,
};

use crate::{
    Error,
    chains::{Chains, Fingerprint},
    clock::Clock,
    id::{SpiffeId, TrustDomain},
};

/// What a certificate must be to stand for somebody, checked: a leaf with exactly one SPIFFE ID.
///
/// Parsing says nothing about who signed it: that is [`Bundles::verify`].
#[derive(Clone)]
pub struct Leaf {
    der: CertificateDer<'static>,
    fingerprint: Fingerprint,
    id: SpiffeId,
    not_after: SystemTime,
    /// The key if it is P-256, which is what tokens are verified with: parsed once, used for every call.
    p256_key: Option<ParsedPublicKey>,
    /// The last token that this key was found to have signed: peers of ours send the same for a second.
    verified: Arc<Mutex<Option<Box<str>>>>,
}

/// An X.509-SVID with its private key, which never shows in `Debug`.
#[derive(Clone)]
pub struct Svid {
    leaf: Leaf,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivatePkcs8KeyDer<'static>>,
    signer: Arc<EcdsaKeyPair>,
}

/// The roots of each trusted domain.
#[derive(Clone, Default)]
pub struct Bundles(BTreeMap<TrustDomain, Vec<TrustAnchor<'static>>>);

/// A snapshot of who we are and whom we trust, with the TLS configurations that follow from it.
#[derive(Clone)]
pub struct Identity {
    svid: Svid,
    bundles: Bundles,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    chains: Arc<Chains>,
}

/// Why a certificate is not accepted as an X.509-SVID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not a certificate.
    #[error("not an X.509 certificate in DER")]
    Malformed,
    /// SPIFFE X.509-SVID, section 2: exactly one URI SAN.
    #[error("an X.509-SVID has exactly one URI name, this certificate has {0}")]
    UriNames(usize),
    /// The URI is no SPIFFE ID, or one without a path.
    #[error("the certificate's URI is no SPIFFE ID of a workload: {0}")]
    Id(String),
    /// SPIFFE X.509-SVID, sections 4.1 and 4.3: a leaf must not sign certificates.
    #[error(
        "the certificate of {0} may sign certificates (CA, keyCertSign or cRLSign): it cannot stand for a workload"
    )]
    Authority(SpiffeId),
    /// No roots for the peer's trust domain.
    #[error(
        "no roots for trust domain {domain}, needed to verify {id}; federate with it or check trustDomain"
    )]
    UnknownDomain {
        /// Whose certificate it is.
        id: SpiffeId,
        /// Its trust domain.
        domain: TrustDomain,
    },
    /// The chain does not lead to a root of the trust domain, or is out of date.
    #[error("the certificate of {id} is not vouched for by its trust domain: {reason}")]
    Chain {
        /// Whose certificate it claims to be.
        id: SpiffeId,
        /// What the verifier says.
        reason: String,
    },
}

impl Leaf {
    /// Parses a certificate and applies the rules for leaves of SPIFFE X.509-SVID, as go-spiffe does.
    pub fn parse(der: CertificateDer<'static>) -> Result<Self, CertificateError> {
        let (rest, cert) = X509Certificate::from_der(&der).map_err(|_| CertificateError::Malformed)?;
        if !rest.is_empty() {
            return Err(CertificateError::Malformed);
        }
        let mut uris = Vec::new();
        let mut authority = false;
        for extension in cert.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(san) => {
                    uris.extend(san.general_names.iter().filter_map(|name| match name {
                        GeneralName::URI(uri) => Some(*uri),
                        _ => None,
                    }));
                }
                ParsedExtension::BasicConstraints(basic) => authority |= basic.ca,
                ParsedExtension::KeyUsage(usage) => authority |= usage.key_cert_sign() || usage.crl_sign(),
                _ => {}
            }
        }
        let [uri] = uris[..] else { return Err(CertificateError::UriNames(uris.len())) };
        let id: SpiffeId = uri.parse().map_err(|e: crate::InvalidId| CertificateError::Id(e.to_string()))?;
        if authority {
            return Err(CertificateError::Authority(id));
        }
        let seconds = u64::try_from(cert.validity().not_after.timestamp()).unwrap_or(0);
        // `checked_add`: a certificate may name the year 9999, a platform's clock need not reach it.
        let not_after = SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(seconds))
            .ok_or(CertificateError::Malformed)?;
        let algorithm = &cert.public_key().algorithm;
        let is_p256 = algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY
            && algorithm
                .parameters
                .as_ref()
                .and_then(|p| p.as_oid().ok())
                .is_some_and(|oid| oid == OID_EC_P256);
        let point =
            || ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &cert.public_key().subject_public_key.data);
        let p256_key = is_p256.then(point).transpose().map_err(|_| CertificateError::Malformed)?;
        let fingerprint = fingerprint(&der);
        Ok(Self { id, not_after, p256_key, der, fingerprint, verified: Arc::default() })
    }

    /// Whom the certificate stands for.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The certificate, DER.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// What tells it from others.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The certificate as PEM: what upstream's policies get of the peer.
    pub fn pem(&self) -> String {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let text = STANDARD.encode(&self.der);
        let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
        for line in text.as_bytes().chunks(64) {
            pem.extend(line.iter().copied().map(char::from));
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE-----\n");
        pem
    }

    /// End of validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Verifies an ES256 signature, r and s of 32 bytes each. A key of another kind has signed nothing.
    pub(crate) fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        self.p256_key.as_ref().is_some_and(|key| key.verify_sig(message, signature).is_ok())
    }

    /// Was this very token remembered last?
    pub(crate) fn remembers(&self, jwt: &str) -> bool {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner).as_deref() == Some(jwt)
    }

    /// Remembers a token that the key has signed.
    pub(crate) fn remember(&self, jwt: &str) {
        *self.verified.lock().unwrap_or_else(PoisonError::into_inner) = Some(jwt.into());
    }
}

impl Svid {
    /// Joins a chain (leaf first) and its key, PKCS#8 DER.
    ///
    /// # Errors
    /// The leaf is no X.509-SVID, its key is not P-256, so that tokens could not be signed (`control-plane.md` 5.1), or
    /// key and certificate do not belong together.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivatePkcs8KeyDer<'static>) -> Result<Self, Error> {
        let leaf = chain.first().cloned().ok_or(Error::EmptyChain)?;
        let leaf = Leaf::parse(leaf)?;
        let Some(public) = &leaf.p256_key else { return Err(Error::NotP256(leaf.id)) };
        let signer = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_pkcs8_der());
        let signer = signer.map_err(|_| Error::NotP256(leaf.id.clone()))?;
        if signer.public_key().as_ref() != public.as_ref() {
            return Err(Error::KeyMismatch(leaf.id));
        }
        Ok(Self { leaf, chain, key: Arc::new(key), signer: Arc::new(signer) })
    }

    /// Whom the SVID stands for.
    pub fn id(&self) -> &SpiffeId {
        &self.leaf.id
    }

    /// The leaf certificate.
    pub fn leaf(&self) -> &Leaf {
        &self.leaf
    }

    /// The certificates, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// End of validity of the leaf.
    pub fn not_after(&self) -> SystemTime {
        self.leaf.not_after
    }

    /// The private key, PKCS#8 DER: for the Workload API's answer only.
    pub(crate) fn key(&self) -> &PrivatePkcs8KeyDer<'static> {
        &self.key
    }

    /// Signs with ES256: r and s of 32 bytes each.
    ///
    /// # Errors
    /// The library has no randomness.
    pub fn sign(&self, message: &[u8]) -> Result<impl AsRef<[u8]> + use<>, Unspecified> {
        self.signer.sign(&SystemRandom::new(), message)
    }
}

impl Bundles {
    /// Trusts `roots` (DER certificates) for `domain`, in place of what was trusted for it before.
    ///
    /// # Errors
    /// One of the roots is no certificate.
    pub fn insert(&mut self, domain: TrustDomain, roots: &[CertificateDer<'_>]) -> Result<(), Error> {
        let anchors = roots
            .iter()
            .map(|root| webpki::anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| Error::Root { domain: domain.clone(), source })?;
        self.0.insert(domain, anchors);
        Ok(())
    }

    /// The roots of a domain; none for one that is not trusted.
    pub(crate) fn roots(&self, domain: &TrustDomain) -> &[TrustAnchor<'static>] {
        self.0.get(domain).map_or(&[], Vec::as_slice)
    }

    /// The trusted domains.
    pub fn domains(&self) -> impl Iterator<Item = &TrustDomain> {
        self.0.keys()
    }

    /// Verifies a presented chain as `control-plane.md` 14.1 says: a leaf with one SPIFFE ID, vouched for by a root
    /// of its own trust domain, valid `now`; extended key usage and host name do not matter.
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Leaf, CertificateError> {
        let checked = Leaf::parse(leaf.clone().into_owned())?;
        let domain = checked.id.trust_domain();
        let Some(anchors) = self.0.get(&domain) else {
            return Err(CertificateError::UnknownDomain { id: checked.id, domain });
        };
        let chain =
            |e: webpki::Error| CertificateError::Chain { id: checked.id.clone(), reason: e.to_string() };
        webpki::EndEntityCert::try_from(leaf)
            .map_err(chain)?
            .verify_for_usage(algorithms().all, anchors, intermediates, now, AnyUsage, None, None)
            .map_err(chain)?;
        Ok(checked)
    }
}

impl Identity {
    /// A snapshot; builds the TLS configurations.
    ///
    /// # Errors
    /// TLS refuses key or certificate.
    pub fn new(svid: Svid, bundles: Bundles) -> Result<Self, Error> {
        let provider = Arc::new(crypto::aws_lc_rs::default_provider());
        let verifier = Arc::new(Verifier { bundles: bundles.clone() });
        let key = || PrivateKeyDer::Pkcs8(svid.key.clone_key());
        let tls = |source| Error::Tls { id: svid.id().clone(), source };

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_auth_cert(svid.chain.clone(), key())
            .map_err(tls)?;
        client.time_provider = Arc::new(Clock);
        client.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would carry an old certificate over a rotation (`control-plane.md` 17, rule 12).
        client.resumption = rustls::client::Resumption::disabled();

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(svid.chain.clone(), key())
            .map_err(tls)?;
        server.time_provider = Arc::new(Clock);
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        let chains = Arc::<Chains>::default();
        Ok(Self { svid, bundles, client: Arc::new(client), server: Arc::new(server), chains })
    }

    /// The same, going on with the chains that an earlier snapshot of this process knows.
    #[must_use]
    pub fn after(self, earlier: &Self) -> Self {
        Self { chains: Arc::clone(&earlier.chains), ..self }
    }

    /// Who we are.
    pub fn id(&self) -> &SpiffeId {
        self.svid.id()
    }

    /// The SVID that connections of this snapshot present.
    pub fn svid(&self) -> &Svid {
        &self.svid
    }

    /// Whom this snapshot trusts.
    pub fn bundles(&self) -> &Bundles {
        &self.bundles
    }

    /// The chains of hops that this process knows.
    pub fn chains(&self) -> &Chains {
        &self.chains
    }

    /// TLS for dialling: mutual, ALPN `h2`, TLS 1.2 or newer, no resumption, host names ignored.
    pub fn client_config(&self) -> &Arc<ClientConfig> {
        &self.client
    }

    /// TLS for listening: demands a client certificate; otherwise as [`Identity::client_config`].
    pub fn server_config(&self) -> &Arc<ServerConfig> {
        &self.server
    }
}

/// Splits concatenated DER certificates, the Workload API's form of chains and bundles.
pub fn split_certificates(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let mut certificates = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
        certificates.push(CertificateDer::from(der[..der.len() - rest.len()].to_vec()));
        der = rest;
    }
    Ok(certificates)
}

pub(crate) fn fingerprint(der: &[u8]) -> Fingerprint {
    let mut fingerprint = Fingerprint::default();
    fingerprint.copy_from_slice(digest::digest(&digest::SHA256, der).as_ref());
    fingerprint
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    static PROVIDER: std::sync::LazyLock<CryptoProvider> =
        std::sync::LazyLock::new(crypto::aws_lc_rs::default_provider);
    PROVIDER.signature_verification_algorithms
}

/// Extended key usage is not restricted: SPIFFE leaves both purposes to the mesh.
struct AnyUsage;

impl webpki::ExtendedKeyUsageValidator for AnyUsage {
    fn validate(&self, _: webpki::KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}

/// rustls' verifier for both directions.
#[derive(Debug)]
struct Verifier {
    bundles: Bundles,
}

impl Verifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.bundles.verify(leaf, intermediates, now).map(drop).map_err(|e| {
            rustls::Error::InvalidCertificate(rustls::CertificateError::Other(rustls::OtherError(Arc::new(
                e,
            ))))
        })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, leaf, signed, &algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, leaf, signed, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, leaf, signed, &algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, leaf, signed, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

impl PartialEq for Leaf {
    fn eq(&self, other: &Self) -> bool {
        // All else follows from it.
        self.der == other.der
    }
}

impl Eq for Leaf {}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaf")
            .field("id", &self.id)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", self.id())
            .field("not_after", &self.not_after())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Bundles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.iter().map(|(domain, roots)| (domain, roots.len()))).finish()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("svid", &self.svid)
            .field("bundles", &self.bundles)
            .finish_non_exhaustive()
    }
}
