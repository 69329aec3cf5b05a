//! The modes that may exceed a limit: by how much, and when.

mod fleet;

use fleet::{Fleet, address};
use quotum::ledger::{Directory, OnSilence, RosterSettings};
use quotum::{BuildError, Claim, Limiter, Mode, Policy, Portion, Quota};

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
        let mut fleet = Fleet::new(quota(), START + 5_000);
        fleet.policy.mode = MODE;
        let pod = fleet.start(0, Directory::Alone, RosterSettings::default());
        let at = &fleet.pods[pod];
        assert_eq!(at.handle.standings()[0].spendable, 1_100);
        assert!(at.try_take(1_000) && at.try_take(30));
        let id = quotum::ledger::ReplicaId::new(at.limiter.now(), 5);
        let slot = quotum::ledger::Slot { node: "pod".into(), addr: address(0), exclusive: true };
        let settings = RosterSettings { directory: Directory::Static, ..RosterSettings::default() };
        at.limiter.attach(id, slot, settings, std::time::Duration::from_millis(100));
        let standing = at.handle.standings()[0];
        assert_eq!((standing.spendable, standing.used, standing.debt), (0, 1_030, 30));
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
