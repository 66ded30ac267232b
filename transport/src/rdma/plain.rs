//! Plain writes of a whole store, as a bound for handoffs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_kv::Ticket;

use super::verbs::{Registered, Run};
use super::{MAX_PIECE_BLOCKS, Pool, RdmaError};

/// Writes all layers of one store into those of another of the same size, without headers, checksums or commit. One write
/// has at most `write_bytes` bytes. Returns how long it took, without the connection.
///
/// # Errors
/// A device can't access its store directly, or a call fails.
pub(crate) async fn plain_writes(from: &Arc<Pool>, to: &Arc<Pool>, write_bytes: usize) -> Result<Duration, RdmaError> {
    let (Some(sources), Some(targets)) = (from.regions(), to.regions()) else {
        return Err(RdmaError::Mismatch("memory that the device can't access"));
    };
    // Both sides start from the same packet number, as in a handoff.
    let ticket = Ticket([1; 16]);
    let (mut sender, mut receiver) = (from.queue(&ticket).await?, to.queue(&ticket).await?);
    receiver.connect(&sender.address())?;
    sender.connect(&receiver.address())?;
    let layer_bytes = from.store().num_blocks() * from.store().block_bytes();
    let start = Instant::now();
    for (source, target) in sources.iter().zip(targets) {
        let mut runs = Vec::with_capacity(layer_bytes.div_ceil(write_bytes));
        for offset in (0..layer_bytes).step_by(write_bytes) {
            runs.push(run(source, target, offset, write_bytes.min(layer_bytes - offset))?);
        }
        for runs in runs.chunks(MAX_PIECE_BLOCKS as usize) {
            receiver.post_receives(1)?;
            sender.post_writes(runs, 0)?;
            sender.next().await?;
            receiver.next().await?;
        }
    }
    let took = start.elapsed();
    sender.end().await;
    receiver.end().await;
    Ok(took)
}

fn run(source: &Registered, target: &Registered, offset: usize, bytes: usize) -> Result<Run, RdmaError> {
    match (source.address(offset, bytes), target.address(offset, bytes)) {
        (Some(from), Some(to)) => {
            Ok(Run { from, local_key: source.keys().0, bytes: bytes as u32, to, remote_key: target.keys().1 })
        }
        _ => Err(RdmaError::Mismatch("the size of a layer")),
    }
}
