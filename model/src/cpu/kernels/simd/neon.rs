//! NEON, which every 64-bit ARM processor has: 4 lanes, 32 registers.

use std::arch::aarch64::*;

use half::{bf16, f16};

use super::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Neon;

/// Adds to each lane the four products of its bytes.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn dot(sums: int32x4_t, weights: int8x16_t, inputs: int8x16_t) -> int32x4_t {
    // SAFETY: only register operations.
    unsafe {
        let low = vpaddlq_s16(vmull_s8(vget_low_s8(weights), vget_low_s8(inputs)));
        let high = vpaddlq_s16(vmull_high_s8(weights, inputs));
        vaddq_s32(sums, vpaddq_s32(low, high))
    }
}

// SAFETY of every block below: the trait's caller guarantees the pointers.
#[allow(unsafe_code, clippy::undocumented_unsafe_blocks)]
impl Simd for Neon {
    const LANES: usize = 4;
    const FAST_INT8: bool = true;
    const FAST_BF16: bool = false;
    const STREAMS_ALONE: bool = false;
    const WIDE_INPUTS: bool = false;
    type F = float32x4_t;
    type Int8 = int8x16_t;
    type Inputs8 = int8x16_t;
    type Sums8 = int32x4_t;
    type Int4 = int8x16_t;
    type Inputs4 = int8x16_t;
    type Sums4 = int32x4_t;

    #[inline(always)]
    unsafe fn splat(value: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: float32x4_t) {
        unsafe { vst1q_f32(to, value) }
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmaxq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn sum(value: float32x4_t) -> f32 {
        unsafe { vaddvq_f32(value) }
    }
    #[inline(always)]
    unsafe fn sum4(values: [float32x4_t; 4]) -> [f32; 4] {
        unsafe {
            let sums = vpaddq_f32(vpaddq_f32(values[0], values[1]), vpaddq_f32(values[2], values[3]));
            std::mem::transmute::<float32x4_t, [f32; 4]>(sums)
        }
    }
    #[inline(always)]
    unsafe fn scale_by_power(value: float32x4_t, shifted: float32x4_t) -> float32x4_t {
        unsafe {
            let power = vshlq_n_u32::<23>(vreinterpretq_u32_f32(shifted));
            vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(value), power))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const bf16) -> (float32x4_t, float32x4_t) {
        unsafe {
            let pairs = vreinterpretq_u32_u16(vld1q_u16(from.cast()));
            let odd = vandq_u32(pairs, vdupq_n_u32(0xffff_0000));
            (vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)), vreinterpretq_f32_u32(odd))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> float32x4_t {
        unsafe {
            let wide = from.cast::<[u16; 4]>().read_unaligned().map(|bits| f16::from_bits(bits).to_f32());
            vld1q_f32(wide.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn widen_bytes(from: *const u8) -> [float32x4_t; 4] {
        unsafe {
            let bytes = vreinterpretq_u32_u8(vld1q_u8(from));
            let low = vdupq_n_u32(0xff);
            [
                vcvtq_f32_u32(vandq_u32(bytes, low)),
                vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<8>(bytes), low)),
                vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<16>(bytes), low)),
                vcvtq_f32_u32(vshrq_n_u32::<24>(bytes)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
    #[inline(always)]
    unsafe fn prefetch_far(_from: *const u8) {}

    #[inline(always)]
    unsafe fn int8(from: *const u8) -> int8x16_t {
        // Subtracts the 128 that was added, because these products are of signed bytes.
        unsafe { vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from), vdupq_n_u8(0x80))) }
    }
    #[inline(always)]
    unsafe fn inputs8(from: *const i8, _wide: *const i16) -> int8x16_t {
        unsafe { vreinterpretq_s8_s32(vdupq_n_s32(from.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn sums8(_start: i32) -> int32x4_t {
        unsafe { vdupq_n_s32(0) }
    }
    #[inline(always)]
    unsafe fn dot8(sums: int32x4_t, weights: int8x16_t, inputs: int8x16_t) -> int32x4_t {
        unsafe { dot(sums, weights, inputs) }
    }
    #[inline(always)]
    unsafe fn sums8_to_f32(sums: int32x4_t) -> float32x4_t {
        unsafe { vcvtq_f32_s32(sums) }
    }
    #[inline(always)]
    unsafe fn int4(from: *const u8) -> [int8x16_t; 2] {
        unsafe {
            let bytes = vld1q_u8(from);
            [vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes))]
        }
    }
    #[inline(always)]
    unsafe fn inputs4(from: *const i8) -> int8x16_t {
        unsafe { vreinterpretq_s8_s32(vdupq_n_s32(from.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn sums4() -> int32x4_t {
        unsafe { vdupq_n_s32(0) }
    }
    #[inline(always)]
    unsafe fn dot4(sums: int32x4_t, weights: int8x16_t, inputs: int8x16_t) -> int32x4_t {
        unsafe { dot(sums, weights, inputs) }
    }
    #[inline(always)]
    unsafe fn sums4_to_f32(sums: int32x4_t, start: i32) -> float32x4_t {
        unsafe { vcvtq_f32_s32(vaddq_s32(sums, vdupq_n_s32(start))) }
    }
}
