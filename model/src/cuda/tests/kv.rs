//! KV in device memory: checksums.

use overfill_kv::{BlockId, KvStore, store::sums_on_host};

use super::gpu;
use crate::cuda::{cache::CudaKv, device::Gpu, pack::Half};

const LAYERS: usize = 2;

/// Two layers of `blocks` blocks with pseudorandom bytes.
fn filled(blocks: usize, block_bytes: usize) -> CudaKv {
    let kv = CudaKv::new(&Gpu::open(0, Half::Bf16).unwrap(), LAYERS, blocks, block_bytes).unwrap();
    let ids: Vec<BlockId> = (0..blocks as u32).map(BlockId).collect();
    let mut state = block_bytes as u64;
    for layer in 0..LAYERS {
        kv.write(layer, &ids, &mut |_, block| {
            for byte in block {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
        })
        .unwrap();
    }
    kv
}

#[test]
fn blocks_are_summed_where_they_lie() {
    if !gpu() {
        return;
    }
    // Around 1024 bytes, after which accumulators are scrambled. Blocks of 240 and 1027 bytes are summed on the host.
    for bytes in [240, 248, 256, 512, 960, 1016, 1024, 1027, 1032, 1088, 2040, 2048, 2056, 4096 + 64, 65536] {
        let kv = filled(7, bytes);
        for (layer, ids) in [(0, &[3_u32][..]), (1, &[6, 0, 5, 1, 2, 2]), (1, &[])] {
            let ids: Vec<BlockId> = ids.iter().copied().map(BlockId).collect();
            let expected = sums_on_host(&kv, layer, &ids).unwrap();
            assert_eq!(kv.block_sums(layer, &ids).unwrap(), expected, "{bytes} bytes, {ids:?}");
        }
        assert!(kv.block_sums(0, &[BlockId(7)]).is_err());
        assert!(kv.block_sums(LAYERS, &[BlockId(0)]).is_err());
    }
}

#[test]
fn many_blocks_are_summed_in_several_kernels() {
    if !gpu() {
        return;
    }
    let kv = filled(5, 256);
    let ids: Vec<BlockId> = (0..2500).map(|i| BlockId(i * i % 5)).collect();
    assert_eq!(kv.block_sums(1, &ids).unwrap(), sums_on_host(&kv, 1, &ids).unwrap());
}
