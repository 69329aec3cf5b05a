//! The network that whole pods see: sockets whose datagrams the world carries, and names
//! that it answers.
//!
//! Knows who is bound where and what waits for whom. Must not know what a datagram says or
//! what becomes of it on the way: loss, delay and the rest are the world's, the same as on
//! the layer without I/O. The invariant it keeps: no datagram larger than a frame may be
//! leaves a socket, and an address is bound by one socket at a time.

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use quotum::cluster::frame::MAX_DATAGRAM;
use quotum::cluster::{Datagrams, Net};
use tokio::sync::oneshot;

use crate::fleet::directory::PORT;

/// What pods and the world share. Only one of them runs at a time.
#[derive(Clone, Debug, Default)]
pub(super) struct Wire(Arc<Mutex<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    sent: Vec<Sent>,
    sockets: BTreeMap<SocketAddr, Arrived>,
    questions: Vec<Question>,
    /// Addresses whose sockets take nothing for now, with who waits for that to end.
    stuck: BTreeMap<SocketAddr, Vec<Waker>>,
    /// The length of a datagram that was larger than a frame may be.
    oversized: Option<usize>,
}

/// A datagram that a pod has sent.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) bytes: Vec<u8>,
}

/// What has reached a socket and was not taken yet.
#[derive(Debug, Default)]
struct Arrived {
    datagrams: VecDeque<(SocketAddr, Vec<u8>)>,
    waiting: Option<Waker>,
}

/// A pod asks for the addresses of the headless name.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) replica: usize,
    pub(super) answer: oneshot::Sender<Vec<IpAddr>>,
}

impl Wire {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what was sent since the last time, in order.
    pub(super) fn take_sent(&self) -> Vec<Sent> {
        std::mem::take(&mut self.lock().sent)
    }

    pub(super) fn take_questions(&self) -> Vec<Question> {
        std::mem::take(&mut self.lock().questions)
    }

    pub(super) fn take_oversized(&self) -> Option<usize> {
        self.lock().oversized.take()
    }

    /// Delivers a datagram, or loses it: nobody is bound there, or too many wait there.
    pub(super) fn deliver(&self, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        let mut shared = self.lock();
        let Some(arrived) = shared.sockets.get_mut(&to).filter(|arrived| arrived.datagrams.len() < BUFFER) else {
            return;
        };
        arrived.datagrams.push_back((from, bytes));
        let waiting = arrived.waiting.take();
        drop(shared);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// From now on a socket takes nothing, and whoever sends waits; or no longer.
    pub(super) fn set_stuck(&self, addr: SocketAddr, stuck: bool) {
        if stuck {
            self.lock().stuck.entry(addr).or_default();
        } else {
            let waiting = self.lock().stuck.remove(&addr);
            waiting.into_iter().flatten().for_each(Waker::wake);
        }
    }
}

/// The network of one pod.
#[derive(Debug)]
pub(super) struct PodNet {
    pub(super) wire: Wire,
    pub(super) ip: IpAddr,
    pub(super) replica: usize,
}

impl Net for PodNet {
    type Socket = PodSocket;

    async fn bind(&self, addr: SocketAddr) -> io::Result<PodSocket> {
        let port = if addr.port() == 0 { PORT } else { addr.port() };
        let addr = SocketAddr::new(self.ip, port);
        let mut shared = self.wire.lock();
        if shared.sockets.contains_key(&addr) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        shared.sockets.insert(addr, Arrived::default());
        drop(shared);
        Ok(PodSocket { wire: self.wire.clone(), addr })
    }

    async fn lookup(&self, _host: &str) -> io::Result<Vec<IpAddr>> {
        let (answer, answered) = oneshot::channel();
        self.wire.lock().questions.push(Question { replica: self.replica, answer });
        answered.await.map_err(|_| io::ErrorKind::TimedOut.into())
    }

    async fn local_ip_towards(&self, _peer: SocketAddr) -> io::Result<IpAddr> {
        Ok(self.ip)
    }
}

/// A bound socket.
#[derive(Debug)]
pub(super) struct PodSocket {
    wire: Wire,
    addr: SocketAddr,
}

impl PodSocket {
    fn take(&self, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
        let mut shared = self.wire.lock();
        let (from, bytes) = shared.sockets.get_mut(&self.addr)?.datagrams.pop_front()?;
        // What does not fit is cut off, as a kernel does.
        let length = bytes.len().min(buffer.len());
        buffer[..length].copy_from_slice(&bytes[..length]);
        Some((length, from))
    }

    fn poll_free(&self, cx: &mut Context<'_>) -> Poll<()> {
        match self.wire.lock().stuck.get_mut(&self.addr) {
            Some(waiting) => {
                waiting.push(cx.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

impl Datagrams for PodSocket {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.addr)
    }

    async fn send_to(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        poll_fn(|cx| self.poll_free(cx)).await;
        let mut shared = self.wire.lock();
        if datagram.len() > MAX_DATAGRAM {
            shared.oversized = Some(datagram.len());
            return Err(io::ErrorKind::InvalidInput.into());
        }
        shared.sent.push(Sent { from: self.addr, to, bytes: datagram.to_vec() });
        Ok(())
    }

    async fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        poll_fn(|cx| {
            if let Some(taken) = self.take(buffer) {
                return Poll::Ready(Ok(taken));
            }
            if let Some(arrived) = self.wire.lock().sockets.get_mut(&self.addr) {
                arrived.waiting = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.take(buffer).ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }
}

impl Drop for PodSocket {
    fn drop(&mut self) {
        self.wire.lock().sockets.remove(&self.addr);
    }
}

/// The most datagrams that wait in a socket: about 200 kB, the kernel's default.
const BUFFER: usize = 192;
