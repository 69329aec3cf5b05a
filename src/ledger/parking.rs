//! Admission off the hot path: opening windows, parking, serving, refusing.
//!
//! Knows the queue of each limit and when a refusal is honest. Must not know how a parked
//! caller is woken. The invariant it keeps: while a request is parked it holds nothing;
//! the wallets it waits for carry the parked bit, so that nobody takes past the head of
//! the queue and everybody who puts something back comes here.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::decision::{Claim, Denied, Obstacle, Standing};
use super::mode::Mode;
use super::window::{Timestamp, Window};
use super::{Counter, Ledger, window_of};

/// The most requests parked for one limit: at 20 ms each, more would time out anyway.
const MAX_PARKED: usize = 64;

/// The name of one parked request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ticket(pub(crate) u64);

/// A request that waits.
#[derive(Debug)]
pub(crate) struct Parked {
    ticket: Ticket,
    request: Ask,
    /// By the clock, which may step back: a wait ends then, it does not become longer.
    since: Timestamp,
    deadline: Timestamp,
}

/// What is asked of a limit, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    pub(crate) claim: Claim,
    /// How close to a window's end a reservation must fit in both windows.
    pub(crate) edge_ms: u64,
    /// How long it may wait; zero means not at all.
    pub(crate) wait: Duration,
    /// Another limit is asked next: a refusal is demand, and not yet a refused request.
    pub(crate) tentative: bool,
}

/// A decision.
#[derive(Debug)]
pub(crate) enum Admission {
    /// Reserved at this instant, which names the windows charged, of these keys.
    Admitted(Timestamp, Arc<[Counter]>),
    /// Waits; [`Ledger::poll_served`] will tell.
    Parked(Ticket),
    /// Refused; nothing is charged.
    Denied(Denied),
}

impl Ledger {
    /// Decides a request that the hot path could not admit.
    pub(crate) fn admit(&mut self, limit: usize, ask: Ask, now: Timestamp) -> Admission {
        let now = self.advance(now);
        self.switch(limit, now);
        self.open_for(limit, &ask, now);
        let admission = self.decide(limit, ask, now);
        match admission {
            Admission::Denied(denied) if self.limits[limit].mode == Mode::Observe => {
                self.limits[limit].observed += 1;
                drop(denied);
                self.charge_all(limit, &ask, now);
                self.admitted(limit, now)
            }
            Admission::Denied(denied) => {
                self.note_refusal(limit, &ask, &denied);
                Admission::Denied(denied)
            }
            admission => admission,
        }
    }

    /// Forgets a parked request whose caller has gone. What waits behind it may move up.
    pub(crate) fn cancel(&mut self, limit: usize, ticket: Ticket, now: Timestamp) {
        let now = self.advance(now);
        self.limits[limit].queue.retain(|parked| parked.ticket != ticket);
        self.serve(limit, now);
    }

    /// Looks at a limit after something was put back into its wallets, or charged beyond
    /// what they held.
    pub(crate) fn settled(&mut self, limit: usize, now: Timestamp) {
        let now = self.advance(now);
        for key in self.limits[limit].slots.clone() {
            self.notice_debts_of(key);
        }
        self.serve(limit, now);
        self.ask_for_debts(now);
    }

    /// Counts an excess whose window has closed here: nothing can cover it any more.
    pub(crate) fn settled_late(&mut self, key: usize, at: Timestamp, amount: u64) {
        let window = window_of(&self.keys[key], at);
        self.note_uncovered(key, window, amount);
    }

    /// Serves parked requests in order, as far as the wallets go.
    pub(super) fn serve(&mut self, limit: usize, now: Timestamp) {
        self.switch(limit, now);
        while let Some(head) = self.limits[limit].queue.front() {
            let (ticket, ask) = (head.ticket, head.request);
            self.open_for(limit, &ask, now);
            if !self.take_all(limit, &ask, now) {
                self.mark_parked(limit);
                return;
            }
            self.limits[limit].queue.pop_front();
            let admission = self.admitted(limit, now);
            self.served.push_back((ticket, admission));
        }
        if self.waiting.remove(&limit) {
            self.mark_parked(limit);
        }
    }

    /// Refuses parked requests whose time is up.
    pub(super) fn expire(&mut self, limit: usize, now: Timestamp) {
        let clock = self.clock;
        let due = |parked: &Parked| !(parked.since..parked.deadline).contains(&clock);
        while let Some(place) = self.limits[limit].queue.iter().position(due) {
            self.refuse_at(limit, place, now);
            // What waited behind a larger one, and is due with it, may fit now.
            self.serve(limit, now);
        }
    }

    /// Refuses every parked request.
    pub(super) fn expire_all(&mut self, limit: usize, now: Timestamp) {
        while !self.limits[limit].queue.is_empty() {
            self.refuse_at(limit, 0, now);
        }
        self.serve(limit, now);
    }

    /// When something is due for the parked requests of a limit.
    pub(super) fn next_deadline(&self, limit: usize) -> Option<Timestamp> {
        let limit = &self.limits[limit];
        let deadline = limit.queue.iter().map(|parked| parked.deadline).min()?;
        // A window that starts meanwhile may serve them.
        let starts = limit.keys.iter().map(|key| self.keys[*key].next_change(self.now)).min();
        Some(deadline.min(limit.ask_again).min(starts.unwrap_or(Timestamp::NEVER)))
    }

    /// How much of one key the parked requests of its limit wait for.
    pub(super) fn parked_amount(&self, key: usize) -> u64 {
        let unit = self.keys[key].key.quota.unit();
        let queue = &self.limits[self.keys[key].limit].queue;
        queue.iter().fold(0, |sum: u64, parked| sum.saturating_add(parked.request.claim.amount(unit)))
    }

    /// How long the oldest parked request of a limit has waited, in ms; `None` if nobody
    /// waits.
    pub(super) fn waiting_ms(&self, limit: usize) -> Option<u32> {
        let head = self.limits[limit].queue.front()?;
        Some(self.clock.since(head.since).as_millis().min(u128::from(u32::MAX)) as u32)
    }

    /// Which windows the parked requests of a key wait for: the running one and, within
    /// the edge of its end, the next.
    pub(super) fn parked_windows(&self, key: usize, now: Timestamp) -> impl Iterator<Item = Window> + use<> {
        let state = &self.keys[key];
        let edge = self.limits[state.limit].queue.iter().map(|parked| parked.request.edge_ms).max().unwrap_or(0);
        state.windows(now, edge)
    }

    /// Sets or clears the parked bit on every open wallet of a limit.
    pub(super) fn mark_parked(&mut self, limit: usize) {
        let parked = self.roster.is_leaving() || !self.limits[limit].queue.is_empty();
        for key in &self.limits[limit].keys {
            let state = &self.keys[*key];
            for account in state.open.values() {
                // One that has ended stays shut to newcomers: their clock has stepped back.
                state
                    .ring
                    .set_parked(account.window.number(), parked || state.is_shut_to_hits(account.window, self.now));
            }
        }
    }

    /// Returns where one key stands in the window of `now`.
    pub(super) fn standing_of(&self, key: usize, now: Timestamp) -> Standing {
        let state = &self.keys[key];
        // Of one that is not in force yet, the first window it will be.
        let window = window_of(state, now.max(state.ring.from()));
        let quota = state.version_at(window.start()).quota;
        let slices = quota.slices();
        let limit = slices.most();
        let (used, balance, owned, reachable) = match state.open.get(&window.number()) {
            Some(account) => (
                self.used_of(key, window),
                state.ring.balance(window.number()),
                account.owned(&state.ring),
                self.reachable_rights(key, window, now),
            ),
            // Nobody has touched this window here: what the first touch would open.
            None if !state.mode.has_rights() => (0, self.ceiling(key, window, now).unwrap_or(0) as i64, 0, 0),
            None => {
                let (share, kept) = self.rights_untouched(key, window, now);
                let owned = share as i64 + kept;
                let rest = if self.attached { limit.saturating_sub(owned.max(0) as u64) } else { 0 };
                // Nothing is known of what the others did. Who does not answer keeps its part.
                let others = self.replicas_in(None, window) - 1;
                let reachable = self.roster.peers().filter(|(id, _)| self.is_reachable(*id, now)).count();
                let reachable = u128::from(rest) * reachable as u128 / u128::from(others.max(1));
                (self.used_of(key, window), owned + state.mode.allowance(share) as i64, owned, reachable as u64)
            }
        };
        let spendable = balance.max(0) as u64;
        // What of that are rights, so that an allowance hides nobody else's.
        let rights = if state.mode_in(window).has_rights() { owned.max(0) as u64 } else { spendable };
        let margin = limit.saturating_sub(used).saturating_sub(rights);
        let margin_reachable = reachable.min(margin);
        Standing {
            quota,
            window_start: window.start(),
            window_end: window.end(),
            limit,
            vested: if state.mode_in(window).has_rights() { slices.vested_at(window, now) } else { limit },
            used,
            margin_reachable,
            margin_unreachable: margin - margin_reachable,
            spendable,
            debt: owned.min(0).unsigned_abs(),
            resets_in: window.end().since(now),
        }
    }

    /// What the first touch of a window would open: this replica's share of it and, in a bucket,
    /// what earlier slices left and those of them whose rights still live and nobody has touched.
    /// Of a window that vests the first instalment only: a look at all of them takes too long.
    fn rights_untouched(&self, key: usize, window: Window, now: Timestamp) -> (u64, i64) {
        let state = &self.keys[key];
        let version = state.version_at(window.start());
        let slices = version.quota.slices();
        let share = |instalment, amount| {
            let place = self.roster.place(&version, instalment, now);
            place.map_or(0, |place| place.share(amount))
        };
        let first = share(slices.instalment_of(window, 0), slices.instalment(0));
        let Some(carry) = &state.carry else { return (first, 0) };
        let number = window.number();
        let undealt = carry.yet_to_deal(number);
        let first = if undealt.start > number { 0 } else { first };
        let late = undealt.map(|number| share(slices.earlier(window, number), slices.amount)).sum();
        (first, carry.left_for(number, late, &state.open, &state.ring))
    }

    /// What is used, over all replicas, of what could be full now: in this window, and in a
    /// bucket's slices whose rights could still live.
    fn used_of(&self, key: usize, window: Window) -> u64 {
        let state = &self.keys[key];
        let first = (window.number() + 1).saturating_sub(state.slices.lifetime);
        let used = state.open.range(first..=window.number()).iter().map(|account| account.used(&state.ring));
        let used = used.fold(0, u64::saturating_add);
        if state.carry.is_some() { used.min(state.slices.most()) } else { used }
    }

    fn decide(&mut self, limit: usize, ask: Ask, now: Timestamp) -> Admission {
        for key in self.in_force(limit, now) {
            let state = &self.keys[key];
            let quota = state.version_at(window_of(state, now).start()).quota;
            let requested = ask.claim.amount(quota.unit());
            if requested > state.mode_in(window_of(state, now)).largest(quota.largest_claim()) {
                let standing = Box::new(self.standing_of(key, now));
                return Admission::Denied(Denied::TooLarge { standing, requested });
            }
        }
        self.note_size(limit, &ask.claim);
        let leaving = self.roster.is_leaving();
        if !leaving && self.limits[limit].queue.is_empty() && self.take_all(limit, &ask, now) {
            return self.admitted(limit, now);
        }
        let short = self.short_of(limit, &ask, now);
        let hopeless = short.is_some_and(|key| self.is_hopeless(key, &ask, now));
        let full = self.limits[limit].queue.len() >= MAX_PARKED;
        if leaving || !self.attached || ask.wait.is_zero() || hopeless || full {
            let key = short.unwrap_or_else(|| self.first_key(limit, now));
            return Admission::Denied(self.refusal(key, ask.claim.amount(self.keys[key].key.quota.unit()), now));
        }
        self.park(limit, ask, now)
    }

    fn admitted(&self, limit: usize, now: Timestamp) -> Admission {
        Admission::Admitted(now, self.counters_of(limit))
    }

    /// The key that a refusal names for want of a better one.
    fn first_key(&self, limit: usize, now: Timestamp) -> usize {
        self.in_force(limit, now).next().unwrap_or(self.limits[limit].keys[0])
    }

    fn park(&mut self, limit: usize, request: Ask, now: Timestamp) -> Admission {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let since = self.clock;
        let deadline = since.plus(request.wait.max(Duration::from_millis(1)));
        let queue = &mut self.limits[limit].queue;
        queue.push_back(Parked { ticket, request, since, deadline });
        let alone = queue.len() == 1;
        self.waiting.insert(limit);
        if alone {
            // Enqueue, mark, take again: whatever was put back before the mark is seen
            // here, whatever is put back after it comes here.
            self.mark_parked(limit);
            self.serve(limit, now);
            if let Some(place) = self.served.iter().position(|(served, _)| *served == ticket) {
                let served = self.served.remove(place);
                return served.expect("found above").1;
            }
        }
        self.ask_for_parked(limit, now);
        Admission::Parked(ticket)
    }

    /// Refuses the parked request at this place of the queue.
    fn refuse_at(&mut self, limit: usize, place: usize, now: Timestamp) {
        let Some(parked) = self.limits[limit].queue.remove(place) else { return };
        let short = self.short_of(limit, &parked.request, now);
        let key = short.unwrap_or_else(|| self.first_key(limit, now));
        let amount = parked.request.claim.amount(self.keys[key].key.quota.unit());
        let denied = self.refusal(key, amount, now);
        let admission = if self.limits[limit].mode == Mode::Observe {
            self.limits[limit].observed += 1;
            self.charge_all(limit, &parked.request, now);
            self.admitted(limit, now)
        } else {
            self.note_refusal(limit, &parked.request, &denied);
            Admission::Denied(denied)
        };
        self.served.push_back((parked.ticket, admission));
    }

    /// Opens the windows a request is charged to.
    fn open_for(&mut self, limit: usize, ask: &Ask, now: Timestamp) {
        for position in 0..self.limits[limit].keys.len() {
            let key = self.limits[limit].keys[position];
            for window in self.keys[key].windows(now, ask.edge_ms) {
                if let Some(account) = self.open(key, window, now) {
                    account.touched |= window.start() <= now;
                }
            }
            self.freeze_open(key, now);
            self.carry_over(key, now);
        }
    }

    /// Takes every claim of a request or none.
    fn take_all(&self, limit: usize, ask: &Ask, now: Timestamp) -> bool {
        let charges = || self.charges(limit, ask, now);
        for (done, (key, number, amount)) in charges().enumerate() {
            if self.keys[key].ring.take_past_parked(number, amount).is_err() {
                for (key, number, amount) in charges().take(done) {
                    self.keys[key].ring.refund(number, amount);
                }
                return false;
            }
        }
        true
    }

    /// Charges every claim, covered or not.
    fn charge_all(&self, limit: usize, ask: &Ask, now: Timestamp) {
        for (key, number, amount) in self.charges(limit, ask, now) {
            self.keys[key].ring.charge(number, amount);
        }
    }

    /// Which amounts a request is charged in which windows.
    fn charges(&self, limit: usize, ask: &Ask, now: Timestamp) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
        let ask = *ask;
        self.limits[limit].keys.iter().flat_map(move |key| {
            let state = &self.keys[*key];
            let amount = ask.claim.amount(state.key.quota.unit());
            let windows = state.windows(now, ask.edge_ms).filter(move |_| amount > 0);
            windows.map(move |window| (*key, window.number(), amount))
        })
    }

    /// Returns the first key that does not cover its part of a request.
    fn short_of(&self, limit: usize, ask: &Ask, now: Timestamp) -> Option<usize> {
        self.charges(limit, ask, now)
            .find(|(key, number, amount)| self.keys[*key].ring.balance(*number) < *amount as i64)
            .map(|(key, ..)| key)
    }

    /// A request larger than twice what this replica and its reachable peers can spend is
    /// not worth a wait (docs/algorithm.md section 8, the measured form).
    fn is_hopeless(&self, key: usize, ask: &Ask, now: Timestamp) -> bool {
        let state = &self.keys[key];
        let window = window_of(state, now);
        let own = state.ring.balance(window.number()).max(0) as u64;
        let amount = ask.claim.amount(state.key.quota.unit());
        own.saturating_add(self.reachable_rights(key, window, now)) < amount.div_ceil(2)
    }

    fn refusal(&mut self, key: usize, amount: u64, now: Timestamp) -> Denied {
        let standing = self.standing_of(key, now);
        let retry_after = self.retry_after(key, &standing, amount, now);
        let in_time = standing.spendable + standing.margin_reachable;
        let why = if self.roster.is_leaving() {
            Some(Obstacle::Leaving)
        } else if standing.vested.saturating_sub(standing.used) < amount
            || in_time >= amount
            || !self.attached
            || !self.keys[key].mode_in(window_of(&self.keys[key], now)).has_rights()
        {
            None
        } else if self.roster.first().is_none() {
            Some(Obstacle::NotJoined)
        } else {
            self.roster.peers().any(|(id, _)| !self.is_reachable(id, now)).then_some(Obstacle::PeersSilent)
        };
        let standing = Box::new(standing);
        match why {
            Some(why) => Denied::Unreachable { standing, retry_after, why },
            None => Denied::Exhausted { standing, retry_after },
        }
    }

    /// The earliest moment at which the request can be expected to fit, plus a spread
    /// (docs/algorithm.md section 6).
    fn retry_after(&mut self, key: usize, standing: &Standing, amount: u64, now: Timestamp) -> Duration {
        let slices = standing.quota.slices();
        let window = slices.length();
        // What peers hold can be fetched within a few round trips.
        let soon = standing.spendable + standing.margin_reachable >= amount;
        let earliest = if soon {
            Duration::from_millis(100).min(window)
        } else {
            slices.covered_at(window_of(&self.keys[key], now), standing.used, amount, now).since(now)
        };
        // Everybody refused comes back for the same window: over the time their backlog
        // needs at the limit's rate, but at most a tenth of the window.
        let backlog = u128::from(self.keys[key].demand) * earliest.as_millis() / 1_000;
        let backlog_ms = backlog * window.as_millis() / u128::from(slices.amount);
        let spread_ms = (window.as_millis() / 10).min(backlog_ms) as u64;
        self.behind(self.clock) + earliest + Duration::from_millis(self.random.below(spread_ms + 1))
    }

    fn note_refusal(&mut self, limit: usize, ask: &Ask, denied: &Denied) {
        if !ask.tentative {
            self.count_refusal(limit, denied);
        }
        if matches!(denied, Denied::TooLarge { .. }) {
            return; // What can never fit is no demand: no peer should hold anything back for it.
        }
        for key in &self.limits[limit].keys {
            let state = &self.keys[*key];
            state.ring.refused.fetch_add(state.claimed(&ask.claim), Ordering::Relaxed);
        }
    }

    /// Counts a request that was refused in the end.
    pub(crate) fn count_refusal(&mut self, limit: usize, denied: &Denied) {
        *self.limits[limit].refused.entry(denied.reason()).or_default() += 1;
    }

    /// Learns the size of requests from those that come this way.
    fn note_size(&mut self, limit: usize, claim: &Claim) {
        for position in 0..self.limits[limit].keys.len() {
            let key = self.limits[limit].keys[position];
            let state = &mut self.keys[key];
            let amount = state.claimed(claim);
            if amount > 0 {
                let before = if state.typical == 0 { amount } else { state.typical };
                state.typical = ((before * 15 + amount) / 16).max(1);
            }
        }
    }
}
