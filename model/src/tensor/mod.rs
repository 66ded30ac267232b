//! The decoder block in a tensor library's operations: it trains and prunes, and it is the reference that the kernels are
//! tested against.

mod decoder;
mod differentiable;
mod linear;
pub(crate) mod paged;

pub use decoder::{Attention, Decoder, Observer, Ops, Site};
