//! A whole cluster whose KV moves over RDMA. `cargo xtask rdma` runs it in a virtual machine with soft-RoCE.

use anyhow::{Context, Result, ensure};
use overfill_tests::golden::check;
use overfill_tests::{Cluster, Golden, Request, metrics};
use serde_json::json;

/// Whether this system is expected to have RDMA. If not, says that the test is skipped.
fn has_rdma() -> bool {
    let required = std::env::var_os("OVERFILL_RDMA_REQUIRED").is_some();
    if !required {
        eprintln!("SKIPPED: needs an RDMA device and a binary with RDMA; cargo xtask rdma runs this test");
    }
    required
}

/// Sends every case of the golden pair, and checks the tokens.
fn check_all(golden: &Golden, cluster: &Cluster) -> Result<()> {
    for case in &golden.cases {
        let request = Request::tokens(&case.prompt, case.two_stage.len() as u32)
            .with("model", json!("small"))
            .with("logprobs", json!(5))
            .with("return_tokens_as_token_ids", json!(true));
        check(&case.two_stage, &request.send(cluster)?)?;
    }
    Ok(())
}

/// Successful handoffs of the cluster over a transport, as the nodes of a role count them.
fn handoffs(cluster: &Cluster, role: &str, transport: &str) -> Result<f64> {
    let label = format!("transport=\"{transport}\"");
    let mut sum = 0.0;
    for process in cluster.processes().iter().filter(|process| process.name.starts_with(role)) {
        let admin = process.admin.as_ref().context("no admin port")?;
        sum += metrics::read(admin, "overfill_handoffs_total", &label)?.context("no counter of handoffs")?;
    }
    Ok(sum)
}

#[test]
fn golden_tokens_over_rdma_also_after_a_node_has_died() -> Result<()> {
    if !has_rdma() {
        return Ok(());
    }
    let golden = Golden::load("llama-tied")?;
    let mut arguments = Golden::up_args("llama-tied");
    arguments.extend(["--prefill-nodes", "2", "--prefill-arg=--kv-transport=rdma"].map(String::from));
    arguments.push("--decode-arg=--kv-transport=rdma".into());
    let cluster = Cluster::start(&arguments)?;
    check_all(&golden, &cluster)?;
    cluster.wait_idle()?;
    let cases = golden.cases.len() as f64;
    for role in ["prefill", "decode"] {
        let (rdma, tcp) = (handoffs(&cluster, role, "rdma")?, handoffs(&cluster, role, "tcp")?);
        ensure!(rdma >= cases && tcp == 0.0, "{role}: {rdma} handoffs over rdma, {tcp} over tcp, {cases} cases");
    }
    let first = cluster.processes().iter().find(|process| process.name.starts_with("prefill"));
    let name = first.map(|process| process.name.clone()).unwrap_or_default();
    cluster.signal(&name, "KILL")?;
    check_all(&golden, &cluster)
}
