use std::collections::BTreeSet;

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use proptest::prelude::*;

use super::*;

/// A context at `position` without any tokens before it, so that no penalties apply.
fn at(position: usize) -> SamplingContext<'static> {
    SamplingContext { prompt: &[], output: &[], position, allowed: None }
}

fn hot() -> SamplingParams {
    SamplingParams { seed: 7, ..SamplingParams::default() }
}

#[test]
fn a_token_depends_on_seed_and_position_alone() {
    let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
    let run = |seed| -> Vec<u32> {
        (0..40).map(|p| sample(&logits, &SamplingParams { seed, ..hot() }, &at(p)).token).collect()
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
        counts[sample(&logits, &hot(), &at(p)).token as usize] += 1;
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
            let token = sample(&logits, &params, &at(p)).token;
            assert!(allowed.contains(&token), "{params:?}: {token}");
        }
    };
    only(SamplingParams { top_k: 2, ..hot() }, &[1, 2]);
    only(SamplingParams { top_k: 1, ..hot() }, &[1]);
    only(SamplingParams { top_p: 0.3, ..hot() }, &[1]);
    only(SamplingParams { min_p: 0.5, ..hot() }, &[1, 2, 4]);
}

/// Logits with many ties and varying spread.
fn some_logits() -> impl Strategy<Value = Vec<f32>> {
    (1..700_usize, prop_oneof![Just(0.3_f32), Just(3.0), Just(20.0)], any::<u64>()).prop_map(|(n, spread, seed)| {
        (0..n).map(|i| ((uniform(seed, i as u64) * 40.0).round() / 20.0 - 1.0) as f32 * spread).collect()
    })
}

fn some_cuts() -> impl Strategy<Value = SamplingParams> {
    let top_k = prop_oneof![Just(0_u32), Just(1), 1..50_u32, 1..800_u32];
    let top_p = prop_oneof![Just(1.0), 0.001..1.0_f64];
    let min_p = prop_oneof![Just(0.0), Just(1.0), 0.0..1.0_f64, 1e-6..1e-3_f64];
    let temperature = prop_oneof![Just(1.0), 0.05..4.0_f64];
    (top_k, top_p, min_p, temperature).prop_map(|(top_k, top_p, min_p, temperature)| SamplingParams {
        top_k,
        top_p,
        min_p,
        temperature,
        ..SamplingParams::default()
    })
}

/// Reference implementation that sorts all tokens: the kept tokens with their probabilities, best first.
fn by_sorting(logits: &[f32], params: &SamplingParams) -> Vec<(u32, f64)> {
    let heat = Heat::new(logits, params.temperature);
    let mut left: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, l)| (i as u32, *l)).collect();
    left.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let floor = (f64::from(left[0].1) + params.temperature * params.min_p.ln()) as f32;
    left.retain(|(_, logit)| *logit >= floor);
    if params.top_k > 0 {
        left.truncate(params.top_k as usize);
    }
    let whole: f64 = left.iter().map(|(_, logit)| heat.weight(*logit)).sum();
    let mut before = 0.0;
    let needed = left.iter().take_while(|(_, logit)| {
        let outside = params.top_p < 1.0 && before >= params.top_p * whole;
        before += heat.weight(*logit);
        !outside
    });
    let left: Vec<(u32, f64)> = needed.map(|(token, logit)| (*token, heat.weight(*logit))).collect();
    let whole: f64 = left.iter().map(|(_, weight)| weight).sum();
    left.into_iter().map(|(token, weight)| (token, weight / whole)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cuts_leave_what_sorting_leaves(logits in some_logits(), params in some_cuts()) {
        let expected: BTreeSet<u32> = by_sorting(&logits, &params).iter().map(|(token, _)| *token).collect();
        let worst = worst_left(&logits, &params, &Heat::new(&logits, params.temperature));
        let tokens = logits.iter().enumerate().map(|(i, &logit)| Candidate { token: i as u32, logit });
        let left: BTreeSet<u32> = tokens.filter(|c| better(c, &worst).is_le()).map(|c| c.token).collect();
        prop_assert_eq!(left, expected);
    }

    #[test]
    fn a_token_is_drawn_where_the_sum_of_probabilities_passes_the_random_number(
        logits in some_logits(), params in some_cuts(), seed in any::<u64>(), position in 0..5000_usize,
    ) {
        let params = SamplingParams { seed, ..params };
        let mut left = by_sorting(&logits, &params);
        left.sort_by_key(|(token, _)| *token);
        let random = uniform(seed, position as u64);
        let drawn = sample(&logits, &params, &at(position)).token;
        let place = left.iter().position(|(token, _)| *token == drawn);
        let place = place.expect("a token that was cut");
        let before: f64 = left[..place].iter().map(|(_, p)| p).sum();
        // The order of summation differs, so sums differ in their last bits.
        prop_assert!(before <= random + 1e-9 && random <= before + left[place].1 + 1e-9, "{before} {random}");
    }
}

#[test]
fn draws_are_distributed_as_those_of_candle_transformers() {
    let logits: Vec<f32> = (0..40).map(|i| (i as f32 * 0.7).sin() * 2.0).collect();
    let tensor = Tensor::from_slice(&logits, logits.len(), &Device::Cpu).unwrap();
    let all = SamplingParams { temperature: 0.8, ..hot() };
    for (params, theirs) in [
        (all.clone(), Sampling::All { temperature: 0.8 }),
        (SamplingParams { top_k: 7, ..all.clone() }, Sampling::TopK { k: 7, temperature: 0.8 }),
        (SamplingParams { top_p: 0.6, ..all.clone() }, Sampling::TopP { p: 0.6, temperature: 0.8 }),
    ] {
        let mut processor = LogitsProcessor::from_sampling(3, theirs);
        let mut counts = [[0_i32; 40]; 2];
        for position in 0..20_000 {
            counts[0][sample(&logits, &params, &at(position)).token as usize] += 1;
            counts[1][processor.sample(&tensor).unwrap() as usize] += 1;
        }
        let apart: i32 = (0..40).map(|i| (counts[0][i] - counts[1][i]).abs()).sum();
        assert!(apart < 1600, "{params:?}: {apart} of 40000 draws apart: {counts:?}");
        assert!((0..40).all(|i| (counts[0][i] == 0) == (counts[1][i] == 0)), "{params:?}: {counts:?}");
    }
}

#[test]
fn rows_that_cannot_be_drawn_from_give_the_greatest() {
    let cuts = [hot(), SamplingParams { top_k: 2, ..hot() }, SamplingParams { top_p: 0.5, ..hot() }];
    for params in cuts {
        let pick = |logits: &[f32]| sample(logits, &params, &at(0)).token;
        assert_eq!(pick(&[0.0, f32::INFINITY, 1.0]), 1);
        assert_eq!(pick(&[0.0, f32::NAN, 1.0]), 2);
        assert_eq!(pick(&[f32::NEG_INFINITY; 3]), 0);
        assert_eq!(pick(&[f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY]), 1);
    }
    let cold = SamplingParams { temperature: 1e-300, ..hot() };
    assert_eq!(sample(&[0.0, 1.0, 0.9], &cold, &at(0)).token, 1);
}

#[test]
fn penalties_count_as_vllm_does() {
    let logits = vec![1.0, 1.1, 1.2];
    let greedy = SamplingParams::greedy;
    let pick = |params: SamplingParams, prompt: &[u32], output: &[u32]| {
        sample(&logits, &params, &SamplingContext { position: 9, ..SamplingContext::following(prompt, output) }).token
    };
    assert_eq!(pick(greedy(), &[2], &[2]), 2);
    assert_eq!(pick(SamplingParams { presence_penalty: 0.5, ..greedy() }, &[1], &[2]), 1);
    assert_eq!(pick(SamplingParams { frequency_penalty: 0.06, ..greedy() }, &[], &[2, 2]), 1);
    assert_eq!(pick(SamplingParams { repetition_penalty: 2.0, ..greedy() }, &[2], &[1]), 0);
    assert_eq!(pick(SamplingParams { logit_bias: [(0, 5.0)].into(), ..greedy() }, &[], &[]), 0);
}

#[test]
fn bad_words_and_early_ends_are_not_chosen() {
    let logits = vec![1.0, 1.1, 1.2];
    let pick = |params: &SamplingParams, prompt: &[u32], output: &[u32]| {
        sample(&logits, params, &SamplingContext::following(prompt, output)).token
    };
    let words = SamplingParams { bad_words: vec![vec![0, 2], vec![1, 1, 1]], ..SamplingParams::greedy() };
    assert_eq!(pick(&words, &[0], &[]), 2, "a word that begins in the prompt is allowed");
    assert_eq!(pick(&words, &[], &[0]), 1);
    assert_eq!(pick(&words, &[], &[1, 0]), 1);
    let all = SamplingParams { bad_words: vec![vec![2], vec![1, 1]], ..SamplingParams::greedy() };
    assert_eq!((pick(&all, &[], &[]), pick(&all, &[], &[1])), (1, 0));
    let late = SamplingParams { min_tokens: 2, end_token_ids: vec![2, 1], ..SamplingParams::greedy() };
    assert_eq!([&[][..], &[0], &[0, 0]].map(|output| pick(&late, &[2], output)), [0, 0, 2]);
    let hot = SamplingParams { temperature: 1.0, ..late };
    assert!((0..200).all(|seed| pick(&SamplingParams { seed, ..hot.clone() }, &[], &[0]) == 0));
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let logits = [1.0_f32, 2.0, 0.0];
    let params = SamplingParams { logit_bias: [(2, 50.0)].into(), logprobs: Some(2), ..SamplingParams::greedy() };
    let chosen = sample(&logits, &params, &at(0));
    assert_eq!(chosen.token, 2);
    assert!((chosen.logprob - -2.407_606).abs() < 1e-5, "{chosen:?}");
    assert_eq!(chosen.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 0]);
    let total: f32 = report(&logits, 0, 3).top.iter().map(|t| t.1.exp()).sum();
    assert!((total - 1.0).abs() < 1e-5);
}

#[test]
fn a_mask_leaves_only_what_it_allows() {
    let logits: Vec<f32> = (0..70).map(|i| (i as f32 * 0.7).sin() * 4.0).collect();
    let words = [1 << 3 | 1 << 30, 0, 1 << 1];
    let context = |position| SamplingContext { allowed: Some(TokenMask { words: &words }), ..at(position) };
    let mut seen = BTreeSet::new();
    for params in [hot(), SamplingParams { top_k: 2, ..hot() }, SamplingParams { top_p: 0.9, ..hot() }] {
        seen.extend((0..300).map(|position| sample(&logits, &params, &context(position)).token));
    }
    assert_eq!(seen, [3, 30, 65].into());
    let best = [3, 30, 65].into_iter().max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
    assert_eq!(sample(&logits, &SamplingParams::greedy(), &context(0)).token, best as u32);
    let all = [u32::MAX; 3];
    let all = SamplingContext { allowed: Some(TokenMask { words: &all }), ..at(7) };
    assert_eq!(sample(&logits, &hot(), &all).token, sample(&logits, &hot(), &at(7)).token);
}

#[test]
fn a_mask_whose_tokens_are_impossible_still_gives_one_of_them() {
    let context = SamplingContext { allowed: Some(TokenMask { words: &[1 << 2] }), ..at(0) };
    for params in [hot(), SamplingParams::greedy()] {
        assert_eq!(sample(&[0.0, 1.0, f32::NEG_INFINITY], &params, &context).token, 2);
    }
}
