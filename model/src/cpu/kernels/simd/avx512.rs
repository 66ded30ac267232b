//! AVX-512 with VNNI: 16 lanes, 32 registers, and an instruction for dot products of bytes. Some processors also have
//! one for bf16.

use std::arch::x86_64::*;

use half::bf16;

use super::{Kernel, Simd, dot_widened};

#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>;

/// Whether `vdpbf16ps`, which replaces two f32 multiply-adds, takes as long as one. It does on AMD's processors; on
/// Intel's it takes as long as several. `overfill bench kernels` measures it.
pub(super) fn has_fast_bf16() -> bool {
    let id = __cpuid(0);
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

/// # Safety
/// The processor has AVX-512 F, BW and VNNI, AVX2, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
#[allow(unsafe_code)]
pub(crate) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: guaranteed by the caller.
    unsafe { kernel.run::<Avx512<false>>() }
}

/// # Safety
/// As for [`enter`], and AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512bf16,avx2,fma,f16c")]
#[allow(unsafe_code)]
pub(crate) unsafe fn enter_bf16<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: guaranteed by the caller.
    unsafe { kernel.run::<Avx512<true>>() }
}

// SAFETY of every block below: the trait's caller guarantees the instruction set and the pointers. All loads and stores
// are unaligned ones.
#[allow(unsafe_code, clippy::undocumented_unsafe_blocks)]
impl<const BF16: bool> Simd for Avx512<BF16> {
    const LANES: usize = 16;
    const FAST_INT8: bool = true;
    const FAST_BF16: bool = BF16;
    // True on Zen 4. Every processor with fast BF16 is a Zen 4 or newer.
    const STREAMS_ALONE: bool = BF16;
    const WIDE_INPUTS: bool = false;
    type F = __m512;
    type Int8 = __m512i;
    type Inputs8 = __m512i;
    type Sums8 = __m512i;
    type Int4 = __m512i;
    type Inputs4 = __m512i;
    type Sums4 = __m512i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m512) {
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sum(value: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(value) }
    }
    #[inline(always)]
    unsafe fn sum4(values: [__m512; 4]) -> [f32; 4] {
        unsafe {
            // Within each 128 bits: adds pairs of lanes of two vectors, then combines all four vectors.
            let pairs = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let [a, b] = [pairs(values[0], values[1]), pairs(values[2], values[3])];
            let fours =
                _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(a, b), _mm512_shuffle_ps::<0b11_10_11_10>(a, b));
            let halves = _mm256_add_ps(
                _mm512_castps512_ps256(fours),
                _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(fours))),
            );
            let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
            std::mem::transmute::<__m128, [f32; 4]>(sums)
        }
    }
    #[inline(always)]
    unsafe fn scale_by_power(value: __m512, shifted: __m512) -> __m512 {
        unsafe {
            let power = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), power))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const bf16) -> (__m512, __m512) {
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(odd))
        }
    }
    #[inline(always)]
    unsafe fn dot_bf16(sums: __m512, weights: *const bf16, inputs: *const bf16) -> __m512 {
        unsafe {
            if BF16 {
                let weights: __m512bh = std::mem::transmute(_mm512_loadu_si512(weights.cast()));
                let inputs: __m512bh = std::mem::transmute(_mm512_set1_epi32(inputs.cast::<i32>().read_unaligned()));
                _mm512_dpbf16_ps(sums, weights, inputs)
            } else {
                dot_widened::<Self>(sums, weights, inputs)
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn widen_bytes(from: *const u8) -> [__m512; 4] {
        unsafe {
            let bytes = _mm512_loadu_si512(from.cast());
            let low = _mm512_set1_epi32(0xff);
            [
                _mm512_cvtepi32_ps(_mm512_and_si512(bytes, low)),
                _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<8>(bytes), low)),
                _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<16>(bytes), low)),
                _mm512_cvtepi32_ps(_mm512_srli_epi32::<24>(bytes)),
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
            let mut rows = [_mm512_setzero_si512(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_si512(from.add(i * from_stride).cast());
            }
            let mut pairs = rows;
            for i in (0..16).step_by(2) {
                pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
                pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
            }
            // Each fours[4 * i + j] has rows 4 * i to 4 * i + 3 of the columns j, 4 + j, 8 + j and 12 + j.
            let mut fours = pairs;
            for i in (0..16).step_by(4) {
                fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
                fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
                fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
                fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
            }
            for j in 0..4 {
                let even = _mm512_shuffle_i32x4::<0x88>(fours[j], fours[4 + j]);
                let even_end = _mm512_shuffle_i32x4::<0x88>(fours[8 + j], fours[12 + j]);
                let odd = _mm512_shuffle_i32x4::<0xdd>(fours[j], fours[4 + j]);
                let odd_end = _mm512_shuffle_i32x4::<0xdd>(fours[8 + j], fours[12 + j]);
                let to = to.add(j * to_stride);
                _mm512_storeu_si512(to.cast(), _mm512_shuffle_i32x4::<0x88>(even, even_end));
                _mm512_storeu_si512(to.add(4 * to_stride).cast(), _mm512_shuffle_i32x4::<0x88>(odd, odd_end));
                _mm512_storeu_si512(to.add(8 * to_stride).cast(), _mm512_shuffle_i32x4::<0xdd>(even, even_end));
                _mm512_storeu_si512(to.add(12 * to_stride).cast(), _mm512_shuffle_i32x4::<0xdd>(odd, odd_end));
            }
        }
    }

    #[inline(always)]
    unsafe fn int8(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn inputs8(from: *const i8, _wide: *const i16) -> __m512i {
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn sums8(start: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(start) }
    }
    #[inline(always)]
    unsafe fn dot8(sums: __m512i, weights: __m512i, inputs: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sums, weights, inputs) }
    }
    #[inline(always)]
    unsafe fn sums8_to_f32(sums: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(sums) }
    }
    #[inline(always)]
    unsafe fn int4(from: *const u8) -> [__m512i; 2] {
        unsafe {
            let bytes = _mm512_loadu_si512(from.cast());
            let low = _mm512_set1_epi8(15);
            [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low)]
        }
    }
    #[inline(always)]
    unsafe fn inputs4(from: *const i8) -> __m512i {
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn sums4() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn dot4(sums: __m512i, weights: __m512i, inputs: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sums, weights, inputs) }
    }
    #[inline(always)]
    unsafe fn sums4_to_f32(sums: __m512i, start: i32) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_add_epi32(sums, _mm512_set1_epi32(start))) }
    }
}
