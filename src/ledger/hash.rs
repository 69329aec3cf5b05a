//! The hash by which replicas name and order things.
//!
//! Knows bytes. Must not know what they mean. The invariant it keeps: it is the same on every
//! machine, in every release and with every toolchain, because replicas must agree on it.

/// FNV-1a with the finalizer of SplitMix64 (Steele, Lea, Flood 2014), which spreads FNV's weak
/// high bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StableHash(u64);

impl StableHash {
    pub(crate) const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    pub(crate) fn write_u64(&mut self, value: u64) {
        self.write(&value.to_le_bytes());
    }

    pub(crate) const fn finish(self) -> u64 {
        mix(self.0)
    }
}

/// The finalizer of SplitMix64: a bijection that makes neighbours unrelated.
pub(crate) const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::LimitId;

    /// Replicas of different releases must agree: these values, from another program, are a part of
    /// the wire's contract.
    #[test]
    fn a_hash_never_changes() {
        assert_eq!(StableHash::new().finish(), 0xf52a_15e9_a9b5_e89b);
        assert_eq!(LimitId::of("gpt-4o-eastus").bits(), 0x197d_2470_dea5_d132);
    }
}
