//! What `cargo test` runs of the simulation: determinism, a few dozen seeds, some canaries.

use crate::canary::Canary;
use crate::catalogue::scenarios;
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
fn whole_pods_keep_every_promise_in_the_same_storms() {
    let swarm = scenario("pods-swarm").expect("it exists");
    in_parallel(
        4,
        |number| run_seed(swarm, 1 + number as u64, number < 1, None),
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
fn pods_of_two_releases_keep_every_promise_and_planted_bugs_between_them_are_caught() {
    let upgrade = scenario("pods-upgrade").expect("it exists");
    let bugs = [Canary::NewestToAll, Canary::VersionNotSaid, Canary::NewestNotSaid];
    in_parallel(
        2 + bugs.len(),
        |number| match number.checked_sub(2) {
            None => run_seed(upgrade, 1 + number as u64, false, None),
            Some(bug) => run_seed(upgrade, 1, false, Some(bugs[bug])),
        },
        |number, result| {
            let outcome = result.unwrap_or_else(|violation| panic!("{number}: {violation:?}"));
            assert_eq!(outcome.violation.is_some(), number >= 2, "{number}: {:?}", outcome.violation);
        },
    );
}

#[test]
fn proxies_of_whole_pods_keep_every_promise_over_tcp() {
    let names = ["pods-http", "pods-http-cut", "pods-http-drain", "pods-http-upstream"];
    in_parallel(
        names.len(),
        |number| run_seed(scenario(names[number]).expect("it exists"), 1, number == 0, None),
        |number, result| {
            let outcome = result.unwrap_or_else(|violation| panic!("{}: {violation:?}", names[number]));
            assert_eq!(outcome.violation, None, "{}", names[number]);
            assert!(outcome.figures.admitted > 50, "{}: {:?}", names[number], outcome.figures);
        },
    );
}

#[test]
fn planted_bugs_around_the_proxies_are_caught() {
    for canary in [Canary::UsageForgotten, Canary::SentAgain] {
        let (.., name) = Canary::ALL.iter().find(|(listed, ..)| *listed == canary).expect("it is listed");
        let scenario = scenario(name).expect("it exists");
        let caught = (1..6).any(|seed| match run_seed(scenario, seed, false, Some(canary)) {
            Ok(outcome) => outcome.violation.is_some(),
            Err(_) => true,
        });
        assert!(caught, "{canary:?}");
    }
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
fn every_kind_and_mode_keeps_its_promise_while_limits_change() {
    let names = ["sliding", "bucket", "several-windows", "kinds-upstream", "elastic", "sum", "sum-auto", "sum-alone"];
    for name in names.into_iter().chain(["limit-change", "limit-halved", "limit-unknown"]) {
        let scenario = scenario(name).expect("it exists");
        for seed in 1..4 {
            let outcome = run_seed(scenario, seed, false, None).expect("nothing panics");
            assert_eq!(outcome.violation, None, "{name} seed {seed}");
        }
    }
}

#[test]
fn about_half_of_the_swarm_is_strict_in_fixed_windows() {
    let swarm = scenario("swarm").expect("it exists");
    let plans = (1..=400).map(|seed| swarm.plan(seed));
    let usual = plans.filter(|plan| plan.is_plain() && plan.mode == quotum::Mode::Strict).count();
    assert!((170..=230).contains(&usual), "{usual} of 400");
}

#[test]
fn planted_bugs_of_kinds_and_modes_are_caught() {
    let canaries = [Canary::SlicesTooLarge, Canary::CarriedAndKept, Canary::MarginForgotten, Canary::OldLimitKept];
    for canary in canaries {
        let (.., name) = Canary::ALL.iter().find(|(listed, ..)| *listed == canary).expect("it is listed");
        let scenario = scenario(name).expect("it exists");
        let caught = (1..20).any(|seed| match run_seed(scenario, seed, false, Some(canary)) {
            Ok(outcome) => outcome.violation.is_some(),
            Err(_) => true,
        });
        assert!(caught, "{canary:?}");
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
    let mut names: Vec<&str> = scenarios().map(|scenario| scenario.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), scenarios().count());
    let mut canaries: Vec<&str> = Canary::ALL.iter().map(|(_, name, ..)| *name).collect();
    canaries.sort_unstable();
    canaries.dedup();
    assert_eq!(canaries.len(), Canary::ALL.len());
}
