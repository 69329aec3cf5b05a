//! Plans for whole pods with their proxies: callers and upstreams over simulated TCP.
//!
//! Knows what only a real server, real connections and a real upstream client can get wrong.
//! Must not know how any of it is run. The invariant it keeps: nobody asks in the last part of
//! a plan's last window, so that at its end everything must have settled.

use std::time::Duration;

use super::pods::{at, pods};
use super::{SECOND, base, size};
use crate::Micros;
use crate::fault::{Fault, Scheduled};
use crate::rng::Rng;
use crate::scenario::{Http, Plan, Requires, Scenario};
use crate::workload::{Costs, Shape};

/// Every scenario with proxies.
pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "pods-http",
        about: "the proxies of 3 pods behind round robin, streaming and not: the upstream's count, every answer whole",
        most_seeds: 40,
        twice_every: 6,
        draw: healthy,
        requires: Requires {
            sometimes: &[
                ("answered", 1.0),
                ("streamed to its end", 1.0),
                ("refused", 0.5),
                ("settled to the token", 0.5),
            ],
            ..Requires::NOTHING
        },
    },
    Scenario {
        name: "pods-http-cut",
        about: "streams across a window's edge, and callers that hang up anywhere in between",
        most_seeds: 40,
        twice_every: 6,
        draw: cut,
        requires: Requires {
            sometimes: &[("the caller hung up", 1.0), ("streamed to its end", 1.0)],
            ..Requires::NOTHING
        },
    },
    Scenario {
        name: "pods-http-slow",
        about: "an upstream that takes long, begins and goes silent, or never begins: timeouts settle it",
        most_seeds: 40,
        twice_every: 6,
        draw: slow,
        requires: Requires { sometimes: &[("the upstream was too slow", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-http-drain",
        about: "every pod is told to end under load and another takes its place: whoever it took in is answered, the parked too",
        most_seeds: 40,
        twice_every: 6,
        draw: drain,
        requires: Requires {
            sometimes: &[
                ("left in order", 1.0),
                ("answered while the pod left", 0.9),
                ("parked while the pod left", 0.3),
            ],
            ..Requires::NOTHING
        },
    },
    Scenario {
        name: "pods-http-split",
        about: "pods cannot reach one another or lose every third datagram, callers and upstream all of them",
        most_seeds: 40,
        twice_every: 6,
        draw: split,
        requires: Requires { sometimes: &[("split", 0.9), ("loss", 0.9)], ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-http-upstream",
        about: "two upstreams: the first is cut off, mute or refuses: the second is asked, and nothing is executed twice",
        most_seeds: 40,
        twice_every: 6,
        draw: upstream,
        requires: Requires {
            sometimes: &[
                ("spilled over", 1.0),
                ("upstream away", 0.3),
                ("answers lost", 0.3),
                ("the upstream refused", 0.3),
            ],
            ..Requires::NOTHING
        },
    },
];

/// The length of a window.
const WINDOW: Micros = 5 * SECOND;

/// Three pods under load until the last window's second second; then nobody asks.
fn fleet(seed: u64, rng: &mut Rng) -> Plan {
    let mut plan = base(seed, rng, 3, WINDOW / SECOND);
    plan.clock_range_ms = 0;
    plan.drift_ppm = 0;
    plan.workload.shape = rng.pick(&[Shape::Uniform, Shape::Uniform, Shape::Zipf]);
    plan.workload.costs = Costs::Llm { scale: 0.1 };
    let load = rng.pick(&[0.8, 1.5, 3.0]);
    size(&mut plan, 20.0, load);
    plan.workload.hold = (SECOND / 20, 3 * SECOND / 2);
    plan.wait = Duration::from_millis(rng.pick(&[20, 200]));
    let edge = 30 * SECOND - plan.phase;
    plan.end = edge - SECOND / 10;
    plan.storm = plan.end;
    plan.drain = 20 * SECOND;
    plan.http = Some(Http {
        upstreams: 1,
        streams: 0.5,
        before_first: 0.5,
        stalls: 0.0,
        hangs: 0.0,
        lag: 300_000,
        linger: Duration::from_millis(500),
        drain: Duration::from_secs(5),
        first_byte: Duration::from_secs(2),
        idle: Duration::from_secs(1),
        quiet_from: edge - WINDOW + 3 * SECOND / 2,
        upstream_fails: false,
    });
    pods(plan)
}

/// Changes what is around the proxies.
fn around(plan: &mut Plan, change: impl FnOnce(&mut Http)) {
    if let Some(http) = &mut plan.http {
        change(http);
    }
}

fn healthy(seed: u64) -> Plan {
    fleet(seed, &mut Rng::stream(seed, "pods-http"))
}

fn cut(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-http-cut");
    let mut plan = fleet(seed, &mut rng);
    plan.workload.hold = (SECOND, 3 * SECOND);
    plan.workload.cancelled = 0.4;
    // In half of the seeds streams alone, cut in the middle: what is charged is close to what is
    // used, so that a stream charged too little shows. The prompt's bound must not hide it.
    let sharp = seed.is_multiple_of(2);
    if sharp {
        plan.workload.costs = Costs::Llm { scale: 1.0 };
        size(&mut plan, 15.0, 1.5);
    } else {
        plan.workload.impatient = 0.1;
        plan.workload.unsettled = 0.1;
    }
    around(&mut plan, |http| {
        http.streams = if sharp { 1.0 } else { 0.8 };
        http.before_first = if sharp { 0.01 } else { 0.5 };
        http.first_byte = Duration::from_secs(4);
    });
    plan
}

fn slow(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-http-slow");
    let mut plan = fleet(seed, &mut rng);
    plan.workload.hold = (SECOND / 2, 6 * SECOND);
    around(&mut plan, |http| {
        http.stalls = 0.2;
        http.hangs = 0.1;
        // A stub's pieces come at even steps: slower than this between two of them is silence.
        http.idle = Duration::from_millis(800);
        http.upstream_fails = true;
        http.quiet_from -= WINDOW;
    });
    plan
}

fn drain(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-http-drain");
    let mut plan = fleet(seed, &mut rng);
    // A request is a fifth of a share: many are parked.
    let load = rng.pick(&[1.5, 3.0]);
    size(&mut plan, 5.0, load);
    plan.wait = Duration::from_millis(rng.pick(&[300, 800]));
    plan.network.delay = (20_000, 80_000);
    plan.workload.hold = (SECOND / 10, 3 * SECOND);
    around(&mut plan, |http| {
        http.first_byte = Duration::from_secs(4);
        http.idle = Duration::from_secs(4);
    });
    for slot in 0..plan.slots {
        let when = rng.between(7 * SECOND, 18 * SECOND);
        plan.faults.push(at(when, Fault::Replace { slot, same_slot: true }));
    }
    plan
}

fn split(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-http-split");
    let mut plan = fleet(seed, &mut rng);
    let from = rng.between(6, 12) * SECOND;
    let fault = Fault::Split { ways: rng.between(2, 3) as usize, salt: rng.next() };
    plan.faults.push(Scheduled { at: from, until: from + rng.between(2, 7) * SECOND, fault });
    plan.faults.push(Scheduled { at: 5 * SECOND, until: 20 * SECOND, fault: Fault::Loss(rng.pick(&[0.1, 0.3])) });
    plan
}

fn upstream(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-http-upstream");
    let mut plan = fleet(seed, &mut rng);
    around(&mut plan, |http| {
        http.upstreams = 2;
        http.upstream_fails = true;
        http.quiet_from -= WINDOW;
    });
    let fault = match rng.below(4) {
        0 => Fault::UpstreamAway { upstream: 0, only_answers: false },
        1 => Fault::UpstreamAway { upstream: 0, only_answers: true },
        _ => Fault::UpstreamFails { upstream: 0, with: rng.pick(&["429", "503", "529"]) },
    };
    let from = rng.between(6, 10) * SECOND;
    plan.faults.push(Scheduled { at: from, until: from + rng.between(2, 8) * SECOND, fault });
    plan
}
