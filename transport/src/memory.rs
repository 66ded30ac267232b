//! KV store in host memory.

use overfill_kv::store::{HostRegion, KvRegion, blocks_in, blocks_in_mut, check_range};
use overfill_kv::{BlockId, KvMemory, KvStore, StoreError};
use parking_lot::RwLock;

/// A [`KvStore`] in host memory without a model, for tests and benchmarks of the transport.
pub struct MemoryStore {
    /// Per layer, `[num_blocks][block_bytes]`.
    layers: Vec<RwLock<Vec<u8>>>,
    num_blocks: usize,
    block_bytes: usize,
}

impl MemoryStore {
    /// A store filled with zeros.
    pub fn new(num_layers: usize, num_blocks: usize, block_bytes: usize) -> Self {
        let layers = (0..num_layers).map(|_| RwLock::new(vec![0; num_blocks * block_bytes])).collect();
        Self { layers, num_blocks, block_bytes }
    }
}

impl KvStore for MemoryStore {
    fn num_layers(&self) -> usize {
        self.layers.len()
    }

    fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn memory(&self) -> KvMemory {
        KvMemory::Host
    }

    #[allow(unsafe_code)]
    fn regions(&self) -> Option<Vec<KvRegion>> {
        let region = |layer: &RwLock<Vec<u8>>| {
            let mut memory = layer.write();
            // SAFETY: the memory of a layer is allocated once. Users of the store access only blocks that are theirs.
            KvRegion::Host(unsafe { HostRegion::new(memory.as_mut_ptr(), memory.len()) })
        };
        Some(self.layers.iter().map(region).collect())
    }

    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
        self.view(layer, blocks, &mut |all| all.iter().enumerate().for_each(|(i, bytes)| f(i, bytes)))
    }

    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
        self.edit(layer, blocks, &mut |all| all.iter_mut().enumerate().for_each(|(i, bytes)| f(i, bytes)))
    }

    fn view(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(&[&[u8]])) -> Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        let places = self.layers[layer].read();
        let places = blocks_in(&places, self.block_bytes, blocks);
        // Never `None`: the range was checked above.
        f(&places.unwrap_or_default());
        Ok(())
    }

    fn edit(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(&mut [&mut [u8]])) -> Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        let mut memory = self.layers[layer].write();
        f(&mut blocks_in_mut(&mut memory, self.block_bytes, blocks).ok_or(StoreError::Repeated)?);
        Ok(())
    }
}
