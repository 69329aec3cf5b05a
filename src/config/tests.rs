//! What a config file may say, and what its author is told otherwise.

use crate::ledger::{WindowKind, Zone};
use crate::{Margin, Portion};

use super::*;

fn nothing(_: &str) -> Option<String> {
    None
}

fn read(text: &str) -> Result<Config, ConfigError> {
    parse(text, "q.yaml", &nothing, &Flags::default())
}

/// Returns the problems as lines.
fn problems(text: &str) -> String {
    read(text).expect_err("the text is wrong").to_string()
}

fn one_deployment(extra: &str) -> String {
    format!(
        "deployments:\n  - id: a\n    model: m\n    upstream: http://127.0.0.1:1/v1\n    limits:\n      - {{ unit: tokens, amount: 100, window: 60s }}\n{extra}"
    )
}

const FULL: &str = r#"
node: { name: pod-a }
gossip:
  cluster: prod
  listen: "127.0.0.1:7946"
  advertise: 127.0.0.1:7946
  seeds: ["127.0.0.1:7946", "127.0.0.1:7947"]
  interval: 100ms
  insecure: false
  absent_for: 5m
  on_silence: closed
  patience: 30s
  first_window: wait
proxy: { listen: "127.0.0.1:4000", open: false, max_body: 32MiB }
admin: { listen: "[::]:9090" }
deployments:
  - id: gpt-4o-eastus
    model: gpt-4o
    upstream: https://example.invalid/v1
    api_key: os.environ/AZURE_KEY
    timeouts: { connect: 5s, first_byte: 60s, idle: 120s }
    limits:
      - { unit: tokens,   amount: 100000, window: 60s, kind: fixed }
      - { unit: requests, amount: 600,    window: 60s }
    limit_id: null
    mode: strict
    wait: 20ms
    edge: 50ms
    reserve: auto
    tokenizer: auto
    default_max_tokens: 4096
    unreported: reserved
    weight: 1
    order: 1
"#;

#[test]
fn the_full_set_is_understood() {
    let env = |name: &str| (name == "AZURE_KEY").then(|| "sk-azure".to_owned());
    let config = parse(FULL, "q.yaml", &env, &Flags::default()).unwrap();
    assert_eq!(config.node, "pod-a");
    assert_eq!(config.gossip.on_silence, OnSilence::Closed);
    assert_eq!(config.gossip.first_window, FirstWindow::Wait);
    assert!(matches!(&config.gossip.seeds, Seeds::Static(list) if list.len() == 2));
    let deployment = &config.deployments[0];
    assert_eq!(deployment.quotas.len(), 2);
    assert_eq!(deployment.api_key.as_ref().unwrap().reveal(), "sk-azure");
    assert!(!format!("{config:?}").contains("sk-azure"));
}

#[test]
fn without_a_file_the_stub_is_served_on_loopback() {
    let config = load(None, &nothing, &Flags::default()).unwrap();
    assert!(config.embedded_stub);
    assert_eq!(config.proxy.listen, Listen::At("127.0.0.1:4000".parse().unwrap()));
    assert_eq!(config.admin, Listen::At("127.0.0.1:9090".parse().unwrap()));
    assert_eq!(config.gossip.seeds, Seeds::Alone);
}

#[test]
fn a_file_without_deployments_is_not_answered_with_the_stub() {
    for text in ["", "proxy: { listen: '127.0.0.1:0' }\n", "deployments: []\n"] {
        let told = problems(text);
        assert!(told.contains("deployments"), "{told}");
    }
}

#[test]
fn a_flag_wins_over_the_environment_and_the_environment_over_the_file() {
    let env = |name: &str| match name {
        "QUOTUM_NODE" => Some("from-env".to_owned()),
        "QUOTUM_CLUSTER" => Some("from-env".to_owned()),
        _ => None,
    };
    let flags = Flags { node: Some("from-flag".into()), ..Flags::default() };
    let text =
        format!("node: {{ name: from-file }}\ngossip: {{ cluster: from-file, interval: 1s }}\n{}", one_deployment(""));
    let config = parse(&text, "q.yaml", &env, &flags).unwrap();
    assert_eq!(config.node, "from-flag");
    assert_eq!(config.gossip.cluster, "from-env");
    assert_eq!(config.gossip.interval, Duration::from_secs(1));
}

#[test]
fn every_problem_names_file_line_and_field() {
    let told = problems(&one_deployment("    wait: soon\n    mode: lax\n"));
    assert!(told.contains("q.yaml:7:11: deployments[0].wait: `soon` is not a duration"), "{told}");
    assert!(told.contains("q.yaml:8:11: deployments[0].mode: `lax` is not one of"), "{told}");
}

#[test]
fn an_unknown_field_is_an_error_with_its_line() {
    let told = problems(&one_deployment("    limit: 5\n"));
    assert!(told.starts_with("q.yaml:7:") && told.contains("limit"), "{told}");
}

#[test]
fn a_wrong_type_names_line_and_field() {
    let told = problems(&one_deployment("    default_max_tokens: many\n"));
    assert!(told.starts_with("q.yaml:7:") && told.contains("default_max_tokens"), "{told}");
}

#[test]
fn of_several_fields_in_a_line_the_wrong_one_is_named() {
    let told = problems(&one_deployment("").replace("100", "1e3"));
    assert!(told.starts_with("q.yaml:6:33: deployments[0].limits[0].amount: "), "{told}");
}

#[test]
fn a_base_whose_port_or_fragment_would_be_dropped_is_refused() {
    for wrong in ["http://127.0.0.1:99999/v1", "http://h:/v1", "http://[::1]:70000/v1", "http://h/v1#x"] {
        let told = problems(&one_deployment("").replace("http://127.0.0.1:1/v1", wrong));
        assert!(told.contains("deployments[0].upstream: "), "{wrong}: {told}");
    }
    for right in ["http://127.0.0.1/v1", "http://[::1]/v1", "https://h4/v1", "http://h:65535"] {
        assert!(read(&one_deployment("").replace("http://127.0.0.1:1/v1", right)).is_ok(), "{right}");
    }
}

#[test]
fn limits_of_zero_or_less_are_refused() {
    for amount in ["0", "-5"] {
        let told = problems(&one_deployment("").replace("amount: 100", &format!("amount: {amount}")));
        assert!(told.contains("deployments[0].limits[0].amount") && told.contains("at least 1"), "{told}");
    }
    let told = problems(&one_deployment("").replace("window: 60s", "window: 0s"));
    assert!(told.contains("limits[0].window"), "{told}");
}

#[test]
fn every_mode_is_understood_as_the_contract_writes_it() {
    let mode = |text: &str| read(&one_deployment(&format!("    mode: {text}\n"))).unwrap().deployments[0].mode;
    assert_eq!(read(&one_deployment("")).unwrap().deployments[0].mode, Mode::Strict);
    assert_eq!(mode("strict"), Mode::Strict);
    assert_eq!(mode("observe"), Mode::Observe);
    let elastic = Mode::Elastic { beta: Portion::percent(5) };
    for text in ["{ elastic: { beta: 0.05 } }", "{elastic: {beta: 5e-2}}", "{ elastic: { beta: '0.05' } }"] {
        assert_eq!(mode(text), elastic, "{text}");
    }
    assert_eq!(mode("\n      elastic:\n        beta: 0.05"), elastic);
    assert_eq!(mode("{ sum: { margin: auto } }"), Mode::Sum { margin: Margin::Auto });
    let margin = |text: &str| mode(&format!("{{ sum: {{ margin: {text} }} }}"));
    assert_eq!(margin("10%"), Mode::Sum { margin: Margin::Fixed(Portion::percent(10)) });
    assert_eq!(margin("'0%'"), Mode::Sum { margin: Margin::Fixed(Portion::ZERO) });
    assert_eq!(margin("2.5 %"), Mode::Sum { margin: Margin::Fixed(Portion::new(0.025).unwrap()) });
}

#[test]
fn a_mode_that_is_written_wrong_is_refused_with_what_would_be_right() {
    for (text, place, told) in [
        ("lax", "q.yaml:7:11: deployments[0].mode: `lax` is not one of: strict", "beta: 0.05"),
        ("elastic", "q.yaml:7:11: deployments[0].mode: `elastic` needs its beta", "{ elastic: { beta: 0.05 } }"),
        ("sum", "q.yaml:7:11: deployments[0].mode: `sum` needs its margin", "{ sum: { margin: auto } }"),
        ("{ sum: ten }", "deployments[0].mode.sum: `ten` is not its settings", "margin: auto"),
        ("{ sum: }", "deployments[0].mode.sum: this is not its settings", "margin: auto"),
        ("{ sum: { beta: 0.1 } }", "deployments[0].mode.sum.margin: is missing", "margin: auto"),
        ("{ sum: { margin: ten } }", "q.yaml:7:28: deployments[0].mode.sum.margin: `ten` is not a margin", "10%"),
        ("{ sum: { margin: 10 } }", "deployments[0].mode.sum.margin: `10` is not a margin", "such as 10%"),
        ("{ sum: { margin: 0.1 } }", "deployments[0].mode.sum.margin: `0.1` is not a margin", "such as 10%"),
        ("{ sum: { margin: 100% } }", "deployments[0].mode.sum.margin: `100%` is not a margin", "under 100%"),
        ("{ sum: { margin: -1% } }", "deployments[0].mode.sum.margin: `-1%` is not a margin", "from 0%"),
        ("{ lax: {} }", "deployments[0].mode: `lax` is not one of", ""),
        ("{ strict: {} }", "deployments[0].mode: `strict` has no settings", "write mode: strict"),
        ("{ elastic: 0.05 }", "q.yaml:7:22: deployments[0].mode.elastic: `0.05` is not its settings", "beta: 0.05"),
        ("{ elastic: {} }", "deployments[0].mode.elastic.beta: is missing", "beta: 0.05"),
        ("{ elastic: { betta: 0.05 } }", "q.yaml:7:31: deployments[0].mode.elastic.betta: is not a setting", "beta"),
        ("{ elastic: { beta: 5 } }", "q.yaml:7:30: deployments[0].mode.elastic.beta: `5` is not", "under 1"),
        ("{ elastic: { beta: 0 } }", "deployments[0].mode.elastic.beta: `0` is not", "over 0"),
        ("{ elastic: { beta: -0.1 } }", "deployments[0].mode.elastic.beta: `-0.1` is not", "over 0"),
        ("{ elastic: { beta: .nan } }", "q.yaml:7:30: deployments[0].mode.elastic.beta: non-finite float", ""),
        ("{ elastic: { beta: 'nan' } }", "deployments[0].mode.elastic.beta: `nan` is not", "over 0"),
        ("{ elastic: { beta: 5% } }", "deployments[0].mode.elastic.beta: `5%` is not", "0.05"),
        ("{ elastic: { beta: [0.1] } }", "deployments[0].mode.elastic.beta: this is not", "0.05"),
        ("{ elastic: { beta: 0.1 }, observe: {} }", "deployments[0].mode: names several modes", "keep one"),
        ("{}", "deployments[0].mode: names no mode", "strict"),
        ("[strict]", "q.yaml:7:11: deployments[0].mode: this is not a mode", "strict"),
        ("5", "deployments[0].mode: `5` is not a mode", "strict"),
    ] {
        let problems = problems(&one_deployment(&format!("    mode: {text}\n")));
        assert!(problems.contains(place) && problems.contains(told), "{text}: {problems}");
        assert_eq!(problems.lines().filter(|line| !line.contains("is not a setting")).count(), 1, "{problems}");
    }
}

#[test]
fn every_kind_of_window_is_read_in_either_form() {
    let quota = Quota::tokens(100).per_minute();
    let berlin = Zone::parse_posix("CET-1CEST,M3.5.0,M10.5.0/3").expect("valid");
    for (written, expected) in [
        ("window: 60s, kind: fixed", quota),
        ("window: 60s, kind: sliding", quota.sliding()),
        (
            "window: 60s, kind: { sliding: { parts: 6 } }",
            quota.of_kind(WindowKind::Sliding { parts: 6 }).expect("fits"),
        ),
        ("window: 60s, kind: { bucket: { burst: 50 } }", quota.bucket(50)),
        ("window: 60s, kind: bucket, burst: 50", quota.bucket(50)),
        ("kind: day", Quota::tokens(100).per_day(Zone::UTC)),
        ("window: 1d, kind: { day: { time_zone: Europe/Berlin } }", Quota::tokens(100).per_day(berlin)),
        ("kind: day, time_zone: Europe/Berlin, at_once: true", Quota::tokens(100).per_day(berlin).at_once()),
    ] {
        let config = read(&one_deployment("").replace("window: 60s", written)).expect(written);
        assert_eq!(config.deployments[0].quotas, [expected], "{written}");
    }
}

#[test]
fn a_bucket_has_no_sum() {
    let text = one_deployment("    mode: { sum: { margin: auto } }\n")
        .replace("window: 60s", "window: 60s, kind: { bucket: { burst: 100 } }");
    let told = problems(&text);
    assert!(told.contains("deployments[0].mode: `sum` keeps no rights over"), "{told}");
}

#[test]
fn deployments_that_share_a_limit_share_its_mode() {
    let one = |id: &str, mode: &str| {
        format!(
            "  - {{ id: {id}, model: m, upstream: 'http://h/v1', limit_id: s, mode: {mode}, limits: [{{ unit: tokens, amount: 5, window: 1s }}] }}\n"
        )
    };
    let elastic = "{ elastic: { beta: 0.1 } }";
    assert!(read(&format!("deployments:\n{}{}", one("a", elastic), one("b", elastic))).is_ok());
    let told = problems(&format!("deployments:\n{}{}", one("a", elastic), one("b", "strict")));
    assert!(told.contains("deployments[1].mode: shares the limit `s` with deployment `a`"), "{told}");
    assert!(told.contains("elastic with beta 0.1"), "{told}");
}

#[test]
fn a_kind_that_does_not_fit_is_told_where_and_why() {
    for (written, field, why) in [
        ("window: 60s, kind: rolling", "limits[0].kind", "use fixed, sliding"),
        ("window: 60s, kind: { sliding: { parts: 7 } }", "limits[0].kind", "do not divide"),
        ("window: 60s, kind: { sliding: { parts: many } }", "limits[0].kind", "1 to 12"),
        ("window: 60s, kind: sliding, burst: 5", "limits[0].kind", "`burst` is not a setting of sliding windows"),
        ("window: 60s, kind: bucket", "limits[0].kind", "needs its size"),
        ("window: 60s, kind: bucket, burst: 0", "limits[0].kind", "at least 1"),
        ("window: 60s, kind: { bucket: { burst: 1 } }", "limits[0].kind", "3 to"),
        ("window: 60s, kind: day", "limits[0].window", "is 24h long"),
        ("kind: day, time_zone: Middle/Earth", "limits[0].kind", "Middle/Earth"),
        ("kind: { day: { time_zone: Middle/Earth } }", "limits[0].kind", "Middle/Earth"),
        ("kind: fixed", "limits[0].window", "is missing"),
    ] {
        let told = problems(&one_deployment("").replace("window: 60s", written));
        assert!(told.contains(field) && told.contains(why), "{written}: {told}");
        assert_eq!(told.lines().count(), 1, "{written}: {told}");
    }
}

#[test]
fn a_field_that_is_missing_is_the_one_that_is_named() {
    for (line, field, why) in [
        ("    model: m\n", "q.yaml:2:5: deployments[0].model: is missing", "the name callers use"),
        ("    upstream: http://127.0.0.1:1/v1\n", "q.yaml:2:5: deployments[0].upstream: is missing", "https://"),
        (
            "    limits:\n      - { unit: tokens, amount: 100, window: 60s }\n",
            "q.yaml:2:5: deployments[0].limits: is missing",
            "{ unit: tokens, amount: 100000, window: 60s }",
        ),
        ("unit: tokens, ", "q.yaml:6:9: deployments[0].limits[0].unit: is missing", "tokens, requests"),
        ("amount: 100, ", "q.yaml:6:9: deployments[0].limits[0].amount: is missing", "at least 1"),
        (", window: 60s", "q.yaml:6:9: deployments[0].limits[0].window: is missing", "60s"),
    ] {
        let text = one_deployment("    wait: 20ms\n");
        assert!(text.contains(line), "{line}");
        let told = problems(&text.replace(line, ""));
        assert!(told.starts_with(field) && told.contains(why), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
}

#[test]
fn several_missing_fields_are_told_at_once() {
    let told = problems("deployments:\n  - id: a\n    limits: [{}]\n");
    let fields: Vec<&str> = told.lines().map(|line| line.split(": ").nth(1).unwrap()).collect();
    let (model, upstream) = ("deployments[0].model", "deployments[0].upstream");
    let limit = ["unit", "amount", "window"].map(|field| format!("deployments[0].limits[0].{field}"));
    assert_eq!(fields, [model, upstream, &limit[0], &limit[1], &limit[2]]);
}

#[test]
fn a_field_is_named_with_its_whole_path() {
    let two = format!("{}  - {{ id: b, model: m, upstream: 'http://h/v1', limits: [ {{", one_deployment(""));
    for (text, place) in [
        ("foo: 1\n".to_owned(), "q.yaml:1:1: foo: unknown field"),
        ("proxy: { timeouts: { boddy: 5s } }\n".into(), "q.yaml:1:22: proxy.timeouts.boddy: unknown field"),
        ("proxy:\n  timeouts:\n    body: [5s]\n".into(), "q.yaml:3:11: proxy.timeouts.body: "),
        ("gossip:\n  seeds:\n    - a:1\n    - { b: 1 }\n".into(), "q.yaml:4:7: gossip.seeds[1]: "),
        ("gossip:\n  cluster:\n    name: a\n".into(), "q.yaml:3:5: gossip.cluster: "),
        ("gossip:\n  insecure: maybe\n".into(), "q.yaml:2:13: gossip.insecure: "),
        ("node: pod-a\n".into(), "q.yaml:1:7: node: "),
        ("node: { name: a, name: b }\n".into(), "q.yaml:1:18: node.name: duplicate"),
        (one_deployment("    limit: 5\n"), "q.yaml:7:5: deployments[0].limit: unknown field"),
        (format!("{two} unit: tokens, amount: 5, windows: 1s }}] }}\n"), "deployments[1].limits[0].windows: unknown"),
        (format!("{two} unit: tokens, amount: many, window: 1s }}] }}\n"), "deployments[1].limits[0].amount: "),
    ] {
        let told = problems(&text);
        assert!(told.contains(place), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
    // What is no name may be a secret in the wrong place.
    let told = read("node: { 'sk-secret 1': { a: 1 } }\n").unwrap_err().places();
    assert_eq!(told, "q.yaml:1:9: node");
    assert!(problems("node: {\n").starts_with("q.yaml:"));
}

#[test]
fn a_section_without_lines_has_its_defaults() {
    let usual = format!("{:?}", read(&one_deployment("")).unwrap());
    let emptied = "node:\ngossip:\n  # seeds: [a]\nproxy:\n  tls:\n  timeouts:\n  open:\n  max_body:\nadmin: null\n";
    let text = format!("{emptied}{}", one_deployment("    timeouts:\n    weights: ~\n    mode:\n    order:\n"));
    assert_eq!(format!("{:?}", read(&text).unwrap()), usual);
    let told = problems("deployments:\n");
    assert!(told.contains("deployments: no deployment is listed"), "{told}");
    let told = problems("---\n");
    assert!(told.contains("deployments: no deployment is listed"), "{told}");
}

#[test]
fn duplicate_ids_are_refused() {
    let one = "  - { id: a, model: m, upstream: 'http://h/v1', limits: [{ unit: tokens, amount: 1, window: 1s }] }\n";
    let told = problems(&format!("deployments:\n{one}{one}"));
    assert!(told.contains("deployments[1].id") && told.contains("is taken by the deployment at q.yaml:2:"), "{told}");
}

#[test]
fn a_shared_limit_must_be_the_same_limit() {
    let one = |id: &str, amount: u64| {
        format!(
            "  - {{ id: {id}, model: m, upstream: 'http://h/v1', limit_id: shared, limits: [{{ unit: tokens, amount: {amount}, window: 1s }}] }}\n"
        )
    };
    assert!(read(&format!("deployments:\n{}{}", one("a", 5), one("b", 5))).is_ok());
    let told = problems(&format!("deployments:\n{}{}", one("a", 5), one("b", 6)));
    assert!(told.contains("deployments[1].limits") && told.contains("shares the limit `shared`"), "{told}");
}

#[test]
fn two_limits_of_one_unit_and_window_are_refused() {
    let told = problems(&one_deployment("      - { unit: tokens, amount: 5, window: 60s }\n"));
    assert!(told.contains("limits[1]") && told.contains("already named"), "{told}");
}

#[test]
fn a_static_list_must_be_whole() {
    let gossip = |rest: &str| format!("gossip: {{ insecure: true, {rest} }}\n{}", one_deployment(""));
    let told = problems(&gossip("seeds: ['127.0.0.1:7946']"));
    assert!(told.contains("gossip.seeds") && told.contains("gossip.advertise"), "{told}");
    let told = problems(&gossip("seeds: ['127.0.0.1:7946'], advertise: '127.0.0.1:7947'"));
    assert!(told.contains("is not in it"), "{told}");
    let told = problems(&gossip("seeds: ['127.0.0.1:7946'], advertise: '127.0.0.1:7946', listen: '127.0.0.1:0'"));
    assert!(told.contains("not 0"), "{told}");
    let told = problems(&gossip("seeds: ['127.0.0.1:7946', 'headless:7946']"));
    assert!(told.contains("gossip.seeds") && told.contains("headless"), "{told}");
    let told = problems(&gossip("seeds: ['nonsense']"));
    assert!(told.contains("gossip.seeds[0]") && told.contains("not host:port"), "{told}");
}

#[test]
fn gossip_without_a_key_stays_on_loopback() {
    let told = problems(&format!("gossip: {{ seeds: ['headless:7946'] }}\n{}", one_deployment("")));
    assert!(told.contains("gossip.key_file") && told.contains("insecure"), "{told}");
    let loopback = format!("gossip: {{ seeds: ['headless:7946'], listen: '127.0.0.1:0' }}\n{}", one_deployment(""));
    assert!(read(&loopback).is_ok());
}

#[test]
fn an_open_door_must_be_meant() {
    let told = problems(&format!("proxy: {{ listen: '0.0.0.0:4000' }}\n{}", one_deployment("")));
    assert!(told.contains("proxy.listen") && told.contains("proxy.open: true"), "{told}");
    assert!(read(&format!("proxy: {{ listen: '0.0.0.0:4000', open: true }}\n{}", one_deployment(""))).is_ok());
}

#[test]
fn an_unreadable_key_file_is_the_machines_fault() {
    let text = format!("gossip: {{ key_file: /nonexistent/key }}\n{}", one_deployment(""));
    let error = read(&text).unwrap_err();
    assert_eq!(error.exit_code(), 69);
    assert!(error.to_string().contains("gossip.key_file: /nonexistent/key cannot be read"), "{error}");
}

#[test]
fn a_key_file_that_is_no_text_is_a_bad_file() {
    let path = std::env::temp_dir().join(format!("quotum-key-{}", std::process::id()));
    std::fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    let text = format!("gossip: {{ key_file: {} }}\n{}", path.display(), one_deployment(""));
    let error = read(&text).unwrap_err();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(error.exit_code(), 64, "{error}");
    let told = format!("gossip.key_file: {} is not text in UTF-8", path.display());
    assert!(error.to_string().contains(&told), "{error}");
}

#[test]
fn a_missing_variable_is_named() {
    let told = problems(&one_deployment("    api_key: os.environ/NO_SUCH_KEY\n"));
    assert!(told.contains("deployments[0].api_key") && told.contains("NO_SUCH_KEY"), "{told}");
}

#[test]
fn no_problem_shows_a_secret() {
    let told = problems(
        &one_deployment("    api_key: sk-secret\n    wait: soon\n").replace("http://", "http://user:sk-pass@"),
    );
    assert!(!told.contains("sk-secret") && !told.contains("sk-pass"), "{told}");
}

#[test]
fn an_id_is_derived_from_the_base_without_its_query() {
    let with = |query: &str| {
        let text = one_deployment("")
            .replace("    model: m\n", "")
            .replace("id: a", "model: m")
            .replace("/v1", &format!("/v1{query}"));
        read(&text).unwrap().deployments[0].id.clone()
    };
    assert_eq!(with(""), with("?api-version=5&sig=secret"));
    assert!(with("").starts_with("m-"));
}

#[test]
fn an_edge_over_a_quarter_of_the_window_is_refused() {
    let told = problems(&one_deployment("    edge: 500ms\n").replace("window: 60s", "window: 1s"));
    assert!(told.contains("deployments[0].edge") && told.contains("250ms"), "{told}");
}

#[test]
fn a_weight_or_an_order_that_cannot_be_is_refused() {
    for wrong in ["weight: -1", "order: -1", "weight: 1000001", "order: 99999999999"] {
        let told = problems(&one_deployment(&format!("    {wrong}\n")));
        assert!(told.contains("q.yaml:7:") && told.contains("must lie between 0 and 1000000"), "{told}");
    }
}

#[test]
fn a_pod_that_is_told_its_ip_alone_adds_its_own_port() {
    for (ip, listen, expected) in [
        ("10.0.0.7", "", "10.0.0.7:7946"),
        ("fd00::7", "", "[fd00::7]:7946"),
        ("fd00::7", "listen: '[::]:8000'", "[fd00::7]:8000"),
        ("10.0.0.7:9", "", "10.0.0.7:9"),
    ] {
        let env = |name: &str| (name == "QUOTUM_GOSSIP_ADVERTISE").then(|| ip.to_owned());
        let text = format!("gossip: {{ insecure: true, {listen} }}\n{}", one_deployment(""));
        let config = parse(&text, "q.yaml", &env, &Flags::default()).unwrap();
        assert_eq!(config.gossip.advertise, Some(expected.parse().unwrap()), "{ip}");
    }
    for wrong in ["10.0.0", "0.0.0.0", "::", "pod-a"] {
        let env = |name: &str| (name == "QUOTUM_GOSSIP_ADVERTISE").then(|| wrong.to_owned());
        let told = parse(&one_deployment(""), "q.yaml", &env, &Flags::default()).unwrap_err().to_string();
        assert!(told.contains("QUOTUM_GOSSIP_ADVERTISE") && told.contains("IP and"), "{told}");
    }
}

#[test]
fn how_long_ending_may_take_is_set_by_file_and_environment() {
    let config = read(&one_deployment("")).unwrap();
    assert_eq!((config.proxy.linger, config.proxy.drain), (Duration::ZERO, None));
    let text = format!("proxy: {{ linger: 5s, drain: 10s }}\n{}", one_deployment(""));
    let env = |name: &str| (name == "QUOTUM_DRAIN").then(|| "2m".to_owned());
    let config = parse(&text, "q.yaml", &env, &Flags::default()).unwrap();
    assert_eq!((config.proxy.linger, config.proxy.drain), (Duration::from_secs(5), Some(Duration::from_secs(120))));
    let told = problems(&format!("proxy: {{ linger: 2h, drain: 1ms }}\n{}", one_deployment("")));
    assert!(told.contains("proxy.linger: `2h` is out of range"), "{told}");
    assert!(told.contains("proxy.drain: `1ms` is out of range"), "{told}");
}

#[test]
fn whatever_stands_in_a_file_is_understood_or_refused_with_a_place() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/config");
    let mut paths: Vec<_> = std::fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 10);
    for path in paths {
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        // The whole of it, and beginnings of it: a file that is being written.
        for end in (0..=text.len()).rev().step_by(11).filter(|end| text.is_char_boundary(*end)) {
            match read(&text[..end]) {
                Ok(config) => assert!(!config.deployments.is_empty(), "{}", path.display()),
                Err(error) => assert!(error.problems.iter().all(|problem| !problem.place.is_empty())),
            }
        }
    }
}

#[test]
fn the_api_server_is_asked_beside_a_headless_name_and_inside_kubernetes_only() {
    let name = "gossip: { insecure: true, seeds: ['quotum-headless:7946'], pods: 'app=quotum' }\n";
    let inside = |name: &str| match name {
        "KUBERNETES_SERVICE_HOST" => Some("10.96.0.1".to_owned()),
        "KUBERNETES_SERVICE_PORT" => Some("443".to_owned()),
        "QUOTUM_NAMESPACE" => Some("prod".to_owned()),
        _ => None,
    };
    let read = |text: &str| parse(&format!("{text}{}", one_deployment("")), "q.yaml", &inside, &Flags::default());
    let pods = read(name).unwrap().gossip.pods.unwrap();
    assert_eq!((pods.api.as_str(), pods.namespace.as_str()), ("https://10.96.0.1:443", "prod"));
    for (from, to, told) in [
        ("seeds: ['quotum-headless:7946'], ", "", "beside a headless name"),
        ("app=quotum", "quotum", "`quotum` is no label selector"),
        ("app=quotum", "app=quotum, b=c", "is no label selector"),
    ] {
        let problems = read(&name.replace(from, to)).unwrap_err().to_string();
        assert!(problems.contains("gossip.pods") && problems.contains(told), "{problems}");
    }
    let outside = problems(&format!("{name}{}", one_deployment("")));
    assert!(outside.contains("KUBERNETES_SERVICE_HOST"), "{outside}");
}

/// Returns what `quotum check-config --offline` says of a text: remarks, or problems.
fn by_itself(text: &str) -> Result<Vec<String>, String> {
    let path = std::env::temp_dir().join(format!("quotum-offline-{}-{:x}", std::process::id(), text.as_ptr() as usize));
    std::fs::write(&path, text).unwrap();
    let checked = check_offline(&path);
    std::fs::remove_file(&path).unwrap();
    let name = format!("{}:", path.display());
    let short = |said: String| said.replace(&name, "q.yaml:");
    checked.map(|checked| checked.remarks.into_iter().map(short).collect()).map_err(|error| short(error.to_string()))
}

#[test]
fn a_file_is_checked_away_from_its_pod_without_variables_and_files() {
    let text = format!(
        "gossip: {{ seeds: ['quotum-headless:7946'], pods: 'app=quotum', key_file: /none/key }}\n\
         proxy: {{ listen: '[::]:4000', credentials_file: /none/credentials, upstream_ca: /none/ca, \
         tls: {{ certificate: /none/crt, key: /none/tls.key }} }}\n\
         litellm_config: /none/litellm.yaml\n{}",
        one_deployment("    api_key: os.environ/NO_SUCH_KEY\n")
    );
    assert_eq!(read(&text).unwrap_err().exit_code(), 64);
    let remarks = by_itself(&text).unwrap();
    assert_eq!(remarks.len(), 1);
    for unseen in [
        "q.yaml: not looked at: ",
        "gossip.key_file (/none/key)",
        "proxy.credentials_file (/none/credentials)",
        "proxy.upstream_ca (/none/ca)",
        "proxy.tls.certificate (/none/crt)",
        "proxy.tls.key (/none/tls.key)",
        "litellm_config (/none/litellm.yaml)",
        "deployments[0].api_key (os.environ/NO_SUCH_KEY)",
    ] {
        assert!(remarks[0].contains(unseen), "{unseen}: {}", remarks[0]);
    }
    // What the pod's environment adds is not missed: its own address, the key file, the seeds.
    for gossip in ["seeds: ['10.0.0.1:7946', '10.0.0.2:7946']", "seeds: ['a:7946']", "pods: 'app=quotum'"] {
        assert_eq!(by_itself(&format!("gossip: {{ {gossip} }}\n{}", one_deployment(""))), Ok(Vec::new()), "{gossip}");
    }
    assert_eq!(by_itself("proxy: { listen: '[::]:4000' }\nlitellm_config: /none/l.yaml\n").unwrap().len(), 1);
}

#[test]
fn what_is_wrong_wherever_it_is_served_is_wrong_away_from_its_pod() {
    for (text, told) in [
        (
            "gossip: { pods: 'app=quotum', seeds: ['10.0.0.1:7946'] }\n".to_owned(),
            "gossip.pods: the API server is asked",
        ),
        ("gossip: { advertise: '10.0.0.3:1', seeds: ['10.0.0.1:7946'] }\n".into(), "is not in it"),
        ("proxy: { listen: '[::]:4000' }\n".into(), "proxy.listen: others can reach this address"),
        ("proxy: { tls: { key: /none/key } }\n".into(), "proxy.tls: needs both files"),
        ("gossip: { interval: soon, key_file: /none/key }\n".into(), "gossip.interval: `soon` is not a duration"),
    ] {
        let problems = by_itself(&format!("{text}{}", one_deployment(""))).unwrap_err();
        assert!(problems.contains(told), "{problems}");
        assert_eq!(problems.lines().count(), 1, "{problems}");
    }
    let litellm = "model_list:\n  - model_name: m\n    litellm_params: { model: os.environ/M, api_base: os.environ/BASE, \
                   api_key: os.environ/KEY, rpm: os.environ/RPM }\n    model_info: { id: os.environ/ID }\n\
                   general_settings: { master_key: os.environ/MASTER }\n";
    let remarks = by_itself(litellm).unwrap();
    assert!(remarks[0].contains("model_list[0].litellm_params.rpm (os.environ/RPM)"), "{remarks:?}");
    assert!(by_itself(&litellm.replace("os.environ/RPM", "many")).unwrap_err().contains("`many` is not a number"));
}

#[test]
fn every_flag_wins_over_its_variable_and_every_variable_over_the_file() {
    type Set = fn(&mut Flags, Option<String>);
    // No name, no address, no seed, and no file that could be read.
    const WRONG: &str = "/none/\u{1}";
    let flags: [(Set, &str, &str, &str); 8] = [
        (|flags, text| flags.node = text, "QUOTUM_NODE", "--node", "node.name"),
        (|flags, text| flags.cluster = text, "QUOTUM_CLUSTER", "--cluster", "gossip.cluster"),
        (|flags, text| flags.gossip_listen = text, "QUOTUM_GOSSIP_LISTEN", "--gossip-listen", "gossip.listen"),
        (
            |flags, text| flags.gossip_advertise = text,
            "QUOTUM_GOSSIP_ADVERTISE",
            "--gossip-advertise",
            "gossip.advertise",
        ),
        (|flags, text| flags.seeds = text, "QUOTUM_SEEDS", "--seeds", "gossip.seeds[0]"),
        (|flags, text| flags.gossip_key_file = text, "QUOTUM_GOSSIP_KEY_FILE", "--gossip-key-file", "gossip.key_file"),
        (|flags, text| flags.admin_listen = text, "QUOTUM_ADMIN_LISTEN", "--admin-listen", "admin.listen"),
        (|flags, text| flags.proxy_listen = text, "QUOTUM_PROXY_LISTEN", "--proxy-listen", "proxy.listen"),
    ];
    for (set, variable, flag, field) in flags {
        let (section, name) = field.split_once('.').unwrap();
        let written = if name.starts_with("seeds") { "seeds: [\"/none/\\x01\"]" } else { "\"/none/\\x01\"" };
        let written = if name.starts_with("seeds") { written.to_owned() } else { format!("{name}: {written}") };
        let text = format!("{section}: {{ {written} }}\n{}", one_deployment(""));
        let told = |has_flag: bool, in_env: &'static str| {
            let mut flags = Flags::default();
            set(&mut flags, has_flag.then(|| WRONG.to_owned()));
            let env = |name: &str| (name == variable && !in_env.is_empty()).then(|| in_env.to_owned());
            parse(&text, "q.yaml", &env, &flags).unwrap_err().to_string()
        };
        assert!(told(true, WRONG).starts_with(&format!("flag: {flag}: ")), "{}", told(true, WRONG));
        assert!(told(false, WRONG).starts_with(&format!("environment: {variable}: ")), "{}", told(false, WRONG));
        let by_file = told(false, "");
        assert!(by_file.starts_with("q.yaml:1:") && by_file.contains(field), "{by_file}");
    }
}
