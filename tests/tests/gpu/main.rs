//! Clusters whose nodes compute on the software GPU. The test of the golden pairs shows that the kernels, their order and
//! their memory are right; it says nothing about speed. With `OVERFILL_REAL_GPU`, they compute on the machine's GPU.

mod nccl;

use std::process::{Command, Output};
use std::sync::LazyLock;

use anyhow::{Context, Result, bail, ensure};
use overfill_tests::cluster::binary;
use overfill_tests::completion::post;
use overfill_tests::golden::{HALF, check_within, folder};
use overfill_tests::gpu::{environment, is_real};
use overfill_tests::service::router_args;
use overfill_tests::{Cluster, Completion, Golden, Request, Service};
use serde_json::json;

/// Golden prompts longer than this take minutes on the software GPU.
const LONGEST_PROMPT_TOKENS: usize = 300;
const LONGEST_ANSWER_TOKENS: usize = 24;

/// Environment variables of processes.
type Variables = Vec<(&'static str, String)>;

static GPU: LazyLock<Result<Option<Variables>>> = LazyLock::new(environment);

/// Environment of processes with a GPU, and `more`; `None`: skip the test.
fn gpu(more: &[(&'static str, &str)]) -> Result<Option<Variables>> {
    let Some(found) = GPU.as_ref().map_err(|e| anyhow::anyhow!("{e:#}"))? else { return Ok(None) };
    let more = more.iter().map(|(name, value)| (*name, (*value).to_owned()));
    Ok(Some(found.iter().cloned().chain(more).collect()))
}

/// As [`gpu`], for tests that need a GPU with faults or limits of its own: they skip real ones.
fn software_gpu(more: &[(&'static str, &str)]) -> Result<Option<Variables>> {
    if is_real() { Ok(None) } else { gpu(more) }
}

fn up_args(pair: &str, more: &[&str]) -> Vec<String> {
    let mut args = Golden::up_args_in(pair, "f16");
    args.extend(more.iter().map(|&arg| arg.to_owned()));
    // Buffers for large steps would only take time to fill with zeros.
    args.extend(["--prefill-arg=--max-batch-tokens=256", "--decode-arg=--max-running=8"].map(str::to_owned));
    args
}

fn golden_request(prompt: &[u32], steps: usize, model: &str) -> Request {
    let request = Request::tokens(prompt, steps as u32).with("model", json!(model)).with("logprobs", json!(5));
    request.with("return_tokens_as_token_ids", json!(true))
}

fn golden(pair: &str, devices: &[&str]) -> Result<()> {
    let Some(variables) = gpu(&[])? else { return Ok(()) };
    let golden = Golden::load(pair)?;
    let cluster = Cluster::start_with(&up_args(pair, devices), &variables)?;
    let mut checked = 0;
    let short = |prompt: &[u32]| is_real() || prompt.len() <= LONGEST_PROMPT_TOKENS;
    let longest_answer = if is_real() { usize::MAX } else { LONGEST_ANSWER_TOKENS };
    for (i, case) in golden.cases.iter().enumerate().filter(|(_, case)| short(&case.prompt)) {
        for (model, expected) in [("small", &case.two_stage), ("big", &case.full_only)] {
            let expected = &expected[..expected.len().min(longest_answer)];
            let answer = golden_request(&case.prompt, expected.len(), model).send(&cluster)?;
            check_within(HALF, expected, &answer).with_context(|| format!("{pair}, case {i}, {model}"))?;
            checked += 1;
        }
    }
    ensure!(checked > 0, "{pair} has no short prompt");
    cluster.wait_idle()?;
    cluster.check_undisturbed()?;
    let end = cluster.end()?;
    ensure!(end.status.success(), "{pair}: the cluster ended with {}\n{}", end.status, end.stderr);
    Ok(())
}

#[test]
fn golden_pairs_on_gpus() -> Result<()> {
    ["llama-tied", "llama-untied", "qwen2", "qwen3", "llama-depth"].iter().try_for_each(|pair| {
        golden(pair, &["--device", "cuda:0"]) //
    })
}

#[test]
fn golden_pairs_with_prefill_on_gpus() -> Result<()> {
    ["llama-untied", "qwen3"].iter().try_for_each(|pair| golden(pair, &["--prefill-device", "cuda:0"]))
}

#[test]
fn golden_pairs_with_decode_on_gpus() -> Result<()> {
    ["llama-tied", "llama-depth"].iter().try_for_each(|pair| golden(pair, &["--decode-device", "cuda:0"]))
}

/// The prompt of a request that is long enough to be cached and to be interrupted.
fn prompt() -> Vec<u32> {
    (0..100).map(|i| 5 + i * 7 % 300).collect()
}

#[test]
fn prefix_cache_and_clients_that_leave() -> Result<()> {
    let Some(variables) = gpu(&[])? else { return Ok(()) };
    let cluster = Cluster::start_with(&up_args("llama-untied", &["--device", "cuda:0"]), &variables)?;
    let request = Request::tokens(&prompt(), 8).with("model", json!("small"));
    let first = request.send(&cluster)?;
    let again = post(&cluster, "/v1/completions", &request.0)?;
    let tokens = Completion::parse(&again)?.tokens;
    ensure!(first.tokens == tokens, "{tokens:?} with cached KV, {first:?} without");
    let cached = &again["usage"]["prompt_tokens_details"]["cached_tokens"];
    ensure!(cached.as_u64().is_some_and(|cached| cached >= 80), "{cached} tokens were cached");
    for _ in 0..3 {
        let endless = Request::tokens(&prompt(), 600).with("model", json!("small")).with("stream", json!(true));
        let mut events = endless.stream(&cluster)?;
        ensure!(events.next().is_some(), "no token");
        drop(events);
        cluster.wait_idle()?;
    }
    ensure!(request.send(&cluster)?.tokens == first.tokens, "another answer after clients have left");
    cluster.check_undisturbed()
}

/// A device that fails ends its node. Its requests move to another node, and clients notice nothing.
#[test]
fn requests_survive_a_lost_device() -> Result<()> {
    let Some(variables) = software_gpu(&[("SOFTWARE_GPU_LAUNCHES_UNTIL_LOST", "40")])? else { return Ok(()) };
    let model = folder("llama-untied", "full");
    let node = |role: &str, device: &str| -> Vec<String> {
        let flags = ["--model", &model, "--served-model-name", "m", "--device", device, "--kv-pool-tokens", "8192"];
        [role]
            .iter()
            .chain(&flags)
            .chain(&["--weights", "f16", "--kv-dtype", "f16"])
            .map(|&arg| arg.to_owned())
            .collect()
    };
    let prefill = Service::start_with(None, node("prefill", "cpu"), &[])?;
    let mut lost = Service::start_with(None, node("decode", "cuda:0"), &variables)?;
    let kept = Service::start_with(None, node("decode", "cpu"), &[])?;
    let decode = format!("{},{}", lost.url(), kept.url());
    let router = Service::start(router_args(), &["--prefill-url", &prefill.url(), "--decode-url", &decode])?;
    router.wait_metric("overfill_nodes", "role=\"decode\",state=\"up\"", 2.0)?;
    let request = Request::tokens(&prompt(), 40).with("model", json!("m"));
    let answers: Vec<Completion> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(|| request.send(&router))).collect();
        clients.into_iter().map(|c| c.join().unwrap_or_else(|_| bail!("panicked"))).collect::<Result<_>>()
    })?;
    ensure!(answers.iter().all(|answer| answer.tokens.len() == 40), "{answers:?}");
    let status = lost.wait_end()?;
    ensure!(!status.success(), "the node whose device is lost ended with {status}");
    let migrations = router.metric("overfill_migrations_total", "")?;
    ensure!(migrations.is_some_and(|count| count > 0.0), "{migrations:?} migrations");
    ensure!(request.send(&router)?.tokens.len() == 40, "no answer from the node that is left");
    Ok(())
}

#[test]
fn what_is_missing_is_said() -> Result<()> {
    let Some(_) = software_gpu(&[])? else { return Ok(()) };
    for (variables, more, expected) in [
        ([("SOFTWARE_GPU_DEVICES", "0")], vec![], "device cuda:0: CUDA_ERROR_NO_DEVICE: "),
        ([("SOFTWARE_GPU_ARCHITECTURE", "75")], vec![], "has compute capability 7.5, supported: 8.0 and newer"),
        ([("SOFTWARE_GPU_MEMORY_BYTES", "50000000")], vec![], "would fit"),
        ([("SOFTWARE_GPU_MEMORY_BYTES", "3000000")], vec![], "bytes of device memory are needed"),
        ([("SOFTWARE_GPU_SEED", "1")], vec!["--weights", "f32"], "supported on GPUs: bf16, f16, int8, int4 or fp8"),
    ] {
        let Some(variables) = gpu(&variables)? else { return Ok(()) };
        let full = folder("llama-untied", "full");
        let mut args = vec!["--device", "cuda:0", "--full", &full, "--kv-dtype", "f16"];
        args.extend(if more.is_empty() { vec!["--weights", "f16"] } else { more });
        let refused = Cluster::refused_with(&args, &variables)?;
        ensure!(!refused.status.success() && refused.stderr.contains(expected), "{expected}: {}", refused.stderr);
    }
    Ok(())
}

fn bench(variables: &Variables, more: &[&str]) -> Result<Output> {
    let mut command = Command::new(binary()?);
    command.args(["bench", "gpu", "--copy-mebibytes", "1", "--product-width", "64", "--runs", "1", "--json"]);
    command.args(more).envs(variables.iter().map(|(name, value)| (name, value)));
    command.output().context("starting overfill bench gpu")
}

/// Everything that `bench gpu` measures, with a tiny model. The figures themselves mean nothing here.
#[test]
fn a_gpu_is_measured() -> Result<()> {
    let Some(variables) = gpu(&[])? else { return Ok(()) };
    let model = folder("llama-tied", "full");
    let sizes = ["--batch", "1,3", "--prefill-tokens", "20", "--step-tokens", "40", "--context-tokens", "17"];
    let more = ["--model", &model, "--weights", "f16", "--kv-dtype", "f16", "--decode-tokens", "2"];
    let handoff = ["--handoff-mebibytes", "4", "--kv-transport", "tcp,nccl"];
    let done = bench(&variables, &[&sizes[..], &more, &handoff].concat())?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let report: serde_json::Value = serde_json::from_slice(&done.stdout)?;
    let measured = report["measurements"].as_array().context("no measurements")?;
    // Two ranks on one GPU are more than most versions of NCCL allow.
    let handoff_over_nccl = (!is_real()).then_some("KV handoff, share of plain nccl");
    for name in [
        "GPU memory bandwidth",
        "GPU dense products",
        "decode, full, batch 3",
        "decode without graphs, full, batch 3",
        "share of memory bandwidth, full, batch 3",
        "prefill, full, batch 3",
        "share of dense products, full, batch 3",
        "KV handoff, tcp",
        "KV handoff, share of plain tcp",
        "KV handoff, not hidden, tcp",
    ]
    .into_iter()
    .chain(handoff_over_nccl)
    {
        let value = measured.iter().find(|line| line["name"] == name).and_then(|line| line["value"].as_f64());
        ensure!(value.is_some_and(|value| value > 0.0), "{name}: {value:?} in {report}");
    }
    let left_out = report["left_out"].as_array().context("no left_out")?;
    ensure!(is_real() || left_out.is_empty(), "{left_out:?}");
    Ok(())
}

#[test]
fn without_a_gpu_nothing_is_measured() -> Result<()> {
    let Some(variables) = software_gpu(&[("SOFTWARE_GPU_DEVICES", "0")])? else { return Ok(()) };
    let done = bench(&variables, &["--limits-only"])?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(!done.status.success() && said.contains("error: device cuda:0: CUDA_ERROR_NO_DEVICE: "), "{said}");
    Ok(())
}
