//! What a limit promises: its mode, and the amounts that follow from it.
//!
//! Knows how much beside its rights a replica may spend, and how much of a window can be
//! over at most. Must not know accounts, peers or the clock. The invariant it keeps: a
//! [`Portion`] is less than the whole, so a wallet holds whatever a mode puts into it, and
//! no mode lets nothing through.

use std::fmt;

use super::quota::Quota;

/// What a limit does when rights run out, and so what it promises.
///
/// All replicas should give a limit one mode; docs/algorithm.md section 11 says what a
/// mixture does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// Never a unit reserved beyond the limit.
    #[default]
    Strict,
    /// Never more than `beta` x limit reserved beyond it: every share comes with an
    /// allowance of `beta` x share, spent without asking when rights have run out.
    Elastic {
        /// The allowance, as a part of the share. Zero is `strict`.
        beta: Portion,
    },
    /// Admits while the use of all replicas, as known here, is below the limit less a
    /// margin. It needs no rights, no share and no answer from anybody, and may be over by
    /// what has not been heard of: see [`Mode::overshoot_bound`].
    Sum {
        /// What is held back for use not heard of yet.
        margin: Margin,
    },
    /// Decides and counts, never refuses: for trying a limit out.
    Observe,
}

/// What the mode `sum` holds back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Margin {
    /// Always this part of the limit.
    Fixed(Portion),
    /// Twice what peers, at their measured rates, may have used since they were heard, and
    /// at most an even part of the limit for each; found again at every gossip interval.
    Auto,
}

impl Mode {
    /// Returns the name used in config and /status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Elastic { .. } => "elastic",
            Self::Sum { .. } => "sum",
            Self::Observe => "observe",
        }
    }

    /// Returns how many units can be reserved over a quota at most in any of its windows, over
    /// all replicas, if so many ever admitted in it; `None` if the mode promises nothing.
    ///
    /// In `sum` that is (replicas - 1) x (limit - margin) - margin: nobody hears anybody. A
    /// margin that is [`Margin::Auto`] may be zero when it matters, and counts as that. Of a
    /// sliding window the margin is held back slice by slice.
    pub fn overshoot_bound(self, quota: Quota, replicas: u64) -> Option<u64> {
        match self {
            Self::Strict => Some(0),
            Self::Elastic { beta } => Some(beta.of(quota.amount())),
            Self::Sum { .. } => {
                let each = self.largest(quota.largest_claim()).saturating_mul(quota.slices_of_a_window());
                Some(replicas.saturating_mul(each).saturating_sub(quota.amount()))
            }
            Self::Observe => None,
        }
    }

    /// Returns the largest request that a window of `limit` can ever admit.
    pub const fn largest(self, limit: u64) -> u64 {
        match self {
            Self::Sum { margin } => limit - margin.fixed(limit),
            _ => limit,
        }
    }

    /// Says whether replicas own rights and can ask for them.
    pub(crate) const fn has_rights(self) -> bool {
        !matches!(self, Self::Sum { .. })
    }

    /// Returns what a replica may spend beyond its rights because of a share of this size.
    /// Rounded down, so the allowances of all shares are at most that of their sum.
    pub(crate) const fn allowance(self, share: u64) -> u64 {
        match self {
            Self::Elastic { beta } => beta.of(share),
            Self::Strict | Self::Sum { .. } | Self::Observe => 0,
        }
    }
}

impl Margin {
    /// Returns what is always held back of a window or slice that lets `limit` through. It is
    /// rounded up: it is to be at least what was asked for. But one unit is always left, or
    /// nothing would ever be admitted.
    pub(crate) const fn fixed(self, limit: u64) -> u64 {
        match self {
            Self::Fixed(margin) => {
                let (held, most) = (limit - margin.rest_of(limit), limit.saturating_sub(1));
                if held < most { held } else { most }
            }
            Self::Auto => 0,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elastic { beta } => write!(f, "elastic with beta {}", beta.as_part()),
            Self::Sum { margin } => write!(f, "sum with margin {margin}"),
            other => f.write_str(other.name()),
        }
    }
}

impl fmt::Display for Margin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(portion) => write!(f, "{}%", f64::from(portion.0) / f64::from(Portion::WHOLE / 100)),
            Self::Auto => f.write_str("auto"),
        }
    }
}

/// A part of an amount: at least nothing, less than all, in millionths.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Portion(u32);

impl Portion {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    const WHOLE: u32 = 1_000_000;

    /// Returns the portion of so many hundredths.
    ///
    /// ```
    /// use quotum::{Mode, Portion, Quota};
    /// let mode = Mode::Elastic { beta: Portion::percent(5) };
    /// assert_eq!(mode.overshoot_bound(Quota::tokens(100_000).per_minute(), 3), Some(5_000));
    /// ```
    ///
    /// # Panics
    /// If it is 100 or more: a mistake of the program. Input from outside goes through
    /// [`Portion::new`].
    pub const fn percent(percent: u32) -> Self {
        assert!(percent < 100, "a portion is less than the whole");
        Self(percent * (Self::WHOLE / 100))
    }

    /// Returns the portion nearest to `part`, which is 0.05 for a twentieth.
    ///
    /// # Errors
    /// If it is not a number from 0 to below 1, or so close to a bound that no millionth
    /// is left in between; nothing was built.
    pub fn new(part: f64) -> Result<Self, PortionError> {
        let millionths = (part * f64::from(Self::WHOLE)).round();
        // Written so that a NaN is refused, too.
        let inside = millionths >= 0.0 && millionths < f64::from(Self::WHOLE);
        let vanishes = part != 0.0 && millionths == 0.0;
        if !inside || vanishes {
            return Err(PortionError(()));
        }
        Ok(Self(millionths as u32))
    }

    /// Returns this part of an amount, rounded down.
    pub const fn of(self, amount: u64) -> u64 {
        (amount as u128 * self.0 as u128 / Self::WHOLE as u128) as u64
    }

    /// Returns what is left of an amount without this part, rounded down.
    const fn rest_of(self, amount: u64) -> u64 {
        (amount as u128 * (Self::WHOLE - self.0) as u128 / Self::WHOLE as u128) as u64
    }

    /// Returns the portion as a part of one: 0.05 for a twentieth.
    pub fn as_part(self) -> f64 {
        f64::from(self.0) / f64::from(Self::WHOLE)
    }
}

impl fmt::Debug for Portion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.as_part())
    }
}

/// A portion must be 0, or at least a millionth and less than one. Whoever wrote it can
/// mend it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a portion is 0, or at least 0.000001 and less than 1")]
pub struct PortionError(());

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(tokens: u64) -> Quota {
        Quota::tokens(tokens).per_minute()
    }

    #[test]
    fn a_portion_is_less_than_the_whole_and_not_lost_to_rounding() {
        assert_eq!(Portion::new(0.05), Ok(Portion::percent(5)));
        assert_eq!(Portion::new(0.0), Ok(Portion::ZERO));
        assert_eq!(Portion::new(0.000_001).map(|portion| portion.of(1_000_000)), Ok(1));
        for wrong in [1.0, 5.0, -0.05, 0.000_000_1, 0.999_999_9, f64::NAN, f64::INFINITY] {
            assert!(Portion::new(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_allowances_of_the_parts_are_at_most_that_of_the_whole() {
        let mode = Mode::Elastic { beta: Portion::percent(7) };
        for parts in 1..50u64 {
            let sum: u64 = (0..parts).map(|part| mode.allowance((1_000 + part) / parts)).sum();
            assert!(sum <= mode.overshoot_bound(quota(1_000), parts).unwrap_or(0));
        }
        assert_eq!(Mode::Strict.allowance(1_000), 0);
    }

    #[test]
    fn a_sum_is_over_by_what_nobody_hears() {
        let sum = |margin| Mode::Sum { margin };
        let tenth = sum(Margin::Fixed(Portion::percent(10)));
        assert_eq!(tenth.overshoot_bound(quota(1_000), 1), Some(0));
        assert_eq!(tenth.overshoot_bound(quota(1_000), 4), Some(3 * 900 - 100));
        assert_eq!(sum(Margin::Fixed(Portion::percent(60))).overshoot_bound(quota(1_000), 2), Some(0), "400 twice fit");
        assert_eq!(sum(Margin::Auto).overshoot_bound(quota(1_000), 4), Some(3_000), "the margin may be zero");
        assert_eq!((tenth.largest(1_000), sum(Margin::Auto).largest(1_000)), (900, 1_000));
        assert_eq!(tenth.to_string(), "sum with margin 10%");
    }

    #[test]
    fn a_margin_is_at_least_what_was_asked_for_and_leaves_one_unit() {
        let fifth = Mode::Sum { margin: Margin::Fixed(Portion::percent(20)) };
        assert_eq!([1, 2, 5, 6, 100].map(|limit| fifth.largest(limit)), [1, 1, 4, 4, 80]);
        // Five slices of 20,001, each less a fifth: 4,000.2.
        assert_eq!(fifth.overshoot_bound(quota(100_009).sliding(), 1), Some(0));
        assert_eq!(fifth.overshoot_bound(quota(100_009).sliding(), 2), Some(2 * 5 * 16_000 - 100_009));
        let nearly_all = Mode::Sum { margin: Margin::Fixed(Portion::new(0.999_999).expect("less than one")) };
        assert_eq!(nearly_all.largest(1_000), 1);
    }

    #[test]
    fn the_largest_limit_and_its_allowance_fit_a_wallet() {
        let beta = Portion::new(0.999_999).expect("less than one");
        let largest = crate::ledger::Quota::MAX_AMOUNT;
        assert!(largest + beta.of(largest) < 1 << 42);
    }
}
