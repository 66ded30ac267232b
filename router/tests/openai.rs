//! Tests of requests and responses of the OpenAI API, on simulated nodes.

#![allow(clippy::unwrap_used)]

mod support;

use overfill_simulated::{EOS, Options, bytes_as_tokens};
use serde_json::{Value, json};
use support::{rig, rig_with};

const TEXT: &str = "Grüße aus Köln, 日本語 ok. ";

fn scripted(text: &str) -> Options {
    Options { script: Some(bytes_as_tokens(text)), ..Options::default() }
}

fn stream_text(events: &[Value], index: u64, pick: impl Fn(&Value) -> &Value) -> String {
    let choices = events.iter().flat_map(|e| e["choices"].as_array().unwrap()).filter(|c| c["index"] == index);
    choices.filter_map(|c| pick(c).as_str()).collect()
}

#[tokio::test]
async fn completion_with_everything_reported() {
    let rig = rig(scripted("abc")).await;
    let answer = rig
        .complete(json!({"model": "simulated", "prompt": [68, 69, 70], "max_tokens": 4, "logprobs": 2,
                         "return_token_ids": true, "return_tokens_as_token_ids": true, "ignore_eos": true, "user": "u"}))
        .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut body = answer.json();
    assert!(body["id"].take().as_str().unwrap().starts_with("cmpl-"));
    assert!(body["created"].take().as_u64().unwrap() > 0);
    let top = |id: u32| json!({format!("token_id:{id}"): -0.5, format!("token_id:{}", id + 1): -1.5});
    assert_eq!(
        body,
        json!({
            "id": null, "created": null, "object": "text_completion", "model": "simulated",
            "choices": [{
                "index": 0, "text": "abca", "finish_reason": "length", "stop_reason": null,
                "logprobs": {
                    "tokens": ["token_id:100", "token_id:101", "token_id:102", "token_id:100"],
                    "token_logprobs": [-0.5, -0.5, -0.5, -0.5],
                    "top_logprobs": [top(100), top(101), top(102), top(100)],
                    "text_offset": [0, 1, 2, 3],
                },
                "token_ids": [100, 101, 102, 100], "prompt_token_ids": [68, 69, 70],
            }],
            "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
                      "prompt_tokens_details": {"cached_tokens": 0}},
        })
    );
    assert_eq!(rig.metric("vllm:generation_tokens_total{model_name=\"simulated\"}").await, 4.0);
}

#[tokio::test]
async fn a_stream_is_the_whole_in_pieces() {
    let rig = rig(scripted(TEXT)).await;
    let request = json!({"prompt": "hello", "max_tokens": 61, "n": 2, "return_token_ids": true, "logprobs": 1});
    let whole = rig.complete(request.clone()).await.json();
    let mut streamed = request.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let answer = rig.complete(streamed).await;
    assert!(answer.head.contains("text/event-stream"));
    let events = answer.events();
    for index in 0..2 {
        let choice = &whole["choices"][index as usize];
        assert_eq!(stream_text(&events, index, |c| &c["text"]), choice["text"].as_str().unwrap());
        let ids: Vec<Value> = events
            .iter()
            .flat_map(|e| e["choices"].as_array().unwrap())
            .filter(|c| c["index"] == index)
            .flat_map(|c| c["token_ids"].as_array().unwrap().clone())
            .collect();
        assert_eq!(json!(ids), choice["token_ids"]);
        let offsets: Vec<Value> = events
            .iter()
            .flat_map(|e| e["choices"].as_array().unwrap())
            .filter(|c| c["index"] == index)
            .filter_map(|c| c["logprobs"]["text_offset"].as_array().cloned())
            .flatten()
            .collect();
        assert_eq!(json!(offsets), choice["logprobs"]["text_offset"]);
    }
    // Only the last character may be incomplete, because of max_tokens.
    let (last, others) = events.split_last().unwrap();
    assert_eq!(last["usage"], whole["usage"]);
    assert_eq!(last["choices"], json!([]));
    for event in others {
        assert!(event["usage"].is_null());
        let choice = &event["choices"][0];
        assert!(choice["finish_reason"] == "length" || !choice["text"].as_str().unwrap().contains('\u{fffd}'));
    }
}

#[tokio::test]
async fn stop_texts_over_token_borders() {
    let rig = rig(scripted("one two three ")).await;
    for stream in [false, true] {
        let request = json!({"prompt": "x", "max_tokens": 50, "stop": ["nothing", "o th"], "stream": stream});
        let answer = rig.complete(request).await;
        let (text, choice) = if stream {
            let events = answer.events();
            (stream_text(&events, 0, |c| &c["text"]), events.last().unwrap()["choices"][0].clone())
        } else {
            let body = answer.json();
            assert_eq!(body["usage"]["completion_tokens"], 10);
            (body["choices"][0]["text"].as_str().unwrap().to_owned(), body["choices"][0].clone())
        };
        assert_eq!(text, "one tw");
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!("o th")));
    }
    let kept = json!({"prompt": "x", "max_tokens": 50, "stop": "two", "include_stop_str_in_output": true});
    assert_eq!(rig.complete(kept).await.json()["choices"][0]["text"], "one two");
    let by_token = json!({"prompt": "x", "max_tokens": 50, "stop_token_ids": [b'w' as u32 + 3]});
    let choice = rig.complete(by_token).await.json()["choices"][0].clone();
    assert_eq!((&choice["text"], &choice["stop_reason"]), (&json!("one t"), &json!(b'w' as u32 + 3)));
    support::wait_for(async || rig.active() == 0).await;
}

#[tokio::test]
async fn the_end_of_text_ends_unless_ignored() {
    let options = Options { script: Some(vec![100, 101, EOS]), ..Options::default() };
    let rig = rig(options).await;
    let request = json!({"prompt": "x", "max_tokens": 5, "return_token_ids": true});
    let body = rig.complete(request.clone()).await.json();
    let choice = &body["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("ab"), &json!("stop")));
    assert_eq!((&choice["token_ids"], &choice["stop_reason"]), (&json!([100, 101, EOS]), &Value::Null));
    let mut ignoring = request;
    ignoring["ignore_eos"] = json!(true);
    let body = rig.complete(ignoring).await.json();
    assert_eq!(body["choices"][0]["text"], "abab");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn echo_scores_the_prompt() {
    let rig = rig(scripted("abc")).await;
    let request = json!({"prompt": [[68, 69], [70]], "max_tokens": 0, "echo": true, "logprobs": 1});
    let body = rig.complete(request).await.json();
    let choice = &body["choices"][0];
    assert_eq!(choice["text"], "AB");
    assert_eq!(choice["logprobs"]["tokens"], json!(["A", "B"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5]));
    assert_eq!(choice["logprobs"]["top_logprobs"], json!([null, {"B": -0.5}]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1]));
    assert_eq!(body["choices"][1]["text"], "C");
    assert_eq!((&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]), (&json!(3), &json!(0)));
    assert_eq!(rig.decode[0].taken(), 0);

    let request = json!({"prompt": "AB", "max_tokens": 2, "echo": true, "logprobs": 0});
    for stream in [false, true] {
        let mut request = request.clone();
        request["stream"] = json!(stream);
        let answer = rig.complete(request).await;
        if stream {
            let events = answer.events();
            assert_eq!(stream_text(&events, 0, |c| &c["text"]), "ABab");
            assert_eq!(events[0]["choices"][0]["logprobs"]["tokens"], json!(["A", "B", "a"]));
        } else {
            let choice = answer.json()["choices"][0].clone();
            assert_eq!(choice["text"], "ABab");
            assert_eq!(choice["logprobs"]["tokens"], json!(["A", "B", "a", "b"]));
            assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2, 3]));
        }
    }
}

#[tokio::test]
async fn one_token_needs_no_decode_node() {
    let rig = rig(scripted("abc")).await;
    let body = rig.complete(json!({"prompt": "x", "max_tokens": 1})).await.json();
    assert_eq!(body["choices"][0]["text"], "a");
    assert_eq!((rig.prefill[0].taken(), rig.decode[0].taken()), (1, 0));
}

#[tokio::test]
async fn chat_whole_and_streamed() {
    let rig = rig(scripted(TEXT)).await;
    let messages = json!([{"role": "system", "content": "s"},
                          {"role": "user", "content": [{"type": "text", "text": "hi"}]}]);
    let request = json!({"messages": messages, "max_completion_tokens": 6, "logprobs": true, "top_logprobs": 2,
                         "return_token_ids": true});
    let body = rig.post("/v1/chat/completions", request.clone()).await.json();
    assert_eq!(body["object"], "chat.completion");
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Grüß", "refusal": null}));
    assert_eq!(choice["finish_reason"], "length");
    let entry = &choice["logprobs"]["content"][0];
    assert_eq!((&entry["token"], &entry["bytes"]), (&json!("G"), &json!([71])));
    assert_eq!(entry["top_logprobs"][1], json!({"token": "H", "logprob": -1.5, "bytes": [72]}));
    // The template writes the special tokens and one turn per message. The tokenizer adds nothing.
    let prompt: Vec<u32> = serde_json::from_value(body["prompt_token_ids"].clone()).unwrap();
    assert_eq!((&prompt[..2], prompt.len()), (&[0, 2][..], 1 + "<system: s\n<user: hi\n".len()));

    let mut streamed = request;
    streamed["stream"] = json!(true);
    let events = rig.post("/v1/chat/completions", streamed).await.events();
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(stream_text(&events, 0, |c| &c["delta"]["content"]), "Grüß");
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn a_token_has_its_own_bytes() {
    let options = Options { script: Some([0xf8, 0xc3, 0xa9].map(|byte| byte + 3).to_vec()), ..Options::default() };
    let rig = rig(options).await;
    let request = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 3.0, "logprobs": true});
    let choice = &rig.post("/v1/chat/completions", request).await.json()["choices"][0];
    assert_eq!(choice["message"]["content"], "\u{fffd}é");
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<&Value> = entries.iter().map(|entry| &entry["bytes"]).collect();
    assert_eq!(json!(bytes), json!([[248], [195], [169]]));
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let rig = rig_with(&[Options::default()], &[Options::default()], |c| c.max_body_bytes = 20_000).await;
    let cases = [
        (json!({"prompt": "x", "model": "other"}), 404, "model", "does not exist; served models: simulated"),
        (json!({"prompt": "x", "temperature": -1}), 400, "temperature", "temperature must be in [0, 100], got -1"),
        (json!({"prompt": "x", "tools": [{}]}), 400, "tools", "tools is not supported"),
        (json!({"prompt": "x", "max_tokens": -5}), 400, "max_tokens", "got -5"),
        (json!({"prompt": "x", "max_tokens": 0}), 400, "max_tokens", "got 0"),
        (json!({"prompt": [300]}), 400, "prompt", "prompt must be of token ids below 259, got 300"),
        (json!({"prompt": []}), 400, "prompt", "at least one token"),
        (json!({"prompt": {"a": 1}}), 400, "prompt", "expected a string"),
        (json!({}), 400, "prompt", "prompt is missing"),
        (json!({"prompt": "x", "logprobs": 21}), 400, "logprobs", "at most 20"),
        (json!({"prompt": "x", "stream_options": {"include_usage": true}}), 400, "stream_options", "stream"),
    ];
    for (request, status, param, message) in cases {
        let answer = rig.complete(request.clone()).await;
        assert_eq!(answer.status, status, "{request}");
        let error = &answer.json()["error"];
        assert_eq!(error["param"], param, "{request}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().unwrap().contains(message), "{error}");
    }
    let answer = rig.complete(json!({"prompt": vec![68; 4000], "max_tokens": 100})).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    assert!(answer.body.contains("4096") && answer.body.contains("4100"), "{}", answer.body);
    let answer = rig.complete(json!({"prompt": "x".repeat(30_000)})).await;
    assert_eq!(answer.status, 413);
    assert!(answer.json()["error"]["message"].is_string());
    let answer = support::receive(rig.send("POST", "/v1/completions", "{\"prompt\": ").await).await;
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("not valid JSON"));
    assert_eq!(rig.get("/v1/nothing").await.json()["error"]["message"], "no such path");
    assert_eq!(rig.get("/v1/completions").await.status, 405);
    assert_eq!(rig.prefill[0].taken() + rig.decode[0].taken(), 0);
}

#[tokio::test]
async fn models_and_health() {
    let rig = rig(Options::default()).await;
    let models = rig.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "simulated");
    assert_eq!(models["data"][0]["max_model_len"], 4096);
    assert_eq!(rig.get("/v1/models/simulated").await.status, 200);
    assert_eq!(rig.get("/v1/models/other").await.status, 404);
    assert_eq!(rig.get("/health").await.status, 200);
    assert_eq!(rig.get("/live").await.status, 200);
}
