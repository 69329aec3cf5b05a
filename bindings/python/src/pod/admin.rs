//! The admin endpoints of a pod, on a port of their own if one is configured.
//!
//! Knows the paths of `quotum serve`, those that only read. Must not know what they show. The
//! invariant it keeps: they are open only while this worker owns the pod's rights, so that
//! whoever takes over can have the port.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::time::sleep;

use super::book::Book;
use super::{AGAIN, AGAIN_WRONG, Shared};

/// How often the port is asked for before it is said that it cannot be had: an owner before
/// may not be quite gone.
const TRIES: u32 = 40;

/// One pod, and the book of the worker that owns it.
type Owned = State<(Arc<Shared>, Arc<Book>)>;

/// Serves the endpoints for as long as it is polled.
pub(super) async fn serve(at: SocketAddr, shared: Arc<Shared>, book: Arc<Book>) {
    let mut tries = 0;
    let listener = loop {
        match TcpListener::bind(at).await {
            Ok(listener) => break listener,
            Err(error) => {
                tries += 1;
                if tries == TRIES {
                    eprintln!("quotum: QUOTUM_ADMIN_LISTEN: cannot listen at {at}: {error}; it is tried again");
                }
                sleep(if tries < TRIES { AGAIN } else { AGAIN_WRONG }).await;
            }
        }
    };
    let router = Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state((shared, book));
    // It ends with the runtime.
    let _ = axum::serve(listener, router).await;
}

async fn readyz(State((_, book)): Owned) -> impl IntoResponse {
    match book.limiter().status().ready {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the first exchange with the other replicas is not done\n"),
    }
}

async fn metrics(State((shared, book)): Owned) -> impl IntoResponse {
    let form = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, form)], shared.metrics(&book))
}

async fn status(State((shared, book)): Owned) -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], shared.status(&book))
}
