//! Window kinds across a fleet: what each promises, and what it still lets through.

mod fleet;

use std::cell::Cell;
use std::time::Duration;

use fleet::Fleet;
use fleet::storm::{Storm, step};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use quotum::ledger::{Directory, RosterSettings, WindowKind, Zone};
use quotum::{Claim, Denied, Margin, Mode, Portion, Quota, Unit};

const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
/// A midnight.
const START: u64 = 20_000 * DAY;

/// Everybody takes all it can, all the time. Returns what was taken in each tenth of a second.
fn hammer(fleet: &mut Fleet, for_ms: u64, step: u64) -> Vec<u64> {
    let mut taken = Vec::new();
    for _ in 0..for_ms / 100 {
        fleet.run(1);
        taken.push(fleet.drain_all(step));
    }
    taken
}

/// The most that was taken in any interval of so many tenths of a second.
fn most_in_any(taken: &[u64], tenths: usize) -> u64 {
    taken.windows(tenths).map(|interval| interval.iter().sum()).max().unwrap_or(0)
}

#[test]
fn a_sliding_window_holds_in_every_interval_and_uses_four_fifths() {
    let mut fleet = Fleet::joined(Quota::tokens(10_000).per_minute().sliding(), START + 1_000, 3);
    fleet.run_until(START + MINUTE);
    let taken = hammer(&mut fleet, 5 * MINUTE - 100, 1);
    assert!(most_in_any(&taken, 600) <= 10_000, "{}", most_in_any(&taken, 600));
    let sum: u64 = taken.iter().sum();
    assert_eq!(sum, 5 * 4 * 2_000, "each quarter of a minute lets a fifth through");
}

#[test]
fn a_fixed_window_of_the_same_limit_lets_twice_as_much_through_around_its_border() {
    let mut fleet = Fleet::joined(Quota::tokens(10_000).per_minute(), START + 1_000, 3);
    fleet.run_until(START + 2 * MINUTE - 200);
    let taken = hammer(&mut fleet, 10_000, 1);
    assert_eq!(most_in_any(&taken, 50), 20_000, "what a sliding window is for");
}

#[test]
fn a_request_larger_than_a_slice_of_a_sliding_window_is_never_admitted_and_told_so() {
    let fleet = Fleet::joined(Quota::tokens(10_000).per_minute().sliding(), START + 1_000, 1);
    match fleet.pods[0].handle.try_acquire(Claim::tokens(2_001)) {
        Err(Denied::TooLarge { standing, .. }) => assert_eq!(standing.limit, 2_000),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_bucket_refills_at_its_rate_and_holds_its_burst() {
    let quota = Quota::tokens(60_000).per_minute().bucket(60_000);
    let mut fleet = Fleet::joined(quota, START + 1_000, 3);
    let slice_ms = quota.lead().as_millis() as u64 * 4;
    // Idle long enough to be full: then everything comes at once.
    fleet.run_until(START + 2 * MINUTE);
    let first: u64 = fleet.drain_all(1);
    assert_eq!(first / 3, quota.largest_claim() / 3, "seven slices of rights were waiting, {slice_ms} ms each");
    assert!(first >= 50_000, "{first}");
    // From then on it is the rate that counts.
    let taken = hammer(&mut fleet, 4 * MINUTE, 1);
    let sum: u64 = taken.iter().sum();
    assert!((230_000..=240_000).contains(&sum), "{sum}");
    for tenths in [10, 100, 300, 600, 1_200] {
        let most = most_in_any(&taken, tenths);
        assert!(most <= 100 * tenths as u64 + 60_000, "{most} in {tenths} tenths of a second");
    }
}

#[test]
fn what_a_bucket_lost_to_idling_stays_lost() {
    let quota = Quota::tokens(60_000).per_minute().bucket(30_000);
    let mut fleet = Fleet::joined(quota, START + 1_000, 1);
    fleet.run_until(START + 20 * MINUTE);
    assert_eq!(fleet.drain_all(1), quota.largest_claim(), "twenty minutes of refill, one burst");
    assert_eq!(fleet.drain_all(1), 0);
}

#[test]
fn a_refund_comes_back_to_a_bucket_after_its_slice_ended_unless_it_has_expired() {
    let quota = Quota::tokens(60_000).per_minute().bucket(60_000);
    let mut fleet = Fleet::joined(quota, START + 1_000, 1);
    fleet.run_until(START + 2 * MINUTE);
    let handle = fleet.pods[0].handle.clone();
    let full = quota.largest_claim();
    let refill = full / quota.lifetime();
    let slice_ms = MINUTE * refill / 60_000;
    let permit = handle.try_acquire(Claim::tokens(full)).expect("the bucket is full");
    fleet.run_until(fleet.now_ms + slice_ms);
    let refilled = fleet.drain_all(1);
    assert_eq!(refilled, refill);
    permit.settle(0);
    fleet.run(1);
    // One slice has passed, so the oldest slice's rights had expired meanwhile.
    assert_eq!(fleet.drain_all(1), full - refill, "all but what would have expired comes back");
}

#[test]
fn what_a_slice_leaves_is_in_the_next_one_and_is_used_once() {
    let quota = Quota::tokens(60_000).per_minute().bucket(60_000);
    let mut fleet = Fleet::joined(quota, START + 1_000, 1);
    fleet.run_until(START + 2 * MINUTE);
    let refill = quota.largest_claim() / quota.lifetime();
    let slice_ms = MINUTE * refill / 60_000;
    let mut taken = 0;
    for slice in 0..20 {
        assert!(fleet.pods[0].try_take(refill / 2), "slice {slice}");
        taken += refill / 2;
        fleet.run_until(fleet.now_ms + slice_ms + 1);
    }
    assert_eq!(fleet.drain_all(1), quota.largest_claim(), "half of each refill was used, so the bucket is full");
    taken += quota.largest_claim();
    let windows = fleet.pods[0].limiter.with_ledger(|ledger, _| ledger.open_windows(fleet::DEPLOYMENT, Unit::Tokens));
    let open: u64 = windows.iter().map(|(_, reserved, refunded, _)| reserved - refunded).sum();
    let closed = taken - open;
    assert_eq!(closed % (refill / 2), 0, "{open} of {taken} in slices that are open");
    assert!(windows.len() >= 8, "{windows:?}");
}

#[test]
fn an_untouched_bucket_stands_as_it_will_when_touched() {
    let quota = Quota::tokens(100_000).per_minute().bucket(100_000);
    let clock = fleet::ManualClock::default();
    clock.set(START);
    let limiter = quotum::Limiter::builder().deployment("gpt", [quota]).clock(clock.clone()).build().expect("valid");
    let handle = limiter.handle("gpt").expect("configured");
    assert_eq!(handle.standings()[0].spendable, quota.largest_claim(), "alone it owns all that is alive");
    assert!(handle.try_acquire(Claim::tokens(quota.largest_claim())).is_ok());

    for (mode, pods) in [(Mode::Strict, 1), (Mode::Strict, 3), (Mode::Elastic { beta: Portion::percent(10) }, 3)] {
        let mut fleet = Fleet::joined_in(mode, quota, START + 1_000, pods);
        let mut seen = std::collections::BTreeSet::new();
        // Not yet full; full; what other slices left; all of it expired; half of that taken.
        for (idle_ms, part) in [(9_000, 0), (60_000, 3), (7_300, 2), (7_300, 4), (15_000, 1), (3_000, 2), (90_000, 1)] {
            // Nothing looks meanwhile, or a tick does.
            for tick in [false, true] {
                fleet.pass(idle_ms);
                fleet.run(usize::from(tick));
                for pod in &fleet.pods {
                    let (name, before) = (format!("{mode:?} {pods} {idle_ms} {tick}"), pod.handle.standings()[0]);
                    assert!(pod.try_take(1));
                    let after = pod.handle.standings()[0];
                    assert_eq!(before.spendable, after.spendable + 1, "{name}");
                    assert_eq!((before.used + 1).min(before.limit), after.used, "{name}");
                    seen.insert(before.spendable);
                    let taken = after.spendable.checked_div(part);
                    assert!(taken.is_none_or(|taken| pod.try_take(taken)));
                }
            }
        }
        assert!(seen.len() >= 8, "{seen:?}");
    }
}

#[test]
fn an_overrun_in_an_ended_slice_is_paid_by_the_running_one() {
    let quota = Quota::tokens(60_000).per_minute().bucket(60_000);
    let mut fleet = Fleet::joined(quota, START + 1_000, 1);
    fleet.run_until(START + 2 * MINUTE);
    let handle = fleet.pods[0].handle.clone();
    let mut permit = handle.try_acquire(Claim::tokens(1_000)).expect("the bucket is full");
    permit.start();
    fleet.drain_all(1);
    let slice_ms = MINUTE * (quota.largest_claim() / quota.lifetime()) / 60_000;
    fleet.run_until(fleet.now_ms + slice_ms);
    permit.settle(3_000);
    fleet.run(1);
    let refill = quota.largest_claim() / quota.lifetime();
    assert_eq!(fleet.drain_all(1), refill - 2_000);
    let status = fleet.pods[0].limiter.status();
    assert_eq!(status.limits[0].quotas[0].1.uncovered, 0);
}

/// Everybody takes one: an account is opened by its first touch.
fn touch(fleet: &Fleet) {
    assert!(fleet.pods.iter().filter(|pod| pod.alive).all(|pod| pod.try_take(1)));
}

#[test]
fn a_day_vests_so_that_a_crash_costs_little_of_it() {
    let quota = Quota::tokens(144_000).per_day(Zone::UTC);
    let mut fleet = Fleet::joined(quota, START + 1_000, 4);
    touch(&fleet);
    fleet.pass(DAY / 10);
    fleet.run(3);
    // At a tenth of the day a quarter has vested, and 15 of the 144 parts of the rest.
    let vested = 36_000 + 15 * 750;
    assert_eq!(fleet.rights(START), vested);
    fleet.kill(3);
    let lost = fleet.pods[3].rights(START);
    assert!(lost.abs_diff(vested / 4) <= 16, "lost: {lost}, a quarter of what had vested, not of the day");
    let dead = fleet.pods[3].id.to_string();
    for pod in 0..3 {
        let _ = fleet.pods[pod].limiter.forget(&dead);
    }
    fleet.pass(HOUR);
    fleet.run(3);
    // Six more instalments, each for the three that count now.
    assert_eq!(fleet.rights(START), vested + 6 * 750);
    fleet.pass(DAY - DAY / 10 - HOUR - MINUTE);
    fleet.run(3);
    assert_eq!(fleet.rights(START), 144_000);
    let spent = fleet.drain_all(1) + 4;
    assert_eq!(spent, 144_000 - (lost - 1), "all but the dead one's unspent rights");
}

#[test]
fn a_newcomer_in_the_middle_of_a_day_shares_what_vests_from_then_on() {
    let quota = Quota::tokens(144_000).per_day(Zone::UTC);
    let mut fleet = Fleet::joined(quota, START + 1_000, 2);
    touch(&fleet);
    fleet.pass(6 * HOUR);
    fleet.run(3);
    let newcomer = fleet.start(2, Directory::Static, RosterSettings::default());
    let list: Vec<_> = (0..3).map(fleet::address).collect();
    for pod in 0..3 {
        fleet.list(pod, &list);
    }
    fleet.run(3);
    assert_eq!(fleet.pods[newcomer].rights(START), 0, "what had vested is the others'");
    fleet.run_until(START + 6 * HOUR + 10 * MINUTE + 5_000);
    assert_eq!(fleet.pods[newcomer].rights(START), 750 / 3);
    assert!(fleet.pods[newcomer].limiter.status().has_share);
    assert_eq!(fleet.rights(START), 36_000 + 38 * 750);
}

#[test]
fn a_day_that_comes_at_once_is_there_at_midnight() {
    let mut fleet = Fleet::joined(Quota::requests(100).per_day(Zone::UTC).at_once(), START + 1_000, 3);
    assert_eq!((0..100).filter(|_| fleet.pods.iter().any(|pod| pod.try_take(1))).count(), 100);
    fleet.run(1);
    assert!(!fleet.pods[0].try_take(1));
}

#[test]
fn a_request_that_has_not_vested_is_told_when_it_will_have() {
    let fleet = Fleet::joined(Quota::tokens(144_000).per_day(Zone::UTC), START + 1_000, 1);
    match fleet.pods[0].handle.try_acquire(Claim::tokens(37_500)) {
        Err(denied @ Denied::Exhausted { retry_after, .. }) => {
            assert_eq!(retry_after.as_secs(), 598, "the second instalment brings it to 37,500");
            assert!(denied.to_string().contains("36750 have vested so far"), "{denied}");
        }
        other => panic!("{other:?}"),
    }
    fleet.pods[0].clock.set(START + DAY - 1_000);
    assert_eq!(fleet.pods[0].handle.standings()[0].vested, 144_000, "all of it");
}

#[test]
fn what_comes_at_once_or_without_rights_does_not_speak_of_vesting() {
    let day = Quota::tokens(144_000).per_day(Zone::UTC);
    let sum = Mode::Sum { margin: Margin::Fixed(Portion::percent(5)) };
    for (quota, mode) in [
        (day.at_once(), Mode::Strict),
        (day, sum),
        (Quota::tokens(144_000).per_minute(), Mode::Strict),
        (Quota::tokens(144_000).per_minute().sliding(), Mode::Strict),
        (Quota::tokens(144_000).per_minute().bucket(144_000), Mode::Strict),
    ] {
        let fleet = Fleet::joined_in(mode, quota, START + 1_000, 1);
        fleet.pods[0].drain(1_000);
        let denied = fleet.pods[0].handle.try_acquire(Claim::tokens(20_000)).expect_err("drained");
        assert_eq!(denied.standing().vested, denied.standing().limit, "{quota}");
        assert!(!denied.to_string().contains("vest"), "{denied}");
    }
}

#[test]
fn what_has_not_vested_is_kept_by_no_silent_peer() {
    let mut fleet = Fleet::joined(Quota::tokens(144_000).per_day(Zone::UTC), START + 1_000, 2);
    touch(&fleet);
    fleet.run(3);
    fleet.kill(1);
    fleet.run(100);
    // Of what has vested the silent one holds half; nobody holds what comes later.
    assert_eq!(fleet.pods[0].drain(1) + 2, 36_750 / 2 + 1);
    let refused = |tokens| fleet.pods[0].handle.try_acquire(Claim::tokens(tokens)).expect_err("drained");
    assert!(matches!(refused(1_000), Denied::Unreachable { .. }), "{:?}", refused(1_000));
    assert!(matches!(refused(19_000), Denied::Exhausted { .. }), "{:?}", refused(19_000));
}

#[test]
fn days_are_those_of_the_zone_and_as_long_as_the_clocks_make_them() {
    let zone = Zone::parse_posix("CET-1CEST,M3.5.0,M10.5.0/3").expect("valid");
    // 2026-03-29, a day of 23 hours in Berlin: from 23:00 to 22:00 UTC.
    let start = 1_774_738_800_000;
    let mut fleet = Fleet::joined(Quota::requests(10).per_day(zone).at_once(), start + 1_000, 2);
    let standing = fleet.pods[0].handle.standings()[0];
    assert_eq!(standing.window_start.unix_ms(), start);
    assert_eq!(standing.resets_in, Duration::from_millis(23 * HOUR) - Duration::from_millis(fleet.now_ms - start));
    let taken = (0..20).filter(|n| fleet.pods[n % 2].try_take(1)).count();
    assert_eq!(taken, 10);
    fleet.run_until(fleet.now_ms + 1_000);
    fleet.pass(23 * HOUR - 2_000);
    fleet.run(3);
    assert!(fleet.pods[0].try_take(1), "a new day");
}

#[test]
fn several_windows_of_one_deployment_hold_at_once_and_the_strictest_speaks() {
    let clock = fleet::ManualClock::default();
    clock.set(START + 1_000);
    let limiter = quotum::Limiter::builder()
        .deployment(
            "gpt",
            [
                Quota::tokens(1_000).per_minute(),
                Quota::tokens(1_500).per(Duration::from_secs(300)),
                Quota::requests(100).per_day(Zone::UTC).at_once(),
            ],
        )
        .clock(clock.clone())
        .build()
        .expect("valid");
    let handle = limiter.handle("gpt").expect("configured");
    let take = |tokens| handle.try_acquire(Claim::tokens(tokens)).map(|mut permit| permit.start());
    assert!(take(1_000).is_ok());
    assert_eq!(take(1).expect_err("the minute is spent").by(), Quota::tokens(1_000).per_minute());
    clock.set(START + MINUTE + 1_000);
    assert!(take(500).is_ok());
    assert_eq!(take(1).expect_err("five minutes are spent").by(), Quota::tokens(1_500).per(Duration::from_secs(300)));
    let left: Vec<u64> = handle.standings().iter().map(quotum::Standing::remaining).collect();
    assert!(left.contains(&500) && left.contains(&0) && left.contains(&98), "{left:?}");
}

/// What a bucket promises its upstream, checked as the upstream does: a token bucket that
/// refills continuously and must never run dry.
#[test]
fn the_kinds_keep_their_promise_in_storms() {
    let minute = Quota::tokens(100).per_minute();
    let cases = [
        (minute.of_kind(WindowKind::Sliding { parts: 3 }).expect("divides"), 1),
        (minute.bucket(100), 1),
        (minute.bucket(300), 1),
        (Quota::tokens(100).per_day(Zone::UTC), 600),
    ];
    for (quota, scale) in cases {
        let config = ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
        let (spent, kept) = (Cell::new(0), Cell::new(0));
        let outcome = runner.run(&prop::collection::vec(step(), 50..400), |steps| {
            let mut storm = Storm::new(quota, Mode::Strict, START, scale);
            for step in &steps {
                storm.apply(step);
                storm.check()?;
            }
            spent.set(spent.get() + u32::from(!storm.used.is_empty()));
            let slice = (quota.largest_claim() / quota.lifetime()) as i64;
            kept.set(kept.get() + u32::from(storm.used.values().any(|used| *used > slice)));
            Ok(())
        });
        if let Err(failure) = outcome {
            panic!("{quota}: {failure}");
        }
        assert!(spent.get() >= 40, "{quota}: only {} of 60 storms spent anything", spent.get());
        if quota.lifetime() > 1 {
            assert!(kept.get() >= 5, "{quota}: only {} of 60 storms spent what an earlier slice left", kept.get());
        }
    }
}
