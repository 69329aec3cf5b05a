//! A central counter with zero delay, on the same arrivals: what efficiency is measured
//! against.
//!
//! Knows limits and arrivals. Must not know replicas; where the fleet is split it is one
//! counter for each component. The invariant it keeps: it charges by the rule the replicas
//! follow, the edge guard included, so that a difference is the price of having no centre.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use quotum::{Quota, Unit};

use crate::Micros;
use crate::promise::{Allowed, Log};
use crate::workload::{End, Request};

/// One counter, or one for each component.
#[derive(Debug)]
pub(crate) struct Central {
    quotas: Vec<Quota>,
    /// Of the same kind, where that is not fixed: a log that forgets nothing, a bucket that
    /// refills continuously, local days.
    logs: Vec<Option<Log>>,
    edge_ms: u64,
    /// What is left, by component, quota and window.
    left: BTreeMap<(usize, usize, u64), i64>,
    /// What a component starts a window with, as a part of the limit.
    parts: Vec<f64>,
    settlements: BinaryHeap<Reverse<Settlement>>,
    order: u64,
    /// Charged in the end, by window of the first quota.
    pub(crate) admitted: BTreeMap<u64, i64>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Settlement {
    at: Micros,
    order: u64,
    component: usize,
    quota: usize,
    /// The window's number, or the instant of the reservation where there is a log.
    window: u64,
    /// Given back; negative is charged in addition.
    back: i64,
}

impl Central {
    pub(crate) fn new(quotas: &[Quota], midnights: &[u64], edge_ms: u64) -> Self {
        Self {
            quotas: quotas.to_vec(),
            logs: quotas.iter().map(|quota| Log::of(quota, midnights)).collect(),
            edge_ms,
            left: BTreeMap::new(),
            parts: vec![1.0],
            settlements: BinaryHeap::new(),
            order: 0,
            admitted: BTreeMap::new(),
        }
    }

    /// Divides the counter: `rights` are what each component holds of open windows, by
    /// (component, quota, window); `parts` what it starts later windows with.
    pub(crate) fn divide(&mut self, rights: BTreeMap<(usize, usize, u64), i64>, parts: Vec<f64>) {
        self.settlements.clear();
        self.left = rights;
        self.parts = parts;
        self.admitted.clear();
    }

    /// Offers a request at `now_ms`, by the clock that cuts windows.
    pub(crate) fn offer(&mut self, request: &Request, component: usize, at: Micros, now_ms: u64) -> bool {
        self.settle_until(at);
        let mut charges = Vec::with_capacity(4);
        for (index, quota) in self.quotas.iter().enumerate() {
            if self.logs[index].is_some() {
                charges.push((index, now_ms, amount_of(quota.unit(), request, false)));
                continue;
            }
            let length = quota.window().ms().get();
            let window = now_ms / length;
            let amount = amount_of(quota.unit(), request, false);
            let ahead = u64::from(now_ms + self.edge_ms >= (window + 1) * length);
            for window in window..=window + ahead {
                charges.push((index, window, amount));
            }
        }
        let covered = charges.iter().all(|(quota, window, amount)| match &self.logs[*quota] {
            Some(log) => log.over(now_ms, Allowed::of(&self.quotas[*quota])) + amount <= 0,
            None => self.left(component, *quota, *window) >= *amount,
        });
        if !covered {
            return false;
        }
        for (quota, window, amount) in charges {
            match &mut self.logs[quota] {
                Some(log) => log.add(window, amount),
                None => *self.left.entry((component, quota, window)).or_default() -= amount,
            }
            if quota == 0 && self.logs[0].is_none() {
                *self.admitted.entry(window).or_default() += amount;
            }
            let back = match request.end {
                End::Settled => amount - amount_of(self.quotas[quota].unit(), request, true),
                End::Cancelled => amount,
                End::Unsettled => 0,
            };
            if back != 0 {
                self.order += 1;
                let at = at + request.hold;
                self.settlements.push(Reverse(Settlement { at, order: self.order, component, quota, window, back }));
            }
        }
        true
    }

    /// Expects the end of a request that was admitted at `reserved_ms`, before the counters
    /// were divided.
    pub(crate) fn expect(&mut self, component: usize, request: &Request, reserved_ms: u64, ends: Micros) {
        for quota in 0..self.quotas.len() {
            let unit = self.quotas[quota].unit();
            let length = self.quotas[quota].window().ms().get();
            let first = reserved_ms / length;
            let amount = amount_of(unit, request, false);
            let back = match request.end {
                End::Settled => amount - amount_of(unit, request, true),
                End::Cancelled => amount,
                End::Unsettled => 0,
            };
            for window in first..=first + u64::from(reserved_ms + self.edge_ms >= (first + 1) * length) {
                self.order += 1;
                self.settlements.push(Reverse(Settlement {
                    at: ends,
                    order: self.order,
                    component,
                    quota,
                    window,
                    back,
                }));
            }
        }
    }

    /// Limits change, for all at once.
    pub(crate) fn change(&mut self, quotas: &[Quota]) {
        self.quotas = quotas.to_vec();
    }

    /// Returns what was charged of the first quota from one instant to another, if its kind
    /// is not fixed.
    pub(crate) fn logged(&self, from_ms: u64, to_ms: u64) -> Option<i64> {
        self.logs[0].as_ref().map(|log| log.sum(from_ms, to_ms))
    }

    /// Settles everything that ends before `at`.
    pub(crate) fn settle_until(&mut self, at: Micros) {
        while self.settlements.peek().is_some_and(|Reverse(next)| next.at <= at) {
            let Some(Reverse(next)) = self.settlements.pop() else { break };
            if let Some(log) = &mut self.logs[next.quota] {
                log.add(next.window, -next.back);
                continue;
            }
            *self.left.entry((next.component, next.quota, next.window)).or_default() += next.back;
            if next.quota == 0 {
                *self.admitted.entry(next.window).or_default() -= next.back;
            }
        }
    }

    fn left(&mut self, component: usize, quota: usize, window: u64) -> i64 {
        let start = (self.quotas[quota].amount() as f64 * self.parts.get(component).copied().unwrap_or(0.0)) as i64;
        *self.left.entry((component, quota, window)).or_insert(start)
    }
}

/// Returns what a request reserves, or uses in the end, of a unit.
pub(crate) fn amount_of(unit: Unit, request: &Request, actual: bool) -> i64 {
    let output = if actual { request.output } else { request.reserved_output };
    (match unit {
        Unit::Tokens => request.prompt + output,
        Unit::Requests => 1,
        Unit::InputTokens => request.prompt,
        Unit::OutputTokens => output,
    }) as i64
}
