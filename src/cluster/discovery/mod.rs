//! Where the other replicas are, and what proves that one of them is gone: the directory of
//! docs/algorithm.md section 1, behind one trait.
//!
//! Knows what a directory can say and how often it is asked. Must not know who has answered
//! or what follows from an absence or a proof: it reports whole answers, the roster draws the
//! conclusions. The invariant it keeps: a listing is one whole answer of the directory, never
//! a part of one or two put together.

mod dns;
#[cfg(feature = "kube")]
pub mod kube;
mod list;
mod scripted;
mod seeds;

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

pub use self::dns::{Dns, LOOKUP_EVERY, LOOKUP_EVERY_JOINING, LOOKUP_TIMEOUT};
pub use self::list::{List, Nowhere};
pub use self::scripted::Scripted;
pub use self::seeds::{SeedError, Seeds};

use super::socket::{Net, canonical};
use crate::ledger::{Directory, Gone, Timestamp};

/// The most addresses of an answer or a list that are looked at, as docs/algorithm.md section 1 bounds |U|.
pub const MAX_LISTED: usize = 4_096;

/// A directory of replicas: a headless name ([`Dns`]), a list ([`List`]), nothing
/// ([`Nowhere`]), a test's script ([`Scripted`]), or a platform.
///
/// Its one duty beyond telling the truth: a replica is listed before its process looks, or an
/// answer that lacks it does not count. So of two replicas at least one sees the other.
#[async_trait]
pub trait Discovery: fmt::Debug + Send + Sync + 'static {
    /// Returns what a listing is worth: complete by construction ([`Directory::Static`]), or
    /// only when it contains the asker's own address, and then an address that stays missing
    /// is gone ([`Directory::Name`]). The same every time.
    fn directory(&self) -> Directory;

    /// Returns how long to wait between an answer and the next question; `None` if there is
    /// nothing more to ask. `settled`: the answer listed the asker, and everybody it listed
    /// has been heard.
    fn every(&self, settled: bool) -> Option<Duration>;

    /// Asks once. `now` is the replica's clock. A platform that is watched rather than asked
    /// returns zero from [`Discovery::every`] and answers when something has happened.
    ///
    /// # Errors
    /// Says why there is no answer, and what resolves that; it is shown until there is one.
    ///
    /// # Cancel safety
    /// Not needed: once begun it is driven to its end, unless the replica itself ends.
    async fn ask(&self, now: Timestamp) -> Result<Answer, Unanswered>;

    /// Returns since when and why it goes by something lesser than what it is meant to ask, if it
    /// does now. It still answers, so nothing is held up; shown to the operator.
    fn fallback(&self) -> Option<Fallback> {
        None
    }

    /// Returns an address of the fleet, for a replica that listens everywhere and must find
    /// out which of its own addresses faces the others; `None` if it cannot tell.
    ///
    /// # Errors
    /// If there is no answer now.
    async fn towards(&self) -> io::Result<Option<SocketAddr>> {
        Ok(None)
    }
}

/// What a directory answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The addresses of all replicas, the asker's among them; `None` if this says nothing of
    /// who is listed. Those beyond [`MAX_LISTED`] are not looked at.
    pub listed: Option<Vec<SocketAddr>>,
    /// Proofs that replicas are gone. A wrong one costs up to a share for each window.
    pub gone: Vec<Gone>,
}

impl Answer {
    /// Returns the answer that lists these and proves nothing.
    pub fn listing(addrs: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self { listed: Some(addrs.into_iter().collect()), gone: Vec::new() }
    }

    /// Returns the answer that proves this and lists nobody.
    pub fn gone(gone: impl IntoIterator<Item = Gone>) -> Self {
        Self { listed: None, gone: gone.into_iter().collect() }
    }
}

/// Why a directory did not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}; {resolve}")]
pub struct Unanswered {
    /// What happened.
    pub why: String,
    /// The command or change that resolves it.
    pub resolve: String,
}

/// What a directory goes by while what it is meant to ask gives no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// Since when, by the replica's clock.
    pub since: Timestamp,
    /// What happened, as of the latest attempt.
    pub why: String,
    /// What it goes by meanwhile, and what that costs.
    pub meanwhile: String,
    /// The command or change that resolves it.
    pub resolve: String,
}

/// Returns the address that peers reach this replica at, if none is configured: the bound
/// one if it is a particular one, else the local address of a socket connected to somebody of
/// the fleet. Nothing is sent.
///
/// # Errors
/// If nobody of the fleet is known or no route leads there.
pub(crate) async fn advertised<N: Net>(
    net: &N,
    discovery: &dyn Discovery,
    bound: SocketAddr,
) -> io::Result<SocketAddr> {
    if !bound.ip().is_unspecified() {
        return Ok(canonical(bound));
    }
    if discovery.directory() == Directory::Alone {
        return Ok(([127, 0, 0, 1], bound.port()).into());
    }
    let towards = discovery.towards().await?;
    let towards = towards.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it names no address"))?;
    let ip = net.local_ip_towards(towards).await?;
    Ok(SocketAddr::new(ip.to_canonical(), bound.port()))
}

/// Asks a directory again and again.
pub(crate) struct Asking {
    discovery: Arc<dyn Discovery>,
    /// When to ask next; `None` if there is nothing more to ask.
    due: Option<Instant>,
    question: Option<Question>,
}

/// A question under way.
type Question = Pin<Box<dyn Future<Output = Result<Answer, Unanswered>> + Send>>;

impl Asking {
    /// Returns one whose first question is due at once.
    pub(crate) fn new(discovery: Arc<dyn Discovery>) -> Self {
        let due = (discovery.directory() != Directory::Alone).then(Instant::now);
        Self { discovery, due, question: None }
    }

    /// Waits for the next answer. Its listing is in order, without repetition. `clock` tells
    /// the time when the question is asked.
    ///
    /// # Errors
    /// Says why there was none; the next call asks again.
    ///
    /// # Cancel safety
    /// Dropped before it is ready, the question stays asked.
    pub(crate) async fn next(&mut self, clock: impl Fn() -> Timestamp) -> Result<Answer, Unanswered> {
        let Some(due) = self.due else {
            return std::future::pending().await;
        };
        tokio::time::sleep_until(due).await;
        let discovery = &self.discovery;
        let question = self.question.get_or_insert_with(|| {
            let (discovery, now) = (Arc::clone(discovery), clock());
            Box::pin(async move { discovery.ask(now).await })
        });
        let answer = question.as_mut().await;
        self.question = None;
        self.wait(false);
        let mut answer = answer?;
        if let Some(addrs) = &mut answer.listed {
            addrs.iter_mut().for_each(|addr| *addr = canonical(*addr));
            addrs.sort_unstable();
            addrs.dedup();
            addrs.truncate(MAX_LISTED);
        }
        Ok(answer)
    }

    /// Slows down: the answer listed this replica, and every listed address has answered.
    pub(crate) fn settled(&mut self) {
        self.wait(true);
    }

    fn wait(&mut self, settled: bool) {
        self.due = self.discovery.every(settled).map(|every| Instant::now() + every);
    }
}

impl fmt::Debug for Asking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Asking").field("discovery", &self.discovery).field("due", &self.due).finish_non_exhaustive()
    }
}
