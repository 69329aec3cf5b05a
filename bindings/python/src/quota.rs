//! Quotas and standings as Python sees them.
//!
//! Knows their names and units in Python: seconds, not milliseconds. Must not know limiters.
//! The invariant it keeps: what the library would refuse is a ValueError here, when it is
//! written, and not later.

use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use quotum::Unit;
use quotum::ledger::WindowKind;

/// An amount of a unit per window.
#[pyclass(name = "Quota", module = "quotum", frozen, eq)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Quota {
    pub(crate) quota: quotum::Quota,
}

#[pymethods]
impl Quota {
    #[new]
    #[pyo3(signature = (unit, amount, window = 60.0, kind = "fixed", *, parts = None, burst = None))]
    fn new(unit: &str, amount: u64, window: f64, kind: &str, parts: Option<u8>, burst: Option<u64>) -> PyResult<Self> {
        let names = || Unit::ALL.map(Unit::name).join(", ");
        let unit = Unit::from_name(unit)
            .ok_or_else(|| PyValueError::new_err(format!("{unit:?} is not a unit; use one of: {}", names())))?;
        let window = seconds("window", window)?;
        let kind = kind_of(kind, parts, burst).map_err(PyValueError::new_err)?;
        let quota = quotum::Quota::new(unit, amount, window).and_then(|quota| quota.of_kind(kind));
        Ok(Self { quota: quota.map_err(|error| PyValueError::new_err(error.to_string()))? })
    }

    #[getter]
    fn unit(&self) -> &'static str {
        self.quota.unit().name()
    }

    #[getter]
    fn amount(&self) -> u64 {
        self.quota.amount()
    }

    #[getter]
    fn window(&self) -> f64 {
        self.quota.window().duration().as_secs_f64()
    }

    fn __repr__(&self) -> String {
        format!("<quotum.Quota {}>", self.quota)
    }
}

/// Returns the kind of window with this name and setting.
pub(crate) fn kind_of(kind: &str, parts: Option<u8>, burst: Option<u64>) -> Result<WindowKind, String> {
    match (kind, parts, burst) {
        ("fixed", None, None) => Ok(WindowKind::Fixed),
        ("sliding", None, None) => Ok(WindowKind::SLIDING),
        ("sliding", Some(parts), None) => Ok(WindowKind::Sliding { parts }),
        ("bucket", None, Some(burst)) => match burst.try_into() {
            Ok(burst) => Ok(WindowKind::Bucket { burst }),
            Err(_) => Err("a burst of 0 lets nothing through".to_owned()),
        },
        ("bucket", _, None) => Err("a bucket needs its size: burst=5000".to_owned()),
        ("fixed" | "sliding" | "bucket", ..) => {
            Err(format!("parts belong to sliding windows and a burst to buckets, not to {kind:?}"))
        }
        _ => Err(format!("{kind:?} is not a kind of window; use \"fixed\", \"sliding\", or \"bucket\" with burst=")),
    }
}

/// Returns a duration that Python wrote in seconds.
pub(crate) fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| PyValueError::new_err(format!("{name}={value} is not a number of seconds")))
}

/// Where one quota stands in the running window, as this replica knows it.
#[pyclass(name = "Standing", module = "quotum", frozen)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    standing: quotum::Standing,
}

impl From<quotum::Standing> for Standing {
    fn from(standing: quotum::Standing) -> Self {
        Self { standing }
    }
}

#[pymethods]
impl Standing {
    #[getter]
    fn quota(&self) -> Quota {
        Quota { quota: self.standing.quota }
    }

    #[getter]
    fn limit(&self) -> u64 {
        self.standing.limit
    }

    #[getter]
    fn used(&self) -> u64 {
        self.standing.used
    }

    #[getter]
    fn remaining(&self) -> u64 {
        self.standing.remaining()
    }

    #[getter]
    fn margin(&self) -> u64 {
        self.standing.margin_reachable + self.standing.margin_unreachable
    }

    #[getter]
    fn spendable(&self) -> u64 {
        self.standing.spendable
    }

    #[getter]
    fn vested(&self) -> u64 {
        self.standing.vested
    }

    #[getter]
    fn resets_in(&self) -> f64 {
        self.standing.resets_in.as_secs_f64()
    }

    fn __repr__(&self) -> String {
        let Self { standing } = self;
        format!(
            "<quotum.Standing {}: {} used, {} spendable here, resets in {:?}>",
            standing.quota, standing.used, standing.spendable, standing.resets_in
        )
    }
}
