//! The boundary of a replica, where most canaries sit: what it says and what it hears.
//!
//! Knows how to falsify messages. Must not know how that is noticed. The invariant it
//! keeps: without a canary every message passes as it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use quotum::Timestamp;
use quotum::ledger::{Message, ReplicaId, RosterMessage, Row, Transmit, WindowId};

use crate::canary::Canary;
use crate::fleet::world::World;

/// What canaries remember.
#[derive(Debug)]
pub(in crate::fleet) struct Boundary {
    canary: Option<Canary>,
    /// Gifts added up, by receiving replica, donor and window.
    added: BTreeMap<(usize, ReplicaId, WindowId), u64>,
    numbers: u64,
}

impl Boundary {
    pub(in crate::fleet) const fn new(canary: Option<Canary>) -> Self {
        Self { canary, added: BTreeMap::new(), numbers: 1 << 40 }
    }
}

impl World {
    /// What a replica says, as it leaves it.
    pub(super) fn outgoing(&mut self, replica: usize, mut transmits: Vec<Transmit>) -> Vec<Transmit> {
        if transmits.iter().any(|transmit| matches!(&transmit.message, Message::Row(row) if !row.given.is_empty())) {
            self.reach("rights given");
        }
        let Some(canary) = self.boundary.canary else { return transmits };
        let me = self.replicas[replica].id;
        if canary == Canary::AnswersLost && self.replicas[replica].slot == 0 {
            transmits.retain(|transmit| !matches!(transmit.message, Message::Roster(_)));
        }
        transmits.iter_mut().for_each(|transmit| misspeak(canary, me, &mut transmit.message));
        transmits
    }

    /// What a replica hears, as it reaches it.
    pub(in crate::fleet) fn incoming(
        &mut self,
        replica: usize,
        from: ReplicaId,
        mut messages: Vec<Message>,
    ) -> Vec<Message> {
        let Some(canary) = self.boundary.canary else { return messages };
        let me = self.replicas[replica].id;
        let local = self.replicas[replica].local_ms(self.at, self.plan.phase);
        if canary == Canary::DeadSpendLost {
            let dead: Vec<ReplicaId> =
                self.replicas.iter().filter(|other| !other.is_alive()).map(|other| other.id).collect();
            messages.retain(|message| !matches!(message, Message::Row(row) if dead.contains(&row.replica)));
        }
        let first = self.replicas.iter().map(|other| other.id).find(|id| *id != me);
        if canary == Canary::CarriedAndKept {
            let kept: Vec<Message> = messages.iter().filter_map(|message| self.boundary.kept(message, me)).collect();
            messages.extend(kept);
        }
        for message in &mut messages {
            match message {
                Message::Row(row) => self.boundary.mishear_row(canary, replica, me, from, first, local, row),
                Message::Request(request) if canary == Canary::RequestAnsweredTwice => {
                    self.boundary.numbers += 1;
                    request.seq = self.boundary.numbers;
                }
                _ => {}
            }
        }
        messages
    }
}

impl Boundary {
    /// Bug: what was received is counted in the slice after it once more.
    fn kept(&self, message: &Message, me: ReplicaId) -> Option<Message> {
        let Message::Row(row) = message else { return None };
        let grid = row.key.quota.grid();
        let next = grid.next(grid.window_of(row.window)?);
        let given: Vec<_> = row.given.iter().copied().filter(|(to, total)| *to == me && *total > 0).collect();
        let again = Row { window: next.id(), given, reserved: 0, refunded: 0, version: 0, ..row.clone() };
        (!again.given.is_empty()).then_some(Message::Row(again))
    }

    #[expect(clippy::too_many_arguments, reason = "everything a bug can mistake for something else")]
    fn mishear_row(
        &mut self,
        canary: Canary,
        replica: usize,
        me: ReplicaId,
        from: ReplicaId,
        first: Option<ReplicaId>,
        local: u64,
        row: &mut Row,
    ) {
        let length = row.key.quota.window();
        match canary {
            Canary::WindowLeak if row.window.start().unix_ms() + length.ms().get() <= local => {
                row.window = length.window_at(Timestamp::from_unix_ms(local)).id();
            }
            Canary::ScalarMaximum => row.replica = first.unwrap_or(row.replica),
            Canary::GiftToAnother => {
                let others: u64 = row.given.iter().filter(|(to, _)| *to != me).map(|(_, total)| *total).sum();
                if others > 0 {
                    row.given.retain(|(to, _)| *to != me);
                    row.given.push((me, others));
                }
            }
            Canary::GiftUnderAnotherName => row.replica = from,
            Canary::GiftCountedAtEachRepeat => {
                let added = self.added.entry((replica, row.replica, row.window)).or_default();
                for (_, total) in row.given.iter_mut().filter(|(to, total)| *to == me && *total > 0) {
                    *added += *total;
                    *total = *added;
                }
            }
            _ => {}
        }
    }
}

/// Falsifies what a replica says.
pub(in crate::fleet) fn misspeak(canary: Canary, me: ReplicaId, message: &mut Message) {
    match message {
        Message::Row(row) if row.replica == me => match canary {
            // A twentieth is what elastic allows at least in its scenario.
            Canary::AllowanceGivenAway => row.given.iter_mut().for_each(|(_, total)| *total += *total / 10 + 1),
            Canary::DroppedHits => row.reserved -= row.reserved / 8,
            Canary::GiftWithoutDebit => row.given.iter_mut().for_each(|(_, total)| *total += *total / 20 + 1),
            _ => {}
        },
        Message::Roster(roster) => falsify(canary, Arc::make_mut(roster)),
        _ => {}
    }
}

fn falsify(canary: Canary, roster: &mut RosterMessage) {
    if canary == Canary::FragmentDropped {
        let half = roster.members.len() / 2;
        roster.members.truncate(half);
    }
    for member in &mut roster.members {
        match canary {
            Canary::AckOfZero => member.counts = Timestamp::ZERO,
            Canary::AckOffByOne => member.counts = before(member.counts),
            Canary::GoneTooEarly => member.gone = member.gone.map(|_| Timestamp::from_unix_ms(1)),
            Canary::GoneOffByOne if member.id == roster.from => member.gone = member.gone.map(before),
            _ => {}
        }
    }
}

fn before(at: Timestamp) -> Timestamp {
    Timestamp::from_unix_ms(at.unix_ms().saturating_sub(1))
}
