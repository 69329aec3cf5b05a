//! A connection's bytes on their way, which tell its pulse.
//!
//! Knows the first bytes, by which it is known what is spoken. Must not know requests. The
//! invariant it keeps: bytes pass unchanged and in order, the first ones as well.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::pulse::{HTTP2, Pulse};

/// What a caller reads whose head did not end in time: in the shape of most callers, as
/// its path is not known.
const LATE: &[u8] = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: 132\r\n\
connection: close\r\n\r\n{\"error\":{\"message\":\"The request's head did not end in time.\",\
\"type\":\"invalid_request_error\",\"param\":null,\"code\":\"request_timeout\"}}";

/// A connection's bytes on their way.
pub(super) struct Watched<I> {
    io: I,
    pulse: Arc<Pulse>,
    ahead: Ahead,
}

/// The first bytes, read to know what is spoken and not yet passed on.
#[derive(Default)]
struct Ahead {
    bytes: [u8; HTTP2.len()],
    len: usize,
}

impl<I> Watched<I> {
    pub(super) fn new(io: I, pulse: Arc<Pulse>) -> Self {
        Self { io, pulse, ahead: Ahead::default() }
    }

    /// Returns the first bytes, as far as they were read ahead.
    pub(super) fn came(&self) -> &[u8] {
        &self.ahead.bytes[..self.ahead.len]
    }
}

impl<I: AsyncRead + Unpin> Watched<I> {
    /// Reads until it is known what is spoken, or nothing more comes.
    ///
    /// hyper can find that out as well; but what it has read for it comes before the rest by itself
    /// and doubles the buffer of every connection.
    pub(super) async fn begins(&mut self) -> io::Result<()> {
        let Ahead { bytes, len } = &mut self.ahead;
        while HTTP2.starts_with(&bytes[..*len]) && *len < HTTP2.len() {
            match self.io.read(&mut bytes[*len..]).await? {
                0 => break,
                came => *len += came,
            }
        }
        Ok(())
    }
}

impl Ahead {
    /// Passes on what fits, and returns whether that was anything.
    fn pass(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        let passed = self.len.min(buf.remaining());
        buf.put_slice(&self.bytes[..passed]);
        self.bytes.copy_within(passed.., 0);
        self.len -= passed;
        passed > 0
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for Watched<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.pulse.late.load(Ordering::Relaxed) {
            // Nothing was written that this could interrupt: no answer is in flight.
            let _ = Pin::new(&mut this.io).poll_write(cx, LATE);
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        let passed = this.ahead.pass(buf);
        match Pin::new(&mut this.io).poll_read(cx, buf) {
            Poll::Pending if passed => {}
            read => ready!(read)?,
        }
        let came = &buf.filled()[before..];
        if !came.is_empty() && this.pulse.is_idle() {
            this.pulse.heard(came);
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.pulse.wrote(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bytes);
        self.pulse.wrote(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
