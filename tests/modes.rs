//! The modes that may exceed a limit: by how much, and when.

mod fleet;

use fleet::{Fleet, ManualClock, address};
use quotum::ledger::{Directory, Message, OnSilence, RosterSettings};
use quotum::{BuildError, Claim, Denied, Limiter, Margin, Mode, Policy, Portion, Quota};

const MINUTE: u64 = 60_000;
const START: u64 = 1_000 * MINUTE;
const LIMIT: u64 = 1_000;

fn quota() -> Quota {
    Quota::tokens(LIMIT).per_minute()
}

/// What one pod shows of its one quota: overshoot counted, uncovered, bound, expected.
fn shown(fleet: &Fleet, pod: usize) -> (u64, u64, u64, u64) {
    let (_, counts, over) = fleet.pods[pod].limiter.status().limits[0].quotas[0];
    let over = over.expect("a mode with a promise");
    (counts.overshoot, counts.uncovered, over.bound, over.expected)
}

fn cut_all(fleet: &mut Fleet) {
    let pods = fleet.pods.len();
    fleet.cut = (0..pods).flat_map(|from| (0..pods).map(move |to| (from, to))).collect();
}

mod elastic {
    use super::*;

    const MODE: Mode = Mode::Elastic { beta: Portion::percent(10) };

    #[test]
    fn a_partition_spends_the_allowance_of_every_share_and_no_more() {
        let mut fleet = Fleet::joined_in(MODE, quota(), START + 5_000, 4);
        cut_all(&mut fleet);
        assert_eq!(fleet.drain_all(1), 1_100, "beta x limit over");
        assert_eq!(fleet.rights(START), LIMIT, "the rights are those of strict");
    }

    #[test]
    fn an_allowance_is_repaid_from_rights_that_peers_hold() {
        let mut fleet = Fleet::joined_in(MODE, quota(), START + 5_000, 4);
        assert_eq!(fleet.pods[0].drain(1), 275);
        assert_eq!(fleet.pods[0].handle.standings()[0].debt, 25);
        assert_eq!(shown(&fleet, 0).3, 25, "not covered yet");
        fleet.run(2);
        let standing = fleet.pods[0].handle.standings()[0];
        assert_eq!(standing.debt, 0, "three peers hold 750");
        assert!(standing.spendable >= 25, "the allowance can be spent again: {standing:?}");
        // Whoever has it all in the end: beta x limit over, wherever the rights went.
        let mut taken = 275;
        for _ in 0..40 {
            taken += fleet.drain_all(1);
            fleet.run(1);
        }
        assert!((LIMIT..=1_100).contains(&taken), "{taken}");
        assert_eq!(fleet.used(START), taken);
        assert_eq!(fleet.rights(START), LIMIT);
    }

    #[test]
    fn who_has_no_share_has_no_allowance() {
        let mut fleet = Fleet::new(quota(), START + 5_000);
        fleet.policy.mode = MODE;
        let settings = RosterSettings { on_silence: OnSilence::Closed, ..RosterSettings::default() };
        let pod = fleet.start(0, Directory::Static, settings);
        fleet.list(pod, &[address(0), address(1)]);
        fleet.run(3);
        assert_eq!(fleet.pods[pod].joined(), None);
        assert_eq!(fleet.pods[pod].drain(1), 0);
        assert_eq!(fleet.pods[pod].handle.standings()[0].spendable, 0);
    }

    #[test]
    fn an_allowance_is_never_given_away_nor_handed_over() {
        let mut fleet = Fleet::joined_in(MODE, quota(), START + 5_000, 2);
        assert_eq!(fleet.pods[0].drain(1), 550);
        fleet.run(2);
        assert_eq!(fleet.pods[1].handle.standings()[0].spendable, 500, "50 of its 500 repaid the other's debt");
        fleet.pods[1].limiter.with_ledger(|ledger, now| ledger.leave(now));
        fleet.run(5);
        assert_eq!(fleet.pods[0].drain(1), 500, "its own allowance again, and the 450 that came");
        assert_eq!(fleet.used(START), 1_050);
        let left = fleet.pods[1].limiter.with_ledger(|ledger, now| ledger.has_left(now));
        assert!(left, "an allowance is nothing to wait for");
    }

    #[test]
    fn what_was_allowed_is_overshoot_and_what_was_not_is_uncovered() {
        let mut fleet = Fleet::joined_in(MODE, quota(), START + 5_000, 2);
        cut_all(&mut fleet);
        let handle = fleet.pods[0].handle.clone();
        let mut permit = handle.try_acquire(Claim::tokens(520)).expect("500 and 20 of 50");
        permit.start();
        assert_eq!(shown(&fleet, 0), (0, 0, 100, 20));
        permit.settle(580);
        assert_eq!(shown(&fleet, 0), (0, 0, 100, 80));
        assert_eq!(fleet.pods[0].handle.standings()[0].debt, 80);
        fleet.run_until(START + 4 * MINUTE);
        assert_eq!(shown(&fleet, 0), (50, 30, 100, 0));
        assert_eq!(shown(&fleet, 1).0, 0);
    }

    #[test]
    fn what_was_owned_alone_is_forfeited_with_its_allowance() {
        let clock = ManualClock::default();
        clock.set(START + 5_000);
        let policy = Policy { mode: MODE, ..Policy::default() };
        let limiter = Limiter::builder().deployment_with("a", [quota()], policy).clock(clock).build().expect("valid");
        let handle = limiter.handle("a").expect("configured");
        assert_eq!(handle.standings()[0].spendable, 1_100);
        for amount in [1_000, 30] {
            handle.try_acquire(Claim::tokens(amount)).expect("covered").settle(amount);
        }
        let id = quotum::ledger::ReplicaId::new(limiter.now(), 5);
        let slot = quotum::ledger::Slot { node: "pod".into(), addr: address(0), exclusive: true };
        let settings = RosterSettings { directory: Directory::Static, ..RosterSettings::default() };
        limiter.attach(id, slot, settings, std::time::Duration::from_millis(100)).expect("it joins once");
        let standing = handle.standings()[0];
        assert_eq!((standing.spendable, standing.used, standing.debt), (0, 1_030, 30));
    }
}

mod sum {
    use super::*;

    const TENTH: Mode = Mode::Sum { margin: Margin::Fixed(Portion::percent(10)) };
    const AUTO: Mode = Mode::Sum { margin: Margin::Auto };

    /// A wallet left of what all are known to use.
    fn spendable(fleet: &Fleet, pod: usize) -> u64 {
        fleet.pods[pod].handle.standings()[0].spendable
    }

    #[test]
    fn a_partition_reaches_the_bound_and_no_more() {
        let mut fleet = Fleet::joined_in(TENTH, quota(), START + 5_000, 4);
        cut_all(&mut fleet);
        assert_eq!(shown(&fleet, 0).2, 3 * 900 - 100);
        assert_eq!(fleet.drain_all(1), LIMIT + 3 * 900 - 100);
    }

    #[test]
    fn a_margin_is_held_back_of_every_slice_however_small_and_the_bound_says_so() {
        // Ten in any minute are two a slice: a fifth of that is not nothing. Of one a slice
        // nothing can be held back, or nothing would ever be let through.
        let fifth = Mode::Sum { margin: Margin::Fixed(Portion::percent(20)) };
        for (limit, bound) in [(10, 0), (5, 5)] {
            let mut fleet = Fleet::joined_in(fifth, Quota::tokens(limit).per_minute().sliding(), START + 14_000, 2);
            cut_all(&mut fleet);
            assert_eq!(shown(&fleet, 0).2, bound);
            let mut used = 0;
            for at_s in [14, 16, 31, 46, 61] {
                fleet.run_until(START + at_s * 1_000);
                used += fleet.drain_all(1);
            }
            assert_eq!(used, limit + bound, "in 47 seconds, of which five slices have a part");
        }
    }

    #[test]
    fn connected_replicas_admit_up_to_the_limit_less_the_margin() {
        let mut fleet = Fleet::joined_in(TENTH, quota(), START + 5_000, 4);
        let mut taken = 0;
        for _ in 0..30 {
            for pod in 0..4 {
                taken += u64::from(fleet.pods[pod].try_take(10)) * 10;
                fleet.run(1);
            }
        }
        assert_eq!(taken, 900);
        assert_eq!(fleet.used(START), 900);
        assert!(fleet.pods.iter().all(|pod| pod.handle.standings()[0].margin_unreachable == 100));
        assert_eq!(fleet.rights(START), 0);
    }

    #[test]
    fn it_admits_before_it_has_joined_and_asks_for_nothing() {
        let mut fleet = Fleet::new(quota(), START + 5_000);
        fleet.policy.mode = TENTH;
        let settings = RosterSettings { on_silence: OnSilence::Closed, ..RosterSettings::default() };
        let pod = fleet.start(0, Directory::Static, settings);
        fleet.list(pod, &[address(0), address(1)]);
        fleet.run(3);
        assert_eq!(fleet.pods[pod].joined(), None);
        assert_eq!(spendable(&fleet, pod), 900);
        assert_eq!(shown(&fleet, pod).2, 800, "somebody is listed and silent: it may admit 900, too");
        assert_eq!(fleet.pods[pod].drain(1), 900);
        let denied = fleet.pods[pod].handle.try_acquire(Claim::tokens(5)).expect_err("nothing is left");
        assert!(matches!(denied, Denied::Exhausted { .. }), "{denied}: the margin is for nobody to reach");
        fleet.run(3);
        assert!(!fleet.sent.iter().any(|letter| matches!(letter.message, Some(Message::Request(_)))));
    }

    #[test]
    fn a_request_over_the_limit_less_a_fixed_margin_is_refused_for_ever() {
        let fleet = Fleet::joined_in(TENTH, quota(), START + 5_000, 2);
        let denied = fleet.pods[0].handle.try_acquire(Claim::tokens(901)).expect_err("more than 900");
        assert!(matches!(denied, Denied::TooLarge { requested: 901, .. }), "{denied}");
        assert!(fleet.pods[0].try_take(900));
    }

    #[test]
    fn what_a_peer_gives_back_late_is_there_again() {
        let mut fleet = Fleet::joined_in(TENTH, quota(), START + 5_000, 2);
        let handle = fleet.pods[1].handle.clone();
        let permit = handle.try_acquire(Claim::tokens(600)).expect("900 are there");
        fleet.run(1);
        assert_eq!(spendable(&fleet, 0), 300);
        permit.refund();
        fleet.run(1);
        assert_eq!(spendable(&fleet, 0), 900);
    }

    #[test]
    fn a_peers_refund_serves_whoever_is_parked() {
        let mut fleet = Fleet::joined_in(TENTH, quota(), START + 5_000, 2);
        let permit = fleet.pods[1].handle.clone();
        let permit = permit.try_acquire(Claim::tokens(500)).expect("900 are there");
        fleet.run(1);
        let handle = fleet.pods[0].handle.clone();
        let (mut waiting, wakes) = (handle.acquire(Claim::tokens(600)), std::sync::Arc::default());
        assert!(fleet::poll(&mut waiting, &wakes).is_pending());
        permit.refund();
        fleet.pods[1].limiter.with_ledger(|ledger, now| ledger.handle_tick(now));
        fleet.settle();
        assert_eq!(wakes.count(), 1);
        assert!(matches!(fleet::poll(&mut waiting, &wakes), std::task::Poll::Ready(Ok(_))));
    }

    #[test]
    fn an_automatic_margin_follows_what_peers_may_have_used_unheard() {
        let mut fleet = Fleet::joined_in(AUTO, quota(), START + 5_000, 2);
        assert_eq!((spendable(&fleet, 0), shown(&fleet, 0).2), (LIMIT, LIMIT), "nothing measured, nothing held back");
        // Two hundred a second, for two seconds.
        for _ in 0..20 {
            assert!(fleet.pods[1].try_take(20));
            fleet.run(1);
        }
        let held_back = |fleet: &Fleet| LIMIT - fleet.pods[0].handle.standings()[0].used - spendable(fleet, 0);
        let connected = held_back(&fleet);
        assert!((40..=80).contains(&connected), "twice two ticks of 20: {connected}");
        cut_all(&mut fleet);
        fleet.run(10);
        let silent = held_back(&fleet);
        assert!((300..=480).contains(&silent), "twice a second of up to 200: {silent}");
        let (.., expected) = shown(&fleet, 0);
        assert_eq!(expected, 0, "the margin is twice what is expected");
        fleet.run(300);
        assert_eq!(held_back(&fleet), LIMIT / 2, "its even part, and no more");
        fleet.cut.clear();
        fleet.run(20);
        assert!(held_back(&fleet) <= 80, "it is heard again");
        // The next window begins with nothing unheard, however long the silence.
        cut_all(&mut fleet);
        fleet.run_until(START + MINUTE);
        assert!(held_back(&fleet) <= 40);
    }

    /// What a replica tells its peers it is offered, in tokens a second.
    fn demand(fleet: &Fleet) -> u64 {
        fleet.pods[1].limiter.with_ledger(|ledger, _| ledger.own_rows()[0].demand)
    }

    #[test]
    fn a_small_rate_is_measured_as_it_is() {
        // One token in so many ticks of a tenth of a second.
        for (every, per_second) in [(1, 10.0), (2, 5.0), (5, 2.0), (20, 0.5)] {
            let mut fleet = Fleet::joined_in(AUTO, quota(), START + 5_000, 2);
            let mut sum = 0;
            for tick in 0..400 {
                assert!(tick % every != 0 || fleet.pods[1].try_take(1));
                fleet.run(1);
                // It takes some seconds to be learned.
                sum += if tick < 100 { 0 } else { demand(&fleet) };
            }
            let mean = sum as f64 / 300.0;
            assert!((mean - per_second).abs() <= per_second / 20.0, "{mean} for {per_second}");
            fleet.run(100);
            assert_eq!(demand(&fleet), 0, "and forgotten");
        }
    }

    #[test]
    fn an_automatic_margin_knows_of_small_rates() {
        let mut fleet = Fleet::joined_in(AUTO, quota(), START + 5_000, 2);
        for _ in 0..50 {
            assert!(fleet.pods[1].try_take(1));
            fleet.run(1);
        }
        cut_all(&mut fleet);
        fleet.run(10);
        let held_back = LIMIT - fleet.pods[0].handle.standings()[0].used - spendable(&fleet, 0);
        assert!((18..=28).contains(&held_back), "twice a second of 10: {held_back}");
    }

    #[test]
    fn nobody_is_asked_for_rights_that_nobody_has() {
        let mut fleet = Fleet::joined_in(TENTH, quota(), START + 5_000, 2);
        assert_eq!(fleet.pods[0].drain(10), 900);
        let handle = fleet.pods[0].handle.clone();
        let (mut waiting, wakes) = (handle.acquire(Claim::tokens(5)), std::sync::Arc::default());
        let refused = fleet::poll(&mut waiting, &wakes);
        assert!(
            matches!(refused, std::task::Poll::Ready(Err(Denied::Exhausted { .. }))),
            "there is nothing to wait for"
        );
        fleet.run(3);
        assert!(!fleet.sent.iter().any(|letter| matches!(letter.message, Some(Message::Request(_)))));
    }

    #[test]
    fn what_can_never_fit_is_no_demand() {
        let mut fleet = Fleet::joined_in(AUTO, quota(), START + 5_000, 3);
        assert!(fleet.pods.iter().all(|pod| pod.try_take(1)));
        fleet.run(30);
        let giant = Claim::prompt_and_output(10, 128 * i32::MAX as u64);
        assert!(matches!(fleet.pods[0].handle.try_acquire(giant), Err(Denied::TooLarge { .. })));
        for _ in 0..30 {
            fleet.run(1);
            assert!(spendable(&fleet, 1) > LIMIT - 20, "{}", spendable(&fleet, 1));
        }
    }

    #[test]
    fn what_is_expected_over_a_fixed_margin_is_measured() {
        let mut fleet = Fleet::joined_in(Mode::Sum { margin: Margin::Fixed(Portion::ZERO) }, quota(), START + 5_000, 2);
        for _ in 0..20 {
            assert!(fleet.pods[1].try_take(20));
            fleet.run(1);
        }
        cut_all(&mut fleet);
        fleet.run(10);
        let expected = shown(&fleet, 0).3;
        assert!((150..=225).contains(&expected), "a second of up to 200: {expected}");
    }

    #[test]
    fn what_was_over_is_counted_in_parts_and_what_was_beyond_the_bound_apart() {
        let mut fleet = Fleet::joined_in(TENTH, quota(), START + 5_000, 2);
        cut_all(&mut fleet);
        let spend = |fleet: &Fleet, pod: usize, reserved, used| {
            let handle = fleet.pods[pod].handle.clone();
            let mut permit = handle.try_acquire(Claim::tokens(reserved)).expect("900 each");
            permit.start();
            permit.settle(used);
        };
        spend(&fleet, 0, 900, 900);
        spend(&fleet, 1, 900, 1_100);
        fleet.cut.clear();
        fleet.run_until(START + 4 * MINUTE);
        let (one, other) = (shown(&fleet, 0), shown(&fleet, 1));
        // 2,000 used of 1,000; the bound is 800.
        assert_eq!((one.0 + other.0, one.1 + other.1), (800, 200));
        assert_eq!((one.0, one.1), (360, 90), "nine twentieths");
    }

    #[test]
    fn an_incarnation_before_this_one_counts_for_the_bound() {
        let mut fleet = Fleet::joined_in(TENTH, quota(), START + 5_000, 3);
        fleet.kill(2);
        fleet.pass(1);
        let again = fleet.start(2, Directory::Static, RosterSettings::default());
        fleet.list(again, &[address(0), address(1), address(2)]);
        fleet.run(3);
        assert_eq!(shown(&fleet, 0).2, 3 * 900 - 100, "the dead one may have spent 900");
        fleet.run_until(START + 3 * MINUTE);
        assert_eq!(shown(&fleet, 0).2, 2 * 900 - 100);
    }

    #[test]
    fn a_strict_peer_gets_no_rights_and_asks_a_sum_in_vain() {
        let mut fleet = Fleet::joined_in(Mode::Strict, quota(), START + 5_000, 1);
        fleet.policy.mode = TENTH;
        let other = fleet.start(1, Directory::Name, RosterSettings::default());
        fleet.list(other, &[address(0), address(1)]);
        fleet.run(3);
        assert_eq!(fleet.pods[0].drain(1), LIMIT);
        fleet.run(1);
        assert_eq!(spendable(&fleet, other), 0, "it hears of all that is used");
        let strict = fleet.pods[0].handle.clone();
        let (mut waiting, wakes) = (strict.acquire(Claim::tokens(5)), std::sync::Arc::default());
        let _ = fleet::poll(&mut waiting, &wakes);
        fleet.settle();
        assert_eq!(fleet.pods[other].rights(START), 0);
        assert_eq!(fleet.used(START), LIMIT);
    }
}

/// A bucket's rights live on, and a sum has none.
#[test]
fn a_bucket_has_no_sum_and_a_sliding_window_and_a_day_have() {
    let build = |quota| {
        let policy = Policy { mode: Mode::Sum { margin: Margin::Auto }, ..Policy::default() };
        Limiter::builder().deployment_with("a", [quota], policy).build()
    };
    let refused = build(Quota::tokens(100_000).per_minute().bucket(100_000)).expect_err("a bucket");
    assert!(matches!(refused, BuildError::SumOfBucket { .. }), "{refused}");
    let day = Quota::tokens(100_000).per(std::time::Duration::from_secs(86_400));
    for quota in [day, Quota::tokens(100_000).per_minute().sliding()] {
        let limiter = build(quota).expect("valid");
        let handle = limiter.handle("a").expect("configured");
        assert_eq!(handle.standings()[0].spendable, quota.largest_claim());
        assert!(handle.try_acquire(Claim::tokens(quota.largest_claim())).is_ok());
    }
}

/// A mode that is configured while requests run: a window keeps the one it was opened in.
#[test]
fn an_open_window_keeps_its_mode_and_the_next_one_has_the_new() {
    let modes = [
        Mode::Strict,
        Mode::Elastic { beta: Portion::percent(10) },
        Mode::Sum { margin: Margin::Fixed(Portion::percent(10)) },
    ];
    for (old, new) in modes.iter().flat_map(|old| modes.iter().map(move |new| (*old, *new))) {
        let fleet = &mut Fleet::joined_in(old, quota(), START + 5_000, 2);
        cut_all(fleet);
        let bound = |mode: Mode| LIMIT + mode.overshoot_bound(quota(), 2).expect("a mode with a promise");
        assert!(fleet.pods.iter().all(|pod| pod.try_take(100)));
        for pod in &mut fleet.pods {
            let policy = Policy { mode: new, edge: std::time::Duration::ZERO, ..Policy::default() };
            let wanted = Limiter::builder().deployment_with(fleet::DEPLOYMENT, [quota()], policy);
            pod.limiter = pod.limiter.reconfigure(wanted).expect("valid");
            pod.handle = pod.limiter.handle(fleet::DEPLOYMENT).expect("configured");
        }
        fleet.run(1);
        assert_eq!(200 + fleet.drain_all(1), bound(old), "{old} to {new}");
        fleet.run_until(START + MINUTE);
        assert_eq!(fleet.drain_all(1), bound(new), "{old} to {new}");
        assert_eq!(fleet.used(START + MINUTE), bound(new));
    }
}

#[test]
fn deployments_that_share_a_limit_promise_one_thing() {
    let policy = |mode| Policy { mode, limit_id: Some("shared".into()), ..Policy::default() };
    let build = |one, other| {
        Limiter::builder()
            .deployment_with("a", [quota()], policy(one))
            .deployment_with("b", [quota()], policy(other))
            .build()
    };
    let elastic = Mode::Elastic { beta: Portion::percent(5) };
    assert!(build(elastic, elastic).is_ok());
    for other in [Mode::Strict, Mode::Observe, Mode::Elastic { beta: Portion::percent(6) }] {
        let clash = build(elastic, other).expect_err("two promises");
        assert!(matches!(clash, BuildError::SharedMode { .. }), "{clash}");
        assert!(clash.to_string().contains("elastic with beta 0.05"), "{clash}");
    }
}
