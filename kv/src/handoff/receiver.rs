//! The decode side of one attempt.

use std::time::Duration;

use super::{Commit, Coverage, Failure, HandoffSpec, HandoffState, Hello, Piece, RefuseReason};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiverEvent {
    /// A connection shows the attempt's ticket.
    Hello(Hello),
    /// The writer's connection announces blocks; their bytes are next on it.
    Layer(Piece),
    /// The bytes of the announced blocks were read to their end.
    Landed {
        /// Whether they are what the sender sent.
        checksum_ok: bool,
    },
    /// The writer is alive, but has nothing to send yet.
    Ping,
    /// The writer says that all was sent.
    Commit(Commit),
    /// The writer's connection brought something that is no frame, or one that is too long.
    Garbage,
    /// The blocks could not be written.
    StoreFailed,
    /// The writer's connection ended.
    Lost,
    /// The task that wrote to the blocks has ended: nothing it began will be written any more.
    WriterStopped,
    /// The owner gives the request up.
    Cancel,
    /// The owner begins to decode.
    DecodeStarted,
    /// The owner is through.
    Finished,
    /// Time has passed.
    Tick,
}

/// What the driver must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiverAction {
    /// Tell the connection of this `Hello` that it is the writer now.
    Accept,
    /// Read the announced blocks into their places. Without this action, nothing may be written.
    Write(Piece),
    /// Tell the connection of this `Hello` why it is not wanted, and close it.
    Refuse(RefuseReason),
    /// Tell the writer that everything is here.
    Confirm,
    /// Tell the owner that it may decode, and from which token. At most once, and never with `Fail`.
    Ready {
        /// The full model's first token.
        first_token: u32,
    },
    /// Tell the owner that nothing will come. At most once.
    Fail(Failure),
    /// Make the writer's task stop, then report `WriterStopped`.
    StopWriter {
        /// What to tell the sender first, if the connection still stands.
        tell: Option<RefuseReason>,
    },
    /// Let go of the blocks: nobody can write to them any more. Exactly once.
    ReleaseBlocks,
}

/// The decode side of one attempt. See the [module](super) for what it promises.
#[derive(Debug)]
pub struct ReceiverHandoff {
    spec: HandoffSpec,
    state: HandoffState,
    arrived: Coverage,
    /// Announced and being read.
    landing: Option<Piece>,
    frames: u64,
    bytes: u64,
    /// A task may be writing to the blocks.
    writer: bool,
    /// The driver was told to let go.
    released: bool,
    last_heard: Duration,
}

impl ReceiverHandoff {
    /// Blocks and ticket are set aside.
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
            last_heard: Duration::ZERO,
        }
    }

    /// Where the attempt is.
    pub fn state(&self) -> HandoffState {
        self.state
    }

    /// What was agreed.
    pub fn spec(&self) -> &HandoffSpec {
        &self.spec
    }

    /// Bytes of verified KV so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The attempt is over for its owner, but its blocks are quarantined until the writer has stopped (KV-1).
    pub fn is_stranded(&self) -> bool {
        self.state.is_over() && !self.released
    }

    /// When the next `Tick` is due; `None` when no time limit runs.
    pub fn next_tick(&self) -> Option<Duration> {
        match self.state {
            HandoffState::Reserved => Some(self.spec.deadline),
            HandoffState::Prefilling | HandoffState::Transferring => {
                Some(self.spec.deadline.min(self.last_heard + self.spec.idle_timeout))
            }
            _ => None,
        }
    }

    /// Takes note of an event at time `now`; returns what to do about it.
    pub fn on_event(&mut self, event: ReceiverEvent, now: Duration) -> Vec<ReceiverAction> {
        let mut actions = Vec::new();
        // Time comes first: an attempt that is over its deadline takes nothing more, whatever arrives.
        self.check_time(now, &mut actions);
        match event {
            ReceiverEvent::Hello(hello) => self.hello(&hello, now, &mut actions),
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
                if self.state.is_open() {
                    self.fail(Failure::Lost, None, &mut actions);
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
        // KV-1: only when no sender may come any more, and none is there.
        if !self.released && !self.writer && !self.state.is_open() {
            self.released = true;
            actions.push(ReceiverAction::ReleaseBlocks);
        }
        actions
    }

    fn writer_is_welcome(&self) -> bool {
        self.writer && self.state.is_open()
    }

    fn check_time(&mut self, now: Duration, actions: &mut Vec<ReceiverAction>) {
        if self.next_tick().is_none_or(|at| now < at) {
            return;
        }
        let failure = if now >= self.spec.deadline { Failure::Deadline } else { Failure::Idle };
        self.fail(failure, Some(RefuseReason::Deadline), actions);
    }

    fn hello(&mut self, hello: &Hello, now: Duration, actions: &mut Vec<ReceiverAction>) {
        // KV-4: a ticket opens one attempt, once. Whoever comes second does not disturb the first.
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
            // The holder of the ticket is wrong about the attempt: another try would be, too.
            Some(reason) => {
                actions.push(ReceiverAction::Refuse(reason));
                self.fail(Failure::Rejected(reason), None, actions);
            }
            None => {
                self.state = HandoffState::Prefilling;
                self.writer = true;
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
        // KV-5: every layer of every block was verified, and both sides counted the same.
        let agreed = commit.frames == self.frames && commit.bytes == self.bytes;
        if self.landing.is_some() || !agreed || !self.arrived.complete() {
            self.reject(RefuseReason::Incomplete, actions);
            return;
        }
        self.state = HandoffState::Ready;
        actions.push(ReceiverAction::Confirm);
        actions.push(ReceiverAction::Ready { first_token: commit.first_token });
        actions.push(ReceiverAction::StopWriter { tell: None });
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
