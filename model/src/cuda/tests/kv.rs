//! KV in device memory: checksums, and what other devices and processes learn of the memory.

use std::{fs::File, os::unix::fs::FileExt, process::Command};

use overfill_kv::{
    BlockId, KvStore,
    store::{KvRegion, sums_on_host},
};

use super::{gpu, on_real_gpu};
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

#[test]
fn blocks_have_addresses() {
    if !gpu() {
        return;
    }
    let kv = filled(3, 256);
    let memory = kv.gpu().unwrap();
    assert_eq!(memory.device(), 0);
    let first = memory.address(0, 0, 768).unwrap();
    assert_eq!(memory.address(1, 512, 256), Some(first + 768 + 512));
    assert_eq!((memory.address(0, 513, 256), memory.address(LAYERS, 0, 1)), (None, None));
}

#[test]
fn a_gpu_without_dma_buf_exports_nothing() {
    if on_real_gpu() || !gpu() || std::env::var_os(EXPORTS).is_some() {
        return;
    }
    assert!(filled(3, 256).regions().is_none());
}

/// Makes the software GPU export memory. Processes have it from the start, so the test runs again in one of its own.
const EXPORTS: &str = "SOFTWARE_GPU_DMA_BUF";

#[test]
fn what_other_devices_write_is_in_the_blocks() {
    if on_real_gpu() || !gpu() {
        return;
    }
    if std::env::var_os(EXPORTS).is_none() {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["cuda::tests::kv::what_other_devices_write_is_in_the_blocks", "--exact"]).env(EXPORTS, "1");
        let done = again.output().unwrap();
        assert!(
            done.status.success(),
            "{}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
        return;
    }
    let kv = filled(5, 1000);
    let before = kv.block_sums(1, &[BlockId(1), BlockId(3)]).unwrap();
    let regions = kv.regions().unwrap();
    assert_eq!(regions.len(), LAYERS);
    let KvRegion::DmaBuf(region) = &regions[1] else { panic!("{regions:?}") };
    assert_eq!((region.offset(), region.bytes()), (5000, 5000));
    // The memory has kept what was there before.
    assert_eq!(kv.block_sums(1, &[BlockId(1), BlockId(3)]).unwrap(), before);
    let device = File::from(region.buffer().try_clone().unwrap());
    device.write_all_at(&[7; 1000], region.offset() + 3 * 1000).unwrap();
    let after = kv.block_sums(1, &[BlockId(1), BlockId(3)]).unwrap();
    assert!(after[0] == before[0] && after[1] != before[1]);
    kv.read(1, &[BlockId(3)], &mut |_, bytes| assert_eq!(bytes, [7; 1000])).unwrap();
}
