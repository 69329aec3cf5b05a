//! The bodies of a request and of its answer, as a connection carries them.
//!
//! Knows how long a request's body may take, and that a request is in flight until the last byte
//! of its answer. Must not know what is in them. The invariant it keeps: a body that does not come
//! in time ends with an error that says so.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, Bytes};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use super::pulse::InFlight;

/// A caller did not send its request's body in time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlowSender;

impl fmt::Display for SlowSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the caller did not send its request's body in time")
    }
}

impl std::error::Error for SlowSender {}

/// A request's body that must come in time.
pub(super) struct Arriving {
    body: Incoming,
    /// How long all of it may take.
    whole: Duration,
    /// How long may pass between two pieces.
    pause: Duration,
    /// Set once it was waited for.
    waiting: Option<Waiting>,
}

impl Arriving {
    pub(super) fn new(body: Incoming, whole: Duration, pause: Duration) -> Self {
        Self { body, whole, pause, waiting: None }
    }
}

struct Waiting {
    /// When all of it must have come.
    ends: Instant,
    silence: Pin<Box<Sleep>>,
    /// Something came since `silence` was set.
    came: bool,
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            if let Some(waiting) = &mut this.waiting {
                waiting.came = true;
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)));
        }
        let waiting = this.waiting.get_or_insert_with(|| {
            let ends = Instant::now() + this.whole;
            Waiting { ends, silence: Box::pin(tokio::time::sleep_until(ends)), came: true }
        });
        if waiting.came {
            waiting.silence.as_mut().reset(waiting.ends.min(Instant::now() + this.pause));
            waiting.came = false;
        }
        ready!(waiting.silence.as_mut().poll(cx));
        Poll::Ready(Some(Err(SlowSender.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body that says by being there that it is still under way.
pub(super) struct Answering {
    body: Body,
    _in_flight: InFlight,
}

impl Answering {
    pub(super) fn new(body: Body, in_flight: InFlight) -> Self {
        Self { body, _in_flight: in_flight }
    }
}

impl http_body::Body for Answering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
