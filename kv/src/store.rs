//! Access to KV memory for the transport.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use twox_hash::XxHash3_64;

use crate::BlockId;

/// Memory that holds KV blocks. Implemented by the model's cache, and by plain memory in tests and benchmarks.
///
/// `layer` is the index of a layer in this store, from 0. Each block of a layer has `block_bytes` bytes.
pub trait KvStore: Send + Sync {
    /// Number of layers.
    fn num_layers(&self) -> usize;
    /// Number of blocks per layer.
    fn num_blocks(&self) -> usize;
    /// Size of one block of one layer, in bytes.
    fn block_bytes(&self) -> usize;
    /// Whether the blocks are in host or device memory.
    fn memory(&self) -> KvMemory;
    /// Calls `f` with the position in `blocks` and the bytes of each block, in order. The store may be locked during
    /// the calls, so `f` must not block.
    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError>;
    /// Calls `f` with the position in `blocks` and the memory of each block, in order. `f` must overwrite all bytes.
    /// The store may be locked during the calls, so `f` must not block.
    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError>;

    /// Where the blocks lie, for devices that read and write them without this process: one region per layer, with the
    /// blocks one after the other. `None` if a device can't access them there.
    ///
    /// [`Self::read`] sees what a device has written once the device has reported the write.
    fn regions(&self) -> Option<Vec<KvRegion>> {
        None
    }

    /// Where the blocks lie, if that is the memory of a CUDA device.
    fn gpu(&self) -> Option<GpuMemory> {
        None
    }

    /// XXH3 (64 bits, no seed) of each block, in order. A store whose blocks are on a device computes them there.
    fn block_sums(&self, layer: usize, blocks: &[BlockId]) -> Result<Vec<u64>, StoreError> {
        sums_on_host(self, layer, blocks)
    }

    /// Like [`Self::read`], but calls `f` once with all blocks, without copying. Works only for [`KvMemory::Host`].
    fn view(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(&[&[u8]])) -> Result<(), StoreError> {
        let _ = (layer, blocks, f);
        Err(StoreError::NotInHostMemory)
    }

    /// Like [`Self::view`], for writing. Bytes that `f` does not write keep their value. `blocks` must be distinct.
    fn edit(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(&mut [&mut [u8]])) -> Result<(), StoreError> {
        let _ = (layer, blocks, f);
        Err(StoreError::NotInHostMemory)
    }
}

/// [`KvStore::block_sums`], computed on the host.
pub fn sums_on_host<S: KvStore + ?Sized>(store: &S, layer: usize, blocks: &[BlockId]) -> Result<Vec<u64>, StoreError> {
    let mut sums = Vec::with_capacity(blocks.len());
    store.read(layer, blocks, &mut |_, bytes| sums.push(XxHash3_64::oneshot(bytes)))?;
    Ok(sums)
}

/// Memory of one layer that a device may read and write.
#[derive(Clone, Debug)]
pub enum KvRegion {
    /// In host memory.
    Host(HostRegion),
    /// In the memory of another device, such as a GPU, that exports it.
    DmaBuf(DmaBufRegion),
}

/// Memory of another device, exported as a dma-buf.
#[derive(Clone, Debug)]
pub struct DmaBufRegion {
    buffer: Arc<OwnedFd>,
    offset: u64,
    bytes: usize,
}

impl DmaBufRegion {
    /// The region of `bytes` bytes from `offset` on in the dma-buf `buffer`.
    ///
    /// # Safety
    /// As for [`HostRegion::new`]: the memory stays while the store exists, and only who holds a block's lease accesses it.
    #[allow(unsafe_code)]
    pub unsafe fn new(buffer: Arc<OwnedFd>, offset: u64, bytes: usize) -> Self {
        Self { buffer, offset, bytes }
    }

    /// The dma-buf.
    pub fn buffer(&self) -> &OwnedFd {
        &self.buffer
    }

    /// Offset of the first byte in the dma-buf.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Blocks in the memory of a CUDA device.
#[derive(Clone, Debug)]
pub struct GpuMemory {
    device: usize,
    layers: Vec<u64>,
    layer_bytes: usize,
}

impl GpuMemory {
    /// The memory of CUDA's device `device`: the address of each layer, where its blocks lie one after the other, and the
    /// size of a layer in bytes.
    ///
    /// # Safety
    /// As for [`HostRegion::new`]: the memory stays while the store exists, and only who holds a block's lease accesses it.
    #[allow(unsafe_code)]
    pub unsafe fn new(device: usize, layers: Vec<u64>, layer_bytes: usize) -> Self {
        Self { device, layers, layer_bytes }
    }

    /// CUDA's number of the device.
    pub fn device(&self) -> usize {
        self.device
    }

    /// Address of `bytes` bytes from `offset` on in a layer. `None` if the layer does not have them.
    pub fn address(&self, layer: usize, offset: usize, bytes: usize) -> Option<u64> {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.layer_bytes);
        self.layers.get(layer).filter(|_| inside).map(|start| start + offset as u64)
    }
}

/// Memory of this process.
#[derive(Clone, Copy, Debug)]
pub struct HostRegion {
    address: usize,
    bytes: usize,
}

impl HostRegion {
    /// The region of `bytes` bytes at `start`.
    ///
    /// # Safety
    /// As long as the store exists:
    ///
    /// - The region stays allocated at this address, readable and writable.
    /// - A device may change the bytes of any block that is reserved for a handoff, at any time. So code of this process
    ///   reads or writes the bytes of a block only while it holds the block's lease and no handoff may write to it. (The
    ///   block pool decides that; a reference to a region as a whole may exist, as long as nothing accesses such blocks
    ///   through it.)
    #[allow(unsafe_code)]
    pub unsafe fn new(start: *mut u8, bytes: usize) -> Self {
        // The address leaves the program: what devices do with it, the compiler must take into account.
        Self { address: start.expose_provenance(), bytes }
    }

    /// Address of the first byte.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Kind of memory in which a store keeps its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvMemory {
    /// Host memory of this process. [`KvStore::view`] and [`KvStore::edit`] access it without copying.
    Host,
    /// Device memory. Each read and write is a copy.
    Device,
}

/// Returns [`StoreError::OutOfRange`] if the store does not have the layer or one of the blocks.
pub fn check_range(store: &dyn KvStore, layer: usize, blocks: &[BlockId]) -> Result<(), StoreError> {
    let (num_layers, num_blocks) = (store.num_layers(), store.num_blocks());
    let outside = blocks.iter().find(|block| block.0 as usize >= num_blocks);
    match outside.or((layer >= num_layers).then_some(&BlockId(0))) {
        Some(block) => Err(StoreError::OutOfRange { layer, block: block.0, num_layers, num_blocks }),
        None => Ok(()),
    }
}

/// Slices of `blocks` in `memory`, which holds the blocks of one layer, `block_bytes` bytes each. `None` if a block is
/// outside `memory`.
pub fn blocks_in<'a>(memory: &'a [u8], block_bytes: usize, blocks: &[BlockId]) -> Option<Vec<&'a [u8]>> {
    blocks.iter().map(|b| memory.get(b.0 as usize * block_bytes..)?.get(..block_bytes)).collect()
}

/// Like [`blocks_in`], for writing. Also `None` if a block appears twice. O(n log n) in the number of blocks.
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

/// Why a store could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The caller named a layer or block that does not exist.
    #[error("layer {layer} or block {block} is outside the store ({num_layers} layers, {num_blocks} blocks)")]
    OutOfRange {
        /// Requested layer.
        layer: usize,
        /// Requested block; 0 if only the layer is out of range.
        block: u32,
        /// Number of layers in the store.
        num_layers: usize,
        /// Number of blocks per layer in the store.
        num_blocks: usize,
    },
    /// The device reported an error.
    #[error("kv memory: {0}")]
    Device(String),
    /// The caller used [`KvStore::view`] or [`KvStore::edit`] on device memory.
    #[error("kv memory is on a device and can't be accessed in place")]
    NotInHostMemory,
    /// The caller named a block twice in one [`KvStore::edit`].
    #[error("a kv block appears twice in one write")]
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
