//! The admin endpoints of a pod, on a port of their own if one is configured.
//!
//! Knows the paths of `quotum serve`. Must not know what they show. The invariants it keeps:
//! they are open only while this worker owns the pod's rights, so that whoever takes over can
//! have the port; and only loopback changes anything.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{ConnectInfo, State};
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use quotum::telemetry::classic;
use serde_json::{Value, json};
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
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/forget", post(forget))
        .with_state((shared, book));
    // It ends with the runtime.
    let _ = axum::serve(listener, router.into_make_service_with_connect_info::<SocketAddr>()).await;
}

/// Declares a replica dead that an operator knows to be: `quotum forget REPLICA --admin URL`.
async fn forget(State((_, book)): Owned, ConnectInfo(from): ConnectInfo<SocketAddr>, body: String) -> Answer {
    if !from.ip().to_canonical().is_loopback() {
        return (StatusCode::UNAUTHORIZED, wrong("forgetting a replica needs a connection from loopback"));
    }
    let body: Value = serde_json::from_str(&body).unwrap_or_default();
    let Some(replica) = body["replica"].as_str() else {
        return (StatusCode::BAD_REQUEST, wrong("send {\"replica\": \"<id or address>\"} as JSON"));
    };
    match book.limiter().forget(replica) {
        Ok(forgotten) => (StatusCode::OK, json!({"forgotten": forgotten}).to_string()),
        Err(error) => (StatusCode::NOT_FOUND, wrong(&error.to_string())),
    }
}

type Answer = (StatusCode, String);

fn wrong(message: &str) -> String {
    json!({"error": {"message": message}}).to_string()
}

async fn livez(State((_, book)): Owned) -> Answer {
    match book.limiter().status().stuck() {
        None => (StatusCode::OK, "alive\n".to_owned()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

async fn readyz(State((_, book)): Owned) -> impl IntoResponse {
    match book.limiter().status().ready {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the first exchange with the other replicas is not done\n"),
    }
}

async fn metrics(State((shared, book)): Owned, headers: HeaderMap) -> impl IntoResponse {
    let metrics = shared.metrics(&book);
    let accept = headers.get_all(ACCEPT).iter().filter_map(|accept| accept.to_str().ok());
    if accept.into_iter().any(|accept| accept.contains("application/openmetrics-text")) {
        ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], metrics)
    } else {
        ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], classic(&metrics))
    }
}

async fn status(State((shared, book)): Owned) -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], shared.status(&book))
}
