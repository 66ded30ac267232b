//! KV over NCCL, between GPUs: NCCL carries bytes and nothing else.
//!
//! The handoff's TCP connection stays for control, as with [RDMA](crate::rdma). Two GPUs share a communicator of two ranks:
//! rank 0 sends, rank 1 receives. It is made when their first handoff begins; the receiver makes its id, and
//! answers each hello with it. One thread per GPU ([`Agent`]) owns all communicators, each with a stream of its own.
//!
//! A send or receive kernel holds its stream until the other side takes part. Nobody can take it back. So neither
//! side starts one before the other has agreed to it:
//!
//! 1. The sender announces a piece: its header, and a checksum of each block. It may be two pieces ahead.
//! 2. The receiver posts the receive, and then says `posted` with the receive's number within the communicator. It says so
//!    while the call is still in progress: with their first groups, NCCL connects the ranks, which needs both.
//! 3. The sender posts the send with this number. It does so in the order of the numbers, because NCCL matches sends and
//!    receives by order. If a lower number is missing, it waits.
//!
//! A receiver has receives of one communicator at a time under way, at most two ([`turns`]).
//!
//! A side that ends an attempt first finishes what is posted, which takes milliseconds: the receiver posts nothing more, and waits
//! for what it has posted; the sender answers each `posted` until the receiver closes the connection. If the
//! other side does not take part within a deadline, the communicator is aborted. Each transfer keeps a share of its blocks'
//! lease until its kernel has ended, or the abort has returned and the stream is idle (KV-1, KV-2). If the abort does not
//! return, the memory can't be used again: the process ends, and the router moves its requests.
//!
//! Without the feature `nccl`, nothing can be opened, and the types have no values.

#[cfg(not(feature = "nccl"))]
mod absent;
#[cfg(feature = "nccl")]
mod agent;
#[cfg(feature = "nccl")]
mod api;
#[cfg(feature = "nccl")]
mod communicator;
#[cfg(feature = "nccl")]
mod endpoints;
#[cfg(feature = "nccl")]
mod plain;
#[cfg(feature = "nccl")]
mod receiving;
#[cfg(feature = "nccl")]
mod sending;
#[cfg(any(feature = "nccl", test))]
mod turns;
#[cfg(feature = "nccl")]
mod worker;

use std::fmt;
use std::time::Duration;

#[cfg(not(feature = "nccl"))]
pub use absent::Agent;
#[cfg(not(feature = "nccl"))]
pub(crate) use absent::{Receiving, Sending, plain_sends};
#[cfg(feature = "nccl")]
pub use agent::Agent;
#[cfg(feature = "nccl")]
pub(crate) use plain::plain_sends;
#[cfg(feature = "nccl")]
pub(crate) use receiving::Receiving;
#[cfg(feature = "nccl")]
pub(crate) use sending::Sending;

use overfill_kv::handoff::Piece;

/// Maximum number of blocks in a piece. Each is one send and one receive of a group.
pub(crate) const MAX_PIECE_BLOCKS: u32 = 256;

/// Size of a [`CommunicatorId`] in bytes.
pub const ID_BYTES: usize = 128;

/// NCCL's id of a communicator, with which both ranks find each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CommunicatorId(pub [u8; ID_BYTES]);

impl fmt::Debug for CommunicatorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = crate::tcp::frame::checksum(&self.0);
        write!(f, "CommunicatorId({:08x})", u64::from_le_bytes(sum) >> 32)
    }
}

/// Identifies a sender to one receiver, as long as their communicator works. Random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SenderId(pub [u8; 16]);

/// A piece that the sender has announced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Announced {
    pub piece: Piece,
    /// Checksum of the header.
    pub header_sum: u64,
    /// Checksum of header and blocks.
    pub sum: u64,
}

/// What has happened to the pieces of a receiver's attempt.
#[cfg_attr(not(feature = "nccl"), expect(dead_code, reason = "nothing can be received"))]
pub(crate) enum Progress {
    /// The receive with this number is posted. The sender must be told.
    Posted(u32),
    /// The oldest piece has arrived.
    Arrived(Announced),
}

/// Size of pieces, and time limits. Both sides of a handoff should use the same values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NcclOptions {
    /// Maximum size of a piece in bytes. A block that is longer is a piece of its own.
    pub piece_bytes: usize,
    /// For both ranks to join a communicator.
    pub join_timeout: Duration,
    /// For a piece that is posted.
    pub piece_timeout: Duration,
    /// For an abort. If it takes longer, the process ends.
    pub abort_timeout: Duration,
    /// A communicator that was not used for this long is ended.
    pub idle_timeout: Duration,
}

impl Default for NcclOptions {
    fn default() -> Self {
        Self {
            // Large enough that kernels are few, small enough that what is posted ends soon.
            piece_bytes: 4 << 20,
            // A communicator over several network cards takes seconds. An attempt that can't wait fails; its retry finds the
            // communicator.
            join_timeout: Duration::from_secs(30),
            piece_timeout: Duration::from_secs(5),
            abort_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(600),
        }
    }
}

/// Why NCCL can't be used, or failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NcclError {
    /// The program was built without NCCL.
    #[error("this build has no NCCL (cargo feature nccl)")]
    NotBuilt,
    /// The library is not installed under the name that is looked for.
    #[error(
        "libnccl.so can't be opened; NCCL's packages install libnccl.so.2, to which a link of the name libnccl.so must lead"
    )]
    NoLibrary,
    /// The library is too old.
    #[error("NCCL has version code {0}, supported: 21900 (2.19) and newer")]
    Version(i32),
    /// KV is in host memory.
    #[error("NCCL moves KV between GPUs, but this node's KV is in host memory")]
    NotOnGpu,
    /// A call of CUDA's driver failed.
    #[error("NCCL: {0}")]
    Cuda(String),
    /// A call failed, or work that was queued earlier.
    #[error("NCCL: {call}: {error}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// NCCL's error.
        error: String,
    },
    /// The other side did not take part in time.
    #[error("NCCL: {0} did not end in time")]
    Timeout(&'static str),
    /// Too many transfers or communicators.
    #[error("NCCL: too many {0}")]
    Busy(&'static str),
    /// Joins with the receiver have failed; the next one is not tried yet.
    #[error(
        "NCCL: {0} joins with this receiver have failed; the next one is tried later, at most a minute after the last"
    )]
    Paused(u32),
    /// The communicator has failed or was replaced.
    #[error("NCCL: the communicator has ended")]
    Ended,
    /// The other side's message does not fit the attempt.
    #[error("NCCL: {0} does not fit the attempt")]
    Mismatch(&'static str),
}
