//! Cross-entropy of the output layer, which never holds the logits of all tokens.
//!
//! Logits of one token take as much memory as the vocabulary, and most of their gradients' time is spent on moving them.
//! So the loss of some tokens at a time is computed together with its gradients, which take the place of the logits. They
//! are multiplied into the gradients of the hidden states and of the weights at once (as in Liger Kernel, arXiv
//! 2410.10989).

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{
    lanes::{AddExp, ExpShifted, each, greatest, total},
    passes::{norm, norm_back, norm_weights_back},
    product::{Matrix, Threads, Write, multiply},
    trained::{AddColumnSums, AddProductOf, Values},
};

/// Most bytes of logits at a time.
const CHUNK_BYTES: usize = 64 << 20;
/// Fewest tokens at a time.
const FEWEST_ROWS: usize = 16;

/// Tokens whose logits are computed at a time.
pub(crate) fn loss_rows(vocab: usize) -> usize {
    (CHUNK_BYTES / 4 / vocab).max(FEWEST_ROWS)
}

/// The output layer: logits are `cap(scale norm(x) W^T)`.
pub(super) struct Output<'a> {
    /// Weights of the norm before it, `[hidden]`.
    pub(super) norm: &'a Tensor,
    /// Added to the mean square in the norm.
    pub(super) eps: f32,
    /// `[vocab, hidden]`.
    pub(super) weight: &'a Tensor,
    /// Sums of the gradients of `norm` and `weight`. `None`: no gradients are wanted.
    pub(super) sums: Option<[&'a Tensor; 2]>,
    /// Factor of the logits.
    pub(super) scale: f32,
    /// Soft cap of the logits.
    pub(super) cap: Option<f32>,
}

/// The loss, whose gradient is known already.
struct Known {
    loss: f32,
    gradient: Tensor,
}

impl CustomOp1 for Known {
    fn name(&self) -> &'static str {
        "train-cross-entropy"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.loss]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let factor = grad.to_scalar::<f32>()?;
        if factor != 1.0 {
            bail!("cross entropy: its gradient is multiplied by {factor}, but the weights' has been summed already");
        }
        Ok(Some(self.gradient.clone()))
    }
}

/// Negative log-probability of each row's target, summed over the rows of `x`, `[n, hidden]` in f32 on the CPU. Adds the
/// gradients of norm and weights of that sum, so `backward` must start from the result itself.
pub(super) fn cross_entropy(x: &Tensor, output: &Output<'_>, targets: &[u32]) -> Result<Tensor> {
    let ((n, hidden), vocab) = (x.dims2()?, output.weight.dim(0)?);
    let x = x.contiguous()?;
    let mut gradient = vec![0.0; if output.sums.is_some() { n * hidden } else { 0 }];
    let some = loss_rows(vocab).min(n.max(1));
    let mut logits = vec![0.0; some * vocab];
    // Summed in f64, so that the logged loss does not depend on how a batch is split.
    let mut loss = 0.0;
    let (hidden_states, norm_weights) = (Values::of(&x)?, Values::of(output.norm)?);
    let values = norm(&hidden_states, &norm_weights, output.eps);
    let weight = Values::of(output.weight)?;
    let weight = Matrix::dense(&weight, vocab, hidden);
    for (i, targets) in targets.chunks(some).enumerate() {
        let (at, rows) = (i * some * hidden, targets.len());
        let inputs = Matrix::dense(&values[at..], rows, hidden);
        let logits = &mut logits[..rows * vocab];
        multiply(inputs, weight.t(), logits, vocab, Write::Replace, Threads::All);
        let rows_and_targets = logits.par_chunks_exact_mut(vocab).zip(targets);
        let losses: Vec<f64> =
            rows_and_targets.map(|(row, target)| output.loss_of_row(row, *target as usize)).collect();
        loss += losses.iter().sum::<f64>();
        if let Some([_, sum]) = output.sums {
            let logits = Matrix::dense(logits, rows, vocab);
            let gradient = &mut gradient[at..at + rows * hidden];
            multiply(logits, weight, gradient, hidden, Write::Replace, Threads::All);
            sum.inplace_op1(&AddProductOf(logits.t(), inputs))?;
        }
    }
    let Some([sum, _]) = output.sums else { return Tensor::new(loss as f32, x.device()) };
    let of_weights = norm_weights_back(&hidden_states, hidden, output.eps, &gradient);
    sum.inplace_op1(&AddColumnSums(&of_weights))?;
    let gradient = norm_back(&hidden_states, &norm_weights, output.eps, &gradient);
    let gradient = Tensor::from_vec(gradient, (n, hidden), x.device())?;
    drop((hidden_states, norm_weights));
    x.apply_op1(Known { loss: loss as f32, gradient })
}

impl Output<'_> {
    /// The loss of one row. If gradients are wanted, they take the place of the products `x W^T`.
    fn loss_of_row(&self, row: &mut [f32], target: usize) -> f64 {
        if self.scale != 1.0 {
            row.iter_mut().for_each(|x| *x *= self.scale);
        }
        if let Some(cap) = self.cap {
            row.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
        let max = greatest(row);
        let log_sum = max + total(&AddExp { scale: 1.0, max }, [row]).ln();
        let loss = f64::from(log_sum - row[target]);
        if self.sums.is_none() {
            return loss;
        }
        let slopes = self.cap.map(|cap| row.iter().map(|x| 1.0 - (x / cap) * (x / cap)).collect::<Vec<_>>());
        each(&ExpShifted { scale: 1.0, max: log_sum }, row, []);
        row[target] -= 1.0;
        if let Some(slopes) = slopes {
            row.iter_mut().zip(slopes).for_each(|(x, slope)| *x *= slope);
        }
        if self.scale != 1.0 {
            row.iter_mut().for_each(|x| *x *= self.scale);
        }
        loss
    }
}

/// [`cross_entropy`] of logits `[n, vocab]`, in basic operations.
pub(super) fn plain_cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let wide = logits.to_dtype(DType::F32)?;
    let shifted = wide.broadcast_sub(&wide.max_keepdim(1)?.detach())?;
    let lse = shifted.exp()?.sum_keepdim(1)?.log()?;
    let targets = Tensor::from_slice(targets, (targets.len(), 1), logits.device())?;
    (lse - shifted.gather(&targets, 1)?)?.sum_all()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::tensor::{passes::rms_norm, soft_cap};

    fn gap(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn loss_equals_basic_operations_gradients_included() {
        let random = |shape: &[usize]| Var::randn(0f32, 2f32, shape, &Device::Cpu).unwrap();
        let (x, w, norm) = (random(&[40, 3]), random(&[5, 3]), random(&[3]));
        let targets: Vec<u32> = (0..40).map(|i| i * 7 % 5).collect();
        for (scale, cap) in [(1.0, None), (0.5, Some(2.0))] {
            let normed = rms_norm(&x, &norm, 1e-5).unwrap();
            let mut logits = (normed.matmul(&w.t().unwrap()).unwrap() * f64::from(scale)).unwrap();
            if let Some(cap) = cap {
                logits = soft_cap(&logits, f64::from(cap)).unwrap();
            }
            let plain = plain_cross_entropy(&logits, &targets).unwrap();
            let expected = plain.backward().unwrap();
            let sums = [norm.zeros_like().unwrap(), w.zeros_like().unwrap()];
            let (weight, norm_weights) = (w.as_detached_tensor(), norm.as_detached_tensor());
            let output =
                Output { norm: &norm_weights, eps: 1e-5, weight: &weight, sums: Some(sums.each_ref()), scale, cap };
            let fused = cross_entropy(&x, &output, &targets).unwrap();
            assert!(gap(&fused, &plain) < 1e-3);
            let got = fused.backward().unwrap();
            assert!(gap(got.get(&x).unwrap(), expected.get(&x).unwrap()) < 1e-4);
            assert!(gap(&sums[0], expected.get(&norm).unwrap()) < 1e-4);
            assert!(gap(&sums[1], expected.get(&w).unwrap()) < 1e-4);
            let alone = cross_entropy(&x, &Output { sums: None, ..output }, &targets).unwrap();
            assert_eq!(gap(&alone, &fused), 0.0);
            let half = (cross_entropy(&x, &output, &targets).unwrap() * 0.5).unwrap();
            assert!(half.backward().unwrap_err().to_string().contains("multiplied by 0.5"));
        }
    }
}
