//! Compares a running cluster with the golden pairs.

use anyhow::{Context, Result, ensure};
use overfill_tests::completion::post;
use overfill_tests::golden::{check, folder};
use overfill_tests::{Cluster, Completion, Golden, Request, gguf};
use serde_json::json;

fn golden_request(prompt: &[u32], steps: usize, model: &str) -> Request {
    Request::tokens(prompt, steps as u32)
        .with("model", json!(model))
        .with("logprobs", json!(5))
        .with("return_tokens_as_token_ids", json!(true))
}

fn run(pair: &str) -> Result<()> {
    run_with(pair, &Golden::up_args(pair))
}

fn run_with(pair: &str, up_args: &[String]) -> Result<()> {
    let golden = Golden::load(pair)?;
    let cluster = Cluster::start(up_args)?;
    for (i, case) in golden.cases.iter().enumerate() {
        for (model, expected) in [("small", &case.two_stage), ("big", &case.full_only)] {
            let request = golden_request(&case.prompt, expected.len(), model);
            let whole = request.send(&cluster)?;
            check(expected, &whole).with_context(|| format!("{pair}, case {i}, {model}"))?;
            let streamed = request.stream(&cluster)?.collect_completion(|| {})?;
            streamed.check_same(&whole).with_context(|| format!("{pair}, case {i}, {model}, streamed"))?;
        }
    }
    text_and_chat(&golden, &cluster).with_context(|| pair.to_owned())?;
    cluster.wait_idle()?;
    cluster.check_undisturbed()?;
    let end = cluster.end()?;
    ensure!(end.status.success(), "{pair}: the cluster ended with {}\n{}", end.status, end.stderr);
    Ok(())
}

/// Checks that text and messages give the same answers as their token ids.
fn text_and_chat(golden: &Golden, cluster: &Cluster) -> Result<()> {
    let by_ids = Request::tokens(&golden.text.ids, 8).with("model", json!("small")).send(cluster)?;
    let request = Request::text(&golden.text.text, 8).with("model", json!("small"));
    let body = post(cluster, "/v1/completions", &request.0)?;
    ensure!(body["usage"]["prompt_tokens"] == golden.text.ids.len(), "text: {body}");
    ensure!(Completion::parse(&body)?.tokens == by_ids.tokens, "text: {body} instead of {by_ids:?}");

    let by_ids = Request::tokens(&golden.chat.ids, 8).with("model", json!("small")).send(cluster)?;
    let request = json!({
        "model": "small", "messages": golden.chat.messages, "max_tokens": 8, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true,
    });
    let body = post(cluster, "/v1/chat/completions", &request)?;
    ensure!(body["usage"]["prompt_tokens"] == golden.chat.ids.len(), "chat: {body}");
    ensure!(body["choices"][0]["token_ids"] == json!(by_ids.tokens), "chat: {body} instead of {by_ids:?}");
    ensure!(body["choices"][0]["message"]["content"] == json!(by_ids.text), "chat: {body} instead of {by_ids:?}");
    Ok(())
}

#[test]
fn llama_tied() -> Result<()> {
    run("llama-tied")
}

#[test]
fn llama_untied() -> Result<()> {
    run("llama-untied")
}

#[test]
fn qwen2() -> Result<()> {
    run("qwen2")
}

#[test]
fn qwen3() -> Result<()> {
    run("qwen3")
}

#[test]
fn llama_depth() -> Result<()> {
    run("llama-depth")
}

/// Serves both models from GGUF files without any other files.
#[test]
fn llama_untied_from_gguf() -> Result<()> {
    let files = tempfile::tempdir()?;
    let mut args = Golden::up_args("llama-untied");
    for which in ["full", "decode"] {
        let (folder, file) = (folder("llama-untied", which), files.path().join(which).with_extension("gguf"));
        gguf::write_llama(&folder, &file)?;
        let file = file.to_str().context("not UTF-8")?;
        args.iter_mut().for_each(|arg| *arg = arg.replace(&folder, file));
    }
    run_with("llama-untied", &args)
}
