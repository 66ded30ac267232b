//! Discovery of nodes, through etcd or through DNS ([`dns`]). With etcd, nodes register under a lease, and routers watch
//! the registrations.
//!
//! etcd holds only what is fixed for the life of a node process: role, addresses, model, capacity. Nodes report their
//! load to routers directly, and routers check by themselves whether a node is reachable. So running nodes and routers
//! keep working while etcd is down or after it restarts empty. Every operation here retries without limit and logs
//! only the first failure of a series.

mod args;
mod client;
pub mod dns;
mod follow;
mod register;

pub use args::{EtcdArgs, EtcdConfig};
pub use follow::follow;
pub use register::register;

use std::collections::BTreeMap;

use overfill_kv::Role;
use serde::{Deserialize, Serialize};

/// A node's registration, stored in etcd as JSON. Fixed for the life of the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// Role: prefill or decode.
    pub role: Role,
    /// Name of the node.
    pub node_id: String,
    /// Random per process: a restarted node is another incarnation, even at the same address.
    pub incarnation: String,
    /// gRPC address that routers dial, `host:port`.
    pub grpc: String,
    /// Address that prefill nodes send KV to, `host:port`; decode nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv: Option<String>,
    /// Name of the pool that the node belongs to.
    #[serde(default)]
    pub pool: String,
    /// Name under which its model is served.
    pub model: String,
    /// Fingerprint of the full model that computes the KV, if the node's KV schema names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_model: Option<String>,
    /// Digest of its KV schema ([`overfill_kv::KvSchema::digest`]), lower-case hex.
    pub kv_schema_digest: String,
    /// Capacity of its KV cache, in blocks.
    pub total_blocks: u32,
    /// Maximum number of requests computed at once.
    pub max_running_requests: u32,
    /// Maximum length of prompt and output together, in tokens.
    pub max_context_tokens: u32,
    /// Version of the Overfill binary.
    pub version: String,
}

impl Registration {
    /// URL of the gRPC service.
    pub fn url(&self, scheme: &str) -> String {
        format!("{scheme}://{}", self.grpc)
    }

    /// Key in etcd: one for each role and address, so a restarted node replaces its earlier registration.
    fn key(&self, config: &EtcdConfig) -> String {
        format!("{}{}/{}", config.nodes_prefix(), self.role, self.grpc)
    }
}

/// All registered nodes, by etcd key.
pub type Members = BTreeMap<String, Registration>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_is_plain_json() {
        let text = r#"{"role":"decode","node_id":"n","incarnation":"1","grpc":"a:1","kv":"a:2","model":"m",
            "kv_schema_digest":"ff","total_blocks":1,"max_running_requests":2,"max_context_tokens":3,"version":"0",
            "of_a_later_version":true}"#;
        let registration: Registration = serde_json::from_str(text).unwrap();
        assert_eq!((registration.role, registration.url("http").as_str()), (Role::Decode, "http://a:1"));
        let again = serde_json::from_str(&serde_json::to_string(&registration).unwrap()).unwrap();
        assert_eq!(registration, again);
    }
}
