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
    /// Where the blocks are.
    fn memory(&self) -> KvMemory;
    /// Calls `f` with the bytes of each block in turn. The store may be locked meanwhile: `f` must not block.
    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError>;
    /// Calls `f` with each block's bytes, all to be overwritten. The store may be locked meanwhile: `f` must not block.
    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError>;

    /// As [`Self::read`], but calls `f` once, with all blocks in place. Only where [`Self::memory`] is [`KvMemory::Host`].
    fn view(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(&[&[u8]])) -> Result<(), StoreError> {
        let _ = (layer, blocks, f);
        Err(StoreError::NotInHostMemory)
    }

    /// As [`Self::view`], to write: what `f` leaves alone stays as it is. `blocks` must be distinct.
    fn edit(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(&mut [&mut [u8]])) -> Result<(), StoreError> {
        let _ = (layer, blocks, f);
        Err(StoreError::NotInHostMemory)
    }
}

/// Where a store keeps its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvMemory {
    /// In this process's memory: [`KvStore::view`] and [`KvStore::edit`] give its bytes in place.
    Host,
    /// On a device: each read and write is a copy.
    Device,
}

/// Refuses a layer or block that the store does not have.
pub fn check_range(store: &dyn KvStore, layer: usize, blocks: &[BlockId]) -> Result<(), StoreError> {
    let (num_layers, num_blocks) = (store.num_layers(), store.num_blocks());
    let outside = blocks.iter().find(|block| block.0 as usize >= num_blocks);
    match outside.or((layer >= num_layers).then_some(&BlockId(0))) {
        Some(block) => Err(StoreError::OutOfRange { layer, block: block.0, num_layers, num_blocks }),
        None => Ok(()),
    }
}

/// The places of `blocks` in `memory`, a layer of blocks of `block_bytes`; `None` if one is outside.
pub fn blocks_in<'a>(memory: &'a [u8], block_bytes: usize, blocks: &[BlockId]) -> Option<Vec<&'a [u8]>> {
    blocks.iter().map(|b| memory.get(b.0 as usize * block_bytes..)?.get(..block_bytes)).collect()
}

/// As [`blocks_in`], to write; `None` also if a block is named twice. O(n log n) in the number of blocks.
pub fn blocks_in_mut<'a>(
    mut memory: &'a mut [u8],
    block_bytes: usize,
    blocks: &[BlockId],
) -> Option<Vec<&'a mut [u8]>> {
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_unstable_by_key(|i| blocks[*i]);
    let mut places: Vec<Option<&'a mut [u8]>> = blocks.iter().map(|_| None).collect();
    let mut passed = 0;
    for i in order {
        let skip = (blocks[i].0 as usize * block_bytes).checked_sub(passed)?;
        let (place, rest) = memory.split_at_mut_checked(skip)?.1.split_at_mut_checked(block_bytes)?;
        places[i] = Some(place);
        memory = rest;
        passed += skip + block_bytes;
    }
    places.into_iter().collect()
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
    /// The caller's mistake: only host memory can be seen in place.
    #[error("kv memory is on a device and can't be read in place")]
    NotInHostMemory,
    /// The caller's mistake: a block can't be written in two places at once.
    #[error("a kv block is named twice in one write")]
    Repeated,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_in_the_order_asked_for() {
        let mut memory: Vec<u8> = (0..12).collect();
        let ids = [3, 0, 2].map(BlockId);
        assert_eq!(blocks_in(&memory, 3, &ids).unwrap(), [&[9, 10, 11], &[0, 1, 2], &[6, 7, 8]]);
        let places = blocks_in_mut(&mut memory, 3, &ids).unwrap();
        assert_eq!(places, [&[9, 10, 11], &[0, 1, 2], &[6, 7, 8]]);
    }

    #[test]
    fn blocks_outside_or_twice_are_none() {
        let mut memory = vec![0; 12];
        assert!(blocks_in(&memory, 3, &[BlockId(4)]).is_none());
        assert!(blocks_in_mut(&mut memory, 3, &[BlockId(4)]).is_none());
        assert!(blocks_in_mut(&mut memory, 3, &[BlockId(1), BlockId(1)]).is_none());
    }
}
