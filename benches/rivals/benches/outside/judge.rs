//! The judge: what the upstream counted, window by window.
//!
//! Knows records and windows. Must not know what was done to the fleet. The invariant it
//! keeps: every token that the upstream was asked for counts in the window in which the
//! request arrived there, whatever any pod says.

use std::collections::BTreeMap;

use quotum_bench::Failure;
use serde_json::Value;

/// Tokens of one window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) tokens: u64,
    /// Those of requests that were sent in an earlier window and took longer than the promise
    /// allows for: on a machine that stood still, or to a pod that did. Their pod may have
    /// charged them to the window they were sent in.
    pub(crate) late: u64,
}

impl Count {
    /// What is over the limit, and cannot be laid on requests that were late.
    pub(crate) fn over(self, limit: u64) -> u64 {
        self.tokens.saturating_sub(limit).saturating_sub(self.late)
    }
}

/// Counts records by the start of their window, in ms.
pub(crate) fn count(records: &[Value], window_ms: u64, edge_ms: u64) -> Result<BTreeMap<u64, Count>, Failure> {
    let mut windows = BTreeMap::<u64, Count>::new();
    for record in records {
        let number = |field: &str| record[field].as_u64().ok_or_else(|| format!("no {field} in {record}"));
        let sent: u64 = record["id"].as_str().unwrap_or_default().parse()?;
        let (arrived, tokens) = (number("arrived_unix_ms")?, number("prompt_tokens")? + number("completion_tokens")?);
        let start = arrived / window_ms * window_ms;
        let count = windows.entry(start).or_default();
        count.tokens += tokens;
        if sent < start && arrived > sent + edge_ms {
            count.late += tokens;
        }
    }
    Ok(windows)
}
