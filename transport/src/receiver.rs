//! The receiver, on the decode node: makes reservations and listens for the senders that fill them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use overfill_kv::handoff::{Failure, HandoffSpec, HandoffState, ReceiverEvent, ReceiverHandoff};
use overfill_kv::{KvSchema, KvStore, blocks_for};
use overfill_net::Listen;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info_span;

use crate::reservations::{Entry, Inner, Registry, Shared};
use crate::{Committed, HandoffError, Reservation, TransferConfig, tcp};

/// Receives KV on a decode node. Cheap to clone.
#[derive(Clone)]
pub struct KvReceiver {
    shared: Arc<Shared>,
}

impl KvReceiver {
    /// Starts a task that serves `listener` and writes received KV to `store`. The layers of `store` are those of
    /// `schema`, in the same order.
    ///
    /// After `shutdown` the task continues until every reservation has its outcome and no writer is left, then ends.
    pub fn start(
        listener: impl Listen<Connection = tcp::Link>,
        schema: KvSchema,
        store: Arc<dyn KvStore>,
        config: TransferConfig,
        shutdown: CancellationToken,
    ) -> (Self, JoinHandle<()>) {
        let shared = Arc::new(Shared {
            digest: schema.digest(),
            schema,
            store,
            config,
            epoch: Instant::now(),
            registry: Mutex::new(Registry { entries: HashMap::new(), closed: false }),
            changed: Notify::new(),
        });
        let task = tokio::spawn(run(shared.clone(), listener, shutdown));
        (Self { shared }, task)
    }

    /// Registers a reservation for one attempt. The span of its handoff is a child of the current one. From now on a sender with the ticket may fill its blocks.
    ///
    /// An invalid reservation fails at once; [`IncomingHandoff::ready`] returns the error.
    pub fn reserve(&self, reservation: Reservation) -> IncomingHandoff {
        let shared = &self.shared;
        let Reservation { ticket, request_id, lease, held_blocks, prompt_tokens, deadline } = reservation;
        let due = blocks_for(prompt_tokens as usize).saturating_sub(held_blocks as usize);
        if lease.len() != due || due == 0 {
            let limit = format!("the prompt's {due} blocks after the held ones (at least 1)");
            let outcome = HandoffError::Plan { field: "lease", limit, value: lease.len().to_string() };
            return IncomingHandoff::failed(outcome);
        }
        let spec = HandoffSpec {
            ticket,
            schema_digest: shared.digest,
            due: shared.schema.due_blocks(held_blocks, prompt_tokens),
            held_blocks,
            blocks: due as u32,
            block_bytes: shared.schema.block_bytes(),
            prompt_tokens,
            deadline: deadline.saturating_duration_since(shared.epoch),
            idle_timeout: shared.config.idle_timeout,
        };
        let (tell, outcome) = oneshot::channel();
        let entry = Arc::new(Entry {
            shared: shared.clone(),
            span: info_span!("handoff", otel.kind = "consumer", request = %request_id),
            request_id,
            blocks: lease.blocks().to_vec(),
            stop: CancellationToken::new(),
            inner: Mutex::new(Inner {
                machine: ReceiverHandoff::new(spec.clone()),
                hold: Some(lease),
                outcome: Some(tell),
                tell: None,
                first_frame: None,
                exposed: Duration::ZERO,
            }),
            spec,
        });
        {
            let mut registry = shared.registry.lock();
            if registry.closed {
                return IncomingHandoff::failed(Failure::Cancelled.into());
            }
            if registry.entries.contains_key(&ticket) {
                let limit = "new for every attempt".to_owned();
                let value = format!("{ticket:?} again");
                return IncomingHandoff::failed(HandoffError::Plan { field: "ticket", limit, value });
            }
            registry.entries.insert(ticket, entry.clone());
        }
        shared.changed.notify_one();
        IncomingHandoff { entry: Some(entry), waiting: Some(outcome), outcome: None, deadline }
    }

    /// Number of attempts that a sender may still fill.
    pub fn open_handoffs(&self) -> usize {
        self.shared.entries().iter().filter(|e| e.inner.lock().machine.state().is_open()).count()
    }

    /// Bytes of KV memory of attempts that are over but whose writer has not stopped yet (KV-1).
    pub fn stranded_bytes(&self) -> u64 {
        self.shared.entries().iter().map(|e| e.stranded_bytes()).sum()
    }
}

/// One attempt, as its owner sees it.
///
/// Dropping it cancels the request. The ticket is void at once, the connection is closed, and the receiver's share of
/// the lease is dropped as soon as the writing task has stopped.
pub struct IncomingHandoff {
    entry: Option<Arc<Entry>>,
    waiting: Option<oneshot::Receiver<Result<Committed, HandoffError>>>,
    outcome: Option<Result<Committed, HandoffError>>,
    deadline: Instant,
}

impl IncomingHandoff {
    fn failed(error: HandoffError) -> Self {
        Self { entry: None, waiting: None, outcome: Some(Err(error)), deadline: Instant::now() }
    }

    /// Waits until all blocks have arrived and are verified, or the attempt has failed. Returns by the deadline at the
    /// latest.
    ///
    /// The call may be dropped and repeated. Every call returns the same outcome.
    pub async fn ready(&mut self) -> Result<Committed, HandoffError> {
        if let Some(outcome) = &self.outcome {
            return outcome.clone();
        }
        let outcome = match &mut self.waiting {
            None => Err(Failure::Lost.into()),
            Some(waiting) => tokio::select! {
                biased;
                outcome = &mut *waiting => outcome.unwrap_or(Err(Failure::Lost.into())),
                // The listener's task checks deadlines too, but it may have ended.
                () = tokio::time::sleep_until(self.deadline) => {
                    if let Some(entry) = &self.entry {
                        entry.on_event(ReceiverEvent::Tick);
                    }
                    waiting.try_recv().unwrap_or(Err(Failure::Deadline.into()))
                }
            },
        };
        self.waiting = None;
        self.outcome = Some(outcome.clone());
        outcome
    }

    /// Current state of the attempt.
    pub fn state(&self) -> HandoffState {
        self.entry.as_ref().map_or(HandoffState::Failed, |e| e.inner.lock().machine.state())
    }

    /// Reports that the owner has started to decode.
    pub fn decode_started(&self) {
        if let Some(entry) = &self.entry {
            entry.on_event(ReceiverEvent::DecodeStarted);
        }
    }

    /// Reports that the owner has finished decoding.
    pub fn finished(&self) {
        if let Some(entry) = &self.entry {
            entry.on_event(ReceiverEvent::Finished);
        }
    }
}

impl Drop for IncomingHandoff {
    fn drop(&mut self) {
        if let Some(entry) = &self.entry {
            entry.on_event(ReceiverEvent::Cancel);
        }
    }
}

/// Accepts connections and ticks the attempts, until shutdown has begun and no attempt is left. Then waits for the open
/// connections.
async fn run(shared: Arc<Shared>, listener: impl Listen<Connection = tcp::Link>, shutdown: CancellationToken) {
    let connections = TaskTracker::new();
    tokio::select! {
        () = shared.until_settled(&shutdown) => {}
        () = tcp::accept(&shared, listener, &connections) => {}
    }
    connections.close();
    connections.wait().await;
}
