//! One run in a process of its own, and what it has shown as lines of text.
//!
//! Knows how a plan is named and an outcome written down. Must not know what a run does. The
//! invariant it keeps: what comes back is what the run returned, number for number.
//!
//! Only whole pods need it: tokio seeds its runtimes from a counter of the process
//! (`tokio::loom::std::rand::seed`), and a `select!` that is not biased, as chitchat's, takes
//! its branches in that order. So the second run of a process would differ from the first,
//! and runs side by side from one another. Every run is the first of its process.

use std::env;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::canary::Canary;
use crate::fleet::{Outcome, RunOptions};
use crate::oracle::{Figures, Violation};
use crate::runner::{panicked, run_here, scenario};
use crate::scenario::{Layer, Plan};
use crate::trace::Line;

/// The command of the child, and the variable that says what it is to do.
pub(crate) const COMMAND: &str = "carry-out";
const JOB: &str = "QUOTUM_SIM_JOB";

/// Carries a plan out in a process of its own.
pub(crate) fn run(plan: &Plan, options: RunOptions) -> Result<Outcome, Violation> {
    let failed = |text: String| panicked(format!("the run's process failed: {text}"));
    let program = env::current_exe().map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(program);
    if cfg!(test) {
        command.args(["--exact", "process::tests::carries_out_what_it_is_told", "--nocapture"]);
    } else {
        command.arg(COMMAND);
    }
    let output = command
        .env(JOB, job(plan, options))
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let read = text.lines().filter_map(|line| line.strip_prefix(MARK)).try_fold(Read::default(), Read::take);
    match read {
        Some(Read { outcome: Some(outcome), .. }) => Ok(outcome),
        Some(Read { failure: Some(violation), .. }) => Err(violation),
        _ => Err(failed(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)))),
    }
}

/// Does what the environment says, in the child.
pub(crate) fn carry_out() -> Result<(), String> {
    let job = env::var(JOB).map_err(|_| format!("{COMMAND} is told by {JOB} what to do"))?;
    let (plan, options) = parse(&job).ok_or_else(|| format!("{JOB}: {job:?} names no run"))?;
    end_in_time(&plan);
    let text = written(&run_here(&plan, options));
    // In one piece: a test harness writes to the same place.
    std::io::stdout().write_all(text.as_bytes()).map_err(|error| error.to_string())
}

/// A run that does not come to its end must not hold up whoever waits for it: after a time that
/// no run takes, the process says so and ends.
fn end_in_time(plan: &Plan) {
    let Plan { scenario, seed, .. } = *plan;
    let text = format!("{scenario} seed {seed} is not over after {} s of real time", LONGEST.as_secs());
    let late = written(&Err(Violation { at: 0, invariant: "every run ends", text }));
    let watch = move || {
        thread::sleep(LONGEST);
        let _ = std::io::stdout().write_all(late.as_bytes());
        std::process::exit(1);
    };
    // Without a thread to spare it runs unwatched.
    let _ = thread::Builder::new().name("watch".into()).spawn(watch);
}

/// The longest run, of 100 pods, takes half a minute on one core, and in a debug build some ten
/// times that.
const LONGEST: Duration = Duration::from_secs(15 * 60);

/// Names a plan: its scenario and seed, which of its faults are kept, and the options.
fn job(plan: &Plan, options: RunOptions) -> String {
    let drawn = scenario(plan.scenario).map(|scenario| scenario.plan(plan.seed));
    let mut kept = plan.faults.iter().peekable();
    let mut numbers = Vec::new();
    for (number, fault) in drawn.iter().flat_map(|drawn| drawn.faults.iter().enumerate()) {
        if kept.next_if(|other| *other == fault).is_some() {
            numbers.push(number.to_string());
        }
    }
    let canary = options.canary.map_or("-", Canary::name);
    let entropy = options.entropy.map_or("-".to_owned(), |entropy| entropy.to_string());
    let trace = u8::from(options.trace);
    let layer = plan.layer.name();
    let faults = numbers.join(",");
    format!("{} {} {layer} {canary} {entropy} {trace} ,{faults}", plan.scenario, plan.seed)
}

fn parse(job: &str) -> Option<(Plan, RunOptions)> {
    let mut words = job.split(' ');
    let mut next = || words.next();
    let mut plan = scenario(next()?)?.plan(next()?.parse().ok()?);
    plan.layer = Layer::named(next()?)?;
    let canary = Canary::named(next()?);
    let entropy = next()?.parse().ok();
    let trace = next()? == "1";
    let kept: Vec<usize> = next()?.split(',').filter_map(|number| number.parse().ok()).collect();
    plan.faults = kept.iter().map(|number| plan.faults.get(*number).cloned()).collect::<Option<_>>()?;
    Some((plan, RunOptions { trace, canary, entropy }))
}

/// What marks a line as one of these.
const MARK: &str = "quotum-sim: ";

fn written(result: &Result<Outcome, Violation>) -> String {
    let mut lines = Vec::new();
    let violation = |kind: &str, violation: &Violation| {
        let text = violation.text.replace('\n', "; ");
        format!("{kind}\t{}\t{}\t{text}", violation.at, violation.invariant)
    };
    match result {
        Err(failure) => lines.push(violation("failure", failure)),
        Ok(outcome) => {
            let numbers = outcome.figures.to_bits().map(|number| number.to_string());
            lines.push(format!("outcome\t{}\t{}", outcome.hash, numbers.join(",")));
            let bits = |value: Option<f64>| value.map_or("-".to_owned(), |value| value.to_bits().to_string());
            let (whole, parts) = (bits(outcome.efficiency), bits(outcome.efficiency_of_components));
            lines.push(format!("efficiency\t{whole}\t{parts}"));
            let waits: Vec<String> = outcome.waits.iter().map(ToString::to_string).collect();
            lines.push(format!("waits\t{}", waits.join(",")));
            lines.extend(outcome.violation.iter().map(|found| violation("violation", found)));
            lines.extend(outcome.reached.iter().map(|what| format!("reached\t{what}")));
            lines.extend(outcome.lines.iter().map(|line| {
                let replica = line.replica.map_or("-".to_owned(), |replica| replica.to_string());
                format!("line\t{}\t{replica}\t{}", line.at, line.text.replace('\n', "; "))
            }));
        }
    }
    // A harness may have written the beginning of a line.
    lines.iter().fold("\n".to_owned(), |text, line| text + MARK + line + "\n")
}

/// What was read so far.
#[derive(Default)]
struct Read {
    outcome: Option<Outcome>,
    failure: Option<Violation>,
}

impl Read {
    /// Takes a line; `None` if it cannot be read.
    fn take(mut self, line: &str) -> Option<Self> {
        let mut words = line.split('\t');
        let mut next = || words.next();
        let kind = next()?;
        match (kind, &mut self.outcome) {
            ("failure", _) => {
                let (at, invariant, text) = (next()?.parse().ok()?, known(next()?), next()?.to_owned());
                self.failure = Some(Violation { at, invariant, text });
            }
            ("outcome", _) => {
                let hash = next()?.parse().ok()?;
                let numbers = next()?.split(',').map(|number| number.parse().ok()).collect::<Option<Vec<u64>>>()?;
                let figures = Figures::from_bits(numbers.try_into().ok()?);
                self.outcome = Some(Outcome { hash, figures, ..Outcome::default() });
            }
            ("efficiency", Some(outcome)) => {
                let mut value = || Some(next()?.parse().ok().map(f64::from_bits));
                (outcome.efficiency, outcome.efficiency_of_components) = (value()?, value()?);
            }
            ("waits", Some(outcome)) => {
                outcome.waits = next()?.split(',').filter_map(|number| number.parse().ok()).collect();
            }
            ("violation", Some(outcome)) => {
                let (at, invariant, text) = (next()?.parse().ok()?, known(next()?), next()?.to_owned());
                outcome.violation = Some(Violation { at, invariant, text });
            }
            ("reached", Some(outcome)) => {
                outcome.reached.insert(known(next()?));
            }
            ("line", Some(outcome)) => {
                let (at, replica, text) = (next()?.parse().ok()?, next()?.parse().ok(), next()?.to_owned());
                outcome.lines.push(Line { at, replica, text });
            }
            _ => return None,
        }
        Some(self)
    }
}

/// A name that lives as long as the process: there are a few dozen different ones.
fn known(name: &str) -> &'static str {
    use std::collections::BTreeSet;
    use std::sync::{Mutex, PoisonError};
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    match names.get(name) {
        Some(name) => name,
        None => {
            let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
            names.insert(name);
            name
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The child of other tests; without a job it has nothing to do.
    #[test]
    fn carries_out_what_it_is_told() {
        if env::var(JOB).is_ok() {
            carry_out().expect("the job names a run");
        }
    }

    #[test]
    fn a_job_names_the_plan_it_was_made_of() {
        let mut plan = scenario("swarm").expect("it exists").plan(3);
        plan.faults.remove(0);
        let options = RunOptions { canary: Some(Canary::DoubleSettle), trace: true, entropy: Some(9) };
        let (again, parsed) = parse(&job(&plan, options)).expect("it names a run");
        assert_eq!((again.faults, again.seed, again.layer), (plan.faults, plan.seed, plan.layer));
        assert_eq!((parsed.canary, parsed.trace, parsed.entropy), (options.canary, true, Some(9)));
    }

    #[test]
    fn an_outcome_is_read_as_it_was_written() {
        let plan = scenario("swarm").expect("it exists").plan(3);
        let options = RunOptions { trace: true, ..RunOptions::default() };
        let outcome = run_here(&plan, options).expect("nothing panics");
        let text = written(&Ok(outcome));
        let read = text.lines().filter_map(|line| line.strip_prefix(MARK)).try_fold(Read::default(), Read::take);
        let again = read.and_then(|read| read.outcome).expect("it can be read");
        assert!(again.lines.len() > 100 && !again.reached.is_empty() && again.figures.admitted > 0);
        assert_eq!(written(&Ok(again)), text);
    }
}
