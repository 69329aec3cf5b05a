//! How an upstream asks to be left alone.
//!
//! Knows the headers of the providers and every way they write a time. Must not know what is
//! done with the answer. The invariant it keeps: what cannot be read, or is not in the
//! future, is no pause.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, Response, StatusCode, header};

use crate::layer::parts::date;

/// The longest pause that is read from when a limit is full again: providers refill
/// continuously, so that after a minute there is room again long before that.
const LONGEST_RESET: Duration = Duration::from_secs(60);

/// Numbers from here on are seconds of the Unix epoch (2001), and a thousand times more are
/// milliseconds: no duration is that long.
const EPOCH_SECONDS: f64 = 1e9;

/// What the headers begin with that say where a provider's limits stand.
const PREFIXES: [&str; 2] = ["x-ratelimit-", "anthropic-ratelimit-"];

/// Returns how long an upstream that answers so wants to be left alone, if it says so.
///
/// A refusal says it with `retry-after-ms` or `retry-after`; one that has neither may say
/// which of its limits is spent, and when that is full again. Without any of it there is no
/// pause: it may have refused one request for its size.
pub(super) fn asked<B>(answer: &Response<B>) -> Option<Duration> {
    // 529 is Anthropic's "overloaded".
    let refuses = matches!(answer.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
        || answer.status().as_u16() == 529;
    if !refuses {
        return None;
    }
    let headers = answer.headers();
    let now = now(headers);
    let pause = retry_after(headers, now).or_else(|| reset(headers, now));
    pause.filter(|pause| !pause.is_zero())
}

fn retry_after(headers: &HeaderMap, now: Duration) -> Option<Duration> {
    let ms = text(headers, "retry-after-ms").and_then(|text| number(text, 0.001, now));
    ms.or_else(|| time(text(headers, header::RETRY_AFTER.as_str())?, now))
}

/// Returns when the last of the limits that are spent is full again.
fn reset(headers: &HeaderMap, now: Duration) -> Option<Duration> {
    let spent = headers.iter().filter(|(_, left)| left.to_str().is_ok_and(|left| left.trim() == "0"));
    let resets = spent.filter_map(|(name, _)| {
        let name = name.as_str();
        // OpenAI has `remaining-tokens`, Anthropic `tokens-remaining`.
        let is_left = PREFIXES.iter().any(|prefix| name.starts_with(prefix)) && name.contains("remaining");
        time(text(headers, &is_left.then(|| name.replace("remaining", "reset"))?)?, now)
    });
    resets.max().map(|reset| reset.min(LONGEST_RESET))
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// Returns now by the upstream's clock, which ours may differ from; by ours if it does not
/// say. Since the Unix epoch.
fn now(headers: &HeaderMap) -> Duration {
    let theirs = text(headers, header::DATE.as_str()).and_then(date::http).map(Duration::from_secs);
    theirs.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Returns how far in the future a time is, in whatever way it is written: `7`, `1.5`, `84ms`,
/// `6m0s`, seconds or milliseconds of the Unix epoch, HTTP's date, RFC 3339's.
fn time(text: &str, now: Duration) -> Option<Duration> {
    if let Some(left) = number(text, 1.0, now).or_else(|| go_duration(text)) {
        return Some(left);
    }
    let until = date::http(text).map(Duration::from_secs).or_else(|| {
        let at: jiff::Timestamp = text.parse().ok()?;
        Some(Duration::from_millis(at.as_millisecond().try_into().ok()?))
    });
    until?.checked_sub(now)
}

/// Reads a number of this many seconds each, or an instant.
fn number(text: &str, seconds: f64, now: Duration) -> Option<Duration> {
    let number: f64 = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0)?;
    if number < EPOCH_SECONDS {
        return Duration::try_from_secs_f64(number * seconds).ok();
    }
    let until = if number >= EPOCH_SECONDS * 1_000.0 { number / 1_000.0 } else { number };
    Duration::try_from_secs_f64(until).ok()?.checked_sub(now)
}

/// Reads a duration as Go writes it.
fn go_duration(text: &str) -> Option<Duration> {
    let (mut rest, mut sum) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, unit_on) = rest.split_at(digits);
        let (unit, after) = unit_on.split_at(unit_on.find(|c: char| c.is_ascii_digit()).unwrap_or(unit_on.len()));
        let seconds = match unit {
            "d" => 86_400.0,
            "h" => 3_600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        sum = sum.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = after;
    }
    (!text.is_empty()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DATE: (&str, &str) = ("date", "Sun, 06 Nov 1994 08:49:37 GMT");

    fn answer(status: u16, headers: &[(&str, &str)]) -> Response<()> {
        let answer = headers
            .iter()
            .fold(Response::builder().status(status), |answer, (name, value)| answer.header(*name, *value));
        answer.body(()).unwrap()
    }

    /// Milliseconds that a refusal with these headers asks for.
    fn ms(headers: &[(&str, &str)]) -> Option<u128> {
        asked(&answer(429, &[&[DATE], headers].concat())).map(|pause| pause.as_millis())
    }

    #[test]
    fn every_way_to_write_a_pause_is_read() {
        for (text, expected) in [
            ("7", 7_000),
            (" 7 ", 7_000),
            ("1.5", 1_500),
            ("20s", 20_000),
            ("6m0s", 360_000),
            ("84ms", 84),
            ("1.146s", 1_146),
            ("1h2m3s", 3_723_000),
            ("Sun, 06 Nov 1994 08:50:07 GMT", 30_000),
            ("1994-11-06T08:50:07Z", 30_000),
            ("1994-11-06T09:50:07.500+01:00", 30_500),
        ] {
            assert_eq!(ms(&[("retry-after", text)]), Some(expected), "{text}");
        }
        let now = ("date", "Sun, 09 Sep 2001 01:46:40 GMT");
        for until in ["1000000030", "1000000030000"] {
            assert_eq!(asked(&answer(429, &[now, ("retry-after", until)])), Some(Duration::from_secs(30)), "{until}");
        }
    }

    #[test]
    fn milliseconds_are_more_exact() {
        assert_eq!(ms(&[("retry-after", "7"), ("retry-after-ms", "6400")]), Some(6_400));
        assert_eq!(ms(&[("retry-after", "7"), ("retry-after-ms", "soon")]), Some(7_000));
    }

    #[test]
    fn a_limit_that_is_spent_says_when_it_is_full_again() {
        let openai = [
            ("x-ratelimit-remaining-requests", "0"),
            ("x-ratelimit-reset-requests", "1.2s"),
            ("x-ratelimit-remaining-tokens", "5000"),
            ("x-ratelimit-reset-tokens", "30s"),
        ];
        assert_eq!(ms(&openai), Some(1_200));
        let anthropic = [
            ("anthropic-ratelimit-tokens-remaining", "0"),
            ("anthropic-ratelimit-tokens-reset", "1994-11-06T08:49:47Z"),
        ];
        assert_eq!(ms(&anthropic), Some(10_000));
        let full = [("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "6m0s")];
        assert_eq!(ms(&full), Some(60_000), "it refills all the time");
        assert_eq!(ms(&[&full[..], &[("retry-after", "7")]].concat()), Some(7_000));
        // Refused for its size: nothing is spent.
        assert_eq!(ms(&openai[2..]), None);
    }

    #[test]
    fn nonsense_is_no_pause() {
        for nonsense in
            ["", "soon", "-1", "0", "0s", "NaN", "inf", "1e400", "s", "5parsecs", "1m-", DATE.1, "1994-11-06"]
        {
            assert_eq!(ms(&[("retry-after", nonsense)]), None, "{nonsense}");
        }
        assert_eq!(ms(&[]), None);
    }

    #[test]
    fn only_a_refusal_asks_for_a_pause() {
        let asks = |status: u16| asked(&answer(status, &[("retry-after", "7")])).is_some();
        assert!([429, 503, 529].into_iter().all(asks));
        assert!(![200, 400, 500, 502].into_iter().any(asks));
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "\\PC{0,30}", near in "[0-9.]{0,400}[a-z]{0,2}[0-9.]{0,20}[a-zµ]{0,3}") {
            for text in [text, near] {
                let _ = time(&text, Duration::from_secs(1));
            }
        }
    }
}
