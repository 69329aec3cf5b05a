//! How a process takes part in a fleet: what was passed, else the environment.
//!
//! Knows the names of the environment that `quotum serve` reads, too. Must not know what is
//! done with them. The invariant it keeps: an empty variable counts as unset, and what cannot
//! be used is an error that names the argument and the variable.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use quotum::cluster::{ClusterConfig, JoinError, KeyRing, Seeds};
use quotum::ledger::{FirstWindow, OnSilence};

/// What a caller may pass instead of the environment.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    pub(crate) seeds: Option<Vec<String>>,
    pub(crate) listen: Option<String>,
    pub(crate) advertise: Option<String>,
    pub(crate) cluster: Option<String>,
    pub(crate) node: Option<String>,
    pub(crate) key_file: Option<String>,
    pub(crate) insecure: bool,
    pub(crate) interval: Option<Duration>,
    pub(crate) patience: Option<Duration>,
    pub(crate) on_silence: Option<String>,
    pub(crate) first_window: Option<String>,
}

/// A setting that cannot be used. Whoever wrote it can mend it; nothing was started.
#[derive(Debug)]
pub(crate) struct Wrong(String);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn wrong(name: &str, variable: &str, why: impl fmt::Display) -> Wrong {
    Wrong(format!("{name} (in the environment {variable}): {why}"))
}

/// Returns a variable of the process's environment; an empty one counts as unset.
pub(crate) fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Returns how to join, whether anybody is to be joined or not.
///
/// # Errors
/// Says what is wrong; nothing was started.
pub(crate) fn settle(passed: Passed) -> Result<ClusterConfig, Wrong> {
    let seeds = match passed.seeds {
        Some(seeds) => seeds,
        None => environment("QUOTUM_SEEDS").map_or_else(Vec::new, |text| entries(&text)),
    };
    let seeds = Seeds::parse(&seeds).map_err(|error| wrong("seeds", "QUOTUM_SEEDS", error))?;
    let mut config = ClusterConfig::new(seeds);
    let pick = |passed: Option<String>, variable: &str| passed.or_else(|| environment(variable));
    if let Some(cluster) = pick(passed.cluster, "QUOTUM_CLUSTER") {
        config.cluster = cluster;
    }
    if let Some(node) = pick(passed.node, "QUOTUM_NODE") {
        config.node = node;
    }
    if let Some(listen) = pick(passed.listen, "QUOTUM_GOSSIP_LISTEN") {
        config.listen = address(&listen).map_err(|why| wrong("listen", "QUOTUM_GOSSIP_LISTEN", why))?;
    }
    if let Some(advertise) = pick(passed.advertise, "QUOTUM_GOSSIP_ADVERTISE") {
        let advertise = address(&advertise).map_err(|why| wrong("advertise", "QUOTUM_GOSSIP_ADVERTISE", why))?;
        config.advertise = Some(advertise);
    }
    if let Some(path) = pick(passed.key_file, "QUOTUM_GOSSIP_KEY_FILE") {
        let name = |why: &dyn fmt::Display| wrong("key_file", "QUOTUM_GOSSIP_KEY_FILE", format_args!("{path}: {why}"));
        let text = fs::read_to_string(&path).map_err(|error| name(&error))?;
        config.keys = KeyRing::parse(&text).map_err(|error| name(&error))?;
    }
    config.insecure = passed.insecure;
    config.interval = passed.interval.unwrap_or(config.interval);
    config.patience = passed.patience.unwrap_or(config.patience);
    config.on_silence = match passed.on_silence.as_deref() {
        None | Some("fair_share") => OnSilence::FairShare,
        Some("closed") => OnSilence::Closed,
        Some(other) => return Err(Wrong(format!("on_silence={other:?} is not one of: fair_share, closed"))),
    };
    config.first_window = match passed.first_window.as_deref() {
        None | Some("admit") => FirstWindow::Admit,
        Some("wait") => FirstWindow::Wait,
        Some(other) => return Err(Wrong(format!("first_window={other:?} is not one of: admit, wait"))),
    };
    check(&config)?;
    Ok(config)
}

/// Returns where the admin endpoints listen; nowhere, unless that is set.
///
/// # Errors
/// If it is no address; nothing was started.
pub(crate) fn admin() -> Result<Option<SocketAddr>, Wrong> {
    let written = environment("QUOTUM_ADMIN_LISTEN");
    let parsed = written.map(|text| address(&text).map_err(|why| Wrong(format!("QUOTUM_ADMIN_LISTEN: {why}"))));
    parsed.transpose()
}

fn check(config: &ClusterConfig) -> Result<(), Wrong> {
    if config.seeds == Seeds::Alone {
        return Ok(());
    }
    if let Seeds::Static(listed) = &config.seeds {
        let why = match config.advertise {
            None => "a list names every replica, so this one must say which entry is its own".to_owned(),
            Some(own) if !listed.contains(&own) => format!("{own} is not on the list of replicas, QUOTUM_SEEDS"),
            Some(_) => String::new(),
        };
        if !why.is_empty() {
            return Err(wrong("advertise", "QUOTUM_GOSSIP_ADVERTISE", why));
        }
    }
    config.check().map_err(|error| Wrong(explain(&error)))
}

/// Returns what is wrong in the words of whoever set it here.
pub(crate) fn explain(error: &JoinError) -> String {
    use std::error::Error;
    let cause = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    let names = [
        ("gossip.key_file", "key_file (in the environment QUOTUM_GOSSIP_KEY_FILE)"),
        ("gossip.listen", "listen (QUOTUM_GOSSIP_LISTEN)"),
        ("gossip.advertise", "advertise (QUOTUM_GOSSIP_ADVERTISE)"),
        ("gossip.insecure: true", "insecure=True"),
        ("node.name", "node (QUOTUM_NODE)"),
    ];
    names.iter().fold(format!("{error}{cause}"), |text, (ours, theirs)| text.replace(ours, theirs))
}

fn entries(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(str::to_owned).collect()
}

/// Reads `host:port`, where the host may be left out or `localhost`.
fn address(text: &str) -> Result<SocketAddr, String> {
    let with_host = match text.split_once(':') {
        Some(("", port)) => format!("[::]:{port}"),
        Some(("localhost", port)) => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0).ip().to_string() + ":" + port,
        _ => text.to_owned(),
    };
    with_host.parse().map_err(|_| format!("{text:?} is not an address and port such as 10.0.0.7:7946"))
}
