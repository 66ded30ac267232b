//! Tests of which nodes a router uses, and what it tells them.

#![allow(clippy::unwrap_used)]

mod support;

use overfill_kv::{KvDtype, PROTOCOL, ProtocolVersions};
use overfill_proto::v1;
use overfill_simulated::{Options, SimulatedNode};
use support::{Rig, rig_with, unready_rig, wait_for};

/// Waits until the router gives the node at `url` no requests, for a reason that contains `why`.
async fn wait_unused(rig: &Rig, url: &str, why: &str) {
    let mut client = rig.client().await;
    wait_for(async || {
        let list = client.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes;
        let node = list.iter().find(|node| node.url == url).unwrap();
        !node.healthy && node.error.contains(why)
    })
    .await;
}

async fn wait_paired(nodes: &[SimulatedNode], paired: &[bool]) {
    wait_for(async || nodes.iter().map(SimulatedNode::is_paired).eq(paired.iter().copied())).await;
}

#[tokio::test]
async fn nodes_that_may_not_meet_never_do() {
    let next = ProtocolVersions { oldest: PROTOCOL.newest + 1, newest: PROTOCOL.newest + 1 };
    let (usual, later) = (Options::default(), Options { protocol: next, ..Options::default() });
    let other = Options { cluster: "other".into(), ..Options::default() };
    let rig = unready_rig(&[usual.clone(), later], &[usual.clone(), other], |_| {}).await;
    let reason = format!("protocol versions do not overlap: {PROTOCOL} and {next}");
    wait_unused(&rig, &rig.prefill[1].url, &reason).await;
    wait_unused(&rig, &rig.decode[1].url, "cluster must be none, got other").await;
    wait_paired(&rig.prefill, &[true, false]).await;
    wait_paired(&rig.decode, &[true, false]).await;
    assert_eq!(rig.complete(serde_json::json!({"prompt": "x", "max_tokens": 3})).await.status, 200);
}

#[tokio::test]
async fn both_sides_of_a_pair_meet_their_own_versions_only() {
    // The second release speaks this router's version as well, but the third one's nodes only meet each other.
    let speaks = |oldest, newest| Options { protocol: ProtocolVersions { oldest, newest }, ..Options::default() };
    let old = speaks(PROTOCOL.oldest, PROTOCOL.newest);
    let new = speaks(PROTOCOL.newest, PROTOCOL.newest + 1);
    let rig = rig_with(&[old.clone(), new.clone()], &[old, new], |_| {}).await;
    wait_paired(&rig.prefill, &[true, true]).await;
    wait_paired(&rig.decode, &[true, true]).await;
}

#[tokio::test]
async fn a_node_is_told_whether_it_has_a_partner() {
    let mut wide = Options::default();
    wide.schema.dtype = KvDtype::Bf16;
    let options = [Options::default(), wide];
    let mut rig = rig_with(&options, &options, |_| {}).await;
    wait_paired(&rig.prefill, &[true, true]).await;
    wait_paired(&rig.decode, &[true, true]).await;
    rig.decode.pop();
    wait_paired(&rig.prefill, &[true, false]).await;
    rig.prefill.remove(0);
    wait_paired(&rig.prefill, &[false]).await;
    wait_paired(&rig.decode, &[false]).await;
}

#[tokio::test]
async fn work_is_reported_by_pool() {
    let options = [Options::default()];
    let rig = rig_with(&options, &options, |config| {
        config.served_models = vec!["simulated".into(), "to-come".into()];
        config.max_running = 1;
    })
    .await;
    let prefill = "overfill_prefill_backlog_seconds{pool=\"prefill\",source=\"router\"}";
    let decode = "overfill_decode_load_nodes{pool=\"decode\",source=\"router\"}";
    let nodes = "overfill_decode_load_nodes{pool=\"decode\",source=\"nodes\"}";
    let absent = "overfill_requests_without_nodes{model_name=\"to-come\"}";
    for metric in [prefill, decode, nodes, absent] {
        assert_eq!(rig.metric(metric).await, 0.0, "{metric}");
    }
    rig.decode[0].set_paused(true);
    let send = async |model: &str, tokens: usize| {
        let body = serde_json::json!({"model": model, "prompt": vec![70; tokens], "max_tokens": 3});
        rig.send("POST", "/v1/completions", &body.to_string()).await
    };
    let running = send("simulated", 10).await;
    wait_for(async || rig.metric("vllm:num_requests_running").await == 1.0).await;
    let waiting = [send("simulated", 500).await, send("to-come", 500).await];
    // 500 tokens at an unknown pace, and one of 64 places.
    wait_for(async || rig.metric(prefill).await == 0.5).await;
    wait_for(async || rig.metric(decode).await == 1.0 / 64.0).await;
    wait_for(async || rig.metric(nodes).await == 1.0 / 64.0).await;
    wait_for(async || rig.metric(absent).await == 1.0).await;
    drop((running, waiting));
    for metric in [prefill, decode, nodes, absent] {
        wait_for(async || rig.metric(metric).await == 0.0).await;
    }
}
