//! Callers of an HTTP API, as many at once as it takes.
//!
//! Knows connections, requests and how long answers take. Must not know what they mean. The
//! invariants it keeps: an open loop sends what is due, whatever became of what was sent
//! before; and a connection is used again only once its answer was read to the end.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// What may go wrong on the way.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Where requests go, and the connections there.
#[derive(Debug)]
pub struct Callers {
    to: SocketAddr,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// A request: where it goes and what it carries.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The path; empty to `GET` nothing.
    pub path: &'static str,
    /// Headers beside those that every request has.
    pub headers: Vec<(&'static str, String)>,
    /// The body; empty: a `GET`.
    pub body: Bytes,
}

/// An answer that has begun.
#[derive(Debug)]
pub struct Begun {
    /// The answer, its body still to come. Dropped with the rest, the caller hangs up.
    pub answer: Response<Incoming>,
    connection: SendRequest<Full<Bytes>>,
}

impl Callers {
    /// Returns callers of the server at this address.
    pub fn new(to: SocketAddr) -> Self {
        Self { to, idle: Mutex::default() }
    }

    /// Sends a request and returns the answer as soon as it begins.
    ///
    /// # Errors
    /// If there is none.
    ///
    /// # Cancel safety
    /// Dropping the future hangs up.
    pub async fn send(&self, ask: &Ask) -> Result<Begun, Failure> {
        let request = Request::builder().uri(ask.path).header(HOST, "bench").header(CONTENT_TYPE, "application/json");
        let request = request.method(if ask.body.is_empty() { "GET" } else { "POST" });
        let request = ask.headers.iter().fold(request, |request, (name, value)| request.header(*name, value));
        let request = request.body(Full::new(ask.body.clone()))?;
        let mut connection = self.connection().await?;
        let answer = connection.send_request(request).await?;
        Ok(Begun { answer, connection })
    }

    /// Sends a request and returns its whole answer.
    ///
    /// # Errors
    /// If there is none, or it breaks off.
    pub async fn ask(&self, ask: &Ask) -> Result<Response<Bytes>, Failure> {
        let Begun { answer, connection } = self.send(ask).await?;
        let (head, body) = answer.into_parts();
        let body = body.collect().await?.to_bytes();
        self.idle().push(connection);
        Ok(Response::from_parts(head, body))
    }

    /// Closes the connections that are not in use.
    pub fn close(&self) {
        self.idle().clear();
    }

    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>, Failure> {
        loop {
            let Some(mut connection) = self.idle().pop() else { break };
            if connection.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        let io = TcpStream::connect(self.to).await?;
        io.set_nodelay(true)?;
        let (connection, driver) = handshake(TokioIo::new(io)).await?;
        // Its errors are those of the requests on it.
        tokio::spawn(driver);
        Ok(connection)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<SendRequest<Full<Bytes>>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Calls `send` with the number of each request when it is due, so often a second for so long.
pub async fn open_loop(per_second: f64, length: Duration, mut send: impl FnMut(u64)) {
    let begun = Instant::now();
    let mut sent = 0;
    while begun.elapsed() < length {
        let due = (begun.elapsed().as_secs_f64() * per_second) as u64;
        while sent < due {
            send(sent);
            sent += 1;
        }
        // The runtime's clock ticks once a millisecond.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
