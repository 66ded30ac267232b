//! Families of models: what each has of its own. Everything else of this crate is the same for all of them.
//!
//! A new family needs a file here, an entry in [`FAMILIES`], kernels if its arithmetic is new, and nothing else. Its file says
//! the names of the architecture, the defaults and rules of its config.json, its table of parameters ([`parameters`]), and
//! the attention of each of its layers ([`LayerSpec`]).
//!
//! The table of parameters says what is computed. A decoder adds a bias, norms the heads of q, or has a head of its own where
//! the table has the parameter. So a place for a norm is a [`Parameter`] and not a flag, and what a parameter covers is its
//! [`Axis`]. Both decoders refuse a table with a tensor that they do not use.
//!
//! What families that are not here will add:
//!
//! - **Norms after attention and MLP** (Gemma 2 and 3, OLMo 2): two parameters, `AttentionOutputNorm` and `MlpOutputNorm`, and
//!   a step in each decoder for them. OLMo 2's table leaves out `AttentionNorm` and `MlpNorm`, which become optional there. In
//!   Gemma the module `post_attention_layernorm` is the norm of the output, and `pre_feedforward_layernorm` is the `MlpNorm`.
//! - **q/k norm over the whole width** (OLMo 2): its modules count `QueryHeads` and `KvHeads` where Qwen3's count `HeadDim`.
//!   The decoders norm by that axis.
//! - **Norms with weights around 0** (Gemma): a field of [`Family`]; loading adds 1.
//! - **gelu-tanh** (Gemma): `hidden_act` is read in config.rs, which refuses all but silu. It becomes a field of
//!   [`ModelConfig`](crate::ModelConfig), beside a kernel like `SiluMul`.
//! - **Embedding scale, residual multiplier, logit scale and cap** (Gemma, Granite): fields of [`OwnFields`] and `ModelConfig`,
//!   and a multiplication in each decoder.
//! - **A soft cap on scores** (Gemma 2): a field of [`LayerSpec`], and a kernel.
//! - **Scale of scores** (Gemma's `query_pre_attn_scalar`, Granite's `attention_multiplier`): [`LayerSpec::score_scale`].
//! - **Windows on some layers, two ropes** (Gemma 2 and 3): [`LayerSpec::window`] and [`LayerSpec::rope`] are each layer's own.
//!   Until attention has a window, the smallest one bounds the context. A `KvSchema` states one rope; [`rope_spec`] puts
//!   several into its text.
//! - **Layers without rope** (SmolLM3): [`LayerSpec::rope`] is `None`.
//! - **Fused tensors** (Phi-3's qkv_proj and gate_up_proj): a [`Module`] with several parts. Decoders find each part's rows,
//!   and pruning writes the tensor whole.
//! - **Rotation of a part of a head** (Phi-4): a field of [`Rope`], and a step in each decoder.
//! - **Metadata of GGUF files that is the family's own** (Gemma's soft caps and windows): a field of [`GgufFamily`] with the
//!   fields of config.json that they become.
//! - **Fields of config.json that count layers**: [`Family::keep_layers`] edits them after a depth cut.
//!
//! [`rope_spec`]: crate::ModelConfig::rope_spec

mod finder;
mod llama;
mod mistral;
mod parameters;
mod qwen2;
mod qwen3;
mod tensors;

use std::fmt;

use serde_json::{Map, Value};

use crate::{ModelError, Rope, config::Fields};

pub(crate) use finder::Finder;
pub use parameters::{Axis, Kind, Module, Parameter, When};
pub(crate) use tensors::TensorRows;
pub use tensors::TensorSpec;

/// All of them. Errors list them in this order.
const FAMILIES: [&Family; 4] = [&llama::FAMILY, &mistral::FAMILY, &qwen2::FAMILY, &qwen3::FAMILY];

/// What a family of models has of its own.
pub struct Family {
    /// What `architectures` in config.json names.
    pub class: &'static str,
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// How GGUF files write it; `None` where they write it as another family.
    pub(crate) gguf: Option<GgufFamily>,
    /// Width of a head, of hidden size and number of heads, where config.json does not state it.
    pub(crate) head_dim: fn(usize, usize) -> usize,
    /// Its parameters, in the order of the model.
    pub(crate) modules: &'static [Module],
    /// Reads config.json by the family's own rules: its fields, the number of layers, head_dim.
    pub(crate) read: fn(Fields<'_>, usize, usize) -> Result<OwnFields, ModelError>,
    /// Edits what is the family's own in the config.json of a model that keeps these layers alone.
    pub(crate) keep_layers: fn(&mut Map<String, Value>, &[u32]),
}

/// A family as GGUF files have it.
pub(crate) struct GgufFamily {
    /// `general.architecture`.
    pub(crate) architecture: &'static str,
    /// Does llama.cpp's converter interleave the rows of q and k, so that rotation pairs neighbours?
    pub(crate) interleaved: bool,
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.class == other.class
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type)
    }
}

impl Family {
    /// By config.json's `architectures`; by `model_type` where there is none.
    pub(crate) fn of_config(fields: Fields<'_>) -> Result<&'static Self, ModelError> {
        let class = fields.present("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let model_type = fields.present("model_type").and_then(Value::as_str);
        let named = |family: &&&Self| class.map_or(model_type == Some(family.model_type), |c| c == family.class);
        FAMILIES.iter().find(named).copied().ok_or_else(|| {
            let classes: Vec<&str> = FAMILIES.iter().map(|family| family.class).collect();
            fields.bad("architectures", &classes.join(", "))
        })
    }

    /// By a GGUF file's `general.architecture`; the error lists those that there are.
    pub(crate) fn of_gguf(architecture: Option<&str>) -> Result<(&'static Self, &'static GgufFamily), String> {
        let families = || FAMILIES.iter().filter_map(|family| Some((*family, family.gguf.as_ref()?)));
        families().find(|(_, gguf)| architecture == Some(gguf.architecture)).ok_or_else(|| {
            let known: Vec<&str> = families().map(|(_, gguf)| gguf.architecture).collect();
            known.join(", ")
        })
    }
}

/// Attention of one layer, as far as layers of a model may differ.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Index of its rotary embedding in [`ModelConfig::ropes`](crate::ModelConfig::ropes); `None` rotates nothing.
    pub rope: Option<usize>,
    /// Tokens that a query sees, itself included; `None` is all. The kernels have no window. Up to its width a window changes
    /// nothing, so [`ModelConfig::max_position_embeddings`](crate::ModelConfig::max_position_embeddings) is no greater.
    pub window: Option<usize>,
    /// What scores are multiplied by; `None` is `1 / sqrt(head_dim)`.
    pub score_scale: Option<f64>,
}

impl LayerSpec {
    /// What queries are multiplied by, for attention that multiplies scores by `1 / sqrt(head_dim)`. `None` leaves them.
    pub(crate) fn query_factor(&self, head_dim: usize) -> Option<f32> {
        self.score_scale.map(|scale| (scale * (head_dim as f64).sqrt()) as f32)
    }
}

/// What a family reads from config.json by rules of its own.
pub(crate) struct OwnFields {
    /// The rotary embeddings, each once.
    pub(crate) ropes: Vec<Rope>,
    /// Attention of every layer.
    pub(crate) layers: Vec<LayerSpec>,
}

impl OwnFields {
    /// Layers that are all alike, with the rope that config.json states.
    fn uniform(fields: Fields<'_>, layers: usize, head_dim: usize, window: Option<usize>) -> Result<Self, ModelError> {
        let layer = LayerSpec { rope: Some(0), window, score_scale: None };
        Ok(Self { ropes: vec![fields.rope(head_dim)?], layers: vec![layer; layers] })
    }
}

/// The field `sliding_window`, where it is there.
fn sliding_window(fields: Fields<'_>) -> Result<Option<usize>, ModelError> {
    fields.present("sliding_window").map(|_| fields.size("sliding_window", None)).transpose()
}

/// Heads that fill the hidden width.
fn filling_heads(hidden_size: usize, heads: usize) -> usize {
    (hidden_size / heads).max(1)
}

#[cfg(test)]
mod tests;
