//! One pod's proxy, from its first connection to the end of its leaving.
//!
//! Knows what callers are served by, and the order in which a pod leaves. Must not know
//! signals, files or which network it is: a listener and a client are given to it, once. The
//! invariant it keeps: a pod that leaves in order has answered whoever it took in, and has
//! handed its rights over before it is gone.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};

use super::admin::Admin;
use super::credentials::Credentials;
use super::listen::{self, Door, Listener};
use super::proxy::Proxy;
use super::reload;
use super::tls::Tls;
use super::upstream::Client;
use super::{LEAVE_WITHIN, StartError};
use crate::Limiter;
use crate::cluster::Cluster;
use crate::config::{Bounds, Config, Timeouts};
use crate::telemetry::Telemetry;

/// What a pod serves with.
pub struct Pod {
    pub(super) limiter: Limiter,
    pub(super) cluster: Option<Arc<Cluster>>,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) credentials: Arc<Credentials>,
    pub(super) proxy: Arc<Proxy>,
    pub(super) admin: Arc<Admin>,
    /// One for each set of timeouts.
    pub(super) clients: Vec<(Timeouts, Client)>,
    bounds: Bounds,
    linger: Duration,
    drain: Duration,
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pod").field("limiter", &self.limiter).finish_non_exhaustive()
    }
}

impl Pod {
    /// Returns what serves a configuration's deployments, each through a client of these.
    ///
    /// # Errors
    /// If the limiter does not know one of the deployments.
    pub fn new(
        config: &Config,
        limiter: Limiter,
        cluster: Option<Arc<Cluster>>,
        client: &dyn Fn(Timeouts) -> Client,
    ) -> Result<Self, StartError> {
        let telemetry = Arc::new(Telemetry::new());
        let credentials = Arc::new(Credentials::new(&config.proxy.credentials));
        let mut clients = Vec::new();
        let proxy = Proxy::new(
            &config.deployments,
            &limiter,
            credentials.clone(),
            &config.proxy,
            telemetry.clone(),
            |deployment| reload::client_for(deployment.timeouts, &mut clients, client),
        )?;
        let admin =
            Admin::new(limiter.clone(), cluster.clone(), credentials.clone(), telemetry.clone(), &config.deployments);
        let (bounds, linger) = (config.proxy.bounds, config.proxy.linger);
        let drain = config.proxy.drain.unwrap_or(Duration::MAX);
        Ok(Self { limiter, cluster, telemetry, credentials, proxy, admin, clients, bounds, linger, drain })
    }

    /// Serves whoever connects there from now on.
    pub fn serve(&self, listener: impl Listener) -> Serving {
        self.serve_secured(listener, None)
    }

    /// As [`Pod::serve`], with TLS if there is a certificate.
    pub(super) fn serve_secured(&self, listener: impl Listener, tls: Option<Arc<Tls>>) -> Serving {
        let (stop, stopped) = watch::channel(false);
        let door = Door { tls, bounds: self.bounds, telemetry: self.telemetry.clone() };
        let task = tokio::spawn(listen::serve(listener, self.proxy.clone().router(), door, stopped));
        let (admin, cluster) = (self.admin.clone(), self.cluster.clone());
        Serving { admin, cluster, stop, task, linger: self.linger, drain: self.drain }
    }
}

/// A pod's proxy at work.
#[derive(Debug)]
pub struct Serving {
    admin: Arc<Admin>,
    cluster: Option<Arc<Cluster>>,
    stop: watch::Sender<bool>,
    task: JoinHandle<io::Result<()>>,
    linger: Duration,
    drain: Duration,
}

impl Serving {
    /// Resolves if the proxy ends by itself, which it should not.
    pub(super) async fn ended(&mut self) -> Result<io::Result<()>, JoinError> {
        (&mut self.task).await
    }

    /// Says to whoever asks that no more traffic should be sent here, and leaves in order: lets
    /// the requests in flight end, within the bound, and hands the rights over.
    pub async fn leave(mut self) {
        self.admin.drain();
        // Who sends requests here hears late that this pod is going: they are served.
        tokio::time::sleep(self.linger).await;
        self.stop.send_replace(true);
        // Rights are handed over from now on, not only once the longest stream has ended.
        if let Some(cluster) = &self.cluster {
            cluster.hand_over().await;
        }
        if !self.task.is_finished() && tokio::time::timeout(self.drain, &mut self.task).await.is_err() {
            let drain = self.drain;
            tracing::warn!(
                event = "cut_off",
                ?drain,
                "requests in flight are cut off: they took longer than proxy.drain"
            );
            self.task.abort();
            let _ = self.task.await;
        }
        if let Some(cluster) = &self.cluster
            && tokio::time::timeout(LEAVE_WITHIN, cluster.leave()).await.is_err()
        {
            tracing::warn!(
                event = "not_handed_over",
                "peers did not take all rights over in time; they are out of reach until their windows end"
            );
        }
    }
}
