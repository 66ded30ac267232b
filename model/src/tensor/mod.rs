//! The decoder block in candle's tensor operations. Training and pruning use it, and it is the reference for testing
//! the kernels.

mod cache;
mod decoder;
mod differentiable;
mod engine;
mod linear;

pub use decoder::{Attention, Decoder, Observer, Ops, Site};
pub(crate) use engine::TensorEngine;
