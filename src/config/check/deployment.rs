//! From what was written to what can be served: deployments and their limits.
//!
//! Knows what a deployment may be and which of its settings belong to later versions.
//! Must not know how requests are metered. The invariant it keeps: no two deployments
//! share an id, and those that share a limit agree on it.

use std::collections::BTreeMap;
use std::mem::discriminant;
use std::time::Duration;

use crate::ledger::{LimitId, QuotaError, WindowKind, WindowLength};
use crate::{Mode, Portion, Quota, Unit};
use axum::http::{HeaderValue, Uri};
use serde_saphyr::{Location, Spanned};

use super::kind::kind;
use super::{Check, name};
use crate::config::file;
use crate::config::scalar::duration;
use crate::config::{Deployment, Reserve, Secret, Timeouts, Tokenizer, Unreported};

/// The largest output cap anybody may name: far above every model's.
const MAX_TOKENS: i64 = i32::MAX as i64;

/// The weight of the largest among deployments that are weighed by their limits.
const USUAL_WEIGHT: u32 = 100;

/// Returns the deployments, and the weights that were written for them.
pub(super) fn deployments(
    check: &mut Check<'_>,
    written: Vec<Spanned<file::Deployment>>,
) -> (Vec<Deployment>, Vec<Option<u32>>) {
    let mut ids: BTreeMap<String, Location> = BTreeMap::new();
    let mut limits: BTreeMap<String, (String, Vec<Quota>, Mode)> = BTreeMap::new();
    let (mut all, mut weights) = (Vec::new(), Vec::new());
    for (i, spanned) in written.into_iter().enumerate() {
        let at = spanned.referenced;
        let id_at = spanned.value.id.as_ref().map_or(at, |id| id.referenced);
        let limits_at = spanned.value.limits.as_ref().map_or(at, |limits| limits.referenced);
        let mode_at = spanned.value.mode.as_ref().map_or(at, |mode| mode.referenced);
        let weight = check.small(spanned.value.weight.as_ref(), &format!("deployments[{i}].weight"));
        let Some(deployment) = deployment(check, spanned.value, at, &format!("deployments[{i}]")) else { continue };
        if let Some(first) = ids.insert(deployment.id.clone(), id_at) {
            let first = check.place(first);
            check.problem(
                id_at,
                format!("deployments[{i}].id"),
                format!("`{}` is taken by the deployment at {first}; give each its own id", deployment.id),
            );
        }
        let mut quotas = deployment.quotas.clone();
        quotas.sort();
        let limit = deployment.limit_id.clone().unwrap_or_else(|| deployment.id.clone());
        let ours = || (deployment.id.clone(), quotas.clone(), deployment.mode);
        let (sharer, shared, mode) = limits.entry(limit.clone()).or_insert_with(ours);
        if *shared != quotas {
            let message = format!(
                "shares the limit `{limit}` with deployment `{sharer}` but names other limits; make them equal"
            );
            check.problem(limits_at, format!("deployments[{i}].limits"), message);
        }
        if *mode != deployment.mode {
            let message =
                format!("shares the limit `{limit}` with deployment `{sharer}`, which is {mode}; make them equal");
            check.problem(mode_at, format!("deployments[{i}].mode"), message);
        }
        all.push(deployment);
        weights.push(weight);
    }
    (all, weights)
}

/// Sets the weights of deployments that name none: 1 where another of their model and order
/// names one, else in proportion to their limits, so that all have the same part left.
pub(in crate::config) fn weigh(all: &mut [Deployment], written: &[Option<u32>]) {
    let beside = |one: &Deployment, other: &Deployment| (&one.model, one.order) == (&other.model, other.order);
    let weights = (0..all.len()).map(|i| {
        let group = || (0..all.len()).filter(|other| beside(&all[i], &all[*other]));
        match written[i] {
            Some(weight) => weight,
            None if group().any(|other| written[other].is_some()) => 1,
            None => {
                let rates = |unit: Unit| group().map(|other| rate(&all[other], unit)).collect::<Option<Vec<_>>>();
                let unit = Unit::ALL.into_iter().find(|unit| rates(*unit).is_some());
                let share = unit.and_then(|unit| {
                    let most = rates(unit)?.into_iter().fold(0.0, f64::max);
                    Some(rate(&all[i], unit)? / most * f64::from(USUAL_WEIGHT))
                });
                share.map_or(1, |share| share.round().max(1.0) as u32)
            }
        }
    });
    let weights: Vec<u32> = weights.collect();
    all.iter_mut().zip(weights).for_each(|(deployment, weight)| deployment.weight = weight);
}

/// Returns the units per second that the strictest limit of a unit lets through.
fn rate(deployment: &Deployment, unit: Unit) -> Option<f64> {
    let of_unit = deployment.quotas.iter().filter(|quota| quota.unit() == unit);
    of_unit.map(|quota| quota.amount() as f64 / quota.window().duration().as_secs_f64()).min_by(f64::total_cmp)
}

fn deployment(check: &mut Check<'_>, written: file::Deployment, at: Location, field: &str) -> Option<Deployment> {
    let path = format!("{field}.model");
    let model = check.required(written.model, at, &path, "the name callers use, such as gpt-4o");
    let model = model.map(|model| check.written(model, path));
    let model = check.parsed(model, name);
    let path = format!("{field}.upstream");
    let upstream =
        check.required(written.upstream, at, &path, "the base of its API, such as https://example.invalid/v1");
    let upstream = upstream.map(|upstream| check.written(upstream, path));
    let upstream = check.parsed(upstream, upstream_base);
    let upstream_model = written.upstream_model.map(|model| check.written(model, format!("{field}.upstream_model")));
    let upstream_model = check.parsed(upstream_model, name);
    let id = written.id.map(|id| check.written(id, format!("{field}.id")));
    let id = check.parsed(id, name);
    let limit_id = written.limit_id.map(|id| check.written(id, format!("{field}.limit_id")));
    let limit_id = check.parsed(limit_id, name);
    let api_key = written.api_key.and_then(|key| api_key(check, &key, field));
    let timeouts = timeouts(check, written.timeouts, field);
    let quotas = quotas(check, written.limits, at, field);
    let mode_at = written.mode.as_ref().map(|mode| mode.referenced);
    let mode = super::mode::mode(check, written.mode, field);
    let bucket = quotas.iter().any(|quota| matches!(quota.kind(), WindowKind::Bucket { .. }));
    if let Some(at) = mode_at.filter(|_| bucket && matches!(mode, Mode::Sum { .. })) {
        let message =
            "`sum` keeps no rights over, so it cannot have `bucket` windows; use strict or elastic, or another kind";
        check.problem(at, format!("{field}.mode"), message);
    }
    let ms = Duration::from_millis;
    let edge_at = written.edge.as_ref().map(|edge| edge.referenced);
    let mut edge = check.duration(written.edge, &format!("{field}.edge"), ms(50), (ms(0), ms(2_000)));
    if let Some(lead) = quotas.iter().map(|quota| quota.lead()).min()
        && edge > lead
    {
        if let Some(at) = edge_at {
            let message = format!("must be at most {lead:?}, a quarter of the shortest window");
            check.problem(at, format!("{field}.edge"), message);
        }
        edge = lead;
    }
    let wait = check.duration(written.wait, &format!("{field}.wait"), ms(20), (ms(0), ms(60_000)));
    let reserve = check.choice(
        written.reserve,
        &format!("{field}.reserve"),
        &[("auto", Reserve::Auto), ("bound", Reserve::Bound), ("learned", Reserve::Learned)],
    );
    let tokenizer_at = written.tokenizer.as_ref().map(|tokenizer| tokenizer.referenced);
    let tokenizer = check.choice(
        written.tokenizer,
        &format!("{field}.tokenizer"),
        &[
            ("auto", None),
            ("o200k", Some(Tokenizer::O200k)),
            ("cl100k", Some(Tokenizer::Cl100k)),
            ("bytes", Some(Tokenizer::Bytes)),
        ],
    );
    if let Some(at) = tokenizer_at.filter(|_| tokenizer.is_some_and(|named| named != Tokenizer::Bytes))
        && !Tokenizer::IS_BUILT_IN
    {
        let message = "this quotum was built without its tokenizer; write `bytes` or build it with the feature \
                       `tokenizer`";
        check.problem(at, format!("{field}.tokenizer"), message);
    }
    let unreported = check.choice(
        written.unreported,
        &format!("{field}.unreported"),
        &[("reserved", Unreported::Reserved), ("counted", Unreported::Counted)],
    );
    let default_max_tokens = written.default_max_tokens.map_or(4_096, |tokens| {
        if !(1..=MAX_TOKENS).contains(&tokens.value) {
            let message = format!("{} is out of range; it must lie between 1 and {MAX_TOKENS}", tokens.value);
            check.problem(tokens.referenced, format!("{field}.default_max_tokens"), message);
        }
        tokens.value.unsigned_abs()
    });
    let cached_input = written.weights.cached_input.and_then(|weight| {
        let portion = Portion::new(weight.value);
        if portion.is_err() && weight.value != 1.0 {
            let message = format!(
                "{} is not a weight; write a number from 0 (tokens read from the cache are free) to 1 (they count like \
                 others), such as 0.1",
                weight.value
            );
            check.problem(weight.referenced, format!("{field}.weights.cached_input"), message);
        }
        portion.ok()
    });
    let order = check.small(written.order.as_ref(), &format!("{field}.order")).unwrap_or(1);
    let (model, upstream) = (model?, upstream?);
    let tokenizer = tokenizer.unwrap_or_else(|| tokenizer_of(upstream_model.as_deref().unwrap_or(&model), &upstream));
    Some(Deployment {
        id: id.unwrap_or_else(|| default_id(&model, upstream_model.as_deref().unwrap_or(&model), &upstream)),
        model,
        upstream_model,
        upstream,
        api_key,
        timeouts,
        quotas,
        limit_id,
        mode,
        wait,
        edge,
        reserve,
        tokenizer,
        default_max_tokens,
        unreported,
        cached_input,
        weight: 1,
        order,
    })
}

/// Returns what a model is counted with that an upstream knows by this name: on Azure a name
/// is whatever its owner called it.
pub(in crate::config) fn tokenizer_of(upstream_model: &str, upstream: &Uri) -> Tokenizer {
    let is_azure = upstream.host().is_some_and(|host| host.to_ascii_lowercase().ends_with(".azure.com"))
        || upstream.path().contains("/openai/deployments/");
    if is_azure { Tokenizer::Bytes } else { Tokenizer::of_model(upstream_model) }
}

/// Returns the id of a deployment that was given none.
///
/// Every pod derives the same one from the same config, and no secret goes into it: not
/// even the base's query, which may carry one.
pub(in crate::config) fn default_id(model: &str, upstream_model: &str, upstream: &Uri) -> String {
    let base = format!(
        "{}://{}{}",
        upstream.scheme_str().unwrap_or_default(),
        upstream.authority().map_or("", |authority| authority.as_str()),
        upstream.path()
    );
    let hash = LimitId::of(&format!("{model}\0{upstream_model}\0{base}"));
    format!("{model}-{:016x}", hash.bits())
}

pub(in crate::config) fn upstream_base(text: &str) -> Result<Uri, String> {
    // The text may carry a credential, so no refusal repeats it.
    let refusal = "not the base of an API; write it like https://example.invalid/v1";
    let uri: Uri = text.parse().map_err(|_| refusal.to_owned())?;
    let authority = uri.authority().ok_or(refusal)?;
    if authority.as_str().contains('@') {
        return Err("must not carry a user or password; use api_key".into());
    }
    if authority.port_u16().is_none() && authority.as_str().ends_with(|c: char| c.is_ascii_digit() || c == ':') {
        // The parser takes any digits for a port, and the client would go to the scheme's own.
        let host = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
        if !host.is_empty() {
            return Err("its port is none; write one between 1 and 65535".into());
        }
    }
    if text.contains('#') {
        return Err(format!("{refusal}, without a fragment"));
    }
    match uri.scheme_str() {
        Some("http" | "https") => Ok(uri),
        _ => Err(format!("{refusal}; only http and https are spoken")),
    }
}

fn api_key(check: &mut Check<'_>, key: &Spanned<Secret>, field: &str) -> Option<Secret> {
    let field = format!("{field}.api_key");
    let text = key.value.reveal();
    let secret = match text.strip_prefix("os.environ/") {
        Some(_) if check.is_unseen(&field, text) => return None,
        Some(variable) => match check.variable(variable) {
            Some(value) => Secret::new(value),
            None => {
                let message = format!("the environment variable {variable} is not set; set it or name another one");
                check.problem(key.referenced, field, message);
                return None;
            }
        },
        None => key.value.clone(),
    };
    if secret.reveal().is_empty() || HeaderValue::from_str(secret.reveal()).is_err() {
        check.problem(key.referenced, field, "is empty or holds characters that a header cannot carry");
        return None;
    }
    Some(secret)
}

fn timeouts(check: &mut Check<'_>, written: file::Timeouts, field: &str) -> Timeouts {
    let (usual, range) = (Timeouts::default(), (Duration::from_millis(1), Duration::from_secs(86_400)));
    Timeouts {
        connect: check.duration(written.connect, &format!("{field}.timeouts.connect"), usual.connect, range),
        first_byte: check.duration(
            written.first_byte,
            &format!("{field}.timeouts.first_byte"),
            usual.first_byte,
            range,
        ),
        idle: check.duration(written.idle, &format!("{field}.timeouts.idle"), usual.idle, range),
    }
}

fn quotas(
    check: &mut Check<'_>,
    written: Option<Spanned<Vec<Spanned<file::Limit>>>>,
    at: Location,
    field: &str,
) -> Vec<Quota> {
    const EXAMPLE: &str = "at least one limit: { unit: tokens, amount: 100000, window: 60s }";
    let path = format!("{field}.limits");
    let Some(written) = check.required(written, at, &path, EXAMPLE) else { return Vec::new() };
    if written.value.is_empty() {
        check.problem(written.referenced, path, format!("is empty; name {EXAMPLE}"));
    }
    let mut quotas: Vec<Quota> = Vec::new();
    for (i, limit) in written.value.into_iter().enumerate() {
        let at = limit.referenced;
        let field = format!("{field}.limits[{i}]");
        let Some(quota) = quota(check, limit.value, at, &field) else { continue };
        if quotas.iter().any(|other| same_window(*other, quota)) {
            let message = format!("a limit of {} for this window is already named; keep one", quota.unit());
            check.problem(at, field, message);
        } else {
            quotas.push(quota);
        }
    }
    quotas
}

/// A minute and a sliding minute of one unit can both be meant; two fixed minutes cannot.
fn same_window(one: Quota, other: Quota) -> bool {
    one.unit() == other.unit()
        && one.window() == other.window()
        && discriminant(&one.kind()) == discriminant(&other.kind())
}

fn quota(check: &mut Check<'_>, written: file::Limit, at: Location, field: &str) -> Option<Quota> {
    let names: Vec<&str> = Unit::ALL.iter().map(|unit| unit.name()).collect();
    let path = format!("{field}.unit");
    let unit = check.required(written.unit, at, &path, &format!("one of: {}", names.join(", ")));
    let unit = unit.map(|unit| check.written(unit, path));
    let unit = check.parsed(unit, |text| {
        Unit::from_name(text).ok_or_else(|| format!("`{text}` is not one of: {}", names.join(", ")))
    });
    let path = format!("{field}.amount");
    let amount = check.required(written.amount, at, &path, "how many units a window lets through, at least 1");
    let amount_at = amount.as_ref().map_or(at, |amount| amount.referenced);
    let amount = amount.and_then(|amount| {
        let positive = u64::try_from(amount.value).ok().filter(|amount| *amount > 0);
        if positive.is_none() {
            let message = format!("{} would let nothing through; a limit is at least 1", amount.value);
            check.problem(amount_at, path, message);
        }
        positive
    });
    let kind_at = written.kind.as_ref().map_or(at, |kind| kind.referenced);
    let beside = [("parts", written.parts), ("burst", written.burst), ("time_zone", written.time_zone)];
    let kind = kind(written.kind, beside).map_err(|message| {
        check.problem(kind_at, format!("{field}.kind"), message);
    });
    let kind = kind.ok();
    let path = format!("{field}.window");
    let window_at = written.window.as_ref().map_or(at, |window| window.referenced);
    let window = match (written.window, kind) {
        (Some(window), _) => {
            let window = check.written(window, path);
            check.parsed(Some(window), duration)
        }
        (None, Some(WindowKind::Day { .. })) => Some(WindowLength::DAY.duration()),
        // Whether it needs one is not known.
        (None, None) => None,
        (None, Some(_)) => {
            check.problem(at, path, "is missing; write how long a window is, such as 60s");
            None
        }
    };
    let (unit, amount, window, kind) = (unit?, amount?, window?, kind?);
    let quota = Quota::new(unit, amount, window).and_then(|quota| quota.of_kind(kind)).map_err(|error| {
        let (at, part) = match error {
            QuotaError::Window(_) | QuotaError::Day(_) => (window_at, "window"),
            QuotaError::Parts(_) | QuotaError::Burst { .. } => (kind_at, "kind"),
            _ => (amount_at, "amount"),
        };
        check.problem(at, format!("{field}.{part}"), error.to_string());
    });
    quota.ok().map(|quota| if written.at_once { quota.at_once() } else { quota })
}
