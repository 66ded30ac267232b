//! A node's validated description and load.

use overfill_kv::{KvEndpoint, KvSchema, ProtocolVersions, Role};

/// A node's description. It does not change while the node's process runs.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeInfo {
    /// The node's name.
    pub node_id: String,
    /// Random id of the node's process. A restarted node has a new incarnation, even at the same address.
    pub incarnation: String,
    /// The stage that the node runs.
    pub role: Role,
    /// Name under which the node's model is served.
    pub model: String,
    /// Names of further models that a decode node serves over the same KV.
    pub variants: Vec<String>,
    /// Layout and producer of the node's KV.
    pub schema: KvSchema,
    /// Maximum length of prompt and output together, in tokens.
    pub max_context_tokens: u32,
    /// Number of blocks in the node's KV cache.
    pub total_blocks: u32,
    /// Maximum number of requests that the node computes at once.
    pub max_running_requests: u32,
    /// Address at which the node receives KV. `None` for prefill nodes.
    pub kv_endpoint: Option<KvEndpoint>,
    /// Version of the node's program.
    pub version: String,
    /// Data type of the weights.
    pub weights: String,
    /// End-of-text token ids.
    pub eos_token_ids: Vec<u32>,
    /// Versions of the protocol that the node speaks.
    pub protocol: ProtocolVersions,
    /// Name of the node's pool.
    pub pool: String,
    /// Name of the cluster that the node belongs to. Empty if it has none.
    pub cluster: String,
    /// Transports over which the node moves KV, the preferred one first. Empty if it does not say.
    pub kv_transports: String,
}

impl NodeInfo {
    /// The names of the node's models.
    pub fn models(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.model).chain(&self.variants).map(String::as_str)
    }

    /// Whether the node serves a model of this name.
    pub fn serves(&self, model: &str) -> bool {
        self.models().any(|own| own == model)
    }
}

/// A node's current load.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NodeLoad {
    /// KV blocks that are free, or cached and evictable.
    pub free_blocks: u32,
    /// Number of requests being computed.
    pub running_requests: u32,
    /// Number of accepted requests whose computation has not started.
    pub waiting_requests: u32,
    /// Number of accepted prompt tokens that are not computed yet. Prefill nodes only.
    pub queued_tokens: u64,
    /// Bytes of KV held for handoffs whose request has ended but whose transfer has not stopped yet.
    pub stranded_bytes: u64,
    /// Whether the node is draining: it takes no new requests.
    pub draining: bool,
    /// Number of handoffs that are reserved and have not ended.
    pub open_handoffs: u32,
    /// Whether the node's engine makes no progress.
    pub stalled: bool,
    /// Prompt tokens that the node computes per second, a recent mean. 0 if unknown. Prefill nodes only.
    pub prefill_tokens_per_second: u32,
    /// Duration of the node's decode steps, a recent mean. 0 while it decodes nothing. Decode nodes only.
    pub decode_step_microseconds: u32,
}

impl NodeLoad {
    /// Number of running and waiting requests on the node.
    pub fn requests(&self) -> u32 {
        self.running_requests.saturating_add(self.waiting_requests)
    }
}
