//! The log: lines for people on a terminal, else JSON.
//!
//! Knows where the log goes and how it is filtered. Must not know what is logged. The
//! invariant it keeps: a log that cannot be written stops nothing.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// What is logged unless `RUST_LOG` says otherwise.
const USUAL: &str = "info,chitchat=warn";

/// Starts logging to standard error: lines for people on a terminal, else JSON.
pub(crate) fn start(filter: Option<&str>) {
    let read = filter.map(EnvFilter::try_new).transpose();
    // A filter that cannot be read must not keep the pod from starting.
    let (filter, unread) = match read {
        Ok(filter) => (filter, None),
        Err(error) => (None, Some(error)),
    };
    let filter = filter.unwrap_or_else(|| EnvFilter::new(USUAL));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // It would report a log that cannot be written in the log, and panic: a full disk must
    // not stop a pod.
    let logs = logs.log_internal_errors(false);
    let _ = if std::io::stderr().is_terminal() { logs.try_init() } else { logs.json().flatten_event(true).try_init() };
    if let Some(error) = unread {
        tracing::warn!(event = "log_filter_refused", %error, "RUST_LOG cannot be read: this log is as without it, {USUAL}");
    }
}
