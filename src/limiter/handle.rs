//! Reserving: the hot path, and the door to the ledger beside it.
//!
//! Knows in which order claims are taken and given back. Must not know who is woken. The
//! invariant it keeps: a hit takes no lock, allocates nothing and shares no reference count.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;
use std::time::Duration;

use super::permit::{Charge, Permit};
use super::{Acquire, Deployment, Policy, Waiter};
use crate::ledger::{Admission, Ask, Claim, Counter, Denied, Quota, Standing, Timestamp};

/// Reserves for one deployment. Cheap to clone; reserving does not clone it.
#[derive(Clone)]
pub struct Handle {
    pub(super) deployment: Arc<Deployment>,
}

impl Handle {
    /// Reserves if this replica's own rights cover the claim. Never waits.
    ///
    /// # Errors
    /// Why not, and when to try again; nothing is charged.
    #[inline(always)]
    pub fn try_acquire(&self, claim: Claim) -> Result<Permit<'_>, Denied> {
        let now = self.deployment.inner.clock.now();
        if self.take(claim, now) {
            return Ok(self.permit(claim, now));
        }
        self.admit_now(claim, false)
    }

    /// As [`Handle::try_acquire`], for whoever asks another deployment next: a refusal is
    /// not counted. The one that the caller is told in the end goes to
    /// [`Handle::count_refusal`].
    ///
    /// # Errors
    /// As [`Handle::try_acquire`].
    pub fn probe(&self, claim: Claim) -> Result<Permit<'_>, Denied> {
        let now = self.deployment.inner.clock.now();
        if self.take(claim, now) {
            return Ok(self.permit(claim, now));
        }
        self.admit_now(claim, true)
    }

    /// Counts a refusal that [`Handle::probe`] or a [tentative](Acquire::tentative) wait
    /// returned, once no other deployment has admitted the request either.
    pub fn count_refusal(&self, denied: &Denied) {
        let deployment = &self.current().deployment;
        deployment.inner.lock().ledger.count_refusal(deployment.limit, denied);
    }

    /// Reserves, and waits up to the policy's `wait` for rights from peers.
    ///
    /// Without a cluster there is nobody to ask, and this is [`Handle::try_acquire`].
    ///
    /// # Errors
    /// Why not, and when to try again; nothing is charged.
    ///
    /// # Cancel safety
    /// A dropped future holds nothing: what it had just been given goes to the next in
    /// line.
    pub fn acquire(&self, claim: Claim) -> Acquire<'_> {
        Acquire::new(self, claim)
    }

    /// Keeps requests away from the upstream until this instant, here and on every peer:
    /// it said so itself. At most [`MAX_PAUSE`](super::MAX_PAUSE); a longer pause that it
    /// asked for before stays. Reserving goes on: whoever routes looks at
    /// [`Handle::paused_until`].
    pub fn pause(&self, until: Timestamp) {
        self.deployment.pause.ask(until, self.deployment.inner.clock.now());
    }

    /// Returns until when the upstream wants no requests, by its answers here or to a peer;
    /// `None` if it wants them. One atomic word is read.
    pub fn paused_until(&self) -> Option<Timestamp> {
        self.deployment.pause.until(self.deployment.inner.clock.now())
    }

    /// Returns where each quota stands in the running window, in key order.
    pub fn standings(&self) -> Vec<Standing> {
        let deployment = &self.current().deployment;
        let now = deployment.inner.clock.now();
        deployment.inner.lock().ledger.standings(&deployment.name, now)
    }

    /// Returns the deployment's id.
    pub fn deployment(&self) -> &str {
        &self.deployment.id
    }

    /// Returns the quotas in force now, in key order.
    pub fn quotas(&self) -> impl Iterator<Item = Quota> + '_ {
        self.standings().into_iter().map(|standing| standing.quota)
    }

    /// Returns how the deployment's limits are applied.
    pub fn policy(&self) -> &Policy {
        &self.current().deployment.policy
    }

    /// The hot path: every claim or none, in key order. A plain loop, and everything that is
    /// not the rule is out of line: the rest costs more than the compare-and-swap.
    #[inline(always)]
    pub(super) fn take(&self, claim: Claim, now: Timestamp) -> bool {
        let edge_ms = self.deployment.hot_edge_ms.load(Ordering::Relaxed);
        for counter in self.deployment.counters.iter() {
            let amount = claim.amount(counter.unit);
            let (number, left_ms) = counter.place_at(now.unix_ms());
            let rule = left_ms > edge_ms;
            if !(rule && (amount == 0 || counter.ring.take(number, amount).is_ok())) {
                return self.take_out_of_line(claim, now, counter);
            }
        }
        true
    }

    /// Goes on where a hit was stuck: near a window's end in both windows. What was taken before
    /// is not given back and taken again: both would be counted.
    #[cold]
    fn take_out_of_line(&self, claim: Claim, now: Timestamp, stuck: &Counter) -> bool {
        let counters = &self.deployment.counters;
        let place = counters.iter().take_while(|counter| !std::ptr::eq(*counter, stuck)).count();
        let taken = counters[..place].iter();
        let taken = taken.map(|counter| (counter, counter.place_at(now.unix_ms()).0, claim.amount(counter.unit)));
        let taken = taken.filter(|(.., amount)| *amount != 0);
        if self.deployment.successor.get().is_some() {
            self.put_back(taken);
            return false;
        }
        let charges = self.charges_from(place, claim, now);
        for (done, (counter, number, amount)) in charges.clone().enumerate() {
            if counter.ring.take(number, amount).is_err() {
                self.put_back(taken.chain(charges.take(done)));
                return false;
            }
        }
        true
    }

    /// Undoes a part of a reservation that does not fit as a whole.
    fn put_back<'a>(&'a self, charges: impl Iterator<Item = (&'a Counter, u64, u64)>) {
        let mut parked = false;
        for (counter, number, amount) in charges {
            parked |= counter.ring.refund(number, amount).is_some_and(|after| after.parked);
        }
        if parked {
            self.settled();
        }
    }

    /// Which amounts a claim made at `at` is charged, and in which windows.
    pub(super) fn charges<'a>(
        &'a self,
        claim: Claim,
        at: Timestamp,
    ) -> impl Iterator<Item = (&'a Counter, u64, u64)> + Clone + use<'a> {
        self.charges_from(0, claim, at)
    }

    /// The same without the first `place` counters.
    fn charges_from<'a>(
        &'a self,
        place: usize,
        claim: Claim,
        at: Timestamp,
    ) -> impl Iterator<Item = (&'a Counter, u64, u64)> + Clone + use<'a> {
        let edge_ms = self.deployment.edge_ms;
        self.deployment.counters[place..].iter().flat_map(move |counter| {
            let amount = claim.amount(counter.unit);
            let windows = counter.windows(at, edge_ms).filter(move |_| amount != 0);
            windows.map(move |number| (counter, number, amount))
        })
    }

    #[inline(always)]
    pub(super) fn permit(&self, claim: Claim, at: Timestamp) -> Permit<'_> {
        Permit { handle: Cow::Borrowed(self), claim, at, waited_ms: 0, state: Charge::Reserved }
    }

    #[cold]
    fn admit_now(&self, claim: Claim, tentative: bool) -> Result<Permit<'_>, Denied> {
        if let Some(next) = self.deployment.successor.get() {
            return match tentative {
                true => next.probe(claim),
                false => next.try_acquire(claim),
            };
        }
        let (handle, _, admission) = self.admit(claim, false, tentative, None);
        match admission {
            Admission::Admitted(at, charged) => Ok(handle.permit_charged(claim, at, charged)),
            Admission::Denied(denied) => Err(denied),
            Admission::Parked(_) => unreachable!("a request that must not wait is never parked"),
        }
    }

    /// What this handle has become: itself, unless its deployment was reconfigured.
    pub(super) fn current(&self) -> &Self {
        let mut handle = self;
        while let Some(next) = handle.deployment.successor.get() {
            handle = next;
        }
        handle
    }

    /// The permit of a decision that was made under the lock. Between a decision and its
    /// permit a limit may have come to be checked against other quotas.
    pub(super) fn permit_charged(&self, claim: Claim, at: Timestamp, charged: Arc<[Counter]>) -> Permit<'_> {
        if Arc::ptr_eq(&charged, &self.deployment.counters) {
            return self.permit(claim, at);
        }
        let handle = Self { deployment: Arc::new(self.deployment.charging(charged)) };
        Permit { handle: Cow::Owned(handle), claim, at, waited_ms: 0, state: Charge::Reserved }
    }

    /// Decides under the lock, and says on whose behalf. A request that may wait and is
    /// parked leaves `waker` behind.
    pub(super) fn admit(
        &self,
        claim: Claim,
        may_wait: bool,
        tentative: bool,
        waker: Option<&Waker>,
    ) -> (&Self, Timestamp, Admission) {
        let mut core = self.deployment.inner.lock();
        // Under the lock nobody becomes anything else.
        let handle = self.current();
        let deployment = &handle.deployment;
        let now = deployment.inner.clock.now();
        let wait = if may_wait { deployment.policy.wait } else { Duration::ZERO };
        let ask = Ask { claim, edge_ms: deployment.edge_ms, wait, tentative };
        let admission = core.ledger.admit(deployment.limit, ask, now);
        if let (Admission::Parked(ticket), Some(waker)) = (&admission, waker) {
            core.waiters.insert(*ticket, Waiter::Waiting(waker.clone()));
            core.parked = true;
        }
        let wake = core.take_served();
        drop(core);
        wake.into_iter().for_each(Waker::wake);
        (handle, now, admission)
    }

    /// Replaces what was reserved at `at` by what was used.
    ///
    /// Out of line and by value: a permit whose address nobody takes stays in registers.
    #[inline(never)]
    pub(super) fn replace(&self, reserved: Claim, at: Timestamp, actual: Claim) {
        let mut look = false;
        for (counter, number, reserved) in self.charges(reserved, at) {
            let used = actual.amount(counter.unit);
            if used < reserved {
                let after = counter.ring.refund(number, reserved - used);
                look |= after.is_some_and(|after| after.parked);
            } else if used > reserved {
                match counter.ring.charge(number, used - reserved) {
                    Some(after) => look |= after.balance < 0,
                    None => self.overdrawn_late(counter, at, used - reserved),
                }
            }
        }
        if look {
            self.settled();
        }
    }

    /// The window of an excess has closed: nobody can cover it any more.
    #[cold]
    fn overdrawn_late(&self, counter: &Counter, at: Timestamp, excess: u64) {
        self.deployment.inner.lock().ledger.settled_late(counter.number, at, excess);
    }

    /// Lets the ledger look at what was put back or overdrawn.
    #[cold]
    pub(super) fn settled(&self) {
        let now = self.deployment.inner.clock.now();
        let mut core = self.deployment.inner.lock();
        core.ledger.settled(self.deployment.limit, now);
        let wake = core.take_served();
        drop(core);
        wake.into_iter().for_each(Waker::wake);
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("deployment", &self.deployment.id).finish_non_exhaustive()
    }
}
