//! The certificates of hops that are no neighbours of ours: what their tokens' signatures are verified with.
//!
//! Whoever writes a token into a path names the certificate that signed it, by the hash of its leaf, and hands the chain
//! on until the receiver has it. Anybody may hand on anybody's: a chain counts because a root of its own trust domain
//! vouches for it, not because of who sent it. What is remembered has been verified, and is bounded.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};

use crate::svid::{Bundles, CertificateError, Leaf};

/// What tells a certificate from others: the SHA-256 of it.
pub type Fingerprint = [u8; 32];

/// Chains that are remembered: some 1 KiB each. The oldest goes first.
const MOST: usize = 4096;

/// The chains that a process knows, of whoever.
#[derive(Debug, Default)]
pub struct Chains(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    chains: HashMap<Fingerprint, Arc<Chain>>,
    order: VecDeque<Fingerprint>,
}

/// A chain that was verified.
#[derive(Debug)]
pub struct Chain {
    leaf: Leaf,
    certificates: Vec<CertificateDer<'static>>,
    /// The roots that vouched for it: with others it has to be verified anew.
    roots: Vec<TrustAnchor<'static>>,
}

impl Chain {
    /// Whose it is, and the key.
    pub fn leaf(&self) -> &Leaf {
        &self.leaf
    }

    /// The certificates in DER, leaf first.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }
}

impl Chains {
    /// Takes in a chain (DER, leaf first) that a hop has handed on, and tells what it is known by from now on. What is
    /// known already costs a hash.
    ///
    /// # Errors
    /// It stands for nobody, or no root of its trust domain vouches for it now.
    pub fn learn(
        &self,
        chain: &[impl AsRef<[u8]>],
        trusted: &Bundles,
        now: SystemTime,
    ) -> Result<Fingerprint, CertificateError> {
        let leaf = chain.first().ok_or(CertificateError::Malformed)?.as_ref();
        let fingerprint = crate::svid::fingerprint(leaf);
        if self.find(&fingerprint, trusted, now).is_none() {
            let certificates = chain.iter().map(|der| CertificateDer::from(der.as_ref().to_vec())).collect();
            self.keep(verified(certificates, trusted, now)?);
        }
        Ok(fingerprint)
    }

    /// Takes in our own chain, or one that a handshake has just verified.
    pub fn met(&self, leaf: &Leaf, certificates: &[CertificateDer<'static>], trusted: &Bundles) {
        if !self.lock().chains.contains_key(leaf.fingerprint()) {
            let roots = trusted.roots(&leaf.id().trust_domain()).to_vec();
            self.keep(Chain { leaf: leaf.clone(), certificates: certificates.to_vec(), roots });
        }
    }

    /// A chain that is known, not out of date, and vouched for by these roots.
    pub fn find(&self, fingerprint: &[u8], trusted: &Bundles, now: SystemTime) -> Option<Arc<Chain>> {
        let fingerprint = Fingerprint::try_from(fingerprint).ok()?;
        let chain = self.lock().chains.get(&fingerprint).cloned()?;
        if chain.leaf.not_after() <= now {
            return None;
        }
        if trusted.roots(&chain.leaf.id().trust_domain()) == chain.roots {
            return Some(chain);
        }
        let anew = Arc::new(verified(chain.certificates.clone(), trusted, now).ok()?);
        self.lock().chains.insert(fingerprint, anew.clone());
        Some(anew)
    }

    fn keep(&self, chain: Chain) {
        let fingerprint = *chain.leaf.fingerprint();
        let mut known = self.lock();
        if known.chains.insert(fingerprint, Arc::new(chain)).is_none() {
            known.order.push_back(fingerprint);
        }
        while known.order.len() > MOST {
            let oldest = known.order.pop_front();
            oldest.map(|oldest| known.chains.remove(&oldest));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn verified(
    certificates: Vec<CertificateDer<'static>>,
    trusted: &Bundles,
    now: SystemTime,
) -> Result<Chain, CertificateError> {
    let (leaf, intermediates) = certificates.split_first().ok_or(CertificateError::Malformed)?;
    let at = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    let leaf = trusted.verify(leaf, intermediates, at)?;
    let roots = trusted.roots(&leaf.id().trust_domain()).to_vec();
    Ok(Chain { leaf, certificates, roots })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock;
    use crate::{SpiffeId, ca::Authority};

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_chain_counts_while_a_root_of_its_domain_vouches_for_it() {
        let now = clock::now();
        let authority = |domain: &str| Authority::new(domain.parse().unwrap(), now).unwrap();
        let (ours, other, forger) = (authority("test.lab"), authority("other.lab"), authority("test.lab"));
        let id = |text: &str| text.parse::<SpiffeId>().unwrap();
        let of = |authority: &Authority, name: &str| authority.identity(&id(name), HOUR, now).unwrap();
        let me = of(&ours, "spiffe://test.lab/me");
        let hop = of(&ours, "spiffe://test.lab/hop");
        let chains = Chains::default();
        let print = chains.learn(hop.svid().chain(), me.bundles(), now).unwrap();
        assert_eq!(print, *hop.svid().leaf().fingerprint());
        assert_eq!(chains.find(&print, me.bundles(), now).unwrap().leaf(), hop.svid().leaf());
        let forged = of(&forger, "spiffe://test.lab/hop");
        let error = chains.learn(forged.svid().chain(), me.bundles(), now).unwrap_err();
        assert!(matches!(error, CertificateError::Chain { .. }), "{error}");
        let foreign = of(&other, "spiffe://other.lab/hop");
        let error = chains.learn(foreign.svid().chain(), me.bundles(), now).unwrap_err();
        assert!(matches!(error, CertificateError::UnknownDomain { .. }), "{error}");
        for bad in [&[][..], &[&b"nonsense"[..]]] {
            assert_eq!(chains.learn(bad, me.bundles(), now), Err(CertificateError::Malformed));
        }
        // Not when it is out of date, and not when its root is trusted no more.
        assert!(chains.find(&print, me.bundles(), now + HOUR * 2).is_none());
        assert!(chains.find(&print, forged.bundles(), now).is_none());
        assert!(chains.find(&print, me.bundles(), now).is_some());
        assert!(chains.find(&print[1..], me.bundles(), now).is_none());
        // What a connection has brought is known without being verified once more.
        chains.met(forged.svid().leaf(), forged.svid().chain(), forged.bundles());
        assert!(chains.find(forged.svid().leaf().fingerprint(), forged.bundles(), now).is_some());
        assert!(chains.find(forged.svid().leaf().fingerprint(), me.bundles(), now).is_none());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let now = clock::now();
        let authority = Authority::new("test.lab".parse().unwrap(), now).unwrap();
        let id = "spiffe://test.lab/hop".parse().unwrap();
        let chains = Chains::default();
        let first = authority.identity(&id, HOUR, now).unwrap();
        for identity in std::iter::once(first.clone())
            .chain((0..MOST).map(|_| authority.identity(&id, HOUR, now).unwrap()))
        {
            chains.met(identity.svid().leaf(), identity.svid().chain(), identity.bundles());
        }
        assert_eq!(chains.lock().chains.len(), MOST);
        assert!(chains.find(first.svid().leaf().fingerprint(), first.bundles(), now).is_none());
    }
}
