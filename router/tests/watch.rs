//! Tests of the watch: the full model scores answers in mode draft when they have ended.

#![allow(clippy::unwrap_used)]

mod support;

use overfill_proto::v1::{self, generate_event::Event, generate_request::Prompt};
use overfill_simulated::Options;
use serde_json::{Value, json};
use support::{Rig, rig_with, wait_for};

async fn watching(prefill: Options, decode: Options) -> Rig {
    rig_with(&[prefill], &[decode], |config| config.requests.watch_share = 1.0).await
}

async fn answers(rig: &Rig, result: &str) -> f64 {
    rig.metric(&format!("overfill_watch_answers_total{{model_name=\"simulated\",result=\"{result}\"}}")).await
}

async fn summary(rig: &Rig) -> Value {
    rig.get("/page/state").await.json()["models"][0]["watch"].clone()
}

#[tokio::test]
async fn an_answer_with_the_full_models_tokens_is_equal() {
    let rig = watching(Options::default(), Options::default()).await;
    assert_eq!(summary(&rig).await, Value::Null);
    rig.complete(json!({"prompt": "hello", "max_tokens": 40})).await;
    wait_for(async || answers(&rig, "equal").await == 1.0).await;
    // The first token is the full model's own. A simulated decode node says -0.5, a score -1.5.
    for (name, value) in [
        ("overfill_watch_tokens_total", 39.0),
        ("overfill_watch_agreed_tokens_total", 39.0),
        ("overfill_watch_decode_nats_total", 19.5),
        ("overfill_watch_full_nats_total", 58.5),
        ("overfill_watch_parted_at_tokens_count", 0.0),
    ] {
        assert_eq!(rig.metric(name).await, value, "{name}");
    }
    let expected = json!({"answers": 1, "tokens": 39, "agreement": 1.0, "logprob_gap_nats": 1.0, "parted_answers": 0,
                          "median_parted_at_tokens": 0});
    assert_eq!(summary(&rig).await, expected);
    wait_for(async || rig.active() == 0).await;
}

#[tokio::test]
async fn an_answer_parts_where_the_full_model_would_go_on_in_another_way() {
    let script = |tokens: &[u8]| Options {
        script: Some(tokens.iter().map(|byte| u32::from(*byte) + 3).collect()),
        ..Options::default()
    };
    let rig = watching(script(b"abcdefgh"), script(b"abcdXfYh")).await;
    rig.complete(json!({"prompt": "hello", "max_tokens": 8})).await;
    wait_for(async || answers(&rig, "parted").await == 1.0).await;
    let summary = summary(&rig).await;
    assert_eq!((&summary["tokens"], &summary["parted_answers"]), (&json!(7), &json!(1)));
    assert_eq!((&summary["agreement"], &summary["median_parted_at_tokens"]), (&json!(5.0 / 7.0), &json!(5)));
}

#[tokio::test]
async fn clients_see_only_the_log_probabilities_that_they_asked_for() {
    let rig = watching(Options::default(), Options::default()).await;
    for logprobs in [None, Some(0)] {
        let sampling = Some(v1::SamplingParams { top_p: 1.0, repetition_penalty: 1.0, logprobs, ..Default::default() });
        let prompt = Some(Prompt::Text("hello".into()));
        let request = v1::GenerateRequest { prompt, max_tokens: 5, sampling, ..Default::default() };
        let mut events = rig.client().await.generate(request).await.unwrap().into_inner();
        let mut seen = Vec::new();
        while let Some(event) = events.message().await.unwrap() {
            if let Event::Token(token) = event.event.unwrap() {
                seen.push(!token.token.unwrap().logprob.is_nan());
            }
        }
        assert_eq!(seen, [logprobs.is_some(); 5]);
    }
    wait_for(async || answers(&rig, "equal").await == 2.0).await;
}

#[tokio::test]
async fn a_node_that_scores_nothing_costs_only_the_score() {
    let rig = watching(Options::default(), Options::default()).await;
    let request = json!({"prompt": "hello", "max_tokens": 4});
    let expected = rig.complete(request.clone()).await;
    wait_for(async || answers(&rig, "equal").await == 1.0).await;
    // It computes the prompt, and fails with the score.
    rig.prefill[0].fail_after(1);
    let text = |answer: &support::Answer| answer.json()["choices"][0]["text"].clone();
    assert_eq!(text(&rig.complete(request).await), text(&expected));
    wait_for(async || answers(&rig, "dropped").await == 1.0).await;
    assert_eq!(rig.metric("overfill_migrations_total").await, 0.0);
    assert_eq!(rig.metric("overfill_nodes{pool=\"prefill\",role=\"prefill\",state=\"up\"}").await, 1.0);
}

#[tokio::test]
async fn only_drafts_without_a_grammar_are_watched() {
    let rig = watching(Options::default(), Options::default()).await;
    for more in [
        json!({"overfill_mode": "exact"}),
        json!({"overfill_mode": "refresh"}),
        json!({"max_tokens": 1}),
        json!({"guided_regex": "[a-z]*"}),
    ] {
        let mut body = json!({"prompt": "hello", "max_tokens": 6});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(rig.complete(body).await.status, 200, "{more}");
    }
    rig.complete(json!({"prompt": "hello", "max_tokens": 6})).await;
    wait_for(async || answers(&rig, "equal").await == 1.0).await;
    assert_eq!(rig.metric("overfill_watch_answers_total").await, 1.0);
}
