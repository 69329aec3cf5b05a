//! The wires between pods, and how they are cut.
//!
//! Knows network namespaces and a relay of datagrams. Must not know what is sent over them or
//! why they are cut. The invariants it keeps: a cut loses datagrams silently, in one direction,
//! and leaves alone what callers and the upstream say; and nothing stays behind, for all of it
//! lies in namespaces that end with this process.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Error, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use quotum_bench::{Failure, Folder, free_addrs};
use tokio::net::UdpSocket;

/// Set in the process that has namespaces of its own.
const INSIDE: &str = "QUOTUM_OUTSIDE_INSIDE";

/// Where the upstream and the callers are, on the bridge that all pods are plugged into.
const BRIDGE: Ipv4Addr = Ipv4Addr::new(10, 77, 255, 254);

/// The gossip port of pods that have an address of their own.
const PORT: u16 = 7_946;

/// An address that no card has: what is sent there is gone.
const NOBODY: &str = "02:00:00:00:00:01";

/// Starts this program over in namespaces of its own, and returns only if that cannot be, with
/// the reason; or `None` in the process that was started over.
pub(crate) fn enter() -> Option<String> {
    if std::env::var_os(INSIDE).is_some() {
        return None;
    }
    // A user without rights may have them in a user namespace.
    let root = rustix::process::geteuid().is_root();
    let flags: &[&str] = if root { &["-n", "-m"] } else { &["-U", "-r", "-n", "-m"] };
    // All that is needed later; run there, it leaves nothing behind.
    let probe = "mount -t tmpfs none /run && ip link add outside type bridge && ip netns add pod && \
                 ip link add veth type veth peer name eth0 netns pod && nsenter --net=/run/netns/pod true && \
                 mount --bind /etc/hostname /etc/hosts";
    let tried = Command::new("unshare").args(flags).args(["sh", "-c", probe]).stdin(Stdio::null()).output();
    match tried {
        Err(error) => Some(format!("unshare: {error}")),
        Ok(output) if !output.status.success() => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Ok(_) => {
            let own = std::env::current_exe().unwrap_or_default();
            let error =
                Command::new("unshare").args(flags).arg(own).args(std::env::args().skip(1)).env(INSIDE, "1").exec();
            Some(error.to_string())
        }
    }
}

/// The machine's side of the wires: a bridge and the names, if there are namespaces.
pub(crate) struct Ground {
    hosts: Option<Mutex<File>>,
}

impl Ground {
    /// Lays the ground; without namespaces there is only loopback.
    pub(crate) fn new(folder: &Folder, namespaces: bool) -> Result<Self, Failure> {
        if !namespaces {
            return Ok(Self { hosts: None });
        }
        run("mount", "-t tmpfs none /run")?;
        run("ip", "link set lo up")?;
        run("ip", "link add outside type bridge")?;
        run("ip", &format!("addr add {BRIDGE}/16 dev outside"))?;
        run("ip", "link set outside up")?;
        let hosts = folder.write("hosts", "127.0.0.1 localhost\n")?;
        run("mount", &format!("--bind {hosts} /etc/hosts"))?;
        let file = fs::OpenOptions::new().read(true).append(true).open(&hosts)?;
        Ok(Self { hosts: Some(Mutex::new(file)) })
    }

    /// Returns where an upstream of all pods listens.
    pub(crate) fn upstream(&self, relayed: bool) -> SocketAddr {
        let ip = if self.hosts.is_some() && !relayed { BRIDGE } else { Ipv4Addr::LOCALHOST };
        (ip, 0).into()
    }

    /// Lists an address under a name. Whoever asks meanwhile sees the old list or the new one.
    pub(crate) fn list(&self, name: &str, ip: IpAddr) -> Result<(), Failure> {
        let Some(hosts) = &self.hosts else { return Err("names need namespaces".into()) };
        let mut hosts = hosts.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(hosts.write_all(format!("{ip} {name}\n").as_bytes())?)
    }

    /// Strikes it off again: one byte makes a comment of its line.
    pub(crate) fn unlist(&self, name: &str, ip: IpAddr, folder: &Folder) -> Result<(), Failure> {
        let path = folder.path().join("hosts");
        let text = fs::read_to_string(&path)?;
        let line = format!("\n{ip} {name}\n");
        let at = text.find(&line).ok_or("it was not listed")?;
        Ok(fs::OpenOptions::new().write(true).open(path)?.write_all_at(b"#", at as u64 + 1)?)
    }
}

/// A place for one pod at a time: another may take it over.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// Where its proxy and its admin endpoints listen.
    pub(crate) ip: IpAddr,
    /// Where it listens for gossip, and where its peers send it.
    pub(crate) listen: SocketAddr,
    pub(crate) advertise: SocketAddr,
    /// The namespace it runs in.
    pub(crate) namespace: Option<String>,
}

/// The wires of one fleet.
pub(crate) enum Wires {
    Namespaces { fleet: u8, cut: Mutex<BTreeSet<(usize, usize)>> },
    Relay(Relay),
}

impl Wires {
    pub(crate) async fn new(namespaces: bool, fleet: u8, slots: usize) -> Result<Self, Failure> {
        Ok(match namespaces {
            true => Self::Namespaces { fleet, cut: Mutex::default() },
            false => Self::Relay(Relay::start(slots).await?),
        })
    }

    /// How it cuts, in words.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Namespaces { .. } => "namespaces",
            Self::Relay(_) => "relay",
        }
    }

    /// Makes a place for a pod.
    pub(crate) fn slot(&self, number: usize) -> Result<Slot, Failure> {
        match self {
            Self::Namespaces { fleet, .. } => {
                let (name, ip) = (namespace(*fleet, number), ip(*fleet, number));
                run("ip", &format!("netns add {name}"))?;
                run("ip", &format!("link add {name} type veth peer name eth0 netns {name}"))?;
                run("ip", &format!("link set {name} master outside up"))?;
                run("ip", &format!("-n {name} addr add {ip}/16 dev eth0"))?;
                run("ip", &format!("-n {name} link set eth0 up"))?;
                run("ip", &format!("-n {name} link set lo up"))?;
                let listen = SocketAddr::new(ip, PORT);
                Ok(Slot { ip, listen, advertise: listen, namespace: Some(name) })
            }
            Self::Relay(relay) => {
                let (listen, advertise) = (relay.listen[number], relay.advertise[number]);
                Ok(Slot { ip: Ipv4Addr::LOCALHOST.into(), listen, advertise, namespace: None })
            }
        }
    }

    /// Loses from now on what one pod sends to another.
    pub(crate) fn cut(&self, from: usize, to: usize) -> Result<(), Failure> {
        match self {
            Self::Namespaces { fleet, cut } => {
                let (name, ip) = (namespace(*fleet, from), ip(*fleet, to));
                run("ip", &format!("-n {name} neigh replace {ip} lladdr {NOBODY} nud permanent dev eth0"))?;
                cut.lock().unwrap_or_else(PoisonError::into_inner).insert((from, to));
            }
            Self::Relay(relay) => {
                relay.cut.lock().unwrap_or_else(PoisonError::into_inner).insert((from, to));
            }
        }
        Ok(())
    }

    /// Loses nothing any more.
    pub(crate) fn heal(&self) -> Result<(), Failure> {
        match self {
            Self::Namespaces { fleet, cut } => {
                for (from, to) in std::mem::take(&mut *cut.lock().unwrap_or_else(PoisonError::into_inner)) {
                    let (name, ip) = (namespace(*fleet, from), ip(*fleet, to));
                    run("ip", &format!("-n {name} neigh del {ip} dev eth0"))?;
                }
            }
            Self::Relay(relay) => relay.cut.lock().unwrap_or_else(PoisonError::into_inner).clear(),
        }
        Ok(())
    }
}

fn namespace(fleet: u8, number: usize) -> String {
    format!("f{fleet}s{number}")
}

fn ip(fleet: u8, number: usize) -> IpAddr {
    Ipv4Addr::new(10, 77, fleet, number as u8 + 1).into()
}

/// Stands between pods on loopback: each sends to the addresses of the others here, and
/// receives from them, so that it cannot tell.
pub(crate) struct Relay {
    listen: Vec<SocketAddr>,
    advertise: Vec<SocketAddr>,
    cut: Arc<Mutex<BTreeSet<(usize, usize)>>>,
    /// Of a hundred datagrams, how many are lost.
    pub(crate) loss: Arc<AtomicU32>,
}

impl Relay {
    async fn start(slots: usize) -> Result<Self, Failure> {
        let listen = free_addrs(slots)?;
        let mut sockets = Vec::new();
        for _ in 0..slots {
            sockets.push(Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?));
        }
        let advertise = sockets.iter().map(|socket| socket.local_addr()).collect::<Result<_, _>>()?;
        let (cut, loss) = (Arc::new(Mutex::new(BTreeSet::new())), Arc::new(AtomicU32::new(0)));
        for to in 0..slots {
            let (sockets, listen, cut, loss) = (sockets.clone(), listen.clone(), Arc::clone(&cut), Arc::clone(&loss));
            tokio::spawn(async move {
                let (mut datagram, mut random) = ([0; 2_048], to as u64);
                loop {
                    // An error tells that somebody does not listen any more.
                    let Ok((length, sender)) = sockets[to].recv_from(&mut datagram).await else { continue };
                    let Some(from) = listen.iter().position(|addr| *addr == sender) else { continue };
                    random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    let lost = (random >> 33) % 100 < u64::from(loss.load(Ordering::Relaxed));
                    let cut = cut.lock().unwrap_or_else(PoisonError::into_inner).contains(&(from, to));
                    if !lost && !cut {
                        let _ = sockets[from].send_to(&datagram[..length], listen[to]).await;
                    }
                }
            });
        }
        Ok(Self { listen, advertise, cut, loss })
    }
}

fn run(program: &str, arguments: &str) -> Result<(), Failure> {
    let output = Command::new(program).args(arguments.split(' ')).stdin(Stdio::null()).output()?;
    let said = || Error::other(format!("{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()));
    if output.status.success() { Ok(()) } else { Err(said().into()) }
}
