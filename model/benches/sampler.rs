//! Benchmark of choosing a token from a vocabulary of 128k, with each combination of cuts.

use criterion::{Criterion, criterion_group, criterion_main};
use overfill_kv::SamplingParams;
use overfill_model::{SamplingContext, sample};

/// Vocabulary size of Llama 3.
const VOCABULARY: usize = 128_256;

/// Logits distributed like a model's: normal, with standard deviation `spread`.
fn logits(spread: f32) -> Vec<f32> {
    // The sum of twelve uniform numbers approximates a normal distribution.
    let mut state = 1_u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..VOCABULARY).map(|_| spread * (0..12).map(|_| uniform()).sum::<f32>()).collect()
}

fn sampler(criterion: &mut Criterion) {
    let on = SamplingParams::default;
    let ways = [
        ("greedy", SamplingParams::greedy()),
        ("temperature", on()),
        ("top-k 50", SamplingParams { top_k: 50, ..on() }),
        ("top-p 0.9", SamplingParams { top_p: 0.9, ..on() }),
        ("top-k 50 and top-p 0.9", SamplingParams { top_k: 50, top_p: 0.9, ..on() }),
        ("min-p 0.05", SamplingParams { min_p: 0.05, ..on() }),
    ];
    // "sure" resembles a trained model, which favours a few tokens; "unsure" resembles one with random weights.
    for (name, spread) in [("sure", 3.0), ("unsure", 0.3)] {
        let logits = logits(spread);
        let mut group = criterion.benchmark_group(name);
        for (way, params) in &ways {
            let mut position = 0;
            group.bench_function(*way, |bencher| {
                bencher.iter(|| {
                    position += 1;
                    sample(&logits, params, &SamplingContext { position, ..SamplingContext::following(&[], &[]) })
                });
            });
        }
    }
}

criterion_group!(benches, sampler);
criterion_main!(benches);
