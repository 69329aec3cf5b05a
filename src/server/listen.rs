//! Listening: where, how many, and until when.
//!
//! Knows addresses and how many connections there are. Must not know what is spoken on
//! them. The invariants it keeps: an address that cannot be had is an error that names
//! it; and there are never more connections than the bound.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::connection;
use super::tls::Tls;
use crate::config::{Bounds, Listen};
use crate::telemetry::Telemetry;

/// How long to wait when the operating system has no connection to give, mostly because
/// the process may open no more files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

/// What a caller reads that is one too many; a load balancer goes to another pod.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
content-length: 146\r\nconnection: close\r\n\r\n{\"error\":{\"message\":\"This pod serves as many connections as it \
may; try again.\",\"type\":\"server_error\",\"param\":null,\"code\":\"too_many_connections\"}}";

/// What callers meet at a port.
#[derive(Debug)]
pub(crate) struct Door {
    /// `None`: plain HTTP.
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) bounds: Bounds,
    pub(crate) telemetry: Arc<Telemetry>,
}

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
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    door: Door,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let door = Arc::new(door);
    let mut connections = JoinSet::new();
    let mut is_full = false;
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stop) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((io, _)) if connections.len() >= door.bounds.connections => {
                    if !std::mem::replace(&mut is_full, true) {
                        let bound = door.bounds.connections;
                        tracing::warn!(bound, "connections are refused: there are max_connections of them");
                    }
                    door.telemetry.turned_away("connections");
                    refuse(&io, door.tls.is_some());
                }
                Ok((io, from)) => {
                    is_full = false;
                    // Small answers must not wait for acknowledgements; without it they are only slow.
                    let _ = io.set_nodelay(true);
                    connections.spawn(connection::serve(io, from, router.clone(), door.clone(), stop.clone()));
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

/// Says no without waiting for anything: with words, where they need no handshake.
fn refuse(io: &TcpStream, has_tls: bool) {
    if !has_tls {
        let _ = io.try_write(FULL);
    }
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
