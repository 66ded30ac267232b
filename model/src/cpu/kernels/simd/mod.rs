//! Vector operations that the kernels are built from, their implementation for each instruction set, and the choice
//! between these.
//!
//! A kernel is written once, generic over [`Simd`], and compiled for each instruction set. [`Isa::run`] calls it
//! through a function that enables the instruction set's features, and everything it calls is inlined into that
//! function.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use std::{fmt, sync::OnceLock};

use half::bf16;

/// Vectors of `LANES` f32 values, and dot products of bytes, four to a lane.
///
/// Integer products: a weight is an unsigned byte from 0 to 255 (int8, stored with 128 added) or from 0 to 15 (int4,
/// with 8 added); an input is a signed byte from -127 to 127. The start value of the sums cancels the offset: it is
/// -128 (or -8) times the sum of the inputs.
///
/// # Safety
/// Call the methods only if the processor has the instruction set, and only with pointers to as many values as each
/// method states.
#[allow(unsafe_code)]
pub(crate) trait Simd: Copy + 'static {
    /// Number of f32 values in a vector.
    const LANES: usize;
    /// Whether int8 products are faster than f32 products. If not, products of many rows use f32.
    const FAST_INT8: bool;
    /// Whether products of bf16 with bf16 are faster than f32 products. If so, inputs of bf16 weights are rounded to
    /// bf16.
    const FAST_BF16: bool;
    /// Whether the processor prefetches a stream of weights better without explicit prefetches.
    const STREAMS_ALONE: bool;
    /// Whether inputs of int8 weights are taken as 16-bit numbers.
    const WIDE_INPUTS: bool;
    /// f32 vector.
    type F: Copy;
    /// Four int8 weights per lane.
    type Int8: Copy;
    /// Four inputs for int8 weights, the same in each lane.
    type Inputs8: Copy;
    /// i32 sums of int8 products.
    type Sums8: Copy;
    /// Four int4 weights per lane.
    type Int4: Copy;
    /// Four inputs for int4 weights, the same in each lane.
    type Inputs4: Copy;
    /// Sums of at most [`GROUP`](super::packed::GROUP) int4 products.
    type Sums4: Copy;

    unsafe fn splat(value: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn store(to: *mut f32, value: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// The maximum; NaN if `b` is NaN. (If only `a` is NaN, the result depends on the instruction set.)
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`.
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Sum over the lanes, always in the same order.
    unsafe fn sum(value: Self::F) -> f32;
    /// The sum of each of four vectors.
    #[inline(always)]
    unsafe fn sum4(values: [Self::F; 4]) -> [f32; 4] {
        // SAFETY: guaranteed by the caller.
        values.map(|value| unsafe { Self::sum(value) })
    }
    /// `value * 2^n`, where `shifted` = 1.5 * 2^23 + n holds `n` in its low bits.
    unsafe fn scale_by_power(value: Self::F, shifted: Self::F) -> Self::F;
    /// Loads `LANES` bf16 values.
    unsafe fn load_bf16(from: *const bf16) -> Self::F;
    /// Loads `2 * LANES` bf16 values, split into those at even and those at odd indices.
    unsafe fn load_bf16_pairs(from: *const bf16) -> (Self::F, Self::F);
    /// Adds to each lane the products of its two weights, of `2 * LANES` in total, with the two inputs.
    #[inline(always)]
    unsafe fn dot_bf16(sums: Self::F, weights: *const bf16, inputs: *const bf16) -> Self::F {
        // SAFETY: guaranteed by the caller.
        unsafe { dot_widened::<Self>(sums, weights, inputs) }
    }
    /// Loads `LANES` f16 values, given as bits.
    unsafe fn load_f16(from: *const u16) -> Self::F;
    /// Loads `4 * LANES` bytes as numbers from 0 to 255. Vector i holds byte i of every four.
    unsafe fn widen_bytes(from: *const u8) -> [Self::F; 4];
    /// Prefetches a cache line; any address is allowed.
    unsafe fn prefetch(from: *const u8);
    /// Prefetches into the second-level cache, which supports more outstanding requests than the first.
    unsafe fn prefetch_far(from: *const u8);

    /// Transposes a square of `LANES` rows and columns of 32-bit words. Strides are in words. The two squares must
    /// not overlap.
    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        for row in 0..Self::LANES {
            for column in 0..Self::LANES {
                // SAFETY: guaranteed by the caller.
                unsafe { *to.add(column * to_stride + row) = *from.add(row * from_stride + column) }
            }
        }
    }

    /// Loads `4 * LANES` int8 weights.
    unsafe fn int8(from: *const u8) -> Self::Int8;
    /// Loads four inputs from one of the pointers: as bytes, or as 16-bit numbers with the second and third swapped.
    unsafe fn inputs8(from: *const i8, wide: *const i16) -> Self::Inputs8;
    /// Sums with the start value `start` = -128 * (sum of the inputs to come).
    unsafe fn sums8(start: i32) -> Self::Sums8;
    unsafe fn dot8(sums: Self::Sums8, weights: Self::Int8, inputs: Self::Inputs8) -> Self::Sums8;
    unsafe fn sums8_to_f32(sums: Self::Sums8) -> Self::F;

    /// Loads `8 * LANES` int4 weights, two per byte: first the low halves, then the high halves.
    unsafe fn int4(from: *const u8) -> [Self::Int4; 2];
    /// Loads four inputs.
    unsafe fn inputs4(from: *const i8) -> Self::Inputs4;
    unsafe fn sums4() -> Self::Sums4;
    unsafe fn dot4(sums: Self::Sums4, weights: Self::Int4, inputs: Self::Inputs4) -> Self::Sums4;
    /// Converts the sums, with `start` = -8 * (sum of the inputs) added.
    unsafe fn sums4_to_f32(sums: Self::Sums4, start: i32) -> Self::F;

    /// e^x within 2 units in the last place for x from -87.3 to 88. Smaller x give e^-87.3, which is not 0. NaN gives
    /// NaN.
    #[inline(always)]
    unsafe fn exp(x: Self::F) -> Self::F {
        // Computed as 2^n * e^r with |r| <= ln(2) / 2 (Cephes, expf).
        const SHIFT: f32 = 12_582_912.0;
        let c = [1.987_569_1e-4_f32, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
        // SAFETY: guaranteed by the caller.
        unsafe {
            let x = Self::max(Self::splat(-87.3), x);
            let shifted = Self::mul_add(x, Self::splat(std::f32::consts::LOG2_E), Self::splat(SHIFT));
            let n = Self::sub(shifted, Self::splat(SHIFT));
            let r = Self::mul_add(n, Self::splat(-0.693_359_4), x);
            let r = Self::mul_add(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(c[0]);
            for coefficient in &c[1..] {
                p = Self::mul_add(p, r, Self::splat(*coefficient));
            }
            let p = Self::add(Self::mul_add(Self::mul(p, r), r, r), Self::splat(1.0));
            Self::scale_by_power(p, shifted)
        }
    }
}

/// Loads ROWS rows of VECS vectors, with rows `stride` values apart.
///
/// # Safety
/// As for [`Simd`]'s methods: `from` points to all of these values.
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) unsafe fn load_tile<S: Simd, const ROWS: usize, const VECS: usize>(
    from: *const f32,
    stride: usize,
) -> [[S::F; VECS]; ROWS] {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let mut tile = [[S::splat(0.0); VECS]; ROWS];
        for (r, row) in tile.iter_mut().enumerate() {
            for (v, value) in row.iter_mut().enumerate() {
                *value = S::load(from.add(r * stride + v * S::LANES));
            }
        }
        tile
    }
}

/// Stores a tile in the layout that [`load_tile`] reads.
///
/// # Safety
/// As for [`load_tile`].
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) unsafe fn store_tile<S: Simd, const ROWS: usize, const VECS: usize>(
    to: *mut f32,
    stride: usize,
    tile: [[S::F; VECS]; ROWS],
) {
    for (r, row) in tile.into_iter().enumerate() {
        for (v, value) in row.into_iter().enumerate() {
            // SAFETY: guaranteed by the caller.
            unsafe { S::store(to.add(r * stride + v * S::LANES), value) }
        }
    }
}

/// [`Simd::dot_bf16`] for instruction sets without an instruction for it.
///
/// # Safety
/// As for [`Simd::dot_bf16`].
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn dot_widened<S: Simd>(sums: S::F, weights: *const bf16, inputs: *const bf16) -> S::F {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let (even, odd) = S::load_bf16_pairs(weights);
        let sums = S::mul_add(S::splat((*inputs).to_f32()), even, sums);
        S::mul_add(S::splat((*inputs.add(1)).to_f32()), odd, sums)
    }
}

/// A computation that is compiled for each instruction set.
pub(crate) trait Kernel {
    /// The result.
    type Output;
    /// Runs the kernel. It must be `#[inline(always)]`, and so must every function it calls that uses vectors.
    ///
    /// # Safety
    /// The processor has the instruction set `S`.
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Properties of an instruction set; see the constants of [`Simd`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traits {
    pub(crate) fast_int8: bool,
    pub(crate) fast_bf16: bool,
}

/// An instruction set that this processor has. Values exist only for such instruction sets.
#[derive(Clone, Copy)]
pub(crate) struct Isa(Set);

/// The instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug)]
enum Set {
    /// Plain Rust, vectorised by the compiler.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// The same with BF16, if that is fast.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// NEON, which every 64-bit ARM processor has.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Isa {
    /// All instruction sets that this processor has, the best last.
    pub(crate) fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<Isa>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            #[allow(unused_mut)]
            let mut found = vec![Self(Set::Portable)];
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                found.push(Self(Set::Avx2));
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
                {
                    found.push(Self(Set::Avx512));
                    if is_x86_feature_detected!("avx512bf16") && avx512::has_fast_bf16() {
                        found.push(Self(Set::Avx512Bf16));
                    }
                }
            }
            #[cfg(target_arch = "aarch64")]
            found.push(Self(Set::Neon));
            found
        })
    }

    /// The best instruction set that this processor has.
    pub(crate) fn best() -> Self {
        *Self::available().last().unwrap_or(&Self(Set::Portable))
    }

    /// The instruction set's properties.
    pub(crate) fn traits(self) -> Traits {
        struct Ask;
        impl Kernel for Ask {
            type Output = Traits;
            #[inline(always)]
            #[allow(unsafe_code)]
            unsafe fn run<S: Simd>(self) -> Traits {
                Traits { fast_int8: S::FAST_INT8, fast_bf16: S::FAST_BF16 }
            }
        }
        self.run(Ask)
    }

    /// Runs a kernel.
    #[inline]
    #[allow(unsafe_code)]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: only `available` creates an `Isa`, and only for instruction sets that the processor has.
        unsafe {
            match self.0 {
                Set::Portable => kernel.run::<portable::Portable>(),
                #[cfg(target_arch = "x86_64")]
                Set::Avx2 => avx2::enter(kernel),
                #[cfg(target_arch = "x86_64")]
                Set::Avx512 => avx512::enter(kernel),
                #[cfg(target_arch = "x86_64")]
                Set::Avx512Bf16 => avx512::enter_bf16(kernel),
                #[cfg(target_arch = "aarch64")]
                Set::Neon => kernel.run::<neon::Neon>(),
            }
        }
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        #[allow(unsafe_code)]
        unsafe fn run<S: Simd>(self) {
            for chunk in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: a chunk holds LANES values.
                unsafe { S::store(chunk.as_mut_ptr(), S::exp(S::load(chunk.as_ptr()))) }
            }
        }
    }

    /// Transposes `[16][18]` words, the last two of which are left alone, into `[16][17]`.
    struct Transpose<'a>(&'a [u32], &'a mut [u32]);

    impl Kernel for Transpose<'_> {
        type Output = ();
        #[inline(always)]
        #[allow(unsafe_code)]
        unsafe fn run<S: Simd>(self) {
            for row in (0..16).step_by(S::LANES) {
                for column in (0..16).step_by(S::LANES) {
                    // SAFETY: both have 16 rows of at least 16 words.
                    unsafe {
                        let to = self.1.as_mut_ptr().add(column * 17 + row);
                        S::transpose(self.0.as_ptr().add(row * 18 + column), 18, to, 17);
                    }
                }
            }
        }
    }

    #[test]
    fn rows_become_columns() {
        let from: Vec<u32> = (0..16 * 18).collect();
        let expected: Vec<u32> = (0..16 * 17).map(|i| if i % 17 < 16 { i % 17 * 18 + i / 17 } else { 7 }).collect();
        for isa in Isa::available() {
            let mut to = vec![7; 16 * 17];
            isa.run(Transpose(&from, &mut to));
            assert_eq!(to, expected, "{isa:?}");
        }
    }

    #[test]
    fn exp_is_exp() {
        for isa in Isa::available() {
            let inputs: Vec<f32> = (0..=175_200).map(|i| -87.2 + i as f32 * 0.001).chain([88.0; 15]).collect();
            let mut values = inputs.clone();
            isa.run(Exp(&mut values));
            for (x, got) in inputs.iter().zip(&values) {
                let exact = f64::from(*x).exp();
                assert!((f64::from(*got) - exact).abs() <= exact * 3e-7, "{isa:?}: exp({x}) = {got}, not {exact}");
            }
            let mut small = vec![f32::NEG_INFINITY; 16];
            isa.run(Exp(&mut small));
            assert!(small.iter().all(|v| (0.0..2e-38).contains(v)), "{isa:?}: {small:?}");
            let mut nan = vec![f32::NAN; 16];
            isa.run(Exp(&mut nan));
            assert!(nan.iter().all(|v| v.is_nan()), "{isa:?}: {nan:?}");
        }
    }
}
