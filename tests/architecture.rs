//! What the rooms promise and no lint can see: imports, sizes, names.

use std::fs;
use std::path::{Path, PathBuf};

/// What the pure room may import (docs: ARCHITECTURE.md, the rooms).
const PURE: [&str; 8] =
    ["std::", "core::", "super::", "self::", "crate::ledger::", "crate::wallet::", "crdts::", "thiserror::"];

/// The most lines of a file without its tests.
const LINES: usize = 600;

/// Words that say nothing (ARCHITECTURE.md, glossary).
const EMPTY_WORDS: [&str; 8] = ["manager", "helper", "helpers", "util", "utils", "handler", "data", "info"];

/// Names that others chose.
const NOT_OURS: [(&str, &str); 2] = [("Data", "http_body's associated type"), ("data", "the field of an SSE event")];

/// A file and its lines of code: without comments, without its test module.
struct Source {
    path: String,
    all_lines: usize,
    code: Vec<String>,
}

fn sources(folder: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<PathBuf> = vec![root.join(folder)];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the folder can be read") {
            let path = entry.expect("the entry can be read").path();
            let name = path.strip_prefix(root).expect("it is below").to_string_lossy().replace('\\', "/");
            let is_test = name.ends_with("tests.rs") || name.contains("/tests/");
            if path.is_dir() {
                folders.push(path);
            } else if name.ends_with(".rs") && !is_test {
                let text = fs::read_to_string(&path).expect("sources are UTF-8");
                let own: Vec<&str> = text.lines().take_while(|line| *line != "#[cfg(test)]").collect();
                let code = own.iter().map(|line| line.trim()).filter(|line| !line.starts_with("//"));
                found.push(Source { path: name, all_lines: own.len(), code: code.map(str::to_owned).collect() });
            }
        }
    }
    assert!(!found.is_empty(), "nothing in {folder}: has it moved?");
    found
}

/// Says of every offending line where it is.
fn offenders(folder: &str, is_wrong: impl Fn(&Source, &str) -> bool) -> Vec<String> {
    let of = |source: Source| {
        let wrong: Vec<String> = source.code.iter().filter(|line| is_wrong(&source, line)).cloned().collect();
        wrong.into_iter().map(move |line| format!("{}: {line}", source.path)).collect::<Vec<_>>()
    };
    sources(folder).into_iter().flat_map(of).collect()
}

#[test]
fn the_ledger_imports_nothing_that_acts() {
    let wrong = offenders("src/ledger", |_, line| {
        let mut words = line.split_whitespace().skip_while(|word| word.starts_with("pub"));
        words.next() == Some("use") && !PURE.iter().any(|pure| words.clone().next().unwrap_or("").starts_with(pure))
    });
    assert_eq!(wrong, Vec::<String>::new(), "the ledger is pure");
}

#[test]
fn the_layer_knows_no_socket_and_no_server() {
    let wrong = offenders("src/layer", |_, line| {
        ["tokio::net", "axum", "hyper::", "crate::cluster", "crate::server", "crate::config"]
            .iter()
            .any(|name| line.contains(name))
    });
    assert_eq!(wrong, Vec::<String>::new(), "whoever serves or sends stands outside of it");
}

#[test]
fn only_one_file_names_chitchat() {
    let wrong = offenders("src", |source, line| {
        source.path != "src/cluster/membership.rs" && (line.contains("chitchat::") || line.starts_with("use chitchat"))
    });
    assert_eq!(wrong, Vec::<String>::new(), "its public types change with every release (docs/decisions/0001)");
}

#[test]
fn metrics_are_named_in_one_file() {
    let wrong = offenders("src", |source, line| source.path != "src/telemetry.rs" && line.contains("\"quotum_"));
    assert_eq!(wrong, Vec::<String>::new(), "metric names belong to src/telemetry.rs");
}

#[test]
fn files_can_be_read_in_one_sitting() {
    for source in sources("src") {
        assert!(source.all_lines <= LINES, "{} has {} lines of {LINES}", source.path, source.all_lines);
    }
}

#[test]
fn names_say_something() {
    const KINDS: [&str; 8] = ["struct", "enum", "trait", "type", "fn", "mod", "const", "static"];
    let wrong = offenders("src", |_, line| {
        let words: Vec<&str> = line.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        words.windows(2).filter(|pair| KINDS.contains(&pair[0])).any(|pair| {
            let ours = !NOT_OURS.iter().any(|(name, _)| *name == pair[1]);
            ours && parts(pair[1]).iter().any(|part| EMPTY_WORDS.contains(&part.as_str()))
        })
    });
    assert_eq!(wrong, Vec::<String>::new(), "the glossary has a better word");
}

/// Splits `snake_case` and `CamelCase` into lower-case words.
fn parts(name: &str) -> Vec<String> {
    let mut spaced = String::new();
    for c in name.chars() {
        if c.is_uppercase() && spaced.ends_with(char::is_lowercase) {
            spaced.push('_');
        }
        spaced.push(c);
    }
    spaced.to_lowercase().split('_').map(str::to_owned).collect()
}
