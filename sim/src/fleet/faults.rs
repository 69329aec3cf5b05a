//! Faults happen, and end.
//!
//! Knows how to break and mend this layer's world. Must not know why. The invariant it
//! keeps: whatever a fault breaks it mends when it ends, except lives; and a clock stays
//! within the range that the plan states.

use std::net::{IpAddr, SocketAddr};

use super::queue::Event;
use super::world::World;
use crate::Micros;
use crate::fault::Fault;

/// Returns the slot of an address.
pub(super) fn slot_of(addr: SocketAddr) -> Option<usize> {
    match addr.ip() {
        IpAddr::V4(ip) => {
            let [_, _, high, low] = ip.octets();
            Some(usize::from(high) << 8 | usize::from(low))
        }
        IpAddr::V6(_) => None,
    }
}

impl World {
    pub(super) fn begin_fault(&mut self, fault: usize) {
        let scheduled = self.plan.faults[fault].clone();
        self.trace.note(&[11, fault as u64]);
        self.line(None, || format!("begins: {:?}", scheduled.fault));
        self.reach(scheduled.fault.kind());
        match scheduled.fault {
            Fault::Loss(probability) => self.links.loss = probability,
            Fault::Delay(by) => self.links.delay = by,
            Fault::Reorder(by) => self.links.reorder = by,
            Fault::Duplicate(probability) => self.links.duplicate = probability,
            Fault::Replay(probability) => self.links.replay = probability,
            Fault::Garbage(probability) => self.links.garbage = probability,
            Fault::OtherVersions(probability) => self.links.other_versions = probability,
            Fault::OneWay { from, to } => self.links.one_way.push((from, to)),
            Fault::Split { ways, salt } => {
                self.links.splits.push((ways, salt));
                let window = self.plan.window();
                if (self.plan.phase + self.at) / window < (self.plan.phase + scheduled.until) / window {
                    self.reach("split during a roll");
                }
                self.measure_cut();
            }
            Fault::Flap { slot, period } => self.links.flaps.push((slot, period)),
            Fault::Slow { slot, by } => self.links.slow.push((slot, by)),
            Fault::Pause { slot } => self.pause(slot, true),
            Fault::ClockStep { slot, ms } => self.step_clock(slot, ms),
            Fault::StaleDirectory(by) => self.registry.stale = by,
            Fault::LyingDirectory => self.registry.lies = true,
            Fault::Limits { percent, pause } => self.roll_out(percent, pause),
            Fault::Crowd { slot } => self.crowd(slot),
            Fault::UpstreamAway { upstream, only_answers } => self.cut_upstream(upstream, only_answers, true),
            Fault::UpstreamFails { upstream, with } => self.fail_upstream(upstream, with),
            fault => self.begin_death(fault),
        }
    }

    fn begin_death(&mut self, fault: Fault) {
        match fault {
            Fault::Crash { slot, down, same_slot } => {
                if let Some(replica) = self.at_slot(slot) {
                    self.die(replica);
                    if let Some(down) = down {
                        let slot = if same_slot { slot } else { self.new_slot() };
                        self.queue.push(self.at + down, Event::Start { slot });
                    }
                }
            }
            Fault::Replace { slot, same_slot } => self.replace(slot, same_slot),
            Fault::Rolling { pause, same_slot } => {
                let slots = self.replicas.iter().filter(|replica| replica.serves()).map(|replica| replica.slot);
                let slots = slots.collect();
                self.roll_on(slots, pause, same_slot);
            }
            Fault::Scale { to } => self.scale(to),
            Fault::AllDie { down } => {
                let alive: Vec<usize> = (0..self.replicas.len()).filter(|at| self.replicas[*at].is_alive()).collect();
                let elsewhere = self.plan.is_named() && down % 2 == 0;
                for replica in alive {
                    self.die(replica);
                    let slot = if elsewhere { self.new_slot() } else { self.replicas[replica].slot };
                    let later = self.pods_rng.below(300_000);
                    self.queue.push(self.at + down + later, Event::Start { slot });
                }
            }
            Fault::ForgetAlive { slot } => {
                let Some(victim) = self.at_slot(slot) else { return };
                let id = self.replicas[victim].id.to_string();
                for replica in (0..self.replicas.len()).filter(|replica| *replica != victim) {
                    self.with(replica, |ledger, now| {
                        let _ = ledger.forget(&id, now);
                    });
                }
            }
            _ => {}
        }
    }

    pub(super) fn finish_fault(&mut self, fault: usize) {
        let scheduled = self.plan.faults[fault].clone();
        self.trace.note(&[12, fault as u64]);
        self.line(None, || format!("ends: {:?}", scheduled.fault));
        match scheduled.fault {
            Fault::Loss(_) => self.links.loss = 0.0,
            Fault::Delay(_) => self.links.delay = 0,
            Fault::Reorder(_) => self.links.reorder = 0,
            Fault::Duplicate(_) => self.links.duplicate = 0.0,
            Fault::Replay(_) => self.links.replay = 0.0,
            Fault::Garbage(_) => self.links.garbage = 0.0,
            Fault::OtherVersions(_) => self.links.other_versions = 0.0,
            Fault::OneWay { from, to } => remove(&mut self.links.one_way, &(from, to)),
            Fault::Split { ways, salt } => {
                self.measure_heal();
                remove(&mut self.links.splits, &(ways, salt));
            }
            Fault::Flap { slot, period } => remove(&mut self.links.flaps, &(slot, period)),
            Fault::Slow { slot, by } => remove(&mut self.links.slow, &(slot, by)),
            Fault::Pause { slot } => self.pause(slot, false),
            Fault::StaleDirectory(_) => self.registry.stale = 0,
            Fault::LyingDirectory => self.registry.lies = false,
            Fault::Scale { .. } => self.scale(self.plan.slots),
            Fault::UpstreamAway { upstream, only_answers } => self.cut_upstream(upstream, only_answers, false),
            Fault::UpstreamFails { upstream, .. } => self.fail_upstream(upstream, ""),
            _ => {}
        }
    }

    /// The replica that runs in a slot.
    pub(super) fn at_slot(&self, slot: usize) -> Option<usize> {
        self.slots.get(slot).and_then(|addr| self.by_addr.get(addr)).copied()
    }

    fn new_slot(&mut self) -> usize {
        self.slots.push(super::directory::address(self.slots.len()));
        self.slots.len() - 1
    }

    fn pause(&mut self, slot: usize, paused: bool) {
        for replica in self.replicas.iter_mut().filter(|replica| replica.slot == slot) {
            replica.paused = paused;
            replica.free_since = self.at;
        }
        if let Some((pods, addr)) = self.pods.as_mut().zip(self.slots.get(slot)) {
            pods.set_stuck(*addr, paused && self.by_addr.contains_key(addr));
        }
    }

    fn step_clock(&mut self, slot: usize, ms: i64) {
        let range = self.plan.clock_range_ms.max(1_900) as i64;
        if let Some(replica) = self.at_slot(slot) {
            let offset = &mut self.replicas[replica].offset_ms;
            *offset = (*offset + ms).clamp(-range, range);
        }
    }

    /// One leaves, another comes: after it in the same slot, before it in a new one.
    fn replace(&mut self, slot: usize, same_slot: bool) {
        let Some(replica) = self.at_slot(slot) else { return };
        if !self.replicas[replica].serves() {
            return;
        }
        if same_slot {
            self.replicas[replica].respawns = true;
        } else {
            let slot = self.new_slot();
            self.start(slot);
        }
        self.leave(replica);
    }

    pub(super) fn roll_on(&mut self, mut slots: Vec<usize>, pause: Micros, same_slot: bool) {
        if slots.is_empty() {
            return;
        }
        let slot = slots.remove(0);
        self.replace(slot, same_slot);
        self.queue.push(self.at + pause, Event::Roll { slots, pause, same_slot });
    }

    fn scale(&mut self, to: usize) {
        let serving: Vec<usize> = (0..self.replicas.len()).filter(|at| self.replicas[*at].serves()).collect();
        for _ in serving.len()..to {
            let slot = self.new_slot();
            let later = self.pods_rng.below(1_000_000);
            self.queue.push(self.at + later, Event::Start { slot });
        }
        for replica in serving.into_iter().skip(to) {
            self.leave(replica);
        }
    }
}

fn remove<T: PartialEq>(from: &mut Vec<T>, what: &T) {
    if let Some(place) = from.iter().position(|entry| entry == what) {
        from.remove(place);
    }
}
