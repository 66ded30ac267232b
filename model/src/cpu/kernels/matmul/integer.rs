//! Products of int8 and int4 weights with int8 inputs.

use super::{FEW_ROWS, Fetch, tile_rows, with_rows};
use crate::cpu::kernels::{
    inputs::Quantised,
    packed::{GROUP, PANEL, SCALES_BYTES, WeightFormat},
    simd::{Simd, load_tile, store_tile},
};

/// Groups per chunk; in int8 they take 17 KiB.
const CHUNK_GROUPS: usize = 16;
/// Maximum rows of a tile: with two vectors of weights, sums and totals fit in the registers with some to spare.
const MOST_TILE_ROWS: usize = 4;

/// The product of one panel with all rows.
///
/// # Safety
/// `panel` has an integer format and as many groups as `x`. `x` has `rows` rows, including wide ones if the instruction
/// set uses them. `results` is `[rows][32]`. The processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
pub(super) unsafe fn panel<S: Simd>(
    format: WeightFormat,
    panel: &[u8],
    x: &Quantised,
    rows: usize,
    results: &mut [f32],
) {
    let group_bytes = format.group_bytes();
    // SAFETY: guaranteed by the caller; tiles are parts of the panel and the rows.
    unsafe {
        let (groups, skip) = match format {
            WeightFormat::Int8Channel => (panel.as_ptr().add(4 * PANEL), 0),
            _ => (panel.as_ptr(), SCALES_BYTES),
        };
        for first in (0..x.groups).step_by(CHUNK_GROUPS) {
            let groups = groups.add(first * group_bytes);
            let (mut row, tiles) = (0, rows.div_ceil(MOST_TILE_ROWS));
            for index in 0..tiles {
                let n = tile_rows(rows - row, MOST_TILE_ROWS);
                let at = row * x.groups + first;
                let tile = Tile {
                    format,
                    bytes: groups.add(skip),
                    weight_scales: groups.cast(),
                    group_bytes,
                    fetch: match rows {
                        ..=FEW_ROWS => Fetch::stream::<S>(),
                        _ => Fetch::part(index, tiles, CHUNK_GROUPS, CHUNK_GROUPS * group_bytes),
                    },
                    count: CHUNK_GROUPS.min(x.groups - first),
                    values: x.values.as_ptr().add(at * GROUP),
                    wide: x.wide.as_ptr().wrapping_add(at * GROUP),
                    scales: x.scales.as_ptr().add(at),
                    sums: x.sums.as_ptr().add(at),
                    stride: x.groups,
                    lane: 0,
                    results: results.as_mut_ptr().add(row * PANEL),
                };
                match (S::LANES, n) {
                    (16, _) => with_rows!(n, integer_tile, S, 2, (tile), 1 2 3 4),
                    (8, 1) => with_rows!(n, integer_tile, S, 4, (tile), 1),
                    (8, _) => {
                        for half in [0, PANEL / 2] {
                            with_rows!(n, integer_tile, S, 2, (tile.at_lane(half)), 2 3 4);
                        }
                    }
                    _ => {
                        for half in [0, PANEL / 2] {
                            with_rows!(n, integer_tile, S, 4, (tile.at_lane(half)), 1 2 3 4);
                        }
                    }
                }
                row += n;
            }
        }
        if format == WeightFormat::Int8Channel {
            for row in 0..rows {
                for lane in (0..PANEL).step_by(S::LANES) {
                    let result = results.as_mut_ptr().add(row * PANEL + lane);
                    S::store(result, S::mul(S::load(result), S::load(panel.as_ptr().cast::<f32>().add(lane))));
                }
            }
        }
    }
}

/// Some groups of a panel, and the rows to multiply with them.
#[derive(Clone, Copy)]
struct Tile {
    format: WeightFormat,
    /// The first group's weights. Groups are `group_bytes` apart.
    bytes: *const u8,
    /// The first group's scales, as f16 bits.
    weight_scales: *const u16,
    group_bytes: usize,
    fetch: Fetch,
    count: usize,
    /// The first group's inputs in the first row. Rows are `stride` groups apart.
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
    fn at_lane(self, lane: usize) -> Self {
        Self { lane, ..self }
    }
}

/// # Safety
/// `t` points to `count` groups of its format, `group_bytes` apart, to the same number of groups of ROWS input rows,
/// and to ROWS rows of results. There are at least VECS * LANES lanes starting at `lane`. The processor has the
/// instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn integer_tile<S: Simd, const ROWS: usize, const VECS: usize>(t: Tile) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        match t.format {
            WeightFormat::Int4 => groups::<S, ROWS, VECS, true>(t, |g| int4_products::<S, ROWS, VECS>(t, g)),
            WeightFormat::Int8 => groups::<S, ROWS, VECS, true>(t, |g| int8_products::<S, ROWS, VECS>(t, g)),
            _ => groups::<S, ROWS, VECS, false>(t, |g| int8_products::<S, ROWS, VECS>(t, g)),
        }
    }
}

/// Adds each group's products, multiplied by the scales of inputs and weights. Without SCALED, the weights' scales are
/// left out.
///
/// # Safety
/// As for [`integer_tile`].
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn groups<S: Simd, const ROWS: usize, const VECS: usize, const SCALED: bool>(
    t: Tile,
    products: impl Fn(usize) -> [[S::F; VECS]; ROWS],
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let results = t.results.add(t.lane);
        let mut totals = load_tile::<S, ROWS, VECS>(results, PANEL);
        for g in 0..t.count {
            let products = products(g);
            for v in 0..VECS {
                let weight_scales = match SCALED {
                    true => S::load_f16(t.weight_scales.add(g * t.group_bytes / 2 + t.lane + v * S::LANES)),
                    false => S::splat(1.0),
                };
                for r in 0..ROWS {
                    let input_scale = S::splat(*t.scales.add(r * t.stride + g));
                    let scale = if SCALED { S::mul(weight_scales, input_scale) } else { input_scale };
                    totals[r][v] = S::mul_add(products[r][v], scale, totals[r][v]);
                }
            }
        }
        store_tile::<S, ROWS, VECS>(results, PANEL, totals);
    }
}

/// Products of one group, without scales.
///
/// # Safety
/// As for [`integer_tile`], with int8 weights.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn int8_products<S: Simd, const ROWS: usize, const VECS: usize>(t: Tile, g: usize) -> [[S::F; VECS]; ROWS] {
    // SAFETY: guaranteed by the caller; a group has 8 * 4 inputs.
    unsafe {
        let bytes = t.bytes.add(g * t.group_bytes + 4 * t.lane);
        let mut sums = [[S::sums8(0); VECS]; ROWS];
        for (r, sums) in sums.iter_mut().enumerate() {
            *sums = [S::sums8(-128 * *t.sums.add(r * t.stride + g)); VECS];
        }
        for four in 0..GROUP / 4 {
            let mut inputs = [S::inputs8(t.values, t.wide); ROWS];
            for (r, inputs) in inputs.iter_mut().enumerate() {
                let at = (r * t.stride + g) * GROUP + 4 * four;
                *inputs = S::inputs8(t.values.add(at), t.wide.wrapping_add(at));
            }
            for v in 0..VECS {
                let from = bytes.add((four * PANEL + v * S::LANES) * 4);
                t.fetch.ask::<S>(g, from);
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

/// The same for int4.
///
/// # Safety
/// As for [`integer_tile`], with int4 weights.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn int4_products<S: Simd, const ROWS: usize, const VECS: usize>(t: Tile, g: usize) -> [[S::F; VECS]; ROWS] {
    // SAFETY: guaranteed by the caller; a group has 4 * 8 inputs.
    unsafe {
        let bytes = t.bytes.add(g * t.group_bytes + 4 * t.lane);
        let mut sums = [[S::sums4(); VECS]; ROWS];
        for eight in 0..GROUP / 8 {
            for v in 0..VECS {
                let from = bytes.add((eight * PANEL + v * S::LANES) * 4);
                t.fetch.ask::<S>(g, from);
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
