//! Interleaved batches, CPU time, medians.
//!
//! Knows how to let contenders take turns and what the figures mean. Must not know what a
//! contender does. The invariant it keeps: all contenders of one race have equally many and
//! equally long turns, in an order that shifts from round to round.

use std::hint;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::contender::Contender;

/// How long a race is.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// How often every contender takes its turn.
    pub rounds: usize,
    /// About how long one turn takes. Long against the clock's 300 ns, short against the
    /// scheduler's time slice.
    pub batch: Duration,
}

/// Nanoseconds of CPU per operation, one figure a round; none for a round in which the
/// threads did not really run side by side.
#[derive(Clone, Debug)]
pub struct Figures(Vec<Option<f64>>);

impl Figures {
    /// Returns how many rounds count.
    pub fn rounds(&self) -> usize {
        self.0.iter().flatten().count()
    }

    /// Returns the fastest round: what the code costs when nothing disturbs it.
    pub fn min(&self) -> Option<f64> {
        self.0.iter().copied().flatten().min_by(f64::total_cmp)
    }

    /// Returns the middle round.
    pub fn median(&self) -> Option<f64> {
        median(self.0.iter().copied().flatten().collect())
    }

    /// Returns the median of the ratios to `other` within each round.
    pub fn ratio_to(&self, other: &Self) -> Option<f64> {
        let pairs = self.0.iter().zip(&other.0);
        median(pairs.filter_map(|(own, theirs)| Some((*own)? / (*theirs)?)).collect())
    }
}

/// Lets the contenders take turns on that many threads at once, and returns the figures of
/// each, in their order. The first tenth of the rounds warms up and does not count.
pub fn race(contenders: &[Contender], threads: usize, times: Times) -> Vec<Figures> {
    let meeting = Meeting::new(threads);
    let warm_up = times.rounds / 10;
    let batches: Vec<usize> = contenders.iter().map(|contender| batch_of(contender, times.batch)).collect();
    let worker = |thread: usize| {
        let mut own = vec![Vec::with_capacity(times.rounds); contenders.len()];
        for round in 0..warm_up + times.rounds {
            for turn in 0..contenders.len() {
                let place = (round + turn) % contenders.len();
                meeting.wait();
                let lap = Lap::of(|| contenders[place].run(thread, batches[place]));
                if round >= warm_up {
                    own[place].push(lap);
                }
            }
        }
        own
    };
    let all: Vec<Vec<Vec<Lap>>> = thread::scope(|scope| {
        let worker = &worker;
        let workers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || worker(thread))).collect();
        workers.into_iter().map(|worker| worker.join().expect("a contender does not panic")).collect()
    });
    let figure = |place: usize, round: usize| {
        let laps: Vec<Lap> = all.iter().map(|own| own[place][round]).collect();
        let mean = laps.iter().map(|lap| lap.cpu_ns as f64).sum::<f64>() / threads as f64;
        side_by_side(&laps).then_some(mean / batches[place] as f64)
    };
    (0..contenders.len()).map(|place| Figures((0..times.rounds).map(|round| figure(place, round)).collect())).collect()
}

/// How many operations take about that long.
fn batch_of(contender: &Contender<'_>, long: Duration) -> usize {
    const TRIAL: usize = 1_000;
    contender.run(0, TRIAL);
    let trial = Lap::of(|| contender.run(0, TRIAL));
    (long.as_nanos() as usize * TRIAL / trial.cpu_ns.max(1) as usize).max(1)
}

/// One thread's batch: from when to when, and how much CPU.
#[derive(Clone, Copy, Debug)]
struct Lap {
    start_ns: u64,
    end_ns: u64,
    cpu_ns: u64,
}

impl Lap {
    fn of(batch: impl FnOnce()) -> Self {
        let start_ns = clock_ns(ClockId::Monotonic);
        let cpu_ns = clock_ns(ClockId::ThreadCPUTime);
        batch();
        let cpu_ns = clock_ns(ClockId::ThreadCPUTime) - cpu_ns;
        Self { start_ns, end_ns: clock_ns(ClockId::Monotonic), cpu_ns }
    }
}

/// Says whether all threads ran at once for at least nine tenths of the time that any of
/// them ran: on a busy machine they often take turns, and then nothing contends.
fn side_by_side(laps: &[Lap]) -> bool {
    let first = laps.iter().map(|lap| lap.start_ns).min().unwrap_or_default();
    let last = laps.iter().map(|lap| lap.end_ns).max().unwrap_or_default();
    let all_ran = |lap: &Lap| lap.cpu_ns * 10 >= (last - first) * 9;
    laps.len() == 1 || laps.iter().all(all_ran)
}

/// Returns the middle value; the upper one of an even number.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn clock_ns(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A barrier that spins: waking a sleeper takes longer than a batch should.
struct Meeting {
    threads: usize,
    arrived: AtomicUsize,
}

impl Meeting {
    const fn new(threads: usize) -> Self {
        Self { threads, arrived: AtomicUsize::new(0) }
    }

    fn wait(&self) {
        let place = self.arrived.fetch_add(1, Ordering::SeqCst);
        let full = (place / self.threads + 1) * self.threads;
        let mut spins = 0u32;
        while self.arrived.load(Ordering::SeqCst) < full {
            spins += 1;
            if spins.is_multiple_of(1_000) {
                // With more threads than cores the other one may want this core.
                thread::yield_now();
            }
            hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_taken_within_the_rounds_that_count() {
        // The second round was ten times slower for both, the third counts for one only.
        let own = Figures(vec![Some(2.0), Some(20.0), Some(9.0), Some(2.0)]);
        let theirs = Figures(vec![Some(4.0), Some(40.0), None, Some(4.0)]);
        assert_eq!(own.ratio_to(&theirs), Some(0.5));
        assert_eq!(own.min(), Some(2.0));
        assert_eq!((theirs.median(), theirs.rounds()), (Some(4.0), 3));
        assert_eq!(Figures(vec![None]).median(), None);
    }

    #[test]
    fn threads_that_take_turns_do_not_count() {
        let lap = |start_ns, end_ns, cpu_ns| Lap { start_ns, end_ns, cpu_ns };
        assert!(side_by_side(&[lap(0, 100, 98), lap(2, 100, 96)]));
        assert!(!side_by_side(&[lap(0, 100, 98), lap(100, 200, 98)]));
        assert!(!side_by_side(&[lap(0, 100, 98), lap(0, 100, 40)]));
    }

    #[test]
    fn everybody_has_equally_many_turns() {
        let turns: [AtomicUsize; 2] = Default::default();
        let count = |place: usize| {
            let turns = &turns[place];
            Contender::new("x", None, move |_, _| {
                turns.fetch_add(1, Ordering::Relaxed);
            })
        };
        let figures = race(&[count(0), count(1)], 2, Times { rounds: 10, batch: Duration::from_micros(1) });
        assert_eq!(figures.len(), 2);
        // Two to measure a batch; then eleven rounds, one of them warm-up, on two threads.
        assert_eq!(turns.map(AtomicUsize::into_inner), [2 + 22, 2 + 22]);
    }
}
