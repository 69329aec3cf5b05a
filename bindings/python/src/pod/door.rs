//! The owner's side of the pod's socket.
//!
//! Knows who may come in and that each is answered on its own line. Must not know what is
//! asked. The invariant it keeps: only processes of this user are heard, and what a worker
//! that is gone had open is settled as the book says.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::book::Book;
use super::message::{Ask, Numbered, Reply};
use super::{AGAIN, Shared};

/// Answers of one worker that may wait to be written before it is heard again.
const UNWRITTEN: usize = 1_024;

/// Returns whether a process of the same user is at the other end.
pub(super) fn is_ours(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == rustix::process::getuid().as_raw())
}

/// Lets the pod's other workers in, for as long as it is polled.
pub(super) async fn serve(listener: UnixListener, shared: Arc<Shared>, book: Arc<Book>) {
    // The owner itself is worker 0.
    for worker in 1.. {
        let stream = loop {
            match listener.accept().await {
                Ok((stream, _)) => break stream,
                // Out of open files: that passes.
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        };
        if is_ours(&stream) {
            let (reader, writer) = stream.into_split();
            let (replies, unwritten) = mpsc::channel(UNWRITTEN);
            tokio::spawn(write(writer, unwritten));
            tokio::spawn(hear(reader, shared.clone(), book.clone(), worker, replies));
        }
    }
}

async fn hear(
    reader: OwnedReadHalf,
    shared: Arc<Shared>,
    book: Arc<Book>,
    worker: u64,
    replies: mpsc::Sender<Numbered<Reply>>,
) {
    shared.workers.fetch_add(1, Ordering::Relaxed);
    book.enter(worker);
    let mut lines = BufReader::new(reader).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        // What cannot be understood comes from another version: that worker must not believe
        // that it was heard.
        let Ok(Numbered { number, body }) = serde_json::from_str::<Numbered<Ask>>(&line) else { break };
        let may_wait = matches!(body, Ask::Reserve(_) | Ask::Room(_) | Ask::Late { .. });
        let (shared, book, replies) = (shared.clone(), book.clone(), replies.clone());
        let answer = async move {
            let body = shared.answer(&book, body, worker).await;
            // An error is a worker that is gone.
            let _ = replies.send(Numbered { number, body }).await;
        };
        if may_wait {
            tokio::spawn(answer);
        } else {
            // In order: what is declared before a reservation is known when that is decided.
            answer.await;
        }
    }
    book.abandon(worker);
    shared.workers.fetch_sub(1, Ordering::Relaxed);
}

async fn write(mut writer: OwnedWriteHalf, mut replies: mpsc::Receiver<Numbered<Reply>>) {
    while let Some(reply) = replies.recv().await {
        if writer.write_all(reply.line().as_bytes()).await.is_err() {
            break;
        }
    }
}
