//! The one source of randomness: SplitMix64 streams that all derive from a run's seed.
//!
//! Knows numbers and distributions. Must not know what they decide. The invariant it
//! keeps: the same seed and stream name give the same numbers in every build and on every
//! machine, so logarithm and exponential are computed here from the four basic operations,
//! which IEEE 754 fixes, and not by the platform's library.

/// A stream of random numbers (SplitMix64: Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// Returns the stream with this name of the run with this seed. Streams are
    /// independent, so that one more draw in one of them moves nothing in the others.
    pub(crate) fn stream(seed: u64, name: &str) -> Self {
        let mut state = mix(seed ^ 0x5eed_5eed_5eed_5eed);
        for byte in name.bytes() {
            state = mix(state ^ u64::from(byte));
        }
        Self(state)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Returns a number below `bound`, or 0 if that is 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Returns a number in `[low, high]`.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// Returns a number in `[-most, most]`.
    pub(crate) fn around_zero(&mut self, most: u64) -> i64 {
        self.below(2 * most + 1) as i64 - most as i64
    }

    pub(crate) fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }

    /// Returns a number in `[0, 1)`.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// Returns an exponentially distributed number.
    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * ln(1.0 - self.unit())
    }

    /// Returns a log-normally distributed number.
    pub(crate) fn lognormal(&mut self, median: f64, sigma: f64) -> f64 {
        // Twelve uniform numbers: near enough to a normal one, and exactly reproducible.
        let normal = (0..12).map(|_| self.unit()).sum::<f64>() - 6.0;
        median * exp(sigma * normal)
    }
}

/// The finalizer of SplitMix64: a bijection that makes neighbours unrelated.
pub(crate) const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The natural logarithm of a positive normal number, to about 1e-12.
pub(crate) fn ln(value: f64) -> f64 {
    let bits = value.to_bits();
    let exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    // ln m = 2 atanh((m - 1) / (m + 1)), with m in [1, 2).
    let ratio = (mantissa - 1.0) / (mantissa + 1.0);
    let square = ratio * ratio;
    let mut term = ratio;
    let mut sum = 0.0;
    for odd in (1..26).step_by(2) {
        sum += term / f64::from(odd);
        term *= square;
    }
    2.0 * sum + exponent as f64 * std::f64::consts::LN_2
}

/// The exponential, for arguments of at most a few hundred.
pub(crate) fn exp(value: f64) -> f64 {
    let doublings = (value / std::f64::consts::LN_2).floor();
    let rest = value - doublings * std::f64::consts::LN_2;
    let mut term = 1.0;
    let mut sum = 1.0;
    for step in 1..20 {
        term *= rest / f64::from(step);
        sum += term;
    }
    let exponent = (doublings as i64).clamp(-1000, 1000) + 1023;
    sum * f64::from_bits((exponent as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithm_and_exponential_agree_with_the_library() {
        for value in [1e-9, 0.1, 0.5, 1.0, 1.7, 2.0, 1234.5] {
            assert!((ln(value) - f64::ln(value)).abs() < 1e-9, "ln {value}");
            assert!((exp(ln(value)) - value).abs() < 1e-9 * value, "exp ln {value}");
        }
    }

    #[test]
    fn streams_of_one_seed_differ() {
        assert_ne!(Rng::stream(1, "faults").next(), Rng::stream(1, "network").next());
        assert_eq!(Rng::stream(1, "faults").next(), Rng::stream(1, "faults").next());
    }
}
