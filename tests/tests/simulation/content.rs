//! Output of simulated models: every token and every byte of KV is a function of the preceding tokens. KV also depends
//! on the model that computes it.

use std::ops::Range;

use overfill_kv::{BLOCK_TOKENS, KvDtype, KvSchema, RopeSpec};
use overfill_simulated::{EOS, text_files};
use overfill_text::TextFiles;
use std::sync::LazyLock;

/// Number of layers of the full model.
pub const LAYERS: u32 = 3;
/// KV bytes of one token in one layer.
pub const ROW_BYTES: usize = 16;
/// KV bytes of one block in one layer.
pub const BLOCK_BYTES: usize = ROW_BYTES * BLOCK_TOKENS;
/// Name and fingerprint of the full model.
pub const FULL: &str = "full";
/// Name of the decode nodes' model.
pub const PRUNED: &str = "pruned";

/// Tokenizer and templates, created once.
pub static FILES: LazyLock<TextFiles> = LazyLock::new(text_files);

/// Sliding window of each layer of the full model.
pub type LayerWindows = [Option<usize>; LAYERS as usize];

/// Returns the schema of a model that uses these layers of the full model's KV.
pub fn schema(layers: &[u32], windows: &LayerWindows) -> KvSchema {
    static SHA256: LazyLock<String> = LazyLock::new(|| overfill_simulated::Options::default().schema.tokenizer_sha256);
    let rope = RopeSpec { theta: 1e4, scaling: "none".into() };
    let layer_attention: Vec<_> = layers.iter().map(|layer| rope.of_layer(windows[*layer as usize])).collect();
    let plain = layer_attention.iter().all(|layer| layer.window.is_none());
    KvSchema {
        layers: layers.to_vec(),
        kv_heads: 1,
        head_dim: 2,
        rope,
        layer_attention: if plain { Vec::new() } else { layer_attention },
        dtype: KvDtype::F32,
        block_tokens: BLOCK_TOKENS as u32,
        vocab_size: 259,
        tokenizer_sha256: SHA256.clone(),
        full_model: Some(FULL.into()),
    }
}

fn mix(hash: u64, value: u64) -> u64 {
    let mut z = (hash ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Returns the token that follows `tokens`: a letter, or sometimes the end-of-text token.
pub fn next_token(tokens: &[u32]) -> u32 {
    let hash = tokens.iter().fold(0, |hash, token| mix(hash, u64::from(*token)));
    if hash.is_multiple_of(60) { EOS } else { u32::from(b'a') + 3 + (hash % 26) as u32 }
}

/// Returns what the pruned model drafts after `tokens`: in three cases of four, what the full model would say.
pub fn draft_token(tokens: &[u32]) -> u32 {
    let token = next_token(tokens);
    let other = tokens.iter().fold(7, |hash, token| mix(hash, u64::from(*token))).is_multiple_of(4);
    if other { u32::from(b'a') + 3 + (token + 1) % 26 } else { token }
}

/// KV of a token sequence, as computed by a model.
pub struct Content {
    /// For each position, the hash of all tokens up to it.
    prefixes: Vec<u64>,
    model: u64,
}

impl Content {
    /// KV of `tokens`, as computed by `model`.
    pub fn new(tokens: &[u32], model: &str) -> Self {
        let mut hash = 0;
        let prefixes = tokens.iter().map(|token| (hash = mix(hash, u64::from(*token)), hash).1);
        Self { prefixes: prefixes.collect(), model: model.bytes().fold(1, |hash, byte| mix(hash, u64::from(byte))) }
    }

    /// KV of one position in a layer of the full model. Positions after the last token have filler, which is also sent.
    pub fn row(&self, layer: u32, position: usize) -> [u8; ROW_BYTES] {
        let prefix = match self.prefixes.get(position) {
            Some(prefix) => *prefix,
            None => mix(self.prefixes.last().copied().unwrap_or(0), position as u64 | 1 << 40),
        };
        let first = mix(mix(self.model, u64::from(layer)), prefix);
        let mut row = [0; ROW_BYTES];
        row[..8].copy_from_slice(&first.to_le_bytes());
        row[8..].copy_from_slice(&mix(first, 1).to_le_bytes());
        row
    }

    /// KV of one block in a layer.
    pub fn block(&self, layer: u32, index: usize) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        for (i, place) in block.chunks_exact_mut(ROW_BYTES).enumerate() {
            place.copy_from_slice(&self.row(layer, index * BLOCK_TOKENS + i));
        }
        block
    }
}

/// Returns the output of an undisturbed request: up to `max_tokens`, or until the end-of-text token unless ignored.
pub fn output(prompt: &[u32], max_tokens: u32, ignore_eos: bool) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..max_tokens {
        let token = next_token(&tokens);
        tokens.push(token);
        if token == EOS && !ignore_eos {
            break;
        }
    }
    tokens.split_off(prompt.len())
}

/// Byte range of a token's KV in its block.
pub fn row_place(position: usize) -> Range<usize> {
    let start = position % BLOCK_TOKENS * ROW_BYTES;
    start..start + ROW_BYTES
}
