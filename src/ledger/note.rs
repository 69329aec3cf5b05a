//! What a ledger has to say: what it ignored, and what an operator may want to read.
//!
//! Knows the words. Must not know what led to them. The invariant it keeps: a note says what
//! happened and what to do about it.

use std::fmt;
use std::sync::Arc;

use super::message::ReplicaId;
use super::quota::{Quota, Unit};
use super::roster::RosterNote;
use super::window::Window;

/// Rows and requests that changed nothing, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ignored {
    /// For a window that has closed here.
    pub closed_window: u64,
    /// For a window that starts later than this clock allows.
    pub future_window: u64,
    /// For a limit or quota this replica does not have.
    pub unknown_key: u64,
    /// Answers of peers that name a window later than this clock allows.
    pub future_answer: u64,
    /// Requests for rights that were answered before, or whose sender does not echo us.
    pub stale_request: u64,
    /// More distinct replicas than a ledger can name.
    pub too_many_replicas: u64,
    /// For a limit this replica does not have, when it holds as many for peers as it may.
    pub too_many_keys: u64,
    /// Gifts that would make this replica's rights more than the whole limit: whoever sent them
    /// does not speak the truth. What is beyond was not credited.
    pub impossible_gift: u64,
}

/// What happened that an operator may want to read in a log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// About the roster.
    Roster(RosterNote),
    /// A peer enforces another quota for the same limit; each spends only its own version.
    Mismatch {
        /// Which limit.
        limit: Arc<str>,
        /// Who.
        peer: ReplicaId,
        /// What it enforces.
        theirs: Quota,
    },
    /// Responses used more than they reserved, and nobody had rights left to cover it.
    Uncovered {
        /// Which limit.
        limit: Arc<str>,
        /// Of what.
        unit: Unit,
        /// How much.
        amount: u64,
        /// In which window.
        window: Window,
    },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Roster(note) => note.fmt(f),
            Self::Mismatch { limit, peer, theirs } => {
                write!(
                    f,
                    "replica {peer} enforces {theirs} for {limit}: each spends only its own version; make them equal"
                )
            }
            Self::Uncovered { limit, unit, amount, window } => write!(
                f,
                "{amount} {unit} of {limit} were used beyond all rights left in the window at {:?}",
                window.start()
            ),
        }
    }
}
