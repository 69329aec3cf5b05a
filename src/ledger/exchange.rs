//! Asking for rights and giving them: pull escrow (docs/algorithm.md section 8).
//!
//! Knows whom to ask for how much, and what to answer. Must not know why a request was
//! parked or how a row is sent. The invariant it keeps: rights are given only as an answer
//! to a request or when leaving, only out of a positive wallet, only after the debit; so a
//! gift that is lost is lost, never doubled.

use std::time::Duration;

use super::account::{Account, Actor};
use super::message::{Message, ReplicaId, RequestKind, RightsRequest, Target, Transmit};
use super::mode::Mode;
use super::window::{Timestamp, Window};
use super::{Ledger, window_of};

/// The most peers asked at once for one key.
const MAX_DONORS: usize = 16;

/// How long ahead a wallet should last before rights are fetched unasked.
const PREFETCH_HORIZON_S: u64 = 1;

/// To how many peers a leaving replica hands its rights over at each tick.
const HEIRS: usize = 4;

/// What is wanted of the peers.
#[derive(Clone, Copy)]
struct Wanted {
    need: u64,
    want: u64,
    kind: RequestKind,
    waiting_ms: u32,
}

impl Ledger {
    /// Asks for what the parked requests of a limit lack.
    pub(super) fn ask_for_parked(&mut self, limit: usize, now: Timestamp) {
        let Some(waiting_ms) = self.waiting_ms(limit) else { return };
        for position in 0..self.limits[limit].keys.len() {
            let key = self.limits[limit].keys[position];
            for window in self.parked_windows(key, now) {
                let balance = self.keys[key].ring.balance(window.number());
                let missing = i128::from(self.parked_amount(key)) - i128::from(balance);
                if missing > 0 {
                    let need = missing as u64;
                    let want = need.saturating_add(4 * self.keys[key].typical);
                    self.ask(key, window, Wanted { need, want, kind: RequestKind::Parked, waiting_ms }, now);
                }
            }
        }
        let keys = &self.limits[limit].keys;
        let rtt = keys.iter().map(|key| self.slowest_asked(*key, now)).max().unwrap_or_default();
        self.limits[limit].ask_again = now.plus(rtt.max(Duration::from_millis(2)));
    }

    /// Finds windows in which an allowance was dipped into: no settlement tells of that.
    pub(super) fn notice_debts(&mut self) {
        for key in self.active.clone() {
            let elastic = |account: &Account| matches!(account.mode, Mode::Elastic { .. });
            if self.keys[key].open.values().any(elastic) {
                self.notice_debts_of(key);
            }
        }
    }

    pub(super) fn notice_debts_of(&mut self, key: usize) {
        let state = &self.keys[key];
        let indebted = state.open.values().filter(|account| account.owned(&state.ring) < 0);
        self.indebted.extend(indebted.map(|account| (key, account.window.number())));
    }

    /// Asks for what was charged beyond this replica's rights.
    pub(super) fn ask_for_debts(&mut self, now: Timestamp) {
        for (key, number) in self.indebted.clone() {
            let state = &self.keys[key];
            let owned = state.owned(number);
            let window = state.open.get(&number).map(|account| account.window);
            let Some(window) = window.filter(|_| owned < 0) else {
                self.indebted.remove(&(key, number));
                continue;
            };
            let need = owned.unsigned_abs();
            self.ask(key, window, Wanted { need, want: need, kind: RequestKind::Debt, waiting_ms: 0 }, now);
        }
    }

    /// Fetches rights before they are missed, unless they are scarce: then fragments in
    /// many wallets help nobody (docs/algorithm.md section 8).
    pub(super) fn prefetch(&mut self, now: Timestamp) {
        if !self.attached || self.roster.is_leaving() {
            return;
        }
        for key in self.active.clone() {
            let state = &self.keys[key];
            if !state.own || !state.ring.is_in_force(now) {
                continue;
            }
            let window = window_of(state, now);
            let owned = state.owned(window.number());
            let low = (state.demand * PREFETCH_HORIZON_S).max(3 * state.typical).min(state.slices.most());
            if state.demand == 0 || owned >= low as i64 || !state.open.contains_key(&window.number()) {
                continue;
            }
            if self.is_scarce(key, window, now) {
                continue;
            }
            let mut best: Option<(u64, Actor, ReplicaId)> = None;
            let donors: Vec<_> = self.donors(key, window, now).collect();
            for (actor, id, hint) in donors {
                let demand =
                    self.keys[key].open[&window.number()].peers.get(&actor).map_or(0, |row| u64::from(row.demand));
                let spare = hint.saturating_sub(2 * demand * PREFETCH_HORIZON_S);
                // A random half keeps replicas from asking the same rich one together.
                let spare = spare / 2 + self.random.below(spare / 2 + 1);
                if best.is_none_or(|(most, ..)| spare > most) {
                    best = Some((spare, actor, id));
                }
            }
            let wish = (2 * low).saturating_sub(owned.max(0) as u64);
            let Some((spare, actor, id)) = best else { continue };
            let want = wish.min(spare / 2);
            if want > wish / 4 && want > 0 {
                self.send_request(
                    key,
                    window,
                    actor,
                    id,
                    Wanted { need: 1, want, kind: RequestKind::Prefetch, waiting_ms: 0 },
                    now,
                );
            }
        }
    }

    /// Answers a rights request with rights, or with a row that says why not.
    pub(super) fn handle_request(&mut self, from: ReplicaId, request: &RightsRequest, now: Timestamp) {
        let Some((key, window)) = self.find_or_hold(&request.key, request.window, now) else {
            self.ignored.unknown_key += 1;
            return;
        };
        let Some(actor) = self.actor(from) else { return };
        if !self.hears_us(from, now) {
            // Rights given to somebody who does not hear us are lost until the window ends.
            self.ignored.stale_request += 1;
            return;
        }
        let Some(account) = self.open(key, window, now) else {
            self.ignored.closed_window += 1;
            return;
        };
        let question = account.question(actor);
        if request.seq <= question.answered {
            self.ignored.stale_request += 1;
            return;
        }
        question.answered = request.seq;
        let amount = self.generosity(key, window, actor, from, request, now);
        let state = &mut self.keys[key];
        let account = state.open.get_mut(&window.number()).expect("opened above");
        account.give(actor, amount, &state.ring);
        self.answer(key, window, actor, from);
    }

    /// Gives everything away, to the peers with the most demand.
    pub(super) fn hand_over(&mut self, now: Timestamp) {
        for key in self.active.clone() {
            let windows: Vec<Window> = self.keys[key].open.values().map(|account| account.window).collect();
            for window in windows.into_iter().filter(|window| window.end() > now) {
                if self.keys[key].is_cut_off(window, now) {
                    continue;
                }
                let owned = self.keys[key].owned(window.number());
                if owned <= 0 {
                    continue;
                }
                let mut heirs: Vec<(u64, ReplicaId)> = Vec::new();
                let peers: Vec<ReplicaId> = self.roster.peers().map(|(id, _)| id).collect();
                for id in peers {
                    if self.is_reachable(id, now)
                        && let Some(actor) = self.actor(id)
                    {
                        let demand = self.keys[key].open[&window.number()]
                            .peers
                            .get(&actor)
                            .map_or(0, |row| u64::from(row.demand));
                        heirs.push((demand, id));
                    }
                }
                heirs.sort_unstable_by_key(|(demand, id)| (std::cmp::Reverse(*demand), *id));
                heirs.truncate(HEIRS);
                let weights: u64 = heirs.iter().map(|(demand, _)| demand + 1).sum();
                let mut left = owned as u64;
                for (place, (demand, id)) in heirs.iter().enumerate() {
                    let last = place + 1 == heirs.len();
                    let part = (u128::from(owned as u64) * u128::from(demand + 1) / u128::from(weights)) as u64;
                    let part = if last { left } else { part.min(left) };
                    let actor = self.actor(*id).expect("interned above");
                    let state = &mut self.keys[key];
                    let account = state.open.get_mut(&window.number()).expect("listed above");
                    left -= account.give(actor, part, &state.ring);
                    self.answer(key, window, actor, *id);
                }
            }
        }
    }

    /// Says whether everything is handed over, or nobody is there to take it.
    pub fn has_left(&self, now: Timestamp) -> bool {
        if !self.roster.is_leaving() {
            return false;
        }
        if !self.roster.peers().any(|(id, _)| self.is_reachable(id, now)) {
            return true;
        }
        let handed_over = self.active.iter().map(|key| &self.keys[*key]).all(|state| {
            state
                .open
                .values()
                .all(|account| account.repeat == 0 && (account.window.end() <= now || account.owned(&state.ring) <= 0))
        });
        handed_over && self.roster.everybody_knows(|id| self.is_reachable(id, now))
    }

    /// What reachable peers can give, as they last said.
    pub(super) fn reachable_rights(&self, key: usize, window: Window, now: Timestamp) -> u64 {
        self.donors(key, window, now).fold(0, |sum: u64, (_, _, hint)| sum.saturating_add(hint))
    }

    /// Reachable peers with what they can give. One that has said nothing of this window
    /// yet is taken to have an even share: it opens the window when it is asked.
    fn donors(&self, key: usize, window: Window, now: Timestamp) -> impl Iterator<Item = (Actor, ReplicaId, u64)> + '_ {
        let account = self.keys[key].open.get(&window.number());
        let replicas = self.roster.peers().count() as u64 + 1;
        let even = self.keys[key].version_at(window.start()).quota.largest_claim() / replicas;
        let unit = self.keys[key].key.quota.unit();
        let others = &self.limits[self.keys[key].limit].mismatches;
        let differs = move |id: &ReplicaId| others.get(&(*id, unit)).is_some_and(|other| other.quota.is_some());
        // Without rights there is nothing to ask for.
        let escrow = self.keys[key].mode_in(window).has_rights();
        self.roster.peers().filter(move |(id, _)| escrow && !differs(id)).filter_map(move |(id, _)| {
            let actor = *self.by_actor.get(&id)?;
            let hint = match account.and_then(|account| account.peers.get(&actor)) {
                Some(row) => row.spendable.max(0) as u64,
                None => even,
            };
            (hint > 0 && self.is_reachable(id, now)).then_some((actor, id, hint))
        })
    }

    /// Fewer rights than four requests for each replica that could use them.
    fn is_scarce(&self, key: usize, window: Window, now: Timestamp) -> bool {
        let state = &self.keys[key];
        let own = state.owned(window.number()).max(0) as u64;
        let reachable = self.roster.peers().filter(|(id, _)| self.is_reachable(*id, now)).count() as u64 + 1;
        let rows = state.open.get(&window.number()).into_iter().flat_map(|account| account.peers.values());
        let (sum, count) = rows
            .map(|row| row.typical.into())
            .chain([state.typical])
            .filter(|typical| *typical > 0)
            .fold((0u64, 0u64), |(sum, count), typical| (sum.saturating_add(typical), count + 1));
        let typical = sum / count.max(1);
        own.saturating_add(self.reachable_rights(key, window, now)) < typical.saturating_mul(4 * reachable)
    }

    /// Asks one peer that has plenty, or as many rich ones as it takes.
    fn ask(&mut self, key: usize, window: Window, wanted: Wanted, now: Timestamp) {
        let mut donors: Vec<(u64, Actor, ReplicaId)> = self
            .donors(key, window, now)
            .filter(|(actor, id, _)| !self.is_being_asked(key, window, *actor, *id, now))
            .map(|(actor, id, hint)| (hint, actor, id))
            .collect();
        let plenty: Vec<_> =
            donors.iter().filter(|(hint, ..)| *hint >= wanted.need.saturating_mul(2)).copied().collect();
        if plenty.len() >= 2 {
            let (_, actor, id) = plenty[self.random.below(plenty.len() as u64) as usize];
            self.send_request(key, window, actor, id, wanted, now);
            return;
        }
        donors.sort_unstable_by_key(|(hint, actor, _)| (std::cmp::Reverse(*hint), *actor));
        let mut rest = wanted.need;
        for (hint, actor, id) in donors.into_iter().take(MAX_DONORS) {
            let need = rest.min(hint);
            let want = wanted.want - (wanted.need - need);
            self.send_request(key, window, actor, id, Wanted { need, want, ..wanted }, now);
            rest -= need;
            if rest == 0 {
                break;
            }
        }
    }

    fn send_request(
        &mut self,
        key: usize,
        window: Window,
        actor: Actor,
        id: ReplicaId,
        wanted: Wanted,
        now: Timestamp,
    ) {
        let state = &mut self.keys[key];
        let Some(account) = state.open.get_mut(&window.number()) else { return };
        account.question(actor).asked(now.unix_ms());
        self.next_seq += 1;
        let request = RightsRequest {
            key: account.key,
            window: window.id(),
            seq: self.next_seq,
            need: wanted.need,
            want: wanted.want.max(wanted.need),
            kind: wanted.kind,
            waiting_ms: wanted.waiting_ms,
        };
        self.outbox.push_back(Transmit { to: Target::Replica(id), message: Message::Request(request) });
    }

    /// One question per key and peer within two round trips.
    fn is_being_asked(&self, key: usize, window: Window, actor: Actor, id: ReplicaId, now: Timestamp) -> bool {
        let account = self.keys[key].open.get(&window.number());
        let question = account.and_then(|account| account.questions.get(&actor));
        question.is_some_and(|question| question.open_for_ms(self.patience_ms(id), now.unix_ms()) > 0)
    }

    fn patience_ms(&self, id: ReplicaId) -> u64 {
        let rtt_ms = self.peers.get(&id).map_or(5, |peer| peer.rtt_ms);
        (2 * rtt_ms).clamp(2, 100)
    }

    /// How long until the slowest of those asked about a key should have answered.
    fn slowest_asked(&self, key: usize, now: Timestamp) -> Duration {
        let window = window_of(&self.keys[key], now);
        let account = self.keys[key].open.get(&window.number());
        let questions = account.into_iter().flat_map(|account| account.questions.values());
        let slowest =
            questions.map(|question| question.open_for_ms(self.patience_ms(self.id_of(question.peer)), now.unix_ms()));
        Duration::from_millis(slowest.max().unwrap_or(0))
    }

    fn hears_us(&self, id: ReplicaId, now: Timestamp) -> bool {
        self.is_reachable(id, now)
    }

    /// How much of a request to grant.
    fn generosity(
        &self,
        key: usize,
        window: Window,
        actor: Actor,
        from: ReplicaId,
        request: &RightsRequest,
        now: Timestamp,
    ) -> u64 {
        let state = &self.keys[key];
        let owned = state.owned(window.number());
        if owned <= 0 || state.is_cut_off(window, now) {
            return 0;
        }
        let owned = owned as u64;
        if request.kind == RequestKind::Debt {
            // It has been used already, upstream: no reservation of ours comes before it.
            return request.need.min(owned);
        }
        if let Some(own) = self.waiting_ms(state.limit) {
            let older = (request.waiting_ms, std::cmp::Reverse(from)) > (own, std::cmp::Reverse(self.roster.me()));
            if request.kind != RequestKind::Parked || !older {
                return 0;
            }
        }
        if request.kind == RequestKind::Prefetch {
            return request.want.min(owned / 2);
        }
        if self.is_scarce(key, window, now) {
            return request.need.min(owned);
        }
        let theirs = state.open[&window.number()].peers.get(&actor).map_or(0, |row| u64::from(row.demand));
        let both = u128::from(theirs) + u128::from(state.demand);
        let by_demand = (u128::from(owned) * u128::from(theirs)).checked_div(both).unwrap_or(0) as u64;
        let fair = by_demand.max(owned / 2);
        owned.min(request.need.max(fair.min(request.want)))
    }
}
