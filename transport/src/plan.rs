//! What a handoff is to send.

use std::sync::Arc;

use overfill_kv::{BlockId, BlockLease, KvEndpoint, KvSchema, KvStore, RequestId, Ticket, blocks_for};
use tokio::time::Instant;

use crate::HandoffError;

/// What is to be sent, and where.
#[derive(Debug)]
pub struct SendPlan {
    /// Where the receiver takes it.
    pub endpoint: KvEndpoint,
    /// The right to write there.
    pub ticket: Ticket,
    /// For logs.
    pub request_id: RequestId,
    /// The consumer's schema. Its layers are the layers of the local store that are sent, by index; the wire counts
    /// them by their position in this list.
    pub schema: KvSchema,
    /// All blocks of the prompt in the local store, in order.
    pub blocks: Vec<BlockId>,
    /// What keeps them; let go when the receiver has confirmed or the handoff has failed (KV-2).
    pub lease: Arc<BlockLease>,
    /// Leading blocks of the prompt that the receiver holds already. They are not sent.
    pub held_blocks: u32,
    /// Length of the whole prompt.
    pub prompt_tokens: u32,
    /// Most calls of [`KvLayers::ready`] that will come: chunks times layers.
    pub max_pieces: usize,
    /// By then the receiver has confirmed, or the handoff has failed.
    pub deadline: Instant,
}

impl SendPlan {
    pub(crate) fn check(&self, store: &dyn KvStore) -> Result<(), HandoffError> {
        let wrong = |field, limit: String, value: String| Err(HandoffError::Plan { field, limit, value });
        let blocks = blocks_for(self.prompt_tokens as usize);
        if self.blocks.len() != blocks {
            return wrong("blocks", format!("the {blocks} of the prompt"), self.blocks.len().to_string());
        }
        if self.held_blocks as usize >= blocks {
            return wrong("held_blocks", format!("below the prompt's {blocks} blocks"), self.held_blocks.to_string());
        }
        if let Some(layer) = self.schema.layers.iter().find(|l| **l as usize >= store.num_layers()) {
            return wrong(
                "schema.layers",
                format!("below the store's {} layers", store.num_layers()),
                layer.to_string(),
            );
        }
        if self.schema.block_bytes() != store.block_bytes() {
            let limit = format!("of blocks of {} bytes, as the store's", store.block_bytes());
            return wrong("schema", limit, self.schema.block_bytes().to_string());
        }
        Ok(())
    }
}
