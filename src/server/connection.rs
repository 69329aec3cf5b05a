//! One caller's connection, from its handshake to its end.
//!
//! Knows what the caller is at: nothing yet, the middle of a head, requests in flight,
//! between two requests, not reading. Must not know what is asked or answered. The
//! invariant it keeps: whatever a caller leaves undone ends, each in its own time, and
//! a request in flight ends it only if its answer is not read.

use std::convert::Infallible;
use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, Request};
use axum::{BoxError, Router};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tower::ServiceExt;

use super::listen::{Door, Stream, stopped};
use super::tls::Tls;
use crate::config::Bounds;

/// How often an HTTP/2 caller is asked whether it is still there, and how long it may take
/// to say so.
const ALIVE_EVERY: Duration = Duration::from_secs(30);
const ALIVE_WITHIN: Duration = Duration::from_secs(20);

/// How long a connection without a whole request may stay once it is to end.
const UNASKED: Duration = Duration::from_secs(2);

/// The least that hyper takes as the bound of its buffers.
const LEAST_BUFFER: usize = 8 << 10;

/// How many lines of a head hyper reads without allocating: for more it takes 64 bytes a line from the
/// heap, with every request, which is time, and leaves gaps that idle streams then fill.
const LINES_ON_STACK: usize = 100;

/// What a caller reads whose head did not end in time: in the shape of most callers, as
/// its path is not known.
const LATE: &[u8] = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: 132\r\n\
connection: close\r\n\r\n{\"error\":{\"message\":\"The request's head did not end in time.\",\
\"type\":\"invalid_request_error\",\"param\":null,\"code\":\"request_timeout\"}}";

/// Lets one connection be served to its end, as a task of its own.
pub(super) fn serve(
    connections: &mut JoinSet<()>,
    io: impl Stream,
    from: SocketAddr,
    router: Router,
    door: Arc<Door>,
    stop: watch::Receiver<bool>,
) {
    // No future that holds either: every idle connection keeps all of its own.
    match door.tls.clone() {
        None => connections.spawn(converse(io, from, router, door, stop)),
        Some(tls) => connections.spawn(secured(io, from, router, tls, door, stop)),
    };
}

async fn secured(
    io: impl Stream,
    from: SocketAddr,
    router: Router,
    tls: Arc<Tls>,
    door: Arc<Door>,
    mut stop: watch::Receiver<bool>,
) {
    let handshake = tokio::time::timeout(door.bounds.handshake, tls.accept(io));
    let accepted = tokio::select! {
        biased;
        () = stopped(&mut stop) => return,
        accepted = handshake => accepted,
    };
    match accepted {
        Ok(Ok(io)) => converse(io, from, router, door, stop).await,
        Ok(Err(error)) => tracing::debug!(%from, %error, "no TLS"),
        Err(_) => tracing::debug!(%from, "no TLS in time"),
    }
}

/// Speaks HTTP until the connection ends.
pub(super) async fn converse<I>(
    io: I,
    from: SocketAddr,
    router: Router,
    door: Arc<Door>,
    mut stop: watch::Receiver<bool>,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let bounds = &door.bounds;
    let pulse = Arc::new(Pulse::new());
    let Some(io) = begun(io, &pulse, bounds.header, &mut stop).await else { return };
    let (asked, whole, pause) = (pulse.clone(), bounds.body, bounds.body_idle);
    let service = service_fn(move |request: Request<Incoming>| {
        let in_flight = InFlight::new(&asked);
        let mut request = request.map(|body| Body::new(Arriving { body, whole, pause, waiting: None }));
        request.extensions_mut().insert(ConnectInfo(from));
        let answer = router.clone().oneshot(request);
        // Boxed: hyper keeps the place of this future until the last byte of its answer is written.
        Box::pin(async move {
            let Ok(response) = answer.await;
            Ok::<_, Infallible>(response.map(|body| Answering { body, _in_flight: in_flight }))
        })
    });
    let io = TokioIo::new(io);
    // Their errors are the caller's: it hung up, or it does not speak HTTP.
    if pulse.http2.load(Ordering::Relaxed) {
        let mut connection = Box::pin(http2(bounds).serve_connection(io, service));
        let _ = attend(connection.as_mut(), &pulse, bounds, stop).await;
        return;
    }
    let connection = pin!(http1(bounds).serve_connection(io, service));
    if attend(connection, &pulse, bounds, stop).await.is_err_and(|error| error.is_parse_too_large()) {
        door.telemetry.turned_away("headers");
    }
}

/// Returns the connection once it is known what is spoken on it; `None` if it is to end first.
async fn begun<I: AsyncRead + Unpin>(
    io: I,
    pulse: &Arc<Pulse>,
    within: Duration,
    stop: &mut watch::Receiver<bool>,
) -> Option<Watched<I>> {
    let mut io = Watched { io, pulse: pulse.clone(), ahead: Ahead::default() };
    // Whoever says nothing in time is treated as whoever says nothing: see `Verdict`.
    let begins = tokio::time::timeout(within, io.begins());
    tokio::select! {
        biased;
        () = stopped(stop) => return None,
        _ = begins => {}
    }
    if !io.ahead.came().is_empty() {
        pulse.heard(io.ahead.came());
    }
    Some(io)
}

/// Lets a connection go on until it ends by itself or is to end.
///
/// By reference: a future that is handed over lies twice in the one that waits for it.
async fn attend<C: GracefulConnection>(
    mut connection: Pin<&mut C>,
    pulse: &Pulse,
    bounds: &Bounds,
    mut stop: watch::Receiver<bool>,
) -> Result<(), C::Error> {
    // Since when it is to end.
    let mut ending: Option<Instant> = None;
    loop {
        let again = match (pulse.verdict(bounds), ending) {
            (Verdict::Unread, _) => return Ok(()),
            (Verdict::Late, _) => {
                pulse.late.store(true, Ordering::Relaxed);
                let _ = tokio::time::timeout(UNASKED, connection).await;
                return Ok(());
            }
            (Verdict::Quiet, None) => {
                // HTTP/2 is told first: a request may be on its way.
                ending = Some(Instant::now());
                connection.as_mut().graceful_shutdown();
                UNASKED
            }
            (_, Some(since)) if since.elapsed() >= UNASKED && pulse.is_quiet_for(UNASKED) => return Ok(()),
            (_, Some(_)) => UNASKED,
            (Verdict::Wait(again), None) => again,
        };
        tokio::select! {
            biased;
            ended = connection.as_mut() => return ended,
            () = stopped(&mut stop), if ending.is_none() => {
                ending = Some(Instant::now());
                connection.as_mut().graceful_shutdown();
            }
            () = tokio::time::sleep(again) => {}
        }
    }
}

/// Returns the bound of a head's bytes: twice what is allowed, up to where the proxy can still
/// say what is wrong.
fn head_bytes(bounds: &Bounds) -> usize {
    bounds.header_bytes.saturating_mul(2)
}

/// Returns the bound of a head's lines: as [`head_bytes`], but without leaving hyper's stack for it.
fn head_lines(bounds: &Bounds) -> usize {
    bounds.headers.saturating_mul(2).min(LINES_ON_STACK).max(bounds.headers)
}

fn http1(bounds: &Bounds) -> http1::Builder {
    let mut server = http1::Builder::new();
    // What its own timer would do does `Pulse`: it tells an idle connection from a slow head.
    server.header_read_timeout(None).max_headers(head_lines(bounds));
    server.max_buf_size(head_bytes(bounds).max(LEAST_BUFFER));
    server
}

fn http2(bounds: &Bounds) -> http2::Builder<TokioExecutor> {
    let mut server = http2::Builder::new(TokioExecutor::new());
    server.timer(TokioTimer::new()).keep_alive_interval(ALIVE_EVERY).keep_alive_timeout(ALIVE_WITHIN);
    server.max_concurrent_streams(bounds.streams);
    server.max_header_list_size(u32::try_from(head_bytes(bounds)).unwrap_or(u32::MAX));
    server
}

/// What a connection is at.
#[derive(Debug)]
struct Pulse {
    accepted: Instant,
    in_flight: AtomicU32,
    /// One of the three below; of meaning without a request in flight.
    state: AtomicU8,
    /// When the state began.
    since_ms: AtomicU64,
    /// When something was last written in [`QUIET`]: the rest of an answer, mostly.
    wrote_ms: AtomicU64,
    /// Since when nothing can be written, plus one; 0: it can.
    stalled_ms: AtomicU64,
    http2: AtomicBool,
    /// The caller is to be told that it is too late.
    late: AtomicBool,
}

/// Nothing has come yet.
const FRESH: u8 = 0;
/// Part of a head has come.
const READING: u8 = 1;
/// Every request was answered.
const QUIET: u8 = 2;

/// What is to become of a connection.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It stays; look again then.
    Wait(Duration),
    /// A head has not ended in time.
    Late,
    /// Nothing was asked for too long.
    Quiet,
    /// What was answered is not read.
    Unread,
}

impl Pulse {
    fn new() -> Self {
        Self {
            accepted: Instant::now(),
            in_flight: AtomicU32::new(0),
            state: AtomicU8::new(FRESH),
            since_ms: AtomicU64::new(0),
            wrote_ms: AtomicU64::new(0),
            stalled_ms: AtomicU64::new(0),
            http2: AtomicBool::new(false),
            late: AtomicBool::new(false),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.accepted.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) == 0
    }

    /// Returns whether nothing was asked, answered or written for some time.
    fn is_quiet_for(&self, time: Duration) -> bool {
        let last = self.since_ms.load(Ordering::Relaxed).max(self.wrote_ms.load(Ordering::Relaxed));
        let quiet = Duration::from_millis(self.now_ms().saturating_sub(last));
        self.is_idle() && self.stalled_ms.load(Ordering::Relaxed) == 0 && quiet >= time
    }

    fn verdict(&self, bounds: &Bounds) -> Verdict {
        let now = self.now_ms();
        let left =
            |since: u64, within: Duration| within.saturating_sub(Duration::from_millis(now.saturating_sub(since)));
        let stalled = self.stalled_ms.load(Ordering::Relaxed);
        if stalled != 0 {
            return match left(stalled - 1, bounds.unread) {
                Duration::ZERO => Verdict::Unread,
                left => Verdict::Wait(left.min(bounds.header)),
            };
        }
        // Nobody is woken when a head begins or writing stalls: it is noticed at the next look.
        let soon = bounds.header.min(bounds.unread);
        if !self.is_idle() {
            return Verdict::Wait(soon);
        }
        let since = self.since_ms.load(Ordering::Relaxed);
        let wrote = since.max(self.wrote_ms.load(Ordering::Relaxed));
        let (since, within, verdict) = match self.state.load(Ordering::Relaxed) {
            // What is written between requests may be a question whether the caller is there.
            _ if self.http2.load(Ordering::Relaxed) => (since, bounds.idle, Verdict::Quiet),
            FRESH => (since, bounds.header, Verdict::Quiet),
            READING => (since, bounds.header, Verdict::Late),
            _ => (wrote, bounds.idle, Verdict::Quiet),
        };
        match left(since, within) {
            Duration::ZERO => verdict,
            left => Verdict::Wait(left.min(soon)),
        }
    }

    /// Notes bytes that came while no request was in flight.
    fn heard(&self, bytes: &[u8]) {
        match self.state.load(Ordering::Relaxed) {
            FRESH => {
                self.http2.store(bytes.starts_with(HTTP2), Ordering::Relaxed);
                self.state.store(READING, Ordering::Relaxed);
            }
            // On HTTP/2 it may be a mere sign of life.
            QUIET if !self.http2.load(Ordering::Relaxed) => {
                self.since_ms.store(self.now_ms(), Ordering::Relaxed);
                self.state.store(READING, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    /// Notes whether bytes could be written.
    fn wrote<T>(&self, written: &Poll<io::Result<T>>) {
        if written.is_pending() {
            let now = self.now_ms() + 1;
            let _ = self.stalled_ms.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
            return;
        }
        if self.stalled_ms.load(Ordering::Relaxed) != 0 {
            self.stalled_ms.store(0, Ordering::Relaxed);
        }
        if self.state.load(Ordering::Relaxed) == QUIET && self.is_idle() {
            self.wrote_ms.store(self.now_ms(), Ordering::Relaxed);
        }
    }
}

/// A request from its head to the end of its answer.
struct InFlight(Arc<Pulse>);

impl InFlight {
    fn new(pulse: &Arc<Pulse>) -> Self {
        pulse.in_flight.fetch_add(1, Ordering::AcqRel);
        Self(pulse.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let pulse = &self.0;
        pulse.since_ms.store(pulse.now_ms(), Ordering::Relaxed);
        pulse.state.store(QUIET, Ordering::Relaxed);
        pulse.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a connection begins with that speaks HTTP/2, and no other (RFC 9113, 3.4).
const HTTP2: &[u8] = b"PRI";

/// A connection's bytes on their way.
struct Watched<I> {
    io: I,
    pulse: Arc<Pulse>,
    ahead: Ahead,
}

/// The first bytes, read to know what is spoken and not yet passed on.
#[derive(Default)]
struct Ahead {
    bytes: [u8; HTTP2.len()],
    len: usize,
}

impl<I: AsyncRead + Unpin> Watched<I> {
    /// Reads until it is known what is spoken, or nothing more comes.
    ///
    /// hyper can find that out as well; but what it has read for it comes before the rest by itself
    /// and doubles the buffer of every connection.
    async fn begins(&mut self) -> io::Result<()> {
        let Ahead { bytes, len } = &mut self.ahead;
        while HTTP2.starts_with(&bytes[..*len]) && *len < HTTP2.len() {
            match self.io.read(&mut bytes[*len..]).await? {
                0 => break,
                came => *len += came,
            }
        }
        Ok(())
    }
}

impl Ahead {
    fn came(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Passes on what fits, and returns whether that was anything.
    fn pass(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        let passed = self.len.min(buf.remaining());
        buf.put_slice(&self.bytes[..passed]);
        self.bytes.copy_within(passed.., 0);
        self.len -= passed;
        passed > 0
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for Watched<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.pulse.late.load(Ordering::Relaxed) {
            // Nothing was written that this could interrupt: no answer is in flight.
            let _ = Pin::new(&mut this.io).poll_write(cx, LATE);
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        let passed = this.ahead.pass(buf);
        match Pin::new(&mut this.io).poll_read(cx, buf) {
            Poll::Pending if passed => {}
            read => ready!(read)?,
        }
        let came = &buf.filled()[before..];
        if !came.is_empty() && this.pulse.is_idle() {
            this.pulse.heard(came);
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.pulse.wrote(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bytes);
        self.pulse.wrote(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// A caller did not send its request's body in time.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlowSender;

impl fmt::Display for SlowSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the caller did not send its request's body in time")
    }
}

impl std::error::Error for SlowSender {}

/// A request's body that must come in time.
struct Arriving {
    body: Incoming,
    /// How long all of it may take.
    whole: Duration,
    /// How long may pass between two pieces.
    pause: Duration,
    /// Set once it was waited for.
    waiting: Option<Waiting>,
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
struct Answering {
    body: Body,
    _in_flight: InFlight,
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
