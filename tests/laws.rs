//! Laws of the ledger: what holds for every schedule, checked on schedules nobody chose.

mod fleet;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;

use crdts::{CmRDT, PNCounter};
use fleet::{Fleet, Letter, address};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use quotum::ledger::{
    Contact, Directory, FirstWindow, Key, LimitId, Message, OnSilence, ReplicaId, RequestKind, RosterSettings, Row,
    Timestamp, WindowId,
};
use quotum::{Claim, Limiter, Mode, Policy, Portion, Quota};

const MINUTE: u64 = 60_000;
const START: u64 = 1_000 * MINUTE;
const LIMIT: u64 = 100;

/// `crdts` reads counters as big integers; these are small.
fn to_u64(value: impl ToString) -> u64 {
    value.to_string().parse().expect("a small number")
}

/// One step of a schedule.
#[derive(Clone, Debug)]
enum Step {
    Pass(u64),
    Tick(usize),
    /// Delivers any message ever sent: late, early, twice, out of order.
    Deliver(prop::sample::Index),
    Heartbeat,
    /// Everybody ticks and everything arrives.
    Calm,
    Take(usize, u64),
    Settle(prop::sample::Index, u64),
    Kill(usize),
    Restart(usize),
    Start,
    Leave(usize),
    Ask(usize, u64),
    Forget(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => prop_oneof![Just(100u64), Just(1_000), Just(7_000), Just(20_000)].prop_map(Step::Pass),
        8 => (0usize..6).prop_map(Step::Tick),
        24 => any::<prop::sample::Index>().prop_map(Step::Deliver),
        6 => Just(Step::Heartbeat),
        2 => Just(Step::Calm),
        10 => (0usize..6, 1u64..60).prop_map(|(pod, amount)| Step::Take(pod, amount)),
        4 => (any::<prop::sample::Index>(), 0u64..60).prop_map(|(which, actual)| Step::Settle(which, actual)),
        1 => (0usize..6).prop_map(Step::Kill),
        1 => (0usize..6).prop_map(Step::Restart),
        1 => Just(Step::Start),
        1 => (0usize..6).prop_map(Step::Leave),
        3 => (0usize..6, 1u64..60).prop_map(|(pod, amount)| Step::Ask(pod, amount)),
        1 => (0usize..6).prop_map(Step::Forget),
    ]
}

/// A fleet under the conditions of the promise, whatever the schedule does.
struct Storm {
    fleet: Fleet,
    /// The most that may be reserved in a window.
    most: u64,
    slots: usize,
    /// Outstanding reservations: pod, window start, permit.
    held: Vec<(usize, u64, quotum::Permit<'static>)>,
    /// Reserved and not refunded, by window, as an observer outside counts it.
    used: BTreeMap<u64, i64>,
}

impl Storm {
    fn new(mode: Mode) -> Self {
        let mut fleet = Fleet::new(Quota::tokens(LIMIT).per_minute(), START + 1_000);
        fleet.policy.mode = mode;
        let most = LIMIT + mode.overshoot_bound(LIMIT).expect("a mode with a promise");
        for pod in 0..3 {
            let pod = fleet.start(pod, Directory::Name, Self::settings());
            let known: Vec<SocketAddr> = (0..=pod).map(address).collect();
            fleet.list(pod, &known);
        }
        // They join, and the storm begins in the first window that is theirs.
        fleet.run(3);
        fleet.pass(57_000);
        fleet.run(5);
        Self { fleet, most, slots: 3, held: Vec::new(), used: BTreeMap::new() }
    }

    fn settings() -> RosterSettings {
        RosterSettings { on_silence: OnSilence::Closed, first_window: FirstWindow::Wait, ..RosterSettings::default() }
    }

    fn window(&self) -> u64 {
        self.fleet.now_ms / MINUTE * MINUTE
    }

    fn pod(&self, pod: usize) -> Option<usize> {
        let alive: Vec<usize> = (0..self.fleet.pods.len()).filter(|pod| self.fleet.pods[*pod].alive).collect();
        (!alive.is_empty()).then(|| alive[pod % alive.len()])
    }

    /// Starts a process in a slot. The directory is complete: it lists every slot that
    /// was ever registered.
    fn start(&mut self, slot: usize) {
        if self.fleet.pods.len() < 12 {
            let pod = self.fleet.start(slot, Directory::Name, Self::settings());
            let known: Vec<SocketAddr> = (0..self.slots).map(address).collect();
            self.fleet.list(pod, &known);
        }
    }

    fn apply(&mut self, step: &Step) {
        let _ = self.fleet.collect();
        match step {
            Step::Pass(ms) => self.fleet.pass(*ms),
            Step::Tick(pod) => {
                if let Some(pod) = self.pod(*pod) {
                    self.fleet.pods[pod].limiter.with_ledger(|ledger, now| ledger.handle_tick(now));
                }
            }
            Step::Deliver(index) => {
                if !self.fleet.sent.is_empty() {
                    let letter: Letter = index.get(&self.fleet.sent).clone();
                    self.fleet.force(&letter);
                }
            }
            Step::Heartbeat => self.fleet.heartbeat(),
            Step::Calm => self.fleet.run(1),
            Step::Take(pod, amount) => _ = self.take(*pod, *amount),
            Step::Settle(index, actual) => {
                if !self.held.is_empty() {
                    let (_, window, permit) = self.held.swap_remove(index.index(self.held.len()));
                    // Never above the reservation: that is the promise's other clause.
                    let reserved = permit.claim().amount(quotum::Unit::Tokens);
                    let actual = (*actual).min(reserved);
                    let open = self.fleet.now_ms < window + 3 * MINUTE;
                    permit.settle(actual);
                    if open {
                        *self.used.entry(window).or_default() -= (reserved - actual) as i64;
                    }
                }
            }
            Step::Kill(pod) => {
                if let Some(pod) = self.pod(*pod) {
                    self.fleet.kill(pod);
                    // Its reservations stay charged for ever.
                    self.held.retain(|(holder, ..)| *holder != pod);
                }
            }
            Step::Restart(pod) => {
                let dead: Vec<usize> = (0..self.slots)
                    .filter(|slot| !self.fleet.pods.iter().any(|pod| pod.alive && pod.addr == address(*slot)))
                    .collect();
                if !dead.is_empty() {
                    self.fleet.pass(1);
                    self.start(dead[pod % dead.len()]);
                }
            }
            Step::Start => {
                if self.slots < 6 {
                    self.slots += 1;
                    self.start(self.slots - 1);
                }
            }
            Step::Leave(pod) => {
                if let Some(pod) = self.pod(*pod) {
                    self.fleet.pods[pod].limiter.with_ledger(|ledger, now| ledger.leave(now));
                }
            }
            Step::Ask(pod, amount) => {
                // A parked request asks for rights; the future is dropped, the question
                // is not.
                if let Some(pod) = self.pod(*pod) {
                    let handle = self.fleet.pods[pod].handle.clone();
                    let mut future = handle.acquire(Claim::tokens(*amount));
                    let wakes = std::sync::Arc::default();
                    if let std::task::Poll::Ready(Ok(permit)) = fleet::poll(&mut future, &wakes) {
                        self.hold(pod, permit.into_owned());
                    }
                }
            }
            Step::Forget(pod) => {
                // A sound proof only: of a replica that is dead.
                let dead = self.fleet.pods.iter().find(|pod| !pod.alive).map(|pod| pod.id.to_string());
                if let (Some(pod), Some(dead)) = (self.pod(*pod), dead) {
                    let _ = self.fleet.pods[pod].limiter.forget(&dead);
                }
            }
        }
    }

    fn take(&mut self, pod: usize, amount: u64) -> bool {
        let Some(pod) = self.pod(pod) else { return false };
        let handle = self.fleet.pods[pod].handle.clone();
        let Ok(mut permit) = handle.try_acquire(Claim::tokens(amount)) else { return false };
        permit.start();
        self.hold(pod, permit.into_owned());
        true
    }

    /// Everybody takes what it can get without asking.
    fn drain(&mut self) {
        for pod in 0..6 {
            while self.take(pod, 5) {}
        }
    }

    fn hold(&mut self, pod: usize, permit: quotum::Permit<'static>) {
        let mut permit = permit;
        permit.start();
        let amount = permit.claim().amount(quotum::Unit::Tokens);
        let window = self.window();
        *self.used.entry(window).or_default() += amount as i64;
        self.held.push((pod, window, permit));
    }

    fn check(&self) -> Result<(), TestCaseError> {
        for (window, used) in &self.used {
            prop_assert!(*used <= self.most as i64, "window {} has {} reserved of {}", window, used, self.most);
        }
        for window in self.used.keys() {
            let rights = self.fleet.rights(*window);
            prop_assert!(rights <= LIMIT, "window {} has rights {}", window, rights);
        }
        Ok(())
    }
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
        let mut storm = Storm::new(Mode::Strict);
        for step in &steps {
            storm.apply(step);
            storm.check()?;
        }
        let spenders = |window: &u64| storm.fleet.pods.iter().filter(|pod| pod.used(*window) > 0).count();
        spent.set(spent.get() + u32::from(!storm.used.is_empty()));
        shared.set(shared.get() + u32::from(storm.used.keys().any(|window| spenders(window) > 1)));
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
        let mut storm = Storm::new(Mode::Elastic { beta: Portion::percent(20) });
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
        prop_assert_eq!(used_after(quota, &rows), expected);
        prop_assert_eq!(used_after(quota, &again), expected);
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

/// Feeds rows to a fresh ledger and returns the use it knows of.
fn used_after(quota: Quota, rows: &[Row]) -> u64 {
    let clock = fleet::ManualClock::default();
    clock.set(START + 5_000);
    let limiter: Limiter = Limiter::builder()
        .deployment_with(fleet::DEPLOYMENT, [quota], Policy::default())
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
    limiter.handle(fleet::DEPLOYMENT).expect("configured").standings()[0].used
}
