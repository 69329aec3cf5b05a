//! Pauses: until when an upstream wants no requests.
//!
//! Knows one instant for each limit, and whether the upstream said it here. Must not know how
//! an upstream says it, nor how peers are told. The invariant it keeps: no pause is longer
//! than [`MAX_PAUSE`] from now, whoever asked for it and wherever the clock stepped since.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::ledger::{EPSILON, LimitId, Timestamp};

/// The longest pause, 10 minutes: a wrong or a hostile upstream must not close a deployment
/// for good, and one request every ten minutes finds out. Longer than any minute limit needs;
/// of a daily one the fleet asks again 144 times.
pub const MAX_PAUSE: Duration = Duration::from_secs(600);

/// How far from now an instant may lie to be believed: a peer's clock may be ahead, and ours
/// behind.
const BELIEVED: Duration = MAX_PAUSE.saturating_add(EPSILON).saturating_add(EPSILON);

/// The pause of one limit's upstream.
#[derive(Debug)]
pub(super) struct Pause {
    limit: LimitId,
    /// In milliseconds of the Unix epoch, by the limiter's clock; zero is none.
    until: AtomicU64,
    /// The part of it that this replica was asked for itself.
    asked_here: AtomicU64,
}

impl Pause {
    pub(super) fn new(limit: &str) -> Self {
        Self { limit: LimitId::of(limit), until: AtomicU64::new(0), asked_here: AtomicU64::new(0) }
    }

    pub(super) fn limit(&self) -> LimitId {
        self.limit
    }

    /// Pauses until an instant that the upstream named here.
    pub(super) fn ask(&self, until: Timestamp, now: Timestamp) {
        let until = until.min(now.plus(MAX_PAUSE));
        extend(&self.until, until, now);
        extend(&self.asked_here, until, now);
    }

    /// Pauses until an instant that a peer named.
    pub(super) fn hear(&self, until: Timestamp, now: Timestamp) {
        extend(&self.until, until, now);
    }

    pub(super) fn until(&self, now: Timestamp) -> Option<Timestamp> {
        read(&self.until, now)
    }

    pub(super) fn asked_here(&self, now: Timestamp) -> Option<Timestamp> {
        read(&self.asked_here, now)
    }
}

fn read(word: &AtomicU64, now: Timestamp) -> Option<Timestamp> {
    believed(word.load(Ordering::Relaxed), now)
}

fn believed(until_ms: u64, now: Timestamp) -> Option<Timestamp> {
    let until = Timestamp::from_unix_ms(until_ms);
    (now < until && until <= now.plus(BELIEVED)).then_some(until)
}

/// Takes the later instant; one that is not believed counts for nothing.
fn extend(word: &AtomicU64, until: Timestamp, now: Timestamp) {
    let Some(until) = believed(until.unix_ms(), now) else { return };
    let later = |old: u64| (believed(old, now) < Some(until)).then_some(until.unix_ms());
    // An error is a pause that is longer already.
    let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_unix_ms(1_700_000_000_000);

    fn after(seconds: u64) -> Timestamp {
        NOW.plus(Duration::from_secs(seconds))
    }

    #[test]
    fn the_longer_pause_stays_and_ends() {
        let pause = Pause::new("a");
        assert_eq!(pause.until(NOW), None);
        pause.ask(after(7), NOW);
        pause.ask(after(5), NOW);
        assert_eq!(pause.until(NOW), Some(after(7)));
        assert_eq!(pause.until(after(7)), None);
        pause.ask(after(9), after(8));
        assert_eq!(pause.until(after(8)), Some(after(9)));
    }

    #[test]
    fn what_a_peer_says_is_kept_and_not_said_again() {
        let pause = Pause::new("a");
        pause.hear(after(7), NOW);
        assert_eq!((pause.until(NOW), pause.asked_here(NOW)), (Some(after(7)), None));
        pause.ask(after(5), NOW);
        assert_eq!((pause.until(NOW), pause.asked_here(NOW)), (Some(after(7)), Some(after(5))));
    }

    #[test]
    fn an_upstream_is_kept_away_from_for_ten_minutes_at_most_and_a_peer_not_believed_beyond() {
        let pause = Pause::new("a");
        pause.hear(after(700), NOW);
        pause.hear(Timestamp::NEVER, NOW);
        pause.hear(Timestamp::ZERO, NOW);
        assert_eq!(pause.until(NOW), None);
        pause.ask(Timestamp::NEVER, NOW);
        assert_eq!(pause.until(NOW), Some(NOW.plus(MAX_PAUSE)));
    }

    #[test]
    fn a_clock_that_stepped_back_ends_what_is_too_far_away() {
        let pause = Pause::new("a");
        pause.ask(after(3_600 + 7), after(3_600));
        assert_eq!(pause.until(NOW), None);
        pause.ask(after(7), NOW);
        assert_eq!(pause.until(NOW), Some(after(7)));
    }
}
