//! How a request is told no: OpenAI's error shape and the headers of the contract.
//!
//! Knows what callers' SDKs read. Must not know why a limit refused beyond what the
//! refusal says. The invariant it keeps: every no says whose it is, what to do and,
//! where trying again can help, when.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use quotum::{Claim, Denied, Standing, Unit};
use serde_json::json;

/// Returns the body of an error in OpenAI's shape.
pub(super) fn body(message: &str, kind: &str, param: Option<&str>, code: Option<&str>) -> String {
    json!({"error": {"message": message, "type": kind, "param": param, "code": code}}).to_string()
}

/// Returns an error in OpenAI's shape.
pub(super) fn error(
    status: StatusCode,
    message: &str,
    kind: &str,
    param: Option<&str>,
    code: Option<&str>,
) -> Response<Body> {
    let mut response = Response::new(Body::from(body(message, kind, param, code)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Returns an error that the caller has to mend.
pub(super) fn invalid(status: StatusCode, message: &str, param: Option<&str>, code: Option<&str>) -> Response<Body> {
    error(status, message, "invalid_request_error", param, code)
}

/// Returns an error of the upstream's.
pub(super) fn upstream(status: StatusCode, message: &str, code: &str) -> Response<Body> {
    error(status, message, "server_error", None, Some(code))
}

/// Returns the answer to a request that a limit refused.
pub(super) fn denied(denied: &Denied, model: &str, deployment: &str, claim: Claim) -> Response<Body> {
    let (quota, standing) = (denied.by(), denied.standing());
    let kind = if quota.unit() == Unit::Requests { "requests" } else { "tokens" };
    let on = format!("{} per {:?}", quota.unit(), quota.window());
    let (limit, used, requested) = (quota.amount(), standing.used, claim.amount(quota.unit()));
    let message = match denied {
        Denied::TooLarge { .. } => format!(
            "Request too large for {model} (deployment {deployment}) on {on}: Limit {limit}, Requested {requested}. \
             The input or output tokens must be reduced in order to run successfully."
        ),
        Denied::Unreachable { why, retry_after, .. } => format!(
            "Rate limit reached for {model} (deployment {deployment}) on {on}: Limit {limit}, Used {used}, Requested \
             {requested}; the rest cannot be reached now ({why}). Please try again in {}.",
            go_duration(*retry_after)
        ),
        _ => format!(
            "Rate limit reached for {model} (deployment {deployment}) on {on}: Limit {limit}, Used {used}, Requested \
             {requested}. Please try again in {}.",
            go_duration(denied.retry_after().unwrap_or_default())
        ),
    };
    let mut response = error(StatusCode::TOO_MANY_REQUESTS, &message, kind, None, Some("rate_limit_exceeded"));
    let headers = response.headers_mut();
    headers.insert(REFUSED_BY, HeaderValue::from_static("quotum"));
    let which = format!("{}={limit};window={:?};deployment={deployment}", quota.unit(), quota.window());
    if let Ok(which) = HeaderValue::from_str(&which) {
        headers.insert(LIMIT, which);
    }
    match denied.retry_after() {
        Some(after) => {
            let ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX).max(1);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1_000)));
            headers.insert(RETRY_AFTER_MS, HeaderValue::from(ms));
        }
        // OpenAI's SDKs try every 429 again unless they are told not to.
        None => {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
    }
    response
}

/// Who refused.
pub(super) const REFUSED_BY: HeaderName = HeaderName::from_static("x-quotum-refused-by");
/// Which limit refused.
const LIMIT: HeaderName = HeaderName::from_static("x-quotum-limit");
/// How long the request was parked.
const WAIT_MS: HeaderName = HeaderName::from_static("x-quotum-wait-ms");
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Adds how long the request was parked, if it was.
pub(super) fn set_wait(headers: &mut HeaderMap, waited: Duration) {
    if waited > Duration::ZERO {
        let ms = u64::try_from(waited.as_micros().div_ceil(1_000)).unwrap_or(u64::MAX);
        headers.insert(WAIT_MS, HeaderValue::from(ms));
    }
}

/// Replaces the rate limit headers by where our own limits stand.
///
/// Of several quotas of one unit the one with the least left speaks.
pub(super) fn set_standings(headers: &mut HeaderMap, standings: &[Standing]) {
    for (unit, [limit, remaining, reset]) in [(Unit::Tokens, TOKENS), (Unit::Requests, REQUESTS)] {
        let tightest = standings
            .iter()
            .filter(|standing| standing.quota.unit() == unit)
            .min_by_key(|standing| standing.remaining());
        let Some(standing) = tightest else {
            for name in [limit, remaining, reset] {
                headers.remove(name);
            }
            continue;
        };
        headers.insert(limit, HeaderValue::from(standing.quota.amount()));
        headers.insert(remaining, HeaderValue::from(standing.remaining()));
        if let Ok(value) = HeaderValue::from_str(&go_duration(standing.resets_in)) {
            headers.insert(reset, value);
        }
    }
}

const TOKENS: [&str; 3] = ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];
const REQUESTS: [&str; 3] =
    ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];

/// Returns a duration as OpenAI's headers write it: `84ms`, `1.146s`, `6m0s`.
fn go_duration(duration: Duration) -> String {
    let ms = duration.as_millis();
    if ms < 1_000 {
        return format!("{ms}ms");
    }
    let (hours, minutes, rest) = (ms / 3_600_000, ms / 60_000 % 60, ms % 60_000);
    let mut seconds = format!("{}.{:03}", rest / 1_000, rest % 1_000);
    while seconds.ends_with('0') {
        seconds.pop();
    }
    let seconds = seconds.trim_end_matches('.');
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, minutes) => format!("{minutes}m{seconds}s"),
        (hours, minutes) => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_openai_writes_them() {
        for (ms, text) in
            [(0, "0ms"), (84, "84ms"), (1_146, "1.146s"), (30_000, "30s"), (360_000, "6m0s"), (3_661_500, "1h1m1.5s")]
        {
            assert_eq!(go_duration(Duration::from_millis(ms)), text);
        }
    }
}
