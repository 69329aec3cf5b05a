//! The way out: what the ledger wants sent becomes payloads for addresses.
//!
//! Knows who the peers are, what was last heard of each, and how much fits a frame. Must
//! not know sockets, keys or clocks; the simulator uses it as the product does. The
//! invariant it keeps: every live peer gets a frame at least every [`HEARTBEAT_TICKS`]
//! ticks, with the latest echo, so that silence means something; and no payload is larger
//! than a frame takes.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::fragment::{self, Kind};
use super::frame::{Frames, MAX_PAYLOAD, Nonce};
use super::wire;
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
    /// What to seal.
    pub payload: Vec<u8>,
}

impl Parcel {
    /// Returns the datagram.
    pub fn seal(&self, frames: &Frames, sent_at: Timestamp, nonce: Nonce) -> Vec<u8> {
        frames.seal(self.receiver, sent_at, self.echo, nonce, &self.payload)
    }
}

/// Packs messages for peers, and remembers what was heard of them.
#[derive(Debug, Default)]
pub struct Outbox {
    peers: BTreeMap<ReplicaId, Peer>,
    /// Replicas that are no peers, but are written to: those that say goodbye.
    others: BTreeMap<ReplicaId, SocketAddr>,
    heard: BTreeMap<ReplicaId, Timestamp>,
    fragments: u32,
    unsent: u64,
}

impl Outbox {
    /// Returns an outbox without peers.
    pub fn new() -> Self {
        Self::default()
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
            let idle = before.remove(id).map_or(0, |peer| peer.idle);
            self.peers.insert(*id, Peer { addr: *addr, idle });
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
        let mut packing = Packing::default();
        for transmit in transmits {
            let destinations = self.destinations(transmit.to);
            if destinations.is_empty() {
                self.unsent += u64::from(transmit.to != Target::Everyone);
                continue;
            }
            let bytes = encoded(&transmit.message);
            if bytes.len() < MAX_PAYLOAD {
                destinations.into_iter().for_each(|destination| packing.add(destination, &bytes));
                continue;
            }
            // Every destination takes the same fragments: a number names one message of ours.
            match fragment::split(Kind::Messages, self.next_fragments(), &bytes) {
                Ok(payloads) => {
                    destinations.into_iter().for_each(|destination| packing.add_all(destination, &payloads));
                }
                Err(_) => self.unsent += 1,
            }
        }
        let mut parcels = Vec::new();
        for (destination, payloads) in packing.finish() {
            if let Some(peer) = destination.receiver.and_then(|id| self.peers.get_mut(&id)) {
                peer.idle = 0;
            }
            let echo = destination.receiver.and_then(|id| self.heard.get(&id).copied());
            let Destination { addr: to, receiver } = destination;
            parcels.extend(payloads.into_iter().map(|payload| Parcel { to, receiver, echo, payload }));
        }
        parcels
    }

    /// Packs a message of chitchat's, for whoever is at the address.
    ///
    /// It has no receiver and so no echo, and does not count as having been heard of us.
    pub fn pack_chitchat(&mut self, to: SocketAddr, bytes: &[u8]) -> Vec<Parcel> {
        let payloads = fragment::split(Kind::Chitchat, self.next_fragments(), bytes);
        let payloads = payloads.unwrap_or_else(|_| {
            self.unsent += 1;
            Vec::new()
        });
        payloads.into_iter().map(|payload| Parcel { to, receiver: None, echo: None, payload }).collect()
    }

    /// Ends a tick: returns an empty payload for every peer that heard nothing lately.
    pub fn tick(&mut self) -> Vec<Parcel> {
        let mut parcels = Vec::new();
        for (id, peer) in &mut self.peers {
            peer.idle += 1;
            if peer.idle >= HEARTBEAT_TICKS {
                peer.idle = 0;
                let echo = self.heard.get(id).copied();
                parcels.push(Parcel { to: peer.addr, receiver: Some(*id), echo, payload: Vec::new() });
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
        let peer = |(id, peer): (&ReplicaId, &Peer)| Destination { addr: peer.addr, receiver: Some(*id) };
        match target {
            Target::Everyone => self.peers.iter().map(peer).collect(),
            Target::Replica(id) => {
                let addr = self.peers.get(&id).map(|peer| peer.addr).or_else(|| self.others.get(&id).copied());
                addr.map(|addr| Destination { addr, receiver: Some(id) }).into_iter().collect()
            }
            Target::Address(addr) => vec![Destination { addr, receiver: None }],
        }
    }

    fn next_fragments(&mut self) -> u32 {
        self.fragments = self.fragments.wrapping_add(1);
        self.fragments
    }
}

#[derive(Debug)]
struct Peer {
    addr: SocketAddr,
    /// Ticks since something with our echo was sent to it.
    idle: u32,
}

/// Where a payload goes. Ordered, so that one seed gives one order of datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Destination {
    receiver: Option<ReplicaId>,
    addr: SocketAddr,
}

/// The payloads under way to each destination; the last one may have room left.
#[derive(Debug, Default)]
struct Packing {
    open: BTreeMap<Destination, Vec<u8>>,
    full: BTreeMap<Destination, Vec<Vec<u8>>>,
}

impl Packing {
    fn add(&mut self, destination: Destination, bytes: &[u8]) {
        let open = self.open.entry(destination).or_default();
        if open.len() + bytes.len() > MAX_PAYLOAD {
            self.full.entry(destination).or_default().push(std::mem::take(open));
        }
        if open.is_empty() {
            open.push(Kind::Messages as u8);
        }
        open.extend_from_slice(bytes);
    }

    fn add_all(&mut self, destination: Destination, payloads: &[Vec<u8>]) {
        // What came before is sent before.
        let full = self.full.entry(destination).or_default();
        full.extend(self.open.remove(&destination));
        full.extend_from_slice(payloads);
    }

    fn finish(mut self) -> BTreeMap<Destination, Vec<Vec<u8>>> {
        for (destination, open) in self.open {
            self.full.entry(destination).or_default().push(open);
        }
        self.full
    }
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64);
    wire::encode(message, &mut bytes);
    bytes
}

#[cfg(test)]
#[path = "outbox_tests.rs"]
mod tests;
