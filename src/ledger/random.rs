//! The ledger's randomness: which peer to ask, how refused callers are spread.
//!
//! Knows one generator. Must not know the system's entropy: the seed is an argument. The
//! invariant it keeps: the same seed and the same calls give the same numbers everywhere.

use super::hash::mix;

/// SplitMix64 (Steele, Lea, Flood 2014): the ledger's randomness, from its one seed. It
/// picks peers and spreads callers; nothing secret depends on it.
#[derive(Debug)]
pub(super) struct SplitMix64(pub(super) u64);

impl SplitMix64 {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Returns a number below `bound`, or 0 if that is 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}
