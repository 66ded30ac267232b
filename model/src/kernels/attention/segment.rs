//! The kernel: some queries under one KV head, over a run of blocks.

use overfill_kv::{BLOCK_TOKENS, BlockId};

use super::{Heads, Partial};
use crate::kernels::{
    element::Element,
    simd::{Kernel, Simd},
};

/// A tile's queries over a run of blocks.
pub(super) struct Segment<'a, 'p, T> {
    pub(super) cache: &'a [T],
    pub(super) sizes: Heads,
    pub(super) kv_head: usize,
    pub(super) blocks: &'a [BlockId],
    /// Keys, of the whole sequence, that the first query token sees; each later one sees one more.
    pub(super) first_visible: usize,
    /// Keys of the sequence before this segment.
    pub(super) before: usize,
    /// `[rows][padded]`.
    pub(super) queries: &'a [f32],
    /// `[rows][16]`.
    pub(super) scores: &'a mut [f32],
    /// `[rows]`: what a block makes of the weights before it.
    pub(super) shrink: &'a mut [f32],
    /// Keys and values of a block, `[2][16][padded]`; the padding is zero.
    pub(super) block: &'a mut [f32],
    pub(super) partial: &'a mut Partial<'p>,
}

impl<T: Element> Kernel for Segment<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) {
        let (group, dim, padded) = (self.sizes.group(), self.sizes.head_dim, self.sizes.padded_dim());
        let rows = self.scores.len() / BLOCK_TOKENS;
        let half = BLOCK_TOKENS * padded;
        assert!(self.queries.len() == rows * padded && self.block.len() == 2 * half);
        assert!(self.partial.values.len() == rows * padded && self.partial.total.len() == rows);
        for (i, block) in self.blocks.iter().enumerate() {
            let seen = |row: usize| {
                (self.first_visible + row / group).saturating_sub(self.before + i * BLOCK_TOKENS).min(BLOCK_TOKENS)
            };
            // What lies past the last token may be left over from another sequence: it is not even read.
            let filled = seen(rows - 1);
            if filled == 0 {
                break;
            }
            for part in 0..2 {
                let at = ((block.0 as usize * 2 + part) * self.sizes.kv_heads + self.kv_head) * BLOCK_TOKENS * dim;
                let from = &self.cache[at..at + filled * dim];
                let to = &mut self.block[part * half..][..filled * padded];
                for (from, to) in from.chunks_exact(dim).zip(to.chunks_exact_mut(padded)) {
                    let whole = dim - dim % S::LANES;
                    for d in (0..whole).step_by(S::LANES) {
                        // SAFETY: `d + LANES` is at most `dim`, and `padded` no less.
                        unsafe { S::store(to.as_mut_ptr().add(d), T::load::<S>(from.as_ptr().add(d))) }
                    }
                    for d in whole..dim {
                        to[d] = from[d].to_f32();
                    }
                }
            }
            // SAFETY: the asserts above: `rows` rows of queries, scores and values, 16 of keys and values, each `padded` long,
            // which is a multiple of LANES.
            unsafe {
                let (keys, values) = (self.block.as_ptr(), self.block.as_ptr().add(half));
                let mut row = 0;
                while row < rows {
                    let (q, scores) = (self.queries.as_ptr().add(row * padded), self.scores.as_mut_ptr());
                    let scores = scores.add(row * BLOCK_TOKENS);
                    if row + 1 < rows {
                        score::<S, 2>(q, keys, padded, scores);
                    } else {
                        score::<S, 1>(q, keys, padded, scores);
                    }
                    row += 2;
                }
                for row in 0..rows {
                    let scores = &mut self.scores[row * BLOCK_TOKENS..][..BLOCK_TOKENS];
                    let (greatest, total) = (&mut self.partial.greatest[row], &mut self.partial.total[row]);
                    self.shrink[row] = weigh::<S>(scores, seen(row), greatest, total);
                }
                let mut row = 0;
                while row < rows {
                    let weights = self.scores.as_ptr().add(row * BLOCK_TOKENS);
                    let shrink = self.shrink.as_ptr().add(row);
                    let out = self.partial.values.as_mut_ptr().add(row * padded);
                    if row + 1 < rows {
                        gather::<S, 2>(weights, shrink, values, filled, padded, out);
                    } else {
                        gather::<S, 1>(weights, shrink, values, filled, padded, out);
                    }
                    row += 2;
                }
            }
        }
    }
}

/// Scores of ROWS queries under the 16 keys of a block. Those past the last token are of zeros or old keys: no matter.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn score<S: Simd, const ROWS: usize>(q: *const f32, keys: *const f32, padded: usize, scores: *mut f32) {
    const KEYS: usize = 4;
    // SAFETY: see `Segment::run`.
    unsafe {
        for first in (0..BLOCK_TOKENS).step_by(KEYS) {
            let mut sums = [[S::splat(0.0); KEYS]; ROWS];
            for d in (0..padded).step_by(S::LANES) {
                let mut k = [S::splat(0.0); KEYS];
                for (i, k) in k.iter_mut().enumerate() {
                    *k = S::load(keys.add((first + i) * padded + d));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let q = S::load(q.add(r * padded + d));
                    for (sum, k) in sums.iter_mut().zip(k) {
                        *sum = S::mul_add(q, k, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (i, sum) in sums.iter().enumerate() {
                    *scores.add(r * BLOCK_TOKENS + first + i) = S::sum(*sum);
                }
            }
        }
    }
}

/// Turns the first `seen` of 16 scores into weights, the others into 0; the result is what earlier weights shrink by.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn weigh<S: Simd>(scores: &mut [f32], seen: usize, greatest: &mut f32, total: &mut f32) -> f32 {
    let best = scores[..seen].iter().fold(*greatest, |a, b| a.max(*b));
    if best == f32::NEG_INFINITY {
        // No key of this block is for this query, nor was one before.
        scores.fill(0.0);
        return 1.0;
    }
    for i in (0..BLOCK_TOKENS).step_by(S::LANES) {
        // SAFETY: there are 16 scores.
        unsafe {
            let at = scores.as_mut_ptr().add(i);
            S::store(at, S::exp(S::sub(S::load(at), S::splat(best))));
        }
    }
    scores[seen..].fill(0.0);
    let shrink = (*greatest - best).exp();
    *greatest = best;
    *total = *total * shrink + scores.iter().sum::<f32>();
    shrink
}

/// `out = out * shrink + weights . values` for ROWS queries and the first `filled` values.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn gather<S: Simd, const ROWS: usize>(
    weights: *const f32,
    shrink: *const f32,
    values: *const f32,
    filled: usize,
    padded: usize,
    out: *mut f32,
) {
    // SAFETY: see `Segment::run`.
    unsafe {
        let mut d = 0;
        while d < padded {
            if d + 4 * S::LANES <= padded {
                gather_lanes::<S, ROWS, 4>(weights, shrink, values.add(d), filled, padded, out.add(d));
                d += 4 * S::LANES;
            } else {
                gather_lanes::<S, ROWS, 1>(weights, shrink, values.add(d), filled, padded, out.add(d));
                d += S::LANES;
            }
        }
    }
}

#[inline(always)]
#[allow(unsafe_code)]
unsafe fn gather_lanes<S: Simd, const ROWS: usize, const VECS: usize>(
    weights: *const f32,
    shrink: *const f32,
    values: *const f32,
    filled: usize,
    padded: usize,
    out: *mut f32,
) {
    // SAFETY: see `Segment::run`.
    unsafe {
        let mut sums = [[S::splat(0.0); VECS]; ROWS];
        for (r, sums) in sums.iter_mut().enumerate() {
            let shrink = S::splat(*shrink.add(r));
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::mul(S::load(out.add(r * padded + v * S::LANES)), shrink);
            }
        }
        for key in 0..filled {
            let mut values_of_key = [S::splat(0.0); VECS];
            for (v, value) in values_of_key.iter_mut().enumerate() {
                *value = S::load(values.add(key * padded + v * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(r * BLOCK_TOKENS + key));
                for (sum, value) in sums.iter_mut().zip(values_of_key) {
                    *sum = S::mul_add(weight, value, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                S::store(out.add(r * padded + v * S::LANES), *sum);
            }
        }
    }
}
