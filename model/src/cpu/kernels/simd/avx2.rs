//! AVX2 with FMA and F16C: 8 lanes, 16 registers.

use std::arch::x86_64::*;

use half::bf16;

use super::{Kernel, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(unsafe_code)]
pub(crate) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: guaranteed by the caller.
    unsafe { kernel.run::<Avx2>() }
}

// SAFETY of every block below: the trait's caller guarantees the instruction set and the pointers. All loads and stores
// are unaligned ones.
#[allow(unsafe_code, clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    const LANES: usize = 8;
    const FAST_INT8: bool = false;
    const FAST_BF16: bool = false;
    const STREAMS_ALONE: bool = false;
    const WIDE_INPUTS: bool = true;
    type F = __m256;
    /// 16-bit numbers: weights 0 and 2 of each lane, then weights 1 and 3. Products of bytes would overflow 16 bits.
    type Int8 = (__m256i, __m256i);
    type Inputs8 = (__m256i, __m256i);
    type Sums8 = __m256i;
    type Int4 = __m256i;
    type Inputs4 = __m256i;
    /// 16-bit sums, two per lane. Each of the two is at most 16 products of at most 15 * 127, which is 30480.
    type Sums4 = __m256i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m256) {
        unsafe { _mm256_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sum(value: __m256) -> f32 {
        unsafe {
            let halves = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
            let pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
            _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)))
        }
    }
    #[inline(always)]
    unsafe fn sum4(values: [__m256; 4]) -> [f32; 4] {
        unsafe {
            let pairs = _mm256_hadd_ps(values[0], values[1]);
            let fours = _mm256_hadd_ps(pairs, _mm256_hadd_ps(values[2], values[3]));
            let sums = _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps::<1>(fours));
            std::mem::transmute::<__m128, [f32; 4]>(sums)
        }
    }
    #[inline(always)]
    unsafe fn scale_by_power(value: __m256, shifted: __m256) -> __m256 {
        unsafe {
            let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), power))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const bf16) -> (__m256, __m256) {
        unsafe {
            let pairs = _mm256_loadu_si256(from.cast());
            let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(odd))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn widen_bytes(from: *const u8) -> [__m256; 4] {
        unsafe {
            let bytes = _mm256_loadu_si256(from.cast());
            let low = _mm256_set1_epi32(0xff);
            [
                _mm256_cvtepi32_ps(_mm256_and_si256(bytes, low)),
                _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<8>(bytes), low)),
                _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<16>(bytes), low)),
                _mm256_cvtepi32_ps(_mm256_srli_epi32::<24>(bytes)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        unsafe {
            // Without closures: the compiler would not inline the instructions in them.
            let mut rows = [_mm256_setzero_ps(); 8];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm256_loadu_ps(from.add(i * from_stride).cast());
            }
            let mut pairs = [_mm256_setzero_pd(); 8];
            for i in (0..8).step_by(2) {
                pairs[i] = _mm256_castps_pd(_mm256_unpacklo_ps(rows[i], rows[i + 1]));
                pairs[i + 1] = _mm256_castps_pd(_mm256_unpackhi_ps(rows[i], rows[i + 1]));
            }
            // Each fours[4 * i + j] has rows 4 * i to 4 * i + 3 of the columns j and 4 + j.
            let mut fours = pairs;
            for i in [0, 4] {
                fours[i] = _mm256_unpacklo_pd(pairs[i], pairs[i + 2]);
                fours[i + 1] = _mm256_unpackhi_pd(pairs[i], pairs[i + 2]);
                fours[i + 2] = _mm256_unpacklo_pd(pairs[i + 1], pairs[i + 3]);
                fours[i + 3] = _mm256_unpackhi_pd(pairs[i + 1], pairs[i + 3]);
            }
            for j in 0..4 {
                let to = to.add(j * to_stride);
                _mm256_storeu_pd(to.cast(), _mm256_permute2f128_pd::<0x20>(fours[j], fours[4 + j]));
                _mm256_storeu_pd(to.add(4 * to_stride).cast(), _mm256_permute2f128_pd::<0x31>(fours[j], fours[4 + j]));
            }
        }
    }

    #[inline(always)]
    unsafe fn int8(from: *const u8) -> Self::Int8 {
        unsafe {
            let bytes = _mm256_loadu_si256(from.cast());
            (_mm256_and_si256(bytes, _mm256_set1_epi16(0xff)), _mm256_srli_epi16::<8>(bytes))
        }
    }
    #[inline(always)]
    unsafe fn inputs8(_from: *const i8, wide: *const i16) -> Self::Inputs8 {
        unsafe {
            let pairs = wide.cast::<[i32; 2]>().read_unaligned();
            (_mm256_set1_epi32(pairs[0]), _mm256_set1_epi32(pairs[1]))
        }
    }
    #[inline(always)]
    unsafe fn sums8(start: i32) -> __m256i {
        unsafe { _mm256_set1_epi32(start) }
    }
    #[inline(always)]
    unsafe fn dot8(sums: __m256i, weights: Self::Int8, inputs: Self::Inputs8) -> __m256i {
        unsafe {
            let sums = _mm256_add_epi32(sums, _mm256_madd_epi16(weights.0, inputs.0));
            _mm256_add_epi32(sums, _mm256_madd_epi16(weights.1, inputs.1))
        }
    }
    #[inline(always)]
    unsafe fn sums8_to_f32(sums: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(sums) }
    }
    #[inline(always)]
    unsafe fn int4(from: *const u8) -> [__m256i; 2] {
        unsafe {
            let bytes = _mm256_loadu_si256(from.cast());
            let low = _mm256_set1_epi8(15);
            [_mm256_and_si256(bytes, low), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low)]
        }
    }
    #[inline(always)]
    unsafe fn inputs4(from: *const i8) -> __m256i {
        unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn sums4() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn dot4(sums: __m256i, weights: __m256i, inputs: __m256i) -> __m256i {
        unsafe { _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights, inputs)) }
    }
    #[inline(always)]
    unsafe fn sums4_to_f32(sums: __m256i, start: i32) -> __m256 {
        unsafe {
            let wide = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
            _mm256_cvtepi32_ps(_mm256_add_epi32(wide, _mm256_set1_epi32(start)))
        }
    }
}
