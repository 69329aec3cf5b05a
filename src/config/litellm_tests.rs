//! LiteLLM's files as people write them, and what becomes of each line.

use super::super::{Config, ConfigError, Flags, parse};
use super::*;

fn env(name: &str) -> Option<String> {
    let known = [("OPENAI_API_KEY", "sk-openai"), ("AZURE_KEY", "sk-azure"), ("MASTER", "sk-master")];
    known.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
}

fn read(text: &str) -> Result<Config, ConfigError> {
    parse(text, "litellm.yaml", &env, &Flags::default())
}

fn problems(text: &str) -> String {
    read(text).expect_err("the text is wrong").to_string()
}

/// One entry with these parameters.
fn one(params: &str) -> String {
    format!("model_list:\n  - model_name: m\n    litellm_params:\n      model: openai/gpt\n{params}")
}

fn units(deployment: &Deployment) -> Vec<(Unit, u64)> {
    deployment.quotas.iter().map(|quota| (quota.unit(), quota.amount())).collect()
}

/// A gateway of a middling company: two regions, a fallback, embeddings, and what else stands
/// in such a file.
const GATEWAY: &str = r#"
model_list:
  - model_name: chat-large
    litellm_params:
      model: azure/chat-large-eastus
      api_base: https://eastus.example.invalid/
      api_version: "2025-01-01-preview"
      api_key: os.environ/AZURE_KEY
      rpm: 480
      tpm: 80_000
      timeout: 300
      stream_timeout: 60
      order: 1
    model_info:
      id: chat-large-eastus
      base_model: azure/gpt-4o
  - model_name: chat-large
    litellm_params:
      model: openai/gpt-4o
      api_key: os.environ/OPENAI_API_KEY
      tpm: "450000"
      order: 2
      max_retries: 2
  - model_name: claude
    litellm_params:
      model: anthropic/claude-sonnet-4-5
      api_key: sk-ant
    model_info: { itpm: 30000, otpm: 8000 }
  - model_name: embed
    litellm_params: { model: text-embedding-3-small }
    rpm: 3000
  - model_name: local
    litellm_params:
      model: hosted_vllm/meta/llama
      api_base: http://vllm.example.invalid:8000/v1
      rpm: 100
  - model_name: sonnet-bedrock
    litellm_params: { model: bedrock/anthropic.claude, aws_region_name: eu-west-1 }
  - model_name: "openai/*"
    litellm_params: { model: "openai/*" }
litellm_settings:
  drop_params: true
  num_retries: 3
  request_timeout: 600
  callbacks: ["prometheus"]
router_settings:
  routing_strategy: usage-based-routing-v2
  redis_host: os.environ/REDIS_HOST
  model_group_alias: { gpt-4: chat-large }
general_settings:
  master_key: os.environ/MASTER
  database_url: postgresql://user:secret@host/db
"#;

#[test]
fn a_file_as_it_is_becomes_deployments() {
    let config = read(GATEWAY).unwrap();
    let found = |model: &str, upstream_model: Option<&str>, base: &str| {
        let deployments = config.deployments.iter();
        let mut same =
            deployments.filter(|other| other.model == model && other.upstream == base.parse::<Uri>().unwrap());
        let deployment = same.next().unwrap_or_else(|| panic!("{model} at {base}"));
        assert_eq!(deployment.upstream_model.as_deref(), upstream_model);
        deployment.clone()
    };
    let azure = "https://eastus.example.invalid/openai/deployments/chat-large-eastus?api-version=2025-01-01-preview";
    let first = found("chat-large", Some("chat-large-eastus"), azure);
    assert_eq!(first.id, "chat-large-eastus");
    assert_eq!(units(&first), [(Unit::Tokens, 80_000), (Unit::Requests, 480)]);
    assert_eq!(
        (first.order, first.timeouts.first_byte, first.timeouts.idle.as_secs()),
        (1, Duration::from_secs(300), 300)
    );
    assert_eq!(first.api_key.as_ref().map(Secret::reveal), Some("sk-azure"));
    let second = found("chat-large", Some("gpt-4o"), "https://api.openai.com/v1");
    assert_eq!((second.order, units(&second)), (2, vec![(Unit::Tokens, 450_000)]));
    assert_eq!(second.timeouts.first_byte.as_secs(), 600, "litellm_settings.request_timeout");
    let claude = found("claude", Some("claude-sonnet-4-5"), "https://api.anthropic.com/v1");
    assert_eq!(units(&claude), [(Unit::InputTokens, 30_000), (Unit::OutputTokens, 8_000)]);
    let embed = found("embed", Some("text-embedding-3-small"), "https://api.openai.com/v1");
    assert_eq!((units(&embed), embed.order), (vec![(Unit::Requests, 3_000)], u32::MAX));
    assert_eq!(embed.api_key.as_ref().map(Secret::reveal), Some("sk-openai"), "LiteLLM's default variable");
    found("local", Some("meta/llama"), "http://vllm.example.invalid:8000/v1");
    // Under its alias a deployment has the same limits, not further ones.
    let alias = found("gpt-4", Some("chat-large-eastus"), azure);
    assert_eq!(alias.limit_id.as_deref(), Some("chat-large-eastus"));
    assert_eq!(config.deployments.len(), 7);
    assert_eq!(config.proxy.credentials, [Secret::new("sk-master")]);
    // Guarded by the master key, it listens where LiteLLM does.
    assert_eq!(config.proxy.listen, super::super::Listen::Everywhere(4_000));
}

#[test]
fn what_is_not_read_is_said_once_and_without_its_value() {
    let config = read(GATEWAY).unwrap();
    let [skipped, ignored] = &config.remarks[..] else { panic!("{:#?}", config.remarks) };
    assert!(skipped.starts_with("litellm.yaml: models that are not served: model_list[5] ("), "{skipped}");
    assert!(skipped.contains("the API of bedrock is not spoken here"), "{skipped}");
    assert!(skipped.contains("`openai/*` is a wildcard"), "{skipped}");
    for name in [
        "litellm_params.stream_timeout",
        "litellm_params.max_retries",
        "litellm_settings.num_retries",
        "litellm_settings.callbacks",
        "router_settings.routing_strategy",
        "router_settings.redis_host",
        "general_settings.database_url",
    ] {
        assert_eq!(ignored.matches(name).count(), 1, "{name} in {ignored}");
    }
    for read in ["tpm", "api_base", "master_key", "model_group_alias", "request_timeout", "secret", "sk-"] {
        assert!(!ignored.contains(read), "{read} in {ignored}");
    }
}

/// As the quick start of LiteLLM's documentation goes: one line a model, nothing else.
#[test]
fn a_file_without_limits_is_served_without_limits_and_says_so() {
    let text = "model_list:\n  - model_name: small\n    litellm_params:\n      model: gpt-4o-mini\n  - {model_name: fake, litellm_params: {model: openai/fake, api_key: k, api_base: http://h.invalid/}}\n";
    let config = read(text).unwrap();
    assert_eq!(config.deployments[1].upstream, "http://h.invalid".parse::<Uri>().unwrap());
    assert!(config.deployments.iter().all(|deployment| deployment.quotas == [no_limit()]));
    assert_eq!(config.remarks, ["litellm.yaml: models without a limit (name tpm or rpm): small, fake"]);
}

#[test]
fn limits_are_believed_in_litellms_order() {
    let text = "model_list:\n  - model_name: m\n    tpm: 3\n    litellm_params: { model: openai/gpt, tpm: 2, rpm: 5 }\n    model_info: { tpm: 1, rpm: 4, itpm: 6 }\n";
    let config = read(text).unwrap();
    assert_eq!(units(&config.deployments[0]), [(Unit::Tokens, 3), (Unit::Requests, 5), (Unit::InputTokens, 6)]);
    let defaults = format!("{}router_settings: {{ default_litellm_params: {{ rpm: 9, timeout: 5 }} }}\n", one(""));
    let config = read(&defaults).unwrap();
    assert_eq!(units(&config.deployments[0]), [(Unit::Requests, 9)]);
    assert_eq!(config.deployments[0].timeouts.first_byte.as_secs(), 5);
}

#[test]
fn weights_may_be_fractions_and_those_without_are_asked_last() {
    let entry =
        |weight: &str| format!("  - model_name: m\n    litellm_params: {{ model: openai/gpt, rpm: 5, {weight} }}\n");
    let text = format!("model_list:\n{}{}{}", entry("weight: 0.9"), entry("weight: 0.1"), entry(""));
    let weights = |text: &str| -> Vec<u32> {
        read(text).unwrap().deployments.iter().map(|deployment| deployment.weight).collect()
    };
    assert_eq!(weights(&text), [900, 100, 0]);
    // Without any, the limits weigh, as LiteLLM's own rpm and tpm do.
    let entry = |rpm: u32| format!("  - model_name: m\n    litellm_params: {{ model: openai/gpt, rpm: {rpm} }}\n");
    assert_eq!(weights(&format!("model_list:\n{}{}", entry(900), entry(300))), [100, 33]);
}

#[test]
fn an_id_holds_no_secret_and_is_nobody_elses() {
    let entry = |key: &str| {
        format!(
            "  - model_name: m\n    litellm_params: {{ model: openai/gpt, api_key: {key}, api_base: 'https://h.invalid/v1?sig={key}' }}\n"
        )
    };
    let ids = |text: String| -> Vec<String> {
        read(&text).unwrap().deployments.iter().map(|deployment| deployment.id.clone()).collect()
    };
    let both = ids(format!("model_list:\n{}{}", entry("k1"), entry("k2")));
    assert_eq!(both, [both[0].clone(), format!("{}-2", both[0])]);
    assert_eq!(ids(format!("model_list:\n{}", entry("k3"))), both[..1]);
    let named = "  - { model_name: m, litellm_params: { model: gpt-4 }, model_info: { id: 7 } }\n";
    let told = problems(&format!("model_list:\n{named}{named}"));
    assert!(told.contains("litellm.yaml:3:") && told.contains("model_list[1].model_info.id: `7` is taken"), "{told}");
}

#[test]
fn a_timeout_of_streams_alone_is_named_with_its_reason() {
    let text =
        format!("{}router_settings: {{ stream_timeout: 20 }}\n", one("      timeout: 300\n      stream_timeout: 30\n"));
    let config = read(&text).unwrap();
    // A whole answer may take as long as it did there.
    let Timeouts { first_byte, idle, .. } = config.deployments[0].timeouts;
    assert_eq!((first_byte, idle), (Duration::from_secs(300), Duration::from_secs(300)));
    for place in ["litellm_params", "router_settings"] {
        let named =
            format!("{place}.stream_timeout (a timeout holds for whole answers and streams alike; use timeout)");
        assert!(config.remarks.iter().any(|remark| remark.contains(&named)), "{:?}", config.remarks);
    }
}

#[test]
fn variables_come_from_the_file_first() {
    let text = format!("{}environment_variables:\n  KEY: sk-file\n", one("      api_key: os.environ/KEY\n"));
    assert_eq!(read(&text).unwrap().deployments[0].api_key.as_ref().map(Secret::reveal), Some("sk-file"));
    let told = problems(&one("      api_key: os.environ/NO_SUCH_KEY\n"));
    assert!(
        told.contains(
            "litellm.yaml:5:16: model_list[0].litellm_params.api_key: the environment variable NO_SUCH_KEY is not set"
        ),
        "{told}"
    );
}

#[test]
fn what_is_wrong_is_named_with_its_line_and_field() {
    for (text, told) in [
        (
            one("      rpm: many\n"),
            "litellm.yaml:5:12: model_list[0].litellm_params.rpm: `many` is not a number between 1",
        ),
        (one("      tpm: 0\n"), "model_list[0].litellm_params.tpm: `0` is not a number"),
        (one("      tpm: [1]\n"), "model_list[0].litellm_params.tpm: is not a text"),
        (one("      timeout: -5\n"), "model_list[0].litellm_params.timeout: `-5` is not a number"),
        (one("      weight: heavy\n"), "model_list[0].litellm_params.weight"),
        (one("      api_base: nonsense\n"), "model_list[0].litellm_params.api_base: not the base of an API"),
        (one("      api_base: https://user:sk-pass@h.invalid\n"), "must not carry a user or password"),
        (one("    model_info: { id: [] }\n"), "model_list[0].model_info.id"),
        ("model_list:\n  - litellm_params: { model: gpt-4 }\n".into(), "model_list[0].model_name: is missing"),
        ("model_list:\n  - model_name: m\n".into(), "model_list[0].litellm_params.model: is missing"),
        ("model_list: []\n".into(), "model_list: no model is listed"),
        (
            "include: [a.yaml]\nmodel_list:\n  - { model_name: m, litellm_params: { model: gpt-4 } }\n".into(),
            "include: included files are not read",
        ),
        (
            "model_list:\n  - { model_name: m, litellm_params: { model: vertex_ai/gemini } }\n".into(),
            "no entry can be served: model_list[0] (`vertex_ai/gemini`: the API of vertex_ai is not spoken here)",
        ),
        (
            "model_list:\n  - { model_name: m, litellm_params: { model: groq/llama } }\n".into(),
            "names no api_base; write the one of groq's OpenAI API",
        ),
        (
            "model_list:\n  - { model_name: m, litellm_params: { model: azure/x, api_base: 'https://h.invalid' } }\n"
                .into(),
            "names no api_version",
        ),
        ("model_list:\n  - { model_name: m, litellm_params: { model: llama } }\n".into(), "names no provider"),
        ("model_list: {\n".into(), "litellm.yaml:"),
    ] {
        let error = read(&text).expect_err(&text);
        assert_eq!(error.exit_code(), 64);
        let error = error.to_string();
        assert!(error.contains(told) && !error.contains("sk-pass"), "{text}: {error}");
    }
}

#[test]
fn our_own_file_may_name_it_and_list_more() {
    let path = std::env::temp_dir().join(format!("quotum-litellm-{}.yaml", std::process::id()));
    std::fs::write(&path, one("      rpm: 5\n    model_info: { id: theirs }\n")).unwrap();
    let own = |id: &str| {
        let limits = "limits: [{ unit: tokens, amount: 5, window: 60s }]";
        let deployment = format!("{{ id: {id}, model: m, upstream: 'http://h.invalid/v1', {limits} }}");
        format!("litellm_config: {}\ndeployments: [{deployment}]\n", path.display())
    };
    let config = read(&own("ours")).unwrap();
    let told = problems(&own("theirs"));
    let broken = one("      rpm: many\n");
    std::fs::write(&path, broken).unwrap();
    let inside = problems(&own("ours"));
    std::fs::remove_file(&path).unwrap();
    let gone = read(&own("ours")).unwrap_err();
    let ids: Vec<&str> = config.deployments.iter().map(|deployment| deployment.id.as_str()).collect();
    assert_eq!(ids, ["ours", "theirs"]);
    assert!(told.contains("litellm.yaml:1:17: litellm_config: its deployment `theirs` is listed here, too"), "{told}");
    assert!(inside.starts_with(&format!("{}:5:12: model_list[0].litellm_params.rpm", path.display())), "{inside}");
    assert!(gone.to_string().contains("cannot be read") && gone.exit_code() == 69, "{gone}");
}
