//! The oracle: counts what every incarnation of every replica admitted, from outside.
//!
//! Knows permits, windows and limits. Must not know gossip, rights or who is alive. The
//! invariant it keeps: its counts come from permits that clients hold and from nothing that
//! the replicas say of themselves.

use std::collections::BTreeMap;

use quotum::ledger::{Timestamp, WindowKind};
use quotum::{Mode, Quota, Unit};

use crate::Micros;
use crate::central::amount_of;
use crate::fault::Fault;
use crate::promise::{Allowed, Log};
use crate::scenario::{Plan, Promise};
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
    mode: Mode,
    /// How far clocks are from true time.
    range_ms: u64,
    /// Every set of limits that was ever rolled out.
    versions: Vec<Version>,
    /// By quota and window; of other kinds than fixed by the slices in which replicas count,
    /// which say what belongs together and not what is promised.
    windows: BTreeMap<(usize, u64), Count>,
    /// What is promised of kinds other than fixed, by quota.
    logs: Vec<Option<Log>>,
    /// The same by arrival at the upstream.
    arrivals: Vec<Option<Log>>,
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
    /// The most over a limit, as a part of it; and the mean of that over all windows, or in
    /// kinds without windows over all reservations.
    pub(crate) over_limit_max: f64,
    pub(crate) over_limit_sum: f64,
    pub(crate) over_limit_count: u64,
}

impl Figures {
    /// Every figure as 64 bits, to be written down exactly.
    pub(crate) fn to_bits(self) -> [u64; 13] {
        [
            self.windows,
            self.admitted,
            self.offered,
            self.refused,
            self.wrongful,
            self.measured_offered,
            self.measured_wrongful,
            self.overshoot_max as u64,
            self.uncovered_max as u64,
            self.measured_over_bound.to_bits(),
            self.over_limit_max.to_bits(),
            self.over_limit_sum.to_bits(),
            self.over_limit_count,
        ]
    }

    pub(crate) fn from_bits(bits: [u64; 13]) -> Self {
        let [windows, admitted, offered, refused, wrongful, rest @ ..] = bits;
        let [measured_offered, measured_wrongful, overshoot, uncovered, bound, most, sum, count] = rest;
        Self {
            windows,
            admitted,
            offered,
            refused,
            wrongful,
            measured_offered,
            measured_wrongful,
            overshoot_max: overshoot as i64,
            uncovered_max: uncovered as i64,
            measured_over_bound: f64::from_bits(bound),
            over_limit_max: f64::from_bits(most),
            over_limit_sum: f64::from_bits(sum),
            over_limit_count: count,
        }
    }
}

/// One set of limits: all amounts of all quotas.
#[derive(Clone, Debug)]
struct Version {
    quotas: Vec<Quota>,
    /// Windows that start later may be counted in it, by true time.
    from_ms: u64,
    /// Windows that start later are not.
    until_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    replica: usize,
    request: Request,
    /// When it was reserved, by the replica's clock.
    reserved_ms: u64,
}

impl Oracle {
    pub(crate) fn new(plan: &Plan, check_upstream: bool) -> Self {
        let quotas = plan.quotas.clone();
        let logs = || quotas.iter().map(|quota| Log::of(quota, &plan.midnights)).collect();
        // A clock that is right at first may step.
        let steps = plan.faults.iter().any(|scheduled| matches!(scheduled.fault, Fault::ClockStep { .. }));
        Self {
            edge_ms: plan.edge.as_millis() as u64,
            promise: plan.promise,
            mode: plan.mode,
            range_ms: plan.clock_range_ms.max(if steps || plan.clock_range_ms > 0 { 1_900 } else { 0 }),
            versions: vec![Version { quotas: quotas.clone(), from_ms: 0, until_ms: u64::MAX }],
            windows: BTreeMap::new(),
            logs: logs(),
            arrivals: logs(),
            by_replica: BTreeMap::new(),
            given_back: BTreeMap::new(),
            permits: BTreeMap::new(),
            check_upstream,
            violation: None,
            figures: Figures::default(),
            quotas,
        }
    }

    /// From now on replicas are told other limits, one after the other.
    pub(crate) fn rolls_out(&mut self, quotas: &[Quota], true_ms: u64) {
        self.versions.push(Version { quotas: quotas.to_vec(), from_ms: true_ms, until_ms: u64::MAX });
    }

    /// Every replica has been told the limits with this number, or later ones: a window of
    /// before may still be running then, and the next one open already.
    pub(crate) fn rolled_out(&mut self, version: usize, true_ms: u64) {
        let longest = self.quotas.iter().map(|quota| quota.window().ms().get()).max().unwrap_or(0).max(2_000);
        for old in self.versions[..version].iter_mut().filter(|old| old.until_ms == u64::MAX) {
            old.until_ms = true_ms + self.range_ms + longest;
        }
    }

    /// Returns what is allowed of a quota in windows that start within these instants: the
    /// largest of all amounts that may be in force in one of them.
    fn allowed(&self, quota: usize, from_ms: u64, to_ms: u64) -> Allowed {
        // In `sum` nobody waits for a share: a process that starts with other limits goes by them in the window
        // that runs.
        let runs_ms = if self.mode.name() == "sum" { self.quotas[quota].window().ms().get() } else { 0 };
        let to_ms = to_ms + runs_ms + self.range_ms;
        let in_force = |version: &&Version| version.from_ms <= to_ms && version.until_ms >= from_ms;
        let all = self.versions.iter().filter(in_force).map(|version| Allowed::of(&version.quotas[quota]));
        all.reduce(Allowed::or).unwrap_or(Allowed::in_window(0))
    }

    /// Returns the most rights that may exist in a slice that starts then.
    pub(crate) fn most_rights(&self, quota: usize, start_ms: u64) -> u64 {
        let in_force = |version: &&Version| version.from_ms <= start_ms + self.range_ms && version.until_ms >= start_ms;
        let most = self.versions.iter().filter(in_force).map(|version| version.quotas[quota].largest_claim()).max();
        most.map_or(0, |most| most + self.promise.allows(most))
    }

    /// A client holds a permit.
    pub(crate) fn admitted(&mut self, at: Micros, replica: usize, permit: u64, request: &Request, reserved_ms: u64) {
        self.figures.admitted += 1;
        for (quota, window) in self.charged_windows(reserved_ms) {
            let amount = amount_of(self.quotas[quota].unit(), request, false);
            self.charge(at, replica, quota, window, amount, 0);
        }
        for quota in 0..self.quotas.len() {
            let amount = amount_of(self.quotas[quota].unit(), request, false);
            self.log(at, quota, reserved_ms, amount, false);
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
        for quota in 0..self.quotas.len() {
            let unit = self.quotas[quota].unit();
            let reserved = amount_of(unit, &held.request, false);
            let kept = match end {
                End::Settled => amount_of(unit, &held.request, true).min(reserved),
                End::Cancelled => 0,
                End::Unsettled => reserved,
            };
            if let Some(log) = &mut self.logs[quota] {
                log.add(held.reserved_ms, kept - reserved);
            }
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
            match (&self.logs[quota], self.quotas[quota].kind()) {
                (Some(log), WindowKind::Bucket { .. }) => {
                    log.over(replica_ms, self.allowed(quota, replica_ms, replica_ms)) + amount <= 0
                }
                _ => count.reserved + count.excess + amount <= self.most_rights(quota, replica_ms) as i64,
            }
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

    /// Returns what was charged of the first quota from one instant to another, if its kind
    /// is not fixed.
    pub(crate) fn logged(&self, from_ms: u64, to_ms: u64) -> Option<i64> {
        self.logs[0].as_ref().map(|log| log.sum(from_ms, to_ms))
    }

    /// Returns the local day of the first quota that an instant falls into.
    pub(crate) fn day(&self, quota: usize, ms: u64) -> Option<(u64, u64)> {
        self.logs[quota].as_ref().and_then(|log| log.day(ms))
    }

    /// Ends the run.
    pub(crate) fn finish(&mut self) {
        self.figures.windows = self.windows.len() as u64;
        for ((quota, _), count) in &self.windows {
            if self.logs[*quota].is_none() {
                self.figures.uncovered_max = self.figures.uncovered_max.max(count.uncovered - count.overshoot.max(0));
                self.figures.over_limit_sum += count.overshoot.max(0) as f64 / self.quotas[*quota].amount() as f64;
                self.figures.over_limit_count += 1;
            }
        }
    }

    /// Notes that so much over a limit was reserved, of what is allowed over it.
    fn note_over(&mut self, over: i64, limit: u64, bound: u64) {
        let figures = &mut self.figures;
        figures.overshoot_max = figures.overshoot_max.max(over);
        figures.over_limit_max = figures.over_limit_max.max(over as f64 / limit.max(1) as f64);
        if bound > 0 {
            figures.measured_over_bound = figures.measured_over_bound.max(over as f64 / bound as f64);
        }
    }

    /// Returns the windows that a reservation made at `ms` is charged to; of a sliding window
    /// and a bucket the slices.
    pub(crate) fn charged_windows(&self, ms: u64) -> Vec<(usize, u64)> {
        let mut windows = Vec::with_capacity(4);
        for (index, quota) in self.quotas.iter().enumerate() {
            let number = |ms: u64| match quota.kind() {
                WindowKind::Fixed => ms / quota.window().ms().get(),
                _ => quota.grid().window_at(Timestamp::from_unix_ms(ms)).number(),
            };
            windows.push((index, number(ms)));
            // A bucket has no border that could be crossed.
            let guarded = !matches!(quota.kind(), WindowKind::Bucket { .. });
            if guarded && number(ms + self.edge_ms) != number(ms) {
                windows.push((index, number(ms + self.edge_ms)));
            }
        }
        windows
    }

    /// Counts in an interval of a kind that is not fixed, and checks its promise.
    fn log(&mut self, at: Micros, quota: usize, ms: u64, amount: i64, arrived: bool) {
        let logs = if arrived { &mut self.arrivals } else { &mut self.logs };
        let Some(log) = &mut logs[quota] else { return };
        log.add(ms, amount);
        let reach = log.reach_ms();
        let allowed = self.allowed(quota, ms.saturating_sub(reach), ms + reach);
        let replicas = self.admitting(quota, ms.saturating_sub(reach), ms + reach);
        let promised = allowed.in_mode(self.mode, replicas).plus(|amount| self.promise.allows(amount));
        let logs = if arrived { &self.arrivals } else { &self.logs };
        let Some(log) = &logs[quota] else { return };
        let over = log.over(ms, allowed);
        let beyond = if promised == allowed { over } else { log.over(ms, promised) };
        if !arrived {
            let bound = (promised.amount + promised.burst) - (allowed.amount + allowed.burst);
            self.note_over(over, allowed.amount, bound);
            self.figures.over_limit_sum += over.max(0) as f64 / allowed.amount.max(1) as f64;
            self.figures.over_limit_count += 1;
        }
        let Some(log) = &self.logs[quota] else { return };
        if let Some((from_ms, to_ms)) = log.day(ms).filter(|_| !arrived && !self.quotas[quota].is_at_once()) {
            // A quarter at once and 144 equal steps, each at its start; by the fastest clock.
            let passed = ms + 2 * self.range_ms - from_ms;
            let steps = (passed * 144 / (to_ms - from_ms) + 1).min(144);
            let vested = (promised.amount as f64 * (0.25 + 0.75 * steps as f64 / 144.0) + 1e-6) as i64;
            let sum = log.sum(from_ms, to_ms);
            if sum > vested {
                self.violated(at, "a day vests", || {
                    format!("{sum} reserved when {vested} of {promised:?} have vested")
                });
            }
        }
        if beyond > 0 {
            let quota = self.quotas[quota];
            let invariant = match quota.kind() {
                _ if arrived => "upstream's count",
                WindowKind::Sliding { .. } => "every interval",
                WindowKind::Bucket { .. } => "the bucket never runs dry",
                _ => "every local day",
            };
            self.violated(at, invariant, || format!("{beyond} over {promised:?} around {ms} ms: {quota}"));
        }
    }

    /// Returns how many incarnations have charged a quota in windows between these instants.
    fn admitting(&self, quota: usize, from_ms: u64, to_ms: u64) -> u64 {
        if self.mode.name() != "sum" {
            return 1;
        }
        let number = |ms: u64| self.quotas[quota].grid().window_at(Timestamp::from_unix_ms(ms)).number();
        let windows = number(from_ms)..=number(to_ms);
        let mut replicas: Vec<usize> = (self.by_replica.keys())
            .filter(|(_, charged, window)| *charged == quota && windows.contains(window))
            .map(|(replica, ..)| *replica)
            .collect();
        replicas.dedup();
        replicas.len() as u64
    }

    fn charge(&mut self, at: Micros, replica: usize, quota: usize, window: u64, reserved: i64, excess: i64) {
        *self.by_replica.entry((replica, quota, window)).or_default() += reserved + excess;
        if reserved < 0 {
            *self.given_back.entry((replica, quota, window)).or_default() -= reserved;
        }
        let count = self.windows.entry((quota, window)).or_default();
        count.reserved += reserved;
        count.excess += excess;
        if count.reserved < 0 {
            let reserved = count.reserved;
            self.violated(at, "reservations", || format!("{reserved} reserved in window {window}"));
        }
        if self.logs[quota].is_some() {
            return; // Its promise is not about these windows.
        }
        let length = self.quotas[quota].window().ms().get();
        let allowed = self.allowed(quota, window * length, window * length).amount;
        let replicas = self.admitting(quota, window * length, window * length);
        let bound = Allowed::in_window(allowed).in_mode(self.mode, replicas).amount - allowed;
        let bound = bound + self.promise.allows(allowed);
        let limit = allowed as i64;
        let count = self.windows.entry((quota, window)).or_default();
        count.overshoot = count.overshoot.max(count.reserved - limit);
        count.uncovered = count.uncovered.max(count.reserved + count.excess - limit);
        let count = *count;
        self.note_over(count.reserved - limit, allowed, bound);
        let allowed = bound as i64;
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
            if self.arrivals[quota].is_some() {
                self.log(at, quota, arrived_ms, used, true);
                continue;
            }
            let count = self.windows.entry((quota, window)).or_default();
            count.upstream += used;
            let upstream = count.upstream;
            let length = self.quotas[quota].window().ms().get();
            let limit = self.allowed(quota, window * length, window * length);
            let replicas = self.admitting(quota, window * length, window * length);
            let limit = limit.in_mode(self.mode, replicas).plus(|amount| self.promise.allows(amount)).amount;
            if upstream > limit as i64 {
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
