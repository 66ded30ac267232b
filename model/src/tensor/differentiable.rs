//! Norm, gate and rope for training, each as one pass over memory, forward and backward, on all threads.
//!
//! Written in basic operations, a norm takes about six element-wise passes, and each of them costs two more passes when
//! gradients are accumulated. For small models on a CPU, these passes dominate the training time, not the matrix
//! products. Other devices and types use the plain form. Tests compare the two.

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

pub(super) fn fits(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    fn inverse_rms(&self, x: &[f32]) -> f32 {
        1.0 / (total(&AddSquare {}, [x]) / x.len() as f32 + self.eps).sqrt()
    }
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

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "train-rms-norm"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, ws: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (slice(s, l)?, slice(ws, wl)?);
        let width = w.len();
        let mut out = vec![0.0; x.len()];
        rows(&mut out, width, |i, out| {
            let row = &x[i * width..][..width];
            each(&Normed { factor: self.inverse_rms(row) }, out, [row, w]);
        });
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let dx = x.apply_op3_no_bwd(w, &grad, &RmsNormGrad { eps: self.eps, of_weight: false })?;
        let dw = x.apply_op3_no_bwd(w, &grad, &RmsNormGrad { eps: self.eps, of_weight: true })?;
        Ok((Some(dx), Some(dw)))
    }
}

struct RmsNormGrad {
    eps: f32,
    of_weight: bool,
}

impl CustomOp3 for RmsNormGrad {
    fn name(&self) -> &'static str {
        "train-rms-norm-grad"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        l: &Layout,
        ws: &CpuStorage,
        wl: &Layout,
        gs: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w, g) = (slice(s, l)?, slice(ws, wl)?, slice(gs, gl)?);
        let (width, norm) = (w.len(), RmsNorm { eps: self.eps });
        if self.of_weight {
            // Partial sums over fixed numbers of rows, so that the result does not depend on the threads.
            const ROWS: usize = 64;
            let part = |(x, g): (&[f32], &[f32])| {
                let mut sums = vec![0.0; width];
                for (x, g) in x.chunks_exact(width).zip(g.chunks_exact(width)) {
                    let inverse = norm.inverse_rms(x);
                    each(&AddScaledProduct { factor: inverse }, &mut sums, [x, g]);
                }
                sums
            };
            let parts: Vec<f32> =
                x.par_chunks(ROWS * width).zip(g.par_chunks(ROWS * width)).map(part).collect::<Vec<_>>().concat();
            let mut out = vec![0.0; width];
            add_column_sums(&mut out, &parts);
            return Ok((CpuStorage::F32(out), wl.shape().clone()));
        }
        let mut out = vec![0.0; x.len()];
        rows(&mut out, width, |i, out| {
            let (x, g) = (&x[i * width..][..width], &g[i * width..][..width]);
            let inverse = norm.inverse_rms(x);
            let pull = total(&AddProduct3 {}, [x, g, w]) * inverse * inverse * inverse / width as f32;
            each(&NormedBack { inverse, pull }, out, [x, w, g]);
        });
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }
}

lanes!(
    /// `target + x y factor`.
    AddScaledProduct { factor } 2, |self, target, [x, y]| S::mul_add(S::mul(x, S::splat(self.factor)), y, target)
);

/// Root-mean-square norm over the last axis of `x` (any rank), times `weight`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if fits(x) && fits(weight) {
        return x.contiguous()?.apply_op2(weight, RmsNorm { eps: eps as f32 });
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

#[derive(Clone, Copy)]
struct GateMul {
    activation: Activation,
}

impl GateMul {
    /// `linear` and `cubic` of [`Gated`].
    fn argument(self) -> (f32, f32) {
        // 2 sqrt(2 / pi)
        const FACTOR: f32 = 1.595_769;
        match self.activation {
            Activation::Silu => (1.0, 0.0),
            Activation::GeluTanh => (FACTOR, 0.044_715 * FACTOR),
        }
    }
}

impl CustomOp2 for GateMul {
    fn name(&self) -> &'static str {
        "gate-mul"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, us: &CpuStorage, ul: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(s, l)?, slice(us, ul)?);
        let (linear, cubic) = self.argument();
        let mut out = vec![0.0; gate.len()];
        each_in_parallel(&Gated { linear, cubic }, &mut out, [gate, up]);
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let of_gate = gate.apply_op3_no_bwd(up, &grad, &GateMulGrad(*self))?;
        let of_up = gate.apply_op2_no_bwd(&grad, self)?;
        Ok((Some(of_gate), Some(of_up)))
    }
}

struct GateMulGrad(GateMul);

impl CustomOp3 for GateMulGrad {
    fn name(&self) -> &'static str {
        "gate-mul-grad"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        l: &Layout,
        us: &CpuStorage,
        ul: &Layout,
        gs: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up, grad) = (slice(s, l)?, slice(us, ul)?, slice(gs, gl)?);
        let (linear, cubic) = self.0.argument();
        let mut out = vec![0.0; gate.len()];
        each_in_parallel(&GatedBack { linear, cubic }, &mut out, [gate, up, grad]);
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }
}

/// `activation(gate) * up`, element by element.
pub(crate) fn gate_mul(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if fits(gate) && fits(up) {
        return gate.contiguous()?.apply_op2(&up.contiguous()?, GateMul { activation });
    }
    plain_gate_mul(gate, up, activation)
}

pub(super) fn plain_gate_mul(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => gate.silu()? * up,
        // candle's `gelu` is the approximation with tanh.
        Activation::GeluTanh => gate.gelu()? * up,
    }
}

struct Rope {
    forward: bool,
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "train-rope"
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
        let (x, cos, sin) = (slice(s, l)?, slice(cs, cl)?, slice(ss, sl)?);
        let (n, heads, width) = l.shape().dims3()?;
        let half = cos.len() / n.max(1);
        let sign = if self.forward { 1.0 } else { -1.0 };
        let mut out = vec![0f32; x.len()];
        lanes::rows(&mut out, heads * width, |token, out| {
            let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
            let x = &x[token * heads * width..][..heads * width];
            for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
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
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    // The gradient of a rotation is the inverse rotation.
    fn bwd(
        &self,
        _: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let back = Rope { forward: !self.forward };
        Ok((Some(grad.contiguous()?.apply_op3_no_bwd(cos, sin, &back)?), None, None))
    }
}

/// Rotates the leading channels of `x`, `[n, heads, head_dim]`: their first half with their second. `cos` and `sin` are
/// `[n, rotary_dim / 2]` and receive no gradient.
pub(crate) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if fits(x) && fits(cos) && fits(sin) {
        return x.contiguous()?.apply_op3(cos, sin, Rope { forward: true });
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

    fn random(shape: &[usize]) -> Var {
        Var::randn(0f32, 1f32, shape, &Device::Cpu).unwrap()
    }

    /// Asserts that the fused and the plain form agree in values and in the gradients of all `vars`.
    fn same(vars: &[&Var], fused: impl Fn() -> Result<Tensor>, plain: impl Fn() -> Result<Tensor>) {
        let (fused, plain) = (fused().unwrap(), plain().unwrap());
        let weights = random(fused.dims());
        let gradients = |y: &Tensor| (y * weights.as_detached_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let (of_fused, of_plain) = (gradients(&fused), gradients(&plain));
        let close = |a: &Tensor, b: &Tensor| {
            let gap =
                (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(gap < 1e-4, "gap {gap}");
        };
        close(&fused, &plain);
        for var in vars {
            close(of_fused.get(var).unwrap(), of_plain.get(var).unwrap());
        }
    }

    #[test]
    fn one_pass_equals_basic_operations_gradients_included() {
        let (x, w, up) = (random(&[5, 7]), random(&[7]), random(&[5, 7]));
        same(&[&x, &w], || rms_norm(&x, &w, 1e-5), || plain_rms_norm(&x, &w, 1e-5));
        for activation in [Activation::Silu, Activation::GeluTanh] {
            same(&[&x, &up], || gate_mul(&x, &up, activation), || plain_gate_mul(&x, &up, activation));
        }
        // All channels of a head are rotated, or only the leading ones.
        for half in [4, 3] {
            let (x, angle) = (random(&[5, 3, 8]), random(&[5, half]).as_detached_tensor());
            let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
            same(&[&x], || rope(&x, &cos, &sin), || plain_rope(&x, &cos, &sin));
        }
    }
}
