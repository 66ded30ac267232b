//! What a node says of itself, checked.

use overfill_kv::{KvEndpoint, KvSchema, Role};

/// What a node is. Fixed for the life of its process.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeInfo {
    /// The node's name.
    pub node_id: String,
    /// Random per process: a restarted node is another incarnation, even at the same address.
    pub incarnation: String,
    /// The stage that the node runs.
    pub role: Role,
    /// Name under which the node's model is served.
    pub model: String,
    /// Layout and producer of the node's KV.
    pub schema: KvSchema,
    /// Longest prompt and output together, in tokens.
    pub max_context_tokens: u32,
    /// Blocks of the node's KV cache.
    pub total_blocks: u32,
    /// Most requests computed at once.
    pub max_running_requests: u32,
    /// Where it receives KV; `None` on prefill nodes.
    pub kv_endpoint: Option<KvEndpoint>,
    /// The program's version.
    pub version: String,
    /// The weights' type.
    pub weights: String,
    /// Token ids that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// What a node is doing now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NodeLoad {
    /// KV blocks that are free, or cached and free to be taken.
    pub free_blocks: u32,
    /// Requests being computed.
    pub running_requests: u32,
    /// Requests accepted and not yet being computed.
    pub waiting_requests: u32,
    /// Prompt tokens accepted and not yet computed; prefill nodes only.
    pub queued_tokens: u64,
    /// KV bytes held for handoffs whose other side has gone.
    pub stranded_bytes: u64,
    /// The node takes no new request.
    pub draining: bool,
    /// Handoffs between reservation and end.
    pub open_handoffs: u32,
    /// The node's engine hangs.
    pub stalled: bool,
}

impl NodeLoad {
    /// Requests on the node, waiting ones included.
    pub fn requests(&self) -> u32 {
        self.running_requests.saturating_add(self.waiting_requests)
    }
}
