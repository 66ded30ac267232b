//! The task that sends one handoff over its own connection.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use overfill_kv::handoff::{
    Failure, HandoffSpec, Hello, Piece, RefuseReason, SenderAction, SenderEvent, SenderHandoff, SenderState,
    TRACE_TARGET,
};
use overfill_kv::{BlockId, BlockLease, KvStore, KvTransport, ProtocolVersions, RequestId, TransferStats};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use super::answers::{AnswerReader, Reply};
use super::format::Format;
use super::frame::{self, ANSWER_BYTES, Answer};
use super::hello::{self, Grant, Way};
use super::link::{Dialer, Link};
use super::mover::{Blocks, Local, Mover, broken};
use super::payload::{MoveError, Outgoing};
use crate::nccl;
use crate::rdma;
use crate::sender::{Command, Control};
use crate::{HandoffError, SendPlan, TransferConfig, Transports};

/// Sends the blocks announced in `queue` until the handoff has its outcome.
pub(crate) async fn send(
    plan: SendPlan,
    store: Arc<dyn KvStore>,
    config: TransferConfig,
    queue: mpsc::Receiver<Command>,
    control: Arc<Control>,
) -> Result<TransferStats, HandoffError> {
    let (endpoint, theirs) = (plan.endpoint.address.clone(), plan.endpoint.versions);
    let usable = config.transports.usable();
    let ours = plan.schema.protocol();
    let Ok(version) = ours.common(theirs) else {
        return Err(HandoffError::Versions { ours, theirs, endpoint });
    };
    if version == 1 && !usable.contains(KvTransport::Tcp) {
        let problem = "it speaks version 1 of the wire format, which has only tcp".to_owned();
        return Err(HandoffError::Transport { transports: usable.to_string(), endpoint, problem });
    }
    let local = Local::prepare(version, &plan, &config).await?;
    Shell::new(version, local, plan, store, config, queue, control).run().await
}

/// Drives the state machine: passes it events and carries out its actions.
struct Shell {
    // Declared first: what reads the blocks ends before their lease.
    mover: Mover,
    local: Local,
    format: Format,
    transports: Arc<Transports>,
    /// Maximum blocks per piece.
    piece_blocks: u32,
    /// Free slots of the receiver's staging area, if it has one.
    credits: Option<Arc<Semaphore>>,
    /// The same as in `mover`, also while a piece is being announced.
    sending: Option<Arc<nccl::Sending>>,
    /// Versions that this node speaks.
    versions: ProtocolVersions,
    peer_versions: Option<ProtocolVersions>,
    /// The transport that was chosen.
    transport: KvTransport,
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

impl Shell {
    fn new(
        version: u32,
        local: Local,
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
            due: schema.due_blocks(held_blocks, prompt_tokens),
            held_blocks,
            blocks: blocks.len() as u32 - held_blocks,
            block_bytes,
            prompt_tokens,
            deadline: deadline.saturating_duration_since(epoch),
            idle_timeout: config.idle_timeout,
        };
        let mut piece_blocks = (config.frame_limit(block_bytes) / block_bytes.max(1)) as u32;
        piece_blocks = piece_blocks.min(local.max_piece_blocks().unwrap_or(u32::MAX));
        let answer = AnswerReader::new(hello::max_grant_bytes(schema.layers.len(), spec.blocks as usize));
        Self {
            mover: Mover::Framed,
            local,
            format: Format::new(version, schema.kv_heads),
            transports: config.transports,
            piece_blocks,
            credits: None,
            sending: None,
            versions: schema.protocol(),
            peer_versions: None,
            transport: KvTransport::Tcp,
            machine: SenderHandoff::new(spec, piece_blocks, Duration::ZERO),
            actions: VecDeque::new(),
            epoch,
            address: endpoint.address,
            request_id,
            blocks,
            layers: schema.layers,
            lease: Some(lease),
            store,
            queue,
            control,
            dialer: config.dialer,
            answer,
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

    fn on_reply(&mut self, reply: io::Result<Reply>) {
        let event = match reply {
            Ok(Reply::Answer(Answer::Accept)) if self.format.version() == 1 => SenderEvent::Accepted,
            Ok(Reply::Answer(Answer::Refuse(reason))) => SenderEvent::Refused(reason),
            Ok(Reply::Answer(Answer::RefuseVersion(versions))) => {
                self.peer_versions = Some(versions);
                SenderEvent::Refused(RefuseReason::Version)
            }
            Ok(Reply::Answer(Answer::Confirm)) => SenderEvent::Confirmed,
            Ok(Reply::Answer(Answer::Taken)) if self.credits.is_some() => {
                self.credits.iter().for_each(|credits| credits.add_permits(1));
                return;
            }
            Ok(Reply::Answer(Answer::Posted(number))) if self.sending.is_some() => {
                if let Some(Err(error)) = self.sending.as_ref().map(|sending| sending.posted(number)) {
                    self.on_error(io::Error::other(error));
                }
                return;
            }
            // Not expected in this version or state.
            Ok(_) => return self.on_error(io::ErrorKind::InvalidData.into()),
            Err(error) => return self.on_error(error),
        };
        self.on_event(event);
    }

    /// Takes up what the receiver has chosen.
    async fn on_grant(&mut self, grant: Grant) {
        let local = self.local.queue.take();
        let Grant { version, way } = grant;
        let transport = way.transport();
        if version != self.format.version() || !self.transports.usable().contains(transport) {
            return self
                .on_error(io::Error::new(io::ErrorKind::InvalidData, "the receiver chose what was not offered"));
        }
        match (way, local) {
            (Way::Rdma(grant), Some(local)) => {
                let spec = self.machine.spec();
                let size = (spec.due.len(), spec.blocks as usize);
                let piece_bytes = self.piece_blocks as usize * spec.block_bytes;
                match rdma::Writer::new(local, grant, size, piece_bytes).await {
                    Ok(writer) => {
                        self.credits = writer.credits();
                        self.mover = Mover::Rdma(Box::new(writer));
                    }
                    Err(error) => return self.on_error(io::Error::other(error)),
                }
            }
            (Way::Tcp, unused) => {
                if let Some(unused) = unused {
                    unused.end().await;
                }
            }
            (Way::Nccl(id), None) => {
                let (Some(agent), Some(lease)) = (self.transports.nccl(), &self.lease) else {
                    return self.on_error(io::ErrorKind::InvalidData.into());
                };
                match agent.sending(&self.address, id, lease.clone()).await {
                    Ok(sending) => {
                        self.mover = Mover::Nccl(sending.clone(), 0);
                        self.sending = Some(sending);
                    }
                    Err(error) => return self.on_error(io::Error::other(error)),
                }
            }
            _ => return self.on_error(io::ErrorKind::InvalidData.into()),
        }
        tracing::debug!(target: TRACE_TARGET, %transport, version, "handoff accepted");
        self.transport = transport;
        self.on_event(SenderEvent::Accepted);
    }

    /// The first message.
    fn hello(&self, hello: &Hello) -> Vec<u8> {
        self.local.hello(self.format.version(), self.versions, hello, self.transports.usable())
    }

    /// Ends what reads the blocks (KV-2).
    async fn stop_reading(&mut self, stream: &Link) {
        self.sending = None;
        std::mem::take(&mut self.mover).stop(stream, &mut self.answer).await;
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
        let mut out = Outgoing::new(stream, self.format.sums());
        loop {
            while let Some(action) = self.actions.pop_front() {
                match action {
                    SenderAction::SendHello(hello) => out.push(&self.hello(&hello)),
                    SenderAction::SendPing => out.push(&self.format.ping()),
                    SenderAction::SendCommit(commit) => {
                        let waited = self.control.committed_at.lock().map_or(0, |at| at.elapsed().as_micros() as u64);
                        out.push(&self.format.commit(&commit, waited));
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
                    // This task and what it has started, a queue pair or sends, are the only readers of the blocks.
                    SenderAction::Disconnect => {
                        self.stop_reading(stream).await;
                        self.on_event(SenderEvent::Stopped);
                    }
                    SenderAction::ReleaseBlocks => self.lease = None,
                }
            }
            if self.machine.state().is_over() {
                return;
            }
            self.wait(stream, &mut out).await;
        }
    }

    /// Sends one piece. False if the attempt ended before it was sent.
    async fn send_layer(&mut self, stream: &Link, out: &mut Outgoing<'_>, piece: Piece) -> bool {
        let store = self.store.clone();
        let from = piece.first_block as usize;
        let ids = self.blocks[from..from + piece.blocks as usize].to_vec();
        let layer = self.layers[piece.layer as usize] as usize;
        let first = (piece.first_block - self.machine.spec().held_blocks) as usize;
        let mut mover = std::mem::take(&mut self.mover);
        let sent = {
            let blocks = Blocks { piece, first, store: &*store, layer, ids: &ids };
            let mut sending = std::pin::pin!(mover.send(blocks, self.format, out));
            self.drive(stream, &mut sending).await
        };
        self.mover = mover;
        sent
    }

    /// Handles events until `sending` is done or the attempt is over. True if it is done.
    async fn drive(
        &mut self,
        stream: &Link,
        mut sending: &mut (impl Future<Output = Result<(), MoveError>> + Unpin),
    ) -> bool {
        while !self.machine.state().is_over() {
            let due = self.due();
            tokio::select! {
                biased;
                () = self.control.aborted.cancelled() => self.on_event(SenderEvent::Abort),
                reply = self.answer.next(stream) => self.on_reply(reply),
                sent = &mut sending => match sent {
                    Ok(()) => return true,
                    Err(MoveError::Io(error)) => self.on_write_error(stream, error),
                    Err(MoveError::Store(error)) => {
                        tracing::error!(request = %self.request_id, %error, "failed to read kv to send");
                        self.on_error(io::Error::other(error));
                    }
                    Err(MoveError::Rdma(error)) => self.on_write_error(stream, io::Error::other(error)),
                    Err(MoveError::Nccl(error)) => self.on_write_error(stream, io::Error::other(error)),
                },
                error = broken(self.sending.clone()) => self.on_write_error(stream, error),
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
            reply = self.answer.next(stream) => match reply {
                Ok(Reply::Grant(grant)) if self.format.version() > 1 && self.machine.state() == SenderState::Greeting => {
                    self.on_grant(grant).await;
                }
                other => self.on_reply(other),
            },
            Some(command) = self.queue.recv() => match command {
                Command::LayerReady(piece) => self.on_event(SenderEvent::LayerReady(piece)),
                Command::Commit(first_token) => self.on_event(SenderEvent::Commit { first_token }),
            },
            Err(error) = out.flush_then_pend() => self.on_write_error(stream, error),
            error = broken(self.sending.clone()) => self.on_write_error(stream, error),
            () = tokio::time::sleep_until(due) => self.on_event(SenderEvent::Tick),
        }
    }

    /// Handles a write error. A receiver that ends an attempt sends the reason before it closes the connection. That
    /// reason counts, not the broken pipe.
    fn on_write_error(&mut self, stream: &Link, error: io::Error) {
        let mut bytes = [0; ANSWER_BYTES];
        let last_word = match (self.answer.is_between(), stream.try_read(&mut bytes)) {
            (true, Ok(ANSWER_BYTES)) => frame::decode_answer(&bytes),
            _ => None,
        };
        match last_word {
            Some(answer) => self.on_reply(Ok(Reply::Answer(answer))),
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
                self.transports.count(self.transport);
                Ok(TransferStats { bytes, seconds, exposed_seconds: exposed.min(seconds) })
            }
            Some(Err(Failure::Cancelled)) if self.control.overflow.load(Ordering::Acquire) => {
                Err(Failure::Plan("more pieces were announced than planned").into())
            }
            Some(Err(Failure::Refused(RefuseReason::Version))) if self.peer_versions.is_some() => {
                let theirs = self.peer_versions.unwrap_or(ProtocolVersions::UNSTATED);
                Err(HandoffError::Versions { ours: self.versions, theirs, endpoint: self.address })
            }
            Some(Err(Failure::Refused(RefuseReason::Transport))) => Err(HandoffError::Transport {
                transports: self.transports.usable().to_string(),
                endpoint: self.address,
                problem: RefuseReason::Transport.to_string(),
            }),
            Some(Err(Failure::Lost)) => Err(match self.connection_error {
                Some(e) => HandoffError::Connection { endpoint: self.address, message: e.to_string() },
                None => Failure::Lost.into(),
            }),
            Some(Err(failure)) => Err(failure.into()),
            None => Err(Failure::Lost.into()),
        }
    }
}
