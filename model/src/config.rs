//! config.json, turned into what the decoder needs.

use std::{fmt, fs, path::Path};

use serde_json::{Map, Value, json};

use overfill_kv::RopeSpec;

use crate::{ModelError, gguf::Gguf};

/// Model families, which differ in biases and norms only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3.x.
    Llama,
    /// Mistral: Llama's block.
    Mistral,
    /// Qwen2 and 2.5: bias on q, k and v.
    Qwen2,
    /// Qwen3: RMS norm on every head of q and k.
    Qwen3,
}

const FAMILIES: [(&str, &str, Family); 4] = [
    ("LlamaForCausalLM", "llama", Family::Llama),
    ("MistralForCausalLM", "mistral", Family::Mistral),
    ("Qwen2ForCausalLM", "qwen2", Family::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Family::Qwen3),
];

/// Earlier versions of our own tools wrote this field. Only `float32` is right, so it says nothing any more.
const ROPE_FREQUENCY_DTYPE: &str = "rope_frequency_dtype";

/// What a KV schema can say. They also bound the memory that a configuration alone can ask for: its list of tensors.
const MAX_LAYERS: usize = 1024;
const MAX_KV_HEADS: usize = 4096;
const MAX_HEAD_DIM: usize = 4096;

/// How rotary frequencies are stretched beyond the length a model was first trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.x: long waves divided by `factor`, short ones kept, those between interpolated.
    Llama3 {
        /// The divisor of long waves.
        factor: f64,
        /// Waves longer than `original / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Waves shorter than `original / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context in tokens before stretching.
        original_max_position_embeddings: u32,
    },
    /// Each frequency divided by a factor of its own, `[head_dim / 2]`: the form that GGUF files have.
    Factors(Vec<f32>),
}

impl fmt::Display for RopeScaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Linear { factor } => write!(f, "linear factor={factor}"),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => write!(
                f,
                "llama3 factor={factor} low={low_freq_factor} high={high_freq_factor} \
                 original={original_max_position_embeddings}"
            ),
            // Every factor to its last digit, equal neighbours counted: a schema compares the text.
            Self::Factors(factors) => {
                f.write_str("factors")?;
                for (i, run) in factors.chunk_by(|a, b| a == b).enumerate() {
                    write!(f, "{}{}x{}", if i == 0 { " " } else { "," }, run[0], run.len())?;
                }
                Ok(())
            }
        }
    }
}

/// A decoder's geometry. Sizes in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which block.
    pub family: Family,
    /// Residual width.
    pub hidden_size: usize,
    /// MLP width.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head. Its product with the heads need not be `hidden_size`: pruning cuts the one and not the other.
    pub head_dim: usize,
    /// Token ids run from 0 to this, exclusive.
    pub vocab_size: usize,
    /// Longest sequence in tokens (a sliding window counts as its width: up to there it changes nothing).
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their scaling.
    pub rope_scaling: RopeScaling,
    /// Is the output head the embedding?
    pub tie_word_embeddings: bool,
    /// Bias on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the attention's output.
    pub o_bias: bool,
    /// Bias on the MLP's three matrices.
    pub mlp_bias: bool,
    /// config.json as it was read; [`ModelConfig::to_json`] keeps the fields that are not ours.
    pub raw: Map<String, Value>,
}

/// The sizes of attention: query heads, KV heads that divide them, and the width of both.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl Heads {
    /// Query heads that share a KV head.
    pub(crate) fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Elements of one layer of a KV block, keys and values.
    pub(crate) fn block_elements(self) -> usize {
        2 * self.kv_heads * overfill_kv::BLOCK_TOKENS * self.head_dim
    }
}

/// Reads fields of one JSON object, with errors that name them.
struct Fields<'a> {
    file: &'a Path,
    map: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn present(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    fn bad(&self, field: &str, supported: &str) -> ModelError {
        let value = self.map.get(field).map_or("absent".into(), Value::to_string);
        ModelError::unsupported(self.file, field, value, supported)
    }

    fn size_or(&self, field: &str, default: Option<usize>) -> Result<usize, ModelError> {
        self.size_to(1 << 24, field, default)
    }

    fn size_to(&self, limit: usize, field: &str, default: Option<usize>) -> Result<usize, ModelError> {
        match (self.present(field), default) {
            (None, Some(default)) if default <= limit => Ok(default),
            (value, _) => value
                .and_then(Value::as_u64)
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| (1..=limit).contains(n))
                .ok_or_else(|| self.bad(field, &format!("a whole number from 1 to {limit}"))),
        }
    }

    fn size(&self, field: &str) -> Result<usize, ModelError> {
        self.size_or(field, None)
    }

    fn number(&self, field: &str, default: Option<f64>) -> Result<f64, ModelError> {
        match (self.present(field), default) {
            (None, Some(default)) => Ok(default),
            (value, _) => value
                .and_then(Value::as_f64)
                .filter(|n| n.is_finite() && *n > 0.0)
                .ok_or_else(|| self.bad(field, "a positive number")),
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, ModelError> {
        match self.present(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(field, "true or false")),
        }
    }

    fn scaling(&self) -> Result<RopeScaling, ModelError> {
        let kind = self.present("rope_type").or(self.present("type")).and_then(Value::as_str).unwrap_or("default");
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.number("factor", None)? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: self.number("factor", None)?,
                low_freq_factor: self.number("low_freq_factor", None)?,
                high_freq_factor: self.number("high_freq_factor", None)?,
                original_max_position_embeddings: self.size("original_max_position_embeddings")? as u32,
            }),
            "factors" => Ok(RopeScaling::Factors(self.factors()?)),
            other => Err(ModelError::unsupported(self.file, "rope_type", other, "default, linear, llama3, factors")),
        }
    }

    fn factors(&self) -> Result<Vec<f32>, ModelError> {
        let supported = "a list of numbers from 1e-6 to 1e6";
        let factor = |value: &Value| value.as_f64().filter(|n| (1e-6..=1e6).contains(n)).map(|n| n as f32);
        let factors = self.present("factors").and_then(Value::as_array);
        factors.and_then(|list| list.iter().map(factor).collect()).ok_or_else(|| self.bad("factors", supported))
    }
}

impl ModelConfig {
    /// Reads `folder/config.json`, or the metadata of a GGUF file: `folder` itself, or the only one in it.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        if let Some(file) = Gguf::find(folder)? {
            return Gguf::open(&file)?.config();
        }
        let file = folder.join("config.json");
        let bytes = fs::read(&file).map_err(|e| ModelError::io(&file, e))?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| ModelError::malformed(&file, e))?;
        Self::from_json(&file, value)
    }

    /// Reads a parsed config.json; `file` is what errors name.
    pub fn from_json(file: &Path, value: Value) -> Result<Self, ModelError> {
        let Value::Object(raw) = value else {
            return Err(ModelError::malformed(file, "not a JSON object"));
        };
        let f = Fields { file, map: &raw };
        let architecture = f.present("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let model_type = f.present("model_type").and_then(Value::as_str);
        let family = FAMILIES
            .iter()
            .find(|(class, kind, _)| architecture.map_or(model_type == Some(kind), |a| a == *class))
            .map(|(_, _, family)| *family)
            .ok_or_else(|| {
                f.bad("architectures", "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM")
            })?;
        if let Some(act) = f.present("hidden_act").filter(|a| a.as_str() != Some("silu")) {
            return Err(ModelError::unsupported(file, "hidden_act", act, "silu"));
        }
        if f.present(ROPE_FREQUENCY_DTYPE).is_some_and(|dtype| dtype.as_str() != Some("float32")) {
            return Err(f.bad(ROPE_FREQUENCY_DTYPE, "float32"));
        }

        let hidden_size = f.size("hidden_size")?;
        let num_attention_heads = f.size("num_attention_heads")?;
        let num_key_value_heads = f.size_to(MAX_KV_HEADS, "num_key_value_heads", Some(num_attention_heads))?;
        if num_attention_heads % num_key_value_heads != 0 {
            return Err(
                f.bad("num_key_value_heads", &format!("a divisor of num_attention_heads ({num_attention_heads})"))
            );
        }
        let head_dim = match family {
            Family::Qwen3 => f.size_to(MAX_HEAD_DIM, "head_dim", Some(128))?,
            _ => f.size_to(MAX_HEAD_DIM, "head_dim", Some((hidden_size / num_attention_heads).max(1)))?,
        };
        if head_dim % 2 != 0 {
            return Err(f.bad("head_dim", "an even number"));
        }

        // transformers 5 writes rope_parameters; before, rope_theta and rope_scaling.
        let rope = f.present("rope_parameters").or(f.present("rope_scaling")).and_then(Value::as_object);
        let empty = Map::new();
        let scaling = Fields { file, map: rope.unwrap_or(&empty) };
        let rope_theta = scaling.number("rope_theta", Some(f.number("rope_theta", Some(10_000.0))?))?;
        let rope_scaling = scaling.scaling()?;
        if let RopeScaling::Factors(factors) = &rope_scaling
            && factors.len() != head_dim / 2
        {
            let (count, supported) = (factors.len(), format!("half of head_dim ({head_dim})"));
            return Err(ModelError::unsupported(file, "number of rope factors", count, &supported));
        }

        let mut max_position_embeddings = f.size_or("max_position_embeddings", Some(2048))?;
        let windowed = match family {
            Family::Mistral => true,
            Family::Qwen2 | Family::Qwen3 => f.flag("use_sliding_window", false)?,
            Family::Llama => false,
        };
        if windowed && f.present("sliding_window").is_some() {
            max_position_embeddings = max_position_embeddings.min(f.size("sliding_window")?);
        }
        let attention_bias = f.flag("attention_bias", false)?;
        Ok(Self {
            family,
            hidden_size,
            intermediate_size: f.size("intermediate_size")?,
            num_hidden_layers: f.size_to(MAX_LAYERS, "num_hidden_layers", None)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: f.size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: f.number("rms_norm_eps", Some(1e-6))?,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: f.flag("tie_word_embeddings", false)?,
            qkv_bias: family == Family::Qwen2 || attention_bias,
            o_bias: family != Family::Qwen2 && attention_bias,
            mlp_bias: f.flag("mlp_bias", false)?,
            raw,
        })
    }

    /// config.json for this geometry: the fields it was read from, with those that pruning changes set anew.
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
        // One entry a layer: it must not outlive a layer cut.
        if let Some(Value::Array(types)) = map.get_mut("layer_types") {
            types.truncate(self.num_hidden_layers);
        }
        Value::Object(map)
    }

    /// Does the family norm every head of q and k?
    pub fn qk_norm(&self) -> bool {
        self.family == Family::Qwen3
    }

    /// Sizes of attention.
    pub(crate) fn heads(&self) -> Heads {
        Heads { heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim: self.head_dim }
    }

    /// Rotary embedding, as a KV schema states it.
    pub fn rope_spec(&self) -> RopeSpec {
        RopeSpec { theta: self.rope_theta, scaling: self.rope_scaling.to_string() }
    }

    /// Rotary frequencies in radians per token, `[head_dim / 2]`, as in transformers' modeling_rope_utils.py. They are f32
    /// whatever the type of the weights: transformers' `from_pretrained`, vLLM, SGLang and llama.cpp all keep them so.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let base = |i: usize| 1.0 / (self.rope_theta as f32).powf((2 * i) as f32 / self.head_dim as f32);
        let scale = |(i, freq): (usize, f32)| match self.rope_scaling {
            RopeScaling::None => freq,
            RopeScaling::Linear { factor } => freq / factor as f32,
            RopeScaling::Factors(ref factors) => freq / factors.get(i).copied().unwrap_or(1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = f64::from(original_max_position_embeddings);
                let wave = 2.0 * std::f64::consts::PI / f64::from(freq);
                let stretched = freq / factor as f32;
                if wave < original / high_freq_factor {
                    freq
                } else if wave > original / low_freq_factor {
                    stretched
                } else {
                    let smooth = ((original / wave - low_freq_factor) / (high_freq_factor - low_freq_factor)) as f32;
                    (1.0 - smooth) * stretched + smooth * freq
                }
            }
        };
        (0..self.head_dim / 2).map(base).enumerate().map(scale).collect()
    }

    /// Every weight tensor by its Hugging Face name, with its shape.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (h, m, d) = (self.hidden_size, self.intermediate_size, self.head_dim);
        let (q, kv) = (self.num_attention_heads * d, self.num_key_value_heads * d);
        let mut out = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab_size, h])];
        for layer in 0..self.num_hidden_layers {
            let mut add = |name: &str, shape: Vec<usize>| out.push((format!("model.layers.{layer}.{name}"), shape));
            add("input_layernorm.weight", vec![h]);
            add("post_attention_layernorm.weight", vec![h]);
            for (name, rows, columns, bias) in [
                ("self_attn.q_proj", q, h, self.qkv_bias),
                ("self_attn.k_proj", kv, h, self.qkv_bias),
                ("self_attn.v_proj", kv, h, self.qkv_bias),
                ("self_attn.o_proj", h, q, self.o_bias),
                ("mlp.gate_proj", m, h, self.mlp_bias),
                ("mlp.up_proj", m, h, self.mlp_bias),
                ("mlp.down_proj", h, m, self.mlp_bias),
            ] {
                add(&format!("{name}.weight"), vec![rows, columns]);
                if bias {
                    add(&format!("{name}.bias"), vec![rows]);
                }
            }
            if self.qk_norm() {
                add("self_attn.q_norm.weight", vec![d]);
                add("self_attn.k_norm.weight", vec![d]);
            }
        }
        out.push(("model.norm.weight".into(), vec![h]));
        if !self.tie_word_embeddings {
            out.push(("lm_head.weight".into(), vec![self.vocab_size, h]));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 1689, "intermediate_size": 4505,
            "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 128256, "tie_word_embeddings": true, "rms_norm_eps": 1e-5
        })
    }

    fn parse(value: Value) -> Result<ModelConfig, ModelError> {
        ModelConfig::from_json(Path::new("m/config.json"), value)
    }

    #[test]
    fn heads_need_not_fill_the_hidden_size() {
        let config = parse(llama()).unwrap();
        assert_ne!(config.head_dim * config.num_attention_heads, config.hidden_size);
        let q = config.tensor_shapes().into_iter().find(|(n, _)| n.ends_with("0.self_attn.q_proj.weight")).unwrap();
        assert_eq!(q.1, [3072, 1689]);
        assert_eq!(
            parse(config.to_json()).unwrap(),
            ModelConfig { raw: config.to_json().as_object().unwrap().clone(), ..config }
        );
    }

    #[test]
    fn faults_name_file_field_and_values() {
        let with = |field: &str, value: Value| {
            let mut config = llama();
            config[field] = value;
            parse(config).unwrap_err().to_string()
        };
        assert!(
            with("architectures", json!(["GPT2LMHeadModel"]))
                .starts_with("m/config.json: architectures is [\"GPT2LMHeadModel\"], supported: Llama")
        );
        assert!(with("hidden_act", json!("gelu")).contains("hidden_act is \"gelu\", supported: silu"));
        assert!(with("num_key_value_heads", json!(7)).contains("a divisor of num_attention_heads (24)"));
        assert!(with("hidden_size", json!(-1)).contains("hidden_size is -1"));
        assert!(with("rope_scaling", json!({"rope_type": "yarn"})).contains("rope_type is yarn"));
        assert!(with("num_hidden_layers", json!(16_777_216)).ends_with("supported: a whole number from 1 to 1024"));
        assert!(with("head_dim", json!(4098)).ends_with("supported: a whole number from 1 to 4096"));
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let llama3 = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0});
        let mut old = llama();
        old["rope_theta"] = json!(500000.0);
        old["rope_scaling"] = llama3.clone();
        let mut new = llama();
        new["rope_parameters"] = llama3;
        assert_eq!(parse(old).unwrap().rope_spec(), parse(new).unwrap().rope_spec());
    }

    #[test]
    fn frequencies_are_f32_whatever_the_weights_are() {
        let with = |field: &str, dtype: &str| {
            let mut config = llama();
            config[field] = json!(dtype);
            parse(config)
        };
        let plain = parse(llama()).unwrap();
        for (field, dtype) in [
            ("torch_dtype", "bfloat16"),
            ("dtype", "bfloat16"),
            ("dtype", "float16"),
            ("dtype", "float32"),
            (ROPE_FREQUENCY_DTYPE, "float32"),
        ] {
            let config = with(field, dtype).unwrap();
            assert_eq!(config.inverse_frequencies(), plain.inverse_frequencies(), "{field} {dtype}");
            assert_eq!(config.rope_spec(), plain.rope_spec(), "{field} {dtype}");
            assert_eq!(config.to_json().get(ROPE_FREQUENCY_DTYPE), None);
        }
        let e = with(ROPE_FREQUENCY_DTYPE, "bfloat16").unwrap_err().to_string();
        assert_eq!(e, "m/config.json: rope_frequency_dtype is \"bfloat16\", supported: float32");
    }

    #[test]
    fn a_sliding_window_bounds_the_context() {
        let mut config = llama();
        config["architectures"] = json!(["MistralForCausalLM"]);
        config["max_position_embeddings"] = json!(32768);
        config["sliding_window"] = json!(4096);
        assert_eq!(parse(config).unwrap().max_position_embeddings, 4096);
    }
}
