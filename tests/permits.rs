//! Permits: what a reservation charges, and what becomes of it.

mod fleet;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fleet::ManualClock;
use quotum::ledger::{Directory, LimitId, ReplicaId, RosterSettings, Slot};
use quotum::{BuildError, Claim, Denied, Limiter, Mode, Permit, Policy, Quota, Unit};

const MINUTE: u64 = 60_000;
const START: u64 = 1_000 * MINUTE;

fn limiter(quotas: &[Quota], policy: Policy) -> (Limiter, ManualClock) {
    let clock = ManualClock::default();
    clock.set(START);
    let limiter = Limiter::builder()
        .deployment_with("gpt", quotas.iter().copied(), policy)
        .clock(clock.clone())
        .seed(1)
        .build()
        .expect("a valid configuration");
    (limiter, clock)
}

fn used(limiter: &Limiter, unit: Unit) -> u64 {
    let standings = limiter.handle("gpt").expect("configured").standings();
    standings.iter().filter(|standing| standing.quota.unit() == unit).map(|standing| standing.used).sum()
}

#[test]
fn several_claims_are_charged_together_or_not_at_all() {
    let (limiter, _) =
        limiter(&[Quota::tokens(1_000).per_minute(), Quota::requests(2).per_minute()], Policy::default());
    let handle = limiter.handle("gpt").expect("configured");
    let first = handle.try_acquire(Claim::tokens(100)).expect("fits");
    let second = handle.try_acquire(Claim::tokens(100)).expect("fits");
    let denied = handle.try_acquire(Claim::tokens(100)).expect_err("the third request");
    assert_eq!(denied.by().unit(), Unit::Requests, "it says which limit");
    assert_eq!(used(&limiter, Unit::Tokens), 200, "its tokens were not charged");
    first.refund();
    let denied = handle.try_acquire(Claim::tokens(950)).expect_err("too many tokens");
    assert_eq!(denied.by().unit(), Unit::Tokens);
    assert_eq!(used(&limiter, Unit::Requests), 1, "its request was not charged");
    drop(second);
}

#[test]
fn an_unstarted_permit_refunds_itself_and_a_started_one_stays_charged() {
    let (limiter, _) = limiter(&[Quota::tokens(1_000).per_minute()], Policy::default());
    let handle = limiter.handle("gpt").expect("configured");
    drop(handle.try_acquire(Claim::tokens(400)).expect("fits"));
    assert_eq!(used(&limiter, Unit::Tokens), 0);
    let mut started = handle.try_acquire(Claim::tokens(400)).expect("fits");
    started.start();
    drop(started);
    assert_eq!(used(&limiter, Unit::Tokens), 400);
}

#[test]
fn settling_replaces_the_estimate_in_every_unit() {
    let quotas = [
        Quota::tokens(10_000).per_minute(),
        Quota::input_tokens(5_000).per_minute(),
        Quota::output_tokens(5_000).per_minute(),
        Quota::requests(10).per_minute(),
    ];
    let (limiter, _) = limiter(&quotas, Policy::default());
    let handle = limiter.handle("gpt").expect("configured");
    let mut permit = handle.try_acquire(Claim::prompt_and_output(1_000, 2_000)).expect("fits");
    permit.start();
    permit.settle_claim(Claim::prompt_and_output(900, 1_500));
    let all = [Unit::Tokens, Unit::InputTokens, Unit::OutputTokens, Unit::Requests];
    assert_eq!(all.map(|unit| used(&limiter, unit)), [2_400, 900, 1_500, 1]);
}

#[test]
fn a_permit_can_outlive_the_handle_it_came_from() {
    let (limiter, _) = limiter(&[Quota::tokens(1_000).per_minute()], Policy::default());
    let handle = limiter.handle("gpt").expect("configured");
    let mut owned: Permit<'static> = handle.try_acquire(Claim::tokens(400)).expect("fits").into_owned();
    drop(handle);
    assert_eq!(used(&limiter, Unit::Tokens), 400, "to make it own itself refunds nothing");
    owned.start();
    owned.settle(100);
    assert_eq!(used(&limiter, Unit::Tokens), 100);
}

#[test]
fn at_the_edge_of_a_window_both_windows_are_charged_and_settled() {
    let policy = Policy { edge: Duration::from_millis(50), ..Policy::default() };
    let (limiter, clock) = limiter(&[Quota::tokens(1_000).per_minute()], policy);
    let handle = limiter.handle("gpt").expect("configured");
    clock.set(START + MINUTE - 51);
    let before = handle.try_acquire(Claim::tokens(100)).expect("fits");
    clock.set(START + MINUTE - 50);
    let mut at_the_edge = handle.try_acquire(Claim::tokens(300)).expect("fits both");
    assert!(handle.try_acquire(Claim::tokens(700)).is_err(), "it must fit in both");
    assert_eq!(used(&limiter, Unit::Tokens), 400);
    clock.set(START + MINUTE);
    assert_eq!(used(&limiter, Unit::Tokens), 300, "the next window was charged too");
    assert!(handle.try_acquire(Claim::tokens(701)).is_err());
    at_the_edge.start();
    at_the_edge.settle(200);
    assert_eq!(used(&limiter, Unit::Tokens), 200);
    before.refund();
    assert_eq!(used(&limiter, Unit::Tokens), 200, "a refund goes into the window of its reservation");
}

#[test]
fn a_refund_after_its_window_has_ended_does_not_reach_the_next() {
    let (limiter, clock) = limiter(&[Quota::tokens(1_000).per_minute()], Policy::default());
    let handle = limiter.handle("gpt").expect("configured");
    let permit = handle.try_acquire(Claim::tokens(1_000)).expect("fits");
    for late in [1, 2, 3, 4, 5] {
        clock.set(START + late * MINUTE);
        let next = handle.try_acquire(Claim::tokens(1_000)).expect("every window has its own budget");
        if late == 4 {
            next.refund();
            break;
        }
        let mut next = next;
        next.start();
    }
    // Its word in the ring now belongs to a later window.
    let before = used(&limiter, Unit::Tokens);
    permit.refund();
    assert_eq!(used(&limiter, Unit::Tokens), before);
}

#[test]
fn an_excess_that_settles_after_its_window_has_closed_is_uncovered() {
    let (limiter, clock) = limiter(&[Quota::tokens(1_000).per_minute()], Policy::default());
    let handle = limiter.handle("gpt").expect("configured");
    let mut permit = handle.try_acquire(Claim::tokens(500)).expect("fits");
    permit.start();
    clock.set(START + 6 * MINUTE);
    drop(handle.try_acquire(Claim::tokens(1)).expect("fits"));
    limiter.with_ledger(|ledger, now| ledger.handle_tick(now));
    permit.settle(530);
    assert_eq!(limiter.status().limits[0].quotas[0].1.uncovered, 30);
}

#[test]
fn a_clock_that_steps_back_reopens_nothing() {
    let (limiter, clock) = limiter(&[Quota::tokens(1_000).per_minute()], Policy::default());
    let handle = limiter.handle("gpt").expect("configured");
    let mut all = handle.try_acquire(Claim::tokens(1_000)).expect("fits");
    all.start();
    drop(all);
    clock.set(START + 3 * MINUTE);
    let mut all = handle.try_acquire(Claim::tokens(1_000)).expect("fits");
    all.start();
    drop(all);
    limiter.with_ledger(|ledger, now| ledger.handle_tick(now));
    for back in [START, START + MINUTE, START + 2 * MINUTE] {
        clock.set(back);
        assert!(handle.try_acquire(Claim::tokens(1)).is_err(), "at {back}");
    }
}

#[test]
fn observe_refuses_nothing_and_counts_what_it_would_have_refused() {
    let policy = Policy { mode: Mode::Observe, ..Policy::default() };
    let (limiter, _) = limiter(&[Quota::tokens(1_000).per_minute()], policy);
    let handle = limiter.handle("gpt").expect("configured");
    for _ in 0..5 {
        let mut permit = handle.try_acquire(Claim::tokens(400)).expect("never refused");
        permit.start();
    }
    assert_eq!(used(&limiter, Unit::Tokens), 2_000);
    assert_eq!(limiter.status().limits[0].observed, 3);
}

#[test]
fn a_refusal_tells_later_from_never_and_is_honest_about_when() {
    let (limiter, clock) = limiter(&[Quota::tokens(1_000).per_minute()], Policy::default());
    let handle = limiter.handle("gpt").expect("configured");
    let mut most = handle.try_acquire(Claim::tokens(900)).expect("fits");
    most.start();
    clock.set(START + 20_000);
    let later = handle.try_acquire(Claim::tokens(200)).expect_err("100 are left");
    let again = later.retry_after().expect("later, not never");
    assert!(again >= Duration::from_secs(40) && again <= Duration::from_secs(46), "{again:?}");
    assert_eq!(later.standing().remaining(), 100);
    let never = handle.try_acquire(Claim::tokens(1_001)).expect_err("more than the limit");
    assert!(matches!(never, Denied::TooLarge { .. }));
    clock.set(START + 20_000 + again.as_millis() as u64);
    assert!(handle.try_acquire(Claim::tokens(200)).is_ok(), "exactly when it said");
}

#[test]
fn deployments_with_one_limit_id_share_one_budget() {
    let policy = Policy { limit_id: Some("provider".into()), ..Policy::default() };
    let quota = Quota::tokens(1_000).per_minute();
    let limiter = Limiter::builder()
        .deployment_with("east", [quota], policy.clone())
        .deployment_with("west", [quota], policy.clone())
        .build()
        .expect("valid");
    let held = limiter.handle("east").expect("configured").try_acquire(Claim::tokens(800)).map(Permit::into_owned);
    assert!(limiter.handle("west").expect("configured").try_acquire(Claim::tokens(300)).is_err());
    drop(held);
    let other = Quota::tokens(999).per_minute();
    let clash = Limiter::builder()
        .deployment_with("east", [quota], policy.clone())
        .deployment_with("west", [other], policy)
        .build();
    assert!(matches!(clash, Err(BuildError::SharedLimit { .. })));
}

#[test]
fn a_wrong_configuration_says_what_is_wrong() {
    let quota = Quota::tokens(1_000).per_second();
    let build = |edge: u64| {
        let policy = Policy { edge: Duration::from_millis(edge), ..Policy::default() };
        Limiter::builder().deployment_with("gpt", [quota], policy).build()
    };
    assert!(build(250).is_ok());
    assert!(matches!(build(251), Err(BuildError::Edge { .. })), "more than the lead, a quarter of the window");
    let twice = Limiter::builder().deployment("gpt", [quota]).deployment("gpt", [quota]).build();
    assert!(matches!(twice, Err(BuildError::DuplicateDeployment(_))));
    assert!(matches!(Limiter::builder().deployment("gpt", []).build(), Err(BuildError::NoQuota(_))));
}

#[test]
fn a_deployment_that_was_only_tried_has_refused_nothing() {
    let (limiter, _) = limiter(&[Quota::tokens(100).per_minute()], Policy::default());
    let handle = limiter.handle("gpt").expect("configured");
    let refused = || limiter.status().limits[0].refused.values().sum::<u64>();
    let _kept = handle.probe(Claim::tokens(100)).expect("it fits");
    let denied = handle.probe(Claim::tokens(1)).expect_err("nothing is left");
    assert_eq!(refused(), 0, "another deployment may admit it");
    handle.count_refusal(&denied);
    assert_eq!(refused(), 1);
    handle.try_acquire(Claim::tokens(1)).expect_err("nothing is left");
    assert_eq!(refused(), 2);
}

#[test]
fn deployments_that_share_a_limit_share_its_pause() {
    let clock = ManualClock::default();
    clock.set(START);
    let policy = Policy { limit_id: Some("shared".into()), ..Policy::default() };
    let quotas = [Quota::tokens(100).per_minute()];
    let limiter = Limiter::builder()
        .deployment_with("a", quotas, policy.clone())
        .deployment_with("b", quotas, policy)
        .deployment("c", quotas)
        .clock(clock.clone())
        .build()
        .expect("a valid configuration");
    let until = |id: &str| limiter.get(id).expect("configured").paused_until();
    let end = limiter.now().plus(Duration::from_secs(7));
    limiter.get("a").expect("configured").pause(end);
    assert_eq!([until("a"), until("b"), until("c")], [Some(end), Some(end), None]);
    assert_eq!(limiter.own_pauses(), [(LimitId::of("shared"), end)]);
    limiter.hear_pause(LimitId::of("c"), end);
    limiter.hear_pause(LimitId::of("nobody's"), end);
    assert_eq!((until("c"), limiter.own_pauses().len()), (Some(end), 1));
    clock.set(START + 7_000);
    assert_eq!((until("a"), until("c"), limiter.own_pauses()), (None, None, Vec::new()));
}

#[test]
fn absurd_claims_and_settlements_are_counted_as_the_most_that_can_be() {
    let policy = Policy { edge: Duration::ZERO, ..Policy::default() };
    let (limiter, clock) = limiter(&[Quota::tokens(1_000).per_second()], policy);
    let handle = limiter.handle("gpt").expect("configured");
    for _ in 0..2 {
        let denied = handle.try_acquire(Claim::tokens(u64::MAX)).expect_err("more than there is");
        assert!(matches!(denied, Denied::TooLarge { requested: u64::MAX, .. }), "{denied}");
    }
    let late: Vec<_> = (0..2).map(|_| handle.try_acquire(Claim::tokens(1)).expect("fits")).collect();
    clock.set(START + MINUTE);
    limiter.with_ledger(|ledger, now| ledger.handle_tick(now));
    late.into_iter().for_each(|permit| permit.settle(u64::MAX));
    let uncovered = limiter.status().limits[0].quotas[0].1.uncovered;
    assert_eq!(uncovered, u64::MAX);
    assert!(handle.try_acquire(Claim::tokens(1_000)).is_ok());
}

/// Threads that go on reserving while their pod joins.
#[test]
fn what_was_owned_alone_is_forfeited_whoever_reserves_meanwhile() {
    for round in 0..300 {
        let (limiter, _) = limiter(&[Quota::tokens(1_000_000_000).per_minute()], Policy::default());
        let handle = limiter.handle("gpt").expect("configured");
        let reserve = || handle.try_acquire(Claim::tokens(1)).map(|mut permit| permit.start()).is_ok();
        assert!(reserve());
        let (running, joined) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !joined.load(Ordering::SeqCst) {
                    reserve();
                    running.store(true, Ordering::SeqCst);
                }
            });
            while !running.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            let slot = Slot { node: "pod".into(), addr: fleet::address(0), exclusive: true };
            let settings = RosterSettings { directory: Directory::Static, ..RosterSettings::default() };
            let _ = limiter.attach(ReplicaId::new(limiter.now(), round), slot, settings, Duration::from_millis(100));
            joined.store(true, Ordering::SeqCst);
        });
        assert_eq!(handle.standings()[0].spendable, 0, "round {round}");
    }
}
