//! Clocks that are wrong: skewed, stepping, or from far in the future.

mod fleet;

use std::collections::BTreeMap;

use fleet::{Fleet, ManualClock};
use quotum::ledger::{Directory, FirstWindow, Message, RosterSettings, Row, Timestamp, WindowId};
use quotum::{Claim, Limiter, Quota};

const MINUTE: u64 = 60_000;
const LIMIT: u64 = 9_000;
const START: u64 = 1_000 * MINUTE;

fn quota() -> Quota {
    Quota::tokens(LIMIT).per_minute()
}

/// A fleet whose clocks are off by so many milliseconds each.
fn skewed(offsets: &[i64]) -> Fleet {
    let mut fleet = Fleet::new(quota(), START + 1_000);
    fleet.offsets = offsets.iter().copied().enumerate().collect::<BTreeMap<_, _>>();
    let list: Vec<_> = (0..offsets.len()).map(fleet::address).collect();
    for slot in 0..offsets.len() {
        let pod = fleet.start(slot, Directory::Static, RosterSettings::default());
        fleet.list(pod, &list);
    }
    fleet.run(5);
    fleet
}

#[test]
fn clocks_within_epsilon_hold_the_limit() {
    let mut fleet = skewed(&[0, 1_900, -1_900]);
    for window in 1..4 {
        fleet.run_until(START + window * MINUTE + 30_000);
        fleet.drain_all(1);
        assert_eq!(fleet.used(START + window * MINUTE), LIMIT);
    }
}

#[test]
fn a_replica_off_the_median_of_its_peers_takes_no_share_and_says_so() {
    let mut fleet = skewed(&[0, 0, 5_000]);
    fleet.run_until(START + MINUTE + 30_000);
    fleet.drain_all(1);
    let blocked = fleet.pods[2].limiter.status().blocked;
    assert!(blocked.iter().any(|blocked| blocked.why.contains("clock")), "{blocked:?}");
    assert_eq!(fleet.pods[2].used(START + MINUTE), 0);
    let skew = fleet.pods[0].limiter.status().peers.iter().filter_map(|peer| peer.skew_ms).max();
    assert!(skew.is_some_and(|skew| (4_900..5_100).contains(&skew)), "peers measure it: {skew:?}");
    // Its clock is set right.
    fleet.offsets.clear();
    fleet.run_until(START + 2 * MINUTE + 30_000);
    fleet.drain_all(1);
    assert_eq!(fleet.pods[2].used(START + 2 * MINUTE), LIMIT / 3);
}

#[test]
fn with_one_peer_nobody_knows_whose_clock_is_wrong() {
    let mut fleet = skewed(&[0, 5_000]);
    fleet.run_until(START + MINUTE + 30_000);
    fleet.drain_all(1);
    assert_eq!(fleet.used(START + MINUTE), LIMIT);
}

#[test]
fn rows_of_windows_far_ahead_are_ignored_and_counted() {
    let fleet = skewed(&[0, 0]);
    let row = Row {
        replica: fleet.pods[1].id,
        key: quotum::ledger::Key { limit: quotum::ledger::LimitId::of(fleet::DEPLOYMENT), quota: quota() },
        window: WindowId::starting(Timestamp::from_unix_ms(START + 5 * MINUTE)),
        version: 1,
        reserved: 100,
        refunded: 0,
        given: vec![(fleet.pods[0].id, 1_000)],
        spendable: 0,
        demand: 0,
        typical: 0,
    };
    let from = fleet.pods[1].id;
    fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.handle_message(from, Message::Row(row), now));
    assert_eq!(fleet.pods[0].limiter.status().ignored.future_window, 1);
}

#[test]
fn an_answer_from_far_in_the_future_is_ignored_counted_and_shown() {
    // A peer whose clock is an hour ahead has frozen windows of an hour from now; its
    // answer would keep the newcomer out until then.
    let mut fleet = Fleet::new(quota(), START + 1_000);
    fleet.offsets = BTreeMap::from([(0, 3_600_000)]);
    let fast = fleet.start(0, Directory::Name, RosterSettings::default());
    fleet.list(fast, &[fleet::address(0)]);
    fleet.run(2);
    fleet.pods[fast].try_take(1);
    let settings = RosterSettings { first_window: FirstWindow::Wait, ..RosterSettings::default() };
    let newcomer = fleet.start(1, Directory::Name, settings);
    fleet.list(newcomer, &[fleet::address(0), fleet::address(1)]);
    fleet.run(20);
    let status = fleet.pods[newcomer].limiter.status();
    assert_eq!(status.joined, None);
    assert!(status.ignored.future_answer > 0);
    assert!(status.blocked.iter().any(|blocked| blocked.why.contains("clock")), "{:?}", status.blocked);
}

#[test]
fn a_clock_that_steps_back_spends_nothing_more_of_the_window_before() {
    let mut fleet = skewed(&[0]);
    fleet.run_until(START + MINUTE - 1_000);
    fleet.pods[0].try_take(1);
    fleet.run_until(START + MINUTE + 10_000);
    let spent = fleet.pods[0].used(START);
    // Back into the window before, which still had room.
    fleet.offsets = BTreeMap::from([(0, -15_000)]);
    fleet.pass(100);
    fleet.pods[0].drain(1);
    assert_eq!(fleet.pods[0].used(START), spent);
    assert_eq!(fleet.pods[0].used(START + MINUTE), LIMIT, "what it takes now, it takes of the window that runs");
}

/// A process that serves alone, and one reading of its clock that was a day ahead.
#[test]
fn a_reading_far_ahead_closes_a_replica_which_says_so_and_when_that_ends() {
    let clock = ManualClock::default();
    clock.set(START);
    let limiter =
        Limiter::builder().deployment("gpt", [quota()]).clock(clock.clone()).build().expect("a valid configuration");
    let handle = limiter.handle("gpt").expect("configured");
    let day = 24 * 60 * MINUTE;
    clock.set(START + day);
    handle.try_acquire(Claim::tokens(1)).expect("fits").settle(1);
    clock.set(START);
    // To open an earlier window again could deal its share twice.
    let status = limiter.status();
    let blocked = status.blocked.iter().find(|blocked| blocked.why.contains("clock")).expect("it says so");
    assert!(blocked.why.contains("86400"), "{blocked:?}");
    assert!(blocked.resolve.contains("restart"), "{blocked:?}");
    assert_eq!(status.clock_behind.as_millis() as u64, day);
    assert!(status.stuck().is_some_and(|why| why.contains("86400 s")), "a restart is better");
    handle.try_acquire(Claim::tokens(LIMIT - 1)).expect("the rest of that window").settle(LIMIT - 1);
    let denied = handle.try_acquire(Claim::tokens(1)).expect_err("nothing is left of it");
    assert!(denied.retry_after().is_some_and(|after| after.as_millis() as u64 >= day), "{denied}");
    clock.set(START + day + MINUTE);
    assert!(handle.try_acquire(Claim::tokens(LIMIT)).is_ok(), "the clock has caught up");
    assert!(limiter.status().blocked.is_empty() && limiter.status().stuck().is_none());
}

#[test]
fn a_replica_whose_clock_was_ahead_does_not_take_its_peers_for_late() {
    let mut fleet = skewed(&[0, 0, 0]);
    fleet.offsets.insert(0, 60_000);
    fleet.pods[0].clock.set(fleet.now_ms + 60_000);
    fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.handle_timeout(now));
    fleet.offsets.clear();
    fleet.run(5);
    let skews: Vec<_> = fleet.pods[0].limiter.status().peers.iter().filter_map(|peer| peer.skew_ms).collect();
    assert!(skews.iter().all(|skew| skew.abs() < 1_000), "{skews:?}");
    let blocked = fleet.pods[0].limiter.status().blocked;
    assert!(blocked.iter().all(|blocked| !blocked.why.contains("median")), "its clock is right now: {blocked:?}");
}
