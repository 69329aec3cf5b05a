//! Listening: where, and until when.
//!
//! Knows addresses and connections. Must not know what is served. The invariant it
//! keeps: an address that cannot be had is an error that names it.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use axum::Router;
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::config::Listen;

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
    let listener = listener.tap_io(|io| {
        // Small answers must not wait for acknowledgements; without it they are only slow.
        let _ = io.set_nodelay(true);
    });
    let stopped = async move {
        // A sender that is gone is a process that ends.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    axum::serve(listener, service).with_graceful_shutdown(stopped).await
}
