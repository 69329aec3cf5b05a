//! A worker's side of the pod's socket.
//!
//! Knows which answer belongs to which question. Must not know what is asked. The invariant
//! it keeps: a question is answered or known to be lost, and one that is lost was asked of an
//! owner that is gone.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::message::{Ask, Numbered, Refusal, Reply};

/// The way to the owner. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Link {
    asks: mpsc::UnboundedSender<Numbered<Ask>>,
    waiting: Arc<Mutex<Waiting>>,
    next: Arc<AtomicU64>,
}

/// Who waits for which answer; `None` once the owner is gone.
type Waiting = Option<BTreeMap<u64, oneshot::Sender<Reply>>>;

/// Questions that may wait for an answer: an owner that is stopped must not fill the memory.
const UNANSWERED: usize = 10_000;

/// Returns the way to the owner, and a future that is ready when it is gone.
pub(super) fn open(stream: UnixStream) -> (Link, impl Future<Output = ()>) {
    let (asks, mut unwritten) = mpsc::unbounded_channel::<Numbered<Ask>>();
    let link = Link { asks, waiting: Arc::new(Mutex::new(Some(BTreeMap::new()))), next: Arc::default() };
    let (reader, mut writer) = stream.into_split();
    let writing = tokio::spawn(async move {
        while let Some(ask) = unwritten.recv().await {
            if writer.write_all(ask.line().as_bytes()).await.is_err() {
                break;
            }
        }
    });
    let waiting = link.waiting.clone();
    let reading = tokio::spawn(async move {
        let mut lines = BufReader::new(reader).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let Ok(Numbered { number, body }) = serde_json::from_str::<Numbered<Reply>>(&line) else { break };
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(waiter) = waiting.as_mut().and_then(|waiting| waiting.remove(&number)) {
                // Whoever does not wait any more has dropped its end.
                let _ = waiter.send(body);
            }
        }
        writing.abort();
        // With their ends dropped, those who wait know.
        waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
    });
    (link, async move { drop(reading.await) })
}

impl Link {
    /// Asks the owner; `None` if it is gone.
    pub(super) async fn ask(&self, ask: Ask) -> Option<Reply> {
        let (waiter, reply) = oneshot::channel();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let waiting = waiting.as_mut()?;
            // Those that gave up stay until they are answered, too.
            if waiting.len() >= UNANSWERED {
                return Some(Reply::Refused(Refusal::unowned("the worker that owns them does not answer")));
            }
            waiting.insert(number, waiter);
        }
        self.asks.send(Numbered { number, body: ask }).ok()?;
        reply.await.ok()
    }

    /// Tells the owner something whose answer nobody waits for.
    pub(super) fn tell(&self, ask: Ask) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // An error is an owner that is gone, and with it what it was to be told of.
        let _ = self.asks.send(Numbered { number, body: ask });
    }
}
