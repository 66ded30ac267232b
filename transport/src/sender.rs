//! The prefill side: a handoff as its owner sees it. A task of the endpoint's transport sends what is announced.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use overfill_kv::handoff::Piece;
use overfill_kv::{KvEndpoint, KvStore, RequestId, TransferStats};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{HandoffError, SendPlan, TransferConfig, tcp};

/// What a handoff's owner says to the task that sends.
pub(crate) enum Command {
    LayerReady(Piece),
    Commit(u32),
}

/// What a handoff's owner and the task that sends share.
pub(crate) struct Control {
    pub(crate) aborted: CancellationToken,
    /// More was announced than planned.
    pub(crate) overflow: AtomicBool,
    committed: AtomicBool,
    pub(crate) committed_at: Mutex<Option<Instant>>,
}

/// The owner's end of one handoff. Dropping it without a commit aborts the handoff.
pub struct KvSender {
    layers: KvLayers,
}

/// Where the layers of one handoff are announced, from any thread. Clones are the same. It keeps nothing alive: once the
/// handoff is over, announcements go nowhere.
#[derive(Clone)]
pub struct KvLayers {
    commands: mpsc::Sender<Command>,
    control: Arc<Control>,
    /// Position of each of the local store's layers on the wire.
    wire_layers: Arc<[Option<u32>]>,
    held_blocks: u32,
    request_id: RequestId,
}

impl KvSender {
    /// Connects and sends in a task of its own; the handle yields the outcome, at the latest at the plan's deadline.
    pub fn start(
        plan: SendPlan,
        store: Arc<dyn KvStore>,
        config: TransferConfig,
    ) -> (Self, JoinHandle<Result<TransferStats, HandoffError>>) {
        // One more for the commit.
        let (commands, queue) = mpsc::channel(plan.max_pieces.max(1) + 1);
        let control = Arc::new(Control {
            aborted: CancellationToken::new(),
            overflow: AtomicBool::new(false),
            committed: AtomicBool::new(false),
            committed_at: Mutex::new(None),
        });
        let mut wire_layers = vec![None; store.num_layers()];
        for (wire, layer) in plan.schema.layers.iter().enumerate() {
            if let Some(slot) = wire_layers.get_mut(*layer as usize) {
                *slot = Some(wire as u32);
            }
        }
        let layers = KvLayers {
            commands,
            control: control.clone(),
            wire_layers: wire_layers.into(),
            held_blocks: plan.held_blocks,
            request_id: plan.request_id.clone(),
        };
        let task = tokio::spawn(async move {
            plan.check(&*store)?;
            match plan.endpoint.clone() {
                KvEndpoint::Tcp(address) => tcp::send(address, plan, store, config, queue, control).await,
            }
        });
        (Self { layers }, task)
    }

    /// Where layers are announced.
    pub fn layers(&self) -> &KvLayers {
        &self.layers
    }

    /// This is the first token. The commit leaves when all layers of all blocks were announced and sent. Never blocks.
    pub fn commit(&self, first_token: u32) {
        let KvLayers { control, .. } = &self.layers;
        control.committed_at.lock().get_or_insert_with(Instant::now);
        self.layers.send(Command::Commit(first_token));
        control.committed.store(true, Ordering::Release);
    }

    /// Gives the handoff up, committed or not.
    pub fn abort(self) {
        self.layers.control.aborted.cancel();
    }
}

impl KvLayers {
    /// The KV of these prompt blocks (by index) of one layer of the local store is final, and may be sent.
    ///
    /// Never blocks. Layers and blocks that the receiver does not want are ignored; the same block twice, or more calls
    /// than planned, fail the handoff.
    pub fn ready(&self, layer: usize, blocks: Range<u32>) {
        let first_block = blocks.start.max(self.held_blocks);
        let Some(Some(layer)) = self.wire_layers.get(layer) else { return };
        if first_block < blocks.end {
            self.send(Command::LayerReady(Piece { layer: *layer, first_block, blocks: blocks.end - first_block }));
        }
    }

    fn send(&self, command: Command) {
        match self.commands.try_send(command) {
            // Closed: the handoff has its outcome already.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::error!(request = %self.request_id, "more pieces of kv were announced than planned");
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
