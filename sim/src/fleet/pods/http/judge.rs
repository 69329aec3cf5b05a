//! The judge of whole pods over TCP: the upstreams' own count, what callers heard, and what
//! pods have charged.
//!
//! Knows records, windows and limits. Must not know how a pod decides or what a plan is meant
//! to show. The invariant it keeps: what an upstream was sent is taken from the upstream alone,
//! by the arrival of a request's last byte.

use std::collections::{BTreeMap, BTreeSet};

use quotum::Quota;
use quotum::server::stub::Record;

use super::callers::Heard;
use crate::Micros;
use crate::workload::Request;

/// What is known of all requests of a run.
#[derive(Debug)]
pub(super) struct Judge {
    quota: Quota,
    edge_ms: u64,
    /// Whether what upstreams send may get lost: they count it, and no pod can know of it. A
    /// request that was cut off is charged its prompt and what came (docs/algorithm.md, 4).
    loses: bool,
    /// Those without an answer yet.
    pub(super) open: BTreeMap<u64, Sent>,
    /// Those that came to a regular end.
    clean: BTreeSet<u64>,
    /// By incarnation, upstream and window: charged when somebody last looked.
    charged: BTreeMap<(usize, usize, u64), i64>,
}

/// A request on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) request: Request,
    pub(super) at: Micros,
    pub(super) replica: usize,
    /// Its upstream's answer ends, and says what was used.
    pub(super) regular: bool,
    pub(super) stream: bool,
}

/// An invariant and how it is violated.
pub(super) type Wrong = (&'static str, String);

impl Judge {
    pub(super) fn new(quota: Quota, edge_ms: u64, loses: bool) -> Self {
        Self { quota, edge_ms, loses, open: BTreeMap::new(), clean: BTreeSet::new(), charged: BTreeMap::new() }
    }

    /// A caller has heard something, or hung up.
    pub(super) fn heard(&mut self, number: u64, heard: Heard) -> Option<Sent> {
        let sent = self.open.remove(&number)?;
        if sent.regular && heard == Heard::Whole(200) {
            self.clean.insert(number);
        }
        Some(sent)
    }

    /// A pod has charged so much in a window.
    pub(super) fn charged(&mut self, replica: usize, upstream: usize, window: u64, amount: i64) {
        self.charged.insert((replica, upstream, window), amount);
    }

    fn window(&self, ms: u64) -> u64 {
        ms / self.quota.window().ms().get()
    }

    /// How many windows have records.
    pub(super) fn windows(&self, upstreams: &[Vec<Record>]) -> u64 {
        let of = |records: &Vec<Record>| {
            records.iter().map(|record| self.window(record.arrived_unix_ms)).collect::<BTreeSet<u64>>().len() as u64
        };
        upstreams.iter().map(of).sum()
    }

    /// What is wrong in what the upstreams were sent so far, if anything.
    pub(super) fn wrong(&self, upstreams: &[Vec<Record>]) -> Option<Wrong> {
        for (upstream, records) in upstreams.iter().enumerate() {
            let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
            for record in records {
                *counts.entry(self.window(record.arrived_unix_ms)).or_default() += used(record);
            }
            for (window, count) in counts {
                let (limit, charged) = (self.quota.amount(), self.sum(upstream, window));
                let known = if self.loses { count.min(charged.max(0) as u64) } else { count };
                if known > limit {
                    let text = format!("upstream {upstream} counts {count} tokens in window {window}, limit {limit}");
                    return Some(("upstream's count", text));
                }
                if charged < count as i64 && !self.loses {
                    let text =
                        format!("upstream {upstream} counts {count} tokens in window {window}, pods charged {charged}");
                    return Some(("what is used is charged", text));
                }
            }
        }
        self.executed_twice(upstreams)
    }

    fn sum(&self, upstream: usize, window: u64) -> i64 {
        let of_it = |(key, _): &(&(usize, usize, u64), &i64)| (key.1, key.2) == (upstream, window);
        self.charged.iter().filter(of_it).map(|(_, charged)| charged).sum()
    }

    /// What may have been executed is never sent again: before the last record of a request are
    /// only refusals.
    fn executed_twice(&self, upstreams: &[Vec<Record>]) -> Option<Wrong> {
        let mut seen: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for record in upstreams.iter().flatten() {
            let (all, refused) = seen.entry(record.id.as_str()).or_default();
            *all += 1;
            *refused += u64::from(record.status == 429);
        }
        let twice = seen.into_iter().find(|(_, (all, refused))| all - refused > 1)?;
        let text = format!("request {} arrived {} times, {} of them refused", twice.0, twice.1.0, twice.1.1);
        Some(("nothing is executed twice", text))
    }

    /// Looks at the end, when nobody asks any more: everybody has an answer, and in the running
    /// window exactly what was used is charged. Returns of how many requests that was seen.
    pub(super) fn settled(&self, upstreams: &[Vec<Record>], now_ms: u64) -> Result<usize, Wrong> {
        if let Some((number, sent)) = self.open.first_key_value() {
            let (at, replica) = (sent.at as f64 / 1e6, sent.replica);
            let text =
                format!("request {number}, sent to replica {replica} at {at:.3} s, and {} others", self.open.len() - 1);
            return Err(("every request is answered", text));
        }
        let mut seen = 0;
        let window = self.window(now_ms);
        let start = window * self.quota.window().ms().get();
        for (upstream, records) in upstreams.iter().enumerate() {
            let late = |record: &&Record| record.arrived_unix_ms + 2 * self.edge_ms >= start;
            let records: Vec<&Record> = records.iter().filter(late).collect();
            let is_clean = |record: &&Record| record.id.parse().is_ok_and(|number| self.clean.contains(&number));
            if records.iter().any(|record| record.arrived_unix_ms < start) || !records.iter().all(is_clean) {
                continue; // Guarded at the edge, or charged for what only the pod can know.
            }
            seen += records.len();
            let (count, charged) = (records.into_iter().map(used).sum::<u64>(), self.sum(upstream, window));
            if charged != count as i64 {
                let text =
                    format!("{charged} tokens are charged in window {window}, upstream {upstream} counts {count}");
                return Err(("everything settles", text));
            }
        }
        Ok(seen)
    }
}

/// The tokens of a request that was executed, as far as it has come.
fn used(record: &Record) -> u64 {
    if record.status == 200 { record.prompt_tokens + record.completion_tokens.unwrap_or(0) } else { 0 }
}
