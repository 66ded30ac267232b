//! Python clients, unmodified, with tools and reasoning: models of every format that always give the same answer.

use anyhow::Result;
use clap::{Args as _, FromArgMatches as _};
use overfill_cluster::Shutdown;
use overfill_router::{Args, Config, Router};
use overfill_simulated::{EOS, Options, SimulatedNode, bytes_as_tokens};
use overfill_tests::python::run_script;

const TEMPLATE: &str = "{% for m in messages %}<|turn|>{{ m | tojson }}\n{% endfor %}";
/// `<think>` at the prompt's end opens the reasoning.
const THINKING: &str = "{% for m in messages %}<|turn|>{{ m | tojson }}\n{% endfor %}<|turn|><think>\n";

/// The answer of a model: its name, its template, and what it writes.
fn answers() -> Vec<(&'static str, &'static str, String)> {
    let [first, second] =
        ["K\u{f6}ln", "S\u{e3}o Paulo \\\"centro\\\"\\n"].map(|city| format!("{{\"city\": \"{city}\", \"days\": 2}}"));
    let object = |key: &str, arguments: &str| format!("{{\"name\": \"get_weather\", \"{key}\": {arguments}}}");
    let hermes: String =
        [&first, &second].iter().map(|a| format!("\n<tool_call>\n{}\n</tool_call>", object("arguments", a))).collect();
    let list = format!("[{}, {}]", object("arguments", &first), object("arguments", &second));
    let python = |arguments: &str| {
        arguments.replace("{\"city\": ", "get_weather(city=").replace("\"days\": ", "days=").replace('}', ")")
    };
    vec![
        ("hermes", TEMPLATE, format!("I look.{hermes}")),
        ("llama3_json", TEMPLATE, format!("{}; {}", object("parameters", &first), object("parameters", &second))),
        ("pythonic", TEMPLATE, format!("[{}, {}]", python(&first), python(&second))),
        ("mistral", TEMPLATE, format!("I look.[TOOL_CALLS]{list}")),
        (
            "mistral_named",
            TEMPLATE,
            format!("[TOOL_CALLS]get_weather[ARGS]{first}[TOOL_CALLS]get_weather[ARGS]{second}"),
        ),
        ("qwen3", THINKING, format!("Two cities.\n</think>\n\n{hermes}")),
        ("deepseek_r1", TEMPLATE, format!("<think>\nTwo cities.\n</think>\n\nI look.{hermes}")),
    ]
}

const FLAGS: [&str; 7] = [
    "router",
    "--prefill-url=http://127.0.0.1:1",
    "--decode-url=http://127.0.0.1:1",
    "--tool-call-parser=hermes,llama3_json=llama3_json,pythonic=pythonic",
    "--tool-call-parser=mistral=mistral,mistral_named=mistral",
    "--reasoning-parser=qwen3=qwen3",
    "--reasoning-parser=deepseek_r1=deepseek_r1",
];

/// Runs a script of a Python client against a router with these models.
async fn run(script: &'static str) -> Result<()> {
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for (model, template, answer) in answers() {
        let script = bytes_as_tokens(&answer).into_iter().chain([EOS]).collect();
        let mut options = Options { model: model.into(), script: Some(script), ..Options::default() };
        // Nodes of different full models are not paired.
        options.schema.full_model = Some(model.into());
        options.files.chat_template = Some(template.as_bytes().to_vec());
        prefill.push(SimulatedNode::prefill(options.clone()).await?);
        decode.push(SimulatedNode::decode(options).await?);
    }
    let urls = |nodes: &[SimulatedNode]| nodes.iter().map(|node| node.url.clone()).collect();
    let matches = Args::augment_args(clap::Command::new("router")).get_matches_from(FLAGS);
    let flags = Args::from_arg_matches(&matches)?.validate().map_err(|faults| anyhow::anyhow!("{faults:?}"))?;
    let config = Config { requests: flags.requests, ..Config::local(urls(&prefill), urls(&decode)) };
    let config = Config { served_models: answers().iter().map(|(model, ..)| (*model).to_owned()).collect(), ..config };
    let router = Router::bind(config).await?;
    let url = format!("http://{}/v1", router.http_address());
    let shutdown = Shutdown::new();
    shutdown.spawn("router", router.run(shutdown.clone()));
    tokio::task::spawn_blocking(move || run_script(script, &[("OVERFILL_URL", &url)])).await??;
    shutdown.begin();
    Ok(())
}

#[tokio::test]
async fn the_openai_client_calls_tools() -> Result<()> {
    run("python/test_openai_tools.py").await
}

#[tokio::test]
async fn the_openai_client_uses_the_responses_api() -> Result<()> {
    run("python/test_openai_responses.py").await
}

#[tokio::test]
async fn langchain_calls_tools() -> Result<()> {
    run("clients/test_langchain_tools.py").await
}

#[tokio::test]
async fn the_anthropic_client_works_unmodified() -> Result<()> {
    run("python/test_anthropic_client.py").await
}
