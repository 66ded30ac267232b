//! Operands of prefill's products.

use bytemuck::Pod;
use half::bf16;

use super::PADDING;
use crate::cpu::kernels::{element::Element, inputs::round_bf16, simd::Simd};

/// Operand type of the products, for KV of type `T`.
pub(crate) trait Operand<T>: Pod + Send + Sync {
    /// Number of consecutive factors in one lane.
    const PER_LANE: usize;
    /// Converts from f32, rounding to nearest.
    fn round(value: f32) -> Self;
    /// Converts values, exactly, into every `stride`th element of `to`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[allow(unsafe_code)]
    unsafe fn convert<S: Simd>(from: &[T], to: &mut [Self], stride: usize);
    /// Converts `PER_LANE` rows of `dim` values, exactly, so that the values of a column are neighbours in `to`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[allow(unsafe_code)]
    unsafe fn convert_rows<S: Simd>(from: &[T], to: &mut [Self], dim: usize);
    /// Adds to each lane the products of its `PER_LANE` factors with the `PER_LANE` factors at `other`.
    ///
    /// # Safety
    /// `lanes` points to `PER_LANE * LANES` factors, `other` to `PER_LANE`, and the processor has the instruction set.
    #[allow(unsafe_code)]
    unsafe fn dot<S: Simd>(sums: S::F, lanes: *const Self, other: *const Self) -> S::F;
}

impl<T: Element> Operand<T> for f32 {
    const PER_LANE: usize = 1;
    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn convert<S: Simd>(from: &[T], to: &mut [Self], stride: usize) {
        let in_vectors = if stride == 1 { from.len().min(to.len()) / S::LANES * S::LANES } else { 0 };
        for i in (0..in_vectors).step_by(S::LANES) {
            // SAFETY: both slices have a whole vector at `i`.
            unsafe { S::store(to.as_mut_ptr().add(i), T::load::<S>(from.as_ptr().add(i))) }
        }
        // Slices, not `skip`: that would step over all the elements one by one.
        let rest = to[in_vectors..].iter_mut().step_by(stride).zip(&from[in_vectors..]);
        rest.for_each(|(to, from)| *to = from.to_f32());
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn convert_rows<S: Simd>(from: &[T], to: &mut [Self], _dim: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe { <Self as Operand<T>>::convert::<S>(from, to, 1) }
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn dot<S: Simd>(sums: S::F, lanes: *const Self, other: *const Self) -> S::F {
        // SAFETY: guaranteed by the caller.
        unsafe { S::mul_add(S::splat(*other), S::load(lanes), sums) }
    }
}

impl Operand<bf16> for bf16 {
    const PER_LANE: usize = 2;
    #[inline(always)]
    fn round(value: f32) -> Self {
        round_bf16(value)
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn convert<S: Simd>(from: &[bf16], to: &mut [Self], stride: usize) {
        if stride == 1 {
            return to[..from.len()].copy_from_slice(from);
        }
        to.iter_mut().step_by(stride).zip(from).for_each(|(to, from)| *to = *from);
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn convert_rows<S: Simd>(from: &[bf16], to: &mut [Self], dim: usize) {
        let (first, second) = from.split_at(dim);
        let to = &mut to.as_chunks_mut::<2>().0[..dim];
        let (whole, rest) = to.as_chunks_mut::<PADDING>();
        // Over arrays of fixed length, the compiler emits only vector instructions.
        for (to, (first, second)) in
            whole.iter_mut().zip(first.as_chunks::<PADDING>().0.iter().zip(second.as_chunks::<PADDING>().0))
        {
            let (first, second) = (*first, *second);
            *to = std::array::from_fn(|i| [first[i], second[i]]);
        }
        let at = dim - rest.len();
        rest.iter_mut()
            .zip(first[at..].iter().zip(&second[at..]))
            .for_each(|(to, (first, second))| *to = [*first, *second]);
    }
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn dot<S: Simd>(sums: S::F, lanes: *const Self, other: *const Self) -> S::F {
        // SAFETY: guaranteed by the caller.
        unsafe { S::dot_bf16(sums, lanes, other) }
    }
}
