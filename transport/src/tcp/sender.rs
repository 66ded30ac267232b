//! The task that sends one handoff over its own connection.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use overfill_kv::handoff::{Failure, HandoffSpec, Piece, SenderAction, SenderEvent, SenderHandoff, TRACE_TARGET};
use overfill_kv::{BlockId, BlockLease, KvStore, RequestId, TransferStats};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::frame::{self, ANSWER_BYTES, Answer, Header};
use super::link::{Dialer, Link};
use super::payload::{MoveError, Outgoing};
use crate::sender::{Command, Control};
use crate::{HandoffError, SendPlan, TransferConfig};

/// Sends the blocks announced in `queue` to `address` until the handoff has its outcome.
pub(crate) async fn send(
    address: String,
    plan: SendPlan,
    store: Arc<dyn KvStore>,
    config: TransferConfig,
    queue: mpsc::Receiver<Command>,
    control: Arc<Control>,
) -> Result<TransferStats, HandoffError> {
    Shell::new(address, plan, store, config, queue, control).run().await
}

/// Drives the state machine: passes it events and carries out its actions.
struct Shell {
    machine: SenderHandoff,
    actions: VecDeque<SenderAction>,
    epoch: Instant,
    address: String,
    request_id: RequestId,
    blocks: Vec<BlockId>,
    /// Layer index in the local store, by layer number on the wire.
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

/// Reads answers, keeping a partly received one across calls.
#[derive(Default)]
struct AnswerReader {
    bytes: [u8; ANSWER_BYTES],
    have: usize,
}

impl AnswerReader {
    /// Reads the next answer. Cancel safe: dropping the future loses no bytes.
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
        address: String,
        plan: SendPlan,
        store: Arc<dyn KvStore>,
        config: TransferConfig,
        queue: mpsc::Receiver<Command>,
        control: Arc<Control>,
    ) -> Self {
        let SendPlan {
            endpoint: _,
            ticket,
            request_id,
            schema,
            blocks,
            lease,
            held_blocks,
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
            held_blocks,
            blocks: blocks.len() as u32 - held_blocks,
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
            address,
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

    /// Opens the connection. `None` if the attempt ended before it was open.
    async fn connect(&mut self) -> Option<Link> {
        let endpoint = self.address.clone();
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

    /// Carries out the remaining actions when there is no connection.
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
                            let Piece { layer, first_block, blocks } = piece;
                            tracing::debug!(target: TRACE_TARGET, layer, first_block, blocks, "layer sent");
                            self.on_event(SenderEvent::Sent);
                        }
                        // If the socket never blocks, no await above is ever pending. Let other tasks run.
                        tokio::task::yield_now().await;
                    }
                    SenderAction::Finish(outcome) => self.outcome = Some(outcome),
                    // This task is the only reader of the blocks, and no read is in progress here.
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

    /// Sends one layer frame. False if the attempt ended before the frame was sent.
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
                        tracing::error!(request = %self.request_id, %error, "failed to read kv to send");
                        self.on_error(io::Error::other(error));
                    }
                },
                () = tokio::time::sleep_until(due) => self.on_event(SenderEvent::Tick),
            }
        }
        false
    }

    /// Sends buffered bytes and waits for the next event.
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

    /// Handles a write error. A receiver that ends an attempt sends the reason before it closes the connection. That
    /// reason counts, not the broken pipe.
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
                Err(Failure::Plan("more pieces were announced than planned").into())
            }
            Some(Err(Failure::Lost)) => Err(match self.connection_error {
                Some(e) => HandoffError::Connection { endpoint: self.address, message: e.to_string() },
                None => Failure::Lost.into(),
            }),
            Some(Err(failure)) => Err(failure.into()),
            None => Err(Failure::Lost.into()),
        }
    }
}
