//! Announce, then look: newcomers, cold starts, directories that lag or lie.

use std::time::Duration;

use quotum::Quota;
use quotum::ledger::{Directory, FirstWindow, OnSilence, ReplicaId, RosterSettings, Slot};

use crate::fleet::{Fleet, address};
use crate::{LIMIT, MINUTE, START, quota, settings};

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

/// Its gifts stand under the id it had: told again under another one, peers credit them twice.
#[test]
fn a_limiter_joins_once_and_gives_nothing_twice() {
    let mut fleet = Fleet::joined(Quota::tokens(900).per_minute(), START + 5_000, 3);
    assert!(fleet.pods.iter().all(|pod| pod.try_take(1)));
    fleet.run(3);
    fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.leave(now));
    fleet.run(5);
    let limiter = fleet.pods[0].limiter.clone();
    limiter.detach();
    let id = ReplicaId::new(limiter.now(), 99);
    let slot = Slot { node: "pod-0".into(), addr: address(0), exclusive: true };
    let again = limiter.attach(id, slot, RosterSettings::default(), Duration::from_millis(100));
    assert!(again.is_err_and(|error| error.to_string().contains("build another one")));
    fleet.run(10);
    assert_eq!(fleet.rights(START), 900);
    fleet.drain_all(1);
    assert_eq!(fleet.used(START), 900);
}
