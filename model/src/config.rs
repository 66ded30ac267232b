//! Parses config.json: the fields that all families share. Family-specific fields are in `family/`.

mod fields;

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

use overfill_kv::RopeSpec;

use crate::{Family, LayerSpec, ModelError, Rope, When, family::OwnFields, gguf::Gguf, weights::CONFIG_FIELDS};

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
    /// Number of token ids; ids start at 0.
    pub vocab_size: usize,
    /// Maximum sequence length in tokens. At most the smallest sliding window: windows are not implemented, but have no
    /// effect on sequences up to their width.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// The distinct rotary embeddings of all layers.
    pub ropes: Vec<Rope>,
    /// Attention settings of each layer.
    pub layers: Vec<LayerSpec>,
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
        if let Some(act) = f.present("hidden_act").filter(|a| a.as_str() != Some("silu")) {
            return Err(ModelError::unsupported(file, "hidden_act", act, "silu"));
        }
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
        let default = (family.head_dim)(hidden_size, num_attention_heads);
        let head_dim = f.size_to(MAX_HEAD_DIM, "head_dim", Some(default))?;
        if head_dim % 2 != 0 {
            return Err(f.bad("head_dim", "an even number"));
        }

        let num_hidden_layers = f.size_to(MAX_LAYERS, "num_hidden_layers", None)?;
        let OwnFields { ropes, layers } = (family.read)(f, num_hidden_layers, head_dim)?;
        let context = f.size("max_position_embeddings", Some(2048))?;
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
            vocab_size: f.size("vocab_size", None)?,
            max_position_embeddings: layers.iter().filter_map(|layer| layer.window).fold(context, usize::min),
            rms_norm_eps: f.number("rms_norm_eps", Some(1e-6))?,
            ropes,
            layers,
            tie_word_embeddings: f.flag("tie_word_embeddings", false)?,
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

    /// The rotary embedding as a KV schema states it. If layers differ, its text describes each run of layers.
    pub fn rope_spec(&self) -> RopeSpec {
        let runs: Vec<&[LayerSpec]> = self.layers.chunk_by(|a, b| a.rope == b.rope).collect();
        if let ([rope], [[layer, ..]]) = (self.ropes.as_slice(), runs.as_slice())
            && layer.rope.is_some()
        {
            return RopeSpec { theta: rope.theta, scaling: rope.scaling.to_string() };
        }
        let of = |run: &&[LayerSpec]| match run[0].rope.and_then(|index| self.ropes.get(index)) {
            Some(rope) => format!("{} layers theta={} {}", run.len(), rope.theta, rope.scaling),
            None => format!("{} layers without", run.len()),
        };
        let theta = self.ropes.first().map_or(0.0, |rope| rope.theta);
        let scaling = runs.iter().map(of).collect::<Vec<_>>().join("; ");
        RopeSpec { theta, scaling }
    }

    /// Rotary frequencies of each of `ropes`, in radians per token, `[head_dim / 2]` each.
    pub fn inverse_frequencies(&self) -> Vec<Vec<f32>> {
        self.ropes.iter().map(|rope| rope.inverse_frequencies(self.head_dim)).collect()
    }
}

#[cfg(test)]
mod tests;
