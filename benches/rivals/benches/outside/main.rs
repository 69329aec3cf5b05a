//! The fleet from outside, without simulation: real processes, real UDP, real cuts.
//!
//! `cargo build --release && cargo bench -p quotum-bench --bench outside`, about three minutes;
//! `-- --quick` about one; `-- NAME...` those cases alone. Each case is a fleet of `quotum serve`
//! processes before a `quotum stub`, loaded over HTTP with twice the limit through a balancer
//! that knows only `/readyz`, while pods are cut off, stopped, killed, replaced. The stub's own
//! count is the judge, by the arrival of each request:
//!
//! - nothing is over the limit in any window of any case;
//! - in the graceful ones no request fails and 98 % of every window under load is used.
//!
//! Where the machine allows it, every pod has a network namespace and a cut is a neighbour that
//! is no card's; else gossip runs through a relay that drops it (`--relay` asks for that), and
//! cases that need names are skipped. The table says which. A machine that stands still makes
//! figures, not failures: where a ready pod kept the balancer waiting for longer than a quarter of a
//! second the use is reported and not asserted, nor failures after a second; what reached the upstream later than the promise allows
//! for is shown as late, and may be of the window it was sent in.
//!
//! Exits with 1 if something of this does not hold or a case could not be run, with 2 if none could.

mod cases;
mod fleet;
mod judge;
mod net;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use quotum_bench::{Failure, Folder, quotum};

use cases::{CASES, Case, Expects};
use fleet::{EDGE_MS, Fleet, LIMIT, Met, Seeds, Site};
use net::Ground;

/// Windows of both forms.
const WINDOW: Duration = Duration::from_secs(8);
const QUICK: Duration = Duration::from_secs(5);

/// Fleets at a time: two cores carry them, with time to spare.
const AT_A_TIME: usize = 5;

/// The least that must be used of a window in which pods come and go in good order.
const FLOOR: f64 = 0.98;

/// A ready pod that takes longer than this to say so is on a machine that stands still.
const STALLED_MS: u64 = 250;

/// And than this: the balancer may have heard too late that a pod was going (`linger`).
const DEAF_MS: u64 = 1_000;

/// What a run of this is.
struct Asked {
    quick: bool,
    relay: bool,
    names: Vec<String>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let names = arguments.iter().filter(|argument| !argument.starts_with('-')).cloned().collect();
    let asked = Asked { quick: is("--quick"), relay: is("--relay"), names };
    if let Some(unknown) = asked.names.iter().find(|name| !CASES.iter().any(|case| case.name == **name)) {
        let known: Vec<&str> = CASES.iter().map(|case| case.name).collect();
        eprintln!("outside: no case {unknown}; there are {}", known.join(", "));
        return ExitCode::from(2);
    }
    let confined = if asked.relay { Some("--relay".to_owned()) } else { net::enter() };
    match &confined {
        None => println!("cut by: a network namespace for each pod"),
        Some(why) => println!("cut by: a relay of datagrams; no network namespaces: {why}"),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let done = runtime.map_err(Failure::from).and_then(|runtime| {
        // The cases take turns in this thread; what they spawn runs anywhere.
        tokio::task::LocalSet::new().block_on(&runtime, run(&asked, confined.is_none()))
    });
    match done {
        Ok(wrong) if wrong.is_empty() => ExitCode::SUCCESS,
        Ok(wrong) => {
            wrong.iter().for_each(|wrong| eprintln!("outside: {wrong}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("outside: {error}");
            ExitCode::from(2)
        }
    }
}

/// Runs the cases and returns what was wrong.
async fn run(asked: &Asked, namespaces: bool) -> Result<Vec<String>, Failure> {
    let folder = Folder::new("outside")?;
    folder.write("key", &"5a".repeat(32))?;
    let ground = Ground::new(&folder, namespaces)?;
    let window = if asked.quick { QUICK } else { WINDOW };
    let site = Arc::new(Site { folder, ground, quotum: quotum()?, namespaces, window });
    println!(
        "{LIMIT} tokens per {window:?}, twice that offered; used: the stub's count, in each whole window under load\n\n\
         | case | cut by | over, tokens | used, % of the limit | lost, % | answered / refused / turned away / failed \
         | late, tokens | slowest probe, ms | |\n|---|---|---:|---|---:|---:|---:|---:|---|"
    );
    let chosen = |case: &&Case| match asked.names.is_empty() {
        true => case.quick || !asked.quick,
        false => asked.names.iter().any(|name| name == case.name),
    };
    let mut wrong = Vec::new();
    let mut running = tokio::task::JoinSet::new();
    for (number, case) in CASES.iter().filter(chosen).enumerate() {
        if !namespaces && case.kind.seeds == Seeds::Name {
            println!("| {} | SKIPPED: a name needs namespaces | | | | | | | |", case.name);
            continue;
        }
        if running.len() == AT_A_TIME {
            note(running.join_next().await, &mut wrong)?;
        }
        running.spawn_local(judged(Arc::clone(&site), number as u8, case));
    }
    while let Some(judged) = running.join_next().await {
        note(Some(judged), &mut wrong)?;
    }
    println!();
    CASES.iter().filter(chosen).for_each(|case| println!("- {}: {}", case.name, case.does));
    Ok(wrong)
}

type Judged = Result<Result<(String, Vec<String>), Failure>, tokio::task::JoinError>;

fn note(judged: Option<Judged>, wrong: &mut Vec<String>) -> Result<(), Failure> {
    let Some(judged) = judged else { return Ok(()) };
    match judged? {
        Ok((row, found)) => {
            println!("{row}");
            wrong.extend(found);
        }
        Err(error) => wrong.push(format!("it could not be run: {error}")),
    }
    Ok(())
}

/// Runs a case; returns its row and what was wrong.
async fn judged(site: Arc<Site>, number: u8, case: &'static Case) -> Result<(String, Vec<String>), Failure> {
    let told = |error: Failure| Failure::from(format!("{}: {error}", case.name));
    attempt(site, number, case).await.map_err(told)
}

async fn attempt(site: Arc<Site>, number: u8, case: &'static Case) -> Result<(String, Vec<String>), Failure> {
    let mut fleet = Fleet::start(site, number, case.name, case.kind).await?;
    let (stop, loading) = fleet.load();
    let from = fleet.next_window().await;
    let done = (case.run)(&mut fleet).await;
    let until = fleet.next_window().await;
    stop.send_replace(true);
    let met = loading.await?;
    done?;
    let counts = judge::count(&fleet.records().await?, fleet.window_ms(), EDGE_MS)?;

    let measured: Vec<u64> = (from..until).step_by(fleet.window_ms() as usize).collect();
    let of_limit = |start: &u64| counts.get(start).map_or(0.0, |count| count.tokens as f64 / LIMIT as f64);
    let used: Vec<f64> = measured.iter().map(of_limit).collect();
    let least = used.iter().copied().fold(f64::INFINITY, f64::min);
    let over = counts.values().map(|count| count.over(LIMIT)).max().unwrap_or(0);
    let late: u64 = counts.values().map(|count| count.late).sum();
    let slowest = fleet.slowest_ms();
    let stalled = slowest > STALLED_MS;

    let mut wrong = Vec::new();
    match case.expects {
        // What is late is over all the same where nobody keeps it in bounds.
        Expects::Over if !stalled && !used.iter().any(|used| *used > 1.0) => {
            wrong.push("nothing is over, and something must be: the judge is blind".into())
        }
        Expects::Grace | Expects::Nothing if over > 0 => wrong.push(format!("{over} tokens over")),
        _ => {}
    }
    if case.expects == Expects::Grace {
        let heard = slowest <= DEAF_MS;
        wrong.extend(
            met.failed
                .iter()
                .take(if heard { 3 } else { 0 })
                .map(|failed| format!("{} failed: {failed}", met.failed.len())),
        );
        if least < FLOOR && !stalled {
            wrong.push(format!("{:.2} % of a window was used, and not {:.0}", least * 100.0, FLOOR * 100.0));
        }
    }
    let verdict = match (wrong.is_empty(), case.expects, least < FLOOR) {
        (false, ..) => "WRONG",
        (true, Expects::Grace, true) => "the machine stood still: reported only",
        (true, Expects::Over, _) if over == 0 => "the machine stood still: reported only",
        (true, Expects::Over, _) => "seen",
        (true, ..) => "held",
    };
    let first = met.failed.first().map_or(String::new(), |failed| format!("; first failure: {failed}"));
    let shown: Vec<String> = used.iter().map(|used| format!("{:.1}", used * 100.0)).collect();
    let lost = (1.0 - least).max(0.0) * 100.0;
    let Met { answered, refused, turned_away, failed } = &met;
    let row = format!(
        "| {} | {} | {over} ({:.2} %) | {} | {lost:.1} | {answered} / {refused} / {turned_away} / {} | {late} | {slowest} \
         | {verdict}{first} |",
        case.name,
        fleet.wires.name(),
        over as f64 * 100.0 / LIMIT as f64,
        shown.join(", "),
        failed.len(),
    );
    let wrong = wrong.into_iter().map(|wrong: String| format!("{}: {wrong}", case.name)).collect();
    Ok((row, wrong))
}
