//! What goes wrong again and again, said in the log: soon, and seldom.
//!
//! Knows reasons and when each was said. Must not know what a frame is, or a connection. The invariant it keeps:
//! at most one line a minute for each reason, however many datagrams or callers strangers send.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// How long a reason is only counted after it was said.
const QUIET: Duration = Duration::from_secs(60);

/// When each reason was said, and how often it came since.
#[derive(Debug, Default)]
pub(crate) struct Complaints(BTreeMap<&'static str, (Instant, u64)>);

impl Complaints {
    /// Notes that something went wrong; returns how often that happened since it was said
    /// last, this time among them, if it is to be said now.
    pub(crate) fn note(&mut self, reason: &'static str, now: Instant) -> Option<u64> {
        let Some((said, since)) = self.0.get_mut(reason) else {
            self.0.insert(reason, (now, 0));
            return Some(1);
        };
        *since += 1;
        if now.duration_since(*said) < QUIET {
            return None;
        }
        *said = now;
        Some(std::mem::take(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_a_minute_for_each_reason() {
        let (mut complaints, start) = (Complaints::default(), Instant::now());
        let mut said = Vec::new();
        for ms in (0..120_001).step_by(10) {
            let now = start + Duration::from_millis(ms);
            said.extend(complaints.note("key", now).map(|count| (ms, count)));
        }
        assert_eq!(said, [(0, 1), (60_000, 6_000), (120_000, 6_000)]);
        assert_eq!(complaints.note("seal", start), Some(1), "another reason is news");
    }
}
