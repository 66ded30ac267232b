//! Tokens that the device chooses, against the sampler of the host.

use overfill_kv::{BlockId, KvDtype, OutputToken, SamplingParams};

use super::{gpu, on_gpu, options};
use crate::{
    Choice, Engine, Outputs, SamplingContext, SequenceSlice, TokenMask, Want, WeightFormat,
    cuda::{device::Gpu, memory::Buffer, pack::Half, sampler::Sampler},
    no_layers, sample,
    sampler::changes,
};

/// Rows of a launch.
const ROWS: usize = 8;

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % end
    }

    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        self.below(1 << 20) as f64 / (1 << 20) as f64
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }
}

/// What a row is chosen from, and how.
struct Case {
    logits: Vec<f32>,
    params: SamplingParams,
    prompt: Vec<u32>,
    output: Vec<u32>,
    position: usize,
    mask: Option<Vec<u32>>,
}

impl Case {
    fn plain(logits: Vec<f32>, params: SamplingParams) -> Self {
        Self { logits, params, prompt: Vec::new(), output: Vec::new(), position: 3, mask: None }
    }

    fn random(random: &mut Random, vocab_size: usize) -> Self {
        let spread = random.one_of(&[0.3, 3.0, 20.0]);
        // Few different values make ties.
        let steps = random.one_of(&[4.0, 40.0, 1e6]);
        let logit = |random: &mut Random| (((random.unit() * steps).round() / steps * 2.0 - 1.0) * spread) as f32;
        let logits = (0..vocab_size).map(|_| logit(random)).collect();
        let params = SamplingParams {
            temperature: random.one_of(&[0.0, 1.0, 1.0, 0.05, 0.7, 4.0]),
            top_k: random.one_of(&[0, 0, 1, 2, 7, 50, vocab_size as u32, 100_000]),
            top_p: random.one_of(&[1.0, 1.0, 0.001, 0.31, 0.57, 0.93]),
            min_p: random.one_of(&[0.0, 0.0, 1e-4, 0.07, 0.43, 1.0]),
            seed: random.below(1 << 30) as u64,
            presence_penalty: random.one_of(&[0.0, 0.0, 1.5, -0.7]),
            frequency_penalty: random.one_of(&[0.0, 0.0, 0.4, -0.3]),
            repetition_penalty: random.one_of(&[1.0, 1.0, 1.3, 0.8]),
            logit_bias: (0..random.one_of(&[0, 0, 3])).map(|i| (random.below(vocab_size) as u32, i as f32)).collect(),
            logprobs: random.one_of(&[None, Some(0), Some(3), Some(20)]),
            bad_words: (0..random.one_of(&[0, 0, 4])).map(|_| vec![random.below(vocab_size) as u32]).collect(),
            min_tokens: random.one_of(&[0, 0, 1 << 20]),
            end_token_ids: (0..3).map(|_| random.below(vocab_size) as u32).collect(),
            ..SamplingParams::default()
        };
        // Some tokens of a prompt may be outside of the vocabulary.
        let mut tokens = |count: usize| (0..count).map(|_| random.below(vocab_size + 3) as u32).collect();
        let (prompt, output) = (tokens(20), tokens(10));
        let word = |random: &mut Random| (random.below(1 << 16) << 16 | random.below(1 << 16)) as u32;
        let masked = random.below(4) == 0;
        let mask = masked.then(|| (0..vocab_size.div_ceil(32)).map(|_| word(random) | 1).collect());
        Self { logits, params, prompt, output, position: random.below(5000), mask }
    }

    fn choice(&self) -> Choice<'_> {
        let allowed = self.mask.as_ref().map(|words| TokenMask { words });
        let context = SamplingContext { prompt: &self.prompt, output: &self.output, position: self.position, allowed };
        Choice { params: &self.params, context }
    }
}

/// What the device chooses. All cases have the same number of logits.
fn chosen(gpu: &Gpu, cases: &[Case]) -> Vec<OutputToken> {
    let vocab_size = cases[0].logits.len();
    let stride = vocab_size.next_multiple_of(16);
    let mut sampler = Sampler::new(gpu, ROWS, vocab_size).unwrap();
    cases
        .chunks(ROWS)
        .flat_map(|cases| {
            // Rows in another order than choices. What is between rows is never read.
            let mut logits = vec![f32::NAN; ROWS * stride];
            sampler.clear();
            for (i, case) in cases.iter().enumerate() {
                let row = ROWS - 1 - i;
                logits[row * stride..][..vocab_size].copy_from_slice(&case.logits);
                let choice = case.choice();
                assert!(sampler.add(row, &choice, &changes(choice.params, &choice.context)));
            }
            let logits = Buffer::of(gpu.launcher.stream(), &logits).unwrap();
            sampler.queue(gpu, logits.pointer(), stride).unwrap();
            gpu.launcher.stream().synchronize().unwrap();
            sampler.chosen().collect::<Vec<_>>()
        })
        .collect()
}

/// NaN agrees with NaN; other values to float rounding.
fn agrees(a: f32, b: f32) -> bool {
    a.is_nan() && b.is_nan() || a == b || (a - b).abs() < 1e-5 * a.abs().max(1.0)
}

fn check(gpu: &Gpu, cases: &[Case]) {
    for (case, got) in cases.iter().zip(chosen(gpu, cases)) {
        let expected = sample(&case.logits, &case.params, &case.choice().context);
        let tokens = |token: &OutputToken| token.top.iter().map(|top| top.0).collect::<Vec<_>>();
        let about = || format!("{} logits, {:?}: {got:?} instead of {expected:?}", case.logits.len(), case.params);
        assert_eq!((got.token, tokens(&got)), (expected.token, tokens(&expected)), "{}", about());
        let pairs = got.top.iter().zip(&expected.top).map(|(a, b)| (a.1, b.1));
        assert!(pairs.chain([(got.logprob, expected.logprob)]).all(|(a, b)| agrees(a, b)), "{}", about());
    }
}

#[test]
fn the_device_chooses_what_the_host_chooses() {
    if !gpu() {
        return;
    }
    let gpu = Gpu::open(0, Half::Bf16).unwrap();
    let mut random = Random(11);
    for (vocab_size, count) in [(1, 8), (2, 16), (31, 40), (513, 160), (700, 160), (5003, 16)] {
        let cases: Vec<Case> = (0..count).map(|_| Case::random(&mut random, vocab_size)).collect();
        check(&gpu, &cases);
    }
}

#[test]
fn rows_without_a_distribution_give_what_the_host_gives() {
    if !gpu() {
        return;
    }
    const LOW: f32 = f32::NEG_INFINITY;
    let hot = SamplingParams { logprobs: Some(5), ..SamplingParams::default() };
    let all = [
        hot.clone(),
        SamplingParams { top_k: 2, ..hot.clone() },
        SamplingParams { top_p: 0.5, ..hot.clone() },
        SamplingParams { temperature: 1e-300, ..hot.clone() },
        SamplingParams { temperature: 0.0, ..hot },
    ];
    let rows = [
        [0.0, f32::INFINITY, 1.0],
        [0.0, f32::NAN, 1.0],
        [f32::NAN; 3],
        [LOW; 3],
        [LOW, 0.0, LOW],
        [-0.0, 0.0, -0.0],
        [0.0, 1.0, 0.9],
    ];
    let cases = |mask: Option<Vec<u32>>| {
        let of =
            |row: &[f32; 3]| all.iter().map(|params| Case::plain(row.to_vec(), params.clone())).collect::<Vec<_>>();
        let cases = rows.iter().flat_map(of);
        cases.map(|case| Case { mask: mask.clone(), ..case }).collect::<Vec<_>>()
    };
    let gpu = Gpu::open(0, Half::Bf16).unwrap();
    check(&gpu, &cases(None));
    // A mask that allows an impossible token.
    check(&gpu, &cases(Some(vec![1 << 2])));
}

#[test]
fn choices_without_room_are_left_to_the_host() {
    if !gpu() {
        return;
    }
    let gpu = Gpu::open(0, Half::Bf16).unwrap();
    let mut sampler = Sampler::new(&gpu, 2, 64).unwrap();
    let params = SamplingParams { repetition_penalty: 1.1, ..SamplingParams::default() };
    let long: Vec<u32> = (0..5000).collect();
    let mut add = |prompt: &[u32]| {
        let choice = Choice { params: &params, context: SamplingContext::following(prompt, &[]) };
        sampler.add(0, &choice, &changes(choice.params, &choice.context))
    };
    assert_eq!([add(&long), add(&[1]), add(&[2]), add(&[3])], [false, true, true, false]);
}

/// The device and the host share the rows of a batch.
#[test]
fn an_engine_chooses_what_the_host_chooses() {
    if !gpu() {
        return;
    }
    let mut engine = on_gpu("llama-tied", &options(WeightFormat::F16, KvDtype::F16));
    let tokens: Vec<u32> = (1..20).collect();
    let tables: Vec<Vec<BlockId>> = (0..4).map(|i| vec![BlockId(2 * i), BlockId(2 * i + 1)]).collect();
    let mut run = |tokens: &[u32], start, wants: [Want<'_>; 4]| {
        let slice = |(blocks, want): (&Vec<BlockId>, _)| (blocks.clone(), want);
        let slices: Vec<_> = tables.iter().zip(wants).map(slice).collect();
        let batch: Vec<_> =
            slices.iter().map(|(blocks, want)| SequenceSlice { tokens, start, blocks, want: *want }).collect();
        let mut out = Outputs::default();
        engine.run(&batch, &no_layers(), &mut out).unwrap();
        out
    };
    let params = SamplingParams { seed: 5, top_p: 0.9, logprobs: Some(3), ..SamplingParams::default() };
    // More biases than there is room for.
    let logit_bias = (0..14_000).map(|i| (i, 0.25)).collect();
    let large = SamplingParams { logit_bias, ..params.clone() };
    // A prompt, then a decode step over the same keys.
    for (tokens, start) in [(&tokens[..], 0), (&tokens[18..], 18)] {
        let context = SamplingContext { position: 19, ..SamplingContext::following(&[], &[]) };
        let [next, large] = [&params, &large].map(|params| Choice { params, context });
        let logits = run(tokens, start, [Want::LastLogits; 4]);
        let wants = [Want::Next(next), Want::Next(large), Want::LastLogits, Want::Next(next)];
        let mut out = run(tokens, start, wants);
        assert_eq!(out.logits().row(0), logits.logits().row(2));
        for (slice, choice) in [(0, next), (1, large), (3, next)] {
            let expected = sample(logits.logits().row(slice), choice.params, &context);
            let got = out.take_next(slice).unwrap();
            assert_eq!(got.token, expected.token, "slice {slice} from {start}");
            assert!(agrees(got.logprob, expected.logprob) && got.top.len() == 3, "{got:?} instead of {expected:?}");
        }
    }
}
