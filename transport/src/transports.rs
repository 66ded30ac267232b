//! Which transports of KV a node uses.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use overfill_kv::{KvStore, KvTransport, TransportSet};

use crate::nccl::{Agent, NcclError, NcclOptions};
use crate::rdma::{DeviceChoice, Pool, RdmaError};

/// What an operator asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// RDMA if it can be used, else TCP. Each handoff uses the best transport that both of its nodes have. Never NCCL, whose
    /// kernels take processors of the GPU from the model.
    #[default]
    Auto,
    /// This transport and no other.
    Only(KvTransport),
}

impl TransportChoice {
    /// The names, for error texts.
    pub const NAMES: &str = "auto, tcp, rdma or nccl";
}

impl FromStr for TransportChoice {
    type Err = TransportError;

    fn from_str(text: &str) -> Result<Self, TransportError> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => match KvTransport::ALL.into_iter().find(|transport| transport.as_str() == text) {
                Some(transport) => Ok(Self::Only(transport)),
                None => Err(TransportError::Unknown(text.to_owned())),
            },
        }
    }
}

impl fmt::Display for TransportChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Only(transport) => transport.fmt(f),
        }
    }
}

/// Why a node can't use the transports that were asked for.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// There is no such transport.
    #[error("{0:?} is not a KV transport; there are {names}", names = TransportChoice::NAMES)]
    Unknown(String),
    /// The operator has not allowed data to leave unencrypted.
    #[error(
        "{0} does not encrypt, but this cluster uses TLS: KV, from which prompts can be reconstructed, would be readable on the network"
    )]
    Plain(KvTransport),
    /// NCCL can't be used.
    #[error(transparent)]
    Nccl(#[from] NcclError),
    /// RDMA can't be used.
    #[error(transparent)]
    Rdma(#[from] RdmaError),
}

/// How transports may be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransportOptions {
    /// The device of RDMA; `None`: the first one with an active port.
    pub rdma_device: Option<DeviceChoice>,
    /// Whether connections between services are encrypted.
    pub encrypted_cluster: bool,
    /// Whether RDMA may move KV unencrypted nevertheless.
    pub allow_plain_rdma: bool,
    /// The same for NCCL.
    pub allow_plain_nccl: bool,
    /// Sizes and time limits of NCCL.
    pub nccl: NcclOptions,
}

/// The transports that a node uses, their resources, and how often each was used.
pub struct Transports {
    usable: TransportSet,
    rdma: Option<Arc<Pool>>,
    nccl: Option<Arc<Agent>>,
    /// Why these, for the log.
    reason: String,
    /// Successful handoffs, in the order of [`KvTransport::ALL`].
    handoffs: [AtomicU64; 3],
}

impl Transports {
    fn new(usable: &[KvTransport], rdma: Option<Pool>, nccl: Option<Agent>, reason: String) -> Arc<Self> {
        let (rdma, nccl) = (rdma.map(Arc::new), nccl.map(Arc::new));
        Arc::new(Self { usable: TransportSet::of(usable), rdma, nccl, reason, handoffs: Default::default() })
    }

    /// TCP only.
    pub fn tcp() -> Arc<Self> {
        Self::new(&[KvTransport::Tcp], None, None, "asked for".into())
    }

    /// Checks what can be known without a device.
    ///
    /// # Errors
    /// The transport that was asked for by name is not part of this build, or would send plain data.
    pub fn check(choice: TransportChoice, options: &TransportOptions) -> Result<(), TransportError> {
        match choice {
            TransportChoice::Only(KvTransport::Nccl) => {
                if !cfg!(feature = "nccl") {
                    return Err(NcclError::NotBuilt.into());
                }
                match options.encrypted_cluster && !options.allow_plain_nccl {
                    true => Err(TransportError::Plain(KvTransport::Nccl)),
                    false => Ok(()),
                }
            }
            TransportChoice::Only(KvTransport::Rdma) => {
                if !cfg!(feature = "rdma") {
                    return Err(RdmaError::NotBuilt.into());
                }
                match options.encrypted_cluster && !options.allow_plain_rdma {
                    true => Err(TransportError::Plain(KvTransport::Rdma)),
                    false => Ok(()),
                }
            }
            TransportChoice::Only(KvTransport::Tcp) | TransportChoice::Auto => Ok(()),
        }
    }

    /// Opens what the choice needs, for the KV in `store`. Can take seconds, see [`Pool::open`].
    ///
    /// # Errors
    /// The transport that was asked for by name can't be used. `auto` never fails.
    pub fn open(
        choice: TransportChoice,
        options: &TransportOptions,
        store: Arc<dyn KvStore>,
    ) -> Result<Arc<Self>, TransportError> {
        Self::check(choice, options)?;
        match choice {
            TransportChoice::Only(KvTransport::Rdma) => {
                let pool = Pool::open(options.rdma_device.as_ref(), store)?;
                let reason = format!("asked for; {}", pool.describe());
                Ok(Self::new(&[KvTransport::Rdma], Some(pool), None, reason))
            }
            TransportChoice::Only(KvTransport::Nccl) => {
                let agent = Agent::open(options.nccl, store)?;
                let reason = format!("asked for; {}", agent.describe());
                Ok(Self::new(&[KvTransport::Nccl], None, Some(agent), reason))
            }
            TransportChoice::Only(KvTransport::Tcp) => Ok(Self::tcp()),
            TransportChoice::Auto => {
                let rdma = Self::check(TransportChoice::Only(KvTransport::Rdma), options)
                    .and_then(|()| Ok(Pool::open(options.rdma_device.as_ref(), store)?));
                Ok(match rdma {
                    Ok(pool) => {
                        let reason = format!("auto; {}", pool.describe());
                        Self::new(&[KvTransport::Rdma, KvTransport::Tcp], Some(pool), None, reason)
                    }
                    Err(error) => Self::new(&[KvTransport::Tcp], None, None, format!("auto; {error}")),
                })
            }
        }
    }

    /// The transports that this node uses.
    pub fn usable(&self) -> TransportSet {
        self.usable
    }

    /// Why these, for the log.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Successful handoffs over `transport`.
    pub fn handoffs(&self, transport: KvTransport) -> u64 {
        self.counter(transport).load(Ordering::Relaxed)
    }

    pub(crate) fn count(&self, transport: KvTransport) {
        self.counter(transport).fetch_add(1, Ordering::Relaxed);
    }

    fn counter(&self, transport: KvTransport) -> &AtomicU64 {
        let [rdma, nccl, tcp] = &self.handoffs;
        match transport {
            KvTransport::Rdma => rdma,
            KvTransport::Nccl => nccl,
            KvTransport::Tcp => tcp,
        }
    }

    /// Communicators of NCCL made so far.
    pub fn communicators(&self) -> u64 {
        self.nccl.as_ref().map_or(0, |agent| agent.communicators())
    }

    pub(crate) fn nccl(&self) -> Option<&Arc<Agent>> {
        self.nccl.as_ref()
    }

    pub(crate) fn rdma(&self) -> Option<&Arc<Pool>> {
        self.rdma.as_ref()
    }
}

impl fmt::Debug for Transports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Transports({})", self.usable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStore;

    fn open(choice: &str, options: &TransportOptions) -> Result<Arc<Transports>, TransportError> {
        Transports::open(choice.parse()?, options, Arc::new(MemoryStore::new(1, 1, 64)))
    }

    #[test]
    fn what_is_asked_for_by_name_is_used_or_refused() {
        let plain = TransportOptions::default();
        assert_eq!(open("tcp", &plain).unwrap().usable().to_string(), "tcp");
        // The store is in host memory.
        assert!(open("nccl", &plain).unwrap_err().to_string().contains("NCCL"));
        assert!(open("udp", &plain).unwrap_err().to_string().contains("auto, tcp, rdma or nccl"));
        assert!(open("auto", &plain).unwrap().usable().contains(KvTransport::Tcp));
        // Whether this system has a device or not: no such name.
        let rdma_device = Some("no-such-device".parse().unwrap());
        assert!(open("rdma", &TransportOptions { rdma_device, ..TransportOptions::default() }).is_err());
    }

    #[cfg(feature = "rdma")]
    #[test]
    fn an_encrypted_cluster_sends_plain_kv_only_if_allowed() {
        let encrypted = TransportOptions { encrypted_cluster: true, ..TransportOptions::default() };
        assert!(matches!(open("rdma", &encrypted), Err(TransportError::Plain(KvTransport::Rdma))));
        let auto = open("auto", &encrypted).unwrap();
        assert_eq!(auto.usable().to_string(), "tcp");
        assert!(auto.reason().contains("rdma does not encrypt"), "{}", auto.reason());
        let allowed = TransportOptions { allow_plain_rdma: true, ..encrypted };
        assert!(!matches!(open("rdma", &allowed), Err(TransportError::Plain(KvTransport::Rdma))));
    }
}
