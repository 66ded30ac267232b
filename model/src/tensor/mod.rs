//! The decoder block in a tensor library's operations: it trains and prunes, and it is the reference that the kernels are
//! tested against.

mod cache;
mod decoder;
mod differentiable;
mod engine;
mod linear;

pub use decoder::{Attention, Decoder, Observer, Ops, Site};
pub(crate) use engine::TensorEngine;
