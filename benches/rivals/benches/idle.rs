//! What a fleet costs that does little: CPU and traffic of ten pods over loopback.
//!
//! `cargo bench -p quotum-bench --bench idle`, about 25 s. Ten whole replicas in one
//! process, first idle, then each with 50 reservations a second. Prints the Markdown table
//! that the README quotes, and exits with 1 if an idle pod costs more than it may.
//!
//! CPU is the process's, all threads and the kernel's part included, so it holds a tenth of
//! the runtime's own cost, too. Traffic is what a pod sends, without IP and UDP headers.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use quotum::cluster::{Cluster, ClusterConfig, KeyRing, Seeds, UdpNet};
use quotum::{Claim, Limiter, Quota};
use rustix::time::{ClockId, clock_gettime};

/// How many pods.
const PODS: usize = 10;

/// How long each load is measured.
const MEASURED: Duration = Duration::from_secs(10);

/// How long the fleet is left alone before: shares are taken, everybody knows everybody.
const SETTLED: Duration = Duration::from_secs(2);

/// How long the fleet may take to find itself.
const JOINED_WITHIN: Duration = Duration::from_secs(30);

/// How often somebody else may take a port that has just been free.
const TRIES: u32 = 5;

/// The most a pod may use of one core, in percent (issue 2).
const MAX_CPU: f64 = 1.0;

/// The most a pod may send, in kB/s (issue 2).
const MAX_TRAFFIC: f64 = 25.0;

/// Reservations per second and pod.
const LOADS: [u32; 2] = [0, 50];

struct Pod {
    limiter: Limiter,
    cluster: Cluster,
}

/// What one pod costs, on average.
struct Cost {
    /// Percent of one core.
    cpu: f64,
    /// kB sent per second.
    traffic: f64,
    /// Datagrams sent per second.
    frames: f64,
    /// Reservations admitted per second.
    admitted: f64,
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime {
        Ok(runtime) => runtime.block_on(run()),
        Err(error) => failed(&error.to_string()),
    }
}

async fn run() -> ExitCode {
    let Some(fleet) = start().await else { return failed("no free ports") };
    let joined = async {
        while !fleet.iter().all(|pod| pod.limiter.status().has_share) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    if tokio::time::timeout(JOINED_WITHIN, joined).await.is_err() {
        return failed("the pods did not find one another");
    }
    println!("| {PODS} pods, reservations/s each | CPU of one core, % | sent, kB/s | datagrams/s | target |");
    println!("|---:|---:|---:|---:|---|");
    let mut missed = false;
    for load in LOADS {
        let Cost { cpu, traffic, frames, admitted } = measure(&fleet, load).await;
        let met = cpu <= MAX_CPU && traffic <= MAX_TRAFFIC;
        // The target is one of idle pods; under load it is only compared.
        missed |= load == 0 && !met;
        let target = format!("<= {MAX_CPU} %, <= {MAX_TRAFFIC} kB/s: {}", if met { "met" } else { "missed" });
        println!("| {admitted:.0} | {cpu:.2} | {traffic:.1} | {frames:.0} | {target} |");
    }
    if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn failed(why: &str) -> ExitCode {
    eprintln!("idle: {why}");
    ExitCode::from(2)
}

/// Starts pods that list one another, with what a deployment has: two quotas of a minute.
async fn start() -> Option<Vec<Pod>> {
    'again: for _ in 0..TRIES {
        let addrs = free_ports()?;
        let mut fleet = Vec::new();
        for (number, addr) in addrs.iter().enumerate() {
            let quotas = [Quota::tokens(1_000_000).per_minute(), Quota::requests(100_000).per_minute()];
            let limiter = Limiter::builder().deployment("model", quotas).build().ok()?;
            let config = ClusterConfig {
                listen: *addr,
                node: format!("pod-{number}"),
                keys: KeyRing::of([7; 32]),
                ..ClusterConfig::new(Seeds::Static(addrs.clone()))
            };
            match Cluster::join(&limiter, config, UdpNet).await {
                Ok(cluster) => fleet.push(Pod { limiter, cluster }),
                Err(_) => continue 'again,
            }
        }
        return Some(fleet);
    }
    None
}

/// Returns addresses that are free now: bound all at once, so that they differ.
fn free_ports() -> Option<Vec<SocketAddr>> {
    let sockets: Result<Vec<_>, _> = (0..PODS).map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))).collect();
    sockets.ok()?.iter().map(|socket| socket.local_addr().ok()).collect()
}

/// Measures the fleet under this load.
async fn measure(fleet: &[Pod], load: u32) -> Cost {
    let callers: Vec<_> = fleet.iter().map(|pod| tokio::spawn(reserve(pod.limiter.clone(), load))).collect();
    tokio::time::sleep(SETTLED).await;
    let (begun, cpu, before) = (Instant::now(), process_cpu(), totals(fleet));
    tokio::time::sleep(MEASURED).await;
    let (took, cpu, after) = (begun.elapsed().as_secs_f64(), process_cpu() - cpu, totals(fleet));
    callers.iter().for_each(tokio::task::JoinHandle::abort);
    let per_pod = |total: f64| total / took / PODS as f64;
    Cost {
        cpu: per_pod(cpu.as_secs_f64()) * 100.0,
        traffic: per_pod((after.bytes - before.bytes) as f64) / 1_000.0,
        frames: per_pod((after.frames - before.frames) as f64),
        admitted: per_pod((after.admitted - before.admitted) as f64),
    }
}

/// Reserves so often a second, for ever: a prompt of a hundred tokens.
async fn reserve(limiter: Limiter, per_second: u32) {
    let Ok(handle) = limiter.handle("model") else { return };
    if per_second == 0 {
        return;
    }
    let mut due = tokio::time::interval(Duration::from_secs(1) / per_second);
    loop {
        due.tick().await;
        if let Ok(mut permit) = handle.acquire(Claim::tokens(100)).await {
            permit.start();
            permit.settle(80);
        }
    }
}

/// Sums over the fleet since its start.
struct Totals {
    bytes: u64,
    frames: u64,
    admitted: u64,
}

fn totals(fleet: &[Pod]) -> Totals {
    let stats: Vec<_> = fleet.iter().map(|pod| pod.cluster.stats()).collect();
    let requests = |pod: &Pod| {
        let status = pod.limiter.status();
        let quotas = status.limits.iter().flat_map(|limit| &limit.quotas);
        quotas
            .filter(|(standing, ..)| standing.quota.unit() == quotum::Unit::Requests)
            .map(|(_, own, _)| own.admitted)
            .sum::<u64>()
    };
    Totals {
        bytes: stats.iter().map(|stats| stats.bytes_sent).sum(),
        frames: stats.iter().map(|stats| stats.frames_sent).sum(),
        admitted: fleet.iter().map(requests).sum::<u64>(),
    }
}

/// Returns the CPU time that all threads of this process have used.
fn process_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
