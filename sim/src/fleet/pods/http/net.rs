//! Both ends of simulated TCP, as the server takes them: a port, a connection, and who dials.
//!
//! Knows turmoil's sockets. Must not know what is spoken on them. The invariant it keeps: it
//! adds nothing: every byte, delay and loss is the simulated network's.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use quotum::server::listen::{Listener, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tower_service::Service;
use turmoil::net::{TcpListener, TcpStream};

use crate::canary::Canary;

/// The TCP port of every pod and upstream.
pub(super) const PORT: u16 = 80;

/// A port of a simulated host.
pub(super) struct Port(TcpListener);

impl Port {
    pub(super) async fn bind() -> io::Result<Self> {
        TcpListener::bind(("0.0.0.0", PORT)).await.map(Self)
    }
}

impl Listener for Port {
    type Stream = Line;

    async fn accept(&mut self) -> io::Result<(Line, SocketAddr)> {
        let (stream, from) = self.0.accept().await?;
        Ok((Line { stream, deaf: false }, from))
    }
}

/// One end of a connection.
pub(super) struct Line {
    stream: TcpStream,
    /// A canary's: events that bring text are taken for comments.
    deaf: bool,
}

impl Stream for Line {
    async fn first(&mut self) -> io::Result<Option<u8>> {
        let mut first = [0];
        let came = self.stream.peek(&mut first).await?;
        Ok((came > 0).then_some(first[0]))
    }
}

impl AsyncRead for Line {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if self.deaf {
            let came = &mut buf.filled_mut()[before..];
            let (mut event, mut silenced) = (0, Vec::new());
            for at in 0..came.len() {
                if came[at..].starts_with(EVENT) {
                    event = at;
                } else if came[at..].starts_with(TEXT) {
                    silenced.push(event);
                }
            }
            // A line that begins so is a comment.
            silenced.into_iter().for_each(|at| came[at] = b':');
        }
        read
    }
}

/// How an event begins, and what is in one that brings text.
const EVENT: &[u8] = b"data: {";
const TEXT: &[u8] = b"\"word ";

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connection for Line {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// Who connects a host to another one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dial {
    pub(super) within: Duration,
    pub(super) canary: Option<Canary>,
}

impl Service<Uri> for Dial {
    type Response = TokioIo<Line>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<Line>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let Self { within, canary } = *self;
        Box::pin(async move {
            let host = to.host().ok_or(io::ErrorKind::InvalidInput)?;
            let addr = SocketAddr::new(host.parse().map_err(io::Error::other)?, to.port_u16().unwrap_or(PORT));
            // Nobody refuses for a network that is cut: turmoil does at once, a real one in time.
            let stream = tokio::time::timeout(within, TcpStream::connect(addr)).await??;
            Ok(TokioIo::new(Line { stream, deaf: canary == Some(Canary::StreamNotCounted) }))
        })
    }
}
