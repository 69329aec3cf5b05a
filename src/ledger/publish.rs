//! What this replica tells, and what it makes of what it is told: rows and the roster.
//!
//! Knows when a row is news and to whom. Must not know how rights come to move. The
//! invariant it keeps: everything here is idempotent and merged by maximum, so it may be
//! sent again at any time, by anybody, and being late is the worst that can happen.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::account::{Account, Actor, Merged};
use super::limits::Other;
use super::message::{Message, ReplicaId, RosterMessage, Row, Target, Transmit};
use super::window::{EPSILON, MAX_LEAD, Timestamp, Window};
use super::{KeyState, Ledger, Note};

/// How many ticks in a row a changed row is sent: at 20 % loss it then gets through to a
/// peer in 99 of 100 cases; the relay and chitchat carry the rest.
const SENDS: u8 = 3;

/// How many copies of rows a replica sends in a second, over all peers: at 55 bytes each, which
/// they have in wire version 1, with what frames add 0.75 MB. Beyond, accounts take turns: in a
/// larger or busier fleet news is older, and rights are asked for with older hints; who asks is
/// answered at once as ever.
const COPIES_PER_S: u64 = 12_000;

/// How many gifts take the room of a row.
const GIFTS_PER_COPY: usize = 3;

/// The most rows one relay exchange carries: about four datagrams.
const RELAY_ROWS: usize = 64;

/// How many rows of every relay exchange are resent in turn, news or not.
const RELAY_SWEEP: usize = 4;

/// After so many unanswered roster messages a peer is tried every tenth tick only.
const EAGER_TRIES: u32 = 20;

impl Ledger {
    /// Merges a row, direct or relayed.
    pub(super) fn handle_row(&mut self, from: ReplicaId, row: &Row, now: Timestamp) {
        if row.replica == self.roster.me() {
            return;
        }
        let Some((key, window)) = self.find_or_hold(&row.key, row.window, now) else {
            self.note_mismatch(row);
            return;
        };
        if window.start() > now.plus(MAX_LEAD + EPSILON * 2) {
            self.ignored.future_window += 1;
            return;
        }
        let Some(actor) = self.actor(row.replica) else { return };
        let mut given = Vec::with_capacity(row.given.len());
        for (to, total) in &row.given {
            if let Some(to) = self.actor(*to) {
                given.push((to, *total));
            }
        }
        if self.open(key, window, now).is_none() {
            let ahead = window.start() > now;
            *(if ahead { &mut self.ignored.future_window } else { &mut self.ignored.closed_window }) += 1;
            return;
        }
        let state = &mut self.keys[key];
        let account = state.open.get_mut(&window.number()).expect("opened above");
        let Merged { credit, refused, news } = account.merge(actor, row, &given, &state.ring);
        if from == row.replica
            && let Some(question) = account.questions.get_mut(&actor)
        {
            question.settled(); // Whatever was asked of it, this is its answer.
        }
        self.ignored.impossible_gift += u64::from(refused > 0);
        let peer = account.peers.get_mut(&actor).expect("merged above");
        if news {
            self.changes += 1;
            peer.changed = self.changes;
            self.roster.handle_news_of(row.replica, now);
        }
        let limit = state.limit;
        self.note_match(limit, row);
        if credit > 0 {
            self.serve(limit, now);
        }
        if from == row.replica && self.waiting.contains(&limit) {
            self.ask_for_parked(limit, now);
        }
    }

    /// Sends every row that changed, and again for a few ticks, as far as this tick's room
    /// goes; the next one begins where it ended.
    pub(super) fn publish_rows(&mut self) {
        let peers = self.roster.peers().count().max(1) as u64;
        let copies = COPIES_PER_S * self.interval.as_millis() as u64 / 1_000;
        // Whoever leaves has no time to take turns.
        let mut room = if self.roster.is_leaving() { usize::MAX } else { (copies / peers).max(1) as usize };
        let turn = std::mem::take(&mut self.publish_turn);
        let keys: Vec<usize> = self.active.range(turn..).chain(self.active.range(..turn)).copied().collect();
        self.rounds = 1;
        for (place, key) in keys.iter().copied().enumerate() {
            if room == 0 {
                self.publish_turn = key;
                self.rounds = keys.len().div_ceil(place) as u32;
                return;
            }
            let numbers: Vec<u64> = self.keys[key].open.keys().collect();
            for number in numbers {
                let state = &mut self.keys[key];
                let account = state.open.get_mut(&number).expect("listed above");
                if account.publish(&state.ring) {
                    account.repeat = SENDS;
                    self.changes += 1;
                    account.changed = self.changes;
                }
                if account.repeat > 0 && self.attached {
                    account.repeat -= 1;
                    let window = account.window;
                    for row in self.rows_of(key, window, Actor::ME) {
                        room = room.saturating_sub(1 + row.given.len() / GIFTS_PER_COPY);
                        self.outbox.push_back(Transmit { to: Target::Everyone, message: Message::Row(row) });
                    }
                }
            }
        }
    }

    /// Sends this replica's row to one peer at once, with what that peer was given.
    pub(super) fn answer(&mut self, key: usize, window: Window, actor: Actor, id: ReplicaId) {
        let me = self.roster.me();
        let state = &mut self.keys[key];
        let Some(account) = state.open.get_mut(&window.number()) else { return };
        if account.publish(&state.ring) {
            account.repeat = SENDS;
            self.changes += 1;
            account.changed = self.changes;
        }
        let total = account.given_to(actor);
        let given = if total > 0 { vec![(id, total)] } else { Vec::new() };
        let row = own_row(me, state, &state.open[&window.number()], given);
        self.outbox.push_back(Transmit { to: Target::Replica(id), message: Message::Row(row) });
    }

    /// Sends one random peer what others have said and it may not have heard, dead
    /// replicas' rows included: a link that fails costs a detour, not the news.
    pub(super) fn relay(&mut self, now: Timestamp) {
        let reachable: Vec<ReplicaId> =
            self.roster.peers().map(|(id, _)| id).filter(|id| self.is_reachable(*id, now)).collect();
        if reachable.is_empty() {
            return;
        }
        let to = reachable[self.random.below(reachable.len() as u64) as usize];
        let since = self.peers.get(&to).map_or(0, |peer| peer.relayed);
        let mut news: Vec<(u64, usize, u64, Actor)> = Vec::new();
        let mut rest: Vec<(usize, u64, Actor)> = Vec::new();
        for key in self.active.iter().copied() {
            let state = &self.keys[key];
            for account in state.open.values() {
                let number = account.window.number();
                let own = (account.version > 0).then_some((Actor::ME, account.changed));
                let others = account.peers.values().map(|row| (row.peer, row.changed));
                for (actor, changed) in own.into_iter().chain(others) {
                    if self.id_of(actor) == to {
                        continue;
                    }
                    if changed > since {
                        news.push((changed, key, number, actor));
                    } else {
                        rest.push((key, number, actor));
                    }
                }
            }
        }
        news.sort_unstable();
        news.truncate(RELAY_ROWS);
        if let (Some((changed, ..)), Some(peer)) = (news.last(), self.peers.get_mut(&to)) {
            peer.relayed = *changed;
        }
        let mut chosen: Vec<(usize, u64, Actor)> =
            news.into_iter().map(|(_, key, number, actor)| (key, number, actor)).collect();
        // What was lost on the way is swept up in turn, as long as anything is going on.
        if !chosen.is_empty() {
            for _ in 0..RELAY_SWEEP.min(rest.len()) {
                self.relay_cursor = (self.relay_cursor + 1) % rest.len();
                chosen.push(rest[self.relay_cursor]);
            }
        }
        for (key, number, actor) in chosen {
            let window = self.keys[key].open[&number].window;
            for row in self.rows_of(key, window, actor) {
                self.outbox.push_back(Transmit { to: Target::Replica(to), message: Message::Row(row) });
            }
        }
    }

    /// Sends the roster to whoever has not read or not answered it.
    pub(super) fn announce(&mut self, now: Timestamp) {
        if !self.attached {
            return;
        }
        let unresolved: Vec<SocketAddr> = self.roster.unresolved().collect();
        if !unresolved.is_empty() {
            let message = self.roster.message();
            for address in unresolved {
                self.outbox.push_back(Transmit {
                    to: Target::Address(address),
                    message: Message::Roster(Arc::clone(&message)),
                });
            }
        }
        let owing: Vec<ReplicaId> =
            self.roster.peers().map(|(id, _)| id).filter(|id| self.roster.owes_answer(*id)).collect();
        for id in owing {
            let tries = self.peers.get(&id).map_or(0, |peer| peer.roster_tries);
            let sent = self.peers.get(&id).map_or(Timestamp::ZERO, |peer| peer.roster_sent);
            let pause = if tries < EAGER_TRIES { self.interval } else { self.interval * 10 };
            if now >= sent.plus(pause) {
                self.send_roster(id, now);
            }
        }
    }

    pub(super) fn send_roster(&mut self, to: ReplicaId, now: Timestamp) {
        let message = self.roster.message();
        if let Some(peer) = self.peers.get_mut(&to) {
            peer.roster_tries = if self.roster.owes_answer(to) { peer.roster_tries.saturating_add(1) } else { 0 };
            peer.roster_sent = now;
        }
        self.outbox.push_back(Transmit { to: Target::Replica(to), message: Message::Roster(message) });
    }

    /// Measures demand: what was offered since the last tick, smoothed over a second.
    pub(super) fn measure(&mut self, now: Timestamp) {
        let elapsed_ms = (now.since(self.last_tick).as_millis() as u64).clamp(1, 1_000);
        for key in &self.active {
            let state = &mut self.keys[*key];
            let mut offered = state.ring.refused.swap(0, Ordering::Relaxed);
            for account in state.open.values_mut() {
                let reserved = account.usage(&state.ring).reserved;
                offered = offered.saturating_add(reserved.saturating_sub(account.reserved_at_tick));
                account.reserved_at_tick = reserved;
                account.touched |= reserved > 0;
            }
            // In thousandths. What is no whole unit stays for the next tick: rounded down ten times
            // a second, ten units a second would read as one.
            let kept = u128::from(state.demand) * u128::from(1_000 - elapsed_ms) + u128::from(state.demand_rest);
            let thousandths = kept + u128::from(offered) * 1_000;
            state.demand = (thousandths / 1_000).min(u128::from(u64::MAX / 4)) as u64;
            state.demand_rest = (thousandths % 1_000) as u16;
        }
    }

    /// Returns this replica's rows of open windows, the newest first: what chitchat
    /// carries for whoever our own datagrams do not reach.
    pub fn own_rows(&self) -> Vec<Row> {
        let mut rows: Vec<(u64, Row)> = Vec::new();
        for key in self.active.iter().copied() {
            let state = &self.keys[key];
            for account in state.open.values().filter(|account| account.version > 0) {
                rows.extend(self.rows_of(key, account.window, Actor::ME).into_iter().map(|row| (account.changed, row)));
            }
        }
        rows.sort_by_key(|(changed, row)| (std::cmp::Reverse(*changed), row.key, row.window));
        rows.into_iter().map(|(_, row)| row).collect()
    }

    /// Returns a number that rises whenever a row of [`Ledger::own_rows`] changes.
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// Returns the roster message as it stands.
    pub fn roster_message(&mut self) -> Arc<RosterMessage> {
        self.roster.message()
    }

    /// Returns the rows of one replica's account as messages: one, unless it has given to
    /// more replicas than a row can name.
    fn rows_of(&self, key: usize, window: Window, actor: Actor) -> Vec<Row> {
        let state = &self.keys[key];
        let Some(account) = state.open.get(&window.number()) else { return Vec::new() };
        let given: Vec<_> = account.given_by(actor).map(|(to, total)| (self.id_of(to), total)).collect();
        let row = if actor == Actor::ME {
            own_row(self.roster.me(), state, account, Vec::new())
        } else {
            let Some(peer) = account.peers.get(&actor) else { return Vec::new() };
            Row {
                replica: self.id_of(actor),
                key: account.key,
                window: window.id(),
                version: peer.version.into(),
                reserved: peer.reserved,
                refunded: peer.refunded,
                given: Vec::new(),
                spendable: peer.spendable,
                demand: peer.demand.into(),
                typical: peer.typical.into(),
            }
        };
        if given.is_empty() {
            return vec![row];
        }
        given.chunks(Row::MAX_GIVEN).map(|part| Row { given: part.to_vec(), ..row.clone() }).collect()
    }

    fn note_mismatch(&mut self, row: &Row) {
        self.ignored.unknown_key += 1;
        let Some(&limit) = self.by_limit.get(&row.key.limit) else { return };
        let (quota, since) = (row.key.quota, row.window.start());
        let limit = &mut self.limits[limit];
        let known = limit.mismatches.get(&(row.replica, quota.unit()));
        if !limit.configured || known.is_some_and(|known| known.since > since) {
            return;
        }
        if limit.mismatches.len() >= super::MAX_MEMBERS {
            return;
        }
        let other = Other { since, quota: Some(quota) };
        let known = limit.mismatches.insert((row.replica, quota.unit()), other);
        if known.and_then(|known| known.quota) != Some(quota) {
            let limit = Arc::clone(&limit.name);
            self.note(Note::Mismatch { limit, peer: row.replica, theirs: quota });
        }
    }

    /// Notes that a peer enforces in this window what this replica does.
    fn note_match(&mut self, limit: usize, row: &Row) {
        let (unit, since) = (row.key.quota.unit(), row.window.start());
        let known = self.limits[limit].mismatches.get_mut(&(row.replica, unit));
        if let Some(known) = known.filter(|known| known.since <= since) {
            *known = Other { since, quota: None };
        }
    }
}

fn own_row(me: ReplicaId, state: &KeyState, account: &Account, given: Vec<(ReplicaId, u64)>) -> Row {
    Row {
        replica: me,
        key: account.key,
        window: account.window.id(),
        version: account.version,
        reserved: account.published.reserved,
        refunded: account.published.refunded,
        given,
        spendable: account.published.owned,
        demand: state.demand,
        typical: state.typical,
    }
}
