//! Products in f32. bf16 weights are widened in registers; f16 and int8 weights, and bf16 weights for many rows, are
//! widened one chunk at a time.

use half::bf16;

use super::{CHUNK_COLUMNS, Fetch, tile_rows, with_rows};
use crate::cpu::kernels::{
    packed::{GROUP, PANEL, SCALES_BYTES, WeightFormat},
    simd::{Simd, load_tile, store_tile},
};

/// Up to this many rows use bf16 weights directly. For more rows, widening each chunk once is faster.
const DIRECT_ROWS: usize = 16;
/// Widening reads weights in chunks with arithmetic in between. No processor recognises that as a stream, so always
/// prefetch.
const WIDENED: Fetch = Fetch::STEADY;
/// Maximum rows of a tile that uses bf16 weights directly.
const BF16_ROWS: usize = 6;

/// The product of one panel with all rows.
///
/// # Safety
/// `panel` has `columns` columns in `format`, `x` is `[rows][columns]`, `results` is `[rows][32]`, and `widened` has
/// room for `CHUNK_COLUMNS` inputs, a multiple of 32. The processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
pub(super) unsafe fn panel<S: Simd>(
    format: WeightFormat,
    panel: &[u8],
    x: &[f32],
    rows: usize,
    columns: usize,
    results: &mut [f32],
    widened: &mut [f32],
) {
    let direct = format == WeightFormat::Bf16 && rows <= DIRECT_ROWS;
    // SAFETY: guaranteed by the caller; chunks are parts of the panel and the rows.
    unsafe {
        // A single tile of rows reads the weights once, so caching them in chunks is useless.
        let chunk = if direct && rows <= BF16_ROWS { columns } else { CHUNK_COLUMNS };
        for first in (0..columns).step_by(chunk) {
            let count = chunk.min(columns - first);
            if direct {
                let weights = panel.as_ptr().cast::<bf16>().add(first * PANEL);
                bf16_tiles::<S>(x.as_ptr().add(first), columns, rows, weights, count, results.as_mut_ptr());
                continue;
            }
            let weights: *const f32 = match format {
                WeightFormat::F32 => panel.as_ptr().cast::<f32>().add(first * PANEL),
                WeightFormat::F16 => {
                    let from = panel.as_ptr().cast::<u16>().add(first * PANEL);
                    for i in (0..count * PANEL).step_by(S::LANES) {
                        WIDENED.ask::<S>(0, from.add(i).cast());
                        S::store(widened.as_mut_ptr().add(i), S::load_f16(from.add(i)));
                    }
                    widened.as_ptr()
                }
                WeightFormat::Int4 => unreachable!("int4 weights meet inputs of bytes"),
                WeightFormat::Fp8 => unreachable!("the CPU engine refuses fp8"),
                WeightFormat::Int8 | WeightFormat::Int8Channel => {
                    int8_chunk::<S>(format, panel, first, count, widened.as_mut_ptr());
                    widened.as_ptr()
                }
                WeightFormat::Bf16 => {
                    let from = panel.as_ptr().cast::<bf16>().add(first * PANEL);
                    for pair in 0..count.div_ceil(2) {
                        for lane in (0..PANEL).step_by(S::LANES) {
                            let from = from.add((pair * PANEL + lane) * 2);
                            WIDENED.ask::<S>(0, from.cast());
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

/// Widens the int8 weights of `count` inputs starting at `first`, a multiple of 32. It widens whole groups, even if the
/// last group has fewer inputs.
///
/// # Safety
/// The panel is in `format` and has these inputs, and `widened` has room for their groups. The processor has the
/// instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn int8_chunk<S: Simd>(format: WeightFormat, panel: &[u8], first: usize, count: usize, widened: *mut f32) {
    let skip = if format == WeightFormat::Int8 { SCALES_BYTES } else { 0 };
    let before = if format == WeightFormat::Int8 { 0 } else { 4 * PANEL };
    // SAFETY: guaranteed by the caller.
    unsafe {
        for g in 0..count.div_ceil(GROUP) {
            let group = panel.as_ptr().add(before + (first / GROUP + g) * format.group_bytes());
            for lane in (0..PANEL).step_by(S::LANES) {
                let scale = match format {
                    WeightFormat::Int8 => S::load_f16(group.cast::<u16>().add(lane)),
                    _ => S::load(panel.as_ptr().cast::<f32>().add(lane)),
                };
                let offset = S::mul(scale, S::splat(-128.0));
                for four in 0..GROUP / 4 {
                    let from = group.add(skip + (four * PANEL + lane) * 4);
                    WIDENED.ask::<S>(0, from);
                    let to = widened.add((g * GROUP + 4 * four) * PANEL + lane);
                    for (i, bytes) in S::widen_bytes(from).into_iter().enumerate() {
                        S::store(to.add(i * PANEL), S::mul_add(bytes, scale, offset));
                    }
                }
            }
        }
    }
}

/// Multiplies all rows with one chunk of f32 weights.
///
/// # Safety
/// There are `rows` rows of `columns` inputs, `stride` apart, the same number of inputs' weights for 32 outputs, and
/// `[rows][32]` results. The processor has the instruction set.
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
        // SAFETY: guaranteed by the caller; rows `row` to `row + n` exist.
        unsafe {
            let (x, results) = (x.add(row * stride), results.add(row * PANEL));
            // Uses as many accumulators as there are registers. A few rows use the whole width of the panel.
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
///
/// # Safety
/// As for [`f32_tiles`] with ROWS rows. `weights` and `results` have at least VECS * LANES lanes from there.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn f32_tile<S: Simd, const ROWS: usize, const VECS: usize>(
    x: *const f32,
    stride: usize,
    weights: *const f32,
    columns: usize,
    results: *mut f32,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let mut sums = load_tile::<S, ROWS, VECS>(results, PANEL);
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
        store_tile::<S, ROWS, VECS>(results, PANEL, sums);
    }
}

/// Multiplies all rows with one chunk of bf16 weights.
///
/// # Safety
/// As for [`f32_tiles`]. If `columns` is odd, the panel is padded to pairs.
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
        // SAFETY: guaranteed by the caller; rows `row` to `row + n` exist.
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

/// Like [`f32_tile`], for pairs of bf16 weights.
///
/// # Safety
/// As for [`bf16_tiles`] and [`f32_tile`].
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn bf16_tile<S: Simd, const ROWS: usize, const VECS: usize>(
    x: *const f32,
    stride: usize,
    weights: *const bf16,
    columns: usize,
    results: *mut f32,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let mut sums = load_tile::<S, ROWS, VECS>(results, PANEL);
        let fetch = Fetch::stream::<S>();
        for pair in 0..columns / 2 {
            let from = weights.add(pair * 2 * PANEL);
            let (mut even, mut odd) = ([S::splat(0.0); VECS], [S::splat(0.0); VECS]);
            for v in 0..VECS {
                let from = from.add(2 * v * S::LANES);
                fetch.ask::<S>(0, from.cast());
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
        store_tile::<S, ROWS, VECS>(results, PANEL, sums);
    }
}
