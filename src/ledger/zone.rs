//! Local days: when they start, by a zone's offset and its one yearly rule.
//!
//! Knows the civil calendar and the rule of a POSIX `TZ` string. Must not know what time it
//! is, nor names of places: a zone is its rule, so that two replicas with the same one agree
//! on every day whatever time-zone database either has. The invariant it keeps: days follow
//! one another without a gap and their numbers are consecutive, whatever the clocks do.

mod posix;

use std::cmp::Ordering;

use super::window::Timestamp;

/// Seconds of a day on which no clock changes.
const DAY: i64 = 86_400;

/// The largest offset from UTC, in seconds: POSIX writes up to 24:59:59 (XBD 8.3).
const MAX_OFFSET: i32 = 24 * 3_600 + 59 * 60 + 59;

/// The largest local time of a change, in seconds, before midnight too: RFC 9636, 3.3.1
/// extends POSIX to 167 hours either way.
const MAX_CHANGE: i32 = 167 * 3_600 + 59 * 60 + 59;

/// When a local day starts: an offset from UTC or, with daylight time, two of them and the
/// rule by which every year changes from one to the other.
///
/// It has no name and no history: equal zones have equal days, forever. Built from the
/// notation of a POSIX `TZ` string, which [`Display`](std::fmt::Display) writes back.
///
/// ```
/// use quotum::ledger::{Timestamp, Zone};
/// let zone = Zone::parse_posix("PST8PDT,M3.2.0,M11.1.0")?;
/// let day = zone.day_at(Timestamp::from_unix_ms(1_741_500_000_000)); // 2025-03-08 22:00 there
/// assert_eq!(day.number, 20_155);
/// assert_eq!(zone.day_at(day.end).length().as_secs(), 23 * 3_600);   // the clocks go forward
/// # Ok::<(), quotum::ledger::ZoneError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Zone {
    /// Seconds east of UTC; the smaller offset, where there are two.
    standard: i32,
    daylight: Option<Daylight>,
}

/// The part of each year in which clocks are ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Daylight {
    /// Seconds east of UTC, more than the standard offset and by less than a day.
    offset: i32,
    /// By standard time.
    start: Change,
    /// By daylight time; never the same as `start`.
    end: Change,
}

/// A weekday of a month: POSIX's `Mm.w.d/time`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Change {
    /// 1 to 12.
    month: u8,
    /// 1 to 5; 5 is the last one of the month.
    week: u8,
    /// 0 is Sunday.
    weekday: u8,
    /// Seconds after midnight of that day, by the time that ends.
    at: i32,
}

/// One local day: the half-open interval `[start, end)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day {
    /// Local days since 1970-01-01.
    pub number: u64,
    /// The first instant that carries the date: local midnight or, where clocks are put
    /// forward over midnight, the instant after that.
    pub start: Timestamp,
    /// The start of the next day.
    pub end: Timestamp,
}

impl Day {
    /// Returns how long the day is: 24 h, less or more when clocks change.
    pub const fn length(self) -> std::time::Duration {
        self.end.since(self.start)
    }
}

/// Why a zone could not be built. Whoever wrote it can mend it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ZoneError {
    /// The text is not a POSIX `TZ` string.
    #[error("character {at}: expected {expected}")]
    Syntax {
        /// What would be right there.
        expected: &'static str,
        /// Where, counted from 1.
        at: usize,
    },
    /// An offset is a day or more.
    #[error("the offset from UTC is over 24:59:59")]
    Offset,
    /// Daylight time without its rule: POSIX leaves it to the machine.
    #[error("it names a daylight time and not when that begins and ends; write both, as in PST8PDT,M3.2.0,M11.1.0")]
    NoRule,
    /// A change is given as a day of the year.
    #[error("a change as a day of the year is not read; write month, week and weekday: M3.2.0")]
    DayOfYear,
    /// Daylight time begins when it ends.
    #[error("daylight time begins and ends at the same time")]
    Season,
    /// Daylight time is a day or more from standard time, and would skip dates.
    #[error("daylight time differs from standard time by a day or more")]
    Difference,
}

impl Zone {
    /// Coordinated Universal Time.
    pub const UTC: Self = Self { standard: 0, daylight: None };

    /// The length of [`Zone::to_bytes`].
    pub const BYTES: usize = 22;

    /// Returns the zone that is always this many seconds east of UTC.
    ///
    /// # Errors
    /// If that is more than 24:59:59 either way.
    pub const fn offset(seconds: i32) -> Result<Self, ZoneError> {
        if seconds.unsigned_abs() > MAX_OFFSET.unsigned_abs() {
            return Err(ZoneError::Offset);
        }
        Ok(Self { standard: seconds, daylight: None })
    }

    /// Returns the zone in its one form: the offset that is ahead is the daylight time, also
    /// for places that call it standard and set clocks back in winter (Ireland).
    fn new(standard: i32, offset: i32, start: Change, end: Change) -> Result<Self, ZoneError> {
        let zone = Self::offset(standard)?;
        Self::offset(offset)?;
        if i64::from(offset.abs_diff(standard)) >= DAY {
            return Err(ZoneError::Difference);
        }
        if start == end {
            return Err(ZoneError::Season);
        }
        Ok(match offset.cmp(&standard) {
            Ordering::Equal => zone,
            Ordering::Greater => Self { standard, daylight: Some(Daylight { offset, start, end }) },
            Ordering::Less => {
                Self { standard: offset, daylight: Some(Daylight { offset: standard, start: end, end: start }) }
            }
        })
    }

    /// Returns the local day that `at` falls into.
    ///
    /// Time has two ends: what is before the local 1970-01-02 belongs to that day's
    /// predecessor, and the last day ends at [`Timestamp::NEVER`].
    pub fn day_at(&self, at: Timestamp) -> Day {
        let seconds = i64::try_from(at.unix_ms() / 1_000).unwrap_or(i64::MAX);
        // By standard time. Clocks that are ahead are in the next day sooner, and nowhere in
        // the one after it.
        let number = (seconds + i64::from(self.standard)).div_euclid(DAY);
        let is_next = self.start_of(number + 1) <= seconds;
        let number = number + i64::from(is_next);
        let start = if number <= 0 { Timestamp::ZERO } else { timestamp(self.start_of(number)) };
        let number = number.max(0);
        Day { number: number.unsigned_abs(), start, end: timestamp(self.start_of(number + 1)) }
    }

    /// Returns the local day that starts at `start`, or `None` if none does.
    pub fn day_starting(&self, start: Timestamp) -> Option<Day> {
        Some(self.day_at(start)).filter(|day| day.start == start)
    }

    /// Returns the first second of a local day, since the Unix epoch: no instant before it
    /// carries this date or a later one.
    fn start_of(&self, number: i64) -> i64 {
        let midnight = |offset: i32| number * DAY - i64::from(offset);
        let late = midnight(self.standard);
        let Some(daylight) = self.daylight else { return late };
        let early = midnight(daylight.offset);
        if daylight.is_on(early, self.standard) {
            return early;
        }
        // Clocks may be put forward in between: over midnight.
        let starts = years_around(early).map(|year| daylight.start.instant(year, self.standard));
        let over_midnight = |at: &i64| (early..late).contains(at) && daylight.is_on(*at, self.standard);
        starts.into_iter().find(over_midnight).unwrap_or(late)
    }

    /// Returns the zone as the wire carries it.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.standard.to_le_bytes());
        let Some(daylight) = self.daylight else {
            // No daylight time: the same offset again, and a rule of nothing.
            bytes[4..8].copy_from_slice(&self.standard.to_le_bytes());
            return bytes;
        };
        bytes[4..8].copy_from_slice(&daylight.offset.to_le_bytes());
        bytes[8..15].copy_from_slice(&daylight.start.to_bytes());
        bytes[15..].copy_from_slice(&daylight.end.to_bytes());
        bytes
    }

    /// Returns the zone that these bytes carry, or `None` if they are not what
    /// [`Zone::to_bytes`] returns for any zone.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h, rule @ ..] = bytes;
        let (standard, offset) = (i32::from_le_bytes([*a, *b, *c, *d]), i32::from_le_bytes([*e, *f, *g, *h]));
        if offset == standard {
            return Self::offset(standard).ok().filter(|_| rule.iter().all(|byte| *byte == 0));
        }
        let (start, end) = rule.split_first_chunk()?;
        let zone = Self::new(standard, offset, Change::from_bytes(*start)?, Change::from_bytes(end.try_into().ok()?)?);
        zone.ok().filter(|zone| zone.to_bytes() == *bytes)
    }
}

impl Daylight {
    /// Returns whether clocks are ahead at this second: whether it began later than it ended.
    fn is_on(&self, at: i64, standard: i32) -> bool {
        let last = |change: Change, offset: i32| {
            years_around(at).into_iter().map(|year| change.instant(year, offset)).find(|instant| *instant <= at)
        };
        last(self.start, standard) > last(self.end, self.offset)
    }
}

impl Change {
    /// Returns the second of this year's change, since the Unix epoch.
    fn instant(&self, year: i64, offset_before: i32) -> i64 {
        let month = i64::from(self.month);
        let first = first_of(year, month);
        let next_month = if month == 12 { first_of(year + 1, 1) } else { first_of(year, month + 1) };
        // 1970-01-01 was a Thursday.
        let to_weekday = (i64::from(self.weekday) - 4 - first).rem_euclid(7);
        let mut day = first + to_weekday + (i64::from(self.week) - 1) * 7;
        if day >= next_month {
            day -= 7;
        }
        day * DAY + i64::from(self.at) - i64::from(offset_before)
    }

    fn to_bytes(self) -> [u8; 7] {
        let [a, b, c, d] = self.at.to_le_bytes();
        [self.month, self.week, self.weekday, a, b, c, d]
    }

    fn from_bytes([month, week, weekday, at @ ..]: [u8; 7]) -> Option<Self> {
        let at = i32::from_le_bytes(at);
        let is_right = (1..=12).contains(&month)
            && (1..=5).contains(&week)
            && weekday <= 6
            && at.unsigned_abs() <= MAX_CHANGE.unsigned_abs();
        is_right.then_some(Self { month, week, weekday, at })
    }
}

/// Returns the years of which a change can be the last one before this second, the latest
/// first. A change may lie a week outside the year it belongs to.
fn years_around(at: i64) -> [i64; 4] {
    let year = year_of(at.div_euclid(DAY));
    [year + 1, year, year - 1, year - 2]
}

/// Returns the days from the Unix epoch to the first of a month (Hinnant, "chrono-compatible
/// low-level date algorithms": years begin in March, so that the leap day is a year's last).
const fn first_of(year: i64, month: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// Returns the year of a day since the Unix epoch: the inverse, as far as it is needed.
const fn year_of(day: i64) -> i64 {
    let day = day + 719_468;
    let (era, of_era) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    // January and February, after day 305 of a year that began in March.
    era * 400 + year + (of_year >= 306) as i64
}

/// Returns the instant of a second since the Unix epoch; what is outside of time, its end.
fn timestamp(second: i64) -> Timestamp {
    Timestamp::from_unix_ms(u64::try_from(second).unwrap_or(0).saturating_mul(1_000))
}

#[cfg(test)]
mod tests {
    use jiff::civil::{Date, date};
    use jiff::tz::TimeZone;
    use jiff::{Timestamp as Instant, ToSpan};
    use proptest::prelude::*;

    use super::*;

    const PACIFIC: &str = "PST8PDT,M3.2.0,M11.1.0";

    /// Places, and the rule their time-zone data ends with.
    const PLACES: [(&str, &str); 10] = [
        ("UTC", "UTC0"),
        ("America/Los_Angeles", PACIFIC),
        ("Europe/Berlin", "CET-1CEST,M3.5.0,M10.5.0/3"),
        ("Europe/Dublin", "IST-1GMT0,M10.5.0,M3.5.0/1"),
        ("Asia/Kolkata", "IST-5:30"),
        // Change at midnight: the day begins at 01:00, and the one before has 25 hours.
        ("America/Santiago", "<-04>4<-03>,M9.1.6/24,M4.1.6/24"),
        ("Africa/Cairo", "EET-2EEST,M4.5.5/0,M10.5.4/24"),
        ("Asia/Beirut", "EET-2EEST,M3.5.0/0,M10.5.0/0"),
        ("Australia/Lord_Howe", "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0"),
        // Before midnight of the day that the rule names.
        ("America/Nuuk", "<-02>2<-01>,M3.5.0/-1,M10.5.0/0"),
    ];

    fn zone(text: &str) -> Zone {
        Zone::parse_posix(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn ms(at: Instant) -> Timestamp {
        Timestamp::from_unix_ms(at.as_millisecond().try_into().expect("after 1970"))
    }

    /// Returns the first instant that carries this date, by another library.
    fn start_of(date: Date, place: &TimeZone) -> Timestamp {
        ms(place
            .to_zoned(date.to_datetime(jiff::civil::Time::midnight()))
            .expect("in range")
            .start_of_day()
            .expect("in range")
            .timestamp())
    }

    #[test]
    fn every_day_of_thirteen_years_starts_where_another_library_says() {
        for (name, rule) in PLACES {
            let (zone, place) = (zone(rule), TimeZone::get(name).expect("a known place"));
            let mut today = date(2024, 1, 1);
            while today < date(2037, 1, 1) {
                let tomorrow = today.tomorrow().expect("in range");
                let (start, end) = (start_of(today, &place), start_of(tomorrow, &place));
                let number = today.since(date(1970, 1, 1)).expect("in range").get_days();
                let day = Day { number: number.try_into().expect("after 1970"), start, end };
                for at in [start, end.minus(std::time::Duration::from_millis(1))] {
                    assert_eq!(zone.day_at(at), day, "{name}, {today}, at {at:?}");
                }
                assert_eq!(zone.day_starting(start), Some(day));
                assert_eq!(zone.day_starting(start.next()), None);
                today = tomorrow;
            }
        }
    }

    #[test]
    fn days_are_shorter_and_longer_where_clocks_change() {
        let hours = |rule: &str, number: u64| {
            let zone = zone(rule);
            let noon = Timestamp::from_unix_ms(number * 86_400_000 + 43_200_000 - 4 * 3_600_000);
            let day = zone.day_at(noon);
            assert_eq!(day.number, number, "{rule}");
            day.length().as_secs_f64() / 3_600.0
        };
        let day = |year: i16, month: i8, day: i8| {
            u64::try_from(date(year, month, day).since(date(1970, 1, 1)).expect("in range").get_days()).unwrap()
        };
        assert_eq!(hours(PACIFIC, day(2026, 3, 8)), 23.0);
        assert_eq!(hours(PACIFIC, day(2026, 11, 1)), 25.0);
        assert_eq!(hours(PACIFIC, day(2026, 7, 1)), 24.0);
        assert_eq!(hours(PLACES[8].1, day(2026, 10, 4)), 23.5);
        assert_eq!(hours(PLACES[5].1, day(2026, 9, 6)), 23.0);
    }

    #[test]
    fn a_date_that_clocks_go_back_into_is_not_begun_again() {
        // Until 2011 Newfoundland set its clocks back at a minute past midnight.
        let zone = zone("NST3:30NDT,M3.2.0/0:01,M11.1.0/0:01");
        let at = |text: &str| ms(text.parse::<Instant>().expect("a time"));
        let first = zone.day_at(at("2010-11-07T02:30:00Z")); // 00:00 for the first time
        assert_eq!(first.start, at("2010-11-07T02:30:00Z"));
        assert_eq!(zone.day_at(at("2010-11-07T02:31:00Z")), first); // 23:01 of the day before
        assert_eq!(first.length().as_secs(), 25 * 3_600);
    }

    #[test]
    fn what_is_written_is_read_back() {
        for (text, written) in [
            ("UTC0", "UTC0"),
            (PACIFIC, "<-08>8<-07>,M3.2.0,M11.1.0"),
            ("IST-5:30", "<+0530>-5:30"),
            ("CET-1CEST,M3.5.0,M10.5.0/3", "<+01>-1<+02>,M3.5.0,M10.5.0/3"),
            ("<+1030>-10:30<+11>-11,M10.1.0,M4.1.0", "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0"),
            ("LMT0:01:15", "<-000115>0:01:15"),
            // Ireland's winter time is what others call standard time.
            ("IST-1GMT0,M10.5.0,M3.5.0/1", "UTC0<+01>,M3.5.0/1,M10.5.0"),
            // Daylight time that does not differ is none.
            ("WET0WEST0,M3.5.0,M10.5.0", "UTC0"),
            ("AAA+24:59:59", "<-245959>24:59:59"),
            ("AAA4BBB,M1.1.1/-167:59:59,M12.5.6/167", "<-04>4<-03>,M1.1.1/-167:59:59,M12.5.6/167"),
        ] {
            assert_eq!(zone(text).to_string(), written);
            assert_eq!(zone(written), zone(text));
        }
    }

    #[test]
    fn names_make_no_difference() {
        assert_eq!(zone("PST8PDT,M3.2.0,M11.1.0"), zone("<-08>8<-07>7,M3.2.0/2:00,M11.1.0/02:00:00"));
        assert_eq!(zone("UTC0"), Zone::UTC);
        assert_eq!(zone("EST5"), Zone::offset(-18_000).unwrap());
    }

    #[test]
    fn what_is_not_a_zone_is_told_why() {
        for (text, told) in [
            ("", "character 1: expected an abbreviation"),
            ("PS8", "character 1: expected an abbreviation"),
            ("<+03", "character 1: expected an abbreviation"),
            ("America/Los_Angeles", "character 8: expected an offset west of UTC"),
            ("UTC", "character 4: expected an offset"),
            ("UTC25", "character 4: expected an offset"),
            ("UTC+2:60", "character 6: expected minutes"),
            ("UTC+2:30:", "character 9: expected seconds"),
            ("PST8PDT", "not when that begins and ends"),
            ("PST8PDT7", "not when that begins and ends"),
            ("PST8PDT,M3.2.0", "character 15: expected a comma and a change"),
            ("PST8PDT,M13.2.0,M11.1.0", "character 10: expected a month"),
            ("PST8PDT,M3.6.0,M11.1.0", "character 11: expected a week"),
            ("PST8PDT,M3.2.7,M11.1.0", "character 13: expected a weekday"),
            ("PST8PDT,M3.2.0/168,M11.1.0", "character 16: expected a time"),
            ("PST8PDT,M3.2.0,M11.1.0,", "character 23: expected the end"),
            ("PST8PDT,X3,M11.1.0", "character 9: expected a change"),
            ("PST8PDT,J60,J300", "day of the year"),
            ("PST8PDT,59,300", "day of the year"),
            ("PST8PDT,M3.2.0,M3.2.0", "begins and ends at the same time"),
            ("AAA12BBB-12,M3.2.0,M11.1.0", "a day or more"),
            ("ÄÄÄ1", "character 1: expected an abbreviation"),
            ("CET-1ü", "character 6: expected an abbreviation"),
        ] {
            let error = Zone::parse_posix(text).expect_err(text).to_string();
            assert!(error.contains(told), "{text}: {error}");
        }
        assert_eq!(Zone::offset(90_000), Err(ZoneError::Offset));
        assert_eq!(Zone::offset(i32::MIN), Err(ZoneError::Offset));
    }

    #[test]
    fn time_ends_without_a_panic() {
        for (_, rule) in PLACES {
            let zone = zone(rule);
            assert_eq!(zone.day_at(Timestamp::ZERO).start, Timestamp::ZERO, "{rule}");
            assert_eq!(zone.day_at(Timestamp::NEVER).end, Timestamp::NEVER, "{rule}");
        }
        let day = zone("PST8").day_at(Timestamp::ZERO);
        assert_eq!((day.number, day.end.unix_ms()), (0, (24 + 8) * 3_600_000));
    }

    fn any_change() -> impl Strategy<Value = Change> {
        let at = prop_oneof![-MAX_CHANGE..=MAX_CHANGE, (-24..=48).prop_map(|hour| hour * 3_600)];
        (1..=12_u8, 1..=5_u8, 0..=6_u8, at).prop_map(|(month, week, weekday, at)| Change { month, week, weekday, at })
    }

    fn any_zone() -> impl Strategy<Value = Zone> {
        let offset = || prop_oneof![-MAX_OFFSET..=MAX_OFFSET, (-48..=48).prop_map(|half| half * 1_800)];
        (offset(), offset(), any_change(), any_change())
            .prop_filter_map("not a zone", |(a, b, start, end)| Zone::new(a, b, start, end).ok())
    }

    fn any_instant() -> impl Strategy<Value = Timestamp> {
        prop_oneof![0..5_000_000_000_000_u64, any::<u64>(), Just(u64::MAX), Just(0)].prop_map(Timestamp::from_unix_ms)
    }

    /// Every date that local clocks show before `day` is earlier, and at its start none is.
    fn is_first_of_its_date(zone: &Zone, day: Day) -> bool {
        let start = i64::try_from(day.start.unix_ms() / 1_000).unwrap();
        let date = |at: i64| {
            let is_ahead = zone.daylight.is_some_and(|daylight| daylight.is_on(at, zone.standard));
            let offset = if is_ahead { zone.daylight.unwrap().offset } else { zone.standard };
            (at + i64::from(offset)).div_euclid(DAY)
        };
        let number = i64::try_from(day.number).unwrap();
        date(start) == number && (1..=2 * DAY).step_by(599).all(|before| date(start - before) < number)
    }

    proptest! {
        #[test]
        fn days_tile_time(zone in any_zone(), at in any_instant()) {
            let day = zone.day_at(at);
            prop_assert!(day.start <= at && (at < day.end || day.end == Timestamp::NEVER));
            if day.end < Timestamp::NEVER {
                let next = zone.day_at(day.end);
                prop_assert_eq!((next.number, next.start), (day.number + 1, day.end));
                prop_assert_eq!(zone.day_at(Timestamp::from_unix_ms(day.end.unix_ms() - 1)), day);
            }
            prop_assert_eq!(zone.day_starting(day.start), Some(day));
        }

        #[test]
        fn a_day_starts_with_the_first_instant_of_its_date(zone in any_zone(), at in 500_000_000_000..5_000_000_000_000_u64) {
            let day = zone.day_at(Timestamp::from_unix_ms(at));
            prop_assert!(is_first_of_its_date(&zone, day), "{:?} of {:?}", day, zone);
        }

        #[test]
        fn a_zone_survives_the_wire_and_its_own_notation(zone in any_zone()) {
            prop_assert_eq!(Zone::from_bytes(&zone.to_bytes()), Some(zone));
            prop_assert_eq!(Zone::parse_posix(&zone.to_string()), Ok(zone));
        }

        #[test]
        fn foreign_bytes_are_a_zone_in_its_one_form_or_none(
            zone in any_zone(), place in 0..Zone::BYTES, byte in any::<u8>(), noise in any::<[u8; Zone::BYTES]>(), at in any_instant(),
        ) {
            let mut near = zone.to_bytes();
            near[place] = byte;
            for bytes in [near, noise] {
                if let Some(zone) = Zone::from_bytes(&bytes) {
                    prop_assert_eq!(zone.to_bytes(), bytes);
                    zone.day_at(at);
                }
            }
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,30}", near in "[A-Z]{3}[-+]?[0-9:]{1,8}([A-Z]{3})?(,M[0-9.]{1,8}(/[-0-9:]{1,6})?){0,3}") {
            let _ = Zone::parse_posix(&text);
            let _ = Zone::parse_posix(&near);
        }
    }

    #[test]
    fn thirty_years_of_another_library_agree_at_every_change() {
        // What the days rest on: the offset on both sides of every change.
        for (name, rule) in PLACES {
            let (zone, place) = (zone(rule), TimeZone::get(name).expect("a known place"));
            let from: Instant = "2024-01-01T00:00:00Z".parse().expect("a time");
            let until = from.checked_add((24 * 365 * 30).hours()).expect("in range");
            for change in place.following(from).take_while(|change| change.timestamp() < until) {
                for at in [change.timestamp().as_second() - 1, change.timestamp().as_second()] {
                    let is_ahead = zone.daylight.is_some_and(|daylight| daylight.is_on(at, zone.standard));
                    let ours = if is_ahead { zone.daylight.unwrap().offset } else { zone.standard };
                    let theirs = place.to_offset(Instant::from_second(at).expect("in range"));
                    assert_eq!(ours, theirs.seconds(), "{name} at {at}");
                }
            }
        }
    }
}
