//! Attention over paged KV on the CPU: block by block with a running softmax (Milakov & Gimelshein, arXiv 1805.02867;
//! Dao et al., arXiv 2205.14135), so that no score matrix exists.
//!
//! There are two ways to compute it, since two things can be scarce. A newest token has little to do with each key and value
//! that it reads: [`decode`] reads them once, in the order in which they lie. Tokens of a prompt share what they read:
//! [`prefill`] is made for multiplying. A node goes one way alone, by what it is there for, so that a token's result is the
//! same number whatever else is in the batch, and however a prompt is cut.

mod decode;
mod prefill;
mod segment;
#[cfg(test)]
mod tests;
mod tile;

use overfill_kv::BLOCK_TOKENS;

pub(crate) use self::tile::Operand;
use super::{
    element::Element,
    packed::{Arithmetic, Rows},
    simd::Isa,
};
use crate::SequenceSlice;
pub(crate) use crate::config::Heads;

/// Vectors of the widest instruction set divide this.
const PADDING: usize = 16;
/// Products below which sharing work out costs more than it brings.
const WORTH_SHARING: usize = 1 << 16;

/// Memory that is kept from one call to the next.
#[derive(Default)]
pub(crate) struct AttentionScratch {
    decode: decode::Scratch,
    prefill: Vec<prefill::Task>,
}

/// Causal attention of q `[n, heads, head_dim]` over a cache layer `[blocks, 2, kv_heads, 16, head_dim]` into `out`, of q's
/// shape. `O` is the type of the factors that a prompt's products multiply.
pub(crate) fn attend<T: Element, O: Operand<T>>(
    how: Arithmetic,
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
    // Configurations with others are refused; prefill's kernel takes pairs.
    assert!(sizes.head_dim.is_multiple_of(2), "an odd head_dim");
    let block_elements = 2 * sizes.kv_heads * BLOCK_TOKENS * sizes.head_dim;
    let mut work = 0;
    for slice in batch {
        let end = slice.start + slice.tokens.len();
        let blocks = &slice.blocks[..end.div_ceil(BLOCK_TOKENS)];
        assert!(blocks.iter().all(|block| (block.0 as usize + 1) * block_elements <= cache.len()), "a block outside");
        work += slice.tokens.len() * end * width;
    }
    let shared = work >= WORTH_SHARING;
    let batch = Batch { isa: how.isa, q, cache, slices: batch, sizes };
    match how.rows {
        Rows::Few => decode::attend(&batch, shared, out, &mut scratch.decode),
        Rows::Many => prefill::attend::<T, O>(&batch, shared, out, &mut scratch.prefill),
    }
}

/// What attention is computed of. [`attend`] has checked that blocks are in the cache.
struct Batch<'a, T> {
    isa: Isa,
    q: &'a [f32],
    cache: &'a [T],
    slices: &'a [SequenceSlice<'a>],
    sizes: Heads,
}
