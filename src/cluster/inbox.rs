//! The way in: a datagram becomes a contact and what its sender said.
//!
//! Knows the order of the steps: open, put together, decode. Must not know sockets, clocks
//! or the ledger; the simulator uses it as the product does. The invariant it keeps: for
//! every datagram either something authentic comes out or the reason why not.

use super::fragment::{self, Assembled, Assembler, Kind};
use super::frame::{Frames, KeyRing, Rejected};
use super::wire;
use crate::ledger::{Contact, Message, Timestamp};

/// Opens frames, and keeps the fragments that wait for others.
#[derive(Debug)]
pub struct Inbox {
    frames: Frames,
    assembler: Assembler,
}

impl Inbox {
    /// Returns an empty inbox.
    pub fn new(frames: Frames) -> Self {
        Self { frames, assembler: Assembler::default() }
    }

    /// Opens with these keys from now on.
    pub fn rekey(&mut self, keys: KeyRing) {
        self.frames.rekey(keys);
    }

    /// Takes a datagram; the buffer is overwritten.
    ///
    /// # Errors
    /// Why the datagram was thrown away: to be counted, never answered.
    pub fn receive(&mut self, datagram: &mut [u8], now: Timestamp) -> Result<Received, Rejected> {
        let opened = self.frames.open(datagram, now)?;
        let (contact, kind) = (opened.contact, fragment::kind(opened.payload));
        let content = match self.assembler.accept(contact.from, opened.version, opened.payload, now)? {
            Assembled::Empty | Assembled::Partial => Content::Nothing,
            Assembled::Whole(Kind::Chitchat, bytes) => Content::Chitchat(bytes),
            Assembled::Whole(Kind::Messages, bytes) => {
                let messages = wire::decode(opened.version, contact.from, &bytes);
                Content::Messages(messages.map_err(|_| Rejected::Payload)?)
            }
        };
        Ok(Received { contact, kind, content })
    }
}

/// What came with one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Who sent the frame, and when.
    pub contact: Contact,
    /// What it was of, whole or a part; `None` if it was a heartbeat.
    pub kind: Option<Kind>,
    /// What it completed.
    pub content: Content,
}

/// What was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: a heartbeat, or a fragment that others must complete.
    Nothing,
    /// Messages for the ledger, in the order in which they were sent.
    Messages(Vec<Message>),
    /// A message for chitchat.
    Chitchat(Vec<u8>),
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::outbox::Outbox;
    use super::super::wire::{OLDEST_WIRE_VERSION, WIRE_VERSION};
    use super::*;
    use crate::ledger::{Member, ReplicaId, RosterMessage, Slot, Target, Transmit};

    const NOW: Timestamp = Timestamp::from_unix_ms(1_763_856_000_000);
    const US: ReplicaId = ReplicaId::from_bits(1);
    const PEER: ReplicaId = ReplicaId::from_bits(2);

    fn frames(me: ReplicaId) -> Frames {
        Frames::new(KeyRing::of([1; 32]), "test", me)
    }

    fn roster(members: u128) -> Message {
        let addr = ([10, 0, 0, 1], 7946).into();
        let member = |id| Member {
            id: ReplicaId::from_bits(id),
            slot: Slot { node: "pod".into(), addr, exclusive: true },
            counts: NOW,
            gone: None,
            seen: 0,
        };
        let members = (0..members).map(member).collect();
        Message::Roster(Arc::new(RosterMessage { from: PEER, revision: 1, floor: NOW, watermark: NOW, members }))
    }

    /// The datagrams in which the peer sends us a roster of so many members.
    fn datagrams(members: u128, version: u8, sent_at: Timestamp) -> Vec<Vec<u8>> {
        let mut outbox = Outbox::new(PEER, WIRE_VERSION);
        outbox.set_peers(&[(US, ([10, 0, 0, 2], 7946).into())]);
        outbox.set_versions([(US, version)]);
        let parcels = outbox.pack([Transmit { to: Target::Replica(US), message: roster(members) }]);
        let nonces = (0u8..).map(|count| [count; 24]);
        parcels.iter().zip(nonces).map(|(parcel, nonce)| parcel.seal(&frames(PEER), sent_at, nonce)).collect()
    }

    #[test]
    fn a_heartbeat_is_a_contact_without_content() {
        let mut inbox = Inbox::new(frames(US));
        let mut beat = frames(PEER).seal(WIRE_VERSION, Some(US), NOW, None, [0; 24], &[]);
        let contact = Contact { from: PEER, sent_at: NOW, echo: None };
        assert_eq!(inbox.receive(&mut beat, NOW), Ok(Received { contact, kind: None, content: Content::Nothing }));
    }

    #[test]
    fn a_sealed_payload_that_means_nothing_is_counted_as_such() {
        let mut inbox = Inbox::new(frames(US));
        for payload in [&[1, 99][..], &[3], &[1, 1, 2, 3]] {
            let mut frame = frames(PEER).seal(WIRE_VERSION, Some(US), NOW, None, [0; 24], payload);
            assert_eq!(inbox.receive(&mut frame, NOW), Err(Rejected::Payload));
        }
    }

    #[test]
    fn a_recording_is_thrown_away_when_it_is_played_back_later() {
        let mut inbox = Inbox::new(frames(US));
        let later = NOW.plus(super::super::frame::MAX_AGE).next();
        for mut datagram in datagrams(100, OLDEST_WIRE_VERSION, NOW) {
            assert_eq!(inbox.receive(&mut datagram, later), Err(Rejected::Old));
        }
    }

    proptest! {
        #[test]
        fn lost_repeated_and_reordered_datagrams_give_the_roster_or_nothing(
            members in 50u128..400,
            version in OLDEST_WIRE_VERSION..=WIRE_VERSION,
            order in proptest::collection::vec(any::<prop::sample::Index>(), 1..60),
        ) {
            let mut inbox = Inbox::new(frames(US));
            let sent = datagrams(members, version, NOW);
            prop_assert!(sent.len() > 1);
            let mut missing: std::collections::BTreeSet<_> = (0..sent.len()).collect();
            for index in order {
                let at = index.index(sent.len());
                missing.remove(&at);
                let received = inbox.receive(&mut sent[at].clone(), NOW).unwrap();
                if received.content != Content::Nothing {
                    prop_assert_eq!(received.content, Content::Messages(vec![roster(members)]));
                    prop_assert!(missing.is_empty());
                    missing = (0..sent.len()).collect();
                }
            }
            prop_assert!(!missing.is_empty());
        }
    }
}
