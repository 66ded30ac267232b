//! Requests that can't be served. Each error names the limit and the value, and no resources are allocated.

use anyhow::{Context, Result, ensure};
use overfill_tests::completion::post_raw;
use overfill_tests::{Cluster, Golden, Request};
use serde_json::{Value, json};

fn completion(field: &str, value: Value) -> Vec<u8> {
    Request::tokens(&[7, 8], 4).with("model", json!("small")).with(field, value).0.to_string().into_bytes()
}

fn chat(messages: Value) -> Vec<u8> {
    json!({"model": "small", "messages": messages, "max_tokens": 4}).to_string().into_bytes()
}

#[test]
fn every_bad_request_is_refused_with_its_reason() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args("llama-tied"))?;
    let (text, chats) = ("/v1/completions", "/v1/chat/completions");
    let too_long: Vec<u32> = vec![7; 5000];
    let many = Request::tokens(&[], 4).with("prompt", json!(vec![[1]; 200_000])).with("n", json!(128));
    let many = many.with("model", json!("small")).0.to_string().into_bytes();
    // Path, body, expected status, expected part of the message.
    let table: Vec<(&str, Vec<u8>, u16, &str)> = vec![
        (text, b"{\"model\": ".to_vec(), 400, ""),
        (text, b"[]".to_vec(), 400, ""),
        (text, br#"{"model": "small"}"#.to_vec(), 400, "prompt"),
        (text, completion("model", json!("nobody")), 404, "nobody"),
        (text, completion("prompt", json!([])), 400, "prompt"),
        (text, completion("prompt", json!([7, 320])), 400, "320"),
        (text, completion("prompt", json!([-1])), 400, ""),
        (text, completion("prompt", json!({"a": 1})), 400, ""),
        (text, completion("prompt", json!(too_long)), 400, "5000"),
        (text, completion("max_tokens", json!(-1)), 400, ""),
        (text, completion("max_tokens", json!("many")), 400, ""),
        (text, completion("max_tokens", json!(4000)), 400, "4000"),
        (text, completion("temperature", json!(-0.5)), 400, "temperature"),
        (text, completion("temperature", json!(1000)), 400, "temperature"),
        (text, completion("top_p", json!(0)), 400, "top_p"),
        (text, completion("top_p", json!(1.5)), 400, "top_p"),
        (text, completion("min_p", json!(2)), 400, "min_p"),
        (text, completion("presence_penalty", json!(3)), 400, "presence_penalty"),
        (text, completion("frequency_penalty", json!(-3)), 400, "frequency_penalty"),
        (text, completion("repetition_penalty", json!(0)), 400, "repetition_penalty"),
        (text, completion("logit_bias", json!({"9999": 1})), 400, "logit_bias"),
        (text, completion("logit_bias", json!({"7": 1000})), 400, "logit_bias"),
        (text, completion("logprobs", json!(1000)), 400, "logprobs"),
        (text, completion("n", json!(0)), 400, "n"),
        (text, completion("n", json!(100_000)), 400, "n"),
        // Rejected before anything is allocated for the 25 million sequences.
        (text, many, 400, "at most 1280"),
        (text, completion("stop", json!(vec!["x"; 100])), 400, "stop"),
        (chats, chat(json!([])), 400, "messages"),
        (chats, chat(json!([{"content": "no role"}])), 400, "role"),
        (chats, chat(json!("hello")), 400, ""),
        ("/v1/nothing", b"{}".to_vec(), 404, ""),
    ];
    for (path, body, status, needle) in table {
        let shown = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        let (got, answer) = post_raw(&cluster, path, &body)?;
        ensure!(got == status, "{path} {shown}: HTTP {got} instead of {status}: {answer}");
        let answer: Value =
            serde_json::from_str(&answer).with_context(|| format!("{shown}: {answer:?} is not JSON"))?;
        let message =
            answer["error"]["message"].as_str().with_context(|| format!("{shown}: no message in {answer}"))?;
        ensure!(answer["error"]["type"].is_string(), "{shown}: no type in {answer}");
        ensure!(message.contains(needle), "{shown}: {message:?} does not name {needle:?}");
    }
    cluster.wait_idle()?;
    let answer = Request::tokens(&[7, 8], 4).with("model", json!("small")).send(&cluster)?;
    ensure!(answer.tokens.len() == 4, "{answer:?}");
    Ok(())
}
