//! Writes new keys and values into their blocks.

use overfill_kv::BLOCK_TOKENS;

use super::element::Element;
use crate::batch::Slot;

/// Writes one token's key (`part` 0) or value (`part` 1), `[kv_heads * head_dim]`, into a cache layer
/// `[blocks, 2, kv_heads, 16, head_dim]`.
pub(crate) fn scatter<T: Element>(cache: &mut [T], slot: Slot, part: usize, values: &[f32], head_dim: usize) {
    let half_block = values.len() * BLOCK_TOKENS;
    let half = &mut cache[(slot.block as usize * 2 + part) * half_block..][..half_block];
    for (head, values) in values.chunks_exact(head_dim).enumerate() {
        let target = &mut half[(head * BLOCK_TOKENS + slot.token as usize) * head_dim..][..head_dim];
        for (to, value) in target.iter_mut().zip(values) {
            *to = T::from_f32(*value);
        }
    }
}
