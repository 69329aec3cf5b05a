//! One token budget for a whole fleet of LLM proxy pods, without a store.
//!
//! Platform teams run LLM proxies as several pods behind a load balancer, and a model
//! deployment has one limit, say 100,000 tokens a minute. `quotum` lives inside every pod:
//! the pods gossip what they have used and hand rights to one another, each admits requests
//! locally, and the fleet stays within the one limit through partitions, lost packets,
//! crashes and rolling updates.
//!
//! # Design
//!
//! *Why not a shared store?* Because then every request pays a round trip, and when the
//! store is slow or gone the limit is either closed or multiplied by the number of pods.
//! *Why not count and gossip?* Because a sum that is stale admits too much by exactly what
//! it has not heard yet, and in a partition by a whole limit for each side.
//!
//! Instead the limit of each window is split into *rights*, as in escrow (O'Neil 1986) and
//! bounded counters (Balegas et al. 2015). A replica spends only rights that it owns, so
//! nothing can go over, whatever the network does; one whose wallet is too small for a
//! request asks a peer and parks the request for a few milliseconds. A hit is one
//! compare-and-swap. `ARCHITECTURE.md` is the map, `docs/guarantees.md` has every promise
//! with the scenario that attacks it.
//!
//! # Example
//!
//! ```
//! use quotum::{Claim, Limiter, Quota};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let limiter = Limiter::builder()
//!     .deployment("gpt-4o-eastus", [Quota::tokens(100_000).per_minute(), Quota::requests(600).per_minute()])
//!     .build()?;
//! let handle = limiter.handle("gpt-4o-eastus")?;          // look it up once, keep it
//!
//! let mut permit = handle.try_acquire(Claim::tokens(1_200))?; // reserve the estimate
//! permit.start();                                         // from here the tokens may be gone
//! permit.settle(870);                                     // replace it by what was used
//! assert_eq!(handle.standings()[0].used, 870);
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! - none: the ledger, the wallet and the limiter; no async runtime. One pod.
//! - `cluster`: pods find one another and share rights over UDP.
//! - `tower`: the limiter as middleware for axum, hyper and other HTTP services.
//! - `telemetry`: what `quotum serve` and the Python package show; no part of the public API.
//! - `server` (default): the OpenAI-compatible proxy and the `quotum` command. What it adds here is what
//!   the command and the simulator are made of; no part of the public API.
//!
//! # Non-goals
//!
//! Per-user budgets and billing, a store of record, exactly-once accounting across a crash
//! (a crashed pod's unspent rights are lost until the window ends), and limits that must
//! hold against somebody who has the cluster's key.

#[cfg(feature = "server")]
#[doc(hidden)]
pub mod client;
#[cfg(feature = "cluster")]
pub mod cluster;
#[cfg(feature = "server")]
#[doc(hidden)]
pub mod config;
#[cfg(feature = "tower")]
pub mod layer;
pub mod ledger;
mod limiter;
#[cfg(feature = "server")]
#[doc(hidden)]
pub mod server;
#[cfg(feature = "telemetry")]
#[doc(hidden)]
pub mod telemetry;
mod wallet;

pub use ledger::{
    Claim, Denied, ForgetError, Margin, Mode, Obstacle, Portion, PortionError, Quota, QuotaAmount, QuotaError,
    Standing, Status, Timestamp, Unit,
};
pub use limiter::{Acquire, BuildError, Builder, Clock, Handle, Limiter, MAX_PAUSE, Permit, Policy, UnknownDeployment};

/// The README's examples are tests.
#[cfg(all(doctest, feature = "server"))]
#[doc = include_str!("../README.md")]
struct Readme;
