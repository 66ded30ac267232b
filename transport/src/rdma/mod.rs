//! KV over RDMA: the sender's device writes into the receiver's KV memory, without its processor.
//!
//! Each handoff has a queue pair of its own on either side. The handoff's TCP connection stays for control: hello and
//! answer exchange the addresses, headers and checksums announce what was written, a commit ends the handoff. A piece has
//! landed when the receiver's own device has reported the write that ends it *and* its header has come. What the sender's
//! device reports says nothing about the receiver's memory. The checksum, computed from the receiver's memory, decides.
//!
//! The receiver alone can end a writer, whatever state the sender is in: it takes its queue pair to the error state and
//! destroys it ([`Target::revoke`]). From then on its device drops what arrives (KV-1). The sender destroys its queue pair
//! before it releases blocks, so its device reads none that are released (KV-2).
//!
//! Memory: a store in host memory is registered as a whole, once. So is a store whose device exports its memory as a dma-buf.
//! Other KV goes through a staging area of the handoff: the sender copies a piece into its own and writes it to a slot of
//! the receiver's, which checks it and copies it out, then says that the slot is free.
//!
//! Without the feature `rdma`, nothing can be opened, and the types have no values.

#[cfg(not(feature = "rdma"))]
mod absent;
#[cfg(feature = "rdma")]
mod device;
#[cfg(feature = "rdma")]
mod plain;
#[cfg(feature = "rdma")]
mod queue;
#[cfg(feature = "rdma")]
mod target;
#[cfg(feature = "rdma")]
mod verbs;
#[cfg(feature = "rdma")]
mod writer;

use std::fmt;
use std::str::FromStr;

#[cfg(not(feature = "rdma"))]
pub use absent::Pool;
#[cfg(not(feature = "rdma"))]
pub(crate) use absent::{Queue, Target, Writer, plain_writes};
#[cfg(feature = "rdma")]
pub use device::Pool;
#[cfg(feature = "rdma")]
pub(crate) use plain::plain_writes;
#[cfg(feature = "rdma")]
pub(crate) use queue::Queue;
#[cfg(feature = "rdma")]
pub(crate) use target::Target;
#[cfg(feature = "rdma")]
pub(crate) use writer::Writer;

/// Maximum number of blocks in a piece that is written one-sided. Each needs a work request if blocks are scattered.
pub(crate) const MAX_PIECE_BLOCKS: u32 = 256;

/// Address of a queue pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RdmaAddress {
    /// Number of the queue pair, 24 bits.
    pub qp: u32,
    /// First packet number, 24 bits.
    pub psn: u32,
    /// Global address of the port.
    pub gid: [u8; 16],
    /// Local address of the port; 0 on Ethernet.
    pub lid: u16,
    /// Code of the maximum packet size: 1 is 256 bytes, 5 is 4096.
    pub mtu: u8,
}

/// Memory of the receiver into which the sender may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Address of the first byte, as the receiver's device knows it.
    pub address: u64,
    /// Key of the memory region.
    pub key: u32,
}

/// Where the blocks of an attempt go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Number and size in bytes of the slots of a staging area. `None`: pieces go straight to their blocks.
    pub staging: Option<(u16, u32)>,
    /// The memory of each layer; or the staging area.
    pub layers: Vec<Place>,
    /// Index of each block of the attempt within its layer's memory; empty for a staging area.
    pub blocks: Vec<u32>,
}

/// What a receiver grants to a sender: its queue pair, and where to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The receiver's queue pair.
    pub address: RdmaAddress,
    /// Where the blocks go.
    pub places: Places,
}

/// Blocks that a sender writes.
#[cfg_attr(not(feature = "rdma"), expect(dead_code, reason = "nothing can be written"))]
pub(crate) struct Source<'a> {
    /// Number of the layer on the wire.
    pub wire_layer: usize,
    /// Index of the layer in the local store.
    pub store_layer: usize,
    /// Position of the first block among those of the attempt.
    pub first: usize,
    /// The blocks in the local store.
    pub ids: &'a [overfill_kv::BlockId],
}

/// A device, and optionally one of its ports and the index of an address of that port: `mlx5_0`, `mlx5_0:1` or
/// `mlx5_0:1:3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceChoice {
    /// Name of the device.
    pub name: String,
    /// Number of the port; `None`: the first one that is active.
    pub port: Option<u8>,
    /// Index of the GID; `None`: the best one.
    pub gid_index: Option<u8>,
}

impl DeviceChoice {
    /// What a choice must look like, for error texts.
    pub const FORM: &str = "NAME, NAME:PORT or NAME:PORT:GID_INDEX";
}

impl FromStr for DeviceChoice {
    type Err = RdmaError;

    fn from_str(text: &str) -> Result<Self, RdmaError> {
        let wrong = || RdmaError::Choice(text.to_owned());
        let mut parts = text.split(':');
        let name = parts.next().filter(|name| !name.is_empty()).ok_or_else(wrong)?.to_owned();
        let mut number = |least: u8| match parts.next() {
            None => Ok(None),
            Some(part) => part.parse().ok().filter(|n| *n >= least).map(Some).ok_or_else(wrong),
        };
        let (port, gid_index) = (number(1)?, number(0)?);
        match parts.next() {
            None => Ok(Self { name, port, gid_index }),
            Some(_) => Err(wrong()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        for number in [self.port, self.gid_index].into_iter().flatten() {
            write!(f, ":{number}")?;
        }
        Ok(())
    }
}

/// Why RDMA can't be used, or failed.
#[derive(Debug, thiserror::Error)]
pub enum RdmaError {
    /// The program was built without RDMA.
    #[error("this build has no RDMA (cargo feature rdma)")]
    NotBuilt,
    /// The system has no RDMA device, or no library for it.
    #[error("no RDMA device: {0}")]
    NoDevice(String),
    /// The chosen device has no active port or address.
    #[error("RDMA device {device}: {problem}")]
    Device {
        /// Name of the device.
        device: String,
        /// What is missing.
        problem: String,
    },
    /// The text does not name a device.
    #[error("{0:?} is not {form}", form = DeviceChoice::FORM)]
    Choice(String),
    /// A call of the verbs library failed.
    #[error("RDMA: {call}: {error}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// The library's error.
        error: String,
    },
    /// The device reported that a work request failed.
    #[error("RDMA write failed: {0}")]
    Work(String),
    /// The other side's grant or write does not fit the attempt.
    #[error("RDMA: {0} does not fit the attempt")]
    Mismatch(&'static str),
    /// A store could not be read or written.
    #[error(transparent)]
    Store(#[from] overfill_kv::StoreError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_may_be_named_with_port_and_address() {
        for text in ["mlx5_0", "mlx5_0:1", "rxe0:1:3"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        for text in ["", ":1", "a:0", "a:1:256", "a:1:2:3", "a:x"] {
            assert!(text.parse::<DeviceChoice>().unwrap_err().to_string().contains("NAME:PORT:GID_INDEX"), "{text}");
        }
    }
}
