//! Types and protocols that prefill and decode nodes share: identifiers, KV schema, block pool, prefix hashes, sampling
//! parameters and the handoff state machines. This crate does no I/O, reads no clock and starts no threads.

pub mod handoff;
pub mod ids;
mod mode;
mod outcome;
pub mod pool;
pub mod prefix;
pub mod protocol;
pub mod sampling;
pub mod schema;
pub mod store;
mod windows;

pub use ids::{BlockId, KvEndpoint, KvTransport, RequestId, Role, Ticket, TransportSet};
pub use mode::Mode;
pub use outcome::{FinishReason, TransferStats};
pub use pool::{BlockLease, BlockPool, NoRoom};
pub use prefix::{BlockHash, block_hashes};
pub use protocol::{PROTOCOL, ProtocolMismatch, ProtocolVersions};
pub use sampling::{Grammar, OutputToken, SamplingParams};
pub use schema::{KvDtype, KvSchema, LayerAttention, RopeSpec, SchemaMismatch};
pub use store::{GpuMemory, KvMemory, KvStore, StoreError};
pub use windows::Windows;

/// Tokens per KV block.
pub const BLOCK_TOKENS: usize = 16;

/// Number of blocks needed for `tokens` tokens.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}
