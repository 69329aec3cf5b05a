//! Waiting for rights.
//!
//! Knows the life of one parked request, from asking to being woken or dropped. Must not
//! know why it was parked. The invariant it keeps: a future that is dropped holds nothing.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::{Handle, Permit, Waiter};
use crate::ledger::{Admission, Claim, Denied, Ticket, Timestamp};

/// The future of [`Handle::acquire`].
///
/// # Panics
/// When it is polled again after it has finished.
#[must_use = "futures do nothing unless polled"]
pub struct Acquire<'a> {
    handle: &'a Handle,
    claim: Claim,
    tentative: bool,
    state: Waiting,
    asked_at: Timestamp,
}

enum Waiting {
    NotAsked,
    Parked(Ticket),
    Done,
}

impl<'a> Acquire<'a> {
    pub(super) fn new(handle: &'a Handle, claim: Claim) -> Self {
        Self { handle, claim, tentative: false, state: Waiting::NotAsked, asked_at: Timestamp::ZERO }
    }

    /// Asks for whoever asks another deployment next: a refusal is not counted
    /// (see [`Handle::probe`]).
    pub fn tentative(mut self) -> Self {
        self.tentative = true;
        self
    }
}

impl<'a> Future for Acquire<'a> {
    type Output = Result<Permit<'a>, Denied>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let handle = this.handle;
        let (asked_at, admission) = match this.state {
            Waiting::NotAsked => {
                let handle = handle.current();
                this.handle = handle;
                let now = handle.deployment.inner.clock.now();
                if handle.take(this.claim, now) {
                    this.state = Waiting::Done;
                    return Poll::Ready(Ok(handle.permit(this.claim, now)));
                }
                let (handle, asked_at, admission) = handle.admit(this.claim, true, this.tentative, Some(cx.waker()));
                this.handle = handle;
                // NotAsked => Parked
                if let Admission::Parked(ticket) = admission {
                    this.state = Waiting::Parked(ticket);
                    this.asked_at = asked_at;
                    return Poll::Pending;
                }
                (asked_at, admission)
            }
            Waiting::Parked(ticket) => {
                let mut core = handle.deployment.inner.lock();
                match core.waiters.remove(&ticket) {
                    Some(Waiter::Decided(admission)) => (this.asked_at, admission),
                    _ => {
                        core.waiters.insert(ticket, Waiter::Waiting(cx.waker().clone()));
                        return Poll::Pending;
                    }
                }
            }
            Waiting::Done => panic!("an acquire future was polled after it had finished"),
        };
        // (NotAsked | Parked) => Done
        this.state = Waiting::Done;
        Poll::Ready(match admission {
            Admission::Admitted(at, charged) => {
                let mut permit = this.handle.permit_charged(this.claim, at, charged);
                let waited = handle.deployment.inner.clock.now().since(asked_at);
                permit.waited_ms = waited.as_millis().min(u128::from(u32::MAX)) as u32;
                Ok(permit)
            }
            Admission::Denied(denied) => Err(denied),
            Admission::Parked(_) => unreachable!("handled above"),
        })
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        let Waiting::Parked(ticket) = self.state else { return };
        let handle = self.handle;
        let now = handle.deployment.inner.clock.now();
        let mut core = handle.deployment.inner.lock();
        let decided = core.waiters.remove(&ticket);
        core.ledger.cancel(handle.deployment.limit, ticket, now);
        let wake = core.take_served();
        drop(core);
        wake.into_iter().for_each(Waker::wake);
        if let Some(Waiter::Decided(Admission::Admitted(at, charged))) = decided {
            // It was given something and never took it: the next in line gets it.
            drop(handle.permit_charged(self.claim, at, charged));
        }
    }
}

impl fmt::Debug for Acquire<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acquire").field("claim", &self.claim).finish_non_exhaustive()
    }
}
