//! Linear layers and embeddings whose weights' gradients are added, in place, to sums that the caller keeps.
//!
//! candle's backward pass makes a new tensor for each gradient, adds it to zeros, and the caller adds it to those of
//! earlier batches: several passes over as much memory as the model has. Here, the product that computes a gradient adds
//! it to the sum itself. Only for f32 on CPUs.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, CustomOp1, InplaceOp1, InplaceOp2, Layout, Result, Shape, Storage, Tensor, bail};
use parking_lot::RwLockReadGuard;

use super::{
    differentiable::slice,
    lanes::{Add, add_column_sums, each, rows},
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

/// Adds the sum of each column.
struct AddColumnSums;

impl InplaceOp2 for AddColumnSums {
    fn name(&self) -> &'static str {
        "add-column-sums"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, sum_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        add_column_sums(slice_mut(sum, sum_l)?, slice(x, x_l)?);
        Ok(())
    }
}

/// `y = x W^T + b` with sums of the gradients of `W` and `b`.
pub(super) struct TrainedLinear {
    /// `[out, in]`, and the sum of its gradients.
    pub(super) weight: [Tensor; 2],
    /// `[out]`, and the sum of its gradients.
    pub(super) bias: Option<[Tensor; 2]>,
}

impl CustomOp1 for TrainedLinear {
    fn name(&self) -> &'static str {
        "train-linear"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((n, inputs), outputs) = (l.shape().dims2()?, self.weight[0].dim(0)?);
        let (x, mut out) = (slice(s, l)?, vec![0.0; n * outputs]);
        let weight = Values::of(&self.weight[0])?;
        let weight = Matrix::dense(&weight, outputs, inputs).t();
        multiply(Matrix::dense(x, n, inputs), weight, &mut out, outputs, Write::Replace, Threads::All);
        if let Some([bias, _]) = &self.bias {
            let bias = Values::of(bias)?;
            rows(&mut out, outputs, |_, row| each(&Add {}, row, [&bias]));
        }
        Ok((CpuStorage::F32(out), (n, outputs).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let [weight, sum] = &self.weight;
        let ((n, outputs), inputs) = (grad.dims2()?, x.dim(1)?);
        let (of_outputs, of_inputs) = (Values::of(&grad)?, Values::of(x)?);
        let of_outputs = Matrix::dense(&of_outputs, n, outputs).t();
        sum.inplace_op1(&AddProductOf(of_outputs, Matrix::dense(&of_inputs, n, inputs)))?;
        if let Some([_, sum]) = &self.bias {
            sum.inplace_op2(&grad, &AddColumnSums)?;
        }
        Ok(Some(grad.matmul(weight)?))
    }
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
