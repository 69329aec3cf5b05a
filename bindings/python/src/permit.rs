//! A reservation in Python's hands.
//!
//! Knows how `with` and garbage collection treat it. Must not know how it was decided. The
//! invariant it keeps: unlike in Rust, what is forgotten stays charged, because Python says
//! at no certain time that something was dropped, and a request may long have been sent.

use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use quotum::{Claim, Unit};

/// A reservation: settle it with what was used, or refund it. Unsettled it stays charged.
#[pyclass(name = "Permit", module = "quotum", frozen)]
#[derive(Debug)]
pub(crate) struct Permit {
    permit: Mutex<Option<quotum::Permit<'static>>>,
    deployment: String,
    claim: Claim,
    waited: f64,
}

impl Permit {
    /// Hands a reservation over to Python.
    pub(crate) fn new(mut permit: quotum::Permit<'static>, deployment: String) -> Self {
        permit.start();
        let (claim, waited) = (permit.claim(), permit.waited().as_secs_f64());
        Self { permit: Mutex::new(Some(permit)), deployment, claim, waited }
    }

    fn take(&self) -> PyResult<quotum::Permit<'static>> {
        let permit = self.permit.lock().unwrap_or_else(PoisonError::into_inner).take();
        permit.ok_or_else(|| PyRuntimeError::new_err("this permit is settled already; nothing was changed"))
    }
}

#[pymethods]
impl Permit {
    /// Replaces the estimate by what was used.
    #[pyo3(signature = (tokens = None, *, input_tokens = None, output_tokens = None))]
    fn settle(
        &self,
        py: Python<'_>,
        tokens: Option<u64>,
        input_tokens: Option<u64>,
        output_tokens: Option<u64>,
    ) -> PyResult<()> {
        let requests = self.claim.amount(Unit::Requests);
        let actual = claim(tokens, input_tokens, output_tokens, requests)?;
        let permit = self.take()?;
        // The ledger's lock may be held by a thread that wants the interpreter.
        py.detach(|| permit.settle_claim(actual));
        Ok(())
    }

    /// Gives everything back: the request never reached the upstream.
    fn refund(&self, py: Python<'_>) -> PyResult<()> {
        let permit = self.take()?;
        py.detach(|| permit.refund());
        Ok(())
    }

    #[getter]
    fn deployment(&self) -> &str {
        &self.deployment
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.claim.amount(Unit::Tokens)
    }

    #[getter]
    fn waited(&self) -> f64 {
        self.waited
    }

    #[getter]
    fn settled(&self) -> bool {
        self.permit.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    /// What was not settled stays charged: the request may have reached the upstream.
    #[pyo3(signature = (*_error))]
    fn __exit__(&self, _error: &Bound<'_, pyo3::types::PyTuple>) {
        drop(self.take());
    }

    fn __repr__(&self) -> String {
        let state = if self.settled() { "settled" } else { "open" };
        format!("<quotum.Permit {} tokens of {:?}, {state}>", self.tokens(), self.deployment)
    }
}

/// Returns the claim of these amounts.
pub(crate) fn claim(
    tokens: Option<u64>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    requests: u64,
) -> PyResult<Claim> {
    let claim = match (tokens, input_tokens, output_tokens) {
        (None, None, None) => {
            return Err(pyo3::exceptions::PyTypeError::new_err(
                "say how many tokens: tokens=, or input_tokens= and output_tokens=",
            ));
        }
        (Some(tokens), None, None) => Claim::tokens(tokens),
        (tokens, input, output) => {
            let claim = Claim::prompt_and_output(input.unwrap_or(0), output.unwrap_or(0));
            tokens.map_or(claim, |tokens| claim.with(Unit::Tokens, tokens))
        }
    };
    Ok(claim.with(Unit::Requests, requests))
}
