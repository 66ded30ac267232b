//! The paged KV cache in device memory, `[layers][blocks][K|V][kv_heads][16][head_dim]`.

use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaStream, DriverError};
use overfill_kv::{
    BlockId, KvMemory, KvStore, StoreError,
    store::{DmaBufRegion, GpuMemory, KvRegion, check_range, sums_on_host},
};
use parking_lot::Mutex;

use super::{
    device::{Fault, Gpu},
    launch::{BlockSums, SUM_BLOCKS, launch},
    memory::{Buffer, Pinned, Pointer},
};

/// Pinned memory for copies, at least one block.
const STAGING_BYTES: usize = 4 << 20;
/// Most blocks that are summed by one kernel.
const SUMS_AT_ONCE: usize = 1024;
/// Shorter blocks have another algorithm, which only the host has.
const SHORTEST_SUM_BYTES: usize = 241;

/// The KV of all layers. The engine's stream writes it; handoffs copy from and to it on a stream of their own, so that
/// they do not wait for the step that is running. They read a layer only after the engine has announced it, and write
/// only blocks that no step uses.
pub(super) struct CudaKv {
    memory: Buffer,
    /// Number of the device.
    device: usize,
    /// Whether other devices may access the memory.
    is_exported: bool,
    num_layers: usize,
    num_blocks: usize,
    block_bytes: usize,
    staging: Mutex<Staging>,
}

struct Staging {
    stream: Arc<CudaStream>,
    pinned: Pinned<u8>,
    /// Blocks that fit.
    blocks: usize,
    sums: Sums,
}

/// What sums blocks: the kernel, numbers of blocks, and their sums.
struct Sums {
    kernel: CudaFunction,
    ids: (Pinned<i32>, Buffer),
    sums: (Pinned<u64>, Buffer),
}

impl Sums {
    fn new(gpu: &Gpu) -> Result<Self, Fault> {
        let buffer = |bytes: usize| Buffer::zeroed(gpu.launcher.stream(), SUMS_AT_ONCE * bytes);
        Ok(Self {
            kernel: gpu.launcher.function("block_sums_xxh3")?,
            ids: (Pinned::zeroed(&gpu.context, SUMS_AT_ONCE)?, buffer(size_of::<i32>())?),
            sums: (Pinned::zeroed(&gpu.context, SUMS_AT_ONCE)?, buffer(size_of::<u64>())?),
        })
    }

    /// The sums of at most [`SUMS_AT_ONCE`] blocks of the layer that begins at `layer`.
    fn of(
        &mut self,
        stream: &CudaStream,
        layer: Pointer,
        blocks: &[BlockId],
        block_bytes: usize,
    ) -> Result<&[u64], DriverError> {
        let count = blocks.len();
        let Self { kernel, ids: (host_ids, ids), sums: (host_sums, sums) } = self;
        host_ids.as_mut_slice().iter_mut().zip(blocks).for_each(|(id, block)| *id = block.0 as i32);
        ids.queue_upload(stream, 0, host_ids, 0..count)?;
        let params = BlockSums {
            blocks: layer,
            ids: ids.pointer(),
            sums: sums.pointer(),
            block_bytes: block_bytes as i32,
            count: count as i32,
        };
        launch(stream, kernel, [count.div_ceil(SUM_BLOCKS), 1, 1], &params)?;
        sums.queue_download(stream, 0, host_sums, 0, count)?;
        stream.synchronize()?;
        Ok(&host_sums.as_slice()[..count])
    }
}

impl CudaKv {
    pub(super) fn new(gpu: &Gpu, num_layers: usize, num_blocks: usize, block_bytes: usize) -> Result<Self, Fault> {
        let blocks = (STAGING_BYTES / block_bytes).max(1);
        let pinned = Pinned::zeroed(&gpu.context, blocks * block_bytes)?;
        let staging = Staging { stream: gpu.context.new_stream()?, pinned, blocks, sums: Sums::new(gpu)? };
        let memory = Buffer::pages(gpu.launcher.stream(), num_layers * num_blocks * block_bytes)?;
        Ok(Self {
            memory,
            device: gpu.context.ordinal(),
            is_exported: gpu.exports_memory(),
            num_layers,
            num_blocks,
            block_bytes,
            staging: Mutex::new(staging),
        })
    }

    /// Address of a layer's blocks.
    pub(super) fn layer(&self, layer: usize) -> Pointer {
        self.memory.pointer().offset(self.offset(layer, 0))
    }

    fn offset(&self, layer: usize, block: usize) -> usize {
        (layer * self.num_blocks + block) * self.block_bytes
    }

    fn layer_bytes(&self) -> usize {
        self.num_blocks * self.block_bytes
    }
}

/// Calls `f` with each run of consecutive ids: its position in `blocks`, and the blocks.
fn for_each_run(
    blocks: &[BlockId],
    mut f: impl FnMut(usize, &[BlockId]) -> Result<(), DriverError>,
) -> Result<(), DriverError> {
    let mut at = 0;
    for run in blocks.chunk_by(|a, b| b.0 == a.0.wrapping_add(1)) {
        f(at, run)?;
        at += run.len();
    }
    Ok(())
}

fn fault(error: DriverError) -> StoreError {
    StoreError::Device(error.to_string())
}

impl KvStore for CudaKv {
    fn num_layers(&self) -> usize {
        self.num_layers
    }

    fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn memory(&self) -> KvMemory {
        KvMemory::Device
    }

    #[allow(unsafe_code)]
    fn regions(&self) -> Option<Vec<KvRegion>> {
        if !self.is_exported {
            return None;
        }
        let exported = self.memory.export().map(Arc::new);
        let buffer = exported.inspect_err(|e| tracing::warn!(%e, "the GPU does not export its memory")).ok()?;
        let region = |layer| {
            let (offset, bytes) = (self.offset(layer, 0) as u64, self.layer_bytes());
            // SAFETY: the memory lives as long as this store and does not move. Engine and transport access only blocks that
            // the block pool has given them.
            KvRegion::DmaBuf(unsafe { DmaBufRegion::new(buffer.clone(), offset, bytes) })
        };
        Some((0..self.num_layers).map(region).collect())
    }

    #[allow(unsafe_code)]
    fn gpu(&self) -> Option<GpuMemory> {
        let layers = (0..self.num_layers).map(|layer| self.layer(layer).address()).collect();
        // SAFETY: as for the regions.
        Some(unsafe { GpuMemory::new(self.device, layers, self.layer_bytes()) })
    }

    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        let mut guard = self.staging.lock();
        let Staging { stream, pinned, blocks: room, .. } = &mut *guard;
        for (piece, blocks) in blocks.chunks(*room).enumerate() {
            for_each_run(blocks, |at, run| {
                let (from, bytes) = (self.offset(layer, run[0].0 as usize), run.len() * self.block_bytes);
                self.memory.queue_download(stream, from, pinned, at * self.block_bytes, bytes)
            })
            .and_then(|()| stream.synchronize())
            .map_err(fault)?;
            for (i, bytes) in pinned.as_slice().chunks_exact(self.block_bytes).take(blocks.len()).enumerate() {
                f(piece * *room + i, bytes);
            }
        }
        Ok(())
    }

    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        let mut guard = self.staging.lock();
        let Staging { stream, pinned, blocks: room, .. } = &mut *guard;
        for (piece, blocks) in blocks.chunks(*room).enumerate() {
            let places = pinned.as_mut_slice().chunks_exact_mut(self.block_bytes).take(blocks.len());
            places.enumerate().for_each(|(i, bytes)| f(piece * *room + i, bytes));
            for_each_run(blocks, |at, run| {
                let to = self.offset(layer, run[0].0 as usize);
                let from = at * self.block_bytes..(at + run.len()) * self.block_bytes;
                self.memory.queue_upload(stream, to, pinned, from)
            })
            // The pinned memory is used again, and the caller takes the blocks for written.
            .and_then(|()| stream.synchronize())
            .map_err(fault)?;
        }
        Ok(())
    }

    fn block_sums(&self, layer: usize, blocks: &[BlockId]) -> Result<Vec<u64>, StoreError> {
        if self.block_bytes < SHORTEST_SUM_BYTES || !self.block_bytes.is_multiple_of(size_of::<u64>()) {
            return sums_on_host(self, layer, blocks);
        }
        check_range(self, layer, blocks)?;
        let mut guard = self.staging.lock();
        let Staging { stream, sums, .. } = &mut *guard;
        let mut all = Vec::with_capacity(blocks.len());
        for blocks in blocks.chunks(SUMS_AT_ONCE) {
            all.extend_from_slice(sums.of(stream, self.layer(layer), blocks, self.block_bytes).map_err(fault)?);
        }
        Ok(all)
    }
}
