//! Plans for whole pods: the turmoil layer.
//!
//! Knows what only a real loop, chitchat, seals and fragments can get wrong. Must not know
//! how a pod is run. The invariant it keeps: a plan here can be carried out on the event
//! layer too, so that the two can be compared.

use quotum::ledger::Directory;

use super::{SECOND, base, size};
use crate::fault::Swarm;
use crate::rng::Rng;
use crate::scenario::{Layer, Plan, Requires, Scenario};
use crate::workload::Shape;

/// Every scenario of the layer.
pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "pods-healthy",
        about: "efficiency: 3 whole pods without faults: cluster loop, chitchat, sealed frames",
        most_seeds: 60,
        twice_every: 6,
        draw: healthy,
        requires: Requires { efficiency: 0.99, ..Requires::NOTHING },
    },
    Scenario {
        name: "pods-swarm",
        about: "every fault and workload of the swarm, played to whole pods",
        most_seeds: 400,
        twice_every: 6,
        draw: swarm,
        requires: Requires::NOTHING,
    },
];

/// What all plans here have: 30 simulated seconds and what production does anyway.
fn pods(mut plan: Plan) -> Plan {
    plan.layer = Layer::Turmoil;
    plan.sealed = true;
    // A list names ports, so pods on it bind theirs exclusively.
    plan.exclusive |= plan.settings.directory == Directory::Static;
    plan
}

fn healthy(seed: u64) -> Plan {
    let mut rng = Rng::stream(seed, "pods-healthy");
    let mut plan = base(seed, &mut rng, 3, 5);
    plan.workload.shape = rng.pick(&[Shape::Uniform, Shape::Zipf, Shape::Bursts]);
    let load = rng.pick(&[0.9, 1.5, 5.0]);
    size(&mut plan, 20.0, load);
    plan.workload.hold = (SECOND / 10, 2 * SECOND);
    plan.end = 30 * SECOND;
    plan.storm = plan.end;
    plan.measure_from = Some(8 * SECOND);
    pods(plan)
}

fn swarm(seed: u64) -> Plan {
    // A stream of its own: the same seed's swarm of the event layer is longer.
    let mut plan = pods(super::swarm(seed));
    let mut rng = Rng::stream(seed, "pods-swarm");
    plan.slots = plan.slots.min(5);
    plan.end = 30 * SECOND;
    plan.storm = 12 * SECOND;
    let swarm = Swarm {
        slots: plan.slots,
        storm: plan.storm,
        window: plan.window(),
        phase: plan.phase,
        new_slots: plan.is_named(),
    };
    plan.faults = swarm.draw(&mut rng);
    plan
}
