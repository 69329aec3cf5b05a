//! Deterministic simulation of whole quotum fleets.
//!
//! Scenarios draw plans from seeds; a layer carries them out with the product's own
//! limiter, ledger and codec; an oracle outside counts what clients were admitted for. One
//! seed decides everything, so every finding is a command that repeats it.
//!
//! `scenario`, `fault`, `workload`, `oracle`, `canary` and `report` know no layer; `events`
//! is the layer without I/O.

mod canary;
mod catalogue;
mod central;
mod cli;
mod corpus;
mod events;
mod fault;
mod oracle;
mod page;
mod promise;
mod report;
mod rng;
mod runner;
mod scenario;
mod trace;
mod workload;

pub use self::cli::main;

/// Virtual time in a run: microseconds since its start.
pub(crate) type Micros = u64;

#[cfg(test)]
mod tests;
