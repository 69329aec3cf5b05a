//! From what was written to what can be served: node, gossip, proxy and admin.
//!
//! Knows what every setting may be and who wins. Must not know how it is used. The
//! invariant it keeps: it goes on after a problem, so that one run shows them all, and
//! nothing it could not understand reaches the [`Config`].

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cluster::{KeyRing, Seeds};
use crate::ledger::{FirstWindow, OnSilence};
use serde_saphyr::{Location, Spanned};

use super::file::{File, Text};
use super::named::{self, FileError};
use super::scalar::{address, duration};
use super::{
    ADMIN_PORT, Config, ConfigError, Environment, Flags, GOSSIP_PORT, Gossip, Listen, Pods, Problem, SERVICE_ACCOUNT,
    Secret, litellm,
};

pub(super) mod deployment;
mod kind;
mod mode;
mod proxy;

/// The longest node name: what a roster message has room for.
const MAX_NAME: usize = 128;

/// Returns the configuration, or everything that is wrong with it.
///
/// `litellm` is what LiteLLM's file says, if it was given in the place of our own. Without an
/// environment only the text is checked, and the configuration must not be served.
pub(super) fn check(
    file: File,
    litellm: Option<litellm::Read>,
    name: &str,
    env: Option<Environment<'_>>,
    flags: &Flags,
) -> Result<Config, ConfigError> {
    let mut check = Check { name, env, unseen: Vec::new(), problems: Vec::new() };
    let litellm_at = file.litellm_config.as_ref().map_or(Location::UNKNOWN, |path| path.referenced);
    let litellm = file.litellm_config.and_then(|path| check.litellm(path)).or(litellm).unwrap_or_default();
    check.problems.extend(litellm.problems);
    let (mut deployments, mut weights) = deployment::deployments(&mut check, file.deployments);
    for deployment in litellm.deployments {
        if deployments.iter().any(|other| other.id == deployment.id) {
            let message = format!("its deployment `{}` is listed here, too; give one another id", deployment.id);
            check.problem(litellm_at, "litellm_config", message);
        }
        deployments.push(deployment);
    }
    weights.extend(litellm.weights);
    deployment::weigh(&mut deployments, &weights);
    let embedded_stub = deployments.is_empty();
    let node = check.node(file.node.name, flags);
    let gossip = check.gossip(file.gossip, flags);
    let proxy = check.proxy(file.proxy, litellm.credentials, flags);
    let loopback_by_default = embedded_stub && check.problems.is_empty();
    let admin =
        check.pick(&flags.admin_listen, "--admin-listen", "QUOTUM_ADMIN_LISTEN", file.admin.listen, "admin.listen");
    let admin_default = if loopback_by_default { loopback(ADMIN_PORT) } else { Listen::Everywhere(ADMIN_PORT) };
    let admin = check.listen(admin).unwrap_or(admin_default);
    if !check.problems.is_empty() {
        return Err(ConfigError { problems: check.problems });
    }
    let mut remarks = litellm.remarks;
    check.unseen.extend(litellm.unseen);
    if !check.unseen.is_empty() {
        remarks.push(format!("{name}: not looked at: {}", check.unseen.join(", ")));
    }
    Ok(Config { node, gossip, proxy, admin, deployments, embedded_stub, remarks })
}

/// A setting somebody made, and where.
#[derive(Clone)]
struct Setting {
    text: String,
    place: String,
    field: String,
}

struct Check<'a> {
    name: &'a str,
    /// `None`: the text is checked by itself, where neither variables nor files are those of
    /// the machine that serves.
    env: Option<Environment<'a>>,
    /// What was not looked at for that.
    unseen: Vec<String>,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn is_offline(&self) -> bool {
        self.env.is_none()
    }

    fn variable(&self, name: &str) -> Option<String> {
        self.env?(name)
    }

    /// Returns whether what a setting names cannot be looked at here, and notes it.
    fn is_unseen(&mut self, field: &str, names: &str) -> bool {
        if self.is_offline() {
            self.unseen.push(format!("{field} ({names})"));
        }
        self.is_offline()
    }

    fn place(&self, at: Location) -> String {
        if at.line() == 0 { self.name.to_owned() } else { format!("{}:{}:{}", self.name, at.line(), at.column()) }
    }

    fn problem(&mut self, at: Location, field: impl Into<String>, message: impl Into<String>) {
        let place = self.place(at);
        self.problems.push(Problem { place, field: field.into(), message: message.into(), unreadable: false });
    }

    fn wrong(&mut self, setting: &Setting, message: impl Into<String>) {
        self.problems.push(Problem {
            place: setting.place.clone(),
            field: setting.field.clone(),
            message: message.into(),
            unreadable: false,
        });
    }

    /// Returns who wins: flag, then environment, then file.
    fn pick(&self, flag: &Option<String>, flag_name: &str, variable: &str, file: Text, field: &str) -> Option<Setting> {
        if let Some(text) = flag {
            return Some(Setting { text: text.clone(), place: "flag".into(), field: flag_name.into() });
        }
        if let Some(text) = self.variable(variable) {
            return Some(Setting { text, place: "environment".into(), field: variable.into() });
        }
        file.map(|text| self.written(text, field))
    }

    fn written(&self, text: Spanned<String>, field: impl Into<String>) -> Setting {
        Setting { place: self.place(text.referenced), text: text.value, field: field.into() }
    }

    /// Returns what `parse` makes of the setting; `None` if there is none or it is wrong.
    fn parsed<T>(&mut self, setting: Option<Setting>, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let setting = setting?;
        parse(&setting.text).map_err(|message| self.wrong(&setting, message)).ok()
    }

    /// Returns the duration written in the file, which must lie in `range`.
    fn duration(&mut self, text: Text, field: &str, default: Duration, range: (Duration, Duration)) -> Duration {
        let setting = text.map(|text| self.written(text, field));
        self.within(setting, range).unwrap_or(default)
    }

    /// Returns the duration that is set, which must lie in `range`.
    fn within(&mut self, setting: Option<Setting>, range: (Duration, Duration)) -> Option<Duration> {
        self.parsed(setting, |text| {
            let value = duration(text)?;
            if value < range.0 || value > range.1 {
                return Err(format!("`{text}` is out of range; it must lie between {:?} and {:?}", range.0, range.1));
            }
            Ok(value)
        })
    }

    /// Returns a number between 0 and a million: a weight or an order.
    fn small(&mut self, written: Option<&Spanned<i64>>, field: &str) -> Option<u32> {
        let written = written?;
        let number = u32::try_from(written.value).ok().filter(|number| *number <= 1_000_000);
        if number.is_none() {
            let message = format!("{} is out of range; it must lie between 0 and 1000000", written.value);
            self.problem(written.referenced, field, message);
        }
        number
    }

    fn choice<T: Copy>(&mut self, text: Text, field: &str, choices: &[(&str, T)]) -> T {
        let setting = text.map(|text| self.written(text, field));
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let parsed = self.parsed(setting, |text| {
            let found = choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
            found.ok_or_else(|| format!("`{text}` is not one of: {}", names.join(", ")))
        });
        parsed.unwrap_or(choices[0].1)
    }

    fn listen(&mut self, setting: Option<Setting>) -> Option<Listen> {
        self.parsed(setting, |text| address(text).map(Listen::At))
    }

    /// Returns what is written, which must be; `what` says what it would be.
    fn required<T>(&mut self, written: Option<T>, at: Location, field: &str, what: &str) -> Option<T> {
        if written.is_none() {
            self.problem(at, field, format!("is missing; write {what}"));
        }
        written
    }

    /// Reads LiteLLM's file.
    fn litellm(&mut self, path: Spanned<String>) -> Option<litellm::Read> {
        let setting = self.written(path, "litellm_config");
        if self.is_unseen(&setting.field, &setting.text) {
            // A credential of the proxy may stand there.
            return Some(litellm::Read { credentials: vec![unseen_credential()], ..litellm::Read::default() });
        }
        let text = self.read(&setting)?;
        Some(litellm::read(&text, &setting.text, self.env))
    }

    fn node(&mut self, file: Text, flags: &Flags) -> String {
        let setting = self.pick(&flags.node, "--node", "QUOTUM_NODE", file, "node.name");
        self.parsed(setting, name).unwrap_or_else(hostname)
    }

    fn gossip(&mut self, file: super::file::Gossip, flags: &Flags) -> Gossip {
        let cluster = self.pick(&flags.cluster, "--cluster", "QUOTUM_CLUSTER", file.cluster, "gossip.cluster");
        let cluster = self.parsed(cluster, name).unwrap_or_else(|| "quotum".into());
        let listen =
            self.pick(&flags.gossip_listen, "--gossip-listen", "QUOTUM_GOSSIP_LISTEN", file.listen, "gossip.listen");
        let listen = self.listen(listen).unwrap_or(Listen::Everywhere(GOSSIP_PORT));
        let advertise = self.pick(
            &flags.gossip_advertise,
            "--gossip-advertise",
            "QUOTUM_GOSSIP_ADVERTISE",
            file.advertise,
            "gossip.advertise",
        );
        let advertise = self.parsed(advertise, |text| match own_address(text, listen)? {
            at if at.ip().is_unspecified() || at.port() == 0 => {
                Err(format!("`{text}` is not an address peers can send to; name this pod's own IP and port"))
            }
            at => Ok(at),
        });
        let key_file = self.pick(
            &flags.gossip_key_file,
            "--gossip-key-file",
            "QUOTUM_GOSSIP_KEY_FILE",
            file.key_file,
            "gossip.key_file",
        );
        let path = key_file.as_ref().map(|setting| PathBuf::from(&setting.text));
        let keys = key_file.and_then(|setting| self.keys(&setting)).unwrap_or_else(KeyRing::unkeyed);
        let seeds = self.seeds(file.seeds, flags, listen, advertise);
        let pods = self.pods(file.pods, &seeds);
        if seeds != Seeds::Alone
            && !keys.is_keyed()
            && !file.insecure
            && !is_loopback(listen)
            && !self.is_offline()
            && self.problems.is_empty()
        {
            self.problem(
                Location::UNKNOWN,
                "gossip.key_file",
                "without a key pods may only gossip on loopback; name a key file, or set gossip.insecure: true \
                 where nobody else can reach the port",
            );
        }
        let ms = Duration::from_millis;
        let day = Duration::from_secs(86_400);
        Gossip {
            cluster,
            listen,
            advertise,
            seeds,
            pods,
            interval: self.duration(file.interval, "gossip.interval", ms(100), (ms(10), ms(10_000))),
            keys,
            key_file: path,
            insecure: file.insecure,
            absent_for: self.duration(file.absent_for, "gossip.absent_for", ms(300_000), (ms(60_000), day)),
            on_silence: self.choice(
                file.on_silence,
                "gossip.on_silence",
                &[("fair_share", OnSilence::FairShare), ("closed", OnSilence::Closed)],
            ),
            patience: self.duration(file.patience, "gossip.patience", ms(30_000), (ms(0), day)),
            first_window: self.choice(
                file.first_window,
                "gossip.first_window",
                &[("admit", FirstWindow::Admit), ("wait", FirstWindow::Wait)],
            ),
        }
    }

    fn seeds(
        &mut self,
        file: Option<Spanned<Vec<Spanned<String>>>>,
        flags: &Flags,
        listen: Listen,
        advertise: Option<SocketAddr>,
    ) -> Seeds {
        let list = file.as_ref().map(|list| self.place(list.referenced));
        let entries = match self.pick(&flags.seeds, "--seeds", "QUOTUM_SEEDS", None, "gossip.seeds") {
            Some(Setting { text, place, field }) => text
                .split(',')
                .map(str::trim)
                .filter(|entry| !entry.is_empty())
                .map(|entry| Setting { text: entry.into(), place: place.clone(), field: field.clone() })
                .collect(),
            None => file
                .map_or_else(Vec::new, |list| list.value)
                .into_iter()
                .enumerate()
                .map(|(i, entry)| self.written(entry, format!("gossip.seeds[{i}]")))
                .collect::<Vec<_>>(),
        };
        let Some(first) = entries.first() else { return Seeds::Alone };
        let whole = Setting {
            text: String::new(),
            place: list
                .filter(|_| first.place != "environment" && first.place != "flag")
                .unwrap_or(first.place.clone()),
            field: first.field.split('[').next().unwrap_or_default().to_owned(),
        };
        let before = self.problems.len();
        for entry in &entries {
            if let Err(error) = Seeds::parse(&[&entry.text]) {
                self.wrong(entry, error.to_string());
            }
        }
        if self.problems.len() > before {
            return Seeds::Alone;
        }
        let texts: Vec<&str> = entries.iter().map(|entry| entry.text.as_str()).collect();
        let seeds = Seeds::parse(&texts).map_err(|error| self.wrong(&whole, error.to_string()));
        let addresses = match seeds {
            Ok(Seeds::Static(addresses)) => addresses,
            Ok(other) => return other,
            Err(()) => return Seeds::Alone,
        };
        match advertise {
            // Each pod's environment says it.
            None if self.is_offline() => {}
            None => self.wrong(
                &whole,
                "a static list names every replica, so this one must know which entry is its own: set gossip.advertise \
                 (or QUOTUM_GOSSIP_ADVERTISE)",
            ),
            Some(own) if !addresses.contains(&own) => {
                self.wrong(
                    &whole,
                    format!("a static list names every replica, but {own}, gossip.advertise, is not in it"),
                );
            }
            Some(_) if matches!(listen, Listen::At(at) if at.port() == 0) => {
                self.wrong(&whole, "with a static list gossip.listen needs the port that is on the list, not 0");
            }
            Some(_) => {}
        }
        Seeds::Static(addresses)
    }

    /// Returns where the fleet's pods are asked for, if they are.
    fn pods(&mut self, file: Text, seeds: &Seeds) -> Option<Pods> {
        let setting = self.pick(&None, "", "QUOTUM_PODS", file, "gossip.pods")?;
        let may_be_set = self.is_offline() && *seeds == Seeds::Alone;
        if !matches!(seeds, Seeds::Name { .. }) && !may_be_set {
            self.wrong(&setting, "the API server is asked beside a headless name: let gossip.seeds name one");
            return None;
        }
        let label = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        if !setting.text.split(',').all(label) || !setting.text.contains(['=', '(']) {
            let message = format!("`{}` is no label selector; write app.kubernetes.io/name=quotum", setting.text);
            self.wrong(&setting, message);
            return None;
        }
        if self.is_offline() {
            return None;
        }
        let (host, port) = (self.variable("KUBERNETES_SERVICE_HOST"), self.variable("KUBERNETES_SERVICE_PORT"));
        let (Some(host), Some(port)) = (host, port) else {
            self.wrong(
                &setting,
                "KUBERNETES_SERVICE_HOST and _PORT are not set: this process is in no pod of Kubernetes",
            );
            return None;
        };
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let namespace = self.variable("QUOTUM_NAMESPACE").or_else(|| {
            let file = Setting { text: format!("{SERVICE_ACCOUNT}/namespace"), ..setting.clone() };
            self.read(&file).map(|text| text.trim().to_owned())
        })?;
        Some(Pods { selector: setting.text, namespace, api: format!("https://{host}:{port}") })
    }

    /// Returns the keys of the file; what it holds is never repeated.
    fn keys(&mut self, setting: &Setting) -> Option<KeyRing> {
        if self.is_unseen(&setting.field, &setting.text) {
            return None;
        }
        let text = self.read(setting)?;
        KeyRing::parse(&text).map_err(|error| self.wrong(setting, format!("{}: {error}", setting.text))).ok()
    }

    fn read(&mut self, setting: &Setting) -> Option<String> {
        let path = Path::new(&setting.text);
        let text = named::read(path)
            .and_then(|bytes| String::from_utf8(bytes).map_err(|_| FileError::unusable(path, "is not text in UTF-8")));
        self.usable(setting, text)
    }

    /// Returns what a named file holds; what is wrong with it is a problem of the setting
    /// that names it.
    fn usable<T>(&mut self, setting: &Setting, found: Result<T, FileError>) -> Option<T> {
        found
            .map_err(|error| {
                self.problems.push(Problem {
                    place: setting.place.clone(),
                    field: setting.field.clone(),
                    message: error.to_string(),
                    unreadable: matches!(error, FileError::Unreadable(..)),
                });
            })
            .ok()
    }
}

/// Returns what peers send to: an address, or an IP, as Kubernetes tells a pod its own, with
/// the port that is listened on.
fn own_address(text: &str, listen: Listen) -> Result<SocketAddr, String> {
    let port = match listen {
        Listen::At(at) => at.port(),
        Listen::Everywhere(port) => port,
    };
    text.parse::<IpAddr>().map_or_else(|_| address(text), |ip| Ok((ip, port).into()))
}

/// Returns what stands for a credential in a file that is not looked at.
fn unseen_credential() -> Secret {
    Secret::new("unseen")
}

fn name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > MAX_NAME || text.chars().any(char::is_control) {
        return Err(format!("a name is 1 to {MAX_NAME} bytes without control characters"));
    }
    Ok(text.to_owned())
}

fn hostname() -> String {
    let read = fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| fs::read_to_string("/etc/hostname"));
    read.ok().and_then(|text| name(text.trim()).ok()).unwrap_or_else(|| "localhost".into())
}

fn loopback(port: u16) -> Listen {
    Listen::At((Ipv4Addr::LOCALHOST, port).into())
}

fn is_loopback(listen: Listen) -> bool {
    matches!(listen, Listen::At(at) if at.ip().is_loopback())
}
