//! The decoder block in candle's tensor operations. Training and pruning use it, and it is the reference for testing
//! the kernels.

mod attention;
mod blocks;
#[cfg(test)]
mod cache;
mod decoder;
#[cfg(test)]
mod engine;
mod lanes;
mod linear;
mod loss;
mod passes;
mod product;
mod trained;
mod updates;

pub use attention::{Ragged, ragged_attention};
#[cfg(test)]
pub(crate) use decoder::soft_cap;
pub use decoder::{Attention, Decoder, GradientSums, LayerKv, Observer, Ops, Site};
#[cfg(test)]
pub(crate) use engine::TensorEngine;
pub(crate) use loss::loss_rows;
pub(crate) use product::seconds_of_products;
pub use updates::{AdamStep, add_in_place, column_sums, square_sum, zero_in_place};
