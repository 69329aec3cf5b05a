//! Laws of the ledger: what holds for every schedule, checked on schedules nobody chose.

mod fleet;

use std::cell::Cell;

use crdts::{CmRDT, PNCounter};
use fleet::storm::{Storm, step};
use fleet::{Fleet, Letter};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use quotum::ledger::{
    Contact, Directory, Key, LimitId, Message, ReplicaId, RequestKind, RosterSettings, Row, Timestamp, Window, WindowId,
};
use quotum::{Claim, Limiter, Margin, Mode, Policy, Portion, Quota, Standing};

const MINUTE: u64 = 60_000;
const START: u64 = 1_000 * MINUTE;
const LIMIT: u64 = 100;

/// `crdts` reads counters as big integers; these are small.
fn to_u64(value: impl ToString) -> u64 {
    value.to_string().parse().expect("a small number")
}

fn minute() -> Quota {
    Quota::tokens(LIMIT).per_minute()
}

/// The theorem: loss, repetition, reordering, delay, joins, leaves, crashes and restarts in
/// any order never put the rights, and so the use, over the limit.
#[test]
fn the_sum_of_rights_never_exceeds_the_limit() {
    let config =
        ProptestConfig { cases: 400, max_shrink_iters: 2_000, failure_persistence: None, ..ProptestConfig::default() };
    // The same storms in every run: new ones are the simulator's business.
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    // A law about fleets that never spend anything would prove nothing.
    let (spent, shared, moved) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let outcome = runner.run(&prop::collection::vec(step(), 50..400), |steps| {
        let mut storm = Storm::new(minute(), Mode::Strict, START, 1);
        for step in &steps {
            storm.apply(step);
            storm.check()?;
        }
        let spenders =
            |slice: &Window| storm.fleet.pods.iter().filter(|pod| pod.used(slice.start().unix_ms()) > 0).count();
        spent.set(spent.get() + u32::from(!storm.used.is_empty()));
        shared.set(shared.get() + u32::from(storm.used.keys().any(|slice| spenders(slice) > 1)));
        let gifts = |letter: &Letter| matches!(&letter.message, Some(Message::Row(row)) if !row.given.is_empty());
        moved.set(moved.get() + u32::from(storm.fleet.sent.iter().any(gifts)));
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
    assert!(spent.get() >= 300, "only {} of 400 storms spent anything", spent.get());
    assert!(shared.get() >= 150, "only {} of 400 storms had two spenders", shared.get());
    assert!(moved.get() >= 150, "only {} of 400 storms moved rights", moved.get());
}

/// The theorem of `elastic`: the same storms, and at most beta x limit more. The rights are
/// those of `strict`.
#[test]
fn an_elastic_limit_is_exceeded_by_beta_at_most() {
    let config =
        ProptestConfig { cases: 400, max_shrink_iters: 2_000, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    // A law about allowances that nobody ever spends would prove nothing.
    let (stretched, repaid) = (Cell::new(0), Cell::new(0));
    let outcome = runner.run(&prop::collection::vec(step(), 50..400), |steps| {
        let mut storm = Storm::new(minute(), Mode::Elastic { beta: Portion::percent(20) }, START, 1);
        for (place, step) in steps.iter().enumerate() {
            storm.apply(step);
            if place % 50 == 49 {
                storm.drain();
            }
            storm.check()?;
        }
        stretched.set(stretched.get() + u32::from(storm.used.values().any(|used| *used > LIMIT as i64)));
        let debt = |letter: &Letter| matches!(&letter.message, Some(Message::Request(request)) if request.kind == RequestKind::Debt);
        repaid.set(repaid.get() + u32::from(storm.fleet.sent.iter().any(debt)));
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
    assert!(stretched.get() >= 100, "only {} of 400 storms went over the limit at all", stretched.get());
    assert!(repaid.get() >= 200, "only {} of 400 storms asked for rights to a debt", repaid.get());
}

/// The law of `sum`: after every step, whatever was lost, repeated or came late, each replica
/// can spend exactly the limit less the margin less the use it knows of, and nobody has rights.
#[test]
fn the_wallet_of_a_sum_holds_what_the_known_use_leaves() {
    let config =
        ProptestConfig { cases: 400, max_shrink_iters: 2_000, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let (over, heard) = (Cell::new(0), Cell::new(0));
    let outcome = runner.run(&prop::collection::vec(step(), 50..400), |steps| {
        let mut storm = Storm::new(minute(), Mode::Sum { margin: Margin::Fixed(Portion::percent(10)) }, START, 1);
        for (place, step) in steps.iter().enumerate() {
            storm.apply(step);
            if place % 50 == 49 {
                storm.drain();
            }
            storm.check()?;
            for pod in storm.fleet.pods.iter().filter(|pod| pod.alive) {
                let standing = pod.handle.standings()[0];
                let left = (LIMIT - LIMIT / 10).saturating_sub(standing.used);
                prop_assert_eq!(standing.spendable, left, "{:?}", standing);
                prop_assert_eq!((pod.rights(storm.fleet.now_ms / MINUTE * MINUTE), standing.debt), (0, 0));
                let own = pod.used(storm.fleet.now_ms / MINUTE * MINUTE);
                heard.set(heard.get() + u32::from(standing.used > own && own > 0));
            }
        }
        over.set(over.get() + u32::from(storm.used.values().any(|used| *used > LIMIT as i64)));
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
    assert!(over.get() >= 300, "only {} of 400 storms went over", over.get());
    assert!(heard.get() >= 50_000, "only {} times had a spender heard of another", heard.get());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 2_000, ..ProptestConfig::default() })]

    /// Every reserved token is in exactly one place: held, settled as used, or refunded.
    #[test]
    fn every_reserved_token_is_conserved(steps in prop::collection::vec((0u8..4, 1u64..50, any::<prop::sample::Index>()), 0..200)) {
        let mut fleet = Fleet::new(Quota::tokens(LIMIT).per_minute(), START);
        let pod = fleet.start(0, Directory::Alone, RosterSettings::default());
        let handle = fleet.pods[pod].handle.clone();
        let mut model = 0u64; // The naive limiter: one number.
        let mut held: Vec<quotum::Permit<'_>> = Vec::new();
        for (kind, amount, index) in steps {
            match kind {
                0 | 1 => match handle.try_acquire(Claim::tokens(amount)) {
                    Ok(permit) => {
                        prop_assert!(model + amount <= LIMIT);
                        model += amount;
                        held.push(permit);
                    }
                    Err(_) => prop_assert!(model + amount > LIMIT, "a wrongful refusal"),
                },
                _ if held.is_empty() => {}
                2 => {
                    let permit = held.swap_remove(index.index(held.len()));
                    model -= permit.claim().amount(quotum::Unit::Tokens);
                    if amount % 2 == 0 { permit.refund() } else { drop(permit) }
                }
                _ => {
                    let mut permit = held.swap_remove(index.index(held.len()));
                    let reserved = permit.claim().amount(quotum::Unit::Tokens);
                    let actual = amount.min(reserved);
                    model -= reserved - actual;
                    permit.start();
                    permit.settle(actual);
                }
            }
            let standing = handle.standings()[0];
            prop_assert_eq!(standing.used, model);
            prop_assert_eq!(standing.used + standing.spendable, LIMIT);
        }
    }

    /// Merging rows is commutative, associative and idempotent: any order and repetition
    /// reads the same, and the same as a PN-counter of `crdts` reads.
    #[test]
    fn rows_merge_like_a_pn_counter(
        rows in prop::collection::vec((0u128..4, 0u64..1_000, 0u64..500, 1u64..50), 1..24),
        shuffled in Just(()).prop_perturb(|(), mut rng| rng.random::<u64>()),
        repeated in prop::collection::vec(any::<prop::sample::Index>(), 0..24),
    ) {
        let quota = Quota::tokens(1_000_000).per_minute();
        let rows: Vec<Row> = rows.into_iter().map(|(replica, reserved, refunded, version)| row(quota, replica, reserved, refunded.min(reserved), version)).collect();
        let mut oracle: PNCounter<u128> = PNCounter::new();
        for row in &rows {
            let mut up = oracle.inc_many(row.replica.bits(), 0);
            up.dot.counter = row.reserved;
            oracle.apply(up);
            let mut down = oracle.dec_many(row.replica.bits(), 0);
            down.dot.counter = row.refunded;
            oracle.apply(down);
        }
        let mut again = rows.clone();
        again.extend(repeated.iter().map(|index| index.get(&rows).clone()));
        let mut state = shuffled;
        for place in (1..again.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            again.swap(place, (state >> 33) as usize % (place + 1));
        }
        let expected = to_u64(oracle.read());
        prop_assert_eq!(standing_after(quota, Mode::Strict, &rows).used, expected);
        prop_assert_eq!(standing_after(quota, Mode::Strict, &again).used, expected);
        // The wallet of a sum follows the same number, refunds that come late among it.
        let sum = Mode::Sum { margin: Margin::Fixed(Portion::percent(10)) };
        for rows in [&rows, &again] {
            let standing = standing_after(quota, sum, rows);
            prop_assert_eq!((standing.used, standing.spendable), (expected, 900_000 - expected));
        }
    }
}

fn row(quota: Quota, replica: u128, reserved: u64, refunded: u64, version: u64) -> Row {
    Row {
        replica: ReplicaId::new(Timestamp::from_unix_ms(START), replica),
        key: Key { limit: LimitId::of(fleet::DEPLOYMENT), quota },
        window: WindowId::starting(Timestamp::from_unix_ms(START)),
        version,
        reserved,
        refunded,
        given: Vec::new(),
        spendable: 0,
        demand: 0,
        typical: 0,
    }
}

/// Feeds rows to a fresh ledger and returns where it stands then.
fn standing_after(quota: Quota, mode: Mode, rows: &[Row]) -> Standing {
    let clock = fleet::ManualClock::default();
    clock.set(START + 5_000);
    let limiter: Limiter = Limiter::builder()
        .deployment_with(fleet::DEPLOYMENT, [quota], Policy { mode, ..Policy::default() })
        .clock(clock)
        .seed(1)
        .build()
        .expect("valid");
    let from = ReplicaId::new(Timestamp::from_unix_ms(START), 99);
    limiter.with_ledger(|ledger, now| {
        ledger.handle_contact(Contact { from, sent_at: now, echo: None }, now);
        for row in rows {
            ledger.handle_message(from, Message::Row(row.clone()), now);
        }
    });
    limiter.handle(fleet::DEPLOYMENT).expect("configured").standings()[0]
}
