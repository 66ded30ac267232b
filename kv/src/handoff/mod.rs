//! The protocol by which the KV of a prompt changes hands, as two pure state machines: events in, actions out, no I/O
//! and no clock. `overfill-transport` drives them over TCP; the tests drive them over a channel that loses, repeats,
//! reorders and breaks.
//!
//! One attempt to hand over one prompt has one ticket, one [`ReceiverHandoff`] on the decode node and one
//! [`SenderHandoff`] on the prefill node:
//!
//! ```text
//! Reserved -> Prefilling -> Transferring -> Ready -> Decoding -> Done | Failed | Cancelled
//! ```
//!
//! What both promise, quoted by number in code and tests:
//!
//! - **KV-1** No block is reused while anyone may still write to it.
//! - **KV-2** A sender keeps its blocks until the receiver has confirmed or the lease has expired. (Where the only
//!   reader of the blocks is the sending task itself, as over TCP, its end after a failure is the end of the lease.)
//! - **KV-3** Every block is free again within one lease after any crash, cancel or partition, on both sides.
//! - **KV-4** Every attempt has a ticket of its own, single use; frames of an old one are refused.
//! - **KV-5** A request never decodes over KV that is incomplete, unverified or of another schema.
//! - **KV-6** Each attempt has exactly one outcome, and it has it by its deadline.

mod receiver;
mod sender;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

pub use receiver::{ReceiverAction, ReceiverEvent, ReceiverHandoff};
pub use sender::{SenderAction, SenderEvent, SenderHandoff, SenderState};

use crate::Ticket;

/// What both sides of one attempt must agree on, and how long it may take.
///
/// Times are counted from an origin of the driver's choice, the same for all calls of one machine.
#[derive(Clone, Debug)]
pub struct HandoffSpec {
    /// The right to write this attempt.
    pub ticket: Ticket,
    /// [`crate::KvSchema::digest`] of the receiver's schema.
    pub schema_digest: [u8; 32],
    /// Layers that are sent; the wire counts them from 0.
    pub layers: u32,
    /// Leading blocks of the prompt that the receiver holds already. They are not sent.
    pub held_blocks: u32,
    /// Blocks that are sent of each layer.
    pub blocks: u32,
    /// Bytes of one layer of one block.
    pub block_bytes: usize,
    /// Length of the whole prompt.
    pub prompt_tokens: u32,
    /// By then the attempt has an outcome.
    pub deadline: Duration,
    /// Longest silence of the other side before it is taken for dead.
    pub idle_timeout: Duration,
}

/// Blocks of one layer that travel together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Position in the receiver's list of layers.
    pub layer: u32,
    /// Index in the prompt.
    pub first_block: u32,
    /// How many, at least 1.
    pub blocks: u32,
}

/// The first frame: who wants to write what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The right to do so.
    pub ticket: Ticket,
    /// Digest of the schema that the sender will send in.
    pub schema_digest: [u8; 32],
    /// As in [`HandoffSpec`].
    pub held_blocks: u32,
    /// As in [`HandoffSpec`].
    pub prompt_tokens: u32,
}

/// The last frame: the KV is whole, this is the first token after it, and this is how much was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The full model's first token.
    pub first_token: u32,
    /// Layer frames sent.
    pub frames: u64,
    /// Bytes of KV sent.
    pub bytes: u64,
}

/// Why a receiver ends an attempt. Travels as one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RefuseReason {
    /// Unknown, used or void: which of them is not told to a stranger.
    Ticket = 1,
    /// The schema digests differ.
    Schema = 2,
    /// The sides disagree on the prompt's length or on which blocks are sent.
    Range = 3,
    /// A frame arrived damaged.
    Checksum = 4,
    /// The commit does not agree with what arrived.
    Incomplete = 5,
    /// A frame that has no place here: unknown, too long, a block twice or outside the reservation.
    Protocol = 6,
    /// The attempt's time is up, or the sender fell silent.
    Deadline = 7,
    /// The request was cancelled.
    Cancelled = 8,
    /// Too many connections.
    Busy = 9,
    /// The receiver could not store what arrived.
    Store = 10,
}

impl RefuseReason {
    const ALL: [Self; 10] = [
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
    ];

    /// The reason of a wire code; `None` if there is no such reason.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|r| *r as u8 == code)
    }
}

impl fmt::Display for RefuseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ticket => "ticket is not valid",
            Self::Schema => "kv schema differs",
            Self::Range => "prompt length or first block differs",
            Self::Checksum => "checksum of a frame is wrong",
            Self::Incomplete => "commit does not agree with the blocks sent",
            Self::Protocol => "unexpected frame",
            Self::Deadline => "time is up",
            Self::Cancelled => "request was cancelled",
            Self::Busy => "too many connections",
            Self::Store => "kv memory could not be written",
        })
    }
}

/// Why an attempt came to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// This side ended it because of what the other side did.
    #[error("handoff ended by this side: {0}")]
    Rejected(RefuseReason),
    /// The other side ended it.
    #[error("handoff refused by the receiver: {0}")]
    Refused(RefuseReason),
    /// The connection broke, or the other process is gone.
    #[error("connection lost before the handoff was complete")]
    Lost,
    /// No outcome before the deadline.
    #[error("handoff deadline reached")]
    Deadline,
    /// The other side was silent for longer than the idle timeout.
    #[error("handoff stalled: the other side was silent for too long")]
    Idle,
    /// This side's owner gave it up.
    #[error("handoff cancelled")]
    Cancelled,
    /// This side's owner handed over blocks twice or outside the plan, or committed twice.
    #[error("handoff out of plan: {0}")]
    Plan(&'static str),
}

/// States of an attempt, as the receiver counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandoffState {
    /// Blocks and ticket are set aside.
    Reserved,
    /// A sender has come with the ticket.
    Prefilling,
    /// KV is arriving.
    Transferring,
    /// All KV is here, verified, and confirmed.
    Ready,
    /// The request decodes over it.
    Decoding,
    /// Decoded to its end.
    Done,
    /// No outcome to use.
    Failed,
    /// Given up by its owner.
    Cancelled,
}

impl HandoffState {
    /// May a sender still come, or write?
    pub fn is_open(self) -> bool {
        matches!(self, Self::Reserved | Self::Prefilling | Self::Transferring)
    }

    /// Nothing more will happen to the request here.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// Which (layer, block) pairs of an attempt were seen. O(blocks of the piece) per call.
#[derive(Clone, Debug)]
struct Coverage {
    seen: Vec<bool>,
    missing: usize,
    layers: u32,
    held_blocks: u32,
    blocks: u32,
}

impl Coverage {
    fn new(spec: &HandoffSpec) -> Self {
        let cells = spec.layers as usize * spec.blocks as usize;
        Self {
            seen: vec![false; cells],
            missing: cells,
            layers: spec.layers,
            held_blocks: spec.held_blocks,
            blocks: spec.blocks,
        }
    }

    /// Indices into `seen`; `None` if the piece is empty or reaches outside the attempt.
    fn cells(&self, piece: &Piece) -> Option<std::ops::Range<usize>> {
        let from = piece.first_block.checked_sub(self.held_blocks)?;
        let to = from.checked_add(piece.blocks)?;
        if piece.blocks == 0 || piece.layer >= self.layers || to > self.blocks {
            return None;
        }
        let base = piece.layer as usize * self.blocks as usize;
        Some(base + from as usize..base + to as usize)
    }

    /// Is every block of the piece inside the attempt, and new?
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
