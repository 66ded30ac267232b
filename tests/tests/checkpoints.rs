//! Contents of published folders besides weights, as seen by a client: end tokens, sampling defaults, vocabularies.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use overfill_tests::completion::post;
use overfill_tests::golden::folder;
use overfill_tests::{Cluster, Completion};
use serde_json::{Value, json};

/// Copies a golden folder and replaces some files. `null` removes a file.
fn changed(files: &[(&str, Value)]) -> Result<tempfile::TempDir> {
    let copy = tempfile::tempdir()?;
    for entry in fs::read_dir(folder("llama-untied", "full"))? {
        let entry = entry?;
        fs::copy(entry.path(), copy.path().join(entry.file_name()))?;
    }
    for (name, content) in files {
        let path = copy.path().join(name);
        match content {
            Value::Null => fs::remove_file(path)?,
            Value::String(text) => fs::write(path, text)?,
            json => fs::write(path, json.to_string())?,
        }
    }
    Ok(copy)
}

/// Reads a JSON file of the golden folder and sets some fields.
fn with(name: &str, fields: Value) -> Result<(&str, Value)> {
    let text = fs::read_to_string(Path::new(&folder("llama-untied", "full")).join(name))?;
    let mut file: Value = serde_json::from_str(&text)?;
    for (field, value) in fields.as_object().context("fields must be an object")? {
        file[field] = value.clone();
    }
    Ok((name, file))
}

fn args(full: &Path) -> Vec<String> {
    let full = full.display().to_string();
    ["--full", &format!("m={full}"), "--weights", "f32", "--kv-dtype", "f32", "--kv-pool-tokens", "4096"]
        .map(str::to_owned)
        .to_vec()
}

/// Returns the finish reason and length of a chat in which every token is `id`.
fn end_of_chat(cluster: &Cluster, id: u32) -> Result<(String, u64)> {
    let request = json!({
        "messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "logit_bias": {id.to_string(): 100},
    });
    let body = post(cluster, "/v1/chat/completions", &request)?;
    let reason = body["choices"][0]["finish_reason"].as_str().context("no finish_reason")?;
    Ok((reason.to_owned(), body["usage"]["completion_tokens"].as_u64().context("no usage")?))
}

#[test]
fn a_turn_ends_with_every_token_that_the_folder_names() -> Result<()> {
    let generation = |ids: Value| ("generation_config.json", json!({"eos_token_id": ids}));
    let tokenizer = || with("tokenizer_config.json", json!({"eos_token": "<|end|>"}));
    let removed = ("special_tokens_map.json", Value::Null);
    let cases = [
        ("null is absent", vec![generation(Value::Null)], vec![1]),
        ("the tokenizer's counts beside another", vec![generation(json!(1)), tokenizer()?], vec![1, 3]),
        (
            "the tokenizer's alone",
            vec![
                ("generation_config.json", Value::Null),
                with("config.json", json!({"eos_token_id": null}))?,
                tokenizer()?,
                removed,
            ],
            vec![3],
        ),
        (
            "config.json's, too",
            vec![generation(json!(1)), with("config.json", json!({"eos_token_id": [1, 3]}))?],
            vec![1, 3],
        ),
    ];
    for (what, files, ends) in cases {
        let folder = changed(&files)?;
        let cluster = Cluster::start(&args(folder.path()))?;
        for id in [1, 3] {
            let end = end_of_chat(&cluster, id)?;
            let wanted = if ends.contains(&id) { ("stop".to_owned(), 1) } else { ("length".to_owned(), 5) };
            ensure!(end == wanted, "{what}: token {id} gives {end:?} instead of {wanted:?}");
        }
    }
    Ok(())
}

#[test]
fn sampling_defaults_are_served_or_refused_at_once() -> Result<()> {
    let generation = |fields: Value| changed(&[("generation_config.json", fields)]);
    let folder = generation(json!({"eos_token_id": 1, "top_k": 50.0, "temperature": 0}))?;
    let cluster = Cluster::start(&args(folder.path()))?;
    let body = post(&cluster, "/v1/completions", &json!({"prompt": "a", "max_tokens": 2}))?;
    ensure!(!Completion::parse(&body)?.finish_reason.is_empty(), "{body}");

    let files = |name, content| changed(&[(name, content)]);
    for (folder, needles) in [
        (generation(json!({"top_p": 0}))?, ["generation_config.json: top_p must be in (0, 1]", "got 0"]),
        (generation(json!({"eos_token_id": "</s>"}))?, ["generation_config.json: eos_token_id", "</s>"]),
        (
            files("tokenizer_config.json", json!({"added_tokens_decoder": []}))?,
            ["tokenizer_config.json", "added_tokens_decoder"],
        ),
        (files("chat_template.jinja", json!("{% for %}"))?, ["chat", "template"]),
        (files("tokenizer.json", json!({}))?, ["tokenizer.json", ""]),
    ] {
        let refused = Cluster::refused(&args(folder.path()))?;
        let reasons = refused.reasons();
        ensure!(reasons.len() == 1, "{} reasons instead of one:\n{}", reasons.len(), refused.stderr);
        ensure!(needles.iter().all(|needle| reasons[0].contains(needle)), "{:?} has not {needles:?}", reasons[0]);
        // The node itself must reject the model, before the router starts.
        ensure!(!refused.stderr.contains("did not see all"), "{}", refused.stderr);
    }
    Ok(())
}

const TRUE: usize = 288;
const SPACE_TRUE: usize = 289;
/// Token id of the byte F0.
const BYTE: usize = 243;

/// Returns a SentencePiece vocabulary of the golden models' size: special tokens, bytes, letters, words.
fn sentence_piece() -> Value {
    let named = |id: usize| match id {
        0..3 => ["<unk>", "<s>", "</s>"][id].to_owned(),
        3..259 => format!("<0x{:02X}>", id - 3),
        259 => "▁".into(),
        260..286 => char::from(b'a' + (id - 260) as u8).to_string(),
        TRUE => "true".into(),
        SPACE_TRUE => "▁true".into(),
        id => format!("▁w{id}"),
    };
    let vocabulary: serde_json::Map<_, _> = (0..320).map(|id| (named(id), json!(id))).collect();
    let special = |id: usize| {
        json!({"id": id, "content": named(id), "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": (0..3).map(special).collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary, "merges": []},
    })
}

#[test]
fn log_probabilities_name_tokens_as_they_are() -> Result<()> {
    let folder = changed(&[
        ("tokenizer.json", sentence_piece()),
        ("tokenizer_config.json", json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})),
        ("chat_template.jinja", json!("{{ bos_token }}{{ messages[0].content }}")),
        ("special_tokens_map.json", Value::Null),
    ])?;
    let cluster = Cluster::start(&args(folder.path()))?;
    let request = json!({"prompt": "x", "max_tokens": 3, "logit_bias": {SPACE_TRUE.to_string(): 100}, "logprobs": 0});
    let choice = post(&cluster, "/v1/completions", &request)?["choices"][0].clone();
    ensure!(choice["text"] == " true true true", "{choice}");
    ensure!(choice["logprobs"]["tokens"] == json!([" true", " true", " true"]), "{choice}");
    ensure!(choice["logprobs"]["text_offset"] == json!([0, 5, 10]), "{choice}");

    // The echoed text contains neither the begin-of-text token nor the space before the first word.
    let mut echo = request.clone();
    (echo["echo"], echo["prompt"]) = (json!(true), json!("x true"));
    let choice = post(&cluster, "/v1/completions", &echo)?["choices"][0].clone();
    ensure!(choice["text"] == "x true true true true", "{choice}");
    let tokens: Vec<_> = choice["logprobs"]["tokens"].as_array().context("no tokens")?.clone();
    let offsets: Vec<_> = choice["logprobs"]["text_offset"].as_array().context("no offsets")?.clone();
    ensure!(tokens.len() == offsets.len() && offsets[..3] == [0, 0, 0], "{choice}");
    ensure!(offsets[offsets.len() - 3..] == [6, 11, 16], "{choice}");

    let request = json!({"prompt": "x", "max_tokens": 1, "logprobs": 20});
    let choice = post(&cluster, "/v1/completions", &request)?["choices"][0].clone();
    let ranked = choice["logprobs"]["top_logprobs"][0].as_object().context("no alternatives")?.len();
    ensure!((20..=21).contains(&ranked), "{ranked} names: {choice}");

    let request = json!({
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": true, "top_logprobs": 20,
        "logit_bias": {BYTE.to_string(): 100},
    });
    let body = post(&cluster, "/v1/chat/completions", &request)?;
    let token = &body["choices"][0]["logprobs"]["content"][0];
    ensure!(token["bytes"] == json!([0xf0]) && token["token"] == "bytes:\\xf0", "{token}");
    let mut names: Vec<&str> = token["top_logprobs"]
        .as_array()
        .context("no alternatives")?
        .iter()
        .filter_map(|t| t["token"].as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    ensure!(names.len() == 20, "{names:?}");
    Ok(())
}
