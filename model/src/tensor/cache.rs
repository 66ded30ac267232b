//! The paged KV cache in tensors: one per layer, `[blocks, K|V, kv_heads, 16, head_dim]`.

use bytemuck::cast_slice;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use overfill_kv::{BLOCK_TOKENS, BlockId, KvDtype, KvMemory, KvStore, StoreError, store::check_range};

use crate::{LayerSpec, SequenceSlice, batch::Slot, config::Heads, error::plain, tensor::soft_cap};

/// The KV of all layers of one model on one device. Each tensor has its own lock.
pub(crate) struct TensorKv {
    layers: Vec<Tensor>,
    num_blocks: usize,
    sizes: Heads,
    dtype: KvDtype,
}

impl TensorKv {
    /// An empty cache of `num_blocks` blocks.
    pub(crate) fn new(layers: usize, num_blocks: usize, sizes: Heads, dtype: KvDtype, device: &Device) -> Result<Self> {
        let shape = (num_blocks, 2, sizes.kv_heads, BLOCK_TOKENS, sizes.head_dim);
        let element = match dtype {
            KvDtype::F32 => DType::F32,
            KvDtype::Bf16 => DType::BF16,
            KvDtype::F16 => DType::F16,
            KvDtype::Fp8 => DType::F8E4M3,
        };
        let layers = (0..layers).map(|_| Tensor::zeros(shape, element, device)).collect::<Result<_>>()?;
        Ok(Self { layers, num_blocks, sizes, dtype })
    }

    /// Writes the keys and values of new tokens into their slots. `k` and `v` are `[n, kv_heads, head_dim]`.
    pub(crate) fn put(&self, layer: usize, slots: &[Slot], k: &Tensor, v: &Tensor) -> Result<()> {
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

    /// Causal attention of a batch's queries `[n, heads, head_dim]`. It gathers each sequence's blocks, then
    /// multiplies.
    pub(crate) fn attend(
        &self,
        layer: usize,
        spec: &LayerSpec,
        batch: &[SequenceSlice<'_>],
        q: &Tensor,
    ) -> Result<Tensor> {
        let Heads { heads, kv_heads, head_dim } = self.sizes;
        let group = heads / kv_heads;
        let cache = &self.layers[layer];
        let mut row = 0;
        let mut outputs = Vec::with_capacity(batch.len());
        for slice in batch {
            let (tokens, context) = (slice.tokens.len(), slice.start + slice.tokens.len());
            // Blocks that no query attends to may hold anything: a weight of 0 times NaN is NaN.
            let before = spec.first_visible(slice.start) / BLOCK_TOKENS;
            let blocks = &slice.blocks[before..context.div_ceil(BLOCK_TOKENS)];
            let (count, first) = (blocks.len(), before * BLOCK_TOKENS);
            let (blocks, keys) = (blocks.iter().map(|b| b.0).collect::<Vec<_>>(), context - first);
            let gathered =
                cache.index_select(&Tensor::from_vec(blocks, count, cache.device())?, 0)?.to_dtype(q.dtype())?;
            // [blocks, kv_heads, 16, d] to [kv_heads, keys, d]
            let part = |kv: usize| {
                gathered
                    .narrow(1, kv, 1)?
                    .squeeze(1)?
                    .transpose(0, 1)?
                    .reshape((kv_heads, count * BLOCK_TOKENS, head_dim))?
                    .narrow(1, 0, keys)?
                    .contiguous()
            };
            let (k, v) = (part(0)?, part(1)?);
            let queries = q.narrow(0, row, tokens)?.transpose(0, 1)?.contiguous()?.reshape((
                kv_heads,
                group * tokens,
                head_dim,
            ))?;
            let scores = (queries.matmul(&k.t()?)? * (1.0 / (head_dim as f64).sqrt()))?.to_dtype(DType::F32)?;
            let scores = match spec.score_cap {
                Some(cap) => soft_cap(&scores, cap)?,
                None => scores,
            };
            let seen = |position: usize| spec.first_visible(position)..=position;
            let mask: Vec<f32> = (slice.start..context)
                .flat_map(|t| (first..context).map(move |c| if seen(t).contains(&c) { 0.0 } else { f32::NEG_INFINITY }))
                .collect();
            let mask = Tensor::from_vec(mask, (1, 1, tokens, keys), cache.device())?;
            let scores = scores.reshape((kv_heads, group, tokens, keys))?.broadcast_add(&mask)?;
            let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(q.dtype())?;
            let out = weights.reshape((kv_heads, group * tokens, keys))?.matmul(&v)?;
            outputs.push(out.reshape((heads, tokens, head_dim))?.transpose(0, 1)?.contiguous()?);
            row += tokens;
        }
        Tensor::cat(&outputs, 0)
    }
}

/// Calls `f` with the bytes of a contiguous tensor in host memory.
fn with_bytes(tensor: &Tensor, f: &mut dyn FnMut(&[u8])) -> Result<()> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("the tensor is not in host memory") };
    let elements = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
    match storage {
        CpuStorage::F32(v) => f(cast_slice(&v[elements])),
        CpuStorage::BF16(v) => f(cast_slice(&v[elements])),
        CpuStorage::F16(v) => f(cast_slice(&v[elements])),
        _ => bail!("kv must be f32, bf16 or f16"),
    }
    Ok(())
}

fn fault(error: candle_core::Error) -> StoreError {
    StoreError::Device(plain(error).to_string())
}

impl KvStore for TensorKv {
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
        KvMemory::Device
    }

    fn read(
        &self,
        layer: usize,
        blocks: &[BlockId],
        f: &mut dyn FnMut(usize, &[u8]),
    ) -> std::result::Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        for (i, block) in blocks.iter().enumerate() {
            let cache = &self.layers[layer];
            let copied = cache.narrow(0, block.0 as usize, 1).and_then(|t| t.to_device(&Device::Cpu)).map_err(fault)?;
            with_bytes(&copied, &mut |bytes| f(i, bytes)).map_err(fault)?;
        }
        Ok(())
    }

    fn write(
        &self,
        layer: usize,
        blocks: &[BlockId],
        f: &mut dyn FnMut(usize, &mut [u8]),
    ) -> std::result::Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        let cache = &self.layers[layer];
        let shape = [1, 2, self.sizes.kv_heads, BLOCK_TOKENS, self.sizes.head_dim];
        let mut bytes = vec![0; self.block_bytes()];
        for (i, block) in blocks.iter().enumerate() {
            f(i, &mut bytes);
            Tensor::from_raw_buffer(&bytes, cache.dtype(), &shape, cache.device())
                .and_then(|t| cache.slice_set(&t, 0, block.0 as usize))
                .map_err(fault)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CpuKv;

    /// A handoff copies blocks out of and into device memory, byte for byte.
    #[test]
    fn blocks_travel_between_host_and_device_memory() {
        let sizes = Heads { heads: 4, kv_heads: 2, head_dim: 6 };
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16] {
            let host = CpuKv::new(2, 5, sizes, dtype).unwrap();
            let device = TensorKv::new(2, 4, sizes, dtype, &Device::Cpu).unwrap();
            let (from, to) = ([BlockId(4), BlockId(1)], [BlockId(0), BlockId(3)]);
            // Bit patterns that are valid in every float type.
            let pattern = |i: usize, byte: usize| (i * 31 + byte * 7 % 60) as u8 & 0x3f;
            for layer in 0..2 {
                let mut fill = |i: usize, bytes: &mut [u8]| {
                    bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = pattern(i + layer, at));
                };
                host.write(layer, &from, &mut fill).unwrap();
                let mut copied = Vec::new();
                host.read(layer, &from, &mut |_, bytes| copied.push(bytes.to_vec())).unwrap();
                device.write(layer, &to, &mut |i, bytes| bytes.copy_from_slice(&copied[i])).unwrap();
                let mut seen = 0;
                device
                    .read(layer, &to, &mut |i, bytes| {
                        seen += 1;
                        let expected: Vec<u8> = (0..bytes.len()).map(|at| pattern(i + layer, at)).collect();
                        assert_eq!(bytes, expected, "{dtype} layer {layer} block {i}");
                    })
                    .unwrap();
                assert_eq!(seen, 2);
                assert!(device.view(layer, &to, &mut |_| panic!("there is nothing to view")).is_err());
            }
            assert!(host.read(2, &from, &mut |_, _| ()).is_err());
            assert!(device.write(0, &[BlockId(4)], &mut |_, _| ()).is_err());
        }
    }
}
