//! Deterministic simulation of whole quotum fleets.
//!
//! Scenarios draw plans from seeds; a layer carries them out; an oracle outside counts what
//! clients were admitted for. One seed decides everything, so every finding is a command
//! that repeats it.
//!
//! There are two layers, and every scenario names its own. `fleet/events` drives the
//! product's limiter, ledger and codec by hand, without I/O: thousands of seeds. `fleet/pods`
//! runs whole pods in turmoil: the cluster loop, chitchat, sealed frames and fragments, and in
//! `fleet/pods/http` their proxies too, between callers and upstreams over simulated TCP.
//! Faults, clients, network and checks are the same code (`fleet`); `scenario`, `fault`,
//! `workload`, `oracle`, `canary` and `report` know no layer.

mod agree;
mod canary;
mod catalogue;
mod central;
mod cli;
mod corpus;
mod entropy;
mod fault;
mod fleet;
mod oracle;
mod page;
mod process;
mod promise;
mod report;
mod resume;
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
