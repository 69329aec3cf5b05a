//! Replicas' lives: start, leave, die.
//!
//! Knows what a life is on every layer. Must not know clients or faults, nor how a ledger is
//! driven. The invariant it keeps: a process registers before it looks, and a process that
//! leaves stays until it has handed over.

use std::net::SocketAddr;

use quotum::cluster::ClusterConfig;
use quotum::cluster::wire::{OLDEST_WIRE_VERSION, WIRE_VERSION};
use quotum::ledger::{Directory, FirstWindow, Ledger, OnSilence, ReplicaId, Slot};
use quotum::{Limiter, Timestamp};

use super::events::Hand;
use super::pods;
use super::queue::Event;
use super::replica::{Drive, Process, Replica, SharedClock, Woken};
use super::world::World;
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
            wire: self.wire_of_now(),
            misdirected: 0,
            offset_ms,
            drift_ppm,
            paused: false,
            free_since: self.at,
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
        if self.pods.is_some() {
            return;
        }
        self.lookup(number);
        let tick = self.pods_rng.below(self.plan.interval.as_micros() as u64);
        self.queue.push(self.at + tick, Event::Tick { replica: number });
    }

    /// The newest wire version of a process that starts now.
    fn wire_of_now(&mut self) -> u8 {
        let release = self.plan.releases.iter().rev().find(|(from, _)| *from <= self.at);
        let wire = release.map_or(WIRE_VERSION, |(_, wire)| *wire);
        if self.replicas.iter().any(|replica| replica.is_alive() && replica.wire != wire) {
            self.reach("two releases at once");
        }
        wire
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
        let slot = Slot { node: node(addr).into(), addr, exclusive: self.plan.exclusive };
        let version = self.version_of(self.replicas[number].slot);
        let knows = !self.versions[version].is_empty();
        let limiter = self.limiter(&clock, version);
        let keys = self.keys(number);
        let drive = match &mut self.pods {
            None => {
                limiter.attach(id, slot.clone(), settings, self.plan.interval).expect("a new limiter");
                Drive::Hand(Box::new(Hand::new(id, self.replicas[number].wire)))
            }
            Some(pods) => {
                let is_silent = self.options.canary == Some(Canary::NewestNotSaid);
                let wire = if is_silent { OLDEST_WIRE_VERSION } else { self.replicas[number].wire };
                let config = ClusterConfig { wire, ..pods::config(&self.plan, &self.slots, addr, keys) };
                Drive::Pod(pods.start(number, limiter.clone(), config))
            }
        };
        let twin = matches!(self.options.canary, Some(Canary::ShareTakenTwice | Canary::InstalmentTwice)).then(|| {
            let twin = self.limiter(&clock, version);
            twin.attach(id, slot, settings, self.plan.interval).expect("a new limiter");
            twin
        });
        Process {
            handle: limiter.handle(known(knows)).expect("the deployment was just added"),
            limiter,
            knows,
            twin,
            clock,
            parked: Default::default(),
            flights: Default::default(),
            woken: Woken::default(),
            drive,
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

    /// Takes everything a replica wants done: wake-ups, and by hand what its loop would take.
    pub(super) fn flush(&mut self, replica: usize) {
        self.set_clock(replica);
        self.serve_woken(replica);
        if self.pods.is_none() {
            self.drain(replica);
        }
    }

    /// A replica begins to leave.
    pub(super) fn leave(&mut self, replica: usize) {
        if !self.replicas[replica].serves() {
            return;
        }
        self.replicas[replica].leaving = Some(self.at);
        let has_parked = self.replicas[replica].process.as_ref().is_some_and(|process| !process.parked.is_empty());
        if has_parked || self.has_parked_callers(replica) {
            self.reach("parked while the pod left");
        }
        self.trace.note(&[6, replica as u64]);
        self.line(Some(replica), || "leaves".to_owned());
        match self.replicas[replica].process.as_ref().map(|process| &process.drive) {
            Some(Drive::Pod(pod)) => pod.hand_over(),
            _ => self.with(replica, Ledger::leave),
        }
        self.flush(replica);
    }

    /// A replica that leaves goes when it has handed over, or when its time is up.
    pub(super) fn leave_at_last(&mut self, replica: usize) {
        let Some(since) = self.replicas[replica].leaving else { return };
        let Some(process) = &self.replicas[replica].process else { return };
        let idle = process.flights.is_empty() && process.parked.is_empty();
        let done = idle
            && match &process.drive {
                Drive::Hand(_) => process.limiter.with_ledger(|ledger, now| ledger.has_left(now)),
                Drive::Pod(pod) => pod.leave(),
            };
        if done || self.at >= since + self.plan.drain {
            self.replicas[replica].left_in_order = done;
            self.reach(if done { "left in order" } else { "cut off while it left" });
            self.die(replica);
        }
    }

    /// A process ends. What it held is gone; what it reserved stays charged.
    pub(super) fn die(&mut self, replica: usize) {
        let left_behind = self.rights_of(replica);
        self.note_charges(replica);
        let incarnation = &mut self.replicas[replica];
        if incarnation.process.take().is_none() {
            return;
        }
        incarnation.left_behind = left_behind;
        incarnation.died = Some(self.at);
        let addr = incarnation.addr;
        if let Some(pods) = &mut self.pods {
            pods.stop(addr);
        }
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

/// The name of the node at an address.
pub(super) fn node(addr: SocketAddr) -> String {
    format!("node-{}", addr.ip())
}

/// The deployment whose handle stands in for one that is not known yet.
const OTHER: &str = "other";

/// The deployment that clients ask for, or the one that is there before it.
pub(super) const fn known(knows: bool) -> &'static str {
    if knows { DEPLOYMENT } else { OTHER }
}

/// The one deployment.
pub(super) const DEPLOYMENT: &str = "gpt-4o";
