//! The watch on real nodes: its counts are those of the full model alone.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use overfill_tests::cluster::{IDLE_GAUGES, binary};
use overfill_tests::completion::post;
use overfill_tests::service::{decode_args_of, prefill_args, router_args};
use overfill_tests::{Request, Service, wait_for};
use serde_json::{Value, json};

const PAIR: &str = "llama-tied";
const ANSWER_TOKENS: usize = 60;

/// Counts of some answers.
#[derive(Debug, Default)]
struct Counts {
    tokens: f64,
    agreed: f64,
    decode_nats: f64,
    full_nats: f64,
    equal: f64,
    parted_at: f64,
}

impl Counts {
    /// Those that the router has counted so far.
    fn read(router: &Service) -> Result<Self> {
        let read = |name: &str, labels: &str| {
            let name = format!("overfill_watch_{name}");
            router.metric(&name, labels)?.with_context(|| name)
        };
        Ok(Self {
            tokens: read("tokens_total", "")?,
            agreed: read("agreed_tokens_total", "")?,
            decode_nats: read("decode_nats_total", "")?,
            full_nats: read("full_nats_total", "")?,
            equal: read("answers_total", "result=\"equal\"")?,
            parted_at: read("parted_at_tokens_sum", "")?,
        })
    }

    fn check(&self, expected: &Self) -> Result<()> {
        let exact = |c: &Self| [c.tokens, c.agreed, c.equal, c.parted_at];
        let is_near = |a: f64, b: f64| (a - b).abs() <= 1e-3 + 1e-4 * b.abs();
        ensure!(
            exact(self) == exact(expected)
                && is_near(self.decode_nats, expected.decode_nats)
                && is_near(self.full_nats, expected.full_nats),
            "{self:?} instead of {expected:?}"
        );
        Ok(())
    }
}

/// Greedy with seed 0. The penalty counts prompt and output alike.
fn request(prompt: &[u32], tokens: usize, seed: usize) -> Request {
    let request = Request::tokens(prompt, tokens as u32)
        .with("logprobs", json!(0))
        .with("return_tokens_as_token_ids", json!(true));
    match seed {
        0 => request,
        _ => request
            .with("temperature", json!(0.8))
            .with("top_p", json!(0.9))
            .with("seed", json!(seed))
            .with("repetition_penalty", json!(1.2)),
    }
}

/// Adds what the full model alone says about an answer: the one token that it would choose after each part, and the
/// log-probabilities of a prompt that contains the answer.
fn add(counts: &mut Counts, router: &Service, prompt: &[u32], seed: usize) -> Result<()> {
    let answer = request(prompt, ANSWER_TOKENS, seed).send(router)?;
    let all: Vec<u32> = prompt.iter().chain(&answer.tokens).copied().collect();
    let body = json!({"prompt": all, "max_tokens": 1, "prompt_logprobs": 0});
    let scored = post(router, "/v1/completions", &body)?;
    let mut parted_at = None;
    for (i, token) in answer.tokens.iter().enumerate() {
        let known = &all[..prompt.len() + i];
        let is_same = request(known, 1, seed).send(router)?.tokens == [*token];
        if i == 0 {
            ensure!(is_same, "the first token is not the full model's");
            continue;
        }
        let score = &scored["choices"][0]["prompt_logprobs"][known.len()][token.to_string()]["logprob"];
        counts.tokens += 1.0;
        counts.agreed += f64::from(u8::from(is_same));
        counts.decode_nats -= f64::from(answer.logprobs[i]);
        counts.full_nats -= score.as_f64().with_context(|| format!("no log-probability of {token}: {score}"))?;
        if !is_same {
            parted_at.get_or_insert(i + 1);
        }
    }
    match parted_at {
        None => counts.equal += 1.0,
        Some(at) => counts.parted_at += at as f64,
    }
    Ok(())
}

/// The whole watch of a decode model: `decode`, which is random, or `full`, which is the full model itself.
fn watch(decoder: &str) -> Result<Counts> {
    // Scores take several steps, and share blocks with the prompt's prefix.
    let prefill = Service::start::<&str>(prefill_args(PAIR), &[])?;
    let decode = Service::start::<&str>(decode_args_of(PAIR, decoder), &[])?;
    let urls = ["--prefill-url", &prefill.url(), "--decode-url", &decode.url(), "--watch-share", "1"];
    let router = Service::start(router_args(), &urls)?;
    router.wait_nodes(1, 1)?;
    let mut expected = Counts::default();
    for (i, length) in [1, 16, 33, 140].into_iter().enumerate() {
        let prompt: Vec<u32> = (0..length).map(|at| (5 + (at * 7 + i * 31) % 300) as u32).collect();
        add(&mut expected, &router, &prompt, i % 2 * (i + 1))?;
    }
    wait_for("four scores", || {
        let done = router.metric("overfill_watch_answers_total", "")?;
        Ok((done != Some(4.0)).then(|| format!("{done:?}")))
    })?;
    Counts::read(&router)?.check(&expected)?;
    let status = Command::new(binary()?).args(["status", "--json", "--router", &router.url()]).output()?;
    let status: Value = serde_json::from_slice(&status.stdout)?;
    let watch = &status["models"][0]["watch"];
    let agreement = watch["agreement"].as_f64().with_context(|| status.to_string())?;
    ensure!((agreement - expected.agreed / expected.tokens).abs() < 1e-9 && watch["answers"] == 4, "{watch}");
    for (node, gauge) in [&prefill, &decode].into_iter().flat_map(|node| IDLE_GAUGES.map(|gauge| (node, gauge))) {
        node.wait_metric(gauge, "", 0.0)?;
    }
    Ok(expected)
}

#[test]
fn counts_are_those_of_the_full_model_alone() -> Result<()> {
    let random = watch("decode")?;
    ensure!(random.agreed < random.tokens / 2.0 && random.full_nats > random.decode_nats, "{random:?}");
    let same = watch("full")?;
    ensure!(same.agreed == same.tokens && same.equal == 4.0, "{same:?}");
    ensure!((same.full_nats - same.decode_nats).abs() < 1e-2, "{same:?}");
    Ok(())
}
