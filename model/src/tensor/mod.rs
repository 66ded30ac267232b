//! The decoder block in candle's tensor operations. Training and pruning use it, and it is the reference for testing
//! the kernels.

#[cfg(test)]
mod cache;
mod decoder;
mod differentiable;
#[cfg(test)]
mod engine;
mod linear;

pub use decoder::{Attention, Decoder, Observer, Ops, Site, soft_cap};
#[cfg(test)]
pub(crate) use engine::TensorEngine;
