//! The table of parameters: what a decoder computes with, what each dimension counts, and the names in files.

/// A parameter, by its role in the computation. The same name in files may have another role in another family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Parameter {
    /// Token embeddings.
    Embedding,
    /// Norm of attention's input. Without it, attention reads the residual stream as it is.
    AttentionNorm,
    /// Projection to queries.
    Query,
    /// Projection to keys.
    Key,
    /// Projection to values.
    Value,
    /// Norm of queries, before rotation.
    QueryNorm,
    /// Norm of keys, before rotation.
    KeyNorm,
    /// Projection from the heads back to the residual stream.
    AttentionOutput,
    /// Norm of what attention adds to the residual stream.
    AttentionOutputNorm,
    /// Norm of the MLP's input. Without it, the MLP reads the residual stream as it is.
    MlpNorm,
    /// The MLP projection that the activation function is applied to.
    Gate,
    /// The MLP projection that is multiplied with the activated gate.
    Up,
    /// Projection from the MLP back to the residual stream.
    Down,
    /// Norm of what the MLP adds to the residual stream.
    MlpOutputNorm,
    /// Norm before the head.
    FinalNorm,
    /// Projection to logits. Models without it use the embedding.
    Head,
}

impl Parameter {
    /// Whether rotation pairs its rows.
    pub(crate) fn is_rotated(self) -> bool {
        matches!(self, Self::Query | Self::Key)
    }
}

/// What a dimension counts. Pruning only cuts `Hidden` and `Intermediate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Token ids.
    Vocabulary,
    /// Channels of the residual stream.
    Hidden,
    /// Channels within the MLP.
    Intermediate,
    /// Channels of all query heads, `num_attention_heads * head_dim`.
    QueryHeads,
    /// Channels of all key or value heads, `num_key_value_heads * head_dim`.
    KvHeads,
    /// Channels of one head.
    HeadDim,
}

/// The kind of a module's tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `[rows, columns]`; `[rows]` for a norm.
    Weight,
    /// `[rows]`.
    Bias,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Bias => "bias",
        }
    }
}

/// Which models of a family have a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// All models.
    Always,
    /// No model.
    Never,
    /// Models whose config.json sets `attention_bias`.
    AttentionBias,
    /// Models whose config.json sets `mlp_bias`.
    MlpBias,
    /// Models with a separate head, that is without `tie_word_embeddings`.
    Untied,
}

/// What files store under one name: a weight and optionally a bias, of one parameter or of several fused ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// Name in Hugging Face files; for a layer's module, the part after `model.layers.N.`.
    pub name: &'static str,
    /// Name in GGUF files; for a layer's module, the part after `blk.N.`.
    pub gguf: &'static str,
    /// Whether every layer has one.
    pub in_layer: bool,
    /// The parameters whose rows it holds, in order from the first row, and what the rows of each count.
    pub parts: &'static [(Parameter, Axis)],
    /// What the columns count; `None` for a vector.
    pub columns: Option<Axis>,
    /// Models that have its weight.
    pub weight: When,
    /// Models that have its bias.
    pub bias: When,
}

type Parts = &'static [(Parameter, Axis)];

/// A norm in every layer.
const fn norm(name: &'static str, gguf: &'static str, parts: Parts) -> Module {
    Module { name, gguf, in_layer: true, parts, columns: None, weight: When::Always, bias: When::Never }
}

/// A matrix in every layer.
const fn matrix(name: &'static str, gguf: &'static str, parts: Parts, columns: Axis, bias: When) -> Module {
    Module { name, gguf, in_layer: true, parts, columns: Some(columns), weight: When::Always, bias }
}

/// A matrix with one row per token id.
const fn vocabulary(name: &'static str, gguf: &'static str, parts: Parts, weight: When) -> Module {
    Module { name, gguf, in_layer: false, parts, columns: Some(Axis::Hidden), weight, bias: When::Never }
}

pub(super) const EMBEDDING: Module =
    vocabulary("model.embed_tokens", "token_embd", &[(Parameter::Embedding, Axis::Vocabulary)], When::Always);

pub(super) const ATTENTION_NORM: Module =
    norm("input_layernorm", "attn_norm", &[(Parameter::AttentionNorm, Axis::Hidden)]);

pub(super) const MLP_NORM: Module = norm("post_attention_layernorm", "ffn_norm", &[(Parameter::MlpNorm, Axis::Hidden)]);

pub(super) const QUERY: Module =
    matrix("self_attn.q_proj", "attn_q", &[(Parameter::Query, Axis::QueryHeads)], Axis::Hidden, When::AttentionBias);

pub(super) const KEY: Module =
    matrix("self_attn.k_proj", "attn_k", &[(Parameter::Key, Axis::KvHeads)], Axis::Hidden, When::AttentionBias);

pub(super) const VALUE: Module =
    matrix("self_attn.v_proj", "attn_v", &[(Parameter::Value, Axis::KvHeads)], Axis::Hidden, When::AttentionBias);

pub(super) const ATTENTION_OUTPUT: Module = matrix(
    "self_attn.o_proj",
    "attn_output",
    &[(Parameter::AttentionOutput, Axis::Hidden)],
    Axis::QueryHeads,
    When::AttentionBias,
);

pub(super) const GATE: Module =
    matrix("mlp.gate_proj", "ffn_gate", &[(Parameter::Gate, Axis::Intermediate)], Axis::Hidden, When::MlpBias);

pub(super) const UP: Module =
    matrix("mlp.up_proj", "ffn_up", &[(Parameter::Up, Axis::Intermediate)], Axis::Hidden, When::MlpBias);

pub(super) const DOWN: Module =
    matrix("mlp.down_proj", "ffn_down", &[(Parameter::Down, Axis::Hidden)], Axis::Intermediate, When::MlpBias);

pub(super) const QUERY_NORM: Module = norm("self_attn.q_norm", "attn_q_norm", &[(Parameter::QueryNorm, Axis::HeadDim)]);

pub(super) const KEY_NORM: Module = norm("self_attn.k_norm", "attn_k_norm", &[(Parameter::KeyNorm, Axis::HeadDim)]);

/// `post_attention_layernorm` where it means what it says.
pub(super) const ATTENTION_OUTPUT_NORM: Module =
    norm("post_attention_layernorm", "post_attention_norm", &[(Parameter::AttentionOutputNorm, Axis::Hidden)]);

pub(super) const MLP_OUTPUT_NORM: Module =
    norm("post_feedforward_layernorm", "post_ffw_norm", &[(Parameter::MlpOutputNorm, Axis::Hidden)]);

pub(super) const FINAL_NORM: Module =
    Module { in_layer: false, ..norm("model.norm", "output_norm", &[(Parameter::FinalNorm, Axis::Hidden)]) };

pub(super) const HEAD: Module = vocabulary("lm_head", "output", &[(Parameter::Head, Axis::Vocabulary)], When::Untied);

/// Llama's modules, which most families share.
pub(super) const COMMON: &[Module] =
    &[EMBEDDING, ATTENTION_NORM, MLP_NORM, QUERY, KEY, VALUE, ATTENTION_OUTPUT, GATE, UP, DOWN, FINAL_NORM, HEAD];
