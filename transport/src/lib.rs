//! KV bytes from a prefill node to a decode node.
//!
//! The decode node reserves blocks under a ticket ([`KvReceiver::reserve`]). The prefill node connects with that ticket
//! ([`KvSender::start`]) and sends the KV of each layer as soon as it is computed ([`KvLayers::ready`]), straight from its KV
//! memory into the receiver's. A commit closes the handoff; only when it agrees with what arrived may the request decode.
//!
//! All decisions (who may write, when blocks are free, when a handoff is over) are made by the state machines of
//! [`overfill_kv::handoff`]; this crate moves bytes and time to them and does what they say. What is common to all
//! transports stands here: plan, reservations, outcome. [`tcp`] is the one transport so far.

#![warn(clippy::large_futures)]

pub mod bench;
mod memory;
mod plan;
mod receiver;
mod reservations;
mod sender;
pub mod tcp;

use std::time::Duration;

pub use memory::MemoryStore;
use overfill_kv::{TransferStats, handoff::Failure};
pub use plan::SendPlan;
pub use receiver::{IncomingHandoff, KvReceiver};
pub use reservations::Reservation;
pub use sender::{KvLayers, KvSender};

/// Limits of the KV plane. Both sides of a handoff should have the same.
#[derive(Clone, Debug)]
pub struct TransferConfig {
    /// Longest silence of the other side before it is taken for dead.
    pub idle_timeout: Duration,
    /// Longest payload of a frame; a block that is longer travels alone.
    pub max_frame_bytes: usize,
    /// How long a new connection may take to show its ticket.
    pub hello_timeout: Duration,
    /// Connections that a receiver serves at once. One more takes the place of the oldest that has no handoff yet, and is
    /// refused where all have one.
    pub max_connections: usize,
    /// How a sender connects over TCP.
    pub dialer: tcp::Dialer,
}

impl Default for TransferConfig {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(6),
            max_frame_bytes: 1024 * 1024,
            hello_timeout: Duration::from_secs(5),
            max_connections: 256,
            dialer: tcp::plain_dialer(),
        }
    }
}

impl TransferConfig {
    /// Longest payload of a frame when a block of a layer has `block_bytes`.
    fn frame_limit(&self, block_bytes: usize) -> usize {
        self.max_frame_bytes.max(block_bytes)
    }
}

/// What a whole handoff brought.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Committed {
    /// The full model's first token.
    pub first_token: u32,
    /// As the receiver measured it.
    pub stats: TransferStats,
}

/// Why a handoff came to nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum HandoffError {
    /// As the state machine decided.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The connection could not be made or broke.
    #[error("kv connection to {endpoint}: {message}")]
    Connection {
        /// As in the plan.
        endpoint: String,
        /// The system's message.
        message: String,
    },
    /// A plan or reservation that cannot be carried out; nothing was sent.
    #[error("handoff plan: {field} must be {limit}, got {value}")]
    Plan {
        /// Its name.
        field: &'static str,
        /// What it must be.
        limit: String,
        /// What it is.
        value: String,
    },
}
