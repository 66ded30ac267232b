//! Products of a tile: vectors of factors with factors that are broadcast to all lanes.

use bytemuck::Pod;

use super::{PADDING, operand::Operand};
use crate::cpu::kernels::{
    inputs::tile_rows,
    simd::{Simd, load_tile, store_tile},
};

/// Factors of earlier sums.
#[derive(Clone, Copy)]
pub(super) enum Kept<'a> {
    /// There are no earlier sums.
    None,
    /// A factor for each row.
    OfRow(&'a [f32]),
    /// A factor for each output.
    OfOutput(&'a [f32]),
}

/// `out[i][row] = out[i][row] * kept + sum over steps of lanes[step][row] * others[i * next_other + step * next_step]`. A step has
/// `PER_LANE` factors. Each sum is in the order of the steps, so it does not depend on which factors are in the lanes.
pub(super) struct Product<'a, O> {
    /// `[steps][rows][PER_LANE]`.
    pub(super) lanes: &'a [O],
    pub(super) steps: usize,
    pub(super) others: &'a [O],
    pub(super) next_other: usize,
    pub(super) next_step: usize,
    pub(super) outputs: usize,
    pub(super) kept: Kept<'a>,
    pub(super) rows: usize,
}

impl<O: Pod> Product<'_, O> {
    /// Computes all outputs for rows starting at `first_row`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) unsafe fn run<S: Simd, T>(&self, first_row: usize, out: &mut [f32])
    where
        O: Operand<T>,
    {
        let rows = self.rows;
        let last = (self.outputs - 1) * self.next_other + (self.steps - 1) * self.next_step + O::PER_LANE;
        assert!(self.lanes.len() >= self.steps * rows * O::PER_LANE && self.others.len() >= last);
        assert!(out.len() >= self.outputs * rows && self.has_kept());
        assert!(rows.is_multiple_of(PADDING) && first_row.is_multiple_of(PADDING));
        // As many outputs as there are registers for their sums.
        let most = if S::LANES == 8 { 6 } else { 12 };
        let mut at = first_row;
        while at < rows {
            let vectors = if at + 2 * S::LANES <= rows { 2 } else { 1 };
            let mut first = 0;
            while first < self.outputs {
                let n = tile_rows(self.outputs - first, most);
                // SAFETY: the asserts guarantee that all elements of a tile exist.
                unsafe {
                    match vectors {
                        2 => with_rows!(n, self.tile, S, T, 2, (at, first, out), 1 2 3 4 5 6 7 8 9 10 11 12),
                        _ => with_rows!(n, self.tile, S, T, 1, (at, first, out), 1 2 3 4 5 6 7 8 9 10 11 12),
                    }
                }
                first += n;
            }
            at += vectors * S::LANES;
        }
    }

    /// Whether there are as many factors of earlier sums as are needed.
    fn has_kept(&self) -> bool {
        match self.kept {
            Kept::None => true,
            Kept::OfRow(kept) => kept.len() >= self.rows,
            Kept::OfOutput(kept) => kept.len() >= self.outputs,
        }
    }

    /// Computes OUTPUTS outputs starting at `first`, for VECS vectors of rows starting at `at`.
    ///
    /// # Safety
    /// These outputs and rows exist, and the asserts of `run` have passed. The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn tile<S: Simd, T, const OUTPUTS: usize, const VECS: usize>(&self, at: usize, first: usize, out: &mut [f32])
    where
        O: Operand<T>,
    {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let out = out.as_mut_ptr().add(first * self.rows + at);
            let mut sums = [[S::splat(0.0); VECS]; OUTPUTS];
            if !matches!(self.kept, Kept::None) {
                sums = load_tile::<S, OUTPUTS, VECS>(out, self.rows);
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        let kept = match self.kept {
                            Kept::None => S::splat(1.0),
                            Kept::OfRow(kept) => S::load(kept.as_ptr().add(at + v * S::LANES)),
                            Kept::OfOutput(kept) => S::splat(*kept.as_ptr().add(first + i)),
                        };
                        *sum = S::mul(*sum, kept);
                    }
                }
            }
            for step in 0..self.steps {
                let lanes = self.lanes.as_ptr().add((step * self.rows + at) * O::PER_LANE);
                let others = self.others.as_ptr().add(first * self.next_other + step * self.next_step);
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        let lanes = lanes.add(v * S::LANES * O::PER_LANE);
                        *sum = O::dot::<S>(*sum, lanes, others.add(i * self.next_other));
                    }
                }
            }
            store_tile::<S, OUTPUTS, VECS>(out, self.rows, sums);
        }
    }
}

/// Calls `$self.$f::<S, T, OUTPUTS, VECS>` with OUTPUTS = `$n`, which must be one of the literals.
macro_rules! with_rows {
    ($n:expr, $self:ident.$f:ident, $s:ty, $t:ty, $vecs:literal, $args:tt, $($literal:literal)+) => {
        match $n {
            $($literal => $self.$f::<$s, $t, $literal, $vecs> $args,)+
            _ => unreachable!("a tile of {} outputs", $n),
        }
    };
}
use with_rows;
