//! Reservations of a receiver, each with its state machine. Independent of the transport that fills them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use overfill_kv::handoff::{Commit, HandoffSpec, Piece, ReceiverAction, ReceiverEvent, ReceiverHandoff, RefuseReason};
use overfill_kv::{BlockId, BlockLease, KvSchema, KvStore, RequestId, Ticket, TransferStats};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::{Committed, HandoffError, TransferConfig};

/// Blocks reserved for one attempt, and its parameters.
#[derive(Debug)]
pub struct Reservation {
    /// Ticket that a sender must present. It must be new for every attempt (KV-4).
    pub ticket: Ticket,
    /// Identifies the request in logs.
    pub request_id: RequestId,
    /// The blocks to fill, in prompt order, without the held ones. The receiver keeps a share of the lease while a task
    /// may write to them (KV-1).
    pub lease: Arc<BlockLease>,
    /// Leading blocks of the prompt that this node does not need: it holds them already, or no layer attends to them. They
    /// are not part of `lease`.
    pub held_blocks: u32,
    /// Length of the whole prompt, held blocks included.
    pub prompt_tokens: u32,
    /// The attempt fails if its KV has not arrived by this time.
    pub deadline: Instant,
}

/// State shared by the listener, its connections and the owners of attempts.
pub(crate) struct Shared {
    pub schema: KvSchema,
    pub store: Arc<dyn KvStore>,
    pub config: TransferConfig,
    pub digest: [u8; 32],
    /// Origin of the times passed to the state machines.
    pub epoch: Instant,
    pub registry: Mutex<Registry>,
    /// Notified when the next tick or the number of entries has changed.
    pub changed: Notify,
}

pub(crate) struct Registry {
    /// Attempts whose blocks the transport still holds. A ticket is 128 random bits and the map's hash is keyed, so
    /// lookup times reveal nothing about valid tickets.
    pub entries: HashMap<Ticket, Arc<Entry>>,
    /// Whether the listener has ended, so that new reservations are refused.
    pub closed: bool,
}

/// One attempt: its state machine and the data that the machine's actions need.
pub(crate) struct Entry {
    pub shared: Arc<Shared>,
    pub request_id: RequestId,
    /// Span of the handoff.
    pub span: Span,
    pub spec: HandoffSpec,
    /// The blocks to fill, in prompt order.
    pub blocks: Vec<BlockId>,
    /// Cancelled to stop the writer.
    pub stop: CancellationToken,
    pub inner: Mutex<Inner>,
}

pub(crate) struct Inner {
    pub machine: ReceiverHandoff,
    /// The transport's own share of the lease (KV-1).
    pub hold: Option<Arc<BlockLease>>,
    pub outcome: Option<oneshot::Sender<Result<Committed, HandoffError>>>,
    pub tell: Option<RefuseReason>,
    pub first_frame: Option<Instant>,
    pub exposed: Duration,
}

impl Entry {
    /// Passes an event to the state machine and carries out its actions. Returns the actions that are left to the connection.
    pub fn on_event(&self, event: ReceiverEvent) -> Vec<ReceiverAction> {
        let now = Instant::now();
        let mut released = None;
        let mut for_connection = Vec::new();
        {
            let mut inner = self.inner.lock();
            if matches!(event, ReceiverEvent::Layer(_)) {
                inner.first_frame.get_or_insert(now);
            }
            for action in inner.machine.on_event(event, now - self.shared.epoch) {
                match action {
                    ReceiverAction::Ready { first_token } => {
                        let stats = inner.stats(now);
                        inner.tell_owner(Ok(Committed { first_token, stats }));
                    }
                    ReceiverAction::Fail(failure) => inner.tell_owner(Err(failure.into())),
                    ReceiverAction::StopWriter { tell } => {
                        inner.tell = tell;
                        self.stop.cancel();
                    }
                    ReceiverAction::ReleaseBlocks => released = inner.hold.take(),
                    other => for_connection.push(other),
                }
            }
        }
        if released.is_some() {
            drop(released);
            self.shared.registry.lock().entries.remove(&self.spec.ticket);
            self.shared.changed.notify_one();
        }
        if for_connection.contains(&ReceiverAction::Accept) {
            self.shared.changed.notify_one();
        }
        for_connection
    }

    /// Like [`Self::on_event`], for a commit. `exposed` is the time between the owner's commit on the sender and the
    /// commit frame.
    pub fn on_commit(&self, commit: Commit, exposed: Duration) -> Vec<ReceiverAction> {
        self.inner.lock().exposed = exposed;
        self.on_event(ReceiverEvent::Commit(commit))
    }

    /// The reason to send to the sender when the writer stops, if any.
    pub fn tell(&self) -> Option<RefuseReason> {
        self.inner.lock().tell
    }

    /// Block ids of a piece. The state machine must have admitted the piece.
    pub fn blocks_of(&self, first_block: u32, blocks: u32) -> &[BlockId] {
        let from = (first_block - self.spec.held_blocks) as usize;
        &self.blocks[from..from + blocks as usize]
    }

    /// Block ids of a piece, if it is inside the attempt.
    pub fn try_blocks_of(&self, piece: &Piece) -> Option<&[BlockId]> {
        let from = piece.first_block.checked_sub(self.spec.held_blocks)? as usize;
        let blocks = self.blocks.get(from..from.checked_add(piece.blocks as usize)?)?;
        ((piece.layer as usize) < self.spec.due.len() && !blocks.is_empty()).then_some(blocks)
    }

    /// A share of the blocks' lease. `None` if the transport has released it.
    pub fn lease(&self) -> Option<Arc<BlockLease>> {
        self.inner.lock().hold.clone()
    }

    pub fn next_tick(&self) -> Option<Instant> {
        self.inner.lock().machine.next_tick().map(|at| self.shared.epoch + at)
    }

    pub fn stranded_bytes(&self) -> u64 {
        if self.inner.lock().machine.is_stranded() {
            (self.blocks.len() * self.spec.due.len() * self.spec.block_bytes) as u64
        } else {
            0
        }
    }
}

impl Inner {
    fn stats(&self, now: Instant) -> TransferStats {
        let seconds = self.first_frame.map_or(0.0, |first| (now - first).as_secs_f64());
        TransferStats { bytes: self.machine.bytes(), seconds, exposed_seconds: self.exposed.as_secs_f64().min(seconds) }
    }

    fn tell_owner(&mut self, outcome: Result<Committed, HandoffError>) {
        if let Some(owner) = self.outcome.take() {
            // Sending fails if the owner was dropped. Its `Drop` reports `Cancel`.
            let _ = owner.send(outcome);
        }
    }
}

impl Shared {
    /// The attempt with this ticket, if the transport still holds its blocks.
    pub fn find(&self, ticket: &Ticket) -> Option<Arc<Entry>> {
        self.registry.lock().entries.get(ticket).cloned()
    }

    /// All attempts whose blocks the transport still holds.
    pub fn entries(&self) -> Vec<Arc<Entry>> {
        self.registry.lock().entries.values().cloned().collect()
    }

    /// Sends `Tick` events to all attempts when they are due. Resolves when `shutdown` has begun and no attempt is
    /// left. After that, new reservations are refused.
    pub async fn until_settled(&self, shutdown: &CancellationToken) {
        let mut draining = false;
        loop {
            if draining {
                let mut registry = self.registry.lock();
                if registry.entries.is_empty() {
                    registry.closed = true;
                    return;
                }
            }
            let next = self.entries().iter().filter_map(|e| e.next_tick()).min();
            tokio::select! {
                () = shutdown.cancelled(), if !draining => draining = true,
                () = self.changed.notified() => {}
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                    for entry in self.entries() {
                        if entry.next_tick().is_some_and(|at| at <= Instant::now()) {
                            entry.on_event(ReceiverEvent::Tick);
                        }
                    }
                }
            }
        }
    }
}
