//! Elements of quantised matrices: bytes, and integers packed in 32-bit words.

/// A matrix of small numbers.
pub(super) enum Values<'a> {
    /// E4M3 floats (arXiv 2209.05433), `[rows, columns]`.
    Fp8(&'a [u8]),
    /// Signed bytes, `[rows, columns]`.
    Int8(&'a [u8]),
    /// Packed unsigned integers.
    Packed(Packed<'a>),
}

/// Unsigned integers in little-endian 32-bit words. A word holds neighbours of one row or of one column.
pub(super) struct Packed<'a> {
    pub words: &'a [u8],
    /// Bits per integer, a divisor of 32.
    pub bits: usize,
    pub packs: Packs,
    /// Distance in words between rows, or between groups of packed rows.
    pub row_step: usize,
    /// Distance in words between columns, or between groups of packed columns.
    pub column_step: usize,
    /// The place within a word of each packed neighbour, lowest bits first.
    pub order: [u8; MAX_PER_WORD],
}

/// The smallest integers have this number of bits.
pub(super) const MIN_BITS: usize = 4;
const MAX_PER_WORD: usize = 32 / MIN_BITS;

/// Neighbours are packed from the lowest bits up.
pub(super) const IN_ORDER: [u8; MAX_PER_WORD] = [0, 1, 2, 3, 4, 5, 6, 7];

/// What a word holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Packs {
    /// Neighbours of one column.
    Rows,
    /// Neighbours of one row.
    Columns,
}

impl Packed<'_> {
    fn word(&self, index: usize) -> u32 {
        let bytes = self.words[4 * index..].first_chunk().copied().unwrap_or_default();
        u32::from_le_bytes(bytes)
    }

    /// Widens the first `out.len()` integers of a row.
    fn row(&self, row: usize, out: &mut [f32]) {
        let (per_word, mask) = (32 / self.bits, (1_u64 << self.bits) as u32 - 1);
        let shift = |neighbour: usize| usize::from(self.order[neighbour]) * self.bits;
        match self.packs {
            Packs::Columns => {
                for (at, out) in out.chunks_mut(per_word).enumerate() {
                    let word = self.word(row * self.row_step + at * self.column_step);
                    for (neighbour, out) in out.iter_mut().enumerate() {
                        *out = (word >> shift(neighbour) & mask) as f32;
                    }
                }
            }
            Packs::Rows => {
                let (first, shift) = (row / per_word * self.row_step, shift(row % per_word));
                for (column, out) in out.iter_mut().enumerate() {
                    *out = (self.word(first + column * self.column_step) >> shift & mask) as f32;
                }
            }
        }
    }
}

impl Values<'_> {
    /// Widens a row. `out` has as many elements as the matrix has columns.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let within = row * out.len()..(row + 1) * out.len();
        match self {
            Self::Fp8(bytes) => out.iter_mut().zip(&bytes[within]).for_each(|(out, byte)| *out = fp8(*byte)),
            Self::Int8(bytes) => {
                out.iter_mut().zip(&bytes[within]).for_each(|(out, byte)| *out = f32::from(byte.cast_signed()));
            }
            Self::Packed(packed) => packed.row(row, out),
        }
    }
}

/// The value of an E4M3 float: one bit of sign, four of exponent with bias 7, three of mantissa. It has no infinities;
/// 7F and FF are NaN.
fn fp8(byte: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(byte >> 3 & 0xf), u32::from(byte & 7));
    let magnitude = match exponent {
        // Subnormal: multiples of 2^-9.
        0 => mantissa as f32 / 512.0,
        _ if byte & 0x7f == 0x7f => f32::NAN,
        _ => f32::from_bits((exponent + 127 - 7) << 23 | mantissa << 20),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_has_the_values_of_the_format() {
        for (byte, value) in [(0x00, 0.0), (0x01, 0.001_953_125), (0x07, 0.013_671_875), (0x08, 0.015_625)] {
            assert_eq!((fp8(byte), fp8(byte | 0x80)), (value, -value));
        }
        assert_eq!([fp8(0x38), fp8(0x39), fp8(0x7e), fp8(0xfe)], [1.0, 1.125, 448.0, -448.0]);
        assert!(fp8(0x7f).is_nan() && fp8(0xff).is_nan());
        assert!((0..0x7e).all(|byte| fp8(byte) < fp8(byte + 1)));
    }
}
