//! What reads bytes from a network or from a stranger's file, each as one function from bytes, with the properties that
//! hold whatever they are.
//!
//! `cargo fuzz` runs them one by one, guided by coverage (`fuzz_targets/`; how: docs/reliability.md). `tests/replay.rs`
//! runs all of them over the inputs in `seeds/` and over mutations of these, as an ordinary test, and watches what they
//! allocate.

mod files;
mod frames;
mod handoff;
mod http;
mod input;
mod messages;
pub mod mutate;
pub mod seeds;
mod text;

pub use files::{gguf, model_folder, safetensors};
pub use frames::frames;
pub use handoff::handoff;
pub use http::http_bodies;
pub use messages::messages;
pub use text::{chat_messages, chat_template, detokenizer, stop_texts};

/// One function under test.
pub struct Target {
    /// Its name, that of its folder in `seeds/` and of its file in `fuzz_targets/`.
    pub name: &'static str,
    /// Panics where a property does not hold.
    pub run: fn(&[u8]),
    /// Most bytes that it may have allocated at once, however short the input.
    pub base_bytes: usize,
    /// As many more for each byte of input.
    pub bytes_per_byte: usize,
    /// How often the ordinary test runs it.
    pub runs: usize,
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// All of them.
///
/// A byte of JSON becomes a value of 32 bytes, in a list that doubles as it grows, and once more where a field may have
/// several forms; a byte of protobuf may be an empty message of a few hundred.
pub const TARGETS: [Target; 11] = [
    Target { name: "frames", run: frames, base_bytes: KIB, bytes_per_byte: 1, runs: 60_000 },
    Target { name: "handoff", run: handoff, base_bytes: 16 * KIB, bytes_per_byte: 64, runs: 60_000 },
    Target { name: "messages", run: messages, base_bytes: 64 * KIB, bytes_per_byte: 1024, runs: 60_000 },
    Target { name: "http_bodies", run: http_bodies, base_bytes: MIB, bytes_per_byte: 1024, runs: 20_000 },
    Target { name: "safetensors", run: safetensors, base_bytes: 256 * KIB, bytes_per_byte: 256, runs: 4_000 },
    Target { name: "gguf", run: gguf, base_bytes: 256 * KIB, bytes_per_byte: 256, runs: 4_000 },
    Target { name: "model_folder", run: model_folder, base_bytes: 4 * MIB, bytes_per_byte: 256, runs: 4_000 },
    Target { name: "chat_messages", run: chat_messages, base_bytes: MIB, bytes_per_byte: 1024, runs: 4_000 },
    Target { name: "chat_template", run: chat_template, base_bytes: 16 * MIB, bytes_per_byte: 1024, runs: 3_000 },
    Target { name: "detokenizer", run: detokenizer, base_bytes: 256 * KIB, bytes_per_byte: 1024, runs: 2_000 },
    Target { name: "stop_texts", run: stop_texts, base_bytes: 16 * KIB, bytes_per_byte: 64, runs: 60_000 },
];
