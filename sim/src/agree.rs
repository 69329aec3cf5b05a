//! One schedule on both layers: whole pods do what the ledgers alone do, within noise.
//!
//! Knows plans and outcomes. Must not know what a layer does. The invariant it keeps: both
//! layers are given the same plan: the same arrivals, faults and times.
//!
//! What differs is what one layer has and the other has not: a step is a millisecond, names
//! are looked up every 1 to 5 s and not every 0.1 to 1 s, chitchat carries rows too, and each
//! layer draws its own delays. So who is admitted differs, and how many hardly.

use std::fmt;

use crate::fleet::RunOptions;
use crate::oracle::Violation;
use crate::runner::{in_parallel, run_plan};
use crate::scenario::{Layer, Plan, Scenario};

/// How the layers compare over some seeds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Agreement {
    seeds: u64,
    /// Admitted by the event layer and by whole pods.
    admitted: (u64, u64),
    /// The largest difference of one seed, as a part of what the event layer admitted, and
    /// that seed; of seeds that admitted enough.
    worst: (f64, u64),
}

impl Agreement {
    /// Whether the two admitted the same number, within noise.
    pub(crate) fn holds(&self) -> bool {
        (self.ratio() - 1.0).abs() <= self.noise()
    }

    /// Restarts come a little later in whole pods, and a newcomer's first window with them;
    /// beyond that, two counts that are drawn differ by a few times their root.
    fn noise(&self) -> f64 {
        NOISE + 3.0 / (self.admitted.0.max(1) as f64).sqrt()
    }

    fn ratio(&self) -> f64 {
        self.admitted.1 as f64 / self.admitted.0.max(1) as f64
    }
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (events, pods) = self.admitted;
        let (worst, seed) = self.worst;
        let verdict = if self.holds() { "agree" } else { "DISAGREE" };
        write!(
            f,
            "{} seeds: events admit {events}, turmoil {pods}: {:.4}, {verdict} within {:.3}; worst seed {seed}: {worst:+.3}",
            self.seeds,
            self.ratio(),
            self.noise()
        )
    }
}

/// Plays the same plans on both layers.
pub(crate) fn compare(scenario: &Scenario, start_seed: u64, seeds: u64) -> Result<Agreement, Violation> {
    let work = |number: usize| -> Result<(u64, u64), Violation> {
        let plan = scenario.plan(start_seed + number as u64);
        let on = |layer| {
            let outcome = run_plan(&Plan { layer, ..plan.clone() }, RunOptions::default())?;
            match outcome.violation {
                Some(violation) => Err(violation),
                None => Ok(outcome.figures.admitted),
            }
        };
        Ok((on(Layer::Events)?, on(Layer::Turmoil)?))
    };
    let mut agreement = Agreement { seeds, ..Agreement::default() };
    let mut wrong = None;
    in_parallel(seeds as usize, work, |number, found| match found {
        Ok((events, pods)) => {
            agreement.admitted.0 += events;
            agreement.admitted.1 += pods;
            let apart = (pods as f64 - events as f64) / events.max(1) as f64;
            if events.max(pods) >= ENOUGH && apart.abs() >= agreement.worst.0.abs() {
                agreement.worst = (apart, start_seed + number as u64);
            }
        }
        Err(violation) => {
            let seed = start_seed + number as u64;
            let text = format!("seed {seed}: {}", violation.text);
            wrong.get_or_insert(Violation { text, ..violation });
        }
    });
    wrong.map_or(Ok(agreement), Err)
}

/// How far the sums over all seeds may be apart, as a part.
const NOISE: f64 = 0.08;

/// A seed that admitted fewer says nothing by itself.
const ENOUGH: u64 = 100;
