//! What becomes of the requests that upstreams get.
//!
//! Knows the outcomes, and since when a deployment has had no other than bad ones. Must not know what a caller is
//! told or charged. The invariants it keeps: every request that an upstream had the chance to answer is counted once,
//! unless its caller leaves first; and a deployment's failing is said at most once a minute.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Response, StatusCode};
use hyper::body::{Frame, SizeHint};
use tokio::time::Instant;

use super::upstream::Failure;
use crate::telemetry::Telemetry;

/// A deployment fails once so many requests in a row did: one or two have every upstream now and then.
const IN_A_ROW: u32 = 5;

/// How long it is not said again that a deployment fails.
const QUIET: Duration = Duration::from_secs(60);

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A success, answered to its end or for as long as its caller listened.
    Ok,
    /// Refused for what the caller asked: 4xx but for those below.
    ClientError,
    /// The deployment's key was refused: 401 or 403.
    Denied,
    /// Too many requests, 429, or too many of everybody's, 529.
    Throttled,
    /// 5xx but for 529.
    ServerError,
    /// A redirect or a change of protocol.
    Unusable,
    /// The answer did not begin in time.
    Timeout,
    /// It broke off, before or after it had begun, or paused for too long.
    Cut,
    /// No connection could be made.
    Unreachable,
}

impl Outcome {
    /// Returns what the head of an answer tells.
    fn of(status: StatusCode) -> Self {
        match status.as_u16() {
            401 | 403 => Self::Denied,
            429 | 529 => Self::Throttled,
            200..=299 => Self::Ok,
            400..=499 => Self::ClientError,
            500..=599 => Self::ServerError,
            _ => Self::Unusable,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientError => "client_error",
            Self::Denied => "denied",
            Self::Throttled => "throttled",
            Self::ServerError => "server_error",
            Self::Unusable => "unusable",
            Self::Timeout => "timeout",
            Self::Cut => "cut",
            Self::Unreachable => "unreachable",
        }
    }

    /// Returns whether the upstream is to blame; `None` if that says nothing of whether it works.
    const fn is_bad(self) -> Option<bool> {
        match self {
            Self::Ok => Some(false),
            Self::ClientError | Self::Throttled => None,
            _ => Some(true),
        }
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Unreachable => Self::Unreachable,
            Failure::Slow => Self::Timeout,
            Failure::Broken => Self::Cut,
        }
    }
}

/// A deployment whose last requests failed.
#[derive(Debug, Default)]
struct Trouble {
    in_a_row: u32,
    /// Since when it was said to fail, if it was and does.
    failing: Option<Instant>,
    /// When that was said last.
    said: Option<Instant>,
}

/// What is to be said of a deployment.
#[derive(Debug, PartialEq, Eq)]
enum News {
    /// So many requests in a row have failed.
    Fails(u32),
    /// It works again, after so long.
    Works(Duration),
}

impl Trouble {
    fn note(&mut self, is_bad: bool, now: Instant) -> Option<News> {
        if !is_bad {
            self.in_a_row = 0;
            return self.failing.take().map(|since| News::Works(now.duration_since(since)));
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        let quiet = self.said.is_some_and(|said| now.duration_since(said) < QUIET);
        if self.in_a_row < IN_A_ROW || self.failing.is_some() || quiet {
            return None;
        }
        (self.failing, self.said) = (Some(now), Some(now));
        Some(News::Fails(self.in_a_row))
    }
}

/// What became of the requests of each deployment.
#[derive(Debug)]
pub(super) struct Outcomes {
    telemetry: Arc<Telemetry>,
    /// Those that have ever failed.
    troubles: Mutex<BTreeMap<String, Trouble>>,
}

impl Outcomes {
    pub(super) fn new(telemetry: Arc<Telemetry>) -> Arc<Self> {
        Arc::new(Self { telemetry, troubles: Mutex::default() })
    }

    /// Notes what an answer's head, or none, tells. Of a success that is for its [body](Self::watched) to tell.
    pub(super) fn begun<B>(&self, deployment: &str, sent: &Result<Response<B>, Failure>) {
        let outcome = sent.as_ref().map_or_else(|failure| (*failure).into(), |answer| Outcome::of(answer.status()));
        if outcome != Outcome::Ok {
            self.note(deployment, outcome, sent.as_ref().ok().map(|answer| answer.status().as_u16()));
        }
    }

    /// Returns the answer, noted once its body is over if it is a success.
    pub(super) fn watched(self: &Arc<Self>, deployment: &str, answer: Response<Body>) -> Response<Body> {
        if !answer.status().is_success() {
            return answer;
        }
        let (outcomes, deployment) = (self.clone(), deployment.to_owned());
        answer.map(|body| Body::new(Watched { body, deployment, outcomes, outcome: Outcome::Ok }))
    }

    fn note(&self, deployment: &str, outcome: Outcome, status: Option<u16>) {
        self.telemetry.answered(deployment, outcome.name());
        let Some(is_bad) = outcome.is_bad() else { return };
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let news = match troubles.get_mut(deployment) {
            Some(trouble) => trouble.note(is_bad, Instant::now()),
            None if is_bad => troubles.entry(deployment.to_owned()).or_default().note(true, Instant::now()),
            None => None,
        };
        drop(troubles);
        match news {
            Some(News::Fails(in_a_row)) => {
                let outcome = outcome.name();
                tracing::warn!(
                    event = "upstream_failing",
                    deployment,
                    outcome,
                    status,
                    in_a_row,
                    "the upstream of {deployment} fails: {in_a_row} requests in a row, the last one with {outcome}"
                );
            }
            Some(News::Works(after)) => {
                let seconds = after.as_secs();
                tracing::info!(
                    event = "upstream_works",
                    deployment,
                    seconds,
                    "the upstream of {deployment} works again, {seconds} s after it was said to fail"
                );
            }
            None => {}
        }
    }
}

/// The body of a success.
struct Watched {
    body: Body,
    deployment: String,
    outcomes: Arc<Outcomes>,
    outcome: Outcome,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if matches!(frame, Some(Err(_))) {
            self.outcome = Outcome::Cut;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.outcomes.note(&self.deployment, self.outcome, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_an_outcome() {
        let names = [200, 204, 301, 400, 401, 403, 404, 408, 429, 500, 503, 529, 599].map(|status| {
            let status = StatusCode::from_u16(status).unwrap();
            format!("{} {}", status.as_u16(), Outcome::of(status).name())
        });
        let expected = [
            "200 ok",
            "204 ok",
            "301 unusable",
            "400 client_error",
            "401 denied",
            "403 denied",
            "404 client_error",
            "408 client_error",
            "429 throttled",
            "500 server_error",
            "503 server_error",
            "529 throttled",
            "599 server_error",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn failing_is_said_after_five_in_a_row_and_once_a_minute() {
        let (mut trouble, start) = (Trouble::default(), Instant::now());
        let mut said = Vec::new();
        // Four fail, one does not; then for two minutes five fail and one does not, every second.
        let outcomes =
            [true, true, true, true, false].into_iter().chain([true, true, true, true, true, false].repeat(120));
        for (i, is_bad) in outcomes.enumerate() {
            let ms = i as u64 * 1_000 / 6;
            said.extend(trouble.note(is_bad, start + Duration::from_millis(ms)).map(|news| (ms / 1_000, news)));
        }
        let said: Vec<_> = said.iter().map(|(second, news)| (*second, matches!(news, News::Fails(5)))).collect();
        assert_eq!(said, [(1, true), (1, false), (61, true), (61, false)]);
    }
}
