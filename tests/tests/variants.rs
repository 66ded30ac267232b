//! Several models on one decode node: each answers as on a node of its own, and the KV of a prompt is held once.

use anyhow::{Context, Result, ensure};
use overfill_tests::cluster::IDLE_GAUGES;
use overfill_tests::golden::{check, folder};
use overfill_tests::service::{decode_args_of, prefill_args, router_args};
use overfill_tests::{Completion, Golden, Request, Service};
use serde_json::{Value, json};

const PAIR: &str = "llama-tied";

/// A prefill node, a decode node that serves `m` (the pair's decode model) and `big` (its full model), and a router.
struct Shared {
    prefill: Service,
    decode: Service,
    router: Service,
}

impl Shared {
    fn start(pool_tokens: &str) -> Result<Self> {
        let prefill = Service::start::<&str>(prefill_args(PAIR), &[])?;
        let args = decode_args_of(PAIR, "decode");
        let args = args.into_iter().map(|arg| if arg == "8192" { pool_tokens.to_owned() } else { arg }).collect();
        let decode = Service::start(args, &["--variant", &format!("big={}", folder(PAIR, "full"))])?;
        let router = Service::start(router_args(), &["--prefill-url", &prefill.url(), "--decode-url", &decode.url()])?;
        router.wait_nodes(1, 1)?;
        Ok(Self { prefill, decode, router })
    }

    fn check_idle(&self) -> Result<()> {
        let nodes = [&self.prefill, &self.decode];
        for (node, gauge) in nodes.into_iter().flat_map(|node| IDLE_GAUGES.map(|gauge| (node, gauge))) {
            node.wait_metric(gauge, "", 0.0)?;
        }
        Ok(())
    }
}

fn request(prompt: &[u32], tokens: usize, model: &str) -> Request {
    Request::tokens(prompt, tokens as u32)
        .with("model", json!(model))
        .with("logprobs", json!(5))
        .with("return_tokens_as_token_ids", json!(true))
}

/// What the nodes held already of a request's prompt, in tokens: on the prefill node, on the decode node.
fn held(router: &Service, request: &Request) -> Result<(u64, u64)> {
    let request = request.clone().with("stream_options", json!({"include_overfill": true}));
    let events = request.stream(router)?.collect::<Result<Vec<Value>>>()?;
    let timings = events.iter().map(|event| &event["overfill"]["timings"]).find(|timings| !timings.is_null());
    let timings = timings.with_context(|| format!("no timings in {events:?}"))?;
    let of = |name: &str| timings[name].as_u64().with_context(|| timings.to_string());
    Ok((of("prefill_cached_tokens")?, of("decode_held_tokens")?))
}

#[test]
fn each_answers_as_on_a_node_of_its_own() -> Result<()> {
    let shared = Shared::start("8192")?;
    for (i, case) in Golden::load(PAIR)?.cases.iter().enumerate() {
        for (model, expected) in [("m", &case.two_stage), ("big", &case.full_only)] {
            for mode in ["draft", "exact"] {
                let expected = if mode == "exact" { &case.full_only } else { expected };
                let asked = request(&case.prompt, expected.len(), model).with("overfill_mode", json!(mode));
                check(expected, &asked.send(&shared.router)?).with_context(|| format!("case {i}, {model}, {mode}"))?;
            }
        }
    }
    shared.check_idle()
}

#[test]
fn a_prompt_is_prefilled_and_held_once() -> Result<()> {
    let shared = Shared::start("8192")?;
    let prompt: Vec<u32> = (0..200).map(|i| 5 + (i * 7) % 300).collect();
    let ask = |model| held(&shared.router, &request(&prompt, 8, model));
    ensure!(ask("m")? == (0, 0), "a new prompt is held already");
    // All but the block of the last token.
    for model in ["big", "m", "big"] {
        let held = ask(model)?;
        ensure!(held == (192, 192), "{model}: {held:?}");
    }
    shared.check_idle()
}

/// Requests of both models in one batch, in a pool that is too small for them, so that some are preempted.
#[test]
fn both_share_batches_and_blocks() -> Result<()> {
    let shared = Shared::start("640")?;
    let asked = |i: usize| {
        let prompt: Vec<u32> = (0..40 + i * 9).map(|at| (5 + (at * 11 + i / 2 * 17) % 300) as u32).collect();
        let asked = request(&prompt, 100, ["m", "big"][i % 2]);
        if i.is_multiple_of(3) { asked.with("temperature", json!(0.8)).with("seed", json!(i)) } else { asked }
    };
    let alone = (0..8).map(|i| asked(i).send(&shared.router)).collect::<Result<Vec<Completion>>>()?;
    std::thread::scope(|scope| {
        let (asked, alone, router) = (&asked, &alone, &shared.router);
        let client = |i: usize| {
            move || -> Result<()> {
                for _ in 0..3 {
                    asked(i).send(router)?.check_same(&alone[i]).with_context(|| format!("request {i}"))?;
                }
                Ok(())
            }
        };
        let threads: Vec<_> = (0..8).map(|i| scope.spawn(client(i))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?)
    })?;
    ensure!(shared.decode.metric("vllm:num_preemptions_total", "")? > Some(0.0), "no request was preempted");
    shared.check_idle()
}

/// A model that attends to other KV can't be a variant. The error names what differs.
#[test]
fn models_over_other_kv_are_refused() -> Result<()> {
    let args = decode_args_of(PAIR, "decode");
    let other = format!("other={}", folder("qwen3", "decode"));
    let Err(error) = Service::start(args, &["--variant", &other]) else { anyhow::bail!("{other} was accepted") };
    let error = format!("{error:#}");
    ensure!(error.contains("the two share their KV") && error.contains("qwen3"), "{error}");
    Ok(())
}
