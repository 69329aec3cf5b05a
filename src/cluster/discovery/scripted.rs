//! A directory that says what a test says, when it says it.
//!
//! Knows the lines of a script and their times. Must not know what they lead to. The
//! invariant it keeps: every line is said once, in order.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;

use super::{Answer, Discovery, Unanswered};
use crate::ledger::{Directory, Timestamp};

/// A directory for tests: each line is said so long after the one before it, by tokio's
/// clock. One for each replica, as every line is said to one asker only.
pub struct Scripted {
    directory: Directory,
    lines: Mutex<VecDeque<Line>>,
    more: Notify,
}

/// When, after the line before, and what.
type Line = (Duration, Result<Answer, Unanswered>);

impl Scripted {
    /// Returns a directory whose listings are worth this, and that says nothing yet.
    pub fn new(directory: Directory) -> Self {
        Self { directory, lines: Mutex::default(), more: Notify::new() }
    }

    /// Says this at once when everything before it has been said.
    pub fn say(&self, answer: Result<Answer, Unanswered>) {
        self.then(Duration::ZERO, answer);
    }

    /// Says this so long after everything before it has been said.
    pub fn then(&self, after: Duration, answer: Result<Answer, Unanswered>) {
        self.lines().push_back((after, answer));
        self.more.notify_one();
    }

    /// Returns how many lines have not been said yet.
    pub fn left(&self) -> usize {
        self.lines().len()
    }

    fn lines(&self) -> MutexGuard<'_, VecDeque<Line>> {
        // A line is whole or not there.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_after(&self) -> Option<Duration> {
        self.lines().front().map(|(after, _)| *after)
    }
}

#[async_trait]
impl Discovery for Scripted {
    fn directory(&self) -> Directory {
        self.directory
    }

    /// The script says when.
    fn every(&self, _: bool) -> Option<Duration> {
        Some(Duration::ZERO)
    }

    /// Waits for the next line. Dropped before it is ready, the line has not been said.
    async fn ask(&self, _: Timestamp) -> Result<Answer, Unanswered> {
        let after = loop {
            match self.next_after() {
                Some(after) => break after,
                None => self.more.notified().await,
            }
        };
        tokio::time::sleep(after).await;
        let line = self.lines().pop_front();
        line.map_or_else(|| Ok(Answer::default()), |(_, answer)| answer)
    }
}

impl fmt::Debug for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a script of {} more lines", self.left())
    }
}
