//! Operations on single rows of activations.

use super::simd::{Isa, Kernel, Simd};

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

/// `out = silu(gate) * up` (Shazeer, arXiv 2002.05202). `gate` and `up` have 32 values, `out` at most 32.
pub(crate) struct SiluMul<'a> {
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
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
                // `S::exp` is accurate up to x = 88. silu of values below -88 is 0 anyway.
                let negative = S::sub(S::splat(0.0), S::max(gate, S::splat(-88.0)));
                let denominator = S::add(S::splat(1.0), S::exp(negative));
                let silu = S::div(gate, denominator);
                S::store(values.as_mut_ptr().add(i), S::mul(silu, S::load(self.up.as_ptr().add(i))));
            }
        }
        self.out.copy_from_slice(&values[..self.out.len()]);
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
            isa.run(SiluMul { gate: &gate, up: &up, out: &mut out });
            for (gate, out) in gate.iter().zip(&out) {
                let exact = 2.0 * f64::from(*gate) / (1.0 + (-f64::from(*gate)).exp());
                assert!((f64::from(*out) - exact).abs() < 1e-6 * (1.0 + exact.abs()), "{isa:?}: {gate} gave {out}");
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
