//! The sender's side of one handoff.

use std::sync::Arc;

use overfill_kv::BlockId;
use tokio::sync::Semaphore;

use super::verbs::{Registered, Run, Staging};
use super::{Grant, Place, Queue, RdmaError, Source};
use crate::tcp::format::Sums;

/// Writes blocks into the receiver's memory.
pub(crate) struct Writer {
    // Declared first: destroyed before the staging memory is freed.
    queue: Queue,
    staging: Option<Staging>,
    remote: Remote,
    block_bytes: usize,
    /// Number of the next piece.
    number: u32,
}

/// Where the receiver wants the blocks.
enum Remote {
    Direct { layers: Vec<Place>, blocks: Vec<u32> },
    Slots { place: Place, slots: u16, slot_bytes: usize, free: Arc<Semaphore> },
}

impl Writer {
    /// Connects to the receiver's queue pair. The attempt has `layers` and `blocks`; pieces have at most `piece_bytes`
    /// bytes.
    pub async fn new(
        mut queue: Queue,
        grant: Grant,
        (layers, blocks): (usize, usize),
        piece_bytes: usize,
    ) -> Result<Self, RdmaError> {
        let Grant { address, places } = grant;
        let remote = match places.staging {
            None if places.layers.len() == layers && places.blocks.len() == blocks => {
                Remote::Direct { layers: places.layers, blocks: places.blocks }
            }
            None => return Err(RdmaError::Mismatch("the number of layers or blocks of the grant")),
            Some((slots, slot_bytes)) => {
                let slot_bytes = slot_bytes as usize;
                match places.layers[..] {
                    [place] if slot_bytes >= piece_bytes => {
                        let free = Arc::new(Semaphore::new(usize::from(slots)));
                        Remote::Slots { place, slots, slot_bytes, free }
                    }
                    _ => return Err(RdmaError::Mismatch("the staging area of the grant")),
                }
            }
        };
        let block_bytes = queue.pool().store().block_bytes();
        let staging = if queue.pool().regions().is_some() { None } else { Some(queue.pool().staging(piece_bytes)?) };
        queue.connect(&address)?;
        Ok(Self { queue, staging, remote, block_bytes, number: 0 })
    }

    /// Slots of the receiver's staging area that are free. The owner adds those that the receiver has taken out.
    pub fn credits(&self) -> Option<Arc<Semaphore>> {
        match &self.remote {
            Remote::Direct { .. } => None,
            Remote::Slots { free, .. } => Some(free.clone()),
        }
    }

    /// Number of the next piece.
    pub fn next_number(&self) -> u32 {
        self.number
    }

    /// Writes a piece, and returns its checksum; `sum` is that of its header. When it returns, this side's device does
    /// not read the blocks any more (KV-2). The caller limits the time.
    pub async fn write(&mut self, source: &Source<'_>, sums: Sums, sum: u64) -> Result<u64, RdmaError> {
        if let Remote::Slots { free, .. } = &self.remote {
            // Never closed.
            free.acquire().await.map_err(|_| RdmaError::Mismatch("the staging area"))?.forget();
        }
        let store = self.queue.pool().store().clone();
        if let Some(staging) = &mut self.staging {
            let memory = staging.bytes_mut();
            let mut at = 0;
            store.read(source.store_layer, source.ids, &mut |_, block| {
                memory[at..][..block.len()].copy_from_slice(block);
                at += block.len();
            })?;
        }
        let runs = self.runs(source)?;
        self.queue.post_writes(&runs, self.number)?;
        // Summed while the device sends.
        let sum = match &self.staging {
            Some(staging) => {
                let blocks = staging.bytes().chunks_exact(self.block_bytes.max(1)).take(source.ids.len());
                blocks.fold(sum, |sum, block| sums.next(sum, block))
            }
            None => sums.of_store(&*store, source.store_layer, source.ids, sum)?,
        };
        self.queue.next().await?;
        self.number = self.number.wrapping_add(1);
        Ok(sum)
    }

    /// The writes of a piece: one per run of blocks that are neighbours on both sides.
    fn runs(&self, source: &Source<'_>) -> Result<Vec<Run>, RdmaError> {
        let size = self.block_bytes;
        let mut runs: Vec<Run> = Vec::new();
        for (i, id) in source.ids.iter().enumerate() {
            let (from, local_key) = self.local(source, i, *id)?;
            let (to, remote_key) = self.remote(source, i)?;
            let next = Run { from, local_key, bytes: size as u32, to, remote_key };
            match runs.last_mut() {
                Some(run) if joins(run, &next) => run.bytes += next.bytes,
                _ => runs.push(next),
            }
        }
        Ok(runs)
    }

    fn local(&self, source: &Source<'_>, i: usize, id: BlockId) -> Result<(u64, u32), RdmaError> {
        let (region, at): (Option<&Registered>, _) = match (&self.staging, self.queue.pool().regions()) {
            (Some(staging), _) => (Some(staging.registered()), i),
            (None, regions) => (regions.and_then(|regions| regions.get(source.store_layer)), id.0 as usize),
        };
        let place =
            region.and_then(|region| Some((region.address(at * self.block_bytes, self.block_bytes)?, region.keys().0)));
        place.ok_or(RdmaError::Mismatch("a block of the plan"))
    }

    fn remote(&self, source: &Source<'_>, i: usize) -> Result<(u64, u32), RdmaError> {
        let at =
            |place: &Place, offset: usize| place.address.checked_add(offset as u64).map(|address| (address, place.key));
        let place = match &self.remote {
            Remote::Direct { layers, blocks } => match (layers.get(source.wire_layer), blocks.get(source.first + i)) {
                (Some(place), Some(id)) => at(place, *id as usize * self.block_bytes),
                _ => None,
            },
            Remote::Slots { place, slots, slot_bytes, .. } => {
                let slot = self.number as usize % usize::from(*slots);
                at(place, slot * slot_bytes + i * self.block_bytes)
            }
        };
        place.ok_or(RdmaError::Mismatch("a block of the grant"))
    }

    /// Destroys the queue pair: this side's device reads nothing more (KV-2).
    pub async fn close(self) {
        let Self { queue, staging, .. } = self;
        queue.end().await;
        drop(staging);
    }
}

/// Whether `next` continues `run` on both sides. A message has at most 2 GiB; a piece is far smaller.
fn joins(run: &Run, next: &Run) -> bool {
    let bytes = u64::from(run.bytes);
    run.from + bytes == next.from
        && run.to.checked_add(bytes) == Some(next.to)
        && (run.local_key, run.remote_key) == (next.local_key, next.remote_key)
        && run.bytes.checked_add(next.bytes).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_on_both_sides_join() {
        let run = Run { from: 100, local_key: 1, bytes: 10, to: 500, remote_key: 2 };
        let next = Run { from: 110, to: 510, ..run };
        assert!(joins(&run, &next));
        for other in [
            Run { from: 111, ..next },
            Run { to: 509, ..next },
            Run { local_key: 3, ..next },
            Run { remote_key: 3, ..next },
        ] {
            assert!(!joins(&run, &other));
        }
    }
}
