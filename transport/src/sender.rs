//! The sender, on the prefill node: the owner's interface to a handoff. A task of the transport sends the announced
//! blocks.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use overfill_kv::handoff::Piece;
use overfill_kv::{KvStore, RequestId, TransferStats};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, info_span};

use crate::{HandoffError, SendPlan, TransferConfig, tcp};

/// Message from a handoff's owner to the sending task.
pub(crate) enum Command {
    LayerReady(Piece),
    Commit(u32),
}

/// State shared by a handoff's owner and the sending task.
pub(crate) struct Control {
    pub(crate) aborted: CancellationToken,
    /// Whether more pieces were announced than planned.
    pub(crate) overflow: AtomicBool,
    committed: AtomicBool,
    pub(crate) committed_at: Mutex<Option<Instant>>,
}

/// The owner's handle to one handoff. Dropping it without a commit aborts the handoff.
pub struct KvSender {
    layers: KvLayers,
}

/// Announces finished layers of one handoff, from any thread. Clones announce to the same handoff. It does not keep the
/// handoff alive: announcements after the handoff's end are ignored.
#[derive(Clone)]
pub struct KvLayers {
    commands: mpsc::Sender<Command>,
    control: Arc<Control>,
    /// For each layer of the local store, its wire number and the index in the prompt of its first block that is due. `None`
    /// for layers that are not sent.
    wire_layers: Arc<[Option<(u32, u32)>]>,
    request_id: RequestId,
}

impl KvSender {
    /// Starts a task that connects and sends. Its span is a child of the current one. The join handle returns the outcome, by the plan's deadline at the
    /// latest.
    pub fn start(
        plan: SendPlan,
        store: Arc<dyn KvStore>,
        config: TransferConfig,
    ) -> (Self, JoinHandle<Result<TransferStats, HandoffError>>) {
        // One more slot for the commit.
        let (commands, queue) = mpsc::channel(plan.max_pieces.max(1) + 1);
        let control = Arc::new(Control {
            aborted: CancellationToken::new(),
            overflow: AtomicBool::new(false),
            committed: AtomicBool::new(false),
            committed_at: Mutex::new(None),
        });
        let mut wire_layers = vec![None; store.num_layers()];
        let due = plan.schema.due_blocks(plan.held_blocks, plan.prompt_tokens);
        for (wire, (layer, due)) in plan.schema.layers.iter().zip(due).enumerate() {
            if let Some(slot) = wire_layers.get_mut(*layer as usize) {
                *slot = Some((wire as u32, due.start));
            }
        }
        let layers = KvLayers {
            commands,
            control: control.clone(),
            wire_layers: wire_layers.into(),
            request_id: plan.request_id.clone(),
        };
        let span = info_span!("handoff", otel.kind = "producer", request = %plan.request_id);
        let task = async move {
            plan.check(&*store)?;
            tcp::send(plan, store, config, queue, control).await
        };
        (Self { layers }, tokio::spawn(task.instrument(span)))
    }

    /// Handle to announce layers.
    pub fn layers(&self) -> &KvLayers {
        &self.layers
    }

    /// Passes on the first token. The commit is sent after all layers of all blocks were announced and sent. Never
    /// blocks.
    pub fn commit(&self, first_token: u32) {
        let KvLayers { control, .. } = &self.layers;
        control.committed_at.lock().get_or_insert_with(Instant::now);
        self.layers.send(Command::Commit(first_token));
        control.committed.store(true, Ordering::Release);
    }

    /// Aborts the handoff, whether committed or not.
    pub fn abort(self) {
        self.layers.control.aborted.cancel();
    }
}

impl KvLayers {
    /// Announces that the KV of one layer of the local store is final for these blocks (indices in the prompt), so that
    /// it can be sent.
    ///
    /// Never blocks. Layers that are not in the receiver's schema and blocks that are not due are ignored. The handoff
    /// fails if a block is announced twice, or after more calls than planned.
    pub fn ready(&self, layer: usize, blocks: Range<u32>) {
        let Some(Some((layer, first_due))) = self.wire_layers.get(layer) else { return };
        let first_block = blocks.start.max(*first_due);
        if first_block < blocks.end {
            self.send(Command::LayerReady(Piece { layer: *layer, first_block, blocks: blocks.end - first_block }));
        }
    }

    fn send(&self, command: Command) {
        match self.commands.try_send(command) {
            // Closed means that the handoff already has its outcome.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::error!(request = %self.request_id, "more kv pieces were announced than planned");
                self.control.overflow.store(true, Ordering::Release);
                self.control.aborted.cancel();
            }
        }
    }
}

impl Drop for KvSender {
    fn drop(&mut self) {
        let control = &self.layers.control;
        if !control.committed.load(Ordering::Acquire) {
            control.aborted.cancel();
        }
    }
}
