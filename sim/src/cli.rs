//! The commands: sweep, replay, list, canaries.
//!
//! Knows arguments, output and exit codes. Must not know what is simulated. The invariant
//! it keeps: determinism is checked before anything else, standard output is the contract
//! and everything else goes to standard error.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use crate::agree;
use crate::canary::Canary;
use crate::catalogue::scenarios;
use crate::corpus;
use crate::fleet::RunOptions;
use crate::oracle::Violation;
use crate::page::{self, Swept};
use crate::process;
use crate::report::{Summary, failure, replay_command};
use crate::resume::Progress;
use crate::runner::{in_parallel, run_plan, run_seed, scenario, shrink};
use crate::scenario::{Layer, Scenario};

/// Runs the command with these arguments.
pub fn main(arguments: impl Iterator<Item = String>) -> ExitCode {
    let arguments: Vec<String> = arguments.collect();
    if arguments == [process::COMMAND] {
        return match process::carry_out() {
            Ok(()) => ExitCode::SUCCESS,
            Err(wrong) => usage(&wrong),
        };
    }
    let Some((command, rest)) = arguments.split_first() else { return usage("a command is missing") };
    let options = match Options::parse(rest) {
        Ok(options) => options,
        Err(wrong) => return usage(&wrong),
    };
    match command.as_str() {
        "sweep" => sweep(&options),
        "replay" => replay(&options),
        "list" => list(&options),
        "canaries" => canaries(&options),
        "agree" => agree(&options),
        other => usage(&format!("{other:?} is no command")),
    }
}

/// What the arguments say.
#[derive(Clone, Debug)]
struct Options {
    scenario: String,
    layer: String,
    seeds: u64,
    start_seed: u64,
    seed: u64,
    json: bool,
    report: Option<PathBuf>,
    trace: Option<PathBuf>,
    canary: Option<Canary>,
    resume: Option<PathBuf>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self {
            scenario: "all".to_owned(),
            layer: "all".to_owned(),
            seeds: 200,
            start_seed: 1,
            seed: 1,
            json: false,
            report: None,
            trace: None,
            canary: None,
            resume: None,
        };
        let mut arguments = arguments.iter();
        while let Some(name) = arguments.next() {
            if name == "--json" {
                options.json = true;
                continue;
            }
            let value = arguments.next().ok_or_else(|| format!("{name} wants a value"))?;
            let number = || value.parse::<u64>().map_err(|_| format!("{name} wants a number, not {value:?}"));
            match name.as_str() {
                "--scenario" => options.scenario.clone_from(value),
                "--layer" => options.layer.clone_from(value),
                "--seeds" => options.seeds = number()?,
                "--start-seed" => options.start_seed = number()?,
                "--seed" => options.seed = number()?,
                "--report" => options.report = Some(value.into()),
                "--resume" => options.resume = Some(value.into()),
                "--trace" => options.trace = Some(value.into()),
                "--canary" => {
                    options.canary = Some(Canary::named(value).ok_or_else(|| format!("{value:?} is no canary"))?);
                }
                _ => return Err(format!("{name:?} is no option")),
            }
        }
        if !["events", "turmoil", "all"].contains(&options.layer.as_str()) {
            return Err(format!("{:?} is no layer; there are: events, turmoil, all", options.layer));
        }
        if options.scenario != "all" && scenario(&options.scenario).is_none() {
            return Err(format!("{:?} is no scenario; `list` names them", options.scenario));
        }
        if options.resume.is_some() && (options.scenario == "all" || options.json || options.report.is_some()) {
            return Err("--resume is for one --scenario, without --json and --report".to_owned());
        }
        Ok(options)
    }

    /// The command that sweeps the same again.
    fn sweep_command(&self, folder: &Path) -> String {
        format!(
            "cargo run --release -p quotum-sim -- sweep --scenario {} --seeds {} --start-seed {} --report {}",
            self.scenario,
            self.seeds,
            self.start_seed,
            folder.display()
        )
    }

    fn scenarios(&self) -> impl Iterator<Item = &'static Scenario> + '_ {
        scenarios().filter(|scenario| {
            (self.scenario == "all" || self.scenario == scenario.name)
                && (self.layer == "all" || self.layer == scenario.layer().name())
        })
    }
}

fn usage(wrong: &str) -> ExitCode {
    eprintln!("{wrong}");
    eprintln!(
        "usage: quotum-sim sweep [--scenario NAME|all] [--layer events|turmoil|all] [--seeds N] [--start-seed S] [--json] [--report DIR]"
    );
    eprintln!("       quotum-sim sweep --scenario NAME [--seeds N] [--start-seed S] --resume FILE");
    eprintln!("       quotum-sim replay --scenario NAME --seed S [--trace FILE] [--canary NAME]");
    eprintln!("       quotum-sim list");
    eprintln!("       quotum-sim canaries [--seeds MOST] [--canary NAME]");
    eprintln!("       quotum-sim agree [--scenario NAME] [--seeds N] [--start-seed S]");
    ExitCode::from(64)
}

fn sweep(options: &Options) -> ExitCode {
    if let Err(wrong) = check_determinism() {
        eprintln!("{wrong}");
        return ExitCode::FAILURE;
    }
    let mut violations = match run_corpus(options) {
        Ok(violations) => violations,
        Err(wrong) => {
            eprintln!("{wrong}");
            return ExitCode::FAILURE;
        }
    };
    if let Some(file) = &options.resume {
        return go_on(options, file, violations).unwrap_or_else(|wrong| usage(&wrong));
    }
    let (mut total, mut hash) = (0, 0);
    let mut swept = Vec::new();
    for scenario in options.scenarios() {
        let summary = sweep_one(scenario, options, Summary::default());
        total += summary.seeds;
        violations += summary.violations;
        hash = crate::rng::mix(hash ^ summary.hash);
        if options.json {
            println!("{}", summary.json(scenario));
        } else {
            println!("{}", summary.line(scenario));
        }
        swept.push((scenario, summary));
    }
    if let Some(folder) = &options.report {
        let swept = Swept { scenarios: &swept, violations, hash, command: options.sweep_command(folder) };
        match page::write(folder, &swept) {
            Ok(file) => eprintln!("see {}", file.display()),
            Err(wrong) => {
                eprintln!("no report in {}: {wrong}", folder.display());
                return ExitCode::FAILURE;
            }
        }
    }
    if options.json {
        println!("{{\"total_seeds\":{total},\"violations\":{violations},\"trace_hash\":\"{hash:016x}\"}}");
    } else {
        println!("{total} seeds, {violations} violations, trace hash {hash:016x}");
    }
    if violations > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// How many seeds a sweep that can go on runs between two notes in its file: a minute or so.
const AT_ONCE: u64 = 1_000;

/// Sweeps one scenario piece by piece, and notes after each how far it has come. `violations`:
/// those of the seeds that failed once.
fn go_on(options: &Options, file: &Path, violations: u64) -> Result<ExitCode, String> {
    let scenario = scenario(&options.scenario).ok_or("--resume wants --scenario NAME")?;
    let mut progress = Progress::read(file, scenario.name, options.start_seed)?;
    let end = options.start_seed.saturating_add(options.seeds.min(scenario.most_seeds));
    while progress.next_seed < end {
        let seeds = AT_ONCE.min(end - progress.next_seed);
        let piece = Options { start_seed: progress.next_seed, seeds, ..options.clone() };
        let summary = sweep_one(scenario, &piece, Summary::after(progress.hash));
        progress.next_seed += seeds;
        progress.violations += summary.violations;
        progress.hash = summary.hash;
        progress.wall_ms += (summary.wall_seconds * 1e3) as u64;
        progress.write(file)?;
        eprintln!("{} of {end}: {}", progress.next_seed, summary.line(scenario));
    }
    let (seeds, found) = (progress.next_seed - progress.start_seed, progress.violations + violations);
    let hours = progress.wall_ms as f64 / 3.6e6;
    let hash = crate::rng::mix(progress.hash);
    println!("{seeds} seeds, {found} violations, trace hash {hash:016x}, {:.0} seeds an hour", seeds as f64 / hours);
    Ok(if found > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn sweep_one(scenario: &Scenario, options: &Options, mut summary: Summary) -> Summary {
    let began = Instant::now();
    let heavy = HEAVY.iter().find(|(name, _)| options.scenario == "all" && *name == scenario.name);
    let count = options.seeds.min(scenario.most_seeds).min(heavy.map_or(u64::MAX, |(_, most)| *most));
    let seed_of = |number: usize| options.start_seed + number as u64;
    let is_twice = |number: usize| (number as u64).is_multiple_of(scenario.twice_every);
    let work = |number: usize| run_seed(scenario, seed_of(number), is_twice(number), None);
    in_parallel(count as usize, work, |number, result| {
        let seed = seed_of(number);
        match result {
            Ok(outcome) => {
                summary.add(&scenario.plan(seed), &outcome, 1 + u64::from(is_twice(number)));
                if let Some(violation) = outcome.violation {
                    summary.failed.push(seed);
                    tell(scenario, seed, &violation, summary.violations, options);
                }
            }
            Err(violation) => {
                summary.seeds += 1;
                summary.violations += 1;
                summary.failed.push(seed);
                tell(scenario, seed, &violation, summary.violations, options);
            }
        }
    });
    summary.wall_seconds = began.elapsed().as_secs_f64();
    for shortfall in summary.shortfalls(scenario) {
        eprintln!("SHORT: {}: {shortfall}", scenario.name);
        summary.violations += 1;
    }
    summary
}

/// Reports a failure: the first ones in full, the others in a line.
fn tell(scenario: &Scenario, seed: u64, violation: &Violation, number: u64, options: &Options) {
    if number > 3 && options.report.is_none() {
        eprintln!("VIOLATED: {}: {}; {}", violation.invariant, violation.text, replay_command(scenario, seed));
        return;
    }
    let text = explain(scenario, seed, violation, None);
    match &options.report {
        Some(folder) => {
            let file = folder.join(format!("{}-{seed}.txt", scenario.name));
            let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&file, &text));
            match written {
                Ok(()) => eprintln!(
                    "VIOLATED: {}; {}; see {}",
                    violation.invariant,
                    replay_command(scenario, seed),
                    file.display()
                ),
                Err(error) => eprintln!("{text}\n{}: {error}", file.display()),
            }
        }
        None => eprintln!("{text}"),
    }
}

fn explain(scenario: &Scenario, seed: u64, violation: &Violation, canary: Option<Canary>) -> String {
    let plan = scenario.plan(seed);
    let shrunk = shrink(&plan, violation, canary);
    let options = RunOptions { trace: true, canary, ..RunOptions::default() };
    match run_plan(&shrunk, options) {
        Ok(outcome) => {
            let violation = outcome.violation.unwrap_or_else(|| violation.clone());
            failure(scenario, &plan, &shrunk, &violation, &outcome.lines)
        }
        Err(violation) => failure(scenario, &plan, &shrunk, &violation, &[]),
    }
}

fn replay(options: &Options) -> ExitCode {
    let Some(scenario) = scenario(&options.scenario) else { return usage("replay wants --scenario NAME") };
    let plan = scenario.plan(options.seed);
    let outcome = run_plan(&plan, RunOptions { trace: true, canary: options.canary, ..RunOptions::default() });
    let (violation, lines) = match outcome {
        Ok(outcome) => {
            println!("{} seed {}: trace hash {:016x}", scenario.name, options.seed, outcome.hash);
            let quotas: Vec<String> = plan.quotas.iter().map(ToString::to_string).collect();
            println!("{} replicas, {}, {}", plan.slots, quotas.join(" and "), plan.mode);
            println!("{:?}", outcome.figures);
            if let Some(efficiency) = outcome.efficiency {
                println!("efficiency {efficiency:.4}");
            }
            (outcome.violation, outcome.lines)
        }
        Err(violation) => (Some(violation), Vec::new()),
    };
    if let Some(file) = &options.trace {
        let text: String = lines
            .iter()
            .map(|line| {
                let replica = line.replica.map_or("-".to_owned(), |replica| replica.to_string());
                format!("{:>12.6} {replica:>3} {}\n", line.at as f64 / 1e6, line.text)
            })
            .collect();
        if let Err(error) = std::fs::write(file, text) {
            eprintln!("{}: {error}", file.display());
            return ExitCode::FAILURE;
        }
    }
    match violation {
        Some(violation) => {
            println!("{}", explain(scenario, options.seed, &violation, options.canary));
            ExitCode::FAILURE
        }
        None => {
            println!("nothing is violated");
            ExitCode::SUCCESS
        }
    }
}

fn list(options: &Options) -> ExitCode {
    for scenario in options.scenarios() {
        println!("{:<20} {:<7}  {}", scenario.name, scenario.layer().name(), scenario.about);
    }
    ExitCode::SUCCESS
}

/// Plays the plans of the turmoil layer on both layers.
fn agree(options: &Options) -> ExitCode {
    let mut all = true;
    // Without their proxies other requests would be parked.
    let comparable = |scenario: &&Scenario| scenario.plan(1).http.is_none();
    let light =
        |scenario: &&Scenario| options.scenario != "all" || !HEAVY.iter().any(|(name, _)| *name == scenario.name);
    for scenario in
        options.scenarios().filter(|scenario| scenario.layer() == Layer::Turmoil).filter(light).filter(comparable)
    {
        let count = options.seeds.min(scenario.most_seeds);
        match agree::compare(scenario, options.start_seed, count) {
            Ok(agreement) => {
                println!("{:<20} {agreement}", scenario.name);
                all &= agreement.holds();
            }
            Err(violation) => {
                println!("{:<20} {}: {}", scenario.name, violation.invariant, violation.text);
                all = false;
            }
        }
    }
    if all { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Scenarios that take half a minute a seed: a sweep over all runs so many of them; by name,
/// as many as are asked for.
const HEAVY: &[(&str, u64)] = &[("hundred", 2), ("pods-hundred", 1)];

/// The most seeds of whole pods in which a planted bug is looked for.
const MOST_OF_PODS: u64 = 60;

/// Plants every bug in turn and counts how many seeds it takes to see it.
fn canaries(options: &Options) -> ExitCode {
    let most = options.seeds.max(500);
    let mut detections = Vec::new();
    let planted: Vec<_> =
        Canary::ALL.iter().filter(|(canary, ..)| options.canary.is_none_or(|only| only == *canary)).collect();
    let work = |number: usize| {
        let (canary, _, _, name) = *planted[number];
        let scenario = scenario(name)?;
        let most = if scenario.layer() == Layer::Turmoil { MOST_OF_PODS } else { most };
        (0..most).find_map(|tried| {
            let seed = options.start_seed + tried;
            match run_seed(scenario, seed, false, Some(canary)) {
                Ok(outcome) => outcome.violation.map(|violation| (tried + 1, violation)),
                Err(violation) => Some((tried + 1, violation)),
            }
        })
    };
    in_parallel(planted.len(), work, |number, found| {
        let (_, name, about, _) = *planted[number];
        match found {
            Some((seeds, violation)) => {
                println!("{name:<28} {seeds:>4} seeds  {:<36} {about}", violation.invariant);
                detections.push(seeds);
            }
            None => println!("{name:<28} NOT CAUGHT in {most} seeds: {about}"),
        }
    });
    let caught = detections.len();
    detections.sort_unstable();
    let median = detections.get(caught / 2).copied().unwrap_or(most);
    println!("{caught} of {} caught, median {median} seeds to detection", planted.len());
    if caught == planted.len() && median <= 50 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The same seed twice must do the same, and a planted difference must be seen.
pub(crate) fn check_determinism() -> Result<(), String> {
    let seeds = [("swarm", 1), ("swarm", 2), ("swarm", 3), ("swarm", 4), ("swarm", 5), ("pods-healthy", 1)];
    for (name, seed) in seeds {
        let scenario = scenario(name).ok_or("a scenario is missing")?;
        let plan = scenario.plan(seed);
        let hash = |entropy| {
            run_plan(&plan, RunOptions { entropy, ..RunOptions::default() })
                .map(|outcome| outcome.hash)
                .map_err(|violation| violation.text)
        };
        let (first, again, planted) = (hash(None)?, hash(None)?, hash(Some(seed))?);
        if first != again {
            return Err(format!("NOT DETERMINISTIC: seed {seed}: trace hash {first:016x}, then {again:016x}"));
        }
        // A fleet of one has no network whose randomness could be broken.
        if first == planted && plan.slots > 1 {
            return Err(format!("seed {seed}: planted entropy left the trace hash at {first:016x}: it sees nothing"));
        }
    }
    Ok(())
}

/// Runs every seed that has failed once.
fn run_corpus(options: &Options) -> Result<u64, String> {
    let entries = corpus::entries()?;
    let mut violations = 0;
    let work = |number: usize| {
        let entry: &corpus::Entry = &entries[number];
        scenario(&entry.scenario).map(|scenario| (scenario, run_seed(scenario, entry.seed, true, None)))
    };
    in_parallel(entries.len(), work, |number, result| {
        let entry = &entries[number];
        let found = match result {
            Some((scenario, Ok(outcome))) => outcome.violation.map(|violation| (scenario, violation)),
            Some((scenario, Err(violation))) => Some((scenario, violation)),
            None => {
                eprintln!("seeds.toml: {:?} is no scenario", entry.scenario);
                violations += 1;
                None
            }
        };
        if let Some((scenario, violation)) = found {
            violations += 1;
            eprintln!("AGAIN: {} (seed {}): {}", entry.why, entry.seed, violation.text);
            tell(scenario, entry.seed, &violation, violations, options);
        }
    });
    Ok(violations)
}
