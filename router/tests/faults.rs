//! Tests of cancellation, overload and failing nodes.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use overfill_kv::{KvDtype, Role};
use overfill_proto::v1::{self, generate_event::Event, generate_request::Prompt};
use overfill_router::Config;
use overfill_simulated::{Options, SimulatedNode};
use serde_json::json;
use support::{Rig, receive, rig, rig_with, unready_rig, wait_for};
use tokio::io::AsyncReadExt as _;

fn slow() -> Options {
    Options { token_time: Duration::from_millis(2), ..Options::default() }
}

async fn generate(rig: &Rig, max_tokens: u32) -> Result<(String, Vec<u32>, v1::GenerateFinished), tonic::Status> {
    let request = v1::GenerateRequest { prompt: Some(Prompt::Text("hello".into())), max_tokens, ..Default::default() };
    let mut events = rig.client().await.generate(request).await?.into_inner();
    let (mut text, mut ids) = (String::new(), Vec::new());
    while let Some(event) = events.message().await? {
        match event.event.unwrap() {
            Event::Token(token) => {
                text += &token.text;
                ids.push(token.token.unwrap().token);
            }
            Event::Finished(finished) => return Ok((text + &finished.text, ids, finished)),
            Event::PromptLogprobs(_) => panic!("nobody asked for them"),
        }
    }
    panic!("the stream ended without a finished event")
}

#[tokio::test]
async fn a_request_over_grpc_reports_its_way() {
    let rig = rig(Options::default()).await;
    let (text, ids, finished) = generate(&rig, 40).await.unwrap();
    assert_eq!((text.len(), ids.len(), finished.completion_tokens), (40, 40, 40));
    assert_eq!(finished.reason(), v1::FinishReason::Length);
    let timings = finished.timings.unwrap();
    assert_eq!((timings.migrations, timings.handoff.unwrap().bytes), (0, 1024));
    assert!(timings.prefill_node != timings.decode_node && timings.ttft_seconds > 0.0);
}

/// Names and seconds of the legs, in order. The names are those of the metrics.
fn legs(finished: &v1::GenerateFinished) -> [(&'static str, f64); 8] {
    let legs = finished.timings.as_ref().unwrap().legs.unwrap();
    [
        ("tokenize", legs.tokenize_seconds),
        ("queue", legs.queue_seconds),
        ("reserve", legs.reserve_seconds),
        ("prefill_queue", legs.prefill_queue_seconds),
        ("prefill", legs.prefill_seconds),
        ("handoff", legs.handoff_seconds),
        ("first_decode_step", legs.first_decode_step_seconds),
        ("decode", legs.decode_seconds),
    ]
}

#[tokio::test]
async fn timings_and_metrics_tell_the_legs_of_a_request() {
    let rig = rig(slow()).await;
    let count = async |leg: &str| {
        let labels = format!("{{leg=\"{leg}\",model_name=\"simulated\"}}");
        rig.metric(&format!("overfill_request_leg_seconds_count{labels}")).await
    };
    let (_, _, finished) = generate(&rig, 10).await.unwrap();
    for (leg, seconds) in legs(&finished) {
        assert!(seconds > 0.0, "{leg}");
        assert_eq!(count(leg).await, 1.0, "{leg}");
    }
    let sum: f64 = legs(&finished).iter().map(|(_, seconds)| seconds).sum();
    assert!(sum <= finished.timings.unwrap().total_seconds);

    // A single token does not need a decode node.
    let (_, _, finished) = generate(&rig, 1).await.unwrap();
    for (leg, seconds) in legs(&finished) {
        let taken = !["handoff", "first_decode_step", "decode"].contains(&leg);
        assert_eq!((seconds > 0.0, count(leg).await), (taken, if taken { 2.0 } else { 1.0 }), "{leg}");
    }
}

#[tokio::test]
async fn a_request_that_fails_has_legs_too() {
    let rig = rig_with(&[slow()], &[slow()], |c| c.max_attempts = 1).await;
    rig.decode[0].fail_after(3);
    assert_eq!(rig.complete(json!({"prompt": [68], "max_tokens": 20})).await.status, 503);
    let metrics = rig.get("/metrics").await.body;
    for leg in ["queue", "reserve", "prefill_queue", "prefill", "handoff", "first_decode_step", "decode"] {
        let series = format!("overfill_request_leg_seconds_count{{leg=\"{leg}\",model_name=\"simulated\"}} 1");
        assert!(metrics.contains(&series), "{leg}: {metrics}");
    }
    // A prompt of token ids does not need the tokenizer.
    let none = "overfill_request_leg_seconds_count{leg=\"tokenize\",model_name=\"simulated\"} 0";
    assert!(metrics.contains(none), "{metrics}");
}

#[tokio::test]
async fn a_decode_node_may_speak_before_the_first_token() {
    let late = Options { report_delay: Duration::from_millis(50), ..Options::default() };
    let rig = rig(late).await;
    let (_, ids, finished) = generate(&rig, 40).await.unwrap();
    assert_eq!((ids.len(), finished.timings.unwrap().migrations), (40, 0));
    assert_eq!(ids, generate(&support::rig(Options::default()).await, 40).await.unwrap().1);
    assert_eq!((rig.prefill[0].taken(), rig.decode[0].taken()), (1, 1));
}

#[tokio::test]
async fn a_failing_decode_node_is_replaced_without_a_repeated_token() {
    let rig = rig_with(&[slow()], &[slow(), slow()], |_| {}).await;
    let (text, ids, _) = generate(&rig, 40).await.unwrap();
    for _ in 0..2 {
        for node in &rig.decode {
            node.fail_after(7);
        }
        let (again, same, finished) = generate(&rig, 40).await.unwrap();
        assert_eq!((again, same), (text.clone(), ids.clone()));
        assert!(finished.timings.unwrap().migrations >= 1);
    }
    assert!(rig.metric("overfill_migrations_total{model_name=\"simulated\"}").await >= 2.0);
    wait_for(async || rig.active() == 0).await;
}

#[tokio::test]
async fn a_failing_prefill_node_is_replaced() {
    let rig = rig_with(&[slow(), slow()], &[slow()], |_| {}).await;
    rig.prefill.iter().for_each(|node| node.fail_after(0));
    let (_, ids, finished) = generate(&rig, 10).await.unwrap();
    assert_eq!(ids.len(), 10);
    assert!(finished.timings.unwrap().migrations >= 1);
}

/// The node still returns first tokens, but these do not count as success.
#[tokio::test]
async fn a_prefill_node_whose_handoffs_are_lost_is_left_alone() {
    let rig = rig_with(&[slow(), slow()], &[slow()], |_| {}).await;
    let (_, ids, _) = generate(&rig, 10).await.unwrap();
    // Prefix affinity sends the same prompt to the same node again.
    let node = rig.prefill.iter().find(|node| node.taken() > 0).unwrap();
    node.set_losing(true);
    let before = node.taken();
    for _ in 0..20 {
        assert_eq!(generate(&rig, 10).await.unwrap().1, ids);
    }
    // A few requests until the breaker opens, then occasional probes.
    let taken = node.taken() - before;
    assert!((1..12).contains(&taken), "{taken}");
}

#[tokio::test]
async fn attempts_are_bounded_and_the_end_is_never_silent() {
    let rig = rig_with(&[Options::default()], &[Options::default()], |c| c.max_attempts = 1).await;
    rig.decode[0].fail_after(3);
    let answer = rig.complete(json!({"prompt": "x", "max_tokens": 20, "stream": true})).await;
    let events = answer.events();
    assert_eq!(events.iter().filter(|e| e["choices"].is_array()).count(), 4);
    let message = events.last().unwrap()["error"]["message"].as_str().unwrap();
    assert!(message.contains("gave up after 1 attempts") && message.contains("simulated failure"), "{message}");

    rig.decode[0].fail_after(3);
    let answer = rig.complete(json!({"prompt": "x", "max_tokens": 20})).await;
    assert_eq!(answer.status, 503);
    wait_for(async || rig.active() == 0).await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_both_nodes() {
    let rig = rig(Options::default()).await;
    for stream in [true, false] {
        for paused in [&rig.decode[0], &rig.prefill[0]] {
            let before = rig.decode[0].taken();
            paused.set_paused(true);
            let body = json!({"prompt": "x", "max_tokens": 20, "stream": stream}).to_string();
            let mut connection = rig.send("POST", "/v1/completions", &body).await;
            wait_for(async || rig.decode[0].taken() > before && rig.active() >= 1).await;
            if stream && std::ptr::eq(paused, &rig.decode[0]) {
                // The first token does not wait for the decode node.
                let mut start = [0; 12];
                connection.read_exact(&mut start).await.unwrap();
                assert_eq!(&start, b"HTTP/1.1 200");
            }
            drop(connection);
            wait_for(async || rig.active() == 0).await;
            paused.set_paused(false);
            assert_eq!(rig.metric("vllm:num_requests_running").await, 0.0);
        }
    }
    // gRPC: dropping the stream is enough.
    rig.decode[0].set_paused(true);
    let request = v1::GenerateRequest { prompt: Some(Prompt::Text("x".into())), max_tokens: 9, ..Default::default() };
    let mut events = rig.client().await.generate(request).await.unwrap().into_inner();
    events.message().await.unwrap().unwrap();
    drop(events);
    wait_for(async || rig.active() == 0).await;
    let aborted = "vllm:request_success_total{finished_reason=\"abort\",model_name=\"simulated\"}";
    wait_for(async || rig.metric(aborted).await == 5.0).await;
}

#[tokio::test]
async fn a_full_queue_is_429_and_waiting_ones_get_their_turn() {
    let options = [Options::default()];
    let rig = rig_with(&options, &options, |c| (c.max_running, c.max_waiting) = (1, 1)).await;
    rig.decode[0].set_paused(true);
    let body = json!({"prompt": "x", "max_tokens": 3}).to_string();
    let first = rig.send("POST", "/v1/completions", &body).await;
    wait_for(async || rig.metric("vllm:num_requests_running").await == 1.0).await;
    let second = rig.send("POST", "/v1/completions", &body).await;
    wait_for(async || rig.metric("vllm:num_requests_waiting").await == 1.0).await;
    let third = receive(rig.send("POST", "/v1/completions", &body).await).await;
    assert_eq!(third.status, 429);
    assert!(third.head.contains("retry-after: 1"), "{}", third.head);
    assert_eq!(third.json()["error"]["code"], "rate_limit_exceeded");
    let status = generate(&rig, 3).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    rig.decode[0].set_paused(false);
    assert_eq!((receive(first).await.status, receive(second).await.status), (200, 200));
}

#[tokio::test]
async fn a_model_whose_node_is_busy_keeps_nobody_from_others() {
    let other = Options { model: "other".into(), ..Options::default() };
    let rig = rig_with(&[Options::default()], &[Options::default(), other], |c| {
        (c.max_running, c.max_waiting) = (1, 1);
    })
    .await;
    rig.decode[0].set_paused(true);
    let body = |model: &str| json!({"model": model, "prompt": "x", "max_tokens": 3});
    let send = async || rig.send("POST", "/v1/completions", &body("simulated").to_string()).await;
    let running = send().await;
    wait_for(async || rig.metric("vllm:num_requests_running").await == 1.0).await;
    let waiting = send().await;
    wait_for(async || rig.metric("vllm:num_requests_waiting").await == 1.0).await;
    assert_eq!(receive(send().await).await.status, 429);
    assert_eq!(rig.complete(body("other")).await.status, 200);
    rig.decode[0].set_paused(false);
    assert_eq!((receive(running).await.status, receive(waiting).await.status), (200, 200));
}

#[tokio::test]
async fn too_many_connections_are_503_and_probes_get_in() {
    let options = [Options::default()];
    let rig = rig_with(&options, &options, |c| c.max_connections = 1).await;
    rig.decode[0].set_paused(true);
    let body = json!({"prompt": "x", "max_tokens": 3}).to_string();
    let first = rig.send("POST", "/v1/completions", &body).await;
    wait_for(async || rig.metric("vllm:num_requests_running").await == 1.0).await;
    let second = receive(rig.send("POST", "/v1/completions", &body).await).await;
    assert_eq!(second.status, 503, "{}", second.body);
    assert!(second.head.contains("retry-after: 1"), "{}", second.head);
    assert_eq!(receive(rig.send("GET", "/ready", "").await).await.status, 200);
    rig.decode[0].set_paused(false);
    assert_eq!(receive(first).await.status, 200);
    assert_eq!(receive(rig.send("POST", "/v1/completions", &body).await).await.status, 200);
}

#[tokio::test]
async fn nodes_without_room_are_waited_for() {
    let options = [Options::default()];
    let rig = rig_with(&options, &options, |c| c.max_queue = Duration::from_millis(200)).await;
    rig.decode[0].set_full(true);
    let answer = rig.complete(json!({"prompt": "x", "max_tokens": 3})).await;
    assert_eq!(answer.status, 429, "{}", answer.body);
    assert!(answer.body.contains("0 blocks are free"), "{}", answer.body);

    let rig = support::rig(Options::default()).await;
    rig.decode[0].set_full(true);
    let waiting = rig.send("POST", "/v1/completions", &json!({"prompt": "x", "max_tokens": 3}).to_string()).await;
    wait_for(async || rig.metric("vllm:num_requests_running").await == 1.0).await;
    rig.decode[0].set_full(false);
    assert_eq!(receive(waiting).await.status, 200);
}

#[tokio::test]
async fn a_router_without_nodes_lists_what_it_is_to_serve_and_lets_requests_wait() {
    let configure = |c: &mut Config| {
        (c.served_models, c.max_waiting) = (vec!["simulated".into()], 1);
        c.prefill_urls = vec!["http://127.0.0.1:1".into()];
    };
    let mut rig = unready_rig(&[], &[Options::default()], configure).await;
    assert_eq!(rig.get("/v1/models").await.json()["data"][0]["id"], "simulated");
    assert_eq!(rig.get("/v1/models/simulated").await.status, 200);
    let mut client = rig.client().await;
    let models = client.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    assert_eq!((models.len(), models[0].name.as_str()), (1, "simulated"));
    let ready = rig.get("/ready").await;
    assert_eq!((ready.status, rig.get("/health").await.status), (200, 503));
    assert!(ready.body.starts_with("requests wait: no prefill node takes requests"), "{}", ready.body);

    // A request for an unknown model fails at once. A request for a configured model waits. The next one finds the queue
    // full.
    assert_eq!(rig.complete(json!({"model": "other", "prompt": "x"})).await.status, 404);
    let body = json!({"model": "simulated", "prompt": "x", "max_tokens": 3}).to_string();
    let waiting = rig.send("POST", "/v1/completions", &body).await;
    wait_for(async || rig.metric("vllm:num_requests_waiting").await == 1.0).await;
    let full = receive(rig.send("POST", "/v1/completions", &body).await).await;
    assert_eq!(full.status, 429, "{}", full.body);
    // A client that disconnects frees its place in the queue.
    drop(waiting);
    wait_for(async || rig.metric("vllm:num_requests_waiting").await == 0.0).await;
    rig.decode.clear();
}

#[tokio::test]
async fn a_request_that_waited_for_the_first_nodes_is_served_or_told_to_come_back() {
    let spare = SimulatedNode::prefill(Options::default()).await.unwrap();
    let address = spare.url.replace("http://", "");
    drop(spare);
    let with_prefill = |c: &mut Config| c.prefill_urls = vec![format!("http://{address}")];
    // Without configured models, any model may still be served later.
    let mut rig = unready_rig(&[], &[Options::default()], with_prefill).await;
    let waiting = rig.send("POST", "/v1/completions", &json!({"prompt": "x", "max_tokens": 3}).to_string()).await;
    wait_for(async || rig.metric("vllm:num_requests_waiting").await == 1.0).await;
    let mut listener = None;
    wait_for(async || {
        listener = tokio::net::TcpListener::bind(&address).await.ok();
        listener.is_some()
    })
    .await;
    rig.prefill.push(SimulatedNode::serve(listener.unwrap(), Role::Prefill, Options::default()).unwrap());
    assert_eq!(receive(waiting).await.status, 200);

    let short = |c: &mut Config| (c.served_models, c.max_queue) = (vec!["m".into()], Duration::from_millis(50));
    let rig = unready_rig(&[], &[], short).await;
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let body = json!({"model": "m", "prompt": "x", "messages": []}).to_string();
        let answer = receive(rig.send("POST", path, &body).await).await;
        assert_eq!(answer.status, 503, "{}", answer.body);
        assert!(answer.head.contains("retry-after: 1"), "{}", answer.head);
    }
    let request = v1::GenerateRequest { model: "m".into(), ..Default::default() };
    let status = rig.client().await.generate(request).await.unwrap_err();
    assert_eq!((status.code(), status.metadata().contains_key("retry-after")), (tonic::Code::Unavailable, true));
}

#[tokio::test]
async fn nodes_that_may_not_share_kv_are_named() {
    let mut other = Options::default();
    other.schema.dtype = KvDtype::Bf16;
    let rig = unready_rig(&[Options::default()], &[other], |c| c.max_queue = Duration::from_millis(200)).await;
    let mut client = rig.client().await;
    wait_for(async || {
        let nodes = client.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes;
        nodes.iter().any(|n| n.error.contains("dtype is F32 on the prefill side and Bf16 on the decode side"))
    })
    .await;
    let answer = rig.complete(json!({"prompt": "x"})).await;
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("kv schema mismatch"), "{}", answer.body);
    assert!(answer.head.contains("retry-after"));
    assert_eq!(rig.get("/health").await.status, 503);
}

#[tokio::test]
async fn a_conversation_stays_on_its_prefill_node() {
    let rig = rig_with(&[slow(), slow()], &[slow()], |_| {}).await;
    let mut prompt = vec![68; 64];
    for _ in 0..4 {
        rig.complete(json!({"prompt": prompt, "max_tokens": 2})).await;
        prompt.extend([69; 32]);
    }
    let mut taken: Vec<_> = rig.prefill.iter().map(|n| n.taken()).collect();
    taken.sort_unstable();
    assert_eq!(taken, [0, 4]);
}

#[tokio::test]
async fn a_node_that_is_away_is_waited_for_and_found_again() {
    let mut rig = rig(Options::default()).await;
    let address = rig.decode.remove(0).url.replace("http://", "");
    wait_for(async || rig.get("/health").await.status == 503).await;
    let waiting = rig.send("POST", "/v1/completions", &json!({"prompt": "x", "max_tokens": 3}).to_string()).await;
    wait_for(async || rig.metric("vllm:num_requests_running").await == 1.0).await;
    // The old listener may stay open for a moment.
    let mut listener = None;
    wait_for(async || {
        listener = tokio::net::TcpListener::bind(&address).await.ok();
        listener.is_some()
    })
    .await;
    rig.decode.push(SimulatedNode::serve(listener.unwrap(), Role::Decode, Options::default()).unwrap());
    assert_eq!(receive(waiting).await.status, 200);
    assert_eq!(rig.get("/health").await.status, 200);
}

#[tokio::test]
async fn a_node_whose_engine_hangs_is_left_and_taken_back() {
    let rig = rig_with(&[Options::default()], &[Options::default(), Options::default()], |_| {}).await;
    let (_, ids, _) = generate(&rig, 40).await.unwrap();
    rig.decode.iter().for_each(|node| node.set_paused(true));
    let mut events = {
        let prompt = Some(Prompt::Text("hello".into()));
        let request = v1::GenerateRequest { prompt, max_tokens: 40, ..Default::default() };
        rig.client().await.generate(request).await.unwrap().into_inner()
    };
    wait_for(async || rig.decode.iter().any(|node| node.active() > 0)).await;
    let (hung, other) = match rig.decode[0].active() {
        0 => (&rig.decode[1], &rig.decode[0]),
        _ => (&rig.decode[0], &rig.decode[1]),
    };
    other.set_paused(false);
    hung.set_stalled(true);
    let mut same = Vec::new();
    let migrations = loop {
        match events.message().await.unwrap().unwrap().event.unwrap() {
            Event::Token(token) => same.push(token.token.unwrap().token),
            Event::Finished(finished) => break finished.timings.unwrap().migrations,
            Event::PromptLogprobs(_) => panic!("nobody asked for them"),
        }
    };
    assert_eq!((same, migrations), (ids, 1));
    assert_eq!(rig.metric("overfill_nodes{pool=\"decode\",role=\"decode\",state=\"up\"}").await, 1.0);
    assert_eq!(rig.metric("overfill_nodes{pool=\"decode\",role=\"decode\",state=\"stalled\"}").await, 1.0);
    hung.set_paused(false);
    hung.set_stalled(false);
    wait_for(async || rig.metric("overfill_nodes{pool=\"decode\",role=\"decode\",state=\"up\"}").await == 2.0).await;
}

#[tokio::test]
async fn a_node_that_gives_no_token_is_given_up() {
    let two = [Options::default(), Options::default()];
    let rig = rig_with(&two[..1], &two, |c| c.progress_timeout = Duration::from_millis(300)).await;
    let (_, ids, _) = generate(&rig, 40).await.unwrap();
    // Pauses both decode nodes, and resumes the one that was not chosen.
    let stuck = async {
        rig.decode.iter().for_each(|node| node.set_paused(true));
        wait_for(async || rig.decode.iter().any(|node| node.active() > 0)).await;
        let other = rig.decode.iter().find(|node| node.active() == 0).unwrap();
        other.set_paused(false);
    };
    let (answer, ()) = tokio::join!(generate(&rig, 40), stuck);
    let (_, same, finished) = answer.unwrap();
    assert_eq!((same, finished.timings.unwrap().migrations), (ids, 1));
}

#[tokio::test]
async fn retries_over_the_budget_wait_and_are_given_up_in_the_end() {
    // `max_queue` is longer than the pause of a node after a failure.
    let change = |c: &mut Config| {
        (c.min_retries_per_second, c.max_queue) = (0, Duration::from_secs(3));
    };
    let rig = rig_with(&[Options::default()], &[Options::default()], change).await;
    rig.decode[0].fail_after(7);
    let status = generate(&rig, 40).await.unwrap_err();
    assert!(status.message().contains("too many other requests failed"), "{status:?}");
    // Each of these requests adds a fifth of a retry to the budget.
    for _ in 0..5 {
        generate(&rig, 3).await.unwrap();
    }
    rig.decode[0].fail_after(7);
    assert_eq!(generate(&rig, 40).await.unwrap().2.timings.unwrap().migrations, 1);
}
