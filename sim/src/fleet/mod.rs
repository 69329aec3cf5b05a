//! One fleet in virtual time: replicas, clients, faults, clocks, directory and network.
//!
//! Knows how a plan is carried out, on two layers: `events` drives the product's ledgers by
//! hand, `pods` runs whole production pods. Must not know what a plan is meant to show. The
//! invariant it keeps: every choice comes from a stream of the seed, and clients, faults,
//! network and checks are the same on both layers.

mod checks;
mod clients;
mod directory;
mod events;
mod faults;
mod limits;
mod lives;
mod measure;
mod network;
mod pods;
mod queue;
mod replica;
mod world;

pub(crate) use self::world::{Outcome, RunOptions, run};

/// The fleet's key and name.
const KEY: [u8; 32] = [7; 32];
const CLUSTER: &str = "sim";
