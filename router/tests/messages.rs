//! Tests of Anthropic's Messages API, on simulated nodes.

#![allow(clippy::unwrap_used)]

mod support;

use overfill_router::ApiKeys;
use overfill_simulated::{EOS, Options, bytes_as_tokens};
use serde_json::{Value, json};
use support::{Rig, receive, rig_with, unready_rig, wait_for};

/// It asks for calls as Qwen's templates do.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}<tool_call>\n{\"name\"{% endif %}{% for m in messages %}<|turn|>{{ m.role }}: \
    {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant: {% if enable_thinking %}<think>\n{% endif %}{% endif %}";
const ANSWER: &str =
    "Hm.\n</think>\n\nI look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";

fn options(text: &str) -> [Options; 1] {
    let script = bytes_as_tokens(text).into_iter().chain([EOS]).collect();
    let mut options = Options { script: Some(script), ..Options::default() };
    options.files.chat_template = Some(TEMPLATE.as_bytes().to_vec());
    [options]
}

async fn rig(text: &str) -> Rig {
    let flags = support::flags(&["--reasoning-parser=qwen3"]).unwrap();
    rig_with(&options(text), &options(text), |c| c.requests = flags.requests).await
}

fn request(changes: Value) -> Value {
    let mut request =
        json!({"model": "simulated", "max_tokens": 500, "messages": [{"role": "user", "content": "Weather?"}]});
    for (field, value) in changes.as_object().unwrap() {
        request[field] = value.clone();
    }
    request
}

/// A body without the ids, which differ between two answers.
fn steady(mut message: Value) -> Value {
    message["id"] = json!("-");
    for block in message["content"].as_array_mut().unwrap() {
        if block["type"] == "tool_use" {
            block["id"] = json!("-");
        }
    }
    message
}

#[tokio::test]
async fn an_answer_has_all_kinds_of_blocks() {
    let rig = rig(ANSWER).await;
    let asked = json!({"system": "Be brief.", "thinking": {"type": "enabled", "budget_tokens": 1024},
                       "tools": [{"name": "f", "input_schema": {"type": "object"}}]});
    let answer = rig.post("/v1/messages", request(asked.clone())).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let body = answer.json();
    assert!(body["id"].as_str().unwrap().starts_with("msg_"));
    let counted = rig.post("/v1/messages/count_tokens", request(asked.clone())).await.json();
    let input = counted["input_tokens"].as_u64().unwrap();
    assert!(input > 50);
    let whole = steady(body.clone());
    assert_eq!(
        whole,
        json!({
            "id": "-", "type": "message", "role": "assistant", "model": "simulated",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "-", "name": "f", "input": {"a": 1}},
            ],
            "stop_reason": "tool_use", "stop_sequence": null,
            "usage": {"input_tokens": input, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
                      "output_tokens": ANSWER.len() + 1},
        })
    );

    let mut streamed = asked;
    streamed["stream"] = json!(true);
    let answer = rig.post("/v1/messages", request(streamed)).await;
    assert!(answer.header("content-type").starts_with("text/event-stream"));
    let events = answer.named_events();
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    let block = ["content_block_start", "content_block_delta", "content_block_stop"];
    let wanted = [&["message_start", "ping"][..], &block.repeat(3), &["message_delta", "message_stop"]];
    assert_eq!(kinds, wanted.concat());
    assert_eq!(events[0]["message"]["usage"], json!({"input_tokens": input, "output_tokens": 0}));
    // What a client puts together is the whole answer.
    let mut message = events[0]["message"].clone();
    let mut arguments = String::new();
    for event in &events {
        let blocks = message["content"].as_array_mut().unwrap();
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert_eq!(event["index"], blocks.len());
                blocks.push(event["content_block"].clone());
            }
            "content_block_delta" => {
                let (block, delta) = (&mut blocks[event["index"].as_u64().unwrap() as usize], &event["delta"]);
                let text = |name: &str| delta[name].as_str().unwrap().to_owned();
                let joined = |block: &Value, name: &str| json!(block[name].as_str().unwrap().to_owned() + &text(name));
                match delta["type"].as_str().unwrap() {
                    "text_delta" => block["text"] = joined(block, "text"),
                    "thinking_delta" => block["thinking"] = joined(block, "thinking"),
                    "input_json_delta" => arguments += &text("partial_json"),
                    other => panic!("{other}"),
                }
            }
            "message_delta" => {
                message["stop_reason"] = event["delta"]["stop_reason"].clone();
                message["usage"] = event["usage"].clone();
            }
            _ => {}
        }
    }
    message["content"][2]["input"] = serde_json::from_str(&arguments).unwrap();
    assert_eq!(steady(message), whole);
}

#[tokio::test]
async fn an_answer_says_why_it_ended() {
    let rig = rig("one two three").await;
    let stopped = rig.post("/v1/messages", request(json!({"stop_sequences": ["x", " th"]}))).await.json();
    assert_eq!((&stopped["stop_reason"], &stopped["stop_sequence"]), (&json!("stop_sequence"), &json!(" th")));
    assert_eq!(stopped["content"], json!([{"type": "text", "text": "one two"}]));
    let ended = rig.post("/v1/messages", request(json!({}))).await.json();
    assert_eq!((&ended["stop_reason"], &ended["stop_sequence"]), (&json!("end_turn"), &Value::Null));
    let cut = rig.post("/v1/messages", request(json!({"max_tokens": 3}))).await.json();
    assert_eq!((&cut["stop_reason"], &cut["content"][0]["text"]), (&json!("max_tokens"), &json!("one")));
    // Clients ask for more than the context of a small model holds.
    let mut options = options("abc");
    (options[0].max_context_tokens, options[0].script) = (100, Some(bytes_as_tokens("abc")));
    let small = rig_with(&options, &options, |_| {}).await;
    let full = small.post("/v1/messages", request(json!({"max_tokens": 32_000}))).await.json();
    assert_eq!(full["stop_reason"], "model_context_window_exceeded");
    assert_eq!(full["usage"]["input_tokens"].as_u64().unwrap() + full["usage"]["output_tokens"].as_u64().unwrap(), 100);
}

#[tokio::test]
async fn the_model_goes_on_with_a_text_that_has_begun() {
    let rig = rig("!").await;
    let count = async |messages: Value| {
        rig.post("/v1/messages/count_tokens", json!({"messages": messages})).await.json()["input_tokens"]
            .as_u64()
            .unwrap()
    };
    let user = json!({"role": "user", "content": "x"});
    let begun = count(json!([user, {"role": "assistant", "content": "abc"}])).await;
    // The turn of the assistant has begun in both prompts, and does not end.
    assert_eq!(begun, count(json!([user])).await + 3);
}

#[tokio::test]
async fn errors_have_anthropics_format() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.json");
    let file = r#"[{"name": "a", "key": "key-of-a-0123456789"},
                   {"name": "b", "key": "key-of-b-0123456789", "requests_per_minute": 1}]"#;
    std::fs::write(&keys, file).unwrap();
    let rig = unready_rig(&options("abc"), &options("abc"), |c| {
        c.api_keys = Some(ApiKeys::load(keys).unwrap());
        c.max_body_bytes = 20_000;
    })
    .await;
    wait_for(async || rig.get("/health").await.status == 200).await;
    let send = async |path: &str, headers: &[(&str, &str)], body: Value| {
        receive(rig.send_with("POST", path, headers, body.to_string().as_bytes()).await).await
    };
    let key = ("x-api-key", "key-of-a-0123456789");
    let bearer = ("authorization", "Bearer key-of-a-0123456789");
    let wrong = ("x-api-key", "key-of-a-012345678");
    for path in ["/v1/messages", "/v1/messages/count_tokens"] {
        for good in [key, bearer] {
            assert_eq!(send(path, &[good], request(json!({}))).await.status, 200, "{path}");
        }
        for (headers, body, status, kind, fault) in [
            (&[][..], request(json!({})), 401, "authentication_error", "API key"),
            (&[wrong], request(json!({})), 401, "authentication_error", "API key"),
            (&[key], request(json!({"messages": "x"})), 400, "invalid_request_error", "messages: invalid type"),
            (&[key], request(json!({"model": "other"})), 404, "not_found_error", "does not exist"),
            (&[key], request(json!({"system": "x".repeat(30_000)})), 413, "request_too_large", "length limit"),
            (&[key, ("content-encoding", "br")], request(json!({})), 415, "invalid_request_error", "content-encoding"),
        ] {
            let answer = send(path, headers, body).await;
            assert_eq!(answer.status, status, "{}", answer.body);
            let body = answer.json();
            assert_eq!((&body["type"], &body["error"]["type"]), (&json!("error"), &json!(kind)));
            assert!(body["error"]["message"].as_str().unwrap().contains(fault), "{body}");
        }
    }
    let limited = ("x-api-key", "key-of-b-0123456789");
    assert_eq!(send("/v1/messages/count_tokens", &[limited], request(json!({}))).await.status, 200);
    let answer = send("/v1/messages", &[limited], request(json!({}))).await;
    assert_eq!((answer.status, &answer.json()["error"]["type"]), (429, &json!("rate_limit_error")));
    assert!(answer.header("retry-after").parse::<u64>().unwrap() >= 1);
    // The header holds for the other APIs as well, whose errors keep their own format.
    assert_eq!(send("/v1/chat/completions", &[key], request(json!({}))).await.status, 200);
    let answer = send("/v1/chat/completions", &[wrong], request(json!({}))).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (401, &json!("invalid_api_key")));
}

#[tokio::test]
async fn a_failure_is_the_last_event() {
    let options = [Options { script: Some(bytes_as_tokens("abc")), ..Options::default() }];
    let rig = rig_with(&options, &options, |c| c.max_attempts = 1).await;
    rig.decode[0].fail_after(3);
    let events = rig.post("/v1/messages", request(json!({"stream": true}))).await.named_events();
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("overloaded_error")));
    assert!(last["error"]["message"].as_str().unwrap().contains("gave up"));
    wait_for(async || rig.active() == 0).await;
}
