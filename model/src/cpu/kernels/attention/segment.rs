//! The decode kernel: a token's queries over a run of blocks.

use std::ops::Range;

use overfill_kv::{BLOCK_TOKENS, BlockId};

use super::{
    Heads,
    decode::{Partial, padded_dim},
};
use crate::cpu::kernels::{
    element::Element,
    inputs::tile_rows,
    rows::soft_cap,
    simd::{Kernel, Simd, load_tile, store_tile},
};

/// A token's queries over a run of blocks.
pub(super) struct Segment<'a, 'p, T> {
    pub(super) cache: &'a [T],
    pub(super) sizes: Heads,
    pub(super) blocks: &'a [BlockId],
    /// Number of keys that lie before the token's window. All of them are in the first of these blocks.
    pub(super) hidden: usize,
    /// Number of keys up to the last one that the token attends to, counted from the first of these blocks.
    pub(super) visible: usize,
    /// Soft cap of the scores.
    pub(super) cap: Option<f32>,
    /// `[heads][padded]`.
    pub(super) queries: &'a [f32],
    /// `[query heads per KV head][16]`.
    pub(super) scores: &'a mut [f32],
    /// Buffer for a block's keys and values as f32, `[2][16][padded]`.
    pub(super) block: &'a mut [f32],
    pub(super) partial: &'a mut Partial<'p>,
}

impl<T: Element> Kernel for Segment<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(mut self) {
        let Heads { heads, kv_heads, head_dim: dim } = self.sizes;
        let padded = padded_dim(self.sizes);
        assert!(self.scores.len() == self.sizes.group() * BLOCK_TOKENS && self.queries.len() == heads * padded);
        assert!(self.partial.total.len() == heads && self.partial.greatest.len() == heads);
        assert!(self.partial.values.len() == heads * padded && self.block.len() == 2 * BLOCK_TOKENS * padded);
        let widened = !dim.is_multiple_of(S::LANES);
        if widened {
            self.block.fill(0.0);
        }
        let (cache, blocks) = (self.cache, self.blocks);
        // The keys or values of one KV head of one block, numbered in memory order.
        let of = |place: usize, part: usize| {
            let (block, head) = (blocks[place / kv_heads], place % kv_heads);
            let at = ((block.0 as usize * 2 + part) * kv_heads + head) * BLOCK_TOKENS * dim;
            &cache[at..at + BLOCK_TOKENS * dim]
        };
        for place in 0..blocks.len() * kv_heads {
            let (i, head) = (place / kv_heads, place % kv_heads);
            // Data past the last token may be left over from another sequence. It gets no weight.
            let filled = self.visible.saturating_sub(i * BLOCK_TOKENS).min(BLOCK_TOKENS);
            let from = if i == 0 { self.hidden } else { 0 };
            let [keys, values] = [0, 1].map(|part| of(place, part));
            // SAFETY: there are keys and values of 16 tokens, `stride` elements apart, and `stride` is a multiple of
            // LANES.
            unsafe {
                if widened {
                    let (wide_keys, wide_values) = self.block.split_at_mut(BLOCK_TOKENS * padded);
                    widen(&keys[..filled * dim], dim, wide_keys, padded);
                    widen(&values[..filled * dim], dim, wide_values, padded);
                    let at = [wide_keys.as_ptr(), wide_values.as_ptr()];
                    let block = Block { keys: at[0], values: at[1], from, filled, next: at, stride: padded };
                    self.attend::<S, f32>(head, block);
                } else {
                    let next = (place + 1).min(blocks.len() * kv_heads - 1);
                    let next = [0, 1].map(|part| of(next, part).as_ptr());
                    let (keys, values) = (keys.as_ptr(), values.as_ptr());
                    let block = Block { keys, values, from, filled, next, stride: dim };
                    self.attend::<S, T>(head, block);
                }
            }
        }
    }
}

/// Keys and values of 16 tokens, for one KV head.
#[derive(Clone, Copy)]
struct Block<E> {
    keys: *const E,
    values: *const E,
    /// The tokens that are attended to: from this one, up to this one.
    from: usize,
    filled: usize,
    /// Keys and values that will be read next, for prefetching.
    next: [*const E; 2],
    /// Distance between two tokens, in elements.
    stride: usize,
}

impl<T: Element> Segment<'_, '_, T> {
    /// Adds one KV head of a block to the partial result.
    ///
    /// # Safety
    /// `block` points to 16 keys and 16 values, `stride` apart, each as long as `head_dim` rounded up to whole vectors.
    /// The asserts of `run` have passed, and the processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn attend<S: Simd, E: Element>(&mut self, kv_head: usize, block: Block<E>) {
        let (rows, padded) = (self.sizes.group(), padded_dim(self.sizes));
        let width = self.sizes.head_dim.next_multiple_of(S::LANES);
        // As many rows as there are registers for their sums.
        let most = if S::LANES == 16 { 4 } else { 2 };
        // SAFETY: the asserts of `run` guarantee `rows` rows of queries, scores and values. Each is `padded` long, a
        // multiple of LANES that is at least `width`. The caller guarantees the keys and values.
        unsafe {
            let mut row = 0;
            while row < rows {
                let n = tile_rows(rows - row, most);
                let at = kv_head * rows + row;
                let scores = &mut self.scores[row * BLOCK_TOKENS..][..n * BLOCK_TOKENS];
                let queries = self.queries.as_ptr().add(at * padded);
                with_rows!(n, score, S, E, (queries, padded, block, width, scores.as_mut_ptr()), 1 2 3 4);
                let mut shrink = [0.0; 4];
                for (i, scores) in scores.chunks_exact_mut(BLOCK_TOKENS).enumerate() {
                    let (greatest, total) = (&mut self.partial.greatest[at + i], &mut self.partial.total[at + i]);
                    if let Some(cap) = self.cap {
                        for i in (0..BLOCK_TOKENS).step_by(S::LANES) {
                            soft_cap::<S>(scores.as_mut_ptr().add(i), cap);
                        }
                    }
                    shrink[i] = weigh::<S>(scores, block.from..block.filled, greatest, total);
                }
                let out = self.partial.values.as_mut_ptr().add(at * padded);
                with_rows!(n, gather, S, E, (scores.as_ptr(), shrink.as_ptr(), block, width, out, padded), 1 2 3 4);
                row += n;
            }
        }
    }
}

/// Converts rows of `dim` elements to f32 rows, `padded` apart.
fn widen<T: Element>(from: &[T], dim: usize, to: &mut [f32], padded: usize) {
    for (from, to) in from.chunks_exact(dim).zip(to.chunks_exact_mut(padded)) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
    }
}

/// Prefetches COUNT vectors.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn prefetch<S: Simd, E: Element, const COUNT: usize>(from: *const E, at: usize) {
    let bytes = from.wrapping_add(at).cast::<u8>();
    for line in (0..COUNT * S::LANES * size_of::<E>()).step_by(64) {
        // SAFETY: prefetching is allowed for any address.
        unsafe { S::prefetch_far(bytes.wrapping_add(line)) }
    }
}

/// Computes the scores of ROWS queries for the 16 keys of a block. Scores of other tokens are meaningless; `weigh`
/// clears them.
///
/// # Safety
/// `queries` points to ROWS queries, `padded` apart, and `block` to 16 keys, all `width` long, a multiple of LANES.
/// `scores` has room for `[ROWS][16]`. The processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn score<S: Simd, E: Element, const ROWS: usize>(
    queries: *const f32,
    padded: usize,
    block: Block<E>,
    width: usize,
    scores: *mut f32,
) {
    const KEYS: usize = 4;
    // SAFETY: guaranteed by the caller.
    unsafe {
        for first in (0..BLOCK_TOKENS).step_by(KEYS) {
            let mut sums = [[S::splat(0.0); KEYS]; ROWS];
            for d in (0..width).step_by(S::LANES) {
                // Four keys are read at a time, alternating between their rows, but prefetched sequentially row by row:
                // the processor's prefetcher recognises that order.
                prefetch::<S, E, KEYS>(block.next[0], first * block.stride + d * KEYS);
                let mut k = [S::splat(0.0); KEYS];
                for (i, k) in k.iter_mut().enumerate() {
                    *k = E::load::<S>(block.keys.add((first + i) * block.stride + d));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let q = S::load(queries.add(r * padded + d));
                    for (sum, k) in sums.iter_mut().zip(k) {
                        *sum = S::mul_add(q, k, *sum);
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                scores.add(r * BLOCK_TOKENS + first).cast::<[f32; KEYS]>().write(S::sum4(sums));
            }
        }
    }
}

/// Turns those of 16 scores that are `seen` into weights and the others into 0. Returns the factor for earlier weights.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn weigh<S: Simd>(scores: &mut [f32], seen: Range<usize>, greatest: &mut f32, total: &mut f32) -> f32 {
    let scores = &mut scores[..BLOCK_TOKENS];
    let best = scores[seen.clone()].iter().fold(*greatest, |a, b| a.max(*b));
    for i in (0..BLOCK_TOKENS).step_by(S::LANES) {
        // SAFETY: LANES divides 16, and the slice above has 16 scores.
        unsafe {
            let at = scores.as_mut_ptr().add(i);
            S::store(at, S::exp(S::sub(S::load(at), S::splat(best))));
        }
    }
    scores[seen.end..].fill(0.0);
    scores[..seen.start].fill(0.0);
    let shrink = (*greatest - best).exp();
    *greatest = best;
    *total = *total * shrink + scores.iter().sum::<f32>();
    shrink
}

/// `out = out * shrink + weights . values` for ROWS queries and the filled tokens of a block.
///
/// # Safety
/// `weights` points to `[ROWS][16]` values, `shrink` to ROWS, and `out` to ROWS rows, `padded` apart. The rows of `out`
/// and of `block`'s values are `width` long, a multiple of LANES. The processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn gather<S: Simd, E: Element, const ROWS: usize>(
    weights: *const f32,
    shrink: *const f32,
    block: Block<E>,
    width: usize,
    out: *mut f32,
    padded: usize,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let mut d = 0;
        while d < width {
            if d + 4 * S::LANES <= width {
                gather_lanes::<S, E, ROWS, 4>(weights, shrink, block, d, out, padded);
                d += 4 * S::LANES;
            } else {
                gather_lanes::<S, E, ROWS, 1>(weights, shrink, block, d, out, padded);
                d += S::LANES;
            }
        }
    }
}

/// The same for VECS vectors starting at element `first`.
///
/// # Safety
/// As for [`gather`], and the vectors are within `width`.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn gather_lanes<S: Simd, E: Element, const ROWS: usize, const VECS: usize>(
    weights: *const f32,
    shrink: *const f32,
    block: Block<E>,
    first: usize,
    out: *mut f32,
    padded: usize,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let out = out.add(first);
        let mut sums = load_tile::<S, ROWS, VECS>(out, padded);
        for (r, sums) in sums.iter_mut().enumerate() {
            let shrink = S::splat(*shrink.add(r));
            for sum in sums {
                *sum = S::mul(*sum, shrink);
            }
        }
        for key in block.from..block.filled {
            prefetch::<S, E, VECS>(block.next[1], first * BLOCK_TOKENS + key * VECS * S::LANES);
            let mut values = [S::splat(0.0); VECS];
            for (v, value) in values.iter_mut().enumerate() {
                *value = E::load::<S>(block.values.add(key * block.stride + first + v * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(r * BLOCK_TOKENS + key));
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = S::mul_add(weight, value, *sum);
                }
            }
        }
        store_tile::<S, ROWS, VECS>(out, padded, sums);
    }
}

/// Calls `$f::<S, E, ROWS>` with ROWS = `$rows`, which must be one of the literals.
macro_rules! with_rows {
    ($rows:expr, $f:ident, $s:ty, $e:ty, $args:tt, $($n:literal)+) => {
        match $rows { $($n => $f::<$s, $e, $n> $args,)+ _ => unreachable!("a tile of {} rows", $rows) }
    };
}
use with_rows;
