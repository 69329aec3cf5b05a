//! Whether an upstream can be reached at all.
//!
//! Knows when it was last tried in vain. Must not know how it is tried. The invariant it
//! keeps: while it cannot be reached one request at a time finds out, ever more seldom, and
//! no other waits for a connection that will not come.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// How long an upstream is left alone after the first vain attempt: a fifth of the usual
/// time to connect, long enough for a proxy in front of it to restart.
const FIRST: Duration = Duration::from_secs(1);

/// How long at most: who comes back is seen within half a minute.
const LONGEST: Duration = Duration::from_secs(30);

/// One upstream's health, as this pod sees it.
#[derive(Debug)]
pub(super) struct Health {
    since: Instant,
    /// When it is tried again, in milliseconds after `since`; zero: it is reached.
    try_at_ms: AtomicU64,
    /// How often it was tried in vain.
    tries: AtomicU32,
}

impl Health {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), try_at_ms: AtomicU64::new(0), tries: AtomicU32::new(0) }
    }

    /// Returns how long it is still left alone.
    pub(super) fn down(&self) -> Option<Duration> {
        let left = Duration::from_millis(self.try_at_ms.load(Ordering::Relaxed)).checked_sub(self.since.elapsed())?;
        (!left.is_zero()).then_some(left)
    }

    /// Returns whether a request may go there: any while it is reached, and one each time it
    /// is to be tried again.
    pub(super) fn enter(&self) -> bool {
        let try_at = self.try_at_ms.load(Ordering::Relaxed);
        if try_at == 0 {
            return true;
        }
        if self.down().is_some() {
            return false;
        }
        let tries = self.tries.fetch_add(1, Ordering::Relaxed).min(16);
        let next = self.after((FIRST * (1 << tries)).min(LONGEST));
        self.try_at_ms.compare_exchange(try_at, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Notes that a connection was made.
    pub(super) fn reached(&self) {
        if self.try_at_ms.swap(0, Ordering::Relaxed) != 0 {
            self.tries.store(0, Ordering::Relaxed);
        }
    }

    /// Notes that none could be made. Of many requests that find out together one counts, and
    /// for whoever [entered](Self::enter) to try again it is noted already.
    pub(super) fn missed(&self) {
        let next = self.after(FIRST);
        if self.try_at_ms.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.tries.store(1, Ordering::Relaxed);
        }
    }

    fn after(&self, length: Duration) -> u64 {
        // Zero would say that it is reached.
        u64::try_from((self.since.elapsed() + length).as_millis()).unwrap_or(u64::MAX).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_request_at_a_time_finds_out_and_ever_more_seldom() {
        let health = Health::new();
        assert!(health.enter() && health.enter());
        health.missed();
        health.missed();
        assert_eq!(health.down(), Some(FIRST));
        for seconds in [2, 4, 8, 16, 30, 30] {
            assert!(!health.enter());
            tokio::time::advance(health.down().unwrap()).await;
            assert!(health.enter());
            assert!(!health.enter(), "the second must not wait for a connection");
            health.missed();
            assert_eq!(health.down(), Some(Duration::from_secs(seconds)));
        }
        tokio::time::advance(LONGEST).await;
        assert!(health.enter());
        health.reached();
        assert!(health.enter() && health.enter());
        health.missed();
        assert_eq!(health.down(), Some(FIRST), "it begins anew");
    }
}
