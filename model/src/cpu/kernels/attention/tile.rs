//! The prefill kernel: a tile's queries over all keys that they attend to.

use bytemuck::Pod;
use half::bf16;
use overfill_kv::{BLOCK_TOKENS, BlockId};

use super::{Heads, PADDING, Scoring};
use crate::cpu::kernels::{
    element::Element,
    inputs::{round_bf16, tile_rows},
    rows::soft_cap,
    simd::{Kernel, Simd, load_tile, store_tile},
};

/// Keys per update of the softmax.
const CHUNK_TOKENS: usize = 64;

/// Operand type of the products, for KV of type `T`.
pub(crate) trait Operand<T>: Pod + Send + Sync {
    /// Number of consecutive factors in one lane.
    const PER_LANE: usize;
    /// Converts from f32, rounding to nearest.
    fn round(value: f32) -> Self;
    /// Converts values, exactly, into every `stride`th element of `to`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[allow(unsafe_code)]
    unsafe fn convert<S: Simd>(from: &[T], to: &mut [Self], stride: usize);
    /// Converts `PER_LANE` rows of `dim` values, exactly, so that the values of a column are neighbours in `to`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[allow(unsafe_code)]
    unsafe fn convert_rows<S: Simd>(from: &[T], to: &mut [Self], dim: usize);
    /// Adds to each lane the products of its `PER_LANE` factors with the `PER_LANE` factors at `other`.
    ///
    /// # Safety
    /// `lanes` points to `PER_LANE * LANES` factors, `other` to `PER_LANE`, and the processor has the instruction set.
    #[allow(unsafe_code)]
    unsafe fn dot<S: Simd>(sums: S::F, lanes: *const Self, other: *const Self) -> S::F;
}

impl<T: Element> Operand<T> for f32 {
    const PER_LANE: usize = 1;
    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn convert<S: Simd>(from: &[T], to: &mut [Self], stride: usize) {
        let in_vectors = if stride == 1 { from.len().min(to.len()) / S::LANES * S::LANES } else { 0 };
        for i in (0..in_vectors).step_by(S::LANES) {
            // SAFETY: both slices have a whole vector at `i`.
            unsafe { S::store(to.as_mut_ptr().add(i), T::load::<S>(from.as_ptr().add(i))) }
        }
        let rest = to.iter_mut().step_by(stride).zip(from).skip(in_vectors);
        rest.for_each(|(to, from)| *to = from.to_f32());
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn convert_rows<S: Simd>(from: &[T], to: &mut [Self], _dim: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe { <Self as Operand<T>>::convert::<S>(from, to, 1) }
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn dot<S: Simd>(sums: S::F, lanes: *const Self, other: *const Self) -> S::F {
        // SAFETY: guaranteed by the caller.
        unsafe { S::mul_add(S::splat(*other), S::load(lanes), sums) }
    }
}

impl Operand<bf16> for bf16 {
    const PER_LANE: usize = 2;
    #[inline(always)]
    fn round(value: f32) -> Self {
        round_bf16(value)
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn convert<S: Simd>(from: &[bf16], to: &mut [Self], stride: usize) {
        to.iter_mut().step_by(stride).zip(from).for_each(|(to, from)| *to = *from);
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn convert_rows<S: Simd>(from: &[bf16], to: &mut [Self], dim: usize) {
        // In this form, the compiler uses vectors.
        let (first, second) = from.split_at(dim);
        let pairs = to.as_chunks_mut::<2>().0.iter_mut().zip(first.iter().zip(second));
        pairs.for_each(|(to, (first, second))| *to = [*first, *second]);
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn dot<S: Simd>(sums: S::F, lanes: *const Self, other: *const Self) -> S::F {
        // SAFETY: guaranteed by the caller.
        unsafe { S::dot_bf16(sums, lanes, other) }
    }
}

/// Memory of a tile. `rows` is the number of queries, padded to whole vectors; `dim` is the head width.
pub(super) struct Memory<'a, O> {
    /// `[dim / PER_LANE][rows][PER_LANE]`, already scaled.
    queries: &'a mut [O],
    /// Keys of a chunk, `[64][dim]`.
    keys: &'a mut [O],
    /// Values of a chunk, `[64 / PER_LANE][dim][PER_LANE]`.
    values: &'a mut [O],
    /// Numerators of the softmax, `[64 / PER_LANE][rows][PER_LANE]`.
    weights: &'a mut [O],
    /// `[64][rows]`.
    scores: &'a mut [f32],
    /// `[rows]`: greatest score so far.
    greatest: &'a mut [f32],
    /// `[rows]`: sum of the weights, relative to the greatest score.
    total: &'a mut [f32],
    /// `[rows]`: factor for the weights of earlier chunks.
    shrink: &'a mut [f32],
    /// `[dim][rows]`: weighted sum of the values.
    attended: &'a mut [f32],
    rows: usize,
    dim: usize,
}

impl<'a, O> Memory<'a, O> {
    /// Splits `memory` into the buffers, and resets the softmax.
    pub(super) fn prepare<T>(memory: &'a mut Vec<f32>, rows: usize, head_dim: usize) -> Self
    where
        O: Operand<T>,
    {
        let rows = rows.next_multiple_of(PADDING);
        let dim = head_dim;
        let most = dim * rows + CHUNK_TOKENS * (2 * dim + rows) + CHUNK_TOKENS * rows + 3 * rows + dim * rows;
        memory.resize(memory.len().max(most), 0.0);
        let rest = &mut memory[..];
        let (queries, rest) = cut(rest, dim * rows);
        let (keys, rest) = cut(rest, CHUNK_TOKENS * dim);
        let (values, rest) = cut(rest, CHUNK_TOKENS * dim);
        let (weights, rest) = cut(rest, CHUNK_TOKENS * rows);
        let (scores, rest) = rest.split_at_mut(CHUNK_TOKENS * rows);
        let (greatest, rest) = rest.split_at_mut(rows);
        let (total, rest) = rest.split_at_mut(rows);
        let (shrink, rest) = rest.split_at_mut(rows);
        let attended = &mut rest[..dim * rows];
        // Not -inf: a query may attend to none of the first keys, and its score less this one must be a number.
        greatest.fill(f32::MIN);
        total.fill(0.0);
        attended.fill(0.0);
        Self { queries, keys, values, weights, scores, greatest, total, shrink, attended, rows, dim }
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
        self.attended[row..].iter().step_by(self.rows).map(move |value| value / total)
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
                self.take_chunk::<S>(first, count);
                // Skips whole vectors of queries that attend to none of these keys.
                let first_row = self.unseeing(first) / PADDING * PADDING;
                self.score::<S>(count, first_row);
                self.weigh::<S>(first, count, first_row);
                self.gather::<S>(count, first_row);
            }
        }
    }
}

impl<T: Element, O: Operand<T>> Tile<'_, '_, T, O> {
    /// Number of leading queries that do not attend to `key`. Queries are in token order.
    fn unseeing(&self, key: usize) -> usize {
        key.saturating_sub(self.position) * self.sizes.group()
    }

    /// Number of leading queries whose windows have not left `key` behind. Queries are in token order.
    fn remembering(&self, key: usize) -> usize {
        let tokens = key.saturating_add(self.scoring.window).saturating_sub(self.position);
        tokens.saturating_mul(self.sizes.group()).min(self.memory.rows)
    }

    /// Loads the keys and values of `count` tokens, and zeros past the last token and before the first token that any
    /// query attends to, where the cache may hold data of another sequence.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn take_chunk<S: Simd>(&mut self, first: usize, count: usize) {
        let hidden = self.scoring.first_visible(self.position).saturating_sub(first);
        let Memory { keys, values, dim, .. } = &mut *self.memory;
        let dim = *dim;
        if count < CHUNK_TOKENS || hidden > 0 {
            keys.fill(O::zeroed());
            values.fill(O::zeroed());
        }
        for (i, block) in self.blocks[first / BLOCK_TOKENS..].iter().take(count.div_ceil(BLOCK_TOKENS)).enumerate() {
            let filled = BLOCK_TOKENS.min(count - i * BLOCK_TOKENS);
            let [from_keys, from_values] = [0, 1].map(|part| {
                let at = ((block.0 as usize * 2 + part) * self.sizes.kv_heads + self.kv_head) * BLOCK_TOKENS * dim;
                &self.cache[at..at + filled * dim]
            });
            let at = i * BLOCK_TOKENS * dim;
            let skipped = hidden.saturating_sub(i * BLOCK_TOKENS);
            for (from, to) in from_keys.chunks_exact(dim).zip(keys[at..].chunks_exact_mut(dim)).skip(skipped) {
                // SAFETY: guaranteed by the caller.
                unsafe { O::convert::<S>(from, to, 1) }
            }
            let lanes = O::PER_LANE * dim;
            for (i, (from, to)) in from_values.chunks(lanes).zip(values[at..].chunks_exact_mut(lanes)).enumerate() {
                let skipped = skipped.saturating_sub(i * O::PER_LANE);
                if skipped == 0 && from.len() == lanes {
                    // SAFETY: guaranteed by the caller.
                    unsafe { O::convert_rows::<S>(from, to, dim) }
                    continue;
                }
                for (row, from) in from.chunks_exact(dim).enumerate().skip(skipped) {
                    // SAFETY: guaranteed by the caller.
                    unsafe { O::convert::<S>(from, &mut to[row..], O::PER_LANE) }
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
        let Memory { queries, keys, scores, rows, dim, .. } = &mut *self.memory;
        let product = Product {
            lanes: queries,
            steps: *dim / O::PER_LANE,
            others: keys,
            next_other: *dim,
            next_step: O::PER_LANE,
            outputs: count,
            kept: None,
            rows: *rows,
        };
        // SAFETY: guaranteed by the caller.
        unsafe { product.run::<S, T>(first_row, scores) }
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
        let Memory { scores, weights, greatest, total, shrink, rows, .. } = &mut *self.memory;
        let rows = *rows;
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
                to.zip(from).for_each(|(to, from)| *to = O::round(*from));
            }
        }
    }

    /// `attended[d][row] = attended[d][row] * shrink[row] + weights[row] . values[d]` for rows starting at `first_row`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn gather<S: Simd>(&mut self, count: usize, first_row: usize) {
        let Memory { weights, values, shrink, attended, rows, dim, .. } = &mut *self.memory;
        let product = Product {
            lanes: weights,
            steps: count.div_ceil(O::PER_LANE),
            others: values,
            next_other: O::PER_LANE,
            next_step: *dim * O::PER_LANE,
            outputs: *dim,
            kept: Some(&**shrink),
            rows: *rows,
        };
        // SAFETY: guaranteed by the caller.
        unsafe { product.run::<S, T>(first_row, attended) }
    }
}

/// `out[i][row] = out[i][row] * kept[row] + sum over steps of lanes[step][row] * others[i * next_other + step *
/// next_step]`. A step has `PER_LANE` factors. Without `kept`, the first term is left out.
struct Product<'a, O> {
    /// `[steps][rows][PER_LANE]`.
    lanes: &'a [O],
    steps: usize,
    others: &'a [O],
    next_other: usize,
    next_step: usize,
    outputs: usize,
    kept: Option<&'a [f32]>,
    rows: usize,
}

impl<O: Pod> Product<'_, O> {
    /// Computes all outputs for rows starting at `first_row`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd, T>(&self, first_row: usize, out: &mut [f32])
    where
        O: Operand<T>,
    {
        let rows = self.rows;
        let last = (self.outputs - 1) * self.next_other + (self.steps - 1) * self.next_step + O::PER_LANE;
        assert!(self.lanes.len() >= self.steps * rows * O::PER_LANE && self.others.len() >= last);
        assert!(out.len() >= self.outputs * rows && self.kept.is_none_or(|kept| kept.len() == rows));
        assert!(rows.is_multiple_of(PADDING) && first_row.is_multiple_of(PADDING));
        // As many outputs as there are registers for their sums.
        let most = if S::LANES == 8 { 6 } else { 12 };
        let mut at = first_row;
        while at < rows {
            let vectors = if at + 2 * S::LANES <= rows { 2 } else { 1 };
            let mut first = 0;
            while first < self.outputs {
                let n = tile_rows(self.outputs - first, most);
                // SAFETY: the asserts guarantee that all elements of a tile exist.
                unsafe {
                    match vectors {
                        2 => with_rows!(n, self.tile, S, T, 2, (at, first, out), 1 2 3 4 5 6 7 8 9 10 11 12),
                        _ => with_rows!(n, self.tile, S, T, 1, (at, first, out), 1 2 3 4 5 6 7 8 9 10 11 12),
                    }
                }
                first += n;
            }
            at += vectors * S::LANES;
        }
    }

    /// Computes OUTPUTS outputs starting at `first`, for VECS vectors of rows starting at `at`.
    ///
    /// # Safety
    /// These outputs and rows exist, and the asserts of `run` have passed. The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn tile<S: Simd, T, const OUTPUTS: usize, const VECS: usize>(&self, at: usize, first: usize, out: &mut [f32])
    where
        O: Operand<T>,
    {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let out = out.as_mut_ptr().add(first * self.rows + at);
            let mut sums = [[S::splat(0.0); VECS]; OUTPUTS];
            if let Some(kept) = self.kept {
                let [kept] = load_tile::<S, 1, VECS>(kept.as_ptr().add(at), 0);
                sums = load_tile::<S, OUTPUTS, VECS>(out, self.rows);
                for sums in &mut sums {
                    for (sum, kept) in sums.iter_mut().zip(kept) {
                        *sum = S::mul(*sum, kept);
                    }
                }
            }
            for step in 0..self.steps {
                let lanes = self.lanes.as_ptr().add((step * self.rows + at) * O::PER_LANE);
                let others = self.others.as_ptr().add(first * self.next_other + step * self.next_step);
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        let lanes = lanes.add(v * S::LANES * O::PER_LANE);
                        *sum = O::dot::<S>(*sum, lanes, others.add(i * self.next_other));
                    }
                }
            }
            store_tile::<S, OUTPUTS, VECS>(out, self.rows, sums);
        }
    }
}

/// Calls `$self.$f::<S, T, OUTPUTS, VECS>` with OUTPUTS = `$n`, which must be one of the literals.
macro_rules! with_rows {
    ($n:expr, $self:ident.$f:ident, $s:ty, $t:ty, $vecs:literal, $args:tt, $($literal:literal)+) => {
        match $n {
            $($literal => $self.$f::<$s, $t, $literal, $vecs> $args,)+
            _ => unreachable!("a tile of {} outputs", $n),
        }
    };
}
use with_rows;
