//! What is left to chance, from a seed.

use std::{ops::Range, time::Duration};

use crate::ambient;

/// A source of chance.
#[derive(Debug, Clone)]
pub(crate) struct Chance(u64);

impl Chance {
    /// Of this seed, for this purpose: what one purpose draws changes nothing for the others.
    pub(crate) fn new(seed: u64, purpose: u64) -> Self {
        let mut state = seed ^ purpose.wrapping_mul(0x2545_f491_4f6c_dd1d);
        ambient::next(&mut state);
        Self(state)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        ambient::next(&mut self.0)
    }

    /// From 0 up to 1.
    pub(crate) fn fraction(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(crate) fn happens(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.fraction() < probability
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound.max(1) as u64) as usize
    }

    /// Short ones are as likely as long ones are in all.
    pub(crate) fn duration(&mut self, between: Range<Duration>) -> Duration {
        let (least, most) = (between.start.as_secs_f64().max(1e-6), between.end.as_secs_f64());
        Duration::from_secs_f64(least * (most / least).powf(self.fraction()))
    }
}
