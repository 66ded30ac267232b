//! Model families: everything that is specific to one family. The rest of this crate is the same for all families.
//!
//! A new family needs a file here, an entry in [`FAMILIES`], and kernels if its arithmetic is new. Its file defines the
//! architecture's names, the defaults and rules of its config.json, its table of parameters ([`parameters`]), and the
//! attention settings of each layer ([`LayerSpec`]).
//!
//! The table of parameters determines the computation. A decoder adds a bias, normalises the heads of q, or has a
//! separate head if the table contains the parameter. A norm at a new position is therefore a new [`Parameter`], not a
//! flag, and the extent of a parameter is its [`Axis`]. Both decoders reject a table with a tensor that they do not
//! use.
//!
//! What further families will need:
//!
//! - **Norms after attention and MLP** (Gemma 2 and 3, OLMo 2): two parameters, `AttentionOutputNorm` and
//!   `MlpOutputNorm`, and a step in each decoder for them. OLMo 2's table omits `AttentionNorm` and `MlpNorm`, which
//!   become optional. In Gemma, the module `post_attention_layernorm` is the output norm, and
//!   `pre_feedforward_layernorm` is the `MlpNorm`.
//! - **q/k norm over the whole width** (OLMo 2): its modules have the axes `QueryHeads` and `KvHeads`, where Qwen3's
//!   have `HeadDim`. The decoders normalise over that axis.
//! - **Norms with weights around 0** (Gemma): a field of [`Family`]; loading adds 1.
//! - **gelu-tanh** (Gemma): config.rs reads `hidden_act` and rejects all values but silu. It becomes a field of
//!   [`ModelConfig`](crate::ModelConfig), with a kernel like `SiluMul`.
//! - **Embedding scale, residual multiplier, logit scale and cap** (Gemma, Granite): fields of [`OwnFields`] and `ModelConfig`,
//!   and a multiplication in each decoder.
//! - **A soft cap on scores** (Gemma 2): a field of [`LayerSpec`], and a kernel.
//! - **Scale of scores** (Gemma's `query_pre_attn_scalar`, Granite's `attention_multiplier`): [`LayerSpec::score_scale`].
//! - **Windows on some layers, two ropes** (Gemma 2 and 3): [`LayerSpec::window`] and [`LayerSpec::rope`] are set per
//!   layer. Until the kernels support windows, the smallest window limits the context. A `KvSchema` states one rope;
//!   [`rope_spec`] describes several in its text.
//! - **Layers without rope** (SmolLM3): [`LayerSpec::rope`] is `None`.
//! - **Fused tensors** (Phi-3's qkv_proj and gate_up_proj): a [`Module`] with several parts. Decoders locate each
//!   part's rows, and pruning writes the whole tensor.
//! - **Partial rotation of heads** (Phi-4): a field of [`Rope`], and a step in each decoder.
//! - **Family-specific GGUF metadata** (Gemma's soft caps and windows): a field of [`GgufFamily`] that maps it to
//!   fields of config.json.
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

/// All families, in the order in which errors list them.
const FAMILIES: [&Family; 4] = [&llama::FAMILY, &mistral::FAMILY, &qwen2::FAMILY, &qwen3::FAMILY];

/// Everything that is specific to one model family.
pub struct Family {
    /// The class name in config.json's `architectures`.
    pub class: &'static str,
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// Its properties in GGUF files; `None` if GGUF files store it as another family.
    pub(crate) gguf: Option<GgufFamily>,
    /// Computes the width of a head from the hidden size and the number of heads, if config.json does not state it.
    pub(crate) head_dim: fn(usize, usize) -> usize,
    /// Table of its parameters, in model order.
    pub(crate) modules: &'static [Module],
    /// Reads the family-specific fields of config.json. Arguments: the fields, the number of layers, head_dim.
    pub(crate) read: fn(Fields<'_>, usize, usize) -> Result<OwnFields, ModelError>,
    /// Updates the family-specific fields of config.json for a model that keeps only these layers.
    pub(crate) keep_layers: fn(&mut Map<String, Value>, &[u32]),
}

/// A family's properties in GGUF files.
pub(crate) struct GgufFamily {
    /// `general.architecture`.
    pub(crate) architecture: &'static str,
    /// Whether llama.cpp's converter interleaves the rows of q and k, so that rotation pairs neighbouring rows.
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
    /// Finds a family by config.json's `architectures`, or by `model_type` if that is absent.
    pub(crate) fn of_config(fields: Fields<'_>) -> Result<&'static Self, ModelError> {
        let class = fields.present("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let model_type = fields.present("model_type").and_then(Value::as_str);
        let named = |family: &&&Self| class.map_or(model_type == Some(family.model_type), |c| c == family.class);
        FAMILIES.iter().find(named).copied().ok_or_else(|| {
            let classes: Vec<&str> = FAMILIES.iter().map(|family| family.class).collect();
            fields.bad("architectures", &classes.join(", "))
        })
    }

    /// Finds a family by a GGUF file's `general.architecture`. The error lists the known architectures.
    pub(crate) fn of_gguf(architecture: Option<&str>) -> Result<(&'static Self, &'static GgufFamily), String> {
        let families = || FAMILIES.iter().filter_map(|family| Some((*family, family.gguf.as_ref()?)));
        families().find(|(_, gguf)| architecture == Some(gguf.architecture)).ok_or_else(|| {
            let known: Vec<&str> = families().map(|(_, gguf)| gguf.architecture).collect();
            known.join(", ")
        })
    }
}

/// Attention settings that may differ between the layers of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Index of the layer's rotary embedding in [`ModelConfig::ropes`](crate::ModelConfig::ropes); `None`: no rotation.
    pub rope: Option<usize>,
    /// Sliding window: number of tokens that a query attends to, itself included; `None` means all. The kernels do not
    /// implement windows. A window has no effect on sequences up to its width, so
    /// [`ModelConfig::max_position_embeddings`](crate::ModelConfig::max_position_embeddings) is limited to it.
    pub window: Option<usize>,
    /// Factor of the scores; `None` means `1 / sqrt(head_dim)`.
    pub score_scale: Option<f64>,
}

impl LayerSpec {
    /// Factor for the queries that gives `score_scale` with attention that multiplies scores by `1 / sqrt(head_dim)`.
    /// `None` leaves the queries as they are.
    pub(crate) fn query_factor(&self, head_dim: usize) -> Option<f32> {
        self.score_scale.map(|scale| (scale * (head_dim as f64).sqrt()) as f32)
    }
}

/// The family-specific content of config.json.
pub(crate) struct OwnFields {
    /// The distinct rotary embeddings.
    pub(crate) ropes: Vec<Rope>,
    /// Attention settings of every layer.
    pub(crate) layers: Vec<LayerSpec>,
}

impl OwnFields {
    /// Identical layers, all with the rotary embedding that config.json states.
    fn uniform(fields: Fields<'_>, layers: usize, head_dim: usize, window: Option<usize>) -> Result<Self, ModelError> {
        let layer = LayerSpec { rope: Some(0), window, score_scale: None };
        Ok(Self { ropes: vec![fields.rope(head_dim)?], layers: vec![layer; layers] })
    }
}

/// The field `sliding_window`; `None` if absent.
fn sliding_window(fields: Fields<'_>) -> Result<Option<usize>, ModelError> {
    fields.present("sliding_window").map(|_| fields.size("sliding_window", None)).transpose()
}

/// The width of heads that together fill the hidden size.
fn filling_heads(hidden_size: usize, heads: usize) -> usize {
    (hidden_size / heads).max(1)
}

#[cfg(test)]
mod tests;
