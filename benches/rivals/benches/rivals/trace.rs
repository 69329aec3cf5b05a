//! The arrivals that every rival gets, and the counter that judges them.
//!
//! Knows when which pod is asked for how much, and what was admitted. Must not know who
//! decides. The invariant it keeps: the same seed gives the same arrivals.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Tokens of a window.
pub(crate) const LIMIT: u64 = 300_000;

/// What is asked for, in limits.
const OVERLOAD: f64 = 1.5;

/// A request reserves its prompt and the cap, and uses its prompt and some of it.
const CAP: u64 = 300;
const MEAN_USED: f64 = 250.0;

/// From admission to settlement.
const HELD: Duration = Duration::from_millis(200);

/// The parts of the load that go to each pod, before the last one joins and afterwards.
pub(crate) const PODS: usize = 4;
const BEFORE: [f64; PODS] = [0.6, 0.3, 0.1, 0.0];
const AFTER: [f64; PODS] = [0.4, 0.3, 0.1, 0.2];

/// A burst of half a second, and then a second and a half with little.
const CYCLE: f64 = 2.0;
const BURST: f64 = 0.5;
const IN_BURST: f64 = 2.5;
const BETWEEN: f64 = 0.5;

/// One request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) at: Duration,
    pub(crate) pod: usize,
    pub(crate) reserved: u64,
    pub(crate) used: u64,
    pub(crate) held: Duration,
}

/// How long a run is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) window: Duration,
    pub(crate) windows: u32,
}

impl Extent {
    /// When that many windows have passed.
    pub(crate) fn at(self, windows: f64) -> Duration {
        self.window.mul_f64(windows)
    }

    /// When the last pod joins.
    pub(crate) fn joins(self) -> Duration {
        self.at(f64::from(self.windows) * 0.5 + 0.25)
    }
}

/// Draws the arrivals.
pub(crate) fn arrivals(extent: Extent, seed: u64) -> Vec<Arrival> {
    let mut random = Random(seed);
    let mean = OVERLOAD * LIMIT as f64 / extent.window.as_secs_f64() / MEAN_USED;
    let end = extent.at(f64::from(extent.windows)).as_secs_f64();
    let (mut at, mut arrivals) = (0.0, Vec::new());
    loop {
        let rate = mean * if at % CYCLE < BURST { IN_BURST } else { BETWEEN };
        at += random.exponential() / rate;
        if at >= end {
            return arrivals;
        }
        let parts = if at < extent.joins().as_secs_f64() { BEFORE } else { AFTER };
        let mut lot = random.uniform();
        let pod = parts.iter().position(|part| {
            lot -= part;
            lot <= 0.0
        });
        let prompt = 20 + (random.exponential() * 80.7).min(380.0) as u64;
        arrivals.push(Arrival {
            at: Duration::from_secs_f64(at),
            pod: pod.unwrap_or(0),
            reserved: prompt + CAP,
            used: prompt + 50 + random.next() % 201,
            held: HELD,
        });
    }
}

/// Counts what was used of what was admitted, by the window of its admission.
#[derive(Debug)]
pub(crate) struct Counter {
    windows: Vec<AtomicU64>,
}

impl Counter {
    pub(crate) fn new(extent: Extent) -> Self {
        Self { windows: (0..=extent.windows).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Counts a request that was admitted so long after the start.
    pub(crate) fn admitted(&self, extent: Extent, after: Duration, used: u64) {
        let window = (after.as_nanos() / extent.window.as_nanos()) as usize;
        self.windows[window.min(self.windows.len() - 1)].fetch_add(used, Ordering::Relaxed);
    }

    /// Returns what was used in each window of the run, in limits.
    pub(crate) fn used(&self) -> Vec<f64> {
        let windows = &self.windows[..self.windows.len() - 1];
        windows.iter().map(|used| used.load(Ordering::Relaxed) as f64 / LIMIT as f64).collect()
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// Above zero, and at most one.
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn exponential(&mut self) -> f64 {
        -self.uniform().ln()
    }
}
