//! Tests of the Responses API, on simulated nodes.

#![allow(clippy::unwrap_used)]

mod support;

use overfill_simulated::{EOS, Options, bytes_as_tokens};
use serde_json::{Value, json};
use support::{Rig, rig_with, wait_for};

/// It asks for calls as Qwen's templates do, and shows all of a message.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}<tool_call>\n{\"name\"{% endif %}{% for m in messages %}<|turn|>{{ m.role }}: \
    {{ m.content }}{% for c in m.tool_calls %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}\n{% endfor %}\
    {% if add_generation_prompt %}<|turn|>assistant: {% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}";
const ANSWER: &str =
    "Hm.\n</think>\n\nI look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";

async fn rig(text: &str) -> Rig {
    let script = bytes_as_tokens(text).into_iter().chain([EOS]).collect();
    let mut options = Options { script: Some(script), ..Options::default() };
    options.files.chat_template = Some(TEMPLATE.as_bytes().to_vec());
    let options = [options];
    let flags = support::flags(&["--reasoning-parser=deepseek_r1"]).unwrap();
    rig_with(&options, &options, |c| c.requests = flags.requests).await
}

fn tool() -> Value {
    json!({"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": false})
}

/// A body without the ids and times that differ between two answers.
fn steady(mut value: Value) -> Value {
    match &mut value {
        Value::Object(fields) => {
            for (name, field) in fields.iter_mut() {
                let differs = ["id", "item_id", "call_id", "created_at", "completed_at", "sequence_number"];
                *field = if differs.contains(&name.as_str()) { json!("-") } else { steady(field.take()) };
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|entry| *entry = steady(entry.take())),
        _ => {}
    }
    value
}

#[tokio::test]
async fn an_answer_has_all_kinds_of_items() {
    let rig = rig(ANSWER).await;
    let request = json!({"model": "simulated", "instructions": "Be brief.", "input": "Weather?", "tools": [tool()],
                         "max_output_tokens": 500, "temperature": 0, "metadata": {"a": "b"}, "store": true});
    let answer = rig.post("/v1/responses", request.clone()).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let body = answer.json();
    for (id, prefix) in [(&body["id"], "resp_"), (&body["output"][0]["id"], "rs_"), (&body["output"][1]["id"], "msg_")]
    {
        assert!(id.as_str().unwrap().starts_with(prefix), "{id}");
    }
    assert!(body["created_at"].as_u64().unwrap() > 0 && body["completed_at"].as_u64().unwrap() > 0);
    assert!(body["output"][2]["call_id"].as_str().unwrap().starts_with("call_"));
    let tokens = ANSWER.len() + 1;
    let reasoning = "Hm.\n</think>".len();
    let usage = body["usage"].clone();
    assert_eq!(usage["output_tokens"], json!(tokens));
    assert_eq!(usage["total_tokens"].as_u64().unwrap(), usage["input_tokens"].as_u64().unwrap() + tokens as u64);
    let counted = usage["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap() as usize;
    assert!((3..=reasoning + 2).contains(&counted), "{counted}");
    assert_eq!(
        steady(body["output"].clone()),
        json!([
            {"id": "-", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}],
             "status": "completed"},
            {"id": "-", "type": "message", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
            {"id": "-", "type": "function_call", "call_id": "-", "name": "f", "arguments": "{\"a\": 1}", "status": "completed"},
        ])
    );
    for (field, value) in [
        ("object", json!("response")),
        ("status", json!("completed")),
        ("model", json!("simulated")),
        ("instructions", json!("Be brief.")),
        ("metadata", json!({"a": "b"})),
        ("max_output_tokens", json!(500)),
        ("store", json!(false)),
        ("tools", json!([tool()])),
        ("tool_choice", json!("auto")),
        ("parallel_tool_calls", json!(true)),
        ("temperature", json!(0.0)),
        ("text", json!({"format": {"type": "text"}})),
        ("error", Value::Null),
        ("incomplete_details", Value::Null),
    ] {
        assert_eq!(body[field], value, "{field}");
    }

    // The stream ends with the same answer.
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let answer = rig.post("/v1/responses", streamed).await;
    assert!(answer.header("content-type").starts_with("text/event-stream"));
    let events = answer.named_events();
    let sequence: Vec<Value> = events.iter().map(|event| event["sequence_number"].clone()).collect();
    assert_eq!(json!(sequence), json!((0..events.len()).collect::<Vec<_>>()));
    assert_eq!(steady(events.last().unwrap()["response"].clone()), steady(body.clone()));
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    let item = |delta: &'static str, done: &'static str| {
        [
            "response.output_item.added",
            "response.content_part.added",
            delta,
            done,
            "response.content_part.done",
            "response.output_item.done",
        ]
    };
    let wanted = [
        &["response.created", "response.in_progress"][..],
        &item("response.reasoning_text.delta", "response.reasoning_text.done"),
        &item("response.output_text.delta", "response.output_text.done"),
        &[
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
        ],
        &["response.output_item.done", "response.completed"],
    ];
    assert_eq!(kinds, wanted.concat());
    // Deltas make the text that the item has in the end, and events name their item.
    let of = |kind: &str| events.iter().filter(|event| event["type"] == kind).collect::<Vec<_>>();
    for (index, delta, text) in [
        (0, "response.reasoning_text.delta", "Hm."),
        (1, "response.output_text.delta", "I look."),
        (2, "response.function_call_arguments.delta", "{\"a\": 1}"),
    ] {
        let deltas = of(delta);
        assert_eq!(deltas.iter().map(|event| event["delta"].as_str().unwrap()).collect::<String>(), text);
        let done = &of("response.output_item.done")[index];
        assert!(deltas.iter().all(|e| e["output_index"] == index && e["item_id"] == done["item"]["id"]));
        let added = &of("response.output_item.added")[index]["item"];
        assert_eq!(
            (&added["id"], &added["call_id"], &added["status"]),
            (&done["item"]["id"], &done["item"]["call_id"], &json!("in_progress"))
        );
    }
    assert_eq!(of("response.created")[0]["response"]["output"], json!([]));
}

#[tokio::test]
async fn an_answer_that_is_cut_off_is_incomplete() {
    let rig = rig(ANSWER).await;
    let request = json!({"input": "x", "max_output_tokens": 22, "tools": [tool()]});
    let body = rig.post("/v1/responses", request.clone()).await.json();
    assert_eq!(
        (&body["status"], &body["incomplete_details"]),
        (&json!("incomplete"), &json!({"reason": "max_output_tokens"}))
    );
    let statuses = [0, 1].map(|i| body["output"][i]["status"].clone());
    assert_eq!(statuses, [json!("completed"), json!("incomplete")]);
    assert_eq!(body["usage"]["output_tokens"], 22);
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let events = rig.post("/v1/responses", streamed).await.named_events();
    assert_eq!(events.last().unwrap()["type"], "response.incomplete");
    assert_eq!(steady(events.last().unwrap()["response"].clone()), steady(body));
}

#[tokio::test]
async fn log_probabilities_belong_to_the_text() {
    let rig = rig("Hm.\n</think>\n\nab").await;
    let request = json!({"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 1, "stream": true});
    let events = rig.post("/v1/responses", request).await.named_events();
    let message = &events.last().unwrap()["response"]["output"][1];
    let listed = message["content"][0]["logprobs"].as_array().unwrap();
    let last = &listed[listed.len() - 1];
    assert_eq!((&last["token"], &last["logprob"], &last["bytes"]), (&json!("b"), &json!(-0.5), &json!([98])));
    assert_eq!(last["top_logprobs"].as_array().unwrap().len(), 1);
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let in_deltas: Vec<Value> = deltas.flat_map(|event| event["logprobs"].as_array().unwrap().clone()).collect();
    assert_eq!(&in_deltas, listed);
}

#[tokio::test]
async fn effort_none_is_an_answer_without_reasoning() {
    let rig = rig("Hello.").await;
    let request = json!({"input": [{"role": "user", "content": "x"}], "reasoning": {"effort": "none"}});
    let body = rig.post("/v1/responses", request).await.json();
    assert_eq!(body["output"].as_array().unwrap().len(), 1);
    assert_eq!(body["output"][0]["content"][0]["text"], "Hello.");
    assert_eq!(body["reasoning"], json!({"effort": "none"}));
}

#[tokio::test]
async fn failures_are_errors_or_the_last_event() {
    let rig = rig(ANSWER).await;
    for (request, status, param, fault) in [
        (json!({"model": "other", "input": "x"}), 404, "model", "the model \"other\" does not exist"),
        (
            json!({"input": "x", "previous_response_id": "resp_1"}),
            400,
            "previous_response_id",
            "nothing is stored here",
        ),
        (json!({"input": "x", "temperature": -1}), 400, "temperature", "temperature must be in [0, 100], got -1"),
    ] {
        let answer = rig.post("/v1/responses", request).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"]), (status, &json!(param)), "{}", answer.body);
        assert!(error["message"].as_str().unwrap().contains(fault), "{error}");
    }
    assert_eq!(rig.get("/v1/responses/resp_1").await.status, 404);
    assert_eq!(rig.get("/v1/responses").await.status, 405);
    assert_eq!(rig.prefill[0].taken() + rig.decode[0].taken(), 0);

    let options = [Options { script: Some(bytes_as_tokens("abc")), ..Options::default() }];
    let rig = rig_with(&options, &options, |c| c.max_attempts = 1).await;
    rig.decode[0].fail_after(3);
    let events = rig.post("/v1/responses", json!({"input": "x", "stream": true})).await.named_events();
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert_eq!(last["response"]["error"]["code"], "server_error");
    assert!(last["response"]["error"]["message"].as_str().unwrap().contains("gave up"));
    wait_for(async || rig.active() == 0).await;
}
