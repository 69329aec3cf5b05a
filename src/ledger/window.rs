//! Instants and windows: the whole of quotum's notion of time.
//!
//! Knows how an instant falls into a window. Must not know what time it is: every
//! instant is an argument. The invariant it keeps: a window is named by its nominal
//! start, and that name is part of the identity of everything counted in it, so a
//! roll is a fact about time and there is no code that resets anything.

use std::fmt;
use std::num::NonZeroU64;
use std::time::Duration;

/// How far every clock may be from true time: 2 s. The only place where clocks
/// matter for safety is the proof that a replica is gone (docs/algorithm.md section 1).
pub const EPSILON: Duration = Duration::from_secs(2);

/// The longest [`lead`](WindowLength::lead) of any window: 2 s on every replica.
pub const MAX_LEAD: Duration = Duration::from_secs(2);

/// An instant as milliseconds since the Unix epoch.
///
/// One millisecond is the *tick* of the roster rules: the smallest step by which one
/// instant can come after another.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The Unix epoch.
    pub const ZERO: Self = Self(0);
    /// An instant after every other: "never".
    pub const NEVER: Self = Self(u64::MAX);

    /// Returns the instant `ms` milliseconds after the Unix epoch.
    pub const fn from_unix_ms(ms: u64) -> Self {
        Self(ms)
    }

    /// Returns milliseconds since the Unix epoch.
    pub const fn unix_ms(self) -> u64 {
        self.0
    }

    /// Returns the instant `by` later, at most [`Timestamp::NEVER`].
    pub const fn plus(self, by: Duration) -> Self {
        Self(self.0.saturating_add(millis(by)))
    }

    /// Returns the instant `by` earlier, at least [`Timestamp::ZERO`].
    pub const fn minus(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(millis(by)))
    }

    /// Returns the next instant: one tick, 1 ms, later.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// Returns how long after `earlier` this instant is, zero if it is not after it.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NEVER => f.write_str("never"),
            Self(ms) => write!(f, "{ms}ms"),
        }
    }
}

/// The length of a window: whole milliseconds, at least one, at most 366 days.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WindowLength(NonZeroU64);

impl WindowLength {
    /// The longest window: 366 days.
    pub const MAX: Duration = Duration::from_secs(366 * 86_400);

    /// One second.
    pub const SECOND: Self = Self(NonZeroU64::new(1_000).unwrap());
    /// One minute.
    pub const MINUTE: Self = Self(NonZeroU64::new(60_000).unwrap());
    /// One hour.
    pub const HOUR: Self = Self(NonZeroU64::new(3_600_000).unwrap());

    /// Returns the length, or `None` if it is under 1 ms, over 366 days or not a
    /// whole number of milliseconds.
    pub const fn new(length: Duration) -> Option<Self> {
        if length.as_nanos() > Self::MAX.as_nanos() || !length.as_nanos().is_multiple_of(1_000_000) {
            return None;
        }
        match NonZeroU64::new(millis(length)) {
            Some(ms) => Some(Self(ms)),
            None => None,
        }
    }

    /// Returns the length as a duration.
    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.0.get())
    }

    /// Returns the length in milliseconds.
    pub const fn ms(self) -> NonZeroU64 {
        self.0
    }

    /// Returns how long before its start a window's shares are frozen.
    ///
    /// `min(W / 4, 2 s)`: a function of the window alone, so that every replica
    /// bounds every other one's lead without being told.
    pub fn lead(self) -> Duration {
        Duration::from_millis(self.0.get() / 4).min(MAX_LEAD)
    }

    /// Returns the window that `at` falls into.
    pub const fn window_at(self, at: Timestamp) -> Window {
        Window { number: at.0 / self.0.get(), length: self }
    }

    /// Returns the window whose nominal start is `id`, or `None` if no window of this
    /// length starts there.
    pub const fn window_of(self, id: WindowId) -> Option<Window> {
        if id.0.0.is_multiple_of(self.0.get()) { Some(self.window_at(id.0)) } else { None }
    }
}

impl fmt::Debug for WindowLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.duration())
    }
}

/// The name of a window: its nominal start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WindowId(Timestamp);

impl WindowId {
    /// Returns the id of the window that starts at `start`.
    pub const fn starting(start: Timestamp) -> Self {
        Self(start)
    }

    /// Returns the nominal start.
    pub const fn start(self) -> Timestamp {
        self.0
    }
}

impl fmt::Debug for WindowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{:?}", self.0)
    }
}

/// One window: the half-open interval `[start, end)`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Window {
    number: u64,
    length: WindowLength,
}

impl Window {
    /// Returns how many windows of this length start before this one since the epoch.
    pub const fn number(self) -> u64 {
        self.number
    }

    /// Returns the id: the nominal start.
    pub const fn id(self) -> WindowId {
        WindowId(self.start())
    }

    /// Returns the first instant.
    pub const fn start(self) -> Timestamp {
        Timestamp(self.number.saturating_mul(self.length.0.get()))
    }

    /// Returns the first instant after the window.
    pub const fn end(self) -> Timestamp {
        Timestamp(self.start().0.saturating_add(self.length.0.get()))
    }

    /// Returns the window after this one.
    pub const fn next(self) -> Self {
        Self { number: self.number.saturating_add(1), length: self.length }
    }

    /// Returns the first instant at which this window's shares may be frozen.
    pub fn opens(self) -> Timestamp {
        self.start().minus(self.length.lead())
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?}, {:?})", self.start(), self.end())
    }
}

const fn millis(duration: Duration) -> u64 {
    let ms = duration.as_millis();
    if ms > u64::MAX as u128 { u64::MAX } else { ms as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_holds_its_start_and_not_its_end() {
        let minute = WindowLength::MINUTE;
        let window = minute.window_at(Timestamp::from_unix_ms(61_000));
        assert_eq!(window.start().unix_ms(), 60_000);
        assert_eq!(minute.window_at(window.end()), window.next());
        assert_eq!(minute.window_of(window.id()), Some(window));
        assert_eq!(minute.window_of(WindowId::starting(Timestamp(61_000))), None);
    }

    #[test]
    fn lead_is_a_quarter_of_a_short_window_and_two_seconds_of_a_long_one() {
        assert_eq!(WindowLength::SECOND.lead(), Duration::from_millis(250));
        assert_eq!(WindowLength::MINUTE.lead(), MAX_LEAD);
    }

    #[test]
    fn a_length_is_whole_milliseconds_between_one_and_a_year() {
        assert!(WindowLength::new(Duration::ZERO).is_none());
        assert!(WindowLength::new(Duration::from_nanos(1_500_000)).is_none());
        assert!(WindowLength::new(WindowLength::MAX + Duration::from_millis(1)).is_none());
        assert_eq!(WindowLength::new(Duration::from_secs(60)), Some(WindowLength::MINUTE));
    }
}
