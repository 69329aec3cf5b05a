//! Parking: no lost wake-up, no barging, cancelled waiters, two parked donors.

mod fleet;

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use fleet::{Fleet, WakeCount, poll};
use quotum::ledger::Directory;
use quotum::{Claim, Denied, Policy, Quota};

const MINUTE: u64 = 60_000;
const LIMIT: u64 = 9_000;
const START: u64 = 1_000 * MINUTE;

/// Three joined pods whose windows are open and known to all.
fn warm() -> Fleet {
    let mut fleet = Fleet::joined(Quota::tokens(LIMIT).per_minute(), START + 1_000, 3);
    for pod in 0..3 {
        assert!(fleet.pods[pod].try_take(1));
    }
    fleet.run(3);
    fleet
}

fn tokens(amount: u64) -> Claim {
    Claim::tokens(amount)
}

#[test]
fn a_parked_request_is_served_by_rights_from_a_peer() {
    let mut fleet = warm();
    let wakes = Arc::new(WakeCount::default());
    let handle = fleet.pods[0].handle.clone();
    let mut waiting = handle.acquire(tokens(4_000));
    assert!(poll(&mut waiting, &wakes).is_pending(), "its own share is 3,000");
    fleet.settle();
    assert_eq!(wakes.count(), 1);
    let Poll::Ready(Ok(permit)) = poll(&mut waiting, &wakes) else { panic!("peers had 6,000") };
    permit.settle(4_000);
    assert_eq!(fleet.used(START), 4_003);
}

#[test]
fn a_refund_wakes_the_head_of_the_queue() {
    let fleet = warm();
    let handle = fleet.pods[0].handle.clone();
    let held = handle.try_acquire(tokens(2_900)).expect("its share is 3,000");
    let wakes = Arc::new(WakeCount::default());
    let mut waiting = handle.acquire(tokens(1_000));
    assert!(poll(&mut waiting, &wakes).is_pending());
    held.refund();
    assert_eq!(wakes.count(), 1, "no lost wake-up");
    assert!(matches!(poll(&mut waiting, &wakes), Poll::Ready(Ok(_))));
}

#[test]
fn newcomers_do_not_barge_past_a_parked_head() {
    let fleet = warm();
    let handle = fleet.pods[0].handle.clone();
    let wakes = Arc::new(WakeCount::default());
    let mut large = handle.acquire(tokens(4_000));
    assert!(poll(&mut large, &wakes).is_pending());
    assert!(handle.try_acquire(tokens(1)).is_err(), "it would fit, but somebody is waiting");
    let mut small = handle.acquire(tokens(1));
    assert!(poll(&mut small, &wakes).is_pending(), "it waits behind");
    drop(large);
    assert!(matches!(poll(&mut small, &wakes), Poll::Ready(Ok(_))), "the queue moved up");
    assert!(handle.try_acquire(tokens(1)).is_ok(), "nobody waits any more");
}

#[test]
fn requests_are_served_in_order() {
    let mut fleet = warm();
    let handle = fleet.pods[0].handle.clone();
    let wakes = Arc::new(WakeCount::default());
    let mut first = handle.acquire(tokens(4_000));
    let mut second = handle.acquire(tokens(4_000));
    assert!(poll(&mut first, &wakes).is_pending());
    assert!(poll(&mut second, &wakes).is_pending());
    fleet.settle();
    assert!(matches!(poll(&mut first, &wakes), Poll::Ready(Ok(_))));
    assert!(matches!(poll(&mut second, &wakes), Poll::Ready(Ok(_))));
    assert_eq!(handle.standings()[0].used, 3, "both permits were dropped unstarted, so they refunded themselves");
}

#[test]
fn a_waiter_that_was_given_and_never_took_passes_it_on() {
    let mut fleet = warm();
    let handle = fleet.pods[0].handle.clone();
    let wakes = Arc::new(WakeCount::default());
    let mut given = handle.acquire(tokens(8_000));
    assert!(poll(&mut given, &wakes).is_pending());
    let mut next = handle.acquire(tokens(8_500));
    assert!(poll(&mut next, &wakes).is_pending());
    fleet.settle();
    assert_eq!(wakes.count(), 1, "the head was served");
    assert!(poll(&mut next, &wakes).is_pending(), "8,500 are not left");
    drop(given);
    fleet.settle();
    assert!(matches!(poll(&mut next, &wakes), Poll::Ready(Ok(_))), "the dropped future passed its credit on");
}

#[test]
fn a_cancelled_waiter_holds_nothing() {
    let fleet = warm();
    let handle = fleet.pods[0].handle.clone();
    let wakes = Arc::new(WakeCount::default());
    let mut cancelled = handle.acquire(tokens(4_000));
    assert!(poll(&mut cancelled, &wakes).is_pending());
    drop(cancelled);
    assert_eq!(fleet.pods[0].limiter.status().limits[0].parked, 0);
    assert!(handle.try_acquire(tokens(2_999)).is_ok());
}

#[test]
fn a_parked_request_is_refused_when_its_time_is_up() {
    let mut fleet = warm();
    fleet.cut.extend([(0, 1), (0, 2), (1, 0), (2, 0)]);
    let handle = fleet.pods[0].handle.clone();
    let wakes = Arc::new(WakeCount::default());
    let mut waiting = handle.acquire(tokens(4_000));
    assert!(poll(&mut waiting, &wakes).is_pending());
    fleet.pass(20);
    let due = fleet.pods[0].limiter.with_ledger(|ledger, _| ledger.poll_timeout()).expect("somebody is parked");
    assert!(due.unix_ms() <= fleet.now_ms);
    fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.handle_timeout(now));
    assert_eq!(wakes.count(), 1);
    assert!(matches!(poll(&mut waiting, &wakes), Poll::Ready(Err(_))));
    assert!(handle.try_acquire(tokens(2_999)).is_ok(), "nobody waits any more");
}

#[test]
fn two_parked_donors_do_not_wait_for_one_another() {
    let mut fleet = warm();
    // Both hold 2,999 and want more than that: with the third pod's, one can be served.
    let wakes = Arc::new(WakeCount::default());
    let (one, two) = (fleet.pods[0].handle.clone(), fleet.pods[1].handle.clone());
    let mut first = one.acquire(tokens(6_500));
    assert!(poll(&mut first, &wakes).is_pending());
    fleet.pass(3);
    let mut second = two.acquire(tokens(6_500));
    assert!(poll(&mut second, &wakes).is_pending());
    for _ in 0..5 {
        fleet.settle();
        fleet.pass(3);
        for pod in &fleet.pods {
            pod.limiter.with_ledger(|ledger, now| ledger.handle_timeout(now));
        }
    }
    let served = |poll: Poll<Result<quotum::Permit<'_>, Denied>>| matches!(poll, Poll::Ready(Ok(_)));
    assert!(served(poll(&mut first, &wakes)), "the older waiter got what the younger one held");
    assert!(!served(poll(&mut second, &wakes)));
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let fleet = warm();
    for pod in 0..3 {
        fleet.pods[pod].drain(1);
    }
    let mut fleet = fleet;
    fleet.run(3);
    let wakes = Arc::new(WakeCount::default());
    let handle = fleet.pods[0].handle.clone();
    let mut hopeless = handle.acquire(tokens(100));
    let Poll::Ready(Err(Denied::Exhausted { standing, retry_after, .. })) = poll(&mut hopeless, &wakes) else {
        panic!("nobody has anything left")
    };
    assert_eq!(standing.used, LIMIT);
    assert!(retry_after >= standing.resets_in, "not before the next window");
    assert!(retry_after <= standing.resets_in + Duration::from_secs(6), "a tenth of the window at most");
}

#[test]
fn larger_than_the_limit_is_never() {
    let fleet = warm();
    let denied = fleet.pods[0].handle.try_acquire(tokens(LIMIT + 1)).expect_err("it can never fit");
    assert!(matches!(denied, Denied::TooLarge { requested, .. } if requested == LIMIT + 1));
    assert_eq!(denied.retry_after(), None);
}

#[test]
fn debt_is_covered_by_the_rights_of_peers() {
    let mut fleet = warm();
    let handle = fleet.pods[0].handle.clone();
    let mut permit = handle.try_acquire(tokens(2_999)).expect("its share");
    permit.start();
    permit.settle(5_000);
    assert_eq!(handle.standings()[0].debt, 2_001);
    fleet.settle();
    assert_eq!(handle.standings()[0].debt, 0);
    fleet.run(1);
    assert!(fleet.used(START) <= LIMIT);
    assert_eq!(fleet.rights(START), LIMIT);
}

#[test]
fn debt_with_nothing_left_anywhere_is_counted_as_uncovered() {
    let mut fleet = warm();
    let handle = fleet.pods[0].handle.clone();
    let mut permit = handle.try_acquire(tokens(2_999)).expect("its share");
    permit.start();
    for pod in 1..3 {
        fleet.pods[pod].drain(1);
    }
    permit.settle(2_999 + 70);
    fleet.run_until(START + 4 * MINUTE);
    let limits = fleet.pods[0].limiter.status().limits;
    assert_eq!(limits[0].quotas[0].1.uncovered, 70);
}

#[test]
fn a_replayed_rights_request_gives_nothing_again() {
    let mut fleet = warm();
    let wakes = Arc::new(WakeCount::default());
    let handle = fleet.pods[0].handle.clone();
    let mut waiting = handle.acquire(tokens(4_000));
    assert!(poll(&mut waiting, &wakes).is_pending());
    let letters = fleet.collect();
    for letter in &letters {
        fleet.deliver(letter);
    }
    fleet.settle();
    let before: Vec<u64> = (0..3).map(|pod| fleet.pods[pod].rights(START)).collect();
    for letter in &letters {
        fleet.deliver(letter);
    }
    fleet.settle();
    let after: Vec<u64> = (0..3).map(|pod| fleet.pods[pod].rights(START)).collect();
    assert_eq!(before, after);
}

#[test]
fn nothing_is_given_to_a_peer_that_does_not_hear_us() {
    let mut fleet = warm();
    // Pod 0 can still send, but hears nobody: rights for it would be lost.
    fleet.cut.extend([(1, 0), (2, 0)]);
    fleet.run(20);
    let wakes = Arc::new(WakeCount::default());
    let handle = fleet.pods[0].handle.clone();
    let before = fleet.pods[1].rights(START) + fleet.pods[2].rights(START);
    let mut waiting = handle.acquire(tokens(4_000));
    let _ = poll(&mut waiting, &wakes);
    fleet.settle();
    assert_eq!(fleet.pods[1].rights(START) + fleet.pods[2].rights(START), before);
}

#[test]
fn a_gift_that_is_lost_is_lost_and_never_doubled() {
    let mut fleet = warm();
    let wakes = Arc::new(WakeCount::default());
    let handle = fleet.pods[0].handle.clone();
    let mut waiting = handle.acquire(tokens(4_000));
    assert!(poll(&mut waiting, &wakes).is_pending());
    for letter in fleet.collect() {
        fleet.deliver(&letter);
    }
    // The answers are lost, and the donors crash.
    let _ = fleet.collect();
    fleet.kill(1);
    fleet.kill(2);
    fleet.run(10);
    assert!(poll(&mut waiting, &wakes).is_ready());
    fleet.pods[0].drain(1);
    assert!(fleet.used(START) <= LIMIT);
    assert!(fleet.rights(START) < LIMIT);
}

#[test]
fn a_parked_request_is_served_by_the_next_window() {
    let mut fleet = Fleet::joined(Quota::tokens(LIMIT).per_minute(), START + 1_000, 2);
    fleet.policy = Policy::default();
    fleet.pods[0].drain(1);
    fleet.pods[1].drain(10);
    fleet.run_until(START + MINUTE - 100);
    fleet.pods[1].limiter.with_ledger(|ledger, _| ledger.peers());
    let wakes = Arc::new(WakeCount::default());
    let handle = fleet.pods[0].handle.clone();
    fleet.pass(90);
    let mut waiting = handle.acquire(tokens(1));
    match poll(&mut waiting, &wakes) {
        Poll::Ready(Err(denied)) => {
            let again = denied.retry_after().expect("later, not never");
            assert!(again >= Duration::from_millis(10), "the window ends in 10 ms: {again:?}");
        }
        Poll::Ready(Ok(_)) => panic!("the window is spent"),
        Poll::Pending => {
            fleet.pass(12);
            fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.handle_timeout(now));
            assert!(matches!(poll(&mut waiting, &wakes), Poll::Ready(Ok(_))));
        }
    }
}

#[test]
fn a_limiter_that_no_cluster_ever_joined_owns_the_whole_limit() {
    let limiter = quotum::Limiter::builder()
        .deployment("gpt", [Quota::tokens(LIMIT).per_minute(), Quota::requests(1).per_minute()])
        .build()
        .expect("valid");
    let handle = limiter.handle("gpt").expect("configured above");
    let permit = handle.try_acquire(tokens(LIMIT)).expect("nobody else has any");
    assert!(limiter.status().ready);
    permit.refund();
}

#[test]
fn without_a_cluster_acquire_is_try_acquire() {
    let mut fleet = Fleet::new(Quota::tokens(LIMIT).per_minute(), START);
    let alone = fleet.start(0, Directory::Alone, quotum::ledger::RosterSettings::default());
    let wakes = Arc::new(WakeCount::default());
    let handle = fleet.pods[alone].handle.clone();
    let mut all = handle.acquire(tokens(LIMIT));
    let Poll::Ready(Ok(mut permit)) = poll(&mut all, &wakes) else { panic!("it owns the whole limit") };
    permit.start();
    let mut more = handle.acquire(tokens(1));
    assert!(matches!(poll(&mut more, &wakes), Poll::Ready(Err(_))), "there is nobody to wait for");
}

#[test]
fn a_clock_that_steps_back_prolongs_no_wait() {
    for parked_before in [false, true] {
        let mut fleet = warm();
        // Nobody answers any more.
        fleet.cut = [(0, 1), (0, 2)].into();
        let step = |fleet: &mut Fleet| {
            fleet.offsets.insert(0, -10_000);
            fleet.pass(1);
        };
        let wakes = Arc::<WakeCount>::default();
        let handle = fleet.pods[0].handle.clone();
        if !parked_before {
            step(&mut fleet);
        }
        let mut waiting = handle.acquire(tokens(4_000));
        assert!(poll(&mut waiting, &wakes).is_pending());
        if parked_before {
            step(&mut fleet);
        }
        fleet.pass(Policy::default().wait.as_millis() as u64);
        fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.handle_timeout(now));
        let refused = poll(&mut waiting, &wakes);
        assert!(matches!(refused, Poll::Ready(Err(_))), "parked before the step: {parked_before}: {refused:?}");
    }
}
