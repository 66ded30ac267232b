//! Compares the kernels with a product in f64, on every available instruction set.

use proptest::prelude::*;

use super::*;
use crate::cpu::kernels::{
    inputs::{InputBuffer, InputType},
    packed::WeightFormat,
};

const FORMATS: [WeightFormat; 6] = [
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::Bf16,
    WeightFormat::Int8,
    WeightFormat::Int8Channel,
    WeightFormat::Int4,
];

/// Every weight format with every input type that it has a kernel for.
const KERNELS: [(WeightFormat, InputType); 9] = [
    (WeightFormat::F32, InputType::F32),
    (WeightFormat::F16, InputType::F32),
    (WeightFormat::Bf16, InputType::F32),
    (WeightFormat::Bf16, InputType::Bf16),
    (WeightFormat::Int8, InputType::F32),
    (WeightFormat::Int8, InputType::Int8),
    (WeightFormat::Int8Channel, InputType::F32),
    (WeightFormat::Int8Channel, InputType::Int8),
    (WeightFormat::Int4, InputType::Int8),
];

fn random(count: usize, mut state: u64) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn pack(format: WeightFormat, rows: usize, columns: usize, values: &[f32]) -> Packed {
    Packed::pack::<std::io::Error>(format, rows, columns, |panel, out| {
        let from = &values[panel * PANEL * columns..rows.min((panel + 1) * PANEL) * columns];
        out[..from.len()].copy_from_slice(from);
        Ok(())
    })
    .unwrap()
}

/// `[x rows][matrix rows]`.
fn product(isa: Isa, matrix: &Packed, x: &[f32], wanted: InputType) -> Vec<f32> {
    let mut buffer = InputBuffer::default();
    let inputs = Inputs::new(isa, wanted, x, matrix.columns(), &mut buffer);
    let mut out = vec![f32::NAN; inputs.rows * matrix.rows()];
    multiply(isa, matrix, inputs, 1, &mut out, matrix.rows(), |_, [sums, _], out| {
        out.copy_from_slice(&sums[..out.len()]);
    });
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn every_kernel_multiplies(
        (format, wanted) in prop::sample::select(&KERNELS[..]), rows in 1_usize..30, outputs in 1_usize..100,
        columns in 1_usize..1200, seed: u64,
    ) {
        let weights = random(outputs * columns, seed);
        let x = random(rows * columns, !seed);
        let matrix = pack(format, outputs, columns, &weights);
        let mut buffer = InputBuffer::default();
        // The exact product in f64 of weights and inputs as stored.
        let stored: Vec<Vec<f32>> = (0..outputs).map(|o| {
            let mut row = vec![0.0; columns];
            matrix.row(o, &mut row);
            row
        }).collect();
        let mut given = |isa| match Inputs::new(isa, wanted, &x, columns, &mut buffer).values {
            Values::F32(x) => x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(),
            Values::Bf16(x) => (0..rows * columns).map(|i| {
                let (row, column) = (i / columns, i % columns);
                let tile = row / x.tile_rows;
                let tile_rows = x.tile_rows.min(rows - tile * x.tile_rows);
                let within = (column / 2 * tile_rows + row % x.tile_rows) * 2 + column % 2;
                f64::from(x.values[tile * x.tile_rows * x.stride + within].to_f32())
            }).collect(),
            Values::Int8(q) => (0..rows * columns).map(|i| {
                let group = i / columns * q.groups + i % columns / GROUP;
                let value = q.values[group * GROUP + i % columns % GROUP];
                f64::from(value) * f64::from(q.scales[group])
            }).collect(),
        };
        for isa in Isa::available() {
            let inputs = given(*isa);
            let got = product(*isa, &matrix, &x, wanted);
            for row in 0..rows {
                let x_row = &x[row * columns..][..columns];
                let alone = product(*isa, &matrix, x_row, wanted);
                let beside = &got[row * outputs..][..outputs];
                prop_assert_eq!(&alone[..], beside, "{:?} {:?} {:?}: not as alone", isa, format, wanted);
                for (o, weights) in stored.iter().enumerate() {
                    let terms = weights.iter().zip(&inputs[row * columns..]);
                    let exact: f64 = terms.map(|(w, x)| f64::from(*w) * x).sum();
                    let found = f64::from(got[row * outputs + o]);
                    let bound = 1e-6 * columns as f64;
                    prop_assert!((found - exact).abs() <= bound, "{isa:?} {format:?} {wanted:?}: {found}, not {exact}");
                }
            }
        }
    }

    #[test]
    fn packing_loses_no_more_than_the_format_says(columns in 1_usize..300, seed: u64) {
        let weights = random(columns, seed);
        for format in FORMATS {
            let mut row = vec![0.0; columns];
            pack(format, 1, columns, &weights).row(0, &mut row);
            for (group, stored) in weights.chunks(GROUP).zip(row.chunks(GROUP)) {
                let of = |values: &[f32]| values.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
                let (greatest, all) = (of(group), of(&weights));
                let bound = match format {
                    WeightFormat::F32 => 0.0,
                    WeightFormat::F16 => greatest / 2048.0,
                    WeightFormat::Bf16 => greatest / 256.0,
                    // Half a step, plus the rounding of the scale.
                    WeightFormat::Int8 => greatest / 127.0 * 0.57,
                    WeightFormat::Int8Channel => all / 127.0 * 0.51,
                    // A whole step, because the range is -8 to 7.
                    WeightFormat::Int4 => greatest / 8.0 * 1.01,
                    WeightFormat::Fp8 => unreachable!("not in FORMATS"),
                };
                for (a, b) in group.iter().zip(stored) {
                    prop_assert!((a - b).abs() <= bound, "{format:?}: {a} became {b}");
                }
            }
        }
    }
}

/// Weights as in Q8_0 and Q4_0 files: integers times an f16 scale, with one integer of each group at the end of the
/// range.
#[test]
fn what_was_quantised_so_before_loses_nothing() {
    for (format, most, least) in [(WeightFormat::Int8, 127.0, -127.0), (WeightFormat::Int4, 7.0, -8.0)] {
        let columns = 96;
        let mut weights = random(columns, 7);
        for (group, values) in weights.chunks_exact_mut(GROUP).enumerate() {
            let scale = half::f16::from_f32(0.013 * (group as f32 + 1.0)).to_f32();
            values[group * 3] = -1.0;
            values.iter_mut().for_each(|value| *value = (*value * -least).round().clamp(least, most) * scale);
        }
        let mut row = vec![0.0; columns];
        pack(format, 1, columns, &weights).row(0, &mut row);
        assert_eq!(row, weights, "{format:?}");
    }
}

#[test]
fn two_panels_that_belong_together_come_together() {
    let weights = random(128 * 40, 1);
    let matrix = pack(WeightFormat::Bf16, 128, 40, &weights);
    let x = random(3 * 40, 2);
    let apart = product(Isa::best(), &matrix, &x, InputType::F32);
    let mut buffer = InputBuffer::default();
    let mut out = vec![0.0; 3 * 64];
    let inputs = Inputs::new(Isa::best(), InputType::F32, &x, 40, &mut buffer);
    multiply(Isa::best(), &matrix, inputs, 2, &mut out, 64, |column, [first, second], out| {
        assert!(column == 0 || column == PANEL);
        out.iter_mut().zip(first.iter().zip(second)).for_each(|(out, (a, b))| *out = a - 2.0 * b);
    });
    for row in 0..3 {
        for column in 0..64 {
            let at = row * 128 + column / PANEL * 2 * PANEL + column % PANEL;
            assert_eq!(out[row * 64 + column], apart[at] - 2.0 * apart[at + PANEL]);
        }
    }
}
