//! The three messages replicas exchange, and who they are to one another.
//!
//! Knows what is said. Must not know how it is encoded, sealed or carried. The
//! invariant it keeps: rows and roster messages are idempotent, commutative and may be
//! lost, repeated, reordered or relayed; a rights request is the one message that is
//! not, and carries a rising number so that each is answered once.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use super::quota::Key;
use super::window::{Timestamp, WindowId};

/// The name of one run of one process: 48 bits of start time (ms) and 80 random bits.
///
/// Never reused, so a dead replica can be declared gone for ever. Node name and address
/// are attributes ([`Slot`]), not identity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(u128);

impl ReplicaId {
    /// Returns the id of a process that started at `started`; the low 80 bits of
    /// `random` are used.
    pub const fn new(started: Timestamp, random: u128) -> Self {
        let time = (started.unix_ms() as u128) & ((1 << 48) - 1);
        Self((time << 80) | (random & ((1 << 80) - 1)))
    }

    /// Returns the id with these bits, as the wire carries them.
    pub const fn from_bits(bits: u128) -> Self {
        Self(bits)
    }

    /// Returns all 128 bits.
    pub const fn bits(self) -> u128 {
        self.0
    }

    /// Returns when the process started, by its own clock.
    pub const fn started(self) -> Timestamp {
        Timestamp::from_unix_ms((self.0 >> 80) as u64)
    }

    /// Returns the id that [`fmt::Display`] wrote: 32 hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        (text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .then(|| u128::from_str_radix(text, 16).ok().map(Self))
            .flatten()
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// Where a replica runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// The node's name, at most [`Slot::MAX_NODE`] bytes.
    pub node: Arc<str>,
    /// The address and UDP port peers send to.
    pub addr: SocketAddr,
    /// Whether the port is the configured one and bound exclusively, so that a later
    /// process in the same slot proves that the earlier one is dead.
    pub exclusive: bool,
}

impl Slot {
    /// The longest node name in bytes: a DNS label's worth and a little more.
    pub const MAX_NODE: usize = 128;

    /// Returns whether a process here proves that an earlier one at `other` has died
    /// (docs/algorithm.md section 3 b).
    pub fn excludes(&self, other: &Self) -> bool {
        self.exclusive && other.exclusive && self.addr == other.addr && self.node == other.node
    }
}

/// What a replica publishes about one account: its usage, what it has given away, and
/// hints.
///
/// The first part is merged by maximum, field by field; the hints belong to the row with
/// the highest `version`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Whose account this is; only that replica writes it.
    pub replica: ReplicaId,
    /// Which key.
    pub key: Key,
    /// Which window.
    pub window: WindowId,
    /// Rises with every row of this account and replica.
    pub version: u64,
    /// Ever reserved, in units; only grows.
    pub reserved: u64,
    /// Ever refunded, in units; only grows.
    pub refunded: u64,
    /// Rights ever given to each replica; only grows. A row may carry a part of the
    /// list: merging by maximum makes parts harmless.
    pub given: Vec<(ReplicaId, u64)>,
    /// Hint: the rights that are spendable now; negative is debt.
    pub spendable: i64,
    /// Hint: units offered per second, admitted or not.
    pub demand: u64,
    /// Hint: the mean request in units.
    pub typical: u64,
}

impl Row {
    /// The most entries of `given` in one row: the row then fits a datagram with room
    /// for its neighbours.
    pub const MAX_GIVEN: usize = 24;
}

/// What a replica asks of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RightsRequest {
    /// Rights to what.
    pub key: Key,
    /// In which window.
    pub window: WindowId,
    /// Rises with every request of this replica; a number at or below the last one seen
    /// is not answered again.
    pub seq: u64,
    /// The least that helps, in units.
    pub need: u64,
    /// What would be welcome, in units; at least `need`.
    pub want: u64,
    /// Why.
    pub kind: RequestKind,
    /// How long the oldest parked request has waited, in milliseconds.
    pub waiting_ms: u32,
}

/// Why rights are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum RequestKind {
    /// Requests were settled above their reservation: the wallet is negative.
    Debt = 0,
    /// Requests are parked.
    Parked = 1,
    /// The wallet will soon be too small.
    Prefetch = 2,
}

/// Who counts, as one replica knows it: the whole roster in one message.
///
/// It carries what it tells each member, so that it can be broadcast and relayed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RosterMessage {
    /// Who says so.
    pub from: ReplicaId,
    /// Rises when anything changes but `seen`, or `counts` of somebody who has joined.
    pub revision: u64,
    /// The sender's floor (docs/algorithm.md section 1).
    pub floor: Timestamp,
    /// Unknown ids that started before this instant are never learnt from a mention.
    pub watermark: Timestamp,
    /// Everybody the sender has ever heard of, itself among them, by id.
    pub members: Vec<Member>,
}

/// One replica in a [`RosterMessage`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Who.
    pub id: ReplicaId,
    /// Where.
    pub slot: Slot,
    /// From which nominal window start on the sender counts this replica: the answer a
    /// newcomer waits for. Of the sender itself, from which one on it takes shares; the epoch
    /// until it has joined.
    pub counts: Timestamp,
    /// From which nominal window start on this replica takes no share, if it is known to
    /// be gone.
    pub gone: Option<Timestamp>,
    /// The last revision of this replica's roster message that the sender has read.
    pub seen: u64,
}

/// Any of the three.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Usage, gifts and hints of one account.
    Row(Row),
    /// A request for rights.
    Request(RightsRequest),
    /// Who counts.
    Roster(Arc<RosterMessage>),
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Every peer that is not known to be gone.
    Everyone,
    /// One peer.
    Replica(ReplicaId),
    /// Whoever answers at a listed address that nobody has answered at yet.
    Address(SocketAddr),
}

/// A message the ledger wants sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// To whom.
    pub to: Target,
    /// What.
    pub message: Message,
}

/// What the header of an authenticated frame tells about its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contact {
    /// The sender.
    pub from: ReplicaId,
    /// When it sent the frame, by its clock.
    pub sent_at: Timestamp,
    /// The latest send time the sender had seen in a frame of *ours*, by our clock;
    /// `None` if it has heard nothing from us.
    pub echo: Option<Timestamp>,
}
