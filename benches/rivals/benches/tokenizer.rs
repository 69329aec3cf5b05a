//! What counting a prompt's tokens costs: the tables, a kB of each kind of text, the worst.
//!
//! `cargo bench -p quotum-bench --bench tokenizer`, about two minutes. Prints the Markdown tables that
//! docs/decisions/0010 quotes, and exits with 1 if one request can hold a core for longer than it
//! may. Through the public API, as a request is counted: its JSON is read, its texts are cut.
//!
//! CPU time of the counting thread, medians. Every text is counted by a new thread, whose memory
//! of pieces is empty, as by whoever sees it first; the tables are read in new processes.

use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use quotum::layer::{Estimate, OpenAiChat, Tokenizer};
use quotum_bench::median;
use rustix::time::{ClockId, clock_gettime};

const ENCODINGS: [(&str, Tokenizer); 2] = [("o200k_base", Tokenizer::O200k), ("cl100k_base", Tokenizer::Cl100k)];

/// What makes this program read a table, print what that cost, and end.
const LOAD: &str = "--load";

/// How often each is measured.
const ROUNDS: usize = 7;

/// How large a text of each kind is, in bytes.
const ORDINARY: usize = 64 << 10;

/// Larger than what is counted of a request: the rest counts with its bytes.
const LARGEST: usize = 2 << 20;

/// The most that a request may use of one core, in milliseconds.
const MAX_REQUEST: f64 = 250.0;

/// A kind of text, made to a size.
type Text = (&'static str, fn(usize) -> String);

const USUAL: [Text; 3] = [
    ("English: this repository's documents", |size| cut(DOCUMENTS.concat(), size)),
    ("code: this repository's ledger", |size| cut(CODE.concat(), size)),
    ("Chinese: random words", |size| words(&CHINESE, size)),
];

const DOCUMENTS: [&str; 6] = [
    include_str!("../../../ARCHITECTURE.md"),
    include_str!("../../../README.md"),
    include_str!("../../../docs/algorithm.md"),
    include_str!("../../../docs/guarantees.md"),
    include_str!("../../../docs/operating.md"),
    include_str!("../../../docs/cost.md"),
];

const CODE: [&str; 4] = [
    include_str!("../../../src/ledger/account.rs"),
    include_str!("../../../src/ledger/exchange.rs"),
    include_str!("../../../src/ledger/publish.rs"),
    include_str!("../../../src/ledger/quota.rs"),
];

/// What costs most: pieces without an end that no table holds, and characters of all scripts.
const HARD: [Text; 10] = [
    ("one letter", |size| "a".repeat(size)),
    ("random small letters", |size| letters(size, |n| char::from(b'a' + (n % 26) as u8))),
    ("random letters", |size| {
        letters(size, |n| char::from((n / 2 % 26) as u8 + if n.is_multiple_of(2) { b'a' } else { b'A' }))
    }),
    ("spaces", |size| " ".repeat(size)),
    ("random marks", |size| letters(size, |n| char::from(b"!?#$%&*+-/=<>|~^"[n as usize % 16]))),
    ("random Chinese", |size| letters(size, |n| scalar(0x4e00 + n % 0x5200))),
    ("random Korean", |size| letters(size, |n| scalar(0xac00 + n % 11_172))),
    ("random emoji", |size| letters(size, |n| scalar(0x1f300 + n % 0x350))),
    ("combining marks", |size| letters(size, |n| scalar(0x300 + n % 0x70))),
    ("any character", |size| letters(size, |n| scalar(0x20 + n % 0x2_0000))),
];

/// Words of the trade, as a prompt in Chinese has them.
const CHINESE: [&str; 40] = [
    "我们", "需要", "一个", "系统", "，", "可以", "在", "多个", "节点", "之间", "共享", "预算", "。", "请求", "到达",
    "时", "先", "检查", "余额", "如果", "不够", "就", "向", "邻居", "借用", "；", "每", "分钟", "重新", "开始", "计算",
    "的", "结果", "必须", "准确", "模型", "回答", "用户", "问题", "！",
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(place) = arguments.iter().position(|argument| argument == LOAD) {
        return load(arguments.get(place + 1).map_or("", String::as_str));
    }
    println!("| table | read in, ms | memory, MB | at most, MB |");
    println!("|---|---:|---:|---:|");
    for (name, _) in ENCODINGS {
        let Some([ms, resident, peak]) = loaded(name) else {
            eprintln!("tokenizer: {name} could not be read");
            return ExitCode::from(2);
        };
        println!("| {name} | {ms:.0} | {resident:.1} | {peak:.1} |");
    }
    println!("\n| text | o200k, us/kB | bytes a token | cl100k, us/kB | bytes a token |");
    println!("|---|---:|---:|---:|---:|");
    let mut worst = ("", None::<fn(usize) -> String>, 0.0);
    for (name, make) in USUAL.into_iter().chain(HARD) {
        let [o200k, cl100k] = ENCODINGS.map(|(_, tokenizer)| {
            let cost = cost(&make(ORDINARY), tokenizer);
            (cost.ms * 1e6 / ORDINARY as f64, ORDINARY as f64 / cost.tokens)
        });
        println!("| {name} | {:.1} | {:.1} | {:.1} | {:.1} |", o200k.0, o200k.1, cl100k.0, cl100k.1);
        let slower = o200k.0.max(cl100k.0);
        if slower > worst.2 {
            worst = (name, Some(make), slower);
        }
    }
    let (name, Some(make), _) = worst else { return ExitCode::from(2) };
    let text = make(LARGEST);
    let ms = ENCODINGS.map(|(_, tokenizer)| cost(&text, tokenizer).ms).into_iter().fold(0.0, f64::max);
    let met = ms <= MAX_REQUEST;
    println!(
        "\nA request of {} MiB of {name} takes {ms:.0} ms of a core; <= {MAX_REQUEST}: {}",
        LARGEST >> 20,
        if met { "met" } else { "missed" }
    );
    if met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What counting a text takes and gives.
struct Cost {
    ms: f64,
    tokens: f64,
}

fn cost(text: &str, tokenizer: Tokenizer) -> Cost {
    let body = serde_json::json!({"model": "m", "messages": [{"role": "user", "content": text}]}).to_string();
    let call = OpenAiChat.call(body.into()).expect("a request as the API has it");
    tokenizer.load();
    let counts: Vec<(Duration, u64)> = (0..ROUNDS)
        .map(|_| {
            let count = || {
                // The thread's memory of pieces is made before the clock starts.
                tokenizer.load();
                let begun = cpu();
                let tokens = OpenAiChat.prompt(&call, tokenizer);
                (cpu() - begun, tokens)
            };
            thread::scope(|scope| scope.spawn(count).join()).expect("counting does not panic")
        })
        .collect();
    let ms = median(counts.iter().map(|(took, _)| took.as_secs_f64() * 1e3).collect()).unwrap_or(f64::NAN);
    Cost { ms, tokens: counts[0].1 as f64 }
}

/// Reads a table, and prints for [`loaded`] what that cost.
fn load(name: &str) -> ExitCode {
    let Some((_, tokenizer)) = ENCODINGS.into_iter().find(|(known, _)| *known == name) else {
        return ExitCode::from(2);
    };
    let (before, begun) = (memory("VmRSS:"), cpu());
    tokenizer.load();
    let ms = (cpu() - begun).as_secs_f64() * 1e3;
    println!("{ms} {} {}", memory("VmRSS:") - before, memory("VmHWM:") - before);
    ExitCode::SUCCESS
}

/// Returns the milliseconds it takes to read a table, the MB that stay and the MB it takes
/// meanwhile: medians, each of a process of its own.
fn loaded(name: &str) -> Option<[f64; 3]> {
    let mut rounds = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        let output = Command::new(std::env::current_exe().ok()?).args([LOAD, name]).output().ok()?;
        let line = String::from_utf8(output.stdout).ok()?;
        let mut figures = line.split_whitespace().map(|figure| figure.parse::<f64>().ok());
        for round in &mut rounds {
            round.push(figures.next()??);
        }
    }
    let [ms, resident, peak] = rounds.map(median);
    Some([ms?, resident?, peak?])
}

/// Returns this process's memory in MB, as the kernel calls it.
fn memory(what: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(what));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok()).unwrap_or(f64::NAN) * 1_024.0 / 1e6
}

/// Returns the CPU time that this thread has used.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn words(words: &[&str], size: usize) -> String {
    let mut state = SEED;
    let mut text = String::new();
    while text.len() < size {
        text.push_str(words[next(&mut state) as usize % words.len()]);
    }
    cut(text, size)
}

fn letters(size: usize, of: fn(u32) -> char) -> String {
    let mut state = SEED;
    let mut text = String::new();
    while text.len() < size {
        text.push(of(next(&mut state)));
    }
    cut(text, size)
}

fn cut(mut text: String, size: usize) -> String {
    assert!(text.len() >= size, "a text is as long as it is said to be");
    let end = (0..=size).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.truncate(end);
    text
}

/// Where there is no such character, one that is in no table either.
fn scalar(code: u32) -> char {
    char::from_u32(code).unwrap_or('\u{e000}')
}

const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// A xorshift generator: the same texts in every run.
fn next(state: &mut u64) -> u32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 32) as u32
}
