//! What is asked for and what is answered: claims, where a quota stands, refusals.
//!
//! Knows what a caller reads. Must not know how a decision is reached. The invariant it
//! keeps: a refusal says which quota, how it stands, and when to come back, if ever.

use std::fmt;
use std::time::Duration;

use super::quota::{Quota, Unit};
use super::window::Timestamp;

/// What one request asks for, in every unit at once.
///
/// A quota takes the part of its own unit. The request itself is counted: `requests`
/// is 1 unless set otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    amounts: [u64; 4],
}

impl Claim {
    /// Returns a claim of one request and this many tokens.
    pub const fn tokens(tokens: u64) -> Self {
        Self { amounts: [tokens, 1, 0, 0] }
    }

    /// Returns a claim of one request with these prompt and output tokens; `tokens`
    /// is their sum.
    pub const fn prompt_and_output(prompt: u64, output: u64) -> Self {
        Self { amounts: [prompt.saturating_add(output), 1, prompt, output] }
    }

    /// Returns the claim with this amount of one unit.
    pub const fn with(mut self, unit: Unit, amount: u64) -> Self {
        self.amounts[unit as usize] = amount;
        self
    }

    /// A claim of nothing at all: what a refunded request has used.
    pub(crate) const NOTHING: Self = Self { amounts: [0; 4] };

    /// Returns the amount of one unit.
    #[inline]
    pub const fn amount(&self, unit: Unit) -> u64 {
        // Not `self.amounts[unit as usize]`: an index that is not constant would keep every
        // claim in memory, and its copies would wait for one another's stores.
        match unit {
            Unit::Tokens => self.amounts[0],
            Unit::Requests => self.amounts[1],
            Unit::InputTokens => self.amounts[2],
            Unit::OutputTokens => self.amounts[3],
        }
    }
}

/// Where one quota stands in one window, as this replica knows it.
///
/// `limit = used + margin_reachable + margin_unreachable + spendable`, unless debt or
/// news under way make the known use larger than the limit's rest; the margin is what
/// cannot be spent *here now*: what peers hold, what is under way, what is out of reach
/// until the window ends. In [`elastic`](super::Mode::Elastic) the unspent allowance is in
/// `spendable`, on top of the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The quota, with its limit.
    pub quota: Quota,
    /// Start of the window spoken of; of a sliding window or a bucket, of its slice.
    pub window_start: Timestamp,
    /// The first instant after it.
    pub window_end: Timestamp,
    /// What that window lets through, over all replicas: the quota's amount; a slice's part
    /// of it in a sliding window; what can be full at once in a bucket.
    pub limit: u64,
    /// What of the limit has been dealt by now, over all replicas: all of it, but in a long
    /// window that vests ([`Quota::at_once`]).
    pub vested: u64,
    /// Reserved and not refunded in this window, over all replicas, as known here.
    pub used: u64,
    /// Held by peers that answer: rights requests can fetch it.
    pub margin_reachable: u64,
    /// Held by replicas that do not answer, or under way, or held by nobody until the
    /// next window; in [`sum`](super::Mode::Sum) the margin itself.
    pub margin_unreachable: u64,
    /// What this replica may spend without asking anybody. Of a window that vests and that nobody
    /// has touched here, what its first instalment brings.
    pub spendable: u64,
    /// What was charged here beyond what this replica held, by settlements or out of an
    /// allowance, and peers' rights have not covered yet.
    pub debt: u64,
    /// How long until the window ends.
    pub resets_in: Duration,
}

impl Standing {
    /// Returns what the fleet can still spend in this window as far as this replica can
    /// know: `limit - used`.
    pub const fn remaining(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }

    /// Returns how a refusal says that the limit comes in instalments; nothing where it does not.
    pub(crate) fn vesting(&self) -> String {
        if self.vested >= self.limit {
            return String::new();
        }
        format!("; of the limit {} have vested so far, the rest comes in instalments", self.vested)
    }
}

/// A refusal: a decision, not a failure. Nothing was charged.
///
/// No larger than a permit: a result of both would otherwise be moved in unaligned pieces, and a
/// decision take 16 ns instead of 11.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Denied {
    /// The window's budget is spent, or too small for this request: later.
    #[error("{by} has too little left for this request: {used} used, {spendable} spendable here{vesting}; try again in {retry_after:?}",
        by = standing.quota, used = standing.used, spendable = standing.spendable, vesting = standing.vesting())]
    Exhausted {
        /// The quota that refused, and where it stood.
        standing: Box<Standing>,
        /// The earliest moment at which the request can be expected to fit, with a
        /// spread so that refused callers do not return together.
        retry_after: Duration,
    },
    /// The request is larger than the whole limit, in [`sum`](super::Mode::Sum) less a fixed
    /// margin: never.
    #[error("{requested} {unit} asked for is more than {by} ever lets through ({limit} at once, less a fixed margin): it can never be admitted",
        by = standing.quota, unit = standing.quota.unit(), limit = standing.limit)]
    TooLarge {
        /// The quota that refused, and where it stood.
        standing: Box<Standing>,
        /// What was asked for.
        requested: u64,
    },
    /// The fleet has the budget, but this replica can neither spend nor fetch it now.
    #[error("{by} has budget left that this replica cannot reach ({why}); try again in {retry_after:?}", by = standing.quota)]
    Unreachable {
        /// The quota that refused, and where it stood.
        standing: Box<Standing>,
        /// When to try again.
        retry_after: Duration,
        /// What is in the way.
        why: Obstacle,
    },
}

impl Denied {
    /// Returns the quota that refused.
    pub fn by(&self) -> Quota {
        self.standing().quota
    }

    /// Returns where that quota stood.
    pub fn standing(&self) -> &Standing {
        match self {
            Self::Exhausted { standing, .. } | Self::TooLarge { standing, .. } | Self::Unreachable { standing, .. } => {
                standing
            }
        }
    }

    /// Returns when to try again; `None` means never.
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Exhausted { retry_after, .. } | Self::Unreachable { retry_after, .. } => Some(*retry_after),
            Self::TooLarge { .. } => None,
        }
    }

    /// Returns the refusal's name in `quotum_refused_total{reason}`.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Exhausted { .. } => "exhausted",
            Self::TooLarge { .. } => "too_large",
            Self::Unreachable { .. } => "unreachable",
        }
    }
}

/// What keeps a replica from budget that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// It has not joined yet: the roster names whom it waits for.
    NotJoined,
    /// It is leaving and admits nothing more.
    Leaving,
    /// The replicas that hold the rest do not answer.
    PeersSilent,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotJoined => "it has not joined the fleet yet",
            Self::Leaving => "it is shutting down",
            Self::PeersSilent => "the replicas that hold the rest do not answer",
        })
    }
}
