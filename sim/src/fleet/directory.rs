//! The simulated directory: a growing order of registrations, and answers that are
//! snapshots of it.
//!
//! Knows who is registered since when. Must not know who is alive. The invariant it keeps:
//! an answer is the state of one moment, however old, unless a fault says that it lies.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use quotum::ledger::Directory;

use super::queue::Event;
use super::world::World;
use crate::Micros;
use crate::canary::Canary;

/// Everything that was ever registered or removed, in order.
#[derive(Debug, Default)]
pub(super) struct Registry {
    log: Vec<(Micros, SocketAddr, bool)>,
    /// How much older than usual answers are.
    pub(super) stale: Micros,
    pub(super) lies: bool,
}

impl Registry {
    pub(super) fn register(&mut self, addr: SocketAddr, at: Micros) {
        self.log.push((at, addr, true));
    }

    pub(super) fn remove(&mut self, addr: SocketAddr, at: Micros) {
        self.log.push((at, addr, false));
    }

    fn as_of(&self, at: Micros) -> Vec<SocketAddr> {
        let mut listed = BTreeSet::new();
        for (_, addr, added) in self.log.iter().take_while(|(when, ..)| *when <= at) {
            if *added {
                listed.insert(*addr);
            } else {
                listed.remove(addr);
            }
        }
        listed.into_iter().collect()
    }
}

/// The UDP port of every replica.
pub(super) const PORT: u16 = 7_946;

/// Returns the address of a slot.
pub(super) fn address(slot: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, (slot >> 8) as u8, slot as u8)), PORT)
}

impl World {
    /// A replica asks its directory, and will ask again.
    pub(super) fn lookup(&mut self, replica: usize) {
        if !self.replicas[replica].is_alive() {
            return;
        }
        let own = self.replicas[replica].addr;
        let answer = self.directory_answer(replica);
        self.with(replica, |ledger, now| ledger.handle_listing(&answer, now));
        if self.replicas[replica].behind_ms != 0 && answer.contains(&own) {
            self.replicas[replica].behind_ms = 0;
        }
        self.refresh_peers(replica);
        self.flush(replica);
        let pause = if self.replicas[replica].born + 2_000_000 > self.at { 100_000 } else { 1_000_000 };
        self.queue.push(self.at + pause, Event::Lookup { replica });
    }

    /// What the directory answers a replica now.
    pub(super) fn directory_answer(&mut self, replica: usize) -> Vec<SocketAddr> {
        let own = self.replicas[replica].addr;
        let mut answer = if self.plan.is_named() {
            let lag = self.pods_rng.below(self.plan.directory_lag + 1) + self.registry.stale;
            self.registry.as_of(self.at.saturating_sub(lag))
        } else {
            self.slots.clone()
        };
        let lies = self.registry.lies || self.options.canary == Some(Canary::IncompleteList);
        if lies && self.plan.settings.directory != Directory::Alone {
            let keep = self.pods_rng.below(3);
            answer.retain(|addr| *addr == own || keep == 2 || (u64::from(addr.port()) + keep) % 2 == 1);
        }
        self.trace.note(&[1, replica as u64, answer.len() as u64]);
        let count = answer.len();
        self.line(Some(replica), || format!("directory answers with {count} addresses"));
        answer
    }

    /// The headless name forgets an address, unless somebody has it again.
    pub(super) fn delist(&mut self, addr: SocketAddr) {
        if !self.by_addr.contains_key(&addr) {
            self.registry.remove(addr, self.at);
        }
    }
}
