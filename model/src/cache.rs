//! The paged KV cache: one tensor a layer, `[blocks, K|V, kv_heads, 16, head_dim]`. What a handoff sends is what lies here.
//!
//! Engine and transport share the cache. Each layer has a lock of its own (the tensor's), held for one operation; which
//! blocks either may touch is settled by the block pool.

use std::{cell::RefCell, sync::Arc};

use bytemuck::{cast_slice, cast_slice_mut};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use overfill_kv::store::{blocks_in, blocks_in_mut};
use overfill_kv::{BLOCK_TOKENS, BlockId, KvDtype, KvStore, StoreError};

use crate::{
    kernels::{
        attention::{self, AttentionScratch, Heads},
        element::Element,
        scatter::{Slot, scatter},
        simd::Isa,
    },
    paged::SequenceSlice,
};

/// KV of all layers of one model on one node. Cheap to clone: clones share the memory.
#[derive(Clone)]
pub struct KvCache {
    layers: Arc<Vec<Tensor>>,
    num_blocks: usize,
    sizes: Heads,
    dtype: KvDtype,
}

fn tensor_dtype(dtype: KvDtype) -> DType {
    match dtype {
        KvDtype::F32 => DType::F32,
        KvDtype::Bf16 => DType::BF16,
        KvDtype::F16 => DType::F16,
    }
}

impl KvCache {
    pub(crate) fn new(layers: usize, num_blocks: usize, sizes: Heads, dtype: KvDtype, device: &Device) -> Result<Self> {
        let shape = (num_blocks, 2, sizes.kv_heads, BLOCK_TOKENS, sizes.head_dim);
        let layers = (0..layers).map(|_| Tensor::zeros(shape, tensor_dtype(dtype), device)).collect::<Result<_>>()?;
        Ok(Self { layers: Arc::new(layers), num_blocks, sizes, dtype })
    }

    /// Bytes of the whole cache.
    pub fn size_bytes(&self) -> usize {
        self.layers.len() * self.num_blocks * self.block_bytes()
    }

    /// Writes the keys and values of new tokens into their slots, on the CPU. `qkv` is `[n, heads + 2 kv_heads, head_dim]`.
    pub(crate) fn put(&self, layer: usize, slots: &[Slot], qkv: &[f32]) -> Result<()> {
        fn put<T: Element>(cache: &mut [T], slots: &[Slot], qkv: &[f32], sizes: Heads) {
            let Heads { heads, kv_heads, head_dim } = sizes;
            for (slot, row) in slots.iter().zip(qkv.chunks_exact((heads + 2 * kv_heads) * head_dim)) {
                let (k, v) = row[heads * head_dim..].split_at(kv_heads * head_dim);
                scatter(cache, *slot, 0, k, head_dim);
                scatter(cache, *slot, 1, v, head_dim);
            }
        }
        let sizes = self.sizes;
        let mut all = |storage: &mut CpuStorage| match storage {
            CpuStorage::F32(cache) => put(cache, slots, qkv, sizes),
            CpuStorage::BF16(cache) => put(cache, slots, qkv, sizes),
            CpuStorage::F16(cache) => put(cache, slots, qkv, sizes),
            _ => {}
        };
        self.layers[layer].inplace_op1(&WithStorage(RefCell::new(&mut all)))
    }

    /// Causal attention of a batch's queries over the keys and values in its blocks, on the CPU. `q` and `out` are
    /// `[n, heads, head_dim]`.
    pub(crate) fn attend(
        &self,
        isa: Isa,
        layer: usize,
        batch: &[SequenceSlice<'_>],
        q: &[f32],
        out: &mut [f32],
        scratch: &mut AttentionScratch,
    ) -> Result<()> {
        let (storage, _) = self.layers[layer].storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(cache)) => attention::attend(isa, q, cache, batch, self.sizes, out, scratch),
            Storage::Cpu(CpuStorage::BF16(cache)) => attention::attend(isa, q, cache, batch, self.sizes, out, scratch),
            Storage::Cpu(CpuStorage::F16(cache)) => attention::attend(isa, q, cache, batch, self.sizes, out, scratch),
            _ => bail!("kv must be f32, bf16 or f16 on the CPU"),
        }
        Ok(())
    }

    /// As [`Self::put`], with tensor operations alone, for devices without a kernel of ours. `k` and `v` are
    /// `[n, kv_heads, head_dim]`.
    pub(crate) fn put_with_tensors(&self, layer: usize, slots: &[Slot], k: &Tensor, v: &Tensor) -> Result<()> {
        let Heads { kv_heads, head_dim, .. } = self.sizes;
        let cache = &self.layers[layer];
        let rows = cache.reshape(((), head_dim))?;
        for (part, source) in [k, v].into_iter().enumerate() {
            let index: Vec<u32> = slots
                .iter()
                .flat_map(|slot| {
                    (0..kv_heads).map(move |head| {
                        (((slot.block as usize * 2 + part) * kv_heads + head) * BLOCK_TOKENS) as u32 + slot.token
                    })
                })
                .collect();
            let count = index.len();
            let index =
                Tensor::from_vec(index, (count, 1), cache.device())?.broadcast_as((count, head_dim))?.contiguous()?;
            let source = source.reshape((count, head_dim))?.to_dtype(cache.dtype())?.contiguous()?;
            rows.scatter_set(&index, &source, 0)?;
        }
        Ok(())
    }

    /// As [`Self::attend`], with tensor operations alone: gathers each sequence's blocks, then multiplies.
    pub(crate) fn attend_with_tensors(&self, layer: usize, batch: &[SequenceSlice<'_>], q: &Tensor) -> Result<Tensor> {
        let Heads { heads, kv_heads, head_dim } = self.sizes;
        let group = heads / kv_heads;
        let cache = &self.layers[layer];
        let mut row = 0;
        let mut outputs = Vec::with_capacity(batch.len());
        for slice in batch {
            let (tokens, context) = (slice.tokens.len(), slice.start + slice.tokens.len());
            let blocks: Vec<u32> = slice.blocks[..context.div_ceil(BLOCK_TOKENS)].iter().map(|b| b.0).collect();
            let count = blocks.len();
            let gathered =
                cache.index_select(&Tensor::from_vec(blocks, count, cache.device())?, 0)?.to_dtype(q.dtype())?;
            // [blocks, kv_heads, 16, d] to [kv_heads, context, d]
            let part = |kv: usize| {
                gathered
                    .narrow(1, kv, 1)?
                    .squeeze(1)?
                    .transpose(0, 1)?
                    .reshape((kv_heads, count * BLOCK_TOKENS, head_dim))?
                    .narrow(1, 0, context)?
                    .contiguous()
            };
            let (k, v) = (part(0)?, part(1)?);
            let queries = q.narrow(0, row, tokens)?.transpose(0, 1)?.contiguous()?.reshape((
                kv_heads,
                group * tokens,
                head_dim,
            ))?;
            let scores = (queries.matmul(&k.t()?)? * (1.0 / (head_dim as f64).sqrt()))?.to_dtype(DType::F32)?;
            let mask: Vec<f32> = (0..tokens)
                .flat_map(|t| (0..context).map(move |c| if c <= slice.start + t { 0.0 } else { f32::NEG_INFINITY }))
                .collect();
            let mask = Tensor::from_vec(mask, (1, 1, tokens, context), cache.device())?;
            let scores = scores.reshape((kv_heads, group, tokens, context))?.broadcast_add(&mask)?;
            let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(q.dtype())?;
            let out = weights.reshape((kv_heads, group * tokens, context))?.matmul(&v)?;
            outputs.push(out.reshape((heads, tokens, head_dim))?.transpose(0, 1)?.contiguous()?);
            row += tokens;
        }
        Tensor::cat(&outputs, 0)
    }

    fn check(&self, layer: usize, blocks: &[BlockId]) -> std::result::Result<(), StoreError> {
        let (num_layers, num_blocks) = (self.layers.len(), self.num_blocks);
        let outside = blocks.iter().find(|b| b.0 as usize >= num_blocks);
        match outside.or((layer >= num_layers).then_some(&BlockId(0))) {
            Some(block) => Err(StoreError::OutOfRange { layer, block: block.0, num_layers, num_blocks }),
            None => Ok(()),
        }
    }
}

fn bytes_of(storage: &CpuStorage) -> Result<&[u8]> {
    match storage {
        CpuStorage::F32(v) => Ok(cast_slice(v)),
        CpuStorage::BF16(v) => Ok(cast_slice(v)),
        CpuStorage::F16(v) => Ok(cast_slice(v)),
        _ => bail!("kv must be f32, bf16 or f16"),
    }
}

fn bytes_of_mut(storage: &mut CpuStorage) -> Result<&mut [u8]> {
    match storage {
        CpuStorage::F32(v) => Ok(cast_slice_mut(v)),
        CpuStorage::BF16(v) => Ok(cast_slice_mut(v)),
        CpuStorage::F16(v) => Ok(cast_slice_mut(v)),
        _ => bail!("kv must be f32, bf16 or f16"),
    }
}

/// Hands a layer's storage to a closure, under the tensor's write lock.
struct WithStorage<'a>(RefCell<&'a mut dyn FnMut(&mut CpuStorage)>);

impl InplaceOp1 for WithStorage<'_> {
    fn name(&self) -> &'static str {
        "with-storage"
    }
    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        (self.0.borrow_mut())(storage);
        Ok(())
    }
}

/// Hands a CPU tensor's bytes to a closure, under its write lock.
fn with_bytes(tensor: &Tensor, f: &mut dyn FnMut(&mut [u8])) -> Result<()> {
    let mut result = Ok(());
    let mut all = |storage: &mut CpuStorage| result = bytes_of_mut(storage).map(&mut *f);
    tensor.inplace_op1(&WithStorage(RefCell::new(&mut all)))?;
    result
}

impl KvStore for KvCache {
    fn num_layers(&self) -> usize {
        self.layers.len()
    }

    fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    fn block_bytes(&self) -> usize {
        2 * self.sizes.kv_heads * BLOCK_TOKENS * self.sizes.head_dim * self.dtype.size_bytes()
    }

    fn read(
        &self,
        layer: usize,
        blocks: &[BlockId],
        f: &mut dyn FnMut(usize, &[u8]),
    ) -> std::result::Result<(), StoreError> {
        if self.view(layer, blocks, &mut |all| all.iter().enumerate().for_each(|(i, bytes)| f(i, bytes)))? {
            return Ok(());
        }
        let size = self.block_bytes();
        let fault = |e: candle_core::Error| StoreError::Device(e.to_string());
        let cache = &self.layers[layer];
        for (i, block) in blocks.iter().enumerate() {
            let copied = cache.narrow(0, block.0 as usize, 1).and_then(|t| t.to_device(&Device::Cpu)).map_err(fault)?;
            let (storage, layout) = copied.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { return Err(StoreError::Device("not CPU memory".into())) };
            let start = layout.start_offset() * self.dtype.size_bytes();
            f(i, &bytes_of(storage).map_err(fault)?[start..][..size]);
        }
        Ok(())
    }

    fn write(
        &self,
        layer: usize,
        blocks: &[BlockId],
        f: &mut dyn FnMut(usize, &mut [u8]),
    ) -> std::result::Result<(), StoreError> {
        if self.edit(layer, blocks, &mut |all| all.iter_mut().enumerate().for_each(|(i, bytes)| f(i, bytes)))? {
            return Ok(());
        }
        let fault = |e: candle_core::Error| StoreError::Device(e.to_string());
        let cache = &self.layers[layer];
        for (i, block) in blocks.iter().enumerate() {
            let shape = (1, 2, self.sizes.kv_heads, BLOCK_TOKENS, self.sizes.head_dim);
            let staged = Tensor::zeros(shape, cache.dtype(), &Device::Cpu).map_err(fault)?;
            with_bytes(&staged, &mut |bytes| f(i, bytes)).map_err(fault)?;
            staged.to_device(cache.device()).and_then(|t| cache.slice_set(&t, 0, block.0 as usize)).map_err(fault)?;
        }
        Ok(())
    }

    fn view(
        &self,
        layer: usize,
        blocks: &[BlockId],
        f: &mut dyn FnMut(&[&[u8]]),
    ) -> std::result::Result<bool, StoreError> {
        self.check(layer, blocks)?;
        let (storage, _) = self.layers[layer].storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { return Ok(false) };
        let bytes = bytes_of(storage).map_err(|e| StoreError::Device(e.to_string()))?;
        let places = blocks_in(bytes, self.block_bytes(), blocks);
        places.as_deref().map(f);
        Ok(places.is_some())
    }

    fn edit(
        &self,
        layer: usize,
        blocks: &[BlockId],
        f: &mut dyn FnMut(&mut [&mut [u8]]),
    ) -> std::result::Result<bool, StoreError> {
        self.check(layer, blocks)?;
        let cache = &self.layers[layer];
        if !cache.device().is_cpu() {
            return Ok(false);
        }
        let (size, mut done) = (self.block_bytes(), false);
        let mut all = |bytes: &mut [u8]| {
            let mut places = blocks_in_mut(bytes, size, blocks);
            places.as_deref_mut().map(&mut *f);
            done = places.is_some();
        };
        with_bytes(cache, &mut all).map_err(|e| StoreError::Device(e.to_string()))?;
        Ok(done)
    }
}
