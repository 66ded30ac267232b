//! Writing new keys and values into their blocks.

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, bail};
use half::{bf16, f16};
use overfill_kv::BLOCK_TOKENS;

use super::element::Element;

/// Writes k and v, each `[n, kv_heads, head_dim]` f32, into a cache layer `[blocks, 2, kv_heads, 16, head_dim]`.
pub(crate) struct ScatterKv<'a> {
    /// For each of the n tokens: its block, and its place in it.
    pub(crate) slots: &'a [(u32, u32)],
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl ScatterKv<'_> {
    fn run<T: Element>(&self, cache: &mut [T], k: &[f32], v: &[f32]) -> Result<()> {
        let row = self.kv_heads * self.head_dim;
        let half_block = self.kv_heads * BLOCK_TOKENS * self.head_dim;
        if k.len() != self.slots.len() * row || v.len() != k.len() {
            bail!("scatter: {} slots, but k and v have {} and {} elements", self.slots.len(), k.len(), v.len());
        }
        for (i, &(block, token)) in self.slots.iter().enumerate() {
            for (part, source) in [k, v].into_iter().enumerate() {
                let source = &source[i * row..][..row];
                let part = &mut cache[(block as usize * 2 + part) * half_block..][..half_block];
                for (head, values) in source.chunks_exact(self.head_dim).enumerate() {
                    let target = &mut part[(head * BLOCK_TOKENS + token as usize) * self.head_dim..][..self.head_dim];
                    for (t, value) in target.iter_mut().zip(values) {
                        *t = T::from_f32(*value);
                    }
                }
            }
        }
        Ok(())
    }
}

/// The elements that `layout`, which must be contiguous, covers.
pub(crate) fn dense<'a, T>(values: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

impl InplaceOp3 for ScatterKv<'_> {
    fn name(&self) -> &'static str {
        "scatter-kv"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        _: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<()> {
        let (CpuStorage::F32(k), CpuStorage::F32(v)) = (k, v) else { bail!("scatter: k and v must be f32") };
        let (k, v) = (dense(k, k_layout)?, dense(v, v_layout)?);
        match cache {
            CpuStorage::F32(cache) => self.run::<f32>(cache, k, v),
            CpuStorage::BF16(cache) => self.run::<bf16>(cache, k, v),
            CpuStorage::F16(cache) => self.run::<f16>(cache, k, v),
            _ => bail!("scatter: kv must be f32, bf16 or f16"),
        }
    }
}
