//! Plans in which one thing varies and all else stays: what it does to each way of counting.
//!
//! Knows what is varied and which ways of counting are compared. Must not know what comes of
//! it. The invariant it keeps: plans of one seed differ in the way of counting and in the
//! varied thing only, so that their clients ask for the same.

use quotum::{Margin, Mode, Portion};

use super::efficiency::measured;
use super::{SECOND, base, size};
use crate::Micros;
use crate::fault::{Fault, Scheduled};
use crate::rng::Rng;
use crate::scenario::{Network, Plan};

/// How the fleet counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Each replica for itself, as proxies without a common store do: `sum` that never hears
    /// anybody and keeps no margin.
    Isolated,
    Sum,
    Elastic,
    Strict,
}

impl Way {
    pub(crate) const ALL: [Self; 4] = [Self::Isolated, Self::Sum, Self::Elastic, Self::Strict];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Isolated => "isolated",
            Self::Sum => "sum, margin 5 %",
            Self::Elastic => "elastic, beta 5 %",
            Self::Strict => "strict",
        }
    }

    const fn mode(self) -> Mode {
        match self {
            Self::Isolated => Mode::Sum { margin: Margin::Fixed(Portion::percent(0)) },
            Self::Sum => Mode::Sum { margin: Margin::Fixed(Portion::percent(5)) },
            Self::Elastic => Mode::Elastic { beta: Portion::percent(5) },
            Self::Strict => Mode::Strict,
        }
    }
}

/// One thing that is varied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Study {
    pub(crate) name: &'static str,
    pub(crate) axis: &'static str,
    pub(crate) values: &'static [f64],
    /// Sets the varied thing.
    vary: fn(&mut Plan, f64, &mut Rng),
}

impl Study {
    /// Returns the plan of a seed.
    pub(crate) fn draw(&self, way: Way, value: f64, seed: u64) -> Plan {
        let mut rng = Rng::stream(seed, self.name);
        let mut plan = base(seed, &mut rng, SLOTS, WINDOW_S);
        size(&mut plan, 20.0, 3.0);
        let mut plan = measured(plan);
        plan.end = 130 * SECOND;
        plan.storm = plan.end;
        plan.mode = way.mode();
        (self.vary)(&mut plan, value, &mut rng);
        if way == Way::Isolated {
            let cut = |slot| Scheduled { at: 0, until: plan.end, fault: Fault::Flap { slot, period: 0 } };
            plan.faults = (0..SLOTS).map(cut).collect();
        }
        plan
    }
}

/// What the report shows.
pub(crate) const STUDIES: &[Study] = &[
    Study {
        name: "staleness",
        axis: "one-way delay, ms (a count is this old, and up to 100 ms more)",
        values: &[1.0, 50.0, 100.0, 200.0, 400.0, 700.0, 1_000.0],
        vary: |plan, milliseconds, _| {
            let delay = (milliseconds * 1e3) as Micros;
            plan.network = Network { delay: (delay, delay), tail: 0.0, loss: 0.0 };
        },
    },
    Study {
        name: "partition",
        axis: "every replica cut off from all others, windows of 20 s",
        values: &[0.0, 0.25, 0.5, 1.0, 1.5, 2.0],
        vary: |plan, windows, rng| {
            let at = 40 * SECOND + rng.below(20 * SECOND);
            let until = at + (windows * (WINDOW_S * SECOND) as f64) as Micros;
            let cut = |slot| Scheduled { at, until: until.max(at + 1), fault: Fault::Flap { slot, period: 0 } };
            if windows > 0.0 {
                plan.faults = (0..SLOTS).map(cut).collect();
            }
        },
    },
];

/// How many replicas the studies have: the isolated ones let at most this many limits through.
pub(crate) const SLOTS: usize = 5;
const WINDOW_S: u64 = 20;
