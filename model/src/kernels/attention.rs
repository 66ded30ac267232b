//! Attention over paged KV on the CPU: block by block with a running softmax (Milakov & Gimelshein, arXiv 1805.02867;
//! Dao et al., arXiv 2205.14135), so that no score matrix exists and each KV byte is read once per tile of queries.
//!
//! A query's arithmetic is the same whatever else is in the batch: blocks are always taken in order, from the first.

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use overfill_kv::{BLOCK_TOKENS, BlockId};
use rayon::prelude::*;

use super::{element::Element, scatter::dense};

/// Query tokens that share one pass over the keys.
const TILE_TOKENS: usize = 16;

/// One sequence's part of a batch.
pub(crate) struct Span<'a> {
    /// Row of its first query in the batch.
    pub(crate) row: usize,
    /// Its queries.
    pub(crate) tokens: usize,
    /// Position of its first query in the sequence.
    pub(crate) start: usize,
    /// The sequence's blocks, from position 0.
    pub(crate) blocks: &'a [BlockId],
}

/// Sizes of heads.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

/// Causal attention of q `[n, heads, head_dim]` f32 over a cache layer `[blocks, 2, kv_heads, 16, head_dim]`; the result has
/// the shape of q.
pub(crate) fn attend(q: &Tensor, cache: &Tensor, spans: &[Span<'_>], sizes: Heads) -> Result<Tensor> {
    let (q_storage, q_layout) = q.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(q_values)) = &*q_storage else { bail!("attention: q must be f32 on the CPU") };
    let q_values = dense(q_values, q_layout)?;
    let (cache_storage, _) = cache.storage_and_layout();
    let out = match &*cache_storage {
        Storage::Cpu(CpuStorage::F32(cache)) => run::<f32>(q_values, cache, spans, sizes),
        Storage::Cpu(CpuStorage::BF16(cache)) => run::<bf16>(q_values, cache, spans, sizes),
        Storage::Cpu(CpuStorage::F16(cache)) => run::<f16>(q_values, cache, spans, sizes),
        _ => bail!("attention: kv must be f32, bf16 or f16 on the CPU"),
    };
    Tensor::from_vec(out, q.dims(), q.device())
}

/// A tile of one span's queries under one KV head: the unit of parallel work.
struct Tile<'a> {
    row: usize,
    tokens: usize,
    start: usize,
    kv_head: usize,
    blocks: &'a [BlockId],
}

fn run<T: Element>(q: &[f32], cache: &[T], spans: &[Span<'_>], sizes: Heads) -> Vec<f32> {
    let Heads { heads, kv_heads, head_dim } = sizes;
    let group = heads / kv_heads;
    let tiles: Vec<Tile<'_>> = spans
        .iter()
        .flat_map(|span| {
            (0..span.tokens).step_by(TILE_TOKENS).flat_map(move |first| {
                (0..kv_heads).map(move |kv_head| Tile {
                    row: span.row + first,
                    tokens: TILE_TOKENS.min(span.tokens - first),
                    start: span.start + first,
                    kv_head,
                    blocks: span.blocks,
                })
            })
        })
        .collect();
    let results: Vec<Vec<f32>> = tiles.par_iter().map(|tile| attend_tile(tile, q, cache, sizes)).collect();
    let mut out = vec![0.0; q.len()];
    for (tile, result) in tiles.iter().zip(&results) {
        for (token, values) in result.chunks_exact(group * head_dim).enumerate() {
            let at = ((tile.row + token) * heads + tile.kv_head * group) * head_dim;
            out[at..at + group * head_dim].copy_from_slice(values);
        }
    }
    out
}

/// `[tokens, group, head_dim]` of a tile.
fn attend_tile<T: Element>(tile: &Tile<'_>, q: &[f32], cache: &[T], sizes: Heads) -> Vec<f32> {
    let Heads { heads, kv_heads, head_dim } = sizes;
    let group = heads / kv_heads;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let rows = tile.tokens * group;
    let mut out = vec![0.0_f32; rows * head_dim];
    let mut greatest = vec![f32::NEG_INFINITY; rows];
    let mut total = vec![0.0_f32; rows];
    let (mut k_scratch, mut v_scratch) = (Vec::new(), Vec::new());

    let positions = tile.start + tile.tokens;
    for (index, block) in tile.blocks.iter().take(positions.div_ceil(BLOCK_TOKENS)).enumerate() {
        let part = |kv: usize| {
            let at = ((block.0 as usize * 2 + kv) * kv_heads + tile.kv_head) * BLOCK_TOKENS * head_dim;
            &cache[at..at + BLOCK_TOKENS * head_dim]
        };
        let (k, v) = (T::widen(part(0), &mut k_scratch), T::widen(part(1), &mut v_scratch));
        for row in 0..rows {
            let position = tile.start + row / group;
            // Keys of this block at or before the query.
            let visible = (position + 1).saturating_sub(index * BLOCK_TOKENS).min(BLOCK_TOKENS);
            if visible == 0 {
                continue;
            }
            let at = ((tile.row + row / group) * heads + tile.kv_head * group + row % group) * head_dim;
            let query = &q[at..at + head_dim];
            let mut scores = [0.0_f32; BLOCK_TOKENS];
            let mut best = greatest[row];
            for (score, key) in scores[..visible].iter_mut().zip(k.chunks_exact(head_dim)) {
                *score = dot(query, key) * scale;
                best = best.max(*score);
            }
            let acc = &mut out[row * head_dim..][..head_dim];
            if best > greatest[row] {
                let shrink = (greatest[row] - best).exp();
                acc.iter_mut().for_each(|a| *a *= shrink);
                total[row] *= shrink;
                greatest[row] = best;
            }
            for (score, value) in scores[..visible].iter().zip(v.chunks_exact(head_dim)) {
                let weight = (score - best).exp();
                total[row] += weight;
                for (a, x) in acc.iter_mut().zip(value) {
                    *a += weight * x;
                }
            }
        }
    }
    for (acc, total) in out.chunks_exact_mut(head_dim).zip(total) {
        acc.iter_mut().for_each(|a| *a /= total);
    }
    out
}

/// In eight partial sums, which the compiler keeps in vector registers.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 8;
    let mut sums = [0.0_f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + tail
}
