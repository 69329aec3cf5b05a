//! Refusals as Python's exception.
//!
//! Knows which attributes `quotum.Denied` has. Must not know why something is refused.
//! The invariant it keeps: `retry_after` is `None` exactly where "later" is a lie.

use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Returns the exception of a refusal.
pub(crate) fn denied(py: Python<'_>, deployment: &str, denied: &quotum::Denied) -> PyErr {
    let build = || -> PyResult<Bound<'_, PyAny>> {
        let attributes = PyDict::new(py);
        attributes.set_item("deployment", deployment)?;
        attributes.set_item("reason", denied.reason())?;
        attributes.set_item("retry_after", denied.retry_after().map(|after| after.as_secs_f64()))?;
        attributes.set_item("limit", denied.by().to_string())?;
        attributes.set_item("unit", denied.by().unit().name())?;
        attributes.set_item("remaining", denied.standing().remaining())?;
        py.import("quotum._denied")?.getattr("Denied")?.call((denied.to_string(),), Some(&attributes))
    };
    build().map_or_else(|error| error, PyErr::from_value)
}
