//! The limiter as Python sees it.
//!
//! Knows which arguments make a limiter and how it starts, joins and leaves. Must not know
//! LiteLLM. The invariant it keeps: rights belong to the process that first used the limiter;
//! after a fork the child is told so, and spends nothing twice.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::exceptions::{PyKeyError, PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use quotum::cluster::{Cluster, ClusterConfig, JoinError, Seeds, UdpNet};
use quotum::{Claim, Handle, Mode, Policy, Portion, Unit};

use crate::background;
use crate::denied::denied;
use crate::keys::KeyFile;
use crate::permit::{Permit, claim};
use crate::quota::{Quota, Standing, seconds};
use crate::settings::{self, Passed};

/// LiteLLM's names of limits, all of them per minute.
pub(crate) const LIMITS: [(&str, Unit); 4] =
    [("tpm", Unit::Tokens), ("rpm", Unit::Requests), ("itpm", Unit::InputTokens), ("otpm", Unit::OutputTokens)];

/// One limiter for all deployments of a process.
#[pyclass(name = "Limiter", module = "quotum", frozen)]
#[derive(Debug)]
pub(crate) struct Limiter {
    deployments: Vec<(String, Vec<quotum::Quota>, Policy)>,
    started: Mutex<Option<Started>>,
}

#[derive(Debug)]
struct Started {
    pid: u32,
    limiter: quotum::Limiter,
    cluster: Option<Arc<Cluster>>,
}

impl Limiter {
    fn started(&self) -> PyResult<MutexGuard<'_, Option<Started>>> {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = std::process::id();
        match &*started {
            Some(running) if running.pid != pid => {
                return Err(PyRuntimeError::new_err(format!(
                    "this limiter was first used in process {}, which its rights belong to; make one in each process, \
                     or use it only after the fork",
                    running.pid
                )));
            }
            Some(_) => {}
            None => {
                let deployments = self.deployments.iter().cloned();
                let limiter = deployments
                    .fold(quotum::Limiter::builder(), |builder, (id, quotas, policy)| {
                        builder.deployment_with(id, quotas, policy)
                    })
                    .build()
                    .map_err(|error| PyValueError::new_err(error.to_string()))?;
                *started = Some(Started { pid, limiter, cluster: None });
            }
        }
        Ok(started)
    }

    fn limiter(&self) -> PyResult<quotum::Limiter> {
        let started = self.started()?;
        started.as_ref().map(|started| started.limiter.clone()).ok_or_else(unstarted)
    }

    fn handle(&self, deployment: &str) -> PyResult<Handle> {
        self.limiter()?.handle(deployment).map_err(|error| PyKeyError::new_err(error.to_string()))
    }

    fn asked(&self, deployment: &str, claim: Claim) -> PyResult<Asked> {
        Ok(Asked { deployment: deployment.to_owned(), handle: self.handle(deployment)?, claim })
    }

    fn cluster(&self) -> PyResult<Option<Arc<Cluster>>> {
        Ok(self.started()?.as_ref().and_then(|started| started.cluster.clone()))
    }

    fn joined(&self, cluster: Option<Arc<Cluster>>) -> PyResult<()> {
        if let Some(started) = self.started()?.as_mut() {
            started.cluster = cluster;
        }
        Ok(())
    }

    fn settings(&self, passed: Passed) -> PyResult<(ClusterConfig, Option<KeyFile>)> {
        if self.cluster()?.is_some() {
            return Err(PyRuntimeError::new_err(
                "this limiter has joined already, and a limiter joins once; make another one to join again",
            ));
        }
        settings::settle(passed).map_err(|wrong| PyValueError::new_err(wrong.to_string()))
    }
}

fn unstarted() -> PyErr {
    PyRuntimeError::new_err("this limiter did not start")
}

#[pymethods]
impl Limiter {
    #[new]
    #[pyo3(signature = (deployments, *, mode = None, wait = 0.02, edge = 0.05))]
    fn new(deployments: &Bound<'_, PyDict>, mode: Option<&Bound<'_, PyAny>>, wait: f64, edge: f64) -> PyResult<Self> {
        let mode = mode.map_or(Ok(Mode::Strict), mode_of)?;
        let policy = Policy { mode, wait: seconds("wait", wait)?, edge: seconds("edge", edge)?, limit_id: None };
        let mut written = Vec::new();
        for (id, quotas) in deployments {
            let id: String = id.extract()?;
            let quotas = quotas_of(&id, &quotas)?;
            written.push((id, quotas, policy.clone()));
        }
        let limiter = Self { deployments: written, started: Mutex::default() };
        // Wrong input is told here; what was built for it is not kept: nothing starts yet.
        drop(limiter.limiter()?);
        *limiter.started.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(limiter)
    }

    /// Reserves if this replica's own rights cover it; never waits.
    #[pyo3(signature = (deployment, tokens = None, *, input_tokens = None, output_tokens = None, requests = 1))]
    fn try_acquire(
        &self,
        py: Python<'_>,
        deployment: &str,
        tokens: Option<u64>,
        input_tokens: Option<u64>,
        output_tokens: Option<u64>,
        requests: u64,
    ) -> PyResult<Permit> {
        self.asked(deployment, claim(tokens, input_tokens, output_tokens, requests)?)?.at_once(py)
    }

    /// Reserves, and waits a few milliseconds for rights from peers.
    #[pyo3(signature = (deployment, tokens = None, *, input_tokens = None, output_tokens = None, requests = 1))]
    fn acquire(
        &self,
        py: Python<'_>,
        deployment: &str,
        tokens: Option<u64>,
        input_tokens: Option<u64>,
        output_tokens: Option<u64>,
        requests: u64,
    ) -> PyResult<Permit> {
        let asked = self.asked(deployment, claim(tokens, input_tokens, output_tokens, requests)?)?;
        // Alone there is nobody to wait for.
        if self.cluster()?.is_none() {
            asked.at_once(py)
        } else {
            background::wait(py, asked.soon())?.map(Permit::from)
        }
    }

    /// As `acquire`, awaited in asyncio.
    #[pyo3(signature = (deployment, tokens = None, *, input_tokens = None, output_tokens = None, requests = 1))]
    fn acquire_async<'py>(
        &self,
        py: Python<'py>,
        deployment: &str,
        tokens: Option<u64>,
        input_tokens: Option<u64>,
        output_tokens: Option<u64>,
        requests: u64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let asked = self.asked(deployment, claim(tokens, input_tokens, output_tokens, requests)?)?;
        if self.cluster()?.is_none() {
            return background::ready(py, asked.at_once(py));
        }
        background::awaitable(py, asked.soon())
    }

    /// Returns where each quota of a deployment stands in the running window.
    fn standing(&self, py: Python<'_>, deployment: &str) -> PyResult<Vec<Standing>> {
        let handle = self.handle(deployment)?;
        Ok(py.detach(|| handle.standings()).into_iter().map(Standing::from).collect())
    }

    /// Returns the ids of all deployments, in order.
    #[getter]
    fn deployments(&self) -> PyResult<Vec<String>> {
        Ok(self.limiter()?.deployments().map(str::to_owned).collect())
    }

    /// Returns whether this replica may take traffic: it is alone, or knows its peers.
    #[getter]
    fn ready(&self, py: Python<'_>) -> PyResult<bool> {
        let limiter = self.limiter()?;
        Ok(py.detach(|| limiter.status().ready))
    }

    /// Joins the fleet. What is not passed is taken from the environment, else the default.
    #[pyo3(signature = (
        *, seeds = None, listen = None, advertise = None, cluster = None, node = None, key_file = None,
        insecure = false, interval = None, patience = None, on_silence = None, first_window = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn join(
        &self,
        py: Python<'_>,
        seeds: Option<Vec<String>>,
        listen: Option<String>,
        advertise: Option<String>,
        cluster: Option<String>,
        node: Option<String>,
        key_file: Option<String>,
        insecure: bool,
        interval: Option<f64>,
        patience: Option<f64>,
        on_silence: Option<String>,
        first_window: Option<String>,
    ) -> PyResult<()> {
        let interval = interval.map(|value| seconds("interval", value)).transpose()?;
        let patience = patience.map(|value| seconds("patience", value)).transpose()?;
        let passed = Passed {
            seeds,
            listen,
            advertise,
            cluster,
            node,
            key_file,
            insecure,
            interval,
            patience,
            on_silence,
            first_window,
        };
        let (config, key_file) = self.settings(passed)?;
        let limiter = self.limiter()?;
        if config.seeds == Seeds::Alone {
            return Ok(());
        }
        let joined = background::wait(py, async move { join(&limiter, config, key_file).await })?;
        match joined {
            Ok(cluster) => self.joined(Some(cluster)),
            Err(error @ (JoinError::Bind { .. } | JoinError::Randomness(_))) => {
                Err(PyOSError::new_err(settings::explain(&error)))
            }
            Err(error @ JoinError::JoinedBefore(_)) => Err(PyRuntimeError::new_err(error.to_string())),
            Err(error) => Err(PyValueError::new_err(settings::explain(&error))),
        }
    }

    /// Leaves the fleet: hands the rights over to peers. Returns whether all of them had
    /// answered in time.
    #[pyo3(signature = (timeout = 10.0))]
    fn leave(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = seconds("timeout", timeout)?;
        let Some(cluster) = self.cluster()? else { return Ok(true) };
        let left = background::wait(py, leave(cluster, timeout))?;
        self.joined(None)?;
        Ok(left)
    }

    /// As `leave`, awaited in asyncio.
    #[pyo3(signature = (timeout = 10.0))]
    fn leave_async<'py>(&self, py: Python<'py>, timeout: f64) -> PyResult<Bound<'py, PyAny>> {
        let timeout = seconds("timeout", timeout)?;
        let Some(cluster) = self.cluster()? else { return background::ready(py, Ok(true)) };
        self.joined(None)?;
        background::awaitable(py, async move { Ok(leave(cluster, timeout).await) })
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, pyo3::types::PyTuple>) -> PyResult<()> {
        self.leave(py, 10.0).map(drop)
    }

    fn __aenter__<'py>(slf: Bound<'py, Self>, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        background::ready(py, Ok(slf))
    }

    #[pyo3(signature = (*_error))]
    fn __aexit__<'py>(&self, py: Python<'py>, _error: &Bound<'_, pyo3::types::PyTuple>) -> PyResult<Bound<'py, PyAny>> {
        // Awaited, it must not be true: that would swallow what went wrong inside.
        let Some(cluster) = self.cluster()? else { return background::ready(py, Ok(())) };
        self.joined(None)?;
        background::awaitable(py, async move {
            leave(cluster, Duration::from_secs(10)).await;
            Ok(())
        })
    }

    fn __repr__(&self) -> String {
        let ids: Vec<&str> = self.deployments.iter().map(|(id, ..)| id.as_str()).collect();
        format!("<quotum.Limiter of {ids:?}>")
    }
}

/// A request for a reservation.
struct Asked {
    deployment: String,
    handle: Handle,
    claim: Claim,
}

impl Asked {
    /// Decides now.
    fn at_once(self, py: Python<'_>) -> PyResult<Permit> {
        let decision = py.detach(|| self.handle.try_acquire(self.claim).map(quotum::Permit::into_owned));
        match decision {
            Ok(permit) => Ok(Permit::new(permit, self.deployment)),
            Err(no) => Err(denied(py, &self.deployment, &no)),
        }
    }

    /// Decides once peers have given what they can.
    async fn soon(self) -> PyResult<Reserved> {
        match self.handle.acquire(self.claim).await {
            Ok(permit) => Ok(Reserved { permit: permit.into_owned(), deployment: self.deployment }),
            Err(no) => Err(Python::try_attach(|py| denied(py, &self.deployment, &no)).unwrap_or_else(unstarted)),
        }
    }
}

/// A reservation on its way to Python: dropped before it arrives, it gives itself back.
struct Reserved {
    permit: quotum::Permit<'static>,
    deployment: String,
}

impl From<Reserved> for Permit {
    fn from(Reserved { permit, deployment }: Reserved) -> Self {
        Self::new(permit, deployment)
    }
}

impl<'py> IntoPyObject<'py> for Reserved {
    type Target = Permit;
    type Output = Bound<'py, Permit>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Bound<'py, Permit>> {
        Bound::new(py, Permit::from(self))
    }
}

/// Joins a fleet, and reads its keys again; on a machine without IPv6 by IPv4, unless told
/// where to listen.
pub(crate) async fn join(
    limiter: &quotum::Limiter,
    config: ClusterConfig,
    key_file: Option<KeyFile>,
) -> Result<Arc<Cluster>, JoinError> {
    let joined = match Cluster::join(limiter, config.clone(), UdpNet).await {
        Err(JoinError::Bind { addr, source })
            if addr.ip() == std::net::Ipv6Addr::UNSPECIFIED && source.kind() != std::io::ErrorKind::AddrInUse =>
        {
            let listen = (std::net::Ipv4Addr::UNSPECIFIED, addr.port()).into();
            Cluster::join(limiter, ClusterConfig { listen, ..config }, UdpNet).await
        }
        joined => joined,
    };
    let cluster = Arc::new(joined?);
    if let Some(file) = key_file {
        tokio::spawn(file.watch(Arc::downgrade(&cluster)));
    }
    Ok(cluster)
}

async fn leave(cluster: Arc<Cluster>, timeout: Duration) -> bool {
    tokio::time::timeout(timeout, cluster.leave()).await.is_ok()
}

fn quotas_of(id: &str, written: &Bound<'_, PyAny>) -> PyResult<Vec<quotum::Quota>> {
    if let Ok(limits) = written.cast::<PyDict>() {
        let mut quotas = Vec::new();
        for (name, amount) in limits {
            let name: String = name.extract()?;
            let (_, unit) = LIMITS.into_iter().find(|(limit, _)| *limit == name).ok_or_else(|| {
                PyValueError::new_err(format!("{name:?} of {id:?} is not a limit; use tpm, rpm, itpm, otpm, or Quotas"))
            })?;
            let quota = quotum::Quota::new(unit, amount.extract()?, Duration::from_secs(60));
            quotas.push(quota.map_err(|error| PyValueError::new_err(format!("{name} of {id:?}: {error}")))?);
        }
        return Ok(quotas);
    }
    if written.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err(format!("the limits of {id:?} are text; write {{\"tpm\": 100_000}}")));
    }
    if let Ok(quota) = written.cast::<Quota>() {
        return Ok(vec![quota.get().quota]);
    }
    let quotas = written.try_iter()?.map(|quota| Ok(quota?.cast::<Quota>().map_err(PyErr::from)?.get().quota));
    quotas.collect()
}

/// Returns the mode that Python wrote: `"strict"`, `"observe"` or `{"elastic": 0.05}`.
fn mode_of(written: &Bound<'_, PyAny>) -> PyResult<Mode> {
    let wrong = || PyValueError::new_err("mode is \"strict\", \"observe\" or {\"elastic\": 0.05}");
    if let Ok(name) = written.extract::<String>() {
        return match name.as_str() {
            "strict" => Ok(Mode::Strict),
            "observe" => Ok(Mode::Observe),
            _ => Err(wrong()),
        };
    }
    let beta: f64 = written.get_item("elastic").and_then(|beta| beta.extract()).map_err(|_| wrong())?;
    let beta = Portion::new(beta).map_err(|error| PyValueError::new_err(error.to_string()))?;
    Ok(Mode::Elastic { beta })
}
