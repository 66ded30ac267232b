//! Elements of a KV cache.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// A type that KV may be stored in; arithmetic is in f32.
pub(crate) trait Element: Copy + Send + Sync {
    /// Rounds to nearest.
    fn from_f32(value: f32) -> Self;
    /// The values as f32, in `scratch` where they are stored otherwise.
    fn widen<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32];
}

impl Element for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }
    fn widen<'a>(values: &'a [Self], _scratch: &'a mut Vec<f32>) -> &'a [f32] {
        values
    }
}

macro_rules! half_element {
    ($t:ty) => {
        impl Element for $t {
            fn from_f32(value: f32) -> Self {
                <$t>::from_f32(value)
            }
            fn widen<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
                scratch.resize(values.len(), 0.0);
                values.convert_to_f32_slice(scratch);
                scratch
            }
        }
    };
}
half_element!(bf16);
half_element!(f16);
