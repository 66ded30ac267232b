//! Versions of the protocol between services.

use std::fmt;

/// Versions of the protocol that a service speaks: all calls between services, and the frames that carry KV.
///
/// Two services work together if they have a version in common. So during a rollout, nodes and routers of different
/// releases meet only if they understand each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProtocolVersions {
    /// Oldest version that the service speaks.
    pub oldest: u32,
    /// Newest version that the service speaks.
    pub newest: u32,
}

/// The versions that this program speaks. Raise `newest` when a call or a frame changes so that a service of an earlier
/// release would misunderstand it, and `oldest` when the program no longer speaks the older form.
///
/// - Version 1: KV in frames over TCP.
/// - Version 2: the hello of a handoff offers transports and checksums, and the answer chooses. Frames name a range of KV
///   heads, and the hello a rank, for prefill nodes with several GPUs.
/// - Version 3: sampling parameters may say which tokens may be chosen ([`CONSTRAINTS`]).
/// - Version 4: a prefill node keeps a request open, and its decode node has [`crate::Mode`]s ([`EXTEND`]). It also scores outputs. KV that no decode
///   step attends to, because of a layer's window, is not sent ([`WINDOWS`]).
pub const PROTOCOL: ProtocolVersions = ProtocolVersions { oldest: 1, newest: 4 };

/// Version in which sampling parameters may have a grammar, allowed tokens, bad words and a minimum length. A node of an
/// earlier version would ignore them, so it gets no such request.
pub const CONSTRAINTS: u32 = 3;

/// Version in which prefill nodes have `Extend` and `Score`, and decode nodes have `Verdict`. Both nodes of a request whose
/// [`crate::Mode`] is not draft need it.
pub const EXTEND: u32 = 4;

/// Version in which a handoff leaves out what layers with sliding windows do not need
/// ([`crate::KvSchema::due_blocks`]). Nodes of models with windows speak no earlier one ([`crate::KvSchema::protocol`]):
/// their two sides would not agree on what is complete.
pub const WINDOWS: u32 = 4;

/// Two services have no version of the protocol in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("protocol versions do not overlap: {0} and {1}")]
pub struct ProtocolMismatch(pub ProtocolVersions, pub ProtocolVersions);

impl ProtocolVersions {
    /// The versions of a service that does not state them: they were first stated in version 2.
    pub const UNSTATED: Self = Self { oldest: 1, newest: 1 };

    /// The newest version that both sides speak.
    pub fn common(self, peer: Self) -> Result<u32, ProtocolMismatch> {
        self.check_peer(peer).map(|()| self.newest.min(peer.newest))
    }

    /// Checks that both sides have a version in common.
    pub fn check_peer(self, peer: Self) -> Result<(), ProtocolMismatch> {
        match self.oldest.max(peer.oldest) <= self.newest.min(peer.newest) {
            true => Ok(()),
            false => Err(ProtocolMismatch(self, peer)),
        }
    }
}

impl fmt::Display for ProtocolVersions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.oldest == self.newest {
            true => write!(f, "{}", self.newest),
            false => write!(f, "{} to {}", self.oldest, self.newest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_need_a_common_version() {
        let versions = |oldest, newest| ProtocolVersions { oldest, newest };
        assert_eq!(versions(1, 2).check_peer(versions(2, 3)), Ok(()));
        assert_eq!(versions(2, 3).check_peer(versions(1, 2)), Ok(()));
        assert_eq!(versions(1, 2).common(versions(1, 3)), Ok(2));
        assert_eq!(PROTOCOL.common(ProtocolVersions::UNSTATED), Ok(1));
        let mismatch = versions(1, 2).check_peer(versions(3, 3)).unwrap_err();
        assert_eq!(mismatch.to_string(), "protocol versions do not overlap: 1 to 2 and 3");
        // A release from before this field existed says nothing, which reads as 0.
        assert!(PROTOCOL.check_peer(versions(0, 0)).is_err());
    }
}
