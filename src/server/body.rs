//! The body of an answer, and in it the reservation that pays for it.
//!
//! Knows when an answer has ended, broken off or been dropped. Must not know how it is
//! sent. The invariant it keeps: the reservation is settled as soon as the use is known
//! and at the latest when the body is gone, whichever way it goes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::BoxError;
use axum::body::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::dialect::{Dialect, Usage};
use super::metering::Charge;
use super::refusal;
use super::sse::Events;

/// The longest answer that is kept to read its usage at the end.
const MAX_ANSWER: usize = 8 << 20;

/// How the answer comes.
#[derive(Debug)]
pub(super) enum Form {
    /// In one piece; the usage is in it.
    Whole { answer: Vec<u8>, failed: bool },
    /// As server-sent events.
    Stream { events: Events, hide_usage: bool, usage: Option<Usage> },
}

impl Form {
    pub(super) fn whole(failed: bool) -> Self {
        Self::Whole { answer: Vec::new(), failed }
    }

    pub(super) fn stream(hide_usage: bool) -> Self {
        Self::Stream { events: Events::default(), hide_usage, usage: None }
    }
}

/// An answer's body with its reservation.
pub(super) struct Metered<B> {
    inner: B,
    charge: Charge,
    dialect: Arc<dyn Dialect>,
    form: Form,
    idle: Duration,
    silence: Pin<Box<Sleep>>,
    /// What is still to be said before the body ends or fails.
    end: End,
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    NotYet,
    Failing(&'static str),
    Done,
}

impl<B> Metered<B> {
    pub(super) fn new(inner: B, mut charge: Charge, dialect: Arc<dyn Dialect>, form: Form, idle: Duration) -> Self {
        if matches!(form, Form::Stream { .. }) {
            charge.stream();
        }
        Self { inner, charge, dialect, form, idle, silence: Box::pin(tokio::time::sleep(idle)), end: End::NotYet }
    }

    /// Reads a piece of the answer and returns what of it the caller gets.
    fn read(&mut self, bytes: Bytes) -> Bytes {
        let (charge, dialect) = (&mut self.charge, &self.dialect);
        match &mut self.form {
            Form::Whole { answer, .. } => {
                if !charge.is_settled() && answer.len() <= MAX_ANSWER {
                    answer.extend_from_slice(&bytes);
                }
                bytes
            }
            Form::Stream { events, hide_usage, usage } => events.push(bytes, |data| {
                if data == b"[DONE]" {
                    settle_stream(charge, *usage);
                    return true;
                }
                let event = dialect.event(data);
                charge.streamed(event.text_bytes);
                // Some upstreams report with every chunk what was used so far: the last
                // report counts, and one without text is the last.
                *usage = event.usage.or(*usage);
                if event.only_usage {
                    settle_stream(charge, *usage);
                }
                !(event.only_usage && *hide_usage)
            }),
        }
    }

    /// Settles an answer that has come to its end.
    fn ended(&mut self) {
        if self.charge.is_settled() {
            return;
        }
        match &mut self.form {
            Form::Whole { answer, failed } => {
                let whole = answer.len() <= MAX_ANSWER;
                match self.dialect.usage(answer).filter(|_| whole) {
                    Some(usage) => self.charge.settle(usage),
                    None if *failed => self.charge.settle_failed(),
                    None => {
                        self.charge.streamed(self.dialect.text_bytes(answer));
                        self.charge.settle_unreported();
                    }
                }
            }
            Form::Stream { usage, .. } => settle_stream(&mut self.charge, *usage),
        }
    }

    /// Settles an answer that broke off and returns the last words for the caller.
    fn broke(&mut self, why: &'static str) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.form {
            Form::Stream { usage: Some(usage), .. } => self.charge.settle(*usage),
            Form::Stream { usage: None, .. } => self.charge.settle_failed(),
            Form::Whole { answer, .. } => {
                self.charge.streamed(answer.len() as u64);
                self.charge.settle_failed();
            }
        }
        if matches!(self.form, Form::Stream { .. }) {
            self.end = End::Failing(why);
            let event = format!("data: {}\n\n", refusal::body(why, "server_error", None, Some("upstream_cut")));
            return Poll::Ready(Some(Ok(Frame::data(event.into()))));
        }
        self.end = End::Done;
        Poll::Ready(Some(Err(why.into())))
    }
}

fn settle_stream(charge: &mut Charge, usage: Option<Usage>) {
    match usage {
        Some(usage) => charge.settle(usage),
        None => charge.settle_unreported(),
    }
}

impl<B> Body for Metered<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        match this.end {
            End::NotYet => {}
            End::Failing(why) => {
                this.end = End::Done;
                return Poll::Ready(Some(Err(why.into())));
            }
            End::Done => return Poll::Ready(None),
        }
        loop {
            let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(cx) else {
                ready!(this.silence.as_mut().poll(cx));
                return this.broke("the upstream stopped in the middle of its answer");
            };
            let frame = match frame {
                None => {
                    this.ended();
                    this.end = End::Done;
                    let rest = match &mut this.form {
                        Form::Stream { events, .. } => events.rest(),
                        Form::Whole { .. } => Bytes::new(),
                    };
                    return Poll::Ready((!rest.is_empty()).then(|| Ok(Frame::data(rest))));
                }
                Some(Err(_)) => return this.broke("the upstream broke off its answer"),
                Some(Ok(frame)) => frame,
            };
            this.silence.as_mut().reset(Instant::now() + this.idle);
            let Ok(bytes) = frame.into_data() else { continue };
            let passed = this.read(bytes);
            if matches!(this.form, Form::Whole { .. }) && this.inner.is_end_stream() {
                // Settled before the last byte leaves: the caller's next request finds
                // what this one gave back.
                this.ended();
            }
            if !passed.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(passed))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self.form {
            Form::Whole { .. } => self.end == End::Done || (self.end == End::NotYet && self.inner.is_end_stream()),
            Form::Stream { .. } => self.end == End::Done,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self.form {
            Form::Whole { .. } => self.inner.size_hint(),
            Form::Stream { .. } => SizeHint::default(),
        }
    }
}
