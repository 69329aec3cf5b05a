//! The body of an answer, and in it the reservation that pays for it.
//!
//! Knows when an answer has ended, broken off or been dropped. Must not know how it is
//! sent. The invariant it keeps: the reservation is settled as soon as the use is known
//! and at the latest when the body is gone, whichever way it goes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::dialect::Dialect;
use super::metering::Charge;
use super::sse::Events;

/// Why a body broke off.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The longest answer that is kept to read its usage at the end.
const MAX_ANSWER: usize = 8 << 20;

/// From where an answer breaks off to its end: hyper throws away what it has not written when a
/// body fails, the head as well as a stream's last words, and on a connection that is read this
/// is long enough to write it.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// How the answer comes.
#[derive(Debug)]
pub enum Form {
    /// In one piece; the usage is in it.
    Whole {
        /// What came of it so far.
        answer: Vec<u8>,
        /// Its status says that it failed.
        failed: bool,
    },
    /// As server-sent events.
    Stream {
        /// Where it is cut.
        events: Events,
        /// The caller did not ask for the event that carries usage alone.
        hide_usage: bool,
    },
    /// In an encoding that nobody asked for: it passes unread.
    Unreadable,
}

impl Form {
    /// Returns the form of an answer in one piece.
    pub fn whole(failed: bool) -> Self {
        Self::Whole { answer: Vec::new(), failed }
    }

    /// Returns the form of an answer in events.
    pub fn stream(hide_usage: bool) -> Self {
        Self::Stream { events: Events::default(), hide_usage }
    }
}

/// An answer's body with its reservation: settled with the use as soon as it is known, and at
/// the latest when the body ends, fails or is dropped.
#[derive(Debug)]
pub struct Metered<B> {
    inner: B,
    charge: Charge,
    dialect: Arc<dyn Dialect>,
    form: Form,
    silence: Silence,
    /// What is still to be said before the body ends or fails.
    end: End,
}

/// How long nothing may come, and since when nothing has.
///
/// The timer is set when it is first waited for, and again only when it has run out: most pieces
/// cost a look at the clock.
#[derive(Debug)]
struct Silence {
    most: Duration,
    since: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Silence {
    fn new(most: Duration) -> Self {
        Self { most, since: Instant::now(), timer: None }
    }

    /// Notes that something came.
    fn broken(&mut self) {
        self.since = Instant::now();
    }

    /// Resolves once nothing has come for too long.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(ends) = self.since.checked_add(self.most) else { return Poll::Pending };
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(ends)));
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= ends {
                return Poll::Ready(());
            }
            timer.as_mut().reset(ends);
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    NotYet,
    Failing(&'static str),
    Done,
}

impl<B: Body<Data = Bytes>> Metered<B> {
    /// Returns the body with the reservation that pays for it.
    #[doc(hidden)]
    pub fn new(inner: B, mut charge: Charge, dialect: Arc<dyn Dialect>, form: Form, idle: Duration) -> Self {
        let is_stream = matches!(form, Form::Stream { .. });
        if is_stream {
            charge.stream();
        }
        let mut this = Self { inner, charge, dialect, form, silence: Silence::new(idle), end: End::NotYet };
        if !is_stream && this.inner.is_end_stream() {
            // Nobody asks for the body of an answer that has none.
            this.ended();
        }
        this
    }
}

impl<B> Metered<B> {
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
            Form::Stream { events, hide_usage } => {
                events.push(bytes, |event| note(charge, &**dialect, *hide_usage, event))
            }
            Form::Unreadable => bytes,
        }
    }

    /// Settles an answer that has come to its end, and returns what of it was held back.
    fn ended(&mut self) -> Bytes {
        let (charge, dialect) = (&mut self.charge, &self.dialect);
        let mut rest = Bytes::new();
        match &mut self.form {
            Form::Stream { events, hide_usage } => {
                rest = events.rest(|event| note(charge, &**dialect, *hide_usage, event));
                charge.settle();
            }
            _ if charge.is_settled() => {}
            Form::Whole { answer, failed } => {
                if answer.len() <= MAX_ANSWER {
                    charge.told(dialect.report(answer));
                }
                if *failed {
                    charge.settle_failed();
                } else {
                    if !charge.is_told() {
                        charge.streamed(dialect.text_bytes(answer));
                    }
                    charge.settle();
                }
            }
            Form::Unreadable => charge.settle_unreadable(),
        }
        rest
    }

    /// Settles an answer that broke off and returns the last words for the caller, if it has a
    /// form that takes some. It fails a moment later, so that the head is written, too.
    fn broke(&mut self, why: &'static str) -> Option<Bytes> {
        let words = match &self.form {
            Form::Stream { .. } => {
                self.charge.settle_failed();
                Some(self.dialect.cut(why).into())
            }
            Form::Whole { answer, .. } => {
                self.charge.streamed(answer.len() as u64);
                self.charge.settle_failed();
                None
            }
            Form::Unreadable => {
                self.charge.settle_unreadable();
                None
            }
        };
        self.end = End::Failing(why);
        self.silence = Silence::new(LAST_WORDS);
        words
    }
}

/// Notes what an event says and returns whether the caller gets it.
fn note(charge: &mut Charge, dialect: &dyn Dialect, hide_usage: bool, event: &[u8]) -> bool {
    let event = dialect.event(event);
    charge.streamed(event.text_bytes);
    charge.told(event.report);
    if event.failed {
        charge.settle_failed();
    } else if event.last {
        // Before the last event leaves: the caller's next request finds what this one gave
        // back.
        charge.settle();
    }
    !(event.only_usage && hide_usage)
}

impl<B> Body for Metered<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        loop {
            match this.end {
                End::NotYet => {}
                End::Failing(why) => {
                    ready!(this.silence.poll(cx));
                    this.end = End::Done;
                    return Poll::Ready(Some(Err(why.into())));
                }
                End::Done => return Poll::Ready(None),
            }
            let why = match Pin::new(&mut this.inner).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    this.silence.broken();
                    let Ok(bytes) = frame.into_data() else { continue };
                    let passed = this.read(bytes);
                    if !matches!(this.form, Form::Stream { .. }) && this.inner.is_end_stream() {
                        // Settled before the last byte leaves: the caller's next request finds
                        // what this one gave back.
                        this.ended();
                    }
                    if passed.is_empty() {
                        continue;
                    }
                    return Poll::Ready(Some(Ok(Frame::data(passed))));
                }
                Poll::Ready(None) => {
                    let rest = this.ended();
                    this.end = End::Done;
                    return Poll::Ready((!rest.is_empty()).then(|| Ok(Frame::data(rest))));
                }
                Poll::Ready(Some(Err(_))) => "the upstream broke off its answer",
                Poll::Pending => {
                    ready!(this.silence.poll(cx));
                    "the upstream stopped in the middle of its answer"
                }
            };
            if let Some(words) = this.broke(why) {
                return Poll::Ready(Some(Ok(Frame::data(words))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self.form {
            Form::Whole { .. } | Form::Unreadable => {
                self.end == End::Done || (self.end == End::NotYet && self.inner.is_end_stream())
            }
            Form::Stream { .. } => self.end == End::Done,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self.form {
            Form::Whole { .. } | Form::Unreadable => self.inner.size_hint(),
            Form::Stream { .. } => SizeHint::default(),
        }
    }
}
