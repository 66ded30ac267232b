//! Inputs of a product: rows of f32, or of bytes with a scale for each 32.

use super::packed::GROUP;

/// Rows quantised for integer kernels. Memory is kept from one use to the next.
#[derive(Default)]
pub(crate) struct Quantised {
    /// `[rows][groups * 32]`, -127 to 127; zero past the end of a row.
    pub(crate) values: Vec<i8>,
    /// The same in 16 bits, for instruction sets that multiply those: of each four, the first, third, second, fourth.
    pub(crate) wide: Vec<i16>,
    /// `[rows][groups]`.
    pub(crate) scales: Vec<f32>,
    /// `[rows][groups]`: sums of the values.
    pub(crate) sums: Vec<i32>,
    pub(crate) groups: usize,
}

impl Quantised {
    /// Quantises `[rows, columns]`.
    fn fill(&mut self, x: &[f32], columns: usize) {
        self.groups = columns.div_ceil(GROUP);
        let groups = x.len() / columns * self.groups;
        self.values.clear();
        self.values.resize(groups * GROUP, 0);
        self.wide.resize(groups * GROUP, 0);
        self.scales.resize(groups, 0.0);
        self.sums.resize(groups, 0);
        let rows = self.values.chunks_exact_mut(self.groups * GROUP);
        let rows = rows.zip(self.scales.chunks_exact_mut(self.groups)).zip(self.sums.chunks_exact_mut(self.groups));
        for (x, ((values, scales), sums)) in x.chunks_exact(columns).zip(rows) {
            let groups = values.chunks_exact_mut(GROUP).zip(scales).zip(sums);
            for (x, ((values, scale), sum)) in x.chunks(GROUP).zip(groups) {
                // In eight lanes, so that the compiler uses vectors.
                let mut lanes = [0.0_f32; 8];
                for x in x.chunks(8) {
                    for (lane, x) in lanes.iter_mut().zip(x) {
                        *lane = if x.abs() > *lane { x.abs() } else { *lane };
                    }
                }
                let greatest = lanes.iter().fold(0.0_f32, |a, b| a.max(*b));
                *scale = greatest / 127.0;
                let inverse = if greatest == 0.0 { 0.0 } else { 127.0 / greatest };
                for (value, x) in values.iter_mut().zip(x) {
                    // Adding 1.5 * 2^23 leaves the number, rounded, in the low bits.
                    *value = (x * inverse + 12_582_912.0).to_bits() as i8;
                }
                *sum = values.iter().map(|v| i32::from(*v)).sum();
            }
        }
        for (wide, values) in self.wide.chunks_exact_mut(4).zip(self.values.chunks_exact(4)) {
            wide.copy_from_slice(&[values[0], values[2], values[1], values[3]].map(i16::from));
        }
    }
}

/// `[rows, columns]` as a kernel wants them.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) values: Values<'a>,
}

#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    Float(&'a [f32]),
    Quantised(&'a Quantised),
}

impl<'a> Inputs<'a> {
    /// `x` is `[rows, columns]`; `bytes` is what [`super::packed::Format::wants_bytes`] says.
    pub(crate) fn new(bytes: bool, x: &'a [f32], columns: usize, buffer: &'a mut Quantised) -> Self {
        let values = if bytes {
            buffer.fill(x, columns);
            Values::Quantised(buffer)
        } else {
            Values::Float(x)
        };
        Self { rows: x.len() / columns, columns, values }
    }
}
