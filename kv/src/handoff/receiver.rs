//! State machine of the receiver, on the decode node.

use std::time::Duration;

use super::{Commit, Coverage, Failure, HandoffSpec, HandoffState, Hello, Piece, RefuseReason, WriteMode};

/// Input of the receiver's state machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiverEvent {
    /// A connection presents a ticket. Its pieces will come in this mode.
    Hello(Hello, WriteMode),
    /// The writer's connection announces blocks. Their bytes follow, or are written one-sided.
    Layer(Piece),
    /// All bytes of the announced blocks were read, or have arrived one-sided.
    Landed {
        /// Whether their checksum is right.
        checksum_ok: bool,
    },
    /// The writer is alive but has nothing to send yet.
    Ping,
    /// The writer has sent everything.
    Commit(Commit),
    /// The writer's connection delivered bytes that are not a valid frame, or a frame that is too long.
    Garbage,
    /// Writing to the KV memory failed.
    StoreFailed,
    /// The writer's connection ended.
    Lost,
    /// The task that writes to the blocks has ended, and the sender's access is revoked. No write is pending.
    WriterStopped,
    /// The owner cancels the request.
    Cancel,
    /// The owner has started to decode.
    DecodeStarted,
    /// The owner has finished decoding.
    Finished,
    /// A time limit may have been reached; see [`ReceiverHandoff::next_tick`].
    Tick,
}

/// Output of the receiver's state machine. The driver carries out actions in the order returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiverAction {
    /// Accept the connection that sent this `Hello` as the writer.
    Accept,
    /// Read the announced blocks into KV memory; without this action, nothing may be read into it. One-sided: wait
    /// until they have arrived.
    Write(Piece),
    /// Send the reason to the connection that sent this `Hello`, and close it.
    Refuse(RefuseReason),
    /// Tell the writer that all KV has arrived and is verified.
    Confirm,
    /// Tell the owner that it may decode. Returned at most once, and never if `Fail` is.
    Ready {
        /// First output token, chosen by the full model.
        first_token: u32,
    },
    /// Tell the owner that the attempt failed. Returned at most once.
    Fail(Failure),
    /// Stop the writer's task and revoke the sender's access, then report [`ReceiverEvent::WriterStopped`].
    StopWriter {
        /// Reason to send to the sender first, if the connection is still open.
        tell: Option<RefuseReason>,
    },
    /// Release the blocks: no task can write to them any more. Returned exactly once.
    ReleaseBlocks,
}

/// The receiver of one attempt, on the decode node. See the [module](super) for its invariants.
#[derive(Debug)]
pub struct ReceiverHandoff {
    spec: HandoffSpec,
    state: HandoffState,
    arrived: Coverage,
    /// The announced piece whose bytes are being read.
    landing: Option<Piece>,
    frames: u64,
    bytes: u64,
    /// Whether a task may be writing to the blocks.
    writer: bool,
    /// Whether `ReleaseBlocks` was returned.
    released: bool,
    mode: WriteMode,
    /// The first token of a commit that is valid, while the sender's one-sided access is being revoked.
    committed: Option<u32>,
    last_heard: Duration,
}

impl ReceiverHandoff {
    /// An attempt in state `Reserved`.
    pub fn new(spec: HandoffSpec) -> Self {
        let arrived = Coverage::new(&spec);
        Self {
            spec,
            state: HandoffState::Reserved,
            arrived,
            landing: None,
            frames: 0,
            bytes: 0,
            writer: false,
            released: false,
            mode: WriteMode::Framed,
            committed: None,
            last_heard: Duration::ZERO,
        }
    }

    /// Current state.
    pub fn state(&self) -> HandoffState {
        self.state
    }

    /// Parameters of the attempt.
    pub fn spec(&self) -> &HandoffSpec {
        &self.spec
    }

    /// Bytes of KV received and verified so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the attempt is over but its blocks are kept until the writer has stopped (KV-1).
    pub fn is_stranded(&self) -> bool {
        self.state.is_over() && !self.released
    }

    /// When the next `Tick` is due. `None` if no time limit applies.
    pub fn next_tick(&self) -> Option<Duration> {
        match self.state {
            HandoffState::Reserved => Some(self.spec.deadline),
            HandoffState::Prefilling | HandoffState::Transferring => {
                Some(self.spec.deadline.min(self.last_heard + self.spec.idle_timeout))
            }
            _ => None,
        }
    }

    /// Handles an event at time `now` and returns the actions to carry out.
    pub fn on_event(&mut self, event: ReceiverEvent, now: Duration) -> Vec<ReceiverAction> {
        let mut actions = Vec::new();
        // Time limits are checked first, so an attempt past its deadline accepts no event.
        self.check_time(now, &mut actions);
        match event {
            ReceiverEvent::Hello(hello, mode) => self.hello(&hello, mode, now, &mut actions),
            ReceiverEvent::Layer(piece) => self.layer(piece, now, &mut actions),
            ReceiverEvent::Landed { checksum_ok } => self.landed(checksum_ok, now, &mut actions),
            ReceiverEvent::Ping if self.writer_is_welcome() => self.last_heard = now,
            ReceiverEvent::Commit(commit) => self.commit(&commit, &mut actions),
            ReceiverEvent::Garbage if self.writer_is_welcome() => self.reject(RefuseReason::Protocol, &mut actions),
            ReceiverEvent::StoreFailed if self.writer_is_welcome() => self.reject(RefuseReason::Store, &mut actions),
            ReceiverEvent::Lost if self.writer_is_welcome() => self.fail(Failure::Lost, None, &mut actions),
            ReceiverEvent::WriterStopped if self.writer => {
                self.writer = false;
                self.landing = None;
                match self.committed.take() {
                    _ if !self.state.is_open() => {}
                    Some(first_token) => self.ready(first_token, &mut actions),
                    None => self.fail(Failure::Lost, None, &mut actions),
                }
            }
            ReceiverEvent::Cancel if !self.state.is_over() => {
                let told = !self.state.is_open();
                self.state = HandoffState::Cancelled;
                if !told {
                    actions.push(ReceiverAction::Fail(Failure::Cancelled));
                }
                if self.writer {
                    actions.push(ReceiverAction::StopWriter { tell: Some(RefuseReason::Cancelled) });
                }
            }
            ReceiverEvent::DecodeStarted if self.state == HandoffState::Ready => self.state = HandoffState::Decoding,
            ReceiverEvent::Finished if matches!(self.state, HandoffState::Ready | HandoffState::Decoding) => {
                self.state = HandoffState::Done;
            }
            // An event that has no meaning in this state changes nothing.
            _ => {}
        }
        // KV-1: release only when no sender may connect any more and no writer is left.
        if !self.released && !self.writer && !self.state.is_open() {
            self.released = true;
            actions.push(ReceiverAction::ReleaseBlocks);
        }
        actions
    }

    fn writer_is_welcome(&self) -> bool {
        self.writer && self.state.is_open() && self.committed.is_none()
    }

    fn check_time(&mut self, now: Duration, actions: &mut Vec<ReceiverAction>) {
        if self.next_tick().is_none_or(|at| now < at) {
            return;
        }
        let failure = if now >= self.spec.deadline { Failure::Deadline } else { Failure::Idle };
        self.fail(failure, Some(RefuseReason::Deadline), actions);
    }

    fn hello(&mut self, hello: &Hello, mode: WriteMode, now: Duration, actions: &mut Vec<ReceiverAction>) {
        // KV-4: a ticket opens one attempt, once. A second connection with it is refused and does not affect the first.
        if self.state != HandoffState::Reserved || hello.ticket != self.spec.ticket {
            actions.push(ReceiverAction::Refuse(RefuseReason::Ticket));
            return;
        }
        let refused = if hello.schema_digest != self.spec.schema_digest {
            Some(RefuseReason::Schema)
        } else if (hello.held_blocks, hello.prompt_tokens) != (self.spec.held_blocks, self.spec.prompt_tokens) {
            Some(RefuseReason::Range)
        } else {
            None
        };
        match refused {
            // The sender with the right ticket has wrong parameters. A retry would fail the same way.
            Some(reason) => {
                actions.push(ReceiverAction::Refuse(reason));
                self.fail(Failure::Rejected(reason), None, actions);
            }
            None => {
                self.state = HandoffState::Prefilling;
                self.writer = true;
                self.mode = mode;
                self.last_heard = now;
                actions.push(ReceiverAction::Accept);
            }
        }
    }

    fn layer(&mut self, piece: Piece, now: Duration, actions: &mut Vec<ReceiverAction>) {
        if !self.writer_is_welcome() {
            return;
        }
        if self.landing.is_some() || !self.arrived.admits(&piece) {
            self.reject(RefuseReason::Protocol, actions);
            return;
        }
        self.landing = Some(piece);
        self.state = HandoffState::Transferring;
        self.last_heard = now;
        actions.push(ReceiverAction::Write(piece));
    }

    fn landed(&mut self, checksum_ok: bool, now: Duration, actions: &mut Vec<ReceiverAction>) {
        let Some(piece) = self.landing.take() else { return };
        if !self.writer_is_welcome() {
            return;
        }
        if !checksum_ok {
            self.reject(RefuseReason::Checksum, actions);
            return;
        }
        self.arrived.insert(&piece);
        self.frames += 1;
        self.bytes += u64::from(piece.blocks) * self.spec.block_bytes as u64;
        self.last_heard = now;
    }

    fn commit(&mut self, commit: &Commit, actions: &mut Vec<ReceiverAction>) {
        if !self.writer_is_welcome() {
            return;
        }
        // KV-5: every block that is due is verified, and the counts of both sides are equal.
        let agreed = commit.frames == self.frames && commit.bytes == self.bytes;
        if self.landing.is_some() || !agreed || !self.arrived.complete() {
            self.reject(RefuseReason::Incomplete, actions);
            return;
        }
        // KV-5: a sender with one-sided access could still change what was verified. It loses the access first.
        match self.mode {
            WriteMode::Framed => self.ready(commit.first_token, actions),
            WriteMode::OneSided => self.committed = Some(commit.first_token),
        }
        actions.push(ReceiverAction::StopWriter { tell: None });
    }

    fn ready(&mut self, first_token: u32, actions: &mut Vec<ReceiverAction>) {
        self.state = HandoffState::Ready;
        actions.push(ReceiverAction::Confirm);
        actions.push(ReceiverAction::Ready { first_token });
    }

    fn reject(&mut self, reason: RefuseReason, actions: &mut Vec<ReceiverAction>) {
        self.fail(Failure::Rejected(reason), Some(reason), actions);
    }

    fn fail(&mut self, failure: Failure, tell: Option<RefuseReason>, actions: &mut Vec<ReceiverAction>) {
        self.state = HandoffState::Failed;
        actions.push(ReceiverAction::Fail(failure));
        if self.writer {
            actions.push(ReceiverAction::StopWriter { tell });
        }
    }
}
