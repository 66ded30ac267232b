//! The table of parameters: what a decoder computes with, what its dimensions count, and under which names files hold it.

/// What a decoder computes with, by its part in the computation. A name in files may mean another part in another family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Parameter {
    /// Vectors of the tokens.
    Embedding,
    /// Norm of attention's input.
    AttentionNorm,
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Norm of queries, before rotation.
    QueryNorm,
    /// Norm of keys, before rotation.
    KeyNorm,
    /// From the heads back to the residual stream.
    AttentionOutput,
    /// Norm of the MLP's input.
    MlpNorm,
    /// The half of the MLP that the activation is applied to.
    Gate,
    /// The half of the MLP that is multiplied with it.
    Up,
    /// From the MLP back to the residual stream.
    Down,
    /// Norm before the head.
    FinalNorm,
    /// Logits. Where a model has none, the embedding is its head.
    Head,
}

impl Parameter {
    /// Does rotation pair its rows?
    pub(crate) fn is_rotated(self) -> bool {
        matches!(self, Self::Query | Self::Key)
    }
}

/// What a dimension counts. Pruning cuts `Hidden` and `Intermediate` and leaves the others.
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

/// Which tensor of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `[rows, columns]`, or `[rows]` of a norm.
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
    /// All.
    Always,
    /// None.
    Never,
    /// Those whose config.json says `attention_bias`.
    AttentionBias,
    /// Those whose config.json says `mlp_bias`.
    MlpBias,
    /// Those whose head is not the embedding: without `tie_word_embeddings`.
    Untied,
}

/// What files store under one name: a weight and perhaps a bias, of one parameter or of several fused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// Hugging Face's name; of a layer's module the part after `model.layers.N.`.
    pub name: &'static str,
    /// GGUF's name; of a layer's module the part after `blk.N.`.
    pub gguf: &'static str,
    /// Does every layer have one?
    pub in_layer: bool,
    /// The parameters whose rows it holds, one below the other, and what the rows of each count.
    pub parts: &'static [(Parameter, Axis)],
    /// What the columns count; `None` is a vector.
    pub columns: Option<Axis>,
    /// Which models have its weight.
    pub weight: When,
    /// Which models have its bias.
    pub bias: When,
}

type Parts = &'static [(Parameter, Axis)];

/// A vector of every layer.
const fn norm(name: &'static str, gguf: &'static str, parts: Parts) -> Module {
    Module { name, gguf, in_layer: true, parts, columns: None, weight: When::Always, bias: When::Never }
}

/// A matrix of every layer.
const fn matrix(name: &'static str, gguf: &'static str, parts: Parts, columns: Axis, bias: When) -> Module {
    Module { name, gguf, in_layer: true, parts, columns: Some(columns), weight: When::Always, bias }
}

/// A matrix over the vocabulary.
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

pub(super) const FINAL_NORM: Module =
    Module { in_layer: false, ..norm("model.norm", "output_norm", &[(Parameter::FinalNorm, Axis::Hidden)]) };

pub(super) const HEAD: Module = vocabulary("lm_head", "output", &[(Parameter::Head, Axis::Vocabulary)], When::Untied);

/// The block that Llama began.
pub(super) const COMMON: &[Module] =
    &[EMBEDDING, ATTENTION_NORM, MLP_NORM, QUERY, KEY, VALUE, ATTENTION_OUTPUT, GATE, UP, DOWN, FINAL_NORM, HEAD];
