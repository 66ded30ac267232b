//! Clusters whose models have sliding windows send and keep only what the windows show.

use anyhow::{Context, Result, ensure};
use overfill_tests::golden::{check, handoff_bytes};
use overfill_tests::{Cluster, Golden, Request};
use serde_json::json;

const SENT: &str = "overfill_transfer_bytes_total";

/// Bytes that all nodes of a role have moved.
fn bytes(cluster: &Cluster, role: &str) -> Result<f64> {
    let nodes = cluster.processes().iter().filter(|process| process.name.starts_with(role));
    nodes.map(|node| cluster.gauge(node, SENT)).sum()
}

#[test]
fn prompts_beyond_the_window() -> Result<()> {
    for pair in ["mistral", "gemma2", "gemma3"] {
        let golden = Golden::load(pair)?;
        let cluster = Cluster::start(&Golden::up_args(pair))?;
        // The longest first: a longer prompt would use what is left of a shorter one.
        let case = golden.cases.iter().max_by_key(|case| case.prompt.len()).context("no case")?;
        let request = Request::tokens(&case.prompt, case.two_stage.len() as u32)
            .with("model", json!("small"))
            .with("logprobs", json!(5))
            .with("return_tokens_as_token_ids", json!(true));
        check(&case.two_stage, &request.send(&cluster)?).with_context(|| pair.to_owned())?;
        cluster.wait_idle()?;
        let expected = handoff_bytes(pair, case.prompt.len(), 0)? as f64;
        for role in ["prefill", "decode"] {
            let moved = bytes(&cluster, role)?;
            ensure!(moved == expected, "{pair}: {role} nodes have moved {moved} bytes, not {expected}");
        }
        cluster.check_undisturbed()?;
        let end = cluster.end()?;
        ensure!(end.status.success(), "{pair}: the cluster ended with {}\n{}", end.status, end.stderr);
    }
    Ok(())
}
