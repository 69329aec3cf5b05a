//! One pod: the proxy, its admin endpoints, and the limiter and cluster behind them.
//!
//! Knows the order in which a pod starts and stops. Must not know what each part does.
//! The invariant it keeps: what it says on standard output is true when it says it, and
//! a pod that leaves in order has handed its rights over before it is gone.

mod admin;
mod connection;
mod credentials;
mod descriptors;
mod health;
mod intake;
pub mod listen;
mod outcome;
mod pause;
pub mod pod;
mod proxy;
mod reload;
mod reread;
mod routing;
mod search;
pub mod stub;
#[cfg(test)]
mod tests;
mod tls;
mod upstream;

pub use pod::Pod;
pub use upstream::Client;

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::cluster::{Cluster, ClusterConfig, JoinError, Seeds, UdpNet};
use crate::{BuildError, Builder, Limiter, Mode, Policy, Quota, UnknownDeployment};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::config::{
    Bounds, Config, Deployment, Gossip, Listen, Reserve, SERVICE_ACCOUNT, Source, Timeouts, Unreported,
};
use crate::telemetry::Telemetry;

/// How long leaving may take after the last request has ended: a few gossip rounds with
/// peers that answer; peers that do not must not hold up a rollout.
pub const LEAVE_WITHIN: Duration = Duration::from_secs(10);

/// Why a pod did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port is in use or the address is not this machine's.
    #[error("cannot listen at {at} for the {what}: {source}; free the port or configure another one")]
    Listen { what: &'static str, at: String, source: std::io::Error },
    /// The cluster could not be joined.
    #[error("{0}{cause}", cause = source_of(.0))]
    Join(JoinError),
    /// The limiter does not take the deployments.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A deployment was configured that the limiter does not know.
    #[error(transparent)]
    Unknown(#[from] UnknownDeployment),
    /// TLS cannot be set up.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    /// The platform's API cannot be asked as configured.
    #[error("gossip.pods: {0}")]
    Platform(String),
    /// The operating system refuses something every process needs.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

fn source_of(error: &JoinError) -> String {
    use std::error::Error;
    error.source().map(|source| format!(": {source}")).unwrap_or_default()
}

impl StartError {
    /// Returns the exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Listen { .. } | Self::Platform(_) | Self::Join(JoinError::Bind { .. }) => 69,
            Self::Build(BuildError::NoEntropy) | Self::Join(JoinError::Randomness(_)) => 1,
            Self::Build(_) | Self::Join(_) => 64,
            Self::Unknown(_) | Self::Tls(_) | Self::Io(_) => 1,
        }
    }
}

/// Runs a pod until it is told to stop.
///
/// # Errors
/// Says why it did not start; nothing is left running.
pub async fn serve(mut config: Config, source: Source) -> Result<(), StartError> {
    // Signals count from here on: one that arrives during the start ends it in order.
    let mut signals = Signals::new()?;
    let hangup = signal(SignalKind::hangup())?;
    config.remarks.iter().for_each(|remark| tracing::warn!(event = "config_remark", "{remark}"));
    descriptors::raise(config.proxy.bounds.connections);
    let proxy_port = bind(config.proxy.listen, "proxy").await?;
    let admin_port = bind(config.admin, "admin endpoints").await?;
    if config.embedded_stub {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        config.deployments.push(embedded(listener.local_addr()?));
        let stub = stub::Stub::new(stub::Behaviour::default());
        // Until the process ends: requests that drain still need their upstream.
        tokio::spawn(stub::serve(stub, listener, std::future::pending()));
    }
    let limiter = builder(&config.deployments).node(&config.node).build()?;
    let cluster = join(&config, &limiter).await?;
    let certified = config.proxy.tls.as_ref().map(|tls| tls.certified.clone());
    let tls = certified.map(tls::Tls::new).transpose()?.map(Arc::new);
    let upstream_tls = tls::client(&config.proxy.upstream_ca)?;
    let client = move |timeouts| Client::tcp(timeouts, upstream_tls.clone());
    let pod = Pod::new(&config, limiter, cluster, &client)?;
    let (cluster, admin) = (pod.cluster.clone(), pod.admin.clone());
    let files = reread::Files::new(&config, cluster.as_ref(), &pod.credentials, tls.as_ref());
    announce(&proxy_port, &admin_port, cluster.as_deref(), &pod.limiter)?;
    tokio::spawn(admin.clone().say_when_ready());

    let (stop_admin, admin_stopped) = watch::channel(false);
    let admin_door = listen::Door { tls: None, bounds: Bounds::default(), telemetry: pod.telemetry.clone() };
    let admin_task = tokio::spawn(listen::serve(admin_port, admin.clone().router(), admin_door, admin_stopped));
    let mut serving = pod.serve_secured(proxy_port, tls);
    let reload = reload::Reload {
        state: reload::State::new(config, pod.clients),
        source,
        limiter: pod.limiter,
        proxy: pod.proxy,
        admin,
        telemetry: pod.telemetry,
        client: Box::new(client),
    };
    tokio::spawn(files.clone().watch());
    tokio::spawn(reload.watch(files, hangup));
    tokio::select! {
        biased;
        number = signals.next() => tracing::info!(event = "draining", signal = number, "told to end: draining"),
        ended = serving.ended() => {
            tracing::error!(event = "proxy_ended", ?ended, "the proxy ended by itself");
        }
    }
    tokio::select! {
        biased;
        number = signals.next() => {
            tracing::warn!(event = "ended_at_once", signal = number, "ended before everything was drained");
            std::process::exit(128 + number);
        }
        () = serving.leave() => {}
    }
    stop_admin.send_replace(true);
    admin_task.abort();
    tracing::info!(event = "left", "drained, and left the fleet");
    Ok(())
}

/// The signals that end a pod.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Returns the number of the next one.
    async fn next(&mut self) -> i32 {
        tokio::select! {
            biased;
            _ = self.interrupt.recv() => SignalKind::interrupt().as_raw_value(),
            _ = self.terminate.recv() => SignalKind::terminate().as_raw_value(),
        }
    }
}

async fn bind(at: Listen, what: &'static str) -> Result<TcpListener, StartError> {
    listen::bind(at).await.map_err(|source| StartError::Listen { what, at: listen::name(at), source })
}

/// Returns the one deployment of a pod that was given none.
fn embedded(stub: SocketAddr) -> Deployment {
    let upstream = axum::http::Uri::builder().scheme("http").authority(stub.to_string()).path_and_query("/v1");
    Deployment {
        id: "stub".into(),
        model: "stub".into(),
        upstream_model: None,
        upstream: upstream.build().unwrap_or_default(),
        api_key: None,
        timeouts: Timeouts::default(),
        quotas: vec![Quota::tokens(60_000).per_minute(), Quota::requests(600).per_minute()],
        limit_id: None,
        mode: Mode::Strict,
        wait: Duration::from_millis(20),
        edge: Duration::from_millis(50),
        reserve: Reserve::Auto,
        tokenizer: crate::config::Tokenizer::Bytes,
        default_max_tokens: 4_096,
        unreported: Unreported::Reserved,
        cached_input: None,
        weight: 1,
        order: 1,
    }
}

/// Returns what the limiter is built of, or changed to.
pub fn builder(deployments: &[Deployment]) -> Builder {
    deployments.iter().fold(Limiter::builder(), |builder, deployment| {
        builder.deployment_with(&deployment.id, deployment.quotas.iter().copied(), policy(deployment))
    })
}

fn policy(deployment: &Deployment) -> Policy {
    Policy {
        mode: deployment.mode,
        wait: deployment.wait,
        edge: deployment.edge,
        limit_id: deployment.limit_id.clone(),
    }
}

async fn join(config: &Config, limiter: &Limiter) -> Result<Option<Arc<Cluster>>, StartError> {
    let gossip = &config.gossip;
    if gossip.seeds == Seeds::Alone {
        return Ok(None);
    }
    let listen = match gossip.listen {
        Listen::At(at) => at,
        Listen::Everywhere(port) => (Ipv6Addr::UNSPECIFIED, port).into(),
    };
    let cluster = ClusterConfig {
        cluster: gossip.cluster.clone(),
        node: config.node.clone(),
        listen,
        advertise: gossip.advertise,
        interval: gossip.interval,
        keys: gossip.keys.clone(),
        insecure: gossip.insecure,
        absent_for: gossip.absent_for,
        on_silence: gossip.on_silence,
        patience: gossip.patience,
        first_window: gossip.first_window,
        ..ClusterConfig::new(seeds(gossip)?)
    };
    let joined = match (Cluster::join(limiter, cluster.clone(), UdpNet).await, gossip.listen) {
        (Err(JoinError::Bind { source, .. }), Listen::Everywhere(port))
            if source.kind() != std::io::ErrorKind::AddrInUse =>
        {
            // A machine without IPv6.
            let listen = (Ipv4Addr::UNSPECIFIED, port).into();
            Cluster::join(limiter, ClusterConfig { listen, ..cluster }, UdpNet).await
        }
        (joined, _) => joined,
    };
    Ok(Some(Arc::new(joined.map_err(StartError::Join)?)))
}

/// Returns where the others are listed: on Kubernetes by the API server, too, if it may be asked.
fn seeds(gossip: &Gossip) -> Result<Seeds, StartError> {
    let (Some(pods), Seeds::Name { host, port }) = (&gossip.pods, &gossip.seeds) else {
        return Ok(gossip.seeds.clone());
    };
    #[cfg(feature = "kube")]
    {
        let config = crate::cluster::discovery::kube::KubeConfig {
            api: pods.api.clone(),
            namespace: pods.namespace.clone(),
            selector: pods.selector.clone(),
            token_file: Some(format!("{SERVICE_ACCOUNT}/token").into()),
            ca_file: Some(format!("{SERVICE_ACCOUNT}/ca.crt").into()),
        };
        let kube = crate::cluster::discovery::kube::Kube::new(Arc::new(UdpNet), host, *port, config);
        Ok(Seeds::By(Arc::new(kube.map_err(StartError::Platform)?)))
    }
    #[cfg(not(feature = "kube"))]
    {
        let _ = (pods, host, port, SERVICE_ACCOUNT);
        Err(StartError::Platform("this quotum was built without the feature `kube`".into()))
    }
}

/// Prints the addresses: the one line scripts wait for.
fn announce(
    proxy: &TcpListener,
    admin: &TcpListener,
    cluster: Option<&Cluster>,
    limiter: &Limiter,
) -> std::io::Result<()> {
    let status = limiter.status();
    let line = json!({
        "proxy": proxy.local_addr()?.to_string(),
        "admin": admin.local_addr()?.to_string(),
        "gossip": cluster.map(|cluster| cluster.local_addr().to_string()),
        "replica": status.replica.to_string(),
    });
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(event = "started", node = status.node, version, "started as replica {}", status.replica);
    let mut out = std::io::stdout().lock();
    if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush()) {
        // Whoever waits for the line waits in vain, and whoever sends requests does not mind.
        tracing::warn!(event = "not_announced", %error, "this could not be printed on standard output: {line}");
    }
    Ok(())
}

/// Returns the admin endpoints of a pod that is alone and serves nothing.
pub fn admin_alone(limiter: Limiter) -> axum::Router {
    let credentials = Arc::new(credentials::Credentials::new(&[]));
    admin::Admin::new(limiter, None, credentials, Arc::new(Telemetry::new()), &[]).router()
}
