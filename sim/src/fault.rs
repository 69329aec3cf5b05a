//! What goes wrong, and when: a schedule that is data.
//!
//! Knows the kinds of fault and how a seed draws its own swarm of them. Must not know how
//! a layer makes them happen. The invariant it keeps: a schedule is a list of entries that
//! are independent of one another, so that any part of it is a schedule too and a failure
//! can be shrunk.

use crate::Micros;
use crate::rng::Rng;

/// One fault.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fault {
    /// Datagrams are lost with this probability.
    Loss(f64),
    /// Every datagram takes this much longer.
    Delay(Micros),
    /// Datagrams take up to this much longer, each its own.
    Reorder(Micros),
    /// Datagrams arrive twice with this probability.
    Duplicate(f64),
    /// Datagrams of a while ago arrive again with this probability.
    Replay(f64),
    /// Garbage arrives with this probability beside every datagram.
    Garbage(f64),
    /// Datagrams of another wire version arrive beside the real ones.
    OtherVersions(f64),
    /// Nothing gets from one slot to another.
    OneWay { from: usize, to: usize },
    /// The fleet falls into components: slot number modulo this.
    Split { ways: usize, salt: u64 },
    /// A slot's links are up and down in turn.
    Flap { slot: usize, period: Micros },
    /// A slot handles what arrives this much later.
    Slow { slot: usize, by: Micros },
    /// A slot's gossip ticks stop; requests are served all the same.
    Pause { slot: usize },
    /// A slot's clock jumps.
    ClockStep { slot: usize, ms: i64 },
    /// A process dies at once. It comes back after `down`, if at all: in the same slot or
    /// in a new one.
    Crash { slot: usize, down: Option<Micros>, same_slot: bool },
    /// A process leaves in order, and another one takes its place.
    Replace { slot: usize, same_slot: bool },
    /// Every process is replaced, one after the other, with this pause.
    Rolling { pause: Micros, same_slot: bool },
    /// The fleet grows to this many, and shrinks again when the fault ends.
    Scale { to: usize },
    /// Every process dies at once; all come back after `down`.
    AllDie { down: Micros },
    /// The directory's answers are this old.
    StaleDirectory(Micros),
    /// The directory's answers lack replicas that are alive.
    LyingDirectory,
    /// The limits change to so many hundredths of what they were at the start. One slot after
    /// the other is told, with this pause.
    Limits { percent: u64, pause: Micros },
    /// An operator declares a live replica dead.
    ForgetAlive { slot: usize },
    /// Somebody with the key tells one pod's chitchat of more replicas than it may know.
    /// Only whole pods have one.
    Crowd { slot: usize },
    /// No pod reaches an upstream, or only the answers get lost. Only proxies have one.
    UpstreamAway { upstream: usize, only_answers: bool },
    /// An upstream answers everything with this of the stub's faults.
    UpstreamFails { upstream: usize, with: &'static str },
}

impl Fault {
    /// Returns the name of the kind, as reports and sometimes-assertions use it.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Loss(_) => "loss",
            Self::Delay(_) => "delay",
            Self::Reorder(_) => "reorder",
            Self::Duplicate(_) => "duplicate",
            Self::Replay(_) => "replay",
            Self::Garbage(_) => "garbage",
            Self::OtherVersions(_) => "other wire versions",
            Self::OneWay { .. } => "one-way cut",
            Self::Split { .. } => "split",
            Self::Flap { .. } => "flapping link",
            Self::Slow { .. } => "slow replica",
            Self::Pause { .. } => "gossip pause",
            Self::ClockStep { .. } => "clock step",
            Self::Crash { down: None, .. } => "crash for good",
            Self::Crash { same_slot: true, .. } => "restart in the same slot",
            Self::Crash { same_slot: false, .. } => "restart in a new slot",
            Self::Replace { .. } => "replacement",
            Self::Rolling { .. } => "rolling replacement",
            Self::Scale { .. } => "scale",
            Self::AllDie { .. } => "all die",
            Self::StaleDirectory(_) => "lagging directory",
            Self::LyingDirectory => "lying directory",
            Self::Limits { .. } => "limits change",
            Self::ForgetAlive { .. } => "false proof of death",
            Self::Crowd { .. } => "a crowded chitchat",
            Self::UpstreamAway { only_answers: false, .. } => "upstream away",
            Self::UpstreamAway { .. } => "answers lost",
            Self::UpstreamFails { .. } => "upstream fails",
        }
    }
}

/// A fault from one time to another.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Scheduled {
    pub(crate) at: Micros,
    pub(crate) until: Micros,
    pub(crate) fault: Fault,
}

/// What a swarm may draw from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Swarm {
    pub(crate) slots: usize,
    pub(crate) storm: Micros,
    /// Window length and the phase of the run's start in it, to aim at rolls.
    pub(crate) window: Micros,
    pub(crate) phase: Micros,
    /// Whether new slots can be made (a headless name) or not (a static list).
    pub(crate) new_slots: bool,
}

impl Swarm {
    /// Draws this seed's own subset of faults and their times.
    pub(crate) fn draw(self, rng: &mut Rng) -> Vec<Scheduled> {
        // Each seed leaves out most kinds altogether: features hide one another's bugs
        // (Groce et al., Swarm Testing, ISSTA 2012).
        let mut schedule = Vec::new();
        for kind in 0..KINDS {
            let likely = if kind < NETWORK_KINDS { 0.25 } else { 0.2 };
            if !rng.chance(likely) {
                continue;
            }
            for _ in 0..rng.between(1, 3) {
                let (at, until) = self.time(rng);
                if let Some(fault) = self.fault(kind, rng) {
                    schedule.push(Scheduled { at, until, fault });
                }
            }
        }
        schedule.sort_by_key(|scheduled| (scheduled.at, scheduled.until));
        schedule
    }

    fn time(self, rng: &mut Rng) -> (Micros, Micros) {
        let mut at = rng.below(self.storm * 9 / 10);
        if rng.chance(0.5) {
            // Half of the faults begin near a roll, where shares are frozen.
            let roll = at + self.window - (self.phase + at) % self.window;
            at = (roll + rng.below(2_000_000)).saturating_sub(1_500_000).min(self.storm);
        }
        let until = (at + 200_000 + rng.below(self.storm / 2)).min(self.storm);
        (at, until.max(at + 1))
    }

    fn fault(self, kind: usize, rng: &mut Rng) -> Option<Fault> {
        let slot = rng.index(self.slots);
        let same_slot = !self.new_slots || rng.chance(0.5);
        Some(match kind {
            0 => Fault::Loss(rng.pick(&[0.02, 0.1, 0.3, 0.6])),
            1 => Fault::Delay(rng.between(2_000, 400_000)),
            2 => Fault::Reorder(rng.between(5_000, 1_500_000)),
            3 => Fault::Duplicate(rng.pick(&[0.05, 0.3])),
            4 => Fault::Replay(rng.pick(&[0.02, 0.2])),
            5 => Fault::Garbage(rng.pick(&[0.02, 0.1])),
            6 => Fault::OtherVersions(rng.pick(&[0.05, 0.2])),
            7 => Fault::OneWay { from: slot, to: rng.index(self.slots) },
            8 => Fault::Split { ways: rng.between(2, 3) as usize, salt: rng.next() },
            9 => Fault::Flap { slot, period: rng.between(100_000, 3_000_000) },
            10 => Fault::Slow { slot, by: rng.between(10_000, 2_000_000) },
            11 => Fault::Pause { slot },
            12 => Fault::ClockStep { slot, ms: rng.around_zero(1_500) },
            13 => Fault::Crash { slot, down: None, same_slot },
            14 => Fault::Crash { slot, down: Some(rng.between(50_000, 8_000_000)), same_slot: true },
            15 => Fault::Crash { slot, down: Some(rng.between(50_000, 8_000_000)), same_slot },
            16 => Fault::Replace { slot, same_slot },
            17 => Fault::Rolling { pause: rng.between(100_000, 4_000_000), same_slot },
            18 if self.new_slots => Fault::Scale { to: rng.between(1, 2 * self.slots as u64) as usize },
            19 => Fault::AllDie { down: rng.between(100_000, 6_000_000) },
            20 if self.new_slots => Fault::StaleDirectory(rng.between(100_000, 4_000_000)),
            _ => return None,
        })
    }
}

/// How many kinds a swarm draws from, and how many of them are about the network.
const KINDS: usize = 21;
const NETWORK_KINDS: usize = 12;
