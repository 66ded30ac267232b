//! Tests of modes refresh and exact: what the router does with extensions and verdicts, and when nodes fail meanwhile.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use overfill_kv::{PROTOCOL, ProtocolVersions, Role};
use overfill_proto::v1::{self, generate_event::Event, generate_request::Prompt};
use overfill_simulated::Options;
use serde_json::json;
use support::{Rig, rig, rig_with, wait_for};

/// Tokens with their stages, and the timings.
struct Answer {
    ids: Vec<u32>,
    stages: Vec<v1::Role>,
    timings: v1::Timings,
}

async fn generate(rig: &Rig, mode: v1::Mode) -> Result<Answer, tonic::Status> {
    let prompt = Some(Prompt::Text("hello".into()));
    let request = v1::GenerateRequest { prompt, max_tokens: 40, mode: mode.into(), ..Default::default() };
    let mut events = rig.client().await.generate(request).await?.into_inner();
    let (mut ids, mut stages) = (Vec::new(), Vec::new());
    while let Some(event) = events.message().await? {
        match event.event.unwrap() {
            Event::Token(token) => {
                stages.push(token.stage());
                ids.push(token.token.unwrap().token);
            }
            Event::Finished(finished) => return Ok(Answer { ids, stages, timings: finished.timings.unwrap() }),
            Event::PromptLogprobs(_) => panic!("nobody asked for them"),
        }
    }
    panic!("the stream ended without a finished event")
}

fn slow() -> Options {
    Options { token_time: Duration::from_millis(2), prefill_time: Duration::from_millis(1), ..Options::default() }
}

#[tokio::test]
async fn all_modes_give_the_same_tokens_here() {
    let rig = rig(Options::default()).await;
    let draft = generate(&rig, v1::Mode::Unspecified).await.unwrap();
    assert_eq!(draft.timings.mode(), v1::Mode::Draft);
    for mode in [v1::Mode::Refresh, v1::Mode::Exact] {
        let answer = generate(&rig, mode).await.unwrap();
        assert_eq!((answer.ids, answer.timings.mode()), (draft.ids.clone(), mode));
        wait_for(async || rig.active() == 0).await;
    }
}

#[tokio::test]
async fn an_exact_answer_says_whose_tokens_it_has() {
    let rig = rig(Options::default()).await;
    let Answer { stages, timings, .. } = generate(&rig, v1::Mode::Exact).await.unwrap();
    // One from the prefill, then 13 rounds of two drafts that stand and one that does not.
    assert_eq!((timings.drafted_tokens, timings.accepted_tokens, timings.migrations), (39, 26, 0));
    let prefill = stages.iter().filter(|stage| **stage == v1::Role::Prefill).count();
    assert_eq!((prefill, stages.len()), (14, 40));
    let body = json!({"prompt": "hello", "max_tokens": 40, "overfill_mode": "exact", "stream": true,
                      "stream_options": {"include_overfill": true}});
    let events = rig.complete(body).await.events();
    let timings = events.iter().find_map(|event| event["overfill"].get("timings")).unwrap();
    assert_eq!((&timings["mode"], &timings["accepted_tokens"]), (&json!("exact"), &json!(26)));
}

#[tokio::test]
async fn another_prefill_node_goes_on() {
    let rig = rig_with(&[slow(), slow()], &[slow()], |_| {}).await;
    let expected = generate(&rig, v1::Mode::Draft).await.unwrap().ids;
    for mode in [v1::Mode::Refresh, v1::Mode::Exact] {
        // The prompt, and four extensions. Only one of the two serves the request until it fails.
        rig.prefill.iter().for_each(|node| node.fail_after(5));
        let answer = generate(&rig, mode).await.unwrap();
        assert_eq!((answer.ids, answer.timings.migrations), (expected.clone(), 0), "{mode:?}");
        rig.prefill.iter().for_each(|node| node.fail_after(u32::MAX));
        wait_for(async || rig.active() == 0).await;
    }
}

/// A prefill node that has closed the request is not at fault: the same one opens it again.
#[tokio::test]
async fn a_closed_prefill_is_opened_again() {
    let rig = rig_with(&[slow()], &[slow()], |_| {}).await;
    let expected = generate(&rig, v1::Mode::Draft).await.unwrap().ids;
    let close = async {
        loop {
            tokio::time::sleep(Duration::from_millis(5)).await;
            rig.prefill[0].close_prefills();
        }
    };
    let answer = tokio::select! {
        answer = generate(&rig, v1::Mode::Exact) => answer.unwrap(),
        () = close => unreachable!(),
    };
    assert_eq!((answer.ids, answer.timings.migrations), (expected, 0));
    assert!(rig.prefill[0].taken() > 2);
}

#[tokio::test]
async fn a_decode_node_that_fails_is_replaced() {
    let rig = rig_with(&[slow()], &[slow(), slow()], |_| {}).await;
    let expected = generate(&rig, v1::Mode::Draft).await.unwrap().ids;
    for mode in [v1::Mode::Refresh, v1::Mode::Exact] {
        rig.decode.iter().for_each(|node| node.fail_after(3));
        let answer = generate(&rig, mode).await.unwrap();
        assert_eq!(answer.ids, expected, "{mode:?}");
        assert!(answer.timings.migrations >= 1);
        wait_for(async || rig.active() == 0).await;
    }
}

#[tokio::test]
async fn earlier_releases_get_no_such_request() {
    let old = Options { protocol: ProtocolVersions { newest: 3, ..PROTOCOL }, ..Options::default() };
    for role in Role::ALL {
        let options = |of| if of == role { old.clone() } else { Options::default() };
        let (prefill, decode) = ([options(Role::Prefill)], [options(Role::Decode)]);
        let rig = rig_with(&prefill, &decode, |config| config.max_queue = Duration::from_millis(50)).await;
        generate(&rig, v1::Mode::Draft).await.unwrap();
        let refused = generate(&rig, v1::Mode::Exact).await.err().unwrap();
        let no_node = [tonic::Code::ResourceExhausted, tonic::Code::Unavailable];
        assert!(no_node.contains(&refused.code()), "{refused}");
    }
}

#[tokio::test]
async fn the_default_is_set_by_model() {
    let args = overfill_router::RequestArgs { mode: vec!["simulated=exact".into()], ..Default::default() };
    let requests = args.validate(&mut Vec::new());
    let nodes = [Options::default()];
    let rig = rig_with(&nodes, &nodes, |config| config.requests = requests.clone()).await;
    assert_eq!(generate(&rig, v1::Mode::Unspecified).await.unwrap().timings.mode(), v1::Mode::Exact);
    assert_eq!(generate(&rig, v1::Mode::Draft).await.unwrap().timings.mode(), v1::Mode::Draft);
}
