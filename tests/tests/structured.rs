//! Outputs that a request constrains: grammars, allowed tokens, bad words, a minimum length. The models are random, so
//! nothing of what is checked here comes from the model.

use anyhow::{Context, Result, ensure};
use overfill_tests::completion::{post, post_raw};
use overfill_tests::golden::Golden;
use overfill_tests::{Cluster, Completion, Request, Router as _};
use serde_json::{Value, json};

const PAIR: &str = "qwen3";

/// Without white space, with which a random model would fill its answer.
fn schema() -> Value {
    json!({
        "x-guidance": {"whitespace_flexible": false},
        "type": "object", "additionalProperties": false, "required": ["z", "count", "tags"],
        "properties": {
            "z": {"type": "string", "maxLength": 6},
            "count": {"type": "integer", "minimum": 0, "maximum": 9},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        },
    })
}

fn check_object(text: &str) -> Result<()> {
    let value: Value = serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))?;
    let keys: Vec<&String> = value.as_object().context("no object")?.keys().collect();
    ensure!(keys == ["z", "count", "tags"], "{text}");
    ensure!(value["z"].as_str().is_some_and(|z| z.chars().count() <= 6), "{text}");
    ensure!(value["count"].as_u64().is_some_and(|count| count <= 9), "{text}");
    let tags = value["tags"].as_array().context("no tags")?;
    ensure!((1..=2).contains(&tags.len()) && tags.iter().all(|tag| tag == "a" || tag == "b"), "{text}");
    Ok(())
}

/// The text and finish reason of each choice.
fn chat(cluster: &Cluster, fields: &Value) -> Result<Vec<(String, String)>> {
    let mut body = json!({"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 800});
    for (field, value) in fields.as_object().context("fields must be an object")? {
        body[field] = value.clone();
    }
    let answer = post(cluster, "/v1/chat/completions", &body)?;
    let choices = answer["choices"].as_array().context("no choices")?;
    let text = |value: &Value| value.as_str().map(str::to_owned).context("no text");
    choices.iter().map(|choice| Ok((text(&choice["message"]["content"])?, text(&choice["finish_reason"])?))).collect()
}

fn complete(cluster: &Cluster, fields: &[(&str, Value)]) -> Result<Completion> {
    let prompt: Vec<u32> = (10..60).collect();
    let request = Request::tokens(&prompt, 40).with("model", json!("small")).with("ignore_eos", json!(false));
    fields.iter().fold(request, |request, (field, value)| request.with(field, value.clone())).send(cluster)
}

#[test]
fn outputs_match_their_grammars() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args(PAIR))?;
    let json_schema = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema()}});
    for sampled in [json!({"temperature": 0}), json!({"temperature": 1.3, "seed": 5, "n": 6, "logprobs": true})] {
        let with = |field: &str, value: &Value| {
            let mut fields = sampled.clone();
            fields[field] = value.clone();
            chat(&cluster, &fields)
        };
        for (text, reason) in with("response_format", &json_schema)? {
            check_object(&text)?;
            ensure!(reason == "stop", "{text} ends with {reason}");
        }
        for (text, reason) in with("structured_outputs", &json!({"json": schema().to_string()}))? {
            check_object(&text)?;
            ensure!(reason == "stop", "{text} ends with {reason}");
        }
        for (text, reason) in with("guided_choice", &json!(["up", "down\n", "\u{e9}"]))? {
            ensure!(["up", "down\n", "\u{e9}"].contains(&text.as_str()) && reason == "stop", "{text:?}, {reason}");
        }
        for (text, _) in with("guided_regex", &json!("[ab]{5}-[0-9]{3}"))? {
            let parts = text.split_once('-').context("no dash")?;
            ensure!(parts.0.len() == 5 && parts.0.chars().all(|c| c == 'a' || c == 'b'), "{text}");
            ensure!(parts.1.len() == 3 && parts.1.chars().all(|c| c.is_ascii_digit()), "{text}");
        }
        for (text, _) in with("guided_grammar", &json!("start: \"<\" WORD \">\"\nWORD: /[xyz]{4}/"))? {
            ensure!(text.len() == 6 && text.starts_with('<') && text.ends_with('>'), "{text}");
        }
    }
    // The whole of an answer may be one token of the prefill node, and its end the only token of the decode node.
    let one = complete(&cluster, &[("guided_choice", json!(["a"]))])?;
    ensure!(one.text == "a" && one.tokens.len() == 2 && one.finish_reason == "stop", "{one:?}");
    let streamed = Request::text("x", 800).with("model", json!("small")).with("guided_json", schema());
    let whole = streamed.send(&cluster)?;
    let stream = streamed.stream(&cluster)?.collect_completion(|| ())?;
    ensure!(whole.text == stream.text && whole.tokens == stream.tokens, "{stream:?} is not {whole:?}");
    cluster.wait_idle()
}

#[test]
fn all_apis_have_structured_output() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args(PAIR))?;
    let format = json!({"type": "json_schema", "name": "n", "schema": schema()});
    let response = json!({"model": "small", "input": "hello", "text": {"format": format}, "max_output_tokens": 300});
    let answer = post(&cluster, "/v1/responses", &response)?;
    check_object(answer["output"][0]["content"][0]["text"].as_str().context("no text")?)?;
    ensure!(answer["status"] == "completed", "{answer}");
    let message = json!({"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 300,
                         "output_config": {"format": format}});
    let answer = post(&cluster, "/v1/messages", &message)?;
    check_object(answer["content"][0]["text"].as_str().context("no text")?)?;
    ensure!(answer["stop_reason"] == "end_turn", "{answer}");
    cluster.wait_idle()
}

#[test]
fn tokens_are_held_back() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args(PAIR))?;
    let free = complete(&cluster, &[("ignore_eos", json!(true))])?;
    ensure!(free.tokens.len() == 40, "{free:?}");

    let allowed = [20, 33, 34, 300];
    let hot = [("allowed_token_ids", json!(allowed)), ("temperature", json!(1.5)), ("seed", json!(3))];
    let few = complete(&cluster, &hot)?;
    ensure!(few.tokens.len() == 40 && few.tokens.iter().all(|id| allowed.contains(id)), "{few:?}");

    // Words of one token that the free output has.
    let mut words = Vec::new();
    for letter in free.text.chars().filter(char::is_ascii_alphabetic) {
        let body = json!({"model": "small", "prompt": letter.to_string(), "add_special_tokens": false});
        let ids = post(&cluster, "/tokenize", &body)?["tokens"].as_array().cloned().context("no tokens")?;
        match ids.as_slice() {
            [id] if free.tokens.iter().any(|token| id == token) => words.push((letter.to_string(), id.clone())),
            _ => {}
        }
    }
    ensure!(!words.is_empty(), "{free:?}");
    let texts: Vec<&String> = words.iter().map(|(text, _)| text).collect();
    let without = complete(&cluster, &[("bad_words", json!(texts)), ("ignore_eos", json!(true))])?;
    ensure!(words.iter().all(|(_, id)| without.tokens.iter().all(|token| id != token)), "{without:?} has {texts:?}");

    // Token 1 is the end of a text. Everything wants to end at once, but may not.
    let ends = [("logit_bias", json!({"1": 100}))];
    let at_once = complete(&cluster, &ends)?;
    ensure!(at_once.tokens == [1] && at_once.finish_reason == "stop", "{at_once:?}");
    let later = complete(&cluster, &[ends[0].clone(), ("min_tokens", json!(6))])?;
    ensure!(later.tokens.len() == 7 && later.finish_reason == "stop", "{later:?}");
    Ok(())
}

#[test]
fn bad_requests_name_the_place() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args(PAIR))?;
    for (field, value, wanted) in [
        ("guided_json", json!({"type": "strin"}), "guided_json: Invalid type: strin"),
        ("guided_json", json!("{\"a\":"), "guided_json: EOF while parsing a value at line 1 column 5"),
        ("guided_regex", json!("[0-9"), "guided_regex: at 1(8): invalid regex"),
        ("guided_choice", json!([]), "guided_choice: there must be at least one text"),
        ("guided_grammar", json!("start: nowhere"), "unknown name: \\\"nowhere\\\""),
        (
            "structured_outputs",
            json!({"regex": "a".repeat(300_000)}),
            "structured_outputs must be at most 262144 bytes, got 300000",
        ),
        ("allowed_token_ids", json!([]), "allowed_token_ids must be at least one token id"),
        (
            "allowed_token_ids",
            json!([9999]),
            "allowed_token_ids must be of token ids below the vocabulary size, got 9999",
        ),
        ("bad_words", json!([" "]), "bad_words must be of texts that are not empty"),
        ("min_tokens", json!(9), "min_tokens must be at most max_tokens (8), got 9"),
        ("min_tokens", json!(-1), "min_tokens must be in [0, 4294967295], got -1"),
        ("response_format", json!({"type": "xml"}), "response_format.type must be one of"),
    ] {
        let body = json!({"model": "small", "prompt": "a", "max_tokens": 8, field: value});
        let (status, answer) = post_raw(&cluster, "/v1/completions", body.to_string().as_bytes())?;
        ensure!(status == 400 && answer.contains(wanted), "{field}: {status} {answer}");
    }
    cluster.check_undisturbed()
}

/// Nobody can know before the first token that there will be no second one. The nodes are not to blame, so no other node is tried.
#[test]
fn an_output_that_can_not_go_on_is_the_requests_fault() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args(PAIR))?;
    let body = json!({"model": "small", "prompt": "a", "add_special_tokens": false});
    let ids = post(&cluster, "/tokenize", &body)?["tokens"].clone();
    let body =
        json!({"model": "small", "prompt": "x", "max_tokens": 8, "guided_choice": ["aaaa{"], "allowed_token_ids": ids});
    let (status, answer) = post_raw(&cluster, "/v1/completions", body.to_string().as_bytes())?;
    ensure!(status == 400 && answer.contains("it allows none of allowed_token_ids"), "{status} {answer}");
    let metrics = ureq::get(&format!("{}/metrics", cluster.http())).call()?.into_string()?;
    let moved = metrics.lines().find(|line| line.starts_with("overfill_migrations_total"));
    ensure!(moved.is_some_and(|line| line.ends_with(" 0")), "{moved:?}");
    cluster.wait_idle()?;
    cluster.check_undisturbed()
}
