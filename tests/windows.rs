//! Windows across a fleet: rolls, late rows, small limits, other versions of a limit.

mod fleet;

use fleet::Fleet;
use quotum::Quota;
use quotum::ledger::{Directory, Message, RosterSettings};

const MINUTE: u64 = 60_000;
const LIMIT: u64 = 9_000;
const START: u64 = 1_000 * MINUTE;

fn fleet(pods: usize) -> Fleet {
    Fleet::joined(Quota::tokens(LIMIT).per_minute(), START + 1_000, pods)
}

#[test]
fn a_roll_gives_every_replica_its_share_and_leaks_nothing() {
    let mut fleet = fleet(3);
    for window in 0..4 {
        fleet.run_until(START + window * MINUTE + 30_000);
        assert_eq!(fleet.drain_all(1), LIMIT, "window {window}");
        assert_eq!(fleet.used(START + window * MINUTE), LIMIT);
    }
}

#[test]
fn a_window_rolls_during_a_partition() {
    let mut fleet = fleet(3);
    fleet.drain_all(1);
    fleet.cut.extend([(0, 1), (1, 0), (0, 2), (2, 0)]);
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.drain_all(1), LIMIT, "each spends its own share, together no more than the limit");
    fleet.cut.clear();
    fleet.run(10);
    for pod in &fleet.pods {
        assert_eq!(pod.handle.standings()[0].used, LIMIT, "after healing everybody knows everything");
    }
}

#[test]
fn a_late_row_of_a_closed_window_changes_nothing() {
    let mut fleet = fleet(2);
    fleet.pods[0].drain(1);
    fleet.cut.insert((0, 1));
    fleet.run(1);
    let rows: Vec<_> =
        fleet.sent.iter().filter(|letter| matches!(letter.message, Some(Message::Row(_)))).cloned().collect();
    fleet.cut.clear();
    fleet.run_until(START + 4 * MINUTE);
    let before = fleet.pods[1].handle.standings()[0].used;
    for row in &rows {
        fleet.force(row);
    }
    assert_eq!(fleet.pods[1].handle.standings()[0].used, before);
    assert!(fleet.pods[1].limiter.status().ignored.closed_window > 0, "ignored, and counted");
}

#[test]
fn ten_requests_a_minute_on_thirty_replicas_are_ten() {
    let mut fleet = Fleet::joined(Quota::tokens(10).per_minute(), START + 1_000, 30);
    fleet.pods[0].try_take(1);
    fleet.run(3);
    let rest = fleet.drain_all(1);
    assert_eq!(fleet.used(START), 10, "the first ten by rank have one each: {rest}");
    fleet.run_until(START + MINUTE + 1_000);
    fleet.drain_all(1);
    assert_eq!(fleet.used(START + MINUTE), 10);
}

#[test]
fn an_open_window_is_never_forgotten_and_made_again() {
    let mut fleet = fleet(1);
    fleet.pods[0].drain(1);
    // Nobody touches it for the rest of the window, and for two more.
    for late in [10_000, 50_000, 59_000] {
        fleet.run_until(START + late);
        assert!(!fleet.pods[0].try_take(1), "at {late} ms");
    }
}

#[test]
fn the_last_rows_of_a_dead_replica_arrive_by_relay_after_its_death_was_proven() {
    let mut fleet = fleet(3);
    fleet.pods[0].try_take(1);
    fleet.run(2);
    // Pod 2 spends and gives while pod 1 does not hear it, then dies.
    fleet.cut.insert((2, 1));
    fleet.pods[2].drain(1);
    fleet.run(1);
    let spent = fleet.pods[2].used(START);
    fleet.kill(2);
    let dead = fleet.pods[2].id.to_string();
    fleet.pods[1].limiter.forget(&dead).expect("on its roster");
    fleet.run(20);
    assert_eq!(
        fleet.pods[1].handle.standings()[0].used,
        spent + 1,
        "a dead replica's spend counts until its window ends"
    );
    fleet.drain_all(1);
    assert!(fleet.used(START) <= LIMIT);
}

#[test]
fn a_peer_with_another_limit_spends_only_its_own_version() {
    let mut fleet = Fleet::new(Quota::tokens(LIMIT).per_minute(), START + 1_000);
    let list = [fleet::address(0), fleet::address(1)];
    let old = fleet.start(0, Directory::Static, RosterSettings::default());
    fleet.quota = Quota::tokens(2 * LIMIT).per_minute();
    let new = fleet.start(1, Directory::Static, RosterSettings::default());
    for pod in [old, new] {
        fleet.list(pod, &list);
    }
    fleet.run(5);
    let mut taken = 0;
    for _ in 0..5 {
        taken += fleet.drain_all(1);
        fleet.run(2);
    }
    // Each holds half of its own version: 4,500 and 9,000.
    assert_eq!(taken, LIMIT / 2 + LIMIT);
    assert!(taken <= 2 * LIMIT, "never more than the larger limit");
    let mismatches = &fleet.pods[old].limiter.status().limits[0].mismatches;
    assert_eq!(mismatches[0].theirs, Quota::tokens(2 * LIMIT).per_minute());
    assert_eq!(mismatches[0].peer, fleet.pods[new].id, "and is named");
}

#[test]
fn a_newcomer_without_a_share_serves_with_rights_from_its_peers() {
    let mut fleet = Fleet::new(Quota::tokens(LIMIT).per_minute(), START + 1_000);
    let old = fleet.start(0, Directory::Name, RosterSettings::default());
    fleet.list(old, &[fleet::address(0)]);
    fleet.run(1);
    fleet.pods[old].try_take(1);
    let new = fleet.start(1, Directory::Name, RosterSettings::default());
    fleet.list(new, &[fleet::address(0), fleet::address(1)]);
    fleet.run(3);
    let wakes = std::sync::Arc::default();
    let handle = fleet.pods[new].handle.clone();
    let mut waiting = handle.acquire(quotum::Claim::tokens(500));
    assert!(fleet::poll(&mut waiting, &wakes).is_pending());
    fleet.settle();
    assert!(matches!(fleet::poll(&mut waiting, &wakes), std::task::Poll::Ready(Ok(_))));
}

#[test]
fn of_a_window_that_nobody_has_touched_a_silent_peers_part_is_out_of_reach() {
    let mut fleet = fleet(3);
    let margins = |fleet: &Fleet| {
        let standing = fleet.pods[0].handle.standings()[0];
        (standing.spendable, standing.margin_reachable, standing.margin_unreachable)
    };
    fleet.run(3);
    assert_eq!(margins(&fleet), (LIMIT / 3, LIMIT / 3 * 2, 0));
    fleet.kill(2);
    fleet.run(30);
    assert_eq!(margins(&fleet), (LIMIT / 3, LIMIT / 3, LIMIT / 3));
}
