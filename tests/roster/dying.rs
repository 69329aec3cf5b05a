//! Ends without a goodbye: restarts, crashes, and what proves a replica gone.

use std::time::Duration;

use quotum::ledger::{Directory, FirstWindow, Message, OnSilence, RosterSettings};

use crate::fleet::{Fleet, address};
use crate::{LIMIT, MINUTE, START, quota, settings};

#[test]
fn a_single_pod_killed_and_restarted_inside_a_window_takes_nothing_with_wait_h4() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    let settings = RosterSettings { first_window: FirstWindow::Wait, ..settings() };
    let first = fleet.start(0, Directory::Static, settings);
    fleet.list(first, &[address(0)]);
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.pods[first].drain(10), LIMIT);
    fleet.kill(first);
    let second = fleet.start(0, Directory::Static, settings);
    fleet.list(second, &[address(0)]);
    fleet.run_until(START + MINUTE + 50_000);
    assert_eq!(fleet.pods[second].drain(1), 0);
    assert_eq!(fleet.used(START + MINUTE), LIMIT);
    fleet.run_until(START + 2 * MINUTE + 1_000);
    assert_eq!(fleet.pods[second].drain(10), LIMIT);
}

#[test]
fn admit_may_spend_a_window_again_after_the_whole_fleet_restarted_and_no_more() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    let first = fleet.start(0, Directory::Static, settings());
    fleet.list(first, &[address(0)]);
    fleet.run(1);
    fleet.pods[first].drain(10);
    fleet.kill(first);
    let second = fleet.start(0, Directory::Static, settings());
    fleet.list(second, &[address(0)]);
    fleet.run(1);
    fleet.pods[second].drain(10);
    assert_eq!(fleet.used(START), 2 * LIMIT, "the stated bound: up to L again");
}

#[test]
fn a_restart_in_the_same_slot_proves_the_earlier_process_dead() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 3);
    fleet.pods[2].drain(10);
    fleet.run(2);
    fleet.kill(2);
    fleet.run(20);
    let again = fleet.start(2, Directory::Static, settings());
    fleet.list(again, &[address(0), address(1), address(2)]);
    fleet.run(10);
    fleet.run_until(START + MINUTE + 1_000);
    assert!(fleet.pods[again].joined().is_some(), "{:?}", fleet.pods[again].limiter.status().blocked);
    let next = START + MINUTE;
    assert_eq!(fleet.drain_all(1), LIMIT, "nothing is stranded");
    assert_eq!(fleet.used(next), LIMIT);
    assert!(fleet.used(START) <= LIMIT);
}

#[test]
fn a_clock_that_steps_back_between_two_processes_of_a_slot_condemns_nobody_alive() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    let list = [address(0), address(1), address(2)];
    fleet.offsets.insert(2, 1_900);
    for pod in 0..3 {
        let pod = fleet.start(pod, Directory::Static, settings());
        fleet.list(pod, &list);
    }
    fleet.run(3);
    fleet.kill(2);
    // Both clocks are within epsilon; the later process has the earlier id.
    fleet.offsets.insert(2, -1_900);
    let again = fleet.start(2, Directory::Static, settings());
    fleet.list(again, &list);
    fleet.run(10);
    assert!(fleet.pods[again].id < fleet.pods[2].id);
    // What the dead process said arrives once more, late.
    let late: Vec<_> = fleet.sent.iter().filter(|letter| letter.from == 2).cloned().collect();
    for letter in late {
        fleet.force(&letter);
    }
    let next = START + MINUTE;
    fleet.run_until(next + 3_000);
    assert!(fleet.pods[again].joined().is_some(), "{:?}", fleet.pods[again].limiter.status().blocked);
    assert_eq!(fleet.drain_all(1), LIMIT, "nothing is stranded");
    assert_eq!(fleet.used(next), LIMIT);
}

#[test]
fn a_crash_without_proof_costs_its_share_until_an_operator_forgets_it() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 3);
    fleet.kill(2);
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.drain_all(1), 2 * LIMIT / 3);
    let dead = fleet.pods[2].id.to_string();
    fleet.pods[0].limiter.forget(&dead).expect("it is on the roster");
    fleet.run_until(START + 2 * MINUTE + 1_000);
    assert_eq!(fleet.drain_all(1), LIMIT, "one pod was told and told the other");
}

#[test]
fn absence_from_the_headless_name_proves_a_pod_gone() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    for pod in 0..3 {
        fleet.start(pod, Directory::Name, settings());
    }
    for pod in 0..3 {
        fleet.list(pod, &[address(0), address(1), address(2)]);
    }
    fleet.run(5);
    fleet.kill(2);
    for _ in 0..310 {
        fleet.run(10);
        fleet.list(0, &[address(0), address(1)]);
        fleet.list(1, &[address(0), address(1)]);
    }
    let window = (fleet.now_ms / MINUTE + 1) * MINUTE;
    fleet.run_until(window + 1_000);
    assert_eq!(fleet.drain_all(1), LIMIT, "after absent_for, 5 min");
}

#[test]
fn a_fenced_replica_freezes_no_further_share() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    for pod in 0..2 {
        fleet.start(pod, Directory::Name, settings());
    }
    for pod in 0..2 {
        fleet.list(pod, &[address(0), address(1)]);
    }
    fleet.run(5);
    fleet.cut.extend([(0, 1), (1, 0)]);
    fleet.run_until(START + 4 * MINUTE + 1_000);
    assert_eq!(fleet.drain_all(1), 0, "neither the name nor a peer confirmed them for 2.5 min");
}

#[test]
fn old_ack_of_one_dead_member_and_the_others_gone_h2() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 2);
    let joiners: Vec<usize> = (2..4).map(|slot| fleet.start(slot, Directory::Name, settings())).collect();
    let list = [address(0), address(1), address(2), address(3)];
    for joiner in &joiners {
        fleet.list(*joiner, &list);
    }
    fleet.cut.extend([(1, 2), (2, 1), (0, 3), (3, 0), (2, 3), (3, 2)]);
    fleet.run(3);
    fleet.kill(0);
    fleet.kill(1);
    let (dead_of_third, dead_of_fourth) = (fleet.pods[1].id.to_string(), fleet.pods[0].id.to_string());
    fleet.pods[2].limiter.forget(&dead_of_third).expect("listed by the member it heard");
    fleet.pods[3].limiter.forget(&dead_of_fourth).expect("listed by the member it heard");
    fleet.run(20);
    assert_eq!(fleet.pods[2].joined(), None, "it still waits for the other joiner");
    // Nobody will ever answer at the dead members' addresses either.
    for (pod, dead) in [(2, 1), (3, 0)] {
        fleet.pods[pod].limiter.forget(&address(dead).to_string()).expect("listed, and never answered");
    }
    fleet.run(20);
    assert_eq!(fleet.pods[2].joined(), None, "it still waits for the other joiner");
    fleet.cut.clear();
    for window in 1..4 {
        fleet.run_until(START + window * MINUTE + 1_000);
        fleet.drain_all(1);
        assert!(fleet.used(START + window * MINUTE) <= LIMIT);
    }
    assert_eq!(fleet.used(START + 3 * MINUTE), LIMIT);
}

#[test]
fn to_forget_a_dead_process_says_nothing_about_who_is_listed_at_its_address() {
    // Found by the model check: d dies unjoined, k starts in its slot and joins alone; p lists
    // the address, hears d's old letter, and an operator forgets d, rightly. k is alive.
    let mut fleet = Fleet::new(quota(), START + 1_000);
    let wait = RosterSettings { first_window: FirstWindow::Wait, on_silence: OnSilence::Closed, ..settings() };
    let d = fleet.start(0, Directory::Name, wait);
    let announced = fleet.pods[d].limiter.with_ledger(|ledger, _| ledger.roster_message());
    fleet.kill(d);
    let k = fleet.start(0, Directory::Name, wait);
    fleet.list(k, &[address(0)]);
    fleet.run(2);
    let p = fleet.start(1, Directory::Name, wait);
    fleet.cut.extend([(k, p), (p, k)]);
    fleet.list(p, &[address(0), address(1)]);
    let (from, message) = (fleet.pods[d].id, Message::Roster(announced));
    fleet.pods[p].limiter.with_ledger(|ledger, now| ledger.handle_message(from, message, now));
    fleet.pods[p].limiter.forget(&from.to_string()).expect("it is on the roster, and dead");
    fleet.run(50);
    assert_eq!(fleet.pods[p].joined(), None, "nobody has answered at the listed address");
}

#[test]
fn admit_does_not_take_a_window_that_a_dead_member_had_frozen_j1() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 2);
    fleet.pods[0].drain(10);
    fleet.kill(0);
    let newcomer = fleet.start(2, Directory::Name, settings());
    fleet.list(newcomer, &[address(0), address(1), address(2)]);
    // The only replica that knew dies before it answers.
    fleet.kill(1);
    fleet.run_until(START + 50_000);
    assert_eq!(fleet.pods[newcomer].rights(START), 0);
    assert!(fleet.used(START) <= LIMIT);
}

#[test]
fn a_new_process_at_a_listed_address_does_not_speak_for_the_dead_one_j3() {
    let mut fleet = Fleet::new(quota(), START + 10_000);
    let old = fleet.start(0, Directory::Name, settings());
    fleet.list(old, &[address(0)]);
    fleet.run(2);
    fleet.pods[old].drain(10);
    let newcomer = fleet.start(1, Directory::Name, RosterSettings { first_window: FirstWindow::Wait, ..settings() });
    fleet.cut.extend([(old, newcomer), (newcomer, old)]);
    fleet.list(newcomer, &[address(0), address(1)]);
    fleet.run(5);
    fleet.kill(old);
    let fresh = fleet.start(0, Directory::Name, RosterSettings { first_window: FirstWindow::Wait, ..settings() });
    fleet.list(fresh, &[address(0), address(1)]);
    for window in 0..3 {
        fleet.run_until(START + window * MINUTE + 50_000);
        fleet.drain_all(1);
        assert!(fleet.used(START + window * MINUTE) <= LIMIT, "window {window}");
    }
    assert_eq!(fleet.used(START + 2 * MINUTE), LIMIT);
}

#[test]
fn all_members_dead_and_a_new_fleet_under_new_ids() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 3);
    fleet.drain_all(10);
    for pod in 0..3 {
        fleet.kill(pod);
    }
    let list = [address(0), address(1), address(2)];
    let settings = RosterSettings { first_window: FirstWindow::Wait, ..settings() };
    for slot in 0..3 {
        let pod = fleet.start(slot, Directory::Static, settings);
        fleet.list(pod, &list);
    }
    fleet.run_until(START + 50_000);
    assert_eq!(fleet.used(START), LIMIT);
    assert_eq!(fleet.drain_all(1), 0);
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.drain_all(1), LIMIT);
}

#[test]
fn a_crash_without_proof_then_a_rolling_replacement_recovers_by_absence() {
    let settings = RosterSettings { absent_for: Duration::from_secs(120), ..settings() };
    let mut fleet = Fleet::new(quota(), START + 1_000);
    for pod in 0..3 {
        fleet.start(pod, Directory::Name, settings);
    }
    for pod in 0..3 {
        fleet.list(pod, &[address(0), address(1), address(2)]);
    }
    fleet.run(5);
    fleet.kill(0);
    let fresh = fleet.start(10, Directory::Name, settings);
    for _ in 0..200 {
        fleet.run(10);
        for pod in [1, 2, fresh] {
            fleet.list(pod, &[address(1), address(2), address(10)]);
        }
    }
    let window = (fleet.now_ms / MINUTE + 1) * MINUTE;
    fleet.run_until(window + 1_000);
    assert_eq!(fleet.drain_all(1), LIMIT);
}
