//! Modes refresh and exact on running clusters, against references of PyTorch and against the full model alone.

use anyhow::{Context, Result, ensure};
use overfill_tests::cluster::IDLE_GAUGES;
use overfill_tests::completion::post;
use overfill_tests::golden::{check, check_refresh, refresh_cases};
use overfill_tests::rig::{RUNNING, Role, wait_phase};
use overfill_tests::service::{decode_args_of, prefill_args, router_args};
use overfill_tests::{Cluster, Completion, Golden, Request, Rig, Router, Service};
use serde_json::{Value, json};

/// The pairs with references for mode refresh.
const PAIRS: [&str; 5] = ["llama-tied", "llama-untied", "llama-depth", "qwen2", "qwen3"];

fn request(prompt: &[u32], tokens: usize, model: &str, mode: &str) -> Request {
    Request::tokens(prompt, tokens as u32)
        .with("model", json!(model))
        .with("overfill_mode", json!(mode))
        .with("logprobs", json!(5))
        .with("return_tokens_as_token_ids", json!(true))
}

/// The answer of the full model alone: each token is the first one after all earlier tokens.
fn one_by_one(cluster: &Cluster, request: &Request, prompt: &[u32], tokens: usize) -> Result<Completion> {
    let mut known = prompt.to_vec();
    let mut all = Completion::default();
    for _ in 0..tokens {
        let next = request.clone().with("prompt", json!(known)).with("max_tokens", json!(1)).send(cluster)?;
        known.extend(&next.tokens);
        all.tokens.extend(next.tokens);
        all.logprobs.extend(next.logprobs);
    }
    Ok(all)
}

fn timings(cluster: &Cluster, request: &Request) -> Result<Value> {
    let events = request
        .clone()
        .with("stream_options", json!({"include_overfill": true}))
        .stream(cluster)?
        .collect::<Result<Vec<Value>>>()?;
    let found = events.iter().map(|event| &event["choices"][0]["overfill"]["timings"]).find(|it| !it.is_null());
    let found = found.or_else(|| events.iter().map(|event| &event["overfill"]["timings"]).find(|it| !it.is_null()));
    Ok(found.context("no timings")?.clone())
}

/// Mode refresh gives what PyTorch gives, and mode exact the full model's tokens, whatever the decode model is.
#[test]
fn references() -> Result<()> {
    for pair in PAIRS {
        let cluster = Cluster::start(&Golden::up_args(pair))?;
        for (i, case) in refresh_cases(pair)?.iter().enumerate() {
            let asked = request(&case.prompt, case.refresh.len(), "small", "refresh");
            check_refresh(&case.refresh, &asked.send(&cluster)?).with_context(|| format!("{pair}, refresh {i}"))?;
            let streamed = asked.stream(&cluster)?.collect_completion(|| {})?;
            check_refresh(&case.refresh, &streamed).with_context(|| format!("{pair}, refresh {i}, streamed"))?;
        }
        for (i, case) in Golden::load(pair)?.cases.iter().enumerate() {
            for model in ["small", "big"] {
                let asked = request(&case.prompt, case.full_only.len(), model, "exact");
                let whole = asked.send(&cluster)?;
                check(&case.full_only, &whole).with_context(|| format!("{pair}, exact {i}, {model}"))?;
                let streamed = asked.stream(&cluster)?.collect_completion(|| {})?;
                streamed.check_same(&whole).with_context(|| format!("{pair}, exact {i}, {model}, streamed"))?;
            }
        }
        cluster.wait_idle()?;
        cluster.check_undisturbed()?;
        let end = cluster.end()?;
        ensure!(end.status.success(), "{pair}: the cluster ended with {}\n{}", end.status, end.stderr);
    }
    Ok(())
}

/// A seeded answer in mode exact has the tokens that the full model draws with the same seed.
#[test]
fn sampled() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args("llama-untied"))?;
    let prompt: Vec<u32> = (3..30).collect();
    for seed in 0..3 {
        for (model, penalty) in [("small", 0.0), ("big", 0.0), ("big", 0.7)] {
            let asked = request(&prompt, 40, model, "exact")
                .with("temperature", json!(0.9))
                .with("top_p", json!(0.95))
                .with("seed", json!(seed))
                .with("frequency_penalty", json!(penalty));
            let exact = asked.send(&cluster)?;
            let alone = match penalty {
                0.0 => one_by_one(&cluster, &asked, &prompt, 40)?,
                // The penalty counts the output only.
                _ => request(&prompt, 40, "big", "draft")
                    .with_all(&asked, &["temperature", "top_p", "seed", "frequency_penalty"])
                    .send(&cluster)?,
            };
            ensure!(
                exact.tokens == alone.tokens,
                "seed {seed}, {model}: {:?} instead of {:?}",
                exact.tokens,
                alone.tokens
            );
        }
    }
    // The full model accepts its own drafts.
    let timings = timings(&cluster, &request(&prompt, 60, "big", "exact"))?;
    let (drafted, accepted) = (timings["drafted_tokens"].as_u64(), timings["accepted_tokens"].as_u64());
    ensure!(timings["mode"] == "exact" && drafted == accepted && accepted > Some(30), "{timings}");
    cluster.wait_idle()?;
    cluster.check_undisturbed()
}

/// Sends requests of all modes at once. Each must have the answer that it has alone, after a restart of an attempt too if
/// `restarts`: in mode refresh, the full model has then computed other blocks.
fn crowded(router: &(impl Router + Sync), restarts: bool) -> Result<()> {
    let asked = |i: usize| {
        let prompt: Vec<u32> = (0..30 + i * 7).map(|at| (5 + (at * 11 + i * 17) % 300) as u32).collect();
        let asked =
            Request::tokens(&prompt, 90).with("overfill_mode", json!(["exact", "refresh", "exact", "draft"][i % 4]));
        if i.is_multiple_of(3) { asked.with("temperature", json!(0.8)).with("seed", json!(i)) } else { asked }
    };
    let alone: Vec<Completion> = (0..12).map(|i| asked(i).send(router)).collect::<Result<_>>()?;
    std::thread::scope(|scope| {
        let (asked, alone) = (&asked, &alone);
        let client = |i: usize| {
            move || -> Result<()> {
                for _ in 0..2 {
                    let answer = asked(i).send(router)?;
                    let is_same = answer == alone[i] || (restarts && i % 4 == 1);
                    ensure!(is_same, "request {i}: {answer:?} instead of {:?}", alone[i]);
                }
                Ok(())
            }
        };
        let threads: Vec<_> = (0..12).map(|i| scope.spawn(client(i))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?)
    })
}

fn with_pool(args: Vec<String>, tokens: &str) -> Vec<String> {
    args.into_iter().map(|arg| if arg == "8192" { tokens.to_owned() } else { arg }).collect()
}

/// Requests of all modes in a small pool of the decode node, where they are preempted.
#[test]
fn preempted() -> Result<()> {
    let prefill = Service::start::<&str>(prefill_args("llama-tied"), &[])?;
    let decode = Service::start::<&str>(with_pool(decode_args_of("llama-tied", "decode"), "512"), &[])?;
    let router = Service::start(router_args(), &["--prefill-url", &prefill.url(), "--decode-url", &decode.url()])?;
    router.wait_nodes(1, 1)?;
    crowded(&router, false)?;
    ensure!(decode.metric("vllm:num_preemptions_total", "")? > Some(0.0), "no request was preempted");
    ensure!(decode.metric("vllm:spec_decode_num_draft_tokens_total", "")? > Some(0.0), "nothing was drafted");
    for (node, gauge) in [&prefill, &decode].into_iter().flat_map(|node| IDLE_GAUGES.map(|gauge| (node, gauge))) {
        node.wait_metric(gauge, "", 0.0)?;
    }
    Ok(())
}

/// The prefill node has no room to keep all requests open, so they are opened again and again.
#[test]
fn evicted() -> Result<()> {
    let prefill = Service::start::<&str>(with_pool(prefill_args("llama-tied"), "512"), &[])?;
    let decode = Service::start::<&str>(decode_args_of("llama-tied", "decode"), &[])?;
    let router = Service::start(router_args(), &["--prefill-url", &prefill.url(), "--decode-url", &decode.url()])?;
    router.wait_nodes(1, 1)?;
    crowded(&router, true)?;
    for (node, gauge) in [&prefill, &decode].into_iter().flat_map(|node| IDLE_GAUGES.map(|gauge| (node, gauge))) {
        node.wait_metric(gauge, "", 0.0)?;
    }
    Ok(())
}

/// Nodes are killed under load. The decode model drafts other tokens than the full model would, and still no answer changes.
#[test]
fn killed_nodes() -> Result<()> {
    for (decoder, mode) in [("decode", "exact"), ("full", "refresh")] {
        let mut rig = Rig::start_with(None, decoder, mode)?;
        let answers = rig.answers()?;
        rig.under_load(&answers, |rig, load| {
            for role in [Role::Prefill, Role::Decode] {
                wait_phase(rig.node(role), RUNNING)?;
                rig.node(role).kill()?;
                rig.wait_up(role, 1)?;
                load.wait_progress()?;
                rig.start_again(role)?;
            }
            Ok(())
        })
        .with_context(|| mode)?;
        ensure!(rig.migrations()? > 0.0, "{mode}: nothing has moved");
    }
    Ok(())
}

/// Bad modes are refused by name.
#[test]
fn unknown() -> Result<()> {
    let cluster = Cluster::start(&Golden::up_args("qwen3"))?;
    let error = post(&cluster, "/v1/completions", &request(&[1, 2], 4, "small", "best").0).unwrap_err().to_string();
    ensure!(error.contains("overfill_mode must be draft, refresh or exact, got best"), "{error}");
    Ok(())
}
