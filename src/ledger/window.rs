//! Instants and windows: the whole of quotum's notion of time.
//!
//! Knows how an instant falls into a window. Must not know what time it is: every
//! instant is an argument. The invariant it keeps: a window is named by its nominal
//! start, and that name is part of the identity of everything counted in it, so a
//! roll is a fact about time and there is no code that resets anything.

use std::fmt;
use std::num::NonZeroU64;
use std::time::Duration;

use super::zone::{Day, Zone};

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
    /// One day of 24 hours.
    pub const DAY: Self = Self(NonZeroU64::new(86_400_000).unwrap());

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

    pub(crate) const fn from_ms(ms: u64) -> Option<Self> {
        Self::new(Duration::from_millis(ms))
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
        lead(self.duration())
    }

    /// Returns the window that `at` falls into.
    pub const fn window_at(self, at: Timestamp) -> Window {
        let number = at.0 / self.0.get();
        let start = number * self.0.get();
        Window { number, start: Timestamp(start), end: Timestamp(start.saturating_add(self.0.get())) }
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

/// How windows follow one another: without gaps, each with a number one above the last's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Grid {
    /// Windows of equal length, aligned to the Unix epoch.
    Even(WindowLength),
    /// Local days of a time zone, of 24 hours or an hour more or less.
    Days(Zone),
}

impl Grid {
    /// Returns the window that `at` falls into.
    pub fn window_at(self, at: Timestamp) -> Window {
        match self {
            Self::Even(length) => length.window_at(at),
            Self::Days(zone) => zone.day_at(at).into(),
        }
    }

    /// Returns the window whose nominal start is `id`, or `None` if none starts there.
    pub fn window_of(self, id: WindowId) -> Option<Window> {
        let window = self.window_at(id.start());
        (window.id() == id).then_some(window)
    }

    /// Returns the window after this one.
    pub fn next(self, window: Window) -> Window {
        self.window_at(window.end())
    }
}

/// One window: the half-open interval `[start, end)`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Window {
    number: u64,
    start: Timestamp,
    end: Timestamp,
}

impl Window {
    /// Returns how many windows of its grid start before this one since the epoch.
    pub const fn number(self) -> u64 {
        self.number
    }

    /// Returns the id: the nominal start.
    pub const fn id(self) -> WindowId {
        WindowId(self.start)
    }

    /// Returns the first instant.
    pub const fn start(self) -> Timestamp {
        self.start
    }

    /// Returns the first instant after the window.
    pub const fn end(self) -> Timestamp {
        self.end
    }

    /// Returns the length.
    pub const fn length(self) -> Duration {
        self.end.since(self.start)
    }

    /// Returns the first instant at which this window's shares may be frozen: a quarter of
    /// its length before its start, at most [`MAX_LEAD`].
    pub fn opens(self) -> Timestamp {
        self.start.minus(lead(self.length()))
    }

    /// Returns part `part` of `parts` equal ones: what a vested instalment belongs to.
    pub(crate) fn part(self, part: u32, parts: u32) -> Self {
        let length_ms = u128::from(self.end.0 - self.start.0);
        let cut = |part: u32| Timestamp(self.start.0 + (length_ms * u128::from(part) / u128::from(parts)) as u64);
        Self { number: self.number, start: cut(part), end: cut(part + 1) }
    }
}

impl From<Day> for Window {
    fn from(day: Day) -> Self {
        Self { number: day.number, start: day.start, end: day.end }
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?}, {:?})", self.start(), self.end())
    }
}

pub(super) fn lead(length: Duration) -> Duration {
    Duration::from_millis(millis(length) / 4).min(MAX_LEAD)
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
        assert_eq!(minute.window_at(window.end()).number(), window.number() + 1);
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
