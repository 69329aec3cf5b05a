//! quotum beside the best local limiters, in one run.
//!
//! Knows how to run contenders in short interleaved batches and how to put the figures into
//! a table. Must not know anything of quotum but its public API. This package is the only
//! place where the rivals' dependencies appear.
//!
//! Machines are noisy: the contenders take turns in batches of a fifth of a
//! millisecond, each
//! batch is timed in CPU time of its own thread, and a ratio is the median over the rounds
//! of the ratios *within* a round, so that a slow moment hits both sides of it.

//!
//! Whole servers are raced as processes instead, in turns of a second, in wall-clock time:
//! `benches/proxy.rs`.

mod callers;
mod contender;
mod measure;
mod process;

pub use callers::{Ask, Begun, Callers, Failure, open_loop};
pub use contender::{Contender, contenders};
pub use measure::{Figures, Times, median, race};
pub use process::{Folder, Process, Signal, free_addrs, quotum};
