//! Who counts: the must-have roster scenarios of the design, by name.

mod fleet;

use std::time::Duration;

use fleet::{DEPLOYMENT, Fleet, address};
use quotum::ledger::{Directory, FirstWindow, Message, OnSilence, RosterSettings};
use quotum::{Limiter, Quota};

const MINUTE: u64 = 60_000;
const LIMIT: u64 = 9_000;
/// A nominal window start well after the epoch.
const START: u64 = 1_000 * MINUTE;

fn quota() -> Quota {
    Quota::tokens(LIMIT).per_minute()
}

fn settings() -> RosterSettings {
    RosterSettings::default()
}

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
fn three_cold_pods_join_at_once_and_share_the_running_window() {
    let mut fleet = Fleet::joined(quota(), START + 30_000, 3);
    assert_eq!(fleet.drain_all(10), LIMIT);
    assert_eq!(fleet.used(START), LIMIT);
}

#[test]
fn a_replica_alone_owns_the_whole_limit() {
    let mut fleet = Fleet::new(quota(), START);
    fleet.start(0, Directory::Alone, settings());
    assert_eq!(fleet.drain_all(10), LIMIT);
}

#[test]
fn a_newcomer_gets_nothing_of_the_running_window_and_its_share_of_the_next() {
    let mut fleet = Fleet::new(quota(), START + 10_000);
    for pod in 0..2 {
        fleet.start(pod, Directory::Name, settings());
    }
    for pod in 0..2 {
        fleet.list(pod, &[address(0), address(1)]);
    }
    fleet.run(3);
    fleet.pods[0].drain(10);
    let newcomer = fleet.start(2, Directory::Name, settings());
    for pod in 0..3 {
        fleet.list(pod, &[address(0), address(1), address(2)]);
    }
    fleet.run(10);
    assert_eq!(fleet.pods[newcomer].rights(START), 0, "H5: no part of a window without entitlement");
    assert!(fleet.pods[newcomer].joined().expect("everybody answered") > START);
    fleet.run_until(START + MINUTE);
    let next = START + MINUTE;
    for pod in &fleet.pods {
        pod.try_take(1);
    }
    for pod in &fleet.pods {
        assert_eq!(pod.rights(next), LIMIT / 3);
    }
}

/// The last of two newcomers has a floor (6 s after its start) beyond the next window's start, and
/// the first has not joined when it learns of it: it must not leave a part to it there.
#[test]
fn newcomers_at_once_leave_nothing_of_the_window_that_only_one_of_them_reaches() {
    let mut fleet = Fleet::new(quota(), START + 30_000);
    let all = [address(0), address(1), address(2)];
    let next = START + MINUTE;
    fleet.start(0, Directory::Name, settings());
    fleet.list(0, &all[..1]);
    fleet.pods[0].try_take(1);
    fleet.run_until(START + 53_000);
    fleet.start(1, Directory::Name, settings());
    fleet.list(1, &all[..2]);
    fleet.cut.extend([(0, 1), (1, 0)]);
    fleet.run_until(START + 55_000);
    fleet.start(2, Directory::Name, settings());
    fleet.list(2, &all);
    fleet.run(5);
    assert_eq!(fleet.pods[1].joined(), None, "the first newcomer waits for the holder's answer");
    fleet.cut.clear();
    fleet.run_until(next);
    let joined: Vec<u64> = fleet.pods.iter().map(|pod| pod.joined().expect("everybody answered")).collect();
    assert!(joined[1] <= next && next < joined[2], "{joined:?}: on either side of {next}");
    for pod in &fleet.pods {
        pod.try_take(1);
    }
    let rights: Vec<u64> = fleet.pods.iter().map(|pod| pod.rights(next)).collect();
    assert_eq!(rights, [LIMIT / 2, LIMIT / 2, 0]);
}

#[test]
fn a_directory_answer_without_my_own_address_does_not_count() {
    let mut fleet = Fleet::new(quota(), START);
    let pod = fleet.start(0, Directory::Name, settings());
    fleet.list(pod, &[address(1)]);
    fleet.run(400);
    assert_eq!(fleet.pods[pod].joined(), None);
    assert_eq!(fleet.pods[pod].drain(1), 0);
    fleet.list(pod, &[address(0)]);
    fleet.run(1);
    assert!(fleet.pods[pod].joined().is_some());
}

/// The address of a restarted process is listed before it starts. So an answer that contains it may
/// be too old to list a third one, which knows the earlier process only.
#[test]
fn a_stale_answer_at_an_address_used_before_is_not_the_last_look() {
    let wait = RosterSettings { first_window: FirstWindow::Wait, on_silence: OnSilence::Closed, ..settings() };
    let mut fleet = Fleet::new(quota(), START + 30_000);
    fleet.start(1, Directory::Name, wait);
    fleet.list(0, &[address(1)]);
    fleet.start(0, Directory::Name, wait);
    fleet.list(1, &[address(0), address(1)]);
    fleet.run(3);
    fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.leave(now));
    fleet.run(1);
    fleet.kill(0);
    fleet.start(1, Directory::Name, wait);
    // As it was before the second process registered.
    fleet.list(2, &[address(1)]);
    fleet.run(1);
    // From now on the two cannot hear one another.
    fleet.cut.extend([(1, 2), (2, 1)]);
    fleet.list(2, &[address(0), address(1)]);
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.drain_all(10), LIMIT);
    assert_eq!(fleet.pods[2].joined(), None, "it waits for the one that it was not told of at first");
    fleet.cut.clear();
    fleet.run_until(START + 2 * MINUTE + 1_000);
    assert_eq!(fleet.drain_all(10), LIMIT);
    assert!(fleet.pods[2].joined().is_some());
}

#[test]
fn three_pods_cold_started_with_answers_that_lag_never_go_over() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    for pod in 0..3 {
        fleet.start(pod, Directory::Name, settings());
    }
    // The answers are snapshots of one growing order: each pod sees itself and whoever
    // registered before it.
    fleet.list(0, &[address(0)]);
    fleet.run(1);
    fleet.list(1, &[address(0), address(1)]);
    fleet.run(1);
    fleet.list(2, &[address(0), address(1), address(2)]);
    for window in 0..3 {
        fleet.run_until(START + window * MINUTE + 30_000);
        fleet.drain_all(10);
        assert!(fleet.used(START + window * MINUTE) <= LIMIT);
    }
    assert_eq!(fleet.used(START + 2 * MINUTE), LIMIT);
}

#[test]
fn silence_is_no_answer_at_cold_start_h3() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    for pod in 0..2 {
        let pod = fleet.start(pod, Directory::Static, settings());
        fleet.list(pod, &[address(0), address(1)]);
    }
    fleet.cut.extend([(0, 1), (1, 0)]);
    fleet.run(100);
    assert_eq!(fleet.drain_all(1), 0, "each waits for the other");
    assert!(!fleet.pods[0].limiter.status().blocked.is_empty(), "and says for whom");
    fleet.cut.clear();
    fleet.run(10);
    assert_eq!(fleet.drain_all(10), LIMIT);
}

#[test]
fn a_listed_pod_that_never_starts_costs_its_share_and_nobody_elses() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    let list = [address(0), address(1), address(2)];
    for pod in 0..2 {
        let pod = fleet.start(pod, Directory::Static, settings());
        fleet.list(pod, &list);
    }
    fleet.run_until(START + 25_000);
    assert_eq!(fleet.pods[0].joined(), None);
    fleet.run_until(START + 40_000);
    assert!(fleet.pods[0].joined().is_some(), "patience is 30 s");
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.drain_all(1), 2 * (LIMIT / 3));
    // The operator knows better.
    for pod in 0..2 {
        let address = address(2).to_string();
        fleet.pods[pod].limiter.forget(&address).expect("a listed address that never answered");
    }
    fleet.run_until(START + 2 * MINUTE + 1_000);
    assert_eq!(fleet.drain_all(1), LIMIT);
}

#[test]
fn closed_waits_for_ever_for_a_listed_pod() {
    let mut fleet = Fleet::new(quota(), START);
    let settings = RosterSettings { on_silence: OnSilence::Closed, ..settings() };
    let pod = fleet.start(0, Directory::Static, settings);
    fleet.list(pod, &[address(0), address(1)]);
    fleet.run_until(START + 10 * MINUTE);
    assert_eq!(fleet.pods[pod].joined(), None);
    let blocked = fleet.pods[pod].limiter.status().blocked;
    assert!(blocked[0].resolve.contains(&format!("quotum forget {}", address(1))));
}

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
fn two_joiners_do_not_confirm_one_another() {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    let member = fleet.start(0, Directory::Name, settings());
    fleet.list(member, &[address(0)]);
    fleet.run(2);
    fleet.pods[member].drain(10);
    let list = [address(0), address(1), address(2)];
    let joiners = [1, 2].map(|slot| fleet.start(slot, Directory::Name, settings()));
    for joiner in joiners {
        fleet.list(joiner, &list);
        fleet.cut.extend([(member, joiner), (joiner, member)]);
    }
    fleet.run(50);
    for joiner in joiners {
        assert_eq!(fleet.pods[joiner].joined(), None, "each has the other's answer, neither the member's");
        assert_eq!(fleet.pods[joiner].drain(1), 0);
    }
    fleet.cut.clear();
    fleet.run_until(START + MINUTE + 30_000);
    fleet.drain_all(1);
    assert_eq!(fleet.used(START), LIMIT);
    assert_eq!(fleet.used(START + MINUTE), LIMIT);
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
fn a_newcomer_that_gives_up_reads_its_floor_then_and_not_at_its_start_j2() {
    let mut fleet = Fleet::joined(quota(), START + 1_000, 2);
    let newcomer = fleet.start(2, Directory::Name, settings());
    fleet.list(newcomer, &[address(0), address(1), address(2)]);
    fleet.cut.extend([(0, 2), (2, 0), (1, 2), (2, 1)]);
    fleet.run_until(START + 31_500);
    let first = fleet.pods[newcomer].joined().expect("gave up");
    assert!(first > START + 31_000 + 6_000, "at least lead + 2 epsilon after giving up");
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
fn a_peer_that_the_static_list_lacks_is_shown_and_blocks_newcomers() {
    let mut fleet = Fleet::new(quota(), START);
    let stranger = fleet.start(5, Directory::Static, settings());
    fleet.list(stranger, &[address(0), address(5)]);
    let pod = fleet.start(0, Directory::Static, settings());
    fleet.list(pod, &[address(0)]);
    fleet.run(1);
    fleet.run(5);
    let shown = fleet.pods[pod].limiter.status().blocked;
    assert!(shown.iter().any(|blocked| blocked.who == address(5).to_string()), "{shown:?}");
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
