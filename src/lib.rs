//! One token budget for a whole fleet of LLM proxy pods, without a store.

pub mod ledger;
mod limiter;
mod wallet;

#[cfg(feature = "cluster")]
pub mod cluster;

pub use ledger::{Claim, Denied, Mode, Obstacle, Quota, Standing, Status, Timestamp, Unit};
pub use limiter::{Acquire, BuildError, Builder, Clock, Handle, Limiter, Permit, Policy, UnknownDeployment};
