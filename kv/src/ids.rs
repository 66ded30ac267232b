//! Identifiers of blocks, requests, roles, endpoints and tickets.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{PROTOCOL, ProtocolVersions};

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

/// Where a decode node receives KV. Every handoff begins with a TCP connection; which transport then moves the KV is
/// agreed on over it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KvEndpoint {
    /// TCP address as `host:port`.
    pub address: String,
    /// Versions of the wire format that the node speaks.
    pub versions: ProtocolVersions,
}

impl KvEndpoint {
    /// An endpoint of this program.
    pub fn new(address: String) -> Self {
        Self { address, versions: PROTOCOL }
    }
}

impl fmt::Display for KvEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)
    }
}

/// A way to move KV from a prefill node to a decode node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum KvTransport {
    /// The TCP or TLS connection of the handoff.
    Tcp = 1,
    /// One-sided writes of an RDMA device.
    Rdma = 2,
    /// NCCL. No build has it yet; its number on the wire is reserved.
    Nccl = 4,
}

impl KvTransport {
    /// All transports, the preferred one first.
    pub const ALL: [Self; 3] = [Self::Rdma, Self::Nccl, Self::Tcp];

    /// Name of the transport: `tcp`, `rdma` or `nccl`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
            Self::Nccl => "nccl",
        }
    }
}

impl fmt::Display for KvTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A set of transports. On the wire a byte with the bit of each transport; bits of later versions are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TransportSet(pub u8);

impl TransportSet {
    /// The set of these transports.
    pub fn of(transports: &[KvTransport]) -> Self {
        Self(transports.iter().fold(0, |bits, transport| bits | *transport as u8))
    }

    /// The set with these names, as [`Self::fmt`] writes them. Unknown names are ignored. A node of protocol version 1 names
    /// none, and uses TCP.
    pub fn from_names(names: &str) -> Self {
        match names {
            "" => Self::of(&[KvTransport::Tcp]),
            _ => {
                let known = |name: &str| KvTransport::ALL.into_iter().find(|transport| transport.as_str() == name);
                Self::of(&names.split(',').filter_map(known).collect::<Vec<_>>())
            }
        }
    }

    /// Whether the transport is in the set.
    pub fn contains(self, transport: KvTransport) -> bool {
        self.0 & transport as u8 != 0
    }

    /// The transports in both sets.
    pub fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The preferred transport of the set. `None` if it is empty.
    pub fn best(self) -> Option<KvTransport> {
        KvTransport::ALL.into_iter().find(|transport| self.contains(*transport))
    }
}

/// The names, the preferred transport first: `rdma,tcp`.
impl fmt::Display for TransportSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> =
            KvTransport::ALL.into_iter().filter(|t| self.contains(*t)).map(KvTransport::as_str).collect();
        f.write_str(&names.join(","))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_transports_have_names() {
        let (rdma, tcp) = (TransportSet::of(&[KvTransport::Rdma]), TransportSet::of(&[KvTransport::Tcp]));
        let both = TransportSet::of(&[KvTransport::Tcp, KvTransport::Rdma]);
        assert_eq!(both.to_string(), "rdma,tcp");
        assert_eq!(TransportSet::from_names("tcp,carrier-pigeon,rdma"), both);
        assert_eq!(TransportSet::from_names(""), tcp);
        assert_eq!((both.best(), both.common(tcp), rdma.common(tcp).best()), (Some(KvTransport::Rdma), tcp, None));
    }
}
