//! The identity of a node, and its forms for routers and for etcd.

use overfill_cluster::discovery::Registration;
use overfill_kv::{KvEndpoint, KvSchema, Role};
use overfill_proto::v1;

/// Identity and capacity of a node. Fixed for the life of the process.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Role: prefill or decode.
    pub role: Role,
    /// Name of the node.
    pub node_id: String,
    /// Random per process: a restarted node is another incarnation, even at the same address.
    pub incarnation: String,
    /// Name of the pool that it belongs to.
    pub pool: String,
    /// Name of the cluster that it belongs to; may be empty.
    pub cluster: String,
    /// Name under which its model is served.
    pub model: String,
    /// Names of further models that it serves over the same KV; decode nodes only.
    pub variants: Vec<String>,
    /// KV schema. Prefill nodes: the KV that the model computes. Decode nodes: the KV that the model attends to.
    pub schema: KvSchema,
    /// Maximum length of prompt and output together, in tokens: the lower of the model's limit and what fits into the KV
    /// cache.
    pub max_context_tokens: usize,
    /// Capacity of its KV cache, in blocks.
    pub total_blocks: usize,
    /// Maximum number of requests computed at once.
    pub max_running: usize,
    /// Address that prefill nodes send KV to; decode nodes only.
    pub kv_endpoint: Option<KvEndpoint>,
    /// Transports over which it moves KV, the preferred one first.
    pub kv_transports: String,
    /// Format of its weights in memory.
    pub weights: String,
    /// End-of-sequence token ids of the model.
    pub eos_token_ids: Vec<u32>,
}

/// Draws a random incarnation: 64 bits, as hex.
pub fn new_incarnation() -> String {
    format!("{:016x}", rand::random::<u64>())
}

impl Identity {
    /// Converts the identity to its wire form, for routers.
    pub fn info(&self) -> v1::NodeInfo {
        v1::NodeInfo {
            node_id: self.node_id.clone(),
            incarnation: self.incarnation.clone(),
            role: v1::Role::from(self.role).into(),
            model: self.model.clone(),
            kv_schema: Some((&self.schema).into()),
            max_context_tokens: self.max_context_tokens as u32,
            total_blocks: self.total_blocks as u32,
            max_running_requests: self.max_running as u32,
            kv_endpoint: self.kv_endpoint.clone().map(Into::into),
            version: env!("CARGO_PKG_VERSION").into(),
            weights: self.weights.clone(),
            eos_token_ids: self.eos_token_ids.clone(),
            protocol: Some(self.schema.protocol().into()),
            pool: self.pool.clone(),
            cluster: self.cluster.clone(),
            kv_transports: self.kv_transports.clone(),
            variants: self.variants.clone(),
        }
    }

    /// Converts the identity to the registration in etcd. `grpc` is the address (`host:port`) that routers dial.
    pub fn registration(&self, grpc: String) -> Registration {
        Registration {
            role: self.role,
            node_id: self.node_id.clone(),
            incarnation: self.incarnation.clone(),
            grpc,
            pool: self.pool.clone(),
            kv: self.kv_endpoint.as_ref().map(|endpoint| endpoint.address.clone()),
            model: self.model.clone(),
            full_model: self.schema.full_model.clone(),
            kv_schema_digest: self.schema.digest_hex(),
            total_blocks: self.total_blocks as u32,
            max_running_requests: self.max_running as u32,
            max_context_tokens: self.max_context_tokens as u32,
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}
