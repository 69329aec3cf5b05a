//! What a sweep prints: figures as JSON or a table, failures as something to act on.
//!
//! Knows the contract of docs/guarantees.md. Must not know how a run is carried
//! out. The invariant it keeps: every failure ends in one command that repeats it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use quotum::Mode;
use quotum::ledger::WindowKind;

use crate::fault::Fault;
use crate::fleet::Outcome;
use crate::oracle::Violation;
use crate::scenario::{Plan, Promise, Scenario};
use crate::trace::Line;

/// The figures of one scenario.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) seeds: u64,
    pub(crate) windows: u64,
    pub(crate) overshoot_max: i64,
    pub(crate) uncovered_max: i64,
    pub(crate) violations: u64,
    efficiencies: Vec<f64>,
    components: Vec<f64>,
    wrongful: Vec<f64>,
    pub(crate) measured_over_bound: f64,
    pub(crate) simulated_seconds: f64,
    pub(crate) wall_seconds: f64,
    pub(crate) reached: BTreeMap<&'static str, u64>,
    pub(crate) hash: u64,
    /// How many seeds ran in each mode and each kind of window, and how many changed limits.
    modes: BTreeMap<&'static str, u64>,
    kinds: BTreeMap<&'static str, u64>,
    changes: u64,
    /// The most that was reserved over a limit in the modes that allow it.
    allowed_max: i64,
    over_limit_max: f64,
    over_limit_sum: f64,
    over_limit_count: u64,
    /// How many requests were admitted, and how many of them after how many milliseconds.
    pub(crate) admitted: u64,
    pub(crate) waits: BTreeMap<u64, u64>,
    /// The seeds that violated something.
    pub(crate) failed: Vec<u64>,
}

impl Summary {
    /// Returns one without seeds, whose trace hash carries this one on.
    pub(crate) fn after(hash: u64) -> Self {
        Self { hash, ..Self::default() }
    }

    /// Adds the outcome of one seed.
    pub(crate) fn add(&mut self, plan: &Plan, outcome: &Outcome, runs: u64) {
        let figures = &outcome.figures;
        self.seeds += 1;
        self.windows += figures.windows;
        if plan.mode == Mode::Strict {
            self.overshoot_max = self.overshoot_max.max(figures.overshoot_max);
        } else {
            self.allowed_max = self.allowed_max.max(figures.overshoot_max);
            self.over_limit_max = self.over_limit_max.max(figures.over_limit_max);
            self.over_limit_sum += figures.over_limit_sum;
            self.over_limit_count += figures.over_limit_count;
        }
        *self.modes.entry(plan.mode.name()).or_default() += 1;
        *self.kinds.entry(kind_of(plan)).or_default() += 1;
        self.changes += u64::from(plan.faults.iter().any(|fault| matches!(fault.fault, Fault::Limits { .. })));
        self.uncovered_max = self.uncovered_max.max(figures.uncovered_max);
        self.violations += u64::from(outcome.violation.is_some());
        self.efficiencies.extend(outcome.efficiency);
        self.components.extend(outcome.efficiency_of_components);
        if figures.measured_offered > 0 {
            self.wrongful.push(figures.measured_wrongful as f64 / figures.measured_offered as f64);
        }
        self.measured_over_bound = self.measured_over_bound.max(figures.measured_over_bound);
        self.admitted += figures.admitted;
        for wait in &outcome.waits {
            *self.waits.entry(wait / 1_000).or_default() += 1;
        }
        self.simulated_seconds += plan.end as f64 / 1e6 * runs as f64;
        for what in &outcome.reached {
            *self.reached.entry(what).or_default() += 1;
        }
        self.hash = crate::rng::mix(self.hash ^ outcome.hash);
    }

    /// Returns the most that was over a limit in mode `strict`.
    pub(crate) fn strict_over(&self) -> i64 {
        self.overshoot_max.max(0)
    }

    pub(crate) fn efficiency_mean(&self) -> Option<f64> {
        mean(&self.efficiencies)
    }

    /// Returns the least and the greatest efficiency of a seed.
    pub(crate) fn efficiency_range(&self) -> Option<(f64, f64)> {
        let least = self.efficiencies.iter().copied().reduce(f64::min)?;
        Some((least, self.efficiencies.iter().copied().reduce(f64::max)?))
    }

    pub(crate) fn wrongful_mean(&self) -> Option<f64> {
        mean(&self.wrongful)
    }

    /// Returns what the scenario requires of its seeds together and did not get.
    pub(crate) fn shortfalls(&self, scenario: &Scenario) -> Vec<String> {
        let mut short = Vec::new();
        if self.seeds < ENOUGH {
            return short;
        }
        let requires = &scenario.requires;
        let mut at_least = |what: &str, mean: Option<f64>, least: f64| {
            if least > 0.0 && mean.is_none_or(|mean| mean < least) {
                short.push(format!("{what} is {mean:.4?}, at least {least} is required"));
            }
        };
        at_least("mean efficiency", mean(&self.efficiencies), requires.efficiency);
        at_least("mean efficiency of components", mean(&self.components), requires.efficiency_of_components);
        for (what, share) in requires.sometimes {
            let reached = self.reached.get(what).copied().unwrap_or(0) as f64 / self.seeds as f64;
            at_least(&format!("the share of seeds that reached {what:?}"), Some(reached), *share);
        }
        if let (Some(most), Some(mean)) = (requires.wrongful, mean(&self.wrongful))
            && mean > most
        {
            short.push(format!("wrongful refusals are {mean:.4}, at most {most} are allowed"));
        }
        if requires.uncovered && self.uncovered_max == 0 {
            short.push("nothing was ever uncovered: the bound on it was not tested".to_owned());
        }
        short
    }

    /// Returns the object of the contract.
    pub(crate) fn json(&self, scenario: &Scenario) -> String {
        let number = |value: Option<f64>| value.map_or("null".to_owned(), |value| format!("{value:.6}"));
        let least = self.efficiencies.iter().copied().reduce(f64::min);
        let mut text = format!("{{\"scenario\":\"{}\",\"layer\":\"{}\"", scenario.name, scenario.layer().name());
        let _ = write!(text, ",\"mode\":\"{}\"", self.mode());
        let _ = write!(
            text,
            ",\"seeds\":{},\"windows\":{},\"overshoot_tokens_max\":{},\"uncovered_tokens_max\":{},\"violations\":{}",
            self.seeds,
            self.windows,
            self.overshoot_max.max(0),
            self.uncovered_max.max(0),
            self.violations
        );
        let _ = write!(
            text,
            ",\"efficiency_mean\":{},\"efficiency_min\":{},\"efficiency_components_mean\":{},\"wrongful_refusals\":{}",
            number(mean(&self.efficiencies)),
            number(least),
            number(mean(&self.components)),
            number(mean(&self.wrongful))
        );
        let _ = write!(
            text,
            ",\"measured_over_bound_max\":{:.6},\"simulated_seconds\":{:.0},\"wall_seconds\":{:.2}",
            self.measured_over_bound, self.simulated_seconds, self.wall_seconds
        );
        let counts = |counts: &BTreeMap<&str, u64>| {
            let each: Vec<String> = counts.iter().map(|(name, count)| format!("\"{name}\":{count}")).collect();
            format!("{{{}}}", each.join(","))
        };
        let _ = write!(
            text,
            ",\"modes\":{},\"kinds\":{},\"limit_changes\":{},\"allowed_over_max\":{},\"over_limit_max\":{:.6},\"over_limit_mean\":{:.6}}}",
            counts(&self.modes),
            counts(&self.kinds),
            self.changes,
            self.allowed_max.max(0),
            self.over_limit_max,
            self.over_limit_mean()
        );
        text
    }

    /// The mode of most seeds: of which `overshoot_tokens_max` speaks if that is `strict`.
    fn mode(&self) -> &'static str {
        self.modes.iter().max_by_key(|(_, count)| **count).map_or("strict", |(name, _)| name)
    }

    fn over_limit_mean(&self) -> f64 {
        self.over_limit_sum / self.over_limit_count.max(1) as f64
    }

    /// Returns a line for people.
    pub(crate) fn line(&self, scenario: &Scenario) -> String {
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
        format!(
            "{:<20} {:>6} seeds {:>8} windows  over {:>6}  allowed over {:>6} ({:.3} of a limit, mean {:.4})  uncovered {:>7}  violations {:>3}  efficiency {:>6} (min {:>6})  components {:>6}  wrongful {:>6}  of bound {:.3}  {:.0} s in {:.1} s",
            scenario.name,
            self.seeds,
            self.windows,
            self.overshoot_max.max(0),
            self.allowed_max.max(0),
            self.over_limit_max,
            self.over_limit_mean(),
            self.uncovered_max.max(0),
            self.violations,
            number(mean(&self.efficiencies)),
            number(self.efficiencies.iter().copied().reduce(f64::min)),
            number(mean(&self.components)),
            number(mean(&self.wrongful)),
            self.measured_over_bound,
            self.simulated_seconds,
            self.wall_seconds
        )
    }
}

/// Returns the report of one failure: what, when, under which faults, what each replica
/// did around it, and the command that repeats it.
pub(crate) fn failure(
    scenario: &Scenario,
    plan: &Plan,
    shrunk: &Plan,
    violation: &Violation,
    lines: &[Line],
) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "VIOLATED: {} at {:.6} s", violation.invariant, violation.at as f64 / 1e6);
    let _ = writeln!(text, "  {}", violation.text);
    if let Promise::Bounded { broken, .. } = plan.promise {
        let _ = writeln!(text, "  condition broken in this scenario: {broken}");
    }
    let quotas: Vec<String> = plan.quotas.iter().map(ToString::to_string).collect();
    let _ = writeln!(text, "  {} replicas, {}, {}, seed {}", plan.slots, quotas.join(" and "), plan.mode, plan.seed);
    let _ = writeln!(text, "FAULTS: {} of {} are enough", shrunk.faults.len(), plan.faults.len());
    for scheduled in &shrunk.faults {
        let (at, until) = (scheduled.at as f64 / 1e6, scheduled.until as f64 / 1e6);
        let _ = writeln!(text, "  {at:>10.6} .. {until:>10.6}  {:?}", scheduled.fault);
    }
    let near: Vec<&Line> =
        lines.iter().filter(|line| line.at + AROUND >= violation.at && line.at <= violation.at + AROUND / 10).collect();
    let mut replicas: Vec<Option<usize>> = near.iter().map(|line| line.replica).collect();
    replicas.sort_unstable();
    replicas.dedup();
    for replica in replicas {
        let name = replica.map_or("THE WORLD".to_owned(), |replica| format!("REPLICA {replica}"));
        let _ = writeln!(text, "{name}");
        let own: Vec<&&Line> = near.iter().filter(|line| line.replica == replica).collect();
        for line in own.iter().skip(own.len().saturating_sub(MOST_LINES)) {
            let _ = writeln!(text, "  {:>10.6}  {}", line.at as f64 / 1e6, line.text);
        }
    }
    let _ = writeln!(text, "{}", replay_command(scenario, plan.seed));
    text
}

/// The kind of a plan's windows; the first one that is not fixed.
fn kind_of(plan: &Plan) -> &'static str {
    let kinds = plan.quotas.iter().map(|quota| match quota.kind() {
        WindowKind::Fixed => "fixed",
        WindowKind::Sliding { .. } => "sliding",
        WindowKind::Bucket { .. } => "bucket",
        _ => "day",
    });
    kinds.reduce(|first, other| if first == "fixed" { other } else { first }).unwrap_or("fixed")
}

/// Returns the command that repeats a seed.
pub(crate) fn replay_command(scenario: &Scenario, seed: u64) -> String {
    format!("cargo run --release -p quotum-sim -- replay --scenario {} --seed {seed}", scenario.name)
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Means over fewer seeds say nothing.
const ENOUGH: u64 = 50;

/// How much of a timeline is shown before a violation.
const AROUND: crate::Micros = 1_500_000;
const MOST_LINES: usize = 40;
