//! How a request is told no: the error shapes of the APIs and the headers of the contract.
//!
//! Knows what callers' SDKs read. Must not know why a limit refused beyond what the
//! refusal says. The invariant it keeps: every no says whose it is, what to do and,
//! where trying again can help, when.

use std::fmt::Write;
use std::time::Duration;

use crate::{Claim, Denied, Quota, Standing, Unit};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use serde_json::json;

use super::date;

/// Whose errors, credentials and headers an API has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    OpenAi,
    Anthropic,
}

/// A no, still without a shape.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    message: String,
    /// The error's type as OpenAI calls it; Anthropic's follows from the status.
    kind: &'static str,
    param: Option<&'static str>,
    code: Option<&'static str>,
    /// Boxed, because refusals are seldom and results that may hold one are not.
    pub headers: Box<HeaderMap>,
}

impl Refusal {
    /// Returns an error that the caller has to mend.
    pub fn invalid(
        status: StatusCode,
        message: impl Into<String>,
        param: Option<&'static str>,
        code: Option<&'static str>,
    ) -> Self {
        let kind = "invalid_request_error";
        Self { status, message: message.into(), kind, param, code, headers: Box::default() }
    }

    /// Returns an error of the upstream's.
    pub fn upstream(status: StatusCode, message: &str, code: &'static str) -> Self {
        let (message, kind) = (message.to_owned(), "server_error");
        Self { status, message, kind, param: None, code: Some(code), headers: Box::default() }
    }

    /// Returns the refusal as the API's SDKs read it.
    pub fn response<B: From<String>>(mut self, family: Family) -> Response<B> {
        let body = match family {
            Family::OpenAi => openai_error(&self.message, self.kind, self.param, self.code),
            Family::Anthropic => anthropic_error(&self.message, anthropic_kind(self.status)),
        };
        let mut response = Response::new(B::from(body));
        *response.status_mut() = self.status;
        self.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        *response.headers_mut() = *self.headers;
        response
    }

    fn retry_after(mut self, after: Duration) -> Self {
        // Rounded up: who comes a moment too early is refused again.
        let ms = u64::try_from(after.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX).max(1);
        self.headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1_000)));
        self.headers.insert(RETRY_AFTER_MS, HeaderValue::from(ms));
        self
    }
}

/// Returns the body of an error in OpenAI's shape.
pub fn openai_error(message: &str, kind: &str, param: Option<&str>, code: Option<&str>) -> String {
    json!({"error": {"message": message, "type": kind, "param": param, "code": code}}).to_string()
}

/// Returns the body of an error in Anthropic's shape.
pub fn anthropic_error(message: &str, kind: &str) -> String {
    json!({"type": "error", "error": {"type": kind, "message": message}}).to_string()
}

fn anthropic_kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "api_error",
    }
}

/// Returns an error in OpenAI's shape that the caller has to mend.
pub fn invalid<B: From<String>>(
    status: StatusCode,
    message: &str,
    param: Option<&'static str>,
    code: Option<&'static str>,
) -> Response<B> {
    Refusal::invalid(status, message, param, code).response(Family::OpenAi)
}

/// Returns the answer to a request whose body cannot be read as it is.
pub fn encoded(encoding: &[u8]) -> Refusal {
    let message = format!(
        "The request's body is encoded as {}, which is not understood here: send it without content-encoding.",
        String::from_utf8_lossy(encoding)
    );
    let (status, code) = (StatusCode::UNSUPPORTED_MEDIA_TYPE, Some("unsupported_content_encoding"));
    let mut refusal = Refusal::invalid(status, message, None, code);
    refusal.headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    refusal
}

/// Returns the answer to a request that a limit refused.
pub fn denied(denied: &Denied, model: &str, deployment: &str, claim: Claim, family: Family) -> Refusal {
    let (quota, standing) = (denied.by(), denied.standing());
    let kind = if quota.unit() == Unit::Requests { "requests" } else { "tokens" };
    let on = scope(&quota, standing.limit);
    let (limit, used, requested) = (standing.limit, standing.used, claim.amount(quota.unit()));
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
             {requested}{}. Please try again in {}.",
            standing.vesting(),
            go_duration(denied.retry_after().unwrap_or_default())
        ),
    };
    let status = match (denied, family) {
        // OpenAI answers so; Anthropic has a word for it that nobody tries again.
        (Denied::TooLarge { .. }, Family::Anthropic) => StatusCode::PAYLOAD_TOO_LARGE,
        _ => StatusCode::TOO_MANY_REQUESTS,
    };
    let mut headers = Box::<HeaderMap>::default();
    headers.insert(REFUSED_BY, HeaderValue::from_static("quotum"));
    let (amount, window) = (quota.amount(), quota.window());
    let slice = if limit == amount { String::new() } else { format!(";at_once={limit}") };
    let which = format!("{}={amount};window={window:?}{slice};deployment={deployment}", quota.unit());
    if let Ok(which) = HeaderValue::from_str(&which) {
        headers.insert(LIMIT, which);
    }
    let code = Some("rate_limit_exceeded");
    let mut refusal = Refusal { status, message, kind, param: None, code, headers };
    if let Some(after) = denied.retry_after() {
        return refusal.retry_after(after);
    }
    // OpenAI's SDKs try every 429 again unless they are told not to.
    refusal.headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
    refusal
}

/// Returns what a refusal speaks of: a window, or so much of one as may be used at once.
fn scope(quota: &Quota, at_once: u64) -> String {
    if at_once == quota.amount() {
        return format!("{} per {:?}", quota.unit(), quota.window());
    }
    format!("{} ({quota}, of which at most {at_once} at once)", quota.unit())
}

/// Returns the answer to a request that is not sent because the upstream asked for a
/// pause.
pub fn cooling(model: &str, deployment: &str, after: Duration) -> Refusal {
    let message = format!(
        "The upstream of {model} (deployment {deployment}) refuses requests for now and asked for a pause; nothing \
         was sent. Please try again in {}.",
        go_duration(after)
    );
    let (status, code) = (StatusCode::TOO_MANY_REQUESTS, Some("rate_limit_exceeded"));
    let mut headers = Box::<HeaderMap>::default();
    headers.insert(REFUSED_BY, HeaderValue::from_static("upstream"));
    Refusal { status, message, kind: "requests", param: None, code, headers }.retry_after(after)
}

/// Returns the answer to a request that is not sent because the upstream could not be
/// reached a moment ago.
pub fn down(model: &str, deployment: &str, after: Duration) -> Refusal {
    let message = format!(
        "The upstream of {model} (deployment {deployment}) cannot be reached and is tried again in {}; nothing was \
         sent.",
        go_duration(after)
    );
    let mut refusal = Refusal::upstream(StatusCode::BAD_GATEWAY, &message, "upstream_unreachable");
    refusal.headers.insert(REFUSED_BY, HeaderValue::from_static("upstream"));
    refusal.retry_after(after)
}

/// Who refused.
pub const REFUSED_BY: HeaderName = HeaderName::from_static("x-quotum-refused-by");
/// Which limit refused.
const LIMIT: HeaderName = HeaderName::from_static("x-quotum-limit");
/// How long the request was parked.
const WAIT_MS: HeaderName = HeaderName::from_static("x-quotum-wait-ms");
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Adds how long the request was parked, if it was.
pub fn set_wait(headers: &mut HeaderMap, waited: Duration) {
    if waited > Duration::ZERO {
        let ms = u64::try_from(waited.as_micros().div_ceil(1_000)).unwrap_or(u64::MAX);
        headers.insert(WAIT_MS, HeaderValue::from(ms));
    }
}

/// Returns whether an upstream's header speaks of its own limits: ours take their place.
pub fn is_rate_limit(name: &HeaderName) -> bool {
    name.as_str().starts_with("x-ratelimit-") || name.as_str().starts_with("anthropic-ratelimit-")
}

/// Adds where our own limits stand, in the headers of the API.
///
/// Of several quotas of one unit the one with the least left speaks.
pub fn set_standings(headers: &mut HeaderMap, standings: &[Standing], family: Family) {
    for (unit, ours, theirs) in &HEADERS {
        let of_unit = standings.iter().filter(|standing| standing.quota.unit() == *unit);
        let Some(standing) = of_unit.min_by_key(|standing| standing.remaining()) else { continue };
        let (limit, left) = (standing.limit.to_string(), standing.remaining().to_string());
        if family == Family::Anthropic {
            let ends = date::rfc3339(standing.window_end.unix_ms());
            set(headers, theirs, [limit.clone(), left.clone(), ends]);
        }
        set(headers, ours, [limit, left, go_duration(standing.resets_in)]);
    }
}

fn set(headers: &mut HeaderMap, names: &[HeaderName; 3], values: [String; 3]) {
    for (name, value) in names.iter().zip(values) {
        if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::from(value)) {
            headers.insert(name, value);
        }
    }
}

const fn names(names: [&'static str; 3]) -> [HeaderName; 3] {
    let [limit, remaining, reset] = names;
    [HeaderName::from_static(limit), HeaderName::from_static(remaining), HeaderName::from_static(reset)]
}

/// Limit, remaining and reset of each unit, as OpenAI's family and as Anthropic's has them.
static HEADERS: [(Unit, [HeaderName; 3], [HeaderName; 3]); 4] = [
    (
        Unit::Tokens,
        names(["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"]),
        names([
            "anthropic-ratelimit-tokens-limit",
            "anthropic-ratelimit-tokens-remaining",
            "anthropic-ratelimit-tokens-reset",
        ]),
    ),
    (
        Unit::Requests,
        names(["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"]),
        names([
            "anthropic-ratelimit-requests-limit",
            "anthropic-ratelimit-requests-remaining",
            "anthropic-ratelimit-requests-reset",
        ]),
    ),
    (
        Unit::InputTokens,
        names([
            "x-ratelimit-limit-input-tokens",
            "x-ratelimit-remaining-input-tokens",
            "x-ratelimit-reset-input-tokens",
        ]),
        names([
            "anthropic-ratelimit-input-tokens-limit",
            "anthropic-ratelimit-input-tokens-remaining",
            "anthropic-ratelimit-input-tokens-reset",
        ]),
    ),
    (
        Unit::OutputTokens,
        names([
            "x-ratelimit-limit-output-tokens",
            "x-ratelimit-remaining-output-tokens",
            "x-ratelimit-reset-output-tokens",
        ]),
        names([
            "anthropic-ratelimit-output-tokens-limit",
            "anthropic-ratelimit-output-tokens-remaining",
            "anthropic-ratelimit-output-tokens-reset",
        ]),
    ),
];

/// Returns a duration as OpenAI's headers write it: `84ms`, `1.146s`, `6m0s`.
fn go_duration(duration: Duration) -> String {
    let (seconds, ms) = (duration.as_secs(), duration.subsec_millis());
    if seconds == 0 {
        return format!("{ms}ms");
    }
    let (hours, minutes, seconds) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    let mut text = match (hours, minutes) {
        (0, 0) => format!("{seconds}"),
        (0, minutes) => format!("{minutes}m{seconds}"),
        (hours, minutes) => format!("{hours}h{minutes}m{seconds}"),
    };
    if ms > 0 {
        // Writing to a string does not fail.
        let _ = write!(text, ".{ms:03}");
        text.truncate(text.trim_end_matches('0').len());
    }
    text.push('s');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Clock, Limiter, Timestamp};

    /// Twenty minutes into a window of an hour.
    struct Third;

    impl Clock for Third {
        fn now(&self) -> Timestamp {
            Timestamp::from_unix_ms(500_000 * 3_600_000 + 1_200_000)
        }
    }

    #[test]
    fn a_limit_that_vests_says_so() {
        let hour = Quota::tokens(100_000).per(Duration::from_secs(3_600));
        let limiter = Limiter::builder().clock(Third).deployment("d", [hour]).build().unwrap();
        let claim = Claim::tokens(90_000);
        let refused = limiter.handle("d").unwrap().try_acquire(claim).unwrap_err();
        let message = denied(&refused, "m", "d", claim, Family::OpenAi).message;
        // A quarter, and three of the six parts of the rest.
        assert!(message.contains("Limit 100000, Used 0, Requested 90000; of the limit 62500 have vested"), "{message}");
        assert!(message.ends_with("comes in instalments. Please try again in 30m0s."), "{message}");
    }

    #[test]
    fn a_refusal_names_the_limit_that_was_configured_and_what_of_it_fits_at_once() {
        for (quota, on, which) in [
            (
                Quota::tokens(1_000).per_minute(),
                "on tokens per 60s: Limit 1000,",
                "tokens=1000;window=60s;deployment=d",
            ),
            (
                Quota::tokens(1_000).per_minute().sliding(),
                "on tokens (1000 tokens in any 60s, of which at most 200 at once): Limit 200,",
                "tokens=1000;window=60s;at_once=200;deployment=d",
            ),
        ] {
            let limiter = Limiter::builder().clock(Third).deployment("d", [quota]).build().unwrap();
            let claim = Claim::tokens(1_001);
            let refused = limiter.handle("d").unwrap().try_acquire(claim).unwrap_err();
            let refusal = denied(&refused, "m", "d", claim, Family::OpenAi);
            assert!(refusal.message.contains(on), "{}", refusal.message);
            assert_eq!(refusal.headers[LIMIT], which);
        }
    }

    #[test]
    fn durations_are_written_as_openai_writes_them() {
        for (ms, text) in [
            (0, "0ms"),
            (84, "84ms"),
            (1_146, "1.146s"),
            (30_000, "30s"),
            (360_000, "6m0s"),
            (3_661_500, "1h1m1.5s"),
            (7_200_020, "2h0m0.02s"),
        ] {
            assert_eq!(go_duration(Duration::from_millis(ms)), text);
        }
    }
}
