//! Identifiers of blocks, requests, roles, endpoints and tickets.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Index of a block in a node's pool, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Identifier of a request. The router chooses it; all nodes that work on the request use it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub String);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The stage of a request that a node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs the full model over prompts.
    Prefill,
    /// Generates tokens over the full model's KV.
    Decode,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 2] = [Self::Prefill, Self::Decode];

    /// Name of the role: `prefill` or `decode`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Address at which a decode node receives KV, per transport.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KvEndpoint {
    /// TCP address as `host:port`.
    Tcp(String),
}

impl fmt::Display for KvEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp {address}"),
        }
    }
}

/// Secret that authorizes one sender to fill one reservation: 128 random bits, single use (KV-4).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub [u8; 16]);

impl Ticket {
    /// A ticket from its wire bytes. `None` unless there are exactly 16.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// A ticket is a secret, so only its first two bytes are logged: enough to tell tickets apart, too little to use one.
impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({:02x}{:02x}..)", self.0[0], self.0[1])
    }
}
