//! Products of bf16 weights with inputs of bf16, for instruction sets that have an instruction for them.

use super::{FEW_ROWS, Fetch, with_rows};
use crate::kernels::{inputs::Rounded, packed::PANEL, simd::Simd};

/// Inputs whose weights take 16 KiB, half of the first-level cache.
const CHUNK_COLUMNS: usize = 256;
/// Bytes ahead of their use that weights are fetched.
const FAR_AHEAD: usize = 8192;

#[inline(always)]
#[allow(unsafe_code)]
pub(super) unsafe fn panel<S: Simd>(panel: &[u8], x: &Rounded, rows: usize, columns: usize, results: &mut [f32]) {
    // One tile of rows passes over the weights once, and needs no cache.
    let chunk = if rows <= x.tile_rows { columns } else { CHUNK_COLUMNS };
    for first in (0..columns).step_by(chunk) {
        let pairs = chunk.min(columns - first).div_ceil(2);
        let (mut row, tiles) = (0, rows.div_ceil(x.tile_rows));
        for index in 0..tiles {
            let n = x.tile_rows.min(rows - row);
            // SAFETY: see `PanelProduct::run`. An odd last input has a pair in the panel and in the row, both padded.
            unsafe {
                let all_lanes = Tile {
                    weights: panel.as_ptr().cast::<half::bf16>().add(first * PANEL),
                    fetch: match tiles {
                        1 if rows <= FEW_ROWS => Fetch::stream::<S>(FAR_AHEAD),
                        1 => Fetch::part(0, 1, pairs, FAR_AHEAD),
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

/// Some inputs of a panel, and the rows that meet them.
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
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn at_lane(self, lane: usize) -> Self {
        // SAFETY: the caller's: there is such a lane.
        unsafe { Self { weights: self.weights.add(2 * lane), results: self.results.add(lane), ..self } }
    }
}

/// `results[row][lane] += sum over k of x[row][k] * weights[k][lane]` for ROWS rows and VECS vectors of lanes.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn tile<S: Simd, const ROWS: usize, const VECS: usize>(t: Tile) {
    // SAFETY: the caller's: ROWS rows, `pairs` pairs of columns, VECS * LANES lanes of a panel.
    unsafe {
        let mut sums = [[S::splat(0.0); VECS]; ROWS];
        for (r, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(t.results.add(r * PANEL + v * S::LANES));
            }
        }
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
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                S::store(t.results.add(r * PANEL + v * S::LANES), *sum);
            }
        }
    }
}
