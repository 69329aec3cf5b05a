//! What the oracle checks beside its counts: that replicas tell the truth, that rights are
//! conserved, that refusals are due, that the fleet recovers.
//!
//! Knows the promises. Must not change anything a replica would notice. The invariant it
//! keeps: a check that depends on a condition says which, and is skipped where it is
//! broken.

use std::collections::BTreeMap;

use quotum::ledger::{Grid, Key, Obstacle, ReplicaId, WindowId, WindowKind};
use quotum::{Denied, Limiter, Mode, Quota, Timestamp};

use super::lives::DEPLOYMENT;
use super::queue::Event;
use super::world::World;
use crate::Micros;
use crate::central::amount_of;
use crate::workload::Request;

/// Rights by quota and window.
pub(super) type Rights = Vec<(usize, u64, u64)>;

/// What a replica has given of each of its windows, over all peers.
pub(super) type Gifts = BTreeMap<(Key, WindowId), u64>;

impl World {
    /// What a replica has given in its open windows.
    pub(super) fn gifts_of(&self, replica: usize) -> Gifts {
        let process = self.replicas[replica].process.as_ref().filter(|process| process.is_running());
        let rows = process.map(|process| process.limiter.with_ledger(|ledger, _| ledger.own_rows()));
        let mut gifts = Gifts::new();
        for row in rows.into_iter().flatten() {
            let given: u64 = row.given.iter().map(|(_, total)| total).sum();
            *gifts.entry((row.key, row.window)).or_default() += given;
        }
        gifts
    }

    /// What a replica owns in its open windows.
    pub(super) fn rights_of(&self, replica: usize) -> Rights {
        let Some(process) = self.replicas[replica].process.as_ref().filter(|process| process.is_running()) else {
            return Vec::new();
        };
        let mut rights = Vec::new();
        for limiter in [Some(&process.limiter), process.twin.as_ref()].into_iter().flatten() {
            rights.extend(
                self.open_windows(limiter).into_iter().map(|(quota, window, open)| (quota, window, open.rights)),
            );
        }
        rights
    }

    fn open_windows(&self, limiter: &Limiter) -> Vec<(usize, u64, Open)> {
        let mut all = Vec::new();
        for (index, quota) in self.plan.quotas.iter().enumerate() {
            let windows = limiter.with_ledger(|ledger, _| ledger.open_windows_of(DEPLOYMENT, *quota));
            for (start, reserved, refunded, rights) in windows {
                let number = quota.grid().window_at(start).number();
                all.push((index, number, Open { reserved, refunded, rights }));
            }
        }
        all
    }

    /// Looks inside every replica.
    pub(super) fn check(&mut self) {
        let mut sums: BTreeMap<(usize, u64), u64> = BTreeMap::new();
        for number in 0..self.replicas.len() {
            if self.pods.is_some() {
                self.observe(number);
            }
            let Some(process) = &self.replicas[number].process else {
                for (quota, window, rights) in &self.replicas[number].left_behind {
                    *sums.entry((*quota, *window)).or_default() += rights;
                }
                continue;
            };
            if !process.is_running() {
                continue;
            }
            let mut open: BTreeMap<(usize, u64), (i64, u64)> = BTreeMap::new();
            for limiter in [Some(&process.limiter), process.twin.as_ref()].into_iter().flatten() {
                for (quota, window, found) in self.open_windows(limiter) {
                    let entry = open.entry((quota, window)).or_default();
                    entry.0 += found.reserved as i64 - found.refunded as i64;
                    entry.1 += found.rights;
                }
            }
            for ((quota, window), (charged, rights)) in open {
                *sums.entry((quota, window)).or_default() += rights;
                let truth = self.oracle.charged_by(number, quota, window);
                if truth != charged && self.plan.http.is_none() {
                    self.oracle.violated(self.at, "no spend is lost, none leaks", || {
                        format!(
                            "replica {number} counts {charged} in window {window}, clients were admitted for {truth}"
                        )
                    });
                }
                if rights == 0 && self.plan.quotas[quota].amount() < self.plan.slots as u64 {
                    self.reached.insert("a limit smaller than the fleet");
                }
            }
            let blocked = process
                .limiter
                .with_ledger(|ledger, now| ledger.status(now).joined.is_none() && !ledger.blocked(now).is_empty());
            if blocked {
                self.reached.insert("a newcomer is blocked");
            }
        }
        self.check_upstreams();
        for ((quota, window), rights) in sums {
            let allowed = self.rights_allowed(quota, window);
            if rights > allowed {
                self.oracle.violated(self.at, "rights are conserved", || {
                    format!("{rights} rights exist in window {window}, {allowed} may")
                });
            }
        }
    }

    /// How many rights may exist in a slice; of a day as many as have vested by the clock
    /// that is furthest ahead.
    fn rights_allowed(&self, quota: usize, window: u64) -> u64 {
        let plan = &self.plan.quotas[quota];
        let Grid::Even(length) = plan.grid() else {
            let latest = self.replicas.iter().map(|replica| replica.latest_ms).max().unwrap_or(0);
            let most = self.oracle.most_rights(quota, latest);
            let Some((from, to)) = self.oracle.day(quota, latest).filter(|_| !plan.is_at_once()) else { return most };
            if plan.grid().window_at(Timestamp::from_unix_ms(latest)).number() != window {
                return most;
            }
            // A quarter at once, the rest in 144 equal steps; the first step is there at once.
            let steps = ((latest - from) * 144 / (to - from) + 1).min(144);
            return (most as f64 * (0.25 + 0.75 * steps as f64 / 144.0) + 1e-6) as u64;
        };
        // What was used above reservations in an ended slice of a bucket, or of an allowance, is
        // covered there with rights of later slices.
        let is_bucket = matches!(plan.kind(), WindowKind::Bucket { .. });
        let covered = if is_bucket {
            let allowance = match self.plan.mode {
                Mode::Elastic { beta } => beta.of(plan.largest_claim()),
                _ => 0,
            };
            self.oracle.count(quota, window).excess as u64 + allowance
        } else {
            0
        };
        self.oracle.most_rights(quota, window * length.ms().get()) + covered
    }

    /// A request that was answered with rights must not be answered with rights again.
    pub(super) fn check_answers(&mut self, replica: usize, from: ReplicaId, requests: Vec<u64>, before: &Gifts) {
        // By what it says it gave: rights also fall as a bucket's slices end.
        let after = self.gifts_of(replica);
        if !after.iter().any(|(place, given)| given > before.get(place).unwrap_or(&0)) {
            return;
        }
        let mut news = false;
        for number in requests {
            news |= self.answered.insert((replica, from, number));
        }
        if !news {
            self.oracle.violated(self.at, "a request is answered once", || {
                format!("replica {replica} gave rights again for an old request of {from}")
            });
        }
    }

    /// A refusal is right only if this replica does not cover the request, or somebody
    /// waits before it.
    pub(super) fn check_refusal(&mut self, replica: usize, request: &Request, since: Micros, denied: &Denied) {
        let Some(process) = &self.replicas[replica].process else { return };
        let quota = denied.by();
        let asked = amount_of(quota.unit(), request, false);
        match denied {
            Denied::TooLarge { .. } => {
                self.reached.insert("too large");
                if asked <= self.plan.mode.largest(quota.largest_claim()) as i64
                    && self.options.canary.is_none_or(|canary| !canary.is_configured())
                {
                    self.oracle.violated(self.at, "refusals are due", || {
                        format!("replica {replica} calls {asked} too large for {quota}")
                    });
                }
                return;
            }
            Denied::Unreachable { why: Obstacle::NotJoined, .. } => {
                self.reached.insert("refused: not joined");
            }
            Denied::Unreachable { why: Obstacle::PeersSilent, .. } => {
                self.reached.insert("refused: peers silent");
            }
            _ => {}
        }
        if self.pods.is_some() && since != self.at {
            return; // Decided earlier in this step: what the replica owned then is not known.
        }
        if self.replicas[replica].leaving.is_some() || !process.parked.is_empty() || process.twin.is_some() {
            return;
        }
        let open: BTreeMap<(usize, u64), Open> = self
            .open_windows(&process.limiter)
            .into_iter()
            .map(|(quota, window, open)| ((quota, window), open))
            .collect();
        // A clock that stepped back: the ledger goes on from the latest instant that it was told, and hits
        // tell it nothing. So it stands somewhere between the two.
        let latest = self.replicas[replica].latest_ms;
        let shown = self.replicas[replica].local_ms(self.at, self.plan.phase);
        let covered =
            [shown, latest].into_iter().flat_map(|ms| self.oracle.charged_windows(ms)).all(|(quota, window)| {
                let amount = amount_of(self.plan.quotas[quota].unit(), request, false);
                amount <= open.get(&(quota, window)).map_or(0, |open| open.balance())
            });
        if covered {
            let number = request.number;
            self.oracle.violated(self.at, "refusals are due", || {
                format!("replica {replica} refuses request {number} of {asked} and covers it: {denied}")
            });
        }
    }

    /// Whether the calm has lasted long enough that everybody must have recovered: the
    /// floor (6 s and a tick), the roster's slowest retry, and one window.
    pub(super) fn is_steady(&self) -> bool {
        self.at >= self.last_change.max(self.plan.storm) + 9_000_000 + self.plan.window()
    }

    /// The fleet after the calm.
    pub(super) fn check_end(&mut self) {
        self.check_web_end();
        if !self.plan.recovers {
            return;
        }
        if !self.plan.finale {
            self.check_recovery();
        }
        self.check_convergence();
    }

    /// One more death: its successor must learn from the others what it spent.
    pub(super) fn finale(&mut self) {
        self.check_recovery();
        let serving = (0..self.replicas.len()).rev().find(|number| self.replicas[*number].serves());
        if let Some(replica) = serving {
            self.reach("a death at the end");
            let slot = self.replicas[replica].slot;
            self.die(replica);
            self.queue.push(self.at + 200_000, Event::Start { slot });
        }
    }

    fn check_recovery(&mut self) {
        let steady = self.is_steady();
        let missing = self.is_anybody_missing();
        if missing {
            self.reach("somebody unproven is missing");
        }
        if steady && !missing {
            self.reach("recovered");
            self.check_shares();
        }
    }

    /// Whether somebody dead is not proven dead, or a listed address is silent.
    fn is_anybody_missing(&self) -> bool {
        let empty_slot = !self.plan.is_named() && (0..self.slots.len()).any(|slot| self.at_slot(slot).is_none());
        empty_slot
            || self.replicas.iter().filter_map(|replica| replica.process.as_ref()).any(|process| {
                process.limiter.with_ledger(|ledger, now| {
                    let unproven = |id: &ReplicaId| self.by_id.get(id).is_none_or(|at| !self.replicas[*at].is_alive());
                    ledger.status(now).peers.iter().any(|peer| peer.gone.is_none() && unproven(&peer.id))
                        || ledger.unresolved().iter().any(|addr| !self.by_addr.contains_key(addr))
                })
            })
    }

    /// Nobody is starved while nothing unproven is missing.
    fn check_shares(&mut self) {
        for number in 0..self.replicas.len() {
            let replica = &self.replicas[number];
            let Some(process) = replica.process.as_ref().filter(|_| replica.serves()) else { continue };
            process.clock.set(replica.local_ms(self.at, self.plan.phase));
            let status = process.limiter.status();
            if status.joined.is_none() || !status.has_share {
                let blocked = status.blocked;
                let joined = status.joined;
                self.oracle.violated(self.at, "the fleet recovers", || {
                    format!("replica {number} has no share after the calm: joined {joined:?}, blocked {blocked:?}")
                });
                continue;
            }
            let (offered, wrongful) = (replica.calm_offered, replica.calm_wrongful);
            let roomy = self.plan.wait.as_millis() >= 20 && self.is_roomy();
            if roomy && offered >= 20 && wrongful * 2 > offered {
                self.oracle.violated(self.at, "nobody is starved", || {
                    format!("replica {number} refused {wrongful} of {offered} requests that the fleet had budget for")
                });
            }
        }
    }

    /// Whether every replica's share is a few requests, and all are in one window.
    fn is_roomy(&self) -> bool {
        if self.plan.clock_range_ms > 20 || self.replicas.iter().any(|replica| replica.offset_ms.abs() > 20) {
            return false; // Peers whose clocks are behind have no rights to a window yet.
        }
        let (reserved, _) = self.plan.workload.costs.means();
        let share = self.plan.quotas[0].amount() / self.replicas.iter().filter(|r| r.is_alive()).count().max(1) as u64;
        let held_back = matches!(self.plan.mode, Mode::Sum { .. });
        let usual = !held_back && self.plan.is_plain() && self.versions.len() == 1;
        usual && self.plan.workload.large == 0.0 && self.plan.quotas.len() == 1 && share as f64 >= 5.0 * reserved
    }

    /// After a quiet moment everybody knows the same use, and it is the truth but for what
    /// died unheard.
    fn check_convergence(&mut self) {
        // Whoever was just told other limits still goes by the old ones in windows it has opened,
        // where its peers' counts are of another version.
        let longest = self.plan.quotas.iter().map(|quota| quota.window().ms().get() * 1_000).max().unwrap_or(0);
        let switching = self.last_told.is_some_and(|told| told + 2 * longest + SWITCHES_AHEAD > self.at);
        if self.last_change + QUIET_AFTER_CHANGE > self.at || switching {
            return;
        }
        for index in 0..self.plan.quotas.len() {
            let quota = self.plan.quotas[index];
            if matches!(quota.kind(), WindowKind::Bucket { .. }) {
                continue; // Shown is what of a full bucket is used, which no single slice is.
            }
            let mut known: Vec<(usize, u64, u64)> = Vec::new();
            for (number, replica) in self.replicas.iter().enumerate() {
                // Whoever leaves is told nothing more.
                let Some(process) = replica.process.as_ref().filter(|_| replica.serves()) else { continue };
                let now = replica.local_ms(self.at, self.plan.phase).max(replica.latest_ms);
                process.clock.set(now);
                let standings = process.handle.standings();
                let of_it = |other: Quota| {
                    (other.unit(), other.window(), other.kind()) == (quota.unit(), quota.window(), quota.kind())
                };
                let Some(standing) = standings.iter().find(|standing| of_it(standing.quota)) else { continue };
                known.push((number, quota.grid().window_at(standing.window_start).number(), standing.used));
            }
            let Some(&(_, number, used)) = known.first() else { continue };
            // Clocks may show different windows.
            if known.iter().any(|(_, other, _)| *other != number) || !self.has_settled_into(slice_ms(quota), number) {
                continue;
            }
            self.reached.insert("converged");
            let count = self.oracle.count(index, number);
            let truth = count.reserved + count.excess;
            // Of what the dead charged and gave back, the last may be unheard.
            let dead = || self.replicas.iter().enumerate().filter(|(_, replica)| !replica.is_alive());
            let lost: i64 = dead().map(|(dead, _)| self.oracle.charged_by(dead, index, number).max(0)).sum();
            let unheard: i64 = dead().map(|(dead, _)| self.oracle.given_back_by(dead, index, number)).sum();
            let (unit, at) = (quota.unit(), self.at);
            if let Some((other, _, theirs)) = known.iter().find(|(.., theirs)| *theirs != used) {
                let (first, theirs) = (known[0].0, *theirs);
                self.oracle.violated(at, "everybody converges", || {
                    format!("replica {first} knows {used} {unit} used in window {number}, replica {other} {theirs}")
                });
            } else if (used as i64) > truth + unheard || (used as i64) < truth - lost - unheard {
                self.oracle.violated(at, "everybody converges", || {
                    format!("everybody knows {used} {unit} used in window {number}; the truth is {truth}, {lost} of it by the dead")
                });
            }
        }
    }

    /// Whether nobody has entered this window only now, still without its peers' rows.
    fn has_settled_into(&self, length: Micros, number: u64) -> bool {
        let start = number * length;
        self.replicas.iter().filter(|replica| replica.is_alive()).all(|replica| {
            let local = replica.local_ms(self.at, self.plan.phase) * 1_000;
            local >= start + QUIET_AFTER_CHANGE / 2
        })
    }
}

fn slice_ms(quota: Quota) -> Micros {
    match quota.grid() {
        Grid::Even(length) => length.ms().get() * 1_000,
        Grid::Days(_) => quota.window().ms().get() * 1_000,
    }
}

/// One open window as its replica counts it.
#[derive(Clone, Copy, Debug, Default)]
struct Open {
    reserved: u64,
    refunded: u64,
    rights: u64,
}

impl Open {
    const fn balance(&self) -> i64 {
        self.rights as i64 - self.reserved as i64 + self.refunded as i64
    }
}

/// After a start or a death the next second may still bring news of it.
const QUIET_AFTER_CHANGE: Micros = 1_200_000;

/// How far ahead of a clock a window may have been opened: the longest lead, and peers' clocks.
const SWITCHES_AHEAD: Micros = 6_000_000;
