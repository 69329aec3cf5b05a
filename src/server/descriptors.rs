//! How many files this process may open: connections, mostly.
//!
//! Knows the limit of the operating system, and how many a pod may come to need. Must not know what is opened. The
//! invariant it keeps: a limit that cannot be raised keeps no pod from serving, and is said.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a pod opens beside its connections: ports, files that are read again, the runtime's own.
const OTHERS: u64 = 100;

/// Raises the soft limit to the hard one, as nothing here uses `select`, and says how many that is.
pub(super) fn raise(connections: usize) {
    let before = getrlimit(Resource::Nofile);
    // Where it may not be raised, what is in force now is what counts.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: before.maximum, maximum: before.maximum });
    let after = getrlimit(Resource::Nofile).current;
    let needed = needed(connections);
    if after.is_some_and(|after| after < needed) {
        tracing::warn!(
            event = "open_files_low",
            limit = after,
            was = before.current,
            needed,
            "this process may open {} files, and max_connections ({connections}) alone comes to {needed}: raise the hard limit (ulimit -Hn, LimitNOFILE) or lower proxy.max_connections",
            shown(after)
        );
    } else {
        let was = before.current;
        tracing::info!(
            event = "open_files",
            limit = after,
            was,
            needed,
            "this process may open {} files",
            shown(after)
        );
    }
}

/// Returns how many files so many callers come to at least: their connections to upstreams are
/// pooled, and one of HTTP/2 serves many.
fn needed(connections: usize) -> u64 {
    (connections as u64).saturating_add(OTHERS)
}

fn shown(limit: Option<u64>) -> String {
    limit.map_or_else(|| "unlimited".into(), |limit| limit.to_string())
}
