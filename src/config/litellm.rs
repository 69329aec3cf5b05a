//! LiteLLM's `config.yaml`, read as it is.
//!
//! Knows where LiteLLM's users write a deployment, its limits and its keys, and which of its
//! providers speak an API that is passed on here. Must not know quotum's own file. The
//! invariants it keeps: what is read means here what it means there, and what is not read is
//! said, once a file: nothing is dropped in silence. docs/litellm-config.md is its table.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::{Mode, Quota, Unit};
use axum::http::{HeaderValue, Uri};
use serde_saphyr::{Location, Spanned};

use super::check::deployment::{default_id, tokenizer_of, upstream_base};
use super::tree::Tree;
use super::{Deployment, Environment, Problem, Reserve, Secret, Timeouts, Tokenizer, Unreported};

/// The limits of a deployment: LiteLLM's names, all of them per minute.
const LIMITS: [(&str, Unit); 4] =
    [("tpm", Unit::Tokens), ("rpm", Unit::Requests), ("itpm", Unit::InputTokens), ("otpm", Unit::OutputTokens)];

/// Providers whose API is OpenAI's and whose base the entry names.
const OPENAI_LIKE: [&str; 27] = [
    "openai",
    "text-completion-openai",
    "custom_openai",
    "openai_like",
    "hosted_vllm",
    "litellm_proxy",
    "lm_studio",
    "llamafile",
    "xinference",
    "groq",
    "mistral",
    "deepseek",
    "together_ai",
    "fireworks_ai",
    "openrouter",
    "perplexity",
    "xai",
    "cerebras",
    "nvidia_nim",
    "deepinfra",
    "sambanova",
    "moonshot",
    "novita",
    "nebius",
    "hyperbolic",
    "featherless_ai",
    "dashscope",
];

/// What the names of OpenAI's own models begin with, which need no provider there.
const OPENAI_MODELS: [&str; 10] =
    ["gpt-", "chatgpt-", "o1", "o3", "o4", "text-embedding-", "dall-e-", "tts-", "whisper-", "davinci-"];

/// What is understood of an entry, beside its limits.
const PARAMS: [&str; 8] = ["model", "api_base", "base_url", "api_key", "api_version", "timeout", "weight", "order"];

/// What was read from a file.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub(super) deployments: Vec<Deployment>,
    /// The weight each one names.
    pub(super) weights: Vec<Option<u32>>,
    pub(super) credentials: Vec<Secret>,
    /// What an operator should know about what was not read.
    pub(super) remarks: Vec<String>,
    /// Variables that are known only where it is served.
    pub(super) unseen: Vec<String>,
    pub(super) problems: Vec<Problem>,
}

/// Returns whether a text is LiteLLM's file and not quotum's own.
pub(super) fn is_one(text: &str) -> bool {
    let names = |name: &str| text.lines().any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(':')));
    names("model_list") && !names("deployments")
}

/// Reads a file's text; without an environment by itself, with something usable in the place of
/// every variable.
pub(super) fn read(text: &str, name: &str, env: Option<Environment<'_>>) -> Read {
    let options = serde_saphyr::options! { with_snippet: false };
    let tree: Spanned<Tree> = match serde_saphyr::from_str_with_options(text, options) {
        Ok(tree) => tree,
        Err(error) => {
            let at = error.location().filter(|at| at.line() > 0);
            let place = at.map_or_else(|| name.to_owned(), |at| format!("{name}:{}:{}", at.line(), at.column()));
            let message = error.render().lines().next().unwrap_or("not YAML").to_owned();
            let message = message.split(" at line ").next().unwrap_or(&message).to_owned();
            let problem = Problem { place, field: "(the file)".into(), message, unreadable: false };
            return Read { problems: vec![problem], ..Read::default() };
        }
    };
    let file = Map::of(&tree);
    let mut variables = BTreeMap::new();
    for (variable, value) in file.map("environment_variables").entries() {
        variables.extend(text_of(&value.value).map(|text| (variable.to_owned(), text)));
    }
    let look_up = |variable: &str| variables.get(variable).cloned().or_else(|| env?(variable));
    let is_offline = env.is_none();
    let (read, ignored) = (Read::default(), BTreeSet::new());
    let mut reader = Reader { name, env: &look_up, is_offline, file: &file, read, ignored };
    reader.file();
    reader.read
}

/// Returns a scalar as text: keys and numbers may be written with quotes or without.
fn text_of(tree: &Tree) -> Option<String> {
    match tree {
        Tree::Text(text) => Some(text.clone()),
        Tree::Number(number) => Some(number.to_string()),
        Tree::Map(_) | Tree::List(_) | Tree::Other => None,
    }
}

/// The entries of a map; of what is none, nothing.
#[derive(Clone, Copy, Debug)]
struct Map<'a> {
    at: Location,
    entries: &'a [(String, Spanned<Tree>)],
}

impl<'a> Map<'a> {
    fn of(tree: &'a Spanned<Tree>) -> Self {
        let entries = if let Tree::Map(entries) = &tree.value { entries.as_slice() } else { &[] };
        Self { at: tree.referenced, entries }
    }

    fn entries(self) -> impl Iterator<Item = (&'a str, &'a Spanned<Tree>)> {
        self.entries.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// Returns what stands at a name, unless it is `null`, a yes or a no.
    fn get(self, name: &str) -> Option<&'a Spanned<Tree>> {
        self.entries().find(|(other, _)| *other == name).map(|(_, value)| value).filter(|value| !value.value.is_other())
    }

    fn map(self, name: &str) -> Map<'a> {
        self.get(name).map_or(Map { at: self.at, entries: &[] }, Map::of)
    }

    fn list(self, name: &str) -> &'a [Spanned<Tree>] {
        match self.get(name).map(|value| &value.value) {
            Some(Tree::List(list)) => list,
            _ => &[],
        }
    }
}

/// One entry of `model_list`.
#[derive(Clone, Copy)]
struct Entry<'a> {
    number: usize,
    whole: Map<'a>,
    params: Map<'a>,
    defaults: Map<'a>,
    about: Map<'a>,
}

impl<'a> Entry<'a> {
    fn param(&self, name: &str) -> Option<&'a Spanned<Tree>> {
        self.params.get(name).or_else(|| self.defaults.get(name))
    }

    /// A limit may stand in three places; LiteLLM believes them in this order.
    fn limit(&self, name: &str) -> Option<(&'static str, &'a Spanned<Tree>)> {
        let at = |place: &'static str, value: Option<&'a Spanned<Tree>>| value.map(|value| (place, value));
        let whole = at("", self.whole.get(name));
        whole.or_else(|| at(".litellm_params", self.param(name))).or_else(|| at(".model_info", self.about.get(name)))
    }

    fn field(&self, rest: &str) -> String {
        format!("model_list[{}]{rest}", self.number)
    }
}

/// How a provider's API is reached.
struct Way {
    base: Uri,
    upstream_model: String,
    /// The variable that holds the key if the entry names none.
    key_variable: Option<&'static str>,
}

struct Reader<'a> {
    name: &'a str,
    env: Environment<'a>,
    is_offline: bool,
    file: &'a Map<'a>,
    read: Read,
    ignored: BTreeSet<String>,
}

impl<'a> Reader<'a> {
    fn problem(&mut self, at: Location, field: impl Into<String>, message: impl Into<String>) {
        let place =
            if at.line() == 0 { self.name.to_owned() } else { format!("{}:{}:{}", self.name, at.line(), at.column()) };
        self.read.problems.push(Problem { place, field: field.into(), message: message.into(), unreadable: false });
    }

    fn file(&mut self) {
        let file = *self.file;
        if let Some(include) = file.get("include") {
            let message = "included files are not read; name the file with the model_list itself, or put them together";
            self.problem(include.referenced, "include", message);
        }
        let (mut skipped, mut unlimited) = (Vec::new(), Vec::new());
        let defaults = file.map("router_settings").map("default_litellm_params");
        for (number, entry) in file.list("model_list").iter().enumerate() {
            let whole = Map::of(entry);
            let entry =
                Entry { number, whole, params: whole.map("litellm_params"), defaults, about: whole.map("model_info") };
            self.note_ignored(&entry);
            match self.entry(&entry) {
                Ok((deployment, weight)) => {
                    if deployment.quotas == [no_limit()] {
                        unlimited.push(deployment.model.clone());
                    }
                    self.read.deployments.push(deployment);
                    self.read.weights.push(weight);
                }
                Err(Some(why)) => skipped.push(format!("{} ({why})", entry.field(""))),
                // It is among the problems.
                Err(None) => {}
            }
        }
        if file.list("model_list").is_empty() {
            let message = "no model is listed; list at least one";
            self.problem(file.at, "model_list", message);
        } else if self.read.deployments.is_empty() && self.read.problems.is_empty() {
            let message = format!("no entry can be served: {}", skipped.join("; "));
            self.problem(file.at, "model_list", message);
        }
        self.spread_weights();
        self.aliases();
        self.credential();
        self.note_settings();
        let remark = |what: &str, list: Vec<String>| {
            (!list.is_empty()).then(|| format!("{}: {what}: {}", self.name, list.join(", ")))
        };
        unlimited.dedup();
        let ignored: Vec<String> = std::mem::take(&mut self.ignored).into_iter().collect();
        let remarks = [
            remark("models that are not served", skipped),
            remark("models without a limit (name tpm or rpm)", unlimited),
            remark("settings that are not read", ignored),
        ];
        self.read.remarks = remarks.into_iter().flatten().collect();
    }

    /// Returns the deployment of an entry, or why it is not served; what is wrong with it is
    /// among the problems.
    fn entry(&mut self, entry: &Entry<'_>) -> Result<(Deployment, Option<u32>), Option<String>> {
        let before = self.read.problems.len();
        let model = self.text(entry.whole.get("model_name"), &entry.field(".model_name"));
        let named = self.text(entry.param("model"), &entry.field(".litellm_params.model"));
        for (field, text) in [(".model_name", &model), (".litellm_params.model", &named)] {
            if text.as_ref().is_none_or(String::is_empty) && self.read.problems.len() == before {
                self.problem(entry.whole.at, entry.field(field), "is missing");
            }
        }
        let (Some(model), Some(named)) = (model, named) else { return Err(None) };
        if model.contains('*') || named.contains('*') {
            return Err(Some(format!("`{model}` is a wildcard; name its models")));
        }
        let way = self.way(entry, &named)?;
        let api_key = self.key(entry, way.key_variable);
        let quotas = self.quotas(entry);
        let timeouts = self.timeouts(entry);
        let weight = self.number(entry.param("weight"), &entry.field(".litellm_params.weight"), (0.0, 1_000.0));
        let order = entry.param("order").or_else(|| entry.about.get("order"));
        let order = self.number(order, &entry.field(".litellm_params.order"), (0.0, 1_000_000.0));
        let id = self.text(entry.about.get("id"), &entry.field(".model_info.id"));
        let base_model = self.text(entry.about.get("base_model"), &entry.field(".model_info.base_model"));
        if self.read.problems.len() > before {
            return Err(None);
        }
        let id = id.unwrap_or_else(|| default_id(&model, &named, &way.base));
        // What LiteLLM itself counts a deployment as whose name says nothing.
        let tokenizer = match base_model {
            Some(base) => Tokenizer::of_model(base.split_once('/').map_or(&*base, |(_, model)| model)),
            None => tokenizer_of(&way.upstream_model, &way.base),
        };
        let deployment = Deployment {
            id: self.unique(entry, id)?,
            upstream_model: Some(way.upstream_model).filter(|upstream| *upstream != model),
            model,
            upstream: way.base,
            api_key,
            timeouts,
            quotas,
            limit_id: None,
            mode: Mode::Strict,
            wait: Duration::from_millis(20),
            edge: Duration::from_millis(50),
            reserve: Reserve::Auto,
            tokenizer,
            default_max_tokens: 4_096,
            unreported: Unreported::Reserved,
            cached_input: None,
            weight: 1,
            // Those that name no order come after those that do.
            order: order.map_or(u32::MAX, |order| order as u32),
        };
        // Weights may be fractions of one.
        Ok((deployment, weight.map(|weight| (weight * 1_000.0).round() as u32)))
    }

    /// Returns the id; entries that differ in nothing but their key are numbered, since no id
    /// may be made from a secret.
    fn unique(&mut self, entry: &Entry<'_>, id: String) -> Result<String, Option<String>> {
        let taken = |id: &str| self.read.deployments.iter().any(|other| other.id == id);
        if !taken(&id) {
            return Ok(id);
        }
        if let Some(named) = entry.about.get("id") {
            let message = format!("`{id}` is taken by an entry before; give each its own id");
            self.problem(named.referenced, entry.field(".model_info.id"), message);
            return Err(None);
        }
        Ok((2..).map(|number: u32| format!("{id}-{number}")).find(|id| !taken(id)).unwrap_or(id))
    }

    fn way(&mut self, entry: &Entry<'_>, named: &str) -> Result<Way, Option<String>> {
        let custom = self.text(entry.param("custom_llm_provider"), &entry.field(".litellm_params.custom_llm_provider"));
        let is_openai = OPENAI_MODELS.iter().any(|start| named.starts_with(start));
        let (provider, model) = match (custom.as_deref(), named.split_once('/')) {
            (Some(provider), Some((first, model))) if provider == first => (provider, model),
            (Some(provider), _) => (provider, named),
            (None, Some(parts)) => parts,
            (None, None) if named.starts_with("claude-") => ("anthropic", named),
            (None, None) if is_openai => ("openai", named),
            (None, None) => return Err(Some(format!("`{named}` names no provider; write provider/{named}"))),
        };
        let (base_at, base) = match entry.param("api_base").or_else(|| entry.param("base_url")) {
            None => (entry.params.at, None),
            written @ Some(at) => (at.referenced, self.text(written, &entry.field(".litellm_params.api_base"))),
        };
        let (base, key_variable) = match (provider, base) {
            ("openai" | "text-completion-openai", None) => {
                ("https://api.openai.com/v1".to_owned(), Some("OPENAI_API_KEY"))
            }
            ("openai" | "text-completion-openai", Some(base)) => (base, Some("OPENAI_API_KEY")),
            ("anthropic", base) => {
                let base = base.unwrap_or_else(|| "https://api.anthropic.com".to_owned());
                let base = base.trim_end_matches('/').trim_end_matches("/messages").trim_end_matches("/v1");
                (format!("{base}/v1"), Some("ANTHROPIC_API_KEY"))
            }
            ("azure", base) => {
                let version = self.text(entry.param("api_version"), &entry.field(".litellm_params.api_version"));
                match (base, version) {
                    (Some(base), Some(version)) => {
                        let base = base.trim_end_matches('/').to_owned();
                        (format!("{base}/openai/deployments/{model}?api-version={version}"), Some("AZURE_API_KEY"))
                    }
                    (None, _) => return Err(Some(format!("`{named}` names no api_base"))),
                    (_, None) => return Err(Some(format!("`{named}` names no api_version"))),
                }
            }
            (provider, Some(base)) if OPENAI_LIKE.contains(&provider) => (base, None),
            (provider, None) if OPENAI_LIKE.contains(&provider) => {
                return Err(Some(format!("`{named}` names no api_base; write the one of {provider}'s OpenAI API")));
            }
            (provider, _) => return Err(Some(format!("`{named}`: the API of {provider} is not spoken here"))),
        };
        match upstream_base(base.trim_end_matches('/')) {
            Ok(base) => Ok(Way { base, upstream_model: model.to_owned(), key_variable }),
            Err(message) => {
                self.problem(base_at, entry.field(".litellm_params.api_base"), message);
                Err(None)
            }
        }
    }

    fn key(&mut self, entry: &Entry<'_>, variable: Option<&str>) -> Option<Secret> {
        let written = entry.param("api_key");
        let field = entry.field(".litellm_params.api_key");
        let key = match written {
            Some(_) => self.text(written, &field)?,
            None => (self.env)(variable?)?,
        };
        if key.is_empty() || HeaderValue::from_str(&key).is_err() {
            let at = written.map_or(entry.params.at, |written| written.referenced);
            self.problem(at, field, "is empty or holds characters that a header cannot carry");
            return None;
        }
        Some(Secret::new(key))
    }

    fn quotas(&mut self, entry: &Entry<'_>) -> Vec<Quota> {
        let mut quotas = Vec::new();
        for (name, unit) in LIMITS {
            let Some((place, written)) = entry.limit(name) else { continue };
            let field = entry.field(&format!("{place}.{name}"));
            let Some(amount) = self.number(Some(written), &field, (1.0, Quota::MAX_AMOUNT as f64)) else { continue };
            match Quota::new(unit, amount as u64, Duration::from_secs(60)) {
                Ok(quota) => quotas.push(quota),
                Err(error) => self.problem(written.referenced, field, error.to_string()),
            }
        }
        if quotas.is_empty() { vec![no_limit()] } else { quotas }
    }

    /// LiteLLM's one timeout is that of its HTTP client: for each wait on the socket.
    fn timeouts(&mut self, entry: &Entry<'_>) -> Timeouts {
        let file = *self.file;
        let (router, module) = (file.map("router_settings"), file.map("litellm_settings"));
        let places = [
            (entry.param("timeout"), entry.field(".litellm_params.timeout")),
            (router.get("timeout"), "router_settings.timeout".into()),
            (module.get("request_timeout"), "litellm_settings.request_timeout".into()),
        ];
        let Some((written, field)) = places.into_iter().find(|(written, _)| written.is_some()) else {
            return Timeouts::default();
        };
        let seconds = self.number(written, &field, (0.001, 86_400.0));
        let timeout = seconds.map(Duration::from_secs_f64);
        let usual = Timeouts::default();
        Timeouts { first_byte: timeout.unwrap_or(usual.first_byte), idle: timeout.unwrap_or(usual.idle), ..usual }
    }

    /// Where one of a model's entries has a weight, the others are asked last, as there they
    /// are never.
    fn spread_weights(&mut self) {
        let Read { deployments, weights, .. } = &mut self.read;
        let weighed = deployments.iter().zip(weights.iter()).filter(|(_, weight)| weight.is_some());
        let weighed: BTreeSet<String> = weighed.map(|(deployment, _)| deployment.model.clone()).collect();
        for (deployment, weight) in deployments.iter().zip(weights.iter_mut()) {
            if weight.is_none() && weighed.contains(&deployment.model) {
                *weight = Some(0);
            }
        }
    }

    /// An alias is another name for the same deployments and the same limits.
    fn aliases(&mut self) {
        for (alias, target) in self.file.map("router_settings").map("model_group_alias").entries() {
            let name = match &target.value {
                Tree::Map(_) => self.text(Map::of(target).get("model"), "router_settings.model_group_alias"),
                _ => text_of(&target.value),
            };
            let targets = self.read.deployments.iter().zip(&self.read.weights);
            let targets = targets.filter(|(deployment, _)| Some(&deployment.model) == name.as_ref());
            let (copies, weights): (Vec<_>, Vec<_>) = targets
                .map(|(deployment, weight)| {
                    let upstream_model = deployment.upstream_model.clone().or_else(|| Some(deployment.model.clone()));
                    let copy = Deployment {
                        id: format!("{}/{alias}", deployment.id),
                        model: alias.to_owned(),
                        upstream_model,
                        limit_id: Some(deployment.id.clone()),
                        ..deployment.clone()
                    };
                    (copy, *weight)
                })
                .unzip();
            if copies.is_empty() {
                self.ignored.insert(format!("router_settings.model_group_alias.{alias} (its model is not served)"));
            }
            self.read.deployments.extend(copies);
            self.read.weights.extend(weights);
        }
    }

    fn credential(&mut self) {
        let written = self.file.map("general_settings").get("master_key");
        if let Some(key) = self.text(written, "general_settings.master_key") {
            self.read.credentials.push(Secret::new(key));
        }
    }

    fn note_ignored(&mut self, entry: &Entry<'_>) {
        let limits = LIMITS.map(|(name, _)| name);
        let known = |names: &[&str], name: &str| limits.contains(&name) || names.contains(&name);
        for (name, _) in entry.whole.entries() {
            if !known(&["model_name", "litellm_params", "model_info"], name) {
                self.ignored.insert(name.to_owned());
            }
        }
        for (name, _) in entry.params.entries().chain(entry.defaults.entries()) {
            if !known(&PARAMS, name) && name != "custom_llm_provider" {
                self.ignored.insert(unread("litellm_params", name));
            }
        }
        // The rest of `model_info` describes the model, and changes nothing there either.
    }

    fn note_settings(&mut self) {
        const READ: [(&str, &[&str]); 4] = [
            ("router_settings", &["timeout", "default_litellm_params", "model_group_alias"]),
            ("litellm_settings", &["request_timeout"]),
            ("general_settings", &["master_key"]),
            ("environment_variables", &[]),
        ];
        for (section, value) in self.file.entries() {
            match READ.iter().find(|(name, _)| *name == section) {
                Some(("environment_variables", _)) => {}
                Some((_, known)) => {
                    let names = Map::of(value).entries().map(|(name, _)| name).filter(|name| !known.contains(name));
                    self.ignored.extend(names.map(|name| unread(section, name)));
                }
                None if ["model_list", "include"].contains(&section) => {}
                None => {
                    self.ignored.insert(section.to_owned());
                }
            }
        }
    }

    /// Returns a text, looked up where it says so. What it says is never repeated: it may be
    /// a secret.
    fn text(&mut self, written: Option<&Spanned<Tree>>, field: &str) -> Option<String> {
        let written = written?;
        let Some(text) = text_of(&written.value) else {
            self.problem(written.referenced, field, "is not a text");
            return None;
        };
        let Some(variable) = text.strip_prefix("os.environ/") else { return Some(text) };
        let found = (self.env)(variable);
        if found.is_none() && self.is_offline {
            self.read.unseen.push(format!("{field} ({text})"));
            return Some(stand_in(variable, field));
        }
        if found.is_none() {
            let message = format!("the environment variable {variable} is not set; set it or name another one");
            self.problem(written.referenced, field, message);
        }
        found
    }

    /// Returns a number, which may be quoted and have underscores, as Python's readers take it.
    fn number(&mut self, written: Option<&Spanned<Tree>>, field: &str, range: (f64, f64)) -> Option<f64> {
        let unseen = self.read.unseen.len();
        let text = self.text(written, field)?;
        if self.read.unseen.len() > unseen {
            return Some(range.0);
        }
        let number: Option<f64> = text.replace('_', "").trim().parse().ok();
        let number = number.filter(|number| (range.0..=range.1).contains(number));
        if number.is_none() {
            let at = written.map_or(self.file.at, |written| written.referenced);
            self.problem(at, field, format!("`{text}` is not a number between {} and {}", range.0, range.1));
        }
        number
    }
}

/// Returns what could stand in a variable that is not known.
fn stand_in(variable: &str, field: &str) -> String {
    match field.rsplit('.').next() {
        Some("api_base") => format!("https://variable.invalid/{variable}"),
        Some("model") => format!("openai/{variable}"),
        Some("custom_llm_provider") => "openai".to_owned(),
        _ => variable.to_owned(),
    }
}

/// Returns how a setting that is not read is named, with the reason where it has a counterpart
/// that is.
fn unread(section: &str, name: &str) -> String {
    match name {
        "stream_timeout" => {
            format!("{section}.{name} (a timeout holds for whole answers and streams alike; use timeout)")
        }
        _ => format!("{section}.{name}"),
    }
}

/// The limit of a deployment that names none: more requests than anybody can send.
fn no_limit() -> Quota {
    Quota::requests(Quota::MAX_AMOUNT).per_minute()
}

#[cfg(test)]
#[path = "litellm_tests.rs"]
mod tests;
