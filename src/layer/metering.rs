//! How much is reserved for a request, and what becomes of the reservation.
//!
//! Knows the reserve rules, what a deployment's outputs were, and the refund rules of
//! docs/algorithm.md section 4. Must not know HTTP. The invariant it keeps: a reservation is
//! settled once; what may have been used upstream is never given back unless the
//! upstream says that it was not.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::dialect::{Call, Report, Tally, Usage};
use super::prompts::Prompts;
use super::tokenizer::Tokenizer;
use crate::{Claim, Handle, Mode, Permit, Portion, Quota, Unit};

/// How many outputs are remembered.
const OUTPUTS: usize = 1_000;

/// How many outputs must be known before they count as experience.
const MIN_OUTPUTS: usize = 20;

/// After how many new outputs the quantile is found again: often enough to follow, and
/// seldom enough that sorting a thousand numbers does not show.
const RELEARN_EVERY: u64 = 16;

/// How much is reserved for a request's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reserve {
    /// Bound where the request names a cap, learned where it names none.
    #[default]
    Auto,
    /// The largest cap, or [`Metering::default_max_tokens`].
    Bound,
    /// The 90th percentile of this deployment's last 1,000 outputs, once there are 20.
    Learned,
}

/// What a response without authoritative usage is charged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unreported {
    /// Everything that was reserved.
    #[default]
    Reserved,
    /// The prompt's bound and what could be counted in the response.
    Counted,
}

/// How a deployment's requests are metered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metering {
    /// How much is reserved for a request's output.
    pub reserve: Reserve,
    /// What a response without authoritative usage is charged.
    pub unreported: Unreported,
    /// The tokens of one output where a request names no cap and nothing was learned yet.
    pub default_max_tokens: u64,
    /// What a token of the prompt counts that was read from the provider's cache: `None` as
    /// much as any other, [`Portion::ZERO`] nothing. Providers differ in what they count
    /// against a limit: Anthropic leaves such tokens out for most models.
    pub cached_input: Option<Portion>,
    /// What bounds the text of a prompt: bytes by default, which are some four times its
    /// tokens. With another tokenizer than the upstream's the bound is none.
    pub tokenizer: Tokenizer,
}

impl Default for Metering {
    /// Returns [`Reserve::Auto`], [`Unreported::Reserved`], 4,096 tokens, no weight and bytes.
    fn default() -> Self {
        Self {
            reserve: Reserve::Auto,
            unreported: Unreported::Reserved,
            default_max_tokens: 4_096,
            cached_input: None,
            tokenizer: Tokenizer::Bytes,
        }
    }
}

/// Who is told how good the estimates were.
pub trait Observer: Send + Sync + fmt::Debug {
    /// Notes what was reserved for an answer, and what it used.
    fn estimated(&self, reserved: u64, used: u64);

    /// Notes an answer whose use is not known, and why: `lie`, `silent` or `encoded`.
    fn unreported(&self, why: &'static str);
}

/// Nobody is told.
impl Observer for () {
    fn estimated(&self, _: u64, _: u64) {}

    fn unreported(&self, _: &'static str) {}
}

/// What a reservation of one deployment amounts to.
#[derive(Debug)]
pub struct Meter {
    metering: Metering,
    mode: Mode,
    quotas: Vec<Quota>,
    outputs: Mutex<Outputs>,
    /// The p90 of the outputs, or the default before there are enough.
    learned: AtomicU64,
}

#[derive(Clone, Debug, Default)]
struct Outputs {
    ring: Vec<u64>,
    seen: u64,
}

impl Meter {
    /// Returns the meter of a deployment in this mode, with these quotas.
    pub fn new(metering: Metering, mode: Mode, quotas: Vec<Quota>) -> Self {
        let learned = AtomicU64::new(metering.default_max_tokens);
        Self { metering, mode, quotas, outputs: Mutex::default(), learned }
    }

    /// Returns the meter of a handle's deployment.
    pub fn of(handle: &Handle, metering: Metering) -> Self {
        Self::new(metering, handle.policy().mode, handle.quotas().collect())
    }

    /// Returns the meter with what another one has learnt of the same deployment.
    pub fn after(self, before: Option<&Self>) -> Self {
        let Some(before) = before else { return self };
        let outputs = before.outputs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if outputs.ring.len() >= MIN_OUTPUTS {
            self.learned.store(before.learned.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        Self { outputs: Mutex::new(outputs), ..self }
    }

    /// Returns what a prompt must be counted with: bytes where no limit is of its tokens.
    pub fn tokenizer(&self) -> Tokenizer {
        let counts = |quota: &Quota| matches!(quota.unit(), Unit::Tokens | Unit::InputTokens);
        if self.quotas.iter().any(counts) { self.metering.tokenizer } else { Tokenizer::Bytes }
    }

    /// Returns what is reserved for this request, whose prompt was bounded before.
    pub fn claim(&self, call: &Call, prompts: &Prompts) -> Claim {
        let prompt = prompts.by(self.metering.tokenizer);
        let bound = call.cap.unwrap_or(self.metering.default_max_tokens).saturating_mul(call.choices);
        let learned = || {
            let estimate = self.learned.load(Ordering::Relaxed).saturating_mul(call.choices);
            let estimate = call.cap.map_or(estimate, |_| estimate.min(bound));
            self.fitting(prompt, estimate)
        };
        let output = match (self.metering.reserve, call.cap) {
            (Reserve::Bound, _) | (Reserve::Auto, Some(_)) => bound,
            (Reserve::Learned, _) | (Reserve::Auto, None) => learned(),
        };
        Claim::prompt_and_output(prompt, output)
    }

    /// Returns the estimate, smaller where it alone would make the request too large
    /// for a limit: a guess must not refuse what may fit.
    fn fitting(&self, prompt: u64, estimate: u64) -> u64 {
        let room = self.quotas.iter().filter_map(|quota| match quota.unit() {
            Unit::Tokens => Some(self.mode.largest(quota.largest_claim()).saturating_sub(prompt)),
            Unit::OutputTokens => Some(self.mode.largest(quota.largest_claim())),
            Unit::Requests | Unit::InputTokens => None,
        });
        room.fold(estimate, u64::min)
    }

    /// Remembers how long one choice of an answer was.
    fn learn(&self, output: u64) {
        let mut outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        let place = usize::try_from(outputs.seen % OUTPUTS as u64).unwrap_or(0);
        match outputs.ring.get_mut(place) {
            Some(oldest) => *oldest = output,
            None => outputs.ring.push(output),
        }
        outputs.seen += 1;
        let enough = outputs.ring.len() >= MIN_OUTPUTS;
        if enough && (outputs.seen.is_multiple_of(RELEARN_EVERY) || outputs.ring.len() == MIN_OUTPUTS) {
            let mut sorted = outputs.ring.clone();
            sorted.sort_unstable();
            self.learned.store(sorted[sorted.len() * 9 / 10].max(1), Ordering::Relaxed);
        }
    }
}

/// A reservation on its way: the permit, and what is known of its use.
///
/// Dropped unsettled it keeps the rules: nothing written upstream, nothing charged;
/// a stream in the middle, what was streamed; otherwise all of it.
#[derive(Debug)]
pub struct Charge {
    permit: Option<Permit<'static>>,
    meter: Arc<Meter>,
    observer: Arc<dyn Observer>,
    reserved: Claim,
    capped: bool,
    choices: u64,
    /// Set once bytes of the request may have left for the upstream.
    written: Arc<AtomicBool>,
    /// Upper bound of the tokens received so far.
    streamed: u64,
    streaming: bool,
    /// What the answer has said of its use so far.
    tally: Tally,
    /// It said what cannot be.
    lied: bool,
}

impl Charge {
    /// Returns the charge of a call that was admitted.
    pub fn new(permit: Permit<'static>, meter: Arc<Meter>, observer: Arc<dyn Observer>, call: &Call) -> Self {
        Self {
            reserved: permit.claim(),
            permit: Some(permit),
            meter,
            observer,
            capped: call.cap.is_some(),
            choices: call.choices,
            written: Arc::default(),
            streamed: 0,
            streaming: false,
            tally: Tally::default(),
            lied: false,
        }
    }

    /// Returns the flag that the request's body sets when it is first read for sending.
    pub fn written(&self) -> Arc<AtomicBool> {
        self.written.clone()
    }

    /// Notes that the request goes to who works on it: from now on it may be used.
    pub fn start(&mut self) {
        self.written.store(true, Ordering::Release);
    }

    /// Returns whether bytes of the request may have left for the upstream.
    pub fn was_written(&self) -> bool {
        self.written.load(Ordering::Acquire)
    }

    /// Notes that a stream has begun: what comes is all there will be.
    pub fn stream(&mut self) {
        self.streaming = true;
    }

    /// Notes text that was received.
    pub fn streamed(&mut self, text_bytes: u64) {
        self.streamed = self.streamed.saturating_add(text_bytes);
    }

    /// Notes what the answer says of its use.
    pub fn told(&mut self, report: Report) {
        match report {
            Report::None => {}
            Report::Told(tally) => self.tally = self.tally.then(tally),
            // Whoever lies once is not believed what was said before.
            Report::Lie => (self.tally, self.lied) = (Tally::default(), true),
        }
    }

    /// Returns whether the answer has told its use: then it is not counted.
    pub fn is_told(&self) -> bool {
        self.tally.usage().is_some()
    }

    /// Returns whether it is settled: what is told after that changes nothing.
    pub fn is_settled(&self) -> bool {
        self.permit.is_none()
    }

    /// Charges an answer that has come to its end: what it told, or else the rule for
    /// answers that do not tell.
    pub fn settle(&mut self) {
        if let Some(usage) = self.tally.usage() {
            return self.settle_usage(usage);
        }
        self.unreported(if self.lied { "lie" } else { "silent" });
        match self.meter.metering.unreported {
            Unreported::Counted => self.settle_failed(),
            Unreported::Reserved => self.keep(),
        }
    }

    /// Charges an answer that cannot be read: everything that was reserved.
    pub fn settle_unreadable(&mut self) {
        self.unreported("encoded");
        self.keep();
    }

    fn settle_usage(&mut self, usage: Usage) {
        let Some(permit) = self.permit.take() else { return };
        if usage.total > 0 && self.reserved.amount(Unit::OutputTokens) > 0 {
            self.meter.learn(usage.completion.div_ceil(self.choices.max(1)));
        }
        self.observer.estimated(self.reserved.amount(Unit::Tokens), usage.total);
        let free = self.meter.metering.cached_input.map_or(0, |weight| usage.cached - weight.of(usage.cached));
        let claim = Claim::prompt_and_output(usage.prompt - free, usage.completion);
        permit.settle_claim(claim.with(Unit::Tokens, usage.total - free));
    }

    fn unreported(&self, why: &'static str) {
        if self.permit.is_some() {
            self.observer.unreported(why);
        }
    }

    /// Charges an answer that failed or broke off: what it told, else the prompt and what
    /// was streamed.
    pub fn settle_failed(&mut self) {
        if let Some(usage) = self.tally.usage() {
            return self.settle_usage(usage);
        }
        let Some(permit) = self.permit.take() else { return };
        let reserved_output = self.reserved.amount(Unit::OutputTokens);
        // Bytes are a bound, and a cap is one, too.
        let output = if self.capped { self.streamed.min(reserved_output) } else { self.streamed };
        let prompt = self.tally.prompt().unwrap_or(self.reserved.amount(Unit::InputTokens));
        permit.settle_claim(Claim::prompt_and_output(prompt, output));
    }

    /// Charges the request alone: the upstream refused to work on it.
    pub fn settle_rejected(&mut self) {
        if let Some(permit) = self.permit.take() {
            permit.settle_claim(Claim::tokens(0));
        }
    }

    /// Charges what an exchange without an answer may have used: nothing if nothing was
    /// written, else the prompt.
    pub fn settle_unanswered(&mut self) {
        if self.was_written() {
            self.settle_failed();
        } else if let Some(permit) = self.permit.take() {
            permit.refund();
        }
    }

    /// Leaves everything charged.
    fn keep(&mut self) {
        if let Some(mut permit) = self.permit.take() {
            permit.start();
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.streaming {
            self.settle_failed();
        } else if self.was_written() {
            // Whoever hung up does not stop the upstream: it may use all of it.
            self.keep();
        } else {
            self.settle_unanswered();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Margin;
    use bytes::Bytes;

    fn meter(reserve: Reserve) -> Meter {
        meter_in(Mode::Strict, reserve)
    }

    fn meter_in(mode: Mode, reserve: Reserve) -> Meter {
        let quotas = vec![Quota::tokens(1_000).per_minute()];
        Meter::new(Metering { reserve, ..Metering::default() }, mode, quotas)
    }

    fn call(prompt: u64, cap: Option<u64>, choices: u64) -> Call {
        Call { model: "m".into(), prompt, cap, choices, body: Bytes::new(), hide_usage: false }
    }

    fn output(meter: &Meter, call: &Call) -> u64 {
        meter.claim(call, &Prompts::new(call)).amount(Unit::OutputTokens)
    }

    #[test]
    fn a_cap_is_reserved_for_every_choice() {
        assert_eq!(output(&meter(Reserve::Auto), &call(10, Some(50), 3)), 150);
        assert_eq!(output(&meter(Reserve::Bound), &call(10, Some(50), 3)), 150);
    }

    #[test]
    fn a_guess_never_makes_a_request_too_large() {
        assert_eq!(output(&meter(Reserve::Auto), &call(100, None, 1)), 900);
        assert_eq!(output(&meter(Reserve::Learned), &call(100, None, 2)), 900);
        let sum = Mode::Sum { margin: Margin::Fixed(Portion::percent(10)) };
        assert_eq!(output(&meter_in(sum, Reserve::Learned), &call(100, None, 1)), 800);
        // The bound keeps its promise instead.
        assert_eq!(output(&meter(Reserve::Bound), &call(100, None, 1)), 4_096);
    }

    #[test]
    fn a_learnt_output_is_no_more_than_the_cap_and_no_less_than_nothing() {
        let meter = meter(Reserve::Learned);
        (0..20).for_each(|_| meter.learn(100));
        assert_eq!(output(&meter, &call(0, Some(500), 1)), 100);
        assert_eq!(output(&meter, &call(0, Some(500), 3)), 300);
        assert_eq!(output(&meter, &call(0, Some(50), 3)), 150);
        let nothing = self::meter(Reserve::Learned);
        (0..20).for_each(|_| nothing.learn(0));
        assert_eq!(output(&nothing, &call(0, None, 1)), 1, "an answer is never nothing");
    }

    #[test]
    fn only_the_last_thousand_outputs_count() {
        let meter = meter(Reserve::Learned);
        (0..1_000).for_each(|_| meter.learn(900));
        assert_eq!(output(&meter, &call(0, None, 1)), 900);
        // Ninety in a hundred are short now, but for one.
        (0..896).for_each(|_| meter.learn(5));
        assert_eq!(output(&meter, &call(0, None, 1)), 900);
        (0..16).for_each(|_| meter.learn(5));
        assert_eq!(output(&meter, &call(0, None, 1)), 5);
    }

    #[test]
    fn outputs_are_learnt_after_twenty_of_them() {
        let meter = meter(Reserve::Auto);
        for output in 0..19 {
            meter.learn(output);
        }
        assert_eq!(output(&meter, &call(0, None, 1)), 1_000);
        meter.learn(19);
        assert_eq!(output(&meter, &call(0, None, 1)), 18);
        assert_eq!(output(&meter, &call(0, None, 2)), 36);
        // Where a cap is named, it is the bound of `auto` and a bound of `learned`.
        assert_eq!(output(&meter, &call(0, Some(10), 1)), 10);
        assert_eq!(output(&meter, &call(0, Some(500), 1)), 500);
    }
}
