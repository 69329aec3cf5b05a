//! Window kinds: how an amount per window becomes slices that rights are rights to.
//!
//! Knows the arithmetic of each kind and nothing else. Must not know replicas, wallets or the
//! time. The invariant it keeps: whoever admits at most a slice's amount of every slice, and
//! spends a right only as long as it lives, keeps the promise of the kind
//! (docs/algorithm.md section 12).
//!
//! | kind | promise | a slice | its amount |
//! |---|---|---|---|
//! | fixed | at most L in every aligned window of length W | the window | L |
//! | sliding | at most L in *every* interval of length W | W / parts | L / (parts + 1) |
//! | bucket | at most L t / W + burst in every interval of length t | a part of the burst's refill time | its refill |
//! | day | at most L in every local day | the day | L |

use std::num::NonZeroU64;
use std::time::Duration;

use super::quota::{Quota, QuotaError};
use super::window::{Grid, Timestamp, Window, WindowLength};
use super::zone::Zone;

/// How a quota's windows follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum WindowKind {
    /// Windows of equal length, aligned to the Unix epoch. Two of them that touch can
    /// hold twice the limit around their border: that is what *fixed* means, anywhere.
    Fixed,
    /// At most the limit in *every* interval as long as the window, for upstreams that count
    /// so. An interval touches at most `parts + 1` slices, so each may let through
    /// `amount / (parts + 1)`: that is also the largest request that can be admitted.
    Sliding {
        /// How many slices one window has: 1 to [`WindowKind::MAX_PARTS`]. More parts admit
        /// more (`parts / (parts + 1)` of the limit under steady load) in smaller bursts.
        parts: u8,
    },
    /// Refilled continuously at `amount / window`, holding at most `burst`: a token bucket,
    /// as OpenAI and Anthropic describe their limits.
    Bucket {
        /// What the bucket holds when it is full.
        burst: NonZeroU64,
    },
    /// From local midnight to local midnight.
    Day {
        /// Whose midnight.
        zone: Zone,
    },
}

impl WindowKind {
    /// The most slices of a sliding window: 12.
    pub const MAX_PARTS: u8 = 12;

    /// A sliding window of four slices: 80 % of the limit under steady load, and single
    /// requests of up to 20 % of it.
    pub const SLIDING: Self = Self::Sliding { parts: 4 };
}

/// The shortest slice of a bucket: two gossip intervals and a half.
const MIN_BUCKET_SLICE_MS: u64 = 250;

/// The most slices a right of a bucket lives: with the running and the next one there is
/// room for them in a ring of wallets.
const MAX_LIFETIME: u64 = 12;

/// Windows longer than this vest: their rights come in instalments.
const VESTING_STEP_MS: u64 = 600_000;

/// The most instalments of one window: every ten minutes of a day.
const MAX_INSTALMENTS: u64 = 144;

/// A quota as the ledger keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slices {
    pub(crate) grid: Grid,
    /// What all replicas together get for one slice.
    pub(crate) amount: u64,
    /// For how many slices a right lives; more than one only in a bucket.
    pub(crate) lifetime: u64,
    /// In how many parts a slice's amount is dealt.
    pub(crate) instalments: u32,
    /// How many slices that have ended settlements still reach.
    pub(crate) reach: u64,
    /// Whether a reservation near a slice's end must fit in both slices. Not in a bucket: it
    /// has no border, and its size allows for the edge.
    pub(crate) guarded: bool,
}

impl Slices {
    /// Slices a quota, or says why its kind does not fit it.
    pub(crate) fn of(quota: &Quota) -> Result<Self, QuotaError> {
        let (amount, window) = (quota.amount(), quota.window());
        let whole = |grid, instalments| Self { grid, amount, lifetime: 1, instalments, reach: 2, guarded: true };
        Ok(match quota.kind() {
            WindowKind::Fixed => whole(Grid::Even(window), instalments(quota)),
            WindowKind::Day { .. } if window != WindowLength::DAY => return Err(QuotaError::Day(window.duration())),
            WindowKind::Day { zone } => whole(Grid::Days(zone), instalments(quota)),
            WindowKind::Sliding { parts } => {
                let divides = parts != 0 && window.ms().get().is_multiple_of(u64::from(parts));
                let slice = divides.then(|| WindowLength::from_ms(window.ms().get() / u64::from(parts))).flatten();
                let slice = slice.filter(|_| parts <= WindowKind::MAX_PARTS).ok_or(QuotaError::Parts(parts))?;
                let amount = amount / (u64::from(parts) + 1);
                if amount == 0 {
                    return Err(QuotaError::TooFewForParts(parts));
                }
                let reach = u64::from(parts).max(2);
                Self { grid: Grid::Even(slice), amount, lifetime: 1, instalments: 1, reach, guarded: true }
            }
            WindowKind::Bucket { burst } => Self::bucket(quota, burst.get())?,
        })
    }

    /// A right of slice e lives `k` slices: the rights usable in an interval of length t are
    /// those of at most `t / slice + k + 1` slices, so they sum up to at most
    /// `rate t + (k + 1) refill`. A quarter of a refill more is set aside for the edge, which
    /// is at most a quarter of a slice: what is reserved within t + edge arrives within t.
    fn bucket(quota: &Quota, burst: u64) -> Result<Self, QuotaError> {
        let (limit, window_ms) = (u128::from(quota.amount()), u128::from(quota.window().ms().get()));
        // Seven live slices, unless that makes them too short, or too small for one unit.
        let wanted = u128::from(burst) * window_ms * 4 / (33 * limit);
        let slice_ms = wanted.max(u128::from(MIN_BUCKET_SLICE_MS)).max(window_ms.div_ceil(limit));
        let refill = limit * slice_ms / window_ms;
        let least = (refill * 9).div_ceil(4);
        let too_small = QuotaError::Burst { burst, least: u64::try_from(least).unwrap_or(u64::MAX) };
        if u128::from(burst) < least || burst > Quota::MAX_AMOUNT {
            return Err(too_small);
        }
        let slice = u64::try_from(slice_ms).ok().and_then(WindowLength::from_ms).ok_or(too_small)?;
        let lifetime = ((4 * u128::from(burst) - refill) / (4 * refill) - 1).min(u128::from(MAX_LIFETIME)) as u64;
        Ok(Self {
            grid: Grid::Even(slice),
            amount: refill as u64,
            lifetime,
            instalments: 1,
            reach: lifetime + 1,
            guarded: false,
        })
    }

    /// The most that can be spendable at one instant, over all replicas: a larger request
    /// is never admitted.
    pub(crate) const fn most(&self) -> u64 {
        self.amount * self.lifetime
    }

    /// What instalment `index` of a slice brings: a quarter of the amount at once, the rest
    /// in equal steps. A crash then loses what had vested, not what was to come.
    pub(crate) fn instalment(&self, index: u32) -> u64 {
        self.vested(index + 1) - self.vested(index)
    }

    /// What the first `count` instalments bring together.
    pub(crate) fn vested(&self, count: u32) -> u64 {
        if count == 0 {
            return 0;
        }
        let (amount, all) = (u128::from(self.amount), u128::from(self.instalments));
        // amount x (1/4 + 3/4 x count / all)
        (amount * (all + 3 * u128::from(count)) / (4 * all)) as u64
    }

    /// What instalment `index` of a slice belongs to: its start is the nominal instant by
    /// which the roster decides who counts.
    pub(crate) fn instalment_of(&self, slice: Window, index: u32) -> Window {
        if self.instalments == 1 { slice } else { slice.part(index, self.instalments) }
    }

    /// Returns the instalment of a running slice that was dealt last.
    pub(crate) fn latest_instalment(&self, slice: Window, now: Timestamp) -> Window {
        self.instalment_of(slice, self.latest(slice, now))
    }

    /// Returns what has been dealt of a running slice, over all replicas; what can be full
    /// at once where it is not dealt in instalments.
    pub(crate) fn vested_at(&self, slice: Window, now: Timestamp) -> u64 {
        if self.instalments == 1 { self.most() } else { self.vested(self.latest(slice, now) + 1) }
    }

    fn latest(&self, slice: Window, now: Timestamp) -> u32 {
        // A cut is rounded down, so the proportion can be one short of the truth.
        let passed = u128::from(now.since(slice.start()).as_millis() as u64) * u128::from(self.instalments);
        let index = (passed / slice.length().as_millis().max(1)) as u32;
        let later = (index + 1).min(self.instalments - 1);
        if self.instalment_of(slice, later).start() <= now { later } else { index.min(self.instalments - 1) }
    }

    /// Returns when `amount` is dealt beyond what is used: with an instalment of this slice,
    /// or with the slice that has refilled enough.
    pub(crate) fn covered_at(&self, slice: Window, used: u64, amount: u64, now: Timestamp) -> Timestamp {
        if self.lifetime > 1 {
            let missing = amount.saturating_sub(self.most().saturating_sub(used));
            let slices = missing.div_ceil(self.amount).max(1) - 1;
            return slice.end().plus(self.length() * slices.min(MAX_LIFETIME) as u32);
        }
        (1..self.instalments)
            .map(|index| (self.vested(index + 1), self.instalment_of(slice, index).start()))
            .find(|(vested, start)| *start > now && *vested >= used.saturating_add(amount))
            .map_or(slice.end(), |(_, start)| start)
    }

    /// Returns the slice with this number, not after `slice`; for slices of equal length.
    pub(crate) fn earlier(&self, slice: Window, number: u64) -> Window {
        let ago_ms = (slice.number() - number).saturating_mul(self.length().as_millis() as u64);
        self.grid.window_at(slice.start().minus(Duration::from_millis(ago_ms)))
    }

    /// The nominal length of a slice.
    pub(crate) fn length(&self) -> Duration {
        match self.grid {
            Grid::Even(length) => length.duration(),
            Grid::Days(_) => WindowLength::DAY.duration(),
        }
    }
}

fn instalments(quota: &Quota) -> u32 {
    if quota.is_at_once() {
        return 1;
    }
    (quota.window().ms().get() / VESTING_STEP_MS).clamp(1, MAX_INSTALMENTS) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Unit;
    use proptest::prelude::*;

    fn slices(quota: Quota) -> Slices {
        Slices::of(&quota).expect("valid")
    }

    #[test]
    fn a_window_of_ten_minutes_comes_at_once_and_a_day_in_144_instalments() {
        assert_eq!(slices(Quota::tokens(100).per(Duration::from_secs(600))).instalments, 1);
        let day = slices(Quota::tokens(1_000).per_day(Zone::UTC));
        assert_eq!(day.instalments, 144);
        assert_eq!(day.vested(1), 255, "a quarter, and 1/144 of the rest");
        assert_eq!(day.vested(144), 1_000);
        assert_eq!((0..144).map(|index| day.instalment(index)).sum::<u64>(), 1_000);
        assert_eq!(slices(Quota::tokens(1_000).per_day(Zone::UTC).at_once()).instalments, 1);
    }

    #[test]
    fn a_bucket_of_a_minutes_rate_lives_seven_slices() {
        let bucket = slices(Quota::tokens(100_000).per_minute().bucket(100_000));
        assert_eq!((bucket.lifetime, bucket.amount), (7, 12_120));
        assert_eq!(bucket.grid, Grid::Even(WindowLength::from_ms(7_272).expect("short")));
        // Three requests a minute, at most three at once.
        let few = slices(Quota::requests(3).per_minute().bucket(3));
        assert_eq!((few.amount, few.lifetime, few.length().as_secs()), (1, 1, 20));
    }

    #[test]
    fn a_burst_too_small_for_the_rate_is_refused_with_the_least_that_works() {
        let quota = Quota::tokens(60_000).per_minute();
        let error = quota.of_kind(WindowKind::Bucket { burst: NonZeroU64::new(100).expect("not zero") });
        assert_eq!(error, Err(QuotaError::Burst { burst: 100, least: 563 }));
        assert!(quota.of_kind(WindowKind::Bucket { burst: NonZeroU64::new(563).expect("not zero") }).is_ok());
    }

    #[test]
    fn parts_divide_the_window_and_leave_each_slice_something() {
        let minute = Quota::tokens(100).per_minute();
        assert_eq!(slices(minute.of_kind(WindowKind::SLIDING).expect("valid")).amount, 20);
        assert_eq!(minute.of_kind(WindowKind::Sliding { parts: 0 }), Err(QuotaError::Parts(0)));
        assert_eq!(minute.of_kind(WindowKind::Sliding { parts: 7 }), Err(QuotaError::Parts(7)));
        assert_eq!(minute.of_kind(WindowKind::Sliding { parts: 15 }), Err(QuotaError::Parts(15)));
        let few = Quota::requests(4).per_minute();
        assert_eq!(few.of_kind(WindowKind::SLIDING), Err(QuotaError::TooFewForParts(4)));
    }

    proptest! {
        /// What is usable in an interval of length t, whatever its place, keeps the promise.
        #[test]
        fn every_interval_keeps_a_buckets_promise(
            amount in 1u64..10_000_000,
            window_ms in 250u64..10_000_000,
            burst in 1u64..10_000_000,
            from_ms in 0u64..1_000_000,
            length_ms in 1u64..1_000_000,
        ) {
            let quota = Quota::new(Unit::Tokens, amount, Duration::from_millis(window_ms)).expect("in range");
            let kind = WindowKind::Bucket { burst: NonZeroU64::new(burst).expect("not zero") };
            let Ok(quota) = quota.of_kind(kind) else { return Ok(()) };
            let slices = slices(quota);
            let Grid::Even(slice) = slices.grid else { panic!("a bucket's slices are even") };
            // A right of slice e is usable in [e, e + lifetime).
            let edge_ms = slice.lead().as_millis() as u64;
            let first = (from_ms / slice.ms()).saturating_sub(slices.lifetime - 1);
            let last = (from_ms + length_ms + edge_ms - 1) / slice.ms();
            let usable = u128::from(last - first + 1) * u128::from(slices.amount);
            let promised = u128::from(amount) * u128::from(length_ms) / u128::from(window_ms) + u128::from(burst);
            prop_assert!(usable <= promised + 1, "{usable} of {promised}");
        }

        #[test]
        fn every_interval_keeps_a_sliding_windows_promise(
            amount in 20u64..10_000_000,
            parts in 1u8..=12,
            slice_ms in 1u64..100_000,
            from_ms in 0u64..10_000_000,
        ) {
            let window_ms = slice_ms * u64::from(parts);
            let quota = Quota::new(Unit::Tokens, amount, Duration::from_millis(window_ms)).expect("in range");
            let slices = slices(quota.of_kind(WindowKind::Sliding { parts }).expect("divides"));
            let touched = (from_ms + window_ms - 1) / slice_ms - from_ms / slice_ms + 1;
            prop_assert!(touched * slices.amount <= amount);
        }
    }
}
