//! Directories that never change: a list, and none.
//!
//! Knows addresses. Must not know who is behind them. The invariant it keeps: a list is
//! complete by construction, so it is read once and proves nothing.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;

use super::{Answer, Discovery, Unanswered};
use crate::ledger::{Directory, Timestamp};

/// A list that names every replica, the asker among them.
#[derive(Clone, Debug)]
pub struct List(Vec<SocketAddr>);

impl List {
    /// Returns the directory that lists these, one address for each replica.
    pub fn new(addrs: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self(addrs.into_iter().collect())
    }
}

#[async_trait]
impl Discovery for List {
    fn directory(&self) -> Directory {
        Directory::Static
    }

    /// Once is enough.
    fn every(&self, _: bool) -> Option<Duration> {
        None
    }

    async fn ask(&self, _: Timestamp) -> Result<Answer, Unanswered> {
        Ok(Answer::listing(self.0.iter().copied()))
    }

    async fn towards(&self) -> io::Result<Option<SocketAddr>> {
        Ok(self.0.first().copied())
    }
}

/// No directory: this replica is alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nowhere;

#[async_trait]
impl Discovery for Nowhere {
    fn directory(&self) -> Directory {
        Directory::Alone
    }

    fn every(&self, _: bool) -> Option<Duration> {
        None
    }

    /// Never asked.
    async fn ask(&self, _: Timestamp) -> Result<Answer, Unanswered> {
        Ok(Answer::default())
    }
}
