//! The simulated network: parcels become datagrams that are late, lost, repeated.
//!
//! Knows links between slots. Must not know what a datagram says, beyond what it takes to
//! open it. The invariant it keeps: nothing arrives that was not sent, except what a fault
//! forges; and no datagram is larger than a frame may be.

use std::net::SocketAddr;

use quotum::cluster::wire::{OLDEST_WIRE_VERSION, WIRE_VERSION};
use quotum::ledger::{Contact, ReplicaId};

use super::queue::Event;
use super::world::World;
use crate::Micros;
use crate::rng::mix;

/// Something under way.
#[derive(Clone, Debug)]
pub(super) struct Datagram {
    pub(super) to: SocketAddr,
    pub(super) from_slot: usize,
    pub(super) bytes: Bytes,
    /// Whether it has been delivered, or may have been, before.
    pub(super) repeated: bool,
    pub(super) delayed: bool,
}

#[derive(Clone, Debug)]
pub(super) enum Bytes {
    /// As it is on the wire.
    Sealed(Vec<u8>),
    /// What a frame would say, without the cipher: a fifth of the time.
    Open { contact: Contact, receiver: Option<ReplicaId>, version: u8, payload: Vec<u8> },
}

/// What is wrong with the network now.
#[derive(Debug, Default)]
pub(super) struct Links {
    pub(super) loss: f64,
    pub(super) delay: Micros,
    pub(super) reorder: Micros,
    pub(super) duplicate: f64,
    pub(super) replay: f64,
    pub(super) garbage: f64,
    pub(super) other_versions: f64,
    pub(super) one_way: Vec<(usize, usize)>,
    pub(super) splits: Vec<(usize, u64)>,
    pub(super) flaps: Vec<(usize, Micros)>,
    pub(super) slow: Vec<(usize, Micros)>,
    /// Datagrams of a while ago, to be replayed.
    past: Vec<Datagram>,
    past_cursor: usize,
}

impl Links {
    /// Returns the component of a slot in the oldest split.
    pub(super) fn component(&self, slot: usize) -> usize {
        self.splits.first().map_or(0, |(ways, salt)| component(slot, *ways, *salt))
    }

    fn is_cut(&self, from: usize, to: usize, at: Micros) -> bool {
        self.one_way.contains(&(from, to))
            || self.splits.iter().any(|(ways, salt)| component(from, *ways, *salt) != component(to, *ways, *salt))
            || self.flaps.iter().any(|(slot, period)| {
                (*slot == from || *slot == to) && (*period == 0 || (at / period).is_multiple_of(2))
            })
    }
}

fn component(slot: usize, ways: usize, salt: u64) -> usize {
    (mix(salt ^ slot as u64) % ways as u64) as usize
}

impl World {
    pub(super) fn put_on_the_wire(&mut self, datagram: Datagram) {
        let Some(to_slot) = super::faults::slot_of(datagram.to) else { return };
        let loss = self.plan.network.loss.max(self.links.loss);
        if self.links.is_cut(datagram.from_slot, to_slot, self.at) || (loss > 0.0 && self.network_rng.chance(loss)) {
            return;
        }
        self.forge(&datagram);
        if self.links.duplicate > 0.0 && self.network_rng.chance(self.links.duplicate) {
            let delay = self.delay() + self.network_rng.below(50_000);
            let twin = Datagram { repeated: true, ..datagram.clone() };
            self.queue.push(self.at + delay, Event::Datagram(Box::new(twin)));
        }
        if self.links.replay > 0.0 {
            self.remember(&datagram);
        }
        let delay = self.delay();
        self.queue.push(self.at + delay, Event::Datagram(Box::new(datagram)));
    }

    fn delay(&mut self) -> Micros {
        let (least, most) = self.plan.network.delay;
        let mut delay = self.network_rng.between(least, most);
        if self.network_rng.chance(self.plan.network.tail) {
            delay *= 10;
        }
        if self.links.reorder > 0 {
            delay += self.network_rng.below(self.links.reorder);
        }
        delay + self.links.delay
    }

    /// Keeps some datagrams and brings old ones back.
    fn remember(&mut self, datagram: &Datagram) {
        if self.links.past.len() < 256 {
            self.links.past.push(datagram.clone());
        } else if self.network_rng.chance(0.1) {
            self.links.past_cursor = (self.links.past_cursor + 1) % 256;
            let cursor = self.links.past_cursor;
            self.links.past[cursor] = datagram.clone();
        }
        if self.network_rng.chance(self.links.replay) {
            let old = self.links.past[self.network_rng.index(self.links.past.len())].clone();
            let delay = self.delay() + 100_000;
            self.queue.push(self.at + delay, Event::Datagram(Box::new(Datagram { repeated: true, ..old })));
        }
    }

    /// Sends garbage and other versions beside a datagram.
    fn forge(&mut self, datagram: &Datagram) {
        if self.links.garbage > 0.0 && self.network_rng.chance(self.links.garbage) {
            let mut forged = datagram.clone();
            let flip = self.network_rng.next();
            match &mut forged.bytes {
                // Anybody can send these: the seal must not open.
                Bytes::Sealed(bytes) => {
                    let place = flip as usize % bytes.len();
                    bytes[place] ^= (flip >> 32) as u8 | 1;
                }
                // No cipher stands in front of the decoder here, so what it accepts would
                // be a lie of a key holder: these are cut short, which it must refuse.
                Bytes::Open { payload, .. } => {
                    let cut = flip as usize % payload.len().max(1);
                    payload.truncate(cut);
                    payload.push(0xee);
                }
            }
            let delay = self.delay();
            self.queue.push(self.at + delay, Event::Datagram(Box::new(forged)));
        }
        if self.links.other_versions > 0.0 && self.network_rng.chance(self.links.other_versions) {
            let mut forged = datagram.clone();
            match &mut forged.bytes {
                // One is read, and the seal holds the byte; the other is not.
                Bytes::Sealed(bytes) => bytes[VERSION] = bytes[VERSION].wrapping_add(1),
                Bytes::Open { version, .. } => *version = WIRE_VERSION + 1,
            }
            let delay = self.delay();
            self.queue.push(self.at + delay, Event::Datagram(Box::new(forged)));
        }
    }

    /// Takes note of a frame's version, if it is for the process that it reaches or was for one
    /// before it.
    fn note_version(&mut self, replica: usize, datagram: &Datagram) {
        let (version, receiver) = match &datagram.bytes {
            Bytes::Open { version, receiver, .. } => (*version, *receiver),
            Bytes::Sealed(bytes) => {
                let receiver = bytes.get(RECEIVER).and_then(|bytes| bytes.try_into().ok()).map(u128::from_be_bytes);
                let receiver = receiver.filter(|bits| *bits != 0).map(ReplicaId::from_bits);
                (bytes.get(VERSION).copied().unwrap_or(0), receiver)
            }
        };
        let Some(receiver) = receiver else { return };
        if receiver != self.replicas[replica].id {
            let newer = version > self.replicas[replica].wire;
            self.replicas[replica].misdirected += u64::from(newer);
        } else if version == OLDEST_WIRE_VERSION {
            self.reach("a frame of the oldest version");
            self.check_announced(replica, datagram.from_slot);
        } else if version == WIRE_VERSION {
            self.reach("a frame of the newest version");
        }
    }

    /// Whole pods of this release find out what they read.
    fn check_announced(&mut self, replica: usize, from_slot: usize) {
        let Some(sender) = self.at_slot(from_slot).filter(|_| self.pods.is_some()) else { return };
        let both = [replica, sender].iter().all(|number| self.replicas[*number].wire == WIRE_VERSION);
        if both && self.at > self.plan.storm.max(self.last_change) + ANNOUNCED {
            self.oracle.violated(self.at, "whoever reads the newest version is written to in it", || {
                format!("replica {sender} writes the oldest to replica {replica}")
            });
        }
    }

    /// A datagram arrives at an address.
    pub(super) fn deliver(&mut self, mut datagram: Datagram) {
        let Some(&replica) = self.by_addr.get(&datagram.to) else { return };
        let slot = self.replicas[replica].slot;
        if !datagram.delayed
            && let Some((_, by)) = self.links.slow.iter().find(|(slow, _)| *slow == slot)
        {
            datagram.delayed = true;
            let at = self.at + by;
            self.queue.push(at, Event::Datagram(Box::new(datagram)));
            return;
        }
        self.note_version(replica, &datagram);
        match &mut self.pods {
            Some(pods) => pods.deliver(datagram),
            None => self.hear(replica, datagram),
        }
    }
}

/// How long after the last change of the fleet everybody knows what everybody reads, over lossy links.
const ANNOUNCED: Micros = 10_000_000;

/// Where a frame's header has its version and its receiver.
const VERSION: usize = 3;
const RECEIVER: std::ops::Range<usize> = 32..48;
