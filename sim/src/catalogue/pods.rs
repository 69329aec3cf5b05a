//! Plans for whole pods: the turmoil layer.
//!
//! Knows what only a real loop, chitchat, seals and fragments can get wrong. Must not know
//! how a pod is run. The invariant it keeps: a plan here can be carried out on the event
//! layer too, so that the two can be compared.

use std::time::Duration;

use quotum::cluster::wire::{OLDEST_WIRE_VERSION, WIRE_VERSION};
use quotum::ledger::Directory;

use super::{SECOND, base, size};
use crate::Micros;
use crate::fault::{Fault, Scheduled};
use crate::rng::Rng;
use crate::scenario::{Layer, Plan, Promise, Requires, Scenario};
use crate::workload::Shape;

/// Every scenario of the layer.
pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "pods-swarm",
        about: "every fault, kind, mode and workload of the swarm, played to whole pods",
        most_seeds: 400,
        twice_every: 6,
        draw: swarm,
        requires: Requires { sometimes: SWARM_SOMETIMES, ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-healthy",
        about: "efficiency: 3 whole pods without faults: cluster loop, chitchat, sealed frames",
        most_seeds: 60,
        twice_every: 6,
        draw: healthy,
        requires: Requires { efficiency: 0.985, sometimes: &[], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-sigterm",
        about: "efficiency: every pod is told to leave in turn, under load, and another takes its place",
        most_seeds: 60,
        twice_every: 6,
        draw: sigterm,
        requires: Requires { sometimes: &[("left in order", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-window-edge",
        about: "answers that last longer than a window: settled late, and the upstream's count is kept",
        most_seeds: 60,
        twice_every: 6,
        draw: window_edge,
        requires: Requires { sometimes: &[("late settlement", 0.9), ("edge guard", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-endless",
        about: "answers that never end, held by pods that are told to leave: cut off after the drain, still charged",
        most_seeds: 60,
        twice_every: 6,
        draw: endless,
        requires: Requires { sometimes: &[("cut off while it left", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-slow-upstream",
        about: "an upstream that takes longer and longer: debts, lost ends, callers that give up",
        most_seeds: 60,
        twice_every: 6,
        draw: slow_upstream,
        requires: Requires { sometimes: &[("late settlement", 0.9), ("debt", 0.3)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-parked",
        about: "pods are told to leave while requests wait for rights: all are answered",
        most_seeds: 60,
        twice_every: 6,
        draw: parked,
        requires: Requires { sometimes: &[("left in order", 0.5)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-directory",
        about: "a headless name whose answers lag by seconds while pods come and go",
        most_seeds: 60,
        twice_every: 6,
        draw: lagging_directory,
        requires: Requires { sometimes: &[("lagging directory", 0.9), ("joined", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-lying-directory",
        about: "condition broken: answers of the headless name lack live pods at a cold start",
        most_seeds: 60,
        twice_every: 6,
        draw: lying_directory,
        requires: Requires { sometimes: &[("lying directory", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-keys",
        about: "the cluster key is rotated in three steps, pod by pod, while they run and are replaced: no frame is thrown away",
        most_seeds: 60,
        twice_every: 6,
        draw: keys,
        requires: Requires {
            sometimes: &[("left in order", 0.4), ("recovered", 0.9), ("keys changed while it ran", 0.4)],
            ..Requires::NOTHING
        },
    },
    Scenario {
        name: "pods-versions",
        about: "frames of other wire versions and garbage beside every second frame change nothing",
        most_seeds: 60,
        twice_every: 6,
        draw: versions,
        requires: Requires { efficiency: 0.97, sometimes: &[("other wire versions", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-upgrade",
        about: "pods of the release before are replaced by this one's under load, back again and once more: nobody is sent what it cannot read",
        most_seeds: 100,
        twice_every: 6,
        draw: upgrade,
        requires: Requires {
            sometimes: &[
                ("two releases at once", 0.9),
                ("a frame of the oldest version", 0.9),
                ("a frame of the newest version", 0.9),
                ("left in order", 0.9),
                ("recovered", 0.9),
            ],
            ..Requires::NOTHING
        },
    },
    Scenario {
        name: "pods-chitchat",
        about: "chitchat ends in one pod after the other: it is started again, and nothing that counts is lost",
        most_seeds: 60,
        twice_every: 6,
        draw: chitchat,
        requires: Requires { efficiency: 0.97, sometimes: &[("chitchat started again", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-hundred",
        about: "100 whole pods: rosters in fragments, no datagram too large, everybody joins",
        most_seeds: 4,
        twice_every: 4,
        draw: hundred,
        requires: Requires::NOTHING,
    },
];

/// What the swarm must reach here too, and in which share of seeds at least. What only notes
/// of a ledger tell is not seen from outside of a pod.
const SWARM_SOMETIMES: &[(&str, f64)] = &[
    ("loss", 0.05),
    ("delay", 0.05),
    ("reorder", 0.05),
    ("duplicate", 0.05),
    ("replay", 0.05),
    ("garbage", 0.05),
    ("other wire versions", 0.05),
    ("two releases at once", 0.05),
    ("a frame of the oldest version", 0.5),
    ("a frame of the newest version", 0.3),
    ("one-way cut", 0.05),
    ("split", 0.05),
    ("flapping link", 0.05),
    ("slow replica", 0.05),
    ("gossip pause", 0.05),
    ("clock step", 0.05),
    ("crash for good", 0.05),
    ("restart in the same slot", 0.05),
    ("replacement", 0.05),
    ("rolling replacement", 0.05),
    ("all die", 0.05),
    ("joined", 0.8),
    ("gone", 0.3),
    ("a newcomer is blocked", 0.3),
    ("recovered", 0.2),
    ("converged", 0.2),
    ("parked", 0.4),
    ("parked and admitted", 0.2),
    ("edge guard", 0.05),
    ("refused", 0.5),
    ("late settlement", 0.2),
    ("left in order", 0.05),
];

/// What production does anyway.
pub(super) fn pods(mut plan: Plan) -> Plan {
    plan.layer = Layer::Turmoil;
    plan.sealed = true;
    // A list names ports, so pods on it bind theirs exclusively.
    plan.exclusive |= plan.settings.directory == Directory::Static;
    plan
}

fn fleet(seed: u64, rng: &mut Rng) -> Plan {
    fleet_of(3, seed, rng)
}

/// Pods under load, measured from the second window on.
fn fleet_of(slots: usize, seed: u64, rng: &mut Rng) -> Plan {
    let mut plan = base(seed, rng, slots, 5);
    plan.workload.shape = rng.pick(&[Shape::Uniform, Shape::Zipf, Shape::Bursts]);
    let load = rng.pick(&[0.9, 1.5, 5.0]);
    size(&mut plan, 20.0, load);
    plan.workload.hold = (SECOND / 10, 2 * SECOND);
    plan.end = 30 * SECOND;
    plan.storm = plan.end;
    plan.measure_from = Some(8 * SECOND);
    pods(plan)
}

fn healthy(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-healthy");
    fleet(seed, &mut rng)
}

fn swarm(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-swarm");
    let slots = rng.pick(&[1, 2, 3, 3, 4, 4, 5, 5, 6]);
    let window_s = rng.pick(&[2, 2, 3]);
    let mut plan = super::storm(seed, &mut rng, slots, window_s, 30 * SECOND);
    super::kinds::vary(&mut plan, seed);
    pods(plan)
}

/// A fault at an instant.
pub(super) const fn at(at: Micros, fault: Fault) -> Scheduled {
    Scheduled { at, until: at + 1, fault }
}

fn sigterm(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-sigterm");
    let mut plan = fleet(seed, &mut rng);
    plan.workload.rate *= 1.5;
    let named = rng.chance(0.5);
    plan.settings.directory = if named { Directory::Name } else { Directory::Static };
    let pause = rng.between(SECOND / 2, 3 * SECOND);
    plan.faults.push(at(rng.between(11, 15) * SECOND, Fault::Rolling { pause, same_slot: !named }));
    pods(plan)
}

fn window_edge(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-window-edge");
    let mut plan = base(seed, &mut rng, 3, 2);
    plan.clock_range_ms = 0;
    plan.drift_ppm = 0;
    size(&mut plan, 20.0, 3.0);
    plan.workload.hold = (SECOND, 6 * SECOND);
    plan.workload.above = rng.pick(&[0.0, 0.2]);
    plan.end = 25 * SECOND;
    plan.storm = plan.end;
    pods(plan)
}

fn endless(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-endless");
    let mut plan = fleet(seed, &mut rng);
    plan.measure_from = None;
    plan.workload.hold = (40 * SECOND, 60 * SECOND);
    plan.drain = 2 * SECOND;
    for slot in 0..plan.slots {
        let when = rng.between(9, 20) * SECOND;
        plan.faults.push(at(when, Fault::Replace { slot, same_slot: true }));
    }
    plan
}

fn slow_upstream(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-slow-upstream");
    let mut plan = fleet(seed, &mut rng);
    plan.measure_from = None;
    plan.workload.hold = (SECOND, rng.between(8, 15) * SECOND);
    plan.workload.above = 0.3;
    plan.workload.unsettled = 0.1;
    plan.workload.impatient = 0.2;
    plan.workload.retries = 0.5;
    plan
}

fn parked(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-parked");
    let mut plan = fleet(seed, &mut rng);
    plan.measure_from = None;
    // A request is a third of a share, and links are slow: most have to wait.
    size(&mut plan, 3.0, 4.0);
    plan.workload.hold = (SECOND / 10, SECOND);
    plan.wait = Duration::from_millis(rng.pick(&[300, 800]));
    plan.network.delay = (20_000, 120_000);
    for slot in 0..plan.slots {
        let when = rng.between(9 * SECOND, 22 * SECOND);
        plan.faults.push(at(when, Fault::Replace { slot, same_slot: true }));
    }
    plan
}

fn lagging_directory(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-directory");
    let mut plan = fleet(seed, &mut rng);
    plan.measure_from = None;
    plan.settings.directory = Directory::Name;
    plan.directory_lag = rng.between(1, 3) * SECOND;
    plan.delisted_after = rng.between(1, 5) * SECOND;
    let stale = Fault::StaleDirectory(rng.between(1, 4) * SECOND);
    plan.faults.push(Scheduled { at: 5 * SECOND, until: 20 * SECOND, fault: stale });
    plan.faults.push(at(9 * SECOND, Fault::Scale { to: 5 }));
    plan.faults.push(at(rng.between(10, 14) * SECOND, Fault::Replace { slot: 0, same_slot: false }));
    let down = Some(rng.between(SECOND / 10, 3 * SECOND));
    plan.faults.push(at(rng.between(10, 18) * SECOND, Fault::Crash { slot: 1, down, same_slot: false }));
    pods(plan)
}

fn lying_directory(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-lying-directory");
    let mut plan = fleet(seed, &mut rng);
    plan.measure_from = None;
    plan.settings.directory = Directory::Name;
    plan.faults.push(Scheduled { at: 0, until: 15 * SECOND, fault: Fault::LyingDirectory });
    plan.promise = Promise::Bounded {
        broken: "directory condition D: answers lack live replicas; k ignorant parts: (k-1) L",
        limits: (plan.slots - 1) as f64,
    };
    pods(plan)
}

/// The old key, both with the old one first, both with the new one first, the new one.
fn keys(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-keys");
    let mut plan = fleet(seed, &mut rng);
    plan.measure_from = None;
    plan.keys = vec![(0, &[7])];
    for (number, keys) in (1..).zip([&[7, 8][..], &[8, 7], &[8]]) {
        let begins = (2 + number * 7) * SECOND;
        plan.keys.push((begins, keys));
        // The files change in place; in half of the seeds pods are replaced meanwhile, too.
        let pause = rng.between(SECOND / 4, SECOND);
        if seed.is_multiple_of(2) {
            plan.faults.push(at(begins, Fault::Rolling { pause, same_slot: true }));
        }
    }
    plan.storm = 28 * SECOND;
    plan.end = plan.storm + 14 * SECOND + QUIET;
    plan.recovers = true;
    plan
}

fn versions(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-versions");
    let mut plan = fleet(seed, &mut rng);
    for fault in [Fault::OtherVersions(0.5), Fault::Garbage(0.5)] {
        plan.faults.push(Scheduled { at: 0, until: plan.end, fault });
    }
    plan
}

/// Up, back and up again; some rolls are called off half-way, and the next one begins.
fn upgrade(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-upgrade");
    let slots = rng.pick(&[2, 3, 3, 5]);
    let mut plan = fleet_of(slots, seed, &mut rng);
    plan.measure_from = None;
    let named = rng.chance(0.5);
    plan.settings.directory = if named { Directory::Name } else { Directory::Static };
    plan.network.loss = rng.pick(&[0.0, 0.0, 0.05]);
    plan.releases = vec![(0, OLDEST_WIRE_VERSION)];
    let mut begins = rng.between(5, 8) * SECOND;
    for newest in [WIRE_VERSION, OLDEST_WIRE_VERSION, WIRE_VERSION] {
        plan.releases.push((begins, newest));
        let pause = rng.between(SECOND / 4, 3 * SECOND);
        plan.faults.push(at(begins, Fault::Rolling { pause, same_slot: !named }));
        if rng.chance(0.3) {
            let (slot, down) = (rng.index(plan.slots), Some(rng.between(SECOND / 10, 3 * SECOND)));
            let when = begins + rng.below(4 * SECOND);
            plan.faults.push(at(when, Fault::Crash { slot, down, same_slot: !named }));
        }
        begins += if rng.chance(0.3) { rng.between(2, 4) * SECOND } else { rng.between(9, 11) * SECOND };
    }
    plan.storm = 42 * SECOND;
    plan.end = plan.storm + 14 * SECOND + QUIET;
    plan.recovers = true;
    pods(plan)
}

fn chitchat(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-chitchat");
    let mut plan = fleet(seed, &mut rng);
    for slot in 0..plan.slots {
        plan.faults.push(at(rng.between(5 * SECOND, 20 * SECOND), Fault::Crowd { slot }));
    }
    plan
}

fn hundred(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-hundred");
    let mut plan = base(seed, &mut rng, 100, 5);
    plan.interval = Duration::from_millis(250);
    plan.wait = Duration::from_millis(50);
    size(&mut plan, 3.0, 1.5);
    plan.workload.hold = (SECOND / 10, 2 * SECOND);
    plan.end = 18 * SECOND;
    plan.storm = SECOND;
    plan.recovers = true;
    pods(plan)
}

/// So long before the end of a run that must recover nothing is asked any more.
const QUIET: Micros = 3 * SECOND;
