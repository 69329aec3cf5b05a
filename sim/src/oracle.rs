//! The oracle: counts what every incarnation of every replica admitted, from outside.
//!
//! Knows permits, windows and limits. Must not know gossip, rights or who is alive. The
//! invariant it keeps: its counts come from permits that clients hold and from nothing that
//! the replicas say of themselves.

use std::collections::BTreeMap;

use quotum::{Quota, Unit};

use crate::Micros;
use crate::central::amount_of;
use crate::scenario::Promise;
use crate::workload::{End, Request};

/// What was found first to be wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) at: Micros,
    /// Which invariant.
    pub(crate) invariant: &'static str,
    pub(crate) text: String,
}

/// One (quota, window) over all incarnations.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    /// Reserved and not given back; never more than was reserved.
    pub(crate) reserved: i64,
    /// What responses used beyond their reservation.
    pub(crate) excess: i64,
    /// The most that `reserved` ever was over the limit.
    pub(crate) overshoot: i64,
    /// The most that `reserved + excess` ever was over the limit.
    pub(crate) uncovered: i64,
    /// What the upstream counts by arrival time.
    upstream: i64,
}

/// The oracle of one run.
#[derive(Debug)]
pub(crate) struct Oracle {
    quotas: Vec<Quota>,
    edge_ms: u64,
    promise: Promise,
    windows: BTreeMap<(usize, u64), Count>,
    /// By incarnation, quota and window: charged there.
    by_replica: BTreeMap<(usize, usize, u64), i64>,
    /// By incarnation, quota and window: given back there.
    given_back: BTreeMap<(usize, usize, u64), i64>,
    permits: BTreeMap<u64, Held>,
    /// Whether the upstream's count is checked: clocks are true.
    check_upstream: bool,
    pub(crate) violation: Option<Violation>,
    pub(crate) figures: Figures,
}

/// What a run has shown.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) windows: u64,
    pub(crate) admitted: u64,
    pub(crate) offered: u64,
    pub(crate) refused: u64,
    /// Refused although the fleet had enough.
    pub(crate) wrongful: u64,
    /// The same two, in the windows in which efficiency is measured.
    pub(crate) measured_offered: u64,
    pub(crate) measured_wrongful: u64,
    pub(crate) overshoot_max: i64,
    pub(crate) uncovered_max: i64,
    /// The largest part of the stated bound that was reached; 0 if the bound is zero.
    pub(crate) measured_over_bound: f64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    replica: usize,
    request: Request,
    /// When it was reserved, by the replica's clock.
    reserved_ms: u64,
}

impl Oracle {
    pub(crate) fn new(quotas: &[Quota], edge_ms: u64, promise: Promise, check_upstream: bool) -> Self {
        Self {
            quotas: quotas.to_vec(),
            edge_ms,
            promise,
            windows: BTreeMap::new(),
            by_replica: BTreeMap::new(),
            given_back: BTreeMap::new(),
            permits: BTreeMap::new(),
            check_upstream,
            violation: None,
            figures: Figures::default(),
        }
    }

    /// A client holds a permit.
    pub(crate) fn admitted(&mut self, at: Micros, replica: usize, permit: u64, request: &Request, reserved_ms: u64) {
        self.figures.admitted += 1;
        for (quota, window) in self.charged_windows(reserved_ms) {
            let amount = amount_of(self.quotas[quota].unit(), request, false);
            self.charge(at, replica, quota, window, amount, 0);
        }
        self.permits.insert(permit, Held { replica, request: *request, reserved_ms });
    }

    /// A client has settled, refunded or dropped its permit. `arrived_ms` is when the
    /// upstream had the request, by true time.
    pub(crate) fn ended(&mut self, at: Micros, permit: u64, end: End, arrived_ms: u64) {
        let Some(held) = self.permits.remove(&permit) else { return };
        for (quota, window) in self.charged_windows(held.reserved_ms) {
            let unit = self.quotas[quota].unit();
            let reserved = amount_of(unit, &held.request, false);
            let actual = match end {
                End::Settled => amount_of(unit, &held.request, true),
                End::Cancelled => 0,
                End::Unsettled => reserved,
            };
            self.charge(at, held.replica, quota, window, actual.min(reserved) - reserved, (actual - reserved).max(0));
        }
        if end != End::Cancelled {
            self.arrive(at, &held, end, arrived_ms);
        }
    }

    /// A client was refused. Returns whether the fleet had enough at that moment.
    pub(crate) fn refused(&mut self, request: &Request, replica_ms: u64) -> bool {
        self.figures.refused += 1;
        let enough = self.charged_windows(replica_ms).into_iter().all(|(quota, window)| {
            let count = self.windows.get(&(quota, window)).copied().unwrap_or_default();
            let amount = amount_of(self.quotas[quota].unit(), request, false);
            count.reserved + count.excess + amount <= self.quotas[quota].amount() as i64
        });
        self.figures.wrongful += u64::from(enough);
        enough
    }

    /// Records what is wrong, unless something was wrong before.
    pub(crate) fn violated(&mut self, at: Micros, invariant: &'static str, text: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(Violation { at, invariant, text: text() });
        }
    }

    /// Returns what one incarnation has charged in a window.
    pub(crate) fn charged_by(&self, replica: usize, quota: usize, window: u64) -> i64 {
        self.by_replica.get(&(replica, quota, window)).copied().unwrap_or(0)
    }

    /// Returns what one incarnation has given back in a window.
    pub(crate) fn given_back_by(&self, replica: usize, quota: usize, window: u64) -> i64 {
        self.given_back.get(&(replica, quota, window)).copied().unwrap_or(0)
    }

    /// Returns the count of one window.
    pub(crate) fn count(&self, quota: usize, window: u64) -> Count {
        self.windows.get(&(quota, window)).copied().unwrap_or_default()
    }

    /// Returns every window of the first quota with what was charged in it.
    pub(crate) fn first_quota(&self) -> impl Iterator<Item = (u64, i64)> + '_ {
        self.windows.range((0, 0)..(1, 0)).map(|((_, window), count)| (*window, count.reserved + count.excess))
    }

    /// Ends the run.
    pub(crate) fn finish(&mut self) {
        self.figures.windows = self.windows.len() as u64;
        for ((quota, _), count) in &self.windows {
            self.figures.overshoot_max = self.figures.overshoot_max.max(count.overshoot);
            self.figures.uncovered_max = self.figures.uncovered_max.max(count.uncovered - count.overshoot.max(0));
            let bound = self.promise.allows(self.quotas[*quota].amount());
            if bound > 0 {
                let part = count.overshoot as f64 / bound as f64;
                self.figures.measured_over_bound = self.figures.measured_over_bound.max(part);
            }
        }
    }

    /// Returns the windows that a reservation made at `ms` is charged to.
    pub(crate) fn charged_windows(&self, ms: u64) -> Vec<(usize, u64)> {
        let mut windows = Vec::with_capacity(4);
        for (index, quota) in self.quotas.iter().enumerate() {
            let length = quota.window().ms().get();
            let window = ms / length;
            windows.push((index, window));
            if ms + self.edge_ms >= (window + 1) * length {
                windows.push((index, window + 1));
            }
        }
        windows
    }

    fn charge(&mut self, at: Micros, replica: usize, quota: usize, window: u64, reserved: i64, excess: i64) {
        *self.by_replica.entry((replica, quota, window)).or_default() += reserved + excess;
        if reserved < 0 {
            *self.given_back.entry((replica, quota, window)).or_default() -= reserved;
        }
        let limit = self.quotas[quota].amount() as i64;
        let count = self.windows.entry((quota, window)).or_default();
        count.reserved += reserved;
        count.excess += excess;
        count.overshoot = count.overshoot.max(count.reserved - limit);
        count.uncovered = count.uncovered.max(count.reserved + count.excess - limit);
        let count = *count;
        let allowed = self.promise.allows(limit as u64) as i64;
        let unit = self.quotas[quota].unit();
        if count.reserved - limit > allowed {
            self.violated(at, "reservations", || {
                format!(
                    "{} {unit} reserved in window {window}, limit {limit}, {allowed} over allowed: {} over",
                    count.reserved,
                    count.reserved - limit
                )
            });
        }
        if count.reserved < 0 {
            self.violated(at, "reservations", || format!("{} {unit} reserved in window {window}", count.reserved));
        }
        // What is over is at most what was used above reservations (README, the promise).
        if count.reserved + count.excess - limit > count.excess + allowed {
            self.violated(at, "actual use", || {
                format!("{} {unit} used in window {window}, of {limit}", count.reserved + count.excess)
            });
        }
    }

    /// The upstream bins by arrival time; a request counts if transit and clock difference
    /// are within the edge.
    fn arrive(&mut self, at: Micros, held: &Held, end: End, arrived_ms: u64) {
        if !self.check_upstream || !(held.reserved_ms..=held.reserved_ms + self.edge_ms).contains(&arrived_ms) {
            return;
        }
        for quota in 0..self.quotas.len() {
            let unit = self.quotas[quota].unit();
            let window = arrived_ms / self.quotas[quota].window().ms().get();
            let reserved = amount_of(unit, &held.request, false);
            let used = if end == End::Settled { amount_of(unit, &held.request, true).min(reserved) } else { reserved };
            let count = self.windows.entry((quota, window)).or_default();
            count.upstream += used;
            let upstream = count.upstream;
            let limit = self.quotas[quota].amount();
            if upstream > (limit + self.promise.allows(limit)) as i64 {
                self.violated(at, "upstream's count", || {
                    format!("the upstream counts {upstream} {unit} in window {window}, limit {limit}")
                });
            }
        }
    }
}

/// Returns the position of a unit's quota.
pub(crate) fn quota_of(quotas: &[Quota], unit: Unit) -> Option<usize> {
    quotas.iter().position(|quota| quota.unit() == unit)
}
