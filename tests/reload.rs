//! Limits that change while the fleet runs: which version is in force when, and for whom.

mod fleet;

mod reload {
    mod held;
    mod units;
}

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use fleet::{DEPLOYMENT, Fleet};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use quotum::ledger::{Directory, Key, LimitId, Message, RosterSettings, Row, WindowId};
use quotum::{Claim, Limiter, Mode, Policy, Quota, Unit};

const MINUTE: u64 = 60_000;
const LIMIT: u64 = 9_000;
const START: u64 = 1_000 * MINUTE;

fn minute(tokens: u64) -> Quota {
    Quota::tokens(tokens).per_minute()
}

fn fleet(pods: usize) -> Fleet {
    Fleet::joined(minute(LIMIT), START + 1_000, pods)
}

/// Drains and exchanges until nobody gets anything more: everybody wants all there is.
fn spend(fleet: &mut Fleet) -> u64 {
    let mut spent = 0;
    for _ in 0..6 {
        let handles: Vec<_> = fleet.pods.iter().filter(|pod| pod.alive).map(|pod| pod.handle.clone()).collect();
        let mut waiting = Vec::new();
        spent += fleet.drain_all(1);
        for handle in &handles {
            waiting.push((handle.acquire(Claim::tokens(1)), Arc::default()));
        }
        for (waiting, wakes) in &mut waiting {
            if let Poll::Ready(Ok(mut permit)) = fleet::poll(waiting, wakes) {
                permit.start();
                spent += 1;
            }
        }
        fleet.settle();
        for (mut waiting, wakes) in waiting {
            // One that was ready above must not be polled again: it is dropped.
            if wakes.count() > 0
                && let Poll::Ready(Ok(mut permit)) = fleet::poll(&mut waiting, &wakes)
            {
                permit.start();
                spent += 1;
            }
        }
    }
    spent
}

fn switches(fleet: &Fleet, pod: usize) -> Vec<(u64, u64)> {
    let status = fleet.pods[pod].limiter.status();
    status.limits[0].switches.iter().map(|switch| (switch.to.amount(), switch.at.unix_ms())).collect()
}

/// Three pods, of which only the first ones know the deployment.
fn knowing(pods: usize, quota: Quota) -> Fleet {
    let mut fleet = Fleet::new(quota, START + 1_000);
    let list: Vec<_> = (0..3).map(fleet::address).collect();
    for pod in 0..3 {
        fleet.deployment = if pod < pods { DEPLOYMENT } else { "another" };
        let at = fleet.start(pod, Directory::Static, RosterSettings::default());
        fleet.list(at, &list);
    }
    fleet.run(3);
    fleet
}

/// One pod spends what it can get, its own and its peers'; returns what all have used.
fn spend_alone(fleet: &mut Fleet, pod: usize) -> u64 {
    let handle = fleet.pods[pod].handle.clone();
    fleet.pods[pod].drain(1);
    for tokens in [500; 60].into_iter().chain([50; 40]).chain([1; 40]) {
        let wakes = Arc::default();
        let mut waiting = handle.acquire(Claim::tokens(tokens));
        let mut answer = fleet::poll(&mut waiting, &wakes);
        if answer.is_pending() {
            fleet.settle();
            answer = fleet::poll(&mut waiting, &wakes);
        }
        match answer {
            Poll::Ready(Ok(mut permit)) => permit.start(),
            Poll::Ready(Err(_)) | Poll::Pending => {}
        }
        drop(waiting);
        fleet.run(1);
    }
    fleet.pods[pod].drain(1);
    fleet.used(fleet.now_ms - fleet.now_ms % MINUTE)
}

#[test]
fn a_limit_changes_at_the_next_window_start_and_not_before() {
    for limit in [LIMIT / 3, LIMIT * 2] {
        let mut fleet = fleet(1);
        fleet.pods[0].try_take(1_000);
        fleet.reload(0, [minute(limit)]);
        assert_eq!(switches(&fleet, 0), [(limit, START + MINUTE)], "it says what is to come");
        assert_eq!(fleet.pods[0].drain(1), LIMIT - 1_000, "this window keeps its limit");
        fleet.run_until(START + MINUTE);
        assert_eq!(fleet.pods[0].drain(1), limit);
        assert_eq!(fleet.pods[0].handle.quotas().collect::<Vec<_>>(), [minute(limit)]);
        assert_eq!(switches(&fleet, 0), []);
    }
}

#[test]
fn old_and_new_side_by_side_spend_at_most_the_larger_limit() {
    for (old, new) in [(LIMIT, 2 * LIMIT), (2 * LIMIT, LIMIT)] {
        let mut fleet = Fleet::joined(minute(old), START + 1_000, 3);
        let mut expected = old;
        for pod in 0..4 {
            let window = START + pod as u64 * MINUTE;
            fleet.run_until(window + 1_000);
            spend(&mut fleet);
            assert_eq!(fleet.used(window), expected, "{pod} of 3 have switched from {old} to {new}");
            assert!(expected <= old.max(new));
            if pod < 3 {
                fleet.reload(pod, [minute(new)]);
                expected = expected - old / 3 + new / 3;
            }
        }
        fleet.run(20);
        for pod in 0..3 {
            let limit = &fleet.pods[pod].limiter.status().limits[0];
            assert_eq!(limit.mismatches, [], "everybody enforces the same again");
        }
    }
}

#[test]
fn a_change_in_the_lead_of_a_window_leaves_that_window_alone() {
    let mut fleet = fleet(2);
    spend(&mut fleet);
    fleet.run_until(START + MINUTE - 1_000);
    fleet.reload(0, [minute(2 * LIMIT)]);
    assert_eq!(switches(&fleet, 0), [(2 * LIMIT, START + 2 * MINUTE)]);
    fleet.run_until(START + MINUTE + 1_000);
    spend(&mut fleet);
    assert_eq!(fleet.used(START + MINUTE), LIMIT, "its shares were frozen already");
}

#[test]
fn a_window_that_a_fast_peer_has_opened_here_keeps_its_limit() {
    let mut fleet = fleet(2);
    spend(&mut fleet);
    fleet.offsets.insert(1, 2_000);
    fleet.run_until(START + MINUTE - 3_500);
    fleet.reload(0, [minute(2 * LIMIT)]);
    // Its peer is in the lead of the next window and has spoken of it.
    assert_eq!(switches(&fleet, 0), [(2 * LIMIT, START + 2 * MINUTE)]);
}

#[test]
fn a_change_can_be_taken_back_or_replaced_before_it_is_in_force() {
    let mut fleet = fleet(2);
    fleet.reload(0, [minute(2 * LIMIT)]);
    fleet.reload(0, [minute(3 * LIMIT)]);
    assert_eq!(switches(&fleet, 0), [(3 * LIMIT, START + MINUTE)], "the second replaces the first");
    fleet.reload(0, [minute(LIMIT)]);
    assert_eq!(switches(&fleet, 0), [], "nothing is left to change");
    fleet.run_until(START + MINUTE - 1_000);
    fleet.reload(0, [minute(2 * LIMIT)]);
    fleet.reload(0, [minute(3 * LIMIT)]);
    fleet.run_until(START + 2 * MINUTE - 1_000);
    fleet.reload(0, [minute(4 * LIMIT)]);
    let pending = [(3 * LIMIT, START + 2 * MINUTE), (4 * LIMIT, START + 3 * MINUTE)];
    assert_eq!(switches(&fleet, 0), pending, "what is frozen already stays");
}

#[test]
fn windows_of_another_length_follow_at_a_start_of_theirs() {
    // 60 s, then 20 s: the running window is cut short where the first new one starts.
    let mut fleet = fleet(2);
    fleet.pods[0].try_take(1_000);
    fleet.run_until(START + 5_000);
    fleet.reload(0, [Quota::tokens(1_000).per(Duration::from_secs(20))]);
    assert_eq!(switches(&fleet, 0), [(1_000, START + 20_000)]);
    fleet.run_until(START + 19_000);
    assert!(fleet.pods[0].try_take(500), "until then the old one holds");
    // The other one does not hear that nothing is left.
    fleet.run_until(START + 19_800);
    fleet.cut.insert((0, 1));
    fleet.run_until(START + 20_000);
    fleet.cut.clear();
    assert_eq!(fleet.pods[0].drain(1), 500, "its share of the new one, and no more of the old");
    let before = fleet.rights(START);
    assert_eq!(fleet.pods[1].drain(1), LIMIT / 2);
    let wakes = Arc::default();
    let handle = fleet.pods[1].handle.clone();
    let mut waiting = handle.acquire(Claim::tokens(100));
    assert!(fleet::poll(&mut waiting, &wakes).is_pending(), "it may ask");
    fleet.settle();
    assert!(fleet::poll(&mut waiting, &wakes).is_pending(), "what was cut short is not given away");
    assert_eq!(fleet.rights(START), before);
    drop(waiting);
    // And back to 60 s, at the next start of a minute that is also one of 20 s.
    fleet.reload(0, [minute(LIMIT)]);
    assert_eq!(switches(&fleet, 0), [(LIMIT, START + MINUTE)]);
    fleet.run_until(START + MINUTE);
    spend(&mut fleet);
    assert_eq!(fleet.used(START + MINUTE), LIMIT);
}

#[test]
fn a_reservation_just_before_a_switch_is_charged_and_settled_on_both_sides() {
    for new in [minute(LIMIT * 2), Quota::tokens(LIMIT * 2).per(Duration::from_secs(30))] {
        let mut fleet = Fleet::new(minute(LIMIT), START + 1_000);
        fleet.policy = Policy { edge: Duration::from_millis(50), ..Policy::default() };
        fleet.start(0, Directory::Alone, RosterSettings::default());
        fleet.reload(0, [new]);
        let at = switches(&fleet, 0)[0].1;
        fleet.pass(at - 20 - fleet.now_ms);
        let handle = fleet.pods[0].handle.clone();
        let permit = handle.try_acquire(Claim::tokens(100)).expect("fits both");
        let charged = |fleet: &Fleet| (fleet.used(START), fleet.used(at));
        assert_eq!(charged(&fleet), (100, 100));
        fleet.pass(5_000);
        assert!(fleet.pods[0].try_take(7));
        permit.settle(60);
        assert_eq!(charged(&fleet), (60, 67));
    }
}

#[test]
fn a_request_that_is_parked_over_a_switch_is_charged_to_what_is_in_force_then() {
    let mut fleet = Fleet::new(minute(LIMIT), START + 1_000);
    fleet.policy.wait = Duration::from_secs(30);
    let list: Vec<_> = (0..2).map(fleet::address).collect();
    for pod in 0..2 {
        let at = fleet.start(pod, Directory::Static, RosterSettings::default());
        fleet.list(at, &list);
    }
    fleet.run(3);
    fleet.pods[0].drain(1);
    fleet.reload(0, [Quota::tokens(1_000).per(Duration::from_secs(20))]);
    fleet.run_until(START + 19_500);
    fleet.pods[0].drain(1);
    fleet.cut.insert((0, 1));
    let (handle, wakes) = (fleet.pods[0].handle.clone(), Arc::default());
    let mut waiting = handle.acquire(Claim::tokens(100));
    assert!(fleet::poll(&mut waiting, &wakes).is_pending());
    fleet.run_until(START + 20_000);
    let Poll::Ready(Ok(permit)) = fleet::poll(&mut waiting, &wakes) else { panic!("the new window has its share") };
    assert_eq!(fleet.pods[0].used(START + 20_000), 100);
    permit.settle(40);
    assert_eq!(fleet.pods[0].used(START + 20_000), 40, "and settled there");
}

#[test]
fn a_unit_is_limited_from_its_next_window_on_and_lifted_at_once() {
    let mut fleet = fleet(1);
    fleet.reload(0, [minute(LIMIT), Quota::requests(2).per_minute()]);
    assert_eq!((0..5).filter(|_| fleet.pods[0].try_take(1)).count(), 5, "not yet");
    fleet.run_until(START + MINUTE);
    assert_eq!((0..5).filter(|_| fleet.pods[0].try_take(1)).count(), 2);
    let kept = fleet.pods[0].handle.clone();
    let permit = kept.try_acquire(Claim::tokens(0).with(Unit::Requests, 0)).expect("nothing");
    fleet.reload(0, [minute(LIMIT)]);
    assert_eq!((0..5).filter(|_| fleet.pods[0].try_take(1)).count(), 5, "lifted");
    permit.settle(0);
    assert!(!fleet.pods[0].try_take(LIMIT), "the other one holds");
}

#[test]
fn a_kept_handle_sees_a_limit_even_if_it_knew_only_of_other_units() {
    let mut fleet = fleet(1);
    fleet.reload(0, [minute(LIMIT), Quota::requests(2).per_minute()]);
    fleet.run_until(START + MINUTE);
    // No tokens at all: the wallets this handle once knew have nothing to say.
    let taken = (0..5).filter(|_| fleet.pods[0].handle.try_acquire(Claim::tokens(0)).map(|mut p| p.start()).is_ok());
    assert_eq!(taken.count(), 2);
}

#[test]
fn a_permit_from_before_a_change_settles_into_what_it_was_charged_to() {
    let mut fleet = fleet(1);
    let kept = fleet.pods[0].handle.clone();
    let (small, large) = (kept.try_acquire(Claim::tokens(100)), kept.try_acquire(Claim::tokens(100)));
    fleet.reload(0, [Quota::tokens(1_000).per(Duration::from_secs(20))]);
    fleet.run_until(START + 25_000);
    assert!(fleet.pods[0].try_take(300));
    small.expect("fits").settle(30);
    large.expect("fits").settle(150);
    assert_eq!(fleet.used(START), 180);
    assert_eq!(fleet.used(START + 20_000), 300, "the new window has nothing to do with it");
}

#[test]
fn a_removed_deployment_is_limited_for_whoever_keeps_its_handle_and_then_forgotten() {
    let clock = fleet::ManualClock::default();
    clock.set(START);
    let build =
        |ids: &[&str]| ids.iter().fold(Limiter::builder(), |builder, id| builder.deployment(*id, [minute(LIMIT)]));
    let first = build(&["a", "b"]).clock(clock.clone()).seed(1).build().expect("valid");
    let kept = first.handle("b").expect("configured");
    let mut permit = kept.try_acquire(Claim::tokens(LIMIT - 100)).expect("fits");
    permit.start();
    let second = first.reconfigure(build(&["a"])).expect("valid");
    assert!(second.handle("b").is_err());
    assert_eq!(second.status().limits.len(), 1);
    assert!(kept.try_acquire(Claim::tokens(101)).is_err(), "still limited");
    permit.settle(100);
    assert_eq!(kept.standings()[0].used, 100, "and still settled");
    let third = second.reconfigure(build(&["a", "b"])).expect("valid");
    assert_eq!(third.handle("b").expect("configured again").standings()[0].used, 100, "the same limit");
    let fourth = third.reconfigure(build(&["a"])).expect("valid");
    drop((first, second, third, kept));
    for _ in 0..5 {
        clock.set(fourth.now().unix_ms() + MINUTE);
        fourth.with_ledger(|ledger, now| ledger.handle_tick(now));
    }
    assert_eq!(fourth.with_ledger(|ledger, _| ledger.keys_held()), 1, "its memory is free");
    let fifth = fourth.reconfigure(build(&["a", "b"])).expect("valid");
    assert!(fifth.handle("b").expect("configured").try_acquire(Claim::tokens(LIMIT)).is_ok());
}

#[test]
fn a_removed_and_readded_limit_does_not_get_a_second_share_of_its_window() {
    let mut fleet = fleet(3);
    spend(&mut fleet);
    for _ in 0..3 {
        for pod in 0..3 {
            fleet.remove(pod);
        }
        fleet.run(5);
        for pod in 0..3 {
            fleet.reload(pod, [minute(LIMIT)]);
        }
        spend(&mut fleet);
    }
    assert_eq!(fleet.used(START), LIMIT);
}

#[test]
fn a_policy_changes_at_once_for_kept_handles_too() {
    let mut fleet = fleet(1);
    fleet.pods[0].drain(1);
    fleet.policy = Policy { mode: Mode::Observe, ..fleet.policy };
    fleet.reload(0, [minute(LIMIT)]);
    assert!(fleet.pods[0].try_take(1), "observed, not refused");
    assert_eq!(fleet.pods[0].handle.policy().mode, Mode::Observe);
    assert_eq!(switches(&fleet, 0), [], "no limit has changed");
}

#[test]
fn deployments_that_share_a_limit_change_together() {
    let clock = fleet::ManualClock::default();
    clock.set(START);
    let policy = Policy { limit_id: Some("shared".into()), ..Policy::default() };
    let build = |ids: &[&str], quotas: &[Quota]| {
        let quotas = || quotas.iter().copied();
        ids.iter().fold(Limiter::builder(), |all, id| all.deployment_with(*id, quotas(), policy.clone()))
    };
    let both = [minute(LIMIT), Quota::requests(3).per_minute()];
    let first = build(&["a", "b"], &[minute(LIMIT)]).clock(clock.clone()).seed(1).build().expect("valid");
    let (a, b) = (first.handle("a").expect("configured"), first.handle("b").expect("configured"));
    first.reconfigure(build(&["a"], &both)).expect("valid");
    clock.set(START + MINUTE);
    let take = |handle: &quotum::Handle| handle.try_acquire(Claim::tokens(1)).map(|mut permit| permit.start()).is_ok();
    assert!(take(&a) && take(&b) && take(&a));
    assert!(!take(&b), "the one that is configured no more is checked against the same limit");
}

#[test]
fn a_new_deployment_is_limited_at_once() {
    let mut fleet = knowing(0, minute(LIMIT));
    fleet.run_until(START + MINUTE + 1_000);
    for pod in 0..3 {
        fleet.deploy(pod, DEPLOYMENT, minute(LIMIT));
    }
    fleet.drain_all(1);
    assert_eq!(fleet.used(START + MINUTE), LIMIT);
}

#[test]
fn no_peer_can_make_a_replica_hold_more_than_so_many_limits() {
    let mut fleet = knowing(0, minute(LIMIT));
    let row = |number: u64, replica| Row {
        replica,
        key: Key { limit: LimitId::from_bits(number), quota: minute(LIMIT) },
        window: WindowId::starting(quotum::Timestamp::from_unix_ms(START)),
        version: 1,
        reserved: 0,
        refunded: 0,
        given: Vec::new(),
        spendable: 0,
        demand: 0,
        typical: 0,
    };
    let peer = fleet.pods[1].id;
    for number in 0..2_000 {
        let message = Message::Row(row(number, peer));
        fleet.pods[0].limiter.with_ledger(|ledger, now| ledger.handle_message(peer, message, now));
    }
    let status = fleet.pods[0].limiter.status();
    assert_eq!((status.held, status.ignored.too_many_keys), (1_024, 976));
    fleet.run_until(START + 4 * MINUTE);
    assert_eq!(fleet.pods[0].limiter.status().held, 0, "and they are not kept");
}

#[test]
fn a_wrong_configuration_changes_nothing() {
    let mut fleet = fleet(1);
    let wrong = Limiter::builder().deployment(DEPLOYMENT, [minute(1)]).deployment("other", []);
    let error = fleet.pods[0].limiter.reconfigure(wrong).expect_err("no quota");
    assert!(error.to_string().contains("\"other\""), "{error}");
    assert_eq!(switches(&fleet, 0), []);
    fleet.run_until(START + MINUTE);
    assert_eq!(fleet.pods[0].drain(1), LIMIT);
}

const SECONDS: u64 = 10_000;

/// What may happen to a fleet of three.
#[derive(Clone, Debug)]
enum Step {
    Run(usize),
    Reload(usize, usize),
    Remove(usize),
    Forget(usize),
    Take(usize, u64),
    Cut(usize, usize),
    Heal,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1usize..120).prop_map(Step::Run),
        3 => (0usize..3, 0usize..3).prop_map(|(pod, quota)| Step::Reload(pod, quota)),
        1 => (0usize..3).prop_map(Step::Remove),
        1 => (0usize..3).prop_map(Step::Forget),
        6 => (0usize..3, 1u64..4_000).prop_map(|(pod, tokens)| Step::Take(pod, tokens)),
        1 => (0usize..3, 0usize..3).prop_map(|(from, to)| Step::Cut(from, to)),
        1 => Just(Step::Heal),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    // The same reloads in every run: new ones are the simulator's business.
    #![proptest_config(ProptestConfig { cases: 100, rng_seed: RngSeed::Fixed(7), ..ProptestConfig::default() })]

    /// Whoever reloads what and when: a window's reservations are at most the largest limit
    /// that any replica enforced in it.
    #[test]
    fn no_window_holds_more_than_the_largest_limit_enforced_in_it(steps in steps()) {
        let quotas = [3_000, 9_000, 5_000].map(|amount| Quota::tokens(amount).per(Duration::from_secs(10)));
        let mut fleet = Fleet::joined(quotas[0], START + 1_000, 3);
        let mut largest = std::collections::BTreeMap::new();
        // What each was told last: /status is silent about the changes of a removed limit.
        let mut told = [quotas[0].amount(); 3];
        for step in steps {
            match step {
                Step::Run(ticks) => {
                    for _ in 0..ticks {
                        fleet.run(1);
                        note_largest(&fleet, &told, &mut largest);
                    }
                }
                Step::Reload(pod, quota) => {
                    fleet.deploy(pod, DEPLOYMENT, quotas[quota]);
                    told[pod] = quotas[quota].amount();
                }
                Step::Remove(pod) => fleet.remove(pod),
                Step::Forget(pod) => fleet.deploy(pod, "another", quotas[0]),
                Step::Take(pod, tokens) => { fleet.pods[pod].try_take(tokens); }
                Step::Cut(from, to) => { fleet.cut.insert((from, to)); }
                Step::Heal => fleet.cut.clear(),
            }
            note_largest(&fleet, &told, &mut largest);
            let window = fleet.now_ms - fleet.now_ms % SECONDS;
            for start in [window.saturating_sub(SECONDS), window] {
                let most = largest.get(&start).copied().unwrap_or(u64::MAX);
                prop_assert!(fleet.used(start) <= most, "{} of {most} at {start}", fleet.used(start));
                prop_assert!(fleet.rights(start) <= most, "{} of {most} at {start}", fleet.rights(start));
            }
        }
    }
}

/// Limits of one deployment that differ in their units and windows.
fn sets() -> [Vec<Quota>; 6] {
    let of = |quota: fn(u64) -> quotum::ledger::QuotaAmount, amount, secs| quota(amount).per(Duration::from_secs(secs));
    [
        vec![of(Quota::tokens, 3_000, 10)],
        vec![of(Quota::requests, 9, 10)],
        vec![of(Quota::input_tokens, 500, 20), of(Quota::output_tokens, 500, 10)],
        vec![of(Quota::tokens, 3_000, 10), of(Quota::requests, 12, 30)],
        vec![of(Quota::tokens, 8_000, 30)],
        vec![of(Quota::requests, 40, 120)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, rng_seed: RngSeed::Fixed(8), ..ProptestConfig::default() })]

    /// Whoever is told other units, when and how often: each replica has a limit at every
    /// instant, and no window holds more than its own.
    #[test]
    fn nobody_is_without_a_limit_while_units_change(
        steps in prop::collection::vec(prop_oneof![
            4 => (1usize..120).prop_map(Step::Run),
            3 => (0usize..3, 0usize..6).prop_map(|(pod, set)| Step::Reload(pod, set)),
            6 => (0usize..3, 1u64..900).prop_map(|(pod, tokens)| Step::Take(pod, tokens)),
            1 => (0usize..3, 0usize..3).prop_map(|(from, to)| Step::Cut(from, to)),
            1 => Just(Step::Heal),
        ], 1..60),
    ) {
        let sets = sets();
        let mut fleet = Fleet::joined(sets[0][0], START + 1_000, 3);
        let mut told = [0; 3];
        for step in steps {
            match step {
                Step::Run(ticks) => {
                    for _ in 0..ticks {
                        fleet.run(1);
                        some_limit_everywhere(&fleet, &sets, told)?;
                    }
                }
                Step::Reload(pod, set) => {
                    fleet.reload(pod, sets[set].iter().copied());
                    told[pod] = set;
                }
                Step::Take(pod, tokens) => {
                    for _ in 0..3 {
                        let claim = Claim::prompt_and_output(tokens, tokens / 2);
                        let _ = fleet.pods[pod].handle.try_acquire(claim).map(|mut permit| permit.start());
                    }
                }
                Step::Cut(from, to) => { fleet.cut.insert((from, to)); }
                Step::Heal => fleet.cut.clear(),
                Step::Remove(_) | Step::Forget(_) => unreachable!("not drawn"),
            }
            some_limit_everywhere(&fleet, &sets, told)?;
            for quota in sets.iter().flatten() {
                let mut used = std::collections::BTreeMap::<_, u64>::new();
                for pod in &fleet.pods {
                    let windows = pod.limiter.with_ledger(|ledger, _| ledger.open_windows_of(DEPLOYMENT, *quota));
                    for (start, reserved, refunded, _) in windows {
                        *used.entry(start).or_default() += reserved - refunded;
                    }
                }
                prop_assert!(used.values().all(|used| *used <= quota.amount()), "{quota}: {used:?}");
            }
        }
        // Everybody is told the same in the end, and it comes into force for all.
        for pod in 0..3 {
            fleet.reload(pod, sets[1].iter().copied());
        }
        fleet.cut.clear();
        fleet.run(1_400);
        for pod in &fleet.pods {
            prop_assert_eq!(pod.handle.quotas().collect::<Vec<_>>(), sets[1].clone());
            prop_assert!(pod.limiter.status().limits[0].switches.is_empty());
        }
    }
}

/// Says whether something is refused at each replica now, whatever it was told; and that what
/// it was told last is in force or announced.
fn some_limit_everywhere(fleet: &Fleet, sets: &[Vec<Quota>; 6], told: [usize; 3]) -> Result<(), TestCaseError> {
    for (pod, told) in fleet.pods.iter().zip(told) {
        let in_force: Vec<Quota> = pod.handle.quotas().collect();
        prop_assert!(!in_force.is_empty(), "no limit at {}", pod.id);
        let refused = pod.handle.try_acquire(Claim::prompt_and_output(10_000, 10_000).with(Unit::Requests, 100));
        prop_assert!(refused.is_err(), "let through by {in_force:?}");
        let coming: Vec<Quota> = pod.limiter.status().limits[0].switches.iter().map(|switch| switch.to).collect();
        for quota in &sets[told] {
            prop_assert!(in_force.contains(quota) || coming.contains(quota), "{quota} is neither in force nor to come");
        }
    }
    Ok(())
}

/// What each replica enforces in the running window, and in the next one once it may have
/// frozen it.
fn note_largest(fleet: &Fleet, told: &[u64; 3], largest: &mut std::collections::BTreeMap<u64, u64>) {
    for (pod, told) in fleet.pods.iter().zip(told).filter(|(pod, _)| pod.handle.deployment() == DEPLOYMENT) {
        for standing in pod.handle.standings() {
            let start = standing.window_start.unix_ms();
            let mut note = |start, amount| {
                let most = largest.entry(start).or_insert(amount);
                *most = amount.max(*most);
            };
            note(start, standing.quota.amount());
            let next = start + SECONDS;
            if fleet.now_ms + 2_000 >= next {
                let limits = pod.limiter.status().limits;
                let switch = limits.iter().flat_map(|limit| &limit.switches).find(|switch| switch.at.unix_ms() == next);
                let unless = if limits.is_empty() { *told } else { standing.quota.amount() };
                note(next, switch.map_or(unless, |switch| switch.to.amount()));
            }
        }
    }
}
