//! Linear layers and embeddings whose weights' gradients are added, in place, to sums that the caller keeps.
//!
//! candle's backward pass makes a new tensor for each gradient, adds it to zeros, and the caller adds it to those of
//! earlier batches: several passes over as much memory as the model has. Here, the product that computes a gradient adds
//! it to the sum itself. Only for f32 on CPUs.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, CustomOp1, InplaceOp1, InplaceOp2, Layout, Result, Shape, Storage, Tensor, bail};
use parking_lot::RwLockReadGuard;

use super::{
    lanes::{Add, add_column_sums, each, rows},
    passes::slice,
    product::{Matrix, Threads, Write, multiply},
};

/// The `f32` data of a contiguous CPU tensor, for writing.
pub(super) fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
        bail!("an operation in place needs contiguous f32, not {:?}", layout.shape());
    };
    Ok(&mut data[start..end])
}

/// The `f32` data of a contiguous CPU tensor, locked for reading.
pub(super) struct Values<'a> {
    storage: RwLockReadGuard<'a, Storage>,
    range: Range<usize>,
}

impl<'a> Values<'a> {
    pub(super) fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            bail!("expected contiguous f32 on the CPU, not {:?} in {:?}", tensor.shape(), tensor.dtype());
        };
        Ok(Self { storage, range: start..end })
    }
}

impl Deref for Values<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.range.clone()],
            // `of` makes no others.
            _ => &[],
        }
    }
}

/// Adds a product to a sum of as many rows and columns.
pub(super) struct AddProductOf<'a>(pub(super) Matrix<'a>, pub(super) Matrix<'a>);

impl InplaceOp1 for AddProductOf<'_> {
    fn name(&self) -> &'static str {
        "add-product"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let columns = layout.shape().dims2()?.1;
        multiply(self.0, self.1, slice_mut(sum, layout)?, columns, Write::Add, Threads::All);
        Ok(())
    }
}

/// Adds the sum of each column of rows of as many values.
pub(super) struct AddColumnSums<'a>(pub(super) &'a [f32]);

impl InplaceOp1 for AddColumnSums<'_> {
    fn name(&self) -> &'static str {
        "add-column-sums"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, layout: &Layout) -> Result<()> {
        add_column_sums(slice_mut(sum, layout)?, self.0);
        Ok(())
    }
}

/// A parameter, and the sum of its gradients.
#[derive(Clone, Debug)]
pub(super) struct Summed {
    pub(super) value: Tensor,
    pub(super) sum: Tensor,
}

/// `x W^T + b` of rows `x` of as many values as `W` has columns.
pub(super) fn linear(x: &[f32], weight: &Summed, bias: Option<&Summed>) -> Result<Vec<f32>> {
    let (outputs, inputs) = weight.value.dims2()?;
    let n = x.len() / inputs;
    let mut out = vec![0.0; n * outputs];
    let values = Values::of(&weight.value)?;
    let weight = Matrix::dense(&values, outputs, inputs).t();
    multiply(Matrix::dense(x, n, inputs), weight, &mut out, outputs, Write::Replace, Threads::All);
    if let Some(bias) = bias {
        let bias: &[f32] = &Values::of(&bias.value)?;
        rows(&mut out, outputs, |_, row| each(&Add {}, row, [bias]));
    }
    Ok(out)
}

/// Writes or adds the gradient of [`linear`] by `x` to `dx`, and adds those of weight and bias to their sums. `g` is that of
/// the result.
pub(super) fn linear_back(
    x: &[f32],
    weight: &Summed,
    bias: Option<&Summed>,
    g: &[f32],
    (dx, write): (&mut [f32], Write),
) -> Result<()> {
    let (outputs, inputs) = weight.value.dims2()?;
    let n = x.len() / inputs;
    let (of_x, of_g) = (Matrix::dense(x, n, inputs), Matrix::dense(g, n, outputs));
    weight.sum.inplace_op1(&AddProductOf(of_g.t(), of_x))?;
    if let Some(bias) = bias {
        bias.sum.inplace_op1(&AddColumnSums(g))?;
    }
    let values = Values::of(&weight.value)?;
    multiply(of_g, Matrix::dense(&values, outputs, inputs), dx, inputs, write, Threads::All);
    Ok(())
}

/// Selects rows of an embedding `[vocab, hidden]`, and adds their gradients to a sum. The embedding itself gets none from
/// `backward`.
pub(super) struct TrainedEmbedding {
    /// Below `vocab`.
    pub(super) tokens: Vec<u32>,
    /// As large as the embedding.
    pub(super) sum: Tensor,
}

impl CustomOp1 for TrainedEmbedding {
    fn name(&self) -> &'static str {
        "train-embedding"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((vocab, width), embedding) = (l.shape().dims2()?, slice(s, l)?);
        if let Some(token) = self.tokens.iter().find(|token| **token as usize >= vocab) {
            bail!("token {token} of a vocabulary of {vocab}");
        }
        let mut out = vec![0.0; self.tokens.len() * width];
        for (row, token) in out.chunks_exact_mut(width).zip(&self.tokens) {
            row.copy_from_slice(&embedding[*token as usize * width..][..width]);
        }
        Ok((CpuStorage::F32(out), (self.tokens.len(), width).into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.sum.inplace_op2(&grad.contiguous()?, &AddRows(&self.tokens))?;
        Ok(None)
    }
}

/// Adds row i to row `tokens[i]`.
struct AddRows<'a>(&'a [u32]);

impl InplaceOp2 for AddRows<'_> {
    fn name(&self) -> &'static str {
        "add-rows"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, sum_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        let (width, sum, x) = (x_l.shape().dims2()?.1, slice_mut(sum, sum_l)?, slice(x, x_l)?);
        for (row, token) in x.chunks_exact(width).zip(self.0) {
            each(&Add {}, &mut sum[*token as usize * width..][..width], [row]);
        }
        Ok(())
    }
}
