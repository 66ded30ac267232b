//! Products of bf16 weights with inputs of bf16, for instruction sets that have an instruction for them.

use super::{FEW_ROWS, Fetch, with_rows};
use crate::cpu::kernels::{
    inputs::Rounded,
    packed::PANEL,
    simd::{Simd, load_tile, store_tile},
};

/// Inputs per chunk; their weights take 16 KiB, half of the first-level cache.
const CHUNK_COLUMNS: usize = 256;
/// Prefetch distance in bytes for one tile of several rows, which does not use chunks.
const WHOLE_AHEAD: usize = 8192;

/// The product of one panel with all rows.
///
/// # Safety
/// `panel` has `columns` columns of bf16, `x` has `rows` rows of `columns` values, and `results` is `[rows][32]`. The
/// processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
pub(super) unsafe fn panel<S: Simd>(panel: &[u8], x: &Rounded, rows: usize, columns: usize, results: &mut [f32]) {
    // A single tile of rows reads the weights once, so caching them in chunks is useless.
    let chunk = if rows <= x.tile_rows { columns } else { CHUNK_COLUMNS };
    for first in (0..columns).step_by(chunk) {
        let pairs = chunk.min(columns - first).div_ceil(2);
        let (mut row, tiles) = (0, rows.div_ceil(x.tile_rows));
        for index in 0..tiles {
            let n = x.tile_rows.min(rows - row);
            // SAFETY: guaranteed by the caller. If the number of columns is odd, panel and rows are padded to pairs.
            unsafe {
                let all_lanes = Tile {
                    weights: panel.as_ptr().cast::<half::bf16>().add(first * PANEL),
                    fetch: match tiles {
                        1 if rows <= FEW_ROWS => Fetch::stream::<S>(),
                        1 => Fetch::part(0, 1, pairs, WHOLE_AHEAD),
                        _ => Fetch::part(index, tiles, pairs, CHUNK_COLUMNS * PANEL * size_of::<half::bf16>()),
                    },
                    x: x.values.as_ptr().add(row * x.stride + first * n),
                    pairs,
                    results: results.as_mut_ptr().add(row * PANEL),
                };
                for lane in (0..PANEL).step_by(2 * S::LANES) {
                    with_rows!(n, tile, S, 2, (all_lanes.at_lane(lane)), 1 2 3 4 5 6 7 8 9 10 11 12);
                }
            }
            row += n;
        }
    }
}

/// A chunk of a panel's inputs, and the rows to multiply with them.
#[derive(Clone, Copy)]
struct Tile {
    weights: *const half::bf16,
    fetch: Fetch,
    /// `[pairs][rows][2]`.
    x: *const half::bf16,
    pairs: usize,
    results: *mut f32,
}

impl Tile {
    /// The same tile, starting at another lane.
    ///
    /// # Safety
    /// `lane` is less than 32.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn at_lane(self, lane: usize) -> Self {
        // SAFETY: guaranteed by the caller.
        unsafe { Self { weights: self.weights.add(2 * lane), results: self.results.add(lane), ..self } }
    }
}

/// `results[row][lane] += sum over k of x[row][k] * weights[k][lane]` for ROWS rows and VECS vectors of lanes.
///
/// # Safety
/// `t` points to `pairs` pairs of columns of ROWS input rows and of a panel, and to ROWS rows of results. Panel and
/// results have at least VECS * LANES lanes from there. The processor has the instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn tile<S: Simd, const ROWS: usize, const VECS: usize>(t: Tile) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let mut sums = load_tile::<S, ROWS, VECS>(t.results, PANEL);
        for pair in 0..t.pairs {
            let weights = t.weights.add(pair * 2 * PANEL);
            for v in 0..VECS {
                t.fetch.ask::<S>(pair, weights.add(2 * v * S::LANES).cast::<u8>());
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = t.x.add(2 * (pair * ROWS + r));
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = S::dot_bf16(*sum, weights.add(2 * v * S::LANES), x);
                }
            }
        }
        store_tile::<S, ROWS, VECS>(t.results, PANEL, sums);
    }
}
