//! Operations on rows of f32 values for training: element by element in vectors, on all threads.

use rayon::prelude::*;

use crate::cpu::kernels::simd::{Isa, Kernel, Simd};

/// Most lanes of any instruction set.
const MOST_LANES: usize = 32;
/// Values of one task: large enough to be worth a task, small enough for a core's cache.
const TASK_VALUES: usize = 1 << 15;

/// An operation that changes one value by `N` others, for all lanes of vectors.
pub(super) trait Lanes<const N: usize>: Sync {
    /// The new value of `target`. Must be `#[inline(always)]`.
    ///
    /// # Safety
    /// The processor has the instruction set `S`.
    #[allow(unsafe_code)]
    unsafe fn apply<S: Simd>(&self, target: S::F, inputs: [S::F; N]) -> S::F;
}

struct Each<'a, const N: usize, L> {
    op: &'a L,
    target: &'a mut [f32],
    inputs: [&'a [f32]; N],
}

impl<const N: usize, L: Lanes<N>> Kernel for Each<'_, N, L> {
    type Output = ();
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) {
        let Self { op, target, inputs } = self;
        let count = target.len();
        assert!(inputs.iter().all(|input| input.len() == count));
        let whole = count - count % S::LANES;
        // SAFETY: all slices have `count` values, and padded arrays have at least LANES.
        unsafe {
            for at in (0..whole).step_by(S::LANES) {
                let mut values = [S::splat(0.0); N];
                for (value, input) in values.iter_mut().zip(&inputs) {
                    *value = S::load(input.as_ptr().add(at));
                }
                let to = target.as_mut_ptr().add(at);
                S::store(to, op.apply::<S>(S::load(to), values));
            }
            if whole < count {
                let padded = |from: &[f32]| {
                    let mut all = [0.0; MOST_LANES];
                    all[..count - whole].copy_from_slice(&from[whole..]);
                    all
                };
                let mut values = [S::splat(0.0); N];
                for (value, input) in values.iter_mut().zip(&inputs) {
                    *value = S::load(padded(input).as_ptr());
                }
                let mut last = padded(target);
                S::store(last.as_mut_ptr(), op.apply::<S>(S::load(last.as_ptr()), values));
                target[whole..].copy_from_slice(&last[..count - whole]);
            }
        }
    }
}

struct Total<'a, const N: usize, L> {
    op: &'a L,
    inputs: [&'a [f32]; N],
}

impl<const N: usize, L: Lanes<N>> Kernel for Total<'_, N, L> {
    type Output = f32;
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let Self { op, inputs } = self;
        let count = inputs[0].len();
        assert!(inputs.iter().all(|input| input.len() == count));
        let whole = count - count % S::LANES;
        // SAFETY: all slices have `count` values, and padded arrays have at least LANES.
        unsafe {
            let mut sums = [S::splat(0.0); 4];
            let vectors = |at: usize| {
                let mut values = [S::splat(0.0); N];
                for (value, input) in values.iter_mut().zip(&inputs) {
                    *value = S::load(input.as_ptr().add(at));
                }
                values
            };
            let by_four = whole - whole % (4 * S::LANES);
            for at in (0..by_four).step_by(4 * S::LANES) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = op.apply::<S>(*sum, vectors(at + i * S::LANES));
                }
            }
            for at in (by_four..whole).step_by(S::LANES) {
                sums[0] = op.apply::<S>(sums[0], vectors(at));
            }
            let mut tail = [0.0; MOST_LANES];
            if whole < count {
                let mut values = [S::splat(0.0); N];
                for (value, input) in values.iter_mut().zip(&inputs) {
                    let mut all = [0.0; MOST_LANES];
                    all[..count - whole].copy_from_slice(&input[whole..]);
                    *value = S::load(all.as_ptr());
                }
                S::store(tail.as_mut_ptr(), op.apply::<S>(S::splat(0.0), values));
            }
            let rest: f32 = tail[..count - whole].iter().sum();
            S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]))) + rest
        }
    }
}

/// Applies `op` to each value of `target`, on the calling thread.
///
/// # Panics
/// If the inputs are not as long as `target`.
pub(super) fn each<const N: usize>(op: &impl Lanes<N>, target: &mut [f32], inputs: [&[f32]; N]) {
    Isa::best().run(Each { op, target, inputs });
}

/// Applies `op` to each value of `target`, on all threads.
pub(super) fn each_in_parallel<const N: usize>(op: &impl Lanes<N>, target: &mut [f32], inputs: [&[f32]; N]) {
    assert!(inputs.iter().all(|input| input.len() == target.len()));
    target.par_chunks_mut(TASK_VALUES).enumerate().for_each(|(i, chunk)| {
        let at = i * TASK_VALUES..i * TASK_VALUES + chunk.len();
        each(op, chunk, inputs.map(|input| &input[at.clone()]));
    });
}

/// Folds the values with `op`, which adds to its target, and sums over the lanes. The order depends on the length only.
pub(super) fn total<const N: usize>(op: &impl Lanes<N>, inputs: [&[f32]; N]) -> f32 {
    Isa::best().run(Total { op, inputs })
}

struct Greatest<'a>(&'a [f32]);

impl Kernel for Greatest<'_> {
    type Output = f32;
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let chunks = self.0.chunks_exact(S::LANES);
        let rest = chunks.remainder();
        let mut lanes = [f32::NEG_INFINITY; MOST_LANES];
        // SAFETY: a chunk holds LANES values, and `lanes` at least as many.
        unsafe {
            let mut most = S::load(lanes.as_ptr());
            for chunk in chunks {
                most = S::max(most, S::load(chunk.as_ptr()));
            }
            S::store(lanes.as_mut_ptr(), most);
        }
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, x| most.max(*x))
    }
}

/// The greatest value; negative infinity if there is none.
pub(super) fn greatest(x: &[f32]) -> f32 {
    Isa::best().run(Greatest(x))
}

/// Calls `f` with the index of a row, and the row, for all rows of `width` values, on all threads.
pub(super) fn rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let some = (TASK_VALUES / width.max(1)).max(1);
    out.par_chunks_mut(some * width).enumerate().for_each(|(task, chunk)| {
        for (i, row) in chunk.chunks_exact_mut(width).enumerate() {
            f(task * some + i, row);
        }
    });
}

/// Adds the sum of each column of rows of `sums.len()` values to `sums`: column blocks on all threads, rows in order.
pub(super) fn add_column_sums(sums: &mut [f32], x: &[f32]) {
    const BLOCK: usize = 128;
    let width = sums.len();
    sums.par_chunks_mut(BLOCK).enumerate().for_each(|(i, sums)| {
        let (at, count) = (i * BLOCK, sums.len());
        for row in x.chunks_exact(width) {
            each(&Add {}, sums, [&row[at..at + count]]);
        }
    });
}

macro_rules! lanes {
    ($(#[$doc:meta])* $name:ident { $($field:ident),* } $n:literal, |$self:ident, $target:pat_param, $inputs:pat_param| $body:expr) => {
        $(#[$doc])*
        pub(super) struct $name {
            $(pub(super) $field: f32,)*
        }

        impl $crate::tensor::lanes::Lanes<$n> for $name {
            #[inline(always)]
            #[allow(unsafe_code)]
            unsafe fn apply<S: $crate::cpu::kernels::simd::Simd>(&$self, $target: S::F, $inputs: [S::F; $n]) -> S::F {
                // SAFETY: guaranteed by the caller.
                unsafe { $body }
            }
        }
    };
}
pub(super) use lanes;

lanes!(
    /// `target + x`.
    Add {} 1, |self, target, [x]| S::add(target, x)
);
lanes!(
    /// `target + x y`.
    AddProduct {} 2, |self, target, [x, y]| S::mul_add(x, y, target)
);
lanes!(
    /// `target + x y z`.
    AddProduct3 {} 3, |self, target, [x, y, z]| S::mul_add(S::mul(x, y), z, target)
);
lanes!(
    /// `target + x^2`.
    AddSquare {} 1, |self, target, [x]| S::mul_add(x, x, target)
);
lanes!(
    /// `target factor`.
    Scale { factor } 0, |self, target, []| S::mul(target, S::splat(self.factor))
);
lanes!(
    /// `e^(scale (target - max))`.
    ExpShifted { scale, max } 0, |self, target, []| {
        S::exp(S::mul(S::sub(target, S::splat(self.max)), S::splat(self.scale)))
    }
);
lanes!(
    /// `target + e^(scale (x - max))`.
    AddExp { scale, max } 1, |self, target, [x]| {
        S::add(target, S::exp(S::mul(S::sub(x, S::splat(self.max)), S::splat(self.scale))))
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_reached_once_whatever_the_length() {
        for count in [0, 1, 15, 16, 17, 63, TASK_VALUES + 5] {
            let x: Vec<f32> = (0..count).map(|i| (i % 7) as f32).collect();
            let mut target = vec![1.0; count];
            each_in_parallel(&AddProduct {}, &mut target, [&x, &x]);
            assert!(target.iter().zip(&x).all(|(t, x)| *t == 1.0 + x * x), "{count}");
            let sum: f32 = x.iter().map(|x| x * x).sum();
            assert!((total(&AddSquare {}, [&x]) - sum).abs() <= sum * 1e-5, "{count}");
            assert_eq!(greatest(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max), "{count}");
        }
        let mut sums = vec![0.5; 130];
        add_column_sums(&mut sums, &[1.0; 260]);
        assert_eq!(sums, [2.5; 130]);
    }
}
