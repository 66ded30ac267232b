//! What a node is.

use overfill_cluster::discovery::Registration;
use overfill_kv::{KvEndpoint, KvSchema, Role};
use overfill_proto::v1;

/// What a node is. Fixed for the life of the process.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The stage that it runs.
    pub role: Role,
    /// Its name.
    pub node_id: String,
    /// Random per process: a restarted node is another incarnation, even at the same address.
    pub incarnation: String,
    /// Name under which its model is served.
    pub model: String,
    /// Schema of the KV that it computes, or that its model attends to.
    pub schema: KvSchema,
    /// Longest prompt and output: what the model allows and the KV pool holds.
    pub max_context_tokens: usize,
    /// Blocks of its KV cache.
    pub total_blocks: usize,
    /// Most requests computed at once.
    pub max_running: usize,
    /// Where prefill nodes send KV; decode nodes only.
    pub kv_endpoint: Option<KvEndpoint>,
    /// Format of its weights.
    pub weights: String,
    /// Token ids that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// A name that no other process has.
pub fn new_incarnation() -> String {
    format!("{:016x}", rand::random::<u64>())
}

impl Identity {
    /// As routers hear it.
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
        }
    }

    /// As etcd has it. `grpc` is what routers dial, `host:port`.
    pub fn registration(&self, grpc: String) -> Registration {
        Registration {
            role: self.role,
            node_id: self.node_id.clone(),
            incarnation: self.incarnation.clone(),
            grpc,
            kv: self.kv_endpoint.as_ref().map(|KvEndpoint::Tcp(address)| address.clone()),
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
