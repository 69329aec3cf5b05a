//! The bodies of requests, read whole and within bounds.
//!
//! Knows how much one may be and how much all may be together. Must not know what is in
//! them. The invariant it keeps: what is held of bodies at a time never exceeds the
//! bound, and who is refused is told so even if it was still sending.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body_util::BodyExt;

use crate::layer::parts::encoding;
use crate::layer::parts::refusal::{self, Refusal};

use super::connection::SlowSender;
use crate::config::Proxy;

/// What is taken in of requests.
#[derive(Debug)]
pub(super) struct Intake {
    max_body: usize,
    max_bodies: usize,
    /// How long who was refused is listened to.
    discarding: Duration,
    held: AtomicUsize,
}

/// A body's part of what may be held; dropped once the body is.
#[derive(Debug)]
pub(super) struct Held<'a> {
    intake: &'a Intake,
    bytes: usize,
}

impl Intake {
    pub(super) fn new(config: &Proxy) -> Self {
        let (max_body, max_bodies, discarding) = (config.max_body, config.max_bodies, config.bounds.body_idle);
        Self { max_body, max_bodies, discarding, held: AtomicUsize::new(0) }
    }

    /// Returns the whole body of a request.
    ///
    /// # Errors
    /// If it is encoded, too large, too slow, broken off, or one too many to hold.
    pub(super) async fn read(&self, headers: &HeaderMap, body: &mut Body) -> Result<(Bytes, Held<'_>), Refusal> {
        if let Some(encoding) = encoding(headers) {
            return Err(refusal::encoded(encoding));
        }
        let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if length.is_some_and(|length| length > self.max_body as u64) {
            return Err(self.too_large());
        }
        let mut held = Held { intake: self, bytes: 0 };
        let mut first = Bytes::new();
        // Empty where one piece is all there is: that one is passed on as it came.
        let mut whole = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| broken(&error))?;
            let Ok(piece) = frame.into_data() else { continue };
            held.add(piece.len())?;
            if first.is_empty() {
                first = piece;
                continue;
            }
            if whole.is_empty() {
                whole.extend_from_slice(&first);
            }
            whole.extend_from_slice(&piece);
        }
        let body = if whole.is_empty() { first } else { Bytes::from(whole) };
        Ok((body, held))
    }

    /// Reads what is left of a refused request's body, within reason: closed on a caller
    /// that still writes, a connection takes the answer with it, and a stream of HTTP/2 does so with
    /// some callers.
    pub(super) async fn discard(&self, head: &Parts, mut body: Body) {
        // Who asked first is told before it sends.
        if head.headers.contains_key(header::EXPECT) {
            return;
        }
        let mut left = self.max_body.saturating_mul(2);
        let reading = async {
            while let Some(Ok(frame)) = body.frame().await {
                left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                if left == 0 {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(self.discarding, reading).await;
    }

    fn too_large(&self) -> Refusal {
        let message = format!("The request's body is larger than {} bytes, the most this proxy takes.", self.max_body);
        Refusal::invalid(StatusCode::PAYLOAD_TOO_LARGE, message, None, Some("request_too_large"))
    }
}

impl Held<'_> {
    fn add(&mut self, bytes: usize) -> Result<(), Refusal> {
        let of_all = self.intake.held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        self.bytes += bytes;
        if self.bytes > self.intake.max_body {
            return Err(self.intake.too_large());
        }
        if of_all > self.intake.max_bodies {
            let message = "This pod holds as many request bodies as it may (proxy.max_bodies); try again.";
            let mut refusal = Refusal::upstream(StatusCode::SERVICE_UNAVAILABLE, message, "too_many_bodies");
            refusal.headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            return Err(refusal);
        }
        Ok(())
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.intake.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Returns what a caller is told whose body did not come to its end.
fn broken(error: &axum::Error) -> Refusal {
    let mut causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    if causes.any(|error| error.is::<SlowSender>()) {
        let message = "The request's body did not come in time.";
        return Refusal::invalid(StatusCode::REQUEST_TIMEOUT, message, None, Some("request_timeout"));
    }
    Refusal::invalid(StatusCode::BAD_REQUEST, "The request's body broke off.", None, None)
}
