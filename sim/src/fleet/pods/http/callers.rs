//! The host that callers are on: it sends what it is told to and says what it heard.
//!
//! Knows HTTP. Must not know pods, limits or what an answer should be. The invariant it
//! keeps: of every request exactly one thing is said in the end, and never by a timeout.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::sync::mpsc;

use super::net::Dial;

/// A request to be sent.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) number: u64,
    pub(super) to: SocketAddr,
    pub(super) body: String,
    pub(super) headers: Vec<(&'static str, String)>,
    /// On a connection of its own.
    pub(super) fresh: bool,
    /// The caller is gone after this.
    pub(super) hangs_up: Option<Duration>,
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// An answer with this status, to its end.
    Whole(u16),
    /// One that broke off.
    Broken(u16),
    /// The connection ended without one, or could not be made.
    Nothing,
    /// The caller did not wait for it.
    HungUp,
}

/// What was heard since somebody looked, by the request's number.
pub(super) type Told = Rc<RefCell<Vec<(u64, Heard)>>>;

/// Sends what comes, for ever.
pub(super) async fn run(mut asks: mpsc::UnboundedReceiver<Ask>, told: Told) -> turmoil::Result {
    let dial = Dial { within: Duration::from_secs(1), canary: None };
    let client = |idle: usize| {
        let mut builder = Client::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_max_idle_per_host(idle);
        // A request that is sent twice must be the pod's doing.
        builder.retry_canceled_requests(false).build::<_, Full<Bytes>>(dial)
    };
    let (keeps, fresh) = (client(64), client(0));
    while let Some(ask) = asks.recv().await {
        let client = if ask.fresh { fresh.clone() } else { keeps.clone() };
        let told = Rc::clone(&told);
        tokio::task::spawn_local(async move {
            let (number, hangs_up) = (ask.number, ask.hangs_up);
            let asking = asked(client, ask);
            let heard = match hangs_up {
                Some(after) => tokio::time::timeout(after, asking).await.unwrap_or(Heard::HungUp),
                None => asking.await,
            };
            told.borrow_mut().push((number, heard));
        });
    }
    Ok(())
}

async fn asked(client: Client<Dial, Full<Bytes>>, ask: Ask) -> Heard {
    let uri = format!("http://{}/v1/chat/completions", ask.to);
    let mut request = Request::builder().method(Method::POST).uri(uri).header(header::CONTENT_TYPE, "application/json");
    for (name, value) in &ask.headers {
        request = request.header(*name, value);
    }
    let request = request.body(Full::new(ask.body.into())).expect("a plan's request can be written");
    let Ok(answer) = client.request(request).await else { return Heard::Nothing };
    let status = answer.status().as_u16();
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        if frame.is_err() {
            return Heard::Broken(status);
        }
    }
    Heard::Whole(status)
}
