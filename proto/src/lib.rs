//! gRPC API: the package `overfill.v1`, generated from `proto/`, and conversions between its messages and the domain
//! types of [`overfill_kv`]. Services convert generated types at their edges and use only domain types inside.

mod convert;

pub use convert::{InvalidField, ticket_from_wire};

/// Messages, clients and servers generated from package `overfill.v1`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::large_futures)]
pub mod v1 {
    tonic::include_proto!("overfill.v1");
}

/// Encoded file descriptor set of the .proto files, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/overfill.v1.bin"));

/// Maximum size in bytes of a gRPC message sent or received by a service. A tokenizer.json of 32 MiB fits.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Maximum of `seconds_per_draft` in extensions and verdicts. No node that is of use takes longer.
pub const MAX_SECONDS_PER_DRAFT: f64 = 3600.0;
