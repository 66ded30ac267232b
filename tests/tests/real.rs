//! Published checkpoints in a running cluster, compared with transformers. `tests/real/` has the scripts that download them and that
//! wrote the expected values.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use overfill_tests::completion::post;
use overfill_tests::golden::{EXACT, Step, Tolerance, check_within};
use overfill_tests::python::run_script;
use overfill_tests::{Cluster, Request, Router as _};
use serde::Deserialize;
use serde_json::{Value, json};

/// Content of an expected file.
#[derive(Deserialize)]
struct Expected {
    cases: Vec<Case>,
    chat: Option<Chat>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    prompt: Vec<u32>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Value,
    prompt_tokens: u64,
    /// What transformers answers in `steps` greedy steps.
    text: String,
    steps: u32,
}

/// The downloaded file of a model. `None`, with a message, if the folder of all models is not given.
fn downloaded(model: &str) -> Result<Option<PathBuf>> {
    let Some(folder) = std::env::var_os("OVERFILL_REAL_MODELS") else {
        eprintln!("SKIPPED {model}: OVERFILL_REAL_MODELS is not set (`cargo xtask real` downloads the models)");
        return Ok(None);
    };
    let file = Path::new(&folder).join(format!("{model}.gguf"));
    ensure!(file.is_file(), "{} is missing", file.display());
    Ok(Some(file))
}

fn expected(model: &str) -> Result<Expected> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("real").join(format!("{model}.json"));
    serde_json::from_slice(&fs::read(&file)?).context(file.display().to_string())
}

fn start(file: &Path, dtype: &str) -> Result<Cluster> {
    let full = format!("m={}", file.display());
    Cluster::start(&["--full", &full, "--weights", dtype, "--kv-dtype", dtype, "--kv-pool-tokens", "4096"])
}

/// Compares prompts as token ids, then as text.
fn compare(model: &str, tolerance: Tolerance) -> Result<()> {
    let Some(file) = downloaded(model)? else { return Ok(()) };
    let Expected { cases, chat } = expected(model)?;
    ensure!(!cases.is_empty(), "no cases");
    let cluster = start(&file, "f32")?;
    for Case { text, prompt, steps } in &cases {
        let ask = |request: Request| {
            let request = request.with("logprobs", json!(5)).with("return_tokens_as_token_ids", json!(true));
            request.send(&cluster)
        };
        let count = steps.len() as u32;
        let of_ids = ask(Request::tokens(prompt, count))?;
        check_within(tolerance, steps, &of_ids).with_context(|| format!("{text:?}"))?;
        ask(Request::text(text, count))?.check_same(&of_ids).with_context(|| format!("{text:?} as text"))?;
        let body = post(&cluster, "/v1/completions", &Request::text(text, 1).0)?;
        let found = body["usage"]["prompt_tokens"].as_u64();
        ensure!(found == Some(prompt.len() as u64), "{text:?} has {found:?} tokens, not {}", prompt.len());
    }
    if let Some(Chat { messages, prompt_tokens, text, steps }) = chat {
        let body = json!({"messages": messages, "temperature": 0, "max_tokens": steps, "ignore_eos": true,
                          "skip_special_tokens": false});
        let answer = post(&cluster, "/v1/chat/completions", &body)?;
        let found = (answer["choices"][0]["message"]["content"].as_str(), answer["usage"]["prompt_tokens"].as_u64());
        ensure!(found == (Some(text.as_str()), Some(prompt_tokens)), "{found:?}, not {text:?} after {prompt_tokens}");
    }
    cluster.wait_idle()?;
    cluster.check_undisturbed()?;
    let end = cluster.end()?;
    ensure!(end.status.success(), "the cluster ended with {}\n{}", end.status, end.stderr);
    Ok(())
}

#[test]
fn smollm2_gives_the_log_probabilities_of_transformers() -> Result<()> {
    compare("smollm2", EXACT)
}

#[test]
fn lm_evaluation_harness_gives_the_log_likelihoods_of_transformers() -> Result<()> {
    let Some(file) = downloaded("smollm2")? else { return Ok(()) };
    let cluster = start(&file, "f32")?;
    let (url, expected) = (format!("{}/v1", cluster.http()), concat!(env!("CARGO_MANIFEST_DIR"), "/real/smollm2.json"));
    let variables = [("OVERFILL_URL", url.as_str()), ("OVERFILL_MODEL", "m"), ("OVERFILL_EXPECTED", expected)];
    run_script("clients/test_lm_eval_real.py", &variables)?;
    cluster.wait_idle()
}

#[test]
fn smollm2_knows_the_capital_of_france() -> Result<()> {
    let Some(file) = downloaded("smollm2")? else { return Ok(()) };
    // As a user would ask: default formats, sampling defaults of the model, and its end token.
    let cluster = Cluster::start(&["--full", &format!("smollm2={}", file.display())])?;
    let messages = json!([{"role": "user", "content": "What is the capital of France?"}]);
    let body = json!({"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": 40});
    let answer = post(&cluster, "/v1/chat/completions", &body)?;
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().context("no content")?;
    ensure!(text.contains("Paris") && choice["finish_reason"] == "stop", "{choice}");
    Ok(())
}

#[test]
fn gemma3_gives_the_log_probabilities_of_transformers() -> Result<()> {
    compare("gemma3", EXACT)
}
