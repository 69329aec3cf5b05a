//! Carries out the studies of the catalogue.
//!
//! Knows plans and outcomes. Must not know how they are shown. The invariant it keeps: every
//! point is the mean over the same seeds, and a broken promise is reported as in any sweep.

use crate::catalogue::studies::{Study, Way};
use crate::fleet::RunOptions;
use crate::oracle::Violation;
use crate::runner::{in_parallel, run_plan};

/// What came of one value under one way of counting.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Point {
    pub(super) value: f64,
    /// Over the limit in the worst window, as a part of it: the mean of the seeds, and the most.
    pub(super) over_mean: f64,
    pub(super) over_most: f64,
    /// Admitted, as a part of what a central counter admits: the mean of the seeds.
    pub(super) admitted: f64,
}

/// Returns the points of each way of counting.
pub(super) fn carry_out(study: &Study) -> Result<Vec<(Way, Vec<Point>)>, Violation> {
    let cells: Vec<(Way, f64)> =
        Way::ALL.into_iter().flat_map(|way| study.values.iter().map(move |value| (way, *value))).collect();
    let seeds = SEEDS as usize;
    let mut points = vec![Point::default(); cells.len()];
    let mut violation = None;
    let work = |number: usize| {
        let (way, value) = cells[number / seeds];
        run_plan(&study.draw(way, value, 1 + (number % seeds) as u64), RunOptions::default())
    };
    in_parallel(cells.len() * seeds, work, |number, outcome| {
        let point = &mut points[number / seeds];
        match outcome {
            Ok(outcome) => {
                let over = outcome.figures.over_limit_max.max(0.0);
                point.value = cells[number / seeds].1;
                point.over_mean += over / SEEDS as f64;
                point.over_most = point.over_most.max(over);
                point.admitted += outcome.efficiency.unwrap_or(0.0) / SEEDS as f64;
                violation = violation.take().or(outcome.violation);
            }
            Err(broken) => violation = violation.take().or(Some(broken)),
        }
    });
    if let Some(violation) = violation {
        return Err(violation);
    }
    let each = points.chunks(study.values.len());
    Ok(Way::ALL.into_iter().zip(each).map(|(way, points)| (way, points.to_vec())).collect())
}

/// How many seeds each point is the mean of.
pub(super) const SEEDS: u64 = 10;
