//! Limits that change while the fleet runs, slot by slot.
//!
//! Knows which limits a slot has been told. Must not know when a replica switches. The
//! invariant it keeps: the oracle is told before the first replica and after the last one.

use std::time::Duration;

use quotum::ledger::{OnSilence, Slot, WindowKind};
use quotum::{Builder, Limiter, Policy, Quota};

use super::lives::{DEPLOYMENT, known};
use super::queue::Event;
use super::world::World;
use crate::Micros;
use crate::canary::{self, Canary};

impl World {
    /// Which limits a process in a slot starts with.
    pub(super) fn version_of(&self, slot: usize) -> usize {
        let first = if slot < self.plan.slots { 0 } else { self.versions.len() - 1 };
        self.told.get(&slot).copied().unwrap_or(first)
    }

    /// What a limiter is built of, or reconfigured to.
    pub(super) fn deployments(&self, version: usize) -> Builder {
        if let Some(builder) = self.pods.as_ref().and_then(|pods| pods.configured()) {
            return builder;
        }
        let guarded = self.options.canary != Some(Canary::NoEdgeGuard);
        let edge = if guarded { self.plan.edge } else { Duration::ZERO };
        let mode = canary::mode(self.options.canary, self.plan.mode);
        let policy = Policy { wait: self.plan.wait, edge, mode, ..Policy::default() };
        let quotas = &self.versions[version];
        let builder = Limiter::builder();
        if self.plan.unknown {
            let builder = builder.deployment(known(false), [Quota::requests(1).per_second()]);
            if quotas.is_empty() {
                return builder;
            }
            return builder.deployment_with(DEPLOYMENT, quotas.iter().copied(), policy);
        }
        let quotas = quotas.iter().map(|quota| canary::quota(self.options.canary, *quota));
        builder.deployment_with(DEPLOYMENT, quotas, policy)
    }

    /// All slots are told new limits, one after the other.
    pub(super) fn roll_out(&mut self, percent: u64, pause: Micros) {
        let quotas: Vec<Quota> = self.plan.quotas.iter().map(|quota| scaled(*quota, percent)).collect();
        self.oracle.rolls_out(&quotas, self.true_ms());
        // Slots that come later know only the latest, earlier ones what they were told.
        for slot in 0..self.slots.len() {
            let version = self.version_of(slot);
            self.told.insert(slot, version);
        }
        self.versions.push(quotas);
        let version = self.versions.len() - 1;
        for slot in 0..self.slots.len() {
            self.queue.push(self.at + 1 + slot as Micros * pause, Event::Reconfigure { slot, version });
        }
    }

    /// The process in a slot is told other limits, unless it knows later ones.
    pub(super) fn reconfigure(&mut self, slot: usize, version: usize) {
        if self.version_of(slot) >= version {
            return;
        }
        self.told.insert(slot, version);
        self.trace.note(&[13, slot as u64, version as u64]);
        if let Some(replica) = self.at_slot(slot) {
            self.reconfigure_replica(replica, version);
        }
        if (0..self.slots.len()).all(|slot| self.version_of(slot) >= version) {
            self.reach("limits changed everywhere");
            let true_ms = self.true_ms();
            self.oracle.rolled_out(version, true_ms);
            self.measure_change(version);
        }
    }

    fn reconfigure_replica(&mut self, replica: usize, version: usize) {
        self.line(Some(replica), || format!("is told limits {version}"));
        self.last_told = Some(self.at);
        self.set_clock(replica);
        match self.options.canary {
            Some(Canary::OldLimitKept) if replica == 0 => return,
            Some(Canary::ShareInTwoVersions | Canary::SwitchInsideAWindow) => {
                return self.reconfigure_wrongly(replica, version);
            }
            _ => {}
        }
        let builder = self.deployments(version);
        let Some(process) = &mut self.replicas[replica].process else { return };
        process.limiter = process.limiter.reconfigure(builder).expect("a plan's quotas can be built");
        // A handle from before stays good, and some pods keep theirs.
        if replica.is_multiple_of(2) || !process.knows {
            process.handle = process.limiter.handle(DEPLOYMENT).expect("it was just configured");
        }
        process.knows = true;
        self.flush(replica);
    }
}

impl World {
    /// Bugs: the old limiter goes on beside one with the new limits, or is replaced by it,
    /// which takes a share of the running window.
    fn reconfigure_wrongly(&mut self, replica: usize, version: usize) {
        let inside = self.options.canary == Some(Canary::SwitchInsideAWindow);
        let Some(process) = &self.replicas[replica].process else { return };
        let clock = process.clock.clone();
        let id = self.replicas[replica].id;
        let addr = self.replicas[replica].addr;
        let slot = Slot { node: format!("node-{}", addr.ip()).into(), addr, exclusive: self.plan.exclusive };
        let mut settings = self.plan.settings;
        if inside {
            settings.on_silence = OnSilence::FairShare;
            settings.patience = Duration::ZERO;
        }
        let now = self.set_clock(replica);
        clock.set(now - if inside { 30_000 } else { 0 });
        let next = self.limiter(&clock, version);
        next.attach(id, slot, settings, self.plan.interval).expect("a new limiter");
        clock.set(now);
        let Some(process) = &mut self.replicas[replica].process else { return };
        let lookup: Vec<_> = self.by_addr.keys().copied().collect();
        next.with_ledger(|ledger, now| ledger.handle_listing(&lookup, now));
        if inside {
            process.handle = next.handle(DEPLOYMENT).expect("it was just built");
            process.limiter = next;
        } else {
            process.twin = Some(next);
        }
    }
}

/// The same quota with another amount; a bucket keeps its burst.
fn scaled(quota: Quota, percent: u64) -> Quota {
    let amount = (quota.amount() * percent / 100).max(1);
    let other = Quota::new(quota.unit(), amount, quota.window().duration()).expect("in range");
    let other = if quota.is_at_once() { other.at_once() } else { other };
    match quota.kind() {
        WindowKind::Bucket { .. } => quota,
        kind => other.of_kind(kind).unwrap_or(quota),
    }
}
