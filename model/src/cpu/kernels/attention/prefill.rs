//! Prefill: attention of prompts. A tile of neighbouring tokens, with all query heads that share a KV head, passes over
//! its keys once, 64 at a time.
//!
//! Each lane holds a query, so scores, softmax and weighted sums never need sums across lanes. Keys and values are
//! broadcast to all lanes in the cache's order. A tile with few queries, such as a token that extends a sequence, would
//! leave most lanes empty: there, lanes hold keys, then elements of values. The softmax has queries in its lanes in both
//! cases. The order of each sum, and so the result, is the same. If products of bf16 are faster than products of f32, and
//! KV is bf16, then queries and softmax weights are rounded to bf16; sums are f32.

use std::cell::RefCell;

use overfill_kv::BLOCK_TOKENS;
use rayon::prelude::*;

use super::{
    Batch,
    operand::Operand,
    tile::{Memory, Tile},
};
use crate::cpu::kernels::{element::Element, memory::Shared};

/// Approximate queries per tile: tokens times query heads per KV head.
const TILE_ROWS: usize = 144;

/// The unit of parallel work: a tile of one slice's tokens, for one KV head.
#[derive(Clone, Copy)]
pub(super) struct Task {
    slice: usize,
    /// Index in the slice of the tile's first token.
    first: usize,
    tokens: usize,
    /// Row of the first token in the batch.
    row: usize,
    kv_head: usize,
}

thread_local! {
    /// Memory of a tile; see [`Memory`].
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Computes attention of a batch into `out`.
pub(super) fn attend<T: Element, O: Operand<T>>(
    batch: &Batch<'_, T>,
    shared: bool,
    out: &mut [f32],
    tasks: &mut Vec<Task>,
) {
    let sizes = batch.sizes;
    let most = (TILE_ROWS / sizes.group()).max(1);
    tasks.clear();
    let mut row = 0;
    for (slice, tokens) in batch.slices.iter().map(|slice| slice.tokens.len()).enumerate() {
        for first in (0..tokens).step_by(most) {
            for kv_head in 0..sizes.kv_heads {
                tasks.push(Task { slice, first, tokens: most.min(tokens - first), row: row + first, kv_head });
            }
        }
        row += tokens;
    }
    let out = Shared::new(out);
    let run = |task: &Task| {
        SCRATCH.with_borrow_mut(|memory| {
            let slice = &batch.slices[task.slice];
            let position = slice.start + task.first;
            let end = position + task.tokens;
            let blocks = &slice.blocks[..end.div_ceil(BLOCK_TOKENS)];
            let group = sizes.group();
            // Offset in q and in the result of a row's query head.
            let head = |row: usize| {
                ((task.row + row / group) * sizes.heads + task.kv_head * group + row % group) * sizes.head_dim
            };
            let rows = task.tokens * group;
            let mut memory = Memory::<O>::prepare::<T>(memory, rows, sizes.head_dim);
            memory.take_queries::<T>((0..rows).map(|row| &batch.q[head(row)..][..sizes.head_dim]));
            batch.isa.run(Tile {
                cache: batch.cache,
                sizes,
                kv_head: task.kv_head,
                blocks,
                position,
                end,
                scoring: batch.scoring,
                memory: &mut memory,
            });
            for row in 0..rows {
                // SAFETY: tasks write to disjoint tokens and heads.
                #[allow(unsafe_code)]
                let out = unsafe { out.part(head(row), sizes.head_dim) };
                out.iter_mut().zip(memory.result(row)).for_each(|(out, value)| *out = value);
            }
        });
    };
    if shared {
        tasks.par_iter().with_max_len(1).for_each(run);
    } else {
        tasks.iter().for_each(run);
    }
}
