//! KV between GPU nodes over NCCL, whose double blocks, fails and hangs as NCCL can.

use anyhow::{Result, ensure};
use overfill_tests::golden::{HALF, check_within, folder};
use overfill_tests::service::router_args;
use overfill_tests::{Cluster, Completion, Golden, Request, Service, wait_for};
use serde_json::json;

use super::{LONGEST_ANSWER_TOKENS, LONGEST_PROMPT_TOKENS, golden_request, gpu, prompt, software_gpu, up_args};

const NCCL: [&str; 4] = ["--device", "cuda:0", "--prefill-arg=--kv-transport=nccl", "--decode-arg=--kv-transport=nccl"];

#[test]
fn golden_tokens_over_nccl() -> Result<()> {
    let Some(variables) = gpu(&[])? else { return Ok(()) };
    for pair in ["llama-tied", "llama-depth"] {
        let golden = Golden::load(pair)?;
        let cluster = Cluster::start_with(&up_args(pair, &NCCL), &variables)?;
        let mut checked = 0.0;
        for case in golden.cases.iter().filter(|case| case.prompt.len() <= LONGEST_PROMPT_TOKENS).take(3) {
            let expected = &case.two_stage[..case.two_stage.len().min(LONGEST_ANSWER_TOKENS)];
            let answer = golden_request(&case.prompt, expected.len(), "small").send(&cluster)?;
            check_within(HALF, expected, &answer)?;
            checked += 1.0;
        }
        cluster.wait_idle()?;
        for role in ["prefill", "decode"] {
            let mut handoffs = 0.0;
            for process in cluster.processes().iter().filter(|process| process.name.starts_with(role)) {
                // NCCL is the only transport of the node.
                let transports = cluster.gauge(process, "overfill_kv_transport")?;
                ensure!(transports == 1.0, "{} has {transports} transports", process.name);
                handoffs += cluster.gauge(process, "overfill_handoffs_total")?;
            }
            ensure!(handoffs == checked, "{role}: {handoffs} handoffs over NCCL, not {checked}");
        }
        cluster.check_undisturbed()?;
        let end = cluster.end()?;
        ensure!(end.status.success(), "the cluster ended with {}\n{}", end.status, end.stderr);
    }
    Ok(())
}

fn node(role: &str) -> Vec<String> {
    let model = folder("llama-untied", "full");
    let flags = ["--model", &model, "--served-model-name", "m", "--device", "cuda:0", "--kv-pool-tokens", "8192"];
    let more = ["--weights", "f16", "--kv-dtype", "f16", "--kv-transport", "nccl"];
    let limit = if role == "prefill" { ["--max-batch-tokens", "256"] } else { ["--max-running", "8"] };
    [role].iter().chain(&flags).chain(&more).chain(&limit).map(|&arg| arg.to_owned()).collect()
}

fn router(prefill: &[&Service], decode: &[&Service]) -> Result<Service> {
    let urls = |nodes: &[&Service]| nodes.iter().map(|node| node.url()).collect::<Vec<_>>().join(",");
    let router = Service::start(router_args(), &["--prefill-url", &urls(prefill), "--decode-url", &urls(decode)])?;
    router.wait_nodes(prefill.len() as u32, decode.len() as u32)?;
    Ok(router)
}

/// Sends requests from several clients at once, while `disturb` runs. Every one must be answered, and with the same tokens.
fn answers(router: &Service, disturb: impl FnOnce() -> Result<()>) -> Result<()> {
    let request = Request::tokens(&prompt(), 12).with("model", json!("m"));
    let answers: Vec<Completion> = std::thread::scope(|scope| {
        let client = || (0..6).map(|_| request.send(router)).collect::<Result<Vec<_>>>();
        let clients: Vec<_> = (0..3).map(|_| scope.spawn(client)).collect();
        disturb()?;
        let mut all = Vec::new();
        for client in clients {
            all.extend(client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??);
        }
        Ok::<_, anyhow::Error>(all)
    })?;
    ensure!(answers.iter().all(|answer| answer.tokens == answers[0].tokens), "{answers:?}");
    Ok(())
}

/// The dead node's half of a communicator never takes part again. The receiver aborts it and goes on with others.
#[test]
fn requests_survive_a_killed_prefill_node() -> Result<()> {
    let Some(variables) = gpu(&[])? else { return Ok(()) };
    let mut killed = Service::start_with(None, node("prefill"), &variables)?;
    let kept = Service::start_with(None, node("prefill"), &variables)?;
    let decode = Service::start_with(None, node("decode"), &variables)?;
    let router = router(&[&killed, &kept], &[&decode])?;
    answers(&router, || {
        wait_for("a handoff", || {
            let handoffs = killed.metric("overfill_handoffs_total", "transport=\"nccl\"")?.unwrap_or(0.0);
            Ok((handoffs < 1.0).then(|| "the node has made none".to_owned()))
        })?;
        killed.kill()
    })?;
    decode.wait_metric("overfill_stranded_bytes", "", 0.0)?;
    answers(&router, || Ok(()))
}

/// A node whose communicator can't be aborted ends, and its requests move.
#[test]
fn an_abort_that_hangs_ends_the_node_alone() -> Result<()> {
    let Some(variables) = gpu(&[])? else { return Ok(()) };
    let Some(faults) = software_gpu(&[("SOFTWARE_GPU_NCCL_FAULTS", "stuck:5,abort-hangs")])? else { return Ok(()) };
    let prefill = Service::start_with(None, node("prefill"), &variables)?;
    let mut stuck = Service::start_with(None, node("decode"), &faults)?;
    let kept = Service::start_with(None, node("decode"), &variables)?;
    let router = router(&[&prefill], &[&stuck, &kept])?;
    answers(&router, || {
        let status = stuck.wait_end()?;
        ensure!(!status.success(), "the node ended with {status}");
        Ok(())
    })
}
