//! Decode: attention of newest tokens. Each KV byte is read once, sequentially; query heads that share a KV head share
//! the read.
//!
//! A sequence's blocks are split into segments, each with its own softmax, and the results are merged in order (as in
//! flash decoding). If a slice has a single token, its segments are computed in parallel. The arithmetic does not
//! depend on the rest of the batch or on the number of threads.

use std::{cell::RefCell, ops::Range};

use overfill_kv::BLOCK_TOKENS;
use rayon::prelude::*;

use super::{Batch, Heads, PADDING, segment::Segment};
use crate::cpu::kernels::element::Element;

/// Blocks per segment (64 tokens).
const SEGMENT_BLOCKS: usize = 4;

/// The unit of parallel work: all heads of a token over one or all segments of its sequence.
#[derive(Clone, Copy)]
struct Task {
    slice: usize,
    /// Row of the token in the batch.
    row: usize,
    /// Positions of the keys that it attends to.
    first: usize,
    end: usize,
    /// The segment to compute; `None` means all.
    segment: Option<usize>,
}

/// Buffers that are reused between calls.
#[derive(Default)]
pub(super) struct Scratch {
    tasks: Vec<Task>,
    /// Index of the first task of each row of the batch, followed by the number of tasks.
    firsts: Vec<usize>,
    partials: Vec<f32>,
}

/// Elements of a head, padded to whole vectors.
pub(super) fn padded_dim(sizes: Heads) -> usize {
    sizes.head_dim.next_multiple_of(PADDING)
}

/// A running softmax over some keys, for all heads of one token.
pub(super) struct Partial<'a> {
    /// `[heads]`: greatest score so far.
    pub(super) greatest: &'a mut [f32],
    /// `[heads]`: sum of the weights, relative to the greatest score.
    pub(super) total: &'a mut [f32],
    /// `[heads][padded head_dim]`: weighted sum of the values.
    pub(super) values: &'a mut [f32],
}

impl<'a> Partial<'a> {
    fn floats(sizes: Heads) -> usize {
        sizes.heads * (2 + padded_dim(sizes))
    }

    fn over(memory: &'a mut [f32], sizes: Heads) -> Self {
        let (greatest, rest) = memory.split_at_mut(sizes.heads);
        let (total, values) = rest.split_at_mut(sizes.heads);
        Self { greatest, total, values }
    }

    fn clear(&mut self) {
        self.greatest.fill(f32::NEG_INFINITY);
        self.total.fill(0.0);
        self.values.fill(0.0);
    }

    /// Merges another partial result, which is stored in the same layout.
    fn merge(&mut self, other: &[f32], sizes: Heads) {
        let padded = padded_dim(sizes);
        let (greatests, rest) = other.split_at(sizes.heads);
        let (totals, others) = rest.split_at(sizes.heads);
        let values = self.values.chunks_exact_mut(padded).zip(others.chunks_exact(padded));
        for (head, (values, others)) in values.enumerate() {
            let greatest = self.greatest[head].max(greatests[head]);
            if greatest == f32::NEG_INFINITY {
                continue;
            }
            let (mine, theirs) = ((self.greatest[head] - greatest).exp(), (greatests[head] - greatest).exp());
            self.greatest[head] = greatest;
            self.total[head] = self.total[head] * mine + totals[head] * theirs;
            for (value, other) in values.iter_mut().zip(others) {
                *value = *value * mine + other * theirs;
            }
        }
    }
}

thread_local! {
    /// Queries, scores, one block's keys and values, and a partial result.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Computes attention of a batch into `out`.
pub(super) fn attend<T: Element>(batch: &Batch<'_, T>, shared: bool, out: &mut [f32], scratch: &mut Scratch) {
    let Scratch { tasks, firsts, partials } = scratch;
    tasks.clear();
    firsts.clear();
    let mut row = 0;
    for (i, slice) in batch.slices.iter().enumerate() {
        for token in 0..slice.tokens.len() {
            let position = slice.start + token;
            let (first, end) = (batch.scoring.first_visible(position), position + 1);
            let task = |segment| Task { slice: i, row, first, end, segment };
            firsts.push(tasks.len());
            // For a whole prompt, partial results of all segments would need more memory than its KV.
            match slice.tokens.len() {
                1 => tasks.extend(segments(first, end).map(|segment| task(Some(segment)))),
                _ => tasks.push(task(None)),
            }
            row += 1;
        }
    }
    firsts.push(tasks.len());
    let each = Partial::floats(batch.sizes);
    partials.resize(partials.len().max(each * tasks.len()), 0.0);
    let partials = &mut partials[..each * tasks.len()];
    if shared {
        let tasks = tasks.par_iter().zip(partials.par_chunks_exact_mut(each)).with_max_len(1);
        tasks.for_each(|(task, partial)| run(batch, task, partial));
    } else {
        tasks.iter().zip(partials.chunks_exact_mut(each)).for_each(|(task, partial)| run(batch, task, partial));
    }
    let width = batch.sizes.heads * batch.sizes.head_dim;
    let collect = |(row, out): (usize, &mut [f32])| {
        collect(batch.sizes, &partials[each * firsts[row]..each * firsts[row + 1]], out);
    };
    if shared {
        out.par_chunks_exact_mut(width).enumerate().for_each(collect);
    } else {
        out.chunks_exact_mut(width).enumerate().for_each(collect);
    }
}

/// The segments that contain keys from position `first` to `end`.
fn segments(first: usize, end: usize) -> Range<usize> {
    first / (BLOCK_TOKENS * SEGMENT_BLOCKS)..end.div_ceil(BLOCK_TOKENS * SEGMENT_BLOCKS)
}

fn run<T: Element>(batch: &Batch<'_, T>, task: &Task, partial: &mut [f32]) {
    let sizes = batch.sizes;
    let (dim, padded) = (sizes.head_dim, padded_dim(sizes));
    SCRATCH.with_borrow_mut(|memory| {
        let parts =
            [sizes.heads * padded, sizes.group() * BLOCK_TOKENS, 2 * BLOCK_TOKENS * padded, Partial::floats(sizes)];
        memory.resize(memory.len().max(parts.iter().sum()), 0.0);
        let (queries, rest) = memory.split_at_mut(parts[0]);
        let (scores, rest) = rest.split_at_mut(parts[1]);
        let (block, rest) = rest.split_at_mut(parts[2]);
        let local = &mut rest[..parts[3]];
        // Scaling the queries scales the scores.
        let scale = 1.0 / (dim as f32).sqrt();
        let q = batch.q[task.row * sizes.heads * dim..].chunks_exact(dim);
        for (query, q) in queries.chunks_exact_mut(padded).zip(q) {
            query[..dim].iter_mut().zip(q).for_each(|(to, q)| *to = q * scale);
            query[dim..].fill(0.0);
        }
        let blocks = &batch.slices[task.slice].blocks[..task.end.div_ceil(BLOCK_TOKENS)];
        let mut all = Partial::over(partial, sizes);
        all.clear();
        for segment in task.segment.map_or_else(|| segments(task.first, task.end), |s| s..s + 1) {
            // Blocks before the first key are skipped.
            let from = (segment * SEGMENT_BLOCKS).max(task.first / BLOCK_TOKENS);
            let blocks = &blocks[from..blocks.len().min((segment + 1) * SEGMENT_BLOCKS)];
            let mut partial = Partial::over(local, sizes);
            partial.clear();
            batch.isa.run(Segment {
                cache: batch.cache,
                sizes,
                blocks,
                hidden: task.first.saturating_sub(from * BLOCK_TOKENS),
                visible: task.end - from * BLOCK_TOKENS,
                cap: batch.scoring.cap,
                queries,
                scores,
                block,
                partial: &mut partial,
            });
            all.merge(local, sizes);
        }
    });
}

/// Merges one row's segments in order, and divides by the sums of weights.
fn collect(sizes: Heads, segments: &[f32], out: &mut [f32]) {
    SCRATCH.with_borrow_mut(|memory| {
        let each = Partial::floats(sizes);
        memory.resize(memory.len().max(each), 0.0);
        let mut all = Partial::over(&mut memory[..each], sizes);
        all.clear();
        for segment in segments.chunks_exact(each) {
            all.merge(segment, sizes);
        }
        let heads = out.chunks_exact_mut(sizes.head_dim).zip(all.values.chunks_exact(padded_dim(sizes)));
        for ((out, values), total) in heads.zip(all.total) {
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value / *total);
        }
    });
}
