//! Norm, gate and rope, each as one pass over memory on all threads, and the passes of their gradients.
//!
//! In basic operations, a norm takes about six passes, and each of them costs two more when gradients are accumulated. For
//! small models on a CPU, these passes take more time than the matrix products. Other devices and types use the plain form,
//! and so do tensors that record operations for candle's backward pass. Tests compare the two.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::lanes::{self, AddProduct3, AddSquare, add_column_sums, each, each_in_parallel, lanes, rows, total};
use crate::Activation;

/// The `f32` data of a contiguous CPU tensor.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let data = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("fused operation on a strided tensor {:?}", layout.shape()),
    }
}

/// Whether a tensor is f32 on the CPU.
pub(super) fn fits(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// Whether one pass does: f32 on the CPU, and candle records no operations for gradients.
pub(super) fn fuses(x: &Tensor) -> bool {
    fits(x) && !x.track_op()
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (total(&AddSquare {}, [x]) / x.len() as f32 + eps).sqrt()
}

lanes!(
    /// `x w factor`.
    Normed { factor } 2, |self, _, [x, w]| S::mul(S::mul(x, S::splat(self.factor)), w)
);
lanes!(
    /// The gradient of a norm by its input: `g w inverse - x pull`.
    NormedBack { inverse, pull } 3, |self, _, [x, w, g]| {
        let direct = S::mul(S::mul(g, w), S::splat(self.inverse));
        S::sub(direct, S::mul(x, S::splat(self.pull)))
    }
);

lanes!(
    /// `target + x y factor`.
    AddScaledProduct { factor } 2, |self, target, [x, y]| S::mul_add(S::mul(x, S::splat(self.factor)), y, target)
);

/// Root-mean-square norm of rows as wide as `w`, times `w` (Zhang & Sennrich, arXiv 1910.07467).
pub(super) fn norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let width = w.len();
    let mut out = vec![0.0; x.len()];
    rows(&mut out, width, |i, out| {
        let row = &x[i * width..][..width];
        each(&Normed { factor: inverse_rms(row, eps) }, out, [row, w]);
    });
    out
}

/// The gradient of [`norm`] by `x`, if that by its result is `g`.
pub(super) fn norm_back(x: &[f32], w: &[f32], eps: f32, g: &[f32]) -> Vec<f32> {
    let width = w.len();
    let mut out = vec![0.0; x.len()];
    rows(&mut out, width, |i, out| {
        let (x, g) = (&x[i * width..][..width], &g[i * width..][..width]);
        let inverse = inverse_rms(x, eps);
        let pull = total(&AddProduct3 {}, [x, g, w]) * inverse * inverse * inverse / width as f32;
        each(&NormedBack { inverse, pull }, out, [x, w, g]);
    });
    out
}

/// The gradient of [`norm`] by its `width` weights.
pub(super) fn norm_weights_back(x: &[f32], width: usize, eps: f32, g: &[f32]) -> Vec<f32> {
    // Partial sums over fixed numbers of rows, so that the result does not depend on the threads.
    const ROWS: usize = 64;
    let part = |(x, g): (&[f32], &[f32])| {
        let mut sums = vec![0.0; width];
        for (x, g) in x.chunks_exact(width).zip(g.chunks_exact(width)) {
            each(&AddScaledProduct { factor: inverse_rms(x, eps) }, &mut sums, [x, g]);
        }
        sums
    };
    let parts: Vec<Vec<f32>> = x.par_chunks(ROWS * width).zip(g.par_chunks(ROWS * width)).map(part).collect();
    let mut out = vec![0.0; width];
    add_column_sums(&mut out, &parts.concat());
    out
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm-in-one-pass"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, ws: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(norm(slice(s, l)?, slice(ws, wl)?, self.eps)), l.shape().clone()))
    }
}

/// Root-mean-square norm over the last axis of `x` (any rank), times `weight`.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if fuses(x) && fuses(weight) {
        return x.contiguous()?.apply_op2_no_bwd(weight, &RmsNorm { eps: eps as f32 });
    }
    plain_rms_norm(x, weight, eps)
}

fn plain_rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    wide.broadcast_div(&scale)?.to_dtype(x.dtype())?.broadcast_mul(weight)
}

// Both activations are `x sigmoid(u(x))`: with u(x) = x, or with u(x) = linear x + cubic x^3.
lanes!(
    /// `x sigmoid(linear x + cubic x^3) y`.
    Gated { linear, cubic } 2, |self, _, [x, y]| {
        let square = S::mul(x, x);
        let u = S::mul(x, S::mul_add(square, S::splat(self.cubic), S::splat(self.linear)));
        // `S::exp` is accurate up to x = 88. The sigmoid of values below -88 is 0 anyway.
        let exp = S::exp(S::sub(S::splat(0.0), S::max(u, S::splat(-88.0))));
        S::mul(S::div(x, S::add(S::splat(1.0), exp)), y)
    }
);
lanes!(
    /// The gradient of [`Gated`] by `x`, times `g`.
    GatedBack { linear, cubic } 3, |self, _, [x, y, g]| {
        let (one, square) = (S::splat(1.0), S::mul(x, x));
        let u = S::mul(x, S::mul_add(square, S::splat(self.cubic), S::splat(self.linear)));
        let slope = S::mul_add(square, S::splat(3.0 * self.cubic), S::splat(self.linear));
        let exp = S::exp(S::sub(S::splat(0.0), S::max(u, S::splat(-88.0))));
        let sigmoid = S::div(one, S::add(one, exp));
        let bend = S::mul(S::mul(x, slope), S::sub(one, sigmoid));
        S::mul(S::mul(S::mul_add(sigmoid, bend, sigmoid), y), g)
    }
);

/// `linear` and `cubic` of an activation's [`Gated`].
fn argument(activation: Activation) -> (f32, f32) {
    // 2 sqrt(2 / pi)
    const FACTOR: f32 = 1.595_769;
    match activation {
        Activation::Silu => (1.0, 0.0),
        Activation::GeluTanh => (FACTOR, 0.044_715 * FACTOR),
    }
}

/// `activation(gate) * up` (Shazeer, arXiv 2002.05202).
pub(super) fn gated(gate: &[f32], up: &[f32], activation: Activation) -> Vec<f32> {
    let (linear, cubic) = argument(activation);
    let mut out = vec![0.0; gate.len()];
    each_in_parallel(&Gated { linear, cubic }, &mut out, [gate, up]);
    out
}

/// The gradients of [`gated`] by `gate` and by `up`, if that by its result is `g`.
pub(super) fn gated_back(gate: &[f32], up: &[f32], activation: Activation, g: &[f32]) -> [Vec<f32>; 2] {
    let (linear, cubic) = argument(activation);
    let mut of_gate = vec![0.0; gate.len()];
    each_in_parallel(&GatedBack { linear, cubic }, &mut of_gate, [gate, up, g]);
    [of_gate, gated(gate, g, activation)]
}

struct GateMul {
    activation: Activation,
}

impl CustomOp2 for GateMul {
    fn name(&self) -> &'static str {
        "gate-in-one-pass"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, us: &CpuStorage, ul: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(gated(slice(s, l)?, slice(us, ul)?, self.activation)), l.shape().clone()))
    }
}

/// `activation(gate) * up`, element by element.
pub(super) fn gate_mul(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if fuses(gate) && fuses(up) {
        return gate.contiguous()?.apply_op2_no_bwd(&up.contiguous()?, &GateMul { activation });
    }
    plain_gate_mul(gate, up, activation)
}

fn plain_gate_mul(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => gate.silu()? * up,
        // candle's `gelu` is the approximation with tanh.
        Activation::GeluTanh => gate.gelu()? * up,
    }
}

/// Rotates the leading channels of heads of `width` channels, of which each token has `row`: their first half with their
/// second (Su et al., arXiv 2104.09864, in Hugging Face's order). `cos` and `sin` have half as many values per token as
/// channels are rotated. With `back`, rotates back, which is also the gradient.
pub(super) fn rotated(x: &[f32], [row, width]: [usize; 2], [cos, sin]: [&[f32]; 2], back: bool) -> Vec<f32> {
    let half = cos.len() * row / x.len().max(1);
    let sign = if back { -1.0 } else { 1.0 };
    let mut out = vec![0.0; x.len()];
    lanes::rows(&mut out, row, |token, out| {
        let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
        for (x, out) in x[token * row..][..row].chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let (first, rest) = x.split_at(half);
            let (second, rest) = rest.split_at(half);
            let (to_first, to_rest) = out.split_at_mut(half);
            let (to_second, to_rest) = to_rest.split_at_mut(half);
            for i in 0..half {
                to_first[i] = first[i] * cos[i] - sign * second[i] * sin[i];
                to_second[i] = second[i] * cos[i] + sign * first[i] * sin[i];
            }
            to_rest.copy_from_slice(rest);
        }
    });
    out
}

struct Rope;

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope-in-one-pass"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        l: &Layout,
        cs: &CpuStorage,
        cl: &Layout,
        ss: &CpuStorage,
        sl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, heads, width) = l.shape().dims3()?;
        let out = rotated(slice(s, l)?, [heads * width, width], [slice(cs, cl)?, slice(ss, sl)?], false);
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }
}

/// Rotates the leading channels of `x`, `[n, heads, head_dim]`: their first half with their second. `cos` and `sin` are
/// `[n, rotary_dim / 2]` and receive no gradient.
pub(super) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if fuses(x) && fuses(cos) && fuses(sin) {
        return x.contiguous()?.apply_op3_no_bwd(cos, sin, &Rope);
    }
    plain_rope(x, cos, sin)
}

fn plain_rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (half, width) = (cos.dim(1)?, x.dim(2)?);
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    match width - 2 * half {
        0 => Tensor::cat(&[first, second], 2),
        rest => Tensor::cat(&[first, second, x.narrow(2, 2 * half, rest)?], 2),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::tensor::trained::Values;

    fn random(shape: &[usize]) -> Var {
        Var::randn(0f32, 1f32, shape, &Device::Cpu).unwrap()
    }

    fn close(got: &[f32], expected: &Tensor) {
        let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(got.len(), expected.len());
        let gap = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(gap < 1e-4, "gap {gap}");
    }

    fn values(x: &Tensor) -> Values<'_> {
        Values::of(x).unwrap()
    }

    /// Each pass, and each gradient, is that of the plain form. `g` is the gradient of the result.
    #[test]
    fn one_pass_equals_basic_operations_gradients_included() {
        let (x, w, up, g) = (random(&[150, 37]), random(&[37]), random(&[150, 37]), random(&[150, 37]));
        let gradients =
            |y: &Tensor, g: &Var| (y * g.as_detached_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let (fused, plain) = (x.as_detached_tensor(), plain_rms_norm(&x, &w, 1e-5).unwrap());
        close(&values(&rms_norm(&fused, &w.as_detached_tensor(), 1e-5).unwrap()), &plain);
        let expected = gradients(&plain, &g);
        close(&norm_back(&values(&x), &values(&w), 1e-5, &values(&g)), expected.get(&x).unwrap());
        close(&norm_weights_back(&values(&x), 37, 1e-5, &values(&g)), expected.get(&w).unwrap());

        for activation in [Activation::Silu, Activation::GeluTanh] {
            let plain = plain_gate_mul(&x, &up, activation).unwrap();
            close(&values(&gate_mul(&fused, &up.as_detached_tensor(), activation).unwrap()), &plain);
            let expected = gradients(&plain, &g);
            let [of_gate, of_up] = gated_back(&values(&x), &values(&up), activation, &values(&g));
            close(&of_gate, expected.get(&x).unwrap());
            close(&of_up, expected.get(&up).unwrap());
        }

        // All channels of a head are rotated, or only the leading ones.
        for half in [4, 3] {
            let (x, angle, g) = (random(&[5, 3, 8]), random(&[5, half]).as_detached_tensor(), random(&[5, 3, 8]));
            let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
            let plain = plain_rope(&x, &cos, &sin).unwrap();
            close(&values(&rope(&x.as_detached_tensor(), &cos, &sin).unwrap()), &plain);
            let back = rotated(&values(&g), [24, 8], [&values(&cos), &values(&sin)], true);
            close(&back, gradients(&plain, &g).get(&x).unwrap());
        }
    }
}
