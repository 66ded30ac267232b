//! Attention over paged KV on the CPU: block by block with a running softmax (Milakov & Gimelshein, arXiv 1805.02867;
//! Dao et al., arXiv 2205.14135), so that no score matrix exists. Query heads that share a KV head, and neighbouring
//! tokens of a prompt, share each read of a block.
//!
//! A sequence's blocks are taken in segments, each with a softmax of its own, which are then merged in order (as in
//! flash decoding). The segments of a single query are computed in parallel, each for all heads, so that memory is read in
//! the order in which it lies. A tile of a prompt has much more to do with what it reads: there each KV head is a task, and
//! its segments follow each other. The arithmetic is the same, whatever else is in the batch and however many threads there are.

mod segment;
#[cfg(test)]
mod tests;

use std::cell::RefCell;

use overfill_kv::BLOCK_TOKENS;

use self::segment::Segment;
use super::{element::Element, simd::Isa};
use crate::SequenceSlice;

/// Query tokens that share one pass over the keys.
const TILE_TOKENS: usize = 16;
/// Blocks of a segment: 64 tokens.
const SEGMENT_BLOCKS: usize = 4;
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

/// A tile of one slice's queries under some KV heads, over some of its blocks: the unit of parallel work.
#[derive(Clone, Copy)]
struct Task {
    slice: usize,
    /// Row of its first query in the batch.
    row: usize,
    /// Position of its first query in the sequence.
    position: usize,
    tokens: usize,
    /// First KV head, and how many there are.
    kv_head: usize,
    kv_heads: usize,
    /// The only segment, where a tile's segments are shared out.
    segment: Option<usize>,
    /// Where its partial result lies, in f32.
    partial: usize,
}

impl Task {
    /// Queries under one KV head, in the order of tokens.
    fn rows_per_kv_head(&self, sizes: Heads) -> usize {
        self.tokens * sizes.group()
    }

    fn rows(&self, sizes: Heads) -> usize {
        self.kv_heads * self.rows_per_kv_head(sizes)
    }

    /// Where the head of a row lies in q and in the result.
    fn head_at(&self, row: usize, sizes: Heads) -> usize {
        let (each, group) = (self.rows_per_kv_head(sizes), sizes.group());
        let (kv_head, row) = (self.kv_head + row / each, row % each);
        ((self.row + row / group) * sizes.heads + kv_head * group + row % group) * sizes.head_dim
    }
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
            // Partial results of a whole prompt's segments would take more memory than its KV.
            let (kv_heads, segments) = match count {
                1 => (sizes.kv_heads, blocks.len().div_ceil(SEGMENT_BLOCKS)),
                _ => (1, 1),
            };
            for kv_head in (0..sizes.kv_heads).step_by(kv_heads) {
                for segment in 0..segments {
                    let task = Task {
                        slice: i,
                        row: row + first,
                        position: slice.start + first,
                        tokens,
                        kv_head,
                        kv_heads,
                        segment: (segments > 1).then_some(segment),
                        partial: floats,
                    };
                    floats += Partial::floats(task.rows(sizes), sizes.padded_dim());
                    tasks.push(task);
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
    fn floats(&self, task: &Task) -> usize {
        Partial::floats(task.rows(self.sizes), self.sizes.padded_dim())
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
        let (rows, each) = (task.rows(self.sizes), task.rows_per_kv_head(self.sizes));
        let (dim, padded) = (self.sizes.head_dim, self.sizes.padded_dim());
        SCRATCH.with_borrow_mut(|memory| {
            let sizes =
                [rows * padded, each * BLOCK_TOKENS, each, 2 * BLOCK_TOKENS * padded, Partial::floats(rows, padded)];
            memory.resize(memory.len().max(sizes.iter().sum()), 0.0);
            let (queries, rest) = memory.split_at_mut(sizes[0]);
            let (scores, rest) = rest.split_at_mut(sizes[1]);
            let (shrink, rest) = rest.split_at_mut(sizes[2]);
            let (block, rest) = rest.split_at_mut(sizes[3]);
            let mut local = Partial::over(&mut rest[..sizes[4]], rows);
            // Scores come out scaled if queries go in so.
            let scale = 1.0 / (dim as f32).sqrt();
            for (row, query) in queries.chunks_exact_mut(padded).enumerate() {
                let at = task.head_at(row, self.sizes);
                query[..dim].iter_mut().zip(&self.q[at..at + dim]).for_each(|(to, q)| *to = q * scale);
                query[dim..].fill(0.0);
            }
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
                    kv_heads: task.kv_head..task.kv_head + task.kv_heads,
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
        let (head_dim, padded) = (self.sizes.head_dim, self.sizes.padded_dim());
        for tile in tasks.chunk_by(|_, next| next.segment.is_some_and(|s| s > 0)) {
            let rows = tile[0].rows(self.sizes);
            let size = self.floats(&tile[0]);
            let memory = &mut partials[tile[0].partial..][..size * tile.len()];
            let (first, others) = memory.split_at_mut(size);
            let mut all = Partial::over(first, rows);
            for other in others.chunks_exact_mut(size) {
                all.merge(&Partial::over(other, rows));
            }
            for (row, values) in all.values.chunks_exact(padded).enumerate() {
                let at = tile[0].head_at(row, self.sizes);
                for (out, value) in out[at..at + head_dim].iter_mut().zip(values) {
                    *out = value / all.total[row];
                }
            }
        }
    }
}
