//! Fuzz targets: one function per parser of bytes from the network or from untrusted files. Each checks properties that
//! must hold for every input.
//!
//! `cargo fuzz` runs single targets, guided by coverage (`fuzz_targets/`; see docs/reliability.md). `tests/replay.rs`
//! runs all targets as an ordinary test, on the inputs in `seeds/` and mutations of them, and limits their memory.

mod answers;
mod files;
mod frames;
mod handoff;
mod http;
mod input;
mod messages;
pub mod mutate;
pub mod seeds;
mod text;

pub use answers::answers;
pub use files::{gguf, model_folder, safetensors};
pub use frames::frames;
pub use handoff::handoff;
pub use http::http_bodies;
pub use messages::messages;
pub use text::{chat_messages, chat_template, detokenizer, stop_texts};

/// A fuzz target.
pub struct Target {
    /// Name of the target, of its folder in `seeds/` and of its file in `fuzz_targets/`.
    pub name: &'static str,
    /// Runs one input. Panics if a property does not hold.
    pub run: fn(&[u8]),
    /// Maximum bytes allocated at once for an empty input.
    pub base_bytes: usize,
    /// Additional bytes allowed for each byte of input.
    pub bytes_per_byte: usize,
    /// Number of mutated inputs in the ordinary test.
    pub runs: usize,
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// All targets.
///
/// A byte of JSON becomes a value of 32 bytes, in a list that doubles as it grows, and is copied once more if the field
/// may have several forms. A byte of protobuf may be an empty message of a few hundred bytes.
pub const TARGETS: [Target; 12] = [
    Target { name: "frames", run: frames, base_bytes: 4 * KIB, bytes_per_byte: 1, runs: 60_000 },
    Target { name: "handoff", run: handoff, base_bytes: 16 * KIB, bytes_per_byte: 64, runs: 60_000 },
    Target { name: "messages", run: messages, base_bytes: 64 * KIB, bytes_per_byte: 1024, runs: 60_000 },
    Target { name: "http_bodies", run: http_bodies, base_bytes: MIB, bytes_per_byte: 1024, runs: 20_000 },
    Target { name: "safetensors", run: safetensors, base_bytes: 256 * KIB, bytes_per_byte: 256, runs: 4_000 },
    Target { name: "gguf", run: gguf, base_bytes: 256 * KIB, bytes_per_byte: 256, runs: 4_000 },
    Target { name: "model_folder", run: model_folder, base_bytes: 4 * MIB, bytes_per_byte: 256, runs: 4_000 },
    Target { name: "chat_messages", run: chat_messages, base_bytes: MIB, bytes_per_byte: 1024, runs: 4_000 },
    Target { name: "chat_template", run: chat_template, base_bytes: 16 * MIB, bytes_per_byte: 1024, runs: 3_000 },
    Target { name: "detokenizer", run: detokenizer, base_bytes: 256 * KIB, bytes_per_byte: 1024, runs: 2_000 },
    Target { name: "answers", run: answers, base_bytes: 16 * KIB, bytes_per_byte: 256, runs: 20_000 },
    Target { name: "stop_texts", run: stop_texts, base_bytes: 16 * KIB, bytes_per_byte: 64, runs: 60_000 },
];
