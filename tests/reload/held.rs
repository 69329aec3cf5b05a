//! Limits that some pods do not know yet, or no longer: their shares are passed on.

use std::time::Duration;

use quotum::{Quota, Unit};

use crate::fleet::{DEPLOYMENT, Fleet};
use crate::{LIMIT, MINUTE, START, fleet, knowing, minute, spend_alone};

#[test]
fn who_does_not_know_a_deployment_passes_its_share_on() {
    let mut fleet = knowing(1, minute(LIMIT));
    for window in 0..3 {
        fleet.run_until(START + window * MINUTE + 1_000);
        assert_eq!(spend_alone(&mut fleet, 0), LIMIT, "window {window}: the one that knows can spend it all");
        assert!(fleet.rights(START + window * MINUTE) <= LIMIT);
    }
    assert_eq!(fleet.pods[1].limiter.status().held, 1, "and it is shown");
    fleet.kill(0);
    fleet.run_until(START + 8 * MINUTE);
    assert_eq!(fleet.pods[1].limiter.status().held, 0, "nobody speaks of it any more");
    assert_eq!(fleet.pods[1].limiter.with_ledger(|ledger, _| ledger.keys_held()), 1);
}

#[test]
fn a_removed_deployment_is_passed_on_too() {
    let mut fleet = fleet(3);
    for pod in [1, 2] {
        fleet.deploy(pod, "another", minute(LIMIT));
    }
    for window in 0..2 {
        fleet.run_until(START + window * MINUTE + 1_000);
        assert_eq!(spend_alone(&mut fleet, 0), LIMIT, "window {window}");
    }
}

#[test]
fn who_knows_neither_version_holds_one_of_them() {
    let mut fleet = knowing(2, minute(LIMIT));
    fleet.reload(1, [minute(2 * LIMIT)]);
    for window in 1..4 {
        fleet.run_until(START + window * MINUTE + 1_000);
        for pod in [0, 1] {
            spend_alone(&mut fleet, pod);
        }
        let (used, rights) = (fleet.used(START + window * MINUTE), fleet.rights(START + window * MINUTE));
        assert!(used <= 2 * LIMIT && rights <= 2 * LIMIT, "{used} of {rights}");
        assert!(used == 2 * LIMIT / 3 * 2 + LIMIT / 3 || used == 2 * LIMIT / 3 + LIMIT / 3 * 2, "{used}");
    }
    fleet.reload(0, [minute(2 * LIMIT)]);
    fleet.run_until(START + 5 * MINUTE + 1_000);
    spend_alone(&mut fleet, 0);
    assert_eq!(fleet.used(START + 5 * MINUTE), 2 * LIMIT, "and follows them");
}

#[test]
fn windows_of_two_lengths_are_not_held_for_the_same_time() {
    let mut fleet = knowing(2, minute(LIMIT));
    fleet.reload(1, [Quota::tokens(LIMIT).per(Duration::from_secs(20))]);
    fleet.run_until(START + 21_000);
    fleet.pods[0].try_take(1);
    fleet.pods[1].try_take(1);
    fleet.run(5);
    let windows =
        |fleet: &Fleet| fleet.pods[2].limiter.with_ledger(|ledger, _| ledger.open_windows(DEPLOYMENT, Unit::Tokens));
    assert_eq!(windows(&fleet).len(), 1, "it holds its share of the minute");
    fleet.reload(0, [Quota::tokens(LIMIT).per(Duration::from_secs(20))]);
    fleet.run_until(START + MINUTE + 1_000);
    fleet.pods[1].try_take(1);
    fleet.run(5);
    assert_eq!(windows(&fleet).last().map(|window| window.3), Some(LIMIT / 3), "and then of the 20 s");
}

#[test]
fn who_learns_of_a_limit_it_held_switches_as_everybody_does() {
    let mut fleet = knowing(1, minute(LIMIT));
    fleet.pods[0].try_take(1);
    fleet.run(2);
    fleet.deploy(2, DEPLOYMENT, minute(2 * LIMIT));
    assert_eq!(fleet.pods[2].drain(1), LIMIT / 3, "this window is counted as it was held");
    fleet.deploy(1, DEPLOYMENT, minute(LIMIT));
    assert_eq!(fleet.pods[1].drain(1), LIMIT / 3, "the same version: nothing to wait for");
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.pods[2].drain(1), 2 * LIMIT / 3);
}
