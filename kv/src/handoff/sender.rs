//! State machine of the sender, on the prefill node.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Commit, Coverage, Failure, HandoffSpec, Hello, Piece, RefuseReason};

/// Input of the sender's state machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderEvent {
    /// The connection to the receiver is open.
    Connected,
    /// The receiver has accepted the ticket.
    Accepted,
    /// The receiver has refused or ended the attempt.
    Refused(RefuseReason),
    /// The KV of these blocks of one layer is final.
    LayerReady(Piece),
    /// The frame of the last `SendLayer` was sent. Its blocks are not read any more.
    Sent,
    /// The first token is known. Layers may still be announced after it, because a device may report a layer as done
    /// after the token is known. The commit is sent after the last layer.
    Commit {
        /// First output token, chosen by the full model.
        first_token: u32,
    },
    /// The receiver has confirmed that all KV arrived.
    Confirmed,
    /// The connection could not be opened, broke, or delivered an invalid answer.
    Lost,
    /// The task that read the blocks has ended.
    Stopped,
    /// The owner cancels the request.
    Abort,
    /// A time limit may have been reached; see [`SenderHandoff::next_tick`].
    Tick,
}

/// Output of the sender's state machine. The driver carries out actions in the order returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderAction {
    /// Present the ticket to the receiver.
    SendHello(Hello),
    /// Send these blocks, then report [`SenderEvent::Sent`]. At most one is in progress at a time.
    SendLayer(Piece),
    /// Send a ping, so that the receiver's idle timeout does not expire.
    SendPing,
    /// Send the commit, the last frame.
    SendCommit(Commit),
    /// Report the outcome to the owner. Returned exactly once.
    Finish(Result<(), Failure>),
    /// Close the connection, stop sending, then report [`SenderEvent::Stopped`].
    Disconnect,
    /// Release the blocks: no task reads them for this attempt any more (KV-2). Returned exactly once.
    ReleaseBlocks,
}

/// State of an attempt on the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SenderState {
    /// The connection is not open yet.
    Connecting,
    /// The hello was sent; waiting for the receiver to accept.
    Greeting,
    /// The receiver has accepted; layers are sent as they become ready.
    Sending,
    /// The commit was sent; waiting for the confirmation.
    Committing,
    /// The receiver has confirmed.
    Done,
    /// The attempt failed.
    Failed,
    /// The owner cancelled the attempt.
    Cancelled,
}

impl SenderState {
    /// Whether the attempt has its outcome.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// The sender of one attempt, on the prefill node. See the [module](super) for its invariants.
#[derive(Debug)]
pub struct SenderHandoff {
    spec: HandoffSpec,
    state: SenderState,
    /// Maximum blocks per frame.
    frame_blocks: u32,
    announced: Coverage,
    /// Pieces announced but not sent yet. Bounded, because each (layer, block) is announced at most once.
    queue: VecDeque<Piece>,
    /// Whether a frame is being sent, so that its blocks are being read.
    sending: bool,
    first_token: Option<u32>,
    frames: u64,
    bytes: u64,
    released: bool,
    /// Time of the last send.
    last_sent: Duration,
    /// Start of the current wait for the connection, an answer, or a frame to be sent.
    waiting_since: Duration,
}

impl SenderHandoff {
    /// An attempt that starts at `now`. A frame carries at most `frame_blocks` blocks; 0 counts as 1.
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

    /// Current state.
    pub fn state(&self) -> SenderState {
        self.state
    }

    /// Parameters of the attempt.
    pub fn spec(&self) -> &HandoffSpec {
        &self.spec
    }

    /// Bytes of KV sent so far, the frame being sent included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the attempt is over but its blocks are kept until the sending task has stopped.
    pub fn is_stranded(&self) -> bool {
        self.state.is_over() && !self.released
    }

    /// When the next `Tick` is due. `None` if no time limit applies.
    pub fn next_tick(&self) -> Option<Duration> {
        let due = match self.state {
            SenderState::Done | SenderState::Failed | SenderState::Cancelled => return None,
            SenderState::Sending if !self.sending => self.last_sent + self.ping_interval(),
            _ => self.waiting_since + self.spec.idle_timeout,
        };
        Some(due.min(self.spec.deadline))
    }

    /// A quarter of the idle timeout, so that two delayed pings on a busy machine do not end the attempt.
    fn ping_interval(&self) -> Duration {
        self.spec.idle_timeout / 4
    }

    /// Handles an event at time `now` and returns the actions to carry out.
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
                    self.fail(Failure::Plan("blocks announced twice or outside the prompt"), &mut actions);
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
            // An answer that is not expected in this state.
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
        // KV-2: the outcome is known, and this side does not read the blocks any more.
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

    /// Sends the next frame if the receiver has accepted and no frame is being sent. Sends the commit after the last
    /// one.
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
