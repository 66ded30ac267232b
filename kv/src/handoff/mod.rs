//! The handoff protocol, which moves the KV of a prompt from a prefill node to a decode node. It consists of two pure
//! state machines: events in, actions out, no I/O and no clock. `overfill-transport` drives them. The tests drive them
//! over a channel that loses, repeats and reorders messages, and breaks.
//!
//! An attempt is one try to hand over one prompt. It has one ticket, one [`ReceiverHandoff`] on the decode node and one
//! [`SenderHandoff`] on the prefill node:
//!
//! ```text
//! Reserved -> Prefilling -> Transferring -> Ready -> Decoding -> Done | Failed | Cancelled
//! ```
//!
//! Both sides keep the invariants of ARCHITECTURE.md. For a handoff they mean:
//!
//! - **KV-1** No block is reused while a task may still write to it.
//! - **KV-2** A sender keeps its blocks until the receiver has confirmed or the lease has expired. (Over TCP only the
//!   sending task reads the blocks, so the lease also ends when that task stops after a failure.)
//! - **KV-3** After any crash, cancel or partition, both sides free every block within one lease.
//! - **KV-4** Every attempt has its own single-use ticket. Frames of an earlier attempt are refused.
//! - **KV-5** A request never decodes over KV that is incomplete, unverified or has a different schema. Complete means:
//!   every block that is due in a layer. A block that a layer's window has left behind is not due, and never read.
//! - **KV-6** Each attempt has exactly one outcome, no later than its deadline. So no request hangs on a handoff.
//!
//! With one-sided writes ([`WriteMode::OneSided`]), the sender writes into the receiver's memory without asking. `Accept`
//! permits it for the whole attempt, and only the receiver can end it, by revoking the sender's access. So the receiver
//! revokes it before the request may decode, and before the blocks are released.
//!
//! The lease of an attempt ends at its deadline, or earlier if the other side is silent for longer than the idle
//! timeout.

mod receiver;
mod sender;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;
use std::time::Duration;

pub use receiver::{ReceiverAction, ReceiverEvent, ReceiverHandoff};
pub use sender::{SenderAction, SenderEvent, SenderHandoff, SenderState};

use crate::Ticket;

/// Target of the trace events of a handoff, such as "layer sent". They are exported with traces, but not logged at the
/// default level.
pub const TRACE_TARGET: &str = "overfill::handoff";

/// Parameters and time limits of one attempt. Both sides must agree on the parameters.
///
/// Times are durations since an origin that the driver chooses. All calls of one state machine use the same origin.
#[derive(Clone, Debug)]
pub struct HandoffSpec {
    /// Authorizes the sender to write this attempt's blocks.
    pub ticket: Ticket,
    /// [`crate::KvSchema::digest`] of the receiver's schema.
    pub schema_digest: [u8; 32],
    /// For each layer sent, the blocks that are due, as indices in the prompt ([`crate::KvSchema::due_blocks`]). The wire
    /// numbers layers from 0.
    pub due: Vec<Range<u32>>,
    /// Leading blocks of the prompt that the receiver does not need: it holds them already, or no layer attends to them.
    /// They are not sent.
    pub held_blocks: u32,
    /// Blocks of the prompt after the held ones.
    pub blocks: u32,
    /// Size of one block of one layer, in bytes.
    pub block_bytes: usize,
    /// Length of the whole prompt, held blocks included.
    pub prompt_tokens: u32,
    /// Latest time of the outcome.
    pub deadline: Duration,
    /// Longest silence of the other side before the attempt fails.
    pub idle_timeout: Duration,
}

/// A range of consecutive blocks of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Position in the receiver's list of layers.
    pub layer: u32,
    /// Index of the first block in the prompt.
    pub first_block: u32,
    /// Number of blocks, at least 1.
    pub blocks: u32,
}

/// The first message of a sender. It presents the ticket and what the sender expects of the attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Ticket of the attempt.
    pub ticket: Ticket,
    /// Digest of the schema of the KV that will be sent.
    pub schema_digest: [u8; 32],
    /// See [`HandoffSpec::held_blocks`].
    pub held_blocks: u32,
    /// See [`HandoffSpec::prompt_tokens`].
    pub prompt_tokens: u32,
}

/// How the bytes of an attempt reach the receiver's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    /// The receiver's task writes what the connection delivers, after [`ReceiverAction::Write`].
    Framed,
    /// The sender's device writes them, at any time between [`ReceiverAction::Accept`] and
    /// [`ReceiverEvent::WriterStopped`].
    OneSided,
}

/// The last frame. All KV was sent; the receiver compares the counts with what arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// First output token, chosen by the full model.
    pub first_token: u32,
    /// Layer frames sent.
    pub frames: u64,
    /// Bytes of KV sent.
    pub bytes: u64,
}

/// Why a receiver refuses a connection or ends an attempt. Encoded as one byte on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RefuseReason {
    /// The ticket is unknown, used or void. The reason does not distinguish them, so that it reveals nothing.
    Ticket = 1,
    /// The schema digests differ.
    Schema = 2,
    /// The sides disagree on the prompt length or on the number of held blocks.
    Range = 3,
    /// The checksum of a layer frame is wrong.
    Checksum = 4,
    /// The commit does not match the frames that arrived, or blocks are missing.
    Incomplete = 5,
    /// Invalid frame: unknown, too long, damaged (ping or commit), or with a block that is sent twice or not due.
    Protocol = 6,
    /// The deadline has passed, or the sender was silent for longer than the idle timeout.
    Deadline = 7,
    /// The request was cancelled.
    Cancelled = 8,
    /// The receiver's connection limit is reached.
    Busy = 9,
    /// The receiver could not write to its KV memory.
    Store = 10,
    /// The sides have no version of the wire format in common.
    Version = 11,
    /// The sides have no transport of KV in common, or the receiver could not set it up.
    Transport = 12,
    /// The receiver takes another number of writers per attempt.
    Writers = 13,
}

impl RefuseReason {
    const ALL: [Self; 13] = [
        Self::Ticket,
        Self::Schema,
        Self::Range,
        Self::Checksum,
        Self::Incomplete,
        Self::Protocol,
        Self::Deadline,
        Self::Cancelled,
        Self::Busy,
        Self::Store,
        Self::Version,
        Self::Transport,
        Self::Writers,
    ];

    /// The reason with this wire code. `None` if the code is unknown.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|r| *r as u8 == code)
    }
}

impl fmt::Display for RefuseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ticket => "ticket is not valid",
            Self::Schema => "kv schemas differ",
            Self::Range => "prompt length or number of held blocks differs",
            Self::Checksum => "wrong checksum of a frame",
            Self::Incomplete => "commit does not match the blocks received",
            Self::Protocol => "unexpected frame",
            Self::Deadline => "deadline or idle timeout reached",
            Self::Cancelled => "request was cancelled",
            Self::Busy => "too many connections",
            Self::Store => "kv memory could not be written",
            Self::Version => "versions of the kv wire format do not overlap",
            Self::Writers => "number of writers per attempt differs",
            Self::Transport => "no common kv transport, or it could not be set up",
        })
    }
}

/// Why an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The receiver (this side) ended the attempt because of what the sender did.
    #[error("handoff rejected by this side: {0}")]
    Rejected(RefuseReason),
    /// The receiver (the other side) ended the attempt.
    #[error("handoff refused by the receiver: {0}")]
    Refused(RefuseReason),
    /// The connection broke, or the other process ended.
    #[error("connection lost before the handoff was complete")]
    Lost,
    /// No outcome before the deadline.
    #[error("handoff deadline reached")]
    Deadline,
    /// The other side was silent for longer than the idle timeout.
    #[error("handoff stalled: the other side was silent for too long")]
    Idle,
    /// The owner on this side cancelled the attempt.
    #[error("handoff cancelled")]
    Cancelled,
    /// The sender's owner announced blocks twice or outside the plan, or committed twice.
    #[error("handoff does not follow its plan: {0}")]
    Plan(&'static str),
}

/// State of an attempt on the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandoffState {
    /// Blocks are reserved; no sender has presented the ticket yet.
    Reserved,
    /// A sender has presented the ticket.
    Prefilling,
    /// KV is arriving.
    Transferring,
    /// All KV has arrived and is verified; the receiver confirms.
    Ready,
    /// The request decodes over the KV.
    Decoding,
    /// The request has finished decoding.
    Done,
    /// The attempt failed.
    Failed,
    /// The owner cancelled the attempt.
    Cancelled,
}

impl HandoffState {
    /// Whether a sender may still connect or write.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Reserved | Self::Prefilling | Self::Transferring)
    }

    /// Whether the state is final.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// Set of the due (layer, block) pairs of an attempt seen so far. Each call is O(blocks of the piece).
#[derive(Clone, Debug)]
struct Coverage {
    /// The due blocks of all layers.
    seen: Vec<bool>,
    missing: usize,
    /// For each layer, its due blocks, and the index of the first one in `seen`.
    layers: Vec<(Range<u32>, usize)>,
}

impl Coverage {
    fn new(spec: &HandoffSpec) -> Self {
        let mut cells = 0;
        let layer = |due: &Range<u32>| {
            let base = cells;
            cells += due.len();
            (due.clone(), base)
        };
        let layers = spec.due.iter().map(layer).collect();
        Self { seen: vec![false; cells], missing: cells, layers }
    }

    /// Indices of the piece into `seen`. `None` if the piece is empty or has a block that is not due.
    fn cells(&self, piece: &Piece) -> Option<Range<usize>> {
        let (due, base) = self.layers.get(piece.layer as usize)?;
        let from = piece.first_block.checked_sub(due.start)?;
        let to = from.checked_add(piece.blocks)?;
        if piece.blocks == 0 || to > due.len() as u32 {
            return None;
        }
        Some(base + from as usize..base + to as usize)
    }

    /// Whether every block of the piece is due and not seen yet.
    fn admits(&self, piece: &Piece) -> bool {
        self.cells(piece).is_some_and(|cells| self.seen[cells].iter().all(|seen| !seen))
    }

    fn insert(&mut self, piece: &Piece) {
        if let Some(cells) = self.cells(piece) {
            self.missing -= self.seen[cells.clone()].iter().filter(|seen| !**seen).count();
            self.seen[cells].fill(true);
        }
    }

    fn complete(&self) -> bool {
        self.missing == 0
    }
}
