//! The decode side: reservations, and the listener that lets senders fill them.

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

use crate::reservations::{Entry, Inner, Registry, Shared};
use crate::{Committed, HandoffError, Reservation, TransferConfig, tcp};

/// The receiving end of the KV plane. Cheap to clone.
#[derive(Clone)]
pub struct KvReceiver {
    shared: Arc<Shared>,
}

impl KvReceiver {
    /// Serves `listener`, writing into `store`, whose layers are those of `schema`, in order.
    ///
    /// After `shutdown` the task goes on until every reservation has its outcome, then ends.
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

    /// Sets blocks aside for one attempt; from now on a sender with the ticket may fill them.
    ///
    /// A reservation that cannot be carried out fails at once, with the reason from [`IncomingHandoff::ready`].
    pub fn reserve(&self, reservation: Reservation) -> IncomingHandoff {
        let shared = &self.shared;
        let Reservation { ticket, request_id, lease, held_blocks, prompt_tokens, deadline } = reservation;
        let due = blocks_for(prompt_tokens as usize).saturating_sub(held_blocks as usize);
        if lease.len() != due || due == 0 {
            let limit = format!("the {due} blocks (at least 1) of the prompt behind the held ones");
            let outcome = HandoffError::Plan { field: "lease", limit, value: lease.len().to_string() };
            return IncomingHandoff::failed(outcome);
        }
        let spec = HandoffSpec {
            ticket,
            schema_digest: shared.digest,
            layers: shared.schema.layers.len() as u32,
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
                let limit = "fresh for every attempt".to_owned();
                let value = format!("{ticket:?} again");
                return IncomingHandoff::failed(HandoffError::Plan { field: "ticket", limit, value });
            }
            registry.entries.insert(ticket, entry.clone());
        }
        shared.changed.notify_one();
        IncomingHandoff { entry: Some(entry), waiting: Some(outcome), outcome: None, deadline }
    }

    /// Attempts that a sender may still fill.
    pub fn open_handoffs(&self) -> usize {
        self.shared.entries().iter().filter(|e| e.inner.lock().machine.state().is_open()).count()
    }

    /// Bytes of KV memory that nobody wants any more, but that are kept until their writer has stopped (KV-1).
    pub fn stranded_bytes(&self) -> u64 {
        self.shared.entries().iter().map(|e| e.stranded_bytes()).sum()
    }
}

/// One attempt, as its owner sees it.
///
/// Dropping it gives the request up: the ticket is void at once, the connection is closed, and the receiver's share of
/// the lease is let go as soon as the writing task has stopped.
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

    /// Waits until every block is here and verified, or the attempt has failed; at the latest until its deadline.
    ///
    /// May be dropped and called again; every call has the same outcome.
    pub async fn ready(&mut self) -> Result<Committed, HandoffError> {
        if let Some(outcome) = &self.outcome {
            return outcome.clone();
        }
        let outcome = match &mut self.waiting {
            None => Err(Failure::Lost.into()),
            Some(waiting) => tokio::select! {
                biased;
                outcome = &mut *waiting => outcome.unwrap_or(Err(Failure::Lost.into())),
                // The listener's task watches the time, too; this holds even when it has ended.
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

    /// Where the attempt is.
    pub fn state(&self) -> HandoffState {
        self.entry.as_ref().map_or(HandoffState::Failed, |e| e.inner.lock().machine.state())
    }

    /// The owner begins to decode.
    pub fn decode_started(&self) {
        if let Some(entry) = &self.entry {
            entry.on_event(ReceiverEvent::DecodeStarted);
        }
    }

    /// The owner has decoded to the end.
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

/// Accepts connections and lets time pass for every attempt, until shutdown has begun and no attempt is left.
async fn run(shared: Arc<Shared>, listener: impl Listen<Connection = tcp::Link>, shutdown: CancellationToken) {
    let connections = TaskTracker::new();
    tokio::select! {
        () = shared.until_settled(&shutdown) => {}
        () = tcp::accept(&shared, listener, &connections) => {}
    }
    connections.close();
    connections.wait().await;
}
