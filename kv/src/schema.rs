//! KV schema: what must match for one model to attend to another model's KV.

use std::{fmt, str::FromStr};

use sha2::{Digest, Sha256};

use crate::{BLOCK_TOKENS, PROTOCOL, ProtocolVersions, protocol::WINDOWS};

/// Element type of KV in memory and on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit float, 4 bytes.
    F32,
    /// bfloat16, 2 bytes.
    Bf16,
    /// 16-bit float, 2 bytes.
    F16,
    /// 8-bit float (e4m3), 1 byte. On GPUs only.
    Fp8,
}

impl KvDtype {
    /// The names of all types, for messages.
    pub const SUPPORTED: &str = "f32, bf16, f16 or fp8";

    /// Bytes per element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Fp8 => 1,
        }
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8 => "fp8",
        })
    }
}

impl FromStr for KvDtype {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            "fp8" => Ok(Self::Fp8),
            other => Err(format!("dtype must be {}, got {other:?}", Self::SUPPORTED)),
        }
    }
}

/// Parameters of the rotary embedding applied to the keys.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Base of the rotary frequencies.
    pub theta: f64,
    /// Canonical text of the frequency scaling: `none`, or its type and parameters.
    pub scaling: String,
}

impl RopeSpec {
    /// This rotation in a layer with a sliding window of `window` tokens, or without one.
    pub fn of_layer(&self, window: Option<usize>) -> LayerAttention {
        LayerAttention { rotation: format!("theta={} {}", self.theta, self.scaling), window }
    }
}

/// What a layer's keys are, and which of them a query attends to. Its text is `theta=10000 none window=512`, or
/// `window=none`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LayerAttention {
    /// Canonical text of the rotation.
    pub rotation: String,
    /// Sliding window: number of tokens that a query attends to, itself included, at least 1. `None`: all.
    pub window: Option<usize>,
}

impl fmt::Display for LayerAttention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.window {
            Some(tokens) => write!(f, "{} window={tokens}", self.rotation),
            None => write!(f, "{} window=none", self.rotation),
        }
    }
}

impl FromStr for LayerAttention {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let window = |text: &str| match text {
            "none" => Some(None),
            tokens => tokens.parse().ok().filter(|tokens| *tokens > 0).map(Some),
        };
        let parsed = text.rsplit_once(" window=").and_then(|(rotation, text)| Some((rotation, window(text)?)));
        let (rotation, window) = parsed.ok_or("a text that ends with window=none or window=TOKENS")?;
        Ok(Self { rotation: rotation.to_owned(), window })
    }
}

/// Layout of KV, and identity of the model and tokenizer that it was computed with.
///
/// One layer of one block is `[K|V][kv_heads][block_tokens][head_dim]`, elements little-endian.
#[derive(Clone, Debug, PartialEq)]
pub struct KvSchema {
    /// Indices of the full model's layers whose KV is stored, ascending.
    pub layers: Vec<u32>,
    /// KV heads per layer.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Rotary embedding already applied to the keys.
    pub rope: RopeSpec,
    /// If layers differ in rotation or have sliding windows: what each of `layers` attends to. Else empty.
    pub layer_attention: Vec<LayerAttention>,
    /// Element type.
    pub dtype: KvDtype,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Size of the vocabulary that both models share.
    pub vocab_size: u32,
    /// SHA-256 of tokenizer.json, lower-case hex.
    pub tokenizer_sha256: String,
    /// Fingerprint of the full model that computes the KV. `None` on a decode node whose model does not name one.
    pub full_model: Option<String>,
}

/// Error: a consumer cannot use a producer's KV.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("kv schema mismatch: {field} is {producer} on the prefill side and {consumer} on the decode side")]
pub struct SchemaMismatch {
    /// The field that differs.
    pub field: &'static str,
    /// Value on the side that computes the KV.
    pub producer: String,
    /// Value on the side that attends to the KV.
    pub consumer: String,
}

impl KvSchema {
    /// Size of one block of one layer, in bytes.
    pub fn block_bytes(&self) -> usize {
        2 * self.kv_heads as usize * self.block_tokens as usize * self.head_dim as usize * self.dtype.size_bytes()
    }

    /// Checks that a decode node with schema `consumer` can attend to KV from a prefill node with schema `self`.
    ///
    /// All fields must be equal, except that the consumer may use a subset of the layers and may leave `full_model`
    /// unset. The error names the first field that differs.
    pub fn check_consumer(&self, consumer: &Self) -> Result<(), SchemaMismatch> {
        let Self {
            layers,
            kv_heads,
            head_dim,
            rope,
            layer_attention,
            dtype,
            block_tokens,
            vocab_size,
            tokenizer_sha256,
            full_model,
        } = self;
        fn same<T: PartialEq + fmt::Debug>(field: &'static str, p: &T, c: &T) -> Result<(), SchemaMismatch> {
            if p == c {
                return Ok(());
            }
            Err(SchemaMismatch { field, producer: format!("{p:?}"), consumer: format!("{c:?}") })
        }
        if consumer.layers.is_empty() || consumer.layers.iter().any(|l| !layers.contains(l)) {
            same("layers", layers, &consumer.layers)?;
        }
        same("kv_heads", kv_heads, &consumer.kv_heads)?;
        same("head_dim", head_dim, &consumer.head_dim)?;
        if layer_attention.is_empty() && consumer.layer_attention.is_empty() {
            same("rope.theta", &rope.theta, &consumer.rope.theta)?;
            same("rope.scaling", &rope.scaling, &consumer.rope.scaling)?;
        }
        for layer in &consumer.layers {
            let of = |schema: &Self| format!("layer {layer}: {}", schema.attention_of(*layer).unwrap_or_default());
            same("layer_attention", &of(self), &of(consumer))?;
        }
        same("dtype", dtype, &consumer.dtype)?;
        same("block_tokens", block_tokens, &consumer.block_tokens)?;
        same("vocab_size", vocab_size, &consumer.vocab_size)?;
        same("tokenizer_sha256", tokenizer_sha256, &consumer.tokenizer_sha256)?;
        match (full_model, &consumer.full_model) {
            (Some(p), Some(c)) => same("full_model", p, c),
            (_, None) => Ok(()),
            (None, Some(c)) => same("full_model", &String::new(), c),
        }
    }

    /// Text of what a layer's keys are; `None` if the layer is not stored.
    fn attention_of(&self, layer: u32) -> Option<String> {
        let at = self.layers.iter().position(|stored| *stored == layer)?;
        let attention = self.layer_attention.get(at).cloned();
        Some(attention.unwrap_or_else(|| self.rope.of_layer(None)).to_string())
    }

    /// The versions of the protocol that a node with this schema speaks.
    pub fn protocol(&self) -> ProtocolVersions {
        // Nodes of an earlier version send and expect all blocks of layers with windows.
        let oldest = if self.has_windows() { WINDOWS } else { PROTOCOL.oldest };
        ProtocolVersions { oldest, ..PROTOCOL }
    }

    /// Whether a layer has a sliding window.
    pub fn has_windows(&self) -> bool {
        self.layer_attention.iter().any(|layer| layer.window.is_some())
    }

    /// SHA-256 over all fields except `full_model`. Equal digests mean that both sides interpret KV bytes the same way.
    pub fn digest(&self) -> [u8; 32] {
        let Self {
            layers,
            kv_heads,
            head_dim,
            rope,
            layer_attention,
            dtype,
            block_tokens,
            vocab_size,
            tokenizer_sha256,
            full_model: _,
        } = self;
        let mut text = format!(
            "{layers:?}|{kv_heads}|{head_dim}|{}|{}|{dtype}|{block_tokens}|{vocab_size}|{tokenizer_sha256}",
            rope.theta, rope.scaling
        );
        // Earlier versions have no such field, and agree if it is empty.
        if !layer_attention.is_empty() {
            text += &format!("|{:?}", layer_attention.iter().map(ToString::to_string).collect::<Vec<_>>());
        }
        Sha256::digest(text).into()
    }

    /// The digest as lower-case hex.
    pub fn digest_hex(&self) -> String {
        self.digest().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The same schema with [`BLOCK_TOKENS`] tokens per block.
    pub fn with_default_blocks(mut self) -> Self {
        self.block_tokens = BLOCK_TOKENS as u32;
        self
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn schema() -> KvSchema {
        KvSchema {
            layers: vec![0, 1, 2],
            kv_heads: 2,
            head_dim: 16,
            rope: RopeSpec { theta: 10000.0, scaling: "none".into() },
            layer_attention: Vec::new(),
            dtype: KvDtype::F32,
            block_tokens: 16,
            vocab_size: 320,
            tokenizer_sha256: "aa".into(),
            full_model: Some("f".into()),
        }
    }

    /// A schema whose layers have these windows.
    pub(crate) fn schema_with_windows(windows: &[Option<usize>]) -> KvSchema {
        let count = if windows.is_empty() { 3 } else { windows.len() as u32 };
        KvSchema { layers: (0..count).collect(), layer_attention: attention(windows), ..schema() }
    }

    fn attention(windows: &[Option<usize>]) -> Vec<LayerAttention> {
        windows.iter().map(|window| schema().rope.of_layer(*window)).collect()
    }

    #[test]
    fn a_subset_of_layers_may_share() {
        let consumer = KvSchema { layers: vec![0, 2], full_model: None, ..schema() };
        schema().check_consumer(&consumer).unwrap();
        assert_eq!(schema().block_bytes(), 2 * 2 * 16 * 16 * 4);
    }

    #[test]
    fn layers_may_differ_if_both_sides_agree_on_each() {
        let producer = schema_with_windows(&[Some(8), None, Some(8)]);
        let consumer = |layers: &[u32], windows: &[Option<usize>]| KvSchema {
            layers: layers.to_vec(),
            layer_attention: attention(windows),
            ..schema()
        };
        producer.check_consumer(&producer).unwrap();
        producer.check_consumer(&consumer(&[0, 1], &[Some(8), None])).unwrap();
        // All of the consumer's layers are alike.
        producer.check_consumer(&consumer(&[1], &[])).unwrap();
        let mismatch = producer.check_consumer(&consumer(&[1, 2], &[])).unwrap_err();
        assert_eq!(mismatch.field, "layer_attention");
        assert!(mismatch.producer.contains("layer 2: theta=10000 none window=8"), "{mismatch}");
        assert!(mismatch.consumer.contains("layer 2: theta=10000 none window=none"), "{mismatch}");
        assert_eq!(schema().check_consumer(&producer).unwrap_err().field, "layer_attention");
        assert_ne!(producer.digest(), schema().digest());
    }

    #[test]
    fn the_attention_of_a_layer_is_a_text() {
        let scaled = RopeSpec { theta: 1e6, scaling: "linear factor=8".into() };
        for (attention, text) in [
            (scaled.of_layer(Some(512)), "theta=1000000 linear factor=8 window=512"),
            (scaled.of_layer(None), "theta=1000000 linear factor=8 window=none"),
        ] {
            assert_eq!(attention.to_string(), text);
            assert_eq!(text.parse(), Ok(attention));
        }
        for wrong in ["", "theta=1 none", "theta=1 none window=", "theta=1 none window=0", "theta=1 none window=-1"] {
            assert!(wrong.parse::<LayerAttention>().unwrap_err().contains("window=TOKENS"), "{wrong}");
        }
    }

    /// Nodes of earlier releases compute the same digests.
    #[test]
    fn digests_do_not_change() {
        let hex = |schema: KvSchema| schema.digest_hex();
        assert_eq!(hex(schema()), "2e7aaad46ac246d5b79e65f0c98c2b8c3cbbf203dc7d087213e783c649d552e1");
        assert_eq!(
            hex(schema_with_windows(&[Some(8), None, None])),
            "bbcdf9b46e07bdc812e391d85d8551fba06d9d491e3e2f5720b784f2fa9c50f3"
        );
    }

    #[test]
    fn nodes_with_windows_meet_only_nodes_that_know_what_is_due() {
        assert_eq!(schema_with_windows(&[None, None, None]).protocol(), PROTOCOL);
        let windowed = schema_with_windows(&[None, Some(8), None]).protocol();
        let before = ProtocolVersions { oldest: 1, newest: WINDOWS - 1 };
        assert!(windowed.check_peer(before).is_err() && windowed.check_peer(PROTOCOL).is_ok());
    }

    #[test]
    fn every_difference_is_named_with_both_values() {
        let p = schema();
        let cases: [(&str, KvSchema); 8] = [
            ("layers", KvSchema { layers: vec![3], ..p.clone() }),
            ("kv_heads", KvSchema { kv_heads: 3, ..p.clone() }),
            ("head_dim", KvSchema { head_dim: 8, ..p.clone() }),
            ("rope.theta", KvSchema { rope: RopeSpec { theta: 1.0, scaling: "none".into() }, ..p.clone() }),
            ("dtype", KvSchema { dtype: KvDtype::Bf16, ..p.clone() }),
            ("vocab_size", KvSchema { vocab_size: 9, ..p.clone() }),
            ("tokenizer_sha256", KvSchema { tokenizer_sha256: "bb".into(), ..p.clone() }),
            ("full_model", KvSchema { full_model: Some("g".into()), ..p.clone() }),
        ];
        for (field, consumer) in cases {
            let e = p.check_consumer(&consumer).unwrap_err();
            assert_eq!(e.field, field);
            assert_ne!(e.producer, e.consumer);
            assert_eq!(field == "full_model", p.digest() == consumer.digest());
        }
    }
}
