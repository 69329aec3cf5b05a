//! What lasts, said in the log: once when it has lasted, and once when it is over.
//!
//! Knows what was the matter at the last look. Must not know why or what follows. The invariant
//! it keeps: no line for what resolves itself during a healthy start, and no second line for
//! what has been said.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use crate::ledger::Blocked;

/// Longer than peers need to answer one another.
const LASTS: Duration = Duration::from_secs(2);

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Matter {
    /// Who holds a share up.
    Share,
    /// A peer that does not answer.
    Peer,
}

/// What was the matter at the last look.
#[derive(Debug)]
pub(crate) struct Lasting {
    matter: Matter,
    /// By who and what resolves it, as the reason may count seconds: since when, and whether
    /// it was said.
    known: BTreeMap<(String, String), (Instant, bool)>,
}

impl Lasting {
    /// Returns what has seen nothing yet.
    pub(crate) const fn of(matter: Matter) -> Self {
        Self { matter, known: BTreeMap::new() }
    }

    /// Logs what has lasted and what is over.
    pub(crate) fn look(&mut self, blocked: Vec<Blocked>, now: Instant) {
        let (news, over) = self.news(blocked, now);
        for Blocked { who, why, resolve } in news {
            match self.matter {
                Matter::Share => {
                    warn!(event = "share_blocked", who, why, resolve, "a share is held up by {who}: {why}; {resolve}");
                }
                Matter::Peer => warn!(event = "peer_silent", who, why, resolve, "replica {who}, {why}; {resolve}"),
            }
        }
        for who in over {
            match self.matter {
                Matter::Share => info!(event = "share_unblocked", who, "no longer held up by {who}"),
                Matter::Peer => info!(event = "peer_back", who, "replica {who} answers again, or is proven gone"),
            }
        }
    }

    /// Returns what is to be said: what has lasted, and who is over.
    fn news(&mut self, blocked: Vec<Blocked>, now: Instant) -> (Vec<Blocked>, Vec<String>) {
        let mut known = BTreeMap::new();
        let mut news = Vec::new();
        for block in blocked {
            let key = (block.who.clone(), block.resolve.clone());
            let (since, said) = self.known.remove(&key).unwrap_or((now, false));
            let lasts = now.duration_since(since) >= LASTS;
            known.insert(key, (since, said || lasts));
            if lasts && !said {
                news.push(block);
            }
        }
        let before = std::mem::replace(&mut self.known, known);
        // Who is there for another reason now is not over.
        let is_over = |who: &String| !self.known.keys().any(|(other, _)| other == who);
        let said = before.into_iter().filter(|(_, (_, said))| *said).map(|((who, _), _)| who);
        (news, said.filter(is_over).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked(who: &str, why: &str) -> Blocked {
        Blocked { who: who.into(), why: why.into(), resolve: "do it".into() }
    }

    #[test]
    fn what_lasts_is_said_once_and_its_end_too() {
        let (mut lasting, start) = (Lasting::of(Matter::Share), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let mut look = |blocked, ms| lasting.news(blocked, at(ms));
        assert_eq!(look(vec![blocked("a", "1"), blocked("b", "")], 0), (vec![], vec![]));
        assert_eq!(look(vec![blocked("a", "2")], 1_999), (vec![], vec![]), "b was never said");
        assert_eq!(look(vec![blocked("a", "3")], 2_000), (vec![blocked("a", "3")], vec![]));
        assert_eq!(look(vec![blocked("a", "4"), blocked("b", "")], 9_000), (vec![], vec![]));
        assert_eq!(look(vec![blocked("b", "")], 9_500), (vec![], vec!["a".to_owned()]));
        assert_eq!(look(vec![blocked("a", "5"), blocked("b", "")], 11_000), (vec![blocked("b", "")], vec![]));
    }
}
