//! The prefill kernel: a tile's queries over all keys that they attend to.

use bytemuck::Pod;
use overfill_kv::{BLOCK_TOKENS, BlockId};

use super::{
    Heads, PADDING, Scoring,
    operand::Operand,
    product::{Kept, Product},
};
use crate::cpu::kernels::{
    element::Element,
    rows::soft_cap,
    simd::{Kernel, Simd},
};

/// Keys per update of the softmax.
const CHUNK_TOKENS: usize = 64;
/// Size of a cache line.
const LINE_BYTES: usize = 64;
/// With at most this many queries, lanes hold keys or elements of values in place of queries. Each sum is the same, bit for bit.
const FEW_QUERIES: usize = PADDING / 2;

/// Memory of a tile. `rows` is the number of queries, padded to whole vectors; `dim` is the head width, and `width` the same, padded.
/// Padding holds anything: each lane is computed by itself, so padding reaches no result.
pub(super) struct Memory<'a, O> {
    /// `[dim / PER_LANE][rows][PER_LANE]`, already scaled.
    queries: &'a mut [O],
    /// Keys of a chunk, `[64][dim]`.
    keys: &'a mut [O],
    /// The same with keys in lanes if there are few queries, `[dim / PER_LANE][64][PER_LANE]`.
    turned: &'a mut [O],
    /// Values of a chunk, `[64 / PER_LANE][width][PER_LANE]`.
    values: &'a mut [O],
    /// Numerators of the softmax, `[64 / PER_LANE][rows][PER_LANE]`.
    weights: &'a mut [O],
    /// `[64][rows]`.
    scores: &'a mut [f32],
    /// The same with keys in lanes, if there are few queries: `[queries][64]`.
    turned_scores: &'a mut [f32],
    /// `[rows]`: greatest score so far.
    greatest: &'a mut [f32],
    /// `[rows]`: sum of the weights, relative to the greatest score.
    total: &'a mut [f32],
    /// `[rows]`: factor for the weights of earlier chunks.
    shrink: &'a mut [f32],
    /// Weighted sum of the values: `[queries][width]` if there are few queries, `[dim][rows]` otherwise.
    attended: &'a mut [f32],
    count: usize,
    rows: usize,
    dim: usize,
    width: usize,
}

impl<'a, O> Memory<'a, O> {
    /// Splits `memory` into the buffers for `count` queries, and resets the softmax.
    pub(super) fn prepare<T>(memory: &'a mut Vec<f32>, count: usize, dim: usize) -> Self
    where
        O: Operand<T>,
    {
        let [rows, width] = [count, dim].map(|size| size.next_multiple_of(PADDING));
        let (sums, turned_rows) = if count <= FEW_QUERIES { (count * width, count) } else { (dim * rows, 0) };
        let turned = if turned_rows > 0 { dim } else { 0 };
        let most = dim * rows + CHUNK_TOKENS * (dim + turned + width + 2 * rows + turned_rows) + 3 * rows + sums;
        memory.resize(memory.len().max(most), 0.0);
        if cfg!(test) {
            // What earlier tiles have left must not matter.
            memory.fill(f32::NAN);
        }
        let rest = &mut memory[..];
        let (queries, rest) = cut(rest, dim * rows);
        let (keys, rest) = cut(rest, CHUNK_TOKENS * dim);
        let (turned, rest) = cut(rest, CHUNK_TOKENS * turned);
        let (values, rest) = cut(rest, CHUNK_TOKENS * width);
        let (weights, rest) = cut(rest, CHUNK_TOKENS * rows);
        let (scores, rest) = rest.split_at_mut(CHUNK_TOKENS * rows);
        let (turned_scores, rest) = rest.split_at_mut(CHUNK_TOKENS * turned_rows);
        let (greatest, rest) = rest.split_at_mut(rows);
        let (total, rest) = rest.split_at_mut(rows);
        let (shrink, rest) = rest.split_at_mut(rows);
        let attended = &mut rest[..sums];
        // Not -inf: a query may attend to none of the first keys, and its score less this one must be a number.
        greatest.fill(f32::MIN);
        total.fill(0.0);
        attended.fill(0.0);
        Self {
            queries,
            keys,
            turned,
            values,
            weights,
            scores,
            turned_scores,
            greatest,
            total,
            shrink,
            attended,
            count,
            rows,
            dim,
            width,
        }
    }

    /// Whether lanes hold keys or elements of values.
    fn has_few_queries(&self) -> bool {
        self.count <= FEW_QUERIES
    }

    /// Arranges queries in lanes, multiplied by the scale of the scores.
    pub(super) fn take_queries<'q, T>(&mut self, queries: impl Iterator<Item = &'q [f32]>)
    where
        O: Operand<T>,
    {
        self.queries.fill(O::zeroed());
        for (row, query) in queries.enumerate() {
            let scale = 1.0 / (query.len() as f32).sqrt();
            for (d, q) in query.iter().enumerate() {
                self.queries[(d / O::PER_LANE * self.rows + row) * O::PER_LANE + d % O::PER_LANE] = O::round(q * scale);
            }
        }
    }

    /// The result of attention for one query.
    pub(super) fn result(&self, row: usize) -> impl Iterator<Item = f32> {
        let total = self.total[row];
        let (first, step) = if self.has_few_queries() { (row * self.width, 1) } else { (row, self.rows) };
        self.attended[first..].iter().step_by(step).take(self.dim).map(move |value| value / total)
    }
}

/// Prefetches what will be needed soon.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn prefetch<S: Simd, T>(values: &[T]) {
    for line in (0..size_of_val(values)).step_by(LINE_BYTES) {
        // SAFETY: prefetching is allowed for any address.
        unsafe { S::prefetch_far(values.as_ptr().cast::<u8>().wrapping_add(line)) }
    }
}

/// Splits off the first `count` elements of type `O`.
fn cut<O: Pod>(memory: &mut [f32], count: usize) -> (&mut [O], &mut [f32]) {
    let (part, rest) = memory.split_at_mut((count * size_of::<O>()).div_ceil(size_of::<f32>()));
    (&mut bytemuck::cast_slice_mut(part)[..count], rest)
}

/// The kernel: a tile's queries for one KV head, over all keys that its last token attends to.
pub(super) struct Tile<'a, 'm, T, O> {
    pub(super) cache: &'a [T],
    pub(super) sizes: Heads,
    pub(super) kv_head: usize,
    pub(super) blocks: &'a [BlockId],
    /// Position of the tile's first token in the sequence; the others follow.
    pub(super) position: usize,
    /// Position past the last token.
    pub(super) end: usize,
    pub(super) scoring: Scoring,
    pub(super) memory: &'a mut Memory<'m, O>,
}

impl<T: Element, O: Operand<T>> Kernel for Tile<'_, '_, T, O> {
    type Output = ();

    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(mut self) {
        // SAFETY: the caller guarantees the instruction set.
        unsafe {
            // Chunks begin at the same positions whatever the tile: a token's result must not depend on it.
            let start = self.scoring.first_visible(self.position) / CHUNK_TOKENS * CHUNK_TOKENS;
            for first in (start..self.end).step_by(CHUNK_TOKENS) {
                let count = CHUNK_TOKENS.min(self.end - first);
                self.take_keys::<S>(first, count);
                // Skips whole vectors of queries that attend to none of these keys.
                let first_row = self.unseeing(first) / PADDING * PADDING;
                self.score::<S>(count, first_row);
                self.weigh::<S>(first, count, first_row);
                self.take_values::<S>(first, count);
                self.gather::<S>(count, first_row);
            }
        }
    }
}

impl<'a, T: Element, O: Operand<T>> Tile<'a, '_, T, O> {
    /// Number of leading queries that do not attend to `key`. Queries are in token order.
    fn unseeing(&self, key: usize) -> usize {
        key.saturating_sub(self.position) * self.sizes.group()
    }

    /// Number of leading queries whose windows have not left `key` behind. Queries are in token order.
    fn remembering(&self, key: usize) -> usize {
        let tokens = key.saturating_add(self.scoring.window).saturating_sub(self.position);
        tokens.saturating_mul(self.sizes.group()).min(self.memory.rows)
    }

    /// Keys or values of a block of the sequence, `[16][dim]`. There are none past the last block.
    fn block(&self, index: usize, part: usize) -> &'a [T] {
        let Some(block) = self.blocks.get(index) else { return &[] };
        let each = BLOCK_TOKENS * self.sizes.head_dim;
        let at = ((block.0 as usize * 2 + part) * self.sizes.kv_heads + self.kv_head) * each;
        &self.cache[at..at + each]
    }

    /// Number of tokens from position `first` on that no query attends to.
    fn hidden(&self, first: usize) -> usize {
        self.scoring.first_visible(self.position).saturating_sub(first)
    }

    /// Loads the keys of `count` tokens, and zeros past the last token and before the first token that any query attends to, where
    /// the cache may hold data of another sequence. Prefetches their values.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn take_keys<S: Simd>(&mut self, first: usize, count: usize) {
        let (dim, hidden) = (self.memory.dim, self.hidden(first));
        if count < CHUNK_TOKENS || hidden > 0 {
            self.memory.keys.fill(O::zeroed());
        }
        for at in (0..count).step_by(BLOCK_TOKENS) {
            let index = (first + at) / BLOCK_TOKENS;
            let (from, next) = (self.block(index, 0), self.block(index, 1));
            let to = self.memory.keys[at * dim..].chunks_exact_mut(dim);
            let rows = from.chunks_exact(dim).zip(next.chunks_exact(dim)).zip(to).take(count - at);
            for ((from, next), to) in rows.skip(hidden.saturating_sub(at)) {
                // SAFETY: guaranteed by the caller.
                unsafe {
                    prefetch::<S, T>(next);
                    O::convert::<S>(from, to, 1);
                }
            }
        }
    }

    /// As [`Self::take_keys`], for values. Prefetches the keys of the next chunk.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn take_values<S: Simd>(&mut self, first: usize, count: usize) {
        let (dim, width, hidden) = (self.memory.dim, self.memory.width, self.hidden(first));
        if count < CHUNK_TOKENS || hidden > 0 {
            self.memory.values.fill(O::zeroed());
        }
        for at in (0..count).step_by(BLOCK_TOKENS) {
            let index = (first + at) / BLOCK_TOKENS;
            let from = &self.block(index, 1)[..BLOCK_TOKENS.min(count - at) * dim];
            let mut next = self.block(index + CHUNK_TOKENS / BLOCK_TOKENS, 0).chunks(O::PER_LANE * dim);
            let to = self.memory.values[at * width..].chunks_exact_mut(O::PER_LANE * width);
            for (i, (from, to)) in from.chunks(O::PER_LANE * dim).zip(to).enumerate() {
                let skipped = hidden.saturating_sub(at + i * O::PER_LANE);
                // SAFETY: guaranteed by the caller.
                unsafe {
                    prefetch::<S, T>(next.next().unwrap_or_default());
                    if skipped == 0 && from.len() == O::PER_LANE * dim {
                        O::convert_rows::<S>(from, to, dim);
                        continue;
                    }
                    for (row, from) in from.chunks_exact(dim).enumerate().skip(skipped) {
                        O::convert::<S>(from, &mut to[row..], O::PER_LANE);
                    }
                }
            }
        }
    }

    /// `scores[key][row] = keys[key] . queries[row]` for `count` keys and for rows starting at `first_row`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn score<S: Simd>(&mut self, count: usize, first_row: usize) {
        if self.memory.has_few_queries() {
            // SAFETY: guaranteed by the caller.
            return unsafe { self.score_few_queries::<S>(count) };
        }
        let Memory { queries, keys, scores, rows, dim, .. } = &mut *self.memory;
        let product = Product {
            lanes: queries,
            steps: *dim / O::PER_LANE,
            others: keys,
            next_other: *dim,
            next_step: O::PER_LANE,
            outputs: count,
            kept: Kept::None,
            rows: *rows,
        };
        // SAFETY: guaranteed by the caller.
        unsafe { product.run::<S, T>(first_row, scores) }
    }

    /// [`Self::score`] with keys in lanes, for all queries.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn score_few_queries<S: Simd>(&mut self, count: usize) {
        let Memory { queries, keys, turned, scores, turned_scores, count: query_count, rows, dim, .. } =
            &mut *self.memory;
        let steps = *dim / O::PER_LANE;
        let [keys, words]: [&mut [u32]; 2] = [keys, turned].map(|part| bytemuck::cast_slice_mut(part));
        assert!(
            keys.len() == CHUNK_TOKENS * steps && words.len() == keys.len() && CHUNK_TOKENS.is_multiple_of(S::LANES)
        );
        let whole = steps / S::LANES * S::LANES;
        for key in (0..CHUNK_TOKENS).step_by(S::LANES) {
            for step in (0..whole).step_by(S::LANES) {
                let (from, to) = (&keys[key * steps + step..], &mut words[step * CHUNK_TOKENS + key..]);
                // SAFETY: `from` and `to` have LANES rows of LANES words, as keys and steps are multiples of LANES.
                unsafe { S::transpose(from.as_ptr(), steps, to.as_mut_ptr(), CHUNK_TOKENS) }
            }
        }
        for step in whole..steps {
            let to = &mut words[step * CHUNK_TOKENS..][..CHUNK_TOKENS];
            to.iter_mut().zip(keys[step..].iter().step_by(steps)).for_each(|(to, from)| *to = *from);
        }
        let product = Product {
            lanes: turned,
            steps,
            others: queries,
            next_other: O::PER_LANE,
            next_step: *rows * O::PER_LANE,
            outputs: *query_count,
            kept: Kept::None,
            rows: CHUNK_TOKENS,
        };
        // SAFETY: guaranteed by the caller.
        unsafe { product.run::<S, T>(0, turned_scores) }
        for (row, from) in turned_scores.chunks_exact(CHUNK_TOKENS).enumerate() {
            scores[row..].iter_mut().step_by(*rows).zip(&from[..count]).for_each(|(to, from)| *to = *from);
        }
    }

    /// Turns the scores of `count` keys, starting at `first`, into weights: zero for keys that a query does not attend
    /// to.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn weigh<S: Simd>(&mut self, first: usize, count: usize, first_row: usize) {
        let seeing = |key: usize| (self.unseeing(first + key), self.remembering(first + key));
        let seeing: [(usize, usize); CHUNK_TOKENS] = std::array::from_fn(seeing);
        let cap = self.scoring.cap;
        let Memory { scores, weights, greatest, total, shrink, count: queries, rows, .. } = &mut *self.memory;
        let (queries, rows) = (*queries, *rows);
        // Replaces the scores of queries that do not attend to a key.
        let hide = |scores: &mut [f32], value: f32| {
            for ((unseeing, remembering), scores) in seeing[..count].iter().zip(scores.chunks_exact_mut(rows)) {
                let scores = &mut scores[first_row..];
                scores[..unseeing.saturating_sub(first_row)].fill(value);
                scores[remembering.saturating_sub(first_row)..].fill(value);
            }
        };
        if let Some(cap) = cap {
            for scores in scores.chunks_exact_mut(rows).take(count) {
                for chunk in scores[first_row..].chunks_exact_mut(S::LANES) {
                    // SAFETY: a chunk holds LANES values.
                    unsafe { soft_cap::<S>(chunk.as_mut_ptr(), cap) }
                }
            }
        }
        hide(scores, f32::NEG_INFINITY);
        assert!(scores.len() == CHUNK_TOKENS * rows && weights.len() == scores.len() && rows.is_multiple_of(PADDING));
        assert!(greatest.len() == rows && total.len() == rows && shrink.len() == rows && count <= CHUNK_TOKENS);
        // SAFETY: the asserts check the sizes, and LANES divides PADDING.
        unsafe {
            for at in (first_row..rows).step_by(S::LANES) {
                let column = scores.as_mut_ptr().add(at);
                let before = S::load(greatest.as_ptr().add(at));
                let mut best = before;
                for key in 0..count {
                    best = S::max(best, S::load(column.add(key * rows)));
                }
                let factor = S::exp(S::sub(before, best));
                let mut sum = S::splat(0.0);
                for key in 0..count {
                    let weight = S::exp(S::sub(S::load(column.add(key * rows)), best));
                    sum = S::add(sum, weight);
                    S::store(column.add(key * rows), weight);
                }
                S::store(greatest.as_mut_ptr().add(at), best);
                S::store(shrink.as_mut_ptr().add(at), factor);
                let all = total.as_mut_ptr().add(at);
                S::store(all, S::mul_add(S::load(all), factor, sum));
            }
        }
        hide(scores, 0.0);
        if !count.is_multiple_of(O::PER_LANE) {
            scores[count * rows..][..rows].fill(0.0);
        }
        let count = count.next_multiple_of(O::PER_LANE);
        let lines =
            scores[..count * rows].chunks_exact(O::PER_LANE * rows).zip(weights.chunks_exact_mut(O::PER_LANE * rows));
        for (from, to) in lines {
            for (i, from) in from.chunks_exact(rows).enumerate() {
                let to = to[i..].iter_mut().step_by(O::PER_LANE);
                to.zip(from).take(queries).for_each(|(to, from)| *to = O::round(*from));
            }
        }
    }

    /// `attended[d][row] = attended[d][row] * shrink[row] + weights[row] . values[d]` for rows starting at `first_row`; for all
    /// queries, as `attended[row][d]`, if there are few.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn gather<S: Simd>(&mut self, count: usize, first_row: usize) {
        let has_few = self.memory.has_few_queries();
        let Memory { weights, values, shrink, attended, count: queries, rows, dim, width, .. } = &mut *self.memory;
        let steps = count.div_ceil(O::PER_LANE);
        // SAFETY: guaranteed by the caller.
        unsafe {
            if has_few {
                let product = Product {
                    lanes: values,
                    steps,
                    others: weights,
                    next_other: O::PER_LANE,
                    next_step: *rows * O::PER_LANE,
                    outputs: *queries,
                    kept: Kept::OfOutput(shrink),
                    rows: *width,
                };
                product.run::<S, T>(0, attended);
            } else {
                let product = Product {
                    lanes: weights,
                    steps,
                    others: values,
                    next_other: O::PER_LANE,
                    next_step: *width * O::PER_LANE,
                    outputs: *dim,
                    kept: Kept::OfRow(shrink),
                    rows: *rows,
                };
                product.run::<S, T>(first_row, attended);
            }
        }
    }
}
