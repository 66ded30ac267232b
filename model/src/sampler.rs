//! Choosing a token from logits. Stateless: the random number of a token is a function of the request's seed and the
//! token's position, so a request gives the same tokens whichever node samples them, alone or in a batch.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use overfill_kv::{OutputToken, SamplingParams};

/// Chooses the token at `position` of a sequence from its logits `[vocab]`.
///
/// `prompt` and `output` are the tokens before it: penalties count them as vLLM does (repetition over both, presence
/// and frequency over the output). Log-probabilities are of the raw logits.
pub fn sample(logits: &[f32], params: &SamplingParams, prompt: &[u32], output: &[u32], position: usize) -> OutputToken {
    let token = if is_plain_greedy(params) {
        argmax(logits)
    } else {
        let mut adjusted = logits.to_vec();
        penalise(&mut adjusted, params, prompt, output);
        if params.temperature == 0.0 { argmax(&adjusted) } else { draw(adjusted, params, position) }
    };
    match params.logprobs {
        Some(top) => report(logits, token, top),
        None => OutputToken { token, logprob: f32::NAN, top: Vec::new() },
    }
}

/// The log-probability of `token` under `logits`, and of the `top` likeliest tokens, best first.
pub fn report(logits: &[f32], token: u32, top: u32) -> OutputToken {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - greatest).exp()).sum();
    let normalizer = greatest + sum.ln() as f32;
    let top = likeliest(logits, top as usize).into_iter().map(|t| (t, logits[t as usize] - normalizer)).collect();
    let logprob = logits.get(token as usize).map_or(f32::NAN, |l| l - normalizer);
    OutputToken { token, logprob, top }
}

fn is_plain_greedy(params: &SamplingParams) -> bool {
    params.temperature == 0.0
        && params.presence_penalty == 0.0
        && params.frequency_penalty == 0.0
        && params.repetition_penalty == 1.0
        && params.logit_bias.is_empty()
}

/// The first of the greatest.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// The `count` greatest, best first, the lower id first among equals.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.select_nth_unstable_by(count - 1, order);
    ids.truncate(count);
    ids.sort_unstable_by(order);
    ids
}

fn penalise(logits: &mut [f32], params: &SamplingParams, prompt: &[u32], output: &[u32]) {
    let mut counts: HashMap<u32, u32> = HashMap::new();
    for token in output {
        *counts.entry(*token).or_default() += 1;
    }
    if params.repetition_penalty != 1.0 {
        let penalty = params.repetition_penalty as f32;
        let mut seen: Vec<u32> = prompt.iter().copied().chain(counts.keys().copied()).collect();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }
    for (token, count) in counts {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit -= params.presence_penalty as f32 + params.frequency_penalty as f32 * count as f32;
        }
    }
    for (token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit += bias;
        }
    }
}

fn draw(logits: Vec<f32>, params: &SamplingParams, position: usize) -> u32 {
    let fallback = argmax(&logits);
    let temperature = params.temperature;
    let (k, p) = (params.top_k as usize, params.top_p);
    let limits_k = k > 0 && k < logits.len();
    let sampling = match (limits_k, p < 1.0) {
        (true, true) => Sampling::TopKThenTopP { k, p, temperature },
        (true, false) => Sampling::TopK { k, temperature },
        (false, true) => Sampling::TopP { p, temperature },
        (false, false) => Sampling::All { temperature },
    };
    let count = logits.len();
    let keep_likely = |probabilities: &mut [f32]| {
        let least = probabilities.iter().copied().fold(0.0, f32::max) * params.min_p as f32;
        probabilities.iter_mut().filter(|p| **p < least).for_each(|p| *p = 0.0);
    };
    let mut processor = LogitsProcessor::from_sampling(mix(params.seed, position as u64), sampling);
    Tensor::from_vec(logits, count, &Device::Cpu)
        .and_then(|logits| processor.sample_f(&logits, keep_likely))
        // Only a row of NaN or infinities can't be drawn from.
        .unwrap_or(fallback)
}

/// A seed for the token at `position`: neighbouring inputs give unrelated outputs (the finaliser of SplitMix64).
fn mix(seed: u64, position: u64) -> u64 {
    let mut z = seed.wrapping_add(position.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hot() -> SamplingParams {
        SamplingParams { seed: 7, ..SamplingParams::default() }
    }

    #[test]
    fn a_token_depends_on_seed_and_position_alone() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let run = |seed| -> Vec<u32> {
            (0..40).map(|p| sample(&logits, &SamplingParams { seed, ..hot() }, &[], &[], p).token).collect()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert!(run(1).windows(2).any(|w| w[0] != w[1]));
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0_f32, 1.0, 2.0].map(|p: f32| p);
        let mut counts = [0_u32; 3];
        for p in 0..6000 {
            counts[sample(&logits, &hot(), &[], &[], p).token as usize] += 1;
        }
        // e^0 : e^1 : e^2 = 0.090 : 0.245 : 0.665
        for (count, expected) in counts.iter().zip([540.0, 1468.0, 3992.0]) {
            assert!((f64::from(*count) - expected).abs() < 150.0, "{counts:?}");
        }
    }

    #[test]
    fn cuts_leave_only_the_likely() {
        let logits: Vec<f32> = vec![0.0, 3.0, 2.9, -1.0, 2.8];
        let only = |params: SamplingParams, allowed: &[u32]| {
            for p in 0..300 {
                let token = sample(&logits, &params, &[], &[], p).token;
                assert!(allowed.contains(&token), "{params:?}: {token}");
            }
        };
        only(SamplingParams { top_k: 2, ..hot() }, &[1, 2]);
        only(SamplingParams { top_k: 1, ..hot() }, &[1]);
        only(SamplingParams { top_p: 0.3, ..hot() }, &[1]);
        only(SamplingParams { min_p: 0.5, ..hot() }, &[1, 2, 4]);
    }

    #[test]
    fn penalties_count_as_vllm_does() {
        let logits = vec![1.0, 1.1, 1.2];
        let greedy = SamplingParams::greedy;
        let pick =
            |params: SamplingParams, prompt: &[u32], output: &[u32]| sample(&logits, &params, prompt, output, 9).token;
        assert_eq!(pick(greedy(), &[2], &[2]), 2);
        assert_eq!(pick(SamplingParams { presence_penalty: 0.5, ..greedy() }, &[1], &[2]), 1);
        assert_eq!(pick(SamplingParams { frequency_penalty: 0.06, ..greedy() }, &[], &[2, 2]), 1);
        assert_eq!(pick(SamplingParams { repetition_penalty: 2.0, ..greedy() }, &[2], &[1]), 0);
        assert_eq!(pick(SamplingParams { logit_bias: [(0, 5.0)].into(), ..greedy() }, &[], &[]), 0);
    }

    #[test]
    fn logprobs_are_of_the_raw_logits() {
        let logits = [1.0_f32, 2.0, 0.0];
        let params = SamplingParams { logit_bias: [(2, 50.0)].into(), logprobs: Some(2), ..SamplingParams::greedy() };
        let chosen = sample(&logits, &params, &[], &[], 0);
        assert_eq!(chosen.token, 2);
        assert!((chosen.logprob - -2.407_606).abs() < 1e-5, "{chosen:?}");
        assert_eq!(chosen.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 0]);
        let total: f32 = report(&logits, 0, 3).top.iter().map(|t| t.1.exp()).sum();
        assert!((total - 1.0).abs() < 1e-5);
    }
}
