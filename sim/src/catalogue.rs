//! The scenarios.
//!
//! Knows what is worth attacking and measuring. Must not know how. The invariant it
//! keeps: every promise of docs/guarantees.md is attacked by a scenario here.

mod efficiency;
mod http;
mod kinds;
mod pods;
pub(crate) mod studies;

use std::time::Duration;

use quotum::cluster::wire::{OLDEST_WIRE_VERSION, WIRE_VERSION};
use quotum::ledger::{Directory, FirstWindow, OnSilence};
use quotum::{Mode, Quota, Unit};

use self::efficiency::{
    few_requests, healthy, hundred, partition, partition_uniform, rolling, rolling_killed, tight, underload_10,
    underload_30, underload_caps,
};
use crate::Micros;
use crate::fault::{Fault, Scheduled, Swarm};
use crate::rng::Rng;
use crate::scenario::{Layer, Network, Plan, Promise, Requires, Scenario, strict_settings};
use crate::workload::{Costs, Shape, Workload};

const SECOND: Micros = 1_000_000;

/// Where a run starts: 2027-01-15T08:00:00Z, a whole number of every window but days.
pub(crate) const EPOCH_MS: u64 = 1_800_000_000_000;

/// Every scenario, in the order in which a sweep runs them.
pub(crate) fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    SCENARIOS.iter().chain(pods::SCENARIOS).chain(http::SCENARIOS)
}

/// Those of the event layer.
const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "swarm",
        about: "every fault, every workload, the conditions kept: zero over, and recovery in the calm",
        most_seeds: u64::MAX,
        twice_every: 1,
        draw: swarm,
        requires: Requires { uncovered: true, sometimes: SWARM_SOMETIMES, ..Requires::NOTHING },
    },
    Scenario {
        name: "swarm-strict",
        about: "the same seeds, all of them strict and in fixed windows that never change",
        most_seeds: u64::MAX,
        twice_every: 1,
        draw: swarm_faults,
        requires: Requires { uncovered: true, sometimes: SWARM_SOMETIMES, ..Requires::NOTHING },
    },
    Scenario {
        name: "edge",
        about: "the upstream's own count by arrival time, with the edge guard: at most the limit",
        most_seeds: 100,
        twice_every: 1,
        draw: edge,
        requires: Requires { sometimes: &[("edge guard", 0.9), ("upstream window crossed", 0.7)], ..Requires::NOTHING },
    },
    Scenario {
        name: "first-window-admit",
        about: "condition broken: the whole fleet restarts inside a window with first_window: admit",
        most_seeds: 200,
        twice_every: 1,
        draw: first_window_admit,
        requires: Requires { sometimes: &[("all die", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "fair-share",
        about: "condition broken: a newcomer gives up on a listed replica that is alive but cut off",
        most_seeds: 200,
        twice_every: 1,
        draw: fair_share,
        requires: Requires { sometimes: &[("gave up", 0.5)], ..Requires::NOTHING },
    },
    Scenario {
        name: "lying-directory",
        about: "condition broken: answers of the directory lack live replicas at a cold start",
        most_seeds: 200,
        twice_every: 1,
        draw: lying_directory,
        requires: Requires { sometimes: &[("lying directory", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "false-death",
        about: "condition broken: an operator forgets a live replica that cannot hear it",
        most_seeds: 200,
        twice_every: 1,
        draw: false_death,
        requires: Requires { sometimes: &[("false proof of death", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "clocks",
        about: "condition broken: clocks up to 8 s from true time, four times epsilon",
        most_seeds: 200,
        twice_every: 1,
        draw: clocks,
        requires: Requires::NOTHING,
    },
    Scenario {
        name: "healthy",
        about: "efficiency: no faults, at least 20 mean reservations a replica, every load shape, 2 to 30 replicas",
        most_seeds: 60,
        twice_every: 6,
        draw: healthy,
        requires: Requires { efficiency: 0.995, ..Requires::NOTHING },
    },
    Scenario {
        name: "tight",
        about: "efficiency: no faults, 1 to 20 mean reservations a replica",
        most_seeds: 60,
        twice_every: 6,
        draw: tight,
        requires: Requires { efficiency: 0.97, ..Requires::NOTHING },
    },
    Scenario {
        name: "hundred",
        about: "efficiency: 100 replicas, 250 ms between gossip ticks",
        most_seeds: 50,
        twice_every: 25,
        draw: hundred,
        requires: Requires { efficiency: 0.985, sometimes: &[("fragments", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "partition",
        about: "efficiency: the fleet in two or three parts for longer than a window, any load shape",
        most_seeds: 60,
        twice_every: 6,
        draw: partition,
        requires: Requires { efficiency_of_components: 0.99, ..Requires::NOTHING },
    },
    Scenario {
        name: "partition-uniform",
        about: "efficiency: the same at uniform load, against the undivided counter",
        most_seeds: 60,
        twice_every: 6,
        draw: partition_uniform,
        requires: Requires { efficiency: 0.99, efficiency_of_components: 0.99, ..Requires::NOTHING },
    },
    Scenario {
        name: "rolling",
        about: "efficiency: every replica replaced in turn, in order, new addresses behind a headless name",
        most_seeds: 60,
        twice_every: 6,
        draw: rolling,
        requires: Requires { efficiency: 0.98, ..Requires::NOTHING },
    },
    Scenario {
        name: "rolling-killed",
        about: "efficiency: every replica killed and restarted in its slot, which proves the death",
        most_seeds: 60,
        twice_every: 6,
        draw: rolling_killed,
        requires: Requires::NOTHING,
    },
    Scenario {
        name: "underload-10",
        about: "wrongful refusals at 0.9 of the limit, 2 to 10 replicas",
        most_seeds: 60,
        twice_every: 6,
        draw: underload_10,
        requires: Requires { wrongful: Some(0.006), ..Requires::NOTHING },
    },
    Scenario {
        name: "underload-30",
        about: "wrongful refusals at 0.9 of the limit, 30 replicas",
        most_seeds: 50,
        twice_every: 10,
        draw: underload_30,
        requires: Requires { wrongful: Some(0.01), ..Requires::NOTHING },
    },
    Scenario {
        name: "underload-caps",
        about: "the same at 2 to 10 replicas where reservations are more than twice what is used: reported",
        most_seeds: 60,
        twice_every: 6,
        draw: underload_caps,
        requires: Requires::NOTHING,
    },
    Scenario {
        name: "few-requests",
        about: "10 requests a minute on 30 replicas",
        most_seeds: 50,
        twice_every: 10,
        draw: few_requests,
        requires: Requires { efficiency: 0.99, ..Requires::NOTHING },
    },
    Scenario {
        name: "sliding",
        about: "every interval of a window's length: healthy, and the swarm's faults in half of the seeds",
        most_seeds: 200,
        twice_every: 6,
        draw: kinds::sliding,
        requires: Requires { efficiency: 0.80, ..Requires::NOTHING },
    },
    Scenario {
        name: "bucket",
        about: "a continuous token bucket never runs dry: healthy, and the swarm's faults in half of the seeds",
        most_seeds: 200,
        twice_every: 6,
        draw: kinds::bucket,
        requires: Requires { efficiency: 0.90, ..Requires::NOTHING },
    },
    Scenario {
        name: "day",
        about: "local days of 23, 24 and 25 hours that vest or come at once, with crashes and replacements in half",
        most_seeds: 60,
        twice_every: 10,
        draw: kinds::day,
        requires: Requires { efficiency: 0.98, ..Requires::NOTHING },
    },
    Scenario {
        name: "several-windows",
        about: "three windows of one unit at once, of different kinds",
        most_seeds: 100,
        twice_every: 6,
        draw: kinds::several_windows,
        requires: Requires::NOTHING,
    },
    Scenario {
        name: "kinds-upstream",
        about: "the upstream's own count of sliding windows and buckets, by arrival within the edge",
        most_seeds: 100,
        twice_every: 6,
        draw: kinds::upstream,
        requires: Requires::NOTHING,
    },
    Scenario {
        name: "elastic",
        about: "at most (1 + beta) of the limit, in the swarm's faults",
        most_seeds: 400,
        twice_every: 6,
        draw: kinds::elastic,
        requires: Requires::NOTHING,
    },
    Scenario {
        name: "sum",
        about: "the known use less a margin of 5 %: healthy, and the swarm's faults in half of the seeds",
        most_seeds: 400,
        twice_every: 6,
        draw: kinds::sum_fixed,
        requires: Requires::NOTHING,
    },
    Scenario {
        name: "sum-auto",
        about: "the same with a margin that is measured",
        most_seeds: 400,
        twice_every: 6,
        draw: kinds::sum_auto,
        requires: Requires::NOTHING,
    },
    Scenario {
        name: "sum-alone",
        about: "sum with a margin of 10 %, and nobody hears anybody: the bound itself",
        most_seeds: 100,
        twice_every: 6,
        draw: kinds::sum_alone,
        requires: Requires { sometimes: &[("over the limit, as the mode allows", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "limit-change",
        about: "limits rise and fall, replica by replica, in the swarm's faults: at most the larger one, then the new",
        most_seeds: 400,
        twice_every: 6,
        draw: kinds::limit_change,
        requires: Requires {
            sometimes: &[("limits change", 0.99), ("limits changed everywhere", 0.9)],
            ..Requires::NOTHING
        },
    },
    Scenario {
        name: "limit-halved",
        about: "efficiency: limits halved or doubled replica by replica without faults, against the larger limit",
        most_seeds: 60,
        twice_every: 6,
        draw: kinds::limit_halved,
        requires: Requires { efficiency: 0.95, ..Requires::NOTHING },
    },
    Scenario {
        name: "limit-unknown",
        about: "efficiency: a new deployment rolled out pod by pod, from the first pod that knows it on",
        most_seeds: 60,
        twice_every: 6,
        draw: kinds::limit_unknown,
        requires: Requires { efficiency: 0.95, ..Requires::NOTHING },
    },
];

/// What the swarm must reach, and in which share of seeds at least.
const SWARM_SOMETIMES: &[(&str, f64)] = &[
    ("loss", 0.05),
    ("delay", 0.05),
    ("reorder", 0.05),
    ("duplicate", 0.05),
    ("replay", 0.05),
    ("garbage", 0.05),
    ("other wire versions", 0.05),
    ("two releases at once", 0.05),
    ("a frame of the oldest version", 0.9),
    ("a frame of the newest version", 0.3),
    ("one-way cut", 0.05),
    ("split", 0.05),
    ("split during a roll", 0.05),
    ("flapping link", 0.05),
    ("slow replica", 0.05),
    ("gossip pause", 0.05),
    ("clock step", 0.05),
    ("crash for good", 0.05),
    ("restart in the same slot", 0.05),
    ("restart in a new slot", 0.02),
    ("replacement", 0.05),
    ("rolling replacement", 0.05),
    ("scale", 0.02),
    ("all die", 0.05),
    ("lagging directory", 0.02),
    ("a listed replica never starts", 0.02),
    ("joined", 0.8),
    ("gone: told", 0.05),
    ("gone: same slot", 0.05),
    ("gone: absent", 0.01),
    ("a newcomer is blocked", 0.3),
    ("debt", 0.1),
    ("uncovered", 0.01),
    ("a death at the end", 0.2),
    ("recovered", 0.3),
    ("converged", 0.3),
    ("somebody unproven is missing", 0.02),
    ("parked", 0.5),
    ("parked and admitted", 0.3),
    ("a limit smaller than the fleet", 0.02),
    ("edge guard", 0.1),
    ("refused", 0.5),
    ("too large", 0.05),
    ("a caller left while parked", 0.05),
    ("late settlement", 0.05),
    ("rights given", 0.3),
    ("replayed request", 0.02),
];

fn base(seed: u64, rng: &mut Rng, slots: usize, window_s: u64) -> Plan {
    let window = Duration::from_secs(window_s);
    let end = 60 * SECOND;
    Plan {
        scenario: "",
        seed,
        layer: Layer::Events,
        quotas: vec![Quota::tokens(100_000).per(window)],
        mode: Mode::Strict,
        midnights: Vec::new(),
        unknown: false,
        slots,
        ghosts: 0,
        start_spread: 300_000,
        phase: rng.below(window_s * SECOND),
        storm: end,
        end,
        interval: Duration::from_millis(100),
        wait: Duration::from_millis(20),
        edge: Duration::from_millis(50),
        settings: strict_settings(Directory::Static, Duration::from_secs(10)),
        exclusive: true,
        delisted_after: 2 * SECOND,
        directory_lag: 0,
        drain: 10 * SECOND,
        clock_range_ms: 5,
        drift_ppm: 20,
        network: Network::LAN,
        workload: Workload {
            shape: Shape::Uniform,
            costs: Costs::Llm { scale: 1.0 },
            rate: 10.0,
            hold: (SECOND, 8 * SECOND),
            cancelled: 0.0,
            unsettled: 0.0,
            above: 0.0,
            large: 0.0,
            large_tokens: 0,
            retries: 0.0,
            impatient: 0.0,
        },
        calm_load: 1.0,
        faults: Vec::new(),
        promise: Promise::Zero,
        keys: Vec::new(),
        releases: Vec::new(),
        sealed: false,
        measure_from: None,
        finale: false,
        recovers: false,
        http: None,
    }
}

/// Sets limit and rate: `reservations` a replica and window, offered `load` times in
/// actual tokens.
fn size(plan: &mut Plan, reservations: f64, load: f64) {
    let (reserved, used) = plan.workload.costs.means();
    let limit = (reservations * plan.slots as f64 * reserved) as u64;
    let window = plan.quotas[0].window().duration();
    plan.quotas[0] = Quota::tokens(limit.max(1)).per(window);
    plan.workload.rate = load * limit as f64 / used / window.as_secs_f64();
}

fn swarm(seed: u64) -> Plan {
    let mut plan = swarm_faults(seed);
    // From streams of their own, so that faults and workload stay what they are.
    kinds::vary(&mut plan, seed);
    plan
}

/// The storm without its kinds and modes: strict, in fixed windows.
fn swarm_faults(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "swarm");
    let rng = &mut rng;
    let slots = rng.pick(&[1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 8]);
    let window_s = rng.pick(&[2, 4, 5, 6, 8, 10]);
    storm(seed, rng, slots, window_s, 60 * SECOND)
}

/// A storm of a fleet of this size and windows of this length, and the calm after it.
fn storm(seed: u64, rng: &mut Rng, slots: usize, window_s: u64, end: Micros) -> Plan {
    let mut plan = base(seed, rng, slots, window_s);
    plan.end = end;
    let named = rng.chance(0.5);
    let directory = if named { Directory::Name } else { Directory::Static };
    plan.settings = strict_settings(directory, Duration::from_secs(rng.pick(&[6, 10, 60])));
    plan.exclusive = rng.chance(0.8);
    plan.delisted_after = rng.between(100_000, 6 * SECOND);
    plan.directory_lag = if named && rng.chance(0.3) { rng.below(3 * SECOND) } else { 0 };
    plan.ghosts = usize::from(rng.chance(0.06));
    plan.start_spread = rng.pick(&[1_000, 300_000, 5 * SECOND]);
    plan.calm_load = 0.6;
    plan.storm = plan.end - (9 * SECOND + 3 * window_s * SECOND);
    plan.recovers = true;
    plan.finale = rng.chance(0.4);
    plan.sealed = rng.chance(0.1);
    plan.edge = Duration::from_millis(rng.pick(&[0, 50, 50, 250]));
    plan.wait = Duration::from_millis(rng.pick(&[0, 20, 20, 20, 100]));
    plan.drain = rng.between(500_000, 15 * SECOND);
    plan.clock_range_ms = rng.pick(&[0, 20, 500, 1_900]);
    plan.drift_ppm = rng.pick(&[0, 100, 1_000]);
    plan.network.loss = rng.pick(&[0.0, 0.0, 0.0, 0.01]);
    swarm_workload(&mut plan, rng);
    let swarm = Swarm { slots, storm: plan.storm, window: plan.window(), phase: plan.phase, new_slots: named };
    plan.faults = swarm.draw(rng);
    plan.releases = releases(seed, plan.storm);
    plan
}

/// Half of the storms are of fleets in which somebody is of the release before: of nobody else,
/// of those that start early, or of those that start late. Not drawn, so that every seed goes on
/// drawing what it drew.
fn releases(seed: u64, storm: Micros) -> Vec<(Micros, u8)> {
    match seed % 6 {
        0 => vec![(0, OLDEST_WIRE_VERSION)],
        1 => vec![(0, OLDEST_WIRE_VERSION), (storm / 3, WIRE_VERSION)],
        2 => vec![(0, WIRE_VERSION), (storm / 3, OLDEST_WIRE_VERSION)],
        _ => Vec::new(),
    }
}

fn swarm_workload(plan: &mut Plan, rng: &mut Rng) {
    let window = plan.quotas[0].window().duration();
    let workload = &mut plan.workload;
    workload.shape = rng.pick(&[Shape::Uniform, Shape::Zipf, Shape::One, Shape::Bursts]);
    workload.costs = if rng.chance(0.8) { Costs::Llm { scale: 1.0 } } else { Costs::Flat { tokens: 1_000 } };
    workload.hold = (rng.between(1_000, SECOND), rng.pick(&[SECOND, 8 * SECOND, 30 * SECOND]));
    workload.cancelled = rng.pick(&[0.0, 0.05]);
    workload.unsettled = rng.pick(&[0.0, 0.0, 0.05]);
    workload.above = rng.pick(&[0.0, 0.0, 0.1, 0.5]);
    workload.retries = rng.pick(&[0.0, 0.0, 0.7]);
    workload.impatient = rng.pick(&[0.0, 0.1]);
    let load = rng.pick(&[0.5, 0.9, 1.0, 1.5, 3.0, 5.0, 20.0]);
    let reservations = rng.pick(&[0.3, 1.0, 3.0, 10.0, 30.0]);
    size(plan, reservations, load);
    plan.workload.rate = plan.workload.rate.min(300.0);
    let amount = plan.quotas[0].amount();
    if rng.chance(0.3) {
        plan.workload.large = 0.05;
        plan.workload.large_tokens = amount;
    }
    if rng.chance(0.3) {
        let requests = rng.pick(&[1, 2, 10, 60]);
        plan.quotas.push(Quota::requests(requests * window.as_secs()).per(window));
    }
    if rng.chance(0.1) {
        // Fewer requests than replicas, and no tokens.
        plan.quotas = vec![Quota::requests(rng.between(1, plan.slots as u64 * 2)).per(window)];
        plan.workload.rate = rng.between(1, 20) as f64;
        plan.workload.large = 0.0;
    }
    plan.quotas.sort_unstable_by_key(|quota| quota.unit() != Unit::Tokens);
}

fn edge(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "edge");
    let mut plan = base(seed, &mut rng, 5, 2);
    plan.clock_range_ms = 0;
    plan.drift_ppm = 0;
    plan.workload.hold = (50_000, SECOND);
    size(&mut plan, 10.0, 5.0);
    plan.workload.rate = plan.workload.rate.min(400.0);
    plan.end = 30 * SECOND;
    plan.storm = plan.end;
    plan
}

fn first_window_admit(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "first-window-admit");
    let mut plan = base(seed, &mut rng, 4, 10);
    plan.settings.first_window = FirstWindow::Admit;
    size(&mut plan, 20.0, 5.0);
    let deaths = rng.between(1, 3);
    for _ in 0..deaths {
        let at = rng.between(2 * SECOND, 40 * SECOND);
        let down = rng.between(200_000, 2 * SECOND);
        plan.faults.push(Scheduled { at, until: at + 1, fault: Fault::AllDie { down } });
    }
    plan.promise = Promise::Bounded {
        broken: "a restart of the whole fleet inside one window (first_window: admit)",
        limits: deaths as f64,
    };
    plan
}

fn fair_share(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "fair-share");
    let slots = rng.between(3, 6) as usize;
    let mut plan = base(seed, &mut rng, slots, 6);
    plan.settings.on_silence = OnSilence::FairShare;
    plan.settings.patience = Duration::from_secs(4);
    plan.settings.directory = Directory::Name;
    plan.settings.absent_for = Duration::from_secs(3_600);
    plan.exclusive = false;
    size(&mut plan, 20.0, 5.0);
    // A newcomer starts while the fleet is split: it hears one part only.
    let at = rng.between(14 * SECOND, 25 * SECOND);
    let until = at + rng.between(12 * SECOND, 25 * SECOND);
    plan.faults.push(Scheduled { at, until, fault: Fault::Split { ways: 2, salt: rng.next() } });
    let to = slots + 1;
    plan.faults.push(Scheduled { at: at + 100_000, until: plan.end, fault: Fault::Scale { to } });
    plan.promise = Promise::Bounded {
        broken: "a newcomer gave up on live replicas (on_silence: fair_share): L/n each",
        limits: 1.0 / (slots + 1) as f64,
    };
    plan
}

fn lying_directory(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "lying-directory");
    let slots = rng.between(2, 6) as usize;
    let mut plan = base(seed, &mut rng, slots, 5);
    plan.settings.directory = Directory::Name;
    size(&mut plan, 20.0, 5.0);
    plan.faults.push(Scheduled { at: 0, until: 20 * SECOND, fault: Fault::LyingDirectory });
    plan.promise = Promise::Bounded {
        broken: "directory condition D: answers lack live replicas; k ignorant parts: (k-1) L",
        limits: (slots - 1) as f64,
    };
    plan
}

fn false_death(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "false-death");
    let slots = rng.between(3, 6) as usize;
    let mut plan = base(seed, &mut rng, slots, 5);
    size(&mut plan, 20.0, 5.0);
    let slot = rng.index(slots);
    let at = rng.between(14 * SECOND, 20 * SECOND);
    // It is cut off from everybody, so that it does not hear of its own death.
    plan.faults.push(Scheduled { at, until: at + 25 * SECOND, fault: Fault::Flap { slot, period: 0 } });
    plan.faults.push(Scheduled { at: at + SECOND, until: at + SECOND + 1, fault: Fault::ForgetAlive { slot } });
    plan.promise = Promise::Bounded {
        broken: "a false proof of death: L/|U| for each live replica declared dead",
        // Its own share, and a grain of rounding.
        limits: 1.0 / slots as f64 + 1e-3,
    };
    plan
}

fn clocks(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "clocks");
    let slots = rng.between(3, 6) as usize;
    let mut plan = base(seed, &mut rng, slots, 5);
    plan.clock_range_ms = 8_000;
    size(&mut plan, 20.0, 5.0);
    let rolling = Fault::Rolling { pause: rng.between(200_000, 2 * SECOND), same_slot: true };
    plan.faults.push(Scheduled { at: 15 * SECOND, until: 15 * SECOND + 1, fault: rolling });
    let at = rng.between(35 * SECOND, 45 * SECOND);
    let crash = Fault::Crash { slot: rng.index(slots), down: Some(rng.between(50_000, SECOND)), same_slot: true };
    plan.faults.push(Scheduled { at, until: at + 1, fault: crash });
    plan.promise = Promise::Bounded {
        broken: "clocks outside epsilon: L m / |U|, m dead that had frozen the window",
        limits: 1.0,
    };
    plan
}
