//! The way out: what the ledger wants sent becomes payloads for addresses.
//!
//! Knows who the peers are, what was last heard of each, which wire version each reads, and
//! how much fits a frame. Must not know sockets, keys or clocks; the simulator uses it as the
//! product does. The invariant it keeps: every live peer gets a frame at least every
//! [`HEARTBEAT_TICKS`] ticks, with the latest echo, so that silence means something; no
//! payload is larger than a frame takes; and none is of a version that its receiver has not
//! said it reads, the oldest excepted, which everybody reads.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::fragment::{self, Kind};
use super::frame::{Frames, MAX_PAYLOAD, Nonce};
use super::wire::{OLDEST_WIRE_VERSION, Writer};
use crate::ledger::{Message, ReplicaId, Target, Timestamp, Transmit};

/// A peer to whom nothing was sent for this many ticks gets an empty frame: at most one a
/// peer every second tick when idle, 1.2 kB/s for each at 100 ms.
pub const HEARTBEAT_TICKS: u32 = 2;

/// The most replicas whose latest send time is remembered, as docs/algorithm.md section 1 bounds |U|.
const MAX_HEARD: usize = 4_096;

/// A payload on its way to an address: seal it, send it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel {
    /// The address.
    pub to: SocketAddr,
    /// The replica it is for; `None` for whoever is there.
    pub receiver: Option<ReplicaId>,
    /// The latest send time we have seen of that replica.
    pub echo: Option<Timestamp>,
    /// The wire version of the payload.
    pub version: u8,
    /// What to seal.
    pub payload: Vec<u8>,
}

impl Parcel {
    /// Returns the datagram.
    pub fn seal(&self, frames: &Frames, sent_at: Timestamp, nonce: Nonce) -> Vec<u8> {
        frames.seal(self.version, self.receiver, sent_at, self.echo, nonce, &self.payload)
    }
}

/// Packs messages for peers, and remembers what was heard of them.
#[derive(Debug)]
pub struct Outbox {
    me: ReplicaId,
    /// The newest version that is written here.
    newest: u8,
    peers: BTreeMap<ReplicaId, Peer>,
    /// Replicas that are no peers, but are written to: those that say goodbye.
    others: BTreeMap<ReplicaId, SocketAddr>,
    heard: BTreeMap<ReplicaId, Timestamp>,
    fragments: u32,
    unsent: u64,
}

impl Outbox {
    /// Returns the outbox of the replica `me`, without peers, which writes no wire version above
    /// `newest`.
    pub fn new(me: ReplicaId, newest: u8) -> Self {
        let (peers, others, heard) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { me, newest, peers, others, heard, fragments: 0, unsent: 0 }
    }

    /// Notes that a frame arrived that `from` sent at `sent_at`.
    pub fn heard(&mut self, from: ReplicaId, sent_at: Timestamp) {
        if self.heard.len() >= MAX_HEARD && !self.heard.contains_key(&from) {
            let stalest = self.heard.iter().min_by_key(|(_, at)| **at).map(|(id, _)| *id);
            stalest.and_then(|id| self.heard.remove(&id));
        }
        let latest = self.heard.entry(from).or_insert(sent_at);
        *latest = sent_at.max(*latest);
    }

    /// Replaces the list of live peers: the targets of [`Target::Everyone`]. Nobody else's
    /// address is known any more.
    pub fn set_peers(&mut self, peers: &[(ReplicaId, SocketAddr)]) {
        self.others.clear();
        let mut before = std::mem::take(&mut self.peers);
        for (id, addr) in peers {
            // Who is new has announced nothing yet; a process that starts again is.
            let (idle, version) = before.remove(id).map_or((0, OLDEST_WIRE_VERSION), |peer| (peer.idle, peer.version));
            self.peers.insert(*id, Peer { addr: *addr, idle, version });
        }
    }

    /// Notes the newest wire version that replicas say they read. Who is no peer is passed over:
    /// what was announced is told again and again.
    ///
    /// It is their word, in the fleet's gossip: whatever it is, it is taken for one of the
    /// versions that are written here.
    pub fn set_versions(&mut self, announced: impl IntoIterator<Item = (ReplicaId, u8)>) {
        for (id, version) in announced {
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.version = version.clamp(OLDEST_WIRE_VERSION, self.newest);
            }
        }
    }

    /// Adds the address of a replica that is to be written to once, until the next
    /// [`Outbox::set_peers`]; `find` is asked only if it is no peer. A replica that has said
    /// goodbye is no peer any more and still waits to hear that it was understood.
    pub fn set_address(&mut self, id: ReplicaId, find: impl FnOnce() -> Option<SocketAddr>) {
        if !self.peers.contains_key(&id) {
            self.others.extend(find().map(|addr| (id, addr)));
        }
    }

    /// Packs messages, in order, into as few payloads as they fit.
    ///
    /// A message for a replica whose address is not known is dropped and counted.
    pub fn pack(&mut self, transmits: impl IntoIterator<Item = Transmit>) -> Vec<Parcel> {
        let mut packing = Packing::new(self.me);
        for transmit in transmits {
            let destinations = self.destinations(transmit.to);
            if destinations.is_empty() {
                self.unsent += u64::from(transmit.to != Target::Everyone);
                continue;
            }
            let mut long: BTreeMap<u8, Vec<Vec<u8>>> = BTreeMap::new();
            for destination in destinations {
                if packing.add(destination, &transmit.message) {
                    continue;
                }
                // Every destination of a version takes the same fragments: a number names one
                // message of ours.
                let payloads = long.entry(destination.version).or_insert_with(|| {
                    let mut bytes = Vec::new();
                    Writer::new(destination.version, self.me).write(&transmit.message, &mut bytes);
                    self.fragments = self.fragments.wrapping_add(1);
                    fragment::split(Kind::Messages, self.fragments, &bytes).unwrap_or_default()
                });
                packing.add_all(destination, payloads);
            }
            self.unsent += u64::from(long.values().any(Vec::is_empty));
        }
        let mut parcels = Vec::new();
        for (destination, payloads) in packing.finish() {
            if let Some(peer) = destination.receiver.and_then(|id| self.peers.get_mut(&id)) {
                peer.idle = 0;
            }
            let echo = destination.receiver.and_then(|id| self.heard.get(&id).copied());
            let Destination { addr: to, receiver, version } = destination;
            parcels.extend(payloads.into_iter().map(|payload| Parcel { to, receiver, echo, version, payload }));
        }
        parcels
    }

    /// Packs a message of chitchat's, for whoever is at the address.
    ///
    /// It has no receiver and so no echo, and does not count as having been heard of us. As
    /// nobody knows who is there, it is of the oldest version.
    pub fn pack_chitchat(&mut self, to: SocketAddr, bytes: &[u8]) -> Vec<Parcel> {
        self.fragments = self.fragments.wrapping_add(1);
        let payloads = fragment::split(Kind::Chitchat, self.fragments, bytes);
        let payloads = payloads.unwrap_or_else(|_| {
            self.unsent += 1;
            Vec::new()
        });
        let parcel = |payload| Parcel { to, receiver: None, echo: None, version: OLDEST_WIRE_VERSION, payload };
        payloads.into_iter().map(parcel).collect()
    }

    /// Ends a tick: returns an empty payload for every peer that heard nothing lately.
    pub fn tick(&mut self) -> Vec<Parcel> {
        let mut parcels = Vec::new();
        for (id, peer) in &mut self.peers {
            peer.idle += 1;
            if peer.idle >= HEARTBEAT_TICKS {
                peer.idle = 0;
                let (echo, version, payload) = (self.heard.get(id).copied(), peer.version, Vec::new());
                parcels.push(Parcel { to: peer.addr, receiver: Some(*id), echo, version, payload });
            }
        }
        parcels
    }

    /// Returns how many messages were dropped because they had no address or no size that
    /// can be sent.
    pub fn unsent(&self) -> u64 {
        self.unsent
    }

    fn destinations(&self, target: Target) -> Vec<Destination> {
        let peer = |(id, peer): (&ReplicaId, &Peer)| Destination {
            addr: peer.addr,
            receiver: Some(*id),
            version: peer.version,
        };
        let unknown = |receiver, addr| Destination { addr, receiver, version: OLDEST_WIRE_VERSION };
        match target {
            Target::Everyone => self.peers.iter().map(peer).collect(),
            Target::Replica(id) => {
                let known = self.peers.get_key_value(&id).map(peer);
                let other = || self.others.get(&id).map(|addr| unknown(Some(id), *addr));
                known.or_else(other).into_iter().collect()
            }
            Target::Address(addr) => vec![unknown(None, addr)],
        }
    }
}

#[derive(Debug)]
struct Peer {
    addr: SocketAddr,
    /// Ticks since something with our echo was sent to it.
    idle: u32,
    /// The wire version it is written to in.
    version: u8,
}

/// Where a payload goes. Ordered, so that one seed gives one order of datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Destination {
    receiver: Option<ReplicaId>,
    addr: SocketAddr,
    version: u8,
}

/// The payloads under way to each destination; the last one may have room left.
#[derive(Debug)]
struct Packing {
    me: ReplicaId,
    open: BTreeMap<Destination, Open>,
    full: BTreeMap<Destination, Vec<Vec<u8>>>,
}

impl Packing {
    fn new(me: ReplicaId) -> Self {
        Self { me, open: BTreeMap::new(), full: BTreeMap::new() }
    }

    /// Adds a message, or returns that it fits no payload.
    fn add(&mut self, destination: Destination, message: &Message) -> bool {
        let fresh = || Open::new(destination.version, self.me);
        let open = self.open.entry(destination).or_insert_with(fresh);
        if open.add(message) {
            return true;
        }
        let mut next = fresh();
        if !next.add(message) {
            return false;
        }
        let full = std::mem::replace(open, next);
        self.full.entry(destination).or_default().extend(full.payload());
        true
    }

    fn add_all(&mut self, destination: Destination, payloads: &[Vec<u8>]) {
        // What came before is sent before.
        let full = self.full.entry(destination).or_default();
        full.extend(self.open.remove(&destination).and_then(Open::payload));
        full.extend_from_slice(payloads);
    }

    fn finish(mut self) -> BTreeMap<Destination, Vec<Vec<u8>>> {
        for (destination, open) in self.open {
            self.full.entry(destination).or_default().extend(open.payload());
        }
        self.full.retain(|_, payloads| !payloads.is_empty());
        self.full
    }
}

/// A payload that may have room left.
#[derive(Debug)]
struct Open {
    writer: Writer,
    payload: Vec<u8>,
}

impl Open {
    fn new(version: u8, me: ReplicaId) -> Self {
        Self { writer: Writer::new(version, me), payload: vec![Kind::Messages as u8] }
    }

    /// Adds a message, if it fits.
    fn add(&mut self, message: &Message) -> bool {
        let (before, length) = (self.writer, self.payload.len());
        self.writer.write(message, &mut self.payload);
        let fits = self.payload.len() <= MAX_PAYLOAD;
        if !fits {
            self.writer = before;
            self.payload.truncate(length);
        }
        fits
    }

    /// Returns the payload, unless nothing is in it.
    fn payload(self) -> Option<Vec<u8>> {
        (self.payload.len() > 1).then_some(self.payload)
    }
}

#[cfg(test)]
#[path = "outbox_tests.rs"]
mod tests;
