//! What a peer was told on a connection and keeps, so that it need not be told again.

use std::collections::HashSet;

use parking_lot::Mutex;

/// As many things as one peer is known to have; of more it is told again.
const MOST: usize = 4096;

/// Certificates, by their hashes.
#[derive(Debug, Default)]
pub struct Told(Mutex<HashSet<Box<[u8]>>>);

impl Told {
    /// Whether the peer has it.
    pub fn has(&self, hash: &[u8]) -> bool {
        self.0.lock().contains(hash)
    }

    /// The peer has these.
    pub fn add<'a>(&self, hashes: impl Iterator<Item = &'a [u8]>) {
        let mut has = self.0.lock();
        for hash in hashes.filter(|hash| !hash.is_empty()) {
            if has.len() < MOST && !has.contains(hash) {
                has.insert(hash.into());
            }
        }
    }

    /// Whether it is known to have anything.
    pub fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// It may have lost them.
    pub fn clear(&self) {
        self.0.lock().clear();
    }
}
