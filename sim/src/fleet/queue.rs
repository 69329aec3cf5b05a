//! What happens next: events ordered by virtual time, then by when they were scheduled.
//!
//! Knows order. Must not know what an event does. The invariant it keeps: two events at
//! one time come out in the order in which they went in.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::net::SocketAddr;

use super::network::Datagram;
use crate::Micros;
use crate::workload::Request;

/// Something that will happen.
#[derive(Debug)]
pub(super) enum Event {
    /// A process starts in a slot.
    Start {
        slot: usize,
    },
    /// A replica's gossip tick.
    Tick {
        replica: usize,
    },
    /// A replica's ledger wants to be woken.
    Timeout {
        replica: usize,
        at_ms: u64,
    },
    /// A replica asks its directory.
    Lookup {
        replica: usize,
    },
    /// A datagram arrives.
    Datagram(Box<Datagram>),
    /// The next arrival of the workload.
    Arrival(Box<Request>),
    /// A refused client comes back.
    Retry(Box<Request>),
    /// A response ends.
    End {
        replica: usize,
        permit: u64,
    },
    /// A client that waits goes away.
    GoAway {
        replica: usize,
        ticket: u64,
    },
    /// A fault begins or ends.
    Begin {
        fault: usize,
    },
    Finish {
        fault: usize,
    },
    /// One step of a rolling replacement.
    Roll {
        slots: Vec<usize>,
        pause: Micros,
        same_slot: bool,
    },
    /// The process in a slot is told other limits.
    Reconfigure {
        slot: usize,
        version: usize,
    },
    /// The headless name forgets an address.
    Delist {
        addr: SocketAddr,
    },
    /// The last death of a run.
    Finale,
    /// The oracle looks inside.
    Check,
}

#[derive(Debug)]
struct Entry {
    at: Micros,
    order: u64,
    event: Event,
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Queue {
    heap: BinaryHeap<Entry>,
    order: u64,
}

impl Queue {
    pub(super) fn push(&mut self, at: Micros, event: Event) {
        self.order += 1;
        self.heap.push(Entry { at, order: self.order, event });
    }

    pub(super) fn len(&self) -> usize {
        self.heap.len()
    }

    /// Returns the next event if it is before an instant.
    pub(super) fn pop_before(&mut self, until: Micros) -> Option<(Micros, Event)> {
        self.heap.peek().is_some_and(|entry| entry.at < until).then(|| self.pop()).flatten()
    }

    pub(super) fn pop(&mut self) -> Option<(Micros, Event)> {
        self.heap.pop().map(|entry| (entry.at, entry.event))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    // Reversed: the heap's greatest is the earliest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}
