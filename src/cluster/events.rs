//! What the ledger notes, as events of the log.
//!
//! Knows the name of each event and which of them somebody should look at. Must not know what follows. The invariant
//! it keeps: names are never changed, as alerts on logs rely on them; docs/operating.md lists them all, and a test
//! compares.

use tracing::{debug, info, warn};

use crate::ledger::{Note, ReplicaId, RosterNote};

/// Logs a note as one line: its event, whom it is about, and what it says.
pub(crate) fn say(note: &Note) {
    // Said again and again, and once as what blocks.
    if let Note::Roster(RosterNote::NotListed | RosterNote::Full) = note {
        debug!("{note}");
        return;
    }
    let (event, replica) = (name(note), about(note).map(|replica| replica.to_string()));
    match note {
        Note::Roster(RosterNote::Joined { .. } | RosterNote::Gone { .. } | RosterNote::ClockRight) => {
            info!(event, replica, "{note}");
        }
        _ => warn!(event, replica, "{note}"),
    }
}

/// Returns the name of the event.
fn name(note: &Note) -> &'static str {
    match note {
        Note::Roster(RosterNote::Joined { .. }) => "joined",
        Note::Roster(RosterNote::GaveUp { .. }) => "gave_up",
        Note::Roster(RosterNote::Gone { .. }) => "peer_gone",
        Note::Roster(RosterNote::DeclaredGone) => "declared_gone",
        Note::Roster(RosterNote::ClockOff { .. }) => "clock_off",
        Note::Roster(RosterNote::ClockRight) => "clock_right",
        Note::Roster(RosterNote::DuplicateNode { .. }) => "duplicate_node",
        Note::Roster(RosterNote::NotListed) => "not_listed",
        Note::Roster(RosterNote::Full) => "roster_full",
        Note::Mismatch { .. } => "limit_mismatch",
        Note::Uncovered { .. } => "uncovered",
    }
}

/// Returns which other replica it is about.
fn about(note: &Note) -> Option<ReplicaId> {
    match note {
        Note::Roster(RosterNote::Gone { replica, .. } | RosterNote::DuplicateNode { replica, .. }) => Some(*replica),
        Note::Mismatch { peer, .. } => Some(*peer),
        _ => None,
    }
}
