//! Weights in the layouts of `kernels/formats.cuh`.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::{DeviceSpec, ModelError, WeightFormat};

/// Widths are padded to a multiple of this many elements.
const PADDING: usize = 16;
/// Inputs that share a scale.
const SCALE_INPUTS: usize = 32;
/// Bytes of a run; its lanes have 16 bytes each.
const RUN_BYTES: usize = 64;

/// A width with its padding.
pub(super) fn padded(width: usize) -> usize {
    width.next_multiple_of(PADDING)
}

/// Type of activations, and of weights that are not quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Bf16,
    F16,
}

impl Half {
    /// Name in the names of kernels.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Bits of the nearest value. Values beyond the largest f16 become that one.
    pub(super) fn bits(self, value: f32) -> u16 {
        match self {
            Self::Bf16 => bf16::from_f32(value).to_bits(),
            Self::F16 => f16::from_f32(value.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())).to_bits(),
        }
    }
}

/// How weights are stored in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Plain(Half),
    Int8,
    Int4,
    Fp8,
}

impl Format {
    /// The format of `--weights`, and of the head, which is never coarser than 8 bits.
    pub(super) fn of(weights: WeightFormat, half: Half, index: usize) -> Result<(Self, Self), ModelError> {
        match weights {
            WeightFormat::Bf16 | WeightFormat::F16 => Ok((Self::Plain(half), Self::Plain(half))),
            WeightFormat::Int8 => Ok((Self::Int8, Self::Int8)),
            WeightFormat::Int4 => Ok((Self::Int4, Self::Int8)),
            WeightFormat::Fp8 => Ok((Self::Fp8, Self::Fp8)),
            WeightFormat::F32 | WeightFormat::Int8Channel => Err(ModelError::Device {
                device: DeviceSpec::Cuda(index).to_string(),
                reason: format!("weights are {weights}, supported on GPUs: bf16, f16, int8, int4 or fp8"),
            }),
        }
    }

    /// Name in the names of kernels.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain(_) => "plain",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Fp8 => "fp8",
        }
    }

    /// Inputs of a run.
    fn run_inputs(self) -> usize {
        match self {
            Self::Plain(_) => 32,
            Self::Int8 | Self::Fp8 => 64,
            Self::Int4 => 128,
        }
    }

    /// Bytes of a row with `inputs` inputs, a padded width.
    pub(super) fn row_bytes(self, inputs: usize) -> usize {
        match self {
            Self::Plain(_) => 2 * inputs,
            _ => inputs.div_ceil(self.run_inputs()) * RUN_BYTES,
        }
    }

    /// Scales of a row; 0 without quantisation.
    pub(super) fn row_scales(self, inputs: usize) -> usize {
        match self {
            Self::Plain(_) => 0,
            _ => inputs.div_ceil(self.run_inputs()) * self.run_inputs() / SCALE_INPUTS,
        }
    }

    /// Packs rows of `width` values each. Returns `[rows, row_bytes]` bytes and `[rows, row_scales]` scales in f16.
    pub(super) fn pack(self, values: &[f32], width: usize) -> (Vec<u8>, Vec<u16>) {
        let inputs = padded(width);
        let (row_bytes, row_scales) = (self.row_bytes(inputs), self.row_scales(inputs));
        let rows = values.len() / width;
        let (mut bytes, mut scales) = (vec![0; rows * row_bytes], vec![0; rows * row_scales]);
        if let Self::Plain(half) = self {
            bytes.par_chunks_exact_mut(row_bytes).zip(values.par_chunks_exact(width)).for_each(|(out, row)| {
                for (out, value) in out.chunks_exact_mut(2).zip(row) {
                    out.copy_from_slice(&half.bits(*value).to_le_bytes());
                }
            });
        } else {
            let places = bytes.par_chunks_exact_mut(row_bytes).zip(scales.par_chunks_exact_mut(row_scales));
            places.zip(values.par_chunks_exact(width)).for_each(|((bytes, scales), row)| {
                for (chunk, (scale, values)) in scales.iter_mut().zip(row.chunks(SCALE_INPUTS)).enumerate() {
                    *scale = self.pack_chunk(values, chunk, bytes);
                }
            });
        }
        (bytes, scales)
    }

    /// Quantises up to 32 inputs of a row; returns their scale. int8 and int4 round like the CPU engine, which follows
    /// llama.cpp's Q8_0 and Q4_0.
    fn pack_chunk(self, values: &[f32], chunk: usize, row: &mut [u8]) -> u16 {
        let extreme = values.iter().copied().fold(0.0_f32, |most, v| if v.abs() > most.abs() { v } else { most });
        let scale = f16::from_f32(match self {
            Self::Plain(_) => 1.0,
            Self::Int8 => extreme.abs() / 127.0,
            Self::Int4 => extreme / -8.0,
            Self::Fp8 => extreme.abs() / FP8_MAX,
        });
        let inverse = if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
        let first = chunk * SCALE_INPUTS;
        for i in 0..SCALE_INPUTS {
            // The padding of a row is zero as well, which is 8 in int4.
            let value = values.get(i).map_or(0.0, |value| value * inverse);
            let (at, high) = self.place(first + i);
            match self {
                Self::Plain(_) => {}
                Self::Int8 => row[at] = value.round().clamp(-127.0, 127.0) as i8 as u8,
                Self::Int4 => row[at] |= ((value + 8.5) as u8).min(15) << if high { 4 } else { 0 },
                Self::Fp8 => row[at] = fp8_bits(value),
            }
        }
        scale.to_bits()
    }

    /// The byte of an input within its row, and whether it is the byte's high half.
    fn place(self, input: usize) -> (usize, bool) {
        let run_inputs = self.run_inputs();
        let (run, chunk, lane, j) = (input / run_inputs, input % run_inputs / 32, input % 32 / 8, input % 8);
        let start = run * RUN_BYTES + lane * 16;
        match self {
            Self::Plain(_) => (2 * input, false),
            Self::Int8 | Self::Fp8 => (start + chunk * 8 + j, false),
            Self::Int4 => (start + chunk * 4 + j % 4, j >= 4),
        }
    }
}

/// The largest value of an 8-bit float with 4 bits of exponent.
const FP8_MAX: f32 = 448.0;

/// The nearest 8-bit float (e4m3), ties to even, saturating (Micikevicius et al., arXiv 2209.05433).
fn fp8_bits(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let size = value.abs();
    if size.is_nan() {
        return 0x7f;
    }
    if size >= FP8_MAX {
        return sign | 0x7e;
    }
    // Below the smallest normal value, steps have a fixed size. The code after the last of one range is the first of
    // the next, so rounding up needs no special case.
    let exponent = (size.to_bits() >> 23) as i32 - 127;
    let code = match exponent < -6 {
        true => (size * 512.0).round_ties_even() as i32,
        false => (exponent + 6) * 8 + (size * 2.0_f32.powi(3 - exponent)).round_ties_even() as i32,
    };
    sign | code.min(0x7e) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_padded_to_whole_loads() {
        let sizes = [(1689, 1696), (4505, 4512), (2334, 2336), (8171, 8176), (4096, 4096)];
        assert!(sizes.iter().all(|(width, expected)| padded(*width) == *expected));
        for format in [Format::Plain(Half::Bf16), Format::Int8, Format::Int4, Format::Fp8] {
            assert!(format.row_bytes(padded(1689)).is_multiple_of(16));
        }
    }

    #[test]
    fn each_input_has_a_place_of_its_own() {
        for format in [Format::Int8, Format::Int4, Format::Fp8] {
            let mut places: Vec<_> = (0..256).map(|input| format.place(input)).collect();
            assert!(places.iter().all(|(at, _)| *at < format.row_bytes(256)));
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), 256, "{format:?}");
        }
    }

    #[test]
    fn eight_bit_floats_round_to_nearest() {
        let decode = |bits: u8| {
            let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
            let size = match exponent {
                0 => mantissa / 512.0,
                _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
            };
            if bits & 0x80 != 0 { -size } else { size }
        };
        let all: Vec<f32> = (0..=0x7e).map(decode).collect();
        for code in 0..=0x7e {
            assert_eq!(fp8_bits(decode(code)), code);
            assert_eq!(fp8_bits(-decode(code)), code | 0x80);
        }
        for i in -2000..2000 {
            let value = i as f32 * 0.21;
            let best = all.iter().map(|v| (v - value.abs()).abs()).fold(f32::INFINITY, f32::min);
            let got = decode(fp8_bits(value));
            assert!((got - value).abs() <= best * 1.0001, "{value} became {got}");
        }
        assert_eq!((fp8_bits(1e9), fp8_bits(f32::NEG_INFINITY), fp8_bits(f32::NAN)), (0x7e, 0xfe, 0x7f));
    }
}
