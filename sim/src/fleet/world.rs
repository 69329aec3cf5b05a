//! One run: the state of the world and the loop over its events.
//!
//! Knows everything there is, for the files beside it. Must not know what a scenario is
//! meant to show. The invariant it keeps: after every event each replica's transmits,
//! wake-ups and deadlines have been taken, as the product's loop takes them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use quotum::ledger::ReplicaId;
use quotum::{Mode, Quota};

use super::directory::Registry;
use super::events::Boundary;
use super::measure::Measure;
use super::network::Links;
use super::pods::Pods;
use super::queue::{Event, Queue};
use super::replica::{EPOCH_MS, Replica};
use crate::Micros;
use crate::canary::Canary;
use crate::oracle::{Figures, Oracle, Violation};
use crate::rng::Rng;
use crate::scenario::{Layer, Plan};
use crate::trace::{Line, Trace};
use crate::workload::{Arrivals, zipf_weights};

/// How a run is looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RunOptions {
    /// Whether every event leaves a line.
    pub(crate) trace: bool,
    pub(crate) canary: Option<Canary>,
    /// Breaks determinism on purpose, to prove that the check sees it.
    pub(crate) entropy: Option<u64>,
}

/// What a run has shown.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) hash: u64,
    pub(crate) violation: Option<Violation>,
    pub(crate) figures: Figures,
    pub(crate) reached: BTreeSet<&'static str>,
    /// Admitted against the undivided counter and against a counter per component.
    pub(crate) efficiency: Option<f64>,
    pub(crate) efficiency_of_components: Option<f64>,
    /// How long those waited that were admitted and not at once.
    pub(crate) waits: Vec<Micros>,
    pub(crate) lines: Vec<Line>,
}

/// Carries out a plan.
pub(crate) fn run(plan: &Plan, options: RunOptions) -> Outcome {
    let mut world = World::new(plan.clone(), options);
    world.begin();
    if world.pods.is_some() {
        world.run_pods();
        return world.finish();
    }
    while let Some((at, event)) = world.queue.pop() {
        if at > world.plan.end || world.oracle.violation.is_some() {
            break;
        }
        world.at = at;
        world.step(event);
        if world.queue.len() > MOST_PENDING {
            world.oracle.violated(at, "messages do not multiply", || format!("over {MOST_PENDING} events are pending"));
        }
    }
    world.at = world.plan.end;
    world.finish()
}

/// Everything there is in one run.
#[derive(Debug)]
pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) options: RunOptions,
    pub(super) at: Micros,
    pub(super) queue: Queue,
    pub(super) trace: Trace,
    pub(super) oracle: Oracle,
    pub(super) reached: BTreeSet<&'static str>,
    /// Every incarnation that ever was; its place is its number.
    pub(super) replicas: Vec<Replica>,
    /// Which incarnation listens where.
    pub(super) by_addr: BTreeMap<SocketAddr, usize>,
    pub(super) by_id: BTreeMap<ReplicaId, usize>,
    /// The slots' addresses; a slot may be empty.
    pub(super) slots: Vec<SocketAddr>,
    /// Every set of limits that was ever rolled out; empty before the deployment is known.
    pub(super) versions: Vec<Vec<Quota>>,
    /// Which of them each slot has been told; a later slot starts with the latest.
    pub(super) told: BTreeMap<usize, usize>,
    pub(super) registry: Registry,
    pub(super) links: Links,
    /// Where the processes run, on the layer with whole pods.
    pub(super) pods: Option<Box<Pods>>,
    pub(super) boundary: Boundary,
    pub(super) arrivals: Arrivals,
    pub(super) measure: Option<Measure>,
    pub(super) waits: Vec<Micros>,
    pub(super) weights: Vec<f64>,
    pub(super) network_rng: Rng,
    pub(super) pods_rng: Rng,
    pub(super) next_permit: u64,
    /// Rights requests that reached their donor: donor, requester, number.
    pub(super) answered: BTreeSet<(usize, ReplicaId, u64)>,
    /// Which replica has learnt whose death.
    pub(super) deaths: BTreeSet<(usize, ReplicaId)>,
    /// Who has joined, where only their own word tells.
    pub(super) joined: BTreeSet<usize>,
    /// When somebody last started, joined, died or was proven dead.
    pub(super) last_change: Micros,
    /// When somebody was last told other limits.
    pub(super) last_told: Option<Micros>,
}

impl World {
    fn new(plan: Plan, options: RunOptions) -> Self {
        let check_upstream = plan.clock_range_ms == 0 && plan.drift_ppm == 0;
        let slots = (0..plan.slots + plan.ghosts).map(super::directory::address).collect();
        let mut network_rng = Rng::stream(plan.seed, "network");
        if let Some(entropy) = options.entropy {
            network_rng = Rng::stream(plan.seed ^ entropy, "network");
        }
        Self {
            at: 0,
            queue: Queue::default(),
            trace: Trace::new(options.trace),
            oracle: Oracle::new(&plan, check_upstream),
            reached: BTreeSet::new(),
            replicas: Vec::new(),
            by_addr: BTreeMap::new(),
            by_id: BTreeMap::new(),
            slots,
            versions: vec![if plan.unknown { Vec::new() } else { plan.quotas.clone() }],
            told: BTreeMap::new(),
            registry: Registry::default(),
            links: Links::default(),
            pods: (plan.layer == Layer::Turmoil).then(|| Box::new(Pods::new(&plan, options.canary))),
            boundary: Boundary::new(options.canary),
            arrivals: Arrivals::new(plan.workload.clone(), plan.seed),
            waits: Vec::new(),
            measure: plan.measure_from.map(|from| Measure::new(&plan, from)),
            weights: zipf_weights(plan.slots + 64),
            network_rng,
            pods_rng: Rng::stream(plan.seed, "pods"),
            next_permit: 0,
            answered: BTreeSet::new(),
            deaths: BTreeSet::new(),
            joined: BTreeSet::new(),
            last_change: 0,
            last_told: None,
            plan,
            options,
        }
    }

    fn begin(&mut self) {
        if self.plan.ghosts > 0 {
            self.reach("a listed replica never starts");
            for ghost in self.plan.slots..self.slots.len() {
                self.registry.register(self.slots[ghost], 0);
            }
        }
        for slot in 0..self.plan.slots {
            let at = self.pods_rng.below(self.plan.start_spread.max(1));
            self.queue.push(at, Event::Start { slot });
        }
        for fault in 0..self.plan.faults.len() {
            let (at, until) = (self.plan.faults[fault].at, self.plan.faults[fault].until);
            self.queue.push(at, Event::Begin { fault });
            self.queue.push(until, Event::Finish { fault });
        }
        if self.plan.finale {
            self.queue.push(self.plan.end - FINALE, Event::Finale);
        }
        let first = self.arrivals.next(1.0);
        self.queue.push(first.at, Event::Arrival(Box::new(first)));
        self.queue.push(self.check_every(), Event::Check);
    }

    pub(super) fn step(&mut self, event: Event) {
        match event {
            Event::Start { slot } => self.start(slot),
            Event::Tick { replica } => self.tick(replica),
            Event::Timeout { replica, at_ms } => self.timeout(replica, at_ms),
            Event::Lookup { replica } => self.lookup(replica),
            Event::Datagram(datagram) => self.deliver(*datagram),
            Event::Arrival(request) => self.arrive(*request),
            Event::Retry(request) => self.offer(*request),
            Event::End { replica, permit } => self.end(replica, permit),
            Event::GoAway { replica, ticket } => self.go_away(replica, ticket),
            Event::Begin { fault } => self.begin_fault(fault),
            Event::Finish { fault } => self.finish_fault(fault),
            Event::Roll { slots, pause, same_slot } => self.roll_on(slots, pause, same_slot),
            Event::Reconfigure { slot, version } => self.reconfigure(slot, version),
            Event::Delist { addr } => self.delist(addr),
            Event::Finale => self.finale(),
            Event::Check => {
                self.check();
                self.queue.push(self.at + self.check_every(), Event::Check);
            }
        }
    }

    fn finish(mut self) -> Outcome {
        if self.oracle.violation.is_none() {
            self.check();
            self.check_end();
        }
        self.oracle.finish();
        if let Some(windows) = self.windows_of_upstreams() {
            self.oracle.figures.windows = windows;
        }
        if self.plan.mode != Mode::Strict && self.oracle.figures.overshoot_max > 0 {
            self.reach("over the limit, as the mode allows");
        }
        let (mut efficiency, mut efficiency_of_components) = (None, None);
        if let Some(measure) = self.measure.take() {
            for (window, mine, central) in measure.windows(&self.oracle) {
                self.line(None, || format!("window {window}: {mine} admitted, {central} by a central counter"));
            }
            (efficiency, efficiency_of_components) = measure.results(&self.oracle, &self.plan, self.at);
        }
        // What is left alive dies here, outside of the run: its permits' refunds count for
        // nobody.
        self.replicas.clear();
        Outcome {
            hash: self.trace.hash(),
            violation: self.oracle.violation,
            figures: self.oracle.figures,
            reached: self.reached,
            efficiency,
            efficiency_of_components,
            waits: self.waits,
            lines: self.trace.into_lines(),
        }
    }

    /// How often the oracle looks inside: more rarely where a gossip interval is seconds.
    fn check_every(&self) -> Micros {
        if self.plan.interval.as_millis() < 1_000 { CHECK_EVERY } else { self.plan.interval.as_micros() as Micros }
    }

    /// True time now, in milliseconds since the Unix epoch.
    pub(super) fn true_ms(&self) -> u64 {
        EPOCH_MS + (self.plan.phase + self.at) / 1_000
    }

    pub(super) fn in_calm(&self) -> bool {
        self.at >= self.plan.storm
    }

    pub(super) fn reach(&mut self, what: &'static str) {
        self.reached.insert(what);
    }

    pub(super) fn line(&mut self, replica: Option<usize>, text: impl FnOnce() -> String) {
        self.trace.line(self.at, replica, text);
    }
}

/// How long before the end one more replica dies, where a plan says so: long enough for
/// everybody to learn what it spent, its successor too.
const FINALE: Micros = 2_700_000;

/// A hundred replicas with half a second of everybody's datagrams under way stay below this.
const MOST_PENDING: usize = 100_000;

/// How often the oracle looks inside.
const CHECK_EVERY: Micros = 200_000;
