//! What the demo found.
//!
//! Knows the contract's object and how it is counted: by the stub's own ledger. Must not
//! know how it was measured. The invariant it keeps: nothing the pods say about
//! themselves decides whether they held the limit.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::load::{Kind, Outcome};
use super::{Mode, Options};

/// One run, counted.
#[derive(Debug)]
pub(super) struct Run {
    mode: Mode,
    /// Start of each window, and the tokens the stub used in it.
    windows: Vec<(u64, u64)>,
    /// Tokens offered in each window.
    offered: Vec<u64>,
    limit: u64,
    admitted: usize,
    refused: usize,
    failures: Vec<String>,
    added_ms: Vec<f64>,
    refusal_ms: Vec<f64>,
    /// How long admitted requests were parked.
    wait_ms: Vec<f64>,
    decision_ns: (u64, u64),
}

impl Run {
    /// Counts a run.
    pub(super) fn count(
        options: &Options,
        mode: Mode,
        first: u64,
        outcomes: &[Outcome],
        ledger: &[Value],
        statuses: &[Value],
    ) -> Result<Self> {
        let window_ms = u64::try_from(options.window.as_millis())?;
        let place = |unix_ms: u64| {
            let place = usize::try_from(unix_ms.checked_sub(first)? / window_ms).ok()?;
            (place < options.windows as usize).then_some(place)
        };
        let mut windows: Vec<(u64, u64)> =
            (0..u64::from(options.windows)).map(|i| (first + i * window_ms, 0)).collect();
        let mut service_us: BTreeMap<&str, u64> = BTreeMap::new();
        let mut admitted = 0;
        for record in ledger {
            let number = |name: &str| record[name].as_u64().with_context(|| format!("the ledger has no {name}"));
            if let Some(id) = record["id"].as_str() {
                service_us.insert(id, number("service_us")?);
            }
            if let Some(place) = place(number("arrived_unix_ms")?) {
                windows[place].1 += number("prompt_tokens")? + number("completion_tokens")?;
                admitted += 1;
            }
        }
        let mut offered = vec![0; windows.len()];
        let mut run = Self {
            mode,
            windows,
            offered: Vec::new(),
            limit: options.limit,
            admitted,
            refused: 0,
            failures: Vec::new(),
            added_ms: Vec::new(),
            refusal_ms: Vec::new(),
            wait_ms: Vec::new(),
            decision_ns: (0, 0),
        };
        for outcome in outcomes {
            let counted = place(outcome.sent_unix_ms);
            if let Some(place) = counted {
                offered[place] += outcome.tokens;
            }
            match (&outcome.kind, counted) {
                (Kind::Failed(why), _) => run.failures.push(why.clone()),
                (Kind::Admitted, Some(_)) => {
                    let service = service_us.get(outcome.id.as_str()).context("an answer without a record")?;
                    run.wait_ms.push(ms(outcome.parked));
                    run.added_ms.push(ms(outcome.took.saturating_sub(Duration::from_micros(*service))));
                }
                (Kind::Refused, Some(_)) => {
                    run.refused += 1;
                    run.refusal_ms.push(ms(outcome.took.saturating_sub(outcome.parked)));
                }
                (_, None) => {}
            }
        }
        run.offered = offered;
        // The slowest pod speaks for all.
        let slowest = |name: &str| statuses.iter().filter_map(|status| status["decision_ns"][name].as_u64()).max();
        run.decision_ns = (slowest("p50").unwrap_or(0), slowest("p99").unwrap_or(0));
        run.added_ms.sort_by(f64::total_cmp);
        run.refusal_ms.sort_by(f64::total_cmp);
        run.wait_ms.sort_by(f64::total_cmp);
        Ok(run)
    }

    pub(super) fn admitted_max(&self) -> u64 {
        self.windows.iter().map(|(_, tokens)| *tokens).max().unwrap_or(0)
    }

    fn overshoot(&self) -> u64 {
        self.admitted_max().saturating_sub(self.limit)
    }

    fn utilization(&self) -> f64 {
        let shares = self
            .windows
            .iter()
            .zip(&self.offered)
            .map(|((_, admitted), offered)| *admitted as f64 / (*offered).min(self.limit).max(1) as f64);
        shares.sum::<f64>() / self.windows.len().max(1) as f64
    }

    fn json(&self) -> Value {
        let windows = self.windows.iter();
        let windows: Vec<Value> =
            windows.map(|(start, tokens)| json!({"start_unix_ms": start, "admitted_tokens": tokens})).collect();
        json!({
            "mode": self.mode.name(),
            "windows": windows,
            "admitted_tokens_max": self.admitted_max(),
            "overshoot_tokens": self.overshoot(),
            "utilization": rounded(self.utilization()),
            "admitted_requests": self.admitted,
            "refused_requests": self.refused,
            "failed_requests": self.failures.len(),
            "added_latency_ms": {"p50": quantile(&self.added_ms, 50), "p99": quantile(&self.added_ms, 99)},
            "refusal_latency_ms": {"p50": quantile(&self.refusal_ms, 50), "p99": quantile(&self.refusal_ms, 99)},
            "wait_ms": {"p50": quantile(&self.wait_ms, 50), "p99": quantile(&self.wait_ms, 99)},
            "decision_ns": {"p50": self.decision_ns.0, "p99": self.decision_ns.1},
        })
    }
}

/// Both runs.
#[derive(Debug)]
pub(super) struct Report {
    replicas: u32,
    limit: u64,
    window: Duration,
    runs: Vec<Run>,
}

impl Report {
    pub(super) fn new(options: &Options, runs: Vec<Run>) -> Self {
        Self { replicas: options.replicas, limit: options.limit, window: options.window, runs }
    }

    /// Returns 0 if the joined run held the limit and nothing in it failed, 1 if it went
    /// over, 2 if requests failed.
    pub(super) fn exit_code(&self) -> u8 {
        let strict = self.runs.iter().find(|run| run.mode == Mode::Strict);
        match strict {
            Some(run) if run.overshoot() > 0 => 1,
            Some(run) if run.failures.is_empty() => 0,
            _ => 2,
        }
    }

    /// Returns the tokens offered in a window, on average.
    fn offered(&self) -> u64 {
        let windows: Vec<u64> = self.runs.iter().flat_map(|run| run.offered.iter().copied()).collect();
        windows.iter().sum::<u64>() / (windows.len() as u64).max(1)
    }

    /// Returns the contract's object.
    pub(super) fn json(&self) -> Value {
        json!({
            "replicas": self.replicas,
            "limit_tokens": self.limit,
            "window_seconds": self.window.as_secs_f64(),
            "offered_tokens": self.offered(),
            "runs": self.runs.iter().map(Run::json).collect::<Vec<_>>(),
        })
    }

    /// Returns the same for people.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "\n{} pods, one limit of {} tokens per {:?}; {} tokens offered per window\n",
            self.replicas,
            self.limit,
            self.window,
            self.offered()
        );
        let row = |text: &mut String, name: &str, cell: &dyn Fn(&Run) -> String| {
            let cells: String = self.runs.iter().map(|run| format!("{:>22}", cell(run))).collect();
            let _ = writeln!(text, "{name:<34}{cells}");
        };
        row(&mut text, "", &|run| run.mode.name().to_owned());
        let count = self.runs.iter().map(|run| run.windows.len()).max().unwrap_or(0);
        for i in 0..count {
            row(&mut text, &format!("tokens used in window {}", i + 1), &|run| {
                run.windows.get(i).map_or_else(String::new, |(_, tokens)| {
                    format!("{tokens} ({:.1} %)", *tokens as f64 * 100.0 / self.limit as f64)
                })
            });
        }
        row(&mut text, "tokens over the limit, at most", &|run| run.overshoot().to_string());
        row(&mut text, "utilization", &|run| format!("{:.1} %", run.utilization() * 100.0));
        row(&mut text, "requests admitted / refused", &|run| format!("{} / {}", run.admitted, run.refused));
        row(&mut text, "requests failed", &|run| run.failures.len().to_string());
        let pair = |sorted: &[f64]| match (quantile(sorted, 50), quantile(sorted, 99)) {
            (Some(p50), Some(p99)) => format!("{p50:.2} / {p99:.2} ms"),
            _ => "-".to_owned(),
        };
        row(&mut text, "added latency p50 / p99", &|run| pair(&run.added_ms));
        row(&mut text, "  of it parked p50 / p99", &|run| pair(&run.wait_ms));
        row(&mut text, "refusal latency p50 / p99", &|run| pair(&run.refusal_ms));
        row(&mut text, "decision p50 / p99", &|run| format!("{} / {} ns", run.decision_ns.0, run.decision_ns.1));
        for run in &self.runs {
            for why in run.failures.iter().take(3) {
                let _ = writeln!(text, "{} run, a failed request: {why}", run.mode.name());
            }
        }
        text
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

fn rounded(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

/// Returns a quantile of sorted values by the nearest rank.
fn quantile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).map(|value| (value * 1_000.0).round() / 1_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let sorted: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&sorted, 50), Some(50.0));
        assert_eq!(quantile(&sorted, 99), Some(99.0));
        assert_eq!(quantile(&sorted[..1], 99), Some(1.0));
        assert_eq!(quantile(&[], 50), None);
    }
}
