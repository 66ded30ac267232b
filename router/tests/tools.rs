//! Tests of tools, reasoning and chat templates in chat completions, on simulated nodes.

#![allow(clippy::unwrap_used)]

mod support;

use overfill_cluster::ConfigError;
use overfill_router::{Args, Config};
use overfill_simulated::{EOS, Options, bytes_as_tokens};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use support::{Answer, Rig, rig_with};

/// Prints everything that it gets. It asks for calls as Qwen's templates do.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}<tool_call>\n{\"name\"{% endif %}{% if documents %}{{ documents | tojson }}\
    {% endif %}{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}\
    {% for c in m.tool_calls %}[{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}\
    {% if m.tool_call_id %}[{{ m.tool_call_id }} {{ m.name }}]{% endif %}\n{% endfor %}\
    {% if add_generation_prompt %}<|turn|>assistant: {% if enable_thinking %}<think>\n{% endif %}{% endif %}";

const CALL: &str = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"location\": \"Köln\"}}\n</tool_call>";

/// Nodes that answer with this text.
fn answering(text: &str, template: &str) -> Options {
    let script = bytes_as_tokens(text).into_iter().chain([EOS]).collect();
    let mut options = Options { script: Some(script), ..Options::default() };
    options.files.chat_template = Some(template.as_bytes().to_vec());
    options
}

async fn rig(text: &str, change: impl FnOnce(&mut Config)) -> Rig {
    let options = [answering(text, TEMPLATE)];
    rig_with(&options, &options, change).await
}

/// The settings of a router with these flags.
fn flags(list: &[&str]) -> Result<Config, Vec<ConfigError>> {
    use clap::{Args as _, FromArgMatches as _};
    let urls = ["--prefill-url", "http://127.0.0.1:1", "--decode-url", "http://127.0.0.1:1"];
    let command = Args::augment_args(clap::Command::new("router"));
    let matches = command.get_matches_from([&["router"], &urls[..], list].concat());
    Args::from_arg_matches(&matches).unwrap().validate()
}

fn tool(name: &str) -> Value {
    let parameters =
        json!({"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]});
    json!({"type": "function", "function": {"name": name, "description": "x", "parameters": parameters}})
}

/// A request with one message and one tool.
fn request(changes: Value) -> Value {
    let mut request = json!({"messages": [{"role": "user", "content": "Weather?"}], "tools": [tool("get_weather")],
                             "return_token_ids": true});
    for (field, value) in changes.as_object().unwrap() {
        request[field] = value.clone();
    }
    request
}

async fn chat(rig: &Rig, request: Value) -> Answer {
    rig.post("/v1/chat/completions", request).await
}

/// The choice of a whole answer, and its prompt.
async fn whole(rig: &Rig, request: Value) -> (Value, String) {
    let answer = chat(rig, request).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let body = answer.json();
    let ids: Vec<u32> = serde_json::from_value(body["prompt_token_ids"].clone()).unwrap();
    let prompt = ids.iter().map(|id| u8::try_from(id.saturating_sub(3)).unwrap()).collect();
    (body["choices"][0].clone(), String::from_utf8(prompt).unwrap().replace('\0', "|"))
}

/// The deltas of a streamed answer that say something, and its finish reason.
async fn deltas(rig: &Rig, mut request: Value) -> (Vec<Value>, Value) {
    request["stream"] = json!(true);
    let events = chat(rig, request).await.events();
    let (mut deltas, mut reason) = (Vec::new(), Value::Null);
    for event in &events {
        let choice = &event["choices"][0];
        deltas.extend([choice["delta"].clone()].into_iter().filter(|delta| *delta != json!({})));
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    (deltas, reason)
}

/// Joins deltas, as clients do.
fn joined(deltas: &[Value]) -> Value {
    let mut message = json!({"content": "", "reasoning_content": "", "tool_calls": []});
    for delta in deltas {
        for field in ["content", "reasoning_content"] {
            let text = message[field].as_str().unwrap().to_owned() + delta[field].as_str().unwrap_or_default();
            message[field] = json!(text);
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let calls = message["tool_calls"].as_array_mut().unwrap();
            if call["id"].is_string() {
                assert_eq!(call["index"], calls.len());
                calls.push(call.clone());
            } else {
                assert_eq!(call.as_object().unwrap().len(), 2);
                let arguments = &mut calls[call["index"].as_u64().unwrap() as usize]["function"]["arguments"];
                let text = arguments.as_str().unwrap().to_owned() + call["function"]["arguments"].as_str().unwrap();
                *arguments = json!(text);
            }
        }
    }
    message
}

#[tokio::test]
async fn calls_whole_and_streamed() {
    let rig = rig(&format!("I look.\n{CALL}\n{CALL}"), |_| {}).await;
    let (mut choice, prompt) = whole(&rig, request(json!({}))).await;
    assert!(
        prompt.starts_with("[{\"type\": \"function\", \"function\": {\"name\": \"get_weather\", \"description\": ")
    );
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("tool_calls"), &Value::Null));
    let mut message = choice["message"].take();
    let calls = message["tool_calls"].as_array_mut().unwrap();
    let ids: Vec<String> = calls.iter_mut().map(|call| call["id"].take().as_str().unwrap().to_owned()).collect();
    assert!(ids[0] != ids[1] && ids.iter().all(|id| id.starts_with("call_")), "{ids:?}");
    let call = json!({"id": null, "type": "function",
                      "function": {"name": "get_weather", "arguments": "{\"location\": \"Köln\"}"}});
    let wanted = json!({"role": "assistant", "content": "I look.", "refusal": null, "tool_calls": [call, call]});
    assert_eq!(message, wanted);

    let (deltas, reason) = deltas(&rig, request(json!({}))).await;
    assert_eq!(reason, "tool_calls");
    assert_eq!(deltas[0], json!({"role": "assistant", "content": ""}));
    let first = deltas.iter().position(|delta| delta["tool_calls"].is_array()).unwrap();
    let first = &deltas[first]["tool_calls"][0];
    assert_eq!((&first["index"], &first["type"]), (&json!(0), &json!("function")));
    assert_eq!(first["function"], json!({"name": "get_weather", "arguments": "{"}));
    assert!(deltas.iter().filter(|delta| delta["tool_calls"].is_array()).count() > 20, "arguments in fragments");
    let mut got = joined(&deltas);
    for call in got["tool_calls"].as_array_mut().unwrap() {
        call["id"] = Value::Null;
        call.as_object_mut().unwrap().remove("index");
    }
    assert_eq!(got, json!({"content": "I look.", "reasoning_content": "", "tool_calls": [call, call]}));

    // One call only, no calls, and no tools.
    let (choice, _) = whole(&rig, request(json!({"parallel_tool_calls": false}))).await;
    assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1);
    for changes in [json!({"tool_choice": "none"}), json!({"tools": []}), json!({"tools": null})] {
        let (choice, _) = whole(&rig, request(changes)).await;
        assert_eq!(choice["message"]["content"], format!("I look.\n{CALL}\n{CALL}"));
        assert_eq!((&choice["finish_reason"], &choice["message"]["tool_calls"]), (&json!("stop"), &Value::Null));
    }
    // An answer that is cut off keeps what came of its call.
    let (choice, _) = whole(&rig, request(json!({"max_tokens": 80}))).await;
    let arguments = choice["message"]["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
    assert!("{\"location\": \"Köln\"}".starts_with(arguments) && arguments.len() > 5, "{arguments}");
    assert_eq!(choice["finish_reason"], "length");
}

#[tokio::test]
async fn an_answer_of_calls_has_no_content() {
    let rig = rig(CALL, |_| {}).await;
    let (choice, _) = whole(&rig, request(json!({"logprobs": true}))).await;
    assert_eq!(choice["message"]["content"], Value::Null);
    assert_eq!(choice["logprobs"]["content"].as_array().unwrap().len(), CALL.len() + 1);
    // All log-probabilities are streamed, also while text is held back.
    let request = request(json!({"logprobs": true, "stream": true}));
    let events = chat(&rig, request).await.events();
    let entries = events.iter().flat_map(|e| e["choices"][0]["logprobs"]["content"].as_array()).flatten();
    assert_eq!(entries.count(), CALL.len() + 1);
}

#[tokio::test]
async fn the_template_gets_the_history() {
    let rig = rig("ok", |_| {}).await;
    let call = |id: &str, arguments: Value| json!({"id": id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}});
    let messages = json!([
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null, "reasoning_content": "Hm",
         "tool_calls": [call("c1", json!("{\"location\": \"Rom\"}")), call("c2", json!("broken"))]},
        {"role": "tool", "tool_call_id": "c1", "name": "get_weather", "content": "21"},
    ]);
    let (_, prompt) = whole(&rig, request(json!({"messages": messages, "tools": null}))).await;
    // A line break after a tag is not part of a prompt.
    let wanted = "|user: a\nb|assistant: (Hm)[c1 get_weather {\"location\": \"Rom\"}][c2 get_weather {}]\
                  |tool: 21[c1 get_weather]|assistant: ";
    assert_eq!(prompt, wanted);
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "Hel"}]);
    let continued = json!({"messages": messages, "tools": null, "continue_final_message": true});
    assert_eq!(whole(&rig, request(continued)).await.1, "|user: a|assistant: Hel");
    let documents = json!({"tools": null, "documents": [{"title": "T"}], "add_generation_prompt": false,
                           "chat_template_kwargs": {"enable_thinking": true}});
    assert_eq!(whole(&rig, request(documents)).await.1, "[{\"title\": \"T\"}]|user: Weather?");
    let thinking = json!({"tools": null, "chat_template_kwargs": {"enable_thinking": true}});
    assert!(whole(&rig, request(thinking)).await.1.ends_with("|assistant: <think>\n"));
}

#[tokio::test]
async fn reasoning_is_split_off() {
    let text = format!("Maybe {CALL}?\n</think>\n\nYes.\n{CALL}");
    let rig = rig(&text, |c| c.requests = flags(&["--reasoning-parser", "simulated=qwen3"]).unwrap().requests).await;
    let open = || request(json!({"chat_template_kwargs": {"enable_thinking": true}}));
    let (choice, _) = whole(&rig, open()).await;
    let message = &choice["message"];
    assert_eq!(message["reasoning_content"], format!("Maybe {CALL}?"));
    assert_eq!((&message["content"], message["tool_calls"].as_array().unwrap().len()), (&json!("Yes."), 1));
    let (deltas, reason) = deltas(&rig, open()).await;
    let joined = joined(&deltas);
    for field in ["content", "reasoning_content"] {
        assert_eq!(joined[field], message[field]);
    }
    assert_eq!((reason, joined["tool_calls"].as_array().unwrap().len()), (json!("tool_calls"), 1));
    assert!(
        deltas
            .iter()
            .all(|delta| !(delta["content"] != "" && delta["reasoning_content"].is_string())
                || delta["content"].is_null())
    );
    // The prompt does not open the reasoning, nor does the answer.
    let (choice, _) = whole(&rig, request(json!({"tools": null}))).await;
    assert_eq!((&choice["message"]["content"], &choice["message"]["reasoning_content"]), (&json!(text), &Value::Null));
}

#[tokio::test]
async fn special_tokens_that_mark_calls_are_seen() {
    let template = "{{ '[TOOL_CALLS]' }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let mut options = answering("", template);
    let tokenizer = String::from_utf8(options.files.tokenizer_json).unwrap().replace("<|turn|>", "[TOOL_CALLS]");
    options.files.tokenizer_json = tokenizer.into_bytes();
    let sha256 = Sha256::digest(&options.files.tokenizer_json);
    options.schema.tokenizer_sha256 = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    // 0 is another special token.
    let mut script = vec![0, 2];
    script.extend(bytes_as_tokens("[{\"name\": \"get_weather\", \"arguments\": {}}]"));
    script.push(EOS);
    options.script = Some(script);
    let options = [options];
    let rig = rig_with(&options, &options, |_| {}).await;
    let answer = chat(&rig, request(json!({}))).await.json();
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["content"], Value::Null, "{message}");
    assert_eq!(message["tool_calls"][0]["function"]["name"], "get_weather");
    assert_eq!(message["tool_calls"][0]["id"].as_str().unwrap().len(), 9);
    // Without tools, special tokens are left out.
    let answer = chat(&rig, request(json!({"tools": []}))).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "[{\"name\": \"get_weather\", \"arguments\": {}}]");
}

#[tokio::test]
async fn a_request_may_bring_a_template_if_the_router_allows_it() {
    let rig = rig("ok", |c| c.requests = flags(&["--trust-request-chat-template"]).unwrap().requests).await;
    let with = |template: &str| request(json!({"tools": null, "chat_template": template}));
    assert_eq!(whole(&rig, with("{% for m in messages %}<{{ m.content }}>{% endfor %}")).await.1, "<Weather?>");
    for (template, fault) in [
        ("{% if %}", "chat template: "),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "must take at most"),
        ("{{ raise_exception('no') }}", "chat template: no"),
    ] {
        let answer = chat(&rig, with(template)).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"]), (400, &json!("chat_template")), "{error}");
        assert!(error["message"].as_str().unwrap().contains(fault), "{error}");
    }
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let unknown = [answering("x", "{% for m in messages %}{{ m.content }}{% endfor %}")];
    let unknown = rig_with(&unknown, &unknown, |_| {}).await;
    let rig = rig("x", |_| {}).await;
    let message = |message: Value| json!({"messages": [{"role": "user", "content": "x"}, message]});
    let cases = [
        (
            &rig,
            json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
            "tools[0].function.name",
            "1 to 64",
        ),
        (&rig, json!({"tools": [], "tool_choice": "required"}), "tool_choice", "needs tools"),
        (
            &rig,
            json!({"tool_choice": "required", "tools": [tool("a"), {"type": "function", "function":
                   {"name": "b", "parameters": {"type": "object", "properties": {"x": {"type": "thing"}}}}}]}),
            "tools[1].function.parameters",
            "tools[1].function.parameters: ",
        ),
        (&rig, json!({"tool_choice": 3}), "tool_choice", "got 3"),
        (&rig, json!({"parallel_tool_calls": "no"}), "parallel_tool_calls", "invalid type"),
        (&rig, json!({"messages": []}), "messages", "at least one message, got 0"),
        (&rig, message(json!({"role": "user", "content": 3})), "messages[1]", "a list of parts"),
        (
            &rig,
            message(json!({"role": "assistant", "tool_calls": [{}]})),
            "messages[1].tool_calls[0].function",
            "got null",
        ),
        (&rig, json!({"chat_template": "x"}), "chat_template", "--trust-request-chat-template"),
        (&rig, json!({"chat_template_kwargs": {"tools": 1}}), "chat_template_kwargs.tools", "is not a variable"),
        (&rig, json!({"chat_template_kwargs": 3}), "chat_template_kwargs", "invalid type"),
        (&rig, json!({"documents": ["x"]}), "documents", "invalid type"),
        (
            &rig,
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
            "needs add_generation_prompt to be false",
        ),
        (&unknown, json!({}), "tools", "--tool-call-parser"),
        (&rig, json!({"functions": [{}]}), "functions", "not supported"),
    ];
    for (rig, changes, param, fault) in cases {
        let answer = chat(rig, request(changes.clone())).await;
        assert_eq!(answer.status, 400, "{changes}");
        let error = &answer.json()["error"];
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().unwrap().contains(fault), "{error}");
    }
    assert_eq!(rig.prefill[0].taken(), 0);
}
