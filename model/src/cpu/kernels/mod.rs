//! The compute kernels. Nothing outside this module depends on memory layouts.

pub(crate) mod attention;
pub(crate) mod element;
pub(crate) mod inputs;
pub(crate) mod matmul;
pub(crate) mod memory;
pub(crate) mod packed;
pub(crate) mod rows;
pub(crate) mod scatter;
pub(crate) mod simd;
