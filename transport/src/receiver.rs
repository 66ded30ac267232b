//! The decode side: reservations, and the listener that lets senders fill them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use overfill_kv::handoff::{
    Commit, Failure, HandoffSpec, HandoffState, ReceiverAction, ReceiverEvent, ReceiverHandoff, RefuseReason,
};
use overfill_kv::{BlockId, BlockLease, KvSchema, KvStore, RequestId, Ticket, TransferStats, blocks_for};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::link::{Listen, Opening};
use crate::newcomers::Newcomers;
use crate::{Committed, HandoffError, TransferConfig, connection, frame};

/// What is set aside for one attempt.
#[derive(Debug)]
pub struct Reservation {
    /// The right to fill it: fresh for every attempt (KV-4).
    pub ticket: Ticket,
    /// For logs.
    pub request_id: RequestId,
    /// The blocks to fill, in prompt order, without the ones already held. The receiver keeps a share of the lease for
    /// as long as anything may write to them (KV-1).
    pub lease: Arc<BlockLease>,
    /// Index in the prompt of the lease's first block.
    pub first_block: u32,
    /// Length of the whole prompt.
    pub prompt_tokens: u32,
    /// By then the KV is here, or the attempt has failed.
    pub deadline: Instant,
}

/// The receiving end of the KV plane. Cheap to clone.
#[derive(Clone)]
pub struct KvReceiver {
    shared: Arc<Shared>,
}

/// What the listener, its connections and the owners share.
pub(crate) struct Shared {
    pub schema: KvSchema,
    pub store: Arc<dyn KvStore>,
    pub config: TransferConfig,
    digest: [u8; 32],
    /// Origin of the state machines' time.
    epoch: Instant,
    registry: Mutex<Registry>,
    /// A limit of time, or the number of entries, has changed.
    changed: Notify,
}

struct Registry {
    /// Attempts that may still be written to. A ticket is 128 random bits and the map's hash is keyed, so the time of
    /// a look-up tells a stranger nothing.
    entries: HashMap<Ticket, Arc<Entry>>,
    /// The listener has ended: nobody would ever fill a new reservation.
    closed: bool,
}

/// One attempt: its state machine, and what the machine's actions are about.
pub(crate) struct Entry {
    shared: Arc<Shared>,
    pub request_id: RequestId,
    spec: HandoffSpec,
    /// The blocks to fill, in prompt order.
    pub blocks: Vec<BlockId>,
    /// Cancelled when the writer must stop.
    pub stop: CancellationToken,
    inner: Mutex<Inner>,
}

struct Inner {
    machine: ReceiverHandoff,
    /// The transport's own share of the lease (KV-1).
    hold: Option<Arc<BlockLease>>,
    outcome: Option<oneshot::Sender<Result<Committed, HandoffError>>>,
    tell: Option<RefuseReason>,
    first_frame: Option<Instant>,
    exposed: Duration,
}

impl Entry {
    /// Tells the machine what happened and does what it says; returns the actions that are the connection's to do.
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

    /// As [`Self::on_event`], for the last frame. `exposed`: how long the sender had been waiting for the transfer.
    pub fn on_commit(&self, commit: Commit, exposed: Duration) -> Vec<ReceiverAction> {
        self.inner.lock().exposed = exposed;
        self.on_event(ReceiverEvent::Commit(commit))
    }

    /// What to tell the sender now that the writer has to stop.
    pub fn tell(&self) -> Option<RefuseReason> {
        self.inner.lock().tell
    }

    /// The blocks of a piece that the machine has admitted.
    pub fn blocks_of(&self, first_block: u32, blocks: u32) -> &[BlockId] {
        let from = (first_block - self.spec.first_block) as usize;
        &self.blocks[from..from + blocks as usize]
    }

    fn next_tick(&self) -> Option<Instant> {
        self.inner.lock().machine.next_tick().map(|at| self.shared.epoch + at)
    }

    fn stranded_bytes(&self) -> u64 {
        if self.inner.lock().machine.is_stranded() {
            self.blocks.len() as u64 * u64::from(self.spec.layers) * self.spec.block_bytes as u64
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
            // The owner may have gone; its `Drop` has told the machine, or will.
            let _ = owner.send(outcome);
        }
    }
}

impl Shared {
    /// The attempt that a ticket opens.
    pub fn find(&self, ticket: &Ticket) -> Option<Arc<Entry>> {
        self.registry.lock().entries.get(ticket).cloned()
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        self.registry.lock().entries.values().cloned().collect()
    }
}

impl KvReceiver {
    /// Serves `listener`, writing into `store`, whose layers are those of `schema`, in order.
    ///
    /// After `shutdown` the task goes on until every reservation has its outcome, then ends.
    pub fn start(
        listener: impl Listen,
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
        let task = tokio::spawn(listen(shared.clone(), listener, shutdown));
        (Self { shared }, task)
    }

    /// Sets blocks aside for one attempt; from now on a sender with the ticket may fill them.
    ///
    /// A reservation that cannot be carried out fails at once, with the reason from [`IncomingHandoff::ready`].
    pub fn reserve(&self, reservation: Reservation) -> IncomingHandoff {
        let shared = &self.shared;
        let Reservation { ticket, request_id, lease, first_block, prompt_tokens, deadline } = reservation;
        let due = blocks_for(prompt_tokens as usize).saturating_sub(first_block as usize);
        if lease.len() != due || due == 0 {
            let limit = format!("the {due} blocks (at least 1) of the prompt behind the held ones");
            let outcome = HandoffError::Plan { field: "lease", limit, value: lease.len().to_string() };
            return IncomingHandoff::failed(outcome);
        }
        let spec = HandoffSpec {
            ticket,
            schema_digest: shared.digest,
            layers: shared.schema.layers.len() as u32,
            first_block,
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
async fn listen(shared: Arc<Shared>, mut listener: impl Listen, shutdown: CancellationToken) {
    let newcomers = Newcomers::new(shared.config.max_connections);
    let connections = TaskTracker::new();
    let mut draining = false;
    loop {
        if draining {
            let mut registry = shared.registry.lock();
            if registry.entries.is_empty() {
                registry.closed = true;
                break;
            }
        }
        let next = shared.entries().iter().filter_map(|e| e.next_tick()).min();
        tokio::select! {
            () = shutdown.cancelled(), if !draining => draining = true,
            () = shared.changed.notified() => {}
            () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                for entry in shared.entries() {
                    if entry.next_tick().is_some_and(|at| at <= Instant::now()) {
                        entry.on_event(ReceiverEvent::Tick);
                    }
                }
            }
            accepted = listener.accept() => match accepted {
                Ok((opening, peer)) => admit(&shared, &newcomers, &connections, opening, peer),
                Err(error) => {
                    // Out of file descriptors, most likely: taking the next one at once would spin.
                    tracing::warn!(%error, "accepting a kv connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
        }
    }
    connections.close();
    connections.wait().await;
}

fn admit(all: &Arc<Shared>, newcomers: &Arc<Newcomers>, tasks: &TaskTracker, opening: Opening, peer: SocketAddr) {
    let Some(place) = newcomers.enter() else {
        tracing::warn!(%peer, limit = all.config.max_connections, "refusing a kv connection: too many");
        let answer = frame::encode_answer(frame::Answer::Refuse(RefuseReason::Busy));
        // Straight to the socket, which is empty and does not block: whoever is refused gets no task, and no handshake.
        if let Some(Ok(stream)) = opening.now_or_never() {
            let _ = stream.write_at_once(&answer);
        }
        return;
    };
    let shared = all.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = place.taken() => tracing::debug!(%peer, "another kv connection takes the place of a silent one"),
            () = connection::serve(&shared, opening, peer, &place) => {}
        }
    });
}
