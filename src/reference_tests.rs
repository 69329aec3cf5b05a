//! What docs/configuration.md says is what this binary does: fields, defaults, ranges, variables, flags, exit codes,
//! headers, endpoints; and the metrics of docs/operating.md.
//!
//! Knows how the page's tables are written. Must not repeat what stands there: what the program knows is asked of the
//! program, so that whoever adds a field, a variable or a metric is told to add a line.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use clap::CommandFactory;
use quotum::config::{self, Flags, scalar};
use serde_json::{Value, json};

use crate::deploy_tests::deploy;
use crate::monitoring_tests::every_metric;
use crate::{Cli, help};

type Names = BTreeSet<String>;

fn file(path: &str) -> String {
    let path = deploy().join("..").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn page() -> String {
    file("docs/configuration.md")
}

/// Returns the rows of all tables whose head begins so, without the head.
fn rows(text: &str, head: &str) -> Vec<Vec<String>> {
    let text = text.replace("\\|", "/");
    let mut rows = Vec::new();
    for table in text.split(&format!("\n| {head} |")).skip(1) {
        let lines = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        rows.extend(lines.map(|line| {
            let cells: Vec<String> = line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
            cells
        }));
    }
    assert!(!rows.is_empty(), "no table of {head}");
    rows
}

/// Returns what stands between backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Returns the one thing that a cell holds, if that stands between backticks.
fn value(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.strip_suffix('`').filter(|inner| !inner.contains('`'))
}

/// Returns the words that follow `before` in a source, up to the next quote.
fn after<'a>(source: &'a str, before: &'a str) -> impl Iterator<Item = &'a str> {
    source.split(before).skip(1).filter_map(|rest| rest.split('"').next())
}

fn nobody(_: &str) -> Option<String> {
    None
}

/// Returns what is said of a configuration, if anything.
fn problems(config: &Value) -> String {
    match config::parse(&config.to_string(), "q.yaml", &nobody, &Flags::default()) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    }
}

/// Returns how the configuration is understood.
fn understood(config: &Value) -> String {
    let parsed = config::parse(&config.to_string(), "q.yaml", &nobody, &Flags::default());
    let mut shown = format!("{:?}", parsed.unwrap_or_else(|error| panic!("{error}: {config}")));
    for port in [4000, 7946, 9090] {
        // The default tries IPv4 where there is no IPv6.
        shown = shown.replace(&format!("Everywhere({port})"), &format!("At([::]:{port})"));
    }
    shown
}

/// What must be there, and nothing else.
fn least() -> Value {
    let limit = json!({"unit": "tokens", "amount": 100_000, "window": "60s"});
    json!({"deployments": [{"id": "a", "model": "m", "upstream": "http://127.0.0.1:1/v1", "limits": [limit]}]})
}

/// Returns the place of a field: `deployments[].wait`.
fn place<'a>(config: &'a mut Value, path: &str) -> &'a mut Value {
    path.split('.').fold(config, |config, name| match name.strip_suffix("[]") {
        Some(list) => &mut config[list][0],
        None => &mut config[name],
    })
}

/// Returns a place as problems name it.
fn named(path: &str) -> String {
    path.replace("[]", "[0]")
}

/// Returns a value as it is written in the file.
fn written(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| json!(text))
}

/// Returns the names that the parser knows in a section, if it is one: it lists them to whoever writes another.
fn known_in(path: &str) -> Option<Vec<String>> {
    let unknown = json!({"zzz": 1});
    let config = path.split('.').rev().filter(|name| !name.is_empty()).fold(unknown, |inner, name| {
        let mut map = serde_json::Map::new();
        match name.strip_suffix("[]") {
            Some(list) => map.insert(list.to_owned(), json!([inner])),
            None => map.insert(name.to_owned(), inner),
        };
        Value::Object(map)
    });
    let told = problems(&config);
    let (_, known) = told.split_once("unknown field `zzz`, expected one of ")?;
    Some(known.lines().next()?.split(", ").map(str::to_owned).collect())
}

/// Finds all fields of a section, and the sections among them.
fn find(section: &str, fields: &mut Names, sections: &mut Names) {
    for name in known_in(section).unwrap() {
        let path = if section.is_empty() { name } else { format!("{section}.{name}") };
        let inside = [path.clone(), format!("{path}[]")].into_iter().find(|path| known_in(path).is_some());
        match inside {
            Some(inside) => {
                sections.insert(path);
                find(&inside, fields, sections);
            }
            None => {
                fields.insert(path);
            }
        }
    }
}

#[test]
fn the_page_has_every_field_that_the_parser_knows_and_no_other() {
    let (mut fields, mut sections) = (Names::new(), Names::new());
    find("", &mut fields, &mut sections);
    assert!(fields.len() > 55 && sections.contains("deployments[].limits"), "{fields:?} {sections:?}");
    let listed: Vec<String> = rows(&page(), "field").iter().map(|row| quoted(&row[0]).remove(0)).collect();
    let unique: Names = listed.iter().filter(|path| !sections.contains(*path)).cloned().collect();
    assert_eq!(unique, fields);
    assert_eq!(listed.iter().collect::<BTreeSet<_>>().len(), listed.len(), "a field stands twice");
}

#[test]
fn every_default_on_the_page_is_what_an_absent_field_means() {
    let mut compared = 0;
    for row in rows(&page(), "field") {
        let (path, default) = (&quoted(&row[0])[0], &row[2]);
        let mut config = least();
        // What the field is a setting of.
        match path.rsplit('.').next().unwrap() {
            "parts" => config["deployments"][0]["limits"][0]["kind"] = json!("sliding"),
            "time_zone" => {
                config["deployments"][0]["limits"][0] = json!({"unit": "tokens", "amount": 5, "kind": "day"})
            }
            "listen" => config["proxy"]["open"] = json!(true),
            _ => {}
        }
        if let Some(default) = value(default) {
            let absent = understood(&config);
            *place(&mut config, path) = written(default);
            assert_eq!(understood(&config), absent, "{path}: {default}");
            compared += 1;
        } else if default == "required" {
            let both = json!({"certificate": "/none", "key": "/none"});
            if path.starts_with("proxy.tls.") {
                config["proxy"]["tls"] = both;
            }
            *place(&mut config, path) = Value::Null;
            let told = problems(&config);
            let missing = told.contains(&format!("{}: is missing", named(path))) || told.contains("needs both files");
            assert!(missing, "{path}: {told}");
        } else {
            assert!(!default.is_empty() && !default.starts_with('`'), "{path} has no default");
        }
    }
    assert!(compared > 35, "{compared}");
}

#[test]
fn every_range_on_the_page_is_the_one_that_is_told() {
    let mut compared = 0;
    for row in rows(&page(), "field") {
        let (path, range) = (&quoted(&row[0])[0], &row[3]);
        let values = quoted(range);
        let (wrong, told) = match range.contains("` to `") {
            true => {
                let shown = |text: &String| scalar::duration(text).map_or(text.clone(), |value| format!("{value:?}"));
                let wrong = match (scalar::duration(&values[1]), values[1].parse::<i64>()) {
                    (Ok(_), _) => "9999d",
                    (_, Ok(_)) => "999999999999",
                    _ => "999GiB",
                };
                (wrong, format!("must lie between {} and {}", shown(&values[0]), shown(&values[1])))
            }
            false if !values.is_empty() => ("zzz", format!("is not one of: {}", values.join(", "))),
            false => continue,
        };
        let mut config = least();
        *place(&mut config, path) = written(wrong);
        let problems = problems(&config);
        assert!(problems.contains(&named(path)) && problems.contains(&told), "{path}: {told}: {problems}");
        compared += 1;
    }
    assert!(compared > 25, "{compared}");
}

#[test]
fn every_mode_on_the_page_is_one() {
    let settings = rows(&page(), "setting").into_iter().map(|row| quoted(&row[0]).remove(0)).collect::<Names>();
    let mut config = least();
    config["deployments"][0]["mode"] = json!("zzz");
    let told = problems(&config);
    let named = |mode: &str| settings.iter().any(|setting| setting.split('.').next() == Some(mode));
    for mode in ["strict", "observe", "elastic", "sum"] {
        assert!(told.contains(mode) && named(mode), "{mode}: {told}");
    }
    for (mode, setting) in settings.iter().filter_map(|setting| setting.split_once('.')) {
        config["deployments"][0]["mode"] = json!({mode: {}});
        let told = problems(&config);
        assert!(told.contains(&format!("mode.{mode}.{setting}: is missing")), "{told}");
    }
}

#[test]
fn what_a_change_does_is_what_the_page_says() {
    // It changes nothing but the default of proxy.listen.
    let mut known: Names = ["proxy.open".to_owned()].into();
    let source = file("src/server/reload.rs");
    let (_, fixed) = source.split_once("fn fixed(").unwrap();
    known.extend(after(fixed.split("parts.into_iter()").next().unwrap(), "        (\"").map(str::to_owned));
    // Of LiteLLM's file.
    assert!(known.remove("general_settings.master_key"));
    assert!(known.remove("proxy's bounds"));
    let is_bound = |path: &str| path.starts_with("proxy.timeouts.") || BOUNDS.contains(&path);
    const BOUNDS: [&str; 4] =
        ["proxy.max_connections", "proxy.max_streams", "proxy.max_headers", "proxy.max_header_bytes"];
    let mut listed = Names::new();
    for row in rows(&page(), "field") {
        let path = quoted(&row[0]).remove(0);
        let is_deployments = path == "litellm_config" || path.starts_with("deployments");
        assert_eq!(row[5], if is_deployments { "live" } else { "restart" }, "{path}");
        if !is_deployments && !is_bound(&path) && !path.starts_with("proxy.tls.") {
            listed.insert(path);
        }
    }
    assert_eq!(listed, known);
}

#[test]
fn the_example_has_every_field_and_passes() {
    let page = page();
    let example = page.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    let path = std::env::temp_dir().join(format!("quotum-example-{}.yaml", std::process::id()));
    fs::write(&path, example).unwrap();
    let checked = config::check_offline(&path);
    fs::remove_file(&path).unwrap();
    assert_eq!(checked.unwrap_or_else(|error| panic!("{error}")).deployments, 1);
    fn flat(value: &Value, path: &str, found: &mut Names) {
        match value {
            Value::Object(map) => map.iter().for_each(|(name, value)| {
                let dot = if path.is_empty() { "" } else { "." };
                flat(value, &format!("{path}{dot}{name}"), found);
            }),
            Value::Array(list) if list.iter().any(Value::is_object) => {
                list.iter().for_each(|value| flat(value, &format!("{path}[]"), found));
            }
            _ => {
                found.insert(path.to_owned());
            }
        }
    }
    let (mut in_example, mut fields) = (Names::new(), Names::new());
    flat(&serde_saphyr::from_str(example).unwrap(), "", &mut in_example);
    find("", &mut fields, &mut Names::new());
    assert_eq!(in_example, fields);
}

/// Returns every variable that somebody looks up.
fn variables() -> Names {
    let asked = RefCell::new(Names::new());
    let env = |name: &str| {
        asked.borrow_mut().insert(name.to_owned());
        name.starts_with("KUBERNETES_").then(|| "h".to_owned())
    };
    let mut config = least();
    config["gossip"] = json!({"insecure": true, "seeds": ["a:7946"], "pods": "app=quotum"});
    let entry = |model: &str| json!({"model_name": "m", "litellm_params": {"model": model, "api_base": "http://h", "api_version": "1"}});
    let litellm = ["openai/a", "anthropic/a", "azure/a", "groq/a"].map(entry);
    for text in [config.to_string(), format!("model_list: {}", json!(litellm))] {
        // Whatever comes of it: it has been asked for.
        let _ = config::parse(&text, "q.yaml", &env, &Flags::default());
    }
    let _ = config::load(None, &env, &Flags::default());
    let mut asked = asked.into_inner();
    for source in ["src/main.rs", "src/log.rs", "src/client.rs", "src/server/mod.rs", "src/demo/mod.rs"] {
        asked.extend(after(&file(source), "environment(\"").map(str::to_owned));
    }
    asked
}

#[test]
fn the_page_has_every_variable_and_no_other() {
    let listed: Names = rows(&page(), "variable").iter().flat_map(|row| quoted(&row[0])).collect();
    assert_eq!(listed, variables());
}

#[test]
fn the_page_has_every_flag_with_its_default() {
    let command = Cli::command();
    let mut flags = BTreeMap::new();
    for command in command.get_subcommands() {
        for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
            let Some(long) = arg.get_long().filter(|long| *long != "help") else { continue };
            let is_switch = !arg.get_action().takes_values();
            let default: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
            let default = if is_switch { String::new() } else { default.join(",") };
            flags.insert((command.get_name().to_owned(), format!("--{long}")), default);
        }
    }
    let page = page();
    let mut listed = BTreeMap::new();
    for row in rows(&page, "command | flag") {
        if let Some(flag) = value(&row[1]) {
            let default = value(&row[2]).unwrap_or_default().to_owned();
            listed.insert((value(&row[0]).unwrap().to_owned(), flag.to_owned()), default);
        }
    }
    for row in rows(&page, "variable") {
        if let Some(flag) = value(&row[2]) {
            let variable = flag.trim_start_matches('-').to_ascii_uppercase().replace('-', "_");
            assert_eq!(quoted(&row[0]), [format!("QUOTUM_{variable}")]);
            listed.insert(("serve".to_owned(), flag.to_owned()), String::new());
        }
    }
    assert_eq!(listed, flags);
}

#[test]
fn the_help_of_serve_names_every_variable_and_default() {
    let mut command = Cli::command();
    let serve = command.find_subcommand_mut("serve").unwrap();
    let text = serve.render_long_help().to_string();
    for row in rows(&page(), "variable").iter().filter(|row| row[0].starts_with("`QUOTUM_")) {
        for variable in quoted(&row[0]) {
            let known = if row[2].is_empty() { format!("  {variable} ") } else { format!("[env: {variable}]") };
            assert!(text.contains(&known), "{known}: {text}");
        }
    }
    for arg in serve.get_arguments().filter(|arg| arg.get_id() != "help" && !arg.is_hide_set()) {
        let says = arg.get_help().unwrap().to_string();
        assert!(says.contains("[env: QUOTUM_") && says.contains("[default: "), "{says}");
    }
    // What the texts call a default is the default.
    let config = config::parse(&least().to_string(), "q.yaml", &nobody, &Flags::default()).unwrap();
    assert!(text.contains(&format!("[default: {}]", config.gossip.cluster)), "{text}");
    let mut open = least();
    open["proxy"] = json!({"open": true});
    for (listen, port) in [("gossip", 7946), ("admin", 9090), ("proxy", 4000)] {
        assert!(text.contains(&format!("[default: [::]:{port}")), "{listen}: {text}");
        assert!(understood(&open).contains(&format!("At([::]:{port})")), "{listen}");
    }
}

/// Returns the numbers that stand alone in a text.
fn numbers(text: &str) -> impl Iterator<Item = u8> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter_map(|word| word.parse().ok())
}

#[test]
fn the_page_and_the_help_have_every_exit_code() {
    // Success and failure of the standard library.
    let mut codes: BTreeSet<u8> = [0, 1].into();
    for path in ["src/main.rs", "src/demo/mod.rs", "src/demo/report.rs", "src/server/mod.rs", "src/config/mod.rs"] {
        let source = file(path);
        for name in ["fn exit_code(", "async fn interrupted("] {
            for body in source.split(name).skip(1) {
                codes.extend(numbers(
                    body.split_once('{').unwrap().1.split("\n    }\n").next().unwrap().split("\n}\n").next().unwrap(),
                ));
            }
        }
        for before in ["ExitCode::from(", "const BAD_CONFIG: u8 = "] {
            codes
                .extend(source.split(before).skip(1).filter_map(|rest| numbers(rest.split([')', ';']).next()?).next()));
        }
    }
    assert!(file("src/server/mod.rs").contains("std::process::exit(128 + number)"));
    let page = page();
    let (_, table) = page.split_once("### Exit codes\n").unwrap();
    let head = table.lines().find(|line| line.starts_with("| command |")).unwrap();
    assert_eq!(numbers(head).collect::<BTreeSet<_>>(), codes);
    let commands: Names = Cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let rows = rows(&page, "command | 0");
    assert_eq!(rows.iter().map(|row| quoted(&row[0]).remove(0)).collect::<Names>(), commands);
    let columns: Vec<Vec<u8>> = head.trim_matches('|').split('|').map(|cell| numbers(cell).collect()).collect();
    for row in rows {
        let of_command: BTreeSet<u8> = row
            .iter()
            .zip(&columns)
            .skip(1)
            .filter(|(cell, _)| !cell.is_empty())
            .flat_map(|(_, codes)| codes.clone())
            .collect();
        let name = quoted(&row[0]).remove(0);
        let text = match name.as_str() {
            "serve" => help::SERVE,
            "stub" => help::STUB,
            "demo" => help::DEMO,
            "check-config" => help::CHECK_CONFIG,
            _ => help::ASK,
        };
        let (_, text) = text.split_once("Exit codes: ").unwrap();
        let text = text.split("\n\n").next().unwrap();
        assert_eq!(numbers(text).collect::<BTreeSet<_>>(), of_command, "{name}");
        let mut command = Cli::command();
        let shown = command.find_subcommand_mut(&name).unwrap().render_long_help().to_string();
        assert!(shown.contains("Exit codes: 0 "), "{shown}");
    }
}

#[test]
fn the_page_has_every_endpoint_and_port() {
    let page = page();
    for source in ["src/server/proxy.rs", "src/server/admin.rs"] {
        let source = file(source);
        let routes: Vec<&str> = after(&source, ".route(\"").collect();
        assert!(routes.len() >= 5);
        for route in routes {
            assert!(page.contains(&format!(" {route}`")) || page.contains(&format!("`{route}`")), "{route}");
        }
    }
    let usual = understood(&json!({"proxy": {"open": true}, "deployments": least()["deployments"]}));
    for row in rows(&page, "port | default") {
        assert!(usual.contains(&format!("At([::]:{})", row[1])), "{row:?}");
    }
}

#[test]
fn the_page_has_every_header_and_every_code_of_a_refusal() {
    let page = page();
    let listed: Names = rows(&page, "header").iter().flat_map(|row| quoted(&row[0])).collect();
    let source = file("src/layer/refusal.rs");
    let (source, _) = source.split_once("#[cfg(test)]").unwrap();
    let mut known: Names = after(source, "from_static(\"")
        .filter(|name| name.contains("x-") || name.contains('-'))
        .map(str::to_owned)
        .collect();
    let is_header = |name: &str| ["x-", "retry-"].iter().any(|start| name.starts_with(start));
    known.retain(|name| is_header(name));
    for unit in ["tokens", "requests", "input-tokens", "output-tokens"] {
        for word in ["limit", "remaining", "reset"] {
            assert!(source.contains(&format!("\"x-ratelimit-{word}-{unit}\"")));
            assert!(source.contains(&format!("\"anthropic-ratelimit-{unit}-{word}\"")));
        }
        assert!(listed.contains(unit) || unit == "tokens", "{unit}");
    }
    let limits = ["limit", "remaining", "reset"];
    known.extend(limits.map(|word| format!("x-ratelimit-{word}-tokens")));
    known.extend(limits.map(|word| format!("anthropic-ratelimit-tokens-{word}")));
    // By constants of the http crate.
    known.extend(["retry-after", "www-authenticate", "accept-encoding"].map(str::to_owned));
    known.extend(["requests", "input-tokens", "output-tokens"].map(str::to_owned));
    assert_eq!(listed, known);

    let mut codes = Names::new();
    for path in [
        "layer/refusal.rs",
        "server/proxy.rs",
        "server/intake.rs",
        "server/admin.rs",
        "server/listen.rs",
        "server/connection/mod.rs",
        "server/connection/bodies.rs",
    ] {
        let source = file(&format!("src/{path}"));
        let source = source.split("#[cfg(test)]").next().unwrap();
        codes.extend(after(source, "Some(\"").filter(|word| word.contains('_')).map(str::to_owned));
        codes.extend(source.split("\\\"code\\\":\\\"").skip(1).map(|rest| rest.split('\\').next().unwrap().to_owned()));
        codes.extend(
            source
                .split('"')
                .filter(|word| ["upstream_", "too_many_"].iter().any(|start| word.starts_with(start)))
                .map(str::to_owned),
        );
    }
    codes.retain(|code| code.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'));
    // A field of /status.
    codes.remove("upstream_paused_ms");
    let listed: Names = rows(&page, "status | `code`").iter().flat_map(|row| quoted(&row[1])).collect();
    assert_eq!(listed, codes);
}

#[test]
fn the_operating_guide_has_every_metric_with_its_labels() {
    let mut known = BTreeMap::<String, (String, Names)>::new();
    for (name, mut labels) in every_metric() {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        let kind = if family.is_some() {
            "histogram"
        } else if name.ends_with("_total") {
            "counter"
        } else {
            "gauge"
        };
        labels.remove("le");
        let entry = known.entry(family.unwrap_or(&name).to_owned()).or_default();
        kind.clone_into(&mut entry.0);
        entry.1.extend(labels);
    }
    let mut listed = BTreeMap::new();
    for row in rows(&file("docs/operating.md"), "metric") {
        for name in quoted(&row[0]) {
            listed.insert(name, (row[1].clone(), quoted(&row[2]).into_iter().collect::<Names>()));
        }
    }
    assert_eq!(listed, known);
    assert!(page().contains("operating.md#metrics"));
}
