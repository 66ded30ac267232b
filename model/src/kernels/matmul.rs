//! Products of input rows with a packed matrix.
//!
//! One panel (32 outputs) of all input rows is the unit of parallel work. Within it the inputs are taken in chunks whose
//! weights stay in the first-level cache while all rows pass over them. The sum for one row and output is always taken
//! in the order of the inputs, so it is the same number whatever rows are beside it and however the work is shared out.

use std::cell::RefCell;

use half::bf16;
use rayon::prelude::*;

use super::{
    inputs::{Inputs, Quantised, Values},
    packed::{Format, GROUP, PANEL, Packed, SCALES_BYTES},
    simd::{Isa, Kernel, Simd},
};

/// Inputs whose weights, widened to f32, take 16 KiB.
const CHUNK_COLUMNS: usize = 128;
/// Groups whose bytes take 17 KiB.
const CHUNK_GROUPS: usize = 16;
/// Up to so many rows multiply bf16 weights as they are; more are worth widening each chunk once.
const DIRECT_ROWS: usize = 16;
/// Rows of a tile over bf16 weights.
const BF16_ROWS: usize = 6;
/// Bytes ahead of their use that weights are fetched.
const AHEAD: usize = 4096;
/// Multiplications below which sharing work out costs more than it brings.
const WORTH_SHARING: usize = 1 << 16;

thread_local! {
    /// Results of a task, and a chunk of widened weights.
    static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Multiplies `inputs` by `matrix` into `out`, `[rows][width]`.
///
/// `panels` panels, 1 or 2, give 32 columns of `out`: for each row `finish(column, [first, second], out)` makes them of the
/// panels' sums (32 each; no second if `panels` is 1). The last columns are fewer where `width` ends.
pub(crate) fn multiply(
    isa: Isa,
    matrix: &Packed,
    inputs: Inputs<'_>,
    panels: usize,
    out: &mut [f32],
    width: usize,
    finish: impl Fn(usize, [&[f32]; 2], &mut [f32]) + Sync,
) {
    assert_eq!(matrix.columns(), inputs.columns, "inputs do not fit the matrix");
    let tasks = matrix.panels() / panels;
    assert!(width <= tasks * PANEL && width > (tasks - 1) * PANEL && out.len() == inputs.rows * width);
    let each = inputs.rows * PANEL;
    let out = Shared(out.as_mut_ptr());
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
                finish(column, [sums(0), second], out.columns(row * width + column, count));
            }
        });
    };
    let work = each * panels * matrix.columns();
    if tasks * work < 2 * WORTH_SHARING {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_min_len((WORTH_SHARING / work).max(1)).for_each(task);
    }
}

/// Memory in which each task writes columns of its own.
struct Shared(*mut f32);

// SAFETY: it stands for a `&mut [f32]` of which `multiply` gives each task other places.
#[allow(unsafe_code)]
unsafe impl Sync for Shared {}

impl Shared {
    #[allow(unsafe_code, clippy::mut_from_ref)]
    fn columns(&self, at: usize, count: usize) -> &mut [f32] {
        // SAFETY: `multiply`, its only user, checks that rows of `width` lie in the slice, and calls this once for each row
        // and range of columns.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), count) }
    }
}

/// One panel of all rows.
struct PanelProduct<'a> {
    matrix: &'a Packed,
    panel: usize,
    inputs: Inputs<'a>,
    /// `[rows][32]`, zero.
    results: &'a mut [f32],
    /// A chunk of f32 weights.
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
        // SAFETY: the asserts here and below say that every place that a tile touches is there: a panel of this format has
        // `columns` columns, there are `rows` rows of inputs and of results. The caller vouches for the instruction set.
        unsafe {
            match self.inputs.values {
                Values::Float(x) => {
                    assert!(x.len() >= rows * columns && self.widened.len() == CHUNK_COLUMNS * PANEL);
                    float_panel::<S>(format, panel, x, rows, columns, self.results, self.widened);
                }
                Values::Quantised(x) => {
                    let groups = columns.div_ceil(GROUP);
                    assert!(
                        x.groups == groups && x.values.len() >= rows * groups * GROUP && x.wide.len() == x.values.len()
                    );
                    assert!(x.scales.len() >= rows * groups && x.sums.len() >= rows * groups);
                    integer_panel::<S>(format, panel, x, rows, self.results);
                }
            }
        }
    }
}

/// Calls `$f::<S, ROWS, VECS>` with `$rows`, which is one of the literals, as ROWS.
macro_rules! with_rows {
    ($rows:expr, $f:ident, $s:ty, $vecs:literal, $args:tt, $($n:literal)+) => {
        match $rows { $($n => $f::<$s, $n, $vecs> $args,)+ _ => unreachable!("a tile of {} rows", $rows) }
    };
}

/// Rows of the next tile, so that the last is not much smaller than the others.
#[inline(always)]
fn tile_rows(left: usize, most: usize) -> usize {
    left.div_ceil(left.div_ceil(most))
}

#[inline(always)]
#[allow(unsafe_code)]
unsafe fn float_panel<S: Simd>(
    format: Format,
    panel: &[u8],
    x: &[f32],
    rows: usize,
    columns: usize,
    results: &mut [f32],
    widened: &mut [f32],
) {
    // SAFETY: see `PanelProduct::run`.
    unsafe {
        // One tile of rows passes over the weights once, and needs no cache.
        let direct = format == Format::Bf16 && rows <= DIRECT_ROWS;
        let chunk = if direct && rows <= BF16_ROWS { columns } else { CHUNK_COLUMNS };
        for first in (0..columns).step_by(chunk) {
            let count = chunk.min(columns - first);
            if direct {
                let weights = panel.as_ptr().cast::<bf16>().add(first * PANEL);
                bf16_tiles::<S>(x.as_ptr().add(first), columns, rows, weights, count, results.as_mut_ptr());
                continue;
            }
            let weights: *const f32 = match format {
                Format::F32 => panel.as_ptr().cast::<f32>().add(first * PANEL),
                Format::F16 => {
                    let from = panel.as_ptr().cast::<u16>().add(first * PANEL);
                    for i in (0..count * PANEL).step_by(S::LANES) {
                        S::prefetch(from.wrapping_add(i).cast::<u8>().wrapping_add(AHEAD));
                        S::store(widened.as_mut_ptr().add(i), S::load_f16(from.add(i)));
                    }
                    widened.as_ptr()
                }
                Format::Int4 => unreachable!("int4 weights meet inputs of bytes"),
                Format::Int8 | Format::Int8Channel => {
                    int8_chunk::<S>(format, panel, first, count, widened.as_mut_ptr());
                    widened.as_ptr()
                }
                Format::Bf16 => {
                    let from = panel.as_ptr().cast::<bf16>().add(first * PANEL);
                    for pair in 0..count.div_ceil(2) {
                        for lane in (0..PANEL).step_by(S::LANES) {
                            let from = from.add((pair * PANEL + lane) * 2);
                            S::prefetch(from.cast::<u8>().wrapping_add(AHEAD));
                            let (even, odd) = S::load_bf16_pairs(from);
                            let to = widened.as_mut_ptr().add(2 * pair * PANEL + lane);
                            S::store(to, even);
                            S::store(to.add(PANEL), odd);
                        }
                    }
                    widened.as_ptr()
                }
            };
            f32_tiles::<S>(x.as_ptr().add(first), columns, rows, weights, count, results.as_mut_ptr());
        }
    }
}

/// Widens the int8 weights of `count` inputs from `first`, a multiple of 32, on. What lies past the last input is zero, and
/// so is not read.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn int8_chunk<S: Simd>(format: Format, panel: &[u8], first: usize, count: usize, widened: *mut f32) {
    let skip = if format == Format::Int8 { SCALES_BYTES } else { 0 };
    let before = if format == Format::Int8 { 0 } else { 4 * PANEL };
    // SAFETY: see `PanelProduct::run`; a chunk has room for whole groups.
    unsafe {
        for g in 0..count.div_ceil(GROUP) {
            let group = panel.as_ptr().add(before + (first / GROUP + g) * format.group_bytes());
            for lane in (0..PANEL).step_by(S::LANES) {
                let scale = match format {
                    Format::Int8 => S::load_f16(group.cast::<u16>().add(lane)),
                    _ => S::load(panel.as_ptr().cast::<f32>().add(lane)),
                };
                let offset = S::mul(scale, S::splat(-128.0));
                for four in 0..GROUP / 4 {
                    let from = group.add(skip + (four * PANEL + lane) * 4);
                    S::prefetch(from.wrapping_add(AHEAD));
                    let to = widened.add((g * GROUP + 4 * four) * PANEL + lane);
                    for (i, bytes) in S::widen_bytes(from).into_iter().enumerate() {
                        S::store(to.add(i * PANEL), S::mul_add(bytes, scale, offset));
                    }
                }
            }
        }
    }
}

/// All rows over one chunk of f32 weights.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn f32_tiles<S: Simd>(
    x: *const f32,
    stride: usize,
    rows: usize,
    weights: *const f32,
    columns: usize,
    results: *mut f32,
) {
    let most = if S::LANES == 16 { 12 } else { 6 };
    let mut row = 0;
    while row < rows {
        let n = tile_rows(rows - row, most);
        // SAFETY: see `PanelProduct::run`; rows from `row` to `row + n` are there.
        unsafe {
            let (x, results) = (x.add(row * stride), results.add(row * PANEL));
            // As many accumulators as there are registers for; a few rows take the whole width of the panel.
            match (S::LANES, n) {
                (16, _) => {
                    with_rows!(n, f32_tile, S, 2, (x, stride, weights, columns, results), 1 2 3 4 5 6 7 8 9 10 11 12);
                }
                (8, 1..=2) => with_rows!(n, f32_tile, S, 4, (x, stride, weights, columns, results), 1 2),
                (8, _) => {
                    for half in [0, PANEL / 2] {
                        let (w, r) = (weights.add(half), results.add(half));
                        with_rows!(n, f32_tile, S, 2, (x, stride, w, columns, r), 3 4 5 6);
                    }
                }
                (_, 1..=2) => with_rows!(n, f32_tile, S, 8, (x, stride, weights, columns, results), 1 2),
                _ => {
                    for half in [0, PANEL / 2] {
                        let (w, r) = (weights.add(half), results.add(half));
                        with_rows!(n, f32_tile, S, 4, (x, stride, w, columns, r), 3 4 5 6);
                    }
                }
            }
        }
        row += n;
    }
}

/// `results[row][lane] += sum over k of x[row][k] * weights[k][lane]` for ROWS rows and VECS vectors of lanes.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn f32_tile<S: Simd, const ROWS: usize, const VECS: usize>(
    x: *const f32,
    stride: usize,
    weights: *const f32,
    columns: usize,
    results: *mut f32,
) {
    // SAFETY: the caller's: ROWS rows, `columns` columns, VECS * LANES lanes of a panel.
    unsafe {
        let mut sums = [[S::splat(0.0); VECS]; ROWS];
        for (r, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(results.add(r * PANEL + v * S::LANES));
            }
        }
        for k in 0..columns {
            let mut w = [S::splat(0.0); VECS];
            for (v, w) in w.iter_mut().enumerate() {
                *w = S::load(weights.add(k * PANEL + v * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = S::splat(*x.add(r * stride + k));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = S::mul_add(x, w, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                S::store(results.add(r * PANEL + v * S::LANES), *sum);
            }
        }
    }
}

/// All rows over one chunk of bf16 weights.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn bf16_tiles<S: Simd>(
    x: *const f32,
    stride: usize,
    rows: usize,
    weights: *const bf16,
    columns: usize,
    results: *mut f32,
) {
    let mut row = 0;
    while row < rows {
        let n = tile_rows(rows - row, BF16_ROWS);
        // SAFETY: see `PanelProduct::run`; rows from `row` to `row + n` are there.
        unsafe {
            let (x, results) = (x.add(row * stride), results.add(row * PANEL));
            match (S::LANES, n) {
                (16, _) => with_rows!(n, bf16_tile, S, 2, (x, stride, weights, columns, results), 1 2 3 4 5 6),
                (8, 1..=2) => with_rows!(n, bf16_tile, S, 4, (x, stride, weights, columns, results), 1 2),
                (8, _) => {
                    for half in [0, PANEL / 2] {
                        let (w, r) = (weights.add(2 * half), results.add(half));
                        with_rows!(n, bf16_tile, S, 2, (x, stride, w, columns, r), 3 4 5 6);
                    }
                }
                (_, 1..=2) => with_rows!(n, bf16_tile, S, 8, (x, stride, weights, columns, results), 1 2),
                _ => {
                    for half in [0, PANEL / 2] {
                        let (w, r) = (weights.add(2 * half), results.add(half));
                        with_rows!(n, bf16_tile, S, 4, (x, stride, w, columns, r), 3 4 5 6);
                    }
                }
            }
        }
        row += n;
    }
}

/// As [`f32_tile`], over pairs of bf16 weights.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn bf16_tile<S: Simd, const ROWS: usize, const VECS: usize>(
    x: *const f32,
    stride: usize,
    weights: *const bf16,
    columns: usize,
    results: *mut f32,
) {
    // SAFETY: the caller's: ROWS rows, `columns` columns, VECS * LANES lanes of a panel.
    unsafe {
        let mut sums = [[S::splat(0.0); VECS]; ROWS];
        for (r, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(results.add(r * PANEL + v * S::LANES));
            }
        }
        for pair in 0..columns / 2 {
            let from = weights.add(pair * 2 * PANEL);
            let (mut even, mut odd) = ([S::splat(0.0); VECS], [S::splat(0.0); VECS]);
            for v in 0..VECS {
                let from = from.add(2 * v * S::LANES);
                S::prefetch(from.cast::<u8>().wrapping_add(AHEAD));
                (even[v], odd[v]) = S::load_bf16_pairs(from);
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = x.add(r * stride + 2 * pair);
                let (first, second) = (S::splat(*x), S::splat(*x.add(1)));
                for v in 0..VECS {
                    sums[v] = S::mul_add(first, even[v], sums[v]);
                }
                for v in 0..VECS {
                    sums[v] = S::mul_add(second, odd[v], sums[v]);
                }
            }
        }
        if columns % 2 == 1 {
            let k = columns - 1;
            for v in 0..VECS {
                let (even, _) = S::load_bf16_pairs(weights.add(k * PANEL + 2 * v * S::LANES));
                for (r, sums) in sums.iter_mut().enumerate() {
                    sums[v] = S::mul_add(S::splat(*x.add(r * stride + k)), even, sums[v]);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                S::store(results.add(r * PANEL + v * S::LANES), *sum);
            }
        }
    }
}

#[inline(always)]
#[allow(unsafe_code)]
unsafe fn integer_panel<S: Simd>(format: Format, panel: &[u8], x: &Quantised, rows: usize, results: &mut [f32]) {
    let most = if S::LANES == 16 { 8 } else { 4 };
    // SAFETY: see `PanelProduct::run`.
    unsafe {
        let (scales, groups) = match format {
            Format::Int8Channel => (panel.as_ptr(), panel.as_ptr().add(4 * PANEL)),
            _ => (panel.as_ptr(), panel.as_ptr()),
        };
        for first in (0..x.groups).step_by(CHUNK_GROUPS) {
            let count = CHUNK_GROUPS.min(x.groups - first);
            let mut row = 0;
            while row < rows {
                let n = tile_rows(rows - row, most);
                let at = row * x.groups + first;
                let tile = Tile {
                    format,
                    groups: groups.add(first * format.group_bytes()),
                    count,
                    values: x.values.as_ptr().add(at * GROUP),
                    wide: x.wide.as_ptr().add(at * GROUP),
                    scales: x.scales.as_ptr().add(at),
                    sums: x.sums.as_ptr().add(at),
                    stride: x.groups,
                    lane: 0,
                    results: results.as_mut_ptr().add(row * PANEL),
                };
                match (S::LANES, n) {
                    (16, _) => with_rows!(n, integer_tile, S, 2, (tile), 1 2 3 4 5 6 7 8),
                    (8, 1) => with_rows!(n, integer_tile, S, 4, (tile), 1),
                    (8, _) => {
                        for half in [0, PANEL / 2] {
                            with_rows!(n, integer_tile, S, 2, (tile.from_lane(half)), 2 3 4);
                        }
                    }
                    _ => {
                        for half in [0, PANEL / 2] {
                            with_rows!(n, integer_tile, S, 4, (tile.from_lane(half)), 1 2 3 4);
                        }
                    }
                }
                row += n;
            }
        }
        if format == Format::Int8Channel {
            for row in 0..rows {
                for lane in (0..PANEL).step_by(S::LANES) {
                    let result = results.as_mut_ptr().add(row * PANEL + lane);
                    S::store(result, S::mul(S::load(result), S::load(scales.cast::<f32>().add(lane))));
                }
            }
        }
    }
}

/// Some groups of a panel, and the rows that meet them.
#[derive(Clone, Copy)]
struct Tile {
    format: Format,
    groups: *const u8,
    count: usize,
    /// Of the first row and group; the next row's come `stride` groups later.
    values: *const i8,
    wide: *const i16,
    scales: *const f32,
    sums: *const i32,
    stride: usize,
    /// First lane.
    lane: usize,
    results: *mut f32,
}

impl Tile {
    #[inline(always)]
    fn from_lane(self, lane: usize) -> Self {
        Self { lane, ..self }
    }
}

#[inline(always)]
#[allow(unsafe_code)]
unsafe fn integer_tile<S: Simd, const ROWS: usize, const VECS: usize>(t: Tile) {
    // SAFETY: the caller's: `count` groups of the format, ROWS rows, VECS * LANES lanes from `lane` on.
    unsafe {
        match t.format {
            Format::Int4 => groups::<S, ROWS, VECS, 4, true>(t),
            Format::Int8 => groups::<S, ROWS, VECS, 8, true>(t),
            _ => groups::<S, ROWS, VECS, 8, false>(t),
        }
    }
}

/// Adds each group's products of BITS wide weights, times its scales; without SCALED those of the weights are left out.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn groups<S: Simd, const ROWS: usize, const VECS: usize, const BITS: usize, const SCALED: bool>(t: Tile) {
    let skip = if SCALED { SCALES_BYTES } else { 0 };
    let group_bytes = skip + PANEL * GROUP * BITS / 8;
    // SAFETY: as for `integer_tile`.
    unsafe {
        let results = t.results.add(t.lane);
        let mut totals = [[S::splat(0.0); VECS]; ROWS];
        for (r, totals) in totals.iter_mut().enumerate() {
            for (v, total) in totals.iter_mut().enumerate() {
                *total = S::load(results.add(r * PANEL + v * S::LANES));
            }
        }
        for g in 0..t.count {
            let group = t.groups.add(g * group_bytes);
            let bytes = group.add(skip + 4 * t.lane);
            let products = match BITS {
                4 => int4_products::<S, ROWS, VECS>(t, g, bytes),
                _ => int8_products::<S, ROWS, VECS>(t, g, bytes),
            };
            for v in 0..VECS {
                let weight_scales = match SCALED {
                    true => S::load_f16(group.cast::<u16>().add(t.lane + v * S::LANES)),
                    false => S::splat(1.0),
                };
                for r in 0..ROWS {
                    let input_scale = S::splat(*t.scales.add(r * t.stride + g));
                    let scale = if SCALED { S::mul(weight_scales, input_scale) } else { input_scale };
                    totals[r][v] = S::mul_add(products[r][v], scale, totals[r][v]);
                }
            }
        }
        for (r, totals) in totals.iter().enumerate() {
            for (v, total) in totals.iter().enumerate() {
                S::store(results.add(r * PANEL + v * S::LANES), *total);
            }
        }
    }
}

#[inline(always)]
#[allow(unsafe_code)]
unsafe fn int8_products<S: Simd, const ROWS: usize, const VECS: usize>(
    t: Tile,
    g: usize,
    bytes: *const u8,
) -> [[S::F; VECS]; ROWS] {
    // SAFETY: as for `integer_tile`; a group has 8 times four inputs.
    unsafe {
        let mut sums = [[S::sums8(0); VECS]; ROWS];
        for (r, sums) in sums.iter_mut().enumerate() {
            *sums = [S::sums8(-128 * *t.sums.add(r * t.stride + g)); VECS];
        }
        for four in 0..GROUP / 4 {
            let mut inputs = [S::inputs8(t.values, t.wide); ROWS];
            for (r, inputs) in inputs.iter_mut().enumerate() {
                let at = (r * t.stride + g) * GROUP + 4 * four;
                *inputs = S::inputs8(t.values.add(at), t.wide.add(at));
            }
            for v in 0..VECS {
                let from = bytes.add((four * PANEL + v * S::LANES) * 4);
                S::prefetch(from.wrapping_add(AHEAD));
                let weights = S::int8(from);
                for (sums, inputs) in sums.iter_mut().zip(inputs) {
                    sums[v] = S::dot8(sums[v], weights, inputs);
                }
            }
        }
        let mut out = [[S::splat(0.0); VECS]; ROWS];
        for (out, sums) in out.iter_mut().zip(sums) {
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = S::sums8_to_f32(sum);
            }
        }
        out
    }
}

#[inline(always)]
#[allow(unsafe_code)]
unsafe fn int4_products<S: Simd, const ROWS: usize, const VECS: usize>(
    t: Tile,
    g: usize,
    bytes: *const u8,
) -> [[S::F; VECS]; ROWS] {
    // SAFETY: as for `integer_tile`; a group has 4 times eight inputs.
    unsafe {
        let mut sums = [[S::sums4(); VECS]; ROWS];
        for eight in 0..GROUP / 8 {
            for v in 0..VECS {
                let from = bytes.add((eight * PANEL + v * S::LANES) * 4);
                S::prefetch(from.wrapping_add(AHEAD));
                let [low, high] = S::int4(from);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let inputs = t.values.add((r * t.stride + g) * GROUP + 8 * eight);
                    sums[v] = S::dot4(sums[v], low, S::inputs4(inputs));
                    sums[v] = S::dot4(sums[v], high, S::inputs4(inputs.add(4)));
                }
            }
        }
        let mut out = [[S::splat(0.0); VECS]; ROWS];
        for (r, out) in out.iter_mut().enumerate() {
            let start = -8 * *t.sums.add(r * t.stride + g);
            for (out, sum) in out.iter_mut().zip(sums[r]) {
                *out = S::sums4_to_f32(sum, start);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::packed::Rows;

    const FORMATS: [Format; 6] =
        [Format::F32, Format::F16, Format::Bf16, Format::Int8, Format::Int8Channel, Format::Int4];

    fn random(count: usize, mut state: u64) -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn pack(format: Format, rows: usize, columns: usize, values: &[f32]) -> Packed {
        Packed::pack::<std::io::Error>(format, rows, columns, |panel, out| {
            let from = &values[panel * PANEL * columns..rows.min((panel + 1) * PANEL) * columns];
            out[..from.len()].copy_from_slice(from);
            Ok(())
        })
        .unwrap()
    }

    /// `[x rows][matrix rows]`.
    fn product(isa: Isa, matrix: &Packed, x: &[f32], rows: Rows) -> Vec<f32> {
        let mut buffer = Quantised::default();
        let inputs = Inputs::new(matrix.format().wants_bytes(isa, rows), x, matrix.columns(), &mut buffer);
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
            format in prop::sample::select(&FORMATS[..]), rows in 1_usize..30, outputs in 1_usize..100,
            columns in 1_usize..1200, seed: u64, many: bool,
        ) {
            let weights = random(outputs * columns, seed);
            let x = random(rows * columns, !seed);
            let matrix = pack(format, outputs, columns, &weights);
            let mut buffer = Quantised::default();
            // What the kernel is given, in f64: weights and inputs as they are stored.
            let stored: Vec<Vec<f32>> = (0..outputs).map(|o| {
                let mut row = vec![0.0; columns];
                matrix.row(o, &mut row);
                row
            }).collect();
            let role = if many { Rows::Many } else { Rows::Few };
            let mut given = |isa| match Inputs::new(format.wants_bytes(isa, role), &x, columns, &mut buffer).values {
                Values::Float(x) => x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(),
                Values::Quantised(q) => (0..rows * columns).map(|i| {
                    let group = i / columns * q.groups + i % columns / GROUP;
                    let value = q.values[group * GROUP + i % columns % GROUP];
                    f64::from(value) * f64::from(q.scales[group])
                }).collect(),
            };
            for isa in Isa::available() {
                let inputs = given(*isa);
                let got = product(*isa, &matrix, &x, role);
                for row in 0..rows {
                    let x_row = &x[row * columns..][..columns];
                    let alone = product(*isa, &matrix, x_row, role);
                    prop_assert_eq!(&alone[..], &got[row * outputs..][..outputs], "{:?} {:?}: not as alone", isa, format);
                    for (o, weights) in stored.iter().enumerate() {
                        let terms = weights.iter().zip(&inputs[row * columns..]);
                        let exact: f64 = terms.map(|(w, x)| f64::from(*w) * x).sum();
                        let found = f64::from(got[row * outputs + o]);
                        let bound = 1e-6 * columns as f64;
                        prop_assert!((found - exact).abs() <= bound, "{isa:?} {format:?}: {found}, not {exact}");
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
                        Format::F32 => 0.0,
                        Format::F16 => greatest / 2048.0,
                        Format::Bf16 => greatest / 256.0,
                        // Half a step, and the rounding of the scale.
                        Format::Int8 => greatest / 127.0 * 0.57,
                        Format::Int8Channel => all / 127.0 * 0.51,
                        // A whole step at the end that has one step less.
                        Format::Int4 => greatest / 8.0 * 1.01,
                    };
                    for (a, b) in group.iter().zip(stored) {
                        prop_assert!((a - b).abs() <= bound, "{format:?}: {a} became {b}");
                    }
                }
            }
        }
    }

    #[test]
    fn two_panels_that_belong_together_come_together() {
        let weights = random(128 * 40, 1);
        let matrix = pack(Format::Bf16, 128, 40, &weights);
        let x = random(3 * 40, 2);
        let apart = product(Isa::best(), &matrix, &x, Rows::Few);
        let mut buffer = Quantised::default();
        let mut out = vec![0.0; 3 * 64];
        let inputs = Inputs::new(false, &x, 40, &mut buffer);
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
}
