//! Whole clusters whose KV moves over RDMA. `cargo xtask rdma` runs them in a virtual machine with soft-RoCE.

use anyhow::{Context, Result, ensure};
use overfill_tests::golden::check;
use overfill_tests::rig::{RUNNING, request};
use overfill_tests::service::{decode_args, prefill_args, router_args};
use overfill_tests::{Cluster, Golden, Request, Service, metrics, wait_for};
use serde_json::json;

const PAIR: &str = "llama-tied";
const RDMA: [&str; 2] = ["--kv-transport", "rdma"];

/// Whether this system is expected to have RDMA. If not, says that the test is skipped.
fn has_rdma() -> bool {
    let required = std::env::var_os("OVERFILL_RDMA_REQUIRED").is_some();
    if !required {
        eprintln!("SKIPPED: needs an RDMA device and a binary with RDMA; cargo xtask rdma runs this test");
    }
    required
}

/// Successful handoffs over a transport, as the process with this admin URL counts them.
fn handoffs(admin: &str, transport: &str) -> Result<f64> {
    let label = format!("transport=\"{transport}\"");
    metrics::read(admin, "overfill_handoffs_total", &label)?.context("no counter of handoffs")
}

#[test]
fn golden_tokens_over_rdma() -> Result<()> {
    if !has_rdma() {
        return Ok(());
    }
    let golden = Golden::load(PAIR)?;
    let mut arguments = Golden::up_args(PAIR);
    for flag in ["--prefill-arg", "--decode-arg"] {
        arguments.extend(RDMA.map(|argument| format!("{flag}={argument}")));
    }
    let cluster = Cluster::start(&arguments)?;
    for case in &golden.cases {
        let request = Request::tokens(&case.prompt, case.two_stage.len() as u32)
            .with("model", json!("small"))
            .with("logprobs", json!(5))
            .with("return_tokens_as_token_ids", json!(true));
        check(&case.two_stage, &request.send(&cluster)?)?;
    }
    cluster.wait_idle()?;
    let cases = golden.cases.len() as f64;
    for role in ["prefill", "decode"] {
        let (mut rdma, mut tcp) = (0.0, 0.0);
        for process in cluster.processes().iter().filter(|process| process.name.starts_with(role)) {
            let admin = process.admin.as_ref().context("no admin port")?;
            rdma += handoffs(admin, "rdma")?;
            tcp += handoffs(admin, "tcp")?;
        }
        ensure!(rdma >= cases && tcp == 0.0, "{role}: {rdma} handoffs over rdma, {tcp} over tcp, {cases} cases");
    }
    Ok(())
}

/// Sends a request, disturbs the prefill node that computes it, and compares the answer with the undisturbed one.
fn disturbed(router: &Service, prefill: &mut [Service; 2], index: usize, signal: &str) -> Result<()> {
    let mut busy = 0;
    let answer = std::thread::scope(|scope| {
        let answer = scope.spawn(|| request(index).send(router));
        wait_for("a busy prefill node", || {
            for (i, node) in prefill.iter().enumerate() {
                if node.metric(RUNNING, "")? != Some(0.0) {
                    busy = i;
                    return Ok(None);
                }
            }
            Ok(Some("both are idle".into()))
        })?;
        prefill[busy].signal(signal)?;
        answer.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    })?;
    prefill[busy].kill()?;
    prefill[busy] = prefill[busy].start_again()?;
    router.wait_nodes(2, 1)?;
    // Afterwards, so that nothing of the prompt was cached before.
    answer.check_same(&request(index).send(router)?).with_context(|| format!("after {signal}"))
}

#[test]
fn killed_and_frozen_prefill_nodes_cost_no_answer() -> Result<()> {
    if !has_rdma() {
        return Ok(());
    }
    let slow = [RDMA[0], RDMA[1], "--max-batch-tokens", "16"];
    let mut prefill = [Service::start(prefill_args(PAIR), &slow)?, Service::start(prefill_args(PAIR), &slow)?];
    let decode = Service::start(decode_args(PAIR), &RDMA)?;
    let urls = format!("{},{}", prefill[0].url(), prefill[1].url());
    let args = ["--prefill-url", &urls, "--decode-url", &decode.url(), "--node-timeout-seconds", "3"];
    let router = Service::start(router_args(), &args)?;
    router.wait_nodes(2, 1)?;
    disturbed(&router, &mut prefill, 1, "KILL")?;
    disturbed(&router, &mut prefill, 2, "STOP")?;
    // KV-3
    decode.wait_metric("overfill_stranded_bytes", "", 0.0)?;
    decode.wait_metric("overfill_open_handoffs", "", 0.0)?;
    let admin = format!("http://{}", decode.admin());
    let (rdma, tcp) = (handoffs(&admin, "rdma")?, handoffs(&admin, "tcp")?);
    ensure!(rdma >= 4.0 && tcp == 0.0, "{rdma} handoffs over rdma, {tcp} over tcp");
    Ok(())
}
