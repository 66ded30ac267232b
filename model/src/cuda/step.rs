//! The integers of a step: tokens, positions, block tables. They are laid out in pinned memory and copied at once.

use overfill_kv::BLOCK_TOKENS;

use super::{
    device::{Fault, Gpu},
    launch::PREFILL_TOKENS,
    memory::{Buffer, Pinned, Pointer},
};
use crate::{SequenceSlice, batch::Slot};

/// A slot of a row that writes nothing.
const NO_SLOT: i32 = -1;

/// Sizes of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Tokens.
    pub(super) rows: usize,
    /// Slices of one token. They come first.
    pub(super) single: usize,
    /// Slices of several tokens.
    pub(super) longer: usize,
    /// Tiles of the slices of several tokens.
    pub(super) tiles: usize,
    /// Rows whose logits are wanted.
    pub(super) wanted: usize,
}

impl Sizes {
    /// A decode step of `sequences` sequences.
    pub(super) fn decode(sequences: usize) -> Self {
        Self { rows: sequences, single: sequences, wanted: sequences, ..Self::default() }
    }

    pub(super) fn of(batch: &[SequenceSlice<'_>]) -> Self {
        let single = batch.iter().filter(|slice| slice.tokens.len() == 1).count();
        let counts = batch.iter().map(|slice| slice.tokens.len());
        Self {
            rows: counts.clone().sum(),
            single,
            longer: batch.len() - single,
            tiles: counts.filter(|count| *count > 1).map(|count| count.div_ceil(PREFILL_TOKENS)).sum(),
            wanted: batch.iter().map(|slice| slice.tokens.len() - slice.want.first_row(slice.tokens.len())).sum(),
        }
    }

    /// Whether each slice has one token and wants its logits.
    pub(super) fn is_decode(&self) -> bool {
        self.longer == 0 && self.wanted == self.rows
    }

    /// Start of each array, in elements. Arrays of pairs start at even elements.
    fn layout(&self) -> Layout {
        let slices = 0;
        let tiles = slices + 4 * (self.single + self.longer);
        let tokens = tiles + 2 * self.tiles;
        let positions = tokens + self.rows;
        let slots = positions + self.rows;
        let wanted = slots + self.rows;
        Layout { slices, tiles, tokens, positions, slots, wanted, tables: wanted + self.wanted }
    }
}

#[derive(Clone, Copy)]
struct Layout {
    slices: usize,
    tiles: usize,
    tokens: usize,
    positions: usize,
    slots: usize,
    wanted: usize,
    tables: usize,
}

/// Addresses of a step's arrays in device memory; see `kernels/attention.cuh`.
#[derive(Clone, Copy)]
pub(super) struct Arrays {
    pub(super) slices: Pointer,
    pub(super) tiles: Pointer,
    pub(super) tokens: Pointer,
    pub(super) positions: Pointer,
    pub(super) slots: Pointer,
    pub(super) wanted: Pointer,
    pub(super) tables: Pointer,
}

/// The integers of the current step, on both sides.
pub(super) struct StepArrays {
    host: Pinned<i32>,
    device: Buffer,
    capacity: usize,
}

impl StepArrays {
    /// Room for steps of `rows` tokens and `table_blocks` blocks in all tables together.
    pub(super) fn new(gpu: &Gpu, rows: usize, table_blocks: usize) -> Result<Self, Fault> {
        // A row needs at most a slice of its own, two elements of a tile, and four more.
        let capacity = rows * 10 + table_blocks;
        Ok(Self {
            host: Pinned::zeroed(&gpu.context, capacity)?,
            device: Buffer::zeroed(gpu.launcher.stream(), capacity * size_of::<i32>())?,
            capacity,
        })
    }

    /// Blocks of all tables that fit next to a step of these sizes.
    pub(super) fn table_blocks(&self, sizes: &Sizes) -> usize {
        self.capacity.saturating_sub(sizes.layout().tables)
    }

    /// Addresses of the arrays of a step of these sizes. They depend on the sizes only.
    pub(super) fn arrays(&self, sizes: &Sizes) -> Arrays {
        let layout = sizes.layout();
        let at = |element: usize| self.device.pointer().offset(element * size_of::<i32>());
        Arrays {
            slices: at(layout.slices),
            tiles: at(layout.tiles),
            tokens: at(layout.tokens),
            positions: at(layout.positions),
            slots: at(layout.slots),
            wanted: at(layout.wanted),
            tables: at(layout.tables),
        }
    }

    /// Writes a batch's integers and queues their copy. `sizes` may have more single slices than the batch: the rest is
    /// padding that reads and writes nothing. The batch fits; the stream has passed the previous step's copy.
    pub(super) fn queue(&mut self, gpu: &Gpu, batch: &[SequenceSlice<'_>], sizes: &Sizes) -> Result<(), Fault> {
        let layout = sizes.layout();
        let ints = self.host.as_mut_slice();
        ints[..layout.tables].fill(0);
        ints[layout.slots..layout.wanted].fill(NO_SLOT);
        let (mut row, mut wanted, mut table) = (0, 0, 0);
        let (mut single, mut longer, mut tile) = (0, sizes.single, 0);
        for slice in batch {
            let (count, next) = (slice.tokens.len(), if slice.tokens.len() == 1 { &mut single } else { &mut longer });
            ints[layout.slices + 4 * *next..][..4]
                .copy_from_slice(&[row, slice.start, count, table].map(|value| value as i32));
            if count > 1 {
                for first in (0..count).step_by(PREFILL_TOKENS) {
                    ints[layout.tiles + 2 * tile..][..2].copy_from_slice(&[*next as i32, first as i32]);
                    tile += 1;
                }
            }
            *next += 1;
            for (i, token) in slice.tokens.iter().enumerate() {
                let slot = Slot::of(slice.blocks, slice.start + i);
                ints[layout.tokens + row + i] = *token as i32;
                ints[layout.positions + row + i] = (slice.start + i) as i32;
                ints[layout.slots + row + i] = slot.block as i32 * BLOCK_TOKENS as i32 + slot.token as i32;
            }
            for i in slice.want.first_row(count)..count {
                ints[layout.wanted + wanted] = (row + i) as i32;
                wanted += 1;
            }
            let blocks = (slice.start + count).div_ceil(BLOCK_TOKENS);
            for (to, block) in ints[layout.tables + table..].iter_mut().zip(&slice.blocks[..blocks]) {
                *to = block.0 as i32;
            }
            table += blocks;
            row += count;
        }
        // Padding has slices of no tokens. Its logits are computed from some row, and dropped.
        Ok(self.device.queue_upload(gpu.launcher.stream(), 0, &self.host, 0..layout.tables + table)?)
    }
}

/// Blocks in all tables of a batch.
pub(super) fn table_blocks(batch: &[SequenceSlice<'_>]) -> usize {
    batch.iter().map(|slice| (slice.start + slice.tokens.len()).div_ceil(BLOCK_TOKENS)).sum()
}
