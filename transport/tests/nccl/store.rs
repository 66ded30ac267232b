//! KV in the memory of a GPU: the real one, or the software GPU.
#![allow(unsafe_code)]

use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaContext, CudaStream, result, sys::CUdeviceptr};
use overfill_kv::{BlockId, GpuMemory, KvMemory, KvStore, StoreError, store::check_range};
use overfill_software_gpu::SoftwareGpu;

pub struct GpuStore {
    stream: Arc<CudaStream>,
    at: CUdeviceptr,
    num_layers: usize,
    num_blocks: usize,
    block_bytes: usize,
}

/// Whether there is a GPU. Without a compiler for the software GPU there is none, which is said.
pub fn has_gpu() -> bool {
    static LOADED: OnceLock<bool> = OnceLock::new();
    *LOADED.get_or_init(|| {
        if std::env::var_os("OVERFILL_REAL_GPU").is_some() {
            return true;
        }
        match SoftwareGpu::build(false, &[]).and_then(|gpu| gpu.load()) {
            Ok(()) => true,
            Err(error) if std::env::var_os("OVERFILL_GPU_REQUIRED").is_some() => panic!("{error}"),
            Err(error) => {
                eprintln!("SKIPPED: no software GPU: {error}");
                false
            }
        }
    })
}

impl GpuStore {
    /// A store with the content of another one, which is in host memory.
    pub fn like(other: &dyn KvStore) -> Arc<dyn KvStore> {
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let (num_layers, num_blocks, block_bytes) = (other.num_layers(), other.num_blocks(), other.block_bytes());
        // SAFETY: filled below, before anything reads it.
        let at = unsafe { result::malloc_sync(num_layers * num_blocks * block_bytes).unwrap() };
        let store = Self { stream, at, num_layers, num_blocks, block_bytes };
        let ids: Vec<BlockId> = (0..num_blocks as u32).map(BlockId).collect();
        for layer in 0..num_layers {
            let mut bytes = Vec::new();
            other.read(layer, &ids, &mut |_, block| bytes.push(block.to_vec())).unwrap();
            store.write(layer, &ids, &mut |i, block| block.copy_from_slice(&bytes[i])).unwrap();
        }
        Arc::new(store)
    }

    fn address(&self, layer: usize, block: BlockId) -> CUdeviceptr {
        self.at + ((layer * self.num_blocks + block.0 as usize) * self.block_bytes) as CUdeviceptr
    }
}

impl KvStore for GpuStore {
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
    fn gpu(&self) -> Option<GpuMemory> {
        let layers = (0..self.num_layers).map(|layer| self.address(layer, BlockId(0))).collect();
        // SAFETY: the memory is never freed, and tests access blocks only while no handoff does.
        Some(unsafe { GpuMemory::new(0, layers, self.num_blocks * self.block_bytes) })
    }
    fn read(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &[u8])) -> Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        self.stream.context().bind_to_thread().unwrap();
        for (i, block) in blocks.iter().enumerate() {
            let mut bytes = vec![0; self.block_bytes];
            // SAFETY: the block is inside the memory; `bytes` lives until the copy has ended.
            unsafe { result::memcpy_dtoh_async(&mut bytes, self.address(layer, *block), self.stream.cu_stream()) }
                .unwrap();
            self.stream.synchronize().unwrap();
            f(i, &bytes);
        }
        Ok(())
    }
    fn write(&self, layer: usize, blocks: &[BlockId], f: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), StoreError> {
        check_range(self, layer, blocks)?;
        self.stream.context().bind_to_thread().unwrap();
        for (i, block) in blocks.iter().enumerate() {
            let mut bytes = vec![0; self.block_bytes];
            f(i, &mut bytes);
            // SAFETY: as above.
            unsafe { result::memcpy_htod_async(self.address(layer, *block), &bytes, self.stream.cu_stream()) }.unwrap();
            self.stream.synchronize().unwrap();
        }
        Ok(())
    }
}
