//! Who is there: nodes register in etcd under a lease, routers watch.
//!
//! etcd holds what does not change while a node lives (role, addresses, model, capacity). Load goes from nodes to routers
//! directly, and whether a node can be reached a router finds out itself: etcd may be away, or come back empty, without
//! anything that runs noticing. Everything here goes on trying for ever, and says so once.

mod args;
mod client;
mod follow;
mod register;

pub use args::{EtcdArgs, EtcdConfig};
pub use follow::follow;
pub use register::register;

use std::collections::BTreeMap;

use overfill_kv::Role;
use serde::{Deserialize, Serialize};

/// What a node says of itself in etcd, as JSON. Fixed for the life of the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// What it does.
    pub role: Role,
    /// Its name.
    pub node_id: String,
    /// Random per process: a restarted node is another incarnation, even at the same address.
    pub incarnation: String,
    /// Where routers reach it, `host:port`.
    pub grpc: String,
    /// Where prefill nodes send KV, `host:port`; decode nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv: Option<String>,
    /// Name under which its model is served.
    pub model: String,
    /// Fingerprint of the full model that its KV comes from, where it names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_model: Option<String>,
    /// Of its KV schema ([`overfill_kv::KvSchema::digest`]), lower-case hex.
    pub kv_schema_digest: String,
    /// Blocks of its KV cache.
    pub total_blocks: u32,
    /// Most requests computed at once.
    pub max_running_requests: u32,
    /// Longest prompt and output.
    pub max_context_tokens: u32,
    /// Of the program.
    pub version: String,
}

impl Registration {
    /// Where routers reach it, as a URL.
    pub fn url(&self, scheme: &str) -> String {
        format!("{scheme}://{}", self.grpc)
    }

    /// One key for each role and address: a node that restarts takes the place of what it was.
    fn key(&self, config: &EtcdConfig) -> String {
        format!("{}{}/{}", config.nodes_prefix(), self.role, self.grpc)
    }
}

/// All registered nodes by their keys in etcd.
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
