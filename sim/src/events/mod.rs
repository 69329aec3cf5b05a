//! The event layer: real limiters and ledgers, the real codec, simulated datagrams,
//! clocks and directory, in one queue of events.
//!
//! Knows how a plan is carried out without I/O, threads or a runtime. Must not know what
//! a plan is meant to show. The invariant it keeps: one queue ordered by virtual time and
//! arrival decides what happens next, and every choice comes from a stream of the seed.

mod boundary;
mod checks;
mod clients;
mod directory;
mod faults;
mod limits;
mod measure;
mod network;
mod pod;
mod queue;
mod replicas;
mod world;

pub(crate) use self::world::{Outcome, RunOptions, run};
