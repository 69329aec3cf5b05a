//! Schedules nobody chose, for a fleet under the conditions of the promise.
//!
//! Knows what may happen, and what an observer outside counts. Must not know how the ledger
//! counts.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use proptest::prelude::*;
use quotum::ledger::{Directory, FirstWindow, OnSilence, RosterSettings, Timestamp, Window};
use quotum::{Claim, Mode, Quota};

use super::{Fleet, Letter, address, poll};

/// One step of a schedule.
#[derive(Clone, Debug)]
pub enum Step {
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

pub fn step() -> impl Strategy<Value = Step> {
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

/// How many processes one storm starts at most.
const MOST_PODS: usize = 12;

/// A fleet under the conditions of the promise, whatever the schedule does.
#[derive(Debug)]
pub struct Storm {
    pub fleet: Fleet,
    /// How much more than its rights a slice may use, over all replicas.
    allowance: u64,
    slots: usize,
    /// By how much longer than written a step lets time pass.
    scale: u64,
    /// Outstanding reservations: pod, slice, permit.
    held: Vec<(usize, Window, quotum::Permit<'static>)>,
    /// Reserved and not refunded, by slice, as an observer outside counts it.
    pub used: BTreeMap<Window, i64>,
}

impl Storm {
    /// Three pods, joined shortly before the slice after the one at `start_ms` ends.
    pub fn new(quota: Quota, mode: Mode, start_ms: u64, scale: u64) -> Self {
        let mut fleet = Fleet::new(quota, start_ms + 1_000);
        fleet.policy.mode = mode;
        // A slice is looked at like a window of its own.
        let slice = Quota::tokens(quota.largest_claim()).per_minute();
        let allowance = mode.overshoot_bound(slice, MOST_PODS as u64).expect("a mode with a promise");
        for pod in 0..3 {
            let pod = fleet.start(pod, Directory::Name, Self::settings());
            let known: Vec<SocketAddr> = (0..=pod).map(address).collect();
            fleet.list(pod, &known);
        }
        // They join, and the storm begins when their first shares are dealt.
        fleet.run(3);
        fleet.pass(57_000 * scale);
        fleet.run(5);
        Self { fleet, allowance, slots: 3, scale, held: Vec::new(), used: BTreeMap::new() }
    }

    fn settings() -> RosterSettings {
        RosterSettings { on_silence: OnSilence::Closed, first_window: FirstWindow::Wait, ..RosterSettings::default() }
    }

    fn slice(&self) -> Window {
        self.fleet.quota.grid().window_at(Timestamp::from_unix_ms(self.fleet.now_ms))
    }

    fn pod(&self, pod: usize) -> Option<usize> {
        let alive: Vec<usize> = (0..self.fleet.pods.len()).filter(|pod| self.fleet.pods[*pod].alive).collect();
        (!alive.is_empty()).then(|| alive[pod % alive.len()])
    }

    /// Starts a process in a slot. The directory is complete: it lists every slot that
    /// was ever registered.
    fn start(&mut self, slot: usize) {
        if self.fleet.pods.len() < MOST_PODS {
            let pod = self.fleet.start(slot, Directory::Name, Self::settings());
            let known: Vec<SocketAddr> = (0..self.slots).map(address).collect();
            self.fleet.list(pod, &known);
        }
    }

    pub fn apply(&mut self, step: &Step) {
        let _ = self.fleet.collect();
        match step {
            Step::Pass(ms) => self.fleet.pass(*ms * self.scale),
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
                    let (_, slice, permit) = self.held.swap_remove(index.index(self.held.len()));
                    // Never above the reservation: that is the promise's other clause.
                    let reserved = permit.claim().amount(quotum::Unit::Tokens);
                    let actual = (*actual).min(reserved);
                    permit.settle(actual);
                    *self.used.entry(slice).or_default() -= (reserved - actual) as i64;
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
                    if let std::task::Poll::Ready(Ok(permit)) = poll(&mut future, &wakes) {
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
    pub fn drain(&mut self) {
        for pod in 0..6 {
            while self.take(pod, 5) {}
        }
    }

    fn hold(&mut self, pod: usize, permit: quotum::Permit<'static>) {
        let mut permit = permit;
        permit.start();
        let amount = permit.claim().amount(quotum::Unit::Tokens);
        let slice = self.slice();
        *self.used.entry(slice).or_default() += amount as i64;
        self.held.push((pod, slice, permit));
    }

    /// The promise of the quota's kind, by the observer's count.
    pub fn check(&self) -> Result<(), TestCaseError> {
        let quota = self.fleet.quota;
        // A right of a slice can be spent in `lifetime` slices, so use in some slices in a
        // row comes from those and from the ones whose rights still lived at their start.
        let (lifetime, most) = (quota.lifetime() as i64, quota.largest_claim() as i64);
        let allowance = self.allowance as i64;
        for first in self.used.keys() {
            let mut sum = 0;
            for (last, used) in self.used.range(first..) {
                sum += used;
                let slices = (last.number() - first.number()) as i64 + lifetime;
                let bound = slices * (most + allowance) / lifetime;
                prop_assert!(sum <= bound, "{sum} reserved from {first:?} to {last:?} of {bound}");
            }
        }
        if lifetime == 1 {
            for slice in self.used.keys() {
                let rights = self.fleet.rights(slice.start().unix_ms());
                prop_assert!(rights as i64 <= most, "{slice:?} has rights {rights}");
            }
        }
        Ok(())
    }
}
