//! The log: lines for people on a terminal, else JSON.
//!
//! Knows where the log goes and how it is filtered. Must not know what is logged. The
//! invariant it keeps: a log that cannot be written stops nothing.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts logging to standard error: lines for people on a terminal, else JSON.
pub(crate) fn start(filter: Option<&str>) {
    // A filter that cannot be read must not keep the pod from starting.
    let filter = filter.and_then(|filter| EnvFilter::try_new(filter).ok());
    let filter = filter.unwrap_or_else(|| EnvFilter::new("info,chitchat=warn"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // It would report a log that cannot be written in the log, and panic: a full disk must
    // not stop a pod.
    let logs = logs.log_internal_errors(false);
    let _ = if std::io::stderr().is_terminal() { logs.try_init() } else { logs.json().try_init() };
}
