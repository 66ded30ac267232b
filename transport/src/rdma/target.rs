//! The receiver's side of one handoff.

use overfill_kv::BlockId;

use super::verbs::Staging;
use super::{Grant, Place, Places, Queue, RdmaAddress, RdmaError, queue::RECEIVES};
use crate::tcp::format::Sums;

/// Slots of a staging area: one that is written while the other is checked and copied out.
const SLOTS: u16 = 2;

/// Memory into which a sender may write, and the queue pair over which it does.
pub(crate) struct Target {
    // Declared first: destroyed before the staging memory is freed.
    queue: Queue,
    staging: Option<Staging>,
    slot_bytes: usize,
    blocks: Vec<u32>,
    /// Pieces that have arrived.
    pieces: u32,
}

impl Target {
    /// Prepares to receive `blocks` from the queue pair `peer`. Pieces have at most `piece_bytes` bytes.
    pub async fn new(
        mut queue: Queue,
        peer: &RdmaAddress,
        blocks: &[BlockId],
        piece_bytes: usize,
    ) -> Result<Self, RdmaError> {
        let direct = queue.pool().regions().is_some();
        let staging = if direct { None } else { Some(queue.pool().staging(usize::from(SLOTS) * piece_bytes)?) };
        queue.connect(peer)?;
        queue.post_receives(RECEIVES)?;
        let blocks = if direct { blocks.iter().map(|id| id.0).collect() } else { Vec::new() };
        Ok(Self { queue, staging, slot_bytes: piece_bytes, blocks, pieces: 0 })
    }

    /// What the sender needs to know.
    pub fn grant(&self) -> Grant {
        let place = |region: &super::verbs::Registered| Place {
            // Offset 0 is always inside.
            address: region.address(0, 0).unwrap_or_default(),
            key: region.keys().1,
        };
        let layers = match (&self.staging, self.queue.pool().regions()) {
            (Some(staging), _) => vec![place(staging.registered())],
            (None, Some(regions)) => regions.iter().map(place).collect(),
            (None, None) => Vec::new(),
        };
        let staging = self.staging.as_ref().map(|_| (SLOTS, self.slot_bytes as u32));
        Grant { address: self.queue.address(), places: Places { staging, layers, blocks: self.blocks.clone() } }
    }

    /// Whether pieces are copied out with [`Self::take`].
    pub fn is_staged(&self) -> bool {
        self.staging.is_some()
    }

    /// Waits until this side's device reports that the next piece has arrived, which must have this number.
    pub async fn arrived(&mut self, number: u32) -> Result<(), RdmaError> {
        if number != self.pieces {
            return Err(RdmaError::Mismatch("the number of a piece"));
        }
        if self.queue.next().await? != number {
            return Err(RdmaError::Mismatch("the number of a write"));
        }
        self.pieces += 1;
        self.queue.post_receives(1)
    }

    /// The checksum of the piece that has arrived last, computed from this side's memory. `sum` is the checksum of its header.
    pub fn sum(&self, layer: usize, ids: &[BlockId], sums: Sums, sum: u64) -> Result<u64, RdmaError> {
        let store = self.queue.pool().store();
        match self.slot(ids.len()) {
            Some(slot) => {
                Ok(slot.chunks_exact(store.block_bytes().max(1)).fold(sum, |sum, block| sums.next(sum, block)))
            }
            None => Ok(sums.of_store(&**store, layer, ids, sum)?),
        }
    }

    /// Copies the piece that has arrived last from its slot to its blocks.
    pub fn take(&mut self, layer: usize, ids: &[BlockId]) -> Result<(), RdmaError> {
        let store = self.queue.pool().store();
        if let Some(slot) = self.slot(ids.len()) {
            let size = store.block_bytes();
            store.write(layer, ids, &mut |i, block| block.copy_from_slice(&slot[i * size..][..size]))?;
        }
        Ok(())
    }

    /// The bytes of the last piece in the staging area.
    fn slot(&self, blocks: usize) -> Option<&[u8]> {
        let staging = self.staging.as_ref()?;
        let slot = self.pieces.wrapping_sub(1) as usize % usize::from(SLOTS);
        staging.bytes().get(slot * self.slot_bytes..)?.get(..blocks * self.queue.pool().store().block_bytes())
    }

    /// Ends the sender's access, whatever the sender does: its writes that have not arrived never will (KV-1).
    pub async fn revoke(self) {
        let Self { queue, staging, .. } = self;
        queue.end().await;
        drop(staging);
    }
}
