//! Tests of the router's metrics.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use overfill_kv::KvDtype;
use overfill_router::Config;
use overfill_simulated::Options;
use serde_json::json;
use support::{Rig, receive, rig, rig_with, unready_rig, wait_for};

async fn nodes(rig: &Rig, role: &str, pool: &str, state: &str) -> Option<f64> {
    rig.find_metric(&format!("overfill_nodes{{pool=\"{pool}\",role=\"{role}\",state=\"{state}\"}}")).await
}

async fn refused(rig: &Rig, model: &str, reason: &str) -> Option<f64> {
    rig.find_metric(&format!("overfill_refused_requests_total{{model_name=\"{model}\",reason=\"{reason}\"}}")).await
}

async fn ended(rig: &Rig, model: &str, reason: &str) -> Option<f64> {
    rig.find_metric(&format!("vllm:request_success_total{{finished_reason=\"{reason}\",model_name=\"{model}\"}}")).await
}

#[tokio::test]
async fn every_role_is_there_and_nodes_keep_their_pool() {
    let empty = unready_rig(&[], &[], |_| {}).await;
    for (role, state) in [("prefill", "up"), ("decode", "up"), ("decode", "down"), ("decode", "paused")] {
        assert_eq!(nodes(&empty, role, "", state).await, Some(0.0), "{role} {state}");
    }
    let mut wide = Options::default();
    wide.schema.dtype = KvDtype::Bf16;
    let mut rig = unready_rig(&[Options::default()], &[Options::default(), wide], |_| {}).await;
    wait_for(async || nodes(&rig, "decode", "decode", "up").await == Some(1.0)).await;
    wait_for(async || nodes(&rig, "decode", "decode", "incompatible").await == Some(1.0)).await;
    wait_for(async || nodes(&rig, "prefill", "prefill", "up").await == Some(1.0)).await;
    rig.decode[0].set_stalled(true);
    wait_for(async || nodes(&rig, "decode", "decode", "stalled").await == Some(1.0)).await;
    // The only decode node that is left may not work with the prefill node.
    wait_for(async || nodes(&rig, "prefill", "prefill", "incompatible").await == Some(1.0)).await;
    rig.decode.clear();
    wait_for(async || nodes(&rig, "decode", "decode", "down").await == Some(2.0)).await;
    assert_eq!(nodes(&rig, "decode", "decode", "up").await, Some(0.0));
    assert_eq!(nodes(&rig, "prefill", "prefill", "up").await, Some(1.0));
    rig.prefill.clear();
    wait_for(async || nodes(&rig, "prefill", "prefill", "down").await == Some(1.0)).await;
}

#[tokio::test]
async fn a_node_that_failed_a_request_is_paused() {
    let configure = |c: &mut Config| (c.max_attempts, c.max_queue) = (1, Duration::from_millis(50));
    let rig = rig_with(&[Options::default()], &[Options::default()], configure).await;
    // A pause takes a second, so a slow machine may miss one.
    wait_for(async || {
        rig.decode[0].fail_after(3);
        rig.complete(json!({"prompt": "x", "max_tokens": 9})).await;
        nodes(&rig, "decode", "decode", "paused").await == Some(1.0)
    })
    .await;
}

#[tokio::test]
async fn refused_requests_count_as_refused_only() {
    let full = |c: &mut Config| c.max_queue = Duration::from_millis(100);
    let rig = rig_with(&[Options::default()], &[Options::default()], full).await;
    // All series are there before the first event.
    for reason in ["invalid", "queue_full", "unknown_model", "internal"] {
        assert_eq!(refused(&rig, "simulated", reason).await, Some(0.0), "{reason}");
        assert_eq!(refused(&rig, "", reason).await, Some(0.0), "{reason}");
    }
    for reason in ["stop", "length", "abort", "error"] {
        assert_eq!(ended(&rig, "simulated", reason).await, Some(0.0), "{reason}");
    }
    for body in [json!({"model": "other"}), json!({"model": "another"})] {
        assert_eq!(rig.complete(body).await.status, 404);
    }
    assert_eq!(rig.complete(json!({"prompt": "x", "temperature": -1})).await.status, 400);
    rig.decode[0].set_full(true);
    for (stream, n) in [(false, 1), (true, 1), (false, 3)] {
        assert_eq!(rig.complete(json!({"prompt": "x", "stream": stream, "n": n})).await.status, 429);
    }
    assert_eq!(refused(&rig, "", "unknown_model").await, Some(2.0));
    assert_eq!(refused(&rig, "simulated", "invalid").await, Some(1.0));
    assert_eq!(refused(&rig, "simulated", "no_room").await, Some(3.0));
    assert_eq!(rig.metric("overfill_refused_requests_total").await, 6.0);
    assert_eq!(rig.metric("vllm:request_success_total").await, 0.0);
}

#[tokio::test]
async fn a_request_that_fails_after_its_first_token_is_an_error_only() {
    let rig = rig_with(&[Options::default()], &[Options::default()], |c| c.max_attempts = 1).await;
    rig.decode[0].fail_after(3);
    assert_eq!(rig.complete(json!({"prompt": "x", "max_tokens": 9})).await.status, 503);
    assert_eq!(ended(&rig, "simulated", "error").await, Some(1.0));
    assert_eq!(rig.metric("overfill_refused_requests_total").await, 0.0);
}

#[tokio::test]
async fn requests_are_counted_by_model() {
    let configure = |c: &mut Config| c.served_models = vec!["simulated".into(), "to-come".into()];
    let options = [Options::default()];
    let rig = rig_with(&options, &options, configure).await;
    let running = "vllm:num_requests_running{model_name=\"simulated\"}";
    let waiting = "vllm:num_requests_waiting{model_name=\"to-come\"}";
    let tenant = "overfill_tenant_requests{state=\"running\",tenant=\"\"}";
    for series in [running, waiting, tenant, "vllm:num_requests_waiting{model_name=\"\"}"] {
        assert_eq!(rig.find_metric(series).await, Some(0.0), "{series}");
    }
    rig.decode[0].set_paused(true);
    let send = async |model: &str| {
        let body = json!({"model": model, "prompt": "x", "max_tokens": 3}).to_string();
        rig.send("POST", "/v1/completions", &body).await
    };
    let requests = [send("simulated").await, send("to-come").await];
    wait_for(async || rig.metric(running).await == 1.0 && rig.metric(waiting).await == 1.0).await;
    assert_eq!((rig.metric(tenant).await, rig.metric("vllm:num_requests_running").await), (1.0, 1.0));
    // These two, and the one that asks.
    assert_eq!(rig.metric("overfill_open_connections{port=\"http\"}").await, 3.0);
    rig.decode[0].set_paused(false);
    let [served, unserved] = requests;
    assert_eq!(receive(served).await.status, 200);
    drop(unserved);
    wait_for(async || rig.metric(waiting).await == 0.0).await;
}

#[tokio::test]
async fn the_process_is_described() {
    let rig = rig(Options::default()).await;
    let text = rig.get("/metrics").await.body;
    let build = text.lines().find(|line| line.starts_with("overfill_build_info{")).unwrap();
    assert!(build.contains("version=\"") && build.contains("protocol=\"") && build.ends_with("} 1"), "{build}");
    if cfg!(target_os = "linux") {
        assert!(rig.metric("process_start_time_seconds").await > 1e9);
    }
}
