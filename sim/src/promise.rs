//! What each kind of window and each mode promises, by arithmetic of its own.
//!
//! Knows promises as a user reads them: an amount in every interval, a bucket that never runs
//! dry, a local day. Must not know slices, rights or anything else of how the ledger keeps
//! them. The invariant it keeps: a reservation counts at the instant at which it was made, for
//! as much as is not given back.

use std::collections::BTreeMap;

use quotum::ledger::WindowKind;
use quotum::{Margin, Mode, Quota};

/// Everything reserved of one quota whose windows are not fixed, by instant.
#[derive(Clone, Debug)]
pub(crate) struct Log {
    rule: Rule,
    entries: BTreeMap<u64, i64>,
}

#[derive(Clone, Debug)]
enum Rule {
    /// At most the amount in every interval of so many milliseconds.
    Interval(u64),
    /// At most `amount x t / window + burst` in every interval of length t.
    Bucket(u64),
    /// At most the amount between two local midnights.
    Days(Vec<u64>),
}

/// What may be reserved: an amount, and at once in a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allowed {
    pub(crate) amount: u64,
    pub(crate) burst: u64,
    /// What one replica may reserve in `sum` however large its margin is: a unit of every
    /// slice, or a tiny limit would let nothing through.
    least: u64,
}

impl Allowed {
    pub(crate) fn of(quota: &Quota) -> Self {
        let burst = match quota.kind() {
            WindowKind::Bucket { burst } => burst.get(),
            _ => 0,
        };
        let least = match quota.kind() {
            WindowKind::Sliding { parts } => u64::from(parts) + 1,
            _ => 1,
        };
        Self { amount: quota.amount(), burst, least }
    }

    /// What a window lets through that is counted on its own.
    pub(crate) const fn in_window(amount: u64) -> Self {
        Self { amount, burst: 0, least: 1 }
    }

    /// The larger of both, in each part.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            amount: self.amount.max(other.amount),
            burst: self.burst.max(other.burst),
            least: self.least.max(other.least),
        }
    }

    /// What a mode allows, if so many replicas have admitted.
    pub(crate) fn in_mode(self, mode: Mode, replicas: u64) -> Self {
        // There is no `sum` of a bucket: the least is of the amount.
        let amount = bound(mode, self.amount, self.least, replicas);
        Self { amount, burst: bound(mode, self.burst, 0, replicas), ..self }
    }

    pub(crate) fn plus(self, promise: impl Fn(u64) -> u64) -> Self {
        Self { amount: self.amount + promise(self.amount), burst: self.burst + promise(self.burst), ..self }
    }
}

/// The most a mode lets through of a limit, if so many replicas have admitted, each of which
/// may admit at least so much.
fn bound(mode: Mode, limit: u64, least: u64, replicas: u64) -> u64 {
    match mode {
        // Whatever is held back by itself may be nothing when it matters.
        Mode::Sum { margin } => {
            let margin = match margin {
                Margin::Fixed(part) => limit as f64 * part.as_part(),
                Margin::Auto => 0.0,
            };
            // A margin is at least what it is said to be: what is left is rounded down.
            (replicas * ((limit as f64 - margin + 1e-6) as u64).max(least)).max(limit)
        }
        Mode::Elastic { beta } => limit + (limit as f64 * beta.as_part() + 1e-6) as u64,
        _ => limit,
    }
}

impl Log {
    /// Returns the log of a quota; `None` if its windows are fixed, and counted one by one.
    /// `midnights` are those of a day's zone, by the calendar.
    pub(crate) fn of(quota: &Quota, midnights: &[u64]) -> Option<Self> {
        let window_ms = quota.window().ms().get();
        let rule = match quota.kind() {
            WindowKind::Fixed => return None,
            WindowKind::Sliding { .. } => Rule::Interval(window_ms),
            WindowKind::Bucket { .. } => Rule::Bucket(window_ms),
            WindowKind::Day { .. } => Rule::Days(midnights.to_vec()),
            other => unreachable!("{other:?} has no promise here"),
        };
        Some(Self { rule, entries: BTreeMap::new() })
    }

    /// Adds to what was reserved at an instant, or takes from it what is given back.
    pub(crate) fn add(&mut self, ms: u64, amount: i64) {
        *self.entries.entry(ms).or_default() += amount;
    }

    /// Returns what was reserved from one instant to another.
    pub(crate) fn sum(&self, from_ms: u64, to_ms: u64) -> i64 {
        self.entries.range(from_ms..to_ms.max(from_ms)).map(|(_, amount)| amount).sum()
    }

    /// Returns how far around an instant its intervals reach.
    pub(crate) fn reach_ms(&self) -> u64 {
        match &self.rule {
            Rule::Interval(ms) | Rule::Bucket(ms) => *ms,
            Rule::Days(_) => 90_000_000,
        }
    }

    /// Returns the day that an instant falls into, and whether it is known whole.
    pub(crate) fn day(&self, ms: u64) -> Option<(u64, u64)> {
        let Rule::Days(midnights) = &self.rule else { return None };
        let next = midnights.partition_point(|midnight| *midnight <= ms);
        Some((midnights[next.checked_sub(1)?], *midnights.get(next)?))
    }

    /// Returns by how much more than allowed was reserved in the worst interval around an
    /// instant; negative is what would still fit there.
    pub(crate) fn over(&self, ms: u64, allowed: Allowed) -> i64 {
        let (amount, burst) = (allowed.amount as i64, allowed.burst as i64);
        match &self.rule {
            Rule::Interval(length) => self.most_in_any(ms, *length) - amount,
            Rule::Bucket(window_ms) => {
                let over = self.most_beyond_refill(ms, *window_ms, allowed);
                let window_ms = i128::from(*window_ms);
                (over.div_euclid(window_ms) + i128::from(over.rem_euclid(window_ms) > 0)) as i64 - burst
            }
            Rule::Days(_) => self.day(ms).map_or(0, |(from, to)| self.sum(from, to)) - amount,
        }
    }

    fn most_in_any(&self, ms: u64, length: u64) -> i64 {
        let around: Vec<(u64, i64)> =
            (self.entries.range((ms + 1).saturating_sub(length)..ms + length)).map(|(at, sum)| (*at, *sum)).collect();
        let (mut sum, mut end, mut most) = (0, 0, 0);
        for (start, first) in &around {
            if *start > ms {
                break;
            }
            while end < around.len() && around[end].0 < start + length {
                sum += around[end].1;
                end += 1;
            }
            most = most.max(sum);
            sum -= first;
        }
        most
    }

    /// The largest `sum - amount x t / window` of the intervals around an instant, times the
    /// window: what a full bucket must have held.
    fn most_beyond_refill(&self, ms: u64, window_ms: u64, allowed: Allowed) -> i128 {
        let (window, rate) = (i128::from(window_ms), i128::from(allowed.amount));
        // No interval has ever exceeded its burst by more than as much again, so nothing
        // further away can make up for what is missing.
        let cap = i128::from(allowed.burst) * 2 * window;
        let side = |entries: &mut dyn Iterator<Item = (&u64, &i64)>| {
            let (mut sum, mut best) = (0, 0);
            for (at, amount) in entries {
                let refilled = rate * i128::from(ms.abs_diff(*at));
                if sum - refilled + cap < best {
                    break;
                }
                sum += i128::from(*amount) * window;
                best = best.max(sum - refilled);
            }
            best
        };
        side(&mut self.entries.range(..=ms).rev()) + side(&mut self.entries.range(ms + 1..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minute() -> Quota {
        Quota::tokens(600).per_minute()
    }

    fn log(quota: &Quota, entries: &[(u64, i64)]) -> Log {
        let mut log = Log::of(quota, &[]).expect("not fixed");
        entries.iter().for_each(|(at, amount)| log.add(*at, *amount));
        log
    }

    #[test]
    fn an_interval_is_looked_for_wherever_it_lies() {
        let quota = minute().sliding();
        let allowed = Allowed::of(&quota);
        // 500 and 200 are a minute less a millisecond apart, then exactly a minute.
        assert_eq!(log(&quota, &[(1_000, 500), (60_999, 200)]).over(1_000, allowed), 100);
        assert_eq!(log(&quota, &[(1_000, 500), (61_000, 200)]).over(61_000, allowed), -400);
        // Neither around the first nor around the last one alone.
        assert_eq!(log(&quota, &[(0, 300), (50_000, 200), (80_000, 300)]).over(50_000, allowed), -100);
    }

    #[test]
    fn a_bucket_refills_between_two_reservations_and_never_holds_more_than_its_burst() {
        let quota = minute().bucket(100);
        let allowed = Allowed::of(&quota);
        assert_eq!(log(&quota, &[(0, 100), (5_000, 50)]).over(5_000, allowed), 0);
        assert_eq!(log(&quota, &[(0, 100), (5_000, 51)]).over(5_000, allowed), 1);
        assert_eq!(log(&quota, &[(0, 100), (60_000, 101)]).over(60_000, allowed), 1, "it was full long before");
        assert_eq!(log(&quota, &[(0, 100), (5_000, 51)]).over(0, allowed), 1, "seen from the other side");
        let mut refunded = log(&quota, &[(0, 100), (5_000, 51)]);
        refunded.add(0, -1);
        assert_eq!(refunded.over(5_000, allowed), 0, "given back where it was reserved");
    }
}
