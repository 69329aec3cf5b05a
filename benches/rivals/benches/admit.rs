//! What one decision costs: quotum against governor and limitador, in the same run.
//!
//! `cargo bench -p quotum-bench --bench admit`, about 10 s. Prints the Markdown table that
//! the README quotes. Clock included everywhere. CPU time; of several threads only rounds
//! in which they really ran side by side: on a busy machine these are few, see the column.

use std::time::Duration;

use quotum_bench::{Contender, Times, contenders, race};

/// Eight contenders, twice: about eight seconds.
const TIMES: Times = Times { rounds: 2_001, batch: Duration::from_micros(200) };

fn main() {
    println!("| threads | one operation | fastest, ns | median, ns | ratio | to | rounds |");
    println!("|---:|---|---:|---:|---:|---|---:|");
    for threads in [1, 2] {
        table(threads, &contenders());
    }
}

fn table(threads: usize, contenders: &[Contender<'_>]) {
    let figures = race(contenders, threads, TIMES);
    for (contender, own) in contenders.iter().zip(&figures) {
        let rival = contender.rival().and_then(|name| contenders.iter().position(|other| other.name() == name));
        let ratio = rival.and_then(|rival| own.ratio_to(&figures[rival]));
        let ratio = ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"));
        let (name, to) = (contender.name(), contender.rival().unwrap_or_default());
        let (min, median) = (shown(own.min()), shown(own.median()));
        println!("| {threads} | {name} | {min} | {median} | {ratio} | {to} | {} |", own.rounds());
    }
}

/// A figure, or a dash where no round counts: the machine had no core to spare.
fn shown(ns: Option<f64>) -> String {
    ns.map_or("–".to_owned(), |ns| format!("{ns:.1}"))
}
