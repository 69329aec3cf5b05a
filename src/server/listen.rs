//! Listening: where, and until when.
//!
//! Knows addresses and connections. Must not know what is served. The invariants it
//! keeps: an address that cannot be had is an error that names it; and neither a caller
//! that says nothing nor one that never finishes its request can keep a pod from stopping.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, Request};
use axum::{BoxError, Router};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tower::ServiceExt;

use crate::config::Listen;

/// How long the head of a request may take, and so how long a connection is kept between
/// two requests: over the 60 s for which load balancers commonly keep theirs.
const HEAD_WITHIN: Duration = Duration::from_secs(75);

/// How long a request's body may pause.
const BODY_IDLE: Duration = Duration::from_secs(30);

/// How often an HTTP/2 caller is asked whether it is still there, and how long it may take
/// to say so.
const ALIVE_EVERY: Duration = Duration::from_secs(30);
const ALIVE_WITHIN: Duration = Duration::from_secs(20);

/// How long a connection without a whole request may stay once we are stopping.
const UNASKED: Duration = Duration::from_secs(2);

/// How long to wait when the operating system has no connection to give, mostly because
/// the process may open no more files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

/// Binds a port.
///
/// # Errors
/// If it is in use, or the address is not this machine's.
pub(crate) async fn bind(listen: Listen) -> io::Result<TcpListener> {
    match listen {
        Listen::At(at) => TcpListener::bind(at).await,
        Listen::Everywhere(port) => match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                // A machine without IPv6.
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
            }
            bound => bound,
        },
    }
}

/// Returns what to call the address in an error.
pub(crate) fn name(listen: Listen) -> String {
    match listen {
        Listen::At(at) => at.to_string(),
        Listen::Everywhere(port) => format!("[::]:{port}"),
    }
}

/// Serves until `stop` turns true, then lets the requests in flight end.
pub(crate) async fn serve(listener: TcpListener, router: Router, mut stop: watch::Receiver<bool>) -> io::Result<()> {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stop) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((io, from)) => {
                    // Small answers must not wait for acknowledgements; without it they are only slow.
                    let _ = io.set_nodelay(true);
                    connections.spawn(converse(io, from, router.clone(), stop.clone()));
                }
                Err(error) if is_callers(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A sender that is gone is a process that ends.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Returns whether the caller gave up before its connection was accepted.
fn is_callers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Serves one connection to its end.
async fn converse(io: TcpStream, from: SocketAddr, router: Router, mut stop: watch::Receiver<bool>) {
    // Every request in flight holds a share of it.
    let in_flight = Arc::new(());
    let count = Arc::downgrade(&in_flight);
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, in_flight) = (router.clone(), in_flight.clone());
        async move {
            let mut request = request.map(|body| Body::new(Arriving { body, silence: None }));
            request.extensions_mut().insert(ConnectInfo(from));
            let Ok(response) = router.oneshot(request).await;
            Ok::<_, Infallible>(response.map(|body| Answering { body, _in_flight: in_flight }))
        }
    });
    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN);
    let mut http2 = server.http2();
    http2.timer(TokioTimer::new()).keep_alive_interval(ALIVE_EVERY).keep_alive_timeout(ALIVE_WITHIN);
    let mut connection = pin!(server.serve_connection(TokioIo::new(io), service));
    tokio::select! {
        biased;
        // Its errors are the caller's: it hung up, or it does not speak HTTP.
        _ = connection.as_mut() => return,
        () = stopped(&mut stop) => {}
    }
    connection.as_mut().graceful_shutdown();
    loop {
        tokio::select! {
            biased;
            _ = connection.as_mut() => return,
            // The service itself holds one share.
            () = tokio::time::sleep(UNASKED) => if count.strong_count() <= 1 { return },
        }
    }
}

/// A request's body that ends when nothing comes any more.
struct Arriving {
    body: Incoming,
    /// Set while it is waited for.
    silence: Option<Pin<Box<Sleep>>>,
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            this.silence = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)));
        }
        let silence = this.silence.get_or_insert_with(|| Box::pin(tokio::time::sleep(BODY_IDLE)));
        ready!(silence.as_mut().poll(cx));
        Poll::Ready(Some(Err("the caller stopped in the middle of its request".into())))
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
    _in_flight: Arc<()>,
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
