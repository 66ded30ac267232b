//! Choosing a token from logits. Sampling is stateless: the random number of a token is a function of the request's
//! seed and the token's position. A request therefore gets the same tokens on every node, alone or in a batch.

use std::{borrow::Cow, cmp::Ordering, collections::HashMap};

use overfill_kv::{OutputToken, SamplingParams};

/// Number of logits whose weights are summed together.
const PART: usize = 1024;
/// Number of logits compared with the floor at once. Most such groups contain none of the best tokens and are skipped.
const FEW: usize = 64;
/// Histogram of log-likelihood: buckets per nat, and number of buckets.
const BUCKETS_PER_NAT: f32 = 16.0;
const BUCKETS: usize = 512;

/// Set of allowed tokens: bit `t % 32` of word `t / 32` stands for token `t`. Tokens beyond the last word are not
/// allowed.
#[derive(Clone, Copy, Debug)]
pub struct TokenMask<'a> {
    /// `[vocab / 32]`, rounded up.
    pub words: &'a [u32],
}

impl TokenMask<'_> {
    fn allows(self, token: usize) -> bool {
        self.words.get(token / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// The token to choose if all allowed ones are impossible.
    pub(crate) fn first(self) -> u32 {
        let first = self.words.iter().position(|word| *word != 0);
        first.map_or(0, |i| i as u32 * 32 + self.words[i].trailing_zeros())
    }
}

/// What a choice depends on besides logits and parameters.
#[derive(Clone, Copy, Debug)]
pub struct SamplingContext<'a> {
    /// The request's prompt. Only the repetition penalty counts it.
    pub prompt: &'a [u32],
    /// The output before the token. All penalties count it.
    pub output: &'a [u32],
    /// Position of the token in the sequence, from 0. Seed and position determine the token's random number.
    pub position: usize,
    /// Allowed tokens, at least one. `None` allows all tokens.
    pub allowed: Option<TokenMask<'a>>,
}

impl<'a> SamplingContext<'a> {
    /// The context of the token after `prompt` and `output`, with all tokens allowed.
    pub fn following(prompt: &'a [u32], output: &'a [u32]) -> Self {
        Self { prompt, output, position: prompt.len() + output.len(), allowed: None }
    }
}

/// Chooses a token from its logits `[vocab]`.
///
/// Penalties follow vLLM: the repetition penalty covers prompt and output, presence and frequency penalties cover the
/// output. The mask applies before top-k, top-p and min-p. Log-probabilities are computed from the raw logits.
pub fn sample(logits: &[f32], params: &SamplingParams, context: &SamplingContext<'_>) -> OutputToken {
    let adjusted = adjusted(logits, params, context);
    let token = match params.temperature == 0.0 {
        true => argmax(&adjusted),
        false => draw(&adjusted, params, context.position),
    };
    // If every allowed token has a logit of minus infinity, the choice above may return a token that is not allowed.
    let token = match context.allowed {
        Some(mask) if !mask.allows(token as usize) => mask.first(),
        _ => token,
    };
    match params.logprobs {
        Some(top) => report(logits, token, top),
        None => OutputToken { token, logprob: f32::NAN, top: Vec::new() },
    }
}

/// The log-probability of `token` under `logits`, and those of the `top` most likely tokens, best first.
pub fn report(logits: &[f32], token: u32, top: u32) -> OutputToken {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - greatest).exp()).sum();
    let normalizer = greatest + sum.ln() as f32;
    let top = best_in_order(logits, top as usize, f32::NEG_INFINITY);
    let top = top.iter().map(|candidate| (candidate.token, candidate.logit - normalizer)).collect();
    let logprob = logits.get(token as usize).map_or(f32::NAN, |l| l - normalizer);
    OutputToken { token, logprob, top }
}

/// Index of the greatest logit, the first one on ties; 0 if all logits are NaN or there are none.
fn argmax(logits: &[f32]) -> u32 {
    let greatest = greatest_logit(logits);
    logits.iter().position(|logit| *logit == greatest).unwrap_or(0) as u32
}

/// The greatest logit, ignoring NaN.
fn greatest_logit(logits: &[f32]) -> f32 {
    // Split into lanes so that the compiler vectorises the loop; `f32::max` would prevent that.
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

/// A token and its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token: u32,
    logit: f32,
}

/// Orders by descending logit, then by ascending token id. Candidates are never NaN.
fn better(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
}

/// The `count` best tokens among those with logits of at least `floor`, unordered.
///
/// The floor rises to the worst of the best tokens so far, so nearly every token costs a single comparison.
fn best(logits: &[f32], count: usize, mut floor: f32) -> Vec<Candidate> {
    if count == 0 {
        return Vec::new();
    }
    // Collects up to twice as many before the worse half is dropped, so that dropping is rare.
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

/// Drops all but the `count` best. If it drops any, the last element is the worst of the rest.
fn keep_best(candidates: &mut Vec<Candidate>, count: usize) {
    if candidates.len() > count {
        candidates.select_nth_unstable_by(count - 1, better);
        candidates.truncate(count);
    }
}

/// Like [`best`], ordered best first.
fn best_in_order(logits: &[f32], count: usize, floor: f32) -> Vec<Candidate> {
    let mut best = best(logits, count, floor);
    best.sort_unstable_by(better);
    best
}

/// The logits after penalties, biases and the mask.
fn adjusted<'a>(logits: &'a [f32], params: &SamplingParams, context: &SamplingContext<'_>) -> Cow<'a, [f32]> {
    let changes = changes(params, context);
    if changes.is_empty() && context.allowed.is_none() {
        return Cow::Borrowed(logits);
    }
    let mut adjusted = logits.to_vec();
    for (token, change) in changes {
        if let Some(logit) = adjusted.get_mut(token as usize) {
            *logit = change.apply(*logit, params.repetition_penalty as f32);
        }
    }
    if let Some(mask) = context.allowed {
        for (token, logit) in adjusted.iter_mut().enumerate() {
            *logit = if mask.allows(token) { *logit } else { f32::NEG_INFINITY };
        }
    }
    Cow::Owned(adjusted)
}

/// What penalties and biases do to a token's logit, in the order of the fields.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Change {
    /// Whether the repetition penalty applies.
    pub(crate) is_repeated: bool,
    /// Presence and frequency penalties.
    pub(crate) subtracted: f32,
    pub(crate) bias: f32,
}

impl Change {
    fn apply(self, logit: f32, repetition_penalty: f32) -> f32 {
        let repeated = if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
        (if self.is_repeated { repeated } else { logit }) - self.subtracted + self.bias
    }
}

/// The changes of tokens, by token. Tokens may be outside the vocabulary.
pub(crate) fn changes(params: &SamplingParams, context: &SamplingContext<'_>) -> HashMap<u32, Change> {
    let mut changes: HashMap<u32, Change> = HashMap::new();
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        let mut counts: HashMap<u32, u32> = HashMap::new();
        for token in context.output {
            *counts.entry(*token).or_default() += 1;
        }
        for (token, count) in counts {
            let subtracted = params.presence_penalty as f32 + params.frequency_penalty as f32 * count as f32;
            changes.entry(token).or_default().subtracted = subtracted;
        }
    }
    if params.repetition_penalty != 1.0 {
        for token in context.prompt.iter().chain(context.output) {
            changes.entry(*token).or_default().is_repeated = true;
        }
    }
    for (token, bias) in &params.logit_bias {
        changes.entry(*token).or_default().bias = *bias;
    }
    // A token that would complete a bad word.
    let completed = params.bad_words.iter().filter_map(|word| {
        let (last, before) = word.split_last()?;
        context.output.ends_with(before).then_some(last)
    });
    let early = context.output.len() < params.min_tokens as usize;
    let ends = params.end_token_ids.iter().filter(|_| early);
    for token in completed.chain(ends) {
        changes.entry(*token).or_default().bias = f32::NEG_INFINITY;
    }
    changes
}

/// Draws a token by its probability at `params.temperature`, among the tokens that min-p, top-k and top-p keep.
///
/// Tokens are walked in order of their ids. Logits may differ in their last bits between batches, and an order by logit
/// would then change.
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
    // Drawing fails only if the row contains NaN or infinities.
    drawn.unwrap_or_else(|| argmax(logits))
}

/// Turns logits into unnormalised probabilities.
struct Heat {
    greatest: f32,
    sharpness: f32,
}

impl Heat {
    fn new(logits: &[f32], temperature: f64) -> Self {
        Self { greatest: greatest_logit(logits), sharpness: sharpness(temperature) }
    }

    /// Distance to the most likely token, in nats.
    fn distance(&self, logit: f32) -> f32 {
        (self.greatest - logit) * self.sharpness
    }

    /// Unnormalised probability; 1 for the most likely token.
    fn weight(&self, logit: f32) -> f64 {
        f64::from((-self.distance(logit)).exp())
    }
}

/// Factor of distances between logits.
pub(crate) fn sharpness(temperature: f64) -> f32 {
    // Clamped to the largest f32. Colder temperatures make no difference beyond it, and infinity times a distance of 0
    // would be NaN.
    (1.0 / temperature).min(f64::from(f32::MAX)) as f32
}

/// Distance in logits from the most likely token to the least likely one that min-p keeps, 0 or less: there, the
/// probability is `min_p` times the greatest one. Minus infinity without min-p.
pub(crate) fn min_p_distance(params: &SamplingParams) -> f64 {
    params.temperature * params.min_p.ln()
}

/// The worst token that the cuts keep. The cuts follow vLLM's order: min-p first, then top-k, then top-p of the
/// remaining probability.
///
/// The vocabulary is never sorted. Top-k selects the best tokens. Top-p only sorts the tokens in the histogram bucket
/// of the last kept token.
fn worst_left(logits: &[f32], params: &SamplingParams, heat: &Heat) -> Candidate {
    let top_k = params.top_k as usize;
    let floor = (f64::from(heat.greatest) + min_p_distance(params)) as f32;
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

/// The last of the leading candidates needed to reach the weight `target`.
fn last_within(candidates: &[Candidate], target: f64, heat: &Heat) -> Option<Candidate> {
    let mut reached = 0.0;
    let needed = candidates.iter().take_while(|candidate| {
        let before = reached;
        reached += heat.weight(candidate.logit);
        before < target
    });
    needed.last().copied()
}

/// The last of the most likely tokens needed to reach `top_p` of the weight of all tokens with logits of at least
/// `floor`.
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

/// Finds where the running sum of `weights` exceeds `share` of the total. Returns the index, and how far into that
/// weight the target lies, as a fraction below 1.
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

/// The random number of the token at `position`, in [0, 1).
fn uniform(seed: u64, position: u64) -> f64 {
    random_bits(seed, position) as f64 / (1_u64 << RANDOM_BITS) as f64
}

/// Bits of a random number; as many as an f64 represents exactly.
pub(crate) const RANDOM_BITS: u32 = 53;

/// The random number as an integer of [`RANDOM_BITS`] bits. It uses the finaliser of SplitMix64, so neighbouring inputs give
/// unrelated outputs.
pub(crate) fn random_bits(seed: u64, position: u64) -> u64 {
    let mut z = seed.wrapping_add(position.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    z >> (u64::BITS - RANDOM_BITS)
}

#[cfg(test)]
mod tests;
