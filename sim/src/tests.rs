//! What `cargo test` runs of the simulation: determinism, a few dozen seeds, some canaries.

use crate::canary::Canary;
use crate::catalogue::SCENARIOS;
use crate::cli::check_determinism;
use crate::runner::{in_parallel, run_seed, scenario};

#[test]
fn one_seed_is_one_run_and_planted_entropy_is_seen() {
    check_determinism().expect("the same seed does the same");
}

#[test]
fn a_few_dozen_seeds_of_the_swarm_keep_every_promise() {
    let swarm = scenario("swarm").expect("it exists");
    in_parallel(
        24,
        |number| run_seed(swarm, 1 + number as u64, number < 4, None),
        |number, result| {
            let violation = match result {
                Ok(outcome) => outcome.violation,
                Err(violation) => Some(violation),
            };
            assert_eq!(violation, None, "seed {}", 1 + number);
        },
    );
}

#[test]
fn scenarios_that_break_a_condition_stay_within_its_bound() {
    for name in ["first-window-admit", "fair-share", "lying-directory", "false-death", "clocks", "edge"] {
        let scenario = scenario(name).expect("it exists");
        for seed in 1..3 {
            let outcome = run_seed(scenario, seed, false, None).expect("nothing panics");
            assert_eq!(outcome.violation, None, "{name} seed {seed}");
        }
    }
}

#[test]
fn planted_bugs_are_caught() {
    let swarm = scenario("swarm").expect("it exists");
    for canary in [Canary::GiftWithoutDebit, Canary::DoubleSettle, Canary::GiftToAnother, Canary::ChargeOffByOne] {
        let caught = (1..20).any(|seed| match run_seed(swarm, seed, false, Some(canary)) {
            Ok(outcome) => outcome.violation.is_some(),
            Err(_) => true,
        });
        assert!(caught, "{canary:?}");
    }
}

#[test]
fn names_are_unique() {
    let mut names: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), SCENARIOS.len());
    let mut canaries: Vec<&str> = Canary::ALL.iter().map(|(_, name, ..)| *name).collect();
    canaries.sort_unstable();
    canaries.dedup();
    assert_eq!(canaries.len(), Canary::ALL.len());
}
