//! A headless name: its addresses are the replicas'.
//!
//! Knows how a name is asked for and how often. Must not know whose address is whose. The
//! invariant it keeps: a question ends in time, with the whole answer or none of it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::{Answer, Discovery, Unanswered};
use crate::cluster::socket::Net;
use crate::ledger::{Directory, Timestamp};

/// How often a headless name is asked for once every listed address has answered.
pub const LOOKUP_EVERY: Duration = Duration::from_secs(5);

/// How often it is asked for while somebody is missing, or no answer lists us yet.
pub const LOOKUP_EVERY_JOINING: Duration = Duration::from_secs(1);

/// An answer that takes longer than this is given up: the system's resolver retries for
/// tens of seconds, and an old answer proves little.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// A headless name, which resolves to the addresses of all replicas.
pub struct Dns<N> {
    net: Arc<N>,
    host: String,
    port: u16,
}

impl<N: Net> Dns<N> {
    /// Returns what asks `net` for `host`; every replica is at this UDP port.
    pub fn new(net: Arc<N>, host: &str, port: u16) -> Self {
        Self { net, host: host.to_owned(), port }
    }

    async fn lookup(&self) -> io::Result<Vec<SocketAddr>> {
        let answer = tokio::time::timeout(LOOKUP_TIMEOUT, self.net.lookup(&self.host)).await;
        let ips = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        Ok(ips.into_iter().map(|ip| SocketAddr::new(ip.to_canonical(), self.port)).collect())
    }
}

#[async_trait]
impl<N: Net> Discovery for Dns<N> {
    fn directory(&self) -> Directory {
        Directory::Name
    }

    fn every(&self, settled: bool) -> Option<Duration> {
        Some(if settled { LOOKUP_EVERY } else { LOOKUP_EVERY_JOINING })
    }

    async fn ask(&self, _: Timestamp) -> Result<Answer, Unanswered> {
        let host = &self.host;
        self.lookup().await.map(Answer::listing).map_err(|error| Unanswered {
            why: format!("the headless name {host} gives no answer: {error}"),
            resolve: format!(
                "see what this machine is told: getent ahosts {host}; or set gossip.seeds to another name"
            ),
        })
    }

    async fn towards(&self) -> io::Result<Option<SocketAddr>> {
        Ok(self.lookup().await?.first().copied())
    }
}

impl<N> fmt::Debug for Dns<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the headless name {}:{}", self.host, self.port)
    }
}
