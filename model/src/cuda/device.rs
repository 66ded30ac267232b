//! Opening a GPU, and its faults.

use std::sync::Arc;

use cudarc::{
    cublaslt::result::CublasError,
    driver::{CudaContext, DriverError, sys},
};

use super::{blas::Blas, launch::Launcher, pack::Half};
use crate::{DeviceSpec, ModelError};

/// Oldest architecture with machine code: bf16 on tensor cores.
const OLDEST: (i32, i32) = (8, 0);

/// A failure of the device, or of a library.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// The driver refused a call, or work that was queued earlier has failed.
    #[error("{}", said(.0))]
    Driver(#[from] DriverError),
    /// The device's memory is full.
    #[error("{wanted_bytes} bytes of device memory are needed, {free_bytes} are free")]
    OutOfMemory {
        /// Size of the buffer that did not fit.
        wanted_bytes: usize,
        /// What is left.
        free_bytes: usize,
    },
    /// cuBLASLt refused a call.
    #[error("cuBLASLt: {0:?}")]
    Blas(#[from] CublasError),
    /// A library is not installed.
    #[error("{0} is not installed")]
    Library(&'static str),
    /// A capture recorded nothing.
    #[error("a captured step has no kernels")]
    EmptyGraph,
    /// The architecture is too old.
    #[error("{name} has compute capability {}.{}, supported: {}.{} and newer", found.0, found.1, OLDEST.0, OLDEST.1)]
    Architecture {
        /// The device's name.
        name: String,
        /// Its compute capability.
        found: (i32, i32),
    },
}

impl Fault {
    /// The error of a device that could not be opened or filled.
    pub(super) fn while_loading(self, index: usize) -> ModelError {
        ModelError::Device { device: DeviceSpec::Cuda(index).to_string(), reason: self.to_string() }
    }

    /// The error of a device that failed while it served. CUDA's contexts do not recover from failed kernels.
    pub(super) fn while_serving(self, index: usize) -> ModelError {
        ModelError::DeviceLost { device: DeviceSpec::Cuda(index).to_string(), reason: self.to_string() }
    }
}

/// The driver's name and text of an error.
fn said(error: &DriverError) -> String {
    let text = error.error_string().map(|text| text.to_string_lossy());
    text.map_or_else(|_| format!("{:?}", error.0), |text| format!("{:?}: {text}", error.0))
}

/// An open device, with kernels and cuBLASLt.
pub(super) struct Gpu {
    pub(super) context: Arc<CudaContext>,
    pub(super) launcher: Launcher,
    pub(super) blas: Blas,
    pub(super) multiprocessors: usize,
}

impl Gpu {
    /// Opens device `index`. `half`: type of activations.
    pub(super) fn open(index: usize, half: Half) -> Result<Self, Fault> {
        if !driver_is_installed() {
            return Err(Fault::Library("the CUDA driver's library (libcuda)"));
        }
        let context = CudaContext::new(index)?;
        let (name, found) = (context.name()?, context.compute_capability()?);
        if found < OLDEST {
            return Err(Fault::Architecture { name, found });
        }
        let count = context.attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let launcher = Launcher::new(&context)?;
        let blas = Blas::new(launcher.stream(), half)?;
        tracing::info!(
            device = index,
            name,
            major = found.0,
            minor = found.1,
            multiprocessors = count,
            "opened the GPU"
        );
        Ok(Self { context, launcher, blas, multiprocessors: usize::try_from(count).unwrap_or(1) })
    }

    /// Whether other devices may write into this one's memory through a dma-buf, and kernels that are launched after such a
    /// device has reported a write see it.
    pub(super) fn exports_memory(&self) -> bool {
        use sys::CUdevice_attribute_enum as Attribute;
        const OWNER: i32 = sys::CUGPUDirectRDMAWritesOrdering::CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER as i32;
        // Old drivers don't know the attributes.
        let value = |attribute| self.context.attribute(attribute).unwrap_or(0);
        value(Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED) != 0
            && value(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING) >= OWNER
    }

    /// Free device memory in bytes.
    pub(super) fn free_bytes(&self) -> Result<usize, Fault> {
        Ok(self.context.mem_get_info()?.0)
    }
}

#[allow(unsafe_code)]
fn driver_is_installed() -> bool {
    // SAFETY: only asks whether the library can be opened.
    unsafe { sys::is_culib_present() }
}
