//! How a process takes part in a fleet: what was passed, else the environment.
//!
//! Knows the names of the environment that `quotum serve` reads, too. Must not know what is
//! done with what they say. The invariant it keeps: an empty variable counts as unset, and what cannot
//! be used is an error that names the argument and the variable.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quotum::cluster::discovery::kube::{Kube, KubeConfig};
use quotum::cluster::{ClusterConfig, JoinError, Seeds, UdpNet};
use quotum::ledger::{FirstWindow, OnSilence};

use crate::keys::KeyFile;

/// Where Kubernetes puts what a pod needs to ask its API server.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

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

/// Returns how to join, whether anybody is to be joined or not, and the file that its keys
/// were read from.
///
/// # Errors
/// Says what is wrong; nothing was started.
pub(crate) fn settle(passed: Passed) -> Result<(ClusterConfig, Option<KeyFile>), Wrong> {
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
        // Kubernetes tells a pod its address alone.
        let advertise = match advertise.parse::<IpAddr>() {
            Ok(ip) => Ok(SocketAddr::new(ip, config.listen.port())),
            Err(_) => address(&advertise),
        };
        config.advertise = Some(advertise.map_err(|why| wrong("advertise", "QUOTUM_GOSSIP_ADVERTISE", why))?);
    }
    let mut key_file = None;
    if let Some(path) = pick(passed.key_file, "QUOTUM_GOSSIP_KEY_FILE") {
        let opened = KeyFile::open(path).map_err(|why| wrong("key_file", "QUOTUM_GOSSIP_KEY_FILE", why))?;
        key_file = Some(opened.0);
        config.keys = opened.1;
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
    if let Some(selector) = environment("QUOTUM_PODS") {
        config.seeds = pods(&config.seeds, selector).map_err(|why| Wrong(format!("QUOTUM_PODS: {why}")))?;
    }
    Ok((config, key_file))
}

/// Returns the directory that asks Kubernetes' API server for the fleet's pods, beside the
/// headless name.
fn pods(seeds: &Seeds, selector: String) -> Result<Seeds, String> {
    let Seeds::Name { host, port } = seeds else {
        return Err("the API server is asked beside a headless name: let QUOTUM_SEEDS name one".to_owned());
    };
    let label = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    if !selector.split(',').all(label) || !selector.contains(['=', '(']) {
        return Err(format!("{selector:?} is no label selector; write app.kubernetes.io/name=litellm"));
    }
    let server = (environment("KUBERNETES_SERVICE_HOST"), environment("KUBERNETES_SERVICE_PORT"));
    let (Some(server), Some(at)) = server else {
        return Err("this process is in no pod of Kubernetes: KUBERNETES_SERVICE_HOST and _PORT are not set".to_owned());
    };
    let server = if server.contains(':') { format!("[{server}]") } else { server };
    let namespace = environment("QUOTUM_NAMESPACE").map_or_else(
        || {
            let file = format!("{SERVICE_ACCOUNT}/namespace");
            let read = fs::read_to_string(&file).map_err(|error| format!("{file} cannot be read: {error}"));
            read.map(|text| text.trim().to_owned())
        },
        Ok,
    )?;
    let config = KubeConfig {
        api: format!("https://{server}:{at}"),
        namespace,
        selector,
        token_file: Some(format!("{SERVICE_ACCOUNT}/token").into()),
        ca_file: Some(format!("{SERVICE_ACCOUNT}/ca.crt").into()),
    };
    Ok(Seeds::By(Arc::new(Kube::new(Arc::new(UdpNet), host, *port, config)?)))
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
