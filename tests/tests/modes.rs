//! Modes refresh and exact on running clusters, against references of PyTorch and against the full model alone.

use anyhow::{Context, Result, ensure};
use overfill_tests::completion::post;
use overfill_tests::golden::{check, check_refresh, refresh_cases};
use overfill_tests::rig::{RUNNING, Role, wait_phase};
use overfill_tests::{Cluster, Completion, Golden, Request, Rig};
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

/// Requests of all modes at once, in pools that are too small for them, have the answers that each has alone.
#[test]
fn small_pools() -> Result<()> {
    let mut args = Golden::up_args("llama-tied");
    args.iter_mut().filter(|arg| *arg == "16384").for_each(|arg| "512".clone_into(arg));
    let cluster = Cluster::start(&args)?;
    let asked = |i: usize| {
        let prompt: Vec<u32> = (0..30 + i * 7).map(|at| (5 + (at * 11 + i * 17) % 300) as u32).collect();
        let (model, mode) = ([("small", "exact"), ("small", "refresh"), ("big", "exact"), ("small", "draft")])[i % 4];
        let asked = Request::tokens(&prompt, 90).with("model", json!(model)).with("overfill_mode", json!(mode));
        if i % 3 == 0 { asked.with("temperature", json!(0.8)).with("seed", json!(i)) } else { asked }
    };
    let alone: Vec<Completion> = (0..12).map(|i| asked(i).send(&cluster)).collect::<Result<_>>()?;
    std::thread::scope(|scope| {
        let (cluster, asked, alone) = (&cluster, &asked, &alone);
        let threads: Vec<_> = (0..12)
            .map(|i| {
                scope.spawn(move || -> Result<()> {
                    for _ in 0..2 {
                        let answer = asked(i).send(cluster)?;
                        ensure!(answer == alone[i], "request {i}: {answer:?} instead of {:?}", alone[i]);
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?)
    })?;
    let preempted = cluster.processes().iter().filter(|process| process.name.contains("decode"));
    let preempted: f64 =
        preempted.map(|process| cluster.gauge(process, "vllm:num_preemptions_total")).sum::<Result<f64>>()?;
    ensure!(preempted > 0.0, "no request was preempted");
    cluster.wait_idle()
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
