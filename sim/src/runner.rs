//! Runs seeds: in parallel, twice, under a panic hook; and shrinks what fails.
//!
//! Knows scenarios and outcomes. Must not know what happens inside a run. The invariant it
//! keeps: results do not depend on how many threads there are or which is faster.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use crate::canary::Canary;
use crate::catalogue::scenarios;
use crate::entropy;
use crate::fleet::{Outcome, RunOptions, run};
use crate::oracle::Violation;
use crate::process;
use crate::scenario::{Layer, Plan, Scenario};

/// Returns the scenario with this name.
pub(crate) fn scenario(name: &str) -> Option<&'static Scenario> {
    scenarios().find(|scenario| scenario.name == name)
}

/// Carries out a plan; a panic anywhere is a violation.
pub(crate) fn run_plan(plan: &Plan, options: RunOptions) -> Result<Outcome, Violation> {
    match plan.layer {
        Layer::Events => run_here(plan, options),
        Layer::Turmoil => process::run(plan, options),
    }
}

/// The same in this process.
pub(crate) fn run_here(plan: &Plan, options: RunOptions) -> Result<Outcome, Violation> {
    install_hook();
    match plan.layer {
        Layer::Events => guarded(plan, options),
        // Hash maps and `rand` keep what a thread's entropy once was: a new one for each run.
        Layer::Turmoil => thread::scope(|scope| {
            let run = scope.spawn(|| {
                entropy::seed(plan.seed ^ options.entropy.unwrap_or(0));
                guarded(plan, options)
            });
            run.join().unwrap_or_else(|_| Err(panicked(String::new())))
        }),
    }
}

fn guarded(plan: &Plan, options: RunOptions) -> Result<Outcome, Violation> {
    PANIC.with_borrow_mut(Option::take);
    let outcome = catch_unwind(AssertUnwindSafe(|| run(plan, options)));
    // A task's panic is caught by its runtime; the hook has seen it all the same.
    match (outcome, PANIC.with_borrow_mut(Option::take)) {
        (Ok(outcome), None) => Ok(outcome),
        (_, panic) => Err(panicked(panic.unwrap_or_default())),
    }
}

/// What is said of a run that panicked.
pub(crate) fn panicked(text: String) -> Violation {
    Violation { at: 0, invariant: "nothing panics", text }
}

/// Carries out a seed, and again if `twice`: both runs must do the same.
pub(crate) fn run_seed(
    scenario: &Scenario,
    seed: u64,
    twice: bool,
    canary: Option<Canary>,
) -> Result<Outcome, Violation> {
    let plan = scenario.plan(seed);
    let options = RunOptions { canary, ..RunOptions::default() };
    let outcome = run_plan(&plan, options)?;
    if twice {
        let again = run_plan(&plan, options)?;
        if again.hash != outcome.hash {
            return Err(Violation {
                at: 0,
                invariant: "one seed, one run",
                text: format!("trace hash {:016x}, then {:016x}", outcome.hash, again.hash),
            });
        }
    }
    Ok(outcome)
}

/// Does `work` for every number in parallel and hands the results over in order.
pub(crate) fn in_parallel<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync, mut take: impl FnMut(usize, T)) {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let (tx, rx) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads {
            let (tx, next, work) = (tx.clone(), &next, &work);
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count || tx.send((number, work(number))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(tx);
        let mut early = std::collections::BTreeMap::new();
        let mut due = 0;
        for (number, result) in rx {
            early.insert(number, result);
            while let Some(result) = early.remove(&due) {
                take(due, result);
                due += 1;
            }
        }
    });
}

/// Returns the plan with as few faults as still violate the same invariant.
pub(crate) fn shrink(plan: &Plan, violation: &Violation, canary: Option<Canary>) -> Plan {
    let still_fails = |plan: &Plan| match run_plan(plan, RunOptions { canary, ..RunOptions::default() }) {
        Ok(outcome) => outcome.violation.is_some_and(|found| found.invariant == violation.invariant),
        Err(found) => found.invariant == violation.invariant,
    };
    let mut smallest = plan.clone();
    let mut size = smallest.faults.len();
    while size > 0 {
        let mut start = 0;
        while start < smallest.faults.len() {
            let mut smaller = smallest.clone();
            let end = (start + size).min(smaller.faults.len());
            smaller.faults.drain(start..end);
            if still_fails(&smaller) {
                smallest = smaller;
            } else {
                start = end;
            }
        }
        size /= 2;
    }
    smallest
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps the message of the last panic of each thread, for the report.
fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANIC.with_borrow_mut(|panic| *panic = Some(info.to_string()));
            if thread::current().name().is_some() {
                before(info); // A thread with a name is none of the workers.
            }
        }));
    });
}
