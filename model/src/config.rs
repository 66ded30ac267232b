//! Parses config.json: the fields that all families share. Family-specific fields are in `family/`.

mod fields;
mod rope;

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

use overfill_kv::{LayerAttention, RopeSpec};

use crate::{
    Activation, Family, LayerSpec, ModelError, Rope, Scales, When,
    family::{OwnFields, Sizes},
    gguf::Gguf,
    weights::CONFIG_FIELDS,
};

pub(crate) use fields::Fields;

/// Earlier versions of Overfill wrote this field. Only `float32` is supported, so the field has no effect any more.
const ROPE_FREQUENCY_DTYPE: &str = "rope_frequency_dtype";

/// Limits of a KV schema. They also bound the memory that a configuration alone can cause to be allocated (its list of
/// tensors).
const MAX_LAYERS: usize = 1024;
const MAX_KV_HEADS: usize = 4096;
const MAX_HEAD_DIM: usize = 4096;

/// A decoder's geometry. Sizes are in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The model's family.
    pub family: &'static Family,
    /// Residual width.
    pub hidden_size: usize,
    /// MLP width.
    pub intermediate_size: usize,
    /// Number of layers; equals `layers.len()`.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key/value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head. `num_attention_heads * head_dim` may differ from `hidden_size`, because pruning cuts only the
    /// latter.
    pub head_dim: usize,
    /// Number of leading channels of a head that rotary embeddings rotate; even.
    pub rotary_dim: usize,
    /// Number of token ids; ids start at 0.
    pub vocab_size: usize,
    /// Maximum sequence length in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// The distinct rotary embeddings of all layers.
    pub ropes: Vec<Rope>,
    /// Attention settings of each layer.
    pub layers: Vec<LayerSpec>,
    /// Activation function of the MLP.
    pub activation: Activation,
    /// Factors of activations.
    pub scales: Scales,
    /// Whether the embedding is also the output head.
    pub tie_word_embeddings: bool,
    /// Whether attention has biases, if the family leaves this to config.json.
    pub attention_bias: bool,
    /// Whether the MLP has biases, if the family leaves this to config.json.
    pub mlp_bias: bool,
    /// config.json as read. [`ModelConfig::to_json`] keeps the fields that this crate does not use.
    pub raw: Map<String, Value>,
}

/// Attention sizes: number of query heads, number of KV heads (a divisor), and head width.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl Heads {
    /// Number of query heads per KV head.
    pub(crate) fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Elements of a KV block in one layer, keys and values.
    pub(crate) fn block_elements(self) -> usize {
        2 * self.kv_heads * overfill_kv::BLOCK_TOKENS * self.head_dim
    }
}

impl ModelConfig {
    /// Reads `folder/config.json`, or the metadata of a GGUF file: `folder` itself, or the only .gguf file in it.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        if let Some(file) = Gguf::find(folder)? {
            return Gguf::open(&file)?.config();
        }
        let file = folder.join("config.json");
        let bytes = fs::read(&file).map_err(|e| ModelError::io(&file, e))?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| ModelError::malformed(&file, e))?;
        Self::from_json(&file, value)
    }

    /// Reads a parsed config.json. Errors name `file`.
    pub fn from_json(file: &Path, value: Value) -> Result<Self, ModelError> {
        let Value::Object(raw) = value else {
            return Err(ModelError::malformed(file, "not a JSON object"));
        };
        let f = Fields { file, map: &raw };
        let family = Family::of_config(f)?;
        if f.present(ROPE_FREQUENCY_DTYPE).is_some_and(|dtype| dtype.as_str() != Some("float32")) {
            return Err(f.bad(ROPE_FREQUENCY_DTYPE, "float32"));
        }

        let hidden_size = f.size("hidden_size", None)?;
        let num_attention_heads = f.size("num_attention_heads", None)?;
        let num_key_value_heads = f.size_to(MAX_KV_HEADS, "num_key_value_heads", Some(num_attention_heads))?;
        if num_attention_heads % num_key_value_heads != 0 {
            return Err(
                f.bad("num_key_value_heads", &format!("a divisor of num_attention_heads ({num_attention_heads})"))
            );
        }
        let default = (family.defaults.head_dim)(hidden_size, num_attention_heads);
        let head_dim = f.size_to(MAX_HEAD_DIM, "head_dim", Some(default))?;
        if head_dim % 2 != 0 {
            return Err(f.bad("head_dim", "an even number"));
        }

        let rotary_dim = f.rotary_dim(head_dim, family.partial_rotation)?;

        let num_hidden_layers = f.size_to(MAX_LAYERS, "num_hidden_layers", None)?;
        let sizes = Sizes { layers: num_hidden_layers, rotary_dim };
        let OwnFields { ropes, layers, activation, scales } = (family.read)(f, sizes)?;
        let context = f.context()?;
        // A flag is ignored unless the family's table refers to it.
        let flag = |field: &str, when: When| {
            let set = f.flag(field, false)?;
            Ok::<_, ModelError>(set && family.modules.iter().any(|module| [module.weight, module.bias].contains(&when)))
        };
        Ok(Self {
            family,
            hidden_size,
            intermediate_size: f.size("intermediate_size", None)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rotary_dim,
            vocab_size: f.size("vocab_size", None)?,
            max_position_embeddings: ropes.first().map_or(context, |rope| rope.context(context)),
            rms_norm_eps: f.number("rms_norm_eps", Some(family.defaults.rms_norm_eps))?,
            ropes,
            layers,
            activation,
            scales,
            tie_word_embeddings: f.flag("tie_word_embeddings", family.defaults.tie_word_embeddings)?,
            attention_bias: flag("attention_bias", When::AttentionBias)?,
            mlp_bias: flag("mlp_bias", When::MlpBias)?,
            raw,
        })
    }

    /// The same model with narrower widths and only the given layers. `layers` holds ascending layer indices: all of them,
    /// or fewer than `num_hidden_layers`.
    pub fn cut(&self, hidden_size: usize, intermediate_size: usize, layers: &[u32]) -> Self {
        let mut raw = self.raw.clone();
        let kept = |index: &u32| *index as usize;
        // transformers writes one entry per layer.
        if let Some(Value::Array(types)) = raw.get_mut("layer_types") {
            *types = layers.iter().filter_map(|layer| types.get(kept(layer)).cloned()).collect();
        }
        if layers.len() < self.num_hidden_layers {
            (self.family.keep_layers)(&mut raw, layers);
        }
        let layers: Vec<LayerSpec> = layers.iter().filter_map(|layer| self.layers.get(kept(layer)).cloned()).collect();
        Self { hidden_size, intermediate_size, num_hidden_layers: layers.len(), layers, raw, ..self.clone() }
    }

    /// config.json for this geometry: the fields as read, with the fields that pruning changes updated.
    pub fn to_json(&self) -> Value {
        let mut map = self.raw.clone();
        for (field, value) in [
            ("hidden_size", json!(self.hidden_size)),
            ("intermediate_size", json!(self.intermediate_size)),
            ("num_hidden_layers", json!(self.num_hidden_layers)),
            ("num_attention_heads", json!(self.num_attention_heads)),
            ("num_key_value_heads", json!(self.num_key_value_heads)),
            ("head_dim", json!(self.head_dim)),
            ("vocab_size", json!(self.vocab_size)),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
        ] {
            map.insert(field.into(), value);
        }
        map.remove(ROPE_FREQUENCY_DTYPE);
        // Weights are always written as plain tensors.
        CONFIG_FIELDS.iter().for_each(|field| drop(map.remove(*field)));
        Value::Object(map)
    }

    /// Attention sizes.
    pub(crate) fn heads(&self) -> Heads {
        Heads { heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim: self.head_dim }
    }

    /// The rotary embedding as a KV schema states it. If layers differ in it, [`ModelConfig::layer_attention`] states it.
    pub fn rope_spec(&self) -> RopeSpec {
        match self.layers.as_slice() {
            [first, rest @ ..] if rest.iter().all(|layer| layer.rope == first.rope) => self.rope_of(first),
            _ => RopeSpec { theta: self.ropes.first().map_or(0.0, |rope| rope.theta), scaling: "by layer".into() },
        }
    }

    /// What each layer's keys are, as a KV schema states it; empty if all layers have the same rotary embedding and no
    /// window.
    pub fn layer_attention(&self) -> Vec<LayerAttention> {
        let plain = |layer: &LayerSpec| layer.window.is_none() && layer.rope == self.layers[0].rope;
        if self.layers.iter().all(plain) {
            return Vec::new();
        }
        (0..self.layers.len()).filter_map(|layer| self.attention_of(layer)).collect()
    }

    fn rope_of(&self, layer: &LayerSpec) -> RopeSpec {
        let Some(rope) = layer.rope.and_then(|rope| self.ropes.get(rope)) else {
            return RopeSpec { theta: 0.0, scaling: "without rotation".into() };
        };
        let scaling = match self.rotary_dim == self.head_dim {
            true => rope.scaling.to_string(),
            false => format!("{} of {} channels", rope.scaling, self.rotary_dim),
        };
        RopeSpec { theta: rope.theta, scaling }
    }

    /// A layer's rotation and window; `None` if there is no such layer.
    pub fn attention_of(&self, layer: usize) -> Option<LayerAttention> {
        self.layers.get(layer).map(|spec| self.rope_of(spec).of_layer(spec.window))
    }

    /// Whether a norm multiplies by 1 + its weights.
    pub fn norms_around_zero(&self) -> bool {
        self.family.norms_around_zero
    }

    /// Factor of token embeddings.
    pub fn embedding_scale(&self) -> f64 {
        self.scales.embedding.unwrap_or_else(|| (self.hidden_size as f64).sqrt())
    }

    /// Rotary frequencies of each of `ropes`, in radians per token, `[rotary_dim / 2]` each.
    pub fn inverse_frequencies(&self) -> Vec<Vec<f32>> {
        self.ropes.iter().map(|rope| rope.inverse_frequencies(self.rotary_dim)).collect()
    }
}

#[cfg(test)]
mod tests;
