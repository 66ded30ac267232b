//! Attention over paged KV on the CPU: block by block with a running softmax (Milakov & Gimelshein, arXiv 1805.02867;
//! Dao et al., arXiv 2205.14135), so that no score matrix exists. Query heads that share a KV head, and neighbouring
//! tokens of a prompt, share each read of a block.
//!
//! A sequence's blocks are taken in segments, each with a softmax of its own, which are then merged in order (as in
//! flash decoding). The segments of a single query are computed in parallel, those of a tile of a prompt one after the
//! other; the arithmetic is the same, whatever else is in the batch and however many threads there are.

use std::cell::RefCell;

use overfill_kv::{BLOCK_TOKENS, BlockId};

use super::{
    element::Element,
    simd::{Isa, Kernel, Simd},
};
use crate::SequenceSlice;

/// Query tokens that share one pass over the keys.
const TILE_TOKENS: usize = 16;
/// Blocks of a segment: 512 tokens.
const SEGMENT_BLOCKS: usize = 32;
/// Vectors of the widest instruction set divide this; heads are padded to it.
const PADDING: usize = 16;
/// Products below which sharing work out costs more than it brings.
const WORTH_SHARING: usize = 1 << 16;

/// Sizes of heads.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl Heads {
    /// Query heads that share a KV head.
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    fn padded_dim(self) -> usize {
        self.head_dim.next_multiple_of(PADDING)
    }
}

/// A tile of one slice's queries under one KV head, over some of its blocks: the unit of parallel work.
#[derive(Clone, Copy)]
struct Task {
    slice: usize,
    /// Row of its first query in the batch.
    row: usize,
    /// Position of its first query in the sequence.
    position: usize,
    tokens: usize,
    kv_head: usize,
    /// The only segment, where a tile's segments are shared out.
    segment: Option<usize>,
    /// Where its partial result lies, in f32.
    partial: usize,
}

/// Memory that is kept from one call to the next.
#[derive(Default)]
pub(crate) struct AttentionScratch {
    tasks: Vec<Task>,
    partials: Vec<f32>,
}

/// A running softmax over some keys, for `rows` queries.
struct Partial<'a> {
    /// `[rows]`: the greatest score so far.
    greatest: &'a mut [f32],
    /// `[rows]`: the sum of weights, relative to the greatest.
    total: &'a mut [f32],
    /// `[rows][padded head_dim]`: values by weight.
    values: &'a mut [f32],
}

impl<'a> Partial<'a> {
    fn floats(rows: usize, padded: usize) -> usize {
        rows * (2 + padded)
    }

    fn over(memory: &'a mut [f32], rows: usize) -> Self {
        let (greatest, rest) = memory.split_at_mut(rows);
        let (total, values) = rest.split_at_mut(rows);
        Self { greatest, total, values }
    }

    fn clear(&mut self) {
        self.greatest.fill(f32::NEG_INFINITY);
        self.total.fill(0.0);
        self.values.fill(0.0);
    }

    /// Takes in what `other` has seen.
    fn merge(&mut self, other: &Partial<'_>) {
        let padded = self.values.len() / self.total.len();
        let values = self.values.chunks_exact_mut(padded).zip(other.values.chunks_exact(padded));
        for (row, (values, others)) in values.enumerate() {
            let greatest = self.greatest[row].max(other.greatest[row]);
            if greatest == f32::NEG_INFINITY {
                continue;
            }
            let (mine, theirs) = ((self.greatest[row] - greatest).exp(), (other.greatest[row] - greatest).exp());
            self.greatest[row] = greatest;
            self.total[row] = self.total[row] * mine + other.total[row] * theirs;
            for (value, other) in values.iter_mut().zip(others) {
                *value = *value * mine + other * theirs;
            }
        }
    }
}

thread_local! {
    /// Queries, scores, a block's keys and values, and two partial results.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Causal attention of q `[n, heads, head_dim]` over a cache layer `[blocks, 2, kv_heads, 16, head_dim]` into `out`, of q's
/// shape.
pub(crate) fn attend<T: Element>(
    isa: Isa,
    q: &[f32],
    cache: &[T],
    batch: &[SequenceSlice<'_>],
    sizes: Heads,
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    let n: usize = batch.iter().map(|slice| slice.tokens.len()).sum();
    let width = sizes.heads * sizes.head_dim;
    assert!(q.len() == n * width && out.len() == q.len());
    let block_elements = 2 * sizes.kv_heads * BLOCK_TOKENS * sizes.head_dim;
    let AttentionScratch { tasks, partials } = scratch;
    tasks.clear();
    let (mut row, mut floats, mut work) = (0, 0, 0);
    for (i, slice) in batch.iter().enumerate() {
        let (count, end) = (slice.tokens.len(), slice.start + slice.tokens.len());
        let blocks = &slice.blocks[..end.div_ceil(BLOCK_TOKENS)];
        assert!(blocks.iter().all(|block| (block.0 as usize + 1) * block_elements <= cache.len()), "a block outside");
        work += count * end * width;
        for first in (0..count).step_by(TILE_TOKENS) {
            let tokens = TILE_TOKENS.min(count - first);
            for kv_head in 0..sizes.kv_heads {
                // Partial results of a whole prompt's segments would take more memory than its KV.
                let segments = if count == 1 { blocks.len().div_ceil(SEGMENT_BLOCKS) } else { 1 };
                for segment in 0..segments {
                    let segment = (segments > 1).then_some(segment);
                    let position = slice.start + first;
                    tasks.push(Task {
                        slice: i,
                        row: row + first,
                        position,
                        tokens,
                        kv_head,
                        segment,
                        partial: floats,
                    });
                    floats += Partial::floats(tokens * sizes.group(), sizes.padded_dim());
                }
            }
        }
        row += count;
    }
    if partials.len() < floats {
        partials.resize(floats, 0.0);
    }
    let batch = Batch { isa, q, cache, slices: batch, sizes };
    // Each task's partial result follows that of the one before.
    let mut rest = &mut partials[..floats];
    if work < WORTH_SHARING {
        for task in tasks.iter() {
            let (mine, others) = rest.split_at_mut(batch.floats(task));
            batch.run(task, mine);
            rest = others;
        }
    } else {
        batch.run_in_parallel(tasks, rest);
    }
    batch.collect(tasks, partials, out);
}

struct Batch<'a, T> {
    isa: Isa,
    q: &'a [f32],
    cache: &'a [T],
    slices: &'a [SequenceSlice<'a>],
    sizes: Heads,
}

impl<T: Element> Batch<'_, T> {
    fn rows(&self, task: &Task) -> usize {
        task.tokens * self.sizes.group()
    }

    fn floats(&self, task: &Task) -> usize {
        Partial::floats(self.rows(task), self.sizes.padded_dim())
    }

    /// Halves the tasks until a part is small, as rayon's own iterators would; theirs can't cut memory in unequal parts.
    fn run_in_parallel(&self, tasks: &[Task], partials: &mut [f32]) {
        match tasks {
            [] => {}
            [task] => self.run(task, partials),
            _ => {
                let (left, right) = tasks.split_at(tasks.len() / 2);
                let (mine, others) = partials.split_at_mut(right[0].partial - left[0].partial);
                rayon::join(|| self.run_in_parallel(left, mine), || self.run_in_parallel(right, others));
            }
        }
    }

    fn run(&self, task: &Task, partial: &mut [f32]) {
        let (rows, dim, padded) = (self.rows(task), self.sizes.head_dim, self.sizes.padded_dim());
        let (group, heads) = (self.sizes.group(), self.sizes.heads);
        SCRATCH.with_borrow_mut(|memory| {
            let sizes =
                [rows * padded, rows * BLOCK_TOKENS, rows, 2 * BLOCK_TOKENS * padded, Partial::floats(rows, padded)];
            memory.resize(memory.len().max(sizes.iter().sum()), 0.0);
            let (queries, rest) = memory.split_at_mut(sizes[0]);
            let (scores, rest) = rest.split_at_mut(sizes[1]);
            let (shrink, rest) = rest.split_at_mut(sizes[2]);
            let (block, rest) = rest.split_at_mut(sizes[3]);
            let mut local = Partial::over(&mut rest[..sizes[4]], rows);
            // Scores come out scaled if queries go in so.
            let scale = 1.0 / (dim as f32).sqrt();
            for (row, query) in queries.chunks_exact_mut(padded).enumerate() {
                let at = ((task.row + row / group) * heads + task.kv_head * group + row % group) * dim;
                query[..dim].iter_mut().zip(&self.q[at..at + dim]).for_each(|(to, q)| *to = q * scale);
                query[dim..].fill(0.0);
            }
            block.fill(0.0);
            let end = task.position + task.tokens;
            let blocks = &self.slices[task.slice].blocks[..end.div_ceil(BLOCK_TOKENS)];
            let segments = blocks.chunks(SEGMENT_BLOCKS).enumerate();
            let mut all = Partial::over(partial, rows);
            all.clear();
            let chosen = task.segment.map_or(0..usize::MAX, |s| s..s + 1);
            for (i, blocks) in segments.filter(|(i, _)| chosen.contains(i)) {
                local.clear();
                self.isa.run(Segment {
                    cache: self.cache,
                    sizes: self.sizes,
                    kv_head: task.kv_head,
                    blocks,
                    // Key positions are counted from the segment's first.
                    first_visible: task.position + 1,
                    before: i * SEGMENT_BLOCKS * BLOCK_TOKENS,
                    queries,
                    scores,
                    shrink,
                    block,
                    partial: &mut local,
                });
                all.merge(&local);
            }
        });
    }

    /// Merges the segments of each tile, divides by the sums of weights, and writes to where the heads belong.
    fn collect(&self, tasks: &[Task], partials: &mut [f32], out: &mut [f32]) {
        let Heads { heads, head_dim, .. } = self.sizes;
        let (group, padded) = (self.sizes.group(), self.sizes.padded_dim());
        for tile in tasks.chunk_by(|_, next| next.segment.is_some_and(|s| s > 0)) {
            let rows = self.rows(&tile[0]);
            let size = self.floats(&tile[0]);
            let memory = &mut partials[tile[0].partial..][..size * tile.len()];
            let (first, others) = memory.split_at_mut(size);
            let mut all = Partial::over(first, rows);
            for other in others.chunks_exact_mut(size) {
                all.merge(&Partial::over(other, rows));
            }
            for (row, values) in all.values.chunks_exact(padded).enumerate() {
                let at = ((tile[0].row + row / group) * heads + tile[0].kv_head * group + row % group) * head_dim;
                for (out, value) in out[at..at + head_dim].iter_mut().zip(values) {
                    *out = value / all.total[row];
                }
            }
        }
    }
}

/// A tile's queries over a run of blocks.
struct Segment<'a, 'p, T> {
    cache: &'a [T],
    sizes: Heads,
    kv_head: usize,
    blocks: &'a [BlockId],
    /// Keys, of the whole sequence, that the first query token sees; each later one sees one more.
    first_visible: usize,
    /// Keys of the sequence before this segment.
    before: usize,
    /// `[rows][padded]`.
    queries: &'a [f32],
    /// `[rows][16]`.
    scores: &'a mut [f32],
    /// `[rows]`: what a block makes of the weights before it.
    shrink: &'a mut [f32],
    /// Keys and values of a block, `[2][16][padded]`; the padding is zero.
    block: &'a mut [f32],
    partial: &'a mut Partial<'p>,
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

#[cfg(test)]
mod tests {
    use half::bf16;
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

    /// The formula, in f64, with no blocks but those of the cache.
    fn reference(q: &[f32], cache: &[f32], batch: &[SequenceSlice<'_>], sizes: Heads) -> Vec<f64> {
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
                    let scores: Vec<f64> = (0..=slice.start + token)
                        .map(|p| {
                            let (block, t) = place(p);
                            let dot: f64 =
                                (0..head_dim).map(|d| f64::from(q[d]) * element(block, 0, kv_head, t, d)).sum();
                            (dot / (head_dim as f64).sqrt()).exp()
                        })
                        .collect();
                    let total: f64 = scores.iter().sum();
                    for d in 0..head_dim {
                        let sum: f64 = scores
                            .iter()
                            .enumerate()
                            .map(|(p, score)| {
                                let (block, t) = place(p);
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

    fn run<T: Element>(isa: Isa, q: &[f32], cache: &[T], batch: &[SequenceSlice<'_>], sizes: Heads) -> Vec<f32> {
        let mut out = vec![f32::NAN; q.len()];
        attend(isa, q, cache, batch, sizes, &mut out, &mut AttentionScratch::default());
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn it_is_attention(
            group in 1_usize..4, kv_heads in 1_usize..3, half_dim in 1_usize..36,
            lengths in prop::collection::vec((1_usize..40, 0_usize..1200), 1..4), seed: u64,
        ) {
            let sizes = Heads { heads: group * kv_heads, kv_heads, head_dim: 2 * half_dim };
            let mut tables = Vec::new();
            let mut count = 0;
            for (tokens, start) in &lengths {
                let blocks = (tokens + start).div_ceil(BLOCK_TOKENS);
                // Downwards: a table is a table.
                tables.push((count..count + blocks).rev().map(|b| BlockId(b as u32)).collect::<Vec<_>>());
                count += blocks;
            }
            let tokens = [0; 40];
            let batch: Vec<SequenceSlice<'_>> = lengths.iter().zip(&tables).map(|((count, start), blocks)| {
                SequenceSlice { tokens: &tokens[..*count], start: *start, blocks, want: Want::Nothing }
            }).collect();
            let rows: usize = lengths.iter().map(|l| l.0).sum();
            let q = random(rows * sizes.heads * sizes.head_dim, seed);
            let mut cache = random(count * 2 * kv_heads * BLOCK_TOKENS * sizes.head_dim, !seed);
            // Rounded beforehand, so that both types hold the same.
            cache.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
            let expected = reference(&q, &cache, &batch, sizes);
            // What lies past a sequence's end must not matter.
            for slice in &batch {
                let end = slice.start + slice.tokens.len();
                let block = slice.blocks[(end - 1) / BLOCK_TOKENS].0 as usize;
                for token in end - (end - 1) / BLOCK_TOKENS * BLOCK_TOKENS..BLOCK_TOKENS {
                    for part in 0..2 * kv_heads {
                        let at = ((block * 2 * kv_heads + part) * BLOCK_TOKENS + token) * sizes.head_dim;
                        cache[at..at + sizes.head_dim].fill(f32::NAN);
                    }
                }
            }
            let narrow: Vec<bf16> = cache.iter().map(|x| bf16::from_f32(*x)).collect();
            for isa in Isa::available() {
                let got = run(*isa, &q, &cache, &batch, sizes);
                prop_assert_eq!(&got, &run(*isa, &q, &narrow, &batch, sizes));
                for (i, (got, exact)) in got.iter().zip(&expected).enumerate() {
                    prop_assert!((f64::from(*got) - exact).abs() < 2e-5, "{isa:?} {i}: {got}, not {exact}");
                }
                // A token alone, once what is before it is in the cache, gives the same bits.
                let first = batch[0];
                let before = first.tokens.len() - 1;
                let last = SequenceSlice { tokens: &tokens[..1], start: first.start + before, ..first };
                let width = sizes.heads * sizes.head_dim;
                let at = before * width;
                prop_assert_eq!(&run(*isa, &q[at..at + width], &cache, &[last], sizes)[..], &got[at..at + width]);
            }
        }
    }
}
