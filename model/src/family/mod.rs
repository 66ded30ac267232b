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

mod finder;
mod gemma2;
mod gemma3;
mod granite;
mod layers;
mod llama;
mod mistral;
mod olmo2;
mod parameters;
mod phi3;
mod qwen2;
mod qwen3;
mod smollm3;
mod tensors;

use std::fmt;

use serde_json::{Map, Value};

use crate::{ModelError, Rope, config::Fields};

pub(crate) use finder::Finder;
pub use layers::LayerSpec;
pub use parameters::{Axis, Kind, Module, Parameter, When};
pub(crate) use tensors::TensorRows;
pub use tensors::TensorSpec;

/// All families, in the order in which errors list them.
const FAMILIES: [&Family; 10] = [
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &gemma2::FAMILY,
    &gemma3::FAMILY,
    &phi3::FAMILY,
    &smollm3::FAMILY,
    &olmo2::FAMILY,
    &granite::FAMILY,
];

/// Everything that is specific to one model family.
pub struct Family {
    /// The class name in config.json's `architectures`.
    pub class: &'static str,
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// Its properties in GGUF files; `None` if GGUF files store it as another family.
    pub(crate) gguf: Option<GgufFamily>,
    /// Values of fields that config.json does not state.
    pub(crate) defaults: Defaults,
    /// Table of its parameters, in model order.
    pub(crate) modules: &'static [Module],
    /// Whether a norm multiplies by 1 + its weights.
    pub(crate) norms_around_zero: bool,
    /// Whether config.json may leave a part of each head without rotation (`partial_rotary_factor`).
    pub(crate) partial_rotation: bool,
    /// Reads the family-specific fields of config.json. Arguments: the fields, and sizes that were read before.
    pub(crate) read: fn(Fields<'_>, Sizes) -> Result<OwnFields, ModelError>,
    /// Updates the family-specific fields of config.json for a model that keeps only these layers.
    pub(crate) keep_layers: fn(&mut Map<String, Value>, &[u32]),
}

/// What transformers' configuration classes assume of absent fields, where families differ.
pub(crate) struct Defaults {
    /// Computes the width of a head from the hidden size and the number of heads.
    pub(crate) head_dim: fn(usize, usize) -> usize,
    pub(crate) rms_norm_eps: f64,
    pub(crate) tie_word_embeddings: bool,
}

impl Defaults {
    /// Llama's.
    const LLAMA: Self =
        Self { head_dim: |hidden, heads| (hidden / heads).max(1), rms_norm_eps: 1e-6, tie_word_embeddings: false };
}

/// Sizes that the fields of a family depend on.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    /// Number of layers.
    pub(crate) layers: usize,
    /// Rotated channels of a head.
    pub(crate) rotary_dim: usize,
}

/// A family's properties in GGUF files.
pub(crate) struct GgufFamily {
    /// `general.architecture`.
    pub(crate) architecture: &'static str,
    /// Whether llama.cpp's converter interleaves the rows of q and k, so that rotation pairs neighbouring rows.
    pub(crate) interleaved: bool,
    /// Further fields of config.json, and the metadata keys (after the architecture) that state them.
    pub(crate) fields: &'static [(&'static str, &'static str)],
    /// What a sliding window in the metadata means.
    pub(crate) window: GgufWindow,
}

/// What `attention.sliding_window` in the metadata of a GGUF file means.
#[derive(Clone, Copy)]
pub(crate) enum GgufWindow {
    /// The field `sliding_window` of the family with this class. Without it, no layer has a window.
    Of(&'static str),
    /// The file does not say which layers have it. It has no effect on sequences up to its width, so it limits the context.
    LimitsContext,
    /// Another model than this family's.
    Refused,
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

/// The activation function of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU (Hendrycks & Gimpel, arXiv 1606.08415), approximated with tanh.
    GeluTanh,
}

impl Activation {
    /// The activation that `field` names.
    fn read(fields: Fields<'_>, field: &str, default: &str) -> Result<Self, ModelError> {
        match fields.present(field).map_or(Some(default), Value::as_str) {
            Some("silu") => Ok(Self::Silu),
            Some("gelu_pytorch_tanh") => Ok(Self::GeluTanh),
            _ => Err(fields.bad(field, "silu, gelu_pytorch_tanh")),
        }
    }
}

/// Factors of activations, outside of the linear layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    /// Factor of token embeddings; `None`: the square root of the hidden size.
    pub embedding: Option<f64>,
    /// Factor of what attention and MLP add to the residual stream.
    pub residual: f64,
    /// Factor of the logits.
    pub logits: f64,
    /// Logits are `cap * tanh(logits / cap)`, after the factor; `None`: as they are.
    pub logit_cap: Option<f64>,
}

impl Scales {
    /// No factors.
    pub const ONE: Self = Self { embedding: Some(1.0), residual: 1.0, logits: 1.0, logit_cap: None };
}

/// The family-specific content of config.json.
pub(crate) struct OwnFields {
    /// The distinct rotary embeddings. The first one belongs to layers without windows.
    pub(crate) ropes: Vec<Rope>,
    /// Attention settings of every layer.
    pub(crate) layers: Vec<LayerSpec>,
    pub(crate) activation: Activation,
    pub(crate) scales: Scales,
}

impl OwnFields {
    /// A model without factors, whose layers differ at most in their windows: the rotary embedding that config.json
    /// states, and `windows` for each layer.
    fn with_windows(fields: Fields<'_>, sizes: Sizes, windows: Vec<Option<usize>>) -> Result<Self, ModelError> {
        let layer = |window| LayerSpec { rope: Some(0), window, ..LayerSpec::PLAIN };
        Ok(Self {
            ropes: vec![fields.rope(10_000.0, sizes.rotary_dim)?],
            layers: windows.into_iter().map(layer).collect(),
            activation: Activation::read(fields, "hidden_act", "silu")?,
            scales: Scales::ONE,
        })
    }

    /// The same with one window, or none, for all layers.
    fn uniform(fields: Fields<'_>, sizes: Sizes, window: Option<usize>) -> Result<Self, ModelError> {
        Self::with_windows(fields, sizes, vec![window; sizes.layers])
    }
}

#[cfg(test)]
mod tests;
