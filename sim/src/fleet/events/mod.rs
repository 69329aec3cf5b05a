//! The event layer: replicas driven by hand, without I/O, threads or a runtime.
//!
//! Knows in which order a ledger wants to be driven, as the product's loop does it. Must not
//! know clients, faults or what a plan is meant to show. The invariant it keeps: one queue
//! ordered by virtual time and arrival decides what happens next, and after every event each
//! replica's transmits, wake-ups and deadlines have been taken.

mod boundary;

use quotum::Timestamp;
use quotum::cluster::fragment::{Assembled, Assembler, Kind};
use quotum::cluster::frame::{Frames, KeyRing, MAX_AGE, MAX_DATAGRAM, MAX_PAYLOAD};
use quotum::cluster::inbox::{Content, Inbox};
use quotum::cluster::outbox::{Outbox, Parcel};
use quotum::cluster::wire;
use quotum::ledger::{Contact, Ledger, Message, Note, Proof, ReplicaId, RosterNote, Transmit};

pub(super) use self::boundary::{Boundary, misspeak};
use super::network::{Bytes, Datagram};
use super::queue::Event;
use super::replica::{Drive, Process};
use super::world::World;
use crate::Micros;
use crate::canary::Canary;

/// What the product's loop would hold.
#[derive(Debug)]
pub(super) struct Hand {
    frames: Frames,
    inbox: Inbox,
    assembler: Assembler,
    outbox: Outbox,
    timeout_ms: u64,
}

impl Hand {
    pub(super) fn new(id: ReplicaId, wire: u8) -> Self {
        let frames = Frames::new(KeyRing::of(super::KEY), super::CLUSTER, id).up_to(wire);
        Self {
            inbox: Inbox::new(frames.clone()),
            frames,
            assembler: Assembler::default(),
            outbox: Outbox::new(id, wire),
            timeout_ms: u64::MAX,
        }
    }
}

impl World {
    fn hand(&mut self, replica: usize) -> Option<&mut Hand> {
        match &mut self.replicas[replica].process {
            Some(Process { drive: Drive::Hand(hand), .. }) => Some(hand),
            _ => None,
        }
    }

    /// A gossip tick.
    pub(super) fn tick(&mut self, replica: usize) {
        if !self.replicas[replica].is_alive() {
            return;
        }
        let interval = self.plan.interval.as_micros() as Micros;
        self.queue.push(self.at + interval, Event::Tick { replica });
        if self.replicas[replica].paused {
            return;
        }
        self.trace.note(&[4, replica as u64]);
        if self.options.canary == Some(Canary::ReclaimByTimeout) {
            self.reclaim_silent(replica);
        }
        self.refresh_peers(replica);
        self.with(replica, Ledger::handle_tick);
        self.flush(replica);
        let parcels = match &mut self.replicas[replica].process {
            Some(Process { drive: Drive::Hand(hand), .. }) => hand.outbox.tick(),
            _ => return,
        };
        self.send(replica, parcels);
        self.leave_at_last(replica);
    }

    /// Bug: silence is no proof of death.
    fn reclaim_silent(&mut self, replica: usize) {
        self.with(replica, |ledger, now| {
            for peer in ledger.status(now).peers {
                if peer.gone.is_none() && peer.staleness.is_none_or(|silent| silent.as_secs() >= 2) {
                    let _ = ledger.forget(&peer.id.to_string(), now);
                }
            }
        });
    }

    /// A deadline of the ledger.
    pub(super) fn timeout(&mut self, replica: usize, at_ms: u64) {
        let Some(hand) = self.hand(replica) else { return };
        if hand.timeout_ms != at_ms {
            return;
        }
        hand.timeout_ms = u64::MAX;
        self.trace.note(&[5, replica as u64]);
        self.with(replica, Ledger::handle_timeout);
        self.flush(replica);
    }

    /// A replica hears messages of one frame.
    pub(super) fn receive(&mut self, replica: usize, contact: Contact, messages: Vec<Message>, repeated: bool) {
        let requests: Vec<u64> = messages
            .iter()
            .filter_map(|message| match message {
                Message::Request(request) => Some(request.seq),
                _ => None,
            })
            .collect();
        let messages = self.incoming(replica, contact.from, messages);
        let roster = messages.iter().any(|message| matches!(message, Message::Roster(_)));
        let before = (!requests.is_empty()).then(|| self.gifts_of(replica));
        if repeated && before.is_some() {
            self.reach("replayed request");
        }
        if let Some(hand) = self.hand(replica) {
            hand.outbox.heard(contact.from, contact.sent_at);
        }
        self.with(replica, |ledger, now| {
            ledger.handle_contact(contact, now);
            for message in &messages {
                ledger.handle_message(contact.from, message.clone(), now);
            }
        });
        if let Some(before) = before {
            self.check_answers(replica, contact.from, requests, &before);
        }
        if roster {
            self.refresh_peers(replica);
        }
        self.flush(replica);
    }

    /// Tells a replica's outbox who its peers are, and what they read: chitchat would tell that
    /// a while after they have started.
    pub(super) fn refresh_peers(&mut self, replica: usize) {
        let Some(process) = &self.replicas[replica].process else { return };
        let peers = process.limiter.with_ledger(|ledger, _| ledger.peers());
        let known = peers.iter().filter_map(|(id, _)| Some((*id, &self.replicas[*self.by_id.get(id)?])));
        let told = known.filter(|(_, peer)| peer.born + ANNOUNCED_AFTER <= self.at);
        let versions: Vec<(ReplicaId, u8)> = told.map(|(id, peer)| (id, peer.wire)).collect();
        if let Some(hand) = self.hand(replica) {
            hand.outbox.set_peers(&peers);
            hand.outbox.set_versions(versions);
        }
    }

    /// Takes everything a ledger wants done: messages, notes, deadlines.
    pub(super) fn drain(&mut self, replica: usize) {
        let Some(process) = &mut self.replicas[replica].process else { return };
        let (transmits, notes, timeout) = process.limiter.with_ledger(|ledger, _| {
            let transmits: Vec<Transmit> = std::iter::from_fn(|| ledger.poll_transmit()).collect();
            let notes: Vec<Note> = std::iter::from_fn(|| ledger.poll_note()).collect();
            (transmits, notes, ledger.poll_timeout())
        });
        self.schedule_timeout(replica, timeout);
        if !transmits.is_empty() {
            let transmits = self.outgoing(replica, transmits);
            let Some(hand) = self.hand(replica) else { return };
            let parcels = hand.outbox.pack(transmits);
            self.send(replica, parcels);
        }
        for note in notes {
            self.take_note(replica, note);
        }
    }

    fn schedule_timeout(&mut self, replica: usize, timeout: Option<Timestamp>) {
        let local = self.replicas[replica].local_ms(self.at, self.plan.phase);
        let Some(hand) = self.hand(replica) else { return };
        let at_ms = timeout.map_or(u64::MAX, Timestamp::unix_ms);
        if at_ms == hand.timeout_ms {
            return;
        }
        hand.timeout_ms = at_ms;
        if at_ms != u64::MAX {
            let at = self.at + (at_ms.saturating_sub(local) * 1_000).max(100);
            self.queue.push(at, Event::Timeout { replica, at_ms });
        }
    }

    fn take_note(&mut self, replica: usize, note: Note) {
        self.line(Some(replica), || format!("notes {note:?}"));
        match note {
            Note::Roster(RosterNote::Joined { .. }) => {
                self.last_change = self.at;
                self.reach("joined");
            }
            Note::Roster(RosterNote::GaveUp { .. }) => self.reach("gave up"),
            Note::Roster(RosterNote::Gone { replica: dead, proof, .. }) => {
                if !self.deaths.insert((replica, dead)) {
                    self.oracle.violated(self.at, "a death is news once", || {
                        format!("replica {replica} learns again that {dead} is gone")
                    });
                }
                self.last_change = self.at;
                self.reach(match proof {
                    Proof::Told => "gone: told",
                    Proof::SameSlot => "gone: same slot",
                    Proof::Absent => "gone: absent",
                    _ => "gone: forgotten",
                });
            }
            Note::Roster(RosterNote::NotListed) => self.reach("not listed"),
            Note::Roster(RosterNote::DeclaredGone) => self.reach("declared gone"),
            Note::Uncovered { .. } => self.reach("uncovered"),
            _ => {}
        }
    }

    /// Sends parcels of a replica.
    pub(super) fn send(&mut self, replica: usize, parcels: Vec<Parcel>) {
        let local = self.replicas[replica].local_ms(self.at, self.plan.phase);
        for parcel in parcels {
            assert!(parcel.payload.len() <= MAX_PAYLOAD, "a payload of {} bytes fits no frame", parcel.payload.len());
            self.trace.note_bytes(&parcel.payload);
            let sent_at = Timestamp::from_unix_ms(local);
            let bytes = if self.plan.sealed {
                let Some(frames) = self.hand(replica).map(|hand| hand.frames.clone()) else { return };
                let mut nonce = [0; 24];
                nonce.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.network_rng.next().to_le_bytes()));
                let frame = parcel.seal(&frames, sent_at, nonce);
                assert!(frame.len() <= MAX_DATAGRAM, "a datagram of {} bytes", frame.len());
                Bytes::Sealed(frame)
            } else {
                let contact = Contact { from: self.replicas[replica].id, sent_at, echo: parcel.echo };
                let Parcel { receiver, version, payload, .. } = parcel;
                Bytes::Open { contact, receiver, version, payload }
            };
            let from_slot = self.replicas[replica].slot;
            self.put_on_the_wire(Datagram { to: parcel.to, from_slot, bytes, repeated: false, delayed: false });
        }
    }

    /// A datagram reaches a replica.
    pub(super) fn hear(&mut self, replica: usize, datagram: Datagram) {
        let repeated = datagram.repeated;
        let local = Timestamp::from_unix_ms(self.set_clock(replica));
        let Some((contact, messages)) = self.open(replica, datagram, local) else { return };
        self.trace.note(&[2, replica as u64, contact.sent_at.unix_ms(), messages.len() as u64]);
        let from = self.by_id.get(&contact.from).copied();
        self.line(Some(replica), || {
            let kinds: Vec<String> = messages.iter().map(describe).collect();
            format!("hears replica {from:?}: {}", kinds.join("; "))
        });
        self.receive(replica, contact, messages, repeated);
    }

    fn open(&mut self, replica: usize, datagram: Datagram, now: Timestamp) -> Option<(Contact, Vec<Message>)> {
        let (me, newest) = (self.replicas[replica].id, self.replicas[replica].wire);
        let hand = self.hand(replica)?;
        match datagram.bytes {
            Bytes::Sealed(mut bytes) => {
                let received = hand.inbox.receive(&mut bytes, now).ok()?;
                match received.content {
                    Content::Messages(messages) => Some((received.contact, messages)),
                    Content::Nothing | Content::Chitchat(_) => Some((received.contact, Vec::new())),
                }
            }
            Bytes::Open { contact, receiver, version, payload } => {
                // The checks of `Frames::open`, in its order.
                if !(wire::OLDEST_WIRE_VERSION..=newest).contains(&version)
                    || contact.from == me
                    || receiver.is_some_and(|receiver| receiver != me)
                    || now.since(contact.sent_at) > MAX_AGE
                {
                    return None;
                }
                match hand.assembler.accept(contact.from, version, &payload, now).ok()? {
                    Assembled::Empty => Some((contact, Vec::new())),
                    Assembled::Partial => {
                        self.reached.insert("fragments");
                        Some((contact, Vec::new()))
                    }
                    Assembled::Whole(Kind::Messages, bytes) => {
                        let messages = wire::decode(version, contact.from, &bytes).ok()?;
                        Some((contact, messages))
                    }
                    Assembled::Whole(..) => Some((contact, Vec::new())),
                }
            }
        }
    }
}

/// How long after its start everybody knows what a replica reads.
const ANNOUNCED_AFTER: Micros = 1_000_000;

fn describe(message: &Message) -> String {
    match message {
        Message::Row(row) => format!(
            "row of {} for {:?} v{}: reserved {} refunded {} spendable {} given {:?}",
            row.replica, row.window, row.version, row.reserved, row.refunded, row.spendable, row.given
        ),
        Message::Request(request) => format!(
            "asks {:?} {}..{} in {:?}, number {}",
            request.kind, request.need, request.want, request.window, request.seq
        ),
        Message::Roster(roster) => {
            let members: Vec<String> = roster
                .members
                .iter()
                .map(|member| {
                    format!("{}@{} counts {:?} gone {:?}", member.id, member.slot.addr, member.counts, member.gone)
                })
                .collect();
            format!("roster of {} r{} floor {:?}: {}", roster.from, roster.revision, roster.floor, members.join(", "))
        }
    }
}
