//! The notation of a POSIX `TZ` string, read and written.
//!
//! Knows POSIX.1-2024, XBD 8.3, with the times of day that RFC 9636, 3.3.1 adds. Must not know
//! what follows from a rule. The invariant it keeps: what is written is read as the same zone.

use std::fmt;

use super::{Change, Zone, ZoneError};

/// When a change happens if its rule does not say: at 02:00 (POSIX, XBD 8.3).
const USUAL_CHANGE: i32 = 2 * 3_600;

impl Zone {
    /// Returns the zone that a POSIX `TZ` string describes (POSIX.1-2024, XBD 8.3, with the
    /// times of day that RFC 9636, 3.3.1 adds), such as `<-03>3` or `PST8PDT,M3.2.0,M11.1.0`.
    ///
    /// # Errors
    /// Says where it is not one, or what quotum does not read: daylight time without its
    /// rule, and days of the year (`J60`, `59`).
    pub fn parse_posix(text: &str) -> Result<Self, ZoneError> {
        let mut text = Cursor { text, at: 0 };
        text.name()?;
        let standard = -text.offset()?;
        if text.rest().is_empty() {
            return Self::offset(standard);
        }
        text.name()?;
        let offset = match text.rest().chars().next() {
            None => return Err(ZoneError::NoRule),
            Some(',') => standard.saturating_add(3_600),
            Some(_) => -text.offset()?,
        };
        if text.rest().is_empty() {
            return Err(ZoneError::NoRule);
        }
        let (start, end) = (text.change()?, text.change()?);
        if !text.rest().is_empty() {
            return Err(text.expected("the end"));
        }
        Self::new(standard, offset, start, end)
    }
}

/// Reads a POSIX `TZ` string from left to right.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn expected(&self, expected: &'static str) -> ZoneError {
        let before = self.text.get(..self.at).unwrap_or("");
        ZoneError::Syntax { expected, at: before.chars().count() + 1 }
    }

    /// Passes over what is in `set` and returns it.
    fn run(&mut self, is_in: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let run = &rest[..rest.find(|c| !is_in(c)).unwrap_or(rest.len())];
        self.at += run.len();
        run
    }

    /// Passes over one character, if it is next.
    fn skip(&mut self, c: char) -> bool {
        let is_next = self.rest().starts_with(c);
        self.at += if is_next { c.len_utf8() } else { 0 };
        is_next
    }

    /// Passes over an abbreviation, whatever it is: `CEST` or `<+03>`.
    fn name(&mut self) -> Result<(), ZoneError> {
        const EXPECTED: &str = "an abbreviation of at least three letters, such as CET or <+01>";
        let at = self.at;
        let is_right = if self.skip('<') {
            let name = self.run(|c| c.is_ascii_alphanumeric() || c == '+' || c == '-');
            name.len() >= 3 && self.skip('>')
        } else {
            self.run(|c| c.is_ascii_alphabetic()).len() >= 3
        };
        if !is_right {
            self.at = at;
            return Err(self.expected(EXPECTED));
        }
        Ok(())
    }

    /// Reads an offset, in seconds *west* of UTC, as POSIX writes it.
    fn offset(&mut self) -> Result<i32, ZoneError> {
        self.time(24, "an offset west of UTC, at most 24 hours: 8 or -5:30")
    }

    /// Reads `,Mm.w.d` with or without `/time`.
    fn change(&mut self) -> Result<Change, ZoneError> {
        if !self.skip(',') {
            return Err(self.expected("a comma and a change, such as ,M3.2.0"));
        }
        if self.rest().starts_with(|c: char| c == 'J' || c.is_ascii_digit()) {
            return Err(ZoneError::DayOfYear);
        }
        if !self.skip('M') {
            return Err(self.expected("a change, such as M3.2.0"));
        }
        let month = self.number(2, 1..=12, "a month, 1 to 12")?;
        let week = self.part('.', 1..=5, "a week of the month, .1 to .4, or .5 for the last")?;
        let weekday = self.part('.', 0..=6, "a weekday, .0 for Sunday to .6")?;
        let at = match self.skip('/') {
            true => self.time(167, "a time, at most 167 hours: 2 or -1:30")?,
            false => USUAL_CHANGE,
        };
        Ok(Change { month: month as u8, week: week as u8, weekday: weekday as u8, at })
    }

    /// Reads `[+-]h[:m[:s]]`, in seconds.
    fn time(&mut self, max_hours: i32, expected: &'static str) -> Result<i32, ZoneError> {
        let is_negative = self.skip('-');
        if !is_negative {
            self.skip('+');
        }
        let digits = if max_hours > 99 { 3 } else { 2 };
        let mut seconds = self.number(digits, 0..=max_hours, expected)? * 3_600;
        if self.rest().starts_with(':') {
            seconds += self.part(':', 0..=59, "minutes, :00 to :59")? * 60;
        }
        if self.rest().starts_with(':') {
            seconds += self.part(':', 0..=59, "seconds, :00 to :59")?;
        }
        Ok(if is_negative { -seconds } else { seconds })
    }

    fn part(
        &mut self,
        before: char,
        range: std::ops::RangeInclusive<i32>,
        expected: &'static str,
    ) -> Result<i32, ZoneError> {
        let at = self.at;
        let number = if self.skip(before) { self.number(2, range, expected).ok() } else { None };
        number.ok_or_else(|| {
            self.at = at;
            self.expected(expected)
        })
    }

    fn number(
        &mut self,
        digits: usize,
        range: std::ops::RangeInclusive<i32>,
        expected: &'static str,
    ) -> Result<i32, ZoneError> {
        let at = self.at;
        let run = self.run(|c| c.is_ascii_digit());
        let number = if run.len() <= digits { run.parse().ok() } else { None };
        number.filter(|number| range.contains(number)).ok_or_else(|| {
            self.at = at;
            self.expected(expected)
        })
    }
}

/// The zone as a POSIX `TZ` string. Its abbreviations are the offsets, since a zone has no
/// names.
impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_name(f, self.standard)?;
        write_time(f, -self.standard)?;
        let Some(daylight) = self.daylight else { return Ok(()) };
        write_name(f, daylight.offset)?;
        if daylight.offset != self.standard + 3_600 {
            write_time(f, -daylight.offset)?;
        }
        for change in [daylight.start, daylight.end] {
            write!(f, ",M{}.{}.{}", change.month, change.week, change.weekday)?;
            if change.at != USUAL_CHANGE {
                f.write_str("/")?;
                write_time(f, change.at)?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Writes the offset as an abbreviation: `UTC`, `<+0530>`.
fn write_name(f: &mut fmt::Formatter<'_>, offset: i32) -> fmt::Result {
    let (hours, minutes, seconds) = split(offset);
    match (offset, minutes, seconds) {
        (0, ..) => f.write_str("UTC"),
        (_, 0, 0) => write!(f, "<{}{hours:02}>", sign(offset)),
        (_, _, 0) => write!(f, "<{}{hours:02}{minutes:02}>", sign(offset)),
        _ => write!(f, "<{}{hours:02}{minutes:02}{seconds:02}>", sign(offset)),
    }
}

/// Writes seconds as `[-]h[:mm[:ss]]`.
fn write_time(f: &mut fmt::Formatter<'_>, time: i32) -> fmt::Result {
    let (hours, minutes, seconds) = split(time);
    let sign = if time < 0 { "-" } else { "" };
    match (minutes, seconds) {
        (0, 0) => write!(f, "{sign}{hours}"),
        (_, 0) => write!(f, "{sign}{hours}:{minutes:02}"),
        _ => write!(f, "{sign}{hours}:{minutes:02}:{seconds:02}"),
    }
}

fn sign(offset: i32) -> char {
    if offset < 0 { '-' } else { '+' }
}

fn split(time: i32) -> (u32, u32, u32) {
    let time = time.unsigned_abs();
    (time / 3_600, time / 60 % 60, time % 60)
}
