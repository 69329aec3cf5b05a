//! The ledger as an operator sees it.
//!
//! Knows how to describe. Must not change anything. The invariant it keeps: what it shows
//! is read at one instant, under the ledger's lock.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::decision::Standing;
use super::limits::Shape;
use super::message::ReplicaId;
use super::mode::Mode;
use super::quota::{Key, Quota, Unit};
use super::roster::{Blocked, Directory};
use super::version::Switch;
use super::window::{EPSILON, Timestamp};
use super::{Ignored, Ledger, window_of};

/// Amounts of one key since this replica started, in units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reserved here.
    pub admitted: u64,
    /// Refunded here.
    pub refunded: u64,
    /// Spent here out of the mode's allowance and not covered by rights when the window
    /// closed: over all replicas, at least what a window was over its limit.
    pub overshoot: u64,
    /// Used beyond all rights left in its window, and beyond what the mode allows.
    pub uncovered: u64,
}

/// The cluster as one replica sees it.
#[derive(Clone, Debug)]
pub struct Status {
    /// This replica.
    pub replica: ReplicaId,
    /// Its node name.
    pub node: String,
    /// Its advertised address; `None` if it is alone.
    pub addr: Option<SocketAddr>,
    /// Whether it may take traffic.
    pub ready: bool,
    /// From which window start on it takes shares; `None` until it has joined.
    pub joined: Option<Timestamp>,
    /// Whether it owns a share of every window that runs now.
    pub has_share: bool,
    /// Whether it is leaving.
    pub leaving: bool,
    /// Who keeps it from its share, or costs it a part, and what resolves it.
    pub blocked: Vec<Blocked>,
    /// Peers that do not answer and that nothing proves gone: what that costs, and what resolves
    /// it.
    pub silent: Vec<Blocked>,
    /// Whether the fleet was told that this replica is dead: it takes no further share.
    pub declared_gone: bool,
    /// How far its clock is behind the latest instant that it ever showed: for so long this
    /// replica stays in the windows of that instant.
    pub clock_behind: Duration,
    /// Every other replica it remembers.
    pub peers: Vec<PeerStatus>,
    /// Every limit it holds.
    pub limits: Vec<LimitStatus>,
    /// How many quotas this replica's configuration does not know and holds for its peers.
    pub held: usize,
    /// Messages that changed nothing, by reason.
    pub ignored: Ignored,
}

impl Status {
    /// Says why a restart is better than to wait, if it is: the fleet takes this process for
    /// dead, or its clock once showed an instant more than a minute from now. A new process has
    /// its share of the next window but one.
    pub fn stuck(&self) -> Option<String> {
        if self.declared_gone {
            return Some("the fleet was told that this process is dead, and it takes no further share".into());
        }
        let behind = self.clock_behind;
        (behind > STUCK).then(|| {
            format!(
                "the clock once showed an instant that is {} s from now, and this process cannot go back behind it",
                behind.as_secs()
            )
        })
    }
}

/// What is further away than this is not waited for. To stop and start again takes a pod some
/// ten seconds, and a share after that at most the rest of a window.
const STUCK: Duration = Duration::from_secs(60);

/// A peer as one replica sees it.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// Which.
    pub id: ReplicaId,
    /// Its node name.
    pub node: String,
    /// Where it listens.
    pub addr: SocketAddr,
    /// Whether both hear one another.
    pub reachable: bool,
    /// How long ago it was last heard directly; `None` if never.
    pub staleness: Option<Duration>,
    /// Its clock minus ours, in milliseconds.
    pub skew_ms: Option<i64>,
    /// From which window start on it takes no share.
    pub gone: Option<Timestamp>,
}

/// A limit as one replica sees it.
#[derive(Clone, Debug)]
pub struct LimitStatus {
    /// The deployment's id or the `limit_id`.
    pub name: String,
    /// What it promises.
    pub mode: Mode,
    /// Each quota's standing in the running window, its counters, and how much of a window
    /// can be over; `None` in [`Mode::Observe`], which promises nothing.
    pub quotas: Vec<(Standing, Counters, Option<Overshoot>)>,
    /// What changes at a later window start.
    pub switches: Vec<Switch>,
    /// Requests parked now.
    pub parked: usize,
    /// Refused requests by reason.
    pub refused: BTreeMap<&'static str, u64>,
    /// Requests that `observe` let through.
    pub observed: u64,
    /// Peers that enforce another quota for this limit.
    pub mismatches: Vec<Mismatch>,
}

/// How much of the running window can be over its limit, over all replicas, in units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overshoot {
    /// What it cannot exceed (docs/guarantees.md has the formula of each mode).
    pub bound: u64,
    /// What is to be expected, as far as this replica knows; no promise.
    pub expected: u64,
}

/// A peer's other idea of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Who.
    pub peer: ReplicaId,
    /// What it enforces.
    pub theirs: Quota,
}

/// How long a peer that is not proven gone is silent before it is shown as that: a restart, a
/// pause for garbage or a lost burst is over by then.
const SILENT: Duration = Duration::from_secs(5);

impl Ledger {
    /// Returns everything there is to see.
    pub fn status(&self, now: Timestamp) -> Status {
        let (clock, now) = (now, self.now.max(now));
        let slot = self.roster.slot();
        let attached = self.roster.directory() != Directory::Alone;
        Status {
            replica: self.roster.me(),
            node: slot.node.to_string(),
            addr: attached.then_some(slot.addr),
            ready: self.is_ready(now),
            joined: self.roster.first(),
            has_share: self.has_share(now),
            leaving: self.roster.is_leaving(),
            blocked: self.blocked(clock),
            silent: self.silent(clock),
            declared_gone: self.roster.is_declared_gone(),
            clock_behind: self.behind(clock),
            peers: self
                .roster
                .everybody()
                .map(|(id, slot, gone)| {
                    let peer = self.peers.get(&id);
                    PeerStatus {
                        id,
                        node: slot.node.to_string(),
                        addr: slot.addr,
                        reachable: self.is_reachable(id, now),
                        staleness: peer.map(|peer| now.since(peer.heard)),
                        skew_ms: peer.map(|peer| peer.skew_ms),
                        gone,
                    }
                })
                .collect(),
            limits: self.configured().map(|limit| self.limit_status(limit, now)).collect(),
            held: self.held(),
            ignored: Ignored { future_answer: self.roster.future_answers(), ..self.ignored },
        }
    }

    /// Returns this replica's id.
    pub const fn me(&self) -> ReplicaId {
        self.roster.me()
    }

    /// Returns the replicas that count as alive, and where to send to them, by id. One that
    /// has said goodbye is among them as long as it is heard: it hands over what its last
    /// requests give back, and only to those it hears.
    pub fn peers(&self) -> Vec<(ReplicaId, SocketAddr)> {
        let silence = self.interval * super::REACHABLE_TICKS * 2;
        let heard = |id: &ReplicaId| self.peers.get(id).is_some_and(|peer| self.now.since(peer.heard) < silence);
        let everybody = self.roster.everybody().filter(|(id, _, gone)| gone.is_none() || heard(id));
        everybody.map(|(id, slot, _)| (id, slot.addr)).collect()
    }

    /// Returns where a replica of the roster listens, gone or not.
    pub fn address_of(&self, id: ReplicaId) -> Option<SocketAddr> {
        self.roster.everybody().find(|(known, ..)| *known == id).map(|(_, slot, _)| slot.addr)
    }

    /// Returns listed addresses at which nobody has answered yet.
    pub fn unresolved(&self) -> Vec<SocketAddr> {
        self.roster.unresolved().collect()
    }

    /// Returns who keeps this replica from its share, or costs it a part, as of what the
    /// ledger was told last. `clock` is what the clock shows, be it earlier than before.
    pub fn blocked(&self, clock: Timestamp) -> Vec<Blocked> {
        let mut blocked = self.roster.blocked();
        if let Some(trouble) = &self.trouble {
            // It says more than that nothing that counts has been read.
            blocked.retain(|other| other.who != trouble.who);
            blocked.insert(0, trouble.clone());
        }
        blocked.extend(self.roster.fenced(self.now));
        let behind = self.behind(clock);
        blocked.extend((behind > 2 * EPSILON).then(|| Blocked::ahead(self.roster.me(), behind)));
        for block in &mut blocked {
            let addr = block.who.parse().ok();
            let addr = addr.or_else(|| self.address_of(ReplicaId::parse(&block.who)?));
            if let Some((why, _)) = addr.and_then(|addr| self.rejected.get(&addr)) {
                block.reject(why);
            }
        }
        blocked
    }

    /// Returns the peers that this replica and they have not heard one another of for long,
    /// and that nothing proves gone: what they hold of any window is out of reach.
    pub fn silent(&self, clock: Timestamp) -> Vec<Blocked> {
        let now = self.now.max(clock);
        let peers = self.roster.peers().filter(|(id, _)| !self.is_reachable(*id, now));
        let silent = peers.filter_map(|(id, slot)| {
            let peer = self.peers.get(&id).copied().unwrap_or_default();
            // Who was never heard is waited for, and that is said elsewhere.
            let (unheard, unechoed) = (now.since(peer.heard), clock.min(now).since(peer.echo));
            let heard = peer.contact.is_some();
            let silent = heard && unheard.max(unechoed) >= SILENT;
            silent.then(|| {
                let mut silent = Blocked::silent(id, slot, unheard, unechoed, self.roster.directory());
                if let Some((why, _)) = self.rejected.get(&slot.addr) {
                    silent.reject(why);
                }
                silent
            })
        });
        silent.collect()
    }

    /// Says whether this replica has looked at its directory and heard a peer, or is
    /// alone: whether it may take traffic.
    pub fn is_ready(&self, now: Timestamp) -> bool {
        !self.roster.is_leaving()
            && !self.roster.is_declared_gone()
            && (self.roster.first().is_some()
                || (self.roster.has_looked() && self.roster.peers().any(|(id, _)| self.is_reachable(id, now))))
    }

    /// Says whether this replica has its share of the windows that run now, in every
    /// limit that is in use.
    pub fn has_share(&self, now: Timestamp) -> bool {
        let own = self.limits.iter().filter(|limit| limit.configured).flat_map(|limit| &limit.keys);
        let mut states = own.map(|key| &self.keys[*key]).filter(|state| state.ring.is_in_force(now));
        self.roster.first().is_some_and(|first| {
            !self.roster.is_declared_gone()
                && states.all(|state| state.slices.latest_instalment(window_of(state, now), now).start() >= first)
        })
    }

    /// Returns where each quota of a limit stands in the window of `now`, in key order.
    pub fn standings(&self, limit: &str, now: Timestamp) -> Vec<Standing> {
        let now = self.now.max(now);
        let id = super::LimitId::of(limit);
        let Some(&limit) = self.by_limit.get(&id) else { return Vec::new() };
        self.in_force(limit, now).map(|key| self.standing_of(key, now)).collect()
    }

    /// Returns the counters of this replica for all quotas of one unit in the open windows:
    /// window start, reserved, refunded, rights. For an oracle outside.
    pub fn open_windows(&self, limit: &str, unit: Unit) -> Vec<(Timestamp, u64, u64, u64)> {
        self.open_windows_if(limit, |key| key.quota.unit() == unit)
    }

    /// As [`Ledger::open_windows`], for the windows of one quota, whatever its amount.
    pub fn open_windows_of(&self, limit: &str, quota: Quota) -> Vec<(Timestamp, u64, u64, u64)> {
        self.open_windows_if(limit, |key| Shape::of(key) == Shape::of(&Key { quota, ..*key }))
    }

    fn open_windows_if(&self, limit: &str, wanted: impl Fn(&Key) -> bool) -> Vec<(Timestamp, u64, u64, u64)> {
        let Some(&limit) = self.by_limit.get(&super::LimitId::of(limit)) else { return Vec::new() };
        let keys = self.limits[limit].slots.iter().map(|key| &self.keys[*key]);
        keys.filter(|state| wanted(&state.key))
            .flat_map(|state| {
                state.open.values().map(|account| {
                    let usage = account.usage(&state.ring);
                    (account.window.start(), usage.reserved, usage.refunded, account.rights().max(0) as u64)
                })
            })
            .collect()
    }

    /// Returns how much of the window of `now` can be over, unless nothing is promised.
    fn overshoot_of(&self, key: usize, now: Timestamp) -> Option<Overshoot> {
        let state = &self.keys[key];
        let window = window_of(state, now);
        let (mode, quota) = (state.mode_in(window), state.version_at(window.start()).quota);
        let account = state.open.get(&window.number());
        let bound = mode.overshoot_bound(quota, self.replicas_in(account, window))?;
        let expected = match mode {
            Mode::Sum { .. } => self.unheard_over_margin(key, window, now),
            // Debts that nobody has covered yet.
            _ => account.map_or(0, |account| account.debts(&state.ring)),
        };
        Some(Overshoot { bound, expected: expected.min(bound) })
    }

    /// Returns how many quotas have a place here: configured, running out, or held for peers.
    pub fn keys_held(&self) -> usize {
        self.limits.iter().map(|limit| limit.slots.len()).sum()
    }

    fn configured(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.limits.len()).filter(|limit| self.limits[*limit].configured)
    }

    fn limit_status(&self, number: usize, now: Timestamp) -> LimitStatus {
        let limit = &self.limits[number];
        let quotas = self.in_force(number, now).map(|key| {
            let state = &self.keys[key];
            let mut counters = state.closed;
            for account in state.open.values() {
                let usage = account.usage(&state.ring);
                counters.admitted += usage.reserved;
                counters.refunded += usage.refunded;
            }
            (self.standing_of(key, now), counters, self.overshoot_of(key, now))
        });
        LimitStatus {
            name: limit.name.to_string(),
            mode: limit.mode,
            quotas: quotas.collect(),
            switches: self.switches(number, now),
            parked: limit.queue.len(),
            refused: limit.refused.clone(),
            observed: limit.observed,
            mismatches: limit
                .mismatches
                .iter()
                .filter_map(|((peer, _), other)| Some(Mismatch { peer: *peer, theirs: other.quota? }))
                .collect(),
        }
    }
}
