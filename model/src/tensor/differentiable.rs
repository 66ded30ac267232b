//! Norm, gate and rope for training, each as one pass over memory, forward and backward.
//!
//! Written in basic operations, a norm takes about six element-wise passes, and each of them costs two more passes when
//! gradients are accumulated. For small models on a CPU, these passes dominate the training time, not the matrix
//! products. Other devices and types use the plain form. Tests compare the two.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};

/// The `f32` data of a contiguous CPU tensor.
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

struct RmsNorm {
    eps: f32,
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32 + eps).sqrt()
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "train-rms-norm"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, ws: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (slice(s, l)?, slice(ws, wl)?);
        let mut out = Vec::with_capacity(x.len());
        for row in x.chunks_exact(w.len()) {
            let inverse = inverse_rms(row, self.eps);
            out.extend(row.iter().zip(w).map(|(x, w)| x * inverse * w));
        }
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
        let width = w.len();
        if self.of_weight {
            let mut out = vec![0f32; width];
            for (x, g) in x.chunks_exact(width).zip(g.chunks_exact(width)) {
                let inverse = inverse_rms(x, self.eps);
                for ((o, x), g) in out.iter_mut().zip(x).zip(g) {
                    *o += x * inverse * g;
                }
            }
            return Ok((CpuStorage::F32(out), wl.shape().clone()));
        }
        let mut out = Vec::with_capacity(x.len());
        for (x, g) in x.chunks_exact(width).zip(g.chunks_exact(width)) {
            let inverse = inverse_rms(x, self.eps);
            let dot = x.iter().zip(g).zip(w).map(|((x, g), w)| x * g * w).sum::<f32>();
            let pull = dot * inverse * inverse * inverse / width as f32;
            out.extend(x.iter().zip(g).zip(w).map(|((x, g), w)| g * w * inverse - x * pull));
        }
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }
}

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

struct SiluMul;

impl CustomOp2 for SiluMul {
    fn name(&self) -> &'static str {
        "silu-mul"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, us: &CpuStorage, ul: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(s, l)?, slice(us, ul)?);
        let out = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let of_gate = gate.apply_op3_no_bwd(up, &grad, &SiluMulGrad)?;
        let of_up = gate.apply_op2_no_bwd(&grad, &SiluMul)?;
        Ok((Some(of_gate), Some(of_up)))
    }
}

struct SiluMulGrad;

impl CustomOp3 for SiluMulGrad {
    fn name(&self) -> &'static str {
        "silu-mul-grad"
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
        let slope = |g: f32| {
            let sigmoid = 1.0 / (1.0 + (-g).exp());
            sigmoid * (1.0 + g * (1.0 - sigmoid))
        };
        let out = gate.iter().zip(up).zip(grad).map(|((g, u), d)| slope(*g) * u * d).collect();
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }
}

/// `silu(gate) * up`, element by element.
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if fits(gate) && fits(up) {
        return gate.contiguous()?.apply_op2(&up.contiguous()?, SiluMul);
    }
    gate.silu()? * up
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
        let (_, heads, width) = l.shape().dims3()?;
        let (half, sign) = (width / 2, if self.forward { 1.0 } else { -1.0 });
        let mut out = vec![0f32; x.len()];
        for (row, (x, out)) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
            let at = row / heads * half;
            let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
            for i in 0..half {
                out[i] = x[i] * cos[i] - sign * x[i + half] * sin[i];
                out[i + half] = x[i + half] * cos[i] + sign * x[i] * sin[i];
            }
        }
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

/// Rotates `x`, `[n, heads, head_dim]`: the first half of each head with its second. `cos` and `sin` are `[n, head_dim
/// / 2]` and receive no gradient.
pub(crate) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if fits(x) && fits(cos) && fits(sin) {
        return x.contiguous()?.apply_op3(cos, sin, Rope { forward: true });
    }
    plain_rope(x, cos, sin)
}

fn plain_rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(2)? / 2;
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 2)
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
        same(&[&x, &up], || silu_mul(&x, &up), || x.silu()? * up.as_tensor());
        let (x, angle) = (random(&[5, 3, 8]), random(&[5, 4]).as_detached_tensor());
        let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
        same(&[&x], || rope(&x, &cos, &sin), || plain_rope(&x, &cos, &sin));
    }
}
