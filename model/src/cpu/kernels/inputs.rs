//! Inputs of a product: rows of f32, of bf16, or of int8 with one scale per 32 values.

use half::bf16;
use rayon::prelude::*;

use super::{
    packed::{Arithmetic, GROUP, Packed},
    simd::{Isa, Kernel, Simd},
};

/// Minimum number of values that a thread converts at a time.
const WORTH_SHARING: usize = 1 << 14;

/// Number of rows of the next tile. Splits `left` rows evenly, so that the last tile is not much smaller than the
/// others.
#[inline(always)]
pub(crate) fn tile_rows(left: usize, most: usize) -> usize {
    left.div_ceil(left.div_ceil(most))
}

/// Rounds to nearest, ties to even. There is no branch for NaN: the NaNs that arithmetic produces stay NaN.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    bf16::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16)
}

fn rows_worth_sharing(columns: usize) -> usize {
    (WORTH_SHARING / columns.max(1)).max(1)
}

/// The type that inputs are converted to before they are multiplied with weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InputType {
    F32,
    Bf16,
    Int8,
}

/// Buffers for converted inputs, reused between products.
#[derive(Default)]
pub(crate) struct InputBuffer {
    rounded: Rounded,
    quantised: Quantised,
}

/// Maximum rows of a tile of bf16 inputs: with two vectors of weights, the sums fit in 32 registers.
const MOST_TILE_ROWS: usize = 12;

/// Rows rounded to bf16, in the order in which the kernel reads a tile of rows.
#[derive(Default)]
pub(crate) struct Rounded {
    /// Tiles, each `[stride / 2][rows of the tile][2]`. Rows are padded with zeros to `stride`.
    pub(crate) values: Vec<bf16>,
    /// Values per row including padding; even.
    pub(crate) stride: usize,
    /// Rows per tile. The last tile may have fewer.
    pub(crate) tile_rows: usize,
}

impl Rounded {
    fn fill(&mut self, isa: Isa, x: &[f32], columns: usize) {
        let rows = x.len() / columns;
        self.stride = columns.next_multiple_of(2);
        self.tile_rows = tile_rows(rows.max(1), MOST_TILE_ROWS);
        self.values.resize(rows * self.stride, bf16::ZERO);
        let tiles = self.values.par_chunks_mut(self.tile_rows * self.stride);
        let tiles = x.par_chunks(self.tile_rows * columns).zip(tiles);
        let least = rows_worth_sharing(self.tile_rows * columns);
        tiles.with_min_len(least).for_each(|(x, to)| isa.run(Round { x, to, columns, stride: self.stride }));
    }
}

/// Rounds one tile.
struct Round<'a> {
    x: &'a [f32],
    to: &'a mut [bf16],
    columns: usize,
    stride: usize,
}

impl Kernel for Round<'_> {
    type Output = ();
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) {
        let rows = self.to.len() / self.stride;
        for (row, x) in self.x.chunks_exact(self.columns).enumerate() {
            let to = self.to[2 * row..].chunks_mut(2 * rows);
            for (x, to) in x.chunks(2).zip(to) {
                to[0] = round_bf16(x[0]);
                to[1] = x.get(1).map_or(bf16::ZERO, |x| round_bf16(*x));
            }
        }
    }
}

/// Rows quantised to int8 for the integer kernels.
#[derive(Default)]
pub(crate) struct Quantised {
    /// `[rows][groups * 32]`, from -127 to 127. Rows are padded with zeros.
    pub(crate) values: Vec<i8>,
    /// The same values in 16 bits, for instruction sets that multiply 16-bit numbers. Of every four values, the second
    /// and third are swapped.
    pub(crate) wide: Vec<i16>,
    /// `[rows][groups]`.
    pub(crate) scales: Vec<f32>,
    /// `[rows][groups]`: sum of each group's values.
    pub(crate) sums: Vec<i32>,
    pub(crate) groups: usize,
}

impl Quantised {
    /// Quantises `[rows, columns]`.
    fn fill(&mut self, isa: Isa, x: &[f32], columns: usize) {
        self.groups = columns.div_ceil(GROUP);
        let (groups, width) = (self.groups, self.groups * GROUP);
        let all = x.len() / columns * groups;
        self.values.resize(all * GROUP, 0);
        self.wide.resize(all * GROUP, 0);
        self.scales.resize(all, 0.0);
        self.sums.resize(all, 0);
        let rows = x.par_chunks_exact(columns).zip(self.values.par_chunks_exact_mut(width));
        let rows = rows.zip(self.wide.par_chunks_exact_mut(width)).zip(self.scales.par_chunks_exact_mut(groups));
        let rows = rows.zip(self.sums.par_chunks_exact_mut(groups)).with_min_len(rows_worth_sharing(columns));
        rows.for_each(|((((x, values), wide), scales), sums)| isa.run(Quantise { x, values, wide, scales, sums }));
    }
}

/// Quantises one row.
struct Quantise<'a> {
    x: &'a [f32],
    values: &'a mut [i8],
    wide: &'a mut [i16],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
}

impl Kernel for Quantise<'_> {
    type Output = ();
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) {
        let groups = self.values.chunks_exact_mut(GROUP).zip(self.scales).zip(self.sums);
        for (x, ((values, scale), sum)) in self.x.chunks(GROUP).zip(groups) {
            // Pads to a whole group, so that the compiler vectorises the loops over eight lanes.
            let mut group = [0.0_f32; GROUP];
            group[..x.len()].copy_from_slice(x);
            // Without signs, bit patterns order like values, with infinity and NaN greatest. So NaN and infinity
            // propagate to the scale.
            let mut lanes = [0_u32; 8];
            for x in group.chunks_exact(8) {
                for (lane, x) in lanes.iter_mut().zip(x) {
                    *lane = (*lane).max(x.abs().to_bits());
                }
            }
            let greatest = f32::from_bits(lanes.into_iter().fold(0, u32::max));
            *scale = greatest / 127.0;
            let inverse = if greatest == 0.0 { 0.0 } else { 127.0 / greatest };
            for (value, x) in values.iter_mut().zip(group) {
                // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
                *value = (x * inverse + 12_582_912.0).to_bits() as i8;
            }
            *sum = values.iter().map(|v| i32::from(*v)).sum();
        }
        if S::WIDE_INPUTS {
            for (wide, values) in self.wide.chunks_exact_mut(4).zip(self.values.chunks_exact(4)) {
                wide.copy_from_slice(&[values[0], values[2], values[1], values[3]].map(i16::from));
            }
        }
    }
}

/// Inputs `[rows, columns]` in a kernel's input type.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) values: Values<'a>,
}

#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a Rounded),
    Int8(&'a Quantised),
}

impl<'a> Inputs<'a> {
    /// Converts `x`, `[rows, columns]`, to `wanted`, which is the result of [`super::packed::WeightFormat::inputs`].
    pub(crate) fn new(isa: Isa, wanted: InputType, x: &'a [f32], columns: usize, buffer: &'a mut InputBuffer) -> Self {
        let values = match wanted {
            InputType::F32 => Values::F32(x),
            InputType::Bf16 => {
                buffer.rounded.fill(isa, x, columns);
                Values::Bf16(&buffer.rounded)
            }
            InputType::Int8 => {
                buffer.quantised.fill(isa, x, columns);
                Values::Int8(&buffer.quantised)
            }
        };
        Self { rows: x.len() / columns, columns, values }
    }
}

impl Arithmetic {
    /// Converts `x` to the input type for a product with `matrix`.
    pub(crate) fn inputs<'a>(self, matrix: &Packed, x: &'a [f32], buffer: &'a mut InputBuffer) -> Inputs<'a> {
        Inputs::new(self.isa, matrix.format().inputs(self), x, matrix.columns(), buffer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_are_within_half_a_step(rows in 1_usize..4, columns in 1_usize..100, exponent in -20_i32..20, seed: u64) {
            let mut state = seed;
            let x: Vec<f32> = (0..rows * columns).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * (exponent as f32).exp2()
            }).collect();
            for isa in Isa::available() {
                let mut buffer = InputBuffer::default();
                buffer.quantised.fill(*isa, &x, columns);
                let q = &buffer.quantised;
                for (row, x) in x.chunks_exact(columns).enumerate() {
                    for (group, x) in x.chunks(GROUP).enumerate() {
                        let at = row * q.groups + group;
                        let (values, scale) = (&q.values[at * GROUP..][..GROUP], q.scales[at]);
                        for (value, x) in values.iter().zip(x) {
                            let distance = (f32::from(*value) * scale - x).abs();
                            prop_assert!(distance <= scale * 0.5001, "{isa:?}: {x} became {value} * {scale}");
                        }
                        prop_assert!(values[x.len()..].iter().all(|value| *value == 0));
                        prop_assert_eq!(q.sums[at], values.iter().map(|value| i32::from(*value)).sum::<i32>());
                    }
                }
            }
        }

        #[test]
        fn rounding_is_that_of_bf16(x in prop::num::f32::ANY) {
            // The payload of a NaN may change; only NaNs produced by arithmetic need to stay NaN.
            if !x.is_nan() {
                prop_assert_eq!(round_bf16(x).to_bits(), bf16::from_f32(x).to_bits());
            }
            prop_assert!(round_bf16(f32::NAN).is_nan());
            // Halfway between two bf16 values.
            let tie = f32::from_bits(x.to_bits() & 0xffff_0000 | 0x8000);
            if !tie.is_nan() {
                prop_assert_eq!(round_bf16(tie).to_bits(), bf16::from_f32(tie).to_bits());
            }
        }
    }

    #[test]
    fn what_is_no_number_does_not_become_one() {
        for (bad, isa) in
            [f32::NAN, f32::INFINITY].into_iter().flat_map(|x| Isa::available().iter().map(move |i| (x, i)))
        {
            let mut x = [1.0; 40];
            x[35] = bad;
            let mut buffer = InputBuffer::default();
            buffer.quantised.fill(*isa, &x, 40);
            let product = |i: usize| f32::from(buffer.quantised.values[i]) * buffer.quantised.scales[i / GROUP];
            assert!(product(0) == 1.0 && product(35).is_nan(), "{isa:?}: {bad} became {}", product(35));
        }
    }
}
