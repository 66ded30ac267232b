//! Tests of what all routes have in common: keys, compressed bodies, other origins, slashes; and of the small routes.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write as _;

use flate2::{Compression, write::GzEncoder};
use overfill_simulated::{Options, bytes_as_tokens};
use serde_json::{Value, json};
use support::{Answer, Rig, receive, rig, rig_with, unready_rig, wait_for};

const LIMIT: usize = 20_000;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

async fn post_packed(rig: &Rig, encoding: &str, body: &[u8]) -> Answer {
    receive(rig.send_with("POST", "/v1/completions", &[("content-encoding", encoding)], body).await).await
}

async fn send(rig: &Rig, method: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
    receive(rig.send_with(method, path, headers, body.to_string().as_bytes()).await).await
}

async fn rig_with_keys(change: impl FnOnce(&mut overfill_router::Config)) -> Rig {
    let options = [Options::default()];
    let rig = unready_rig(&options, &options, change).await;
    wait_for(async || rig.get("/health").await.status == 200).await;
    rig
}

fn message(answer: &Answer) -> String {
    answer.json()["error"]["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn bodies_may_be_compressed() {
    let rig = rig_with(&[Options::default()], &[Options::default()], |c| c.max_body_bytes = LIMIT).await;
    let request = json!({"prompt": "hello", "max_tokens": 5, "temperature": 0}).to_string();
    let plain = post_packed(&rig, "identity", request.as_bytes()).await.json();
    // Several members are one body.
    let (first, second) = request.as_bytes().split_at(10);
    for body in [gzip(request.as_bytes()), [gzip(first), gzip(second)].concat()] {
        let answer = post_packed(&rig, "GZIP", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert_eq!(answer.json()["choices"], plain["choices"]);
    }
    // Spaces up to the limit are fine. One byte more is not.
    let mut padded = request.clone() + &" ".repeat(LIMIT - request.len());
    assert_eq!(post_packed(&rig, "gzip", &gzip(padded.as_bytes())).await.status, 200);
    padded.push(' ');
    assert_eq!(post_packed(&rig, "gzip", &gzip(padded.as_bytes())).await.status, 413);
    // A bomb: 19 KB that would become 20 MB.
    let bomb = gzip(&vec![b' '; 20 << 20]);
    assert!(bomb.len() > LIMIT && bomb.len() < 2 * LIMIT, "{}", bomb.len());
    assert_eq!(post_packed(&rig, "gzip", &bomb).await.status, 413);

    // Members without content unpack to nothing, but they are not free.
    let mut endless = gzip(b"").repeat(LIMIT / gzip(b"").len() + 1);
    endless.extend(gzip(request.as_bytes()));
    assert!(!(200..300).contains(&post_packed(&rig, "gzip", &endless).await.status));

    let whole = gzip(request.as_bytes());
    for broken in [request.as_bytes(), &whole[..whole.len() - 9], b""] {
        let answer = post_packed(&rig, "gzip", broken).await;
        assert_eq!(answer.status, 400, "{}", answer.body);
    }
    for encoding in ["br", "deflate", "gzip, gzip"] {
        let answer = post_packed(&rig, encoding, &whole).await;
        assert_eq!(answer.status, 415);
        assert_eq!(message(&answer), format!("content-encoding must be gzip or identity, got {encoding}"));
    }
    let twice = [("content-encoding", "gzip"), ("content-encoding", "identity")];
    assert_eq!(send(&rig, "POST", "/v1/completions", &twice, &json!({})).await.status, 415);
}

#[tokio::test]
async fn web_pages_of_allowed_origins_may_ask() {
    let none = rig(Options::default()).await;
    let origin = ("origin", "https://a.com");
    let asks = [origin, ("access-control-request-method", "POST"), ("access-control-request-headers", "authorization")];
    let answer = send(&none, "OPTIONS", "/v1/completions", &asks, &json!("")).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (405, ""));
    let answer = send(&none, "GET", "/v1/models", &[origin], &json!("")).await;
    assert_eq!((answer.status, answer.head.contains("access-control")), (200, false));

    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.json");
    std::fs::write(&keys, r#"[{"name": "a", "key": "key-of-a-0123456789"}]"#).unwrap();
    let args = |origins: &'static [&'static str]| {
        let keys = keys.clone();
        move |c: &mut overfill_router::Config| {
            c.allowed_origins = origins.iter().map(|origin| origin.parse().unwrap()).collect();
            c.api_keys = Some(overfill_router::ApiKeys::load(keys).unwrap());
        }
    };
    let some = rig_with_keys(args(&["https://a.com", "http://localhost:3000"])).await;
    // The question before the request has no key.
    let answer = send(&some, "OPTIONS", "/v1/completions", &asks, &json!("")).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, "https://a.com"));
    assert_eq!(answer.header("access-control-allow-methods"), "get,post");
    assert_eq!(answer.header("access-control-allow-headers"), "authorization");
    // Errors can be read as well.
    let answer = send(&some, "POST", "/v1/completions", &[origin], &json!({})).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (401, "https://a.com"));
    let key = ("authorization", "Bearer key-of-a-0123456789");
    let answer = send(&some, "POST", "/v1/completions", &[origin, key], &json!({"prompt": "x", "max_tokens": 2})).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, "https://a.com"));
    let other = [("origin", "https://b.com"), asks[1]];
    let answer = send(&some, "OPTIONS", "/v1/completions", &other, &json!("")).await;
    assert_eq!(answer.header("access-control-allow-origin"), "");
    // The page can drain nodes. Other origins are never let in there.
    for path in ["/page/state", "/metrics"] {
        let answer = send(&some, "GET", path, &[origin, key], &json!("")).await;
        assert_eq!((answer.status, answer.head.contains("access-control")), (200, false), "{path}");
    }
    let all = rig_with_keys(args(&["*"])).await;
    let answer = send(&all, "OPTIONS", "/v1/completions", &other, &json!("")).await;
    assert_eq!(answer.header("access-control-allow-origin"), "*");
}

#[tokio::test]
async fn keys_and_limits_hold_for_every_route() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.json");
    let file = r#"[{"name": "a", "key": "key-of-a-0123456789"},
                   {"name": "b", "key": "key-of-b-0123456789", "requests_per_minute": 1}]"#;
    std::fs::write(&keys, file).unwrap();
    let change = |c: &mut overfill_router::Config| {
        c.api_keys = Some(overfill_router::ApiKeys::load(keys).unwrap());
        c.max_body_bytes = LIMIT;
    };
    let rig = rig_with_keys(change).await;
    let key = ("authorization", "Bearer key-of-a-0123456789");
    for (path, field) in
        [("/v1/completions", "prompt"), ("/v1/chat/completions", "x"), ("/tokenize", "prompt"), ("/detokenize", "x")]
    {
        let body = json!({field: "x", "tokens": [70], "messages": [{"role": "user", "content": "hi"}]});
        let answer = send(&rig, "POST", path, &[], &body).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (401, &json!("invalid_api_key")), "{path}");
        let long = json!({"prompt": "x".repeat(30_000)});
        assert_eq!(send(&rig, "POST", path, &[key], &long).await.status, 413, "{path}");
        let slow = [key, ("x-overfill-timeout-seconds", "0")];
        assert_eq!(send(&rig, "POST", path, &slow, &body).await.status, 400, "{path}");
    }
    for path in ["/v1/models", "/v1/models/simulated", "/version", "/tokenizer_info"] {
        assert_eq!(send(&rig, "GET", path, &[], &json!("")).await.status, 401, "{path}");
        assert_eq!(send(&rig, "GET", path, &[key], &json!("")).await.status, 200, "{path}");
    }
    let key = ("authorization", "Bearer key-of-b-0123456789");
    let statuses = [
        send(&rig, "POST", "/tokenize", &[key], &json!({"prompt": "x"})).await.status,
        send(&rig, "POST", "/detokenize", &[key], &json!({"tokens": [70]})).await.status,
        send(&rig, "POST", "/v1/completions", &[key], &json!({"prompt": "x"})).await.status,
    ];
    assert_eq!(statuses, [200, 429, 429]);
}

#[tokio::test]
async fn slashes_at_the_end_make_no_difference() {
    let mut options = Options { model: "org/model/v1".into(), ..Options::default() };
    options.schema.full_model = Some("simulated".into());
    let rig = rig(options).await;
    for path in ["/v1/models/", "/v1/models/org/model/v1", "/v1/models/org/model/v1/", "/health/", "/version/?a=b"] {
        assert_eq!(rig.get(path).await.status, 200, "{path}");
    }
    let answer = rig.post("/v1/completions/", json!({"prompt": "x", "max_tokens": 2, "model": "org/model/v1"})).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(rig.get("/v1/models/org/model").await.status, 404);
    assert_eq!(rig.get("/page/").await.status, 200);
    assert_eq!(rig.get("/page").await.status, 308);
    assert_eq!(rig.get("/").await.status, 404);
}

#[tokio::test]
async fn text_to_tokens_and_back() {
    let rig = rig(Options::default()).await;
    let text = "Grüße <|turn|>";
    let mut tokens = bytes_as_tokens("Grüße ");
    tokens.push(2);
    let answer = rig.post("/tokenize", json!({"model": "simulated", "prompt": text})).await.json();
    assert_eq!(answer, json!({"count": 9, "max_model_len": 4096, "tokens": tokens, "token_strs": null}));
    let answer = rig.post("/tokenize", json!({"prompt": text, "return_token_strs": true})).await.json();
    assert_eq!(answer["token_strs"], json!(["G", "r", "Ã", "¼", "Ã", "Ł", "e", "Ġ", "<|turn|>"]));
    let answer = rig.post("/detokenize", json!({"tokens": tokens})).await.json();
    assert_eq!(answer, json!({"prompt": text}));
    assert_eq!(rig.post("/detokenize", json!({"tokens": []})).await.json(), json!({"prompt": ""}));

    let chat = json!({"messages": [{"role": "user", "content": "hi"}]});
    let rendered = rig.post("/tokenize", chat.clone()).await.json();
    let prompt = rig.post("/detokenize", json!({"tokens": rendered["tokens"]})).await.json();
    assert_eq!(prompt["prompt"], "<|bos|><|turn|>user: hi\n");
    let mut request = chat;
    (request["max_tokens"], request["return_token_ids"]) = (json!(1), json!(true));
    let answer = rig.post("/v1/chat/completions", request).await.json();
    assert_eq!(answer["prompt_token_ids"], rendered["tokens"]);

    let info = rig.get("/tokenizer_info?model=simulated").await.json();
    assert_eq!((&info["bos_token"], &info["eos_token"]), (&json!("<|bos|>"), &json!("<|eos|>")));
    assert_eq!(rig.get("/tokenizer_info").await.json(), info);
    let unknown = rig.get("/tokenizer_info?model=b").await;
    assert_eq!((unknown.status, &unknown.json()["error"]["param"]), (404, &json!("model")));

    let many: Vec<u32> = std::iter::repeat_n(70, 10_000).collect();
    let answer = rig.post("/detokenize", json!({"tokens": many})).await.json();
    assert_eq!(answer["prompt"].as_str().unwrap().len(), 10_000);

    for (path, request, status, param, fault) in [
        ("/tokenize", json!({}), 400, "prompt", "prompt or messages is missing"),
        ("/tokenize", json!({"prompt": "a", "messages": []}), 400, "prompt", "prompt and messages exclude each other"),
        ("/tokenize", json!({"messages": []}), 400, "messages", "messages must have at least one message, got 0"),
        ("/tokenize", json!({"prompt": "a", "model": "b"}), 404, "model", "the model \"b\" does not exist"),
        ("/tokenize", json!({"prompt": 3}), 400, "prompt", "prompt: invalid type"),
        ("/detokenize", json!({}), 400, "tokens", "tokens is missing"),
        ("/detokenize", json!({"tokens": [3, 259]}), 400, "tokens", "tokens must be of token ids below 259, got 259"),
        ("/detokenize", json!({"tokens": [-1]}), 400, "tokens", "got -1"),
    ] {
        let answer = rig.post(path, request).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (status, &json!(param)));
        assert!(message(&answer).contains(fault), "{}", answer.body);
    }
}
