//! Where KV bytes live, as the transport sees it.

use crate::BlockId;

/// Memory that holds KV blocks. Implemented by the model's cache, and by plain memory in tests and benches.
///
/// `layer` counts the layers of this store from 0. A block of a layer is `block_bytes` long.
pub trait KvStore: Send + Sync {
    /// Layers held.
    fn num_layers(&self) -> usize;
    /// Blocks per layer.
    fn num_blocks(&self) -> usize;
    /// Bytes of one layer of one block.
    fn block_bytes(&self) -> usize;
    /// Calls `f` with the bytes of each block in turn. The store may be locked meanwhile: `f` must not block.
    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError>;
    /// Calls `f` with each block's bytes to be overwritten. The store may be locked meanwhile: `f` must not block.
    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError>;
}

/// A store that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The caller's mistake.
    #[error("layer {layer} or block {block} is outside the store ({num_layers} layers, {num_blocks} blocks)")]
    OutOfRange {
        /// As asked.
        layer: usize,
        /// As asked.
        block: u32,
        /// Layers there are.
        num_layers: usize,
        /// Blocks there are.
        num_blocks: usize,
    },
    /// The device's.
    #[error("kv memory: {0}")]
    Device(String),
}
