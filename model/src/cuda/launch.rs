//! The kernels' parameters, as in `kernels/*.cu`, and how kernels are queued.
#![allow(unsafe_code)]

use std::{ffi::c_void, sync::Arc};

use cudarc::{
    driver::{CudaContext, CudaFunction, CudaGraph, CudaModule, CudaStream, DriverError, result, sys},
    nvrtc::Ptx,
};

use super::{device::Fault, memory::Pointer};

/// Machine code of all kernels for several architectures, and PTX for newer ones. build.rs compiles it.
const FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// A kernel's parameter.
///
/// # Safety
/// The type has the layout of the kernel's parameter in C++.
pub(super) unsafe trait Params: Copy {
    /// Threads of a block.
    const THREADS: u32;
}

macro_rules! params {
    ($(#[$doc:meta])* $name:ident, $threads:literal, { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        #[repr(C)]
        pub(super) struct $name {
            $(pub(super) $field: $type,)*
        }

        // SAFETY: the fields are those of the struct of the same name in kernels/, in the same order.
        unsafe impl Params for $name {
            const THREADS: u32 = $threads;
        }
    };
}

/// Weights in device memory; see `kernels/formats.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Matrix {
    pub(super) bytes: Pointer,
    pub(super) scales: Pointer,
    pub(super) row_bytes: i32,
    pub(super) inputs: i32,
}

params!(
    /// A product with at most [`GEMV_ROWS`] rows.
    Gemv, 256, { weights: Matrix, x: Pointer, bias: Pointer, out: Pointer, rows: i32, stride: i32, });
params!(
    /// Quantised weights as plain ones.
    Dequantize, 128, { weights: Matrix, out: Pointer, });
params!(
    /// Rows of the embedding.
    Embed, 128, { table: Matrix, tokens: Pointer, out: Pointer, factor: f32, });
params!(
/// RMS norm.
RmsNorm, 256, {
    x: Pointer, weight: Pointer, out: Pointer, rows: Pointer, width: i32, padded: i32, eps: f32,
});
params!(
/// What attention or MLP add to the residual stream.
AddNorm, 256, { y: Pointer, weight: Pointer, x: Pointer, width: i32, padded: i32, eps: f32, factor: f32, });
params!(
/// Norms over all heads.
QueryKeyNorm, 256, {
    qkv: Pointer, query_norm: Pointer, key_norm: Pointer, query_width: i32, key_width: i32, stride: i32, eps: f32,
});
params!(
    /// The soft cap of logits.
    SoftCap, 128, { x: Pointer, count: i32, cap: f32, });
params!(
/// Cosines and sines of all rows.
RopeTable, 128, {
    positions: Pointer, frequencies: Pointer, factors: Pointer, cos: Pointer, sin: Pointer, rows: i32, half: i32,
});
params!(
/// Norms and rotation of heads; keys and values go to the cache.
Position, 128, {
    qkv: Pointer, query_norm: Pointer, key_norm: Pointer, cos: Pointer, sin: Pointer, slots: Pointer, q: Pointer,
    kv: Pointer, heads: i32, kv_heads: i32, head_dim: i32, rotary_dim: i32, stride: i32, eps: f32,
});
params!(
    /// The gated activation.
    GateMul, 128, { gate_up: Pointer, out: Pointer, width: i32, gelu: i32, });
params!(
/// Attention of both kinds, and the combination of splits.
Attention, 128, {
    q: Pointer, kv: Pointer, slices: Pointer, tables: Pointer, partial: Pointer, tiles: Pointer, out: Pointer,
    heads: i32, kv_heads: i32, splits: i32, head_dim: i32, out_stride: i32, window: i32, scale: f32,
    cap: f32,
});
params!(
/// Choices of tokens.
Sample, 512, {
    choices: Pointer, pool: Pointer, logits: Pointer, out: Pointer, vocab: i32, stride: i32,
});
params!(
    /// Checksums of KV blocks.
    BlockSums, 128, { blocks: Pointer, ids: Pointer, sums: Pointer, block_bytes: i32, count: i32, });

/// Most rows of a [`Gemv`].
pub(super) const GEMV_ROWS: usize = 8;
/// Outputs of a block of [`Gemv`].
pub(super) const GEMV_OUTPUTS: usize = 16;
/// Elements per thread of kernels that work on rows element by element.
pub(super) const ELEMENTS: usize = 8;
/// Heads of a block of [`Position`].
pub(super) const POSITION_HEADS: usize = 4;
/// Query heads of a block of decode attention.
pub(super) const DECODE_HEADS: usize = 8;
/// KV blocks of a block of [`BlockSums`].
pub(super) const SUM_BLOCKS: usize = 4;
/// Tokens of a tile of prefill attention.
pub(super) const PREFILL_TOKENS: usize = 64;

/// Blocks of kernels that work on `width` elements with [`ELEMENTS`] per thread.
pub(super) fn blocks_across(width: usize) -> usize {
    width.div_ceil(ELEMENTS * 128)
}

/// A captured step.
pub(super) struct Graph(CudaGraph);

// SAFETY: a graph may be used from any thread, by one at a time; it is owned by the engine, which is.
unsafe impl Send for Graph {}

impl Graph {
    /// Queues the step on the stream that captured it.
    pub(super) fn launch(&self) -> Result<(), DriverError> {
        self.0.launch()
    }
}

/// The kernels, and the stream that they are queued on.
#[derive(Clone)]
pub(super) struct Launcher {
    module: Arc<CudaModule>,
    stream: Arc<CudaStream>,
}

impl Launcher {
    /// Loads the kernels' machine code for the device's architecture.
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        let module = context.load_module(Ptx::from_binary(FATBIN.to_vec()))?;
        Ok(Self { module, stream: context.new_stream()? })
    }

    /// The stream.
    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The kernel of this name.
    pub(super) fn function(&self, name: &str) -> Result<CudaFunction, DriverError> {
        self.module.load_function(name)
    }

    /// Captures what `queue` queues, instead of running it.
    pub(super) fn capture(&self, queue: impl FnOnce() -> Result<(), Fault>) -> Result<Graph, Fault> {
        self.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let queued = queue();
        // A capture must end even if it failed.
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags);
        queued?;
        graph?.map(Graph).ok_or(Fault::EmptyGraph)
    }

    /// Queues a kernel on the engine's stream. `function` must take a `P`. `grid`: number of blocks.
    pub(super) fn launch<P: Params>(
        &self,
        function: &CudaFunction,
        grid: [usize; 3],
        params: &P,
    ) -> Result<(), DriverError> {
        launch(&self.stream, function, grid, params)
    }
}

/// Queues a kernel on any stream of a context that the thread is bound to. `function` must take a `P`.
pub(super) fn launch<P: Params>(
    stream: &CudaStream,
    function: &CudaFunction,
    grid: [usize; 3],
    params: &P,
) -> Result<(), DriverError> {
    let mut params = *params;
    let mut pointers = [(&raw mut params).cast::<c_void>()];
    let [x, y, z] = grid.map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX));
    // SAFETY: the driver copies the parameter before it returns. Its layout is the kernel's.
    unsafe {
        let (function, stream) = (function.cu_function(), stream.cu_stream());
        result::launch_kernel(function, (x, y, z), (P::THREADS, 1, 1), 0, stream, &mut pointers)
    }
}
