//! Measures what a GPU can do, for `overfill bench gpu` and `overfill bench handoff`.

use std::sync::Arc;

use overfill_kv::KvStore;

use crate::ModelError;

/// What a GPU can do, measured.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// The device's name.
    pub name: String,
    /// Compute capability.
    pub compute_capability: (i32, i32),
    /// Size of its memory in bytes.
    pub memory_bytes: usize,
    /// Copies within device memory: bytes read and bytes written per second, together.
    pub copy_bytes_per_second: f64,
    /// Dense bf16 products of square matrices by cuBLASLt, in operations per second. A multiply-add counts as two.
    pub product_operations_per_second: f64,
}

/// Sizes of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Bytes of a copy: more than the GPU's cache holds.
    pub copy_bytes: usize,
    /// Width of the matrices.
    pub product_width: usize,
    /// Runs of each measurement. The best one counts.
    pub runs: usize,
}

/// Measures GPU `index`.
///
/// # Errors
/// There is no such GPU, it is too old, its memory is full, or the program was built without GPU support.
pub fn measure(index: usize, probe: &Probe) -> Result<Gpu, ModelError> {
    #[cfg(feature = "cuda")]
    {
        crate::cuda::bench::measure(index, probe)
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = probe;
        Err(ModelError::no_gpu_support(index))
    }
}

/// KV in the memory of GPU `index`, without a model.
///
/// # Errors
/// As [`measure`].
pub fn kv_store(
    index: usize,
    layers: usize,
    blocks: usize,
    block_bytes: usize,
) -> Result<Arc<dyn KvStore>, ModelError> {
    #[cfg(feature = "cuda")]
    {
        crate::cuda::bench::kv_store(index, layers, blocks, block_bytes)
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (layers, blocks, block_bytes);
        Err(ModelError::no_gpu_support(index))
    }
}
