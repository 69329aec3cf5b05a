//! Quotum for Python: the limiter, and what stands behind LiteLLM's callback.
//!
//! Knows how Python's objects and waiting map to the library's. Must not know how a limit
//! decides. The invariant it keeps: the interpreter is never held while anything waits, and
//! nothing runs in the background before the first use, so a process may fork until then.

mod background;
mod denied;
mod keys;
mod limiter;
mod permit;
mod pod;
mod quota;
mod settings;

use pyo3::prelude::*;

/// The native part of the package.
#[pymodule]
fn _quotum(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<limiter::Limiter>()?;
    module.add_class::<permit::Permit>()?;
    module.add_class::<pod::Pod>()?;
    module.add_class::<quota::Quota>()?;
    module.add_class::<quota::Standing>()?;
    module.add_function(wrap_pyfunction!(background::stop, module)?)?;
    Ok(())
}
