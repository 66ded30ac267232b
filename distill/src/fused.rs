//! Differentiable softmax and cross-entropy, each in one pass over memory on CPUs.
//!
//! A softmax of basic operations is half a dozen element-wise passes, and each costs two more passes in the backward
//! direction. At the demo's sizes these passes dominate the training time, not the matrix products. Each operation also
//! has a plain form for other devices and types. Tests check that both forms agree, gradients included.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Layout, Result, Shape, Tensor, bail};

/// Returns the `f32` data of a contiguous CPU tensor.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let data = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("fused operation on a strided tensor {:?}", layout.shape()),
    }
}

fn fits(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// Mask of keys that a query may see. The key columns are `prompt` columns, then `past` columns that every query of the
/// row sees, then one column per query.
#[derive(Clone, Debug)]
pub struct Visibility {
    /// Number of prompt columns, padding included.
    pub prompt: usize,
    /// Number of valid prompt columns per batch row.
    pub prompt_lengths: Vec<usize>,
    /// Number of columns between the prompt and the queries' own columns.
    pub past: usize,
    /// Number of queries, and of their own key columns, per batch row.
    pub queries: usize,
    /// Number of tokens that a query sees, itself included; `usize::MAX`: all.
    pub window: usize,
}

impl Visibility {
    fn columns(&self) -> usize {
        self.prompt + self.past + self.queries
    }

    /// Columns that query `t` of batch row `b` sees.
    fn visible(&self, b: usize, t: usize) -> [std::ops::Range<usize>; 2] {
        let (prompt, own) = (self.prompt_lengths[b], self.past + t + 1);
        // Positions before this one are outside of the window.
        let first = (prompt + own).saturating_sub(self.window);
        [first.min(prompt)..prompt, self.prompt + first.saturating_sub(prompt)..self.prompt + own]
    }

    /// Additive mask, `[batch, 1, queries, columns]`: 0 if the key is visible, else `-inf`.
    fn bias(&self, like: &Tensor) -> Result<Tensor> {
        let mut data = Vec::with_capacity(self.prompt_lengths.len() * self.queries * self.columns());
        for b in 0..self.prompt_lengths.len() {
            for t in 0..self.queries {
                let visible = self.visible(b, t);
                let seen = |c| visible.iter().any(|range| range.contains(&c));
                data.extend((0..self.columns()).map(|c| if seen(c) { 0f32 } else { f32::NEG_INFINITY }));
            }
        }
        Tensor::from_vec(data, (self.prompt_lengths.len(), 1, self.queries, self.columns()), like.device())
    }
}

struct MaskedSoftmax {
    visibility: Arc<Visibility>,
    scale: f32,
}

impl MaskedSoftmax {
    /// Calls `f(batch row, query, tensor row)` for each row of a `[batch, heads, groups * queries, columns]` tensor.
    fn rows(&self, dims: &[usize], mut f: impl FnMut(usize, usize, usize)) {
        let per_batch: usize = dims[1..dims.len() - 1].iter().product();
        for row in 0..dims[0] * per_batch {
            f(row / per_batch, row % self.visibility.queries, row);
        }
    }
}

impl CustomOp1 for MaskedSoftmax {
    fn name(&self) -> &'static str {
        "masked-softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (src, columns) = (slice(storage, layout)?, self.visibility.columns());
        let mut dst = vec![0f32; src.len()];
        self.rows(layout.dims(), |b, t, row| {
            let src = &src[row * columns..][..columns];
            let dst = &mut dst[row * columns..][..columns];
            let parts = self.visibility.visible(b, t);
            let mut max = f32::NEG_INFINITY;
            for p in &parts {
                max = src[p.clone()].iter().fold(max, |m, x| m.max(*x));
            }
            let mut sum = 0f32;
            for p in &parts {
                for (d, s) in dst[p.clone()].iter_mut().zip(&src[p.clone()]) {
                    *d = ((s - max) * self.scale).exp();
                    sum += *d;
                }
            }
            let inverse = 1.0 / sum;
            for p in &parts {
                dst[p.clone()].iter_mut().for_each(|d| *d *= inverse);
            }
        });
        Ok((CpuStorage::F32(dst), layout.shape().clone()))
    }

    fn bwd(&self, _arg: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let op = SoftmaxGrad(MaskedSoftmax { visibility: self.visibility.clone(), scale: self.scale });
        Ok(Some(res.apply_op2_no_bwd(&grad.contiguous()?, &op)?))
    }
}

struct SoftmaxGrad(MaskedSoftmax);

impl CustomOp2 for SoftmaxGrad {
    fn name(&self) -> &'static str {
        "masked-softmax-grad"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, gs: &CpuStorage, gl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (res, grad) = (slice(s, l)?, slice(gs, gl)?);
        let columns = self.0.visibility.columns();
        let mut dst = vec![0f32; res.len()];
        self.0.rows(l.dims(), |b, t, row| {
            let at = row * columns;
            let (res, grad, dst) = (&res[at..at + columns], &grad[at..at + columns], &mut dst[at..at + columns]);
            let parts = self.0.visibility.visible(b, t);
            let mut dot = 0f32;
            for p in &parts {
                dot += res[p.clone()].iter().zip(&grad[p.clone()]).map(|(r, g)| r * g).sum::<f32>();
            }
            for p in &parts {
                for ((d, r), g) in dst[p.clone()].iter_mut().zip(&res[p.clone()]).zip(&grad[p.clone()]) {
                    *d = r * (g - dot) * self.0.scale;
                }
            }
        });
        Ok((CpuStorage::F32(dst), l.shape().clone()))
    }
}

/// Computes `softmax(scale * scores)` over the visible columns.
///
/// `scores` is `[batch, kv_heads, groups * queries, columns]`. Groups are the outer dimension of the third axis.
pub fn masked_softmax(scores: &Tensor, visibility: &Arc<Visibility>, scale: f32) -> Result<Tensor> {
    if fits(scores) {
        return scores.contiguous()?.apply_op1(MaskedSoftmax { visibility: visibility.clone(), scale });
    }
    plain_softmax(scores, visibility, scale)
}

fn plain_softmax(scores: &Tensor, visibility: &Visibility, scale: f32) -> Result<Tensor> {
    let (b, kv, rows, columns) = scores.dims4()?;
    let queries = visibility.queries;
    let wide = scores.to_dtype(DType::F32)?.reshape((b, kv * rows / queries, queries, columns))?;
    let biased = (wide * f64::from(scale))?.broadcast_add(&visibility.bias(scores)?)?;
    let exp = biased.broadcast_sub(&biased.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let out = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
    out.reshape((b, kv, rows, columns))?.to_dtype(scores.dtype())
}

struct CrossEntropy {
    targets: Arc<Vec<u32>>,
}

fn log_sum_exp(row: &[f32]) -> f32 {
    let max = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    max + row.iter().map(|x| (x - max).exp()).sum::<f32>().ln()
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "train-cross-entropy"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, width) = (slice(s, l)?, l.dims()[1]);
        let rows = x.chunks_exact(width).zip(self.targets.iter());
        // Summed in f64, so that the logged loss does not depend on how a batch is split.
        let sum: f64 = rows.map(|(row, t)| f64::from(log_sum_exp(row) - row[*t as usize])).sum();
        Ok((CpuStorage::F32(vec![sum as f32]), Shape::from(())))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let op = CrossEntropyGrad { targets: self.targets.clone(), grad: grad.to_scalar()? };
        Ok(Some(x.apply_op1_no_bwd(&op)?))
    }
}

struct CrossEntropyGrad {
    targets: Arc<Vec<u32>>,
    grad: f32,
}

impl CustomOp1 for CrossEntropyGrad {
    fn name(&self) -> &'static str {
        "train-cross-entropy-grad"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, width) = (slice(s, l)?, l.dims()[1]);
        let mut out = Vec::with_capacity(x.len());
        for (row, t) in x.chunks_exact(width).zip(self.targets.iter()) {
            let (at, lse) = (out.len() + *t as usize, log_sum_exp(row));
            out.extend(row.iter().map(|v| (v - lse).exp() * self.grad));
            out[at] -= self.grad;
        }
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }
}

/// Computes the negative log-probability of each row's target, summed over rows.
///
/// `logits` is `[n, vocab]`. Every target must be below `vocab`.
pub fn cross_entropy_sum(logits: &Tensor, targets: Vec<u32>) -> Result<Tensor> {
    let (n, vocab) = logits.dims2()?;
    if targets.len() != n || targets.iter().any(|t| *t as usize >= vocab) {
        bail!("cross entropy: {} targets for {n} rows of {vocab} logits", targets.len());
    }
    if fits(logits) {
        return logits.contiguous()?.apply_op1(CrossEntropy { targets: Arc::new(targets) });
    }
    plain_cross_entropy(logits, targets)
}

fn plain_cross_entropy(logits: &Tensor, targets: Vec<u32>) -> Result<Tensor> {
    let n = logits.dim(0)?;
    let wide = logits.to_dtype(DType::F32)?;
    let shifted = wide.broadcast_sub(&wide.max_keepdim(1)?.detach())?;
    let lse = shifted.exp()?.sum_keepdim(1)?.log()?;
    let targets = Tensor::from_vec(targets, (n, 1), logits.device())?;
    (lse - shifted.gather(&targets, 1)?)?.sum_all()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn gap(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn softmax_equals_basic_operations_gradients_included() {
        let visibility =
            Arc::new(Visibility { prompt: 3, prompt_lengths: vec![3, 1], past: 1, queries: 2, window: usize::MAX });
        let scores = Var::randn(0f32, 1f32, (2, 2, 4, 6), &Device::Cpu).unwrap();
        let weights = Tensor::randn(0f32, 1f32, (2, 2, 4, 6), &Device::Cpu).unwrap();
        let run = |f: &dyn Fn() -> Tensor| {
            let out = f();
            let grads = (&out * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            (out, grads.get(&scores).unwrap().clone())
        };
        let fused = run(&|| masked_softmax(&scores, &visibility, 0.5).unwrap());
        let plain = run(&|| plain_softmax(&scores, &visibility, 0.5).unwrap());
        assert!(gap(&fused.0, &plain.0) < 1e-6 && gap(&fused.1, &plain.1) < 1e-6);
        // Row 1 sees one prompt column of three, the past, and itself.
        let row = fused.0.to_vec3_row();
        assert!(row[1] == 0.0 && row[2] == 0.0 && row[5] == 0.0 && row[0] > 0.0 && row[3] > 0.0 && row[4] > 0.0);
    }

    trait FirstRow {
        fn to_vec3_row(&self) -> Vec<f32>;
    }

    impl FirstRow for Tensor {
        fn to_vec3_row(&self) -> Vec<f32> {
            self.get(1).unwrap().get(0).unwrap().get(0).unwrap().to_vec1().unwrap()
        }
    }

    #[test]
    fn loss_equals_basic_operations_gradients_included() {
        let logits = Var::randn(0f32, 2f32, (4, 5), &Device::Cpu).unwrap();
        let targets = vec![0, 4, 2, 2];
        let fused = cross_entropy_sum(&logits, targets.clone()).unwrap();
        let plain = plain_cross_entropy(&logits, targets).unwrap();
        assert!(gap(&fused, &plain) < 1e-4);
        let of = |loss: &Tensor| (loss / 3.0).unwrap().backward().unwrap().get(&logits).unwrap().clone();
        assert!(gap(&of(&fused), &of(&plain)) < 1e-5);
        assert!(cross_entropy_sum(&logits, vec![5, 0, 0, 0]).is_err());
    }
}
