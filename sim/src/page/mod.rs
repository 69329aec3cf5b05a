//! The report of a sweep as one page: figures and plots, no other files needed.
//!
//! Knows what a reader wants to see and in which order. Must not know how a run is carried
//! out. The invariant it keeps: every figure names the command it came from, and what was
//! violated comes first.

mod plot;
mod study;

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use self::plot::{Labels, Row, Series, lines, rows};
use self::study::{Point, SEEDS, carry_out};
use crate::catalogue::studies::{SLOTS, STUDIES, Study, Way};
use crate::report::Summary;
use crate::scenario::{Layer, Promise, Scenario};

/// What was swept.
#[derive(Debug)]
pub(crate) struct Swept<'a> {
    pub(crate) scenarios: &'a [(&'static Scenario, Summary)],
    pub(crate) violations: u64,
    pub(crate) hash: u64,
    /// The command that does the same again.
    pub(crate) command: String,
}

/// Writes `index.html` into a folder, with its plots inside, and those of overshoot as files, too, because
/// docs/guarantees.md shows them. Returns the page's path.
///
/// # Errors
///
/// The folder cannot be written, or a study broke a promise.
pub(crate) fn write(folder: &Path, swept: &Swept<'_>) -> Result<PathBuf, Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    let mut page = Page { folder, body: String::new() };
    page.head(swept);
    for study in STUDIES {
        page.study(study)?;
    }
    page.efficiency(swept.scenarios)?;
    page.waits(swept.scenarios)?;
    page.bounds(swept.scenarios)?;
    page.coverage(swept.scenarios)?;
    page.table(swept.scenarios);
    let file = folder.join("index.html");
    fs::write(&file, format!("{HEAD}{}</main></body></html>\n", page.body))?;
    Ok(file)
}

struct Page<'a> {
    folder: &'a Path,
    body: String,
}

impl Page<'_> {
    fn head(&mut self, swept: &Swept<'_>) {
        let seeds: u64 = swept.scenarios.iter().map(|(_, summary)| summary.seeds).sum();
        let windows: u64 = swept.scenarios.iter().map(|(_, summary)| summary.windows).sum();
        let hours: f64 = swept.scenarios.iter().map(|(_, summary)| summary.simulated_seconds).sum::<f64>() / 3_600.0;
        let keeps = |scenario: &Scenario| scenario.plan(1).promise == Promise::Zero;
        let kept = swept.scenarios.iter().filter(|(scenario, _)| keeps(scenario));
        let over = kept.map(|(_, summary)| summary.strict_over()).max().unwrap_or(0);
        let verdict = if swept.violations == 0 { "kept" } else { "broken" };
        let _ = write!(
            self.body,
            "<h1>quotum, simulated</h1><p class=\"{verdict}\">{} violations in {} seeds, {} windows and {:.0} hours of \
             simulated time; {over} tokens over the limit in <code>strict</code> under the conditions of the promise.</p>\
             <p>Version {}. Trace hash <code>{:016x}</code>. The same again: <code>{}</code></p>",
            swept.violations,
            grouped(seeds),
            grouped(windows),
            hours,
            env!("CARGO_PKG_VERSION"),
            swept.hash,
            escaped(&swept.command),
        );
        self.layers(swept.scenarios);
        let failed = swept.scenarios.iter().flat_map(|(scenario, summary)| {
            summary.failed.iter().map(move |seed| format!("{}-{seed}.txt", scenario.name))
        });
        for file in failed {
            let _ = write!(self.body, "<p class=\"broken\"><a href=\"{file}\">{file}</a></p>");
        }
    }

    /// Says what each layer plays, how much of it was played and how fast.
    fn layers(&mut self, swept: &[(&Scenario, Summary)]) {
        self.body.push_str("<ul>");
        for (layer, plays) in [
            (Layer::Events, "ledgers alone, in one queue of events"),
            (
                Layer::Turmoil,
                "whole pods: the product's own cluster loop, chitchat and sealed frames over simulated UDP",
            ),
        ] {
            let of_layer =
                || swept.iter().filter(|(scenario, _)| scenario.layer() == layer).map(|(_, summary)| summary);
            let (scenarios, seeds) = (of_layer().count(), of_layer().map(|summary| summary.seeds).sum::<u64>());
            let wall = of_layer().map(|summary| summary.wall_seconds).sum::<f64>().max(1e-3);
            let _ = write!(
                self.body,
                "<li><code>{}</code> ({plays}): {scenarios} scenarios, {} seeds, {:.1} seeds a second</li>",
                layer.name(),
                grouped(seeds),
                seeds as f64 / wall,
            );
        }
        self.body.push_str("</ul>");
    }

    fn study(&mut self, study: &Study) -> Result<(), Box<dyn Error>> {
        let ways = carry_out(study).map_err(|violation| format!("study {}: {}", study.name, violation.text))?;
        let _ = write!(
            self.body,
            "<h2>Overshoot against {}</h2><p>{SLOTS} replicas, clients that ask for three times the limit, windows of \
             20 s, the mean of {SEEDS} seeds. <em>Isolated</em> is what proxies do that count each for itself. Over is \
             the worst window of each seed.</p>",
            study.name
        );
        let series = |figure: fn(&Point) -> f64| -> Vec<Series> {
            let of = |(color, (way, points)): (usize, &(Way, Vec<Point>))| Series {
                name: way.name().to_owned(),
                color,
                points: points.iter().map(|point| (point.value, 100.0 * figure(point))).collect(),
            };
            ways.iter().enumerate().map(of).collect()
        };
        let over = Labels { x: study.axis, y: "over the limit, %", is_logarithmic: true };
        let overshoot = lines(over, &series(|point| point.over_mean))?;
        fs::write(self.folder.join(format!("overshoot-{}.svg", study.name)), &overshoot)?;
        self.picture(&overshoot);
        self.body.push_str("<table><tr><th>over the limit, mean (most), %</th>");
        for value in study.values {
            let _ = write!(self.body, "<th>{value}</th>");
        }
        self.body.push_str("</tr>");
        for (way, points) in &ways {
            let _ = write!(self.body, "<tr><td>{}</td>", way.name());
            for point in points {
                let _ = write!(self.body, "<td>{:.1} ({:.1})</td>", 100.0 * point.over_mean, 100.0 * point.over_most);
            }
            self.body.push_str("</tr>");
        }
        self.body
            .push_str("</table><p>And what is admitted, of what a counter would that knows everything at once:</p>");
        let admitted = Labels { x: study.axis, y: "admitted, % of a central counter", is_logarithmic: false };
        let without_isolated: Vec<Series> = series(|point| point.admitted).into_iter().skip(1).collect();
        self.picture(&lines(admitted, &without_isolated)?);
        Ok(())
    }

    fn efficiency(&mut self, swept: &[(&Scenario, Summary)]) -> Result<(), Box<dyn Error>> {
        let measured = |(scenario, summary): &(&Scenario, Summary)| {
            let range = summary.efficiency_range()?;
            let goal = Some(scenario.requires.efficiency).filter(|goal| *goal > 0.0);
            Some(Row { name: scenario.name.to_owned(), value: summary.efficiency_mean()?, range: Some(range), goal })
        };
        let measured: Vec<Row> = swept.iter().filter_map(measured).collect();
        if measured.is_empty() {
            return Ok(());
        }
        self.body.push_str(
            "<h2>Efficiency</h2><p>Admitted tokens, in final charges, of what a central counter without delay admits on \
             the same arrivals. Dot: mean of the seeds; bar: least to most; tick: what a sweep of 50 seeds and more \
             requires.</p>",
        );
        self.picture(&rows("of a central counter", 0.5..1.1, &measured)?);
        Ok(())
    }

    fn waits(&mut self, swept: &[(&Scenario, Summary)]) -> Result<(), Box<dyn Error>> {
        let shown = ["healthy", "tight", "hundred", "partition", "rolling", "few-requests"];
        let series: Vec<Series> = (swept.iter())
            .filter(|(scenario, summary)| shown.contains(&scenario.name) && summary.admitted > 0)
            .enumerate()
            .map(|(color, (scenario, summary))| Series {
                name: scenario.name.to_owned(),
                color,
                points: longer_than(summary),
            })
            .collect();
        if series.is_empty() {
            return Ok(());
        }
        self.body.push_str(
            "<h2>Waits</h2><p>The share of admitted requests that waited for rights longer than so long. The others were \
             admitted at once. Requests may wait 20 ms here, 50 ms in <code>hundred</code>.</p>",
        );
        let labels = Labels { x: "waited longer than, ms", y: "of admitted requests, %", is_logarithmic: false };
        self.picture(&lines(labels, &series)?);
        Ok(())
    }

    fn bounds(&mut self, swept: &[(&Scenario, Summary)]) -> Result<(), Box<dyn Error>> {
        let bounded = swept.iter().filter(|(_, summary)| summary.measured_over_bound > 0.0);
        let bounded: Vec<Row> = bounded
            .map(|(scenario, summary)| Row {
                name: scenario.name.to_owned(),
                value: summary.measured_over_bound,
                range: None,
                goal: None,
            })
            .collect();
        if bounded.is_empty() {
            return Ok(());
        }
        self.body.push_str(
            "<h2>How near the bounds come</h2><p>Modes that may exceed the limit, and scenarios that break a condition of \
             the promise, each have a stated bound (docs/guarantees.md). The worst window of all seeds, as a part of it: \
             more than 1 is a violation, far less would prove little.</p>",
        );
        self.picture(&rows("worst / bound", 0.0..1.05, &bounded)?);
        Ok(())
    }

    fn coverage(&mut self, swept: &[(&Scenario, Summary)]) -> Result<(), Box<dyn Error>> {
        for (scenario, summary) in swept.iter().filter(|(scenario, _)| !scenario.requires.sometimes.is_empty()) {
            if scenario.name != "swarm" {
                continue;
            }
            let required: BTreeMap<&str, f64> = scenario.requires.sometimes.iter().copied().collect();
            let share =
                |what: &str| summary.reached.get(what).copied().unwrap_or(0) as f64 / summary.seeds.max(1) as f64;
            let mut names: Vec<&str> = required.keys().copied().chain(summary.reached.keys().copied()).collect();
            names.sort_unstable();
            names.dedup();
            let row = |name: &str| Row {
                name: name.to_owned(),
                value: share(name),
                range: None,
                goal: required.get(name).copied(),
            };
            let all: Vec<Row> = names.into_iter().map(row).collect();
            let _ = write!(
                self.body,
                "<h2>What the storms reached</h2><p>The share of {} seeds of <code>{}</code> in which each fault and corner \
                 happened at least once. Tick: what a sweep requires.</p>",
                summary.seeds, scenario.name
            );
            self.picture(&rows("of seeds", 0.0..1.0, &all)?);
        }
        Ok(())
    }

    fn table(&mut self, swept: &[(&Scenario, Summary)]) {
        self.body.push_str(
            "<h2>Every scenario</h2><table><tr><th>scenario</th><th>layer</th><th>seeds</th><th>seeds/s</th><th>simulated s / s</th>\
             <th>windows</th><th>violations</th><th>efficiency</th><th>wrongly refused, %</th><th>of bound</th>\
             <th>what it is</th></tr>",
        );
        let number =
            |value: Option<f64>, digits: usize| value.map_or("–".to_owned(), |value| format!("{value:.digits$}"));
        for (scenario, summary) in swept {
            let wall = summary.wall_seconds.max(1e-3);
            let _ = write!(
                self.body,
                "<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.1}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"text\">{}</td></tr>",
                scenario.name,
                scenario.layer().name(),
                grouped(summary.seeds),
                summary.seeds as f64 / wall,
                grouped((summary.simulated_seconds / wall) as u64),
                grouped(summary.windows),
                summary.violations,
                number(summary.efficiency_mean(), 4),
                number(summary.wrongful_mean().map(|mean| 100.0 * mean), 2),
                number(Some(summary.measured_over_bound).filter(|part| *part > 0.0), 3),
                escaped(scenario.about),
            );
        }
        self.body.push_str("</table>");
    }

    /// Puts a plot on the page.
    fn picture(&mut self, svg: &str) {
        let _ = write!(self.body, "<figure>{svg}</figure>");
    }
}

/// Returns, for each millisecond, the share of admitted requests that waited longer, in per
/// cent.
fn longer_than(summary: &Summary) -> Vec<(f64, f64)> {
    let longest = summary.waits.keys().next_back().copied().unwrap_or(0).max(20);
    let share = |limit: u64| summary.waits.range(limit + 1..).map(|(_, count)| *count).sum::<u64>() as f64;
    (0..=longest).map(|limit| (limit as f64, 100.0 * share(limit) / summary.admitted as f64)).collect()
}

fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

const HEAD: &str = "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><title>quotum, simulated</title><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #282c34; background: #fff; margin: 0 }
main { max-width: 1080px; margin: 0 auto; padding: 24px }
figure { margin: 12px 0; overflow-x: auto } svg { max-width: 100%; height: auto }
code { background: #f2f3f5; padding: 1px 4px; overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #e2e4e8; padding: 4px 8px; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left } td.text { text-align: left; white-space: normal; min-width: 280px }
.kept, .broken { padding: 8px 12px; border-left: 4px solid #009e73; background: #f1f9f6 }
.broken { border-color: #d55e00; background: #fdf4ee }
</style></head><body><main>";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::RunOptions;
    use crate::runner::{run_plan, scenario};

    #[test]
    fn what_was_violated_is_on_the_page_before_any_figure() {
        let healthy = scenario("healthy").expect("it exists");
        let mut summary = Summary::default();
        for seed in 1..3 {
            let plan = healthy.plan(seed);
            summary.add(&plan, &run_plan(&plan, RunOptions::default()).expect("nothing panics"), 1);
        }
        summary.failed.push(7);
        let folder = tempfile::tempdir().expect("a folder");
        let mut page = Page { folder: folder.path(), body: String::new() };
        let scenarios = [(healthy, summary), (scenario("pods-hundred").expect("it exists"), Summary::default())];
        page.head(&Swept { scenarios: &scenarios, violations: 1, hash: 3, command: "a < b".to_owned() });
        page.efficiency(&scenarios).expect("it can be drawn");
        page.waits(&scenarios).expect("it can be drawn");
        page.table(&scenarios);
        let place = |text: &str| page.body.find(text).unwrap_or_else(|| panic!("{text:?} is missing"));
        assert!(place("<p class=\"broken\">1 violations") < place("healthy-7.txt"));
        assert!(place("healthy-7.txt") < place("<svg"));
        assert!(page.body.contains("<code>a &lt; b</code>"));
        for layer in ["<code>events</code> (", "<code>turmoil</code> (", "<td>events</td>", "<td>turmoil</td>"] {
            place(layer);
        }
        let files = fs::read_dir(folder.path()).expect("it is there").count();
        assert_eq!(files, 0, "the plots are inside the page");
    }

    #[test]
    fn a_study_offers_the_same_requests_to_every_way_of_counting() {
        for study in STUDIES {
            let plans = Way::ALL.map(|way| study.draw(way, study.values[1], 4));
            assert!(plans.iter().all(|plan| plan.workload == plans[0].workload && plan.phase == plans[0].phase));
        }
    }
}
