//! Products of input rows with a packed matrix.
//!
//! The unit of parallel work is one panel (32 outputs) for all input rows. Inputs are processed in chunks whose weights
//! stay in the first-level cache while all rows use them. The sum for one row and output is always computed in the
//! order of the inputs, so it does not depend on the other rows or on how work is distributed.

mod bf16;
mod float;
mod integer;
#[cfg(test)]
mod tests;

use std::cell::RefCell;

use rayon::prelude::*;

use super::{
    inputs::{Inputs, Values, tile_rows},
    memory::Shared,
    packed::{GROUP, PANEL, Packed, WeightFormat},
    simd::{Isa, Kernel, Simd},
};

/// Inputs per chunk; their weights, widened to f32, take 16 KiB.
const CHUNK_COLUMNS: usize = 128;
/// Prefetch distance for a stream of weights, in bytes.
const AHEAD: usize = 4096;
/// With at most this many rows, the kernel is limited by memory, and some processors prefetch well enough without
/// hints.
const FEW_ROWS: usize = 2;
/// Bytes of weights per task: much less than a matrix, so that all threads finish at about the same time, even if other
/// programs delay one of them.
const TASK_BYTES: usize = 256 << 10;
/// Minimum number of multiplications to hand to a thread at a time.
const WORTH_SHARING: usize = 1 << 16;

thread_local! {
    /// Results of a task, and a chunk of widened weights.
    static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Multiplies `inputs` by `matrix` into `out`, `[rows][width]`.
///
/// Each task combines `panels` panels, 1 or 2, into 32 columns of `out`. For each row, it calls `finish(column, [first,
/// second], out)` with the 32 sums of each panel (`second` is empty if `panels` is 1). The last task has fewer columns
/// if `width` is not a multiple of 32.
pub(crate) fn multiply(
    isa: Isa,
    matrix: &Packed,
    inputs: Inputs<'_>,
    panels: usize,
    out: &mut [f32],
    width: usize,
    finish: impl Fn(usize, [&[f32]; 2], &mut [f32]) + Sync,
) {
    assert_eq!(matrix.columns(), inputs.columns, "the inputs' columns do not match the matrix");
    let tasks = matrix.panels() / panels;
    assert!(width <= tasks * PANEL && width > (tasks - 1) * PANEL && out.len() == inputs.rows * width);
    let each = inputs.rows * PANEL;
    let out = Shared::new(out);
    let task = |index: usize| {
        SCRATCH.with_borrow_mut(|(results, widened)| {
            if results.len() < panels * each {
                results.resize(panels * each, 0.0);
            }
            let results = &mut results[..panels * each];
            results.fill(0.0);
            widened.resize(CHUNK_COLUMNS * PANEL, 0.0);
            for (i, results) in results.chunks_exact_mut(each).enumerate() {
                isa.run(PanelProduct { matrix, panel: index * panels + i, inputs, results, widened });
            }
            let column = index * PANEL;
            let count = PANEL.min(width - column);
            for row in 0..inputs.rows {
                let sums = |panel: usize| results.get(panel * each + row * PANEL..).map_or(&[][..], |s| &s[..PANEL]);
                let second = if panels == 2 { sums(1) } else { &[] };
                // SAFETY: tasks write to disjoint columns.
                #[allow(unsafe_code)]
                let out = unsafe { out.part(row * width + column, count) };
                finish(column, [sums(0), second], out);
            }
        });
    };
    let work = each * panels * matrix.columns();
    if tasks * work < 2 * WORTH_SHARING {
        (0..tasks).for_each(task);
    } else {
        let least = (WORTH_SHARING / work).max(1);
        let most = (TASK_BYTES / (panels * matrix.format().panel_bytes(matrix.columns()))).max(least);
        (0..tasks).into_par_iter().with_min_len(least).with_max_len(most).for_each(task);
    }
}

/// What a tile of rows prefetches while it processes a chunk of weights.
#[derive(Clone, Copy)]
struct Fetch {
    /// Range of steps that prefetch.
    steps: (usize, usize),
    /// Distance from the bytes that a step reads.
    ahead_bytes: usize,
    /// Whether to prefetch into the second-level cache instead of the first.
    far: bool,
}

impl Fetch {
    /// Prefetches in every step.
    const STEADY: Self = Self { steps: (0, usize::MAX), ahead_bytes: AHEAD, far: false };

    /// For few rows: a steady stream, or nothing if the processor prefetches better by itself.
    #[inline(always)]
    fn stream<S: Simd>() -> Self {
        if S::STREAMS_ALONE { Self { steps: (0, 0), ..Self::STEADY } } else { Self::STEADY }
    }

    /// For several tiles that process the same chunk of `steps` steps: each tile prefetches its share of the data
    /// `ahead_bytes` further on, which is the next chunk, so that memory is never idle.
    #[inline(always)]
    fn part(tile: usize, tiles: usize, steps: usize, ahead_bytes: usize) -> Self {
        Self { steps: (tile * steps / tiles, (tile + 1) * steps / tiles), ahead_bytes, far: true }
    }

    /// Prefetches for a step that reads at `from`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn ask<S: Simd>(self, step: usize, from: *const u8) {
        if self.steps.0 <= step && step < self.steps.1 {
            let from = from.wrapping_add(self.ahead_bytes);
            // SAFETY: prefetching is allowed for any address.
            unsafe { if self.far { S::prefetch_far(from) } else { S::prefetch(from) } }
        }
    }
}

/// The product of one panel with all rows.
struct PanelProduct<'a> {
    matrix: &'a Packed,
    panel: usize,
    inputs: Inputs<'a>,
    /// `[rows][32]`, initially zero.
    results: &'a mut [f32],
    /// Buffer for a chunk of f32 weights.
    widened: &'a mut [f32],
}

impl Kernel for PanelProduct<'_> {
    type Output = ();

    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn run<S: Simd>(self) {
        let panel = self.matrix.panel(self.panel);
        let (rows, columns, format) = (self.inputs.rows, self.inputs.columns, self.matrix.format());
        assert!(panel.len() == format.panel_bytes(columns) && self.results.len() == rows * PANEL);
        // SAFETY: the asserts here and below guarantee that all elements of a tile exist: the panel has `columns`
        // columns in this format, and there are `rows` rows of inputs and results. The caller guarantees the
        // instruction set.
        unsafe {
            match self.inputs.values {
                Values::F32(x) => {
                    assert!(x.len() >= rows * columns && self.widened.len() == CHUNK_COLUMNS * PANEL);
                    float::panel::<S>(format, panel, x, rows, columns, self.results, self.widened);
                }
                Values::Bf16(x) => {
                    assert!(format == WeightFormat::Bf16 && x.stride >= columns && x.stride % 2 == 0);
                    assert!(x.values.len() >= rows * x.stride && x.tile_rows > 0);
                    bf16::panel::<S>(panel, x, rows, columns, self.results);
                }
                Values::Int8(x) => {
                    let groups = columns.div_ceil(GROUP);
                    assert!(matches!(format, WeightFormat::Int8 | WeightFormat::Int8Channel | WeightFormat::Int4));
                    assert!(x.groups == groups && x.values.len() >= rows * groups * GROUP);
                    assert!(!S::WIDE_INPUTS || x.wide.len() == x.values.len());
                    assert!(x.scales.len() >= rows * groups && x.sums.len() >= rows * groups);
                    integer::panel::<S>(format, panel, x, rows, self.results);
                }
            }
        }
    }
}

/// Calls `$f::<S, ROWS, VECS>` with ROWS = `$rows`, which must be one of the literals. The compiler generates a kernel
/// for each.
macro_rules! with_rows {
    ($rows:expr, $f:ident, $s:ty, $vecs:literal, $args:tt, $($n:literal)+) => {
        match $rows { $($n => $f::<$s, $n, $vecs> $args,)+ _ => unreachable!("a tile of {} rows", $rows) }
    };
}
use with_rows;
