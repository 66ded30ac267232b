//! What the two stages agree on, without any I/O, clock or thread: names and layout of the KV cache, its blocks, who
//! holds them, and the protocol by which they change hands.

pub mod handoff;
pub mod ids;
mod outcome;
pub mod pool;
pub mod prefix;
pub mod sampling;
pub mod schema;
pub mod store;

pub use ids::{BlockId, KvEndpoint, RequestId, Role, Ticket};
pub use outcome::{FinishReason, TransferStats};
pub use pool::{BlockLease, BlockPool, NoRoom};
pub use prefix::{BlockHash, block_hashes};
pub use sampling::{OutputToken, SamplingParams};
pub use schema::{KvDtype, KvSchema, RopeSpec, SchemaMismatch};
pub use store::{KvMemory, KvStore, StoreError};

/// Tokens per KV block.
pub const BLOCK_TOKENS: usize = 16;

/// Blocks that `tokens` tokens take.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}
