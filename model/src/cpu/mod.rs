//! Serving on a CPU: the forward pass over packed weights and paged KV. It computes the same as [`crate::Decoder`] but
//! without a tensor library, whose operations would each allocate memory and traverse their operands again.

mod cache;
mod decoder;
mod engine;
pub(crate) mod kernels;
mod linear;
mod team;
mod workspace;

pub(crate) use cache::CpuKv;
pub(crate) use engine::CpuEngine;
