//! Plan of a handoff, for the sender.

use std::sync::Arc;

use overfill_kv::{BlockId, BlockLease, KvEndpoint, KvSchema, KvStore, RequestId, Ticket, blocks_for};
use tokio::time::Instant;

use crate::HandoffError;

/// What a handoff sends, and where to.
#[derive(Debug)]
pub struct SendPlan {
    /// Address of the receiver.
    pub endpoint: KvEndpoint,
    /// Ticket of the receiver's reservation.
    pub ticket: Ticket,
    /// Identifies the request in logs.
    pub request_id: RequestId,
    /// The receiver's schema. `schema.layers` lists the layers of the local store that are sent. On the wire a layer is
    /// numbered by its position in that list.
    pub schema: KvSchema,
    /// All blocks of the prompt in the local store, in prompt order. Blocks that the receiver holds are included.
    pub blocks: Vec<BlockId>,
    /// Lease of the blocks. Dropped when the receiver has confirmed or the handoff has failed (KV-2).
    pub lease: Arc<BlockLease>,
    /// Leading blocks of the prompt that the receiver does not need. They are not sent. In layers with windows, more blocks
    /// are left out ([`KvSchema::due_blocks`]).
    pub held_blocks: u32,
    /// Length of the whole prompt, held blocks included.
    pub prompt_tokens: u32,
    /// Maximum number of calls of [`KvLayers::ready`]: prefill chunks times layers.
    pub max_pieces: usize,
    /// The handoff fails if the receiver has not confirmed by this time.
    pub deadline: Instant,
}

impl SendPlan {
    pub(crate) fn check(&self, store: &dyn KvStore) -> Result<(), HandoffError> {
        let wrong = |field, limit: String, value: String| Err(HandoffError::Plan { field, limit, value });
        let blocks = blocks_for(self.prompt_tokens as usize);
        if self.blocks.len() != blocks {
            return wrong("blocks", format!("the prompt's {blocks} blocks"), self.blocks.len().to_string());
        }
        if self.held_blocks as usize >= blocks {
            return wrong("held_blocks", format!("below the prompt's {blocks} blocks"), self.held_blocks.to_string());
        }
        if let Some(layer) = self.schema.layers.iter().find(|l| **l as usize >= store.num_layers()) {
            return wrong(
                "schema.layers",
                format!("below the store's layer count {}", store.num_layers()),
                layer.to_string(),
            );
        }
        if self.schema.block_bytes() != store.block_bytes() {
            let limit = format!("one with the store's block size of {} bytes", store.block_bytes());
            return wrong("schema", limit, self.schema.block_bytes().to_string());
        }
        Ok(())
    }
}
