//! The prefill side of one attempt.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Commit, Coverage, Failure, HandoffSpec, Hello, Piece, RefuseReason};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderEvent {
    /// The connection to the receiver stands.
    Connected,
    /// The receiver takes the ticket.
    Accepted,
    /// The receiver ends the attempt.
    Refused(RefuseReason),
    /// The KV of these blocks of one layer is final.
    LayerReady(Piece),
    /// The frame of the last `SendLayer` has left; its blocks are not read any more.
    Sent,
    /// This is the prompt's first token. Layers may still be announced after it: a device may say that a layer is done
    /// later than the token is known. The commit leaves behind the last of them.
    Commit {
        /// The full model's first token.
        first_token: u32,
    },
    /// The receiver has everything.
    Confirmed,
    /// The connection could not be made, or broke, or brought something that is no answer.
    Lost,
    /// The task that read the blocks has ended.
    Stopped,
    /// The owner gives the request up.
    Abort,
    /// Time has passed.
    Tick,
}

/// What the driver must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderAction {
    /// Open the attempt.
    SendHello(Hello),
    /// Send these blocks, then report `Sent`. Never more than one at a time.
    SendLayer(Piece),
    /// Tell the receiver that this side is alive.
    SendPing,
    /// Close the attempt.
    SendCommit(Commit),
    /// Tell the owner how it ended. Exactly once.
    Finish(Result<(), Failure>),
    /// Close the connection, stop what is being sent, then report `Stopped`.
    Disconnect,
    /// Let go of the blocks: nobody reads them for this attempt any more (KV-2). Exactly once.
    ReleaseBlocks,
}

/// States of an attempt, as the sender counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SenderState {
    /// No connection yet.
    Connecting,
    /// The ticket was shown.
    Greeting,
    /// The receiver takes KV.
    Sending,
    /// Everything was sent; the receiver has to confirm.
    Committing,
    /// Confirmed.
    Done,
    /// It came to nothing.
    Failed,
    /// Given up by the owner.
    Cancelled,
}

impl SenderState {
    /// Has the attempt its outcome?
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// The prefill side of one attempt. See the [module](super) for what it promises.
#[derive(Debug)]
pub struct SenderHandoff {
    spec: HandoffSpec,
    state: SenderState,
    /// Longest frame, in blocks.
    frame_blocks: u32,
    announced: Coverage,
    /// Announced and not sent. Bounded: each (layer, block) is announced once.
    queue: VecDeque<Piece>,
    /// A frame is on its way: the blocks are being read.
    sending: bool,
    first_token: Option<u32>,
    frames: u64,
    bytes: u64,
    released: bool,
    /// When something was last sent.
    last_sent: Duration,
    /// When the receiver last gave a sign, or the wait for one began.
    waiting_since: Duration,
}

impl SenderHandoff {
    /// An attempt that begins at `now`. A frame carries at most `frame_blocks` blocks, at least 1.
    pub fn new(spec: HandoffSpec, frame_blocks: u32, now: Duration) -> Self {
        let announced = Coverage::new(&spec);
        Self {
            spec,
            state: SenderState::Connecting,
            frame_blocks: frame_blocks.max(1),
            announced,
            queue: VecDeque::new(),
            sending: false,
            first_token: None,
            frames: 0,
            bytes: 0,
            released: false,
            last_sent: now,
            waiting_since: now,
        }
    }

    /// Where the attempt is.
    pub fn state(&self) -> SenderState {
        self.state
    }

    /// What was agreed.
    pub fn spec(&self) -> &HandoffSpec {
        &self.spec
    }

    /// Bytes of KV sent so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The attempt is over, but its blocks are kept until the sending task has stopped.
    pub fn is_stranded(&self) -> bool {
        self.state.is_over() && !self.released
    }

    /// When the next `Tick` is due; `None` when no time limit runs.
    pub fn next_tick(&self) -> Option<Duration> {
        let due = match self.state {
            SenderState::Done | SenderState::Failed | SenderState::Cancelled => return None,
            SenderState::Sending if !self.sending => self.last_sent + self.ping_interval(),
            _ => self.waiting_since + self.spec.idle_timeout,
        };
        Some(due.min(self.spec.deadline))
    }

    /// Often enough that two may be lost in the noise of a busy machine.
    fn ping_interval(&self) -> Duration {
        self.spec.idle_timeout / 4
    }

    /// Takes note of an event at time `now`; returns what to do about it.
    pub fn on_event(&mut self, event: SenderEvent, now: Duration) -> Vec<SenderAction> {
        let mut actions = Vec::new();
        self.check_time(now, &mut actions);
        match event {
            SenderEvent::Connected if self.state == SenderState::Connecting => {
                self.state = SenderState::Greeting;
                self.waiting_since = now;
                actions.push(SenderAction::SendHello(Hello {
                    ticket: self.spec.ticket,
                    schema_digest: self.spec.schema_digest,
                    held_blocks: self.spec.held_blocks,
                    prompt_tokens: self.spec.prompt_tokens,
                }));
            }
            SenderEvent::Accepted if self.state == SenderState::Greeting => {
                self.state = SenderState::Sending;
                self.last_sent = now;
            }
            SenderEvent::Refused(reason) => self.fail(Failure::Refused(reason), &mut actions),
            SenderEvent::LayerReady(piece) if !self.state.is_over() => {
                if !self.announced.admits(&piece) {
                    self.fail(Failure::Plan("blocks handed over twice, or outside the prompt"), &mut actions);
                } else {
                    self.announced.insert(&piece);
                    self.queue.push_back(piece);
                }
            }
            SenderEvent::Sent if self.sending => {
                self.sending = false;
                self.last_sent = now;
            }
            SenderEvent::Commit { first_token } if !self.state.is_over() => {
                if self.first_token.is_some() {
                    self.fail(Failure::Plan("committed twice"), &mut actions);
                } else {
                    self.first_token = Some(first_token);
                }
            }
            SenderEvent::Confirmed if self.state == SenderState::Committing => {
                self.state = SenderState::Done;
                actions.push(SenderAction::Finish(Ok(())));
                actions.push(SenderAction::Disconnect);
            }
            // An answer that was not asked for.
            SenderEvent::Accepted | SenderEvent::Confirmed => self.fail(Failure::Lost, &mut actions),
            SenderEvent::Lost => self.fail(Failure::Lost, &mut actions),
            SenderEvent::Stopped => {
                self.sending = false;
                self.fail(Failure::Lost, &mut actions);
            }
            SenderEvent::Abort if !self.state.is_over() => {
                self.state = SenderState::Cancelled;
                actions.push(SenderAction::Finish(Err(Failure::Cancelled)));
                actions.push(SenderAction::Disconnect);
            }
            _ => {}
        }
        self.pump(now, &mut actions);
        // KV-2: the outcome is known, and nothing of ours reads the blocks.
        if !self.released && self.state.is_over() && !self.sending {
            self.released = true;
            actions.push(SenderAction::ReleaseBlocks);
        }
        actions
    }

    fn check_time(&mut self, now: Duration, actions: &mut Vec<SenderAction>) {
        if self.next_tick().is_none_or(|at| now < at) {
            return;
        }
        if now >= self.spec.deadline {
            self.fail(Failure::Deadline, actions);
        } else if self.state == SenderState::Sending && !self.sending {
            self.last_sent = now;
            actions.push(SenderAction::SendPing);
        } else {
            self.fail(Failure::Idle, actions);
        }
    }

    /// Sends the next frame if the receiver is listening and none is on its way; after the last one, the commit.
    fn pump(&mut self, now: Duration, actions: &mut Vec<SenderAction>) {
        if self.state != SenderState::Sending || self.sending {
            return;
        }
        if let Some(piece) = self.queue.front_mut() {
            let blocks = piece.blocks.min(self.frame_blocks);
            let frame = Piece { blocks, ..*piece };
            if blocks == piece.blocks {
                self.queue.pop_front();
            } else {
                piece.first_block += blocks;
                piece.blocks -= blocks;
            }
            self.sending = true;
            self.waiting_since = now;
            self.frames += 1;
            self.bytes += u64::from(blocks) * self.spec.block_bytes as u64;
            actions.push(SenderAction::SendLayer(frame));
        } else if let Some(first_token) = self.first_token.filter(|_| self.announced.complete()) {
            self.state = SenderState::Committing;
            self.waiting_since = now;
            let commit = Commit { first_token, frames: self.frames, bytes: self.bytes };
            actions.push(SenderAction::SendCommit(commit));
        }
    }

    fn fail(&mut self, failure: Failure, actions: &mut Vec<SenderAction>) {
        if self.state.is_over() {
            return;
        }
        self.state = SenderState::Failed;
        actions.push(SenderAction::Finish(Err(failure)));
        actions.push(SenderAction::Disconnect);
    }
}
