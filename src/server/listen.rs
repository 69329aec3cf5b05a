//! Listening: where, how many, and until when.
//!
//! Knows addresses and how many connections there are. Must not know what is spoken on
//! them. The invariants it keeps: an address that cannot be had is an error that names
//! it; and there are never more connections than the bound.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use axum::Router;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::connection;
use super::tls::Tls;
use crate::cluster::complaints::Complaints;
use crate::config::{Bounds, Listen};
use crate::telemetry::Telemetry;

/// How long to wait when the operating system has no connection to give, mostly because
/// the process may open no more files.
pub(super) const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

/// What a caller reads that is one too many; a load balancer goes to another pod.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
content-length: 146\r\nconnection: close\r\n\r\n{\"error\":{\"message\":\"This pod serves as many connections as it \
may; try again.\",\"type\":\"server_error\",\"param\":null,\"code\":\"too_many_connections\"}}";

/// Where connections come from: a port of this machine, or of a simulated one.
pub trait Listener: Send + 'static {
    /// A caller's connection.
    type Stream: Stream;

    /// Returns the next connection and who made it.
    ///
    /// # Cancel safety
    /// Dropping the future loses no connection.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Stream, SocketAddr)>> + Send;
}

/// A caller's connection, on which nothing was spoken yet.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Returns the first byte that comes, which is still there to be read; `None` at the end.
    fn first(&mut self) -> impl Future<Output = io::Result<Option<u8>>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        let (io, from) = Self::accept(self).await?;
        // Small answers must not wait for acknowledgements; without it they are only slow.
        let _ = io.set_nodelay(true);
        Ok((io, from))
    }
}

impl Stream for TcpStream {
    async fn first(&mut self) -> io::Result<Option<u8>> {
        let mut first = [0];
        let came = self.peek(&mut first).await?;
        Ok((came > 0).then_some(first[0]))
    }
}

/// What callers meet at a port.
#[derive(Debug)]
pub(super) struct Door {
    /// `None`: plain HTTP.
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) bounds: Bounds,
    pub(super) telemetry: Arc<Telemetry>,
}

/// Binds a port.
///
/// # Errors
/// If it is in use, or the address is not this machine's.
pub(super) async fn bind(listen: Listen) -> io::Result<TcpListener> {
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
pub(super) fn name(listen: Listen) -> String {
    match listen {
        Listen::At(at) => at.to_string(),
        Listen::Everywhere(port) => format!("[::]:{port}"),
    }
}

/// Serves until `stop` turns true, then lets the requests in flight end.
pub(super) async fn serve(
    mut listener: impl Listener,
    router: Router,
    door: Door,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let door = Arc::new(door);
    let mut connections = JoinSet::new();
    let mut complaints = Complaints::default();
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stop) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((io, _)) if connections.len() >= door.bounds.connections => {
                    if let Some(times) = complaints.note("full", Instant::now()) {
                        let event = "connections_full";
                        let bound = door.bounds.connections;
                        tracing::warn!(
                            event,
                            bound,
                            times,
                            "connections are refused: there are max_connections of them; counted, and said once a minute"
                        );
                    }
                    door.telemetry.turned_away("connections");
                    refuse(io, door.tls.is_some());
                }
                Ok((io, from)) => {
                    connection::serve(&mut connections, io, from, router.clone(), door.clone(), stop.clone());
                }
                Err(error) if is_callers(&error) => {}
                Err(error) => {
                    if let Some(times) = complaints.note("accept", Instant::now()) {
                        let event = "accept_failed";
                        tracing::error!(event, %error, times, "a connection could not be accepted; said once a minute");
                    }
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// Says no without waiting for anything: with words, where they need no handshake.
fn refuse(mut io: impl Stream, has_tls: bool) {
    if !has_tls {
        say_at_once(&mut io, FULL);
    }
}

/// Writes what can be written without waiting.
pub(super) fn say_at_once(io: &mut impl Stream, words: &[u8]) {
    let _ = Pin::new(io).poll_write(&mut Context::from_waker(Waker::noop()), words);
}

/// Resolves once `stop` is true.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A sender that is gone is a process that ends.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Returns whether the caller gave up before its connection was accepted.
fn is_callers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
