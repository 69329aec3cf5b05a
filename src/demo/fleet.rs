//! The processes of the demo: a stub upstream and the pods before it.
//!
//! Knows how to start them, where they listen and how to end them. Must not know what
//! is asked of them. The invariant it keeps: every child dies with the value that stands
//! for it, however that goes.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::{Mode, Options};

/// How long a process may take until it says where it listens.
const STARTS_WITHIN: Duration = Duration::from_secs(20);

/// How often a fleet is started over because somebody took a port first.
const TRIES: u32 = 5;

/// "A port is in use", as `serve` says it.
const PORT_IN_USE: i32 = 69;

/// A process and where it listens.
#[derive(Debug)]
struct Process {
    child: Child,
    /// The one line it printed.
    line: Value,
}

/// A stub and its pods.
#[derive(Debug)]
pub(super) struct Fleet {
    // Dropped in this order: the pods before the folder their logs are in.
    pods: Vec<Process>,
    stub_process: Process,
    stub: String,
    proxies: Vec<String>,
    admins: Vec<String>,
    _folder: Folder,
}

impl Fleet {
    /// Starts a stub and pods that know one another, or do not.
    pub(super) async fn start(options: &Options, mode: Mode) -> Result<Self> {
        let folder = Folder::new()?;
        let stub_process = Process::start(
            &folder,
            "stub",
            &["stub", "--listen", "127.0.0.1:0", "--first-byte-ms", "50", "--body-ms", "400", "--bytes-per-token", "1"],
        );
        let stub_process = stub_process.await?.context("the stub found no free port")?;
        let stub = url(&stub_process.line["stub"])?;
        for _ in 0..TRIES {
            let Some(pods) = start_pods(&folder, options, mode, &stub).await? else { continue };
            let proxies = pods.iter().map(|pod| url(&pod.line["proxy"])).collect::<Result<_>>()?;
            let admins = pods.iter().map(|pod| url(&pod.line["admin"])).collect::<Result<_>>()?;
            return Ok(Self { pods, stub_process, stub, proxies, admins, _folder: folder });
        }
        bail!("{TRIES} times in a row somebody else took a port that had just been free");
    }

    pub(super) fn stub(&self) -> &str {
        &self.stub
    }

    pub(super) fn proxies(&self) -> &[String] {
        &self.proxies
    }

    pub(super) fn admins(&self) -> &[String] {
        &self.admins
    }

    /// Ends every process and waits until it is gone.
    pub(super) async fn stop(mut self) {
        for process in self.pods.iter_mut().chain([&mut self.stub_process]) {
            // One that has already ended needs no killing.
            let _ = process.child.kill().await;
        }
    }
}

/// Starts the pods; `None` if a port was taken.
async fn start_pods(folder: &Folder, options: &Options, mode: Mode, stub: &str) -> Result<Option<Vec<Process>>> {
    let gossip = match mode {
        Mode::Isolated => Vec::new(),
        Mode::Strict => free_ports(options.replicas)?,
    };
    let mut pods = Vec::new();
    for number in 0..options.replicas {
        let name =
            format!("pod-{}", char::from(b'a' + (number % 26) as u8).to_string().repeat(1 + number as usize / 26));
        let config = folder.path.join(format!("{name}.yaml"));
        fs::write(&config, config_text(options, stub, &name, &gossip, number as usize))?;
        let config = config.to_str().context("the temporary folder's path is not UTF-8")?;
        match Process::start(folder, &name, &["serve", "--config", config]).await? {
            Some(pod) => pods.push(pod),
            None => return Ok(None),
        }
    }
    Ok(Some(pods))
}

fn config_text(options: &Options, stub: &str, name: &str, gossip: &[u16], number: usize) -> String {
    let fleet = match gossip.get(number) {
        None => String::new(),
        Some(own) => {
            let seeds: Vec<String> = gossip.iter().map(|port| format!("'127.0.0.1:{port}'")).collect();
            format!(
                "gossip: {{ cluster: demo, listen: '127.0.0.1:{own}', advertise: '127.0.0.1:{own}', seeds: [{}] }}\n",
                seeds.join(", ")
            )
        }
    };
    format!(
        "node: {{ name: {name} }}\n{fleet}proxy: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         deployments:\n  - id: demo\n    model: demo\n    upstream: {stub}/v1\n    reserve: bound\n    limits:\n      \
         - {{ unit: tokens, amount: {}, window: {}ms }}\n",
        options.limit,
        options.window.as_millis()
    )
}

/// Returns UDP ports that are free now: bound all at once, so that they differ, and
/// given up again.
fn free_ports(count: u32) -> Result<Vec<u16>> {
    let sockets = (0..count).map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<Vec<_>, _>>()?;
    sockets.iter().map(|socket| Ok(socket.local_addr()?.port())).collect()
}

fn url(address: &Value) -> Result<String> {
    Ok(format!("http://{}", address.as_str().context("a process did not say where it listens")?))
}

impl Process {
    /// Starts this program with other arguments and waits for its line; `None` if a
    /// port it needs is in use.
    async fn start(folder: &Folder, name: &str, arguments: &[&str]) -> Result<Option<Self>> {
        let log = folder.path.join(format!("{name}.log"));
        let mut child = Command::new(std::env::current_exe()?)
            .args(arguments)
            // Its standard input ends with this process, however that ends: also by SIGKILL.
            .arg("--end-with-stdin")
            // What is set for the caller's own pods must not reach these.
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log)?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{name} does not start"))?;
        let out = child.stdout.take().context("no standard output")?;
        let mut out = BufReader::new(out);
        let mut line = String::new();
        let read = tokio::time::timeout(STARTS_WITHIN, out.read_line(&mut line)).await;
        match read {
            Ok(Ok(length)) if length > 0 => {
                let line = serde_json::from_str(&line).with_context(|| format!("{name} says where it listens"))?;
                Ok(Some(Self { child, line }))
            }
            Ok(_) => {
                let ended = child.wait().await?;
                if ended.code() == Some(PORT_IN_USE) {
                    return Ok(None);
                }
                bail!("{name} ended with {ended}: {}", tail(&log))
            }
            Err(_) => bail!("{name} did not start within {STARTS_WITHIN:?}: {}", tail(&log)),
        }
    }
}

/// Returns the last lines of a log.
fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// A temporary folder that goes when it is dropped.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn new() -> Result<Self> {
        let random = getrandom::u64().context("no randomness for a folder's name")?;
        let path = std::env::temp_dir().join(format!("quotum-demo-{}-{random:016x}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A folder that stays behind is untidy and no more.
        let _ = fs::remove_dir_all(&self.path);
    }
}
