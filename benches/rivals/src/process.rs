//! Child processes on loopback: what the benches put under load.
//!
//! Knows how to start one, where it listens, what it holds and how to end it. Must not know
//! what is asked of it. The invariant it keeps: every child ends with the value that stands
//! for it.

use std::fs;
use std::io::{BufRead, BufReader, Error, Result};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
pub use rustix::process::Signal;
use rustix::process::{Pid, PidfdFlags, kill_process, pidfd_open};
use serde_json::Value;

/// How long a process may take until it listens.
const STARTS_WITHIN: Duration = Duration::from_secs(20);

/// How often a server that prints nothing is asked whether it listens.
const ASKED_EVERY: Duration = Duration::from_millis(10);

/// How long it may take to end when it is asked to, before it is killed.
const ENDS_WITHIN: Duration = Duration::from_secs(2);

/// A process and where it listens.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// The one line it printed, if it prints one.
    line: Value,
    ends_by: Signal,
}

impl Process {
    /// Starts a program and waits for the line in which it says where it listens. Its log
    /// goes to a file of this name in the folder.
    ///
    /// # Errors
    /// If it does not start or does not say so; the error ends with its exit code and log.
    pub fn start(folder: &Folder, name: &str, program: &Path, arguments: &[&str]) -> Result<Self> {
        let log = folder.path.join(format!("{name}.log"));
        let mut command = Command::new(program);
        // What is set for the caller's own pods must not reach these.
        command.env_clear().args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(fs::File::create(&log)?);
        let started = command.spawn();
        let mut child = started.map_err(|error| Error::other(format!("{}: {error}", program.display())))?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut line)?;
        }
        match serde_json::from_str(&line) {
            // Killed: a pod that drains would wait for streams that nobody ends.
            Ok(line) => Ok(Self { child, line, ends_by: Signal::KILL }),
            Err(_) => {
                let _ = child.kill();
                let (ended, log) = (child.wait()?, fs::read_to_string(&log).unwrap_or_default());
                Err(Error::other(format!("{name} did not start: {ended}: {log}")))
            }
        }
    }

    /// Starts a server that prints nothing, and waits until it accepts connections there. It
    /// has children of its own, so it is asked to end.
    ///
    /// # Errors
    /// If it does not start or does not listen in time.
    pub fn start_at(at: SocketAddr, command: &mut Command) -> Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let process = Self { child, line: Value::Null, ends_by: Signal::TERM };
        let begun = Instant::now();
        // That it listens shows in nothing else: it is asked again and again.
        while TcpStream::connect(at).is_err() {
            if process.ends_within(ASKED_EVERY)? || begun.elapsed() > STARTS_WITHIN {
                return Err(Error::other("it does not listen"));
            }
        }
        Ok(process)
    }

    /// Returns an address that the process printed under this name.
    ///
    /// # Errors
    /// If it printed none.
    pub fn addr(&self, what: &str) -> Result<SocketAddr> {
        let addr = self.line[what].as_str().and_then(|addr| addr.parse().ok());
        addr.ok_or_else(|| Error::other(format!("no address of its {what} in {}", self.line)))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Waits for its end, for so long at most, and returns whether it has come.
    fn ends_within(&self, within: Duration) -> Result<bool> {
        let end = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
        let within = Timespec::try_from(within).map_err(Error::other)?;
        Ok(poll(&mut [PollFd::new(&end, PollFlags::IN)], Some(&within))? > 0)
    }

    /// Returns its exit code if it has ended: `None` in it if a signal ended it.
    ///
    /// # Errors
    /// If the operating system does not say.
    pub fn ended(&mut self) -> Result<Option<Option<i32>>> {
        Ok(self.child.try_wait()?.map(|status| status.code()))
    }

    /// Returns the resident memory of the process and its children, in bytes.
    ///
    /// # Errors
    /// If it has ended.
    pub fn resident(&self) -> Result<u64> {
        self.ids().into_iter().map(resident).sum()
    }

    /// Returns the CPU time that all threads of the process and its children have used.
    ///
    /// # Errors
    /// If it has ended.
    pub fn cpu(&self) -> Result<Duration> {
        let mut ns = 0;
        for id in self.ids() {
            for thread in fs::read_dir(format!("/proc/{id}/task"))? {
                // A thread that has just ended takes what it used with it.
                let times = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
                ns += times.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
            }
        }
        Ok(Duration::from_nanos(ns))
    }

    fn ids(&self) -> Vec<u32> {
        let id = self.child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        std::iter::once(id).chain(children.split_whitespace().filter_map(|id| id.parse().ok())).collect()
    }

    /// Returns how many descriptors the process has open.
    ///
    /// # Errors
    /// If it has ended.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count())
    }
}

fn resident(id: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map(|kib| kib * 1_024).ok_or_else(|| Error::other(format!("process {id} has ended")))
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has already ended needs no signal.
        let _ = self.signal(self.ends_by);
        let _ = self.ends_within(ENDS_WITHIN);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns where the `quotum` command of this build is: beside the benches, or where
/// `QUOTUM_BIN` says.
///
/// # Errors
/// If it was not built.
pub fn quotum() -> Result<PathBuf> {
    let path = match std::env::var_os("QUOTUM_BIN") {
        Some(path) => PathBuf::from(path),
        None => std::env::current_exe()?.ancestors().nth(2).unwrap_or(Path::new("")).join("quotum"),
    };
    let missing = || Error::other(format!("no {}: run `cargo build --release` first", path.display()));
    path.is_file().then_some(path.clone()).ok_or_else(missing)
}

/// Returns TCP and UDP addresses on loopback that are free now: bound all at once, so that
/// they differ, and given up again.
///
/// # Errors
/// If there are none.
pub fn free_addrs(count: usize) -> Result<Vec<SocketAddr>> {
    let bind = |_| {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let addr = tcp.local_addr()?;
        Ok((UdpSocket::bind(addr)?, tcp, addr))
    };
    let bound: Vec<_> = (0..count).map(bind).collect::<Result<_>>()?;
    Ok(bound.into_iter().map(|(_, _, addr)| addr).collect())
}

/// A temporary folder that goes when it is dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Makes a folder.
    ///
    /// # Errors
    /// If it cannot.
    pub fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("quotum-{name}-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self { path })
    }

    /// Writes a file and returns its path.
    ///
    /// # Errors
    /// If it cannot.
    pub fn write(&self, name: &str, text: &str) -> Result<String> {
        let path = self.path.join(name);
        fs::write(&path, text)?;
        path.into_os_string().into_string().map_err(|_| Error::other("the temporary folder's path is not UTF-8"))
    }

    /// Returns where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A folder that stays behind is untidy and no more.
        let _ = fs::remove_dir_all(&self.path);
    }
}
