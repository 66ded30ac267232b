//! Serving on a CPU: the forward pass over packed weights and paged KV, without a tensor library, whose every operation
//! would allocate and walk over its operands anew. What it computes is what [`crate::Decoder`] computes.

mod cache;
mod decoder;
mod engine;
pub(crate) mod kernels;
mod linear;
mod source;
mod team;
mod workspace;

pub(crate) use cache::CpuKv;
pub(crate) use engine::CpuEngine;
