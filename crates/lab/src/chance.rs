//! What is drawn: the same for ever from the same seed.

use std::collections::BTreeSet;

/// `SplitMix64` (Steele, Lea, Flood 2014): a few lines that give the same numbers for ever, so that a seed stays what it
/// was.
#[derive(Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`; 0 if that is 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }

    pub(crate) fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    pub(crate) fn one<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        of.get(self.below(of.len() as u64) as usize)
    }

    /// Up to `most` of them, at least one if there is one.
    pub(crate) fn some<T: Clone + Ord>(&mut self, of: &[T], most: u64) -> Vec<T> {
        let count = self.between(1, most);
        let chosen: BTreeSet<T> = (0..count).filter_map(|_| self.one(of).cloned()).collect();
        chosen.into_iter().collect()
    }
}
