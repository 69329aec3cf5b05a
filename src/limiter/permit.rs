//! A reservation in the caller's hands.
//!
//! Knows what a reservation charged and how to replace it by what was used. Must not know
//! how it was decided. The invariant it keeps: it is settled once, into the windows it was
//! charged to.

use std::borrow::Cow;
use std::time::Duration;

use super::Handle;
use crate::ledger::{Claim, Timestamp, Unit};

/// A reservation. Settle or refund it; dropped, it refunds itself if the request was never
/// started, and stays charged if it was.
#[derive(Debug)]
#[must_use = "a permit that is dropped at once refunds itself"]
pub struct Permit<'a> {
    pub(super) handle: Cow<'a, Handle>,
    pub(super) claim: Claim,
    /// When it was reserved: it names the windows charged.
    pub(super) at: Timestamp,
    /// Not a `Duration`: the spare values of its nanoseconds would become the tag of
    /// `Result<Permit, Denied>`, and every move a row of unaligned copies.
    pub(super) waited_ms: u32,
    pub(super) state: Charge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Charge {
    Reserved,
    Started,
    Settled,
}

impl Permit<'_> {
    /// Says that the request may reach the upstream from now on: dropped after this, the
    /// whole reservation stays charged.
    pub fn start(&mut self) {
        self.state = Charge::Started;
    }

    /// Replaces the estimate by what was used, in tokens. More than was reserved is
    /// charged at once, to the window of the reservation, and covered by peers' rights.
    ///
    /// Prompt and output tokens stay charged as they were reserved, whatever the total: who
    /// limits them settles by [`Permit::settle_claim`]. Once the window has closed (a fixed one:
    /// two of its lengths after its end, ten minutes at most) nothing is given back any more, and
    /// what exceeds the reservation is counted as uncovered.
    #[inline]
    pub fn settle(mut self, total_tokens: u64) {
        self.state = Charge::Settled;
        if total_tokens != self.claim.amount(Unit::Tokens) {
            self.handle.replace(self.claim, self.at, self.claim.with(Unit::Tokens, total_tokens));
        }
    }

    /// Replaces the estimate by what was used, in every unit: what `actual` leaves out counts
    /// as not used. [`Claim::tokens`] names no prompt and no output tokens, so it gives those
    /// back in full; [`Claim::prompt_and_output`] names all. After the window has closed it is
    /// as with [`Permit::settle`].
    pub fn settle_claim(mut self, actual: Claim) {
        self.state = Charge::Settled;
        self.handle.replace(self.claim, self.at, actual);
    }

    /// Gives everything back: the request never reached the upstream.
    pub fn refund(mut self) {
        // Dropped in this state, it refunds itself.
        self.state = Charge::Reserved;
    }

    /// Returns what was reserved.
    pub const fn claim(&self) -> Claim {
        self.claim
    }

    /// Returns when it was reserved.
    pub const fn reserved_at(&self) -> Timestamp {
        self.at
    }

    /// Returns how long the request was parked.
    pub const fn waited(&self) -> Duration {
        Duration::from_millis(self.waited_ms as u64)
    }

    /// Returns the permit on its own: it can outlive the handle it was taken from, as in a
    /// response body.
    pub fn into_owned(mut self) -> Permit<'static> {
        let handle = Cow::Owned(self.handle.as_ref().clone());
        let state = std::mem::replace(&mut self.state, Charge::Settled);
        Permit { handle, claim: self.claim, at: self.at, waited_ms: self.waited_ms, state }
    }
}

impl Drop for Permit<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.state == Charge::Reserved {
            self.handle.replace(self.claim, self.at, Claim::NOTHING);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Denied;

    #[test]
    fn a_refusal_is_no_larger_than_a_permit_so_that_a_result_of_both_moves_in_one_piece() {
        assert!(size_of::<Denied>() <= size_of::<Permit<'_>>());
        assert_eq!(size_of::<Result<Permit<'_>, Denied>>(), size_of::<Permit<'_>>());
    }
}
