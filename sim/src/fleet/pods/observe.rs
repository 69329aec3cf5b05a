//! What is seen of whole pods beside what clients see: their status and their counts.
//!
//! Knows what must hold of a process whatever a plan does to it. Must not change anything a
//! pod would notice. The invariant it keeps: a check that a fault excuses is skipped while the
//! fault lasts, and is done again after it.

use std::fmt::Write as _;

use quotum::Timestamp;
use quotum::cluster::KeyRing;
use quotum::cluster::fragment::{self, Kind};
use quotum::cluster::frame::Frames;
use quotum::cluster::wire::OLDEST_WIRE_VERSION;
use quotum::ledger::ReplicaId;

use crate::Micros;
use crate::canary::Canary;
use crate::fault::Fault;
use crate::fleet::directory::address;
use crate::fleet::replica::{Drive, Replica};
use crate::fleet::world::World;
use crate::fleet::{CLUSTER, KEY};

impl World {
    /// Looks at what a process says of the fleet and of itself: its loop takes its notes.
    pub(in crate::fleet) fn observe(&mut self, replica: usize) {
        let Some(process) = self.replicas[replica].process.as_ref().filter(|process| process.is_running()) else {
            return;
        };
        let status = process.limiter.status();
        let gone = status.peers.iter().filter(|peer| peer.gone.is_some()).map(|peer| peer.id);
        let news: Vec<(usize, ReplicaId)> =
            gone.map(|id| (replica, id)).filter(|death| !self.deaths.contains(death)).collect();
        let joined = status.joined.is_some() && self.joined.insert(replica);
        if joined {
            self.reach("joined");
        }
        if joined || !news.is_empty() {
            self.last_change = self.at;
            self.line(Some(replica), || format!("joined {:?}, knows as gone now {news:?}", status.joined));
        }
        if !news.is_empty() {
            self.reach("gone");
        }
        self.deaths.extend(news);
        self.rekey(replica);
        self.check_parked(replica);
        self.check_counts(replica);
    }

    /// A pod's key file changes while it runs, on one pod after the other.
    fn rekey(&mut self, replica: usize) {
        let Replica { slot, born, process: Some(process), .. } = &self.replicas[replica] else { return };
        let Drive::Pod(pod) = &process.drive else { return };
        let rings = |until: Micros| self.plan.keys.iter().filter(|(from, _)| *from <= until).count();
        let due = rings(self.at.saturating_sub(*slot as Micros * FILE_LAG)).max(rings(*born));
        if due <= pod.seen.rings.replace(due).max(rings(*born)) {
            return;
        }
        let Some(cluster) = pod.seen.cluster.borrow().clone() else { return };
        cluster.rekey(ring(self.plan.keys[due - 1].1)).expect("a plan's keys are no cluster's without one");
        self.reach("keys changed while it ran");
    }

    /// Whoever waits is answered: the loop keeps the ledger's deadlines.
    fn check_parked(&mut self, replica: usize) {
        let Some(process) = &self.replicas[replica].process else { return };
        if self.replicas[replica].paused {
            return;
        }
        // A clock that is set back puts deadlines off.
        let steps = self.plan.faults.iter().any(|scheduled| matches!(scheduled.fault, Fault::ClockStep { .. }));
        let patience = self.plan.wait.as_micros() as Micros + if steps { 6 * SECOND } else { SECOND };
        let since = process.parked.values().map(|waiting| waiting.since).min();
        if let Some(since) = since.filter(|since| (*since).max(self.replicas[replica].free_since) + patience < self.at)
        {
            self.oracle.violated(self.at, "who waits is answered", || {
                format!("replica {replica} has parked a request since {:.3} s", since as f64 / 1e6)
            });
        }
    }

    /// Its failure detector runs or is started again, and no honest frame is thrown away.
    fn check_counts(&mut self, replica: usize) {
        let Some(process) = &self.replicas[replica].process else { return };
        let Drive::Pod(pod) = &process.drive else { return };
        let Some(stats) = pod.seen.cluster.borrow().as_ref().map(|cluster| cluster.stats()) else { return };
        let (restarts, paused, has_left) =
            (stats.membership_restarts, self.replicas[replica].paused, pod.seen.left.get());
        let unwell = (!stats.healthy && !paused && !has_left).then(|| pod.seen.unwell_since.get().unwrap_or(self.at));
        pod.seen.unwell_since.set(unwell);
        if restarts > 0 {
            self.reach("chitchat started again");
        }
        if unwell.is_some() {
            self.reach("a pod is unwell");
        }
        if unwell.is_some_and(|since| since + UNWELL < self.at) {
            self.oracle.violated(self.at, "chitchat is started again", || {
                format!("replica {replica} is without it for {} s", UNWELL / SECOND)
            });
        }
        let forged = |fault: &Fault| matches!(fault, Fault::Garbage(_) | Fault::OtherVersions(_) | Fault::Crowd { .. });
        if self.plan.faults.iter().any(|scheduled| forged(&scheduled.fault)) {
            return;
        }
        // A newer release's frames for the process before it, whose address it has, look to a
        // pod of the release before like any other of their version.
        let misdirected = self.replicas[replica].misdirected;
        let excused = |reason: &str, count| match reason {
            "version" => count <= misdirected,
            reason => EXCUSED.contains(&reason),
        };
        let mut rejected = String::new();
        for (reason, count) in stats.frames_rejected.iter().filter(|(reason, count)| !excused(reason, **count)) {
            if *count == 0 {
                continue;
            }
            let _ = write!(rejected, "{count} {reason}; ");
        }
        if !rejected.is_empty() {
            self.oracle
                .violated(self.at, "no honest frame is thrown away", || format!("replica {replica}: {rejected}"));
        }
    }

    /// The keys of a process that starts now.
    pub(in crate::fleet) fn keys(&self, replica: usize) -> KeyRing {
        if self.options.canary == Some(Canary::WrongKey) && self.replicas[replica].slot == 0 {
            return KeyRing::of([9; 32]);
        }
        let Some((_, keys)) = self.plan.keys.iter().rev().find(|(from, _)| *from <= self.at) else {
            return KeyRing::of(KEY);
        };
        ring(keys)
    }

    /// Somebody with the key sends one pod's chitchat a digest of more replicas than it may
    /// know: it ends, and must be started again.
    pub(in crate::fleet) fn crowd(&mut self, slot: usize) {
        let (Some(to), Some(_)) = (self.slots.get(slot).copied(), &self.pods) else { return };
        let mut syn = vec![0x53, 0xb0, 0, 0]; // Magic number, version, SYN.
        syn.extend(CROWD.to_le_bytes());
        for number in 0..CROWD {
            syn.extend(0u16.to_le_bytes()); // No name.
            syn.extend(u64::from(number).to_le_bytes());
            syn.extend([4, 10, 9, (number >> 8) as u8, number as u8]);
            syn.extend(7_946u16.to_le_bytes());
            syn.extend([0; 24]); // Heartbeat and versions.
        }
        syn.extend((CLUSTER.len() as u16).to_le_bytes());
        syn.extend(CLUSTER.bytes());
        let now = Timestamp::from_unix_ms(self.true_ms());
        let stranger = Frames::new(KeyRing::of(KEY), CLUSTER, ReplicaId::from_bits(1));
        let fragments = fragment::split(Kind::Chitchat, 1, &syn).expect("64 fragments are enough");
        let Some(pods) = &mut self.pods else { return };
        for (number, fragment) in (0u8..).zip(fragments) {
            let bytes = stranger.seal(OLDEST_WIRE_VERSION, None, now, None, [number; 24], &fragment);
            pods.wire.deliver(address(STRANGER), to, bytes);
        }
    }
}

/// The keys that a file would hold, one a line.
fn ring(keys: &[u8]) -> KeyRing {
    let line = |key: &u8| format!("{key:02x}").repeat(32);
    let file: Vec<String> = keys.iter().map(line).collect();
    KeyRing::parse(&file.join("\n")).expect("a plan's keys can be read")
}

/// How much later than its neighbour a pod sees that its key file has changed.
const FILE_LAG: Micros = 700_000;

/// Reasons for which a frame may be thrown away without anybody having forged one: it was for
/// an earlier process, clocks are off, it came back late, or other fragments are lost.
const EXCUSED: [&str; 5] = ["receiver", "own", "old", "early", "fragment"];

/// After so long without chitchat it must run again: it is started after a second.
const UNWELL: Micros = 3 * SECOND;

/// More than chitchat may know (900).
const CROWD: u16 = 905;

/// The slot of nobody.
const STRANGER: usize = 60_000;

const SECOND: Micros = 1_000_000;
