//! Plans that measure efficiency: against central counters, without faults or with one kind.
//!
//! Knows what is compared. Must not know how a counter decides. The invariant it keeps: every
//! plan here measures.

use std::time::Duration;

use quotum::Quota;
use quotum::ledger::Directory;

use super::{SECOND, base, size};
use crate::fault::{Fault, Scheduled};
use crate::rng::Rng;
use crate::scenario::Plan;
use crate::workload::{Costs, Shape};

pub(super) fn healthy(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "healthy");
    let slots = rng.pick(&[2, 3, 5, 10, 10, 30]);
    let mut plan = base(seed, &mut rng, slots, 20);
    plan.workload.shape = rng.pick(&[Shape::Uniform, Shape::Zipf, Shape::One, Shape::Bursts]);
    let load = rng.pick(&[0.5, 0.9, 1.0, 1.5, 5.0]);
    let reservations = rng.pick(&[20.0, 40.0, 100.0]);
    size(&mut plan, reservations, load);
    measured(plan)
}

/// Responses take up to half a window, as LLM answers do; three or four whole
/// windows are compared.
pub(super) fn measured(mut plan: Plan) -> Plan {
    plan.measure_from = Some(8 * SECOND);
    plan.workload.hold = (plan.window() / 60, plan.window() / 2);
    plan.end = plan.end.max(8 * SECOND + 4 * plan.window());
    plan.storm = plan.end;
    plan
}

pub(super) fn tight(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "tight");
    let slots = rng.pick(&[2, 3, 5, 10, 10, 30]);
    let mut plan = base(seed, &mut rng, slots, 20);
    plan.workload.shape = rng.pick(&[Shape::Uniform, Shape::Zipf, Shape::One, Shape::Bursts]);
    let load = rng.pick(&[0.9, 1.0, 1.5, 5.0]);
    let reservations = rng.pick(&[1.0, 2.0, 5.0, 10.0, 20.0]);
    size(&mut plan, reservations, load);
    measured(plan)
}

pub(super) fn hundred(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "hundred");
    let mut plan = base(seed, &mut rng, 100, 10);
    plan.interval = Duration::from_millis(250);
    plan.wait = Duration::from_millis(50);
    plan.workload.shape = rng.pick(&[Shape::Uniform, Shape::Zipf]);
    let reservations = rng.pick(&[3.0, 10.0]);
    let load = rng.pick(&[1.0, 1.5, 5.0]);
    size(&mut plan, reservations, load);
    let mut plan = measured(plan);
    plan.end = 30 * SECOND;
    plan.storm = plan.end;
    plan
}

pub(super) fn partition(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "partition");
    let shape = rng.pick(&[Shape::Uniform, Shape::Zipf, Shape::One, Shape::Bursts]);
    partition_of(seed, &mut rng, shape)
}

pub(super) fn partition_uniform(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "partition-uniform");
    partition_of(seed, &mut rng, Shape::Uniform)
}

fn partition_of(seed: u64, rng: &mut Rng, shape: Shape) -> Plan {
    let slots = rng.pick(&[4, 6, 9]);
    let mut plan = base(seed, rng, slots, 20);
    plan.workload.shape = shape;
    let load = rng.pick(&[1.0, 1.5, 5.0]);
    let reservations = rng.pick(&[20.0, 40.0]);
    size(&mut plan, reservations, load);
    // Somewhere inside a window, and for longer than one.
    let at = 30 * SECOND + rng.below(20 * SECOND);
    let split = Fault::Split { ways: rng.between(2, 3) as usize, salt: rng.next() };
    plan.faults.push(Scheduled { at, until: at + rng.between(28 * SECOND, 36 * SECOND), fault: split });
    measured(plan)
}

/// All replicas replaced within 0.7 of a window of a minute.
pub(super) fn rolling(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "rolling");
    let slots = rng.pick(&[3, 5, 9]);
    let mut plan = base(seed, &mut rng, slots, 60);
    plan.settings.directory = Directory::Name;
    plan.drain = 35 * SECOND;
    let load = rng.pick(&[0.9, 1.5, 5.0]);
    size(&mut plan, 28.0, load);
    let rolling = Fault::Rolling { pause: 42 * SECOND / slots as u64, same_slot: false };
    let at = 70 * SECOND + rng.below(60 * SECOND);
    plan.faults.push(Scheduled { at, until: at + 1, fault: rolling });
    measured(plan)
}

pub(super) fn rolling_killed(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "rolling-killed");
    let mut plan = rolling(seed);
    plan.settings.directory = Directory::Static;
    let first = plan.faults.first().map_or(0, |fault| fault.at);
    plan.faults.clear();
    for slot in 0..plan.slots {
        let at = first + slot as u64 * 42 * SECOND / plan.slots as u64;
        let crash = Fault::Crash { slot, down: Some(rng.between(100_000, 2 * SECOND)), same_slot: true };
        plan.faults.push(Scheduled { at, until: at + 1, fault: crash });
    }
    plan
}

/// Reservations close to use: with caps far above it, 0.9 of the limit in tokens used is
/// more than the limit in tokens reserved, and a central counter refuses too.
fn underload(seed: u64, rng: &mut Rng, slots: usize) -> Plan {
    let mut plan = base(seed, rng, slots, 20);
    plan.workload.costs = Costs::Close { scale: 1.0 };
    let reservations = rng.pick(&[20.0, 30.0, 60.0]);
    plan.workload.shape = rng.pick(&[Shape::Uniform, Shape::Zipf, Shape::Bursts]);
    size(&mut plan, reservations, 0.9);
    measured(plan)
}

pub(super) fn underload_10(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "underload-10");
    let slots = rng.pick(&[2, 3, 5, 10]);
    underload(seed, &mut rng, slots)
}

pub(super) fn underload_30(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "underload-30");
    underload(seed, &mut rng, 30)
}

pub(super) fn underload_caps(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "underload-caps");
    let slots = rng.pick(&[2, 3, 5, 10]);
    let mut plan = underload(seed, &mut rng, slots);
    plan.workload.costs = Costs::Llm { scale: 1.0 };
    let reservations = rng.pick(&[20.0, 30.0, 60.0]);
    size(&mut plan, reservations, 0.9);
    plan
}

pub(super) fn few_requests(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "few-requests");
    let mut plan = base(seed, &mut rng, 30, 60);
    plan.quotas = vec![Quota::requests(10).per_minute()];
    plan.workload.costs = Costs::Flat { tokens: 1 };
    plan.workload.shape = rng.pick(&[Shape::Uniform, Shape::Zipf]);
    plan.workload.rate = rng.pick(&[0.25, 0.5, 2.0]);
    plan.end = 240 * SECOND;
    plan.storm = plan.end;
    measured(plan)
}
