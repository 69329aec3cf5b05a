//! Leaving in order: what is handed over, and from when on who left counts no more.

use quotum::Limiter;
use quotum::ledger::Directory;

use crate::fleet::{DEPLOYMENT, Fleet, address};
use crate::{LIMIT, MINUTE, START, quota, settings};

/// Nobody has used a deployment yet when one of its pods leaves: its share must not go with it.
#[test]
fn a_leaving_pod_hands_over_what_it_was_never_asked_for() {
    const IDLE: &str = "idle";
    let mut fleet = Fleet::joined(quota(), START + 30_000, 3);
    let policy = fleet.policy.clone();
    for pod in &mut fleet.pods {
        let both = [DEPLOYMENT, IDLE].into_iter();
        let both = both.fold(Limiter::builder(), |b, name| b.deployment_with(name, [quota()], policy.clone()));
        pod.limiter = pod.limiter.reconfigure(both).expect("a valid configuration");
    }
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.drain_all(10), LIMIT, "the other deployment freezes the roster of this minute");
    fleet.pods[2].limiter.with_ledger(|ledger, now| ledger.leave(now));
    fleet.run(10);
    fleet.kill(2);
    for pod in 0..2 {
        fleet.pods[pod].handle = fleet.pods[pod].limiter.handle(IDLE).expect("configured above");
    }
    assert_eq!(fleet.drain_all(10), LIMIT);
}

#[test]
fn a_pod_that_left_hands_its_rights_over_and_costs_nothing_afterwards() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 3);
    fleet.pods[0].try_take(1);
    fleet.run(2);
    fleet.pods[2].limiter.with_ledger(|ledger, now| ledger.leave(now));
    assert!(!fleet.pods[2].try_take(1), "it admits nothing more");
    fleet.settle();
    fleet.run(5);
    assert!(fleet.pods[2].limiter.with_ledger(|ledger, now| ledger.has_left(now)));
    fleet.kill(2);
    assert_eq!(fleet.pods[0].drain(1) + fleet.pods[1].drain(1), LIMIT - 1);
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.drain_all(1), LIMIT);
}

#[test]
fn leaving_twice_is_leaving_once() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 2);
    for _ in 0..2 {
        fleet.pods[1].limiter.with_ledger(|ledger, now| ledger.leave(now));
        fleet.run(3);
    }
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.pods[0].drain(1), LIMIT);
}

#[test]
fn two_leaving_members_each_confirming_another_joiner_h1() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 2);
    let name = |fleet: &mut Fleet, slot| fleet.start(slot, Directory::Name, settings());
    let third = name(&mut fleet, 2);
    let fourth = name(&mut fleet, 3);
    let list = [address(0), address(1), address(2), address(3)];
    fleet.list(third, &list);
    fleet.list(fourth, &list);
    // Each joiner hears one member only, and they hear one another last.
    fleet.cut.extend([(1, third), (third, 1), (0, fourth), (fourth, 0), (third, fourth), (fourth, third)]);
    fleet.run(5);
    for member in 0..2 {
        fleet.pods[member].limiter.with_ledger(|ledger, now| ledger.leave(now));
    }
    fleet.run(5);
    fleet.kill(0);
    fleet.kill(1);
    fleet.run_until(START + 40_000);
    assert!(fleet.pods[third].joined().is_some() && fleet.pods[fourth].joined().is_some(), "after patience");
    fleet.cut.clear();
    for window in 1..3 {
        fleet.run_until(START + window * MINUTE + 1_000);
        fleet.drain_all(1);
        assert!(fleet.used(START + window * MINUTE) <= LIMIT);
    }
}

#[test]
fn a_joiner_takes_no_part_of_a_window_that_a_leaving_pod_froze_without_it() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 1);
    // The next window is frozen before the joiner is heard of.
    fleet.pods[0].try_take(1);
    fleet.run_until(START + MINUTE - 1_000);
    let joiner = fleet.start(1, Directory::Name, settings());
    fleet.list(joiner, &[address(0), address(1)]);
    fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.leave(now));
    fleet.run(5);
    let next = START + MINUTE;
    fleet.run_until(next + 1_000);
    assert!(fleet.pods[joiner].joined().is_some_and(|first| first > next));
    assert!(fleet.rights(next) <= LIMIT);
    assert_eq!(fleet.pods[joiner].drain(1), LIMIT, "what the leaver froze, it handed over");
    fleet.run_until(START + 2 * MINUTE + 1_000);
    assert_eq!(fleet.pods[joiner].drain(1), LIMIT);
}

#[test]
fn gone_exactly_at_a_windows_start_h6() {
    // `gone` is the first start at which the dead has no share: at exactly that start the
    // survivor no longer counts it.
    let mut fleet = Fleet::joined(quota(), START + 1_000, 2);
    fleet.kill(1);
    // Proof at start - (2 s + 4 s) - 1 ms makes gone exactly the next start.
    let next = START + MINUTE;
    fleet.run_until(next - 6_100);
    fleet.pass(99);
    let dead = fleet.pods[1].id.to_string();
    fleet.pods[0].limiter.forget(&dead).expect("it is on the roster");
    fleet.run_until(next + 1_000);
    assert_eq!(fleet.pods[0].drain(1), LIMIT);
    let gone = fleet.pods[0].limiter.status().peers[0].gone.expect("forgotten").unix_ms();
    assert_eq!(gone, next);
}

#[test]
fn rolling_replacement_of_every_pod_starves_nobody() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    for pod in 0..3 {
        fleet.start(pod, Directory::Name, settings());
    }
    let listed = |fleet: &mut Fleet| {
        let addresses: Vec<_> = fleet.pods.iter().filter(|pod| pod.alive).map(|pod| pod.addr).collect();
        for pod in 0..fleet.pods.len() {
            if fleet.pods[pod].alive {
                fleet.list(pod, &addresses);
            }
        }
    };
    listed(&mut fleet);
    fleet.run(5);
    for old in 0..3 {
        fleet.start(10 + old, Directory::Name, settings());
        listed(&mut fleet);
        fleet.run(10);
        fleet.pods[old].limiter.with_ledger(|ledger, now| ledger.leave(now));
        fleet.run(10);
        fleet.kill(old);
        listed(&mut fleet);
        fleet.run(10);
    }
    fleet.drain_all(1);
    assert!(fleet.used(START) <= LIMIT);
    for window in 1..3 {
        fleet.run_until(START + window * MINUTE + 1_000);
        assert_eq!(fleet.drain_all(1), LIMIT);
    }
}
