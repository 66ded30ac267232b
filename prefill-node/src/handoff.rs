//! The sending side of handoffs: it is started for a prompt or for an extension, and its outcome is counted.

use std::sync::Arc;

use overfill_kv::{
    BLOCK_TOKENS, BlockId, BlockLease, BlockPool, KvStore, TransferStats,
    handoff::{Failure, RefuseReason},
};
use overfill_node::LoadState;
use overfill_transport::{FailureReason, HandoffError, KvSender, SendPlan, TransferConfig};
use tokio::{runtime, sync::oneshot};

use crate::job::{Handoff, Request, Transfer};

/// Resources of the node that handoffs use.
pub struct HandoffContext {
    /// Runtime that runs the transfers.
    pub runtime: runtime::Handle,
    /// KV store of the model.
    pub store: Arc<dyn KvStore>,
    /// Blocks of the store.
    pub pool: BlockPool,
    /// Settings of the transfers.
    pub config: TransferConfig,
    /// Load counters and metrics of the node.
    pub load: Arc<LoadState>,
}

impl HandoffContext {
    /// Starts the sending side of a prompt's handoff. Returns its outcome, too.
    pub(crate) fn start(
        &self,
        request: &Request,
        handoff: &Handoff,
        blocks: &[BlockId],
        lease: &Arc<BlockLease>,
    ) -> (KvSender, Transfer) {
        let (tell, transfer) = oneshot::channel();
        (self.send(request, handoff, blocks, request.tokens.len(), lease, Some(tell)), transfer)
    }

    /// Starts the sending side of the handoff of whole blocks, for an extension.
    pub(crate) fn extend(
        &self,
        request: &Request,
        handoff: &Handoff,
        blocks: &[BlockId],
        lease: &Arc<BlockLease>,
    ) -> KvSender {
        self.send(request, handoff, blocks, blocks.len() * BLOCK_TOKENS, lease, None)
    }

    /// Starts the sending side of the handoff of the first `tokens` tokens, and a task that counts its outcome.
    fn send(
        &self,
        request: &Request,
        handoff: &Handoff,
        blocks: &[BlockId],
        tokens: usize,
        lease: &Arc<BlockLease>,
        tell: Option<oneshot::Sender<Result<TransferStats, HandoffError>>>,
    ) -> KvSender {
        let to_send = blocks.len().saturating_sub(handoff.held_blocks);
        let plan = SendPlan {
            endpoint: handoff.endpoint.clone(),
            ticket: handoff.ticket,
            request_id: request.id.clone(),
            schema: handoff.schema.clone(),
            blocks: blocks.to_vec(),
            lease: lease.clone(),
            held_blocks: handoff.held_blocks as u32,
            prompt_tokens: tokens as u32,
            // Per layer: each chunk completes at least one block, and the cached blocks are one more piece.
            max_pieces: handoff.schema.layers.len() * (to_send + 1),
            deadline: request.deadline,
        };
        let bytes = (to_send * handoff.schema.layers.len() * handoff.schema.block_bytes()) as u64;
        let open = self.load.count_handoff();
        let load = self.load.clone();
        let _runtime = self.runtime.enter();
        let (sender, mut ended) = KvSender::start(plan, self.store.clone(), self.config.clone());
        self.runtime.spawn(async move {
            let mut tell = tell;
            let owner_left = async {
                match &mut tell {
                    Some(tell) => tell.closed().await,
                    None => std::future::pending().await,
                }
            };
            let outcome = tokio::select! {
                outcome = &mut ended => outcome,
                () = owner_left => {
                    // KV-2: the sender keeps the blocks until the receiver has confirmed or the deadline has passed.
                    let _stranded = load.count_stranded(bytes);
                    (&mut ended).await
                }
            };
            drop(open);
            match &outcome {
                Ok(Ok(stats)) => {
                    load.metrics().transfer_bytes.inc_by(stats.bytes);
                    load.metrics().transfer_seconds.observe(stats.seconds);
                    load.metrics().transfer_exposed_seconds.observe(stats.exposed_seconds);
                }
                Ok(Err(e)) => {
                    // A ticket ends with its request on the receiver.
                    let is_void = *e == HandoffError::Failed(Failure::Refused(RefuseReason::Ticket));
                    let is_over = tell.as_ref().is_none_or(oneshot::Sender::is_closed) && is_void;
                    load.metrics().transfer_failed(if is_over { FailureReason::Cancelled } else { e.reason() });
                }
                Err(_) => load.metrics().transfer_failed(FailureReason::Internal),
            }
            if let (Ok(outcome), Some(tell)) = (outcome, tell) {
                let _ = tell.send(outcome);
            }
        });
        sender
    }
}
