//! A limit that changes its unit: nobody is without one meanwhile.

use std::time::Duration;

use quotum::ledger::{Directory, RosterSettings};
use quotum::{Claim, Limiter, Policy, Quota, Unit};

use crate::fleet::{DEPLOYMENT, Fleet};
use crate::{LIMIT, MINUTE, START, fleet, minute, spend, spend_alone};

/// What is to come, as /status says it: until when what holds.
fn announced(fleet: &Fleet, pod: usize) -> Vec<(Option<Quota>, Quota, u64)> {
    let limits = fleet.pods[pod].limiter.status().limits;
    limits[0].switches.iter().map(|switch| (switch.from, switch.to, switch.at.unix_ms())).collect()
}

/// How many requests of so many tokens, half of them prompt, a pod lets through.
fn admitted(fleet: &Fleet, pod: usize, tokens: u64) -> usize {
    let claim = Claim::prompt_and_output(tokens / 2, tokens / 2);
    let take = || fleet.pods[pod].handle.try_acquire(claim).map(|mut permit| permit.start()).is_ok();
    (0..1_000).take_while(|_| take()).count()
}

#[test]
fn a_limit_whose_unit_changes_holds_until_the_new_one_starts() {
    let clock = fleet::ManualClock::default();
    clock.set(START + 5_000);
    let build = |quota| Limiter::builder().deployment("a", [quota]);
    let (tokens, day) = (minute(100), Quota::requests(5).per(Duration::from_secs(86_400)).at_once());
    let first = build(tokens).clock(clock.clone()).seed(1).build().expect("valid");
    let second = first.reconfigure(build(day)).expect("valid");
    let midnight = 24 * 60 * MINUTE;
    let switches = second.status().limits[0].switches.clone();
    assert_eq!(switches.iter().map(|switch| (switch.from, switch.to)).collect::<Vec<_>>(), [(Some(tokens), day)]);
    assert_eq!(switches[0].at.unix_ms(), midnight);
    // Nobody drives it: a limiter alone has no ticks.
    for handle in [first.handle("a").expect("kept"), second.handle("a").expect("configured")] {
        let admit = |tokens| handle.try_acquire(Claim::tokens(tokens)).map(|mut permit| permit.start());
        let start = second.now().unix_ms();
        for hour in 0..4 {
            clock.set(start + hour * 60 * MINUTE);
            assert!(admit(101).is_err(), "hour {hour}");
            assert_eq!((0..20).filter(|_| admit(10).is_ok()).count(), 10, "hour {hour}: 100 tokens a minute as before");
        }
        clock.set(start + 3 * 60 * MINUTE + 2 * MINUTE);
    }
    assert_eq!(second.handle("a").expect("configured").quotas().collect::<Vec<_>>(), [tokens]);
    clock.set(midnight);
    let handle = first.handle("a").expect("kept");
    assert_eq!((0..20).filter(|_| handle.try_acquire(Claim::tokens(1_000)).map(|mut p| p.start()).is_ok()).count(), 5);
    assert_eq!(handle.quotas().collect::<Vec<_>>(), [day]);
    assert!(second.status().limits[0].switches.is_empty());
}

#[test]
fn a_unit_that_becomes_two_holds_until_the_later_one_starts() {
    let mut fleet = fleet(1);
    let (prompt, output) =
        (Quota::input_tokens(1_000).per_minute(), Quota::output_tokens(1_000).per(Duration::from_secs(120)));
    assert_eq!(admitted(&fleet, 0, 1_000), 9);
    fleet.run_until(START + 30_000);
    fleet.reload(0, [prompt, output]);
    // The 16th hour and 40 minutes are a start of 120 s, too.
    let (first, last) = (START + MINUTE, START + 2 * MINUTE);
    let expected = [(None, prompt, first), (Some(minute(LIMIT)), output, last)];
    assert_eq!(announced(&fleet, 0), expected);
    assert_eq!(admitted(&fleet, 0, 2), 0, "the old one is spent and holds");
    fleet.run_until(first);
    assert_eq!(admitted(&fleet, 0, 10_000), 0, "the old one");
    assert_eq!(admitted(&fleet, 0, 200), 10, "the new one, of prompts");
    fleet.run_until(last);
    assert_eq!(admitted(&fleet, 0, 2_000), 1, "now 1,000 and 1,000");
    assert_eq!(announced(&fleet, 0), []);
    assert_eq!(fleet.pods[0].handle.quotas().collect::<Vec<_>>(), [prompt, output]);
}

#[test]
fn what_is_replaced_by_another_unit_holds_beside_what_stays() {
    let mut fleet = fleet(1);
    let requests = Quota::requests(3).per_minute();
    fleet.reload(0, [minute(LIMIT), requests]);
    fleet.run_until(START + MINUTE);
    let prompt = Quota::input_tokens(50).per_minute();
    fleet.reload(0, [minute(LIMIT), prompt]);
    assert_eq!(announced(&fleet, 0), [(Some(requests), prompt, START + 2 * MINUTE)]);
    assert_eq!(admitted(&fleet, 0, 200), 3, "requests, until the prompts are counted");
    fleet.run_until(START + 2 * MINUTE);
    assert_eq!(admitted(&fleet, 0, 2), 50);
    // Another amount is nothing new: what nothing replaces ends at once.
    fleet.reload(0, [minute(2 * LIMIT)]);
    assert_eq!(announced(&fleet, 0), [(Some(minute(LIMIT)), minute(2 * LIMIT), START + 3 * MINUTE)]);
    assert_eq!(admitted(&fleet, 0, 100), (LIMIT as usize - 100) / 100);
}

#[test]
fn a_change_of_unit_can_be_taken_back_or_replaced_before_it_is_in_force() {
    let (requests, prompt) = (Quota::requests(3).per_minute(), Quota::input_tokens(500).per(Duration::from_secs(120)));
    // Long before the switch, and with the new window frozen already.
    for at in [START + 5_000, START + MINUTE - 1_000] {
        let mut back = fleet(1);
        assert_eq!(admitted(&back, 0, 1_000), 9);
        back.run_until(at);
        back.reload(0, [requests]);
        back.reload(0, [minute(LIMIT)]);
        assert_eq!(announced(&back, 0), [], "as if nothing had been");
        assert_eq!(admitted(&back, 0, 2), 0);
        back.run_until(START + MINUTE);
        assert_eq!(admitted(&back, 0, 1_000), 9, "and no more than before");

        let mut third = fleet(1);
        third.run_until(at);
        third.reload(0, [requests]);
        third.reload(0, [prompt]);
        assert_eq!(announced(&third, 0).last(), Some(&(Some(minute(LIMIT)), prompt, START + 2 * MINUTE)));
        for second in 0..120 {
            third.run_until(at.max(START + second * 1_000));
            assert_eq!(admitted(&third, 0, 2 * LIMIT), 0, "{second} s: more than any limit");
        }
        third.run_until(START + 2 * MINUTE);
        assert_eq!(third.pods[0].handle.quotas().collect::<Vec<_>>(), [prompt]);
        assert_eq!(admitted(&third, 0, 100), 10);
    }
}

#[test]
fn who_has_changed_the_unit_passes_its_share_of_the_old_one_on() {
    let mut fleet = fleet(3);
    let requests = Quota::requests(30).per_minute();
    spend(&mut fleet);
    for pod in [0, 1] {
        fleet.reload(pod, [requests]);
    }
    fleet.run_until(START + MINUTE + 1_000);
    assert_eq!(fleet.pods[0].handle.quotas().collect::<Vec<_>>(), [requests]);
    assert!(spend_alone(&mut fleet, 2) >= LIMIT, "the one that still has the old limit can spend it all");
    assert!(fleet.rights(START + MINUTE) <= LIMIT, "{}", fleet.rights(START + MINUTE));
    fleet.reload(2, [requests]);
    fleet.run_until(START + 3 * MINUTE + 1_000);
    let admitted: usize = (0..3).map(|pod| admitted(&fleet, pod, 2)).sum();
    assert_eq!(admitted, 30);
}

#[test]
fn a_reservation_just_before_a_unit_changes_is_charged_in_both_and_settled_in_both() {
    let requests = Quota::requests(3).per_minute();
    let mut fleet = Fleet::new(minute(LIMIT), START + 1_000);
    fleet.policy = Policy { edge: Duration::from_millis(50), ..Policy::default() };
    fleet.start(0, Directory::Alone, RosterSettings::default());
    fleet.reload(0, [requests]);
    let at = START + MINUTE;
    fleet.pass(at - 20 - fleet.now_ms);
    let handle = fleet.pods[0].handle.clone();
    let (permit, refunded) = (handle.try_acquire(Claim::tokens(100)), handle.try_acquire(Claim::tokens(100)));
    let used = |fleet: &Fleet, unit, start| {
        let windows = fleet.pods[0].limiter.with_ledger(|ledger, _| ledger.open_windows(DEPLOYMENT, unit));
        let found = windows.into_iter().find(|window| window.0.unix_ms() == start);
        found.map_or(0, |(_, reserved, refunded, _)| reserved - refunded)
    };
    assert_eq!((used(&fleet, Unit::Tokens, START), used(&fleet, Unit::Requests, at)), (200, 2));
    fleet.run_until(at + 5_000);
    assert_eq!(admitted(&fleet, 0, 2), 1, "two of three requests may arrive in this window");
    permit.expect("fits both").settle(60);
    refunded.expect("fits both").refund();
    assert_eq!((used(&fleet, Unit::Tokens, START), used(&fleet, Unit::Requests, at)), (60, 2));
}

#[test]
fn a_request_is_counted_once_while_a_new_unit_waits_for_its_window() {
    let mut fleet = fleet(1);
    fleet.reload(0, [minute(LIMIT), Quota::requests(2).per(Duration::from_secs(86_400))]);
    fleet.pods[0].handle = fleet.pods[0].limiter.handle(DEPLOYMENT).expect("configured");
    assert_eq!(admitted(&fleet, 0, 1_000), 9);
    let counters = fleet.pods[0].limiter.status().limits[0].quotas[0].1;
    assert_eq!((counters.admitted, counters.refunded), (LIMIT, 0));
}
