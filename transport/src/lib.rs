//! Moves KV from a prefill node to a decode node.
//!
//! The decode node reserves blocks under a ticket ([`KvReceiver::reserve`]). The prefill node connects with that ticket
//! ([`KvSender::start`]) and sends the KV of each layer as soon as it is computed ([`KvLayers::ready`]), straight from its KV
//! memory into the receiver's. A commit ends the handoff. The request may decode only if the commit matches what
//! arrived.
//!
//! The state machines of [`overfill_kv::handoff`] make all decisions: who may write, when blocks are free, when a
//! handoff is over. This crate feeds them events and the time, and carries out their actions. Plans, reservations and
//! outcomes are common to all transports. Each handoff has a TCP connection ([`tcp`]), which carries the KV, or only announces
//! what [`rdma`] or [`nccl`] moves.

#![warn(clippy::large_futures)]

pub mod bench;
mod memory;
pub mod nccl;
mod plan;
pub mod rdma;
mod receiver;
mod reservations;
mod sender;
pub mod tcp;
mod transports;

use std::sync::Arc;
use std::time::Duration;

pub use memory::MemoryStore;
use overfill_kv::{
    ProtocolVersions, TransferStats,
    handoff::{Failure, RefuseReason},
};
pub use plan::SendPlan;
pub use receiver::{IncomingHandoff, KvReceiver};
pub use reservations::Reservation;
pub use sender::{KvLayers, KvSender};
pub use transports::{TransportChoice, TransportError, TransportOptions, Transports};

/// Limits of the KV transfer. Both sides of a handoff should use the same values.
#[derive(Clone, Debug)]
pub struct TransferConfig {
    /// Longest silence of the other side before the handoff fails. A layer frame counts when it begins and when it is
    /// complete, so a link must carry `max_frame_bytes` within this time.
    pub idle_timeout: Duration,
    /// Maximum payload of a frame in bytes. A block that is longer gets a frame of its own.
    pub max_frame_bytes: usize,
    /// How long a new connection may take to present its ticket.
    pub hello_timeout: Duration,
    /// Maximum number of connections to a receiver. At the limit, a new connection replaces the oldest one that has no
    /// handoff yet, and is refused if all have one.
    pub max_connections: usize,
    /// Opens a sender's TCP connections.
    pub dialer: tcp::Dialer,
    /// The transports that this node uses.
    pub transports: Arc<Transports>,
}

impl Default for TransferConfig {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(6),
            max_frame_bytes: 1024 * 1024,
            hello_timeout: Duration::from_secs(5),
            max_connections: 256,
            dialer: tcp::plain_dialer(),
            transports: Transports::tcp(),
        }
    }
}

impl TransferConfig {
    /// Maximum payload of a frame in bytes, if a block of a layer has `block_bytes` bytes.
    fn frame_limit(&self, block_bytes: usize) -> usize {
        // A node that uses NCCL uses nothing else.
        let limit = self.transports.nccl().map_or(self.max_frame_bytes, |agent| agent.piece_bytes());
        limit.max(block_bytes)
    }
}

/// Result of a successful handoff, on the receiver.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Committed {
    /// First output token, chosen by the full model.
    pub first_token: u32,
    /// Size and duration, as the receiver measured them.
    pub stats: TransferStats,
}

/// Why a handoff failed, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureReason {
    /// The request ended first.
    Cancelled,
    /// The connection could not be opened or broke, or the other process ended.
    Lost,
    /// The other side was silent for too long, or the deadline passed.
    Timeout,
    /// The receiver did not take the handoff.
    Refused,
    /// KV or frames arrived damaged or incomplete.
    Damaged,
    /// A fault of this program.
    Internal,
}

impl FailureReason {
    /// Every reason.
    pub const ALL: [Self; 6] =
        [Self::Cancelled, Self::Lost, Self::Timeout, Self::Refused, Self::Damaged, Self::Internal];

    /// Name of the reason in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::Lost => "lost",
            Self::Timeout => "timeout",
            Self::Refused => "refused",
            Self::Damaged => "damaged",
            Self::Internal => "internal",
        }
    }
}

/// Why a handoff failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum HandoffError {
    /// The state machine ended the attempt.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The connection could not be opened, or broke.
    #[error("kv connection to {endpoint}: {message}")]
    Connection {
        /// Address from the plan.
        endpoint: String,
        /// Text of the I/O error.
        message: String,
    },
    /// The nodes have no version of the wire format in common.
    #[error("versions of the kv wire format do not overlap: this node speaks {ours}, {endpoint} speaks {theirs}")]
    Versions {
        /// Versions of this node.
        ours: ProtocolVersions,
        /// Versions of the other one.
        theirs: ProtocolVersions,
        /// Address from the plan.
        endpoint: String,
    },
    /// The handoff can't use a transport that this node may use.
    #[error("kv transport {transports}: {endpoint}: {problem}")]
    Transport {
        /// The transports that this node uses.
        transports: String,
        /// Address from the plan.
        endpoint: String,
        /// What is in the way.
        problem: String,
    },
    /// A plan or reservation is invalid. Nothing was sent.
    #[error("handoff plan: {field} must be {limit}, got {value}")]
    Plan {
        /// Name of the field.
        field: &'static str,
        /// What the field must be, for the error text.
        limit: String,
        /// The value given.
        value: String,
    },
}

impl HandoffError {
    /// The reason for metrics.
    pub fn reason(&self) -> FailureReason {
        match self {
            Self::Failed(Failure::Cancelled) => FailureReason::Cancelled,
            Self::Failed(Failure::Lost) | Self::Connection { .. } => FailureReason::Lost,
            Self::Failed(Failure::Deadline | Failure::Idle) => FailureReason::Timeout,
            Self::Failed(Failure::Rejected(reason) | Failure::Refused(reason)) => match reason {
                RefuseReason::Cancelled => FailureReason::Cancelled,
                RefuseReason::Deadline => FailureReason::Timeout,
                RefuseReason::Checksum | RefuseReason::Incomplete | RefuseReason::Protocol => FailureReason::Damaged,
                RefuseReason::Ticket
                | RefuseReason::Schema
                | RefuseReason::Range
                | RefuseReason::Busy
                | RefuseReason::Version
                | RefuseReason::Transport
                | RefuseReason::Writers
                | RefuseReason::Store => FailureReason::Refused,
            },
            Self::Versions { .. } | Self::Transport { .. } => FailureReason::Refused,
            Self::Failed(Failure::Plan(_)) | Self::Plan { .. } => FailureReason::Internal,
        }
    }
}
