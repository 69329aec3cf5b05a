//! What a connection is at, and what is to become of it.
//!
//! Knows requests in flight, heads that have begun, what is not read, and since when. Must not
//! know sockets or HTTP. The invariant it keeps: it is told of bytes and requests as they pass,
//! and looking at it costs no lock.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::Bounds;

/// What a connection begins with that speaks HTTP/2, and no other (RFC 9113, 3.4).
pub(super) const HTTP2: &[u8] = b"PRI";

/// The bytes of what it begins with as a whole: the preface and the head of the settings that
/// must follow it.
const HTTP2_BEGUN: usize = 24 + 9;

/// What a connection is at.
#[derive(Debug)]
pub(super) struct Pulse {
    accepted: Instant,
    in_flight: AtomicU32,
    /// One of the three below; of meaning without a request in flight.
    state: AtomicU8,
    /// When the state began.
    since_ms: AtomicU64,
    /// When something was last written in [`QUIET`]: the rest of an answer, mostly.
    wrote_ms: AtomicU64,
    /// Since when nothing can be written, plus one; 0: it can.
    stalled_ms: AtomicU64,
    pub(super) http2: AtomicBool,
    /// The bytes of HTTP/2's beginning that have come.
    begun: AtomicUsize,
    /// The caller is to be told that it is too late.
    pub(super) late: AtomicBool,
}

/// Nothing has come yet.
const FRESH: u8 = 0;
/// Part of a head has come.
const READING: u8 = 1;
/// Every request was answered.
const QUIET: u8 = 2;

/// What is to become of a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It stays; look again then.
    Wait(Duration),
    /// A head has not ended in time.
    Late,
    /// Nothing was asked for too long.
    Quiet,
    /// What was answered is not read.
    Unread,
}

impl Pulse {
    pub(super) fn new() -> Self {
        Self {
            accepted: Instant::now(),
            in_flight: AtomicU32::new(0),
            state: AtomicU8::new(FRESH),
            since_ms: AtomicU64::new(0),
            wrote_ms: AtomicU64::new(0),
            stalled_ms: AtomicU64::new(0),
            http2: AtomicBool::new(false),
            begun: AtomicUsize::new(0),
            late: AtomicBool::new(false),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.accepted.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) == 0
    }

    /// Returns whether nothing was asked, answered or written for some time.
    pub(super) fn is_quiet_for(&self, time: Duration) -> bool {
        let last = self.since_ms.load(Ordering::Relaxed).max(self.wrote_ms.load(Ordering::Relaxed));
        let quiet = Duration::from_millis(self.now_ms().saturating_sub(last));
        self.is_idle() && self.stalled_ms.load(Ordering::Relaxed) == 0 && quiet >= time
    }

    pub(super) fn verdict(&self, bounds: &Bounds) -> Verdict {
        let now = self.now_ms();
        let left =
            |since: u64, within: Duration| within.saturating_sub(Duration::from_millis(now.saturating_sub(since)));
        let stalled = self.stalled_ms.load(Ordering::Relaxed);
        if stalled != 0 {
            return match left(stalled - 1, bounds.unread) {
                Duration::ZERO => Verdict::Unread,
                left => Verdict::Wait(left.min(bounds.header)),
            };
        }
        // Nobody is woken when a head begins or writing stalls: it is noticed at the next look.
        let soon = bounds.header.min(bounds.unread);
        if !self.is_idle() {
            return Verdict::Wait(soon);
        }
        let since = self.since_ms.load(Ordering::Relaxed);
        let wrote = since.max(self.wrote_ms.load(Ordering::Relaxed));
        let (since, within, verdict) = match (self.state.load(Ordering::Relaxed), self.http2.load(Ordering::Relaxed)) {
            // On HTTP/2 nobody can be told before it has begun.
            (FRESH, _) | (READING, true) => (since, bounds.header, Verdict::Quiet),
            (READING, false) => (since, bounds.header, Verdict::Late),
            // What is written between requests may be a question whether the caller is there.
            (_, true) => (since, bounds.idle, Verdict::Quiet),
            (_, false) => (wrote, bounds.idle, Verdict::Quiet),
        };
        match left(since, within) {
            Duration::ZERO => verdict,
            left => Verdict::Wait(left.min(soon)),
        }
    }

    /// Notes bytes that came while no request was in flight.
    pub(super) fn heard(&self, bytes: &[u8]) {
        match self.state.load(Ordering::Relaxed) {
            FRESH => {
                self.http2.store(bytes.starts_with(HTTP2), Ordering::Relaxed);
                // These bytes were only looked at: they come again.
                self.state.store(READING, Ordering::Relaxed);
            }
            READING => self.heard_http2(bytes),
            // On HTTP/2 it may be a mere sign of life.
            QUIET if !self.http2.load(Ordering::Relaxed) => {
                self.since_ms.store(self.now_ms(), Ordering::Relaxed);
                self.state.store(READING, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    /// Once HTTP/2 has begun a caller may think for a while before it asks.
    fn heard_http2(&self, bytes: &[u8]) {
        let begun = self.begun.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len();
        if self.http2.load(Ordering::Relaxed) && begun >= HTTP2_BEGUN {
            self.since_ms.store(self.now_ms(), Ordering::Relaxed);
            self.state.store(QUIET, Ordering::Relaxed);
        }
    }

    /// Notes whether bytes could be written.
    pub(super) fn wrote<T>(&self, written: &Poll<io::Result<T>>) {
        if written.is_pending() {
            let now = self.now_ms() + 1;
            let _ = self.stalled_ms.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
            return;
        }
        if self.stalled_ms.load(Ordering::Relaxed) != 0 {
            self.stalled_ms.store(0, Ordering::Relaxed);
        }
        if self.state.load(Ordering::Relaxed) == QUIET && self.is_idle() {
            self.wrote_ms.store(self.now_ms(), Ordering::Relaxed);
        }
    }
}

/// A request from its head to the end of its answer.
pub(super) struct InFlight(Arc<Pulse>);

impl InFlight {
    pub(super) fn new(pulse: &Arc<Pulse>) -> Self {
        pulse.in_flight.fetch_add(1, Ordering::AcqRel);
        Self(pulse.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let pulse = &self.0;
        pulse.since_ms.store(pulse.now_ms(), Ordering::Relaxed);
        pulse.state.store(QUIET, Ordering::Relaxed);
        pulse.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}
