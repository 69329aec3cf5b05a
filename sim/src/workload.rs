//! What clients ask for: when, where, how much, and what becomes of it.
//!
//! Knows arrivals and costs. Must not know replicas, limiters or layers: an arrival names
//! a place among whoever serves at that moment. The invariant it keeps: the trace of
//! arrivals is a function of the seed alone, so that a central counter sees the same one.

use crate::Micros;
use crate::rng::Rng;

/// How requests spread over the replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Each replica gets the same.
    Uniform,
    /// The k-th gets a share of 1 / k^1.1.
    Zipf,
    /// One gets everything.
    One,
    /// One gets everything for some seconds, then the next.
    Bursts,
}

/// What one request costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Costs {
    /// Lognormal prompts, outputs capped at one of two values; about 2,700 tokens are
    /// reserved and 1,250 used at scale 1.
    Llm { scale: f64 },
    /// The same prompts and caps, with outputs between a quarter of the cap and all of it:
    /// reservations are close to what is used.
    Close { scale: f64 },
    /// Every request reserves and uses this.
    Flat { tokens: u64 },
}

/// A workload.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Workload {
    pub(crate) shape: Shape,
    pub(crate) costs: Costs,
    /// Requests per second.
    pub(crate) rate: f64,
    /// How long a response takes, at least and at most.
    pub(crate) hold: (Micros, Micros),
    /// Share of requests that are cancelled before they reach the upstream.
    pub(crate) cancelled: f64,
    /// Share of requests whose end nobody reports.
    pub(crate) unsettled: f64,
    /// Share of requests that use more than they reserved.
    pub(crate) above: f64,
    /// Share of requests that are as large as a replica's share and more.
    pub(crate) large: f64,
    /// The size of those.
    pub(crate) large_tokens: u64,
    /// Share of clients that come back after `retry_after`.
    pub(crate) retries: f64,
    /// Share of clients that go away while they wait.
    pub(crate) impatient: f64,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Request {
    pub(crate) number: u64,
    pub(crate) at: Micros,
    /// Which replica, as a number in `[0, 1)` over those that serve.
    pub(crate) place: f64,
    pub(crate) prompt: u64,
    /// What is reserved for the output.
    pub(crate) reserved_output: u64,
    /// What the output is.
    pub(crate) output: u64,
    pub(crate) hold: Micros,
    /// From the reservation to the upstream.
    pub(crate) transit: Micros,
    pub(crate) end: End,
    pub(crate) retries: u8,
    pub(crate) leaves_after: Option<Micros>,
}

/// What becomes of an admitted request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The response ends and is counted.
    Settled,
    /// It never reaches the upstream.
    Cancelled,
    /// It reaches the upstream and nobody learns what it used.
    Unsettled,
}

impl Request {
    pub(crate) const fn reserved(&self) -> u64 {
        self.prompt + self.reserved_output
    }

    pub(crate) const fn actual(&self) -> u64 {
        self.prompt + self.output
    }
}

impl Costs {
    /// Mean tokens reserved and used by a request.
    pub(crate) fn means(self) -> (f64, f64) {
        match self {
            Self::Flat { tokens } => (tokens as f64, tokens as f64),
            // Measured over 10^6 draws; see the test.
            Self::Llm { scale } => (2_705.0 * scale, 1_250.0 * scale),
            Self::Close { scale } => (2_705.0 * scale, 1_992.0 * scale),
        }
    }

    fn draw(self, rng: &mut Rng) -> (u64, u64, u64) {
        match self {
            Self::Flat { tokens } => (tokens, 0, 0),
            Self::Llm { scale } | Self::Close { scale } => {
                let prompt = rng.lognormal(600.0, 0.8).min(8_000.0);
                let cap = if rng.chance(0.7) { 1_000.0 } else { 4_000.0 };
                let output = match self {
                    Self::Close { .. } => cap * (0.25 + 0.75 * rng.unit()),
                    _ => rng.lognormal(350.0, 0.7).min(cap),
                };
                ((prompt * scale) as u64 + 1, (cap * scale) as u64 + 1, (output * scale) as u64)
            }
        }
    }
}

/// Draws arrivals one after the other.
#[derive(Debug)]
pub(crate) struct Arrivals {
    workload: Workload,
    rng: Rng,
    at: Micros,
    number: u64,
}

impl Arrivals {
    pub(crate) fn new(workload: Workload, seed: u64) -> Self {
        Self { workload, rng: Rng::stream(seed, "workload"), at: 0, number: 0 }
    }

    /// Returns the next arrival; `load` scales the rate of this moment.
    pub(crate) fn next(&mut self, load: f64) -> Request {
        let rng = &mut self.rng;
        let workload = &self.workload;
        let gap = rng.exponential(1e6 / (workload.rate * load));
        self.at += (gap as Micros).max(1);
        self.number += 1;
        let (mut prompt, mut reserved_output, mut output) = workload.costs.draw(rng);
        if workload.large > 0.0 && rng.chance(workload.large) {
            prompt = rng.between(1, workload.large_tokens.max(1));
            (reserved_output, output) = (workload.large_tokens / 4, workload.large_tokens / 8);
        }
        if workload.above > 0.0 && rng.chance(workload.above) {
            output = reserved_output + rng.below(reserved_output + prompt + 1);
        }
        let end = if rng.chance(workload.cancelled) {
            End::Cancelled
        } else if rng.chance(workload.unsettled) {
            End::Unsettled
        } else {
            End::Settled
        };
        Request {
            number: self.number,
            at: self.at,
            place: rng.unit(),
            prompt,
            reserved_output,
            output,
            hold: rng.between(workload.hold.0, workload.hold.1),
            transit: rng.between(500, 40_000),
            end,
            retries: if rng.chance(workload.retries) { 3 } else { 0 },
            leaves_after: rng.chance(workload.impatient).then(|| rng.between(500, 15_000)),
        }
    }
}

/// Returns which of `count` replicas a request at `place` goes to.
pub(crate) fn choose(shape: Shape, place: f64, at: Micros, count: usize, weights: &[f64]) -> usize {
    match shape {
        Shape::Uniform => ((place * count as f64) as usize).min(count - 1),
        Shape::One => 0,
        Shape::Bursts => (at / BURST) as usize % count,
        Shape::Zipf => {
            let sum: f64 = weights[..count].iter().sum();
            let mut left = place * sum;
            for (index, weight) in weights[..count].iter().enumerate() {
                left -= weight;
                if left < 0.0 {
                    return index;
                }
            }
            count - 1
        }
    }
}

/// Returns the weights of Zipf's law with exponent 1.1.
pub(crate) fn zipf_weights(count: usize) -> Vec<f64> {
    (1..=count).map(|rank| crate::rng::exp(-1.1 * crate::rng::ln(rank as f64))).collect()
}

/// How long one replica gets everything in alternating bursts.
const BURST: Micros = 3_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stated_means_are_those_of_the_draws() {
        let mut rng = Rng::stream(7, "test");
        for costs in [Costs::Llm { scale: 1.0 }, Costs::Close { scale: 1.0 }] {
            let (mut reserved, mut used) = (0, 0);
            for _ in 0..200_000 {
                let (prompt, cap, output) = costs.draw(&mut rng);
                reserved += prompt + cap;
                used += prompt + output;
            }
            let (mean_reserved, mean_used) = costs.means();
            let (reserved, used) = (reserved as f64 / 2e5, used as f64 / 2e5);
            assert!((reserved / mean_reserved - 1.0).abs() < 0.02, "{costs:?} reserves {reserved}");
            assert!((used / mean_used - 1.0).abs() < 0.02, "{costs:?} uses {used}");
        }
    }

    #[test]
    fn zipf_prefers_the_first() {
        let weights = zipf_weights(10);
        assert_eq!(choose(Shape::Zipf, 0.1, 0, 10, &weights), 0);
        assert_eq!(choose(Shape::Zipf, 0.999, 0, 10, &weights), 9);
    }
}
