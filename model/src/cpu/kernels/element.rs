//! Element types of a KV cache.

use half::{bf16, f16};

use super::simd::Simd;

/// A storage type of KV. Arithmetic is in f32.
pub(crate) trait Element: Copy + Send + Sync {
    /// Converts from f32, rounding to nearest.
    fn from_f32(value: f32) -> Self;
    /// Converts to f32, exactly.
    fn to_f32(self) -> f32;
    /// Loads a vector of LANES values, converted to f32.
    ///
    /// # Safety
    /// `from` points to LANES values, and the processor has the instruction set.
    #[allow(unsafe_code)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F;
}

macro_rules! element {
    ($t:ty, $from_f32:expr, $load:ident as $pointer:ty) => {
        impl Element for $t {
            fn from_f32(value: f32) -> Self {
                $from_f32(value)
            }
            fn to_f32(self) -> f32 {
                self.into()
            }
            #[inline(always)]
            #[allow(unsafe_code)]
            unsafe fn load<S: Simd>(from: *const Self) -> S::F {
                // SAFETY: guaranteed by the caller; f16 has the layout of u16.
                unsafe { S::$load(from.cast::<$pointer>()) }
            }
        }
    };
}
element!(f32, std::convert::identity, load as f32);
element!(bf16, bf16::from_f32, load_bf16 as bf16);
element!(f16, f16::from_f32, load_f16 as u16);
