//! KV in plain memory.

use overfill_kv::{BlockId, KvStore, StoreError};
use parking_lot::RwLock;

/// A [`KvStore`] in plain memory, without a model: for tests and for measuring the transport itself.
pub struct MemoryStore {
    /// Per layer, `[num_blocks][block_bytes]`.
    layers: Vec<RwLock<Vec<u8>>>,
    num_blocks: usize,
    block_bytes: usize,
}

impl MemoryStore {
    /// All zero.
    pub fn new(num_layers: usize, num_blocks: usize, block_bytes: usize) -> Self {
        let layers = (0..num_layers).map(|_| RwLock::new(vec![0; num_blocks * block_bytes])).collect();
        Self { layers, num_blocks, block_bytes }
    }

    /// The layers' memory itself, to be given back with [`Self::put`].
    pub(crate) fn take(&self) -> Vec<Vec<u8>> {
        self.layers.iter().map(|layer| std::mem::take(&mut *layer.write())).collect()
    }

    pub(crate) fn put(&self, layers: Vec<Vec<u8>>) {
        for (slot, layer) in self.layers.iter().zip(layers) {
            *slot.write() = layer;
        }
    }

    /// As [`KvStore::read`], of blocks that the caller knows to exist.
    pub fn view(&self, layer: usize, blocks: &[BlockId], mut f: impl FnMut(usize, &[u8])) {
        let memory = self.layers[layer].read();
        for (i, block) in blocks.iter().enumerate() {
            f(i, &memory[self.place(*block)]);
        }
    }

    /// As [`KvStore::write`], of blocks that the caller knows to exist.
    pub fn edit(&self, layer: usize, blocks: &[BlockId], mut f: impl FnMut(usize, &mut [u8])) {
        let mut memory = self.layers[layer].write();
        for (i, block) in blocks.iter().enumerate() {
            f(i, &mut memory[self.place(*block)]);
        }
    }

    fn place(&self, block: BlockId) -> std::ops::Range<usize> {
        let at = block.0 as usize * self.block_bytes;
        at..at + self.block_bytes
    }

    fn check(&self, layer: usize, blocks: &[BlockId]) -> Result<(), StoreError> {
        let bad = blocks.iter().find(|b| b.0 as usize >= self.num_blocks);
        match (self.layers.get(layer), bad) {
            (Some(_), None) => Ok(()),
            (_, bad) => Err(StoreError::OutOfRange {
                layer,
                block: bad.map_or(0, |b| b.0),
                num_layers: self.layers.len(),
                num_blocks: self.num_blocks,
            }),
        }
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

    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
        self.check(layer, blocks)?;
        self.view(layer, blocks, f);
        Ok(())
    }

    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
        self.check(layer, blocks)?;
        self.edit(layer, blocks, f);
        Ok(())
    }
}
