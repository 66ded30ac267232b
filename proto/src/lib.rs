//! The wire: `overfill.v1` as generated from `proto/`, and the conversions between it and the domain types of
//! [`overfill_kv`]. Generated types are for the edges of a service; behind them only domain types are used.

mod convert;

pub use convert::{InvalidField, ticket_from_wire};

/// Generated messages, clients and servers of package `overfill.v1`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::large_futures)]
pub mod v1 {
    tonic::include_proto!("overfill.v1");
}

/// The compiled .proto files, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/overfill.v1.bin"));

/// Largest gRPC message that a service sends or takes, in bytes: a tokenizer.json of 32 MiB fits.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;
