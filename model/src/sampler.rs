//! Choosing a token from logits. Stateless: the random number of a token is a function of the request's seed and the
//! token's position, so a request gives the same tokens whichever node samples them, alone or in a batch.

use std::{borrow::Cow, cmp::Ordering, collections::HashMap};

use overfill_kv::{OutputToken, SamplingParams};

/// Logits whose weights are summed up together.
const PART: usize = 1024;
/// Logits that are compared together: in most such groups none is among the best.
const FEW: usize = 64;
/// Tokens are told apart by likelihood into so many buckets for each factor of e, and so many altogether.
const BUCKETS_PER_NAT: f32 = 16.0;
const BUCKETS: usize = 512;

/// Chooses the token at `position` of a sequence from its logits `[vocab]`.
///
/// `prompt` and `output` are the tokens before it: penalties count them as vLLM does (repetition over both, presence
/// and frequency over the output). Log-probabilities are of the raw logits.
pub fn sample(logits: &[f32], params: &SamplingParams, prompt: &[u32], output: &[u32], position: usize) -> OutputToken {
    let adjusted = penalised(logits, params, prompt, output);
    let token = if params.temperature == 0.0 { argmax(&adjusted) } else { draw(&adjusted, params, position) };
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
    let top = best_in_order(logits, top as usize, f32::NEG_INFINITY);
    let top = top.iter().map(|candidate| (candidate.token, candidate.logit - normalizer)).collect();
    let logprob = logits.get(token as usize).map_or(f32::NAN, |l| l - normalizer);
    OutputToken { token, logprob, top }
}

/// The first of the greatest; 0 where there is none.
fn argmax(logits: &[f32]) -> u32 {
    let greatest = greatest_logit(logits);
    logits.iter().position(|logit| *logit == greatest).unwrap_or(0) as u32
}

/// The greatest, not counting NaN.
fn greatest_logit(logits: &[f32]) -> f32 {
    // In lanes, which the compiler makes vectors of; `f32::max` would not let it.
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = logits.chunks_exact(lanes.len());
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, greater);
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, *logit);
        }
    }
    lanes.into_iter().fold(rest, greater)
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token: u32,
    logit: f32,
}

/// Best first; of equals the lower id. There is no NaN among candidates.
fn better(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
}

/// The `count` best of those whose logits are at least `floor`, in no order.
///
/// Nearly all tokens cost a comparison and no more: the floor rises to the worst of the best so far.
fn best(logits: &[f32], count: usize, mut floor: f32) -> Vec<Candidate> {
    if count == 0 {
        return Vec::new();
    }
    // Twice as many are gathered before the worse half is thrown away, so that this is rare.
    let room = count.saturating_mul(2).min(logits.len());
    let mut kept = Vec::with_capacity(room);
    for (part, logits) in logits.chunks(FEW).enumerate() {
        if !logits.iter().fold(false, |any, logit| any | (*logit >= floor)) {
            continue;
        }
        for (i, &logit) in logits.iter().enumerate() {
            if logit >= floor {
                if kept.len() == room {
                    keep_best(&mut kept, count);
                    floor = kept[count - 1].logit;
                }
                kept.push(Candidate { token: (part * FEW + i) as u32, logit });
            }
        }
    }
    keep_best(&mut kept, count);
    kept
}

/// Throws all but the `count` best away; the last of what is left is the worst of them.
fn keep_best(candidates: &mut Vec<Candidate>, count: usize) {
    if candidates.len() > count {
        candidates.select_nth_unstable_by(count - 1, better);
        candidates.truncate(count);
    }
}

/// As [`best`], best first.
fn best_in_order(logits: &[f32], count: usize, floor: f32) -> Vec<Candidate> {
    let mut best = best(logits, count, floor);
    best.sort_unstable_by(better);
    best
}

/// The logits after penalties and biases.
fn penalised<'a>(logits: &'a [f32], params: &SamplingParams, prompt: &[u32], output: &[u32]) -> Cow<'a, [f32]> {
    let counted = params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
    if !counted && params.repetition_penalty == 1.0 && params.logit_bias.is_empty() {
        return Cow::Borrowed(logits);
    }
    let mut adjusted = logits.to_vec();
    penalise(&mut adjusted, params, prompt, output);
    Cow::Owned(adjusted)
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

/// A token drawn by its probability at `params.temperature`, among those that min-p, top-k and top-p leave.
///
/// In order of ids: logits that differ in their last bits, as another batch gives them, must not reorder the tokens.
fn draw(logits: &[f32], params: &SamplingParams, position: usize) -> u32 {
    let heat = Heat::new(logits, params.temperature);
    let worst = worst_left(logits, params, &heat);
    let weight = |token: usize, logit: f32| {
        let out = logit < worst.logit || logit == worst.logit && token > worst.token as usize;
        if out { 0.0 } else { heat.weight(logit) }
    };
    let weights = |part: usize| {
        let logits = logits[part * PART..].iter().take(PART).enumerate();
        logits.map(move |(i, &logit)| weight(part * PART + i, logit))
    };
    let sums: Vec<f64> = (0..logits.len().div_ceil(PART)).map(|part| weights(part).sum()).collect();
    let drawn = place(sums.iter().copied(), uniform(params.seed, position as u64)).and_then(|(part, share)| {
        let (i, _) = place(weights(part), share)?;
        Some((part * PART + i) as u32)
    });
    // Only a row with NaN or infinities can't be drawn from.
    drawn.unwrap_or_else(|| argmax(logits))
}

/// What makes probabilities, but for a factor, of logits.
struct Heat {
    greatest: f32,
    sharpness: f32,
}

impl Heat {
    fn new(logits: &[f32], temperature: f64) -> Self {
        // Beyond the largest f32 a colder temperature changes nothing, and infinity times a distance of 0 would be NaN.
        let sharpness = (1.0 / temperature).min(f64::from(f32::MAX)) as f32;
        Self { greatest: greatest_logit(logits), sharpness }
    }

    /// How far below the likeliest, in natural logarithms of the probability.
    fn distance(&self, logit: f32) -> f32 {
        (self.greatest - logit) * self.sharpness
    }

    /// 1 for the likeliest.
    fn weight(&self, logit: f32) -> f64 {
        f64::from((-self.distance(logit)).exp())
    }
}

/// The last token, from the best on, that the cuts leave. They are made as vLLM makes them: min-p first, then top-k,
/// then top-p of the probability that is left.
///
/// The vocabulary is never sorted: for top-k the best are selected, for top-p only tokens about as likely as the last
/// are put in order.
fn worst_left(logits: &[f32], params: &SamplingParams, heat: &Heat) -> Candidate {
    let top_k = params.top_k as usize;
    // A probability of min_p times the greatest, said of logits; without min-p minus infinity.
    let floor = (f64::from(heat.greatest) + params.temperature * params.min_p.ln()) as f32;
    let by_min_p = Candidate { token: u32::MAX, logit: floor };
    if (1..logits.len()).contains(&top_k) {
        let kept = best_in_order(logits, top_k, floor);
        let whole: f64 = kept.iter().map(|candidate| heat.weight(candidate.logit)).sum();
        let target = if params.top_p < 1.0 { params.top_p * whole } else { f64::INFINITY };
        last_within(&kept, target, heat).unwrap_or(by_min_p)
    } else if params.top_p < 1.0 {
        last_of_top_p(logits, params.top_p, floor, heat).unwrap_or(by_min_p)
    } else {
        by_min_p
    }
}

/// The last of the candidates that are needed to reach the weight `target`.
fn last_within(candidates: &[Candidate], target: f64, heat: &Heat) -> Option<Candidate> {
    let mut reached = 0.0;
    let needed = candidates.iter().take_while(|candidate| {
        let before = reached;
        reached += heat.weight(candidate.logit);
        before < target
    });
    needed.last().copied()
}

/// The last of the likeliest tokens that are needed to reach `top_p` of the weight of all from `floor` up.
fn last_of_top_p(logits: &[f32], top_p: f64, floor: f32, heat: &Heat) -> Option<Candidate> {
    let bucket = |logit: f32| ((heat.distance(logit) * BUCKETS_PER_NAT) as usize).min(BUCKETS - 1);
    let mut weights = [0.0; BUCKETS];
    for &logit in logits.iter().filter(|logit| **logit >= floor) {
        weights[bucket(logit)] += heat.weight(logit);
    }
    let mut missing = top_p * weights.iter().sum::<f64>();
    let last = weights.iter().position(|weight| {
        let reached = *weight >= missing;
        missing -= if reached { 0.0 } else { *weight };
        reached
    })?;
    let candidates = logits.iter().enumerate().map(|(token, &logit)| Candidate { token: token as u32, logit });
    let mut within: Vec<Candidate> = candidates.filter(|c| c.logit >= floor && bucket(c.logit) == last).collect();
    within.sort_unstable_by(better);
    last_within(&within, missing, heat)
}

/// Where the running sum of `weights` passes `share` of the whole, and which share of that weight it has passed.
fn place(weights: impl Iterator<Item = f64> + Clone, share: f64) -> Option<(usize, f64)> {
    let target = share * weights.clone().sum::<f64>();
    let mut before = 0.0;
    for (i, weight) in weights.enumerate() {
        if before + weight > target {
            return Some((i, ((target - before) / weight).min(1.0 - f64::EPSILON)));
        }
        before += weight;
    }
    None
}

/// The random number of the token at `position`, in [0, 1): neighbouring inputs give unrelated outputs (the finaliser
/// of SplitMix64).
fn uniform(seed: u64, position: u64) -> f64 {
    let mut z = seed.wrapping_add(position.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    (z >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use candle_core::{Device, Tensor};
    use candle_transformers::generation::{LogitsProcessor, Sampling};
    use proptest::prelude::*;

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

    /// Logits with many ties, spread as a model's.
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

    /// The same by sorting everything: tokens that are left with their probabilities, best first.
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
            let drawn = sample(&logits, &params, &[], &[], position).token;
            let place = left.iter().position(|(token, _)| *token == drawn);
            let place = place.expect("a token that was cut");
            let before: f64 = left[..place].iter().map(|(_, p)| p).sum();
            // Sums of other parts differ in their last bits.
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
                counts[0][sample(&logits, &params, &[], &[], position).token as usize] += 1;
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
            let pick = |logits: &[f32]| sample(logits, &params, &[], &[], 0).token;
            assert_eq!(pick(&[0.0, f32::INFINITY, 1.0]), 1);
            assert_eq!(pick(&[0.0, f32::NAN, 1.0]), 2);
            assert_eq!(pick(&[f32::NEG_INFINITY; 3]), 0);
            assert_eq!(pick(&[f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY]), 1);
        }
        let cold = SamplingParams { temperature: 1e-300, ..hot() };
        assert_eq!(sample(&[0.0, 1.0, 0.9], &cold, &[], &[], 0).token, 1);
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
