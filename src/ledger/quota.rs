//! What is limited: units, quotas, and the names of both.
//!
//! Knows the words of the domain and parses them once: no zero quota, no unknown
//! unit can be built. Must not know what is asked of a quota, or how that is decided.

use std::fmt;
use std::num::NonZeroU64;
use std::time::Duration;

use super::hash::StableHash;
use super::kind::{Slices, WindowKind};
use super::window::{Grid, WindowLength};
use super::zone::Zone;

/// What a quota counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Unit {
    /// Prompt and output tokens together.
    Tokens = 0,
    /// Requests.
    Requests = 1,
    /// Prompt tokens.
    InputTokens = 2,
    /// Output tokens.
    OutputTokens = 3,
}

impl Unit {
    /// Every unit, in the order of their names on the wire.
    pub const ALL: [Self; 4] = [Self::Tokens, Self::Requests, Self::InputTokens, Self::OutputTokens];

    /// Returns the name used in config, metrics and headers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Requests => "requests",
            Self::InputTokens => "input_tokens",
            Self::OutputTokens => "output_tokens",
        }
    }

    /// Returns the unit with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|unit| unit.name() == name)
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An amount of a unit per window.
///
/// A quota of zero cannot be built. The quota *is* its version: two replicas that
/// configure another amount for one limit hold two different [`Key`]s and never spend
/// one another's rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quota {
    unit: Unit,
    amount: NonZeroU64,
    window: WindowLength,
    kind: WindowKind,
    at_once: bool,
}

impl Quota {
    /// The largest amount: 2^41, about 2.2 trillion, half of what a wallet can hold.
    pub const MAX_AMOUNT: u64 = 1 << 41;

    /// Starts a quota of tokens, prompt and output together.
    ///
    /// ```
    /// use quotum::Quota;
    /// let quota = Quota::tokens(100_000).per_minute();
    /// assert_eq!(quota.amount(), 100_000);
    /// ```
    pub const fn tokens(amount: u64) -> QuotaAmount {
        QuotaAmount { unit: Unit::Tokens, amount }
    }

    /// Starts a quota of requests.
    pub const fn requests(amount: u64) -> QuotaAmount {
        QuotaAmount { unit: Unit::Requests, amount }
    }

    /// Starts a quota of prompt tokens.
    pub const fn input_tokens(amount: u64) -> QuotaAmount {
        QuotaAmount { unit: Unit::InputTokens, amount }
    }

    /// Starts a quota of output tokens.
    pub const fn output_tokens(amount: u64) -> QuotaAmount {
        QuotaAmount { unit: Unit::OutputTokens, amount }
    }

    /// Returns the quota that config or the wire describes.
    ///
    /// # Errors
    /// Says which of the parts is out of range; nothing was built.
    pub fn new(unit: Unit, amount: u64, window: Duration) -> Result<Self, QuotaError> {
        let amount = NonZeroU64::new(amount).ok_or(QuotaError::ZeroAmount)?;
        if amount.get() > Self::MAX_AMOUNT {
            return Err(QuotaError::AmountTooLarge(amount.get()));
        }
        let window = WindowLength::new(window).ok_or(QuotaError::Window(window))?;
        Ok(Self { unit, amount, window, kind: WindowKind::Fixed, at_once: false })
    }

    /// Returns this quota with windows of another kind.
    ///
    /// # Errors
    /// Says why the kind does not fit amount and window; nothing was built.
    pub fn of_kind(self, kind: WindowKind) -> Result<Self, QuotaError> {
        let quota = Self { kind, ..self };
        Slices::of(&quota).map(|_| quota)
    }

    /// Returns this quota as a limit on every interval as long as the window
    /// ([`WindowKind::SLIDING`]).
    ///
    /// # Panics
    /// If the amount is under 5 or the window not a multiple of 4 ms: a mistake of the
    /// program. Input from outside goes through [`Quota::of_kind`].
    #[must_use]
    pub fn sliding(self) -> Self {
        self.of_kind(WindowKind::SLIDING).expect("a quota written in code fits its kind")
    }

    /// Returns this quota as a bucket that refills at amount / window and holds `burst`.
    ///
    /// # Panics
    /// If the burst is under 2.25 times what comes in within 250 ms or between two units,
    /// or over [`Quota::MAX_AMOUNT`]: a mistake of the program. Input from outside goes
    /// through [`Quota::of_kind`].
    #[must_use]
    pub fn bucket(self, burst: u64) -> Self {
        let burst = NonZeroU64::new(burst).expect("a burst written in code is not zero");
        self.of_kind(WindowKind::Bucket { burst }).expect("a quota written in code fits its kind")
    }

    /// Returns this quota without vesting: all of a long window can be spent at its start,
    /// and a crash there loses a replica's share for the rest of it.
    ///
    /// Windows of 20 minutes and more otherwise vest: a quarter at once, the rest in equal
    /// steps of about ten minutes. It changes nothing for shorter and other kinds of windows.
    #[must_use]
    pub const fn at_once(self) -> Self {
        Self { at_once: true, ..self }
    }

    /// Says whether a long window's rights come all at once.
    pub const fn is_at_once(self) -> bool {
        self.at_once
    }

    /// Returns how this quota is kept.
    pub(crate) fn slices(self) -> Slices {
        Slices::of(&self).expect("checked when the quota was built")
    }

    /// Returns the grid on which use is counted: a sliding window's slices, a bucket's, or
    /// the windows themselves.
    pub fn grid(self) -> Grid {
        self.slices().grid
    }

    /// Returns the most that can ever be reserved in one slice of [`Quota::grid`], over all
    /// replicas, and so the largest request that can be admitted.
    pub fn largest_claim(self) -> u64 {
        self.slices().most()
    }

    /// Returns how many slices of [`Quota::grid`] can have a part in one window: more than one
    /// only of a sliding one.
    pub(super) const fn slices_of_a_window(self) -> u64 {
        match self.kind {
            WindowKind::Sliding { parts } => parts as u64 + 1,
            _ => 1,
        }
    }

    /// Returns how long before the start of a slice of [`Quota::grid`] its shares are frozen:
    /// a quarter of its length, at most 2 s. The largest edge, too.
    pub fn lead(self) -> Duration {
        super::window::lead(self.slices().length())
    }

    /// Returns for how many slices of [`Quota::grid`] a right can be spent: one, and more in
    /// a bucket.
    pub fn lifetime(self) -> u64 {
        self.slices().lifetime
    }

    /// Returns what is counted.
    pub const fn unit(self) -> Unit {
        self.unit
    }

    /// Returns the limit of one window, in units.
    pub const fn amount(self) -> u64 {
        self.amount.get()
    }

    /// Returns the length of a window.
    pub const fn window(self) -> WindowLength {
        self.window
    }

    /// Returns how windows follow one another.
    pub const fn kind(self) -> WindowKind {
        self.kind
    }

    /// Returns the quota with an amount of one: what it shares with every other amount.
    pub(super) const fn of_one(self) -> Self {
        Self { amount: NonZeroU64::MIN, ..self }
    }

    /// Returns what orders quotas of one unit by their windows.
    pub(super) const fn by_length(self) -> (Unit, NonZeroU64, WindowKind, NonZeroU64) {
        (self.unit, self.window.ms(), self.kind, self.amount)
    }

    /// Returns the hash of all parts: the version as logs and /status show it.
    pub fn version(self) -> u64 {
        let mut hash = StableHash::new();
        hash.write_u64(self.unit as u64);
        hash.write_u64(self.amount.get());
        hash.write_u64(self.window.ms().get());
        match self.kind {
            WindowKind::Fixed => hash.write_u64(0),
            WindowKind::Sliding { parts } => hash.write(&[1, parts]),
            WindowKind::Bucket { burst } => {
                hash.write_u64(2);
                hash.write_u64(burst.get());
            }
            WindowKind::Day { zone } => {
                hash.write_u64(3);
                hash.write(&zone.to_bytes());
            }
        }
        hash.write(&[u8::from(self.at_once)]);
        hash.finish()
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { unit, amount, window, .. } = self;
        match self.kind {
            WindowKind::Fixed => write!(f, "{amount} {unit} per {window:?}"),
            WindowKind::Sliding { .. } => write!(f, "{amount} {unit} in any {window:?}"),
            WindowKind::Bucket { burst } => write!(f, "{amount} {unit} per {window:?} with a burst of {burst}"),
            WindowKind::Day { zone } => write!(f, "{amount} {unit} per day of {zone}"),
        }
    }
}

/// A quota that still wants its window.
#[derive(Clone, Copy, Debug)]
#[must_use = "a quota needs a window: call per_minute() or per()"]
pub struct QuotaAmount {
    unit: Unit,
    amount: u64,
}

impl QuotaAmount {
    /// Returns the quota per second.
    ///
    /// # Panics
    /// As [`QuotaAmount::per`].
    pub fn per_second(self) -> Quota {
        self.per(WindowLength::SECOND.duration())
    }

    /// Returns the quota per minute.
    ///
    /// # Panics
    /// As [`QuotaAmount::per`].
    pub fn per_minute(self) -> Quota {
        self.per(WindowLength::MINUTE.duration())
    }

    /// Returns the quota per local day of this zone.
    ///
    /// # Panics
    /// As [`QuotaAmount::per`].
    pub fn per_day(self, zone: Zone) -> Quota {
        let quota = self.per(WindowLength::DAY.duration());
        quota.of_kind(WindowKind::Day { zone }).expect("the window is a day")
    }

    /// Returns the quota per window of this length.
    ///
    /// # Panics
    /// If the amount is zero or over [`Quota::MAX_AMOUNT`], or the window is under
    /// 1 ms or over 366 days: a mistake of the program. Input from outside goes
    /// through [`Quota::new`].
    pub fn per(self, window: Duration) -> Quota {
        Quota::new(self.unit, self.amount, window).expect("a quota written in code is in range")
    }
}

/// Why a quota could not be built. Whoever wrote the quota can mend it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuotaError {
    /// The amount is zero: it would refuse everything.
    #[error("the amount is 0; a limit must let something through")]
    ZeroAmount,
    /// The amount does not fit a wallet.
    #[error("the amount {0} is over the largest, {max}", max = Quota::MAX_AMOUNT)]
    AmountTooLarge(u64),
    /// The window has no usable length.
    #[error("the window {0:?} is not a whole number of milliseconds between 1 ms and 366 days")]
    Window(Duration),
    /// A day has 24 hours, apart from those on which clocks change.
    #[error("a window of kind day is 24h long, not {0:?}; leave it out, or use another kind")]
    Day(Duration),
    /// The window cannot be cut so.
    #[error("{0} parts do not divide the window: a sliding window has 1 to {max} parts of whole milliseconds", max = WindowKind::MAX_PARTS)]
    Parts(u8),
    /// Nothing would be left for one part.
    #[error(
        "the amount is too small for a sliding window of {0} parts: each part may let through amount / (parts + 1), and that would be 0"
    )]
    TooFewForParts(u8),
    /// The bucket could not hold what comes in while it is looked at.
    #[error("the burst {burst} is outside of what works for this rate: {least} to {max}", max = Quota::MAX_AMOUNT)]
    Burst {
        /// What was asked for.
        burst: u64,
        /// The least that works.
        least: u64,
    },
}

/// The name of a limit on the wire: a stable hash of the deployment's id or, where
/// several deployments share one provider quota, of their `limit_id`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LimitId(u64);

impl LimitId {
    /// Returns the id of the limit with this name.
    pub fn of(name: &str) -> Self {
        let mut hash = StableHash::new();
        hash.write(name.as_bytes());
        Self(hash.finish())
    }

    /// Returns the id with this hash, as the wire carries it.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Returns the hash.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for LimitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "limit-{:016x}", self.0)
    }
}

/// One quota of one limit: what rights are rights *to*.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Which limit.
    pub limit: LimitId,
    /// Which quota of it, and in which version.
    pub quota: Quota,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_of_zero_cannot_be_built() {
        assert_eq!(Quota::new(Unit::Tokens, 0, Duration::from_secs(60)), Err(QuotaError::ZeroAmount));
    }

    #[test]
    fn another_amount_is_another_version() {
        let minute = Quota::tokens(100).per_minute();
        assert_ne!(minute.version(), Quota::tokens(101).per_minute().version());
        assert_ne!(minute.version(), Quota::requests(100).per_minute().version());
    }
}
