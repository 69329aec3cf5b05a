//! Replicas' lives: start, tick, hear, leave, die; and what the product's loop does after
//! each of them.
//!
//! Knows in which order a ledger wants to be driven. Must not know clients or faults. The
//! invariant it keeps: a process registers before it looks, and a process that leaves
//! stays until it has handed over.

use std::sync::Arc;

use quotum::cluster::fragment::Assembler;
use quotum::cluster::frame::{Frames, KeyRing};
use quotum::cluster::inbox::Inbox;
use quotum::cluster::outbox::Outbox;
use quotum::ledger::{
    Contact, Directory, FirstWindow, Ledger, Message, Note, OnSilence, Proof, ReplicaId, RosterNote, Slot, Transmit,
};
use quotum::{Limiter, Timestamp};

use super::pod::{Process, Replica, SharedClock, Woken};
use super::queue::Event;
use super::world::World;
use crate::Micros;
use crate::canary::Canary;

impl World {
    /// A process starts in a slot, unless one runs there.
    pub(super) fn start(&mut self, slot: usize) {
        let addr = self.slots[slot];
        if self.by_addr.contains_key(&addr) {
            return;
        }
        let number = self.replicas.len();
        let range = self.plan.clock_range_ms;
        let offset_ms = self.pods_rng.around_zero(range);
        let drift_ppm = self.pods_rng.around_zero(self.plan.drift_ppm);
        let random = (u128::from(self.pods_rng.next()) << 64) | u128::from(self.pods_rng.next());
        let mut replica = Replica {
            slot,
            id: ReplicaId::from_bits(0),
            addr,
            born: self.at,
            died: None,
            leaving: None,
            offset_ms,
            drift_ppm,
            paused: false,
            behind_ms: 0,
            process: None,
            left_behind: Vec::new(),
            left_in_order: false,
            respawns: false,
            latest_ms: 0,
            calm_wrongful: 0,
            calm_offered: 0,
        };
        let started = Timestamp::from_unix_ms(replica.local_ms(self.at, self.plan.phase));
        replica.id = ReplicaId::new(started, random);
        let before = self.replicas.iter().rev().find(|earlier| earlier.slot == slot).map(|earlier| earlier.id);
        if let (Some(Canary::ReusedId), Some(before)) = (self.options.canary, before) {
            replica.id = before;
        }
        if matches!(self.options.canary, Some(Canary::NoFloor | Canary::ShareWithoutEntitlement)) {
            replica.behind_ms = 30_000;
        }
        let id = replica.id;
        self.registry.register(addr, self.at);
        self.last_change = self.at;
        self.by_addr.insert(addr, number);
        self.by_id.insert(id, number);
        self.replicas.push(replica);
        self.replicas[number].process = Some(self.process(number, id));
        self.trace.note(&[3, slot as u64, id.bits() as u64]);
        self.line(Some(number), || format!("starts in slot {slot} as {id}, clock {offset_ms:+} ms {drift_ppm:+} ppm"));
        self.lookup(number);
        let tick = self.pods_rng.below(self.plan.interval.as_micros() as u64);
        self.queue.push(self.at + tick, Event::Tick { replica: number });
    }

    fn process(&mut self, number: usize, id: ReplicaId) -> Process {
        let clock = SharedClock::default();
        clock.set(self.replicas[number].local_ms(self.at, self.plan.phase));
        let mut settings = self.plan.settings;
        match self.options.canary {
            Some(Canary::FirstWindowAdmit) => settings.first_window = FirstWindow::Admit,
            Some(Canary::ShareWithoutEntitlement | Canary::NoAck) => {
                settings.on_silence = OnSilence::FairShare;
                settings.patience = std::time::Duration::ZERO;
            }
            _ => {}
        }
        let addr = self.replicas[number].addr;
        let node: Arc<str> = format!("node-{}", addr.ip()).into();
        let slot = Slot { node, addr, exclusive: self.plan.exclusive };
        let version = self.version_of(self.replicas[number].slot);
        let knows = !self.versions[version].is_empty();
        let limiter = self.limiter(&clock, version);
        limiter.attach(id, slot.clone(), settings, self.plan.interval);
        let twin = matches!(self.options.canary, Some(Canary::ShareTakenTwice | Canary::InstalmentTwice)).then(|| {
            let twin = self.limiter(&clock, version);
            twin.attach(id, slot, settings, self.plan.interval);
            twin
        });
        let frames = Frames::new(KeyRing::of([7; 32]), "sim", id);
        Process {
            handle: limiter.handle(known(knows)).expect("the deployment was just added"),
            limiter,
            knows,
            twin,
            clock,
            inbox: Inbox::new(frames.clone()),
            frames,
            assembler: Assembler::default(),
            outbox: Outbox::new(),
            parked: Default::default(),
            flights: Default::default(),
            woken: Woken::default(),
            timeout_ms: u64::MAX,
        }
    }

    pub(super) fn limiter(&mut self, clock: &SharedClock, version: usize) -> Limiter {
        let seed = self.pods_rng.next();
        let builder = self.deployments(version).clock(clock.clone()).seed(seed);
        builder.build().expect("a plan's quotas can be built")
    }

    /// Sets a replica's clock to now and returns what it shows.
    pub(super) fn set_clock(&mut self, replica: usize) -> u64 {
        let ms = self.replicas[replica].local_ms(self.at, self.plan.phase);
        let incarnation = &mut self.replicas[replica];
        incarnation.latest_ms = incarnation.latest_ms.max(ms);
        if let Some(process) = &incarnation.process {
            process.clock.set(ms);
        }
        ms
    }

    /// Does something to a replica's ledger, and to its twin's.
    pub(super) fn with(&mut self, replica: usize, act: impl Fn(&mut Ledger, Timestamp)) {
        self.set_clock(replica);
        let Some(process) = &self.replicas[replica].process else { return };
        process.limiter.with_ledger(&act);
        if let Some(twin) = &process.twin {
            twin.with_ledger(|ledger, now| {
                act(ledger, now);
                while ledger.poll_transmit().is_some() {}
            });
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
            Some(process) => process.outbox.tick(),
            None => return,
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
        let Some(process) = &mut self.replicas[replica].process else { return };
        if process.timeout_ms != at_ms {
            return;
        }
        process.timeout_ms = u64::MAX;
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
        let before = (!requests.is_empty()).then(|| self.rights_of(replica));
        if repeated && before.is_some() {
            self.reach("replayed request");
        }
        if let Some(process) = &mut self.replicas[replica].process {
            process.outbox.heard(contact.from, contact.sent_at);
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

    /// Tells a replica's outbox who its peers are.
    pub(super) fn refresh_peers(&mut self, replica: usize) {
        if let Some(process) = &mut self.replicas[replica].process {
            let peers = process.limiter.with_ledger(|ledger, _| ledger.peers());
            process.outbox.set_peers(&peers);
        }
    }

    /// Takes everything a ledger wants done: wake-ups, messages, notes, deadlines.
    pub(super) fn flush(&mut self, replica: usize) {
        self.set_clock(replica);
        self.serve_woken(replica);
        let Some(process) = &mut self.replicas[replica].process else { return };
        let (transmits, notes, timeout) = process.limiter.with_ledger(|ledger, _| {
            let transmits: Vec<Transmit> = std::iter::from_fn(|| ledger.poll_transmit()).collect();
            let notes: Vec<Note> = std::iter::from_fn(|| ledger.poll_note()).collect();
            (transmits, notes, ledger.poll_timeout())
        });
        self.schedule_timeout(replica, timeout);
        if !transmits.is_empty() {
            let transmits = self.outgoing(replica, transmits);
            let Some(process) = &mut self.replicas[replica].process else { return };
            let parcels = process.outbox.pack(transmits);
            self.send(replica, parcels);
        }
        for note in notes {
            self.take_note(replica, note);
        }
    }

    fn schedule_timeout(&mut self, replica: usize, timeout: Option<Timestamp>) {
        let local = self.replicas[replica].local_ms(self.at, self.plan.phase);
        let Some(process) = &mut self.replicas[replica].process else { return };
        let at_ms = timeout.map_or(u64::MAX, Timestamp::unix_ms);
        if at_ms == process.timeout_ms {
            return;
        }
        process.timeout_ms = at_ms;
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

    /// A replica begins to leave.
    pub(super) fn leave(&mut self, replica: usize) {
        if !self.replicas[replica].serves() {
            return;
        }
        self.replicas[replica].leaving = Some(self.at);
        self.trace.note(&[6, replica as u64]);
        self.line(Some(replica), || "leaves".to_owned());
        self.with(replica, Ledger::leave);
        self.flush(replica);
    }

    /// A replica that leaves goes when it has handed over, or when its time is up.
    fn leave_at_last(&mut self, replica: usize) {
        let Some(since) = self.replicas[replica].leaving else { return };
        let Some(process) = &self.replicas[replica].process else { return };
        let idle = process.flights.is_empty() && process.parked.is_empty();
        let done = idle && process.limiter.with_ledger(|ledger, now| ledger.has_left(now));
        if done || self.at >= since + self.plan.drain {
            self.replicas[replica].left_in_order = done;
            self.die(replica);
        }
    }

    /// A process ends. What it held is gone; what it reserved stays charged.
    pub(super) fn die(&mut self, replica: usize) {
        let left_behind = self.rights_of(replica);
        let incarnation = &mut self.replicas[replica];
        if incarnation.process.take().is_none() {
            return;
        }
        incarnation.left_behind = left_behind;
        incarnation.died = Some(self.at);
        let addr = incarnation.addr;
        self.by_addr.remove(&addr);
        if incarnation.respawns {
            let slot = incarnation.slot;
            self.queue.push(self.at + 50_000, Event::Start { slot });
        }
        self.last_change = self.at;
        self.trace.note(&[7, replica as u64]);
        let stranded: Vec<(u64, i64)> = (self.replicas[replica].left_behind.iter())
            .map(|(quota, window, rights)| (*window, *rights as i64 - self.oracle.charged_by(replica, *quota, *window)))
            .filter(|(_, left)| *left != 0)
            .collect();
        self.line(Some(replica), || format!("is dead, and with it (window, rights unspent) {stranded:?}"));
        if self.plan.settings.directory == Directory::Name {
            self.queue.push(self.at + self.plan.delisted_after, Event::Delist { addr });
        }
    }
}

/// The deployment whose handle stands in for one that is not known yet.
const OTHER: &str = "other";

/// The deployment that clients ask for, or the one that is there before it.
pub(super) const fn known(knows: bool) -> &'static str {
    if knows { DEPLOYMENT } else { OTHER }
}

/// The one deployment.
pub(super) const DEPLOYMENT: &str = "gpt-4o";
