//! Clients: they ask, wait, go away, come back, settle, refund, forget.
//!
//! Knows what a client sees. Must not know why. The invariant it keeps: the oracle is told
//! of every permit a client gets and of what becomes of it, in that order.

use std::task::Poll;

use quotum::{Claim, Denied, Permit};

use super::queue::Event;
use super::replica::{Flight, Waiting};
use super::world::World;
use crate::Micros;
use crate::canary::Canary;
use crate::oracle::quota_of;
use crate::workload::{End, Request, choose};

impl World {
    /// A request of the workload arrives, and the next one is drawn.
    pub(super) fn arrive(&mut self, request: Request) {
        let load = if self.in_calm() { self.plan.calm_load } else { 1.0 };
        let next = self.arrivals.next(load);
        if next.at < self.quiet_from() {
            self.queue.push(next.at, Event::Arrival(Box::new(next)));
        }
        self.offer(request);
    }

    /// A client asks whichever replica it is sent to.
    pub(super) fn offer(&mut self, request: Request) {
        let serves = |number: &usize| {
            let replica = &self.replicas[*number];
            let asked = replica.serves() || self.is_still_asked(*number);
            asked && replica.process.as_ref().is_some_and(|process| process.knows)
        };
        let serving: Vec<usize> = (0..self.replicas.len()).filter(serves).collect();
        if serving.is_empty() {
            return;
        }
        if self.weights.len() < serving.len() {
            self.weights = crate::workload::zipf_weights(serving.len() * 2);
        }
        let chosen = choose(self.plan.workload.shape, request.place, self.at, serving.len(), &self.weights);
        let replica = serving[chosen];
        self.oracle.figures.offered += 1;
        if self.is_steady() {
            self.replicas[replica].calm_offered += 1;
        }
        self.measure_offer(replica, &request);
        self.ask(replica, request);
    }

    fn ask(&mut self, replica: usize, request: Request) {
        if self.plan.http.is_some() && self.pods.is_some() {
            return self.ask_over_tcp(replica, &request);
        }
        self.set_clock(replica);
        self.next_permit += 1;
        let ticket = self.next_permit;
        let claim = self.claimed(replica, &request);
        let at = self.at;
        let Some(process) = &mut self.replicas[replica].process else { return };
        let handle = match &process.twin {
            Some(twin) if ticket.is_multiple_of(2) => {
                twin.handle(super::lives::DEPLOYMENT).expect("the twin has the same deployment")
            }
            _ => process.handle.clone(),
        };
        let mut waiting = Waiting::ask(&handle, claim, request, at, process.woken.bell(ticket));
        match waiting.poll() {
            Poll::Ready(answer) => self.answered(replica, ticket, request, at, answer),
            Poll::Pending => {
                process.parked.insert(ticket, waiting);
                self.reach("parked");
                if let Some(after) = request.leaves_after {
                    self.queue.push(at + after, Event::GoAway { replica, ticket });
                }
            }
        }
        self.flush(replica);
    }

    /// What the replica is asked for: the truth, but for canaries.
    fn claimed(&mut self, replica: usize, request: &Request) -> Claim {
        let (mut prompt, output) = (request.prompt, request.reserved_output);
        match self.options.canary {
            Some(Canary::ChargeOffByOne) => prompt = prompt.saturating_sub(1),
            Some(Canary::SilentRefusal) if request.number.is_multiple_of(50) => {
                let process = self.replicas[replica].process.as_ref();
                let standings = process.map(|process| process.handle.standings()).unwrap_or_default();
                if let Some(standing) = standings.iter().find(|standing| standing.spendable >= request.reserved()) {
                    // Asks for more than there is, and calls the answer one to the request.
                    prompt = (standing.remaining() + 1).min(standing.quota.amount()).max(prompt);
                }
            }
            _ => {}
        }
        Claim::prompt_and_output(prompt, output)
    }

    /// Looks at every request that was woken.
    pub(super) fn serve_woken(&mut self, replica: usize) {
        loop {
            let Some(process) = &mut self.replicas[replica].process else { return };
            let woken = process.woken.take();
            if woken.is_empty() {
                return;
            }
            for ticket in woken {
                let Some(process) = &mut self.replicas[replica].process else { return };
                let Some(mut waiting) = process.parked.remove(&ticket) else { continue };
                match waiting.poll() {
                    Poll::Ready(answer) => {
                        if answer.is_ok() {
                            self.reach("parked and admitted");
                        }
                        self.answered(replica, ticket, waiting.request, waiting.since, answer);
                    }
                    Poll::Pending => {
                        process.parked.insert(ticket, waiting);
                    }
                }
            }
        }
    }

    /// A client that waits goes away.
    pub(super) fn go_away(&mut self, replica: usize, ticket: u64) {
        self.set_clock(replica);
        let Some(process) = &mut self.replicas[replica].process else { return };
        if process.parked.remove(&ticket).is_some() {
            self.trace.note(&[8, replica as u64, ticket]);
            self.reach("a caller left while parked");
            self.flush(replica);
        }
    }

    fn answered(
        &mut self,
        replica: usize,
        ticket: u64,
        request: Request,
        since: Micros,
        answer: Result<Permit<'static>, Denied>,
    ) {
        self.trace.note(&[9, replica as u64, request.number, u64::from(answer.is_ok())]);
        match answer {
            Ok(permit) => {
                if self.at > since {
                    self.waits.push(self.at - since);
                }
                self.admitted(replica, ticket, request, permit);
            }
            Err(denied) => {
                self.refused(replica, request, since, &denied);
            }
        }
    }

    fn admitted(&mut self, replica: usize, ticket: u64, request: Request, mut permit: Permit<'static>) {
        let reserved_ms = permit.reserved_at().unix_ms();
        self.line(Some(replica), || format!("admits request {} of {}", request.number, request.reserved()));
        self.oracle.admitted(self.at, replica, ticket, &request, reserved_ms);
        if self.oracle.charged_windows(reserved_ms).len() > self.plan.quotas.len() {
            self.reach("edge guard");
        }
        if request.end != End::Cancelled {
            permit.start();
        }
        let arrived_ms = (self.true_ms() * 1_000 + request.transit) / 1_000;
        let window = self.plan.quotas[0].window().ms().get();
        if self.plan.is_plain() && arrived_ms / window > reserved_ms / window {
            self.reach("upstream window crossed");
        }
        let Some(process) = &mut self.replicas[replica].process else { return };
        let ends = self.at + request.hold;
        process.flights.insert(ticket, Flight { permit, request, arrived_ms, ends });
        self.queue.push(ends, Event::End { replica, permit: ticket });
    }

    fn refused(&mut self, replica: usize, request: Request, since: Micros, denied: &Denied) {
        let local = self.replicas[replica].local_ms(self.at, self.plan.phase);
        let asked_ms = self.replicas[replica].local_ms(since, self.plan.phase);
        let at = self.at;
        let wrongful = self.oracle.refused(&request, asked_ms.max(local));
        let rightly = if wrongful { "WRONGLY" } else { "rightly" };
        self.line(Some(replica), || {
            let waited = (at - since) / 1_000;
            format!(
                "refuses {rightly}, after {waited} ms, request {} of {}: {denied}",
                request.number,
                request.reserved()
            )
        });
        self.measure_refusal(wrongful);
        if wrongful && self.is_steady() {
            self.replicas[replica].calm_wrongful += 1;
        }
        self.reach("refused");
        self.check_refusal(replica, &request, since, denied);
        if let Some(after) = denied.retry_after()
            && request.retries > 0
        {
            let back = Request { retries: request.retries - 1, ..request };
            let at = self.at + after.as_micros() as Micros;
            if at < self.quiet_from() {
                self.queue.push(at, Event::Retry(Box::new(back)));
            }
        }
    }

    /// A response ends.
    pub(super) fn end(&mut self, replica: usize, ticket: u64) {
        if self.at >= self.quiet_from() {
            return; // The last moments are still, so that what is known can settle too.
        }
        let local = self.set_clock(replica);
        let Some(process) = &mut self.replicas[replica].process else { return };
        let Some(flight) = process.flights.remove(&ticket) else { return };
        self.trace.note(&[10, replica as u64, ticket]);
        let Flight { permit, request, arrived_ms, .. } = flight;
        let grid = self.plan.quotas[0].grid();
        if grid.window_at(permit.reserved_at()).end().unix_ms() <= local {
            self.reach("late settlement");
        }
        // Told first: a settlement can set off anything.
        self.oracle.ended(self.at, ticket, request.end, arrived_ms);
        let end = request.end;
        self.line(Some(replica), || {
            format!("ends request {}: {end:?}, {} of {} used", request.number, request.actual(), request.reserved())
        });
        self.finish_permit(permit, &request);
        if request.end == End::Settled && request.output > request.reserved_output {
            self.note_debt(replica);
        }
        self.flush(replica);
    }

    fn finish_permit(&mut self, mut permit: Permit<'static>, request: &Request) {
        let canary = self.options.canary;
        match request.end {
            End::Cancelled if canary == Some(Canary::LeaksRefund) => {
                permit.start();
                drop(permit);
            }
            End::Cancelled if request.number.is_multiple_of(2) => drop(permit),
            End::Cancelled => permit.refund(),
            End::Unsettled => drop(permit),
            End::Settled => {
                let mut output = request.output;
                if canary == Some(Canary::DoubleSettle) && output < request.reserved_output {
                    output = output.saturating_sub(request.reserved_output - output);
                }
                if canary == Some(Canary::DebtForgotten) {
                    output = output.min(request.reserved_output);
                }
                permit.settle_claim(Claim::prompt_and_output(request.prompt, output));
            }
        }
    }

    fn note_debt(&mut self, replica: usize) {
        let Some(process) = &self.replicas[replica].process else { return };
        let debt = process.handle.standings().iter().any(|standing| standing.debt > 0);
        if debt && quota_of(&self.plan.quotas, quotum::Unit::Tokens).is_some() {
            self.reach("debt");
        }
    }
}

impl World {
    /// From when on clients are still, so that news can reach everybody before the end.
    pub(super) fn quiet_from(&self) -> Micros {
        if let Some(http) = &self.plan.http {
            return http.quiet_from;
        }
        if self.plan.recovers { self.plan.end - QUIET } else { self.plan.end }
    }
}

/// Before the end of a run nothing is asked or settled for so long: news must be able to
/// reach everybody.
const QUIET: Micros = 1_500_000;
