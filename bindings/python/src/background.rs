//! The one background runtime of a process, and how Python waits for what runs on it.
//!
//! Knows threads, event loops and forks. Must not know what is waited for. The invariants it
//! keeps: there is no thread before the first use, and none is believed to have survived a
//! fork; what a waiter no longer wants is dropped, and so gives itself back.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::BoundObject;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

/// How long a waiting thread goes without looking for Ctrl-C.
const SIGNALS_EVERY: Duration = Duration::from_millis(100);

/// How long the tasks of a process that ends may take to notice.
const STOP_WITHIN: Duration = Duration::from_millis(200);

/// The runtime, and the process that started it: its threads exist in no other.
static RUNTIME: Mutex<Option<(u32, Runtime)>> = Mutex::new(None);

/// Returns the runtime, started if it does not run in this process.
pub(crate) fn runtime() -> PyResult<Handle> {
    let mut runtime = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    let pid = std::process::id();
    if let Some((of, runtime)) = runtime.as_ref()
        && *of == pid
    {
        return Ok(runtime.handle().clone());
    }
    let mut builder = Builder::new_multi_thread();
    let started = builder.worker_threads(1).thread_name("quotum").enable_all().build();
    let started = started.map_err(|error| PyRuntimeError::new_err(format!("quotum's background thread: {error}")))?;
    let handle = started.handle().clone();
    // The runtime of a parent process has no threads here to be joined.
    std::mem::forget(runtime.replace((pid, started)));
    Ok(handle)
}

/// Ends the runtime, for a process that ends: nothing calls into Python after it.
#[pyfunction]
pub(crate) fn stop() {
    let runtime = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner).take();
    match runtime {
        Some((pid, runtime)) if pid == std::process::id() => runtime.shutdown_timeout(STOP_WITHIN),
        other => std::mem::forget(other),
    }
}

/// Waits for a future without holding the interpreter; Ctrl-C ends the waiting.
pub(crate) fn wait<T: Send + 'static>(py: Python<'_>, future: impl Future<Output = T> + Send + 'static) -> PyResult<T> {
    let runtime = runtime()?;
    let task = runtime.spawn(future);
    let abort = task.abort_handle();
    let (done, mut result) = oneshot::channel();
    runtime.spawn(async move { done.send(task.await) });
    loop {
        let looked = py.detach(|| runtime.block_on(async { tokio::time::timeout(SIGNALS_EVERY, &mut result).await }));
        match looked {
            Ok(Ok(Ok(value))) => return Ok(value),
            Ok(_) => return Err(PyRuntimeError::new_err("quotum's background task ended by itself; nothing is held")),
            Err(_) => py.check_signals().inspect_err(|_| abort.abort())?,
        }
    }
}

/// Returns an asyncio future of the running event loop for what runs in the background.
///
/// Whoever cancels it gets nothing, and what would have been delivered is dropped.
pub(crate) fn awaitable<'py, T>(
    py: Python<'py>,
    future: impl Future<Output = PyResult<T>> + Send + 'static,
) -> PyResult<Bound<'py, PyAny>>
where
    T: for<'a> IntoPyObject<'a> + Send + 'static,
{
    let event_loop = py.import("asyncio")?.call_method0("get_running_loop")?;
    let waiting = event_loop.call_method0("create_future")?;
    let (event_loop, shared) = (event_loop.unbind(), waiting.clone().unbind());
    runtime()?.spawn(async move {
        let result = future.await;
        // An interpreter that ends has nobody who waits.
        Python::try_attach(|py| {
            let result: Converted = Box::new(move |py| convert(py, result));
            let delivery = Delivery { waiting: shared, result: Mutex::new(Some(result)) };
            // A loop that is closed has nobody who waits, either.
            let _ = event_loop.call_method1(py, "call_soon_threadsafe", (delivery,));
        });
    });
    Ok(waiting)
}

/// Returns an asyncio future that is done.
pub(crate) fn ready<'py, T>(py: Python<'py>, result: PyResult<T>) -> PyResult<Bound<'py, PyAny>>
where
    T: IntoPyObject<'py>,
{
    let event_loop = py.import("asyncio")?.call_method0("get_running_loop")?;
    let waiting = event_loop.call_method0("create_future")?;
    match convert(py, result) {
        Ok(value) => waiting.call_method1("set_result", (value,))?,
        Err(error) => waiting.call_method1("set_exception", (error,))?,
    };
    Ok(waiting)
}

fn convert<'py, T: IntoPyObject<'py>>(py: Python<'py>, result: PyResult<T>) -> PyResult<Py<PyAny>> {
    let object = result?.into_pyobject(py).map_err(Into::into)?;
    Ok(object.into_any().unbind())
}

/// Makes the Python object of a result, once it is certain that somebody wants it.
type Converted = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;

/// What the event loop calls when something is done.
#[pyclass(frozen)]
struct Delivery {
    waiting: Py<PyAny>,
    result: Mutex<Option<Converted>>,
}

#[pymethods]
impl Delivery {
    fn __call__(&self, py: Python<'_>) -> PyResult<()> {
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        let is_wanted = !self.waiting.call_method0(py, "done")?.extract::<bool>(py)?;
        let Some(result) = result.filter(|_| is_wanted) else { return Ok(()) };
        match result(py) {
            Ok(value) => self.waiting.call_method1(py, "set_result", (value,))?,
            Err(error) => self.waiting.call_method1(py, "set_exception", (error,))?,
        };
        Ok(())
    }
}
