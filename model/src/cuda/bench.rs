//! Measures what a GPU can do. The figures of the engine are judged by these.

use std::{sync::Arc, time::Instant};

use overfill_kv::KvStore;

use super::{
    blas::{self, Product},
    cache::CudaKv,
    device::{Fault, Gpu},
    memory::Buffer,
    pack::Half,
};
use crate::{
    ModelError,
    bench::gpu::{Gpu as Measured, Probe},
};

/// Copies or products that are queued at once, so that the wait for them does not count.
const QUEUED: usize = 10;

/// See [`crate::bench::gpu::measure`].
pub(crate) fn measure(index: usize, probe: &Probe) -> Result<Measured, ModelError> {
    let fault = |fault: Fault| fault.while_loading(index);
    let gpu = Gpu::open(index, Half::Bf16).map_err(fault)?;
    let driver = |error| fault(Fault::Driver(error));
    Ok(Measured {
        name: gpu.context.name().map_err(driver)?,
        compute_capability: gpu.context.compute_capability().map_err(driver)?,
        memory_bytes: gpu.context.total_mem().map_err(driver)?,
        copy_bytes_per_second: copies(&gpu, probe).map_err(fault)?,
        product_operations_per_second: products(&gpu, probe).map_err(fault)?,
    })
}

/// See [`crate::bench::gpu::kv_store`].
pub(crate) fn kv_store(
    index: usize,
    layers: usize,
    blocks: usize,
    block_bytes: usize,
) -> Result<Arc<dyn KvStore>, ModelError> {
    let fault = |fault: Fault| fault.while_loading(index);
    let gpu = Gpu::open(index, Half::Bf16).map_err(fault)?;
    Ok(Arc::new(CudaKv::new(&gpu, layers, blocks, block_bytes).map_err(fault)?))
}

fn copies(gpu: &Gpu, probe: &Probe) -> Result<f64, Fault> {
    let stream = gpu.launcher.stream();
    let bytes = probe.copy_bytes.max(1);
    let (from, to) = (Buffer::zeroed(stream, bytes)?, Buffer::zeroed(stream, bytes)?);
    let seconds = best(gpu, probe.runs, || Ok(to.queue_copy(stream, &from)?))?;
    Ok(2.0 * bytes as f64 / seconds)
}

fn products(gpu: &Gpu, probe: &Probe) -> Result<f64, Fault> {
    let stream = gpu.launcher.stream();
    let width = probe.product_width.next_multiple_of(blas::ROWS);
    // Zeros would take less power, and a GPU's clock depends on that.
    let mut state = 1_u32;
    let mut value = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Half::Bf16.bits((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    let mut matrix = || Buffer::of(stream, &(0..width * width).map(|_| value()).collect::<Vec<_>>());
    let (weights, x) = (matrix()?, matrix()?);
    let out = Buffer::zeroed(stream, width * width * size_of::<u16>())?;
    let product = Product {
        weights: weights.pointer(),
        x: x.pointer(),
        bias: None,
        out: out.pointer(),
        rows: width,
        outputs: width,
        inputs: width,
        result: blas::Result::Half,
    };
    let seconds = best(gpu, probe.runs, || gpu.blas.multiply(stream, &product))?;
    Ok(2.0 * (width as f64).powi(3) / seconds)
}

/// Seconds of what `queue` queues, in the fastest run after a warm-up run.
fn best(gpu: &Gpu, runs: usize, queue: impl Fn() -> Result<(), Fault>) -> Result<f64, Fault> {
    let mut least = f64::INFINITY;
    for run in 0..=runs.max(1) {
        let start = Instant::now();
        (0..QUEUED).try_for_each(|_| queue())?;
        gpu.launcher.stream().synchronize()?;
        if run > 0 {
            least = least.min(start.elapsed().as_secs_f64() / QUEUED as f64);
        }
    }
    Ok(least)
}
