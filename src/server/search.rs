//! Looking for a deployment that takes a request.
//!
//! Knows the order of the looks: who is paused or down is passed over, who has room at once
//! is taken, and before a higher order is asked one of the lower waits for rights. Must not
//! know how a request is sent. The invariant it keeps: a request that nobody takes is one
//! refusal, counted once, and told with the earliest moment at which anybody may take it.

use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use crate::layer::parts::Prompts;
use crate::layer::parts::refusal::{self, Refusal};
use crate::layer::{Call, Family};
use crate::{Claim, Denied, Limiter, Permit};
use tokio::time::Instant;

use super::proxy::Served;
use super::routing::{InTurn, Level, Route, Routes};
use crate::telemetry::Telemetry;

/// A reservation, and where the request goes with it.
pub(super) struct Granted<'a> {
    pub(super) route: &'a Route<Served>,
    pub(super) permit: Permit<'static>,
}

/// The looks of one request, which may go on after an upstream has refused it.
pub(super) struct Search<'a> {
    call: &'a Call,
    prompts: &'a Prompts,
    limiter: &'a Limiter,
    telemetry: &'a Telemetry,
    levels: std::slice::Iter<'a, Level<Served>>,
    level: Option<InTurn<'a, Served>>,
    /// Whether the level's only deployment is asked once, by waiting at it.
    is_only: bool,
    /// Who in this level had no room, and may have some in a few milliseconds.
    short: Option<(&'a Route<Served>, Claim)>,
    /// Who may take the request first, of those that do not take it now.
    soonest: Option<(&'a Route<Served>, No)>,
    waited: Duration,
}

/// Why a deployment does not take a request.
enum No {
    Denied(Claim, Denied),
    /// Its upstream asked for a pause.
    Paused(Duration),
    /// Its upstream cannot be reached, and is tried again later.
    Down(Duration),
}

impl No {
    /// Returns when it is worth another try; never comes last.
    fn after(&self) -> Duration {
        match self {
            Self::Denied(_, denied) => denied.retry_after().unwrap_or(Duration::MAX),
            Self::Paused(left) | Self::Down(left) => *left,
        }
    }
}

impl<'a> Search<'a> {
    pub(super) fn new(
        routes: &'a Routes<Served>,
        (call, prompts): (&'a Call, &'a Prompts),
        limiter: &'a Limiter,
        telemetry: &'a Telemetry,
    ) -> Self {
        Self {
            call,
            prompts,
            limiter,
            telemetry,
            levels: routes.levels(),
            level: None,
            is_only: false,
            short: None,
            soonest: None,
            waited: Duration::ZERO,
        }
    }

    /// Returns how long was waited for rights so far.
    pub(super) fn waited(&self) -> Duration {
        self.waited
    }

    /// Reserves what the call may use at the next deployment that takes it; `None` if no
    /// further one does.
    pub(super) async fn next(&mut self) -> Option<Granted<'a>> {
        loop {
            while let Some(route) = self.level.as_mut().and_then(Iterator::next) {
                if let Some(granted) = self.look(route) {
                    return Some(granted);
                }
            }
            // A higher order is asked once neither this pod nor its peers have room here.
            if let Some((route, claim)) = self.short.take()
                && let Some(granted) = self.wait(route, claim).await
            {
                return Some(granted);
            }
            let level = self.levels.next()?;
            self.is_only = level.len() == 1;
            self.level = Some(level.in_turn());
        }
    }

    /// Reserves at a deployment that has room at once.
    fn look(&mut self, route: &'a Route<Served>) -> Option<Granted<'a>> {
        if let Some(until) = route.to.handle.paused_until() {
            return self.no(route, No::Paused(until.since(self.limiter.now())));
        }
        if let Some(left) = route.health.down() {
            return self.no(route, No::Down(left));
        }
        let claim = route.to.meter.claim(self.call, self.prompts);
        if self.is_only {
            self.short = Some((route, claim));
            return None;
        }
        let begun = std::time::Instant::now();
        let decision = route.to.handle.probe(claim);
        self.telemetry.decided(begun.elapsed());
        match decision {
            Ok(permit) => self.enter(route, permit),
            Err(denied) if self.short.is_none() && !matches!(denied, Denied::TooLarge { .. }) => {
                self.short = Some((route, claim));
                None
            }
            Err(denied) => self.no(route, No::Denied(claim, denied)),
        }
    }

    /// Reserves at a deployment as soon as its peers have sent rights.
    async fn wait(&mut self, route: &'a Route<Served>, claim: Claim) -> Option<Granted<'a>> {
        let (result, decision, waited) = timed(route.to.handle.acquire(claim).tentative()).await;
        match decision {
            Some(took) => self.telemetry.decided(took),
            None => self.telemetry.waited(waited),
        }
        self.waited += waited;
        match result {
            Ok(permit) => self.enter(route, permit),
            Err(denied) => self.no(route, No::Denied(claim, denied)),
        }
    }

    /// Goes there with a reservation, unless somebody else is just finding out whether the
    /// upstream can be reached; the reservation then gives itself back.
    fn enter(&mut self, route: &'a Route<Served>, permit: Permit<'_>) -> Option<Granted<'a>> {
        if !route.health.enter() {
            let left = route.health.down().unwrap_or_default();
            return self.no(route, No::Down(left));
        }
        Some(Granted { route, permit: permit.into_owned() })
    }

    fn no(&mut self, route: &'a Route<Served>, no: No) -> Option<Granted<'a>> {
        if self.soonest.as_ref().is_none_or(|(_, soonest)| no.after() < soonest.after()) {
            self.soonest = Some((route, no));
        }
        None
    }

    /// Returns what the caller is told whose request nobody takes, and counts it.
    pub(super) fn refusal(self, family: Family) -> Option<Refusal> {
        let (route, no) = self.soonest?;
        let (served, model) = (&route.to, &self.call.model);
        let mut refusal = match no {
            No::Denied(claim, denied) => {
                served.handle.count_refusal(&denied);
                refusal::denied(&denied, model, &served.id, claim, family)
            }
            No::Paused(left) => {
                self.telemetry.refused(&served.id, "upstream_paused");
                refusal::cooling(model, &served.id, left)
            }
            No::Down(left) => {
                self.telemetry.refused(&served.id, "upstream_unreachable");
                refusal::down(model, &served.id, left)
            }
        };
        refusal::set_standings(&mut refusal.headers, &served.handle.standings(), family);
        refusal::set_wait(&mut refusal.headers, self.waited);
        Some(refusal)
    }
}

/// Runs a decision; says how long it took if it was made at once, else how long it was
/// waited for.
async fn timed<F: Future>(decision: F) -> (F::Output, Option<Duration>, Duration) {
    let mut decision = pin!(decision);
    let begun = std::time::Instant::now();
    let first = std::future::poll_fn(|cx| Poll::Ready(decision.as_mut().poll(cx))).await;
    if let Poll::Ready(output) = first {
        return (output, Some(begun.elapsed()), Duration::ZERO);
    }
    let parked = Instant::now();
    let output = decision.await;
    (output, None, parked.elapsed())
}
