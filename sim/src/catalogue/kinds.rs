//! Plans of every window kind and mode, and of limits that change.
//!
//! Knows which kinds and modes fit which plan. Must not know what they promise: the oracle
//! does. The invariant it keeps: what is drawn here comes from streams of its own, so that a
//! seed's faults and workload do not depend on it.

use std::num::NonZeroU64;
use std::time::Duration;

use quotum::ledger::{Directory, WindowKind, Zone};
use quotum::{Margin, Mode, Portion, Quota, Unit};

use super::efficiency::measured;
use super::{SECOND, base, size, swarm_faults};
use crate::fault::{Fault, Scheduled};
use crate::rng::Rng;
use crate::scenario::Plan;
use crate::workload::{Costs, Shape};

/// Draws kind, mode and changes of limits of a plan of the swarm: about half of the seeds
/// stay strict and fixed.
pub(super) fn vary(plan: &mut Plan, seed: u64) {
    let mut rng = Rng::stream(seed, "kinds");
    if rng.chance(0.5) {
        let kind = rng.pick(&[0, 1, 1, 2, 2]);
        let mode = if kind == 0 { rng.pick(&[1, 1, 2]) } else { rng.pick(&[0, 0, 1, 2]) };
        match kind {
            1 => slide(plan, &mut rng),
            2 => pour(plan, &mut rng),
            _ => {}
        }
        plan.mode = match mode {
            0 => Mode::Strict,
            2 if sum_fits(plan) => sum(&mut rng),
            _ => lenient(&mut rng),
        };
    }
    if rng.chance(0.15) {
        change_limits(plan, &mut rng);
    }
}

/// A bucket's rights live on, and in `sum` there are none.
fn sum_fits(plan: &Plan) -> bool {
    !plan.quotas.iter().any(|quota| matches!(quota.kind(), WindowKind::Bucket { .. }))
}

fn sum(rng: &mut Rng) -> Mode {
    let margin = rng.pick(&[0, 5, 20]);
    Mode::Sum { margin: if rng.chance(0.3) { Margin::Auto } else { Margin::Fixed(Portion::percent(margin)) } }
}

fn lenient(rng: &mut Rng) -> Mode {
    Mode::Elastic { beta: Portion::percent(rng.pick(&[5, 10, 30])) }
}

/// Makes every quota that can be a sliding one.
fn slide(plan: &mut Plan, rng: &mut Rng) {
    let parts = if plan.measure_from.is_some() { 4 } else { rng.pick(&[1, 2, 4, 4]) };
    turn(plan, |_| Some(WindowKind::Sliding { parts }));
}

/// Makes every quota that can be a bucket.
fn pour(plan: &mut Plan, rng: &mut Rng) {
    let part = rng.pick(&[0.5, 1.0, 1.0, 2.0]);
    turn(plan, |quota| {
        let burst = NonZeroU64::new((quota.amount() as f64 * part) as u64)?;
        Some(WindowKind::Bucket { burst })
    });
}

fn turn(plan: &mut Plan, kind: impl Fn(&Quota) -> Option<WindowKind>) {
    for quota in &mut plan.quotas {
        if let Some(other) = kind(quota).and_then(|kind| quota.of_kind(kind).ok()) {
            *quota = other;
        }
    }
    fit_edge(plan);
}

/// An edge is at most a quarter of a slice.
fn fit_edge(plan: &mut Plan) {
    let most = plan.quotas.iter().map(|quota| quota.lead()).min().unwrap_or_default();
    plan.edge = plan.edge.min(most);
}

fn change_limits(plan: &mut Plan, rng: &mut Rng) {
    for _ in 0..rng.between(1, 2) {
        let at = rng.between(SECOND, plan.storm * 9 / 10);
        let fault = Fault::Limits { percent: rng.pick(&[20, 50, 150, 300]), pause: rng.between(1_000, 2 * SECOND) };
        plan.faults.push(Scheduled { at, until: at + 1, fault });
    }
    plan.faults.sort_by_key(|scheduled| (scheduled.at, scheduled.until));
}

/// A healthy fleet that is measured, or the swarm's storm.
fn healthy_or_storm(seed: u64, name: &str) -> (Plan, Rng) {
    let mut rng = Rng::stream(seed, name);
    let mut plan = if rng.chance(0.5) { healthy(seed, &mut rng) } else { swarm_faults(seed) };
    plan.seed = seed;
    (plan, rng)
}

fn healthy(seed: u64, rng: &mut Rng) -> Plan {
    let slots = rng.pick(&[2, 3, 5, 10]);
    let mut plan = base(seed, rng, slots, 20);
    plan.workload.shape = rng.pick(&[Shape::Uniform, Shape::Zipf, Shape::One, Shape::Bursts]);
    let load = rng.pick(&[0.5, 0.9, 1.5, 5.0]);
    let reservations = rng.pick(&[20.0, 40.0]);
    size(&mut plan, reservations, load);
    let mut plan = measured(plan);
    // Refunds that come after a slice has ended are too late: as 1 to 7.5 s of a minute.
    plan.workload.hold = (plan.window() / 60, plan.window() / 8);
    // Whole windows before, so that what a kind remembers is there.
    plan.measure_from = Some(30 * SECOND);
    plan.end = 110 * SECOND;
    plan.storm = plan.end;
    plan
}

pub(super) fn sliding(seed: u64) -> Plan {
    let (mut plan, mut rng) = healthy_or_storm(seed, "sliding");
    slide(&mut plan, &mut rng);
    plan
}

pub(super) fn bucket(seed: u64) -> Plan {
    let (mut plan, mut rng) = healthy_or_storm(seed, "bucket");
    pour(&mut plan, &mut rng);
    plan
}

/// Zones, when a day of theirs starts after the epoch of a run, and how many hours it has.
const DAYS: &[(&str, u64, u64)] = &[
    ("JST-9", 7, 24),
    // 2027-03-28 and 2027-10-31 in Berlin.
    ("CET-1CEST,M3.5.0,M10.5.0/3", 71 * 24 + 15, 23),
    ("CET-1CEST,M3.5.0,M10.5.0/3", 288 * 24 + 14, 25),
];

pub(super) fn day(seed: u64) -> Plan {
    const HOUR: u64 = 3_600 * SECOND;
    let mut rng = Rng::stream(seed, "day");
    let slots = rng.pick(&[2, 3, 5]);
    let mut plan = base(seed, &mut rng, slots, 86_400);
    let (zone, start, hours) = rng.pick(DAYS);
    let zone = Zone::parse_posix(zone).expect("a zone of this table");
    plan.phase = start * HOUR - 600 * SECOND;
    let midnight = super::EPOCH_MS + start * 3_600_000;
    plan.midnights = vec![midnight - 24 * 3_600_000, midnight, midnight + hours * 3_600_000];
    plan.midnights.push(plan.midnights[2] + 24 * 3_600_000);
    plan.interval = Duration::from_secs(5);
    plan.settings.absent_for = Duration::from_secs(600);
    plan.end = hours * HOUR + 900 * SECOND;
    plan.storm = plan.end;
    plan.workload.shape = rng.pick(&[Shape::Uniform, Shape::Zipf, Shape::One]);
    plan.workload.hold = (SECOND, 30 * SECOND);
    let load = rng.pick(&[0.5, 0.9, 1.5, 3.0]);
    let reservations = rng.pick(&[100.0, 300.0]);
    size(&mut plan, reservations, load);
    let quota = Quota::tokens(plan.quotas[0].amount()).per_day(zone);
    plan.quotas = vec![if rng.chance(0.3) { quota.at_once() } else { quota }];
    if rng.chance(0.5) {
        plan.measure_from = Some(0);
        return plan;
    }
    plan.settings.directory = Directory::Static;
    for _ in 0..rng.between(1, 4) {
        let at = rng.below(plan.end);
        let slot = rng.index(slots);
        let fault = match rng.below(4) {
            0 => Fault::Crash { slot, down: Some(rng.between(SECOND, HOUR)), same_slot: true },
            1 => Fault::Replace { slot, same_slot: true },
            2 => Fault::Split { ways: 2, salt: rng.next() },
            _ => Fault::Loss(0.5),
        };
        plan.faults.push(Scheduled { at, until: at + rng.between(60 * SECOND, 2 * HOUR), fault });
    }
    plan
}

/// A short, a middling and a long window of one unit.
pub(super) fn several_windows(seed: u64) -> Plan {
    let (mut plan, mut rng) = healthy_or_storm(seed, "several-windows");
    let quota = Quota::tokens(plan.quotas[0].amount()).per(Duration::from_micros(plan.window()));
    let amount = quota.amount();
    let window = quota.window().duration();
    let longer = Quota::tokens(amount * 3 / 2).per(window * 3);
    let shorter = Quota::tokens((amount / 2).max(1)).per(window / 4);
    plan.quotas.retain(|quota| quota.unit() != Unit::Tokens);
    let burst = NonZeroU64::new(amount).expect("a limit is not zero");
    let kind = rng.pick(&[WindowKind::Fixed, WindowKind::SLIDING, WindowKind::Bucket { burst }]);
    let first = quota.of_kind(kind).unwrap_or(quota);
    let last = longer.of_kind(WindowKind::SLIDING).unwrap_or(longer);
    plan.quotas.splice(0..0, [first, shorter, last]);
    fit_edge(&mut plan);
    plan
}

/// The scenario `edge`, of the other kinds: true clocks, and transit within the edge.
pub(super) fn upstream(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "kinds-upstream");
    let mut plan = super::edge(seed);
    if rng.chance(0.5) {
        slide(&mut plan, &mut rng);
    } else {
        pour(&mut plan, &mut rng);
    }
    plan
}

pub(super) fn elastic(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "elastic");
    let mut plan = swarm_faults(seed);
    match rng.below(4) {
        0 => slide(&mut plan, &mut rng),
        1 => pour(&mut plan, &mut rng),
        _ => {}
    }
    plan.mode = Mode::Elastic { beta: Portion::percent(5) };
    plan
}

/// Without faults in half of the seeds, so that what is expected can be measured too.
fn summed(seed: u64, name: &str, margin: Margin) -> Plan {
    let (mut plan, mut rng) = healthy_or_storm(seed, name);
    if rng.chance(0.3) {
        slide(&mut plan, &mut rng);
    }
    plan.mode = Mode::Sum { margin };
    plan
}

pub(super) fn sum_fixed(seed: u64) -> Plan {
    summed(seed, "sum", Margin::Fixed(Portion::percent(5)))
}

pub(super) fn sum_auto(seed: u64) -> Plan {
    summed(seed, "sum-auto", Margin::Auto)
}

/// Everybody alone for some windows: the bound of `sum` is what each admits then.
pub(super) fn sum_alone(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "sum-alone");
    let slots = rng.between(2, 6) as usize;
    let mut plan = base(seed, &mut rng, slots, 5);
    size(&mut plan, 10.0, 20.0);
    plan.workload.rate = plan.workload.rate.min(400.0);
    plan.workload.hold = (50_000, 2 * SECOND);
    for slot in 0..slots {
        let fault = Fault::Flap { slot, period: 0 };
        plan.faults.push(Scheduled { at: 20 * SECOND, until: 40 * SECOND, fault });
    }
    plan.mode = Mode::Sum { margin: Margin::Fixed(Portion::percent(10)) };
    plan
}

pub(super) fn limit_change(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "limit-change");
    let mut plan = swarm_faults(seed);
    if rng.chance(0.3) {
        slide(&mut plan, &mut rng);
    }
    change_limits(&mut plan, &mut rng);
    plan
}

pub(super) fn limit_halved(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "limit-halved");
    let mut plan = healthy(seed, &mut rng);
    let at = rng.between(35 * SECOND, 60 * SECOND);
    let fault = Fault::Limits { percent: rng.pick(&[50, 200]), pause: rng.between(100_000, 3 * SECOND) };
    plan.faults.push(Scheduled { at, until: at + 1, fault });
    plan
}

pub(super) fn limit_unknown(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "limit-unknown");
    let mut plan = healthy(seed, &mut rng);
    plan.unknown = true;
    plan.workload.costs = Costs::Close { scale: 1.0 };
    let pause = rng.between(SECOND, 60 * SECOND / plan.slots as u64);
    let fault = Fault::Limits { percent: 100, pause };
    plan.faults.push(Scheduled { at: 25 * SECOND, until: 25 * SECOND + 1, fault });
    plan
}
