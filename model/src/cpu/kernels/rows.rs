//! Operations on single rows of activations.

use super::simd::{Isa, Kernel, Simd};
use crate::Activation;

/// `out = x / rms(x) * weight` (Zhang & Sennrich, arXiv 1910.07467), with `eps` added to the mean square.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len());
    let scale = scale_to_one(isa, x, eps);
    for (out, (x, weight)) in out.iter_mut().zip(x.iter().zip(weight)) {
        *out = x * scale * weight;
    }
}

/// [`rms_norm`] in place.
pub(crate) fn rms_norm_in_place(isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    assert!(x.len() == weight.len());
    let scale = scale_to_one(isa, x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

/// The factor that makes the mean square 1 (up to `eps`).
fn scale_to_one(isa: Isa, x: &[f32], eps: f32) -> f32 {
    1.0 / (isa.run(SumOfSquares(x)) / x.len() as f32 + eps).sqrt()
}

struct SumOfSquares<'a>(&'a [f32]);

impl Kernel for SumOfSquares<'_> {
    type Output = f32;
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let chunks = self.0.chunks_exact(S::LANES);
        let tail: f32 = chunks.remainder().iter().map(|x| x * x).sum();
        // SAFETY: a chunk holds LANES values.
        unsafe {
            let mut sums = S::splat(0.0);
            for chunk in chunks {
                let x = S::load(chunk.as_ptr());
                sums = S::mul_add(x, x, sums);
            }
            S::sum(sums) + tail
        }
    }
}

/// Rotates a head: its first half with its second (Su et al., arXiv 2104.09864, in Hugging Face's order). `cos` and
/// `sin` have half the length of `x`.
pub(crate) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = x.split_at_mut(cos.len());
    for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// `out = activation(gate) * up` (Shazeer, arXiv 2002.05202). `gate` and `up` have 32 values, `out` at most 32.
pub(crate) struct GateMul<'a> {
    pub(crate) activation: Activation,
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for GateMul<'_> {
    type Output = ();
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) {
        assert!(self.gate.len() == 32 && self.up.len() == 32);
        let mut values = [0.0_f32; 32];
        for i in (0..32).step_by(S::LANES) {
            // SAFETY: 32 is a multiple of LANES.
            unsafe {
                let gate = S::load(self.gate.as_ptr().add(i));
                // Both activations are `gate * sigmoid(x)`.
                let x = match self.activation {
                    Activation::Silu => gate,
                    Activation::GeluTanh => gelu_argument::<S>(gate),
                };
                // `S::exp` is accurate up to x = 88. The sigmoid of values below -88 is 0 anyway.
                let negative = S::sub(S::splat(0.0), S::max(x, S::splat(-88.0)));
                let denominator = S::add(S::splat(1.0), S::exp(negative));
                let activated = S::div(gate, denominator);
                S::store(values.as_mut_ptr().add(i), S::mul(activated, S::load(self.up.as_ptr().add(i))));
            }
        }
        self.out.copy_from_slice(&values[..self.out.len()]);
    }
}

/// `2 sqrt(2 / pi) (x + 0.044715 x^3)`: GELU approximated with tanh is `x` times the sigmoid of this.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn gelu_argument<S: Simd>(x: S::F) -> S::F {
    const FACTOR: f32 = 1.595_769;
    // SAFETY: guaranteed by the caller.
    unsafe {
        let cube = S::mul_add(S::mul(x, x), S::splat(0.044_715 * FACTOR), S::splat(FACTOR));
        S::mul(x, cube)
    }
}

/// `x = cap * tanh(x / cap)` for each of `x`, within about 1e-7 of `cap`.
pub(crate) struct SoftCap<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) cap: f32,
}

impl Kernel for SoftCap<'_> {
    type Output = ();
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) {
        let mut chunks = self.x.chunks_exact_mut(S::LANES);
        for chunk in &mut chunks {
            // SAFETY: a chunk holds LANES values.
            unsafe { soft_cap::<S>(chunk.as_mut_ptr(), self.cap) }
        }
        let rest = chunks.into_remainder();
        let mut padded = [0.0; 32];
        padded[..rest.len()].copy_from_slice(rest);
        // SAFETY: LANES is at most 32.
        unsafe { soft_cap::<S>(padded.as_mut_ptr(), self.cap) }
        rest.copy_from_slice(&padded[..rest.len()]);
    }
}

/// [`SoftCap`] of one vector.
///
/// # Safety
/// `at` points to LANES values, and the processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) unsafe fn soft_cap<S: Simd>(at: *mut f32, cap: f32) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        // tanh(y) = 2 / (1 + e^(-2y)) - 1. `S::exp` is accurate up to 88; tanh(-44) is -1.
        let y = S::max(S::mul(S::load(at), S::splat(2.0 / cap)), S::splat(-88.0));
        let denominator = S::add(S::splat(1.0), S::exp(S::sub(S::splat(0.0), y)));
        S::store(at, S::sub(S::div(S::splat(2.0 * cap), denominator), S::splat(cap)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_is_silu_even_far_out() {
        let gate: Vec<f32> = (0..32).map(|i| (i - 16) as f32 * 9.0).collect();
        let up = vec![2.0; 32];
        for isa in Isa::available() {
            let mut out = vec![0.0; 30];
            isa.run(GateMul { activation: Activation::Silu, gate: &gate, up: &up, out: &mut out });
            for (gate, out) in gate.iter().zip(&out) {
                let exact = 2.0 * f64::from(*gate) / (1.0 + (-f64::from(*gate)).exp());
                assert!((f64::from(*out) - exact).abs() < 1e-6 * (1.0 + exact.abs()), "{isa:?}: {gate} gave {out}");
            }
        }
    }

    #[test]
    fn gelu_is_gelu_even_far_out() {
        let gate: Vec<f32> = (0..32).map(|i| (i - 16) as f32 * 0.6).collect();
        let gate = [&gate[..30], &[-200.0, 300.0]].concat();
        for isa in Isa::available() {
            let mut out = vec![0.0; 32];
            isa.run(GateMul { activation: Activation::GeluTanh, gate: &gate, up: &[2.0; 32], out: &mut out });
            for (gate, out) in gate.iter().zip(&out) {
                let x = f64::from(*gate);
                let exact = x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh());
                assert!((f64::from(*out) - exact).abs() < 2e-6 * (1.0 + exact.abs()), "{isa:?}: {gate} gave {out}");
            }
        }
    }

    #[test]
    fn a_soft_cap_is_a_tanh() {
        let x: Vec<f32> = (0..37).map(|i| (i - 18) as f32 * 3.7).chain([1e30, -1e30]).collect();
        for isa in Isa::available() {
            let mut capped = x.clone();
            isa.run(SoftCap { x: &mut capped, cap: 30.0 });
            for (x, got) in x.iter().zip(&capped) {
                let exact = 30.0 * (f64::from(*x) / 30.0).tanh();
                assert!((f64::from(*got) - exact).abs() < 1e-5, "{isa:?}: {x} gave {got}, not {exact}");
            }
        }
    }

    #[test]
    fn norms_scale_to_one() {
        for isa in Isa::available() {
            let x: Vec<f32> = (0..37).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
            let mut out = vec![0.0; 37];
            rms_norm(*isa, &x, &[1.0; 37], 1e-6, &mut out);
            let mean: f32 = out.iter().map(|x| x * x).sum::<f32>() / 37.0;
            assert!((mean - 1.0).abs() < 1e-5, "{isa:?}: {mean}");
            let mut again = x.clone();
            rms_norm_in_place(*isa, &mut again, &[1.0; 37], 1e-6);
            assert_eq!(out, again);
        }
    }

    #[test]
    fn rope_turns_by_the_angle() {
        let mut x = [1.0, 0.0, 0.0, 2.0];
        let angle = 0.3_f32;
        rope(&mut x, &[angle.cos(), 0.0], &[angle.sin(), 1.0]);
        assert_eq!(x, [angle.cos(), -2.0, angle.sin(), 0.0]);
    }
}
