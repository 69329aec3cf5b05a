//! Reserving: the hot path, and the door to the ledger beside it.
//!
//! Knows in which order claims are taken and given back. Must not know who is woken. The
//! invariant it keeps: a hit takes no lock, allocates nothing and shares no reference count.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
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
        if self.take(&claim, now) {
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
        if self.take(&claim, now) {
            return Ok(self.permit(claim, now));
        }
        self.admit_now(claim, true)
    }

    /// Counts a refusal that [`Handle::probe`] or a [tentative](Acquire::tentative) wait
    /// returned, once no other deployment has admitted the request either.
    pub fn count_refusal(&self, denied: &Denied) {
        self.deployment.inner.lock().ledger.count_refusal(self.deployment.limit, denied);
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
        let now = self.deployment.inner.clock.now();
        self.deployment.inner.lock().ledger.standings(&self.deployment.name, now)
    }

    /// Returns the deployment's id.
    pub fn deployment(&self) -> &str {
        &self.deployment.id
    }

    /// Returns the deployment's quotas, in key order.
    pub fn quotas(&self) -> impl Iterator<Item = Quota> + '_ {
        self.deployment.counters.iter().map(|counter| counter.key.quota)
    }

    /// Returns how the deployment's limits are applied.
    pub fn policy(&self) -> &Policy {
        &self.deployment.policy
    }

    /// The hot path: every claim or none, in key order. A plain loop, and everything that is
    /// not the rule is out of line: the rest costs more than the compare-and-swap.
    #[inline(always)]
    pub(super) fn take(&self, claim: &Claim, now: Timestamp) -> bool {
        for counter in &self.deployment.counters {
            let amount = claim.amount(counter.key.quota.unit());
            let (number, left_ms) = counter.place_at(now.unix_ms());
            let rule = left_ms > self.deployment.edge_ms;
            if amount != 0 && !(rule && counter.ring.take(number, amount).is_ok()) {
                return self.take_out_of_line(claim, now, counter);
            }
        }
        true
    }

    /// Gives back what was taken before `stuck`, and takes all again: near a window's end
    /// in both windows.
    #[cold]
    fn take_out_of_line(&self, claim: &Claim, now: Timestamp, stuck: &Counter) -> bool {
        let charges = self.charges(*claim, now);
        let taken = charges.clone().take_while(|(counter, ..)| !std::ptr::eq(*counter, stuck));
        self.put_back(taken);
        for (done, (counter, number, amount)) in charges.clone().enumerate() {
            if counter.ring.take(number, amount).is_err() {
                self.put_back(charges.take(done));
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
        let edge_ms = self.deployment.edge_ms;
        self.deployment.counters.iter().flat_map(move |counter| {
            let amount = claim.amount(counter.key.quota.unit());
            let (number, left_ms) = counter.place_at(at.unix_ms());
            let edge = left_ms <= edge_ms;
            let windows = if amount == 0 { 0 } else { 1 + u64::from(edge) };
            (0..windows).map(move |ahead| (counter, number + ahead, amount))
        })
    }

    #[inline(always)]
    pub(super) fn permit(&self, claim: Claim, at: Timestamp) -> Permit<'_> {
        Permit { handle: Cow::Borrowed(self), claim, at, waited_ms: 0, state: Charge::Reserved }
    }

    #[cold]
    fn admit_now(&self, claim: Claim, tentative: bool) -> Result<Permit<'_>, Denied> {
        match self.admit(claim, Duration::ZERO, tentative, None).1 {
            Admission::Admitted(at) => Ok(self.permit(claim, at)),
            Admission::Denied(denied) => Err(denied),
            Admission::Parked(_) => unreachable!("a request that must not wait is never parked"),
        }
    }

    /// Decides under the lock. A parked request leaves `waker` behind.
    pub(super) fn admit(
        &self,
        claim: Claim,
        wait: Duration,
        tentative: bool,
        waker: Option<&Waker>,
    ) -> (Timestamp, Admission) {
        let now = self.deployment.inner.clock.now();
        let ask = Ask { claim, edge_ms: self.deployment.edge_ms, wait, tentative };
        let mut core = self.deployment.inner.lock();
        let admission = core.ledger.admit(self.deployment.limit, ask, now);
        if let (Admission::Parked(ticket), Some(waker)) = (&admission, waker) {
            core.waiters.insert(*ticket, Waiter::Waiting(waker.clone()));
            core.parked = true;
        }
        let wake = core.take_served();
        drop(core);
        wake.into_iter().for_each(Waker::wake);
        (now, admission)
    }

    /// Replaces what was reserved at `at` by what was used.
    ///
    /// Out of line and by value: a permit whose address nobody takes stays in registers.
    #[inline(never)]
    pub(super) fn replace(&self, reserved: Claim, at: Timestamp, actual: Claim) {
        let mut look = false;
        for (counter, number, reserved) in self.charges(reserved, at) {
            let used = actual.amount(counter.key.quota.unit());
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
        let deployment = &self.deployment;
        let position = deployment.counters.iter().position(|other| other.key == counter.key);
        if let Some(position) = position {
            deployment.inner.lock().ledger.settled_late(deployment.limit, position, at, excess);
        }
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
