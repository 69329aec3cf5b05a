//! What a roster tells an operator: what happened, who blocks, why nothing was forgotten.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::MAX_MEMBERS;
use super::settings::Directory;
use crate::ledger::message::{ReplicaId, Slot};
use crate::ledger::window::Timestamp;

/// What happened to the roster that an operator may want to know.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RosterNote {
    /// This replica has joined: it takes shares of windows that start at or after this.
    Joined {
        /// The first such window start.
        first: Timestamp,
    },
    /// This replica stopped waiting for these and joined with the smallest share.
    GaveUp {
        /// Whom it no longer waits for.
        silent: Vec<String>,
    },
    /// A replica is proven dead.
    Gone {
        /// Which.
        replica: ReplicaId,
        /// What proves it.
        proof: Proof,
    },
    /// Somebody has declared this replica dead: it takes no further share.
    DeclaredGone,
    /// This replica's clock is off the median of its peers by more than epsilon: it takes
    /// no further share.
    ClockOff {
        /// Its clock minus the median, in milliseconds.
        off_ms: i64,
    },
    /// It is within epsilon again.
    ClockRight,
    /// Two live replicas use one node name.
    DuplicateNode {
        /// The name.
        node: Arc<str>,
        /// The other one.
        replica: ReplicaId,
    },
    /// The directory's answer does not contain this replica's own address.
    NotListed,
    /// The roster is full: the newcomer is not learnt, so it cannot join.
    Full,
}

impl fmt::Display for RosterNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joined { first } => write!(f, "joined: takes its share of windows that start at {first:?} or later"),
            Self::GaveUp { silent } => {
                write!(f, "gave up waiting for {}: joined with the smallest share", silent.join(", "))
            }
            Self::Gone { replica, proof } => write!(f, "replica {replica} is gone ({proof})"),
            Self::DeclaredGone => {
                f.write_str("the fleet was told that this replica is dead: it takes no further share; restart it")
            }
            Self::ClockOff { off_ms } => {
                write!(f, "this clock is {off_ms} ms off its peers' median: no further share until it is set")
            }
            Self::ClockRight => f.write_str("this clock is within epsilon of its peers again"),
            Self::DuplicateNode { node, replica } => {
                write!(f, "replica {replica} uses this replica's node name, {node}: give each its own")
            }
            Self::NotListed => {
                f.write_str("the directory does not list this replica's own address: check gossip.seeds and advertise")
            }
            Self::Full => write!(f, "the roster holds {MAX_MEMBERS} replicas: a newcomer is not learnt"),
        }
    }
}

/// Why a replica counts as dead (docs/algorithm.md section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Proof {
    /// A peer said so: it left, or the peer has a proof.
    Told,
    /// A later process runs in the same exclusive slot.
    SameSlot,
    /// It was missing from the headless name for `absent_for`.
    Absent,
    /// The platform said so.
    Platform,
    /// An operator said so.
    Forgotten,
}

/// What a platform knows of a death: nothing that runs can be meant by it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Gone {
    /// This replica's process has ended.
    Replica(ReplicaId),
    /// Every process at this address has ended that had started by this instant, by the
    /// fleet's clock. A later one may run there.
    Address {
        /// Where they listened.
        addr: SocketAddr,
        /// The instant.
        started_by: Timestamp,
    },
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Told => "a peer said so",
            Self::SameSlot => "a later process runs in its slot",
            Self::Absent => "the headless name has lacked it",
            Self::Platform => "the platform said so",
            Self::Forgotten => "an operator said so",
        })
    }
}

/// Who keeps this replica from its share, and how to resolve it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// The replica's id, or the address nobody has answered at.
    pub who: String,
    /// What is missing.
    pub why: String,
    /// The command or change that resolves it.
    pub resolve: String,
}

impl Blocked {
    /// A peer does not answer, and nothing proves it gone.
    pub(in crate::ledger) fn silent(
        id: ReplicaId,
        slot: &Slot,
        unheard: Duration,
        unechoed: Duration,
        directory: Directory,
    ) -> Self {
        let what = if unheard >= unechoed.min(Duration::from_secs(1)) {
            format!("has not been heard for {} s", unheard.as_secs())
        } else {
            format!("is heard, and has not heard this replica for {} s", unechoed.as_secs())
        };
        let by_itself = match directory {
            Directory::Name => "it is proven gone when its address has left the name, or by its successor there",
            _ => "restart it where it ran",
        };
        Self {
            who: id.to_string(),
            why: format!(
                "{} at {} {what}: what it holds of the running windows, and its share of each that starts, are \
                out of reach until it answers or is proven gone",
                slot.node, slot.addr
            ),
            resolve: format!(
                "let UDP through if it runs; if not, {by_itself}, or if it has surely ended: quotum forget {id}"
            ),
        }
    }

    /// Frames do come from there, and are thrown away: to forget whoever runs there would cost
    /// a share of each window.
    pub(in crate::ledger) fn reject(&mut self, why: &str) {
        self.why = format!("{}; frames from there are thrown away: {why}", self.why);
        self.resolve = "give both the same gossip key, cluster name and release; somebody runs there, so do not \
            forget it"
            .into();
    }

    /// The clock has shown a later instant than it does now.
    pub(in crate::ledger) fn ahead(me: ReplicaId, behind: Duration) -> Self {
        Self {
            who: me.to_string(),
            why: format!(
                "its clock once showed an instant that is {} s from now: until then it stays in the windows of \
                that instant, because to open earlier ones again could deal their shares twice",
                behind.as_secs()
            ),
            resolve: "restart this process if the clock is right now; else set the clock. It goes on by itself then"
                .into(),
        }
    }

    /// The directory answers, and not with this address.
    pub(in crate::ledger) fn unlisted(own: SocketAddr, listed: &[SocketAddr]) -> Self {
        let shown: Vec<String> = listed.iter().take(4).map(ToString::to_string).collect();
        let more = if listed.len() > shown.len() { ", ..." } else { "" };
        Self {
            who: own.to_string(),
            why: format!(
                "the directory does not list this replica's own address; it lists {}: [{}{more}]",
                listed.len(),
                shown.join(", ")
            ),
            resolve: "let gossip.seeds name all pods, ready or not (a headless service with \
                publishNotReadyAddresses: true), and gossip.advertise be the address they list"
                .into(),
        }
    }
}

/// Why `quotum forget` did nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForgetError {
    /// The target is this replica.
    #[error("this replica is alive: it cannot be forgotten by itself; stop it to make it leave")]
    Myself,
    /// Nobody of that id or unanswered address is on the roster.
    #[error("{0} is not on this replica's roster; `quotum status` lists who is")]
    Unknown(String),
    /// The text is neither an id nor an address.
    #[error("{0:?} is neither a replica id (32 hex digits) nor an address (ip:port)")]
    NotATarget(String),
}
