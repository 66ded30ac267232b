//! Serving on NVIDIA GPUs: kernels of our own (`kernels/`), cuBLASLt for products with many rows, and the driver through
//! cudarc. candle is not involved.
//!
//! One thread, the engine's caller, queues all work of a step on one stream. Memory is allocated while loading and never
//! afterwards. Activations have 16 bits; residuals, sums and logits are f32. Tokens are chosen on the device; logits leave it
//! only where a slice wants more than its next token.
//!
//! Hidden and intermediate sizes are padded with zeros to multiples of 16 elements: tensor cores and 16-byte loads need
//! aligned rows, and a pruned width such as 1689 is odd. Zeros change no sum. Only RMS norms must know the true width.

pub(crate) mod bench;
mod blas;
mod cache;
mod decoder;
mod device;
mod engine;
mod launch;
mod linear;
mod memory;
mod pack;
mod sampler;
mod step;
mod workspace;

#[cfg(test)]
mod tests;

pub(crate) use engine::CudaEngine;
