//! The rules a roster follows: an operator's choices.

use std::time::Duration;

/// What lists the replicas (docs/algorithm.md section 1, Directories).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Directory {
    /// Nothing: this replica is alone.
    #[default]
    Alone,
    /// A list that names every replica, this one among them; complete by construction.
    Static,
    /// A headless name: an answer counts only if it contains this replica's address.
    Name,
}

/// What a newcomer does about a listed replica that never answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnSilence {
    /// Joins without it after `patience`, with at most L/n over if it is alive after all.
    #[default]
    FairShare,
    /// Waits for ever, visibly.
    Closed,
}

/// What a replica takes of the window that runs when it starts and nobody else knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FirstWindow {
    /// A share, once everybody listed has answered: a cold start serves at once, and a
    /// restart of the whole fleet inside one window may spend up to L again.
    #[default]
    Admit,
    /// Nothing: zero over even then, at the price of up to one closed window.
    Wait,
}

/// The rules a roster follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RosterSettings {
    /// What lists the replicas.
    pub directory: Directory,
    /// How long a replica must be missing from the headless name to be proven gone.
    pub absent_for: Duration,
    /// What to do about silence.
    pub on_silence: OnSilence,
    /// How long to wait before giving up, from this replica's start.
    pub patience: Duration,
    /// What to take of the first window.
    pub first_window: FirstWindow,
}

impl Default for RosterSettings {
    fn default() -> Self {
        Self {
            directory: Directory::Alone,
            absent_for: Duration::from_secs(300),
            on_silence: OnSilence::FairShare,
            patience: Duration::from_secs(30),
            first_window: FirstWindow::Admit,
        }
    }
}
