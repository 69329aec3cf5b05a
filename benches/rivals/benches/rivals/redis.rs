//! A budget in Redis: INCRBY, and the difference back.
//!
//! Knows a pod's one pipelined connection and four commands. Must not know what is admitted
//! when there is no answer. The invariant it keeps: what a refused request added is taken
//! back, so that nothing is admitted beyond the limit while the server keeps its memory.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use quotum_bench::{Failure, Process};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

/// How long a caller waits for the server, as one would set it on a request's path.
const PATIENCE: Duration = Duration::from_millis(50);

/// What is written, and where its first reply goes; there are so many.
struct Job {
    commands: String,
    replies: usize,
    first: oneshot::Sender<i64>,
}

/// A pod's connection. Made again for the next command after it has broken.
#[derive(Debug)]
pub(crate) struct Client(mpsc::UnboundedSender<Job>);

impl Client {
    pub(crate) fn new(server: SocketAddr) -> Self {
        let (jobs, todo) = mpsc::unbounded_channel();
        tokio::spawn(connected(server, todo));
        Self(jobs)
    }

    /// Reserves, if the window has room.
    ///
    /// # Errors
    /// If the server does not answer in time.
    pub(crate) async fn reserve(&self, window: u64, limit: u64, tokens: u64, keep: Duration) -> Result<bool> {
        let commands = format!("INCRBY w{window} {tokens}\r\nPEXPIRE w{window} {}\r\n", keep.as_millis());
        let used = self.ask(commands, 2).await?;
        if used <= limit as i64 {
            return Ok(true);
        }
        self.give_back(window, tokens);
        Ok(false)
    }

    /// Gives back, without waiting for the answer.
    pub(crate) fn give_back(&self, window: u64, tokens: u64) {
        let (first, _) = oneshot::channel();
        let _ = self.0.send(Job { commands: format!("DECRBY w{window} {tokens}\r\n"), replies: 1, first });
    }

    async fn ask(&self, commands: String, replies: usize) -> Result<i64> {
        let (first, reply) = oneshot::channel();
        let _ = self.0.send(Job { commands, replies, first });
        let broken = |_| Error::from(ErrorKind::ConnectionReset);
        tokio::time::timeout(PATIENCE, reply).await?.map_err(broken)
    }
}

/// Serves jobs, and drops those that it cannot: their callers see that.
async fn connected(server: SocketAddr, mut todo: mpsc::UnboundedReceiver<Job>) {
    while let Some(first) = todo.recv().await {
        let Ok(mut stream) = TcpStream::connect(server).await else { continue };
        let _ = stream.set_nodelay(true);
        let (read, mut write) = stream.split();
        let (mut lines, mut open, mut next) = (BufReader::new(read).lines(), VecDeque::new(), Some(first));
        loop {
            if let Some(Job { commands, replies, first }) = next.take() {
                if write.write_all(commands.as_bytes()).await.is_err() {
                    break;
                }
                open.push_back(Some(first));
                open.extend((1..replies).map(|_| None));
            }
            tokio::select! {
                biased;
                line = lines.next_line() => {
                    let Ok(Some(line)) = line else { break };
                    let number = line.strip_prefix(':').and_then(|number| number.parse().ok());
                    if let (Some(Some(first)), Some(number)) = (open.pop_front(), number) {
                        let _: std::result::Result<(), i64> = first.send(number);
                    }
                }
                job = todo.recv() => match job {
                    Some(job) => next = Some(job),
                    None => return,
                },
            }
        }
    }
}

/// Starts a server that keeps nothing on disk; `None` if there is no such program.
pub(crate) fn server(at: SocketAddr) -> std::result::Result<Option<Process>, Failure> {
    if Command::new("redis-server").arg("--version").output().is_err() {
        return Ok(None);
    }
    let mut command = Command::new("redis-server");
    command.args(["--bind", "127.0.0.1", "--port", &at.port().to_string(), "--save", "", "--appendonly", "no"]);
    Ok(Some(Process::start_at(at, &mut command)?))
}
