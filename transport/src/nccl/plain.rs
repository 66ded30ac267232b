//! Plain sends of a whole store, as a bound for handoffs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_kv::handoff::Piece;
use overfill_kv::{BlockId, BlockLease, KvStore, Ticket};

use super::{Agent, Announced, MAX_PIECE_BLOCKS, NcclError, Progress, Receiving, Sending};

/// How the sender calls the receiver, which has no address here.
const ENDPOINT: &str = "plain";

/// Sends all layers of `store`, whose agent is `from`, to the store of the other agent, which has the same size. There are no
/// messages, headers or checksums, but the same pieces and the same order as in a handoff. Returns how long it took, without
/// the joining of the communicator. The transfers hold `lease`, although nobody else uses the stores.
///
/// # Errors
/// A transfer fails.
pub(crate) async fn plain_sends(
    from: &Arc<Agent>,
    to: &Arc<Agent>,
    store: &dyn KvStore,
    lease: Arc<BlockLease>,
) -> Result<Duration, NcclError> {
    let sender = from.introduce(ENDPOINT, &Ticket([1; 16])).await?;
    let id = to.invite(sender).await?;
    let sending = from.sending(ENDPOINT, id, lease.clone()).await?;
    let mut receiving = to.receiving(id, lease);
    let ids: Vec<BlockId> = (0..store.num_blocks() as u32).map(BlockId).collect();
    // Waits for the communicator.
    copy(&sending, &mut receiving, ids.chunks(1).take(1).map(|ids| (0, ids))).await?;
    let blocks = (from.piece_bytes() / store.block_bytes().max(1)).clamp(1, MAX_PIECE_BLOCKS as usize);
    let start = Instant::now();
    let pieces = (0..store.num_layers()).flat_map(|layer| ids.chunks(blocks).map(move |ids| (layer, ids)));
    copy(&sending, &mut receiving, pieces).await?;
    let took = start.elapsed();
    sending.idle().await;
    Ok(took)
}

async fn copy(
    sending: &Sending,
    receiving: &mut Receiving,
    mut pieces: impl Iterator<Item = (usize, &[BlockId])>,
) -> Result<(), NcclError> {
    let mut next = pieces.next();
    while next.is_some() || !receiving.is_empty() {
        let has_room = receiving.has_room();
        tokio::select! {
            biased;
            progress = receiving.progress() => {
                if let Progress::Posted(number) = progress? {
                    sending.posted(number)?;
                }
            }
            room = sending.room(), if has_room && next.is_some() => {
                room?;
                if let Some((layer, ids)) = next {
                    sending.announce(layer, ids);
                    let piece = Piece { layer: layer as u32, first_block: 0, blocks: ids.len() as u32 };
                    receiving.receive(Announced { piece, header_sum: 0, sum: 0 }, layer, ids)?;
                }
                next = pieces.next();
            }
        }
    }
    Ok(())
}
