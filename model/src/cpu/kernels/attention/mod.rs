//! Attention over paged KV on the CPU, block by block with a running softmax (Milakov & Gimelshein, arXiv 1805.02867;
//! Dao et al., arXiv 2205.14135), so that the score matrix is never stored.
//!
//! There are two implementations, because two resources can be the bottleneck. A newest token does little arithmetic
//! per key and value: [`decode`] is optimised for memory bandwidth and reads each one once, sequentially. The tokens of
//! a prompt share the keys and values that they read: [`prefill`] is optimised for arithmetic. A node uses only one of
//! the two, depending on its role, so that a token's result is exactly the same whatever else is in the batch and
//! however a prompt is split.

mod decode;
mod operand;
mod prefill;
mod product;
mod segment;
#[cfg(test)]
mod tests;
mod tile;

use overfill_kv::BLOCK_TOKENS;

pub(crate) use self::operand::Operand;
use super::{
    element::Element,
    packed::{Arithmetic, Rows},
    simd::Isa,
};
pub(crate) use crate::config::Heads;
use crate::{LayerSpec, SequenceSlice};

/// Multiple of the vector length of every instruction set.
const PADDING: usize = 16;
/// Minimum number of multiplications for which work is distributed to several threads.
const WORTH_SHARING: usize = 1 << 16;

/// What a layer's attention does with scores.
#[derive(Clone, Copy)]
pub(crate) struct Scoring {
    /// Number of tokens that a query attends to, itself included.
    pub(crate) window: usize,
    /// Scores are `cap * tanh(score / cap)`; `None`: as they are.
    pub(crate) cap: Option<f32>,
}

impl Scoring {
    pub(crate) fn of(layer: &LayerSpec) -> Self {
        Self { window: layer.window.unwrap_or(usize::MAX), cap: layer.score_cap.map(|cap| cap as f32) }
    }

    /// Position of the first token that a query at `position` attends to.
    fn first_visible(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }
}

/// Buffers that are reused between calls.
#[derive(Default)]
pub(crate) struct AttentionScratch {
    decode: decode::Scratch,
    prefill: Vec<prefill::Task>,
}

/// Causal attention of q `[n, heads, head_dim]` over a cache layer `[blocks, 2, kv_heads, 16, head_dim]` into `out`,
/// which has q's shape. `O` is the operand type of prefill's products.
#[allow(clippy::too_many_arguments, reason = "they are buffers of one step")]
pub(crate) fn attend<T: Element, O: Operand<T>>(
    how: Arithmetic,
    q: &[f32],
    cache: &[T],
    batch: &[SequenceSlice<'_>],
    sizes: Heads,
    scoring: Scoring,
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    let n: usize = batch.iter().map(|slice| slice.tokens.len()).sum();
    let width = sizes.heads * sizes.head_dim;
    assert!(q.len() == n * width && out.len() == q.len());
    // The configuration rejects an odd head_dim; prefill's bf16 kernel multiplies pairs.
    assert!(sizes.head_dim.is_multiple_of(2), "head_dim is odd");
    let block_elements = 2 * sizes.kv_heads * BLOCK_TOKENS * sizes.head_dim;
    let mut work = 0;
    for slice in batch {
        let end = slice.start + slice.tokens.len();
        let blocks = &slice.blocks[..end.div_ceil(BLOCK_TOKENS)];
        assert!(blocks.iter().all(|block| (block.0 as usize + 1) * block_elements <= cache.len()), "no such block");
        work += slice.tokens.len() * end.min(scoring.window) * width;
    }
    let shared = work >= WORTH_SHARING;
    let batch = Batch { isa: how.isa, q, cache, slices: batch, sizes, scoring };
    match how.rows {
        Rows::Few => decode::attend(&batch, shared, out, &mut scratch.decode),
        Rows::Many => prefill::attend::<T, O>(&batch, shared, out, &mut scratch.prefill),
    }
}

/// The input of attention. [`attend`] has checked that all blocks are within the cache.
struct Batch<'a, T> {
    isa: Isa,
    q: &'a [f32],
    cache: &'a [T],
    slices: &'a [SequenceSlice<'a>],
    sizes: Heads,
    scoring: Scoring,
}
