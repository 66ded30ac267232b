//! Updates of parameters and sums: in place and on all threads for f32 on CPUs, in basic operations elsewhere.

use candle_core::{CpuStorage, DType, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, Tensor, Var};
use rayon::prelude::*;

use super::{
    lanes::{AddSquare, add_column_sums, each_in_parallel, lanes, total},
    passes::{fits, slice},
    trained::{Values, slice_mut},
};

/// One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) for one parameter.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// Factor of the gradient: one over the summed tokens, times that of clipping.
    pub factor: f64,
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// `1 - beta^step` of each moment.
    pub biases: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Learning rate.
    pub rate: f64,
    /// What the parameter is multiplied by first: `1 - rate * weight decay`.
    pub kept: f64,
}

lanes!(
    /// `target kept + x added`.
    Blend { kept, added } 1, |self, target, [x]| {
        S::mul_add(target, S::splat(self.kept), S::mul(x, S::splat(self.added)))
    }
);
lanes!(
    /// `target kept + x^2 added`.
    BlendSquare { kept, added } 1, |self, target, [x]| {
        S::mul_add(target, S::splat(self.kept), S::mul(S::mul(x, x), S::splat(self.added)))
    }
);

impl InplaceOp2 for Blend {
    fn name(&self) -> &'static str {
        "blend"
    }

    fn cpu_fwd(&self, target: &mut CpuStorage, l: &Layout, x: &CpuStorage, xl: &Layout) -> Result<()> {
        each_in_parallel(self, slice_mut(target, l)?, [slice(x, xl)?]);
        Ok(())
    }
}

impl InplaceOp2 for BlendSquare {
    fn name(&self) -> &'static str {
        "blend-square"
    }

    fn cpu_fwd(&self, target: &mut CpuStorage, l: &Layout, x: &CpuStorage, xl: &Layout) -> Result<()> {
        each_in_parallel(self, slice_mut(target, l)?, [slice(x, xl)?]);
        Ok(())
    }
}

/// Moves a parameter by its moments.
struct Move(AdamStep);

impl InplaceOp3 for Move {
    fn name(&self) -> &'static str {
        "adam-move"
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        l: &Layout,
        first: &CpuStorage,
        first_l: &Layout,
        second: &CpuStorage,
        second_l: &Layout,
    ) -> Result<()> {
        let (target, first, second) = (slice_mut(target, l)?, slice(first, first_l)?, slice(second, second_l)?);
        let AdamStep { biases: [of_first, of_second], eps, rate, kept, .. } = self.0;
        let [rate, eps, kept] = [rate / of_first, eps, kept].map(|x| x as f32);
        let of_second = (1.0 / of_second) as f32;
        const TASK: usize = 1 << 14;
        // Plain Rust, since the vector operations have no square root. The compiler vectorises it.
        target.par_chunks_mut(TASK).zip(first.par_chunks(TASK)).zip(second.par_chunks(TASK)).for_each(
            |((target, first), second)| {
                for ((w, m), v) in target.iter_mut().zip(first).zip(second) {
                    *w = *w * kept - rate * m / ((v * of_second).sqrt() + eps);
                }
            },
        );
        Ok(())
    }
}

impl AdamStep {
    /// Updates a parameter and its moments by its gradient. Errors are those of tensors of different shapes.
    pub fn apply(&self, parameter: &Var, gradient: &Tensor, moments: &mut (Tensor, Tensor)) -> Result<()> {
        let [beta1, beta2] = self.betas;
        if fits(parameter) && fits(gradient) {
            let (first, second) = &*moments;
            let f = self.factor;
            first.inplace_op2(gradient, &Blend { kept: beta1 as f32, added: ((1.0 - beta1) * f) as f32 })?;
            second.inplace_op2(gradient, &BlendSquare { kept: beta2 as f32, added: ((1.0 - beta2) * f * f) as f32 })?;
            return parameter.as_tensor().inplace_op3(first, second, &Move(*self));
        }
        let gradient = (gradient * self.factor)?;
        let first = ((&moments.0 * beta1)? + (&gradient * (1.0 - beta1))?)?;
        let second = ((&moments.1 * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let change = ((&first / self.biases[0])? / ((&second / self.biases[1])?.sqrt()? + self.eps)?)?;
        parameter.set(&((parameter.as_detached_tensor() * self.kept)? - (change * self.rate)?)?)?;
        *moments = (first, second);
        Ok(())
    }
}

/// Adds `x` to `sum`.
pub fn add_in_place(sum: &mut Tensor, x: &Tensor) -> Result<()> {
    if fits(sum) && fits(x) {
        return sum.inplace_op2(&x.contiguous()?, &Blend { kept: 1.0, added: 1.0 });
    }
    *sum = (&*sum + x)?;
    Ok(())
}

struct Zero;

impl InplaceOp1 for Zero {
    fn name(&self) -> &'static str {
        "zero"
    }

    fn cpu_fwd(&self, target: &mut CpuStorage, layout: &Layout) -> Result<()> {
        slice_mut(target, layout)?.par_chunks_mut(1 << 16).for_each(|chunk| chunk.fill(0.0));
        Ok(())
    }
}

/// Sets all values to 0.
pub fn zero_in_place(tensor: &mut Tensor) -> Result<()> {
    if fits(tensor) {
        return tensor.inplace_op1(&Zero);
    }
    *tensor = tensor.zeros_like()?;
    Ok(())
}

/// The sum of the squares of all values.
pub fn square_sum(x: &Tensor) -> Result<f64> {
    if fits(x) {
        // Fixed parts, so that the result does not depend on the threads.
        const PART: usize = 1 << 16;
        let values = Values::of(x)?;
        let parts: Vec<f64> = values.par_chunks(PART).map(|x| f64::from(total(&AddSquare {}, [x]))).collect();
        return Ok(parts.iter().sum());
    }
    Ok(f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?))
}

/// Sums of the columns of consecutive groups of rows of `x`, `[n, columns]`: one list for each of `lengths`, which add up to
/// `n`.
pub fn column_sums(x: &Tensor, lengths: &[usize]) -> Result<Vec<Vec<f32>>> {
    let (x, columns) = (x.to_dtype(DType::F32)?.contiguous()?, x.dim(1)?);
    let mut at = 0;
    let mut next = |length: usize| -> Result<Vec<f32>> {
        let rows = x.narrow(0, at, length)?;
        at += length;
        if !fits(&rows) {
            return rows.sum(0)?.to_vec1();
        }
        let mut sums = vec![0.0; columns];
        add_column_sums(&mut sums, &Values::of(&rows)?);
        Ok(sums)
    };
    lengths.iter().map(|length| next(*length)).collect()
}
