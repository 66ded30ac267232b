//! The paged KV cache in host memory: one allocation per layer, `[blocks, K|V, kv_heads, 16, head_dim]`.
//!
//! Engine and transport share the cache. Each layer has its own lock, held for one operation. The block pool decides
//! which blocks each side may access.

use std::io;

use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};
use overfill_kv::{
    BlockId, KvDtype, KvMemory, KvStore, StoreError,
    store::{HostRegion, KvRegion, blocks_in, blocks_in_mut, check_range},
};
use parking_lot::RwLock;

use super::kernels::{
    attention::{AttentionScratch, Scoring, attend},
    element::Element,
    memory::LargePages,
    packed::Arithmetic,
    scatter::scatter,
};
use crate::{SequenceSlice, batch::Slot, config::Heads};

/// The KV of all layers of one model on one node.
pub(crate) struct CpuKv {
    layers: Vec<RwLock<LargePages>>,
    num_blocks: usize,
    sizes: Heads,
    dtype: KvDtype,
}

impl CpuKv {
    /// An empty cache of `num_blocks` blocks.
    pub(crate) fn new(layers: usize, num_blocks: usize, sizes: Heads, dtype: KvDtype) -> io::Result<Self> {
        let bytes = num_blocks * sizes.block_elements() * dtype.size_bytes();
        let layers = (0..layers).map(|_| LargePages::zeroed(bytes).map(RwLock::new)).collect::<io::Result<_>>()?;
        Ok(Self { layers, num_blocks, sizes, dtype })
    }

    /// Writes the keys and values of new tokens into their slots. `qkv` is `[n, heads + 2 kv_heads, head_dim]`.
    pub(crate) fn put(&self, layer: usize, slots: &[Slot], qkv: &[f32]) {
        fn put<T: Element>(cache: &mut [T], slots: &[Slot], qkv: &[f32], sizes: Heads) {
            let Heads { heads, kv_heads, head_dim } = sizes;
            for (slot, row) in slots.iter().zip(qkv.chunks_exact((heads + 2 * kv_heads) * head_dim)) {
                let (k, v) = row[heads * head_dim..].split_at(kv_heads * head_dim);
                scatter(cache, *slot, 0, k, head_dim);
                scatter(cache, *slot, 1, v, head_dim);
            }
        }
        let cache = &mut **self.layers[layer].write();
        match self.dtype {
            KvDtype::F32 => put::<f32>(cast_slice_mut(cache), slots, qkv, self.sizes),
            KvDtype::Bf16 => put::<bf16>(cast_slice_mut(cache), slots, qkv, self.sizes),
            KvDtype::F16 => put::<f16>(cast_slice_mut(cache), slots, qkv, self.sizes),
            KvDtype::Fp8 => unreachable!("the CPU engine refuses fp8"),
        }
    }

    /// Causal attention of a batch's queries over the keys and values in its blocks. `q` and `out` are
    /// `[n, heads, head_dim]`.
    #[allow(clippy::too_many_arguments, reason = "they are buffers of one step")]
    pub(crate) fn attend(
        &self,
        how: Arithmetic,
        layer: usize,
        batch: &[SequenceSlice<'_>],
        scoring: Scoring,
        q: &[f32],
        out: &mut [f32],
        scratch: &mut AttentionScratch,
    ) {
        let cache = &**self.layers[layer].read();
        match self.dtype {
            KvDtype::F32 => attend::<f32, f32>(how, q, cast_slice(cache), batch, self.sizes, scoring, out, scratch),
            KvDtype::Bf16 if how.isa.traits().fast_bf16 => {
                attend::<bf16, bf16>(how, q, cast_slice(cache), batch, self.sizes, scoring, out, scratch);
            }
            KvDtype::Bf16 => attend::<bf16, f32>(how, q, cast_slice(cache), batch, self.sizes, scoring, out, scratch),
            KvDtype::F16 => attend::<f16, f32>(how, q, cast_slice(cache), batch, self.sizes, scoring, out, scratch),
            KvDtype::Fp8 => unreachable!("the CPU engine refuses fp8"),
        }
    }
}

impl KvStore for CpuKv {
    fn num_layers(&self) -> usize {
        self.layers.len()
    }

    fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    fn block_bytes(&self) -> usize {
        self.sizes.block_elements() * self.dtype.size_bytes()
    }

    fn memory(&self) -> KvMemory {
        KvMemory::Host
    }

    #[allow(unsafe_code)]
    fn regions(&self) -> Option<Vec<KvRegion>> {
        let region = |layer: &RwLock<LargePages>| {
            let mut memory = layer.write();
            // SAFETY: the memory is a mapping that lives as long as this store and does not move. Engine and transport
            // access only blocks that the block pool has given them.
            KvRegion::Host(unsafe { HostRegion::new(memory.as_mut_ptr(), memory.len()) })
        };
        Some(self.layers.iter().map(region).collect())
    }

    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        let memory = self.layers[layer].read();
        for (i, block) in blocks.iter().enumerate() {
            f(i, &memory[block.0 as usize * self.block_bytes()..][..self.block_bytes()]);
        }
        Ok(())
    }

    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        let mut memory = self.layers[layer].write();
        for (i, block) in blocks.iter().enumerate() {
            f(i, &mut memory[block.0 as usize * self.block_bytes()..][..self.block_bytes()]);
        }
        Ok(())
    }

    fn view(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(&[&[u8]])) -> Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        let memory = self.layers[layer].read();
        let places = blocks_in(&memory, self.block_bytes(), blocks);
        // `check_range` has passed, so all blocks exist.
        f(&places.unwrap_or_default());
        Ok(())
    }

    fn edit(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(&mut [&mut [u8]])) -> Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        let mut memory = self.layers[layer].write();
        f(&mut blocks_in_mut(&mut memory, self.block_bytes(), blocks).ok_or(StoreError::Repeated)?);
        Ok(())
    }
}
