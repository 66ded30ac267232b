//! Plain Rust, for processors without an implementation of their own. The other implementations are tested against the
//! same references.

use half::{bf16, f16};

use super::Simd;

const LANES: usize = 8;

#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn dot(sums: [i32; LANES], weights: [[u8; 4]; LANES], inputs: [i8; 4]) -> [i32; LANES] {
    std::array::from_fn(|lane| {
        sums[lane] + (0..4).map(|i| i32::from(weights[lane][i]) * i32::from(inputs[i])).sum::<i32>()
    })
}

#[allow(unsafe_code)]
impl Simd for Portable {
    const LANES: usize = LANES;
    const FAST_INT8: bool = false;
    const FAST_BF16: bool = false;
    const STREAMS_ALONE: bool = false;
    const WIDE_INPUTS: bool = false;
    type F = [f32; LANES];
    type Int8 = [[u8; 4]; LANES];
    type Inputs8 = [i8; 4];
    type Sums8 = [i32; LANES];
    type Int4 = [[u8; 4]; LANES];
    type Inputs4 = [i8; 4];
    type Sums4 = [i32; LANES];

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        // SAFETY: the caller guarantees LANES values, and unaligned reads need no alignment.
        unsafe { from.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        // SAFETY: as for `load`.
        unsafe { to.cast::<Self::F>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Not f32::mul_add, which is a slow function call without the FMA instruction.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn sum(v: Self::F) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
    #[inline(always)]
    unsafe fn scale_by_power(value: Self::F, shifted: Self::F) -> Self::F {
        map2(value, shifted, |v, s| f32::from_bits(v.to_bits().wrapping_add(s.to_bits() << 23)))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::F {
        // SAFETY: the caller guarantees LANES values.
        let values = unsafe { from.cast::<[bf16; LANES]>().read_unaligned() };
        values.map(|v| f32::from_bits(u32::from(v.to_bits()) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const bf16) -> (Self::F, Self::F) {
        // SAFETY: the caller guarantees 2 * LANES values.
        let pairs = unsafe { from.cast::<[[bf16; 2]; LANES]>().read_unaligned() };
        let widen = |v: bf16| f32::from_bits(u32::from(v.to_bits()) << 16);
        (pairs.map(|p| widen(p[0])), pairs.map(|p| widen(p[1])))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::F {
        // SAFETY: the caller guarantees LANES values.
        let values = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        values.map(|bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn widen_bytes(from: *const u8) -> [Self::F; 4] {
        // SAFETY: the caller guarantees 4 * LANES bytes.
        let lanes = unsafe { from.cast::<[[u8; 4]; LANES]>().read_unaligned() };
        std::array::from_fn(|i| lanes.map(|lane| f32::from(lane[i])))
    }
    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
    #[inline(always)]
    unsafe fn prefetch_far(_from: *const u8) {}

    #[inline(always)]
    unsafe fn int8(from: *const u8) -> Self::Int8 {
        // SAFETY: the caller guarantees 4 * LANES bytes.
        unsafe { from.cast::<Self::Int8>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn inputs8(from: *const i8, _wide: *const i16) -> Self::Inputs8 {
        // SAFETY: the caller guarantees four bytes.
        unsafe { from.cast::<[i8; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn sums8(start: i32) -> Self::Sums8 {
        [start; LANES]
    }
    #[inline(always)]
    unsafe fn dot8(sums: Self::Sums8, weights: Self::Int8, inputs: Self::Inputs8) -> Self::Sums8 {
        dot(sums, weights, inputs)
    }
    #[inline(always)]
    unsafe fn sums8_to_f32(sums: Self::Sums8) -> Self::F {
        sums.map(|s| s as f32)
    }
    #[inline(always)]
    unsafe fn int4(from: *const u8) -> [Self::Int4; 2] {
        // SAFETY: the caller guarantees 4 * LANES bytes.
        let bytes = unsafe { from.cast::<Self::Int4>().read_unaligned() };
        [bytes.map(|lane| lane.map(|b| b & 15)), bytes.map(|lane| lane.map(|b| b >> 4))]
    }
    #[inline(always)]
    unsafe fn inputs4(from: *const i8) -> Self::Inputs4 {
        // SAFETY: the caller guarantees four bytes.
        unsafe { from.cast::<[i8; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn sums4() -> Self::Sums4 {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn dot4(sums: Self::Sums4, weights: Self::Int4, inputs: Self::Inputs4) -> Self::Sums4 {
        dot(sums, weights, inputs)
    }
    #[inline(always)]
    unsafe fn sums4_to_f32(sums: Self::Sums4, start: i32) -> Self::F {
        sums.map(|s| (s + start) as f32)
    }
}
