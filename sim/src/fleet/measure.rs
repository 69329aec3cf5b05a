//! Efficiency: what was admitted against what central counters admit on the same arrivals.
//!
//! Knows when to compare what. Must not know how a replica decides. The invariant it keeps:
//! both sides count the same windows, in final charges.

use std::collections::BTreeMap;

use super::replica::EPOCH_MS;
use super::world::World;
use crate::Micros;
use crate::central::Central;
use crate::oracle::Oracle;
use crate::scenario::Plan;
use crate::workload::Request;

/// The counters that run beside a run.
#[derive(Debug)]
pub(super) struct Measure {
    /// Windows count that start after this.
    from: Micros,
    central: Central,
    cut: Option<Cut>,
    /// Admitted during the cut, really and by the components' counters.
    during_cut: Option<(i64, i64)>,
    offered: u64,
    wrongful: u64,
}

#[derive(Debug)]
struct Cut {
    central: Central,
    /// What had been charged when the cut came, by window.
    before: BTreeMap<u64, i64>,
    first_window: u64,
}

impl Measure {
    pub(super) fn new(plan: &Plan, from: Micros) -> Self {
        let central = Central::new(&plan.quotas, &plan.midnights, plan.edge.as_millis() as u64);
        Self { from, central, cut: None, during_cut: None, offered: 0, wrongful: 0 }
    }

    /// Returns what was admitted and what the undivided counter admits, by window.
    pub(super) fn windows(&self, oracle: &Oracle) -> Vec<(u64, i64, i64)> {
        let central = |window| self.central.admitted.get(&window).copied().unwrap_or(0);
        oracle.first_quota().map(|(window, sum)| (window, sum, central(window))).collect()
    }

    /// Returns efficiency against the undivided counter and against one per component.
    pub(super) fn results(mut self, oracle: &Oracle, plan: &Plan, end: Micros) -> (Option<f64>, Option<f64>) {
        self.central.settle_until(end);
        let ms = |at: Micros| EPOCH_MS + (plan.phase + at) / 1_000;
        // Of days the one in the middle: it is whole.
        let (from_ms, to_ms) = match plan.midnights[..] {
            [_, midnight, next, ..] => (midnight, next),
            _ => (ms(self.from), ms(end)),
        };
        if let (Some(mine), Some(theirs)) = (oracle.logged(from_ms, to_ms), self.central.logged(from_ms, to_ms)) {
            return ((theirs > 0).then(|| mine as f64 / theirs as f64), None);
        }
        let length = plan.quotas[0].window().ms().get();
        let start = |window: u64| (window * length).saturating_sub(EPOCH_MS) * 1_000;
        let counts =
            |window: u64| start(window) >= plan.phase + self.from && start(window) + length * 1_000 <= plan.phase + end;
        let admitted: i64 = oracle.first_quota().filter(|(window, _)| counts(*window)).map(|(_, sum)| sum).sum();
        let central: i64 =
            self.central.admitted.iter().filter(|(window, _)| counts(**window)).map(|(_, sum)| *sum).sum();
        let ratio = |(mine, theirs): (i64, i64)| (theirs > 0).then(|| mine as f64 / theirs as f64);
        (ratio((admitted, central)), self.during_cut.and_then(ratio))
    }
}

impl World {
    pub(super) fn measure_offer(&mut self, replica: usize, request: &Request) {
        let true_ms = self.true_ms();
        let component = self.links.component(self.replicas[replica].slot);
        let at = self.at;
        let Some(measure) = &mut self.measure else { return };
        measure.central.offer(request, 0, at, true_ms);
        if let Some(cut) = &mut measure.cut {
            cut.central.offer(request, component, at, true_ms);
        }
        if at >= measure.from + self.plan.window() {
            measure.offered += 1;
            self.oracle.figures.measured_offered = measure.offered;
        }
    }

    pub(super) fn measure_refusal(&mut self, wrongful: bool) {
        let window = self.plan.window();
        let Some(measure) = &mut self.measure else { return };
        if wrongful && self.at >= measure.from + window {
            measure.wrongful += 1;
            self.oracle.figures.measured_wrongful = measure.wrongful;
        }
    }

    /// Everybody has been told other limits: the counters have them from here on.
    pub(super) fn measure_change(&mut self, version: usize) {
        if let Some(measure) = &mut self.measure {
            measure.central.change(&self.versions[version]);
        }
    }

    /// The fleet falls apart: each component's counter starts with the rights in it.
    pub(super) fn measure_cut(&mut self) {
        if self.measure.as_ref().is_none_or(|measure| measure.cut.is_some() || measure.during_cut.is_some()) {
            return;
        }
        let mut rights: BTreeMap<(usize, usize, u64), i64> = BTreeMap::new();
        let mut heads: BTreeMap<usize, usize> = BTreeMap::new();
        let mut central = Central::new(&self.plan.quotas, &self.plan.midnights, self.plan.edge.as_millis() as u64);
        let mut flights = Vec::new();
        for number in 0..self.replicas.len() {
            let Some(process) = &self.replicas[number].process else { continue };
            let component = self.links.component(self.replicas[number].slot);
            *heads.entry(component).or_default() += 1;
            for (quota, window, owned) in self.rights_of(number) {
                let left = owned as i64 - self.oracle.charged_by(number, quota, window);
                *rights.entry((component, quota, window)).or_default() += left;
            }
            let pending = process.flights.values();
            flights.extend(pending.map(|flight| (component, flight.permit.reserved_at(), flight.request, flight.ends)));
        }
        let fleet: usize = heads.values().sum();
        let components = heads.keys().max().map_or(0, |most| most + 1);
        let parts = (0..components).map(|part| heads.get(&part).copied().unwrap_or(0) as f64 / fleet as f64).collect();
        central.divide(rights, parts);
        for (component, at, request, ends) in flights {
            central.expect(component, &request, at.unix_ms(), ends);
        }
        let first_window = self.true_ms() / self.plan.quotas[0].window().ms().get();
        let before = self.oracle.first_quota().collect();
        if let Some(measure) = &mut self.measure {
            measure.cut = Some(Cut { central, before, first_window });
        }
    }

    /// The fleet is whole again.
    pub(super) fn measure_heal(&mut self) {
        let at = self.at;
        let Some(measure) = &mut self.measure else { return };
        let Some(mut cut) = measure.cut.take() else { return };
        cut.central.settle_until(at);
        let counted = |window: &u64| *window >= cut.first_window;
        let mine: i64 = (self.oracle.first_quota())
            .filter(|(window, _)| counted(window))
            .map(|(window, sum)| sum - cut.before.get(&window).copied().unwrap_or(0))
            .sum();
        let theirs = cut.central.admitted.iter().filter(|(window, _)| counted(window)).map(|(_, sum)| *sum).sum();
        measure.during_cut = Some((mine, theirs));
    }
}
