//! Compares the kernels with the formula in f64, on every available instruction set.

use half::{bf16, f16};
use overfill_kv::BlockId;
use proptest::prelude::*;

use super::*;
use crate::Want;

fn random(count: usize, mut state: u64) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

/// The formula in f64; blocks are used only to look up keys and values.
fn reference(q: &[f32], cache: &[f32], batch: &[SequenceSlice<'_>], sizes: Heads, scoring: Scoring) -> Vec<f64> {
    let Heads { heads, kv_heads, head_dim } = sizes;
    let element = |block: BlockId, part: usize, head: usize, token: usize, d: usize| {
        let row = ((block.0 as usize * 2 + part) * kv_heads + head) * BLOCK_TOKENS + token;
        f64::from(cache[row * head_dim + d])
    };
    let mut out = Vec::new();
    let mut row = 0;
    for slice in batch {
        for token in 0..slice.tokens.len() {
            for head in 0..heads {
                let q = &q[(row * heads + head) * head_dim..][..head_dim];
                let kv_head = head / sizes.group();
                let place = |p: usize| (slice.blocks[p / BLOCK_TOKENS], p % BLOCK_TOKENS);
                let position = slice.start + token;
                let first = scoring.first_visible(position);
                let scores: Vec<f64> = (first..=position)
                    .map(|p| {
                        let (block, t) = place(p);
                        let dot: f64 = (0..head_dim).map(|d| f64::from(q[d]) * element(block, 0, kv_head, t, d)).sum();
                        let score = dot / (head_dim as f64).sqrt();
                        scoring.cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh()).exp()
                    })
                    .collect();
                let total: f64 = scores.iter().sum();
                for d in 0..head_dim {
                    let sum: f64 = scores
                        .iter()
                        .enumerate()
                        .map(|(p, score)| {
                            let (block, t) = place(first + p);
                            score * element(block, 1, kv_head, t, d)
                        })
                        .sum();
                    out.push(sum / total);
                }
            }
            row += 1;
        }
    }
    out
}

const MOST_TOKENS: usize = 160;

/// Number of tokens of a slice: mostly few, sometimes more than a tile of prefill.
fn tokens() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 1_usize..32, 1 => 32..=MOST_TOKENS]
}

/// Start position of a slice: arbitrary, or near the ends of chunks and segments.
fn starts() -> impl Strategy<Value = usize> {
    prop_oneof![6 => 0_usize..300, 1 => 300_usize..1200, 2 => prop::sample::select(vec![0, 15, 16, 62, 63, 64, 127, 128, 191])]
}

/// Input of a test: queries, slices and sizes.
struct Case<'a> {
    q: &'a [f32],
    batch: &'a [SequenceSlice<'a>],
    sizes: Heads,
    scoring: Scoring,
}

impl Case<'_> {
    fn run<T: Element, O: Operand<T>>(&self, isa: Isa, rows: Rows, cache: &[T]) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.q.len()];
        let how = Arithmetic { isa, rows };
        let mut scratch = AttentionScratch::default();
        attend::<T, O>(how, self.q, cache, self.batch, self.sizes, self.scoring, &mut out, &mut scratch);
        out
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn it_is_attention(
        // Includes group sizes of real models. A tile of decode has at most four heads.
        group in 1_usize..9, kv_heads in 1_usize..3,
        // If head_dim consists of whole vectors, decode reads the cache without copying.
        head_dim in prop_oneof![(1_usize..36).prop_map(|half| 2 * half), prop::sample::select(vec![32, 64, 128])],
        lengths in prop::collection::vec((tokens(), starts()), 1..3), seed: u64,
        window in prop_oneof![2 => Just(usize::MAX), 2 => 1_usize..200, 1 => prop::sample::select(vec![1, 16, 64, 128])],
        cap in prop_oneof![2 => Just(None), 1 => (0.5_f32..5.0).prop_map(Some)],
    ) {
        let scoring = Scoring { window, cap };
        let sizes = Heads { heads: group * kv_heads, kv_heads, head_dim };
        let mut tables = Vec::new();
        let mut count = 0;
        for (tokens, start) in &lengths {
            let blocks = (tokens + start).div_ceil(BLOCK_TOKENS);
            // Descending block ids: any order is valid.
            tables.push((count..count + blocks).rev().map(|b| BlockId(b as u32)).collect::<Vec<_>>());
            count += blocks;
        }
        let tokens = [0; MOST_TOKENS];
        let batch: Vec<SequenceSlice<'_>> = lengths.iter().zip(&tables).map(|((count, start), blocks)| {
            SequenceSlice { tokens: &tokens[..*count], start: *start, blocks, want: Want::Nothing }
        }).collect();
        let rows: usize = lengths.iter().map(|l| l.0).sum();
        let q = random(rows * sizes.heads * sizes.head_dim, seed);
        let mut cache = random(count * 2 * kv_heads * BLOCK_TOKENS * sizes.head_dim, !seed);
        // Rounded to bf16 beforehand, so that all types hold the same values.
        cache.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        let expected = reference(&q, &cache, &batch, sizes, scoring);
        // Data past a sequence's end, and before the first window, must not affect the result.
        for slice in &batch {
            let end = slice.start + slice.tokens.len();
            let unseen = (0..scoring.first_visible(slice.start)).chain(end..end.next_multiple_of(BLOCK_TOKENS));
            for position in unseen {
                let (block, token) = (slice.blocks[position / BLOCK_TOKENS].0 as usize, position % BLOCK_TOKENS);
                for part in 0..2 * kv_heads {
                    let at = ((block * 2 * kv_heads + part) * BLOCK_TOKENS + token) * sizes.head_dim;
                    cache[at..at + sizes.head_dim].fill(f32::NAN);
                }
            }
        }
        let narrow: Vec<bf16> = cache.iter().map(|x| bf16::from_f32(*x)).collect();
        let half: Vec<f16> = cache.iter().map(|x| f16::from_f32(*x)).collect();
        let case = Case { q: &q, batch: &batch, sizes, scoring };
        // A single token, with everything before it already in the cache.
        let first = batch[0];
        let before = first.tokens.len() - 1;
        let last = SequenceSlice { tokens: &tokens[..1], start: first.start + before, ..first };
        let width = sizes.heads * sizes.head_dim;
        let at = before * width..(before + 1) * width;
        let alone = Case { q: &q[at.clone()], batch: &[last], sizes, scoring };
        for (isa, rows) in Isa::available().iter().flat_map(|isa| [(*isa, Rows::Few), (*isa, Rows::Many)]) {
            let got = case.run::<f32, f32>(isa, rows, &cache);
            prop_assert_eq!(&got, &case.run::<bf16, f32>(isa, rows, &narrow));
            prop_assert_eq!(&got, &case.run::<f16, f32>(isa, rows, &half));
            for (i, (got, exact)) in got.iter().zip(&expected).enumerate() {
                prop_assert!((f64::from(*got) - exact).abs() < 2e-5, "{isa:?} {rows:?} {i}: {got}, not {exact}");
            }
            prop_assert_eq!(&alone.run::<f32, f32>(isa, rows, &cache)[..], &got[at.clone()]);
            // Queries and softmax rounded to bf16, which has 8 significant bits.
            let rounded = case.run::<bf16, bf16>(isa, rows, &narrow);
            let mut squares = 0.0;
            for (i, (got, exact)) in rounded.iter().zip(&expected).enumerate() {
                let distance = (f64::from(*got) - exact).abs();
                prop_assert!(distance < 0.1, "{isa:?} {rows:?} {i}: {got}, not {exact}");
                squares += distance * distance;
            }
            // Rounding errors average out. A missing chunk of keys would shift all values of a head by more than this.
            let distance = (squares / expected.len() as f64).sqrt();
            prop_assert!(distance < 0.003, "{isa:?} {rows:?}: {distance} apart");
            prop_assert_eq!(&alone.run::<bf16, bf16>(isa, rows, &narrow)[..], &rounded[at.clone()]);
        }
    }
}
