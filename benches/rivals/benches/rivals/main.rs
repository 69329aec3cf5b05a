//! quotum beside what a fleet would do instead, on the same arrivals.
//!
//! `cargo bench -p quotum-bench --bench rivals`, about four minutes; `-- --quick` one, and worth
//! nothing. Admission only, in real time: three pods with 60, 30 and 10 % of the load, in bursts,
//! and a fourth that joins; one and a half times the limit; a request reserves its prompt and its
//! cap, and gives back what it did not use 200 ms later. A counter outside sums what was used of
//! what was admitted, by windows. Prints the Markdown table that docs/rivals.md quotes.
//!
//! Redis is the distribution's `redis-server` on loopback, one pipelined connection a pod; its
//! rows say SKIPPED where it is not installed. limitador's distributed store is not here:
//! docs/rivals.md says why, and what a copy of it did.

mod contest;
mod redis;
mod trace;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use quotum_bench::Failure;

use contest::Rival;
use trace::{Arrival, Counter, Extent, arrivals};

const FULL: Extent = Extent { window: Duration::from_secs(4), windows: 6 };
const QUICK: Extent = Extent { window: Duration::from_secs(2), windows: 2 };

const SEED: u64 = 42;

fn main() -> ExitCode {
    let extent = if std::env::args().any(|argument| argument == "--quick") { QUICK } else { FULL };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.map_err(Failure::from).and_then(|runtime| runtime.block_on(contest(extent))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rivals: {error}");
            ExitCode::from(2)
        }
    }
}

async fn contest(extent: Extent) -> Result<(), Failure> {
    let trace = Arc::new(arrivals(extent, SEED));
    println!(
        "{} requests in {} windows of {:?}, seed {SEED}\n\n\
         | rival | over, % (worst window) | used, % (mean; worst) | admitted / refused | decision p50 / p99, us |\n\
         |---|---:|---:|---:|---:|",
        trace.len(),
        extent.windows,
        extent.window
    );
    show("quotum, strict", Some(Rival::quotum(extent).await?), &trace, extent).await?;
    show("static split, a third each", Some(Rival::split(3)), &trace, extent).await?;
    show("static split, a quarter each", Some(Rival::split(4)), &trace, extent).await?;
    show("each pod for itself", Some(Rival::split(1)), &trace, extent).await?;
    show("limitador in memory, each pod for itself", Some(Rival::limitador(extent)), &trace, extent).await?;
    show("Redis, healthy", Rival::redis(false, false)?, &trace, extent).await?;
    show("Redis, killed and back: fails open", Rival::redis(true, true)?, &trace, extent).await?;
    show("Redis, killed and back: fails closed", Rival::redis(true, false)?, &trace, extent).await
}

/// What one rival did.
#[derive(Debug, Default)]
struct Decisions {
    admitted: u64,
    took: Vec<Duration>,
}

async fn show(name: &str, rival: Option<Rival>, trace: &Arc<Vec<Arrival>>, extent: Extent) -> Result<(), Failure> {
    let Some(rival) = rival else {
        println!("| {name} | SKIPPED: no redis-server | | | |");
        return Ok(());
    };
    let (counter, decisions) = drive(rival, trace, extent).await?;
    let used = counter.used();
    let capped = used.iter().map(|used| used.min(1.0));
    let (mean, least) = (capped.clone().sum::<f64>() / used.len() as f64, capped.fold(1.0, f64::min));
    let over = used.iter().map(|used| used - 1.0).fold(0.0, f64::max);
    let mut took = decisions.took;
    took.sort_unstable();
    let at = |part: usize| took.get(took.len() * part / 100).map_or(0.0, |took| took.as_secs_f64() * 1e6);
    println!(
        "| {name} | {:.1} | {:.1}; {:.1} | {} / {} | {:.1} / {:.1} |",
        over * 100.0,
        mean * 100.0,
        least * 100.0,
        decisions.admitted,
        took.len() as u64 - decisions.admitted,
        at(50),
        at(99),
    );
    Ok(())
}

/// Gives a rival the arrivals when they are due.
async fn drive(rival: Rival, trace: &Arc<Vec<Arrival>>, extent: Extent) -> Result<(Arc<Counter>, Decisions), Failure> {
    let rival = Arc::new(rival);
    let (counter, decisions) = (Arc::new(Counter::new(extent)), Arc::new(Mutex::new(Decisions::default())));
    let (begin, first) = boundary(extent)?;
    tokio::time::sleep_until(begin.into()).await;
    let living = tokio::spawn({
        let rival = Arc::clone(&rival);
        async move { rival.live(extent).await }
    });
    let mut requests = tokio::task::JoinSet::new();
    for arrival in trace.iter().copied() {
        if Instant::now() < begin + arrival.at {
            tokio::time::sleep_until((begin + arrival.at).into()).await;
        }
        let (rival, counter, decisions) = (Arc::clone(&rival), Arc::clone(&counter), Arc::clone(&decisions));
        requests.spawn(async move {
            let window = first + (begin.elapsed().as_nanos() / extent.window.as_nanos()) as u64;
            let asked = Instant::now();
            let held = rival.admit(arrival.pod, window, arrival.reserved, extent.window * 2).await;
            let took = asked.elapsed();
            {
                let mut decisions = decisions.lock().unwrap_or_else(PoisonError::into_inner);
                decisions.admitted += u64::from(held.is_some());
                decisions.took.push(took);
            }
            if let Some(held) = held {
                counter.admitted(extent, begin.elapsed(), arrival.used);
                tokio::time::sleep(arrival.held).await;
                rival.settle(arrival.pod, held, arrival.reserved, arrival.used);
            }
        });
        while requests.try_join_next().is_some() {}
    }
    while requests.join_next().await.is_some() {}
    living.await??;
    if let Ok(rival) = Arc::try_unwrap(rival) {
        rival.end().await;
    }
    let decisions = std::mem::take(&mut *decisions.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((counter, decisions))
}

/// Returns the start of a window by everybody's clock, soon, and its number.
fn boundary(extent: Extent) -> Result<(Instant, u64), Failure> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let number = now.as_nanos() / extent.window.as_nanos() + 1;
    let until = Duration::from_nanos((number * extent.window.as_nanos() - now.as_nanos()) as u64);
    Ok((Instant::now() + until, number as u64))
}
