//! One caller's connection, from its handshake to its end.
//!
//! Knows what the caller is at: nothing yet, the middle of a head, requests in flight,
//! between two requests, not reading. Must not know what is asked or answered. The
//! invariant it keeps: whatever a caller leaves undone ends, each in its own time, and
//! a request in flight ends it only if its answer is not read.

mod bodies;
mod bytes;
mod pulse;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower::ServiceExt;

pub(super) use self::bodies::SlowSender;

use self::bodies::{Answering, Arriving};
use self::bytes::Watched;
use self::pulse::{InFlight, Pulse, Verdict};
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
        let mut request = request.map(|body| Body::new(Arriving::new(body, whole, pause)));
        request.extensions_mut().insert(ConnectInfo(from));
        let answer = router.clone().oneshot(request);
        // Boxed: hyper keeps the place of this future until the last byte of its answer is written.
        Box::pin(async move {
            let Ok(response) = answer.await;
            Ok::<_, Infallible>(response.map(|body| Answering::new(body, in_flight)))
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
    let mut io = Watched::new(io, pulse.clone());
    // Whoever says nothing in time is treated as whoever says nothing: see `Verdict`.
    let begins = tokio::time::timeout(within, io.begins());
    tokio::select! {
        biased;
        () = stopped(stop) => return None,
        _ = begins => {}
    }
    if !io.came().is_empty() {
        pulse.heard(io.came());
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
