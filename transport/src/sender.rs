//! The prefill side: one task per handoff, which sends what is announced to it.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use overfill_kv::handoff::{Failure, HandoffSpec, Piece, SenderAction, SenderEvent, SenderHandoff};
use overfill_kv::{BlockId, BlockLease, KvSchema, KvStore, RequestId, Ticket, TransferStats, blocks_for};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::frame::{self, ANSWER_BYTES, Answer, Header};
use crate::link::{Dialer, Link};
use crate::payload::{MoveError, Outgoing};
use crate::{HandoffError, TransferConfig};

/// What is to be sent, and where.
#[derive(Debug)]
pub struct SendPlan {
    /// `host:port` of the receiver.
    pub endpoint: String,
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
    /// Blocks before this one are not sent: the receiver holds them.
    pub first_block: u32,
    /// Length of the whole prompt.
    pub prompt_tokens: u32,
    /// Most calls of [`KvLayers::ready`] that will come: chunks times layers.
    pub max_pieces: usize,
    /// By then the receiver has confirmed, or the handoff has failed.
    pub deadline: Instant,
}

impl SendPlan {
    fn check(&self, store: &dyn KvStore) -> Result<(), HandoffError> {
        let wrong = |field, limit: String, value: String| Err(HandoffError::Plan { field, limit, value });
        let blocks = blocks_for(self.prompt_tokens as usize);
        if self.blocks.len() != blocks {
            return wrong("blocks", format!("the {blocks} of the prompt"), self.blocks.len().to_string());
        }
        if self.first_block as usize >= blocks {
            return wrong("first_block", format!("below the prompt's {blocks} blocks"), self.first_block.to_string());
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

enum Command {
    LayerReady(Piece),
    Commit(u32),
}

struct Control {
    aborted: CancellationToken,
    /// More was announced than planned.
    overflow: AtomicBool,
    committed: AtomicBool,
    committed_at: Mutex<Option<Instant>>,
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
    first_block: u32,
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
            first_block: plan.first_block,
            request_id: plan.request_id.clone(),
        };
        let task = tokio::spawn(async move {
            plan.check(&*store)?;
            Shell::new(plan, store, config, queue, control).run().await
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
        let first_block = blocks.start.max(self.first_block);
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

/// Drives the state machine: brings it events, does what it says.
struct Shell {
    machine: SenderHandoff,
    actions: VecDeque<SenderAction>,
    epoch: Instant,
    endpoint: String,
    request_id: RequestId,
    blocks: Vec<BlockId>,
    /// Layer of the local store of each layer on the wire.
    layers: Vec<u32>,
    lease: Option<Arc<BlockLease>>,
    store: Arc<dyn KvStore>,
    queue: mpsc::Receiver<Command>,
    control: Arc<Control>,
    dialer: Dialer,
    answer: AnswerReader,
    outcome: Option<Result<(), Failure>>,
    connection_error: Option<io::Error>,
    first_frame: Option<Instant>,
}

/// An answer of which perhaps only a part has arrived.
#[derive(Default)]
struct AnswerReader {
    bytes: [u8; ANSWER_BYTES],
    have: usize,
}

impl AnswerReader {
    /// The next answer. May be dropped at any wait without losing bytes.
    async fn next(&mut self, stream: &Link) -> io::Result<Answer> {
        loop {
            match stream.try_read(&mut self.bytes[self.have..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.have += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
                Err(e) => return Err(e),
            }
            if self.have == ANSWER_BYTES {
                self.have = 0;
                return frame::decode_answer(&self.bytes).ok_or_else(|| io::ErrorKind::InvalidData.into());
            }
        }
    }
}

impl Shell {
    fn new(
        plan: SendPlan,
        store: Arc<dyn KvStore>,
        config: TransferConfig,
        queue: mpsc::Receiver<Command>,
        control: Arc<Control>,
    ) -> Self {
        let SendPlan {
            endpoint,
            ticket,
            request_id,
            schema,
            blocks,
            lease,
            first_block,
            prompt_tokens,
            max_pieces: _,
            deadline,
        } = plan;
        let epoch = Instant::now();
        let block_bytes = store.block_bytes();
        let spec = HandoffSpec {
            ticket,
            schema_digest: schema.digest(),
            layers: schema.layers.len() as u32,
            first_block,
            blocks: blocks.len() as u32 - first_block,
            block_bytes,
            prompt_tokens,
            deadline: deadline.saturating_duration_since(epoch),
            idle_timeout: config.idle_timeout,
        };
        let frame_blocks = (config.frame_limit(block_bytes) / block_bytes.max(1)) as u32;
        Self {
            machine: SenderHandoff::new(spec, frame_blocks, Duration::ZERO),
            actions: VecDeque::new(),
            epoch,
            endpoint,
            request_id,
            blocks,
            layers: schema.layers,
            lease: Some(lease),
            store,
            queue,
            control,
            dialer: config.dialer,
            answer: AnswerReader::default(),
            outcome: None,
            connection_error: None,
            first_frame: None,
        }
    }

    fn on_event(&mut self, event: SenderEvent) {
        self.actions.extend(self.machine.on_event(event, self.epoch.elapsed()));
    }

    fn on_error(&mut self, error: io::Error) {
        self.connection_error.get_or_insert(error);
        self.on_event(SenderEvent::Lost);
    }

    fn on_answer(&mut self, answer: Answer) {
        self.on_event(match answer {
            Answer::Accept => SenderEvent::Accepted,
            Answer::Refuse(reason) => SenderEvent::Refused(reason),
            Answer::Confirm => SenderEvent::Confirmed,
        });
    }

    async fn run(mut self) -> Result<TransferStats, HandoffError> {
        let stream = self.connect().await;
        match &stream {
            Some(stream) => self.serve(stream).await,
            None => self.abandon(),
        }
        drop(stream);
        self.report()
    }

    /// The connection; `None` if the attempt is over before it stands.
    async fn connect(&mut self) -> Option<Link> {
        let endpoint = self.endpoint.clone();
        let mut connecting = self.dialer.dial(endpoint);
        while !self.machine.state().is_over() {
            let due = self.due();
            tokio::select! {
                biased;
                () = self.control.aborted.cancelled() => self.on_event(SenderEvent::Abort),
                stream = &mut connecting => match stream {
                    Ok(stream) => {
                        self.on_event(SenderEvent::Connected);
                        return Some(stream);
                    }
                    Err(error) => self.on_error(error),
                },
                () = tokio::time::sleep_until(due) => self.on_event(SenderEvent::Tick),
            }
        }
        None
    }

    /// Does what is left to do when nothing can be sent.
    fn abandon(&mut self) {
        while let Some(action) = self.actions.pop_front() {
            match action {
                SenderAction::Finish(outcome) => self.outcome = Some(outcome),
                SenderAction::Disconnect => self.on_event(SenderEvent::Stopped),
                SenderAction::ReleaseBlocks => self.lease = None,
                _ => {}
            }
        }
    }

    async fn serve(&mut self, stream: &Link) {
        let mut out = Outgoing::new(stream);
        loop {
            while let Some(action) = self.actions.pop_front() {
                match action {
                    SenderAction::SendHello(hello) => out.push(&frame::encode_hello(&hello)),
                    SenderAction::SendPing => out.push(&frame::encode_ping()),
                    SenderAction::SendCommit(commit) => {
                        let waited = self.control.committed_at.lock().map_or(0, |at| at.elapsed().as_micros() as u64);
                        out.push(&frame::encode_commit(&commit, waited));
                    }
                    SenderAction::SendLayer(piece) => {
                        self.first_frame.get_or_insert_with(Instant::now);
                        if self.send_layer(stream, &mut out, piece).await {
                            self.on_event(SenderEvent::Sent);
                        }
                        // Frames may leave faster than the network is busy; other tasks want this thread, too.
                        tokio::task::yield_now().await;
                    }
                    SenderAction::Finish(outcome) => self.outcome = Some(outcome),
                    // This task is the only reader of the blocks, and reads none here.
                    SenderAction::Disconnect => self.on_event(SenderEvent::Stopped),
                    SenderAction::ReleaseBlocks => self.lease = None,
                }
            }
            if self.machine.state().is_over() {
                return;
            }
            self.wait(stream, &mut out).await;
        }
    }

    /// Sends one frame; false if the attempt was over before it had left.
    async fn send_layer(&mut self, stream: &Link, out: &mut Outgoing<'_>, piece: Piece) -> bool {
        let store = self.store.clone();
        let from = piece.first_block as usize;
        let ids = self.blocks[from..from + piece.blocks as usize].to_vec();
        let layer = self.layers[piece.layer as usize] as usize;
        let length = (ids.len() * store.block_bytes()) as u32;
        let header = frame::encode_header(&Header::Layer(piece, length));
        let mut sending = std::pin::pin!(out.frame(&header, &*store, layer, &ids));
        while !self.machine.state().is_over() {
            let due = self.due();
            tokio::select! {
                biased;
                () = self.control.aborted.cancelled() => self.on_event(SenderEvent::Abort),
                answer = self.answer.next(stream) => match answer {
                    Ok(answer) => self.on_answer(answer),
                    Err(error) => self.on_error(error),
                },
                sent = &mut sending => match sent {
                    Ok(()) => return true,
                    Err(MoveError::Io(error)) => self.on_write_error(stream, error),
                    Err(MoveError::Store(error)) => {
                        tracing::error!(request = %self.request_id, %error, "reading kv to send");
                        self.on_error(io::Error::other(error));
                    }
                },
                () = tokio::time::sleep_until(due) => self.on_event(SenderEvent::Tick),
            }
        }
        false
    }

    /// Sends what was kept back and waits for the next event.
    async fn wait(&mut self, stream: &Link, out: &mut Outgoing<'_>) {
        let due = self.due();
        tokio::select! {
            biased;
            () = self.control.aborted.cancelled() => self.on_event(SenderEvent::Abort),
            answer = self.answer.next(stream) => match answer {
                Ok(answer) => self.on_answer(answer),
                Err(error) => self.on_error(error),
            },
            Some(command) = self.queue.recv() => match command {
                Command::LayerReady(piece) => self.on_event(SenderEvent::LayerReady(piece)),
                Command::Commit(first_token) => self.on_event(SenderEvent::Commit { first_token }),
            },
            Err(error) = out.flush_then_pend() => self.on_write_error(stream, error),
            () = tokio::time::sleep_until(due) => self.on_event(SenderEvent::Tick),
        }
    }

    /// A receiver that ends an attempt says why before it closes: that counts, not the broken pipe that follows.
    fn on_write_error(&mut self, stream: &Link, error: io::Error) {
        let mut bytes = [0; ANSWER_BYTES];
        let last_word = match (self.answer.have, stream.try_read(&mut bytes)) {
            (0, Ok(ANSWER_BYTES)) => frame::decode_answer(&bytes),
            _ => None,
        };
        match last_word {
            Some(answer) => self.on_answer(answer),
            None => self.on_error(error),
        }
    }

    fn due(&self) -> Instant {
        self.machine.next_tick().map_or_else(Instant::now, |at| self.epoch + at)
    }

    fn report(self) -> Result<TransferStats, HandoffError> {
        match self.outcome {
            Some(Ok(())) => {
                let seconds = self.first_frame.map_or(0.0, |at| at.elapsed().as_secs_f64());
                let exposed = self.control.committed_at.lock().map_or(0.0, |at| at.elapsed().as_secs_f64());
                let bytes = self.machine.bytes();
                Ok(TransferStats { bytes, seconds, exposed_seconds: exposed.min(seconds) })
            }
            Some(Err(Failure::Cancelled)) if self.control.overflow.load(Ordering::Acquire) => {
                Err(Failure::Plan("more pieces announced than planned").into())
            }
            Some(Err(Failure::Lost)) => Err(match self.connection_error {
                Some(e) => HandoffError::Connection { endpoint: self.endpoint, message: e.to_string() },
                None => Failure::Lost.into(),
            }),
            Some(Err(failure)) => Err(failure.into()),
            None => Err(Failure::Lost.into()),
        }
    }
}
